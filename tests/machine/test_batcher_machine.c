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
#include "model.h"
#include "server/cut.h"
#include "simulated.h"

enum {
    CALLERS = 3, // threads
    SLOTS = 10,  // requests of each
    WEIGHTS = 4, // the last one of attention
    GROUPS = 2,
    OUTPUT_DIM = 32,
    REDUCED_DIM = 128,
    BLOCK = 32, // so 4 scales to a row: one word of UE8M0
    IDLE_TURNS_MAX = 200000,
    SECONDS_MAX = 60, // of a run, which takes milliseconds
};

// ---- a run

static struct {
    uint64_t seed, step;
    struct batcher_options options;
    struct engine_ops ops;
    uint32_t buckets[8];
    // Per cent.
    uint32_t arrivals, cancels, slow_fills, abandons, deadlines, large, given, high, engine_speed,
        quick_engine, failures;
    bool device_fails, priorities;
    uint32_t connections;
    bool draining;
    bool progress;
    int scheduler, callers[CALLERS];
    uint64_t ended[STATUS_UNAUTHENTICATED + 1];
} run;

static struct {
    uint64_t steps, requests, cut, batches, dropped, refused, failed, waited;
} totals;

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

// ---- what is asked for, and the answer

static struct weight weights[WEIGHTS];
static struct batcher *batcher;
static struct batcher_waker waker;
static struct copy_counters copies;

static uint64_t mix(uint64_t sum, uint64_t value)
{
    sum = (sum ^ value) * 0x9e3779b97f4a7c15;
    return sum ^ sum >> 29;
}

static uint64_t mix_bytes(uint64_t sum, const uint8_t *bytes, uint64_t n)
{
    for (uint64_t word; n >= sizeof word; bytes += sizeof word, n -= sizeof word) {
        memcpy(&word, bytes, sizeof word);
        sum = mix(sum, word);
    }
    for (; n > 0; n--)
        sum = mix(sum, *bytes++);
    return sum;
}

// Of one token's row, from what the operand says that it is.
static uint64_t row_sum(const struct weight *weight, const struct einsum_operand *operand,
                        bool attention, uint32_t t, uint32_t g)
{
    const uint8_t *activations = operand->activations;
    uint64_t sum = (uint64_t)(weight - weights), dim = weight->format.reduced_dim;
    if (attention) {
        sum = mix_bytes(sum, activations + (t * operand->groups + g) * dim * 2, dim * 2);
        return mix_bytes(sum, (const uint8_t *)&operand->rotations[t], sizeof *operand->rotations);
    }
    sum = mix_bytes(sum,
                    activations + einsum_activation_offset(operand->activation_layout,
                                                           operand->tokens, operand->groups, dim, t,
                                                           g),
                    dim);
    struct einsum_scale_strides strides = einsum_scale_strides(&weight->format, operand);
    for (uint32_t k = 0; k < dim / weight->format.block_r; k++)
        sum = mix_bytes(sum,
                        (const uint8_t *)operand->scales + t * strides.token + g * strides.group +
                            k / 4 * strides.word + k % 4 * strides.byte,
                        einsum_scale_element_bytes(operand->scale_type));
    return sum;
}

static void compute(const struct weight *weight, const struct einsum_operand *operand,
                    bool attention, uint8_t *output)
{
    uint64_t row_bytes = einsum_output_bytes(operand->output_type, 1, 1, OUTPUT_DIM);
    for (uint32_t t = 0; t < operand->tokens; t++)
        for (uint32_t g = 0; g < operand->groups; g++, output += row_bytes) {
            uint64_t sum = row_sum(weight, operand, attention, t, g);
            for (uint64_t at = 0; at < row_bytes; at += sizeof sum, sum = mix(sum, at))
                memcpy(output + at, &sum, sizeof sum);
        }
}

// ---- the engine

struct engine {
    const struct engine_batch *lanes[MODEL_LANES_MAX];
    bool done[MODEL_LANES_MAX];
    enum status status[MODEL_LANES_MAX];
    uint64_t started_ns[MODEL_LANES_MAX];
    uint32_t allocated;
    bool lost;
};
static struct engine engine;

static enum status fake_memory_alloc(struct engine *of, uint64_t bytes, void **memory,
                                     struct error *err)
{
    (void)err;
    *memory = aligned_alloc(CACHE_LINE_BYTES, align_up(bytes, CACHE_LINE_BYTES));
    ASSERT(*memory);
    memset(*memory, 0x5a, bytes);
    of->allocated++;
    return STATUS_OK;
}

