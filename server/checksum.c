#include "checksum.h"

#include <inttypes.h>

#include "../client/crc32c.h"

static const char *first_name(const struct wire_request *request)
{
    return request->kind == WIRE_OUTPUT_PROJECT ? "attention" : "activations";
}

static const char *second_name(const struct wire_request *request)
{
    return request->kind == WIRE_OUTPUT_PROJECT ? "positions" : "activation_scales";
}

NODISCARD static enum status compare(const char *name, const struct wire_sum *sum, uint32_t got,
                                     uint64_t bytes, struct error *err)
{
    if (got == sum->crc32c)
        return STATUS_OK;
    return error_field(err, STATUS_DATA_LOSS, name,
                       "expected CRC-32C 0x%08" PRIx32 ", as the request says, got 0x%08" PRIx32
                       " of the %" PRIu64 " bytes that came",
                       sum->crc32c, got, bytes);
}

NODISCARD static enum status check_range(const grpc_slice *slices, size_t slices_n,
                                         const char *name, const struct wire_sum *sum,
                                         struct wire_range range, struct error *err)
{
    if (!sum->given)
        return STATUS_OK;
    return compare(name, sum, wire_crc32c(slices, slices_n, range), range.bytes, err);
}

enum status checksum_check_message(const grpc_slice *slices, size_t slices_n,
                                   const struct wire_request *request, struct error *err)
{
    bool attention = request->kind == WIRE_OUTPUT_PROJECT;
    enum status status = check_range(slices, slices_n, first_name(request), &request->first_sum,
                                     attention ? request->attention : request->activations, err);
    if (status == STATUS_OK)
        status = check_range(slices, slices_n, second_name(request), &request->second_sum,
                             attention ? request->positions : request->activation_scales, err);
    return status;
}

NODISCARD static enum status check_piece(const uint8_t *memory, const char *name,
                                         const struct wire_sum *sum, struct wire_range range,
                                         struct error *err)
{
    if (!sum->given)
        return STATUS_OK;
    return compare(name, sum, crc32c_extend(0, memory + range.offset, range.bytes), range.bytes,
                   err);
}

enum status checksum_check_placed(const struct placement *placement,
                                  const struct wire_request *request, struct error *err)
{
    if (!request->first_sum.given && !request->second_sum.given && !request->output_sum)
        return STATUS_OK;
    if (placement->region->on_device)
        return error_field(err, STATUS_UNIMPLEMENTED, "shared.region",
                           "the server does not sum what lies in CUDA memory");
    const uint8_t *memory = placement->region->memory;
    enum status status =
        check_piece(memory, first_name(request), &request->first_sum, placement->activations, err);
    if (status == STATUS_OK)
        status =
            check_piece(memory, second_name(request), &request->second_sum, placement->scales, err);
    return status;
}
