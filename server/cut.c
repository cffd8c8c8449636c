// See cut.h. Who touches what:
//
//     owner's thread   everything
//     any thread       on_told: a part has room, or is done -> `told` -> the whole's on_room
//
// Only whoever finds `told` empty calls on_room, and the owner empties it once for each call: it
// cannot end a request while somebody is about to call for it.
#include "cut.h"

#include <stdlib.h>
#include <string.h>

static uint64_t output_bytes(const struct cut *cut, uint64_t tokens)
{
    const struct job *whole = cut->options.whole;
    return einsum_output_bytes(whole->operand.output_type, tokens, whole->operand.groups,
                               whole->weight->format.output_dim);
}

static bool in_state(const struct part *part, enum job_state state)
{
    return atomic_load_explicit(&part->job.state, memory_order_acquire) == state;
}

// ---- telling

// After `told` has it, the part and its request may be gone as soon as on_room has been called, or, if
// others are in `told`, at once.
static void on_told(struct job *job)
{
    struct part *part = CONTAINER_OF(job, struct part, job);
    struct cut *cut = part->cut;
    struct job *whole = cut->options.whole;
    struct part *head = atomic_load_explicit(&cut->told, memory_order_relaxed);
    do
        part->next = head;
    while (!atomic_compare_exchange_weak_explicit(&cut->told, &head, part, memory_order_acq_rel,
                                                  memory_order_relaxed));
    if (!head)
        whole->on_room(whole);
}

