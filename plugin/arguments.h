/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A command's arguments. False, or NULL, comes with an error set. */
#ifndef UPM_ARGUMENTS_H
#define UPM_ARGUMENTS_H

#include "json.h"
#include "upm.h"

#define NOT_GIVEN (-1)

/* All of them, if they have no other names than the `known` ones. They point into `text`. */
struct json *args_read(struct qdict *dict, const char *const *known, char **text,
                       struct qerror **error);
void args_free(struct json *args, char *text);
bool args_int(const struct json *args, const char *name, int64_t least, int64_t most,
              int64_t *value, struct qerror **error);
bool args_choice(const struct json *args, const char *name, const char *const *choices,
                 unsigned count, unsigned *chosen, struct qerror **error);
/* The same, but NOT_GIVEN if they have none of this name; integers from 0, and two choices. */
bool args_optional_int(const struct json *args, const char *name, int64_t most, int64_t *value,
                       struct qerror **error);
bool args_optional_choice(const struct json *args, const char *name, const char *const *choices,
                          int *chosen, struct qerror **error);

#endif
