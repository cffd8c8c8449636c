// Sleeping on a 32-bit word (futex(2)), for the two places where a thread of ours waits for work:
// the scheduler and the compute threads. Every waiter re-reads what it waits for afterwards, so
// that early and spurious returns are harmless.
#pragma once

#include <linux/futex.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base.h"

// Sleeps while `*word` is `expected`, until woken or until `until_ns` on now_ns()'s clock
// (UINT64_MAX: no limit).
static inline void futex_wait(_Atomic uint32_t *word, uint32_t expected, uint64_t until_ns)
{
    struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000u),
                             .tv_nsec = (long)(until_ns % 1000000000u)};
    // The BITSET form takes an absolute time on CLOCK_MONOTONIC.
    syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, expected,
            until_ns == UINT64_MAX ? NULL : &until, NULL, FUTEX_BITSET_MATCH_ANY);
}

// Wakes up to `threads` of those that sleep on `word`.
static inline void futex_wake(_Atomic uint32_t *word, uint32_t threads)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
}
