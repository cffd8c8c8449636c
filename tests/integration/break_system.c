// A failing disk and a jumping clock, for LD_PRELOAD. The file named by BREAK_SYSTEM says what is
// broken, read again at each call that could be:
//
//     short              read and pread give 1000 bytes at most
//     read ERRNO         they fail, of files whose path holds "model"
//     open ERRNO         opening such a file does
//     fault              what is mapped of such a file cannot be read: SIGBUS, as by a bad sector
//     hook COMMAND       run once such a file is mapped: what others do to it meanwhile
//     clock SECONDS      the wall clock shows so much more
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static __thread bool busy;

static ssize_t sys_read(int fd, void *to, size_t bytes)
{
    return syscall(SYS_read, fd, to, bytes);
}

// What stands behind the word, or NULL.
static const char *broken(const char *word, char text[512])
{
    const char *path = getenv("BREAK_SYSTEM");
    int fd = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return NULL;
    ssize_t got = sys_read(fd, text, 511);
    syscall(SYS_close, fd);
    text[got > 0 ? got : 0] = '\0';
    size_t bytes = strlen(word);
    if (strncmp(text, word, bytes) != 0)
        return NULL;
    return text[bytes] == ' ' ? text + bytes + 1 : text[bytes] == '\0' ? text + bytes : NULL;
}

static bool is_model(int fd)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t bytes = readlink(link, path, sizeof path - 1);
    path[bytes > 0 ? bytes : 0] = '\0';
    return strstr(path, "/model") && !strstr(path, ".so");
}

// How much of a read is left; 0: it fails.
static size_t read_limit(int fd, size_t bytes)
{
    char text[512];
    const char *fault = is_model(fd) ? broken("read", text) : NULL;
    if (fault) {
        errno = atoi(fault);
        return 0;
    }
    return is_model(fd) && bytes > 1000 && broken("short", text) ? 1000 : bytes;
}

ssize_t read(int fd, void *to, size_t bytes)
{
    size_t limit = read_limit(fd, bytes);
    return limit == 0 && bytes > 0 ? -1 : sys_read(fd, to, limit);
}

ssize_t pread(int fd, void *to, size_t bytes, off_t offset)
{
    size_t limit = read_limit(fd, bytes);
    return limit == 0 && bytes > 0 ? -1 : syscall(SYS_pread64, fd, to, limit, offset);
}

ssize_t pread64(int fd, void *to, size_t bytes, off_t offset)
{
    return pread(fd, to, bytes, offset);
}

int open(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, int) : 0;
    va_end(arguments);
    char text[512];
    const char *fault = strstr(path, "/model") ? broken("open", text) : NULL;
    if (fault) {
        errno = atoi(fault);
        return -1;
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, int) : 0;
    va_end(arguments);
    return open(path, flags, mode);
}

// Memory behind the end of an empty file, from the middle on.
static void break_map(char *map, size_t bytes)
{
    size_t begin = bytes / 2 / 4096 * 4096;
    int empty = memfd_create("empty", MFD_CLOEXEC);
    syscall(SYS_mmap, map + begin, bytes - begin, PROT_READ, MAP_PRIVATE | MAP_FIXED, empty, 0);
    close(empty);
}

void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    void *map = (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
    if (map == MAP_FAILED || fd < 0 || busy || !getenv("BREAK_SYSTEM"))
        return map;
    busy = true;
    char text[512];
    const char *command = is_model(fd) ? broken("hook", text) : NULL;
    if (command) {
        unsetenv("LD_PRELOAD");
        if (system(command) != 0)
            perror(command);
    } else if (is_model(fd) && broken("fault", text)) {
        break_map(map, bytes);
    }
    busy = false;
    return map;
}

void *mmap64(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    return mmap(address, bytes, protection, flags, fd, offset);
}

// ---- the wall clock

static long clock_offset(void)
{
    char text[512];
    int errno_before = errno;
    const char *seconds = broken("clock", text);
    errno = errno_before;
    return seconds ? atol(seconds) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += clock_offset();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict unused)
{
    (void)unused;
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *to)
{
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (to)
        *to = precise.tv_sec;
    return precise.tv_sec;
}
