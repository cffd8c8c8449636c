// Protobuf's wire format, as far as the hot messages need it: a cursor over gRPC's slices, and on
// top of it the reader of the two requests and the writer of EinsumResponse's head.
//
// Owns no memory and no state; any thread. The bytes come from the network and are hostile.
//
//     slices   |--------|---|-------------------|------------|
//     fields   |tag|value|tag|length|.........bytes.........||      each may straddle any border
//                     at ^                                  ^ end
//
// Invariant: offset <= end, and the slices hold at least `end` bytes. So whoever has checked a
// length against `end` may move over the slices without another check.
#include "wire.h"

#include <string.h>

#include "../client/crc32c.h"

enum {
    VARINT_BYTES_MAX = 10,    // 64 bits, seven at a time
    TAG_VARINT_BYTES_MAX = 5, // 32 bits: tags and lengths
    FIELD_NUMBER_MAX = (1 << 29) - 1,
    WIRE_GROUP_BEGIN = 3, // refused: long deprecated, and nesting without a length
    WIRE_GROUP_END = 4,
};

uint64_t wire_bytes(const grpc_slice *slices, size_t slices_n)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < slices_n; i++)
        bytes += GRPC_SLICE_LENGTH(slices[i]);
    return bytes;
}

void wire_cursor_init(struct wire_cursor *cursor, const grpc_slice *slices, size_t slices_n)
{
    // gRPC gives no slices at all for an empty message, and C no sum of NULL and 0.
    *cursor = (struct wire_cursor){.next = slices, .slices_end = slices};
    if (slices_n > 0)
        cursor->slices_end += slices_n;
}

// Bytes that lie in one piece at the cursor, at least 1 unless the message is at its end.
static size_t piece_at(struct wire_cursor *cursor)
{
    while (cursor->at == cursor->at_end && cursor->next != cursor->slices_end) {
        cursor->at = GRPC_SLICE_START_PTR(*cursor->next);
        cursor->at_end = cursor->at + GRPC_SLICE_LENGTH(*cursor->next);
        cursor->next++;
    }
    return (size_t)(cursor->at_end - cursor->at);
}

static void advance(struct wire_cursor *cursor, size_t bytes)
{
    cursor->at += bytes;
    cursor->offset += bytes;
}

static uint8_t take_byte(struct wire_cursor *cursor)
{
    ASSERT(piece_at(cursor) > 0);
    uint8_t byte = *cursor->at;
    advance(cursor, 1);
    return byte;
}

void wire_skip(struct wire_cursor *cursor, uint64_t bytes)
{
    while (bytes > 0) {
        size_t piece = piece_at(cursor);
        ASSERT(piece > 0);
        if (piece > bytes)
            piece = (size_t)bytes;
        advance(cursor, piece);
        bytes -= piece;
    }
}

void wire_take(struct wire_cursor *cursor, uint64_t bytes, void *to)
{
    uint8_t *next = to;
    while (bytes > 0) {
        size_t piece = piece_at(cursor);
        ASSERT(piece > 0);
        if (piece > bytes)
            piece = (size_t)bytes;
        memcpy(next, cursor->at, piece);
        advance(cursor, piece);
        next += piece;
        bytes -= piece;
    }
}

// One line for every way in which bytes are no message.
static enum status malformed(struct error *err, const char *name, uint64_t offset, const char *what)
{
    if (name)
        return error_field(err, STATUS_INVALID_ARGUMENT, name, "%s, at byte %llu of the message",
                           what, (unsigned long long)offset);
    return error_set(err, STATUS_INVALID_ARGUMENT, "%s, at byte %llu of the message", what,
                     (unsigned long long)offset);
}

static enum status read_varint(struct wire_cursor *cursor, uint64_t end, int bytes_max,
                               const char *name, uint64_t *value, struct error *err)
{
    uint64_t begin = cursor->offset;
    *value = 0;
    for (int i = 0; i < bytes_max; i++) {
        if (cursor->offset == end)
            return malformed(err, name, begin, "truncated varint");
        uint8_t byte = take_byte(cursor);
        if (i == VARINT_BYTES_MAX - 1 && byte > 1)
            break; // more than 64 bits
        *value |= (uint64_t)(byte & 0x7f) << (7 * i);
        if (byte < 0x80)
            return STATUS_OK;
    }
    return malformed(err, name, begin, "varint too long");
}

