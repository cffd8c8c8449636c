// The specification of the einsum in FP64, and the small facts about recipes and layouts.
// Everything else in kernels/ is compared with this file, so it is written to be read, not to be
// fast. Any thread.
//
//     out[t,g,d] = sum over r of  (A[t,g,r] * sA(t,g,k)) * (B[g,d,r] * sB(g, d/block_d, k))
//
// Both products in parentheses are exact in FP64: 28 bits of significand at most, and no FP32
// exponent leaves its range.
#include "einsum.h"

#include <float.h>
#include <math.h>

#include "fp8.h"

uint32_t einsum_recipe_block_r(enum einsum_recipe recipe)
{
    switch (recipe) {
    case EINSUM_RECIPE_1_128_128:
    case EINSUM_RECIPE_1_1_128:
        return 128;
    case EINSUM_RECIPE_1_32_32:
    case EINSUM_RECIPE_1_1_32:
        return 32;
    }
    return 0;
}

uint32_t einsum_recipe_block_d(enum einsum_recipe recipe)
{
    switch (recipe) {
    case EINSUM_RECIPE_1_128_128:
        return 128;
    case EINSUM_RECIPE_1_32_32:
        return 32;
    case EINSUM_RECIPE_1_1_128:
    case EINSUM_RECIPE_1_1_32:
        return 1;
    }
    return 0;
}

bool einsum_recipe_fits(enum einsum_recipe recipe, const struct einsum_weight_format *format)
{
    uint32_t block_d = einsum_recipe_block_d(recipe);
    if (block_d == 0 || einsum_recipe_block_r(recipe) != format->block_r)
        return false;
    return block_d == 1 || block_d == format->block_d || format->weight_type == EINSUM_WEIGHT_BF16;
}

struct einsum_scale_strides einsum_scale_strides(const struct einsum_weight_format *format,
                                                 const struct einsum_operand *operand)
{
    uint64_t element = einsum_scale_element_bytes(operand->scale_type);
    uint64_t blocks = format->reduced_dim / format->block_r;
    if (operand->scale_layout != EINSUM_SCALES_GKT) {
        bool in_place = operand->scale_layout == EINSUM_SCALES_IN_PLACE;
        uint64_t group = in_place ? 2 * (uint64_t)format->reduced_dim : blocks * element;
        return (struct einsum_scale_strides){
            .token = operand->groups * group, .group = group, .word = 4 * element, .byte = element};
    }
    uint64_t tokens_stored = einsum_align4(operand->tokens);
    struct einsum_scale_strides strides = {.group = blocks * tokens_stored * element,
                                           .word = 4 * tokens_stored * element};
    // FP32 has one element for every k; UE8M0 has four consecutive k in the word of one token.
    strides.token = 4;
    strides.byte = operand->scale_type == EINSUM_SCALE_FP32 ? tokens_stored * element : 1;
    return strides;
}

static double load_scale(const void *scales, enum einsum_scale_type type, uint64_t offset)
{
    const uint8_t *at = (const uint8_t *)scales + offset;
    if (type == EINSUM_SCALE_UE8M0)
        return (double)ue8m0_to_float(*at);
    return (double)fp32_load(at);
}

static double load_weight(const void *weight, enum einsum_weight_type type, uint64_t index)
{
    if (type == EINSUM_WEIGHT_E4M3)
        return (double)e4m3_to_float(((const uint8_t *)weight)[index]);
    uint16_t code;
    memcpy(&code, (const uint8_t *)weight + 2 * index, sizeof(code));
    return (double)bf16_to_float(code);
}

bool einsum_hopper_takes(const struct einsum_weight_format *format)
{
    return format->weight_type == EINSUM_WEIGHT_E4M3 && format->block_r == 128;
}

double einsum_wgmma_step_loss(double greatest)
{
    return (EINSUM_WGMMA_STEP + 1) * 0x1p-13 * greatest;
}

double einsum_reference_one(const struct einsum_weight_format *format, const void *weight,
                            const void *weight_scales, const struct einsum_operand *operand,
                            uint32_t t, uint32_t g, uint32_t d, double *magnitude,
                            double *wgmma_loss)
{
    uint64_t reduced_dim = format->reduced_dim;
    uint64_t blocks = reduced_dim / format->block_r;
    struct einsum_scale_strides strides = einsum_scale_strides(format, operand);
    const uint8_t *activations = operand->activations;
    activations += einsum_activation_offset(operand->activation_layout, operand->tokens,
                                            operand->groups, reduced_dim, t, g);
    uint64_t weight_row = (uint64_t)(operand->group_begin + g) * format->output_dim + d;

    double sum = 0, absolute = 0, loss = 0;
    for (uint64_t k = 0; k < blocks; k++) {
        double scale_a = load_scale(operand->scales, operand->scale_type,
                                    t * strides.token + g * strides.group + k / 4 * strides.word +
                                        k % 4 * strides.byte);
        double scale_b = 1;
        if (format->scale_type != EINSUM_SCALE_NONE)
            scale_b = load_scale(weight_scales, format->scale_type,
                                 (weight_row / format->block_d * blocks + k) *
                                     einsum_scale_element_bytes(format->scale_type));
        double block_sum = 0, greatest = 0; // greatest: of the step at hand
        for (uint64_t r = k * format->block_r; r < (k + 1) * format->block_r; r++) {
            double a = (double)e4m3_to_float(activations[r]) * scale_a;
            double b =
                load_weight(weight, format->weight_type, weight_row * reduced_dim + r) * scale_b;
            if (r % EINSUM_WGMMA_STEP == 0)
                greatest = fabs(block_sum);
            block_sum += a * b;
            absolute += fabs(a * b);
            greatest = fmax(greatest, fabs(a * b));
            if ((r + 1) % EINSUM_WGMMA_STEP == 0)
                loss += einsum_wgmma_step_loss(greatest);
        }
        sum += block_sum;
    }
    if (magnitude != NULL)
        *magnitude = absolute;
    if (wgmma_loss != NULL)
        *wgmma_loss = einsum_hopper_takes(format) ? loss : 0;
    return sum;
}

void einsum_reference(const struct einsum_weight_format *format, const void *weight,
                      const void *weight_scales, const struct einsum_operand *operand, double *out)
{
    for (uint32_t t = 0; t < operand->tokens; t++)
        for (uint32_t g = 0; g < operand->groups; g++)
            for (uint32_t d = 0; d < format->output_dim; d++)
                *out++ = einsum_reference_one(format, weight, weight_scales, operand, t, g, d, NULL,
                                              NULL);
}

double einsum_tolerance(enum einsum_output_type type, double exact, double magnitude,
                        double wgmma_loss, uint32_t reduced_dim)
{
    // Each of the R additions, and each scale folded into a product, is off by 2^-24 at most,
    // relative to a partial sum that `magnitude` bounds.
    double summation = magnitude * reduced_dim * 0x1p-24 + wgmma_loss;
    int fraction_bits = type == EINSUM_OUTPUT_FP32 ? 23 : 7;
    double greatest = ldexp(2 - ldexp(1, -fraction_bits), 127);
    double reach = fabs(exact) + summation; // where the value that is rounded may lie
    if (!(reach <= greatest))
        return INFINITY;
    int exponent = reach < FLT_MIN ? -126 : ilogb(reach);
    return summation + ldexp(0.5, exponent - fraction_bits);
}
