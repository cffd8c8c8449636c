// bench: the load generator's options, and its result as text or JSON.

#include "bench.h"
#include "ctl.h"
#include "ctl_attention.h"
#include "ctl_plot.h"

#include <stdlib.h>
#include <string.h>

enum {
    OPT_CONCURRENCY,
    OPT_STREAM,
    OPT_RATE,
    OPT_TOKENS,
    OPT_WEIGHT,
    OPT_DURATION,
    OPT_REQUESTS,
    OPT_WARMUP,
    OPT_CONNECTIONS,
    OPT_MIXED,
    OPT_ACTIVATIONS,
    OPT_SCALES,
    OPT_SCALE_TYPE,
    OPT_OUTPUT,
    OPT_DIGEST,
    OPT_ATTENTION,
    OPT_RETRY,
    OPT_SEED,
    OPT_KERNEL,
    OPT_TRANSPORT,
    OPT_CHECKSUMS,
    OPT_SPIN,
    OPT_PRIORITY,
    OPT_PLOT,
};

static const struct ctl_option options[] = {
    [OPT_CONCURRENCY] = {"concurrency", "N",
                         "requests in flight; default 8; with --rate the most, default 4096"},
    [OPT_STREAM] = {"stream", NULL, "over one stream for each connection; default unary calls"},
    [OPT_RATE] = {"rate", "R", "open loop: so many a second, at random; default closed loop"},
    [OPT_TOKENS] = {"tokens", "LIST", "tokens of a request, several in turn; default 1"},
    [OPT_WEIGHT] = {"weight", "NAME", "may be repeated; default all resident weights in turn"},
    [OPT_DURATION] = {"duration", "S", "seconds to measure; default 10"},
    [OPT_REQUESTS] = {"requests", "N", "end after so many, if sooner; default no such end"},
    [OPT_WARMUP] = {"warmup", "S", "seconds before measuring; default 1"},
    [OPT_CONNECTIONS] = {"connections", "N", "default 1"},
    [OPT_MIXED] = {"mixed", NULL, "all layouts and types in turn; default those below"},
    [OPT_ACTIVATIONS] = {"activation-layout", "L", "tgr (default) or gtr"},
    [OPT_SCALES] = {"scale-layout", "L", "tgk (default) or gkt"},
    [OPT_SCALE_TYPE] = {"scale-type", "T", "fp32 or ue8m0 (default)"},
    [OPT_OUTPUT] = {"output-type", "T", "bf16 (default) or fp32"},
    [OPT_DIGEST] = {"digest", NULL, "ask for digests in place of outputs"},
    [OPT_ATTENTION] = {"attention", NULL,
                       "send attention's output and positions, to weights that take them"},
    [OPT_RETRY] = {"retry", NULL,
                   "try again what the server refuses, as --retry-ms does; default count it"},
    [OPT_SEED] = {"seed", "N", "default 1"},
    [OPT_KERNEL] = CTL_OPTION_KERNEL,
    [OPT_TRANSPORT] = CTL_OPTION_TRANSPORT,
    [OPT_CHECKSUMS] = CTL_OPTION_CHECKSUMS,
    [OPT_SPIN] = {"spin", "US",
                  "of a ring: microseconds to look for an answer before sleeping; default 50"},
    [OPT_PRIORITY] = {"priority", "P", "low, normal (default) or high"},
    [OPT_PLOT] = {"plot", "FILE.png",
                  "draw latency by percentile and calls a second over time, by gnuplot"},
    {0},
};

struct bench_command {
    struct ctl *ctl;
    struct bench_options bench;
    struct einsum_client_options client;
    struct einsum_client_weights weights;
    struct ctl_progress progress;
    struct einsum_client_info before, after; // what the server says around the run
    const char *plot;                        // file; NULL: none
    struct ctl_plot_points points;           // of it
};

// ---- options ------------------------------------------------------------------------------------

