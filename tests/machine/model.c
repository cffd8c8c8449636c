#include "model.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/attention.h"
#include "simulated.h"

enum {
    JOBS_MAX = 256,
    WAITING_MAX = 64,
    SERIAL_TOKENS = 256, // of batches that run, past which a serial engine gets no more
    BUFFERS_TO_KEEP_ONE = 3,
};

// ---- what the model knows

enum doing { DOING_NOTHING, DOING_RESERVE, DOING_COMMIT, DOING_ABANDON, DOING_RELEASE };

struct tracked {
    struct job *job; // NULL: unused
    int owner;       // fiber, while the job is a caller's
    enum job_state state;
    bool waits, has_room, committed, launched, finished, told_room, told_done, pushed_out, lost;
    uint32_t tokens, connection;
    enum job_priority priority;
    uint64_t share_start, share_end; // as they should be
    uint64_t waiting_bytes;
    struct batch *batch;
    enum status engine_status;
    uint64_t launches, launches_max; // when it was committed; by when it must have been launched
    void (*on_done)(struct job *job);
    void (*on_room)(struct job *job);
};

struct seen_batch {
    enum batch_state state;
    uint32_t tokens, held, filling, jobs_n;
    uint64_t first_commit_ns, input_left, output_left;
};

// The batcher as it was when the lock was taken.
struct seen {
    struct seen_batch batches[MODEL_BATCHES_MAX];
    uint32_t queue[MODEL_BATCHES_MAX], queue_n; // indices
    struct job *waiting[WAITING_MAX];
    uint32_t waiting_n, free_n, lanes_free, running_tokens, queued;
    uint64_t waiting_bytes, refused[FULL_REASONS];
    int open; // -1: none
    bool lost;
};

struct standing {
    enum job_priority priority;
    uint64_t share_end;
};

static struct {
    struct batcher *batcher;
    int scheduler;
    struct tracked jobs[JOBS_MAX];
    struct seen seen;
    struct standing standing[MODEL_BATCHES_MAX]; // of all that had room in it since it was opened
    uint64_t share_start_last[MODEL_BATCHES_MAX];
    bool opened[MODEL_BATCHES_MAX];              // since the lock was taken
    uint64_t first_commit_ns[MODEL_BATCHES_MAX]; // 0: none yet
    uint64_t share_now, share_ends[MODEL_CONNECTIONS];
    const struct engine_batch *lanes[MODEL_LANES_MAX];
    struct batch *launching; // dequeued, and not counted yet
    int launching_fiber;
    uint64_t launches;
    bool one_class;   // so far
    bool device_gone; // the engine has said so
    struct {
        enum doing doing;
        struct tracked *tracked;
        bool may_wait, entered; // went through the lock
    } fibers[SIM_FIBERS_MAX + 1];
} model;

static uint32_t index_of(const struct batch *batch)
{
    return (uint32_t)(batch - model.batcher->batches);
}

static struct tracked *find(const struct job *job)
{
    for (uint32_t i = 0; i < JOBS_MAX; i++)
        if (model.jobs[i].job == job)
            return &model.jobs[i];
    return NULL;
}

static struct tracked *track(struct job *job)
{
    struct tracked *tracked = find(NULL);
    MUST(tracked, "the test has too many jobs");
    *tracked = (struct tracked){.job = job, .owner = sim_current()};
    return tracked;
}

static bool before(enum job_priority priority, uint64_t share_end, enum job_priority than_priority,
                   uint64_t than_share_end)
{
    if (priority != than_priority)
        return priority > than_priority;
    return share_end < than_share_end;
}

static bool tracked_before(const struct tracked *a, const struct tracked *b)
{
    return before(a->priority, a->share_end, b->priority, b->share_end);
}

uint32_t model_jobs(void)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < JOBS_MAX; i++)
        n += model.jobs[i].job != NULL;
    return n;
}

uint64_t model_launches(void)
{
    return model.launches;
}

// ---- room, as batch.h tells it

static uint64_t lines(uint64_t bytes)
{
    return align_up(bytes, CACHE_LINE_BYTES);
}

struct needs {
    uint64_t input, output, waiting;
};

static struct needs needs_of(const struct job *job)
{
    const struct einsum_weight_format *format = &job->weight->format;
    const struct einsum_operand *operand = &job->operand;
    uint64_t tokens = operand->tokens, first, second;
    if (job->attention) {
        first = lines(attention_bytes(tokens, operand->groups, format->reduced_dim));
        second = lines(tokens * sizeof(struct attention_rotation));
    } else {
        first = lines(einsum_activation_bytes(tokens, operand->groups, format->reduced_dim));
        second = lines(einsum_scale_bytes(operand->scale_layout, operand->scale_type, tokens,
                                          operand->groups, format->reduced_dim / format->block_r));
    }
    uint64_t output = lines(
        einsum_output_bytes(operand->output_type, tokens, operand->groups, format->output_dim));
    uint64_t own = job->input_given ? (job->attention ? second : 0) : first + second;
    return (struct needs){
        .input = job->staged && job->input_given ? first + second : own,
        .output = job->output_given && !job->staged ? 0 : output,
        .waiting = job->whole ? 0 : own,
    };
}

