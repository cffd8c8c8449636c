// The gRPC server's queues, threads and pool of calls. Start-up and shutdown follow the order that
// C core needs:
//
//     stop arming, shutdown_and_notify -> every call ends, by itself or cancelled -> shut the
//     queues down -> drain and join
//     -> destroy server and queues -> grpc_shutdown
//
// Shutting a queue down while a call is live would abort or lose tags, so live_calls counts them.
#include "rpc.h"

#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "backlog.h"
#include "log.h"
#include "rpc_internal.h"

enum {
    GENERIC_SLOTS = 16,           // armed on each queue for the methods that are looked up by path
    REGISTERED_SLOTS = 64,        // armed on each queue for each message_with_call method
    SPARE_CALLS = 64,             // beyond live and armed: so that a full house still answers
    SWEEP_MS = 500,               // how often replies that nobody reads are looked for
    CONNECTIONS_MAX = 1 << 20,    // whose calls are counted
    CONNECTION_CALLS_SURE = 4,    // that each may have open, whatever others have
    METADATA_OVERHEAD_BYTES = 32, // as HTTP/2 reckons each entry
    READ_BYTES_MAX = 256 << 10,   // at once from a connection, while others wait
    // Serving front-ends ping every 10 to 30 s, some faster.
    PING_INTERVAL_MS_MIN = 1000,
    GRPC_LOG_LINES_A_SECOND = 4,
    // What a call may cost beside its messages: headers, frames, window updates for the reply.
    CALL_OVERHEAD_BYTES = 16 << 10,
};

__thread struct rpc_thread *rpc_thread_here;

// ---- the pool

static struct call *init_call(struct rpc_thread *thread, struct call *call)
{
    call->thread = thread;
    call->status_text = grpc_empty_slice();
    grpc_metadata_array_init(&call->initial_metadata);
    grpc_call_details_init(&call->details);
    for (enum tag_kind kind = 0; kind < TAG_WAKE; kind++)
        call->tags[kind] = (struct tag){.kind = kind, .call = call};
    return call;
}

// Those that were used before come first: memory that is never needed is never touched.
static struct call *take_free(struct rpc_thread *thread)
{
    struct call *call = thread->free_list;
    if (call)
        thread->free_list = call->next;
    else if (thread->calls_used_n < thread->calls_n)
        call = init_call(thread, &thread->calls[thread->calls_used_n++]);
    return call;
}

static void put_free(struct call *call)
{
    call->next = call->thread->free_list;
    call->thread->free_list = call;
}

static void end_connection(const struct call *call)
{
    const struct rpc_options *options = &call->thread->rpc->options;
    options->on_connection_ends(options->drained_context, connection_fd(call->connection));
}

// False: the call's connection is about to end.
static bool link_live(struct call *call)
{
    struct rpc_thread *thread = call->thread;
    struct rpc *rpc = thread->rpc;
    call->previous = NULL;
    call->next = thread->live;
    if (call->next)
        call->next->previous = call;
    thread->live = call;
    atomic_fetch_add_explicit(&rpc->arrived, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&rpc->live_calls, 1, memory_order_relaxed);
    enum connections_call began =
        connections_call_began(rpc->connections, call_connection(call), call->through_proxy);
    if (began == CONNECTION_ENDS)
        end_connection(call);
    return began == CONNECTION_STAYS;
}

static void unlink_live(struct call *call)
{
    struct rpc_thread *thread = call->thread;
    if (call->previous)
        call->previous->next = call->next;
    else
        thread->live = call->next;
    if (call->next)
        call->next->previous = call->previous;
}

static void count_down(struct rpc *rpc)
{
    if (atomic_fetch_sub_explicit(&rpc->live_calls, 1, memory_order_acq_rel) == 1)
        rpc->options.on_drained(rpc->options.drained_context);
}

