// What model.c, which follows the jobs, and model_lock.c, which looks at the batcher whenever its lock
// is given back, know of both.
#pragma once

#include "model.h"
#include "simulated.h"

enum {
    MODEL_JOBS_MAX = 256,
    MODEL_WAITING_MAX = 64,
    MODEL_SERIAL_TOKENS = 256, // of batches that run, past which a serial engine gets no more
    MODEL_BUFFERS_TO_KEEP_ONE = 3,
};

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
    struct job *waiting[MODEL_WAITING_MAX];
    uint32_t waiting_n, free_n, lanes_free, running_tokens, queued;
    uint64_t waiting_bytes, refused[FULL_REASONS];
    int open; // -1: none
    bool lost;
};

struct standing {
    enum job_priority priority;
    uint64_t share_end;
};

struct model {
    struct batcher *batcher;
    int scheduler;
    struct tracked jobs[MODEL_JOBS_MAX];
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
};
extern struct model model;

uint32_t model_index_of(const struct batch *batch);
struct tracked *model_find(const struct job *job); // NULL: nobody's
bool model_before(enum job_priority priority, uint64_t share_end, enum job_priority than_priority,
                  uint64_t than_share_end);
bool model_tracked_before(const struct tracked *a, const struct tracked *b);
uint64_t model_waiting_bytes(const struct job *job); // that it needs of the queue

void model_on_locked(const pthread_mutex_t *mutex);
void model_on_unlocking(const pthread_mutex_t *mutex);
