// The step before the einsum as the client sees it: random inputs for it, what they must become,
// and the flags that say how positions turn.
// Written from the step's definition and shares no code with the server's: `einsumctl check` is an
// opinion of its own.
#pragma once

#include "ctl.h"

// How positions turn; see Rope in the proto.
struct ctl_rope {
    const float *table; // a cache's [positions, 64], cos then sin; NULL: by the parameters below
    double theta, factor;
    uint32_t original_positions_max;
    double beta_fast, beta_slow;
    uint32_t positions_max; // those below are tried
};

// Whether OutputProject takes this weight: it has a rope and is made of whole heads.
bool ctl_takes_attention(const struct einsum_client_weight *weight);

// BF16 values, of another magnitude in each head, as activations; positions below `positions_max`,
// not 0, as scales. false: no memory.
NODISCARD bool ctl_random_attention(const struct einsum_client_weight *weight, uint32_t tokens,
                                    uint32_t positions_max, uint64_t seed,
                                    struct ctl_inputs *inputs);

// The flags of a rope, in a command's table of options from `base` on. `of` begins each help text.
enum {
    CTL_ROPE_THETA,
    CTL_ROPE_FACTOR,
    CTL_ROPE_ORIGINAL,
    CTL_ROPE_FAST,
    CTL_ROPE_SLOW,
    CTL_ROPE_POSITIONS,
    CTL_ROPE_CACHE,
    CTL_ROPE_TENSOR,
    CTL_ROPE_FLAGS,
};
// clang-format off
#define CTL_OPTIONS_ROPE(base, of, cache)                                                          \
    [(base) + CTL_ROPE_THETA] = {"rope-theta", "X", of "base of the rope's frequencies"},          \
    [(base) + CTL_ROPE_FACTOR] = {"rope-factor", "X", of "YaRN's; default 1, no YaRN"},            \
    [(base) + CTL_ROPE_ORIGINAL] = {"rope-original", "N", of "positions before YaRN"},            \
    [(base) + CTL_ROPE_FAST] = {"rope-beta-fast", "X", of "YaRN's; default 32"},                   \
    [(base) + CTL_ROPE_SLOW] = {"rope-beta-slow", "X", of "YaRN's; default 1"},                    \
    [(base) + CTL_ROPE_POSITIONS] = {"rope-positions", "N", of "how many; default 1048576"},       \
    [(base) + CTL_ROPE_CACHE] = {"rope-cache", "FILE", of cache},                                  \
    [(base) + CTL_ROPE_TENSOR] = {"rope-cache-tensor", "T", of "its tensor; default cos_sin_cache"}
// clang-format on

// Reads them; what is not given is 0 or "". `*given`: any was. false: said what is wrong.
NODISCARD bool ctl_read_rope(const struct ctl_args *args, int base, struct einsum_client_rope *rope,
                             bool *given);

// What a request's attention and positions become: E4M3 as tgr and UE8M0 as tgk. false: no memory.
NODISCARD bool ctl_quantise_attention(const struct ctl_rope *rope,
                                      const struct einsum_client_weight *weight, uint32_t tokens,
                                      const struct ctl_inputs *attention,
                                      struct ctl_inputs *quantised);
