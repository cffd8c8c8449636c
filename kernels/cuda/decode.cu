// The portable kernels for few tokens, and their form for SM 12.0: decode.cuh with mma.
#include "launch.h"

#include "decode.cuh"

namespace
{

struct variant {
    const void *kernels[3]; // by CUDA_LAUNCH_DECODE_UE8M0, _FP32, and both
    uint32_t smem_bytes, tokens;
};

template <int MOST> variant variant_of()
{
    return {{(const void *)decode_kernel<UE8M0_128, MOST>,
             (const void *)decode_kernel<FP32_128, MOST>,
             (const void *)decode_kernel<ANY_MODE, MOST>},
            sizeof(decode_smem<MOST>),
            8 * MOST};
}

variant variant_for(uint32_t tokens)
{
    return tokens <= 8    ? variant_of<1>()
           : tokens <= 16 ? variant_of<2>()
           : tokens <= 32 ? variant_of<4>()
                          : variant_of<8>();
}

} // namespace

extern "C" cudaError_t cuda_decode_init(struct cuda_bucket *bucket, int sm_count)
{
    variant v = variant_for(bucket->tokens_max);
    cudaError_t error = cudaSuccess;
    for (const void *kernel : v.kernels)
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         v.smem_bytes);
    // One on an SM keeps the memory busy; further places are the next kernels'.
    bucket->decode_tokens = v.tokens;
    bucket->decode_workers = (uint32_t)sm_count;
    return error;
}

extern "C" uint64_t cuda_decode_partial_bytes(const struct cuda_bucket *bucket)
{
    return (uint64_t)bucket->decode_workers * 2 * bucket->decode_tokens * TILE_COLUMNS * 4;
}

extern "C" cudaError_t cuda_decode_launch(const struct cuda_bucket *bucket, uint32_t form,
                                          const struct cuda_table *table, uint32_t *counters,
                                          float *partials, bool overlaps, cudaStream_t stream)
{
    variant v = variant_for(bucket->decode_tokens);
    uint32_t table_lines = cuda_table_lines(bucket, v.tokens);
    void *arguments[] = {&table, &table_lines, &partials, &counters};
    return cuda_launch_kernel(v.kernels[form / CUDA_LAUNCH_DECODE_UE8M0 - 1],
                              bucket->decode_workers, THREADS, v.smem_bytes, arguments, overlaps,
                              stream);
}
