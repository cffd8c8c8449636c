// The walk over a ModelInferRequest, and the writer of a ModelInferResponse's head.
//
// Owns no memory and no state; any thread. The bytes come from the network and are hostile.
//
//     ModelInferRequest   model_name, id, ...       copied
//         parameters      map entry -> parameter -> a rule's member, if its name is known
//         inputs          name, datatype, shape, parameters copied; contents noted, for later
//         raw_input_contents                        noted: where each lies
#include "wire_inference.h"

#include <inttypes.h>
#include <string.h>

// ---- parameters

enum {
    PARAMETER_KEY_BYTES_MAX = 32, // longer ones are not known
    PARAMETER_TEXT_BYTES_MAX = WIRE_KERNEL_BYTES_MAX,
};

// What an InferParameter holds: its field's number.
enum parameter_kind {
    PARAMETER_NONE = 0,
    PARAMETER_BOOL = 1,
    PARAMETER_INT64 = 2,
    PARAMETER_STRING = 3,
    PARAMETER_DOUBLE = 4,
    PARAMETER_UINT64 = 5,
};

struct parameter {
    char key[PARAMETER_KEY_BYTES_MAX + 1];
    enum parameter_kind kind;
    uint64_t value;                          // of numbers, as they travel
    char text[PARAMETER_TEXT_BYTES_MAX + 1]; // of a string
    uint64_t text_bytes;                     // more than the maximum: `text` is not it
};

enum rule_kind { RULE_TEXT, RULE_NUMBER, RULE_BOOL, RULE_SUM, RULE_REFUSED };

struct rule {
    const char *key;
    const char *name; // in errors
    enum rule_kind kind;
    size_t to;        // in what the parameters belong to
    size_t bytes_max; // of RULE_TEXT, without its terminator
};

static const struct rule request_rules[] = {
    {"activation_layout", "activation_layout", RULE_TEXT,
     offsetof(struct wire_infer, activation_layout), WIRE_INFER_TYPE_BYTES_MAX},
    {"scale_layout", "scale_layout", RULE_TEXT, offsetof(struct wire_infer, scale_layout),
     WIRE_INFER_TYPE_BYTES_MAX},
    {"output_dtype", "output_dtype", RULE_TEXT, offsetof(struct wire_infer, output_dtype),
     WIRE_INFER_TYPE_BYTES_MAX},
    {"kernel", "kernel", RULE_TEXT, offsetof(struct wire_infer, kernel), WIRE_KERNEL_BYTES_MAX},
    {"group_begin", "group_begin", RULE_NUMBER, offsetof(struct wire_infer, group_begin), 0},
    {"group_end", "group_end", RULE_NUMBER, offsetof(struct wire_infer, group_end), 0},
    {"priority", "priority", RULE_NUMBER, offsetof(struct wire_infer, priority), 0},
    {"timeout", "timeout", RULE_NUMBER, offsetof(struct wire_infer, timeout_us), 0},
    {"activations_crc32c", "activations_crc32c", RULE_SUM,
     offsetof(struct wire_infer, activations_crc32c), 0},
    {"activation_scales_crc32c", "activation_scales_crc32c", RULE_SUM,
     offsetof(struct wire_infer, scales_crc32c), 0},
    {"output_crc32c", "output_crc32c", RULE_BOOL, offsetof(struct wire_infer, output_crc32c), 0},
    {"sequence_id", "sequence_id", RULE_REFUSED, 0, 0},
    {"sequence_start", "sequence_start", RULE_REFUSED, 0, 0},
    {"sequence_end", "sequence_end", RULE_REFUSED, 0, 0},
    {0},
};

static const struct rule input_rules[] = {
    {"dtype", "inputs.dtype", RULE_TEXT, offsetof(struct wire_infer_input, dtype),
     WIRE_INFER_TYPE_BYTES_MAX},
    {"layout", "inputs.layout", RULE_TEXT, offsetof(struct wire_infer_input, layout),
     WIRE_INFER_TYPE_BYTES_MAX},
    {"shared_memory_region", "inputs.shared_memory_region", RULE_REFUSED, 0, 0},
    {0},
};