static bool read_layouts(const struct ctl_args *args, struct bench_options *bench)
{
    bool mixed = ctl_has(args, OPT_MIXED);
    int activations = mixed ? 0 : 1, scales = mixed ? 0 : 1, scale_type = mixed ? 0 : 2;
    int output = mixed ? 0 : 1, priority = 2;
    if (!ctl_word(args, OPT_ACTIVATIONS, ctl_activation_layouts, &activations) ||
        !ctl_word(args, OPT_SCALES, ctl_scale_layouts, &scales) ||
        !ctl_word(args, OPT_SCALE_TYPE, ctl_scale_types, &scale_type) ||
        !ctl_word(args, OPT_OUTPUT, ctl_output_types, &output) ||
        !ctl_word(args, OPT_PRIORITY, ctl_priorities, &priority))
        return false;
    bench->activation_layout = (enum einsum_client_activation_layout)activations;
    bench->scale_layout = (enum einsum_client_scale_layout)scales;
    bench->scale_type = (enum einsum_client_scale_type)scale_type;
    bench->output_type = (enum einsum_client_output_type)output;
    bench->digest_only = ctl_has(args, OPT_DIGEST);
    bench->attention = ctl_has(args, OPT_ATTENTION);
    bench->kernel = ctl_value(args, OPT_KERNEL);
    bench->priority = (enum einsum_client_priority)priority;
    return true;
}

static bool read_options(const struct ctl_args *args, struct bench_command *command)
{
    struct bench_options *bench = &command->bench;
    double duration = 10, warmup = 1;
    uint64_t connections = 1, spin_us = 50;
    if (!ctl_real(args, OPT_RATE, 1e-3, 1e9, &bench->rate))
        return false;
    uint64_t concurrency = bench->rate > 0 ? 4096 : 8;
    const char *tokens = ctl_value(args, OPT_TOKENS);
    bench->tokens_n =
        ctl_number_list("tokens", tokens ? tokens : "1", 1, 65536, bench->tokens, BENCH_TOKENS_MAX);
    if (bench->tokens_n == 0 || !read_layouts(args, bench) ||
        !ctl_number(args, OPT_CONCURRENCY, 1, BENCH_CONCURRENCY_MAX, &concurrency) ||
        !ctl_real(args, OPT_DURATION, 0.01, 86400, &duration) ||
        !ctl_real(args, OPT_WARMUP, 0, 3600, &warmup) ||
        !ctl_number(args, OPT_REQUESTS, 1, UINT64_MAX, &bench->requests_max) ||
        !ctl_number(args, OPT_CONNECTIONS, 1, 4096, &connections) ||
        !ctl_number(args, OPT_SEED, 0, UINT64_MAX, &bench->seed))
        return false;
    bench->concurrency = (uint32_t)concurrency;
    bench->duration_ns = (uint64_t)(duration * 1e9);
    bench->warmup_ns = (uint64_t)(warmup * 1e9);
    ctl_client_options(command->ctl, &command->client);
    command->client.connections = (uint32_t)connections;
    if (!ctl_transport(args, OPT_TRANSPORT, &command->client) ||
        !ctl_number(args, OPT_SPIN, 0, 10000, &spin_us))
        return false;
    command->client.spin_us = (uint32_t)spin_us;
    command->client.checksums = ctl_has(args, OPT_CHECKSUMS);
    if (!ctl_has(args, OPT_RETRY) && !command->ctl->retry_ms)
        command->client.attempts_max = 1;
    uint64_t streams = connections < concurrency ? connections : concurrency;
    bench->streams = ctl_has(args, OPT_STREAM) ? (uint32_t)streams : 0;
    return true;
}

static void keep_what_takes_attention(struct einsum_client_weights *weights)
{
    size_t kept = 0;
    for (size_t i = 0; weights->items && i < weights->items_n; i++)
        if (ctl_takes_attention(&weights->items[i]))
            weights->items[kept++] = weights->items[i];
    weights->items_n = kept;
}

