// Runs on the call's rpc thread, but for on_job.
#include "unary.h"

#include "service.h"

// Done, or given room after it had waited.
static void on_job(struct job *job)
{
    call_wake(CONTAINER_OF(job, struct projection, job)->call);
}

void *unary_begin(struct call *call, size_t bytes)
{
    atomic_fetch_add_explicit(&call_context(call)->counters.received, 1, memory_order_relaxed);
    struct projection *projection = call_inline_state(call, bytes);
    projection->call = call;
    projection->job.on_done = projection->job.on_room = on_job;
    return projection;
}

void unary_fail(struct call *call, const struct error *err)
{
    service_count(call_context(call), err->status);
    call_finish(call, NULL, err);
}

void unary_start(struct projection *projection, const struct wire_request *request,
                 grpc_byte_buffer *message)
{
    struct call *call = projection->call;
    struct error err;
    bool running;
    if (projection_start(projection, request, message, &running, &err) != STATUS_OK) {
        unary_fail(call, &err);
    } else if (!running) {
        service_count(call_context(call), STATUS_OK);
        call_finish(call, projection_respond_empty(projection), NULL);
    }
}

// The only waker is on_job; the call itself may be over by now.
void unary_on_wake(struct call *call)
{
    struct projection *projection = call_state(call);
    if (projection_go_on(projection))
        return;
    const struct error *err = &projection->job.error;
    projection_count(projection);
    if (err->status == STATUS_OK) {
        call_finish(call, projection_respond(projection), NULL);
    } else {
        call_finish(call, NULL, err);
        projection_release(projection);
    }
}

void unary_on_cancel(struct call *call)
{
    struct projection *projection = call_state(call);
    if (projection)
        atomic_store_explicit(&projection->job.cancelled, true, memory_order_relaxed);
}
