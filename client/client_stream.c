// Many requests on one gRPC stream.
//
//     slot    FREE -> QUEUED -> SENT -> ANSWERED -> FREE
//     submit: takes a free slot, queues it, and starts its send if no other is under way
//     client's thread: goes on sending, reads replies, matches them by an id of slot and use
//
// gRPC allows one send and one receive at a time on a call, each side synchronised by itself: sends
// by `sending`, receives by being started from the client's thread alone. A slot is ANSWERED while
// gRPC still holds its request's memory; then the callback comes.

#include "client_internal.h"

#include <grpc/support/time.h>
#include <stdlib.h>
#include <string.h>

enum { WINDOW_MAX = 65536 };

enum slot_state { SLOT_FREE, SLOT_QUEUED, SLOT_SENT, SLOT_ANSWERED };

struct slot {
    enum slot_state state;
    uint32_t use;      // counts up, so that an answer to an earlier use is told apart
    struct slot *next; // of the free list or the send queue
    struct einsum_client_outgoing outgoing;
    struct einsum_client_expected expected;
    einsum_client_on_response *on_response;
    void *context;
    uint64_t started_ns;
};

struct einsum_client_stream {
    struct einsum_client *client;
    grpc_call *call;
    struct einsum_client_tag start_tag, send_tag, close_tag, receive_tag, end_tag;

    pthread_mutex_t lock; // guards what follows, down to `done`
    pthread_cond_t changed;
    struct slot *slots; // `window` of them
    struct slot *free_slots;
    struct slot *queue_first, *queue_last;
    uint32_t window;
    uint32_t in_flight;               // slots not FREE
    uint32_t tags;                    // batches not yet completed
    bool sending;                     // a send or the half-close is under way
    bool closing;                     // no more submits: half-close once the queue is empty
    bool closed;                      // half-close was started
    bool ended;                       // the status has come
    bool done;                        // nothing will touch the stream any more
    struct einsum_client_error error; // how it ended; status OK: well

    // Of the client's thread.
    struct einsum_client_ending ending;
    grpc_metadata_array headers;
    grpc_byte_buffer *received;
    struct einsum_client_later later;
    bool broken_off; // by this side
};

#define STREAM_OF(pointer, member)                                                                 \
    ((struct einsum_client_stream *)(void *)((char *)(pointer)-offsetof(                           \
        struct einsum_client_stream, member)))

// ---- slots --------------------------------------------------------------------------------------

static uint64_t wire_id(const struct einsum_client_stream *stream, const struct slot *slot)
{
    return (uint64_t)slot->use << 32 | (uint32_t)(slot - stream->slots);
}

// The slot that awaits an answer with this id, which it then has; NULL if none does.
static struct slot *take_slot(struct einsum_client_stream *stream, uint64_t id)
{
    uint32_t index = (uint32_t)id;
    if (index >= stream->window)
        return NULL;
    struct slot *slot = &stream->slots[index];
    pthread_mutex_lock(&stream->lock);
    bool waits = slot->state == SLOT_SENT && slot->use == (uint32_t)(id >> 32);
    if (waits)
        slot->state = SLOT_ANSWERED;
    pthread_mutex_unlock(&stream->lock);
    return waits ? slot : NULL;
}

static void free_slot(struct einsum_client_stream *stream, struct slot *slot)
{
    pthread_mutex_lock(&stream->lock);
    slot->state = SLOT_FREE;
    slot->use++;
    slot->next = stream->free_slots;
    stream->free_slots = slot;
    stream->in_flight--;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
}

// Gives the slot back first, so that the callback can submit into it.
static void call_back(struct einsum_client_stream *stream, struct slot *slot,
                      struct einsum_client_response *response,
                      const struct einsum_client_error *error)
{
    einsum_client_on_response *on_response = slot->on_response;
    void *context = slot->context;
    if (response) {
        response->latency_ns = einsum_client_now_ns() - slot->started_ns;
        response->attempts = 1;
    }
    free_slot(stream, slot);
    on_response(context, response, error);
}

