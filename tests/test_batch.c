// Goal: the batcher closes, launches, drops, answers and frees as batch.h says, and loses no job.
// Method: an engine that completes a batch when the test tells it to, in any order and with any
// result; and a stress with an engine that does so by itself, where every byte is followed from the
// reservation to the answer.
#include <check.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/attention.h"
#include "server/batch.h"

enum {
    LANES_MAX = 4,
    JOBS_MAX = 64,
    WEIGHTS = 3,
    // One token of the test's weights.
    REDUCED_DIM = 128,
    OUTPUT_DIM = 32,
    OUTPUT_BYTES = OUTPUT_DIM * 2,
    PATIENCE_MS = 20000, // for what must happen
    QUIET_MS = 30,       // for what must not
};

// --- the engine under the test's control

struct fake_lane {
    const struct engine_batch *batch; // NULL: idle
    bool done;
    enum status status;
    uint64_t submitted_ns;
};

struct engine {
    pthread_mutex_t lock;
    struct fake_lane lanes[LANES_MAX];
    const struct engine_batch *log[JOBS_MAX]; // in order of submission
    uint32_t submitted_n, polled_n;
    bool wakes_nobody;
    struct batcher_waker waker;
    int allocations, allocation_fails_at; // the call that fails, counted from 1; 0: none
    int allocated;                        // live
};

static enum status fake_memory_alloc(struct engine *engine, uint64_t bytes, void **memory,
                                     struct error *err)
{
    if (++engine->allocations == engine->allocation_fails_at)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory");
    *memory = aligned_alloc(4096, align_up(bytes, 4096));
    engine->allocated++;
    return STATUS_OK;
}

static void fake_memory_free(struct engine *engine, void *memory, uint64_t bytes)
{
    (void)bytes;
    engine->allocated--;
    free(memory);
}

static void fake_submit(struct engine *engine, uint32_t lane, const struct engine_batch *batch)
{
    pthread_mutex_lock(&engine->lock);
    ASSERT(lane < LANES_MAX && !engine->lanes[lane].batch);
    engine->lanes[lane] = (struct fake_lane){.batch = batch, .submitted_ns = now_ns()};
    engine->log[engine->submitted_n++ % JOBS_MAX] = batch;
    pthread_mutex_unlock(&engine->lock);
}

static bool fake_poll(struct engine *engine, uint32_t lane, struct engine_result *result)
{
    pthread_mutex_lock(&engine->lock);
    struct fake_lane *it = &engine->lanes[lane];
    bool done = it->batch && it->done;
    if (done) {
        result->status = it->status;
        if (it->status)
            error_set(&result->error, it->status, "fake failure");
        result->started_ns = it->submitted_ns;
        result->ended_ns = now_ns();
        // Every other batch is timed; the tokens make the figures differ.
        uint64_t timed = engine->polled_n++ % 2 == 0 ? it->batch->tokens : 0;
        result->copy_in_ns = timed;
        result->kernel_ns = 10 * timed;
        result->copy_out_ns = 100 * timed;
        it->batch = NULL;
    }
    pthread_mutex_unlock(&engine->lock);
    return done;
}

static const struct engine_ops polled_ops = {
    .name = "fake, polled",
    .polled = true,
    .memory_alloc = fake_memory_alloc,
    .memory_free = fake_memory_free,
    .submit = fake_submit,
    .poll = fake_poll,
};

static const struct engine_ops fake_ops = {
    .name = "fake",
    .memory_alloc = fake_memory_alloc,
    .memory_free = fake_memory_free,
    .submit = fake_submit,
    .poll = fake_poll,
};

// Done as soon as it is submitted, as the null engine.
static void quick_submit(struct engine *engine, uint32_t lane, const struct engine_batch *batch)
{
    fake_submit(engine, lane, batch);
    pthread_mutex_lock(&engine->lock);
    engine->lanes[lane].done = true;
    pthread_mutex_unlock(&engine->lock);
    batcher_wake(&engine->waker);
}

static const struct engine_ops quick_ops = {
    .name = "fake, quick",
    .memory_alloc = fake_memory_alloc,
    .memory_free = fake_memory_free,
    .submit = quick_submit,
    .poll = fake_poll,
};

// The lane on which a batch runs; -1: none.
static int fake_lane_of(struct engine *engine, const struct engine_batch *batch)
{
    for (int i = 0; i < LANES_MAX; i++)
        if (engine->lanes[i].batch == batch && batch)
            return i;
    return -1;
}

static void fake_complete(struct engine *engine, uint32_t submission, enum status status)
{
    pthread_mutex_lock(&engine->lock);
    int lane = fake_lane_of(engine, engine->log[submission]);
    ck_assert_int_ge(lane, 0);
    engine->lanes[lane].done = true;
    engine->lanes[lane].status = status;
    pthread_mutex_unlock(&engine->lock);
    if (!engine->wakes_nobody)
        batcher_wake(&engine->waker);
}

// --- fixture

struct test_job {
    struct job job; // first, so that on_done finds the rest
    _Atomic int done;
    pthread_t told_on; // which thread called on_done
};

static struct engine engine;
static struct batcher *batcher;
static struct weight weights[WEIGHTS];
static struct test_job jobs[JOBS_MAX];
static const uint32_t buckets[] = {1, 2, 4, 8};

static const struct batcher_options base = {
    .ops = &fake_ops,
    .engine = &engine,
    .lanes = 1,
    .batches = 3,
    .batch_input_bytes = 8 * (REDUCED_DIM + CACHE_LINE_BYTES),
    .batch_output_bytes = 8 * OUTPUT_BYTES,
    .batch_tokens_max = 8,
    .batch_requests_max = 8,
    .queue_requests_max = 100,
    .buckets = buckets,
    .buckets_n = ARRAY_LEN(buckets),
};

