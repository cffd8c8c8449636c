// One call with one message each way: attempts, pauses, and the end.
//
//     start --batch--> [ends] --OK or final--> [memory let go] --> on_end --> freed
//        ^               |                          |
//        +-- pause <-----+ advised to try again     +-- polled: gRPC may read the request's memory
//                                                       for a while after a call was cut off
//
// A call belongs to the thread that starts it until its first batch is started, and to the client's
// thread afterwards. Others reach it only by its ticket, under the client's lock.

#include "client_internal.h"

#include <grpc/support/time.h>
#include <stdlib.h>
#include <string.h>

struct einsum_client_call {
    struct einsum_client_tag tag;
    struct einsum_client_later later;
    struct einsum_client *client;
    const char *method;

    // Under the client's lock.
    struct einsum_client_call *previous, *next; // client->calls
    uint64_t ticket;
    grpc_call *call; // the attempt under way
    bool cancelled;

    struct einsum_client_outgoing outgoing;
    uint64_t started_ns, deadline_ns;
    uint32_t attempts, attempts_max;

    // Out parameters of the attempt's batch.
    struct einsum_client_ending ending;
    grpc_metadata_array headers;
    grpc_byte_buffer *reply;

    // How it ended. `error.status` is OK or tells.
    struct einsum_client_error error;
    struct einsum_client_reply decoded;
    struct einsum_client_incoming incoming;

    void (*on_end)(struct einsum_client_call *call);
    struct einsum_client_expected expected; // of a projection
    einsum_client_on_response *on_response;
    void *context;
};

static struct einsum_client_call *call_of_tag(struct einsum_client_tag *tag)
{
    return (struct einsum_client_call *)(void *)tag;
}

static struct einsum_client_call *call_of_later(struct einsum_client_later *later)
{
    return (struct einsum_client_call *)(void *)((char *)later -
                                                 offsetof(struct einsum_client_call, later));
}

// ---- the list of calls --------------------------------------------------------------------------

static bool enlist(struct einsum_client_call *call)
{
    struct einsum_client *client = call->client;
    pthread_mutex_lock(&client->lock);
    bool open = !client->stopping;
    if (open) {
        client->active++;
        call->ticket = client->next_ticket++;
        call->next = client->calls;
        if (call->next)
            call->next->previous = call;
        client->calls = call;
    }
    pthread_mutex_unlock(&client->lock);
    return open;
}

static void delist_locked(struct einsum_client_call *call)
{
    if (call->previous)
        call->previous->next = call->next;
    else
        call->client->calls = call->next;
    if (call->next)
        call->next->previous = call->previous;
}

// Counted out after the callback, so that destroy waits for that too.
static void count_out(struct einsum_client *client)
{
    pthread_mutex_lock(&client->lock);
    if (--client->active == 0)
        pthread_cond_broadcast(&client->idle);
    pthread_mutex_unlock(&client->lock);
}

// Marks one call as cancelled, and cuts off its attempt outside the lock: gRPC runs what follows
// from a cancel on this thread.
static bool cancel_one(struct einsum_client *client, uint64_t ticket)
{
    grpc_call *cut = NULL;
    pthread_mutex_lock(&client->lock);
    struct einsum_client_call *call = client->calls;
    while (call && (ticket == UINT64_MAX ? call->cancelled : call->ticket != ticket))
        call = call->next;
    if (call) {
        call->cancelled = true;
        cut = call->call;
        if (cut)
            grpc_call_ref(cut);
    }
    pthread_mutex_unlock(&client->lock);
    if (cut) {
        grpc_call_cancel(cut, NULL);
        grpc_call_unref(cut);
    }
    return call != NULL;
}

// UINT64_MAX, which no call has, stands for all.
void einsum_client_cancel(struct einsum_client *client, uint64_t ticket)
{
    if (client->shared)
        einsum_client_ring_cancel(client, ticket);
    while (cancel_one(client, ticket) && ticket == UINT64_MAX)
        ;
}

// ---- an attempt ---------------------------------------------------------------------------------

static void on_attempt_end(struct einsum_client_tag *tag, bool ok);

