// The registry is one array in order of name. A load or unload builds the next array beside it and
// swaps the two under the lock, so that callers see all of a change or nothing, and wait for a swap
// of pointers at most.
//
//     change (one at a time): catalog -> load on threads -> merge -> [write lock: swap] -> unref
//     get, visit, totals:     [read lock: search, take references]
#include "weights.h"

#include <fnmatch.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "catalog.h"
#include "rope.h"
#include "sums.h"
#include "weights_internal.h"

enum {
    LOAD_THREADS_MAX = 64,
    PROGRESS_PERIOD_NS = 10 * 1000 * 1000,
};

// ---- names

static bool begins_with(const char *name, size_t bytes, const char *part, size_t part_bytes)
{
    return bytes > part_bytes && memcmp(name, part, part_bytes) == 0;
}

const char *weight_name_canonical(const char *name, size_t name_bytes, size_t *canonical_bytes)
{
    static const char prefix[] = "model.", suffix[] = ".weight";
    const size_t prefix_bytes = sizeof prefix - 1, suffix_bytes = sizeof suffix - 1;
    // Repeatedly, so that the rule applied to its own result changes nothing: resident names are
    // looked up by it as well.
    while (begins_with(name, name_bytes, prefix, prefix_bytes)) {
        name += prefix_bytes;
        name_bytes -= prefix_bytes;
    }
    while (name_bytes > suffix_bytes &&
           memcmp(name + name_bytes - suffix_bytes, suffix, suffix_bytes) == 0)
        name_bytes -= suffix_bytes;
    *canonical_bytes = name_bytes;
    return name;
}

// Orders a name without terminator against one with.
static int compare_name(const char *name, size_t bytes, const char *other)
{
    int order = strncmp(name, other, bytes);
    return order ? order : other[bytes] == '\0' ? 0 : -1;
}

// ---- one weight

struct weight *weight_ref(struct weight *weight)
{
    atomic_fetch_add_explicit(&weight->references, 1, memory_order_relaxed);
    return weight;
}

void weight_unref(struct weight *weight)
{
    if (!weight)
        return;
    uint32_t before = atomic_fetch_sub_explicit(&weight->references, 1, memory_order_acq_rel);
    ASSERT(before > 0);
    if (before > 1)
        return;
    if (weight->engine_weight)
        weight->owner->ops->weight_free(weight->owner->engine, weight->engine_weight);
    selftest_answers_destroy(weight->answers);
    rope_unref(weight->rope);
    origin_deinit(&weight->origin);
    free(weight);
}

// Of the first rule that matches; NULL: none does.
static struct rope *rope_for(const struct rope_rules *rules, const char *name)
{
    for (size_t i = 0; i < rules->rules_n; i++)
        if (fnmatch(rules->rules[i].pattern, name, 0) == 0)
            return rope_ref(rules->rules[i].rope);
    return NULL;
}

// With one reference, and nothing on the engine yet. `rope` NULL: by the rules.
static struct weight *weight_create(struct weights *weights, const struct weights_load *load,
                                    const struct catalog_entry *entry,
                                    const struct rope_rules *rules, struct rope *rope)
{
    struct weight *weight = calloc(1, sizeof *weight);
    if (!weight)
        return NULL;
    atomic_init(&weight->references, 1);
    weight->owner = weights;
    snprintf(weight->name, sizeof weight->name, "%s", entry->name);
    snprintf(weight->source, sizeof weight->source, "%s", entry->source);
    weight->format = entry->format;
    weight->tensor_parallel_rank = load->tensor_parallel_rank;
    weight->tensor_parallel_size = load->tensor_parallel_size ? load->tensor_parallel_size : 1;
    weight->tag = load->tag;
    weight->rope = rope ? rope_ref(rope) : rope_for(rules, weight->name);
    return weight;
}

// ---- lists of weights

// Whoever visits the weights keeps the list that it found, and so needs no memory for a copy.
struct list {
    _Atomic uint32_t references;
    struct weight *weights[];
};

struct weight **weights_list_create(size_t weights_n)
{
    struct list *list = calloc(1, sizeof *list + weights_n * sizeof(struct weight *));
    if (!list)
        return NULL;
    atomic_init(&list->references, 1);
    return list->weights;
}

