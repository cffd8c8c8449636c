// See watchdog.h. What is watched, and since when it has not changed:
//
//     the batch that has run longest      since its launch, or, where batches run one after the
//                                         other, since the last one that ended
//     beats: turn, rpc0 ..., ring         since the count that is odd was first seen
#include "watchdog.h"

#include <stdlib.h>

#include "batch.h"
#include "beat.h"
#include "log.h"
#include "ring.h"
#include "rpc.h"

enum {
    LOOKS = 8,           // in `ms`
    LOOK_MS_MAX = 1000,  // from one to the next
    OVER_MS_MAX = 5000,  // from the first word of it to the end
    BEATS_MAX = 2 + 256, // the scheduler's, the ring's, and those of all rpc threads
};

struct pulse {
    const char *what;
    const struct beat *beat;
    uint32_t seen;
    uint64_t since_ns;
};

struct watchdog {
    struct watchdog_options options;
    uv_timer_t look;
    struct pulse pulses[BEATS_MAX];
    size_t pulses_n;
    const char *hung; // NULL: nothing
    uint64_t hung_since_ns;
};

static void add_pulse(struct watchdog *watchdog, const char *what, const struct beat *beat)
{
    ASSERT(watchdog->pulses_n < BEATS_MAX);
    watchdog->pulses[watchdog->pulses_n++] = (struct pulse){.what = what, .beat = beat};
}

static void log_batch(const struct watchdog *watchdog, const struct batcher_running *running,
                      uint64_t ms)
{
    LOG(ERROR, "a batch does not come back", LOG_U64("ms", ms), LOG_STR("kernel", running->kernel),
        LOG_U64("tokens", running->tokens), LOG_U64("bucket", running->bucket),
        LOG_U64("requests", running->requests), LOG_U64("weights", running->weights),
        LOG_STR("weight", running->weight), LOG_U64("watchdog_ms", watchdog->options.ms));
}

// What has hung for `limit_ns`; NULL: nothing has. Logged, if it is news.
static const char *find_batch(const struct watchdog *watchdog, uint64_t now, uint64_t limit_ns)
{
    struct batcher_running running;
    batcher_running(watchdog->options.batcher, &running);
    if (running.requests == 0 || now < running.since_ns || now - running.since_ns < limit_ns)
        return NULL;
    if (!watchdog->hung)
        log_batch(watchdog, &running, (now - running.since_ns) / 1000000u);
    return "the engine hangs";
}

static const char *find_thread(struct watchdog *watchdog, uint64_t now, uint64_t limit_ns)
{
    const char *hung = NULL;
    for (size_t i = 0; i < watchdog->pulses_n; i++) {
        struct pulse *pulse = &watchdog->pulses[i];
        uint32_t count = beat_read(pulse->beat);
        if (count != pulse->seen || !beat_works(count)) {
            pulse->seen = count;
            pulse->since_ns = now;
        } else if (now - pulse->since_ns >= limit_ns) {
            if (!watchdog->hung)
                LOG(ERROR, "a thread does not go on", LOG_STR("what", pulse->what),
                    LOG_U64("ms", (now - pulse->since_ns) / 1000000u),
                    LOG_U64("watchdog_ms", watchdog->options.ms));
            hung = pulse->what;
        }
    }
    return hung;
}

static void on_look(uv_timer_t *timer)
{
    struct watchdog *watchdog = CONTAINER_OF(timer, struct watchdog, look);
    const struct watchdog_options *options = &watchdog->options;
    uint64_t now = now_ns(), limit_ns = (uint64_t)options->ms * 1000000u;
    const char *thread = find_thread(watchdog, now, limit_ns);
    const char *batch = find_batch(watchdog, now, limit_ns);
    const char *hung = batch ? batch : thread;
    if (!hung != !watchdog->hung) {
        watchdog->hung_since_ns = now;
        watchdog->hung = hung;
        options->on_change(options->context, hung);
    }
    uint64_t over_ms = options->ms < OVER_MS_MAX ? options->ms : OVER_MS_MAX;
    if (hung && now - watchdog->hung_since_ns >= over_ms * 1000000u)
        options->on_over(options->context, hung);
}

enum status watchdog_start(const struct watchdog_options *options, struct watchdog **out,
                           struct error *err)
{
    struct watchdog *watchdog = calloc(1, sizeof *watchdog);
    if (!watchdog)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for the watchdog");
    watchdog->options = *options;
    add_pulse(watchdog, "the scheduler hangs", batcher_beat(options->batcher));
    for (uint32_t i = 0; i < rpc_threads(options->rpc); i++)
        add_pulse(watchdog, "an rpc thread hangs", rpc_beat(options->rpc, i));
    if (options->rings)
        add_pulse(watchdog, "the ring thread hangs", rings_beat(options->rings));
    uint64_t every_ms = options->ms / LOOKS + 1;
    if (every_ms > LOOK_MS_MAX)
        every_ms = LOOK_MS_MAX;
    uv_timer_init(options->loop, &watchdog->look);
    uv_timer_start(&watchdog->look, on_look, every_ms, every_ms);
    *out = watchdog;
    return STATUS_OK;
}

void watchdog_stop(struct watchdog *watchdog)
{
    uv_timer_stop(&watchdog->look);
}

void watchdog_destroy(struct watchdog *watchdog)
{
    free(watchdog);
}
