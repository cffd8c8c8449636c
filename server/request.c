#include "request.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "rope.h"

const char request_equation[] = "bhr,hdr->bhd";

// The names of an enum's values from 1 on.
struct choice {
    const char *field;
    const char *names[5];
};

static const struct choice recipes = {
    "recipe", {"RECIPE_1_128_128", "RECIPE_1_1_128", "RECIPE_1_32_32", "RECIPE_1_1_32"}};
static const struct choice activation_layouts = {
    "activation_layout", {"ACTIVATION_LAYOUT_TGR", "ACTIVATION_LAYOUT_GTR"}};
static const struct choice scale_layouts = {"scale_layout",
                                            {"SCALE_LAYOUT_TGK", "SCALE_LAYOUT_GKT"}};
static const struct choice scale_types = {"scale_type", {"SCALE_TYPE_FP32", "SCALE_TYPE_UE8M0"}};
static const struct choice output_types = {"output_type", {"OUTPUT_TYPE_BF16", "OUTPUT_TYPE_FP32"}};

static const struct choice priorities = {"priority",
                                         {"PRIORITY_LOW", "PRIORITY_NORMAL", "PRIORITY_HIGH"}};

static void list_names(const struct choice *choice, char *text, size_t bytes)
{
    size_t used = 0;
    text[0] = '\0';
    for (size_t i = 0; i < ARRAY_LEN(choice->names) && choice->names[i] && used < bytes; i++) {
        int printed =
            snprintf(text + used, bytes - used, "%s%s", i > 0 ? ", " : "", choice->names[i]);
        used += printed > 0 ? (size_t)printed : 0;
    }
}

NODISCARD static enum status check_choice(const struct choice *choice, int32_t value,
                                          struct error *err)
{
    if (value > 0 && (size_t)value <= ARRAY_LEN(choice->names) && choice->names[value - 1])
        return STATUS_OK;
    char names[256];
    list_names(choice, names, sizeof names);
    if (value == 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, choice->field,
                           "not given; expected one of %s", names);
    return error_field(err, STATUS_UNIMPLEMENTED, choice->field,
                       "%" PRId32 " is not supported; supported are %s", value, names);
}

NODISCARD static enum status check_equation(const char *equation, struct error *err)
{
    if (strcmp(equation, request_equation) == 0)
        return STATUS_OK;
    if (equation[0] == '\0')
        return error_field(err, STATUS_INVALID_ARGUMENT, "equation", "not given; expected \"%s\"",
                           request_equation);
    return error_field(err, STATUS_UNIMPLEMENTED, "equation",
                       "\"%s\" is not supported; supported is \"%s\"", equation, request_equation);
}

NODISCARD static enum status check_choices(const struct wire_request *request, struct error *err)
{
    enum status status = check_equation(request->equation, err);
    if (status == STATUS_OK)
        status = check_choice(&recipes, request->recipe, err);
    if (status == STATUS_OK)
        status = check_choice(&activation_layouts, request->activation_layout, err);
    if (status == STATUS_OK)
        status = check_choice(&scale_layouts, request->scale_layout, err);
    if (status == STATUS_OK)
        status = check_choice(&scale_types, request->scale_type, err);
    if (status == STATUS_OK)
        status = check_choice(&output_types, request->output_type, err);
    return status;
}

NODISCARD static enum status find_weight(const struct wire_request *request,
                                         struct weights *weights, struct weight **weight,
                                         struct error *err)
{
    if (request->weight[0] == '\0')
        return error_field(err, STATUS_INVALID_ARGUMENT, "weight",
                           "not given; expected a name that ListWeights shows");
    *weight = weights_get(weights, request->weight, strlen(request->weight));
    if (!*weight)
        return error_field(err, STATUS_NOT_FOUND, "weight",
                           "\"%s\" is not resident; %u weights are (see ListWeights)",
                           request->weight, weights_totals(weights).weights);
    return STATUS_OK;
}

bool request_recipe_fits(enum einsum_recipe recipe, const struct einsum_weight_format *format)
{
    return einsum_recipe_fits(recipe, format) && einsum_recipe_block_r(recipe) == format->block_r;
}

const char *request_recipe_name(enum einsum_recipe recipe)
{
    return recipes.names[recipe - 1];
}

NODISCARD static enum status check_recipe(enum einsum_recipe recipe, const struct weight *weight,
                                          struct error *err)
{
    const struct einsum_weight_format *format = &weight->format;
    if (request_recipe_fits(recipe, format))
        return STATUS_OK;
    return error_field(err, STATUS_INVALID_ARGUMENT, "recipe",
                       "%s does not fit weight \"%s\", whose scales are per %u of D and %u of R",
                       recipes.names[recipe - 1], weight->name, format->block_d, format->block_r);
}

enum status request_check_groups(uint32_t begin, uint32_t end, const struct weight *weight,
                                 struct einsum_operand *operand, struct error *err)
{
    if (begin == 0 && end == 0)
        end = weight->format.groups;
    if (begin >= end || end > weight->format.groups)
        return error_field(err, STATUS_INVALID_ARGUMENT, "group_end",
                           "expected 0 <= group_begin < group_end <= %u, got [%u, %u)",
                           weight->format.groups, begin, end);
    operand->group_begin = begin;
    operand->groups = end - begin;
    return STATUS_OK;
}