static bool overlap(const uint8_t *a, uint64_t a_bytes, const uint8_t *b, uint64_t b_bytes)
{
    return a_bytes && b_bytes && a < b + b_bytes && b < a + a_bytes;
}

static void check_within(const struct job *job, const uint8_t *at, uint64_t bytes,
                         const void *memory, uint64_t memory_bytes)
{
    MUST(bytes == 0 || (at >= (const uint8_t *)memory &&
                        at + bytes <= (const uint8_t *)memory + memory_bytes),
         "job %p: its room is not in its batch", (const void *)job);
    MUST(bytes == 0 || (uintptr_t)at % CACHE_LINE_BYTES == 0, "job %p: not aligned",
         (const void *)job);
}

// Its room is in the batch and nobody else's.
static void check_room(const struct tracked *tracked)
{
    const struct job *job = tracked->job;
    const struct batcher_options *options = &model.batcher->options;
    const struct batch *batch = tracked->batch;
    struct needs needs = needs_of(job);
    MUST(job->input_bytes + job->staged_input_bytes == needs.input, "input of another size");
    MUST(job->output_bytes + job->staged_output_bytes == needs.output, "output of another size");
    check_within(job, job->input, job->input_bytes, batch->input, options->batch_input_bytes);
    check_within(job, job->staged_input, job->staged_input_bytes, batch->input,
                 options->batch_input_bytes);
    check_within(job, job->output, job->output_bytes, batch->output, options->batch_output_bytes);
    check_within(job, job->staged_output, job->staged_output_bytes, batch->output,
                 options->batch_output_bytes);
    for (uint32_t i = 0; i < JOBS_MAX; i++) {
        const struct tracked *other = &model.jobs[i];
        if (!other->job || other == tracked || !other->has_room || other->batch != batch)
            continue;
        const struct job *its = other->job;
        bool shared =
            overlap(job->input, job->input_bytes, its->input, its->input_bytes) ||
            overlap(job->input, job->input_bytes, its->staged_input, its->staged_input_bytes) ||
            overlap(job->staged_input, job->staged_input_bytes, its->input, its->input_bytes) ||
            overlap(job->staged_input, job->staged_input_bytes, its->staged_input,
                    its->staged_input_bytes) ||
            overlap(job->output, job->output_bytes, its->output, its->output_bytes) ||
            overlap(job->output, job->output_bytes, its->staged_output, its->staged_output_bytes) ||
            overlap(job->staged_output, job->staged_output_bytes, its->output, its->output_bytes) ||
            overlap(job->staged_output, job->staged_output_bytes, its->staged_output,
                    its->staged_output_bytes);
        MUST(!shared, "two jobs have the same room");
    }
}

// ---- what was there

static void see(struct seen *seen)
{
    const struct batcher *batcher = model.batcher;
    const struct batcher_options *options = &batcher->options;
    *seen = (struct seen){
        .free_n = atomic_load(&batcher->free_n),
        .lanes_free = batcher->lanes_free,
        .running_tokens = batcher->running_tokens,
        .queued = batcher->stats.queued,
        .waiting_bytes = batcher->waiting_bytes,
        .open = batcher->open ? (int)index_of(batcher->open) : -1,
        .lost = atomic_load(&batcher->device_lost),
    };
    memcpy(seen->refused, batcher->stats.refused, sizeof seen->refused);
    for (uint32_t i = 0; i < options->batches; i++) {
        const struct batch *batch = &batcher->batches[i];
        seen->batches[i] = (struct seen_batch){
            .state = batch->state,
            .tokens = batch->tokens,
            .held = batch->held,
            .filling = batch->filling,
            .jobs_n = batch->jobs_n,
            .first_commit_ns = batch->first_commit_ns,
            .input_left = options->batch_input_bytes - batch->input_used - batch->input_staged,
            .output_left = options->batch_output_bytes - batch->output_used - batch->output_staged,
        };
    }
    for (const struct batch *batch = batcher->queue; batch; batch = batch->next) {
        MUST(seen->queue_n < options->batches, "the queue of batches is a ring");
        seen->queue[seen->queue_n++] = index_of(batch);
    }
    for (struct job *job = batcher->waiting; job; job = job->next_waiting) {
        MUST(seen->waiting_n < WAITING_MAX, "more jobs wait than may");
        seen->waiting[seen->waiting_n++] = job;
    }
}

// ---- what is there now must add up

