// A client's life: its connections, its completion queue and the one thread that serves it.
//
//     caller --start--> gRPC --tag--> queue --> client's thread --> callback
//                                                   |  ^
//                                                   v  |
//                                       later: pauses before a retry, memory that gRPC still reads
//
// The client's thread blocks in the queue. Only while something is on the `later` list does it wake
// by itself, because C core has no call that puts an event into a queue at a time.

#include "client_internal.h"

#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MESSAGE_BYTES_MAX = 1 << 30, CONNECTIONS_MAX = 4096 };

static __thread bool on_own_thread;

// ---- errors and time ----------------------------------------------------------------------------

static const char *const status_names[] = {
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
};

const char *einsum_client_status_name(enum einsum_client_status status)
{
    size_t index = (size_t)status;
    return index < sizeof status_names / sizeof *status_names ? status_names[index] : "UNKNOWN";
}

enum einsum_client_status einsum_client_error_set(struct einsum_client_error *error,
                                                  enum einsum_client_status status,
                                                  const char *format, ...)
{
    if (!error)
        return status;
    memset(error, 0, sizeof *error);
    error->status = status;
    va_list args;
    va_start(args, format);
    vsnprintf(error->text, sizeof error->text, format, args);
    va_end(args);
    return status;
}

void einsum_client_enter_own_thread(void)
{
    on_own_thread = true;
}

bool einsum_client_on_own_thread(void)
{
    return on_own_thread;
}

enum einsum_client_status einsum_client_refuse_to_block(struct einsum_client_error *error)
{
    return einsum_client_error_set(error, EINSUM_CLIENT_FAILED_PRECONDITION,
                                   "a callback must not make a call that blocks");
}

uint64_t einsum_client_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

gpr_timespec einsum_client_deadline(uint64_t deadline_ns)
{
    if (deadline_ns == UINT64_MAX)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    // gRPC's monotonic clock has its own zero: go by the difference.
    uint64_t now = einsum_client_now_ns();
    uint64_t left = deadline_ns > now ? deadline_ns - now : 0;
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                        gpr_time_from_nanos((int64_t)left, GPR_TIMESPAN));
}

uint64_t einsum_client_deadline_after(uint32_t ms)
{
    return ms ? einsum_client_now_ns() + (uint64_t)ms * 1000000u : UINT64_MAX;
}

// xorshift64*; jitter needs no better.
uint64_t einsum_client_random(struct einsum_client *client)
{
    uint64_t x = client->random;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    client->random = x;
    return x * 0x2545f4914f6cdd1dull;
}

// ---- how a call ended ---------------------------------------------------------------------------

void einsum_client_ending_init(struct einsum_client_ending *ending)
{
    memset(ending, 0, sizeof *ending);
    ending->details = grpc_empty_slice();
    grpc_metadata_array_init(&ending->trailers);
}

void einsum_client_ending_deinit(struct einsum_client_ending *ending)
{
    grpc_slice_unref(ending->details);
    gpr_free((void *)ending->debug_text);
    grpc_metadata_array_destroy(&ending->trailers);
}

grpc_op einsum_client_ending_op(struct einsum_client_ending *ending)
{
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
    op.data.recv_status_on_client.trailing_metadata = &ending->trailers;
    op.data.recv_status_on_client.status = &ending->code;
    op.data.recv_status_on_client.status_details = &ending->details;
    op.data.recv_status_on_client.error_string = &ending->debug_text;
    return op;
}

// A pushback that is no number means "never", as a negative one does.
static int64_t parse_pushback(grpc_slice value)
{
    char text[24];
    size_t bytes = GRPC_SLICE_LENGTH(value);
    if (bytes == 0 || bytes >= sizeof text)
        return -1;
    memcpy(text, GRPC_SLICE_START_PTR(value), bytes);
    text[bytes] = '\0';
    char *end;
    long long ms = strtoll(text, &end, 10);
    if (*end || ms < 0)
        return -1;
    return ms > INT_MAX ? INT_MAX : ms;
}

static void read_trailers(const grpc_metadata_array *trailers, struct einsum_client_error *error)
{
    const grpc_slice *pushback = NULL;
    for (size_t i = 0; i < trailers->count; i++) {
        const grpc_metadata *entry = &trailers->metadata[i];
        if (grpc_slice_str_cmp(entry->key, "grpc-retry-pushback-ms") == 0)
            pushback = &entry->value;
        else if (grpc_slice_str_cmp(entry->key, "grpc-status-details-bin") == 0)
            einsum_client_details_read(GRPC_SLICE_START_PTR(entry->value),
                                       GRPC_SLICE_LENGTH(entry->value), &error->retry_after_ms,
                                       error->field);
    }
    if (pushback) // the more direct of the two
        error->retry_after_ms = parse_pushback(*pushback);
}