static enum status read_fixed(struct wire_cursor *cursor, uint64_t end, int bytes, const char *name,
                              uint64_t *value, struct error *err)
{
    if (end - cursor->offset < (uint64_t)bytes)
        return malformed(err, name, cursor->offset, "truncated fixed-size value");
    *value = 0;
    for (int i = 0; i < bytes; i++)
        *value |= (uint64_t)take_byte(cursor) << (8 * i);
    return STATUS_OK;
}

enum status wire_read_tag(struct wire_cursor *cursor, uint64_t end, struct wire_field *field,
                          struct error *err)
{
    *field = (struct wire_field){.offset = cursor->offset};
    uint64_t tag = 0;
    enum status status = read_varint(cursor, end, TAG_VARINT_BYTES_MAX, NULL, &tag, err);
    if (status)
        return status;
    if (tag >> 3 == 0 || tag >> 3 > FIELD_NUMBER_MAX)
        return malformed(err, NULL, field->offset, "field number out of range");
    field->number = (uint32_t)(tag >> 3);
    switch (tag & 7) {
    case WIRE_VARINT:
    case WIRE_FIXED64:
    case WIRE_BYTES:
    case WIRE_FIXED32:
        field->type = (enum wire_type)(tag & 7);
        return STATUS_OK;
    case WIRE_GROUP_BEGIN:
    case WIRE_GROUP_END:
        return malformed(err, NULL, field->offset, "group (wire type 3 or 4), not supported");
    default:
        return malformed(err, NULL, field->offset, "wire type that does not exist");
    }
}

enum status wire_read_value(struct wire_cursor *cursor, uint64_t end, const char *name,
                            struct wire_field *field, struct error *err)
{
    switch (field->type) {
    case WIRE_VARINT:
        return read_varint(cursor, end, VARINT_BYTES_MAX, name, &field->value, err);
    case WIRE_FIXED64:
        return read_fixed(cursor, end, 8, name, &field->value, err);
    case WIRE_FIXED32:
        return read_fixed(cursor, end, 4, name, &field->value, err);
    case WIRE_BYTES:
        break;
    }
    uint64_t bytes = 0;
    enum status status = read_varint(cursor, end, TAG_VARINT_BYTES_MAX, name, &bytes, err);
    if (status)
        return status;
    if (bytes > end - cursor->offset)
        return malformed(err, name, field->offset, "length that runs past the end");
    field->range = (struct wire_range){.offset = cursor->offset, .bytes = bytes};
    return STATUS_OK;
}

// The bytes of the UTF-8 character at `text`, 0 if there is none: cut off, overlong, a surrogate,
// past U+10FFFF, or NUL.
static size_t character_bytes(const uint8_t *text, size_t left)
{
    uint8_t lead = text[0];
    if (lead < 0x80)
        return lead != 0;
    size_t bytes = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc2 || lead > 0xf4 || left < bytes)
        return 0;
    // The second byte's range is narrower after some leads; this is where the odd cases go.
    uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (text[1] < low || text[1] > high)
        return 0;
    for (size_t i = 2; i < bytes; i++) {
        if ((text[i] & 0xc0) != 0x80)
            return 0;
    }
    return bytes;
}

size_t wire_text_prefix(const void *text, size_t bytes)
{
    const uint8_t *begin = text;
    size_t at = 0;
    while (at < bytes) {
        size_t step = character_bytes(begin + at, bytes - at);
        if (step == 0)
            break;
        at += step;
    }
    return at;
}

// What the reader knows of a message: by field number, where a value goes. A nameless entry is a
// number that is not in use.
enum field_kind {
    FIELD_UINT64,
    FIELD_UINT32, // and enums: int32 travels as its 64-bit two's complement, cut here
    FIELD_BOOL,
    FIELD_TEXT,
    FIELD_RANGE,
    FIELD_REGION, // the 16 bytes of its name
    FIELD_SHARED, // a SharedTensors
    FIELD_SUM,    // a Crc32c
};

