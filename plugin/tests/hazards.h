/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the hazards of plugin/tests/hazards_*.c share. */
#ifndef HAZARDS_H
#define HAZARDS_H

#include "fake.h"

#include <sys/types.h>

#include <linux/falloc.h>

#define PUNCH (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define NOT_THIS_HOST 77
/* Long enough for another thread to do what it must not do, if it would. */
#define A_WHILE_US 50000

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED true       /* what is mapped is the sanitizer's */
#else
#define SANITIZED false
#endif

/* The interposers of interpose.c, as QEMU calls them. */
int ioctl(int fd, unsigned long request, ...);
int fallocate64(int fd, int mode, off64_t offset, off64_t bytes);

struct hazard {
    const char *name;
    void (*run)(void);
};

/* Each ends with one that has no name. */
extern const struct hazard closing_hazards[], command_hazards[], conversion_hazards[],
    discard_hazards[], failure_hazards[], launch_hazards[], model_hazards[], ownership_hazards[],
    reader_hazards[], region_hazards[], thread_hazards[], turn_hazards[];

/* A VM that runs, with one block of RAM at guest address 0, all of it private or all shared. */
struct memory *start_private(enum kind kind, uint64_t bytes);
struct memory *start(enum kind kind, uint64_t bytes);
/* One more block, all shared, in a slot of its own. */
struct memory *plug(unsigned slot, enum kind kind, uint64_t gpa, uint64_t bytes);
void defer_up_to(uint64_t budget);
void configure(const char *settings);

void fill_shared(const struct memory *m, uint64_t offset, uint64_t bytes);
uint64_t allocated(int fd);
/* Whether the first page of a mapping is in memory. */
bool resident(const char *start);
/* Bytes of this process's mappings, touched or not. */
uint64_t mapped(void);

/* Asks for a discard under the number 7, and waits until X_UPM_DISCARDED says that it is over. */
void ask_discard(const char *copy, uint64_t offset, uint64_t bytes);
void ask_discard_of_all(void);
bool discarded(void);
void discard_and_wait(const char *copy, uint64_t offset, uint64_t bytes);
bool ledger_is_empty(void);

/* A place where one thread is stopped, so that the test can look at what others do meanwhile:
 * a hook for fake.before_punch and one for fake.before_attributes. */
void shut_gate(void);
void open_gate(void);
bool somebody_waits(void);
void stop_punch(int fd, uint64_t offset, uint64_t bytes);
void stop_attributes(void);

/* A thread of QEMU's that does one thing after the other, when told to. */
struct vcpu;
struct vcpu *vcpu_new(void);
/* Begins; vcpu_finish() waits for the end and returns what it returned. */
void vcpu_begin_convert(struct vcpu *v, const struct memory *m, uint64_t first, uint64_t pages,
                        bool to_private);
void vcpu_begin_discard(struct vcpu *v, const struct memory *m, uint64_t first, uint64_t pages,
                        bool now_private);
void vcpu_begin_free(struct vcpu *v, struct memory *m);
bool vcpu_is_done(struct vcpu *v);
int vcpu_finish(struct vcpu *v);
/* Both at once. */
int vcpu_convert(struct vcpu *v, const struct memory *m, uint64_t first, uint64_t pages,
                 bool to_private);
int vcpu_discard(struct vcpu *v, const struct memory *m, uint64_t first, uint64_t pages,
                 bool now_private);
void vcpu_goes_on(struct vcpu *v);
/* Its thread ends. */
void vcpu_end(struct vcpu *v);

#endif
