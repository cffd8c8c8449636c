// Names follow Prometheus: the prefix, base units, _total for what only grows.
#include "scrape.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "batch.h"
#include "config.h"
#include "gate.h"
#include "gpus.h"
#include "guard.h"
#include "heap.h"
#include "listener.h"
#include "log.h"
#include "reload.h"
#include "scrub.h"
#include "service.h"
#include "sharing.h"
#include "tls.h"
#include "trace.h"
#include "weights.h"

// What is read once for the whole page.
struct scrape {
    struct page page;
    struct service_context *context;
    struct metrics_values values;
    struct batcher_stats batches;
    struct engine_info engine;
    const struct gpu_sample *gpus;
    uint32_t gpus_n;
};

static double seconds(uint64_t ns)
{
    return (double)ns / 1e9;
}

static void counter(struct page *page, const char *name, uint64_t value, const char *help)
{
    page_family(page, name, PAGE_COUNTER, help);
    page_u64(page, "", value);
}

static void gauge(struct page *page, const char *name, uint64_t value, const char *help)
{
    page_family(page, name, PAGE_GAUGE, help);
    page_u64(page, "", value);
}

static void counter_seconds(struct page *page, const char *name, uint64_t ns, const char *help)
{
    page_family(page, name, PAGE_COUNTER, help);
    page_f64(page, "", seconds(ns));
}

static void sample_times(struct page *page, const char *labels,
                         const struct metrics_histogram *histogram)
{
    uint64_t n = 0;
    for (size_t i = 0; i < METRICS_TIME_BOUNDS; i++) {
        n += histogram->buckets[i];
        page_bucket(page, labels, seconds(metrics_time_bounds_ns[i]), n);
    }
    page_histogram_end(page, labels, seconds(histogram->sum_ns),
                       n + histogram->buckets[METRICS_TIME_BOUNDS]);
}

static void mix(struct page *page, const char *name, const struct batcher_mix *mix,
                const char *help)
{
    page_family(page, name, PAGE_HISTOGRAM, help);
    uint64_t n = 0;
    for (unsigned i = 0; i < BATCH_MIX_BOUNDS; i++) {
        n += mix->buckets[i];
        page_bucket(page, "", 1u << i, n);
    }
    page_histogram_end(page, "", (double)mix->sum, n + mix->buckets[BATCH_MIX_BOUNDS]);
}

// ---- the families

static void write_tracing(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    struct tracer_stats stats = tracer_stats(scrape->context->tracer);
    counter(page, "einsumd_traces_exported_total", stats.exported,
            "Requests whose spans a collector took.");
    page_family(page, "einsumd_traces_dropped_total", PAGE_COUNTER,
                "Requests whose spans were lost: the queue was full, or the collector did not take "
                "them.");
    page_u64(page, "reason=\"queue\"", stats.dropped_queue);
    page_u64(page, "reason=\"export\"", stats.dropped_export);
}

static void write_daemon(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    struct service_context *context = scrape->context;
    char labels[PAGE_LABELS_BYTES] = "";
    page_label(labels, "version", EINSUMD_VERSION);
    page_label(labels, "engine", context->engine_ops->name);
    page_label(labels, "device", scrape->engine.device);
    page_label(labels, "kernel", scrape->engine.kernel);
    page_family(page, "einsumd_build_info", PAGE_GAUGE,
                "1; its labels say what runs here, and on what.");
    page_u64(page, labels, 1);
    page_family(page, "einsumd_uptime_seconds", PAGE_GAUGE, "Since the start.");
    page_f64(page, "", seconds(now_ns() - context->started_ns));
    gauge(
        page, "einsumd_ready", service_not_ready(context) == NULL,
        "1 while /readyz says so; 0 while draining, without the device, or while something hangs.");
    gauge(page, "einsumd_device_lost", batcher_device_lost(context->batcher),
          "1 once the device has failed for good.");
    counter(page, "einsumd_log_lines_dropped_total", log_lines_dropped(),
            "Log lines that could not be written.");
}

