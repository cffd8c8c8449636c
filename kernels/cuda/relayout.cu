// Weights in the order in which the tensor cores read them, once, at load. A thread gathers the 16
// bytes of one lane of one fragment (mma.cuh).
#include "cuda.h"

#include "scales.cuh"

static uint64_t align256(uint64_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static uint64_t scale_rows(const struct einsum_weight_format *format)
{
    return (uint64_t)format->groups * (format->output_dim / format->block_d);
}

static uint64_t scale_row_bytes(const struct einsum_weight_format *format)
{
    uint64_t blocks = format->reduced_dim / format->block_r;
    return format->scale_type == EINSUM_SCALE_FP32 ? blocks * 4 : (blocks + 3) / 4 * 4;
}

static uint64_t scales_bytes(const struct einsum_weight_format *format)
{
    return format->scale_type == EINSUM_SCALE_NONE ? 0
                                                   : scale_rows(format) * scale_row_bytes(format);
}

static uint64_t wide_bytes(const struct einsum_weight_format *format)
{
    return (uint64_t)format->groups * (format->output_dim / CUDA_WIDE_ROWS);
}

// Bytes of the second form, if there is one. It follows the first, of as many whole tiles.
static uint64_t tiles_bytes(const struct einsum_weight_format *format, bool many)
{
    bool square = format->block_d == CUDA_MANY_ROWS && format->block_r == CUDA_K_BLOCK;
    return many && square && einsum_hopper_takes(format) ? einsum_weight_bytes(format) : 0;
}

extern "C" uint64_t cuda_weight_bytes(const struct einsum_weight_format *format, bool many)
{
    return align256(einsum_weight_bytes(format)) + tiles_bytes(format, many) +
           align256(scales_bytes(format)) + align256(wide_bytes(format));
}

extern "C" cudaError_t cuda_weight_init(struct cuda_weight *weight,
                                        const struct einsum_weight_format *format, bool many,
                                        void *memory, cudaStream_t stream)
{
    uint8_t *behind = (uint8_t *)memory + align256(einsum_weight_bytes(format));
    weight->format = *format;
    weight->memory = memory;
    weight->elements = (uint8_t *)memory;
    weight->tiles = tiles_bytes(format, many) > 0 ? behind : NULL;
    weight->scales = behind + tiles_bytes(format, many);
    weight->wide = (uint8_t *)weight->scales + align256(scales_bytes(format));
    return cudaMemsetAsync(weight->wide, 0, wide_bytes(format), stream);
}

template <bool BF16>
__global__ void relayout_kernel(uint8_t *to, const uint8_t *from, uint64_t pieces,
                                uint32_t row_bytes, uint64_t row_begin, uint8_t *wide)
{
    uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pieces)
        return;
    uint32_t lane = i % 32, g = lane / 4, t = lane % 4;
    uint64_t fragment = i / 32, fragments = row_bytes / 32; // of a panel
    uint64_t panel = fragment / fragments;
    // 32 bytes of a row either way: K = 32 of E4M3, 16 of BF16.
    const uint8_t *at = from + (panel * 16 + g) * row_bytes + fragment % fragments * 32;
    const uint8_t *below = at + 8 * (uint64_t)row_bytes;
    uint32_t first = BF16 ? 8 * t : 4 * t, second = BF16 ? 8 * t + 4 : 16 + 4 * t;
    uint4 v = make_uint4(*(const uint32_t *)(at + first), *(const uint32_t *)(below + first),
                         *(const uint32_t *)(at + second), *(const uint32_t *)(below + second));
    ((uint4 *)to)[i] = v;
    if (!BF16)
        return;
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
    bool is_wide = false;
    for (int j = 0; j < 4; j++)
        is_wide |= fp32_is_wide(words[j] << 16) || fp32_is_wide(words[j] & 0xFFFF0000);
    if (is_wide)
        wide[(row_begin + panel * 16) / CUDA_WIDE_ROWS] = 1;
}

