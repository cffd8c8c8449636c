// wire.h against protobuf-c: whatever one writes the other must read, however the bytes are cut
// into slices; and what is no message must be refused with the right complaint.
#include <check.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "einsum/v1/einsum.pb-c.h"
#include "server/wire.h"

enum { MESSAGE_BYTES_MAX = 1024, SLICES_MAX = 2 * MESSAGE_BYTES_MAX };

// A message as gRPC would hand it over.
struct cut {
    grpc_slice slices[SLICES_MAX];
    size_t slices_n;
};

static void cut_add(struct cut *cut, const uint8_t *bytes, size_t n)
{
    ck_assert_uint_lt(cut->slices_n, SLICES_MAX);
    // A heap block of its own, or inlined when small: a read past either is caught by ASan.
    cut->slices[cut->slices_n++] = grpc_slice_from_copied_buffer((const char *)bytes, n);
}

static void cut_free(struct cut *cut)
{
    for (size_t i = 0; i < cut->slices_n; i++)
        grpc_slice_unref(cut->slices[i]);
    cut->slices_n = 0;
}

// In pieces of `piece` bytes, with an empty slice after every third.
static void cut_evenly(struct cut *cut, const uint8_t *bytes, size_t n, size_t piece)
{
    cut->slices_n = 0;
    for (size_t at = 0; at < n; at += piece) {
        cut_add(cut, bytes + at, n - at < piece ? n - at : piece);
        if (at / piece % 3 == 2)
            cut_add(cut, bytes, 0);
    }
}

static void cut_in_two(struct cut *cut, const uint8_t *bytes, size_t n, size_t at)
{
    cut->slices_n = 0;
    cut_add(cut, bytes, at);
    cut_add(cut, bytes + at, n - at);
}

static enum status read_flat(const uint8_t *bytes, size_t n, bool streamed,
                             struct wire_request *request, struct error *err)
{
    grpc_slice slice = grpc_slice_from_copied_buffer((const char *)bytes, n);
    enum status status = streamed ? wire_read_stream_request(&slice, 1, request, err)
                                  : wire_read_request(&slice, 1, WIRE_EINSUM, request, err);
    grpc_slice_unref(slice);
    return status;
}

static void assert_range_is(const uint8_t *flat, struct wire_range range, ProtobufCBinaryData data)
{
    ck_assert_uint_eq(range.bytes, data.len);
    if (data.len > 0)
        ck_assert_mem_eq(flat + range.offset, data.data, data.len);
}

// Every field of the request, against what protobuf-c made of the same bytes.
static void assert_agrees(const struct wire_request *request, const uint8_t *flat,
                          const Einsum__V1__EinsumRequest *peer)
{
    ck_assert_uint_eq(request->request_id, peer->request_id);
    ck_assert_str_eq(request->weight, peer->weight);
    ck_assert_str_eq(request->equation, peer->equation);
    ck_assert_str_eq(request->kernel, peer->kernel);
    ck_assert_int_eq(request->priority, (int32_t)peer->priority);
    ck_assert_int_eq(request->recipe, (int32_t)peer->recipe);
    ck_assert_int_eq(request->activation_layout, (int32_t)peer->activation_layout);
    ck_assert_int_eq(request->scale_layout, (int32_t)peer->scale_layout);
    ck_assert_int_eq(request->scale_type, (int32_t)peer->scale_type);
    ck_assert_int_eq(request->output_type, (int32_t)peer->output_type);
    ck_assert_uint_eq(request->tokens, peer->tokens);
    ck_assert_uint_eq(request->group_begin, peer->group_begin);
    ck_assert_uint_eq(request->group_end, peer->group_end);
    ck_assert_int_eq(request->digest_only, peer->digest_only != 0);
    assert_range_is(flat, request->activations, peer->activations);
    assert_range_is(flat, request->activation_scales, peer->activation_scales);
    ck_assert_int_eq(request->output_sum, peer->output_crc32c != 0);
    ck_assert_int_eq(request->first_sum.given, peer->activations_crc32c != NULL);
    ck_assert_int_eq(request->second_sum.given, peer->activation_scales_crc32c != NULL);
    if (peer->activations_crc32c)
        ck_assert_uint_eq(request->first_sum.crc32c, peer->activations_crc32c->value);
    if (peer->activation_scales_crc32c)
        ck_assert_uint_eq(request->second_sum.crc32c, peer->activation_scales_crc32c->value);
}

static void assert_same_request(const struct wire_request *a, const struct wire_request *b)
{
    ck_assert_uint_eq(a->request_id, b->request_id);
    ck_assert_str_eq(a->weight, b->weight);
    ck_assert_int_eq(a->kind, b->kind);
    ck_assert_str_eq(a->equation, b->equation);
    ck_assert_str_eq(a->kernel, b->kernel);
    ck_assert_int_eq(a->priority, b->priority);
    ck_assert_int_eq(a->recipe, b->recipe);
    ck_assert_int_eq(a->output_type, b->output_type);
    ck_assert_uint_eq(a->tokens, b->tokens);
    ck_assert_int_eq(a->digest_only, b->digest_only);
    ck_assert_uint_eq(a->activations.offset, b->activations.offset);
    ck_assert_uint_eq(a->activations.bytes, b->activations.bytes);
    ck_assert_uint_eq(a->activation_scales.offset, b->activation_scales.offset);
    ck_assert_uint_eq(a->activation_scales.bytes, b->activation_scales.bytes);
}

