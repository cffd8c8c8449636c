// The client library: the hot messages against protobuf-c, whole calls against a server in the same
// process, and every kind of server that does not do as it should.

#include "../client/client_wire.h"
#include "fake_server.h"

#include <arpa/inet.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#define LEN(array) (sizeof(array) / sizeof((array)[0]))

enum { TOKENS = 5, A_BYTES = TOKENS * FAKE_GROUPS * FAKE_REDUCED_DIM, S_BYTES = 40 };

static uint8_t activations[A_BYTES], scales[S_BYTES];

static void fill_tensors_once(void)
{
    for (size_t i = 0; i < sizeof activations; i++)
        activations[i] = (uint8_t)(i * 13 + 5);
    for (size_t i = 0; i < sizeof scales; i++)
        scales[i] = (uint8_t)(i * 29 + 1);
}

static void fill_tensors(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_tensors_once);
}

static struct einsum_client_request a_request(void *output, uint64_t output_bytes)
{
    fill_tensors();
    return (struct einsum_client_request){
        .request_id = 77,
        .weight = "layers.3.attn.wo_a",
        .recipe = EINSUM_CLIENT_RECIPE_1_128_128,
        .activation_layout = EINSUM_CLIENT_ACTIVATIONS_TGR,
        .scale_layout = EINSUM_CLIENT_SCALES_TGK,
        .scale_type = EINSUM_CLIENT_SCALE_FP32,
        .output_type = EINSUM_CLIENT_OUTPUT_BF16,
        .tokens = TOKENS,
        .activations = activations,
        .activations_bytes = A_BYTES,
        .scales = scales,
        .scales_bytes = S_BYTES,
        .output = output,
        .output_bytes = output_bytes,
    };
}

// With the same bytes as attention and positions, so that the answer is the same.
static struct einsum_client_request a_projection(void *output, uint64_t output_bytes)
{
    fill_tensors();
    return (struct einsum_client_request){
        .operation = EINSUM_CLIENT_OUTPUT_PROJECT,
        .request_id = 77,
        .weight = "layers.3.attn.wo_a",
        .output_type = EINSUM_CLIENT_OUTPUT_BF16,
        .tokens = TOKENS,
        .attention = activations,
        .attention_bytes = A_BYTES,
        .positions = (const int64_t *)(const void *)scales,
        .positions_bytes = S_BYTES,
        .output = output,
        .output_bytes = output_bytes,
    };
}

enum { OUT_BYTES = TOKENS * FAKE_GROUPS * FAKE_OUTPUT_DIM * 2 };

static void check_output(const uint8_t *output)
{
    uint32_t sum = fake_sum(scales, S_BYTES, fake_sum(activations, A_BYTES, 1));
    for (size_t i = 0; i < OUT_BYTES; i++)
        ck_assert_uint_eq(output[i], fake_output_byte(sum, i));
}

static struct einsum_client *connect_to(const struct fake *fake,
                                        const struct einsum_client_options *options)
{
    char endpoint[64];
    snprintf(endpoint, sizeof endpoint, "127.0.0.1:%d", fake->port);
    struct einsum_client *client;
    struct einsum_client_error error;
    ck_assert_msg(einsum_client_create(endpoint, options, &client, &error) == EINSUM_CLIENT_OK,
                  "%s", error.text);
    return client;
}

// ---- the wire -----------------------------------------------------------------------------------

static size_t write_message(const struct einsum_client_request *request, bool streamed,
                            uint8_t *message)
{
    struct einsum_client_frame frame;
    static const struct einsum_client_sums sums = {.given = true, .first = 0xe3069283};
    einsum_client_frame_write(&frame, request, 1234567890123456789u, streamed, NULL, &sums);
    uint8_t *to = message;
    memcpy(to, frame.head, frame.head_bytes);
    to += frame.head_bytes;
    const struct einsum_client_tensors tensors = einsum_client_tensors_of(request);
    memcpy(to, tensors.first.data, tensors.first.bytes);
    to += tensors.first.bytes;
    memcpy(to, frame.tail, frame.tail_bytes);
    to += frame.tail_bytes;
    memcpy(to, tensors.second.data, tensors.second.bytes);
    to += tensors.second.bytes;
    ck_assert_uint_eq((uint64_t)(to - message), frame.message_bytes);
    return (size_t)(to - message);
}

static void check_request(const Einsum__V1__EinsumRequest *got,
                          const struct einsum_client_request *sent)
{
    ck_assert_ptr_nonnull(got);
    ck_assert_uint_eq(got->request_id, 1234567890123456789u);
    ck_assert_str_eq(got->weight, sent->weight);
    ck_assert_str_eq(got->equation, "bhr,hdr->bhd");
    ck_assert_str_eq(got->kernel, sent->kernel ? sent->kernel : "");
    ck_assert_int_eq((int)got->priority, (int)sent->priority);
    ck_assert_int_eq((int)got->recipe, (int)sent->recipe);
    ck_assert_int_eq((int)got->activation_layout, (int)sent->activation_layout);
    ck_assert_int_eq((int)got->scale_layout, (int)sent->scale_layout);
    ck_assert_int_eq((int)got->scale_type, (int)sent->scale_type);
    ck_assert_int_eq((int)got->output_type, (int)sent->output_type);
    ck_assert_uint_eq(got->tokens, sent->tokens);
    ck_assert_uint_eq(got->activations_crc32c->value, 0xe3069283);
    ck_assert_uint_eq(got->activation_scales_crc32c->value, 0);
    ck_assert(got->output_crc32c);
    ck_assert_uint_eq(got->group_begin, sent->group_begin);
    ck_assert_uint_eq(got->group_end, sent->group_end);
    ck_assert_int_eq(got->digest_only, sent->digest_only);
    ck_assert_uint_eq(got->activations.len, sent->activations_bytes);
    ck_assert_uint_eq(got->activation_scales.len, sent->scales_bytes);
    if (sent->activations_bytes)
        ck_assert_mem_eq(got->activations.data, sent->activations, sent->activations_bytes);
    if (sent->scales_bytes)
        ck_assert_mem_eq(got->activation_scales.data, sent->scales, sent->scales_bytes);
}

// What is written is what protobuf-c reads, for all layouts of the tail and lengths of the strings.
START_TEST(test_frame)
{
    static char long_name[EINSUM_CLIENT_WEIGHT_BYTES_MAX + 1];
    memset(long_name, 'w', EINSUM_CLIENT_WEIGHT_BYTES_MAX);
    struct einsum_client_request request = a_request(NULL, 0);
    request.activation_layout = EINSUM_CLIENT_ACTIVATIONS_GTR;
    request.group_begin = _i & 1 ? 3 : 0;
    request.group_end = 300;
    request.digest_only = _i & 2;
    request.activations_bytes = _i & 4 ? 0 : A_BYTES;
    request.scales_bytes = _i & 8 ? 0 : S_BYTES;
    request.weight = _i & 16 ? long_name : "w";
    static char long_kernel[EINSUM_CLIENT_KERNEL_BYTES];
    memset(long_kernel, 'k', sizeof long_kernel - 1);
    request.kernel = _i & 16 ? long_kernel : _i & 1 ? "decode" : NULL;
    request.priority = (enum einsum_client_priority)(_i % 4);
    uint8_t message[A_BYTES + S_BYTES + 1024];

    size_t bytes = write_message(&request, false, message);
    Einsum__V1__EinsumRequest *plain = einsum__v1__einsum_request__unpack(NULL, bytes, message);
    check_request(plain, &request);
    einsum__v1__einsum_request__free_unpacked(plain, NULL);

    bytes = write_message(&request, true, message);
    Einsum__V1__EinsumStreamRequest *wrapped =
        einsum__v1__einsum_stream_request__unpack(NULL, bytes, message);
    ck_assert_ptr_nonnull(wrapped);
    ck_assert_int_eq(wrapped->kind_case, EINSUM__V1__EINSUM_STREAM_REQUEST__KIND_REQUEST);
    check_request(wrapped->request, &request);
    einsum__v1__einsum_stream_request__free_unpacked(wrapped, NULL);
}
END_TEST

