// Goal: whatever callers, engine, time and the order of threads do, the batcher keeps its promises,
// those of model.h and the rows that it answers.
// Method: a simulated world (simulated.h), from a seed: callers on several threads reserve, wait, fill,
// commit, abandon, cancel, are late, answer slowly, and send requests that must be cut; an engine
// ends batches in any order, sometimes with an error, once in a while for good; time passes as chance
// has it. At the end of each run, callers come to an end, and all must be back.
//
//     test_batcher_machine [--seeds N] [--steps N] [--seed S]
//
// N runs of so many steps, from seed 1 on; --seed runs one again. A failure tells its seed and step.
// What it would find if it were there: mutants.py.
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/attention.h"
#include "machine.h"
#include "simulated.h"

enum {
    IDLE_TURNS_MAX = 200000,
    SECONDS_MAX = 60, // of a run, which takes milliseconds
};

struct run run;
struct totals totals;
struct weight weights[WEIGHTS];
struct batcher *batcher;
struct batcher_waker waker;

// The process ends there, and has one thread: what it says may at worst be lost.
// NOLINTBEGIN(bugprone-signal-handler,cert-sig30-c)
static void tell_where(void)
{
    fprintf(stderr, "batcher machine: seed %" PRIu64 ", step %" PRIu64 ", fiber %d\n", run.seed,
            run.step, sim_current());
}

void model_failed(const char *condition, const char *file, int line, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, " (%s)\n", condition);
    abort();
}

static void on_signal(int number)
{
    fprintf(stderr, "%s\n", number == SIGALRM ? "no progress" : strsignal(number));
    tell_where();
    _exit(1);
}
// NOLINTEND(bugprone-signal-handler,cert-sig30-c)

// ---- a run

static uint32_t one_of(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t which = sim_below(3);
    return which == 0 ? a : which == 1 ? b : c;
}

static void choose_options(void)
{
    bool serial = sim_chance(8); // batches so long that a serial engine gets no second one
    uint32_t most = serial ? 320 : 4u << sim_below(3);
    uint32_t buckets_n = 0;
    for (uint32_t bucket = serial ? 40 : 1; bucket < most; bucket *= 2)
        run.buckets[buckets_n++] = bucket;
    run.buckets[buckets_n++] = most;
    uint32_t lanes = 1 + sim_below(3);
    // Of a token: attention needs most.
    uint64_t input = 512 * 2 + sizeof(struct attention_rotation) + 64;
    uint64_t output = (uint64_t)GROUPS * OUTPUT_DIM * 4 + 64;
    uint32_t roomy = one_of(1, 2, 4);
    run.options = (struct batcher_options){
        .ops = &run.ops,
        .engine = &engine,
        .lanes = lanes,
        .batches = lanes + sim_below(6),
        .batch_input_bytes = align_up(input * most / roomy + input, 64),
        .batch_output_bytes = align_up(output * most / roomy + output, 64),
        .batch_tokens_max = most,
        .batch_requests_max = 2 + sim_below(7),
        .queue_requests_max = one_of(4, 12, 40),
        .max_queue_delay_us = sim_chance(25) ? 1 + sim_below(20) : 0,
        .buckets = run.buckets,
        .buckets_n = buckets_n,
    };
    run.ops = machine_engine;
    run.ops.polled = sim_chance(20);
    run.ops.serial = serial || sim_chance(20);
    run.ops.stages = sim_chance(30);
}

static void choose_habits(void)
{
    run.arrivals = one_of(1, 4, 20);
    run.engine_speed = one_of(5, 15, 40);
    run.cancels = one_of(0, 1, 4);
    run.slow_fills = one_of(0, 50, 90);
    run.abandons = one_of(0, 5, 20);
    run.deadlines = one_of(0, 10, 40);
    run.large = one_of(0, 5, 15);
    run.given = one_of(0, 20, 50);
    run.high = one_of(5, 20, 50);
    run.priorities = sim_chance(60);
    run.quick_engine = one_of(0, 20, 100);
    run.failures = one_of(0, 0, 10);
    run.device_fails = sim_chance(12);
    run.connections = 2 + sim_below(MODEL_CONNECTIONS - 2);
}

