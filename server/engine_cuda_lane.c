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
// What lies in memory that callers share goes the same ways, straight from there and to there:
//
//     host memory   fetched in pieces, or copied if it is large, to its room in the batch's memory on
//                   the device; outputs are written by the kernels, or copied if they are large
//     the device's  read and written where it lies
//
// Kernels do not read activations over the bus: each is read once for every tile of D.
//
// Threads: submit and poll on the scheduler's.
#include "engine_cuda_internal.h"

#include <stdlib.h>
#include <string.h>

#include "../kernels/attention.h"

enum {
    // The largest input, and output, of a small batch. Kernels that reach over the bus start at
    // once but are slower than a copy engine, which takes some 10 us to start and to be waited for:
    // 16 tokens of V4-Flash gain a third, 32 nothing for sure.
    SMALL_BYTES_MAX = 640 << 10,
    // Of a weight, what is warmed: every other piece, up to 16 MiB of them. More is not there in
    // time, and stands in the way of the rest.
    WARM_STEP_PIECES = 2,
    WARM_PIECES_MAX = (16 << 20) / CUDA_WARM_BYTES,
    // Of one tensor in registered memory, from which it has a copy of its own, which costs the host
    // 2 us and the copy engine more: below, warps fetch it and kernels write it, however many there
    // are of them in a batch.
    STAGED_COPY_BYTES_MIN = 256 << 10,
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
    lane->pieces_max = 2 * engine->segments_max + CUDA_FETCH_WARPS;
    void *mailbox = NULL, *table_host = NULL, *pieces = NULL;
    cudaError_t error = cudaStreamCreateWithFlags(&lane->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess)
        error = lane_open_events(lane);
    if (error == cudaSuccess)
        error = pinned_alloc(sizeof *lane->mailbox, (void **)&lane->mailbox, &mailbox);
    if (error == cudaSuccess)
        error = pinned_alloc(table_bytes, (void **)&lane->table, &table_host);
    if (error == cudaSuccess)
        error =
            pinned_alloc(lane->pieces_max * sizeof *lane->pieces, (void **)&lane->pieces, &pieces);
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
    lane->ends.pieces = pieces;
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
    cudaFreeHost(lane->pieces);
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

static bool lies_in(const struct buffer *buffer, const void *host)
{
    return (uintptr_t)host - (uintptr_t)buffer->host < buffer->bytes;
}

static uint64_t offset_in(const struct buffer *buffer, const void *host)
{
    ASSERT(lies_in(buffer, host));
    return (uint64_t)((const unsigned char *)host - buffer->host);
}

static void *twin_of(const struct buffer *buffer, const void *host)
{
    return buffer->device + offset_in(buffer, host);
}

static void *mapped_of(const struct buffer *buffer, const void *host)
{
    return buffer->mapped + offset_in(buffer, host);
}

// What one submit works with.
struct submission {
    const struct engine_batch *batch;
    const struct buffer *input, *output;
    uint32_t piece_bytes; // at most, so that all warps have a share and the pieces have room
};

static bool has_own_copy(const struct lane *lane, uint64_t bytes)
{
    return !lane->small && bytes >= STAGED_COPY_BYTES_MIN;
}

// From registered memory to the device.
static cudaError_t bring(struct engine *engine, struct lane *lane,
                         const struct submission *submission, const void *host, void *to,
                         uint64_t bytes)
{
    if (has_own_copy(lane, bytes))
        return cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, lane->stream);
    uint64_t from = (uintptr_t)engine_cuda_registered(engine, host);
    for (uint64_t done = 0; done < bytes; done += submission->piece_bytes) {
        uint64_t left = bytes - done;
        ASSERT(lane->pieces_n < lane->pieces_max);
        lane->pieces[lane->pieces_n++] = (struct cuda_piece){
            .from = from + done,
            .to = (uintptr_t)to + done,
            .bytes = left < submission->piece_bytes ? (uint32_t)left : submission->piece_bytes,
        };
    }
    return cudaSuccess;
}

static uint64_t input_bytes_of(const struct engine_segment *segment)
{
    const struct einsum_operand *operand = &segment->operand;
    uint32_t reduced_dim = segment->weight->cuda.format.reduced_dim;
    return operand->rotations
               ? attention_bytes(operand->tokens, operand->groups, reduced_dim)
               : einsum_activation_bytes(operand->tokens, operand->groups, reduced_dim);
}

static uint64_t scale_bytes_of(const struct engine_segment *segment)
{
    const struct einsum_operand *operand = &segment->operand;
    const struct einsum_weight_format *format = &segment->weight->cuda.format;
    return einsum_scale_bytes(operand->scale_layout, operand->scale_type, operand->tokens,
                              operand->groups, format->reduced_dim / format->block_r);
}

static uint64_t output_bytes_of(const struct engine_segment *segment)
{
    const struct einsum_operand *operand = &segment->operand;
    return einsum_output_bytes(operand->output_type, operand->tokens, operand->groups,
                               segment->weight->cuda.format.output_dim);
}

// Brings what lies in registered memory to its room in the batch's, where attention may be quantised.
static cudaError_t stage_input(struct engine *engine, struct lane *lane,
                               const struct submission *submission,
                               const struct engine_segment *segment, struct einsum_operand *operand)
{
    unsigned char *room = twin_of(submission->input, segment->staged_input);
    uint64_t bytes = input_bytes_of(segment);
    operand->activations = room;
    cudaError_t error = bring(engine, lane, submission, segment->operand.activations, room, bytes);
    if (operand->rotations) {
        operand->scales = room + segment->weight->cuda.format.reduced_dim; // behind the first row
        return error;
    }
    room += align_up(bytes, CACHE_LINE_BYTES);
    operand->scales = room;
    if (error == cudaSuccess)
        error =
            bring(engine, lane, submission, segment->operand.scales, room, scale_bytes_of(segment));
    return error;
}

