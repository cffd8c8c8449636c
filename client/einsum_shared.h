// What a caller on the same host and the daemon say to each other beside gRPC: messages over the
// control socket, and a ring of submissions and completions in shared memory, over which a request
// crosses no socket. Both sides include this; nothing else of the house is needed.
//
// The control socket (ServerInfo's shared_memory.socket) is a unix stream socket. The caller sends
// one struct einsum_shared_request after another, each answered by one einsum_shared_reply. What is
// registered belongs to the connection and is gone with it.
//
//     REGION  + a descriptor    the memory file (memfd_create with MFD_ALLOW_SEALING; sealed with
//                               F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL); answered by its number
//                               on this connection and its name, which requests over gRPC carry
//     CUDA                      the same of memory on the GPU that the server computes on, which
//                               the caller has from cudaMalloc: in place of a descriptor and of a
//                               file's size, the handle of cudaIpcGetMemHandle and how many bytes
//                               from its begin; see below
//     FORGET                    of a region, by number
//     RING                      makes a ring in a region, at an offset, with a header of zeros; one
//                               for each connection. Answered with a descriptor: the doorbell, an
//                               eventfd
//     WEIGHT, KERNEL            a name becomes a number for the ring's submissions. A weight's
//                               stays good when the weight is replaced; while none of its name is
//                               resident, requests for it are NOT_FOUND
//
// All numbers are little endian; reserved bytes are zero.
//
// CUDA memory. Only where the server allows it (shared_memory_cuda). Its kernels read tensors there
// and write outputs there; nothing is copied, and nothing is ordered by any stream of the caller's.
// So what the caller's kernels write must be complete before the request is submitted
// (cudaStreamSynchronize, or an event that has been waited for); an answer means that the output is
// complete and visible to whatever the caller launches from then on. Inputs must not change until
// then. The memory must not be freed before FORGET is answered and no request for it is under way,
// or the connection is closed: what CUDA does otherwise is not defined, up to the loss of the device
// for all. Neither attention nor a ring can lie there.
//
//     ring    header | submissions [entries] | completions [entries]     at multiples of 64
//
//     submit_tail    caller --> daemon    how many were submitted, modulo 2^32
//     submit_head    daemon --> caller    how many were taken: their entries are free again
//     complete_tail  daemon --> caller    how many were completed
//     complete_head  caller --> daemon    how many were read: their entries are free again
//
// An entry's index is its count modulo `entries`. Who produces writes the entry, then its tail
// (release); who consumes reads the tail (acquire), then the entry. At most `entries` requests may
// be submitted and not yet read as completions; the daemon leaves what goes beyond where it is.
// Completions come in any order. What is under way is given up by closing the connection; an engine
// at work may write to outputs until it is done.
//
// Sleeping. The daemon sets daemon_sleeps, looks at submit_tail once more, and sleeps: a caller
// that finds it set after moving the tail writes an 8-byte 1 to the doorbell. A caller that waits
// sets caller_sleeps to 1, looks at complete_tail once more, and sleeps on caller_sleeps by
// FUTEX_WAIT (not private) while it is 1; the daemon sets it to 0 and wakes it. The tails, the two
// words and the looks at them are sequentially consistent, or two could miss each other.
#pragma once

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#define EINSUM_SHARED_MAGIC 0x316d6873u // "shm1": also the version

enum einsum_shared_op {
    EINSUM_SHARED_REGION = 1,
    EINSUM_SHARED_FORGET = 2,
    EINSUM_SHARED_RING = 3,
    EINSUM_SHARED_WEIGHT = 4,
    EINSUM_SHARED_KERNEL = 5,
    EINSUM_SHARED_CUDA = 6,
};

enum {
    EINSUM_SHARED_NAME_BYTES = 16, // of a region
    EINSUM_SHARED_TEXT_BYTES = 256,
    EINSUM_SHARED_HANDLE_BYTES = 64, // a cudaIpcMemHandle_t
    EINSUM_SHARED_FIELD_BYTES = 64,
    EINSUM_SHARED_ALIGNMENT = 64, // of tensors in a region
};

