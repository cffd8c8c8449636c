// The known-answer check: fixed activations, and what a weight must make of them, computed in FP64
// from the checkpoint's bytes at load. A few outputs of every group are checked; the engine's
// relayout and kernel both stand behind each.
#pragma once

#include "engine.h"

enum { SELFTEST_TOKENS = 2, SELFTEST_ROWS_PER_GROUP = 8 };

struct selftest_answers; // what the checked outputs must be

// The activations of the check: TGR, scales FP32 in TGK. Same values for every weight of a shape.
// Buffers of einsum_activation_bytes and einsum_scale_bytes for SELFTEST_TOKENS tokens.
void selftest_fill(const struct einsum_weight_format *format, void *activations, void *scales);

// Computes the answers, reading a few rows through `source`.
NODISCARD enum status selftest_answers_create(const struct engine_weight_source *source,
                                              struct selftest_answers **answers, struct error *err);
void selftest_answers_destroy(struct selftest_answers *answers);

struct selftest_verdict {
    bool passed;
    double worst_error_ratio; // error over tolerance, the largest seen; at most 1 passes
    uint32_t elements_checked;
    char message[192]; // names the first output that is wrong
};

// `output` is BF16 [SELFTEST_TOKENS, G, D] as the engine wrote it; `wgmma`: perhaps with the sums
// of the kernel "hopper", see Numerics in einsum.h.
void selftest_judge(const struct selftest_answers *answers, const void *output, bool wgmma,
                    struct selftest_verdict *verdict);
