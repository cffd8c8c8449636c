// A change of the set of weights as a whole, in two steps: prepare loads beside what is there, commit
// swaps.
//
//     prepare: catalogs -> names are free -> load on threads -> merge        others wait from here
//     commit:  [write lock: swap]                                            to here
//     destroy: unref what went, or, if nothing was committed, what came
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rope.h"
#include "weights_internal.h"

struct weights_prepared {
    struct weights *weights;
    bool committed;
    struct weight **added; // in order of name
    uint32_t added_n;
    struct weight **dropped; // of the registry's list
    uint32_t dropped_n;
    struct weight **list; // the registry's next one; committed: the one before
    uint32_t list_n;
    struct rope_rules rules; // likewise
    bool replace_rules;
};

static enum status out_of_memory(struct error *err)
{
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
}

static void name_key(struct error *err, const char *key)
{
    if (err)
        snprintf(err->field, sizeof err->field, "%s", key);
}

static bool drops(const struct weights_change *change, const struct weight *weight)
{
    for (size_t i = 0; i < change->drops_n; i++)
        if (change->drops[i] == weight->tag)
            return true;
    return false;
}

NODISCARD static enum status add_rules(struct weights_prepared *prepared,
                                       const struct weights_change *change, struct error *err)
{
    prepared->replace_rules = change->replace_ropes;
    enum status status = STATUS_OK;
    for (size_t i = 0; i < change->ropes_n && status == STATUS_OK; i++) {
        struct error cause;
        status = rope_rules_add(&prepared->rules, &prepared->weights->roots,
                                change->ropes[i].pattern, change->ropes[i].options, &cause);
        if (status != STATUS_OK) {
            error_set(err, status, "ropes[%zu].%.480s", i, cause.text);
            name_key(err, "ropes");
        }
    }
    return status;
}

// ---- loading

static struct weight *find_added(const struct weights_prepared *prepared, const char *name)
{
    uint32_t begin = 0, end = prepared->added_n;
    while (begin < end) {
        uint32_t middle = begin + (end - begin) / 2;
        int order = strcmp(name, prepared->added[middle]->name);
        if (order == 0)
            return prepared->added[middle];
        if (order < 0)
            end = middle;
        else
            begin = middle + 1;
    }
    return NULL;
}

// Whether no weight has these names that stays, or comes with another entry.
NODISCARD static enum status check_names(const struct weights_prepared *prepared,
                                         const struct weights_change *change,
                                         const struct catalog *catalog, struct error *err)
{
    for (uint32_t i = 0; i < catalog->entries_n; i++) {
        const char *name = catalog->entries[i].name;
        if (find_added(prepared, name))
            return error_set(err, STATUS_ALREADY_EXISTS,
                             "weight '%s' comes with another entry as well", name);
        const struct weight *resident = weights_find_locked(prepared->weights, name, strlen(name));
        if (resident && !drops(change, resident))
            return error_set(err, STATUS_ALREADY_EXISTS,
                             "weight '%s' is resident by another entry, or by LoadWeights", name);
    }
    return STATUS_OK;
}

static int compare_weights(const void *left, const void *right)
{
    const struct weight *const *a = left, *const *b = right;
    return strcmp((*a)->name, (*b)->name);
}

NODISCARD static enum status load_catalog(struct weights_prepared *prepared,
                                          const struct weights_change *change,
                                          const struct weights_load *load,
                                          const struct catalog *catalog, struct error *err)
{
    struct weights *weights = prepared->weights;
    enum status status = check_names(prepared, change, catalog, err);
    if (status != STATUS_OK)
        return status;
    size_t grown_n = (size_t)prepared->added_n + catalog->entries_n;
    if (grown_n > WEIGHTS_MAX)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "%zu weights match, expected at most %d",
                         grown_n, WEIGHTS_MAX);
    struct weight **grown = realloc(prepared->added, (grown_n + 1) * sizeof *grown);
    if (!grown)
        return out_of_memory(err);
    prepared->added = grown;
    status = weights_load_entries(weights, load, catalog,
                                  change->replace_ropes ? &prepared->rules : &weights->rope_rules,
                                  NULL, grown + prepared->added_n, err);
    if (status != STATUS_OK)
        return status;
    prepared->added_n = (uint32_t)grown_n;
    qsort(grown, grown_n, sizeof *grown, compare_weights);
    return STATUS_OK;
}

