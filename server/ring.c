// See ring.h. Who touches what:
//
//     ring thread      submit_tail -> entry -> request -> check, reserve, fill, commit -> turn
//                                                |  no room: waits          ^
//                                                '------ on_room -----------' by way of `handed`
//     whoever has the  on_done -> completion -> complete_tail -> caller woken if it sleeps
//     scheduler's turn     '----> the ring thread, by way of `handed`, if an output must be copied
//
//     rings.lock       the list of rings and their tables; the ring thread holds it for each pass
//     ring.lock        the ring's completions and the pool of requests; a leaf
//     handed_lock      the list of requests that were handed over; a leaf
//
// A ring lives until it is closed and its last request has been answered, and its region with it.
#include "ring.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "../client/crc32c.h"
#include "../client/einsum_shared.h"
#include "batch.h"
#include "beat.h"
#include "checksum.h"
#include "config.h"
#include "connections.h"
#include "cut.h"
#include "futex.h"
#include "nan.h"
#include "placement.h"
#include "record.h"
#include "request.h"
#include "service.h"

enum {
    TAKEN_AT_ONCE = 32, // of one ring, then the next one's turn comes
    EVENTS = 16,
};

_Static_assert((int)WIRE_REGION_BYTES == (int)REGION_NAME_BYTES, "the same names");

// One request in flight.
struct request {
    struct job job;
    struct cut *cut; // NULL: the job is one
    struct record record;
    struct placement placement;
    struct ring *ring; // a reference
    uint64_t id;
    bool output_sum;      // its completion has the output's CRC-32C
    bool in_use;          // by ring.lock
    struct request *next; // in ring.free or rings.handed
};

struct weight_name {
    char text[WIRE_WEIGHT_BYTES_MAX + 1];
};

struct ring {
    struct rings *rings;
    struct ring *next, *previous; // rings.list
    struct region *region;        // where it lies; a reference
    struct einsum_ring_header *header;
    const struct einsum_ring_submission *submissions;
    struct einsum_ring_completion *completions;
    uint32_t entries;
    int doorbell;
    _Atomic uint32_t references; // one until it is closed, one of each request in flight
    _Atomic bool broken;

    uint32_t taken; // ring thread alone

    // By rings.lock.
    struct region *regions[RING_REGIONS_MAX];
    struct weight_name *weights;
    uint32_t weights_n, weights_room;

    pthread_mutex_t lock; // guards what follows
    struct request *requests, *free;
    uint32_t in_flight, completed;
    bool closed;
};

struct rings {
    struct rings_options options;
    struct service_context *context;
    uint32_t kernels_n;
    pthread_t thread;
    int epoll, wake;          // `wake` is ours, unlike the rings' doorbells
    _Atomic uint32_t wanting; // threads that want `lock`: the ring thread lets them
    _Atomic bool draining, stopping;
    _Atomic uint32_t rings_n, in_flight;
    _Atomic uint64_t requests;

    pthread_mutex_t lock;
    struct ring *list;

    pthread_mutex_t handed_lock;
    struct request *handed; // newest first
    _Atomic bool any_handed;

    // Ring thread alone.
    struct wire_request wire; // the one at hand
    uint64_t idle_since_ns;
    struct einsum_spin spin;
    struct beat beat;
};

// ---- waking

