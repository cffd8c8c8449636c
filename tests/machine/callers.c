// Callers: their requests, what they do with them, and what they expect.
#include <stdlib.h>
#include <string.h>

#include "kernels/attention.h"
#include "machine.h"
#include "server/cut.h"
#include "simulated.h"

static struct copy_counters copies;

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

void *caller_run(void *argument)
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
