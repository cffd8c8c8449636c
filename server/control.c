#include "control.h"

#include <stdatomic.h>
#include <stdlib.h>

struct control {
    uv_loop_t *loop;
    uv_async_t wake; // the one thing of libuv that other threads may touch
    uv_mutex_t lock;
    struct control_task *first, **last; // handed over, not yet with libuv; by lock
    uint32_t tasks_n;                   // not yet finished; by lock
    _Atomic bool stopping;
};

struct work {
    uv_work_t request;
    struct control *control;
    struct control_task *task;
};

static void on_work(uv_work_t *request)
{
    struct work *work = CONTAINER_OF(request, struct work, request);
    work->task->run(work->task);
    uv_mutex_lock(&work->control->lock);
    work->control->tasks_n--;
    uv_mutex_unlock(&work->control->lock);
}

static void on_worked(uv_work_t *request, int status)
{
    (void)status; // never cancelled: what was submitted runs
    free(CONTAINER_OF(request, struct work, request));
}

static void on_wake(uv_async_t *wake)
{
    struct control *control = CONTAINER_OF(wake, struct control, wake);
    uv_mutex_lock(&control->lock);
    struct control_task *task = control->first;
    control->first = NULL;
    control->last = &control->first;
    uv_mutex_unlock(&control->lock);
    while (task) {
        struct control_task *next = task->next;
        struct work *work = malloc(sizeof *work);
        ASSERT(work); // a few dozen bytes, at most CONTROL_TASKS_MAX times
        work->control = control;
        work->task = task;
        int queued = uv_queue_work(control->loop, &work->request, on_work, on_worked);
        ASSERT(queued == 0);
        task = next;
    }
}

enum status control_create(uv_loop_t *loop, struct control **out, struct error *err)
{
    struct control *control = calloc(1, sizeof *control);
    if (!control)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the control queue");
    control->loop = loop;
    control->last = &control->first;
    if (uv_mutex_init(&control->lock) != 0)
        goto free_control;
    if (uv_async_init(loop, &control->wake, on_wake) != 0)
        goto destroy_lock;
    *out = control;
    return STATUS_OK;

destroy_lock:
    uv_mutex_destroy(&control->lock);
free_control:
    free(control);
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "the control queue could not be set up");
}

enum status control_submit(struct control *control, struct control_task *task, struct error *err)
{
    task->next = NULL;
    uv_mutex_lock(&control->lock);
    bool full = control->tasks_n >= CONTROL_TASKS_MAX;
    if (!full) {
        control->tasks_n++;
        *control->last = task;
        control->last = &task->next;
    }
    uv_mutex_unlock(&control->lock);
    if (full) {
        error_set(err, STATUS_RESOURCE_EXHAUSTED, "%d control requests are under way already",
                  CONTROL_TASKS_MAX);
        err->retry_after_ms = 1000;
        return err->status;
    }
    uv_async_send(&control->wake);
    return STATUS_OK;
}

bool control_stopping(const struct control *control)
{
    return atomic_load_explicit(&control->stopping, memory_order_relaxed);
}

void control_stop(struct control *control)
{
    atomic_store_explicit(&control->stopping, true, memory_order_relaxed);
}

void control_destroy(struct control *control)
{
    ASSERT(control->tasks_n == 0);
    uv_mutex_destroy(&control->lock);
    free(control);
}
