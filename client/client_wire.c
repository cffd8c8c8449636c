// Protocol buffers by hand, for the messages where a copy matters. No state; any thread.

#include "client_wire.h"

#include <string.h>

// ---- writing ------------------------------------------------------------------------------------

static size_t varint_bytes(uint64_t value)
{
    size_t bytes = 1;
    for (; value >= 0x80; value >>= 7)
        bytes++;
    return bytes;
}

static uint8_t *put_varint(uint8_t *to, uint64_t value)
{
    for (; value >= 0x80; value >>= 7)
        *to++ = (uint8_t)(value | 0x80);
    *to++ = (uint8_t)value;
    return to;
}

static uint8_t *put_tag(uint8_t *to, uint32_t number, enum einsum_client_wire_type type)
{
    return put_varint(to, (uint64_t)number << 3 | type);
}

static uint8_t *put_number(uint8_t *to, uint32_t number, uint64_t value)
{
    if (value == 0)
        return to;
    return put_varint(put_tag(to, number, EINSUM_CLIENT_WIRE_VARINT), value);
}

static uint8_t *put_string(uint8_t *to, uint32_t number, const char *text)
{
    size_t bytes = strlen(text);
    if (bytes == 0)
        return to;
    to = put_varint(put_tag(to, number, EINSUM_CLIENT_WIRE_BYTES), bytes);
    memcpy(to, text, bytes);
    return to + bytes;
}

static uint8_t *put_tensor_start(uint8_t *to, uint32_t number, uint64_t bytes)
{
    if (bytes == 0)
        return to;
    return put_varint(put_tag(to, number, EINSUM_CLIENT_WIRE_BYTES), bytes);
}

static uint8_t *put_scalars(uint8_t *to, const struct einsum_client_request *request, uint64_t id)
{
    to = put_number(to, 1, id);
    to = put_string(to, 2, request->weight);
    to = put_string(to, 3, request->equation ? request->equation : "bhr,hdr->bhd");
    to = put_number(to, 4, (uint32_t)request->recipe);
    to = put_number(to, 5, (uint32_t)request->activation_layout);
    to = put_number(to, 6, (uint32_t)request->scale_layout);
    to = put_number(to, 7, (uint32_t)request->scale_type);
    to = put_number(to, 8, (uint32_t)request->output_type);
    to = put_number(to, 9, request->tokens);
    to = put_number(to, 10, request->group_begin);
    to = put_number(to, 11, request->group_end);
    to = put_number(to, 12, request->digest_only);
    to = put_string(to, 15, request->kernel ? request->kernel : "");
    return put_number(to, 17, (uint32_t)request->priority);
}

static uint8_t *put_output_project_scalars(uint8_t *to, const struct einsum_client_request *request,
                                           uint64_t id)
{
    to = put_number(to, 1, id);
    to = put_string(to, 2, request->weight);
    to = put_number(to, 3, (uint32_t)request->output_type);
    to = put_number(to, 4, request->tokens);
    to = put_number(to, 5, request->group_begin);
    to = put_number(to, 6, request->group_end);
    to = put_number(to, 7, request->digest_only);
    to = put_string(to, 10, request->kernel ? request->kernel : "");
    return put_number(to, 12, (uint32_t)request->priority);
}

struct einsum_client_tensors einsum_client_tensors_of(const struct einsum_client_request *request)
{
    if (request->operation == EINSUM_CLIENT_OUTPUT_PROJECT)
        return (struct einsum_client_tensors){
            {"attention", request->attention, request->attention_bytes},
            {"positions", request->positions, request->positions_bytes}};
    return (struct einsum_client_tensors){
        {"activations", request->activations, request->activations_bytes},
        {"activation_scales", request->scales, request->scales_bytes}};
}

