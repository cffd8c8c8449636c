// Fuzzes ModelInfer's way in: the reader of the message, its translation to an einsum request for
// one of two weights, the checks that follow, and the conversion of lists. An input is one byte that
// says how to cut the rest into slices, and the message.
//
// Besides not crashing: the cut must not matter, what we accept protobuf-c must accept and
// understand the same, and what passes the checks has the bytes that an engine will read.
#include <stdlib.h>
#include <string.h>

#include "inference/grpc_service.pb-c.h"
#include "server/inference.h"
#include "server/request.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SLICES_MAX = 64, TOKENS_MAX = 64, PIECES_APART = 13 };

static struct weight weights[] = {
    {.name = "a",
     .format = {.groups = 4,
                .output_dim = 128,
                .reduced_dim = 512,
                .weight_type = EINSUM_WEIGHT_E4M3,
                .scale_type = EINSUM_SCALE_UE8M0,
                .block_d = 128,
                .block_r = 128},
     .references = 1},
    {.name = "b",
     .format = {.groups = 1,
                .output_dim = 32,
                .reduced_dim = 128,
                .weight_type = EINSUM_WEIGHT_E4M3,
                .scale_type = EINSUM_SCALE_FP32,
                .block_d = 32,
                .block_r = 32},
     .references = 1},
};

// A message in slices, and what was made of it.
struct reading {
    grpc_slice slices[SLICES_MAX];
    size_t slices_n;
    struct wire_infer infer;
    struct error err;
    enum status status;
};

static void cut(struct reading *reading, const uint8_t *bytes, size_t n, uint8_t how)
{
    reading->slices_n = 0;
    for (size_t at = 0; at < n;) {
        size_t piece = 1 + (how + reading->slices_n * 7) % 40; // both sides of what gRPC inlines
        if (piece > n - at || reading->slices_n == SLICES_MAX - 1)
            piece = n - at;
        reading->slices[reading->slices_n++] =
            grpc_slice_from_copied_buffer((const char *)bytes + at, piece);
        at += piece;
    }
    memset(&reading->err, 0, sizeof reading->err);
    reading->status =
        wire_read_infer(reading->slices, reading->slices_n, &reading->infer, &reading->err);
}

static void drop(struct reading *reading)
{
    for (size_t i = 0; i < reading->slices_n; i++)
        grpc_slice_unref(reading->slices[i]);
}

// ---- against protobuf-c

// The last entry of that name, as far as it is a string; NULL: there is none.
static const char *text_parameter(const Inference__ModelInferRequest *peer, const char *key)
{
    const char *found = NULL;
    for (size_t i = 0; i < peer->n_parameters; i++)
        if (strcmp(peer->parameters[i]->key, key) == 0)
            found = peer->parameters[i]->value ? peer->parameters[i]->value->string_param : NULL;
    return found;
}

static void compare_input(const struct wire_infer_input *input,
                          const Inference__ModelInferRequest__InferInputTensor *peer)
{
    ASSERT(strcmp(input->name, peer->name) == 0);
    ASSERT(strcmp(input->datatype, peer->datatype) == 0);
    ASSERT(input->rank == peer->n_shape);
    for (uint32_t i = 0; i < input->rank; i++)
        ASSERT(input->shape[i] == peer->shape[i]);
    ASSERT(input->contents == (peer->contents != NULL));
}

