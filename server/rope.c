// Two kinds of rope behind one function:
//
//     theta    frequency[i] -- once, FP32 --> angle = position * frequency[i], FP32
//                                         --> cos, sin of it in double, rounded to FP32
//     cache    row `position` of the file's table is the rotation, byte for byte
//
// Angles are FP32 products on purpose: a model was trained with the rounding of those, and at long
// positions it is worth whole hundredths of a radian. Nothing here scales: YaRN's attention factor
// belongs to the softmax, and what it would have put into cos and sin must not come back out.
//
// Invariant: every position handed in was checked against positions_max.
#include "rope.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shards.h"

static_assert(sizeof(struct attention_rotation) == sizeof(float) * 2 * ATTENTION_ROPE_PAIRS,
              "a row of a cache is a rotation");

struct rope {
    _Atomic uint32_t references;
    struct rope_options options; // its strings are the two below
    char cache[ROPE_SOURCE_BYTES], cache_tensor[ROPE_TENSOR_BYTES];
    float frequency[ATTENTION_ROPE_PAIRS]; // radians a position
    struct shards *shards;                 // NULL: computed
    struct tensor_slice table;
};

// ---- options

static enum status refuse(struct error *err, const char *field, const char *expected, double got)
{
    return error_field(err, STATUS_INVALID_ARGUMENT, field, "expected %s, got %g", expected, got);
}

// Written so that NaN is in no range.
static bool within(double value, double least, double most)
{
    return value >= least && value <= most;
}

NODISCARD static enum status check_yarn(const struct rope_options *options, struct error *err)
{
    if (!within(options->factor, 1, ROPE_FACTOR_MAX))
        return refuse(err, "factor", "1 to 65536", options->factor);
    if (options->factor == 1)
        return STATUS_OK;
    if (!within(options->original_positions_max, 1, ROPE_POSITIONS_MAX))
        return refuse(err, "original_positions_max", "1 to 16777216 with a factor over 1",
                      options->original_positions_max);
    if (!within(options->beta_slow, 1e-3, 1e6))
        return refuse(err, "beta_slow", "0.001 to 1000000", options->beta_slow);
    if (!within(options->beta_fast, options->beta_slow, 1e6))
        return refuse(err, "beta_fast", "beta_slow to 1000000", options->beta_fast);
    return STATUS_OK;
}

// A cache holds what the other parameters would say.
NODISCARD static enum status check_cache_alone(const struct rope_options *options,
                                               struct error *err)
{
    const struct {
        const char *name;
        bool given;
    } others[] = {
        {"theta", options->theta != 0},
        {"factor", options->factor != 0 && options->factor != 1},
        {"original_positions_max", options->original_positions_max != 0},
        {"beta_fast", options->beta_fast != 0},
        {"beta_slow", options->beta_slow != 0},
    };
    for (size_t i = 0; i < ARRAY_LEN(others); i++)
        if (others[i].given)
            return error_field(err, STATUS_INVALID_ARGUMENT, others[i].name,
                               "of no meaning beside a cache");
    return STATUS_OK;
}

// Fills in defaults and checks what ties the options together.
NODISCARD static enum status settle(struct rope *rope, const struct rope_options *given,
                                    struct error *err)
{
    struct rope_options *options = &rope->options;
    *options = *given;
    options->cache = rope->cache;
    options->cache_tensor = rope->cache_tensor;
    if (given->positions_max > ROPE_POSITIONS_MAX)
        return refuse(err, "positions_max", "at most 16777216", given->positions_max);
    if (given->cache && given->cache[0])
        return check_cache_alone(given, err);
    if (given->cache_tensor && given->cache_tensor[0])
        return error_field(err, STATUS_INVALID_ARGUMENT, "cache_tensor",
                           "of no meaning without a cache");
    if (!within(given->theta, 1.0001, ROPE_THETA_MAX))
        return refuse(err, "theta", "1.0001 to 1073741824, or a cache", given->theta);
    if (given->factor == 0)
        options->factor = 1;
    if (given->beta_fast == 0)
        options->beta_fast = 32;
    if (given->beta_slow == 0)
        options->beta_slow = 1;
    if (given->positions_max == 0)
        options->positions_max = ROPE_POSITIONS_DEFAULT;
    return check_yarn(options, err);
}

// ---- computed

// The pair, as a real number, that turns `turns` times over the original positions.
static double pair_that_turns(const struct rope_options *options, double turns)
{
    double radians = turns * 2 * M_PI;
    return ATTENTION_ROPE_DIM * log(options->original_positions_max / radians) /
           (2 * log(options->theta));
}

// How much of the original frequency pair i keeps: 1 up to `low`, 0 from `high` on.
static float kept_share(uint32_t i, double low, double high)
{
    float share = ((float)i - (float)low) / (float)(high - low);
    return 1.0f - (share < 0 ? 0.0f : share > 1 ? 1.0f : share);
}

static void set_frequencies(struct rope *rope)
{
    const struct rope_options *options = &rope->options;
    double low = fmax(floor(pair_that_turns(options, options->beta_fast)), 0);
    double high = fmin(ceil(pair_that_turns(options, options->beta_slow)), ATTENTION_ROPE_DIM - 1);
    if (low == high)
        high += 0.001; // a step in place of a ramp
    for (uint32_t i = 0; i < ATTENTION_ROPE_PAIRS; i++) {
        float exponent = (float)(2 * i) / ATTENTION_ROPE_DIM;
        float frequency = 1.0f / (float)pow((double)(float)options->theta, (double)exponent);
        rope->frequency[i] = frequency;
        if (options->factor > 1) {
            float kept = kept_share(i, low, high);
            float slowed = frequency / (float)options->factor;
            rope->frequency[i] = slowed * (1.0f - kept) + frequency * kept;
        }
    }
}