// Keeps of all resident weights those that are named, if any are.
static enum ctl_exit choose_weights(const struct ctl_args *args, struct bench_command *command)
{
    struct einsum_client_error error;
    const char *names[CTL_GIVEN_MAX];
    size_t names_n = ctl_values(args, OPT_WEIGHT, names);
    if (names_n == 0) {
        if (einsum_client_list_weights(command->ctl->client, &command->weights, &error) !=
            EINSUM_CLIENT_OK)
            return ctl_fail(command->ctl, &error);
    } else {
        command->weights.items = calloc(names_n, sizeof *command->weights.items);
        for (size_t i = 0; command->weights.items && i < names_n; i++) {
            if (einsum_client_get_weight(command->ctl->client, names[i], &command->weights.items[i],
                                         &error) != EINSUM_CLIENT_OK)
                return ctl_fail(command->ctl, &error);
            command->weights.items_n++;
        }
    }
    if (command->bench.attention)
        keep_what_takes_attention(&command->weights);
    if (command->weights.items_n == 0) {
        struct error none;
        error_set(&none, STATUS_FAILED_PRECONDITION,
                  command->bench.attention
                      ? "none of these weights takes attention: no rope, or no "
                        "whole heads"
                      : "the server has no weight loaded");
        return ctl_fail_local(command->ctl, &none);
    }
    command->bench.weights = command->weights.items;
    command->bench.weights_n = command->weights.items_n;
    return CTL_OK;
}

// ---- the result ---------------------------------------------------------------------------------

static double per_s(uint64_t amount, const struct bench_result *result)
{
    return result->elapsed_ns ? (double)amount * 1e9 / (double)result->elapsed_ns : 0;
}

static double mean(uint64_t sum, const struct bench_result *result)
{
    return result->calls ? (double)sum / (double)result->calls : 0;
}

static uint64_t failures(const struct bench_result *result)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < BENCH_STATUSES; i++)
        sum += result->failed[i];
    return sum;
}

static int by_bucket(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b; // `bucket` comes first
    return (x > y) - (x < y);
}

static void print_result(const struct bench_options *bench, const struct bench_result *result)
{
    const struct bench_histogram *latency = &result->latency;
    const struct {
        const char *name;
        uint64_t ns;
    } points[] = {
        {"p50", bench_histogram_at(latency, 0.5)},
        {"p90", bench_histogram_at(latency, 0.9)},
        {"p99", bench_histogram_at(latency, 0.99)},
        {"p99.9", bench_histogram_at(latency, 0.999)},
        {"max", latency->max},
    };
    if (bench->rate > 0)
        printf("open loop   %.6g a second meant, at most %u in flight", bench->rate,
               bench->concurrency);
    else
        printf("closed loop %u in flight", bench->concurrency);
    printf("%s by %s, %zu weights, %.1f s%s\n", bench->streams ? ", streamed" : "",
           einsum_client_transport_name(einsum_client_transport(bench->client)), bench->weights_n,
           (double)result->elapsed_ns / 1e9, result->interrupted ? ", interrupted" : "");
    printf("calls       %.0f /s   tokens %.0f /s   %llu calls\n", per_s(result->calls, result),
           per_s(result->tokens, result), (unsigned long long)result->calls);
    printf("tensors     %.1f MB/s sent, %.1f MB/s received\n",
           per_s(result->sent_bytes, result) / 1e6, per_s(result->received_bytes, result) / 1e6);
    printf("latency    ");
    for (size_t i = 0; i < ARRAY_LEN(points); i++) {
        char text[CTL_TEXT_BYTES];
        printf(" %s %s%s", points[i].name, ctl_duration(points[i].ns, text),
               i + 1 < ARRAY_LEN(points) ? "," : "\n");
    }
    char queue[CTL_TEXT_BYTES], run[CTL_TEXT_BYTES];
    printf("batches     %.1f requests, %.1f tokens on average; queued %s, run %s; buckets",
           mean(result->batch_requests, result), mean(result->batch_tokens, result),
           ctl_duration((uint64_t)mean(result->queue_ns, result), queue),
           ctl_duration((uint64_t)mean(result->run_ns, result), run));
    for (uint32_t i = 0; i < result->buckets_n; i++)
        printf(" %u: %.0f %%", result->buckets[i].bucket,
               100 * mean(result->buckets[i].calls, result));
    printf("\nerrors      %llu", (unsigned long long)failures(result));
    for (size_t i = 0; i < BENCH_STATUSES; i++) {
        if (result->failed[i])
            printf("  %s %llu", einsum_client_status_name((enum einsum_client_status)i),
                   (unsigned long long)result->failed[i]);
    }
    if (failures(result))
        printf("; the last: %s", result->last_error.text);
    printf("\n");
}

