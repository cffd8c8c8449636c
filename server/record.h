// What one request spent its time on, and how it ended. The histograms all come from here.
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
// They leave nothing out, so they add up to the whole. Of a request that failed, those count that
// it came to an end of. Whoever owns the request calls these, one at a time.
#pragma once

#include "job.h"
#include "metrics.h"

struct service_context;

struct record {
    enum metrics_method method;
    enum metrics_transport transport;
    enum status status;
    // On now_ns()'s clock; 0: not reached.
    uint64_t received_ns, asked_ns, room_ns, queued_ns, launched_ns, done_ns, answered_ns, left_ns;
};

// A message is here. Counts the request.
void record_begin(struct record *record, struct service_context *context,
                  enum metrics_method method, enum metrics_transport transport);
// The answer is about to be given; it can be, since the job (NULL: there was none) is done. Counts how
// it ended, so that whoever has the answer finds it counted.
void record_answer(struct record *record, struct service_context *context, const struct job *job,
                   enum status status);
// The answer has left; or never will.
void record_end(struct record *record, struct service_context *context);

// The phase's length; false: it did not come to its end.
bool record_phase(const struct record *record, enum metrics_phase phase, uint64_t *ns);
