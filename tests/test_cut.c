// Goal: a request that is cut into parts is computed as if it had not been, takes its turns like
// others, never holds what it may not, and ends once, whatever happens to its parts.
// Method: an engine that completes a batch when the test tells it to, and writes for each token a
// checksum of what the operand says are its activations and scales.
#include <check.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/cut.h"

enum {
    LANES_MAX = 4,
    LOG_MAX = 1024,
    GROUPS = 3,
    OUTPUT_DIM = 32,
    REDUCED_DIM = 512,
    BLOCK = 128, // so 4 scales to a row: one word of UE8M0
    TOKENS_MAX = 8,
    CALLERS_MAX = 6,
    ROUNDS = 100, // of each thread
    PATIENCE_MS = 20000,
    QUIET_MS = 20,
};

#define WAIT_FOR(condition)                                                                        \
    do {                                                                                           \
        for (int wait = 0; wait < PATIENCE_MS * 10 && !(condition); wait++)                        \
            wait < 1000 ? sched_yield() : usleep(100);                                             \
        ck_assert_msg(condition, "did not come true: " #condition);                                \
    } while (0)

// ---- the engine

static const struct einsum_weight_format format = {
    .groups = GROUPS,
    .output_dim = OUTPUT_DIM,
    .reduced_dim = REDUCED_DIM,
    .weight_type = EINSUM_WEIGHT_E4M3,
    .scale_type = EINSUM_SCALE_UE8M0,
    .block_d = 32,
    .block_r = BLOCK,
};

static uint16_t checksum(const struct einsum_operand *operand, uint32_t t, uint32_t g)
{
    const uint8_t *row = (const uint8_t *)operand->activations +
                         einsum_activation_offset(operand->activation_layout, operand->tokens,
                                                  operand->groups, REDUCED_DIM, t, g);
    uint32_t sum = 1;
    for (uint32_t r = 0; r < REDUCED_DIM; r++)
        sum = sum * 31 + row[r];
    struct einsum_scale_strides strides = einsum_scale_strides(&format, operand);
    for (uint32_t k = 0; k < REDUCED_DIM / BLOCK; k++) {
        const uint8_t *scale = (const uint8_t *)operand->scales + t * strides.token +
                               g * strides.group + k / 4 * strides.word + k % 4 * strides.byte;
        for (uint32_t i = 0; i < einsum_scale_element_bytes(operand->scale_type); i++)
            sum = sum * 31 + scale[i];
    }
    return (uint16_t)(sum ^ sum >> 16);
}

static void compute(const struct einsum_operand *operand, uint16_t *output)
{
    for (uint32_t t = 0; t < operand->tokens; t++)
        for (uint32_t g = 0; g < operand->groups; g++)
            for (uint32_t d = 0; d < OUTPUT_DIM; d++)
                *output++ = checksum(operand, t, g);
}

struct engine {
    pthread_mutex_t lock;
    const struct engine_batch *lanes[LANES_MAX];
    bool done[LANES_MAX];
    enum status status[LANES_MAX];
    const struct engine_batch *log[LOG_MAX]; // in order of submission, modulo
    uint32_t log_tokens[LOG_MAX], log_kernel[LOG_MAX];
    uint32_t submitted_n;
    bool quick; // done as soon as submitted
    struct batcher_waker waker;
};

static enum status fake_memory_alloc(struct engine *of, uint64_t bytes, void **memory,
                                     struct error *err)
{
    (void)of;
    (void)err;
    *memory = aligned_alloc(64, align_up(bytes, 64));
    return STATUS_OK;
}

static void fake_memory_free(struct engine *of, void *memory, uint64_t bytes)
{
    (void)of;
    (void)bytes;
    free(memory);
}

static void finish_locked(struct engine *of, uint32_t lane, enum status status)
{
    const struct engine_batch *batch = of->lanes[lane];
    for (uint32_t i = 0; i < batch->segments_n && !status; i++)
        compute(&batch->segments[i].operand, batch->segments[i].operand.output);
    of->status[lane] = status;
    of->done[lane] = true;
}

static void fake_submit(struct engine *of, uint32_t lane, const struct engine_batch *batch)
{
    pthread_mutex_lock(&of->lock);
    of->lanes[lane] = batch;
    of->done[lane] = false;
    of->log_tokens[of->submitted_n % LOG_MAX] = batch->tokens;
    of->log_kernel[of->submitted_n % LOG_MAX] = batch->segments[0].kernel;
    of->log[of->submitted_n++ % LOG_MAX] = batch;
    if (of->quick)
        finish_locked(of, lane, STATUS_OK);
    pthread_mutex_unlock(&of->lock);
    if (of->quick)
        batcher_wake(&of->waker);
}

static bool fake_poll(struct engine *of, uint32_t lane, struct engine_result *result)
{
    pthread_mutex_lock(&of->lock);
    bool done = of->lanes[lane] && of->done[lane];
    if (done) {
        *result = (struct engine_result){.status = of->status[lane], .ended_ns = now_ns()};
        if (result->status)
            error_set(&result->error, result->status, "fake failure");
        of->lanes[lane] = NULL;
    }
    pthread_mutex_unlock(&of->lock);
    return done;
}

static const struct engine_ops ops = {
    .name = "fake",
    .memory_alloc = fake_memory_alloc,
    .memory_free = fake_memory_free,
    .submit = fake_submit,
    .poll = fake_poll,
};

// ---- fixture

static struct engine engine;
static struct batcher *batcher;
static struct weight weight;
static struct copy_counters copies;
static const uint32_t buckets[] = {1, 2, 4, TOKENS_MAX};
static const struct batcher_options base = {
    .ops = &ops,
    .engine = &engine,
    .lanes = 1,
    .batches = 6,
    .batch_input_bytes = 64 << 10,
    .batch_output_bytes = 16 << 10,
    .batch_tokens_max = TOKENS_MAX,
    .batch_requests_max = 8,
    .queue_requests_max = 100,
    .buckets = buckets,
    .buckets_n = ARRAY_LEN(buckets),
};

static void setup(void)
{
    memset(&engine, 0, sizeof engine);
    pthread_mutex_init(&engine.lock, NULL);
    weight = (struct weight){.format = format, .engine_weight = (struct engine_weight *)&weight};
    memset(&copies, 0, sizeof copies);
    batcher = NULL;
}

static void start(uint32_t lanes, uint32_t batches)
{
    struct batcher_options options = base;
    struct error err;
    options.lanes = lanes;
    options.batches = batches;
    ck_assert_int_eq(batcher_create(&options, &engine.waker, &batcher, &err), STATUS_OK);
}

static struct batcher_stats stats(void)
{
    struct batcher_stats now;
    batcher_stats(batcher, &now);
    return now;
}

// Nothing is held and nothing was lost.
static void teardown(void)
{
    if (batcher) {
        ck_assert_uint_eq(stats().jobs, 0);
        ck_assert_uint_eq(stats().queued, 0);
        batcher_destroy(batcher);
    }
    pthread_mutex_destroy(&engine.lock);
}

static uint32_t submitted(void)
{
    pthread_mutex_lock(&engine.lock);
    uint32_t n = engine.submitted_n;
    pthread_mutex_unlock(&engine.lock);
    return n;
}

static void stays_submitted(uint32_t n)
{
    usleep(QUIET_MS * 1000);
    ck_assert_uint_eq(submitted(), n);
}

// Of the `submission`th batch, from 0.
static void finish(uint32_t submission, enum status status)
{
    WAIT_FOR(submitted() > submission);
    pthread_mutex_lock(&engine.lock);
    uint32_t lane = 0;
    while (lane < LANES_MAX && engine.lanes[lane] != engine.log[submission % LOG_MAX])
        lane++;
    ck_assert_uint_lt(lane, LANES_MAX);
    finish_locked(&engine, lane, status);
    pthread_mutex_unlock(&engine.lock);
    batcher_wake(&engine.waker);
}

// ---- requests

struct request {
    struct job whole;
    struct cut *cut;
    struct region region; // stands for the caller's memory, of a message or shared
    struct placement placement, none;
    bool in_region;
    _Atomic uint32_t told;
    uint32_t heard;
    uint32_t fill_fails_at; // token; 0: never
    uint8_t *memory;
    uint16_t *expected;
    uint64_t output_bytes;
};

static void on_room(struct job *job)
{
    struct request *request = CONTAINER_OF(job, struct request, whole);
    atomic_fetch_add(&request->told, 1);
}

static enum status fill(struct job *whole, const struct job *part, struct error *err)
{
    struct request *request = CONTAINER_OF(whole, struct request, whole);
    uint32_t at = request->fill_fails_at;
    if (at && at >= part->first_token && at < part->first_token + part->operand.tokens)
        return error_set(err, STATUS_DATA_LOSS, "no more");
    return placement_fill(&request->placement, part, &copies, err);
}

static _Thread_local uint32_t dice = 1;

static void request_init(struct request *request, uint32_t tokens, unsigned layouts)
{
    memset(request, 0, sizeof *request);
    struct einsum_operand operand = {
        .tokens = tokens,
        .groups = GROUPS,
        .activation_layout = layouts & 1 ? EINSUM_ACTIVATIONS_GTR : EINSUM_ACTIVATIONS_TGR,
        .scale_layout = layouts & 2 ? EINSUM_SCALES_GKT : EINSUM_SCALES_TGK,
        .scale_type = layouts & 4 ? EINSUM_SCALE_UE8M0 : EINSUM_SCALE_FP32,
        .output_type = EINSUM_OUTPUT_BF16,
    };
    uint64_t activations = einsum_activation_bytes(tokens, GROUPS, REDUCED_DIM);
    uint64_t scales = einsum_scale_bytes(operand.scale_layout, operand.scale_type, tokens, GROUPS,
                                         REDUCED_DIM / BLOCK);
    uint64_t output_at = align_up(align_up(activations, 64) + scales, 64);
    request->output_bytes = einsum_output_bytes(operand.output_type, tokens, GROUPS, OUTPUT_DIM);
    uint64_t bytes = align_up(output_at + request->output_bytes, 64);
    request->memory = aligned_alloc(64, bytes);
    request->expected = malloc(request->output_bytes);
    for (uint64_t i = 0; i < bytes; i++) {
        dice = dice * 1664525 + 1013904223;
        request->memory[i] = (uint8_t)(dice >> 24);
    }
    request->region = (struct region){.memory = request->memory, .bytes = bytes};
    request->placement = (struct placement){
        .region = &request->region,
        .activations = {0, activations},
        .scales = {align_up(activations, 64), scales},
        .output = {output_at, request->output_bytes},
    };
    request->whole = (struct job){
        .weight = &weight,
        .operand = operand,
        .deadline_ns = UINT64_MAX,
        .on_room = on_room,
    };
    operand.activations = request->memory;
    operand.scales = request->memory + request->placement.scales.offset;
    compute(&operand, request->expected);
}

// In a region, which the engine can reach if `direct`.
static void place(struct request *request, bool direct)
{
    struct job *whole = &request->whole;
    request->in_region = true;
    if (!direct)
        return;
    whole->input_given = whole->output_given = true;
    whole->operand.activations = request->memory;
    whole->operand.scales = request->memory + request->placement.scales.offset;
    whole->operand.output = request->memory + request->placement.output.offset;
}

static enum status try_begin(struct request *request, struct error *err)
{
    const struct cut_options options = {
        .batcher = batcher,
        .whole = &request->whole,
        .placement = request->in_region ? &request->placement : &request->none,
        .copies = &copies,
        .fill = fill,
    };
    struct batcher_cut at = batcher_cut(batcher, &request->whole);
    ASSERT(at.tokens == TOKENS_MAX);
    return cut_begin(&options, at, &request->cut, err);
}

static void begin(struct request *request)
{
    struct error err = {.text = ""};
    ck_assert_msg(try_begin(request, &err) == STATUS_OK, "%s", err.text);
}

static uint32_t in_state(const struct request *request, enum job_state state)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < request->cut->parts_n; i++)
        n += atomic_load(&request->cut->parts[i].job.state) == state;
    return n;
}

