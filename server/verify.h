// The known-answer check of a resident weight, through the batcher like any caller's request.
#pragma once

#include "batch.h"
#include "selftest.h"

struct verify_result {
    struct selftest_verdict verdict;
    uint64_t duration_ns;
};

// Blocks; never on an rpc or scheduler thread. A full queue is waited out, for some seconds. An
// error means that no verdict could be reached: the engine failed, or the daemon is too busy.
// `kernel`: see struct engine_segment; `wgmma`: see engine_may_sum_by_wgmma.
enum status verify_weight(struct batcher *batcher, struct weight *weight, uint32_t kernel,
                          bool wgmma, struct verify_result *result, struct error *err);
