#include "projection.h"

#include <einsum/v1/einsum.pb-c.h>
#include <grpc/slice.h>
#include <grpc/slice_buffer.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "../client/crc32c.h"
#include "batch.h"
#include "checksum.h"
#include "config.h"
#include "digest.h"
#include "message.h"
#include "nan.h"
#include "request.h"
#include "rope.h"
#include "service.h"

static uint64_t output_bytes(const struct projection *projection)
{
    const struct einsum_operand *operand = &projection->job.operand;
    return einsum_output_bytes(operand->output_type, operand->tokens, operand->groups,
                               projection->job.weight->format.output_dim);
}

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
NODISCARD static enum status fill_rotations(const struct job *job, struct projection_bytes bytes,
                                            uint64_t offset, struct error *err)
{
    enum { POSITIONS_AT_A_TIME = 64 };
    // Batch memory is the daemon's to write; the operand calls it const since engines only read it.
    struct attention_rotation *rotations = (void *)(uintptr_t)job->operand.rotations;
    uint32_t tokens = job->operand.tokens;
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, bytes.slices, bytes.slices_n);
    wire_skip(&cursor, offset);
    for (uint32_t t = 0, n; t < tokens; t += n) {
        int64_t positions[POSITIONS_AT_A_TIME];
        n = tokens - t < POSITIONS_AT_A_TIME ? tokens - t : POSITIONS_AT_A_TIME;
        wire_take(&cursor, n * sizeof *positions, positions);
        enum status status = rope_rotations(job->weight->rope, positions, n, rotations + t, err);
        if (status != STATUS_OK)
            return status;
    }
    return STATUS_OK;
}

// `offset`: of the whole tensor.
static void copy_runs(struct projection_bytes bytes, uint64_t offset, const struct job_runs *runs,
                      const void *to)
{
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, bytes.slices, bytes.slices_n);
    wire_skip(&cursor, offset + runs->offset);
    for (uint32_t i = 0; i < runs->n; i++) {
        if (i > 0)
            wire_skip(&cursor, runs->from_stride - runs->bytes);
        wire_take(&cursor, runs->bytes, (uint8_t *)(uintptr_t)to + i * runs->to_stride);
    }
}

// `job`: the projection's, or a part of it.
NODISCARD static enum status fill(struct projection *projection, const struct job *job,
                                  const grpc_byte_buffer *message, struct error *err)
{
    struct copy_counters *copies = &call_context(projection->call)->copies;
    if (projection->placement.region)
        return placement_fill(&projection->placement, job, copies, err);
    struct projection_bytes bytes = projection_bytes(message);
    const struct job_runs rows = job_activation_runs(job), second = job_scale_runs(job);
    if (job->attention) {
        enum status status =
            fill_rotations(job, bytes, projection->positions.offset + second.offset, err);
        if (status != STATUS_OK)
            return status;
    } else {
        copy_runs(bytes, projection->activation_scales.offset, &second, job->operand.scales);
    }
    copy_runs(bytes, projection->activations.offset, &rows, job->operand.activations);
    atomic_fetch_add_explicit(&copies->in_bytes, rows.n * rows.bytes + second.n * second.bytes,
                              memory_order_relaxed);
    return STATUS_OK;
}

// After this the scheduler may finish the job at any moment; or it failed, and the job is given up.
NODISCARD static enum status fill_and_commit(struct projection *projection,
                                             const grpc_byte_buffer *message, struct error *err)
{
    struct service_context *context = call_context(projection->call);
    enum status status = fill(projection, &projection->job, message, err);
    if (status == STATUS_OK)
        batcher_commit(context->batcher, &projection->job);
    else
        batcher_abandon(context->batcher, &projection->job);
    return status;
}

// Keeps the message for later. What wakes the owner then wakes this very thread: it is not too late.
static void keep(struct projection *projection, grpc_byte_buffer *message)
{
    if (!projection->placement.region)
        projection->message = grpc_byte_buffer_copy(message);
}

