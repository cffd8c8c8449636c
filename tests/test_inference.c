// wire_inference.h against protobuf-c, and inference.h: what a ModelInferRequest becomes, by table.
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "inference/grpc_service.pb-c.h"
#include "server/inference.h"

enum { SLICES_MAX = 4096 };

static struct weight weight = {
    .name = "layers.1.attn.wo_a",
    .format = {.groups = 4,
               .output_dim = 256,
               .reduced_dim = 512,
               .weight_type = EINSUM_WEIGHT_E4M3,
               .scale_type = EINSUM_SCALE_UE8M0,
               .block_d = 128,
               .block_r = 128},
    .references = 1,
};

// ---- a request as protobuf-c writes it

static char model_name[] = "layers.1.attn.wo_a", version[] = "1", id[] = "\xc3\xa7 42";
static char input_names[][32] = {"activations", "activation_scales"};
static char datatypes[][16] = {"UINT8", "FP32"};
static char output_name[] = "output", dtype_key[] = "dtype", fp32[] = "FP32";
static char layout_key[] = "activation_layout", layout[] = "TGR";
static char priority_key[] = "priority", unknown_key[] = "tenant";

struct message {
    Inference__ModelInferRequest request;
    Inference__ModelInferRequest__InferInputTensor inputs[2], *input_pointers[2];
    Inference__ModelInferRequest__InferRequestedOutputTensor output, *output_pointer;
    Inference__ModelInferRequest__InferRequestedOutputTensor__ParametersEntry dtype, *dtype_pointer;
    Inference__ModelInferRequest__ParametersEntry entries[3], *entry_pointers[3];
    Inference__InferParameter values[4];
    int64_t shapes[2][3];
    ProtobufCBinaryData raw[2];
    uint8_t bytes[2][64];
};

static void set_parameter(Inference__InferParameter *value,
                          Inference__InferParameter__ParameterChoiceCase choice)
{
    inference__infer_parameter__init(value);
    value->parameter_choice_case = choice;
}

static void add_parameters(struct message *message)
{
    set_parameter(&message->values[0], INFERENCE__INFER_PARAMETER__PARAMETER_CHOICE_STRING_PARAM);
    message->values[0].string_param = layout;
    set_parameter(&message->values[1], INFERENCE__INFER_PARAMETER__PARAMETER_CHOICE_UINT64_PARAM);
    message->values[1].uint64_param = 1;
    set_parameter(&message->values[2], INFERENCE__INFER_PARAMETER__PARAMETER_CHOICE_DOUBLE_PARAM);
    message->values[2].double_param = 1.5;
    set_parameter(&message->values[3], INFERENCE__INFER_PARAMETER__PARAMETER_CHOICE_STRING_PARAM);
    message->values[3].string_param = fp32;
    char *const keys[] = {layout_key, priority_key, unknown_key};
    for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
        inference__model_infer_request__parameters_entry__init(&message->entries[i]);
        message->entries[i].key = keys[i];
        message->entries[i].value = &message->values[i];
        message->entry_pointers[i] = &message->entries[i];
    }
    message->request.parameters = message->entry_pointers;
    message->request.n_parameters = ARRAY_LEN(keys);
    inference__model_infer_request__infer_requested_output_tensor__init(&message->output);
    inference__model_infer_request__infer_requested_output_tensor__parameters_entry__init(
        &message->dtype);
    message->dtype.key = dtype_key;
    message->dtype.value = &message->values[3];
    message->dtype_pointer = &message->dtype;
    message->output.name = output_name;
    message->output.parameters = &message->dtype_pointer;
    message->output.n_parameters = 1;
    message->output_pointer = &message->output;
    message->request.outputs = &message->output_pointer;
    message->request.n_outputs = 1;
}

