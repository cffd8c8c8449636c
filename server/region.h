// Memory that callers share with the daemon: memory files that they made, passed over a socket
// (sharing.c) and mapped here, or memory of theirs on the engine's device; known by names that cannot
// be guessed.
//
//     regions_add      looks at the file, maps it, tells the engine of it: milliseconds
//     regions_import   opens memory on the device by its handle: likewise
//     region_find      by name, with a reference: nanoseconds
//     regions_remove   nobody finds it any more; who holds a reference goes on using it
//     region_unref     the last one puts it among the unused, which regions_collect unmaps
//
// Invariant: a mapped file cannot shrink (its seals say so), so touching it never faults; what it
// holds may change at any moment, since the caller writes to it as well. So whatever decides
// something is copied out first, and checked there.
#pragma once

#include "engine.h"

enum { REGION_NAME_BYTES = 16, REGION_ALIGNMENT = CACHE_LINE_BYTES };

struct regions;

struct region {
    uint8_t name[REGION_NAME_BYTES]; // its index in the table, then random
    uint8_t *memory;                 // on the device: its address there, of no use to the host
    uint64_t bytes;
    bool direct;    // the engine takes operands that lie here
    bool staged;    // by way of the batch's memory, see engine_ops
    bool on_device; // no host thread may touch it
    // Private to region.c.
    struct regions *owner;
    _Atomic uint32_t references;
    struct region *next_unused;
};

struct regions_options {
    const struct engine_ops *ops;
    struct engine *engine;
    uint32_t regions_max;
    uint64_t region_bytes_max; // of one
    uint64_t bytes_max;        // of all
    bool import;               // whether memory on the device is taken
    // Called on any thread when regions_collect has something to do; must not block.
    void (*on_unused)(void *context);
    void *context;
};

NODISCARD enum status regions_create(const struct regions_options *options,
                                     struct regions **regions, struct error *err);
void regions_destroy(struct regions *regions); // none is left, but unused ones

// Any thread; may take milliseconds. Maps `fd`, which is borrowed: a memory file of memfd_create,
// of `bytes` bytes, with the seals F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL. Gives a reference.
// FAILED_PRECONDITION: it is no such file; INVALID_ARGUMENT: its size; RESOURCE_EXHAUSTED: over a
// limit, or no memory. If the engine cannot reach it, tensors are copied; the log says so.
NODISCARD enum status regions_add(struct regions *regions, int fd, uint64_t bytes,
                                  struct region **region, struct error *err);
// Any thread; may take milliseconds. Opens memory on the engine's device that the caller has exported:
// the first `bytes` of what the handle is of. Gives a reference. UNIMPLEMENTED: the engine has none;
// FAILED_PRECONDITION: it is not allowed, or cannot be opened; otherwise as regions_add.
NODISCARD enum status regions_import(struct regions *regions,
                                     const uint8_t handle[ENGINE_HANDLE_BYTES], uint64_t bytes,
                                     struct region **region, struct error *err);
// Any thread. From now on it is not found; drops the reference of regions_add.
void regions_remove(struct regions *regions, struct region *region);

// Any thread. With a reference; NULL: there is none of that name.
struct region *region_find(struct regions *regions, const uint8_t name[REGION_NAME_BYTES]);
struct region *region_ref(struct region *region);
void region_unref(struct region *region);

// Any thread; may take milliseconds. What was unused is gone on return.
void regions_collect(struct regions *regions);

// Whether `bytes` at `offset` lie within the region, and at a multiple of `alignment`.
// INVALID_ARGUMENT, naming `field`.
NODISCARD enum status region_check(const struct region *region, const char *field, uint64_t offset,
                                   uint64_t bytes, uint64_t alignment, struct error *err);

struct regions_stats {
    uint32_t regions; // mapped, those in use by jobs alone included
    uint64_t bytes;
};
struct regions_stats regions_stats(struct regions *regions);
