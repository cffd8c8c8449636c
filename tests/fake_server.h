// A gRPC server in the test's own process that says what a test tells it to: right answers, wrong
// ones, none. One thread, one call at a time; further calls wait in gRPC.
//
//     fake_start -> fake_script (what each call gets, the last entry again and again) -> fake_stop
#pragma once

#include <einsum/v1/einsum.pb-c.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/time.h>
#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { FAKE_GROUPS = 2, FAKE_OUTPUT_DIM = 128, FAKE_REDUCED_DIM = 128, FAKE_BLOCKS = 1 };

enum fake_kind {
    FAKE_ANSWER,         // the right output, see fake_output_byte
    FAKE_BYTES,          // `bytes` as the reply, whatever they are
    FAKE_NOTHING,        // OK without a reply
    FAKE_STATUS,         // `status`, with the trailers that are set
    FAKE_HANG,           // no answer until the call is cancelled
    FAKE_STREAM_REVERSE, // of a stream: answers in reverse, `batch` at a time
    FAKE_STREAM_REFUSE,  // of a stream: an error for each odd request
    FAKE_STREAM_UNKNOWN, // of a stream: answers an id that was never sent
    FAKE_STREAM_QUIT,    // of a stream: reads one request, then ends with `status`
    FAKE_STREAM_BYTES,   // of a stream: reads one request, then sends `bytes`
    FAKE_SEND_MANY,      // sends `bytes` `batch` times, then `status`
};

struct fake_act {
    enum fake_kind kind;
    int status;
    const char *text;
    const char *pushback; // grpc-retry-pushback-ms
    const void *details;  // grpc-status-details-bin
    size_t details_bytes;
    const void *bytes;
    size_t bytes_n;
    uint32_t batch;
};

struct fake {
    grpc_server *server;
    grpc_completion_queue *queue;
    pthread_t thread;
    int port;
    const struct fake_act *script;
    size_t script_n;
    _Atomic uint32_t calls; // that have come
    _Atomic bool stopping;
    char method[128]; // of the last call
};

static inline uint64_t fake_now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

// What output byte `i` of an answer to these tensors is: it depends on all that was sent, so that a
// byte lost on the way shows.
static inline uint8_t fake_output_byte(uint32_t sum, size_t i)
{
    return (uint8_t)(sum * 31 + i * 7);
}

static inline uint32_t fake_sum(const void *data, size_t bytes, uint32_t sum)
{
    for (size_t i = 0; i < bytes; i++)
        sum = sum * 16777619u + ((const uint8_t *)data)[i];
    return sum;
}

// ---- the server's thread ------------------------------------------------------------------------

static inline bool fake_next(struct fake *fake, void *wanted)
{
    for (;;) {
        grpc_event event =
            grpc_completion_queue_next(fake->queue, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        if (event.type != GRPC_OP_COMPLETE)
            return false;
        if (event.tag == wanted)
            return event.success != 0;
    }
}

static inline bool fake_batch(struct fake *fake, grpc_call *call, const grpc_op *ops, size_t n)
{
    int tag;
    return grpc_call_start_batch(call, ops, n, &tag, NULL) == GRPC_CALL_OK && fake_next(fake, &tag);
}

static inline grpc_byte_buffer *fake_receive(struct fake *fake, grpc_call *call)
{
    grpc_byte_buffer *message = NULL;
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &message};
    fake_batch(fake, call, &op, 1);
    return message;
}

static inline grpc_slice fake_flatten(grpc_byte_buffer *buffer)
{
    grpc_byte_buffer_reader reader;
    grpc_byte_buffer_reader_init(&reader, buffer);
    grpc_slice flat = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(buffer);
    return flat;
}

static inline bool fake_send(struct fake *fake, grpc_call *call, const void *bytes, size_t n)
{
    grpc_slice slice = grpc_slice_from_copied_buffer(bytes, n);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_op op = {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = buffer};
    bool sent = fake_batch(fake, call, &op, 1);
    grpc_byte_buffer_destroy(buffer);
    grpc_slice_unref(slice);
    return sent;
}