// Before the slot is used again: what a call leaves behind.
static void call_reset(struct call *call)
{
    call->method = NULL;
    call->armed = NULL;
    call->grpc = NULL;
    call->state = NULL;
    call->connection = 0;
    atomic_store_explicit(&call->references, 1, memory_order_relaxed);
    atomic_store_explicit(&call->cancelled, false, memory_order_relaxed);
    atomic_store_explicit(&call->wake_queued, false, memory_order_relaxed);
    call->initial_metadata.count = 0;
    call->received = call->sending = call->last_message = NULL;
    call->closed_cancelled = 0;
    call->reading = call->initial_metadata_sent = false;
    call->finish_asked = call->finish_started = call->finish_popped = call->over = false;
    call->write_started_ns = 0;
}

// ---- arming

// False: there is no call left; rpc_call_ended arms again.
static bool arm_slot(struct rpc_thread *thread, size_t registered)
{
    struct rpc *rpc = thread->rpc;
    struct call *call = take_free(thread);
    if (!call)
        return false;
    call_reset(call);
    struct tag *tag = &call->tags[TAG_ARRIVED];
    grpc_call_error error;
    if (registered < rpc->registered_n) {
        call->armed = rpc->registered_methods[registered];
        error = grpc_server_request_registered_call(
            rpc->server, rpc->registered[registered], &call->grpc, &call->deadline,
            &call->initial_metadata, &call->received, thread->queue, thread->queue, tag);
    } else {
        error =
            grpc_server_request_call(rpc->server, &call->grpc, &call->details,
                                     &call->initial_metadata, thread->queue, thread->queue, tag);
    }
    ASSERT(error == GRPC_CALL_OK);
    thread->armed[registered]++;
    return true;
}

static void arm(struct rpc_thread *thread)
{
    struct rpc *rpc = thread->rpc;
    if (atomic_load_explicit(&rpc->draining, memory_order_acquire))
        return;
    for (size_t i = 0; i <= rpc->registered_n; i++) {
        uint32_t wanted = i < rpc->registered_n ? REGISTERED_SLOTS : GENERIC_SLOTS;
        while (thread->armed[i] < wanted && arm_slot(thread, i))
            ;
    }
}

static size_t armed_index(const struct rpc *rpc, const struct method *method)
{
    size_t i = 0;
    while (i < rpc->registered_n && rpc->registered_methods[i] != method)
        i++;
    return i;
}

static const struct method *find_method(const struct rpc *rpc, grpc_slice path)
{
    for (const struct method *const *table = rpc->options.methods; *table; table++)
        for (const struct method *method = *table; method->path; method++)
            if (grpc_slice_str_cmp(path, method->path) == 0)
                return method;
    return NULL;
}

static uint32_t metrics_call_of(const struct rpc *rpc, const struct method *of)
{
    size_t i = 0;
    for (const struct method *const *table = rpc->options.methods; *table; table++)
        for (const struct method *method = *table; method->path; method++, i++)
            if (method == of)
                return rpc->metrics_calls[i];
    return 0;
}

// Past the limit of all. Before it, a connection may have as many calls as it leaves to others; and a few
// beside all that, so that no number of calls keeps anybody out.
NODISCARD static enum status check_calls(const struct call *call, struct error *err)
{
    const struct rpc_thread *thread = call->thread;
    const struct rpc *rpc = thread->rpc;
    uint32_t calls = connections_admitted(rpc->connections, call->connection);
    uint32_t of_all = atomic_load_explicit(&rpc->admitted, memory_order_relaxed);
    uint32_t left = of_all < rpc->options.calls_max ? rpc->options.calls_max - of_all : 0;
    if (calls < CONNECTION_CALLS_SURE && thread->sure_n < thread->sure_max)
        return STATUS_OK;
    if (thread->admitted_n >= thread->admitted_max) {
        METRICS_ADD(rpc->options.metrics, refused_calls, 1);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "too many calls are open (calls_max)");
    }
    if (calls >= left) {
        METRICS_ADD(rpc->options.metrics, refused_connection_calls, 1);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "this connection has %" PRIu32 " calls open, and %" PRIu32
                         " are left for all (calls_max)",
                         calls, left);
    }
    return STATUS_OK;
}