// What the server did meanwhile, by its own counters: the warm-up and other callers included.
struct server_share {
    uint64_t batches, phase_batches, graph_replays, eager_launches;
    double queue_ns, copy_in_ns, kernel_ns, copy_out_ns; // means of a batch; 0 if none was timed
};

static double mean_of(uint64_t before, uint64_t after, uint64_t n)
{
    return n ? (double)(after - before) / (double)n : 0;
}

static struct server_share server_share(const struct bench_command *command)
{
    const struct einsum_client_info *was = &command->before, *is = &command->after;
    uint64_t batches = is->counters.batches - was->counters.batches;
    uint64_t timed = is->counters.phase_batches - was->counters.phase_batches;
    return (struct server_share){
        .batches = batches,
        .phase_batches = timed,
        .graph_replays = is->counters.graph_replays - was->counters.graph_replays,
        .eager_launches = is->counters.eager_launches - was->counters.eager_launches,
        .queue_ns = mean_of(was->counters.queue_ns, is->counters.queue_ns, batches),
        .copy_in_ns = mean_of(was->counters.copy_in_ns, is->counters.copy_in_ns, timed),
        .kernel_ns = mean_of(was->counters.kernel_ns, is->counters.kernel_ns, timed),
        .copy_out_ns = mean_of(was->counters.copy_out_ns, is->counters.copy_out_ns, timed),
    };
}

static uint64_t bucket_batches(const struct bench_command *command, uint32_t i)
{
    return command->after.counters.bucket_batches[i] - command->before.counters.bucket_batches[i];
}

static void print_server(const struct bench_command *command)
{
    struct server_share share = server_share(command);
    char queue[CTL_TEXT_BYTES], in[CTL_TEXT_BYTES], kernel[CTL_TEXT_BYTES], out[CTL_TEXT_BYTES];
    printf("phases      a batch: queued %s, copy in %s, kernel %s, copy out %s; %llu timed\n",
           ctl_duration((uint64_t)share.queue_ns, queue),
           ctl_duration((uint64_t)share.copy_in_ns, in),
           ctl_duration((uint64_t)share.kernel_ns, kernel),
           ctl_duration((uint64_t)share.copy_out_ns, out), (unsigned long long)share.phase_batches);
    printf("server      %llu batches, %llu graph replays, %llu eager launches; by bucket",
           (unsigned long long)share.batches, (unsigned long long)share.graph_replays,
           (unsigned long long)share.eager_launches);
    for (uint32_t i = 0; i < command->after.buckets_n; i++)
        if (bucket_batches(command, i))
            printf(" %u: %llu", command->after.buckets[i],
                   (unsigned long long)bucket_batches(command, i));
    printf("\n");
}

static json_t *server_json(const struct bench_command *command)
{
    struct server_share share = server_share(command);
    json_t *buckets = json_object();
    for (uint32_t i = 0; i < command->after.buckets_n; i++) {
        char bucket[16];
        snprintf(bucket, sizeof bucket, "%u", command->after.buckets[i]);
        if (bucket_batches(command, i))
            json_object_set_new(buckets, bucket,
                                json_integer((json_int_t)bucket_batches(command, i)));
    }
    return json_pack("{s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:o}", "batches",
                     (json_int_t)share.batches, "phase_batches", (json_int_t)share.phase_batches,
                     "graph_replays", (json_int_t)share.graph_replays, "eager_launches",
                     (json_int_t)share.eager_launches, "queue_ns_mean", share.queue_ns,
                     "copy_in_ns_mean", share.copy_in_ns, "kernel_ns_mean", share.kernel_ns,
                     "copy_out_ns_mean", share.copy_out_ns, "buckets", buckets);
}

