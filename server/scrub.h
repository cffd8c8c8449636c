// Reads resident weights again while the daemon is idle, and compares with what was loaded: bits that turn
// over in memory, or are written over, would be wrong answers for good.
//
// What differs is damaged: no request is computed with it any more, and it is read again from where it
// came from. An answer given between the damage and its discovery was wrong; scrub_seconds says how long
// that may be.
#pragma once

#include "batch.h"

struct scrub;

struct scrub_options {
    struct weights *weights;
    const struct engine_ops *ops;
    struct engine *engine;
    struct batcher *batcher; // pieces wait while requests do
    uint32_t seconds;        // that a pass over all weights takes, at least
};

// Starts its thread.
NODISCARD enum status scrub_create(const struct scrub_options *options, struct scrub **scrub,
                                   struct error *err);
void scrub_destroy(struct scrub *scrub); // NULL: nothing

struct scrub_stats {
    uint64_t passes, bytes;     // so far
    uint64_t damaged, reloaded; // weights found so; of those, read again
};
struct scrub_stats scrub_stats(const struct scrub *scrub); // NULL: all 0
