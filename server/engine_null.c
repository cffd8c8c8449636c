// The engine that computes nothing: a batch is done the moment it is submitted, and its output is
// what the memory held before: zeros, or what a caller left in memory of its own. It measures
// everything else, so that it takes the same road as an engine that computes: wake, then poll.
//
// Threads: open, close, submit and poll as engine.h says; it has none of its own.
#include <stdlib.h>
#include <stdio.h>

#include "engine.h"

struct engine {
    void (*wake)(void *context);
    void *wake_context;
    uint32_t lanes;
    uint64_t *submitted_ns; // of each lane; 0: nothing in flight. Scheduler thread only
};

struct engine_weight {
    char identity; // only the address matters: requests for one weight stand side by side
};

static enum status null_open(const struct engine_options *options, struct engine **out,
                             struct error *err)
{
    if (options->kernel)
        return error_field(err, STATUS_UNIMPLEMENTED, "kernel",
                           "the null engine has none, got \"%s\"", options->kernel);
    struct engine *engine = malloc(sizeof *engine);
    uint64_t *submitted_ns = calloc(options->lanes, sizeof *submitted_ns);
    if (!engine || !submitted_ns) {
        free(submitted_ns);
        free(engine);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    }
    *engine = (struct engine){
        .wake = options->wake,
        .wake_context = options->wake_context,
        .lanes = options->lanes,
        .submitted_ns = submitted_ns,
    };
    *out = engine;
    return STATUS_OK;
}

static void null_close(struct engine *engine)
{
    free(engine->submitted_ns);
    free(engine);
}

static void null_describe(const struct engine *engine, struct engine_info *info)
{
    (void)engine;
    *info = (struct engine_info){0};
    snprintf(info->device, sizeof info->device, "none");
    snprintf(info->kernel, sizeof info->kernel, "null: answers zeros without computing");
}

// The weight is neither read nor held.
static enum status null_weight_load(struct engine *engine,
                                    const struct engine_weight_source *source,
                                    struct engine_weight **out, struct error *err)
{
    (void)engine;
    struct engine_weight *weight = malloc(sizeof *weight);
    if (!weight)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    weight->identity = 0;
    if (source->progress)
        source->progress(source, einsum_weight_bytes(&source->format));
    *out = weight;
    return STATUS_OK;
}

static void null_weight_free(struct engine *engine, struct engine_weight *weight)
{
    (void)engine;
    free(weight);
}

static uint64_t null_weight_bytes(const struct engine_weight *weight)
{
    (void)weight;
    return 0;
}

static enum status null_memory_alloc(struct engine *engine, uint64_t bytes, void **memory,
                                     struct error *err)
{
    (void)engine;
    return engine_host_memory_alloc(bytes, memory, err);
}

static void null_memory_free(struct engine *engine, void *memory, uint64_t bytes)
{
    (void)engine;
    engine_host_memory_free(memory, bytes);
}

static void null_submit(struct engine *engine, uint32_t lane, const struct engine_batch *batch)
{
    (void)batch;
    ASSERT(lane < engine->lanes);
    ASSERT(engine->submitted_ns[lane] == 0);
    engine->submitted_ns[lane] = now_ns();
    engine->wake(engine->wake_context);
}

static bool null_poll(struct engine *engine, uint32_t lane, struct engine_result *result)
{
    ASSERT(lane < engine->lanes);
    uint64_t submitted_ns = engine->submitted_ns[lane];
    if (submitted_ns == 0)
        return false;
    engine->submitted_ns[lane] = 0;
    result->status = STATUS_OK;
    result->started_ns = result->ended_ns = submitted_ns;
    result->copy_in_ns = result->kernel_ns = result->copy_out_ns = 0;
    return true;
}

const struct engine_ops engine_null = {
    .name = "null",
    .lanes_default = 2,
    .open = null_open,
    .close = null_close,
    .describe = null_describe,
    .weight_load = null_weight_load,
    .weight_free = null_weight_free,
    .weight_bytes = null_weight_bytes,
    .memory_alloc = null_memory_alloc,
    .memory_free = null_memory_free,
    .memory_register = engine_host_memory_register,
    .memory_unregister = engine_host_memory_unregister,
    .submit = null_submit,
    .poll = null_poll,
};
