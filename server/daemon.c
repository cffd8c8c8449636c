// Start-up, the main loop, drain and shutdown. daemon_run is the table of contents.
//
// Nothing listens before everything is ready: weights resident, tested, batches allocated. So
// "connects" means "serves", and a probe of the port is an honest one. Addresses are bound first,
// though: a taken one is found out before a long load.
#include "daemon.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <uv.h>

#include "batch.h"
#include "control.h"
#include "gate.h"
#include "gpus.h"
#include "guard.h"
#include "heap.h"
#include "http.h"
#include "listener.h"
#include "projection.h"
#include "reload.h"
#include "rope.h"
#include "scrub.h"
#include "rpc.h"
#include "service.h"
#include "sharing.h"
#include "supervisor.h"
#include "trace.h"
#include "verify.h"
#include "watchdog.h"
#include "weights.h"
#include "wire.h"

enum {
    ADDRESSES_BYTES = 2048,
    DEVICE_CHECK_MS = 200,
    WATCHED_MAX = 1 << 16, // descriptors
    CLOSING_LOOKS = 8,     // for idle connections in a time of lame_duck_ms
    CUT_OFF_MS = 1000,     // of waiting that callers take their last answer
    STOP_SLACK_MS = 10000, // of giving back what was taken, once all is answered
    LOAD_LOG_SECONDS = 2,
    BATCHES_BEYOND_LANES = 3,          // one forming, two being answered
    MESSAGE_OVERHEAD_BYTES = 64 << 10, // of a request beyond its tensors
    TRANSPORT_REQUESTS = 64,
    CONNECTION_REQUESTS = 4, // of the largest, that one connection may be sending
    CONNECTION_BYTES = 64 << 20,
    CUT_REQUESTS = 4,
    HTTP_TIMEOUT_MS = 10000, // of a connection, from start to end
    REDUCED_DIM_MAX = 16384, // four times V4's: the engine's scratch is sized by it
};

struct daemon {
    struct config *config;
    const char *config_path; // NULL: none
    struct config file;      // as it was read
    uv_loop_t loop;
    uv_signal_t on_term, on_int, on_hup;
    uv_timer_t closing, lame_duck, grace, device_check, alive, heap;
    uv_work_t nothing;
    uv_async_t drained; // from the rpc thread that ended the last call
    struct batcher_waker waker;
    struct rpc *rpc;
    struct watchdog *watchdog; // NULL: off
    struct service_context context;
    enum daemon_exit exit;
    bool draining, drain_started;
};

// ---- start

static uint32_t usable_cores(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return 1;
    return (uint32_t)CPU_COUNT(&set);
}

static void resolve_threads(struct config *config)
{
    uint32_t cores = usable_cores();
    if (config->rpc_threads == 0)
        config->rpc_threads = (cores + 3) / 4;
    if (config->tls_threads == 0)
        config->tls_threads = (cores + 3) / 4;
    if (config->load_threads == 0)
        config->load_threads = cores;
}

// What a batch of the largest weight needs at most: GKT pads tokens to 4 for each request, and each
// tensor starts at a cache line, which a little slack covers; FP32 scales of 32 are the widest,
// FP32 the widest output. Where weights have ropes, attention's output is wider than both.
static void resolve_batch_bytes(struct config *config, const struct weights_totals *totals)
{
    bool none = totals->weights == 0;
    uint64_t groups = none ? 8 : totals->groups_max; // V4-Flash's shape
    uint64_t output_dim = none ? 1024 : totals->output_dim_max;
    uint64_t reduced_dim = none ? 4096 : totals->reduced_dim_max;
    uint64_t tokens = config->batch_tokens_max;
    uint64_t slack = (uint64_t)config->batch_requests_max * 4 * CACHE_LINE_BYTES;
    uint64_t activations = einsum_activation_bytes(tokens, groups, reduced_dim);
    uint64_t scales =
        einsum_scale_bytes(EINSUM_SCALES_GKT, EINSUM_SCALE_FP32, tokens, groups, reduced_dim / 32);
    uint64_t input = activations + scales;
    if (config->ropes_n > 0) // twice as wide; without a rope there is none
        input = attention_bytes(tokens, groups, reduced_dim) +
                tokens * sizeof(struct attention_rotation);
    if (config->batch_input_bytes == 0)
        config->batch_input_bytes = align_up(input + slack, (uint64_t)sysconf(_SC_PAGESIZE));
    if (config->batch_output_bytes == 0)
        config->batch_output_bytes =
            align_up(einsum_output_bytes(EINSUM_OUTPUT_FP32, tokens, groups, output_dim) + slack,
                     (uint64_t)sysconf(_SC_PAGESIZE));
}

