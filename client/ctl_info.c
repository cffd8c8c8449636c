// info, health and selftest: what a person asks first.

#include "ctl.h"

#include <string.h>

static const struct ctl_option no_options[] = {{0}};

// ---- info ---------------------------------------------------------------------------------------

static json_t *counters_json(const struct einsum_client_info *info)
{
    const struct {
        const char *name;
        uint64_t value;
    } counters[] = {
        {"requests", info->counters.requests},
        {"answered", info->counters.answered},
        {"refused", info->counters.refused},
        {"invalid", info->counters.invalid},
        {"expired", info->counters.expired},
        {"cancelled", info->counters.cancelled},
        {"failed", info->counters.failed},
        {"batches", info->counters.batches},
        {"batch_tokens", info->counters.batch_tokens},
        {"batch_padding_tokens", info->counters.batch_padding_tokens},
        {"batch_requests", info->counters.batch_requests},
        {"busy_ns", info->counters.busy_ns},
        {"connections", info->counters.connections},
        {"connections_refused", info->counters.connections_refused},
        {"queue_ns", info->counters.queue_ns},
        {"phase_batches", info->counters.phase_batches},
        {"copy_in_ns", info->counters.copy_in_ns},
        {"kernel_ns", info->counters.kernel_ns},
        {"copied_in_bytes", info->counters.copied_in_bytes},
        {"copied_out_bytes", info->counters.copied_out_bytes},
        {"shared_requests", info->counters.shared_requests},
        {"ring_requests", info->counters.ring_requests},
        {"copy_out_ns", info->counters.copy_out_ns},
        {"graph_replays", info->counters.graph_replays},
        {"eager_launches", info->counters.eager_launches},
    };
    json_t *json = json_object();
    for (size_t i = 0; i < ARRAY_LEN(counters); i++)
        json_object_set_new(json, counters[i].name, json_integer((json_int_t)counters[i].value));
    json_t *buckets = json_array();
    for (uint32_t i = 0; i < info->buckets_n; i++)
        json_array_append_new(buckets, json_integer((json_int_t)info->counters.bucket_batches[i]));
    json_object_set_new(json, "bucket_batches", buckets);
    return json;
}

static json_t *memory_json(const struct einsum_client_info *info)
{
    json_t *graphs = json_array();
    for (uint32_t i = 0; i < info->memory.graphs_n; i++)
        json_array_append_new(graphs,
                              json_pack("{s:I, s:I, s:I}", "bucket",
                                        (json_int_t)info->memory.graphs[i].bucket, "graphs",
                                        (json_int_t)info->memory.graphs[i].graphs, "device_bytes",
                                        (json_int_t)info->memory.graphs[i].device_bytes));
    return json_pack(
        "{s:I, s:I, s:I, s:I, s:I, s:o}", "weights_bytes", (json_int_t)info->memory.weights_bytes,
        "batches_bytes", (json_int_t)info->memory.batches_bytes, "scratch_bytes",
        (json_int_t)info->memory.scratch_bytes, "lanes_bytes", (json_int_t)info->memory.lanes_bytes,
        "graphs_bytes", (json_int_t)info->memory.graphs_bytes, "graphs", graphs);
}

static json_t *limits_json(const struct einsum_client_info *info)
{
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}",
                     "request_tokens_max", (json_int_t)info->limits.request_tokens_max,
                     "batch_tokens_max", (json_int_t)info->limits.batch_tokens_max,
                     "request_bytes_max", (json_int_t)info->limits.request_bytes_max,
                     "reply_bytes_max", (json_int_t)info->limits.reply_bytes_max,
                     "queue_requests_max", (json_int_t)info->limits.queue_requests_max,
                     "queue_bytes_max", (json_int_t)info->limits.queue_bytes_max, "connections_max",
                     (json_int_t)info->limits.connections_max, "stream_requests_max",
                     (json_int_t)info->limits.stream_requests_max, "deadline_ms_max",
                     (json_int_t)info->limits.deadline_ms_max, "connection_requests_max",
                     (json_int_t)info->limits.connection_requests_max, "cut_bytes_max",
                     (json_int_t)info->limits.cut_bytes_max);
}

