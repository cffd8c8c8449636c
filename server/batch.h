// The batcher: jobs reserve room in the open batch, fill it where it lies, and leave with it.
// batch.c is the structure and its one lock; scheduler.c the thread that launches and completes.
//
//     FREE -> OPEN -> CLOSED -> RUNNING -> ANSWERING -> FREE
//
//     OPEN       takes reservations. Leaves when it is full, or when a lane is free and something
//                is committed: at once, so that an idle daemon adds no delay, or
//                max_queue_delay_us after the first commit if that is set.
//     CLOSED     waits until every reservation is committed or abandoned and a lane is free. Then
//                late and cancelled jobs are dropped and the rest is launched; with none left it
//                skips to ANSWERING.
//     RUNNING    until the engine is done; then each job's on_done is called.
//     ANSWERING  until every job has let go of the output memory.
//
// Who goes first, into a batch and with a batch onto a lane, is a matter of priority and then of
// shares: every connection gets as many tokens as any other that wants them (fair queueing by
// finish times). So a job of few tokens goes ahead of what waits of a flood of large ones, however
// many callers send it, and a flood of small ones does not hold up a large one for ever. Jobs of one
// connection keep their order. A batch stands where its first job stands; those still being filled
// are passed by.
//
// A batch owns one buffer of input and one of output memory, given by the engine at start. Nothing
// is allocated afterwards: when no buffer is free, jobs wait their turn in a queue of limited length,
// tokens and bytes. Past that, those that stand last give way to who stands before them, and else reserving
// fails with RESOURCE_EXHAUSTED and advice
// when to come again.
#pragma once

#include "job.h"
#include "metrics.h"

struct batcher;

struct batcher_options {
    const struct engine_ops *ops;
    struct engine *engine; // opened with wake = batcher_wake, see below
    uint32_t lanes;
    uint32_t batches; // buffers
    uint64_t batch_input_bytes, batch_output_bytes;
    uint32_t batch_tokens_max, batch_requests_max;
    uint32_t queue_requests_max;
    uint64_t queue_tokens_max; // 0: as many as the others let in
    uint64_t queue_bytes_max;  // that wait for room; 0: as many as all buffers of input hold
    uint32_t max_queue_delay_us;
    const uint32_t *buckets; // ascending, the last one batch_tokens_max; borrowed
    uint32_t buckets_n;
};

// The engine is opened before the batcher that it wakes, and closed after it, so the two meet in
// this: pass `&waker` to the engine as wake_context with batcher_wake as wake, and the same to
// batcher_create. All zero at first; outlives both.
struct batcher_waker {
    _Atomic uint32_t word; // private to scheduler.c
};
void batcher_wake(void *waker);

// Allocates the buffers and starts the scheduler thread.
NODISCARD enum status batcher_create(const struct batcher_options *options,
                                     struct batcher_waker *waker, struct batcher **batcher,
                                     struct error *err);
// No job is left (every one was released or abandoned). Stops the scheduler thread.
void batcher_destroy(struct batcher *batcher);

// How a job of more tokens than an empty batch takes is cut into parts: cut.h. Any thread.
struct batcher_cut {
    uint32_t tokens;  // of a part, all but the last; those of the job: it fits; 0: not one fits
    uint32_t at_once; // parts worth having under way: one a lane, and one to follow
};
struct batcher_cut batcher_cut(const struct batcher *batcher, const struct job *job);

// Any thread. Finds room for a job (IDLE, operand.tokens >= 1, shapes checked by the caller) and
// sets the operand's pointers: activations, scales and output each at 64 bytes. For attention:
// activations has room for attention_bytes() and rotations, at 64 bytes, for one of each token;
// layouts, scale type and scales are set to what kernels/attention.h leaves in place. Of what the
// job brings along (input_given, output_given) nothing is set; attention's rotations lie in the
// batch in any case.
// The job is then DECODING: fill it, then commit or abandon.
// RESOURCE_EXHAUSTED: full, with retry advice; INVALID_ARGUMENT: it would not fit an empty batch;
// UNAVAILABLE: the device is lost.
NODISCARD enum status batcher_reserve(struct batcher *batcher, struct job *job, struct error *err);
// The same for a job with an on_room. `*waits`: no buffer is free, so the job is WAITING until
// on_room is called, perhaps before this returns, or on_done, should the device be lost meanwhile.
NODISCARD enum status batcher_reserve_or_wait(struct batcher *batcher, struct job *job, bool *waits,
                                              struct error *err);
