// The FP64 reference of kernels/einsum.h for a whole request, fast enough to check every output:
// rows decoded once, sums in vectors, all cores. Bit for bit it may differ from einsum_reference by
// the order of FP64 sums alone.
#pragma once

#include "../kernels/einsum.h"

struct ctl_reference {
    const struct einsum_weight_format *format;
    const void *weight, *weight_scales; // as in the checkpoint
    const struct einsum_operand *operand;
    double *exact;      // [tokens, groups, D]
    double *magnitude;  // likewise: sums of absolute products
    double *wgmma_loss; // likewise: what the kernel "hopper" may lose; NULL: not asked for
};

// false: no memory. `threads` 0: one per core.
bool ctl_reference_compute(const struct ctl_reference *reference, unsigned threads);
