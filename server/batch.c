// The batches, the room in them, and the lock around both. Called by rpc threads (reserve, commit,
// abandon, release) and by the scheduler thread (batch_internal.h).
//
//     input  | activations | scales | attention | rotations | ...  --> <-- ... | staged | staged |
//     output | result               | result                | ...  --> <-- ... | staged | staged |
//
// Each at 64 bytes; bump allocation, from both ends: what callers' memory is staged in, on the
// device alone, is kept apart from what goes to the device in one copy.
//
// Room that is abandoned is dead until its batch is free again, unless it was the last or the only
// room taken. A held lock never covers a tensor's copy, a system call or an engine's work.
#include "batch_internal.h"

#include <inttypes.h>
#include <stdlib.h>

#include "../kernels/attention.h"

enum { RETRY_MS_MIN = 1, RETRY_MS_MAX = 1000, BUFFERS_BEYOND_LANES_TO_KEEP_ONE = 3 };

// What one job needs of a batch.
struct room {
    uint32_t tokens;
    uint64_t second_offset; // in its input; of scales, or rotations if it is attention
    uint64_t input_bytes, output_bytes;
    uint64_t waiting_bytes; // kept elsewhere while it waits; a part's are counted with its request
    uint64_t staged_input, staged_output; // bytes
    bool part;                            // of a request that is cut
};

static uint64_t activation_bytes(const struct job *job, uint32_t tokens)
{
    uint32_t groups = job->operand.groups, reduced_dim = job->weight->format.reduced_dim;
    if (job->attention)
        return attention_bytes(tokens, groups, reduced_dim);
    return einsum_activation_bytes(tokens, groups, reduced_dim);
}

static uint64_t scale_or_rotation_bytes(const struct job *job, uint32_t tokens)
{
    const struct einsum_weight_format *format = &job->weight->format;
    const struct einsum_operand *operand = &job->operand;
    if (job->attention)
        return tokens * sizeof(struct attention_rotation);
    return einsum_scale_bytes(operand->scale_layout, operand->scale_type, tokens, operand->groups,
                              format->reduced_dim / format->block_r);
}

// Of so many of the job's tokens.
static struct room room_for_tokens(const struct job *job, uint32_t tokens, bool input_given)
{
    const struct einsum_operand *operand = &job->operand;
    uint64_t output = einsum_output_bytes(operand->output_type, tokens, operand->groups,
                                          job->weight->format.output_dim);
    uint64_t first = align_up(activation_bytes(job, tokens), CACHE_LINE_BYTES);
    uint64_t second = align_up(scale_or_rotation_bytes(job, tokens), CACHE_LINE_BYTES);
    output = align_up(output, CACHE_LINE_BYTES);
    // Rotations are ours, wherever the attention lies.
    uint64_t given = !input_given ? 0 : job->attention ? first : first + second;
    uint64_t input = first + second - given;
    return (struct room){
        .tokens = tokens,
        .second_offset = first,
        .input_bytes = input,
        .output_bytes = job->output_given ? 0 : output,
        .waiting_bytes = job->whole ? 0 : input,
        .staged_input = job->staged ? given : 0,
        .staged_output = job->staged && job->output_given ? output : 0,
        .part = job->whole != NULL,
    };
}

static struct room room_for(const struct job *job)
{
    return room_for_tokens(job, job->operand.tokens, job->input_given);
}

static enum status room_fits_empty_batch(const struct room *room, bool attention,
                                         const struct batcher_options *options, struct error *err)
{
    if (room->tokens > options->batch_tokens_max)
        return error_field(err, STATUS_INVALID_ARGUMENT, "tokens",
                           "a batch holds at most %" PRIu32 ", got %" PRIu32,
                           options->batch_tokens_max, room->tokens);
    uint64_t input_bytes = room->input_bytes + room->staged_input;
    uint64_t output_bytes = room->output_bytes + room->staged_output;
    if (input_bytes > options->batch_input_bytes)
        return error_field(err, STATUS_INVALID_ARGUMENT, attention ? "attention" : "activations",
                           "a batch holds at most %" PRIu64 " bytes of %s, got %" PRIu64,
                           options->batch_input_bytes,
                           attention ? "attention and rotations" : "activations and scales",
                           input_bytes);
    if (output_bytes > options->batch_output_bytes)
        return error_field(err, STATUS_INVALID_ARGUMENT, "tokens",
                           "a batch holds at most %" PRIu64
                           " bytes of output, this request needs %" PRIu64,
                           options->batch_output_bytes, output_bytes);
    return STATUS_OK;
}