static uint8_t *put_place(uint8_t *to, uint32_t number, const struct einsum_client_place *place)
{
    uint8_t inner[128], *end = inner;
    end = put_varint(put_tag(end, 1, EINSUM_CLIENT_WIRE_BYTES), sizeof place->region);
    memcpy(end, place->region, sizeof place->region);
    end += sizeof place->region;
    end = put_number(end, 2, place->activations_offset);
    end = put_number(end, 3, place->activations_bytes);
    end = put_number(end, 4, place->scales_offset);
    end = put_number(end, 5, place->scales_bytes);
    end = put_number(end, 6, place->output_offset);
    end = put_number(end, 7, place->output_bytes);
    size_t bytes = (size_t)(end - inner);
    to = put_varint(put_tag(to, number, EINSUM_CLIENT_WIRE_BYTES), bytes);
    memcpy(to, inner, bytes);
    return to + bytes;
}

static uint8_t *put_sum(uint8_t *to, uint32_t number, uint32_t sum)
{
    to = put_varint(put_tag(to, number, EINSUM_CLIENT_WIRE_BYTES), 1 + sizeof sum);
    to = put_tag(to, 1, EINSUM_CLIENT_WIRE_FIXED32);
    for (int i = 0; i < 4; i++)
        *to++ = (uint8_t)(sum >> (8 * i));
    return to;
}

void einsum_client_frame_write(struct einsum_client_frame *frame,
                               const struct einsum_client_request *request, uint64_t request_id,
                               bool streamed, const struct einsum_client_place *place,
                               const struct einsum_client_sums *sums)
{
    bool project = request->operation == EINSUM_CLIENT_OUTPUT_PROJECT;
    bool placed = place && place->given;
    struct einsum_client_tensors tensors = einsum_client_tensors_of(request);
    if (placed)
        tensors.first.bytes = tensors.second.bytes = 0;
    uint8_t *end = put_tensor_start(frame->tail, project ? 9 : 14, tensors.second.bytes);
    frame->tail_bytes = (size_t)(end - frame->tail);

    uint8_t body[EINSUM_CLIENT_HEAD_BYTES_MAX - EINSUM_CLIENT_TAIL_BYTES_MAX];
    end = project ? put_output_project_scalars(body, request, request_id)
                  : put_scalars(body, request, request_id);
    if (placed)
        end = put_place(end, project ? 11 : 16, place);
    if (sums->given) {
        end = put_sum(end, project ? 13 : 18, sums->first);
        end = put_sum(end, project ? 14 : 19, sums->second);
        end = put_number(end, project ? 15 : 20, 1);
    }
    end = put_tensor_start(end, project ? 8 : 13, tensors.first.bytes);
    size_t body_bytes = (size_t)(end - body);

    uint64_t inner = body_bytes + tensors.first.bytes + frame->tail_bytes + tensors.second.bytes;
    uint8_t *to = frame->head;
    if (streamed)
        to = put_varint(put_tag(to, project ? 2 : 1, EINSUM_CLIENT_WIRE_BYTES), inner);
    memcpy(to, body, body_bytes);
    frame->head_bytes = (size_t)(to - frame->head) + body_bytes;
    frame->message_bytes = inner + (streamed ? 1 + varint_bytes(inner) : 0);
}

// ---- reading ------------------------------------------------------------------------------------

struct einsum_client_reader einsum_client_reader_of(const struct einsum_client_chunk *chunks,
                                                    size_t chunks_n)
{
    struct einsum_client_reader reader = {.chunks = chunks, .chunks_n = chunks_n};
    for (size_t i = 0; i < chunks_n; i++)
        reader.left += chunks[i].bytes;
    return reader;
}

