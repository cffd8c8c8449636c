// One gRPC call, from arrival to the last tag. Only rpc.c, call.c, listener.c and service_*.c see
// gRPC.
//
// A method is a table of callbacks, all run on the call's rpc thread, none at the same time as
// another of the same call:
//
//     on_start    the call has arrived; the first message is already asked for
//     on_message  a message has come whole; NULL: the client has half-closed and sends no more
//     on_sent     the message given to call_send has left; the next may be sent. NULL if of no
//     interest on_wake     another thread has called call_wake on_end      the call is over
//     (answered, cancelled or cut off) and no callback follows; drop what `state` holds
//
// A method answers with call_finish, once. Unary methods give the reply's message with it.
#pragma once

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>

#include "status.h"

struct call;
struct rpc;

struct method {
    const char *path; // "/einsum.v1.Einsum/ListWeights"
    void (*on_start)(struct call *call);
    void (*on_message)(struct call *call, grpc_byte_buffer *message); // borrowed
    void (*on_sent)(struct call *call);
    void (*on_wake)(struct call *call);
    void (*on_end)(struct call *call);
};

// What the services of one daemon share: weights, batcher, config, health. service.h defines it.
struct service_context;
struct service_context *call_context(struct call *call);

// The method's own, NULL at first.
void *call_state(struct call *call);
void call_set_state(struct call *call, void *state);

// Ask for the next message; at most one is asked for at a time (the first one is asked for by
// itself).
void call_read(struct call *call);

// Send one message of a stream; takes `message`. At most one at a time: wait for on_sent. false:
// the call is over already, and `message` has been destroyed.
bool call_send(struct call *call, grpc_byte_buffer *message);

// End the call. `message` (NULL: none) is sent first, and taken. `err` is NULL for OK; its text,
// field and retry advice go to the client as status message, grpc-status-details-bin and
// grpc-retry-pushback-ms. Does nothing but destroy `message` if the call is finished or cancelled
// already.
void call_finish(struct call *call, grpc_byte_buffer *message, const struct error *err);

// Any thread, while something that on_end waits for keeps the call alive (call_hold): runs on_wake
// on the rpc thread.
void call_wake(struct call *call);
// The call is not recycled, and on_end not called, while held. Rpc thread to hold; any thread to
// let go, as its last touch.
void call_hold(struct call *call);
void call_unhold(struct call *call);

bool call_cancelled(const struct call *call); // by the client, its deadline, or a lost connection
uint64_t
call_deadline_ns(const struct call *call); // on now_ns()'s clock, capped by deadline_ms_max