struct field_rule {
    const char *name;
    enum field_kind kind;
    size_t to;        // offset in struct wire_request
    size_t bytes_max; // of FIELD_TEXT, without its terminator
};

#define FIELD(kind, member)                                                                        \
    {                                                                                              \
#member, kind, offsetof(struct wire_request, member), 0                                    \
    }
#define SUM(name, member)                                                                          \
    {                                                                                              \
        name, FIELD_SUM, offsetof(struct wire_request, member), 0                                  \
    }
#define TEXT(member, bytes_max)                                                                    \
    {                                                                                              \
#member, FIELD_TEXT, offsetof(struct wire_request, member), bytes_max                      \
    }

static const struct field_rule einsum_rules[] = {
    [1] = FIELD(FIELD_UINT64, request_id),
    [2] = TEXT(weight, WIRE_WEIGHT_BYTES_MAX),
    [3] = TEXT(equation, WIRE_EQUATION_BYTES_MAX),
    [4] = FIELD(FIELD_UINT32, recipe),
    [5] = FIELD(FIELD_UINT32, activation_layout),
    [6] = FIELD(FIELD_UINT32, scale_layout),
    [7] = FIELD(FIELD_UINT32, scale_type),
    [8] = FIELD(FIELD_UINT32, output_type),
    [9] = FIELD(FIELD_UINT32, tokens),
    [10] = FIELD(FIELD_UINT32, group_begin),
    [11] = FIELD(FIELD_UINT32, group_end),
    [12] = FIELD(FIELD_BOOL, digest_only),
    [13] = FIELD(FIELD_RANGE, activations),
    [14] = FIELD(FIELD_RANGE, activation_scales),
    [15] = TEXT(kernel, WIRE_KERNEL_BYTES_MAX),
    [16] = FIELD(FIELD_SHARED, shared),
    [17] = FIELD(FIELD_UINT32, priority),
    [18] = SUM("activations_crc32c", first_sum),
    [19] = SUM("activation_scales_crc32c", second_sum),
    [20] = FIELD(FIELD_BOOL, output_sum),
};

static const struct field_rule output_project_rules[] = {
    [1] = FIELD(FIELD_UINT64, request_id),     [2] = TEXT(weight, WIRE_WEIGHT_BYTES_MAX),
    [3] = FIELD(FIELD_UINT32, output_type),    [4] = FIELD(FIELD_UINT32, tokens),
    [5] = FIELD(FIELD_UINT32, group_begin),    [6] = FIELD(FIELD_UINT32, group_end),
    [7] = FIELD(FIELD_BOOL, digest_only),      [8] = FIELD(FIELD_RANGE, attention),
    [9] = FIELD(FIELD_RANGE, positions),       [10] = TEXT(kernel, WIRE_KERNEL_BYTES_MAX),
    [11] = FIELD(FIELD_SHARED, shared),        [12] = FIELD(FIELD_UINT32, priority),
    [13] = SUM("attention_crc32c", first_sum), [14] = SUM("positions_crc32c", second_sum),
    [15] = FIELD(FIELD_BOOL, output_sum),
};

#define SHARED(name, kind, member)                                                                 \
    {                                                                                              \
        "shared." name, kind, offsetof(struct wire_request, shared.member), 0                      \
    }

static const struct field_rule shared_rules[] = {
    [1] = SHARED("region", FIELD_REGION, region),
    [2] = SHARED("activations_offset", FIELD_UINT64, activations.offset),
    [3] = SHARED("activations_bytes", FIELD_UINT64, activations.bytes),
    [4] = SHARED("scales_offset", FIELD_UINT64, scales.offset),
    [5] = SHARED("scales_bytes", FIELD_UINT64, scales.bytes),
    [6] = SHARED("output_offset", FIELD_UINT64, output.offset),
    [7] = SHARED("output_bytes", FIELD_UINT64, output.bytes),
};

static const struct {
    const struct field_rule *rules; // by field number
    size_t rules_n;
    const char *name; // in an EinsumStreamRequest
} messages[] = {
    [WIRE_EINSUM] = {einsum_rules, ARRAY_LEN(einsum_rules), "request"},
    [WIRE_OUTPUT_PROJECT] = {output_project_rules, ARRAY_LEN(output_project_rules),
                             "output_project"},
};

