// Distributed tracing: the caller's `traceparent` is read, and of requests that it wants traced spans
// go to a collector, by OTLP over HTTP. Off unless the configuration names one.
//
//     request --trace_submit--> queue --> trace thread: JSON, libcurl --> POST /v1/traces
//                 full: counted and dropped; nobody waits
//
// A traced request is one span, a child of the caller's, with a child of its own for each phase
// (record.h).
#pragma once

#include "metrics.h"

enum { TRACE_ID_BYTES = 16, TRACE_SPAN_ID_BYTES = 8, TRACE_TEXT_BYTES = 128 };

// The W3C's: whose span a request belongs to.
struct trace_context {
    bool given;
    bool sampled; // the caller records its own span
    uint8_t trace_id[TRACE_ID_BYTES];
    uint8_t parent_id[TRACE_SPAN_ID_BYTES]; // all 0: the request is a trace's root
};

// Of a traceparent header, exactly as the W3C has it (version 00; of later ones what they promise to
// keep). False: it is none, and to be ignored.
bool trace_parse(const char *text, size_t bytes, struct trace_context *context);
// Lower-case hexadecimal, terminated.
void trace_hex(const uint8_t *bytes, size_t n, char *text);

// One traced request. Times are on now_ns()'s clock.
enum { TRACE_STEPS_MAX = 8 };
struct trace_step {
    const char *name; // static
    uint64_t start_ns, end_ns;
};
struct trace_request {
    struct trace_context context;
    uint8_t span_id[TRACE_SPAN_ID_BYTES];
    const char *method, *transport; // static; the method with its service
    enum status status;
    char error[TRACE_TEXT_BYTES];
    char weight[TRACE_TEXT_BYTES];
    uint64_t request_id, start_ns, end_ns;
    uint32_t tokens, batch_tokens, batch_bucket, batch_requests;
    struct trace_step steps[TRACE_STEPS_MAX];
    uint32_t steps_n;
};

struct tracer;
struct tracer_options {
    const char *endpoint; // "http://HOST:PORT/v1/traces"; borrowed
    uint32_t sample;      // of requests without a traceparent one in so many is traced; 0: none
    const char *engine;   // static
};
NODISCARD enum status tracer_create(const struct tracer_options *options, struct tracer **tracer,
                                    struct error *err);
// Sends what is queued, for a short while. May be NULL.
void tracer_destroy(struct tracer *tracer);

// Any thread, all of these. `tracer` may be NULL.
void tracer_set_sample(struct tracer *tracer, uint32_t sample);
// Whether a request is to be traced: its caller says so, or it is the one in
// so many; then its context and span id are set.
bool tracer_takes(struct tracer *tracer, struct trace_context *context,
                  uint8_t span_id[TRACE_SPAN_ID_BYTES]);
void tracer_submit(struct tracer *tracer, const struct trace_request *request);

struct tracer_stats {
    uint64_t exported, dropped_queue, dropped_export; // requests
};
struct tracer_stats tracer_stats(const struct tracer *tracer); // may be NULL: all 0
