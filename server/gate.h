// Where callers come in: the addresses of `listen` and `health_listen`, what protects each, and
// whose a connection is by the time that gRPC gets it. Main thread, but where it says any.
//
//     unix socket --[greeting]------------------------------> gRPC, as access_peer_unix
//     TCP ----------[greeting]------------------------------> gRPC, as access_peer_tcp
//     TCP ----------[TLS handshake, client certificate]-----> gRPC, as access_peer_tcp or its own
//     health_listen [greeting]------------------------------> gRPC, as access_peer_health
//
// All of them are watched (guard.h) as long as they last.
#pragma once

#include <uv.h>

#include "access.h"
#include "config.h"
#include "guard.h"
#include "listener.h"
#include "rpc.h"

struct gate;

// Reads certificates and tokens, and binds every address, without listening yet. Both borrowed.
NODISCARD enum status gate_create(uv_loop_t *loop, const struct config *config,
                                  struct metrics *metrics, struct gate **gate, struct error *err);
// Listens. Says in the log how each address is protected. From now on certificates and tokens are read
// again, each for itself, soon after their files have changed.
NODISCARD enum status gate_start(struct gate *gate, struct rpc *rpc, struct error *err);

// No further callers but for probes; a connection ends with its last call, see connections.h. Once more, now
// and then, ends those that have had none since.
void gate_close(struct gate *gate);
// Any thread. As listener_end_connection.
void gate_end_connection(struct gate *gate, int fd);
struct guard_stats gate_guard_stats(const struct gate *gate); // any thread
// No further callers at all. Again is harmless.
void gate_stop(struct gate *gate);
// Before the loop runs for the last time; destroy comes after it.
void gate_drop_connections(struct gate *gate);
void gate_destroy(struct gate *gate);

struct access *gate_access(struct gate *gate);
struct tls *gate_tls(struct gate *gate);                  // NULL: none
struct listener *gate_listener(struct gate *gate);        // of `listen`
struct listener *gate_health_listener(struct gate *gate); // NULL: no `health_listen`