static void check_batch(const struct batch *batch)
{
    const struct batcher_options *options = &model.batcher->options;
    uint32_t tokens = 0, held = 0, filling = 0;
    for (uint32_t i = 0; i < JOBS_MAX; i++) {
        const struct tracked *tracked = &model.jobs[i];
        if (!tracked->job || !tracked->has_room || tracked->batch != batch)
            continue;
        held++;
        tokens += tracked->tokens;
        filling += !tracked->committed;
    }
    MUST(batch->held == held, "a batch holds %u jobs and counts %u", held, batch->held);
    MUST(batch->state != BATCH_FREE || held == 0, "a batch is free and has jobs");
    MUST(batch->state != BATCH_ANSWERING || held > 0, "a batch is not given back");
    if (batch->state == BATCH_FREE || batch->state == BATCH_ANSWERING)
        return;
    MUST(batch->filling == filling, "%u jobs are filling, %u are counted", filling, batch->filling);
    MUST(batch->tokens <= options->batch_tokens_max, "more tokens than a batch may have");
    MUST(batch->held <= options->batch_requests_max, "more requests than a batch may have");
    MUST(batch->input_used + batch->input_staged <= options->batch_input_bytes, "input overflows");
    MUST(batch->output_used + batch->output_staged <= options->batch_output_bytes,
         "output overflows");
    if (batch->state == BATCH_OPEN || batch->state == BATCH_CLOSED) {
        MUST(batch->tokens == tokens, "%u tokens are held, %u counted", tokens, batch->tokens);
        MUST(batch->jobs_n + batch->filling == batch->held, "a job of the batch is missing");
        MUST(batch->state == BATCH_OPEN || batch->held > 0, "a closed batch is empty");
    }
    MUST(batch->jobs_n == 0 || batch->first_commit_ns == model.first_commit_ns[index_of(batch)],
         "a batch's delay counts from another commit");
    MUST(batch->state != BATCH_OPEN || batch == model.batcher->open, "two batches are open");
}

static void check_lists(const struct seen *now)
{
    const struct batcher *batcher = model.batcher;
    uint32_t free_n = 0, queue_n = 0, in_state[BATCH_ANSWERING + 1] = {0};
    for (uint32_t i = 0; i < batcher->options.batches; i++)
        in_state[batcher->batches[i].state]++;
    for (const struct batch *batch = batcher->free; batch; batch = batch->next) {
        MUST(batch->state == BATCH_FREE, "a batch among the free ones is not free");
        MUST(++free_n <= batcher->options.batches, "the free batches are a ring");
    }
    for (uint32_t i = 0; i < now->queue_n; i++, queue_n++) {
        enum batch_state state = now->batches[now->queue[i]].state;
        MUST(state == BATCH_CLOSED || (state == BATCH_OPEN && i == now->queue_n - 1),
             "a batch in the queue is neither closed nor the last and open");
    }
    MUST(free_n == in_state[BATCH_FREE] && free_n == now->free_n, "a free batch is lost");
    MUST(queue_n == in_state[BATCH_OPEN] + in_state[BATCH_CLOSED], "a batch waits in no queue");
    MUST(queue_n == batcher->queue_batches, "the queue's length is wrong");
    MUST(!batcher->open || batcher->open->state == BATCH_OPEN, "the open batch is not open");
    MUST(now->lanes_free <= batcher->options.lanes, "more lanes than there are");
}

static void check_waiting(const struct seen *now)
{
    const struct batcher *batcher = model.batcher;
    uint64_t bytes = 0, tokens = 0;
    for (uint32_t i = 0; i < now->waiting_n; i++) {
        const struct tracked *tracked = find(now->waiting[i]);
        MUST(tracked && tracked->waits, "a job waits that should not");
        const struct tracked *last = i ? find(now->waiting[i - 1]) : NULL;
        MUST(!last || !tracked_before(tracked, last), "the jobs do not wait in their order");
        bytes += tracked->waiting_bytes;
        tokens += tracked->tokens;
    }
    MUST(now->waiting_n == 0 || batcher->waiting_last == now->waiting[now->waiting_n - 1],
         "the last that waits is not the last");
    uint32_t waits = 0;
    for (uint32_t i = 0; i < JOBS_MAX; i++)
        waits += model.jobs[i].job && model.jobs[i].waits;
    MUST(waits == now->waiting_n, "%u jobs wait, %u are in the queue", waits, now->waiting_n);
    MUST(bytes == batcher->waiting_bytes && tokens == batcher->waiting_tokens,
         "%" PRIu64 " bytes wait, %" PRIu64 " are counted", bytes, batcher->waiting_bytes);
    MUST(bytes <= batcher->options.batches * batcher->options.batch_input_bytes,
         "more bytes wait than may");
}

static void check_counters(const struct seen *now)
{
    const struct batcher *batcher = model.batcher;
    uint32_t queued = now->waiting_n, jobs = 0;
    for (uint32_t i = 0; i < now->queue_n; i++)
        queued += now->batches[now->queue[i]].held;
    if (model.launching)
        queued += model.launching->jobs_n;
    for (uint32_t i = 0; i < JOBS_MAX; i++) {
        const struct tracked *tracked = &model.jobs[i];
        jobs += tracked->job &&
                (tracked->waits || tracked->has_room || tracked->pushed_out || tracked->lost);
    }
    MUST(batcher->stats.queued == queued, "%u jobs are queued, %u are counted", queued,
         batcher->stats.queued);
    MUST(queued <= batcher->options.queue_requests_max, "more jobs are queued than may");
    MUST(batcher->stats.jobs == jobs, "%u jobs are there, %u are counted", jobs,
         batcher->stats.jobs);
    for (uint32_t i = 0; i < MODEL_CONNECTIONS; i++)
        MUST(batcher->share_ends[i] == model.share_ends[i], "connection %u's share is wrong", i);
    MUST(batcher->share_now == model.share_now, "the shares' now is wrong");
}

// ---- what changed while the lock was held