static const struct field_rule *find_rule(const struct field_rule *rules, size_t rules_n,
                                          uint32_t number)
{
    return number < rules_n && rules[number].name ? &rules[number] : NULL;
}

enum status wire_expect_type(const struct wire_field *field, const char *name,
                             enum wire_type expected, struct error *err)
{
    if (field->type == expected)
        return STATUS_OK;
    return error_field(err, STATUS_INVALID_ARGUMENT, name,
                       "wire type %d, expected %d, at byte %llu of the message", (int)field->type,
                       (int)expected, (unsigned long long)field->offset);
}

enum status wire_take_text(struct wire_cursor *cursor, const struct wire_field *field,
                           const char *name, size_t bytes_max, char *to, struct error *err)
{
    size_t bytes = (size_t)field->range.bytes;
    if (bytes > bytes_max)
        return error_field(err, STATUS_INVALID_ARGUMENT, name, "%zu bytes, at most %zu", bytes,
                           bytes_max);
    wire_take(cursor, bytes, to);
    to[bytes] = '\0';
    size_t valid = wire_text_prefix(to, bytes);
    if (valid < bytes)
        return malformed(err, name, field->range.offset + valid,
                         to[valid] ? "not UTF-8" : "NUL in text");
    return STATUS_OK;
}

static enum status take_region(struct wire_cursor *cursor, const struct wire_field *field,
                               const struct field_rule *rule, struct wire_request *request,
                               struct error *err)
{
    if (field->range.bytes != WIRE_REGION_BYTES)
        return error_field(err, STATUS_INVALID_ARGUMENT, rule->name, "%llu bytes, expected %d",
                           (unsigned long long)field->range.bytes, WIRE_REGION_BYTES);
    wire_take(cursor, WIRE_REGION_BYTES, request->shared.region);
    request->shared.region_bytes = WIRE_REGION_BYTES;
    return STATUS_OK;
}

static enum status read_shared(struct wire_cursor *cursor, const struct wire_field *field,
                               struct wire_request *request, struct error *err);

// A Crc32c's one field is fixed32 value = 1; unset, it is 0, which is a sum as well.
static enum status read_sum(struct wire_cursor *cursor, const struct wire_field *message,
                            const struct field_rule *rule, struct wire_sum *sum, struct error *err)
{
    enum { VALUE = 1 };
    uint64_t end = message->range.offset + message->range.bytes;
    *sum = (struct wire_sum){.given = true};
    while (cursor->offset < end) {
        struct wire_field field;
        enum status status = wire_read_tag(cursor, end, &field, err);
        if (!status && field.number != VALUE)
            status = wire_skip_field(cursor, end, &field, err);
        else if (!status)
            status = wire_expect_type(&field, rule->name, WIRE_FIXED32, err);
        if (!status && field.number == VALUE) {
            status = wire_read_value(cursor, end, rule->name, &field, err);
            sum->crc32c = (uint32_t)field.value;
        }
        if (status)
            return status;
    }
    return STATUS_OK;
}

static enum status take_field(struct wire_cursor *cursor, uint64_t end,
                              const struct field_rule *rule, struct wire_field *field,
                              struct wire_request *request, struct error *err)
{
    bool in_bytes = rule->kind >= FIELD_TEXT;
    enum status status =
        wire_expect_type(field, rule->name, in_bytes ? WIRE_BYTES : WIRE_VARINT, err);
    if (status)
        return status;
    status = wire_read_value(cursor, end, rule->name, field, err);
    if (status)
        return status;

    char *to = (char *)request + rule->to;
    uint32_t value32 = (uint32_t)field->value;
    bool truth = field->value != 0;
    switch (rule->kind) {
    case FIELD_UINT64:
        memcpy(to, &field->value, sizeof field->value);
        break;
    case FIELD_UINT32:
        memcpy(to, &value32, sizeof value32);
        break;
    case FIELD_BOOL:
        memcpy(to, &truth, sizeof truth);
        break;
    case FIELD_TEXT:
        return wire_take_text(cursor, field, rule->name, rule->bytes_max, to, err);
    case FIELD_RANGE:
        memcpy(to, &field->range, sizeof field->range);
        wire_skip(cursor, field->range.bytes);
        break;
    case FIELD_REGION:
        return take_region(cursor, field, rule, request, err);
    case FIELD_SHARED:
        return read_shared(cursor, field, request, err);
    case FIELD_SUM:
        return read_sum(cursor, field, rule, (struct wire_sum *)(void *)to, err);
    }
    return STATUS_OK;
}