// The invariant of cut.h: who needs room holds no finished output.
static bool keeps_the_invariant(const struct request *request)
{
    const struct cut *cut = request->cut;
    bool needs_room = cut->begun < cut->parts_n || cut->waits;
    for (uint32_t i = 0; i < cut->parts_n && needs_room; i++) // those told of later are not known
        if (atomic_load(&cut->parts[i].job.state) == JOB_DONE && !atomic_load(&cut->told))
            return false;
    return cut->under_way <= cut->at_once;
}

// False: it is over.
static bool hear(struct request *request)
{
    WAIT_FOR(atomic_load(&request->told) > request->heard);
    request->heard++;
    bool goes_on = cut_go_on(request->cut);
    if (goes_on)
        ck_assert(keeps_the_invariant(request));
    return goes_on;
}

static void hear_all(struct request *request)
{
    while (hear(request))
        ;
}

// Whichever is told of something, until all are over.
static void hear_each(struct request *requests, uint32_t n)
{
    bool over[CALLERS_MAX] = {false};
    uint64_t until_ns = now_ns() + PATIENCE_MS * 1000000ull;
    for (uint32_t left = n; left > 0;) {
        ck_assert_msg(now_ns() < until_ns, "they wait for each other");
        for (uint32_t i = 0; i < n; i++) {
            if (over[i] || atomic_load(&requests[i].told) == requests[i].heard)
                continue;
            over[i] = !hear(&requests[i]);
            left -= over[i];
            if (over[i])
                cut_copy_out(requests[i].cut); // as the reply does where buffers are scarce
        }
        sched_yield();
    }
}