NODISCARD static enum status load(struct weights_prepared *prepared,
                                  const struct weights_change *change, struct error *err)
{
    struct weights *weights = prepared->weights;
    enum status status = STATUS_OK;
    for (size_t i = 0; i < change->loads_n && status == STATUS_OK; i++) {
        struct error cause = {0};
        struct catalog catalog;
        status = catalog_init(&catalog, &weights->roots, weights->reduced_dim_max,
                              &change->loads[i], &cause);
        if (status == STATUS_OK) {
            status = load_catalog(prepared, change, &change->loads[i], &catalog, &cause);
            catalog_deinit(&catalog);
        }
        if (status != STATUS_OK) {
            error_set(err, status, "weights[%zu]: %.480s", i, cause.text);
            name_key(err, "weights");
        }
    }
    return status;
}

// ---- the next list

NODISCARD static enum status merge(struct weights_prepared *prepared,
                                   const struct weights_change *change, struct error *err)
{
    const struct weights *weights = prepared->weights;
    size_t old_n = weights->list_n;
    prepared->list = weights_list_create(old_n + prepared->added_n);
    prepared->dropped = calloc(old_n + 1, sizeof(struct weight *));
    if (!prepared->list || !prepared->dropped)
        return out_of_memory(err);
    for (uint32_t i = 0; i < prepared->added_n; i++)
        prepared->added[i]->generation = weights->generation_floor + 1;
    uint32_t new = 0;
    for (size_t old = 0; old < old_n; old++) {
        struct weight *weight = weights->list[old];
        while (new < prepared->added_n && strcmp(prepared->added[new]->name, weight->name) < 0)
            prepared->list[prepared->list_n++] = prepared->added[new ++];
        if (!drops(change, weight)) {
            prepared->list[prepared->list_n++] = weight;
            continue;
        }
        prepared->dropped[prepared->dropped_n++] = weight;
        if (new < prepared->added_n && strcmp(prepared->added[new]->name, weight->name) == 0)
            prepared->added[new]->generation = weight->generation + 1;
    }
    while (new < prepared->added_n)
        prepared->list[prepared->list_n++] = prepared->added[new ++];
    if (prepared->list_n > WEIGHTS_MAX)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "%" PRIu32 " weights would be resident, expected at most %d",
                         prepared->list_n, WEIGHTS_MAX);
    return STATUS_OK;
}

enum status weights_prepare(struct weights *weights, const struct weights_change *change,
                            struct weights_prepared **out, struct error *err)
{
    struct weights_prepared *prepared = calloc(1, sizeof *prepared);
    if (!prepared)
        return out_of_memory(err);
    prepared->weights = weights;
    weights_begin_change(weights);
    enum status status = add_rules(prepared, change, err);
    if (status == STATUS_OK)
        status = load(prepared, change, err);
    if (status == STATUS_OK)
        status = merge(prepared, change, err);
    if (status != STATUS_OK) {
        weights_prepared_destroy(prepared);
        return status;
    }
    *out = prepared;
    return STATUS_OK;
}

void weights_commit(struct weights_prepared *prepared)
{
    struct weights *weights = prepared->weights;
    prepared->list = weights_swap_list(weights, prepared->list, prepared->list_n);
    for (uint32_t i = 0; i < prepared->dropped_n; i++)
        if (prepared->dropped[i]->generation > weights->generation_floor)
            weights->generation_floor = prepared->dropped[i]->generation;
    if (prepared->replace_rules) {
        struct rope_rules before = weights->rope_rules;
        weights->rope_rules = prepared->rules;
        prepared->rules = before;
    }
    prepared->committed = true;
    weights_end_change(weights);
}

void weights_prepared_destroy(struct weights_prepared *prepared)
{
    if (!prepared)
        return;
    struct weight **gone = prepared->committed ? prepared->dropped : prepared->added;
    uint32_t gone_n = prepared->committed ? prepared->dropped_n : prepared->added_n;
    for (uint32_t i = 0; i < gone_n; i++)
        weight_unref(gone[i]);
    rope_rules_deinit(&prepared->rules);
    if (!prepared->committed)
        weights_end_change(prepared->weights);
    free(prepared->added);
    free(prepared->dropped);
    weights_list_unref(prepared->list);
    free(prepared);
}
