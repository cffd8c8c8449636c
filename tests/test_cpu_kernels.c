// Every CPU kernel that this machine runs against the FP64 reference, on fresh random tensors.
//
// A case is a weight and a few operands. check_task() re-lays the weight, runs the task's items in
// random order and compares every output, or many drawn ones where there are too many: in
// tolerance, NaN and infinite exactly where the reference is. Outputs are poisoned before and
// fenced, as are scratch and resident memory, so that a write too few or too many shows.
//
// EINSUM_SEED=<number> repeats a run; the seed is printed at start.
#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/cpu/cpu.h"
#include "kernels/fp8.h"

enum {
    FENCE_BYTES = 64,
    FENCE = 0x5A,
    POISON = 0xA5, // as BF16 and FP32 a small negative number: no NaN
    OPERANDS_MAX = 6,
    MULTIPLIES_MAX = 1500000, // of the reference, for one operand and kernel
};

static uint64_t seed;
static uint64_t state;

static uint64_t random_next(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 11;
}

static uint32_t random_below(uint32_t bound)
{
    return (uint32_t)(random_next() % bound);
}

static bool one_in(uint32_t n)
{
    return random_below(n) == 0;
}

// Each test and each turn of a loop has a sequence of its own.
static void start_random(uint32_t test, int turn)
{
    state = (seed + 1) * 0x9E3779B97F4A7C15u ^ ((uint64_t)test << 32 | (uint32_t)turn);
    for (int i = 0; i < 8; i++)
        random_next();
}

// ---- Memory with a fence on either side.

static void *fenced_alloc(uint64_t bytes, int fill)
{
    uint64_t padded = (bytes + 63) / 64 * 64 + 2 * FENCE_BYTES;
    uint8_t *memory = aligned_alloc(64, padded);
    ck_assert_ptr_nonnull(memory);
    memset(memory, FENCE, padded);
    memset(memory + FENCE_BYTES, fill, bytes);
    return memory + FENCE_BYTES;
}

static void fenced_free(void *at, uint64_t bytes)
{
    const uint8_t *begin = (const uint8_t *)at - FENCE_BYTES;
    const uint8_t *end = (const uint8_t *)at + bytes;
    for (int i = 0; i < FENCE_BYTES; i++) {
        ck_assert_uint_eq(begin[i], FENCE);
        ck_assert_uint_eq(end[i], FENCE);
    }
    free((uint8_t *)at - FENCE_BYTES);
}

// ---- A case.

// What random scales look like. Anything but PLAIN leaves what FP32 arithmetic carries.
enum scale_mood {
    PLAIN, // as quantisers make them; FP32 of any fraction and sign
    HUGE_, // of one side near 2^120, the other side TINY
    TINY,
    SPRINKLED, // plain, with zero, subnormal, infinite and NaN ones among them
};

struct fixture {
    struct einsum_weight_format format;
    uint8_t *weight, *weight_scales; // as in a checkpoint
    struct cpu_weight resident;
    struct einsum_operand operands[OPERANDS_MAX];
    void *owned[OPERANDS_MAX][2]; // what activations and scales point into
    uint32_t operands_n;
};

static float random_scale(enum scale_mood mood)
{
    float fraction = 1 + (float)random_below(1 << 23) * 0x1p-23f;
    fraction = one_in(2) ? -fraction : fraction;
    if (mood == HUGE_)
        return ldexpf(fraction, 100 + (int)random_below(27));
    if (mood == TINY)
        return ldexpf(fraction, -130 + (int)random_below(30));
    if (mood == SPRINKLED && one_in(12)) {
        const float strange[] = {0, -0.0f, NAN, INFINITY, -INFINITY, 0x1p-149f, 0x1p127f};
        return strange[random_below(7)];
    }
    return ldexpf(fraction, -14 + (int)random_below(8));
}

static uint8_t random_ue8m0(enum scale_mood mood)
{
    if (mood == HUGE_)
        return (uint8_t)(230 + random_below(25));
    if (mood == TINY)
        return (uint8_t)random_below(25);
    if (mood == SPRINKLED && one_in(12))
        return (const uint8_t[]){0, 254, 255}[random_below(3)];
    return (uint8_t)(112 + random_below(9));
}