enum status wire_skip_field(struct wire_cursor *cursor, uint64_t end, struct wire_field *field,
                            struct error *err)
{
    enum status status = wire_read_value(cursor, end, NULL, field, err);
    if (!status)
        wire_skip(cursor, field->range.bytes);
    return status;
}

// Reads on into what `request` holds already: a submessage sent in pieces is merged this way.
static enum status read_fields(struct wire_cursor *cursor, uint64_t end,
                               const struct field_rule *rules, size_t rules_n,
                               struct wire_request *request, struct error *err)
{
    while (cursor->offset < end) {
        struct wire_field field;
        enum status status = wire_read_tag(cursor, end, &field, err);
        if (status)
            return status;
        const struct field_rule *rule = find_rule(rules, rules_n, field.number);
        status = rule ? take_field(cursor, end, rule, &field, request, err)
                      : wire_skip_field(cursor, end, &field, err);
        if (status)
            return status;
    }
    return STATUS_OK;
}

static enum status read_request(struct wire_cursor *cursor, uint64_t end,
                                struct wire_request *request, struct error *err)
{
    return read_fields(cursor, end, messages[request->kind].rules, messages[request->kind].rules_n,
                       request, err);
}

static enum status read_shared(struct wire_cursor *cursor, const struct wire_field *field,
                               struct wire_request *request, struct error *err)
{
    request->shared.given = true;
    return read_fields(cursor, field->range.offset + field->range.bytes, shared_rules,
                       ARRAY_LEN(shared_rules), request, err);
}

// Text is not cleared whole, which would be most of the work: its terminator is enough.
static void clear_request(struct wire_request *request, enum wire_kind kind)
{
    request->kind = kind;
    request->request_id = 0;
    request->weight[0] = request->equation[0] = request->kernel[0] = '\0';
    memset(&request->recipe, 0, sizeof *request - offsetof(struct wire_request, recipe));
}

enum status wire_read_request(const grpc_slice *slices, size_t slices_n, enum wire_kind kind,
                              struct wire_request *request, struct error *err)
{
    clear_request(request, kind);
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, slices, slices_n);
    return read_request(&cursor, wire_bytes(slices, slices_n), request, err);
}

// Reads one alternative of the stream's oneof; `field` is its tag.
static enum status read_alternative(struct wire_cursor *cursor, uint64_t end, enum wire_kind kind,
                                    struct wire_field *field, struct wire_request *request,
                                    struct error *err)
{
    enum status status = wire_expect_type(field, messages[kind].name, WIRE_BYTES, err);
    if (status == STATUS_OK)
        status = wire_read_value(cursor, end, messages[kind].name, field, err);
    if (status != STATUS_OK)
        return status;
    if (kind != request->kind) // the one before does not count
        clear_request(request, kind);
    return read_request(cursor, field->range.offset + field->range.bytes, request, err);
}

enum status wire_read_stream_request(const grpc_slice *slices, size_t slices_n,
                                     struct wire_request *request, struct error *err)
{
    enum { REQUEST = 1, OUTPUT_PROJECT = 2 };
    clear_request(request, WIRE_EINSUM);
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, slices, slices_n);
    uint64_t end = wire_bytes(slices, slices_n);
    while (cursor.offset < end) {
        struct wire_field field;
        enum status status = wire_read_tag(&cursor, end, &field, err);
        if (status)
            return status;
        if (field.number == REQUEST)
            status = read_alternative(&cursor, end, WIRE_EINSUM, &field, request, err);
        else if (field.number == OUTPUT_PROJECT)
            status = read_alternative(&cursor, end, WIRE_OUTPUT_PROJECT, &field, request, err);
        else
            status = wire_skip_field(&cursor, end, &field, err);
        if (status)
            return status;
    }
    return STATUS_OK;
}

