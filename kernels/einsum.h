// The operation's contract: shapes, layouts, numerics. The one header of kernels/ that the rest of
// the house sees.
//
//     out[t,g,d] = sum over r of  A[t,g,r] * sA(t,g,k) * B[g,d,r] * sB(g, d/block_d, k),  k = r / block_r
//
//     tensor          type             logical shape
//     A   activations E4M3             [T, G, R]            T tokens, G groups, R the reduced dim
//     sA              FP32 or UE8M0    [T, G, K]            K = R / block_r, block_r 128 or 32
//     B   weight      E4M3 or BF16     [G, D, R]            D outputs of a group
//     sB              FP32 or UE8M0    [G, D/block_d, K]    block_d 128, 32 or 1; none for BF16
//     out             BF16 or FP32     [T, G, D] row-major
//
// Numerics. Sums are in FP32 or better, with one exception below; the result is rounded once, to
// nearest even. E4M3 NaN (0x7F, 0xFF), UE8M0 NaN (0xFF) and FP32 NaN give NaN in exactly the
// outputs that they touch. UE8M0 is 2^(byte-127); 0x00 is 2^-127. FP32 scales may be any finite
// value and are never rounded or truncated. Products and partial sums do not overflow or vanish
// unless the true result does: a scale of 2^127 on one side and 2^-127 on the other is fine.
//
// The exception is the kernel "hopper" (SM 9.0; E4M3 weights in blocks of 128 alone). Its tensor
// core sums one scale block, 128 of R, by itself: in steps of 32 products, and in each step all
// that is added, the block's sum so far included, is cut 13 bits below the greatest of it. From
// block to block its sums are FP32 too. What that may cost is einsum_reference_one's `wgmma_loss`.
// Everything else above holds for it as well.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Enum values are those of proto/einsum/v1/einsum.proto; 0 is "not given" there and never valid
// here.

enum einsum_recipe {
    EINSUM_RECIPE_1_128_128 = 1, // sA per token and 128 of R; sB per 128 x 128 of [D, R]
    EINSUM_RECIPE_1_1_128 = 2,   // sA the same; sB per row of D and 128 of R
    EINSUM_RECIPE_1_32_32 = 3,   // V4.1: 32 for 128
    EINSUM_RECIPE_1_1_32 = 4,
};

enum einsum_activation_layout {
    EINSUM_ACTIVATIONS_TGR = 1, // [T, G, R] row-major
    EINSUM_ACTIVATIONS_GTR = 2, // [G, T, R] row-major, as vLLM's quantisation step leaves it
    EINSUM_ACTIVATIONS_IN_PLACE =
        3, // what attention.h leaves where it found BF16; never on the wire
};

enum einsum_scale_layout {
    EINSUM_SCALES_TGK = 1, // [T, G, K] row-major
    EINSUM_SCALES_GKT = 2, // token fastest, padded to align4(T): FP32 as [G][K][align4(T)];
    // UE8M0 four to a little-endian 32-bit word as [G][K/4][align4(T)], byte k%4 of word k/4
    EINSUM_SCALES_IN_PLACE = 3, // UE8M0, behind the row of activations that they scale: attention.h
};

enum einsum_scale_type {
    EINSUM_SCALE_NONE = 0, // BF16 weights only
    EINSUM_SCALE_FP32 = 1,
    EINSUM_SCALE_UE8M0 = 2,
};

enum einsum_weight_type {
    EINSUM_WEIGHT_E4M3 = 1,
    EINSUM_WEIGHT_BF16 = 2,
};

enum einsum_output_type {
    EINSUM_OUTPUT_BF16 = 1,
    EINSUM_OUTPUT_FP32 = 2,
};

// What any shape must satisfy; weights outside are refused at load.
enum {
    EINSUM_GROUPS_MAX = 256,
    EINSUM_DIM_MAX = 65536,    // of D and of R
    EINSUM_TOKENS_MAX = 65536, // of one request
    EINSUM_OUTPUT_DIM_MULTIPLE = 32,
    EINSUM_REDUCED_DIM_MULTIPLE = 128,
};

struct attention_rotation;

// How one weight is stored in a checkpoint: B and sB row-major, sB as [G * D/block_d, K].
struct einsum_weight_format {
    uint32_t groups;      // G
    uint32_t output_dim;  // D
    uint32_t reduced_dim; // R
    enum einsum_weight_type weight_type;
    enum einsum_scale_type scale_type; // of sB; NONE exactly for BF16
    uint32_t block_d;                  // rows of D that share a scale: 128, 32 or 1; 1 for BF16
    uint32_t block_r; // columns of R that share a scale, of sB and of sA: 128 or 32; 128 for BF16
};

// The activations of one request as they arrived, and where its result goes. Borrows all pointers.
struct einsum_operand {
    uint32_t tokens;      // T
    uint32_t group_begin; // first group of the weight that it uses
    uint32_t groups;      // how many: A, sA and out hold these groups alone
    enum einsum_activation_layout activation_layout;
    enum einsum_scale_layout scale_layout;
    enum einsum_scale_type scale_type; // of sA
    enum einsum_output_type output_type;
    const void *activations; // any alignment
    const void *scales;      // any alignment
    void *output;            // aligned to 64 bytes
    // Not NULL: `activations` holds attention's output, to be quantised where it lies before anything
    // else reads it; both layouts are IN_PLACE. One for each token. See attention.h.
    const struct attention_rotation *rotations;
};