// Oldest first.
static struct part *take_told(struct cut *cut)
{
    struct part *newest = atomic_exchange_explicit(&cut->told, NULL, memory_order_acq_rel);
    struct part *oldest = NULL;
    while (newest) {
        struct part *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    return oldest;
}

// ---- parts begin

// The first error is the request's. Parts that wait for their launch are dropped.
static void fail(struct cut *cut, const struct error *err)
{
    struct job *whole = cut->options.whole;
    if (cut->failed)
        return;
    cut->failed = true;
    whole->error = *err;
    atomic_store_explicit(&whole->cancelled, true, memory_order_relaxed);
}

// What the whole brought along serves a part where it is one run of bytes.
static void share_given(const struct job *whole, struct job *job)
{
    struct job_runs rows = job_activation_runs(job), scales = job_scale_runs(job);
    job->input_given = whole->input_given && rows.n == 1 && scales.n == 1;
    if (!job->input_given)
        return;
    job->operand.activations = (const uint8_t *)whole->operand.activations + rows.offset;
    if (!job->attention)
        job->operand.scales = (const uint8_t *)whole->operand.scales + scales.offset;
}

static void part_init(struct cut *cut, struct part *part, uint32_t first_token)
{
    const struct job *whole = cut->options.whole;
    struct job *job = &part->job;
    uint32_t left = whole->operand.tokens - first_token;
    job->whole = whole;
    job->first_token = first_token;
    job->weight = whole->weight;
    job->operand = whole->operand;
    job->operand.tokens = left < cut->part_tokens ? left : cut->part_tokens;
    job->kernel = whole->kernel;
    job->attention = whole->attention;
    job->output_given = whole->output_given;
    job->staged = whole->staged;
    job->quiet = whole->quiet;
    job->deadline_ns = whole->deadline_ns;
    job->received_ns = whole->received_ns;
    job->priority = whole->priority;
    job->connection = whole->connection;
    job->on_done = job->on_room = on_told;
    share_given(whole, job);
    if (job->output_given)
        job->operand.output = (uint8_t *)whole->operand.output + output_bytes(cut, first_token);
    part->cut = cut;
}

static void fill_and_commit(struct cut *cut, struct part *part)
{
    struct batcher *batcher = cut->options.batcher;
    struct error err;
    enum status status = STATUS_CANCELLED;
    if (job_cancelled(&part->job))
        error_set(&err, STATUS_CANCELLED, "cancelled before launch");
    else
        status = cut->options.fill(cut->options.whole, &part->job, &err);
    if (status == STATUS_OK) {
        batcher_commit(batcher, &part->job);
        return;
    }
    batcher_abandon(batcher, &part->job);
    cut->under_way--;
    fail(cut, &err);
}

// False: no more for now.
static bool begin_next(struct cut *cut)
{
    if (cut->failed || cut->waits || cut->begun == cut->parts_n || cut->under_way == cut->at_once)
        return false;
    struct part *part = &cut->parts[cut->begun];
    part_init(cut, part, cut->begun * cut->part_tokens);
    struct error err;
    bool waits;
    enum status status = batcher_reserve_or_wait(cut->options.batcher, &part->job, &waits, &err);
    if (status == STATUS_RESOURCE_EXHAUSTED && cut->under_way > 0)
        return false; // tried again when one of those ends
    if (status != STATUS_OK) {
        fail(cut, &err);
        return false;
    }
    cut->begun++;
    cut->under_way++;
    cut->waits = waits;
    if (!waits)
        fill_and_commit(cut, part);
    return true;
}

// ---- parts end

NODISCARD static bool copy_out(struct cut *cut, struct part *part)
{
    if (!cut->copy)
        cut->copy = malloc(output_bytes(cut, cut->options.whole->operand.tokens));
    if (!cut->copy)
        return false;
    uint64_t bytes = output_bytes(cut, part->job.operand.tokens);
    memcpy(cut->copy + output_bytes(cut, part->job.first_token), part->job.operand.output, bytes);
    atomic_fetch_add_explicit(&cut->options.copies->out_bytes, bytes, memory_order_relaxed);
    batcher_release(cut->options.batcher, &part->job);
    return true;
}

static void describe(struct job *whole, const struct job *part)
{
    whole->queued_ns = part->queued_ns;
    whole->launched_ns = part->launched_ns;
    whole->done_ns = part->done_ns;
    whole->batch_tokens = part->batch_tokens;
    whole->batch_bucket = part->batch_bucket;
    whole->batch_requests = part->batch_requests;
}

static void end(struct cut *cut, struct part *part)
{
    const struct placement *placement = cut->options.placement;
    cut->under_way--;
    if (part->job.error.status != STATUS_OK)
        fail(cut, &part->job.error);
    if (cut->failed) {
        batcher_release(cut->options.batcher, &part->job);
        return;
    }
    if (cut->options.look)
        cut->options.look(cut->options.whole, &part->job);
    if (part == cut->parts)
        describe(cut->options.whole, &part->job);
    if (placement->region && placement->output.bytes > 0) {
        placement_finish(placement, &part->job, cut->options.copies);
        batcher_release(cut->options.batcher, &part->job);
        return;
    }
    bool needs_room = cut->begun < cut->parts_n || cut->waits;
    if (needs_room && !copy_out(cut, part)) {
        struct error err;
        error_set(&err, STATUS_RESOURCE_EXHAUSTED, "no memory for an output");
        fail(cut, &err);
        batcher_release(cut->options.batcher, &part->job);
    }
}

static void go_on_with(struct cut *cut, struct part *part)
{
    // Only the last one begun ever waits; pushed out of the queue it is done, too.
    if (part == &cut->parts[cut->begun - 1])
        cut->waits = false;
    if (in_state(part, JOB_DECODING))
        fill_and_commit(cut, part);
    else
        end(cut, part);
}

bool cut_go_on(struct cut *cut)
{
    for (struct part *part = take_told(cut), *next; part; part = next) {
        next = part->next; // once committed, the part may be told of again
        go_on_with(cut, part);
    }
    while (begin_next(cut))
        ;
    ASSERT(cut->under_way > 0 || cut->failed || cut->begun == cut->parts_n);
    return cut->under_way > 0;
}

// ---- the request

const void *cut_output(const struct cut *cut, const struct part *part, uint64_t *bytes)
{
    *bytes = output_bytes(cut, part->job.operand.tokens);
    if (in_state(part, JOB_IDLE))
        return cut->copy + output_bytes(cut, part->job.first_token);
    return part->job.operand.output;
}

void cut_copy_out(struct cut *cut)
{
    for (uint32_t i = 0; i < cut->parts_n; i++)
        if (in_state(&cut->parts[i], JOB_DONE) && !copy_out(cut, &cut->parts[i]))
            return;
}

enum status cut_begin(const struct cut_options *options, struct batcher_cut at, struct cut **out,
                      struct error *err)
{
    struct job *whole = options->whole;
    uint32_t parts_n = (whole->operand.tokens + at.tokens - 1) / at.tokens;
    struct cut *cut = calloc(1, sizeof *cut + parts_n * sizeof *cut->parts);
    if (!cut)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for a request");
    cut->options = *options;
    cut->part_tokens = at.tokens;
    cut->parts_n = parts_n;
    cut->at_once = at.at_once;
    whole->error = (struct error){.status = STATUS_OK};
    while (begin_next(cut))
        ;
    if (cut->under_way > 0) { // it may have failed, and ends when that does
        *out = cut;
        return STATUS_OK;
    }
    *err = whole->error;
    free(cut);
    return err->status;
}

void cut_destroy(struct cut *cut)
{
    for (uint32_t i = 0; i < cut->parts_n; i++)
        if (!in_state(&cut->parts[i], JOB_IDLE))
            batcher_release(cut->options.batcher, &cut->parts[i].job);
    free(cut->copy);
    free(cut);
}