// A request of more tokens than a batch is so many times as large as what fills one.
static uint64_t for_largest_request(const struct config *config, uint64_t batch_bytes)
{
    if (config->request_tokens_max <= config->batch_tokens_max)
        return batch_bytes;
    return batch_bytes / config->batch_tokens_max * config->request_tokens_max +
           batch_bytes % config->batch_tokens_max * config->request_tokens_max /
               config->batch_tokens_max;
}

static void resolve_message_bytes(struct config *config, struct service_context *context)
{
    uint64_t input = for_largest_request(config, config->batch_input_bytes);
    uint64_t output = for_largest_request(config, config->batch_output_bytes);
    context->message_bytes_max =
        config->message_bytes_max ? config->message_bytes_max : input + MESSAGE_OVERHEAD_BYTES;
    if (context->message_bytes_max > INT32_MAX) // gRPC's own limit
        context->message_bytes_max = INT32_MAX;
    context->reply_bytes_max = output + PROJECTION_HEAD_BYTES_MAX;
    if (config->cut_bytes_max == 0)
        config->cut_bytes_max =
            CUT_REQUESTS * (context->message_bytes_max + context->reply_bytes_max);
    config->message_bytes_max = context->message_bytes_max;
    if (config->connection_bytes_max == 0)
        config->connection_bytes_max =
            CONNECTION_BYTES + CONNECTION_REQUESTS * context->message_bytes_max;
    if (config->transport_bytes_max == 0)
        config->transport_bytes_max =
            (1ull << 30) + config->cut_bytes_max +
            TRANSPORT_REQUESTS * (config->batch_input_bytes + MESSAGE_OVERHEAD_BYTES);
}

NODISCARD static enum status bind_http(struct daemon *daemon, struct error *err)
{
    const struct config *config = daemon->config;
    if (config->http_listen[0] == '\0')
        return STATUS_OK;
    const char *address = config->http_listen;
    const struct listener_options listen = {
        .key = "http_listen",
        .addresses = &address,
        .addresses_n = 1,
        .unix_socket_mode = config->unix_socket_mode,
        .connections_max = config->http_connections_max,
    };
    struct service_context *context = &daemon->context;
    enum status status = listener_create(&daemon->loop, &listen, &context->http_listener, err);
    if (status != STATUS_OK)
        return status;
    const struct http_options http = {
        .loop = &daemon->loop,
        .context = context,
        .connections_max = config->http_connections_max,
        .timeout_ms = HTTP_TIMEOUT_MS,
    };
    return http_create(&http, &context->http, err);
}

NODISCARD static enum status bind_addresses(struct daemon *daemon, struct error *err)
{
    const struct config *config = daemon->config;
    enum status status =
        gate_create(&daemon->loop, config, daemon->context.metrics, &daemon->context.gate, err);
    if (status == STATUS_OK) {
        daemon->context.listener = gate_listener(daemon->context.gate);
        status = bind_http(daemon, err);
    }
    if (status != STATUS_OK || config->shared_memory_listen[0] == '\0')
        return status;
    const struct sharing_options sharing = {
        .loop = &daemon->loop,
        .address = config->shared_memory_listen,
        .unix_socket_mode = config->unix_socket_mode,
        .connections_max = config->shared_connections_max,
        .connection_regions_max = config->shared_connection_regions_max,
    };
    return sharing_create(&sharing, &daemon->context.sharing, err);
}

NODISCARD static enum status open_engine(struct daemon *daemon, struct error *err)
{
    struct config *config = daemon->config;
    const struct engine_ops *ops = engine_find(config->engine);
    if (!ops)
        return error_field(err, STATUS_UNIMPLEMENTED, "engine", "\"%s\" is not part of this build",
                           config->engine);
    if (config->lanes == 0)
        config->lanes = ops->lanes_default;
    if (config->batches == 0)
        config->batches = config->lanes + BATCHES_BEYOND_LANES;
    const struct engine_options options = {
        .kernel = strcmp(config->kernel, "auto") == 0 ? NULL : config->kernel,
        .threads = config->compute_threads,
        .lanes = config->lanes,
        .batch_segments_max = config->batch_requests_max,
        .buckets = config->buckets,
        .buckets_n = (uint32_t)config->buckets_n,
        .reduced_dim_max = REDUCED_DIM_MAX,
        .phase_sample = config->phase_sample,
        .wake = batcher_wake,
        .wake_context = &daemon->waker,
    };
    daemon->context.engine_ops = ops;
    enum status status = ops->open(&options, &daemon->context.engine, err);
    if (status != STATUS_OK)
        return status;
    struct engine_info info;
    ops->describe(daemon->context.engine, &info);
    snprintf(daemon->context.kernel, sizeof daemon->context.kernel, "%.*s",
             (int)strcspn(info.kernel, ":"), info.kernel);
    LOG(INFO, "engine", LOG_STR("name", ops->name), LOG_STR("device", info.device),
        LOG_STR("kernel", info.kernel), LOG_U64("threads", info.threads),
        LOG_U64("scratch_bytes", info.scratch_bytes), LOG_U64("lanes_bytes", info.lanes_bytes),
        LOG_U64("graphs_bytes", info.graphs_bytes));
    if (strcmp(config->engine, "auto") == 0 && engine_auto_note())
        LOG(INFO, "no GPU is used", LOG_STR("reason", engine_auto_note()));
    return STATUS_OK;
}