struct batcher_cut batcher_cut(const struct batcher *batcher, const struct job *job)
{
    const struct batcher_options *options = &batcher->options;
    struct batcher_cut cut = {.tokens = job->operand.tokens, .at_once = options->lanes + 1};
    struct room room = room_for(job);
    if (room_fits_empty_batch(&room, job->attention, options, NULL) == STATUS_OK)
        return cut;
    uint32_t fits = 0, too_many = cut.tokens;
    if (too_many > options->batch_tokens_max)
        too_many = options->batch_tokens_max + 1;
    while (too_many - fits > 1) {
        uint32_t tokens = fits + (too_many - fits) / 2;
        // A part may have to be copied in where the whole would not: its rows may lie apart.
        room = room_for_tokens(job, tokens, false);
        if (room_fits_empty_batch(&room, job->attention, options, NULL) == STATUS_OK)
            fits = tokens;
        else
            too_many = tokens;
    }
    cut.tokens = fits;
    return cut;
}

// --- who goes first

static bool stands_before(enum job_priority priority, uint64_t share_end,
                          enum job_priority other_priority, uint64_t other_share_end)
{
    return priority != other_priority ? priority > other_priority : share_end < other_share_end;
}

static bool job_stands_before(const struct job *job, const struct job *other)
{
    return stands_before(job->priority, job->share_end, other->priority, other->share_end);
}

// A connection's jobs lie one behind the other on a scale of tokens, each as long as it is, from
// where the scale is now; who ends first stands first.
static void job_stand_locked(struct batcher *batcher, struct job *job)
{
    if (job->priority == JOB_PRIORITY_UNSET)
        job->priority = JOB_PRIORITY_NORMAL;
    uint64_t *end = &batcher->share_ends[job->connection % CONNECTIONS_TOLD_APART];
    job->share_start = *end > batcher->share_now ? *end : batcher->share_now;
    job->share_end = job->share_start + job->operand.tokens;
    *end = job->share_end;
}

static bool room_left_locked(const struct batcher *batcher, const struct batch *batch,
                             const struct room *room)
{
    const struct batcher_options *options = &batcher->options;
    return room->tokens <= options->batch_tokens_max - batch->tokens &&
           room->input_bytes + room->staged_input <=
               options->batch_input_bytes - batch->input_used - batch->input_staged &&
           room->output_bytes + room->staged_output <=
               options->batch_output_bytes - batch->output_used - batch->output_staged &&
           batch->held < options->batch_requests_max;
}

// --- the life of a batch

static struct batch *batch_open_locked(struct batcher *batcher)
{
    ASSERT(!batcher->open);
    struct batch *batch = batcher->free;
    if (!batch)
        return NULL;
    ASSERT(batch->state == BATCH_FREE);
    batcher->free = batch->next;
    atomic_fetch_sub_explicit(&batcher->free_n, 1, memory_order_relaxed);
    batch->state = BATCH_OPEN;
    batch->next = NULL;
    batch->input_used = batch->output_used = 0;
    batch->input_staged = batch->output_staged = 0;
    batch->tokens = batch->filling = batch->held = batch->jobs_n = 0;
    batch->hurried = false;
    batch->priority = JOB_PRIORITY_LOW;
    batch->share_end = UINT64_MAX;
    batch->share_start_last = 0;
    *batcher->queue_end = batch;
    batcher->queue_end = &batch->next;
    batcher->queue_batches++;
    batcher->open = batch;
    return batch;
}

void batch_close_locked(struct batcher *batcher, struct batch *batch)
{
    ASSERT(batch == batcher->open && batch->state == BATCH_OPEN);
    batch->state = BATCH_CLOSED;
    batcher->open = NULL;
}

static void batch_free_locked(struct batcher *batcher, struct batch *batch)
{
    ASSERT(batch->held == 0);
    batch->state = BATCH_FREE;
    batch->next = batcher->free;
    batcher->free = batch;
    atomic_fetch_add_explicit(&batcher->free_n, 1, memory_order_relaxed);
}

static void batch_unlink_locked(struct batcher *batcher, struct batch *batch)
{
    struct batch **at = &batcher->queue;
    while (*at != batch)
        at = &(*at)->next;
    *at = batch->next;
    if (batcher->queue_end == &batch->next)
        batcher->queue_end = at;
    batcher->queue_batches--;
}

void batcher_dequeue_locked(struct batcher *batcher, struct batch *batch)
{
    ASSERT(batch->state == BATCH_CLOSED && batch->filling == 0);
    batch_unlink_locked(batcher, batch);
    batch->state = BATCH_RUNNING;
    batch->next = NULL;
    if (batch->share_start_last > batcher->share_now)
        batcher->share_now = batch->share_start_last;
}

void batch_answering_locked(struct batcher *batcher, struct batch *batch)
{
    ASSERT(batch->state == BATCH_RUNNING);
    batch->state = BATCH_ANSWERING;
    if (batch->held == 0)
        batch_free_locked(batcher, batch);
}

// --- when to launch

// A second batch in a serial engine's lanes spares it the pause between two, which of so many tokens
// takes no share worth having.
enum { SERIAL_TOKENS_MAX = 256 };