static const struct rule output_rules[] = {
    {"dtype", "outputs.dtype", RULE_TEXT, offsetof(struct wire_infer, dtype),
     WIRE_INFER_TYPE_BYTES_MAX},
    {"classification", "outputs.classification", RULE_REFUSED, 0, 0},
    {"shared_memory_region", "outputs.shared_memory_region", RULE_REFUSED, 0, 0},
    {0},
};

static enum status take_string(struct wire_cursor *cursor, const struct wire_field *field,
                               const char *name, struct parameter *parameter, struct error *err)
{
    parameter->text_bytes = field->range.bytes;
    if (field->range.bytes <= PARAMETER_TEXT_BYTES_MAX)
        return wire_take_text(cursor, field, name, PARAMETER_TEXT_BYTES_MAX, parameter->text, err);
    wire_skip(cursor, field->range.bytes);
    return STATUS_OK;
}

// An InferParameter: the last of its alternatives counts.
static enum status read_choice(struct wire_cursor *cursor, uint64_t end, const char *name,
                               struct parameter *parameter, struct error *err)
{
    static const enum wire_type types[] = {
        [PARAMETER_BOOL] = WIRE_VARINT,   [PARAMETER_INT64] = WIRE_VARINT,
        [PARAMETER_STRING] = WIRE_BYTES,  [PARAMETER_DOUBLE] = WIRE_FIXED64,
        [PARAMETER_UINT64] = WIRE_VARINT,
    };
    while (cursor->offset < end) {
        struct wire_field field;
        enum status status = wire_read_tag(cursor, end, &field, err);
        if (status)
            return status;
        if (field.number >= ARRAY_LEN(types)) {
            status = wire_skip_field(cursor, end, &field, err);
        } else {
            status = wire_expect_type(&field, name, types[field.number], err);
            if (!status)
                status = wire_read_value(cursor, end, name, &field, err);
            parameter->kind = (enum parameter_kind)field.number;
            parameter->value = field.value;
            if (!status && parameter->kind == PARAMETER_STRING)
                status = take_string(cursor, &field, name, parameter, err);
        }
        if (status)
            return status;
    }
    return STATUS_OK;
}

static enum status take_key(struct wire_cursor *cursor, const struct wire_field *field,
                            const char *name, struct parameter *parameter, struct error *err)
{
    parameter->key[0] = '\0';
    if (field->range.bytes <= PARAMETER_KEY_BYTES_MAX)
        return wire_take_text(cursor, field, name, PARAMETER_KEY_BYTES_MAX, parameter->key, err);
    wire_skip(cursor, field->range.bytes);
    return STATUS_OK;
}

// An entry of a map: its key and its value, in either order.
static enum status read_entry(struct wire_cursor *cursor, uint64_t end, const char *name,
                              struct parameter *parameter, struct error *err)
{
    enum { KEY = 1, VALUE = 2 };
    while (cursor->offset < end) {
        struct wire_field field;
        enum status status = wire_read_tag(cursor, end, &field, err);
        if (status)
            return status;
        if (field.number != KEY && field.number != VALUE) {
            status = wire_skip_field(cursor, end, &field, err);
        } else {
            status = wire_expect_type(&field, name, WIRE_BYTES, err);
            if (!status)
                status = wire_read_value(cursor, end, name, &field, err);
            if (!status)
                status = field.number == KEY
                             ? take_key(cursor, &field, name, parameter, err)
                             : read_choice(cursor, field.range.offset + field.range.bytes, name,
                                           parameter, err);
        }
        if (status)
            return status;
    }
    return STATUS_OK;
}