static bool stop_requested(void)
{
    sigset_t pending;
    return sigpending(&pending) == 0 &&
           (sigismember(&pending, SIGTERM) == 1 || sigismember(&pending, SIGINT) == 1);
}

static bool on_load_progress(void *context, uint32_t weights_done, uint32_t weights_total,
                             uint64_t bytes_done, uint64_t bytes_total)
{
    _Atomic uint64_t *logged_ns = context;
    uint64_t now = now_ns(), last = atomic_load_explicit(logged_ns, memory_order_relaxed);
    if (now - last > (uint64_t)LOAD_LOG_SECONDS * 1000000000u &&
        atomic_compare_exchange_strong(logged_ns, &last, now)) {
        LOG(INFO, "loading", LOG_U64("weights", weights_done), LOG_U64("of", weights_total),
            LOG_U64("bytes", bytes_done), LOG_U64("bytes_of", bytes_total));
        supervisor_loading(weights_done, weights_total);
    }
    return !stop_requested();
}

NODISCARD static enum status add_ropes(struct daemon *daemon, struct error *err)
{
    const struct config *config = daemon->config;
    enum status status = STATUS_OK;
    for (size_t i = 0; i < config->ropes_n && status == STATUS_OK; i++) {
        const struct config_rope *entry = &config->ropes[i];
        const struct rope_options options = reload_rope_options(entry);
        struct error cause;
        status = weights_add_rope(daemon->context.weights, entry->weights, &options, &cause);
        if (status != STATUS_OK) // which of them
            error_set(err, status, "ropes[%zu].%.480s", i, cause.text);
    }
    return status;
}

NODISCARD static enum status load_weights(struct daemon *daemon, struct error *err)
{
    struct config *config = daemon->config;
    struct service_context *context = &daemon->context;
    enum status status = weights_create(
        context->engine_ops, context->engine, (const char *const *)config->weights_roots,
        config->weights_roots_n, REDUCED_DIM_MAX, &context->weights, err);
    if (status == STATUS_OK)
        status = add_ropes(daemon, err);
    for (size_t i = 0; i < config->weights_n && status == STATUS_OK; i++) {
        const struct config_weights *entry = &config->weights[i];
        uint64_t started_ns = now_ns();
        _Atomic uint64_t logged_ns = started_ns;
        struct weights_load load = reload_weights_load(entry, reload_tag(i));
        load.threads = config->load_threads;
        load.progress = on_load_progress;
        load.progress_context = &logged_ns;
        uint32_t loaded = 0;
        status = weights_load(context->weights, &load, &loaded, err);
        if (status == STATUS_OK)
            LOG(INFO, "weights loaded", LOG_STR("path", entry->path), LOG_U64("weights", loaded),
                LOG_U64("ms", (now_ns() - started_ns) / 1000000u));
    }
    return status;
}

NODISCARD static enum status create_batcher(struct daemon *daemon, struct error *err)
{
    struct config *config = daemon->config;
    struct weights_totals totals = weights_totals(daemon->context.weights);
    resolve_batch_bytes(config, &totals);
    const struct batcher_options options = {
        .ops = daemon->context.engine_ops,
        .engine = daemon->context.engine,
        .lanes = config->lanes,
        .batches = config->batches,
        .batch_input_bytes = config->batch_input_bytes,
        .batch_output_bytes = config->batch_output_bytes,
        .batch_tokens_max = config->batch_tokens_max,
        .batch_requests_max = config->batch_requests_max,
        .queue_requests_max = config->queue_requests_max,
        .queue_tokens_max = config->queue_tokens_max,
        .queue_bytes_max = config->queue_bytes_max,
        .max_queue_delay_us = config->max_queue_delay_us,
        .buckets = config->buckets,
        .buckets_n = (uint32_t)config->buckets_n,
    };
    enum status status = batcher_create(&options, &daemon->waker, &daemon->context.batcher, err);
    if (status == STATUS_OK)
        LOG(INFO, "memory", LOG_U64("weights_bytes", totals.resident_bytes),
            LOG_U64("batches_bytes",
                    config->batches * (config->batch_input_bytes + config->batch_output_bytes)));
    return status;
}