static void explain(const struct einsum_client *client, const char *said,
                    struct einsum_client_error *error)
{
    char copy[EINSUM_CLIENT_ERROR_TEXT_BYTES / 2];
    snprintf(copy, sizeof copy, "%.383s", said);
    if (error->status == EINSUM_CLIENT_RESOURCE_EXHAUSTED && strstr(said, "larger than max"))
        snprintf(error->text, sizeof error->text,
                 "the reply is larger than this client takes, %llu bytes: raise "
                 "receive_bytes_max, which is grpc.max_receive_message_length (%s)",
                 (unsigned long long)client->options.receive_bytes_max, copy);
    else if (error->status == EINSUM_CLIENT_UNAVAILABLE)
        snprintf(error->text, sizeof error->text, "cannot reach %s: %s", client->endpoint, copy);
    else if (error->status == EINSUM_CLIENT_DEADLINE_EXCEEDED)
        snprintf(error->text, sizeof error->text, "no answer from %s before the deadline",
                 client->endpoint);
    else
        snprintf(error->text, sizeof error->text, "%s", copy);
}

// Whether a status came over the wire. gRPC tells that one from its own only in its debug text: the
// peer's name is there the address once the peer has answered, and the channel's target before.
static bool came_from_peer(const struct einsum_client *client,
                           const struct einsum_client_ending *ending)
{
    static const char lead[] = "received from peer ";
    const char *peer = ending->debug_text ? strstr(ending->debug_text, lead) : NULL;
    if (!peer)
        return false;
    peer += sizeof lead - 1;
    size_t length = strlen(client->target);
    if (strncmp(peer, client->target, length) == 0 && (peer[length] == ' ' || !peer[length]))
        return false;
    // A connection that breaks after the first answer has the address, too.
    static const char *const broken[] = {"Socket closed", "Connection reset by peer", "Broken pipe",
                                         "Deadline Exceeded", "CANCELLED"};
    size_t said = GRPC_SLICE_LENGTH(ending->details);
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        if (said == strlen(broken[i]) &&
            memcmp(GRPC_SLICE_START_PTR(ending->details), broken[i], said) == 0)
            return false;
    }
    return true;
}

enum einsum_client_status einsum_client_ending_error(const struct einsum_client *client,
                                                     const struct einsum_client_ending *ending,
                                                     struct einsum_client_error *error)
{
    memset(error, 0, sizeof *error);
    bool known = ending->code > GRPC_STATUS_OK && ending->code <= GRPC_STATUS_UNAUTHENTICATED;
    error->status = known ? (enum einsum_client_status)(int)ending->code : EINSUM_CLIENT_UNKNOWN;
    error->from_server = came_from_peer(client, ending);
    char said[EINSUM_CLIENT_ERROR_TEXT_BYTES];
    einsum_client_clean_text(said, sizeof said, (const char *)GRPC_SLICE_START_PTR(ending->details),
                             GRPC_SLICE_LENGTH(ending->details));
    read_trailers(&ending->trailers, error);
    if (error->from_server)
        memcpy(error->text, said, sizeof said);
    else
        explain(client, said, error);
    if (!error->text[0])
        snprintf(error->text, sizeof error->text, "%s, without a text",
                 einsum_client_status_name(error->status));
    return error->status;
}

// ---- the client's thread ------------------------------------------------------------------------

enum { POLL_NS = 200 * 1000, POLL_NS_MAX = 5 * 1000 * 1000 };

void einsum_client_wait(struct einsum_client *client, struct einsum_client_later *later)
{
    later->next = client->later;
    client->later = later;
}

// Polls what waits. The list is taken off first, because a poll may end in a callback that adds.
static void poll_later(struct einsum_client *client)
{
    uint64_t now = einsum_client_now_ns();
    struct einsum_client_later *later = client->later;
    client->later = NULL;
    while (later) {
        struct einsum_client_later *next = later->next;
        if (!later->poll(later, now))
            einsum_client_wait(client, later);
        later = next;
    }
}