static enum status apply_text(const struct parameter *parameter, const struct rule *rule, char *to,
                              struct error *err)
{
    if (parameter->kind != PARAMETER_STRING)
        return error_field(err, STATUS_INVALID_ARGUMENT, rule->name,
                           "expected a string (string_param)");
    if (parameter->text_bytes > rule->bytes_max)
        return error_field(err, STATUS_INVALID_ARGUMENT, rule->name,
                           "%" PRIu64 " bytes, at most %zu", parameter->text_bytes,
                           rule->bytes_max);
    memcpy(to, parameter->text, (size_t)parameter->text_bytes + 1);
    return STATUS_OK;
}

static enum status apply_number(const struct parameter *parameter, const struct rule *rule,
                                void *to, struct error *err)
{
    if (parameter->kind != PARAMETER_INT64 && parameter->kind != PARAMETER_UINT64)
        return error_field(err, STATUS_INVALID_ARGUMENT, rule->name,
                           "expected a number (int64_param or uint64_param)");
    if (parameter->kind == PARAMETER_INT64 && parameter->value > INT64_MAX)
        return error_field(err, STATUS_INVALID_ARGUMENT, rule->name, "expected 0 or more, got %lld",
                           (long long)parameter->value);
    memcpy(to, &parameter->value, sizeof parameter->value);
    return STATUS_OK;
}

static enum status apply_bool(const struct parameter *parameter, const struct rule *rule, bool *to,
                              struct error *err)
{
    if (parameter->kind != PARAMETER_BOOL)
        return error_field(err, STATUS_INVALID_ARGUMENT, rule->name,
                           "expected a bool (bool_param)");
    *to = parameter->value != 0;
    return STATUS_OK;
}

static enum status apply_sum(const struct parameter *parameter, const struct rule *rule,
                             struct wire_infer_sum *to, struct error *err)
{
    to->given = true;
    return apply_number(parameter, rule, &to->value, err);
}

// Whether a parameter says more than that there is none: 0, false and "" do not.
static bool says_something(const struct parameter *parameter)
{
    return parameter->kind == PARAMETER_STRING ? parameter->text_bytes > 0 : parameter->value != 0;
}

static enum status read_parameter(struct wire_cursor *cursor, const struct wire_field *field,
                                  const char *name, const struct rule *rule, void *owner,
                                  struct error *err)
{
    struct parameter parameter;
    parameter.key[0] = parameter.text[0] = '\0';
    parameter.kind = PARAMETER_NONE;
    parameter.value = parameter.text_bytes = 0;
    enum status status =
        read_entry(cursor, field->range.offset + field->range.bytes, name, &parameter, err);
    if (status)
        return status;
    while (rule->key && strcmp(rule->key, parameter.key) != 0)
        rule++;
    if (!rule->key)
        return STATUS_OK;
    void *to = (char *)owner + rule->to;
    switch (rule->kind) {
    case RULE_TEXT:
        return apply_text(&parameter, rule, to, err);
    case RULE_NUMBER:
        return apply_number(&parameter, rule, to, err);
    case RULE_BOOL:
        return apply_bool(&parameter, rule, to, err);
    case RULE_SUM:
        return apply_sum(&parameter, rule, to, err);
    case RULE_REFUSED:
        break;
    }
    if (!says_something(&parameter))
        return STATUS_OK;
    return error_field(err, STATUS_UNIMPLEMENTED, rule->name, "not supported by this server");
}

// ---- the request

// Reads the head of a field that is all of WIRE_BYTES.
static enum status begin_bytes(struct wire_cursor *cursor, uint64_t end, const char *name,
                               struct wire_field *field, struct error *err)
{
    enum status status = wire_expect_type(field, name, WIRE_BYTES, err);
    return status ? status : wire_read_value(cursor, end, name, field, err);
}

static enum status add_dimension(struct wire_infer_input *input, uint64_t value, struct error *err)
{
    if (input->rank == WIRE_INFER_RANK_MAX)
        return error_field(err, STATUS_INVALID_ARGUMENT, "inputs.shape",
                           "more than %d dimensions; expected 3", WIRE_INFER_RANK_MAX);
    input->shape[input->rank++] = (int64_t)value;
    return STATUS_OK;
}