static void drop_message(struct projection *projection)
{
    if (projection->message)
        grpc_byte_buffer_destroy(projection->message);
    projection->message = NULL;
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
        keep(projection, message);
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

// ---- a request becomes a job for each of its parts

NODISCARD static enum status fill_part(struct job *whole, const struct job *part, struct error *err)
{
    struct projection *projection = CONTAINER_OF(whole, struct projection, job);
    return fill(projection, part, projection->message, err);
}

static void look_at_part(struct job *whole, const struct job *part)
{
    const struct projection *projection = CONTAINER_OF(whole, struct projection, job);
    nan_look(call_context(projection->call), part, &projection->placement);
}

// Counts what the request holds until it is answered: its message, and its output, which may have to be
// copied out at any moment.
NODISCARD static enum status admit(struct projection *projection, const grpc_byte_buffer *message,
                                   struct error *err)
{
    struct service_context *context = call_context(projection->call);
    const struct job *job = &projection->job;
    uint64_t bytes = 0;
    if (!job->output_given)
        bytes = output_bytes(projection);
    if (!projection->placement.region) {
        struct projection_bytes slices = projection_bytes(message);
        bytes += wire_bytes(slices.slices, slices.slices_n);
    }
    uint64_t before = atomic_fetch_add_explicit(&context->cut_bytes, bytes, memory_order_relaxed);
    projection->cut_bytes = bytes;
    if (before == 0 || before + bytes <= context->config->cut_bytes_max) // one may be any size
        return STATUS_OK;
    error_set(err, STATUS_RESOURCE_EXHAUSTED,
              "requests of more tokens than a batch hold %" PRIu64 " bytes, and %" PRIu64
              " more are too many (cut_bytes_max)",
              before, bytes);
    err->retry_after_ms = batcher_retry_ms(context->batcher);
    return err->status;
}

static void unadmit(struct projection *projection)
{
    atomic_fetch_sub_explicit(&call_context(projection->call)->cut_bytes, projection->cut_bytes,
                              memory_order_relaxed);
    projection->cut_bytes = 0;
}

NODISCARD static enum status submit_cut(struct projection *projection, grpc_byte_buffer *message,
                                        struct batcher_cut at, struct error *err)
{
    struct service_context *context = call_context(projection->call);
    const struct cut_options options = {
        .batcher = context->batcher,
        .whole = &projection->job,
        .placement = &projection->placement,
        .copies = &context->copies,
        .fill = fill_part,
        .look = look_at_part,
    };
    enum status status = admit(projection, message, err);
    if (status == STATUS_OK) {
        call_hold(projection->call);
        keep(projection, message);
        projection->record.asked_ns = projection->record.room_ns = now_ns(); // unless it waits
        status = cut_begin(&options, at, &projection->cut, err);
        if (status != STATUS_OK)
            call_unhold(projection->call);
    }
    if (status != STATUS_OK) {
        drop_message(projection);
        unadmit(projection);
    }
    return status;
}

// ---- going on

NODISCARD static bool has_room(const struct projection *projection)
{
    return atomic_load_explicit(&projection->job.state, memory_order_acquire) == JOB_DECODING;
}

// False: the job is given up, since it had been cancelled or could not be filled.
NODISCARD static bool use_room(struct projection *projection)
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

bool projection_go_on(struct projection *projection)
{
    if (!projection->cut)
        return has_room(projection) && use_room(projection);
    bool goes_on = cut_go_on(projection->cut);
    if (!goes_on)
        drop_message(projection);
    return goes_on;
}

static uint64_t deadline_ns(const struct projection *projection, uint64_t timeout_us)
{
    uint64_t given = call_deadline_ns(projection->call);
    uint64_t cap_us =
        config_now(call_context(projection->call)->config, deadline_ms_max) * UINT64_C(1000);
    if (timeout_us > 0 && timeout_us < cap_us)
        cap_us = timeout_us;
    uint64_t cap = projection->job.received_ns + cap_us * 1000;
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
    enum status status = placement_set(&projection->placement, region, &request->shared,
                                       request->digest_only, &projection->job, err);
    return status == STATUS_OK ? checksum_check_placed(&projection->placement, request, err)
                               : status;
}

// On success the job has its weight.
NODISCARD static enum status check(struct projection *projection,
                                   const struct wire_request *request, struct error *err)
{
    struct service_context *context = call_context(projection->call);
    uint32_t tokens_max = context->config->request_tokens_max;
    struct job *job = &projection->job;
    enum status status = engine_kernel_find(context->engine_ops, context->engine, request->kernel,
                                            &job->kernel, err);
    if (status != STATUS_OK) {
        weight_unref(projection->weight);
        return status;
    }
    return projection->weight
               ? request_check_with(request, projection->weight, tokens_max, job, err)
               : request_check(request, context->weights, tokens_max, job, err);
}

// What is said of tensors that lie in the message. Their sums first: what was damaged on the way is
// called that.
NODISCARD static enum status check_message(const struct projection *projection,
                                           const struct wire_request *request,
                                           const grpc_byte_buffer *message, struct error *err)
{
    struct projection_bytes bytes = projection_bytes(message);
    enum status status = checksum_check_message(bytes.slices, bytes.slices_n, request, err);
    if (status == STATUS_OK && request->kind == WIRE_OUTPUT_PROJECT)
        status = request_check_positions(bytes.slices, bytes.slices_n, request->positions,
                                         projection->job.weight, err);
    return status;
}

NODISCARD static enum status begin(struct projection *projection, struct batcher_cut at,
                                   grpc_byte_buffer *message, struct error *err)
{
    struct call *call = projection->call;
    uint32_t tokens = projection->job.operand.tokens;
    enum status status = call_request_begin(call, err);
    if (status != STATUS_OK) {
        err->retry_after_ms = batcher_retry_ms(call_context(call)->batcher);
        return status;
    }
    status = at.tokens == 0 || at.tokens == tokens ? submit(projection, message, err)
                                                   : submit_cut(projection, message, at, err);
    if (status != STATUS_OK)
        call_request_end(call);
    return status;
}

enum status projection_start(struct projection *projection, const struct wire_request *request,
                             grpc_byte_buffer *message, bool *running, struct error *err)
{
    *running = false;
    projection->request_id = projection->record.request_id = request->request_id;
    projection->digest_only = request->digest_only;
    projection->output_sum = request->output_sum;
    bool attention = request->kind == WIRE_OUTPUT_PROJECT;
    projection->activations = attention ? request->attention : request->activations;
    projection->activation_scales = request->activation_scales;
    projection->positions = request->positions;
    projection->job.received_ns = projection->record.received_ns;
    projection->job.deadline_ns = deadline_ns(projection, request->timeout_us);
    projection->job.connection = call_connection(projection->call);
    enum status status = check(projection, request, err);
    if (status != STATUS_OK)
        return status;
    if (request->shared.given)
        status = place(projection, request, err);
    else
        status = check_message(projection, request, message, err);
    if (status == STATUS_OK && request->tokens > 0) {
        struct batcher_cut at =
            batcher_cut(call_context(projection->call)->batcher, &projection->job);
        status = begin(projection, at, message, err);
        *running = status == STATUS_OK;
    }
    if (!*running)
        placement_drop(&projection->placement);
    if (status != STATUS_OK) {
        job_count(&projection->job, status);
        weight_unref(projection->job.weight);
        projection->job.weight = NULL;
    }
    return status;
}

// ---- a job becomes a response

// Of the output, wherever it lies; of no tokens, that of nothing.
static struct wire_sum sum_output(const struct projection *projection)
{
    struct wire_sum sum = {.given = projection->output_sum};
    const struct placement *placement = &projection->placement;
    const struct cut *cut = projection->cut;
    uint64_t bytes = output_bytes(projection);
    if (!sum.given || bytes == 0)
        return sum;
    if (placement->region && placement->output.bytes > 0)
        sum.crc32c = crc32c_extend(0, placement->region->memory + placement->output.offset, bytes);
    else if (!cut)
        sum.crc32c = crc32c_extend(0, projection->job.operand.output, bytes);
    for (uint32_t i = 0; cut && placement->output.bytes == 0 && i < cut->parts_n; i++) {
        const void *output = cut_output(cut, &cut->parts[i], &bytes);
        sum.crc32c = crc32c_extend(sum.crc32c, output, bytes);
    }
    return sum;
}

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
        .parts = projection->cut ? projection->cut->parts_n : 0,
        .queue_ns = job->launched_ns - job->queued_ns,
        .run_ns = job->done_ns - job->launched_ns,
        .output_sum = sum_output(projection),
    };
}