static void fake_memory_free(struct engine *of, void *memory, uint64_t bytes)
{
    (void)bytes;
    of->allocated--;
    free(memory);
}

static const struct weight *weight_of(const struct engine_segment *segment)
{
    return (const struct weight *)(const void *)segment->weight;
}

// What lies in callers' memory goes by way of the room that the segment has for it.
static void compute_staged(const struct engine_segment *segment)
{
    const struct weight *weight = weight_of(segment);
    struct einsum_operand operand = segment->operand;
    bool attention = operand.activation_layout == EINSUM_ACTIVATIONS_IN_PLACE;
    uint64_t bytes = (attention ? 2 : 1) * einsum_activation_bytes(operand.tokens, operand.groups,
                                                                   weight->format.reduced_dim);
    if (segment->staged_input) {
        uint8_t *room = (uint8_t *)(uintptr_t)segment->staged_input;
        memcpy(room, operand.activations, bytes);
        if (!attention) {
            uint8_t *second = room + align_up(bytes, CACHE_LINE_BYTES);
            memcpy(second, operand.scales,
                   einsum_scale_bytes(operand.scale_layout, operand.scale_type, operand.tokens,
                                      operand.groups,
                                      weight->format.reduced_dim / weight->format.block_r));
            operand.scales = second;
        }
        operand.activations = room;
    }
    void *output = segment->staged_output ? segment->staged_output : operand.output;
    compute(weight, &operand, attention, output);
    if (segment->staged_output)
        memcpy(
            segment->operand.output, output,
            einsum_output_bytes(operand.output_type, operand.tokens, operand.groups, OUTPUT_DIM));
}

static void engine_finish(uint32_t lane, enum status status)
{
    const struct engine_batch *batch = engine.lanes[lane];
    for (uint32_t i = 0; i < batch->segments_n && status == STATUS_OK; i++)
        compute_staged(&batch->segments[i]);
    engine.status[lane] = status;
    engine.done[lane] = true;
    run.progress = true;
}

static void fake_submit(struct engine *of, uint32_t lane, const struct engine_batch *batch)
{
    model_submitted(lane, batch);
    of->lanes[lane] = batch;
    of->done[lane] = false;
    of->started_ns[lane] = sim_time();
    if (sim_chance(run.quick_engine)) {
        engine_finish(lane, engine.lost ? STATUS_UNAVAILABLE : STATUS_OK);
        if (!run.ops.polled)
            batcher_wake(&waker);
    }
    totals.batches++;
}

static bool fake_poll(struct engine *of, uint32_t lane, struct engine_result *result)
{
    model_polled();
    if (!of->lanes[lane] || !of->done[lane])
        return false;
    *result = (struct engine_result){
        .status = of->status[lane],
        .started_ns = of->started_ns[lane],
        .ended_ns = sim_time(),
    };
    if (result->status)
        error_set(&result->error, result->status, "fake failure");
    model_finished(lane, result->status);
    of->lanes[lane] = NULL;
    return true;
}

// Ends one of the batches that run. False: none does.
static bool engine_step(void)
{
    uint32_t from = sim_below(MODEL_LANES_MAX);
    for (uint32_t i = 0; i < MODEL_LANES_MAX; i++) {
        uint32_t lane = (from + i) % MODEL_LANES_MAX;
        if (!engine.lanes[lane] || engine.done[lane])
            continue;
        enum status status = sim_chance(run.failures) ? STATUS_INTERNAL : STATUS_OK;
        engine.lost = engine.lost || (run.device_fails && !run.draining && sim_below(150) == 0);
        engine_finish(lane, engine.lost ? STATUS_UNAVAILABLE : status);
        if (!run.ops.polled)
            batcher_wake(&waker);
        return true;
    }
    return false;
}

// ---- requests

struct request {
    bool used;
    struct job job; // of one that is cut: the whole
    struct cut *cut;
    struct region region; // stands for the caller's memory, of a message or shared
    struct placement placement, none;
    bool in_region, waits, committed, replying;
    uint32_t told_room, told_done, heard;
    uint64_t id, reply_at_ns;
    uint8_t *memory, *expected;
    uint64_t output_bytes;
};
static struct request requests[CALLERS][SLOTS];

// Whoever is about to tell a request holds its end off.
static struct request *telling(struct job *job)
{
    struct request *request = CONTAINER_OF(job, struct request, job);
    uint64_t id = request->id;
    sim_preempt();
    MUST(request->used && request->id == id, "a request is told of something after its end");
    return request;
}

static void on_room(struct job *job)
{
    telling(job)->told_room++;
}

static void on_done(struct job *job)
{
    telling(job)->told_done++;
}

