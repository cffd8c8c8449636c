// The registry: name -> resident weight. Loads, replaces and unloads while serving.
//
// A struct weight is immutable once visible, but for its counters, and counted by reference: a request takes one reference
// when it is decoded and drops it when it is answered, so that it keeps the weight it started with.
// The last reference frees it.
//
// Threads: get, unref and visit from any thread, briefly locked; load and unload from control
// threads, one at a time.
#pragma once

#include <stdatomic.h>

#include "engine.h"
#include "origin.h"
#include "selftest.h"

enum { WEIGHT_NAME_BYTES = 256, WEIGHT_SOURCE_BYTES = 1024 };

struct rope;
struct rope_options;
struct weights;

// What has been computed with a weight since it was loaded. Relaxed: each is a number to look at.
struct weight_counters {
    _Atomic uint64_t answered, failed;       // requests; failed: accepted, and came to nothing
    _Atomic uint64_t answered_ns, failed_ns; // from decoded to the end
    // Of those answered: until its tensors were in place, until launched, until done.
    _Atomic uint64_t fill_ns, queue_ns, run_ns;
    _Atomic uint64_t batches; // that it took part in
    _Atomic uint64_t last_ms; // when one was last answered, since 1970 UTC
};

struct weight {
    char name[WEIGHT_NAME_BYTES]; // canonical, with the load's prefix
    struct einsum_weight_format format;
    struct engine_weight *engine_weight;
    uint64_t resident_bytes;
    char source[WEIGHT_SOURCE_BYTES]; // file, below its root
    uint32_t tensor_parallel_rank, tensor_parallel_size;
    uint64_t generation;
    uint64_t tag;      // of the load
    struct rope *rope; // a reference; NULL: it has none
    struct selftest_answers *answers;
    uint32_t crc32c; // of resident_bytes, as the engine held them once it was loaded
    // The parts that change. Damaged: what is resident is no longer what was loaded, and is not
    // computed with.
    struct weight_counters counters;
    _Atomic bool damaged;
    _Atomic bool nan_told; // the log has it that an output was NaN
    struct origin origin;
    // Private to weights.c:
    struct weights *owner;
    _Atomic uint32_t references;
};

struct weights_load {
    const char *path;           // as LoadWeightsRequest
    const char *const *tensors; // shell patterns; none: "*.attn.wo_a.weight"
    size_t tensors_n;
    const char *name_prefix; // "" for none
    uint32_t tensor_parallel_rank;
    uint32_t tensor_parallel_size; // 0 means 1
    uint32_t output_dim;           // of 2-D weights; 0 means 1024
    bool replace;
    uint64_t tag;          // the caller's own, by which weights_prepare drops them
    const char *checksums; // a file with the SHA-256 of all files that it takes; NULL, "": none
    const struct rope_options *rope; // of every weight; NULL: the first that weights_add_rope gave
    uint32_t threads;                // that load side by side; 0 means 1
    // Called from loading threads as work proceeds; may be NULL. Returns false to give up
    // (CANCELLED).
    bool (*progress)(void *context, uint32_t weights_done, uint32_t weights_total,
                     uint64_t bytes_done, uint64_t bytes_total);
    void *progress_context;
    // Called with each weight once all are visible; borrows the weight. May be NULL.
    void (*loaded)(void *context, struct weight *weight);
    void *loaded_context;
};

// `roots` are the only directories from which anything is read; borrowed for the registry's life,
// and made absolute with all links resolved. FAILED_PRECONDITION if one does not exist.
NODISCARD enum status weights_create(const struct engine_ops *ops, struct engine *engine,
                                     const char *const *roots, size_t roots_n,
                                     uint32_t reduced_dim_max, struct weights **weights,
                                     struct error *err);
void weights_destroy(struct weights *weights); // no reference left but the registry's own

// Weights whose canonical name matches `pattern`, a shell pattern, and no earlier one have this
// rope when they are loaded from now on. Fails as rope_create does.
NODISCARD enum status weights_add_rope(struct weights *weights, const char *pattern,
                                       const struct rope_options *options, struct error *err);

// From now on `check` is asked of all weights of a load, read and resident, before any of them becomes
// visible. What it returns but OK is how that load fails; what was served goes on. Runs on the thread
// that loads, and may use the weights as anybody does who has a reference.
typedef enum status weights_check(void *context, struct weight *const *loaded, uint32_t loaded_n,
                                  struct error *err);
void weights_set_check(struct weights *weights, weights_check *check, void *context);

// Blocks until all named weights are visible, or none. `loaded` (may be NULL) gets their number.
NODISCARD enum status weights_load(struct weights *weights, const struct weights_load *load,
                                   uint32_t *loaded, struct error *err);

// Reads one weight again, from where it came from, with the rope that it has, and puts it in its own
// place, checked as any. ABORTED: another one is there by now, or none. Else fails as weights_load
// does, and it stays as it is.
NODISCARD enum status weights_reload(struct weights *weights, struct weight *weight,
                                     struct error *err);

static inline bool weight_damaged(const struct weight *weight)
{
    return atomic_load_explicit(&weight->damaged, memory_order_relaxed);
}

// `pattern` is a name or shell pattern. Calls `unloaded` (may be NULL) with each canonical name.
// NOT_FOUND if it names none.
NODISCARD enum status weights_unload(struct weights *weights, const char *pattern,
                                     void (*unloaded)(void *context, const char *name),
                                     void *context, struct error *err);

// A change of the set as a whole: everything is loaded first, beside what is there, and one swap
// makes it visible.
struct weights_rope {
    const char *pattern;
    const struct rope_options *options;
};
struct weights_change {
    const struct weights_load *loads; // with `rope` NULL; `replace`, `loaded` do not matter
    size_t loads_n;
    const uint64_t *drops; // the weights of these tags go
    size_t drops_n;
    const struct weights_rope *ropes; // in place of all that weights_add_rope gave
    size_t ropes_n;
    bool replace_ropes; // else those stay
};
struct weights_prepared;
// Blocks until all is loaded; ALREADY_EXISTS if a name is that of a weight which stays. An error
// says which of them, "weights[i]: " or "ropes[i].". Other loads and unloads wait until this one is
// committed or destroyed, by any thread.
NODISCARD enum status weights_prepare(struct weights *weights, const struct weights_change *change,
                                      struct weights_prepared **prepared, struct error *err);
// The swap, and no more: cannot fail, and is quick. What is left of the change is then what went.
void weights_commit(struct weights_prepared *prepared);
// After commit frees what went, else what was loaded. NULL is harmless.
void weights_prepared_destroy(struct weights_prepared *prepared);

// Takes a reference; NULL if there is none of that name. `name` needs no terminator; any spelling
// of it is accepted.
struct weight *weights_get(struct weights *weights, const char *name, size_t name_bytes);
struct weight *weight_ref(struct weight *weight);
void weight_unref(struct weight *weight);

// All weights in order of name, each with a reference that the callback borrows.
void weights_visit(struct weights *weights, void (*visit)(void *context, struct weight *weight),
                   void *context);

struct weights_totals {
    uint32_t weights, damaged;
    uint64_t resident_bytes;
    uint32_t groups_max, output_dim_max, reduced_dim_max; // of any resident weight
};
struct weights_totals weights_totals(struct weights *weights);

// Strips "model." before and ".weight" behind; the rule by which names are compared. Returns the
// first byte of what remains within `name`, and its length.
const char *weight_name_canonical(const char *name, size_t name_bytes, size_t *canonical_bytes);