static void sleep_ms(uint32_t ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

static void on_done(struct job *job)
{
    ((struct test_job *)job)->told_on = pthread_self();
    atomic_fetch_add(&((struct test_job *)job)->done, 1);
}

static void setup(void)
{
    memset(&engine, 0, sizeof engine);
    pthread_mutex_init(&engine.lock, NULL);
    memset(jobs, 0, sizeof jobs);
    for (size_t i = 0; i < WEIGHTS; i++) {
        weights[i].format = (struct einsum_weight_format){
            .groups = 1,
            .output_dim = OUTPUT_DIM,
            .reduced_dim = REDUCED_DIM,
            .weight_type = EINSUM_WEIGHT_E4M3,
            .scale_type = EINSUM_SCALE_UE8M0,
            .block_d = 32,
            .block_r = 128,
        };
        weights[i].engine_weight = (struct engine_weight *)&weights[i]; // any distinct address
    }
    batcher = NULL;
}

static void teardown(void)
{
    if (batcher)
        batcher_destroy(batcher);
    ck_assert_int_eq(engine.allocated, 0);
    pthread_mutex_destroy(&engine.lock);
}

static void start(const struct batcher_options *options)
{
    struct error err = {.text = ""};
    enum status status = batcher_create(options, &engine.waker, &batcher, &err);
    ck_assert_msg(!status, "%s", err.text);
}

static struct job *job_init(int index, uint32_t tokens)
{
    struct test_job *it = &jobs[index];
    atomic_store(&it->done, 0);
    it->job = (struct job){
        .weight = &weights[0],
        .operand = {.tokens = tokens,
                    .groups = 1,
                    .activation_layout = EINSUM_ACTIVATIONS_TGR,
                    .scale_layout = EINSUM_SCALES_TGK,
                    .scale_type = EINSUM_SCALE_UE8M0,
                    .output_type = EINSUM_OUTPUT_BF16},
        .deadline_ns = UINT64_MAX,
        .on_done = on_done,
    };
    return &it->job;
}

static struct job *reserve(int index, uint32_t tokens)
{
    struct error err = {.text = ""};
    struct job *job = job_init(index, tokens);
    enum status status = batcher_reserve(batcher, job, &err);
    ck_assert_msg(!status, "job %d: %s", index, err.text);
    return job;
}

static struct job *commit(int index, uint32_t tokens)
{
    struct job *job = reserve(index, tokens);
    batcher_commit(batcher, job);
    return job;
}

// Launched in this thread's turn, if the scheduler sleeps.
static void commit_by_turn(int index, uint32_t tokens)
{
    struct error err;
    struct job *job = job_init(index, tokens);
    job->quiet = true;
    ck_assert_int_eq(batcher_reserve(batcher, job, &err), STATUS_OK);
    batcher_commit(batcher, job);
    batcher_turn(batcher);
}

static enum status reserve_fails(int index, uint32_t tokens, struct error *err)
{
    struct job *job = job_init(index, tokens);
    enum status status = batcher_reserve(batcher, job, err);
    ck_assert_int_ne(status, STATUS_OK);
    ck_assert_int_eq(err->status, status);
    ck_assert_int_eq((int)atomic_load(&job->state), JOB_IDLE);
    return status;
}

static uint32_t submitted(void)
{
    pthread_mutex_lock(&engine.lock);
    uint32_t n = engine.submitted_n;
    pthread_mutex_unlock(&engine.lock);
    return n;
}

static const struct engine_batch *wait_submitted(uint32_t n)
{
    for (int ms = 0; submitted() < n && ms < PATIENCE_MS; ms++)
        sleep_ms(1);
    ck_assert_uint_eq(submitted(), n);
    return engine.log[n - 1];
}

static void stays_submitted(uint32_t n)
{
    sleep_ms(QUIET_MS);
    ck_assert_uint_eq(submitted(), n);
}

static void wait_done(int index, enum status status)
{
    struct test_job *it = &jobs[index];
    for (int ms = 0; !atomic_load(&it->done) && ms < PATIENCE_MS; ms++)
        sleep_ms(1);
    ck_assert_int_eq(atomic_load(&it->done), 1);
    ck_assert_int_eq((int)atomic_load(&it->job.state), JOB_DONE);
    ck_assert_msg(it->job.error.status == status, "job %d: %s: %s", index,
                  status_name(it->job.error.status), it->job.error.text);
    ck_assert_uint_ge(it->job.launched_ns, it->job.queued_ns);
    ck_assert_uint_ge(it->job.done_ns, it->job.launched_ns);
}

static void wait_release(int index, enum status status)
{
    wait_done(index, status);
    batcher_release(batcher, &jobs[index].job);
    ck_assert_int_eq((int)atomic_load(&jobs[index].job.state), JOB_IDLE);
}

static struct batcher_stats stats(void)
{
    struct batcher_stats now;
    batcher_stats(batcher, &now);
    return now;
}

// Every buffer can be had, and no more than every buffer.
static void all_buffers_free(const struct batcher_options *options, int from)
{
    struct error err;
    int n = (int)options->batches;
    for (int i = 0; i < n; i++)
        reserve(from + i, options->batch_tokens_max);
    ck_assert_int_eq(reserve_fails(from + n, options->batch_tokens_max, &err),
                     STATUS_RESOURCE_EXHAUSTED);
    for (int i = 0; i < n; i++)
        batcher_abandon(batcher, &jobs[from + i].job);
    ck_assert_uint_eq(stats().jobs, 0);
    ck_assert_uint_eq(stats().queued, 0);
}

// --- one job

START_TEST(one_job_from_end_to_end)
{
    start(&base);
    struct job *job = reserve(0, 3);
    ck_assert_int_eq((int)atomic_load(&job->state), JOB_DECODING);
    ck_assert_uint_eq((uintptr_t)job->operand.activations % 64, 0);
    ck_assert_uint_eq((uintptr_t)job->operand.scales % 64, 0);
    ck_assert_uint_eq((uintptr_t)job->operand.output % 64, 0);
    ck_assert_ptr_eq(job->operand.scales, (const char *)job->operand.activations + 3 * REDUCED_DIM);
    stays_submitted(0);
    error_field(&job->error, STATUS_INTERNAL, "stale", "of an earlier use");
    batcher_commit(batcher, job);

    const struct engine_batch *batch = wait_submitted(1);
    ck_assert_uint_eq(batch->segments_n, 1);
    ck_assert_uint_eq(batch->tokens, 3);
    ck_assert_uint_eq(batch->bucket, 2);
    ck_assert_ptr_eq(batch->input, job->operand.activations);
    ck_assert_ptr_eq(batch->output, job->operand.output);
    ck_assert_uint_eq(batch->input_bytes, 3 * REDUCED_DIM + 64);
    ck_assert_uint_eq(batch->output_bytes, 3 * OUTPUT_BYTES);
    ck_assert_ptr_eq(batch->segments[0].weight, weights[0].engine_weight);
    ck_assert_ptr_eq(batch->segments[0].operand.output, job->operand.output);
    ck_assert_uint_eq(batch->segments[0].operand.tokens, 3);
    ck_assert_uint_eq(stats().jobs, 1);
    ck_assert_uint_eq(stats().queued, 0);
    sleep_ms(2);
    ck_assert_uint_ge(stats().busy_ns, 2000000); // counted while it runs, too

    fake_complete(&engine, 0, STATUS_OK);
    wait_done(0, STATUS_OK);
    ck_assert_str_eq(job->error.text, "");
    ck_assert_str_eq(job->error.field, "");
    ck_assert_uint_eq(job->batch_tokens, 3);
    ck_assert_uint_eq(job->batch_bucket, 4);
    ck_assert_uint_eq(job->batch_requests, 1);
    job_advance(job, JOB_DONE, JOB_REPLYING); // a reply that borrows the output
    batcher_release(batcher, job);

    struct batcher_stats end = stats();
    ck_assert_uint_eq(end.batches, 1);
    ck_assert_uint_eq(end.requests, 1);
    ck_assert_uint_eq(end.tokens, 3);
    ck_assert_uint_eq(end.padding_tokens, 1);
    ck_assert_uint_ge(end.busy_ns, 2000000);
    ck_assert_uint_eq(end.buffer_bytes, 3 * (base.batch_input_bytes + base.batch_output_bytes));
    sleep_ms(2);
    ck_assert_uint_eq(stats().busy_ns, end.busy_ns);
    all_buffers_free(&base, 1);
}
END_TEST

// --- attention's output and rotations for activations and scales

enum { ATTENTION_GROUPS = 2, ATTENTION_REDUCED_DIM = 2 * ATTENTION_HEAD_DIM };

static struct job *attention_init(int index, uint32_t tokens)
{
    struct einsum_weight_format *format = &weights[1].format;
    format->groups = ATTENTION_GROUPS;
    format->reduced_dim = ATTENTION_REDUCED_DIM;
    struct job *job = job_init(index, tokens);
    job->weight = &weights[1];
    job->attention = true;
    job->operand.groups = ATTENTION_GROUPS;
    job->operand.activation_layout = 0; // whatever they were
    job->operand.scale_layout = 0;
    job->operand.scale_type = EINSUM_SCALE_NONE;
    return job;
}

static uint64_t attention_input_bytes(uint32_t tokens)
{
    return (uint64_t)tokens *
           (ATTENTION_GROUPS * ATTENTION_REDUCED_DIM * 2 + sizeof(struct attention_rotation));
}

START_TEST(attention_gets_rotations_behind_its_rows)
{
    static const uint32_t tokens[] = {1, 3, 8};
    uint32_t n = tokens[_i];
    struct batcher_options options = base;
    options.batch_tokens_max = n + 1; // one more for the job in front
    options.buckets = &options.batch_tokens_max;
    options.buckets_n = 1;
    options.batch_input_bytes = REDUCED_DIM + CACHE_LINE_BYTES + attention_input_bytes(n);
    options.batch_output_bytes = 64 * 1024;
    start(&options);

    struct job *ordinary = reserve(0, 1);
    ck_assert_ptr_null(ordinary->operand.rotations);
    struct job *job = attention_init(1, n);
    struct error err = {.text = ""};
    ck_assert_msg(!batcher_reserve(batcher, job, &err), "%s", err.text);
    ck_assert_ptr_eq(job->batch, ordinary->batch); // it fits to the byte

    const struct einsum_operand *operand = &job->operand;
    const uint8_t *rows = operand->activations;
    ck_assert_ptr_eq(rows, (const uint8_t *)ordinary->operand.activations + REDUCED_DIM + 64);
    ck_assert_ptr_eq(operand->scales, rows + ATTENTION_REDUCED_DIM);
    const uint8_t *rotations = (const uint8_t *)operand->rotations;
    ck_assert_ptr_eq(rotations, rows + (size_t)n * ATTENTION_GROUPS * ATTENTION_REDUCED_DIM * 2);
    ck_assert_uint_eq((uintptr_t)rotations % 64, 0);
    ck_assert_int_eq((int)operand->activation_layout, EINSUM_ACTIVATIONS_IN_PLACE);
    ck_assert_int_eq((int)operand->scale_layout, EINSUM_SCALES_IN_PLACE);
    ck_assert_int_eq((int)operand->scale_type, EINSUM_SCALE_UE8M0);

    batcher_commit(batcher, ordinary);
    batcher_commit(batcher, job);
    const struct engine_batch *batch = wait_submitted(1);
    ck_assert_uint_eq(batch->input_bytes, options.batch_input_bytes);
    ck_assert_uint_eq(batch->segments_n, 2);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    wait_release(1, STATUS_OK);

    // The same struct in an ordinary request: nothing of attention is left.
    job->attention = false;
    job->weight = &weights[0];
    job->operand.groups = 1;
    job->operand.activation_layout = EINSUM_ACTIVATIONS_GTR;
    job->operand.scale_layout = EINSUM_SCALES_TGK;
    ck_assert_msg(!batcher_reserve(batcher, job, &err), "%s", err.text);
    ck_assert_ptr_null(operand->rotations);
    ck_assert_int_eq((int)operand->activation_layout, EINSUM_ACTIVATIONS_GTR);
    batcher_abandon(batcher, job);
}
END_TEST

START_TEST(attention_too_large_for_a_batch_is_invalid)
{
    struct batcher_options options = base;
    options.batch_input_bytes = attention_input_bytes(2) - 1;
    start(&options);
    struct error err = {.text = ""};
    ck_assert_int_eq(batcher_reserve(batcher, attention_init(0, 2), &err), STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, "attention");
    ck_assert_ptr_nonnull(strstr(err.text, "bytes of attention and rotations"));
    ck_assert_ptr_null(jobs[0].job.operand.rotations);
    ck_assert_msg(!batcher_reserve(batcher, attention_init(0, 1), &err), "%s", err.text);
    batcher_abandon(batcher, &jobs[0].job);
}
END_TEST

// --- closing and launching

START_TEST(jobs_gather_while_the_lane_is_busy)
{
    start(&base);
    commit(0, 1);
    wait_submitted(1);
    for (int i = 1; i <= 3; i++)
        commit(i, 1);
    stays_submitted(1);
    fake_complete(&engine, 0, STATUS_OK);
    const struct engine_batch *batch = wait_submitted(2);
    ck_assert_uint_eq(batch->segments_n, 3);
    ck_assert_uint_eq(batch->tokens, 3);
    fake_complete(&engine, 1, STATUS_OK);
    for (int i = 0; i <= 3; i++)
        wait_release(i, STATUS_OK);
    ck_assert_uint_eq(jobs[2].job.batch_requests, 3);
}
END_TEST

struct full {
    const char *by;
    uint32_t tokens_max, requests_max;
    uint64_t input_bytes, output_bytes;
    uint32_t holds; // jobs of two tokens
};

static const struct full fulls[] = {
    {"tokens, to the last", 4, 8, 1 << 20, 1 << 20, 2},
    {"tokens, one left", 5, 8, 1 << 20, 1 << 20, 2},
    {"requests", 100, 3, 1 << 20, 1 << 20, 3},
    {"input bytes", 100, 8, 3 * (2 * REDUCED_DIM + 64) + 1, 1 << 20, 3},
    {"output bytes", 100, 8, 1 << 20, 2 * 2 * OUTPUT_BYTES + 127, 2},
};

START_TEST(closes_when_full)
{
    const struct full *full = &fulls[_i];
    struct batcher_options options = base;
    options.batch_tokens_max = full->tokens_max;
    options.batch_requests_max = full->requests_max;
    options.batch_input_bytes = full->input_bytes;
    options.batch_output_bytes = full->output_bytes;
    options.buckets = &full->tokens_max;
    options.buckets_n = 1;
    start(&options);
    commit(0, 1); // keeps the lane busy
    wait_submitted(1);
    int n = (int)full->holds;
    for (int i = 1; i <= n + 1; i++)
        commit(i, 2);
    fake_complete(&engine, 0, STATUS_OK);
    ck_assert_msg(wait_submitted(2)->segments_n == full->holds, "full by %s", full->by);
    fake_complete(&engine, 1, STATUS_OK);
    ck_assert_uint_eq(wait_submitted(3)->segments_n, 1);
    fake_complete(&engine, 2, STATUS_OK);
    for (int i = 0; i <= n + 1; i++)
        wait_release(i, STATUS_OK);
}
END_TEST

START_TEST(launches_in_order_of_opening)
{
    start(&base);
    commit(0, 5);
    wait_submitted(1);
    struct job *first = reserve(1, 5), *second = reserve(2, 5);
    batcher_commit(batcher, second);
    batcher_commit(batcher, first);
    fake_complete(&engine, 0, STATUS_OK);
    ck_assert_ptr_eq(wait_submitted(2)->output, first->operand.output);
    fake_complete(&engine, 1, STATUS_OK);
    ck_assert_ptr_eq(wait_submitted(3)->output, second->operand.output);
    fake_complete(&engine, 2, STATUS_OK);
    for (int i = 0; i < 3; i++)
        wait_release(i, STATUS_OK);
}
END_TEST

START_TEST(a_ready_batch_does_not_wait_for_one_that_is_being_filled)
{
    start(&base);
    struct job *first = reserve(0, 5), *second = reserve(1, 5);
    batcher_commit(batcher, second);
    ck_assert_ptr_eq(wait_submitted(1)->output, second->operand.output);
    batcher_commit(batcher, first);
    stays_submitted(1);
    fake_complete(&engine, 0, STATUS_OK);
    ck_assert_ptr_eq(wait_submitted(2)->output, first->operand.output);
    fake_complete(&engine, 1, STATUS_OK);
    wait_release(0, STATUS_OK);
    wait_release(1, STATUS_OK);
}
END_TEST

START_TEST(a_closed_batch_waits_for_the_last_that_fills)
{
    start(&base);
    struct job *slow = reserve(0, 1);
    commit(1, 1); // a lane is free: closes the batch, with `slow` inside
    struct job *late = reserve(2, 1);
    for (int ms = 0; late->batch == slow->batch && ms < PATIENCE_MS; ms++) {
        batcher_abandon(batcher, late); // the scheduler was not there yet
        sleep_ms(1);
        late = reserve(2, 1);
    }
    ck_assert_ptr_ne(late->batch, slow->batch);
    stays_submitted(0);
    if (_i == 0)
        batcher_commit(batcher, slow);
    else
        batcher_abandon(batcher, slow);
    const struct engine_batch *batch = wait_submitted(1);
    ck_assert_uint_eq(batch->segments_n, _i == 0 ? 2 : 1);
    ck_assert_uint_eq(batch->tokens, _i == 0 ? 2 : 1);
    fake_complete(&engine, 0, STATUS_OK);
    if (_i == 0)
        wait_release(0, STATUS_OK);
    wait_release(1, STATUS_OK);
    batcher_abandon(batcher, late);
    all_buffers_free(&base, 10);
}
END_TEST

START_TEST(lanes_complete_in_any_order)
{
    struct batcher_options options = base;
    options.lanes = 3;
    options.batches = 5;
    start(&options);
    for (int i = 0; i < 3; i++) {
        commit(i, 1);
        wait_submitted((uint32_t)i + 1);
    }
    commit(3, 1);
    stays_submitted(3);
    fake_complete(&engine, 1, STATUS_OK);
    wait_release(1, STATUS_OK);
    wait_submitted(4); // on the lane that was freed
    fake_complete(&engine, 2, STATUS_OK);
    fake_complete(&engine, 3, STATUS_OK);
    wait_release(3, STATUS_OK);
    wait_release(2, STATUS_OK);
    ck_assert_int_eq(atomic_load(&jobs[0].done), 0);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    all_buffers_free(&options, 10);
}
END_TEST

START_TEST(a_delay_gathers_and_ends)
{
    enum { DELAY_MS = 60 };
    struct batcher_options options = base;
    options.max_queue_delay_us = DELAY_MS * 1000;
    start(&options);
    commit(0, 1);
    commit(1, 1);
    ck_assert_uint_eq(wait_submitted(1)->segments_n, 2);
    uint64_t waited_ns = engine.lanes[0].submitted_ns - jobs[0].job.queued_ns;
    ck_assert_uint_ge(waited_ns, DELAY_MS * 1000000u);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    wait_release(1, STATUS_OK);
}
END_TEST

static void sleep_us(uint32_t us)
{
    nanosleep(&(struct timespec){.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000L}, NULL);
}

static void start_polled(uint32_t max_queue_delay_us)
{
    struct batcher_options options = base;
    options.ops = &polled_ops;
    options.lanes = 2;
    options.max_queue_delay_us = max_queue_delay_us;
    engine.wakes_nobody = true;
    start(&options);
}

// While it watches, naps, or sleeps between jobs: what a polled engine finishes is found.
static const uint32_t pauses_us[] = {0, 20, 150, 250, 1000, 20000};

START_TEST(a_polled_engine_is_looked_at_without_a_wake)
{
    enum { ROUNDS = 20 };
    start_polled(0);
    for (uint32_t i = 0; i < ROUNDS; i++) {
        commit(0, 1);
        wait_submitted(i + 1);
        sleep_us(pauses_us[_i]);
        fake_complete(&engine, i, STATUS_OK);
        wait_release(0, STATUS_OK);
        sleep_us(pauses_us[_i]);
    }
    ck_assert_uint_eq(stats().batches, ROUNDS);
}
END_TEST

START_TEST(a_polled_engine_takes_new_batches_while_it_runs_others)
{
    start_polled(0);
    commit(0, 1);
    wait_submitted(1);
    sleep_us(pauses_us[_i]);
    commit(1, 2);
    wait_submitted(2);
    fake_complete(&engine, 1, STATUS_OK);
    wait_release(1, STATUS_OK);
    sleep_us(pauses_us[_i]);
    ck_assert_int_eq(atomic_load(&jobs[0].done), 0);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
}
END_TEST

START_TEST(watching_cuts_no_delay_short)
{
    enum { DELAY_US = 100 }; // less than it watches
    start_polled(DELAY_US);
    for (uint32_t i = 0; i < 20; i++) {
        commit(0, 1);
        wait_submitted(i + 1);
        ck_assert_uint_ge(jobs[0].job.launched_ns, jobs[0].job.queued_ns + DELAY_US * 1000u);
        fake_complete(&engine, i, STATUS_OK);
        wait_release(0, STATUS_OK);
    }
    ck_assert_uint_ge(stats().queue_ns, 20 * DELAY_US * 1000u);
}
END_TEST

// --- whoever commits launches

static struct batcher_options quick_options(void)
{
    struct batcher_options options = base;
    options.ops = &quick_ops;
    return options;
}

START_TEST(a_commit_launches_and_answers_by_itself)
{
    const struct batcher_options options = quick_options();
    start(&options);
    sleep_ms(QUIET_MS); // until the scheduler thread sleeps; while it is awake the turn is its
    for (int i = 0; i < 3; i++) {
        commit(i, 2);
        ck_assert_int_eq(atomic_load(&jobs[i].done), 1); // with no other thread's help
        ck_assert_uint_eq(submitted(), (uint32_t)i + 1);
        wait_release(i, STATUS_OK);
    }
    all_buffers_free(&options, 0);
}
END_TEST

START_TEST(what_a_commit_launched_is_answered_when_it_ends)
{
    start(&base);
    sleep_ms(QUIET_MS);
    commit(0, 2);
    ck_assert_uint_eq(submitted(), 1);
    commit(1, 2); // the lane is taken: it waits
    ck_assert_uint_eq(submitted(), 1);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    wait_submitted(2);
    fake_complete(&engine, 1, STATUS_OK);
    wait_release(1, STATUS_OK);
}
END_TEST

// The scheduler thread is to launch what no later commit does.
START_TEST(a_delay_ends_without_another_commit)
{
    struct batcher_options options = quick_options();
    options.max_queue_delay_us = 50000;
    start(&options);
    for (int i = 0; i < 3; i++) {
        commit(i, 1);
        ck_assert_int_eq(atomic_load(&jobs[i].done), 0);
        wait_release(i, STATUS_OK);
        ck_assert_uint_ge(jobs[i].job.launched_ns - jobs[i].job.queued_ns, 50000000);
    }
}
END_TEST

static _Atomic bool turn_held, turn_let_go;

static void hold_turn(struct job *job)
{
    atomic_store(&turn_held, true);
    while (!atomic_load(&turn_let_go))
        sched_yield();
    on_done(job);
}

static void *commit_first(void *argument)
{
    batcher_commit(batcher, argument);
    return NULL;
}

START_TEST(a_commit_while_another_has_the_turn_is_not_lost)
{
    const struct batcher_options options = quick_options();
    start(&options);
    atomic_store(&turn_held, false);
    atomic_store(&turn_let_go, false);
    struct job *first = reserve(0, 8); // fills its batch, so that the next opens another
    first->on_done = hold_turn;
    pthread_t thread;
    ck_assert_int_eq(pthread_create(&thread, NULL, commit_first, first), 0);
    while (!atomic_load(&turn_held))
        sched_yield();
    commit(1, 1);
    ck_assert_int_eq(atomic_load(&jobs[1].done), 0);
    ck_assert_uint_eq(submitted(), 1);
    atomic_store(&turn_let_go, true);
    wait_release(1, STATUS_OK);
    pthread_join(thread, NULL);
    wait_release(0, STATUS_OK);
}
END_TEST

START_TEST(batches_are_counted_by_bucket_and_phase)
{
    static const uint32_t tokens[] = {1, 3, 4, 8, 3};
    start(&base);
    for (uint32_t i = 0; i < ARRAY_LEN(tokens); i++) {
        commit(0, tokens[i]);
        wait_submitted(i + 1);
        fake_complete(&engine, i, STATUS_OK);
        wait_release(0, STATUS_OK);
    }
    struct batcher_stats end = stats();
    ck_assert_uint_eq(end.bucket_batches[0], 1);
    ck_assert_uint_eq(end.bucket_batches[1], 0);
    ck_assert_uint_eq(end.bucket_batches[2], 3);
    ck_assert_uint_eq(end.bucket_batches[3], 1);
    ck_assert_uint_eq(end.phase_batches, 3); // the first, third and fifth
    ck_assert_uint_eq(end.copy_in.sum_ns, 1 + 4 + 3);
    ck_assert_uint_eq(end.kernel.sum_ns, 10 * (1 + 4 + 3));
    ck_assert_uint_eq(end.copy_out.sum_ns, 100 * (1 + 4 + 3));
    // What failed has no phases.
    commit(0, 1);
    wait_submitted(6);
    fake_complete(&engine, 5, STATUS_OK);
    wait_release(0, STATUS_OK);
    commit(0, 1);
    wait_submitted(7);
    fake_complete(&engine, 6, STATUS_INTERNAL);
    wait_release(0, STATUS_INTERNAL);
    ck_assert_uint_eq(stats().phase_batches, 3);
    ck_assert_uint_eq(stats().kernel.sum_ns, 80);
}
END_TEST

START_TEST(a_full_batch_does_not_wait_for_the_delay)
{
    struct batcher_options options = base;
    options.max_queue_delay_us = 1000 * 1000000u; // longer than any patience
    start(&options);
    commit(0, 4);
    stays_submitted(0);
    if (_i == 0)
        commit(1, 4); // fits exactly
    else
        reserve(1, 5); // fits not, and stays in the next batch
    ck_assert_uint_eq(wait_submitted(1)->tokens, _i == 0 ? 8 : 4);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    if (_i == 0)
        wait_release(1, STATUS_OK);
    else
        batcher_abandon(batcher, &jobs[1].job);
}
END_TEST

START_TEST(equal_weights_stand_side_by_side)
{
    start(&base);
    commit(0, 1);
    wait_submitted(1);
    static const int order[] = {2, 0, 1, 0, 2, 1, 0};
    static const uint32_t kernels[] = {0, 1, 0, 1, 0, 0, 0}; // so the first weight is read twice
    enum { N = ARRAY_LEN(order) };
    for (int i = 0; i < N; i++) {
        struct job *job = job_init(i + 1, 1);
        job->weight = &weights[order[i]];
        job->kernel = kernels[i];
        ck_assert_int_eq(batcher_reserve(batcher, job, NULL), STATUS_OK);
        batcher_commit(batcher, job);
    }
    fake_complete(&engine, 0, STATUS_OK);
    const struct engine_batch *batch = wait_submitted(2);
    ck_assert_uint_eq(batch->segments_n, N);
    int changes = 0;
    for (uint32_t s = 0; s < N; s++) {
        const struct engine_segment *segment = &batch->segments[s];
        changes += s > 0 &&
                   (segment->weight != segment[-1].weight || segment->kernel != segment[-1].kernel);
        int owner = -1; // the job whose output this is must be one of this weight
        for (int i = 0; i < N; i++)
            if (jobs[i + 1].job.operand.output == segment->operand.output)
                owner = i;
        ck_assert_int_ge(owner, 0);
        ck_assert_ptr_eq(segment->weight, weights[order[owner]].engine_weight);
        ck_assert_uint_eq(segment->kernel, kernels[owner]);
    }
    ck_assert_int_eq(changes, WEIGHTS);
    fake_complete(&engine, 1, STATUS_OK);
    for (int i = 0; i <= N; i++)
        wait_release(i, STATUS_OK);
}
END_TEST

// --- dropping

START_TEST(late_and_cancelled_jobs_are_dropped_before_launch)
{
    start(&base);
    commit(0, 1);
    wait_submitted(1);
    for (int i = 1; i <= 4; i++)
        reserve(i, 1);
    jobs[2].job.deadline_ns = now_ns() + 1000000;
    atomic_store(&jobs[3].job.cancelled, true);
    for (int i = 1; i <= 4; i++)
        batcher_commit(batcher, &jobs[i].job);
    sleep_ms(3);
    fake_complete(&engine, 0, STATUS_OK);
    const struct engine_batch *batch = wait_submitted(2);
    ck_assert_uint_eq(batch->segments_n, 2);
    ck_assert_uint_eq(batch->tokens, 2);
    ck_assert_uint_eq(batch->bucket, 1); // of those left
    wait_release(2, STATUS_DEADLINE_EXCEEDED);
    ck_assert_str_eq(jobs[2].job.error.text, "deadline passed before launch");
    wait_release(3, STATUS_CANCELLED);
    ck_assert_uint_eq(jobs[3].job.batch_requests, 0);
    // Once launched, neither matters to the batcher.
    atomic_store(&jobs[1].job.cancelled, true);
    fake_complete(&engine, 1, STATUS_OK);
    wait_release(0, STATUS_OK);
    wait_release(1, STATUS_OK);
    wait_release(4, STATUS_OK);
    ck_assert_uint_eq(stats().expired, 1);
    ck_assert_uint_eq(stats().cancelled, 1);
    ck_assert_uint_eq(stats().requests, 3);
    all_buffers_free(&base, 10);
}
END_TEST

START_TEST(a_batch_of_dropped_jobs_is_not_launched)
{
    start(&base);
    for (int i = 0; i < 3; i++) {
        struct job *job = reserve(i, 1);
        job->deadline_ns = 1;
        batcher_commit(batcher, job);
        wait_done(i, STATUS_DEADLINE_EXCEEDED);
    }
    stays_submitted(0);
    ck_assert_uint_eq(stats().batches, 0);
    ck_assert_uint_eq(stats().busy_ns, 0);
    for (int i = 0; i < 3; i++)
        batcher_release(batcher, &jobs[i].job);
    commit(5, 1); // the lane is still there
    wait_submitted(1);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(5, STATUS_OK);
    all_buffers_free(&base, 10);
}
END_TEST

START_TEST(abandoned_room_comes_back_if_it_was_the_last)
{
    start(&base);
    struct job *first = reserve(0, 2), *second = reserve(1, 3);
    const void *second_input = second->operand.activations, *second_output = second->operand.output;
    batcher_abandon(batcher, second);
    ck_assert_int_eq((int)atomic_load(&second->state), JOB_IDLE);
    struct job *again = reserve(2, 6); // tokens came back as well
    ck_assert_ptr_eq(again->operand.activations, second_input);
    ck_assert_ptr_eq(again->operand.output, second_output);
    ck_assert_ptr_eq(again->batch, first->batch);
    batcher_abandon(batcher, first); // dead room, in front
    batcher_commit(batcher, again);
    const struct engine_batch *batch = wait_submitted(1);
    ck_assert_uint_eq(batch->segments_n, 1);
    ck_assert_uint_eq(batch->tokens, 6);
    ck_assert_ptr_eq(batch->segments[0].operand.activations, second_input);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(2, STATUS_OK);
    all_buffers_free(&base, 10);
}
END_TEST

// What a job brings along takes no room, and stays where it is.
START_TEST(given_memory_is_used_where_it_is)
{
    start(&base);
    static uint8_t input[8 * REDUCED_DIM], scales[8], output[8 * OUTPUT_BYTES];
    struct job *first = reserve(0, 1), *given[3];
    const uint8_t *room = (const uint8_t *)first->operand.activations + first->input_bytes;
    const uint8_t *output_room = (const uint8_t *)first->operand.output + first->output_bytes;
    for (int i = 0; i < 3; i++) {
        struct error err;
        given[i] = job_init(1 + i, 2);
        given[i]->input_given = i != 1;
        given[i]->output_given = i != 0;
        given[i]->operand.activations = input;
        given[i]->operand.scales = scales;
        given[i]->operand.output = output;
        ck_assert_int_eq(batcher_reserve(batcher, given[i], &err), STATUS_OK);
    }
    ck_assert_ptr_eq(given[0]->operand.activations, input);
    ck_assert_ptr_eq(given[0]->operand.output, output_room);
    ck_assert_ptr_eq(given[1]->operand.activations, room);
    ck_assert_ptr_eq(given[1]->operand.output, output);
    ck_assert_ptr_eq(given[2]->operand.scales, scales);
    ck_assert_ptr_eq(given[2]->operand.output, output);
    batcher_abandon(batcher, given[2]);
    batcher_abandon(batcher, given[1]); // each gives back what it took
    struct job *last = reserve(4, 1);
    ck_assert_ptr_eq(last->operand.activations, room);
    batcher_commit(batcher, first);
    batcher_commit(batcher, given[0]);
    batcher_commit(batcher, last);
    const struct engine_batch *batch = wait_submitted(1);
    ck_assert_uint_eq(batch->segments_n, 3);
    ck_assert_uint_eq(batch->tokens, 4);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    wait_release(1, STATUS_OK);
    wait_release(4, STATUS_OK);
    all_buffers_free(&base, 10);
}
END_TEST

// What is given and staged takes room all the same, from the other end, so that it is kept apart from
// what goes to the device in one copy; of attention, the rotations are the batch's.
START_TEST(staged_memory_has_room_from_the_other_end)
{
    start(&base);
    static uint8_t input[8 * REDUCED_DIM], scales[8], output[8 * OUTPUT_BYTES];
    struct job *plain = reserve(0, 1), *given[2];
    for (int i = 0; i < 2; i++) {
        struct error err;
        given[i] = job_init(1 + i, 2);
        given[i]->input_given = given[i]->output_given = given[i]->staged = true;
        given[i]->operand.activations = input;
        given[i]->operand.scales = scales;
        given[i]->operand.output = output;
        ck_assert_int_eq(batcher_reserve(batcher, given[i], &err), STATUS_OK);
        ck_assert_ptr_eq(given[i]->operand.activations, input);
        ck_assert_ptr_eq(given[i]->operand.scales, scales);
        ck_assert_ptr_eq(given[i]->operand.output, output);
    }
    uint64_t in_room = align_up(2 * REDUCED_DIM, 64) + 64,
             out_room = align_up(2 * OUTPUT_BYTES, 64);
    batcher_abandon(batcher, given[1]); // gives back what it took
    struct job *again = job_init(2, 2);
    again->input_given = again->staged = true;
    again->operand.activations = input;
    again->operand.scales = scales;
    struct error err;
    ck_assert_int_eq(batcher_reserve(batcher, again, &err), STATUS_OK);
    batcher_commit(batcher, plain);
    batcher_commit(batcher, given[0]);
    batcher_commit(batcher, again);
    const struct engine_batch *batch = wait_submitted(1);
    ck_assert_uint_eq(batch->segments_n, 3);
    ck_assert_uint_eq(batch->input_staged, 2 * in_room);
    ck_assert_uint_eq(batch->output_staged, out_room);
    ck_assert_uint_eq(batch->input_bytes, plain->input_bytes);
    ck_assert_uint_eq(batch->output_bytes, plain->output_bytes + out_room);
    const uint8_t *end = (const uint8_t *)batch->input + base.batch_input_bytes / 64 * 64;
    for (uint32_t i = 0; i < 3; i++) {
        const struct engine_segment *segment = &batch->segments[i];
        const uint8_t *at = segment->staged_input;
        bool first = segment->operand.output == output;
        if (segment->operand.activations != input)
            ck_assert(!at && !segment->staged_output);
        else
            ck_assert_ptr_eq(at, end - (first ? 1 : 2) * in_room);
        ck_assert_int_eq(segment->staged_output != NULL, first);
    }
    fake_complete(&engine, 0, STATUS_OK);
    for (int i = 0; i < 3; i++)
        wait_release(i, STATUS_OK);
    all_buffers_free(&base, 10);
}
END_TEST

// Launching and answering by who commits, while the scheduler's thread sleeps.
START_TEST(a_turn_does_the_schedulers_work)
{
    struct batcher_options options = base;
    options.ops = &quick_ops;
    start(&options);
    uint32_t here = 0;
    for (int round = 0; round < 1000; round++) {
        commit_by_turn(0, 1);
        here += atomic_load(&jobs[0].done) == 1 && pthread_equal(jobs[0].told_on, pthread_self());
        wait_release(0, STATUS_OK);
    }
    ck_assert_uint_gt(here, 0); // all but those that met the thread awake
    ck_assert_uint_eq(stats().requests, 1000);
    all_buffers_free(&options, 10);
}
END_TEST

START_TEST(an_open_batch_abandoned_whole_starts_afresh)
{
    start(&base);
    struct job *first = reserve(0, 2), *second = reserve(1, 2);
    const void *start_of_input = first->operand.activations;
    const struct batch *batch = first->batch;
    batcher_abandon(batcher, first);
    batcher_abandon(batcher, second);
    struct job *third = reserve(2, 7);
    ck_assert_ptr_eq(third->batch, batch);
    ck_assert_ptr_eq(third->operand.activations, start_of_input);
    batcher_abandon(batcher, third);
    all_buffers_free(&base, 10);
    stays_submitted(0);
}
END_TEST

// --- failing

START_TEST(an_engines_error_reaches_every_job_of_the_batch)
{
    start(&base);
    commit(0, 1);
    wait_submitted(1);
    commit(1, 1);
    commit(2, 1);
    fake_complete(&engine, 0, STATUS_OK);
    wait_submitted(2);
    fake_complete(&engine, 1, STATUS_INTERNAL);
    wait_release(0, STATUS_OK);
    wait_release(1, STATUS_INTERNAL);
    wait_release(2, STATUS_INTERNAL);
    ck_assert_str_eq(jobs[1].job.error.text, "fake failure");
    ck_assert_uint_eq(stats().failed, 2);
    ck_assert(!batcher_device_lost(batcher));
    commit(3, 1); // the next batch is none the worse
    wait_submitted(3);
    fake_complete(&engine, 2, STATUS_OK);
    wait_release(3, STATUS_OK);
    ck_assert_str_eq(jobs[3].job.error.text, "");
}
END_TEST

START_TEST(a_lost_device_answers_everything)
{
    struct batcher_options options = base;
    options.lanes = 2;
    options.batches = 5;
    options.max_queue_delay_us = _i ? 1000 * 1000000u : 0; // no delay may hold it up
    start(&options);
    commit(0, 8);
    wait_submitted(1);
    commit(1, 8);
    wait_submitted(2);
    commit(2, 8);
    struct job *slow = reserve(3, 1);
    commit(4, 1);
    fake_complete(&engine, 0, STATUS_UNAVAILABLE);
    wait_release(0, STATUS_UNAVAILABLE);
    wait_release(2, STATUS_UNAVAILABLE);
    ck_assert(batcher_device_lost(batcher));
    struct error err;
    ck_assert_int_eq(reserve_fails(5, 1, &err), STATUS_UNAVAILABLE);
    batcher_commit(batcher, slow);
    wait_release(3, STATUS_UNAVAILABLE);
    wait_release(4, STATUS_UNAVAILABLE);
    ck_assert_str_eq(jobs[4].job.error.text, "the device is lost");
    fake_complete(&engine, 1, STATUS_UNAVAILABLE); // the other lane
    wait_release(1, STATUS_UNAVAILABLE);
    ck_assert_uint_eq(stats().failed, 5);
    ck_assert_uint_eq(stats().jobs, 0);
    stays_submitted(2);
}
END_TEST

// --- limits

START_TEST(a_full_queue_refuses_and_advises)
{
    struct batcher_options options = base;
    options.queue_requests_max = 3;
    start(&options);
    struct error err;
    commit(0, 1);
    wait_submitted(1);
    sleep_ms(25); // how long a batch takes
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    commit(1, 1);
    wait_submitted(2); // running: counts no more
    commit(2, 8);
    commit(3, 1);
    reserve(4, 1); // counts from its reservation on
    ck_assert_int_eq(reserve_fails(5, 1, &err), STATUS_RESOURCE_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(err.text, "queue_requests_max"));
    ck_assert_ptr_nonnull(strstr(err.text, "3"));
    ck_assert_uint_ge(err.retry_after_ms, 2 * 25); // two batches wait
    ck_assert_uint_le(err.retry_after_ms, 1000);
    batcher_abandon(batcher, &jobs[4].job);
    commit(6, 1);
    for (uint32_t i = 1; i <= 3; i++) {
        wait_submitted(i + 1);
        fake_complete(&engine, i, STATUS_OK);
    }
    wait_release(1, STATUS_OK);
    wait_release(2, STATUS_OK);
    wait_release(3, STATUS_OK);
    wait_release(6, STATUS_OK);
}
END_TEST

START_TEST(no_free_buffer_refuses_until_one_is_released)
{
    start(&base);
    struct error err;
    commit(0, 8);
    wait_submitted(1);
    fake_complete(&engine, 0, STATUS_OK);
    wait_done(0, STATUS_OK); // being answered
    reserve(1, 8);
    reserve(2, 8);
    ck_assert_int_eq(reserve_fails(3, 8, &err), STATUS_RESOURCE_EXHAUSTED);
    ck_assert_str_eq(err.text, "all 3 batch buffers are in use (batches)");
    ck_assert_uint_ge(err.retry_after_ms, 1);
    batcher_release(batcher, &jobs[0].job);
    reserve(3, 8);
    for (int i = 1; i <= 3; i++)
        batcher_abandon(batcher, &jobs[i].job);
    all_buffers_free(&base, 20);
}
END_TEST

// --- waiting for room

static _Atomic int rooms; // given so far
static int room_order[JOBS_MAX];

static void on_room(struct job *job)
{
    int index = (int)(CONTAINER_OF(job, struct test_job, job) - jobs);
    job->next_waiting = (struct job *)(uintptr_t)1; // it is ours again, and may be anything by now
    room_order[atomic_fetch_add(&rooms, 1)] = index;
}

static void wait_for_room(int index, uint32_t tokens)
{
    struct error err = {.text = ""};
    struct job *job = job_init(index, tokens);
    job->on_room = on_room;
    bool waits = false;
    ck_assert_msg(!batcher_reserve_or_wait(batcher, job, &waits, &err), "%s", err.text);
    ck_assert(waits);
    ck_assert_int_eq((int)atomic_load(&job->state), JOB_WAITING);
}

// All three buffers full: the first runs, the others wait to be launched.
static void fill_all_buffers(void)
{
    atomic_store(&rooms, 0);
    for (int i = 0; i < 3; i++)
        commit(i, 8);
    wait_submitted(1);
}

static void expect_rooms(const int *order, int n)
{
    ck_assert_int_eq(atomic_load(&rooms), n);
    for (int i = 0; i < n; i++) {
        ck_assert_int_eq(room_order[i], order[i]);
        ck_assert_int_eq((int)atomic_load(&jobs[order[i]].job.state), JOB_DECODING);
    }
}

static void finish_three(uint32_t from)
{
    for (uint32_t i = from; i < 3; i++) {
        wait_submitted(i + 1);
        fake_complete(&engine, i, STATUS_OK);
        wait_release((int)i, STATUS_OK);
    }
}

START_TEST(waiting_jobs_get_room_in_order_of_arrival)
{
    start(&base);
    fill_all_buffers();
    wait_for_room(10, 5);
    wait_for_room(11, 6); // does not fit beside the one before
    wait_for_room(12, 1); // would, but overtakes nobody
    ck_assert_uint_eq(stats().jobs, 6);
    ck_assert_uint_eq(stats().queued, 5);
    fake_complete(&engine, 0, STATUS_OK);
    wait_done(0, STATUS_OK);
    ck_assert_int_eq(atomic_load(&rooms), 0); // the buffer is being answered
    batcher_release(batcher, &jobs[0].job);
    expect_rooms((const int[]){10}, 1);
    wait_submitted(2);
    fake_complete(&engine, 1, STATUS_OK);
    wait_release(1, STATUS_OK);
    expect_rooms((const int[]){10, 11, 12}, 3); // 12 beside 11
    struct error err;
    ck_assert_ptr_eq(jobs[11].job.batch, jobs[12].job.batch);
    ck_assert_int_eq(reserve_fails(13, 8, &err), STATUS_RESOURCE_EXHAUSTED);
    finish_three(2);
    for (int i = 10; i <= 12; i++)
        batcher_abandon(batcher, &jobs[i].job);
    all_buffers_free(&base, 20);
}
END_TEST

START_TEST(nobody_overtakes_those_who_wait)
{
    start(&base);
    fill_all_buffers();
    wait_for_room(10, 8);
    wait_for_room(11, 8);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    expect_rooms((const int[]){10}, 1);
    batcher_abandon(batcher, &jobs[10].job); // its room goes to the next in line
    ck_assert_int_eq(atomic_load(&rooms), 2);
    ck_assert_int_eq(room_order[1], 11);
    finish_three(1);
    batcher_abandon(batcher, &jobs[11].job);
    all_buffers_free(&base, 20);
}
END_TEST

// --- who goes first

// Reserves or waits on behalf of a connection; true if it waits.
static bool ask(int index, uint32_t tokens, uint32_t connection, enum job_priority priority)
{
    struct error err = {.text = ""};
    bool waits;
    struct job *job = job_init(index, tokens);
    job->on_room = on_room;
    job->connection = connection;
    job->priority = priority;
    enum status status = batcher_reserve_or_wait(batcher, job, &waits, &err);
    ck_assert_msg(!status, "job %d: %s", index, err.text);
    return waits;
}

static void ask_and_commit(int index, uint32_t tokens, uint32_t connection)
{
    ck_assert(!ask(index, tokens, connection, JOB_PRIORITY_UNSET));
    batcher_commit(batcher, &jobs[index].job);
}

static void commit_given(int index)
{
    ck_assert_int_eq((int)atomic_load(&jobs[index].job.state), JOB_DECODING);
    batcher_commit(batcher, &jobs[index].job);
}

// Callers of whole batches, each on a connection of its own with one request at a time, and one of
// one token: it is in the very next batch, whatever waits.
START_TEST(few_tokens_go_ahead_of_a_flood)
{
    struct batcher_options options = base;
    options.batches = 4; // so many that one is kept
    atomic_store(&rooms, 0);
    start(&options);
    ask_and_commit(0, 8, 1); // runs
    wait_submitted(1);
    ask_and_commit(1, 8, 2); // next in line
    ask_and_commit(2, 8, 3);
    ck_assert(ask(3, 8, 4, JOB_PRIORITY_UNSET)); // one buffer is left, and not for this one
    ck_assert(ask(4, 8, 5, JOB_PRIORITY_UNSET));
    ask_and_commit(5, 1, 6); // but for this
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    ck_assert_uint_eq(wait_submitted(2)->tokens, 1);
    fake_complete(&engine, 1, STATUS_OK);
    wait_release(5, STATUS_OK);
    for (uint32_t i = 1; i <= 2; i++) { // the flood goes on in order of arrival
        ck_assert_ptr_eq(wait_submitted(2 + i)->output, jobs[i].job.operand.output);
        fake_complete(&engine, 1 + i, STATUS_OK);
        wait_release((int)i, STATUS_OK);
    }
    expect_rooms((const int[]){3, 4}, 2);
    for (uint32_t i = 3; i <= 4; i++) {
        commit_given((int)i);
        wait_submitted(2 + i);
        fake_complete(&engine, 1 + i, STATUS_OK);
        wait_release((int)i, STATUS_OK);
    }
    all_buffers_free(&options, 20);
}
END_TEST

// A caller who comes again lies behind those that have not been served yet, and so moves nobody.
START_TEST(few_tokens_go_ahead_of_who_has_waited_a_round)
{
    struct batcher_options options = base;
    options.batches = 6;
    start(&options);
    for (int i = 0; i < 3; i++)
        ask_and_commit(i, 8, 1 + (uint32_t)i);
    wait_submitted(1);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    wait_submitted(2);
    ask_and_commit(3, 8, 1); // again
    ask_and_commit(4, 1, 9);
    fake_complete(&engine, 1, STATUS_OK);
    wait_release(1, STATUS_OK);
    ck_assert_uint_eq(wait_submitted(3)->tokens, 1);
    fake_complete(&engine, 2, STATUS_OK);
    wait_release(4, STATUS_OK);
    for (uint32_t i = 2; i <= 3; i++) {
        ck_assert_ptr_eq(wait_submitted(2 + i)->output, jobs[i].job.operand.output);
        fake_complete(&engine, 1 + i, STATUS_OK);
        wait_release((int)i, STATUS_OK);
    }
    all_buffers_free(&options, 20);
}
END_TEST

static const struct engine_ops serial_ops = {
    .name = "fake, serial",
    .serial = true,
    .memory_alloc = fake_memory_alloc,
    .memory_free = fake_memory_free,
    .submit = fake_submit,
    .poll = fake_poll,
};

// Behind a short batch another is submitted at once; behind a long one none, so that few tokens can
// still go ahead.
START_TEST(nothing_lines_up_behind_a_long_batch_of_a_serial_engine)
{
    static const uint32_t large[] = {8, 256};
    struct batcher_options options = base;
    options.ops = &serial_ops;
    options.lanes = 2;
    options.batches = 6;
    options.batch_tokens_max = 256;
    options.buckets = large;
    options.buckets_n = ARRAY_LEN(large);
    options.batch_input_bytes *= 32;
    options.batch_output_bytes *= 32;
    start(&options);
    ask_and_commit(0, 8, 1);
    wait_submitted(1);
    ask_and_commit(1, 256, 2);
    wait_submitted(2);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    ask_and_commit(2, 256, 3);
    stays_submitted(2); // though a lane is free
    ask_and_commit(3, 1, 4);
    fake_complete(&engine, 1, STATUS_OK);
    wait_release(1, STATUS_OK);
    wait_submitted(4); // behind one token the next may line up
    ck_assert_uint_eq(engine.log[2]->tokens, 1);
    for (uint32_t i = 2; i < 4; i++)
        fake_complete(&engine, i, STATUS_OK);
    wait_release(2, STATUS_OK);
    wait_release(3, STATUS_OK);
    all_buffers_free(&options, 20);
}
END_TEST

// However many requests of one token a connection sends, one of eight waits for eight of them.
START_TEST(a_flood_of_few_tokens_does_not_hold_up_a_large_one)
{
    struct batcher_options options = base;
    options.batches = 1;
    options.batch_input_bytes *= 4; // and with it what may wait
    atomic_store(&rooms, 0);
    start(&options);
    ask_and_commit(0, 8, 9);
    wait_submitted(1);
    for (int i = 1; i <= 12; i++)
        ck_assert(ask(i, 1, 1, JOB_PRIORITY_UNSET));
    ck_assert(ask(13, 8, 2, JOB_PRIORITY_UNSET));
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    expect_rooms((const int[]){1, 2, 3, 4, 5, 6, 7, 8}, 8);
    for (int i = 1; i <= 8; i++)
        batcher_abandon(batcher, &jobs[i].job);
    ck_assert_int_eq(atomic_load(&rooms), 9);
    ck_assert_int_eq(room_order[8], 13);
    batcher_abandon(batcher, &jobs[13].job);
    ck_assert_int_eq(atomic_load(&rooms), 13);
    for (int i = 9; i <= 12; i++)
        batcher_abandon(batcher, &jobs[i].job);
    all_buffers_free(&options, 20);
}
END_TEST

// Tokens are counted wherever they wait, in batches and for room; one request may have any number.
START_TEST(a_queue_of_tokens_has_its_limit)
{
    struct batcher_options options = base;
    options.queue_tokens_max = 6;
    atomic_store(&rooms, 0);
    start(&options);
    commit(0, 8); // more than the limit, but nothing waits
    wait_submitted(1);
    ck_assert_uint_eq(stats().queued_tokens, 0);
    reserve(1, 4);
    reserve(2, 2);
    ck_assert_uint_eq(stats().queued_tokens, 6);
    struct error err;
    bool waits;
    struct job *job = job_init(3, 1);
    job->on_room = on_room;
    ck_assert_int_eq(batcher_reserve_or_wait(batcher, job, &waits, &err),
                     STATUS_RESOURCE_EXHAUSTED);
    ck_assert_str_eq(err.text, "the queue is full: at most 6 tokens wait (queue_tokens_max)");
    ck_assert_uint_ge(err.retry_after_ms, 1);
    ck_assert_uint_eq(stats().refused[FULL_TOKENS], 1);
    batcher_abandon(batcher, &jobs[2].job);
    reserve(3, 1);
    batcher_abandon(batcher, &jobs[1].job);
    batcher_abandon(batcher, &jobs[3].job);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    ck_assert_uint_eq(stats().jobs, 0);
}
END_TEST

// A connection that has filled the queue gives way to others, as many of its last as it takes.
START_TEST(a_full_queue_is_shared)
{
    struct batcher_options options = base;
    options.batches = 1;
    options.queue_requests_max = _i ? 100 : 5;
    options.batch_input_bytes = (_i ? 8 : 100) * (REDUCED_DIM + CACHE_LINE_BYTES);
    atomic_store(&rooms, 0);
    start(&options);
    ask_and_commit(0, 8, 9);
    wait_submitted(1);
    int n = _i ? 8 : 5; // one of a token is as large as a token of the limit
    for (int i = 1; i <= n; i++)
        ck_assert(ask(i, 1, 1, JOB_PRIORITY_UNSET));
    struct error err;
    bool waits;
    struct job *job = job_init(20, 1);
    job->on_room = on_room;
    job->connection = 1;
    ck_assert_int_eq(batcher_reserve_or_wait(batcher, job, &waits, &err),
                     STATUS_RESOURCE_EXHAUSTED);
    ck_assert(ask(21, 1, 2, JOB_PRIORITY_UNSET)); // another's first stands before their second
    wait_release(n, STATUS_RESOURCE_EXHAUSTED);
    ck_assert_uint_ge(jobs[n].job.error.retry_after_ms, 1);
    ck_assert(ask(22, 1, 3, JOB_PRIORITY_HIGH));
    wait_release(n - 1, STATUS_RESOURCE_EXHAUSTED);
    for (int i = 1; i < n - 1; i++)
        ck_assert_int_eq(atomic_load(&jobs[i].done), 0);
    ck_assert_uint_eq(stats().queued, (uint32_t)n);
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    expect_rooms((const int[]){22, 1, 21, 2, 3, 4, 5, 6}, n);
    for (int i = 1; i < n - 1; i++)
        batcher_abandon(batcher, &jobs[i].job);
    for (int i = 21; i <= 22; i++)
        batcher_abandon(batcher, &jobs[i].job);
    ck_assert_uint_eq(stats().jobs, 0);
    ck_assert_uint_eq(stats().queued, 0);
}
END_TEST

START_TEST(priorities_come_before_shares_and_shares_before_arrival)
{
    struct batcher_options options = base;
    options.batches = 1;
    options.batch_input_bytes *= 4; // and with it what may wait
    atomic_store(&rooms, 0);
    start(&options);
    ask_and_commit(0, 8, 9);
    wait_submitted(1);
    ck_assert(ask(1, 2, 1, JOB_PRIORITY_LOW));
    ck_assert(ask(2, 8, 2, JOB_PRIORITY_NORMAL));
    ck_assert(ask(3, 1, 2, JOB_PRIORITY_UNSET)); // behind its connection's other
    ck_assert(ask(4, 3, 3, JOB_PRIORITY_UNSET));
    ck_assert(ask(5, 8, 4, JOB_PRIORITY_HIGH));
    ck_assert(ask(6, 1, 5, JOB_PRIORITY_LOW));
    fake_complete(&engine, 0, STATUS_OK);
    wait_release(0, STATUS_OK);
    const int order[] = {5, 4, 2, 3, 6, 1};
    for (int i = 0; i < 6; i++) {
        ck_assert_int_gt(atomic_load(&rooms), i);
        ck_assert_int_eq(room_order[i], order[i]);
        batcher_abandon(batcher, &jobs[order[i]].job);
    }
    all_buffers_free(&options, 20);
}
END_TEST

START_TEST(the_queue_of_those_who_wait_has_limits)
{
    struct batcher_options options = base;
    options.queue_requests_max = 6;
    options.batch_input_bytes = 8 * REDUCED_DIM + CACHE_LINE_BYTES; // one request of 8 tokens
    start(&options);
    fill_all_buffers(); // two of these are not yet launched
    struct error err;
    struct job *job = job_init(14, 8);
    job->on_room = on_room;
    bool waits;
    for (int i = 10; i < 13; i++)
        wait_for_room(i, 8); // as many bytes as all buffers hold
    ck_assert_int_eq(batcher_reserve_or_wait(batcher, job, &waits, &err),
                     STATUS_RESOURCE_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(err.text, "bytes wait"));
    finish_three(0);
    for (int i = 10; i < 13; i++)
        batcher_abandon(batcher, &jobs[i].job);

    atomic_store(&rooms, 0);
    for (int i = 0; i < 3; i++)
        reserve(i, 8);
    for (int i = 10; i < 13; i++)
        wait_for_room(i, 1);
    ck_assert_int_eq(batcher_reserve_or_wait(batcher, job, &waits, &err),
                     STATUS_RESOURCE_EXHAUSTED);
    ck_assert_ptr_nonnull(strstr(err.text, "queue_requests_max"));
    ck_assert_uint_ge(err.retry_after_ms, 1);
    for (int i = 0; i < 3; i++)
        batcher_abandon(batcher, &jobs[i].job);
    for (int i = 10; i < 13; i++)
        batcher_abandon(batcher, &jobs[i].job);
    all_buffers_free(&options, 20);
}
END_TEST

START_TEST(those_who_wait_hear_of_a_lost_device)
{
    start(&base);
    fill_all_buffers();
    wait_for_room(10, 8);
    wait_for_room(11, 1);
    fake_complete(&engine, 0, STATUS_UNAVAILABLE);
    for (int i = 0; i < 3; i++)
        wait_release(i, STATUS_UNAVAILABLE);
    wait_release(10, STATUS_UNAVAILABLE);
    wait_release(11, STATUS_UNAVAILABLE);
    ck_assert_int_eq(atomic_load(&rooms), 0);
    ck_assert_uint_eq(stats().jobs, 0);
    ck_assert_uint_eq(stats().queued, 0);
    ck_assert_uint_eq(stats().failed, 5);
    struct error err;
    ck_assert_int_eq(reserve_fails(12, 1, &err), STATUS_UNAVAILABLE);
}
END_TEST

START_TEST(buffers_are_scarce_when_the_last_is_taken)
{
    start(&base);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 3; i++) {
            ck_assert(!batcher_scarce(batcher));
            reserve(i, 8);
        }
        ck_assert(batcher_scarce(batcher));
        batcher_abandon(batcher, &jobs[round].job);
        ck_assert(!batcher_scarce(batcher));
        for (int i = 0; i < 3; i++)
            if (i != round)
                batcher_abandon(batcher, &jobs[i].job);
    }
    all_buffers_free(&base, 10);
}
END_TEST

