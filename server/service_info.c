// ServerInfo and SelfTest.
#include <einsum/v1/einsum.pb-c.h>
#include <grpc/grpc.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <uv.h>

#include "batch.h"
#include "config.h"
#include "listener.h"
#include "log.h"
#include "projection.h"
#include "service.h"
#include "sharing.h"
#include "verify.h"
#include "weights.h"

// ---- ServerInfo

static Einsum__V1__Counters read_counters(struct service_context *context,
                                          struct batcher_stats *batches,
                                          const struct engine_info *engine)
{
    struct metrics_values values;
    metrics_read(context->metrics, &values);
    struct metrics_ends ends = metrics_ends(&values);
    struct listener_stats connections = listener_stats(context->listener);
    Einsum__V1__Counters message = EINSUM__V1__COUNTERS__INIT;
    message.requests = values.received;
    message.answered = ends.answered;
    message.refused = ends.refused;
    message.invalid = ends.invalid;
    message.expired = ends.expired;
    message.cancelled = ends.cancelled;
    message.failed = ends.failed;
    message.batches = batches->batches;
    message.batch_tokens = batches->tokens;
    message.batch_padding_tokens = batches->padding_tokens;
    message.batch_requests = batches->requests;
    message.busy_ns = batches->busy_ns;
    message.connections = connections.connections;
    message.connections_refused = connections.refused;
    message.queue_ns = batches->queue_ns;
    message.phase_batches = batches->phase_batches;
    message.copy_in_ns = batches->copy_in.sum_ns;
    message.kernel_ns = batches->kernel.sum_ns;
    message.copy_out_ns = batches->copy_out.sum_ns;
    message.graph_replays = engine->graph_replays;
    message.eager_launches = engine->eager_launches;
    message.bucket_batches = batches->bucket_batches;
    message.n_bucket_batches = context->config->buckets_n;
    message.copied_in_bytes = atomic_load_explicit(&context->copies.in_bytes, memory_order_relaxed);
    message.copied_out_bytes =
        atomic_load_explicit(&context->copies.out_bytes, memory_order_relaxed);
    message.shared_requests = values.shared;
    message.ring_requests = context->rings ? rings_stats(context->rings).requests : 0;
    return message;
}

static Einsum__V1__Limits read_limits(const struct service_context *context)
{
    const struct config *config = context->config;
    Einsum__V1__Limits limits = EINSUM__V1__LIMITS__INIT;
    limits.request_tokens_max = config->request_tokens_max;
    limits.batch_tokens_max = config->batch_tokens_max;
    limits.request_bytes_max = context->message_bytes_max;
    limits.reply_bytes_max = context->reply_bytes_max;
    limits.queue_requests_max = config_now(config, queue_requests_max);
    limits.queue_bytes_max = config->batches * config->batch_input_bytes;
    limits.connections_max = config_now(config, connections_max);
    limits.stream_requests_max = config_now(config, stream_requests_max);
    limits.deadline_ms_max = config_now(config, deadline_ms_max);
    limits.connection_requests_max = config->connection_requests_max;
    limits.cut_bytes_max = config->cut_bytes_max;
    return limits;
}

_Static_assert((int)CONFIG_BUCKETS_MAX == (int)ENGINE_BUCKETS_MAX, "a bucket of one is one of all");

// Graphs of all buckets, as `memory` points to them.
struct bucket_graphs {
    Einsum__V1__BucketGraphs messages[CONFIG_BUCKETS_MAX];
    Einsum__V1__BucketGraphs *pointers[CONFIG_BUCKETS_MAX];
};

static Einsum__V1__Memory read_memory(const struct service_context *context,
                                      const struct batcher_stats *batches,
                                      const struct engine_info *engine,
                                      struct bucket_graphs *graphs)
{
    Einsum__V1__Memory memory = EINSUM__V1__MEMORY__INIT;
    memory.weights_bytes = weights_totals(context->weights).resident_bytes;
    memory.batches_bytes = batches->buffer_bytes;
    memory.scratch_bytes = engine->scratch_bytes;
    memory.lanes_bytes = engine->lanes_bytes;
    memory.graphs_bytes = engine->graphs_bytes;
    memory.graphs = graphs->pointers;
    for (size_t i = 0; i < context->config->buckets_n; i++) {
        if (engine->bucket_graphs_n[i] == 0)
            continue;
        Einsum__V1__BucketGraphs *message = &graphs->messages[memory.n_graphs];
        einsum__v1__bucket_graphs__init(message);
        message->bucket = context->config->buckets[i];
        message->graphs = engine->bucket_graphs_n[i];
        message->device_bytes = engine->bucket_graphs_bytes[i];
        graphs->pointers[memory.n_graphs++] = message;
    }
    return memory;
}