// The bytes that lie in one piece at the reader's place; 0 where there are none, which `left` keeps
// from happening.
static size_t contiguous(struct einsum_client_reader *reader, const uint8_t **at)
{
    while (reader->chunk < reader->chunks_n &&
           reader->offset == reader->chunks[reader->chunk].bytes) {
        reader->chunk++;
        reader->offset = 0;
    }
    *at = NULL;
    if (reader->chunk == reader->chunks_n)
        return 0;
    const struct einsum_client_chunk *chunk = &reader->chunks[reader->chunk];
    *at = (const uint8_t *)chunk->data + reader->offset;
    size_t bytes = chunk->bytes - reader->offset;
    return bytes < reader->left ? bytes : (size_t)reader->left;
}

static void skip(struct einsum_client_reader *reader, uint64_t bytes)
{
    while (bytes > 0) {
        const uint8_t *at;
        size_t step = contiguous(reader, &at);
        if (step == 0)
            return;
        if (step > bytes)
            step = (size_t)bytes;
        reader->offset += step;
        reader->left -= step;
        bytes -= step;
    }
}

static bool fail(struct einsum_client_reader *reader)
{
    reader->broken = true;
    reader->left = 0;
    return false;
}

static bool read_varint(struct einsum_client_reader *reader, uint64_t *value)
{
    *value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        const uint8_t *at;
        if (reader->left == 0 || contiguous(reader, &at) == 0)
            return fail(reader);
        uint8_t byte = *at;
        reader->offset++;
        reader->left--;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            return true;
    }
    return fail(reader);
}

static bool read_fixed(struct einsum_client_reader *reader, unsigned bytes, uint64_t *value)
{
    if (reader->left < bytes)
        return fail(reader);
    uint8_t raw[8] = {0};
    einsum_client_reader_copy(*reader, raw, bytes);
    skip(reader, bytes);
    *value = 0;
    for (unsigned i = 0; i < bytes; i++)
        *value |= (uint64_t)raw[i] << (8 * i);
    return true;
}

bool einsum_client_reader_next(struct einsum_client_reader *reader,
                               struct einsum_client_wire_field *field)
{
    uint64_t tag;
    if (reader->left == 0 || !read_varint(reader, &tag))
        return false;
    if (tag >> 3 == 0 || tag >> 32 != 0)
        return fail(reader);
    *field = (struct einsum_client_wire_field){.number = (uint32_t)(tag >> 3)};
    switch (tag & 7) {
    case EINSUM_CLIENT_WIRE_VARINT:
        field->type = EINSUM_CLIENT_WIRE_VARINT;
        return read_varint(reader, &field->value);
    case EINSUM_CLIENT_WIRE_FIXED64:
        field->type = EINSUM_CLIENT_WIRE_FIXED64;
        return read_fixed(reader, 8, &field->value);
    case EINSUM_CLIENT_WIRE_FIXED32:
        field->type = EINSUM_CLIENT_WIRE_FIXED32;
        return read_fixed(reader, 4, &field->value);
    case EINSUM_CLIENT_WIRE_BYTES:
        field->type = EINSUM_CLIENT_WIRE_BYTES;
        if (!read_varint(reader, &field->value) || field->value > reader->left)
            return fail(reader);
        field->bytes = *reader;
        field->bytes.left = field->value;
        skip(reader, field->value);
        return true;
    default: // groups, which proto3 does not have, and what is not defined
        return fail(reader);
    }
}

uint64_t einsum_client_reader_copy(struct einsum_client_reader reader, void *to, uint64_t bytes)
{
    uint64_t copied = 0;
    while (reader.left > 0 && copied < bytes) {
        const uint8_t *at;
        size_t step = contiguous(&reader, &at);
        if (step == 0)
            break;
        if (step > bytes - copied)
            step = (size_t)(bytes - copied);
        memcpy((uint8_t *)to + copied, at, step);
        skip(&reader, step);
        copied += step;
    }
    return copied;
}

