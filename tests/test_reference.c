// The reference against sums worked out by hand and a second, differently written evaluation; and
// the tables of recipes, layouts and tolerances.
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/einsum.h"
#include "kernels/fp8.h"

enum { ONE = 0x38, TWO = 0x40, HALF = 0x30, MINUS_ONE = 0xB8 }; // as E4M3

static const struct einsum_weight_format small = {.groups = 2,
                                                  .output_dim = 32,
                                                  .reduced_dim = 128,
                                                  .weight_type = EINSUM_WEIGHT_E4M3,
                                                  .scale_type = EINSUM_SCALE_FP32,
                                                  .block_d = 32,
                                                  .block_r = 32};

START_TEST(test_recipes)
{
    static const struct {
        enum einsum_recipe recipe;
        uint32_t block_d, block_r;
    } table[] = {{EINSUM_RECIPE_1_128_128, 128, 128},
                 {EINSUM_RECIPE_1_1_128, 1, 128},
                 {EINSUM_RECIPE_1_32_32, 32, 32},
                 {EINSUM_RECIPE_1_1_32, 1, 32}};
    for (int i = 0; i < 4; i++) {
        ck_assert_uint_eq(einsum_recipe_block_d(table[i].recipe), table[i].block_d);
        ck_assert_uint_eq(einsum_recipe_block_r(table[i].recipe), table[i].block_r);
        for (uint32_t block_d = 1; block_d <= 128; block_d++)
            for (uint32_t block_r = 32; block_r <= 128; block_r += 96) {
                struct einsum_weight_format format = small;
                format.block_d = block_d;
                format.block_r = block_r;
                bool wanted = block_r == table[i].block_r &&
                              (table[i].block_d == 1 || block_d == table[i].block_d);
                ck_assert_int_eq(einsum_recipe_fits(table[i].recipe, &format), wanted);
                format.weight_type = EINSUM_WEIGHT_BF16;
                format.scale_type = EINSUM_SCALE_NONE;
                ck_assert_int_eq(einsum_recipe_fits(table[i].recipe, &format),
                                 block_r == table[i].block_r);
            }
    }
    const int strangers[] = {-1, 0, 5, 99};
    for (int i = 0; i < 4; i++) {
        ck_assert_uint_eq(einsum_recipe_block_r((enum einsum_recipe)strangers[i]), 0);
        ck_assert_uint_eq(einsum_recipe_block_d((enum einsum_recipe)strangers[i]), 0);
        ck_assert(!einsum_recipe_fits((enum einsum_recipe)strangers[i], &small));
    }
}
END_TEST

// Every element of every layout at the place that the layout's picture names.
START_TEST(test_scale_strides)
{
    enum { G = 3, K = 8, LAYOUTS = 5 };
    struct einsum_weight_format format = {.reduced_dim = K * 128, .block_r = 128};
    static const struct {
        enum einsum_scale_layout layout;
        enum einsum_scale_type type;
    } layouts[LAYOUTS] = {
        {EINSUM_SCALES_TGK, EINSUM_SCALE_FP32},       {EINSUM_SCALES_TGK, EINSUM_SCALE_UE8M0},
        {EINSUM_SCALES_GKT, EINSUM_SCALE_FP32},       {EINSUM_SCALES_GKT, EINSUM_SCALE_UE8M0},
        {EINSUM_SCALES_IN_PLACE, EINSUM_SCALE_UE8M0},
    };
    for (uint64_t tokens = 1; tokens <= 9; tokens++) {
        uint64_t stored = (tokens + 3) / 4 * 4;
        for (uint64_t t = 0; t < tokens; t++)
            for (uint64_t g = 0; g < G; g++)
                for (uint64_t k = 0; k < K; k++) {
                    uint64_t wanted[LAYOUTS] = {
                        ((t * G + g) * K + k) * 4,
                        (t * G + g) * K + k,
                        ((g * K + k) * stored + t) * 4,
                        ((g * (K / 4) + k / 4) * stored + t) * 4 + k % 4,
                        (t * G + g) * 2 * format.reduced_dim + k, // from the first row's scales
                    };
                    for (int i = 0; i < LAYOUTS; i++) {
                        struct einsum_operand operand = {.tokens = (uint32_t)tokens,
                                                         .groups = G,
                                                         .scale_layout = layouts[i].layout,
                                                         .scale_type = layouts[i].type};
                        struct einsum_scale_strides s = einsum_scale_strides(&format, &operand);
                        uint64_t at = t * s.token + g * s.group + k / 4 * s.word + k % 4 * s.byte;
                        ck_assert_uint_eq(at, wanted[i]);
                        if (layouts[i].layout != EINSUM_SCALES_IN_PLACE)
                            ck_assert_uint_lt(at,
                                              einsum_scale_bytes(layouts[i].layout, layouts[i].type,
                                                                 tokens, G, K));
                    }
                }
    }
}
END_TEST

