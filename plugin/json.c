/* SPDX-License-Identifier: GPL-2.0-or-later */
/* JSON text, in and out. */
#include "json.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH_MOST 16

struct reader {
    const char *p;
    unsigned depth;
};

static struct json *read_value(struct reader *r);

static void skip_space(struct reader *r)
{
    r->p += strspn(r->p, " \t\r\n");
}

static bool take(struct reader *r, char c)
{
    skip_space(r);
    if (*r->p != c) {
        return false;
    }
    r->p++;
    return true;
}

static bool read_string(struct reader *r, const char **text, size_t *length)
{
    if (!take(r, '"')) {
        return false;
    }
    *text = r->p;
    while (*r->p && *r->p != '"') {
        r->p += *r->p == '\\' && r->p[1] ? 2 : 1;
    }
    *length = r->p - *text;
    return take(r, '"');
}

static bool read_number(struct reader *r, struct json *v)
{
    size_t length = strspn(r->p, "+-0123456789.eE");
    char *end;

    errno = 0;
    v->integer = strtoll(r->p, &end, 10);
    v->type = !errno && end == r->p + length ? JSON_INT : JSON_REAL;
    r->p += length;
    return length;
}

static bool read_word(struct reader *r, struct json *v)
{
    static const struct { const char *word; enum json_type type; bool value; } words[] = {
        { "null", JSON_NULL, false }, { "true", JSON_BOOL, true }, { "false", JSON_BOOL, false },
    };

    for (unsigned i = 0; i < sizeof(words) / sizeof(*words); i++) {
        size_t n = strlen(words[i].word);

        if (!strncmp(r->p, words[i].word, n)) {
            r->p += n;
            v->type = words[i].type;
            v->boolean = words[i].value;
            return true;
        }
    }
    return false;
}

static bool read_members(struct reader *r, struct json *v, char close)
{
    struct json **end = &v->first;

    if (take(r, close)) {
        return true;
    }
    do {
        const char *key = NULL;
        size_t length = 0;

        if (v->type == JSON_OBJECT && !(read_string(r, &key, &length) && take(r, ':'))) {
            return false;
        }
        *end = read_value(r);
        if (!*end) {
            return false;
        }
        (*end)->key = key;
        (*end)->key_length = length;
        end = &(*end)->next;
        v->children++;
    } while (take(r, ','));
    return take(r, close);
}

static bool read_into(struct reader *r, struct json *v)
{
    bool ok;

    skip_space(r);
    switch (*r->p) {
    case '{':
    case '[':
        v->type = *r->p == '{' ? JSON_OBJECT : JSON_ARRAY;
        if (r->depth == DEPTH_MOST) {
            return false;
        }
        r->depth++;
        r->p++;
        ok = read_members(r, v, v->type == JSON_OBJECT ? '}' : ']');
        r->depth--;
        return ok;
    case '"':
        v->type = JSON_STRING;
        return read_string(r, &v->text, &v->length);
    case 'n':
    case 't':
    case 'f':
        return read_word(r, v);
    default:
        return read_number(r, v);
    }
}

static struct json *read_value(struct reader *r)
{
    struct json *v = calloc(1, sizeof(*v));

    if (v && !read_into(r, v)) {
        json_free(v);
        return NULL;
    }
    return v;
}

struct json *json_parse(const char *text)
{
    struct reader r = { .p = text };
    struct json *v = read_value(&r);

    skip_space(&r);
    if (v && *r.p) {
        json_free(v);
        return NULL;
    }
    return v;
}

void json_free(struct json *v)
{
    while (v) {
        struct json *next = v->next;

        json_free(v->first);
        free(v);
        v = next;
    }
}

const struct json *json_get(const struct json *object, const char *key)
{
    for (const struct json *v = object->first; v; v = v->next) {
        if (v->key_length == strlen(key) && !memcmp(v->key, key, v->key_length)) {
            return v;
        }
    }
    return NULL;
}

bool json_is(const struct json *v, const char *text)
{
    return v->type == JSON_STRING && v->length == strlen(text)
           && !memcmp(v->text, text, v->length);
}

void text_add(struct text *t, const char *format, ...)
{
    va_list args;
    int n;

    va_start(args, format);
    n = vsnprintf(t->p ? t->p + t->length : NULL, t->capacity - t->length, format, args);
    va_end(args);
    if (n < 0 || t->failed) {
        t->failed = true;
        return;
    }
    if (t->length + n >= t->capacity) {
        size_t capacity = 2 * (t->capacity + n) + 256;
        char *p = realloc(t->p, capacity);

        if (!p) {
            t->failed = true;
            return;
        }
        t->p = p;
        t->capacity = capacity;
        va_start(args, format);
        vsnprintf(t->p + t->length, t->capacity - t->length, format, args);
        va_end(args);
    }
    t->length += n;
}

void text_add_string(struct text *t, const char *s)
{
    text_add(t, "\"");
    for (; *s; s++) {
        bool plain = *s >= ' ' && *s <= '~';

        text_add(t, *s == '"' || *s == '\\' ? "\\%c" : "%c", plain ? *s : '?');
    }
    text_add(t, "\"");
}