static void compare(const struct wire_infer *infer, const Inference__ModelInferRequest *peer,
                    const uint8_t *bytes)
{
    ASSERT(strcmp(infer->model_name, peer->model_name) == 0);
    ASSERT(strcmp(infer->model_version, peer->model_version) == 0);
    ASSERT(strcmp(infer->id, peer->id) == 0);
    const char *layout = text_parameter(peer, "activation_layout");
    ASSERT(!layout || strcmp(infer->activation_layout, layout) == 0);
    ASSERT(infer->inputs_n == peer->n_inputs);
    for (uint32_t i = 0; i < infer->inputs_n; i++)
        compare_input(&infer->inputs[i], peer->inputs[i]);
    ASSERT(infer->outputs_n == peer->n_outputs);
    if (infer->outputs_n > 0)
        ASSERT(strcmp(infer->output_name, peer->outputs[0]->name) == 0);
    ASSERT(infer->raw_n == peer->n_raw_input_contents);
    for (uint32_t i = 0; i < infer->raw_n && i < WIRE_INFER_INPUTS_MAX; i++) {
        ASSERT(infer->raw[i].bytes == peer->raw_input_contents[i].len);
        ASSERT(infer->raw[i].bytes == 0 ||
               memcmp(bytes + infer->raw[i].offset, peer->raw_input_contents[i].data,
                      infer->raw[i].bytes) == 0);
    }
}

// Whether in any message at the path but for its last number, which 0 ends, that field comes twice.
static bool comes_twice(const uint8_t *bytes, struct wire_range range, const uint32_t *path)
{
    unsigned found = 0;
    bool twice = false;
    uint64_t end = range.offset + range.bytes;
    grpc_slice slice = grpc_slice_from_static_buffer(bytes, end);
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, &slice, 1);
    wire_skip(&cursor, range.offset);
    while (cursor.offset < end) {
        struct wire_field field;
        ASSERT(wire_read_tag(&cursor, end, &field, NULL) == STATUS_OK);
        ASSERT(wire_read_value(&cursor, end, NULL, &field, NULL) == STATUS_OK);
        wire_skip(&cursor, field.range.bytes);
        if (field.number != path[0])
            continue;
        if (path[1] == 0)
            found++;
        else
            twice = twice || comes_twice(bytes, field.range, path + 1);
    }
    return twice || found > 1;
}

// A parameter's value in pieces: protobuf-c cannot merge them.
static bool has_merged_parameter(const uint8_t *bytes, size_t n)
{
    const uint32_t paths[][4] = {{4, 2, 0}, {5, 4, 2, 0}, {6, 2, 2, 0}};
    bool any = false;
    for (size_t i = 0; i < ARRAY_LEN(paths); i++)
        any = any || comes_twice(bytes, (struct wire_range){.bytes = n}, paths[i]);
    return any;
}

// Contents are passed by when a message is read, so protobuf-c may refuse what is in them.
static bool has_contents(const struct wire_infer *infer)
{
    bool any = false;
    for (uint32_t i = 0; i < infer->inputs_n; i++)
        any |= infer->inputs[i].contents;
    return any;
}

// ---- what becomes of it

static void compare_list(const Inference__ModelInferRequest__InferInputTensor *peer,
                         const uint8_t *converted, uint64_t bytes)
{
    const Inference__InferTensorContents *contents = peer->contents;
    if (!contents)
        return;
    if (strcmp(peer->datatype, "UINT8") == 0) {
        ASSERT(contents->n_uint_contents == bytes);
        for (size_t i = 0; i < bytes; i++)
            ASSERT(contents->uint_contents[i] == converted[i]);
    } else if (strcmp(peer->datatype, "INT32") == 0) {
        ASSERT(4 * contents->n_int_contents == bytes);
        ASSERT(bytes == 0 || memcmp(contents->int_contents, converted, bytes) == 0);
    } else {
        ASSERT(4 * contents->n_fp32_contents == bytes);
        ASSERT(bytes == 0 || memcmp(contents->fp32_contents, converted, bytes) == 0);
    }
}

// The lists' bytes, to be freed; NULL: they are no such lists.
static uint8_t *convert(const struct reading *reading, const struct wire_request *request,
                        uint64_t *bytes)
{
    uint64_t message_bytes = wire_bytes(reading->slices, reading->slices_n);
    if (inference_converted_bytes(message_bytes, request, bytes, NULL) != STATUS_OK)
        return NULL;
    uint8_t *converted = malloc(*bytes + 1);
    ASSERT(converted);
    if (inference_convert(reading->slices, reading->slices_n, &reading->infer, request, converted,
                          NULL) == STATUS_OK)
        return converted;
    free(converted);
    return NULL;
}

