// See reload.h. One reload at a time; its struct change goes from the pool's thread to the main one
// and back.
#include "reload.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "access.h"
#include "batch.h"
#include "engine.h"
#include "gate.h"
#include "listener.h"
#include "log.h"
#include "rope.h"
#include "rpc.h"
#include "service.h"
#include "supervisor.h"
#include "tls.h"
#include "trace.h"
#include "weights.h"

// A configuration as it was read, and what its weights are known by.
struct file {
    struct config config; // first: what reload_file_ref gives
    uint64_t tags[CONFIG_WEIGHTS_MAX];
    _Atomic uint32_t references;
};

enum { PARTS_N = 3 };

// One reload.
struct change {
    struct reload *reload;
    struct file *next;
    void *prepared[PARTS_N]; // by part; NULL: nothing to do for it
    char changed[CONFIG_CHANGED_BYTES];
    uint64_t started_ns;
    struct error error;
};

struct reload {
    struct reload_options options;
    uv_work_t work;
    struct change *change; // under way; NULL: none
    bool again;            // asked for meanwhile
    struct reload_stats stats;
    uint64_t tag_last; // given out; by whoever has the change

    pthread_mutex_t lock;
    struct file *file; // guarded by lock; written by the main thread
};

struct part {
    const char *key; // for an error that names none
    // Pool thread. May leave `*prepared` NULL.
    enum status (*prepare)(struct change *change, void **prepared, struct error *err);
    void (*commit)(void *prepared); // main thread
    // Any thread. After commit of what went, else of what was prepared.
    void (*destroy)(void *prepared);
};

// ---- files

static void file_unref(struct file *file)
{
    if (!file || atomic_fetch_sub(&file->references, 1) > 1)
        return;
    config_deinit(&file->config);
    free(file);
}

static struct file *file_ref(struct reload *reload)
{
    pthread_mutex_lock(&reload->lock);
    struct file *file = reload->file;
    atomic_fetch_add(&file->references, 1);
    pthread_mutex_unlock(&reload->lock);
    return file;
}

const struct config *reload_file_ref(struct reload *reload)
{
    return &file_ref(reload)->config;
}

void reload_file_unref(const struct config *file)
{
    file_unref((struct file *)(uintptr_t)file);
}

// ---- the weights, and their ropes

static bool still_wanted(void *context, uint32_t weights_done, uint32_t weights_total,
                         uint64_t bytes_done, uint64_t bytes_total)
{
    (void)weights_done, (void)weights_total, (void)bytes_done, (void)bytes_total;
    const struct change *change = context;
    return !atomic_load_explicit(&change->reload->options.context->draining, memory_order_relaxed);
}

// The difference between the entries of two files.
struct difference {
    struct weights_load loads[CONFIG_WEIGHTS_MAX];
    size_t loads_n;
    size_t entries[CONFIG_WEIGHTS_MAX]; // of each load: which entry of the new file it is
    uint64_t drops[CONFIG_WEIGHTS_MAX];
    size_t drops_n;
    struct weights_rope ropes[CONFIG_ROPES_MAX];
    struct rope_options rope_options[CONFIG_ROPES_MAX];
};

static void add_load(struct change *change, struct difference *difference, size_t index)
{
    const struct config_weights *entry = &change->next->config.weights[index];
    change->next->tags[index] = ++change->reload->tag_last;
    difference->entries[difference->loads_n] = index;
    struct weights_load *load = &difference->loads[difference->loads_n++];
    *load = reload_weights_load(entry, change->next->tags[index]);
    load->threads = 1; // serving goes on beside it
    load->progress = still_wanted;
    load->progress_context = change;
}