static void list_ref(struct weight **weights)
{
    struct list *list = CONTAINER_OF(weights, struct list, weights);
    atomic_fetch_add_explicit(&list->references, 1, memory_order_relaxed);
}

void weights_list_unref(struct weight **weights)
{
    if (!weights)
        return;
    struct list *list = CONTAINER_OF(weights, struct list, weights);
    if (atomic_fetch_sub_explicit(&list->references, 1, memory_order_acq_rel) == 1)
        free(list);
}

// ---- the registry

enum status weights_create(const struct engine_ops *ops, struct engine *engine,
                           const char *const *roots, size_t roots_n, uint32_t reduced_dim_max,
                           struct weights **weights_out, struct error *err)
{
    struct weights *weights = calloc(1, sizeof *weights);
    if (!weights)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    weights->ops = ops;
    weights->engine = engine;
    weights->reduced_dim_max = reduced_dim_max;
    enum status status = roots_init(&weights->roots, roots, roots_n, err);
    if (status != STATUS_OK)
        goto free_weights;
    ASSERT(pthread_mutex_init(&weights->change_lock, NULL) == 0);
    ASSERT(pthread_cond_init(&weights->change_over, NULL) == 0);
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
    // By default an unbroken stream of lookups could hold off a load's swap for ever.
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    ASSERT(pthread_rwlock_init(&weights->lock, &attributes) == 0);
    pthread_rwlockattr_destroy(&attributes);
    *weights_out = weights;
    return STATUS_OK;

free_weights:
    free(weights);
    return status;
}

void weights_destroy(struct weights *weights)
{
    if (!weights)
        return;
    for (uint32_t i = 0; i < weights->list_n; i++) {
        ASSERT(atomic_load_explicit(&weights->list[i]->references, memory_order_acquire) == 1);
        weight_unref(weights->list[i]);
    }
    weights_list_unref(weights->list);
    rope_rules_deinit(&weights->rope_rules);
    pthread_rwlock_destroy(&weights->lock);
    pthread_cond_destroy(&weights->change_over);
    pthread_mutex_destroy(&weights->change_lock);
    roots_deinit(&weights->roots);
    free(weights);
}

// A flag and not a lock held: a change may begin on one thread and end on another.
void weights_begin_change(struct weights *weights)
{
    pthread_mutex_lock(&weights->change_lock);
    while (weights->changing)
        pthread_cond_wait(&weights->change_over, &weights->change_lock);
    weights->changing = true;
    pthread_mutex_unlock(&weights->change_lock);
}

void weights_end_change(struct weights *weights)
{
    pthread_mutex_lock(&weights->change_lock);
    weights->changing = false;
    pthread_cond_signal(&weights->change_over);
    pthread_mutex_unlock(&weights->change_lock);
}

// ---- ropes

enum status rope_rules_add(struct rope_rules *rules, const struct roots *roots, const char *pattern,
                           const struct rope_options *options, struct error *err)
{
    struct rope *rope;
    enum status status = rope_create(options, roots, &rope, err);
    if (status != STATUS_OK)
        return status;
    char *copy = strdup(pattern);
    struct rope_rule *grown = realloc(rules->rules, (rules->rules_n + 1) * sizeof *grown);
    if (grown)
        rules->rules = grown;
    if (!copy || !grown) {
        free(copy);
        rope_unref(rope);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    }
    grown[rules->rules_n++] = (struct rope_rule){.pattern = copy, .rope = rope};
    return STATUS_OK;
}

void rope_rules_deinit(struct rope_rules *rules)
{
    for (size_t i = 0; i < rules->rules_n; i++) {
        rope_unref(rules->rules[i].rope);
        free(rules->rules[i].pattern);
    }
    free(rules->rules);
    *rules = (struct rope_rules){0};
}

enum status weights_add_rope(struct weights *weights, const char *pattern,
                             const struct rope_options *options, struct error *err)
{
    weights_begin_change(weights);
    enum status status =
        rope_rules_add(&weights->rope_rules, &weights->roots, pattern, options, err);
    weights_end_change(weights);
    return status;
}