static void start(uint64_t seed)
{
    memset(&run, 0, sizeof run);
    memset(&engine, 0, sizeof engine);
    memset(&waker, 0, sizeof waker);
    run.seed = seed;
    sim_begin(seed, (uint32_t[]){0, 4, 16, 64}[seed % 4]);
    choose_options();
    choose_habits();
    for (uint32_t i = 0; i < WEIGHTS; i++) {
        bool attention = i == WEIGHTS - 1;
        weights[i] = (struct weight){
            .format =
                {
                    .groups = attention ? 1 : GROUPS,
                    .output_dim = OUTPUT_DIM,
                    .reduced_dim = attention ? ATTENTION_HEAD_DIM : REDUCED_DIM,
                    .weight_type = EINSUM_WEIGHT_E4M3,
                    .scale_type = EINSUM_SCALE_UE8M0,
                    .block_d = 32,
                    .block_r = BLOCK,
                },
            .engine_weight = (struct engine_weight *)(void *)&weights[i],
        };
    }
    struct error err;
    enum status status = batcher_create(&run.options, &waker, &batcher, &err);
    ASSERT(status == STATUS_OK);
    run.scheduler = 0; // the first that was made
    model_begin(batcher, run.scheduler);
    for (int i = 0; i < CALLERS; i++)
        run.callers[i] = sim_spawn(caller_run, (void *)(intptr_t)i);
}

static void resume(int fiber)
{
    if (sim_may_run(fiber))
        sim_resume(fiber);
}

static void step(void)
{
    uint32_t chance = sim_below(100);
    if (chance < run.engine_speed)
        engine_step();
    else if (chance < 80)
        resume(run.callers[sim_below(CALLERS)]);
    else if (chance < 93)
        resume(run.scheduler);
    else if (chance < 94 && sim_sleeps(run.scheduler))
        sim_resume(run.scheduler); // woken by nothing
    else
        sim_pass(sim_chance(20) ? sim_below(100000) : sim_below(10000));
}

// Everybody comes to an end, if it is not that somebody waits for what never comes.
static void drain(void)
{
    run.draining = true;
    uint32_t idle = 0;
    for (uint32_t turns = 0;; turns++) {
        MUST(turns < IDLE_TURNS_MAX, "callers do not come to an end");
        run.progress = false;
        bool left = false;
        for (int i = 0; i < CALLERS; i++) {
            resume(run.callers[i]);
            left = left || !sim_ended(run.callers[i]);
        }
        if (!left)
            return;
        if (sim_may_run(run.scheduler)) {
            sim_resume(run.scheduler);
            run.progress = true;
        }
        if (sim_below(4) == 0)
            engine_step();
        sim_pass(sim_below(500));
        idle = run.progress ? 0 : idle + 1;
        if (idle < 50 * SLOTS || engine_step())
            continue;
        MUST(sim_sleeps(run.scheduler) && sim_sleeps_until(run.scheduler) != UINT64_MAX,
             "%u jobs are left, and nobody will wake", model_jobs());
        sim_go_to(sim_sleeps_until(run.scheduler));
        idle = 0;
    }
}

static void run_seed(uint64_t seed, uint64_t steps)
{
    start(seed);
    for (run.step = 0; run.step < steps; run.step++)
        step();
    drain();
    // What was on its way without anybody waiting for it: a turn that a caller set out to take.
    for (int i = 0; i < 100; i++) {
        engine_step();
        resume(run.scheduler);
    }
    model_idle();
    batcher_destroy(batcher);
    model_end();
    MUST(engine.allocated == 0, "%u buffers are not given back", engine.allocated);
    totals.steps += run.step;
}

static uint64_t number(const char *text)
{
    char *end;
    uint64_t value = text ? strtoull(text, &end, 10) : 0;
    if (!text || *end || end == text) {
        fprintf(stderr, "usage: test_batcher_machine [--seeds N] [--steps N] [--seed S]\n");
        exit(2);
    }
    return value;
}

int main(int argc, char **argv)
{
    uint64_t seeds = 1000, steps = 1000, first = 1;
    for (int i = 1; i < argc; i += 2) {
        uint64_t value = number(i + 1 < argc ? argv[i + 1] : NULL);
        if (strcmp(argv[i], "--seeds") == 0)
            seeds = value;
        else if (strcmp(argv[i], "--steps") == 0)
            steps = value;
        else if (strcmp(argv[i], "--seed") == 0)
            first = value, seeds = 1;
        else
            number(NULL);
    }
    signal(SIGABRT, on_signal);
    signal(SIGALRM, on_signal);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) // they tell more
    signal(SIGSEGV, on_signal);
    signal(SIGBUS, on_signal);
#endif
    for (uint64_t seed = first; seed < first + seeds; seed++) {
        alarm(SECONDS_MAX);
        run_seed(seed, steps);
    }
    printf("%" PRIu64 " seeds, %" PRIu64 " steps, %" PRIu64 " requests (%" PRIu64 " cut, %" PRIu64
           " waited), %" PRIu64 " batches, %" PRIu64 " dropped, %" PRIu64 " refused, %" PRIu64
           " failed: every invariant held\n",
           seeds, totals.steps, totals.requests, totals.cut, totals.waited, totals.batches,
           totals.dropped, totals.refused, totals.failed);
    return 0;
}
