// Goal: an engine computes what kernels/reference.c says whatever a batch mixes, on several
// lanes at once, while weights come and go; and a load that fails leaves an error and nothing else.
// Built once for each engine that computes: ENGINE_UNDER_TEST is engine_cpu or engine_cuda.
// Method: random weights through a source that lives in memory and fails on demand; random batches,
// some of their segments from attention's output, which plain_attention.h quantises for the
// reference; every output compared, every byte between outputs checked to be untouched (by the CPU engine; the
// CUDA engine copies batches out whole). Also engine_find and the null engine, which are too small
// for files of their own.
#include <check.h>
#ifdef EINSUMD_CUDA
#include <cuda_runtime_api.h>
#endif
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/cpu/cpu.h"
#include "kernels/fp8.h"
#include "plain_attention.h"
#include "server/engine.h"

enum {
    LANES = 3,
    SEGMENTS_MAX = 12,
    TOKENS_MAX = 9,
    REDUCED_DIM_MAX = 16384,
    INPUT_BYTES = 4 << 20,
    OUTPUT_BYTES = 1 << 20,
    CANARY = 0xA5,
};

static uint64_t random_state;

static uint64_t random_next(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static uint32_t random_below(uint32_t n)
{
    return (uint32_t)((random_next() >> 16) % n);
}

static bool one_in(uint32_t n)
{
    return random_below(n) == 0;
}

// --- weights

static const struct einsum_weight_format formats[] = {
    {4, 128, 512, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128},
    {2, 64, 384, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 128},
    {3, 32, 128, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 32, 32},
    {2, 96, 512, EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, 1, 128},
    {1, 160, 4096, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 32, 32}, // read in three pieces
    {1, 32, 16384, EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, 1, 128}, // sixteen rows pass a staging
    {2, 64, 1024, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 32, 32},
    {3, 32, 1536, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 128},
};
enum { FORMATS = ARRAY_LEN(formats) };

struct source {
    struct engine_weight_source base; // first, so that its functions find the rest
    uint8_t *weight, *scales;
    uint64_t fails_from; // a read that reaches this offset fails; UINT64_MAX: none
    bool scales_fail;
    uint64_t bytes_read, bytes_progressed;
};

static enum status source_read(const struct engine_weight_source *base, uint64_t offset, void *to,
                               uint64_t bytes, struct error *err)
{
    struct source *source = (struct source *)(uintptr_t)base;
    ck_assert_uint_le(offset + bytes, einsum_weight_bytes(&base->format));
    if (offset + bytes > source->fails_from)
        return error_set(err, STATUS_DATA_LOSS, "disk on fire");
    memcpy(to, source->weight + offset, bytes);
    source->bytes_read += bytes;
    return STATUS_OK;
}

static enum status source_read_scales(const struct engine_weight_source *base, void *to,
                                      struct error *err)
{
    const struct source *source = (const struct source *)base;
    if (source->scales_fail)
        return error_set(err, STATUS_FAILED_PRECONDITION, "scales on fire");
    memcpy(to, source->scales, einsum_weight_scale_bytes(&base->format));
    return STATUS_OK;
}

static void source_progress(const struct engine_weight_source *base, uint64_t bytes)
{
    ((struct source *)(uintptr_t)base)->bytes_progressed += bytes;
}

static void fill_e4m3(uint8_t *codes, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        uint8_t code = (uint8_t)(random_next() >> 24);
        codes[i] = e4m3_is_nan(code) ? 0x38 : code;
    }
    if (one_in(4))
        codes[random_next() % n] = one_in(2) ? 0x7F : 0xFF;
}

static void fill_bf16(uint8_t *to, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i += 2) {
        uint16_t code = bf16_from_float(((float)random_below(20001) - 10000.0f) / 5000.0f);
        memcpy(to + i, &code, 2);
    }
}

static void fill_scales(uint8_t *to, uint64_t bytes, enum einsum_scale_type type)
{
    for (uint64_t i = 0; i < bytes && type == EINSUM_SCALE_UE8M0; i++)
        to[i] = (uint8_t)(117 + random_below(17));
    for (uint64_t i = 0; i < bytes && type == EINSUM_SCALE_FP32; i += 4) {
        float scale = (1.0f + (float)random_below(1000)) / 333.0f; // no power of two
        memcpy(to + i, &scale, 4);
    }
}

static void source_init(struct source *source, const struct einsum_weight_format *format)
{
    *source = (struct source){
        .base = {.format = *format,
                 .read_weight = source_read,
                 .read_scales = source_read_scales,
                 .progress = source_progress},
        .fails_from = UINT64_MAX,
    };
    uint64_t bytes = einsum_weight_bytes(format), scale_bytes = einsum_weight_scale_bytes(format);
    source->weight = malloc(bytes);
    source->scales = malloc(scale_bytes + 1);
    if (format->weight_type == EINSUM_WEIGHT_BF16)
        fill_bf16(source->weight, bytes);
    else
        fill_e4m3(source->weight, bytes);
    fill_scales(source->scales, scale_bytes, format->scale_type);
}

static void source_deinit(struct source *source)
{
    free(source->weight);
    free(source->scales);
}