NODISCARD static enum status check_bytes(const char *field, uint64_t expected, uint64_t got,
                                         const char *shape, struct error *err)
{
    if (expected == got)
        return STATUS_OK;
    return error_field(err, STATUS_INVALID_ARGUMENT, field,
                       "expected %" PRIu64 " bytes (%s), got %" PRIu64, expected, shape, got);
}

// Of a tensor in the message, or in shared memory.
static uint64_t sent_bytes(const struct wire_request *request, const struct wire_range *in_message,
                           const struct wire_range *in_region)
{
    return (request->shared.given ? in_region : in_message)->bytes;
}

NODISCARD static enum status check_tensors(const struct wire_request *request,
                                           const struct einsum_weight_format *format,
                                           const struct einsum_operand *operand, struct error *err)
{
    uint32_t tokens = operand->tokens, groups = operand->groups;
    uint32_t blocks = format->reduced_dim / format->block_r;
    bool by_block = operand->scale_layout == EINSUM_SCALES_GKT;
    if (by_block && operand->scale_type == EINSUM_SCALE_UE8M0 && blocks % 4 != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "scale_layout",
                           "SCALE_LAYOUT_GKT packs 4 UE8M0 scales to a word, and K = %u is no "
                           "multiple of 4",
                           blocks);
    char shape[96];
    snprintf(shape, sizeof shape, "T %u * G %u * R %u", tokens, groups, format->reduced_dim);
    enum status status = check_bytes(
        "activations", einsum_activation_bytes(tokens, groups, format->reduced_dim),
        sent_bytes(request, &request->activations, &request->shared.activations), shape, err);
    if (status != STATUS_OK)
        return status;
    snprintf(shape, sizeof shape, "T %u%s * G %u * K %u * %u byte%s", tokens,
             by_block ? " rounded up to 4" : "", groups, blocks,
             einsum_scale_element_bytes(operand->scale_type),
             operand->scale_type == EINSUM_SCALE_FP32 ? "s" : "");
    return check_bytes(
        "activation_scales",
        einsum_scale_bytes(operand->scale_layout, operand->scale_type, tokens, groups, blocks),
        sent_bytes(request, &request->activation_scales, &request->shared.scales), shape, err);
}

NODISCARD static enum status check_rope(const struct weight *weight, struct error *err)
{
    if (!weight->rope)
        return error_field(err, STATUS_FAILED_PRECONDITION, "weight",
                           "\"%s\" has no rope: no entry of the configuration's \"ropes\" matches "
                           "it, and LoadWeights named none",
                           weight->name);
    if (weight->format.reduced_dim % ATTENTION_HEAD_DIM != 0)
        return error_field(err, STATUS_FAILED_PRECONDITION, "weight",
                           "\"%s\" has R = %u, which is no multiple of a head's %d", weight->name,
                           weight->format.reduced_dim, ATTENTION_HEAD_DIM);
    return STATUS_OK;
}

NODISCARD static enum status check_attention(const struct wire_request *request,
                                             const struct einsum_weight_format *format,
                                             const struct einsum_operand *operand,
                                             struct error *err)
{
    uint32_t tokens = operand->tokens, groups = operand->groups;
    char shape[96];
    snprintf(shape, sizeof shape, "T %u * %u heads * %d * 2 bytes", tokens,
             groups * (format->reduced_dim / ATTENTION_HEAD_DIM), ATTENTION_HEAD_DIM);
    enum status status = check_bytes(
        "attention", attention_bytes(tokens, groups, format->reduced_dim),
        sent_bytes(request, &request->attention, &request->shared.activations), shape, err);
    if (status != STATUS_OK)
        return status;
    snprintf(shape, sizeof shape, "T %u * 8 bytes", tokens);
    return check_bytes("positions", (uint64_t)tokens * sizeof(int64_t),
                       sent_bytes(request, &request->positions, &request->shared.scales), shape,
                       err);
}

NODISCARD static enum status check_tokens(uint32_t tokens, uint32_t tokens_max, struct error *err)
{
    if (tokens <= tokens_max)
        return STATUS_OK;
    return error_field(err, STATUS_INVALID_ARGUMENT, "tokens",
                       "expected at most %u (request_tokens_max), got %u", tokens_max, tokens);
}

// What an EinsumRequest says of itself.
NODISCARD static enum status check_einsum(const struct wire_request *request,
                                          const struct weight *weight,
                                          struct einsum_operand *operand, struct error *err)
{
    operand->activation_layout = (enum einsum_activation_layout)request->activation_layout;
    operand->scale_layout = (enum einsum_scale_layout)request->scale_layout;
    operand->scale_type = (enum einsum_scale_type)request->scale_type;
    enum status status = check_recipe((enum einsum_recipe)request->recipe, weight, err);
    if (status == STATUS_OK)
        status = check_tensors(request, &weight->format, operand, err);
    return status;
}