struct self_test {
    struct verify verify;
    struct error error; // of the first weight that failed
};

static void self_test_weight(void *argument, struct weight *weight)
{
    struct self_test *test = argument;
    if (test->error.status != STATUS_OK)
        return;
    test->error.status = verify_or_refuse(&test->verify, weight, &test->error);
}

static struct verify verify_of(const struct service_context *context)
{
    return (struct verify){
        .batcher = context->batcher, .ops = context->engine_ops, .engine = context->engine};
}

// Of a load that is about to become visible.
static enum status check_loaded(void *argument, struct weight *const *loaded, uint32_t loaded_n,
                                struct error *err)
{
    struct verify verify = verify_of(argument);
    uint64_t started_ns = now_ns();
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < loaded_n && status == STATUS_OK; i++)
        status = verify_or_refuse(&verify, loaded[i], err);
    if (status == STATUS_OK)
        LOG(INFO, "self-test passed", LOG_U64("weights", verify.weights_n),
            LOG_U64("requests", verify.requests_n),
            LOG_U64("ms", (now_ns() - started_ns) / 1000000u));
    return status;
}

NODISCARD static enum status self_test(struct daemon *daemon, struct error *err)
{
    struct service_context *context = &daemon->context;
    if (daemon->config->self_test_at_load)
        weights_set_check(context->weights, check_loaded, context);
    if (!daemon->config->self_test_at_start)
        return STATUS_OK;
    struct self_test test = {.verify = verify_of(context)};
    uint64_t started_ns = now_ns();
    weights_visit(context->weights, self_test_weight, &test);
    if (test.error.status != STATUS_OK)
        *err = test.error;
    else
        LOG(INFO, "self-test passed", LOG_U64("weights", test.verify.weights_n),
            LOG_U64("requests", test.verify.requests_n),
            LOG_U64("ms", (now_ns() - started_ns) / 1000000u));
    return test.error.status;
}

// After the engine, which is told of what callers register.
NODISCARD static enum status create_regions(struct daemon *daemon, struct error *err)
{
    const struct config *config = daemon->config;
    struct service_context *context = &daemon->context;
    if (!context->sharing)
        return STATUS_OK;
    const struct regions_options options = {
        .ops = context->engine_ops,
        .engine = context->engine,
        .regions_max = config->shared_regions_max,
        .region_bytes_max = config->shared_region_bytes_max,
        .import = config->shared_memory_cuda,
        .bytes_max = config->shared_bytes_max,
        .on_unused = sharing_on_unused,
        .context = context->sharing,
    };
    return regions_create(&options, &context->regions, err);
}

static uint32_t retry_after_ms(const struct service_context *context)
{
    return batcher_retry_ms(context->batcher);
}

static void on_calls_drained(void *argument)
{
    struct daemon *daemon = argument;
    uv_async_send(&daemon->drained);
}

static void on_connection_ends(void *argument, int fd)
{
    struct daemon *daemon = argument;
    gate_end_connection(daemon->context.gate, fd);
}

NODISCARD static enum status start_sharing(struct daemon *daemon, struct error *err)
{
    struct service_context *context = &daemon->context;
    const struct rings_options options = {
        .context = context,
        .entries_max = daemon->config->ring_entries_max,
        .spin_us = daemon->config->ring_spin_us,
        .on_broken = sharing_on_broken,
        .on_broken_context = context->sharing,
    };
    enum status status = rings_create(&options, &context->rings, err);
    if (status == STATUS_OK)
        status = sharing_start(context->sharing, context->regions, context->rings, err);
    return status;
}

NODISCARD static enum status start_scrub(struct daemon *daemon, struct error *err)
{
    struct service_context *context = &daemon->context;
    if (daemon->config->scrub_seconds == 0 || !context->engine_ops->weight_sum)
        return STATUS_OK;
    const struct scrub_options options = {
        .weights = context->weights,
        .ops = context->engine_ops,
        .engine = context->engine,
        .batcher = context->batcher,
        .seconds = daemon->config->scrub_seconds,
    };
    return scrub_create(&options, &context->scrub, err);
}

NODISCARD static enum status start_tracing(struct daemon *daemon, struct error *err)
{
    const struct config *config = daemon->config;
    if (config->trace_endpoint[0] == '\0')
        return STATUS_OK;
    const struct tracer_options options = {
        .endpoint = config->trace_endpoint,
        .sample = config->trace_sample,
        .engine = daemon->context.engine_ops->name,
    };
    return tracer_create(&options, &daemon->context.tracer, err);
}

