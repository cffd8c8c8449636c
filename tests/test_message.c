// message.h: what goes through comes out, hostile bytes are refused by name, and memory has a cap.
#include <check.h>
#include <grpc/byte_buffer_reader.h>
#include <stdlib.h>
#include <string.h>

#include "einsum/v1/einsum.pb-c.h"
#include "google/protobuf/descriptor.pb-c.h"
#include "google/rpc/error_details.pb-c.h"
#include "google/rpc/status.pb-c.h"
#include "server/message.h"

// In slices of `piece` bytes.
static grpc_byte_buffer *buffer_of(const void *bytes, size_t n, size_t piece)
{
    size_t slices_n = (n + piece - 1) / piece;
    grpc_slice *slices = calloc(slices_n + 1, sizeof *slices);
    ck_assert_ptr_nonnull(slices);
    for (size_t i = 0; i < slices_n; i++) {
        size_t left = n - i * piece;
        slices[i] = grpc_slice_from_copied_buffer((const char *)bytes + i * piece,
                                                  left < piece ? left : piece);
    }
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(slices, slices_n);
    for (size_t i = 0; i < slices_n; i++)
        grpc_slice_unref(slices[i]);
    free(slices);
    return buffer;
}

static enum status unpack(const ProtobufCMessageDescriptor *descriptor, const void *bytes, size_t n,
                          ProtobufCMessage **message, struct error *err)
{
    grpc_byte_buffer *buffer = buffer_of(bytes, n, 4096);
    enum status status = message_unpack(descriptor, buffer, message, err);
    grpc_byte_buffer_destroy(buffer);
    ck_assert_int_eq(status == STATUS_OK, *message != NULL);
    return status;
}

// ---- there and back

static char names[][16] = {"layers.0", "", "layers.\xc3\xa4"};

START_TEST(what_is_packed_unpacks_the_same)
{
    Einsum__V1__SelfTestResult results[ARRAY_LEN(names)], *results_used[ARRAY_LEN(names)];
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        results[i] = (Einsum__V1__SelfTestResult)EINSUM__V1__SELF_TEST_RESULT__INIT;
        results[i].weight = names[i];
        results[i].worst_error_ratio = 0.25 * (double)i;
        results_used[i] = &results[i];
    }
    Einsum__V1__SelfTestResponse response = EINSUM__V1__SELF_TEST_RESPONSE__INIT;
    response.passed = 1;
    response.n_results = ARRAY_LEN(names);
    response.results = results_used;

    grpc_byte_buffer *buffer = message_pack(&response.base);
    ProtobufCMessage *message;
    ck_assert_int_eq(
        message_unpack(&einsum__v1__self_test_response__descriptor, buffer, &message, NULL),
        STATUS_OK);
    grpc_byte_buffer_destroy(buffer); // the message stands on its own
    const Einsum__V1__SelfTestResponse *read = (const Einsum__V1__SelfTestResponse *)message;
    ck_assert_int_eq(read->passed, 1);
    ck_assert_uint_eq(read->n_results, ARRAY_LEN(names));
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        ck_assert_str_eq(read->results[i]->weight, names[i]);
        ck_assert_double_eq(read->results[i]->worst_error_ratio, 0.25 * (double)i);
    }
    message_free(message);
}
END_TEST

START_TEST(an_empty_message_is_all_unset)
{
    ProtobufCMessage *message;
    ck_assert_int_eq(
        message_unpack(&einsum__v1__load_weights_request__descriptor, NULL, &message, NULL),
        STATUS_OK);
    ck_assert_str_eq(((Einsum__V1__LoadWeightsRequest *)message)->path, "");
    message_free(message);
    ck_assert_int_eq(unpack(&einsum__v1__load_weights_request__descriptor, "", 0, &message, NULL),
                     STATUS_OK);
    ck_assert_str_eq(((Einsum__V1__LoadWeightsRequest *)message)->path, "");
    message_free(message);
    message_free(NULL);
}
END_TEST

static size_t pack_load(uint8_t to[256])
{
    static char path[] = "flash/\xe2\x82\xac", prefix[] = "flash.";
    static char first[] = "*.wo_a.weight", second[] = "mtp.*";
    char *tensors[] = {first, second};
    Einsum__V1__LoadWeightsRequest request = EINSUM__V1__LOAD_WEIGHTS_REQUEST__INIT;
    request.path = path;
    request.n_tensors = 2;
    request.tensors = tensors;
    request.name_prefix = prefix;
    request.tensor_parallel_rank = 300;
    request.replace = 1;
    ck_assert_uint_le(einsum__v1__load_weights_request__get_packed_size(&request), 256);
    return einsum__v1__load_weights_request__pack(&request, to);
}