static void fill_random(uint8_t *memory, uint64_t bytes, uint64_t seed)
{
    for (uint64_t at = 0; at < bytes; at += sizeof seed, seed = mix(seed, at + 1))
        memcpy(memory + at, &seed, sizeof seed);
}

// Stands for what rope.c makes of a position.
static void rotation_of(uint64_t id, uint32_t token, struct attention_rotation *rotation)
{
    fill_random((uint8_t *)rotation, sizeof *rotation, mix(id, token));
}

static enum status fill(struct job *whole, const struct job *job, struct error *err)
{
    struct request *request = CONTAINER_OF(whole, struct request, job);
    if (job->whole && sim_chance(run.abandons / 2))
        return error_set(err, STATUS_DATA_LOSS, "no more");
    if (!job->attention)
        return placement_fill(&request->placement, job, &copies, err);
    struct attention_rotation *rotations = (void *)(uintptr_t)job->operand.rotations;
    for (uint32_t t = 0; t < job->operand.tokens; t++)
        rotation_of(request->id, job->first_token + t, &rotations[t]);
    struct job_runs rows = job_activation_runs(job);
    if (!job->input_given)
        memcpy((uint8_t *)(uintptr_t)job->operand.activations, request->memory + rows.offset,
               rows.bytes);
    return STATUS_OK;
}

static uint32_t choose_tokens(void)
{
    uint32_t most = run.options.batch_tokens_max;
    if (sim_chance(run.large))
        return most + 1 + sim_below(3 * most);
    return sim_chance(60) ? 1 + sim_below(most < 4 ? most : 4) : 1 + sim_below(most);
}

static struct einsum_operand choose_operand(bool attention)
{
    return (struct einsum_operand){
        .tokens = choose_tokens(),
        .groups = attention ? 1 : GROUPS,
        .activation_layout = sim_chance(50) ? EINSUM_ACTIVATIONS_GTR : EINSUM_ACTIVATIONS_TGR,
        .scale_layout = sim_chance(50) ? EINSUM_SCALES_GKT : EINSUM_SCALES_TGK,
        .scale_type = sim_chance(50) ? EINSUM_SCALE_UE8M0 : EINSUM_SCALE_FP32,
        .output_type = sim_chance(80) ? EINSUM_OUTPUT_BF16 : EINSUM_OUTPUT_FP32,
    };
}

// The caller's memory: activations or attention, scales, and room for the output.
static void make_memory(struct request *request, bool attention)
{
    struct job *job = &request->job;
    struct einsum_operand operand = job->operand;
    const struct einsum_weight_format *format = &job->weight->format;
    uint64_t activations =
        (attention ? 2 : 1) *
        einsum_activation_bytes(operand.tokens, operand.groups, format->reduced_dim);
    uint64_t scales =
        attention ? 0
                  : einsum_scale_bytes(operand.scale_layout, operand.scale_type, operand.tokens,
                                       operand.groups, format->reduced_dim / format->block_r);
    uint64_t scales_at = align_up(activations, 64), output_at = align_up(scales_at + scales, 64);
    request->output_bytes =
        einsum_output_bytes(operand.output_type, operand.tokens, operand.groups, OUTPUT_DIM);
    uint64_t bytes = output_at + align_up(request->output_bytes, 64);
    request->memory = aligned_alloc(64, bytes);
    request->expected = malloc(request->output_bytes);
    struct attention_rotation *rotations =
        attention ? malloc(operand.tokens * sizeof *rotations) : NULL;
    ASSERT(request->memory && request->expected && (rotations || !attention));
    fill_random(request->memory, output_at, request->id);
    memset(request->memory + output_at, 0xee, bytes - output_at);
    request->region = (struct region){.memory = request->memory, .bytes = bytes};
    request->placement = (struct placement){
        .region = &request->region,
        .activations = {0, activations},
        .scales = {scales_at, scales},
        .output = {output_at, request->output_bytes},
    };
    operand.activations = request->memory;
    operand.scales = request->memory + scales_at;
    for (uint32_t t = 0; attention && t < operand.tokens; t++)
        rotation_of(request->id, t, &rotations[t]);
    operand.rotations = rotations;
    compute(job->weight, &operand, attention, request->expected);
    free(rotations);
}

// What placement_set does with a region that the engine reaches.
static void give(struct request *request)
{
    struct job *job = &request->job;
    request->in_region = true;
    job->staged = run.ops.stages;
    job->input_given = sim_chance(80) && (!job->attention || job->staged);
    job->output_given = sim_chance(80);
    if (job->input_given) {
        job->operand.activations = request->memory;
        if (!job->attention)
            job->operand.scales = request->memory + request->placement.scales.offset;
    }
    if (job->output_given)
        job->operand.output = request->memory + request->placement.output.offset;
}

