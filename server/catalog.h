// From a path in a request to the weights that it means: which files, which tensors, which scales
// belong to which weight, and how they are stored. Reads headers alone; loading is weights.c's.
//
//     path --roots--> folder or file --index, headers--> tensors --patterns--> entries
//
// Paths, indexes and headers are hostile: nothing outside the roots is opened or shown to exist.
// One control thread makes a catalog; after that any thread may read it.
#pragma once

#include "shards.h"
#include "weights.h"

enum {
    CATALOG_ENTRIES_MAX = 1 << 16,
    CATALOG_PATTERNS_MAX = 64,
};

struct catalog_entry {
    char name[WEIGHT_NAME_BYTES];       // canonical, with the load's prefix
    char source[WEIGHT_SOURCE_BYTES];   // file of the weight, below its root
    struct einsum_weight_format format; // of this rank's groups
    struct tensor_slice weight;
    struct tensor_slice scales; // empty for BF16
};

struct catalog {
    struct catalog_entry *entries; // in order of name, each name once
    uint32_t entries_n;
    struct shards *shards; // what the entries point into
};

// Of `load`, `replace`, `threads` and `progress` do not matter here. PERMISSION_DENIED: outside the
// roots. NOT_FOUND: no such path, or a pattern that matches nothing. FAILED_PRECONDITION or
// UNIMPLEMENTED: what was found cannot be used.
NODISCARD enum status catalog_init(struct catalog *catalog, const struct roots *roots,
                                   uint32_t reduced_dim_max, const struct weights_load *load,
                                   struct error *err);
void catalog_deinit(struct catalog *catalog);