static void check_projection(const Einsum__V1__OutputProjectRequest *got,
                             const struct einsum_client_request *sent)
{
    ck_assert_ptr_nonnull(got);
    ck_assert_uint_eq(got->request_id, 1234567890123456789u);
    ck_assert_str_eq(got->weight, sent->weight);
    ck_assert_str_eq(got->kernel, sent->kernel ? sent->kernel : "");
    ck_assert_int_eq((int)got->priority, (int)sent->priority);
    ck_assert_int_eq((int)got->output_type, (int)sent->output_type);
    ck_assert_uint_eq(got->tokens, sent->tokens);
    ck_assert_uint_eq(got->group_begin, sent->group_begin);
    ck_assert_uint_eq(got->group_end, sent->group_end);
    ck_assert_int_eq(got->digest_only, sent->digest_only);
    ck_assert_uint_eq(got->attention.len, sent->attention_bytes);
    ck_assert_uint_eq(got->positions.len, sent->positions_bytes);
    if (sent->attention_bytes)
        ck_assert_mem_eq(got->attention.data, sent->attention, sent->attention_bytes);
    if (sent->positions_bytes)
        ck_assert_mem_eq(got->positions.data, sent->positions, sent->positions_bytes);
}

START_TEST(test_frame_of_a_projection)
{
    struct einsum_client_request request = a_projection(NULL, 0);
    request.group_begin = _i & 1 ? 3 : 0;
    request.group_end = 300;
    request.digest_only = _i & 2;
    request.attention_bytes = _i & 4 ? 0 : A_BYTES;
    request.positions_bytes = _i & 8 ? 0 : S_BYTES;
    request.kernel = _i & 16 ? "decode" : NULL;
    request.priority = (enum einsum_client_priority)(_i % 4);
    request.equation = "not sent"; // nor are these
    request.recipe = EINSUM_CLIENT_RECIPE_1_1_32;
    uint8_t message[A_BYTES + S_BYTES + 1024];

    size_t bytes = write_message(&request, false, message);
    Einsum__V1__OutputProjectRequest *plain =
        einsum__v1__output_project_request__unpack(NULL, bytes, message);
    check_projection(plain, &request);
    ck_assert_uint_eq(plain->base.n_unknown_fields, 0);
    einsum__v1__output_project_request__free_unpacked(plain, NULL);

    bytes = write_message(&request, true, message);
    Einsum__V1__EinsumStreamRequest *wrapped =
        einsum__v1__einsum_stream_request__unpack(NULL, bytes, message);
    ck_assert_ptr_nonnull(wrapped);
    ck_assert_int_eq(wrapped->kind_case, EINSUM__V1__EINSUM_STREAM_REQUEST__KIND_OUTPUT_PROJECT);
    check_projection(wrapped->output_project, &request);
    einsum__v1__einsum_stream_request__free_unpacked(wrapped, NULL);
}
END_TEST

static size_t pack_stream_response(uint8_t *packed)
{
    Einsum__V1__EinsumResponse response = EINSUM__V1__EINSUM_RESPONSE__INIT;
    Einsum__V1__Digest digest = EINSUM__V1__DIGEST__INIT;
    Einsum__V1__BatchInfo batch = EINSUM__V1__BATCH_INFO__INIT;
    Einsum__V1__Error error = EINSUM__V1__ERROR__INIT;
    Einsum__V1__EinsumStreamResponse wrapped = EINSUM__V1__EINSUM_STREAM_RESPONSE__INIT;
    float head[10] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    response.request_id = UINT64_MAX;
    response.output.data = activations;
    response.output.len = 300;
    response.tokens = 3;
    response.groups = 5;
    response.output_dim = 10;
    response.output_type = EINSUM__V1__OUTPUT_TYPE__OUTPUT_TYPE_BF16;
    digest.crc32 = 0xdeadbeef;
    digest.nan_elements = 4;
    digest.sum = -1e300;
    digest.abs_max = 2.5;
    digest.head = head;
    digest.n_head = 10;
    response.digest = &digest;
    batch.tokens = 9;
    batch.bucket = 16;
    batch.requests = 2;
    batch.queue_ns = 1ull << 40;
    batch.run_ns = 5;
    batch.parts = 3;
    response.batch = &batch;
    error.code = 8;
    error.message = (char *)"queue full";
    error.field = (char *)"tokens";
    error.retry_after_ms = 40;
    wrapped.response = &response;
    wrapped.error = &error;
    return einsum__v1__einsum_stream_response__pack(&wrapped, packed);
}

static void check_reply(const struct einsum_client_reply *reply)
{
    ck_assert_uint_eq(reply->response.request_id, UINT64_MAX);
    ck_assert_uint_eq(reply->response.output_bytes, 300);
    ck_assert_uint_eq(reply->response.output_dim, 10);
    ck_assert_uint_eq(reply->response.digest.crc32, 0xdeadbeef);
    ck_assert_uint_eq(reply->response.digest.nan_elements, 4);
    ck_assert_double_eq(reply->response.digest.sum, -1e300);
    ck_assert_uint_eq(reply->response.digest.head_n, 8);
    ck_assert_float_eq(reply->response.digest.head[7], 8);
    ck_assert_uint_eq(reply->response.batch_bucket, 16);
    ck_assert_uint_eq(reply->response.queue_ns, 1ull << 40);
    ck_assert_uint_eq(reply->response.run_ns, 5);
    ck_assert_uint_eq(reply->response.parts, 3);
    ck_assert(reply->has_error);
    ck_assert_int_eq(reply->error_code, 8);
    ck_assert_str_eq(reply->error_text, "queue full");
    ck_assert_str_eq(reply->error_field, "tokens");
    ck_assert_uint_eq(reply->error_retry_after_ms, 40);
    uint8_t output[301];
    ck_assert_uint_eq(einsum_client_reader_copy(reply->output, output, sizeof output), 300);
    ck_assert_mem_eq(output, activations, 300);
}

// A reply reads the same however its bytes are spread over slices.
START_TEST(test_reply_in_pieces)
{
    fill_tensors();
    uint8_t packed[1024];
    size_t bytes = pack_stream_response(packed);
    for (size_t piece = 1; piece < bytes; piece++) {
        struct einsum_client_chunk chunks[2048];
        size_t n = 0;
        for (size_t at = 0; at < bytes; at += piece) {
            chunks[n++] = (struct einsum_client_chunk){packed + at, 0}; // an empty one in between
            size_t left = bytes - at;
            chunks[n++] = (struct einsum_client_chunk){packed + at, left < piece ? left : piece};
        }
        struct einsum_client_reply reply;
        ck_assert(einsum_client_reply_read(chunks, n, true, &reply));
        check_reply(&reply);
    }
}
END_TEST

// A message that ends too early is broken wherever it is cut, but for the place between its two
// fields; and no byte past the cut is read (each cut lies in memory of its own, for ASan).
START_TEST(test_reply_cut)
{
    fill_tensors();
    uint8_t packed[1024];
    size_t bytes = pack_stream_response(packed);
    size_t sound = 0;
    for (size_t cut = 1; cut < bytes; cut++) {
        uint8_t *copy = malloc(cut);
        memcpy(copy, packed, cut);
        struct einsum_client_chunk chunk = {copy, cut};
        struct einsum_client_reply reply;
        sound += einsum_client_reply_read(&chunk, 1, true, &reply);
        free(copy);
    }
    ck_assert_uint_eq(sound, 1);
}
END_TEST

// Flipped bytes: any verdict, but no read outside, and an output that lies within the message.
START_TEST(test_reply_garbled)
{
    fill_tensors();
    uint8_t packed[1024];
    size_t bytes = pack_stream_response(packed);
    uint64_t random = 88172645463325252u;
    for (int round = 0; round < 50000; round++) {
        uint8_t *copy = malloc(bytes);
        memcpy(copy, packed, bytes);
        for (int flips = 0; flips < 3; flips++) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            copy[random % bytes] = (uint8_t)(random >> 32);
        }
        struct einsum_client_chunk chunk = {copy, bytes};
        struct einsum_client_reply reply;
        if (einsum_client_reply_read(&chunk, 1, true, &reply)) {
            uint8_t output[1024];
            uint64_t copied = einsum_client_reader_copy(reply.output, output, sizeof output);
            ck_assert_uint_eq(copied, reply.response.output_bytes);
        }
        free(copy);
    }
}
END_TEST

static const struct {
    const char *from, *to;
} texts[] = {
    {"plain", "plain"},
    {"a\nb\x1b[31m", "a?b?[31m"},
    {"gr\xc3\xb6\xc3\x9f", "gr\xc3\xb6\xc3\x9f"},
    {"\xff\xc3", "??"},
    {"\xc0\xaf", "??"},
    {"\xed\xa0\x80", "???"},
    {"\xc2\x9b", "??"},
    {"\xf0\x9f\x99\x82", "\xf0\x9f\x99\x82"},
    {"\x7f", "?"},
};

