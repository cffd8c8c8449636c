// Which kernels a device takes, and the table of a batch: the part of the CUDA engine that needs
// no device.
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"

static struct einsum_weight_format format_of(uint32_t groups, enum einsum_weight_type type,
                                             enum einsum_scale_type scale, uint32_t block_r)
{
    return (struct einsum_weight_format){
        .groups = groups,
        .output_dim = 1024,
        .reduced_dim = 4096,
        .weight_type = type,
        .scale_type = scale,
        .block_d = type == EINSUM_WEIGHT_BF16 ? 1 : block_r,
        .block_r = block_r,
    };
}

// ---- dispatch

static const struct {
    int major, minor;
    uint64_t tokens;
    const char *forced, *name;
} choices[] = {
    {12, 0, 1, NULL, "sm120-decode"},
    {12, 1, CUDA_PREFILL_TOKENS_MIN - 1, NULL, "sm120-decode"},
    {12, 1, CUDA_PREFILL_TOKENS_MIN, "auto", "sm120-prefill"},
    {12, 0, 8192, "sm120", "sm120-prefill"},
    {12, 0, 1, "portable", "none"},
    {12, 2, 1, NULL, "none"},
    {12, 0, 1, "hopper", "none"},
    {9, 0, 1, NULL, "portable-decode"},
    {9, 0, CUDA_HOPPER_TOKENS_MIN - 1, "hopper", "portable-decode"},
    {9, 0, CUDA_HOPPER_TOKENS_MIN, NULL, "hopper"},
    {9, 0, 8192, "hopper", "hopper"},
    {9, 0, 8192, "portable", "portable-prefill"},
    {9, 0, CUDA_PREFILL_TOKENS_MIN - 1, "portable", "portable-decode"},
    {9, 0, 1, "sm120", "none"},
    {9, 0, 1, "sm90", "none"},
    {9, 0, 1, "", "none"},
    {8, 9, 64, NULL, "portable-decode"},
    {8, 9, 8192, NULL, "portable-prefill"},
    {8, 9, 64, "hopper", "none"},
    {9, 1, 1, NULL, "none"},
    {8, 6, 1, NULL, "none"},
    {7, 5, 1, "portable", "none"},
    {10, 0, 1, NULL, "none"},
    {13, 0, 1, NULL, "none"},
    {0, 0, 1, NULL, "none"},
    {-1, 0, 1, NULL, "none"},
};

START_TEST(dispatch_names_the_kernel)
{
    struct einsum_weight_format format = format_of(8, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128);
    struct cuda_choice choice =
        cuda_dispatch(choices[_i].major, choices[_i].minor, &format, EINSUM_SCALE_UE8M0,
                      choices[_i].tokens, choices[_i].forced);
    ck_assert_str_eq(choice.name, choices[_i].name);
    ck_assert_int_eq(choice.arm == CUDA_ARM_NONE, strcmp(choice.name, "none") == 0);
    ck_assert_ptr_nonnull(choice.reason);
    ck_assert_uint_gt(strlen(choice.reason), 5);
}
END_TEST

START_TEST(dispatch_scales_in_hardware_only_what_is_a_power_of_two)
{
    static const struct {
        enum einsum_weight_type type;
        enum einsum_scale_type weight, activation;
        uint32_t block_r;
        enum cuda_mode mode;
    } cases[] = {
        {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, EINSUM_SCALE_UE8M0, 128, CUDA_MODE_UE8M0_128},
        {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, EINSUM_SCALE_UE8M0, 32, CUDA_MODE_UE8M0_32},
        {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, EINSUM_SCALE_FP32, 128, CUDA_MODE_FP32_128},
        {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, EINSUM_SCALE_UE8M0, 32, CUDA_MODE_FP32_32},
        {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, EINSUM_SCALE_FP32, 128, CUDA_MODE_FP32_128},
        {EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, EINSUM_SCALE_UE8M0, 128, CUDA_MODE_BF16},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct einsum_weight_format format =
            format_of(8, cases[i].type, cases[i].weight, cases[i].block_r);
        struct cuda_choice choice = cuda_dispatch(12, 0, &format, cases[i].activation, 1, NULL);
        ck_assert_int_eq(choice.mode, cases[i].mode);
    }
}
END_TEST