START_TEST(test_activation_offsets)
{
    enum { T = 3, G = 5, R = 512 };
    for (uint64_t t = 0; t < T; t++)
        for (uint64_t g = 0; g < G; g++) {
            ck_assert_uint_eq(einsum_activation_offset(EINSUM_ACTIVATIONS_TGR, T, G, R, t, g),
                              (t * G + g) * R);
            ck_assert_uint_eq(einsum_activation_offset(EINSUM_ACTIVATIONS_GTR, T, G, R, t, g),
                              (g * T + t) * R);
            ck_assert_uint_eq(einsum_activation_offset(EINSUM_ACTIVATIONS_IN_PLACE, T, G, R, t, g),
                              (t * G + g) * 2 * R);
        }
}
END_TEST

// One nonzero activation in each block, everything a power of two or a small sum of them.
START_TEST(test_by_hand)
{
    static uint8_t weight[2 * 32 * 128], activations[2 * 128];
    float weight_scales[2 * 4], scales[2 * 4];
    memset(weight, ONE, sizeof(weight));
    for (int k = 0; k < 4; k++) {
        scales[k] = (float)(k + 1); // group 0: 1 2 3 4
        scales[4 + k] = -1;
        weight_scales[k] = 10;
        weight_scales[4 + k] = k == 3 ? 0.5f : 0; // group 1: the last block alone
    }
    activations[0] = TWO;               // group 0, block 0: 2 * 1 * 10
    activations[32] = MINUS_ONE;        // block 1: -1 * 2 * 10
    activations[127] = HALF;            // block 3: 0.5 * 4 * 10
    activations[128 + 5] = TWO;         // group 1, block 0: scale 0
    activations[128 + 100] = TWO;       // block 3: 2 * -1 * 0.5 * weight
    weight[(32 + 7) * 128 + 100] = TWO; // group 1, output 7
    struct einsum_operand operand = {.tokens = 1,
                                     .groups = 2,
                                     .activation_layout = EINSUM_ACTIVATIONS_TGR,
                                     .scale_layout = EINSUM_SCALES_TGK,
                                     .scale_type = EINSUM_SCALE_FP32,
                                     .output_type = EINSUM_OUTPUT_FP32,
                                     .activations = activations,
                                     .scales = scales};
    double out[64], magnitude;
    einsum_reference(&small, weight, weight_scales, &operand, out);
    for (int d = 0; d < 32; d++) {
        ck_assert_double_eq(out[d], 20);
        ck_assert_double_eq(out[32 + d], d == 7 ? -2 : -1);
    }
    ck_assert_double_eq(
        einsum_reference_one(&small, weight, weight_scales, &operand, 0, 0, 3, &magnitude, NULL),
        20);
    ck_assert_double_eq(magnitude, 60);

    // A slice of groups sees the weight's group, and its own activations from the start.
    operand.group_begin = 1;
    operand.groups = 1;
    operand.activations = activations + 128;
    operand.scales = scales + 4;
    einsum_reference(&small, weight, weight_scales, &operand, out);
    ck_assert_double_eq(out[7], -2);
    ck_assert_double_eq(out[8], -1);
}
END_TEST

// 33 addends a step, each cut 13 bits below the greatest.
#define CUT (33 * 0x1p-13)
enum { TINY = 0x01, HUGE_CODE = 0x7E, NAN_CODE = 0x7F }; // 2^-9, 448