START_TEST(unpacks_however_the_buffer_is_cut)
{
    uint8_t bytes[256];
    size_t n = pack_load(bytes);
    for (size_t piece = 1; piece <= n; piece++) {
        grpc_byte_buffer *buffer = buffer_of(bytes, n, piece);
        ProtobufCMessage *message;
        ck_assert_int_eq(
            message_unpack(&einsum__v1__load_weights_request__descriptor, buffer, &message, NULL),
            STATUS_OK);
        grpc_byte_buffer_destroy(buffer);
        const Einsum__V1__LoadWeightsRequest *read = (Einsum__V1__LoadWeightsRequest *)message;
        ck_assert_str_eq(read->path, "flash/\xe2\x82\xac");
        ck_assert_uint_eq(read->n_tensors, 2);
        ck_assert_str_eq(read->tensors[1], "mtp.*");
        ck_assert_uint_eq(read->tensor_parallel_rank, 300);
        message_free(message);
    }
}
END_TEST

// ---- hostile

START_TEST(agrees_with_protobuf_c_on_what_is_cut_short)
{
    uint8_t bytes[256];
    size_t n = pack_load(bytes);
    size_t refused = 0;
    for (size_t kept = 0; kept < n; kept++) {
        ProtobufCMessage *message;
        enum status status =
            unpack(&einsum__v1__load_weights_request__descriptor, bytes, kept, &message, NULL);
        Einsum__V1__LoadWeightsRequest *peer =
            einsum__v1__load_weights_request__unpack(NULL, kept, bytes);
        ck_assert_int_eq(status, peer ? STATUS_OK : STATUS_INVALID_ARGUMENT);
        refused += !peer;
        message_free(message);
        if (peer)
            einsum__v1__load_weights_request__free_unpacked(peer, NULL);
    }
    ck_assert_uint_eq(refused, n - 6); // all but the 6 places between fields
}
END_TEST

START_TEST(survives_mutated_messages)
{
    enum { ROUNDS = 5000 };
    uint8_t valid[256], bytes[256];
    size_t n = pack_load(valid);
    unsigned seed = 1;
    int accepted = 0;
    for (int round = 0; round < ROUNDS; round++) {
        memcpy(bytes, valid, n);
        for (int i = rand_r(&seed) % 3; i >= 0; i--)
            bytes[(size_t)rand_r(&seed) % n] ^= (uint8_t)(1 << rand_r(&seed) % 8);
        ProtobufCMessage *message;
        struct error err;
        if (unpack(&einsum__v1__load_weights_request__descriptor, bytes, n, &message, &err))
            ck_assert_int_eq(err.status, STATUS_INVALID_ARGUMENT);
        else
            accepted++;
        message_free(message);
    }
    ck_assert_int_gt(accepted, ROUNDS / 20);
    ck_assert_int_lt(accepted, ROUNDS);
}
END_TEST

static const struct refusal {
    const ProtobufCMessageDescriptor *descriptor;
    const char *bytes;
    size_t bytes_n;
    const char *field;
    const char *text; // a piece of it
} refusals[] = {
#define BYTES(literal) (literal), sizeof(literal) - 1
    {&einsum__v1__get_weight_request__descriptor,
     BYTES("\x0a\x03"
           "a\0b"),
     "name", "NUL in text, at byte 3"},
    {&einsum__v1__get_weight_request__descriptor,
     BYTES("\x0a\x02"
           "a\xff"),
     "name", "not UTF-8, at byte 3"},
    {&einsum__v1__get_weight_request__descriptor,
     BYTES("\x0a\x05"
           "ab"),
     "name", "length that runs past the end"},
    {&einsum__v1__get_weight_request__descriptor, BYTES("\x0b\x0c"), "", "group"},
    {&einsum__v1__get_weight_request__descriptor, BYTES("\x00\x00"), "", "field number"},
    {&einsum__v1__get_weight_request__descriptor, BYTES("\x08\x01"), "",
     "undecodable as einsum.v1.GetWeightRequest"},
    {&einsum__v1__unload_weights_request__descriptor,
     BYTES("\x0a\x01"
           "a\x0a\x01\x80"),
     "names", "not UTF-8, at byte 5"},
    // results[1].weight
    {&einsum__v1__self_test_response__descriptor,
     BYTES("\x12\x03\x0a\x01"
           "a\x12\x03\x0a\x01\xc0"),
     "results.weight", "not UTF-8, at byte 9"},
    // a field of the inner message that runs into the outer one
    {&einsum__v1__self_test_response__descriptor,
     BYTES("\x12\x03\x0a\x02"
           "abc\x08\x01"),
     "results.weight", "length that runs past the end"},
#undef BYTES
};