// A request with every field set and each varint of another length; packed into `to`.
static size_t pack_full_request(uint8_t to[MESSAGE_BYTES_MAX])
{
    static char weight[] = "layers.3.attn.wo_\xc3\xa4";
    static char equation[] = "bhr,hdr->bhd", kernel[] = "prefill";
    static uint8_t activations[61], scales[9];
    for (size_t i = 0; i < sizeof activations; i++)
        activations[i] = (uint8_t)(0x80 + i); // looks like unfinished varints
    memset(scales, 0xff, sizeof scales);
    Einsum__V1__EinsumRequest request = EINSUM__V1__EINSUM_REQUEST__INIT;
    request.request_id = UINT64_MAX;
    request.weight = weight;
    request.equation = equation;
    request.kernel = kernel;
    request.priority = EINSUM__V1__PRIORITY__PRIORITY_HIGH;
    request.recipe = EINSUM__V1__RECIPE__RECIPE_1_32_32;
    request.activation_layout = EINSUM__V1__ACTIVATION_LAYOUT__ACTIVATION_LAYOUT_GTR;
    request.scale_layout = (Einsum__V1__ScaleLayout)-7; // ten bytes on the wire
    request.scale_type = (Einsum__V1__ScaleType)300;
    request.output_type = EINSUM__V1__OUTPUT_TYPE__OUTPUT_TYPE_FP32;
    request.tokens = UINT32_MAX;
    request.group_begin = 1u << 14;
    request.group_end = 1u << 21;
    request.digest_only = 1;
    request.activations = (ProtobufCBinaryData){sizeof activations, activations};
    request.activation_scales = (ProtobufCBinaryData){sizeof scales, scales};
    Einsum__V1__Crc32c first = EINSUM__V1__CRC32C__INIT, none = EINSUM__V1__CRC32C__INIT;
    first.value = 0xe3069283;
    request.activations_crc32c = &first;
    request.activation_scales_crc32c = &none; // given, of value 0: an empty message
    request.output_crc32c = 1;
    ck_assert_uint_le(einsum__v1__einsum_request__get_packed_size(&request), MESSAGE_BYTES_MAX);
    return einsum__v1__einsum_request__pack(&request, to);
}

// ---- reading

START_TEST(reads_a_request_however_it_is_cut)
{
    uint8_t flat[MESSAGE_BYTES_MAX];
    size_t n = pack_full_request(flat);
    Einsum__V1__EinsumRequest *peer = einsum__v1__einsum_request__unpack(NULL, n, flat);
    ck_assert_ptr_nonnull(peer);
    struct cut cut;
    struct wire_request request;
    struct error err;
    for (size_t at = 0; at <= n; at++) {
        cut_in_two(&cut, flat, n, at);
        ck_assert_int_eq(wire_read_request(cut.slices, cut.slices_n, WIRE_EINSUM, &request, &err),
                         STATUS_OK);
        assert_agrees(&request, flat, peer);
        cut_free(&cut);
    }
    for (size_t piece = 1; piece <= 40; piece++) {
        cut_evenly(&cut, flat, n, piece);
        ck_assert_int_eq(wire_read_request(cut.slices, cut.slices_n, WIRE_EINSUM, &request, &err),
                         STATUS_OK);
        assert_agrees(&request, flat, peer);
        cut_free(&cut);
    }
    einsum__v1__einsum_request__free_unpacked(peer, NULL);
}
END_TEST

START_TEST(reads_an_empty_message_as_all_unset)
{
    struct wire_request request;
    memset(&request, 0xa5, sizeof request);
    ck_assert_int_eq(wire_read_request(NULL, 0, WIRE_EINSUM, &request, NULL), STATUS_OK);
    static const struct wire_request unset;
    assert_same_request(&request, &unset);
    memset(&request, 0xa5, sizeof request);
    ck_assert_int_eq(wire_read_stream_request(NULL, 0, &request, NULL), STATUS_OK);
    assert_same_request(&request, &unset);
}
END_TEST

// A message cut short is either a shorter message, in protobuf-c's eyes too, or refused.
START_TEST(refuses_what_is_cut_short)
{
    uint8_t flat[MESSAGE_BYTES_MAX];
    size_t n = pack_full_request(flat);
    size_t refused = 0;
    for (size_t kept = 0; kept < n; kept++) {
        struct wire_request request;
        struct error err;
        enum status status = read_flat(flat, kept, false, &request, &err);
        Einsum__V1__EinsumRequest *peer = einsum__v1__einsum_request__unpack(NULL, kept, flat);
        ck_assert_int_eq(status, peer ? STATUS_OK : STATUS_INVALID_ARGUMENT);
        if (peer)
            assert_agrees(&request, flat, peer);
        else
            refused++;
        if (peer)
            einsum__v1__einsum_request__free_unpacked(peer, NULL);
    }
    ck_assert_uint_eq(refused, n - 19); // all but the 19 places between fields
}
END_TEST

