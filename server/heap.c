#include "heap.h"

#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    WATCH_MS = 2000,
    SPARE_BYTES = 256 << 20, // kept for the next messages
};

void heap_tune(void)
{
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 64 << 20);
}

// The second number of statm, in pages.
uint64_t heap_resident_bytes(void)
{
    char text[128];
    FILE *statm = fopen("/proc/self/statm", "re");
    if (!statm)
        return 0;
    bool read = fgets(text, sizeof text, statm) != NULL;
    fclose(statm);
    const char *resident = read ? strchr(text, ' ') : NULL;
    return resident ? strtoull(resident, NULL, 10) * (uint64_t)sysconf(_SC_PAGESIZE) : 0;
}

// Asking malloc takes it time, so it is not asked before the process has grown.
static void on_watch(uv_timer_t *timer)
{
    uint64_t *settled_bytes = timer->data;
    if (heap_resident_bytes() < *settled_bytes + SPARE_BYTES)
        return;
    if (mallinfo2().fordblks > SPARE_BYTES)
        malloc_trim(0);
}

void heap_watch(uv_loop_t *loop, uv_timer_t *timer)
{
    static uint64_t settled_bytes;
    settled_bytes = heap_resident_bytes();
    timer->data = &settled_bytes;
    uv_timer_init(loop, timer);
    uv_timer_start(timer, on_watch, WATCH_MS, WATCH_MS);
}
