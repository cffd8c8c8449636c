// Control messages, between gRPC's byte buffers and protobuf-c's structures; and errors, between
// struct error and the trailer that describes them.
//
// Owns nothing that outlives a call; any thread. What arrives is hostile, and protobuf-c alone
// would be too kind to it: it takes what memory the sender likes, and drops the bytes behind a NUL
// in text without a word. So a message is
//
//     measured  ->  flattened  ->  checked against its descriptor  ->  unpacked into an arena
//
// and an arena has a cap. The unpacked message is the arena's first allocation: freeing one means
// freeing the other.
#include "message.h"

#include <grpc/byte_buffer_reader.h>
#include <stdlib.h>
#include <string.h>

#include "google/rpc/error_details.pb-c.h"
#include "google/rpc/status.pb-c.h"
#include "wire.h"

enum {
    DEPTH_MAX = 16, // of messages within messages; ours have 3 at most
    CHUNK_BYTES_MIN = 4096,
    ALIGNMENT_BYTES = 16,
};

// A chunk is one malloc: its head, then the memory that it gives out.
struct chunk {
    struct chunk *older;
    size_t bytes, used; // of what follows
    _Alignas(ALIGNMENT_BYTES) uint8_t memory[];
};

// Lies at the start of its own first chunk, just before the message.
struct arena {
    struct chunk *newest;
    size_t left;    // until MESSAGE_ARENA_BYTES
    bool exhausted; // something was asked for in vain
    ProtobufCAllocator allocator;
    _Alignas(ALIGNMENT_BYTES) uint8_t message[];
};

static struct chunk *chunk_create(struct chunk *older, size_t bytes)
{
    struct chunk *chunk = malloc(sizeof *chunk + bytes);
    if (chunk)
        *chunk = (struct chunk){.older = older, .bytes = bytes};
    return chunk;
}

static void *arena_take(struct arena *arena, size_t bytes)
{
    if (bytes > arena->left)
        return NULL;
    bytes = align_up(bytes, ALIGNMENT_BYTES);
    if (bytes > arena->left)
        return NULL;
    struct chunk *chunk = arena->newest;
    if (chunk->bytes - chunk->used < bytes) {
        size_t room = chunk->bytes * 2; // doubling: a handful of chunks at most
        if (room > arena->left)
            room = arena->left;
        chunk = chunk_create(chunk, room > bytes ? room : bytes);
        if (!chunk)
            return NULL;
        arena->newest = chunk;
    }
    void *memory = chunk->memory + chunk->used;
    chunk->used += bytes;
    arena->left -= bytes;
    return memory;
}

// protobuf-c's alloc; NULL makes it give up and clean up.
static void *arena_alloc(void *context, size_t bytes)
{
    struct arena *arena = context;
    void *memory = arena_take(arena, bytes);
    arena->exhausted |= !memory;
    return memory;
}

static void arena_free(void *context, void *memory)
{
    (void)context;
    (void)memory; // all at once, in arena_destroy
}

static struct arena *arena_create(void)
{
    struct chunk *chunk = chunk_create(NULL, CHUNK_BYTES_MIN);
    if (!chunk)
        return NULL;
    struct arena *arena = (struct arena *)(void *)chunk->memory;
    chunk->used = sizeof *arena;
    *arena = (struct arena){
        .newest = chunk,
        .left = MESSAGE_ARENA_BYTES,
        .allocator = {.alloc = arena_alloc, .free = arena_free, .allocator_data = arena},
    };
    return arena;
}

static void arena_destroy(struct arena *arena)
{
    // The oldest chunk, which holds the arena itself, is the last to go.
    for (struct chunk *chunk = arena->newest; chunk;) {
        struct chunk *older = chunk->older;
        free(chunk);
        chunk = older;
    }
}

// A stretch of the message that is a message of its own.
struct part {
    const ProtobufCMessageDescriptor *descriptor;
    const struct part *parent; // NULL for the whole
    const char *name;          // of the parent's field that holds it
    uint64_t end;
    int depth;
};

// "results.weight": the path from the whole message to a field of `part`.
static void field_path(const struct part *part, const char *name, char path[ERROR_FIELD_BYTES])
{
    const char *names[DEPTH_MAX + 1] = {name};
    size_t names_n = 1;
    for (; part->parent; part = part->parent)
        names[names_n++] = part->name;
    size_t used = 0;
    while (names_n > 0 && used < ERROR_FIELD_BYTES - 1) {
        const char *step = names[--names_n];
        size_t bytes = strnlen(step, ERROR_FIELD_BYTES - 1 - used);
        memcpy(path + used, step, bytes);
        used += bytes;
        if (names_n > 0 && used < ERROR_FIELD_BYTES - 1)
            path[used++] = '.';
    }
    path[used] = '\0';
}

