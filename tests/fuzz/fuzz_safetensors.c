// Headers of safetensors files: the first 8 bytes are taken as the size of the data that follows
// the header, the rest as the header. Whatever is accepted must describe tensors that tile the data
// and can be found again by name.
#include <stdlib.h>
#include <string.h>

#include "server/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static int compare_offsets(const void *left, const void *right)
{
    const struct safetensors_tensor *a = *(const struct safetensors_tensor *const *)left;
    const struct safetensors_tensor *b = *(const struct safetensors_tensor *const *)right;
    if (a->offset != b->offset)
        return a->offset < b->offset ? -1 : 1;
    return a->bytes < b->bytes ? -1 : a->bytes > b->bytes;
}

static void check_accepted(const struct safetensors *file, uint64_t data_begin, uint64_t data_bytes)
{
    size_t tensors_n = safetensors_count(file);
    const struct safetensors_tensor **tensors =
        malloc((tensors_n + 1) * sizeof(const struct safetensors_tensor *));
    ASSERT(tensors);
    for (size_t i = 0; i < tensors_n; i++) {
        tensors[i] = safetensors_at(file, i);
        ASSERT(safetensors_find(file, tensors[i]->name) == tensors[i]);
        ASSERT(tensors[i]->dims_n <= SAFETENSORS_DIMS_MAX);
        ASSERT(tensors[i]->dtype_name[0] != '\0');
    }
    qsort(tensors, tensors_n, sizeof(const struct safetensors_tensor *), compare_offsets);
    uint64_t at = data_begin;
    for (size_t i = 0; i < tensors_n; i++) {
        ASSERT(tensors[i]->offset == at);
        at += tensors[i]->bytes;
    }
    ASSERT(at - data_begin == data_bytes);
    free(tensors);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    uint64_t data_bytes;
    if (bytes < sizeof data_bytes)
        return 0;
    memcpy(&data_bytes, data, sizeof data_bytes);
    size_t header_bytes = bytes - sizeof data_bytes;
    // A heap block of exactly that size: reading past it is seen.
    char *header = malloc(header_bytes);
    if (!header)
        return 0;
    memcpy(header, data + sizeof data_bytes, header_bytes);

    struct safetensors *file;
    struct error err = {0};
    enum status status = safetensors_parse(header, header_bytes, data_bytes, "fuzzed", &file, &err);
    if (status == STATUS_OK) {
        check_accepted(file, sizeof data_bytes + header_bytes, data_bytes);
        safetensors_close(file);
    } else {
        ASSERT(err.status == status && memchr(err.text, '\0', sizeof err.text));
    }
    free(header);
    return 0;
}
