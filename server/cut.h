// A request of more tokens than a batch takes is cut into parts: jobs over ranges of its tokens, in
// order, which go through the batcher like anybody's. Each counts its tokens in its connection's
// share, so that between two parts others have their turn.
//
//     cut_begin -> { told -> cut_go_on } until it is over -> outputs in order -> cut_destroy
//
// At most one part for each lane, and one to follow, are under way: enough to keep the device busy,
// few enough to leave buffers for others. Whichever is told of, the whole's on_room is called, and
// its owner then calls cut_go_on; all but the telling is done by the owner's thread.
//
// A request that still needs room holds no batch with a finished output: until its last part has
// room, outputs are copied out as parts end, and their batches are free. So whoever waits for a
// buffer waits for the engine or for a reply to be sent, and never for a request that waits itself.
// The outputs of the last parts, which is all of them if they are few, stay where they are and are
// lent to the reply. Tensors in a region need no copy on that account.
#pragma once

#include "batch.h"
#include "placement.h"

struct cut;

struct part {
    struct job job;
    struct cut *cut;
    struct part *next; // among those that were told of
};

struct cut_options {
    struct batcher *batcher;
    // As request_check leaves it, with all that its owner sets and an on_room. IDLE throughout. Once it
    // is over its error is set, and what its first part's batch was like.
    struct job *whole;
    const struct placement *placement; // its region may be NULL
    struct copy_counters *copies;
    // Copies in what a part needs. On failure the part is as it was: DECODING.
    enum status (*fill)(struct job *whole, const struct job *part, struct error *err);
    // A part went well, and still has its tensors. NULL: nobody asks.
    void (*look)(struct job *whole, const struct job *part);
};

// Private to cut.c but for the parts, and what the owner of a reply keeps in it.
struct cut {
    struct cut_options options;
    uint32_t part_tokens, parts_n, at_once;
    uint32_t begun, under_way; // parts: reserved, or waiting for room; of those, not yet over
    bool waits;                // the last one begun has no room yet
    bool failed;
    uint8_t *copy;               // of outputs, all in their order; NULL: none so far
    _Atomic(struct part *) told; // stack
    _Atomic uint32_t unsent;     // the owner's
    struct part parts[];
};

// `at`: batcher_cut's answer, of fewer tokens than the job has, and not 0. Told of from now on, perhaps
// before this returns. On failure nothing is left of it. RESOURCE_EXHAUSTED and the errors of
// batcher_reserve_or_wait and `fill`.
NODISCARD enum status cut_begin(const struct cut_options *options, struct batcher_cut at,
                                struct cut **cut, struct error *err);

// Once for each on_room. False: it is over; the whole's error says how.
NODISCARD bool cut_go_on(struct cut *cut);

// Of a part, once all went well: where its output lies, and how many bytes. Not for placements
// with an output.
const void *cut_output(const struct cut *cut, const struct part *part, uint64_t *bytes);
// Copies out what can be, so that no batch is held. Parts for which there is no memory keep theirs.
void cut_copy_out(struct cut *cut);

// Gives back all batches.
void cut_destroy(struct cut *cut);