// Takes a turn, see batcher_turn, if one is due: the job may be done, and told so, on return.
void batcher_commit(struct batcher *batcher, struct job *job);
// Any thread. While the scheduler's thread sleeps, does its work here: launches what may leave and
// answers what is done by then, which saves two wake-ups where the engine is quick. Wakes it if
// anything is left for it. Owed after jobs that are `quiet`. Not from on_done or on_room.
void batcher_turn(struct batcher *batcher);
void batcher_abandon(struct batcher *batcher, struct job *job); // the job is IDLE again

// Any thread, after on_done: the output memory is needed no more. The job is IDLE again.
void batcher_release(struct batcher *batcher, struct job *job);

// Any thread: no buffer is free, so whoever can do without its output memory should release it.
bool batcher_scarce(struct batcher *batcher);

// Any thread. How long until what waits now will have run, by how fast batches ran of late: advice for
// whoever is refused.
uint32_t batcher_retry_ms(struct batcher *batcher);

// True once the engine has reported the device lost. Every later reserve fails.
bool batcher_device_lost(struct batcher *batcher);

// Any thread. While set, every reserve fails with UNAVAILABLE: what was launched does not come back.
void batcher_set_hung(struct batcher *batcher, bool hung);

// Of the batches that run the one that ought to come back first, for who watches.
struct batcher_running {
    uint32_t requests; // 0: none runs
    uint32_t tokens, bucket, weights;
    char weight[WEIGHT_NAME_BYTES]; // of the first request
    const char *kernel;             // that it asked for; static
    uint64_t since_ns; // its launch, or, where batches run in turn, the end of the last if later
};
void batcher_running(struct batcher *batcher, struct batcher_running *running);
// Works while somebody has the scheduler's turn.
const struct beat *batcher_beat(const struct batcher *batcher);
// Any thread. Hold for what comes from then on.
void batcher_set_limits(struct batcher *batcher, uint32_t queue_requests_max,
                        uint32_t max_queue_delay_us);

// Why jobs were refused.
enum batcher_full {
    FULL_NOT,
    FULL_REQUESTS,
    FULL_TOKENS,
    FULL_BYTES,
    FULL_BUFFERS,
    FULL_GAVE_WAY,
    FULL_REASONS
};

// How many requests, or weights, a batch has: the upper ends of the buckets are 1, 2, 4, ...
enum { BATCH_MIX_BOUNDS = 11 };
struct batcher_mix {
    uint64_t buckets[BATCH_MIX_BOUNDS + 1]; // what is over the last bound, too
    uint64_t sum;
};

struct batcher_stats {
    uint64_t batches, tokens, padding_tokens, requests; // launched
    uint64_t expired, cancelled;                        // jobs dropped before launch
    uint64_t failed;                                    // jobs answered with the engine's error
    uint64_t busy_ns;                                   // with at least one batch running
    uint64_t queue_ns; // of all batches launched, from the first commit to the launch
    // Of those batches that the engine timed phase by phase.
    uint64_t phase_batches;
    struct metrics_histogram copy_in, kernel, copy_out;
    struct metrics_histogram run;                     // of all batches, launch to end
    struct batcher_mix batch_requests, batch_weights; // launched: of each batch
    uint64_t refused[FULL_REASONS];                   // jobs
    uint64_t bucket_batches[ENGINE_BUCKETS_MAX];      // launched, by bucket
    uint32_t jobs;                                    // reserved and not yet released
    uint32_t queued;                                  // of those, not yet launched
    uint64_t queued_tokens, queued_bytes; // theirs, of input that has room or waits for it
    uint32_t buffers_free;
    uint64_t buffer_bytes; // all buffers
};
void batcher_stats(struct batcher *batcher, struct batcher_stats *stats);