static bool output_is_right(const struct request *request)
{
    if (request->in_region)
        return memcmp(request->memory + request->placement.output.offset, request->expected,
                      request->output_bytes) == 0;
    const uint8_t *expected = (const uint8_t *)request->expected;
    for (uint32_t i = 0; i < request->cut->parts_n; i++) {
        uint64_t bytes;
        const void *output = cut_output(request->cut, &request->cut->parts[i], &bytes);
        if (memcmp(output, expected, bytes) != 0)
            return false;
        expected += bytes;
    }
    return expected == (const uint8_t *)request->expected + request->output_bytes;
}

static void check_output(const struct request *request)
{
    ck_assert_msg(request->whole.error.status == STATUS_OK, "%s", request->whole.error.text);
    ck_assert(output_is_right(request));
}

static void drop(struct request *request)
{
    ASSERT(atomic_load(&request->told) == request->heard);
    if (request->cut)
        cut_destroy(request->cut);
    free(request->memory);
    free(request->expected);
}

// ---- what comes of it

// _i: three bits of layouts, two of where the tensors lie.
START_TEST(computed_as_if_it_were_one)
{
    static const uint32_t tokens[] = {9, 11, 16, 24, 29, 67};
    engine.quick = true;
    start(2, 5);
    for (size_t i = 0; i < ARRAY_LEN(tokens); i++) {
        struct request request;
        request_init(&request, tokens[i], (unsigned)_i & 7);
        bool direct = _i >> 3 == 2;
        if (_i >> 3)
            place(&request, direct);
        uint64_t in = copies.in_bytes, out = copies.out_bytes;
        begin(&request);
        hear_all(&request);
        check_output(&request);
        ck_assert_uint_eq(request.cut->parts_n, (tokens[i] + 7) / 8);
        ck_assert_uint_eq(request.whole.batch_bucket, TOKENS_MAX);
        ck_assert_uint_eq(request.whole.batch_tokens, TOKENS_MAX);
        ck_assert_uint_ge(request.whole.launched_ns, request.whole.queued_ns);
        ck_assert_uint_ge(request.whole.done_ns, request.whole.launched_ns);
        // Padding is not copied; rows that lie apart are, even where the engine could reach them.
        uint64_t row = REDUCED_DIM + (_i & 4 ? 4 : 16), rows = tokens[i] * GROUPS;
        ck_assert_uint_eq(copies.in_bytes - in, direct && !(_i & 3) ? 0 : rows * row);
        ck_assert_uint_eq(_i >> 3 == 1 ? request.output_bytes : 0,
                          _i >> 3 ? copies.out_bytes - out : 0);
        drop(&request);
    }
}
END_TEST

