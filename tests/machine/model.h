// What must hold of the batcher whatever happens, checked at each step: when its lock is given back,
// when a job changes its state, when the engine gets a batch, and when a job is told of something.
// What should be, the model works out for itself from the jobs and the rules of batch.h.
//
//     one owner         a job's state changes along job.h's table, by its owner, and is not touched after
//     answered once     each job that has room or waits for it; nobody sleeps while there is work
//     right rows        a job's room is its own as long as it holds it (rows: machine.c's)
//     nothing leaked    counters add up at each step; all is back when nobody wants anything
//     order             a connection's jobs of a class never overtake each other
//     fairness          who stands first by priority and share goes first, into a batch and with it
//                       onto a lane, and is there after a bounded number of batches
//     limits            of batches, lanes, the queue and its bytes; refused only if one is reached
//     buckets           a batch has the smallest that holds it
//     drops             late or cancelled jobs are not launched, and no other is dropped
#pragma once

#include "server/batch_internal.h"

enum { MODEL_CONNECTIONS = 8, MODEL_BATCHES_MAX = 12, MODEL_LANES_MAX = 4 };

// A rule that does not hold ends the process.
#define MUST(condition, ...)                                                                       \
    ((condition) ? (void)0 : model_failed(#condition, __FILE__, __LINE__, __VA_ARGS__))
NORETURN PRINTF_LIKE(4, 5) void model_failed(const char *condition, const char *file, int line,
                                             const char *format, ...);

// `scheduler`: its fiber.
void model_begin(struct batcher *batcher, int scheduler);
// Nobody wants anything: all must be back.
void model_idle(void);
void model_end(void);
uint32_t model_jobs(void);     // in the batcher's hands or lent by it
uint64_t model_launches(void); // batches so far

// Of the engine.
void model_submitted(uint32_t lane, const struct engine_batch *batch);
void model_finished(uint32_t lane, enum status status);
void model_polled(void);

// In place of the batcher's, for all who call them.
NODISCARD enum status model_reserve(struct batcher *batcher, struct job *job, struct error *err);
NODISCARD enum status model_reserve_or_wait(struct batcher *batcher, struct job *job, bool *waits,
                                            struct error *err);
void model_commit(struct batcher *batcher, struct job *job);
void model_abandon(struct batcher *batcher, struct job *job);
void model_release(struct batcher *batcher, struct job *job);
void model_advance(struct job *job, enum job_state from, enum job_state to);