static bool may_follow(enum batch_state from, enum batch_state to)
{
    static const uint8_t ways[BATCH_ANSWERING + 1][BATCH_ANSWERING + 1] = {
        [BATCH_FREE] = {[BATCH_OPEN] = 1, [BATCH_CLOSED] = 1},
        [BATCH_OPEN] = {[BATCH_CLOSED] = 1, [BATCH_RUNNING] = 1},
        [BATCH_CLOSED] = {[BATCH_FREE] = 1, [BATCH_OPEN] = 1, [BATCH_RUNNING] = 1},
        [BATCH_RUNNING] = {[BATCH_ANSWERING] = 1, [BATCH_FREE] = 1},
        [BATCH_ANSWERING] = {[BATCH_FREE] = 1, [BATCH_OPEN] = 1, [BATCH_CLOSED] = 1},
    };
    return from == to || ways[from][to];
}

static bool due(const struct seen_batch *batch)
{
    uint64_t delay_ns = (uint64_t)model.batcher->options.max_queue_delay_us * 1000;
    return batch->state == BATCH_CLOSED ||
           (batch->jobs_n > 0 && batch->first_commit_ns + delay_ns <= sim_time());
}

// For sure: what is not due but for the clock may have come due since it was read.
static bool could_have_left(const struct seen_batch *batch)
{
    return batch->filling == 0 &&
           (batch->state == BATCH_CLOSED ||
            (batch->jobs_n > 0 && !model.batcher->options.max_queue_delay_us));
}

static void check_dequeued(uint32_t index)
{
    const struct seen *seen = &model.seen;
    const struct seen_batch *batch = &seen->batches[index];
    MUST(batch->filling == 0, "a batch leaves while it is being filled");
    MUST(!model.launching, "two batches leave at once");
    model.launching = &model.batcher->batches[index];
    model.launching_fiber = sim_current();
    uint64_t last = model.share_start_last[index];
    model.share_now = last > model.share_now ? last : model.share_now;
    if (seen->lost)
        return;
    MUST(seen->lanes_free > 0, "a batch leaves without a lane");
    MUST(!model.batcher->options.ops->serial || seen->running_tokens < SERIAL_TOKENS,
         "a serial engine gets a batch behind a long one");
    MUST(due(batch), "a batch leaves too early");
    const struct standing *standing = &model.standing[index];
    for (uint32_t i = 0; i < seen->queue_n; i++) {
        uint32_t other = seen->queue[i];
        const struct standing *its = &model.standing[other];
        MUST(other == index || !could_have_left(&seen->batches[other]) ||
                 !before(its->priority, its->share_end, standing->priority, standing->share_end),
             "batch %u leaves before batch %u", index, other);
    }
}

// A job has got its room.
static void check_seated(struct tracked *tracked, const struct seen *now, bool patient)
{
    const struct job *job = tracked->job;
    const struct batcher_options *options = &model.batcher->options;
    uint32_t index = index_of(job->batch);
    MUST(now->batches[index].state == BATCH_OPEN || now->batches[index].state == BATCH_CLOSED,
         "a job has room in a batch that is neither open nor closed");
    const struct seen_batch *was = &model.seen.batches[index];
    bool comes_free = model.fibers[sim_current() + 1].doing == DOING_ABANDON && was->held == 1;
    MUST(was->state != BATCH_CLOSED || comes_free, "a job has room in a batch that was closed");
    MUST(was->state != BATCH_RUNNING, "a job has room in a batch that runs");
    tracked->waits = false;
    tracked->has_room = true;
    tracked->batch = job->batch;
    struct standing *standing = &model.standing[index];
    bool opened = !model.opened[index] && model.seen.open != (int)index;
    if (opened) {
        model.opened[index] = true;
        model.first_commit_ns[index] = 0;
        *standing = (struct standing){.priority = tracked->priority, .share_end = UINT64_MAX};
        model.share_start_last[index] = 0;
    }
    if (before(tracked->priority, tracked->share_end, standing->priority, standing->share_end))
        *standing = (struct standing){tracked->priority, tracked->share_end};
    if (tracked->share_start > model.share_start_last[index])
        model.share_start_last[index] = tracked->share_start;
    check_room(tracked);
    for (uint32_t i = 0; i < now->waiting_n; i++)
        MUST(!tracked_before(find(now->waiting[i]), tracked),
             "a job overtakes one that waits and stands before it");
    bool keeps_one = patient && options->batches >= options->lanes + BUFFERS_TO_KEEP_ONE &&
                     model.seen.free_n == 1 && now->free_n == 0;
    for (uint32_t i = 0; i < now->queue_n && opened && keeps_one; i++) {
        const struct standing *its = &model.standing[now->queue[i]];
        MUST(now->queue[i] == index ||
                 before(tracked->priority, tracked->share_end, its->priority, its->share_end),
             "the last buffer goes to one that does not stand before all");
    }
}

