// The shards. A thread takes its shard when it first adds, for good; a daemon's threads live as
// long as it does. One writer needs no atomic addition, only stores that readers see whole.
#include "metrics.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
    SHARDS = 64, // the first is for all threads that found no other
    WORDS = sizeof(struct metrics_values) / sizeof(uint64_t),
};

struct shard {
    _Alignas(CACHE_LINE_BYTES) _Atomic uint64_t words[WORDS];
};

struct metrics {
    struct shard shards[SHARDS];
    uint32_t calls_n;
    const char *call_names[METRICS_CALLS_MAX];
};

const char *const metrics_method_names[] = {
    [METRICS_EINSUM] = "Einsum",
    [METRICS_OUTPUT_PROJECT] = "OutputProject",
    [METRICS_MODEL_INFER] = "ModelInfer",
};

const char *const metrics_method_paths[] = {
    [METRICS_EINSUM] = "einsum.v1.Einsum/Einsum",
    [METRICS_OUTPUT_PROJECT] = "einsum.v1.Einsum/OutputProject",
    [METRICS_MODEL_INFER] = "inference.GRPCInferenceService/ModelInfer",
};
const char *const metrics_transport_names[] = {
    [METRICS_UNARY] = "unary",
    [METRICS_STREAM] = "stream",
    [METRICS_RING] = "ring",
};
const char *const metrics_phase_names[] = {
    [METRICS_RECEIVE] = "receive", [METRICS_QUEUE] = "queue",       [METRICS_COPY_IN] = "copy_in",
    [METRICS_KERNEL] = "kernel",   [METRICS_COPY_OUT] = "copy_out", [METRICS_SEND] = "send",
};

#define DECADE(ns) 10 * (ns), 15 * (ns), 20 * (ns), 30 * (ns), 50 * (ns), 70 * (ns)
const uint64_t metrics_time_bounds_ns[] = {
    DECADE(UINT64_C(1000)),    DECADE(UINT64_C(10000)),    DECADE(UINT64_C(100000)),
    DECADE(UINT64_C(1000000)), DECADE(UINT64_C(10000000)), UINT64_C(1000000000),
    UINT64_C(2000000000),      UINT64_C(5000000000),       UINT64_C(10000000000),
};
_Static_assert(ARRAY_LEN(metrics_time_bounds_ns) == METRICS_TIME_BOUNDS, "all of them");

// ---- shards

static _Atomic uint32_t threads_n = 1;
static __thread uint32_t thread_shard; // 0: none yet, or the shared one
static __thread bool thread_has_shard;

static uint32_t take_shard(void)
{
    thread_has_shard = true;
    // Does not count on past the last: it would come round, if slowly.
    if (atomic_load_explicit(&threads_n, memory_order_relaxed) >= SHARDS)
        return 0;
    uint32_t shard = atomic_fetch_add_explicit(&threads_n, 1, memory_order_relaxed);
    thread_shard = shard < SHARDS ? shard : 0;
    return thread_shard;
}

static void add(struct metrics *metrics, size_t word, uint64_t n)
{
    uint32_t shard = thread_has_shard ? thread_shard : take_shard();
    _Atomic uint64_t *at = &metrics->shards[shard].words[word];
    if (shard == 0)
        atomic_fetch_add_explicit(at, n, memory_order_relaxed);
    else
        atomic_store_explicit(at, atomic_load_explicit(at, memory_order_relaxed) + n,
                              memory_order_relaxed);
}

#define WORD_OF(member) (offsetof(struct metrics_values, member) / sizeof(uint64_t))

void metrics_add_at(struct metrics *metrics, size_t offset, uint64_t n)
{
    add(metrics, offset / sizeof(uint64_t), n);
}

void metrics_read(const struct metrics *metrics, struct metrics_values *values)
{
    uint64_t sums[WORDS] = {0};
    uint32_t shards_n = atomic_load_explicit(&threads_n, memory_order_relaxed);
    for (uint32_t shard = 0; shard < SHARDS && shard < shards_n; shard++)
        for (size_t word = 0; word < WORDS; word++)
            sums[word] +=
                atomic_load_explicit(&metrics->shards[shard].words[word], memory_order_relaxed);
    memcpy(values, sums, sizeof sums);
}
_Static_assert(sizeof(struct metrics_values) % sizeof(uint64_t) == 0, "words and nothing else");

// ---- what is counted