static void random_scales(uint8_t *to, uint64_t bytes, enum einsum_scale_type type,
                          enum scale_mood mood)
{
    if (type == EINSUM_SCALE_UE8M0)
        for (uint64_t i = 0; i < bytes; i++)
            to[i] = random_ue8m0(mood);
    else
        for (uint64_t i = 0; i < bytes; i += 4) {
            float scale = random_scale(mood);
            memcpy(to + i, &scale, 4);
        }
}

// Any code but NaN; `subnormals` of ten are below 2^-6.
static void random_e4m3(uint8_t *to, uint64_t n, uint32_t subnormals)
{
    for (uint64_t i = 0; i < n; i++) {
        uint8_t code = (uint8_t)random_below(0x7F);
        if (random_below(10) < subnormals)
            code &= 7;
        to[i] = one_in(2) ? code : code | 0x80;
    }
}

static void make_weight(struct fixture *fixture, struct einsum_weight_format format,
                        enum scale_mood mood)
{
    uint64_t bytes = einsum_weight_bytes(&format);
    *fixture = (struct fixture){.format = format, .weight = malloc(bytes)};
    if (format.weight_type == EINSUM_WEIGHT_BF16) {
        for (uint64_t i = 0; i < bytes; i += 2) {
            uint16_t code = bf16_from_float(random_scale(PLAIN));
            memcpy(fixture->weight + i, &code, 2);
        }
        return;
    }
    random_e4m3(fixture->weight, bytes, random_below(11));
    uint64_t scale_bytes = einsum_weight_scale_bytes(&format);
    fixture->weight_scales = malloc(scale_bytes + 1); // the analyser fears a size of 0
    random_scales(fixture->weight_scales, scale_bytes, format.scale_type, mood);
}

static void lay_weight(struct fixture *fixture)
{
    const struct einsum_weight_format *format = &fixture->format;
    uint64_t row_bytes =
        (uint64_t)format->reduced_dim * einsum_weight_element_bytes(format->weight_type);
    uint64_t rows = (uint64_t)format->groups * format->output_dim;
    void *memory = fenced_alloc(cpu_weight_bytes(format), POISON);
    cpu_weight_init(&fixture->resident, format, memory);
    // In pieces of any size, last first.
    for (uint64_t end = rows; end > 0;) {
        uint64_t n = 16 * (1 + random_below(9));
        n = n < end ? n : end;
        cpu_relayout(&fixture->resident, fixture->weight + (end - n) * row_bytes, end - n, n);
        end -= n;
    }
    cpu_relayout_scales(&fixture->resident, fixture->weight_scales);
}

// `variant` picks among the sixteen layouts and types.
static struct einsum_operand *add_operand(struct fixture *fixture, uint32_t variant,
                                          uint32_t tokens, uint32_t group_begin, uint32_t groups,
                                          enum scale_mood mood)
{
    uint32_t index = fixture->operands_n++;
    struct einsum_operand *operand = &fixture->operands[index];
    *operand = (struct einsum_operand){
        .tokens = tokens,
        .group_begin = group_begin,
        .groups = groups,
        .activation_layout = variant & 1 ? EINSUM_ACTIVATIONS_GTR : EINSUM_ACTIVATIONS_TGR,
        .scale_layout = variant & 2 ? EINSUM_SCALES_GKT : EINSUM_SCALES_TGK,
        .scale_type = variant & 4 ? EINSUM_SCALE_UE8M0 : EINSUM_SCALE_FP32,
        .output_type = variant & 8 ? EINSUM_OUTPUT_FP32 : EINSUM_OUTPUT_BF16,
    };
    uint32_t blocks = fixture->format.reduced_dim / fixture->format.block_r;
    if (operand->scale_type == EINSUM_SCALE_UE8M0 && blocks % 4 != 0)
        operand->scale_layout = EINSUM_SCALES_TGK; // the other is not defined
    uint64_t a_bytes = einsum_activation_bytes(tokens, groups, fixture->format.reduced_dim);
    uint64_t scale_bytes =
        einsum_scale_bytes(operand->scale_layout, operand->scale_type, tokens, groups, blocks);
    uint64_t out_bytes =
        einsum_output_bytes(operand->output_type, tokens, groups, fixture->format.output_dim);
    // Exactly as long as they must be, and aligned to nothing.
    uint32_t shift = random_below(8);
    uint8_t *activations = malloc(a_bytes + shift), *scales = malloc(scale_bytes + shift);
    fixture->owned[index][0] = activations;
    fixture->owned[index][1] = scales;
    random_e4m3(activations + shift, a_bytes, random_below(11));
    random_scales(scales + shift, scale_bytes, operand->scale_type, mood);
    operand->activations = activations + shift;
    operand->scales = scales + shift;
    operand->output = fenced_alloc(out_bytes, POISON);
    return operand;
}

