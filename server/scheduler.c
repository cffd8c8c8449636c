// The scheduler: launches batches on free lanes, collects what the engine has finished, and answers
// the jobs. Its thread does so, or, while that sleeps, whoever calls batcher_turn. One turn:
//
//     collect the lanes that are done -> launch on all free lanes -> answer what was collected
//     -> give the jobs that wait what room there is now
//
// Launching comes before answering so that the device does not wait for replies.
//
// The thread sleeps on one word, the waker, and so cannot miss a wake: its turns begin by clearing the
// word, every waker sets it after its change, and sleeping is refused while it is set. With a
// polled engine it watches the word and the lanes for a while before it sleeps, so that neither a
// short batch nor the one that follows it costs a wake-up; then it naps while lanes are busy.
//
// Who takes the turn of a sleeping thread borrows the word with it: a wake then sets the word and
// costs no system call, and the borrower takes another turn.
#include "batch_internal.h"

#include <signal.h>
#include <string.h>

#include "futex.h"

enum waker_word { WAKER_CLEAR, WAKER_SET, WAKER_SLEEPING, WAKER_BORROWED };

enum { BORROWED_TURNS_MAX = 8 }; // then the thread may as well get up

// Of a polled engine: after a launch or a batch's end, what comes next is waited for without
// sleeping so long; batches that run longer are looked at so often that it does not matter.
enum { POLL_SPIN_NS = 200000, POLL_NAP_NS = 50000 };

void batcher_wake(void *context)
{
    struct batcher_waker *waker = context;
    uint32_t was = atomic_exchange_explicit(&waker->word, WAKER_SET, memory_order_acq_rel);
    if (was == WAKER_SLEEPING)
        futex_wake(&waker->word, 1);
}

// Acquires all that was written before any batcher_wake up to now.
static void waker_clear(struct batcher_waker *waker)
{
    atomic_exchange_explicit(&waker->word, WAKER_CLEAR, memory_order_acq_rel);
}

static bool waker_is_set(struct batcher_waker *waker)
{
    return atomic_load_explicit(&waker->word, memory_order_relaxed) == WAKER_SET;
}

static bool waker_change(struct batcher_waker *waker, uint32_t from, uint32_t to)
{
    return atomic_compare_exchange_strong_explicit(&waker->word, &from, to, memory_order_acq_rel,
                                                   memory_order_relaxed);
}

static void waker_sleep(struct batcher_waker *waker, uint64_t until_ns)
{
    if (waker_change(waker, WAKER_CLEAR, WAKER_SLEEPING))
        futex_wait(&waker->word, WAKER_SLEEPING, until_ns);
}

// --- launch

static void answer_job(struct job *job, enum job_state from)
{
    void (*on_done)(struct job *) = job->on_done;
    job_advance(job, from, JOB_DONE);
    on_done(job); // may have released the job already
}

// Why a job is not launched; OK if it is.
static enum status drop_reason(const struct job *job, uint64_t now, bool device_lost,
                               struct error *err)
{
    if (device_lost)
        return error_set(err, STATUS_UNAVAILABLE, "the device is lost");
    if (job->deadline_ns <= now)
        return error_set(err, STATUS_DEADLINE_EXCEEDED, "deadline passed before launch");
    if (job_cancelled(job))
        return error_set(err, STATUS_CANCELLED, "cancelled before launch");
    return STATUS_OK;
}

// Moves the jobs to be dropped behind those to be launched, and returns how many are left.
static uint32_t batch_drop_jobs(struct batch *batch, uint64_t now, bool device_lost)
{
    uint32_t keep = 0;
    for (uint32_t i = 0; i < batch->jobs_n; i++) {
        struct job *job = batch->jobs[i];
        if (drop_reason(job, now, device_lost, &job->error)) {
            job->launched_ns = job->done_ns = now;
            job->batch_tokens = job->batch_bucket = job->batch_requests = 0;
            continue;
        }
        batch->jobs[i] = batch->jobs[keep];
        batch->jobs[keep++] = job;
    }
    return keep;
}

// Jobs that can share a reading of their weight are equal under this order.
static bool stands_behind(const struct job *a, const struct job *b)
{
    uintptr_t weight_a = (uintptr_t)a->weight->engine_weight;
    uintptr_t weight_b = (uintptr_t)b->weight->engine_weight;
    return weight_a != weight_b ? weight_a > weight_b : a->kernel > b->kernel;
}

