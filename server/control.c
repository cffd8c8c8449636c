#include "control.h"

#include <stdatomic.h>
#include <stdlib.h>

// What libuv is lent of a task that runs. As many as there may be tasks, so that none needs memory.
struct work {
    uv_work_t request;
    struct control *control;
    struct control_task *task;
    struct work *next; // free
};

struct control {
    uv_loop_t *loop;
    uv_async_t wake; // the one thing of libuv that other threads may touch
    uv_mutex_t lock;
    struct control_task *first, **last; // handed over, not yet with libuv; by lock
    uint32_t tasks_n;                   // not yet finished; by lock
    _Atomic bool stopping;
    struct work works[CONTROL_TASKS_MAX];
    struct work *free; // main thread only
};

static void on_work(uv_work_t *request)
{
    struct work *work = CONTAINER_OF(request, struct work, request);
    work->task->run(work->task);
    uv_mutex_lock(&work->control->lock);
    work->control->tasks_n--;
    uv_mutex_unlock(&work->control->lock);
}

static void start_tasks(struct control *control);

static void on_worked(uv_work_t *request, int status)
{
    (void)status; // never cancelled: what was submitted runs
    struct work *work = CONTAINER_OF(request, struct work, request);
    work->next = work->control->free;
    work->control->free = work;
    start_tasks(work->control);
}

static struct control_task *take_task(struct control *control)
{
    uv_mutex_lock(&control->lock);
    struct control_task *task = control->first;
    if (task)
        control->first = task->next;
    if (!control->first)
        control->last = &control->first;
    uv_mutex_unlock(&control->lock);
    return task;
}

// A task may be finished and another take its place before libuv has returned what it was lent.
static void start_tasks(struct control *control)
{
    struct control_task *task;
    while (control->free && (task = take_task(control))) {
        struct work *work = control->free;
        control->free = work->next;
        work->task = task;
        int queued = uv_queue_work(control->loop, &work->request, on_work, on_worked);
        ASSERT(queued == 0);
    }
}

static void on_wake(uv_async_t *wake)
{
    start_tasks(CONTAINER_OF(wake, struct control, wake));
}

// libuv starts its threads with the first work that it is given, and aborts if it cannot: better at
// the start than at the first load.
static void do_nothing(struct control_task *task)
{
    (void)task;
}

enum status control_create(uv_loop_t *loop, struct control **out, struct error *err)
{
    struct control *control = calloc(1, sizeof *control);
    if (!control)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the control queue");
    control->loop = loop;
    control->last = &control->first;
    for (size_t i = 0; i < ARRAY_LEN(control->works); i++) {
        control->works[i] = (struct work){.control = control, .next = control->free};
        control->free = &control->works[i];
    }
    if (uv_mutex_init(&control->lock) != 0)
        goto free_control;
    if (uv_async_init(loop, &control->wake, on_wake) != 0)
        goto destroy_lock;
    static struct control_task first_task = {.run = do_nothing};
    *control->last = &first_task;
    control->tasks_n = 1;
    start_tasks(control);
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