START_TEST(a_slice_of_groups)
{
    engine.quick = true;
    start(1, 3);
    struct request request;
    request_init(&request, 13, (unsigned)_i);
    // Of two groups alone, which the rest of the memory still suffices for.
    request.whole.operand.groups = 2;
    struct einsum_operand operand = request.whole.operand;
    operand.activations = request.memory;
    operand.scales = request.memory + request.placement.scales.offset;
    request.output_bytes = einsum_output_bytes(EINSUM_OUTPUT_BF16, 13, 2, OUTPUT_DIM);
    compute(&operand, request.expected);
    begin(&request);
    hear_all(&request);
    check_output(&request);
    drop(&request);
}
END_TEST

START_TEST(a_lone_request_keeps_all_lanes_busy)
{
    start(3, 8);
    struct request request;
    request_init(&request, 10 * TOKENS_MAX, 0);
    request.whole.kernel = 5;
    begin(&request);
    WAIT_FOR(submitted() == 3);
    ck_assert_uint_eq(stats().jobs, 4); // one to follow, and no more
    for (uint32_t i = 0; i < 10; i++) {
        finish(i, STATUS_OK);
        ck_assert(hear(&request) == (i < 9));
        uint32_t left = 9 - i;
        WAIT_FOR(submitted() == i + 1 + (left < 3 ? left : 3));
        ck_assert_uint_eq(engine.log_kernel[i], 5);
        ck_assert_uint_eq(request.cut->under_way, left < 4 ? left : 4);
    }
    check_output(&request);
    drop(&request);
}
END_TEST

START_TEST(what_fits_is_not_cut)
{
    start(1, 3);
    struct request request;
    request_init(&request, TOKENS_MAX, 0);
    ck_assert_uint_eq(batcher_cut(batcher, &request.whole).tokens, TOKENS_MAX);
    ck_assert_uint_eq(batcher_cut(batcher, &request.whole).at_once, 2);
    request.whole.operand.tokens = 1;
    ck_assert_uint_eq(batcher_cut(batcher, &request.whole).tokens, 1);
    request.whole.operand.tokens = 60000;
    ck_assert_uint_eq(batcher_cut(batcher, &request.whole).tokens, TOKENS_MAX);
    drop(&request);
}
END_TEST

// The bytes of a batch may suffice for fewer tokens than it may have.
START_TEST(bytes_cut_too)
{
    struct batcher_options options = base;
    struct error err;
    enum { TOKEN = GROUPS * (REDUCED_DIM + 16), OUTPUT = GROUPS * OUTPUT_DIM * 2 };
    options.batch_input_bytes = 5 * TOKEN + CACHE_LINE_BYTES;
    ck_assert_int_eq(batcher_create(&options, &engine.waker, &batcher, &err), STATUS_OK);
    struct request request;
    request_init(&request, TOKENS_MAX, 0);
    ck_assert_uint_eq(batcher_cut(batcher, &request.whole).tokens, 5);
    request.whole.operand.tokens = 6;
    ck_assert_uint_eq(batcher_cut(batcher, &request.whole).tokens, 5);
    request.whole.operand.tokens = 5;
    ck_assert_uint_eq(batcher_cut(batcher, &request.whole).tokens, 5);
    batcher_destroy(batcher);

    options.batch_output_bytes = 3 * OUTPUT;
    ck_assert_int_eq(batcher_create(&options, &engine.waker, &batcher, &err), STATUS_OK);
    ck_assert_uint_eq(batcher_cut(batcher, &request.whole).tokens, 3);
    request.whole.output_given = true;
    ck_assert_uint_eq(batcher_cut(batcher, &request.whole).tokens, 5);
    batcher_destroy(batcher);

    options.batch_input_bytes = TOKEN - 1;
    ck_assert_int_eq(batcher_create(&options, &engine.waker, &batcher, &err), STATUS_OK);
    ck_assert_uint_eq(batcher_cut(batcher, &request.whole).tokens, 0); // not one fits
    drop(&request);
}
END_TEST

// ---- what it holds

START_TEST(few_parts_are_not_copied)
{
    start(2, 6);
    struct request request;
    request_init(&request, 3 * TOKENS_MAX, 0);
    begin(&request);
    for (uint32_t i = 0; i < 3; i++) {
        finish(i, STATUS_OK);
        ck_assert(hear(&request) == (i < 2));
        ck_assert_uint_eq(in_state(&request, JOB_DONE), i + 1);
    }
    check_output(&request);
    ck_assert_uint_eq(copies.out_bytes, 0);
    ck_assert_ptr_null(request.cut->copy);
    cut_copy_out(request.cut); // should buffers run short
    ck_assert_uint_eq(copies.out_bytes, request.output_bytes);
    ck_assert_uint_eq(stats().jobs, 0);
    check_output(&request);
    drop(&request);
}
END_TEST

