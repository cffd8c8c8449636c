// What client_shared.c, client_cuda.c and client_ring.c share: the memory, its connection, and the
// ring.
//
//     memory    [ ring ][ block ][ block ] ...      a memory file; both sides have it mapped
//
// The memory outlives connections: when the daemon goes and comes back, the same file is registered
// anew. What is registered is described by `link`, whose `epoch` counts connections.
#pragma once

#include "client_internal.h"
#include "einsum_shared.h"

struct einsum_client_ring_call;

// A name and the number that the daemon knows it by.
struct einsum_client_number {
    char name[EINSUM_SHARED_TEXT_BYTES];
    uint32_t hash;   // of both
    uint32_t op;     // WEIGHT or KERNEL
    uint32_t number; // of this
    uint64_t epoch;  // connection
};

struct einsum_client_block {
    struct einsum_client_block *next; // in order of address, without gaps
    uint64_t offset, bytes;
    bool used;
    uint64_t
        free_ns; // of one not used: from when on it may be; the daemon may write to it until then
};

enum { EINSUM_CLIENT_CUDA_MAX = 16, EINSUM_CLIENT_NO_REGION = UINT32_MAX };

// Memory on the GPU, registered by its handle, and anew with each connection.
struct einsum_client_cuda {
    uintptr_t begin; // the device's address; 0: no memory
    uint64_t bytes;
    uint8_t handle[EINSUM_SHARED_HANDLE_BYTES];
    uint8_t name[EINSUM_SHARED_NAME_BYTES];
    uint32_t region; // its number; EINSUM_CLIENT_NO_REGION: not on this connection
};

enum einsum_client_reaper { REAPER_NONE, REAPER_CALLER, REAPER_THREAD };

struct einsum_client_shared {
    struct einsum_client *client;
    char path[108]; // of the control socket
    int file;
    uint8_t *memory;
    uint64_t bytes, ring_bytes; // of all; of what the ring takes at the start

    pthread_mutex_t heap_lock;
    struct einsum_client_block *blocks;

    // The connection. Changed with both locks held, so that either suffices to read it.
    pthread_mutex_t link_lock; // also: one exchange over the socket at a time
    int socket;                // -1: not connected
    uint64_t epoch;
    uint8_t name[EINSUM_SHARED_NAME_BYTES];
    uint32_t region;
    struct einsum_client_cuda cuda[EINSUM_CLIENT_CUDA_MAX];
    _Atomic uint32_t cuda_n; // places in use, at most; never shrinks
    bool has_ring;
    int doorbell;
    uint64_t looked_ns; // when the socket was last looked at; atomic

    // By link_lock.
    struct einsum_client_number *numbers;
    size_t numbers_n, numbers_room;
    bool ring_wanted;
    uint32_t entries_max;

    // The ring, by `lock`.
    pthread_mutex_t lock;
    pthread_cond_t changed; // the thread has something to do
    struct einsum_ring_header *header;
    struct einsum_ring_submission *submissions;
    struct einsum_ring_completion *completions;
    uint32_t entries, submitted;
    struct einsum_client_ring_call **slots; // of what is submitted, `entries` of them
    uint32_t *free_slots, free_slots_n;
    uint32_t in_flight;                                     // submitted and not yet read
    struct einsum_client_ring_call *pending, **pending_end; // until there is a slot
    struct einsum_client_ring_call *ready, **ready_end;     // ended, to be called back
    struct einsum_client_ring_call *paused;                 // until their time to try again
    enum einsum_client_reaper reaper;
    bool stopping;
    uint64_t random;

    // Of the reaper.
    uint32_t read;                       // completions
    struct einsum_client_ring_call *own; // a blocked caller's that is the reaper; by `lock`
    struct einsum_spin spin;

    pthread_t thread;
    bool thread_started;
};

// ---- client_shared.c

// Whether the daemon is still there; says so at once if it was asked for less than a moment ago.
bool einsum_client_shared_alive(struct einsum_client_shared *shared);
// Connects and registers. Not with `lock` held.
enum einsum_client_status einsum_client_shared_connect(struct einsum_client_shared *shared,
                                                       struct einsum_client_error *error);
void einsum_client_shared_disconnect(struct einsum_client_shared *shared);
// The number of a weight or kernel on this connection; false: the daemon has none.
bool einsum_client_shared_number(struct einsum_client_shared *shared, uint32_t op, const char *name,
                                 uint32_t *number, uint64_t *epoch);

// One exchange over the control socket; the caller holds link_lock. `*reply_fd`: a descriptor that
// came along, or -1. A refusal is told as the server's.
enum einsum_client_status einsum_client_shared_ask(struct einsum_client_shared *shared, int socket,
                                                   const struct einsum_shared_request *request,
                                                   int fd, struct einsum_shared_reply *reply,
                                                   int *reply_fd,
                                                   struct einsum_client_error *error);
// Where `bytes` at `memory` lie in what begins at `begin`, if they do and are aligned.
bool einsum_client_offset_of(uintptr_t begin, uint64_t begin_bytes, const void *memory,
                             uint64_t bytes, uint64_t *offset);

// ---- client_cuda.c

// Registers over a new connection what is known; fills in `regions`, which is shared->cuda's
// successor. The caller holds link_lock.
void einsum_client_cuda_connect(struct einsum_client_shared *shared, int socket,
                                struct einsum_client_cuda regions[EINSUM_CLIENT_CUDA_MAX]);
// The place of a request all of whose tensors lie in one such memory; false: they do not.
bool einsum_client_cuda_place(struct einsum_client_shared *shared,
                              const struct einsum_client_request *request,
                              struct einsum_client_place *place);

// ---- client_ring.c

void einsum_client_ring_reset(struct einsum_client_shared *shared); // newly connected; with `lock`
// All that is submitted ends with UNAVAILABLE. With `lock`.
void einsum_client_ring_fail(struct einsum_client_shared *shared);
void *einsum_client_ring_thread(void *shared);
