#include "verify.h"

#include <pthread.h>
#include <time.h>

enum { WAIT_MS_MAX = 10000 }; // for room in the queue

struct check {
    struct job job;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done; // by lock
};

static void on_done(struct job *job)
{
    struct check *check = CONTAINER_OF(job, struct check, job);
    pthread_mutex_lock(&check->lock);
    check->done = true;
    pthread_cond_signal(&check->changed);
    pthread_mutex_unlock(&check->lock);
}

static void sleep_ms(uint32_t ms)
{
    struct timespec pause = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    nanosleep(&pause, NULL);
}

NODISCARD static enum status reserve_patiently(struct batcher *batcher, struct job *job,
                                               struct error *err)
{
    uint32_t waited_ms = 0;
    for (;;) {
        enum status status = batcher_reserve(batcher, job, err);
        if (status != STATUS_RESOURCE_EXHAUSTED || waited_ms >= WAIT_MS_MAX)
            return status;
        uint32_t pause_ms = err->retry_after_ms > 0 ? err->retry_after_ms : 1;
        sleep_ms(pause_ms);
        waited_ms += pause_ms;
    }
}

static void run_to_done(struct batcher *batcher, struct check *check)
{
    pthread_mutex_init(&check->lock, NULL);
    pthread_cond_init(&check->changed, NULL);
    batcher_commit(batcher, &check->job);
    pthread_mutex_lock(&check->lock);
    while (!check->done)
        pthread_cond_wait(&check->changed, &check->lock);
    pthread_mutex_unlock(&check->lock);
    pthread_cond_destroy(&check->changed);
    pthread_mutex_destroy(&check->lock);
}

enum status verify_weight(struct batcher *batcher, struct weight *weight, uint32_t kernel,
                          bool wgmma, struct verify_result *result, struct error *err)
{
    uint64_t started_ns = now_ns();
    struct check check = {.job = {
                              .weight = weight,
                              .kernel = kernel,
                              .operand =
                                  {
                                      .tokens = SELFTEST_TOKENS,
                                      .groups = weight->format.groups,
                                      .activation_layout = EINSUM_ACTIVATIONS_TGR,
                                      .scale_layout = EINSUM_SCALES_TGK,
                                      .scale_type = EINSUM_SCALE_FP32,
                                      .output_type = EINSUM_OUTPUT_BF16,
                                  },
                              .deadline_ns = UINT64_MAX,
                              .received_ns = started_ns,
                              .on_done = on_done,
                          }};
    enum status status = reserve_patiently(batcher, &check.job, err);
    if (status != STATUS_OK)
        return status;
    // Batch memory is the daemon's to write; the operand calls it const since engines only read it.
    selftest_fill(&weight->format, (void *)(uintptr_t)check.job.operand.activations,
                  (void *)(uintptr_t)check.job.operand.scales);
    run_to_done(batcher, &check);
    if (check.job.error.status == STATUS_OK)
        selftest_judge(weight->answers, check.job.operand.output, wgmma, &result->verdict);
    else
        *err = check.job.error;
    status = check.job.error.status;
    batcher_release(batcher, &check.job);
    result->duration_ns = now_ns() - started_ns;
    return status;
}
