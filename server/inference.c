// Owns nothing; any thread. What a caller sent is hostile, and has passed wire_inference.c alone.
//
//     datatype            -> type
//     shape, of the weight's G, R and K, and a parameter where it fits two layouts -> layout, T
//     raw_input_contents or contents -> where the bytes lie
#include "inference.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "request.h"

const char inference_version[] = "1";
const char inference_activations[] = "activations";
const char inference_scales[] = "activation_scales";
const char inference_output[] = "output";

// ---- models

enum status inference_find_model(struct weights *weights, const char *field, const char *name,
                                 const char *version, struct weight **weight, struct error *err)
{
    if (name[0] == '\0')
        return error_field(err, STATUS_INVALID_ARGUMENT, field,
                           "not given; expected a name that RepositoryIndex shows");
    *weight = weights_get(weights, name, strlen(name));
    if (!*weight)
        return error_field(err, STATUS_NOT_FOUND, field,
                           "\"%s\" is not resident; %u models are (see RepositoryIndex)", name,
                           weights_totals(weights).weights);
    if (version[0] == '\0' || strcmp(version, inference_version) == 0)
        return STATUS_OK;
    weight_unref(*weight);
    *weight = NULL;
    return error_field(err, STATUS_NOT_FOUND,
                       strcmp(field, "model_name") == 0 ? "model_version" : "version",
                       "\"%s\" of model \"%s\" does not exist; expected \"%s\" or none", version,
                       name, inference_version);
}

void inference_models_add(void *context, struct weight *weight)
{
    struct inference_models *models = context;
    if (models->n == models->max && !models->incomplete) {
        size_t more = models->max ? 2 * models->max : 64;
        struct weight **grown = reallocarray(models->weights, more, sizeof(struct weight *));
        models->incomplete = !grown;
        if (grown) {
            models->weights = grown;
            models->max = more;
        }
    }
    if (models->incomplete)
        return;
    models->weights[models->n++] = weight_ref(weight);
}

void inference_models_deinit(struct inference_models *models)
{
    for (size_t i = 0; i < models->n; i++)
        weight_unref(models->weights[i]);
    free(models->weights);
}

enum einsum_recipe inference_recipe(const struct weight *weight)
{
    enum einsum_recipe recipe = EINSUM_RECIPE_1_128_128;
    while (!request_recipe_fits(recipe, &weight->format))
        recipe++;
    return recipe;
}

// ---- layouts

enum { TOKENS = -1 }; // in a layout's shape: any number

struct layout {
    const char *name;
    int32_t value;    // the enum's
    int64_t shape[3]; // of a tensor in it
};

enum { SHAPE_TEXT_BYTES = 128 };

static void print_shape(const int64_t *shape, size_t rank, char text[SHAPE_TEXT_BYTES])
{
    size_t used = 0;
    for (size_t i = 0; i < rank; i++) {
        const char *separator = i == 0 ? "[" : ", ";
        int printed =
            shape[i] == TOKENS
                ? snprintf(text + used, SHAPE_TEXT_BYTES - used, "%sT", separator)
                : snprintf(text + used, SHAPE_TEXT_BYTES - used, "%s%" PRId64, separator, shape[i]);
        used += printed > 0 ? (size_t)printed : 0;
        if (used >= SHAPE_TEXT_BYTES)
            return;
    }
    snprintf(text + used, SHAPE_TEXT_BYTES - used, rank == 0 ? "[]" : "]");
}

static bool fits(const struct wire_infer_input *input, const struct layout *layout)
{
    bool all = input->rank == ARRAY_LEN(layout->shape);
    for (size_t i = 0; all && i < ARRAY_LEN(layout->shape); i++)
        all =
            layout->shape[i] == TOKENS ? input->shape[i] >= 0 : input->shape[i] == layout->shape[i];
    return all;
}

