// The engine that computes on one NVIDIA GPU, with the kernels of kernels/cuda.
//
// A lane is a stream with captured graphs: for each bucket one for every set of kernels that a
// batch may need. What else differs from batch to batch (weights, layouts, where the tensors lie)
// travels with it, in the table that the graph's kernels read:
//
//     small   input, table ----.                                  .--> output, report (pinned)
//                              v                                  |
//     stream            graph [fetch -> ......... kernels -> report]
//
//     large   input ---.   table --.                              .--> output (pinned)
//                      v           v                              |
//     stream  [copy in] -> graph [fetch -> kernels -> report] -> [copy out] -> event
//
// The graph is the same. A small batch's fetch brings its input too, and its kernels write the
// outputs where the caller reads them, so that one launch is all that the host does and all that it
// waits for is a word in its own memory. A large one's copies are worth the copy engines' start-up.
//
// Lanes overlap: one copies in while another computes and a third copies out. Nothing is compiled,
// captured or allocated once the engine is open, but for weights.
//
// Threads: submit and poll on the scheduler's, which polls in a loop while lanes are busy, so that
// nobody has to be woken; the rest on any. Weights are loaded one at a time, under load_lock.
#include <cuda_runtime_api.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/cuda/cuda.h"
#include "engine.h"
#include "log.h"

enum {
    STAGING_BYTES =
        8 << 20, // of a weight on its way in; two of them, so that reading and copying overlap
    STAGING_ROWS_MULTIPLE = 16,
    LANES_DEFAULT = 3, // one copies in, one computes, one copies out
    BUFFERS_MAX = 256,
    // The largest input, and output, of a small batch. Kernels that reach over the bus start at once
    // but are slower than a copy engine, which takes some 4 us to start and to be waited for: 8
    // tokens of V4-Flash still gain.
    SMALL_BYTES_MAX = 320 << 10,
    // How often a stream is asked whether the device still lives, while a report does not come.
    STREAM_CHECK_NS = 100000,
};

// Host memory given out by memory_alloc, what the device calls it, and its twin on the device.
struct buffer {
    const unsigned char *host;
    unsigned char *mapped;
    unsigned char *device;
    uint64_t bytes;
};

// What host and device tell each other about a lane's batch. Pinned; a line for each writer.
struct mailbox {
    struct cuda_order order;
    struct cuda_report report;
};

// Events around the copies of a large batch whose phases are measured.
enum mark { MARK_BEGIN, MARK_COPIED_IN, MARK_COMPUTED, MARK_COPIED_OUT, MARKS_N };

struct lane {
    cudaStream_t stream;
    cudaEvent_t done;
    cudaEvent_t marks[MARKS_N];
    cudaGraphExec_t *graphs; // by bucket, then by the set of kernels; NULL where none can be needed
    struct mailbox *mailbox, *mailbox_device;
    struct cuda_table *table; // pinned
    void *table_mapped;       // the same, as the device calls it
    struct cuda_table *table_device;
    void *workspace;
    struct cuda_segment *segments; // batch_segments_max
    uint32_t *sorted;              // scratch of cuda_table_build
    bool submitted;
    bool small;         // waits for the report, not for `done`
    bool measured;      // its phases are
    cudaError_t failed; // of a call in submit
    uint64_t started_ns, check_at_ns;
};

struct staging {
    void *host, *device;
    cudaEvent_t taken; // the device has read `device`, and so `host`
};

struct engine {
    struct engine_info info;
    int device;
    uint32_t buckets_n;
    struct cuda_bucket *buckets;
    enum cuda_kernel kernels[1 + ENGINE_KERNELS_MAX]; // as segments number them
    uint32_t lanes_n;
    struct lane *lanes;
    uint32_t segments_max;
    uint32_t reduced_dim_max;
    uint32_t phase_sample;
    _Atomic uint64_t graph_replays;  // of batches, in all
    _Atomic uint64_t eager_launches; // of kernels outside of graphs, as loading does

    pthread_mutex_t buffers_lock; // guards the next two against another memory_alloc
    struct buffer buffers[BUFFERS_MAX];
    _Atomic uint32_t buffers_n; // grows before the first submit, shrinks after the last