// --- the engine, and how it wakes us

static pthread_mutex_t wake_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake_cond = PTHREAD_COND_INITIALIZER;
static uint32_t wakes;

static void on_wake(void *context)
{
    ck_assert_ptr_eq(context, &wakes);
    pthread_mutex_lock(&wake_lock);
    wakes++;
    pthread_cond_signal(&wake_cond);
    pthread_mutex_unlock(&wake_lock);
}

static void wait_wakes(uint32_t n)
{
    pthread_mutex_lock(&wake_lock);
    while (wakes < n)
        pthread_cond_wait(&wake_cond, &wake_lock);
    pthread_mutex_unlock(&wake_lock);
}

static const uint32_t buckets[] = {SEGMENTS_MAX * TOKENS_MAX};

static struct engine_options options_for(const char *kernel, uint32_t threads)
{
    wakes = 0;
    return (struct engine_options){
        .kernel = kernel,
        .threads = threads,
        .lanes = LANES,
        .batch_segments_max = SEGMENTS_MAX,
        .buckets = buckets,
        .buckets_n = 1,
        .reduced_dim_max = REDUCED_DIM_MAX,
        .wake = on_wake,
        .wake_context = &wakes,
    };
}

static const struct engine_ops *const ops = &ENGINE_UNDER_TEST;
static struct engine *engine;
static uint32_t kernels_offered;
static struct source sources[FORMATS];
static struct engine_weight *weights[FORMATS];

static void open_engine(const char *kernel, uint32_t threads)
{
    struct engine_options options = options_for(kernel, threads);
    struct error err = {.text = ""};
    enum status status = ops->open(&options, &engine, &err);
    ck_assert_msg(!status, "%s", err.text);
    struct engine_info info;
    ops->describe(engine, &info);
    kernels_offered = info.kernels_n;
    ck_assert_uint_ge(kernels_offered, 1);
    ck_assert_uint_le(kernels_offered, ENGINE_KERNELS_MAX);
}

static struct engine_weight *load(struct source *source)
{
    struct engine_weight *weight = NULL;
    struct error err = {.text = ""};
    enum status status = ops->weight_load(engine, &source->base, &weight, &err);
    ck_assert_msg(!status, "%s", err.text);
    return weight;
}

static void setup(void)
{
    const char *given = getenv("EINSUMD_TEST_SEED");
    random_state = given ? strtoull(given, NULL, 0) : now_ns() | 1;
    printf("engine: EINSUMD_TEST_SEED=%llu\n", (unsigned long long)random_state);
    fflush(stdout);
    engine = NULL;
}

static void teardown(void)
{
    if (engine)
        ops->close(engine);
}

static void load_all(void)
{
    for (int i = 0; i < FORMATS; i++) {
        source_init(&sources[i], &formats[i]);
        weights[i] = load(&sources[i]);
        ck_assert_uint_ge(ops->weight_bytes(weights[i]), einsum_weight_bytes(&formats[i]));
        ck_assert_uint_eq(sources[i].bytes_read, einsum_weight_bytes(&formats[i]));
        ck_assert_uint_eq(sources[i].bytes_progressed, sources[i].bytes_read);
    }
}

static void free_all(void)
{
    for (int i = 0; i < FORMATS; i++) {
        ops->weight_free(engine, weights[i]);
        source_deinit(&sources[i]);
    }
}

// --- batches

struct test_batch {
    struct engine_segment segments[SEGMENTS_MAX];
    // The same operand, or for attention what it is to become, in memory of its own.
    struct einsum_operand wanted[SEGMENTS_MAX];
    uint8_t *quantised[SEGMENTS_MAX]; // that memory
    int formats[SEGMENTS_MAX];        // whose weight each uses
    struct engine_batch batch;
    uint8_t *input, *output;
    uint8_t *input_filled; // as it was filled: engines may quantise in place
};

static void batch_init(struct test_batch *it)
{
    void *input, *output;
    ck_assert_int_eq(ops->memory_alloc(engine, INPUT_BYTES, &input, NULL), STATUS_OK);
    ck_assert_int_eq(ops->memory_alloc(engine, OUTPUT_BYTES, &output, NULL), STATUS_OK);
    ck_assert_uint_eq((uintptr_t)input % 4096, 0);
    ck_assert_uint_eq((uintptr_t)output % 4096, 0);
    *it =
        (struct test_batch){.input = input, .output = output, .input_filled = malloc(INPUT_BYTES)};
}

static void batch_deinit(struct test_batch *it)
{
    for (uint32_t s = 0; s < SEGMENTS_MAX; s++)
        free(it->quantised[s]);
    free(it->input_filled);
    ops->memory_free(engine, it->input, INPUT_BYTES);
    ops->memory_free(engine, it->output, OUTPUT_BYTES);
}

