// A checkpoint's files: which there are, and which tensor is in which. From an index if the folder
// has one, else from the headers of all its safetensors files; or of one file alone.
//
// Files are opened as their tensors are asked for, and stay open. One control thread makes it and
// asks; the slices that it gave may then be read by any thread.
#pragma once

#include "roots.h"
#include "safetensors.h"

#define SHARDS_INDEX_NAME "model.safetensors.index.json"

enum { SHARDS_MAX = 1024 };

struct shards;

struct place { // where a tensor is said to be
    const char *tensor;
    const char *file; // in the folder
};

struct tensor_slice { // all of a tensor, or some consecutive bytes of it
    const struct safetensors *file;
    const char *label; // the file's path below its root
    const struct safetensors_tensor *tensor;
    uint64_t offset, bytes; // in the tensor
};

// `path` as roots_resolve takes it; `roots` is borrowed. NOT_FOUND: nothing is there.
// FAILED_PRECONDITION: an index or header is no good.
NODISCARD enum status shards_create(const struct roots *roots, const char *path,
                                    struct shards **shards, struct error *err);
void shards_destroy(struct shards *shards);

// All tensors, in order of name; a name that is in several files is there several times.
size_t shards_count(const struct shards *shards);
const struct place *shards_at(const struct shards *shards, size_t index);
const struct place *shards_find(const struct shards *shards, const char *tensor); // NULL if none

// All of the tensor at `place`. FAILED_PRECONDITION: its file is missing or does not hold it, or
// another one holds it too. PERMISSION_DENIED: its file is a link out of the roots.
NODISCARD enum status shards_slice(struct shards *shards, const struct place *place,
                                   struct tensor_slice *slice, struct error *err);