static void free_fixture(struct fixture *fixture)
{
    for (uint32_t i = 0; i < fixture->operands_n; i++) {
        struct einsum_operand *operand = &fixture->operands[i];
        fenced_free(operand->output,
                    einsum_output_bytes(operand->output_type, operand->tokens, operand->groups,
                                        fixture->format.output_dim));
        free(fixture->owned[i][0]);
        free(fixture->owned[i][1]);
    }
    fenced_free(fixture->resident.memory, cpu_weight_bytes(&fixture->format));
    free(fixture->weight);
    free(fixture->weight_scales);
}

// ---- Comparing.

static const char *kernel_name; // at work, for messages

static void check_output(const struct fixture *fixture, const struct einsum_operand *operand,
                         uint64_t index)
{
    uint32_t output_dim = fixture->format.output_dim;
    uint32_t d = (uint32_t)(index % output_dim);
    uint32_t g = (uint32_t)(index / output_dim % operand->groups);
    uint32_t t = (uint32_t)(index / output_dim / operand->groups);
    double magnitude;
    double exact = einsum_reference_one(&fixture->format, fixture->weight, fixture->weight_scales,
                                        operand, t, g, d, &magnitude, NULL);
    double got;
    if (operand->output_type == EINSUM_OUTPUT_FP32) {
        got = (double)fp32_load((const uint8_t *)operand->output + 4 * index);
    } else {
        uint16_t code;
        memcpy(&code, (const uint8_t *)operand->output + 2 * index, 2);
        got = (double)bf16_to_float(code);
        ck_assert_msg(!isnan(got) || code == BF16_NAN, "NaN written as %04x", code);
    }
    double tolerance =
        einsum_tolerance(operand->output_type, exact, magnitude, 0, fixture->format.reduced_dim);
    bool good = isnan(exact)       ? isnan(got)
                : isinf(exact)     ? got == exact
                : isinf(tolerance) ? !isnan(got) && (got < 0) == (exact < 0)
                                   : fabs(got - exact) <= tolerance;
    ck_assert_msg(good, "%s, t %u g %u d %u: %.17g, exact %.17g, tolerance %g", kernel_name, t, g,
                  d, got, exact, tolerance);
}

static void check_operand(const struct fixture *fixture, const struct einsum_operand *operand)
{
    uint64_t outputs = (uint64_t)operand->tokens * operand->groups * fixture->format.output_dim;
    uint64_t affordable = MULTIPLIES_MAX / fixture->format.reduced_dim;
    if (outputs <= affordable)
        for (uint64_t i = 0; i < outputs; i++)
            check_output(fixture, operand, i);
    else
        for (uint64_t i = 0; i < affordable; i++)
            check_output(fixture, operand, random_next() % outputs);
}

static void run_task(const struct fixture *fixture, const struct cpu_kernel *kernel,
                     uint32_t threads)
{
    kernel_name = cpu_kernel_name(kernel);
    struct cpu_task task = {&fixture->resident, fixture->operands, fixture->operands_n};
    uint32_t items = cpu_task_items(&task, threads);
    uint64_t scratch_bytes = cpu_scratch_bytes(fixture->format.reduced_dim);
    void *scratch = fenced_alloc(scratch_bytes, 0xFF); // NaN, should it be read before written
    uint32_t *order = malloc(items * sizeof(*order));
    for (uint32_t i = 0; i < items; i++)
        order[i] = i;
    for (uint32_t i = items; i > 1; i--) {
        uint32_t other = random_below(i), last = order[i - 1];
        order[i - 1] = order[other];
        order[other] = last;
    }
    for (uint32_t i = 0; i < items; i++)
        cpu_task_run(kernel, &task, order[i], items, scratch);
    free(order);
    fenced_free(scratch, scratch_bytes);
}