START_TEST(test_clean_text)
{
    char to[64];
    einsum_client_clean_text(to, sizeof to, texts[_i].from, strlen(texts[_i].from));
    ck_assert_str_eq(to, texts[_i].to);
    // Cut, it never ends within a character.
    for (size_t size = 1; size < sizeof to; size++) {
        einsum_client_clean_text(to, size, texts[_i].to, strlen(texts[_i].to));
        ck_assert_uint_lt(strlen(to), size);
        char again[64];
        einsum_client_clean_text(again, sizeof again, to, strlen(to));
        ck_assert_str_eq(again, to);
    }
}
END_TEST

// ---- creating -----------------------------------------------------------------------------------

static const struct {
    const char *endpoint;
    bool good;
} endpoints[] = {
    {"127.0.0.1:50061", true},
    {"localhost:1", true},
    {"[::1]:50061", true},
    {"unix:/tmp/x", true},
    {NULL, false},
    {"", false},
    {"localhost", false},
    {"localhost:", false},
    {"localhost:0", false},
    {"localhost:65536", false},
    {"localhost:50x", false},
    {":50061", false},
    {"::1:50061", false},
    {"[::1]50061", false},
    {"unix:relative", false},
    {"unix:/", false},
    {"dns:///a:1", false},
    {"http://a:1", false},
    {"localhost:+1", false},
    {"localhost: 1", false},
};

START_TEST(test_endpoint)
{
    struct einsum_client *client;
    struct einsum_client_error error;
    enum einsum_client_status status =
        einsum_client_create(endpoints[_i].endpoint, NULL, &client, &error);
    if (endpoints[_i].good) {
        ck_assert_int_eq((int)status, EINSUM_CLIENT_OK);
    } else {
        ck_assert_int_eq((int)status, EINSUM_CLIENT_INVALID_ARGUMENT);
        ck_assert_ptr_nonnull(strstr(error.text, "endpoint"));
    }
    einsum_client_destroy(client);
}
END_TEST

START_TEST(test_options)
{
    struct einsum_client *client;
    struct einsum_client_error error;
    struct einsum_client_options options;
    for (int field = 0; field < 6; field++) {
        einsum_client_options_init(&options);
        const char *name = "deadline_ms";
        if (field == 0)
            options.deadline_ms = 0;
        else if (field == 1)
            options.connections = 0, name = "connections";
        else if (field == 2)
            options.receive_bytes_max = 1ull << 31, name = "receive_bytes_max";
        else if (field == 3)
            options.send_bytes_max = 0, name = "send_bytes_max";
        else if (field == 4)
            options.attempts_max = 0, name = "attempts_max";
        else
            options.retry_pause_ms_max = 1, name = "retry_pause_ms_max";
        ck_assert_int_eq((int)einsum_client_create("h:1", &options, &client, &error),
                         EINSUM_CLIENT_INVALID_ARGUMENT);
        ck_assert_ptr_nonnull(strstr(error.text, name));
        ck_assert_ptr_null(client);
    }
}
END_TEST

// ---- one call -----------------------------------------------------------------------------------

static const struct fake_act answer = {.kind = FAKE_ANSWER};

START_TEST(test_blocking)
{
    struct fake fake;
    fake_start(&fake, &answer, 1);
    struct einsum_client *client = connect_to(&fake, NULL);
    uint8_t output[OUT_BYTES + 8];
    memset(output, 0xee, sizeof output);
    struct einsum_client_request request = a_request(output, sizeof output);
    struct einsum_client_response response;
    struct einsum_client_error error;
    for (int round = 0; round < 20; round++) {
        ck_assert_msg(einsum_client_einsum(client, &request, &response, &error) == 0, "%s",
                      error.text);
        check_output(output);
        ck_assert_uint_eq(output[OUT_BYTES], 0xee);
    }
    ck_assert_uint_eq(response.request_id, 77);
    ck_assert_uint_eq(response.tokens, TOKENS);
    ck_assert_uint_eq(response.groups, FAKE_GROUPS);
    ck_assert_uint_eq(response.output_dim, FAKE_OUTPUT_DIM);
    ck_assert_uint_eq(response.output_bytes, OUT_BYTES);
    ck_assert_uint_eq(response.batch_tokens, TOKENS + 1);
    ck_assert_uint_eq(response.batch_bucket, 512);
    ck_assert_uint_eq(response.batch_requests, 3);
    ck_assert_uint_eq(response.run_ns, 2000);
    ck_assert_uint_eq(response.attempts, 1);
    ck_assert_uint_gt(response.latency_ns, 0);
    ck_assert(!response.has_digest);

    request.digest_only = true;
    request.output = NULL;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error), 0);
    ck_assert(response.has_digest);
    ck_assert_uint_eq(response.digest.crc32,
                      fake_sum(scales, S_BYTES, fake_sum(activations, A_BYTES, 1)));
    ck_assert_float_eq(response.digest.head[1], -2.25f);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

START_TEST(test_blocking_projection)
{
    struct fake fake;
    fake_start(&fake, &answer, 1);
    struct einsum_client *client = connect_to(&fake, NULL);
    uint8_t output[OUT_BYTES];
    struct einsum_client_request request = a_projection(output, sizeof output);
    struct einsum_client_response response;
    struct einsum_client_error error;
    ck_assert_msg(einsum_client_einsum(client, &request, &response, &error) == 0, "%s", error.text);
    check_output(output);
    ck_assert_str_eq(fake.method, "/einsum.v1.Einsum/OutputProject");
    ck_assert_uint_eq(response.request_id, 77);

    request.positions = NULL;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_INVALID_ARGUMENT);
    ck_assert_str_eq(error.field, "positions");
    request.operation = (enum einsum_client_operation)2;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_INVALID_ARGUMENT);
    ck_assert_str_eq(error.field, "operation");
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

START_TEST(test_caller_mistakes)
{
    struct fake fake;
    fake_start(&fake, &answer, 1);
    struct einsum_client_options options;
    einsum_client_options_init(&options);
    options.send_bytes_max = 1000;
    struct einsum_client *client = connect_to(&fake, NULL);
    struct einsum_client *small = connect_to(&fake, &options);
    uint8_t output[OUT_BYTES];
    const struct einsum_client_request good = a_request(output, sizeof output);
    struct einsum_client_request request = good;
    struct einsum_client_response response;
    struct einsum_client_error error;

    request.output_bytes = OUT_BYTES - 1;
    memset(output, 0xee, sizeof output);
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_INVALID_ARGUMENT);
    ck_assert_str_eq(error.text, "output: holds 2559 bytes, the reply has 2560");
    ck_assert_uint_eq(output[0], 0xee);

    request = good;
    request.output = NULL;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_INVALID_ARGUMENT);
    request = good;
    request.weight = NULL;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_INVALID_ARGUMENT);
    ck_assert_str_eq(error.field, "weight");
    request = good;
    request.scales = NULL;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_INVALID_ARGUMENT);
    ck_assert_str_eq(error.field, "activation_scales");
    char long_equation[80];
    memset(long_equation, 'b', sizeof long_equation - 1);
    long_equation[sizeof long_equation - 1] = '\0';
    request = good;
    request.equation = long_equation;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, NULL),
                     EINSUM_CLIENT_INVALID_ARGUMENT);

    request = good;
    ck_assert_int_eq((int)einsum_client_einsum(small, &request, &response, &error),
                     EINSUM_CLIENT_RESOURCE_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(error.text, "send_bytes_max"));
    request.activations_bytes = UINT64_MAX - 100;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_RESOURCE_EXHAUSTED);
    ck_assert_uint_eq(atomic_load(&fake.calls), 1);
    einsum_client_destroy(small);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

// ---- asynchronous -------------------------------------------------------------------------------

struct tally {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t good, bad;
    struct einsum_client_error error; // the last
    uint64_t chunk_bytes;
    uint8_t output[OUT_BYTES];
    struct einsum_client *client;
    enum einsum_client_status nested;
};

static void tally_init(struct tally *tally)
{
    memset(tally, 0, sizeof *tally);
    pthread_mutex_init(&tally->lock, NULL);
    pthread_cond_init(&tally->changed, NULL);
}