// ---- sending ------------------------------------------------------------------------------------

// Takes the next thing to send, under the lock; the caller then starts it without. false: nothing;
// a NULL message stands for the half-close.
static bool next_send_locked(struct einsum_client_stream *stream, grpc_byte_buffer **message)
{
    struct slot *slot = stream->queue_first;
    *message = NULL;
    if (stream->sending || stream->ended || (!slot && (!stream->closing || stream->closed)))
        return false;
    if (slot) {
        stream->queue_first = slot->next;
        slot->state = SLOT_SENT;
        // With references of its own, made here: a server that answers what it has not received yet
        // has the slot let go of its slices while this thread is about to send them.
        *message = einsum_client_outgoing_buffer(&slot->outgoing);
    } else {
        stream->closed = true;
    }
    stream->sending = true;
    stream->tags++;
    return true;
}

static void send_next(struct einsum_client_stream *stream)
{
    grpc_byte_buffer *message;
    pthread_mutex_lock(&stream->lock);
    bool more = next_send_locked(stream, &message);
    pthread_mutex_unlock(&stream->lock);
    if (!more)
        return;
    // The count of tags keeps the call until this one has popped.
    if (message) {
        grpc_op op = {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = message};
        einsum_client_start_batch(stream->call, &op, 1, &stream->send_tag);
        grpc_byte_buffer_destroy(message);
    } else {
        grpc_op op = {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT};
        einsum_client_start_batch(stream->call, &op, 1, &stream->close_tag);
    }
}

// ---- the end ------------------------------------------------------------------------------------

// Calls back every slot that is left; false if gRPC still reads the memory of one.
static bool end_slots(struct einsum_client_stream *stream)
{
    bool all = true;
    struct einsum_client_error error = stream->error;
    if (error.status == EINSUM_CLIENT_OK)
        einsum_client_error_set(&error, EINSUM_CLIENT_INTERNAL,
                                "the server ended the stream without an answer to this request");
    error.attempts = 1;
    for (uint32_t i = 0; i < stream->window; i++) {
        struct slot *slot = &stream->slots[i];
        pthread_mutex_lock(&stream->lock);
        bool left = slot->state == SLOT_QUEUED || slot->state == SLOT_SENT;
        pthread_mutex_unlock(&stream->lock);
        if (!left)
            continue;
        einsum_client_outgoing_release(&slot->outgoing);
        if (einsum_client_outgoing_free(&slot->outgoing))
            call_back(stream, slot, NULL, &error);
        else
            all = false;
    }
    return all;
}

static bool poll_end(struct einsum_client_later *later, uint64_t now_ns)
{
    struct einsum_client_stream *stream = STREAM_OF(later, later);
    (void)now_ns;
    if (!end_slots(stream))
        return false;
    pthread_mutex_lock(&stream->lock);
    // Answered slots whose memory is still held have their own turn on the client's list.
    bool done = stream->in_flight == 0;
    if (done) {
        stream->done = true;
        pthread_cond_broadcast(&stream->changed);
    }
    pthread_mutex_unlock(&stream->lock);
    return done; // if so, finish may have freed the stream already
}

// One batch has completed. With the last one, and the status known, the stream is over.
static void count_tag_out(struct einsum_client_stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    bool last = --stream->tags == 0 && stream->ended;
    pthread_mutex_unlock(&stream->lock);
    if (!last)
        return;
    // Nothing is in gRPC's hands but memory, and unreferencing the call has it let go of that.
    pthread_mutex_lock(&stream->lock);
    grpc_call *call = stream->call;
    stream->call = NULL;
    pthread_mutex_unlock(&stream->lock);
    grpc_call_unref(call);
    stream->later = (struct einsum_client_later){.poll = poll_end};
    if (!poll_end(&stream->later, 0))
        einsum_client_wait(stream->client, &stream->later);
}

