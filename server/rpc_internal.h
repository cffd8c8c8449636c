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
    bool draining;    // on_drain has been run
    bool ended_calls; // as rpc_end_calls asks
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

// What one connection asks of us, by its number: see connection_number. The number is another's some
// time after it is closed.
struct rpc_connection {
    uint32_t next_added;                       // guarded by rpc->adding
    _Atomic(struct access_peer *) peer;        // owned; NULL: none has had this number
    _Atomic uint32_t calls;                    // live ones
    _Atomic uint32_t admitted;                 // of those, the ones that are not being refused
    _Atomic uint32_t requests;                 // in flight; see call_request_begin
    _Atomic uint64_t faults;                   // see rpc_call_fault
    _Atomic(_Atomic uint64_t *) faults_beside; // counts them too; or NULL
    _Atomic uint64_t settled_bytes;            // see rpc_settled_bytes
    _Atomic uint64_t arrived;                  // calls since it was added
    _Atomic uint64_t arrived_at_look;          // the last one of rpc_leave_idle
    _Atomic int64_t channelz;                  // gRPC's number for it
};

// What a call may cost beside its messages: headers, frames, window updates for the reply.
enum { CALL_OVERHEAD_BYTES = 16 << 10 };

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
    _Atomic bool draining;
    _Atomic bool end_calls;
    _Atomic bool watch_idle;
    _Atomic uint64_t arrived; // calls, since the start
    // Connections for any thread to take, the first and the last, linked by next_added; 0: none. Changed
    // under `adding`.
    _Atomic uint32_t added;
    uint32_t added_last;
    uint32_t added_n;          // so far, by which threads are told of them in turn
    pthread_mutex_t adding;    // guards the next two as well
    int64_t channelz_last;     // of the connection added last
    size_t connections_used;   // none from here on has been added: pages never touched
    _Atomic uint32_t admitted; // calls
    _Atomic uint32_t requests; // in flight
    struct rpc_connection *connections;
    size_t connections_n; // numbers in it; a connection beyond is closed at once
    _Atomic uint32_t
        live_calls; // of all threads, and one for the server until its shutdown tag has popped
};

// The listener gives gRPC its sockets by number, and that is what gRPC calls the peers.
static inline uint32_t connection_number(int fd)
{
    return (uint32_t)fd + 1; // 0 is none
}

// rpc.c
// Who sent the call. As long as a call lives, gRPC keeps its connection's socket open, so that its
// number is nobody else's. NULL: unknown.
struct access_peer *rpc_peer(const struct rpc *rpc, uint32_t connection);
extern __thread struct rpc_thread *rpc_thread_here; // set while an rpc thread is outside of gRPC
void rpc_call_ended(struct call *call);             // back to the pool
void rpc_message_came(struct call *call, const grpc_byte_buffer *message);
// It came to nothing by its client's doing: reset before its answer had left, or wrong.
void rpc_call_fault(struct call *call);

// call.c: what rpc.c does with the events of a call.
// `full` not NULL: too many are live; `leaves`: its connection ends. Both are refused.
void call_arrived(struct call *call, struct error *full, bool leaves);
void call_tag_popped(struct call *call, enum tag_kind kind, bool success);
void call_woken(struct call *call); // drops the reference of being in `woken`