static void try_once(struct einsum_client_call *call)
{
    struct einsum_client *client = call->client;
    grpc_call *attempt =
        einsum_client_open_call(client, call->method, einsum_client_deadline(call->deadline_ns));
    call->attempts++;
    call->tag.on_complete = on_attempt_end;
    call->reply = NULL;
    einsum_client_ending_init(&call->ending);
    grpc_metadata_array_init(&call->headers);

    pthread_mutex_lock(&client->lock);
    call->call = attempt;
    // A cancel from here on finds the attempt; one that came before is seen here.
    if (call->cancelled)
        grpc_call_cancel(attempt, NULL);
    pthread_mutex_unlock(&client->lock);

    grpc_byte_buffer *message = einsum_client_outgoing_buffer(&call->outgoing);
    grpc_op ops[6] = {
        einsum_client_opening_op(client),
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = message},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA,
         .data.recv_initial_metadata.recv_initial_metadata = &call->headers},
        {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call->reply},
        einsum_client_ending_op(&call->ending),
    };
    einsum_client_start_batch(attempt, ops, 6, &call->tag);
    grpc_byte_buffer_destroy(message);
}

static void close_attempt(struct einsum_client_call *call)
{
    pthread_mutex_lock(&call->client->lock);
    grpc_call *attempt = call->call;
    call->call = NULL;
    pthread_mutex_unlock(&call->client->lock);
    grpc_call_unref(attempt);
    einsum_client_ending_deinit(&call->ending);
    grpc_metadata_array_destroy(&call->headers);
}

// ---- the end ------------------------------------------------------------------------------------

static void finish(struct einsum_client_call *call)
{
    struct einsum_client *client = call->client;
    pthread_mutex_lock(&client->lock);
    delist_locked(call);
    pthread_mutex_unlock(&client->lock);
    call->on_end(call);
    einsum_client_incoming_deinit(&call->incoming);
    grpc_byte_buffer_destroy(call->reply);
    free(call);
    count_out(client);
}

static bool poll_borrowed(struct einsum_client_later *later, uint64_t now_ns)
{
    (void)now_ns;
    struct einsum_client_call *call = call_of_later(later);
    if (!einsum_client_outgoing_free(&call->outgoing))
        return false;
    finish(call);
    return true;
}

// The callback gives the request's memory back, so it waits until gRPC has let go of it.
static void finish_when_free(struct einsum_client_call *call)
{
    einsum_client_outgoing_release(&call->outgoing);
    if (einsum_client_outgoing_free(&call->outgoing)) {
        finish(call);
        return;
    }
    call->later = (struct einsum_client_later){.poll = poll_borrowed};
    einsum_client_wait(call->client, &call->later);
}

// ---- trying again -------------------------------------------------------------------------------

uint64_t einsum_client_pause_ns(const struct einsum_client_options *options, uint32_t attempts,
                                int64_t retry_after_ms, uint64_t random)
{
    random >>= 40;            // 24 bits
    if (retry_after_ms > 0) { // not before the server says, and up to a quarter later
        uint64_t advised = (uint64_t)retry_after_ms * 1000000u;
        return advised + (advised >> 26) * random;
    }
    uint64_t pause_ms = options->retry_pause_ms;
    for (uint32_t i = 1; i < attempts && pause_ms < options->retry_pause_ms_max; i++)
        pause_ms *= 2;
    if (pause_ms > options->retry_pause_ms_max)
        pause_ms = options->retry_pause_ms_max;
    uint64_t pause = pause_ms * 1000000u;
    return pause / 2 + (pause >> 25) * random; // from a half of it to all of it
}

bool einsum_client_may_retry(const struct einsum_client_options *options, uint32_t attempts,
                             uint32_t attempts_max, uint64_t started_ns, uint64_t due_ns)
{
    if (options->retry_ms == 0 || attempts_max == 1)
        return attempts < attempts_max;
    return due_ns - started_ns <= options->retry_ms * UINT64_C(1000000);
}

static bool poll_retry(struct einsum_client_later *later, uint64_t now_ns)
{
    struct einsum_client_call *call = call_of_later(later);
    pthread_mutex_lock(&call->client->lock);
    bool cancelled = call->cancelled;
    pthread_mutex_unlock(&call->client->lock);
    if (!cancelled && now_ns < later->due_ns)
        return false;
    if (!cancelled) {
        try_once(call);
        return true;
    }
    einsum_client_error_set(&call->error, EINSUM_CLIENT_CANCELLED,
                            "cancelled between two attempts");
    call->error.attempts = call->attempts;
    finish_when_free(call);
    return true;
}

