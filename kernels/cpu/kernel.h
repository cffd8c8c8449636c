// What lies between the walk over a task (task.c) and one instruction set (portable.c, avx2.c).
//
// A kernel is five loops over one panel, sixteen outputs beside each other, and knows nothing of
// operands, layouts or threads. "Folded" means multiplied by its scale:
//
//     few tokens    fold(A) -> stream: decode B in registers, multiply, scale a block's sum by sB
//     many tokens   fold(A slice), expand(B slice * sB) to FP32 in L1 -> multiply
//     extreme       the same in FP64: wide_expand -> wide_multiply, see wide.h
//
// Rows of E4M3 lie in pairs: 16-bit lane j of pair q holds output j, row 2q in its lower byte and
// row 2q+1 in its upper one, so that shifts and masks alone, which know no lanes of 8 bits, part
// the rows and leave the outputs in order.
//
// Folding changes nothing for scales that are powers of two; any other rounds each element once to
// FP32, as multiplying the sum would.
#pragma once

#include "../fp8.h"
#include "cpu.h"

enum {
    CPU_PANEL = 16,
    CPU_STREAM_TOKENS = 4,         // the most that stream() takes: their sums fill the registers
    CPU_DEPTH = 256,               // rows of R in a slice: B's slice is 16 KiB, half of L1
    CPU_A_STRIDE = CPU_DEPTH + 16, // so that rows of A do not share cache sets
    CPU_WIDE_ROWS = 3,
};

struct cpu_panel {
    const uint8_t *elements; // [R/2][16][2] E4M3, [R][16] BF16
    const float *scales;     // [K][scale_lanes]; NULL for BF16
    uint32_t scale_lanes;    // 16, or 1: all sixteen outputs share a scale
    uint32_t reduced_dim;
    uint32_t block_r;
    enum einsum_weight_type type;
};

struct cpu_kernel {
    const char *name;
    bool (*supported)(void);

    // out[i] = value of codes[i] * scales[i / block_r]; NaN codes give NaN. n % 32 == 0. A kernel
    // may scale all of its folded A by a power of two that its other loops take back.
    void (*fold)(const uint8_t *codes, const float *scales, uint32_t n, uint32_t block_r,
                 float *out);

    // sums[t][16] = a[t][R] . panel, for up to CPU_STREAM_TOKENS tokens.
    void (*stream)(const struct cpu_panel *panel, const float *a, uint32_t tokens, float *sums);

    // out[r - r_begin][16] = panel's element * its scale, outputs in whatever order multiply()
    // undoes. r_begin and rows are multiples of 128.
    void (*expand)(const struct cpu_panel *panel, uint32_t r_begin, uint32_t rows, float *out);

    // sums[t][16] += a[t][CPU_A_STRIDE] . b[depth][16], both as fold() and expand() left them.
    void (*multiply)(const float *a, uint32_t tokens, const float *b, uint32_t depth, float *sums);

    // sums[t][16] += a[t][CPU_DEPTH] . b[depth][16], for up to CPU_WIDE_ROWS tokens.
    void (*wide_multiply)(const double *a, uint32_t tokens, const double *b, uint32_t depth,
                          double *sums);

    // Rounds n values, a multiple of 16.
    void (*round_bf16)(const float *from, uint32_t n, uint16_t *to);
};

// See CPU_NARROW_EXPONENT_MIN.
static inline bool cpu_is_narrow(float value)
{
    uint32_t magnitude = fp32_bits(value) & 0x7FFFFFFF;
    uint32_t least = (uint32_t)(127 + CPU_NARROW_EXPONENT_MIN) << 23;
    uint32_t beyond = (uint32_t)(127 + CPU_NARROW_EXPONENT_MAX + 1) << 23;
    return magnitude == 0 || magnitude > 0x7F800000 || (magnitude >= least && magnitude < beyond);
}

// The E4M3 element of output j in row r.
static inline uint8_t cpu_panel_e4m3(const struct cpu_panel *panel, uint32_t r, uint32_t j)
{
    return panel->elements[(uint64_t)(r / 2) * 2 * CPU_PANEL + 2 * j + r % 2];
}

extern const struct cpu_kernel cpu_kernel_avx2_subnormal;
extern const struct cpu_kernel cpu_kernel_avx2;
extern const struct cpu_kernel cpu_kernel_portable;