static void make_message(struct message *message)
{
    memset(message, 0, sizeof *message);
    inference__model_infer_request__init(&message->request);
    message->request.model_name = model_name;
    message->request.model_version = version;
    message->request.id = id;
    add_parameters(message);
    for (size_t i = 0; i < 2; i++) {
        inference__model_infer_request__infer_input_tensor__init(&message->inputs[i]);
        message->inputs[i].name = input_names[i];
        message->inputs[i].datatype = datatypes[i];
        message->inputs[i].shape = message->shapes[i];
        message->inputs[i].n_shape = 3;
        message->shapes[i][0] = 3;
        message->shapes[i][1] = 4;
        message->shapes[i][2] = i == 0 ? 512 : 4;
        message->input_pointers[i] = &message->inputs[i];
        memset(message->bytes[i], 'a' + (int)i, sizeof message->bytes[i]);
        message->raw[i] = (ProtobufCBinaryData){sizeof message->bytes[i] - i, message->bytes[i]};
    }
    message->request.inputs = message->input_pointers;
    message->request.n_inputs = 2;
    message->request.raw_input_contents = message->raw;
    message->request.n_raw_input_contents = 2;
}

static uint8_t *pack(struct message *message, size_t *n)
{
    *n = inference__model_infer_request__get_packed_size(&message->request);
    uint8_t *flat = malloc(*n);
    ck_assert_ptr_nonnull(flat);
    inference__model_infer_request__pack(&message->request, flat);
    return flat;
}

// In pieces of `piece` bytes.
static enum status read_cut(const uint8_t *flat, size_t n, size_t piece, struct wire_infer *infer,
                            struct error *err)
{
    static grpc_slice slices[SLICES_MAX];
    size_t slices_n = 0;
    for (size_t at = 0; at < n; at += piece) {
        ck_assert_uint_lt(slices_n, SLICES_MAX);
        slices[slices_n++] =
            grpc_slice_from_copied_buffer((const char *)flat + at, n - at < piece ? n - at : piece);
    }
    enum status status = wire_read_infer(slices, slices_n, infer, err);
    for (size_t i = 0; i < slices_n; i++)
        grpc_slice_unref(slices[i]);
    return status;
}

START_TEST(reads_a_request_however_it_is_cut)
{
    struct message message;
    make_message(&message);
    size_t n;
    uint8_t *flat = pack(&message, &n);
    for (size_t piece = 1; piece <= n; piece++) {
        struct wire_infer infer;
        struct error err;
        ck_assert_msg(read_cut(flat, n, piece, &infer, &err) == STATUS_OK, "%s", err.text);
        ck_assert_str_eq(infer.model_name, model_name);
        ck_assert_str_eq(infer.model_version, version);
        ck_assert_str_eq(infer.id, id);
        ck_assert_str_eq(infer.activation_layout, layout);
        ck_assert_str_eq(infer.scale_layout, "");
        ck_assert_uint_eq(infer.priority, 1);
        ck_assert_uint_eq(infer.inputs_n, 2);
        for (int i = 0; i < 2; i++) {
            ck_assert_str_eq(infer.inputs[i].name, input_names[i]);
            ck_assert_str_eq(infer.inputs[i].datatype, datatypes[i]);
            ck_assert_uint_eq(infer.inputs[i].rank, 3);
            ck_assert_mem_eq(infer.inputs[i].shape, message.shapes[i], sizeof message.shapes[i]);
            ck_assert(!infer.inputs[i].contents);
            ck_assert_uint_eq(infer.raw[i].bytes, message.raw[i].len);
            ck_assert_mem_eq(flat + infer.raw[i].offset, message.bytes[i], message.raw[i].len);
        }
        ck_assert_uint_eq(infer.outputs_n, 1);
        ck_assert_str_eq(infer.output_name, output_name);
        ck_assert_str_eq(infer.dtype, fp32);
    }
    free(flat);
}
END_TEST

// A prefix is refused, or it is a message, and then protobuf-c reads it as well.
START_TEST(refuses_what_is_cut_short)
{
    struct message message;
    make_message(&message);
    size_t n;
    uint8_t *flat = pack(&message, &n);
    unsigned refused = 0;
    for (size_t length = 0; length < n; length++) {
        struct wire_infer infer;
        struct error err;
        enum status status = read_cut(flat, length, 7, &infer, &err);
        Inference__ModelInferRequest *peer =
            inference__model_infer_request__unpack(NULL, length, flat);
        ck_assert_int_eq(status == STATUS_OK, peer != NULL);
        refused += status != STATUS_OK;
        if (status != STATUS_OK)
            ck_assert_int_eq(status, STATUS_INVALID_ARGUMENT);
        if (peer)
            inference__model_infer_request__free_unpacked(peer, NULL);
    }
    ck_assert_uint_gt(refused, n / 2);
    free(flat);
}
END_TEST

