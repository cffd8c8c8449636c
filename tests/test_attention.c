// Goal: attention_quantise and both of its ways give exactly the bytes that attention.h describes.
// Method: plain_attention.h, which shares no code with kernels/.
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plain_attention.h"

enum {
    HEADS_MAX = EINSUM_DIM_MAX / ATTENTION_HEAD_DIM,
    ROW_BYTES_MAX = EINSUM_DIM_MAX * 2,
    GUARD_BYTES = 64,
    POISON = 0xA5,
};

// --- comparison

static const struct {
    const char *name;
    void (*quantise)(void *, uint32_t, uint32_t, const struct attention_rotation *);
} ways[] = {
    {"portable", attention_quantise_portable},
    {"avx2", attention_quantise_avx2},
    {"the chosen one", attention_quantise},
};
enum { WAYS = 3 };

static uint32_t next_random(void)
{
    static uint32_t state = 2463534242;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

static void check_row(const uint16_t *row, uint32_t reduced_dim, uint32_t block_r,
                      const struct attention_rotation *rotation, const char *what)
{
    static uint8_t codes[ROW_BYTES_MAX / 2], scales[ROW_BYTES_MAX / 64];
    static _Alignas(64) uint8_t memory[GUARD_BYTES + ROW_BYTES_MAX + GUARD_BYTES];
    plain_attention(row, reduced_dim, block_r, rotation, codes, scales);
    for (int way = 0; way < WAYS; way++) {
        if (ways[way].quantise == attention_quantise_avx2 && !attention_avx2_supported())
            continue;
        uint8_t *at = memory + GUARD_BYTES, *end = at + 2 * (size_t)reduced_dim;
        memcpy(at, row, 2 * (size_t)reduced_dim);
        memset(memory, POISON, GUARD_BYTES);
        memset(end, POISON, GUARD_BYTES);
        ways[way].quantise(at, reduced_dim, block_r, rotation);
        for (uint32_t r = 0; r < reduced_dim; r++)
            if (at[r] != codes[r]) // an assertion for each would take minutes
                ck_abort_msg("%s, %s, R %u, blocks of %u: %04X at %u became %02X, not %02X", what,
                             ways[way].name, reduced_dim, block_r, row[r], r, at[r], codes[r]);
        for (uint32_t k = 0; k < reduced_dim / block_r; k++)
            if (at[reduced_dim + k] != scales[k])
                ck_abort_msg("%s, %s, R %u: scale %u of blocks of %u is %u, not %u", what,
                             ways[way].name, reduced_dim, k, block_r, at[reduced_dim + k],
                             scales[k]);
        static const uint8_t guard[GUARD_BYTES] = {[0 ... GUARD_BYTES - 1] = POISON};
        ck_assert_mem_eq(memory, guard, GUARD_BYTES);
        ck_assert_mem_eq(end, guard, GUARD_BYTES);
    }
}

static const uint32_t blocks_r[] = {128, 32};

// --- tests

// Each of the 65536 codes where it meets its like: blocks of close exponents, so that none vanishes.
START_TEST(every_code_in_order)
{
    static uint16_t row[65536];
    for (uint32_t i = 0; i < 65536; i++)
        row[i] = (uint16_t)(i >> 1 | i << 15); // positive and negative side by side
    struct attention_rotation rotation = plain_rotation(0.37);
    check_row(row, 65536, blocks_r[_i], &rotation, "codes in order");
}
END_TEST

// And where it meets any other.
START_TEST(every_code_shuffled)
{
    static uint16_t row[65536];
    for (uint32_t i = 0; i < 65536; i++)
        row[i] = (uint16_t)i;
    for (uint32_t i = 65535; i > 0; i--) {
        uint32_t j = next_random() % (i + 1);
        uint16_t swap = row[i];
        row[i] = row[j];
        row[j] = swap;
    }
    struct attention_rotation rotation = plain_rotation(2.1);
    check_row(row, 65536, blocks_r[_i], &rotation, "codes shuffled");
    for (uint32_t i = 0; i < 65536; i++)
        if ((row[i] & 0x7F80) == 0x7F80)
            row[i] &= 0xBFFF; // now no block is NaN
    check_row(row, 65536, blocks_r[_i], &rotation, "finite codes shuffled");
}
END_TEST

// Every finite code under every scale that leaves something of it.
START_TEST(every_code_under_near_scales)
{
    static uint16_t row[512];
    struct attention_rotation rotation = plain_rotation(0);
    uint32_t block_r = blocks_r[_i];
    for (uint32_t exponent = 1; exponent < 255; exponent++)
        for (uint32_t above = 0; above < 20 && exponent + above < 255; above += 1 + above / 4) {
            for (uint32_t i = 0; i < 512; i++) {
                uint32_t greatest = i % block_r == 7 ? above : 0; // of its block
                row[i] = (uint16_t)((exponent + greatest) << 7 | i % 128 | (i & 128) << 8);
            }
            check_row(row, 512, block_r, &rotation, "near scales");
        }
}
END_TEST

START_TEST(random_rows)
{
    static uint16_t row[HEADS_MAX * ATTENTION_HEAD_DIM];
    static const uint32_t heads[] = {1, 2, 3, 5, 8, 9, 17};
    for (uint32_t round = 0; round < 70; round++) {
        uint32_t reduced_dim = heads[round % 7] * ATTENTION_HEAD_DIM;
        uint32_t spread = 1 + next_random() % 40; // binades
        for (uint32_t i = 0; i < reduced_dim; i++) {
            uint32_t random = next_random();
            uint32_t exponent = 100 + random % spread;
            row[i] = (uint16_t)((random >> 16 & 0x807F) | exponent << 7);
            if (random >> 8 % 61 == 0)
                row[i] &= 0x807F; // subnormal, zero
        }
        struct attention_rotation rotation = plain_rotation(next_random() % 100000 * 1e-3);
        check_row(row, reduced_dim, blocks_r[_i], &rotation, "random");
    }
}
END_TEST

// What a block of one kind of value becomes, and that it spoils no neighbour.
START_TEST(special_blocks)
{
    static const uint16_t specials[] = {
        0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, // zeros, subnormals, the least normal
        0x2EDB, 0x2EDC, 0x7F7F, 0xFF7F,                 // about 1e-10, the greatest
        0x43DF, 0x43E0, 0x43E1,                         // about 448
        0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF,         // infinities, NaN
    };
    uint32_t block_r = blocks_r[_i];
    uint16_t row[2 * ATTENTION_HEAD_DIM];
    for (size_t s = 0; s < sizeof specials / sizeof *specials; s++)
        for (uint32_t at = 0; at < 2 * ATTENTION_HEAD_DIM; at += 61) {
            struct attention_rotation rotation = plain_rotation((double)at);
            for (uint32_t i = 0; i < 2 * ATTENTION_HEAD_DIM; i++)
                row[i] = i / block_r == at / block_r ? specials[s] : (uint16_t)(0x3F80 + i % 64);
            check_row(row, 2 * ATTENTION_HEAD_DIM, block_r, &rotation, "a special block");
            for (uint32_t i = 0; i < 2 * ATTENTION_HEAD_DIM; i++)
                row[i] = i == at ? specials[s] : (uint16_t)(0xBF80 + i % 64);
            check_row(row, 2 * ATTENTION_HEAD_DIM, block_r, &rotation, "a special value");
        }
}
END_TEST

// A rotation may overflow, cancel, or be no rotation at all.
START_TEST(special_rotations)
{
    static const float specials[] = {0,     -0.0f,   1,        -1,        0x1p-149f, -0x1p-140f,
                                     1e30f, 3.4e38f, INFINITY, -INFINITY, NAN};
    enum { SPECIALS = sizeof specials / sizeof *specials };
    uint16_t row[ATTENTION_HEAD_DIM];
    for (uint32_t i = 0; i < ATTENTION_HEAD_DIM; i++)
        row[i] = (uint16_t)(next_random() & 0xBFFF);
    for (int c = 0; c < SPECIALS; c++)
        for (int s = 0; s < SPECIALS; s++) {
            struct attention_rotation rotation = plain_rotation(1);
            for (int i = c % 3; i < ATTENTION_ROPE_PAIRS; i += 3) {
                rotation.cos[i] = specials[c];
                rotation.sin[i] = specials[s];
            }
            check_row(row, ATTENTION_HEAD_DIM, blocks_r[_i], &rotation, "a special rotation");
        }
    for (uint32_t i = 0; i < ATTENTION_HEAD_DIM; i++)
        row[i] = 0x7F7F;
    struct attention_rotation rotation = plain_rotation(0.785398163);
    check_row(row, ATTENTION_HEAD_DIM, blocks_r[_i], &rotation, "overflow");
}
END_TEST

START_TEST(by_hand)
{
    _Alignas(64) uint16_t row[512] = {0};
    struct attention_rotation rotation = plain_rotation(0);
    rotation.cos[0] = 0;
    rotation.sin[0] = 1;
    row[0] = 0x3F80;   // 1: scale 2^-8, code of 256
    row[128] = 0x43E0; // 448: scale 1, the greatest code
    row[256] = 0x43E1; // 450: scale 2, 225 rounds to 224
    row[448] = 0x4000; // (2, 3) turned back by a quarter: (3, -2), scale 2^-7
    row[449] = 0x4040;
    attention_quantise(row, 512, 128, &rotation);
    const uint8_t *codes = (const uint8_t *)row;
    ck_assert_uint_eq(codes[0], 0x78);
    ck_assert_uint_eq(codes[128], 0x7E);
    ck_assert_uint_eq(codes[256], 0x76);
    ck_assert_uint_eq(codes[448], 0x7C); // 384
    ck_assert_uint_eq(codes[449], 0xF8); // -256
    const uint8_t scales[4] = {119, 127, 128, 120};
    ck_assert_mem_eq(codes + 512, scales, 4);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("attention");
    TCase *bits = tcase_create("bits");
    tcase_set_timeout(bits, 60);
    tcase_add_test(bits, by_hand);
    tcase_add_loop_test(bits, every_code_in_order, 0, 2);
    tcase_add_loop_test(bits, every_code_shuffled, 0, 2);
    tcase_add_loop_test(bits, every_code_under_near_scales, 0, 2);
    tcase_add_loop_test(bits, random_rows, 0, 2);
    tcase_add_loop_test(bits, special_blocks, 0, 2);
    tcase_add_loop_test(bits, special_rotations, 0, 2);
    suite_add_tcase(suite, bits);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