static void random_operand(struct einsum_operand *operand,
                           const struct einsum_weight_format *format)
{
    uint32_t blocks = format->reduced_dim / format->block_r;
    *operand = (struct einsum_operand){0};
    operand->tokens = 1 + random_below(TOKENS_MAX);
    operand->group_begin = random_below(format->groups);
    operand->groups = 1 + random_below(format->groups - operand->group_begin);
    operand->activation_layout = one_in(2) ? EINSUM_ACTIVATIONS_TGR : EINSUM_ACTIVATIONS_GTR;
    operand->scale_type = one_in(2) ? EINSUM_SCALE_FP32 : EINSUM_SCALE_UE8M0;
    bool packable = operand->scale_type == EINSUM_SCALE_FP32 || blocks % 4 == 0;
    operand->scale_layout = packable && one_in(2) ? EINSUM_SCALES_GKT : EINSUM_SCALES_TGK;
    operand->output_type = one_in(2) ? EINSUM_OUTPUT_BF16 : EINSUM_OUTPUT_FP32;
}

static uint64_t operand_output_bytes(const struct test_batch *it, uint32_t s)
{
    const struct einsum_operand *operand = &it->segments[s].operand;
    return einsum_output_bytes(operand->output_type, operand->tokens, operand->groups,
                               formats[it->formats[s]].output_dim);
}

// Returns how many bytes of input it takes.
static uint64_t fill_ordinary(struct einsum_operand *operand,
                              const struct einsum_weight_format *format, uint8_t *input)
{
    uint64_t a_bytes =
        einsum_activation_bytes(operand->tokens, operand->groups, format->reduced_dim);
    uint64_t s_bytes =
        einsum_scale_bytes(operand->scale_layout, operand->scale_type, operand->tokens,
                           operand->groups, format->reduced_dim / format->block_r);
    uint8_t *scales = input + align_up(a_bytes, CACHE_LINE_BYTES);
    fill_e4m3(input, a_bytes);
    fill_scales(scales, s_bytes, operand->scale_type);
    operand->activations = input;
    operand->scales = scales;
    return align_up(a_bytes, CACHE_LINE_BYTES) + align_up(s_bytes, CACHE_LINE_BYTES);
}

// Attention's output; `wanted` gets what plain_attention.h makes of it, in `quantised`.
static uint64_t fill_attention(struct einsum_operand *operand, struct einsum_operand *wanted,
                               const struct einsum_weight_format *format, uint8_t *input,
                               uint8_t **quantised)
{
    uint32_t reduced_dim = format->reduced_dim, blocks = reduced_dim / format->block_r;
    uint32_t rows = operand->tokens * operand->groups;
    uint64_t bytes = attention_bytes(operand->tokens, operand->groups, reduced_dim);
    struct attention_rotation *rotations = (struct attention_rotation *)(void *)(input + bytes);
    operand->activation_layout = EINSUM_ACTIVATIONS_IN_PLACE;
    operand->scale_layout = EINSUM_SCALES_IN_PLACE;
    operand->scale_type = EINSUM_SCALE_UE8M0;
    operand->activations = input;
    operand->scales = input + reduced_dim;
    operand->rotations = rotations;
    fill_bf16(input, bytes);
    if (one_in(4)) { // a NaN, an infinity or something large
        static const uint16_t codes[] = {0x7FC1, 0xFF80, 0x4E01, 0xCE81};
        memcpy(input + 2 * (random_next() % (bytes / 2)), &codes[random_below(4)], 2);
    }
    for (uint32_t t = 0; t < operand->tokens; t++)
        rotations[t] = plain_rotation(random_below(10000));

    *wanted = *operand;
    *quantised = malloc((uint64_t)rows * (reduced_dim + blocks));
    uint8_t *scales = *quantised + (uint64_t)rows * reduced_dim;
    wanted->activation_layout = EINSUM_ACTIVATIONS_TGR;
    wanted->scale_layout = EINSUM_SCALES_TGK;
    wanted->activations = *quantised;
    wanted->scales = scales;
    wanted->rotations = NULL;
    for (uint64_t row = 0; row < rows; row++)
        plain_attention((const uint16_t *)(const void *)(input + row * 2 * reduced_dim),
                        reduced_dim, format->block_r, &rotations[row / operand->groups],
                        *quantised + row * reduced_dim, scales + row * blocks);
    return bytes + align_up(operand->tokens * sizeof *rotations, CACHE_LINE_BYTES);
}

static void batch_fill(struct test_batch *it, bool sorted)
{
    uint64_t input_used = 0, output_used = CACHE_LINE_BYTES;
    uint32_t tokens = 0, segments_n = 1 + random_below(SEGMENTS_MAX);
    int first = (int)random_below(FORMATS);
    for (uint32_t s = 0; s < segments_n; s++) {
        int which =
            sorted ? (int)(((uint32_t)first + s / 3) % FORMATS) : (int)random_below(FORMATS);
        const struct einsum_weight_format *format = &formats[which];
        struct einsum_operand *operand = &it->segments[s].operand;
        random_operand(operand, format);
        operand->output = it->output + output_used;
        free(it->quantised[s]);
        it->quantised[s] = NULL;
        uint8_t *input = it->input + input_used;
        if (format->reduced_dim % ATTENTION_HEAD_DIM == 0 && one_in(3)) {
            input_used += fill_attention(operand, &it->wanted[s], format, input, &it->quantised[s]);
        } else {
            input_used += fill_ordinary(operand, format, input);
            it->wanted[s] = *operand;
        }
        ck_assert_uint_le(input_used, INPUT_BYTES);
        it->formats[s] = which;
        it->segments[s].weight = weights[which];
        it->segments[s].kernel = one_in(2) ? 0 : random_below(kernels_offered + 1);
        // One line more than it needs: must stay as it is.
        output_used += align_up(operand_output_bytes(it, s) + 1, CACHE_LINE_BYTES);
        ck_assert_uint_le(output_used, OUTPUT_BYTES);
        tokens += operand->tokens;
    }
    memset(it->output, CANARY, output_used);
    memcpy(it->input_filled, it->input, input_used);
    it->batch = (struct engine_batch){.segments = it->segments,
                                      .segments_n = segments_n,
                                      .tokens = tokens,
                                      .input = it->input,
                                      .input_bytes = input_used,
                                      .output = it->output,
                                      .output_bytes = output_used};
}

