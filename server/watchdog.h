// Looks for what hangs: a batch that does not come back, a turn of the scheduler, an rpc thread or
// the ring thread in one piece of work. After `ms` it is told of, and requests are refused; if it
// goes on after all, that is told too, and if it does not for some seconds more, the process ends,
// so that a supervisor starts it anew. Main thread; that the main loop itself goes on is for the
// supervisor to watch (supervisor.h).
#pragma once

#include <uv.h>

#include "status.h"

struct batcher;
struct rings;
struct rpc;

struct watchdog;

struct watchdog_options {
    uv_loop_t *loop;
    uint32_t ms;
    struct batcher *batcher;
    struct rpc *rpc;
    struct rings *rings; // NULL: none
    // What hangs, in a few words, static; NULL: it goes on again.
    void (*on_change)(void *context, const char *hung);
    // It has hung for too long. Does not return.
    void (*on_over)(void *context, const char *hung);
    void *context;
};

NODISCARD enum status watchdog_start(const struct watchdog_options *options,
                                     struct watchdog **watchdog, struct error *err);
// Its timer is closed with the loop's other handles; then it may be destroyed.
void watchdog_stop(struct watchdog *watchdog);
void watchdog_destroy(struct watchdog *watchdog); // NULL is allowed