// What is in no memory of ours is the device's already.
static cudaError_t place_input(struct engine *engine, struct lane *lane,
                               const struct submission *submission,
                               const struct engine_segment *segment, struct einsum_operand *operand)
{
    const struct buffer *input = submission->input;
    if (operand->rotations)
        operand->rotations = twin_of(input, operand->rotations);
    if (segment->staged_input)
        return stage_input(engine, lane, submission, segment, operand);
    if (lies_in(input, operand->activations)) {
        operand->activations = twin_of(input, operand->activations);
        operand->scales = twin_of(input, operand->scales);
    }
    return cudaSuccess;
}

static void *place_output(struct engine *engine, const struct lane *lane,
                          const struct submission *submission, const struct engine_segment *segment)
{
    const struct buffer *output = submission->output;
    void *to = segment->operand.output;
    if (segment->staged_output)
        return has_own_copy(lane, output_bytes_of(segment))
                   ? twin_of(output, segment->staged_output)
                   : engine_cuda_registered(engine, to);
    if (lies_in(output, to))
        return lane->small ? mapped_of(output, to) : twin_of(output, to);
    return to;
}

// Turns the segments' addresses into the device's, and brings there what is not copied with the
// batch.
static cudaError_t place_segments(struct engine *engine, struct lane *lane,
                                  const struct submission *submission)
{
    const struct engine_batch *batch = submission->batch;
    cudaError_t error = cudaSuccess;
    lane->pieces_n = 0;
    for (uint32_t i = 0; i < batch->segments_n && error == cudaSuccess; i++) {
        const struct engine_segment *segment = &batch->segments[i];
        lane->segments[i] = (struct cuda_segment){
            .weight = &segment->weight->cuda,
            .operand = segment->operand,
            .kernel = engine->kernels[segment->kernel],
        };
        struct einsum_operand *operand = &lane->segments[i].operand;
        error = place_input(engine, lane, submission, segment, operand);
        operand->output = place_output(engine, lane, submission, segment);
    }
    return error;
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
        .pieces = lane->pieces_n,
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

// All that comes to the device, but for what the graph fetches. A large batch's own input goes
// first: the copy starts while the rest is written.
static cudaError_t bring_in(struct engine *engine, struct lane *lane,
                            const struct submission *submission)
{
    uint64_t bytes = lane->small ? 0 : submission->batch->input_bytes;
    cudaError_t error = lane->small ? cudaSuccess : mark(lane, MARK_BEGIN);
    if (error == cudaSuccess && bytes > 0)
        error = cudaMemcpyAsync(submission->input->device, submission->input->host, bytes,
                                cudaMemcpyHostToDevice, lane->stream);
    if (error == cudaSuccess)
        error = place_segments(engine, lane, submission);
    if (error == cudaSuccess && !lane->small)
        error = mark(lane, MARK_COPIED_IN);
    return error;
}

static cudaError_t copy_to_host(const struct lane *lane, void *host, const void *device,
                                uint64_t bytes)
{
    return cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, lane->stream);
}

// Of a large batch.
static cudaError_t copy_out(const struct lane *lane, const struct submission *submission)
{
    const struct engine_batch *batch = submission->batch;
    const struct buffer *output = submission->output;
    cudaError_t error = mark(lane, MARK_COMPUTED);
    if (error == cudaSuccess && batch->output_bytes > 0)
        error = copy_to_host(lane, (void *)(uintptr_t)output->host, output->device,
                             batch->output_bytes);
    for (uint32_t i = 0; i < batch->segments_n && error == cudaSuccess; i++) {
        const struct engine_segment *segment = &batch->segments[i];
        uint64_t bytes = output_bytes_of(segment);
        if (segment->staged_output && has_own_copy(lane, bytes))
            error = copy_to_host(lane, segment->operand.output,
                                 twin_of(output, segment->staged_output), bytes);
    }
    if (error == cudaSuccess)
        error = mark(lane, MARK_COPIED_OUT);
    if (error == cudaSuccess)
        error = cudaEventRecord(lane->done, lane->stream);
    return error;
}

static cudaError_t enqueue(struct engine *engine, struct lane *lane,
                           const struct engine_batch *batch)
{
    const struct submission submission = {
        .batch = batch,
        .input = engine_cuda_buffer_of(engine, batch->input),
        .output = engine_cuda_buffer_of(engine, batch->output),
        .piece_bytes =
            (uint32_t)align_up(batch->input_staged / CUDA_FETCH_WARPS + 1, CUDA_FETCH_BYTES),
    };
    cudaError_t error = bring_in(engine, lane, &submission);
    if (error != cudaSuccess)
        return error;
    cuda_table_build(&engine->buckets[batch->bucket], lane->segments, batch->segments_n,
                     lane->sorted, lane->table);
    write_orders(engine, lane, submission.input, batch->input_bytes);
    cudaGraphExec_t graph = *graph_of(lane, batch->bucket, cuda_table_launches(lane->table));
    ASSERT(graph);
    error = cudaGraphLaunch(graph, lane->stream);
    atomic_fetch_add_explicit(&engine->graph_replays, 1, memory_order_relaxed);
    if (error == cudaSuccess && !lane->small)
        error = copy_out(lane, &submission);
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
    lane->small = batch->input_bytes + batch->input_staged <= SMALL_BYTES_MAX &&
                  batch->output_bytes + batch->output_staged <= SMALL_BYTES_MAX;
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