START_TEST(a_buffer_is_held_by_its_slowest_job)
{
    struct batcher_options options = base;
    options.batches = 1;
    start(&options);
    struct error err;
    for (int i = 0; i < 3; i++)
        reserve(i, 1);
    for (int i = 0; i < 3; i++)
        batcher_commit(batcher, &jobs[i].job);
    wait_submitted(1);
    fake_complete(&engine, 0, STATUS_OK);
    for (int i = 0; i < 3; i++)
        wait_done(i, STATUS_OK);
    static const int order[] = {2, 0, 1};
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(reserve_fails(5, 1, &err), STATUS_RESOURCE_EXHAUSTED);
        batcher_release(batcher, &jobs[order[i]].job);
    }
    all_buffers_free(&options, 10);
}
END_TEST

START_TEST(what_fits_no_batch_is_invalid)
{
    struct batcher_options options = base;
    options.batch_input_bytes = 7 * (REDUCED_DIM + 64);
    options.batch_output_bytes = 6 * OUTPUT_BYTES;
    start(&options);
    struct error err;
    ck_assert_int_eq(reserve_fails(0, 9, &err), STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.text, "tokens: a batch holds at most 8, got 9");
    ck_assert_int_eq(reserve_fails(0, 7, &err), STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.text,
                     "tokens: a batch holds at most 384 bytes of output, this request needs 448");
    struct job *job = job_init(0, 6);
    job->operand.groups = 2;
    ck_assert_int_eq(batcher_reserve(batcher, job, &err), STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, "activations");
    ck_assert_str_eq(err.text, "activations: a batch holds at most 1344 bytes of activations and "
                               "scales, got 1600");
    ck_assert_uint_eq(stats().jobs, 0);
}
END_TEST

