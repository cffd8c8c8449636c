// What a digest-only reply says of an output.
#pragma once

#include "../kernels/einsum.h"

enum { DIGEST_HEAD_ELEMENTS = 8 };

struct digest {
    uint32_t crc32; // zlib's, of the bytes
    uint64_t elements, nan_elements;
    double sum, abs_max; // of the elements that are not NaN
    float head[DIGEST_HEAD_ELEMENTS];
    size_t head_n;
};

// Adds what follows in the output to a digest, which is all zeros at first.
void digest_add(enum einsum_output_type type, const void *output, uint64_t elements,
                struct digest *digest);
