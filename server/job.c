// The states of a job and the steps between them; job.h tells who owns a job in each. Any thread,
// on jobs that it owns.
#include "job.h"

#define TO(state) (1u << (state))

// The states that may follow each state.
static const uint32_t steps[] = {
    [JOB_IDLE] = TO(JOB_DECODING) | TO(JOB_WAITING),
    [JOB_WAITING] = TO(JOB_DECODING) | TO(JOB_DONE),
    [JOB_DECODING] = TO(JOB_QUEUED) | TO(JOB_IDLE),
    [JOB_QUEUED] = TO(JOB_RUNNING) | TO(JOB_DONE),
    [JOB_RUNNING] = TO(JOB_DONE),
    [JOB_DONE] = TO(JOB_REPLYING) | TO(JOB_IDLE),
    [JOB_REPLYING] = TO(JOB_IDLE),
};

void job_advance(struct job *job, enum job_state from, enum job_state to)
{
    ASSERT((size_t)from < ARRAY_LEN(steps));
    ASSERT((size_t)to < ARRAY_LEN(steps));
    bool in_table = steps[from] & TO(to);
    ASSERT(in_table);

    // Compared, not just stored: two owners at once must not go unseen.
    enum job_state seen = from;
    bool was_in_from = atomic_compare_exchange_strong_explicit(
        &job->state, &seen, to, memory_order_acq_rel, memory_order_acquire);
    ASSERT(was_in_from);
}
