// The step before the einsum, where it is asked for: attention's output becomes activations and
// their scales in place (../attention.h tells the numerics; these are its bits). First in a graph.
//
//     table: spans of rows (token, group) --> block: one row at a time, a warp one head of a chunk
//         16-byte loads   | barrier |   rotate, greatest of a block by shuffles, quantise, store
//
// A chunk is read whole before any of it is written: what is written of chunk c lies over c/2.
// Scales lie over the row's middle and wait in shared memory for its end.
#include "cuda.h"

#include "../attention.h"

namespace
{

enum {
    WARPS = 8,
    THREADS = WARPS * 32,
    BLOCKS_OF_SM = 5, // 8 KiB on their way in each: the memory is kept busy
    LOADS = 2,        // of a lane in a head
    LOAD_VALUES = 8,
    LOAD_LANES = 32 * LOAD_VALUES,                         // values of a warp's load
    ROTATING_LANE = 32 - ATTENTION_ROPE_DIM / LOAD_VALUES, // the first, of the last load
    SCALES_MAX = EINSUM_DIM_MAX / 32,
};
static_assert(LOADS * LOAD_LANES == ATTENTION_HEAD_DIM, "a warp reads a head");

struct row_at {
    uint8_t *memory;
    const attention_rotation *rotation;
    uint32_t heads, block_log2;
};

// The last span that begins at or before `row`: 32 probes at once, one round for 32 spans.
__device__ inline row_at find_row(const cuda_attention *spans, uint32_t n, uint32_t row)
{
    uint32_t lane = threadIdx.x % 32;
    while (n > 1) {
        uint32_t step = (n + 31) / 32;
        bool before = lane * step < n && spans[lane * step].row_begin <= row;
        uint32_t last = (uint32_t)__popc(__ballot_sync(0xFFFFFFFF, before)) - 1;
        spans += last * step;
        n = min(step, n - last * step);
    }
    cuda_attention span = *spans;
    uint32_t i = row - span.row_begin;
    return {(uint8_t *)span.rows + (uint64_t)i * 2 * span.reduced_dim,
            (const attention_rotation *)span.rotations + i / span.groups,
            span.reduced_dim / ATTENTION_HEAD_DIM, span.block_r == 128 ? 7u : 5u};
}

// Two BF16 a word, the first one lower.
__device__ inline void unpack(float (&x)[LOAD_VALUES], uint4 raw)
{
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000);
    }
}

// Products and sums are rounded one by one: no fused multiply-add.
__device__ inline void rotate(float (&x)[LOAD_VALUES], float4 cos, float4 sin)
{
    const float c[4] = {cos.x, cos.y, cos.z, cos.w}, s[4] = {sin.x, sin.y, sin.z, sin.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float x0 = x[2 * i], x1 = x[2 * i + 1];
        x[2 * i] = __fadd_rn(__fmul_rn(x0, c[i]), __fmul_rn(x1, s[i]));
        x[2 * i + 1] = __fsub_rn(__fmul_rn(x1, c[i]), __fmul_rn(x0, s[i]));
    }
}

// Of the magnitudes of a block's values, as bits: what is not finite is greater than all that is.
__device__ inline uint32_t greatest(const float (&x)[LOAD_VALUES], uint32_t block_log2)
{
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < LOAD_VALUES; i++)
        most = max(most, __float_as_uint(x[i]) & 0x7FFFFFFF);
    most = max(most, __shfl_xor_sync(0xFFFFFFFF, most, 1));
    most = max(most, __shfl_xor_sync(0xFFFFFFFF, most, 2));
    if (block_log2 == 7) {
        most = max(most, __shfl_xor_sync(0xFFFFFFFF, most, 4));
        most = max(most, __shfl_xor_sync(0xFFFFFFFF, most, 8));
    }
    return most;
}