struct einsum_shared_request {
    uint32_t magic;
    uint32_t op;
    uint32_t region;                     // FORGET, RING: by number
    uint32_t entries;                    // RING: a power of two
    uint64_t bytes;                      // REGION: of the file; CUDA: from the memory's begin
    uint64_t offset;                     // RING: in the region, a multiple of 64
    char text[EINSUM_SHARED_TEXT_BYTES]; // WEIGHT, KERNEL: terminated; CUDA: begins with the handle
};

struct einsum_shared_reply {
    uint32_t magic;
    uint32_t op;                            // as asked
    uint32_t status;                        // gRPC's; 0: OK
    uint32_t number;                        // REGION, CUDA, WEIGHT, KERNEL
    uint8_t name[EINSUM_SHARED_NAME_BYTES]; // REGION, CUDA
    char field[EINSUM_SHARED_FIELD_BYTES];  // at fault, and why; both terminated
    char text[EINSUM_SHARED_TEXT_BYTES];
};

// Each word on a cache line of its own.
struct einsum_ring_word {
    _Alignas(64) uint32_t value;
};

struct einsum_ring_header {
    struct einsum_ring_word submit_tail, submit_head, complete_tail, complete_head;
    struct einsum_ring_word daemon_sleeps, caller_sleeps;
    struct einsum_ring_word closed; // by the daemon: nothing more is taken or completed
    struct einsum_ring_word reserved;
};

enum einsum_ring_op {
    EINSUM_RING_EINSUM = 0,
    EINSUM_RING_OUTPUT_PROJECT = 1,
};

// See Crc32c in einsum.proto. A daemon from before there were checksums leaves the bits of a
// completion 0.
enum einsum_ring_sum {
    EINSUM_RING_SUM_FIRST = 1,
    EINSUM_RING_SUM_SECOND = 2,
    EINSUM_RING_SUM_OUTPUT = 4,
};

// As an EinsumRequest or OutputProjectRequest, whose enums and rules it shares.
struct einsum_ring_submission {
    uint64_t id; // echoed; otherwise free
    uint32_t op;
    uint32_t weight; // its number
    uint32_t kernel; // its number; 0: the server's choice
    uint32_t recipe, activation_layout, scale_layout, scale_type, output_type;
    uint32_t tokens, group_begin, group_end;
    uint32_t region;     // number of the one that holds the tensors
    uint64_t timeout_ns; // from when it is taken; 0: the server's longest
    // Of attention: its output, and positions.
    uint64_t activations_offset, activations_bytes, scales_offset, scales_bytes;
    uint64_t output_offset, output_bytes; // room
    uint32_t priority;                    // 0: normal
    uint32_t checksums;                   // bits of EINSUM_RING_SUM_*: what to check, and to tell
    uint32_t first_crc32c, second_crc32c; // of activations, scales; of attention, positions
};

struct einsum_ring_completion {
    uint64_t id;
    uint16_t status;    // gRPC's; 0: OK
    uint16_t checksums; // EINSUM_RING_SUM_OUTPUT: output_crc32c is told
    uint32_t retry_after_ms;
    uint32_t tokens, groups, output_dim;
    uint32_t batch_tokens, batch_bucket, batch_requests;
    uint64_t queue_ns, run_ns;
    uint32_t parts; // that it was cut into: see BatchInfo; 0: it was not
    uint32_t output_crc32c;
    // Unless OK: the field at fault, if one is, and why; both terminated.
    char field[EINSUM_SHARED_FIELD_BYTES];
    char text[384];
};

_Static_assert(sizeof(struct einsum_shared_request) == 288, "what goes over the socket");
_Static_assert(sizeof(struct einsum_shared_reply) == 352, "what goes over the socket");
_Static_assert(sizeof(struct einsum_ring_header) == 512, "what lies in the ring");
_Static_assert(sizeof(struct einsum_ring_submission) == 128, "what lies in the ring");
_Static_assert(sizeof(struct einsum_ring_completion) == 512, "what lies in the ring");

