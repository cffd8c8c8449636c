// Tensors in files, for `einsumctl run`: reads NumPy's .npy and .safetensors, writes both. Files
// are what a user names, but may be anything: sizes are checked against the file before memory is
// taken.
#pragma once

#include "../server/status.h"

enum { TENSOR_DIMS_MAX = 8 };

enum tensor_kind { TENSOR_BYTES, TENSOR_FP32, TENSOR_OTHER }; // TENSOR_BYTES: one byte an element

struct tensor {
    uint8_t *data;
    uint64_t bytes;
    enum tensor_kind kind;
    uint32_t element_bytes;
    char type[16]; // as the file calls it
    uint32_t dims_n;
    uint64_t dims[TENSOR_DIMS_MAX];
};

// `name` is "FILE.npy", or "FILE.safetensors" with or without ":TENSOR"; `usual` is the tensor's
// name without. INVALID_ARGUMENT: no such form; FAILED_PRECONDITION: not such a file; NOT_FOUND: no
// such tensor or file.
NODISCARD enum status tensor_read(const char *name, const char *usual, struct tensor *tensor,
                                  struct error *err);
void tensor_deinit(struct tensor *tensor);

// Writes [dims] of BF16 (in .npy, which has no BF16, as uint16) or FP32. A file that is there is
// replaced, whole or not at all.
NODISCARD enum status tensor_write(const char *name, const void *data, bool fp32, uint32_t dims_n,
                                   const uint64_t *dims, struct error *err);

// A .npy header: what tensor_read makes of the bytes before the data. For tests.
NODISCARD enum status npy_parse(const uint8_t *bytes, size_t bytes_n, struct tensor *tensor,
                                size_t *header_bytes, struct error *err);
