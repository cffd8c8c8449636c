#include "projection.h"

#include <einsum/v1/einsum.pb-c.h>
#include <grpc/slice.h>
#include <stdlib.h>
#include <string.h>

#include "batch.h"
#include "config.h"
#include "digest.h"
#include "message.h"
#include "request.h"
#include "rope.h"
#include "service.h"

// ---- a request becomes a job

struct projection_bytes projection_bytes(const grpc_byte_buffer *message)
{
    if (!message)
        return (struct projection_bytes){0};
    ASSERT(message->type == GRPC_BB_RAW &&
           message->data.raw.compression == GRPC_COMPRESS_NONE); // core has inflated it
    return (struct projection_bytes){message->data.raw.slice_buffer.slices,
                                     message->data.raw.slice_buffer.count};
}

// A few positions at a time, so that they need no memory of their own.
NODISCARD static enum status fill_rotations(const struct projection *projection,
                                            struct projection_bytes bytes,
                                            struct attention_rotation *rotations, struct error *err)
{
    enum { POSITIONS_AT_A_TIME = 64 };
    uint32_t tokens = projection->job.operand.tokens;
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, bytes.slices, bytes.slices_n);
    wire_skip(&cursor, projection->positions.offset);
    for (uint32_t t = 0, n; t < tokens; t += n) {
        int64_t positions[POSITIONS_AT_A_TIME];
        n = tokens - t < POSITIONS_AT_A_TIME ? tokens - t : POSITIONS_AT_A_TIME;
        wire_take(&cursor, n * sizeof *positions, positions);
        enum status status =
            rope_rotations(projection->job.weight->rope, positions, n, rotations + t, err);
        if (status != STATUS_OK)
            return status;
    }
    return STATUS_OK;
}

NODISCARD static enum status fill(struct projection *projection, const grpc_byte_buffer *message,
                                  struct error *err)
{
    struct projection_bytes bytes = projection_bytes(message);
    // Batch memory is the daemon's to write; the operand calls it const since engines only read it.
    const struct einsum_operand *operand = &projection->job.operand;
    struct wire_range second = projection->activation_scales;
    if (projection->job.attention) {
        second = projection->positions;
        enum status status = fill_rotations(
            projection, bytes, (struct attention_rotation *)(uintptr_t)operand->rotations, err);
        if (status != STATUS_OK)
            return status;
    } else {
        wire_copy(bytes.slices, bytes.slices_n, second, (void *)(uintptr_t)operand->scales);
    }
    wire_copy(bytes.slices, bytes.slices_n, projection->activations,
              (void *)(uintptr_t)operand->activations);
    atomic_fetch_add_explicit(&call_context(projection->call)->copies.in_bytes,
                              projection->activations.bytes + second.bytes, memory_order_relaxed);
    return STATUS_OK;
}

// After this the scheduler may finish the job at any moment; or it failed, and the job is given up.
NODISCARD static enum status fill_and_commit(struct projection *projection,
                                             const grpc_byte_buffer *message, struct error *err)
{
    struct service_context *context = call_context(projection->call);
    enum status status =
        projection->placement.region
            ? placement_fill(&projection->placement, &projection->job, &context->copies, err)
            : fill(projection, message, err);
    if (status == STATUS_OK)
        batcher_commit(context->batcher, &projection->job);
    else
        batcher_abandon(context->batcher, &projection->job);
    return status;
}

bool projection_has_room(const struct projection *projection)
{
    return atomic_load_explicit(&projection->job.state, memory_order_acquire) == JOB_DECODING;
}

NODISCARD static enum status submit(struct projection *projection, grpc_byte_buffer *message,
                                    struct error *err)
{
    bool waits;
    projection->record.asked_ns = now_ns();
    call_hold(projection->call);
    enum status status = batcher_reserve_or_wait(call_context(projection->call)->batcher,
                                                 &projection->job, &waits, err);
    if (status == STATUS_OK && waits) {
        // on_room wakes this very thread, so it is not too late to keep the message
        if (!projection->placement.region)
            projection->message = grpc_byte_buffer_copy(message);
        return STATUS_OK;
    }
    if (status == STATUS_OK) {
        projection->record.room_ns = projection->record.asked_ns;
        status = fill_and_commit(projection, message, err);
    }
    if (status != STATUS_OK)
        call_unhold(projection->call);
    return status;
}

