// Rotary position embedding: from a token's position to the 32 cos and sin by which attention's
// output is rotated back. Computed when a request is decoded, from theta and perhaps YaRN, or read
// from a given table; about a microsecond a token, so the device holds no table.
//
// A rope never changes once made: any thread may rotate. It is counted by reference; every weight
// that uses it holds one.
#pragma once

#include "../kernels/attention.h"
#include "status.h"

struct roots;

enum {
    ROPE_POSITIONS_MAX = 1 << 24, // each below is exact in FP32
    ROPE_POSITIONS_DEFAULT = 1 << 20,
    ROPE_FACTOR_MAX = 1 << 16,
    ROPE_THETA_MAX = 1 << 30,
    ROPE_SOURCE_BYTES = 1024,
    ROPE_TENSOR_BYTES = 256,
};
#define ROPE_CACHE_TENSOR "cos_sin_cache"

// Exactly one of theta and cache. 0 or NULL is "not given" everywhere.
struct rope_options {
    double theta;                    // over 1
    double factor;                   // YaRN's; none and 1: no YaRN
    uint32_t original_positions_max; // YaRN alone: must be given
    double beta_fast, beta_slow;     // YaRN alone; none: 32 and 1
    uint32_t positions_max;          // none: ROPE_POSITIONS_DEFAULT, or all of a cache
    const char *cache;               // as roots_resolve takes a path
    const char *cache_tensor;        // F32 [positions, 64]; none: ROPE_CACHE_TENSOR
};

struct rope;

// Reads the head of a cache's file, so it may block. INVALID_ARGUMENT: options that do not go
// together, naming the field. For a cache as for any path of a checkpoint: PERMISSION_DENIED,
// NOT_FOUND; FAILED_PRECONDITION: no such tensor, or not such a table. `roots` is borrowed for the
// rope's life. With one reference.
NODISCARD enum status rope_create(const struct rope_options *options, const struct roots *roots,
                                  struct rope **rope, struct error *err);
struct rope *rope_ref(struct rope *rope);
void rope_unref(struct rope *rope); // NULL is fine

// What is in force, defaults filled in; a cache is named as clients may be shown it, below its
// root. Borrows from the rope.
const struct rope_options *rope_describe(const struct rope *rope);

// positions[0 ... n) must be from 0 to below positions_max. DATA_LOSS: a cache's file has shrunk, or
// its disk fails.
NODISCARD enum status rope_rotations(const struct rope *rope, const int64_t *positions, uint32_t n,
                                     struct attention_rotation *rotations, struct error *err);
