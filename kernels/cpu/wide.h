// The FP64 path, for what FP32 would overflow, lose or blur: scales beyond CPU_NARROW, NaN among a
// panel's weights, infinite scales. Its products a*sA and b*sB are exact, so that it gives what the
// reference gives. Seldom taken, and then still shared over tokens, so that no input makes a batch
// crawl.
//
// Static functions, included by task.c and by each kernel, whose instruction set the compiler then
// uses for the loop.
#pragma once

#include "kernel.h"

static inline double wide_scale(const uint8_t *scale, enum einsum_scale_type type)
{
    return (double)(type == EINSUM_SCALE_UE8M0 ? ue8m0_to_float(*scale) : fp32_load(scale));
}

// out[r - r_begin][16]: elements times their scales.
static inline void wide_expand(const struct cpu_panel *panel, uint32_t r_begin, uint32_t rows,
                               double *out)
{
    for (uint32_t r = r_begin; r < r_begin + rows; r++) {
        uint64_t k = r / panel->block_r;
        for (uint32_t j = 0; j < CPU_PANEL; j++) {
            if (panel->type == EINSUM_WEIGHT_BF16) {
                uint16_t code;
                memcpy(&code, panel->elements + 2 * ((uint64_t)r * CPU_PANEL + j), sizeof(code));
                *out++ = (double)bf16_to_float(code);
            } else {
                uint64_t lane = panel->scale_lanes == 1 ? 0 : j;
                // The analyser does not know that E4M3 panels have scales.
                // NOLINTNEXTLINE(clang-analyzer-core.NullDereference)
                double scale = (double)panel->scales[k * panel->scale_lanes + lane];
                *out++ = (double)e4m3_to_float(cpu_panel_e4m3(panel, r, j)) * scale;
            }
        }
    }
}

// sums[rows][16] += a[rows][CPU_DEPTH] . b[depth][16]; `rows` is a constant where this is inlined.
static inline __attribute__((always_inline)) void
wide_rows(const double *a, const int rows, const double *b, uint32_t depth, double *sums)
{
    // Four to a vector: two SSE2 registers or one of AVX2.
    typedef double double4 __attribute__((vector_size(32), aligned(8)));
    const double4 *columns = (const double4 *)(const void *)b;
    double4 *totals = (double4 *)(void *)sums;
    double4 partial[CPU_WIDE_ROWS][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++)
            partial[i][j] = totals[i * 4 + j];
    for (uint32_t k = 0; k < depth; k++, columns += 4)
        for (int i = 0; i < rows; i++) {
            double element = a[i * CPU_DEPTH + (int)k];
            for (int j = 0; j < 4; j++)
                partial[i][j] += columns[j] * element;
        }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++)
            totals[i * 4 + j] = partial[i][j];
}

static inline void wide_multiply(const double *a, uint32_t tokens, const double *b, uint32_t depth,
                                 double *sums)
{
    if (tokens == 3)
        wide_rows(a, 3, b, depth, sums);
    else if (tokens == 2)
        wide_rows(a, 2, b, depth, sums);
    else
        wide_rows(a, 1, b, depth, sums);
}
