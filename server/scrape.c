// Writes the page family by family: HELP, TYPE, then the samples, as both formats ask for. Where
// the formats differ (the names of counters, the end mark) is in family(); all else is the same.
//
// Names follow Prometheus: the prefix, base units, _total for what only grows.
#include "scrape.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "batch.h"
#include "config.h"
#include "listener.h"
#include "log.h"
#include "service.h"
#include "sharing.h"
#include "weights.h"

const char *const scrape_content_types[] = {
    [SCRAPE_PROMETHEUS] = "text/plain; version=0.0.4; charset=utf-8",
    [SCRAPE_OPENMETRICS] = "application/openmetrics-text; version=1.0.0; charset=utf-8",
};

struct page {
    FILE *out;
    enum scrape_format format;
    struct service_context *context;
    const char *name; // of the family at hand
    struct metrics_values values;
    struct batcher_stats batches;
    struct engine_info engine;
};

enum type { COUNTER, GAUGE, HISTOGRAM };

// ---- the two formats

// `name` is that of the samples, a counter's with its _total.
static void family(struct page *page, const char *name, enum type type, const char *help)
{
    static const char *const types[] = {"counter", "gauge", "histogram"};
    size_t length = strlen(name);
    if (type == COUNTER && page->format == SCRAPE_OPENMETRICS)
        length -= strlen("_total");
    fprintf(page->out, "# HELP %.*s %s\n# TYPE %.*s %s\n", (int)length, name, help, (int)length,
            name, types[type]);
    page->name = name;
}

// `labels`: `a="b",c="d"`, or "".
static void sample_u64(struct page *page, const char *labels, uint64_t value)
{
    if (labels[0])
        fprintf(page->out, "%s{%s} %" PRIu64 "\n", page->name, labels, value);
    else
        fprintf(page->out, "%s %" PRIu64 "\n", page->name, value);
}

static void sample_f64(struct page *page, const char *labels, double value)
{
    if (labels[0])
        fprintf(page->out, "%s{%s} %.17g\n", page->name, labels, value);
    else
        fprintf(page->out, "%s %.17g\n", page->name, value);
}

static double seconds(uint64_t ns)
{
    return (double)ns / 1e9;
}

static void counter(struct page *page, const char *name, uint64_t value, const char *help)
{
    family(page, name, COUNTER, help);
    sample_u64(page, "", value);
}

static void gauge(struct page *page, const char *name, uint64_t value, const char *help)
{
    family(page, name, GAUGE, help);
    sample_u64(page, "", value);
}

static void counter_seconds(struct page *page, const char *name, uint64_t ns, const char *help)
{
    family(page, name, COUNTER, help);
    sample_f64(page, "", seconds(ns));
}

enum { LABELS_BYTES = 512 };

// One label of any text, escaped.
static void label(char labels[LABELS_BYTES], const char *key, const char *value)
{
    size_t used = strlen(labels);
    int n = snprintf(labels + used, LABELS_BYTES - used, "%s%s=\"", used ? "," : "", key);
    used += n > 0 ? (size_t)n : 0;
    for (; *value && used + 4 < LABELS_BYTES; value++) {
        if (*value == '\\' || *value == '"' || *value == '\n')
            labels[used++] = '\\';
        labels[used++] = *value == '\n' ? 'n' : *value;
    }
    ASSERT(used + 2 < LABELS_BYTES + 2);
    labels[used++] = '"';
    labels[used] = '\0';
}

static void bucket(struct page *page, const char *labels, const char *bound, uint64_t value)
{
    fprintf(page->out, "%s_bucket{%s%sle=\"%s\"} %" PRIu64 "\n", page->name, labels,
            labels[0] ? "," : "", bound, value);
}