// ---- the table

enum { SEGMENTS_MAX = 64 };

static uint32_t next_random(void)
{
    static uint32_t state = 7;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

static struct cuda_bucket bucket_of(uint32_t tokens_max)
{
    return (struct cuda_bucket){
        .tokens_max = tokens_max,
        .decode_tokens = tokens_max <= 8    ? 8
                         : tokens_max <= 16 ? 16
                         : tokens_max <= 32 ? 32
                                            : 64,
        .decode_workers = 132,
        .prefill_blocks = 264,
        .prefill_from = CUDA_PREFILL_TOKENS_MIN,
        .hopper_from = UINT32_MAX,
    };
}

static struct cuda_segment segment_of(const struct cuda_weight *weight, uint32_t tokens,
                                      uint32_t group_begin, uint32_t groups, uint64_t address)
{
    struct cuda_segment segment = {
        .weight = weight,
        .operand = {.tokens = tokens,
                    .group_begin = group_begin,
                    .groups = groups,
                    .activation_layout =
                        address % 3 ? EINSUM_ACTIVATIONS_TGR : EINSUM_ACTIVATIONS_GTR,
                    .scale_layout = address % 5 ? EINSUM_SCALES_TGK : EINSUM_SCALES_GKT,
                    .scale_type = address % 7 ? EINSUM_SCALE_UE8M0 : EINSUM_SCALE_FP32,
                    .output_type = address % 2 ? EINSUM_OUTPUT_BF16 : EINSUM_OUTPUT_FP32,
                    .activations = (const void *)(uintptr_t)(address << 40),
                    .scales = (const void *)(uintptr_t)(address << 40 | (uint64_t)1 << 39),
                    .output = (void *)(uintptr_t)(address << 40 | (uint64_t)3 << 38)},
    };
    if (address % 4 == 0) { // from attention
        struct einsum_operand *operand = &segment.operand;
        operand->activation_layout = EINSUM_ACTIVATIONS_IN_PLACE;
        operand->scale_layout = EINSUM_SCALES_IN_PLACE;
        operand->scale_type = EINSUM_SCALE_UE8M0;
        operand->scales = (const uint8_t *)operand->activations + weight->format.reduced_dim;
        operand->rotations = (const void *)(uintptr_t)(address << 40 | (uint64_t)1 << 38);
    }
    return segment;
}

// How many spans of the table are this segment's.
static uint32_t count_spans(const struct cuda_table *table, const struct cuda_segment *segment)
{
    const struct einsum_operand *operand = &segment->operand;
    const struct cuda_attention *spans =
        (const struct cuda_attention *)((const unsigned char *)table + table->rows_offset);
    uint32_t found = 0, rows = 0;
    for (uint32_t i = table->attention_spans; i > 0; i--) {
        const struct cuda_attention *span = &spans[-(int)i];
        ck_assert_uint_eq(span->row_begin, rows); // ascending from 0, without a gap
        if (span->rows == (uint64_t)(uintptr_t)operand->activations) {
            ck_assert_uint_eq(span->rotations, (uint64_t)(uintptr_t)operand->rotations);
            ck_assert_uint_eq(span->groups, operand->groups);
            ck_assert_uint_eq(span->reduced_dim, segment->weight->format.reduced_dim);
            ck_assert_uint_eq(span->block_r, segment->weight->format.block_r);
            uint32_t end = i == 1 ? table->attention_rows : span[1].row_begin;
            ck_assert_uint_eq(end - rows, operand->tokens * operand->groups);
            found++;
        }
        rows = i == 1 ? table->attention_rows : span[1].row_begin;
    }
    return found;
}

// Which row of the table has this activation address; UINT32_MAX if there is not exactly one.
static uint32_t find_row(const struct cuda_row *rows, uint32_t n, uint64_t activations)
{
    uint32_t found = UINT32_MAX, times = 0;
    for (uint32_t i = 0; i < n; i++)
        if (rows[i].activations == activations) {
            found = i;
            times++;
        }
    return times == 1 ? found : UINT32_MAX;
}

static const struct cuda_run *run_of_row(const struct cuda_table *table, uint32_t row)
{
    const struct cuda_run *found = NULL;
    for (uint32_t i = 0; i < table->decode_runs + table->prefill_runs; i++)
        if (row - table->runs[i].row_begin < table->runs[i].rows) {
            ck_assert_ptr_null(found); // in one run only
            found = &table->runs[i];
        }
    return found;
}

// Tables of one of V4's modes are launched by the kernel that knows no other, and no others are.
static void expect_decode_form(const struct cuda_table *table)
{
    uint32_t n = table->decode_runs, ue8m0 = 0, fp32 = 0;
    for (uint32_t i = 0; i < n; i++) {
        ue8m0 += table->runs[i].mode == CUDA_MODE_UE8M0_128;
        fp32 += table->runs[i].mode == CUDA_MODE_FP32_128;
    }
    uint32_t expected = n == 0       ? 0
                        : ue8m0 == n ? (uint32_t)CUDA_LAUNCH_DECODE_UE8M0
                        : fp32 == n  ? (uint32_t)CUDA_LAUNCH_DECODE_FP32
                                     : (uint32_t)CUDA_LAUNCH_DECODE;
    ck_assert_uint_eq(cuda_table_launches(table) & CUDA_LAUNCH_DECODE, expected);
}

// Every token of every segment has one row, in one run, of its weight and groups, with its strides.
START_TEST(table_holds_every_token_once)
{
    static const uint32_t rooms[] = {8, 16, 32, 64, 256, 1024};
    uint32_t room = rooms[_i % 6];
    struct cuda_bucket bucket = bucket_of(room);
    struct cuda_weight weights[4];
    for (uint32_t i = 0; i < 4; i++)
        weights[i] = (struct cuda_weight){
            .format = format_of(8, EINSUM_WEIGHT_E4M3,
                                i % 2 ? EINSUM_SCALE_FP32 : EINSUM_SCALE_UE8M0, i < 2 ? 128 : 32),
            .elements = (uint8_t *)(uintptr_t)(0x1000 * (i + 1)),
        };
    struct cuda_segment segments[SEGMENTS_MAX];
    uint32_t n = 0, tokens = 0;
    while (n < SEGMENTS_MAX) {
        uint32_t t = next_random() % (n % 5 == 0 ? room : 7);
        if (tokens + t > room)
            break;
        uint32_t begin = next_random() % 3 == 0 ? next_random() % 8 : 0;
        segments[n] = segment_of(&weights[next_random() % 4], t, begin, 8 - begin, n + 1);
        tokens += t;
        n++;
    }
    uint32_t order[SEGMENTS_MAX];
    uint64_t bytes = cuda_table_bytes(&bucket, SEGMENTS_MAX);
    struct cuda_table *table = malloc(bytes); // exact: a sanitizer sees what goes beyond
    cuda_table_build(&bucket, segments, n, order, table);
    ck_assert_uint_le(cuda_table_used(table), bytes);
    const struct cuda_row *rows =
        (const struct cuda_row *)((const unsigned char *)table + table->rows_offset);

    for (uint32_t i = 0; i < n; i++) {
        const struct einsum_operand *o = &segments[i].operand;
        bool gtr = o->activation_layout == EINSUM_ACTIVATIONS_GTR;
        uint32_t in_place = o->activation_layout == EINSUM_ACTIVATIONS_IN_PLACE ? 2 : 1;
        ck_assert_uint_eq(count_spans(table, &segments[i]), o->rotations && o->tokens ? 1 : 0);
        struct einsum_scale_strides strides = einsum_scale_strides(&segments[i].weight->format, o);
        for (uint32_t t = 0; t < o->tokens; t++) {
            uint64_t at = (uint64_t)(uintptr_t)o->activations +
                          (uint64_t)t * (gtr ? 1 : o->groups * in_place) * 4096;
            uint32_t row = find_row(rows, tokens, at);
            ck_assert_uint_ne(row, UINT32_MAX);
            const struct cuda_run *run = run_of_row(table, row);
            ck_assert_ptr_nonnull(run);
            ck_assert_uint_eq(run->elements, (uint64_t)(uintptr_t)segments[i].weight->elements);
            ck_assert_uint_eq(run->group_begin, o->group_begin);
            ck_assert_uint_eq(run->groups, o->groups);
            ck_assert_uint_eq(rows[row].activation_group, gtr ? o->tokens : in_place);
            ck_assert_uint_eq(rows[row].scales, (uint64_t)(uintptr_t)o->scales + t * strides.token);
            ck_assert_uint_eq(rows[row].scale_group, strides.group);
            ck_assert_uint_eq(rows[row].scale_word, strides.word);
            ck_assert_uint_eq(rows[row].scale_byte, strides.byte);
            ck_assert_uint_eq(rows[row].output,
                              (uint64_t)(uintptr_t)o->output +
                                  (uint64_t)t * o->groups * 1024 *
                                      einsum_output_element_bytes(o->output_type));
            // A run that scales in hardware has no FP32 scale in it.
            bool fp32 = rows[row].flags & CUDA_ROW_SCALES_FP32;
            ck_assert_int_eq(fp32, o->scale_type == EINSUM_SCALE_FP32);
            if (run->mode == CUDA_MODE_UE8M0_128 || run->mode == CUDA_MODE_UE8M0_32)
                ck_assert(!fp32);
        }
    }
    expect_decode_form(table);
    free(table);
}
END_TEST

// Units are numbered without gaps, runs are no longer than their kernel takes, and long ones go to
// prefill where there is one.
START_TEST(table_numbers_units)
{
    uint32_t room = (uint32_t)1 << (3 + _i);
    struct cuda_bucket bucket = bucket_of(room);
    struct cuda_weight weight = {.format =
                                     format_of(8, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128)};
    struct cuda_segment segment = segment_of(&weight, room, 0, 8, 1);
    uint32_t order[1];
    struct cuda_table *table = malloc(cuda_table_bytes(&bucket, 1));
    cuda_table_build(&bucket, &segment, 1, order, table);
    uint32_t units = 0, rows = 0;
    for (uint32_t i = 0; i < table->decode_runs; i++) {
        const struct cuda_run *run = &table->runs[i];
        ck_assert_uint_eq(run->unit_begin, units);
        ck_assert_uint_le(run->rows, bucket.decode_tokens);
        units += run->groups * run->tiles_d * run->tile_units;
        rows += run->rows;
        // A unit is 16 KiB whatever its shape.
        ck_assert_uint_eq((uint64_t)run->groups * run->tiles_d * run->tile_units * 16384,
                          einsum_weight_bytes(&weight.format));
    }
    ck_assert_uint_eq(units, table->decode_units);
    if (room >= CUDA_PREFILL_TOKENS_MIN) {
        ck_assert_uint_eq(table->decode_runs, 0);
        ck_assert_uint_eq(table->decode_workers, 0);
        ck_assert_uint_eq(table->prefill_runs, 1);
        ck_assert_uint_eq(table->prefill_tiles, 8 * 8 * (room / CUDA_PREFILL_TOKENS));
    } else {
        ck_assert_uint_eq(rows, room);
        ck_assert_uint_eq(table->prefill_runs, 0);
        // Of 132 places 128: then no tile, or a half of each, is one worker's.
        ck_assert_uint_eq(table->decode_workers, 128);
    }
    free(table);
}
END_TEST

// Segments of one weight, the kernels that they ask for, and the runs that they become.
static const struct forced {
    enum einsum_weight_type type;
    bool hopper; // the device's
    enum cuda_kernel kernels[3];
    uint32_t tokens[3];
    uint32_t decode_runs, prefill_runs, hopper_runs;
} forced[] = {
    // Many tokens stay with decode, a few go to prefill.
    {EINSUM_WEIGHT_E4M3, false, {CUDA_KERNEL_DECODE}, {200}, 4, 0, 0},
    {EINSUM_WEIGHT_E4M3, false, {CUDA_KERNEL_PREFILL}, {1}, 0, 1, 0},
    {EINSUM_WEIGHT_E4M3, true, {CUDA_KERNEL_HOPPER}, {1}, 0, 0, 1},
    {EINSUM_WEIGHT_E4M3, true, {CUDA_KERNEL_DECODE}, {40}, 1, 0, 0},
    {EINSUM_WEIGHT_E4M3, true, {CUDA_KERNEL_PREFILL}, {40}, 0, 1, 0},
    {EINSUM_WEIGHT_E4M3, true, {CUDA_KERNEL_AUTO}, {40}, 0, 0, 1},
    // Those who ask for the same share a reading, others do not.
    {EINSUM_WEIGHT_E4M3, false, {CUDA_KERNEL_DECODE, CUDA_KERNEL_DECODE}, {5, 6}, 1, 0, 0},
    {EINSUM_WEIGHT_E4M3, false, {CUDA_KERNEL_AUTO, CUDA_KERNEL_DECODE}, {5, 6}, 2, 0, 0},
    {EINSUM_WEIGHT_E4M3,
     true,
     {CUDA_KERNEL_HOPPER, CUDA_KERNEL_PREFILL, CUDA_KERNEL_DECODE},
     {5, 6, 7},
     1,
     1,
     1},
    // Only those who share a reading count together: 60 and 60 are not 120.
    {EINSUM_WEIGHT_E4M3, false, {CUDA_KERNEL_AUTO, CUDA_KERNEL_DECODE}, {60, 60}, 2, 0, 0},
    {EINSUM_WEIGHT_E4M3, false, {CUDA_KERNEL_AUTO, CUDA_KERNEL_AUTO}, {60, 60}, 0, 1, 0},
    // Hopper's arm takes no BF16.
    {EINSUM_WEIGHT_BF16, true, {CUDA_KERNEL_HOPPER}, {5}, 1, 0, 0},
    {EINSUM_WEIGHT_BF16, true, {CUDA_KERNEL_HOPPER}, {200}, 0, 1, 0},
};

START_TEST(table_honours_kernels_asked_for)
{
    const struct forced *it = &forced[_i];
    struct cuda_bucket bucket = bucket_of(512);
    if (it->hopper) {
        bucket.hopper_rows = 128;
        bucket.hopper_tokens = 64;
        bucket.hopper_workers = 132;
        bucket.hopper_from = CUDA_HOPPER_TOKENS_MIN;
    }
    bool bf16 = it->type == EINSUM_WEIGHT_BF16;
    struct cuda_weight weight = {
        .format = format_of(8, it->type, bf16 ? EINSUM_SCALE_NONE : EINSUM_SCALE_UE8M0, 128)};
    struct cuda_segment segments[3];
    uint32_t order[3], n = 0, tokens = 0, rows = 0;
    for (; n < 3 && it->tokens[n] > 0; n++) {
        segments[n] = segment_of(&weight, it->tokens[n], 0, 8, n + 1);
        segments[n].kernel = it->kernels[n];
        tokens += it->tokens[n];
    }
    struct cuda_table *table = malloc(cuda_table_bytes(&bucket, n));
    cuda_table_build(&bucket, segments, n, order, table);
    ck_assert_uint_eq(table->decode_runs, it->decode_runs);
    ck_assert_uint_eq(table->prefill_runs, it->prefill_runs);
    ck_assert_uint_eq(table->hopper_runs, it->hopper_runs);
    for (uint32_t i = 0; i < it->decode_runs + it->prefill_runs + it->hopper_runs; i++)
        rows += table->runs[i].rows;
    ck_assert_uint_eq(rows, tokens);
    ck_assert_uint_eq(cuda_table_launches(table),
                      (it->decode_runs == 0 ? 0
                       : bf16               ? (uint32_t)CUDA_LAUNCH_DECODE
                                            : (uint32_t)CUDA_LAUNCH_DECODE_UE8M0) |
                          (it->prefill_runs ? (uint32_t)CUDA_LAUNCH_PREFILL : 0) |
                          (it->hopper_runs ? (uint32_t)CUDA_LAUNCH_HOPPER : 0));
    free(table);
}
END_TEST

// Segments of one weight and one, two, ... of them: what becomes of many tokens on Hopper.
static const struct many {
    uint32_t room;                       // of the bucket
    uint32_t clusters;                   // that the device holds at once
    bool tiles;                          // whether the weight has them
    uint32_t tokens[4];                  // of the segments; group ranges are equal
    uint32_t tile_tokens, tiles_n, maps; // no tokens: the other kernel's
} many[] = {
    {4096, 66, true, {32}, 0, 0, 0},
    {4096, 66, true, {33}, 128, 4 * 8, 0}, // half as many tiles as places
    {4096, 66, true, {128}, 128, 4 * 8, 1},
    {4096, 66, false, {128}, 0, 0, 0},
    {4096, 132, true, {128}, 0, 0, 0}, // a quarter
    {4096, 132, true, {129}, 128, 4 * 8 * 2, 1},
    {4096, 66, false, {4096}, 0, 0, 0},
    {4096, 66, true, {129}, 128, 4 * 8 * 2, 1}, // two tiles of 128 for one of 256
    {4096,
     66,
     true,
     {256},
     128,
     4 * 8 * 2,
     1}, // 64 short tiles fill the device, 32 long ones do not
    {4096, 66, true, {512}, 256, 4 * 8 * 2, 1},
    {4096, 66, true, {700}, 128, 4 * 8 * 6, 1}, // three rounds of short tiles, not two of long ones
    {4096, 8, true, {256}, 256, 4 * 8, 1},
    {4096, 66, true, {63, 65, 64, 320}, 256, 4 * 8 * 2, 3}, // boxes of 64
    {4096, 66, true, {1, 1, 1, 126}, 128, 4 * 8 * 2, 1},
    {4096, 66, true, {40, 40, 40, 40}, 128, 4 * 8 * 2, 0},
    // Tiles of half as many outputs, and maps from 17 tokens on, without which it takes more.
    {64, 66, true, {17}, 64, 8 * 8, 1},
    {64, 66, true, {64}, 64, 8 * 8, 1},
    {32, 66, true, {31}, 64, 8 * 8, 1},
    {64, 66, true, {16, 16}, 0, 0, 0},
    {64, 66, true, {17, 15}, 0, 0, 0},
    {64, 66, true, {17, 16}, 64, 8 * 8, 1},
    {64, 66, true, {16, 16, 16, 16}, 64, 8 * 8, 0},
    {64, 66, true, {17, 17, 17, 13}, 64, 8 * 8, 3},
    {64, 66, false, {64}, 0, 0, 0},
    {64, 200, true, {64}, 0, 0, 0}, // too few for the device
};

static bool fake_map(struct cuda_map *map, const struct cuda_row *rows, uint32_t tokens,
                     uint32_t groups, uint32_t reduced_dim)
{
    map->tensor[0] = rows[0].activations;
    map->tensor[1] = tokens;
    ck_assert_uint_eq(groups, 8);
    ck_assert_uint_eq(reduced_dim, 4096);
    return true;
}

// Of each run's rows those of long segments have maps, at places of their own, and no others.
static uint32_t check_maps(const struct cuda_table *table, uint32_t tokens_min)
{
    const struct cuda_row *rows =
        (const struct cuda_row *)((const unsigned char *)table + table->rows_offset);
    const struct cuda_run *run = &table->runs[table->decode_runs + table->prefill_runs];
    uint32_t maps = 0, last = 0;
    for (uint32_t row = run->row_begin; row < run->row_begin + run->rows; row++) {
        uint32_t at = rows[row].map;
        if (at == 0)
            continue;
        const struct cuda_map *map = (const struct cuda_map *)table + at;
        ck_assert((const void *)map >= (const void *)(run + 1));
        ck_assert((const void *)(map + 1) <= (const void *)rows);
        ck_assert_uint_ge(row, map->row_begin);
        ck_assert_uint_lt(row - map->row_begin, map->tensor[1]);
        ck_assert_uint_eq(rows[map->row_begin].activations, map->tensor[0]);
        ck_assert_uint_ge(map->tensor[1], tokens_min);
        maps += at != last;
        last = at;
    }
    return maps;
}

START_TEST(table_cuts_many_tokens_into_tiles)
{
    const struct many *it = &many[_i];
    bool some = it->room <= CUDA_MANY_BOX;
    struct cuda_bucket bucket = bucket_of(it->room);
    bucket.hopper_rows = 128;
    bucket.hopper_tokens = 128;
    bucket.hopper_workers = 132;
    bucket.hopper_from = CUDA_HOPPER_TOKENS_MIN;
    bucket.many_rows = some ? 64 : 128;
    bucket.many_tokens = some ? CUDA_MANY_BOX : CUDA_MANY_TOKENS;
    bucket.many_from = some ? CUDA_HOPPER_TOKENS_MIN : CUDA_HOPPER_MANY_TOKENS_MIN;
    bucket.many_cluster = 2;
    bucket.many_blocks = 2 * it->clusters;
    bucket.many_map = fake_map;
    static uint8_t elements[1]; // only addresses count
    struct cuda_weight weight = {
        .format = format_of(8, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128), .elements = elements};
    if (it->tiles)
        weight.tiles = (uint8_t *)((uintptr_t)elements + 2048 * (uint64_t)CUDA_MANY_TILE_BYTES);
    struct cuda_segment segments[4];
    uint32_t order[4], n = 0, tokens = 0;
    for (; n < 4 && it->tokens[n] > 0; n++) {
        segments[n] = segment_of(&weight, it->tokens[n], 0, 8, n + 1);
        tokens += it->tokens[n];
    }
    uint64_t bytes = cuda_table_bytes(&bucket, n);
    struct cuda_table *table = malloc(bytes);
    cuda_table_build(&bucket, segments, n, order, table);
    ck_assert_uint_le(cuda_table_used(table), bytes);
    ck_assert_uint_eq(table->many_tiles, it->tiles_n);
    ck_assert_uint_eq(table->many_runs, it->tiles_n > 0);
    ck_assert_uint_eq(table->hopper_runs, it->tiles_n == 0);
    ck_assert_uint_eq(cuda_table_launches(table) & CUDA_LAUNCH_HOPPER_MANY,
                      it->tiles_n > 0 ? CUDA_LAUNCH_HOPPER_MANY : 0);
    ck_assert_uint_eq(table->runs[0].rows, tokens);
    ck_assert_uint_eq(check_maps(table, some ? 17 : 64), it->maps);
    if (it->tiles_n > 0) {
        ck_assert_uint_eq(table->runs[0].tile_units, it->tile_tokens);
        ck_assert_uint_eq(table->runs[0].tiles, 2048);
    }
    for (uint32_t i = 0; i < n; i++)
        ck_assert_uint_eq(count_spans(table, &segments[i]), segments[i].operand.rotations ? 1 : 0);
    free(table);
}
END_TEST

// Slices of a weight fill the device with whole tiles, of the fewer rows the fewer groups there are.
static const struct dealt {
    uint32_t room, tokens, groups;
    bool hopper;
    uint32_t units, tile_units, workers;
    bool whole;
} dealt[] = {
    {8, 1, 8, false, 2048, 16, 128, true},
    {8, 1, 4, false, 1024, 8, 128, true},
    {8, 8, 2, false, 512, 4, 128, true},
    {8, 8, 1, false, 256, 4, 64, true},
    {16, 16, 1, false, 256, 4, 64, true},
    {32, 32, 2, false, 512, 8, 64, true},     // four warps at most share so many tokens
    {64, 64, 8, false, 2048, 32, 128, false}, // two workers a tile
    {32, 32, 8, true, 2048, 16, 128, true},
    {32, 32, 4, true, 1024, 16, 128, false}, // wgmma takes 64 rows at least
};

START_TEST(table_deals_tiles)
{
    const struct dealt *it = &dealt[_i];
    struct cuda_bucket bucket = bucket_of(it->room);
    if (it->hopper) {
        bucket.hopper_tokens = 32;
        bucket.hopper_workers = 132;
        bucket.hopper_warps_k = 2;
        bucket.hopper_from = CUDA_HOPPER_TOKENS_MIN;
    }
    struct cuda_weight weight = {
        .format = format_of(it->groups, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128)};
    struct cuda_segment segment = segment_of(&weight, it->tokens, 0, it->groups, 1);
    uint32_t order[1];
    struct cuda_table *table = malloc(cuda_table_bytes(&bucket, 1));
    cuda_table_build(&bucket, &segment, 1, order, table);
    const struct cuda_run *run = &table->runs[0];
    ck_assert_uint_eq(table->decode_runs, it->hopper ? 0 : 1);
    ck_assert_uint_eq(table->hopper_runs, it->hopper ? 1 : 0);
    ck_assert_uint_eq(it->hopper ? table->hopper_units : table->decode_units, it->units);
    ck_assert_uint_eq(run->tile_units, it->tile_units);
    ck_assert_uint_eq(it->hopper ? run->workers : table->decode_workers, it->workers);
    ck_assert_int_eq(it->units / it->workers % it->tile_units == 0, it->whole);
    free(table);
}
END_TEST

START_TEST(table_of_nothing_is_empty)
{
    struct cuda_bucket bucket = bucket_of(8);
    struct cuda_weight weight = {.format =
                                     format_of(8, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128)};
    struct cuda_segment segment = segment_of(&weight, 0, 0, 8, 1);
    uint32_t order[1];
    struct cuda_table *table = malloc(cuda_table_bytes(&bucket, 1));
    for (uint32_t n = 0; n < 2; n++) {
        cuda_table_build(&bucket, &segment, n, order, table);
        ck_assert_uint_eq(table->decode_units + table->decode_workers + table->prefill_tiles, 0);
        ck_assert_uint_eq(cuda_table_used(table), sizeof *table);
    }
    free(table);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda_dispatch");
    TCase *dispatch = tcase_create("dispatch");
    tcase_add_loop_test(dispatch, dispatch_names_the_kernel, 0, sizeof choices / sizeof choices[0]);
    tcase_add_test(dispatch, dispatch_scales_in_hardware_only_what_is_a_power_of_two);
    suite_add_tcase(suite, dispatch);
    TCase *table = tcase_create("table");
    tcase_add_loop_test(table, table_holds_every_token_once, 0, 60);
    tcase_add_loop_test(table, table_numbers_units, 0, 8);
    tcase_add_loop_test(table, table_deals_tiles, 0, sizeof dealt / sizeof dealt[0]);
    tcase_add_test(table, table_of_nothing_is_empty);
    tcase_add_loop_test(table, table_cuts_many_tokens_into_tiles, 0, sizeof many / sizeof many[0]);
    tcase_add_loop_test(table, table_honours_kernels_asked_for, 0,
                        sizeof forced / sizeof forced[0]);
    suite_add_tcase(suite, table);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
