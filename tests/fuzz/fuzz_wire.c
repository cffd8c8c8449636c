// Fuzzes the readers of the hot messages. An input is one byte that says how to cut the rest into
// slices, and the message, which is read as each kind.
//
// Besides not crashing: the cut must not matter, ranges must lie within the message, and what we
// accept protobuf-c must accept and understand the same.
#include <stdlib.h>
#include <string.h>

#include "einsum/v1/einsum.pb-c.h"
#include "server/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SLICES_MAX = 64 };

static size_t cut(const uint8_t *bytes, size_t n, uint8_t how, grpc_slice slices[SLICES_MAX])
{
    size_t slices_n = 0;
    for (size_t at = 0; at < n;) {
        size_t piece = 1 + (how + slices_n * 7) % 40; // both sides of what gRPC inlines
        if (piece > n - at || slices_n == SLICES_MAX - 1)
            piece = n - at;
        slices[slices_n++] = grpc_slice_from_copied_buffer((const char *)bytes + at, piece);
        at += piece;
    }
    return slices_n;
}

// What an input is read as.
enum as { AS_EINSUM = WIRE_EINSUM, AS_OUTPUT_PROJECT = WIRE_OUTPUT_PROJECT, AS_STREAMED };

static void copy_range(const grpc_slice *slices, size_t slices_n, const uint8_t *bytes, size_t n,
                       struct wire_range range)
{
    ASSERT(range.offset + range.bytes <= n);
    uint8_t *copy = malloc(n + 1);
    ASSERT(copy);
    wire_copy(slices, slices_n, range, copy);
    ASSERT(memcmp(copy, bytes + range.offset, range.bytes) == 0);
    free(copy);
}

static enum status read_cut(const uint8_t *bytes, size_t n, uint8_t how, enum as as,
                            struct wire_request *request, struct error *err)
{
    grpc_slice slices[SLICES_MAX];
    size_t slices_n = cut(bytes, n, how, slices);
    enum status status =
        as == AS_STREAMED ? wire_read_stream_request(slices, slices_n, request, err)
                          : wire_read_request(slices, slices_n, (enum wire_kind)as, request, err);
    if (!status) {
        copy_range(slices, slices_n, bytes, n, request->activations);
        copy_range(slices, slices_n, bytes, n, request->activation_scales);
        copy_range(slices, slices_n, bytes, n, request->attention);
        copy_range(slices, slices_n, bytes, n, request->positions);
    }
    for (size_t i = 0; i < slices_n; i++)
        grpc_slice_unref(slices[i]);
    return status;
}

static void assert_range(const uint8_t *bytes, struct wire_range range, ProtobufCBinaryData data)
{
    ASSERT(range.bytes == data.len);
    ASSERT(data.len == 0 || memcmp(bytes + range.offset, data.data, data.len) == 0);
}

// How often the field comes; a SharedTensors in pieces is merged differently: protobuf-c drops a 0
// that should replace something.
static unsigned occurrences(const uint8_t *bytes, size_t n, uint32_t number)
{
    unsigned found = 0;
    grpc_slice slice = grpc_slice_from_static_buffer(bytes, n);
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, &slice, 1);
    while (cursor.offset < n) {
        struct wire_field field;
        ASSERT(wire_read_tag(&cursor, n, &field, NULL) == STATUS_OK);
        ASSERT(wire_read_value(&cursor, n, NULL, &field, NULL) == STATUS_OK);
        wire_skip(&cursor, field.range.bytes);
        found += field.number == number;
    }
    return found;
}

static void compare_shared(const struct wire_shared *shared, const Einsum__V1__SharedTensors *peer,
                           unsigned times)
{
    ASSERT(shared->given == (peer != NULL));
    ASSERT(shared->given == (times > 0));
    if (times != 1)
        return;
    ASSERT(shared->region_bytes == peer->region.len);
    ASSERT(peer->region.len == 0 ||
           memcmp(shared->region, peer->region.data, peer->region.len) == 0);
    ASSERT(shared->activations.offset == peer->activations_offset);
    ASSERT(shared->activations.bytes == peer->activations_bytes);
    ASSERT(shared->scales.offset == peer->scales_offset);
    ASSERT(shared->scales.bytes == peer->scales_bytes);
    ASSERT(shared->output.offset == peer->output_offset);
    ASSERT(shared->output.bytes == peer->output_bytes);
}

