// What must hold of the batcher at the end of each hold of its lock: what is there adds up, and what
// changed may have.
#include <inttypes.h>
#include <string.h>

#include "kernels/attention.h"
#include "model_internal.h"

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

uint64_t model_waiting_bytes(const struct job *job)
{
    return needs_of(job).waiting;
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
    for (uint32_t i = 0; i < MODEL_JOBS_MAX; i++) {
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
        .open = batcher->open ? (int)model_index_of(batcher->open) : -1,
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
        seen->queue[seen->queue_n++] = model_index_of(batch);
    }
    for (struct job *job = batcher->waiting; job; job = job->next_waiting) {
        MUST(seen->waiting_n < MODEL_WAITING_MAX, "more jobs wait than may");
        seen->waiting[seen->waiting_n++] = job;
    }
}

// ---- what is there now must add up

static void check_batch(const struct batch *batch)
{
    const struct batcher_options *options = &model.batcher->options;
    uint32_t tokens = 0, held = 0, filling = 0;
    for (uint32_t i = 0; i < MODEL_JOBS_MAX; i++) {
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
    MUST(batch->jobs_n == 0 ||
             batch->first_commit_ns == model.first_commit_ns[model_index_of(batch)],
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
        const struct tracked *tracked = model_find(now->waiting[i]);
        MUST(tracked && tracked->waits, "a job waits that should not");
        const struct tracked *last = i ? model_find(now->waiting[i - 1]) : NULL;
        MUST(!last || !model_tracked_before(tracked, last), "the jobs do not wait in their order");
        bytes += tracked->waiting_bytes;
        tokens += tracked->tokens;
    }
    MUST(now->waiting_n == 0 || batcher->waiting_last == now->waiting[now->waiting_n - 1],
         "the last that waits is not the last");
    uint32_t waits = 0;
    for (uint32_t i = 0; i < MODEL_JOBS_MAX; i++)
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
    for (uint32_t i = 0; i < MODEL_JOBS_MAX; i++) {
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
    MUST(!model.batcher->options.ops->serial || seen->running_tokens < MODEL_SERIAL_TOKENS,
         "a serial engine gets a batch behind a long one");
    MUST(due(batch), "a batch leaves too early");
    const struct standing *standing = &model.standing[index];
    for (uint32_t i = 0; i < seen->queue_n; i++) {
        uint32_t other = seen->queue[i];
        const struct standing *its = &model.standing[other];
        MUST(other == index || !could_have_left(&seen->batches[other]) ||
                 !model_before(its->priority, its->share_end, standing->priority,
                               standing->share_end),
             "batch %u leaves before batch %u", index, other);
    }
}

// A job has got its room.
static void check_seated(struct tracked *tracked, const struct seen *now, bool patient)
{
    const struct job *job = tracked->job;
    const struct batcher_options *options = &model.batcher->options;
    uint32_t index = model_index_of(job->batch);
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
    if (model_before(tracked->priority, tracked->share_end, standing->priority,
                     standing->share_end))
        *standing = (struct standing){tracked->priority, tracked->share_end};
    if (tracked->share_start > model.share_start_last[index])
        model.share_start_last[index] = tracked->share_start;
    check_room(tracked);
    for (uint32_t i = 0; i < now->waiting_n; i++)
        MUST(!model_tracked_before(model_find(now->waiting[i]), tracked),
             "a job overtakes one that waits and stands before it");
    bool keeps_one = patient && options->batches >= options->lanes + MODEL_BUFFERS_TO_KEEP_ONE &&
                     model.seen.free_n == 1 && now->free_n == 0;
    for (uint32_t i = 0; i < now->queue_n && opened && keeps_one; i++) {
        const struct standing *its = &model.standing[now->queue[i]];
        MUST(now->queue[i] == index ||
                 model_before(tracked->priority, tracked->share_end, its->priority, its->share_end),
             "the last buffer goes to one that does not stand before all");
    }
}

static bool had_room(const struct tracked *tracked, bool patient)
{
    const struct seen *seen = &model.seen;
    const struct batcher_options *options = &model.batcher->options;
    struct needs needs = needs_of(tracked->job);
    if (seen->waiting_n > 0 && !model_tracked_before(tracked, model_find(seen->waiting[0])))
        return false;
    if (seen->open >= 0) {
        const struct seen_batch *open = &seen->batches[seen->open];
        if (open->tokens + tracked->tokens <= options->batch_tokens_max &&
            open->held < options->batch_requests_max && needs.input <= open->input_left &&
            needs.output <= open->output_left)
            return true;
    }
    bool keeps_one = options->batches >= options->lanes + MODEL_BUFFERS_TO_KEEP_ONE;
    if (!patient || !keeps_one || seen->free_n != 1)
        return seen->free_n > 0;
    for (uint32_t i = 0; i < seen->queue_n; i++) {
        const struct standing *its = &model.standing[seen->queue[i]];
        if (!model_before(tracked->priority, tracked->share_end, its->priority, its->share_end))
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
        const struct tracked *other = model_find(seen->waiting[i]);
        if (!model_tracked_before(tracked, other))
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
        struct tracked *tracked = model_find(model.seen.waiting[i]);
        bool still = false;
        for (uint32_t j = 0; j < now->waiting_n; j++)
            still = still || now->waiting[j] == model.seen.waiting[i];
        if (still || !tracked || tracked->has_room)
            continue;
        tracked->waits = false;
        tracked->lost = lost;
        tracked->pushed_out = !lost;
        MUST(lost || (by && model_tracked_before(by, tracked)),
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
        if (model.first_commit_ns[model_index_of(tracked->batch)] == 0)
            model.first_commit_ns[model_index_of(tracked->batch)] = tracked->job->queued_ns;
        return NULL;
    case DOING_ABANDON:
    case DOING_RELEASE:
        tracked->has_room = tracked->pushed_out = tracked->lost = false;
        return NULL;
    }
    return NULL;
}

void model_on_locked(const pthread_mutex_t *mutex)
{
    if (!model.batcher || mutex != &model.batcher->lock)
        return;
    see(&model.seen);
    memset(model.opened, 0, sizeof model.opened);
}

void model_on_unlocking(const pthread_mutex_t *mutex)
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
        struct tracked *tracked = model_find(model.seen.waiting[i]);
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