START_TEST(of_many_parts_the_last_are_not_copied)
{
    start(2, 6);
    struct request request;
    request_init(&request, 8 * TOKENS_MAX, 0);
    begin(&request);
    for (uint32_t i = 0; i < 8; i++) {
        finish(i, STATUS_OK);
        ck_assert(hear(&request) == (i < 7));
        // The last part has room as soon as the one three before it has ended.
        ck_assert_uint_eq(in_state(&request, JOB_DONE), i < 5 ? 0 : i - 4);
    }
    check_output(&request);
    ck_assert_uint_eq(copies.out_bytes, request.output_bytes / 8 * 5);
    drop(&request);
}
END_TEST

// As gRPC does, perhaps on a thread of its own.
START_TEST(outputs_on_loan_come_back_one_by_one)
{
    start(2, 6);
    struct request request;
    request_init(&request, 3 * TOKENS_MAX, 0);
    begin(&request);
    for (uint32_t i = 0; i < 3; i++)
        finish(i, STATUS_OK);
    hear_all(&request);
    for (uint32_t i = 0; i < 3; i++)
        job_advance(&request.cut->parts[i].job, JOB_DONE, JOB_REPLYING);
    check_output(&request);
    batcher_release(batcher, &request.cut->parts[1].job);
    ck_assert_uint_eq(stats().jobs, 2);
    drop(&request); // and what is left with it
}
END_TEST

// With one lane and its one buffer, and with the fewest that a default has.
START_TEST(giants_do_not_wait_for_each_other)
{
    enum { N = CALLERS_MAX };
    start(_i ? 2 : 1, _i ? 5 : 1);
    static struct request requests[N];
    for (uint32_t i = 0; i < N; i++) {
        request_init(&requests[i], (5 + i) * TOKENS_MAX + i, i & 7);
        requests[i].whole.connection = i;
        begin(&requests[i]);
    }
    engine.quick = true;
    pthread_mutex_lock(&engine.lock);
    for (uint32_t lane = 0; lane < LANES_MAX; lane++)
        if (engine.lanes[lane])
            finish_locked(&engine, lane, STATUS_OK);
    pthread_mutex_unlock(&engine.lock);
    batcher_wake(&engine.waker);
    hear_each(requests, N);
    for (uint32_t i = 0; i < N; i++) {
        check_output(&requests[i]);
        drop(&requests[i]);
    }
}
END_TEST

// ---- who goes first

static struct request small;

static void small_init(uint32_t connection)
{
    request_init(&small, 1, 0);
    small.whole.connection = connection;
    small.whole.on_done = on_room;
}

static void small_commit(void)
{
    struct error err;
    ck_assert_int_eq(batcher_reserve(batcher, &small.whole, &err), STATUS_OK);
    ck_assert_int_eq(placement_fill(&small.placement, &small.whole, &copies, &err), STATUS_OK);
    batcher_commit(batcher, &small.whole);
}

// A part runs, the next one waits for the lane: the small one comes between.
START_TEST(one_token_goes_between_two_parts)
{
    start(1, 4);
    struct request large;
    request_init(&large, 6 * TOKENS_MAX, 0);
    large.whole.connection = 1;
    begin(&large);
    WAIT_FOR(submitted() == 1);
    uint32_t batches = 0;
    for (int round = 0; round < 3; round++) {
        small_init(2);
        small_commit();
        finish(batches++, STATUS_OK);
        WAIT_FOR(submitted() == batches + 1);
        ck_assert_uint_eq(engine.log_tokens[batches], 1);
        finish(batches++, STATUS_OK); // the large one's next part was reserved before
        WAIT_FOR(atomic_load(&small.told) == 1);
        ck_assert_int_eq(small.whole.error.status, STATUS_OK);
        batcher_release(batcher, &small.whole);
        small.heard = 1;
        drop(&small);
        ck_assert(hear(&large));
        WAIT_FOR(submitted() == batches + 1);
        ck_assert_uint_eq(engine.log_tokens[batches], TOKENS_MAX);
    }
    engine.quick = true;
    finish(batches, STATUS_OK);
    hear_all(&large);
    check_output(&large);
    drop(&large);
}
END_TEST

// Two of one connection beside one of another, which has every other batch.
START_TEST(large_ones_take_turns)
{
    start(1, 8);
    static struct request requests[3];
    static const uint32_t connections[] = {1, 1, 2};
    for (uint32_t i = 0; i < 3; i++) {
        request_init(&requests[i], 6 * TOKENS_MAX, 0);
        requests[i].whole.connection = connections[i];
        begin(&requests[i]);
    }
    uint32_t ended[3] = {0};
    for (uint32_t batch = 0; batch < 18; batch++) {
        finish(batch, STATUS_OK);
        uint32_t heard = 0, whose = 3;
        for (uint32_t i = 0; i < 3; i++)
            heard += requests[i].heard;
        WAIT_FOR(atomic_load(&requests[0].told) + atomic_load(&requests[1].told) +
                     atomic_load(&requests[2].told) >
                 heard);
        while (whose-- > 0 && atomic_load(&requests[whose].told) == requests[whose].heard)
            ;
        hear(&requests[whose]);
        ended[whose]++;
        if (ended[2] < 6)
            ck_assert_uint_le(ended[0] + ended[1], ended[2] + 3);
    }
    for (uint32_t i = 0; i < 3; i++) {
        ck_assert_uint_eq(ended[i], 6);
        check_output(&requests[i]);
        drop(&requests[i]);
    }
}
END_TEST

