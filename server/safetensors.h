// The safetensors file format: 8 bytes of header length, a JSON header, then the tensors' bytes.
//
// A file is hostile until proven otherwise: the header's size, depth and count are limited, offsets
// must lie in the file, not overlap and leave no hole, and each tensor's bytes must be what its
// dtype and shape say. The file is mapped, so a disk error or a truncation under the map would
// raise SIGBUS: all reading goes through safetensors_read, which turns that into an error.
#pragma once

#include "status.h"

enum {
    SAFETENSORS_HEADER_BYTES_MAX = 100 << 20,
    SAFETENSORS_TENSORS_MAX = 1 << 20,
    SAFETENSORS_DIMS_MAX = 8,
};

enum safetensors_dtype {
    SAFETENSORS_OTHER, // known to the format, of no use here
    SAFETENSORS_F8_E4M3,
    SAFETENSORS_F8_E8M0,
    SAFETENSORS_BF16,
    SAFETENSORS_F32,
};

struct safetensors; // one open file

struct safetensors_tensor {
    const char *name; // owned by the file
    enum safetensors_dtype dtype;
    char dtype_name[16]; // as written in the header
    uint32_t dims_n;
    uint64_t dims[SAFETENSORS_DIMS_MAX];
    uint64_t offset, bytes; // in the file
};

// Takes `fd` (closes it, also on failure). `label` names the file in errors. FAILED_PRECONDITION:
// not a valid file.
NODISCARD enum status safetensors_open(int fd, const char *label, struct safetensors **file,
                                       struct error *err);
void safetensors_close(struct safetensors *file);

// In the order of the header.
size_t safetensors_count(const struct safetensors *file);
const struct safetensors_tensor *safetensors_at(const struct safetensors *file, size_t index);
const struct safetensors_tensor *safetensors_find(const struct safetensors *file,
                                                  const char *name); // NULL if none

// Copies bytes of a tensor; any thread. DATA_LOSS if the disk fails or the file has shrunk.
NODISCARD enum status safetensors_read(const struct safetensors *file,
                                       const struct safetensors_tensor *tensor, uint64_t offset,
                                       void *to, uint64_t bytes, struct error *err);

// The file itself, header and all.
uint64_t safetensors_bytes(const struct safetensors *file);
NODISCARD enum status safetensors_read_raw(const struct safetensors *file, uint64_t offset,
                                           void *to, uint64_t bytes, struct error *err);

// Parses a header alone, for the fuzzer and tests: `header` is the JSON, `data_bytes` what follows
// it in the file.
NODISCARD enum status safetensors_parse(const char *header, size_t header_bytes,
                                        uint64_t data_bytes, const char *label,
                                        struct safetensors **file, struct error *err);
