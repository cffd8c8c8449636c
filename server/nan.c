#include "nan.h"

#include <string.h>

#include "config.h"
#include "log.h"
#include "service.h"

// An output may lie in memory that a caller has named for another one, too: then what is read may be
// anything, and concerns nobody but him.
#define READS_CALLERS_MEMORY __attribute__((no_sanitize("thread")))

READS_CALLERS_MEMORY
static uint64_t count_bf16(const uint16_t *values, uint64_t n)
{
    uint32_t found = 0;
    for (uint64_t i = 0; i < n; i++) // without a branch: the compiler takes eight at a time
        found += (values[i] & 0x7fff) > 0x7f80;
    return found;
}

READS_CALLERS_MEMORY
static uint64_t count_fp32(const uint32_t *values, uint64_t n)
{
    uint32_t found = 0;
    for (uint64_t i = 0; i < n; i++)
        found += (values[i] & 0x7fffffff) > 0x7f800000;
    return found;
}

static uint64_t nan_elements(const struct job *job)
{
    const struct einsum_operand *operand = &job->operand;
    uint64_t n = (uint64_t)operand->tokens * operand->groups * job->weight->format.output_dim;
    return operand->output_type == EINSUM_OUTPUT_FP32 ? count_fp32(operand->output, n)
                                                      : count_bf16(operand->output, n);
}

static bool scale_is_nan(const struct einsum_operand *operand, uint64_t offset)
{
    const uint8_t *at = (const uint8_t *)operand->scales + offset;
    uint32_t bits;
    if (operand->scale_type == EINSUM_SCALE_UE8M0)
        return *at == 0xff;
    memcpy(&bits, at, sizeof bits);
    return (bits & 0x7fffffff) > 0x7f800000;
}

// Attention that a device quantises in a copy of its own is still as it came: a block with a NaN or an
// infinity becomes NaN.
static bool attention_has_nan(const struct job *job)
{
    const struct einsum_operand *operand = &job->operand;
    const uint16_t *values = operand->activations;
    uint64_t n = (uint64_t)operand->tokens * operand->groups * job->weight->format.reduced_dim;
    for (uint64_t i = 0; i < n; i++)
        if ((values[i] & 0x7f80) == 0x7f80)
            return true;
    return false;
}

static bool row_has_nan(const struct job *job, const struct einsum_scale_strides *strides,
                        uint32_t t, uint32_t g)
{
    const struct einsum_operand *operand = &job->operand;
    const struct einsum_weight_format *format = &job->weight->format;
    const uint8_t *row = (const uint8_t *)operand->activations +
                         einsum_activation_offset(operand->activation_layout, operand->tokens,
                                                  operand->groups, format->reduced_dim, t, g);
    for (uint32_t r = 0; r < format->reduced_dim; r++)
        if ((row[r] & 0x7f) == 0x7f)
            return true;
    for (uint32_t k = 0; k < format->reduced_dim / format->block_r; k++)
        if (scale_is_nan(operand, t * strides->token + g * strides->group + k / 4 * strides->word +
                                      k % 4 * strides->byte))
            return true;
    return false;
}

static bool input_has_nan(const struct service_context *context, const struct job *job)
{
    const struct einsum_operand *operand = &job->operand;
    if (job->attention && context->engine_ops->stages)
        return attention_has_nan(job);
    const struct einsum_scale_strides strides = einsum_scale_strides(&job->weight->format, operand);
    for (uint32_t t = 0; t < operand->tokens; t++)
        for (uint32_t g = 0; g < operand->groups; g++)
            if (row_has_nan(job, &strides, t, g))
                return true;
    return false;
}

void nan_look(struct service_context *context, const struct job *job,
              const struct placement *placement)
{
    uint32_t sample = context->config->nan_sample;
    if (sample == 0 || (placement->region && placement->region->on_device) ||
        atomic_fetch_add_explicit(&context->nan_turn, 1, memory_order_relaxed) % sample != 0)
        return;
    METRICS_ADD(context->metrics, nan_looked, 1);
    uint64_t found = nan_elements(job);
    if (found == 0)
        return;
    bool brought = input_has_nan(context, job);
    if (brought)
        METRICS_ADD(context->metrics, nan_input, 1);
    else
        METRICS_ADD(context->metrics, nan_other, 1);
    if (atomic_exchange_explicit(&job->weight->nan_told, true, memory_order_relaxed))
        return;
    LOG(WARN, "NaN in an output", LOG_STR("weight", job->weight->name),
        LOG_STR("cause", brought ? "input" : "other"), LOG_U64("elements", found),
        LOG_U64("tokens", job->operand.tokens), LOG_U64("batch_bucket", job->batch_bucket));
}
