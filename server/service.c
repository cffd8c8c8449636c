#include "service.h"

#include "batch.h"

const char *service_not_ready(const struct service_context *context)
{
    if (batcher_device_lost(context->batcher))
        return "device lost";
    return atomic_load_explicit(&context->draining, memory_order_relaxed) ? "draining" : NULL;
}
