// Requests as slices over the caller's memory, and replies out of gRPC's buffers.
//
//     request   [head][ first tensor, the caller's ][tail][ second, the caller's ]
//     reply     gRPC's slices --one copy--> request.output
//
// Building runs on the thread that starts a call; a borrowed slice is let go on whichever thread of
// gRPC's drops the last reference; replies are read on the client's thread.

#include "client_internal.h"

#include "crc32c.h"

#include <grpc/byte_buffer_reader.h>
#include <grpc/slice.h>
#include <stdlib.h>
#include <string.h>

// ---- requests -----------------------------------------------------------------------------------

enum einsum_client_status einsum_client_check_request(const struct einsum_client_request *request,
                                                      struct einsum_client_error *error)
{
    const char *equation = request->equation ? request->equation : "";
    const char *field = NULL, *why = NULL;
    const struct einsum_client_tensors tensors = einsum_client_tensors_of(request);
    if (!request->weight || !request->weight[0])
        field = "weight", why = "not given";
    else if (strnlen(request->weight, EINSUM_CLIENT_WEIGHT_BYTES_MAX + 1) >
             EINSUM_CLIENT_WEIGHT_BYTES_MAX)
        field = "weight", why = "longer than 256 bytes";
    else if (strnlen(equation, EINSUM_CLIENT_EQUATION_BYTES_MAX + 1) >
             EINSUM_CLIENT_EQUATION_BYTES_MAX)
        field = "equation", why = "longer than 64 bytes";
    else if (request->kernel &&
             strnlen(request->kernel, EINSUM_CLIENT_KERNEL_BYTES) >= EINSUM_CLIENT_KERNEL_BYTES)
        field = "kernel", why = "longer than 64 bytes";
    else if (request->operation != EINSUM_CLIENT_EINSUM &&
             request->operation != EINSUM_CLIENT_OUTPUT_PROJECT)
        field = "operation", why = "neither of the two";
    else if (!tensors.first.data && tensors.first.bytes)
        field = tensors.first.name, why = "a size without memory";
    else if (!tensors.second.data && tensors.second.bytes)
        field = tensors.second.name, why = "a size without memory";
    if (!field)
        return EINSUM_CLIENT_OK;
    enum einsum_client_status status =
        einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT, "%s: %s", field, why);
    if (error)
        memcpy(error->field, field, strlen(field) + 1);
    return status;
}

// gRPC's destroy callback of a borrowed slice. The release pairs with the acquire in
// einsum_client_outgoing_free: whoever sees 0 there may write to the memory.
static void on_slice_unused(void *borrowed)
{
    atomic_fetch_sub_explicit((_Atomic uint32_t *)borrowed, 1, memory_order_release);
}

static void add_borrowed(struct einsum_client_outgoing *outgoing, const void *data, uint64_t bytes)
{
    if (bytes == 0)
        return;
    atomic_fetch_add_explicit(&outgoing->borrowed, 1, memory_order_relaxed);
    outgoing->slices[outgoing->slices_n++] = grpc_slice_new_with_user_data(
        (void *)data, (size_t)bytes, on_slice_unused, &outgoing->borrowed);
}

struct einsum_client_sums einsum_client_sums_of(const struct einsum_client *client,
                                                const struct einsum_client_request *request,
                                                const struct einsum_client_place *place)
{
    if (!client->options.checksums || (place && place->cuda))
        return (struct einsum_client_sums){0};
    const struct einsum_client_tensors tensors = einsum_client_tensors_of(request);
    return (struct einsum_client_sums){
        .given = true,
        .first = crc32c_extend(0, tensors.first.data, tensors.first.bytes),
        .second = crc32c_extend(0, tensors.second.data, tensors.second.bytes),
    };
}

static void add_copied(struct einsum_client_outgoing *outgoing, const uint8_t *data, size_t bytes)
{
    if (bytes == 0)
        return;
    outgoing->slices[outgoing->slices_n++] =
        grpc_slice_from_copied_buffer((const char *)data, bytes);
}