// With every supported kernel in turn.
static void check_task(struct fixture *fixture)
{
    lay_weight(fixture);
    for (const struct cpu_kernel *const *kernel = cpu_kernels(); *kernel != NULL; kernel++) {
        if (!cpu_kernel_supported(*kernel))
            continue;
        for (uint32_t i = 0; i < fixture->operands_n; i++) {
            const struct einsum_operand *operand = &fixture->operands[i];
            memset(operand->output, POISON,
                   einsum_output_bytes(operand->output_type, operand->tokens, operand->groups,
                                       fixture->format.output_dim));
        }
        run_task(fixture, *kernel, 1 + random_below(9));
        for (uint32_t i = 0; i < fixture->operands_n; i++)
            check_operand(fixture, &fixture->operands[i]);
    }
    free_fixture(fixture);
}

// ---- The tests.

static const struct weight_kind {
    enum einsum_weight_type type;
    enum einsum_scale_type scale_type;
    uint32_t block_d, block_r;
} kinds[] = {
    {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128},
    {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 128, 128},
    {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 1, 128},
    {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 128},
    {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 32, 32},
    {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 32, 32},
    {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 1, 32},
    {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 32},
    {EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, 1, 128},
};
enum { KINDS = sizeof(kinds) / sizeof(kinds[0]), VARIANTS = 16 };

static const uint32_t token_counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 64, 100, 192, 193, 300};
enum { TOKEN_COUNTS = sizeof(token_counts) / sizeof(token_counts[0]) };

static struct einsum_weight_format format_of(uint32_t kind, uint32_t groups, uint32_t output_dim,
                                             uint32_t reduced_dim)
{
    return (struct einsum_weight_format){.groups = groups,
                                         .output_dim = output_dim,
                                         .reduced_dim = reduced_dim,
                                         .weight_type = kinds[kind].type,
                                         .scale_type = kinds[kind].scale_type,
                                         .block_d = kinds[kind].block_d,
                                         .block_r = kinds[kind].block_r};
}

START_TEST(test_every_layout)
{
    start_random(1, _i);
    uint32_t kind = (uint32_t)_i % KINDS, variant = (uint32_t)_i / KINDS;
    struct fixture fixture;
    uint32_t tokens = 1 + random_below(20);
    make_weight(&fixture, format_of(kind, 2, 128, one_in(2) ? 512 : 1024), PLAIN);
    add_operand(&fixture, variant, tokens, 0, 2, PLAIN);
    check_task(&fixture);
}
END_TEST

START_TEST(test_token_counts)
{
    start_random(2, _i);
    struct fixture fixture;
    uint32_t reduced_dim = 128 * (1 + random_below(6)); // slices of 256 and a rest of 128
    make_weight(&fixture, format_of(random_below(KINDS), 1, 128, reduced_dim), PLAIN);
    add_operand(&fixture, random_below(VARIANTS), token_counts[_i % TOKEN_COUNTS], 0, 1, PLAIN);
    check_task(&fixture);
}
END_TEST

// One task, several requests: other groups, layouts and types, empty ones and overlaps.
START_TEST(test_operands_share_a_weight)
{
    enum { G = 5 };
    start_random(3, _i);
    struct fixture fixture;
    make_weight(&fixture, format_of((uint32_t)_i % KINDS, G, 128, 512), PLAIN);
    uint32_t n = 2 + random_below(OPERANDS_MAX - 1);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t begin = random_below(G);
        uint32_t groups = 1 + random_below(G - begin);
        add_operand(&fixture, random_below(VARIANTS), one_in(8) ? 0 : 1 + random_below(12), begin,
                    groups, one_in(3) ? SPRINKLED : PLAIN);
    }
    check_task(&fixture);
}
END_TEST

START_TEST(test_extreme_scales)
{
    start_random(4, _i);
    struct fixture fixture;
    bool weight_is_huge = one_in(2);
    uint32_t kind = random_below(KINDS - 1); // those that have scales
    make_weight(&fixture, format_of(kind, 1, 128, 512), weight_is_huge ? HUGE_ : TINY);
    add_operand(&fixture, random_below(VARIANTS), token_counts[random_below(10)], 0, 1,
                weight_is_huge ? TINY : HUGE_);
    add_operand(&fixture, random_below(VARIANTS), 1 + random_below(10), 0, 1, PLAIN);
    check_task(&fixture);
}
END_TEST