void wire_copy(const grpc_slice *slices, size_t slices_n, struct wire_range range, void *to)
{
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, slices, slices_n);
    wire_skip(&cursor, range.offset);
    wire_take(&cursor, range.bytes, to);
}

uint32_t wire_crc32c(const grpc_slice *slices, size_t slices_n, struct wire_range range)
{
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, slices, slices_n);
    wire_skip(&cursor, range.offset);
    uint32_t crc = 0;
    while (range.bytes > 0) {
        size_t piece = piece_at(&cursor);
        ASSERT(piece > 0);
        if (piece > range.bytes)
            piece = (size_t)range.bytes;
        crc = crc32c_extend(crc, cursor.at, piece);
        advance(&cursor, piece);
        range.bytes -= piece;
    }
    return crc;
}

uint8_t *wire_put_varint(uint8_t *at, uint64_t value)
{
    while (value >= 0x80) {
        *at++ = (uint8_t)(value | 0x80);
        value >>= 7;
    }
    *at++ = (uint8_t)value;
    return at;
}

uint8_t *wire_put_tag(uint8_t *at, uint32_t number, enum wire_type type)
{
    return wire_put_varint(at, number << 3 | (uint32_t)type);
}

uint8_t *wire_put_scalar(uint8_t *at, uint32_t number, uint64_t value)
{
    if (value == 0)
        return at; // proto3: the default is not sent
    return wire_put_varint(wire_put_tag(at, number, WIRE_VARINT), value);
}

static uint8_t *put_batch(uint8_t *at, uint32_t number, const struct wire_response *response)
{
    uint8_t batch[64];
    uint8_t *end = batch;
    end = wire_put_scalar(end, 1, response->batch_tokens);
    end = wire_put_scalar(end, 2, response->batch_bucket);
    end = wire_put_scalar(end, 3, response->batch_requests);
    end = wire_put_scalar(end, 4, response->queue_ns);
    end = wire_put_scalar(end, 5, response->run_ns);
    end = wire_put_scalar(end, 6, response->parts);
    size_t bytes = (size_t)(end - batch);
    if (bytes == 0)
        return at; // it travelled in no batch
    at = wire_put_varint(wire_put_tag(at, number, WIRE_BYTES), bytes);
    memcpy(at, batch, bytes);
    return at + bytes;
}

static uint8_t *put_sum(uint8_t *at, uint32_t number, const struct wire_sum *sum)
{
    enum { SUM_BYTES = 5 };
    if (!sum->given)
        return at;
    at = wire_put_varint(wire_put_tag(at, number, WIRE_BYTES), SUM_BYTES);
    at = wire_put_tag(at, 1, WIRE_FIXED32);
    for (int i = 0; i < 4; i++)
        *at++ = (uint8_t)(sum->crc32c >> (8 * i));
    return at;
}

size_t wire_write_response_head(const struct wire_response *response, bool streamed,
                                uint8_t head[WIRE_RESPONSE_HEAD_BYTES_MAX])
{
    // The wrapping's length comes first and is known last.
    enum { WRAPPING_BYTES_MAX = 1 + VARINT_BYTES_MAX };
    uint8_t inner[WIRE_RESPONSE_HEAD_BYTES_MAX - WRAPPING_BYTES_MAX];
    uint8_t *end = inner;
    end = wire_put_scalar(end, 1, response->request_id);
    end = wire_put_scalar(end, 3, response->tokens);
    end = wire_put_scalar(end, 4, response->groups);
    end = wire_put_scalar(end, 5, response->output_dim);
    end = wire_put_scalar(end, 6, (uint64_t)(int64_t)response->output_type);
    end = put_batch(end, 8, response);
    end = put_sum(end, 9, &response->output_sum);
    // Protobuf leaves the order of fields to the writer: `output` comes last, so that its bytes
    // can be sent from where they lie.
    if (response->output_bytes > 0)
        end = wire_put_varint(wire_put_tag(end, 2, WIRE_BYTES), response->output_bytes);
    size_t inner_bytes = (size_t)(end - inner);

    uint8_t *at = head;
    if (streamed)
        at = wire_put_varint(wire_put_tag(at, 1, WIRE_BYTES), inner_bytes + response->output_bytes);
    memcpy(at, inner, inner_bytes);
    return (size_t)(at - head) + inner_bytes;
}
