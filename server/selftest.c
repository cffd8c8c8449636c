// What is checked: for each group SELFTEST_ROWS_PER_GROUP rows of D, the first and the last always,
// the others one in each stretch between, shifted from group to group so that all groups together
// touch many places of the engine's layout.
//
// All values follow from counters through one mixing function. No state; any thread.
#include "selftest.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/fp8.h"

enum { SCALE_TYPES = 2, WIDE_EXPONENT = -60 };

struct answer {
    uint32_t row;
    double exact, magnitude, wgmma_loss;
};

struct selftest_answers {
    uint32_t groups, output_dim, reduced_dim;
    struct answer answers[]; // [SCALE_TYPES][groups][SELFTEST_ROWS_PER_GROUP][SELFTEST_TOKENS]
};

// The finaliser of splitmix64: any two counters give unrelated values.
static uint64_t mix(uint64_t counter)
{
    uint64_t value = (counter + 1) * 0x9e3779b97f4a7c15u;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

static uint32_t answers_count(uint32_t groups)
{
    return SCALE_TYPES * groups * SELFTEST_ROWS_PER_GROUP * SELFTEST_TOKENS;
}

static uint32_t answer_index(uint32_t groups, enum einsum_scale_type type, uint32_t group,
                             uint32_t index, uint32_t token)
{
    uint32_t which = type == EINSUM_SCALE_UE8M0;
    return ((which * groups + group) * SELFTEST_ROWS_PER_GROUP + index) * SELFTEST_TOKENS + token;
}

static uint32_t checked_row(uint32_t output_dim, uint32_t group, uint32_t index)
{
    static_assert(SELFTEST_ROWS_PER_GROUP >= 3, "first, last and some between");
    if (index == 0)
        return 0;
    if (index == SELFTEST_ROWS_PER_GROUP - 1)
        return output_dim - 1;
    uint32_t stretch = output_dim / (SELFTEST_ROWS_PER_GROUP - 1);
    return index * stretch + (uint32_t)(mix((uint64_t)group << 32 | index) % stretch);
}

// ---- the activations

// Every E4M3 value but NaN, both signs.
static uint8_t activation_at(uint64_t index)
{
    uint64_t random = mix(index);
    return (uint8_t)(random % 127 | (random >> 32 & 0x80));
}

// 2^-4 to 2^4. In FP32 with a full significand: an engine that rounds scales to powers of two, or to
// BF16, is found out.
static void put_scale(enum einsum_scale_type type, uint64_t index, bool wide, void *to)
{
    uint64_t random = mix(~index);
    uint32_t exponent = 127 - 4 + (uint32_t)(random >> 32) % 8;
    if (wide)
        exponent = (uint32_t)((int32_t)exponent + WIDE_EXPONENT);
    uint32_t bits = exponent << 23 | (uint32_t)(random & 0x7fffff) | 1;
    if (type == EINSUM_SCALE_UE8M0)
        *(uint8_t *)to = (uint8_t)exponent;
    else
        memcpy(to, &bits, sizeof bits);
}

static void fill_row(const struct einsum_weight_format *format, uint32_t token, uint32_t group,
                     uint8_t *activations)
{
    uint64_t at = ((uint64_t)token * format->groups + group) * format->reduced_dim;
    for (uint64_t r = 0; r < format->reduced_dim; r++)
        activations[r] = activation_at(at + r);
}

// Token t of the operand, as it lies in the operand's layout.
static void fill_scales(const struct einsum_weight_format *format,
                        const struct einsum_operand *operand, uint32_t t, uint32_t group, bool wide)
{
    uint32_t blocks = format->reduced_dim / format->block_r;
    uint64_t at = ((uint64_t)(t % SELFTEST_TOKENS) * format->groups + group) * blocks;
    const struct einsum_scale_strides strides = einsum_scale_strides(format, operand);
    // Batch memory is the daemon's to write; the operand calls it const since engines only read it.
    uint8_t *scales = (uint8_t *)(uintptr_t)operand->scales;
    for (uint32_t k = 0; k < blocks; k++)
        put_scale(operand->scale_type, at + k, wide,
                  scales + t * strides.token + group * strides.group + k / 4 * strides.word +
                      k % 4 * strides.byte);
}

void selftest_fill(const struct einsum_weight_format *format, const struct einsum_operand *operand,
                   bool wide)
{
    uint32_t groups = format->groups, reduced_dim = format->reduced_dim;
    uint8_t *activations = (uint8_t *)(uintptr_t)operand->activations; // as above
    // What pads the layout is NaN: whoever reads it shows it.
    memset((void *)(uintptr_t)operand->scales, 0xff,
           einsum_scale_bytes(operand->scale_layout, operand->scale_type, operand->tokens, groups,
                              reduced_dim / format->block_r));
    for (uint32_t t = 0; t < operand->tokens; t++) {
        for (uint32_t group = 0; group < groups; group++) {
            const enum einsum_activation_layout layout = operand->activation_layout;
            uint8_t *row = activations + einsum_activation_offset(layout, operand->tokens, groups,
                                                                  reduced_dim, t, group);
            if (t < SELFTEST_TOKENS)
                fill_row(format, t, group, row);
            else
                memcpy(row,
                       activations + einsum_activation_offset(layout, operand->tokens, groups,
                                                              reduced_dim, t % SELFTEST_TOKENS,
                                                              group),
                       reduced_dim);
            fill_scales(format, operand, t, group, wide);
        }
    }
}

// ---- the answers

// Memory to compute the answers of one row, seen as a weight of one group and one output.
struct workspace {
    struct einsum_weight_format format; // of that small weight
    uint64_t row_bytes, row_scale_bytes;
    uint8_t *row;
    uint8_t *scales;            // of the whole weight
    uint8_t *activations;       // [SELFTEST_TOKENS, 1, R]
    uint8_t *activation_scales; // [SELFTEST_TOKENS, 1, K]
};

static enum status workspace_init(struct workspace *work, const struct einsum_weight_format *format,
                                  struct error *err)
{
    uint64_t blocks = format->reduced_dim / format->block_r;
    *work = (struct workspace){.format = *format};
    work->format.groups = 1;
    work->format.output_dim = 1;
    work->format.block_d = 1;
    work->row_bytes = einsum_weight_bytes(&work->format);
    work->row_scale_bytes = einsum_weight_scale_bytes(&work->format);
    work->row = malloc(work->row_bytes);
    work->scales = malloc(einsum_weight_scale_bytes(format) + 1); // none for BF16
    work->activations = malloc(SELFTEST_TOKENS * (uint64_t)format->reduced_dim);
    work->activation_scales = malloc(SELFTEST_TOKENS * blocks * sizeof(float)); // of either type
    if (work->row && work->scales && work->activations && work->activation_scales)
        return STATUS_OK;
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory for the self-test's answers");
}

static void workspace_deinit(struct workspace *work)
{
    free(work->activation_scales);
    free(work->activations);
    free(work->scales);
    free(work->row);
}

// The scales of one group, as its small weight has them.
static void fill_group_scales(const struct workspace *work,
                              const struct einsum_weight_format *format, uint32_t group,
                              enum einsum_scale_type type)
{
    uint64_t blocks = format->reduced_dim / format->block_r;
    uint64_t element = einsum_scale_element_bytes(type);
    for (uint32_t token = 0; token < SELFTEST_TOKENS; token++)
        for (uint64_t k = 0; k < blocks; k++)
            put_scale(type, ((uint64_t)token * format->groups + group) * blocks + k, false,
                      work->activation_scales + (token * blocks + k) * element);
}

static void answer_row(const struct workspace *work, const struct einsum_weight_format *format,
                       uint32_t group, uint32_t row, enum einsum_scale_type type,
                       struct answer *answers)
{
    uint64_t scale_row = ((uint64_t)group * format->output_dim + row) / format->block_d;
    struct einsum_operand operand = {
        .tokens = SELFTEST_TOKENS,
        .groups = 1,
        .activation_layout = EINSUM_ACTIVATIONS_TGR,
        .scale_layout = EINSUM_SCALES_TGK,
        .scale_type = type,
        .output_type = EINSUM_OUTPUT_BF16,
        .activations = work->activations,
        .scales = work->activation_scales,
    };
    for (uint32_t token = 0; token < SELFTEST_TOKENS; token++) {
        struct answer *answer = &answers[token];
        answer->row = row;
        answer->exact = einsum_reference_one(
            &work->format, work->row, work->scales + scale_row * work->row_scale_bytes, &operand,
            token, 0, 0, &answer->magnitude, &answer->wgmma_loss);
    }
}

static enum status answer_group(const struct engine_weight_source *source,
                                const struct workspace *work, uint32_t group,
                                struct selftest_answers *answers, struct error *err)
{
    static const enum einsum_scale_type types[] = {EINSUM_SCALE_FP32, EINSUM_SCALE_UE8M0};
    const struct einsum_weight_format *format = &source->format;
    for (uint32_t token = 0; token < SELFTEST_TOKENS; token++)
        fill_row(format, token, group, work->activations + (uint64_t)token * format->reduced_dim);
    for (uint32_t i = 0; i < SELFTEST_ROWS_PER_GROUP; i++) {
        uint32_t row = checked_row(format->output_dim, group, i);
        uint64_t offset = ((uint64_t)group * format->output_dim + row) * work->row_bytes;
        enum status status = source->read_weight(source, offset, work->row, work->row_bytes, err);
        if (status != STATUS_OK)
            return status;
        for (size_t type = 0; type < SCALE_TYPES; type++) {
            fill_group_scales(work, format, group, types[type]);
            answer_row(work, format, group, row, types[type],
                       &answers->answers[answer_index(format->groups, types[type], group, i, 0)]);
        }
    }
    return STATUS_OK;
}

enum status selftest_answers_create(const struct engine_weight_source *source,
                                    struct selftest_answers **answers_out, struct error *err)
{
    const struct einsum_weight_format *format = &source->format;
    struct selftest_answers *answers =
        malloc(sizeof *answers + answers_count(format->groups) * sizeof(struct answer));
    if (!answers)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "out of memory for the self-test's answers");
    answers->groups = format->groups;
    answers->output_dim = format->output_dim;
    answers->reduced_dim = format->reduced_dim;
    struct workspace work;
    enum status status = workspace_init(&work, format, err);
    if (status == STATUS_OK && format->scale_type != EINSUM_SCALE_NONE)
        status = source->read_scales(source, work.scales, err);
    for (uint32_t group = 0; group < format->groups && status == STATUS_OK; group++)
        status = answer_group(source, &work, group, answers, err);
    workspace_deinit(&work);
    if (status != STATUS_OK)
        selftest_answers_destroy(answers);
    else
        *answers_out = answers;
    return status;
}

