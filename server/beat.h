// A thread's sign of life, for those who look whether it hangs: odd while it works, even while it
// waits, and another number each time. Written by one thread at a time, and costs it no clock.
#pragma once

#include <stdatomic.h>

#include "base.h"

struct beat {
    _Atomic uint32_t count;
};

// Begins or ends a piece of work.
static inline void beat_turn(struct beat *beat)
{
    uint32_t count = atomic_load_explicit(&beat->count, memory_order_relaxed);
    atomic_store_explicit(&beat->count, count + 1, memory_order_relaxed);
}

static inline uint32_t beat_read(const struct beat *beat)
{
    return atomic_load_explicit(&beat->count, memory_order_relaxed);
}

static inline bool beat_works(uint32_t count)
{
    return count % 2 == 1;
}