// gRPC looks at the limit frame by frame, so that what comes in many gets past it.
NODISCARD static enum status check_metadata(const struct call *call, struct error *err)
{
    const struct rpc_options *options = &call->thread->rpc->options;
    size_t bytes = 0;
    for (size_t i = 0; i < call->initial_metadata.count; i++) {
        const grpc_metadata *metadata = &call->initial_metadata.metadata[i];
        bytes += GRPC_SLICE_LENGTH(metadata->key) + GRPC_SLICE_LENGTH(metadata->value) +
                 METADATA_OVERHEAD_BYTES;
    }
    if (bytes <= options->metadata_bytes_max)
        return STATUS_OK;
    METRICS_ADD(options->metrics, refused_metadata, 1);
    return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                     "metadata of %zu bytes, at most %" PRIu32 " (metadata_bytes_max)", bytes,
                     options->metadata_bytes_max);
}

static bool came_through_proxy(const struct call *call)
{
    bool via = false;
    for (size_t i = 0; i < call->initial_metadata.count && !via; i++)
        via = grpc_slice_str_cmp(call->initial_metadata.metadata[i].key, "via") == 0;
    return via;
}

static void admit(struct call *call)
{
    struct rpc_thread *thread = call->thread;
    uint32_t before = connections_admit(thread->rpc->connections, call->connection);
    call->admitted = true;
    call->sure = before < CONNECTION_CALLS_SURE && thread->sure_n < thread->sure_max;
    if (call->sure) {
        thread->sure_n++;
    } else {
        thread->admitted_n++;
        atomic_fetch_add_explicit(&thread->rpc->admitted, 1, memory_order_relaxed);
    }
}

static void unadmit(struct call *call)
{
    struct rpc_thread *thread = call->thread;
    connections_unadmit(thread->rpc->connections, call->connection);
    call->admitted = false;
    if (call->sure) {
        thread->sure_n--;
    } else {
        thread->admitted_n--;
        atomic_fetch_sub_explicit(&thread->rpc->admitted, 1, memory_order_relaxed);
    }
}

static void on_arrived(struct rpc_thread *thread, struct call *call, bool success)
{
    struct rpc *rpc = thread->rpc;
    thread->armed[armed_index(rpc, call->armed)]--;
    if (!success) { // the server is shutting down
        put_free(call);
        return;
    }
    arm(thread); // before handling: a method without an armed slot hangs its callers
    call->through_proxy = came_through_proxy(call);
    bool stays = link_live(call);
    if (call->armed) {
        call->method = call->armed;
    } else {
        call->method = find_method(rpc, call->details.method);
        call->deadline = call->details.deadline;
        grpc_slice_unref(call->details.method);
        grpc_slice_unref(call->details.host);
    }
    call->metrics_call = metrics_call_of(rpc, call->method);
    if (call->received)
        rpc_message_came(call, call->received);
    struct error full;
    bool admitted =
        check_metadata(call, &full) == STATUS_OK && check_calls(call, &full) == STATUS_OK;
    if (admitted)
        admit(call);
    call_arrived(call, admitted ? NULL : &full, !stays);
}

void rpc_message_came(struct call *call, const grpc_byte_buffer *message)
{
    uint64_t bytes = CALL_OVERHEAD_BYTES;
    if (message)
        bytes += grpc_byte_buffer_length((grpc_byte_buffer *)(uintptr_t)message);
    connections_settle(call->thread->rpc->connections, call_connection(call), bytes);
}

uint64_t rpc_backlog(const struct rpc *rpc)
{
    uint64_t arrived = atomic_load_explicit(&rpc->arrived, memory_order_relaxed);
    uint64_t started = backlog_calls_started();
    return started > arrived ? started - arrived : 0;
}

uint64_t rpc_connection_backlog(const struct rpc *rpc, int fd)
{
    uint32_t number = connection_number(fd);
    uint64_t arrived = connections_calls(rpc->connections, number);
    uint64_t started = backlog_streams_started(connections_channelz(rpc->connections, number));
    return started > arrived ? started - arrived : 0;
}

struct rpc_progress rpc_progress(const struct rpc *rpc, uint32_t index)
{
    const struct rpc_thread *thread = &rpc->threads[index];
    struct rpc_progress progress = {
        .events = atomic_load_explicit(&thread->events, memory_order_relaxed),
        .within_grpc = atomic_load_explicit(&thread->within_grpc, memory_order_relaxed),
    };
    clockid_t clock;
    struct timespec cpu;
    if (pthread_getcpuclockid(thread->pthread, &clock) == 0 && clock_gettime(clock, &cpu) == 0)
        progress.cpu_ns = (uint64_t)cpu.tv_sec * 1000000000u + (uint64_t)cpu.tv_nsec;
    return progress;
}

