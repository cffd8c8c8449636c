// What stands between the listener and gRPC, since gRPC 1.51 trusts whoever connects: it holds what
// comes without end, and bounds the calls of a connection only once the client has said that it knows the
// bound.
//
//     listener --fd--> greeting: preface, our SETTINGS, their ACK --fd--> gRPC
//                        | HTTP/1, garbage, silence: ended               |
//     listener <---------------- cut off <---------------- watched: bytes that become no message,
//                                                          calls begun and reset by the thousand
//
// What comes by TLS is greeted by the handshake, and watched like all others. A greeting only looks
// (MSG_PEEK): gRPC reads all of it again. The address of who was cut off is kept out for a while, and a
// suspect for some time after, whose limits are lower: see suspects.h. Main thread but where it says any.
#pragma once

#include <uv.h>

#include "access.h"
#include "status.h"

struct guard;
struct listener;
struct rpc;

// Of all connections that gRPC has, whoever guards them: its threads serve all.
struct guard_traffic {
    uint64_t moved; // bytes, either way, since the start
    uint64_t
        uncounted_ns; // when there was last one whose bytes the kernel does not count, a unix socket
    const struct guard *most; // who guards the one that owes most; NULL: none does
    uint64_t most_owed_bytes;
};

struct guard_options {
    uv_loop_t *loop;
    struct listener *listener;
    uint32_t handshake_ms;         // of a greeting
    uint32_t streams_max;          // of a connection: what the client is told, and must acknowledge
    uint64_t connection_bytes_max; // sent by a connection and not settled, see connections_settle
    uint64_t bytes_max;            // of all together; then the one with most is cut off
    uint32_t faults_max;           // of a connection in a second, see connections_fault
    uint32_t penalty_ms; // that the address of who was cut off is kept out; doubled each time again
    struct rpc *rpc;     // takes those that are greeted; its calls and bytes are looked at
    struct guard_traffic *traffic; // lent
};

NODISCARD enum status guard_create(const struct guard_options *options, struct guard **guard,
                                   struct error *err);
// Of a connection that has come in by `socket` and is to be rpc's `fd`: whether its address is not kept
// out. Counts one that is.
bool guard_admits(struct guard *guard, int socket, int fd);
// Greets a connection that has come in, then gives it to rpc with `peer`, which nobody owns. Takes the
// socket.
void guard_take(struct guard *guard, int fd, struct access_peer *peer);
// Those that are being greeted are let go; nobody is watched any more.
void guard_stop(struct guard *guard);
// Once the loop has closed its handles.
void guard_destroy(struct guard *guard); // NULL: nothing

// Why connections were ended.
enum guard_reason {
    GUARD_HANDSHAKE,        // handshake_ms passed
    GUARD_NOT_HTTP2,        // what came is another protocol
    GUARD_CONNECTION_BYTES, // connection_bytes_max
    GUARD_TRANSPORT_BYTES,  // bytes_max
    GUARD_FAULTS,           // faults_max
    GUARD_BACKLOG, // calls that gRPC has and we do not, many times what HTTP/2 lets a client have
    GUARD_STUCK,   // gRPC labours on its bytes and gets nowhere
    GUARD_PENALTY, // one from its address was cut off just now
    GUARD_REASONS
};
extern const char *const guard_reason_names[GUARD_REASONS];

struct guard_stats {
    uint64_t ended[GUARD_REASONS];
    uint64_t owed_bytes; // by all connections
};
struct guard_stats guard_stats(const struct guard *guard); // any thread