static bool had_room(const struct tracked *tracked, bool patient)
{
    const struct seen *seen = &model.seen;
    const struct batcher_options *options = &model.batcher->options;
    struct needs needs = needs_of(tracked->job);
    if (seen->waiting_n > 0 && !tracked_before(tracked, find(seen->waiting[0])))
        return false;
    if (seen->open >= 0) {
        const struct seen_batch *open = &seen->batches[seen->open];
        if (open->tokens + tracked->tokens <= options->batch_tokens_max &&
            open->held < options->batch_requests_max && needs.input <= open->input_left &&
            needs.output <= open->output_left)
            return true;
    }
    bool keeps_one = options->batches >= options->lanes + BUFFERS_TO_KEEP_ONE;
    if (!patient || !keeps_one || seen->free_n != 1)
        return seen->free_n > 0;
    for (uint32_t i = 0; i < seen->queue_n; i++) {
        const struct standing *its = &model.standing[seen->queue[i]];
        if (!before(tracked->priority, tracked->share_end, its->priority, its->share_end))
            return false;
    }
    return true;
}

// Whether some that wait could have given way.
static bool others_could_give_way(const struct tracked *tracked)
{
    const struct seen *seen = &model.seen;
    const struct batcher_options *options = &model.batcher->options;
    uint64_t bytes_max = options->batches * options->batch_input_bytes, behind = 0;
    bool any = false;
    for (uint32_t i = 0; i < seen->waiting_n; i++) {
        const struct tracked *other = find(seen->waiting[i]);
        if (!tracked_before(tracked, other))
            continue;
        any = true;
        behind += other->waiting_bytes;
    }
    return any && seen->waiting_bytes + tracked->waiting_bytes <= bytes_max + behind;
}

static void check_refused(const struct tracked *tracked, bool may_wait, enum batcher_full full)
{
    const struct seen *seen = &model.seen;
    const struct batcher_options *options = &model.batcher->options;
    uint64_t bytes_max = options->batches * options->batch_input_bytes;
    bool requests_full = seen->queued >= options->queue_requests_max;
    bool bytes_full = seen->waiting_bytes + tracked->waiting_bytes > bytes_max;
    MUST(full != FULL_REQUESTS || requests_full, "refused with room in the queue");
    MUST(full != FULL_BYTES || (bytes_full && may_wait && !had_room(tracked, true)),
         "refused with room for its bytes");
    MUST(full != FULL_BUFFERS || (!may_wait && !had_room(tracked, false)), "refused with a buffer");
    MUST(!may_wait || !others_could_give_way(tracked), "refused where others should give way");
}

// Jobs that waited and do so no more without having got room.
static void check_pushed_out(const struct seen *now, const struct tracked *by, bool lost)
{
    for (uint32_t i = 0; i < model.seen.waiting_n; i++) {
        struct tracked *tracked = find(model.seen.waiting[i]);
        bool still = false;
        for (uint32_t j = 0; j < now->waiting_n; j++)
            still = still || now->waiting[j] == model.seen.waiting[i];
        if (still || !tracked || tracked->has_room)
            continue;
        tracked->waits = false;
        tracked->lost = lost;
        tracked->pushed_out = !lost;
        MUST(lost || (by && tracked_before(by, tracked)),
             "a job gives way to one that does not stand before it");
    }
}

static void check_reserving(const struct seen *now, struct tracked *tracked, bool may_wait)
{
    struct job *job = tracked->job;
    uint64_t *end = &model.share_ends[tracked->connection];
    tracked->priority = job->priority;
    tracked->share_start = *end > model.share_now ? *end : model.share_now;
    tracked->share_end = tracked->share_start + tracked->tokens;
    for (uint32_t full = 1; full < FULL_REASONS; full++)
        if (full != FULL_GAVE_WAY && now->refused[full] != model.seen.refused[full]) {
            check_refused(tracked, may_wait, (enum batcher_full)full);
            return;
        }
    *end = tracked->share_end;
    MUST(job->share_start == tracked->share_start && job->share_end == tracked->share_end,
         "a job of %u tokens has the share %" PRIu64 " to %" PRIu64, tracked->tokens,
         job->share_start, job->share_end);
    if (job->batch) {
        check_seated(tracked, now, may_wait);
        return;
    }
    tracked->waits = true;
    bool gave_way = now->refused[FULL_GAVE_WAY] != model.seen.refused[FULL_GAVE_WAY];
    MUST(gave_way || !had_room(tracked, true), "a job waits for what is there");
    MUST(may_wait, "a job waits that may not");
}

static struct tracked *check_doing(const struct seen *now)
{
    int fiber = sim_current() + 1;
    struct tracked *tracked = model.fibers[fiber].tracked;
    if (model.fibers[fiber].doing == DOING_NOTHING || model.fibers[fiber].entered)
        return NULL;
    model.fibers[fiber].entered = true;
    switch (model.fibers[fiber].doing) {
    case DOING_NOTHING:
        return NULL;
    case DOING_RESERVE:
        if (!now->lost)
            check_reserving(now, tracked, model.fibers[fiber].may_wait);
        return tracked;
    case DOING_COMMIT:
        tracked->committed = true;
        if (model.first_commit_ns[index_of(tracked->batch)] == 0)
            model.first_commit_ns[index_of(tracked->batch)] = tracked->job->queued_ns;
        return NULL;
    case DOING_ABANDON:
    case DOING_RELEASE:
        tracked->has_room = tracked->pushed_out = tracked->lost = false;
        return NULL;
    }
    return NULL;
}

