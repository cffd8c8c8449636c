// The hot methods: Einsum and OutputProject (unary), and EinsumStream, which takes both.
#include <stdlib.h>

#include "config.h"
#include "projection.h"
#include "service.h"
#include "unary.h"

// ---- Einsum, OutputProject

static enum metrics_method method_of(enum wire_kind kind)
{
    return kind == WIRE_OUTPUT_PROJECT ? METRICS_OUTPUT_PROJECT : METRICS_EINSUM;
}

static void on_unary_message(struct call *call, grpc_byte_buffer *message, enum wire_kind kind)
{
    struct projection *projection = unary_begin(call, sizeof *projection, method_of(kind));
    struct projection_bytes bytes = projection_bytes(message);
    struct wire_request request;
    struct error err;
    if (wire_read_request(bytes.slices, bytes.slices_n, kind, &request, &err) == STATUS_OK)
        unary_start(projection, &request, message);
    else
        unary_fail(projection, &err);
}

static void on_einsum_message(struct call *call, grpc_byte_buffer *message)
{
    on_unary_message(call, message, WIRE_EINSUM);
}

static void on_output_project_message(struct call *call, grpc_byte_buffer *message)
{
    on_unary_message(call, message, WIRE_OUTPUT_PROJECT);
}

// ---- EinsumStream

struct item {
    struct projection projection;
    struct stream *stream;
    struct item *next_done;       // in stream->done
    struct item *next, *previous; // in stream->running
};

struct outgoing {
    grpc_byte_buffer *message;
    struct record record;
    struct outgoing *next;
};

// All of the rpc thread's, but `done`.
struct stream {
    struct call *call;
    _Atomic(struct item *) done; // stack, filled by the scheduler
    struct item *running;
    struct outgoing *first, **last; // waiting to be sent
    struct trace_context trace;     // of all requests
    struct record sent;             // of what is being sent
    uint32_t in_flight;             // running, waiting to be sent, or being sent
    bool reading, sending, half_closed, draining;
    bool broken; // nothing more will be answered
};

static void on_stream_start(struct call *call)
{
    struct stream *stream = calloc(1, sizeof *stream);
    if (!stream) {
        struct error err;
        error_set(&err, STATUS_RESOURCE_EXHAUSTED, "no memory for a stream");
        call_finish(call, NULL, &err);
        return;
    }
    METRICS_ADD(call_context(call)->metrics, streams_opened, 1);
    stream->call = call;
    stream->last = &stream->first;
    stream->reading = true; // the first message is asked for by itself
    struct record asked = {0};
    service_read_metadata(call, &asked);
    stream->trace = asked.trace;
    call_set_state(call, stream);
}

static struct outgoing *take_outgoing(struct stream *stream)
{
    struct outgoing *outgoing = stream->first;
    if (outgoing) {
        stream->first = outgoing->next;
        if (!stream->first)
            stream->last = &stream->first;
    }
    return outgoing;
}

static void drop_outgoing(struct stream *stream)
{
    struct outgoing *outgoing;
    while ((outgoing = take_outgoing(stream)) != NULL) {
        grpc_byte_buffer_destroy(outgoing->message);
        record_end(&outgoing->record, call_context(stream->call));
        free(outgoing);
        stream->in_flight--;
    }
}

// Jobs not yet launched are dropped, memory on loan comes back.
static void break_stream(struct stream *stream)
{
    stream->broken = true;
    for (struct item *item = stream->running; item; item = item->next)
        atomic_store_explicit(&item->projection.job.cancelled, true, memory_order_relaxed);
    drop_outgoing(stream);
}

static void send_next(struct stream *stream)
{
    while (!stream->sending && stream->first) {
        struct outgoing *outgoing = take_outgoing(stream);
        stream->sent = outgoing->record;
        stream->sending = call_send(stream->call, outgoing->message);
        if (!stream->sending) { // the call is over, and so is the message
            record_end(&stream->sent, call_context(stream->call));
            stream->in_flight--;
        }
        free(outgoing);
    }
}