bool projection_continue(struct projection *projection)
{
    struct job *job = &projection->job;
    grpc_byte_buffer *message = projection->message;
    projection->message = NULL;
    projection->record.room_ns = now_ns();
    struct error err;
    enum status status;
    if (atomic_load_explicit(&job->cancelled, memory_order_relaxed)) {
        batcher_abandon(call_context(projection->call)->batcher, job);
        status = error_set(&err, STATUS_CANCELLED, "cancelled before launch");
    } else {
        status = fill_and_commit(projection, message, &err);
    }
    if (message)
        grpc_byte_buffer_destroy(message);
    if (status != STATUS_OK) // a job that was committed may be the scheduler's by now
        job->error = err;
    return status == STATUS_OK;
}

static uint64_t deadline_ns(const struct projection *projection)
{
    uint64_t given = call_deadline_ns(projection->call);
    uint64_t cap_ms = call_context(projection->call)->config->deadline_ms_max;
    uint64_t cap = projection->job.received_ns + cap_ms * 1000000u;
    return given < cap ? given : cap;
}

// Finds the region that the request names; none is needed without tokens.
NODISCARD static enum status place(struct projection *projection,
                                   const struct wire_request *request, struct error *err)
{
    struct service_context *context = call_context(projection->call);
    METRICS_ADD(context->metrics, shared, 1);
    if (!context->regions)
        return error_field(err, STATUS_FAILED_PRECONDITION, "shared",
                           "this server shares no memory (shared_memory_listen)");
    struct region *region =
        request->shared.region_bytes ? region_find(context->regions, request->shared.region) : NULL;
    if (!region)
        return error_field(err, STATUS_NOT_FOUND, "shared.region",
                           "no such region: never registered, or gone with its connection");
    return placement_set(&projection->placement, region, &request->shared, request->digest_only,
                         &projection->job, err);
}

enum status projection_start(struct projection *projection, const struct wire_request *request,
                             grpc_byte_buffer *message, bool *running, struct error *err)
{
    struct service_context *context = call_context(projection->call);
    *running = false;
    projection->request_id = projection->record.request_id = request->request_id;
    projection->digest_only = request->digest_only;
    bool attention = request->kind == WIRE_OUTPUT_PROJECT;
    projection->activations = attention ? request->attention : request->activations;
    projection->activation_scales = request->activation_scales;
    projection->positions = request->positions;
    projection->job.received_ns = projection->record.received_ns;
    projection->job.deadline_ns = deadline_ns(projection);
    projection->job.connection = call_connection(projection->call);
    enum status status = engine_kernel_find(context->engine_ops, context->engine, request->kernel,
                                            &projection->job.kernel, err);
    if (status == STATUS_OK)
        status = request_check(request, context->weights, context->config->request_tokens_max,
                               &projection->job, err);
    if (status != STATUS_OK)
        return status;
    if (request->shared.given) {
        status = place(projection, request, err);
    } else if (attention) {
        struct projection_bytes bytes = projection_bytes(message);
        status = request_check_positions(bytes.slices, bytes.slices_n, request->positions,
                                         projection->job.weight, err);
    }
    if (status == STATUS_OK && request->tokens > 0) {
        status = submit(projection, message, err);
        *running = status == STATUS_OK;
    }
    if (!*running)
        placement_drop(&projection->placement);
    if (status != STATUS_OK) {
        weight_unref(projection->job.weight);
        projection->job.weight = NULL;
    }
    return status;
}

// ---- a job becomes a response