START_TEST(parts_have_their_requests_priority)
{
    start(1, 6);
    struct request low, high;
    request_init(&low, 4 * TOKENS_MAX, 0);
    request_init(&high, 4 * TOKENS_MAX - 1, 0);
    low.whole.priority = JOB_PRIORITY_LOW;
    high.whole.priority = JOB_PRIORITY_HIGH;
    low.whole.connection = 1;
    high.whole.connection = 2;
    begin(&low);
    WAIT_FOR(submitted() == 1);
    begin(&high);
    for (uint32_t batch = 0; batch < 5; batch++) {
        finish(batch, STATUS_OK);
        if (batch == 0)
            ck_assert(hear(&low));
        else
            ck_assert(hear(&high) == (batch < 4));
    }
    check_output(&high);
    ck_assert_uint_eq(low.heard, 1);
    engine.quick = true;
    WAIT_FOR(submitted() == 6);
    finish(5, STATUS_OK);
    hear_all(&low);
    check_output(&low);
    drop(&low);
    drop(&high);
}
END_TEST

// ---- how it ends early

static void expect_failed(struct request *request, enum status status, const char *text)
{
    ck_assert_int_eq(request->whole.error.status, status);
    ck_assert_str_eq(request->whole.error.text, text);
}

// What waits for a lane at that moment is dropped.
START_TEST(a_failed_part_takes_the_others_with_it)
{
    start(2, 8);
    struct request request;
    request_init(&request, 9 * TOKENS_MAX, 0);
    begin(&request);
    WAIT_FOR(submitted() == 2);
    struct request before; // so that the third does not run at once
    request_init(&before, 1, 0);
    before.whole.priority = JOB_PRIORITY_HIGH;
    before.whole.on_done = on_room;
    struct error err;
    ck_assert_int_eq(batcher_reserve(batcher, &before.whole, &err), STATUS_OK);
    batcher_commit(batcher, &before.whole);
    finish(0, STATUS_INTERNAL);
    ck_assert(hear(&request));
    finish(1, STATUS_OK);
    WAIT_FOR(atomic_load(&request.told) >= 2);
    hear_all(&request);
    ck_assert_uint_eq(submitted(), 3);
    expect_failed(&request, STATUS_INTERNAL, "fake failure");
    finish(2, STATUS_OK);
    WAIT_FOR(atomic_load(&before.told) == 1);
    before.heard = 1;
    batcher_release(batcher, &before.whole);
    drop(&before);
    drop(&request);
}
END_TEST

// _i: which of the parts fails.
START_TEST(a_failed_part_fails_it_once)
{
    start(1, 6);
    struct request request;
    request_init(&request, 6 * TOKENS_MAX, 0);
    begin(&request);
    bool goes_on = true;
    uint32_t batch = 0;
    for (; goes_on; batch++) {
        finish(batch, (int)batch == _i ? STATUS_INTERNAL : STATUS_OK);
        goes_on = hear(&request);
        if ((int)batch == _i) // what follows has been reserved; it is dropped, or runs already
            break;
    }
    if (goes_on) {
        WAIT_FOR(submitted() == batch + 2);
        finish(batch + 1, STATUS_OK);
        ck_assert(!hear(&request));
    }
    expect_failed(&request, STATUS_INTERNAL, "fake failure");
    ck_assert_uint_le(request.cut->begun, (uint32_t)_i + 2); // the rest was never begun
    drop(&request);
    stays_submitted(submitted());
}
END_TEST

// _i: after how many parts have ended.
START_TEST(cancelled_between_parts)
{
    start(1, 6);
    struct request request;
    request_init(&request, 6 * TOKENS_MAX, 0);
    begin(&request);
    for (uint32_t i = 0; i < (uint32_t)_i; i++) {
        finish(i, STATUS_OK);
        ck_assert(hear(&request));
    }
    WAIT_FOR(submitted() == (uint32_t)_i + 1);
    atomic_store(&request.whole.cancelled, true);
    finish((uint32_t)_i, STATUS_OK);
    hear_all(&request);
    expect_failed(&request, STATUS_CANCELLED, "cancelled before launch");
    ck_assert_uint_eq(submitted(), (uint32_t)_i + 1); // none was launched after that
    ck_assert_uint_le(request.cut->begun, (uint32_t)_i + 3);
    drop(&request);
}
END_TEST

START_TEST(a_deadline_passes_between_parts)
{
    start(1, 6);
    struct request request;
    request_init(&request, 6 * TOKENS_MAX, 0);
    request.whole.deadline_ns = now_ns() + 50 * 1000000ull;
    begin(&request);
    WAIT_FOR(submitted() == 1);
    WAIT_FOR(now_ns() > request.whole.deadline_ns);
    finish(0, STATUS_OK);
    hear_all(&request);
    expect_failed(&request, STATUS_DEADLINE_EXCEEDED, "deadline passed before launch");
    ck_assert_uint_eq(submitted(), 1);
    drop(&request);
}
END_TEST

