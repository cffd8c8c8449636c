// From what a caller sent to a job that can be computed: every check of an EinsumRequest and of an
// OutputProjectRequest, in one place.
#pragma once

#include "job.h"
#include "wire.h"

// "bhr,hdr->bhd": the one equation that there is.
extern const char request_equation[];

// Whether a request for a weight of this format may name this recipe.
bool request_recipe_fits(enum einsum_recipe recipe, const struct einsum_weight_format *format);
const char *request_recipe_name(enum einsum_recipe recipe); // "RECIPE_1_128_128"

// Checks all fields against each other, the weight and the limits; all but `kernel`, which is the
// engine's to know (engine_kernel_find). On success `job` holds a
// reference to its weight and an operand without pointers; the caller has set nothing else yet.
// Errors name the field, what was expected and what came.
NODISCARD enum status request_check(const struct wire_request *request, struct weights *weights,
                                    uint32_t request_tokens_max, struct job *job,
                                    struct error *err);

// The same for a weight that has been found already, whose reference it takes, also on failure; the
// request's name for it is not looked at.
NODISCARD enum status request_check_with(const struct wire_request *request, struct weight *weight,
                                         uint32_t request_tokens_max, struct job *job,
                                         struct error *err);

// Sets operand's groups: [begin, end) of the weight's, or all if both are 0.
NODISCARD enum status request_check_groups(uint32_t begin, uint32_t end,
                                           const struct weight *weight,
                                           struct einsum_operand *operand, struct error *err);

// Whether the weight's rope has this position, the request's `index`th.
NODISCARD enum status request_check_position(int64_t position, uint64_t index,
                                             const struct weight *weight, struct error *err);

// Whether every position of a checked OutputProjectRequest is one that the weight's rope has. The
// slices are those that the request was read from.
NODISCARD enum status request_check_positions(const grpc_slice *slices, size_t slices_n,
                                              struct wire_range positions,
                                              const struct weight *weight, struct error *err);