static void compare_with_protobuf_c(const struct wire_request *request, const uint8_t *bytes,
                                    size_t n)
{
    Einsum__V1__EinsumRequest *peer = einsum__v1__einsum_request__unpack(NULL, n, bytes);
    ASSERT(peer);
    ASSERT(request->request_id == peer->request_id);
    ASSERT(strcmp(request->weight, peer->weight) == 0);
    ASSERT(strcmp(request->equation, peer->equation) == 0);
    ASSERT(request->recipe == (int32_t)peer->recipe);
    ASSERT(request->activation_layout == (int32_t)peer->activation_layout);
    ASSERT(request->scale_layout == (int32_t)peer->scale_layout);
    ASSERT(request->scale_type == (int32_t)peer->scale_type);
    ASSERT(request->output_type == (int32_t)peer->output_type);
    ASSERT(request->tokens == peer->tokens);
    ASSERT(request->group_begin == peer->group_begin);
    ASSERT(request->group_end == peer->group_end);
    ASSERT(request->digest_only == (peer->digest_only != 0));
    assert_range(bytes, request->activations, peer->activations);
    assert_range(bytes, request->activation_scales, peer->activation_scales);
    compare_shared(&request->shared, peer->shared, occurrences(bytes, n, 16));
    einsum__v1__einsum_request__free_unpacked(peer, NULL);
}

static void compare_output_project(const struct wire_request *request, const uint8_t *bytes,
                                   size_t n)
{
    Einsum__V1__OutputProjectRequest *peer =
        einsum__v1__output_project_request__unpack(NULL, n, bytes);
    ASSERT(peer);
    ASSERT(request->request_id == peer->request_id);
    ASSERT(strcmp(request->weight, peer->weight) == 0);
    ASSERT(strcmp(request->kernel, peer->kernel) == 0);
    ASSERT(request->output_type == (int32_t)peer->output_type);
    ASSERT(request->tokens == peer->tokens);
    ASSERT(request->group_begin == peer->group_begin);
    ASSERT(request->group_end == peer->group_end);
    ASSERT(request->digest_only == (peer->digest_only != 0));
    assert_range(bytes, request->attention, peer->attention);
    assert_range(bytes, request->positions, peer->positions);
    compare_shared(&request->shared, peer->shared, occurrences(bytes, n, 11));
    einsum__v1__output_project_request__free_unpacked(peer, NULL);
}

// Which alternative of the stream's wrapping counts, and that nothing of the other is left. Not the
// fields: where a message comes in pieces, protobuf-c drops an empty value that should replace one.
static void compare_streamed(const struct wire_request *request, const uint8_t *bytes, size_t n)
{
    Einsum__V1__EinsumStreamRequest *peer =
        einsum__v1__einsum_stream_request__unpack(NULL, n, bytes);
    ASSERT(peer);
    bool project = peer->kind_case == EINSUM__V1__EINSUM_STREAM_REQUEST__KIND_OUTPUT_PROJECT;
    ASSERT(project == (request->kind == WIRE_OUTPUT_PROJECT));
    if (project)
        ASSERT(request->activations.bytes == 0 && request->equation[0] == '\0');
    else
        ASSERT(request->attention.bytes == 0 && request->positions.bytes == 0);
    einsum__v1__einsum_stream_request__free_unpacked(peer, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    uint8_t how = data[0];
    const uint8_t *bytes = data + 1;
    size_t n = size - 1;
    for (int as = AS_EINSUM; as <= AS_STREAMED; as++) {
        struct wire_request request, other;
        struct error err = {0}, other_err = {0};
        enum status status = read_cut(bytes, n, how, (enum as)as, &request, &err);
        ASSERT(read_cut(bytes, n, (uint8_t)(how + 13), (enum as)as, &other, &other_err) == status);
        if (status)
            ASSERT(strcmp(err.text, other_err.text) == 0);
        else if (as == AS_EINSUM)
            compare_with_protobuf_c(&request, bytes, n);
        else if (as == AS_OUTPUT_PROJECT)
            compare_output_project(&request, bytes, n);
        else
            compare_streamed(&request, bytes, n);
    }
    return 0;
}
