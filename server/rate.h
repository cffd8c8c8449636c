// How much a number that only grows has grown in a second.
#pragma once

#include "base.h"

struct rate { // zero at first
    uint64_t last, before, since_ns;
};

// In the second that `number` falls into, of which the first look begins one.
static inline uint64_t rate_within_a_second(struct rate *rate, uint64_t number, uint64_t now_ns)
{
    if (now_ns - rate->since_ns > 1000000000u) {
        rate->before = rate->last;
        rate->since_ns = now_ns;
    }
    rate->last = number;
    return number - rate->before;
}
