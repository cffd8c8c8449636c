// Fuzzes the reader of the two hot messages. An input is one byte that says how to cut the rest
// into slices, and the message.
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

static enum status read_cut(const uint8_t *bytes, size_t n, uint8_t how, bool streamed,
                            struct wire_request *request, struct error *err)
{
    grpc_slice slices[SLICES_MAX];
    size_t slices_n = cut(bytes, n, how, slices);
    enum status status = streamed ? wire_read_stream_request(slices, slices_n, request, err)
                                  : wire_read_request(slices, slices_n, WIRE_EINSUM, request, err);
    if (!status) {
        ASSERT(request->activations.offset + request->activations.bytes <= n);
        ASSERT(request->activation_scales.offset + request->activation_scales.bytes <= n);
        uint8_t *copy = malloc(n + 1);
        ASSERT(copy);
        wire_copy(slices, slices_n, request->activations, copy);
        ASSERT(memcmp(copy, bytes + request->activations.offset, request->activations.bytes) == 0);
        wire_copy(slices, slices_n, request->activation_scales, copy);
        free(copy);
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
    einsum__v1__einsum_request__free_unpacked(peer, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    uint8_t how = data[0];
    const uint8_t *bytes = data + 1;
    size_t n = size - 1;
    for (int streamed = 0; streamed <= 1; streamed++) {
        struct wire_request request, other;
        struct error err = {0}, other_err = {0};
        enum status status = read_cut(bytes, n, how, streamed, &request, &err);
        ASSERT(read_cut(bytes, n, (uint8_t)(how + 13), streamed, &other, &other_err) == status);
        if (status)
            ASSERT(strcmp(err.text, other_err.text) == 0);
        else if (!streamed)
            compare_with_protobuf_c(&request, bytes, n);
    }
    return 0;
}