// Nonzero activations of R 256 against a weight of ones; blocks of 128. Scales: 1 and 2.
static const struct {
    struct {
        uint32_t begin, end;
        uint8_t code;
    } runs[4];
    double exact, loss; // loss in CUT
} losses[] = {
    {.runs = {{0}}, .exact = 0, .loss = 0},
    // In the first step the greatest product, in the others of its block the sum that it leaves.
    {.runs = {{0, 1, HUGE_CODE}, {1, 32, TINY}},
     .exact = 448 + 31 * 0x1p-9,
     .loss = 448 + 3 * (448 + 31 * 0x1p-9)},
    // The last step of a block alone: no sum before it, none after.
    {.runs = {{96, 128, ONE}}, .exact = 32, .loss = 1},
    {.runs = {{128, 160, ONE}}, .exact = 64, .loss = 2 + 3 * 64},
    // A sum that cancels leaves the greatest product of each step.
    {.runs = {{0, 16, TWO}, {16, 32, MINUS_ONE}, {32, 48, MINUS_ONE}, {100, 101, HALF}},
     .exact = 0.5,
     .loss = 2 + 16 + 0 + 0.5},
    // The sign of the sum does not count.
    {.runs = {{0, 4, MINUS_ONE}, {32, 33, TWO}}, .exact = -2, .loss = 1 + 4 + 2 + 2},
};

