// What a caller on the same host and the daemon say to each other beside gRPC: messages over the
// control socket, and the ring of requests and completions in shared memory. Both sides include
// this; nothing else of the house is needed.
//
// The control socket (ServerInfo's shared_memory.socket) is a unix stream socket. The caller sends
// one struct einsum_shared_request after another, each answered by one einsum_shared_reply before
// the next is sent. What is registered belongs to the connection and is gone with it.
//
//     REGION  + a descriptor    the memory file (memfd_create with MFD_ALLOW_SEALING; sealed with
//                               F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL); answered by its number
//                               on this connection and its name, which requests over gRPC carry
//     FORGET                    of a region, by number
//
// All numbers are little endian; reserved bytes are zero.
#pragma once

#include <stdint.h>

#define EINSUM_SHARED_MAGIC 0x316d6873u // "shm1": also the version

enum einsum_shared_op {
    EINSUM_SHARED_REGION = 1,
    EINSUM_SHARED_FORGET = 2,
};

enum {
    EINSUM_SHARED_NAME_BYTES = 16, // of a region
    EINSUM_SHARED_TEXT_BYTES = 256,
    EINSUM_SHARED_FIELD_BYTES = 64,
    EINSUM_SHARED_ALIGNMENT = 64, // of tensors in a region
};

struct einsum_shared_request {
    uint32_t magic;
    uint32_t op;
    uint32_t region; // FORGET
    uint32_t reserved;
    uint64_t bytes; // REGION: of the file
    uint64_t reserved_too;
    char text[EINSUM_SHARED_TEXT_BYTES]; // terminated
};

struct einsum_shared_reply {
    uint32_t magic;
    uint32_t op;                            // as asked
    uint32_t status;                        // gRPC's; 0: OK
    uint32_t number;                        // REGION: the region's
    uint8_t name[EINSUM_SHARED_NAME_BYTES]; // REGION
    char field[EINSUM_SHARED_FIELD_BYTES];  // at fault, and why; both terminated
    char text[EINSUM_SHARED_TEXT_BYTES];
};

_Static_assert(sizeof(struct einsum_shared_request) == 288, "what goes over the socket");
_Static_assert(sizeof(struct einsum_shared_reply) == 352, "what goes over the socket");
