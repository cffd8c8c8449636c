// Reading scales: of activations, in all four layouts and both types, and of weights; and telling
// narrow ones from wide ones (table.h).
#pragma once

#include "table.h"

__device__ __forceinline__ float ue8m0_value(uint32_t code)
{
    return __uint_as_float(code == 0xFF ? 0x7FC00000 : code == 0 ? 0x00400000 : code << 23);
}

__device__ __forceinline__ bool ue8m0_is_wide(uint32_t code)
{
    return code < 127 + CUDA_NARROW_EXPONENT_MIN || code > 127 + CUDA_NARROW_EXPONENT_MAX;
}

__device__ __forceinline__ bool fp32_is_wide(uint32_t bits)
{
    uint32_t magnitude = bits & 0x7FFFFFFF;
    return magnitude != 0 && (magnitude < (uint32_t)(127 + CUDA_NARROW_EXPONENT_MIN) << 23 ||
                              magnitude >= (uint32_t)(128 + CUDA_NARROW_EXPONENT_MAX) << 23);
}

// The scales of one token in one group.
struct token_scales {
    const uint8_t *at;
    uint32_t word, byte; // strides
    bool fp32;

    // Of block k as stored: four bytes of FP32, or one of UE8M0.
    __device__ __forceinline__ uint32_t raw(uint32_t k) const
    {
        const uint8_t *from = at + (uint64_t)(k / 4) * word + k % 4 * byte;
        return fp32 ? *(const uint32_t *)from : *from;
    }
};

__device__ __forceinline__ token_scales scales_of(const cuda_row &row, uint32_t g)
{
    return {(const uint8_t *)row.scales + (uint64_t)g * row.scale_group, row.scale_word,
            row.scale_byte, (row.flags & CUDA_ROW_SCALES_FP32) != 0};
}

// The scales of K = 128 of one token, on their way from global to shared memory.
template <int BLOCK> struct scales_in_flight {
    static constexpr int N = 128 / BLOCK;
    uint32_t raw[N];

    __device__ __forceinline__ void load(const token_scales &scales, uint32_t k_block)
    {
#pragma unroll
        for (int i = 0; i < N; i++)
            raw[i] = scales.raw(k_block * N + i);
    }

    // For tokens that are none.
    __device__ __forceinline__ void load_one(bool fp32)
    {
#pragma unroll
        for (int i = 0; i < N; i++)
            raw[i] = fp32 ? 0x3F800000 : 127;
    }

    // The word that block-scaled mma reads.
    __device__ __forceinline__ uint32_t word(bool &wide) const
    {
        uint32_t word = N == 1 ? raw[0] * 0x01010101 : 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            word |= N == 1 ? 0 : raw[i] << (8 * i);
            wide |= ue8m0_is_wide(raw[i]);
        }
        return word;
    }

    __device__ __forceinline__ float value(int i, bool fp32, bool &wide) const
    {
        wide |= fp32 ? fp32_is_wide(raw[i]) : ue8m0_is_wide(raw[i]);
        return fp32 ? __uint_as_float(raw[i]) : ue8m0_value(raw[i]);
    }
};

// Where the scales of one row of D (counted through all groups) begin.
__device__ __forceinline__ const uint8_t *weight_scales(const cuda_run &run, uint32_t block,
                                                        uint64_t row)
{
    uint64_t blocks = run.reduced_dim / block;
    uint64_t stride = run.scales_fp32 ? blocks * 4 : (blocks + 3) / 4 * 4;
    return (const uint8_t *)run.scales + (row >> run.block_d_log2) * stride;
}

// The word that block-scaled mma reads for K = 128.
template <int BLOCK>
__device__ __forceinline__ uint32_t weight_scale_word(const uint8_t *scales, uint32_t k_block)
{
    const uint32_t *words = (const uint32_t *)scales;
    if (BLOCK == 32)
        return __ldg(words + k_block);
    return __byte_perm(__ldg(words + k_block / 4), 0, k_block % 4 * 0x1111);
}

__device__ __forceinline__ float weight_scale(bool fp32, const uint8_t *scales, uint32_t k)
{
    return fp32 ? __ldg((const float *)scales + k) : ue8m0_value(__ldg(scales + k));
}
