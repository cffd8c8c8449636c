// The engine that computes on one NVIDIA GPU, with the kernels of kernels/cuda: opening and closing
// it, and the memory of batches.
//
//     engine_cuda.c           open: device, buckets, then lanes and their graphs
//     engine_cuda_region.c    memory of others, in which operands may lie
//     engine_cuda_weight.c    loads weights
//     engine_cuda_lane.c      a lane: a stream, its captured graphs, the batch that runs on it
//
// Lanes overlap: one copies in while another computes and a third copies out. Nothing is compiled,
// captured or allocated once the engine is open, but for weights.
//
// Threads: submit and poll on the scheduler's, which polls in a loop while lanes are busy, so that
// nobody has to be woken; the rest on any.
#include "engine_cuda_internal.h"

#include <stdio.h>
#include <stdlib.h>

#include "log.h"

enum { LANES_DEFAULT = 3 }; // one copies in, one computes, one copies out

// ---- errors

enum status engine_cuda_failed(cudaError_t error, const char *what, struct error *err)
{
    enum status status =
        error == cudaErrorMemoryAllocation ? STATUS_RESOURCE_EXHAUSTED : STATUS_UNAVAILABLE;
    return error_set(err, status, "%s: %s", what, cudaGetErrorString(error));
}

enum status engine_cuda_out_of_memory(struct error *err, const char *what)
{
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory for %s", what);
}

// ---- kernels by name

// What a request may ask for.
static void list_kernels(struct engine *engine)
{
    static const struct {
        const char *name;
        enum cuda_kernel kernel;
        uint32_t launch;
    } known[] = {{"decode", CUDA_KERNEL_DECODE, CUDA_LAUNCH_DECODE},
                 {"prefill", CUDA_KERNEL_PREFILL, CUDA_LAUNCH_PREFILL},
                 {"hopper", CUDA_KERNEL_HOPPER, CUDA_LAUNCH_HOPPER}};
    struct engine_info *info = &engine->info;
    for (size_t i = 0; i < ARRAY_LEN(known); i++)
        if (cuda_bucket_can_launch(&engine->buckets[0], known[i].launch)) { // as all buckets
            info->kernels[info->kernels_n++] = known[i].name;
            engine->kernels[info->kernels_n] = known[i].kernel;
        }
}

// ---- memory of batches

const struct buffer *engine_cuda_buffer_of(const struct engine *engine, const void *host)
{
    uint32_t n = atomic_load_explicit(&engine->buffers_n, memory_order_acquire);
    for (uint32_t i = 0; i < n; i++)
        if (engine->buffers[i].host == host)
            return &engine->buffers[i];
    ASSERT(!"memory that this engine has not given out");
}

static enum status cuda_memory_alloc(struct engine *engine, uint64_t bytes, void **out,
                                     struct error *err)
{
    struct buffer buffer = {.bytes = bytes};
    void *host, *mapped = NULL, *device = NULL;
    enum status status = engine_host_memory_alloc(bytes, &host, err);
    if (status != STATUS_OK)
        return status;
    cudaError_t error = cudaSetDevice(engine->device);
    if (error == cudaSuccess)
        error = cudaHostRegister(host, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (error != cudaSuccess)
        goto free_host;
    error = cudaHostGetDevicePointer(&mapped, host, 0);
    if (error == cudaSuccess)
        error = cudaMalloc(&device, bytes);
    if (error != cudaSuccess)
        goto unregister_host;
    buffer.host = host;
    buffer.mapped = mapped;
    buffer.device = device;
    pthread_mutex_lock(&engine->buffers_lock);
    uint32_t n = atomic_load_explicit(&engine->buffers_n, memory_order_relaxed);
    ASSERT(n < ENGINE_CUDA_BUFFERS_MAX);
    engine->buffers[n] = buffer;
    atomic_store_explicit(&engine->buffers_n, n + 1, memory_order_release);
    pthread_mutex_unlock(&engine->buffers_lock);
    *out = host;
    return STATUS_OK;

unregister_host:
    cudaHostUnregister(host);
free_host:
    cudaGetLastError(); // running out of memory is not sticky
    engine_host_memory_free(host, bytes);
    return engine_cuda_failed(error, "pinned memory of a batch and its twin on the device", err);
}

static void cuda_memory_free(struct engine *engine, void *memory, uint64_t bytes)
{
    pthread_mutex_lock(&engine->buffers_lock);
    struct buffer *buffer = (struct buffer *)(uintptr_t)engine_cuda_buffer_of(engine, memory);
    ASSERT(buffer->bytes == bytes);
    cudaFree(buffer->device);
    cudaHostUnregister(memory);
    engine_host_memory_free(memory, bytes);
    uint32_t n = atomic_load_explicit(&engine->buffers_n, memory_order_relaxed);
    *buffer = engine->buffers[n - 1];
    atomic_store_explicit(&engine->buffers_n, n - 1, memory_order_release);
    pthread_mutex_unlock(&engine->buffers_lock);
}

// ---- open, close

static void close_all(struct engine *engine)
{
    cudaSetDevice(engine->device);
    for (uint32_t i = 0; engine->lanes && i < engine->lanes_n; i++)
        engine_cuda_lane_close(engine, &engine->lanes[i]);
    engine_cuda_staging_close(engine);
    ASSERT(engine->registered_n == 0);
    free(engine->registered);
    pthread_mutex_destroy(&engine->load_lock);
    pthread_mutex_destroy(&engine->registered_lock);
    pthread_mutex_destroy(&engine->buffers_lock);
    free(engine->lanes);
    free(engine->buckets);
    free(engine);
}

// Sentences for what can be wrong before anything is.
static const struct einsum_weight_format usual_weight = {.weight_type = EINSUM_WEIGHT_E4M3,
                                                         .scale_type = EINSUM_SCALE_UE8M0,
                                                         .block_d = 128,
                                                         .block_r = 128};

static enum status check_device(int device, const char *kernel, struct cudaDeviceProp *device_info,
                                struct cuda_choice *choice, struct error *err)
{
    int driver = 0, runtime = 0, devices = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0)
        return error_set(err, STATUS_FAILED_PRECONDITION, "no NVIDIA driver is installed");
    if (driver / 1000 < runtime / 1000)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "the NVIDIA driver supports CUDA %d.%d, this build needs %d.%d",
                         driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices <= device)
        return error_set(err, STATUS_FAILED_PRECONDITION, "no CUDA device: %s",
                         cudaGetErrorString(error));
    error = cudaGetDeviceProperties(device_info, device);
    if (error != cudaSuccess)
        return engine_cuda_failed(error, "reading the device's properties", err);
    *choice = cuda_dispatch(device_info->major, device_info->minor, &usual_weight,
                            EINSUM_SCALE_UE8M0, 1, kernel);
    if (choice->arm == CUDA_ARM_NONE && kernel)
        return error_set(err, STATUS_FAILED_PRECONDITION, "kernel \"%.64s\" on %s: %s", kernel,
                         device_info->name, choice->reason);
    if (choice->arm == CUDA_ARM_NONE)
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s cannot be used: %s",
                         device_info->name, choice->reason);
    return STATUS_OK;
}