static bool lanes_taken_locked(const struct batcher *batcher)
{
    return batcher->lanes_free == 0 ||
           (batcher->options.ops->serial && batcher->running_tokens >= SERIAL_TOKENS_MAX);
}

static uint64_t batch_launch_at_ns_locked(const struct batcher *batcher, const struct batch *batch)
{
    if (atomic_load_explicit(&batcher->device_lost, memory_order_relaxed))
        return batch->filling ? UINT64_MAX : 0;
    if (lanes_taken_locked(batcher))
        return UINT64_MAX;
    if (batch->state == BATCH_CLOSED)
        return batch->filling ? UINT64_MAX : 0;
    if (batch->jobs_n == 0)
        return UINT64_MAX;
    uint64_t delay_ns = (uint64_t)batcher->options.max_queue_delay_us * 1000;
    return delay_ns && !batch->hurried ? batch->first_commit_ns + delay_ns : 0;
}

uint64_t batcher_launch_at_ns_locked(const struct batcher *batcher)
{
    uint64_t at_ns = UINT64_MAX;
    for (const struct batch *batch = batcher->queue; batch; batch = batch->next) {
        uint64_t this_ns = batch_launch_at_ns_locked(batcher, batch);
        at_ns = this_ns < at_ns ? this_ns : at_ns;
    }
    return at_ns;
}

struct batch *batcher_ready_locked(struct batcher *batcher, uint64_t now_ns)
{
    struct batch *ready = NULL;
    bool open_is_due = false;
    for (struct batch *batch = batcher->queue; batch; batch = batch->next) {
        if (batch_launch_at_ns_locked(batcher, batch) > now_ns)
            continue;
        open_is_due = open_is_due || batch->state == BATCH_OPEN;
        if (!batch->filling && (!ready || stands_before(batch->priority, batch->share_end,
                                                        ready->priority, ready->share_end)))
            ready = batch;
    }
    if (open_is_due && (!ready || ready == batcher->open))
        batch_close_locked(batcher, batcher->open);
    return ready;
}

bool batcher_must_wake_locked(struct batcher *batcher)
{
    if (batcher_launch_at_ns_locked(batcher) >= batcher->scheduler_wakes_at_ns)
        return false;
    batcher->scheduler_wakes_at_ns = 0; // one wake is enough, whoever comes next
    return true;
}

// --- the life of a job

static uint64_t queued_tokens_locked(const struct batcher *batcher)
{
    uint64_t tokens = batcher->waiting_tokens;
    for (const struct batch *batch = batcher->queue; batch; batch = batch->next)
        tokens += batch->tokens;
    return tokens;
}

// What runs and what waits will have been so many batches, as many at once as there are lanes.
static uint32_t retry_advice_ms_locked(const struct batcher *batcher)
{
    const struct batcher_options *options = &batcher->options;
    uint64_t to_come = batcher->waiting_tokens + options->batch_tokens_max - 1;
    uint64_t batches = batcher->queue_batches + to_come / options->batch_tokens_max;
    uint64_t busy = options->lanes - batcher->lanes_free;
    uint64_t wait_ns = batcher->run_ns_average * (batches + busy) / options->lanes;
    uint64_t wait_ms = (wait_ns + 999999) / 1000000;
    if (wait_ms < RETRY_MS_MIN)
        return RETRY_MS_MIN;
    return wait_ms < RETRY_MS_MAX ? (uint32_t)wait_ms : RETRY_MS_MAX;
}

uint32_t batcher_retry_ms(struct batcher *batcher)
{
    pthread_mutex_lock(&batcher->lock);
    uint32_t ms = retry_advice_ms_locked(batcher);
    pthread_mutex_unlock(&batcher->lock);
    return ms;
}

// With buffers enough one is kept for whoever stands before all batches that wait for a lane.
static bool may_open_locked(const struct batcher *batcher, const struct job *job)
{
    const struct batcher_options *options = &batcher->options;
    bool keeps_one = options->batches >= options->lanes + BUFFERS_BEYOND_LANES_TO_KEEP_ONE;
    uint32_t free_n = atomic_load_explicit(&batcher->free_n, memory_order_relaxed);
    if (!keeps_one || free_n != 1)
        return true;
    for (const struct batch *batch = batcher->queue; batch; batch = batch->next)
        if (!stands_before(job->priority, job->share_end, batch->priority, batch->share_end))
            return false;
    return true;
}

// `patient`: it can wait for a better moment.
static struct batch *batch_with_room_locked(struct batcher *batcher, const struct job *job,
                                            const struct room *room, bool patient)
{
    if (batcher->open && room_left_locked(batcher, batcher->open, room))
        return batcher->open;
    bool opens = batcher->free && (!patient || may_open_locked(batcher, job));
    // A batch that is too full for somebody has no reason to wait for more.
    if (batcher->open && (opens || batcher->options.max_queue_delay_us > 0))
        batch_close_locked(batcher, batcher->open);
    return opens ? batch_open_locked(batcher) : NULL;
}