static struct wire_response describe(const struct projection *projection, uint64_t output_bytes)
{
    const struct job *job = &projection->job;
    return (struct wire_response){
        .request_id = projection->request_id,
        .tokens = job->operand.tokens,
        .groups = job->operand.groups,
        .output_dim = job->weight->format.output_dim,
        .output_type = (int32_t)job->operand.output_type,
        .output_bytes = output_bytes,
        .batch_tokens = job->batch_tokens,
        .batch_bucket = job->batch_bucket,
        .batch_requests = job->batch_requests,
        .queue_ns = job->launched_ns - job->queued_ns,
        .run_ns = job->done_ns - job->launched_ns,
    };
}

static uint64_t output_bytes(const struct projection *projection)
{
    const struct einsum_operand *operand = &projection->job.operand;
    return einsum_output_bytes(operand->output_type, operand->tokens, operand->groups,
                               projection->job.weight->format.output_dim);
}

void projection_release(struct projection *projection)
{
    struct call *call = projection->call;
    struct job *job = &projection->job;
    if (atomic_load_explicit(&job->state, memory_order_relaxed) != JOB_IDLE) // not given up
        batcher_release(call_context(call)->batcher, job);
    if (projection->message) // the device was lost while it waited
        grpc_byte_buffer_destroy(projection->message);
    placement_drop(&projection->placement);
    weight_unref(projection->job.weight);
    if (projection->streamed)
        free(projection);
    call_unhold(call);
}

static void on_output_sent(void *argument)
{
    struct projection *projection = argument;
    // On one of gRPC's threads: pairs with job_advance where the output was lent.
    ASSERT(atomic_load_explicit(&projection->job.state, memory_order_acquire) == JOB_REPLYING);
    projection_release(projection);
}

static grpc_byte_buffer *respond_with_head(const struct projection *projection,
                                           const grpc_slice *output)
{
    uint8_t head[WIRE_RESPONSE_HEAD_BYTES_MAX];
    struct wire_response response = describe(projection, output ? GRPC_SLICE_LENGTH(*output) : 0);
    size_t head_bytes = wire_write_response_head(&response, projection->streamed, head);
    grpc_slice slices[2] = {grpc_slice_from_copied_buffer((const char *)head, head_bytes)};
    if (output)
        slices[1] = *output;
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, output ? 2 : 1);
    grpc_slice_unref(slices[0]);
    if (output)
        grpc_slice_unref(slices[1]);
    return message;
}

// Lends the output to gRPC, which releases the projection with it.
static grpc_byte_buffer *respond_with_output(struct projection *projection)
{
    job_advance(&projection->job, JOB_DONE, JOB_REPLYING);
    grpc_slice output =
        grpc_slice_new_with_user_data(projection->job.operand.output,
                                      (size_t)output_bytes(projection), on_output_sent, projection);
    return respond_with_head(projection, &output);
}

static grpc_byte_buffer *respond_with_digest(const struct projection *projection)
{
    const struct wire_response head = describe(projection, 0);
    struct digest computed;
    digest_compute(projection->job.operand.output_type, projection->job.operand.output,
                   (uint64_t)head.tokens * head.groups * head.output_dim, &computed);
    Einsum__V1__Digest digest = EINSUM__V1__DIGEST__INIT;
    digest.crc32 = computed.crc32;
    digest.elements = computed.elements;
    digest.nan_elements = computed.nan_elements;
    digest.sum = computed.sum;
    digest.abs_max = computed.abs_max;
    digest.head = computed.head;
    digest.n_head = computed.head_n;
    Einsum__V1__BatchInfo batch = EINSUM__V1__BATCH_INFO__INIT;
    batch.tokens = head.batch_tokens;
    batch.bucket = head.batch_bucket;
    batch.requests = head.batch_requests;
    batch.queue_ns = head.queue_ns;
    batch.run_ns = head.run_ns;
    Einsum__V1__EinsumResponse response = EINSUM__V1__EINSUM_RESPONSE__INIT;
    response.request_id = head.request_id;
    response.tokens = head.tokens;
    response.groups = head.groups;
    response.output_dim = head.output_dim;
    response.output_type = (Einsum__V1__OutputType)head.output_type;
    response.digest = &digest;
    response.batch = &batch;
    if (!projection->streamed)
        return message_pack(&response.base);
    Einsum__V1__EinsumStreamResponse streamed = EINSUM__V1__EINSUM_STREAM_RESPONSE__INIT;
    streamed.response = &response;
    return message_pack(&streamed.base);
}