static void on_tally(void *context, const struct einsum_client_response *response,
                     const struct einsum_client_error *error)
{
    struct tally *tally = context;
    pthread_mutex_lock(&tally->lock);
    if (response) {
        tally->good++;
        tally->chunk_bytes = 0;
        for (size_t i = 0; i < response->chunks_n; i++) {
            memcpy(tally->output + tally->chunk_bytes, response->chunks[i].data,
                   response->chunks[i].bytes);
            tally->chunk_bytes += response->chunks[i].bytes;
        }
    } else {
        tally->bad++;
        tally->error = *error;
    }
    if (tally->client) {
        struct einsum_client_info info;
        tally->nested = einsum_client_server_info(tally->client, &info, NULL);
    }
    pthread_cond_broadcast(&tally->changed);
    pthread_mutex_unlock(&tally->lock);
}

static void tally_wait(struct tally *tally, uint32_t n)
{
    pthread_mutex_lock(&tally->lock);
    while (tally->good + tally->bad < n)
        pthread_cond_wait(&tally->changed, &tally->lock);
    pthread_mutex_unlock(&tally->lock);
}

START_TEST(test_chunks)
{
    struct fake fake;
    fake_start(&fake, &answer, 1);
    struct einsum_client *client = connect_to(&fake, NULL);
    struct tally tally;
    tally_init(&tally);
    tally.client = client;
    struct einsum_client_request request = a_request(NULL, 0);
    ck_assert_int_eq((int)einsum_client_start(client, &request, on_tally, &tally, NULL, NULL), 0);
    tally_wait(&tally, 1);
    ck_assert_uint_eq(tally.good, 1);
    ck_assert_uint_eq(tally.chunk_bytes, OUT_BYTES);
    check_output(tally.output);
    // A blocking call within a callback is refused and does not hang.
    ck_assert_int_eq((int)tally.nested, EINSUM_CLIENT_FAILED_PRECONDITION);
    request.tokens = 0;
    request.activations_bytes = request.scales_bytes = 0;
    ck_assert_int_eq((int)einsum_client_start(client, &request, on_tally, &tally, NULL, NULL), 0);
    tally_wait(&tally, 2);
    ck_assert_uint_eq(tally.good, 2);
    ck_assert_uint_eq(tally.chunk_bytes, 0);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

enum { CALLERS = 3, CALLS_EACH = 60 };

static void *call_many(void *context)
{
    struct einsum_client *client = context;
    static _Thread_local uint8_t outputs[CALLS_EACH][OUT_BYTES];
    struct tally tally;
    tally_init(&tally);
    for (int i = 0; i < CALLS_EACH; i++) {
        struct einsum_client_request request = a_request(outputs[i], OUT_BYTES);
        if (einsum_client_start(client, &request, on_tally, &tally, NULL, NULL) != 0)
            return "start failed";
    }
    tally_wait(&tally, CALLS_EACH);
    return tally.good == CALLS_EACH ? NULL : "not all were answered";
}

START_TEST(test_many_threads)
{
    fill_tensors();
    struct fake fake;
    fake_start(&fake, &answer, 1);
    struct einsum_client_options options;
    einsum_client_options_init(&options);
    options.connections = 2;
    struct einsum_client *client = connect_to(&fake, &options);
    pthread_t threads[CALLERS];
    for (int i = 0; i < CALLERS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, call_many, client), 0);
    for (int i = 0; i < CALLERS; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        ck_assert_msg(!failed, "%s", (char *)failed);
    }
    ck_assert_uint_eq(atomic_load(&fake.calls), CALLERS * CALLS_EACH);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

START_TEST(test_cancel)
{
    static const struct fake_act acts[] = {
        {.kind = FAKE_HANG},
        {.kind = FAKE_STATUS, .status = 8, .text = "full", .pushback = "20000"},
    };
    struct fake fake;
    fake_start(&fake, acts, 2);
    struct einsum_client *client = connect_to(&fake, NULL);
    struct tally tally;
    tally_init(&tally);
    struct einsum_client_request request = a_request(NULL, 0);
    uint64_t ticket;
    uint64_t start_ms = fake_now_ms();
    for (uint32_t round = 1; round <= 2; round++) { // in the attempt; in the pause before the next
        ck_assert_int_eq(
            (int)einsum_client_start(client, &request, on_tally, &tally, &ticket, NULL), 0);
        while (atomic_load(&fake.calls) < round)
            usleep(1000);
        usleep(30000);
        einsum_client_cancel(client, ticket);
        tally_wait(&tally, round);
        ck_assert_int_eq((int)tally.error.status, EINSUM_CLIENT_CANCELLED);
        einsum_client_cancel(client, ticket); // of a call that has ended: nothing
    }
    ck_assert_uint_lt(fake_now_ms() - start_ms, 10000);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

// Destroying a client cancels what is in flight and calls each back first.
START_TEST(test_destroy_in_flight)
{
    static const struct fake_act hang = {.kind = FAKE_HANG};
    struct fake fake;
    fake_start(&fake, &hang, 1);
    struct einsum_client *client = connect_to(&fake, NULL);
    struct tally tally;
    tally_init(&tally);
    struct einsum_client_request request = a_request(NULL, 0);
    for (int i = 0; i < 10; i++)
        ck_assert_int_eq((int)einsum_client_start(client, &request, on_tally, &tally, NULL, NULL),
                         0);
    einsum_client_destroy(client);
    ck_assert_uint_eq(tally.bad, 10);
    ck_assert_int_eq((int)tally.error.status, EINSUM_CLIENT_CANCELLED);
    fake_stop(&fake);
}
END_TEST

// ---- retries ------------------------------------------------------------------------------------

// google.rpc.Status with BadRequest of field "tokens".
static const char field_details[] = "\x08\x03\x1a\x37"
                                    "\x0a\x29type.googleapis.com/google.rpc.BadRequest"
                                    "\x12\x0a\x0a\x08\x0a\x06tokens";

#define REFUSE(code) .kind = FAKE_STATUS, .status = (code), .text = "refused"
#define DETAILS(array) .details = (array), .details_bytes = sizeof(array) - 1

static const struct {
    struct fake_act first;
    uint32_t deadline_ms, attempts_max;
    int status; // in the end
    uint32_t calls;
    uint32_t ms_min, ms_max;
    int64_t advice;
    const char *field;
} retries[] = {
    {{REFUSE(8), .pushback = "60"}, 5000, 4, 0, 2, 60, 3000, 0, ""},
    {{REFUSE(14), .pushback = "0"}, 5000, 4, 0, 2, 0, 3000, 0, ""},
    {{REFUSE(14)}, 5000, 4, 0, 2, 10, 3000, 0, ""},
    {{REFUSE(8), .pushback = "-1"}, 5000, 4, 8, 1, 0, 1000, -1, ""},
    {{REFUSE(8), .pushback = "soon"}, 5000, 4, 8, 1, 0, 1000, -1, ""},
    {{REFUSE(8), .pushback = "99999999999999999999"}, 5000, 4, 8, 1, 0, 1000, -1, ""},
    {{REFUSE(8), .pushback = "4000"}, 3000, 4, 8, 1, 0, 2000, 4000, ""},
    {{REFUSE(8)}, 5000, 1, 8, 1, 0, 1000, 0, ""},
    {{REFUSE(5)}, 5000, 4, 5, 1, 0, 1000, 0, ""},
    {{REFUSE(3), DETAILS(field_details)}, 5000, 4, 3, 1, 0, 1000, 0, "tokens"},
    {{REFUSE(13), .pushback = "10"}, 5000, 4, 13, 1, 0, 1000, 10, ""},
};

START_TEST(test_retry)
{
    struct fake_act acts[] = {retries[_i].first, answer};
    struct fake fake;
    fake_start(&fake, acts, 2);
    struct einsum_client_options options;
    einsum_client_options_init(&options);
    options.attempts_max = retries[_i].attempts_max;
    struct einsum_client *client = connect_to(&fake, &options);
    uint8_t output[OUT_BYTES];
    struct einsum_client_request request = a_request(output, sizeof output);
    request.deadline_ms = retries[_i].deadline_ms;
    struct einsum_client_response response;
    struct einsum_client_error error;
    uint64_t start_ms = fake_now_ms();
    int status = (int)einsum_client_einsum(client, &request, &response, &error);
    uint64_t took_ms = fake_now_ms() - start_ms;
    ck_assert_int_eq(status, retries[_i].status);
    ck_assert_uint_eq(atomic_load(&fake.calls), retries[_i].calls);
    ck_assert_uint_ge(took_ms, retries[_i].ms_min);
    ck_assert_uint_le(took_ms, retries[_i].ms_max);
    if (status == 0) {
        ck_assert_uint_eq(response.attempts, retries[_i].calls);
        check_output(output);
    } else {
        ck_assert(error.from_server);
        ck_assert_str_eq(error.text, "refused");
        ck_assert_int_eq(error.retry_after_ms, retries[_i].advice);
        ck_assert_str_eq(error.field, retries[_i].field);
        ck_assert_uint_eq(error.attempts, retries[_i].calls);
    }
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

// RetryInfo alone is honoured as well; and always refused, a call ends after attempts_max.
START_TEST(test_retry_info_and_end)
{
    const char details[] = "\x08\x08\x1a\x33"
                           "\x0a\x28type.googleapis.com/google.rpc.RetryInfo"
                           "\x12\x07\x0a\x05\x10\x80\xb4\x89\x13"; // 40000000 ns
    const struct fake_act act = {REFUSE(8), DETAILS(details)};
    struct fake fake;
    fake_start(&fake, &act, 1);
    struct einsum_client_options options;
    einsum_client_options_init(&options);
    options.attempts_max = 3;
    struct einsum_client *client = connect_to(&fake, &options);
    uint8_t output[OUT_BYTES];
    struct einsum_client_request request = a_request(output, sizeof output);
    struct einsum_client_response response;
    struct einsum_client_error error;
    uint64_t start_ms = fake_now_ms();
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error), 8);
    ck_assert_int_eq(error.retry_after_ms, 40);
    ck_assert_uint_eq(error.attempts, 3);
    ck_assert_uint_eq(atomic_load(&fake.calls), 3);
    ck_assert_uint_ge(fake_now_ms() - start_ms, 80);
    einsum_client_destroy(client);
    fake_stop(&fake);
    // Cut short at any place, such details give no advice, or this one; and read no byte too many.
    for (size_t cut = 0; cut < sizeof details - 1; cut++) {
        char *copy = malloc(cut + 1);
        memcpy(copy, details, cut);
        int64_t ms = 0;
        char field[EINSUM_CLIENT_FIELD_BYTES] = "";
        einsum_client_details_read(copy, cut, &ms, field);
        ck_assert(ms == 0);
        free(copy);
    }
}
END_TEST

START_TEST(test_deadline)
{
    static const struct fake_act hang = {.kind = FAKE_HANG};
    struct fake fake;
    fake_start(&fake, &hang, 1);
    struct einsum_client_options options;
    einsum_client_options_init(&options);
    options.deadline_ms = 150;
    struct einsum_client *client = connect_to(&fake, &options);
    uint8_t output[OUT_BYTES];
    struct einsum_client_request request = a_request(output, sizeof output);
    struct einsum_client_response response;
    struct einsum_client_error error;
    uint64_t start_ms = fake_now_ms();
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_DEADLINE_EXCEEDED);
    uint64_t took_ms = fake_now_ms() - start_ms;
    ck_assert_uint_ge(took_ms, 140);
    ck_assert_uint_le(took_ms, 3000);
    ck_assert(!error.from_server);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

START_TEST(test_unreachable)
{
    struct einsum_client *client;
    struct einsum_client_error error;
    ck_assert_int_eq((int)einsum_client_create(_i ? "unix:/nowhere/at/all" : "127.0.0.1:1", NULL,
                                               &client, &error),
                     0);
    uint8_t output[OUT_BYTES];
    struct einsum_client_request request = a_request(output, sizeof output);
    struct einsum_client_response response;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_UNAVAILABLE);
    ck_assert(!error.from_server);
    ck_assert_ptr_nonnull(strstr(error.text, "cannot reach"));
    ck_assert_uint_eq(error.attempts, 4);
    einsum_client_destroy(client);
}
END_TEST