// Packed, as all send it today, or one by one.
static enum status read_shape(struct wire_cursor *cursor, uint64_t end, struct wire_field *field,
                              struct wire_infer_input *input, struct error *err)
{
    static const char name[] = "inputs.shape";
    if (field->type != WIRE_BYTES) {
        enum status status = wire_expect_type(field, name, WIRE_VARINT, err);
        if (!status)
            status = wire_read_value(cursor, end, name, field, err);
        return status ? status : add_dimension(input, field->value, err);
    }
    enum status status = wire_read_value(cursor, end, name, field, err);
    uint64_t packed_end = field->range.offset + field->range.bytes;
    while (!status && cursor->offset < packed_end) {
        struct wire_field element = {.type = WIRE_VARINT, .offset = cursor->offset};
        status = wire_read_value(cursor, packed_end, name, &element, err);
        if (!status)
            status = add_dimension(input, element.value, err);
    }
    return status;
}

enum { INPUT_NAME = 1, INPUT_DATATYPE, INPUT_SHAPE, INPUT_PARAMETERS, INPUT_CONTENTS };

static enum status read_input_field(struct wire_cursor *cursor, uint64_t end,
                                    struct wire_field *field, struct wire_infer_input *input,
                                    struct error *err)
{
    static const char *const names[] = {
        [INPUT_NAME] = "inputs.name",
        [INPUT_DATATYPE] = "inputs.datatype",
        [INPUT_PARAMETERS] = "inputs.parameters",
        [INPUT_CONTENTS] = "inputs.contents",
    };
    if (field->number > INPUT_CONTENTS)
        return wire_skip_field(cursor, end, field, err);
    if (field->number == INPUT_SHAPE)
        return read_shape(cursor, end, field, input, err);
    const char *name = names[field->number];
    enum status status = begin_bytes(cursor, end, name, field, err);
    if (status)
        return status;
    switch (field->number) {
    case INPUT_NAME:
        return wire_take_text(cursor, field, name, WIRE_INFER_NAME_BYTES_MAX, input->name, err);
    case INPUT_DATATYPE:
        return wire_take_text(cursor, field, name, WIRE_INFER_TYPE_BYTES_MAX, input->datatype, err);
    case INPUT_PARAMETERS:
        return read_parameter(cursor, field, name, input_rules, input, err);
    default:
        input->contents = true;
        wire_skip(cursor, field->range.bytes);
        return STATUS_OK;
    }
}

static enum status read_input(struct wire_cursor *cursor, const struct wire_field *field,
                              struct wire_infer *infer, struct error *err)
{
    if (infer->inputs_n == WIRE_INFER_INPUTS_MAX)
        return error_field(err, STATUS_INVALID_ARGUMENT, "inputs",
                           "more than %d tensors; expected activations and activation_scales",
                           WIRE_INFER_INPUTS_MAX);
    struct wire_infer_input *input = &infer->inputs[infer->inputs_n++];
    input->message = field->range;
    uint64_t end = field->range.offset + field->range.bytes;
    while (cursor->offset < end) {
        struct wire_field inner;
        enum status status = wire_read_tag(cursor, end, &inner, err);
        if (!status)
            status = read_input_field(cursor, end, &inner, input, err);
        if (status)
            return status;
    }
    return STATUS_OK;
}

static enum status read_output(struct wire_cursor *cursor, const struct wire_field *field,
                               struct wire_infer *infer, struct error *err)
{
    enum { NAME = 1, PARAMETERS = 2 };
    if (infer->outputs_n++ > 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "outputs",
                           "more than one tensor; expected output");
    uint64_t end = field->range.offset + field->range.bytes;
    while (cursor->offset < end) {
        struct wire_field inner;
        enum status status = wire_read_tag(cursor, end, &inner, err);
        if (status)
            return status;
        const char *name = inner.number == NAME ? "outputs.name" : "outputs.parameters";
        if (inner.number != NAME && inner.number != PARAMETERS) {
            status = wire_skip_field(cursor, end, &inner, err);
        } else {
            status = begin_bytes(cursor, end, name, &inner, err);
            if (!status)
                status = inner.number == NAME
                             ? wire_take_text(cursor, &inner, name, WIRE_INFER_NAME_BYTES_MAX,
                                              infer->output_name, err)
                             : read_parameter(cursor, &inner, name, output_rules, infer, err);
        }
        if (status)
            return status;
    }
    return STATUS_OK;
}

