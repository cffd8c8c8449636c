// Runs on the call's rpc thread, but for on_job.
#include "unary.h"

#include "service.h"

// Done, or given room after it had waited.
static void on_job(struct job *job)
{
    call_wake(CONTAINER_OF(job, struct projection, job)->call);
}

void *unary_begin(struct call *call, size_t bytes, enum metrics_method method)
{
    struct projection *projection = call_inline_state(call, bytes);
    record_begin(&projection->record, call_context(call), method, METRICS_UNARY);
    service_read_metadata(call, &projection->record);
    projection->call = call;
    projection->job.on_done = projection->job.on_room = on_job;
    return projection;
}

// `err` NULL: it went well.
static void finish(struct projection *projection, grpc_byte_buffer *message,
                   const struct error *err)
{
    projection->record.answered_ns = now_ns();
    service_add_timing(projection->call, &projection->record);
    call_finish(projection->call, message, err);
}

void unary_fail(struct projection *projection, const struct error *err)
{
    record_answer(&projection->record, call_context(projection->call), NULL, err);
    finish(projection, NULL, err);
}

void unary_start(struct projection *projection, const struct wire_request *request,
                 grpc_byte_buffer *message)
{
    struct error err;
    bool running;
    if (projection_start(projection, request, message, &running, &err) != STATUS_OK) {
        unary_fail(projection, &err);
    } else if (!running) {
        record_answer(&projection->record, call_context(projection->call), NULL, NULL);
        finish(projection, projection_respond_empty(projection), NULL);
    }
}

// The only waker is on_job; the call itself may be over by now.
void unary_on_wake(struct call *call)
{
    struct projection *projection = call_state(call);
    if (projection_go_on(projection))
        return;
    const struct error *err = &projection->job.error;
    record_answer(&projection->record, call_context(call), &projection->job, err);
    if (err->status == STATUS_OK) {
        finish(projection, projection_respond(projection), NULL);
    } else {
        finish(projection, NULL, err);
        projection_release(projection);
    }
}

void unary_on_cancel(struct call *call)
{
    struct projection *projection = call_state(call);
    if (projection)
        atomic_store_explicit(&projection->job.cancelled, true, memory_order_relaxed);
}

void unary_on_end(struct call *call)
{
    struct projection *projection = call_state(call);
    if (!call_cancelled(call))
        projection->record.left_ns = now_ns();
    record_end(&projection->record, call_context(call));
}