// Byte strides of sA: element (t, g, k) lies at  t*token + g*group + (k/4)*word + (k%4)*byte.
// One form for all layouts, so that a kernel reads any of them without a branch.
struct einsum_scale_strides {
    uint64_t token, group, word, byte;
};

static inline uint64_t einsum_align4(uint64_t tokens)
{
    return (tokens + 3) & ~(uint64_t)3;
}

static inline uint32_t einsum_scale_element_bytes(enum einsum_scale_type type)
{
    return type == EINSUM_SCALE_FP32 ? 4 : type == EINSUM_SCALE_UE8M0 ? 1 : 0;
}

static inline uint32_t einsum_output_element_bytes(enum einsum_output_type type)
{
    return type == EINSUM_OUTPUT_FP32 ? 4 : 2;
}

static inline uint32_t einsum_weight_element_bytes(enum einsum_weight_type type)
{
    return type == EINSUM_WEIGHT_BF16 ? 2 : 1;
}

static inline uint64_t einsum_activation_bytes(uint64_t tokens, uint64_t groups,
                                               uint64_t reduced_dim)
{
    return tokens * groups * reduced_dim;
}

// Bytes of sA, where it has memory of its own. `blocks` is K. GKT with UE8M0 needs K % 4 == 0
// (checked where requests enter).
static inline uint64_t einsum_scale_bytes(enum einsum_scale_layout layout,
                                          enum einsum_scale_type type, uint64_t tokens,
                                          uint64_t groups, uint64_t blocks)
{
    uint64_t tokens_stored = layout == EINSUM_SCALES_GKT ? einsum_align4(tokens) : tokens;
    return tokens_stored * groups * blocks * einsum_scale_element_bytes(type);
}

static inline uint64_t einsum_output_bytes(enum einsum_output_type type, uint64_t tokens,
                                           uint64_t groups, uint64_t output_dim)
{
    return tokens * groups * output_dim * einsum_output_element_bytes(type);
}

static inline uint64_t einsum_weight_bytes(const struct einsum_weight_format *format)
{
    return (uint64_t)format->groups * format->output_dim * format->reduced_dim *
           einsum_weight_element_bytes(format->weight_type);
}

static inline uint64_t einsum_weight_scale_bytes(const struct einsum_weight_format *format)
{
    return (uint64_t)format->groups * (format->output_dim / format->block_d) *
           (format->reduced_dim / format->block_r) * einsum_scale_element_bytes(format->scale_type);
}

struct einsum_scale_strides einsum_scale_strides(const struct einsum_weight_format *format,
                                                 const struct einsum_operand *operand);

// Where token t of group g (counted from group_begin) starts in A. In place, a row is 2R bytes, as
// it was in BF16.
static inline uint64_t einsum_activation_offset(enum einsum_activation_layout layout,
                                                uint64_t tokens, uint64_t groups,
                                                uint64_t reduced_dim, uint64_t t, uint64_t g)
{
    uint64_t row = layout == EINSUM_ACTIVATIONS_GTR ? g * tokens + t : t * groups + g;
    return row * reduced_dim * (layout == EINSUM_ACTIVATIONS_IN_PLACE ? 2 : 1);
}

// The block of R (128 or 32) and of D that a recipe names; 0 for a value that is no recipe.
uint32_t einsum_recipe_block_r(enum einsum_recipe recipe);
uint32_t einsum_recipe_block_d(enum einsum_recipe recipe);

// Whether a weight stored so can be used under a recipe. The blocks of R must agree. The blocks of
// D must agree too, except that (1, 1, *) takes coarser ones: repeating a scale over its rows
// changes no value. BF16 weights take any.
bool einsum_recipe_fits(enum einsum_recipe recipe, const struct einsum_weight_format *format);

// The specification: slow, FP64, one rounding nowhere. `weight` and `weight_scales` as in the
// checkpoint. Writes out[t][g][d] as doubles, [operand->tokens, operand->groups, D] row-major;
// operand->output is not touched.
void einsum_reference(const struct einsum_weight_format *format, const void *weight,
                      const void *weight_scales, const struct einsum_operand *operand, double *out);

// One output of the same, for spot checks, and what an error bound needs; both may be NULL.
// `magnitude` gets the sum of absolute products. `wgmma_loss` gets what the sum of the kernel
// "hopper" may lose beyond FP32's error: of all steps, einsum_wgmma_step_loss; 0 for weights that
// it does not take.
double einsum_reference_one(const struct einsum_weight_format *format, const void *weight,
                            const void *weight_scales, const struct einsum_operand *operand,
                            uint32_t t, uint32_t g, uint32_t d, double *magnitude,
                            double *wgmma_loss);

// Whether the kernel "hopper" computes such weights: E4M3 in blocks of 128 along R, since in blocks of 32
// it has nothing to gain. Others go to another kernel, whatever was asked for.
bool einsum_hopper_takes(const struct einsum_weight_format *format);

// Of one step of EINSUM_WGMMA_STEP products: `greatest` is the largest of their magnitudes and that
// of the scale block's sum before them.
enum { EINSUM_WGMMA_STEP = 32 };
double einsum_wgmma_step_loss(double greatest);

// How far an output may lie from `exact`: half a unit in the last place of the output type (the one
// rounding), the FP32 summation error, `magnitude` times R units of 2^-24, and `wgmma_loss`: 0
// unless the kernel "hopper" may have computed it. Infinity where an output in reach overflows the
// type's range, and for an `exact` that is not finite: look at those first.
double einsum_tolerance(enum einsum_output_type type, double exact, double magnitude,
                        double wgmma_loss, uint32_t reduced_dim);

#ifdef __cplusplus
}
#endif