enum status call_request_begin(struct call *call, struct error *err)
{
    struct rpc *rpc = call->thread->rpc;
    const struct rpc_options *options = &rpc->options;
    uint32_t of_all = atomic_fetch_add_explicit(&rpc->requests, 1, memory_order_relaxed);
    uint32_t of_it = connections_request_began(rpc->connections, call_connection(call));
    if (of_it < options->connection_in_flight_max && of_all < options->in_flight_max)
        return STATUS_OK;
    call_request_end(call);
    if (of_it >= options->connection_in_flight_max) {
        METRICS_ADD(options->metrics, refused_connection_in_flight, 1);
        return error_set(
            err, STATUS_RESOURCE_EXHAUSTED,
            "this connection has %" PRIu32 " requests in flight (connection_in_flight_max)", of_it);
    }
    METRICS_ADD(options->metrics, refused_in_flight, 1);
    return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                     "%" PRIu32 " requests are in flight (in_flight_max)", of_all);
}

void call_request_end(struct call *call)
{
    struct rpc *rpc = call->thread->rpc;
    atomic_fetch_sub_explicit(&rpc->requests, 1, memory_order_relaxed);
    connections_request_ended(rpc->connections, call->connection);
}

void rpc_call_ended(struct call *call)
{
    struct rpc_thread *thread = call->thread;
    unlink_live(call);
    if (call->admitted)
        unadmit(call);
    if (connections_call_ended(thread->rpc->connections, call->connection, call->through_proxy))
        end_connection(call);
    put_free(call);
    arm(thread);
    count_down(thread->rpc);
}

// ---- one thread

bool rpc_caller_is_gone(int socket)
{
    struct pollfd gone = {.fd = socket};
    return poll(&gone, 1, 0) == 1; // POLLERR and POLLHUP need not be asked for
}

// gRPC reads on as long as there is something to read, on the thread that it was given the socket by: hence
// one of its own, which guard.c watches, and never the main one. It takes 100 us and more for a
// connection, be its caller there or not.
static void take_connection(struct rpc_thread *thread, uint32_t number)
{
    struct rpc *rpc = thread->rpc;
    int fd = connection_fd(number), at_once = 1;
    if (rpc_caller_is_gone(fd)) {
        close(fd);
        return;
    }
    int twin = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    atomic_store_explicit(&thread->within_grpc, true, memory_order_relaxed);
    grpc_server_add_channel_from_fd(rpc->server, fd, rpc->credentials); // writes before it returns
    atomic_store_explicit(&thread->within_grpc, false, memory_order_relaxed);
    if (twin >= 0) { // what guard.c holds back
        setsockopt(twin, SOL_SOCKET, SO_RCVLOWAT, &at_once, sizeof at_once);
        close(twin);
    }
    pthread_mutex_lock(&rpc->finding);
    int64_t channelz = backlog_find_socket(rpc->channelz_last, fd);
    if (channelz > rpc->channelz_last)
        rpc->channelz_last = channelz;
    pthread_mutex_unlock(&rpc->finding);
    connections_set_channelz(rpc->connections, number, channelz);
}

// One by one: who keeps this thread within gRPC keeps no other connection waiting.
static void take_connections(struct rpc_thread *thread)
{
    uint32_t number;
    while ((number = connections_next(thread->rpc->connections)) != 0)
        take_connection(thread, number);
}

static void run_woken(struct rpc_thread *thread)
{
    struct call *stack = atomic_exchange_explicit(&thread->woken, NULL, memory_order_acq_rel);
    struct call *oldest = NULL; // the stack has the newest first
    while (stack) {
        struct call *next = stack->wake_next;
        stack->wake_next = oldest;
        oldest = stack;
        stack = next;
    }
    while (oldest) {
        struct call *next = oldest->wake_next; // call_woken may give the call away
        call_woken(oldest);
        oldest = next;
    }
}