// For an OutputProjectRequest the weight says it, and what batcher_reserve sets.
NODISCARD static enum status check_output_project(const struct wire_request *request,
                                                  const struct weight *weight,
                                                  const struct einsum_operand *operand,
                                                  struct error *err)
{
    enum status status = check_rope(weight, err);
    if (status == STATUS_OK)
        status = check_attention(request, &weight->format, operand, err);
    return status;
}

// Tensors lie in one place. Where in the region, and whether there is one, is placement.c's to check.
NODISCARD static enum status check_one_place(const struct wire_request *request, struct error *err)
{
    if (!request->shared.given)
        return STATUS_OK;
    const struct {
        const char *field;
        uint64_t bytes;
    } in_message[] = {
        {"activations", request->activations.bytes},
        {"activation_scales", request->activation_scales.bytes},
        {"attention", request->attention.bytes},
        {"positions", request->positions.bytes},
    };
    for (size_t i = 0; i < ARRAY_LEN(in_message); i++)
        if (in_message[i].bytes > 0)
            return error_field(err, STATUS_INVALID_ARGUMENT, in_message[i].field,
                               "%" PRIu64 " bytes in the message, and shared memory named as well",
                               in_message[i].bytes);
    return STATUS_OK;
}

NODISCARD static enum status check_priority(const struct wire_request *request, struct job *job,
                                            struct error *err)
{
    if (request->priority == 0) {
        job->priority = JOB_PRIORITY_NORMAL;
        return STATUS_OK;
    }
    job->priority = (enum job_priority)request->priority;
    return check_choice(&priorities, request->priority, err);
}

// What needs no weight.
NODISCARD static enum status check_fields(const struct wire_request *request, struct job *job,
                                          struct error *err)
{
    enum status status = request->kind == WIRE_OUTPUT_PROJECT
                             ? check_choice(&output_types, request->output_type, err)
                             : check_choices(request, err);
    if (status == STATUS_OK)
        status = check_one_place(request, err);
    if (status == STATUS_OK)
        status = check_priority(request, job, err);
    return status;
}

NODISCARD static enum status check_damage(const struct weight *weight, struct error *err)
{
    if (!weight_damaged(weight))
        return STATUS_OK;
    return error_field(err, STATUS_DATA_LOSS, "weight",
                       "\"%s\" is not served: its copy in memory is no longer what was loaded, and "
                       "could not be read again yet",
                       weight->name);
}

// Takes the weight's reference.
NODISCARD static enum status check_against(const struct wire_request *request,
                                           struct weight *weight, uint32_t request_tokens_max,
                                           struct job *job, struct error *err)
{
    bool attention = request->kind == WIRE_OUTPUT_PROJECT;
    job->attention = attention;
    job->operand = (struct einsum_operand){
        .tokens = request->tokens,
        .output_type = (enum einsum_output_type)request->output_type,
    };
    enum status status = check_damage(weight, err);
    if (status == STATUS_OK)
        status = request_check_groups(request->group_begin, request->group_end, weight,
                                      &job->operand, err);
    if (status == STATUS_OK)
        status = check_tokens(request->tokens, request_tokens_max, err);
    if (status == STATUS_OK)
        status = attention ? check_output_project(request, weight, &job->operand, err)
                           : check_einsum(request, weight, &job->operand, err);
    if (status != STATUS_OK) {
        weight_unref(weight);
        return status;
    }
    job->weight = weight;
    return STATUS_OK;
}

enum status request_check(const struct wire_request *request, struct weights *weights,
                          uint32_t request_tokens_max, struct job *job, struct error *err)
{
    struct weight *weight;
    enum status status = check_fields(request, job, err);
    if (status == STATUS_OK)
        status = find_weight(request, weights, &weight, err);
    return status == STATUS_OK ? check_against(request, weight, request_tokens_max, job, err)
                               : status;
}

enum status request_check_with(const struct wire_request *request, struct weight *weight,
                               uint32_t request_tokens_max, struct job *job, struct error *err)
{
    enum status status = check_fields(request, job, err);
    if (status == STATUS_OK)
        return check_against(request, weight, request_tokens_max, job, err);
    weight_unref(weight);
    return status;
}

enum status request_check_position(int64_t position, uint64_t index, const struct weight *weight,
                                   struct error *err)
{
    uint32_t positions_max = rope_describe(weight->rope)->positions_max;
    if (position >= 0 && position < positions_max)
        return STATUS_OK;
    return error_field(err, STATUS_INVALID_ARGUMENT, "positions",
                       "[%" PRIu64 "] is %" PRId64 ", expected 0 to below the %u of weight \"%s\"",
                       index, position, positions_max, weight->name);
}

enum status request_check_positions(const grpc_slice *slices, size_t slices_n,
                                    struct wire_range positions, const struct weight *weight,
                                    struct error *err)
{
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, slices, slices_n);
    wire_skip(&cursor, positions.offset);
    enum status status = STATUS_OK;
    for (uint64_t t = 0; t < positions.bytes / sizeof(int64_t) && status == STATUS_OK; t++) {
        int64_t position;
        wire_take(&cursor, sizeof position, &position);
        status = request_check_position(position, t, weight, err);
    }
    return status;
}