// Shell's sort: in place, no allocation, and little work on the usual batch, which is in order or
// nearly so.
static void jobs_sort_by_weight(struct job **jobs, uint32_t n)
{
    static const uint32_t gaps[] = {701, 301, 132, 57, 23, 10, 4, 1};
    for (size_t g = 0; g < ARRAY_LEN(gaps); g++) {
        uint32_t gap = gaps[g];
        for (uint32_t i = gap; i < n; i++) {
            struct job *job = jobs[i];
            uint32_t at = i;
            for (; at >= gap && stands_behind(jobs[at - gap], job); at -= gap)
                jobs[at] = jobs[at - gap];
            jobs[at] = job;
        }
    }
}

static uint32_t bucket_for(const struct batcher_options *options, uint32_t tokens)
{
    uint32_t bucket = 0;
    while (options->buckets[bucket] < tokens)
        bucket++;
    return bucket;
}

// Describes the first `n` jobs to the engine, and the batch to its jobs.
static void batch_prepare(struct batcher *batcher, struct batch *batch, uint32_t n, uint64_t now)
{
    jobs_sort_by_weight(batch->jobs, n);
    uint32_t tokens = 0;
    batch->weights_n = 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct job *job = batch->jobs[i];
        batch->segments[i] = (struct engine_segment){
            .weight = job->weight->engine_weight,
            .operand = job->operand,
            .kernel = job->kernel,
            .staged_input = job->staged_input_bytes ? job->staged_input : NULL,
            .staged_output =
                job->staged_output_bytes ? (void *)(uintptr_t)job->staged_output : NULL,
        };
        tokens += job->operand.tokens;
        if (i == 0 || batch->jobs[i - 1]->weight != job->weight) {
            batch->weights_n++;
            atomic_fetch_add_explicit(&job->weight->counters.batches, 1, memory_order_relaxed);
        }
    }
    uint32_t bucket = bucket_for(&batcher->options, tokens);
    for (uint32_t i = 0; i < n; i++) {
        struct job *job = batch->jobs[i];
        job->launched_ns = now;
        job->batch_tokens = tokens;
        job->batch_bucket = batcher->options.buckets[bucket];
        job->batch_requests = n;
        job_advance(job, JOB_QUEUED, JOB_RUNNING);
    }
    batch->launched_ns = now;
    batch->launch = (struct engine_batch){
        .segments = batch->segments,
        .segments_n = n,
        .tokens = tokens,
        .bucket = bucket,
        .input = batch->input,
        .input_bytes = batch->input_used,
        .output = batch->output,
        .output_bytes = batch->output_used,
        .input_staged = batch->input_staged,
        .output_staged = batch->output_staged,
    };
}

static void batch_submit(struct batcher *batcher, struct batch *batch)
{
    uint32_t lane = 0;
    while (batcher->lanes[lane])
        lane++;
    ASSERT(lane < batcher->options.lanes);
    batcher->lanes[lane] = batch;
    batcher->active_last_ns = batch->launched_ns;
    batcher->options.ops->submit(batcher->options.engine, lane, &batch->launch);
}

static void mix_add(struct batcher_mix *mix, uint32_t n)
{
    uint32_t bucket = 0;
    while (bucket < BATCH_MIX_BOUNDS && n > 1u << bucket)
        bucket++;
    mix->buckets[bucket]++;
    mix->sum += n;
}