// The length of the UTF-8 sequence at `at`, 0 if there is none: overlong forms, surrogates and what
// lies past U+10FFFF are none.
static size_t utf8_length(const uint8_t *at, size_t bytes)
{
    uint8_t lead = at[0];
    size_t length = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    if (length == 0 || length > bytes || lead > 0xf4)
        return 0;
    for (size_t i = 1; i < length; i++) {
        if ((at[i] & 0xc0) != 0x80)
            return 0;
    }
    bool overlong = (lead == 0xe0 && at[1] < 0xa0) || (lead == 0xf0 && at[1] < 0x90);
    bool surrogate = lead == 0xed && at[1] >= 0xa0;
    bool past_end = lead == 0xf4 && at[1] >= 0x90;
    bool control_c1 = lead == 0xc2 && at[1] < 0xa0;
    return overlong || surrogate || past_end || control_c1 ? 0 : length;
}

void einsum_client_clean_text(char *to, size_t size, const char *from, size_t from_bytes)
{
    size_t used = 0;
    for (size_t i = 0; i < from_bytes;) {
        const uint8_t *at = (const uint8_t *)from + i;
        size_t length = utf8_length(at, from_bytes - i);
        bool printable = length > 1 || (length == 1 && at[0] >= 0x20 && at[0] != 0x7f);
        size_t add = printable ? length : 1;
        if (used + add >= size)
            break;
        if (printable)
            memcpy(to + used, at, length);
        else
            to[used] = '?';
        used += add;
        i += length ? length : 1;
    }
    to[used] = '\0';
}

void einsum_client_reader_text(struct einsum_client_reader reader, char *to, size_t size)
{
    char raw[1024];
    uint64_t bytes = einsum_client_reader_copy(reader, raw, sizeof raw);
    einsum_client_clean_text(to, size, raw, (size_t)bytes);
}

// ---- EinsumResponse -----------------------------------------------------------------------------

static float float_of(uint64_t bits)
{
    uint32_t low = (uint32_t)bits;
    float value;
    memcpy(&value, &low, sizeof value);
    return value;
}

