// Figures of the hot path: counters, and histograms of time. Every thread adds to a shard of its
// own, without a lock and without a cache line that others write; who looks sums the shards.
//
//     thread 1 --add--> shard 1 --.
//     thread 2 --add--> shard 2 --+--> metrics_read --> /metrics, ServerInfo
//     too many --add--> shard 0 --'    (shared, so by atomic additions)
//
// What is counted under a lock anyway (batches, queues, connections) stays with its module.
#pragma once

#include "status.h"

enum metrics_method {
    METRICS_EINSUM,
    METRICS_OUTPUT_PROJECT,
    METRICS_MODEL_INFER, // of the Open Inference Protocol
    METRICS_METHODS
};
enum metrics_transport {
    METRICS_UNARY,  // a gRPC call each
    METRICS_STREAM, // many on one gRPC call
    METRICS_RING,   // through shared memory alone
    METRICS_TRANSPORTS
};

// What a request spends its time on, in this order; see record.h.
enum metrics_phase {
    METRICS_RECEIVE,
    METRICS_QUEUE,
    METRICS_COPY_IN,
    METRICS_KERNEL,
    METRICS_COPY_OUT,
    METRICS_SEND,
    METRICS_PHASES
};

extern const char *const metrics_method_names[METRICS_METHODS];
extern const char *const metrics_method_paths[METRICS_METHODS]; // with the service before them
extern const char *const metrics_transport_names[METRICS_TRANSPORTS];
extern const char *const metrics_phase_names[METRICS_PHASES];

enum {
    METRICS_STATUSES = 17,    // gRPC's
    METRICS_CALLS_MAX = 64,   // gRPC methods told apart
    METRICS_TIME_BOUNDS = 34, // of a histogram of time
    METRICS_ACCESS_REFUSALS = 5,
};

extern const char *const metrics_access_refusal_names[METRICS_ACCESS_REFUSALS]; // access.c

// Upper ends of the buckets, in nanoseconds: 10 us to 10 s, six a decade up to 1 s. What is longer
// has a bucket behind them.
extern const uint64_t metrics_time_bounds_ns[METRICS_TIME_BOUNDS];

struct metrics_histogram {
    uint64_t buckets[METRICS_TIME_BOUNDS + 1]; // not yet cumulative
    uint64_t sum_ns;
};
// Adds to one that the caller guards.
void metrics_observe_locked(struct metrics_histogram *histogram, uint64_t ns);

// Nothing but uint64_t: the shards are made of the same words.
struct metrics_values {
    uint64_t received; // requests, of any kind of end
    uint64_t shared;   // of those, with tensors in shared memory
    uint64_t requests[METRICS_METHODS][METRICS_TRANSPORTS][METRICS_STATUSES]; // ended
    uint64_t refused_calls, refused_connection_calls; // past calls_max; more than others could have
    uint64_t refused_in_flight, refused_connection_in_flight;
    uint64_t refused_metadata;
    uint64_t refused_draining;                        // on streams and rings
    uint64_t access_refused[METRICS_ACCESS_REFUSALS]; // calls, by reason
    uint64_t streams_opened, streams_ended;
    // Of requests that were looked at: all, those whose output holds NaN though their input has some, or
    // has none.
    uint64_t nan_looked, nan_input, nan_other;
    struct metrics_histogram durations[METRICS_METHODS];
    struct metrics_histogram phases[METRICS_PHASES];
    struct metrics_histogram refusals;                   // of requests past a limit
    uint64_t calls[METRICS_CALLS_MAX][METRICS_STATUSES]; // of gRPC, ended
};

struct metrics;

NODISCARD enum status metrics_create(struct metrics **metrics, struct error *err);
void metrics_destroy(struct metrics *metrics);

// Before the first call: gives a gRPC method its place in `calls`. Those past the last share the
// first, whose name is "_OTHER". `name` is borrowed for good.
uint32_t metrics_add_call(struct metrics *metrics, const char *name);
uint32_t metrics_calls_n(const struct metrics *metrics);
const char *metrics_call_name(const struct metrics *metrics, uint32_t call);

// Any thread, all of these.
#define METRICS_ADD(metrics, member, n)                                                            \
    metrics_add_at((metrics), offsetof(struct metrics_values, member), (n))
void metrics_add_at(struct metrics *metrics, size_t offset, uint64_t n);
void metrics_count_request(struct metrics *metrics, enum metrics_method method,
                           enum metrics_transport transport, enum status status);
void metrics_count_call(struct metrics *metrics, uint32_t call, enum status status);
void metrics_observe_duration(struct metrics *metrics, enum metrics_method method, uint64_t ns);
void metrics_observe_refusal(struct metrics *metrics, uint64_t ns);
void metrics_observe_phase(struct metrics *metrics, enum metrics_phase phase, uint64_t ns);
void metrics_read(const struct metrics *metrics, struct metrics_values *values);

// Of all methods and transports together: how requests ended, by what it means to their caller.
struct metrics_ends {
    uint64_t answered;  // with an output or a digest
    uint64_t refused;   // RESOURCE_EXHAUSTED, UNAVAILABLE
    uint64_t invalid;   // the caller's mistakes
    uint64_t expired;   // DEADLINE_EXCEEDED
    uint64_t cancelled; // by the caller
    uint64_t failed;    // ours
};
struct metrics_ends metrics_ends(const struct metrics_values *values);