static void sum_and_count(struct page *page, const char *labels, double sum, uint64_t n)
{
    const char *open = labels[0] ? "{" : "", *close = labels[0] ? "}" : "";
    fprintf(page->out, "%s_sum%s%s%s %.17g\n", page->name, open, labels, close, sum);
    fprintf(page->out, "%s_count%s%s%s %" PRIu64 "\n", page->name, open, labels, close, n);
}

static void sample_times(struct page *page, const char *labels,
                         const struct metrics_histogram *histogram)
{
    uint64_t n = 0;
    for (size_t i = 0; i < METRICS_TIME_BOUNDS; i++) {
        char bound[32];
        snprintf(bound, sizeof bound, "%g", seconds(metrics_time_bounds_ns[i]));
        if (strspn(bound, "0123456789") == strlen(bound)) // OpenMetrics: floats look like floats
            strcat(bound, ".0");
        n += histogram->buckets[i];
        bucket(page, labels, bound, n);
    }
    n += histogram->buckets[METRICS_TIME_BOUNDS];
    bucket(page, labels, "+Inf", n);
    sum_and_count(page, labels, seconds(histogram->sum_ns), n);
}

static void mix(struct page *page, const char *name, const struct batcher_mix *mix,
                const char *help)
{
    family(page, name, HISTOGRAM, help);
    uint64_t n = 0;
    for (unsigned i = 0; i < BATCH_MIX_BOUNDS; i++) {
        char bound[32];
        snprintf(bound, sizeof bound, "%u.0", 1u << i);
        n += mix->buckets[i];
        bucket(page, "", bound, n);
    }
    n += mix->buckets[BATCH_MIX_BOUNDS];
    bucket(page, "", "+Inf", n);
    sum_and_count(page, "", (double)mix->sum, n);
}

// ---- the families

static void write_daemon(struct page *page)
{
    struct service_context *context = page->context;
    char labels[LABELS_BYTES] = "";
    label(labels, "version", EINSUMD_VERSION);
    label(labels, "engine", context->engine_ops->name);
    label(labels, "device", page->engine.device);
    label(labels, "kernel", page->engine.kernel);
    family(page, "einsumd_build_info", GAUGE, "1; its labels say what runs here, and on what.");
    sample_u64(page, labels, 1);
    family(page, "einsumd_uptime_seconds", GAUGE, "Since the start.");
    sample_f64(page, "", seconds(now_ns() - context->started_ns));
    gauge(page, "einsumd_ready", service_not_ready(context) == NULL,
          "1 while /readyz says so; 0 while draining, or without the device.");
    gauge(page, "einsumd_device_lost", batcher_device_lost(context->batcher),
          "1 once the device has failed for good.");
    counter(page, "einsumd_log_lines_dropped_total", log_lines_dropped(),
            "Log lines that could not be written.");
}

static bool any(const uint64_t *values, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (values[i])
            return true;
    return false;
}

// OK is there from the start, the other codes from when they first occur.
static void sample_codes(struct page *page, const char *labels,
                         const uint64_t statuses[METRICS_STATUSES])
{
    for (unsigned status = 0; status < METRICS_STATUSES; status++) {
        if (status != STATUS_OK && statuses[status] == 0)
            continue;
        char with_code[LABELS_BYTES + 64];
        snprintf(with_code, sizeof with_code, "%s,code=\"%s\"", labels,
                 status_name((enum status)status));
        sample_u64(page, with_code, statuses[status]);
    }
}

