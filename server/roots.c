#include "roots.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static_assert(ROOTS_PATH_BYTES >= PATH_MAX, "realpath fills PATH_MAX bytes");

// Length of `root` if `path` is the root or below it, else 0.
static size_t root_length(const char *root, const char *path)
{
    size_t length = strlen(root);
    if (length == 1) // "/" ends in the slash that the others lack
        return 1;
    bool below = strncmp(path, root, length) == 0 && (path[length] == '/' || path[length] == '\0');
    return below ? length : 0;
}

static bool is_inside(const struct roots *roots, const char *resolved)
{
    for (size_t i = 0; i < roots->paths_n; i++)
        if (root_length(roots->paths[i], resolved) > 0)
            return true;
    return false;
}

enum status roots_init(struct roots *roots, const char *const *paths, size_t paths_n,
                       struct error *err)
{
    *roots = (struct roots){.paths = calloc(paths_n + 1, sizeof *roots->paths)};
    if (!roots->paths)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    enum status status;
    for (; roots->paths_n < paths_n; roots->paths_n++) {
        const char *path = paths[roots->paths_n];
        struct stat stat_now;
        char *resolved = realpath(path, NULL);
        if (!resolved || stat(resolved, &stat_now) != 0) {
            free(resolved);
            status = error_field(err, STATUS_FAILED_PRECONDITION, "weights_roots", "'%s': %s", path,
                                 strerrordesc_np(errno));
            goto free_paths;
        }
        if (!S_ISDIR(stat_now.st_mode)) {
            free(resolved);
            status = error_field(err, STATUS_FAILED_PRECONDITION, "weights_roots",
                                 "'%s' is not a folder", path);
            goto free_paths;
        }
        roots->paths[roots->paths_n] = resolved;
    }
    return STATUS_OK;

free_paths:
    roots_deinit(roots);
    return status;
}

void roots_deinit(struct roots *roots)
{
    for (size_t i = 0; i < roots->paths_n; i++)
        free(roots->paths[i]);
    free(roots->paths);
    *roots = (struct roots){0};
}

// Whether the deepest folder on the way to `path` that does exist lies inside a root. Cuts `path`.
static bool ancestor_is_inside(const struct roots *roots, char *path)
{
    char resolved[ROOTS_PATH_BYTES];
    for (;;) {
        char *slash = strrchr(path, '/');
        if (!slash)
            return false;
        slash[slash == path ? 1 : 0] = '\0';
        if (realpath(path, resolved))
            return is_inside(roots, resolved);
        if (slash == path)
            return false;
    }
}

static enum status refuse_outside(const char *path, struct error *err)
{
    return error_field(err, STATUS_PERMISSION_DENIED, "path",
                       "'%.256s' is outside the configured roots", path);
}

// Why realpath failed on `absolute`, told only if the path was heading for a root.
static enum status refuse_unresolved(const struct roots *roots, const char *path, char *absolute,
                                     int reason, struct error *err)
{
    if (!ancestor_is_inside(roots, absolute))
        return refuse_outside(path, err);
    enum status status = reason == ENOENT || reason == ENOTDIR ? STATUS_NOT_FOUND
                         : reason == EACCES                    ? STATUS_PERMISSION_DENIED
                                                               : STATUS_FAILED_PRECONDITION;
    return error_field(err, status, "path", "'%.256s': %s", path, strerrordesc_np(reason));
}

enum status roots_resolve(const struct roots *roots, const char *path,
                          char resolved[ROOTS_PATH_BYTES], struct error *err)
{
    if (roots->paths_n == 0)
        return error_field(err, STATUS_PERMISSION_DENIED, "path",
                           "no weights_roots are configured, so nothing may be read");
    if (path[0] == '\0')
        return error_field(err, STATUS_INVALID_ARGUMENT, "path", "empty");
    char absolute[ROOTS_PATH_BYTES];
    int length = path[0] == '/'
                     ? snprintf(absolute, sizeof absolute, "%s", path)
                     : snprintf(absolute, sizeof absolute, "%s/%s", roots->paths[0], path);
    if (length < 0 || (size_t)length >= sizeof absolute)
        return error_field(err, STATUS_INVALID_ARGUMENT, "path", "longer than %zu bytes",
                           sizeof absolute - 1);
    if (!realpath(absolute, resolved))
        return refuse_unresolved(roots, path, absolute, errno, err);
    if (!is_inside(roots, resolved))
        return refuse_outside(path, err);
    return STATUS_OK;
}

const char *roots_below(const struct roots *roots, const char *resolved)
{
    for (size_t i = 0; i < roots->paths_n; i++) {
        size_t length = root_length(roots->paths[i], resolved);
        if (length > 0)
            return resolved + length + (resolved[length] == '/');
    }
    return resolved;
}

enum status roots_open(const struct roots *roots, const char *resolved, int *fd, struct error *err)
{
    // O_NONBLOCK: a FIFO must not hold up the caller; on regular files it changes nothing.
    *fd = open(resolved, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (*fd >= 0)
        return STATUS_OK;
    enum status status = errno == EACCES || errno == ELOOP    ? STATUS_PERMISSION_DENIED
                         : errno == EMFILE || errno == ENFILE ? STATUS_RESOURCE_EXHAUSTED
                         : errno == ENOENT                    ? STATUS_NOT_FOUND
                                                              : STATUS_FAILED_PRECONDITION;
    return error_field(err, status, "path", "'%.256s': %s", roots_below(roots, resolved),
                       strerrordesc_np(errno));
}
