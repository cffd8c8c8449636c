// A lane of the CUDA engine: a stream with captured graphs, for each bucket one for every set of
// kernels that a batch may need. What else differs from batch to batch (weights, layouts, where the
// tensors lie) travels with it, in the table that the graph's kernels read:
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
// tests/gpu/bus.cu measures these ways and others.
//
// Threads: submit and poll on the scheduler's.
#include "engine_cuda_internal.h"

#include <stdlib.h>
#include <string.h>

enum {
    // The largest input, and output, of a small batch. Kernels that reach over the bus start at
    // once but are slower than a copy engine, which takes some 10 us to start and to be waited for:
    // 16 tokens of V4-Flash gain a third, 32 nothing for sure.
    SMALL_BYTES_MAX = 640 << 10,
    // Of a weight, what is warmed: every other piece, up to 16 MiB of them. More is not there in
    // time, and stands in the way of the rest.
    WARM_STEP_PIECES = 2,
    WARM_PIECES_MAX = (16 << 20) / CUDA_WARM_BYTES,
    // How often a stream is asked whether the device still lives, while a report does not come.
    STREAM_CHECK_NS = 100000,
};

// ---- open

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
    table_bytes = align_up(table_bytes, CUDA_FETCH_BYTES);
    void *mailbox = NULL, *table_host = NULL;
    cudaError_t error = cudaStreamCreateWithFlags(&lane->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess)
        error = lane_open_events(lane);
    if (error == cudaSuccess)
        error = pinned_alloc(sizeof *lane->mailbox, (void **)&lane->mailbox, &mailbox);
    if (error == cudaSuccess)
        error = pinned_alloc(table_bytes, (void **)&lane->table, &table_host);
    if (error == cudaSuccess)
        error = cudaMalloc((void **)&lane->ends.table, table_bytes);
    if (error == cudaSuccess)
        error = cudaMalloc(&lane->workspace, workspace_bytes);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(lane->workspace, 0, workspace_bytes, lane->stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(lane->stream);
    if (error != cudaSuccess)
        return error;
    lane->ends.orders = ((const struct mailbox *)mailbox)->orders;
    lane->ends.report = &((struct mailbox *)mailbox)->report;
    lane->ends.table_host = table_host;
    return cudaSuccess;
}

enum status engine_cuda_lane_open(const struct engine *engine, struct lane *lane, struct error *err)
{
    lane->segments = calloc(engine->segments_max, sizeof *lane->segments);
    lane->sorted = calloc(engine->segments_max, sizeof *lane->sorted);
    lane->graphs = calloc((size_t)engine->buckets_n * CUDA_LAUNCH_SETS, sizeof *lane->graphs);
    if (!lane->graphs || !lane->segments || !lane->sorted)
        return engine_cuda_out_of_memory(err, "a lane");
    cudaError_t error = lane_open_device(engine, lane);
    return error == cudaSuccess ? STATUS_OK : engine_cuda_failed(error, "opening a lane", err);
}