void projection_release(struct projection *projection)
{
    struct call *call = projection->call;
    struct job *job = &projection->job;
    if (atomic_load_explicit(&job->state, memory_order_relaxed) != JOB_IDLE) // not given up
        batcher_release(call_context(call)->batcher, job);
    if (projection->cut) {
        cut_destroy(projection->cut);
        unadmit(projection);
    }
    drop_message(projection); // the device was lost while it waited
    placement_drop(&projection->placement);
    weight_unref(projection->job.weight);
    if (projection->streamed)
        free(projection);
    call_request_end(call);
    call_unhold(call);
}

static void on_output_sent(void *argument)
{
    struct projection *projection = argument;
    // On one of gRPC's threads: pairs with job_advance where the output was lent.
    ASSERT(atomic_load_explicit(&projection->job.state, memory_order_acquire) == JOB_REPLYING);
    projection_release(projection);
}

// `output` (NULL: none, or yet to be added) is taken; `bytes` of it go out in all.
static grpc_byte_buffer *respond_with_head(const struct projection *projection,
                                           const grpc_slice *output, uint64_t bytes)
{
    uint8_t head[PROJECTION_HEAD_BYTES_MAX];
    struct wire_response response = describe(projection, bytes);
    size_t head_bytes = projection->write_head
                            ? projection->write_head(projection, &response, head)
                            : wire_write_response_head(&response, projection->streamed, head);
    grpc_slice slices[2] = {grpc_slice_from_copied_buffer((const char *)head, head_bytes)};
    if (output)
        slices[1] = *output;
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, output ? 2 : 1);
    grpc_slice_unref(slices[0]);
    if (output)
        grpc_slice_unref(slices[1]);
    return message;
}

