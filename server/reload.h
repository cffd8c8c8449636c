// SIGHUP: the configuration is read again, and all of it holds from then on, or nothing of it.
//
//     SIGHUP -> [pool thread: read, check, prepare each part] -> [main thread: commit each part]
//                            | fails, or the daemon drains
//                            '-> what was prepared is freed; the old one stays; the log says why
//
// What is made anew from the file or beside it, weights and whatever else, is a part (reload.c's
// table): prepare does all that may fail or take time, commit cannot fail. Keys may change as far
// as config.c's table marks them reloadable. What comes meanwhile is one more reload, afterwards.
#pragma once

#include <uv.h>

#include "config.h"
#include "rope.h"
#include "weights.h"

struct reload;
struct rpc;
struct service_context;

struct reload_options {
    uv_loop_t *loop;
    const char *path;          // borrowed; NULL: the daemon was started without a file
    const struct config *file; // as it was read at start, nothing resolved; is copied
    struct config *config;     // in force
    struct service_context *context;
    struct rpc *rpc;
    // Main thread, once a reload has ended; `refused` NULL: it was applied.
    void (*on_done)(void *on_done_context, const char *refused);
    void *on_done_context;
};

NODISCARD enum status reload_create(const struct reload_options *options, struct reload **reload,
                                    struct error *err);
// Main thread, on SIGHUP.
void reload_request(struct reload *reload);
// Main thread, once the loop has closed its handles.
void reload_destroy(struct reload *reload);

// By which weights_prepare will know the weights of entry `index` of a configuration read at start.
static inline uint64_t reload_tag(size_t index)
{
    return index + 1; // 0 is LoadWeights
}

// An entry of `ropes`, and one of `weights` but for how it is loaded, as weights.h takes them; borrow.
struct rope_options reload_rope_options(const struct config_rope *entry);
struct weights_load reload_weights_load(const struct config_weights *entry, uint64_t tag);

// The configuration as the file last said, a reference: any thread.
const struct config *reload_file_ref(struct reload *reload);
void reload_file_unref(const struct config *file);

struct reload_stats {
    uint64_t generation; // 1 at start, one more by each that was applied
    uint64_t applied, refused;
    double applied_time; // of the last, or of the start; seconds since 1970 UTC
};
struct reload_stats reload_stats(const struct reload *reload); // main thread
