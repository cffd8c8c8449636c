// The jobs: who owns each, what it was told, and what the engine may be given. See model.h.
#include <inttypes.h>
#include <string.h>

#include "model_internal.h"

struct model model;

uint32_t model_index_of(const struct batch *batch)
{
    return (uint32_t)(batch - model.batcher->batches);
}

struct tracked *model_find(const struct job *job)
{
    for (uint32_t i = 0; i < MODEL_JOBS_MAX; i++)
        if (model.jobs[i].job == job)
            return &model.jobs[i];
    return NULL;
}

static struct tracked *track(struct job *job)
{
    struct tracked *tracked = model_find(NULL);
    MUST(tracked, "the test has too many jobs");
    *tracked = (struct tracked){.job = job, .owner = sim_current()};
    return tracked;
}

bool model_before(enum job_priority priority, uint64_t share_end, enum job_priority than_priority,
                  uint64_t than_share_end)
{
    if (priority != than_priority)
        return priority > than_priority;
    return share_end < than_share_end;
}

bool model_tracked_before(const struct tracked *a, const struct tracked *b)
{
    return model_before(a->priority, a->share_end, b->priority, b->share_end);
}

uint32_t model_jobs(void)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < MODEL_JOBS_MAX; i++)
        n += model.jobs[i].job != NULL;
    return n;
}

uint64_t model_launches(void)
{
    return model.launches;
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
    struct tracked *tracked = model_find(job);
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
    struct tracked *tracked = model_find(job);
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
    struct tracked *tracked = model_find(job);
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
    tracked->waiting_bytes = model_waiting_bytes(job);
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
    struct tracked *tracked = model_find(job);
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
    struct tracked *tracked = model_find(job);
    doing(DOING_ABANDON, tracked, false);
    batcher_abandon(batcher, job);
    doing(DOING_NOTHING, NULL, false);
    forget(tracked);
}

void model_release(struct batcher *batcher, struct job *job)
{
    struct tracked *tracked = model_find(job);
    MUST(tracked && tracked->told_done, "a job is let go that is not done");
    doing(DOING_RELEASE, tracked, false);
    batcher_release(batcher, job);
    doing(DOING_NOTHING, NULL, false);
    forget(tracked);
}

// ---- the engine

static struct tracked *find_output(const struct einsum_operand *operand)
{
    for (uint32_t i = 0; i < MODEL_JOBS_MAX; i++) {
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
    for (uint32_t i = 0; i < MODEL_JOBS_MAX; i++) {
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
    sim_hooks = (struct sim_hooks){.locked = model_on_locked, .unlocking = model_on_unlocking};
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