// A caller that does not read its reply pins memory that others need.
static void sweep(struct rpc_thread *thread)
{
    uint64_t now = now_ns();
    uint64_t limit =
        (uint64_t)atomic_load_explicit(&thread->rpc->reply_timeout_ms, memory_order_relaxed) *
        1000000u;
    for (struct call *call = thread->live; call; call = call->next) {
        if (call->write_started_ns == 0 || now - call->write_started_ns < limit)
            continue;
        LOG(WARN, "reply not read in time, call cut off",
            LOG_STR("method", call->method ? call->method->path : "?"));
        grpc_call_cancel(call->grpc, NULL);
    }
    thread->swept_ns = now;
}

static void drain_live_calls(struct rpc_thread *thread, bool through_proxies_alone)
{
    struct call *next;
    for (struct call *call = thread->live; call; call = next) {
        next = call->next;
        bool meant = call->through_proxy || !through_proxies_alone;
        if (meant && call->method && call->method->on_drain && !call->over)
            call->method->on_drain(call);
    }
}

// The job of a call may come back later, and then finds it finished.
static void end_live_calls(struct rpc_thread *thread)
{
    struct error err;
    error_set(&err, STATUS_UNAVAILABLE, "draining: not finished within drain_grace_ms");
    struct call *next;
    for (struct call *call = thread->live; call; call = next) {
        next = call->next;
        if (call->over || call->finish_asked)
            continue;
        if (call->method && call->method->on_cancel)
            call->method->on_cancel(call);
        call_finish(call, NULL, &err);
    }
}

// Once each, when the time has come. Armed slots fail when the server starts to drain, and who sets the
// others wakes every thread.
static void look_at_end(struct rpc_thread *thread)
{
    struct rpc *rpc = thread->rpc;
    if (!thread->closing && atomic_load_explicit(&rpc->closing, memory_order_acquire)) {
        thread->closing = true;
        drain_live_calls(thread, true);
    }
    if (!thread->draining && atomic_load_explicit(&rpc->draining, memory_order_acquire)) {
        thread->draining = true;
        drain_live_calls(thread, false);
    }
    if (!thread->ended_calls && atomic_load_explicit(&rpc->end_calls, memory_order_acquire)) {
        thread->ended_calls = true;
        end_live_calls(thread);
    }
}

static void handle(struct rpc_thread *thread, const struct tag *tag, bool success)
{
    switch (tag->kind) {
    case TAG_WAKE:
        take_connections(thread);
        run_woken(thread);
        break;
    case TAG_SHUTDOWN:
        count_down(thread->rpc);
        break;
    case TAG_ARRIVED:
        on_arrived(thread, tag->call, success);
        break;
    case TAG_CLOSED:
    case TAG_RECEIVED:
    case TAG_SENT:
    case TAG_FINISHED:
        call_tag_popped(tag->call, tag->kind, success);
        break;
    }
}

static void *thread_main(void *argument)
{
    struct rpc_thread *thread = argument;
    for (;;) {
        gpr_timespec until = gpr_inf_future(GPR_CLOCK_MONOTONIC);
        if (thread->live)
            until = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                                 gpr_time_from_millis(SWEEP_MS, GPR_TIMESPAN));
        atomic_store_explicit(&thread->within_grpc, true, memory_order_relaxed);
        grpc_event event = grpc_completion_queue_next(thread->queue, until, NULL);
        atomic_store_explicit(&thread->within_grpc, false, memory_order_relaxed);
        atomic_fetch_add_explicit(&thread->events, 1, memory_order_relaxed);
        if (event.type == GRPC_QUEUE_SHUTDOWN)
            return NULL;
        rpc_thread_here = thread;
        beat_turn(&thread->beat);
        if (event.type == GRPC_OP_COMPLETE)
            handle(thread, event.tag, event.success);
        look_at_end(thread);
        if (thread->live && now_ns() - thread->swept_ns > (uint64_t)SWEEP_MS * 1000000u)
            sweep(thread);
        // What this thread has woken itself comes without a tag.
        while (atomic_load_explicit(&thread->woken, memory_order_relaxed))
            run_woken(thread);
        beat_turn(&thread->beat);
        rpc_thread_here =
            NULL; // gRPC, too, runs code of ours, which must not take it for this loop
    }
}

