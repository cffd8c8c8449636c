// A failing disk, for LD_PRELOAD: a safetensors file loses its second half as soon as it is mapped,
// so that reading the map raises SIGBUS, as an I/O error under it would. Only while the file named
// by TRUNCATE_WHILE_EXISTS exists, so that the daemon can start on sound files.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void truncate_if_armed(int fd)
{
    const char *flag = getenv("TRUNCATE_WHILE_EXISTS");
    if (!flag || access(flag, F_OK) != 0)
        return;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t bytes = readlink(link, path, sizeof path - 1);
    if (bytes < 0)
        return;
    path[bytes] = '\0';
    struct stat stat_now;
    if (strstr(path, ".safetensors") && stat(path, &stat_now) == 0)
        if (truncate(path, stat_now.st_size / 2) != 0)
            perror("truncate");
}

void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    void *map = (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
    if (map != MAP_FAILED && fd >= 0)
        truncate_if_armed(fd);
    return map;
}

void *mmap64(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    return mmap(address, bytes, protection, flags, fd, offset);
}
