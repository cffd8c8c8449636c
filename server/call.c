// The life of one call. See call.h for the rules and rpc_internal.h for the structure.
//
// Tags pop in any order, so a call counts them: it is over when it is finished or cancelled and
// none is pending.
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"
#include "rpc_internal.h"

struct service_context *call_context(struct call *call)
{
    return call->thread->rpc->options.context;
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

bool call_cancelled(const struct call *call)
{
    return atomic_load_explicit(&call->cancelled, memory_order_acquire);
}

uint64_t call_deadline_ns(const struct call *call)
{
    return call->deadline_ns;
}

uint32_t call_connection(struct call *call)
{
    if (call->connection == 0) {
        char *peer = grpc_call_get_peer(call->grpc);
        bool named = strncmp(peer, "fd:", 3) == 0;
        call->connection = named ? connection_number((int)strtol(peer + 3, NULL, 10)) : UINT32_MAX;
        gpr_free(peer);
    }
    return call->connection;
}

bool call_metadata(const struct call *call, const char *key, const char **value, size_t *bytes)
{
    size_t found_n = 0;
    for (size_t i = 0; i < call->initial_metadata.count; i++) {
        const grpc_metadata *metadata = &call->initial_metadata.metadata[i];
        if (grpc_slice_str_cmp(metadata->key, key) != 0)
            continue;
        found_n++;
        *value = (const char *)GRPC_SLICE_START_PTR(metadata->value);
        *bytes = GRPC_SLICE_LENGTH(metadata->value);
    }
    return found_n == 1;
}

// ---- references and waking

static bool try_hold(struct call *call)
{
    uint32_t references = atomic_load_explicit(&call->references, memory_order_relaxed);
    while (references != 0)
        if (atomic_compare_exchange_weak_explicit(&call->references, &references, references + 1,
                                                  memory_order_acq_rel, memory_order_relaxed))
            return true;
    return false;
}

void call_hold(struct call *call)
{
    ASSERT(try_hold(call));
}

// Takes over one reference, which call_woken drops on the rpc thread.
static void push_woken(struct call *call)
{
    struct rpc_thread *thread = call->thread;
    struct call *head = atomic_load_explicit(&thread->woken, memory_order_relaxed);
    do
        call->wake_next = head;
    while (!atomic_compare_exchange_weak_explicit(&thread->woken, &head, call, memory_order_acq_rel,
                                                  memory_order_relaxed));
    // Whoever made the list non-empty has posted the tag; the thread itself looks before it sleeps.
    if (head || thread == rpc_thread_here)
        return;
    grpc_call_error posted = grpc_call_start_batch(thread->waker, NULL, 0, &thread->wake_tag, NULL);
    ASSERT(posted == GRPC_CALL_OK);
}

void call_wake(struct call *call)
{
    if (!try_hold(call))
        return;
    if (atomic_exchange_explicit(&call->wake_queued, true, memory_order_acq_rel))
        call_unhold(call); // already in the list, which has a reference of its own
    else
        push_woken(call);
}

void call_unhold(struct call *call)
{
    uint32_t references = atomic_load_explicit(&call->references, memory_order_relaxed);
    for (;;) {
        ASSERT(references > 0);
        if (references == 1 &&
            !atomic_exchange_explicit(&call->wake_queued, true, memory_order_acq_rel)) {
            push_woken(call); // the last one travels: ending the call is the rpc thread's work
            return;
        }
        // With the last one, and already in the list: the list has a reference by now, so look
        // again.
        if (references == 1) {
            references = atomic_load_explicit(&call->references, memory_order_acquire);
            continue;
        }
        if (atomic_compare_exchange_weak_explicit(&call->references, &references, references - 1,
                                                  memory_order_acq_rel, memory_order_relaxed))
            return;
    }
}

// How the client sees the end.
static enum status status_of(const struct call *call)
{
    if (!call->closed_cancelled)
        return call->finish_status;
    return call->deadline_ns <= now_ns() ? STATUS_DEADLINE_EXCEEDED : STATUS_CANCELLED;
}

static bool is_clients_fault(enum status status)
{
    return status == STATUS_INVALID_ARGUMENT || status == STATUS_UNIMPLEMENTED ||
           status == STATUS_UNAUTHENTICATED || status == STATUS_PERMISSION_DENIED;
}

// On the rpc thread.
static void drop_reference(struct call *call)
{
    if (atomic_fetch_sub_explicit(&call->references, 1, memory_order_acq_rel) != 1)
        return;
    ASSERT(call->over);
    if (call->method && call->method->on_end)
        call->method->on_end(call);
    grpc_slice_unref(call->status_text);
    call->status_text = grpc_empty_slice();
    for (size_t i = 0; i < call->trailers_n; i++)
        grpc_slice_unref(call->trailers[i].value);
    call->trailers_n = 0;
    metrics_count_call(call->thread->rpc->options.metrics, call->metrics_call, status_of(call));
    if (call->closed_cancelled || is_clients_fault(call->finish_status))
        connections_fault(call->thread->rpc->connections, call->connection);
    rpc_call_ended(call);
}

void call_woken(struct call *call)
{
    atomic_store_explicit(&call->wake_queued, false, memory_order_release);
    // A call that is over but held by somebody is woken too: the method collects what came back too
    // late.
    bool of_use = !call->over || atomic_load_explicit(&call->references, memory_order_acquire) > 1;
    if (of_use && call->method && call->method->on_wake)
        call->method->on_wake(call);
    drop_reference(call);
}

// ---- batches

static struct tag *tag_start(struct call *call, enum tag_kind kind)
{
    call->tags_pending++;
    return &call->tags[kind];
}

static void start_batch(struct call *call, const grpc_op *ops, size_t ops_n, enum tag_kind kind)
{
    grpc_call_error error =
        grpc_call_start_batch(call->grpc, ops, ops_n, tag_start(call, kind), NULL);
    ASSERT(error == GRPC_CALL_OK);
}

void call_read(struct call *call)
{
    ASSERT(!call->reading);
    if (call->over || call->finish_asked)
        return;
    call->reading = true;
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
    op.data.recv_message.recv_message = &call->received;
    start_batch(call, &op, 1, TAG_RECEIVED);
}

static void add_initial_metadata(struct call *call, grpc_op *ops, size_t *ops_n)
{
    if (call->initial_metadata_sent)
        return;
    call->initial_metadata_sent = true;
    ops[(*ops_n)++] = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
}

static void add_message(grpc_byte_buffer *message, grpc_op *ops, size_t *ops_n)
{
    if (!message)
        return;
    grpc_op op = {.op = GRPC_OP_SEND_MESSAGE};
    op.data.send_message.send_message = message;
    ops[(*ops_n)++] = op;
}

bool call_send(struct call *call, grpc_byte_buffer *message)
{
    if (call->finish_asked || call->over || call_cancelled(call)) {
        grpc_byte_buffer_destroy(message);
        return false;
    }
    ASSERT(!call->sending);
    call->sending = message;
    call->write_started_ns = now_ns();
    grpc_op ops[2];
    size_t ops_n = 0;
    add_initial_metadata(call, ops, &ops_n);
    add_message(message, ops, &ops_n);
    start_batch(call, ops, ops_n, TAG_SENT);
    return true;
}

static void start_finish(struct call *call)
{
    call->finish_started = true;
    call->write_started_ns = now_ns();
    grpc_op ops[3];
    size_t ops_n = 0;
    add_initial_metadata(call, ops, &ops_n);
    add_message(call->last_message, ops, &ops_n);
    grpc_op op = {.op = GRPC_OP_SEND_STATUS_FROM_SERVER};
    op.data.send_status_from_server.status = (grpc_status_code)call->finish_status;
    op.data.send_status_from_server.status_details = &call->status_text;
    op.data.send_status_from_server.trailing_metadata = call->trailers;
    op.data.send_status_from_server.trailing_metadata_count = call->trailers_n;
    ops[ops_n++] = op;
    start_batch(call, ops, ops_n, TAG_FINISHED);
}

static void add_trailer(struct call *call, const char *key, grpc_slice value)
{
    ASSERT(call->trailers_n < ARRAY_LEN(call->trailers));
    call->trailers[call->trailers_n++] =
        (grpc_metadata){.key = grpc_slice_from_static_string(key), .value = value};
}

static void describe_error(struct call *call, const struct error *err)
{
    call->status_text = grpc_slice_from_copied_string(err->text);
    grpc_slice details = message_error_details(err);
    if (GRPC_SLICE_LENGTH(details) > 0)
        add_trailer(call, "grpc-status-details-bin", details);
    if (err->retry_after_ms > 0) {
        char text[16];
        snprintf(text, sizeof text, "%u", err->retry_after_ms);
        add_trailer(call, "grpc-retry-pushback-ms", grpc_slice_from_copied_string(text));
    }
}

void call_add_trailer(struct call *call, const char *key, const char *text)
{
    if (!call->finish_asked && !call->over && !call_cancelled(call))
        add_trailer(call, key, grpc_slice_from_copied_string(text));
}

void call_finish(struct call *call, grpc_byte_buffer *message, const struct error *err)
{
    if (call->finish_asked || call->over || call_cancelled(call)) {
        if (message)
            grpc_byte_buffer_destroy(message);
        return;
    }
    call->finish_asked = true;
    call->last_message = message;
    call->finish_status = err ? err->status : STATUS_OK;
    if (err)
        describe_error(call, err);
    if (!call->sending) // else when it has left
        start_finish(call);
}

void call_finish_draining(struct call *call)
{
    struct error err;
    error_set(&err, STATUS_UNAVAILABLE, "draining");
    call_finish(call, NULL, &err);
}

// ---- events

static uint64_t deadline_from_grpc(gpr_timespec deadline)
{
    deadline = gpr_convert_clock_type(deadline, GPR_CLOCK_MONOTONIC);
    if (gpr_time_cmp(deadline, gpr_inf_future(GPR_CLOCK_MONOTONIC)) == 0)
        return UINT64_MAX;
    gpr_timespec left = gpr_time_sub(deadline, gpr_now(GPR_CLOCK_MONOTONIC));
    if (left.tv_sec < 0)
        return now_ns();
    if (left.tv_sec > INT32_MAX)
        return UINT64_MAX;
    return now_ns() + (uint64_t)left.tv_sec * 1000000000u + (uint64_t)left.tv_nsec;
}

// RECV_CLOSE first: it alone tells of a cancelled call.
static void watch_close(struct call *call)
{
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    op.data.recv_close_on_server.cancelled = &call->closed_cancelled;
    start_batch(call, &op, 1, TAG_CLOSED);
}

// For calls whose method never starts: none of its callbacks will run.
static void refuse(struct call *call, const struct error *err)
{
    call->method = NULL;
    if (call->received)
        grpc_byte_buffer_destroy(call->received);
    call->received = NULL;
    call_finish(call, NULL, err);
}

// Before anything of the message is looked at.
NODISCARD static enum status check_access(struct call *call, struct error *err)
{
    const struct rpc *rpc = call->thread->rpc;
    const struct method *method = call->method;
    struct access_peer *peer = connections_peer(rpc->connections, call_connection(call));
    if (access_given(rpc->options.access, peer, method->needs))
        return STATUS_OK;
    struct access_call asked = {.method = method->path, .needs = method->needs, .peer = peer};
    for (size_t i = 0; i < call->initial_metadata.count; i++) {
        const grpc_metadata *metadata = &call->initial_metadata.metadata[i];
        if (grpc_slice_str_cmp(metadata->key, "authorization") != 0)
            continue;
        asked.authorizations_n++;
        asked.authorization = (const char *)GRPC_SLICE_START_PTR(metadata->value);
        asked.authorization_bytes = GRPC_SLICE_LENGTH(metadata->value);
    }
    return access_check(rpc->options.access, &asked, err);
}

void call_arrived(struct call *call, struct error *full, bool leaves)
{
    call->deadline_ns = deadline_from_grpc(call->deadline);
    watch_close(call);
    const struct method *method = call->method;
    struct error err;
    if (!method) {
        error_set(&err, STATUS_UNIMPLEMENTED, "unknown method");
        refuse(call, &err);
        return;
    }
    if (leaves) {
        error_set(&err, STATUS_UNAVAILABLE, "draining");
        refuse(call, &err);
        return;
    }
    if (check_access(call, &err) != STATUS_OK) {
        refuse(call, &err);
        return;
    }
    if (full) {
        const struct rpc_options *options = &call->thread->rpc->options;
        full->retry_after_ms = options->retry_after_ms(options->context);
        refuse(call, full);
        return;
    }
    if (method->on_start)
        method->on_start(call);
    if (!method->message_with_call) {
        call_read(call);
        return;
    }
    method->on_message(call, call->received);
    if (call->received)
        grpc_byte_buffer_destroy(call->received);
    call->received = NULL;
}

static void on_received(struct call *call)
{
    grpc_byte_buffer *message = call->received;
    call->received = NULL;
    call->reading = false;
    rpc_message_came(call, message);
    if (call->method && call->method->on_message && !call->finish_asked)
        call->method->on_message(call, message);
    if (message)
        grpc_byte_buffer_destroy(message);
}

static void on_sent(struct call *call)
{
    grpc_byte_buffer_destroy(call->sending);
    call->sending = NULL;
    call->write_started_ns = 0;
    if (call->finish_asked && !call->finish_started)
        start_finish(call);
    else if (call->method && call->method->on_sent)
        call->method->on_sent(call);
}

static void on_closed(struct call *call)
{
    if (!call->closed_cancelled)
        return;
    atomic_store_explicit(&call->cancelled, true, memory_order_release);
    if (call->method && call->method->on_cancel && !call->finish_started)
        call->method->on_cancel(call);
}

static void on_finished(struct call *call)
{
    call->finish_popped = true;
    call->write_started_ns = 0;
    if (call->last_message)
        grpc_byte_buffer_destroy(call->last_message);
    call->last_message = NULL;
}

void call_tag_popped(struct call *call, enum tag_kind kind, bool success)
{
    (void)
        success; // a failed receive has no message, a failed send is followed by a cancelled close
    ASSERT(call->tags_pending > 0);
    call->tags_pending--;
    switch (kind) {
    case TAG_RECEIVED:
        on_received(call);
        break;
    case TAG_SENT:
        on_sent(call);
        break;
    case TAG_CLOSED:
        on_closed(call);
        break;
    case TAG_FINISHED:
        on_finished(call);
        break;
    case TAG_ARRIVED:
    case TAG_WAKE:
    case TAG_SHUTDOWN:
        ASSERT(!"a tag of another kind");
    }
    if (call->tags_pending == 0 && (call->finish_popped || call_cancelled(call)) && !call->over) {
        call->over = true;
        // Of a call that was cut off, gRPC keeps the unsent message, and with it memory on loan, as
        // long as it has the call; and whoever lent it holds ours until it comes back.
        grpc_call_unref(call->grpc);
        call->grpc = NULL;
        drop_reference(call);
    }
}