static void on_reloaded(void *argument, const char *refused)
{
    struct daemon *daemon = argument;
    char addresses[ADDRESSES_BYTES];
    listener_addresses(daemon->context.listener, addresses, sizeof addresses);
    supervisor_reloaded(addresses, refused);
}

NODISCARD static enum status create_reload(struct daemon *daemon, struct error *err)
{
    const struct reload_options options = {
        .loop = &daemon->loop,
        .path = daemon->config_path,
        .file = &daemon->file,
        .config = daemon->config,
        .context = &daemon->context,
        .rpc = daemon->rpc,
        .on_done = on_reloaded,
        .on_done_context = daemon,
    };
    return reload_create(&options, &daemon->context.reload, err);
}

NODISCARD static enum status start_serving(struct daemon *daemon, struct error *err)
{
    static const struct method *const methods[] = {
        service_einsum_methods,    service_weights_methods,    service_info_methods,
        service_inference_methods, service_models_methods,     service_repository_methods,
        service_health_methods,    service_reflection_methods, NULL,
    };
    struct config *config = daemon->config;
    struct service_context *context = &daemon->context;
    resolve_message_bytes(config, context);
    const struct rpc_options options = {
        .threads = config->rpc_threads,
        .calls_max = config->calls_max,
        .connections_max = config->connections_max,
        .connection_requests_max = config->connection_requests_max,
        .connection_in_flight_max = config->connection_in_flight_max,
        .in_flight_max = config->in_flight_max,
        .message_bytes_max = context->message_bytes_max,
        .metadata_bytes_max = config->metadata_bytes_max,
        .keepalive_ms = config->keepalive_ms,
        .keepalive_timeout_ms = config->keepalive_timeout_ms,
        .connection_idle_ms = config->connection_idle_ms,
        .connection_age_ms = config->connection_age_ms,
        .connection_age_grace_ms = config->connection_age_grace_ms,
        .transport_bytes_max = config->transport_bytes_max,
        .reply_timeout_ms = config->reply_timeout_ms,
        .methods = methods,
        .context = context,
        .metrics = context->metrics,
        .access = gate_access(daemon->context.gate),
        .on_drained = on_calls_drained,
        .retry_after_ms = retry_after_ms,
        .on_connection_ends = on_connection_ends,
        .drained_context = daemon,
    };
    enum status status = rpc_create(&options, &daemon->rpc, err);
    if (status != STATUS_OK)
        return status;
    status = create_reload(daemon, err);
    if (status != STATUS_OK)
        return status;
    health_set(context->health, HEALTH_SERVING);
    if (context->sharing)
        status = start_sharing(daemon, err);
    if (status == STATUS_OK)
        status = gate_start(daemon->context.gate, daemon->rpc, err);
    if (status == STATUS_OK && context->http) {
        struct engine_info engine;
        context->engine_ops->describe(context->engine, &engine);
        context->gpus = gpus_open(engine.pci_bus_id);
    }
    if (status == STATUS_OK && context->http)
        status = listener_start(context->http_listener, http_take, context->http, err);
    return status;
}

// ---- drain

static void begin_drain(struct daemon *daemon, const char *reason);

static void on_device_check(uv_timer_t *timer)
{
    struct daemon *daemon = CONTAINER_OF(timer, struct daemon, device_check);
    if (daemon->draining || !batcher_device_lost(daemon->context.batcher))
        return;
    daemon->exit = DAEMON_EXIT_DEVICE_LOST;
    begin_drain(daemon, "device lost");
}

// What hangs is given up here, or, should that fail, by the supervisor.
static void on_alive(uv_timer_t *timer)
{
    struct daemon *daemon = CONTAINER_OF(timer, struct daemon, alive);
    if (!atomic_load_explicit(&daemon->context.hung, memory_order_relaxed))
        supervisor_alive();
}

static void on_hung_changed(void *argument, const char *hung)
{
    struct daemon *daemon = argument;
    atomic_store_explicit(&daemon->context.hung, hung, memory_order_relaxed);
    batcher_set_hung(daemon->context.batcher, hung != NULL);
    if (!hung)
        LOG(WARN, "what hung goes on");
    if (!daemon->draining)
        health_set(daemon->context.health, hung ? HEALTH_NOT_SERVING : HEALTH_SERVING);
}

// Its threads cannot be joined, so nothing is given back: the kernel does, and callers see their
// connections end.
NORETURN static void on_hung_for_good(void *argument, const char *hung)
{
    (void)argument;
    LOG(ERROR, "given up", LOG_STR("reason", hung), LOG_U64("exit_code", DAEMON_EXIT_HUNG));
    _exit(DAEMON_EXIT_HUNG);
}

