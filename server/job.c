// The states of a job and the steps between them; job.h tells who owns a job in each. And where a
// part's tensors lie in its request. Any thread, on jobs that it owns.
#include "job.h"

#include <time.h>

#include "../kernels/attention.h"

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

static struct job_runs one_run(uint64_t offset, uint64_t bytes)
{
    return (struct job_runs){.n = 1, .offset = offset, .bytes = bytes};
}

struct job_runs job_activation_runs(const struct job *job)
{
    const struct einsum_operand *operand = &job->operand;
    uint64_t tokens = operand->tokens, first = job->first_token;
    uint64_t reduced_dim = job->weight->format.reduced_dim;
    uint64_t token_bytes = job->attention
                               ? attention_bytes(1, operand->groups, reduced_dim)
                               : einsum_activation_bytes(1, operand->groups, reduced_dim);
    if (!job->whole || job->attention || operand->activation_layout != EINSUM_ACTIVATIONS_GTR)
        return one_run(first * token_bytes, tokens * token_bytes);
    return (struct job_runs){
        .n = operand->groups,
        .offset = first * reduced_dim,
        .bytes = tokens * reduced_dim,
        .from_stride = job->whole->operand.tokens * reduced_dim,
        .to_stride = tokens * reduced_dim,
    };
}

struct job_runs job_scale_runs(const struct job *job)
{
    const struct einsum_weight_format *format = &job->weight->format;
    const struct einsum_operand *operand = &job->operand;
    uint64_t tokens = operand->tokens, first = job->first_token;
    if (job->attention)
        return one_run(first * sizeof(int64_t), tokens * sizeof(int64_t));
    uint64_t token_bytes =
        einsum_scale_bytes(EINSUM_SCALES_TGK, operand->scale_type, 1, operand->groups,
                           format->reduced_dim / format->block_r);
    bool token_fastest = operand->scale_layout == EINSUM_SCALES_GKT;
    if (!job->whole)
        return one_run(0, (token_fastest ? einsum_align4(tokens) : tokens) * token_bytes);
    if (!token_fastest)
        return one_run(first * token_bytes, tokens * token_bytes);
    // A token has one word in each run, of FP32 or of four blocks' UE8M0.
    return (struct job_runs){
        .n = (uint32_t)(token_bytes / sizeof(uint32_t)),
        .offset = first * sizeof(uint32_t),
        .bytes = tokens * sizeof(uint32_t),
        .from_stride = einsum_align4(job->whole->operand.tokens) * sizeof(uint32_t),
        .to_stride = einsum_align4(tokens) * sizeof(uint32_t),
    };
}

static void add(_Atomic uint64_t *counter, uint64_t value)
{
    atomic_fetch_add_explicit(counter, value, memory_order_relaxed);
}

static uint64_t wall_clock_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void job_count(const struct job *job, enum status status)
{
    if (!job->weight || job->received_ns == 0)
        return;
    struct weight_counters *counters = &job->weight->counters;
    uint64_t total_ns = now_ns() - job->received_ns;
    if (status != STATUS_OK) {
        add(&counters->failed, 1);
        add(&counters->failed_ns, total_ns);
        return;
    }
    add(&counters->answered, 1);
    add(&counters->answered_ns, total_ns);
    add(&counters->fill_ns, job->queued_ns - job->received_ns);
    add(&counters->queue_ns, job->launched_ns - job->queued_ns);
    add(&counters->run_ns, job->done_ns - job->launched_ns);
    atomic_store_explicit(&counters->last_ms, wall_clock_ms(), memory_order_relaxed);
}