// "[T, 4, 512] (TGR) or [4, T, 512] (GTR)"
static void list_layouts(const struct layout *layouts, size_t layouts_n, char *text, size_t bytes)
{
    text[0] = '\0';
    for (size_t i = 0; i < layouts_n; i++) {
        char shape[SHAPE_TEXT_BYTES];
        print_shape(layouts[i].shape, ARRAY_LEN(layouts[i].shape), shape);
        size_t used = strlen(text);
        snprintf(text + used, bytes - used, "%s%s (%s)", i > 0 ? " or " : "", shape,
                 layouts[i].name);
    }
}

// `parameter` is the request's of that name. The input's own parameter says the same.
static enum status named_layout(const struct wire_infer_input *input, const char *parameter,
                                const char *given, const char **name, struct error *err)
{
    *name = input->layout[0] ? input->layout : given;
    if (input->layout[0] && given[0] && strcmp(input->layout, given) != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, parameter,
                           "\"%s\", and the input's own layout is \"%s\"", given, input->layout);
    return STATUS_OK;
}

// The one layout that is named, or that the shape fits.
static enum status choose_layout(const struct wire_infer_input *input, const char *parameter,
                                 const char *given, const struct layout *layouts, size_t layouts_n,
                                 const struct layout **chosen, struct error *err)
{
    const char *name;
    enum status status = named_layout(input, parameter, given, &name, err);
    if (status != STATUS_OK)
        return status;
    char expected[2 * SHAPE_TEXT_BYTES + 32], shape[SHAPE_TEXT_BYTES];
    size_t candidates_n = 0, fitting = 0;
    for (size_t i = 0; i < layouts_n; i++) {
        if (name[0] && strcmp(name, layouts[i].name) != 0)
            continue;
        candidates_n++;
        if (fits(input, &layouts[i])) {
            *chosen = &layouts[i];
            fitting++;
        } else if (name[0]) {
            list_layouts(&layouts[i], 1, expected, sizeof expected);
        }
    }
    if (fitting == 1)
        return STATUS_OK;
    print_shape(input->shape, input->rank, shape);
    if (candidates_n == 0) {
        list_layouts(layouts, layouts_n, expected, sizeof expected);
        return error_field(err, STATUS_INVALID_ARGUMENT, parameter,
                           "\"%s\" is no layout of %s %s; expected %s", name, input->datatype,
                           input->name, expected);
    }
    if (fitting == 0) {
        if (!name[0])
            list_layouts(layouts, layouts_n, expected, sizeof expected);
        return error_field(err, STATUS_INVALID_ARGUMENT, input->name,
                           "shape %s, expected %s for %s", shape, expected, input->datatype);
    }
    return error_field(err, STATUS_INVALID_ARGUMENT, parameter,
                       "not given, and shape %s of %s fits %s and %s alike", shape, input->name,
                       layouts[0].name, layouts[1].name);
}

// ---- tensors

static enum status check_dtype(const struct wire_infer_input *input, const char *expected,
                               struct error *err)
{
    if (input->dtype[0] == '\0' || strcmp(input->dtype, expected) == 0)
        return STATUS_OK;
    return error_field(err, STATUS_UNIMPLEMENTED, input->name,
                       "dtype \"%s\" is not supported with datatype %s; supported is \"%s\"",
                       input->dtype, input->datatype, expected);
}

static enum status refuse_datatype(const struct wire_infer_input *input, const char *supported,
                                   struct error *err)
{
    if (input->datatype[0] == '\0')
        return error_field(err, STATUS_INVALID_ARGUMENT, input->name,
                           "datatype not given; expected %s", supported);
    return error_field(err, STATUS_UNIMPLEMENTED, input->name,
                       "datatype \"%s\" is not supported; supported are %s", input->datatype,
                       supported);
}

