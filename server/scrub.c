// One thread, of the lowest priority: piece after piece, each at its time and not while requests wait. On
// a GPU a piece is a copy to the host, by the stream and buffers that loading uses.
#include "scrub.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "log.h"

enum {
    PIECE_BYTES = 1 << 20,
    BUSY_MS = 20,     // until it is looked again whether requests wait
    RETRY_MS = 60000, // between attempts to read a damaged weight again
};

struct scrub {
    struct scrub_options options;
    pthread_t thread;
    _Atomic uint64_t passes, bytes, damaged, reloaded;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool stopping; // by lock
};

// A weight by name and generation: held by reference between pieces, one that has been unloaded would
// keep its memory for as long as a pass takes.
struct target {
    char name[WEIGHT_NAME_BYTES];
    uint64_t generation;
};

struct pass {
    struct target *targets;
    uint32_t n, room;
    uint64_t bytes;
};

static void add_target(void *context, struct weight *weight)
{
    struct pass *pass = context;
    if (pass->n == pass->room) {
        uint32_t room = pass->room ? 2 * pass->room : 64;
        struct target *grown = realloc(pass->targets, room * sizeof *grown);
        if (!grown)
            return; // the next pass has it
        pass->targets = grown;
        pass->room = room;
    }
    struct target *target = &pass->targets[pass->n++];
    memcpy(target->name, weight->name, sizeof target->name);
    target->generation = weight->generation;
    pass->bytes += weight->resident_bytes;
}

// A reference; NULL: it has been replaced or unloaded.
static struct weight *get(const struct scrub *scrub, const struct target *target)
{
    struct weight *weight = weights_get(scrub->options.weights, target->name, strlen(target->name));
    if (!weight || weight->generation == target->generation)
        return weight;
    weight_unref(weight);
    return NULL;
}

static void count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

// False: it is time to end.
static bool sleep_until(struct scrub *scrub, uint64_t due_ns)
{
    const struct timespec due = {.tv_sec = (time_t)(due_ns / 1000000000u),
                                 .tv_nsec = (long)(due_ns % 1000000000u)};
    pthread_mutex_lock(&scrub->lock);
    int late = 0;
    while (!scrub->stopping && late == 0)
        late = pthread_cond_timedwait(&scrub->changed, &scrub->lock, &due);
    bool goes_on = !scrub->stopping;
    pthread_mutex_unlock(&scrub->lock);
    return goes_on;
}

static bool requests_wait(struct scrub *scrub)
{
    struct batcher_stats stats;
    batcher_stats(scrub->options.batcher, &stats);
    return stats.queued > 0;
}

static bool wait_for_turn(struct scrub *scrub, uint64_t due_ns)
{
    bool goes_on = sleep_until(scrub, due_ns);
    while (goes_on && requests_wait(scrub))
        goes_on = sleep_until(scrub, now_ns() + BUSY_MS * UINT64_C(1000000));
    return goes_on && !batcher_device_lost(scrub->options.batcher);
}

static void reload(struct scrub *scrub, struct weight *weight)
{
    struct error err;
    enum status status = weights_reload(scrub->options.weights, weight, &err);
    if (status == STATUS_OK) {
        count(&scrub->reloaded, 1);
        LOG(WARN, "damaged weight read again", LOG_STR("name", weight->name),
            LOG_STR("source", weight->source));
    } else if (status != STATUS_ABORTED) {
        LOG(ERROR, "damaged weight not read again", LOG_STR("name", weight->name),
            LOG_STR("reason", err.text));
    }
}

static void find_damaged(struct scrub *scrub, struct weight *weight, uint32_t crc)
{
    if (atomic_exchange_explicit(&weight->damaged, true, memory_order_relaxed))
        return;
    count(&scrub->damaged, 1);
    LOG(ERROR, "weight damaged in memory", LOG_STR("name", weight->name),
        LOG_U64("expected_crc32c", weight->crc32c), LOG_U64("got_crc32c", crc),
        LOG_U64("bytes", weight->resident_bytes));
}