static void set_input(struct job *job, const struct room *room)
{
    struct einsum_operand *operand = &job->operand;
    if (!job->input_given)
        operand->activations = job->input;
    if (!job->attention) {
        if (!job->input_given)
            operand->scales = job->input + room->second_offset;
        operand->rotations = NULL;
        return;
    }
    // Behind the first row; of what is staged, once it has been.
    operand->scales = (const uint8_t *)operand->activations + job->weight->format.reduced_dim;
    operand->rotations = (const void *)(job->input + (job->input_given ? 0 : room->second_offset));
    operand->activation_layout = EINSUM_ACTIVATIONS_IN_PLACE;
    operand->scale_layout = EINSUM_SCALES_IN_PLACE;
    operand->scale_type = EINSUM_SCALE_UE8M0;
}

// Where what is staged ends when so many bytes of it lie behind: at a cache line.
static const uint8_t *staged_end(const void *memory, uint64_t bytes, uint64_t staged)
{
    return (const uint8_t *)memory + bytes / CACHE_LINE_BYTES * CACHE_LINE_BYTES - staged;
}

static const uint8_t *staged_input_end(const struct batcher *batcher, const struct batch *batch)
{
    return staged_end(batch->input, batcher->options.batch_input_bytes, batch->input_staged);
}

static const uint8_t *staged_output_end(const struct batcher *batcher, const struct batch *batch)
{
    return staged_end(batch->output, batcher->options.batch_output_bytes, batch->output_staged);
}

static void take_room_locked(struct batcher *batcher, struct batch *batch, struct job *job,
                             const struct room *room)
{
    job->input = (const uint8_t *)batch->input + batch->input_used;
    job->output = (const uint8_t *)batch->output + batch->output_used;
    job->input_bytes = room->input_bytes;
    job->output_bytes = room->output_bytes;
    job->staged_input_bytes = room->staged_input;
    job->staged_output_bytes = room->staged_output;
    batch->input_used += room->input_bytes;
    batch->output_used += room->output_bytes;
    batch->input_staged += room->staged_input;
    batch->output_staged += room->staged_output;
    job->staged_input = staged_input_end(batcher, batch);
    job->staged_output = staged_output_end(batcher, batch);
}

static void batch_reserve_locked(struct batcher *batcher, struct batch *batch, struct job *job,
                                 const struct room *room)
{
    job->batch = batch;
    take_room_locked(batcher, batch, job, room);
    set_input(job, room);
    if (!job->output_given)
        job->operand.output = (uint8_t *)(uintptr_t)job->output;

    batch->tokens += room->tokens;
    batch->filling++;
    batch->held++;
    if (stands_before(job->priority, job->share_end, batch->priority, batch->share_end)) {
        batch->priority = job->priority;
        batch->share_end = job->share_end;
    }
    if (job->share_start > batch->share_start_last)
        batch->share_start_last = job->share_start;
    if (batch->tokens == batcher->options.batch_tokens_max ||
        batch->held == batcher->options.batch_requests_max)
        batch_close_locked(batcher, batch);
}

// One may have any number, and parts wait with the request that was let in.
static bool tokens_left_locked(const struct batcher *batcher, const struct room *room)
{
    uint64_t most = batcher->options.queue_tokens_max;
    if (most == 0 || room->part || batcher->stats.queued == 0)
        return true;
    return queued_tokens_locked(batcher) + room->tokens <= most;
}

// Whether a job for which there is no room now may wait for some.
static enum batcher_full full_locked(const struct batcher *batcher, bool may_wait,
                                     const struct room *room)
{
    const struct batcher_options *options = &batcher->options;
    if (batcher->stats.queued >= options->queue_requests_max)
        return FULL_REQUESTS;
    if (!tokens_left_locked(batcher, room))
        return FULL_TOKENS;
    if (!may_wait)
        return FULL_BUFFERS;
    bool fits = batcher->waiting_bytes + room->waiting_bytes <= options->queue_bytes_max;
    return fits ? FULL_NOT : FULL_BYTES;
}

static enum status refuse(const struct batcher_options *options, enum batcher_full full,
                          uint32_t retry_after_ms, struct error *err)
{
    if (full == FULL_REQUESTS)
        error_set(err, STATUS_RESOURCE_EXHAUSTED,
                  "the queue is full: %" PRIu32 " requests wait (queue_requests_max)",
                  __atomic_load_n(&options->queue_requests_max, __ATOMIC_RELAXED)); // no lock here
    else if (full == FULL_BYTES)
        error_set(err, STATUS_RESOURCE_EXHAUSTED,
                  "the queue is full: at most %" PRIu64 " bytes wait (queue_bytes_max)",
                  options->queue_bytes_max);
    else if (full == FULL_TOKENS)
        error_set(err, STATUS_RESOURCE_EXHAUSTED,
                  "the queue is full: at most %" PRIu64 " tokens wait (queue_tokens_max)",
                  options->queue_tokens_max);
    else
        error_set(err, STATUS_RESOURCE_EXHAUSTED,
                  "all %" PRIu32 " batch buffers are in use (batches)", options->batches);
    if (err)
        err->retry_after_ms = retry_after_ms;
    return STATUS_RESOURCE_EXHAUSTED;
}

