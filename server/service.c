#include "service.h"

#include "batch.h"
#include "record.h"

const char *service_not_ready(const struct service_context *context)
{
    if (batcher_device_lost(context->batcher))
        return "device lost";
    const char *hung = atomic_load_explicit(&context->hung, memory_order_relaxed);
    if (hung)
        return hung;
    return atomic_load_explicit(&context->draining, memory_order_relaxed) ? "draining" : NULL;
}

void service_read_metadata(struct call *call, struct record *record)
{
    const char *value;
    size_t bytes;
    if (call_context(call)->tracer && call_metadata(call, "traceparent", &value, &bytes))
        trace_parse(value, bytes, &record->trace);
    record->timing =
        call_metadata(call, "einsumd-timing", &value, &bytes) && bytes == 1 && value[0] == '1';
}

void service_add_timing(struct call *call, const struct record *record)
{
    if (!record->timing)
        return;
    char text[RECORD_TIMING_BYTES];
    record_timing(record, text);
    call_add_trailer(call, "einsumd-timing", text);
}

// ---- slow work

static void run_task(struct control_task *control)
{
    struct service_task *task = CONTAINER_OF(control, struct service_task, task);
    struct call *call = task->call;
    task->work(task);
    atomic_store_explicit(&task->done, true, memory_order_release);
    call_wake(call);
    call_unhold(call);
}

void service_task_start(struct service_task *task, struct call *call,
                        void (*work)(struct service_task *task))
{
    task->task.run = run_task;
    task->call = call;
    task->work = work;
    struct error err;
    call_hold(call);
    if (control_submit(call_context(call)->control, &task->task, &err) == STATUS_OK)
        return;
    call_finish(call, NULL, &err);
    call_unhold(call);
}

bool service_task_done(const struct service_task *task)
{
    return atomic_load_explicit(&task->done, memory_order_acquire);
}

void service_no_memory(struct call *call, const char *what)
{
    struct error err;
    error_set(&err, STATUS_RESOURCE_EXHAUSTED, "no memory for %s", what);
    call_finish(call, NULL, &err);
}

void *service_unpack(struct call *call, const ProtobufCMessageDescriptor *descriptor,
                     grpc_byte_buffer *bytes)
{
    ProtobufCMessage *message = NULL;
    struct error err;
    if (message_unpack(descriptor, bytes, &message, &err) != STATUS_OK)
        call_finish(call, NULL, &err);
    return message;
}