    pthread_mutex_t load_lock; // guards all that follows
    cudaStream_t load_stream;
    struct staging staging[2];
    _Atomic uint32_t weights_n;
};

struct engine_weight {
    struct cuda_weight cuda;
    uint64_t bytes;
};

// ---- errors

// Memory runs out for one caller; anything else on a device that has worked so far is its end.
static enum status cuda_failed(cudaError_t error, const char *what, struct error *err)
{
    enum status status =
        error == cudaErrorMemoryAllocation ? STATUS_RESOURCE_EXHAUSTED : STATUS_UNAVAILABLE;
    return error_set(err, status, "%s: %s", what, cudaGetErrorString(error));
}

static enum status out_of_memory(struct error *err, const char *what)
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

// ---- batches

static const struct buffer *buffer_of(const struct engine *engine, const void *host)
{
    uint32_t n = atomic_load_explicit(&engine->buffers_n, memory_order_acquire);
    for (uint32_t i = 0; i < n; i++)
        if (engine->buffers[i].host == host)
            return &engine->buffers[i];
    ASSERT(!"memory that this engine has not given out");
}

static uint64_t offset_in(const struct buffer *buffer, const void *host)
{
    uint64_t offset = (uint64_t)((const unsigned char *)host - buffer->host);
    ASSERT(offset < buffer->bytes);
    return offset;
}

static void *twin_of(const struct buffer *buffer, const void *host)
{
    return buffer->device + offset_in(buffer, host);
}

static void *mapped_of(const struct buffer *buffer, const void *host)
{
    return buffer->mapped + offset_in(buffer, host);
}

// Turns the segments' host addresses into the device's.
static void place_segments(const struct engine *engine, struct lane *lane,
                           const struct engine_batch *batch, const struct buffer *input,
                           const struct buffer *output)
{
    for (uint32_t i = 0; i < batch->segments_n; i++) {
        const struct engine_segment *segment = &batch->segments[i];
        lane->segments[i] = (struct cuda_segment){
            .weight = &segment->weight->cuda,
            .operand = segment->operand,
            .kernel = engine->kernels[segment->kernel],
        };
        struct einsum_operand *operand = &lane->segments[i].operand;
        operand->activations = twin_of(input, operand->activations);
        operand->scales = twin_of(input, operand->scales);
        operand->output =
            lane->small ? mapped_of(output, operand->output) : twin_of(output, operand->output);
        if (operand->rotations)
            operand->rotations = twin_of(input, operand->rotations);
    }
}

static cudaGraphExec_t *graph_of(const struct lane *lane, uint32_t bucket, uint32_t launches)
{
    ASSERT(launches < CUDA_LAUNCH_SETS);
    return &lane->graphs[bucket * CUDA_LAUNCH_SETS + launches];
}

static void write_order(struct lane *lane, const struct buffer *input, uint64_t input_bytes)
{
    struct cuda_order *order = &lane->mailbox->order;
    *order = (struct cuda_order){
        .table_from = (uintptr_t)lane->table_mapped,
        .table_to = (uintptr_t)lane->table_device,
        .table_bytes = cuda_table_used(lane->table),
        .input_from = (uintptr_t)input->mapped,
        .input_to = (uintptr_t)input->device,
        .input_bytes = input_bytes,
        .sequence = order->sequence + 1,
    };
}

static cudaError_t mark(const struct lane *lane, enum mark which)
{
    return lane->measured ? cudaEventRecord(lane->marks[which], lane->stream) : cudaSuccess;
}

static cudaError_t copy_in(const struct lane *lane, const struct buffer *input, uint64_t bytes)
{
    cudaError_t error = mark(lane, MARK_BEGIN);
    if (error == cudaSuccess)
        error = cudaMemcpyAsync(input->device, input->host, bytes, cudaMemcpyHostToDevice,
                                lane->stream);
    if (error == cudaSuccess)
        error = mark(lane, MARK_COPIED_IN);
    return error;
}

static cudaError_t copy_out(const struct lane *lane, const struct buffer *output, uint64_t bytes)
{
    cudaError_t error = mark(lane, MARK_COMPUTED);
    if (error == cudaSuccess)
        error = cudaMemcpyAsync((void *)(uintptr_t)output->host, output->device, bytes,
                                cudaMemcpyDeviceToHost, lane->stream);
    if (error == cudaSuccess)
        error = mark(lane, MARK_COPIED_OUT);
    if (error == cudaSuccess)
        error = cudaEventRecord(lane->done, lane->stream);
    return error;
}

