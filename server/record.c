#include "record.h"

#include "service.h"

void record_begin(struct record *record, struct service_context *context,
                  enum metrics_method method, enum metrics_transport transport)
{
    *record = (struct record){.method = method, .transport = transport, .received_ns = now_ns()};
    METRICS_ADD(context->metrics, received, 1);
}

// Between two instants of which both were reached.
static bool between(uint64_t from_ns, uint64_t to_ns, uint64_t *ns)
{
    if (from_ns == 0 || to_ns == 0)
        return false;
    // The engine's own clock readings may lie a little apart from ours.
    *ns = to_ns > from_ns ? to_ns - from_ns : 0;
    return true;
}

bool record_phase(const struct record *record, enum metrics_phase phase, uint64_t *ns)
{
    uint64_t for_room_ns;
    switch (phase) {
    case METRICS_RECEIVE:
        return between(record->received_ns, record->asked_ns, ns);
    case METRICS_QUEUE:
        if (!between(record->asked_ns, record->room_ns, &for_room_ns) ||
            !between(record->queued_ns, record->launched_ns, ns))
            return false;
        *ns += for_room_ns;
        return true;
    case METRICS_COPY_IN:
        return between(record->room_ns, record->queued_ns, ns);
    case METRICS_KERNEL:
        return between(record->launched_ns, record->done_ns, ns);
    case METRICS_COPY_OUT:
        return between(record->done_ns, record->answered_ns, ns);
    case METRICS_SEND:
        return between(record->answered_ns, record->left_ns, ns);
    case METRICS_PHASES:
        break;
    }
    ASSERT(!"no such phase");
}

void record_answer(struct record *record, struct service_context *context, const struct job *job,
                   enum status status)
{
    record->status = status;
    if (job && job->batch_requests > 0) { // it was launched
        record->queued_ns = job->queued_ns;
        record->launched_ns = job->launched_ns;
        record->done_ns = job->done_ns;
    }
    metrics_count_request(context->metrics, record->method, record->transport, status);
}

void record_end(struct record *record, struct service_context *context)
{
    uint64_t ns, end_ns = record->left_ns ? record->left_ns : now_ns();
    for (enum metrics_phase phase = 0; phase < METRICS_PHASES; phase++)
        if (record_phase(record, phase, &ns))
            metrics_observe_phase(context->metrics, phase, ns);
    if (between(record->received_ns, end_ns, &ns))
        metrics_observe_duration(context->metrics, record->method, ns);
}
