// The CUDA engine on the stand-in of fake_cuda.h, with weights that live in memory and requests that
// are checked against FP64. Include it in one file of a program.
#pragma once

#include <check.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_cuda.h"
#include "kernels/fp8.h"
#include "server/engine.h"

enum {
    LANES = 2,
    SEGMENTS_MAX = 4,
    TOKENS_MAX = 256,
    FEW = 5,   // tokens: a small batch, which the graph fetches itself
    MANY = 90, // a large one, with copies around the graph
    INPUT_BYTES = 4 << 20,
    OUTPUT_BYTES = 1 << 20,
    HANG_NS = 1000000000,
    FAULTS_MAX = 4000,
};

static const uint32_t buckets[] = {8, 64, TOKENS_MAX};

static const struct einsum_weight_format formats[] = {
    {2, 32, 4096, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 32, 128},
    {1, 32, 4096, EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, 1, 128},
    {1, 1536, 16384, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 128, 128}, // three stagings
    {1, 4096, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128},  // more out than in
};

static const struct fake_cuda_device hopper = {
    .driver = CUDART_VERSION,
    .devices = 1,
    .major = 9,
    .sm_count = 8,
    .memory_bytes = (uint64_t)256 << 20,
};

static uint64_t random_state;

static uint32_t random_below(uint32_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)((random_state >> 16) % n);
}

static uint8_t random_e4m3(void)
{
    uint8_t code = (uint8_t)random_below(256);
    return e4m3_is_nan(code) ? 0x38 : code;
}

// ---- weights that live in memory

struct source {
    struct engine_weight_source base; // first, so that its functions find the rest
    uint8_t *weight, *scales;
};

static enum status source_read(const struct engine_weight_source *base, uint64_t offset, void *to,
                               uint64_t bytes, struct error *err)
{
    (void)err;
    memcpy(to, ((const struct source *)base)->weight + offset, bytes);
    return STATUS_OK;
}

static enum status source_read_scales(const struct engine_weight_source *base, void *to,
                                      struct error *err)
{
    (void)err;
    memcpy(to, ((const struct source *)base)->scales, einsum_weight_scale_bytes(&base->format));
    return STATUS_OK;
}

static struct source source_of(const struct einsum_weight_format *format)
{
    uint64_t bytes = einsum_weight_bytes(format), scale_bytes = einsum_weight_scale_bytes(format);
    struct source source = {
        .base = {.format = *format, .read_weight = source_read, .read_scales = source_read_scales},
        .weight = malloc(bytes),
        .scales = malloc(scale_bytes + 1),
    };
    for (uint64_t i = 0; i < bytes; i++)
        source.weight[i] = format->weight_type == EINSUM_WEIGHT_E4M3 ? random_e4m3()
                           : i % 2 ? (uint8_t)(0x3E + random_below(2))
                                   : (uint8_t)random_below(256);
    for (uint64_t i = 0; i < scale_bytes; i++)
        source.scales[i] = format->scale_type == EINSUM_SCALE_UE8M0
                               ? (uint8_t)(120 + random_below(9))
                           : i % 4 == 3 ? 0x3F
                                        : (uint8_t)random_below(256);
    return source;
}

static void source_free(struct source *source)
{
    free(source->weight);
    free(source->scales);
}

// ---- the engine

static const struct engine_ops *const ops = &engine_cuda;
static struct engine *engine;
static struct error err;
static uint8_t *input[LANES], *output[LANES];

static enum status open_with(const char *kernel, uint32_t phase_sample)
{
    const struct engine_options options = {
        .kernel = kernel,
        .lanes = LANES,
        .batch_segments_max = SEGMENTS_MAX,
        .buckets = buckets,
        .buckets_n = ARRAY_LEN(buckets),
        .reduced_dim_max = 16384,
        .phase_sample = phase_sample,
    };
    engine = NULL;
    memset(&err, 0, sizeof err);
    return ops->open(&options, &engine, &err);
}

static void open_device(const struct fake_cuda_device *device)
{
    fake_cuda_start(device, random_state);
    ck_assert_msg(open_with(NULL, 1) == STATUS_OK, "%s", err.text);
}

static void *memory_of(uint64_t bytes)
{
    void *memory = NULL;
    ck_assert_msg(ops->memory_alloc(engine, bytes, &memory, &err) == STATUS_OK, "%s", err.text);
    return memory;
}

static void open_lanes(void)
{
    open_device(&hopper);
    for (int i = 0; i < LANES; i++) {
        input[i] = memory_of(INPUT_BYTES);
        output[i] = memory_of(OUTPUT_BYTES);
    }
}

static void expect_nothing_live(void)
{
    struct fake_cuda_live live = fake_cuda_live();
    ck_assert_uint_eq(live.allocations, 0);
    ck_assert_uint_eq(live.pinned, 0);
    ck_assert_uint_eq(live.streams, 0);
    ck_assert_uint_eq(live.events, 0);
    ck_assert_uint_eq(live.graphs, 0);
    ck_assert_uint_eq(live.graph_execs, 0);
    ck_assert_uint_eq(live.device_bytes, 0);
}

static void close_device(void)
{
    ops->close(engine);
    expect_nothing_live();
    fake_cuda_stop();
}

static void close_lanes(void)
{
    for (int i = 0; i < LANES; i++) {
        ops->memory_free(engine, input[i], INPUT_BYTES);
        ops->memory_free(engine, output[i], OUTPUT_BYTES);
    }
    close_device();
}

static struct engine_weight *load(const struct source *source)
{
    struct engine_weight *weight = NULL;
    ck_assert_msg(ops->weight_load(engine, &source->base, &weight, &err) == STATUS_OK, "%s",
                  err.text);
    return weight;
}

// ---- one request

struct ask {
    const struct source *source;
    struct engine_segment segment;
    struct engine_batch batch;
};

// A few outputs of every token, against FP64.
static void ask_check(const struct ask *ask)
{
    const struct einsum_operand *operand = &ask->segment.operand;
    const struct einsum_weight_format *format = &ask->source->base.format;
    const float *got = operand->output;
    uint32_t samples = 3 + 96 / operand->tokens;
    for (uint32_t t = 0; t < operand->tokens; t++)
        for (uint32_t i = 0; i < samples; i++) {
            uint32_t g = random_below(format->groups), d = random_below(format->output_dim);
            double magnitude;
            double exact = einsum_reference_one(format, ask->source->weight, ask->source->scales,
                                                operand, t, g, d, &magnitude, NULL);
            double one = (double)got[((uint64_t)t * format->groups + g) * format->output_dim + d];
            double off = one > exact ? one - exact : exact - one;
            ck_assert_msg(off <= einsum_tolerance(operand->output_type, exact, magnitude, 0,
                                                  format->reduced_dim),
                          "[%u,%u,%u]: %g for %g", t, g, d, one, exact);
        }
}

// Polls to the end, which must come.
static struct engine_result finish(uint32_t lane)
{
    struct engine_result result = {.error.text = ""};
    uint64_t give_up_ns = now_ns() + (uint64_t)60 * HANG_NS;
    while (!ops->poll(engine, lane, &result)) {
        ck_assert_msg(now_ns() < give_up_ns, "a batch hangs");
        sched_yield();
    }
    ck_assert(!ops->poll(engine, lane, &result)); // told once
    return result;
}

static void setup(void)
{
    const char *given = getenv("EINSUMD_TEST_SEED");
    random_state = given ? strtoull(given, NULL, 0) : now_ns() | 1;
    printf("faults: EINSUMD_TEST_SEED=%llu\n", (unsigned long long)random_state);
    fflush(stdout);
}
