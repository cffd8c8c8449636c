// The queue is Vyukov's bounded one: a slot's turn says whose it is, so that producers neither lock nor
// wait. The trace thread looks every now and then, which spares them a wake-up as well.
//
//     turn == position          free for the producer that takes this position
//     turn == position + 1      filled, for the trace thread
#include "trace.h"

#include <curl/curl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "log.h"

enum {
    QUEUE_SLOTS = 4096, // a power of two
    POST_REQUESTS_MAX = 256,
    LOOK_MS = 200,
    CONNECT_TIMEOUT_MS = 2000,
    POST_TIMEOUT_MS = 5000,
    LAST_POSTS_MS = 2000, // when the daemon ends
};

struct slot {
    _Atomic uint64_t turn;
    struct trace_request request;
};

struct tracer {
    struct tracer_options options;
    _Atomic uint32_t sample;
    struct slot *slots;
    _Alignas(CACHE_LINE_BYTES) _Atomic uint64_t filled; // next position of a producer
    uint64_t taken;                                     // trace thread
    _Atomic uint64_t untold;                            // requests without a traceparent
    _Atomic uint64_t exported, dropped_queue, dropped_export;

    CURL *curl; // trace thread, as the next
    struct curl_slist *headers;
    uint64_t failures;

    pthread_t thread;
    pthread_mutex_t lock; // for the next
    pthread_cond_t stop_changed;
    _Atomic uint64_t stop_at_ns; // when the last message must have gone; 0: not yet
};

// ---- traceparent

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; // upper case is not allowed
}