// What we accept, protobuf-c accepts and understands the same. We refuse more: wire types that do
// not fit, bad text.
START_TEST(agrees_on_mutated_messages)
{
    enum { ROUNDS = 4000 };
    uint8_t valid[MESSAGE_BYTES_MAX], flat[MESSAGE_BYTES_MAX];
    size_t n = pack_full_request(valid);
    unsigned seed = 1;
    int accepted = 0;
    for (int round = 0; round < ROUNDS; round++) {
        memcpy(flat, valid, n);
        for (int i = rand_r(&seed) % 3; i >= 0; i--)
            flat[(size_t)rand_r(&seed) % n] ^= (uint8_t)(1 << rand_r(&seed) % 8);
        struct wire_request request, again;
        struct error err, err_again;
        enum status status = read_flat(flat, n, false, &request, &err);
        struct cut cut;
        cut_evenly(&cut, flat, n, 1 + (size_t)rand_r(&seed) % 30);
        ck_assert_int_eq(
            wire_read_request(cut.slices, cut.slices_n, WIRE_EINSUM, &again, &err_again), status);
        cut_free(&cut);
        if (status) {
            ck_assert_str_eq(err.text, err_again.text);
            continue;
        }
        assert_same_request(&request, &again);
        Einsum__V1__EinsumRequest *peer = einsum__v1__einsum_request__unpack(NULL, n, flat);
        ck_assert_ptr_nonnull(peer);
        assert_agrees(&request, flat, peer);
        einsum__v1__einsum_request__free_unpacked(peer, NULL);
        accepted++;
    }
    ck_assert_int_gt(accepted, ROUNDS / 20);
    ck_assert_int_lt(accepted, ROUNDS);
}
END_TEST

// Bytes of a message that must be refused, the field that must be named ("" for none), and a piece
// of the text.
static const struct refusal {
    const char *bytes;
    size_t bytes_n;
    const char *field;
    const char *text;
} refusals[] = {
#define BYTES(literal) (literal), sizeof(literal) - 1
    {BYTES("\x08"), "request_id", "truncated varint, at byte 1"},
    {BYTES("\x08\x80"), "request_id", "truncated varint, at byte 1"},
    {BYTES("\x08\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00"), "request_id", "varint too long"},
    {BYTES("\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"), "request_id", "varint too long"},
    {BYTES("\x80"), "", "truncated varint, at byte 0"},
    {BYTES("\x88\x80\x80\x80\x80\x00\x01"), "", "varint too long, at byte 0"},
    {BYTES("\x00\x01"), "", "field number out of range"},
    {BYTES("\x02\x00"), "", "field number out of range"},
    {BYTES("\xf8\xff\xff\xff\x1f\x00"), "", "field number out of range"},
    {BYTES("\x0b\x0c"), "", "group"},
    {BYTES("\x0c"), "", "group"},
    {BYTES("\x0e"), "", "wire type that does not exist"},
    {BYTES("\x0f"), "", "wire type that does not exist"},
    {BYTES("\x0a\x01\x00"), "request_id", "wire type 2, expected 0, at byte 0"},
    {BYTES("\x08\x01\x10\x01"), "weight", "wire type 0, expected 2, at byte 2"},
    {BYTES("\x4d\x01\x00\x00\x00"), "tokens", "wire type 5, expected 0"},
    {BYTES("\x61\x01\x00\x00\x00\x00\x00\x00\x00"), "digest_only", "wire type 1, expected 0"},
    {BYTES("\x6d\x01\x00\x00\x00"), "activations", "wire type 5, expected 2"},
    {BYTES("\x12\x03\x61\x62"), "weight", "length that runs past the end, at byte 0"},
    {BYTES("\x6a\xff\xff\xff\xff\x0f"), "activations", "length that runs past the end"},
    {BYTES("\x6a\xff\xff\xff\xff\x7f"), "activations", "length that runs past the end"},
    {BYTES("\x6a\x80\x80\x80\x80\x80\x00"), "activations", "varint too long"},
    {BYTES("\x72"), "activation_scales", "truncated varint"},
    {BYTES("\xaa\x01\x02\x00"), "", "length that runs past the end"},
    {BYTES("\xad\x01\x00\x00\x00"), "", "truncated fixed-size value"},
    {BYTES("\xa9\x01\x00\x00\x00\x00\x00\x00\x00"), "", "truncated fixed-size value"},
    {BYTES("\xa8\x01\x80"), "", "truncated varint, at byte 2"},
    {BYTES("\x90\x01\x05"), "activations_crc32c", "wire type 0, expected 2"},
    {BYTES("\x92\x01\x02\x08\x01"), "activations_crc32c", "wire type 0, expected 5"},
    {BYTES("\x9a\x01\x03\x0d\x01\x02"), "activation_scales_crc32c", "truncated fixed-size value"},
    {BYTES("\x9a\x01\x05\x0d\x01\x02"), "activation_scales_crc32c", "length that runs past"},
    {BYTES("\x80\x01\x01"), "shared", "wire type 0, expected 2"},
    {BYTES("\x82\x01\x02\x00"), "shared", "length that runs past the end"},
    {BYTES("\x82\x01\x03\x10\x80\x80\x00"), "shared.activations_offset", "truncated varint"},
    {BYTES("\x82\x01\x02\x0b\x0c"), "", "group"},
    {BYTES("\x82\x01\x03\x0a\x01x"), "shared.region", "1 bytes, expected 16"},
    {BYTES("\x82\x01\x13\x0a\x11 1234567 1234567x"), "shared.region", "17 bytes, expected 16"},
    {BYTES("\x82\x01\x04\x0a\x10xx"), "shared.region", "length that runs past the end"},
    {BYTES("\x82\x01\x02\x3a\x00"), "shared.output_bytes", "wire type 2, expected 0"},
    {BYTES("\x12\x03\x61\x00\x62"), "weight", "NUL in text, at byte 3"},
    {BYTES("\x12\x01\xff"), "weight", "not UTF-8, at byte 2"},
    {BYTES("\x1a\x02\x61\xc3"), "equation", "not UTF-8, at byte 3"},
    {BYTES("\x1a\x41"
           "0123456789012345678901234567890123456789012345678901234567890123x"),
     "equation", "65 bytes, at most 64"},
    {BYTES("\x7a\x41"
           "0123456789012345678901234567890123456789012345678901234567890123x"),
     "kernel", "65 bytes, at most 64"},
    {BYTES("\x78\x01"), "kernel", "wire type 0, expected 2"},
#undef BYTES
};

