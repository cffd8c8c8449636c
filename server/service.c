#include "service.h"

#include "batch.h"

void service_count(struct service_context *context, enum status status)
{
    struct service_counters *counters = &context->counters;
    _Atomic uint64_t *counter;
    switch (status) {
    case STATUS_OK:
        counter = &counters->answered;
        break;
    case STATUS_RESOURCE_EXHAUSTED:
    case STATUS_UNAVAILABLE:
        counter = &counters->refused;
        break;
    case STATUS_INVALID_ARGUMENT:
    case STATUS_NOT_FOUND:
    case STATUS_UNIMPLEMENTED:
    case STATUS_ALREADY_EXISTS:
    case STATUS_PERMISSION_DENIED:
    case STATUS_FAILED_PRECONDITION:
    case STATUS_OUT_OF_RANGE:
    case STATUS_UNAUTHENTICATED:
        counter = &counters->invalid;
        break;
    case STATUS_DEADLINE_EXCEEDED:
        counter = &counters->expired;
        break;
    case STATUS_CANCELLED:
    case STATUS_ABORTED:
        counter = &counters->cancelled;
        break;
    case STATUS_UNKNOWN:
    case STATUS_INTERNAL:
    case STATUS_DATA_LOSS:
    default:
        counter = &counters->failed;
        break;
    }
    atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

bool service_ready(const struct service_context *context)
{
    return !atomic_load_explicit(&context->draining, memory_order_relaxed) &&
           !batcher_device_lost(context->batcher);
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

void *service_unpack(struct call *call, const ProtobufCMessageDescriptor *descriptor,
                     grpc_byte_buffer *bytes)
{
    ProtobufCMessage *message = NULL;
    struct error err;
    if (message_unpack(descriptor, bytes, &message, &err) != STATUS_OK)
        call_finish(call, NULL, &err);
    return message;
}
