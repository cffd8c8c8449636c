// Which kernels a bucket has, and a launch of those that a table needs. Host code alone.
#include "launch.h"

cudaError_t cuda_bucket_init(struct cuda_bucket *bucket, uint32_t tokens_max, bool hopper)
{
    int device, sm_count;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess)
        return error;
    if (sm_count > CUDA_COUNTERS)
        return cudaErrorNotSupported;
    *bucket = (struct cuda_bucket){.tokens_max = tokens_max, .hopper_from = UINT32_MAX};
    cuda_attention_init(bucket, sm_count);
    error = cuda_decode_init(bucket, sm_count);
    if (error == cudaSuccess)
        error = cuda_prefill_init(bucket, sm_count);
    if (error == cudaSuccess && hopper)
        error = cuda_hopper_init(bucket, sm_count);
    if (error == cudaSuccess && hopper && tokens_max >= CUDA_HOPPER_TOKENS_MIN)
        error = cuda_hopper_many_init(bucket, sm_count);
    return error;
}

// A workspace serves every bucket of a lane, so the counters, which must stay zero, lie where no bucket
// has anything else:  decode's counters | Hopper's counters | decode's partials | Hopper's partials
enum {
    COUNTERS_BYTES = CUDA_COUNTERS * sizeof(uint32_t),
    PARTIALS_OFFSET = 2 * COUNTERS_BYTES,
};

static uint64_t hopper_partials_offset(const struct cuda_bucket *bucket)
{
    return PARTIALS_OFFSET + (cuda_decode_partial_bytes(bucket) + 255) / 256 * 256;
}

uint64_t cuda_workspace_bytes(const struct cuda_bucket *bucket)
{
    return hopper_partials_offset(bucket) + cuda_hopper_partial_bytes(bucket);
}

bool cuda_bucket_can_launch(const struct cuda_bucket *bucket, uint32_t launches)
{
    if ((launches & ~(uint32_t)CUDA_LAUNCH_ATTENTION) == 0)
        return false;
    if (launches & CUDA_LAUNCH_HOPPER_MANY && !cuda_bucket_has_many(bucket))
        return false;
    return bucket->hopper_workers > 0 || !(launches & CUDA_LAUNCH_HOPPER);
}

bool cuda_bucket_has_many(const struct cuda_bucket *bucket)
{
    return bucket->many_blocks > 0;
}

cudaError_t cuda_launch(const struct cuda_bucket *bucket, uint32_t launches,
                        const struct cuda_table *table, void *workspace, cudaStream_t stream)
{
    cudaError_t error = cudaSuccess;
    unsigned char *at = workspace;
    bool overlaps = !(launches & (CUDA_LAUNCH_ATTENTION | CUDA_LAUNCH_WRITTEN));
    if (launches & CUDA_LAUNCH_ATTENTION)
        error = cuda_attention_launch(bucket, table, stream);
    if (error == cudaSuccess && launches & CUDA_LAUNCH_DECODE) {
        error = cuda_decode_launch(bucket, launches & CUDA_LAUNCH_DECODE, table, (uint32_t *)at,
                                   (void *)(at + PARTIALS_OFFSET), overlaps, stream);
        overlaps = true; // it starts when all is in place, and what follows not before it
    }
    if (error == cudaSuccess && launches & CUDA_LAUNCH_PREFILL) {
        error = cuda_prefill_launch(bucket, table, overlaps, stream);
        overlaps = true;
    }
    if (error == cudaSuccess && launches & CUDA_LAUNCH_HOPPER) {
        error = cuda_hopper_launch(bucket, table, (uint32_t *)(at + COUNTERS_BYTES),
                                   (void *)(at + hopper_partials_offset(bucket)), overlaps, stream);
        overlaps = true;
    }
    if (error == cudaSuccess && launches & CUDA_LAUNCH_HOPPER_MANY)
        error = cuda_hopper_many_launch(bucket, table, overlaps, stream);
    return error;
}

uint32_t cuda_table_lines(const struct cuda_bucket *bucket, uint32_t tokens)
{
    uint64_t there = cuda_table_bytes(bucket, 1) / 128;
    uint64_t lines = 1 + ((uint64_t)tokens * sizeof(struct cuda_row) + 127) / 128;
    return (uint32_t)(lines < there ? lines : there);
}

cudaError_t cuda_launch_kernel(const void *kernel, uint32_t blocks, uint32_t threads,
                               uint32_t smem_bytes, void **arguments, bool overlaps,
                               cudaStream_t stream)
{
    cudaLaunchAttribute serialization = {.id = cudaLaunchAttributeProgrammaticStreamSerialization};
    serialization.val.programmaticStreamSerializationAllowed = overlaps;
    const cudaLaunchConfig_t config = {
        .gridDim = {blocks, 1, 1},
        .blockDim = {threads, 1, 1},
        .dynamicSmemBytes = smem_bytes,
        .stream = stream,
        .attrs = &serialization,
        .numAttrs = 1,
    };
    return cudaLaunchKernelExC(&config, kernel, arguments);
}
