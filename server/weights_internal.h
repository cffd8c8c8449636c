// What weights.c and weights_change.c share: the registry itself, and the steps of a change.
#pragma once

#include <pthread.h>

#include "catalog.h"

enum { WEIGHTS_MAX = 1 << 16 }; // resident

// Which weights use a rope.
struct rope_rule {
    char *pattern;
    struct rope *rope;
};

struct rope_rules {
    struct rope_rule *rules; // in the order of asking
    size_t rules_n;
};

struct weights {
    const struct engine_ops *ops;
    struct engine *engine;
    struct roots roots;
    uint32_t reduced_dim_max;

    pthread_mutex_t change_lock; // of the next
    pthread_cond_t change_over;
    bool changing; // a load, an unload or a change of the set is under way, and owns the next two
    // The largest generation of any weight unloaded so far. Names that are new start above it, so
    // that a name which comes back never repeats a generation, and no list of past names is kept.
    uint64_t generation_floor;
    struct rope_rules rope_rules;
    weights_check *check; // NULL: none; of who is changing, as the next
    void *check_context;

    pthread_rwlock_t lock;
    struct weight **list; // in order of name; guarded by lock; written by who is changing, too
    uint32_t list_n;
};

// Waits for whoever is changing.
void weights_begin_change(struct weights *weights);
void weights_end_change(struct weights *weights);

NODISCARD enum status rope_rules_add(struct rope_rules *rules, const struct roots *roots,
                                     const char *pattern, const struct rope_options *options,
                                     struct error *err);
void rope_rules_deinit(struct rope_rules *rules);

struct weight *weights_find_locked(const struct weights *weights, const char *name, size_t bytes);
// Lists are counted by reference, since whoever visits keeps the one it found. NULL: no memory.
struct weight **weights_list_create(size_t weights_n);
// NULL is allowed. The weights themselves are counted apart.
void weights_list_unref(struct weight **list);
// Makes `list` the registry's (takes it) and gives back the one before (to be let go of).
struct weight **weights_swap_list(struct weights *weights, struct weight **list, uint32_t list_n);
// Reads, re-lays and checks all entries: new weights, which `list` gets. Frees them again on failure.
// `rope` NULL: by the rules.
NODISCARD enum status weights_load_entries(struct weights *weights, const struct weights_load *load,
                                           const struct catalog *catalog,
                                           const struct rope_rules *rules, struct rope *rope,
                                           struct weight **list, struct error *err);