static void submit(uint32_t lane, struct test_batch *it)
{
    memcpy(it->input, it->input_filled, it->batch.input_bytes);
    ops->submit(engine, lane, &it->batch);
}

static double output_at(const struct einsum_operand *operand, uint64_t index)
{
    if (operand->output_type == EINSUM_OUTPUT_FP32)
        return (double)((const float *)operand->output)[index];
    return (double)bf16_to_float(((const uint16_t *)operand->output)[index]);
}

static void segment_check(const struct test_batch *it, uint32_t s)
{
    const struct einsum_operand *operand = &it->wanted[s];
    const struct source *source = &sources[it->formats[s]];
    const struct einsum_weight_format *format = &source->base.format;
    bool wgmma = engine_may_sum_by_wgmma(ops, engine, it->segments[s].kernel);
    uint64_t index = 0;
    for (uint32_t t = 0; t < operand->tokens; t++)
        for (uint32_t g = 0; g < operand->groups; g++)
            for (uint32_t d = 0; d < format->output_dim; d++, index++) {
                double magnitude, loss;
                double exact = einsum_reference_one(format, source->weight, source->scales, operand,
                                                    t, g, d, &magnitude, &loss);
                double got = output_at(operand, index);
                if (exact != exact) {
                    ck_assert_msg(got != got, "segment %u [%u,%u,%u]: not NaN", s, t, g, d);
                    continue;
                }
                double off = got > exact ? got - exact : exact - got;
                double allowed = einsum_tolerance(operand->output_type, exact, magnitude,
                                                  wgmma ? loss : 0, format->reduced_dim);
                ck_assert_msg(off <= allowed, "segment %u [%u,%u,%u]: %g for %g", s, t, g, d, got,
                              exact);
            }
}

static void gaps_check(const struct test_batch *it)
{
    const uint8_t *at = it->output;
    for (uint32_t s = 0; s < it->batch.segments_n; s++) {
        const uint8_t *output = it->segments[s].operand.output;
        for (; at < output; at++)
            ck_assert_uint_eq(*at, CANARY);
        at = output + operand_output_bytes(it, s);
    }
    for (; at < it->output + it->batch.output_bytes; at++)
        ck_assert_uint_eq(*at, CANARY);
}

static void batch_check(const struct test_batch *it)
{
    for (uint32_t s = 0; s < it->batch.segments_n; s++)
        segment_check(it, s);
    if (ops == &engine_cpu)
        gaps_check(it);
}

static void poll_until_done(uint32_t lane)
{
    struct engine_result result;
    while (!ops->poll(engine, lane, &result))
        sched_yield();
    ck_assert_int_eq(result.status, STATUS_OK);
    ck_assert_uint_gt(result.started_ns, 0);
    ck_assert_uint_ge(result.ended_ns, result.started_ns);
    ck_assert(!ops->poll(engine, lane, &result));
}

static void run_batches(int rounds)
{
    struct test_batch batches[LANES];
    for (int i = 0; i < LANES; i++)
        batch_init(&batches[i]);
    uint32_t wakes_wanted = wakes;
    for (int round = 0; round < rounds; round++) {
        for (uint32_t lane = 0; lane < LANES; lane++)
            batch_fill(&batches[lane], one_in(2));
        for (uint32_t lane = 0; lane < LANES; lane++)
            submit(lane, &batches[lane]);
        wakes_wanted += LANES;
        if (!ops->polled)
            wait_wakes(wakes_wanted); // one for each batch, and after it is done
        for (uint32_t lane = 0; lane < LANES; lane++)
            poll_until_done(lane);
        for (uint32_t lane = 0; lane < LANES; lane++)
            batch_check(&batches[lane]);
    }
    for (int i = 0; i < LANES; i++)
        batch_deinit(&batches[i]);
}

static const uint32_t threads_of[] = {1, 5};

START_TEST(mixed_batches_match_the_reference)
{
    open_engine(NULL, 0);
    load_all();
    run_batches(4);
    free_all();
}
END_TEST

