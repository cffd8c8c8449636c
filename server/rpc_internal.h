// What rpc.c and call.c share: the call itself and its thread.
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "beat.h"
#include "message.h"
#include "rpc.h"

enum {
    RPC_REGISTERED_MAX = 4, // methods with message_with_call
    RPC_METHODS_MAX = METRICS_CALLS_MAX,
};

enum tag_kind {
    TAG_ARRIVED,
    TAG_CLOSED,
    TAG_RECEIVED,
    TAG_SENT,
    TAG_FINISHED,
    TAG_WAKE,
    TAG_SHUTDOWN
};

struct tag {
    enum tag_kind kind;
    struct call *call; // NULL for WAKE and SHUTDOWN
};

struct rpc_thread {
    struct rpc *rpc;
    pthread_t pthread;
    grpc_completion_queue *queue;
    // A call to nowhere, never started: an empty batch on it puts a tag in the queue at once, C
    // core's one way to wake a queue's thread. Not a real call's, since those end sooner than
    // whoever wakes them can know.
    grpc_channel *waker_channel;
    grpc_call *waker;
    struct tag wake_tag;
    struct beat beat;
    _Atomic(struct call *) woken; // stack of calls to wake, linked by wake_next

    // Events handled, and whether it is within gRPC now: for who looks whether it gets anywhere.
    _Atomic uint64_t events;
    _Atomic bool within_grpc;

    // The thread's own.
    bool started;
    struct call *calls;           // the whole pool
    size_t calls_n, calls_used_n; // those beyond have never been taken
    struct call *free_list;       // linked by next
    struct call *live;            // doubly linked by next, previous
    // Of those that are live; the others are being refused. `sure` are the few of each connection.
    uint32_t admitted_n, admitted_max, sure_n, sure_max;
    // Slots that wait, by registered method; behind those in use, the generic slots.
    uint32_t armed[RPC_REGISTERED_MAX + 1];
    bool closing, draining, ended_calls; // as rpc_close, rpc_drain, rpc_end_calls ask
    uint64_t swept_ns;
};

struct call {
    struct rpc_thread *thread;
    const struct method *method; // NULL: unknown, or the generic slot before it is known
    const struct method *armed;  // the registered one that this slot waits for; NULL: any other
    uint32_t metrics_call;       // what its method is to metrics.h
    grpc_call *grpc; // NULL once the call is over: only then does gRPC let go of what it was lent
    uint64_t deadline_ns;
    uint32_t connection; // see call_connection; 0: not asked for yet
    bool admitted, sure;
    bool through_proxy; // it says so, by `via`
    void *state;

    // References: one of the rpc thread until the call is over, one for each hold, one for being in
    // `woken`.
    _Atomic uint32_t references;
    _Atomic bool cancelled;
    _Atomic bool wake_queued;
    struct call *wake_next;
    struct call *next, *previous;

    // What gRPC writes to or reads from until a tag pops.
    grpc_metadata_array initial_metadata;
    grpc_call_details details;
    gpr_timespec deadline;
    grpc_byte_buffer *received;
    grpc_byte_buffer *sending;
    grpc_byte_buffer *last_message; // of call_finish
    grpc_metadata trailers[3];
    grpc_slice status_text;
    int closed_cancelled;
    struct tag tags[TAG_WAKE]; // by kind

    uint8_t tags_pending;
    bool reading, initial_metadata_sent, finish_asked, finish_started, finish_popped, over;
    enum status finish_status;
    size_t trailers_n;
    uint64_t write_started_ns; // of the write in flight; 0: none

    _Alignas(max_align_t) unsigned char inline_state[CALL_INLINE_STATE_BYTES];
};

struct rpc {
    struct rpc_options options;
    _Atomic uint32_t reply_timeout_ms;
    grpc_server *server;
    struct rpc_thread *threads;
    struct tag shutdown_tag;
    void *registered[RPC_REGISTERED_MAX]; // gRPC's handle by index of a message_with_call method
    const struct method *registered_methods[RPC_REGISTERED_MAX];
    size_t registered_n;
    uint32_t metrics_calls[RPC_METHODS_MAX]; // of each method, counted through all tables
    grpc_server_credentials *credentials;
    _Atomic bool closing, draining, end_calls;
    _Atomic uint64_t arrived; // calls, since the start
    struct connections *connections;
    _Atomic uint32_t added;    // connections so far, by which threads are told of them in turn
    pthread_mutex_t finding;   // guards the next one
    int64_t channelz_last;     // of the connection added last
    _Atomic uint32_t admitted; // calls
    _Atomic uint32_t requests; // in flight
    _Atomic uint32_t
        live_calls; // of all threads, and one for the server until its shutdown tag has popped
};

// rpc.c
extern __thread struct rpc_thread *rpc_thread_here; // set while an rpc thread is outside of gRPC
void rpc_call_ended(struct call *call);             // back to the pool
void rpc_message_came(struct call *call, const grpc_byte_buffer *message);

// call.c: what rpc.c does with the events of a call.
// `full` not NULL: too many are live; `leaves`: its connection ends. Both are refused.
void call_arrived(struct call *call, struct error *full, bool leaves);
void call_tag_popped(struct call *call, enum tag_kind kind, bool success);
void call_woken(struct call *call); // drops the reference of being in `woken`
