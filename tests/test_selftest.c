// The known-answer check: right outputs pass, outputs that any usual mistake would make do not.
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "server/selftest.h"

// ---- a weight in memory

struct memory_source {
    struct engine_weight_source base;
    uint8_t *weight, *scales;
    uint64_t weight_bytes, scale_bytes;
    uint64_t read_bytes; // of the weight, so far
    enum status fails_with;
};

static struct memory_source *source_of(const struct engine_weight_source *base)
{
    return CONTAINER_OF((uintptr_t)base, struct memory_source, base);
}

static enum status read_weight(const struct engine_weight_source *base, uint64_t offset, void *to,
                               uint64_t bytes, struct error *err)
{
    struct memory_source *source = source_of(base);
    if (source->fails_with != STATUS_OK)
        return error_set(err, source->fails_with, "no weight today");
    ck_assert(offset <= source->weight_bytes && bytes <= source->weight_bytes - offset);
    memcpy(to, source->weight + offset, bytes);
    source->read_bytes += bytes;
    return STATUS_OK;
}

static enum status read_scales(const struct engine_weight_source *base, void *to, struct error *err)
{
    struct memory_source *source = source_of(base);
    (void)err;
    memcpy(to, source->scales, source->scale_bytes);
    return STATUS_OK;
}