static void write_requests(struct page *page)
{
    const struct metrics_values *values = &page->values;
    char labels[LABELS_BYTES];
    family(page, "einsumd_requests_total", COUNTER,
           "Projections that ended, by method, way in and gRPC code.");
    for (size_t method = 0; method < METRICS_METHODS; method++) {
        for (size_t transport = 0; transport < METRICS_TRANSPORTS; transport++) {
            snprintf(labels, sizeof labels, "method=\"%s\",transport=\"%s\"",
                     metrics_method_names[method], metrics_transport_names[transport]);
            sample_codes(page, labels, values->requests[method][transport]);
        }
    }
    counter(page, "einsumd_requests_received_total", values->received,
            "Projections that arrived, however they end.");
    counter(page, "einsumd_requests_shared_total", values->shared,
            "Of these, those with tensors in shared memory.");
    family(page, "einsumd_request_duration_seconds", HISTOGRAM,
           "From a projection's arrival, whole, to when its reply has left.");
    for (size_t method = 0; method < METRICS_METHODS; method++) {
        snprintf(labels, sizeof labels, "method=\"%s\"", metrics_method_names[method]);
        sample_times(page, labels, &values->durations[method]);
    }
    family(page, "einsumd_request_phase_seconds", HISTOGRAM,
           "The same by phase: receive (check), queue (for room, then for a lane), copy_in, kernel "
           "(in the engine), copy_out (wake-up and copy), send. They add up to the whole.");
    for (size_t phase = 0; phase < METRICS_PHASES; phase++) {
        snprintf(labels, sizeof labels, "phase=\"%s\"", metrics_phase_names[phase]);
        sample_times(page, labels, &values->phases[phase]);
    }
    const struct copy_counters *copies = &page->context->copies;
    family(
        page, "einsumd_copied_bytes_total", COUNTER,
        "Bytes of tensors that the host copied: in, to where the engine reads; out, from there.");
    sample_u64(page, "direction=\"in\"", atomic_load(&copies->in_bytes));
    sample_u64(page, "direction=\"out\"", atomic_load(&copies->out_bytes));
}

static void write_calls(struct page *page)
{
    family(page, "einsumd_grpc_calls_total", COUNTER,
           "gRPC calls of any kind that ended, by method and code; a stream is one call.");
    const struct metrics *metrics = page->context->metrics;
    for (uint32_t call = 0; call < metrics_calls_n(metrics); call++) {
        const uint64_t *statuses = page->values.calls[call];
        char labels[LABELS_BYTES] = "";
        label(labels, "method", metrics_call_name(metrics, call));
        if (call > 0 || any(statuses, METRICS_STATUSES)) // nobody need call unknown methods
            sample_codes(page, labels, statuses);
    }
    gauge(page, "einsumd_streams", page->values.streams_opened - page->values.streams_ended,
          "EinsumStream calls that are open.");
}

static void write_connections(struct page *page)
{
    const struct service_context *context = page->context;
    struct listener_stats listener = listener_stats(context->listener);
    gauge(page, "einsumd_connections", listener.connections, "Connections to `listen`, open.");
    gauge(page, "einsumd_connections_limit", context->config->connections_max,
          "connections_max; past these, new ones are closed.");
    counter(page, "einsumd_connections_accepted_total", listener.accepted,
            "Connections taken since the start.");
    struct sharing_stats sharing = {0};
    struct regions_stats regions = {0};
    struct rings_stats rings = {0};
    if (context->sharing) {
        sharing = sharing_stats(context->sharing);
        regions = regions_stats(context->regions);
        rings = rings_stats(context->rings);
    }
    gauge(page, "einsumd_shared_connections", sharing.connections,
          "Connections to `shared_memory_listen`, open.");
    gauge(page, "einsumd_shared_regions", regions.regions, "Regions of shared memory, mapped.");
    gauge(page, "einsumd_shared_rings", rings.rings, "Rings in shared memory.");

    const struct batcher_stats *batches = &page->batches;
    family(page, "einsumd_rejected_total", COUNTER,
           "What was turned away past a limit, or while draining: requests, calls, connections.");
    sample_u64(page, "reason=\"queue_requests\"", batches->refused[FULL_REQUESTS]);
    sample_u64(page, "reason=\"queue_bytes\"", batches->refused[FULL_BYTES]);
    sample_u64(page, "reason=\"batch_buffers\"", batches->refused[FULL_BUFFERS]);
    sample_u64(page, "reason=\"gave_way\"", batches->refused[FULL_GAVE_WAY]);
    sample_u64(page, "reason=\"calls\"", page->values.refused_calls);
    sample_u64(page, "reason=\"draining\"", page->values.refused_draining);
    sample_u64(page, "reason=\"connections\"", listener.refused);
    sample_u64(page, "reason=\"shared_connections\"", sharing.connections_refused);
}