START_TEST(create_fails_without_leaking)
{
    engine.allocation_fails_at = _i;
    struct error err = {.text = ""};
    ck_assert_int_eq(batcher_create(&base, &engine.waker, &batcher, &err),
                     STATUS_RESOURCE_EXHAUSTED);
    ck_assert_str_eq(err.text, "no memory");
    ck_assert_ptr_null(batcher);
}
END_TEST

START_TEST(destroy_aborts_on_a_live_job)
{
    start(&base);
    reserve(0, 1);
    batcher_destroy(batcher);
}
END_TEST

// One job at a time, so that no second wake makes up for a lost one, at delays that sweep over the
// moment in which the scheduler falls asleep. Launched by the scheduler's thread, by this one's turn,
// or by either.
START_TEST(no_wake_is_lost)
{
    enum { ROUNDS = 20000, DELAY_NS_MAX = 8000 };
    start(&base);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        uint64_t until = now_ns() + round * 7 % DELAY_NS_MAX;
        while (now_ns() < until)
            ;
        if (_i == 1 || (_i == 2 && round % 3))
            commit_by_turn(0, 1);
        else
            commit(0, 1);
        uint64_t give_up_ns = now_ns() + PATIENCE_MS * 1000000ull;
        while (submitted() != round + 1 && now_ns() < give_up_ns)
            sched_yield();
        ck_assert_msg(submitted() == round + 1, "round %u: not launched", round);
        fake_complete(&engine, round % JOBS_MAX, STATUS_OK);
        while (!atomic_load(&jobs[0].done) && now_ns() < give_up_ns)
            sched_yield();
        ck_assert_msg(atomic_load(&jobs[0].done) == 1, "round %u: not answered", round);
        batcher_release(batcher, &jobs[0].job);
    }
}
END_TEST