// By time in place of attempts: until somebody listens, or the time is over; and never what is tried
// once.
START_TEST(test_retry_by_time)
{
    struct einsum_client_options options;
    einsum_client_options_init(&options);
    options.retry_ms = 600;
    struct einsum_client *client;
    struct einsum_client_error error;
    ck_assert_int_eq((int)einsum_client_create("127.0.0.1:1", &options, &client, &error), 0);
    uint8_t output[OUT_BYTES];
    struct einsum_client_request request = a_request(output, sizeof output);
    struct einsum_client_response response;
    uint64_t start_ms = fake_now_ms();
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_UNAVAILABLE);
    ck_assert_uint_gt(error.attempts, 4);
    ck_assert_uint_ge(fake_now_ms() - start_ms, 200); // the last pause doubles what was before
    ck_assert_uint_le(fake_now_ms() - start_ms, 3000);
    request.deadline_ms = 100; // sooner than that
    ck_assert_int_ne((int)einsum_client_einsum(client, &request, &response, &error), 0);
    ck_assert_uint_le(fake_now_ms() - start_ms, 4000);
    einsum_client_destroy(client);

    const struct fake_act refuse = {REFUSE(14), .pushback = "5"};
    struct fake_act acts[21];
    for (size_t i = 0; i < 20; i++)
        acts[i] = refuse;
    acts[20] = answer;
    struct fake fake;
    fake_start(&fake, acts, 21);
    options.retry_ms = 10000;
    client = connect_to(&fake, &options);
    request = a_request(output, sizeof output);
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error), 0);
    ck_assert_uint_eq(response.attempts, 21);
    check_output(output);
    einsum_client_destroy(client);
    fake_stop(&fake);

    fake_start(&fake, &refuse, 1);
    options.attempts_max = 1;
    client = connect_to(&fake, &options);
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error), 14);
    ck_assert_uint_eq(error.attempts, 1);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

START_TEST(test_receive_limit)
{
    struct fake fake;
    fake_start(&fake, &answer, 1);
    struct einsum_client_options options;
    einsum_client_options_init(&options);
    options.receive_bytes_max = 64;
    struct einsum_client *client = connect_to(&fake, &options);
    uint8_t output[OUT_BYTES];
    struct einsum_client_request request = a_request(output, sizeof output);
    struct einsum_client_response response;
    struct einsum_client_error error;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_RESOURCE_EXHAUSTED);
    ck_assert(!error.from_server);
    ck_assert_ptr_nonnull(strstr(error.text, "receive_bytes_max"));
    ck_assert_ptr_nonnull(strstr(error.text, "grpc.max_receive_message_length"));
    ck_assert_uint_eq(error.attempts, 1);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

// A server that freezes while it receives a large request: gRPC holds the caller's memory until the
// connection breaks, which it does after stall_ms.
START_TEST(test_frozen_server)
{
    int pipe_fds[2];
    ck_assert_int_eq(pipe(pipe_fds), 0);
    pid_t child = fork(); // before gRPC's first use in this process
    if (child == 0) {
        static const struct fake_act hang = {.kind = FAKE_HANG};
        struct fake fake;
        fake_start(&fake, &hang, 1);
        if (write(pipe_fds[1], &fake.port, sizeof fake.port) < 0)
            _exit(1);
        for (;;)
            pause();
    }
    struct fake fake = {0};
    ck_assert_int_eq((int)read(pipe_fds[0], &fake.port, sizeof fake.port), (int)sizeof fake.port);
    struct einsum_client_options options;
    einsum_client_options_init(&options);
    options.stall_ms = 1000;
    struct einsum_client *client = connect_to(&fake, &options);
    struct einsum_client_response response;
    struct einsum_client_error error;
    uint8_t output[OUT_BYTES];
    struct einsum_client_request request = a_request(output, sizeof output);
    request.deadline_ms = 100; // makes the connection
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_DEADLINE_EXCEEDED);
    kill(child, SIGSTOP);
    size_t bytes = 64 << 20;
    uint8_t *large = calloc(1, bytes);
    request.activations = large;
    request.activations_bytes = bytes;
    request.deadline_ms = 300;
    uint64_t start_ms = fake_now_ms();
    int status = (int)einsum_client_einsum(client, &request, &response, &error);
    uint64_t took_ms = fake_now_ms() - start_ms;
    free(large);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    ck_assert_int_eq(status, EINSUM_CLIENT_DEADLINE_EXCEEDED);
    ck_assert_uint_ge(took_ms, 290);
    ck_assert_uint_le(took_ms, 20000);
    einsum_client_destroy(client);
}
END_TEST

// ---- hostile replies ----------------------------------------------------------------------------

#define BYTES(text) .bytes = (text), .bytes_n = sizeof(text) - 1

