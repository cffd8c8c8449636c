// Rings of submissions and completions in memory that callers share: a request crosses no socket.
// The layout and the rules of both sides are in client/einsum_shared.h.
//
// One thread takes what all rings submit, checks it as an RPC is checked, commits it and takes the
// scheduler's turn. Completions are written, and sleeping callers woken, by whoever finishes the
// job.
//
// All that a caller writes is hostile: an entry is copied out once and judged by the copy; of the
// counts each side keeps its own, and one that cannot be breaks the ring.
#pragma once

#include "region.h"

enum { RING_REGIONS_MAX = 16, RING_WEIGHTS_MAX = 4096 };

struct rings;
struct ring;
struct service_context;

struct rings_options {
    struct service_context *context;
    uint32_t entries_max; // of one ring
    uint32_t spin_us;     // longest wait for more before the thread sleeps
    // Called on the rings' thread when a ring is found broken; must not block. It is to be closed.
    void (*on_broken)(void *context);
    void *on_broken_context;
};

NODISCARD enum status rings_create(const struct rings_options *options, struct rings **rings,
                                   struct error *err);
// From now on new requests are UNAVAILABLE.
void rings_drain(struct rings *rings);
// Waits until no request is in flight, at most so long.
void rings_wait_idle(struct rings *rings, uint32_t timeout_ms);
// All rings have been closed. Waits for what is in flight.
void rings_destroy(struct rings *rings);

struct rings_stats {
    uint32_t rings;
    uint64_t requests; // taken
};
const struct beat *rings_beat(const struct rings *rings);  // works while a pass is made
struct rings_stats rings_stats(const struct rings *rings); // any thread

// What follows: one thread, the connection's. Makes a ring at an offset of a region, of which it
// takes a reference. `doorbell` is the ring's own, to be passed on. INVALID_ARGUMENT.
NODISCARD enum status ring_open(struct rings *rings, struct region *region, uint64_t offset,
                                uint32_t entries, struct ring **ring, int *doorbell,
                                struct error *err);
// Nothing more is taken; what is not launched is dropped, and nothing more completed.
void ring_close(struct ring *ring);
bool ring_broken(const struct ring *ring);

// The regions that submissions name by number; NULL: none any more.
void ring_set_region(struct ring *ring, uint32_t number, struct region *region);
// The number under which submissions name a weight. NOT_FOUND if none of its name is resident now;
// RESOURCE_EXHAUSTED: too many.
NODISCARD enum status ring_add_weight(struct ring *ring, const char *name, uint32_t *number,
                                      struct error *err);
// Likewise of a kernel; "" is 0. UNIMPLEMENTED.
NODISCARD enum status rings_find_kernel(const struct rings *rings, const char *name,
                                        uint32_t *number, struct error *err);