static enum status translate_activations(const struct wire_infer *infer,
                                         const struct wire_infer_input *input,
                                         const struct weight *weight, uint32_t groups,
                                         struct wire_request *request, struct error *err)
{
    if (strcmp(input->datatype, "UINT8") != 0 && strcmp(input->datatype, "FP8_E4M3") != 0)
        return refuse_datatype(input, "UINT8, FP8_E4M3", err);
    enum status status = check_dtype(input, "FP8_E4M3", err);
    if (status != STATUS_OK)
        return status;
    int64_t reduced_dim = weight->format.reduced_dim;
    const struct layout layouts[] = {
        {"TGR", EINSUM_ACTIVATIONS_TGR, {TOKENS, groups, reduced_dim}},
        {"GTR", EINSUM_ACTIVATIONS_GTR, {groups, TOKENS, reduced_dim}},
    };
    // One token of one group is the same bytes in both.
    bool alike = input->rank == 3 && input->shape[0] == 1 && input->shape[1] == 1;
    const struct layout *layout;
    status = choose_layout(
        input, "activation_layout", infer->activation_layout, layouts,
        alike && !input->layout[0] && !infer->activation_layout[0] ? 1 : ARRAY_LEN(layouts),
        &layout, err);
    if (status != STATUS_OK)
        return status;
    int64_t tokens = input->shape[layout->value == EINSUM_ACTIVATIONS_TGR ? 0 : 1];
    if (tokens > EINSUM_TOKENS_MAX)
        return error_field(err, STATUS_INVALID_ARGUMENT, input->name,
                           "expected at most %d tokens, got %" PRId64, EINSUM_TOKENS_MAX, tokens);
    request->activation_layout = layout->value;
    request->tokens = (uint32_t)tokens;
    request->activations.bytes =
        einsum_activation_bytes(request->tokens, groups, weight->format.reduced_dim);
    return STATUS_OK;
}

static enum status translate_scales(const struct wire_infer *infer,
                                    const struct wire_infer_input *input,
                                    const struct weight *weight, uint32_t groups,
                                    struct wire_request *request, struct error *err)
{
    int64_t blocks = weight->format.reduced_dim / weight->format.block_r;
    bool fp32 = strcmp(input->datatype, "FP32") == 0, words = strcmp(input->datatype, "INT32") == 0;
    bool bytes = strcmp(input->datatype, "UINT8") == 0 || strcmp(input->datatype, "UE8M0") == 0;
    if (!fp32 && !words && !bytes)
        return refuse_datatype(input, "FP32, UINT8, UE8M0, INT32 (four UE8M0 to a word)", err);
    enum status status = check_dtype(input, fp32 ? "FP32" : "UE8M0", err);
    if (status != STATUS_OK)
        return status;
    if (words && blocks % 4 != 0)
        return error_field(
            err, STATUS_INVALID_ARGUMENT, input->name,
            "INT32 packs 4 scales to a word, and K = %" PRId64 " is no multiple of 4", blocks);
    int64_t columns = words ? blocks / 4 : blocks;
    const struct layout layouts[] = {
        {"TGK", EINSUM_SCALES_TGK, {request->tokens, groups, columns}},
        {"GKT", EINSUM_SCALES_GKT, {groups, columns, (int64_t)einsum_align4(request->tokens)}},
    };
    const struct layout *layout;
    status = choose_layout(input, "scale_layout", infer->scale_layout, layouts,
                           bytes ? 1 : ARRAY_LEN(layouts), &layout, err);
    if (status != STATUS_OK)
        return status;
    request->scale_layout = layout->value;
    request->scale_type = fp32 ? EINSUM_SCALE_FP32 : EINSUM_SCALE_UE8M0;
    request->activation_scales.bytes = einsum_scale_bytes(
        (enum einsum_scale_layout)request->scale_layout,
        (enum einsum_scale_type)request->scale_type, request->tokens, groups, (uint64_t)blocks);
    return STATUS_OK;
}

// The inputs in the order of our own, whatever theirs is.
static enum status sort_inputs(const struct wire_infer *infer,
                               const struct wire_infer_input *inputs[2], struct error *err)
{
    const char *const names[2] = {inference_activations, inference_scales};
    inputs[0] = inputs[1] = NULL;
    for (uint32_t i = 0; i < infer->inputs_n; i++) {
        const struct wire_infer_input *input = &infer->inputs[i];
        int which = strcmp(input->name, names[0]) == 0   ? 0
                    : strcmp(input->name, names[1]) == 0 ? 1
                                                         : -1;
        if (which < 0)
            return error_field(err, STATUS_INVALID_ARGUMENT, "inputs",
                               "\"%s\" is no input; expected %s and %s", input->name, names[0],
                               names[1]);
        if (inputs[which])
            return error_field(err, STATUS_INVALID_ARGUMENT, names[which], "given twice");
        inputs[which] = input;
    }
    for (int which = 0; which < 2; which++)
        if (!inputs[which])
            return error_field(err, STATUS_INVALID_ARGUMENT, names[which],
                               "not given; expected inputs %s and %s", names[0], names[1]);
    return STATUS_OK;
}

