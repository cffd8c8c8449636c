#include "verify.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
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

// Which of the request's choices are which is a matter of its number, so that all come up.
static struct einsum_operand operand_of(const struct einsum_weight_format *format,
                                        const struct engine_check *check,
                                        enum einsum_scale_type type, uint32_t number)
{
    bool packed = type == EINSUM_SCALE_UE8M0 && format->reduced_dim / format->block_r % 4 != 0;
    return (struct einsum_operand){
        .tokens = check->tokens,
        .groups = format->groups,
        .activation_layout = number & 1 ? EINSUM_ACTIVATIONS_GTR : EINSUM_ACTIVATIONS_TGR,
        .scale_layout = number & 2 && !packed ? EINSUM_SCALES_GKT : EINSUM_SCALES_TGK,
        .scale_type = type,
        .output_type = number & 4 ? EINSUM_OUTPUT_FP32 : EINSUM_OUTPUT_BF16,
    };
}

static void describe(const struct verify *verify, const struct job *job, bool wide,
                     struct selftest_verdict *verdict)
{
    const struct einsum_operand *operand = &job->operand;
    struct engine_info info;
    verify->ops->describe(verify->engine, &info);
    char cause[sizeof verdict->message];
    memcpy(cause, verdict->message, sizeof cause);
    snprintf(verdict->message, sizeof verdict->message,
             "%" PRIu32 " tokens by %s, %s, %s, %s%s scales, %s: %.160s", operand->tokens,
             job->kernel > 0 ? info.kernels[job->kernel - 1] : "the server's choice",
             operand->activation_layout == EINSUM_ACTIVATIONS_GTR ? "GTR" : "TGR",
             operand->scale_layout == EINSUM_SCALES_GKT ? "GKT" : "TGK", wide ? "small " : "",
             operand->scale_type == EINSUM_SCALE_UE8M0 ? "UE8M0" : "FP32",
             operand->output_type == EINSUM_OUTPUT_FP32 ? "FP32" : "BF16", cause);
}

static void add(struct selftest_verdict *all, const struct selftest_verdict *one)
{
    all->elements_checked += one->elements_checked;
    if (one->worst_error_ratio > all->worst_error_ratio)
        all->worst_error_ratio = one->worst_error_ratio;
    if (one->passed || !all->passed)
        return;
    all->passed = false;
    memcpy(all->message, one->message, sizeof all->message);
}

NODISCARD static enum status ask(struct verify *verify, struct weight *weight,
                                 const struct engine_check *check, enum einsum_scale_type type,
                                 uint32_t number, struct selftest_verdict *all, struct error *err)
{
    uint32_t kernel = verify->kernel ? verify->kernel : check->kernel;
    struct check it = {.job = {
                           .weight = weight,
                           .kernel = kernel,
                           .hurried = true,
                           .operand = operand_of(&weight->format, check, type, number),
                           .deadline_ns = UINT64_MAX,
                           .received_ns = now_ns(),
                           .on_done = on_done,
                       }};
    struct batcher_cut at = batcher_cut(verify->batcher, &it.job);
    if (at.tokens > 0 && at.tokens < it.job.operand.tokens)
        it.job.operand.tokens = at.tokens; // more never meet in a batch
    enum status status = reserve_patiently(verify->batcher, &it.job, err);
    if (status != STATUS_OK)
        return status;
    selftest_fill(&weight->format, &it.job.operand, check->wide);
    run_to_done(verify->batcher, &it);
    if (it.job.error.status == STATUS_OK) {
        struct selftest_verdict one;
        selftest_judge(weight->answers, &it.job.operand, check->wide,
                       engine_may_sum_by_wgmma(verify->ops, verify->engine, kernel), &one);
        if (!one.passed)
            describe(verify, &it.job, check->wide, &one);
        add(all, &one);
    } else {
        *err = it.job.error;
    }
    status = it.job.error.status;
    batcher_release(verify->batcher, &it.job);
    verify->requests_n++;
    return status;
}

// Whether it is the first of its format.
static bool note_format(struct verify *verify, const struct einsum_weight_format *format)
{
    for (uint32_t i = 0; i < verify->formats_n; i++)
        if (memcmp(&verify->formats[i], format, sizeof *format) == 0)
            return false;
    if (verify->formats_n < VERIFY_FORMATS_MAX)
        verify->formats[verify->formats_n++] = *format;
    return true;
}

enum status verify_weight(struct verify *verify, struct weight *weight,
                          struct verify_result *result, struct error *err)
{
    uint64_t started_ns = now_ns();
    struct engine_check checks[ENGINE_CHECKS_MAX];
    uint32_t n =
        verify->ops->checks ? verify->ops->checks(verify->engine, &weight->format, checks) : 0;
    bool first = note_format(verify, &weight->format);
    enum status status = STATUS_OK;
    *result = (struct verify_result){.verdict.passed = true};
    for (uint32_t i = 0; i < n && status == STATUS_OK; i++) {
        if ((checks[i].once && !first) || (checks[i].kernel && verify->kernel))
            continue;
        status = ask(verify, weight, &checks[i], EINSUM_SCALE_FP32, i, &result->verdict, err);
        if (status == STATUS_OK)
            status = ask(verify, weight, &checks[i], EINSUM_SCALE_UE8M0, ~i, &result->verdict, err);
    }
    verify->weights_n++;
    result->duration_ns = now_ns() - started_ns;
    return status;
}

enum status verify_or_refuse(struct verify *verify, struct weight *weight, struct error *err)
{
    struct verify_result result;
    struct error cause;
    enum status status = verify_weight(verify, weight, &result, &cause);
    if (status != STATUS_OK)
        return error_set(err, status, "self-test of weight \"%s\" could not be run: %s",
                         weight->name, cause.text);
    if (result.verdict.passed)
        return STATUS_OK;
    return error_set(err, STATUS_DATA_LOSS, "self-test of weight \"%s\" failed: %s", weight->name,
                     result.verdict.message);
}