// null: not offered.
static json_t *shared_memory_json(const struct einsum_client_info *info)
{
    if (!info->shared_memory.socket[0])
        return json_null();
    return json_pack("{s:s, s:b, s:b, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}",
                     "socket", info->shared_memory.socket, "direct", info->shared_memory.direct,
                     "cuda", info->shared_memory.cuda, "connections_max",
                     (json_int_t)info->shared_memory.connections_max, "connection_regions_max",
                     (json_int_t)info->shared_memory.connection_regions_max, "regions_max",
                     (json_int_t)info->shared_memory.regions_max, "ring_entries_max",
                     (json_int_t)info->shared_memory.ring_entries_max, "region_bytes_max",
                     (json_int_t)info->shared_memory.region_bytes_max, "regions_bytes_max",
                     (json_int_t)info->shared_memory.regions_bytes_max, "connections",
                     (json_int_t)info->shared_memory.connections, "regions",
                     (json_int_t)info->shared_memory.regions, "rings",
                     (json_int_t)info->shared_memory.rings, "connections_refused",
                     (json_int_t)info->shared_memory.connections_refused, "regions_bytes",
                     (json_int_t)info->shared_memory.regions_bytes);
}

static json_t *info_json(const struct einsum_client_info *info)
{
    json_t *buckets = json_array();
    for (uint32_t i = 0; i < info->buckets_n; i++)
        json_array_append_new(buckets, json_integer(info->buckets[i]));
    json_t *kernels = json_array();
    for (uint32_t i = 0; i < info->kernels_n; i++)
        json_array_append_new(kernels, json_string(info->kernels[i]));
    json_t *libraries = json_object();
    for (uint32_t i = 0; i < info->libraries_n; i++)
        json_object_set_new(libraries, info->libraries[i].name,
                            json_string(info->libraries[i].version));
    return json_pack(
        "{s:s, s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "version",
        info->version, "state", info->state, "engine", info->engine, "device", info->device,
        "kernel", info->kernel, "engine_threads", (json_int_t)info->engine_threads, "lanes",
        (json_int_t)info->lanes, "uptime_ns", (json_int_t)info->uptime_ns, "buckets", buckets,
        "limits", limits_json(info), "memory", memory_json(info), "counters", counters_json(info),
        "libraries", libraries, "kernels", kernels, "shared_memory", shared_memory_json(info));
}

static void print_memory(const struct einsum_client_info *info)
{
    char a[CTL_TEXT_BYTES], b[CTL_TEXT_BYTES], c[CTL_TEXT_BYTES];
    printf("memory      weights %s, batches %s, scratch %s",
           ctl_bytes(info->memory.weights_bytes, a), ctl_bytes(info->memory.batches_bytes, b),
           ctl_bytes(info->memory.scratch_bytes, c));
    if (info->memory.graphs_n > 0)
        printf(", lanes %s\ngraphs      %s:", ctl_bytes(info->memory.lanes_bytes, a),
               ctl_bytes(info->memory.graphs_bytes, b));
    for (uint32_t i = 0; i < info->memory.graphs_n; i++)
        printf("%s %u of %u tokens %s", i ? "," : "", info->memory.graphs[i].graphs,
               info->memory.graphs[i].bucket, ctl_bytes(info->memory.graphs[i].device_bytes, a));
    printf("\n");
}

static void print_shared_memory(const struct einsum_client_info *info)
{
    char a[CTL_TEXT_BYTES], b[CTL_TEXT_BYTES];
    if (info->shared_memory.socket[0])
        printf("shared      by unix:%s: %u connections, %u regions (%s of %s), %u rings%s\n",
               info->shared_memory.socket, info->shared_memory.connections,
               info->shared_memory.regions, ctl_bytes(info->shared_memory.regions_bytes, a),
               ctl_bytes(info->shared_memory.regions_bytes_max, b), info->shared_memory.rings,
               info->shared_memory.cuda ? ", CUDA memory too" : "");
}