void weights_set_check(struct weights *weights, weights_check *check, void *context)
{
    weights_begin_change(weights);
    weights->check = check;
    weights->check_context = context;
    weights_end_change(weights);
}

// ---- looking things up

struct weight *weights_find_locked(const struct weights *weights, const char *name, size_t bytes)
{
    uint32_t begin = 0, end = weights->list_n;
    while (begin < end) {
        uint32_t middle = begin + (end - begin) / 2;
        int order = compare_name(name, bytes, weights->list[middle]->name);
        if (order == 0)
            return weights->list[middle];
        if (order < 0)
            end = middle;
        else
            begin = middle + 1;
    }
    return NULL;
}

struct weight *weights_get(struct weights *weights, const char *name, size_t name_bytes)
{
    size_t bytes;
    name = weight_name_canonical(name, name_bytes, &bytes);
    // A NUL inside would end the comparison early and let a longer name pass for a shorter.
    if (bytes == 0 || bytes >= WEIGHT_NAME_BYTES || memchr(name, '\0', bytes))
        return NULL;
    pthread_rwlock_rdlock(&weights->lock);
    struct weight *weight = weights_find_locked(weights, name, bytes);
    if (weight)
        weight_ref(weight);
    pthread_rwlock_unlock(&weights->lock);
    return weight;
}

void weights_visit(struct weights *weights, void (*visit)(void *context, struct weight *weight),
                   void *context)
{
    // The callbacks run without the lock: they may take long, or call back in here.
    pthread_rwlock_rdlock(&weights->lock);
    struct weight **list = weights->list;
    uint32_t list_n = list ? weights->list_n : 0;
    if (list)
        list_ref(list);
    for (uint32_t i = 0; i < list_n; i++)
        weight_ref(list[i]);
    pthread_rwlock_unlock(&weights->lock);
    for (uint32_t i = 0; i < list_n; i++) {
        visit(context, list[i]);
        weight_unref(list[i]);
    }
    weights_list_unref(list);
}

static uint32_t max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

struct weights_totals weights_totals(struct weights *weights)
{
    struct weights_totals totals = {0};
    pthread_rwlock_rdlock(&weights->lock);
    totals.weights = weights->list_n;
    for (uint32_t i = 0; i < weights->list_n; i++) {
        const struct weight *weight = weights->list[i];
        totals.damaged += weight_damaged(weight);
        totals.resident_bytes += weight->resident_bytes;
        totals.groups_max = max_u32(totals.groups_max, weight->format.groups);
        totals.output_dim_max = max_u32(totals.output_dim_max, weight->format.output_dim);
        totals.reduced_dim_max = max_u32(totals.reduced_dim_max, weight->format.reduced_dim);
    }
    pthread_rwlock_unlock(&weights->lock);
    return totals;
}

struct weight **weights_swap_list(struct weights *weights, struct weight **list, uint32_t list_n)
{
    pthread_rwlock_wrlock(&weights->lock);
    struct weight **before = weights->list;
    weights->list = list;
    weights->list_n = list_n;
    pthread_rwlock_unlock(&weights->lock);
    return before;
}

// ---- loading

// One load in progress, shared by its threads.
struct loading {
    struct weights *weights;
    const struct weights_load *load;
    const struct catalog_entry *entries;
    struct weight **list; // one for each entry, in the same order
    uint32_t entries_n;
    uint64_t bytes_total;

    const struct sums *sums; // NULL: files are taken as they are
    const struct tensor_slice *
        *files; // to be compared with them, one slice of each; before the entries
    uint32_t files_n;

    atomic_uint next;   // the file, then entry, that the next free thread takes
    atomic_bool failed; // a hint to the others to stop; err says why

    pthread_mutex_t lock;
    enum status status; // of the first failure; guarded by lock, as all below
    struct error err;
    uint32_t weights_done;
    uint64_t bytes_done;
    uint64_t reported_ns;
};

// An entry as the engine reads it.
struct entry_source {
    struct engine_weight_source base;
    struct loading *loading;
    const struct catalog_entry *entry;
    uint64_t bytes_done; // counted in loading already
};