static void wait_locked(struct batcher *batcher, struct job *job, const struct room *room)
{
    job_advance(job, JOB_IDLE, JOB_WAITING);
    job->batch = NULL;
    struct job **at = &batcher->waiting;
    if (batcher->waiting && !job_stands_before(job, batcher->waiting_last))
        at = &batcher->waiting_last->next_waiting; // as in most cases
    while (*at && !job_stands_before(job, *at))
        at = &(*at)->next_waiting;
    job->next_waiting = *at;
    *at = job;
    if (!job->next_waiting)
        batcher->waiting_last = job;
    batcher->waiting_bytes += room->waiting_bytes;
    batcher->waiting_tokens += room->tokens;
}

// Takes jobs out of those that wait, from `at` on; `kept_last` is the one before. `for_bytes`: but not
// those that would leave none.
static struct job *take_out_locked(struct batcher *batcher, struct job **at, struct job *kept_last,
                                   bool for_bytes)
{
    struct job *out = NULL, **out_end = &out;
    while (*at) {
        struct job *job = *at;
        if (for_bytes && room_for(job).waiting_bytes == 0) {
            kept_last = job;
            at = &job->next_waiting;
            continue;
        }
        *at = job->next_waiting;
        job->next_waiting = NULL;
        *out_end = job;
        out_end = &job->next_waiting;
        batcher->waiting_tokens -= job->operand.tokens;
        batcher->stats.queued--;
        batcher->stats.refused[FULL_GAVE_WAY]++;
    }
    batcher->waiting_last = kept_last;
    return out;
}

static uint64_t beyond(uint64_t value, uint64_t most)
{
    return most > 0 && value > most ? value - most : 0;
}

// Of the jobs that wait, takes out as many of the last as leave room for `job` to wait, if it stands
// before them: whoever has had most gives way. NULL if that does not suffice.
static struct job *push_out_locked(struct batcher *batcher, const struct job *job,
                                   const struct room *room)
{
    const struct batcher_options *options = &batcher->options;
    uint64_t bytes_needed =
        beyond(batcher->waiting_bytes + room->waiting_bytes, options->queue_bytes_max);
    uint64_t tokens_needed = room->part ? 0
                                        : beyond(queued_tokens_locked(batcher) + room->tokens,
                                                 options->queue_tokens_max);
    uint64_t bytes = 0, tokens = 0; // of those behind
    struct job **at = &batcher->waiting, *kept_last = NULL;
    while (*at && !job_stands_before(job, *at)) {
        kept_last = *at;
        at = &(*at)->next_waiting;
    }
    for (const struct job *other = *at; other; other = other->next_waiting) {
        bytes += room_for(other).waiting_bytes;
        tokens += other->operand.tokens;
    }
    if (!*at || bytes < bytes_needed || tokens < tokens_needed)
        return NULL;
    while ((*at)->next_waiting && bytes - room_for(*at).waiting_bytes >= bytes_needed &&
           tokens - (*at)->operand.tokens >= tokens_needed) {
        bytes -= room_for(*at).waiting_bytes;
        tokens -= (*at)->operand.tokens;
        kept_last = *at;
        at = &(*at)->next_waiting;
    }
    batcher->waiting_bytes -= bytes;
    return take_out_locked(batcher, at, kept_last, bytes_needed > 0);
}

static void answer_pushed_out(struct job *job, uint32_t retry_after_ms)
{
    uint64_t now = now_ns();
    while (job) {
        struct job *next = job->next_waiting; // the job may be gone once it has been told
        void (*on_done)(struct job *) = job->on_done;
        job->queued_ns = job->launched_ns = job->done_ns = now;
        error_set(&job->error, STATUS_RESOURCE_EXHAUSTED,
                  "the queue is full, and others have had less");
        job->error.retry_after_ms = retry_after_ms;
        job_advance(job, JOB_WAITING, JOB_DONE);
        on_done(job);
        job = next;
    }
}

// Nobody overtakes those who wait and stand before him.
static struct batch *find_room_locked(struct batcher *batcher, const struct job *job,
                                      const struct room *room, bool patient)
{
    if (batcher->stats.queued >= batcher->options.queue_requests_max ||
        !tokens_left_locked(batcher, room))
        return NULL;
    if (batcher->waiting && !job_stands_before(job, batcher->waiting))
        return NULL;
    return batch_with_room_locked(batcher, job, room, patient);
}

