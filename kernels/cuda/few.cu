// The arm for SM 9.0 in buckets of up to 128 tokens: weights stream as in decode, what they meet is
// summed by wgmma.
#include "launch.h"

#include "decode.cuh"

namespace
{

enum { EIGHTS = CUDA_FEW_TOKENS_MAX / 8, WARPS_K = 2 };
constexpr auto kernel = decode_kernel<BY_WGMMA, EIGHTS>;

} // namespace

extern "C" cudaError_t cuda_few_init(struct cuda_bucket *bucket, int sm_count)
{
    bucket->hopper_warps_k = WARPS_K;
    bucket->hopper_tokens = CUDA_FEW_TOKENS_MAX;
    bucket->hopper_workers = (uint32_t)sm_count;
    bucket->hopper_from = CUDA_HOPPER_TOKENS_MIN;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                sizeof(decode_smem<EIGHTS>));
}

extern "C" uint64_t cuda_few_partial_bytes(const struct cuda_bucket *bucket)
{
    return (uint64_t)bucket->hopper_workers * 2 * CUDA_FEW_TOKENS_MAX * TILE_COLUMNS * 4;
}

extern "C" cudaError_t cuda_few_launch(const struct cuda_bucket *bucket,
                                       const struct cuda_table *table, uint32_t *counters,
                                       float *partials, bool overlaps, cudaStream_t stream)
{
    uint32_t table_lines = cuda_table_lines(bucket, CUDA_FEW_TOKENS_MAX);
    void *arguments[] = {&table, &table_lines, &partials, &counters};
    return cuda_launch_kernel((const void *)kernel, bucket->hopper_workers, THREADS,
                              sizeof(decode_smem<EIGHTS>), arguments, overlaps, stream);
}