static void print_info(const struct einsum_client_info *info)
{
    char a[CTL_TEXT_BYTES], b[CTL_TEXT_BYTES];
    printf("einsumd %s, %s, up %s\n", info->version, info->state, ctl_duration(info->uptime_ns, a));
    printf("engine      %s, %u threads, %u lanes\n", info->engine, info->engine_threads,
           info->lanes);
    printf("device      %s\n", info->device);
    printf("kernel      %s\n", info->kernel);
    printf("to choose  ");
    for (uint32_t i = 0; i < info->kernels_n; i++)
        printf(" %s", info->kernels[i]);
    printf("\nbuckets    ");
    for (uint32_t i = 0; i < info->buckets_n; i++)
        printf(" %u", info->buckets[i]);
    printf("\n");
    print_memory(info);
    printf("limits      %u tokens a request, %u a batch; request %s, reply %s; deadline %u ms\n",
           info->limits.request_tokens_max, info->limits.batch_tokens_max,
           ctl_bytes(info->limits.request_bytes_max, a), ctl_bytes(info->limits.reply_bytes_max, b),
           info->limits.deadline_ms_max);
    printf("            %s held by requests that are cut into parts\n",
           ctl_bytes(info->limits.cut_bytes_max, a));
    printf(
        "            %u requests queued (%s), %u connections, %u calls on each, %u on a stream\n",
        info->limits.queue_requests_max, ctl_bytes(info->limits.queue_bytes_max, a),
        info->limits.connections_max, info->limits.connection_requests_max,
        info->limits.stream_requests_max);
    print_shared_memory(info);
    printf("requests    %llu: %llu answered, %llu refused, %llu invalid, %llu late, %llu "
           "cancelled, %llu failed\n",
           (unsigned long long)info->counters.requests, (unsigned long long)info->counters.answered,
           (unsigned long long)info->counters.refused, (unsigned long long)info->counters.invalid,
           (unsigned long long)info->counters.expired, (unsigned long long)info->counters.cancelled,
           (unsigned long long)info->counters.failed);
    printf("batches     %llu, of %llu requests and %llu tokens, padded by %llu; busy %s\n",
           (unsigned long long)info->counters.batches,
           (unsigned long long)info->counters.batch_requests,
           (unsigned long long)info->counters.batch_tokens,
           (unsigned long long)info->counters.batch_padding_tokens,
           ctl_duration(info->counters.busy_ns, a));
    printf("connections %u open, %llu refused\n", info->counters.connections,
           (unsigned long long)info->counters.connections_refused);
    printf("libraries  ");
    for (uint32_t i = 0; i < info->libraries_n; i++)
        printf(" %s %s", info->libraries[i].name, info->libraries[i].version);
    printf("\n");
}

static enum ctl_exit run_info(struct ctl *ctl, const struct ctl_args *args)
{
    (void)args;
    if (!ctl_connect(ctl, NULL))
        return CTL_USAGE;
    struct einsum_client_info info;
    struct einsum_client_error error;
    if (einsum_client_server_info(ctl->client, &info, &error) != EINSUM_CLIENT_OK)
        return ctl_fail(ctl, &error);
    if (ctl->json)
        ctl_print_json(info_json(&info));
    else
        print_info(&info);
    return CTL_OK;
}

const struct ctl_command ctl_command_info = {
    .name = "info",
    .operands = "",
    .summary = "what runs there: engine, device, limits, memory, counters",
    .help =
        "Prints what the server says of itself: version, state, engine, device and kernel, the\n"
        "kernels that a request may name, token buckets, memory, limits, counters since its "
        "start,\n"
        "libraries.\n\n"
        "  einsumctl info\n"
        "  einsumctl info --json | jq .counters.refused",
    .options = no_options,
    .run = run_info,
};

// ---- health -------------------------------------------------------------------------------------

