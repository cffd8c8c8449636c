// SHA-256 of a checkpoint's files, as `sha256sum` writes and checks them; Hugging Face shows them for the
// files that it keeps by LFS. Control and loading threads.
#pragma once

#include "roots.h"
#include "safetensors.h"

enum { SUMS_BYTES_MAX = 1 << 20 }; // of such a file

struct sums;

// `path` as roots_resolve takes it. Lines "HEX  NAME" or "HEX *NAME"; of a name the last part counts.
// FAILED_PRECONDITION: one is no such line, or a name is there twice.
NODISCARD enum status sums_read(const struct roots *roots, const char *path, struct sums **sums,
                                struct error *err);
void sums_destroy(struct sums *sums); // NULL: nothing

// All of the file. `progress` (may be NULL) is told of bytes as they are read, and ends it by false:
// CANCELLED. FAILED_PRECONDITION: the file is not listed; DATA_LOSS: it is another one.
NODISCARD enum status sums_check(const struct sums *sums, const struct safetensors *file,
                                 const char *label, bool (*progress)(void *context, uint64_t bytes),
                                 void *context, struct error *err);