static inline void fake_end(struct fake *fake, grpc_call *call, const struct fake_act *act,
                            int status)
{
    grpc_metadata trailers[2];
    size_t trailers_n = 0;
    memset(trailers, 0, sizeof trailers);
    if (act->pushback) {
        trailers[trailers_n].key = grpc_slice_from_static_string("grpc-retry-pushback-ms");
        trailers[trailers_n++].value = grpc_slice_from_copied_string(act->pushback);
    }
    if (act->details) {
        trailers[trailers_n].key = grpc_slice_from_static_string("grpc-status-details-bin");
        trailers[trailers_n++].value =
            grpc_slice_from_copied_buffer(act->details, act->details_bytes);
    }
    grpc_slice text = grpc_slice_from_copied_string(act->text ? act->text : "");
    int cancelled;
    grpc_op ops[2] = {
        {.op = GRPC_OP_SEND_STATUS_FROM_SERVER},
        {.op = GRPC_OP_RECV_CLOSE_ON_SERVER, .data.recv_close_on_server.cancelled = &cancelled}};
    ops[0].data.send_status_from_server.trailing_metadata_count = trailers_n;
    ops[0].data.send_status_from_server.trailing_metadata = trailers;
    ops[0].data.send_status_from_server.status = (grpc_status_code)status;
    ops[0].data.send_status_from_server.status_details = &text;
    fake_batch(fake, call, ops, 2);
    for (size_t i = 0; i < trailers_n; i++)
        grpc_slice_unref(trailers[i].value);
    grpc_slice_unref(text);
}

static inline void fake_hang(struct fake *fake, grpc_call *call)
{
    int cancelled = 0;
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER,
                  .data.recv_close_on_server.cancelled = &cancelled};
    fake_batch(fake, call, &op, 1);
}

// Sends the right answer to `request`, or with `code` an error in a stream's reply.
static inline bool fake_reply(struct fake *fake, grpc_call *call,
                              const Einsum__V1__EinsumRequest *request, bool streamed, int code)
{
    Einsum__V1__EinsumResponse response = EINSUM__V1__EINSUM_RESPONSE__INIT;
    Einsum__V1__Digest digest = EINSUM__V1__DIGEST__INIT;
    Einsum__V1__BatchInfo batch = EINSUM__V1__BATCH_INFO__INIT;
    float head[2] = {1.5f, -2.25f};
    response.request_id = request->request_id;
    response.tokens = request->tokens;
    response.groups = FAKE_GROUPS;
    response.output_dim = FAKE_OUTPUT_DIM;
    response.output_type = request->output_type;
    size_t element = request->output_type == EINSUM__V1__OUTPUT_TYPE__OUTPUT_TYPE_FP32 ? 4 : 2;
    size_t bytes = (size_t)request->tokens * FAKE_GROUPS * FAKE_OUTPUT_DIM * element;
    uint8_t *output = malloc(bytes + 1);
    uint32_t sum = fake_sum(request->activations.data, request->activations.len, 1);
    sum = fake_sum(request->activation_scales.data, request->activation_scales.len, sum);
    for (size_t i = 0; i < bytes; i++)
        output[i] = fake_output_byte(sum, i);
    if (request->digest_only) {
        digest.crc32 = sum;
        digest.elements = bytes / element;
        digest.sum = -0.5;
        digest.head = head;
        digest.n_head = 2;
        response.digest = &digest;
    } else {
        response.output.data = output;
        response.output.len = bytes;
    }
    batch.tokens = request->tokens + 1;
    batch.bucket = 512;
    batch.requests = 3;
    batch.queue_ns = 1000;
    batch.run_ns = 2000;
    response.batch = &batch;

    Einsum__V1__EinsumStreamResponse wrapped = EINSUM__V1__EINSUM_STREAM_RESPONSE__INIT;
    Einsum__V1__Error error = EINSUM__V1__ERROR__INIT;
    Einsum__V1__EinsumResponse bare = EINSUM__V1__EINSUM_RESPONSE__INIT;
    wrapped.response = &response;
    if (code) {
        bare.request_id = request->request_id;
        wrapped.response = &bare;
        error.code = code;
        error.message = (char *)"full";
        error.field = (char *)"tokens";
        error.retry_after_ms = 7;
        wrapped.error = &error;
    }
    const ProtobufCMessage *message = streamed ? &wrapped.base : &response.base;
    size_t packed_bytes = protobuf_c_message_get_packed_size(message);
    uint8_t *packed = malloc(packed_bytes + 1);
    protobuf_c_message_pack(message, packed);
    bool sent = fake_send(fake, call, packed, packed_bytes);
    free(packed);
    free(output);
    return sent;
}