static enum status check_part(struct wire_cursor *cursor, const uint8_t *flat,
                              const struct part *part, struct error *err);

static enum status check_text(const uint8_t *flat, struct wire_range range, const char *path,
                              struct error *err)
{
    const uint8_t *text = flat + range.offset;
    size_t valid = wire_text_prefix(text, (size_t)range.bytes);
    if (valid == range.bytes)
        return STATUS_OK;
    unsigned long long at = range.offset + valid;
    return error_field(err, STATUS_INVALID_ARGUMENT, path, "%s, at byte %llu of the message",
                       text[valid] ? "not UTF-8" : "NUL in text", at);
}

// Leaves the cursor behind the field.
static enum status check_field(struct wire_cursor *cursor, const uint8_t *flat,
                               const struct part *part, struct wire_field *field, struct error *err)
{
    const ProtobufCFieldDescriptor *known =
        protobuf_c_message_descriptor_get_field(part->descriptor, field->number);
    char path[ERROR_FIELD_BYTES] = "";
    if (known)
        field_path(part, known->name, path);
    enum status status = wire_read_value(cursor, part->end, known ? path : NULL, field, err);
    if (status)
        return status;
    if (!known || field->type != WIRE_BYTES) {
        wire_skip(cursor, field->range.bytes);
        return STATUS_OK;
    }
    if (known->type == PROTOBUF_C_TYPE_MESSAGE) {
        struct part inner = {known->descriptor, part, known->name,
                             field->range.offset + field->range.bytes, part->depth + 1};
        return check_part(cursor, flat, &inner, err);
    }
    if (known->type == PROTOBUF_C_TYPE_STRING)
        status = check_text(flat, field->range, path, err);
    wire_skip(cursor, field->range.bytes);
    return status;
}

// What protobuf-c does not check, or not with an error that tells a caller where: framing and text.
// Wire types and packed numbers are left to it.
static enum status check_part(struct wire_cursor *cursor, const uint8_t *flat,
                              const struct part *part, struct error *err)
{
    if (part->depth > DEPTH_MAX)
        return error_set(err, STATUS_INVALID_ARGUMENT, "messages nested more than %d deep",
                         (int)DEPTH_MAX);
    while (cursor->offset < part->end) {
        struct wire_field field;
        enum status status = wire_read_tag(cursor, part->end, &field, err);
        if (!status)
            status = check_field(cursor, flat, part, &field, err);
        if (status)
            return status;
    }
    return STATUS_OK;
}

static enum status unpack_flat(const ProtobufCMessageDescriptor *descriptor, const uint8_t *flat,
                               size_t bytes, ProtobufCMessage **message, struct error *err)
{
    struct arena *arena = arena_create();
    if (!arena)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    *message = protobuf_c_message_unpack(descriptor, &arena->allocator, bytes, flat);
    if (!*message) {
        bool exhausted = arena->exhausted;
        arena_destroy(arena);
        if (exhausted)
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "%s takes more than %d bytes when unpacked", descriptor->name,
                             (int)MESSAGE_ARENA_BYTES);
        return error_set(err, STATUS_INVALID_ARGUMENT, "undecodable as %s", descriptor->name);
    }
    ASSERT((uint8_t *)*message == arena->message);
    return STATUS_OK;
}

enum status message_unpack(const ProtobufCMessageDescriptor *descriptor, grpc_byte_buffer *buffer,
                           ProtobufCMessage **message, struct error *err)
{
    *message = NULL;
    if (!buffer)
        return unpack_flat(descriptor, NULL, 0, message, err);
    size_t bytes = grpc_byte_buffer_length(buffer);
    if (bytes > MESSAGE_BYTES_MAX)
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s of %zu bytes, at most %d",
                         descriptor->name, bytes, (int)MESSAGE_BYTES_MAX);
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, buffer))
        return error_set(err, STATUS_INVALID_ARGUMENT, "unreadable message");
    grpc_slice slice = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);

    const uint8_t *flat = GRPC_SLICE_START_PTR(slice);
    struct part whole = {.descriptor = descriptor, .end = bytes};
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, &slice, 1);
    enum status status = check_part(&cursor, flat, &whole, err);
    if (!status)
        status = unpack_flat(descriptor, flat, bytes, message, err);
    grpc_slice_unref(slice);
    return status;
}