START_TEST(every_cpu_kernel_matches_the_reference)
{
    const struct cpu_kernel *kernel = cpu_kernels()[_i / (int)ARRAY_LEN(threads_of)];
    if (!cpu_kernel_supported(kernel))
        return;
    open_engine(cpu_kernel_name(kernel), threads_of[_i % (int)ARRAY_LEN(threads_of)]);
    load_all();
    run_batches(2);
    free_all();
}
END_TEST

// The bits of one batch of one format's weight, every segment by the kernel of this number.
static void run_with(struct test_batch *it, uint32_t kernel, uint8_t *output)
{
    for (uint32_t s = 0; s < it->batch.segments_n; s++)
        it->segments[s].kernel = kernel;
    memset(it->output, CANARY, it->batch.output_bytes);
    submit(0, it);
    poll_until_done(0);
    batch_check(it);
    memcpy(output, it->output, it->batch.output_bytes);
}

// Whether bits tell which kernel has computed it: sums of thousands of products in different orders,
// FP32 to the end, of more than the one token that a NaN in the activations may take.
static bool tells_kernels_apart(const struct test_batch *it)
{
    for (uint32_t s = 0; s < it->batch.segments_n; s++) {
        const struct einsum_weight_format *format = &formats[it->formats[s]];
        const struct einsum_operand *operand = &it->segments[s].operand;
        if (format->reduced_dim >= 4096 && format->scale_type == EINSUM_SCALE_FP32 &&
            operand->output_type == EINSUM_OUTPUT_FP32 && operand->tokens > 1)
            return true;
    }
    return false;
}

START_TEST(a_segment_gets_the_kernel_that_it_asks_for)
{
    static uint8_t chosen[ENGINE_KERNELS_MAX + 1][OUTPUT_BYTES], alone[OUTPUT_BYTES];
    open_engine("portable", 2);
    load_all();
    uint64_t state = random_state;
    struct test_batch it;
    batch_init(&it);
    do
        batch_fill(&it, true);
    while (!tells_kernels_apart(&it));
    run_with(&it, 0, alone);
    uint64_t bytes = it.batch.output_bytes;
    for (uint32_t kernel = 1; kernel <= kernels_offered; kernel++)
        run_with(&it, kernel, chosen[kernel]);
    uint32_t portable;
    ck_assert_int_eq(engine_kernel_find(ops, engine, "portable", &portable, NULL), STATUS_OK);
    ck_assert_int_eq(memcmp(alone, chosen[portable], bytes), 0);
    for (uint32_t kernel = 1; kernel <= kernels_offered; kernel++)
        if (kernel != portable)
            ck_assert_msg(memcmp(alone, chosen[kernel], bytes) != 0,
                          "kernel %u is portable, seed %llu", kernel, (unsigned long long)state);
    batch_deinit(&it);
    free_all();
}
END_TEST

START_TEST(one_lane_again_and_again)
{
    open_engine(NULL, 2);
    load_all();
    struct test_batch it;
    batch_init(&it);
    for (int round = 0; round < 200; round++) {
        if (round % 50 == 0)
            batch_fill(&it, true);
        submit(0, &it); // at times before the threads have left the last one
        poll_until_done(0);
        if (round % 50 == 49)
            batch_check(&it);
    }
    batch_deinit(&it);
    free_all();
}
END_TEST

struct sampling {
    uint32_t phase_sample, timed; // of SAMPLED batches
};
enum { SAMPLED = 6 };
static const struct sampling samplings[] = {{0, 0}, {1, 6}, {2, 3}, {4, 2}, {UINT32_MAX, 1}};

START_TEST(one_batch_in_so_many_is_timed)
{
    struct engine_options options = options_for(NULL, 2);
    options.phase_sample = samplings[_i].phase_sample;
    ck_assert_int_eq(ops->open(&options, &engine, NULL), STATUS_OK);
    load_all();
    struct test_batch it;
    batch_init(&it);
    uint32_t timed = 0;
    for (int round = 0; round < SAMPLED; round++) {
        batch_fill(&it, true);
        ops->submit(engine, 0, &it.batch);
        struct engine_result result = {.copy_in_ns = 1, .kernel_ns = 1, .copy_out_ns = 1};
        while (!ops->poll(engine, 0, &result))
            sched_yield();
        uint64_t phases_ns = result.copy_in_ns + result.kernel_ns + result.copy_out_ns;
        uint64_t clocks_ns = ops->polled ? 5000 : 0; // a GPU's clock is another
        ck_assert_uint_le(phases_ns, result.ended_ns - result.started_ns + clocks_ns);
        ck_assert_int_eq(result.kernel_ns > 0, phases_ns > 0);
        timed += result.kernel_ns > 0;
    }
    ck_assert_uint_eq(timed, samplings[_i].timed);
    batch_deinit(&it);
    free_all();
}
END_TEST

// --- loading

static void *load_and_free(void *argument)
{
    struct source *source = argument;
    for (int i = 0; i < 30; i++) {
        struct engine_weight *weight;
        if (ops->weight_load(engine, &source->base, &weight, NULL))
            return NULL;
        ops->weight_free(engine, weight);
    }
    return source;
}

