#include "service.h"

#include "batch.h"
#include "record.h"

const char *service_not_ready(const struct service_context *context)
{
    if (batcher_device_lost(context->batcher))
        return "device lost";
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
