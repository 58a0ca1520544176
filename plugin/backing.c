/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the shared side of a region is made of: looked up once, when the region's first slot is
 * registered, from the process's own mappings and files.
 */
#include "upm.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <linux/magic.h>

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

/* The descriptor through which QEMU discards: writable, of the mapped file. */
static int find_fd(const struct mapping *m)
{
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *entry;
    int found = -1;

    while (dir && found < 0 && (entry = readdir(dir))) {
        int fd = atoi(entry->d_name);

        if (entry->d_name[0] != '.' && fd != dirfd(dir) && same_file(fd, m)
            && (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR) {
            found = fd;
        }
    }
    if (dir) {
        closedir(dir);
    }
    return found;
}

static enum backing backing_of(struct region *r, const struct mapping *m, int fd)
{
    struct statfs fs;

    if (same_file(r->private_fd, m)) {
        return BACKING_IN_PLACE;
    }
    if (!m->inode || fd < 0) {
        /* Without a file: private, or shared anonymous memory ("/dev/zero"). */
        bool anonymous = !m->inode || !strncmp(m->path, "/dev/zero", 9);

        r->advice = m->sharing == 's' ? MADV_REMOVE : MADV_DONTNEED;
        return anonymous ? BACKING_ANONYMOUS : BACKING_UNKNOWN;
    }
    if (fstatfs(fd, &fs)) {
        return BACKING_UNKNOWN;
    }
    if (fs.f_type == HUGETLBFS_MAGIC) {
        r->shared_page_bytes = fs.f_bsize;
        return BACKING_HUGETLB;
    }
    if (m->sharing != 's') {
        return BACKING_UNKNOWN; /* two copies of its own: QEMU warns of it, and keeps its discards */
    }
    return strncmp(m->path, "/memfd:", 7) ? BACKING_FILE : BACKING_MEMFD;
}

static void set_name(struct region *r, const struct mapping *m)
{
    const char *name = m->inode ? m->path : "anonymous", *slash = strrchr(name, '/');
    char *deleted;

    snprintf(r->name, sizeof(r->name), "%.*s", (int)sizeof(r->name) - 1, slash ? slash + 1 : name);
    deleted = strstr(r->name, " (deleted)");
    if (deleted) {
        *deleted = '\0';
    }
}

/* `address` is where byte `offset` of the region is mapped. */
void backing_learn(struct region *r, uint64_t address, uint64_t offset)
{
    struct mapping m;
    enum backing backing;
    int fd;

    if (!find_mapping(address, &m)) {
        return;
    }
    fd = m.inode ? find_fd(&m) : -1;

    pthread_mutex_lock(&upm.lock);
    set_name(r, &m);
    backing = backing_of(r, &m, fd);
    if (backing == BACKING_MEMFD || backing == BACKING_FILE) {
        r->shared_fd = fd;
        r->shared_offset = m.offset + (address - m.start) - offset;
    }
    r->host = (char *)(address - offset);
    r->backing = backing;
    pthread_mutex_unlock(&upm.lock);
}