// ---- layouts

static const struct layout_case {
    const char *datatypes[2];
    int64_t shapes[2][4]; // closed by a 0, which stands for no dimension
    const char *named[2];
    const char *field; // at fault; NULL: none
    int32_t activation_layout, scale_layout, scale_type;
    uint32_t tokens;
} layouts[] = {
    {{"UINT8", "FP32"}, {{3, 4, 512}, {3, 4, 4}}, {"", ""}, NULL, 1, 1, 1, 3},
    {{"FP8_E4M3", "FP32"}, {{4, 3, 512}, {4, 4, 4}}, {"", ""}, NULL, 2, 2, 1, 3},
    {{"UINT8", "FP32"}, {{5, 4, 512}, {4, 4, 8}}, {"", ""}, NULL, 1, 2, 1, 5},
    {{"UINT8", "UINT8"}, {{5, 4, 512}, {5, 4, 4}}, {"", ""}, NULL, 1, 1, 2, 5},
    {{"UINT8", "UE8M0"}, {{5, 4, 512}, {5, 4, 4}}, {"", "TGK"}, NULL, 1, 1, 2, 5},
    {{"UINT8", "INT32"}, {{5, 4, 512}, {5, 4, 1}}, {"", ""}, NULL, 1, 1, 2, 5},
    {{"UINT8", "INT32"}, {{5, 4, 512}, {4, 1, 8}}, {"", ""}, NULL, 1, 2, 2, 5},
    {{"UINT8", "FP32"}, {{1, 4, 512}, {1, 4, 4}}, {"", ""}, NULL, 1, 1, 1, 1},
    {{"UINT8", "FP32"}, {{1, 4, 512}, {4, 4, 4}}, {"", ""}, NULL, 1, 2, 1, 1},
    // What fits two layouts
    {{"UINT8", "FP32"}, {{4, 4, 512}, {4, 4, 4}}, {"", ""}, "activation_layout", 0, 0, 0, 0},
    {{"UINT8", "FP32"}, {{4, 4, 512}, {4, 4, 4}}, {"TGR", ""}, "scale_layout", 0, 0, 0, 0},
    {{"UINT8", "FP32"}, {{4, 4, 512}, {4, 4, 4}}, {"TGR", "TGK"}, NULL, 1, 1, 1, 4},
    {{"UINT8", "FP32"}, {{4, 4, 512}, {4, 4, 4}}, {"GTR", "GKT"}, NULL, 2, 2, 1, 4},
    {{"UINT8", "UINT8"}, {{4, 4, 512}, {4, 4, 4}}, {"GTR", ""}, NULL, 2, 1, 2, 4},
    // What fits none, or not the one that is named
    {{"UINT8", "FP32"}, {{3, 3, 512}, {3, 4, 4}}, {"", ""}, "activations", 0, 0, 0, 0},
    {{"UINT8", "FP32"}, {{3, 4, 512, 1}, {3, 4, 4}}, {"", ""}, "activations", 0, 0, 0, 0},
    {{"UINT8", "FP32"}, {{3, 4, 512}, {3, 4, 4}}, {"GTR", ""}, "activations", 0, 0, 0, 0},
    {{"UINT8", "FP32"}, {{3, 4, 512}, {3, 4, 4}}, {"", "GKT"}, "activation_scales", 0, 0, 0, 0},
    {{"UINT8", "FP32"}, {{3, 4, 512}, {4, 4, 3}}, {"", ""}, "activation_scales", 0, 0, 0, 0},
    {{"UINT8", "UINT8"}, {{3, 4, 512}, {4, 1, 4}}, {"", "GKT"}, "scale_layout", 0, 0, 0, 0},
    {{"UINT8", "FP32"}, {{3, 4, 512}, {3, 4, 4}}, {"xyz", ""}, "activation_layout", 0, 0, 0, 0},
    {{"INT8", "FP32"}, {{3, 4, 512}, {3, 4, 4}}, {"", ""}, "activations", 0, 0, 0, 0},
    {{"UINT8", "FP16"}, {{3, 4, 512}, {3, 4, 4}}, {"", ""}, "activation_scales", 0, 0, 0, 0},
};

