// A folder of a test's own below /tmp, and its end.
#pragma once

#include <check.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>

static inline int folder_remove_entry(const char *path, const struct stat *stat, int type,
                                      struct FTW *ftw)
{
    (void)stat, (void)type, (void)ftw;
    return remove(path);
}

static inline void folder_make(char *path, size_t path_bytes, const char *name)
{
    snprintf(path, path_bytes, "/tmp/%s.XXXXXX", name);
    ck_assert_ptr_nonnull(mkdtemp(path));
}

static inline void folder_remove(const char *path)
{
    ck_assert_int_eq(nftw(path, folder_remove_entry, 16, FTW_DEPTH | FTW_PHYS), 0);
}