// --- stress
//
// Each job writes its number over its input; the engine's thread checks that all of it arrived, and
// writes the number over the output, where the job's thread finds it again. Memory given out twice,
// a job answered twice or never, or a batch launched with a job that is still being filled would
// show.

enum { STRESS_THREADS = 3, STRESS_JOBS = 6000, STRESS_BURST = 24 };

struct stress {
    _Atomic bool stop;
    _Atomic uint64_t launched; // jobs seen by the engine
    _Atomic uint64_t answered, dropped, failed, abandoned, refused, waited, gave_way;
    _Atomic uint32_t faults; // invariants found broken
    uint64_t seed;
};
static struct stress stress;

struct stress_job {
    struct job job;
    uint8_t own_input[6 * REDUCED_DIM], own_scales[6], own_output[6 * OUTPUT_BYTES];
    uint8_t number;
    _Atomic int done, room;
};

static void fault_unless(bool condition, const char *what)
{
    if (condition)
        return;
    if (atomic_fetch_add(&stress.faults, 1) < 10)
        fprintf(stderr, "stress: %s\n", what);
}

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static bool all_bytes_are(const void *bytes, uint8_t value, size_t n)
{
    const uint8_t *at = bytes;
    for (size_t i = 0; i < n; i++)
        if (at[i] != value)
            return false;
    return true;
}