// ---- start and stop

// gRPC has a line for each thing that a hostile client does wrong: a few say it.
static bool grpc_log_lines_left(void)
{
    static _Atomic uint64_t second, lines;
    uint64_t now = now_ns() / 1000000000u;
    if (atomic_exchange_explicit(&second, now, memory_order_relaxed) != now)
        atomic_store_explicit(&lines, 0, memory_order_relaxed);
    return atomic_fetch_add_explicit(&lines, 1, memory_order_relaxed) < GRPC_LOG_LINES_A_SECOND;
}

static void on_grpc_log(gpr_log_func_args *args)
{
    if (args->severity == GPR_LOG_SEVERITY_ERROR && !grpc_log_lines_left())
        return;
    if (args->severity == GPR_LOG_SEVERITY_ERROR)
        LOG(WARN, "grpc", LOG_STR("text", args->message));
    else
        LOG(DEBUG, "grpc", LOG_STR("text", args->message));
}

static grpc_arg integer_arg(const char *key, int value)
{
    grpc_arg arg = {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)key};
    arg.value.integer = value;
    return arg;
}

static int clamp_int(uint64_t value)
{
    return value > INT32_MAX ? INT32_MAX : (int)value;
}

static int or_never(uint32_t ms)
{
    return ms > 0 ? clamp_int(ms) : INT32_MAX;
}

static grpc_server *create_server(const struct rpc_options *options)
{
    grpc_resource_quota *quota = grpc_resource_quota_create("einsumd");
    grpc_resource_quota_resize(quota, options->transport_bytes_max);
    grpc_arg quota_arg = {.type = GRPC_ARG_POINTER,
                          .key = (char *)(uintptr_t)GRPC_ARG_RESOURCE_QUOTA};
    quota_arg.value.pointer.p = quota;
    quota_arg.value.pointer.vtable = grpc_resource_quota_arg_vtable();
    const grpc_arg args[] = {
        integer_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, clamp_int(options->message_bytes_max)),
        integer_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1),
        integer_arg(GRPC_ARG_MAX_CONCURRENT_STREAMS, clamp_int(options->connection_requests_max)),
        // Compressed messages are inflated before their size is checked: refuse them.
        integer_arg(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1),
        integer_arg(GRPC_ARG_MAX_METADATA_SIZE, clamp_int(options->metadata_bytes_max)),
        integer_arg(GRPC_ARG_KEEPALIVE_TIME_MS, or_never(options->keepalive_ms)),
        integer_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, clamp_int(options->keepalive_timeout_ms)),
        integer_arg(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        // Pings are only answered. gRPC's own way with too many takes it time that grows with the
        // square of their number; a flood of anything is cut off by guard.h.
        integer_arg(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, PING_INTERVAL_MS_MIN),
        integer_arg(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0),
        integer_arg(GRPC_ARG_MAX_CONNECTION_IDLE_MS, or_never(options->connection_idle_ms)),
        integer_arg(GRPC_ARG_MAX_CONNECTION_AGE_MS, or_never(options->connection_age_ms)),
        integer_arg(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS,
                    or_never(options->connection_age_grace_ms)),
        integer_arg("grpc.experimental.tcp_max_read_chunk_size", READ_BYTES_MAX),
        quota_arg,
    };
    const grpc_channel_args channel_args = {.num_args = ARRAY_LEN(args),
                                            .args = (grpc_arg *)(uintptr_t)args};
    grpc_server *server = grpc_server_create(&channel_args, NULL);
    grpc_resource_quota_unref(quota);
    return server;
}

static void register_methods(struct rpc *rpc)
{
    size_t i = 0;
    for (const struct method *const *table = rpc->options.methods; *table; table++) {
        for (const struct method *method = *table; method->path; method++, i++) {
            ASSERT(i < RPC_METHODS_MAX && method->needs);
            rpc->metrics_calls[i] = metrics_add_call(rpc->options.metrics, method->path);
            if (!method->message_with_call)
                continue;
            ASSERT(rpc->registered_n < RPC_REGISTERED_MAX);
            rpc->registered_methods[rpc->registered_n] = method;
            rpc->registered[rpc->registered_n++] = grpc_server_register_method(
                rpc->server, method->path, NULL, GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER, 0);
        }
    }
}