// _i: at which part. With two buffers the third has to wait for room, and finds out there.
START_TEST(a_part_that_cannot_be_filled)
{
    start(1, _i % 2 ? 1 : 6);
    struct request request;
    request_init(&request, 6 * TOKENS_MAX, 0);
    request.fill_fails_at = (uint32_t)_i / 2 * TOKENS_MAX + 3;
    engine.quick = true;
    struct error err;
    if (_i / 2 == 0) {
        ck_assert_int_eq(try_begin(&request, &err), STATUS_DATA_LOSS);
        ck_assert_str_eq(err.text, "no more");
        ck_assert_ptr_null(request.cut);
    } else {
        begin(&request);
        hear_all(&request);
        expect_failed(&request, STATUS_DATA_LOSS, "no more");
    }
    drop(&request);
}
END_TEST

// Memory that no host thread may touch: only parts that are one run of bytes there can be served. _i:
// two bits of layouts.
START_TEST(memory_on_the_device)
{
    start(1, 6);
    struct request request;
    request_init(&request, 3 * TOKENS_MAX, (unsigned)_i);
    place(&request, true);
    request.region.on_device = true;
    engine.quick = true;
    struct error err;
    if (_i == 0) {
        begin(&request);
        hear_all(&request);
        check_output(&request);
    } else {
        ck_assert_int_eq(try_begin(&request, &err), STATUS_UNIMPLEMENTED);
        ck_assert_ptr_nonnull(strstr(err.text, "shared.region"));
    }
    drop(&request);
}
END_TEST

START_TEST(a_lost_device)
{
    start(1, 2);
    struct request request, waits;
    request_init(&request, 6 * TOKENS_MAX, 0);
    request_init(&waits, 6 * TOKENS_MAX, 0);
    begin(&request);
    begin(&waits);
    finish(0, STATUS_UNAVAILABLE);
    hear_all(&request);
    hear_all(&waits);
    ck_assert_int_eq(request.whole.error.status, STATUS_UNAVAILABLE);
    expect_failed(&waits, STATUS_UNAVAILABLE, "the device is lost");
    struct request late;
    struct error err;
    request_init(&late, 6 * TOKENS_MAX, 0);
    ck_assert_int_eq(try_begin(&late, &err), STATUS_UNAVAILABLE);
    drop(&request);
    drop(&waits);
    drop(&late);
}
END_TEST

// ---- a full queue

// Takes a place in the queue for as long as the test likes.
static void take_place(struct request *request)
{
    struct error err;
    request_init(request, 1, 0);
    request->whole.connection = 9;
    ck_assert_int_eq(batcher_reserve(batcher, &request->whole, &err), STATUS_OK);
}

static void leave_place(struct request *request)
{
    batcher_abandon(batcher, &request->whole);
    drop(request);
}

// A request is refused if not one part is let in. Of those let in, what has no place is tried again as
// other parts end, as long as there are any.
START_TEST(a_full_queue)
{
    struct batcher_options options = base;
    struct error err;
    options.queue_requests_max = 3;
    ck_assert_int_eq(batcher_create(&options, &engine.waker, &batcher, &err), STATUS_OK);
    struct request request, refused, first, second, third;
    request_init(&request, 6 * TOKENS_MAX, 0);
    request_init(&refused, 6 * TOKENS_MAX, 0);
    take_place(&first);
    begin(&request);
    finish(0, STATUS_OK);
    WAIT_FOR(submitted() == 2);
    WAIT_FOR(stats().queued == 1);
    take_place(&second);
    take_place(&third);
    ck_assert(hear(&request));
    ck_assert_uint_eq(request.cut->begun, 2); // no place for the third
    ck_assert_int_eq(try_begin(&refused, &err), STATUS_RESOURCE_EXHAUSTED);
    ck_assert_uint_gt(err.retry_after_ms, 0);
    ck_assert_ptr_null(refused.cut);
    if (_i == 0) {
        leave_place(&second);
        engine.quick = true;
        finish(1, STATUS_OK);
        hear_all(&request);
        check_output(&request);
    } else { // nothing of it is under way any more, and nobody would try again
        finish(1, STATUS_OK);
        ck_assert(!hear(&request));
        ck_assert_int_eq(request.whole.error.status, STATUS_RESOURCE_EXHAUSTED);
        ck_assert_uint_gt(request.whole.error.retry_after_ms, 0);
        leave_place(&second);
    }
    leave_place(&first);
    leave_place(&third);
    drop(&request);
    drop(&refused);
}
END_TEST

// What waits with its message is pushed out by bytes; parts, whose bytes are counted elsewhere, are not.
START_TEST(parts_do_not_wait_by_bytes)
{
    struct batcher_options options = base;
    struct error err;
    options.batches = 1;
    ck_assert_int_eq(batcher_create(&options, &engine.waker, &batcher, &err), STATUS_OK);
    enum { N = CALLERS_MAX };
    static struct request requests[N];
    for (uint32_t i = 0; i < N; i++) { // far more than one buffer's bytes
        request_init(&requests[i], 20 * TOKENS_MAX, 0);
        requests[i].whole.connection = i;
        begin(&requests[i]);
    }
    // These do count: the third is one too many, and whoever has had most gives way.
    static struct request whole[3];
    bool waits;
    static const uint32_t groups[] = {20, 30, 40};
    for (uint32_t i = 0; i < 3; i++) {
        request_init(&whole[i], 3 - i, 0);
        whole[i].whole.operand.groups = groups[i]; // never filled
        whole[i].whole.connection = 10 + i;
        whole[i].whole.on_done = on_room;
    }
    for (uint32_t i = 0; i < 3; i++)
        ck_assert_int_eq(batcher_reserve_or_wait(batcher, &whole[i].whole, &waits, &err),
                         STATUS_OK);
    ck_assert_uint_eq(atomic_load(&whole[0].told), 1); // three tokens stand last
    ck_assert_int_eq(whole[0].whole.error.status, STATUS_RESOURCE_EXHAUSTED);
    ck_assert_uint_eq(atomic_load(&whole[1].told), 0);
    batcher_release(batcher, &whole[0].whole);
    for (uint32_t i = 0; i < N; i++)
        atomic_store(&requests[i].whole.cancelled, true);
    finish(0, STATUS_OK);
    ck_assert(hear(&requests[0]));
    for (uint32_t i = 1; i < 3; i++) { // they have room now
        WAIT_FOR(atomic_load(&whole[i].told) == 1);
        batcher_abandon(batcher, &whole[i].whole);
    }
    hear_each(requests, N);
    for (uint32_t i = 0; i < N; i++) {
        expect_failed(&requests[i], STATUS_CANCELLED, "cancelled before launch");
    }
    for (uint32_t i = 0; i < 3; i++) {
        whole[i].heard = 1;
        drop(&whole[i]);
    }
    for (uint32_t i = 0; i < N; i++)
        drop(&requests[i]);
}
END_TEST