// The same answer for the two kinds of request, from their two tensors.
static inline Einsum__V1__EinsumRequest
fake_as_einsum(const Einsum__V1__OutputProjectRequest *request)
{
    Einsum__V1__EinsumRequest same = EINSUM__V1__EINSUM_REQUEST__INIT;
    same.request_id = request->request_id;
    same.tokens = request->tokens;
    same.output_type = request->output_type;
    same.digest_only = request->digest_only;
    same.activations = request->attention;
    same.activation_scales = request->positions;
    return same;
}

// `bytes` are a request of the method that was called.
static inline void fake_answer(struct fake *fake, grpc_call *call, const uint8_t *bytes, size_t n)
{
    if (strstr(fake->method, "OutputProject")) {
        Einsum__V1__OutputProjectRequest *request =
            einsum__v1__output_project_request__unpack(NULL, n, bytes);
        if (request) {
            const Einsum__V1__EinsumRequest same = fake_as_einsum(request);
            fake_reply(fake, call, &same, false, 0);
        }
        einsum__v1__output_project_request__free_unpacked(request, NULL);
        return;
    }
    Einsum__V1__EinsumRequest *request = einsum__v1__einsum_request__unpack(NULL, n, bytes);
    if (request)
        fake_reply(fake, call, request, false, 0);
    einsum__v1__einsum_request__free_unpacked(request, NULL);
}

static inline void fake_unary(struct fake *fake, grpc_call *call, const struct fake_act *act)
{
    grpc_op start = {.op = GRPC_OP_SEND_INITIAL_METADATA};
    if (act->kind == FAKE_HANG) {
        fake_hang(fake, call);
        return;
    }
    if (act->kind == FAKE_STATUS) { // without reading the request: as a server that is full does
        fake_batch(fake, call, &start, 1);
        fake_end(fake, call, act, act->status);
        return;
    }
    grpc_byte_buffer *message = fake_receive(fake, call);
    fake_batch(fake, call, &start, 1);
    if (act->kind == FAKE_ANSWER && message) {
        grpc_slice flat = fake_flatten(message);
        fake_answer(fake, call, GRPC_SLICE_START_PTR(flat), GRPC_SLICE_LENGTH(flat));
        grpc_slice_unref(flat);
    } else {
        grpc_byte_buffer_destroy(message);
        for (uint32_t i = 0; act->bytes && i < (act->batch ? act->batch : 1); i++)
            fake_send(fake, call, act->bytes, act->bytes_n);
    }
    fake_end(fake, call, act, act->kind == FAKE_SEND_MANY ? act->status : 0);
}

static inline Einsum__V1__EinsumStreamRequest *fake_receive_streamed(struct fake *fake,
                                                                     grpc_call *call)
{
    grpc_byte_buffer *message = fake_receive(fake, call);
    if (!message)
        return NULL;
    grpc_slice flat = fake_flatten(message);
    Einsum__V1__EinsumStreamRequest *request = einsum__v1__einsum_stream_request__unpack(
        NULL, GRPC_SLICE_LENGTH(flat), GRPC_SLICE_START_PTR(flat));
    grpc_slice_unref(flat);
    return request;
}