static void on_locked(const pthread_mutex_t *mutex)
{
    if (!model.batcher || mutex != &model.batcher->lock)
        return;
    see(&model.seen);
    memset(model.opened, 0, sizeof model.opened);
}

static void on_unlocking(const pthread_mutex_t *mutex)
{
    struct batcher *batcher = model.batcher;
    if (!batcher || mutex != &batcher->lock)
        return;
    struct seen now;
    see(&now);
    // Counted by whoever took it out, the next time that this one takes the lock.
    if (sim_current() == model.launching_fiber)
        model.launching = NULL;
    const struct tracked *by = check_doing(&now);
    for (uint32_t i = 0; i < model.seen.waiting_n; i++) {
        struct tracked *tracked = find(model.seen.waiting[i]);
        if (tracked && tracked->waits && tracked->job->batch)
            check_seated(tracked, &now, true);
    }
    check_pushed_out(&now, by, now.lost);
    for (uint32_t i = 0; i < batcher->options.batches; i++) {
        enum batch_state from = model.seen.batches[i].state, to = now.batches[i].state;
        MUST(may_follow(from, to), "batch %u goes from %d to %d", i, (int)from, (int)to);
        if ((from == BATCH_OPEN || from == BATCH_CLOSED) && to == BATCH_RUNNING)
            check_dequeued(i);
        check_batch(&batcher->batches[i]);
    }
    check_lists(&now);
    check_waiting(&now);
    check_counters(&now);
}

// ---- jobs change their state

static void check_step(const struct tracked *tracked, enum job_state from, enum job_state to)
{
    const struct batcher *batcher = model.batcher;
    bool has_turn =
        batcher->options.ops->polled ? sim_current() == model.scheduler : sim_holds(&batcher->turn);
    bool owns = sim_current() == tracked->owner;
    bool may = false;
    switch (from) {
    case JOB_IDLE:
        may = owns && (to == JOB_DECODING || to == JOB_WAITING);
        break;
    case JOB_WAITING:
        may = to == JOB_DECODING ? sim_holds(&batcher->lock)
                                 : to == JOB_DONE && (tracked->pushed_out || tracked->lost);
        break;
    case JOB_DECODING:
        may = owns && (to == JOB_QUEUED || to == JOB_IDLE);
        break;
    case JOB_QUEUED:
        may = has_turn && (to == JOB_RUNNING || to == JOB_DONE);
        break;
    case JOB_RUNNING:
        may = has_turn && to == JOB_DONE;
        break;
    case JOB_DONE:
        may = owns && tracked->told_done && (to == JOB_REPLYING || to == JOB_IDLE);
        break;
    case JOB_REPLYING:
        may = owns && to == JOB_IDLE;
        break;
    }
    MUST(may, "a job goes from state %d to %d, by fiber %d", (int)from, (int)to, sim_current());
}

void model_advance(struct job *job, enum job_state from, enum job_state to)
{
    struct tracked *tracked = find(job);
    MUST(tracked, "a job of nobody changes its state");
    MUST(tracked->state == from, "a job leaves state %d, in which it is not", (int)from);
    check_step(tracked, from, to);
    tracked->state = to;
    job_advance(job, from, to);
}

// ---- jobs are told

static void check_ended(const struct tracked *tracked)
{
    const struct job *job = tracked->job;
    enum status status = job->error.status;
    bool lost = batcher_device_lost(model.batcher);
    MUST(job->queued_ns <= job->launched_ns && job->launched_ns <= job->done_ns,
         "a job's times are out of order");
    if (tracked->launched) {
        MUST(tracked->finished, "a job is answered before its batch is done");
        MUST(status == tracked->engine_status, "a job ends with %s, its batch with %s",
             status_name(status), status_name(tracked->engine_status));
        return;
    }
    if (status == STATUS_DEADLINE_EXCEEDED) {
        MUST(job->deadline_ns <= sim_time(), "a job is dropped before its deadline");
    } else if (status == STATUS_CANCELLED) {
        MUST(job_cancelled(job), "a job is dropped that nobody cancelled");
    } else if (status == STATUS_RESOURCE_EXHAUSTED) {
        MUST(tracked->pushed_out, "a job gives way that did not wait");
        MUST(job->error.retry_after_ms >= 1 && job->error.retry_after_ms <= 1000,
             "no advice when to come again");
    } else {
        MUST(status == STATUS_UNAVAILABLE && lost, "a job ends with %s", status_name(status));
    }
}

static void on_done(struct job *job)
{
    struct tracked *tracked = find(job);
    MUST(tracked, "a job is told that nobody has");
    MUST(!sim_holds(&model.batcher->lock), "told with the lock held");
    MUST(!tracked->told_done, "a job is answered twice");
    MUST(tracked->state == JOB_DONE, "a job is told that it is done, and is not");
    check_ended(tracked);
    tracked->told_done = true;
    void (*tell)(struct job *) = tracked->on_done;
    tell(job);
    sim_preempt(); // its owner may do away with it
}

static void on_room(struct job *job)
{
    struct tracked *tracked = find(job);
    MUST(tracked && tracked->state == JOB_DECODING, "a job is told of room that it has not");
    MUST(!sim_holds(&model.batcher->lock), "told with the lock held");
    MUST(!tracked->told_room, "a job is told of its room twice");
    tracked->told_room = true;
    void (*tell)(struct job *) = tracked->on_room;
    tell(job);
    sim_preempt();
}