START_TEST(names_the_fault)
{
    const struct refusal *refusal = &refusals[_i];
    uint8_t wrapped[MESSAGE_BYTES_MAX];
    struct wire_request request;
    struct error err;
    const uint8_t *bytes = (const uint8_t *)refusal->bytes;
    ck_assert_int_eq(read_flat(bytes, refusal->bytes_n, false, &request, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, refusal->field);
    ck_assert_msg(strstr(err.text, refusal->text), "\"%s\" lacks \"%s\"", err.text, refusal->text);

    // The same within a stream's request, whatever follows it there.
    wrapped[0] = 0x0a;
    wrapped[1] = (uint8_t)refusal->bytes_n;
    memcpy(wrapped + 2, bytes, refusal->bytes_n);
    memset(wrapped + 2 + refusal->bytes_n, 0, 16);
    ck_assert_int_eq(read_flat(wrapped, refusal->bytes_n + 18, true, &request, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, refusal->field);
}
END_TEST

START_TEST(takes_text_of_the_longest_length)
{
    uint8_t bytes[3 + WIRE_WEIGHT_BYTES_MAX + 1] = {0x12, 0x80, 0x02};
    memset(bytes + 3, 'w', WIRE_WEIGHT_BYTES_MAX + 1);
    struct wire_request request;
    struct error err;
    ck_assert_int_eq(read_flat(bytes, 3 + WIRE_WEIGHT_BYTES_MAX, false, &request, &err), STATUS_OK);
    ck_assert_uint_eq(strlen(request.weight), WIRE_WEIGHT_BYTES_MAX);
    bytes[1] = 0x81;
    ck_assert_int_eq(read_flat(bytes, sizeof bytes, false, &request, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.text, "weight: 257 bytes, at most 256");
}
END_TEST

START_TEST(skips_what_it_does_not_know)
{
    static const uint8_t bytes[] = {
        0xa8, 0x01, 0xff, 0x01,                         // 21: varint
        0xaa, 0x01, 0x03, 0x08, 0x08, 0x08,             // 21: bytes
        0x48, 0x05,                                     // tokens = 5
        0xad, 0x01, 1,    2,    3,    4,                // 21: fixed32
        0xa9, 0x01, 1,    2,    3,    4,    5, 6, 7, 8, // 21: fixed64
        0xf8, 0xff, 0xff, 0xff, 0x0f, 0x2a,             // 2^29 - 1: varint
    };
    struct wire_request request;
    ck_assert_int_eq(read_flat(bytes, sizeof bytes, false, &request, NULL), STATUS_OK);
    struct wire_request expected = {.tokens = 5};
    assert_same_request(&request, &expected);
}
END_TEST

// In either message, cut anywhere; what is not sent is 0.
START_TEST(reads_shared_tensors_as_protobuf_c_writes_them)
{
    static uint8_t name[WIRE_REGION_BYTES + 1] = "0123456789abcdef";
    Einsum__V1__SharedTensors shared = EINSUM__V1__SHARED_TENSORS__INIT;
    shared.region = (ProtobufCBinaryData){WIRE_REGION_BYTES, name};
    shared.activations_offset = 64;
    shared.activations_bytes = UINT64_MAX;
    shared.scales_bytes = 1;
    shared.output_offset = 1ull << 40;
    shared.output_bytes = 77;
    Einsum__V1__EinsumRequest einsum = EINSUM__V1__EINSUM_REQUEST__INIT;
    einsum.shared = &shared;
    einsum.tokens = 9;
    Einsum__V1__OutputProjectRequest project = EINSUM__V1__OUTPUT_PROJECT_REQUEST__INIT;
    project.shared = &shared;
    project.tokens = 9;
    const ProtobufCMessage *messages[] = {&einsum.base, &project.base};
    for (int kind = WIRE_EINSUM; kind <= WIRE_OUTPUT_PROJECT; kind++) {
        uint8_t bytes[256];
        size_t n = protobuf_c_message_pack(messages[kind], bytes);
        for (size_t piece = 1; piece <= n; piece++) {
            struct cut cut;
            cut_evenly(&cut, bytes, n, piece);
            struct wire_request request;
            struct error err;
            ck_assert_int_eq(
                wire_read_request(cut.slices, cut.slices_n, (enum wire_kind)kind, &request, &err),
                STATUS_OK);
            cut_free(&cut);
            const struct wire_shared *got = &request.shared;
            ck_assert(got->given);
            ck_assert_uint_eq(request.tokens, 9);
            ck_assert_uint_eq(got->region_bytes, WIRE_REGION_BYTES);
            ck_assert_mem_eq(got->region, name, WIRE_REGION_BYTES);
            ck_assert_uint_eq(got->activations.offset, 64);
            ck_assert_uint_eq(got->activations.bytes, UINT64_MAX);
            ck_assert_uint_eq(got->scales.offset, 0);
            ck_assert_uint_eq(got->scales.bytes, 1);
            ck_assert_uint_eq(got->output.offset, 1ull << 40);
            ck_assert_uint_eq(got->output.bytes, 77);
        }
    }
}
END_TEST

START_TEST(takes_the_last_of_a_repeated_field)
{
    static const uint8_t bytes[] = {
        0x48, 0x05, 0x12, 0x03, 'o',  'l',  'd', 0x6a, 0x02, 0xaa, 0xaa, 0x60, 0x01, // once
        0x6a, 0x00, 0x60, 0x00, 0x12, 0x01, 'n', 0x48, 0x00,                         // and again
    };
    struct wire_request request;
    ck_assert_int_eq(read_flat(bytes, sizeof bytes, false, &request, NULL), STATUS_OK);
    ck_assert_uint_eq(request.tokens, 0);
    ck_assert_str_eq(request.weight, "n");
    ck_assert_uint_eq(request.activations.bytes, 0);
    ck_assert(!request.digest_only);
}
END_TEST

START_TEST(cuts_numbers_to_their_type)
{
    // tokens = 2^32 + 3, recipe = -1, digest_only = 2^40
    static const uint8_t bytes[] = {
        0x48, 0x83, 0x80, 0x80, 0x80, 0x10,                               //
        0x20, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, //
        0x60, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20,                         //
    };
    struct wire_request request;
    ck_assert_int_eq(read_flat(bytes, sizeof bytes, false, &request, NULL), STATUS_OK);
    ck_assert_uint_eq(request.tokens, 3);
    ck_assert_int_eq(request.recipe, -1);
    ck_assert(request.digest_only);
}
END_TEST

START_TEST(merges_a_stream_request_sent_in_pieces)
{
    static const uint8_t bytes[] = {
        0x0a, 0x04, 0x08, 0x07, 0x48, 0x05, // request_id = 7, tokens = 5
        0x1a, 0x02, 0xff, 0xff,             // unknown
        0x0a, 0x05, 0x6a, 0x01, 0xab, 0x48, 0x06,
    };
    struct cut cut;
    for (size_t piece = 1; piece <= sizeof bytes; piece++) {
        cut_evenly(&cut, bytes, sizeof bytes, piece);
        struct wire_request request;
        ck_assert_int_eq(wire_read_stream_request(cut.slices, cut.slices_n, &request, NULL),
                         STATUS_OK);
        ck_assert_uint_eq(request.request_id, 7);
        ck_assert_uint_eq(request.tokens, 6);
        ck_assert_uint_eq(request.activations.bytes, 1);
        uint8_t activation;
        wire_copy(cut.slices, cut.slices_n, request.activations, &activation);
        ck_assert_uint_eq(activation, 0xab);
        cut_free(&cut);
    }
}
END_TEST

START_TEST(keeps_what_came_before_the_fault)
{
    static const uint8_t bytes[] = {0x0a, 0x04, 0x08, 0x07, 0x12, 0x7f};
    struct wire_request request;
    ck_assert_int_ne(read_flat(bytes, sizeof bytes, true, &request, NULL), STATUS_OK);
    ck_assert_uint_eq(request.request_id, 7);
}
END_TEST

START_TEST(refuses_a_stream_request_of_another_type)
{
    static const uint8_t bytes[] = {0x08, 0x01};
    struct wire_request request;
    struct error err;
    ck_assert_int_eq(read_flat(bytes, sizeof bytes, true, &request, &err), STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, "request");
}
END_TEST

// ---- OutputProjectRequest

// Every field set, as above.
static size_t pack_output_project(uint8_t to[MESSAGE_BYTES_MAX])
{
    static char weight[] = "layers.3.attn.wo_\xc3\xa4", kernel[] = "prefill";
    static uint8_t attention[61], positions[16];
    for (size_t i = 0; i < sizeof attention; i++)
        attention[i] = (uint8_t)(0x80 + i);
    memset(positions, 0xff, sizeof positions);
    Einsum__V1__OutputProjectRequest request = EINSUM__V1__OUTPUT_PROJECT_REQUEST__INIT;
    request.request_id = UINT64_MAX;
    request.weight = weight;
    request.output_type = (Einsum__V1__OutputType)-7; // ten bytes on the wire
    request.tokens = UINT32_MAX;
    request.group_begin = 1u << 14;
    request.group_end = 1u << 21;
    request.digest_only = 1;
    request.attention = (ProtobufCBinaryData){sizeof attention, attention};
    request.positions = (ProtobufCBinaryData){sizeof positions, positions};
    request.kernel = kernel;
    request.priority = EINSUM__V1__PRIORITY__PRIORITY_HIGH;
    ck_assert_uint_le(einsum__v1__output_project_request__get_packed_size(&request),
                      MESSAGE_BYTES_MAX);
    return einsum__v1__output_project_request__pack(&request, to);
}

static void assert_output_project_agrees(const struct wire_request *request, const uint8_t *flat,
                                         const Einsum__V1__OutputProjectRequest *peer)
{
    ck_assert_int_eq(request->kind, WIRE_OUTPUT_PROJECT);
    ck_assert_uint_eq(request->request_id, peer->request_id);
    ck_assert_str_eq(request->weight, peer->weight);
    ck_assert_str_eq(request->kernel, peer->kernel);
    ck_assert_int_eq(request->priority, (int32_t)peer->priority);
    ck_assert_int_eq(request->output_type, (int32_t)peer->output_type);
    ck_assert_uint_eq(request->tokens, peer->tokens);
    ck_assert_uint_eq(request->group_begin, peer->group_begin);
    ck_assert_uint_eq(request->group_end, peer->group_end);
    ck_assert_int_eq(request->digest_only, peer->digest_only != 0);
    assert_range_is(flat, request->attention, peer->attention);
    assert_range_is(flat, request->positions, peer->positions);
    ck_assert_str_eq(request->equation, ""); // what is not in this message
    ck_assert_int_eq(request->recipe, 0);
    ck_assert_uint_eq(request->activations.bytes, 0);
    ck_assert_uint_eq(request->activation_scales.bytes, 0);
}

// Cut short, it is a shorter message in protobuf-c's eyes too, or refused.
START_TEST(reads_an_output_project_request)
{
    uint8_t flat[MESSAGE_BYTES_MAX];
    size_t n = pack_output_project(flat), accepted = 0;
    struct cut cut;
    struct wire_request request;
    struct error err;
    for (size_t kept = 0; kept <= n; kept++) {
        cut_evenly(&cut, flat, kept, 1 + kept % 40);
        enum status status =
            wire_read_request(cut.slices, cut.slices_n, WIRE_OUTPUT_PROJECT, &request, &err);
        cut_free(&cut);
        Einsum__V1__OutputProjectRequest *peer =
            einsum__v1__output_project_request__unpack(NULL, kept, flat);
        ck_assert_int_eq(status, peer ? STATUS_OK : STATUS_INVALID_ARGUMENT);
        if (!peer)
            continue;
        assert_output_project_agrees(&request, flat, peer);
        einsum__v1__output_project_request__free_unpacked(peer, NULL);
        accepted++;
    }
    ck_assert_uint_eq(accepted, 12); // between the ten fields, and at both ends
}
END_TEST

static size_t wrap(uint8_t *to, uint8_t tag, const uint8_t *inner, size_t inner_n)
{
    ck_assert(inner_n >= 128 && inner_n < 1 << 14); // a length of two bytes
    to[0] = tag;
    to[1] = (uint8_t)(0x80 | inner_n);
    to[2] = (uint8_t)(inner_n >> 7);
    memcpy(to + 3, inner, inner_n);
    return 3 + inner_n;
}

// As protobuf-c reads the oneof.
START_TEST(the_last_of_both_kinds_counts)
{
    uint8_t einsum[MESSAGE_BYTES_MAX], project[MESSAGE_BYTES_MAX], both[2 * MESSAGE_BYTES_MAX];
    size_t einsum_n = pack_full_request(einsum), project_n = pack_output_project(project);
    struct wire_request request;

    size_t n = wrap(both, 0x0a, einsum, einsum_n);
    n += wrap(both + n, 0x12, project, project_n);
    ck_assert_int_eq(read_flat(both, n, true, &request, NULL), STATUS_OK);
    Einsum__V1__EinsumStreamRequest *peer =
        einsum__v1__einsum_stream_request__unpack(NULL, n, both);
    ck_assert_int_eq(peer->kind_case, EINSUM__V1__EINSUM_STREAM_REQUEST__KIND_OUTPUT_PROJECT);
    assert_output_project_agrees(&request, both, peer->output_project);
    einsum__v1__einsum_stream_request__free_unpacked(peer, NULL);

    n = wrap(both, 0x12, project, project_n);
    n += wrap(both + n, 0x0a, einsum, einsum_n);
    ck_assert_int_eq(read_flat(both, n, true, &request, NULL), STATUS_OK);
    peer = einsum__v1__einsum_stream_request__unpack(NULL, n, both);
    ck_assert_int_eq(peer->kind_case, EINSUM__V1__EINSUM_STREAM_REQUEST__KIND_REQUEST);
    ck_assert_int_eq(request.kind, WIRE_EINSUM);
    assert_agrees(&request, both, peer->request);
    ck_assert_uint_eq(request.attention.bytes, 0);
    einsum__v1__einsum_stream_request__free_unpacked(peer, NULL);
}
END_TEST

static const struct refusal output_project_refusals[] = {
#define BYTES(literal) (literal), sizeof(literal) - 1
    {BYTES("\x40\x01"), "attention", "wire type 0, expected 2"},
    {BYTES("\x49\x01\x02\x03\x04\x05\x06\x07\x08"), "positions", "wire type 1, expected 2"},
    {BYTES("\x4a\x02\x01"), "positions", "length that runs past the end"},
    {BYTES("\x42\xff\xff\xff\xff\x0f"), "attention", "length that runs past the end"},
    {BYTES("\x22\x01\x05"), "tokens", "wire type 2, expected 0"},
    {BYTES("\x52\x01\xff"), "kernel", "not UTF-8"},
    {BYTES("\x5b"), "", "group"},
#undef BYTES
};

START_TEST(names_the_fault_of_an_output_project_request)
{
    const struct refusal *refusal = &output_project_refusals[_i];
    uint8_t wrapped[64] = {0x12, (uint8_t)refusal->bytes_n};
    memcpy(wrapped + 2, refusal->bytes, refusal->bytes_n);
    struct wire_request request;
    struct error err;
    struct cut cut;
    cut_evenly(&cut, wrapped + 2, refusal->bytes_n, 3);
    ck_assert_int_eq(
        wire_read_request(cut.slices, cut.slices_n, WIRE_OUTPUT_PROJECT, &request, &err),
        STATUS_INVALID_ARGUMENT);
    cut_free(&cut);
    ck_assert_str_eq(err.field, refusal->field);
    ck_assert_msg(strstr(err.text, refusal->text), "\"%s\" lacks \"%s\"", err.text, refusal->text);

    ck_assert_int_eq(read_flat(wrapped, 2 + refusal->bytes_n, true, &request, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, refusal->field);
}
END_TEST

// ---- copying

// Whether every range of `flat` comes out of `cut` unchanged, with nothing written past its end.
static bool copies_every_range(const struct cut *cut, const uint8_t *flat, size_t n)
{
    uint8_t to[128];
    for (size_t offset = 0; offset <= n; offset++)
        for (size_t bytes = 0; offset + bytes <= n; bytes++) {
            memset(to, 0xee, sizeof to);
            wire_copy(cut->slices, cut->slices_n, (struct wire_range){offset, bytes}, to);
            if (memcmp(to, flat + offset, bytes) != 0 || to[bytes] != 0xee)
                return false;
        }
    return true;
}

START_TEST(copies_any_range_from_any_cut)
{
    enum { BYTES = 70 };
    uint8_t flat[BYTES];
    for (size_t i = 0; i < BYTES; i++)
        flat[i] = (uint8_t)(i * 37 + 1);
    struct cut cut;
    for (size_t piece = 1; piece <= BYTES; piece++) {
        cut_evenly(&cut, flat, BYTES, piece);
        ck_assert_uint_eq(wire_bytes(cut.slices, cut.slices_n), BYTES);
        ck_assert(copies_every_range(&cut, flat, BYTES));
        cut_free(&cut);
    }
}
END_TEST

START_TEST(copying_past_the_end_is_a_broken_invariant)
{
    grpc_slice slice = grpc_slice_from_static_string("four");
    uint8_t to[8];
    wire_copy(&slice, 1, (struct wire_range){2, 3}, to);
}
END_TEST

// ---- text

static const struct text_case {
    const char *text;
    size_t bytes, prefix;
} text_cases[] = {
    {"", 0, 0},
    {"plain", 5, 5},
    {"a\0b", 3, 1},
    {"\xc3\xa4\xe2\x82\xac\xf0\x9f\x92\xa1", 9, 9},
    {"\x80", 1, 0},               // a continuation alone
    {"a\xc3", 2, 1},              // cut off
    {"\xe2\x82", 2, 0},           //
    {"\xf0\x9f\x92", 3, 0},       //
    {"\xc0\xaf", 2, 0},           // overlong
    {"\xc1\xbf", 2, 0},           //
    {"\xe0\x9f\xbf", 3, 0},       //
    {"\xf0\x8f\xbf\xbf", 4, 0},   //
    {"\xe0\xa0\x80", 3, 3},       // the first that are not
    {"\xf0\x90\x80\x80", 4, 4},   //
    {"\xed\x9f\xbf", 3, 3},       // the last before the surrogates
    {"\xed\xa0\x80", 3, 0},       // the surrogates
    {"\xed\xbf\xbf", 3, 0},       //
    {"\xee\x80\x80", 3, 3},       // the first after
    {"\xf4\x8f\xbf\xbf", 4, 4},   // U+10FFFF
    {"\xf4\x90\x80\x80", 4, 0},   // and past it
    {"\xf5\x80\x80\x80", 4, 0},   //
    {"\xff", 1, 0},               //
    {"ok\xe2\x28\xa1", 5, 2},     // a second byte that does not continue
    {"ok\xe2\x82\x28", 5, 2},     // a third
    {"ok\xf0\x9f\x92\x28", 6, 2}, // a fourth
};

START_TEST(knows_text)
{
    const struct text_case *c = &text_cases[_i];
    ck_assert_uint_eq(wire_text_prefix(c->text, c->bytes), c->prefix);
}
END_TEST

// ---- writing

static const struct wire_response responses[] = {
    {0},
    {.request_id = 1,
     .tokens = 2,
     .groups = 8,
     .output_dim = 1024,
     .output_type = 1,
     .output_bytes = 48,
     .batch_tokens = 2,
     .batch_bucket = 4,
     .batch_requests = 1,
     .queue_ns = 12345,
     .run_ns = 98765,
     .parts = 16},
    {.request_id = UINT64_MAX,
     .tokens = UINT32_MAX,
     .groups = UINT32_MAX,
     .output_dim = UINT32_MAX,
     .output_type = -1,
     .output_bytes = 200,
     .batch_tokens = UINT32_MAX,
     .batch_bucket = UINT32_MAX,
     .batch_requests = UINT32_MAX,
     .queue_ns = UINT64_MAX,
     .run_ns = UINT64_MAX,
     .parts = UINT32_MAX},
    {.request_id = 127, .output_bytes = 1},
    {.request_id = 128, .tokens = 128, .batch_requests = 1},
    {.run_ns = 1},
    {.parts = 1},
};

static void assert_response(const struct wire_response *wrote,
                            const Einsum__V1__EinsumResponse *read, const uint8_t *output)
{
    ck_assert_ptr_nonnull(read);
    ck_assert_uint_eq(read->request_id, wrote->request_id);
    ck_assert_uint_eq(read->tokens, wrote->tokens);
    ck_assert_uint_eq(read->groups, wrote->groups);
    ck_assert_uint_eq(read->output_dim, wrote->output_dim);
    ck_assert_int_eq((int32_t)read->output_type, wrote->output_type);
    ck_assert_ptr_null(read->digest);
    ck_assert_uint_eq(read->output.len, wrote->output_bytes);
    if (read->output.len > 0)
        ck_assert_mem_eq(read->output.data, output, read->output.len);
    bool in_batch = wrote->batch_tokens || wrote->batch_bucket || wrote->batch_requests ||
                    wrote->queue_ns || wrote->run_ns || wrote->parts;
    ck_assert_int_eq(read->batch != NULL, in_batch);
    if (!in_batch)
        return;
    ck_assert_uint_eq(read->batch->tokens, wrote->batch_tokens);
    ck_assert_uint_eq(read->batch->bucket, wrote->batch_bucket);
    ck_assert_uint_eq(read->batch->requests, wrote->batch_requests);
    ck_assert_uint_eq(read->batch->queue_ns, wrote->queue_ns);
    ck_assert_uint_eq(read->batch->run_ns, wrote->run_ns);
    ck_assert_uint_eq(read->batch->parts, wrote->parts);
}

START_TEST(writes_a_response_that_others_read)
{
    const struct wire_response *response = &responses[_i];
    uint8_t bytes[WIRE_RESPONSE_HEAD_BYTES_MAX + 256], output[256];
    for (size_t i = 0; i < sizeof output; i++)
        output[i] = (uint8_t)(255 - i);

    size_t n = wire_write_response_head(response, false, bytes);
    ck_assert_uint_le(n, WIRE_RESPONSE_HEAD_BYTES_MAX);
    memcpy(bytes + n, output, response->output_bytes);
    Einsum__V1__EinsumResponse *unary =
        einsum__v1__einsum_response__unpack(NULL, n + response->output_bytes, bytes);
    assert_response(response, unary, output);
    einsum__v1__einsum_response__free_unpacked(unary, NULL);

    n = wire_write_response_head(response, true, bytes);
    ck_assert_uint_le(n, WIRE_RESPONSE_HEAD_BYTES_MAX);
    memcpy(bytes + n, output, response->output_bytes);
    Einsum__V1__EinsumStreamResponse *streamed =
        einsum__v1__einsum_stream_response__unpack(NULL, n + response->output_bytes, bytes);
    ck_assert_ptr_nonnull(streamed);
    ck_assert_ptr_null(streamed->error);
    assert_response(response, streamed->response, output);
    einsum__v1__einsum_stream_response__free_unpacked(streamed, NULL);
}
END_TEST

// Too large to lay out here: the head alone, with the longest lengths.
START_TEST(writes_the_longest_head)
{
    struct wire_response response = responses[2];
    response.output_bytes = UINT64_MAX / 2;
    uint8_t head[WIRE_RESPONSE_HEAD_BYTES_MAX];
    size_t n = wire_write_response_head(&response, true, head);
    ck_assert_uint_le(n, WIRE_RESPONSE_HEAD_BYTES_MAX);
    static const uint8_t length_varint[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f};
    ck_assert_uint_eq(head[n - 10], 0x12); // the output's tag and length come last
    ck_assert_mem_eq(head + n - 9, length_varint, 9);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("wire");
    TCase *reading = tcase_create("reading");
    tcase_set_timeout(reading, 120);
    tcase_add_test(reading, reads_a_request_however_it_is_cut);
    tcase_add_test(reading, reads_an_empty_message_as_all_unset);
    tcase_add_test(reading, refuses_what_is_cut_short);
    tcase_add_test(reading, agrees_on_mutated_messages);
    tcase_add_loop_test(reading, names_the_fault, 0, (int)ARRAY_LEN(refusals));
    tcase_add_test(reading, takes_text_of_the_longest_length);
    tcase_add_test(reading, skips_what_it_does_not_know);
    tcase_add_test(reading, reads_shared_tensors_as_protobuf_c_writes_them);
    tcase_add_test(reading, takes_the_last_of_a_repeated_field);
    tcase_add_test(reading, cuts_numbers_to_their_type);
    tcase_add_test(reading, merges_a_stream_request_sent_in_pieces);
    tcase_add_test(reading, keeps_what_came_before_the_fault);
    tcase_add_test(reading, refuses_a_stream_request_of_another_type);
    tcase_add_test(reading, reads_an_output_project_request);
    tcase_add_test(reading, the_last_of_both_kinds_counts);
    tcase_add_loop_test(reading, names_the_fault_of_an_output_project_request, 0,
                        (int)ARRAY_LEN(output_project_refusals));
    tcase_add_test(reading, copies_any_range_from_any_cut);
    tcase_add_test_raise_signal(reading, copying_past_the_end_is_a_broken_invariant, SIGABRT);
    suite_add_tcase(suite, reading);
    TCase *text = tcase_create("text");
    tcase_add_loop_test(text, knows_text, 0, (int)ARRAY_LEN(text_cases));
    suite_add_tcase(suite, text);
    TCase *writing = tcase_create("writing");
    tcase_add_loop_test(writing, writes_a_response_that_others_read, 0, (int)ARRAY_LEN(responses));
    tcase_add_test(writing, writes_the_longest_head);
    suite_add_tcase(suite, writing);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
