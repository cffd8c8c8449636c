// rope.c: rotations against the same formula in long double, YaRN's ramp against its definition,
// caches byte for byte, and what must be refused.
#include <check.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "folder.h"
#include "server/roots.h"
#include "server/rope.h"

enum { CACHE_ROWS = 100 };

static char directory[64];
static struct roots roots;

static void set_up(void)
{
    struct error err;
    folder_make(directory, sizeof directory, "test_rope");
    const char *root = directory;
    ck_assert_int_eq(roots_init(&roots, &root, 1, &err), STATUS_OK);
}

static void tear_down(void)
{
    roots_deinit(&roots);
    folder_remove(directory);
}

static struct rope *make(const struct rope_options *options)
{
    struct rope *rope = NULL;
    struct error err = {.text = ""};
    ck_assert_msg(rope_create(options, &roots, &rope, &err) == STATUS_OK, "%s", err.text);
    return rope;
}

static struct attention_rotation rotation_at(const struct rope *rope, int64_t position)
{
    struct attention_rotation rotation;
    struct error err;
    ck_assert_int_eq(rope_rotations(rope, &position, 1, &rotation, &err), STATUS_OK);
    return rotation;
}

// ---- computed

static const struct {
    double theta;
    int64_t position;
} angles[] = {
    {10000, 0},       {10000, 1},        {10000, 4095},     {10000, 1048575}, {160000, 1},
    {160000, 131071}, {160000, 1048575}, {500000.5, 77777}, {1.0001, 12},     {1 << 30, 999},
};

// The angle is FP32 arithmetic and so has one value; its cos and sin are rounded once.
START_TEST(computes_what_the_formula_says)
{
    struct rope *rope = make(&(struct rope_options){.theta = angles[_i].theta});
    struct attention_rotation rotation = rotation_at(rope, angles[_i].position);
    for (int i = 0; i < ATTENTION_ROPE_PAIRS; i++) {
        float power = (float)powl((float)angles[_i].theta, (long double)(2 * i) / 64);
        float frequency = 1.0f / power;
        volatile float angle = (float)angles[_i].position * frequency;
        ck_assert_float_eq(rotation.cos[i], (float)cosl(angle));
        ck_assert_float_eq(rotation.sin[i], (float)sinl(angle));
    }
    rope_unref(rope);
}
END_TEST

// Known by other means: position 1, pair 0 turns by one radian; pair 16 of theta 10000 by 1/100.
START_TEST(computes_known_angles)
{
    struct rope *rope = make(&(struct rope_options){.theta = 10000});
    struct attention_rotation one = rotation_at(rope, 1), zero = rotation_at(rope, 0);
    ck_assert_float_eq(one.cos[0], (float)0.5403023058681398);
    ck_assert_float_eq(one.sin[0], (float)0.8414709848078965);
    ck_assert_float_eq_tol(one.cos[16], 0.99995000f, 1e-7f);
    ck_assert_float_eq_tol(one.sin[16], 0.00999983f, 1e-8f);
    for (int i = 0; i < ATTENTION_ROPE_PAIRS; i++) {
        ck_assert_float_eq(zero.cos[i], 1);
        ck_assert_float_eq(zero.sin[i], 0);
    }
    rope_unref(rope);
}
END_TEST

// DeepSeek-V4's: theta 160000, 65536 positions stretched 16 times. By hand: pair i turns
// 65536 / (2 pi theta^(i/32)) times; 32 times at i = 15.5, once at i = 24.7. So pairs to 15 are
// kept, pairs from 25 are divided by 16, and the ramp between has ten steps.
START_TEST(yarn_slows_the_slow_pairs)
{
    const struct rope_options plain_options = {.theta = 160000};
    const struct rope_options yarn_options = {
        .theta = 160000, .factor = 16, .original_positions_max = 65536};
    struct rope *plain = make(&plain_options), *yarn = make(&yarn_options);
    struct attention_rotation a = rotation_at(plain, 1), b = rotation_at(yarn, 1);
    for (int i = 0; i < ATTENTION_ROPE_PAIRS; i++) {
        double frequency = pow(160000, -i / 32.0);
        double ramp = i <= 15 ? 0 : i >= 25 ? 1 : (i - 15) / 10.0;
        double expected = frequency / 16 * ramp + frequency * (1 - ramp);
        ck_assert_double_eq_tol(asin((double)b.sin[i]), expected, 1e-6 * expected);
        if (i <= 15)
            ck_assert_float_eq(b.sin[i], a.sin[i]);
    }
    rope_unref(plain);
    rope_unref(yarn);
}
END_TEST

