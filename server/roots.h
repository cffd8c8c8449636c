// The only folders from which weights are read. A path from a request is resolved, links and all,
// and refused if it ends outside; whether anything exists outside is not told.
//
// Made at start, never changed: any thread may resolve.
#pragma once

#include "status.h"

enum { ROOTS_PATH_BYTES = 4096 };

struct roots {
    char **paths; // absolute, free of links
    size_t paths_n;
};

// FAILED_PRECONDITION if one is not a folder.
NODISCARD enum status roots_init(struct roots *roots, const char *const *paths, size_t paths_n,
                                 struct error *err);
void roots_deinit(struct roots *roots);

// `path` is absolute or relative to the first root; `resolved` gets it absolute and free of links.
// PERMISSION_DENIED: outside. NOT_FOUND: inside, but there is no such file or folder. The field at
// fault is "path".
NODISCARD enum status roots_resolve(const struct roots *roots, const char *path,
                                    char resolved[ROOTS_PATH_BYTES], struct error *err);

// The part of a resolved path below its root, "" for a root itself: what a client may be shown.
const char *roots_below(const struct roots *roots, const char *resolved);

// Opens a resolved path for reading; a link that has meanwhile taken its place is refused.
NODISCARD enum status roots_open(const struct roots *roots, const char *resolved, int *fd,
                                 struct error *err);