// Entries that both files have keep their weights, unless ropes changed: a weight has its rope for
// life.
static void compare_weights(struct change *change, const struct file *now, bool ropes_equal,
                            struct difference *difference)
{
    const struct config *next = &change->next->config;
    bool kept[CONFIG_WEIGHTS_MAX] = {false};
    for (size_t i = 0; i < next->weights_n; i++) {
        size_t same = 0;
        while (same < now->config.weights_n &&
               (!ropes_equal || kept[same] ||
                !config_weights_equal(&now->config.weights[same], &next->weights[i])))
            same++;
        if (same == now->config.weights_n) {
            add_load(change, difference, i);
        } else {
            kept[same] = true;
            change->next->tags[i] = now->tags[same];
        }
    }
    for (size_t i = 0; i < now->config.weights_n; i++)
        if (!kept[i])
            difference->drops[difference->drops_n++] = now->tags[i];
}

struct weights_load reload_weights_load(const struct config_weights *entry, uint64_t tag)
{
    return (struct weights_load){
        .path = entry->path,
        .tensors = (const char *const *)entry->tensors,
        .tensors_n = entry->tensors_n,
        .name_prefix = entry->name_prefix,
        .checksums = entry->checksums,
        .tensor_parallel_rank = entry->tensor_parallel_rank,
        .tensor_parallel_size = entry->tensor_parallel_size,
        .output_dim = entry->output_dim,
        .tag = tag,
    };
}

struct rope_options reload_rope_options(const struct config_rope *entry)
{
    return (struct rope_options){
        .theta = entry->theta,
        .factor = entry->factor,
        .original_positions_max = entry->original_positions_max,
        .beta_fast = entry->beta_fast,
        .beta_slow = entry->beta_slow,
        .positions_max = entry->positions_max,
        .cache = entry->cache,
        .cache_tensor = entry->cache_tensor,
    };
}

static void list_ropes(const struct config *next, struct difference *difference)
{
    for (size_t i = 0; i < next->ropes_n; i++) {
        const struct config_rope *entry = &next->ropes[i];
        difference->rope_options[i] = reload_rope_options(entry);
        difference->ropes[i] = (struct weights_rope){.pattern = entry->weights,
                                                     .options = &difference->rope_options[i]};
    }
}

NODISCARD static enum status prepare_difference(struct change *change, const struct file *now,
                                                struct difference *difference, void **prepared,
                                                struct error *err)
{
    const struct config *next = &change->next->config;
    bool ropes_equal = config_ropes_equal(&now->config, next);
    if (!ropes_equal && now->config.ropes_n == 0 && next->batch_input_bytes == 0)
        return error_field(err, STATUS_FAILED_PRECONDITION, "ropes",
                           "the first needs a restart: batches have no room for attention");
    compare_weights(change, now, ropes_equal, difference);
    if (!ropes_equal)
        list_ropes(next, difference);
    else if (difference->loads_n == 0 && difference->drops_n == 0)
        return STATUS_OK;
    const struct weights_change weights = {
        .loads = difference->loads,
        .loads_n = difference->loads_n,
        .drops = difference->drops,
        .drops_n = difference->drops_n,
        .ropes = difference->ropes,
        .ropes_n = ropes_equal ? 0 : next->ropes_n,
        .replace_ropes = !ropes_equal,
    };
    struct weights_prepared *weights_prepared;
    enum status status =
        weights_prepare(change->reload->options.context->weights, &weights, &weights_prepared, err);
    if (status == STATUS_OK)
        *prepared = weights_prepared;
    return status;
}

static enum status prepare_weights(struct change *change, void **prepared, struct error *err)
{
    struct difference *difference = calloc(1, sizeof *difference);
    if (!difference)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    struct file *now = file_ref(change->reload);
    enum status status = prepare_difference(change, now, difference, prepared, err);
    file_unref(now);
    free(difference);
    return status;
}

static void commit_weights(void *prepared)
{
    weights_commit(prepared);
}

static void destroy_weights(void *prepared)
{
    weights_prepared_destroy(prepared);
}

static enum status prepare_certificate(struct change *change, void **prepared, struct error *err)
{
    struct tls *tls = gate_tls(change->reload->options.context->gate);
    struct tls_prepared *read = NULL;
    enum status status = tls ? tls_prepare(tls, &read, err) : STATUS_OK;
    *prepared = read;
    return status;
}