NODISCARD static enum status start_watchdog(struct daemon *daemon, struct error *err)
{
    if (daemon->config->watchdog_ms == 0)
        return STATUS_OK;
    const struct watchdog_options options = {
        .loop = &daemon->loop,
        .ms = daemon->config->watchdog_ms,
        .batcher = daemon->context.batcher,
        .rpc = daemon->rpc,
        .rings = daemon->context.rings,
        .on_change = on_hung_changed,
        .on_over = on_hung_for_good,
        .context = daemon,
    };
    return watchdog_start(&options, &daemon->watchdog, err);
}

static void on_cut_off(uv_timer_t *timer)
{
    const struct daemon *daemon = CONTAINER_OF(timer, struct daemon, grace);
    rpc_cancel_calls(daemon->rpc);
}

// With an answer, as far as it is taken.
static void cut_off(struct daemon *daemon)
{
    rpc_end_calls(daemon->rpc);
    uv_timer_start(&daemon->grace, on_cut_off, CUT_OFF_MS, 0);
}

static void on_grace_over(uv_timer_t *timer)
{
    struct daemon *daemon = CONTAINER_OF(timer, struct daemon, grace);
    LOG(WARN, "requests cut off at the end of the grace period");
    cut_off(daemon);
}

// Who follows health has left by now. Others, such as most proxies, learn it from a closed port and
// a connection that ends between calls: nothing is lost that way. gRPC's own farewell is not as
// careful: what crosses with it on the wire ends with CANCELLED, which nobody tries again.
static void on_closing(uv_timer_t *timer)
{
    struct daemon *daemon = CONTAINER_OF(timer, struct daemon, closing);
    gate_close(daemon->context.gate);
}

// New calls are refused and connections told to go elsewhere; what is in flight finishes.
static void on_lame_duck_over(uv_timer_t *timer)
{
    struct daemon *daemon = CONTAINER_OF(timer, struct daemon, lame_duck);
    daemon->drain_started = true;
    uv_timer_stop(&daemon->closing);
    gate_stop(daemon->context.gate);
    if (daemon->context.sharing) {
        sharing_stop(daemon->context.sharing);
        rings_drain(daemon->context.rings);
    }
    control_stop(daemon->context.control);
    rpc_drain(daemon->rpc);
    uv_timer_start(&daemon->grace, on_grace_over, daemon->config->drain_grace_ms, 0);
}

static void begin_drain(struct daemon *daemon, const char *reason)
{
    uint32_t lame_duck_ms = daemon->config->lame_duck_ms;
    daemon->draining = true;
    atomic_store_explicit(&daemon->context.draining, true, memory_order_relaxed);
    LOG(INFO, "draining", LOG_STR("reason", reason), LOG_U64("lame_duck_ms", lame_duck_ms),
        LOG_U64("grace_ms", daemon->config->drain_grace_ms));
    // Calls have the grace period, and after them the rings.
    supervisor_stopping(lame_duck_ms + 2ull * daemon->config->drain_grace_ms + STOP_SLACK_MS);
    health_set(daemon->context.health, HEALTH_NOT_SERVING);
    if (lame_duck_ms > 0)
        uv_timer_start(&daemon->closing, on_closing, lame_duck_ms / 2,
                       lame_duck_ms / CLOSING_LOOKS + 1);
    uv_timer_start(&daemon->lame_duck, on_lame_duck_over, lame_duck_ms, 0);
}

static void on_stop_signal(uv_signal_t *handle, int signal_number)
{
    struct daemon *daemon = handle->data;
    if (!daemon->draining) {
        begin_drain(daemon, signal_number == SIGTERM ? "SIGTERM" : "SIGINT");
    } else if (daemon->drain_started) { // told twice: no more waiting
        LOG(WARN, "told to stop again, requests in flight are cut off");
        cut_off(daemon);
    }
}

static void on_hangup(uv_signal_t *handle, int signal_number)
{
    (void)signal_number;
    const struct daemon *daemon = handle->data;
    reload_request(daemon->context.reload);
}

static void on_drained(uv_async_t *handle)
{
    struct daemon *daemon = CONTAINER_OF(handle, struct daemon, drained);
    uv_stop(&daemon->loop);
}

// ---- the loop

static void close_handle(uv_handle_t *handle, void *unused)
{
    (void)unused;
    if (!uv_is_closing(handle))
        uv_close(handle, NULL);
}

static void destroy_loop(struct daemon *daemon)
{
    uv_walk(&daemon->loop, close_handle, NULL);
    uv_run(&daemon->loop, UV_RUN_DEFAULT);
    ASSERT(uv_loop_close(&daemon->loop) == 0);
}

static void on_watched(uv_poll_t *poll, int status, int events)
{
    (void)poll, (void)status, (void)events;
}