START_TEST(test_wgmma_loss)
{
    struct einsum_weight_format format = small;
    format.reduced_dim = 256;
    format.block_d = format.block_r = 128;
    static uint8_t weight[2 * 256], activations[256];
    const float scales[2] = {1, 2}, weight_scales[2] = {1, 1};
    memset(weight, ONE, sizeof weight);
    for (int i = 0; i < 4; i++)
        for (uint32_t r = losses[_i].runs[i].begin; r < losses[_i].runs[i].end; r++)
            activations[r] = losses[_i].runs[i].code;
    const struct einsum_operand operand = {.tokens = 1,
                                           .groups = 1,
                                           .activation_layout = EINSUM_ACTIVATIONS_TGR,
                                           .scale_layout = EINSUM_SCALES_TGK,
                                           .scale_type = EINSUM_SCALE_FP32,
                                           .activations = activations,
                                           .scales = scales};
    double loss;
    ck_assert_double_eq(
        einsum_reference_one(&format, weight, weight_scales, &operand, 0, 0, 0, NULL, &loss),
        losses[_i].exact);
    ck_assert_double_eq_tol(loss, CUT * losses[_i].loss, 1e-12);

    // NaN is NaN whatever is allowed, and no tolerance is made of it.
    activations[40] = NAN_CODE;
    double exact =
        einsum_reference_one(&format, weight, weight_scales, &operand, 0, 0, 0, NULL, &loss);
    ck_assert(isnan(exact) && !isnan(loss));
    ck_assert(isinf(einsum_tolerance(EINSUM_OUTPUT_BF16, exact, 1, loss, 256)));

    // Weights that the kernel "hopper" does not take lose nothing.
    activations[40] = ONE;
    format.block_r = 32;
    const float small_scales[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    struct einsum_operand small_blocks = operand;
    small_blocks.scales = small_scales;
    loss = -1;
    einsum_reference_one(&format, weight, small_scales, &small_blocks, 0, 0, 0, NULL, &loss);
    ck_assert_double_eq(loss, 0);
    format.block_r = 128;
    format.block_d = 1;
    format.weight_type = EINSUM_WEIGHT_BF16;
    format.scale_type = EINSUM_SCALE_NONE;
    loss = -1;
    einsum_reference_one(&format, weight, NULL, &operand, 0, 0, 0, NULL, &loss);
    ck_assert_double_eq(loss, 0);
}
END_TEST

static uint64_t state = 1;

static uint64_t random_next(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33;
}

// The same tensors in all layouts give the same sums, and they are those of long double.
START_TEST(test_layouts_agree)
{
    enum { T = 5, G = 2, D = 32, R = 512, K = 4 };
    const struct einsum_weight_format format = {.groups = G,
                                                .output_dim = D,
                                                .reduced_dim = R,
                                                .weight_type = EINSUM_WEIGHT_E4M3,
                                                .scale_type = EINSUM_SCALE_UE8M0,
                                                .block_d = 1,
                                                .block_r = 128};
    static uint8_t a[T][G][R], a_gtr[G][T][R], b[G][D][R], sb[G][D][K];
    static uint8_t sa[T][G][K], sa_gkt[G][1][8][4];
    for (int g = 0; g < G; g++)
        for (int t = 0; t < T; t++) {
            for (int r = 0; r < R; r++)
                a[t][g][r] = a_gtr[g][t][r] = (uint8_t)(random_next() % 127);
            for (int k = 0; k < K; k++)
                sa[t][g][k] = sa_gkt[g][0][t][k] = (uint8_t)(random_next() % 200);
        }
    for (int i = 0; i < G * D * R; i++)
        ((uint8_t *)b)[i] = (uint8_t)(128 + random_next() % 127);
    for (int i = 0; i < G * D * K; i++)
        ((uint8_t *)sb)[i] = (uint8_t)(random_next() % 200);

    struct einsum_operand operand = {.tokens = T,
                                     .groups = G,
                                     .activation_layout = EINSUM_ACTIVATIONS_TGR,
                                     .scale_layout = EINSUM_SCALES_TGK,
                                     .scale_type = EINSUM_SCALE_UE8M0,
                                     .output_type = EINSUM_OUTPUT_FP32,
                                     .activations = a,
                                     .scales = sa};
    static double first[T][G][D], second[T][G][D];
    einsum_reference(&format, b, sb, &operand, (double *)first);
    operand.activation_layout = EINSUM_ACTIVATIONS_GTR;
    operand.activations = a_gtr;
    operand.scale_layout = EINSUM_SCALES_GKT;
    operand.scales = sa_gkt;
    einsum_reference(&format, b, sb, &operand, (double *)second);
    ck_assert_mem_eq(first, second, sizeof(first));

    for (int t = 0; t < T; t++)
        for (int g = 0; g < G; g++)
            for (int d = 0; d < D; d++) {
                long double sum = 0;
                for (int r = 0; r < R; r++)
                    sum += (long double)e4m3_to_float(a[t][g][r]) *
                           (long double)e4m3_to_float(b[g][d][r]) *
                           ldexpl(1, sa[t][g][r / 128] + sb[g][d][r / 128] - 254);
                ck_assert_double_le(fabs(first[t][g][d] - (double)sum), 1e-12 * fabs((double)sum));
            }
}
END_TEST

START_TEST(test_tolerance)
{
    // Without a sum to err in: half a unit of the output type.
    ck_assert_double_eq(einsum_tolerance(EINSUM_OUTPUT_BF16, 1.5, 0, 0, 4096), 0x1p-8);
    ck_assert_double_eq(einsum_tolerance(EINSUM_OUTPUT_FP32, -1.5, 0, 0, 4096), 0x1p-24);
    ck_assert_double_eq(einsum_tolerance(EINSUM_OUTPUT_BF16, 0, 0, 0, 4096), 0x1p-134);
    ck_assert_double_eq(einsum_tolerance(EINSUM_OUTPUT_FP32, 0x1p-140, 0, 0, 4096), 0x1p-150);
    ck_assert_double_eq(einsum_tolerance(EINSUM_OUTPUT_FP32, 0, 8, 0, 4096), 8 * 0x1p-12 + 0x1p-33);
    // What wgmma may lose comes on top, and moves the reach.
    ck_assert_double_eq(einsum_tolerance(EINSUM_OUTPUT_BF16, 1.5, 0, 0.25, 128), 0.25 + 0x1p-8);
    ck_assert_double_eq(einsum_tolerance(EINSUM_OUTPUT_BF16, 1.5, 0, 0.5, 128), 0.5 + 0x1p-7);
    ck_assert(isinf(einsum_tolerance(EINSUM_OUTPUT_FP32, 3.4e38, 0, 1e37, 128)));
    // Where the error may carry the value into the next binade, that binade's unit counts.
    ck_assert_double_ge(einsum_tolerance(EINSUM_OUTPUT_BF16, nextafter(2, 0), 1e-6, 0, 128),
                        0x1p-7);
    ck_assert(isinf(einsum_tolerance(EINSUM_OUTPUT_BF16, 3.4e38, 0, 0, 128)));
    ck_assert(isinf(einsum_tolerance(EINSUM_OUTPUT_FP32, -1e39, 0, 0, 128)));
    ck_assert(!isinf(einsum_tolerance(EINSUM_OUTPUT_FP32, 3.4e38, 0, 0, 128)));
    ck_assert(isinf(einsum_tolerance(EINSUM_OUTPUT_FP32, NAN, 0, 0, 128)));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("reference");
    TCase *tcase = tcase_create("specification");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, test_recipes);
    tcase_add_test(tcase, test_scale_strides);
    tcase_add_test(tcase, test_activation_offsets);
    tcase_add_test(tcase, test_by_hand);
    tcase_add_loop_test(tcase, test_wgmma_loss, 0, (int)(sizeof losses / sizeof *losses));
    tcase_add_test(tcase, test_layouts_agree);
    tcase_add_test(tcase, test_tolerance);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