static void write_reloads(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    struct reload_stats stats = reload_stats(scrape->context->reload);
    page_family(page, "einsumd_config_reloads_total", PAGE_COUNTER,
                "Configurations read again on SIGHUP: applied, or refused and the old one kept.");
    page_u64(page, "outcome=\"applied\"", stats.applied);
    page_u64(page, "outcome=\"refused\"", stats.refused);
    gauge(page, "einsumd_config_generation", stats.generation,
          "Of the configuration in force: 1 at start, one more by each that was applied.");
    page_family(page, "einsumd_config_applied_timestamp_seconds", PAGE_GAUGE,
                "When it was applied, since the epoch.");
    page_f64(page, "", stats.applied_time);
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
        char with_code[PAGE_LABELS_BYTES + 64];
        snprintf(with_code, sizeof with_code, "%s,code=\"%s\"", labels,
                 status_name((enum status)status));
        page_u64(page, with_code, statuses[status]);
    }
}

static void write_requests(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    const struct metrics_values *values = &scrape->values;
    char labels[PAGE_LABELS_BYTES];
    page_family(page, "einsumd_requests_total", PAGE_COUNTER,
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
    page_family(page, "einsumd_request_duration_seconds", PAGE_HISTOGRAM,
                "From a projection's arrival, whole, to when its reply has left.");
    for (size_t method = 0; method < METRICS_METHODS; method++) {
        snprintf(labels, sizeof labels, "method=\"%s\"", metrics_method_names[method]);
        sample_times(page, labels, &values->durations[method]);
    }
    page_family(
        page, "einsumd_request_phase_seconds", PAGE_HISTOGRAM,
        "The same by phase: receive (check), queue (for room, then for a lane), copy_in, kernel "
        "(in the engine), copy_out (wake-up and copy), send. They add up to the whole.");
    for (size_t phase = 0; phase < METRICS_PHASES; phase++) {
        snprintf(labels, sizeof labels, "phase=\"%s\"", metrics_phase_names[phase]);
        sample_times(page, labels, &values->phases[phase]);
    }
    page_family(page, "einsumd_refusal_duration_seconds", PAGE_HISTOGRAM,
                "From the arrival of a projection that is past a limit to when it is told so.");
    sample_times(page, "", &values->refusals);
    const struct copy_counters *copies = &scrape->context->copies;
    page_family(
        page, "einsumd_copied_bytes_total", PAGE_COUNTER,
        "Bytes of tensors that the host copied: in, to where the engine reads; out, from there.");
    page_u64(page, "direction=\"in\"", atomic_load(&copies->in_bytes));
    page_u64(page, "direction=\"out\"", atomic_load(&copies->out_bytes));
}

static void write_calls(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    page_family(page, "einsumd_grpc_calls_total", PAGE_COUNTER,
                "gRPC calls of any kind that ended, by method and code; a stream is one call.");
    const struct metrics *metrics = scrape->context->metrics;
    for (uint32_t call = 0; call < metrics_calls_n(metrics); call++) {
        const uint64_t *statuses = scrape->values.calls[call];
        char labels[PAGE_LABELS_BYTES] = "";
        page_label(labels, "method", metrics_call_name(metrics, call));
        if (call > 0 || any(statuses, METRICS_STATUSES)) // nobody need call unknown methods
            sample_codes(page, labels, statuses);
    }
    gauge(page, "einsumd_streams", scrape->values.streams_opened - scrape->values.streams_ended,
          "EinsumStream calls that are open.");
}

static void write_connections(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    const struct service_context *context = scrape->context;
    struct listener_stats listener = listener_stats(context->listener);
    gauge(page, "einsumd_connections", listener.connections, "Connections to `listen`, open.");
    gauge(page, "einsumd_connections_limit", config_now(context->config, connections_max),
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

    const struct batcher_stats *batches = &scrape->batches;
    page_family(
        page, "einsumd_rejected_total", PAGE_COUNTER,
        "What was turned away past a limit, or while draining: requests, calls, connections.");
    page_u64(page, "reason=\"queue_requests\"", batches->refused[FULL_REQUESTS]);
    page_u64(page, "reason=\"queue_bytes\"", batches->refused[FULL_BYTES]);
    page_u64(page, "reason=\"batch_buffers\"", batches->refused[FULL_BUFFERS]);
    page_u64(page, "reason=\"gave_way\"", batches->refused[FULL_GAVE_WAY]);
    page_u64(page, "reason=\"queue_tokens\"", batches->refused[FULL_TOKENS]);
    page_u64(page, "reason=\"calls\"", scrape->values.refused_calls);
    page_u64(page, "reason=\"connection_calls\"", scrape->values.refused_connection_calls);
    page_u64(page, "reason=\"in_flight\"", scrape->values.refused_in_flight);
    page_u64(page, "reason=\"connection_in_flight\"", scrape->values.refused_connection_in_flight);
    page_u64(page, "reason=\"metadata\"", scrape->values.refused_metadata);
    struct guard_stats guard = gate_guard_stats(context->gate);
    for (size_t i = 0; i < GUARD_REASONS; i++) {
        char labels[PAGE_LABELS_BYTES] = "";
        page_label(labels, "reason", guard_reason_names[i]);
        page_u64(page, labels, guard.ended[i]);
    }
    page_u64(page, "reason=\"draining\"", scrape->values.refused_draining);
    page_u64(page, "reason=\"connections\"", listener.refused);
    page_u64(page, "reason=\"shared_connections\"", sharing.connections_refused);
    counter(page, "einsumd_accept_errors_total", listener.accept_errors,
            "Times that no connection could be taken, as without file descriptors.");
    gauge(page, "einsumd_unsettled_bytes", guard.owed_bytes,
          "Sent over TCP and no whole message yet: what gRPC holds of callers.");
}

static void write_access(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    page_family(page, "einsumd_access_refused_total", PAGE_COUNTER,
                "Calls refused for want of a token or a scope, by reason.");
    for (size_t i = 0; i < METRICS_ACCESS_REFUSALS; i++) {
        char labels[64];
        snprintf(labels, sizeof labels, "reason=\"%s\"", metrics_access_refusal_names[i]);
        page_u64(page, labels, scrape->values.access_refused[i]);
    }
    struct tls *tls = gate_tls(scrape->context->gate);
    struct tls_stats stats = {0};
    if (tls)
        stats = tls_stats(tls);
    gauge(page, "einsumd_tls_connections", stats.connections,
          "Of the connections to `listen`, those by TLS, handshake done.");
    page_family(page, "einsumd_tls_handshakes_total", PAGE_COUNTER,
                "TLS handshakes, by how they ended.");
    page_u64(page, "result=\"done\"", stats.handshakes);
    page_u64(page, "result=\"failed\"", stats.handshakes_failed);
    page_u64(page, "result=\"late\"", stats.handshakes_late);
    gauge(page, "einsumd_tls_certificate_expires_seconds", (uint64_t)stats.certificate_expires,
          "When the certificate in force expires, since the epoch; 0 without TLS.");
}

static void write_queue(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    const struct batcher_stats *batches = &scrape->batches;
    const struct config *config = scrape->context->config;
    gauge(page, "einsumd_queue_requests", batches->queued,
          "Requests decoded and not yet launched.");
    gauge(page, "einsumd_queue_tokens", batches->queued_tokens, "Their tokens.");
    gauge(page, "einsumd_queue_bytes", batches->queued_bytes,
          "Their input, but for what lies in shared memory.");
    gauge(page, "einsumd_queue_requests_limit", config_now(config, queue_requests_max),
          "queue_requests_max.");
    gauge(page, "einsumd_batch_buffers", config->batches,
          "Buffers of batches: forming, running, being answered.");
    gauge(page, "einsumd_batch_buffers_free", batches->buffers_free, "Of these, free.");
    gauge(page, "einsumd_requests_in_flight", batches->jobs,
          "Requests that have room or wait for it, up to when their reply has left.");
}

static void write_batches(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    const struct batcher_stats *batches = &scrape->batches;
    const struct config *config = scrape->context->config;
    char labels[PAGE_LABELS_BYTES];
    page_family(page, "einsumd_batches_total", PAGE_COUNTER,
                "Batches launched, by the tokens that they were padded to.");
    for (size_t i = 0; i < config->buckets_n; i++) {
        snprintf(labels, sizeof labels, "bucket=\"%u\"", config->buckets[i]);
        page_u64(page, labels, batches->bucket_batches[i]);
    }
    counter(page, "einsumd_batch_tokens_total", batches->tokens, "Tokens of batches launched.");
    counter(page, "einsumd_batch_padding_tokens_total", batches->padding_tokens,
            "Tokens by which they were padded.");
    mix(page, "einsumd_batch_requests", &batches->batch_requests, "Requests of a batch.");
    mix(page, "einsumd_batch_weights", &batches->batch_weights,
        "Different weights of a batch: each is read once.");
    page_family(page, "einsumd_batch_duration_seconds", PAGE_HISTOGRAM,
                "From a batch's launch to its end, batches that failed excepted.");
    sample_times(page, "", &batches->run);
    page_family(page, "einsumd_batch_phase_seconds", PAGE_HISTOGRAM,
                "The same by phase, as the engine times it: one batch in phase_sample.");
    sample_times(page, "phase=\"copy_in\"", &batches->copy_in);
    sample_times(page, "phase=\"kernel\"", &batches->kernel);
    sample_times(page, "phase=\"copy_out\"", &batches->copy_out);
    counter_seconds(page, "einsumd_device_busy_seconds_total", batches->busy_ns,
                    "Time with at least one batch running.");
    counter(page, "einsumd_graph_replays_total", scrape->engine.graph_replays,
            "On a GPU: batches launched as captured graphs.");
    counter(page, "einsumd_eager_launches_total", scrape->engine.eager_launches,
            "On a GPU: kernels launched outside of graphs, as loading does.");
}

static void write_truth(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    const struct metrics_values *values = &scrape->values;
    counter(page, "einsumd_nan_looked_total", values->nan_looked,
            "Requests, and parts of large ones, whose output was looked at for NaN: one in "
            "nan_sample.");
    page_family(
        page, "einsumd_nan_outputs_total", PAGE_COUNTER,
        "Of these, those whose output holds NaN: input, since activations or scales do; other, "
        "though they do not.");
    page_u64(page, "cause=\"input\"", values->nan_input);
    page_u64(page, "cause=\"other\"", values->nan_other);
    struct scrub_stats scrub = scrub_stats(scrape->context->scrub);
    gauge(page, "einsumd_weights_damaged", weights_totals(scrape->context->weights).damaged,
          "Weights whose copy in memory is no longer what was loaded: they are not served.");
    counter(page, "einsumd_scrub_damaged_total", scrub.damaged,
            "Weights that scrubbing found damaged.");
    counter(page, "einsumd_scrub_reread_total", scrub.reloaded,
            "Of these, read again from their checkpoint and served again.");
    counter(page, "einsumd_scrub_bytes_total", scrub.bytes, "Bytes of weights that were compared.");
    counter(page, "einsumd_scrub_passes_total", scrub.passes,
            "Passes over all weights: one in scrub_seconds, while idle.");
}

static void write_memory(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    struct service_context *context = scrape->context;
    struct weights_totals weights = weights_totals(context->weights);
    gauge(page, "einsumd_weights", weights.weights, "Weights resident.");
    page_family(
        page, "einsumd_memory_bytes", PAGE_GAUGE,
        "Memory held, no byte twice. On the device: weights, lanes, graphs, scratch; on the host, "
        "pinned: batches; on the host: copies (outputs not yet sent), regions (shared).");
    page_u64(page, "kind=\"weights\"", weights.resident_bytes);
    page_u64(page, "kind=\"lanes\"", scrape->engine.lanes_bytes);
    page_u64(page, "kind=\"graphs\"", scrape->engine.graphs_bytes);
    page_u64(page, "kind=\"scratch\"", scrape->engine.scratch_bytes);
    page_u64(page, "kind=\"batches\"", scrape->batches.buffer_bytes);
    page_u64(page, "kind=\"copies\"", atomic_load(&context->copied_bytes));
    uint64_t regions = context->regions ? regions_stats(context->regions).bytes : 0;
    page_u64(page, "kind=\"regions\"", regions);
    page_family(page, "einsumd_graphs", PAGE_GAUGE, "On a GPU: captured graphs, by bucket.");
    for (size_t i = 0; i < context->config->buckets_n; i++) {
        char labels[PAGE_LABELS_BYTES];
        snprintf(labels, sizeof labels, "bucket=\"%u\"", context->config->buckets[i]);
        page_u64(page, labels, scrape->engine.bucket_graphs_n[i]);
    }
}

// ---- the GPU, as its driver sees it

// A figure of a family, and what tells it from the family's others.
struct gpu_part {
    enum gpu_figure figure;
    const char *label; // NULL: none
};

static void write_gpu_family(struct scrape *scrape, const char *name, enum page_type type,
                             double unit, const struct gpu_part *parts, size_t parts_n,
                             const char *help)
{
    struct page *page = &scrape->page;
    bool begun = false;
    for (uint32_t gpu = 0; gpu < scrape->gpus_n; gpu++) {
        for (size_t i = 0; i < parts_n; i++) {
            const struct gpu_sample *sample = &scrape->gpus[gpu];
            if (!sample->known[parts[i].figure])
                continue;
            if (!begun)
                page_family(page, name, type, help);
            begun = true;
            char labels[PAGE_LABELS_BYTES] = "";
            page_label(labels, "uuid", sample->uuid);
            if (parts[i].label)
                page_label(labels, "of", parts[i].label);
            page_f64(page, labels, (double)sample->figures[parts[i].figure] * unit);
        }
    }
}

static void write_gpu_throttling(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    bool begun = false;
    for (uint32_t gpu = 0; gpu < scrape->gpus_n; gpu++) {
        const struct gpu_sample *sample = &scrape->gpus[gpu];
        for (size_t i = 0; sample->known[GPU_THROTTLE_REASONS] && i < GPU_THROTTLE_REASONS_N; i++) {
            if (!begun)
                page_family(page, "einsumd_gpu_throttled", PAGE_GAUGE,
                            "1 while the reason holds the clocks down.");
            begun = true;
            char labels[PAGE_LABELS_BYTES] = "";
            page_label(labels, "uuid", sample->uuid);
            page_label(labels, "reason", gpu_throttle_reasons[i].name);
            page_u64(page, labels,
                     (sample->figures[GPU_THROTTLE_REASONS] & gpu_throttle_reasons[i].bit) != 0);
        }
    }
}

// Nothing where there is no NVML.
static void write_gpus(struct scrape *scrape)
{
    static const struct gpu_part power[] = {{GPU_POWER_MW, "usage"}, {GPU_POWER_LIMIT_MW, "limit"}};
    static const struct gpu_part energy[] = {{GPU_ENERGY_MJ, NULL}};
    static const struct gpu_part temperature[] = {{GPU_TEMPERATURE_C, NULL}};
    static const struct gpu_part utilization[] = {{GPU_UTILIZATION_PERCENT, "compute"},
                                                  {GPU_MEMORY_UTILIZATION_PERCENT, "memory"}};
    static const struct gpu_part memory[] = {{GPU_MEMORY_USED_BYTES, "used"},
                                             {GPU_MEMORY_TOTAL_BYTES, "total"}};
    static const struct gpu_part clocks[] = {{GPU_CLOCK_SM_MHZ, "sm"},
                                             {GPU_CLOCK_MEMORY_MHZ, "memory"}};
#define PARTS(parts) (parts), ARRAY_LEN(parts)
    write_gpu_family(scrape, "einsumd_gpu_power_watts", PAGE_GAUGE, 1e-3, PARTS(power),
                     "What the GPU draws, and may draw.");
    write_gpu_family(scrape, "einsumd_gpu_energy_joules_total", PAGE_COUNTER, 1e-3, PARTS(energy),
                     "What it has drawn since its driver was loaded.");
    write_gpu_family(scrape, "einsumd_gpu_temperature_celsius", PAGE_GAUGE, 1, PARTS(temperature),
                     "Of the chip.");
    write_gpu_family(scrape, "einsumd_gpu_utilization_ratio", PAGE_GAUGE, 1e-2, PARTS(utilization),
                     "Share of time in which a kernel ran, or memory was read or written.");
    write_gpu_family(scrape, "einsumd_gpu_memory_bytes", PAGE_GAUGE, 1, PARTS(memory),
                     "Device memory: what all processes use, and what there is.");
    write_gpu_family(scrape, "einsumd_gpu_clock_hertz", PAGE_GAUGE, 1e6, PARTS(clocks),
                     "Clocks of the multiprocessors and of the memory.");
    write_gpu_throttling(scrape);
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

static void write_process(struct scrape *scrape)
{
    struct page *page = &scrape->page;
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    page_family(page, "process_start_time_seconds", PAGE_GAUGE,
                "When it was started, since the epoch.");
    page_f64(page, "",
             (double)wall.tv_sec + (double)wall.tv_nsec / 1e9 -
                 seconds(now_ns() - scrape->context->started_ns));
    struct timespec cpu;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
    page_family(page, "process_cpu_seconds_total", PAGE_COUNTER, "CPU time of all threads.");
    page_f64(page, "", (double)cpu.tv_sec + (double)cpu.tv_nsec / 1e9);
    gauge(page, "process_resident_memory_bytes", heap_resident_bytes(), "Host memory in use.");
    gauge(page, "process_open_fds", open_fds(), "File descriptors, open.");
    struct rlimit limit = {0};
    getrlimit(RLIMIT_NOFILE, &limit);
    gauge(page, "process_max_fds", limit.rlim_cur, "File descriptors, at most.");
}

enum status scrape_write(struct service_context *context, enum page_format format, char **text,
                         size_t *bytes, struct error *err)
{
    uint64_t started_ns = now_ns();
    struct scrape *scrape = calloc(1, sizeof *scrape);
    if (!scrape)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the page");
    struct page *page = &scrape->page;
    enum status status = page_open(page, format, err);
    if (status != STATUS_OK) {
        free(scrape);
        return status;
    }
    scrape->context = context;
    metrics_read(context->metrics, &scrape->values);
    batcher_stats(context->batcher, &scrape->batches);
    context->engine_ops->describe(context->engine, &scrape->engine);
    scrape->gpus_n = gpus_sample(context->gpus, &scrape->gpus);
    write_daemon(scrape);
    write_reloads(scrape);
    write_requests(scrape);
    write_calls(scrape);
    write_connections(scrape);
    write_access(scrape);
    write_queue(scrape);
    write_batches(scrape);
    write_memory(scrape);
    write_truth(scrape);
    write_gpus(scrape);
    write_tracing(scrape);
    write_process(scrape);
    counter(page, "einsumd_scrapes_total", context->scrapes, "Pages like this one, before it.");
    counter_seconds(page, "einsumd_scrape_seconds_total", context->scrape_ns,
                    "Time that writing them took.");
    status = page_close(page, text, bytes, err);
    free(scrape);
    context->scrapes++;
    context->scrape_ns += now_ns() - started_ns;
    return status;
}