// Counts a batch that was dequeued: `keep` jobs of it run, the others are about to be answered.
static void account_launch_locked(struct batcher *batcher, struct batch *batch, uint32_t keep)
{
    struct batcher_stats *stats = &batcher->stats;
    for (uint32_t i = keep; i < batch->jobs_n; i++) {
        enum status status = batch->jobs[i]->error.status;
        stats->expired += status == STATUS_DEADLINE_EXCEEDED;
        stats->cancelled += status == STATUS_CANCELLED;
        stats->failed += status == STATUS_UNAVAILABLE;
    }
    stats->queued -= batch->jobs_n;
    batch->jobs_n = keep;
    if (keep == 0) {
        batch_answering_locked(batcher, batch);
        return;
    }
    batch->watched_ns = batch->launched_ns;
    if (batcher->lanes_free-- == batcher->options.lanes)
        batcher->busy_since_ns = batch->launched_ns;
    batcher->running_tokens += batch->launch.tokens;
    stats->batches++;
    stats->requests += keep;
    stats->tokens += batch->launch.tokens;
    stats->padding_tokens += batcher->options.buckets[batch->launch.bucket] - batch->launch.tokens;
    stats->queue_ns += batch->launched_ns - batch->first_commit_ns;
    stats->bucket_batches[batch->launch.bucket]++;
    mix_add(&stats->batch_requests, keep);
    mix_add(&stats->batch_weights, batch->weights_n);
}

// Takes a batch of the queue that may leave now.
static struct batch *next_batch(struct batcher *batcher, uint64_t now)
{
    struct batch *batch = NULL;
    pthread_mutex_lock(&batcher->lock);
    if (batcher_launch_at_ns_locked(batcher) <= now)
        batch = batcher_ready_locked(batcher, now);
    if (batch)
        batcher_dequeue_locked(batcher, batch);
    pthread_mutex_unlock(&batcher->lock);
    return batch;
}

// False if there was nothing to launch.
static bool launch_next(struct batcher *batcher)
{
    struct batch *batch = next_batch(batcher, now_ns());
    if (!batch)
        return false;
    uint64_t now = now_ns(); // after the last commit: a job is not launched before it is queued

    uint32_t jobs_n = batch->jobs_n;
    uint32_t keep = batch_drop_jobs(batch, now, batcher_device_lost(batcher));
    if (keep > 0) {
        batch_prepare(batcher, batch, keep, now);
        batch_submit(batcher, batch);
    }
    pthread_mutex_lock(&batcher->lock);
    account_launch_locked(batcher, batch, keep);
    pthread_mutex_unlock(&batcher->lock);

    // With none left to run, the batch may be free, and taken again, once its last job is answered.
    struct job **dropped = batch->jobs;
    for (uint32_t i = keep; i < jobs_n; i++)
        answer_job(dropped[i], JOB_QUEUED);
    return true;
}

// --- complete

static void account_phases_locked(struct batcher_stats *stats, const struct engine_result *result)
{
    if (result->kernel_ns == 0)
        return;
    stats->phase_batches++;
    metrics_observe_locked(&stats->copy_in, result->copy_in_ns);
    metrics_observe_locked(&stats->kernel, result->kernel_ns);
    metrics_observe_locked(&stats->copy_out, result->copy_out_ns);
}

static void account_done_locked(struct batcher *batcher, struct batch *batch, uint64_t now)
{
    batch->watched_ns = 0;
    batcher->done_last_ns = now;
    batcher->running_tokens -= batch->launch.tokens;
    if (++batcher->lanes_free == batcher->options.lanes)
        batcher->stats.busy_ns += now - batcher->busy_since_ns;
    if (batch->result.status) {
        batcher->stats.failed += batch->jobs_n;
    } else {
        account_phases_locked(&batcher->stats, &batch->result);
        uint64_t run_ns = now - batch->launched_ns, average_ns = batcher->run_ns_average;
        batcher->run_ns_average = average_ns ? (7 * average_ns + run_ns) / 8 : run_ns;
        metrics_observe_locked(&batcher->stats.run, run_ns);
    }
    if (batch->result.status == STATUS_UNAVAILABLE)
        atomic_store_explicit(&batcher->device_lost, true, memory_order_release);
    batch_answering_locked(batcher, batch);
}

// The batches that the engine has finished with, linked by `next`; their lanes are free.
static struct batch *collect_done(struct batcher *batcher)
{
    const struct batcher_options *options = &batcher->options;
    struct batch *done = NULL, **done_end = &done;
    for (uint32_t lane = 0; lane < options->lanes; lane++) {
        struct batch *batch = batcher->lanes[lane];
        if (!batch || !options->ops->poll(options->engine, lane, &batch->result))
            continue;
        batcher->lanes[lane] = NULL;
        *done_end = batch;
        done_end = &batch->next;
        uint64_t now = now_ns();
        batcher->active_last_ns = now;
        pthread_mutex_lock(&batcher->lock);
        account_done_locked(batcher, batch, now);
        pthread_mutex_unlock(&batcher->lock);
    }
    return done;
}

