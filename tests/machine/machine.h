// A run of the machine: what chance has made of it, and who plays in it.
#pragma once

#include "model.h"
#include "server/weights.h"

enum {
    CALLERS = 3, // threads
    SLOTS = 10,  // requests of each
    WEIGHTS = 4, // the last one of attention
    GROUPS = 2,
    OUTPUT_DIM = 32,
    REDUCED_DIM = 128,
    BLOCK = 32, // so 4 scales to a row: one word of UE8M0
};

struct run {
    uint64_t seed, step;
    struct batcher_options options;
    struct engine_ops ops;
    uint32_t buckets[8];
    // Per cent.
    uint32_t arrivals, cancels, slow_fills, abandons, deadlines, large, given, high, engine_speed,
        quick_engine, failures;
    bool device_fails, priorities;
    uint32_t connections;
    bool draining;
    bool progress;
    int scheduler, callers[CALLERS];
    uint64_t ended[STATUS_UNAUTHENTICATED + 1];
};
extern struct run run;

struct totals {
    uint64_t steps, requests, cut, batches, dropped, refused, failed, waited;
};
extern struct totals totals;

extern struct weight weights[WEIGHTS];
extern struct batcher *batcher;
extern struct batcher_waker waker;

uint64_t mix(uint64_t sum, uint64_t value);

// The engine's numbers: of each row a checksum of its activations and scales, or rotations.
void compute(const struct weight *weight, const struct einsum_operand *operand, bool attention,
             uint8_t *output);

struct engine {
    const struct engine_batch *lanes[MODEL_LANES_MAX];
    bool done[MODEL_LANES_MAX];
    enum status status[MODEL_LANES_MAX];
    uint64_t started_ns[MODEL_LANES_MAX];
    uint32_t allocated;
    bool lost;
};
extern struct engine engine;
extern const struct engine_ops machine_engine; // to be made polled, serial, staging
// Ends one of the batches that run. False: none does.
bool engine_step(void);

// A caller's thread; the argument is its number.
void *caller_run(void *argument);