static Einsum__V1__SharedMemory read_shared_memory(const struct service_context *context)
{
    const struct config *config = context->config;
    struct sharing_stats sharing = sharing_stats(context->sharing);
    struct regions_stats regions = regions_stats(context->regions);
    Einsum__V1__SharedMemory message = EINSUM__V1__SHARED_MEMORY__INIT;
    message.socket = config->shared_memory_listen + strlen("unix:");
    message.direct = context->engine_ops->memory_register != NULL;
    message.cuda = config->shared_memory_cuda && context->engine_ops->memory_import != NULL;
    message.connections_max = config->shared_connections_max;
    message.connection_regions_max = config->shared_connection_regions_max;
    message.regions_max = config->shared_regions_max;
    message.region_bytes_max = config->shared_region_bytes_max;
    message.regions_bytes_max = config->shared_bytes_max;
    message.connections = sharing.connections;
    message.connections_refused = sharing.connections_refused;
    message.regions = regions.regions;
    message.regions_bytes = regions.bytes;
    message.rings = rings_stats(context->rings).rings;
    message.ring_entries_max = config->ring_entries_max;
    return message;
}

static const char *state_name(const struct service_context *context)
{
    if (batcher_device_lost(context->batcher))
        return "device_lost";
    if (atomic_load_explicit(&context->hung, memory_order_relaxed))
        return "hung";
    return service_not_ready(context) ? "draining" : "serving";
}

static Einsum__V1__Library library(const char *name, const char *version)
{
    Einsum__V1__Library message = EINSUM__V1__LIBRARY__INIT;
    message.name = (char *)(uintptr_t)name;
    message.version = (char *)(uintptr_t)version;
    return message;
}

static void on_server_info(struct call *call, grpc_byte_buffer *bytes)
{
    struct service_context *context = call_context(call);
    (void)bytes; // the request has no fields
    struct engine_info engine;
    context->engine_ops->describe(context->engine, &engine);
    char *kernels[ENGINE_KERNELS_MAX];
    for (uint32_t i = 0; i < engine.kernels_n; i++)
        kernels[i] = (char *)(uintptr_t)engine.kernels[i];
    struct batcher_stats batches;
    batcher_stats(context->batcher, &batches);

    Einsum__V1__Limits limits = read_limits(context);
    Einsum__V1__Counters counters = read_counters(context, &batches, &engine);
    struct bucket_graphs graphs = {0};
    Einsum__V1__Memory memory = read_memory(context, &batches, &engine, &graphs);
    Einsum__V1__Library libraries[] = {
        library("grpc", grpc_version_string()),
        library("protobuf-c", protobuf_c_version()),
        library("libuv", uv_version_string()),
        library("jansson", jansson_version_str()),
    };
    Einsum__V1__Library *library_pointers[ARRAY_LEN(libraries)];
    for (size_t i = 0; i < ARRAY_LEN(libraries); i++)
        library_pointers[i] = &libraries[i];
    uint32_t buckets[CONFIG_BUCKETS_MAX];
    memcpy(buckets, context->config->buckets, sizeof buckets);

    Einsum__V1__ServerInfoResponse response = EINSUM__V1__SERVER_INFO_RESPONSE__INIT;
    response.version = (char *)(uintptr_t)EINSUMD_VERSION;
    response.engine = (char *)(uintptr_t)context->engine_ops->name;
    response.device = engine.device;
    response.kernel = engine.kernel;
    response.kernels = kernels;
    response.n_kernels = engine.kernels_n;
    response.engine_threads = engine.threads;
    response.limits = &limits;
    response.buckets = buckets;
    response.n_buckets = context->config->buckets_n;
    response.lanes = context->config->lanes;
    response.memory = &memory;
    response.counters = &counters;
    response.uptime_ns = now_ns() - context->started_ns;
    response.libraries = library_pointers;
    response.n_libraries = ARRAY_LEN(libraries);
    response.state = (char *)(uintptr_t)state_name(context);
    Einsum__V1__SharedMemory shared_memory;
    if (context->sharing) {
        shared_memory = read_shared_memory(context);
        response.shared_memory = &shared_memory;
    }
    call_finish(call, message_pack(&response.base), NULL);
}

// ---- SelfTest

struct verdict {
    struct weight *weight; // a reference
    struct verify_result result;
    struct error error; // why there is no result
};

struct self_test {
    struct service_task task;
    struct verify verify;
    struct verdict *verdicts;
    size_t verdicts_n, verdicts_max;
    bool incomplete; // no memory for the rest
    size_t judged_n; // written by the task
};

static void add_weight(void *context, struct weight *weight)
{
    struct self_test *test = context;
    if (test->verdicts_n == test->verdicts_max && !test->incomplete) {
        size_t more = test->verdicts_max ? 2 * test->verdicts_max : 64;
        struct verdict *grown = realloc(test->verdicts, more * sizeof *grown);
        test->incomplete = !grown;
        if (grown) {
            test->verdicts = grown;
            test->verdicts_max = more;
        }
    }
    if (test->incomplete)
        return;
    test->verdicts[test->verdicts_n++] = (struct verdict){.weight = weight_ref(weight)};
}