static void batch_answer(struct batch *batch)
{
    const struct engine_result *result = &batch->result;
    uint64_t done_ns = result->status ? now_ns() : result->ended_ns;
    uint32_t jobs_n = batch->jobs_n;
    for (uint32_t i = 0; i < jobs_n; i++) {
        struct job *job = batch->jobs[i];
        job->done_ns = done_ns;
        if (result->status) {
            job->error = result->error;
            job->error.status = result->status;
        } else {
            job->error.status = STATUS_OK;
            job->error.retry_after_ms = 0;
            job->error.field[0] = job->error.text[0] = '\0';
        }
        // After the last one, the batch may be free, and taken again.
        answer_job(job, JOB_RUNNING);
    }
}

// Batches came free, or none ever will again.
static void serve_waiting(struct batcher *batcher)
{
    if (!batcher_device_lost(batcher)) {
        batcher_give_room(batcher);
        return;
    }
    uint64_t now = now_ns();
    struct job *job = batcher_take_waiting(batcher);
    while (job) {
        struct job *next = job->next_waiting;
        job->queued_ns = job->launched_ns = job->done_ns = now;
        error_set(&job->error, STATUS_UNAVAILABLE, "the device is lost");
        answer_job(job, JOB_WAITING);
        job = next;
    }
}

// --- the thread

static bool any_lane_busy(const struct batcher *batcher)
{
    for (uint32_t lane = 0; lane < batcher->options.lanes; lane++)
        if (batcher->lanes[lane])
            return true;
    return false;
}

// Tells the other hardware thread of this core that this one only waits.
static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Until `until_ns`, or a wake, or the end of a batch, without the lock: what came to an end.
static struct batch *watch_lanes(struct batcher *batcher, uint64_t until_ns)
{
    struct batch *done = NULL;
    beat_turn(&batcher->beat);
    do {
        relax();
        done = collect_done(batcher);
    } while (!done && !waker_is_set(batcher->waker) && now_ns() < until_ns);
    beat_turn(&batcher->beat);
    return done;
}

// False when the thread is to end. `done`: batches that ended meanwhile.
static bool sleep_until_needed(struct batcher *batcher, struct batch **done)
{
    uint64_t now = now_ns();
    pthread_mutex_lock(&batcher->lock);
    bool stopping = batcher->stopping;
    uint64_t launch_at_ns = batcher_launch_at_ns_locked(batcher);
    if (launch_at_ns > now) {
        batcher->scheduler_wakes_at_ns = batcher->scheduler_sleeps_until_ns = launch_at_ns;
        batcher->scheduler_sleeps = true;
    }
    pthread_mutex_unlock(&batcher->lock);
    if (stopping)
        return false;
    if (launch_at_ns <= now)
        return true;
    uint64_t spin_until_ns = batcher->active_last_ns + POLL_SPIN_NS;
    if (batcher->options.ops->polled && now < spin_until_ns) {
        *done = watch_lanes(batcher, spin_until_ns < launch_at_ns ? spin_until_ns : launch_at_ns);
    } else {
        if (batcher->options.ops->polled && any_lane_busy(batcher) &&
            launch_at_ns > now + POLL_NAP_NS)
            launch_at_ns = now + POLL_NAP_NS;
        waker_sleep(batcher->waker, launch_at_ns);
    }
    pthread_mutex_lock(&batcher->lock);
    batcher->scheduler_wakes_at_ns = 0;
    batcher->scheduler_sleeps = false;
    pthread_mutex_unlock(&batcher->lock);
    return true;
}

// `done`: batches that have ended already.
static void take_turn(struct batcher *batcher, struct batch *done)
{
    beat_turn(&batcher->beat);
    if (!done)
        done = collect_done(batcher);
    while (launch_next(batcher))
        ;
    while (done) {
        struct batch *next = done->next;
        batch_answer(done);
        done = next;
    }
    serve_waiting(batcher);
    beat_turn(&batcher->beat);
}