// The code of the smallest power of two that is no less than most/448; 448 is 1.75 * 2^8.
__device__ inline uint32_t scale_code(uint32_t most)
{
    if (most >= 0x7F800000)
        return 0xFF;
    return (max(most, __float_as_uint(1e-10f)) + 0x1FFFFF >> 23) - 8;
}

__device__ inline uint32_t to_e4m3(float low, float high)
{
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ inline uint2 quantise(const float (&x)[LOAD_VALUES], uint32_t scale)
{
    if (scale == 0xFF)
        return make_uint2(0, 0);
    float inverse = __uint_as_float(254 - scale << 23);
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        pairs[i] = to_e4m3(__fmul_rn(x[2 * i], inverse), __fmul_rn(x[2 * i + 1], inverse));
    return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

__global__ void __launch_bounds__(THREADS, BLOCKS_OF_SM)
    attention_kernel(const cuda_table *__restrict__ table)
{
    __shared__ __align__(4) uint8_t scales[SCALES_MAX];
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t rows = table->attention_rows;
    const cuda_attention *spans =
        (const cuda_attention *)((const uint8_t *)table + table->rows_offset) -
        table->attention_spans;
    for (uint32_t row = blockIdx.x; row < rows; row += gridDim.x) {
        row_at at = find_row(spans, table->attention_spans, row);
        __builtin_assume(__isGlobal(at.memory));
        uint32_t reduced_dim = at.heads * ATTENTION_HEAD_DIM;
        for (uint32_t chunk = 0; chunk < at.heads; chunk += WARPS) {
            uint32_t head = chunk + warp;
            uint4 raw[LOADS];
            float4 cos, sin;
            if (head < at.heads) {
                const uint8_t *from = at.memory + head * (2 * ATTENTION_HEAD_DIM);
#pragma unroll
                for (int i = 0; i < LOADS; i++)
                    raw[i] = *(const uint4 *)(from + 2 * (i * LOAD_LANES + lane * LOAD_VALUES));
                if (lane >= ROTATING_LANE) {
                    uint32_t pair = (lane - ROTATING_LANE) * LOAD_VALUES / 2;
                    cos = __ldg((const float4 *)(at.rotation->cos + pair));
                    sin = __ldg((const float4 *)(at.rotation->sin + pair));
                }
            }
            __syncthreads(); // the chunk is read
            if (head >= at.heads)
                continue;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                uint32_t dim = i * LOAD_LANES + lane * LOAD_VALUES;
                float x[LOAD_VALUES];
                unpack(x, raw[i]);
                if (i == LOADS - 1 && lane >= ROTATING_LANE)
                    rotate(x, cos, sin);
                uint32_t scale = scale_code(greatest(x, at.block_log2));
                uint32_t place = head * ATTENTION_HEAD_DIM + dim;
                *(uint2 *)(at.memory + place) = quantise(x, scale);
                if ((place & ((1u << at.block_log2) - 1)) == 0)
                    scales[place >> at.block_log2] = (uint8_t)scale;
            }
        }
        __syncthreads(); // the row is read, its scales are known
        uint32_t words = reduced_dim >> at.block_log2 >> 2;
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < words; i += THREADS)
            ((uint32_t *)(at.memory + reduced_dim))[i] = ((const uint32_t *)scales)[i];
        // No barrier: scales are written again behind the next row's first one.
    }
}

} // namespace

// ---- host

extern "C" cudaError_t cuda_attention_launch(const struct cuda_bucket *bucket,
                                             const struct cuda_table *table, cudaStream_t stream)
{
    void *arguments[] = {&table};
    return cudaLaunchKernel((const void *)attention_kernel, dim3(bucket->attention_blocks),
                            dim3(THREADS), arguments, 0, stream);
}

extern "C" void cuda_attention_init(struct cuda_bucket *bucket, int sm_count)
{
    bucket->attention_blocks = (uint32_t)sm_count * BLOCKS_OF_SM;
}