void metrics_count_request(struct metrics *metrics, enum metrics_method method,
                           enum metrics_transport transport, enum status status)
{
    size_t code = (size_t)status < METRICS_STATUSES ? (size_t)status : STATUS_UNKNOWN;
    size_t row = (size_t)method * METRICS_TRANSPORTS + transport;
    add(metrics, WORD_OF(requests) + row * METRICS_STATUSES + code, 1);
}

void metrics_count_call(struct metrics *metrics, uint32_t call, enum status status)
{
    size_t code = (size_t)status < METRICS_STATUSES ? (size_t)status : STATUS_UNKNOWN;
    ASSERT(call < METRICS_CALLS_MAX);
    add(metrics, WORD_OF(calls) + (size_t)call * METRICS_STATUSES + code, 1);
}

// The first bound that is not less; behind the last: their number.
static size_t bucket_of(uint64_t ns)
{
    size_t low = 0, high = METRICS_TIME_BOUNDS;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (metrics_time_bounds_ns[middle] < ns)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

void metrics_observe_locked(struct metrics_histogram *histogram, uint64_t ns)
{
    histogram->buckets[bucket_of(ns)]++;
    histogram->sum_ns += ns;
}

static void observe(struct metrics *metrics, size_t histogram_word, uint64_t ns)
{
    add(metrics, histogram_word + bucket_of(ns), 1);
    add(metrics, histogram_word + offsetof(struct metrics_histogram, sum_ns) / sizeof ns, ns);
}

enum { HISTOGRAM_WORDS = sizeof(struct metrics_histogram) / sizeof(uint64_t) };

void metrics_observe_duration(struct metrics *metrics, enum metrics_method method, uint64_t ns)
{
    observe(metrics, WORD_OF(durations) + (size_t)method * HISTOGRAM_WORDS, ns);
}

void metrics_observe_refusal(struct metrics *metrics, uint64_t ns)
{
    observe(metrics, WORD_OF(refusals), ns);
}

void metrics_observe_phase(struct metrics *metrics, enum metrics_phase phase, uint64_t ns)
{
    observe(metrics, WORD_OF(phases) + (size_t)phase * HISTOGRAM_WORDS, ns);
}

uint32_t metrics_add_call(struct metrics *metrics, const char *name)
{
    if (metrics->calls_n == METRICS_CALLS_MAX)
        return 0;
    metrics->call_names[metrics->calls_n] = name;
    return metrics->calls_n++;
}

uint32_t metrics_calls_n(const struct metrics *metrics)
{
    return metrics->calls_n;
}

const char *metrics_call_name(const struct metrics *metrics, uint32_t call)
{
    ASSERT(call < metrics->calls_n);
    return metrics->call_names[call];
}

// ---- how requests ended

static uint64_t *end_of(struct metrics_ends *ends, enum status status)
{
    switch (status) {
    case STATUS_OK:
        return &ends->answered;
    case STATUS_RESOURCE_EXHAUSTED:
    case STATUS_UNAVAILABLE:
        return &ends->refused;
    case STATUS_INVALID_ARGUMENT:
    case STATUS_NOT_FOUND:
    case STATUS_UNIMPLEMENTED:
    case STATUS_ALREADY_EXISTS:
    case STATUS_PERMISSION_DENIED:
    case STATUS_FAILED_PRECONDITION:
    case STATUS_OUT_OF_RANGE:
    case STATUS_UNAUTHENTICATED:
        return &ends->invalid;
    case STATUS_DEADLINE_EXCEEDED:
        return &ends->expired;
    case STATUS_CANCELLED:
    case STATUS_ABORTED:
        return &ends->cancelled;
    case STATUS_UNKNOWN:
    case STATUS_INTERNAL:
    case STATUS_DATA_LOSS:
    default:
        return &ends->failed;
    }
}

struct metrics_ends metrics_ends(const struct metrics_values *values)
{
    struct metrics_ends ends = {0};
    for (size_t method = 0; method < METRICS_METHODS; method++)
        for (size_t transport = 0; transport < METRICS_TRANSPORTS; transport++)
            for (unsigned status = 0; status < METRICS_STATUSES; status++)
                *end_of(&ends, (enum status)status) += values->requests[method][transport][status];
    return ends;
}

// ---- create, destroy

enum status metrics_create(struct metrics **out, struct error *err)
{
    struct metrics *metrics = aligned_alloc(CACHE_LINE_BYTES, sizeof *metrics);
    if (!metrics)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the metrics");
    memset(metrics, 0, sizeof *metrics);
    metrics_add_call(metrics, "_OTHER");
    *out = metrics;
    return STATUS_OK;
}

void metrics_destroy(struct metrics *metrics)
{
    free(metrics);
}