static void compute(const struct rope *rope, int64_t position, struct attention_rotation *rotation)
{
    for (uint32_t i = 0; i < ATTENTION_ROPE_PAIRS; i++) {
        float angle = (float)position * rope->frequency[i];
        rotation->cos[i] = (float)cos((double)angle);
        rotation->sin[i] = (float)sin((double)angle);
    }
}

// ---- from a cache

NODISCARD static enum status check_table(struct rope *rope, struct error *err)
{
    const struct safetensors_tensor *tensor = rope->table.tensor;
    if (tensor->dtype != SAFETENSORS_F32 || tensor->dims_n != 2 ||
        tensor->dims[1] != ATTENTION_ROPE_DIM || tensor->dims[0] == 0 ||
        tensor->dims[0] > ROPE_POSITIONS_MAX)
        return error_field(err, STATUS_FAILED_PRECONDITION, "cache_tensor",
                           "'%.128s' in %s: expected F32 [1 to %d, %d], found %s of %" PRIu32
                           " dimensions, the last %" PRIu64,
                           tensor->name, rope->table.label, ROPE_POSITIONS_MAX, ATTENTION_ROPE_DIM,
                           tensor->dtype_name, tensor->dims_n,
                           tensor->dims_n ? tensor->dims[tensor->dims_n - 1] : 0);
    uint32_t rows = (uint32_t)tensor->dims[0];
    if (rope->options.positions_max > rows)
        return error_field(err, STATUS_FAILED_PRECONDITION, "positions_max",
                           "%" PRIu32 ", but '%.128s' in %s holds %" PRIu32 " positions",
                           rope->options.positions_max, tensor->name, rope->table.label, rows);
    if (rope->options.positions_max == 0)
        rope->options.positions_max = rows;
    return STATUS_OK;
}

NODISCARD static enum status open_cache(struct rope *rope, const struct rope_options *given,
                                        const struct roots *roots, struct error *err)
{
    bool named = given->cache_tensor && given->cache_tensor[0];
    const char *name = named ? given->cache_tensor : ROPE_CACHE_TENSOR;
    if (strlen(name) >= sizeof rope->cache_tensor)
        return error_field(err, STATUS_INVALID_ARGUMENT, "cache_tensor",
                           "a name of %zu bytes, expected at most %zu", strlen(name),
                           sizeof rope->cache_tensor - 1);
    strcpy(rope->cache_tensor, name);
    struct error cause;
    enum status status = shards_create(roots, given->cache, &rope->shards, &cause);
    if (status != STATUS_OK)
        return error_field(err, status, "cache", "%s", cause.text);
    const struct place *place = shards_find(rope->shards, name);
    if (!place)
        return error_field(err, STATUS_FAILED_PRECONDITION, "cache_tensor",
                           "'%.128s' is not in '%.128s'", name, given->cache);
    status = shards_slice(rope->shards, place, &rope->table, &cause);
    if (status != STATUS_OK)
        return error_field(err, status, "cache", "%s", cause.text);
    snprintf(rope->cache, sizeof rope->cache, "%s", rope->table.label);
    return check_table(rope, err);
}

// Consecutive positions, the common case, are one read.
NODISCARD static enum status read_rows(const struct rope *rope, const int64_t *positions,
                                       uint32_t n, struct attention_rotation *rotations,
                                       struct error *err)
{
    for (uint32_t begin = 0, end; begin < n; begin = end) {
        end = begin + 1;
        while (end < n && positions[end] == positions[end - 1] + 1)
            end++;
        enum status status =
            safetensors_read(rope->table.file, rope->table.tensor,
                             rope->table.offset + (uint64_t)positions[begin] * sizeof *rotations,
                             &rotations[begin], (end - begin) * sizeof *rotations, err);
        if (status != STATUS_OK)
            return status;
    }
    return STATUS_OK;
}

// ---- the whole

enum status rope_create(const struct rope_options *options, const struct roots *roots,
                        struct rope **rope_out, struct error *err)
{
    struct rope *rope = calloc(1, sizeof *rope);
    if (!rope)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    atomic_init(&rope->references, 1);
    enum status status = settle(rope, options, err);
    if (status == STATUS_OK && options->cache && options->cache[0])
        status = open_cache(rope, options, roots, err);
    else if (status == STATUS_OK)
        set_frequencies(rope);
    if (status == STATUS_OK)
        *rope_out = rope;
    else
        rope_unref(rope);
    return status;
}

struct rope *rope_ref(struct rope *rope)
{
    atomic_fetch_add_explicit(&rope->references, 1, memory_order_relaxed);
    return rope;
}

void rope_unref(struct rope *rope)
{
    if (!rope)
        return;
    uint32_t before = atomic_fetch_sub_explicit(&rope->references, 1, memory_order_acq_rel);
    ASSERT(before > 0);
    if (before > 1)
        return;
    shards_destroy(rope->shards);
    free(rope);
}

const struct rope_options *rope_describe(const struct rope *rope)
{
    return &rope->options;
}

enum status rope_rotations(const struct rope *rope, const int64_t *positions, uint32_t n,
                           struct attention_rotation *rotations, struct error *err)
{
    for (uint32_t t = 0; t < n; t++)
        ASSERT(positions[t] >= 0 && positions[t] < rope->options.positions_max);
    if (rope->shards)
        return read_rows(rope, positions, n, rotations, err);
    for (uint32_t t = 0; t < n; t++)
        compute(rope, positions[t], &rotations[t]);
    return STATUS_OK;
}
