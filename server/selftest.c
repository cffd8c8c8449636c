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

struct selftest_answers {
    uint32_t groups, output_dim;
    struct answer {
        uint32_t token, group, row;
        double exact, tolerance, tolerance_wgmma;
    } answers[]; // SELFTEST_TOKENS * groups * SELFTEST_ROWS_PER_GROUP
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
    return SELFTEST_TOKENS * groups * SELFTEST_ROWS_PER_GROUP;
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

// 2^-4 to 2^4, with a full significand: an engine that rounds scales to powers of two, or to BF16,
// is found out.
static float scale_at(uint64_t index)
{
    uint64_t random = mix(~index);
    uint32_t significand = (uint32_t)(random & 0x7fffff) | 1;
    uint32_t exponent = 127 - 4 + (uint32_t)(random >> 32) % 8;
    uint32_t bits = exponent << 23 | significand;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

// The part of one token and group, as it lies in [T, G, R] and [T, G, K].
static void fill_token_group(const struct einsum_weight_format *format, uint32_t token,
                             uint32_t group, uint8_t *activations, uint8_t *scales)
{
    uint64_t reduced_dim = format->reduced_dim, blocks = reduced_dim / format->block_r;
    uint64_t at = (uint64_t)token * format->groups + group;
    for (uint64_t r = 0; r < reduced_dim; r++)
        activations[r] = activation_at(at * reduced_dim + r);
    for (uint64_t k = 0; k < blocks; k++) {
        float scale = scale_at(at * blocks + k);
        memcpy(scales + k * sizeof scale, &scale, sizeof scale);
    }
}

void selftest_fill(const struct einsum_weight_format *format, void *activations, void *scales)
{
    uint64_t reduced_dim = format->reduced_dim, blocks = reduced_dim / format->block_r;
    for (uint32_t token = 0; token < SELFTEST_TOKENS; token++) {
        for (uint32_t group = 0; group < format->groups; group++) {
            uint64_t at = (uint64_t)token * format->groups + group;
            fill_token_group(format, token, group, (uint8_t *)activations + at * reduced_dim,
                             (uint8_t *)scales + at * blocks * sizeof(float));
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
    work->activation_scales = malloc(SELFTEST_TOKENS * blocks * sizeof(float));
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

static void answer_row(const struct workspace *work, const struct einsum_weight_format *format,
                       uint32_t group, uint32_t row, struct answer *answers)
{
    uint64_t scale_row = ((uint64_t)group * format->output_dim + row) / format->block_d;
    struct einsum_operand operand = {
        .tokens = SELFTEST_TOKENS,
        .groups = 1,
        .activation_layout = EINSUM_ACTIVATIONS_TGR,
        .scale_layout = EINSUM_SCALES_TGK,
        .scale_type = EINSUM_SCALE_FP32,
        .output_type = EINSUM_OUTPUT_BF16,
        .activations = work->activations,
        .scales = work->activation_scales,
    };
    for (uint32_t token = 0; token < SELFTEST_TOKENS; token++) {
        double magnitude, wgmma_loss;
        double exact = einsum_reference_one(&work->format, work->row,
                                            work->scales + scale_row * work->row_scale_bytes,
                                            &operand, token, 0, 0, &magnitude, &wgmma_loss);
        enum einsum_output_type type = EINSUM_OUTPUT_BF16;
        uint32_t reduced_dim = format->reduced_dim;
        answers[token] = (struct answer){
            .token = token,
            .group = group,
            .row = row,
            .exact = exact,
            .tolerance = einsum_tolerance(type, exact, magnitude, 0, reduced_dim),
            .tolerance_wgmma = einsum_tolerance(type, exact, magnitude, wgmma_loss, reduced_dim),
        };
    }
}

static enum status answer_group(const struct engine_weight_source *source,
                                const struct workspace *work, uint32_t group,
                                struct answer *answers, struct error *err)
{
    const struct einsum_weight_format *format = &source->format;
    uint64_t blocks = format->reduced_dim / format->block_r;
    for (uint32_t token = 0; token < SELFTEST_TOKENS; token++)
        fill_token_group(format, token, group,
                         work->activations + (uint64_t)token * format->reduced_dim,
                         work->activation_scales + token * blocks * sizeof(float));
    for (uint32_t i = 0; i < SELFTEST_ROWS_PER_GROUP; i++) {
        uint32_t row = checked_row(format->output_dim, group, i);
        uint64_t offset = ((uint64_t)group * format->output_dim + row) * work->row_bytes;
        enum status status = source->read_weight(source, offset, work->row, work->row_bytes, err);
        if (status != STATUS_OK)
            return status;
        answer_row(work, format, group, row, answers + (size_t)i * SELFTEST_TOKENS);
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
    struct workspace work;
    enum status status = workspace_init(&work, format, err);
    if (status == STATUS_OK && format->scale_type != EINSUM_SCALE_NONE)
        status = source->read_scales(source, work.scales, err);
    for (uint32_t group = 0; group < format->groups && status == STATUS_OK; group++)
        status = answer_group(
            source, &work, group,
            answers->answers + (size_t)group * SELFTEST_ROWS_PER_GROUP * SELFTEST_TOKENS, err);
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

static double bf16_at(const void *output, uint64_t index)
{
    uint16_t half;
    memcpy(&half, (const uint8_t *)output + index * sizeof half, sizeof half);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return (double)value;
}

// Error over tolerance; NaN is right exactly where it is expected.
static double error_ratio(const struct answer *answer, double tolerance, double got)
{
    if (isnan(answer->exact) || isnan(got))
        return isnan(answer->exact) && isnan(got) ? 0 : INFINITY;
    if (isinf(tolerance) || got == answer->exact)
        return 0;
    return fabs(got - answer->exact) / tolerance;
}

void selftest_judge(const struct selftest_answers *answers, const void *output, bool wgmma,
                    struct selftest_verdict *verdict)
{
    *verdict = (struct selftest_verdict){.passed = true,
                                         .elements_checked = answers_count(answers->groups)};
    for (uint32_t i = 0; i < verdict->elements_checked; i++) {
        const struct answer *answer = &answers->answers[i];
        uint64_t row = (uint64_t)answer->token * answers->groups + answer->group;
        double got = bf16_at(output, row * answers->output_dim + answer->row);
        double tolerance = wgmma ? answer->tolerance_wgmma : answer->tolerance;
        double ratio = error_ratio(answer, tolerance, got);
        if (ratio > verdict->worst_error_ratio)
            verdict->worst_error_ratio = ratio;
        if (ratio <= 1 || !verdict->passed)
            continue;
        verdict->passed = false;
        snprintf(verdict->message, sizeof verdict->message,
                 "token %" PRIu32 ", group %" PRIu32 ", output %" PRIu32
                 ": got %.9g, expected %.9g within %.3g",
                 answer->token, answer->group, answer->row, got, answer->exact, tolerance);
    }
}