// ---- where the bytes lie

static enum status check_listed(const struct wire_infer_input *input, uint64_t bytes,
                                struct error *err)
{
    if (bytes > 0 && !input->contents)
        return error_field(err, STATUS_INVALID_ARGUMENT, input->name,
                           "not given: neither raw_input_contents nor contents");
    if (strcmp(input->datatype, "FP8_E4M3") == 0 || strcmp(input->datatype, "UE8M0") == 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, input->name,
                           "%s has no list of numbers; expected raw_input_contents, or UINT8",
                           input->datatype);
    return STATUS_OK;
}

static enum status place_inputs(const struct wire_infer *infer,
                                const struct wire_infer_input *inputs[2],
                                struct wire_request *request, bool *listed, struct error *err)
{
    struct wire_range *const ranges[2] = {&request->activations, &request->activation_scales};
    *listed = infer->raw_n == 0;
    if (!*listed && infer->raw_n != infer->inputs_n)
        return error_field(err, STATUS_INVALID_ARGUMENT, "raw_input_contents",
                           "expected %u, one for each input, got %u", infer->inputs_n,
                           infer->raw_n);
    for (int i = 0; i < 2; i++) {
        if (*listed) {
            enum status status = check_listed(inputs[i], ranges[i]->bytes, err);
            if (status != STATUS_OK)
                return status;
        } else if (inputs[i]->contents) {
            return error_field(err, STATUS_INVALID_ARGUMENT, inputs[i]->name,
                               "contents given, and raw_input_contents as well");
        } else {
            *ranges[i] = infer->raw[inputs[i] - infer->inputs];
        }
    }
    if (*listed)
        request->activation_scales.offset = request->activations.bytes;
    return STATUS_OK;
}

// ---- the rest

static enum status translate_output(const struct wire_infer *infer, struct wire_request *request,
                                    struct error *err)
{
    if (infer->outputs_n > 0 && strcmp(infer->output_name, inference_output) != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "outputs",
                           "\"%s\" is no output; expected %s", infer->output_name,
                           inference_output);
    const char *dtype = infer->dtype[0] ? infer->dtype : infer->output_dtype;
    if (infer->dtype[0] && infer->output_dtype[0] && strcmp(infer->dtype, infer->output_dtype) != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "output_dtype",
                           "\"%s\", and the output's own dtype is \"%s\"", infer->output_dtype,
                           infer->dtype);
    if (dtype[0] == '\0' || strcmp(dtype, inference_datatype(EINSUM_OUTPUT_BF16)) == 0)
        request->output_type = EINSUM_OUTPUT_BF16;
    else if (strcmp(dtype, inference_datatype(EINSUM_OUTPUT_FP32)) == 0)
        request->output_type = EINSUM_OUTPUT_FP32;
    else
        return error_field(err, STATUS_UNIMPLEMENTED, "output_dtype",
                           "\"%s\" is not supported; supported are BF16, FP32", dtype);
    return STATUS_OK;
}

const char *inference_datatype(int32_t output_type)
{
    return output_type == EINSUM_OUTPUT_FP32 ? "FP32" : "BF16";
}

// Triton counts downwards: 1 is served first.
static enum status translate_priority(const struct wire_infer *infer, struct wire_request *request,
                                      struct error *err)
{
    static const enum job_priority priorities[] = {JOB_PRIORITY_UNSET, JOB_PRIORITY_HIGH,
                                                   JOB_PRIORITY_NORMAL, JOB_PRIORITY_LOW};
    if (infer->priority >= ARRAY_LEN(priorities))
        return error_field(err, STATUS_INVALID_ARGUMENT, "priority",
                           "expected 1 (first), 2 or 3, got %" PRIu64, infer->priority);
    request->priority = (int32_t)priorities[infer->priority];
    return STATUS_OK;
}

