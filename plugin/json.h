/* SPDX-License-Identifier: GPL-2.0-or-later */
/* JSON text, in and out: all that passes between the plugin and QEMU's monitor. */
#ifndef UPM_JSON_H
#define UPM_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum json_type { JSON_NULL, JSON_BOOL, JSON_INT, JSON_REAL, JSON_STRING, JSON_ARRAY, JSON_OBJECT };

struct json {
    enum json_type type;
    const char *key;          /* in an object; not ended by a zero */
    size_t key_length;
    const char *text;         /* of a string, between its quotes, escapes and all */
    size_t length;
    int64_t integer;          /* of JSON_INT; what does not fit is JSON_REAL */
    bool boolean;
    size_t children;
    struct json *first, *next;
};

/* The value in `text`, which must outlive it, or NULL: malformed, too deep, or out of memory. */
struct json *json_parse(const char *text);
void json_free(struct json *value);
const struct json *json_get(const struct json *object, const char *key);
bool json_is(const struct json *string, const char *text);

/* A growing text. After a failed allocation it stays short and `failed`. */
struct text {
    char *p;
    size_t length, capacity;
    bool failed;
};

void text_add(struct text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* A JSON string of any bytes; what is not printable ASCII becomes '?'. */
void text_add_string(struct text *t, const char *s);

#endif