// An attention factor would show as a length other than 1.
START_TEST(nothing_scales)
{
    struct rope *rope = make(&(struct rope_options){.theta = 160000,
                                                    .factor = 40,
                                                    .original_positions_max = 4096,
                                                    .beta_fast = 16,
                                                    .beta_slow = 2});
    for (int64_t position = 0; position < 1 << 20; position += 99991) {
        struct attention_rotation rotation = rotation_at(rope, position);
        for (int i = 0; i < ATTENTION_ROPE_PAIRS; i++)
            ck_assert_double_eq_tol(hypot((double)rotation.cos[i], (double)rotation.sin[i]), 1,
                                    1e-7);
    }
    rope_unref(rope);
}
END_TEST

START_TEST(a_factor_of_one_is_no_yarn)
{
    struct rope *plain = make(&(struct rope_options){.theta = 10000});
    struct rope *one = make(&(struct rope_options){.theta = 10000, .factor = 1});
    struct attention_rotation a = rotation_at(plain, 12345), b = rotation_at(one, 12345);
    ck_assert_mem_eq(&a, &b, sizeof a);
    rope_unref(plain);
    rope_unref(one);
}
END_TEST

START_TEST(describes_what_is_in_force)
{
    struct rope *rope =
        make(&(struct rope_options){.theta = 10000, .factor = 4, .original_positions_max = 4096});
    const struct rope_options *options = rope_describe(rope);
    ck_assert_double_eq(options->beta_fast, 32);
    ck_assert_double_eq(options->beta_slow, 1);
    ck_assert_uint_eq(options->positions_max, ROPE_POSITIONS_DEFAULT);
    ck_assert_str_eq(options->cache, "");
    rope_unref(rope_ref(rope));
    rope_unref(rope);
}
END_TEST

// ---- caches

static void write_file(const char *name, const char *header, const void *data, size_t bytes)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    uint64_t header_bytes = strlen(header);
    ck_assert_uint_eq(fwrite(&header_bytes, 8, 1, file), 1);
    ck_assert_uint_eq(fwrite(header, 1, header_bytes, file), header_bytes);
    ck_assert_uint_eq(fwrite(data, bytes, 1, file), 1);
    ck_assert_int_eq(fclose(file), 0);
}

// [CACHE_ROWS, 64], every value its own.
static float table[CACHE_ROWS][ATTENTION_ROPE_DIM];

static void write_cache(const char *name)
{
    for (int row = 0; row < CACHE_ROWS; row++)
        for (int i = 0; i < ATTENTION_ROPE_DIM; i++)
            table[row][i] = (float)(row * 1000 + i);
    write_file(
        name,
        "{\"cos_sin_cache\":{\"dtype\":\"F32\",\"shape\":[100,64],\"data_offsets\":[0,25600]}}",
        table, sizeof table);
}