// Field 2 of N bytes, then tokens 5, groups 2, D 4, type 1 unless they are the thing that is wrong.
static const struct {
    struct fake_act act;
    int status;
    const char *text;
} hostile[] = {
    {{.kind = FAKE_NOTHING}, 13, "sent no reply"},
    {{.kind = FAKE_BYTES, BYTES("\x12")}, 13, "no EinsumResponse"},
    {{.kind = FAKE_BYTES, BYTES("\x12\x50zz")}, 13, "no EinsumResponse"},
    {{.kind = FAKE_BYTES, BYTES("\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")},
     13,
     "no EinsumResponse"},
    {{.kind = FAKE_BYTES, BYTES("\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")},
     13,
     "no EinsumResponse"},
    {{.kind = FAKE_BYTES, BYTES("\x13\x14")}, 13, "no EinsumResponse"}, // groups
    {{.kind = FAKE_BYTES, BYTES("\x00\x00")}, 13, "no EinsumResponse"}, // field 0
    {{.kind = FAKE_BYTES, BYTES("\x10\x05")}, 13, "no EinsumResponse"}, // output as a number
    {{.kind = FAKE_BYTES, BYTES("\x42\x02\x12\x01")}, 13, "no EinsumResponse"}, // in the batch
    {{.kind = FAKE_BYTES, BYTES("\x18\x06\x20\x02\x28\x04\x30\x01")}, 13, "6 tokens"},
    {{.kind = FAKE_BYTES, BYTES("\x18\x05\x20\x02\x28\x04\x30\x02")}, 13, "output type 2"},
    {{.kind = FAKE_BYTES, BYTES("\x18\x05\x20\x02\x28\x04\x30\x01")}, 13, "holds 0 bytes"},
    {{.kind = FAKE_BYTES, BYTES("\x12\x02zz\x18\x05\x20\x02\x28\x04\x30\x01")},
     13,
     "holds 2 bytes"},
    // 5 * 2^31 * 2^31 * 2 is 5 * 2^63, which is 2^63 in 64 bits and 0 with one more factor of 2.
    {{.kind = FAKE_BYTES,
      BYTES("\x18\x05\x20\x80\x80\x80\x80\x08\x28\x80\x80\x80\x80\x08\x30\x01")},
     13,
     "holds 0 bytes"},
    {{.kind = FAKE_SEND_MANY, BYTES("\x18\x05"), .status = 13, .text = "a\nb"}, 13, "a?b"},
};