// `message` counts as in flight already.
static void answer(struct stream *stream, grpc_byte_buffer *message, struct record *record)
{
    record->answered_ns = now_ns();
    struct outgoing *outgoing = stream->broken ? NULL : malloc(sizeof *outgoing);
    if (!outgoing) {
        grpc_byte_buffer_destroy(message);
        record_end(record, call_context(stream->call));
        stream->in_flight--;
        if (!stream->broken) { // an answer is lost: the caller must hear of it
            struct error err;
            error_set(&err, STATUS_RESOURCE_EXHAUSTED, "no memory for a response");
            call_finish(stream->call, NULL, &err);
            break_stream(stream);
        }
        return;
    }
    *outgoing = (struct outgoing){.message = message, .record = *record};
    *stream->last = outgoing;
    stream->last = &outgoing->next;
    send_next(stream);
}

// Reads on, or ends the stream, as far as its state lets it.
static void go_on(struct stream *stream)
{
    uint32_t in_flight_max = config_now(call_context(stream->call)->config, stream_requests_max);
    if (stream->broken)
        return;
    if (!stream->half_closed && !stream->draining) {
        if (!stream->reading && stream->in_flight < in_flight_max) {
            stream->reading = true;
            call_read(stream->call);
        }
    } else if (stream->in_flight == 0) {
        if (stream->half_closed)
            call_finish(stream->call, NULL, NULL);
        else
            call_finish_draining(stream->call);
    }
}

static void link_running(struct item *item)
{
    struct stream *stream = item->stream;
    item->previous = NULL;
    item->next = stream->running;
    if (item->next)
        item->next->previous = item;
    stream->running = item;
}

static void unlink_running(struct item *item)
{
    if (item->previous)
        item->previous->next = item->next;
    else
        item->stream->running = item->next;
    if (item->next)
        item->next->previous = item->previous;
}

// Done, or given room after it had waited.
static void on_stream_job(struct job *job)
{
    struct item *item = CONTAINER_OF(job, struct item, projection.job);
    struct stream *stream = item->stream;
    struct call *call = stream->call;
    call_hold(call); // once pushed, the item may be answered and freed, and its hold with it
    struct item *head = atomic_load_explicit(&stream->done, memory_order_relaxed);
    do
        item->next_done = head;
    while (!atomic_compare_exchange_weak_explicit(&stream->done, &head, item, memory_order_acq_rel,
                                                  memory_order_relaxed));
    if (!head)
        call_wake(call);
    call_unhold(call);
}

static void collect(struct item *item)
{
    struct stream *stream = item->stream;
    struct projection *projection = &item->projection;
    if (projection_go_on(projection))
        return;
    struct error err = projection->job.error;
    unlink_running(item);
    record_answer(&projection->record, call_context(stream->call), &projection->job, &err);
    struct record record = projection->record; // the item may be gone before its reply
    if (err.status == STATUS_OK) {
        answer(stream, projection_respond(projection), &record);
        return;
    }
    uint64_t request_id = projection->request_id;
    projection_release(projection);
    answer(stream, projection_respond_error(request_id, &err), &record);
}

static void on_stream_wake(struct call *call)
{
    struct stream *stream = call_state(call);
    struct item *newest = atomic_exchange_explicit(&stream->done, NULL, memory_order_acq_rel);
    struct item *oldest = NULL;
    while (newest) {
        struct item *next = newest->next_done;
        newest->next_done = oldest;
        oldest = newest;
        newest = next;
    }
    while (oldest) {
        struct item *next = oldest->next_done;
        collect(oldest);
        oldest = next;
    }
    go_on(stream);
}

static void refuse_request(struct stream *stream, uint64_t request_id, struct record *record,
                           const struct error *err)
{
    record_answer(record, call_context(stream->call), NULL, err);
    answer(stream, projection_respond_error(request_id, err), record);
}