static cudaError_t enqueue(struct engine *engine, struct lane *lane,
                           const struct engine_batch *batch)
{
    const struct buffer *input = buffer_of(engine, batch->input);
    const struct buffer *output = buffer_of(engine, batch->output);
    cudaError_t error = cudaSuccess;
    if (!lane->small) // before the table is built, which takes as long as the copy's start
        error = copy_in(lane, input, batch->input_bytes);
    if (error != cudaSuccess)
        return error;
    place_segments(engine, lane, batch, input, output);
    cuda_table_build(&engine->buckets[batch->bucket], lane->segments, batch->segments_n,
                     lane->sorted, lane->table);
    write_order(lane, input, lane->small ? batch->input_bytes : 0);
    cudaGraphExec_t graph = *graph_of(lane, batch->bucket, cuda_table_launches(lane->table));
    ASSERT(graph);
    error = cudaGraphLaunch(graph, lane->stream);
    atomic_fetch_add_explicit(&engine->graph_replays, 1, memory_order_relaxed);
    if (error == cudaSuccess && !lane->small)
        error = copy_out(lane, output, batch->output_bytes);
    return error;
}

static void cuda_submit(struct engine *engine, uint32_t index, const struct engine_batch *batch)
{
    ASSERT(index < engine->lanes_n);
    struct lane *lane = &engine->lanes[index];
    ASSERT(!lane->submitted);
    lane->submitted = true;
    lane->started_ns = now_ns();
    lane->check_at_ns = lane->started_ns + STREAM_CHECK_NS;
    lane->small = batch->input_bytes <= SMALL_BYTES_MAX && batch->output_bytes <= SMALL_BYTES_MAX;
    uint64_t replays = atomic_load_explicit(&engine->graph_replays, memory_order_relaxed);
    lane->measured = engine->phase_sample > 0 && replays % engine->phase_sample == 0;
    lane->failed = enqueue(engine, lane, batch);
}

static bool reported(const struct lane *lane)
{
    const struct mailbox *mailbox = lane->mailbox;
    return __atomic_load_n(&mailbox->report.sequence, __ATOMIC_ACQUIRE) == mailbox->order.sequence;
}

static cudaError_t lane_state(struct lane *lane)
{
    if (lane->failed != cudaSuccess)
        return lane->failed;
    if (!lane->small)
        return cudaEventQuery(lane->done);
    if (reported(lane))
        return cudaSuccess;
    uint64_t now = now_ns();
    if (now < lane->check_at_ns)
        return cudaErrorNotReady;
    lane->check_at_ns = now + STREAM_CHECK_NS;
    return cudaStreamQuery(lane->stream);
}

// The device's clock may be set back.
static uint64_t since_ns(uint64_t begun_ns, uint64_t ended_ns)
{
    return ended_ns > begun_ns ? ended_ns - begun_ns : 0;
}

static uint64_t between_ns(const struct lane *lane, enum mark from, enum mark to)
{
    float ms = 0;
    cudaError_t error = cudaEventElapsedTime(&ms, lane->marks[from], lane->marks[to]);
    return error == cudaSuccess && ms > 0 ? (uint64_t)((double)ms * 1e6) : 0;
}

// As the lane's stream saw them: with the other lanes in its way.
static void measure_phases(const struct lane *lane, struct engine_result *result)
{
    result->copy_in_ns = result->kernel_ns = result->copy_out_ns = 0;
    if (!lane->measured)
        return;
    if (!lane->small) {
        result->copy_in_ns = between_ns(lane, MARK_BEGIN, MARK_COPIED_IN);
        result->kernel_ns = between_ns(lane, MARK_COPIED_IN, MARK_COMPUTED);
        result->copy_out_ns = between_ns(lane, MARK_COMPUTED, MARK_COPIED_OUT);
        return;
    }
    // The kernels' own writing is the copy out.
    const struct cuda_report *report = &lane->mailbox->report;
    result->copy_in_ns = since_ns(report->begun_ns, report->fetched_ns);
    result->kernel_ns = since_ns(report->fetched_ns, report->computed_ns);
}

