// The known-answer check: fixed activations, and what a weight must make of them, computed in FP64
// from the checkpoint's bytes at load. A few outputs of every group are checked; the engine's
// relayout and kernel both stand behind each.
#pragma once

#include "engine.h"

// How many tokens differ; the others repeat them in turn. Three, since no tile has a multiple of three
// tokens: what a kernel mixes up by whole tiles is another token.
enum { SELFTEST_TOKENS = 3, SELFTEST_ROWS_PER_GROUP = 8 };

struct selftest_answers; // what the checked outputs must be

// Fills in the activations and scales of an operand, whose tokens, layouts and types are given, of all
// groups. Same values for every weight of a shape. `wide`: all scales times 2^-60, which is outside
// of what kernels sum in FP32, so that they take their other way.
void selftest_fill(const struct einsum_weight_format *format, const struct einsum_operand *operand,
                   bool wide);

// Computes the answers, reading a few rows through `source`.
NODISCARD enum status selftest_answers_create(const struct engine_weight_source *source,
                                              struct selftest_answers **answers, struct error *err);
void selftest_answers_destroy(struct selftest_answers *answers);

struct selftest_verdict {
    bool passed;
    double worst_error_ratio; // error over tolerance, the largest seen; at most 1 passes
    uint32_t elements_checked;
    char message[256]; // names the first output that is wrong
};

// Judges the output of an operand that was filled so; `wgmma`: perhaps with the sums of the kernel
// "hopper", see Numerics in einsum.h.
void selftest_judge(const struct selftest_answers *answers, const struct einsum_operand *operand,
                    bool wide, bool wgmma, struct selftest_verdict *verdict);