// "portable-decode, hopper from 17 tokens: compute capability 9.0: ..."
static void describe_choice(const struct cudaDeviceProp *device_info, const char *kernel,
                            const struct cuda_choice *few, char text[ENGINE_KERNEL_TEXT])
{
    uint32_t from = few->arm == CUDA_ARM_HOPPER ? CUDA_HOPPER_TOKENS_MIN : CUDA_PREFILL_TOKENS_MIN;
    struct cuda_choice many = cuda_dispatch(device_info->major, device_info->minor, &usual_weight,
                                            EINSUM_SCALE_UE8M0, from, kernel);
    snprintf(text, ENGINE_KERNEL_TEXT, "%s, %s from %u tokens: %s", few->name, many.name, from,
             few->reason);
}

static enum status fill_buckets(struct engine *engine, const struct engine_options *options,
                                bool hopper, struct error *err)
{
    ASSERT(options->buckets_n <= ENGINE_BUCKETS_MAX);
    engine->buckets_n = options->buckets_n;
    engine->buckets = calloc(options->buckets_n, sizeof *engine->buckets);
    engine->lanes_n = options->lanes;
    engine->lanes = calloc(options->lanes, sizeof *engine->lanes);
    if (!engine->buckets || !engine->lanes)
        return engine_cuda_out_of_memory(err, "the engine");
    cudaError_t error = cudaSetDevice(engine->device);
    for (uint32_t i = 0; i < options->buckets_n && error == cudaSuccess; i++)
        error = cuda_bucket_init(&engine->buckets[i], options->buckets[i], hopper);
    return error == cudaSuccess ? STATUS_OK : engine_cuda_failed(error, "choosing kernels", err);
}

static uint64_t device_bytes_free(void)
{
    size_t free_bytes = 0, total_bytes = 0;
    return cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess ? free_bytes : 0;
}

// Since `before` bytes were free. The driver takes memory by the megabyte: who comes first pays for
// those that still fit.
static uint64_t device_bytes_taken(uint64_t before)
{
    uint64_t after = device_bytes_free();
    return before > after ? before - after : 0;
}

// A bucket's graphs, of every lane.
static cudaError_t capture_bucket(struct engine *engine, uint32_t bucket)
{
    cudaError_t error = cudaSuccess;
    for (uint32_t i = 0; i < engine->lanes_n && error == cudaSuccess; i++)
        error = engine_cuda_lane_capture(engine, &engine->lanes[i], bucket,
                                         &engine->info.bucket_graphs_n[bucket]);
    return error;
}