static void write_queue(struct page *page)
{
    const struct batcher_stats *batches = &page->batches;
    const struct config *config = page->context->config;
    gauge(page, "einsumd_queue_requests", batches->queued,
          "Requests decoded and not yet launched.");
    gauge(page, "einsumd_queue_tokens", batches->queued_tokens, "Their tokens.");
    gauge(page, "einsumd_queue_bytes", batches->queued_bytes,
          "Their input, but for what lies in shared memory.");
    gauge(page, "einsumd_queue_requests_limit", config->queue_requests_max, "queue_requests_max.");
    gauge(page, "einsumd_batch_buffers", config->batches,
          "Buffers of batches: forming, running, being answered.");
    gauge(page, "einsumd_batch_buffers_free", batches->buffers_free, "Of these, free.");
    gauge(page, "einsumd_requests_in_flight", batches->jobs,
          "Requests that have room or wait for it, up to when their reply has left.");
}

static void write_batches(struct page *page)
{
    const struct batcher_stats *batches = &page->batches;
    const struct config *config = page->context->config;
    char labels[LABELS_BYTES];
    family(page, "einsumd_batches_total", COUNTER,
           "Batches launched, by the tokens that they were padded to.");
    for (size_t i = 0; i < config->buckets_n; i++) {
        snprintf(labels, sizeof labels, "bucket=\"%u\"", config->buckets[i]);
        sample_u64(page, labels, batches->bucket_batches[i]);
    }
    counter(page, "einsumd_batch_tokens_total", batches->tokens, "Tokens of batches launched.");
    counter(page, "einsumd_batch_padding_tokens_total", batches->padding_tokens,
            "Tokens by which they were padded.");
    mix(page, "einsumd_batch_requests", &batches->batch_requests, "Requests of a batch.");
    mix(page, "einsumd_batch_weights", &batches->batch_weights,
        "Different weights of a batch: each is read once.");
    family(page, "einsumd_batch_duration_seconds", HISTOGRAM,
           "From a batch's launch to its end, batches that failed excepted.");
    sample_times(page, "", &batches->run);
    family(page, "einsumd_batch_phase_seconds", HISTOGRAM,
           "The same by phase, as the engine times it: one batch in phase_sample.");
    sample_times(page, "phase=\"copy_in\"", &batches->copy_in);
    sample_times(page, "phase=\"kernel\"", &batches->kernel);
    sample_times(page, "phase=\"copy_out\"", &batches->copy_out);
    counter_seconds(page, "einsumd_device_busy_seconds_total", batches->busy_ns,
                    "Time with at least one batch running.");
    counter(page, "einsumd_graph_replays_total", page->engine.graph_replays,
            "On a GPU: batches launched as captured graphs.");
    counter(page, "einsumd_eager_launches_total", page->engine.eager_launches,
            "On a GPU: kernels launched outside of graphs, as loading does.");
}