// True if the call goes on after a pause. A reply over this side's own limit comes as
// RESOURCE_EXHAUSTED as well, and would be as large the next time.
static bool retry_later(struct einsum_client_call *call)
{
    const struct einsum_client_error *error = &call->error;
    bool again = error->status == EINSUM_CLIENT_UNAVAILABLE ||
                 (error->status == EINSUM_CLIENT_RESOURCE_EXHAUSTED && error->from_server);
    if (!again || error->retry_after_ms < 0)
        return false;
    const struct einsum_client_options *options = &call->client->options;
    uint64_t due = einsum_client_now_ns() +
                   einsum_client_pause_ns(options, call->attempts, error->retry_after_ms,
                                          einsum_client_random(call->client));
    if (due >= call->deadline_ns ||
        !einsum_client_may_retry(options, call->attempts, call->attempts_max, call->started_ns,
                                 due))
        return false;
    call->later = (struct einsum_client_later){.due_ns = due, .poll = poll_retry};
    einsum_client_wait(call->client, &call->later);
    return true;
}

static void on_attempt_end(struct einsum_client_tag *tag, bool ok)
{
    (void)ok; // the status tells more
    struct einsum_client_call *call = call_of_tag(tag);
    memset(&call->error, 0, sizeof call->error);
    if (call->ending.code != GRPC_STATUS_OK)
        einsum_client_ending_error(call->client, &call->ending, &call->error);
    else if (!call->reply)
        einsum_client_error_set(&call->error, EINSUM_CLIENT_INTERNAL,
                                "the server said OK and sent no reply");
    call->error.attempts = call->attempts;
    close_attempt(call);
    if (call->error.status == EINSUM_CLIENT_OK) {
        finish_when_free(call);
        return;
    }
    grpc_byte_buffer_destroy(call->reply);
    call->reply = NULL;
    if (!retry_later(call))
        finish_when_free(call);
}

// ---- projections --------------------------------------------------------------------------------

static void decode(struct einsum_client_call *call)
{
    if (!einsum_client_incoming_init(&call->incoming, call->reply))
        einsum_client_error_set(&call->error, EINSUM_CLIENT_RESOURCE_EXHAUSTED,
                                "no memory to read the reply");
    else if (!einsum_client_reply_read(call->incoming.chunks, call->incoming.chunks_n, false,
                                       &call->decoded))
        einsum_client_error_set(&call->error, EINSUM_CLIENT_INTERNAL,
                                "the reply is no EinsumResponse");
    else
        einsum_client_accept(&call->expected, &call->incoming, &call->decoded, &call->error);
    call->error.attempts = call->attempts;
}

static void on_einsum_end(struct einsum_client_call *call)
{
    if (call->error.status == EINSUM_CLIENT_OK)
        decode(call);
    einsum_client_unplace(call->client, &call->expected.place,
                          call->error.status == EINSUM_CLIENT_OK || call->error.from_server);
    struct einsum_client_response *response = &call->decoded.response;
    response->latency_ns = einsum_client_now_ns() - call->started_ns;
    response->attempts = call->attempts;
    if (call->error.status == EINSUM_CLIENT_OK)
        call->on_response(call->context, response, NULL);
    else
        call->on_response(call->context, NULL, &call->error);
}

static struct einsum_client_call *new_call(struct einsum_client *client, const char *method,
                                           struct einsum_client_effort effort)
{
    struct einsum_client_call *call = calloc(1, sizeof *call);
    if (!call)
        return NULL;
    call->client = client;
    call->method = method;
    call->started_ns = einsum_client_now_ns();
    call->deadline_ns = einsum_client_deadline_after(effort.deadline_ms);
    call->attempts_max = effort.attempts_max;
    return call;
}

// Lists the call and starts its first attempt; frees it if the client is being destroyed.
static enum einsum_client_status launch(struct einsum_client_call *call, uint64_t *ticket,
                                        struct einsum_client_error *error)
{
    if (!enlist(call)) {
        einsum_client_outgoing_release(&call->outgoing);
        einsum_client_unplace(call->client, &call->expected.place, true);
        free(call);
        return einsum_client_error_set(error, EINSUM_CLIENT_CANCELLED,
                                       "the client is being destroyed");
    }
    // Before the start: the call may be over, and freed, when that returns.
    if (ticket)
        *ticket = call->ticket;
    try_once(call);
    return EINSUM_CLIENT_OK;
}

