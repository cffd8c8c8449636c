// A counter of copies, for LD_PRELOAD: how many bytes the process has moved by memcpy and memmove,
// gRPC's own included, in pieces that may be a tensor's. Kept in the file named by
// COUNT_COPIES_FILE, where others read it while the process runs.
//
// Copies by the kernel, at the sockets, are not seen: those are the two that every transport has.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PIECE_BYTES_MIN = 256 }; // headers and small fields are below

static struct counters {
    _Atomic uint64_t copies, bytes;
} * counters;

__attribute__((constructor)) static void map_counters(void)
{
    const char *path = getenv("COUNT_COPIES_FILE");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *map = mmap(NULL, sizeof *counters, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map != MAP_FAILED)
        counters = map;
    close(fd);
}

static void count(size_t bytes)
{
    if (!counters || bytes < PIECE_BYTES_MIN)
        return;
    atomic_fetch_add_explicit(&counters->copies, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&counters->bytes, bytes, memory_order_relaxed);
}

// By hand, eight bytes at a time: a call of memcpy in here would be one of ours, and so would a loop
// that the compiler takes for one.
#define BY_HAND __attribute__((optimize("no-tree-loop-distribute-patterns")))

struct word {
    uint64_t bytes;
} __attribute__((packed, may_alias));

BY_HAND static void copy_up(uint8_t *to, const uint8_t *from, size_t bytes)
{
    size_t i = 0;
    for (; i + 8 <= bytes; i += 8)
        *(struct word *)(to + i) = *(const struct word *)(from + i);
    for (; i < bytes; i++)
        to[i] = from[i];
}

BY_HAND static void copy_down(uint8_t *to, const uint8_t *from, size_t bytes)
{
    for (; bytes >= 8; bytes -= 8)
        *(struct word *)(to + bytes - 8) = *(const struct word *)(from + bytes - 8);
    while (bytes-- > 0)
        to[bytes] = from[bytes];
}

void *memmove(void *to, const void *from, size_t bytes)
{
    count(bytes);
    if (to < from)
        copy_up(to, from, bytes);
    else
        copy_down(to, from, bytes);
    return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t bytes)
{
    count(bytes);
    copy_up(to, from, bytes);
    return to;
}