static bool cuda_poll(struct engine *engine, uint32_t index, struct engine_result *result)
{
    struct lane *lane = &engine->lanes[index];
    if (!lane->submitted)
        return false;
    cudaError_t error = lane_state(lane);
    if (error == cudaErrorNotReady)
        return false;
    lane->submitted = false;
    result->started_ns = lane->started_ns;
    result->ended_ns = now_ns();
    result->status = STATUS_OK;
    if (error == cudaSuccess)
        measure_phases(lane, result);
    else // sticky, all of them: nothing that this context computes can be trusted
        result->status = error_set(&result->error, STATUS_UNAVAILABLE, "the device is lost: %s",
                                   cudaGetErrorString(error));
    return true;
}

// ---- weights

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
        return cuda_failed(error, "loading a weight", err);
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
        return cuda_failed(error, "loading a weight", err);
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
        return cuda_failed(error, "loading scales", err);
    enum status status = source->read_scales(source, staging->host, err);
    if (status != STATUS_OK)
        return status;
    error = cudaMemcpyAsync(staging->device, staging->host, bytes, cudaMemcpyHostToDevice,
                            engine->load_stream);
    if (error == cudaSuccess)
        error = cuda_relayout_scales(&weight->cuda, staging->device, engine->load_stream);
    atomic_fetch_add_explicit(&engine->eager_launches, 1, memory_order_relaxed);
    return error == cudaSuccess ? STATUS_OK : cuda_failed(error, "loading scales", err);
}

static enum status load_locked(struct engine *engine, const struct engine_weight_source *source,
                               struct engine_weight *weight, struct error *err)
{
    const struct einsum_weight_format *format = &source->format;
    cudaGetLastError(); // what this thread met before must not pass for a launch's of this load
    cudaError_t error =
        cuda_weight_init(&weight->cuda, format, weight->cuda.memory, engine->load_stream);
    if (error != cudaSuccess)
        return cuda_failed(error, "loading a weight", err);
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
        status = cuda_failed(error, "loading a weight", err);
    return status;
}

