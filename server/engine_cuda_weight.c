// Loads weights into the CUDA engine, chunk by chunk:
//
//     file --read--> staging, pinned --copy--> staging on the device --re-laid--> weight
//
// Threads: any; one weight at a time, under load_lock.
#include "engine_cuda_internal.h"

#include <inttypes.h>
#include <stdlib.h>

#include "../client/crc32c.h"

enum {
    STAGING_BYTES =
        8 << 20, // of a weight on its way in; two of them, so that reading and copying overlap
    STAGING_ROWS_MULTIPLE = 16,
};

enum status engine_cuda_staging_open(struct engine *engine, struct error *err)
{
    cudaError_t error = cudaStreamCreateWithFlags(&engine->load_stream, cudaStreamNonBlocking);
    for (size_t i = 0; i < ARRAY_LEN(engine->staging) && error == cudaSuccess; i++) {
        struct staging *staging = &engine->staging[i];
        error = cudaHostAlloc(&staging->host, STAGING_BYTES, cudaHostAllocPortable);
        if (error == cudaSuccess)
            error = cudaMalloc(&staging->device, STAGING_BYTES);
        if (error == cudaSuccess)
            error = cudaEventCreateWithFlags(&staging->taken, cudaEventDisableTiming);
    }
    return error == cudaSuccess ? STATUS_OK : engine_cuda_failed(error, "buffers for loading", err);
}

void engine_cuda_staging_close(struct engine *engine)
{
    for (size_t i = 0; i < ARRAY_LEN(engine->staging); i++) {
        cudaFreeHost(engine->staging[i].host);
        cudaFree(engine->staging[i].device);
        if (engine->staging[i].taken)
            cudaEventDestroy(engine->staging[i].taken);
    }
    if (engine->load_stream)
        cudaStreamDestroy(engine->load_stream);
}

// One chunk of rows: from the file to the staging buffer that is free, to the device, re-laid.
static enum status load_chunk(struct engine *engine, const struct engine_weight_source *source,
                              struct engine_weight *weight, uint64_t row, uint64_t rows,
                              uint64_t chunk, struct error *err)
{
    const struct einsum_weight_format *format = &source->format;
    struct staging *staging = &engine->staging[chunk % ARRAY_LEN(engine->staging)];
    uint64_t row_bytes =
        (uint64_t)format->reduced_dim * einsum_weight_element_bytes(format->weight_type);
    cudaError_t error = cudaEventSynchronize(staging->taken);
    if (error != cudaSuccess)
        return engine_cuda_failed(error, "loading a weight", err);
    enum status status =
        source->read_weight(source, row * row_bytes, staging->host, rows * row_bytes, err);
    if (status != STATUS_OK)
        return status;
    error = cudaMemcpyAsync(staging->device, staging->host, rows * row_bytes,
                            cudaMemcpyHostToDevice, engine->load_stream);
    if (error == cudaSuccess)
        error = cuda_relayout(&weight->cuda, staging->device, row, rows, engine->load_stream);
    atomic_fetch_add_explicit(&engine->eager_launches, 1, memory_order_relaxed);
    if (error == cudaSuccess)
        error = cudaEventRecord(staging->taken, engine->load_stream);
    if (error != cudaSuccess)
        return engine_cuda_failed(error, "loading a weight", err);
    if (source->progress)
        source->progress(source, rows * row_bytes);
    return STATUS_OK;
}