START_TEST(names_the_fault)
{
    const struct refusal *refusal = &refusals[_i];
    ProtobufCMessage *message;
    struct error err;
    ck_assert_int_eq(unpack(refusal->descriptor, refusal->bytes, refusal->bytes_n, &message, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, refusal->field);
    ck_assert_msg(strstr(err.text, refusal->text), "\"%s\" lacks \"%s\"", err.text, refusal->text);
}
END_TEST

START_TEST(refuses_a_message_over_the_limit)
{
    uint8_t *bytes = malloc(MESSAGE_BYTES_MAX + 1);
    ck_assert_ptr_nonnull(bytes);
    // path, as long as fits: four bytes of tag and length, then 'p'
    size_t n = MESSAGE_BYTES_MAX;
    memset(bytes, 'p', n + 1);
    size_t path_bytes = n - 4;
    memcpy(bytes,
           (uint8_t[]){0x0a, (uint8_t)(path_bytes | 0x80), (uint8_t)(path_bytes >> 7 | 0x80),
                       (uint8_t)(path_bytes >> 14)},
           4);
    ProtobufCMessage *message;
    ck_assert_int_eq(
        unpack(&einsum__v1__load_weights_request__descriptor, bytes, n, &message, NULL), STATUS_OK);
    ck_assert_uint_eq(strlen(((Einsum__V1__LoadWeightsRequest *)message)->path), path_bytes);
    message_free(message);
    struct error err;
    ck_assert_int_eq(
        unpack(&einsum__v1__load_weights_request__descriptor, bytes, n + 1, &message, &err),
        STATUS_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(err.text, "1048577 bytes, at most 1048576"));
    free(bytes);
}
END_TEST

// A run of empty submessages is small on the wire and large in memory.
static enum status unpack_empty_results(size_t results, ProtobufCMessage **message,
                                        struct error *err)
{
    uint8_t *bytes = malloc(2 * results);
    ck_assert_ptr_nonnull(bytes);
    for (size_t i = 0; i < results; i++)
        memcpy(bytes + 2 * i, "\x12\x00", 2);
    enum status status =
        unpack(&einsum__v1__self_test_response__descriptor, bytes, 2 * results, message, err);
    free(bytes);
    return status;
}

START_TEST(caps_what_unpacking_may_take)
{
    ProtobufCMessage *message;
    struct error err;
    ck_assert_int_eq(unpack_empty_results(10000, &message, &err), STATUS_OK);
    ck_assert_uint_eq(((Einsum__V1__SelfTestResponse *)message)->n_results, 10000);
    message_free(message);
    ck_assert_int_eq(unpack_empty_results(MESSAGE_BYTES_MAX / 2, &message, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(err.text, "takes more than 4194304 bytes when unpacked"));
}
END_TEST

// None of our messages holds itself; a descriptor of messages does.
START_TEST(limits_nesting)
{
    enum { DEEP = 40 };
    for (size_t depth = 1; depth <= DEEP; depth++) {
        uint8_t bytes[2 * DEEP];
        size_t n = 0;
        for (size_t left = depth; left-- > 0; n += 2) {
            bytes[n] = 0x1a; // nested_type
            bytes[n + 1] = (uint8_t)(2 * left);
        }
        ProtobufCMessage *message;
        enum status status =
            unpack(&google__protobuf__descriptor_proto__descriptor, bytes, n, &message, NULL);
        ck_assert_int_eq(status, depth <= 16 ? STATUS_OK : STATUS_INVALID_ARGUMENT);
        message_free(message);
    }
}
END_TEST

// ---- error details

static Google__Rpc__Status *details_of(const struct error *err)
{
    grpc_slice slice = message_error_details(err);
    Google__Rpc__Status *status =
        google__rpc__status__unpack(NULL, GRPC_SLICE_LENGTH(slice), GRPC_SLICE_START_PTR(slice));
    ck_assert_ptr_nonnull(status);
    ck_assert_int_eq(status->code, (int)err->status);
    grpc_slice_unref(slice);
    return status;
}

START_TEST(plain_errors_have_no_details)
{
    struct error err;
    error_set(&err, STATUS_NOT_FOUND, "no such weight");
    grpc_slice slice = message_error_details(&err);
    ck_assert_uint_eq(GRPC_SLICE_LENGTH(slice), 0);
    grpc_slice_unref(slice);
}
END_TEST

static void assert_bad_request(const Google__Protobuf__Any *any, const char *field,
                               const char *description)
{
    ck_assert_str_eq(any->type_url, "type.googleapis.com/google.rpc.BadRequest");
    Google__Rpc__BadRequest *bad_request =
        google__rpc__bad_request__unpack(NULL, any->value.len, any->value.data);
    ck_assert_ptr_nonnull(bad_request);
    ck_assert_uint_eq(bad_request->n_field_violations, 1);
    ck_assert_str_eq(bad_request->field_violations[0]->field, field);
    ck_assert_str_eq(bad_request->field_violations[0]->description, description);
    google__rpc__bad_request__free_unpacked(bad_request, NULL);
}

static void assert_retry_info(const Google__Protobuf__Any *any, int64_t seconds, int32_t nanos)
{
    ck_assert_str_eq(any->type_url, "type.googleapis.com/google.rpc.RetryInfo");
    Google__Rpc__RetryInfo *retry_info =
        google__rpc__retry_info__unpack(NULL, any->value.len, any->value.data);
    ck_assert_ptr_nonnull(retry_info);
    ck_assert_int_eq(retry_info->retry_delay->seconds, seconds);
    ck_assert_int_eq(retry_info->retry_delay->nanos, nanos);
    google__rpc__retry_info__free_unpacked(retry_info, NULL);
}

START_TEST(a_field_becomes_a_bad_request)
{
    struct error err;
    error_field(&err, STATUS_INVALID_ARGUMENT, "tokens", "%d, at most 512", 513);
    Google__Rpc__Status *status = details_of(&err);
    ck_assert_str_eq(status->message, "tokens: 513, at most 512");
    ck_assert_uint_eq(status->n_details, 1);
    assert_bad_request(status->details[0], "tokens", "513, at most 512");
    google__rpc__status__free_unpacked(status, NULL);
}
END_TEST

START_TEST(retry_advice_becomes_retry_info)
{
    static const struct {
        int64_t seconds;
        int32_t nanos;
        uint32_t ms;
    } cases[] = {
        {0, 1000000, 1}, {0, 999000000, 999}, {1, 0, 1000}, {4294967, 295000000, UINT32_MAX}};
    struct error err;
    error_set(&err, STATUS_RESOURCE_EXHAUSTED, "the queue is full");
    err.retry_after_ms = cases[_i].ms;
    Google__Rpc__Status *status = details_of(&err);
    ck_assert_uint_eq(status->n_details, 1);
    assert_retry_info(status->details[0], cases[_i].seconds, cases[_i].nanos);
    google__rpc__status__free_unpacked(status, NULL);
}
END_TEST

// The longest of everything, with text that was cut within a character and a field that is no text.
START_TEST(the_longest_error_still_travels)
{
    struct error err = {.status = STATUS_RESOURCE_EXHAUSTED, .retry_after_ms = 10};
    memset(err.field, 'f', sizeof err.field - 1);
    memset(err.text, 't', sizeof err.text - 1);
    memcpy(err.text + sizeof err.text - 3, "\xe2\x82", 2);
    memcpy(err.field + sizeof err.field - 2, "\xff", 1);
    Google__Rpc__Status *status = details_of(&err);
    ck_assert_uint_eq(strlen(status->message), sizeof err.text - 3);
    ck_assert_uint_eq(status->n_details, 2);
    err.field[sizeof err.field - 2] = '\0';
    err.text[sizeof err.text - 3] = '\0';
    assert_bad_request(status->details[0], err.field, err.text);
    assert_retry_info(status->details[1], 0, 10000000);
    google__rpc__status__free_unpacked(status, NULL);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("message");
    TCase *ours = tcase_create("there and back");
    tcase_add_test(ours, what_is_packed_unpacks_the_same);
    tcase_add_test(ours, an_empty_message_is_all_unset);
    tcase_add_test(ours, unpacks_however_the_buffer_is_cut);
    suite_add_tcase(suite, ours);
    TCase *hostile = tcase_create("hostile");
    tcase_set_timeout(hostile, 60);
    tcase_add_test(hostile, agrees_with_protobuf_c_on_what_is_cut_short);
    tcase_add_test(hostile, survives_mutated_messages);
    tcase_add_loop_test(hostile, names_the_fault, 0, (int)ARRAY_LEN(refusals));
    tcase_add_test(hostile, refuses_a_message_over_the_limit);
    tcase_add_test(hostile, caps_what_unpacking_may_take);
    tcase_add_test(hostile, limits_nesting);
    suite_add_tcase(suite, hostile);
    TCase *details = tcase_create("error details");
    tcase_add_test(details, plain_errors_have_no_details);
    tcase_add_test(details, a_field_becomes_a_bad_request);
    tcase_add_loop_test(details, retry_advice_becomes_retry_info, 0, 4);
    tcase_add_test(details, the_longest_error_still_travels);
    suite_add_tcase(suite, details);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