static json_t *latency_json(const struct bench_histogram *latency)
{
    return json_pack(
        "{s:I, s:I, s:I, s:I, s:I, s:I}", "p50", (json_int_t)bench_histogram_at(latency, 0.5),
        "p90", (json_int_t)bench_histogram_at(latency, 0.9), "p99",
        (json_int_t)bench_histogram_at(latency, 0.99), "p99_9",
        (json_int_t)bench_histogram_at(latency, 0.999), "max", (json_int_t)latency->max, "mean",
        (json_int_t)(latency->total ? latency->sum / latency->total : 0));
}

static json_t *result_json(const struct bench_command *command, const struct bench_result *result)
{
    const struct bench_options *bench = &command->bench;
    json_t *errors = json_object(), *buckets = json_object(), *tokens = json_array();
    for (size_t i = 0; i < BENCH_STATUSES; i++) {
        if (result->failed[i])
            json_object_set_new(errors, einsum_client_status_name((enum einsum_client_status)i),
                                json_integer((json_int_t)result->failed[i]));
    }
    for (uint32_t i = 0; i < result->buckets_n; i++) {
        char bucket[16];
        snprintf(bucket, sizeof bucket, "%u", result->buckets[i].bucket);
        json_object_set_new(buckets, bucket, json_integer((json_int_t)result->buckets[i].calls));
    }
    for (size_t i = 0; i < bench->tokens_n; i++)
        json_array_append_new(tokens, json_integer(bench->tokens[i]));
    return json_pack(
        "{s:s, s:s, s:b, s:I, s:f, s:o, s:I, s:I, s:b, s:I, s:f, s:f, s:f, s:f, s:o, s:o, s:I,"
        " s:{s:f, s:f, s:f, s:f, s:o}, s:o}",
        "loop", bench->rate > 0 ? "open" : "closed", "transport",
        einsum_client_transport_name(einsum_client_transport(bench->client)), "stream",
        bench->streams > 0, "concurrency", (json_int_t)bench->concurrency, "rate", bench->rate,
        "tokens", tokens, "weights", (json_int_t)bench->weights_n, "elapsed_ns",
        (json_int_t)result->elapsed_ns, "interrupted", result->interrupted, "calls",
        (json_int_t)result->calls, "calls_per_s", per_s(result->calls, result), "tokens_per_s",
        per_s(result->tokens, result), "sent_bytes_per_s", per_s(result->sent_bytes, result),
        "received_bytes_per_s", per_s(result->received_bytes, result), "latency_ns",
        latency_json(&result->latency), "errors", errors, "attempts", (json_int_t)result->attempts,
        "batch", "requests_mean", mean(result->batch_requests, result), "tokens_mean",
        mean(result->batch_tokens, result), "queue_ns_mean", mean(result->queue_ns, result),
        "run_ns_mean", mean(result->run_ns, result), "buckets", buckets, "server",
        server_json(command));
}

// ---- the command --------------------------------------------------------------------------------

static bool on_tick(void *context, double share_done, uint64_t calls)
{
    struct bench_command *command = context;
    char note[64];
    snprintf(note, sizeof note, "%llu calls", (unsigned long long)calls);
    ctl_progress_draw(&command->progress, (uint64_t)(share_done * 1000), 1000, note);
    if (calls > 0 || command->points.n > 0) // not of the warm-up
        ctl_plot_add(&command->points, now_ns(), calls);
    return !ctl_interrupted();
}

