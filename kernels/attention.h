// The step before the einsum: attention's output is rotated back (inverse RoPE) and quantised to
// E4M3 with power-of-two scales, in place.
//
//     row (token, group), 2R bytes     before   BF16 [R/512 heads][512]
//                                      after    E4M3 [R], then UE8M0 [R/block_r], then garbage
//
// Numerics, the same bits on every engine; all of it FP32, each operation rounded once, none fused:
//     rotate    dims 448..511 of each head, pairs (x0, x1) = dims (448 + 2i, 449 + 2i):
//               x0 * cos[i] + x1 * sin[i],  x1 * cos[i] - x0 * sin[i]
//     scale     of block_r values: the smallest 2^e that is >= max(|x|, 1e-10) / 448
//     quantise  x / 2^e to E4M3, to nearest even; within +-448 by construction
// A block that holds a NaN or an infinity gets the scale NaN (0xFF), so that every output which it
// touches is NaN, and elements of value 0.
#pragma once

#include <stdint.h>

#include "einsum.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    ATTENTION_HEAD_DIM = 512,
    ATTENTION_ROPE_DIM = 64, // the last of each head
    ATTENTION_ROPE_PAIRS = 32,
};

// cos and sin of a token's position times each pair's frequency.
struct attention_rotation {
    float cos[ATTENTION_ROPE_PAIRS], sin[ATTENTION_ROPE_PAIRS];
};

// Bytes of BF16 that become activations and scales: tokens * groups rows of 2R.
static inline uint64_t attention_bytes(uint64_t tokens, uint64_t groups, uint64_t reduced_dim)
{
    return tokens * groups * reduced_dim * 2;
}

// One row. R is a multiple of 512, block_r 128 or 32; `row` is aligned to 64.
void attention_quantise(void *row, uint32_t reduced_dim, uint32_t block_r,
                        const struct attention_rotation *rotation);

// The two ways, of which the above takes the faster one that the CPU has.
void attention_quantise_portable(void *row, uint32_t reduced_dim, uint32_t block_r,
                                 const struct attention_rotation *rotation);
bool attention_avx2_supported(void);
void attention_quantise_avx2(void *row, uint32_t reduced_dim, uint32_t block_r,
                             const struct attention_rotation *rotation);

#ifdef __cplusplus
}
#endif