// Until when to block: as long as something waits, not past POLL_NS_MAX, so that a cancel shows.
static gpr_timespec next_wake(const struct einsum_client *client)
{
    if (!client->later)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    uint64_t now = einsum_client_now_ns();
    uint64_t pause = POLL_NS_MAX;
    for (const struct einsum_client_later *l = client->later; l; l = l->next) {
        uint64_t left = l->due_ns > now + POLL_NS ? l->due_ns - now : POLL_NS;
        if (left < pause)
            pause = left;
    }
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                        gpr_time_from_nanos((int64_t)pause, GPR_TIMESPAN));
}

void einsum_client_start_batch(grpc_call *call, const grpc_op *ops, size_t ops_n,
                               struct einsum_client_tag *tag)
{
    atomic_store_explicit(&tag->armed, true, memory_order_release);
    grpc_call_error refused = grpc_call_start_batch(call, ops, ops_n, tag, NULL);
    if (refused == GRPC_CALL_OK)
        return;
    fprintf(stderr, "einsum_client: gRPC refused a batch: %s\n",
            grpc_call_error_to_string(refused));
    abort();
}

static void *serve(void *context)
{
    struct einsum_client *client = context;
    on_own_thread = true;
    for (;;) {
        grpc_event event = grpc_completion_queue_next(client->queue, next_wake(client), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN)
            return NULL;
        if (event.type == GRPC_OP_COMPLETE) {
            struct einsum_client_tag *tag = event.tag;
            (void)atomic_load_explicit(&tag->armed, memory_order_acquire);
            tag->on_complete(tag, event.success != 0);
        }
        if (client->later)
            poll_later(client);
    }
}

// ---- connections --------------------------------------------------------------------------------

static grpc_arg integer_arg(const char *key, int value)
{
    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = (char *)key, .value.integer = value};
}

static grpc_channel *open_channel(const struct einsum_client *client,
                                  grpc_channel_credentials *credentials)
{
    const struct einsum_client_options *options = &client->options;
    grpc_arg args[] = {
        integer_arg(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, (int)options->send_bytes_max),
        integer_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)options->receive_bytes_max),
        // No compression either way: FP8 does not shrink, and a reply is inflated before its size
        // is checked.
        integer_arg(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1),
        integer_arg(GRPC_ARG_ENABLE_RETRIES, 0),
        // A proxy meant for the web must not swallow a call to the machine next door.
        integer_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0),
        integer_arg(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        // A connection of its own for each channel; gRPC would share one.
        integer_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1),
        // Keepalive pings themselves are as good as off, but their timeout becomes the socket's
        // TCP_USER_TIMEOUT: it alone ends a write to a peer that has stopped reading.
        integer_arg(GRPC_ARG_KEEPALIVE_TIME_MS, INT_MAX - 1),
        integer_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, (int)options->stall_ms),
        // A daemon that restarts is back within a second or so.
        integer_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50),
        integer_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5000),
        integer_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000),
        {.type = GRPC_ARG_STRING,
         .key = (char *)GRPC_ARG_PRIMARY_USER_AGENT_STRING,
         .value.string = (char *)options->user_agent},
        {.type = GRPC_ARG_STRING,
         .key = (char *)GRPC_SSL_TARGET_NAME_OVERRIDE_ARG,
         .value.string = (char *)options->tls_server_name}, // last: left out if there is none
    };
    // Left alone on purpose: the bandwidth probe opens windows and frames to 4 MiB by itself, so
    // that frame, buffer and lookahead settings change nothing that can be measured.
    size_t args_n = sizeof args / sizeof *args - (options->tls_server_name ? 0 : 1);
    grpc_channel_args channel_args = {.num_args = args_n, .args = args};
    return grpc_channel_create(client->target, credentials, &channel_args);
}

grpc_call *einsum_client_open_call(struct einsum_client *client, const char *method,
                                   gpr_timespec deadline)
{
    uint32_t next = atomic_fetch_add_explicit(&client->next_channel, 1, memory_order_relaxed);
    return grpc_channel_create_call(client->channels[next % client->options.connections], NULL,
                                    GRPC_PROPAGATE_DEFAULTS, client->queue,
                                    grpc_slice_from_static_string(method), NULL, deadline, NULL);
}

// ---- create and destroy -------------------------------------------------------------------------