struct place {
    struct batch *batch;    // NULL: the job waits, or is refused
    enum batcher_full full; // why it is refused
    struct job *pushed_out; // for it
    uint32_t retry_after_ms;
};

static struct place find_place_locked(struct batcher *batcher, struct job *job,
                                      const struct room *room, bool may_wait)
{
    uint64_t *share_end = &batcher->share_ends[job->connection % CONNECTIONS_TOLD_APART];
    uint64_t share_end_before = *share_end;
    job_stand_locked(batcher, job);
    struct place place = {.batch = find_room_locked(batcher, job, room, may_wait)};
    if (!place.batch)
        place.full = full_locked(batcher, may_wait, room);
    if (place.full && may_wait)
        place.pushed_out = push_out_locked(batcher, job, room);
    if (place.pushed_out) {
        place.full = FULL_NOT;
        place.batch = find_room_locked(batcher, job, room, may_wait);
    }
    if (place.full || place.pushed_out)
        place.retry_after_ms = retry_advice_ms_locked(batcher);
    if (place.full) {
        batcher->stats.refused[place.full]++;
        *share_end = share_end_before;
        return place;
    }
    if (place.batch)
        batch_reserve_locked(batcher, place.batch, job, room);
    else
        wait_locked(batcher, job, room);
    batcher->stats.jobs++;
    batcher->stats.queued++;
    return place;
}

// `waits`: whether the job waits; NULL if it may not.
static enum status reserve(struct batcher *batcher, struct job *job, bool *waits, struct error *err)
{
    ASSERT(job->operand.tokens >= 1);
    struct room room = room_for(job);
    enum status status = room_fits_empty_batch(&room, job->attention, &batcher->options, err);
    if (status)
        return status;

    if (atomic_load_explicit(&batcher->hung, memory_order_relaxed))
        return error_set(err, STATUS_UNAVAILABLE, "the engine does not answer");
    pthread_mutex_lock(&batcher->lock);
    if (batcher_device_lost(batcher)) {
        pthread_mutex_unlock(&batcher->lock);
        return error_set(err, STATUS_UNAVAILABLE, "the device is lost");
    }
    struct place place = find_place_locked(batcher, job, &room, waits != NULL);
    // A batch may have been closed.
    bool wake = !job->quiet && batcher_must_wake_locked(batcher);
    pthread_mutex_unlock(&batcher->lock);

    if (wake)
        batcher_wake(batcher->waker);
    answer_pushed_out(place.pushed_out, place.retry_after_ms);
    if (place.full)
        return refuse(&batcher->options, place.full, place.retry_after_ms, err);
    if (waits)
        *waits = !place.batch; // a job that waits may be another's by now
    if (place.batch)
        job_advance(job, JOB_IDLE, JOB_DECODING);
    return STATUS_OK;
}

enum status batcher_reserve(struct batcher *batcher, struct job *job, struct error *err)
{
    return reserve(batcher, job, NULL, err);
}

enum status batcher_reserve_or_wait(struct batcher *batcher, struct job *job, bool *waits,
                                    struct error *err)
{
    ASSERT(job->on_room);
    return reserve(batcher, job, waits, err);
}

// ---- the jobs that wait

// Those that got room, linked by next_waiting; to be told outside the lock.
static struct job *give_room_locked(struct batcher *batcher)
{
    struct job *given = NULL, **given_end = &given;
    while (batcher->waiting) {
        struct job *job = batcher->waiting;
        struct room room = room_for(job);
        struct batch *batch = batch_with_room_locked(batcher, job, &room, true);
        if (!batch)
            break;
        batcher->waiting = job->next_waiting;
        batcher->waiting_bytes -= room.waiting_bytes;
        batcher->waiting_tokens -= room.tokens;
        batch_reserve_locked(batcher, batch, job, &room);
        job_advance(job, JOB_WAITING, JOB_DECODING);
        job->next_waiting = NULL;
        *given_end = job;
        given_end = &job->next_waiting;
    }
    return given;
}

static void tell_given(struct job *given)
{
    while (given) {
        struct job *next = given->next_waiting; // the job may be gone once it has been told
        given->on_room(given);
        given = next;
    }
}

void batcher_give_room(struct batcher *batcher)
{
    pthread_mutex_lock(&batcher->lock);
    struct job *given = give_room_locked(batcher);
    pthread_mutex_unlock(&batcher->lock);
    tell_given(given);
}

struct job *batcher_take_waiting(struct batcher *batcher)
{
    pthread_mutex_lock(&batcher->lock);
    struct job *taken = batcher->waiting;
    batcher->waiting = NULL;
    batcher->waiting_bytes = batcher->waiting_tokens = 0;
    for (struct job *job = taken; job; job = job->next_waiting) {
        batcher->stats.queued--;
        batcher->stats.failed++;
    }
    pthread_mutex_unlock(&batcher->lock);
    return taken;
}