// libuv aborts if its table of what the loop watches, by descriptor, cannot grow. So it grows now, as
// far as descriptors go: the table keeps its size.
static void reserve_watchers(uv_loop_t *loop)
{
    long files = sysconf(_SC_OPEN_MAX);
    int last = files > 0 && files < WATCHED_MAX ? (int)files - 1 : WATCHED_MAX - 1;
    int low = eventfd(0, EFD_CLOEXEC);
    int high = low < 0 ? -1 : fcntl(low, F_DUPFD_CLOEXEC, last);
    uv_poll_t poll;
    if (high >= 0 && uv_poll_init(loop, &poll, high) == 0) {
        uv_poll_start(&poll, UV_READABLE, on_watched);
        uv_close((uv_handle_t *)&poll, NULL);
        uv_run(loop, UV_RUN_NOWAIT);
    }
    if (high >= 0)
        close(high);
    if (low >= 0)
        close(low);
}

NODISCARD static enum status create_loop(struct daemon *daemon, struct error *err)
{
    uv_loop_t *loop = &daemon->loop;
    int failed = uv_loop_init(loop);
    if (failed)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "the main loop cannot be set up: %s",
                         uv_strerror(failed));
    uv_timer_init(loop, &daemon->closing);
    uv_timer_init(loop, &daemon->lame_duck);
    uv_timer_init(loop, &daemon->grace);
    uv_timer_init(loop, &daemon->device_check);
    uv_timer_init(loop, &daemon->alive);
    failed = uv_async_init(loop, &daemon->drained, on_drained);
    if (!failed)
        failed = uv_signal_init(loop, &daemon->on_term);
    if (!failed)
        failed = uv_signal_init(loop, &daemon->on_int);
    if (!failed)
        failed = uv_signal_init(loop, &daemon->on_hup);
    if (failed) {
        destroy_loop(daemon);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "the main loop cannot be set up: %s",
                         uv_strerror(failed));
    }
    daemon->on_term.data = daemon->on_int.data = daemon->on_hup.data = daemon;
    reserve_watchers(loop);
    return STATUS_OK;
}

static void do_nothing(uv_work_t *work)
{
    (void)work;
}

// Signals were blocked while threads were made, so that they come here and nowhere else: libuv's
// pool is made by its first work, and what it let in would end the process once the loop is gone.
static void run_loop(struct daemon *daemon)
{
    int queued = uv_queue_work(&daemon->loop, &daemon->nothing, do_nothing, NULL);
    ASSERT(queued == 0);
    uv_signal_start(&daemon->on_term, on_stop_signal, SIGTERM);
    uv_signal_start(&daemon->on_int, on_stop_signal, SIGINT);
    uv_signal_start(&daemon->on_hup, on_hangup, SIGHUP);
    uv_timer_start(&daemon->device_check, on_device_check, DEVICE_CHECK_MS, DEVICE_CHECK_MS);
    heap_watch(&daemon->loop, &daemon->heap);
    uint64_t alive_ms = supervisor_alive_ms();
    if (alive_ms > 0)
        uv_timer_start(&daemon->alive, on_alive, 0, alive_ms);
    sigset_t handled;
    sigemptyset(&handled);
    sigaddset(&handled, SIGTERM);
    sigaddset(&handled, SIGINT);
    sigaddset(&handled, SIGHUP);
    pthread_sigmask(SIG_UNBLOCK, &handled, NULL);
    uv_run(&daemon->loop, UV_RUN_DEFAULT);
    pthread_sigmask(SIG_BLOCK, &handled, NULL);
}

// ---- stop

static void log_failure(const struct error *err)
{
    LOG(ERROR, "cannot start", LOG_STR("status", status_name(err->status)),
        LOG_STR("reason", err->text));
}