static void make_request(struct request *request)
{
    bool attention = sim_chance(10);
    struct weight *weight = &weights[attention ? WEIGHTS - 1 : sim_below(WEIGHTS - 1)];
    *request = (struct request){.used = true, .id = sim_random()};
    uint64_t now = sim_time();
    request->job = (struct job){
        .weight = weight,
        .operand = choose_operand(attention),
        .kernel = sim_chance(20),
        .attention = attention,
        .quiet = sim_chance(30),
        .deadline_ns = sim_chance(run.deadlines) ? now + sim_below(100000) : UINT64_MAX,
        .received_ns = now,
        .connection = sim_chance(40) ? 1 : sim_below(run.connections),
        .on_done = on_done,
        .on_room = on_room,
    };
    if (run.priorities)
        request->job.priority = sim_chance(run.high) ? JOB_PRIORITY_HIGH : sim_below(3);
    make_memory(request, attention);
    if (sim_chance(run.given))
        give(request);
    run.progress = true;
    totals.requests++;
}

static void drop(struct request *request, enum status status)
{
    ASSERT((size_t)status < ARRAY_LEN(run.ended));
    run.ended[status]++;
    totals.refused += status == STATUS_RESOURCE_EXHAUSTED;
    totals.failed += status == STATUS_INTERNAL || status == STATUS_UNAVAILABLE;
    totals.dropped += status == STATUS_DEADLINE_EXCEEDED || status == STATUS_CANCELLED;
    free(request->memory);
    free(request->expected);
    memset(request, 0xa5, sizeof *request); // whoever still looks at it will not like it
    request->used = false;
    run.progress = true;
}

// ---- requests that fit a batch

static void begin_single(struct request *request)
{
    struct error err = {.text = ""};
    struct job *job = &request->job;
    enum status status;
    bool waits = false;
    if (sim_chance(70))
        status = model_reserve_or_wait(batcher, job, &waits, &err);
    else
        status = model_reserve(batcher, job, &err);
    request->waits = waits;
    totals.waited += waits;
    if (status == STATUS_OK)
        return;
    MUST(status == STATUS_RESOURCE_EXHAUSTED || status == STATUS_UNAVAILABLE, "refused with %s",
         status_name(status));
    drop(request, status);
}

static void commit_single(struct request *request)
{
    struct job *job = &request->job;
    if (sim_chance(run.abandons)) {
        model_abandon(batcher, job);
        drop(request, STATUS_CANCELLED);
        return;
    }
    struct error err;
    enum status status = fill(job, job, &err);
    ASSERT(status == STATUS_OK);
    request->committed = true;
    bool quiet = job->quiet; // it may be answered by then, but nobody else lets it go
    model_commit(batcher, job);
    if (quiet)
        batcher_turn(batcher);
    run.progress = true;
}

static void check_single(const struct request *request)
{
    const struct job *job = &request->job;
    MUST(memcmp(job->operand.output, request->expected, request->output_bytes) == 0,
         "a job is answered with wrong rows");
}

static void answer_single(struct request *request)
{
    struct job *job = &request->job;
    MUST(request->told_done == 1, "a job is told %u times", request->told_done);
    enum status status = job->error.status;
    if (status == STATUS_OK && !request->replying) {
        check_single(request);
        if (sim_chance(60)) {
            model_advance(job, JOB_DONE, JOB_REPLYING);
            request->replying = true;
            request->reply_at_ns = sim_time() + (sim_chance(10) ? 150000 : sim_below(8000));
            run.progress = true;
            return;
        }
    }
    if (status == STATUS_OK)
        check_single(request); // nobody has written to it meanwhile
    model_release(batcher, job);
    drop(request, status);
}

static bool cancels(struct job *job)
{
    if (run.draining || !sim_chance(run.cancels))
        return false;
    atomic_store_explicit(&job->cancelled, true, memory_order_relaxed);
    return true;
}

static bool step_single(struct request *request)
{
    if (request->told_done) {
        bool slow = request->replying && sim_time() < request->reply_at_ns;
        if (slow && !run.draining && !(batcher_scarce(batcher) && sim_chance(50)))
            return false;
        answer_single(request);
        return true;
    }
    bool has_room = !request->waits || request->told_room;
    if (!has_room || request->committed || sim_chance(run.slow_fills))
        return cancels(&request->job);
    commit_single(request);
    return true;
}

// ---- requests that do not

