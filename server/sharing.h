// The control socket over which callers on this host register memory and make rings in it: see
// client/einsum_shared.h for what is spoken there. Beside gRPC's listeners, with a lock file and limits of its own.
//
// A connection owns its regions and its ring; when it ends, for whatever reason, nobody finds them any
// more, and they are unmapped once the last job that uses them is answered. Main thread, but for
// sharing_stats; what takes time (mapping, telling the engine) runs in libuv's pool.
#pragma once

#include <uv.h>

#include "region.h"
#include "ring.h"

enum { SHARING_CONNECTION_REGIONS_MAX = RING_REGIONS_MAX };

struct sharing;

struct sharing_options {
    uv_loop_t *loop;
    const char *address; // "unix:/PATH"; borrowed
    uint32_t unix_socket_mode;
    uint32_t connections_max;
    uint32_t connection_regions_max; // up to SHARING_CONNECTION_REGIONS_MAX
};

// Binds the socket, without listening yet.
NODISCARD enum status sharing_create(const struct sharing_options *options,
                                     struct sharing **sharing, struct error *err);
// `regions` and `rings` have been created with the next two and `sharing` as what to call. `rings`
// NULL: there are none.
NODISCARD enum status sharing_start(struct sharing *sharing, struct regions *regions,
                                    struct rings *rings, struct error *err);
void sharing_on_unused(void *sharing);      // any thread
void sharing_on_broken(void *sharing);      // any thread
void sharing_stop(struct sharing *sharing); // no further connections; again is harmless
// Ends all connections, before the loop runs for the last time; destroy comes after it. Nobody may
// hold a region by then.
void sharing_drop_connections(struct sharing *sharing);
void sharing_destroy(struct sharing *sharing);

struct sharing_stats {
    uint32_t connections;
    uint64_t connections_refused;
};
struct sharing_stats sharing_stats(const struct sharing *sharing); // any thread