START_TEST(test_hostile_reply)
{
    struct fake fake;
    fake_start(&fake, &hostile[_i].act, 1);
    struct einsum_client *client = connect_to(&fake, NULL);
    uint8_t output[OUT_BYTES];
    struct einsum_client_request request = a_request(output, sizeof output);
    struct einsum_client_response response;
    struct einsum_client_error error;
    ck_assert_int_eq((int)einsum_client_einsum(client, &request, &response, &error),
                     hostile[_i].status);
    ck_assert_msg(strstr(error.text, hostile[_i].text), "%s", error.text);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

// ---- streams ------------------------------------------------------------------------------------

struct flight {
    struct tally *tally;
    struct einsum_client_stream *stream;
    uint64_t id;
    bool again; // submit once more from the callback
    uint8_t output[OUT_BYTES];
};

static void on_flight(void *context, const struct einsum_client_response *response,
                      const struct einsum_client_error *error)
{
    struct flight *flight = context;
    if (response && response->request_id != flight->id)
        flight->tally->nested = EINSUM_CLIENT_INTERNAL;
    if (flight->again) {
        flight->again = false;
        struct einsum_client_request request = a_request(flight->output, OUT_BYTES);
        request.request_id = flight->id;
        flight->tally->nested =
            einsum_client_stream_submit(flight->stream, &request, on_flight, flight, NULL);
    }
    on_tally(flight->tally, response, error);
}

enum { FLIGHTS = 100 };

START_TEST(test_stream)
{
    fill_tensors();
    const struct fake_act act = {.kind = FAKE_STREAM_REVERSE, .batch = 4};
    struct fake fake;
    fake_start(&fake, &act, 1);
    struct einsum_client *client = connect_to(&fake, NULL);
    struct einsum_client_stream *stream;
    struct einsum_client_error error;
    ck_assert_int_eq((int)einsum_client_stream_open(client, 8, 0, &stream, &error), 0);
    struct tally tally;
    tally_init(&tally);
    static struct flight flights[FLIGHTS];
    for (uint32_t i = 0; i < FLIGHTS; i++) {
        flights[i] = (struct flight){.tally = &tally, .id = 1000 + i};
        struct einsum_client_request request = i % 3 ? a_request(flights[i].output, OUT_BYTES)
                                                     : a_projection(flights[i].output, OUT_BYTES);
        request.request_id = flights[i].id;
        ck_assert_int_eq(
            (int)einsum_client_stream_submit(stream, &request, on_flight, &flights[i], &error), 0);
    }
    ck_assert_int_eq((int)einsum_client_stream_finish(stream, &error), 0);
    ck_assert_uint_eq(tally.good, FLIGHTS);
    ck_assert_int_eq((int)tally.nested, 0);
    for (uint32_t i = 0; i < FLIGHTS; i++)
        check_output(flights[i].output);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

// The place of a request is free again in its own callback, also with a window of 1.
START_TEST(test_stream_resubmit)
{
    fill_tensors();
    const struct fake_act act = {.kind = FAKE_STREAM_REVERSE};
    struct fake fake;
    fake_start(&fake, &act, 1);
    struct einsum_client *client = connect_to(&fake, NULL);
    struct einsum_client_stream *stream;
    ck_assert_int_eq((int)einsum_client_stream_open(client, 1, 0, &stream, NULL), 0);
    struct tally tally;
    tally_init(&tally);
    struct flight flight = {.tally = &tally, .stream = stream, .id = 3, .again = true};
    struct einsum_client_request request = a_request(flight.output, OUT_BYTES);
    request.request_id = 3;
    ck_assert_int_eq((int)einsum_client_stream_submit(stream, &request, on_flight, &flight, NULL),
                     0);
    tally_wait(&tally, 2);
    ck_assert_uint_eq(tally.good, 2);
    ck_assert_int_eq((int)tally.nested, 0);
    // A request that cannot be sent is refused at once, and leaves its place free.
    request.weight = "";
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(
            (int)einsum_client_stream_submit(stream, &request, on_flight, &flight, NULL),
            EINSUM_CLIENT_INVALID_ARGUMENT);
    ck_assert_int_eq((int)einsum_client_stream_finish(stream, NULL), 0);
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

static const struct {
    struct fake_act act;
    int status; // of the stream
    uint32_t good, bad;
    int last; // of the last failed request
    const char *text;
} stream_faults[] = {
    {{.kind = FAKE_STREAM_REFUSE}, 0, 3, 3, 8, "full"},
    {{.kind = FAKE_STREAM_UNKNOWN}, 13, 0, 6, 13, "not in flight"},
    {{.kind = FAKE_STREAM_QUIT, .status = 14, .text = "draining"}, 14, 0, 6, 14, "draining"},
    {{.kind = FAKE_STREAM_QUIT}, 0, 0, 6, 13, "without an answer"},
    {{.kind = FAKE_STREAM_BYTES, BYTES("\x0a\x7f")}, 13, 0, 6, 13, "no EinsumStreamResponse"},
    {{.kind = FAKE_STREAM_BYTES, BYTES("")}, 13, 0, 6, 13, "no digest"},
};

START_TEST(test_stream_faults)
{
    fill_tensors();
    struct fake fake;
    fake_start(&fake, &stream_faults[_i].act, 1);
    struct einsum_client *client = connect_to(&fake, NULL);
    struct einsum_client_stream *stream;
    ck_assert_int_eq((int)einsum_client_stream_open(client, 6, 0, &stream, NULL), 0);
    struct tally tally;
    tally_init(&tally);
    uint8_t output[6][OUT_BYTES];
    uint32_t submitted = 0;
    for (int i = 0; i < 6; i++) {
        struct einsum_client_request request = a_request(output[i], OUT_BYTES);
        submitted += einsum_client_stream_submit(stream, &request, on_tally, &tally, NULL) == 0;
    }
    struct einsum_client_error error = {0};
    ck_assert_int_eq((int)einsum_client_stream_finish(stream, &error), stream_faults[_i].status);
    // A stream that ends fast refuses the rest; what was taken was called back.
    ck_assert_uint_ge(submitted, 1);
    ck_assert_uint_eq(tally.good + tally.bad, submitted);
    ck_assert_uint_eq(tally.good, stream_faults[_i].good);
    ck_assert_int_eq((int)tally.error.status, stream_faults[_i].last);
    if (stream_faults[_i].act.bytes_n != 0 || !stream_faults[_i].act.bytes)
        ck_assert_msg(strstr(tally.error.text, stream_faults[_i].text), "%s", tally.error.text);
    if (tally.error.status == EINSUM_CLIENT_RESOURCE_EXHAUSTED) {
        ck_assert_int_eq(tally.error.retry_after_ms, 7);
        ck_assert_str_eq(tally.error.field, "tokens");
        ck_assert(tally.error.from_server);
    }
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

START_TEST(test_stream_cancel_and_deadline)
{
    fill_tensors();
    const struct fake_act act = {.kind = FAKE_STREAM_REVERSE, .batch = 60}; // holds back
    struct fake fake;
    fake_start(&fake, &act, 1);
    struct einsum_client *client = connect_to(&fake, NULL);
    for (int round = 0; round < 2; round++) {
        struct einsum_client_stream *stream;
        ck_assert_int_eq((int)einsum_client_stream_open(client, 6, round ? 100 : 0, &stream, NULL),
                         0);
        struct tally tally;
        tally_init(&tally);
        struct einsum_client_request request = a_request(NULL, 0);
        for (int i = 0; i < 3; i++)
            ck_assert_int_eq(
                (int)einsum_client_stream_submit(stream, &request, on_tally, &tally, NULL), 0);
        if (round == 0)
            einsum_client_stream_cancel(stream);
        tally_wait(&tally, 3);
        int status = round ? EINSUM_CLIENT_DEADLINE_EXCEEDED : EINSUM_CLIENT_CANCELLED;
        ck_assert_int_eq((int)tally.error.status, status);
        ck_assert_int_eq((int)einsum_client_stream_submit(stream, &request, on_tally, &tally, NULL),
                         status);
        einsum_client_stream_cancel(stream);
        ck_assert_int_eq((int)einsum_client_stream_finish(stream, NULL), status);
    }
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

START_TEST(test_stream_unreachable)
{
    struct einsum_client *client;
    struct einsum_client_stream *stream;
    struct tally tally;
    tally_init(&tally);
    ck_assert_int_eq((int)einsum_client_create("127.0.0.1:1", NULL, &client, NULL), 0);
    ck_assert_int_eq((int)einsum_client_stream_open(client, 0, 0, &stream, NULL),
                     EINSUM_CLIENT_INVALID_ARGUMENT);
    ck_assert_int_eq((int)einsum_client_stream_open(client, 2, 0, &stream, NULL), 0);
    struct einsum_client_request request = a_request(NULL, 0);
    enum einsum_client_status submitted =
        einsum_client_stream_submit(stream, &request, on_tally, &tally, NULL);
    struct einsum_client_error error;
    ck_assert_int_eq((int)einsum_client_stream_finish(stream, &error), EINSUM_CLIENT_UNAVAILABLE);
    ck_assert_uint_eq(tally.bad, submitted == EINSUM_CLIENT_OK);
    ck_assert(!error.from_server);
    einsum_client_destroy(client);
}
END_TEST

// ---- control calls ------------------------------------------------------------------------------

static size_t pack_to(const ProtobufCMessage *message, uint8_t *to)
{
    return protobuf_c_message_pack(message, to);
}

static struct fake_act canned(const ProtobufCMessage *message, uint8_t *to, uint32_t times)
{
    return (struct fake_act){
        .kind = FAKE_SEND_MANY, .bytes = to, .bytes_n = pack_to(message, to), .batch = times};
}

static void count_name(void *context, const char *name)
{
    ck_assert_str_eq(name, "a?b");
    ++*(int *)context;
}

static void count_result(void *context, const struct einsum_client_selftest_result *result)
{
    ck_assert_str_eq(result->weight, "layers.0.attn.wo_a");
    ck_assert(!result->passed);
    ck_assert_double_eq(result->worst_error_ratio, 1.5);
    ++*(int *)context;
}

static void expect_two_weights(const struct einsum_client_weights *got)
{
    ck_assert_uint_eq(got->items_n, 2);
    ck_assert_str_eq(got->items[1].name, "layers.0.attn.wo_a");
    ck_assert_uint_eq(got->items[1].recipes_n, 2);
    ck_assert_int_eq((int)got->items[1].recipes[1], EINSUM_CLIENT_RECIPE_1_1_128);
    ck_assert_uint_eq(got->items[0].resident_bytes, 1ull << 33);
    ck_assert(got->items[0].has_rope);
    ck_assert_double_eq(got->items[0].rope.theta, 160000);
    ck_assert_uint_eq(got->items[0].rope.positions_max, 1 << 20);
    ck_assert_str_eq(got->items[0].rope.cache, "a?b");
}

START_TEST(test_control)
{
    Einsum__V1__Weight weight = EINSUM__V1__WEIGHT__INIT;
    Einsum__V1__Recipe recipes[2] = {1, 2};
    weight.name = (char *)"layers.0.attn.wo_a";
    weight.groups = 8;
    weight.recipes = recipes;
    weight.n_recipes = 2;
    weight.resident_bytes = 1ull << 33;
    Einsum__V1__Rope rope = EINSUM__V1__ROPE__INIT;
    rope.theta = 160000;
    rope.positions_max = 1 << 20;
    rope.cache = (char *)"a\nb";
    weight.rope = &rope;
    Einsum__V1__Weight *weights[2] = {&weight, &weight};
    Einsum__V1__ListWeightsResponse list = EINSUM__V1__LIST_WEIGHTS_RESPONSE__INIT;
    list.weights = weights;
    list.n_weights = 2;
    Einsum__V1__UnloadWeightsResponse unload = EINSUM__V1__UNLOAD_WEIGHTS_RESPONSE__INIT;
    char *names[1] = {(char *)"a\nb"};
    unload.names = names;
    unload.n_names = 1;
    Einsum__V1__SelfTestResponse selftest = EINSUM__V1__SELF_TEST_RESPONSE__INIT;
    Einsum__V1__SelfTestResult result = EINSUM__V1__SELF_TEST_RESULT__INIT;
    result.weight = (char *)"layers.0.attn.wo_a";
    result.worst_error_ratio = 1.5;
    Einsum__V1__SelfTestResult *results[1] = {&result};
    selftest.results = results;
    selftest.n_results = 1;
    uint8_t bytes[3][4096];
    const struct fake_act acts[] = {
        canned(&list.base, bytes[0], 1),
        canned(&unload.base, bytes[1], 1),
        canned(&selftest.base, bytes[2], 1),
        {.kind = FAKE_BYTES, BYTES("\x08\x02")}, // health: NOT_SERVING
        {.kind = FAKE_BYTES, BYTES("")},         // GetWeight without a weight
    };
    struct fake fake;
    fake_start(&fake, acts, LEN(acts));
    struct einsum_client *client = connect_to(&fake, NULL);
    struct einsum_client_error error;

    struct einsum_client_weights got;
    ck_assert_int_eq((int)einsum_client_list_weights(client, &got, &error), 0);
    expect_two_weights(&got);
    einsum_client_weights_deinit(&got);

    int count = 0;
    const char *wanted[1] = {"*"};
    ck_assert_int_eq((int)einsum_client_unload(client, wanted, 1, count_name, &count, &error), 0);
    ck_assert_int_eq(count, 1);
    bool passed = true;
    ck_assert_int_eq(
        (int)einsum_client_self_test(client, NULL, NULL, &passed, count_result, &count, &error), 0);
    ck_assert_int_eq(count, 2);
    ck_assert(!passed);
    enum einsum_client_health health;
    ck_assert_int_eq((int)einsum_client_check_health(client, "x", &health, &error), 0);
    ck_assert_int_eq((int)health, EINSUM_CLIENT_HEALTH_NOT_SERVING);
    struct einsum_client_weight one;
    ck_assert_int_eq((int)einsum_client_get_weight(client, "x", &one, &error),
                     EINSUM_CLIENT_INTERNAL);
    ck_assert_str_eq(fake.method, "/einsum.v1.Einsum/GetWeight");
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

START_TEST(test_server_info)
{
    Einsum__V1__ServerInfoResponse info_message = EINSUM__V1__SERVER_INFO_RESPONSE__INIT;
    Einsum__V1__Limits limits = EINSUM__V1__LIMITS__INIT;
    limits.reply_bytes_max = 1ull << 35;
    limits.cut_bytes_max = 1ull << 36;
    info_message.engine = (char *)"cpu";
    info_message.limits = &limits;
    uint32_t buckets[100] = {1, 2, 4};
    info_message.buckets = buckets;
    info_message.n_buckets = 100;
    Einsum__V1__Counters counters = EINSUM__V1__COUNTERS__INIT;
    uint64_t bucket_batches[100] = {7, 0, 9};
    counters.kernel_ns = 1ull << 40;
    counters.graph_replays = 16;
    counters.bucket_batches = bucket_batches;
    counters.n_bucket_batches = 100;
    info_message.counters = &counters;
    Einsum__V1__Memory memory = EINSUM__V1__MEMORY__INIT;
    Einsum__V1__BucketGraphs graphs = EINSUM__V1__BUCKET_GRAPHS__INIT;
    Einsum__V1__BucketGraphs *graph_pointers[100];
    graphs.bucket = 8;
    graphs.graphs = 6;
    graphs.device_bytes = 1ull << 34;
    for (size_t i = 0; i < LEN(graph_pointers); i++)
        graph_pointers[i] = &graphs;
    memory.graphs = graph_pointers;
    memory.n_graphs = LEN(graph_pointers);
    memory.lanes_bytes = 5;
    memory.graphs_bytes = 1ull << 36;
    info_message.memory = &memory;
    char *kernels[2] = {(char *)"avx2", (char *)"a\nb"};
    info_message.kernels = kernels;
    info_message.n_kernels = LEN(kernels);
    uint8_t bytes[4096];
    const struct fake_act acts[] = {canned(&info_message.base, bytes, 1)};
    struct fake fake;
    fake_start(&fake, acts, LEN(acts));
    struct einsum_client *client = connect_to(&fake, NULL);
    struct einsum_client_error error;
    struct einsum_client_info info;
    ck_assert_int_eq((int)einsum_client_server_info(client, &info, &error), 0);
    ck_assert_str_eq(info.engine, "cpu");
    ck_assert_uint_eq(info.limits.reply_bytes_max, 1ull << 35);
    ck_assert_uint_eq(info.limits.cut_bytes_max, 1ull << 36);
    ck_assert_uint_eq(info.buckets_n, EINSUM_CLIENT_BUCKETS_MAX);
    ck_assert_uint_eq(info.counters.kernel_ns, 1ull << 40);
    ck_assert_uint_eq(info.counters.graph_replays, 16);
    ck_assert_uint_eq(info.counters.bucket_batches[0], 7);
    ck_assert_uint_eq(info.counters.bucket_batches[2], 9);
    ck_assert_uint_eq(info.memory.lanes_bytes, 5);
    ck_assert_uint_eq(info.memory.graphs_bytes, 1ull << 36);
    ck_assert_uint_eq(info.memory.graphs_n, EINSUM_CLIENT_BUCKETS_MAX);
    ck_assert_uint_eq(info.memory.graphs[1].bucket, 8);
    ck_assert_uint_eq(info.memory.graphs[1].graphs, 6);
    ck_assert_uint_eq(info.memory.graphs[1].device_bytes, 1ull << 34);
    ck_assert_uint_eq(info.kernels_n, 2);
    ck_assert_str_eq(info.kernels[0], "avx2");
    ck_assert_str_eq(info.kernels[1], "a?b");
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

// Empty submessages swell when unpacked: such a reply is refused under the cap, with nothing left
// over.
START_TEST(test_control_swell)
{
    size_t n = 8 << 20;
    uint8_t *bytes = malloc(n);
    for (size_t i = 0; i < n; i += 2)
        bytes[i] = 0x0a, bytes[i + 1] = 0;
    const struct fake_act act = {.kind = FAKE_BYTES, .bytes = bytes, .bytes_n = n};
    struct fake fake;
    fake_start(&fake, &act, 1);
    struct einsum_client *client = connect_to(&fake, NULL);
    struct einsum_client_error error;
    struct einsum_client_weights got;
    ck_assert_int_eq((int)einsum_client_list_weights(client, &got, &error), EINSUM_CLIENT_INTERNAL);
    ck_assert_ptr_null(got.items);
    einsum_client_destroy(client);
    fake_stop(&fake);
    free(bytes);
}
END_TEST

struct load_watch {
    uint32_t reports;
    bool give_up;
};

static bool on_load_progress(void *context, const struct einsum_client_progress *progress)
{
    struct load_watch *watch = context;
    watch->reports++;
    return progress->weights_total == 3 && !watch->give_up;
}

START_TEST(test_load)
{
    Einsum__V1__Weight weight = EINSUM__V1__WEIGHT__INIT;
    weight.name = (char *)"w";
    Einsum__V1__Weight *weights[1] = {&weight};
    Einsum__V1__LoadWeightsResponse progress = EINSUM__V1__LOAD_WEIGHTS_RESPONSE__INIT;
    progress.weights_done = 1;
    progress.weights_total = 3;
    progress.weights = weights;
    progress.n_weights = 1;
    uint8_t bytes[1024];
    struct fake_act refused = canned(&progress.base, bytes, 2);
    refused.status = 9;
    refused.text = "no such file";
    const struct fake_act acts[] = {
        canned(&progress.base, bytes, 5),        canned(&progress.base, bytes, 5), refused,
        {.kind = FAKE_BYTES, BYTES("\x2a\x05")}, {.kind = FAKE_NOTHING},
    };
    const int statuses[] = {0, EINSUM_CLIENT_CANCELLED, EINSUM_CLIENT_FAILED_PRECONDITION,
                            EINSUM_CLIENT_INTERNAL, EINSUM_CLIENT_INTERNAL};
    const uint32_t reports[] = {5, 1, 2, 0, 0};
    struct fake fake;
    fake_start(&fake, acts, LEN(acts));
    struct einsum_client *client = connect_to(&fake, NULL);
    for (size_t i = 0; i < LEN(acts); i++) {
        struct load_watch watch = {.give_up = i == 1};
        struct einsum_client_load load = {
            .path = "x", .on_progress = on_load_progress, .context = &watch};
        struct einsum_client_weights got;
        struct einsum_client_error error;
        ck_assert_int_eq((int)einsum_client_load(client, &load, &got, &error), statuses[i]);
        ck_assert_uint_eq(watch.reports, reports[i]);
        ck_assert_uint_eq(got.items_n, i == 0);
        einsum_client_weights_deinit(&got);
    }
    einsum_client_destroy(client);
    fake_stop(&fake);
}
END_TEST

static TCase *add_case(Suite *suite, const char *name)
{
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 60);
    suite_add_tcase(suite, tcase);
    return tcase;
}

int main(void)
{
    Suite *suite = suite_create("client");
    TCase *wire = add_case(suite, "wire");
    tcase_add_loop_test(wire, test_frame, 0, 32);
    tcase_add_loop_test(wire, test_frame_of_a_projection, 0, 32);
    tcase_add_test(wire, test_reply_in_pieces);
    tcase_add_test(wire, test_reply_cut);
    tcase_add_test(wire, test_reply_garbled);
    tcase_add_loop_test(wire, test_clean_text, 0, (int)LEN(texts));
    TCase *call = add_case(suite, "call");
    tcase_add_loop_test(call, test_endpoint, 0, (int)LEN(endpoints));
    tcase_add_test(call, test_options);
    tcase_add_test(call, test_blocking);
    tcase_add_test(call, test_blocking_projection);
    tcase_add_test(call, test_caller_mistakes);
    tcase_add_test(call, test_chunks);
    tcase_add_test(call, test_many_threads);
    tcase_add_test(call, test_cancel);
    tcase_add_test(call, test_destroy_in_flight);
    tcase_add_loop_test(call, test_retry, 0, (int)LEN(retries));
    tcase_add_test(call, test_retry_info_and_end);
    tcase_add_test(call, test_retry_by_time);
    tcase_add_test(call, test_deadline);
    tcase_add_loop_test(call, test_unreachable, 0, 2);
    tcase_add_test(call, test_receive_limit);
    tcase_add_test(call, test_frozen_server);
    tcase_add_loop_test(call, test_hostile_reply, 0, (int)LEN(hostile));
    TCase *stream = add_case(suite, "stream");
    tcase_add_test(stream, test_stream);
    tcase_add_test(stream, test_stream_resubmit);
    tcase_add_loop_test(stream, test_stream_faults, 0, (int)LEN(stream_faults));
    tcase_add_test(stream, test_stream_cancel_and_deadline);
    tcase_add_test(stream, test_stream_unreachable);
    TCase *control = add_case(suite, "control");
    tcase_add_test(control, test_control);
    tcase_add_test(control, test_server_info);
    tcase_add_test(control, test_control_swell);
    tcase_add_test(control, test_load);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
