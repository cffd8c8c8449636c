// The arm for SM 9.0 in buckets of up to 64 tokens: tiles so small that they are enough for all SMs, and
// that two fit one, so that the next launch's first copies are on their way while this one ends.
#include "launch.h"

enum { TOKENS = CUDA_SOME_TOKENS_MAX, OUTPUTS = 64, STAGES = 6, CLUSTER = 2, BLOCKS = 2 };
#include "hopper_many.cuh"

extern "C" cudaError_t cuda_some_init(struct cuda_bucket *bucket, int sm_count)
{
    return init_tiles(bucket, sm_count);
}

extern "C" cudaError_t cuda_some_launch(const struct cuda_bucket *bucket,
                                        const struct cuda_table *table, bool overlaps,
                                        cudaStream_t stream)
{
    return launch_tiles(bucket, table, overlaps, stream);
}