// Undoes what was started, in reverse; after a failed start some of it is not there.
static void stop(struct daemon *daemon)
{
    struct service_context *context = &daemon->context;
    if (daemon->context.gate)
        gate_stop(daemon->context.gate);
    if (context->sharing)
        sharing_stop(context->sharing);
    if (daemon->watchdog)
        watchdog_stop(daemon->watchdog); // what it looks at goes
    if (daemon->rpc) {
        if (!daemon->drain_started) { // the start failed at its last step
            rpc_drain(daemon->rpc);
            uv_run(&daemon->loop, UV_RUN_DEFAULT); // until on_drained
        }
        rpc_destroy(daemon->rpc);
    }
    if (daemon->context.gate)
        gate_drop_connections(daemon->context.gate);
    if (context->http_listener)
        listener_stop(context->http_listener); // so late: it tells of the drain
    if (context->http)
        http_stop(context->http);
    if (context->http_listener)
        listener_drop_connections(context->http_listener);
    if (context->rings)
        rings_wait_idle(context->rings, daemon->config->drain_grace_ms);
    if (context->sharing)
        sharing_drop_connections(context->sharing);
    if (context->rings)
        rings_destroy(context->rings);
    destroy_loop(daemon);
    watchdog_destroy(daemon->watchdog);
    if (daemon->context.gate)
        gate_destroy(daemon->context.gate);
    if (context->http)
        http_destroy(context->http);
    gpus_close(context->gpus);
    tracer_destroy(context->tracer); // no request is left that it would miss
    if (context->http_listener)
        listener_destroy(context->http_listener);
    if (context->sharing)
        sharing_destroy(context->sharing);
    if (context->regions)
        regions_destroy(context->regions);
    if (context->control)
        control_destroy(context->control);
    if (context->health)
        health_destroy(context->health);
    reflection_deinit();
    reload_destroy(context->reload);
    scrub_destroy(context->scrub);
    if (context->batcher)
        batcher_destroy(context->batcher);
    if (context->weights)
        weights_destroy(context->weights);
    if (context->engine)
        context->engine_ops->close(context->engine);
    metrics_destroy(context->metrics);
    config_deinit(&daemon->file);
    free(daemon);
}

// ---- the table of contents

NODISCARD static enum status start(struct daemon *daemon, struct error *err)
{
    struct service_context *context = &daemon->context;
    enum status status = metrics_create(&context->metrics, err);
    if (status == STATUS_OK)
        status = control_create(&daemon->loop, &context->control, err);
    if (status == STATUS_OK)
        status = bind_addresses(daemon, err);
    if (status == STATUS_OK)
        status = open_engine(daemon, err);
    if (status == STATUS_OK)
        status = create_regions(daemon, err);
    if (status == STATUS_OK)
        status = load_weights(daemon, err);
    if (status == STATUS_OK)
        status = create_batcher(daemon, err);
    if (status == STATUS_OK)
        status = self_test(daemon, err);
    if (status == STATUS_OK)
        status = reflection_init(err);
    if (status == STATUS_OK)
        status = health_create(&context->health, err);
    if (status == STATUS_OK)
        status = start_tracing(daemon, err);
    if (status == STATUS_OK)
        status = start_scrub(daemon, err);
    if (status == STATUS_OK)
        status = start_serving(daemon, err);
    if (status == STATUS_OK)
        status = start_watchdog(daemon, err);
    return status;
}

static void announce(const struct daemon *daemon)
{
    char addresses[ADDRESSES_BYTES];
    listener_addresses(daemon->context.listener, addresses, sizeof addresses);
    char health_addresses[ADDRESSES_BYTES] = "";
    if (gate_health_listener(daemon->context.gate))
        listener_addresses(gate_health_listener(daemon->context.gate), health_addresses,
                           sizeof health_addresses);
    char http_address[ADDRESSES_BYTES] = "";
    if (daemon->context.http_listener)
        listener_addresses(daemon->context.http_listener, http_address, sizeof http_address);
    LOG(INFO, "ready", LOG_STR("version", EINSUMD_VERSION), LOG_STR("listen", addresses),
        LOG_STR("http_listen", http_address), LOG_STR("health_listen", health_addresses),
        LOG_U64("weights", weights_totals(daemon->context.weights).weights),
        LOG_U64("ms", (now_ns() - daemon->context.started_ns) / 1000000u));
    supervisor_ready(addresses);
}

enum daemon_exit daemon_run(struct config *config, const char *config_path)
{
    struct error err;
    struct daemon *daemon = calloc(1, sizeof *daemon);
    if (!daemon || config_copy(&daemon->file, config, &err) != STATUS_OK) {
        error_set(&err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
        log_failure(&err);
        free(daemon);
        return DAEMON_EXIT_FAILED;
    }
    daemon->config = config;
    daemon->config_path = config_path;
    daemon->context.config = config;
    daemon->context.started_ns = now_ns();
    daemon->exit = DAEMON_EXIT_DRAINED;
    resolve_threads(config);
    if (create_loop(daemon, &err) != STATUS_OK) {
        log_failure(&err);
        config_deinit(&daemon->file);
        free(daemon);
        return DAEMON_EXIT_FAILED;
    }
    if (start(daemon, &err) == STATUS_OK) {
        announce(daemon);
        run_loop(daemon);
    } else if (err.status == STATUS_CANCELLED && stop_requested()) {
        LOG(INFO, "told to stop while starting");
    } else {
        log_failure(&err);
        daemon->exit = DAEMON_EXIT_FAILED;
    }
    enum daemon_exit code = daemon->exit;
    stop(daemon);
    LOG(INFO, "stopped", LOG_U64("exit_code", code));
    return code;
}