NODISCARD static enum status create_pool(struct rpc_thread *thread, struct error *err)
{
    const struct rpc *rpc = thread->rpc;
    size_t calls_n = thread->admitted_max + thread->sure_max + GENERIC_SLOTS +
                     rpc->registered_n * REGISTERED_SLOTS + SPARE_CALLS;
    thread->calls = calloc(calls_n, sizeof *thread->calls);
    if (!thread->calls)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for %zu calls", calls_n);
    thread->calls_n = calls_n;
    return STATUS_OK;
}

static void destroy_pool(struct rpc_thread *thread)
{
    for (size_t i = 0; i < thread->calls_used_n; i++)
        grpc_metadata_array_destroy(&thread->calls[i].initial_metadata);
    free(thread->calls);
}

static void create_waker(struct rpc_thread *thread)
{
    thread->wake_tag = (struct tag){.kind = TAG_WAKE};
    thread->waker_channel = grpc_lame_client_channel_create("", GRPC_STATUS_UNAVAILABLE, "waker");
    thread->waker = grpc_channel_create_call(thread->waker_channel, NULL, GRPC_PROPAGATE_DEFAULTS,
                                             thread->queue, grpc_slice_from_static_string("/"),
                                             NULL, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    ASSERT(thread->waker);
}

static void destroy_waker(struct rpc_thread *thread)
{
    grpc_call_unref(thread->waker);
    grpc_channel_destroy(thread->waker_channel);
}

static void shut_queue(struct rpc_thread *thread)
{
    destroy_waker(thread);
    grpc_completion_queue_shutdown(thread->queue);
    if (thread->started)
        pthread_join(thread->pthread, NULL); // it drains the queue first
    else
        while (grpc_completion_queue_next(thread->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL)
                   .type != GRPC_QUEUE_SHUTDOWN)
            ;
}

NODISCARD static enum status start_threads(struct rpc *rpc, struct error *err)
{
    for (uint32_t i = 0; i < rpc->options.threads; i++) {
        struct rpc_thread *thread = &rpc->threads[i];
        arm(thread);
        if (pthread_create(&thread->pthread, NULL, thread_main, thread) != 0)
            return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no rpc thread could be started");
        thread->started = true;
        char name[16];
        snprintf(name, sizeof name, "rpc%u", i);
        pthread_setname_np(thread->pthread, name);
    }
    return STATUS_OK;
}

static void free_rpc(struct rpc *rpc)
{
    for (uint32_t i = 0; i < rpc->options.threads; i++)
        shut_queue(&rpc->threads[i]);
    grpc_server_destroy(rpc->server);
    grpc_server_credentials_release(rpc->credentials);
    for (uint32_t i = 0; i < rpc->options.threads; i++) {
        destroy_pool(&rpc->threads[i]);
        grpc_completion_queue_destroy(rpc->threads[i].queue);
    }
    grpc_shutdown();
    pthread_mutex_destroy(&rpc->finding);
    connections_destroy(rpc->connections);
    free(rpc->threads);
    free(rpc);
}

// As many as sockets.
static size_t connection_numbers(void)
{
    long files = sysconf(_SC_OPEN_MAX);
    return files > 0 && files < CONNECTIONS_MAX ? (size_t)files + 1 : CONNECTIONS_MAX;
}

enum status rpc_create(const struct rpc_options *options, struct rpc **out, struct error *err)
{
    ASSERT(options->threads > 0);
    struct rpc *rpc = calloc(1, sizeof *rpc);
    struct rpc_thread *threads = calloc(options->threads, sizeof *threads);
    struct connections *connections = connections_create(connection_numbers());
    if (!rpc || !threads || !connections) {
        free(rpc);
        free(threads);
        if (connections)
            connections_destroy(connections);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the gRPC server");
    }
    rpc->options = *options;
    rpc->threads = threads;
    rpc->connections = connections;
    rpc->shutdown_tag = (struct tag){.kind = TAG_SHUTDOWN};
    atomic_init(&rpc->reply_timeout_ms, options->reply_timeout_ms);
    pthread_mutex_init(&rpc->finding, NULL);
    atomic_init(&rpc->live_calls, 1); // the server's own, until its shutdown tag pops

    gpr_set_log_function(on_grpc_log);
    grpc_init();
    rpc->server = create_server(options);
    rpc->credentials = grpc_insecure_server_credentials_create();
    register_methods(rpc);
    for (uint32_t i = 0; i < options->threads; i++) {
        struct rpc_thread *thread = &threads[i];
        thread->rpc = rpc;
        thread->admitted_max = (options->calls_max + options->threads - 1) / options->threads;
        thread->sure_max = options->connections_max * CONNECTION_CALLS_SURE / options->threads + 1;
        thread->queue = grpc_completion_queue_create_for_next(NULL);
        grpc_server_register_completion_queue(rpc->server, thread->queue, NULL);
        create_waker(thread);
    }
    grpc_server_start(rpc->server);

    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < options->threads && status == STATUS_OK; i++)
        status = create_pool(&threads[i], err);
    if (status == STATUS_OK)
        status = start_threads(rpc, err);
    if (status != STATUS_OK)
        goto shut_down;
    *out = rpc;
    return STATUS_OK;

shut_down:
    // No connection was ever added, so only the armed slots and the shutdown tag remain: free_rpc
    // drains them.
    rpc->options.on_drained = NULL;
    atomic_store(&rpc->live_calls, 2); // never reaches zero: nobody waits for on_drained
    atomic_store(&rpc->draining, true);
    grpc_server_shutdown_and_notify(rpc->server, threads[0].queue, &rpc->shutdown_tag);
    free_rpc(rpc);
    return status;
}