static struct wire_infer make_infer(const struct layout_case *a_case)
{
    struct wire_infer infer = {.inputs_n = 2, .raw_n = 2};
    strcpy(infer.activation_layout, a_case->named[0]);
    strcpy(infer.scale_layout, a_case->named[1]);
    for (int i = 0; i < 2; i++) {
        struct wire_infer_input *input = &infer.inputs[i];
        strcpy(input->name, input_names[i]);
        strcpy(input->datatype, a_case->datatypes[i]);
        while (input->rank < 4 && a_case->shapes[i][input->rank] != 0) {
            input->shape[input->rank] = a_case->shapes[i][input->rank];
            input->rank++;
        }
        infer.raw[i] = (struct wire_range){100 * (uint64_t)i, 50};
    }
    return infer;
}

START_TEST(shapes_tell_the_layout)
{
    const struct layout_case *a_case = &layouts[_i];
    struct wire_infer infer = make_infer(a_case);
    struct wire_request request;
    struct error err;
    bool listed;
    enum status status = inference_translate(&infer, &weight, &request, &listed, &err);
    if (a_case->field) {
        ck_assert_int_ne(status, STATUS_OK);
        ck_assert_msg(strcmp(err.field, a_case->field) == 0, "%s", err.text);
        return;
    }
    ck_assert_msg(status == STATUS_OK, "%s", err.text);
    ck_assert(!listed);
    ck_assert_int_eq(request.activation_layout, a_case->activation_layout);
    ck_assert_int_eq(request.scale_layout, a_case->scale_layout);
    ck_assert_int_eq(request.scale_type, a_case->scale_type);
    ck_assert_int_eq(request.output_type, EINSUM_OUTPUT_BF16);
    ck_assert_int_eq(request.recipe, EINSUM_RECIPE_1_128_128);
    ck_assert_uint_eq(request.tokens, a_case->tokens);
    ck_assert_uint_eq(request.activations.offset, 0);
    ck_assert_uint_eq(request.activation_scales.offset, 100);
    ck_assert_uint_eq(request.activation_scales.bytes, 50); // right or wrong, for request.c to say
}
END_TEST

// ---- lists

START_TEST(converts_lists)
{
    static const uint8_t contents[] = {
        0x0a, 0x01, 'a',                          // name
        0x2a, 0x05, 0x22, 0x03, 0x01, 0xff, 0x01, // uint_contents, packed: 1, 255
        0x2a, 0x02, 0x20, 0x07,                   // again, one by one: 7
        0x2a, 0x03, 0x20, 0x80, 0x02,             // 256
        0x2a, 0x02, 0x10, 0x07,                   // int_contents
    };
    static const struct {
        size_t n;
        uint64_t bytes;
        enum status status;
    } cases[] = {
        {10, 2, STATUS_OK},
        {10, 1, STATUS_INVALID_ARGUMENT}, // too many
        {10, 3, STATUS_INVALID_ARGUMENT}, // too few
        {14, 3, STATUS_OK},
        {19, 4, STATUS_INVALID_ARGUMENT}, // 256 is no byte
        {23, 4, STATUS_INVALID_ARGUMENT},
        {3, 0, STATUS_OK},
        {3, 1, STATUS_INVALID_ARGUMENT},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        grpc_slice slice = grpc_slice_from_static_buffer(contents, cases[i].n);
        const struct wire_infer_input input = {.name = "a", .message = {0, cases[i].n}};
        uint8_t to[] = {0xee, 0xee, 0xee, 0xee, 0xee};
        struct error err;
        ck_assert_int_eq(
            wire_infer_convert(&slice, 1, &input, WIRE_INFER_UINT8, to, cases[i].bytes, &err),
            cases[i].status);
        ck_assert_uint_eq(to[cases[i].bytes], 0xee);
        if (cases[i].status == STATUS_OK && cases[i].bytes == 2)
            ck_assert(to[0] == 1 && to[1] == 255);
    }
}
END_TEST

START_TEST(lists_may_not_outgrow_their_message)
{
    struct wire_request request = {.activations.bytes = 4000, .activation_scales.bytes = 96};
    uint64_t bytes;
    ck_assert_int_eq(inference_converted_bytes(1024, &request, &bytes, NULL), STATUS_OK);
    ck_assert_uint_eq(bytes, 4096);
    ck_assert_int_eq(inference_converted_bytes(1023, &request, &bytes, NULL),
                     STATUS_INVALID_ARGUMENT);
}
END_TEST

