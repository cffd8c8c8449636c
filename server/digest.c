#include "digest.h"

#include <math.h>
#include <string.h>
#include <zlib.h>

#include "../kernels/fp8.h"

static float element_at(enum einsum_output_type type, const void *output, uint64_t index)
{
    if (type == EINSUM_OUTPUT_FP32) {
        float value;
        memcpy(&value, (const char *)output + index * sizeof value, sizeof value);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, (const char *)output + index * sizeof bits, sizeof bits);
    return bf16_to_float(bits);
}

void digest_add(enum einsum_output_type type, const void *output, uint64_t elements,
                struct digest *digest)
{
    uint64_t bytes = elements * einsum_output_element_bytes(type);
    digest->elements += elements;
    if (elements > 0) // of nothing zlib would start anew
        digest->crc32 = (uint32_t)crc32_z(digest->crc32, output, bytes);
    for (uint64_t i = 0; i < elements; i++) {
        float value = element_at(type, output, i);
        if (digest->head_n < DIGEST_HEAD_ELEMENTS)
            digest->head[digest->head_n++] = value;
        if (isnan(value)) {
            digest->nan_elements++;
            continue;
        }
        digest->sum += (double)value;
        digest->abs_max = fmax(digest->abs_max, fabs((double)value));
    }
}
