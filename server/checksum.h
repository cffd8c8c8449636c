// CRC-32C sums that callers send along with their tensors, checked before anything is computed, and
// those of outputs, which they may ask for.
//
// A pass of its own over bytes that have just arrived, before any room is reserved: a token of
// V4-Flash takes 0.5 us, no more than inside the copy (tests/bench/RESULTS.md).
#pragma once

#include "placement.h"
#include "wire.h"

// Of tensors in the message. DATA_LOSS names the one that is not what its caller summed.
NODISCARD enum status checksum_check_message(const grpc_slice *slices, size_t slices_n,
                                             const struct wire_request *request, struct error *err);

// Of tensors in a region, as they are now. UNIMPLEMENTED: any sum is asked for, and it lies on the
// device.
NODISCARD enum status checksum_check_placed(const struct placement *placement,
                                            const struct wire_request *request, struct error *err);
