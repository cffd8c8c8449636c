// request.c: every way in which a request can be wrong, each told by code, field and text; and what
// a right one becomes.
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "client/checkpoint.h"
#include "folder.h"
#include "server/request.h"
#include "server/rope.h"

enum { GROUPS = 4, OUTPUT_DIM = 128, REDUCED_DIM = 512, TOKENS = 3, TOKENS_MAX = 64 };

static char directory[64];
static struct engine *engine;
static struct weights *weights;

// One layer with 128 x 128 blocks, and under "mx/" one with 32 x 32 blocks. Only the first has a
// rope of its own; "mx/" gets one by the rules.
static void load(uint32_t block, const char *name_prefix, const struct rope_options *rope)
{
    struct error err;
    struct checkpoint_options options;
    ck_assert_int_eq(checkpoint_options_init(&options, "v4-flash", &err), STATUS_OK);
    options.directory = directory;
    options.layers = options.shards = 1;
    options.format = (struct einsum_weight_format){
        .groups = GROUPS,
        .output_dim = OUTPUT_DIM,
        .reduced_dim = REDUCED_DIM,
        .weight_type = EINSUM_WEIGHT_E4M3,
        .scale_type = EINSUM_SCALE_UE8M0,
        .block_d = block,
        .block_r = block,
    };
    ck_assert_msg(checkpoint_write(&options, &err) == STATUS_OK, "%s", err.text);
    const struct weights_load what = {
        .path = directory, .name_prefix = name_prefix, .output_dim = OUTPUT_DIM, .rope = rope};
    uint32_t loaded;
    ck_assert_msg(weights_load(weights, &what, &loaded, &err) == STATUS_OK, "%s", err.text);
    ck_assert_uint_eq(loaded, 1);
}

static void set_up(void)
{
    struct error err;
    folder_make(directory, sizeof directory, "test_request");
    const struct engine_options options = {.lanes = 1};
    ck_assert_int_eq(engine_null.open(&options, &engine, &err), STATUS_OK);
    const char *root = directory;
    ck_assert_int_eq(weights_create(&engine_null, engine, &root, 1, 4096, &weights, &err),
                     STATUS_OK);
    const struct rope_options by_rule = {.theta = 160000, .positions_max = 1000};
    const struct rope_options later = {.theta = 5};
    ck_assert_int_eq(weights_add_rope(weights, "mx/*", &by_rule, &err), STATUS_OK);
    ck_assert_int_eq(weights_add_rope(weights, "m*", &later, &err), STATUS_OK);
    const struct rope_options own = {.theta = 10000, .positions_max = 100};
    load(128, "", &own);
    load(32, "mx/", NULL);
}

static void tear_down(void)
{
    weights_destroy(weights);
    engine_null.close(engine);
    folder_remove(directory);
}

static struct wire_request good_request(void)
{
    struct wire_request request = {
        .weight = "layers.0.attn.wo_a",
        .equation = "bhr,hdr->bhd",
        .recipe = EINSUM_RECIPE_1_128_128,
        .activation_layout = EINSUM_ACTIVATIONS_TGR,
        .scale_layout = EINSUM_SCALES_TGK,
        .scale_type = EINSUM_SCALE_FP32,
        .output_type = EINSUM_OUTPUT_BF16,
        .tokens = TOKENS,
        .activations = {.bytes = TOKENS * GROUPS * REDUCED_DIM},
        .activation_scales = {.bytes = TOKENS * GROUPS * (REDUCED_DIM / 128) * 4},
    };
    return request;
}

static void expect_ok(const struct wire_request *request, struct job *job)
{
    struct error err;
    memset(job, 0, sizeof *job);
    ck_assert_msg(request_check(request, weights, TOKENS_MAX, job, &err) == STATUS_OK, "%s",
                  err.text);
    weight_unref(job->weight);
}