static void run_self_test(struct service_task *task)
{
    struct self_test *test = CONTAINER_OF(task, struct self_test, task);
    struct service_context *context = call_context(task->call);
    for (; test->judged_n < test->verdicts_n; test->judged_n++) {
        if (call_cancelled(task->call) || control_stopping(context->control))
            break;
        struct verdict *verdict = &test->verdicts[test->judged_n];
        verdict->error.status =
            verify_weight(&test->verify, verdict->weight, &verdict->result, &verdict->error);
    }
}

NODISCARD static enum status all_chosen(const struct self_test *test, struct error *err)
{
    if (test->incomplete)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for a self-test");
    return STATUS_OK;
}

NODISCARD static enum status choose_weights(struct self_test *test, struct weights *weights,
                                            const char *name, struct error *err)
{
    if (name[0] == '\0') {
        weights_visit(weights, add_weight, test);
        if (test->verdicts_n == 0 && !test->incomplete)
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "no weight is resident, so there is nothing to test");
        return all_chosen(test, err);
    }
    struct weight *weight = weights_get(weights, name, strlen(name));
    if (!weight)
        return error_field(err, STATUS_NOT_FOUND, "weight", "\"%s\" is not resident", name);
    add_weight(test, weight);
    weight_unref(weight);
    return all_chosen(test, err);
}

static void on_self_test(struct call *call, grpc_byte_buffer *bytes)
{
    const struct service_context *context = call_context(call);
    Einsum__V1__SelfTestRequest *request =
        service_unpack(call, &einsum__v1__self_test_request__descriptor, bytes);
    if (!request)
        return;
    struct self_test *test = calloc(1, sizeof *test);
    if (!test) {
        service_no_memory(call, "a self-test");
        message_free(&request->base);
        return;
    }
    call_set_state(call, test);
    struct error err;
    enum status status = engine_kernel_find(context->engine_ops, context->engine, request->kernel,
                                            &test->verify.kernel, &err);
    test->verify.batcher = context->batcher;
    test->verify.ops = context->engine_ops;
    test->verify.engine = context->engine;
    if (status == STATUS_OK)
        status = choose_weights(test, context->weights, request->weight, &err);
    message_free(&request->base);
    if (status == STATUS_OK)
        service_task_start(&test->task, call, run_self_test);
    else
        call_finish(call, NULL, &err);
}

static Einsum__V1__SelfTestResult describe_verdict(struct verdict *verdict)
{
    const struct selftest_verdict *judged = &verdict->result.verdict;
    Einsum__V1__SelfTestResult message = EINSUM__V1__SELF_TEST_RESULT__INIT;
    message.weight = verdict->weight->name;
    message.passed = verdict->error.status == STATUS_OK && judged->passed;
    message.message =
        verdict->error.status == STATUS_OK ? verdict->result.verdict.message : verdict->error.text;
    message.worst_error_ratio = judged->worst_error_ratio;
    message.elements_checked = judged->elements_checked;
    message.duration_ns = verdict->result.duration_ns;
    if (!message.passed)
        LOG(ERROR, "self-test failed", LOG_STR("weight", message.weight),
            LOG_STR("reason", message.message));
    return message;
}

static void on_self_test_wake(struct call *call)
{
    struct self_test *test = call_state(call);
    if (!service_task_done(&test->task))
        return;
    Einsum__V1__SelfTestResult *results = calloc(test->verdicts_n, sizeof *results);
    Einsum__V1__SelfTestResult **pointers = calloc(test->verdicts_n, sizeof *pointers);
    if (!results || !pointers) {
        service_no_memory(call, "the results of a self-test");
        goto free_messages;
    }
    Einsum__V1__SelfTestResponse response = EINSUM__V1__SELF_TEST_RESPONSE__INIT;
    response.passed = test->judged_n == test->verdicts_n;
    for (size_t i = 0; i < test->judged_n; i++) {
        results[i] = describe_verdict(&test->verdicts[i]);
        pointers[i] = &results[i];
        response.passed = response.passed && results[i].passed;
    }
    response.results = pointers;
    response.n_results = test->judged_n;
    call_finish(call, message_pack(&response.base), NULL);

free_messages:
    free(pointers);
    free(results);
}

static void on_self_test_end(struct call *call)
{
    struct self_test *test = call_state(call);
    if (!test)
        return;
    for (size_t i = 0; i < test->verdicts_n; i++)
        weight_unref(test->verdicts[i].weight);
    free(test->verdicts);
    free(test);
}

const struct method service_info_methods[] = {
    {.path = "/einsum.v1.Einsum/ServerInfo", .needs = ACCESS_READ, .on_message = on_server_info},
    {
        .path = "/einsum.v1.Einsum/SelfTest",
        .needs = ACCESS_INFER,
        .on_message = on_self_test,
        .on_wake = on_self_test_wake,
        .on_end = on_self_test_end,
    },
    {0},
};