// An output of its own, for when batches run short: callers that read slowly must not hold the
// buffers that everybody needs.
struct copy {
    _Atomic(struct service_context *) context; // stored last: hands the copy to gRPC's threads
    uint64_t bytes;
    unsigned char output[];
};

static void on_copy_sent(void *argument)
{
    struct copy *copy = argument;
    struct service_context *context = atomic_load_explicit(&copy->context, memory_order_acquire);
    atomic_fetch_sub_explicit(&context->copied_bytes, copy->bytes, memory_order_relaxed);
    free(copy);
}

// NULL: lend the batch's memory, since there is no need to copy, or copies have taken all the
// memory that they may.
static struct copy *copy_if_scarce(const struct projection *projection)
{
    struct service_context *context = call_context(projection->call);
    if (!batcher_scarce(context->batcher))
        return NULL;
    const struct config *config = context->config;
    uint64_t bytes = output_bytes(projection);
    uint64_t before =
        atomic_fetch_add_explicit(&context->copied_bytes, bytes, memory_order_relaxed);
    struct copy *copy = before + bytes <= config->batches * config->batch_output_bytes
                            ? malloc(sizeof *copy + bytes)
                            : NULL;
    if (!copy) {
        atomic_fetch_sub_explicit(&context->copied_bytes, bytes, memory_order_relaxed);
        return NULL;
    }
    copy->bytes = bytes;
    memcpy(copy->output, projection->job.operand.output, bytes);
    atomic_fetch_add_explicit(&context->copies.out_bytes, bytes, memory_order_relaxed);
    atomic_store_explicit(&copy->context, context, memory_order_release);
    return copy;
}

grpc_byte_buffer *projection_respond(struct projection *projection)
{
    grpc_byte_buffer *message;
    struct copy *copy;
    if (projection->digest_only) {
        message = respond_with_digest(projection);
    } else if (projection->placement.region) {
        placement_finish(&projection->placement, &projection->job,
                         &call_context(projection->call)->copies);
        message = respond_with_head(projection, NULL);
    } else if ((copy = copy_if_scarce(projection)) != NULL) {
        grpc_slice output =
            grpc_slice_new_with_user_data(copy->output, copy->bytes, on_copy_sent, copy);
        message = respond_with_head(projection, &output);
    } else {
        return respond_with_output(projection);
    }
    projection_release(projection);
    return message;
}

grpc_byte_buffer *projection_respond_empty(struct projection *projection)
{
    grpc_byte_buffer *message = projection->digest_only ? respond_with_digest(projection)
                                                        : respond_with_head(projection, NULL);
    weight_unref(projection->job.weight);
    projection->job.weight = NULL;
    return message;
}

grpc_byte_buffer *projection_respond_error(uint64_t request_id, const struct error *err)
{
    Einsum__V1__Error error = EINSUM__V1__ERROR__INIT;
    error.code = (int32_t)err->status;
    error.message = (char *)(uintptr_t)err->text;
    error.field = (char *)(uintptr_t)err->field;
    error.retry_after_ms = err->retry_after_ms;
    Einsum__V1__EinsumResponse response = EINSUM__V1__EINSUM_RESPONSE__INIT;
    response.request_id = request_id;
    Einsum__V1__EinsumStreamResponse streamed = EINSUM__V1__EINSUM_STREAM_RESPONSE__INIT;
    streamed.response = &response;
    streamed.error = &error;
    return message_pack(&streamed.base);
}