static enum status translate_sum(const char *name, const struct wire_infer_sum *from,
                                 struct wire_sum *to, struct error *err)
{
    *to = (struct wire_sum){.given = from->given, .crc32c = (uint32_t)from->value};
    if (from->value <= UINT32_MAX)
        return STATUS_OK;
    return error_field(err, STATUS_INVALID_ARGUMENT, name, "expected 32 bits, got %" PRIu64,
                       from->value);
}

static enum status translate_sums(const struct wire_infer *infer, struct wire_request *request,
                                  struct error *err)
{
    request->output_sum = infer->output_crc32c;
    enum status status =
        translate_sum("activations_crc32c", &infer->activations_crc32c, &request->first_sum, err);
    if (status == STATUS_OK)
        status = translate_sum("activation_scales_crc32c", &infer->scales_crc32c,
                               &request->second_sum, err);
    return status;
}

static uint32_t saturate(uint64_t value)
{
    return value > UINT32_MAX ? UINT32_MAX : (uint32_t)value;
}

enum status inference_translate(const struct wire_infer *infer, const struct weight *weight,
                                struct wire_request *request, bool *listed, struct error *err)
{
    memset(request, 0, sizeof *request);
    request->kind = WIRE_EINSUM;
    strcpy(request->weight, weight->name);
    strcpy(request->equation, request_equation);
    strcpy(request->kernel, infer->kernel);
    request->recipe = (int32_t)inference_recipe(weight);
    request->group_begin = saturate(infer->group_begin);
    request->group_end = saturate(infer->group_end);
    request->timeout_us = infer->timeout_us;
    enum status status = translate_priority(infer, request, err);
    if (status == STATUS_OK)
        status = translate_output(infer, request, err);
    if (status == STATUS_OK)
        status = translate_sums(infer, request, err);
    struct einsum_operand operand;
    if (status == STATUS_OK)
        status =
            request_check_groups(request->group_begin, request->group_end, weight, &operand, err);
    const struct wire_infer_input *inputs[2];
    if (status == STATUS_OK)
        status = sort_inputs(infer, inputs, err);
    if (status == STATUS_OK)
        status = translate_activations(infer, inputs[0], weight, operand.groups, request, err);
    if (status == STATUS_OK)
        status = translate_scales(infer, inputs[1], weight, operand.groups, request, err);
    if (status == STATUS_OK)
        status = place_inputs(infer, inputs, request, listed, err);
    return status;
}

// ---- lists of numbers

enum status inference_converted_bytes(uint64_t message_bytes, const struct wire_request *request,
                                      uint64_t *bytes, struct error *err)
{
    *bytes = request->activations.bytes + request->activation_scales.bytes;
    if (*bytes / sizeof(uint32_t) <= message_bytes) // a number takes a byte at least
        return STATUS_OK;
    return error_field(err, STATUS_INVALID_ARGUMENT, "inputs",
                       "contents: expected lists of %" PRIu64
                       " bytes by the shapes, in a message of %" PRIu64,
                       *bytes, message_bytes);
}

enum status inference_convert(const grpc_slice *slices, size_t slices_n,
                              const struct wire_infer *infer, const struct wire_request *request,
                              uint8_t *to, struct error *err)
{
    for (uint32_t i = 0; i < infer->inputs_n; i++) {
        const struct wire_infer_input *input = &infer->inputs[i];
        struct wire_range range = strcmp(input->name, inference_activations) == 0
                                      ? request->activations
                                      : request->activation_scales;
        enum wire_infer_list list = strcmp(input->datatype, "FP32") == 0    ? WIRE_INFER_FP32
                                    : strcmp(input->datatype, "INT32") == 0 ? WIRE_INFER_INT32
                                                                            : WIRE_INFER_UINT8;
        enum status status =
            wire_infer_convert(slices, slices_n, input, list, to + range.offset, range.bytes, err);
        if (status != STATUS_OK)
            return status;
    }
    return STATUS_OK;
}