// One more piece from `*at` on. False: there is none, or it is not to be had.
static bool scrub_piece(struct scrub *scrub, struct weight *weight, uint64_t *at, uint32_t *crc)
{
    const struct scrub_options *options = &scrub->options;
    uint64_t left = weight->resident_bytes - *at;
    uint64_t piece = left < PIECE_BYTES ? left : PIECE_BYTES;
    struct error err;
    if (options->ops->weight_sum(options->engine, weight->engine_weight, *at, piece, crc, &err) !=
        STATUS_OK) {
        LOG(WARN, "scrub gave up on a weight", LOG_STR("name", weight->name),
            LOG_STR("reason", err.text));
        return false;
    }
    *at += piece;
    count(&scrub->bytes, piece);
    if (*at < weight->resident_bytes)
        return true;
    if (*crc != weight->crc32c) {
        find_damaged(scrub, weight, *crc);
        reload(scrub, weight);
    }
    return false;
}

// False: it is time to end. `*due_ns`: of its first piece, and then of what follows it.
static bool scrub_weight(struct scrub *scrub, const struct target *target, uint64_t pass_bytes,
                         uint64_t *due_ns)
{
    double piece_ns = scrub->options.seconds * 1e9 * PIECE_BYTES / (double)pass_bytes;
    uint64_t at = 0;
    uint32_t crc = 0;
    for (bool more = true; more;) {
        if (!wait_for_turn(scrub, *due_ns))
            return false;
        struct weight *weight = get(scrub, target);
        if (!weight)
            return true;
        if (weight_damaged(weight)) {
            reload(scrub, weight);
            more = false;
        } else {
            more = scrub_piece(scrub, weight, &at, &crc);
        }
        weight_unref(weight);
        *due_ns = now_ns() + (uint64_t)piece_ns;
    }
    return true;
}

static void *run(void *argument)
{
    struct scrub *scrub = argument;
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 19); // else it competes with everybody
    uint64_t due_ns = now_ns();
    for (bool goes_on = true; goes_on;) {
        struct pass pass = {0};
        weights_visit(scrub->options.weights, add_target, &pass);
        for (uint32_t i = 0; i < pass.n && goes_on; i++)
            goes_on = scrub_weight(scrub, &pass.targets[i], pass.bytes, &due_ns);
        free(pass.targets);
        if (goes_on && pass.n > 0)
            count(&scrub->passes, 1);
        // Nothing to read, or what could not be read again: not all the time.
        if (pass.bytes == 0 || weights_totals(scrub->options.weights).damaged > 0)
            due_ns = now_ns() + RETRY_MS * UINT64_C(1000000);
        goes_on = goes_on && sleep_until(scrub, due_ns);
    }
    return NULL;
}

enum status scrub_create(const struct scrub_options *options, struct scrub **out, struct error *err)
{
    struct scrub *scrub = calloc(1, sizeof *scrub);
    if (!scrub)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    scrub->options = *options;
    pthread_mutex_init(&scrub->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&scrub->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    // Signals are for the threads that wait for them; a fault under a map is handled here.
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&scrub->thread, NULL, run, scrub);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!failed) {
        *out = scrub;
        return STATUS_OK;
    }
    pthread_cond_destroy(&scrub->changed);
    pthread_mutex_destroy(&scrub->lock);
    free(scrub);
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no thread for scrubbing could be started");
}

void scrub_destroy(struct scrub *scrub)
{
    if (!scrub)
        return;
    pthread_mutex_lock(&scrub->lock);
    scrub->stopping = true;
    pthread_cond_signal(&scrub->changed);
    pthread_mutex_unlock(&scrub->lock);
    pthread_join(scrub->thread, NULL);
    pthread_cond_destroy(&scrub->changed);
    pthread_mutex_destroy(&scrub->lock);
    free(scrub);
}

static uint64_t read_counter(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

struct scrub_stats scrub_stats(const struct scrub *scrub)
{
    if (!scrub)
        return (struct scrub_stats){0};
    return (struct scrub_stats){
        .passes = read_counter(&scrub->passes),
        .bytes = read_counter(&scrub->bytes),
        .damaged = read_counter(&scrub->damaged),
        .reloaded = read_counter(&scrub->reloaded),
    };
}