static void check_lists(const struct reading *reading, const struct reading *other,
                        const struct wire_request *request,
                        const Inference__ModelInferRequest *peer)
{
    uint64_t bytes, other_bytes;
    uint8_t *converted = convert(reading, request, &bytes);
    uint8_t *again = convert(other, request, &other_bytes);
    ASSERT(!converted == !again);
    if (converted) {
        ASSERT(bytes == other_bytes && memcmp(converted, again, bytes) == 0);
        for (size_t i = 0; peer && i < peer->n_inputs; i++) {
            bool first = strcmp(peer->inputs[i]->name, inference_activations) == 0;
            struct wire_range range = first ? request->activations : request->activation_scales;
            compare_list(peer->inputs[i], converted + range.offset, range.bytes);
        }
    }
    free(converted);
    free(again);
}

static void check_request(const struct wire_request *request, struct weight *weight)
{
    struct job job = {0};
    if (request_check_with(request, weight_ref(weight), TOKENS_MAX, &job, NULL) != STATUS_OK)
        return;
    const struct einsum_weight_format *format = &weight->format;
    ASSERT(request->tokens <= TOKENS_MAX);
    ASSERT(request->activations.bytes ==
           einsum_activation_bytes(request->tokens, job.operand.groups, format->reduced_dim));
    ASSERT(request->activation_scales.bytes ==
           einsum_scale_bytes(job.operand.scale_layout, job.operand.scale_type, request->tokens,
                              job.operand.groups, format->reduced_dim / format->block_r));
    weight_unref(job.weight);
}

static void write_head(const struct wire_infer *infer, const struct wire_request *request,
                       const struct weight *weight)
{
    const struct wire_infer_response answer = {
        .model_name = weight->name,
        .model_version = inference_version,
        .id = infer->id,
        .kernel = infer->kernel,
        .output_name = inference_output,
        .datatype = inference_datatype(request->output_type),
    };
    const struct wire_response response = {.tokens = request->tokens, .batch_tokens = 1};
    uint8_t head[WIRE_INFER_HEAD_BYTES_MAX];
    size_t n = wire_write_infer_head(&answer, &response, head);
    Inference__ModelInferResponse *read = inference__model_infer_response__unpack(NULL, n, head);
    ASSERT(read && strcmp(read->id, infer->id) == 0);
    inference__model_infer_response__free_unpacked(read, NULL);
}

static void translate(const struct reading *reading, const struct reading *other, size_t n,
                      struct weight *weight, const Inference__ModelInferRequest *peer)
{
    struct wire_request request;
    bool listed;
    if (inference_translate(&reading->infer, weight, &request, &listed, NULL) != STATUS_OK)
        return;
    write_head(&reading->infer, &request, weight);
    if (listed) {
        check_lists(reading, other, &request, peer);
        return;
    }
    ASSERT(request.activations.offset + request.activations.bytes <= n);
    ASSERT(request.activation_scales.offset + request.activation_scales.bytes <= n);
    check_request(&request, weight);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    const uint8_t *bytes = data + 1;
    size_t n = size - 1;
    static struct reading reading, other;
    cut(&reading, bytes, n, data[0]);
    cut(&other, bytes, n, (uint8_t)(data[0] + PIECES_APART));
    ASSERT(reading.status == other.status);
    ASSERT(strcmp(reading.err.text, other.err.text) == 0);
    if (reading.status == STATUS_OK) {
        ASSERT(memcmp(&reading.infer, &other.infer, sizeof reading.infer) == 0);
        Inference__ModelInferRequest *peer = inference__model_infer_request__unpack(NULL, n, bytes);
        ASSERT(peer || has_contents(&reading.infer) || has_merged_parameter(bytes, n));
        if (peer)
            compare(&reading.infer, peer, bytes);
        for (size_t i = 0; i < ARRAY_LEN(weights); i++)
            translate(&reading, &other, n, &weights[i], peer);
        if (peer)
            inference__model_infer_request__free_unpacked(peer, NULL);
    }
    drop(&reading);
    drop(&other);
    return 0;
}