enum einsum_client_status einsum_client_outgoing_init(struct einsum_client_outgoing *outgoing,
                                                      const struct einsum_client *client,
                                                      const struct einsum_client_request *request,
                                                      uint64_t request_id, bool streamed,
                                                      const struct einsum_client_place *place,
                                                      struct einsum_client_error *error)
{
    outgoing->slices_n = 0;
    atomic_init(&outgoing->borrowed, 0);
    enum einsum_client_status status = einsum_client_check_request(request, error);
    if (status == EINSUM_CLIENT_OK)
        status = einsum_client_cuda_check(client, request, place, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    // Before they are added up: two sizes near 2^64 must not wrap around to a small one.
    uint64_t max = client->options.send_bytes_max;
    struct einsum_client_frame frame = {.message_bytes = UINT64_MAX};
    struct einsum_client_tensors tensors = einsum_client_tensors_of(request);
    if (place && place->given)
        tensors.first.bytes = tensors.second.bytes = 0;
    if (tensors.first.bytes <= max && tensors.second.bytes <= max) {
        const struct einsum_client_sums sums = einsum_client_sums_of(client, request, place);
        einsum_client_frame_write(&frame, request, request_id, streamed, place, &sums);
    }
    if (frame.message_bytes > max)
        return einsum_client_error_set(
            error, EINSUM_CLIENT_RESOURCE_EXHAUSTED,
            "the request is larger than this client sends, %llu bytes: raise send_bytes_max, "
            "which is grpc.max_send_message_length",
            (unsigned long long)max);
    add_copied(outgoing, frame.head, frame.head_bytes);
    add_borrowed(outgoing, tensors.first.data, tensors.first.bytes);
    add_copied(outgoing, frame.tail, frame.tail_bytes);
    add_borrowed(outgoing, tensors.second.data, tensors.second.bytes);
    return EINSUM_CLIENT_OK;
}

grpc_byte_buffer *einsum_client_outgoing_buffer(const struct einsum_client_outgoing *outgoing)
{
    return grpc_raw_byte_buffer_create((grpc_slice *)outgoing->slices, outgoing->slices_n);
}

void einsum_client_outgoing_release(struct einsum_client_outgoing *outgoing)
{
    for (size_t i = 0; i < outgoing->slices_n; i++)
        grpc_slice_unref(outgoing->slices[i]);
    outgoing->slices_n = 0;
}

bool einsum_client_outgoing_free(const struct einsum_client_outgoing *outgoing)
{
    return atomic_load_explicit(&outgoing->borrowed, memory_order_acquire) == 0;
}

// ---- replies ------------------------------------------------------------------------------------

bool einsum_client_incoming_init(struct einsum_client_incoming *incoming, grpc_byte_buffer *buffer)
{
    *incoming = (struct einsum_client_incoming){0};
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, buffer))
        return false;
    size_t room = 0;
    bool fits = true;
    grpc_slice *slice; // lies in the buffer, so that even a short one's inline bytes stay put
    while (fits && grpc_byte_buffer_reader_peek(&reader, &slice)) {
        if (incoming->chunks_n == room) {
            room = room ? 2 * room : 32;
            void *grown = realloc(incoming->chunks, room * sizeof *incoming->chunks);
            fits = grown != NULL;
            if (!fits)
                break;
            incoming->chunks = grown;
        }
        incoming->chunks[incoming->chunks_n++] = (struct einsum_client_chunk){
            .data = GRPC_SLICE_START_PTR(*slice), .bytes = GRPC_SLICE_LENGTH(*slice)};
    }
    grpc_byte_buffer_reader_destroy(&reader);
    if (!fits)
        einsum_client_incoming_deinit(incoming);
    return fits;
}

void einsum_client_incoming_deinit(struct einsum_client_incoming *incoming)
{
    free(incoming->chunks);
    *incoming = (struct einsum_client_incoming){0};
}

struct einsum_client_expected einsum_client_expected_of(const struct einsum_client *client,
                                                        const struct einsum_client_request *request)
{
    return (struct einsum_client_expected){
        .request_id = request->request_id,
        .tokens = request->tokens,
        .output_type = request->output_type,
        .digest_only = request->digest_only,
        .output = request->output,
        .output_bytes = request->output ? request->output_bytes : 0,
        .summed = client->options.checksums,
    };
}

// 128 bits: three hostile 32-bit numbers must not wrap around to the right product.
static unsigned __int128 output_bytes_said(const struct einsum_client_response *response)
{
    unsigned __int128 bytes = (unsigned __int128)response->tokens * response->groups;
    return bytes * response->output_dim *
           (response->output_type == EINSUM_CLIENT_OUTPUT_FP32 ? 4 : 2);
}

static enum einsum_client_status check_shape(const struct einsum_client_expected *expected,
                                             const struct einsum_client_response *response,
                                             struct einsum_client_error *error)
{
    if (response->tokens != expected->tokens)
        return einsum_client_error_set(error, EINSUM_CLIENT_INTERNAL,
                                       "the reply is for %u tokens, the request had %u",
                                       response->tokens, expected->tokens);
    if (response->output_type != expected->output_type)
        return einsum_client_error_set(
            error, EINSUM_CLIENT_INTERNAL, "the reply is of output type %u, the request named %u",
            (unsigned)response->output_type, (unsigned)expected->output_type);
    if (expected->digest_only) {
        if (response->has_digest && response->output_bytes == 0)
            return EINSUM_CLIENT_OK;
        return einsum_client_error_set(error, EINSUM_CLIENT_INTERNAL,
                                       "the reply is not the digest that was asked for");
    }
    unsigned element_bytes = response->output_type == EINSUM_CLIENT_OUTPUT_FP32 ? 4 : 2;
    unsigned __int128 bytes = output_bytes_said(response);
    if (bytes != response->output_bytes)
        return einsum_client_error_set(
            error, EINSUM_CLIENT_INTERNAL,
            "the reply says [%u, %u, %u] of %u bytes and holds %llu bytes", response->tokens,
            response->groups, response->output_dim, element_bytes,
            (unsigned long long)response->output_bytes);
    return EINSUM_CLIENT_OK;
}