static enum status load_scales(struct engine *engine, const struct engine_weight_source *source,
                               struct engine_weight *weight, struct error *err)
{
    uint64_t bytes = einsum_weight_scale_bytes(&source->format);
    if (bytes == 0)
        return STATUS_OK;
    if (bytes > STAGING_BYTES)
        return error_set(err, STATUS_UNIMPLEMENTED,
                         "scales of %" PRIu64 " bytes, at most %d are supported", bytes,
                         STAGING_BYTES);
    struct staging *staging = &engine->staging[0];
    cudaError_t error = cudaStreamSynchronize(engine->load_stream);
    if (error != cudaSuccess)
        return engine_cuda_failed(error, "loading scales", err);
    enum status status = source->read_scales(source, staging->host, err);
    if (status != STATUS_OK)
        return status;
    error = cudaMemcpyAsync(staging->device, staging->host, bytes, cudaMemcpyHostToDevice,
                            engine->load_stream);
    if (error == cudaSuccess)
        error = cuda_relayout_scales(&weight->cuda, staging->device, engine->load_stream);
    atomic_fetch_add_explicit(&engine->eager_launches, 1, memory_order_relaxed);
    return error == cudaSuccess ? STATUS_OK : engine_cuda_failed(error, "loading scales", err);
}

// Whether weights lie twice, the second time for many tokens.
static bool has_many(const struct engine *engine)
{
    for (uint32_t i = 0; i < engine->buckets_n; i++)
        if (cuda_bucket_has_many(&engine->buckets[i]))
            return true;
    return false;
}

static enum status load_locked(struct engine *engine, const struct engine_weight_source *source,
                               struct engine_weight *weight, struct error *err)
{
    const struct einsum_weight_format *format = &source->format;
    cudaGetLastError(); // what this thread met before must not pass for a launch's of this load
    cudaError_t error = cuda_weight_init(&weight->cuda, format, has_many(engine),
                                         weight->cuda.memory, engine->load_stream);
    if (error != cudaSuccess)
        return engine_cuda_failed(error, "loading a weight", err);
    uint64_t row_bytes =
        (uint64_t)format->reduced_dim * einsum_weight_element_bytes(format->weight_type);
    uint64_t rows = (uint64_t)format->groups * format->output_dim;
    uint64_t rows_max = STAGING_BYTES / row_bytes / STAGING_ROWS_MULTIPLE * STAGING_ROWS_MULTIPLE;
    ASSERT(rows_max > 0);
    enum status status = STATUS_OK;
    uint64_t chunk = 0;
    for (uint64_t row = 0; row < rows && status == STATUS_OK; row += rows_max, chunk++)
        status = load_chunk(engine, source, weight, row,
                            rows - row < rows_max ? rows - row : rows_max, chunk, err);
    if (status == STATUS_OK)
        status = load_scales(engine, source, weight, err);
    // Resident before it is visible; and after a failure nothing may still write to what is freed.
    error = cudaStreamSynchronize(engine->load_stream);
    if (error != cudaSuccess && status == STATUS_OK)
        status = engine_cuda_failed(error, "loading a weight", err);
    return status;
}

enum status engine_cuda_weight_load(struct engine *engine,
                                    const struct engine_weight_source *source,
                                    struct engine_weight **out, struct error *err)
{
    if (source->format.reduced_dim > engine->reduced_dim_max)
        return error_field(err, STATUS_INVALID_ARGUMENT, "reduced_dim",
                           "the engine was opened for at most %u, got %u", engine->reduced_dim_max,
                           source->format.reduced_dim);
    struct engine_weight *weight = calloc(1, sizeof *weight);
    if (!weight)
        return engine_cuda_out_of_memory(err, "a weight");
    weight->bytes = cuda_weight_bytes(&source->format, has_many(engine));
    enum status status = STATUS_OK;
    cudaError_t error = cudaSetDevice(engine->device);
    if (error == cudaSuccess)
        error = cudaMalloc(&weight->cuda.memory, weight->bytes);
    if (error != cudaSuccess) {
        status = engine_cuda_failed(error, "memory for a weight on the device", err);
        goto free_weight;
    }
    pthread_mutex_lock(&engine->load_lock);
    status = load_locked(engine, source, weight, err);
    pthread_mutex_unlock(&engine->load_lock);
    if (status != STATUS_OK)
        goto free_memory;
    atomic_fetch_add(&engine->weights_n, 1);
    *out = weight;
    return STATUS_OK;

free_memory:
    cudaFree(weight->cuda.memory);
free_weight:
    free(weight);
    return status;
}

