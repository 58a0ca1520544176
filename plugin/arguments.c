/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A command's arguments, read one by one. What is wrong with one becomes the command's error. */
#include "arguments.h"

#include <stdlib.h>
#include <string.h>

struct json *args_read(struct qdict *dict, const char *const *known, char **text,
                       struct qerror **error)
{
    struct json *args;

    *text = qemu_arguments(dict);
    args = *text ? json_parse(*text) : NULL;
    if (!args || args->type != JSON_OBJECT) {
        qemu_fail(error, "cannot read the arguments: too deep, or no memory");
        goto fail;
    }
    for (const struct json *v = args->first; v; v = v->next) {
        unsigned i = 0;

        while (known[i] && !(strlen(known[i]) == v->key_length
                             && !memcmp(known[i], v->key, v->key_length))) {
            i++;
        }
        if (!known[i]) {
            qemu_fail(error, "Parameter '%.*s' is unexpected", (int)v->key_length, v->key);
            goto fail;
        }
    }
    return args;
fail:
    args_free(args, *text);
    *text = NULL;
    return NULL;
}

void args_free(struct json *args, char *text)
{
    json_free(args);
    free(text);
}

bool args_int(const struct json *args, const char *name, int64_t least, int64_t most,
              int64_t *value, struct qerror **error)
{
    const struct json *v = json_get(args, name);

    if (!v || v->type != JSON_INT || v->integer < least || v->integer > most) {
        qemu_fail(error, "Parameter '%s' expects an integer from %lld to %lld", name,
                  (long long)least, (long long)most);
        return false;
    }
    *value = v->integer;
    return true;
}

bool args_choice(const struct json *args, const char *name, const char *const *choices,
                 unsigned count, unsigned *chosen, struct qerror **error)
{
    const struct json *v = json_get(args, name);
    struct text expected = { 0 };

    for (unsigned i = 0; i < count; i++) {
        if (v && json_is(v, choices[i])) {
            *chosen = i;
            return true;
        }
    }
    for (unsigned i = 0; i < count; i++) {
        text_add(&expected, "%s'%s'", i ? " or " : "", choices[i]);
    }
    qemu_fail(error, "Parameter '%s' expects %s", name, expected.failed ? "" : expected.p);
    free(expected.p);
    return false;
}

bool args_optional_int(const struct json *args, const char *name, int64_t most,
                       int64_t *value, struct qerror **error)
{
    *value = NOT_GIVEN;
    return !json_get(args, name) || args_int(args, name, 0, most, value, error);
}

bool args_optional_choice(const struct json *args, const char *name,
                          const char *const *choices, int *chosen, struct qerror **error)
{
    unsigned i;

    *chosen = NOT_GIVEN;
    if (!json_get(args, name)) {
        return true;
    }
    if (!args_choice(args, name, choices, 2, &i, error)) {
        return false;
    }
    *chosen = i;
    return true;
}
