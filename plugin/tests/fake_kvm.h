/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the parts of the fake share. */
#ifndef FAKE_KVM_H
#define FAKE_KVM_H

#include "fake.h"

#include <pthread.h>

/* Guards what is told of calls and events, and the list of RAM. */
extern pthread_mutex_t fake_lock;

/* The list of RAM by which the kernel finds what a discard is meant for. */
void memory_know(struct memory *m);
void memory_forget(const struct memory *m);
/* An ioctl of QEMU's, with in_plugin set. */
int plugin_ioctl(int fd, unsigned long request, void *argument);

#endif