// Lends the output to gRPC, which releases the projection with it, when all has been read of it here.
static grpc_byte_buffer *respond_with_output(struct projection *projection)
{
    grpc_slice output =
        grpc_slice_new_with_user_data(projection->job.operand.output,
                                      (size_t)output_bytes(projection), on_output_sent, projection);
    grpc_byte_buffer *message = respond_with_head(projection, &output, output_bytes(projection));
    job_advance(&projection->job, JOB_DONE, JOB_REPLYING);
    return message;
}

static void digest_output(const struct projection *projection, struct digest *digest)
{
    const struct cut *cut = projection->cut;
    enum einsum_output_type type = projection->job.operand.output_type;
    *digest = (struct digest){0};
    if (!cut)
        digest_add(type, projection->job.operand.output,
                   output_bytes(projection) / einsum_output_element_bytes(type), digest);
    for (uint32_t i = 0; cut && i < cut->parts_n; i++) {
        uint64_t bytes;
        const void *output = cut_output(cut, &cut->parts[i], &bytes);
        digest_add(type, output, bytes / einsum_output_element_bytes(type), digest);
    }
}

static grpc_byte_buffer *respond_with_digest(const struct projection *projection)
{
    const struct wire_response head = describe(projection, 0);
    struct digest computed;
    digest_output(projection, &computed);
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
    batch.parts = head.parts;
    Einsum__V1__EinsumResponse response = EINSUM__V1__EINSUM_RESPONSE__INIT;
    response.request_id = head.request_id;
    response.tokens = head.tokens;
    response.groups = head.groups;
    response.output_dim = head.output_dim;
    response.output_type = (Einsum__V1__OutputType)head.output_type;
    response.digest = &digest;
    response.batch = &batch;
    Einsum__V1__Crc32c sum = EINSUM__V1__CRC32C__INIT;
    sum.value = head.output_sum.crc32c;
    response.output_crc32c = head.output_sum.given ? &sum : NULL;
    if (!projection->streamed)
        return message_pack(&response.base);
    Einsum__V1__EinsumStreamResponse streamed = EINSUM__V1__EINSUM_STREAM_RESPONSE__INIT;
    streamed.response = &response;
    return message_pack(&streamed.base);
}