void engine_cuda_lane_close(const struct engine *engine, struct lane *lane)
{
    for (uint32_t i = 0; lane->graphs && i < engine->buckets_n * CUDA_LAUNCH_SETS; i++)
        if (lane->graphs[i])
            cudaGraphExecDestroy(lane->graphs[i]);
    free(lane->graphs);
    free(lane->segments);
    free(lane->sorted);
    cudaFree(lane->ends.table);
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

static cudaGraphExec_t *graph_of(const struct lane *lane, uint32_t bucket, uint32_t launches)
{
    ASSERT(launches < CUDA_LAUNCH_SETS);
    return &lane->graphs[bucket * CUDA_LAUNCH_SETS + launches];
}

static cudaError_t launch_all(const struct cuda_bucket *bucket, const struct lane *lane,
                              uint32_t launches)
{
    cudaError_t error = cuda_fetch_launch(&lane->ends, lane->stream);
    if (error == cudaSuccess)
        error = cuda_launch(bucket, launches | CUDA_LAUNCH_WRITTEN, lane->ends.table,
                            lane->workspace, lane->stream);
    if (error == cudaSuccess)
        error = cuda_report_launch(&lane->ends, lane->stream);
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

cudaError_t engine_cuda_lane_capture(const struct engine *engine, struct lane *lane,
                                     uint32_t bucket, uint32_t *graphs_n)
{
    cudaError_t error = cudaSuccess;
    for (uint32_t set = 0; set < CUDA_LAUNCH_SETS && error == cudaSuccess; set++) {
        if (!cuda_bucket_can_launch(&engine->buckets[bucket], set))
            continue;
        error = capture(engine, lane, bucket, set);
        ++*graphs_n;
    }
    // Uploaded, so that it can be weighed.
    return error == cudaSuccess ? cudaStreamSynchronize(lane->stream) : error;
}

// ---- submit

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

// A small batch that is alone on the device finds a part of its weights in the cache: they are on
// their way while its input is, evenly from all of the first segment's weight, which is the only one
// more often than not. Beside other batches the memory has enough to do.
static void warm(const struct engine *engine, const struct lane *lane, struct cuda_order *order)
{
    for (uint32_t i = 0; i < engine->lanes_n; i++)
        if (engine->lanes[i].submitted && &engine->lanes[i] != lane)
            return;
    const struct cuda_segment *segment = &lane->segments[0];
    const struct einsum_weight_format *format = &segment->weight->format;
    uint64_t group_bytes = (uint64_t)format->output_dim * format->reduced_dim *
                           einsum_weight_element_bytes(format->weight_type);
    uint64_t pieces = segment->operand.groups * group_bytes / CUDA_WARM_BYTES;
    uint64_t step = (pieces + WARM_PIECES_MAX - 1) / WARM_PIECES_MAX;
    if (step < WARM_STEP_PIECES)
        step = WARM_STEP_PIECES;
    order->warm_from =
        (uintptr_t)(segment->weight->elements + segment->operand.group_begin * group_bytes);
    order->warm_pieces = (uint32_t)(pieces / step);
    order->warm_step_bytes = (uint32_t)(step * CUDA_WARM_BYTES);
}

static void write_orders(const struct engine *engine, struct lane *lane, const struct buffer *input,
                         uint64_t input_bytes)
{
    struct cuda_order *orders = lane->mailbox->orders;
    struct cuda_order order = {
        .input_from = (uintptr_t)input->mapped,
        .input_to = (uintptr_t)input->device,
        .table_bytes = align_up(cuda_table_used(lane->table), CUDA_FETCH_BYTES),
        .sequence = orders[0].sequence + 1,
    };
    if (lane->small) {
        order.input_bytes = align_up(input_bytes, 16);
        warm(engine, lane, &order);
    }
    for (uint32_t i = 0; i < CUDA_ORDERS; i++)
        orders[i] = order;
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
    const struct buffer *input = engine_cuda_buffer_of(engine, batch->input);
    const struct buffer *output = engine_cuda_buffer_of(engine, batch->output);
    cudaError_t error = cudaSuccess;
    if (!lane->small) // before the table is built, which takes as long as the copy's start
        error = copy_in(lane, input, batch->input_bytes);
    if (error != cudaSuccess)
        return error;
    place_segments(engine, lane, batch, input, output);
    cuda_table_build(&engine->buckets[batch->bucket], lane->segments, batch->segments_n,
                     lane->sorted, lane->table);
    write_orders(engine, lane, input, batch->input_bytes);
    cudaGraphExec_t graph = *graph_of(lane, batch->bucket, cuda_table_launches(lane->table));
    ASSERT(graph);
    error = cudaGraphLaunch(graph, lane->stream);
    atomic_fetch_add_explicit(&engine->graph_replays, 1, memory_order_relaxed);
    if (error == cudaSuccess && !lane->small)
        error = copy_out(lane, output, batch->output_bytes);
    return error;
}

void engine_cuda_submit(struct engine *engine, uint32_t index, const struct engine_batch *batch)
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

// ---- poll

static bool reported(const struct lane *lane)
{
    const struct mailbox *mailbox = lane->mailbox;
    return __atomic_load_n(&mailbox->report.sequence, __ATOMIC_ACQUIRE) ==
           mailbox->orders[0].sequence;
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

bool engine_cuda_poll(struct engine *engine, uint32_t index, struct engine_result *result)
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