static double double_of(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void add_head(struct einsum_client_digest *digest, uint64_t bits)
{
    if (digest->head_n < EINSUM_CLIENT_DIGEST_HEAD_MAX)
        digest->head[digest->head_n++] = float_of(bits);
}

static bool read_head(struct einsum_client_reader reader, struct einsum_client_digest *digest)
{
    uint64_t bits;
    while (reader.left > 0) {
        if (!read_fixed(&reader, 4, &bits))
            return false;
        add_head(digest, bits);
    }
    return true;
}

// Whether a field has the wire type that its number calls for; the wrong one is a broken message.
static bool is(const struct einsum_client_wire_field *field, enum einsum_client_wire_type type,
               bool *sound)
{
    *sound = *sound && field->type == type;
    return field->type == type;
}

static bool read_digest(struct einsum_client_reader reader, struct einsum_client_digest *digest)
{
    bool sound = true;
    struct einsum_client_wire_field field;
    while (einsum_client_reader_next(&reader, &field)) {
        switch (field.number) {
        case 1:
            if (is(&field, EINSUM_CLIENT_WIRE_VARINT, &sound))
                digest->crc32 = (uint32_t)field.value;
            break;
        case 2:
            if (is(&field, EINSUM_CLIENT_WIRE_VARINT, &sound))
                digest->elements = field.value;
            break;
        case 3:
            if (is(&field, EINSUM_CLIENT_WIRE_VARINT, &sound))
                digest->nan_elements = field.value;
            break;
        case 4:
            if (is(&field, EINSUM_CLIENT_WIRE_FIXED64, &sound))
                digest->sum = double_of(field.value);
            break;
        case 5:
            if (is(&field, EINSUM_CLIENT_WIRE_FIXED64, &sound))
                digest->abs_max = double_of(field.value);
            break;
        case 6: // packed, or one by one
            if (field.type == EINSUM_CLIENT_WIRE_FIXED32)
                add_head(digest, field.value);
            else if (is(&field, EINSUM_CLIENT_WIRE_BYTES, &sound))
                sound = sound && read_head(field.bytes, digest);
            break;
        default:
            break;
        }
    }
    return sound && !reader.broken;
}

static bool read_batch(struct einsum_client_reader reader, struct einsum_client_response *response)
{
    bool sound = true;
    struct einsum_client_wire_field field;
    while (einsum_client_reader_next(&reader, &field)) {
        if (field.number > 6 || !is(&field, EINSUM_CLIENT_WIRE_VARINT, &sound))
            continue;
        uint32_t small = (uint32_t)field.value;
        switch (field.number) {
        case 1:
            response->batch_tokens = small;
            break;
        case 2:
            response->batch_bucket = small;
            break;
        case 3:
            response->batch_requests = small;
            break;
        case 4:
            response->queue_ns = field.value;
            break;
        case 5:
            response->run_ns = field.value;
            break;
        default:
            response->parts = small;
            break;
        }
    }
    return sound && !reader.broken;
}

static bool read_sum(struct einsum_client_reader reader, struct einsum_client_response *response)
{
    bool sound = true;
    struct einsum_client_wire_field field;
    response->has_output_crc32c = true;
    while (einsum_client_reader_next(&reader, &field))
        if (field.number == 1 && is(&field, EINSUM_CLIENT_WIRE_FIXED32, &sound))
            response->output_crc32c = (uint32_t)field.value;
    return sound && !reader.broken;
}

static void set_response_number(struct einsum_client_response *response, uint32_t number,
                                uint64_t value)
{
    switch (number) {
    case 1:
        response->request_id = value;
        break;
    case 3:
        response->tokens = (uint32_t)value;
        break;
    case 4:
        response->groups = (uint32_t)value;
        break;
    case 5:
        response->output_dim = (uint32_t)value;
        break;
    default:
        response->output_type = (enum einsum_client_output_type)(uint32_t)value;
        break;
    }
}

static bool read_response(struct einsum_client_reader reader, struct einsum_client_reply *reply)
{
    struct einsum_client_response *response = &reply->response;
    bool sound = true;
    struct einsum_client_wire_field field;
    while (einsum_client_reader_next(&reader, &field)) {
        switch (field.number) {
        case 1:
        case 3:
        case 4:
        case 5:
        case 6:
            if (is(&field, EINSUM_CLIENT_WIRE_VARINT, &sound))
                set_response_number(response, field.number, field.value);
            break;
        case 2:
            if (is(&field, EINSUM_CLIENT_WIRE_BYTES, &sound)) {
                reply->output = field.bytes;
                response->output_bytes = field.bytes.left;
            }
            break;
        case 7:
            response->has_digest = true;
            if (is(&field, EINSUM_CLIENT_WIRE_BYTES, &sound))
                sound = sound && read_digest(field.bytes, &response->digest);
            break;
        case 8:
            if (is(&field, EINSUM_CLIENT_WIRE_BYTES, &sound))
                sound = sound && read_batch(field.bytes, response);
            break;
        case 9:
            if (is(&field, EINSUM_CLIENT_WIRE_BYTES, &sound))
                sound = sound && read_sum(field.bytes, response);
            break;
        default:
            break;
        }
    }
    return sound && !reader.broken;
}

static bool read_error(struct einsum_client_reader reader, struct einsum_client_reply *reply)
{
    bool sound = true;
    struct einsum_client_wire_field field;
    reply->has_error = true;
    while (einsum_client_reader_next(&reader, &field)) {
        switch (field.number) {
        case 1:
            if (is(&field, EINSUM_CLIENT_WIRE_VARINT, &sound))
                reply->error_code = (int32_t)(uint32_t)field.value;
            break;
        case 2:
            if (is(&field, EINSUM_CLIENT_WIRE_BYTES, &sound))
                einsum_client_reader_text(field.bytes, reply->error_text, sizeof reply->error_text);
            break;
        case 3:
            if (is(&field, EINSUM_CLIENT_WIRE_BYTES, &sound))
                einsum_client_reader_text(field.bytes, reply->error_field,
                                          sizeof reply->error_field);
            break;
        case 4:
            if (is(&field, EINSUM_CLIENT_WIRE_VARINT, &sound))
                reply->error_retry_after_ms = (uint32_t)field.value;
            break;
        default:
            break;
        }
    }
    return sound && !reader.broken;
}

bool einsum_client_reply_read(const struct einsum_client_chunk *chunks, size_t chunks_n,
                              bool streamed, struct einsum_client_reply *reply)
{
    memset(reply, 0, sizeof *reply);
    struct einsum_client_reader reader = einsum_client_reader_of(chunks, chunks_n);
    if (!streamed)
        return read_response(reader, reply);
    bool sound = true;
    struct einsum_client_wire_field field;
    while (einsum_client_reader_next(&reader, &field)) {
        if (field.number == 1 && is(&field, EINSUM_CLIENT_WIRE_BYTES, &sound))
            sound = sound && read_response(field.bytes, reply);
        else if (field.number == 2 && is(&field, EINSUM_CLIENT_WIRE_BYTES, &sound))
            sound = sound && read_error(field.bytes, reply);
    }
    return sound && !reader.broken;
}

// ---- google.rpc.Status --------------------------------------------------------------------------

static bool find_bytes(struct einsum_client_reader reader, uint32_t number,
                       struct einsum_client_reader *found)
{
    struct einsum_client_wire_field field;
    while (einsum_client_reader_next(&reader, &field)) {
        if (field.number == number && field.type == EINSUM_CLIENT_WIRE_BYTES) {
            *found = field.bytes;
            return true;
        }
    }
    return false;
}

// RetryInfo { Duration retry_delay = 1 { int64 seconds = 1; int32 nanos = 2; } }
static int64_t read_retry_info(struct einsum_client_reader reader)
{
    struct einsum_client_reader duration;
    if (!find_bytes(reader, 1, &duration))
        return 0;
    int64_t seconds = 0, nanos = 0;
    struct einsum_client_wire_field field;
    while (einsum_client_reader_next(&duration, &field)) {
        if (field.type == EINSUM_CLIENT_WIRE_VARINT && field.number == 1)
            seconds = (int64_t)field.value;
        else if (field.type == EINSUM_CLIENT_WIRE_VARINT && field.number == 2)
            nanos = (int64_t)field.value;
    }
    const int64_t seconds_max = 86400;
    if (seconds < 0 || nanos < 0 || nanos > 999999999)
        return 0;
    if (seconds > seconds_max)
        seconds = seconds_max;
    return seconds * 1000 + (nanos + 999999) / 1000000;
}

void einsum_client_details_read(const void *details, size_t bytes, int64_t *retry_after_ms,
                                char blamed[EINSUM_CLIENT_FIELD_BYTES])
{
    struct einsum_client_chunk chunk = {.data = details, .bytes = bytes};
    struct einsum_client_reader reader = einsum_client_reader_of(&chunk, 1);
    struct einsum_client_wire_field field;
    while (einsum_client_reader_next(&reader, &field)) {
        struct einsum_client_reader url, value, violation, name;
        if (field.number != 3 || field.type != EINSUM_CLIENT_WIRE_BYTES ||
            !find_bytes(field.bytes, 1, &url) || !find_bytes(field.bytes, 2, &value))
            continue;
        char type[64];
        einsum_client_reader_text(url, type, sizeof type);
        if (strcmp(type, "type.googleapis.com/google.rpc.RetryInfo") == 0)
            *retry_after_ms = read_retry_info(value);
        else if (strcmp(type, "type.googleapis.com/google.rpc.BadRequest") == 0 &&
                 find_bytes(value, 1, &violation) && find_bytes(violation, 1, &name))
            einsum_client_reader_text(name, blamed, EINSUM_CLIENT_FIELD_BYTES);
    }
}