void batcher_commit(struct batcher *batcher, struct job *job)
{
    struct batch *batch = job->batch;
    bool quiet = job->quiet;
    uint64_t queued_ns = now_ns();
    job->queued_ns = queued_ns;
    job_advance(job, JOB_DECODING, JOB_QUEUED);

    pthread_mutex_lock(&batcher->lock);
    if (batch->jobs_n == 0)
        batch->first_commit_ns = queued_ns;
    batch->jobs[batch->jobs_n++] = job;
    batch->hurried = batch->hurried || job->hurried;
    batch->filling--;
    // A turn is due that nobody has set out to take.
    bool due = batcher_launch_at_ns_locked(batcher) < batcher->scheduler_wakes_at_ns;
    pthread_mutex_unlock(&batcher->lock);

    if (due && !quiet)
        batcher_turn(batcher);
}

// Gives back the room of the job if nothing lies behind it. An empty batch has all of its room.
static void batch_shrink_locked(const struct batcher *batcher, struct batch *batch,
                                const struct job *job)
{
    if (batch->held == 0) {
        batch->input_used = batch->output_used = 0;
        batch->input_staged = batch->output_staged = 0;
        return;
    }
    if (job->staged_input == staged_input_end(batcher, batch))
        batch->input_staged -= job->staged_input_bytes;
    if (job->staged_output == staged_output_end(batcher, batch))
        batch->output_staged -= job->staged_output_bytes;
    if (job->input + job->input_bytes == (const uint8_t *)batch->input + batch->input_used)
        batch->input_used -= job->input_bytes;
    if (job->output + job->output_bytes == (const uint8_t *)batch->output + batch->output_used)
        batch->output_used -= job->output_bytes;
}

void batcher_abandon(struct batcher *batcher, struct job *job)
{
    struct batch *batch = job->batch;
    job->batch = NULL;
    job_advance(job, JOB_DECODING, JOB_IDLE);

    pthread_mutex_lock(&batcher->lock);
    batch->filling--;
    batch->held--;
    batch->tokens -= job->operand.tokens;
    batcher->stats.jobs--;
    batcher->stats.queued--;
    batch_shrink_locked(batcher, batch, job);
    if (batch->held == 0 && batch->state == BATCH_CLOSED) {
        batch_unlink_locked(batcher, batch);
        batch_free_locked(batcher, batch);
    }
    struct job *given = give_room_locked(batcher);
    bool wake = batcher_must_wake_locked(batcher); // others may have waited for this one
    pthread_mutex_unlock(&batcher->lock);

    if (wake)
        batcher_wake(batcher->waker);
    tell_given(given);
}

void batcher_release(struct batcher *batcher, struct job *job)
{
    struct batch *batch = job->batch;
    job->batch = NULL;
    enum job_state state = atomic_load_explicit(&job->state, memory_order_relaxed);
    ASSERT(state == JOB_DONE || state == JOB_REPLYING);
    job_advance(job, state, JOB_IDLE);

    struct job *given = NULL;
    pthread_mutex_lock(&batcher->lock);
    batcher->stats.jobs--;
    if (batch) // else it was answered while it waited
        batch->held--;
    if (batch && batch->held == 0 && batch->state == BATCH_ANSWERING) {
        batch_free_locked(batcher, batch);
        given = give_room_locked(batcher);
    }
    bool wake = batcher_must_wake_locked(batcher); // giving room may have closed a batch
    pthread_mutex_unlock(&batcher->lock);

    if (wake)
        batcher_wake(batcher->waker);
    tell_given(given);
}

bool batcher_scarce(struct batcher *batcher)
{
    return atomic_load_explicit(&batcher->free_n, memory_order_relaxed) == 0;
}

bool batcher_device_lost(struct batcher *batcher)
{
    return atomic_load_explicit(&batcher->device_lost, memory_order_acquire);
}

void batcher_set_hung(struct batcher *batcher, bool hung)
{
    atomic_store_explicit(&batcher->hung, hung, memory_order_relaxed);
}

void batcher_set_limits(struct batcher *batcher, uint32_t queue_requests_max,
                        uint32_t max_queue_delay_us)
{
    ASSERT(queue_requests_max >= 1);
    pthread_mutex_lock(&batcher->lock);
    __atomic_store_n(&batcher->options.queue_requests_max, queue_requests_max, __ATOMIC_RELAXED);
    batcher->options.max_queue_delay_us = max_queue_delay_us;
    pthread_mutex_unlock(&batcher->lock);
}

void batcher_stats(struct batcher *batcher, struct batcher_stats *stats)
{
    uint64_t now = now_ns();
    pthread_mutex_lock(&batcher->lock);
    *stats = batcher->stats;
    if (batcher->lanes_free < batcher->options.lanes && now > batcher->busy_since_ns)
        stats->busy_ns += now - batcher->busy_since_ns;
    stats->queued_tokens = queued_tokens_locked(batcher);
    stats->queued_bytes = batcher->waiting_bytes;
    for (const struct batch *batch = batcher->queue; batch; batch = batch->next)
        stats->queued_bytes += batch->input_used;
    stats->buffers_free = atomic_load_explicit(&batcher->free_n, memory_order_relaxed);
    pthread_mutex_unlock(&batcher->lock);
}

