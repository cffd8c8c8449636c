// grpc.reflection.v1.ServerReflection and its v1alpha twin: what does this server serve?
//
// The answers come from the descriptor set that protoc wrote at build time and the linker placed
// between services_fds_begin and services_fds_end. At start the set is indexed once; from then on
// the index is read-only, so any rpc thread may use it.
//
//     files     each one's name, its bytes as they stand in the set, and what it imports
//     services  full names, in the set's order
//     symbols   every full name that a file declares, sorted -> file
//
// A call answers one request at a time: the next one is read when the reply has left.
#include "service.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "google/protobuf/descriptor.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"
#include "message.h"
#include "wire.h"

extern const uint8_t services_fds_begin[], services_fds_end[];

enum {
    REQUEST_BYTES_MAX = 4096,
    FILES_MAX = 32,
    SERVICES_MAX = 16,
    NAME_BYTES_MAX = 512,
    FDS_FILE = 1, // FileDescriptorSet.file
};

struct file {
    char *name;
    ProtobufCBinaryData bytes; // within the set
    uint32_t needs;            // bit i: file i, imported by it or by what it imports; itself too
};
static_assert(FILES_MAX <= 32, "a file's bit fits `needs`");

struct symbol {
    char *name; // "package.Message.field"
    size_t file;
};

static struct index {
    struct file files[FILES_MAX];
    size_t files_n;
    char *services[SERVICES_MAX];
    size_t services_n;
    struct symbol *symbols;
    size_t symbols_n, symbols_max;
    bool failed; // out of memory on the way
} reflected;

// ---- building the index

static char *keep(struct index *index, const char *text)
{
    char *kept = strdup(text);
    index->failed |= !kept;
    return kept;
}

static void add_symbol(struct index *index, const char *name, size_t file)
{
    if (index->symbols_n == index->symbols_max) {
        size_t symbols_max = index->symbols_max ? index->symbols_max * 2 : 256;
        struct symbol *symbols = reallocarray(index->symbols, symbols_max, sizeof *symbols);
        if (!symbols) {
            index->failed = true;
            return;
        }
        index->symbols = symbols;
        index->symbols_max = symbols_max;
    }
    char *kept = keep(index, name);
    if (kept)
        index->symbols[index->symbols_n++] = (struct symbol){kept, file};
}

// A name that grows to the right as the walk goes inwards, and is cut back on the way out.
struct scope {
    struct index *index;
    size_t file;
    char text[NAME_BYTES_MAX];
    size_t bytes;
};

// Returns the length to give to scope_leave.
static size_t scope_enter(struct scope *scope, const char *name)
{
    size_t outer = scope->bytes;
    size_t bytes = strlen(name);
    ASSERT(outer + 1 + bytes < NAME_BYTES_MAX); // the set is ours
    if (outer > 0 && bytes > 0)
        scope->text[scope->bytes++] = '.';
    memcpy(scope->text + scope->bytes, name, bytes + 1);
    scope->bytes += bytes;
    return outer;
}

static void scope_leave(struct scope *scope, size_t outer)
{
    scope->bytes = outer;
    scope->text[outer] = '\0';
}

static void scope_declare(struct scope *scope, const char *name)
{
    size_t outer = scope_enter(scope, name);
    add_symbol(scope->index, scope->text, scope->file);
    scope_leave(scope, outer);
}

static void index_enum(struct scope *scope, const Google__Protobuf__EnumDescriptorProto *type)
{
    scope_declare(scope, type->name);
    for (size_t i = 0; i < type->n_value; i++)
        scope_declare(scope, type->value[i]->name); // a value is its enum's sibling, as in C
}

static void index_message(struct scope *scope, const Google__Protobuf__DescriptorProto *type)
{
    scope_declare(scope, type->name);
    size_t outer = scope_enter(scope, type->name);
    for (size_t i = 0; i < type->n_field; i++)
        scope_declare(scope, type->field[i]->name);
    for (size_t i = 0; i < type->n_oneof_decl; i++)
        scope_declare(scope, type->oneof_decl[i]->name);
    for (size_t i = 0; i < type->n_enum_type; i++)
        index_enum(scope, type->enum_type[i]);
    for (size_t i = 0; i < type->n_nested_type; i++)
        index_message(scope, type->nested_type[i]); // as deep as our own files nest
    scope_leave(scope, outer);
}

static void index_service(struct scope *scope, const Google__Protobuf__ServiceDescriptorProto *type)
{
    struct index *index = scope->index;
    scope_declare(scope, type->name);
    size_t outer = scope_enter(scope, type->name);
    ASSERT(index->services_n < SERVICES_MAX);
    index->services[index->services_n++] = keep(index, scope->text);
    for (size_t i = 0; i < type->n_method; i++)
        scope_declare(scope, type->method[i]->name);
    scope_leave(scope, outer);
}