static void note_raw(struct wire_cursor *cursor, const struct wire_field *field,
                     struct wire_infer *infer)
{
    if (infer->raw_n < WIRE_INFER_INPUTS_MAX)
        infer->raw[infer->raw_n] = field->range;
    infer->raw_n++;
    wire_skip(cursor, field->range.bytes);
}

enum {
    REQUEST_MODEL_NAME = 1,
    REQUEST_MODEL_VERSION,
    REQUEST_ID,
    REQUEST_PARAMETERS,
    REQUEST_INPUTS,
    REQUEST_OUTPUTS,
    REQUEST_RAW,
};

static enum status read_request_field(struct wire_cursor *cursor, uint64_t end,
                                      struct wire_field *field, struct wire_infer *infer,
                                      struct error *err)
{
    static const char *const names[] = {
        [REQUEST_MODEL_NAME] = "model_name",
        [REQUEST_MODEL_VERSION] = "model_version",
        [REQUEST_ID] = "id",
        [REQUEST_PARAMETERS] = "parameters",
        [REQUEST_INPUTS] = "inputs",
        [REQUEST_OUTPUTS] = "outputs",
        [REQUEST_RAW] = "raw_input_contents",
    };
    if (field->number > REQUEST_RAW)
        return wire_skip_field(cursor, end, field, err);
    const char *name = names[field->number];
    enum status status = begin_bytes(cursor, end, name, field, err);
    if (status)
        return status;
    switch (field->number) {
    case REQUEST_MODEL_NAME:
        return wire_take_text(cursor, field, name, WIRE_WEIGHT_BYTES_MAX, infer->model_name, err);
    case REQUEST_MODEL_VERSION:
        return wire_take_text(cursor, field, name, WIRE_INFER_VERSION_BYTES_MAX,
                              infer->model_version, err);
    case REQUEST_ID:
        return wire_take_text(cursor, field, name, WIRE_INFER_ID_BYTES_MAX, infer->id, err);
    case REQUEST_PARAMETERS:
        return read_parameter(cursor, field, name, request_rules, infer, err);
    case REQUEST_INPUTS:
        return read_input(cursor, field, infer, err);
    case REQUEST_OUTPUTS:
        return read_output(cursor, field, infer, err);
    default:
        note_raw(cursor, field, infer);
        return STATUS_OK;
    }
}

enum status wire_read_infer(const grpc_slice *slices, size_t slices_n, struct wire_infer *infer,
                            struct error *err)
{
    memset(infer, 0, sizeof *infer);
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, slices, slices_n);
    uint64_t end = wire_bytes(slices, slices_n);
    while (cursor.offset < end) {
        struct wire_field field;
        enum status status = wire_read_tag(&cursor, end, &field, err);
        if (!status)
            status = read_request_field(&cursor, end, &field, infer, err);
        if (status)
            return status;
    }
    return STATUS_OK;
}

// ---- contents

// Where the numbers of a list go, one by one.
struct conversion {
    const char *name; // the input's
    enum wire_infer_list list;
    uint32_t element_bytes;
    uint8_t *to;
    uint64_t elements_max, elements; // elements beyond the maximum are counted, not written
};

static enum status put_element(struct conversion *conversion, uint64_t value, struct error *err)
{
    if (conversion->list == WIRE_INFER_UINT8 && value > UINT8_MAX)
        return error_field(err, STATUS_INVALID_ARGUMENT, conversion->name,
                           "contents: element %" PRIu64 " is %" PRIu64 ", expected 0 to 255",
                           conversion->elements, value);
    uint64_t at = conversion->elements++ * conversion->element_bytes;
    if (conversion->elements <= conversion->elements_max)
        for (uint32_t i = 0; i < conversion->element_bytes; i++)
            conversion->to[at + i] = (uint8_t)(value >> (8 * i));
    return STATUS_OK;
}