static void on_sent(struct einsum_client_tag *tag, bool ok)
{
    (void)ok; // a send that failed is followed by the status
    struct einsum_client_stream *stream = STREAM_OF(tag, send_tag);
    pthread_mutex_lock(&stream->lock);
    stream->sending = false;
    pthread_mutex_unlock(&stream->lock);
    send_next(stream);
    count_tag_out(stream);
}

static void on_closed(struct einsum_client_tag *tag, bool ok)
{
    (void)ok;
    count_tag_out(STREAM_OF(tag, close_tag));
}

static void on_started(struct einsum_client_tag *tag, bool ok)
{
    (void)ok;
    count_tag_out(STREAM_OF(tag, start_tag));
}

static void on_ended(struct einsum_client_tag *tag, bool ok)
{
    (void)ok;
    struct einsum_client_stream *stream = STREAM_OF(tag, end_tag);
    struct einsum_client_error error = {0};
    if (stream->ending.code != GRPC_STATUS_OK)
        einsum_client_ending_error(stream->client, &stream->ending, &error);
    error.attempts = 1;
    error.from_server = error.from_server && !stream->broken_off;
    pthread_mutex_lock(&stream->lock);
    stream->error = error;
    stream->ended = true;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    count_tag_out(stream);
}

// ---- receiving ----------------------------------------------------------------------------------

// One reply on its way to its callback.
struct answer {
    struct einsum_client_later later;
    struct einsum_client_stream *stream;
    struct slot *slot;
    grpc_byte_buffer *buffer;
    struct einsum_client_incoming incoming;
    struct einsum_client_reply reply;
    struct einsum_client_error error;
};

static void answer_destroy(struct answer *answer)
{
    einsum_client_incoming_deinit(&answer->incoming);
    grpc_byte_buffer_destroy(answer->buffer);
    free(answer);
}

static void deliver(struct answer *answer)
{
    bool good = answer->error.status == EINSUM_CLIENT_OK;
    call_back(answer->stream, answer->slot, good ? &answer->reply.response : NULL,
              good ? NULL : &answer->error);
    answer_destroy(answer);
}

static bool poll_answer(struct einsum_client_later *later, uint64_t now_ns)
{
    (void)now_ns;
    struct answer *answer =
        (struct answer *)(void *)((char *)later - offsetof(struct answer, later));
    if (!einsum_client_outgoing_free(&answer->slot->outgoing))
        return false;
    deliver(answer);
    return true;
}

// A server that breaks the protocol is not listened to any longer; the stream ends with this.
static void break_off(struct einsum_client_stream *stream, grpc_status_code code, const char *text)
{
    stream->broken_off = true;
    grpc_call_cancel_with_status(stream->call, code, text, NULL);
}

static void set_server_error(const struct einsum_client_reply *reply,
                             struct einsum_client_error *error)
{
    bool known = reply->error_code > 0 && reply->error_code <= EINSUM_CLIENT_UNAUTHENTICATED;
    *error = (struct einsum_client_error){
        .status = known ? (enum einsum_client_status)reply->error_code : EINSUM_CLIENT_UNKNOWN,
        .from_server = true,
        .retry_after_ms = reply->error_retry_after_ms,
        .attempts = 1,
    };
    memcpy(error->field, reply->error_field, sizeof error->field);
    memcpy(error->text, reply->error_text, sizeof error->text);
}

static void take_answer(struct answer *answer)
{
    struct einsum_client_stream *stream = answer->stream;
    if (!einsum_client_incoming_init(&answer->incoming, answer->buffer)) {
        break_off(stream, GRPC_STATUS_RESOURCE_EXHAUSTED, "no memory to read a reply");
        answer_destroy(answer);
        return;
    }
    bool sound = einsum_client_reply_read(answer->incoming.chunks, answer->incoming.chunks_n, true,
                                          &answer->reply);
    answer->slot = sound ? take_slot(stream, answer->reply.response.request_id) : NULL;
    if (!answer->slot) {
        break_off(stream, GRPC_STATUS_INTERNAL,
                  sound ? "the server answered a request that is not in flight"
                        : "a reply is no EinsumStreamResponse");
        answer_destroy(answer);
        return;
    }
    if (answer->reply.has_error)
        set_server_error(&answer->reply, &answer->error);
    else
        einsum_client_accept(&answer->slot->expected, &answer->incoming, &answer->reply,
                             &answer->error);
    einsum_client_outgoing_release(&answer->slot->outgoing);
    if (einsum_client_outgoing_free(&answer->slot->outgoing)) {
        deliver(answer);
        return;
    }
    answer->later = (struct einsum_client_later){.poll = poll_answer};
    einsum_client_wait(stream->client, &answer->later);
}

