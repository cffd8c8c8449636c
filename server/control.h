// Work that may block (loading weights, self-tests), handed from rpc threads to libuv's thread pool
// by way of the main loop.
#pragma once

#include <uv.h>

#include "status.h"

enum { CONTROL_TASKS_MAX = 32 }; // waiting or running

struct control;

struct control_task {
    void (*run)(struct control_task *task); // on a pool thread; may free the task
    struct control_task *next;              // private
};

NODISCARD enum status control_create(uv_loop_t *loop, struct control **control, struct error *err);
// Any thread. RESOURCE_EXHAUSTED: too many wait already; the task has not been taken.
NODISCARD enum status control_submit(struct control *control, struct control_task *task,
                                     struct error *err);
// Any thread: true once the daemon is going down, so that long work gives up.
bool control_stopping(const struct control *control);
void control_stop(struct control *control);
// Main thread, once the loop has closed its handles: no task is left.
void control_destroy(struct control *control);