static void write_memory(struct page *page)
{
    struct service_context *context = page->context;
    struct weights_totals weights = weights_totals(context->weights);
    gauge(page, "einsumd_weights", weights.weights, "Weights resident.");
    family(
        page, "einsumd_memory_bytes", GAUGE,
        "Memory held, no byte twice. On the device: weights, lanes, graphs, scratch; on the host, "
        "pinned: batches; on the host: copies (outputs not yet sent), regions (shared).");
    sample_u64(page, "kind=\"weights\"", weights.resident_bytes);
    sample_u64(page, "kind=\"lanes\"", page->engine.lanes_bytes);
    sample_u64(page, "kind=\"graphs\"", page->engine.graphs_bytes);
    sample_u64(page, "kind=\"scratch\"", page->engine.scratch_bytes);
    sample_u64(page, "kind=\"batches\"", page->batches.buffer_bytes);
    sample_u64(page, "kind=\"copies\"", atomic_load(&context->copied_bytes));
    uint64_t regions = context->regions ? regions_stats(context->regions).bytes : 0;
    sample_u64(page, "kind=\"regions\"", regions);
    family(page, "einsumd_graphs", GAUGE, "On a GPU: captured graphs, by bucket.");
    for (size_t i = 0; i < context->config->buckets_n; i++) {
        char labels[LABELS_BYTES];
        snprintf(labels, sizeof labels, "bucket=\"%u\"", context->config->buckets[i]);
        sample_u64(page, labels, page->engine.bucket_graphs_n[i]);
    }
}

// ---- the process: names that every exporter has

static uint64_t open_fds(void)
{
    DIR *directory = opendir("/proc/self/fd");
    if (!directory)
        return 0;
    uint64_t n = 0;
    for (const struct dirent *entry; (entry = readdir(directory)) != NULL;)
        n += entry->d_name[0] != '.';
    closedir(directory);
    return n - 1; // the directory's own
}

static uint64_t resident_bytes(void)
{
    FILE *statm = fopen("/proc/self/statm", "re");
    unsigned long long all = 0, resident = 0;
    if (statm) {
        if (fscanf(statm, "%llu %llu", &all, &resident) != 2)
            resident = 0;
        fclose(statm);
    }
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

static void write_process(struct page *page)
{
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    family(page, "process_start_time_seconds", GAUGE, "When it was started, since the epoch.");
    sample_f64(page, "",
               (double)wall.tv_sec + (double)wall.tv_nsec / 1e9 -
                   seconds(now_ns() - page->context->started_ns));
    struct timespec cpu;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
    family(page, "process_cpu_seconds_total", COUNTER, "CPU time of all threads.");
    sample_f64(page, "", (double)cpu.tv_sec + (double)cpu.tv_nsec / 1e9);
    gauge(page, "process_resident_memory_bytes", resident_bytes(), "Host memory in use.");
    gauge(page, "process_open_fds", open_fds(), "File descriptors, open.");
    struct rlimit limit = {0};
    getrlimit(RLIMIT_NOFILE, &limit);
    gauge(page, "process_max_fds", limit.rlim_cur, "File descriptors, at most.");
}

enum status scrape_write(struct service_context *context, enum scrape_format format, char **text,
                         size_t *bytes, struct error *err)
{
    uint64_t started_ns = now_ns();
    struct page *page = calloc(1, sizeof *page);
    if (!page)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the page");
    *text = NULL;
    page->out = open_memstream(text, bytes);
    if (!page->out) {
        free(page);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the page");
    }
    page->format = format;
    page->context = context;
    metrics_read(context->metrics, &page->values);
    batcher_stats(context->batcher, &page->batches);
    context->engine_ops->describe(context->engine, &page->engine);
    write_daemon(page);
    write_requests(page);
    write_calls(page);
    write_connections(page);
    write_queue(page);
    write_batches(page);
    write_memory(page);
    write_process(page);
    // The page cannot hold its own end; what it says is of those before it.
    counter(page, "einsumd_scrapes_total", context->scrapes, "Pages like this one, before it.");
    counter_seconds(page, "einsumd_scrape_seconds_total", context->scrape_ns,
                    "Time that writing them took.");
    if (format == SCRAPE_OPENMETRICS)
        fputs("# EOF\n", page->out);
    bool whole = !ferror(page->out);
    whole = fclose(page->out) == 0 && whole;
    free(page);
    if (!whole) {
        free(*text);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the page");
    }
    context->scrapes++;
    context->scrape_ns += now_ns() - started_ns;
    return STATUS_OK;
}
