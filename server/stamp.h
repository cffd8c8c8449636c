// Whether a file is another one than when it was last looked at: by device, inode, size and time,
// through links, so that a link that is pointed elsewhere counts, as Kubernetes does it.
#pragma once

#include <sys/stat.h>

#include "base.h"

struct stamp {
    dev_t device;
    ino_t inode;
    off_t size;
    struct timespec changed;
};

// Takes the new stamp. A file that is not there counts as one of its own.
static inline bool stamp_renew(struct stamp *stamp, const char *path)
{
    struct stat now = {0};
    if (stat(path, &now) != 0)
        now = (struct stat){0};
    const struct stamp old = *stamp;
    *stamp = (struct stamp){now.st_dev, now.st_ino, now.st_size, now.st_mtim};
    return old.device != stamp->device || old.inode != stamp->inode || old.size != stamp->size ||
           old.changed.tv_sec != stamp->changed.tv_sec ||
           old.changed.tv_nsec != stamp->changed.tv_nsec;
}