static void *scheduler_run(void *argument)
{
    struct batcher *batcher = argument;
    struct batch *done = NULL;
    do {
        pthread_mutex_lock(&batcher->turn);
        waker_clear(batcher->waker);
        take_turn(batcher, done);
        done = NULL;
        pthread_mutex_unlock(&batcher->turn);
    } while (sleep_until_needed(batcher, &done));
    return NULL;
}

// --- the turn of others

// As if the turns had not been: whoever was told that the thread is awake now has been served.
// False: it must get up, to end.
static bool go_on_sleeping(struct batcher *batcher)
{
    pthread_mutex_lock(&batcher->lock);
    bool stopping = batcher->stopping;
    if (batcher->scheduler_sleeps)
        batcher->scheduler_wakes_at_ns = batcher->scheduler_sleeps_until_ns;
    pthread_mutex_unlock(&batcher->lock);
    return !stopping;
}

static void take_borrowed_turns(struct batcher *batcher)
{
    struct batcher_waker *waker = batcher->waker;
    for (int turns = 0; turns < BORROWED_TURNS_MAX; turns++) {
        take_turn(batcher, NULL);
        if (!go_on_sleeping(batcher))
            break;
        // A wake since then has set the word. Nobody clears it, since that is done in the turn.
        if (waker_change(waker, WAKER_BORROWED, WAKER_SLEEPING))
            return;
        bool again = waker_change(waker, WAKER_SET, WAKER_BORROWED);
        ASSERT(again);
    }
    atomic_exchange_explicit(&waker->word, WAKER_SET, memory_order_acq_rel);
    futex_wake(&waker->word, 1);
}

void batcher_turn(struct batcher *batcher)
{
    if (!batcher->options.ops->polled && pthread_mutex_trylock(&batcher->turn) == 0) {
        if (waker_change(batcher->waker, WAKER_SLEEPING, WAKER_BORROWED))
            take_borrowed_turns(batcher);
        pthread_mutex_unlock(&batcher->turn);
    }
    pthread_mutex_lock(&batcher->lock);
    bool wake = batcher_must_wake_locked(batcher);
    pthread_mutex_unlock(&batcher->lock);
    if (wake)
        batcher_wake(batcher->waker);
}

// --- who watches

static const struct batch *longest_running_locked(const struct batcher *batcher)
{
    const struct batch *longest = NULL;
    for (uint32_t i = 0; i < batcher->options.batches; i++) {
        const struct batch *batch = &batcher->batches[i];
        if (batch->watched_ns > 0 && (!longest || batch->watched_ns < longest->watched_ns))
            longest = batch;
    }
    return longest;
}

void batcher_running(struct batcher *batcher, struct batcher_running *running)
{
    struct engine_info info;
    batcher->options.ops->describe(batcher->options.engine, &info);
    *running = (struct batcher_running){0};
    pthread_mutex_lock(&batcher->lock);
    const struct batch *batch = longest_running_locked(batcher);
    if (batch) { // its jobs are answered only once its end was noted under the lock
        const struct job *job = batch->jobs[0];
        running->requests = batch->jobs_n;
        running->tokens = batch->launch.tokens;
        running->bucket = batcher->options.buckets[batch->launch.bucket];
        running->weights = batch->weights_n;
        memcpy(running->weight, job->weight->name, sizeof running->weight);
        running->kernel = job->kernel ? info.kernels[job->kernel - 1] : "auto";
        running->since_ns = batch->watched_ns;
        if (batcher->options.ops->serial && batcher->done_last_ns > running->since_ns)
            running->since_ns = batcher->done_last_ns;
    }
    pthread_mutex_unlock(&batcher->lock);
}

const struct beat *batcher_beat(const struct batcher *batcher)
{
    return &batcher->beat;
}

enum status scheduler_start(struct batcher *batcher, struct error *err)
{
    // Signals are main's.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&batcher->scheduler, NULL, scheduler_run, batcher);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "starting the scheduler thread: %s",
                         strerror(failed));
    pthread_setname_np(batcher->scheduler, "scheduler");
    return STATUS_OK;
}

void scheduler_stop(struct batcher *batcher)
{
    pthread_mutex_lock(&batcher->lock);
    batcher->stopping = true;
    pthread_mutex_unlock(&batcher->lock);
    batcher_wake(batcher->waker);
    pthread_join(batcher->scheduler, NULL);
}