// Packed, as all send it today, or one by one.
static enum status convert_list(struct wire_cursor *cursor, uint64_t end, struct wire_field *field,
                                struct conversion *conversion, struct error *err)
{
    enum wire_type type = conversion->list == WIRE_INFER_FP32 ? WIRE_FIXED32 : WIRE_VARINT;
    if (field->type != WIRE_BYTES) {
        enum status status = wire_expect_type(field, conversion->name, type, err);
        if (!status)
            status = wire_read_value(cursor, end, conversion->name, field, err);
        return status ? status : put_element(conversion, field->value, err);
    }
    enum status status = wire_read_value(cursor, end, conversion->name, field, err);
    uint64_t packed_end = field->range.offset + field->range.bytes;
    while (!status && cursor->offset < packed_end) {
        struct wire_field element = {.type = type, .offset = cursor->offset};
        status = wire_read_value(cursor, packed_end, conversion->name, &element, err);
        if (!status)
            status = put_element(conversion, element.value, err);
    }
    return status;
}

static const char *const list_names[] = {
    NULL,
    "bool_contents",
    "int_contents",
    "int64_contents",
    "uint_contents",
    "uint64_contents",
    "fp32_contents",
    "fp64_contents",
    "bytes_contents",
};

// An InferTensorContents.
static enum status convert_contents(struct wire_cursor *cursor, uint64_t end,
                                    struct conversion *conversion, struct error *err)
{
    while (cursor->offset < end) {
        struct wire_field field;
        enum status status = wire_read_tag(cursor, end, &field, err);
        if (status)
            return status;
        if (field.number == (uint32_t)conversion->list)
            status = convert_list(cursor, end, &field, conversion, err);
        else if (field.number < ARRAY_LEN(list_names))
            return error_field(err, STATUS_INVALID_ARGUMENT, conversion->name,
                               "contents: expected %s for this datatype, got %s",
                               list_names[conversion->list], list_names[field.number]);
        else
            status = wire_skip_field(cursor, end, &field, err);
        if (status)
            return status;
    }
    return STATUS_OK;
}

enum status wire_infer_convert(const grpc_slice *slices, size_t slices_n,
                               const struct wire_infer_input *input, enum wire_infer_list list,
                               void *to, uint64_t bytes, struct error *err)
{
    struct conversion conversion = {
        .name = input->name,
        .list = list,
        .element_bytes = list == WIRE_INFER_UINT8 ? 1 : 4,
        .to = to,
    };
    conversion.elements_max = bytes / conversion.element_bytes;
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, slices, slices_n);
    wire_skip(&cursor, input->message.offset);
    uint64_t end = input->message.offset + input->message.bytes;
    while (cursor.offset < end) {
        struct wire_field field;
        enum status status = wire_read_tag(&cursor, end, &field, err);
        if (!status && field.number != INPUT_CONTENTS)
            status = wire_skip_field(&cursor, end, &field, err);
        else if (!status)
            status = wire_read_value(&cursor, end, input->name, &field, err);
        if (!status && field.number == INPUT_CONTENTS)
            status =
                convert_contents(&cursor, field.range.offset + field.range.bytes, &conversion, err);
        if (status)
            return status;
    }
    if (conversion.elements == conversion.elements_max)
        return STATUS_OK;
    return error_field(err, STATUS_INVALID_ARGUMENT, input->name,
                       "contents: expected %" PRIu64 " elements by the shape, got %" PRIu64,
                       conversion.elements_max, conversion.elements);
}

// ---- the response

static uint8_t *put_bytes(uint8_t *at, uint32_t number, const void *bytes, size_t n)
{
    at = wire_put_varint(wire_put_tag(at, number, WIRE_BYTES), n);
    memcpy(at, bytes, n);
    return at + n;
}

