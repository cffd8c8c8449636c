// What batch.c and scheduler.c share: the batches, the queue that they stand in, and the rule by
// which one of them may launch.
//
//     free:   stack of FREE batches
//     queue:  CLOSED, CLOSED, OPEN      in order of opening; at most the last one is open. They leave
//                                       by standing
//     lanes:  RUNNING                   one a lane
//     (in no list: ANSWERING; the last job to be released returns it to `free`)
//
// Functions that end in _locked are called with batcher.lock held. The lock is a leaf: nothing is
// called under it that takes another, and neither engine nor on_done is.
#pragma once

#include <pthread.h>

#include "batch.h"
#include "beat.h"

enum { CONNECTIONS_TOLD_APART = 4096 }; // by number modulo this

enum batch_state { BATCH_FREE, BATCH_OPEN, BATCH_CLOSED, BATCH_RUNNING, BATCH_ANSWERING };

// Guarded by batcher.lock, except that a batch which is RUNNING or later belongs to whoever has the
// scheduler's turn, all but `state` and `held`.
struct batch {
    enum batch_state state;
    struct batch *next; // in `free`, in `queue`, or among those that the scheduler is answering

    void *input, *output;                 // from the engine, for good
    uint64_t input_used, output_used;     // bytes; multiples of a cache line
    uint64_t input_staged, output_staged; // likewise, from the end
    uint32_t tokens;                      // of all reservations
    uint32_t filling;                     // jobs that are DECODING
    uint32_t held;                        // jobs reserved and not yet abandoned or released
    struct job **jobs;                    // committed
    uint32_t jobs_n;
    uint64_t first_commit_ns;   // of jobs[0]
    bool hurried;               // one of them is
    enum job_priority priority; // of the job that stands first in it
    uint64_t share_end;         // of the same
    uint64_t share_start_last;  // of all its jobs

    uint64_t launched_ns;
    uint64_t watched_ns;             // the same while it runs; guarded by lock. 0: it does not
    uint32_t weights_n;              // in the launch
    struct engine_segment *segments; // of the jobs left at launch, in order of weight
    struct engine_batch launch;      // what the engine got
    struct engine_result result;     // what it gave back
};

struct batcher {
    struct batcher_options options;
    struct batcher_waker *waker;
    struct batch *batches;           // options.batches of them
    struct job **jobs;               // batch.jobs point in here
    struct engine_segment *segments; // and batch.segments here
    pthread_mutex_t turn;            // held by whoever schedules; guards the next two
    struct batch **lanes;            // the batch that runs on each
    uint64_t active_last_ns;         // a launch or a batch's end
    struct beat beat;                // of the turn
    pthread_t scheduler;
    _Atomic bool device_lost; // set under the lock
    _Atomic bool hung;
    _Atomic uint32_t free_n; // length of `free`; set under the lock

    pthread_mutex_t lock; // guards the batches and all that follows
    struct batch *free;
    struct batch *queue, **queue_end;
    struct batch *open;                          // the last in `queue`, or NULL
    uint32_t queue_batches;                      // length of `queue`
    struct job *waiting, *waiting_last;          // for room, by standing
    uint64_t waiting_bytes, waiting_tokens;      // that they will need of input; theirs
    uint64_t share_now;                          // where the last job that was launched started
    uint64_t share_ends[CONNECTIONS_TOLD_APART]; // of each connection's last job
    uint32_t lanes_free;
    uint32_t running_tokens; // of the batches in the other lanes
    bool stopping;
    // When the scheduler will look by itself: 0 while it is awake, UINT64_MAX while it sleeps until
    // woken. Who changes something that lets a batch launch earlier wakes it, and nobody else does.
    uint64_t scheduler_wakes_at_ns;
    bool scheduler_sleeps;              // or is about to, or has just been woken
    uint64_t scheduler_sleeps_until_ns; // valid while it does
    uint64_t run_ns_average;            // of a batch, the last ones weighing most
    uint64_t busy_since_ns;             // valid while a lane is busy
    uint64_t done_last_ns;              // the last end of a batch
    struct batcher_stats stats;
};

// When a batch in the queue may launch (or be answered, once the device is lost): 0 for
// now, UINT64_MAX for not before something changes.
uint64_t batcher_launch_at_ns_locked(const struct batcher *batcher);
// Whether the caller, after a change, must call batcher_wake (outside the lock).
bool batcher_must_wake_locked(struct batcher *batcher);

// OPEN -> CLOSED.
void batch_close_locked(struct batcher *batcher, struct batch *batch);
// Of those that may leave now the one that stands first, CLOSED; NULL: none. A batch that may leave
// but for jobs which fill it is closed, so that the last of them lets it go.
struct batch *batcher_ready_locked(struct batcher *batcher, uint64_t now_ns);
// It leaves the queue: CLOSED -> RUNNING.
void batcher_dequeue_locked(struct batcher *batcher, struct batch *batch);
// RUNNING -> ANSWERING, and on to FREE if no job holds it.
void batch_answering_locked(struct batcher *batcher, struct batch *batch);

// Gives the jobs that wait what room there is, and tells them.
void batcher_give_room(struct batcher *batcher);
// Takes all that wait: the device is lost. Linked by next_waiting.
struct job *batcher_take_waiting(struct batcher *batcher);

NODISCARD enum status scheduler_start(struct batcher *batcher, struct error *err);
void scheduler_stop(struct batcher *batcher);