static bool draw(struct bench_command *command, const struct bench_result *result)
{
    struct ctl_plot_points *points = &command->points;
    if (points->n < 3) { // over too soon to have been looked at: as if its rate had been even
        points->n = 3;
        for (uint32_t i = 0; i < 3; i++)
            points->points[i] = (struct ctl_plot_point){.at_ns = i * result->elapsed_ns / 2,
                                                        .calls = i * result->calls / 2};
    }
    const struct bench_options *bench = &command->bench;
    char title[256];
    int n = snprintf(title, sizeof title, "einsumctl bench: %s%s, ",
                     einsum_client_transport_name(einsum_client_transport(bench->client)),
                     bench->streams ? ", streamed" : "");
    if (bench->rate > 0)
        n += snprintf(title + n, sizeof title - (size_t)n, "%.6g a second meant", bench->rate);
    else
        n += snprintf(title + n, sizeof title - (size_t)n, "%u in flight", bench->concurrency);
    snprintf(title + n, sizeof title - (size_t)n,
             ", %u%s tokens, %zu weights, engine %.32s: %.0f calls a second", bench->tokens[0],
             bench->tokens_n > 1 ? " ..." : "", bench->weights_n, command->after.engine,
             per_s(result->calls, result));
    return ctl_plot(command->plot, title, &result->latency, &command->points);
}

static enum ctl_exit measure(struct bench_command *command)
{
    static struct bench_result result; // large
    struct einsum_client *client = command->ctl->client;
    struct einsum_client_error error;
    if (einsum_client_server_info(client, &command->before, &error) != EINSUM_CLIENT_OK)
        return ctl_fail(command->ctl, &error);
    command->bench.zeros_allowed = strcmp(command->before.engine, "null") == 0;
    ctl_progress_init(&command->progress, command->ctl, "measuring");
    command->bench.client = client;
    command->bench.on_tick = on_tick;
    command->bench.context = command;
    ctl_catch_signals();
    enum einsum_client_status status = bench_run(&command->bench, &result, &error);
    ctl_progress_end(&command->progress);
    if (status == EINSUM_CLIENT_OK)
        status = einsum_client_server_info(client, &command->after, &error);
    if (status != EINSUM_CLIENT_OK)
        return ctl_fail(command->ctl, &error);
    qsort(result.buckets, result.buckets_n, sizeof *result.buckets, by_bucket);
    if (command->ctl->json)
        ctl_print_json(result_json(command, &result));
    else {
        print_result(&command->bench, &result);
        print_server(command);
    }
    bool drawn = !command->plot || draw(command, &result);
    return failures(&result) || result.interrupted || result.calls == 0 || !drawn ? CTL_FAILED
                                                                                  : CTL_OK;
}

static enum ctl_exit run_bench(struct ctl *ctl, const struct ctl_args *args)
{
    struct bench_command command = {.ctl = ctl, .bench.seed = 1};
    command.plot = ctl_value(args, OPT_PLOT);
    if (!read_options(args, &command) || (command.plot && !ctl_plot_possible(command.plot)) ||
        !ctl_connect(ctl, &command.client))
        return CTL_USAGE;
    enum ctl_exit code = choose_weights(args, &command);
    if (code == CTL_OK)
        code = measure(&command);
    einsum_client_weights_deinit(&command.weights);
    return code;
}

const struct ctl_command ctl_command_bench = {
    .name = "bench",
    .operands = "",
    .summary = "measure throughput and latency, closed or open loop",
    .help =
        "Checks first that each weight's reply matches its digest, then loads the server: in a\n"
        "closed loop of --concurrency requests in flight, or with --rate in an open loop, where\n"
        "latency counts from the moment at which a request was meant to be sent. Going round all\n"
        "weights keeps them out of caches, as serving does. Ends with what the server counted\n"
        "meanwhile, warm-up and other callers included: where batches spent their time, and how\n"
        "they were launched. Exits 1 if a call failed.\n\n"
        "  einsumctl bench --concurrency 32 --stream --tokens 1\n"
        "  einsumctl bench --rate 2000 --tokens 1,8,64 --mixed --duration 30 --json\n"
        "  einsumctl bench --tokens 8 --plot latency.png",
    .options = options,
    .run = run_bench,
};