static void receive_next(struct einsum_client_stream *stream)
{
    stream->received = NULL;
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &stream->received};
    einsum_client_start_batch(stream->call, &op, 1, &stream->receive_tag);
}

static void on_received(struct einsum_client_tag *tag, bool ok)
{
    struct einsum_client_stream *stream = STREAM_OF(tag, receive_tag);
    grpc_byte_buffer *buffer = stream->received;
    if (!ok || !buffer) { // the last one: the status follows
        grpc_byte_buffer_destroy(buffer);
        count_tag_out(stream);
        return;
    }
    // The next one is asked for first, so that it can arrive while this one is handled. The tag's
    // count passes on to it.
    receive_next(stream);
    struct answer *answer = calloc(1, sizeof *answer);
    if (!answer) {
        break_off(stream, GRPC_STATUS_RESOURCE_EXHAUSTED, "no memory to read a reply");
        grpc_byte_buffer_destroy(buffer);
        return;
    }
    answer->stream = stream;
    answer->buffer = buffer;
    take_answer(answer);
}

// ---- open, submit, cancel, finish ---------------------------------------------------------------

static void free_stream(struct einsum_client_stream *stream)
{
    einsum_client_ending_deinit(&stream->ending);
    grpc_metadata_array_destroy(&stream->headers);
    pthread_cond_destroy(&stream->changed);
    pthread_mutex_destroy(&stream->lock);
    free(stream->slots);
    free(stream);
}

static struct einsum_client_stream *new_stream(struct einsum_client *client, uint32_t window)
{
    struct einsum_client_stream *stream = calloc(1, sizeof *stream);
    struct slot *slots = calloc(window, sizeof *slots);
    if (!stream || !slots) {
        free(stream);
        free(slots);
        return NULL;
    }
    stream->client = client;
    stream->window = window;
    stream->slots = slots;
    for (uint32_t i = window; i-- > 0;) {
        slots[i].next = stream->free_slots;
        stream->free_slots = &slots[i];
    }
    stream->start_tag.on_complete = on_started;
    stream->send_tag.on_complete = on_sent;
    stream->close_tag.on_complete = on_closed;
    stream->receive_tag.on_complete = on_received;
    stream->end_tag.on_complete = on_ended;
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->changed, NULL);
    einsum_client_ending_init(&stream->ending);
    grpc_metadata_array_init(&stream->headers);
    return stream;
}

enum einsum_client_status einsum_client_stream_open(struct einsum_client *client, uint32_t window,
                                                    uint32_t deadline_ms,
                                                    struct einsum_client_stream **stream_out,
                                                    struct einsum_client_error *error)
{
    *stream_out = NULL;
    if (window < 1 || window > WINDOW_MAX)
        return einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT,
                                       "window: %u is not between 1 and %d", window, WINDOW_MAX);
    struct einsum_client_stream *stream = new_stream(client, window);
    if (!stream)
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
    stream->call =
        einsum_client_open_call(client, "/einsum.v1.Einsum/EinsumStream",
                                einsum_client_deadline(einsum_client_deadline_after(deadline_ms)));
    stream->tags = 3; // those of the three batches below
    grpc_op start[2] = {einsum_client_opening_op(client),
                        {.op = GRPC_OP_RECV_INITIAL_METADATA,
                         .data.recv_initial_metadata.recv_initial_metadata = &stream->headers}};
    einsum_client_start_batch(stream->call, start, 2, &stream->start_tag);
    grpc_op receive = {.op = GRPC_OP_RECV_MESSAGE,
                       .data.recv_message.recv_message = &stream->received};
    einsum_client_start_batch(stream->call, &receive, 1, &stream->receive_tag);
    grpc_op end = einsum_client_ending_op(&stream->ending);
    einsum_client_start_batch(stream->call, &end, 1, &stream->end_tag);
    *stream_out = stream;
    return EINSUM_CLIENT_OK;
}