// Captures everything, bucket by bucket, and notes what memory each took.
static enum status capture_all(struct engine *engine, struct error *err)
{
    struct engine_info *info = &engine->info;
    uint64_t started_ns = now_ns();
    uint64_t graphs = 0;
    for (uint32_t i = 0; i < engine->buckets_n; i++) {
        uint64_t before = device_bytes_free();
        cudaError_t error = capture_bucket(engine, i);
        if (error != cudaSuccess)
            return engine_cuda_failed(error, "capturing the graphs", err);
        info->bucket_graphs_bytes[i] = device_bytes_taken(before);
        info->graphs_bytes += info->bucket_graphs_bytes[i];
        graphs += info->bucket_graphs_n[i];
        LOG(INFO, "bucket captured", LOG_U64("tokens", engine->buckets[i].tokens_max),
            LOG_U64("graphs", info->bucket_graphs_n[i]),
            LOG_U64("device_bytes", info->bucket_graphs_bytes[i]));
    }
    LOG(INFO, "graphs captured", LOG_U64("graphs", graphs),
        LOG_U64("device_bytes", info->graphs_bytes), LOG_U64("lanes_bytes", info->lanes_bytes),
        LOG_U64("ms", (now_ns() - started_ns) / 1000000u));
    return STATUS_OK;
}

static enum status open_device(struct engine *engine, const struct engine_options *options,
                               bool hopper, struct error *err)
{
    struct engine_info *info = &engine->info;
    enum status status = fill_buckets(engine, options, hopper, err);
    if (status != STATUS_OK)
        return status;
    list_kernels(engine);
    uint64_t before = device_bytes_free();
    status = engine_cuda_staging_open(engine, err);
    info->scratch_bytes = device_bytes_taken(before);
    before = device_bytes_free();
    for (uint32_t i = 0; i < engine->lanes_n && status == STATUS_OK; i++)
        status = engine_cuda_lane_open(engine, &engine->lanes[i], err);
    info->lanes_bytes = device_bytes_taken(before);
    return status == STATUS_OK ? capture_all(engine, err) : status;
}

static enum status cuda_open(const struct engine_options *options, struct engine **out,
                             struct error *err)
{
    struct cudaDeviceProp device_info;
    struct cuda_choice choice = {0};
    enum status status = check_device(0, options->kernel, &device_info, &choice, err);
    if (status != STATUS_OK)
        return status;
    struct engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return engine_cuda_out_of_memory(err, "the engine");
    engine->segments_max = options->batch_segments_max;
    engine->reduced_dim_max = options->reduced_dim_max;
    engine->phase_sample = options->phase_sample;
    pthread_mutex_init(&engine->load_lock, NULL);
    pthread_mutex_init(&engine->buffers_lock, NULL);
    pthread_mutex_init(&engine->registered_lock, NULL);
    snprintf(engine->info.device, sizeof engine->info.device, "%.80s, SM %d.%d, %d SMs, %.1f GiB",
             device_info.name, device_info.major, device_info.minor,
             device_info.multiProcessorCount, (double)device_info.totalGlobalMem / (1 << 30));
    describe_choice(&device_info, options->kernel, &choice, engine->info.kernel);
    snprintf(engine->info.pci_bus_id, sizeof engine->info.pci_bus_id, "%08x:%02x:%02x.0",
             (unsigned)device_info.pciDomainID, (unsigned)device_info.pciBusID,
             (unsigned)device_info.pciDeviceID);
    status = open_device(engine, options, choice.arm == CUDA_ARM_HOPPER, err);
    if (status != STATUS_OK) {
        close_all(engine);
        return status;
    }
    *out = engine;
    return STATUS_OK;
}

static void cuda_close(struct engine *engine)
{
    ASSERT(atomic_load(&engine->weights_n) == 0);
    for (uint32_t i = 0; i < engine->lanes_n; i++)
        ASSERT(!engine->lanes[i].submitted);
    close_all(engine);
}

static void cuda_describe(const struct engine *engine, struct engine_info *info)
{
    *info = engine->info;
    info->graph_replays = atomic_load_explicit(&engine->graph_replays, memory_order_relaxed);
    info->eager_launches = atomic_load_explicit(&engine->eager_launches, memory_order_relaxed);
}

static bool cuda_usable(void)
{
    int devices = 0;
    return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

const struct engine_ops engine_cuda = {
    .name = "cuda",
    .lanes_default = LANES_DEFAULT,
    .polled = true,
    .stages = true,
    .usable = cuda_usable,
    .open = cuda_open,
    .close = cuda_close,
    .describe = cuda_describe,
    .weight_load = engine_cuda_weight_load,
    .weight_free = engine_cuda_weight_free,
    .weight_bytes = engine_cuda_weight_bytes,
    .weight_sum = engine_cuda_weight_sum,
    .checks = engine_cuda_checks,
    .memory_alloc = cuda_memory_alloc,
    .memory_free = cuda_memory_free,
    .memory_register = engine_cuda_memory_register,
    .memory_unregister = engine_cuda_memory_unregister,
    .memory_import = engine_cuda_memory_import,
    .memory_forget = engine_cuda_memory_forget,
    .submit = engine_cuda_submit,
    .poll = engine_cuda_poll,
};