// ---- many threads; Check's own assertions are for the main one

struct caller {
    pthread_t thread;
    uint32_t number, answered, failed;
};

static void *run_caller(void *argument)
{
    struct caller *caller = argument;
    unsigned seed = caller->number;
    for (int i = 0; i < ROUNDS; i++) {
        struct request request;
        request_init(&request, TOKENS_MAX + 1 + (uint32_t)rand_r(&seed) % 60, (unsigned)i & 7);
        request.whole.connection = caller->number;
        if (rand_r(&seed) % 3 == 0)
            place(&request, rand_r(&seed) % 2);
        struct error err;
        if (try_begin(&request, &err) != STATUS_OK) {
            caller->failed++;
            drop(&request);
            continue;
        }
        int cancel_after = rand_r(&seed) % 8;
        bool goes_on = true;
        for (int round = 0; goes_on; round++) {
            while (atomic_load(&request.told) == request.heard)
                usleep(20);
            if (round == cancel_after)
                atomic_store(&request.whole.cancelled, true);
            request.heard++;
            goes_on = cut_go_on(request.cut);
            ASSERT(!goes_on || request.cut->under_way <= request.cut->at_once);
        }
        if (request.whole.error.status == STATUS_OK) {
            ASSERT(output_is_right(&request));
            caller->answered++;
        } else {
            ASSERT(request.whole.error.status == STATUS_CANCELLED);
            caller->failed++;
        }
        drop(&request);
    }
    return NULL;
}

START_TEST(many_threads)
{
    static struct caller callers[CALLERS_MAX];
    engine.quick = true;
    start(_i ? 3 : 1, _i ? 6 : 1);
    for (uint32_t i = 0; i < CALLERS_MAX; i++) {
        callers[i] = (struct caller){.number = i + 1};
        ck_assert_int_eq(pthread_create(&callers[i].thread, NULL, run_caller, &callers[i]), 0);
    }
    uint32_t answered = 0, failed = 0;
    for (uint32_t i = 0; i < CALLERS_MAX; i++) {
        pthread_join(callers[i].thread, NULL);
        answered += callers[i].answered;
        failed += callers[i].failed;
    }
    ck_assert_uint_eq(answered + failed, CALLERS_MAX * ROUNDS);
    ck_assert_uint_gt(answered, ROUNDS / 2);
    ck_assert_uint_gt(failed, ROUNDS / 2);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cut");
    TCase *all = tcase_create("cut");
    tcase_set_timeout(all, 120);
    tcase_add_checked_fixture(all, setup, teardown);
    tcase_add_loop_test(all, computed_as_if_it_were_one, 0, 24);
    tcase_add_loop_test(all, a_slice_of_groups, 0, 8);
    tcase_add_test(all, a_lone_request_keeps_all_lanes_busy);
    tcase_add_test(all, what_fits_is_not_cut);
    tcase_add_test(all, bytes_cut_too);
    tcase_add_test(all, few_parts_are_not_copied);
    tcase_add_test(all, of_many_parts_the_last_are_not_copied);
    tcase_add_test(all, outputs_on_loan_come_back_one_by_one);
    tcase_add_loop_test(all, giants_do_not_wait_for_each_other, 0, 2);
    tcase_add_test(all, one_token_goes_between_two_parts);
    tcase_add_test(all, large_ones_take_turns);
    tcase_add_test(all, parts_have_their_requests_priority);
    tcase_add_test(all, a_failed_part_takes_the_others_with_it);
    tcase_add_loop_test(all, a_failed_part_fails_it_once, 0, 6);
    tcase_add_loop_test(all, cancelled_between_parts, 0, 4);
    tcase_add_test(all, a_deadline_passes_between_parts);
    tcase_add_loop_test(all, a_part_that_cannot_be_filled, 0, 12);
    tcase_add_loop_test(all, memory_on_the_device, 0, 4);
    tcase_add_test(all, a_lost_device);
    tcase_add_loop_test(all, a_full_queue, 0, 2);
    tcase_add_test(all, parts_do_not_wait_by_bytes);
    tcase_add_loop_test(all, many_threads, 0, 2);
    suite_add_tcase(suite, all);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