// A message over the control socket, with a descriptor unless `fd` is negative. `flags`: sendmsg's,
// beside MSG_NOSIGNAL. Whether all of it was taken.
static inline bool einsum_shared_send(int socket, const void *bytes, size_t n, int fd, int flags)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec piece = {(void *)(uintptr_t)bytes, n};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    return sendmsg(socket, &message, flags | MSG_NOSIGNAL) == (ssize_t)n;
}

static inline uint32_t einsum_ring_get(const struct einsum_ring_word *word)
{
    return __atomic_load_n(&word->value, __ATOMIC_ACQUIRE);
}

static inline void einsum_ring_set(struct einsum_ring_word *word, uint32_t value)
{
    __atomic_store_n(&word->value, value, __ATOMIC_RELEASE);
}

// The same, in one order for all: of a word that tells of work or of sleep, and of the look at the
// other one afterwards.
static inline uint32_t einsum_ring_look(const struct einsum_ring_word *word)
{
    return __atomic_load_n(&word->value, __ATOMIC_SEQ_CST);
}

static inline void einsum_ring_tell(struct einsum_ring_word *word, uint32_t value)
{
    __atomic_store_n(&word->value, value, __ATOMIC_SEQ_CST);
}

static inline uint64_t einsum_ring_bytes(uint64_t entries)
{
    return sizeof(struct einsum_ring_header) + entries * (sizeof(struct einsum_ring_submission) +
                                                          sizeof(struct einsum_ring_completion));
}

// How both sides wait for each other: looking for a while, then sleeping. A look pays if what it
// waits for comes soon enough; where it does not come in time, the next one is shorter, so that
// neither an idle ring nor one whose requests run long keeps a core busy.
//
// After the first moment others may have the core between two looks: it may be the other side that
// needs it. Where that is what brings the work, the moment gets shorter; now and then it is tried
// anew, since threads move.
struct einsum_spin {
    uint64_t ns;       // that the next wait looks for
    uint64_t most_ns;  // its limit
    uint64_t alone_ns; // of that, without letting others have the core
    uint32_t waits;
};

enum { EINSUM_SPIN_ALONE_NS = 2000, EINSUM_SPIN_NS_MIN = 4000, EINSUM_SPIN_ANEW = 64 };

static inline void einsum_spin_init(struct einsum_spin *spin, uint32_t most_us)
{
    spin->ns = spin->most_ns = most_us * 1000ull;
    spin->alone_ns = EINSUM_SPIN_ALONE_NS;
    spin->waits = 0;
}

// Between two looks; false: it is time to sleep. `waited_ns`: since the wait began.
static inline bool einsum_spin_on(const struct einsum_spin *spin, uint64_t waited_ns)
{
    if (waited_ns >= spin->ns)
        return false;
    if (waited_ns >= spin->alone_ns) {
        sched_yield();
        return true;
    }
#if defined(__x86_64__)
    for (int i = 0; i < 4; i++)
        __builtin_ia32_pause();
#endif
    return true;
}

// After a wait, asleep or not, of so long in all.
static inline void einsum_spin_adapt(struct einsum_spin *spin, uint64_t waited_ns)
{
    bool anew = ++spin->waits % EINSUM_SPIN_ANEW == 0;
    spin->alone_ns =
        waited_ns <= spin->alone_ns || anew ? EINSUM_SPIN_ALONE_NS : spin->alone_ns / 2;
    if (waited_ns <= spin->ns)
        return;
    if (waited_ns > spin->most_ns)
        spin->ns = spin->ns / 2 < EINSUM_SPIN_NS_MIN ? 0 : spin->ns / 2;
    else
        spin->ns = 2 * spin->ns < EINSUM_SPIN_NS_MIN ? EINSUM_SPIN_NS_MIN : 2 * spin->ns;
    if (spin->ns > spin->most_ns)
        spin->ns = spin->most_ns;
}