static const struct file *find_file(const struct index *index, const char *name)
{
    for (size_t i = 0; i < index->files_n; i++) {
        if (strcmp(index->files[i].name, name) == 0)
            return &index->files[i];
    }
    return NULL;
}

static void index_file(struct index *index, ProtobufCBinaryData bytes,
                       const Google__Protobuf__FileDescriptorProto *type)
{
    ASSERT(index->files_n < FILES_MAX);
    size_t number = index->files_n;
    struct file *file = &index->files[number];
    *file = (struct file){keep(index, type->name), bytes, 1u << number};
    if (!file->name)
        return;
    index->files_n++;
    // protoc writes a file after those that it imports, so that theirs are complete already.
    for (size_t i = 0; i < type->n_dependency; i++) {
        const struct file *imported = find_file(index, type->dependency[i]);
        ASSERT(imported || index->failed);
        file->needs |= imported ? imported->needs : 0;
    }

    struct scope scope = {.index = index, .file = number};
    scope_enter(&scope, type->package ? type->package : "");
    for (size_t i = 0; i < type->n_message_type; i++)
        index_message(&scope, type->message_type[i]);
    for (size_t i = 0; i < type->n_enum_type; i++)
        index_enum(&scope, type->enum_type[i]);
    for (size_t i = 0; i < type->n_service; i++)
        index_service(&scope, type->service[i]);
}

// `set` is a FileDescriptorSet.
static enum status index_set(struct index *index, const uint8_t *set, size_t bytes,
                             struct error *err)
{
    grpc_slice slice = grpc_slice_from_static_buffer(set, bytes);
    struct wire_cursor cursor;
    wire_cursor_init(&cursor, &slice, 1);
    while (cursor.offset < bytes) {
        struct wire_field field;
        enum status status = wire_read_tag(&cursor, bytes, &field, err);
        if (!status)
            status = wire_read_value(&cursor, bytes, NULL, &field, err);
        if (status)
            return status;
        wire_skip(&cursor, field.range.bytes);
        if (field.number != FDS_FILE)
            continue;
        // protobuf-c's binary data is never const; nobody writes to this.
        ProtobufCBinaryData data = {(size_t)field.range.bytes,
                                    (uint8_t *)(uintptr_t)(set + field.range.offset)};
        Google__Protobuf__FileDescriptorProto *file =
            google__protobuf__file_descriptor_proto__unpack(NULL, data.len, data.data);
        if (!file)
            return error_set(err, STATUS_INTERNAL, "unreadable file in the descriptor set");
        index_file(index, data, file);
        google__protobuf__file_descriptor_proto__free_unpacked(file, NULL);
    }
    if (index->failed)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    return STATUS_OK;
}

static int compare_symbols(const void *left, const void *right)
{
    const struct symbol *a = left, *b = right;
    return strcmp(a->name, b->name);
}

enum status reflection_init(struct error *err)
{
    ASSERT(reflected.files_n == 0);
    enum status status =
        index_set(&reflected, services_fds_begin,
                  (uintptr_t)services_fds_end - (uintptr_t)services_fds_begin, err);
    if (status)
        reflection_deinit();
    else
        qsort(reflected.symbols, reflected.symbols_n, sizeof *reflected.symbols, compare_symbols);
    return status;
}

void reflection_deinit(void)
{
    for (size_t i = 0; i < reflected.files_n; i++)
        free(reflected.files[i].name);
    for (size_t i = 0; i < reflected.services_n; i++)
        free(reflected.services[i]);
    for (size_t i = 0; i < reflected.symbols_n; i++)
        free(reflected.symbols[i].name);
    free(reflected.symbols);
    reflected = (struct index){.files_n = 0};
}

// ---- answering

// "package.Service/Method", as paths have it, is taken for "package.Service.Method".
static const struct file *find_symbol(const struct index *index, const char *name)
{
    char text[NAME_BYTES_MAX];
    size_t bytes = strlen(name);
    if (bytes >= sizeof text)
        return NULL;
    memcpy(text, name, bytes + 1);
    char *slash = strchr(text, '/');
    if (slash)
        *slash = '.';
    struct symbol wanted = {.name = text};
    const struct symbol *found =
        bsearch(&wanted, index->symbols, index->symbols_n, sizeof *index->symbols, compare_symbols);
    return found ? &index->files[found->file] : NULL;
}

// protobuf-c's names for what a oneof holds, shortened.
#define ASKED(what) GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##what
#define ANSWERED(what) GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_##what

// All that a reply may point to, so that it can be built without allocating.
struct reply {
    Grpc__Reflection__V1__ServerReflectionResponse response;
    Grpc__Reflection__V1__FileDescriptorResponse files;
    ProtobufCBinaryData files_bytes[FILES_MAX];
    Grpc__Reflection__V1__ListServiceResponse services;
    Grpc__Reflection__V1__ServiceResponse services_each[SERVICES_MAX];
    Grpc__Reflection__V1__ServiceResponse *services_used[SERVICES_MAX];
    Grpc__Reflection__V1__ErrorResponse error;
    char error_text[ERROR_TEXT_BYTES];
};

