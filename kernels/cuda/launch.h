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
cudaError_t cuda_hopper_many_init(struct cuda_bucket *bucket, int sm_count);

// What workers leave for each other of a tile that they share: floats, of no meaning between launches,
// aligned to 256. Who has come is counted in CUDA_COUNTERS words, zero before and after each launch.
uint64_t cuda_decode_partial_bytes(const struct cuda_bucket *bucket);
uint64_t cuda_hopper_partial_bytes(const struct cuda_bucket *bucket);
enum { CUDA_COUNTERS = 1024 };

// Hopper's arm in buckets of few tokens (few.cu); hopper.cu passes on what is not its own.
enum { CUDA_FEW_TOKENS_MAX = 32 };
cudaError_t cuda_few_init(struct cuda_bucket *bucket, int sm_count);
uint64_t cuda_few_partial_bytes(const struct cuda_bucket *bucket);
cudaError_t cuda_few_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                            uint32_t *counters, float *partials, bool overlaps,
                            cudaStream_t stream);

// `overlaps`: with the kernel ahead.
cudaError_t cuda_attention_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                                  cudaStream_t stream);
// `form`: CUDA_LAUNCH_DECODE, or as much of it as the table needs.
cudaError_t cuda_decode_launch(const struct cuda_bucket *bucket, uint32_t form,
                               const struct cuda_table *table, uint32_t *counters, float *partials,
                               bool overlaps, cudaStream_t stream);
cudaError_t cuda_prefill_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                                bool overlaps, cudaStream_t stream);
cudaError_t cuda_hopper_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                               uint32_t *counters, float *partials, bool overlaps,
                               cudaStream_t stream);

// Hopper's many in buckets of some tokens (hopper_some.cu); hopper_many.cu passes on what is not its own.
enum { CUDA_SOME_TOKENS_MAX = CUDA_MANY_BOX };
cudaError_t cuda_some_init(struct cuda_bucket *bucket, int sm_count);
cudaError_t cuda_some_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                             bool overlaps, cudaStream_t stream);

cudaError_t cuda_hopper_many_launch(const struct cuda_bucket *bucket,
                                    const struct cuda_table *table, bool overlaps,
                                    cudaStream_t stream);

// What to read of a table before its first line is known: of a single run the rows of `tokens` tokens, not
// beyond what the smallest table takes. In lines of 128 bytes.
uint32_t cuda_table_lines(const struct cuda_bucket *bucket, uint32_t tokens);

// A launch of any of them; `smem_bytes` of dynamic shared memory.
cudaError_t cuda_launch_kernel(const void *kernel, uint32_t blocks, uint32_t threads,
                               uint32_t smem_bytes, void **arguments, bool overlaps,
                               cudaStream_t stream);

#ifdef __cplusplus
}
#endif