// Zero, infinite, NaN and subnormal scales on both sides, among plain ones.
START_TEST(test_sprinkled_scales)
{
    start_random(5, _i);
    struct fixture fixture;
    uint32_t kind = random_below(KINDS);
    make_weight(&fixture, format_of(kind, 2, 128, 512), one_in(2) ? SPRINKLED : PLAIN);
    add_operand(&fixture, random_below(VARIANTS), 1 + random_below(30), 0, 2,
                one_in(2) ? SPRINKLED : PLAIN);
    check_task(&fixture);
}
END_TEST

// A few NaN elements: their token or their output is NaN, and nothing else.
START_TEST(test_nan_elements)
{
    start_random(6, _i);
    struct fixture fixture;
    make_weight(&fixture, format_of(random_below(KINDS - 1), 2, 128, 512), PLAIN);
    uint32_t tokens = 1 + random_below(40);
    struct einsum_operand *operand =
        add_operand(&fixture, random_below(VARIANTS), tokens, 0, 2, PLAIN);
    uint8_t *activations = (uint8_t *)(uintptr_t)operand->activations;
    for (uint32_t i = 0; i < 3; i++) {
        activations[random_next() % (tokens * 2 * 512)] = one_in(2) ? 0x7F : 0xFF;
        if (one_in(2))
            fixture.weight[random_below(2 * 128 * 512)] = one_in(2) ? 0x7F : 0xFF;
    }
    check_task(&fixture);
}
END_TEST

// A NaN touches its row even where it meets zeros: 0 * NaN is NaN.
START_TEST(test_nan_meets_zero)
{
    start_random(7, _i);
    struct fixture fixture;
    make_weight(&fixture, format_of((uint32_t)_i % (KINDS - 1), 1, 128, 512), PLAIN);
    memset(fixture.weight, 0, einsum_weight_bytes(&fixture.format));
    struct einsum_operand *operand = add_operand(&fixture, (uint32_t)_i, 9, 0, 1, PLAIN);
    ((uint8_t *)(uintptr_t)operand->activations)[4 * 512 + 77] = 0xFF;
    operand->activation_layout = EINSUM_ACTIVATIONS_TGR;
    check_task(&fixture);
}
END_TEST

// Zero rows with the scale byte 0, as padding comes: exact zeros.
START_TEST(test_padding_tokens)
{
    start_random(8, _i);
    struct fixture fixture;
    make_weight(&fixture, format_of((uint32_t)_i, 1, 128, 512), PLAIN);
    uint32_t tokens = 1 + random_below(12);
    struct einsum_operand *operand = add_operand(&fixture, 4, tokens, 0, 1, PLAIN);
    uint32_t blocks = 512 / fixture.format.block_r;
    uint32_t padding = random_below(tokens);
    memset((uint8_t *)(uintptr_t)operand->activations + padding * 512, one_in(2) ? 0x80 : 0, 512);
    memset((uint8_t *)(uintptr_t)operand->scales + padding * blocks, 0, blocks);
    check_task(&fixture);
}
END_TEST

// BF16 weights that FP32 sums cannot carry: subnormal, huge, infinite, NaN.
START_TEST(test_strange_bf16)
{
    const uint16_t strange[] = {0x0001, 0x8001, 0x0080, 0x7F7F, 0xFF7F, 0x7F80,
                                0xFF80, 0x7FC0, 0x7F81, 0x2680, 0x567F, 0x5680};
    start_random(9, _i);
    struct fixture fixture;
    make_weight(&fixture, format_of(KINDS - 1, 1, 128, 512), PLAIN);
    for (uint32_t i = 0; i < 4; i++)
        memcpy(fixture.weight + 2 * random_below(128 * 512), &strange[(_i + (int)i * 5) % 12], 2);
    add_operand(&fixture, random_below(VARIANTS), 1 + random_below(14), 0, 1,
                one_in(2) ? TINY : PLAIN);
    check_task(&fixture);
}
END_TEST

