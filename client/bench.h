// The load generator: sends projections in a closed or an open loop and counts what comes back.
//
//     closed   `concurrency` requests are in flight; each reply sends the next
//     open     requests arrive at random (Poisson) at `rate` a second, whether the server keeps up
//              or not; latency counts from the moment that a request was meant to be sent, so that
//              a server that stalls does not hide its own delay
//
// Sending goes on in the callbacks of the client; the calling thread makes the open loop arrive,
// restarts what has failed after a pause, and watches the clock.
#pragma once

#include "einsum_client.h"

enum {
    BENCH_TOKENS_MAX = 16,
    BENCH_CONCURRENCY_MAX = 65536,
    BENCH_STATUSES = 17,
    BENCH_BUCKETS_MAX = 64,
};

// Counts of values in buckets of at most 1/64 of their value, from 1 ns to the end of 64 bits.
enum { HISTOGRAM_SUB_BITS = 6, HISTOGRAM_BUCKETS = (64 - HISTOGRAM_SUB_BITS + 1) * 64 };
struct bench_histogram {
    uint64_t counts[HISTOGRAM_BUCKETS];
    uint64_t total, max, sum;
};
void bench_histogram_add(struct bench_histogram *histogram, uint64_t value);
// The value that `share` (0 to 1) of all are at or below, to the bucket's upper end; 0 if empty.
uint64_t bench_histogram_at(const struct bench_histogram *histogram, double share);

struct bench_options {
    struct einsum_client *client;
    const struct einsum_client_weight *weights; // in turn
    size_t weights_n;
    uint32_t tokens[BENCH_TOKENS_MAX]; // in turn
    size_t tokens_n;
    uint32_t concurrency;
    double rate;      // a second; 0: closed loop
    uint32_t streams; // 0: unary calls
    // 0: all values go round
    enum einsum_client_activation_layout activation_layout;
    enum einsum_client_scale_layout scale_layout;
    enum einsum_client_scale_type scale_type;
    enum einsum_client_output_type output_type;
    bool digest_only;
    bool attention;     // send attention's output and positions; the three layouts do not matter
    const char *kernel; // NULL: the server's choice
    enum einsum_client_priority priority;
    bool zeros_allowed; // as the null engine answers
    uint64_t warmup_ns, duration_ns;
    uint64_t requests_max; // to measure; 0: as many as `duration_ns` lets
    uint64_t seed;
    // Called about ten times a second on the calling thread; false ends the run early.
    bool (*on_tick)(void *context, double share_done, uint64_t calls);
    void *context;
};

struct bench_result {
    uint64_t elapsed_ns;                         // measured
    uint64_t calls;                              // answered well
    uint64_t tokens, sent_bytes, received_bytes; // of those: tensors alone
    uint64_t attempts;
    uint64_t failed[BENCH_STATUSES]; // by status
    struct einsum_client_error last_error;
    bool interrupted;
    struct bench_histogram latency;
    // What the server says of the batches that calls travelled in.
    uint64_t batch_requests, batch_tokens, queue_ns, run_ns; // sums over calls
    uint32_t buckets_n;
    struct {
        uint32_t bucket;
        uint64_t calls;
    } buckets[BENCH_BUCKETS_MAX];
};

// First sends each weight one request twice, once for its output and once for its digest, and
// compares them: INTERNAL if they differ or the output is no numbers. Then runs the load. A call
// that fails is counted, not returned. Blocks; not from a callback.
enum einsum_client_status bench_run(const struct bench_options *options,
                                    struct bench_result *result, struct einsum_client_error *error);