// --- create, destroy

static void check_options(const struct batcher_options *options)
{
    ASSERT(options->lanes >= 1);
    ASSERT(options->batches >= 1);
    ASSERT(options->batch_tokens_max >= 1);
    ASSERT(options->batch_requests_max >= 1);
    ASSERT(options->queue_requests_max >= 1);
    ASSERT(options->buckets_n >= 1 && options->buckets_n <= ENGINE_BUCKETS_MAX);
    ASSERT(options->buckets[options->buckets_n - 1] == options->batch_tokens_max);
    for (uint32_t i = 1; i < options->buckets_n; i++)
        ASSERT(options->buckets[i - 1] < options->buckets[i]);
}

static void buffers_free(struct batcher *batcher)
{
    const struct batcher_options *options = &batcher->options;
    for (uint32_t i = 0; i < options->batches; i++) {
        struct batch *batch = &batcher->batches[i];
        if (batch->output)
            options->ops->memory_free(options->engine, batch->output, options->batch_output_bytes);
        if (batch->input)
            options->ops->memory_free(options->engine, batch->input, options->batch_input_bytes);
    }
}

static enum status buffers_alloc(struct batcher *batcher, struct error *err)
{
    const struct batcher_options *options = &batcher->options;
    for (uint32_t i = 0; i < options->batches; i++) {
        struct batch *batch = &batcher->batches[i];
        enum status status = options->ops->memory_alloc(options->engine, options->batch_input_bytes,
                                                        &batch->input, err);
        if (!status)
            status = options->ops->memory_alloc(options->engine, options->batch_output_bytes,
                                                &batch->output, err);
        if (status) {
            buffers_free(batcher);
            return status;
        }
        batch->jobs = batcher->jobs + (size_t)i * options->batch_requests_max;
        batch->segments = batcher->segments + (size_t)i * options->batch_requests_max;
        batch_free_locked(batcher, batch);
    }
    batcher->stats.buffer_bytes =
        options->batches * (options->batch_input_bytes + options->batch_output_bytes);
    return STATUS_OK;
}

static void tables_free(struct batcher *batcher)
{
    free(batcher->lanes);
    free(batcher->segments);
    free(batcher->jobs);
    free(batcher->batches);
    free(batcher);
}

static struct batcher *tables_alloc(const struct batcher_options *options)
{
    struct batcher *batcher = calloc(1, sizeof *batcher);
    if (!batcher)
        return NULL;
    size_t jobs_max = (size_t)options->batches * options->batch_requests_max;
    batcher->batches = calloc(options->batches, sizeof *batcher->batches);
    batcher->jobs = calloc(jobs_max, sizeof *batcher->jobs);
    batcher->segments = calloc(jobs_max, sizeof *batcher->segments);
    batcher->lanes = calloc(options->lanes, sizeof *batcher->lanes);
    if (batcher->batches && batcher->jobs && batcher->segments && batcher->lanes)
        return batcher;
    tables_free(batcher);
    return NULL;
}

enum status batcher_create(const struct batcher_options *options, struct batcher_waker *waker,
                           struct batcher **out, struct error *err)
{
    check_options(options);
    struct batcher *batcher = tables_alloc(options);
    if (!batcher)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory for %" PRIu32 " batches",
                         options->batches);
    batcher->options = *options;
    if (options->queue_bytes_max == 0)
        batcher->options.queue_bytes_max = options->batches * options->batch_input_bytes;
    batcher->waker = waker;
    batcher->queue_end = &batcher->queue;
    batcher->lanes_free = options->lanes;
    pthread_mutex_init(&batcher->lock, NULL);
    pthread_mutex_init(&batcher->turn, NULL);

    enum status status = buffers_alloc(batcher, err);
    if (status)
        goto free_tables;
    status = scheduler_start(batcher, err);
    if (status)
        goto free_buffers;
    *out = batcher;
    return STATUS_OK;

free_buffers:
    buffers_free(batcher);
free_tables:
    pthread_mutex_destroy(&batcher->turn);
    pthread_mutex_destroy(&batcher->lock);
    tables_free(batcher);
    return status;
}

void batcher_destroy(struct batcher *batcher)
{
    struct batcher_stats stats;
    batcher_stats(batcher, &stats);
    ASSERT(stats.jobs == 0);
    scheduler_stop(batcher);
    ASSERT(batcher->lanes_free == batcher->options.lanes);
    buffers_free(batcher);
    pthread_mutex_destroy(&batcher->turn);
    pthread_mutex_destroy(&batcher->lock);
    tables_free(batcher);
}