void engine_cuda_weight_free(struct engine *engine, struct engine_weight *weight)
{
    cudaSetDevice(engine->device);
    cudaFree(weight->cuda.memory);
    uint32_t held = atomic_fetch_sub(&engine->weights_n, 1);
    ASSERT(held > 0);
    free(weight);
}

uint64_t engine_cuda_weight_bytes(const struct engine_weight *weight)
{
    return weight->bytes;
}

// ---- what lies there

// By way of a buffer for loading: under load_lock, and with the stream at rest, nobody else uses it.
static cudaError_t sum_piece(struct engine *engine, const void *from, uint64_t bytes, uint32_t *crc)
{
    void *host = engine->staging[0].host;
    cudaError_t error =
        cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, engine->load_stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(engine->load_stream);
    if (error == cudaSuccess)
        *crc = crc32c_extend(*crc, host, bytes);
    return error;
}

enum status engine_cuda_weight_sum(struct engine *engine, const struct engine_weight *weight,
                                   uint64_t offset, uint64_t bytes, uint32_t *crc,
                                   struct error *err)
{
    ASSERT(offset <= weight->bytes && bytes <= weight->bytes - offset);
    pthread_mutex_lock(&engine->load_lock);
    cudaError_t error = cudaSetDevice(engine->device);
    while (error == cudaSuccess && bytes > 0) {
        uint64_t piece = bytes < STAGING_BYTES ? bytes : STAGING_BYTES;
        error = sum_piece(engine, (const uint8_t *)weight->cuda.memory + offset, piece, crc);
        offset += piece;
        bytes -= piece;
    }
    pthread_mutex_unlock(&engine->load_lock);
    return error == cudaSuccess ? STATUS_OK
                                : engine_cuda_failed(error, "reading a weight back", err);
}

// ---- what is to be checked

// What tells kernels apart within a bucket, for a weight that has all of its tokens.
static uint32_t kind_in(const struct cuda_bucket *bucket, const struct einsum_weight_format *format)
{
    enum cuda_kernel kernel =
        cuda_kernel_for(format, bucket->tokens_max, bucket->prefill_from, bucket->hopper_from);
    if (kernel != CUDA_KERNEL_HOPPER)
        return 1u << kernel;
    bool many = format->block_d == 128 && // which lie in tiles as well
                cuda_bucket_takes_many(bucket, format, format->groups, bucket->tokens_max);
    return many ? 1u << (10 + (bucket->many_rows < CUDA_MANY_ROWS))
                : 1u << (8 + (bucket->hopper_warps_k > 0));
}

// Every bucket's kernel, and each that a part of a batch may take in it: those that requests can name.
// With each weight once a kind, since kinds read it in orders of their own.
uint32_t engine_cuda_checks(const struct engine *engine, const struct einsum_weight_format *format,
                            struct engine_check checks[ENGINE_CHECKS_MAX])
{
    uint32_t n = 0, seen = 0;
    for (uint32_t b = 0; b < engine->buckets_n; b++) {
        const struct cuda_bucket *bucket = &engine->buckets[b];
        uint32_t kind = kind_in(bucket, format), tokens = bucket->tokens_max;
        bool known = seen & kind;
        seen |= kind;
        ASSERT(n + 2 + engine->info.kernels_n <= ENGINE_CHECKS_MAX);
        checks[n++] = (struct engine_check){.tokens = tokens, .once = known};
        checks[n++] = (struct engine_check){.tokens = tokens, .wide = true, .once = known};
        for (uint32_t kernel = 1; kernel <= engine->info.kernels_n; kernel++)
            checks[n++] = (struct engine_check){.tokens = tokens, .kernel = kernel, .once = true};
    }
    return n;
}