static bool read_hex(const char *text, size_t n, uint8_t *bytes)
{
    for (size_t i = 0; i < n; i++) {
        int high = hex_value(text[2 * i]), low = hex_value(text[2 * i + 1]);
        if (high < 0 || low < 0)
            return false;
        bytes[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

static bool all_zero(const uint8_t *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (bytes[i])
            return false;
    return true;
}

// 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
bool trace_parse(const char *text, size_t bytes, struct trace_context *context)
{
    enum { VERSION = 0, TRACE = 3, PARENT = 36, FLAGS = 53, LENGTH = 55 };
    struct trace_context read = {.given = true};
    uint8_t version, flags;
    if (bytes < LENGTH || text[TRACE - 1] != '-' || text[PARENT - 1] != '-' ||
        text[FLAGS - 1] != '-')
        return false;
    if (!read_hex(text + VERSION, 1, &version) || version == 0xff)
        return false;
    if (bytes > LENGTH && (version == 0 || text[LENGTH] != '-'))
        return false;
    if (!read_hex(text + TRACE, TRACE_ID_BYTES, read.trace_id) ||
        !read_hex(text + PARENT, TRACE_SPAN_ID_BYTES, read.parent_id) ||
        !read_hex(text + FLAGS, 1, &flags))
        return false;
    if (all_zero(read.trace_id, TRACE_ID_BYTES) || all_zero(read.parent_id, TRACE_SPAN_ID_BYTES))
        return false;
    read.sampled = flags & 1;
    *context = read;
    return true;
}

void trace_hex(const uint8_t *bytes, size_t n, char *text)
{
    for (size_t i = 0; i < n; i++)
        snprintf(text + 2 * i, 3, "%02x", bytes[i]);
}

// ---- producers

// Not secret, only different: splitmix64, begun anew in each thread.
static void random_bytes(void *bytes, size_t n)
{
    static __thread uint64_t state;
    if (state == 0 && getrandom(&state, sizeof state, 0) != sizeof state)
        state = now_ns() ^ (uint64_t)(uintptr_t)&state;
    for (size_t i = 0; i < n; i += sizeof state) {
        uint64_t z = state += UINT64_C(0x9e3779b97f4a7c15);
        z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
        z = (z ^ (z >> 31)) | 1; // an id of zeros is none
        memcpy((char *)bytes + i, &z, n - i < sizeof z ? n - i : sizeof z);
    }
}

void tracer_set_sample(struct tracer *tracer, uint32_t sample)
{
    if (tracer)
        atomic_store_explicit(&tracer->sample, sample, memory_order_relaxed);
}

bool tracer_takes(struct tracer *tracer, struct trace_context *context,
                  uint8_t span_id[TRACE_SPAN_ID_BYTES])
{
    if (!tracer || (context->given && !context->sampled))
        return false;
    if (!context->given) {
        uint32_t sample = atomic_load_explicit(&tracer->sample, memory_order_relaxed);
        if (sample == 0 ||
            atomic_fetch_add_explicit(&tracer->untold, 1, memory_order_relaxed) % sample != 0)
            return false;
        *context = (struct trace_context){.sampled = true};
        random_bytes(context->trace_id, TRACE_ID_BYTES);
    }
    random_bytes(span_id, TRACE_SPAN_ID_BYTES);
    return true;
}

void tracer_submit(struct tracer *tracer, const struct trace_request *request)
{
    uint64_t position = atomic_load_explicit(&tracer->filled, memory_order_relaxed);
    struct slot *slot;
    for (;;) {
        slot = &tracer->slots[position % QUEUE_SLOTS];
        uint64_t turn = atomic_load_explicit(&slot->turn, memory_order_acquire);
        if (turn == position) {
            if (atomic_compare_exchange_weak_explicit(&tracer->filled, &position, position + 1,
                                                      memory_order_relaxed, memory_order_relaxed))
                break;
        } else if (turn < position) { // not yet taken, a round ago: full
            atomic_fetch_add_explicit(&tracer->dropped_queue, 1, memory_order_relaxed);
            return;
        } else {
            position = atomic_load_explicit(&tracer->filled, memory_order_relaxed);
        }
    }
    slot->request = *request;
    atomic_store_explicit(&slot->turn, position + 1, memory_order_release);
}

// ---- OTLP's JSON

// jansson's setters take NULL for a value that could not be made, and say so; what they then leave out
// of memory running short, the collector misses, and nobody else.
static void set(json_t *object, const char *key, json_t *value)
{
    (void)json_object_set_new(object, key, value);
}

static void add_attribute(json_t *attributes, const char *key, const char *type, json_t *value)
{
    (void)json_array_append_new(attributes,
                                json_pack("{s:s, s:{s:o}}", "key", key, "value", type, value));
}

static json_t *text_of(const char *text)
{
    json_t *json = json_string(text);
    return json ? json : json_string("not UTF-8");
}

static void add_text(json_t *attributes, const char *key, const char *text)
{
    add_attribute(attributes, key, "stringValue", text_of(text));
}

// 64 bits travel as text, as protobuf's JSON has it.
static json_t *number_text(uint64_t value)
{
    return json_sprintf("%llu", (unsigned long long)value);
}

static void add_number(json_t *attributes, const char *key, uint64_t value)
{
    add_attribute(attributes, key, "intValue", number_text(value));
}

static json_t *hex_text(const uint8_t *bytes, size_t n)
{
    char text[2 * TRACE_ID_BYTES + 1];
    trace_hex(bytes, n, text);
    return json_string(text);
}

struct span {
    const char *name;
    const uint8_t *trace_id, *span_id, *parent_id;
    int kind;
    uint64_t start_ns, end_ns;
};
enum { KIND_INTERNAL = 1, KIND_SERVER = 2, STATUS_CODE_ERROR = 2 };

// `wall_ns`: what the wall's clock is ahead of ours.
static json_t *make_span(const struct span *span, uint64_t wall_ns)
{
    json_t *json = json_object();
    set(json, "traceId", hex_text(span->trace_id, TRACE_ID_BYTES));
    set(json, "spanId", hex_text(span->span_id, TRACE_SPAN_ID_BYTES));
    if (!all_zero(span->parent_id, TRACE_SPAN_ID_BYTES))
        set(json, "parentSpanId", hex_text(span->parent_id, TRACE_SPAN_ID_BYTES));
    set(json, "name", text_of(span->name));
    set(json, "kind", json_integer(span->kind));
    set(json, "startTimeUnixNano", number_text(wall_ns + span->start_ns));
    set(json, "endTimeUnixNano", number_text(wall_ns + span->end_ns));
    return json;
}

static json_t *make_attributes(const struct trace_request *request)
{
    json_t *attributes = json_array();
    add_text(attributes, "rpc.system.name", "grpc");
    add_text(attributes, "rpc.method", request->method);
    add_text(attributes, "rpc.response.status_code", status_name(request->status));
    if (request->status != STATUS_OK)
        add_text(attributes, "error.type", status_name(request->status));
    add_text(attributes, "einsumd.transport", request->transport);
    if (request->weight[0])
        add_text(attributes, "einsumd.weight", request->weight);
    add_number(attributes, "einsumd.request_id", request->request_id);
    add_number(attributes, "einsumd.tokens", request->tokens);
    if (request->batch_requests > 0) {
        add_number(attributes, "einsumd.batch.tokens", request->batch_tokens);
        add_number(attributes, "einsumd.batch.bucket", request->batch_bucket);
        add_number(attributes, "einsumd.batch.requests", request->batch_requests);
    }
    return attributes;
}

static void add_spans(json_t *spans, const struct trace_request *request, uint64_t wall_ns)
{
    const struct trace_context *context = &request->context;
    const struct span server = {
        .name = request->method,
        .trace_id = context->trace_id,
        .span_id = request->span_id,
        .parent_id = context->parent_id,
        .kind = KIND_SERVER,
        .start_ns = request->start_ns,
        .end_ns = request->end_ns,
    };
    json_t *json = make_span(&server, wall_ns);
    set(json, "attributes", make_attributes(request));
    if (request->status != STATUS_OK)
        set(json, "status",
            json_pack("{s:i, s:o}", "code", STATUS_CODE_ERROR, "message", text_of(request->error)));
    (void)json_array_append_new(spans, json);
    for (uint32_t i = 0; i < request->steps_n; i++) {
        const struct trace_step *step = &request->steps[i];
        uint8_t span_id[TRACE_SPAN_ID_BYTES];
        random_bytes(span_id, sizeof span_id);
        const struct span phase = {
            .name = step->name,
            .trace_id = context->trace_id,
            .span_id = span_id,
            .parent_id = request->span_id,
            .kind = KIND_INTERNAL,
            .start_ns = step->start_ns,
            .end_ns = step->end_ns,
        };
        (void)json_array_append_new(spans, make_span(&phase, wall_ns));
    }
}

// Takes `spans`. NULL: out of memory.
static char *make_body(const struct tracer *tracer, json_t *spans)
{
    json_t *attributes = json_array();
    add_text(attributes, "service.name", "einsumd");
    add_text(attributes, "service.version", EINSUMD_VERSION);
    add_text(attributes, "einsumd.engine", tracer->options.engine);
    json_t *body = json_pack("{s:[{s:{s:o}, s:[{s:{s:s, s:s}, s:o}]}]}", "resourceSpans",
                             "resource", "attributes", attributes, "scopeSpans", "scope", "name",
                             "einsumd", "version", EINSUMD_VERSION, "spans", spans);
    char *text = body ? json_dumps(body, JSON_COMPACT) : NULL;
    json_decref(body);
    return text;
}

// ---- the thread

static size_t ignore_answer(const char *bytes, size_t size, size_t n, void *unused)
{
    (void)bytes, (void)unused;
    return size * n;
}

// Time is up, once the daemon ends.
static bool too_late(const struct tracer *tracer)
{
    uint64_t stop_at_ns = atomic_load_explicit(&tracer->stop_at_ns, memory_order_acquire);
    return stop_at_ns && now_ns() > stop_at_ns;
}

// libcurl's, about once a second: other than 0 gives up.
static int on_progress(void *tracer, curl_off_t a, curl_off_t b, curl_off_t c, curl_off_t d)
{
    (void)a, (void)b, (void)c, (void)d;
    return too_late(tracer);
}

static bool post(struct tracer *tracer, const char *body)
{
    CURL *curl = tracer->curl;
    long code = 0;
    curl_easy_setopt(curl, CURLOPT_POSTFIELDS, body);
    CURLcode result = curl_easy_perform(curl);
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &code);
    bool sent = result == CURLE_OK && code >= 200 && code < 300;
    if (sent) {
        tracer->failures = 0;
        return true;
    }
    uint64_t failures = ++tracer->failures;
    if ((failures & (failures - 1)) == 0) // the 1st, 2nd, 4th ...: not to fill the log
        LOG(WARN, "traces were not taken", LOG_STR("endpoint", tracer->options.endpoint),
            LOG_STR("reason", result != CURLE_OK ? curl_easy_strerror(result) : "HTTP status"),
            LOG_U64("http_status", (uint64_t)code), LOG_U64("failures", failures));
    return false;
}

// Takes what is queued, up to what one message holds; how many requests that was.
static uint32_t take(struct tracer *tracer, json_t *spans)
{
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    uint64_t wall_ns =
        (uint64_t)wall.tv_sec * UINT64_C(1000000000) + (uint64_t)wall.tv_nsec - now_ns();
    uint32_t n = 0;
    for (; n < POST_REQUESTS_MAX; n++) {
        struct slot *slot = &tracer->slots[tracer->taken % QUEUE_SLOTS];
        if (atomic_load_explicit(&slot->turn, memory_order_acquire) != tracer->taken + 1)
            break;
        add_spans(spans, &slot->request, wall_ns);
        atomic_store_explicit(&slot->turn, tracer->taken + QUEUE_SLOTS, memory_order_release);
        tracer->taken++;
    }
    return n;
}

// All that is queued.
static void send_queued(struct tracer *tracer)
{
    for (uint32_t n = POST_REQUESTS_MAX; n == POST_REQUESTS_MAX;) {
        json_t *spans = json_array();
        n = take(tracer, spans);
        if (n == 0) {
            json_decref(spans);
            return;
        }
        char *body = make_body(tracer, spans);
        bool sent = body && !too_late(tracer) && post(tracer, body);
        free(body);
        atomic_fetch_add_explicit(sent ? &tracer->exported : &tracer->dropped_export, n,
                                  memory_order_relaxed);
    }
}

// False: it is time to end.
static bool wait_a_while(struct tracer *tracer)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += LOOK_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_mutex_lock(&tracer->lock);
    bool stopping;
    while (!(stopping = atomic_load_explicit(&tracer->stop_at_ns, memory_order_relaxed) != 0) &&
           pthread_cond_timedwait(&tracer->stop_changed, &tracer->lock, &until) == 0)
        ;
    pthread_mutex_unlock(&tracer->lock);
    return !stopping;
}

static void *run(void *argument)
{
    struct tracer *tracer = argument;
    while (wait_a_while(tracer))
        send_queued(tracer);
    send_queued(tracer);
    return NULL;
}

// ---- create, destroy

static bool set_up_curl(struct tracer *tracer)
{
    if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK)
        return false;
    tracer->curl = curl_easy_init();
    tracer->headers = curl_slist_append(NULL, "Content-Type: application/json");
    if (!tracer->curl || !tracer->headers)
        return false;
    CURL *curl = tracer->curl;
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, (long)POST_TIMEOUT_MS);
    curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    curl_easy_setopt(curl, CURLOPT_XFERINFODATA, tracer);
    curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS, (long)CONNECT_TIMEOUT_MS);
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, tracer->headers);
    curl_easy_setopt(curl, CURLOPT_USERAGENT, "einsumd/" EINSUMD_VERSION);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, ignore_answer);
    return curl_easy_setopt(curl, CURLOPT_URL, tracer->options.endpoint) == CURLE_OK;
}

