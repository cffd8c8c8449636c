// The hot messages, EinsumRequest, OutputProjectRequest and EinsumResponse, read from and written
// to gRPC's slices without flattening them.
//
// Reading is two passes. The first walks the tags, copies the few scalar fields and notes where the
// tensors lie; it touches no tensor byte and accepts fields in any order, unknown ones, repeats
// (the last wins). The second, once memory is reserved, copies each tensor once to where it
// belongs.
#pragma once

#include <grpc/slice.h>

#include "status.h"

// A range of bytes within a sequence of slices.
struct wire_range {
    uint64_t offset, bytes; // from the start of the message
};

// Below the hot messages lies a walk over any message's fields, for message.c and tests as well:
//
//     while (cursor.offset < end)
//         wire_read_tag, then wire_read_value, then for WIRE_BYTES: wire_skip, wire_take or a walk
//         of its own up to the value's end
//
// `end` is where the message that is walked ends; the caller has it from wire_bytes or a range.
enum wire_type { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_BYTES = 2, WIRE_FIXED32 = 5 };

struct wire_cursor {
    const grpc_slice *next, *slices_end; // slices not yet begun
    const uint8_t *at, *at_end;          // what is left of the one at hand
    uint64_t offset;                     // of `at`, from the start of the message
};

struct wire_field {
    uint32_t number;
    enum wire_type type;
    uint64_t offset;         // of its tag
    uint64_t value;          // of a varint or fixed value
    struct wire_range range; // of WIRE_BYTES: the content, at which the cursor then stands
};

uint64_t wire_bytes(const grpc_slice *slices, size_t slices_n);
// The slices are borrowed, at these addresses: small ones hold their bytes within themselves.
void wire_cursor_init(struct wire_cursor *cursor, const grpc_slice *slices, size_t slices_n);
NODISCARD enum status wire_read_tag(struct wire_cursor *cursor, uint64_t end,
                                    struct wire_field *field, struct error *err);
// `name` goes into the error; NULL if the field is not known.
NODISCARD enum status wire_read_value(struct wire_cursor *cursor, uint64_t end, const char *name,
                                      struct wire_field *field, struct error *err);
// A field of no interest: its value read and passed by.
NODISCARD enum status wire_skip_field(struct wire_cursor *cursor, uint64_t end,
                                      struct wire_field *field, struct error *err);
NODISCARD enum status wire_expect_type(const struct wire_field *field, const char *name,
                                       enum wire_type expected, struct error *err);
void wire_skip(struct wire_cursor *cursor, uint64_t bytes);
void wire_take(struct wire_cursor *cursor, uint64_t bytes, void *to);
// The content of a field of WIRE_BYTES, terminated. INVALID_ARGUMENT: it is longer than `bytes_max`,
// which `to` has room for and its terminator, or it is no text.
NODISCARD enum status wire_take_text(struct wire_cursor *cursor, const struct wire_field *field,
                                     const char *name, size_t bytes_max, char *to,
                                     struct error *err);

// The length of the longest prefix that is text: UTF-8 without NUL.
size_t wire_text_prefix(const void *text, size_t bytes);

enum {
    WIRE_WEIGHT_BYTES_MAX = 256,
    WIRE_EQUATION_BYTES_MAX = 64,
    WIRE_KERNEL_BYTES_MAX = 64,
    WIRE_REGION_BYTES = 16,
};

// A SharedTensors: ranges of the region, as sent.
struct wire_shared {
    bool given;
    uint32_t region_bytes; // 0 if there was none, else WIRE_REGION_BYTES
    uint8_t region[WIRE_REGION_BYTES];
    struct wire_range activations, scales, output; // of attention: its output, positions
};

enum wire_kind { WIRE_EINSUM, WIRE_OUTPUT_PROJECT };

// A Crc32c, if there was one.
struct wire_sum {
    bool given;
    uint32_t crc32c;
};

// Either message; what the other alone has is unset.
struct wire_request {
    enum wire_kind kind;
    uint64_t request_id;
    char weight[WIRE_WEIGHT_BYTES_MAX +
                1]; // terminated; longer, or holding a NUL, is INVALID_ARGUMENT
    char equation[WIRE_EQUATION_BYTES_MAX + 1];
    char kernel[WIRE_KERNEL_BYTES_MAX + 1];
    int32_t recipe, activation_layout, scale_layout, scale_type, output_type; // as sent: any value
    int32_t priority;                                                         // likewise
    uint32_t tokens, group_begin, group_end;
    bool digest_only;
    struct wire_range activations, activation_scales; // of an EinsumRequest
    struct wire_range attention, positions;           // of an OutputProjectRequest
    struct wire_shared shared;                        // of either, in place of the ranges above
    // Of activations and activation_scales, or attention and positions; and whether the response is
    // to have the output's.
    struct wire_sum first_sum, second_sum;
    bool output_sum;
    uint64_t timeout_us; // of a ModelInferRequest alone; 0: none
};

// Reads a message of `kind`. INVALID_ARGUMENT for bytes that are not one. `slices` may be empty:
// all fields unset.
// A known field of an unexpected wire type is an error; unknown fields are skipped, groups (wire
// types 3 and 4) are refused. On failure `request` holds the scalars that came before the fault, so
// that a stream can answer with the request_id.
NODISCARD enum status wire_read_request(const grpc_slice *slices, size_t slices_n,
                                        enum wire_kind kind, struct wire_request *request,
                                        struct error *err);

// The same for EinsumStreamRequest, which holds an EinsumRequest as its field 1 or an
// OutputProjectRequest as its field 2; the last of them counts, and an EinsumRequest with nothing
// set if there is none.
NODISCARD enum status wire_read_stream_request(const grpc_slice *slices, size_t slices_n,
                                               struct wire_request *request, struct error *err);

// Copies a range to `to`. Asserts that it lies within the slices.
void wire_copy(const grpc_slice *slices, size_t slices_n, struct wire_range range, void *to);
// The CRC-32C of a range. Likewise.
uint32_t wire_crc32c(const grpc_slice *slices, size_t slices_n, struct wire_range range);

struct wire_response {
    uint64_t request_id;
    uint32_t tokens, groups, output_dim;
    int32_t output_type;
    uint64_t output_bytes; // of field `output`, which follows the head; 0: none
    uint32_t batch_tokens, batch_bucket, batch_requests;
    uint64_t queue_ns, run_ns;
    uint32_t parts; // that it was cut into; 0: it was not
    struct wire_sum output_sum;
};

enum { WIRE_RESPONSE_HEAD_BYTES_MAX = 192 };

// What writers put one behind the other; each returns where the next goes.
uint8_t *wire_put_varint(uint8_t *at, uint64_t value);
uint8_t *wire_put_tag(uint8_t *at, uint32_t number, enum wire_type type);
uint8_t *wire_put_scalar(uint8_t *at, uint32_t number, uint64_t value); // nothing if it is 0

// Writes all of an EinsumResponse but the output's bytes, which must follow it at once: the head
// ends with the output's tag and length, or without them if output_bytes is 0. With `streamed`,
// wraps it as field 1 of an EinsumStreamResponse. Returns the head's length.
size_t wire_write_response_head(const struct wire_response *response, bool streamed,
                                uint8_t head[WIRE_RESPONSE_HEAD_BYTES_MAX]);
