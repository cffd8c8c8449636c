// Where callers come in: our own sockets on the main loop, so that connections can be counted and
// limited, a taken port or socket path is an error, and buffers are sized for tensors. Accepted
// sockets go to gRPC, or to sharing.c.
//
// gRPC never tells when a connection ends, so the listener keeps a duplicate of each socket,
// watches it for the hang-up, and closes it then. Main thread only, but where it says any.
#pragma once

#include <uv.h>

#include "rate.h"
#include "status.h"

struct listener;

struct listener_options {
    const char *key; // of the configuration that the addresses are from, for errors; static
    const char *const *addresses; // "HOST:PORT", "[V6]:PORT", "unix:PATH"; borrowed for create
    size_t addresses_n;
    uint32_t unix_socket_mode;
    uint32_t connections_max;
    bool loopback_only; // of TCP addresses, any other is refused
    bool tunnel;        // what comes in by TCP gets a pair of sockets, see listener_taken
    // Numbers of sockets are taken in turn, not the lowest: one is not another's soon after its end. Not
    // for who uses select().
    bool renumber;
};

// A connection that has come in, whose sockets are the taker's.
struct listener_taken {
    int fd; // for the server
    bool is_unix;
    // With `tunnel`: the socket itself, and the other end of `fd`, between which the taker carries
    // the bytes. Else -1.
    int wire, tunnel;
};
typedef void listener_take(void *context, const struct listener_taken *taken);

// Binds every address, without listening yet. ALREADY_EXISTS: another process has one.
NODISCARD enum status listener_create(uv_loop_t *loop, const struct listener_options *options,
                                      struct listener **listener, struct error *err);
// From now on connections come in and go to `take`, on the main thread, which owns the socket.
NODISCARD enum status listener_start(struct listener *listener, listener_take *take, void *context,
                                     struct error *err);
// Main thread. Holds for connections that come from then on.
void listener_set_connections_max(struct listener *listener, uint32_t connections_max);
// No further ones. The unix sockets are unlinked. Again is harmless.
void listener_stop(struct listener *listener);
// Any thread. Ends the connection that `take` was given as `fd`, if it is still there: what was
// written arrives, and the peer, who sees that no more will come, closes it.
void listener_end_connection(struct listener *listener, int fd);
// Any thread. Ends it at once, both ways, whatever is under way. False: it is not there, or has
// been cut before.
bool listener_cut_connection(struct listener *listener, int fd);
// Each that is not `busy`.
void listener_end_idle(struct listener *listener, bool (*busy)(void *context, int fd),
                       void *context);
// Before the loop runs for the last time; destroy comes after it.
void listener_drop_connections(struct listener *listener);
void listener_destroy(struct listener *listener);

// The addresses as bound (port 0 resolved), with commas between.
void listener_addresses(const struct listener *listener, char *text, size_t bytes);

// Each address as bound.
struct listener_address {
    const char *text;
    bool is_unix, is_loopback;
};
size_t listener_addresses_n(const struct listener *listener);
struct listener_address listener_address(const struct listener *listener, size_t index);
// What somebody else keeps of a connection, zero at first.
struct listener_notes {
    struct sockaddr_storage peer; // the listener's: the caller's address
    uint64_t received_bytes, sent_bytes, settled_bytes, owed_bytes;
    uint64_t sent_ns;
    struct rate faults;
    bool cut;
    bool by_tls; // the listener's: what is received is more than what gets to the server
};
// `socket` is for looking at the connection alone, `fd` what `take` was given.
typedef void listener_visitor(void *context, int socket, int fd, struct listener_notes *notes);
// Main thread. Calls `visit` for each connection.
void listener_visit(struct listener *listener, listener_visitor *visit, void *context);
// And for each from now on when it has ended; NULL: no more.
void listener_visit_ended(struct listener *listener, listener_visitor *visit, void *context);

struct listener_stats {
    uint32_t connections;
    uint64_t accepted, refused, accept_errors;
};
struct listener_stats listener_stats(const struct listener *listener); // any thread
