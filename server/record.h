// What one request spent its time on, and how it ended. Histograms, the request log, the trailer
// einsumd-timing and spans all come from here.
//
//     received    asked     room      queued     launched    done     answered     left
//        |-receive--|-queue---|-copy_in--|--queue----|--kernel--|-copy_out-|--send---|
//
//     receive   reading and checking the message, from when it is here whole
//     queue     waiting for room in a batch, and in the batch for a lane
//     copy_in   copying its tensors to where the engine reads them
//     kernel    in the engine, with the batch: on a GPU with the copies there and back
//     copy_out  from the batch's end to the reply: being woken, and copying where that is needed
//     send      until the reply has left; a ring has none
//
// Of a request in parts, those of the first, and copy_out has the others.
// They leave nothing out, so they add up to the whole. Of a request that failed, those count that
// it came to an end of. Whoever owns the request calls these, one at a time.
#pragma once

#include "job.h"
#include "metrics.h"
#include "trace.h"

struct service_context;

struct record {
    enum metrics_method method;
    enum metrics_transport transport;
    enum status status;
    // On now_ns()'s clock; 0: not reached.
    uint64_t received_ns, asked_ns, room_ns, queued_ns, launched_ns, done_ns, answered_ns, left_ns;

    // The caller's, set by the owner.
    struct trace_context trace;
    bool timing; // it wants the trailer
    uint64_t request_id;

    // For who wants more than figures; set by record_answer, if somebody does.
    bool logged, traced;
    uint8_t span_id[TRACE_SPAN_ID_BYTES];
    uint32_t connection, tokens, batch_tokens, batch_bucket, batch_requests;
    struct weight *weight; // a reference; NULL: not known
    char error[TRACE_TEXT_BYTES];
};

// A message is here. Counts the request.
void record_begin(struct record *record, struct service_context *context,
                  enum metrics_method method, enum metrics_transport transport);
// The answer is about to be given; it can be, since the job (NULL: there was none) is done, and not yet
// released. `err` NULL: it went well. Counts how it ended, so that whoever has the answer finds it
// counted.
void record_answer(struct record *record, struct service_context *context, const struct job *job,
                   const struct error *err);
// The answer has left, or never will. Once, after record_answer.
void record_end(struct record *record, struct service_context *context);

// The phases that have ended by now, as "receive;dur=0.012, queue;dur=0.4": milliseconds, in the
// syntax of HTTP's Server-Timing.
enum { RECORD_TIMING_BYTES = 256 };
void record_timing(const struct record *record, char text[RECORD_TIMING_BYTES]);

// The phase's length; false: it did not come to its end.
bool record_phase(const struct record *record, enum metrics_phase phase, uint64_t *ns);