// The largest R, and shapes whose panels do not share out evenly.
START_TEST(test_shapes)
{
    static const struct {
        uint32_t groups, output_dim, reduced_dim, tokens, kind;
    } shapes[] = {
        {1, 32, 65536, 3, 6}, {1, 32, 65536, 200, 5}, {2, 96, 128, 30, 5},
        {3, 352, 128, 7, 7},  {1, 1024, 256, 20, 0},  {7, 32, 128, 2, 4},
        {1, 32, 128, 1, 2},   {1, 4096, 128, 9, 3},   {2, 544, 384, 197, 8},
    };
    start_random(10, _i);
    struct fixture fixture;
    make_weight(&fixture,
                format_of(shapes[_i].kind, shapes[_i].groups, shapes[_i].output_dim,
                          shapes[_i].reduced_dim),
                PLAIN);
    add_operand(&fixture, random_below(VARIANTS), shapes[_i].tokens, 0, shapes[_i].groups, PLAIN);
    check_task(&fixture);
}
END_TEST

// FP32 outputs of FP32 scales of many bits: any rounding of a scale, to a power of two say, or of
// a sum to BF16 on the way, is far outside the tolerance.
START_TEST(test_scales_are_not_rounded)
{
    start_random(11, _i);
    struct fixture fixture;
    make_weight(&fixture, format_of(1, 1, 128, 128), PLAIN);
    struct einsum_operand *operand = add_operand(&fixture, 8, 1 + (uint32_t)_i * 9, 0, 1, PLAIN);
    memset(fixture.weight, 0x38, 128 * 128);
    memset((uint8_t *)(uintptr_t)operand->activations, 0x38, operand->tokens * 128);
    const float scale_b = 1.2345678e-3f;
    memcpy(fixture.weight_scales, &scale_b, 4);
    check_task(&fixture);
}
END_TEST

START_TEST(test_relayout)
{
    start_random(12, _i);
    struct fixture fixture;
    make_weight(&fixture, format_of((uint32_t)_i, 2, 128, 640), PLAIN);
    const struct einsum_weight_format *format = &fixture.format;
    bool bf16 = format->weight_type == EINSUM_WEIGHT_BF16;
    uint32_t marked = 16 * random_below(16) + random_below(16); // a row that gets a NaN
    uint16_t nan = 0x7FC0;
    if (bf16)
        memcpy(fixture.weight + 2 * (marked * 640 + random_below(640)), &nan, 2);
    else
        fixture.weight[marked * 640 + random_below(640)] = 0xFF;
    lay_weight(&fixture);
    for (uint32_t row = 0; row < 256; row++)
        for (uint32_t r = 0; r < 640; r++) {
            uint64_t from = (uint64_t)row * 640 + r;
            uint64_t panel = (uint64_t)(row / 16) * 640 * 16;
            if (bf16)
                ck_assert_mem_eq(fixture.resident.elements + 2 * (panel + r * 16 + row % 16),
                                 fixture.weight + 2 * from, 2);
            else
                ck_assert_uint_eq(
                    fixture.resident.elements[panel + r / 2 * 32 + row % 16 * 2 + r % 2],
                    fixture.weight[from]);
        }
    for (uint32_t panel = 0; panel < 16; panel++) {
        ck_assert_uint_eq(fixture.resident.elements_wide[panel], panel == marked / 16);
        ck_assert_uint_eq(fixture.resident.scales_wide[panel], 0);
    }
    free_fixture(&fixture);
}
END_TEST

START_TEST(test_items)
{
    start_random(13, 0);
    struct fixture fixture;
    make_weight(&fixture, format_of(0, 8, 1024, 128), PLAIN);
    lay_weight(&fixture);
    struct cpu_task task = {&fixture.resident, fixture.operands, 0};
    ck_assert_uint_eq(cpu_task_items(&task, 4), 0);
    add_operand(&fixture, 0, 0, 2, 3, PLAIN);
    task.operands_n = 1;
    ck_assert_uint_eq(cpu_task_items(&task, 4), 0);
    add_operand(&fixture, 0, 5, 6, 2, PLAIN);
    task.operands_n = 2;
    for (uint32_t threads = 1; threads <= 512; threads *= 2) {
        uint32_t items = cpu_task_items(&task, threads);
        ck_assert_uint_ge(items, threads <= 64 ? 2 * threads : 128); // 2 groups of 64 panels
        ck_assert_uint_eq(items % 2, 0);
    }
    free_fixture(&fixture);
}
END_TEST