static uint64_t entry_bytes(const struct catalog_entry *entry)
{
    return entry->weight.bytes + entry->scales.bytes;
}

static void fail(struct loading *loading, const struct error *err)
{
    pthread_mutex_lock(&loading->lock);
    if (loading->status == STATUS_OK) {
        loading->status = err->status;
        loading->err = *err;
    }
    pthread_mutex_unlock(&loading->lock);
    atomic_store_explicit(&loading->failed, true, memory_order_release);
}

static bool has_failed(const struct loading *loading)
{
    return atomic_load_explicit(&loading->failed, memory_order_acquire);
}

// Counts what was done and asks the caller whether to go on: after each weight, and in between as
// often as PROGRESS_PERIOD_NS allows.
static void advance(struct loading *loading, uint64_t bytes, uint32_t weights_n)
{
    const struct weights_load *load = loading->load;
    bool go_on = true;
    pthread_mutex_lock(&loading->lock);
    loading->bytes_done += bytes;
    loading->weights_done += weights_n;
    uint64_t now = now_ns();
    if (load->progress && (weights_n > 0 || now - loading->reported_ns >= PROGRESS_PERIOD_NS)) {
        loading->reported_ns = now;
        go_on = load->progress(load->progress_context, loading->weights_done, loading->entries_n,
                               loading->bytes_done, loading->bytes_total);
    }
    pthread_mutex_unlock(&loading->lock);
    if (!go_on) {
        struct error err;
        error_set(&err, STATUS_CANCELLED, "loading was given up by its caller");
        fail(loading, &err);
    }
}

static struct entry_source *source_of(const struct engine_weight_source *base)
{
    return CONTAINER_OF((uintptr_t)base, struct entry_source, base);
}

static enum status check_going(const struct entry_source *source, struct error *err)
{
    advance(source->loading, 0, 0);
    if (has_failed(source->loading))
        return error_set(err, STATUS_CANCELLED, "another weight of this load failed");
    return STATUS_OK;
}

static enum status source_read_weight(const struct engine_weight_source *base, uint64_t offset,
                                      void *to, uint64_t bytes, struct error *err)
{
    struct entry_source *source = source_of(base);
    const struct tensor_slice *slice = &source->entry->weight;
    ASSERT(offset <= slice->bytes && bytes <= slice->bytes - offset);
    enum status status = check_going(source, err);
    if (status != STATUS_OK)
        return status;
    return safetensors_read(slice->file, slice->tensor, slice->offset + offset, to, bytes, err);
}

static enum status source_read_scales(const struct engine_weight_source *base, void *to,
                                      struct error *err)
{
    struct entry_source *source = source_of(base);
    const struct tensor_slice *slice = &source->entry->scales;
    enum status status = check_going(source, err);
    if (status != STATUS_OK || slice->bytes == 0)
        return status;
    return safetensors_read(slice->file, slice->tensor, slice->offset, to, slice->bytes, err);
}

static void source_progress(const struct engine_weight_source *base, uint64_t bytes)
{
    struct entry_source *source = source_of(base);
    uint64_t left = entry_bytes(source->entry) - source->bytes_done;
    uint64_t counted = bytes < left ? bytes : left;
    source->bytes_done += counted;
    advance(source->loading, counted, 0);
}

static enum status load_one(struct loading *loading, uint32_t index, struct error *err)
{
    struct weights *weights = loading->weights;
    struct weight *weight = loading->list[index];
    struct entry_source source = {
        .base = {.format = weight->format,
                 .read_weight = source_read_weight,
                 .read_scales = source_read_scales,
                 .progress = source_progress},
        .loading = loading,
        .entry = &loading->entries[index],
    };
    enum status status =
        weights->ops->weight_load(weights->engine, &source.base, &weight->engine_weight, err);
    if (status != STATUS_OK) {
        weight->engine_weight = NULL;
        return status;
    }
    weight->resident_bytes = weights->ops->weight_bytes(weight->engine_weight);
    if (weights->ops->weight_sum)
        status = weights->ops->weight_sum(weights->engine, weight->engine_weight, 0,
                                          weight->resident_bytes, &weight->crc32c, err);
    if (status == STATUS_OK)
        status =
            origin_init(&weight->origin, loading->load, source.entry->weight.tensor->name, err);
    if (status != STATUS_OK)
        return status;
    status = selftest_answers_create(&source.base, &weight->answers, err);
    if (status != STATUS_OK)
        return status;
    advance(loading, entry_bytes(source.entry) - source.bytes_done, 1);
    return STATUS_OK;
}

