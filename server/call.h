// One gRPC call, from arrival to the last tag. Only rpc.c, call.c, message.c, wire.c and
// service_*.c see gRPC.
//
// A method is a table of callbacks, all run on the call's rpc thread, never two of one call at the
// same time:
//
//     on_start    the call has arrived; its first message is already asked for
//     on_message  a message has come whole; NULL: the client has half-closed and sends no more
//     on_sent     the message given to call_send has left; the next may be sent
//     on_wake     another thread has called call_wake
//     on_cancel   the client, its deadline or a lost connection has ended the call: no use answering
//     on_drain    the daemon is draining: end the call soon. Only long-lived calls need it; may come again
//     on_end      the call is over and no callback follows; drop what its state holds
//
// Any may be NULL. A method answers with call_finish, once; a unary method gives the response with
// it.
//
// Lifetime. A call is over once it is finished or cancelled and all its tags have popped; on_end
// comes when it is over and nobody holds it (call_hold). Other threads may touch a call only while
// it is held on their behalf.
#pragma once

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>

#include "access.h"
#include "status.h"

struct call;
struct service_context; // service.h

struct method {
    const char *path; // "/einsum.v1.Einsum/ListWeights"
    enum access_scope needs;
    // The first message arrives together with the call, which saves a round through the queue: for
    // the hot path.
    bool message_with_call;
    void (*on_start)(struct call *call);
    void (*on_message)(struct call *call, grpc_byte_buffer *message); // borrowed
    void (*on_sent)(struct call *call);
    void (*on_wake)(struct call *call);
    void (*on_cancel)(struct call *call);
    void (*on_drain)(struct call *call);
    void (*on_end)(struct call *call);
};

// What the services of one daemon share.
struct service_context *call_context(struct call *call);

// The method's own, NULL at first: either memory of the method's, or up to CALL_INLINE_STATE_BYTES
// in the call itself, which call_inline_state zeroes and sets.
enum { CALL_INLINE_STATE_BYTES = 2048 };
void *call_state(struct call *call);
void call_set_state(struct call *call, void *state);
void *call_inline_state(struct call *call, size_t bytes);

// Asks for the next message; at most one is asked for at a time (the first one is asked for by
// itself).
void call_read(struct call *call);

// Sends one message of a stream; takes `message`. At most one at a time: wait for on_sent. false:
// the call is finished or cancelled already, and `message` has been destroyed.
bool call_send(struct call *call, grpc_byte_buffer *message);

// Ends the call. `message` (NULL: none) is sent first, and taken. `err` is NULL for OK; its text,
// field and retry advice go to the client as status message, grpc-status-details-bin and
// grpc-retry-pushback-ms. Does nothing but destroy `message` if the call is finished or cancelled
// already.
void call_finish(struct call *call, grpc_byte_buffer *message, const struct error *err);
// The on_drain of calls that have nothing to finish: UNAVAILABLE.
void call_finish_draining(struct call *call);

// Any thread: runs on_wake on the rpc thread, soon; several wakes may become one. Nothing happens
// if the call is over.
void call_wake(struct call *call);
// Any thread may hold a call that is held already, the rpc thread any live one; and let go, as its
// last touch.
void call_hold(struct call *call);
void call_unhold(struct call *call);

// What came with the call under this key; false: nothing, or more than once. Valid while the call is.
bool call_metadata(const struct call *call, const char *key, const char **value, size_t *bytes);
// Goes to the client with the call's end, which has not been asked for yet. `key` is static; one a call.
void call_add_trailer(struct call *call, const char *key, const char *text);

// A request on behalf of the call, of which a stream may have many: counts it against the limits of its
// connection and of all, and fails past these. Any thread ends it, while the call is held.
NODISCARD enum status call_request_begin(struct call *call, struct error *err);
void call_request_end(struct call *call);

bool call_cancelled(const struct call *call); // any thread that holds it
uint64_t
call_deadline_ns(const struct call *call); // on now_ns()'s clock, capped by deadline_ms_max
// A number for the connection that it came by, not 0; others have it, too, once that is closed.
uint32_t call_connection(struct call *call);