static void begin_cut(struct request *request, struct batcher_cut at)
{
    const struct cut_options options = {
        .batcher = batcher,
        .whole = &request->job,
        .placement = request->in_region ? &request->placement : &request->none,
        .copies = &copies,
        .fill = fill,
    };
    struct error err = {.text = ""};
    totals.cut++;
    request->job.on_done = NULL;
    bool quiet = request->job.quiet;
    enum status status = cut_begin(&options, at, &request->cut, &err);
    if (quiet)
        batcher_turn(batcher);
    if (status != STATUS_OK)
        drop(request, status);
}

// Who needs room holds no finished output.
static void check_cut(const struct request *request)
{
    const struct cut *cut = request->cut;
    MUST(cut->under_way <= cut->at_once, "%u parts are under way", cut->under_way);
    bool needs_room = cut->begun < cut->parts_n || cut->waits;
    for (uint32_t i = 0; i < cut->parts_n && needs_room; i++) {
        bool known = !atomic_load(&cut->told); // those told of later are not
        MUST(!known || atomic_load(&cut->parts[i].job.state) != JOB_DONE,
             "a request that needs room holds a finished output");
    }
}

static void check_cut_output(const struct request *request)
{
    if (request->in_region) {
        MUST(memcmp(request->memory + request->placement.output.offset, request->expected,
                    request->output_bytes) == 0,
             "a cut request is answered with wrong rows");
        return;
    }
    const uint8_t *expected = request->expected;
    for (uint32_t i = 0; i < request->cut->parts_n; i++) {
        uint64_t bytes;
        const void *output = cut_output(request->cut, &request->cut->parts[i], &bytes);
        MUST(memcmp(output, expected, bytes) == 0, "a part is answered with wrong rows");
        expected += bytes;
    }
    MUST(expected == request->expected + request->output_bytes, "a part is missing");
}

static void end_cut(struct request *request)
{
    enum status status = request->job.error.status;
    if (status == STATUS_OK)
        check_cut_output(request);
    if (status == STATUS_OK && sim_chance(30)) {
        cut_copy_out(request->cut);
        sim_preempt();
        check_cut_output(request);
    }
    for (uint32_t i = 0; i < request->cut->parts_n; i++) {
        enum job_state state = atomic_load(&request->cut->parts[i].job.state);
        MUST(state == JOB_IDLE || state == JOB_DONE, "a part goes on behind its request");
    }
    cut_destroy(request->cut);
    drop(request, status);
}

static bool step_cut(struct request *request)
{
    if (request->replying) { // over: its parts are lent to the reply
        bool slow = sim_time() < request->reply_at_ns && !run.draining;
        if (!slow)
            end_cut(request);
        return !slow;
    }
    if (request->told_room == request->heard)
        return cancels(&request->job);
    request->heard++;
    run.progress = true;
    bool quiet = request->job.quiet;
    bool goes_on = cut_go_on(request->cut);
    if (quiet)
        batcher_turn(batcher);
    if (goes_on) {
        check_cut(request);
        return true;
    }
    request->replying = true;
    request->reply_at_ns = sim_time() + sim_below(8000);
    return true;
}

// ---- a caller's thread

static void begin(struct request *request)
{
    make_request(request);
    struct batcher_cut at = batcher_cut(batcher, &request->job);
    MUST(at.tokens > 0 && at.tokens <= run.options.batch_tokens_max, "cut at %u", at.tokens);
    if (at.tokens < request->job.operand.tokens)
        begin_cut(request, at);
    else
        begin_single(request);
}

static bool busy(int caller)
{
    for (int i = 0; i < SLOTS; i++)
        if (requests[caller][i].used)
            return true;
    return false;
}

// False: there was nothing to do.
static bool act(struct request *request)
{
    if (request->used)
        return request->cut ? step_cut(request) : step_single(request);
    if (run.draining || !sim_chance(run.arrivals))
        return false;
    begin(request);
    return true;
}

static void *caller_run(void *argument)
{
    int caller = (int)(intptr_t)argument;
    while (!run.draining || busy(caller)) {
        uint32_t from = sim_below(SLOTS);
        for (uint32_t i = 0; i < SLOTS && !act(&requests[caller][(from + i) % SLOTS]); i++)
            ;
        sim_yield();
    }
    return NULL;
}

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
    run.ops = (struct engine_ops){
        .name = "simulated",
        .polled = sim_chance(20),
        .serial = serial || sim_chance(20),
        .stages = sim_chance(30),
        .memory_alloc = fake_memory_alloc,
        .memory_free = fake_memory_free,
        .submit = fake_submit,
        .poll = fake_poll,
    };
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