START_TEST(a_right_request_becomes_an_operand)
{
    struct wire_request request = good_request();
    struct job job;
    expect_ok(&request, &job);
    ck_assert_str_eq(job.weight->name, "layers.0.attn.wo_a");
    ck_assert_uint_eq(job.operand.tokens, TOKENS);
    ck_assert_uint_eq(job.operand.group_begin, 0);
    ck_assert_uint_eq(job.operand.groups, GROUPS);
    ck_assert_int_eq(job.operand.activation_layout, EINSUM_ACTIVATIONS_TGR);
    ck_assert_int_eq(job.operand.scale_layout, EINSUM_SCALES_TGK);
    ck_assert_int_eq(job.operand.scale_type, EINSUM_SCALE_FP32);
    ck_assert_int_eq(job.operand.output_type, EINSUM_OUTPUT_BF16);
}
END_TEST

// What the scales must measure in each layout and type, for 3 tokens, which GKT pads to 4.
static const struct {
    enum einsum_scale_layout layout;
    enum einsum_scale_type type;
    uint64_t bytes;
} scale_cases[] = {
    {EINSUM_SCALES_TGK, EINSUM_SCALE_FP32, 3 * 4 * 4 * 4},
    {EINSUM_SCALES_TGK, EINSUM_SCALE_UE8M0, 3 * 4 * 4},
    {EINSUM_SCALES_GKT, EINSUM_SCALE_FP32, 4 * 4 * 4 * 4},
    {EINSUM_SCALES_GKT, EINSUM_SCALE_UE8M0, 4 * 4 * 4},
};

START_TEST(each_scale_layout_has_its_size_and_no_other)
{
    struct wire_request request = good_request();
    request.scale_layout = (int32_t)scale_cases[_i].layout;
    request.scale_type = (int32_t)scale_cases[_i].type;
    request.activation_scales.bytes = scale_cases[_i].bytes;
    struct job job;
    expect_ok(&request, &job);
    for (int off = -1; off <= 1; off += 2) {
        struct error err;
        request.activation_scales.bytes = scale_cases[_i].bytes + (uint64_t)off;
        ck_assert_int_eq(request_check(&request, weights, TOKENS_MAX, &job, &err),
                         STATUS_INVALID_ARGUMENT);
        ck_assert_str_eq(err.field, "activation_scales");
    }
}
END_TEST