// `record`: begun.
static void start_item(struct stream *stream, const struct wire_request *request,
                       struct record *record, grpc_byte_buffer *message)
{
    struct error err;
    struct item *item = calloc(1, sizeof *item);
    if (!item) {
        error_set(&err, STATUS_RESOURCE_EXHAUSTED, "no memory for a request");
        refuse_request(stream, request->request_id, record, &err);
        return;
    }
    item->stream = stream;
    item->projection.record = *record;
    item->projection.call = stream->call;
    item->projection.streamed = true;
    item->projection.job.on_done = on_stream_job;
    item->projection.job.on_room = on_stream_job;
    link_running(item);
    bool running;
    enum status status = projection_start(&item->projection, request, message, &running, &err);
    if (status == STATUS_OK && running)
        return;
    unlink_running(item);
    *record = item->projection.record;
    if (status == STATUS_OK) {
        record_answer(record, call_context(stream->call), NULL, NULL);
        answer(stream, projection_respond_empty(&item->projection), record);
    } else {
        refuse_request(stream, request->request_id, record, &err);
    }
    free(item);
}

static void on_stream_message(struct call *call, grpc_byte_buffer *message)
{
    struct stream *stream = call_state(call);
    stream->reading = false;
    if (!message) {
        stream->half_closed = true;
        go_on(stream);
        return;
    }
    struct service_context *context = call_context(call);
    struct record record;
    record_begin(&record, context, METRICS_EINSUM, METRICS_STREAM); // of which kind, it will say
    record.trace = stream->trace;
    struct projection_bytes bytes = projection_bytes(message);
    struct wire_request request;
    struct error err;
    if (wire_read_stream_request(bytes.slices, bytes.slices_n, &request, &err) != STATUS_OK) {
        // Without its request_id no response can be matched to it, so the stream ends.
        record_answer(&record, context, NULL, &err);
        record_end(&record, context);
        call_finish(call, NULL, &err);
        break_stream(stream);
        return;
    }
    stream->in_flight++;
    record.method = method_of(request.kind);
    record.request_id = request.request_id;
    if (stream->draining) {
        METRICS_ADD(context->metrics, refused_draining, 1);
        error_set(&err, STATUS_UNAVAILABLE, "draining");
        refuse_request(stream, request.request_id, &record, &err);
    } else {
        start_item(stream, &request, &record, message);
    }
    go_on(stream);
}

static void on_stream_sent(struct call *call)
{
    struct stream *stream = call_state(call);
    stream->sending = false;
    stream->in_flight--;
    stream->sent.left_ns = now_ns();
    record_end(&stream->sent, call_context(call));
    send_next(stream);
    go_on(stream);
}

static void on_stream_drain(struct call *call)
{
    struct stream *stream = call_state(call);
    if (!stream)
        return;
    stream->draining = true;
    go_on(stream);
}

static void on_stream_cancel(struct call *call)
{
    struct stream *stream = call_state(call);
    if (stream)
        break_stream(stream);
}

static void on_stream_end(struct call *call)
{
    struct stream *stream = call_state(call);
    ASSERT(!stream || (!stream->running && !stream->first));
    if (!stream)
        return;
    if (stream->sending) // the call's end was on its way, and nobody told of the last message
        record_end(&stream->sent, call_context(call));
    METRICS_ADD(call_context(call)->metrics, streams_ended, 1);
    free(stream);
}

const struct method service_einsum_methods[] = {
    {
        .path = "/einsum.v1.Einsum/Einsum",
        .needs = ACCESS_INFER,
        .message_with_call = true,
        .on_message = on_einsum_message,
        .on_wake = unary_on_wake,
        .on_cancel = unary_on_cancel,
        .on_end = unary_on_end,
    },
    {
        .path = "/einsum.v1.Einsum/OutputProject",
        .needs = ACCESS_INFER,
        .message_with_call = true,
        .on_message = on_output_project_message,
        .on_wake = unary_on_wake,
        .on_cancel = unary_on_cancel,
        .on_end = unary_on_end,
    },
    {
        .path = "/einsum.v1.Einsum/EinsumStream",
        .needs = ACCESS_INFER,
        .on_start = on_stream_start,
        .on_message = on_stream_message,
        .on_sent = on_stream_sent,
        .on_wake = on_stream_wake,
        .on_cancel = on_stream_cancel,
        .on_drain = on_stream_drain,
        .on_end = on_stream_end,
    },
    {0},
};