START_TEST(weights_come_and_go_while_batches_run)
{
    open_engine(NULL, 2);
    load_all();
    struct source coming[2];
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        source_init(&coming[i], &formats[i]);
        ck_assert_int_eq(pthread_create(&threads[i], NULL, load_and_free, &coming[i]), 0);
    }
    run_batches(2);
    for (int i = 0; i < 2; i++) {
        void *succeeded;
        pthread_join(threads[i], &succeeded);
        ck_assert_ptr_nonnull(succeeded);
        source_deinit(&coming[i]);
    }
    free_all();
}
END_TEST

static uint64_t mapped_bytes(void)
{
    char text[128];
    FILE *file = fopen("/proc/self/statm", "re");
    ck_assert_ptr_nonnull(file);
    ck_assert_ptr_nonnull(fgets(text, sizeof text, file));
    fclose(file);
    uint64_t pages = strtoull(text, NULL, 10);
    ck_assert_uint_gt(pages, 0);
    return pages * 4096;
}

struct failing {
    int format;
    uint64_t fails_from;
    bool scales_fail;
    enum status status;
    const char *text;
};

static const struct failing failings[] = {
    {4, 0, false, STATUS_DATA_LOSS, "disk on fire"},
    {4, 160 * 4096 - 1, false, STATUS_DATA_LOSS, "disk on fire"}, // in the last piece
    {4, UINT64_MAX, true, STATUS_FAILED_PRECONDITION, "scales on fire"},
    {4, 64 * 4096, false, STATUS_DATA_LOSS, "disk on fire"}, // in the second
};

START_TEST(a_read_that_fails_fails_the_load)
{
    enum { ROUNDS = 100 };
    const struct failing *failing = &failings[_i];
    open_engine(NULL, 1);
    struct source source;
    source_init(&source, &formats[failing->format]);
    source.fails_from = failing->fails_from;
    source.scales_fail = failing->scales_fail;
    uint64_t before = 0;
    for (int round = 0; round < ROUNDS; round++) {
        if (round == 1) // what the first one left in malloc's pools is not a leak
            before = mapped_bytes();
        struct engine_weight *weight = NULL;
        struct error err = {.text = ""};
        ck_assert_int_eq(ops->weight_load(engine, &source.base, &weight, &err), failing->status);
        ck_assert_str_eq(err.text, failing->text);
        ck_assert_ptr_null(weight);
    }
    uint64_t leaked = (ROUNDS - 1) * einsum_weight_bytes(&source.base.format);
    ck_assert_uint_lt(mapped_bytes(), before + leaked * 3 / 4);
    // The engine is none the worse.
    source.fails_from = UINT64_MAX;
    source.scales_fail = false;
    ops->weight_free(engine, load(&source));
    source_deinit(&source);
}
END_TEST

START_TEST(no_memory_for_a_weight_is_said)
{
    open_engine(NULL, 1);
    struct source source;
    source_init(&source, &formats[0]);
    struct rlimit before, tight;
    ck_assert_int_eq(getrlimit(RLIMIT_AS, &before), 0);
    tight = before;
    tight.rlim_cur = mapped_bytes() + (32 << 20);
    source.base.format.output_dim = 65536; // 128 MiB, of which nothing is read
    ck_assert_int_eq(setrlimit(RLIMIT_AS, &tight), 0);
    struct engine_weight *weight = NULL;
    struct error err = {.text = ""};
    enum status status = ops->weight_load(engine, &source.base, &weight, &err);
    ck_assert_int_eq(setrlimit(RLIMIT_AS, &before), 0);
    ck_assert_int_eq(status, STATUS_RESOURCE_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(err.text, "out of memory"));
    ck_assert_uint_eq(source.bytes_read, 0);
    source_deinit(&source);
}
END_TEST

#ifdef EINSUMD_CUDA
enum { DEVICE_PIECES_MAX = 4096 };
static void *device_pieces[DEVICE_PIECES_MAX];

// Takes all of the device's memory, in pieces of ever smaller size. Returns how many.
static int device_fill(void)
{
    int n = 0;
    for (size_t bytes = (size_t)1 << 30; bytes >= 4096; bytes /= 2)
        while (n < DEVICE_PIECES_MAX && cudaMalloc(&device_pieces[n], bytes) == cudaSuccess)
            n++;
    ck_assert_int_lt(n, DEVICE_PIECES_MAX);
    ck_assert_int_eq(cudaGetLastError(), cudaErrorMemoryAllocation);
    return n;
}

static void run_one(struct test_batch *it)
{
    batch_fill(it, true);
    ops->submit(engine, 0, &it->batch);
    poll_until_done(0);
    batch_check(it);
}

START_TEST(a_full_device_refuses_a_weight_and_serves_on)
{
    enum { FORMAT = 4 };
    open_engine(NULL, 0);
    load_all();
    struct test_batch it;
    batch_init(&it);
    for (int round = 0; round < 2; round++) {
        int pieces = device_fill();
        struct engine_weight *weight = NULL;
        struct error err = {.text = ""};
        ck_assert_int_eq(ops->weight_load(engine, &sources[FORMAT].base, &weight, &err),
                         STATUS_RESOURCE_EXHAUSTED);
        ck_assert_ptr_nonnull(strstr(err.text, "memory"));
        ck_assert_ptr_null(weight);
        run_one(&it);
        while (pieces > 0)
            ck_assert_int_eq(cudaFree(device_pieces[--pieces]), cudaSuccess);
        ops->weight_free(engine, weights[FORMAT]);
        weights[FORMAT] = load(&sources[FORMAT]);
        run_one(&it);
    }
    batch_deinit(&it);
    free_all();
}
END_TEST
#endif

