// The gRPC server: its completion queues, the thread that serves each, and the pool of calls.
//
// Every call belongs to one rpc thread for its life: its tags pop there, its callbacks run there.
// Slots are armed before a call is handled and there are more calls in the pool than may be live,
// so that overload is answered, not left to hang.
#pragma once

#include "call.h"
#include "connections.h"
#include "metrics.h"

struct beat;
struct rpc;

struct rpc_options {
    uint32_t threads;
    uint32_t calls_max;               // open at once, of any kind; past it RESOURCE_EXHAUSTED
    uint32_t connections_max;         // of which each has some calls of its own beside calls_max
    uint32_t connection_requests_max; // HTTP/2 streams of one connection
    uint32_t connection_in_flight_max, in_flight_max; // requests: see call_request_begin
    uint64_t message_bytes_max;                       // received
    uint32_t metadata_bytes_max;                      // of one call, received
    uint32_t keepalive_ms, keepalive_timeout_ms;
    uint32_t connection_idle_ms, connection_age_ms, connection_age_grace_ms; // 0: for ever
    uint64_t transport_bytes_max; // gRPC's own buffers: a last resort, well above admission
    uint32_t reply_timeout_ms;
    const struct method *const *methods; // tables that end with a NULL path; NULL-terminated
    struct service_context *context;
    struct metrics *metrics;
    struct access *access;
    uint32_t (*retry_after_ms)(
        const struct service_context *context); // advice, when calls are too many
    // Called on an rpc thread once the server has shut down and no call is left.
    void (*on_drained)(void *drained_context);
    // Called on an rpc thread: the connection that was added as `fd`, and may be closed by now, is to end,
    // see connections.h.
    void (*on_connection_ends)(void *drained_context, int fd);
    void *drained_context;
};

// Starts gRPC (once in a process) and the server; nothing is served until a connection is added.
NODISCARD enum status rpc_create(const struct rpc_options *options, struct rpc **rpc,
                                 struct error *err);

// Any thread.
void rpc_set_reply_timeout(struct rpc *rpc, uint32_t timeout_ms);
// Any thread: takes a connected socket, and `peer`, whose it is.
void rpc_add_connection(struct rpc *rpc, int fd, struct access_peer *peer);
// Any thread, now and then: the thread that was told of the last one may be long within gRPC.
void rpc_take_added(struct rpc *rpc);

// As long as a call lives, gRPC keeps its connection's socket open, so that its number is nobody else's.
struct connections *rpc_connections(const struct rpc *rpc);
// What its threads are about: works while one handles an event.
uint32_t rpc_threads(const struct rpc *rpc);
const struct beat *rpc_beat(const struct rpc *rpc, uint32_t thread);

// Main thread. Calls that gRPC has and that have not come to us: of all, and of the connection that was
// added as `fd`. Each asks gRPC for a text, and reads it.
uint64_t rpc_backlog(const struct rpc *rpc);
uint64_t rpc_connection_backlog(const struct rpc *rpc, int fd);
// Any thread. Whether nobody is at the other end of a socket: reset, or closed for both ways.
bool rpc_caller_is_gone(int socket);

// Main thread. How far an rpc thread has come, counted from 0.
struct rpc_progress {
    uint64_t events, cpu_ns;
    bool within_grpc;
};
struct rpc_progress rpc_progress(const struct rpc *rpc, uint32_t index);

// Main thread. Connections begin to end, see connections.h; on_drain of live calls that came through a
// proxy runs, while the end of their connection is not yet near. Again is harmless.
void rpc_close(struct rpc *rpc);
// Main thread. Refuses new calls, tells clients to go elsewhere, runs on_drain of every live call;
// on_drained follows when the last one has ended by itself or by rpc_cancel_calls.
void rpc_drain(struct rpc *rpc);
// After rpc_drain. Answers every live call UNAVAILABLE; again is harmless.
void rpc_end_calls(struct rpc *rpc);
// Resets what is left: callers that do not take even that.
void rpc_cancel_calls(struct rpc *rpc);

// After on_drained. Joins the threads and shuts gRPC down.
void rpc_destroy(struct rpc *rpc);