// ---- the files that a load takes

static void add_file(struct loading *loading, const struct tensor_slice *slice)
{
    for (uint32_t i = 0; i < loading->files_n; i++)
        if (loading->files[i]->file == slice->file)
            return;
    if (!slice->file)
        return; // no scales
    loading->files[loading->files_n++] = slice;
    loading->bytes_total += safetensors_bytes(slice->file);
}

NODISCARD static enum status gather_files(struct loading *loading, struct error *err)
{
    loading->files = calloc(2 * (size_t)loading->entries_n + 1, sizeof *loading->files);
    if (!loading->files)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    for (uint32_t i = 0; i < loading->entries_n; i++) {
        add_file(loading, &loading->entries[i].weight);
        add_file(loading, &loading->entries[i].scales);
    }
    return STATUS_OK;
}

static bool on_file_bytes(void *context, uint64_t bytes)
{
    struct loading *loading = context;
    advance(loading, bytes, 0);
    return !has_failed(loading);
}

static void check_file(struct loading *loading, const struct tensor_slice *slice)
{
    struct error err;
    if (sums_check(loading->sums, slice->file, slice->label, on_file_bytes, loading, &err) !=
        STATUS_OK)
        fail(loading, &err);
}

static void *load_thread(void *context)
{
    struct loading *loading = context;
    while (!has_failed(loading)) {
        uint32_t index = atomic_fetch_add_explicit(&loading->next, 1, memory_order_relaxed);
        if (index < loading->files_n) {
            check_file(loading, loading->files[index]);
            continue;
        }
        index -= loading->files_n;
        if (index >= loading->entries_n)
            break;
        struct error cause = {0}, err;
        enum status status = load_one(loading, index, &cause);
        if (status != STATUS_OK) {
            error_set(&err, status, "weight '%s': %s", loading->list[index]->name, cause.text);
            err.retry_after_ms = cause.retry_after_ms;
            fail(loading, &err);
        }
    }
    return NULL;
}

// Loads every entry. The calling thread is one of the threads, so that it works even if the system
// gives no other.
static void load_all(struct loading *loading, uint32_t threads)
{
    pthread_t helpers[LOAD_THREADS_MAX];
    uint32_t helpers_n = 0;
    if (threads > loading->entries_n + loading->files_n)
        threads = loading->entries_n + loading->files_n;
    if (threads > LOAD_THREADS_MAX)
        threads = LOAD_THREADS_MAX;
    // Signals are for the threads that wait for them.
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS); // a blocked SIGBUS kills; safetensors.c handles it
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (helpers_n + 1 < threads &&
           pthread_create(&helpers[helpers_n], NULL, load_thread, loading) == 0)
        helpers_n++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    load_thread(loading);
    for (uint32_t i = 0; i < helpers_n; i++)
        pthread_join(helpers[i], NULL);
}