void einsum_client_options_init(struct einsum_client_options *options)
{
    *options = (struct einsum_client_options){
        .deadline_ms = 30000,
        .load_deadline_ms = 0,
        .connections = 1,
        .send_bytes_max = MESSAGE_BYTES_MAX,
        .receive_bytes_max = MESSAGE_BYTES_MAX,
        .attempts_max = 4,
        .retry_pause_ms = 20,
        .retry_pause_ms_max = 2000,
        .stall_ms = 10000,
        .transport = EINSUM_CLIENT_TRANSPORT_AUTO,
        .shared_memory_bytes = 64 << 20,
        .spin_us = 50,
    };
}

static enum einsum_client_status check_options(const struct einsum_client_options *options,
                                               struct einsum_client_error *error)
{
    const struct {
        const char *name;
        uint64_t value, min, max;
    } ranges[] = {
        {"deadline_ms", options->deadline_ms, 1, UINT32_MAX},
        {"connections", options->connections, 1, CONNECTIONS_MAX},
        {"send_bytes_max", options->send_bytes_max, 1, MESSAGE_BYTES_MAX},
        {"receive_bytes_max", options->receive_bytes_max, 1, MESSAGE_BYTES_MAX},
        {"attempts_max", options->attempts_max, 1, 1000},
        {"retry_pause_ms", options->retry_pause_ms, 1, 3600000},
        {"retry_pause_ms_max", options->retry_pause_ms_max, options->retry_pause_ms, 3600000},
        {"retry_ms", options->retry_ms, 0, 86400000},
        {"stall_ms", options->stall_ms, 100, 3600000},
        {"transport", (uint64_t)options->transport, 0, EINSUM_CLIENT_TRANSPORT_RING},
        {"shared_memory_bytes", options->shared_memory_bytes, 1 << 20, 1ull << 40},
        {"spin_us", options->spin_us, 0, 10000},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        if (ranges[i].value < ranges[i].min || ranges[i].value > ranges[i].max)
            return einsum_client_error_set(
                error, EINSUM_CLIENT_INVALID_ARGUMENT, "%s: %llu is not between %llu and %llu",
                ranges[i].name, (unsigned long long)ranges[i].value,
                (unsigned long long)ranges[i].min, (unsigned long long)ranges[i].max);
    }
    return EINSUM_CLIENT_OK;
}

// Forms are checked here because gRPC takes any string and reports a wrong one as a server that
// cannot be reached.
static enum einsum_client_status check_endpoint(const char *endpoint,
                                                struct einsum_client_error *error)
{
    const char *form = "HOST:PORT, [V6]:PORT or unix:/PATH";
    if (endpoint && strncmp(endpoint, "unix:/", 6) == 0 && strlen(endpoint) > 6)
        return EINSUM_CLIENT_OK;
    const char *colon = endpoint ? strrchr(endpoint, ':') : NULL;
    bool host = colon && colon > endpoint && !strchr(endpoint, '/') &&
                (endpoint[0] == '[' ? colon[-1] == ']' : strchr(endpoint, ':') == colon);
    char *end = NULL;
    unsigned long port =
        host && colon[1] >= '0' && colon[1] <= '9' ? strtoul(colon + 1, &end, 10) : 0;
    if (!host || port < 1 || port > 65535 || *end)
        return einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT,
                                       "endpoint: \"%.200s\" is not %s", endpoint ? endpoint : "",
                                       form);
    return EINSUM_CLIENT_OK;
}

// gRPC's threads and ours inherit this mask, so that signals reach the application's own.
static void block_signals(sigset_t *before)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, before);
}

static void close_channels(struct einsum_client *client, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        grpc_channel_destroy(client->channels[i]);
    free(client->channels);
}