// On one of gRPC's threads, or ours.
static void on_part_sent(void *argument)
{
    struct part *part = argument;
    // Pairs with job_advance where it was lent, or released after it was copied out; so this comes first.
    enum job_state state = atomic_load_explicit(&part->job.state, memory_order_acquire);
    struct cut *cut = part->cut;
    struct projection *projection = CONTAINER_OF(cut->options.whole, struct projection, job);
    if (state == JOB_REPLYING)
        batcher_release(cut->options.batcher, &part->job);
    if (atomic_fetch_sub_explicit(&cut->unsent, 1, memory_order_acq_rel) == 1)
        projection_release(projection);
}

// Lends all outputs, those in batches and those copied out, to gRPC, which releases the projection with
// the last of them.
static grpc_byte_buffer *respond_with_parts(struct projection *projection)
{
    struct cut *cut = projection->cut;
    if (batcher_scarce(cut->options.batcher))
        cut_copy_out(cut);
    grpc_byte_buffer *message = respond_with_head(projection, NULL, output_bytes(projection));
    grpc_slice_buffer *slices = &message->data.raw.slice_buffer;
    atomic_store_explicit(&cut->unsent, cut->parts_n, memory_order_release);
    for (uint32_t i = 0; i < cut->parts_n; i++) {
        struct part *part = &cut->parts[i];
        uint64_t bytes;
        void *output = (void *)(uintptr_t)cut_output(cut, part, &bytes);
        if (atomic_load_explicit(&part->job.state, memory_order_relaxed) == JOB_DONE)
            job_advance(&part->job, JOB_DONE, JOB_REPLYING);
        grpc_slice_buffer_add(slices,
                              grpc_slice_new_with_user_data(output, bytes, on_part_sent, part));
    }
    return message;
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
    if (!projection->cut)
        nan_look(call_context(projection->call), &projection->job, &projection->placement);
    if (projection->digest_only) {
        message = respond_with_digest(projection);
    } else if (projection->placement.region) {
        if (!projection->cut)
            placement_finish(&projection->placement, &projection->job,
                             &call_context(projection->call)->copies);
        message = respond_with_head(projection, NULL, 0);
    } else if (projection->cut) {
        return respond_with_parts(projection);
    } else if ((copy = copy_if_scarce(projection)) != NULL) {
        grpc_slice output =
            grpc_slice_new_with_user_data(copy->output, copy->bytes, on_copy_sent, copy);
        message = respond_with_head(projection, &output, copy->bytes);
    } else {
        return respond_with_output(projection);
    }
    projection_release(projection);
    return message;
}

grpc_byte_buffer *projection_respond_empty(struct projection *projection)
{
    grpc_byte_buffer *message = projection->digest_only ? respond_with_digest(projection)
                                                        : respond_with_head(projection, NULL, 0);
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