static void free_tracer(struct tracer *tracer)
{
    curl_slist_free_all(tracer->headers);
    if (tracer->curl)
        curl_easy_cleanup(tracer->curl);
    curl_global_cleanup();
    free(tracer->slots);
    free(tracer);
}

enum status tracer_create(const struct tracer_options *options, struct tracer **out,
                          struct error *err)
{
    struct tracer *tracer = aligned_alloc(CACHE_LINE_BYTES, sizeof *tracer);
    if (!tracer)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for tracing");
    memset(tracer, 0, sizeof *tracer);
    tracer->options = *options;
    atomic_init(&tracer->sample, options->sample);
    tracer->slots = calloc(QUEUE_SLOTS, sizeof *tracer->slots);
    if (!tracer->slots || !set_up_curl(tracer)) {
        free_tracer(tracer);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "tracing cannot be set up");
    }
    for (uint64_t i = 0; i < QUEUE_SLOTS; i++)
        atomic_init(&tracer->slots[i].turn, i);
    pthread_mutex_init(&tracer->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&tracer->stop_changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (pthread_create(&tracer->thread, NULL, run, tracer) != 0) {
        free_tracer(tracer);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no thread for tracing");
    }
    pthread_setname_np(tracer->thread, "trace");
    *out = tracer;
    return STATUS_OK;
}

void tracer_destroy(struct tracer *tracer)
{
    if (!tracer)
        return;
    pthread_mutex_lock(&tracer->lock);
    atomic_store_explicit(&tracer->stop_at_ns, now_ns() + LAST_POSTS_MS * UINT64_C(1000000),
                          memory_order_release);
    pthread_cond_signal(&tracer->stop_changed);
    pthread_mutex_unlock(&tracer->lock);
    pthread_join(tracer->thread, NULL);
    pthread_cond_destroy(&tracer->stop_changed);
    pthread_mutex_destroy(&tracer->lock);
    free_tracer(tracer);
}

struct tracer_stats tracer_stats(const struct tracer *tracer)
{
    if (!tracer)
        return (struct tracer_stats){0};
    return (struct tracer_stats){
        .exported = atomic_load_explicit(&tracer->exported, memory_order_relaxed),
        .dropped_queue = atomic_load_explicit(&tracer->dropped_queue, memory_order_relaxed),
        .dropped_export = atomic_load_explicit(&tracer->dropped_export, memory_order_relaxed),
    };
}