enum einsum_client_status einsum_client_start(struct einsum_client *client,
                                              const struct einsum_client_request *request,
                                              einsum_client_on_response *on_response, void *context,
                                              uint64_t *ticket, struct einsum_client_error *error)
{
    const struct einsum_client_options *options = &client->options;
    enum einsum_client_status status;
    if (client->shared &&
        einsum_client_ring_start(client, request, on_response, context, ticket, &status, error))
        return status;
    struct einsum_client_effort effort = {
        request->deadline_ms ? request->deadline_ms : options->deadline_ms, options->attempts_max};
    const char *method = request->operation == EINSUM_CLIENT_OUTPUT_PROJECT
                             ? "/einsum.v1.Einsum/OutputProject"
                             : "/einsum.v1.Einsum/Einsum";
    struct einsum_client_call *call = new_call(client, method, effort);
    if (!call)
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
    call->expected = einsum_client_expected_of(client, request);
    if (client->shared)
        einsum_client_place(client, request, &call->expected.place);
    status = einsum_client_outgoing_init(&call->outgoing, client, request, request->request_id,
                                         false, &call->expected.place, error);
    if (status != EINSUM_CLIENT_OK) {
        einsum_client_unplace(client, &call->expected.place, true);
        free(call);
        return status;
    }
    call->on_response = on_response;
    call->context = context;
    call->on_end = on_einsum_end;
    return launch(call, ticket, error);
}

// ---- blocking -----------------------------------------------------------------------------------

// Where a blocked thread waits for the client's.
struct waiter {
    pthread_mutex_t lock;
    pthread_cond_t done_cond;
    bool done;
    struct einsum_client_response *response;
    grpc_byte_buffer *reply;
    struct einsum_client_error error; // status OK: none
};

static void waiter_init(struct waiter *waiter)
{
    memset(waiter, 0, sizeof *waiter);
    pthread_mutex_init(&waiter->lock, NULL);
    pthread_cond_init(&waiter->done_cond, NULL);
}

static void waiter_deinit(struct waiter *waiter)
{
    pthread_cond_destroy(&waiter->done_cond);
    pthread_mutex_destroy(&waiter->lock);
}

static void waiter_wake(struct waiter *waiter)
{
    pthread_mutex_lock(&waiter->lock);
    waiter->done = true;
    pthread_cond_signal(&waiter->done_cond);
    pthread_mutex_unlock(&waiter->lock);
}

static enum einsum_client_status waiter_wait(struct waiter *waiter,
                                             struct einsum_client_error *error)
{
    pthread_mutex_lock(&waiter->lock);
    while (!waiter->done)
        pthread_cond_wait(&waiter->done_cond, &waiter->lock);
    pthread_mutex_unlock(&waiter->lock);
    if (waiter->error.status != EINSUM_CLIENT_OK && error)
        *error = waiter->error;
    return waiter->error.status;
}

static void on_blocking_response(void *context, const struct einsum_client_response *response,
                                 const struct einsum_client_error *error)
{
    struct waiter *waiter = context;
    if (response)
        *waiter->response = *response;
    else
        waiter->error = *error;
    waiter_wake(waiter);
}

enum einsum_client_status einsum_client_einsum(struct einsum_client *client,
                                               const struct einsum_client_request *request,
                                               struct einsum_client_response *response,
                                               struct einsum_client_error *error)
{
    if (einsum_client_on_own_thread())
        return einsum_client_refuse_to_block(error);
    if (!request->output && !request->digest_only)
        return einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT,
                                       "output: a blocking call needs a buffer");
    enum einsum_client_status status;
    if (client->shared && einsum_client_ring_einsum(client, request, response, &status, error))
        return status;
    struct waiter waiter;
    waiter_init(&waiter);
    waiter.response = response;
    status = einsum_client_start(client, request, on_blocking_response, &waiter, NULL, error);
    if (status == EINSUM_CLIENT_OK)
        status = waiter_wait(&waiter, error);
    waiter_deinit(&waiter);
    return status;
}

static void on_unary_end(struct einsum_client_call *call)
{
    struct waiter *waiter = call->context;
    waiter->error = call->error;
    waiter->reply = call->reply;
    call->reply = NULL;
    waiter_wake(waiter);
}

enum einsum_client_status einsum_client_unary(struct einsum_client *client, const char *method,
                                              grpc_slice request,
                                              struct einsum_client_effort effort,
                                              grpc_byte_buffer **reply,
                                              struct einsum_client_error *error)
{
    *reply = NULL;
    struct einsum_client_call *call = new_call(client, method, effort);
    if (!call) {
        grpc_slice_unref(request);
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
    }
    call->outgoing.slices[0] = request;
    call->outgoing.slices_n = 1;
    atomic_init(&call->outgoing.borrowed, 0);
    struct waiter waiter;
    waiter_init(&waiter);
    call->context = &waiter;
    call->on_end = on_unary_end;
    enum einsum_client_status status = launch(call, NULL, error);
    if (status == EINSUM_CLIENT_OK)
        status = waiter_wait(&waiter, error);
    *reply = waiter.reply;
    waiter_deinit(&waiter);
    return status;
}