// Writes over all that is staged, or looks whether others have.
static void stress_stage(const struct engine_batch *batch, bool write)
{
    for (uint32_t s = 0; s < batch->segments_n; s++) {
        const struct engine_segment *segment = &batch->segments[s];
        uint8_t *in = (uint8_t *)(uintptr_t)segment->staged_input, *out = segment->staged_output;
        uint64_t in_bytes = in ? align_up(segment->operand.tokens * REDUCED_DIM, 64) + 64 : 0;
        uint64_t out_bytes = out ? align_up(segment->operand.tokens * OUTPUT_BYTES, 64) : 0;
        uint8_t number = *(const uint8_t *)segment->operand.activations;
        fault_unless((uintptr_t)in % 64 == 0 && (uintptr_t)out % 64 == 0, "staged anywhere");
        if (write && in)
            memset(in, number, in_bytes);
        if (write && out)
            memset(out, number, out_bytes);
        fault_unless(all_bytes_are(in, number, in_bytes) && all_bytes_are(out, number, out_bytes),
                     "another job's room for what is staged");
    }
}

static void stress_compute(const struct engine_batch *batch)
{
    stress_stage(batch, true);
    uint32_t tokens = 0, changes = 0;
    for (uint32_t s = 0; s < batch->segments_n; s++) {
        const struct engine_segment *segment = &batch->segments[s];
        const struct einsum_operand *operand = &segment->operand;
        const uint8_t number = *(const uint8_t *)operand->activations;
        fault_unless(all_bytes_are(operand->activations, number, operand->tokens * REDUCED_DIM),
                     "activations of another job");
        fault_unless(all_bytes_are(operand->scales, number, operand->tokens),
                     "scales of another job");
        memset(operand->output, number, operand->tokens * OUTPUT_BYTES);
        tokens += operand->tokens;
        changes += s > 0 && segment->weight != segment[-1].weight;
    }
    stress_stage(batch, false);
    fault_unless(tokens == batch->tokens, "tokens miscounted");
    fault_unless(buckets[batch->bucket] >= tokens, "bucket too small");
    fault_unless(batch->bucket == 0 || buckets[batch->bucket - 1] < tokens, "bucket too large");
    fault_unless(changes < WEIGHTS, "weights not side by side");
    atomic_fetch_add(&stress.launched, batch->segments_n);
}

