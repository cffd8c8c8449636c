// The hot messages on the wire, for the client: EinsumRequest and OutputProjectRequest written,
// EinsumResponse read. Knows nothing of gRPC: messages are chunks of memory.
//
// A reply is hostile until read: every length is checked against what is left before it is
// followed, and reading touches no byte outside the chunks.
#pragma once

#include "einsum_client.h"

enum { EINSUM_CLIENT_HEAD_BYTES_MAX = 640, EINSUM_CLIENT_TAIL_BYTES_MAX = 16 };

// The two tensors of a request, in the order in which they are sent.
struct einsum_client_tensors {
    struct einsum_client_tensor {
        const char *name;
        const void *data;
        uint64_t bytes;
    } first, second;
};
struct einsum_client_tensors einsum_client_tensors_of(const struct einsum_client_request *request);

// Where a request's tensors lie in shared memory, in place of the message: a SharedTensors.
struct einsum_client_place {
    bool given;
    uint8_t region[16];
    uint64_t activations_offset, activations_bytes; // of attention: its output
    uint64_t scales_offset, scales_bytes;           // of attention: positions
    uint64_t output_offset, output_bytes;
    uint32_t cuda; // of client_cuda.c: 1 + which memory, if it lies on the GPU
    // Of client_shared.c: memory that holds what the caller has elsewhere; NULL: all lies there.
    uint8_t *staged, *staged_output;
};

// What of a request is not tensor: `head` goes before the first, `tail` between the two. Both end
// with the tag and length of the tensor that follows; an empty tensor has neither.
struct einsum_client_frame {
    uint8_t head[EINSUM_CLIENT_HEAD_BYTES_MAX], tail[EINSUM_CLIENT_TAIL_BYTES_MAX];
    size_t head_bytes, tail_bytes;
    uint64_t message_bytes; // of all, tensors included
};

// The CRC-32C of a request's two tensors; the answer is asked for that of the output, too.
struct einsum_client_sums {
    bool given;
    uint32_t first, second;
};

// `request_id` goes on the wire in place of the request's own. `streamed` wraps it as
// EinsumStreamRequest. The strings must be within the limits of the next two. With a `place` that is
// given, it takes the tensors' place; NULL: none.
void einsum_client_frame_write(struct einsum_client_frame *frame,
                               const struct einsum_client_request *request, uint64_t request_id,
                               bool streamed, const struct einsum_client_place *place,
                               const struct einsum_client_sums *sums);
enum { EINSUM_CLIENT_WEIGHT_BYTES_MAX = 256, EINSUM_CLIENT_EQUATION_BYTES_MAX = 64 };

// A place in a message: what is left of it, or of a field within it.
struct einsum_client_reader {
    const struct einsum_client_chunk *chunks;
    size_t chunks_n;
    size_t chunk, offset; // the next byte
    uint64_t left;
    bool broken; // a length or tag that cannot be
};

struct einsum_client_reader einsum_client_reader_of(const struct einsum_client_chunk *chunks,
                                                    size_t chunks_n);

enum einsum_client_wire_type {
    EINSUM_CLIENT_WIRE_VARINT = 0,
    EINSUM_CLIENT_WIRE_FIXED64 = 1,
    EINSUM_CLIENT_WIRE_BYTES = 2,
    EINSUM_CLIENT_WIRE_FIXED32 = 5,
};

struct einsum_client_wire_field {
    uint32_t number;
    enum einsum_client_wire_type type;
    uint64_t value;                    // of a varint or fixed field
    struct einsum_client_reader bytes; // of a field of bytes
};

// The next field; false at the end, and when the message is broken.
bool einsum_client_reader_next(struct einsum_client_reader *reader,
                               struct einsum_client_wire_field *field);

// Copies what is left of `reader`, at most `bytes`; returns how much.
uint64_t einsum_client_reader_copy(struct einsum_client_reader reader, void *to, uint64_t bytes);

// Copies a string of the other side, cut to `size`, with what is no printable UTF-8 as '?': such
// text ends in terminals, logs and JSON.
void einsum_client_reader_text(struct einsum_client_reader reader, char *to, size_t size);
void einsum_client_clean_text(char *to, size_t size, const char *from, size_t from_bytes);

// An EinsumResponse or EinsumStreamResponse as it came.
struct einsum_client_reply {
    struct einsum_client_response response; // but for output, latency and attempts
    struct einsum_client_reader output;
    bool has_error; // of a stream's reply
    int32_t error_code;
    uint32_t error_retry_after_ms;
    char error_text[EINSUM_CLIENT_ERROR_TEXT_BYTES];
    char error_field[EINSUM_CLIENT_FIELD_BYTES];
};

// false: undecodable.
bool einsum_client_reply_read(const struct einsum_client_chunk *chunks, size_t chunks_n,
                              bool streamed, struct einsum_client_reply *reply);

// Reads a google.rpc.Status: the pause that it advises (0: none) and the field that it blames.
void einsum_client_details_read(const void *details, size_t bytes, int64_t *retry_after_ms,
                                char field[EINSUM_CLIENT_FIELD_BYTES]);