static enum ctl_exit run_health(struct ctl *ctl, const struct ctl_args *args)
{
    static const char *const names[] = {"UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"};
    struct einsum_client_options options;
    ctl_client_options(ctl, &options);
    options.attempts_max = 1; // a probe tells how it is now
    if (!ctl_connect(ctl, &options))
        return CTL_USAGE;
    const char *service = args->operands_n ? args->operands[0] : "";
    enum einsum_client_health health;
    struct einsum_client_error error;
    if (einsum_client_check_health(ctl->client, service, &health, &error) != EINSUM_CLIENT_OK)
        return ctl_fail(ctl, &error);
    const char *name = (size_t)health < ARRAY_LEN(names) ? names[health] : names[0];
    if (ctl->json)
        ctl_print_json(json_pack("{s:s, s:s}", "service", service, "status", name));
    else
        printf("%s\n", name);
    return health == EINSUM_CLIENT_HEALTH_SERVING ? CTL_OK : CTL_FAILED;
}

const struct ctl_command ctl_command_health = {
    .name = "health",
    .operands = "[SERVICE]",
    .summary = "exit 0 if it serves; for probes and scripts",
    .help =
        "Asks grpc.health.v1 once: prints SERVING and exits 0, or prints what it is and exits 1.\n"
        "Without SERVICE, of the server as a whole.\n\n"
        "  einsumctl health\n"
        "  einsumctl --timeout 500 health einsum.v1.Einsum",
    .options = no_options,
    .operands_max = 1,
    .run = run_health,
};

// ---- selftest -----------------------------------------------------------------------------------

enum { OPT_KERNEL };
static const struct ctl_option selftest_options[] = {[OPT_KERNEL] = CTL_OPTION_KERNEL, {0}};

struct selftest_output {
    const struct ctl *ctl;
    json_t *results;
};

static void on_result(void *context, const struct einsum_client_selftest_result *result)
{
    struct selftest_output *output = context;
    if (output->ctl->json) {
        json_array_append_new(
            output->results,
            json_pack("{s:s, s:b, s:o, s:I, s:I, s:s}", "weight", result->weight, "passed",
                      result->passed, "worst_error_ratio", ctl_real_json(result->worst_error_ratio),
                      "elements_checked", (json_int_t)result->elements_checked, "duration_ns",
                      (json_int_t)result->duration_ns, "message", result->message));
        return;
    }
    char took[CTL_TEXT_BYTES];
    printf("%-6s %-40s error %.3f of allowed, %u outputs, %s%s%s\n",
           result->passed ? "ok" : "WRONG", result->weight, result->worst_error_ratio,
           result->elements_checked, ctl_duration(result->duration_ns, took),
           result->message[0] ? ": " : "", result->message);
}

static enum ctl_exit run_selftest(struct ctl *ctl, const struct ctl_args *args)
{
    if (!ctl_connect(ctl, NULL))
        return CTL_USAGE;
    struct selftest_output output = {.ctl = ctl, .results = json_array()};
    bool passed;
    struct einsum_client_error error;
    enum einsum_client_status status =
        einsum_client_self_test(ctl->client, args->operands_n ? args->operands[0] : NULL,
                                ctl_value(args, OPT_KERNEL), &passed, on_result, &output, &error);
    if (status != EINSUM_CLIENT_OK) {
        json_decref(output.results);
        return ctl_fail(ctl, &error);
    }
    if (ctl->json) {
        ctl_print_json(json_pack("{s:b, s:o}", "passed", passed, "results", output.results));
    } else {
        json_decref(output.results);
        printf("%s\n", passed ? "passed" : "FAILED");
    }
    return passed ? CTL_OK : CTL_FAILED;
}

const struct ctl_command ctl_command_selftest = {
    .name = "selftest",
    .operands = "[WEIGHT]",
    .summary = "the server checks its own numbers, with every weight or one",
    .help = "Has the server run known activations with every resident weight, or one, and compare "
            "with\n"
            "answers that it computed in FP64 at load. Exits 1 if one is wrong.\n\n"
            "  einsumctl selftest\n"
            "  einsumctl selftest layers.3.attn.wo_a --kernel portable",
    .options = selftest_options,
    .operands_max = 1,
    .run = run_selftest,
};