// Completes a lane now and then, in random order, one in sixteen with an error.
static void *stress_engine(void *argument)
{
    (void)argument;
    uint64_t random = stress.seed;
    while (!atomic_load(&stress.stop)) {
        const struct engine_batch *batch = NULL;
        uint32_t lane = (uint32_t)(random_next(&random) % LANES_MAX);
        pthread_mutex_lock(&engine.lock);
        if (engine.lanes[lane].batch && !engine.lanes[lane].done)
            batch = engine.lanes[lane].batch;
        pthread_mutex_unlock(&engine.lock);
        if (!batch) {
            sched_yield();
            continue;
        }
        stress_compute(batch);
        pthread_mutex_lock(&engine.lock);
        engine.lanes[lane].status = random_next(&random) % 16 ? STATUS_OK : STATUS_INTERNAL;
        engine.lanes[lane].done = true;
        pthread_mutex_unlock(&engine.lock);
        batcher_wake(&engine.waker);
    }
    return NULL;
}

static void stress_on_done(struct job *job)
{
    atomic_fetch_add(&((struct stress_job *)job)->done, 1);
}

static void stress_on_room(struct job *job)
{
    atomic_fetch_add(&((struct stress_job *)job)->room, 1);
}

// Who holds other jobs must not wait for room that only their release may make.
static bool stress_reserve(struct stress_job *it, bool may_wait, uint64_t *random)
{
    struct error err;
    uint64_t dice = random_next(random);
    atomic_store(&it->done, 0);
    atomic_store(&it->room, 0);
    it->number = (uint8_t)(dice >> 8);
    it->job = (struct job){
        .weight = &weights[dice % WEIGHTS],
        .operand = {.tokens = 1 + (uint32_t)(dice >> 16) % 5,
                    .groups = 1,
                    .activation_layout = EINSUM_ACTIVATIONS_TGR,
                    .scale_layout = EINSUM_SCALES_TGK,
                    .scale_type = EINSUM_SCALE_UE8M0,
                    .output_type = EINSUM_OUTPUT_BF16},
        .deadline_ns = (dice >> 24) % 8 ? UINT64_MAX : now_ns() + (dice >> 32) % 200000,
        .on_done = stress_on_done,
        .connection = (uint32_t)(dice >> 36) % 5,
        .priority = (enum job_priority)((dice >> 44) % 4),
        .on_room = stress_on_room,
        .input_given = (dice >> 40) % 4 == 0,
        .output_given = (dice >> 42) % 4 == 0,
        .staged = (dice >> 46) % 2 == 0,
        .quiet = (dice >> 44) % 2 == 0,
    };
    if (it->job.input_given) {
        it->job.operand.activations = it->own_input;
        it->job.operand.scales = it->own_scales;
    }
    if (it->job.output_given)
        it->job.operand.output = it->own_output;
    bool waits = false;
    enum status status = may_wait ? batcher_reserve_or_wait(batcher, &it->job, &waits, &err)
                                  : batcher_reserve(batcher, &it->job, &err);
    if (waits)
        atomic_fetch_add(&stress.waited, 1);
    while (waits && !atomic_load(&it->room) && !atomic_load(&it->done))
        sched_yield();
    if (atomic_load(&it->done)) { // it had to give way
        fault_unless(it->job.error.status == STATUS_RESOURCE_EXHAUSTED, "gave way to nothing");
        batcher_release(batcher, &it->job);
        atomic_fetch_add(&stress.gave_way, 1);
        return false;
    }
    if (!status) {
        fault_unless(atomic_load(&it->job.state) == JOB_DECODING, "room without the right to it");
        return true;
    }
    fault_unless(status == STATUS_RESOURCE_EXHAUSTED, "refused for another reason");
    fault_unless(err.retry_after_ms >= 1, "refused without advice");
    atomic_fetch_add(&stress.refused, 1);
    return false;
}