// A thread moves 16 bytes, into a tile as wgmma reads it: see wgmma.cuh.
__global__ void relayout_tiles_kernel(uint8_t *tiles, const uint8_t *from, uint64_t pieces,
                                      uint32_t row_pieces, uint64_t row_begin)
{
    uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pieces)
        return;
    uint64_t row = row_begin + i / row_pieces;
    uint32_t column = i % row_pieces, in_row = column % 8, in_tile = row % CUDA_MANY_ROWS;
    uint64_t tile = row / CUDA_MANY_ROWS * (row_pieces / 8) + column / 8;
    uint8_t *to = tiles + tile * CUDA_MANY_TILE_BYTES + in_tile * CUDA_K_BLOCK;
    ((uint4 *)to)[in_row ^ in_tile % 8] = ((const uint4 *)from)[i];
}

extern "C" cudaError_t cuda_relayout(const struct cuda_weight *weight, const void *staging,
                                     uint64_t row_begin, uint64_t rows, cudaStream_t stream)
{
    if (rows == 0)
        return cudaSuccess;
    bool bf16 = weight->format.weight_type == EINSUM_WEIGHT_BF16;
    uint32_t row_bytes = weight->format.reduced_dim * (bf16 ? 2 : 1);
    uint8_t *to = weight->elements + row_begin * row_bytes;
    uint64_t pieces = rows * row_bytes / 16;
    uint32_t blocks = (uint32_t)((pieces + 255) / 256);
    if (bf16)
        relayout_kernel<true><<<blocks, 256, 0, stream>>>(to, (const uint8_t *)staging, pieces,
                                                          row_bytes, row_begin, weight->wide);
    else
        relayout_kernel<false><<<blocks, 256, 0, stream>>>(to, (const uint8_t *)staging, pieces,
                                                           row_bytes, row_begin, weight->wide);
    if (weight->tiles != NULL)
        relayout_tiles_kernel<<<blocks, 256, 0, stream>>>(weight->tiles, (const uint8_t *)staging,
                                                          pieces, row_bytes / 16, row_begin);
    return cudaGetLastError();
}

// A thread copies one scale and flags the rows that a wide one serves.
__global__ void relayout_scales_kernel(uint8_t *to, const uint8_t *from, uint64_t rows,
                                       uint32_t blocks, uint32_t row_bytes, uint32_t block_d,
                                       bool fp32, uint8_t *wide)
{
    uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * blocks)
        return;
    uint64_t row = i / blocks, k = i % blocks;
    bool is_wide;
    if (fp32) {
        uint32_t bits = ((const uint32_t *)from)[i];
        is_wide = fp32_is_wide(bits);
        ((uint32_t *)(to + row * row_bytes))[k] = bits;
    } else {
        is_wide = ue8m0_is_wide(from[i]);
        to[row * row_bytes + k] = from[i];
    }
    if (is_wide)
        for (uint64_t d = row * block_d; d < (row + 1) * block_d; d += CUDA_WIDE_ROWS)
            wide[d / CUDA_WIDE_ROWS] = 1;
}

extern "C" cudaError_t cuda_relayout_scales(const struct cuda_weight *weight, const void *staging,
                                            cudaStream_t stream)
{
    const struct einsum_weight_format *format = &weight->format;
    if (format->scale_type == EINSUM_SCALE_NONE)
        return cudaSuccess;
    uint64_t rows = scale_rows(format), row_bytes = scale_row_bytes(format);
    uint32_t blocks = format->reduced_dim / format->block_r;
    // Padding after a row is read with its word but selects nothing.
    cudaError_t error = cudaMemsetAsync(weight->scales, 127, rows * row_bytes, stream);
    if (error != cudaSuccess)
        return error;
    relayout_scales_kernel<<<(uint32_t)((rows * blocks + 255) / 256), 256, 0, stream>>>(
        (uint8_t *)weight->scales, (const uint8_t *)staging, rows, blocks, (uint32_t)row_bytes,
        format->block_d, format->scale_type == EINSUM_SCALE_FP32, weight->wide);
    return cudaGetLastError();
}
