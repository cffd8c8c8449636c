// What glibc's malloc is told, and when it gives memory back.
#pragma once

#include <uv.h>

#include "base.h"

// Before the first thread. gRPC's buffers of some 64 KiB are freed and allocated with every message: left
// alone, malloc gives their pages back to the kernel each time, and takes them back one page fault a page,
// which halves the speed.
void heap_tune(void);

uint64_t heap_resident_bytes(void); // of the process

// From when the daemon is ready: what a flood has left behind is given back when it is over.
void heap_watch(uv_loop_t *loop, uv_timer_t *timer);