// ---- what is asked of the batcher

static void doing(enum doing what, struct tracked *tracked, bool may_wait)
{
    int fiber = sim_current() + 1;
    model.fibers[fiber].doing = what;
    model.fibers[fiber].tracked = tracked;
    model.fibers[fiber].may_wait = may_wait;
    model.fibers[fiber].entered = false;
}

static void forget(struct tracked *tracked)
{
    tracked->job->on_done = tracked->on_done;
    tracked->job->on_room = tracked->on_room;
    tracked->job = NULL;
}

static enum status reserving(struct batcher *batcher, struct job *job, bool *waits,
                             struct error *err)
{
    struct tracked *tracked = track(job);
    tracked->tokens = job->operand.tokens;
    tracked->connection = job->connection;
    tracked->state = JOB_IDLE;
    tracked->on_done = job->on_done;
    tracked->on_room = job->on_room;
    tracked->waiting_bytes = needs_of(job).waiting;
    job->on_done = on_done;
    job->on_room = on_room;
    const struct job *whole = job->whole;
    MUST(!whole || (job->priority == whole->priority && job->connection == whole->connection &&
                    job->deadline_ns == whole->deadline_ns && job->kernel == whole->kernel),
         "a part is not what its request is");
    bool was_lost = batcher_device_lost(batcher);
    doing(DOING_RESERVE, tracked, waits != NULL);
    enum status status = waits ? batcher_reserve_or_wait(batcher, job, waits, err)
                               : batcher_reserve(batcher, job, err);
    doing(DOING_NOTHING, NULL, false);
    if (status == STATUS_OK) {
        MUST(!was_lost, "a job gets room on a device that is lost");
        return status;
    }
    MUST(status == err->status, "the error says otherwise");
    MUST(status != STATUS_RESOURCE_EXHAUSTED ||
             (err->retry_after_ms >= 1 && err->retry_after_ms <= 1000),
         "no advice when to come again");
    MUST(status != STATUS_UNAVAILABLE || batcher_device_lost(batcher), "the device is there");
    MUST(tracked->state == JOB_IDLE && !tracked->has_room && !tracked->waits,
         "a job is refused and has room");
    forget(tracked);
    return status;
}

enum status model_reserve(struct batcher *batcher, struct job *job, struct error *err)
{
    return reserving(batcher, job, NULL, err);
}

enum status model_reserve_or_wait(struct batcher *batcher, struct job *job, bool *waits,
                                  struct error *err)
{
    return reserving(batcher, job, waits, err);
}

void model_commit(struct batcher *batcher, struct job *job)
{
    struct tracked *tracked = find(job);
    const struct batcher_options *options = &batcher->options;
    uint64_t ahead =
        tracked->share_end > model.share_now ? tracked->share_end - model.share_now : 0;
    model.one_class = model.one_class && job->priority == JOB_PRIORITY_NORMAL;
    tracked->launches = model.launches;
    // At most one batch for each token of others that stands before it, and those that had left.
    tracked->launches_max =
        MODEL_CONNECTIONS * (ahead + options->batch_tokens_max) + options->batches + options->lanes;
    doing(DOING_COMMIT, tracked, false);
    batcher_commit(batcher, job);
    doing(DOING_NOTHING, NULL, false);
}

void model_abandon(struct batcher *batcher, struct job *job)
{
    struct tracked *tracked = find(job);
    doing(DOING_ABANDON, tracked, false);
    batcher_abandon(batcher, job);
    doing(DOING_NOTHING, NULL, false);
    forget(tracked);
}

void model_release(struct batcher *batcher, struct job *job)
{
    struct tracked *tracked = find(job);
    MUST(tracked && tracked->told_done, "a job is let go that is not done");
    doing(DOING_RELEASE, tracked, false);
    batcher_release(batcher, job);
    doing(DOING_NOTHING, NULL, false);
    forget(tracked);
}

// ---- the engine

static struct tracked *find_output(const struct einsum_operand *operand)
{
    for (uint32_t i = 0; i < JOBS_MAX; i++) {
        struct tracked *tracked = &model.jobs[i];
        if (tracked->job && tracked->has_room && tracked->job->operand.output == operand->output)
            return tracked;
    }
    MUST(false, "the engine gets a row of nobody");
    return NULL;
}

static void check_turn(void)
{
    const struct batcher *batcher = model.batcher;
    MUST(!sim_holds(&batcher->lock), "the engine is called with the lock held");
    MUST(batcher->options.ops->polled ? sim_current() == model.scheduler
                                      : sim_holds(&batcher->turn),
         "the engine is called without the turn");
}