static void reply_error(struct reply *reply, enum status status, const char *text)
{
    grpc__reflection__v1__error_response__init(&reply->error);
    snprintf(reply->error_text, sizeof reply->error_text, "%s", text);
    reply->error.error_code = (int32_t)status;
    reply->error.error_message = reply->error_text;
    reply->response.message_response_case = ANSWERED(ERROR_RESPONSE);
    reply->response.error_response = &reply->error;
}

// The file itself first, then what it needs.
static void reply_file(struct reply *reply, const struct index *index, const struct file *file,
                       const char *text_if_none)
{
    if (!file) {
        reply_error(reply, STATUS_NOT_FOUND, text_if_none);
        return;
    }
    size_t n = 0;
    reply->files_bytes[n++] = file->bytes;
    for (size_t i = 0; i < index->files_n; i++) {
        if ((file->needs >> i & 1) && &index->files[i] != file)
            reply->files_bytes[n++] = index->files[i].bytes;
    }
    grpc__reflection__v1__file_descriptor_response__init(&reply->files);
    reply->files.n_file_descriptor_proto = n;
    reply->files.file_descriptor_proto = reply->files_bytes;
    reply->response.message_response_case = ANSWERED(FILE_DESCRIPTOR_RESPONSE);
    reply->response.file_descriptor_response = &reply->files;
}

static void reply_services(struct reply *reply, const struct index *index)
{
    for (size_t i = 0; i < index->services_n; i++) {
        grpc__reflection__v1__service_response__init(&reply->services_each[i]);
        reply->services_each[i].name = index->services[i];
        reply->services_used[i] = &reply->services_each[i];
    }
    grpc__reflection__v1__list_service_response__init(&reply->services);
    reply->services.n_service = index->services_n;
    reply->services.service = reply->services_used;
    reply->response.message_response_case = ANSWERED(LIST_SERVICES_RESPONSE);
    reply->response.list_services_response = &reply->services;
}

// The reply borrows from `request` and `index`.
static void answer(const struct index *index,
                   Grpc__Reflection__V1__ServerReflectionRequest *request, struct reply *reply)
{
    grpc__reflection__v1__server_reflection_response__init(&reply->response);
    reply->response.valid_host = request->host;
    reply->response.original_request = request;
    switch (request->message_request_case) {
    case ASKED(FILE_BY_FILENAME):
        reply_file(reply, index, find_file(index, request->file_by_filename), "no such file");
        return;
    case ASKED(FILE_CONTAINING_SYMBOL):
        reply_file(reply, index, find_symbol(index, request->file_containing_symbol),
                   "no such symbol");
        return;
    case ASKED(FILE_CONTAINING_EXTENSION):
    case ASKED(ALL_EXTENSION_NUMBERS_OF_TYPE):
        reply_error(reply, STATUS_NOT_FOUND, "no message here has extensions");
        return;
    case ASKED(LIST_SERVICES):
        reply_services(reply, index);
        return;
    case ASKED(_NOT_SET):
    case _GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST__CASE_IS_INT_SIZE:
        break;
    }
    reply_error(reply, STATUS_INVALID_ARGUMENT, "message_request: not set, or of a kind not known");
}

// NULL: `err` says why.
static ProtobufCMessage *unpack_request(grpc_byte_buffer *message, struct error *err)
{
    ProtobufCMessage *unpacked = NULL;
    size_t bytes = grpc_byte_buffer_length(message);
    if (bytes > REQUEST_BYTES_MAX)
        error_set(err, STATUS_INVALID_ARGUMENT, "request of %zu bytes, at most %d", bytes,
                  (int)REQUEST_BYTES_MAX);
    else if (message_unpack(&grpc__reflection__v1__server_reflection_request__descriptor, message,
                            &unpacked, err) == STATUS_OK)
        return unpacked;
    return NULL;
}

static void on_message(struct call *call, grpc_byte_buffer *message)
{
    if (!message) { // half-closed, and every reply has left
        call_finish(call, NULL, NULL);
        return;
    }
    struct error err;
    ProtobufCMessage *unpacked = unpack_request(message, &err);
    if (!unpacked) {
        call_finish(call, NULL, &err);
        return;
    }
    struct reply reply;
    answer(&reflected, (Grpc__Reflection__V1__ServerReflectionRequest *)unpacked, &reply);
    call_send(call, message_pack(&reply.response.base)); // false: the call is over, so is our part
    message_free(unpacked);
}

static void on_sent(struct call *call)
{
    call_read(call);
}

const struct method service_reflection_methods[] = {
    {
        .path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        .needs = ACCESS_READ,
        .on_message = on_message,
        .on_sent = on_sent,
        .on_drain = call_finish_draining,
    },
    {
        .path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        .needs = ACCESS_READ,
        .on_message = on_message,
        .on_sent = on_sent,
        .on_drain = call_finish_draining,
    },
    {.path = NULL},
};