// Waits for a free slot and takes it. NULL: none will come, for the reason in `status`.
static struct slot *reserve_slot(struct einsum_client_stream *stream,
                                 enum einsum_client_status *status,
                                 struct einsum_client_error *error)
{
    struct slot *slot = NULL;
    pthread_mutex_lock(&stream->lock);
    while (!stream->free_slots && !stream->ended && !stream->closing &&
           !einsum_client_on_own_thread())
        pthread_cond_wait(&stream->changed, &stream->lock);
    if (stream->ended && stream->error.status != EINSUM_CLIENT_OK) {
        *status = stream->error.status;
        if (error)
            *error = stream->error;
    } else if (stream->ended || stream->closing) {
        *status = einsum_client_error_set(error, EINSUM_CLIENT_FAILED_PRECONDITION,
                                          "the stream has ended");
    } else if (!stream->free_slots) {
        *status = einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED,
                                          "all %u places of the stream are taken", stream->window);
    } else {
        slot = stream->free_slots;
        stream->free_slots = slot->next;
        slot->next = NULL;
        stream->in_flight++;
    }
    pthread_mutex_unlock(&stream->lock);
    return slot;
}

enum einsum_client_status einsum_client_stream_submit(struct einsum_client_stream *stream,
                                                      const struct einsum_client_request *request,
                                                      einsum_client_on_response *on_response,
                                                      void *context,
                                                      struct einsum_client_error *error)
{
    enum einsum_client_status status;
    struct slot *slot = reserve_slot(stream, &status, error);
    if (!slot)
        return status;
    status = einsum_client_outgoing_init(&slot->outgoing, stream->client, request,
                                         wire_id(stream, slot), true, NULL, error);
    if (status != EINSUM_CLIENT_OK) {
        free_slot(stream, slot);
        return status;
    }
    slot->expected = einsum_client_expected_of(stream->client, request);
    slot->on_response = on_response;
    slot->context = context;
    slot->started_ns = einsum_client_now_ns();

    pthread_mutex_lock(&stream->lock);
    slot->state = SLOT_QUEUED;
    if (stream->queue_first)
        stream->queue_last->next = slot;
    else
        stream->queue_first = slot;
    stream->queue_last = slot;
    pthread_mutex_unlock(&stream->lock);
    send_next(stream);
    return EINSUM_CLIENT_OK;
}

void einsum_client_stream_cancel(struct einsum_client_stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    grpc_call *call = stream->call;
    if (call)
        grpc_call_ref(call);
    pthread_mutex_unlock(&stream->lock);
    if (!call)
        return;
    grpc_call_cancel(call, NULL);
    grpc_call_unref(call);
}

enum einsum_client_status einsum_client_stream_finish(struct einsum_client_stream *stream,
                                                      struct einsum_client_error *error)
{
    if (einsum_client_on_own_thread())
        return einsum_client_refuse_to_block(error);
    pthread_mutex_lock(&stream->lock);
    stream->closing = true;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    send_next(stream);

    pthread_mutex_lock(&stream->lock);
    while (!stream->done)
        pthread_cond_wait(&stream->changed, &stream->lock);
    enum einsum_client_status status = stream->error.status;
    if (status != EINSUM_CLIENT_OK && error)
        *error = stream->error;
    pthread_mutex_unlock(&stream->lock);
    free_stream(stream);
    return status;
}
