// What each kernel's file gives to launch.c.
#pragma once

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

void cuda_attention_init(struct cuda_bucket *bucket, int sm_count);
cudaError_t cuda_decode_init(struct cuda_bucket *bucket, int sm_count);
cudaError_t cuda_prefill_init(struct cuda_bucket *bucket, int sm_count);
cudaError_t cuda_hopper_init(struct cuda_bucket *bucket, int sm_count);

uint64_t cuda_decode_workspace_bytes(const struct cuda_bucket *bucket);
uint64_t cuda_hopper_workspace_bytes(const struct cuda_bucket *bucket);

// `overlaps`: with the kernel ahead.
cudaError_t cuda_attention_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                                  cudaStream_t stream);
cudaError_t cuda_decode_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                               void *workspace, bool overlaps, cudaStream_t stream);
cudaError_t cuda_prefill_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                                bool overlaps, cudaStream_t stream);
cudaError_t cuda_hopper_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                               void *workspace, bool overlaps, cudaStream_t stream);

// A launch of any of them; `smem_bytes` of dynamic shared memory.
cudaError_t cuda_launch_kernel(const void *kernel, uint32_t blocks, uint32_t threads,
                               uint32_t smem_bytes, void **arguments, bool overlaps,
                               cudaStream_t stream);

#ifdef __cplusplus
}
#endif