static void commit_certificate(void *prepared)
{
    tls_commit(prepared);
}

static void destroy_certificate(void *prepared)
{
    tls_prepared_destroy(prepared);
}

static enum status prepare_tokens(struct change *change, void **prepared, struct error *err)
{
    const struct reload_options *options = &change->reload->options;
    struct access_prepared *read = NULL;
    enum status status = STATUS_OK;
    if (options->config->tokens_file[0])
        status = access_prepare(gate_access(options->context->gate), &read, err);
    *prepared = read;
    return status;
}

static void commit_tokens(void *prepared)
{
    access_commit(prepared);
}

static void destroy_tokens(void *prepared)
{
    access_prepared_destroy(prepared);
}

// ---- the parts

// In the order of preparing and committing. The numbers of other keys are stored last.
static const struct part parts[PARTS_N] = {
    {"tls_certificate", prepare_certificate, commit_certificate, destroy_certificate},
    {"tokens_file", prepare_tokens, commit_tokens, destroy_tokens},
    {"weights", prepare_weights, commit_weights, destroy_weights},
};

static void commit_numbers(struct reload *reload, const struct config *next)
{
    const struct service_context *context = reload->options.context;
    config_take_reloadable(reload->options.config, next);
    log_configure(next->log_level, next->log_format);
    listener_set_connections_max(context->listener, next->connections_max);
    rpc_set_reply_timeout(reload->options.rpc, next->reply_timeout_ms);
    tracer_set_sample(context->tracer, next->trace_sample);
    batcher_set_limits(context->batcher, next->queue_requests_max, next->max_queue_delay_us);
}

// ---- one reload

// A pipe would be empty the second time, or be waited for.
NODISCARD static enum status check_path(const char *path, struct error *err)
{
    struct stat found;
    if (stat(path, &found) == 0 && !S_ISREG(found.st_mode))
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%.300s is not a file that can be read again", path);
    return STATUS_OK; // what else is wrong with it, config_load tells
}

NODISCARD static enum status read_file(struct change *change, struct error *err)
{
    struct reload *reload = change->reload;
    struct file *next = calloc(1, sizeof *next);
    if (!next)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    atomic_init(&next->references, 1);
    enum status status = check_path(reload->options.path, err);
    if (status == STATUS_OK)
        status = config_load(&next->config, reload->options.path, err);
    if (status != STATUS_OK) {
        free(next);
        return status;
    }
    change->next = next;
    struct file *now = file_ref(reload);
    status = config_check_change(&now->config, &next->config, change->changed, err);
    file_unref(now);
    return status;
}

static void prepare(uv_work_t *work)
{
    struct reload *reload = CONTAINER_OF(work, struct reload, work);
    struct change *change = reload->change;
    enum status status = read_file(change, &change->error);
    for (size_t i = 0; i < PARTS_N && status == STATUS_OK; i++) {
        struct error cause = {0};
        status = parts[i].prepare(change, &change->prepared[i], &cause);
        if (status == STATUS_OK)
            continue;
        change->error = cause;
        if (cause.field[0] == '\0')
            snprintf(change->error.field, sizeof cause.field, "%s", parts[i].key);
    }
    change->error.status = status;
}

static void start(struct reload *reload);

// Frees on the pool what may be gigabytes.
static void clean_up(uv_work_t *work)
{
    struct reload *reload = CONTAINER_OF(work, struct reload, work);
    struct change *change = reload->change;
    for (size_t i = 0; i < PARTS_N; i++)
        if (change->prepared[i])
            parts[i].destroy(change->prepared[i]);
    file_unref(change->next);
    free(change);
}

static void on_cleaned_up(uv_work_t *work, int status)
{
    (void)status; // never cancelled
    struct reload *reload = CONTAINER_OF(work, struct reload, work);
    reload->change = NULL;
    if (reload->again)
        start(reload);
}

static double wall_seconds(void)
{
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    return (double)wall.tv_sec + (double)wall.tv_nsec / 1e9;
}