// Frees what `list` got again on failure.
static enum status load_entries(struct weights *weights, const struct weights_load *load,
                                const struct catalog *catalog, const struct rope_rules *rules,
                                struct rope *rope, const struct sums *sums, struct weight **list,
                                struct error *err)
{
    struct loading loading = {.weights = weights,
                              .sums = sums,
                              .load = load,
                              .entries = catalog->entries,
                              .entries_n = catalog->entries_n,
                              .list = list};
    bool complete = true;
    for (uint32_t i = 0; i < catalog->entries_n; i++) {
        loading.bytes_total += entry_bytes(&catalog->entries[i]);
        list[i] = weight_create(weights, load, &catalog->entries[i], rules, rope);
        complete = complete && list[i];
    }
    if (sums && complete)
        loading.status = gather_files(&loading, &loading.err);
    if (!complete) {
        loading.status = error_set(&loading.err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    } else if (loading.status == STATUS_OK) {
        ASSERT(pthread_mutex_init(&loading.lock, NULL) == 0);
        load_all(&loading, load->threads ? load->threads : 1);
        pthread_mutex_destroy(&loading.lock);
    }
    free(loading.files);
    if (loading.status == STATUS_OK)
        return STATUS_OK;
    for (uint32_t i = 0; i < catalog->entries_n; i++)
        weight_unref(list[i]);
    if (err)
        *err = loading.err;
    return loading.status;
}

enum status weights_load_entries(struct weights *weights, const struct weights_load *load,
                                 const struct catalog *catalog, const struct rope_rules *rules,
                                 struct rope *rope, struct weight **list, struct error *err)
{
    struct sums *sums = NULL;
    enum status status = STATUS_OK;
    if (load->checksums && load->checksums[0])
        status = sums_read(&weights->roots, load->checksums, &sums, err);
    if (status == STATUS_OK)
        status = load_entries(weights, load, catalog, rules, rope, sums, list, err);
    sums_destroy(sums);
    if (status != STATUS_OK || !weights->check)
        return status;
    status = weights->check(weights->check_context, list, catalog->entries_n, err);
    for (uint32_t i = 0; i < catalog->entries_n && status != STATUS_OK; i++)
        weight_unref(list[i]);
    return status;
}

// What the registry would be with `added`, without references of its own: `merged` holds those of
// the old list and of `added`, `replaced` those that drop out. Sets the generations of `added`.
static void merge(const struct weights *weights, struct weight **added, uint32_t added_n,
                  struct weight **merged, uint32_t *merged_n, struct weight **replaced,
                  uint32_t *replaced_n)
{
    uint32_t old = 0, new = 0;
    *merged_n = *replaced_n = 0;
    while (old < weights->list_n || new < added_n) {
        int order = new == added_n           ? -1
                    : old == weights->list_n ? 1
                                             : strcmp(weights->list[old]->name, added[new]->name);
        if (order < 0) {
            merged[(*merged_n)++] = weights->list[old++];
            continue;
        }
        added[new]->generation = weights->generation_floor + 1;
        if (order == 0) {
            added[new]->generation = weights->list[old]->generation + 1;
            replaced[(*replaced_n)++] = weights->list[old++];
        }
        merged[(*merged_n)++] = added[new ++];
    }
}

// Whether the names are free, or may be replaced, and there is room.
static enum status check_names(const struct weights *weights, const struct catalog *catalog,
                               bool replace, struct error *err)
{
    uint32_t resident_n = 0;
    for (uint32_t i = 0; i < catalog->entries_n; i++) {
        const char *name = catalog->entries[i].name;
        if (!weights_find_locked(weights, name, strlen(name)))
            continue;
        if (!replace)
            return error_set(err, STATUS_ALREADY_EXISTS,
                             "weight '%s' is resident; set replace to load it anew", name);
        resident_n++;
    }
    if (weights->list_n - resident_n + catalog->entries_n > WEIGHTS_MAX)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "%" PRIu32 " weights are resident and %" PRIu32
                         " more match, expected at most %d",
                         weights->list_n, catalog->entries_n, WEIGHTS_MAX);
    return STATUS_OK;
}

// Everything between opening the files and the moment the weights are visible. All that can fail
// comes before the swap.
static enum status load_catalog(struct weights *weights, const struct weights_load *load,
                                const struct catalog *catalog, struct rope *rope, struct error *err)
{
    // Reading the list needs no lock here: only a change writes it, and this is the one.
    enum status status = check_names(weights, catalog, load->replace, err);
    if (status != STATUS_OK)
        return status;
    size_t added_n = catalog->entries_n, merged_max = weights->list_n + added_n;
    struct weight **added = calloc(added_n + 1, sizeof(struct weight *));
    struct weight **replaced = calloc(added_n + 1, sizeof(struct weight *));
    struct weight **merged = weights_list_create(merged_max);
    if (!added || !replaced || !merged) {
        status = error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
        goto free_lists;
    }
    status = weights_load_entries(weights, load, catalog, &weights->rope_rules, rope, added, err);
    if (status != STATUS_OK)
        goto free_lists;
    uint32_t merged_n, replaced_n;
    merge(weights, added, catalog->entries_n, merged, &merged_n, replaced, &replaced_n);
    merged = weights_swap_list(weights, merged, merged_n);
    for (uint32_t i = 0; i < added_n && load->loaded; i++)
        load->loaded(load->loaded_context, added[i]);
    for (uint32_t i = 0; i < replaced_n; i++)
        weight_unref(replaced[i]);

free_lists:
    weights_list_unref(merged); // the list before the swap, if there was one
    free(replaced);
    free(added);
    return status;
}