// Tensors lie in the message or in shared memory, never in both; the sizes are held to the same.
START_TEST(shared_tensors_take_the_messages_place)
{
    struct wire_request request = good_request();
    struct wire_range activations = request.activations, scales = request.activation_scales;
    request.shared =
        (struct wire_shared){.given = true, .activations = activations, .scales = scales};
    struct job job;
    struct error err;
    ck_assert_int_eq(request_check(&request, weights, TOKENS_MAX, &job, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, "activations");
    request.activations.bytes = 0;
    ck_assert_int_eq(request_check(&request, weights, TOKENS_MAX, &job, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, "activation_scales");
    request.activation_scales.bytes = 0;
    expect_ok(&request, &job);
    request.shared.scales.bytes++;
    ck_assert_int_eq(request_check(&request, weights, TOKENS_MAX, &job, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, "activation_scales");
}
END_TEST

START_TEST(a_slice_of_the_groups_needs_its_own_bytes_alone)
{
    struct wire_request request = good_request();
    request.group_begin = 1;
    request.group_end = 3;
    request.activations.bytes = TOKENS * 2 * REDUCED_DIM;
    request.activation_scales.bytes = TOKENS * 2 * (REDUCED_DIM / 128) * 4;
    struct job job;
    expect_ok(&request, &job);
    ck_assert_uint_eq(job.operand.group_begin, 1);
    ck_assert_uint_eq(job.operand.groups, 2);
}
END_TEST

START_TEST(no_tokens_is_a_request_too)
{
    struct wire_request request = good_request();
    request.tokens = 0;
    request.activations.bytes = request.activation_scales.bytes = 0;
    struct job job;
    expect_ok(&request, &job);
    ck_assert_uint_eq(job.operand.tokens, 0);
}
END_TEST

START_TEST(a_weight_may_be_found_already)
{
    const char name[] = "layers.0.attn.wo_a";
    struct weight *weight = weights_get(weights, name, strlen(name));
    ck_assert_ptr_nonnull(weight);
    struct wire_request request = good_request();
    strcpy(request.weight, "anything");
    struct job job;
    memset(&job, 0, sizeof job);
    struct error err;
    ck_assert_msg(request_check_with(&request, weight_ref(weight), TOKENS_MAX, &job, &err) ==
                      STATUS_OK,
                  "%s", err.text);
    ck_assert_ptr_eq(job.weight, weight);
    weight_unref(job.weight);
    // A failure takes the reference too, at whichever check: tear_down sees to it.
    request.tokens++;
    ck_assert_int_eq(request_check_with(&request, weight_ref(weight), TOKENS_MAX, &job, &err),
                     STATUS_INVALID_ARGUMENT);
    request.recipe = 0;
    ck_assert_int_eq(request_check_with(&request, weight_ref(weight), TOKENS_MAX, &job, &err),
                     STATUS_INVALID_ARGUMENT);
    weight_unref(weight);
}
END_TEST

START_TEST(an_unset_priority_is_normal)
{
    struct wire_request request = good_request();
    for (int32_t priority = 0; priority <= 3; priority++) {
        request.priority = priority;
        struct job job;
        expect_ok(&request, &job);
        ck_assert_int_eq((int)job.priority, priority ? priority : JOB_PRIORITY_NORMAL);
    }
}
END_TEST

START_TEST(a_name_may_be_spelled_as_in_the_checkpoint)
{
    struct wire_request request = good_request();
    strcpy(request.weight, "model.layers.0.attn.wo_a.weight");
    struct job job;
    expect_ok(&request, &job);
    ck_assert_str_eq(job.weight->name, "layers.0.attn.wo_a");
}
END_TEST

// Each sets one thing wrong in a right request.
#define WRONG(name, change)                                                                        \
    static void wrong_##name(struct wire_request *request)                                         \
    {                                                                                              \
        change;                                                                                    \
    }
WRONG(no_weight, request->weight[0] = '\0')
WRONG(unknown_weight, strcpy(request->weight, "layers.7.attn.wo_a"))
WRONG(no_equation, request->equation[0] = '\0')
WRONG(other_equation, strcpy(request->equation, "bhd,hdr->bhr"))
WRONG(no_recipe, request->recipe = 0)
WRONG(other_recipe, request->recipe = 5)
WRONG(negative_recipe, request->recipe = -1)
WRONG(recipe_misfit, request->recipe = EINSUM_RECIPE_1_32_32)
WRONG(recipe_misfit_32, strcpy(request->weight, "mx/layers.0.attn.wo_a"))
WRONG(no_activation_layout, request->activation_layout = 0)
WRONG(other_activation_layout, request->activation_layout = 3)
WRONG(no_scale_layout, request->scale_layout = 0)
WRONG(other_scale_layout, request->scale_layout = INT32_MAX)
WRONG(no_scale_type, request->scale_type = 0)
WRONG(other_scale_type, request->scale_type = INT32_MIN)
WRONG(no_output_type, request->output_type = 0)
WRONG(other_output_type, request->output_type = 3)
WRONG(other_priority, request->priority = 4)
WRONG(negative_priority, request->priority = -1)
WRONG(too_many_tokens, request->tokens = TOKENS_MAX + 1)
WRONG(tokens_overflow, request->tokens = UINT32_MAX)
WRONG(group_past_end, request->group_end = GROUPS + 1)
WRONG(group_half_set, request->group_begin = 2)
WRONG(group_inverted, (request->group_begin = 3, request->group_end = 1))
WRONG(group_empty, request->group_begin = request->group_end = 2)
WRONG(activations_short, request->activations.bytes--)
WRONG(activations_long, request->activations.bytes++)
WRONG(activations_missing, request->activations.bytes = 0)
WRONG(tokens_fewer_than_bytes, request->tokens--)
WRONG(empty_message, memset(request, 0, sizeof *request))

static const struct {
    void (*spoil)(struct wire_request *request);
    enum status status;
    const char *field, *text;
} wrong_cases[] = {
    {wrong_no_weight, STATUS_INVALID_ARGUMENT, "weight", "not given"},
    {wrong_unknown_weight, STATUS_NOT_FOUND, "weight", "\"layers.7.attn.wo_a\" is not resident"},
    {wrong_no_equation, STATUS_INVALID_ARGUMENT, "equation", "expected \"bhr,hdr->bhd\""},
    {wrong_other_equation, STATUS_UNIMPLEMENTED, "equation", "supported is \"bhr,hdr->bhd\""},
    {wrong_no_recipe, STATUS_INVALID_ARGUMENT, "recipe", "RECIPE_1_128_128, RECIPE_1_1_128"},
    {wrong_other_recipe, STATUS_UNIMPLEMENTED, "recipe", "5 is not supported"},
    {wrong_negative_recipe, STATUS_UNIMPLEMENTED, "recipe", "-1 is not supported"},
    {wrong_recipe_misfit, STATUS_INVALID_ARGUMENT, "recipe", "per 128 of D and 128 of R"},
    {wrong_recipe_misfit_32, STATUS_INVALID_ARGUMENT, "recipe", "per 32 of D and 32 of R"},
    {wrong_no_activation_layout, STATUS_INVALID_ARGUMENT, "activation_layout", "not given"},
    {wrong_other_activation_layout, STATUS_UNIMPLEMENTED, "activation_layout",
     "ACTIVATION_LAYOUT_TGR, ACTIVATION_LAYOUT_GTR"},
    {wrong_no_scale_layout, STATUS_INVALID_ARGUMENT, "scale_layout", "not given"},
    {wrong_other_scale_layout, STATUS_UNIMPLEMENTED, "scale_layout", "2147483647"},
    {wrong_no_scale_type, STATUS_INVALID_ARGUMENT, "scale_type", "not given"},
    {wrong_other_scale_type, STATUS_UNIMPLEMENTED, "scale_type", "-2147483648"},
    {wrong_no_output_type, STATUS_INVALID_ARGUMENT, "output_type", "not given"},
    {wrong_other_output_type, STATUS_UNIMPLEMENTED, "output_type", "OUTPUT_TYPE_FP32"},
    {wrong_other_priority, STATUS_UNIMPLEMENTED, "priority", "PRIORITY_NORMAL, PRIORITY_HIGH"},
    {wrong_negative_priority, STATUS_UNIMPLEMENTED, "priority", "-1 is not supported"},
    {wrong_too_many_tokens, STATUS_INVALID_ARGUMENT, "tokens", "at most 64"},
    {wrong_tokens_overflow, STATUS_INVALID_ARGUMENT, "tokens", "got 4294967295"},
    {wrong_group_past_end, STATUS_INVALID_ARGUMENT, "group_end", "got [0, 5)"},
    {wrong_group_half_set, STATUS_INVALID_ARGUMENT, "group_end", "got [2, 0)"},
    {wrong_group_inverted, STATUS_INVALID_ARGUMENT, "group_end", "got [3, 1)"},
    {wrong_group_empty, STATUS_INVALID_ARGUMENT, "group_end", "got [2, 2)"},
    {wrong_activations_short, STATUS_INVALID_ARGUMENT, "activations",
     "expected 6144 bytes (T 3 * G 4 * R 512), got 6143"},
    {wrong_activations_long, STATUS_INVALID_ARGUMENT, "activations", "got 6145"},
    {wrong_activations_missing, STATUS_INVALID_ARGUMENT, "activations", "got 0"},
    {wrong_tokens_fewer_than_bytes, STATUS_INVALID_ARGUMENT, "activations",
     "expected 4096 bytes (T 2"},
    {wrong_empty_message, STATUS_INVALID_ARGUMENT, "equation", "not given"},
};

START_TEST(a_wrong_request_is_told_what_is_wrong)
{
    struct wire_request request = good_request();
    wrong_cases[_i].spoil(&request);
    struct job job = {0};
    struct error err;
    ck_assert_int_eq(request_check(&request, weights, TOKENS_MAX, &job, &err),
                     wrong_cases[_i].status);
    ck_assert_int_eq(err.status, wrong_cases[_i].status);
    ck_assert_str_eq(err.field, wrong_cases[_i].field);
    ck_assert_msg(strstr(err.text, wrong_cases[_i].text), "\"%s\" does not say \"%s\"", err.text,
                  wrong_cases[_i].text);
    ck_assert_ptr_null(job.weight); // and holds nothing
}
END_TEST

// ---- OutputProject

static struct wire_request good_output_project(void)
{
    struct wire_request request = {
        .kind = WIRE_OUTPUT_PROJECT,
        .weight = "layers.0.attn.wo_a",
        .output_type = EINSUM_OUTPUT_FP32,
        .tokens = TOKENS,
        .attention = {.bytes = TOKENS * GROUPS * REDUCED_DIM * 2},
        .positions = {.bytes = TOKENS * 8},
    };
    return request;
}

START_TEST(a_right_output_project_becomes_an_operand)
{
    struct wire_request request = good_output_project();
    request.group_begin = 1;
    request.group_end = 3;
    request.attention.bytes /= 2;
    struct job job;
    expect_ok(&request, &job);
    ck_assert(job.attention);
    ck_assert_uint_eq(job.operand.tokens, TOKENS);
    ck_assert_uint_eq(job.operand.group_begin, 1);
    ck_assert_uint_eq(job.operand.groups, 2);
    ck_assert_int_eq(job.operand.output_type, EINSUM_OUTPUT_FP32);
    struct wire_request other = good_request(); // the same job may carry the other kind next
    ck_assert_int_eq(request_check(&other, weights, TOKENS_MAX, &job, NULL), STATUS_OK);
    ck_assert(!job.attention);
    weight_unref(job.weight);
}
END_TEST

WRONG(attention_short, request->attention.bytes -= 2)
WRONG(attention_missing, request->attention.bytes = 0)
WRONG(positions_int32, request->positions.bytes /= 2)
WRONG(positions_one_more, request->positions.bytes += 8)

static const struct {
    void (*spoil)(struct wire_request *request);
    enum status status;
    const char *field, *text;
} wrong_output_projects[] = {
    {wrong_no_weight, STATUS_INVALID_ARGUMENT, "weight", "not given"},
    {wrong_unknown_weight, STATUS_NOT_FOUND, "weight", "\"layers.7.attn.wo_a\" is not resident"},
    {wrong_no_output_type, STATUS_INVALID_ARGUMENT, "output_type", "not given"},
    {wrong_other_output_type, STATUS_UNIMPLEMENTED, "output_type", "OUTPUT_TYPE_FP32"},
    {wrong_too_many_tokens, STATUS_INVALID_ARGUMENT, "tokens", "at most 64"},
    {wrong_tokens_overflow, STATUS_INVALID_ARGUMENT, "tokens", "got 4294967295"},
    {wrong_group_past_end, STATUS_INVALID_ARGUMENT, "group_end", "got [0, 5)"},
    {wrong_attention_short, STATUS_INVALID_ARGUMENT, "attention",
     "expected 12288 bytes (T 3 * 4 heads * 512 * 2 bytes), got 12286"},
    {wrong_attention_missing, STATUS_INVALID_ARGUMENT, "attention", "got 0"},
    {wrong_positions_int32, STATUS_INVALID_ARGUMENT, "positions",
     "expected 24 bytes (T 3 * 8 bytes), got 12"},
    {wrong_positions_one_more, STATUS_INVALID_ARGUMENT, "positions", "got 32"},
};

START_TEST(a_wrong_output_project_is_told_what_is_wrong)
{
    struct wire_request request = good_output_project();
    wrong_output_projects[_i].spoil(&request);
    struct job job = {0};
    struct error err;
    ck_assert_int_eq(request_check(&request, weights, TOKENS_MAX, &job, &err),
                     wrong_output_projects[_i].status);
    ck_assert_str_eq(err.field, wrong_output_projects[_i].field);
    ck_assert_msg(strstr(err.text, wrong_output_projects[_i].text), "\"%s\" does not say \"%s\"",
                  err.text, wrong_output_projects[_i].text);
    ck_assert_ptr_null(job.weight);
}
END_TEST

START_TEST(a_weight_has_the_rope_of_its_load_or_of_the_first_rule)
{
    static const struct {
        const char *name;
        double theta;
    } cases[] = {{"layers.0.attn.wo_a", 10000}, {"mx/layers.0.attn.wo_a", 160000}};
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct weight *weight = weights_get(weights, cases[i].name, strlen(cases[i].name));
        ck_assert_ptr_nonnull(weight->rope);
        ck_assert_double_eq(rope_describe(weight->rope)->theta, cases[i].theta);
        weight_unref(weight);
    }
}
END_TEST

START_TEST(a_weight_without_a_rope_takes_no_attention)
{
    load(128, "bare/", NULL);
    struct wire_request request = good_output_project();
    strcpy(request.weight, "bare/layers.0.attn.wo_a");
    struct job job = {0};
    struct error err;
    ck_assert_int_eq(request_check(&request, weights, TOKENS_MAX, &job, &err),
                     STATUS_FAILED_PRECONDITION);
    ck_assert_str_eq(err.field, "weight");
    ck_assert_ptr_nonnull(strstr(err.text, "\"ropes\""));
}
END_TEST

START_TEST(a_weight_of_broken_heads_takes_no_attention)
{
    struct error err;
    struct checkpoint_options options;
    ck_assert_int_eq(checkpoint_options_init(&options, "v4-flash", &err), STATUS_OK);
    options.directory = directory;
    options.layers = options.shards = 1;
    options.format.groups = 1;
    options.format.output_dim = OUTPUT_DIM;
    options.format.reduced_dim = 512 + 128;
    ck_assert_int_eq(checkpoint_write(&options, &err), STATUS_OK);
    const struct weights_load what = {
        .path = directory, .name_prefix = "mx/odd/", .output_dim = OUTPUT_DIM};
    uint32_t loaded;
    ck_assert_int_eq(weights_load(weights, &what, &loaded, &err), STATUS_OK);
    struct wire_request request = good_output_project();
    strcpy(request.weight, "mx/odd/layers.0.attn.wo_a");
    struct job job = {0};
    ck_assert_int_eq(request_check(&request, weights, TOKENS_MAX, &job, &err),
                     STATUS_FAILED_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(err.text, "R = 640"));
}
END_TEST

START_TEST(a_load_with_a_bad_rope_loads_nothing)
{
    struct error err;
    const struct rope_options bad = {.theta = 10000, .factor = 16};
    const struct weights_load what = {
        .path = directory, .name_prefix = "bad/", .output_dim = OUTPUT_DIM, .rope = &bad};
    uint32_t loaded, before = weights_totals(weights).weights;
    ck_assert_int_eq(weights_load(weights, &what, &loaded, &err), STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, "original_positions_max");
    ck_assert_uint_eq(weights_totals(weights).weights, before);
}
END_TEST

// The last position is the only one that may be wrong; offset 3, so that none is aligned.
static const struct {
    int64_t position;
    const char *text; // NULL: fine
} position_cases[] = {
    {99, NULL},
    {100, "[2] is 100, expected 0 to below the 100"},
    {-1, "[2] is -1"},
    {INT64_MAX, "[2] is 9223372036854775807"},
    {INT64_MIN, "[2] is -9223372036854775808"},
    {1LL << 32, "[2] is 4294967296"},
};

START_TEST(positions_outside_the_rope_are_named)
{
    const char *name = "layers.0.attn.wo_a";
    struct weight *weight = weights_get(weights, name, strlen(name));
    const int64_t positions[] = {0, 42, position_cases[_i].position};
    uint8_t message[3 + sizeof positions + 5];
    memset(message, 0xff, sizeof message);
    memcpy(message + 3, positions, sizeof positions);
    for (size_t cut = 0; cut <= sizeof message; cut++) {
        grpc_slice slices[] = {
            grpc_slice_from_copied_buffer((const char *)message, cut),
            grpc_slice_from_copied_buffer((const char *)message + cut, sizeof message - cut),
        };
        struct error err = {.text = ""};
        enum status status = request_check_positions(
            slices, 2, (struct wire_range){3, sizeof positions}, weight, &err);
        grpc_slice_unref(slices[0]);
        grpc_slice_unref(slices[1]);
        ck_assert_int_eq(status, position_cases[_i].text ? STATUS_INVALID_ARGUMENT : STATUS_OK);
        if (!position_cases[_i].text)
            continue;
        ck_assert_str_eq(err.field, "positions");
        ck_assert_ptr_nonnull(strstr(err.text, position_cases[_i].text));
    }
    weight_unref(weight);
}
END_TEST

START_TEST(words_of_scales_need_blocks_by_four)
{
    struct error err;
    struct checkpoint_options options;
    ck_assert_int_eq(checkpoint_options_init(&options, "v4-flash", &err), STATUS_OK);
    options.directory = directory;
    options.layers = options.shards = 1;
    options.format.groups = 1;
    options.format.output_dim = OUTPUT_DIM;
    options.format.reduced_dim = 128 * 3;
    ck_assert_int_eq(checkpoint_write(&options, &err), STATUS_OK);
    const struct weights_load what = {
        .path = directory, .name_prefix = "odd/", .output_dim = OUTPUT_DIM};
    uint32_t loaded;
    ck_assert_int_eq(weights_load(weights, &what, &loaded, &err), STATUS_OK);
    struct wire_request request = good_request();
    strcpy(request.weight, "odd/layers.0.attn.wo_a");
    request.scale_layout = EINSUM_SCALES_GKT;
    request.scale_type = EINSUM_SCALE_UE8M0;
    struct job job = {0};
    ck_assert_int_eq(request_check(&request, weights, TOKENS_MAX, &job, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, "scale_layout");
    ck_assert_ptr_nonnull(strstr(err.text, "K = 3"));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("request");
    TCase *tests = tcase_create("request");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_test(tests, a_right_request_becomes_an_operand);
    tcase_add_loop_test(tests, each_scale_layout_has_its_size_and_no_other, 0,
                        ARRAY_LEN(scale_cases));
    tcase_add_test(tests, a_slice_of_the_groups_needs_its_own_bytes_alone);
    tcase_add_test(tests, shared_tensors_take_the_messages_place);
    tcase_add_test(tests, no_tokens_is_a_request_too);
    tcase_add_test(tests, an_unset_priority_is_normal);
    tcase_add_test(tests, a_weight_may_be_found_already);
    tcase_add_test(tests, a_name_may_be_spelled_as_in_the_checkpoint);
    tcase_add_loop_test(tests, a_wrong_request_is_told_what_is_wrong, 0, ARRAY_LEN(wrong_cases));
    tcase_add_test(tests, words_of_scales_need_blocks_by_four);
    tcase_add_test(tests, a_right_output_project_becomes_an_operand);
    tcase_add_loop_test(tests, a_wrong_output_project_is_told_what_is_wrong, 0,
                        ARRAY_LEN(wrong_output_projects));
    tcase_add_test(tests, a_weight_has_the_rope_of_its_load_or_of_the_first_rule);
    tcase_add_test(tests, a_weight_without_a_rope_takes_no_attention);
    tcase_add_test(tests, a_weight_of_broken_heads_takes_no_attention);
    tcase_add_test(tests, a_load_with_a_bad_rope_loads_nothing);
    tcase_add_loop_test(tests, positions_outside_the_rope_are_named, 0, ARRAY_LEN(position_cases));
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