static enum einsum_client_status open_all(struct einsum_client *client,
                                          struct einsum_client_error *error)
{
    grpc_channel_credentials *credentials;
    enum einsum_client_status status =
        einsum_client_credentials_create(client->endpoint, &client->options, &credentials, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    client->channels = calloc(client->options.connections, sizeof *client->channels);
    if (!client->channels)
        goto no_memory;
    uint32_t opened = 0;
    for (; opened < client->options.connections; opened++) {
        client->channels[opened] = open_channel(client, credentials);
        if (!client->channels[opened])
            goto close_channels;
    }
    client->queue = grpc_completion_queue_create_for_next(NULL);
    if (pthread_create(&client->thread, NULL, serve, client) == 0) {
        grpc_channel_credentials_release(credentials);
        return EINSUM_CLIENT_OK;
    }

    grpc_completion_queue_shutdown(client->queue);
    while (
        grpc_completion_queue_next(client->queue, gpr_inf_future(GPR_CLOCK_REALTIME), NULL).type !=
        GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_completion_queue_destroy(client->queue);
close_channels:
    close_channels(client, opened);
no_memory:
    grpc_channel_credentials_release(credentials);
    return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED,
                                   "no memory or thread for a client");
}

static void free_client(struct einsum_client *client)
{
    pthread_cond_destroy(&client->idle);
    pthread_mutex_destroy(&client->lock);
    free((char *)client->options.shared_memory);
    free((char *)client->options.user_agent);
    free((char *)client->options.tls_server_name);
    einsum_client_access_destroy(client->access);
    free(client->target);
    free(client->endpoint);
    free(client);
}

// gRPC's form of an endpoint. For a unix socket not the form in which gRPC names a peer: see
// came_from_peer.
static char *target_of(const char *endpoint)
{
    bool is_unix = strncmp(endpoint, "unix:", 5) == 0;
    char *target;
    int length = asprintf(&target, "%s%s", is_unix ? "unix://" : "", endpoint + (is_unix ? 5 : 0));
    return length < 0 ? NULL : target;
}

static struct einsum_client *new_client(const char *endpoint,
                                        const struct einsum_client_options *options)
{
    struct einsum_client *client = calloc(1, sizeof *client);
    if (!client)
        return NULL;
    const char *user_agent = options->user_agent ? options->user_agent : "einsum-client";
    client->options = *options;
    client->options.user_agent = strdup(user_agent);
    client->options.shared_memory = options->shared_memory ? strdup(options->shared_memory) : NULL;
    client->options.tls_server_name =
        options->tls_server_name ? strdup(options->tls_server_name) : NULL;
    client->endpoint = strdup(endpoint);
    client->target = target_of(endpoint);
    client->random = (einsum_client_now_ns() ^ (uint64_t)getpid() << 32) | 1;
    client->next_ticket = 1;
    pthread_mutex_init(&client->lock, NULL);
    pthread_cond_init(&client->idle, NULL);
    if (client->options.user_agent && client->endpoint && client->target &&
        (client->options.shared_memory || !options->shared_memory) &&
        (client->options.tls_server_name || !options->tls_server_name))
        return client;
    free_client(client);
    return NULL;
}

const char *einsum_client_transport_name(enum einsum_client_transport transport)
{
    static const char *const names[] = {"auto", "tcp", "unix", "shm", "ring"};
    return names[(size_t)transport < sizeof names / sizeof *names ? transport : 0];
}

enum einsum_client_status einsum_client_create(const char *endpoint,
                                               const struct einsum_client_options *options,
                                               struct einsum_client **client_out,
                                               struct einsum_client_error *error)
{
    *client_out = NULL;
    struct einsum_client_options defaults;
    einsum_client_options_init(&defaults);
    options = options ? options : &defaults;
    enum einsum_client_status status = check_endpoint(endpoint, error);
    if (status == EINSUM_CLIENT_OK)
        status = check_options(options, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    struct einsum_client *client = new_client(endpoint, options);
    if (!client)
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");

    sigset_t before;
    block_signals(&before);
    grpc_init();
    status = einsum_client_access_create(options, &client->access, error);
    if (status == EINSUM_CLIENT_OK)
        status = open_all(client, error);
    if (status != EINSUM_CLIENT_OK) {
        grpc_shutdown();
        free_client(client);
        client = NULL;
    }
    if (status == EINSUM_CLIENT_OK && options->shared_memory) {
        status = einsum_client_shared_create(client, error);
        if (status != EINSUM_CLIENT_OK) {
            einsum_client_destroy(client);
            client = NULL;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    *client_out = client;
    return status;
}

void einsum_client_destroy(struct einsum_client *client)
{
    if (!client)
        return;
    pthread_mutex_lock(&client->lock);
    client->stopping = true;
    pthread_mutex_unlock(&client->lock);
    einsum_client_cancel(client, UINT64_MAX);

    // The queue may be shut down only when nothing can start another batch on it.
    pthread_mutex_lock(&client->lock);
    while (client->active > 0)
        pthread_cond_wait(&client->idle, &client->lock);
    pthread_mutex_unlock(&client->lock);

    if (client->shared)
        einsum_client_shared_destroy(client);
    grpc_completion_queue_shutdown(client->queue);
    pthread_join(client->thread, NULL);
    close_channels(client, client->options.connections);
    grpc_completion_queue_destroy(client->queue);
    grpc_shutdown();
    free_client(client);
}
