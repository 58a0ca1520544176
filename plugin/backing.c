/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the shared side of a region is made of: looked up once, when the region's first slot is
 * registered, from the process's own mappings.
 */
#include "upm.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <linux/magic.h>

#define FILES_LOOKED_AT 1024
/* As /proc/self/maps names them. */
#define SHARED_ANONYMOUS "/dev/zero"
#define MEMFD "/memfd:"

struct mapping {
    unsigned long start, end, offset, inode;
    unsigned major, minor;
    char sharing;
    char path[256];
};

static bool find_mapping(unsigned long address, struct mapping *m)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[512];
    bool found = false;

    while (maps && !found && fgets(line, sizeof(line), maps)) {
        m->path[0] = '\0';
        found = sscanf(line, "%lx-%lx %*c%*c%*c%c %lx %x:%x %lu %255[^\n]", &m->start, &m->end,
                       &m->sharing, &m->offset, &m->major, &m->minor, &m->inode, m->path) >= 7
                && m->start <= address && address < m->end;
    }
    if (maps) {
        fclose(maps);
    }
    return found;
}

static bool same_file(int fd, const struct mapping *m)
{
    struct stat st;

    return !fstat(fd, &st) && st.st_ino == m->inode && st.st_dev == makedev(m->major, m->minor);
}

/* The file system of the mapped file, by any descriptor of that. Which one does not matter; the one
 * that QEMU discards in is learnt from QEMU. Not by /proc/self/fd: libvirt's AppArmor profile denies
 * that. */
static bool find_file_system(const struct mapping *m, struct statfs *fs)
{
    for (int fd = 0; fd < FILES_LOOKED_AT; fd++) {
        /* Another thread may close it meanwhile, and its number be another file's. */
        if (same_file(fd, m) && !fstatfs(fd, fs) && same_file(fd, m)) {
            return true;
        }
    }
    return false;
}

static void set_backing(struct backing_facts *f, int private_fd, const struct mapping *m)
{
    struct statfs fs;

    f->advice = m->sharing == 's' ? MADV_REMOVE : MADV_DONTNEED;
    if (same_file(private_fd, m)) {
        f->backing = BACKING_IN_PLACE;
    } else if (!m->inode || !strncmp(m->path, SHARED_ANONYMOUS, strlen(SHARED_ANONYMOUS))) {
        f->backing = BACKING_ANONYMOUS;
    } else if (find_file_system(m, &fs) && fs.f_type == HUGETLBFS_MAGIC) {
        f->backing = BACKING_HUGETLB;
        f->page_bytes = fs.f_bsize;
    } else if (m->sharing != 's') {
        f->backing = BACKING_UNKNOWN; /* two copies of its own: QEMU's discards stay its own */
    } else {
        f->backing = strncmp(m->path, MEMFD, strlen(MEMFD)) ? BACKING_FILE : BACKING_MEMFD;
    }
}

static void set_name(struct backing_facts *f, const struct mapping *m)
{
    const char *name = m->inode ? m->path : "anonymous", *slash = strrchr(name, '/');
    char *deleted;

    snprintf(f->name, sizeof(f->name), "%.*s", (int)sizeof(f->name) - 1, slash ? slash + 1 : name);
    deleted = strstr(f->name, " (deleted)");
    if (deleted) {
        *deleted = '\0';
    }
}

/* `address` is where byte `offset` of the region is mapped. */
struct backing_facts backing_look(int private_fd, uint64_t address, uint64_t offset)
{
    struct backing_facts f = { .backing = BACKING_UNKNOWN, .page_bytes = PAGE_BYTES };
    struct mapping m;

    if (find_mapping(address, &m)) {
        f.found = true;
        f.file = (struct file_place) {
            .device = makedev(m.major, m.minor), .inode = m.inode,
            .offset = m.offset + (address - m.start) - offset,
        };
        set_name(&f, &m);
        set_backing(&f, private_fd, &m);
    }
    return f;
}