static uint32_t next_random(void)
{
    static uint32_t state = 1;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

static void put_scale(const struct einsum_weight_format *format, uint8_t *scales, uint64_t index)
{
    float value = 0.5f + (float)(next_random() >> 8) * 0x1p-24f;
    if (format->scale_type == EINSUM_SCALE_UE8M0)
        scales[index] = (uint8_t)(120 + next_random() % 8);
    else
        memcpy(scales + index * sizeof value, &value, sizeof value);
}

static void source_init(struct memory_source *source, const struct einsum_weight_format *format)
{
    *source = (struct memory_source){
        .base = {.format = *format, .read_weight = read_weight, .read_scales = read_scales},
        .weight_bytes = einsum_weight_bytes(format),
        .scale_bytes = einsum_weight_scale_bytes(format),
    };
    source->weight = malloc(source->weight_bytes);
    source->scales = malloc(source->scale_bytes + 1);
    for (uint64_t i = 0; i < source->weight_bytes; i++) {
        // BF16: odd bytes hold sign and exponent; keep values near 1.
        bool exponent = format->weight_type == EINSUM_WEIGHT_BF16 && i % 2;
        uint32_t random = next_random();
        source->weight[i] = exponent ? (uint8_t)(0x3e | (random & 0x80))
                            : format->weight_type == EINSUM_WEIGHT_BF16
                                ? (uint8_t)random
                                : (uint8_t)(random % 127 | (random >> 8 & 0x80));
    }
    uint32_t element = einsum_scale_element_bytes(format->scale_type);
    for (uint64_t i = 0; element && i < source->scale_bytes / element; i++)
        put_scale(format, source->scales, i);
}

static void source_deinit(struct memory_source *source)
{
    free(source->scales);
    free(source->weight);
}

// ---- what a right engine would write

struct outputs {
    uint64_t n;
    double *exact, *wgmma_loss;
    uint16_t *bf16; // [SELFTEST_TOKENS, G, D]
};

static uint16_t bf16_nearest(double value)
{
    float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    if (isnan(value))
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void outputs_init(struct outputs *outputs, const struct memory_source *source)
{
    const struct einsum_weight_format *format = &source->base.format;
    outputs->n = (uint64_t)SELFTEST_TOKENS * format->groups * format->output_dim;
    outputs->exact = malloc(outputs->n * sizeof(double));
    outputs->wgmma_loss = malloc(outputs->n * sizeof(double));
    outputs->bf16 = malloc(outputs->n * sizeof(uint16_t));
    uint64_t blocks = format->reduced_dim / format->block_r;
    void *activations =
        malloc(einsum_activation_bytes(SELFTEST_TOKENS, format->groups, format->reduced_dim));
    void *scales = malloc(einsum_scale_bytes(EINSUM_SCALES_TGK, EINSUM_SCALE_FP32, SELFTEST_TOKENS,
                                             format->groups, blocks));
    struct einsum_operand operand = {.tokens = SELFTEST_TOKENS,
                                     .groups = format->groups,
                                     .activation_layout = EINSUM_ACTIVATIONS_TGR,
                                     .scale_layout = EINSUM_SCALES_TGK,
                                     .scale_type = EINSUM_SCALE_FP32,
                                     .output_type = EINSUM_OUTPUT_BF16,
                                     .activations = activations,
                                     .scales = scales};
    selftest_fill(format, &operand, false);
    einsum_reference(format, source->weight, source->scales, &operand, outputs->exact);
    for (uint64_t i = 0; i < outputs->n; i++) {
        uint32_t d = (uint32_t)(i % format->output_dim);
        uint32_t row = (uint32_t)(i / format->output_dim);
        einsum_reference_one(format, source->weight, source->scales, &operand, row / format->groups,
                             row % format->groups, d, NULL, &outputs->wgmma_loss[i]);
        outputs->bf16[i] = bf16_nearest(outputs->exact[i]);
    }
    free(scales);
    free(activations);
}

static void outputs_deinit(struct outputs *outputs)
{
    free(outputs->bf16);
    free(outputs->wgmma_loss);
    free(outputs->exact);
}

// Of the outputs above, which are of FP32 scales.
static void judge(const struct selftest_answers *answers, void *output, bool wgmma,
                  struct selftest_verdict *verdict)
{
    const struct einsum_operand operand = {.tokens = SELFTEST_TOKENS,
                                           .scale_type = EINSUM_SCALE_FP32,
                                           .output_type = EINSUM_OUTPUT_BF16,
                                           .output = output};
    selftest_judge(answers, &operand, false, wgmma, verdict);
}

static struct selftest_answers *answer(const struct memory_source *source)
{
    struct selftest_answers *answers;
    struct error err;
    ck_assert_msg(selftest_answers_create(&source->base, &answers, &err) == STATUS_OK, "%s",
                  err.text);
    return answers;
}

static const struct einsum_weight_format formats[] = {
    {2, 128, 256, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128},
    {3, 64, 256, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 32, 32},
    {1, 32, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 128},
    {5, 96, 384, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 1, 32},
    {2, 64, 256, EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, 1, 128},
};

// ---- the activations

static struct einsum_operand fill(const struct einsum_weight_format *format,
                                  struct einsum_operand operand, bool wide)
{
    uint64_t blocks = format->reduced_dim / format->block_r;
    operand.groups = format->groups;
    operand.activations =
        malloc(einsum_activation_bytes(operand.tokens, format->groups, format->reduced_dim));
    operand.scales = malloc(einsum_scale_bytes(operand.scale_layout, operand.scale_type,
                                               operand.tokens, format->groups, blocks));
    selftest_fill(format, &operand, wide);
    return operand;
}

static void fill_deinit(const struct einsum_operand *operand)
{
    free((void *)(uintptr_t)operand->scales);
    free((void *)(uintptr_t)operand->activations);
}

START_TEST(test_fill)
{
    const struct einsum_weight_format *format = &formats[_i];
    uint64_t activations_n = (uint64_t)SELFTEST_TOKENS * format->groups * format->reduced_dim;
    uint64_t scales_n = activations_n / format->block_r;
    const struct einsum_operand like = {.tokens = SELFTEST_TOKENS,
                                        .activation_layout = EINSUM_ACTIVATIONS_TGR,
                                        .scale_layout = EINSUM_SCALES_TGK,
                                        .scale_type = EINSUM_SCALE_FP32};
    const struct einsum_operand once = fill(format, like, false), again = fill(format, like, false);
    const uint8_t *activations = once.activations;
    const float *scales = once.scales;
    ck_assert_mem_eq(activations, again.activations, activations_n);
    ck_assert_mem_eq(scales, again.scales, scales_n * sizeof(float));

    uint32_t seen[256] = {0}, kinds = 0;
    for (uint64_t i = 0; i < activations_n; i++) {
        ck_assert_uint_ne(activations[i] & 0x7f, 0x7f); // no NaN
        kinds += seen[activations[i]]++ == 0;
    }
    ck_assert_uint_ge(kinds, activations_n >= 1024 ? 220 : 120); // of 254
    for (uint64_t i = 0; i < scales_n; i++) {
        int exponent;
        ck_assert(isfinite(scales[i]) && scales[i] > 0);
        ck_assert(frexpf(scales[i], &exponent) != 0.5f); // not a power of two
    }
    fill_deinit(&again);
    fill_deinit(&once);
}
END_TEST

static double scale_of(const struct einsum_weight_format *format,
                       const struct einsum_operand *operand, uint32_t t, uint32_t g, uint32_t k)
{
    const struct einsum_scale_strides strides = einsum_scale_strides(format, operand);
    const uint8_t *at = (const uint8_t *)operand->scales + t * strides.token + g * strides.group +
                        k / 4 * strides.word + k % 4 * strides.byte;
    float value;
    if (operand->scale_type == EINSUM_SCALE_UE8M0)
        return ldexp(1, *at - 127);
    memcpy(&value, at, sizeof value);
    return (double)value;
}

// Every token of every layout is one of the three, small scales are 2^-60 of the others, and what
// pads a layout is NaN.
START_TEST(test_fill_in_layouts)
{
    enum { TOKENS = 7, GROUPS = 3, BLOCKS = 8, BLOCK = 32 };
    static const struct einsum_weight_format format = {
        GROUPS, 64, BLOCKS * BLOCK, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 32, BLOCK};
    struct einsum_operand like = {.tokens = TOKENS,
                                  .activation_layout = EINSUM_ACTIVATIONS_TGR,
                                  .scale_layout = EINSUM_SCALES_TGK,
                                  .scale_type = _i & 1 ? EINSUM_SCALE_UE8M0 : EINSUM_SCALE_FP32};
    const struct einsum_operand plain = fill(&format, like, false);
    like.activation_layout = EINSUM_ACTIVATIONS_GTR;
    like.scale_layout = EINSUM_SCALES_GKT;
    const struct einsum_operand other = fill(&format, like, _i & 2);
    for (uint32_t t = 0; t < TOKENS; t++)
        for (uint32_t g = 0; g < GROUPS; g++) {
            const uint8_t *row = (const uint8_t *)other.activations +
                                 einsum_activation_offset(EINSUM_ACTIVATIONS_GTR, TOKENS, GROUPS,
                                                          format.reduced_dim, t, g);
            const uint8_t *same = (const uint8_t *)plain.activations +
                                  einsum_activation_offset(EINSUM_ACTIVATIONS_TGR, TOKENS, GROUPS,
                                                           format.reduced_dim, t % 3, g);
            ck_assert_mem_eq(row, same, format.reduced_dim);
            for (uint32_t k = 0; k < BLOCKS; k++)
                ck_assert_double_eq(
                    scale_of(&format, &other, t, g, k),
                    ldexp(scale_of(&format, &plain, t % 3, g, k), _i & 2 ? -60 : 0));
        }
    struct einsum_operand padded = other;
    ck_assert(!(scale_of(&format, &padded, TOKENS, 0, 0) < 0x1p100)); // NaN
    fill_deinit(&other);
    fill_deinit(&plain);
}
END_TEST

// ---- the verdict

START_TEST(test_right_outputs_pass)
{
    struct memory_source source;
    struct outputs outputs;
    source_init(&source, &formats[_i]);
    outputs_init(&outputs, &source);
    struct selftest_answers *answers = answer(&source);
    struct selftest_verdict verdict;
    judge(answers, outputs.bf16, false, &verdict);
    ck_assert_msg(verdict.passed, "%s", verdict.message);
    ck_assert_uint_eq(verdict.elements_checked,
                      SELFTEST_TOKENS * formats[_i].groups * SELFTEST_ROWS_PER_GROUP);
    ck_assert_double_le(verdict.worst_error_ratio, 1);
    ck_assert_double_gt(verdict.worst_error_ratio, 0); // BF16 rounds something
    ck_assert_str_eq(verdict.message, "");
    // Only the rows that are checked were read.
    uint64_t row_bytes = source.weight_bytes / formats[_i].groups / formats[_i].output_dim;
    ck_assert_uint_eq(source.read_bytes, row_bytes * SELFTEST_ROWS_PER_GROUP * formats[_i].groups);
    selftest_answers_destroy(answers);
    outputs_deinit(&outputs);
    source_deinit(&source);
}
END_TEST

// Counts which outputs are looked at, by spoiling each in turn.
START_TEST(test_what_is_checked)
{
    const struct einsum_weight_format *format = &formats[_i];
    struct memory_source source;
    struct outputs outputs;
    source_init(&source, format);
    outputs_init(&outputs, &source);
    struct selftest_answers *answers = answer(&source);
    uint32_t checked = 0;
    for (uint64_t i = 0; i < outputs.n; i++) {
        uint16_t right = outputs.bf16[i];
        outputs.bf16[i] = right ^ 0x8000;
        struct selftest_verdict verdict;
        judge(answers, outputs.bf16, false, &verdict);
        outputs.bf16[i] = right;
        checked += !verdict.passed;
        uint64_t row = i % format->output_dim;
        if (row == 0 || row == format->output_dim - 1)
            ck_assert(!verdict.passed);
        if (!verdict.passed) {
            ck_assert_double_gt(verdict.worst_error_ratio, 1);
            ck_assert_ptr_nonnull(strstr(verdict.message, ": got "));
        }
    }
    ck_assert_uint_eq(checked, SELFTEST_TOKENS * format->groups * SELFTEST_ROWS_PER_GROUP);
    selftest_answers_destroy(answers);
    outputs_deinit(&outputs);
    source_deinit(&source);
}
END_TEST

// Mistakes that kernels and re-layouts do make. Each spoils the weight that "the engine" computes
// with, not the answers.
static void transpose_scales(struct memory_source *source)
{
    uint8_t first = source->scales[0];
    memmove(source->scales, source->scales + 1, source->scale_bytes - 1);
    source->scales[source->scale_bytes - 1] = first;
}

static void swap_groups(struct memory_source *source)
{
    uint64_t half = source->weight_bytes / 2;
    uint8_t *first = malloc(half);
    memcpy(first, source->weight, half);
    memcpy(source->weight, source->weight + half, half);
    memcpy(source->weight + half, first, half);
    free(first);
}

static void shift_columns(struct memory_source *source)
{
    memmove(source->weight + 1, source->weight, source->weight_bytes - 1);
}

static void swap_columns(struct memory_source *source)
{
    for (uint64_t i = 0; i < source->weight_bytes; i += 4) {
        uint8_t byte = source->weight[i];
        source->weight[i] = source->weight[i + 2];
        source->weight[i + 2] = byte;
    }
}

static void lose_last_block(struct memory_source *source)
{
    uint32_t reduced_dim = source->base.format.reduced_dim;
    for (uint64_t i = 0; i < source->weight_bytes; i++)
        if (i % reduced_dim >= reduced_dim - 32)
            source->weight[i] = 0;
}

static void double_scales(struct memory_source *source)
{
    for (uint64_t i = 0; i < source->scale_bytes; i++)
        source->scales[i]++;
}

static void (*const mistakes[])(struct memory_source *source) = {
    transpose_scales, swap_groups, shift_columns, swap_columns, lose_last_block, double_scales,
};

START_TEST(test_mistakes_are_found)
{
    static const struct einsum_weight_format format = {
        2, 256, 512, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128};
    struct memory_source source;
    struct outputs outputs;
    source_init(&source, &format);
    for (uint64_t i = 0; i < source.scale_bytes; i++)
        source.scales[i] = (uint8_t)(120 + i);
    struct selftest_answers *answers = answer(&source);
    mistakes[_i](&source);
    outputs_init(&outputs, &source);
    struct selftest_verdict verdict;
    judge(answers, outputs.bf16, false, &verdict);
    ck_assert(!verdict.passed);
    ck_assert_double_gt(verdict.worst_error_ratio, 1);
    selftest_answers_destroy(answers);
    outputs_deinit(&outputs);
    source_deinit(&source);
}
END_TEST

// What the kernel "hopper" may lose passes where it may have run, and nowhere else; weights that it
// does not take lose nothing.
START_TEST(test_losses_of_wgmma)
{
    struct memory_source source;
    struct outputs outputs;
    source_init(&source, &formats[_i]);
    outputs_init(&outputs, &source);
    struct selftest_answers *answers = answer(&source);
    bool loses = einsum_hopper_takes(&formats[_i]);
    struct selftest_verdict verdict;
    for (uint64_t i = 0; i < outputs.n; i++) {
        ck_assert_int_eq(outputs.wgmma_loss[i] > 0, loses);
        outputs.bf16[i] = bf16_nearest(outputs.exact[i] + outputs.wgmma_loss[i]);
    }
    judge(answers, outputs.bf16, true, &verdict);
    ck_assert_msg(verdict.passed, "%s", verdict.message);
    judge(answers, outputs.bf16, false, &verdict);
    ck_assert_int_eq(verdict.passed, !loses);

    for (uint64_t i = 0; i < outputs.n; i++)
        outputs.bf16[i] = bf16_nearest(1.02 * outputs.exact[i] + 3 * outputs.wgmma_loss[i]);
    judge(answers, outputs.bf16, true, &verdict);
    ck_assert(!verdict.passed);
    selftest_answers_destroy(answers);
    outputs_deinit(&outputs);
    source_deinit(&source);
}
END_TEST

START_TEST(test_nan_is_right_only_where_expected)
{
    struct memory_source source;
    struct outputs outputs;
    source_init(&source, &formats[0]);
    source.weight[5] = 0x7f; // row 0 of group 0
    outputs_init(&outputs, &source);
    ck_assert(isnan(outputs.exact[0]));
    struct selftest_answers *answers = answer(&source);
    struct selftest_verdict verdict;
    judge(answers, outputs.bf16, false, &verdict);
    ck_assert_msg(verdict.passed, "%s", verdict.message);

    outputs.bf16[0] = 0x3f80;
    judge(answers, outputs.bf16, false, &verdict);
    ck_assert(!verdict.passed);
    ck_assert(isinf(verdict.worst_error_ratio));
    ck_assert_ptr_nonnull(
        strstr(verdict.message, "token 0, group 0, output 0: got 1, expected nan"));

    outputs.bf16[0] = 0xffff; // any NaN will do
    outputs.bf16[formats[0].output_dim - 1] = 0x7fc0;
    judge(answers, outputs.bf16, false, &verdict);
    ck_assert(!verdict.passed);
    ck_assert_ptr_nonnull(strstr(verdict.message, "token 0, group 0, output 127: got nan"));
    selftest_answers_destroy(answers);
    outputs_deinit(&outputs);
    source_deinit(&source);
}
END_TEST

START_TEST(test_zero_weight)
{
    struct memory_source source;
    struct outputs outputs;
    source_init(&source, &formats[0]);
    memset(source.weight, 0, source.weight_bytes);
    outputs_init(&outputs, &source);
    struct selftest_answers *answers = answer(&source);
    struct selftest_verdict verdict;
    judge(answers, outputs.bf16, false, &verdict);
    ck_assert(verdict.passed);
    ck_assert_double_eq(verdict.worst_error_ratio, 0);
    outputs.bf16[0] = 0x3f80;
    judge(answers, outputs.bf16, false, &verdict);
    ck_assert(!verdict.passed);
    selftest_answers_destroy(answers);
    outputs_deinit(&outputs);
    source_deinit(&source);
}
END_TEST

START_TEST(test_source_fails)
{
    struct memory_source source;
    source_init(&source, &formats[0]);
    source.fails_with = STATUS_DATA_LOSS;
    struct selftest_answers *answers = NULL;
    struct error err;
    ck_assert_int_eq(selftest_answers_create(&source.base, &answers, &err), STATUS_DATA_LOSS);
    ck_assert_str_eq(err.text, "no weight today");
    ck_assert_ptr_null(answers);
    selftest_answers_destroy(NULL);
    source_deinit(&source);
}
END_TEST

static Suite *suite(void)
{
    Suite *suite = suite_create("selftest");
    TCase *tcase = tcase_create("selftest");
    tcase_set_timeout(tcase, 60);
    tcase_add_loop_test(tcase, test_fill, 0, ARRAY_LEN(formats));
    tcase_add_loop_test(tcase, test_fill_in_layouts, 0, 4);
    tcase_add_loop_test(tcase, test_right_outputs_pass, 0, ARRAY_LEN(formats));
    tcase_add_loop_test(tcase, test_what_is_checked, 0, ARRAY_LEN(formats));
    tcase_add_loop_test(tcase, test_mistakes_are_found, 0, ARRAY_LEN(mistakes));
    tcase_add_loop_test(tcase, test_losses_of_wgmma, 0, ARRAY_LEN(formats));
    tcase_add_test(tcase, test_nan_is_right_only_where_expected);
    tcase_add_test(tcase, test_zero_weight);
    tcase_add_test(tcase, test_source_fails);
    suite_add_tcase(suite, tcase);
    return suite;
}

int main(void)
{
    SRunner *runner = srunner_create(suite());
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