void rpc_set_reply_timeout(struct rpc *rpc, uint32_t timeout_ms)
{
    atomic_store_explicit(&rpc->reply_timeout_ms, timeout_ms, memory_order_relaxed);
}

static void wake(struct rpc_thread *thread)
{
    grpc_call_error posted = grpc_call_start_batch(thread->waker, NULL, 0, &thread->wake_tag, NULL);
    ASSERT(posted == GRPC_CALL_OK);
}

void rpc_add_connection(struct rpc *rpc, int fd, struct access_peer *peer)
{
    if (!connections_add(rpc->connections, connection_number(fd), peer)) {
        close(fd);
        return;
    }
    uint32_t turn = atomic_fetch_add_explicit(&rpc->added, 1, memory_order_relaxed);
    wake(&rpc->threads[turn % rpc->options.threads]);
}

static void wake_all(struct rpc *rpc)
{
    for (uint32_t i = 0; i < rpc->options.threads; i++)
        wake(&rpc->threads[i]);
}

void rpc_take_added(struct rpc *rpc)
{
    if (connections_waiting(rpc->connections))
        wake_all(rpc);
}

struct connections *rpc_connections(const struct rpc *rpc)
{
    return rpc->connections;
}

uint32_t rpc_threads(const struct rpc *rpc)
{
    return rpc->options.threads;
}

const struct beat *rpc_beat(const struct rpc *rpc, uint32_t thread)
{
    return &rpc->threads[thread].beat;
}

void rpc_close(struct rpc *rpc)
{
    connections_close(rpc->connections);
    if (!atomic_exchange_explicit(&rpc->closing, true, memory_order_acq_rel))
        wake_all(rpc);
}

void rpc_drain(struct rpc *rpc)
{
    atomic_store_explicit(&rpc->draining, true, memory_order_release);
    grpc_server_shutdown_and_notify(rpc->server, rpc->threads[0].queue, &rpc->shutdown_tag);
}

void rpc_end_calls(struct rpc *rpc)
{
    if (!atomic_exchange_explicit(&rpc->end_calls, true, memory_order_acq_rel))
        wake_all(rpc);
}

void rpc_cancel_calls(struct rpc *rpc)
{
    grpc_server_cancel_all_calls(rpc->server);
}

void rpc_destroy(struct rpc *rpc)
{
    ASSERT(atomic_load_explicit(&rpc->live_calls, memory_order_acquire) == 0);
    free_rpc(rpc);
}