enum status weights_load(struct weights *weights, const struct weights_load *load, uint32_t *loaded,
                         struct error *err)
{
    struct rope *rope = NULL;
    enum status status =
        load->rope ? rope_create(load->rope, &weights->roots, &rope, err) : STATUS_OK;
    if (status != STATUS_OK)
        return status;
    weights_begin_change(weights);
    struct catalog catalog;
    status = catalog_init(&catalog, &weights->roots, weights->reduced_dim_max, load, err);
    if (status == STATUS_OK) {
        status = load_catalog(weights, load, &catalog, rope, err);
        if (status == STATUS_OK && loaded)
            *loaded = catalog.entries_n;
        catalog_deinit(&catalog);
    }
    weights_end_change(weights);
    rope_unref(rope);
    return status;
}

enum status weights_reload(struct weights *weights, struct weight *weight, struct error *err)
{
    struct weights_load load = origin_load(&weight->origin);
    load.tag = weight->tag;
    struct catalog catalog;
    weights_begin_change(weights);
    enum status status;
    if (weights_find_locked(weights, weight->name, strlen(weight->name)) != weight) {
        status = error_set(err, STATUS_ABORTED, "weight '%s' has been replaced or unloaded",
                           weight->name);
        goto end_change;
    }
    status = catalog_init(&catalog, &weights->roots, weights->reduced_dim_max, &load, err);
    if (status != STATUS_OK)
        goto end_change;
    status = load_catalog(weights, &load, &catalog, weight->rope, err);
    catalog_deinit(&catalog);

end_change:
    weights_end_change(weights);
    return status;
}

// ---- unloading

enum status weights_unload(struct weights *weights, const char *pattern,
                           void (*unloaded)(void *context, const char *name), void *context,
                           struct error *err)
{
    char canonical[WEIGHT_NAME_BYTES];
    size_t bytes;
    pattern = weight_name_canonical(pattern, strlen(pattern), &bytes);
    if (bytes >= sizeof canonical)
        return error_field(err, STATUS_INVALID_ARGUMENT, "names",
                           "a pattern of %zu bytes, expected at most %zu", bytes,
                           sizeof canonical - 1);
    memcpy(canonical, pattern, bytes);
    canonical[bytes] = '\0';

    enum status status = STATUS_OK;
    weights_begin_change(weights);
    struct weight **kept = weights_list_create(weights->list_n);
    struct weight **dropped = calloc((size_t)weights->list_n + 1, sizeof(struct weight *));
    if (!kept || !dropped) {
        status = error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
        goto end_change;
    }
    uint32_t kept_n = 0, dropped_n = 0;
    for (uint32_t i = 0; i < weights->list_n; i++) {
        struct weight *weight = weights->list[i];
        // A name may hold brackets and yet mean itself.
        if (strcmp(canonical, weight->name) == 0 || fnmatch(canonical, weight->name, 0) == 0)
            dropped[dropped_n++] = weight;
        else
            kept[kept_n++] = weight;
    }
    if (dropped_n == 0) {
        status = error_field(err, STATUS_NOT_FOUND, "names", "no resident weight matches '%s'",
                             canonical);
        goto end_change;
    }
    kept = weights_swap_list(weights, kept, kept_n);
    for (uint32_t i = 0; i < dropped_n; i++) {
        if (dropped[i]->generation > weights->generation_floor)
            weights->generation_floor = dropped[i]->generation;
        if (unloaded)
            unloaded(context, dropped[i]->name);
        weight_unref(dropped[i]);
    }

end_change:
    weights_end_change(weights);
    free(dropped);
    weights_list_unref(kept); // the list before the swap, if there was one
    return status;
}