// ---- responses

static char *fill(char *text, size_t bytes)
{
    memset(text, 'x', bytes - 1);
    text[bytes - 1] = '\0';
    return text;
}

START_TEST(writes_the_longest_head)
{
    char name[WEIGHT_NAME_BYTES], long_id[WIRE_INFER_ID_BYTES_MAX + 1];
    char kernel[WIRE_INFER_KERNEL_BYTES_MAX + 1];
    const struct wire_infer_response infer = {
        .model_name = fill(name, sizeof name),
        .model_version = inference_version,
        .id = fill(long_id, sizeof long_id),
        .kernel = fill(kernel, sizeof kernel),
        .output_name = inference_output,
        .datatype = "BF16",
    };
    const struct wire_response response = {
        .tokens = UINT32_MAX,
        .groups = UINT32_MAX,
        .output_dim = UINT32_MAX,
        .output_bytes = 5,
        .batch_tokens = UINT32_MAX,
        .batch_bucket = UINT32_MAX,
        .batch_requests = UINT32_MAX,
        .queue_ns = UINT64_MAX,
        .run_ns = UINT64_MAX,
    };
    uint8_t head[WIRE_INFER_HEAD_BYTES_MAX + 5];
    size_t n = wire_write_infer_head(&infer, &response, head);
    ck_assert_uint_le(n, WIRE_INFER_HEAD_BYTES_MAX);
    memcpy(head + n, "abcde", 5);
    Inference__ModelInferResponse *read =
        inference__model_infer_response__unpack(NULL, n + 5, head);
    ck_assert_ptr_nonnull(read);
    ck_assert_str_eq(read->model_name, name);
    ck_assert_str_eq(read->id, long_id);
    ck_assert_uint_eq(read->n_parameters, 6);
    ck_assert_str_eq(read->parameters[0]->key, "batch_tokens");
    ck_assert_int_eq(read->parameters[0]->value->int64_param, UINT32_MAX);
    ck_assert_str_eq(read->parameters[5]->value->string_param, kernel);
    ck_assert_uint_eq(read->n_outputs, 1);
    ck_assert_uint_eq(read->outputs[0]->n_shape, 3);
    ck_assert_int_eq(read->outputs[0]->shape[2], UINT32_MAX);
    ck_assert_uint_eq(read->n_raw_output_contents, 1);
    ck_assert_uint_eq(read->raw_output_contents[0].len, 5);
    ck_assert_mem_eq(read->raw_output_contents[0].data, "abcde", 5);
    inference__model_infer_response__free_unpacked(read, NULL);
}
END_TEST

START_TEST(an_empty_output_is_there)
{
    const struct wire_infer_response infer = {model_name, version, "", "", output_name, "FP32"};
    const struct wire_response response = {.groups = 4, .output_dim = 256};
    uint8_t head[WIRE_INFER_HEAD_BYTES_MAX];
    size_t n = wire_write_infer_head(&infer, &response, head);
    Inference__ModelInferResponse *read = inference__model_infer_response__unpack(NULL, n, head);
    ck_assert_ptr_nonnull(read);
    ck_assert_uint_eq(read->n_parameters, 0); // it travelled in no batch
    ck_assert_int_eq(read->outputs[0]->shape[0], 0);
    ck_assert_uint_eq(read->n_raw_output_contents, 1);
    ck_assert_uint_eq(read->raw_output_contents[0].len, 0);
    inference__model_infer_response__free_unpacked(read, NULL);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("inference");
    TCase *wire = tcase_create("wire");
    tcase_add_test(wire, reads_a_request_however_it_is_cut);
    tcase_add_test(wire, refuses_what_is_cut_short);
    tcase_add_test(wire, converts_lists);
    tcase_add_test(wire, writes_the_longest_head);
    tcase_add_test(wire, an_empty_output_is_there);
    suite_add_tcase(suite, wire);
    TCase *translation = tcase_create("translation");
    tcase_add_loop_test(translation, shapes_tell_the_layout, 0, ARRAY_LEN(layouts));
    tcase_add_test(translation, lists_may_not_outgrow_their_message);
    suite_add_tcase(suite, translation);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