// True if the job was committed.
static bool stress_fill(struct stress_job *it, uint64_t *random)
{
    struct einsum_operand *operand = &it->job.operand;
    memset((void *)(uintptr_t)operand->activations, it->number, operand->tokens * REDUCED_DIM);
    if (random_next(random) % 8 == 0)
        sched_yield();
    memset((void *)(uintptr_t)operand->scales, it->number, operand->tokens);
    uint64_t dice = random_next(random);
    if (dice % 16 == 0) {
        batcher_abandon(batcher, &it->job);
        batcher_turn(batcher);
        atomic_fetch_add(&stress.abandoned, 1);
        return false;
    }
    if (dice % 16 == 1)
        atomic_store(&it->job.cancelled, true);
    bool turn = it->job.quiet;
    batcher_commit(batcher, &it->job);
    if (turn)
        batcher_turn(batcher);
    return true;
}

static void stress_finish(struct stress_job *it)
{
    while (!atomic_load(&it->done))
        sched_yield();
    enum status status = it->job.error.status;
    if (status == STATUS_OK) {
        fault_unless(all_bytes_are(it->job.operand.output, it->number,
                                   it->job.operand.tokens * OUTPUT_BYTES),
                     "output of another job");
        fault_unless(it->job.batch_requests >= 1, "no batch");
        atomic_fetch_add(&stress.answered, 1);
    } else if (status == STATUS_INTERNAL) {
        atomic_fetch_add(&stress.failed, 1);
    } else {
        fault_unless(status == STATUS_CANCELLED || status == STATUS_DEADLINE_EXCEEDED,
                     "dropped for another reason");
        atomic_fetch_add(&stress.dropped, 1);
    }
    batcher_release(batcher, &it->job);
    fault_unless(atomic_load(&it->done) == 1, "answered twice");
}

static void *stress_client(void *argument)
{
    uint64_t random = stress.seed * 2654435761u + (uintptr_t)argument + 1;
    struct stress_job burst[STRESS_BURST];
    int order[STRESS_BURST];
    for (int left = STRESS_JOBS; left > 0;) {
        int n = 0, wanted = 1 + (int)(random_next(&random) % STRESS_BURST);
        while (n < wanted && left > 0 && stress_reserve(&burst[n], n == 0, &random)) {
            left--;
            n += stress_fill(&burst[n], &random);
        }
        if (n == 0)
            sched_yield();
        for (int i = 0; i < n; i++)
            order[i] = i;
        for (; n > 0; n--) { // in random order
            uint64_t pick = random_next(&random) % (uint64_t)n;
            stress_finish(&burst[order[pick]]);
            order[pick] = order[n - 1];
        }
    }
    return NULL;
}

static uint64_t stress_seed(void)
{
    const char *given = getenv("EINSUMD_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 0) : now_ns() | 1;
    printf("stress: EINSUMD_TEST_SEED=%llu\n", (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

START_TEST(stress_loses_no_job)
{
    struct batcher_options options = base;
    bool crowded = _i == 3; // so that some have to give way
    options.lanes = crowded ? 1 : _i == 0 ? LANES_MAX : 1 + (uint32_t)_i % LANES_MAX;
    options.queue_requests_max = crowded ? 1 : 20;
    options.batches = crowded ? 1 : options.lanes + 2;
    options.max_queue_delay_us = _i == 1 ? 50 : 0;
    start(&options);
    memset(&stress, 0, sizeof stress);
    stress.seed = stress_seed();

    pthread_t engine_thread, clients[STRESS_THREADS];
    ck_assert_int_eq(pthread_create(&engine_thread, NULL, stress_engine, NULL), 0);
    for (uintptr_t i = 0; i < STRESS_THREADS; i++)
        ck_assert_int_eq(pthread_create(&clients[i], NULL, stress_client, (void *)i), 0);
    for (int i = 0; i < STRESS_THREADS; i++)
        pthread_join(clients[i], NULL);
    atomic_store(&stress.stop, true);
    pthread_join(engine_thread, NULL);

    ck_assert_uint_eq(atomic_load(&stress.faults), 0);
    uint64_t answered = atomic_load(&stress.answered), dropped = atomic_load(&stress.dropped);
    uint64_t failed = atomic_load(&stress.failed), abandoned = atomic_load(&stress.abandoned);
    ck_assert_uint_eq(answered + dropped + failed + abandoned, STRESS_THREADS * STRESS_JOBS);
    ck_assert_uint_eq(atomic_load(&stress.launched), answered + failed);
    struct batcher_stats end = stats();
    ck_assert_uint_eq(end.requests, answered + failed);
    ck_assert_uint_eq(end.failed, failed);
    ck_assert_uint_eq(end.expired + end.cancelled, dropped);
    // A stress that never met these would show little.
    ck_assert_uint_gt(answered, 0);
    ck_assert_uint_gt(dropped, 0);
    ck_assert_uint_gt(failed, 0);
    ck_assert_uint_gt(abandoned, 0);
    ck_assert(crowded || end.batches < end.requests);
    ck_assert(!crowded || atomic_load(&stress.gave_way) > 0);
    ck_assert_uint_eq(end.jobs, 0);
    ck_assert_uint_eq(end.queued, 0);
    if (!crowded) // else the queue does not take one for each buffer
        all_buffers_free(&options, 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("batch");
    SRunner *runner = srunner_create(suite);

    TCase *rules = tcase_create("rules");
    tcase_set_timeout(rules, 60);
    tcase_add_checked_fixture(rules, setup, teardown);
    tcase_add_test(rules, one_job_from_end_to_end);
    tcase_add_loop_test(rules, attention_gets_rotations_behind_its_rows, 0, 3);
    tcase_add_test(rules, attention_too_large_for_a_batch_is_invalid);
    tcase_add_test(rules, jobs_gather_while_the_lane_is_busy);
    tcase_add_loop_test(rules, closes_when_full, 0, ARRAY_LEN(fulls));
    tcase_add_test(rules, launches_in_order_of_opening);
    tcase_add_test(rules, a_ready_batch_does_not_wait_for_one_that_is_being_filled);
    tcase_add_loop_test(rules, a_closed_batch_waits_for_the_last_that_fills, 0, 2);
    tcase_add_test(rules, lanes_complete_in_any_order);
    tcase_add_test(rules, a_delay_gathers_and_ends);
    tcase_add_loop_test(rules, a_polled_engine_is_looked_at_without_a_wake, 0,
                        ARRAY_LEN(pauses_us));
    tcase_add_loop_test(rules, a_polled_engine_takes_new_batches_while_it_runs_others, 0,
                        ARRAY_LEN(pauses_us));
    tcase_add_test(rules, watching_cuts_no_delay_short);
    tcase_add_test(rules, a_commit_launches_and_answers_by_itself);
    tcase_add_test(rules, what_a_commit_launched_is_answered_when_it_ends);
    tcase_add_test(rules, a_delay_ends_without_another_commit);
    tcase_add_test(rules, a_commit_while_another_has_the_turn_is_not_lost);
    tcase_add_test(rules, batches_are_counted_by_bucket_and_phase);
    tcase_add_loop_test(rules, a_full_batch_does_not_wait_for_the_delay, 0, 2);
    tcase_add_test(rules, equal_weights_stand_side_by_side);
    tcase_add_test(rules, late_and_cancelled_jobs_are_dropped_before_launch);
    tcase_add_test(rules, a_batch_of_dropped_jobs_is_not_launched);
    tcase_add_test(rules, abandoned_room_comes_back_if_it_was_the_last);
    tcase_add_test(rules, given_memory_is_used_where_it_is);
    tcase_add_test(rules, staged_memory_has_room_from_the_other_end);
    tcase_add_test(rules, a_turn_does_the_schedulers_work);
    tcase_add_test(rules, an_open_batch_abandoned_whole_starts_afresh);
    tcase_add_test(rules, an_engines_error_reaches_every_job_of_the_batch);
    tcase_add_loop_test(rules, a_lost_device_answers_everything, 0, 2);
    tcase_add_test(rules, a_full_queue_refuses_and_advises);
    tcase_add_test(rules, no_free_buffer_refuses_until_one_is_released);
    tcase_add_test(rules, waiting_jobs_get_room_in_order_of_arrival);
    tcase_add_test(rules, nobody_overtakes_those_who_wait);
    tcase_add_test(rules, few_tokens_go_ahead_of_a_flood);
    tcase_add_test(rules, few_tokens_go_ahead_of_who_has_waited_a_round);
    tcase_add_test(rules, nothing_lines_up_behind_a_long_batch_of_a_serial_engine);
    tcase_add_test(rules, a_flood_of_few_tokens_does_not_hold_up_a_large_one);
    tcase_add_loop_test(rules, a_full_queue_is_shared, 0, 2);
    tcase_add_test(rules, a_queue_of_tokens_has_its_limit);
    tcase_add_test(rules, priorities_come_before_shares_and_shares_before_arrival);
    tcase_add_test(rules, the_queue_of_those_who_wait_has_limits);
    tcase_add_test(rules, those_who_wait_hear_of_a_lost_device);
    tcase_add_test(rules, buffers_are_scarce_when_the_last_is_taken);
    tcase_add_test(rules, a_buffer_is_held_by_its_slowest_job);
    tcase_add_test(rules, what_fits_no_batch_is_invalid);
    tcase_add_loop_test(rules, create_fails_without_leaking, 1, 7);
    tcase_add_loop_test(rules, no_wake_is_lost, 0, 3);
    if (srunner_fork_status(runner) == CK_FORK) // an abort ends the process
        tcase_add_test_raise_signal(rules, destroy_aborts_on_a_live_job, SIGABRT);
    suite_add_tcase(suite, rules);

    TCase *stressed = tcase_create("stress");
    tcase_set_timeout(stressed, 240);
    tcase_add_checked_fixture(stressed, setup, teardown);
    tcase_add_loop_test(stressed, stress_loses_no_job, 0, 4);
    suite_add_tcase(suite, stressed);

    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