START_TEST(a_weight_too_deep_is_refused)
{
    open_engine(NULL, 1);
    struct source source;
    source_init(&source, &formats[0]);
    source.base.format.reduced_dim = REDUCED_DIM_MAX + 128;
    struct engine_weight *weight = NULL;
    struct error err = {.text = ""};
    ck_assert_int_eq(ops->weight_load(engine, &source.base, &weight, &err),
                     STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.text, "reduced_dim: the engine was opened for at most 16384, got 16512");
    source_deinit(&source);
}
END_TEST

// --- opening

START_TEST(a_kernel_is_picked_or_asked_for)
{
    struct engine_info info;
    open_engine(NULL, 0);
    ops->describe(engine, &info);
    ck_assert_uint_ge(info.threads, 1);
    ck_assert_uint_gt(info.scratch_bytes, 0);
    ck_assert_ptr_nonnull(strstr(info.device, "thread"));
    ck_assert_ptr_nonnull(strstr(info.kernel, cpu_kernel_name(cpu_kernel_find(NULL))));
    ck_assert_ptr_nonnull(strstr(info.kernel, "best"));
    ops->close(engine);
    open_engine("portable", 3);
    ops->describe(engine, &info);
    ck_assert_uint_eq(info.threads, 3);
    ck_assert_str_eq(info.kernel, "portable: asked for by name");
}
END_TEST

START_TEST(an_unknown_kernel_is_refused_by_name)
{
    static const char *const names[] = {"", "AVX2", "tensor", "portable "};
    struct engine_options options = options_for(names[_i], 1);
    struct error err = {.text = ""};
    ck_assert_int_eq(ops->open(&options, &engine, &err), STATUS_UNIMPLEMENTED);
    ck_assert_str_eq(err.field, "kernel");
    ck_assert_ptr_nonnull(strstr(err.text, "portable"));
    ck_assert_ptr_nonnull(strstr(err.text, names[_i]));
    ck_assert_ptr_null(engine);
}
END_TEST

START_TEST(kernels_are_found_by_name)
{
    static const char *const unknown[] = {"AVX2", "portable ", "auto", "p", "none"};
    open_engine(NULL, 1);
    struct engine_info info;
    ops->describe(engine, &info);
    uint32_t kernel = 99;
    ck_assert_int_eq(engine_kernel_find(ops, engine, "", &kernel, NULL), STATUS_OK);
    ck_assert_uint_eq(kernel, 0);
    for (uint32_t i = 0; i < info.kernels_n; i++) {
        ck_assert_int_eq(engine_kernel_find(ops, engine, info.kernels[i], &kernel, NULL),
                         STATUS_OK);
        ck_assert_uint_eq(kernel, i + 1);
    }
    ck_assert_str_eq(info.kernels[info.kernels_n - 1], "portable");
    for (size_t i = 0; i < ARRAY_LEN(unknown); i++) {
        struct error err = {.text = ""};
        ck_assert_int_eq(engine_kernel_find(ops, engine, unknown[i], &kernel, &err),
                         STATUS_UNIMPLEMENTED);
        ck_assert_uint_eq(kernel, 0);
        ck_assert_str_eq(err.field, "kernel");
        ck_assert_ptr_nonnull(strstr(err.text, unknown[i]));
        for (uint32_t k = 0; k < info.kernels_n; k++)
            ck_assert_ptr_nonnull(strstr(err.text, info.kernels[k]));
    }
}
END_TEST

START_TEST(engines_are_found_by_name)
{
    const struct engine_ops *best = &engine_cpu;
#ifdef EINSUMD_CUDA
    if (engine_cuda.usable())
        best = &engine_cuda;
    ck_assert_ptr_eq(engine_find("cuda"), &engine_cuda);
#endif
    ck_assert_ptr_eq(engine_find("auto"), best);
    ck_assert_int_eq(engine_auto_note() == NULL, best != &engine_cpu);
    ck_assert_ptr_eq(engine_find("cpu"), &engine_cpu);
    ck_assert_ptr_eq(engine_find("null"), &engine_null);
#ifndef EINSUMD_CUDA
    ck_assert_ptr_null(engine_find("cuda"));
#endif
    ck_assert_ptr_null(engine_find(""));
    for (size_t i = 0; i < 2; i++)
        ck_assert_uint_ge((i ? &engine_null : &engine_cpu)->lanes_default, 1);
}
END_TEST