// Leaves of `incoming` the chunks that `range` covers, and lends them.
static void lend_chunks(struct einsum_client_incoming *incoming,
                        const struct einsum_client_reader *range,
                        struct einsum_client_response *response)
{
    uint64_t left = range->left;
    size_t kept = 0, offset = range->offset;
    for (size_t i = range->chunk; left > 0; i++) {
        struct einsum_client_chunk chunk = incoming->chunks[i];
        chunk.data = (const uint8_t *)chunk.data + offset;
        chunk.bytes -= offset;
        offset = 0;
        if (chunk.bytes > left)
            chunk.bytes = (size_t)left;
        left -= chunk.bytes;
        if (chunk.bytes > 0)
            incoming->chunks[kept++] = chunk;
    }
    incoming->chunks_n = kept;
    response->chunks = incoming->chunks;
    response->chunks_n = kept;
}

// `crc`: of the output where the caller will read it.
static enum einsum_client_status check_sum(const struct einsum_client_expected *expected,
                                           const struct einsum_client_response *response,
                                           uint32_t crc, struct einsum_client_error *error)
{
    if (!response->has_output_crc32c)
        return einsum_client_error_set(error, EINSUM_CLIENT_UNIMPLEMENTED,
                                       "the server sends no CRC-32C of outputs, which "
                                       "options.checksums asks for");
    // A digest's is of what stays there.
    if (expected->digest_only || crc == response->output_crc32c)
        return EINSUM_CLIENT_OK;
    return einsum_client_error_set(error, EINSUM_CLIENT_DATA_LOSS,
                                   "output: expected CRC-32C 0x%08x, as the reply says, got 0x%08x "
                                   "of the %llu bytes that came",
                                   response->output_crc32c, crc,
                                   (unsigned long long)response->output_bytes);
}

enum einsum_client_status einsum_client_accept_placed(const struct einsum_client_expected *expected,
                                                      struct einsum_client_response *response,
                                                      struct einsum_client_error *error)
{
    unsigned __int128 bytes = output_bytes_said(response);
    if (bytes > expected->place.output_bytes)
        return einsum_client_error_set(error, EINSUM_CLIENT_INTERNAL,
                                       "the reply says [%u, %u, %u], for which there was no room",
                                       response->tokens, response->groups, response->output_dim);
    response->output_bytes = (uint64_t)bytes;
    enum einsum_client_status status = check_shape(expected, response, error);
    if (status == EINSUM_CLIENT_OK && expected->place.staged_output)
        memcpy(expected->output, expected->place.staged_output, response->output_bytes);
    if (status != EINSUM_CLIENT_OK || !expected->summed || expected->place.cuda)
        return status;
    return check_sum(expected, response, crc32c_extend(0, expected->output, response->output_bytes),
                     error);
}

static uint32_t sum_chunks(const struct einsum_client_response *response)
{
    uint32_t crc = 0;
    for (size_t i = 0; i < response->chunks_n; i++)
        crc = crc32c_extend(crc, response->chunks[i].data, response->chunks[i].bytes);
    return crc;
}

enum einsum_client_status einsum_client_accept(const struct einsum_client_expected *expected,
                                               struct einsum_client_incoming *incoming,
                                               struct einsum_client_reply *reply,
                                               struct einsum_client_error *error)
{
    struct einsum_client_response *response = &reply->response;
    response->request_id = expected->request_id;
    if (expected->place.given && !expected->digest_only && response->output_bytes == 0)
        return einsum_client_accept_placed(expected, response, error);
    enum einsum_client_status status = check_shape(expected, response, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    if (!expected->output) {
        lend_chunks(incoming, &reply->output, response);
        return expected->summed ? check_sum(expected, response, sum_chunks(response), error)
                                : EINSUM_CLIENT_OK;
    }
    if (response->output_bytes > expected->output_bytes)
        return einsum_client_error_set(
            error, EINSUM_CLIENT_INVALID_ARGUMENT, "output: holds %llu bytes, the reply has %llu",
            (unsigned long long)expected->output_bytes, (unsigned long long)response->output_bytes);
    einsum_client_reader_copy(reply->output, expected->output, response->output_bytes);
    if (!expected->summed)
        return EINSUM_CLIENT_OK;
    return check_sum(expected, response, crc32c_extend(0, expected->output, response->output_bytes),
                     error);
}