void selftest_answers_destroy(struct selftest_answers *answers)
{
    free(answers);
}

// ---- the verdict

static double output_at(enum einsum_output_type type, const void *output, uint64_t index)
{
    float value;
    if (type == EINSUM_OUTPUT_FP32) {
        memcpy(&value, (const uint8_t *)output + index * sizeof value, sizeof value);
        return (double)value;
    }
    uint16_t half;
    memcpy(&half, (const uint8_t *)output + index * sizeof half, sizeof half);
    return (double)bf16_to_float(half);
}

// Error over tolerance; NaN is right exactly where it is expected.
static double error_ratio(double exact, double tolerance, double got)
{
    if (isnan(exact) || isnan(got))
        return isnan(exact) && isnan(got) ? 0 : INFINITY;
    if (isinf(tolerance) || got == exact)
        return 0;
    return fabs(got - exact) / tolerance;
}

static void judge_one(const struct selftest_answers *answers, const struct answer *answer,
                      const struct einsum_operand *operand, uint32_t token, uint32_t group,
                      bool wide, bool wgmma, struct selftest_verdict *verdict)
{
    int exponent = wide ? WIDE_EXPONENT : 0; // exact, as the scales are
    double exact = ldexp(answer->exact, exponent);
    double loss = wgmma && !wide ? answer->wgmma_loss : 0;
    double tolerance =
        einsum_tolerance(operand->output_type, exact, ldexp(answer->magnitude, exponent),
                         ldexp(loss, exponent), answers->reduced_dim);
    uint64_t row = (uint64_t)token * answers->groups + group;
    double got =
        output_at(operand->output_type, operand->output, row * answers->output_dim + answer->row);
    double ratio = error_ratio(exact, tolerance, got);
    verdict->elements_checked++;
    if (ratio > verdict->worst_error_ratio)
        verdict->worst_error_ratio = ratio;
    if (ratio <= 1 || !verdict->passed)
        return;
    verdict->passed = false;
    snprintf(verdict->message, sizeof verdict->message,
             "token %" PRIu32 ", group %" PRIu32 ", output %" PRIu32
             ": got %.9g, expected %.9g within %.3g",
             token, group, answer->row, got, exact, tolerance);
}

void selftest_judge(const struct selftest_answers *answers, const struct einsum_operand *operand,
                    bool wide, bool wgmma, struct selftest_verdict *verdict)
{
    *verdict = (struct selftest_verdict){.passed = true};
    for (uint32_t token = 0; token < operand->tokens; token++)
        for (uint32_t group = 0; group < answers->groups; group++)
            for (uint32_t i = 0; i < SELFTEST_ROWS_PER_GROUP; i++)
                judge_one(answers,
                          &answers->answers[answer_index(answers->groups, operand->scale_type,
                                                         group, i, token % SELFTEST_TOKENS)],
                          operand, token, group, wide, wgmma, verdict);
}
