// A stand-in for call.c: one call without gRPC behind it, so that a service's methods can be tested
// alone. Include it in one file of the program; it takes call.c's place in the link.
//
// The test plays the rpc thread: it delivers messages, says when what was sent has left, and runs
// the wakes. Only call_wake may come from another thread. Misuse aborts: Check's own assertions are
// for the main thread, and tests may run several calls on several.
#pragma once

#include <grpc/byte_buffer_reader.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "server/call.h"
#include "server/service.h"

struct call {
    const struct method *method;
    struct service_context *context;
    void *state;
    _Alignas(16) uint8_t inline_state[CALL_INLINE_STATE_BYTES];
    bool reading;           // a message has been asked for
    grpc_byte_buffer *sent; // by call_send, until fake_call_left
    bool finished, cancelled;
    grpc_byte_buffer *last; // message given to call_finish
    struct error err;       // status OK if it finished well
    _Atomic unsigned wakes; // asked for and not yet run
};

struct service_context *call_context(struct call *call)
{
    return call->context;
}

void *call_state(struct call *call)
{
    return call->state;
}

void call_set_state(struct call *call, void *state)
{
    call->state = state;
}

void *call_inline_state(struct call *call, size_t bytes)
{
    ASSERT(bytes <= sizeof call->inline_state);
    memset(call->inline_state, 0, bytes);
    call->state = call->inline_state;
    return call->state;
}

void call_read(struct call *call)
{
    ASSERT(!call->reading);
    call->reading = true;
}

bool call_send(struct call *call, grpc_byte_buffer *message)
{
    ASSERT(!call->sent); // one at a time
    if (call->finished || call->cancelled) {
        grpc_byte_buffer_destroy(message);
        return false;
    }
    call->sent = message;
    return true;
}

void call_finish(struct call *call, grpc_byte_buffer *message, const struct error *err)
{
    if (call->finished || call->cancelled) {
        if (message)
            grpc_byte_buffer_destroy(message);
        return;
    }
    call->finished = true;
    call->last = message;
    call->err = err ? *err : (struct error){.status = STATUS_OK};
}

void call_finish_draining(struct call *call)
{
    struct error err;
    error_set(&err, STATUS_UNAVAILABLE, "draining");
    call_finish(call, NULL, &err);
}

void call_wake(struct call *call)
{
    atomic_fetch_add(&call->wakes, 1);
}

void call_hold(struct call *call)
{
    (void)call;
}

void call_unhold(struct call *call)
{
    (void)call;
}

bool call_cancelled(const struct call *call)
{
    return call->cancelled;
}

enum status call_request_begin(struct call *call, struct error *err)
{
    (void)call;
    (void)err;
    return STATUS_OK;
}

void call_request_end(struct call *call)
{
    (void)call;
}

uint32_t call_connection(struct call *call)
{
    (void)call;
    return 1;
}

uint64_t call_deadline_ns(const struct call *call)
{
    (void)call;
    return UINT64_MAX;
}

bool call_metadata(const struct call *call, const char *key, const char **value, size_t *bytes)
{
    (void)call, (void)key;
    *value = NULL;
    *bytes = 0;
    return false;
}

void call_add_trailer(struct call *call, const char *key, const char *text)
{
    (void)call, (void)key, (void)text;
}

// ---- the rpc thread's side

static inline const struct method *fake_method(const struct method *methods, const char *path)
{
    while (methods->path && strcmp(methods->path, path) != 0)
        methods++;
    ASSERT(methods->path);
    return methods;
}

static inline struct call *fake_call_start(const struct method *methods, const char *path,
                                           struct service_context *context)
{
    struct call *call = calloc(1, sizeof *call);
    ASSERT(call);
    call->method = fake_method(methods, path);
    call->context = context;
    call->reading = true;
    if (call->method->on_start)
        call->method->on_start(call);
    return call;
}

// `bytes` NULL: the caller has half-closed.
static inline void fake_call_deliver(struct call *call, const void *bytes, size_t n)
{
    ASSERT(call->reading);
    call->reading = false;
    grpc_byte_buffer *message = NULL;
    if (bytes) {
        grpc_slice slice = grpc_slice_from_copied_buffer(bytes, n);
        message = grpc_raw_byte_buffer_create(&slice, 1);
        grpc_slice_unref(slice);
    }
    call->method->on_message(call, message);
    if (message)
        grpc_byte_buffer_destroy(message);
}

// The flat bytes of a message; free them.
static inline uint8_t *fake_flatten(grpc_byte_buffer *message, size_t *bytes)
{
    ASSERT(message);
    grpc_byte_buffer_reader reader;
    ASSERT(grpc_byte_buffer_reader_init(&reader, message));
    grpc_slice slice = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    *bytes = GRPC_SLICE_LENGTH(slice);
    uint8_t *flat = malloc(*bytes + 1);
    ASSERT(flat);
    memcpy(flat, GRPC_SLICE_START_PTR(slice), *bytes);
    grpc_slice_unref(slice);
    return flat;
}

// What was sent has left.
static inline void fake_call_left(struct call *call)
{
    ASSERT(call->sent);
    grpc_byte_buffer_destroy(call->sent);
    call->sent = NULL;
    if (call->method->on_sent && !call->finished)
        call->method->on_sent(call);
}

static inline void fake_call_run_wakes(struct call *call)
{
    if (atomic_exchange(&call->wakes, 0) > 0)
        call->method->on_wake(call);
}

static inline void fake_call_end(struct call *call)
{
    if (call->method->on_end)
        call->method->on_end(call);
    if (call->sent)
        grpc_byte_buffer_destroy(call->sent);
    if (call->last)
        grpc_byte_buffer_destroy(call->last);
    free(call);
}
