// What no fast loop can: outputs that meet scales (or BF16 elements) so large or small that FP32
// sums would overflow or vanish although the result does not, or NaN scales. In FP64, one thread an
// output, straight from the re-laid weight. Slow and rare.
#pragma once

#include "mma.cuh"
#include "scales.cuh"

__device__ inline float e4m3_value(uint8_t code)
{
    uint32_t pair = e4m3_to_f16(code).low;
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(pair));
    return value;
}

// Offset of an element from the start of its panel of 16 rows; see mma.cuh for the fragments.
__device__ inline uint32_t e4m3_offset(uint32_t row, uint32_t k)
{
    uint32_t lane = 4 * (row % 8) + k % 16 / 4, word = row / 8 + 2 * (k % 32 / 16);
    return k / 32 * CUDA_FRAGMENT_BYTES + lane * 16 + word * 4 + k % 4;
}

__device__ inline uint32_t bf16_offset(uint32_t row, uint32_t k)
{
    uint32_t lane = 4 * (row % 8) + k % 16 / 4, word = row / 8 + 2 * (k % 4 / 2);
    return k / 16 * CUDA_FRAGMENT_BYTES + lane * 16 + word * 4 + k % 2 * 2;
}

__device__ inline double wide_output(const cuda_run &run, const cuda_row &row, uint32_t block,
                                     uint32_t g, uint32_t d)
{
    bool bf16 = run.mode == CUDA_MODE_BF16;
    uint64_t weight_row = (uint64_t)(run.group_begin + g) * run.output_dim + d;
    uint32_t row_bytes = bf16 ? 2 * run.reduced_dim : run.reduced_dim;
    const uint8_t *panel = (const uint8_t *)run.elements + weight_row / 16 * 16 * row_bytes;
    const uint8_t *scales_w = weight_scales(run, block, weight_row);
    token_scales scales_a = scales_of(row, g);
    const uint8_t *a =
        (const uint8_t *)row.activations + (uint64_t)g * row.activation_group * run.reduced_dim;

    double sum = 0;
#pragma unroll 1
    for (uint32_t k = 0; k < run.reduced_dim / block; k++) {
        uint32_t raw = scales_a.raw(k);
        double scale_a = scales_a.fp32 ? __uint_as_float(raw) : ue8m0_value(raw);
        double scale_w = bf16 ? 1 : weight_scale(run.scales_fp32, scales_w, k);
#pragma unroll 1
        for (uint32_t r = k * block; r < (k + 1) * block; r++) {
            double w =
                bf16 ? __uint_as_float(
                           (uint32_t) * (const uint16_t *)(panel + bf16_offset(d % 16, r)) << 16)
                     : e4m3_value(panel[e4m3_offset(d % 16, r)]);
            sum += e4m3_value(a[r]) * scale_a * (w * scale_w);
        }
    }
    return sum;
}

__device__ inline bool token_is_wide(const cuda_run &run, const cuda_row &row, uint32_t block,
                                     uint32_t g)
{
    token_scales scales = scales_of(row, g);
    bool wide = false;
#pragma unroll 1
    for (uint32_t k = 0; k < run.reduced_dim / block; k++) {
        uint32_t raw = scales.raw(k);
        wide |= scales.fp32 ? fp32_is_wide(raw) : ue8m0_is_wide(raw);
    }
    return wide;
}

__device__ inline bool weight_is_wide(const cuda_run &run, uint32_t g, uint32_t d)
{
    uint64_t row = (uint64_t)(run.group_begin + g) * run.output_dim + d;
    return ((const uint8_t *)run.wide)[row / CUDA_WIDE_ROWS] != 0;
}

// Replaces what must be replaced in tile[token][stride], outputs d_begin.. of `tokens` tokens.
__device__ inline void wide_tile(const cuda_run &run, const cuda_row *rows, uint32_t tokens,
                                 uint32_t g, uint32_t d_begin, uint32_t d_count, float *tile,
                                 uint32_t stride)
{
    uint32_t block = run.mode == CUDA_MODE_UE8M0_32 || run.mode == CUDA_MODE_FP32_32 ? 32 : 128;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < tokens * d_count; i += blockDim.x) {
        uint32_t token = i / d_count, d = d_begin + i % d_count;
        if (d < run.output_dim &&
            (weight_is_wide(run, g, d) || token_is_wide(run, rows[token], block, g)))
            tile[token * stride + i % d_count] = (float)wide_output(run, rows[token], block, g, d);
    }
}

__device__ __forceinline__ uint32_t bf16_pair(float low, float high)
{
    uint32_t pair; // rounds to nearest even
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Writes tile[token][stride] to the outputs of its tokens. Four neighbours a thread: D is a multiple of
// 32, d_count a power of two.
__device__ inline void store_tile(const cuda_run &run, const cuda_row *rows, uint32_t tokens,
                                  uint32_t g, uint32_t d_begin, uint32_t d_count, const float *tile,
                                  uint32_t stride)
{
    uint32_t fours = d_count / 4, fours_log2 = __ffs((int)fours) - 1;
    for (uint32_t i = threadIdx.x; i < tokens * fours; i += blockDim.x) {
        uint32_t token = i >> fours_log2, column = (i & (fours - 1)) * 4, d = d_begin + column;
        if (d >= run.output_dim)
            continue;
        float4 v = *(const float4 *)(tile + token * stride + column);
        uint64_t at = (uint64_t)g * run.output_dim + d;
        uint64_t output = rows[token].output;
        bool fp32 = rows[token].flags & CUDA_ROW_OUTPUT_FP32;
        if (fp32) {
            *((float4 *)output + at / 4) = v;
            continue;
        }
        *((uint2 *)output + at / 4) = make_uint2(bf16_pair(v.x, v.y), bf16_pair(v.z, v.w));
    }
}