static uint8_t *put_text(uint8_t *at, uint32_t number, const char *text)
{
    size_t bytes = strlen(text);
    return bytes > 0 ? put_bytes(at, number, text, bytes) : at;
}

enum { CHOICE_BYTES_MAX = 3 + WIRE_INFER_KERNEL_BYTES_MAX }; // of an InferParameter, tag and all

// One entry of `parameters`; `choice` is the InferParameter.
static uint8_t *put_parameter(uint8_t *at, const char *key, const uint8_t *choice,
                              size_t choice_bytes)
{
    enum { PARAMETERS = 4, KEY = 1, VALUE = 2 };
    uint8_t entry[2 + PARAMETER_KEY_BYTES_MAX + 3 + CHOICE_BYTES_MAX];
    uint8_t *end = put_text(entry, KEY, key);
    end = put_bytes(end, VALUE, choice, choice_bytes);
    return put_bytes(at, PARAMETERS, entry, (size_t)(end - entry));
}

static uint8_t *put_number_parameter(uint8_t *at, const char *key, uint64_t value)
{
    uint8_t choice[CHOICE_BYTES_MAX];
    uint8_t *end = wire_put_varint(wire_put_tag(choice, PARAMETER_INT64, WIRE_VARINT), value);
    return put_parameter(at, key, choice, (size_t)(end - choice));
}

static uint8_t *put_batch_parameters(uint8_t *at, const struct wire_infer_response *infer,
                                     const struct wire_response *response)
{
    uint8_t choice[CHOICE_BYTES_MAX];
    at = put_number_parameter(at, "batch_tokens", response->batch_tokens);
    at = put_number_parameter(at, "batch_bucket", response->batch_bucket);
    at = put_number_parameter(at, "batch_requests", response->batch_requests);
    at = put_number_parameter(at, "queue_ns", response->queue_ns);
    at = put_number_parameter(at, "run_ns", response->run_ns);
    ASSERT(strlen(infer->kernel) <= WIRE_INFER_KERNEL_BYTES_MAX);
    uint8_t *end = put_text(choice, PARAMETER_STRING, infer->kernel);
    return put_parameter(at, "kernel", choice, (size_t)(end - choice));
}

static uint8_t *put_output(uint8_t *at, const struct wire_infer_response *infer,
                           const struct wire_response *response)
{
    enum { OUTPUTS = 5, NAME = 1, DATATYPE = 2, SHAPE = 3 };
    uint8_t shape[3 * 5], *end = shape; // of 32 bits each
    end = wire_put_varint(end, response->tokens);
    end = wire_put_varint(end, response->groups);
    end = wire_put_varint(end, response->output_dim);
    uint8_t output[2 * WIRE_INFER_NAME_BYTES_MAX], *output_end = output;
    output_end = put_text(output_end, NAME, infer->output_name);
    output_end = put_text(output_end, DATATYPE, infer->datatype);
    output_end = put_bytes(output_end, SHAPE, shape, (size_t)(end - shape));
    return put_bytes(at, OUTPUTS, output, (size_t)(output_end - output));
}

size_t wire_write_infer_head(const struct wire_infer_response *infer,
                             const struct wire_response *response,
                             uint8_t head[WIRE_INFER_HEAD_BYTES_MAX])
{
    enum { MODEL_NAME = 1, MODEL_VERSION = 2, ID = 3, RAW = 6 };
    uint8_t *at = put_text(head, MODEL_NAME, infer->model_name);
    at = put_text(at, MODEL_VERSION, infer->model_version);
    at = put_text(at, ID, infer->id);
    if (response->batch_tokens > 0)
        at = put_batch_parameters(at, infer, response);
    if (response->output_sum.given)
        at = put_number_parameter(at, "output_crc32c", response->output_sum.crc32c);
    at = put_output(at, infer, response);
    at = wire_put_varint(wire_put_tag(at, RAW, WIRE_BYTES), response->output_bytes);
    return (size_t)(at - head);
}