static void commit(struct change *change)
{
    struct reload *reload = change->reload;
    for (size_t i = 0; i < PARTS_N; i++)
        if (change->prepared[i])
            parts[i].commit(change->prepared[i]);
    commit_numbers(reload, &change->next->config);
    pthread_mutex_lock(&reload->lock);
    struct file *before = reload->file;
    reload->file = change->next;
    pthread_mutex_unlock(&reload->lock);
    change->next = before;
    reload->stats.generation++;
    reload->stats.applied++;
    reload->stats.applied_time = wall_seconds();
    LOG(INFO, "configuration applied", LOG_U64("generation", reload->stats.generation),
        LOG_STR("changed", change->changed),
        LOG_U64("ms", (now_ns() - change->started_ns) / 1000000u));
}

static void refuse(struct change *change)
{
    change->reload->stats.refused++;
    LOG(WARN, "configuration not applied, the old one holds", LOG_STR("key", change->error.field),
        LOG_STR("reason", change->error.text));
}

static void on_prepared(uv_work_t *work, int status)
{
    (void)status; // never cancelled
    struct reload *reload = CONTAINER_OF(work, struct reload, work);
    const struct reload_options *options = &reload->options;
    struct change *change = reload->change;
    bool draining = atomic_load_explicit(&options->context->draining, memory_order_relaxed);
    if (draining)
        error_set(&change->error, STATUS_CANCELLED, "draining");
    if (change->error.status == STATUS_OK)
        commit(change);
    else
        refuse(change);
    if (!draining)
        options->on_done(options->on_done_context,
                         change->error.status == STATUS_OK ? NULL : change->error.text);
    int queued = uv_queue_work(options->loop, &reload->work, clean_up, on_cleaned_up);
    ASSERT(queued == 0);
}

static void start(struct reload *reload)
{
    reload->again = false;
    if (atomic_load_explicit(&reload->options.context->draining, memory_order_relaxed)) {
        LOG(INFO, "SIGHUP ignored: draining");
        return;
    }
    struct change *change = calloc(1, sizeof *change);
    if (!change) {
        reload->stats.refused++;
        LOG(WARN, "configuration not applied, the old one holds", LOG_STR("key", ""),
            LOG_STR("reason", "out of memory"));
        return;
    }
    change->reload = reload;
    change->started_ns = now_ns();
    reload->change = change;
    supervisor_reloading();
    int queued = uv_queue_work(reload->options.loop, &reload->work, prepare, on_prepared);
    ASSERT(queued == 0);
}

void reload_request(struct reload *reload)
{
    if (!reload->options.path)
        LOG(WARN, "SIGHUP ignored: started without a configuration file");
    else if (reload->change)
        reload->again = true;
    else
        start(reload);
}

// ---- create and destroy

enum status reload_create(const struct reload_options *options, struct reload **out,
                          struct error *err)
{
    struct reload *reload = calloc(1, sizeof *reload);
    struct file *file = calloc(1, sizeof *file);
    enum status status = STATUS_RESOURCE_EXHAUSTED;
    if (!reload || !file)
        error_set(err, status, "out of memory");
    else
        status = config_copy(&file->config, options->file, err);
    if (status != STATUS_OK) {
        free(reload);
        free(file);
        return status;
    }
    atomic_init(&file->references, 1);
    for (size_t i = 0; i < file->config.weights_n; i++)
        file->tags[i] = reload_tag(i);
    reload->tag_last = file->config.weights_n;
    reload->options = *options;
    reload->options.file = NULL;
    reload->file = file;
    reload->stats = (struct reload_stats){.generation = 1, .applied_time = wall_seconds()};
    ASSERT(pthread_mutex_init(&reload->lock, NULL) == 0);
    *out = reload;
    return STATUS_OK;
}

void reload_destroy(struct reload *reload)
{
    if (!reload)
        return;
    ASSERT(!reload->change);
    file_unref(reload->file);
    pthread_mutex_destroy(&reload->lock);
    free(reload);
}

struct reload_stats reload_stats(const struct reload *reload)
{
    return reload->stats;
}