START_TEST(a_cache_is_taken_as_it_is)
{
    write_cache("cache.safetensors");
    struct rope *rope = make(&(struct rope_options){.cache = "cache.safetensors"});
    ck_assert_uint_eq(rope_describe(rope)->positions_max, CACHE_ROWS);
    ck_assert_str_eq(rope_describe(rope)->cache, "cache.safetensors");
    ck_assert_str_eq(rope_describe(rope)->cache_tensor, "cos_sin_cache");
    // runs, repeats, both ends, backwards
    static const int64_t positions[] = {5, 6, 7, 7, 99, 0, 1, 50, 49, 48};
    struct attention_rotation rotations[ARRAY_LEN(positions)];
    struct error err;
    ck_assert_int_eq(rope_rotations(rope, positions, ARRAY_LEN(positions), rotations, &err),
                     STATUS_OK);
    for (size_t t = 0; t < ARRAY_LEN(positions); t++) {
        ck_assert_mem_eq(rotations[t].cos, table[positions[t]], sizeof rotations[t].cos);
        ck_assert_mem_eq(rotations[t].sin, table[positions[t]] + 32, sizeof rotations[t].sin);
    }
    rope_unref(rope);
}
END_TEST

START_TEST(a_cache_may_be_used_in_part)
{
    write_cache("cache.safetensors");
    struct rope *rope =
        make(&(struct rope_options){.cache = "cache.safetensors", .positions_max = 10});
    ck_assert_uint_eq(rope_describe(rope)->positions_max, 10);
    rope_unref(rope);
}
END_TEST

START_TEST(a_cache_that_shrinks_is_an_error)
{
    write_cache("cache.safetensors");
    struct rope *rope = make(&(struct rope_options){.cache = "cache.safetensors"});
    char path[128];
    snprintf(path, sizeof path, "%s/cache.safetensors", directory);
    ck_assert_int_eq(truncate(path, 200), 0);
    int64_t position = 99;
    struct attention_rotation rotation;
    struct error err;
    ck_assert_int_eq(rope_rotations(rope, &position, 1, &rotation, &err), STATUS_DATA_LOSS);
    ck_assert_ptr_nonnull(strstr(err.text, "shrunk"));
    rope_unref(rope);
}
END_TEST

START_TEST(a_position_past_the_end_is_a_broken_invariant)
{
    struct rope *rope = make(&(struct rope_options){.theta = 10000, .positions_max = 10});
    rotation_at(rope, 10);
}
END_TEST

START_TEST(a_negative_position_is_a_broken_invariant)
{
    rotation_at(make(&(struct rope_options){.theta = 10000}), -1);
}
END_TEST

// ---- what is refused

static const struct {
    struct rope_options options;
    enum status status;
    const char *text;
} refusals[] = {
    {{0}, STATUS_INVALID_ARGUMENT, "theta: expected 1.0001 to 1073741824, or a cache, got 0"},
    {{.theta = 1}, STATUS_INVALID_ARGUMENT, "theta: "},
    {{.theta = -10000}, STATUS_INVALID_ARGUMENT, "theta: "},
    {{.theta = 2e9}, STATUS_INVALID_ARGUMENT, "theta: "},
    {{.theta = NAN}, STATUS_INVALID_ARGUMENT, "theta: "},
    {{.theta = INFINITY}, STATUS_INVALID_ARGUMENT, "theta: "},
    {{.theta = 1e4, .factor = 0.5},
     STATUS_INVALID_ARGUMENT,
     "factor: expected 1 to 65536, got 0.5"},
    {{.theta = 1e4, .factor = NAN}, STATUS_INVALID_ARGUMENT, "factor: "},
    {{.theta = 1e4, .factor = 16}, STATUS_INVALID_ARGUMENT, "original_positions_max: expected 1"},
    {{.theta = 1e4, .factor = 16, .original_positions_max = 1, .beta_fast = 1, .beta_slow = 2},
     STATUS_INVALID_ARGUMENT,
     "beta_fast: expected beta_slow"},
    {{.theta = 1e4, .factor = 16, .original_positions_max = 1, .beta_slow = -1},
     STATUS_INVALID_ARGUMENT,
     "beta_slow: "},
    {{.theta = 1e4, .positions_max = ROPE_POSITIONS_MAX + 1},
     STATUS_INVALID_ARGUMENT,
     "positions_max: "},
    {{.theta = 1e4, .cache_tensor = "t"}, STATUS_INVALID_ARGUMENT, "cache_tensor: of no meaning"},
    {{.theta = 1e4, .cache = "good.safetensors"},
     STATUS_INVALID_ARGUMENT,
     "theta: of no meaning beside a cache"},
    {{.beta_slow = 1, .cache = "good.safetensors"}, STATUS_INVALID_ARGUMENT, "beta_slow: "},
    {{.cache = "none.safetensors"}, STATUS_NOT_FOUND, "cache: "},
    {{.cache = "/etc/passwd"}, STATUS_PERMISSION_DENIED, "cache: "},
    {{.cache = "../x"}, STATUS_PERMISSION_DENIED, "cache: "},
    {{.cache = "text"}, STATUS_FAILED_PRECONDITION, "cache: "},
    {{.cache = "good.safetensors", .cache_tensor = "other"},
     STATUS_FAILED_PRECONDITION,
     "cache_tensor: 'other' is not in"},
    {{.cache = "good.safetensors", .positions_max = CACHE_ROWS + 1},
     STATUS_FAILED_PRECONDITION,
     "positions_max: 101, but"},
    {{.cache = "bf16.safetensors"}, STATUS_FAILED_PRECONDITION, "expected F32"},
    {{.cache = "narrow.safetensors"}, STATUS_FAILED_PRECONDITION, "the last 32"},
    {{.cache = "flat.safetensors"}, STATUS_FAILED_PRECONDITION, "1 dimensions"},
    {{.cache = "empty.safetensors"}, STATUS_FAILED_PRECONDITION, "expected F32 [1 to"},
};

