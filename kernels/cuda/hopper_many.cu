// The arm for SM 9.0 where tokens are many: tiles so large that the tensor cores are what is short.
#include "launch.h"

#include <cuda.h>
#include <string.h>

enum { TOKENS = CUDA_MANY_TOKENS, OUTPUTS = 128, STAGES = 4, CLUSTER = 2, BLOCKS = 1 };
#include "hopper_many.cuh"

namespace
{

// The driver's, since maps are made by it alone; NULL before cuda_hopper_many_init or without one.
decltype(&cuTensorMapEncodeTiled) encode;

bool make_map(cuda_map *map, const cuda_row *rows, uint32_t tokens, uint32_t groups,
              uint32_t reduced_dim)
{
    uint64_t group_bytes = (uint64_t)rows[0].activation_group * reduced_dim;
    uint64_t token_bytes = tokens > 1 ? rows[1].activations - rows[0].activations : reduced_dim;
    const cuuint64_t dims[] = {reduced_dim, tokens, groups}, strides[] = {token_bytes, group_bytes};
    const cuuint32_t box[] = {CUDA_K_BLOCK, BOX, 1}, steps[] = {1, 1, 1};
    alignas(64) CUtensorMap tensor; // as the driver wants it
    CUresult result =
        encode(&tensor, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, (void *)(uintptr_t)rows[0].activations,
               dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    static_assert(sizeof tensor == sizeof map->tensor, "a map holds one");
    memcpy(map->tensor, &tensor, sizeof tensor);
    return result == CUDA_SUCCESS;
}

} // namespace

extern "C" cudaError_t cuda_hopper_many_init(struct cuda_bucket *bucket, int sm_count)
{
    void *found = NULL;
    cudaDriverEntryPointQueryResult how;
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                         cudaEnableDefault, &how);
    if (error != cudaSuccess)
        return error;
    encode = (decltype(encode))found;
    bucket->many_map = found != NULL ? make_map : NULL;
    return bucket->tokens_max <= CUDA_SOME_TOKENS_MAX ? cuda_some_init(bucket, sm_count)
                                                      : init_tiles(bucket, sm_count);
}

extern "C" cudaError_t cuda_hopper_many_launch(const struct cuda_bucket *bucket,
                                               const struct cuda_table *table, bool overlaps,
                                               cudaStream_t stream)
{
    return bucket->tokens_max <= CUDA_SOME_TOKENS_MAX
               ? cuda_some_launch(bucket, table, overlaps, stream)
               : launch_tiles(bucket, table, overlaps, stream);
}