static inline void fake_stream(struct fake *fake, grpc_call *call, const struct fake_act *act)
{
    grpc_op start = {.op = GRPC_OP_SEND_INITIAL_METADATA};
    fake_batch(fake, call, &start, 1);
    Einsum__V1__EinsumStreamRequest *held[64] = {NULL};
    uint32_t held_n = 0, seen = 0;
    for (;;) {
        Einsum__V1__EinsumStreamRequest *request = fake_receive_streamed(fake, call);
        if (request && act->kind == FAKE_STREAM_UNKNOWN)
            request->request->request_id += 1ull << 32; // of another use
        if (request && act->kind == FAKE_STREAM_BYTES)
            fake_send(fake, call, act->bytes, act->bytes_n);
        if (request)
            held[held_n++] = request;
        bool flush = !request || held_n >= (act->batch ? act->batch : 1);
        while (flush && held_n > 0) {
            Einsum__V1__EinsumStreamRequest *last = held[--held_n];
            bool refuse = act->kind == FAKE_STREAM_REFUSE && seen++ % 2 == 1;
            bool project =
                last->kind_case == EINSUM__V1__EINSUM_STREAM_REQUEST__KIND_OUTPUT_PROJECT;
            const Einsum__V1__EinsumRequest same =
                project ? fake_as_einsum(last->output_project) : *last->request;
            if (act->kind != FAKE_STREAM_QUIT && act->kind != FAKE_STREAM_BYTES)
                fake_reply(fake, call, &same, true, refuse ? 8 : 0);
            einsum__v1__einsum_stream_request__free_unpacked(last, NULL);
        }
        if (!request || act->kind == FAKE_STREAM_QUIT)
            break;
    }
    fake_end(fake, call, act, act->status);
}

static inline void *fake_serve(void *context)
{
    struct fake *fake = context;
    while (!atomic_load(&fake->stopping)) {
        grpc_call *call = NULL;
        grpc_call_details details;
        grpc_metadata_array headers;
        grpc_call_details_init(&details);
        grpc_metadata_array_init(&headers);
        bool got = grpc_server_request_call(fake->server, &call, &details, &headers, fake->queue,
                                            fake->queue, &details) == GRPC_CALL_OK &&
                   fake_next(fake, &details);
        if (got) {
            uint32_t index = atomic_load(&fake->calls);
            size_t length = GRPC_SLICE_LENGTH(details.method);
            length = length < sizeof fake->method - 1 ? length : sizeof fake->method - 1;
            memcpy(fake->method, GRPC_SLICE_START_PTR(details.method), length);
            fake->method[length] = '\0';
            atomic_store(&fake->calls, index + 1);
            const struct fake_act *act =
                &fake->script[index < fake->script_n ? index : fake->script_n - 1];
            if (strstr(fake->method, "EinsumStream"))
                fake_stream(fake, call, act);
            else
                fake_unary(fake, call, act);
            grpc_call_unref(call);
        }
        grpc_call_details_destroy(&details);
        grpc_metadata_array_destroy(&headers);
    }
    return NULL;
}

// ---- start and stop -----------------------------------------------------------------------------

static inline void fake_start(struct fake *fake, const struct fake_act *script, size_t script_n)
{
    memset(fake, 0, sizeof *fake);
    grpc_init();
    fake->script = script;
    fake->script_n = script_n;
    grpc_arg args[] = {{.type = GRPC_ARG_INTEGER,
                        .key = (char *)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH,
                        .value.integer = 1 << 30},
                       {.type = GRPC_ARG_INTEGER,
                        .key = (char *)GRPC_ARG_MAX_METADATA_SIZE,
                        .value.integer = 1 << 20}};
    grpc_channel_args server_args = {.num_args = 2, .args = args};
    fake->queue = grpc_completion_queue_create_for_next(NULL);
    fake->server = grpc_server_create(&server_args, NULL);
    grpc_server_register_completion_queue(fake->server, fake->queue, NULL);
    grpc_server_credentials *credentials = grpc_insecure_server_credentials_create();
    fake->port = grpc_server_add_http2_port(fake->server, "127.0.0.1:0", credentials);
    grpc_server_credentials_release(credentials);
    ck_assert_int_gt(fake->port, 0);
    grpc_server_start(fake->server);
    ck_assert_int_eq(pthread_create(&fake->thread, NULL, fake_serve, fake), 0);
}

static inline void fake_stop(struct fake *fake)
{
    // Whoever reads the queue drops the notice: that the queue drains dry says as much.
    atomic_store(&fake->stopping, true);
    grpc_server_shutdown_and_notify(fake->server, fake->queue, fake);
    grpc_server_cancel_all_calls(fake->server);
    pthread_join(fake->thread, NULL);
    grpc_completion_queue_shutdown(fake->queue);
    while (grpc_completion_queue_next(fake->queue, gpr_inf_future(GPR_CLOCK_REALTIME), NULL).type !=
           GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_server_destroy(fake->server);
    grpc_completion_queue_destroy(fake->queue);
    grpc_shutdown();
}
