// Where a weight came from, so that it can be read again: what its load said, and its own tensor.
#pragma once

#include "status.h"

struct weights_load;

struct origin {
    char *path, *name_prefix, *checksums; // of the load
    char *pattern;                        // that fits its tensor alone
    uint32_t tensor_parallel_rank, tensor_parallel_size, output_dim;
};

NODISCARD enum status origin_init(struct origin *origin, const struct weights_load *load,
                                  const char *tensor, struct error *err);
void origin_deinit(struct origin *origin);

// The load that reads it again; borrows from `origin`.
struct weights_load origin_load(const struct origin *origin);