static void check_segment(const struct engine_segment *segment, const struct engine_segment *last)
{
    struct tracked *tracked = find_output(&segment->operand);
    const struct job *job = tracked->job;
    MUST(tracked->state == JOB_RUNNING && tracked->committed, "a job is launched in state %d",
         (int)tracked->state);
    MUST(!tracked->launched, "a job is launched twice");
    MUST(!job_cancelled(job), "a job is launched that is cancelled");
    MUST(job->deadline_ns > sim_time(), "a job is launched after its deadline");
    MUST(segment->operand.tokens == tracked->tokens, "a job is launched with other tokens");
    MUST(segment->weight == job->weight->engine_weight, "a job is launched with another weight");
    MUST(segment->kernel == job->kernel, "a job is launched with another kernel");
    MUST(!last || last->weight <= segment->weight, "requests for a weight do not stand together");
    MUST(!last || last->weight != segment->weight || last->kernel <= segment->kernel,
         "requests for a kernel do not stand together");
    tracked->launched = true;
    for (uint32_t i = 0; i < JOBS_MAX; i++) {
        const struct tracked *other = &model.jobs[i];
        MUST(!other->job || !other->waits || other->connection != tracked->connection ||
                 other->priority != tracked->priority || other->share_end > tracked->share_start,
             "a job overtakes one of its own connection");
    }
    if (tracked->priority == JOB_PRIORITY_HIGH || model.one_class)
        MUST(model.launches - tracked->launches <= tracked->launches_max,
             "a job has waited for %" PRIu64 " batches", model.launches - tracked->launches);
}

void model_submitted(uint32_t lane, const struct engine_batch *batch)
{
    const struct batcher_options *options = &model.batcher->options;
    check_turn();
    MUST(lane < options->lanes && !model.lanes[lane], "lane %u is busy", lane);
    MUST(model.launching && batch == &model.launching->launch, "another batch is launched");
    model.lanes[lane] = batch;
    model.launches++;
    MUST(batch->segments_n >= 1 && batch->segments_n <= options->batch_requests_max,
         "a batch of %u requests", batch->segments_n);
    uint32_t tokens = 0;
    for (uint32_t i = 0; i < batch->segments_n; i++) {
        check_segment(&batch->segments[i], i ? &batch->segments[i - 1] : NULL);
        tokens += batch->segments[i].operand.tokens;
    }
    MUST(batch->tokens == tokens, "a batch of %u tokens counts %u", tokens, batch->tokens);
    MUST(batch->bucket < options->buckets_n && tokens <= options->buckets[batch->bucket],
         "%u tokens are more than the bucket has", tokens);
    MUST(batch->bucket == 0 || tokens > options->buckets[batch->bucket - 1],
         "%u tokens would fit a smaller bucket", tokens);
    for (uint32_t i = 0; i < batch->segments_n; i++) {
        const struct job *job = find_output(&batch->segments[i].operand)->job;
        MUST(job->batch_tokens == tokens && job->batch_requests == batch->segments_n &&
                 job->batch_bucket == options->buckets[batch->bucket],
             "a job is told of another batch");
    }
}

void model_finished(uint32_t lane, enum status status)
{
    const struct engine_batch *batch = model.lanes[lane];
    MUST(batch, "lane %u is idle", lane);
    model.lanes[lane] = NULL;
    model.device_gone = model.device_gone || status == STATUS_UNAVAILABLE;
    for (uint32_t i = 0; i < batch->segments_n; i++) {
        struct tracked *tracked = find_output(&batch->segments[i].operand);
        tracked->finished = true;
        tracked->engine_status = status;
    }
}

void model_polled(void)
{
    check_turn();
}

// ---- from the first to the last

void model_begin(struct batcher *batcher, int scheduler)
{
    memset(&model, 0, sizeof model);
    model.batcher = batcher;
    model.scheduler = scheduler;
    model.one_class = true;
    sim_hooks = (struct sim_hooks){.locked = on_locked, .unlocking = on_unlocking};
}

void model_idle(void)
{
    const struct batcher *batcher = model.batcher;
    const struct batcher_options *options = &batcher->options;
    struct batcher_stats stats;
    batcher_stats(model.batcher, &stats);
    uint32_t free_n = atomic_load(&batcher->free_n), open_n = batcher->open ? 1 : 0;
    MUST(model_jobs() == 0, "%u jobs are left", model_jobs());
    MUST(stats.jobs == 0 && stats.queued == 0, "%u jobs are counted", stats.jobs);
    MUST(stats.queued_tokens == 0 && stats.queued_bytes == 0, "%" PRIu64 " bytes are counted",
         stats.queued_bytes);
    MUST(free_n + open_n == options->batches, "%u of %u buffers are free", free_n,
         options->batches);
    MUST(!batcher->open || (batcher->open->held == 0 && batcher->open->input_used == 0 &&
                            batcher->open->output_used == 0 && batcher->open->input_staged == 0 &&
                            batcher->open->output_staged == 0 && batcher->open->tokens == 0),
         "room is left over");
    MUST(batcher->lanes_free == options->lanes, "%u lanes are free", batcher->lanes_free);
    MUST(batcher->running_tokens == 0, "%u tokens run", batcher->running_tokens);
    MUST(!model.launching, "a batch is on its way");
    MUST(batcher_device_lost(model.batcher) == model.device_gone, "a lost device goes unseen");
    for (uint32_t i = 0; i < options->lanes; i++)
        MUST(!model.lanes[i], "lane %u is busy", i);
}

void model_end(void)
{
    sim_hooks = (struct sim_hooks){0};
    model.batcher = NULL;
}