START_TEST(the_null_engine_answers_at_once)
{
    struct engine *null;
    struct engine_options options = options_for(NULL, 0);
    ck_assert_int_eq(engine_null.open(&options, &null, NULL), STATUS_OK);
    struct source source;
    source_init(&source, &formats[0]);
    source.fails_from = 0; // must not be read
    struct engine_weight *weight;
    ck_assert_int_eq(engine_null.weight_load(null, &source.base, &weight, NULL), STATUS_OK);
    ck_assert_uint_eq(engine_null.weight_bytes(weight), 0);
    ck_assert_uint_eq(source.bytes_progressed, einsum_weight_bytes(&formats[0]));
    void *output;
    ck_assert_int_eq(engine_null.memory_alloc(null, 8192, &output, NULL), STATUS_OK);
    for (int i = 0; i < 8192; i++)
        ck_assert_uint_eq(((uint8_t *)output)[i], 0);

    struct engine_segment segment = {.weight = weight, .operand = {.tokens = 1, .output = output}};
    struct engine_batch batch = {
        .segments = &segment, .segments_n = 1, .tokens = 1, .output = output};
    struct engine_result result;
    uint32_t kernel;
    struct error err = {.text = ""};
    ck_assert_int_eq(engine_kernel_find(&engine_null, null, "", &kernel, &err), STATUS_OK);
    ck_assert_int_eq(engine_kernel_find(&engine_null, null, "avx2", &kernel, &err),
                     STATUS_UNIMPLEMENTED);
    ck_assert_str_eq(err.text, "kernel: \"avx2\" cannot be chosen here; what can: none");
    for (uint32_t lane = 0; lane < LANES; lane++) {
        ck_assert(!engine_null.poll(null, lane, &result));
        engine_null.submit(null, lane, &batch);
        ck_assert_uint_eq(wakes, lane + 1);
    }
    for (uint32_t lane = LANES; lane-- > 0;) {
        ck_assert(engine_null.poll(null, lane, &result));
        ck_assert_int_eq(result.status, STATUS_OK);
        ck_assert_uint_ge(result.ended_ns, result.started_ns);
        ck_assert(!engine_null.poll(null, lane, &result));
    }
    engine_null.memory_free(null, output, 8192);
    engine_null.weight_free(null, weight);
    engine_null.close(null);
    source_deinit(&source);
}
END_TEST

static int kernels_n(void)
{
    int n = 0;
    while (cpu_kernels()[n])
        n++;
    return n;
}

// What holds for the CPU engine alone, and for the small things beside it.
static void add_cpu_tests(Suite *suite)
{
    TCase *batches = tcase_create("cpu batches");
    tcase_set_timeout(batches, 240);
    tcase_add_checked_fixture(batches, setup, teardown);
    tcase_add_loop_test(batches, every_cpu_kernel_matches_the_reference, 0,
                        kernels_n() * (int)ARRAY_LEN(threads_of));
    tcase_add_test(batches, a_segment_gets_the_kernel_that_it_asks_for);
    tcase_add_test(batches, no_memory_for_a_weight_is_said);
    suite_add_tcase(suite, batches);

    TCase *opening = tcase_create("opening");
    tcase_add_checked_fixture(opening, setup, teardown);
    tcase_add_test(opening, a_kernel_is_picked_or_asked_for);
    tcase_add_loop_test(opening, an_unknown_kernel_is_refused_by_name, 0, 4);
    tcase_add_test(opening, kernels_are_found_by_name);
    tcase_add_test(opening, engines_are_found_by_name);
    tcase_add_test(opening, the_null_engine_answers_at_once);
    suite_add_tcase(suite, opening);
}

enum { EXIT_SKIPPED = 77 };

// Asked in a process of its own: a device's context does not survive the forks of the tests.
static bool usable_here(void)
{
    if (!ops->usable)
        return true;
    pid_t child = fork();
    if (child == 0)
        _exit(ops->usable() ? EXIT_SUCCESS : EXIT_FAILURE);
    int status;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
           WEXITSTATUS(status) == EXIT_SUCCESS;
}

int main(void)
{
    if (!usable_here()) {
        printf("SKIPPED: no device for the %s engine\n", ops->name);
        return EXIT_SKIPPED;
    }
    Suite *suite = suite_create(ops->name);

    TCase *batches = tcase_create("batches");
    tcase_set_timeout(batches, 240);
    tcase_add_checked_fixture(batches, setup, teardown);
    tcase_add_test(batches, mixed_batches_match_the_reference);
    tcase_add_test(batches, one_lane_again_and_again);
    tcase_add_loop_test(batches, one_batch_in_so_many_is_timed, 0, ARRAY_LEN(samplings));
    suite_add_tcase(suite, batches);

    TCase *loading = tcase_create("loading");
    tcase_set_timeout(loading, 120);
    tcase_add_checked_fixture(loading, setup, teardown);
    tcase_add_test(loading, weights_come_and_go_while_batches_run);
    tcase_add_loop_test(loading, a_read_that_fails_fails_the_load, 0, ARRAY_LEN(failings));
    tcase_add_test(loading, a_weight_too_deep_is_refused);
#ifdef EINSUMD_CUDA
    if (ops == &engine_cuda)
        tcase_add_test(loading, a_full_device_refuses_a_weight_and_serves_on);
#endif
    suite_add_tcase(suite, loading);

    if (ops == &engine_cpu)
        add_cpu_tests(suite);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