// After what the caller waits for has been told.
static void wake_caller(struct ring *ring)
{
    struct einsum_ring_word *sleeps = &ring->header->caller_sleeps;
    if (einsum_ring_look(sleeps) == 0)
        return;
    einsum_ring_set(sleeps, 0);
    syscall(SYS_futex, &sleeps->value, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

static void wake_thread(struct rings *rings)
{
    uint64_t one = 1;
    (void)!write(rings->wake, &one, sizeof one); // full: it is awake anyway
}

// ---- the life of a ring

static void ring_free(struct ring *ring)
{
    if (ring->doorbell >= 0)
        close(ring->doorbell);
    pthread_mutex_destroy(&ring->lock);
    region_unref(ring->region);
    free(ring->weights);
    free(ring->requests);
    free(ring);
}

static void ring_unref(struct ring *ring)
{
    if (atomic_fetch_sub_explicit(&ring->references, 1, memory_order_acq_rel) == 1)
        ring_free(ring);
}

static void break_ring(struct ring *ring)
{
    atomic_store_explicit(&ring->broken, true, memory_order_release);
    einsum_ring_tell(&ring->header->closed, 1);
    wake_caller(ring);
    ring->rings->options.on_broken(ring->rings->options.on_broken_context);
}

bool ring_broken(const struct ring *ring)
{
    return atomic_load_explicit(&ring->broken, memory_order_acquire);
}

// ---- completion

static void add_sum(const struct request *request, struct einsum_ring_completion *completion)
{
    const struct job *job = &request->job;
    const struct placement *placement = &request->placement;
    uint64_t bytes = einsum_output_bytes(job->operand.output_type, job->operand.tokens,
                                         job->operand.groups, job->weight->format.output_dim);
    completion->checksums = EINSUM_RING_SUM_OUTPUT;
    if (bytes > 0)
        completion->output_crc32c =
            crc32c_extend(0, placement->region->memory + placement->output.offset, bytes);
}

static struct einsum_ring_completion describe(const struct request *request,
                                              const struct error *err)
{
    const struct job *job = &request->job;
    struct einsum_ring_completion completion = {.id = request->id, .status = (uint16_t)err->status};
    if (err->status != STATUS_OK) {
        completion.retry_after_ms = err->retry_after_ms;
        snprintf(completion.field, sizeof completion.field, "%s", err->field);
        snprintf(completion.text, sizeof completion.text, "%.*s", (int)sizeof completion.text - 1,
                 err->text);
        return completion;
    }
    completion.tokens = job->operand.tokens;
    completion.groups = job->operand.groups;
    completion.output_dim = job->weight->format.output_dim;
    completion.batch_tokens = job->batch_tokens;
    completion.batch_bucket = job->batch_bucket;
    completion.batch_requests = job->batch_requests;
    completion.queue_ns = job->launched_ns - job->queued_ns;
    completion.run_ns = job->done_ns - job->launched_ns;
    completion.parts = request->cut ? request->cut->parts_n : 0;
    if (request->output_sum)
        add_sum(request, &completion);
    return completion;
}

// Of a request that has been let go of, all but its place in the pool.
static void post(struct request *request, const struct einsum_ring_completion *completion)
{
    struct ring *ring = request->ring;
    struct rings *rings = ring->rings;
    pthread_mutex_lock(&ring->lock);
    bool closed = ring->closed;
    if (!closed) {
        // There is room: what is in flight and what is unread are never more than the entries.
        size_t bytes = completion->status == STATUS_OK
                           ? offsetof(struct einsum_ring_completion, field)
                           : sizeof *completion;
        memcpy(&ring->completions[ring->completed & (ring->entries - 1)], completion, bytes);
        einsum_ring_tell(&ring->header->complete_tail, ++ring->completed);
    }
    request->in_use = false;
    request->next = ring->free;
    ring->free = request;
    ring->in_flight--;
    pthread_mutex_unlock(&ring->lock);
    if (!closed)
        wake_caller(ring);
    ring_unref(ring);
    atomic_fetch_sub_explicit(&rings->in_flight, 1, memory_order_release); // rings may be gone now
}

// Answers a request whose job is DONE or IDLE, and lets go of it.
static void complete(struct request *request, const struct error *err)
{
    struct job *job = &request->job;
    struct service_context *context = request->ring->rings->context;
    bool computed = err->status == STATUS_OK && job->operand.tokens > 0;
    if (computed && !request->cut)
        nan_look(context, job, &request->placement);
    struct einsum_ring_completion completion = describe(request, err);
    record_answer(&request->record, context, job, err);
    request->record.answered_ns = now_ns();
    record_end(&request->record, context);
    placement_drop(&request->placement);
    if (atomic_load_explicit(&job->state, memory_order_relaxed) != JOB_IDLE)
        batcher_release(context->batcher, job);
    if (request->cut)
        cut_destroy(request->cut);
    if (job->weight)
        weight_unref(job->weight);
    post(request, &completion);
}

static void complete_done(struct request *request)
{
    struct error err = request->job.error; // the job is let go of before it is read
    complete(request, &err);
}

// Hands a request to the ring thread, for what would keep others waiting.
static void hand_over(struct request *request)
{
    struct rings *rings = request->ring->rings;
    pthread_mutex_lock(&rings->handed_lock);
    request->next = rings->handed;
    rings->handed = request;
    atomic_store_explicit(&rings->any_handed, true, memory_order_release);
    pthread_mutex_unlock(&rings->handed_lock);
    wake_thread(rings);
}

static void on_done(struct job *job)
{
    struct request *request = CONTAINER_OF(job, struct request, job);
    if (job->error.status == STATUS_OK && (!job->output_given || request->output_sum))
        hand_over(request); // there is an output to be copied or summed
    else
        complete_done(request);
}

// ---- submission

static void on_room(struct job *job)
{
    hand_over(CONTAINER_OF(job, struct request, job));
}

// What the submission says, as the wire would have said it. Text is set by check_numbers.
static void translate(const struct einsum_ring_submission *from, struct wire_request *to)
{
    memset(&to->recipe, 0, sizeof *to - offsetof(struct wire_request, recipe));
    to->kind = from->op == EINSUM_RING_OUTPUT_PROJECT ? WIRE_OUTPUT_PROJECT : WIRE_EINSUM;
    to->recipe = (int32_t)from->recipe;
    to->activation_layout = (int32_t)from->activation_layout;
    to->scale_layout = (int32_t)from->scale_layout;
    to->scale_type = (int32_t)from->scale_type;
    to->output_type = (int32_t)from->output_type;
    to->priority = (int32_t)from->priority;
    to->tokens = from->tokens;
    to->group_begin = from->group_begin;
    to->group_end = from->group_end;
    to->first_sum = (struct wire_sum){from->checksums & EINSUM_RING_SUM_FIRST, from->first_crc32c};
    to->second_sum =
        (struct wire_sum){from->checksums & EINSUM_RING_SUM_SECOND, from->second_crc32c};
    to->output_sum = from->checksums & EINSUM_RING_SUM_OUTPUT;
    to->shared.given = true;
    to->shared.activations = (struct wire_range){from->activations_offset, from->activations_bytes};
    to->shared.scales = (struct wire_range){from->scales_offset, from->scales_bytes};
    to->shared.output = (struct wire_range){from->output_offset, from->output_bytes};
}

// What stands for names.
NODISCARD static enum status check_numbers(const struct ring *ring,
                                           const struct einsum_ring_submission *submission,
                                           struct error *err)
{
    struct rings *rings = ring->rings;
    if (submission->op > EINSUM_RING_OUTPUT_PROJECT)
        return error_field(err, STATUS_UNIMPLEMENTED, "op", "%" PRIu32 " is not supported",
                           submission->op);
    if (submission->weight >= ring->weights_n)
        return error_field(err, STATUS_INVALID_ARGUMENT, "weight",
                           "number %" PRIu32 ", of %" PRIu32 " that were asked for",
                           submission->weight, ring->weights_n);
    if (submission->kernel > rings->kernels_n)
        return error_field(err, STATUS_INVALID_ARGUMENT, "kernel",
                           "number %" PRIu32 ", of %" PRIu32, submission->kernel, rings->kernels_n);
    if (submission->region >= RING_REGIONS_MAX || !ring->regions[submission->region])
        return error_field(err, STATUS_NOT_FOUND, "region",
                           "this connection has no region of number %" PRIu32, submission->region);
    return STATUS_OK;
}

// Checks it all; then the request has a job with its operand, a weight and a placement.
NODISCARD static enum status
check(struct request *request, const struct einsum_ring_submission *submission, struct error *err)
{
    struct ring *ring = request->ring;
    struct service_context *context = ring->rings->context;
    struct wire_request *wire = &ring->rings->wire;
    if (atomic_load_explicit(&ring->rings->draining, memory_order_relaxed)) {
        METRICS_ADD(context->metrics, refused_draining, 1);
        return error_set(err, STATUS_UNAVAILABLE, "draining");
    }
    enum status status = check_numbers(ring, submission, err);
    if (status != STATUS_OK)
        return status;
    translate(submission, wire);
    strcpy(wire->weight, ring->weights[submission->weight].text);
    strcpy(wire->equation, request_equation);
    struct job *job = &request->job;
    status = request_check(wire, context->weights, context->config->request_tokens_max, job, err);
    if (status != STATUS_OK)
        return status;
    job->kernel = submission->kernel;
    request->output_sum = wire->output_sum;
    status = placement_set(&request->placement, region_ref(ring->regions[submission->region]),
                           &wire->shared, false, job, err);
    return status == STATUS_OK ? checksum_check_placed(&request->placement, wire, err) : status;
}

// Fills what must be filled, and commits.
NODISCARD static enum status fill_and_commit(struct request *request, struct error *err)
{
    struct rings *rings = request->ring->rings;
    struct batcher *batcher = rings->context->batcher;
    struct job *job = &request->job;
    enum status status = placement_fill(&request->placement, job, &rings->context->copies, err);
    if (status != STATUS_OK) {
        batcher_abandon(batcher, job);
        return status;
    }
    batcher_commit(batcher, job);
    return STATUS_OK;
}

NODISCARD static enum status fill_part(struct job *whole, const struct job *part, struct error *err)
{
    struct request *request = CONTAINER_OF(whole, struct request, job);
    return placement_fill(&request->placement, part, &request->ring->rings->context->copies, err);
}

static void look_at_part(struct job *whole, const struct job *part)
{
    const struct request *request = CONTAINER_OF(whole, struct request, job);
    nan_look(request->ring->rings->context, part, &request->placement);
}

NODISCARD static enum status start_cut(struct request *request, struct batcher_cut at,
                                       struct error *err)
{
    struct service_context *context = request->ring->rings->context;
    const struct cut_options options = {
        .batcher = context->batcher,
        .whole = &request->job,
        .placement = &request->placement,
        .copies = &context->copies,
        .fill = fill_part,
        .look = look_at_part,
    };
    return cut_begin(&options, at, &request->cut, err);
}

NODISCARD static enum status start_job(struct request *request, struct error *err)
{
    struct service_context *context = request->ring->rings->context;
    struct job *job = &request->job;
    struct batcher_cut at = batcher_cut(context->batcher, job);
    if (at.tokens > 0 && at.tokens < job->operand.tokens)
        return start_cut(request, at, err);
    bool waits;
    request->record.asked_ns = request->record.room_ns = now_ns(); // unless it waits
    enum status status = batcher_reserve_or_wait(context->batcher, job, &waits, err);
    return status == STATUS_OK && !waits ? fill_and_commit(request, err) : status;
}

// `*running`: it will be completed by on_done, or by go_on.
NODISCARD static enum status start(struct request *request,
                                   const struct einsum_ring_submission *submission, bool *running,
                                   struct error *err)
{
    struct service_context *context = request->ring->rings->context;
    struct job *job = &request->job;
    *running = false;
    enum status status = check(request, submission, err);
    if (status != STATUS_OK || job->operand.tokens == 0)
        return status;
    job->received_ns = request->record.received_ns;
    uint64_t most_ns = config_now(context->config, deadline_ms_max) * 1000000ull;
    uint64_t timeout_ns = submission->timeout_ns;
    job->deadline_ns =
        job->received_ns + (timeout_ns && timeout_ns < most_ns ? timeout_ns : most_ns);
    status = start_job(request, err);
    *running = status == STATUS_OK;
    return status;
}

// From the pool, which has one for each entry.
static struct request *take_request(struct ring *ring, uint64_t id)
{
    pthread_mutex_lock(&ring->lock);
    struct request *request = ring->free;
    ASSERT(request);
    ring->free = request->next;
    ring->in_flight++;
    // All but job.cancelled and in_use, which ring_close reads.
    *request = (struct request){
        .ring = ring,
        .id = id,
        .in_use = true,
        .job.on_done = on_done,
        .job.on_room = on_room,
        .job.quiet = true,
        .job.connection = connection_number(ring->doorbell),
    };
    pthread_mutex_unlock(&ring->lock);
    atomic_fetch_add_explicit(&ring->references, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&ring->rings->in_flight, 1, memory_order_relaxed);
    return request;
}

static void take_entry(struct ring *ring, uint32_t index)
{
    struct einsum_ring_submission submission;
    memcpy(&submission, &ring->submissions[index & (ring->entries - 1)], sizeof submission);
    // The compiler must not read the entry again in place of the copy.
    __asm__ volatile("" : "+m"(submission));

    struct service_context *context = ring->rings->context;
    METRICS_ADD(context->metrics, shared, 1);
    atomic_fetch_add_explicit(&ring->rings->requests, 1, memory_order_relaxed);
    struct request *request = take_request(ring, submission.id);
    record_begin(&request->record, context,
                 submission.op == EINSUM_RING_OUTPUT_PROJECT ? METRICS_OUTPUT_PROJECT
                                                             : METRICS_EINSUM,
                 METRICS_RING);
    request->record.request_id = submission.id;
    struct error err;
    bool running;
    enum status status = start(request, &submission, &running, &err);
    if (running)
        return;
    if (status == STATUS_OK) { // no tokens
        request->job.launched_ns = request->job.queued_ns = request->job.done_ns = 0;
        err = (struct error){.status = STATUS_OK};
    }
    complete(request, &err);
}

// How many more may be in flight, so that each will find room to be completed. False: the caller
// has read more than was completed.
static bool room_of(struct ring *ring, uint32_t *room)
{
    pthread_mutex_lock(&ring->lock);
    uint32_t unread = ring->completed - einsum_ring_get(&ring->header->complete_head);
    uint32_t in_flight = ring->in_flight;
    pthread_mutex_unlock(&ring->lock);
    *room = 0;
    if (unread > ring->entries)
        return false;
    if (unread + in_flight < ring->entries)
        *room = ring->entries - unread - in_flight;
    return true;
}

// How many entries may be taken now. Breaks the ring if its counts cannot be.
static uint32_t available(struct ring *ring)
{
    if (ring_broken(ring))
        return 0;
    uint32_t waiting = einsum_ring_look(&ring->header->submit_tail) - ring->taken, room;
    if (waiting == 0)
        return 0;
    if (waiting > ring->entries || !room_of(ring, &room)) {
        break_ring(ring);
        return 0;
    }
    return waiting < room ? waiting : room;
}

static uint32_t take_from(struct ring *ring)
{
    uint32_t n = available(ring);
    if (n > TAKEN_AT_ONCE)
        n = TAKEN_AT_ONCE;
    for (uint32_t i = 0; i < n; i++)
        take_entry(ring, ring->taken + i);
    if (n > 0) {
        ring->taken += n;
        einsum_ring_set(&ring->header->submit_head, ring->taken);
    }
    return n;
}

static bool has_room(const struct request *request)
{
    return atomic_load_explicit(&request->job.state, memory_order_acquire) == JOB_DECODING;
}

// A request that was handed over: it was given room, or is done and its output to be copied; or a part.
static void go_on(struct request *request)
{
    struct service_context *context = request->ring->rings->context;
    struct job *job = &request->job;
    struct error err;
    enum status status = STATUS_OK;
    if (request->cut) {
        if (!cut_go_on(request->cut))
            complete_done(request);
        return;
    }
    if (!has_room(request)) {
        placement_finish(&request->placement, job, &context->copies);
        complete_done(request);
        return;
    }
    if (atomic_load_explicit(&job->cancelled, memory_order_relaxed)) {
        batcher_abandon(context->batcher, job);
        status = error_set(&err, STATUS_CANCELLED, "cancelled before launch");
    } else {
        request->record.room_ns = now_ns();
        status = fill_and_commit(request, &err);
    }
    if (status != STATUS_OK)
        complete(request, &err);
}

// All that were handed over, oldest first.
static uint32_t go_on_with_handed(struct rings *rings)
{
    if (!atomic_load_explicit(&rings->any_handed, memory_order_acquire))
        return 0;
    pthread_mutex_lock(&rings->handed_lock);
    struct request *newest = rings->handed, *oldest = NULL;
    rings->handed = NULL;
    atomic_store_explicit(&rings->any_handed, false, memory_order_relaxed);
    pthread_mutex_unlock(&rings->handed_lock);
    while (newest) {
        struct request *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    uint32_t n = 0;
    for (struct request *request = oldest, *next; request; request = next, n++) {
        next = request->next;
        go_on(request);
    }
    return n;
}

// ---- the thread

static void lock_thread(struct rings *rings)
{
    while (atomic_load_explicit(&rings->wanting, memory_order_relaxed) > 0)
        sched_yield();
    pthread_mutex_lock(&rings->lock);
}

// Once round: how many requests went on.
static uint32_t pass(struct rings *rings)
{
    lock_thread(rings);
    uint32_t n = go_on_with_handed(rings);
    for (struct ring *ring = rings->list; ring; ring = ring->next)
        n += take_from(ring);
    pthread_mutex_unlock(&rings->lock);
    if (n > 0)
        batcher_turn(rings->context->batcher);
    return n;
}

// Tells the callers, who then ring their doorbells. False: there is something to do after all.
static bool announce_sleep(struct rings *rings, uint32_t sleeps)
{
    bool idle = true;
    lock_thread(rings);
    for (struct ring *ring = rings->list; ring; ring = ring->next)
        einsum_ring_tell(&ring->header->daemon_sleeps, sleeps);
    for (struct ring *ring = rings->list; ring && sleeps; ring = ring->next)
        idle = idle && available(ring) == 0;
    pthread_mutex_unlock(&rings->lock);
    return idle && !atomic_load_explicit(&rings->any_handed, memory_order_acquire);
}

static void sleep_until_rung(struct rings *rings)
{
    if (announce_sleep(rings, 1)) {
        // Edge-triggered, so that the doorbells, which callers hold as well, are never read.
        struct epoll_event events[EVENTS];
        bool stopping = atomic_load_explicit(&rings->stopping, memory_order_acquire);
        epoll_wait(rings->epoll, events, EVENTS, stopping ? 1 : -1);
    }
    announce_sleep(rings, 0);
}

static void *run(void *argument)
{
    struct rings *rings = argument;
    rings->idle_since_ns = now_ns();
    for (;;) {
        beat_turn(&rings->beat);
        uint32_t taken = pass(rings);
        beat_turn(&rings->beat);
        if (taken > 0) {
            uint64_t now = now_ns();
            einsum_spin_adapt(&rings->spin, now - rings->idle_since_ns);
            rings->idle_since_ns = now;
            continue;
        }
        if (atomic_load_explicit(&rings->stopping, memory_order_acquire) &&
            atomic_load_explicit(&rings->in_flight, memory_order_acquire) == 0)
            return NULL;
        if (!einsum_spin_on(&rings->spin, now_ns() - rings->idle_since_ns))
            sleep_until_rung(rings);
    }
}

// ---- rings of a connection

// By others than the ring thread, which spins through the lock and would not let them have it.
static void lock_rings(struct rings *rings)
{
    atomic_fetch_add_explicit(&rings->wanting, 1, memory_order_relaxed);
    pthread_mutex_lock(&rings->lock);
    atomic_fetch_sub_explicit(&rings->wanting, 1, memory_order_relaxed);
}

NODISCARD static enum status check_ring(const struct rings *rings, const struct region *region,
                                        uint64_t offset, uint32_t entries, struct error *err)
{
    if (entries == 0 || (entries & (entries - 1)) != 0 || entries > rings->options.entries_max)
        return error_field(err, STATUS_INVALID_ARGUMENT, "entries",
                           "expected a power of two up to %" PRIu32
                           " (ring_entries_max), got %" PRIu32,
                           rings->options.entries_max, entries);
    if (region->on_device)
        return error_field(err, STATUS_INVALID_ARGUMENT, "region",
                           "a ring cannot lie in CUDA memory");
    return region_check(region, "offset", offset, einsum_ring_bytes(entries), REGION_ALIGNMENT,
                        err);
}

static struct ring *ring_alloc(uint32_t entries)
{
    struct ring *ring = calloc(1, sizeof *ring);
    struct request *requests = calloc(entries, sizeof *requests);
    int doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!ring || !requests || doorbell < 0) {
        if (doorbell >= 0)
            close(doorbell);
        free(requests);
        free(ring);
        return NULL;
    }
    for (uint32_t i = 0; i < entries; i++)
        requests[i].next = i + 1 < entries ? &requests[i + 1] : NULL;
    ring->requests = ring->free = requests;
    ring->entries = entries;
    ring->doorbell = doorbell;
    pthread_mutex_init(&ring->lock, NULL);
    return ring;
}

enum status ring_open(struct rings *rings, struct region *region, uint64_t offset, uint32_t entries,
                      struct ring **out, int *doorbell, struct error *err)
{
    enum status status = check_ring(rings, region, offset, entries, err);
    if (status != STATUS_OK)
        return status;
    struct ring *ring = ring_alloc(entries);
    if (!ring)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory or descriptor for a ring");
    uint8_t *memory = region->memory + offset;
    ring->rings = rings;
    ring->region = region_ref(region);
    ring->header = (void *)memory;
    memory += sizeof *ring->header;
    ring->submissions = (void *)memory;
    ring->completions = (void *)(memory + entries * sizeof *ring->submissions);
    atomic_init(&ring->references, 1);
    memset(ring->header, 0, sizeof *ring->header);
    einsum_ring_set(&ring->header->daemon_sleeps, 1);

    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    if (epoll_ctl(rings->epoll, EPOLL_CTL_ADD, ring->doorbell, &event) != 0) {
        ring_unref(ring);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "the doorbell cannot be watched: %s",
                         strerror(errno));
    }
    lock_rings(rings);
    ring->next = rings->list;
    if (ring->next)
        ring->next->previous = ring;
    rings->list = ring;
    pthread_mutex_unlock(&rings->lock);
    atomic_fetch_add_explicit(&rings->rings_n, 1, memory_order_relaxed);
    *doorbell = ring->doorbell;
    *out = ring;
    return STATUS_OK;
}

// What has not been launched is dropped; what has goes on, into memory that stays until then.
static void cancel_all(struct ring *ring)
{
    pthread_mutex_lock(&ring->lock);
    ring->closed = true;
    for (uint32_t i = 0; i < ring->entries; i++)
        if (ring->requests[i].in_use)
            atomic_store_explicit(&ring->requests[i].job.cancelled, true, memory_order_relaxed);
    pthread_mutex_unlock(&ring->lock);
    einsum_ring_tell(&ring->header->closed, 1);
    wake_caller(ring);
}

void ring_close(struct ring *ring)
{
    struct rings *rings = ring->rings;
    lock_rings(rings);
    if (ring->previous)
        ring->previous->next = ring->next;
    else
        rings->list = ring->next;
    if (ring->next)
        ring->next->previous = ring->previous;
    pthread_mutex_unlock(&rings->lock);
    epoll_ctl(rings->epoll, EPOLL_CTL_DEL, ring->doorbell, NULL);
    for (uint32_t i = 0; i < RING_REGIONS_MAX; i++)
        if (ring->regions[i])
            region_unref(ring->regions[i]);
    cancel_all(ring);
    atomic_fetch_sub_explicit(&rings->rings_n, 1, memory_order_relaxed);
    ring_unref(ring);
}

void ring_set_region(struct ring *ring, uint32_t number, struct region *region)
{
    ASSERT(number < RING_REGIONS_MAX);
    lock_rings(ring->rings);
    struct region *before = ring->regions[number];
    ring->regions[number] = region ? region_ref(region) : NULL;
    pthread_mutex_unlock(&ring->rings->lock);
    if (before)
        region_unref(before);
}

// Doubles the table if it is full. The caller holds rings.lock.
NODISCARD static bool grow_weights(struct ring *ring)
{
    if (ring->weights_n < ring->weights_room)
        return true;
    uint32_t room = ring->weights_room ? 2 * ring->weights_room : 64;
    struct weight_name *grown = realloc(ring->weights, room * sizeof *grown);
    if (!grown)
        return false;
    ring->weights = grown;
    ring->weights_room = room;
    return true;
}

enum status ring_add_weight(struct ring *ring, const char *name, uint32_t *number,
                            struct error *err)
{
    struct weights *weights = ring->rings->context->weights;
    size_t bytes = strlen(name);
    struct weight *weight =
        bytes <= WIRE_WEIGHT_BYTES_MAX ? weights_get(weights, name, bytes) : NULL;
    if (!weight)
        return error_field(err, STATUS_NOT_FOUND, "weight", "\"%.256s\" is not resident", name);
    weight_unref(weight);
    lock_rings(ring->rings);
    uint32_t n = 0;
    while (n < ring->weights_n && strcmp(ring->weights[n].text, name) != 0)
        n++;
    bool fits = n < ring->weights_n || (n < RING_WEIGHTS_MAX && grow_weights(ring));
    if (fits && n == ring->weights_n)
        strcpy(ring->weights[ring->weights_n++].text, name);
    pthread_mutex_unlock(&ring->rings->lock);
    if (!fits)
        return error_field(err, STATUS_RESOURCE_EXHAUSTED, "weight",
                           "a ring numbers at most %d weights", RING_WEIGHTS_MAX);
    *number = n;
    return STATUS_OK;
}

enum status rings_find_kernel(const struct rings *rings, const char *name, uint32_t *number,
                              struct error *err)
{
    return engine_kernel_find(rings->context->engine_ops, rings->context->engine, name, number,
                              err);
}

// ---- create, destroy

static void close_fds(struct rings *rings)
{
    if (rings->wake >= 0)
        close(rings->wake);
    if (rings->epoll >= 0)
        close(rings->epoll);
}

enum status rings_create(const struct rings_options *options, struct rings **out, struct error *err)
{
    struct rings *rings = calloc(1, sizeof *rings);
    if (!rings)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the rings");
    rings->options = *options;
    rings->context = options->context;
    einsum_spin_init(&rings->spin, options->spin_us);
    struct engine_info info;
    options->context->engine_ops->describe(options->context->engine, &info);
    rings->kernels_n = info.kernels_n;
    rings->epoll = epoll_create1(EPOLL_CLOEXEC);
    rings->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    int failed = rings->epoll < 0 || rings->wake < 0 ||
                         epoll_ctl(rings->epoll, EPOLL_CTL_ADD, rings->wake, &event) != 0
                     ? errno
                     : 0;
    pthread_mutex_init(&rings->lock, NULL);
    pthread_mutex_init(&rings->handed_lock, NULL);
    if (!failed) {
        // Signals are main's.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        failed = pthread_create(&rings->thread, NULL, run, rings);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (failed) {
        close_fds(rings);
        free(rings);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "starting the ring thread: %s",
                         strerror(failed));
    }
    pthread_setname_np(rings->thread, "ring");
    *out = rings;
    return STATUS_OK;
}

void rings_drain(struct rings *rings)
{
    atomic_store_explicit(&rings->draining, true, memory_order_relaxed);
}

void rings_wait_idle(struct rings *rings, uint32_t timeout_ms)
{
    uint64_t until_ns = now_ns() + timeout_ms * 1000000ull;
    while (atomic_load_explicit(&rings->in_flight, memory_order_acquire) > 0 && now_ns() < until_ns)
        usleep(1000);
}

void rings_destroy(struct rings *rings)
{
    atomic_store_explicit(&rings->stopping, true, memory_order_release);
    wake_thread(rings);
    pthread_join(rings->thread, NULL);
    ASSERT(!rings->list);
    close_fds(rings);
    pthread_mutex_destroy(&rings->handed_lock);
    pthread_mutex_destroy(&rings->lock);
    free(rings);
}

const struct beat *rings_beat(const struct rings *rings)
{
    return &rings->beat;
}

struct rings_stats rings_stats(const struct rings *rings)
{
    return (struct rings_stats){
        .rings = atomic_load_explicit(&rings->rings_n, memory_order_relaxed),
        .requests = atomic_load_explicit(&rings->requests, memory_order_relaxed),
    };
}
