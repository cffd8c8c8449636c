// One projection on behalf of a call: how a request becomes a job, and how a finished job becomes a
// response.
//
// The tensors are copied once, from gRPC's slices into the batch. The output is not copied: the
// response's last slice points into the batch's memory, on loan to gRPC until it has been sent.
// Tensors in shared memory are not copied at all, see placement.h. While the job is under way or its output on loan, the projection holds its call.
//
// A request that does not fit a batch is cut (cut.h): its reply is a slice for each part.
#pragma once

#include "call.h"
#include "cut.h"
#include "placement.h"
#include "record.h"

enum { PROJECTION_HEAD_BYTES_MAX = 1536 };

struct projection {
    struct job job;       // its on_done and on_room are the owner's to set
    struct record record; // begun by the owner, and answered and ended by it
    struct cut *cut;      // NULL: the job is one
    uint64_t cut_bytes;   // that it counts for in service_context.cut_bytes
    struct call *call;
    struct weight *weight; // found already, a reference that projection_start takes; NULL: by name
    // Writes all of the response but the output's bytes; NULL: as an EinsumResponse.
    size_t (*write_head)(const struct projection *projection, const struct wire_response *response,
                         uint8_t head[PROJECTION_HEAD_BYTES_MAX]);
    bool streamed; // answers as EinsumStreamResponse; on the heap, and freed by projection_release
    bool digest_only;
    bool output_sum; // the response has the output's CRC-32C
    uint64_t request_id;
    // While the job, or a part, waits for room: the message as it came, and where the tensors lie in it.
    grpc_byte_buffer *message;
    struct wire_range activations, activation_scales; // of attention: its output; none
    struct wire_range positions;                      // of attention alone
    struct placement placement;                       // in place of message and ranges
};

// The slices of a message as it came; NULL: none.
struct projection_bytes {
    const grpc_slice *slices;
    size_t slices_n;
};
struct projection_bytes projection_bytes(const grpc_byte_buffer *message);

// Checks the request, copies the tensors and commits the job; or, where there is no room yet, keeps
// `message` until on_room. `*running`: on_done will come, perhaps before this returns. OK without that:
// there are no tokens, and nothing to compute; answer with projection_respond_empty. After a failure
// there is nothing to release.
NODISCARD enum status projection_start(struct projection *projection,
                                       const struct wire_request *request,
                                       grpc_byte_buffer *message, bool *running, struct error *err);

// After on_room or on_done, on the rpc thread: goes on as far as may be. False: it is over, and job.error
// says how. After a failure nothing is left but to release it.
NODISCARD bool projection_go_on(struct projection *projection);

// The response of a job that is DONE and went well. Takes the projection: it is released when the
// message has been sent, or destroyed unsent.
grpc_byte_buffer *projection_respond(struct projection *projection);
grpc_byte_buffer *projection_respond_empty(struct projection *projection); // drops the weight alone
grpc_byte_buffer *projection_respond_error(uint64_t request_id,
                                           const struct error *err); // of a stream

// Of a job that is DONE or whose output was on loan: gives back memory, weight and call. Any
// thread.
void projection_release(struct projection *projection);