static enum status cuda_weight_load(struct engine *engine,
                                    const struct engine_weight_source *source,
                                    struct engine_weight **out, struct error *err)
{
    if (source->format.reduced_dim > engine->reduced_dim_max)
        return error_field(err, STATUS_INVALID_ARGUMENT, "reduced_dim",
                           "the engine was opened for at most %u, got %u", engine->reduced_dim_max,
                           source->format.reduced_dim);
    struct engine_weight *weight = calloc(1, sizeof *weight);
    if (!weight)
        return out_of_memory(err, "a weight");
    weight->bytes = cuda_weight_bytes(&source->format);
    enum status status = STATUS_OK;
    cudaError_t error = cudaSetDevice(engine->device);
    if (error == cudaSuccess)
        error = cudaMalloc(&weight->cuda.memory, weight->bytes);
    if (error != cudaSuccess) {
        status = cuda_failed(error, "memory for a weight on the device", err);
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

static void cuda_weight_free(struct engine *engine, struct engine_weight *weight)
{
    cudaSetDevice(engine->device);
    cudaFree(weight->cuda.memory);
    uint32_t held = atomic_fetch_sub(&engine->weights_n, 1);
    ASSERT(held > 0);
    free(weight);
}

static uint64_t cuda_weight_bytes_held(const struct engine_weight *weight)
{
    return weight->bytes;
}

// ---- memory of batches

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
    ASSERT(n < BUFFERS_MAX);
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
    return cuda_failed(error, "pinned memory of a batch and its twin on the device", err);
}

static void cuda_memory_free(struct engine *engine, void *memory, uint64_t bytes)
{
    pthread_mutex_lock(&engine->buffers_lock);
    struct buffer *buffer = (struct buffer *)(uintptr_t)buffer_of(engine, memory);
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

static void lane_close(const struct engine *engine, struct lane *lane)
{
    for (uint32_t i = 0; lane->graphs && i < engine->buckets_n * CUDA_LAUNCH_SETS; i++)
        if (lane->graphs[i])
            cudaGraphExecDestroy(lane->graphs[i]);
    free(lane->graphs);
    free(lane->segments);
    free(lane->sorted);
    cudaFree(lane->table_device);
    cudaFree(lane->workspace);
    cudaFreeHost(lane->table);
    cudaFreeHost(lane->mailbox);
    for (size_t i = 0; i < ARRAY_LEN(lane->marks); i++)
        if (lane->marks[i])
            cudaEventDestroy(lane->marks[i]);
    if (lane->done)
        cudaEventDestroy(lane->done);
    if (lane->stream)
        cudaStreamDestroy(lane->stream);
}

static cudaError_t launch_all(const struct cuda_bucket *bucket, const struct lane *lane,
                              uint32_t launches)
{
    const struct cuda_order *order = &lane->mailbox_device->order;
    struct cuda_report *report = &lane->mailbox_device->report;
    cudaError_t error = cuda_fetch_launch(order, report, lane->stream);
    if (error == cudaSuccess)
        error = cuda_launch(bucket, launches | CUDA_LAUNCH_WRITTEN, lane->table_device,
                            lane->workspace, lane->stream);
    if (error == cudaSuccess)
        error = cuda_report_launch(order, report, lane->stream);
    return error;
}

// Captures one set of a bucket's kernels on a lane. All addresses are the lane's; what they hold is
// not read before a batch has written it.
static cudaError_t capture(const struct engine *engine, struct lane *lane, uint32_t bucket,
                           uint32_t launches)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t *exec = graph_of(lane, bucket, launches);
    cudaError_t error = cudaStreamBeginCapture(lane->stream, cudaStreamCaptureModeThreadLocal);
    if (error != cudaSuccess)
        return error;
    cudaError_t launched = launch_all(&engine->buckets[bucket], lane, launches);
    error = cudaStreamEndCapture(lane->stream, &graph);
    if (launched != cudaSuccess)
        error = launched;
    if (error == cudaSuccess)
        error = cudaGraphInstantiate(exec, graph, 0);
    if (error == cudaSuccess)
        error = cudaGraphUpload(*exec, lane->stream);
    if (graph)
        cudaGraphDestroy(graph);
    return error;
}

// Pinned memory, and what the device calls it.
static cudaError_t pinned_alloc(uint64_t bytes, void **host, void **mapped)
{
    cudaError_t error = cudaHostAlloc(host, bytes, cudaHostAllocMapped);
    if (error != cudaSuccess)
        return error;
    memset(*host, 0, bytes);
    return cudaHostGetDevicePointer(mapped, *host, 0);
}

static cudaError_t lane_open_events(struct lane *lane)
{
    cudaError_t error = cudaEventCreateWithFlags(&lane->done, cudaEventDisableTiming);
    for (size_t i = 0; i < ARRAY_LEN(lane->marks) && error == cudaSuccess; i++)
        error = cudaEventCreate(&lane->marks[i]);
    return error;
}

static cudaError_t lane_open_device(const struct engine *engine, struct lane *lane)
{
    uint64_t table_bytes = 0, workspace_bytes = 0;
    for (uint32_t i = 0; i < engine->buckets_n; i++) {
        uint64_t table = cuda_table_bytes(&engine->buckets[i], engine->segments_max);
        uint64_t workspace = cuda_workspace_bytes(&engine->buckets[i]);
        table_bytes = table > table_bytes ? table : table_bytes;
        workspace_bytes = workspace > workspace_bytes ? workspace : workspace_bytes;
    }
    table_bytes = align_up(table_bytes, 16); // as it is fetched
    cudaError_t error = cudaStreamCreateWithFlags(&lane->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess)
        error = lane_open_events(lane);
    if (error == cudaSuccess)
        error = pinned_alloc(sizeof *lane->mailbox, (void **)&lane->mailbox,
                             (void **)&lane->mailbox_device);
    if (error == cudaSuccess)
        error = pinned_alloc(table_bytes, (void **)&lane->table, &lane->table_mapped);
    if (error == cudaSuccess)
        error = cudaMalloc((void **)&lane->table_device, table_bytes);
    if (error == cudaSuccess)
        error = cudaMalloc(&lane->workspace, workspace_bytes);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(lane->workspace, 0, workspace_bytes, lane->stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(lane->stream);
    return error;
}

static enum status lane_open(const struct engine *engine, struct lane *lane, struct error *err)
{
    lane->segments = calloc(engine->segments_max, sizeof *lane->segments);
    lane->sorted = calloc(engine->segments_max, sizeof *lane->sorted);
    lane->graphs = calloc((size_t)engine->buckets_n * CUDA_LAUNCH_SETS, sizeof *lane->graphs);
    if (!lane->graphs || !lane->segments || !lane->sorted)
        return out_of_memory(err, "a lane");
    cudaError_t error = lane_open_device(engine, lane);
    return error == cudaSuccess ? STATUS_OK : cuda_failed(error, "opening a lane", err);
}

// A bucket's graphs, of every lane.
static cudaError_t capture_bucket(struct engine *engine, uint32_t bucket)
{
    cudaError_t error = cudaSuccess;
    for (uint32_t i = 0; i < engine->lanes_n && error == cudaSuccess; i++) {
        struct lane *lane = &engine->lanes[i];
        for (uint32_t set = 0; set < CUDA_LAUNCH_SETS && error == cudaSuccess; set++) {
            if (!cuda_bucket_can_launch(&engine->buckets[bucket], set))
                continue;
            error = capture(engine, lane, bucket, set);
            engine->info.bucket_graphs_n[bucket]++;
        }
        if (error == cudaSuccess)
            error = cudaStreamSynchronize(lane->stream); // uploaded, so that it can be weighed
    }
    return error;
}

static enum status staging_open(struct engine *engine, struct error *err)
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
    return error == cudaSuccess ? STATUS_OK : cuda_failed(error, "buffers for loading", err);
}

static void close_all(struct engine *engine)
{
    cudaSetDevice(engine->device);
    for (uint32_t i = 0; engine->lanes && i < engine->lanes_n; i++)
        lane_close(engine, &engine->lanes[i]);
    for (size_t i = 0; i < ARRAY_LEN(engine->staging); i++) {
        cudaFreeHost(engine->staging[i].host);
        cudaFree(engine->staging[i].device);
        if (engine->staging[i].taken)
            cudaEventDestroy(engine->staging[i].taken);
    }
    if (engine->load_stream)
        cudaStreamDestroy(engine->load_stream);
    pthread_mutex_destroy(&engine->load_lock);
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
        return cuda_failed(error, "reading the device's properties", err);
    *choice = cuda_dispatch(device_info->major, device_info->minor, &usual_weight,
                            EINSUM_SCALE_UE8M0, 1, kernel);
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
        return out_of_memory(err, "the engine");
    cudaError_t error = cudaSetDevice(engine->device);
    for (uint32_t i = 0; i < options->buckets_n && error == cudaSuccess; i++)
        error = cuda_bucket_init(&engine->buckets[i], options->buckets[i], hopper);
    return error == cudaSuccess ? STATUS_OK : cuda_failed(error, "choosing kernels", err);
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
            return cuda_failed(error, "capturing the graphs", err);
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
    status = staging_open(engine, err);
    info->scratch_bytes = device_bytes_taken(before);
    before = device_bytes_free();
    for (uint32_t i = 0; i < engine->lanes_n && status == STATUS_OK; i++)
        status = lane_open(engine, &engine->lanes[i], err);
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
        return out_of_memory(err, "the engine");
    engine->segments_max = options->batch_segments_max;
    engine->reduced_dim_max = options->reduced_dim_max;
    engine->phase_sample = options->phase_sample;
    pthread_mutex_init(&engine->load_lock, NULL);
    pthread_mutex_init(&engine->buffers_lock, NULL);
    snprintf(engine->info.device, sizeof engine->info.device, "%.80s, SM %d.%d, %d SMs, %.1f GiB",
             device_info.name, device_info.major, device_info.minor,
             device_info.multiProcessorCount, (double)device_info.totalGlobalMem / (1 << 30));
    describe_choice(&device_info, options->kernel, &choice, engine->info.kernel);
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
    .usable = cuda_usable,
    .open = cuda_open,
    .close = cuda_close,
    .describe = cuda_describe,
    .weight_load = cuda_weight_load,
    .weight_free = cuda_weight_free,
    .weight_bytes = cuda_weight_bytes_held,
    .memory_alloc = cuda_memory_alloc,
    .memory_free = cuda_memory_free,
    .submit = cuda_submit,
    .poll = cuda_poll,
};