void message_free(ProtobufCMessage *message)
{
    if (message)
        arena_destroy(CONTAINER_OF((uint8_t *)message, struct arena, message));
}

static grpc_slice pack_slice(const ProtobufCMessage *message)
{
    size_t bytes = protobuf_c_message_get_packed_size(message);
    grpc_slice slice = grpc_slice_malloc(bytes);
    size_t packed = protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    ASSERT(packed == bytes);
    return slice;
}

grpc_byte_buffer *message_pack(const ProtobufCMessage *message)
{
    grpc_slice slice = pack_slice(message);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1); // takes its own reference
    grpc_slice_unref(slice);
    return buffer;
}

// What protobuf calls text; an error's may be cut within a character, where it met its limit.
static void copy_text(char *to, const char *from, size_t bytes_max)
{
    size_t bytes = wire_text_prefix(from, strnlen(from, bytes_max - 1));
    memcpy(to, from, bytes);
    to[bytes] = '\0';
}

enum { DETAIL_BYTES_MAX = ERROR_TEXT_BYTES + ERROR_FIELD_BYTES + 32 };

// `packed` is the detail's memory, DETAIL_BYTES_MAX of it.
static void pack_detail(Google__Protobuf__Any *any, const ProtobufCMessage *detail, char *type_url,
                        uint8_t *packed)
{
    ASSERT(protobuf_c_message_get_packed_size(detail) <= DETAIL_BYTES_MAX);
    google__protobuf__any__init(any);
    any->type_url = type_url;
    any->value.data = packed;
    any->value.len = protobuf_c_message_pack(detail, packed);
}

static void pack_bad_request(Google__Protobuf__Any *any, char *field, char *description,
                             uint8_t *packed)
{
    static char type_url[] = "type.googleapis.com/google.rpc.BadRequest";
    Google__Rpc__BadRequest__FieldViolation violation =
        GOOGLE__RPC__BAD_REQUEST__FIELD_VIOLATION__INIT;
    violation.field = field;
    violation.description = description;
    Google__Rpc__BadRequest__FieldViolation *violations[] = {&violation};
    Google__Rpc__BadRequest bad_request = GOOGLE__RPC__BAD_REQUEST__INIT;
    bad_request.n_field_violations = 1;
    bad_request.field_violations = violations;
    pack_detail(any, &bad_request.base, type_url, packed);
}

// An error's text without the field's name before it, which BadRequest has in a place of its own.
static char *description_of(char *text, const char *field)
{
    size_t bytes = strlen(field);
    bool named = strncmp(text, field, bytes) == 0 && strncmp(text + bytes, ": ", 2) == 0;
    return named ? text + bytes + 2 : text;
}

static void pack_retry_info(Google__Protobuf__Any *any, uint32_t retry_after_ms, uint8_t *packed)
{
    static char type_url[] = "type.googleapis.com/google.rpc.RetryInfo";
    Google__Protobuf__Duration delay = GOOGLE__PROTOBUF__DURATION__INIT;
    delay.seconds = retry_after_ms / 1000;
    delay.nanos = (int32_t)(retry_after_ms % 1000) * 1000000;
    Google__Rpc__RetryInfo retry_info = GOOGLE__RPC__RETRY_INFO__INIT;
    retry_info.retry_delay = &delay;
    pack_detail(any, &retry_info.base, type_url, packed);
}

grpc_slice message_error_details(const struct error *err)
{
    char field[ERROR_FIELD_BYTES], text[ERROR_TEXT_BYTES];
    copy_text(field, err->field, sizeof field);
    copy_text(text, err->text, sizeof text);

    Google__Protobuf__Any details[2];
    Google__Protobuf__Any *details_used[2] = {&details[0], &details[1]};
    uint8_t packed[2][DETAIL_BYTES_MAX];
    size_t details_n = 0;
    if (field[0] != '\0') {
        pack_bad_request(&details[details_n], field, description_of(text, field),
                         packed[details_n]);
        details_n++;
    }
    if (err->retry_after_ms > 0) {
        pack_retry_info(&details[details_n], err->retry_after_ms, packed[details_n]);
        details_n++;
    }
    if (details_n == 0)
        return grpc_empty_slice();

    Google__Rpc__Status status = GOOGLE__RPC__STATUS__INIT;
    status.code = (int32_t)err->status;
    status.message = text;
    status.n_details = details_n;
    status.details = details_used;
    return pack_slice(&status.base);
}