START_TEST(refuses)
{
    static const uint8_t zeros[256];
    write_cache("good.safetensors");
#define TENSOR(dtype, shape, end)                                                                  \
    "{\"cos_sin_cache\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[0," end "]" \
    "}"                                                                                            \
    "}"
    write_file("bf16.safetensors", TENSOR("BF16", "[2,64]", "256"), zeros, 256);
    write_file("narrow.safetensors", TENSOR("F32", "[2,32]", "256"), zeros, 256);
    write_file("flat.safetensors", TENSOR("F32", "[64]", "256"), zeros, 256);
    write_file("empty.safetensors",
               "{\"cos_sin_cache\":{\"dtype\":\"F32\",\"shape\":[0,64],\"data_offsets\":[0,0]},"
               "\"x\":{\"dtype\":\"F32\",\"shape\":[64],\"data_offsets\":[0,256]}}",
               zeros, 256);
    write_file("text", "", "no table", 8);
    struct rope *rope = NULL;
    struct error err = {.text = ""};
    enum status status = rope_create(&refusals[_i].options, &roots, &rope, &err);
    ck_assert_msg(status == refusals[_i].status, "%s: %s", status_name(status), err.text);
    ck_assert_msg(strstr(err.text, refusals[_i].text), "\"%s\" lacks \"%s\"", err.text,
                  refusals[_i].text);
    ck_assert_msg(!strstr(err.text, directory), "%s", err.text); // where the roots are is not told
    ck_assert_ptr_null(rope);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("rope");
    TCase *tests = tcase_create("rope");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_loop_test(tests, computes_what_the_formula_says, 0, (int)ARRAY_LEN(angles));
    tcase_add_test(tests, computes_known_angles);
    tcase_add_test(tests, yarn_slows_the_slow_pairs);
    tcase_add_test(tests, nothing_scales);
    tcase_add_test(tests, a_factor_of_one_is_no_yarn);
    tcase_add_test(tests, describes_what_is_in_force);
    tcase_add_test(tests, a_cache_is_taken_as_it_is);
    tcase_add_test(tests, a_cache_may_be_used_in_part);
    tcase_add_test(tests, a_cache_that_shrinks_is_an_error);
    tcase_add_test_raise_signal(tests, a_position_past_the_end_is_a_broken_invariant, SIGABRT);
    tcase_add_test_raise_signal(tests, a_negative_position_is_a_broken_invariant, SIGABRT);
    tcase_add_loop_test(tests, refuses, 0, (int)ARRAY_LEN(refusals));
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
