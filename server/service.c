#include "service.h"

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
