// The tensors of one request in a region, or of a part of it: checked once against it, then used from where they lie,
// or, where the engine or attention's quantising in place does not allow that, by way of the batch.
// An engine that stages them brings attention there itself, where it may be quantised.
//
//     placement_set     checks; sets the job's operand and what it brings along
//     placement_fill    once the job has room: copies in what must be
//     placement_finish  once it is done: copies out what must be
//     placement_drop    nobody touches the region on its behalf any more
#pragma once

#include "job.h"
#include "region.h"
#include "wire.h"

struct placement {
    struct region *region; // a reference; NULL: the tensors do not lie in a region
    struct wire_range activations, scales, output;
};

// What the daemon copied of requests' tensors; relaxed.
struct copy_counters {
    _Atomic uint64_t in_bytes, out_bytes;
};

// Of a request that request_check has found right, all sizes included, and its job. Takes the
// reference, also on failure. INVALID_ARGUMENT.
NODISCARD enum status placement_set(struct placement *placement, struct region *region,
                                    const struct wire_shared *shared, bool digest_only,
                                    struct job *job, struct error *err);

// On failure the job is as it was: DECODING, to be abandoned.
NODISCARD enum status placement_fill(const struct placement *placement, const struct job *job,
                                     struct copy_counters *copies, struct error *err);
void placement_finish(const struct placement *placement, const struct job *job,
                      struct copy_counters *copies);
void placement_drop(struct placement *placement); // again is harmless
