// A job is one projection on its way through the daemon. It has one owner at a time, and
// job_advance is the only function that hands it on; the hand-over is a release store, so that the
// next owner sees all that the last one wrote.
//
//     state      owner        leaves by
//     IDLE       rpc thread   batcher_reserve finds room, or lets it wait for some
//     WAITING    batcher      a buffer comes free, it gives way, or the device is lost
//     DECODING   rpc thread   the batch's memory is filled, or batcher_abandon
//     QUEUED     scheduler    its batch is launched, or it is dropped: expired, cancelled
//     RUNNING    scheduler    the engine is done
//     DONE       rpc thread   the reply is made: REPLYING, or the job is released at once
//     REPLYING   rpc thread   gRPC lets go of the reply's memory
#pragma once

#include <stdatomic.h>

#include "engine.h"
#include "weights.h"

enum job_state {
    JOB_IDLE,
    JOB_WAITING,
    JOB_DECODING,
    JOB_QUEUED,
    JOB_RUNNING,
    JOB_DONE,
    JOB_REPLYING,
};

// The numbers are the API's. Unset, as of a job that no caller sent: normal.
enum job_priority { JOB_PRIORITY_UNSET, JOB_PRIORITY_LOW, JOB_PRIORITY_NORMAL, JOB_PRIORITY_HIGH };

struct batch;

struct job {
    _Atomic enum job_state state;
    // Set by whoever asks for it; the owner looks before launch and after.
    _Atomic bool cancelled;

    // The request, valid from IDLE on. operand's pointers are set by batcher_reserve; for attention
    // its layouts and scale type, too.
    struct weight *weight; // a reference
    struct einsum_operand operand;
    uint32_t kernel; // see struct engine_segment
    bool attention;  // what arrives is attention's output and rotations: kernels/attention.h
    // operand's pointers to inputs or output are set by then, to memory that the engine has been
    // told of (memory_register) and that stays until the job is answered: no room is needed there.
    bool input_given, output_given;
    // But for what the engine stages: what is given takes room on the device alone. Attention may be
    // given then; its rotations are not.
    bool staged;
    // Reserving and committing wake nobody: the owner calls batcher_turn soon after, once for all.
    bool quiet;
    bool hurried;         // its batch leaves without waiting for company (max_queue_delay_us)
    uint64_t deadline_ns; // on now_ns()'s clock; UINT64_MAX: none
    uint64_t received_ns;
    enum job_priority priority;
    uint32_t connection; // whose jobs share with those of others, see batch.h; 0: no connection's
    // Of a part of another job (cut.h), from this of its tokens on; NULL: it is none. Cancelled with it.
    const struct job *whole;
    uint32_t first_token;

    // How it ended; valid in DONE.
    struct error error;
    uint64_t queued_ns, launched_ns, done_ns;
    uint32_t batch_tokens, batch_bucket, batch_requests; // tokens, padded tokens; 0 if dropped

    // Told once, after DONE, by whoever has the scheduler's turn, or reserves for another to whom this
    // one gives way. Must not block, reserve or commit. The new owner waits for it: seeing the state
    // change is not enough.
    void (*on_done)(struct job *job);

    // Told on any thread that a job which waited is DECODING now. Must not block. NULL if it never
    // waits.
    void (*on_room)(struct job *job);

    // Private to batch.c. Where it stands among others: in tokens of its connection's share.
    uint64_t share_start, share_end;
    struct job *next_waiting;
    struct batch *batch;
    const uint8_t *input, *output; // its room in the batch, of so many bytes:
    uint64_t input_bytes, output_bytes;
    const uint8_t *staged_input, *staged_output; // likewise, of what is staged
    uint64_t staged_input_bytes, staged_output_bytes;
};

static inline bool job_cancelled(const struct job *job)
{
    return atomic_load_explicit(&job->cancelled, memory_order_relaxed) ||
           (job->whole && atomic_load_explicit(&job->whole->cancelled, memory_order_relaxed));
}

// Where a tensor of a job lies within that of its request: all of it, or, of a part, so many runs of
// bytes, which a part of its own memory takes one behind the other.
struct job_runs {
    uint32_t n;
    uint64_t offset, bytes;          // of the first; of each
    uint64_t from_stride, to_stride; // from one to the next, in the request's and in the job's
};
struct job_runs job_activation_runs(const struct job *job); // of attention: its output
struct job_runs job_scale_runs(const struct job *job);      // of attention: positions

// From `from` to `to`; asserts that the job was in `from` and that the table above has that step.
void job_advance(struct job *job, enum job_state from, enum job_state to);

// Counts how a request ended in the counters of its weight. Nothing, if it was never accepted.
void job_count(const struct job *job, enum status status);
