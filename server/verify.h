// The known-answer check of a resident weight, through the batcher like any caller's requests: one for
// each kernel that any number of tokens may be given to, with scales of either type; layouts and types
// of outputs, which are strides and the last step of a kernel, in turn.
#pragma once

#include "batch.h"
#include "selftest.h"

enum { VERIFY_FORMATS_MAX = 16 };

// One pass over weights. What tells of a kernel alone is asked of the first weight of each format.
struct verify {
    struct batcher *batcher;
    const struct engine_ops *ops;
    const struct engine *engine;
    uint32_t kernel; // this one instead of those that may be picked; 0: those
    struct einsum_weight_format formats[VERIFY_FORMATS_MAX]; // seen so far
    uint32_t formats_n;
    uint32_t weights_n, requests_n; // checked so far
};

struct verify_result {
    struct selftest_verdict verdict; // of all requests; the message is of the first that failed
    uint64_t duration_ns;
};

// Blocks; never on an rpc or scheduler thread. A full queue is waited out, for some seconds. An
// error means that no verdict could be reached: the engine failed, or the daemon is too busy.
NODISCARD enum status verify_weight(struct verify *verify, struct weight *weight,
                                    struct verify_result *result, struct error *err);

// The same for whoever will not have a weight that fails: DATA_LOSS.
NODISCARD enum status verify_or_refuse(struct verify *verify, struct weight *weight,
                                       struct error *err);