START_TEST(test_kernels_by_name)
{
    const struct cpu_kernel *best = cpu_kernel_find(NULL);
    ck_assert_ptr_nonnull(best);
    ck_assert_ptr_null(cpu_kernel_find("no such kernel"));
    ck_assert_ptr_null(cpu_kernel_find(""));
    bool first = true;
    for (const struct cpu_kernel *const *kernel = cpu_kernels(); *kernel != NULL; kernel++) {
        bool supported = cpu_kernel_supported(*kernel);
        ck_assert_ptr_eq(cpu_kernel_find(cpu_kernel_name(*kernel)), supported ? *kernel : NULL);
        if (supported && first)
            ck_assert_ptr_eq(best, *kernel);
        first = first && !supported;
    }
    ck_assert_ptr_nonnull(cpu_kernel_find("portable"));
}
END_TEST

// ---- Threads.

static struct {
    const struct cpu_kernel *kernel;
    struct cpu_task task;
    uint32_t items;
    atomic_uint next;
} shared;

static void *take_items(void *scratch)
{
    for (;;) {
        uint32_t item = atomic_fetch_add(&shared.next, 1);
        if (item >= shared.items)
            return NULL;
        cpu_task_run(shared.kernel, &shared.task, item, shared.items, scratch);
    }
}

START_TEST(test_threads)
{
    enum { THREADS = 4 };
    start_random(14, _i);
    struct fixture fixture;
    make_weight(&fixture, format_of(0, 3, 256, 512), PLAIN);
    add_operand(&fixture, random_below(VARIANTS), 21, 0, 3, PLAIN);
    add_operand(&fixture, random_below(VARIANTS), 5, 1, 2, SPRINKLED);
    lay_weight(&fixture);
    uint64_t scratch_bytes = cpu_scratch_bytes(512);
    pthread_t threads[THREADS];
    void *scratch[THREADS];
    shared.kernel = cpu_kernel_find(NULL);
    kernel_name = cpu_kernel_name(shared.kernel);
    shared.task = (struct cpu_task){&fixture.resident, fixture.operands, 2};
    shared.items = cpu_task_items(&shared.task, THREADS);
    atomic_store(&shared.next, 0);
    for (int i = 0; i < THREADS; i++) {
        scratch[i] = fenced_alloc(scratch_bytes, 0xFF);
        ck_assert_int_eq(pthread_create(&threads[i], NULL, take_items, scratch[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        fenced_free(scratch[i], scratch_bytes);
    }
    check_operand(&fixture, &fixture.operands[0]);
    check_operand(&fixture, &fixture.operands[1]);
    free_fixture(&fixture);
}
END_TEST

static Suite *kernels_suite(void)
{
    Suite *suite = suite_create("cpu_kernels");
    TCase *tcase = tcase_create("against the reference");
    tcase_set_timeout(tcase, 240);
    tcase_add_loop_test(tcase, test_every_layout, 0, KINDS * VARIANTS);
    tcase_add_loop_test(tcase, test_token_counts, 0, 2 * TOKEN_COUNTS);
    tcase_add_loop_test(tcase, test_operands_share_a_weight, 0, 2 * KINDS);
    tcase_add_loop_test(tcase, test_extreme_scales, 0, 24);
    tcase_add_loop_test(tcase, test_sprinkled_scales, 0, 24);
    tcase_add_loop_test(tcase, test_nan_elements, 0, 16);
    tcase_add_loop_test(tcase, test_nan_meets_zero, 0, 8);
    tcase_add_loop_test(tcase, test_padding_tokens, 0, KINDS);
    tcase_add_loop_test(tcase, test_strange_bf16, 0, 12);
    tcase_add_loop_test(tcase, test_shapes, 0, 9);
    tcase_add_loop_test(tcase, test_scales_are_not_rounded, 0, 3);
    tcase_add_loop_test(tcase, test_relayout, 0, KINDS);
    tcase_add_test(tcase, test_items);
    tcase_add_test(tcase, test_kernels_by_name);
    tcase_add_loop_test(tcase, test_threads, 0, 3);
    suite_add_tcase(suite, tcase);
    return suite;
}

int main(void)
{
    const char *given = getenv("EINSUM_SEED");
    seed = given != NULL ? strtoull(given, NULL, 10) : (uint64_t)time(NULL);
    printf("EINSUM_SEED=%llu\n", (unsigned long long)seed);
    fflush(stdout);
    SRunner *runner = srunner_create(kernels_suite());
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
