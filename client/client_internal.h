// What the files of the client library share. Not for callers.
//
//     einsum_client.c    a client's life, its thread, what waits, errors
//     client_message.c   requests as slices over the caller's memory; replies from gRPC's buffers
//     client_call.c      one call: attempts, retries, cancel, deadline; blocking and asynchronous
//     client_stream.c    many requests on one stream
//     client_control.c   the rest of the service, and health
//     client_access.c    what a client shows of itself: TLS, tokens
//     client_wire.c      the two hot messages and error details, byte by byte
//     client_shared.c    memory shared with the daemon: the connection for it, and what lies where
//     client_ring.c      requests by the ring in that memory
//
// The client's thread is the only one that takes tags from the completion queue. Everything that a
// tag carries belongs to that thread from the start of its batch until the tag is handled.
#pragma once

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <pthread.h>
#include <stdatomic.h>

#include "client_wire.h"

#define PRINTF_LIKE(format_index, args_index)                                                      \
    __attribute__((format(printf, format_index, args_index)))

// What the completion queue hands back; lives in what it completes. The release of arming and the
// acquire of taking hand over what the starting thread wrote, which is also gRPC's promise, but one
// that a thread sanitizer cannot see.
struct einsum_client_tag {
    void (*on_complete)(struct einsum_client_tag *tag, bool ok);
    _Atomic bool armed;
};

// Starts a batch; aborts if gRPC refuses it, which only a broken use of gRPC brings about.
void einsum_client_start_batch(grpc_call *call, const grpc_op *ops, size_t ops_n,
                               struct einsum_client_tag *tag);

// Something that waits for a time or for memory to be let go, asked again and again by the client's
// thread. poll returns true when it is done and off the list, or sets due_ns anew.
struct einsum_client_later {
    struct einsum_client_later *next;
    uint64_t due_ns;
    bool (*poll)(struct einsum_client_later *later, uint64_t now_ns);
};

struct einsum_client_access;
struct einsum_client_call;
struct einsum_client_shared;

struct einsum_client {
    struct einsum_client_options options;
    char *endpoint; // as the caller wrote it
    char *target;   // as gRPC wants it
    struct einsum_client_access *access;
    grpc_completion_queue *queue;
    grpc_channel **channels; // options.connections of them
    _Atomic uint32_t next_channel;
    pthread_t thread;
    struct einsum_client_shared *shared; // NULL: no memory is shared

    pthread_mutex_t lock; // guards what follows, down to next_ticket
    pthread_cond_t idle;  // active went to 0
    uint32_t active;      // calls started and not yet called back
    bool stopping;
    struct einsum_client_call *calls; // the active ones
    uint64_t next_ticket;

    // Of the client's thread alone.
    struct einsum_client_later *later;
    uint64_t random;
};

// ---- einsum_client.c ----------------------------------------------------------------------------

uint64_t einsum_client_now_ns(void);
static inline struct einsum_client_error *einsum_client_error_or(struct einsum_client_error *error,
                                                                 struct einsum_client_error *own)
{
    return error ? error : own;
}

enum einsum_client_status einsum_client_error_set(struct einsum_client_error *error,
                                                  enum einsum_client_status status,
                                                  const char *format, ...) PRINTF_LIKE(3, 4);

// From now on this is a client's thread.
void einsum_client_enter_own_thread(void);
// True on the thread of any client: whoever would block there must not.
bool einsum_client_on_own_thread(void);
enum einsum_client_status einsum_client_refuse_to_block(struct einsum_client_error *error);

// Makes a gRPC call on the next connection.
grpc_call *einsum_client_open_call(struct einsum_client *client, const char *method,
                                   gpr_timespec deadline);

gpr_timespec einsum_client_deadline(uint64_t deadline_ns); // UINT64_MAX: none
uint64_t einsum_client_deadline_after(uint32_t ms);        // 0: UINT64_MAX

// Client's thread: puts `later` on the list.
void einsum_client_wait(struct einsum_client *client, struct einsum_client_later *later);
uint64_t einsum_client_random(struct einsum_client *client);

// How a call ended, as gRPC hands it over.
struct einsum_client_ending {
    grpc_status_code code;
    grpc_slice details;
    const char *debug_text;
    grpc_metadata_array trailers;
};
void einsum_client_ending_init(struct einsum_client_ending *ending);
void einsum_client_ending_deinit(struct einsum_client_ending *ending);
grpc_op einsum_client_ending_op(struct einsum_client_ending *ending);
// Fills `error` from an ending that is not OK, and returns its status.
enum einsum_client_status einsum_client_ending_error(const struct einsum_client *client,
                                                     const struct einsum_client_ending *ending,
                                                     struct einsum_client_error *error);

// ---- client_message.c ---------------------------------------------------------------------------

enum { EINSUM_CLIENT_SLICES_MAX = 4 };

// A message to send: slices, some of which lie in the caller's memory. `borrowed` counts those that
// gRPC has not let go of; it may still read them after a call has ended.
struct einsum_client_outgoing {
    grpc_slice slices[EINSUM_CLIENT_SLICES_MAX];
    size_t slices_n;
    _Atomic uint32_t borrowed;
};

// INVALID_ARGUMENT.
enum einsum_client_status einsum_client_check_request(const struct einsum_client_request *request,
                                                      struct einsum_client_error *error);
// Checks and frames a request. INVALID_ARGUMENT or RESOURCE_EXHAUSTED, with nothing to release.
enum einsum_client_status einsum_client_outgoing_init(struct einsum_client_outgoing *outgoing,
                                                      const struct einsum_client *client,
                                                      const struct einsum_client_request *request,
                                                      uint64_t request_id, bool streamed,
                                                      const struct einsum_client_place *place,
                                                      struct einsum_client_error *error);
grpc_byte_buffer *einsum_client_outgoing_buffer(const struct einsum_client_outgoing *outgoing);
// Drops our own references; the memory is the caller's again when `borrowed` is 0.
void einsum_client_outgoing_release(struct einsum_client_outgoing *outgoing);
bool einsum_client_outgoing_free(const struct einsum_client_outgoing *outgoing);

// What a reply must be, noted when the request was sent.
struct einsum_client_expected {
    uint64_t request_id; // the caller's
    uint32_t tokens;
    enum einsum_client_output_type output_type;
    bool digest_only;
    void *output; // NULL: chunks
    uint64_t output_bytes;
    struct einsum_client_place place; // given: the output goes there
    bool summed;                      // the output's CRC-32C must come, and be right
};
struct einsum_client_expected
einsum_client_expected_of(const struct einsum_client *client,
                          const struct einsum_client_request *request);

// Of what the request sends, if options.checksums asks for it and this side can read it. `place` may
// be NULL.
struct einsum_client_sums einsum_client_sums_of(const struct einsum_client *client,
                                                const struct einsum_client_request *request,
                                                const struct einsum_client_place *place);

// A received buffer as chunks.
struct einsum_client_incoming {
    struct einsum_client_chunk *chunks;
    size_t chunks_n;
};
// false: no memory.
bool einsum_client_incoming_init(struct einsum_client_incoming *incoming, grpc_byte_buffer *buffer);
void einsum_client_incoming_deinit(struct einsum_client_incoming *incoming);

// Checks a decoded reply against what was asked for, and puts the output where it belongs. With
// chunks, narrows `incoming` to the output and lends it to `reply->response`.
enum einsum_client_status einsum_client_accept(const struct einsum_client_expected *expected,
                                               struct einsum_client_incoming *incoming,
                                               struct einsum_client_reply *reply,
                                               struct einsum_client_error *error);

// The same of an answer whose output went to expected->place: sets its size, and copies it to where
// the caller wants it if that is elsewhere.
enum einsum_client_status einsum_client_accept_placed(const struct einsum_client_expected *expected,
                                                      struct einsum_client_response *response,
                                                      struct einsum_client_error *error);

// ---- client_access.c ----------------------------------------------------------------------------

// INVALID_ARGUMENT, RESOURCE_EXHAUSTED.
enum einsum_client_status einsum_client_access_create(const struct einsum_client_options *options,
                                                      struct einsum_client_access **access,
                                                      struct einsum_client_error *error);
void einsum_client_access_destroy(struct einsum_client_access *access); // NULL is fine
// After grpc_init. INVALID_ARGUMENT.
enum einsum_client_status
einsum_client_credentials_create(const char *endpoint, const struct einsum_client_options *options,
                                 grpc_channel_credentials **credentials,
                                 struct einsum_client_error *error);
// What a call begins with: the token, if there is one.
grpc_op einsum_client_opening_op(struct einsum_client *client);

// ---- client_shared.c ----------------------------------------------------------------------------

// Makes the memory, connects and registers it as options.shared_memory says. What cannot be had is
// an error only if options.transport asks for it.
enum einsum_client_status einsum_client_shared_create(struct einsum_client *client,
                                                      struct einsum_client_error *error);
void einsum_client_shared_destroy(struct einsum_client *client);

// Finds a place for a request's tensors, copying there what the caller has elsewhere. false: there
// is none, or it would not do; the request goes as a message.
bool einsum_client_place(struct einsum_client *client, const struct einsum_client_request *request,
                         struct einsum_client_place *place);
// `quiet`: the server is done with it; else it may touch the place for a while, as when a call was cut
// off.
void einsum_client_unplace(struct einsum_client *client, struct einsum_client_place *place,
                           bool quiet);

// ---- client_cuda.c ------------------------------------------------------------------------------

// Whether a request without a place may be read here: not if any of its tensors lies in CUDA memory.
enum einsum_client_status einsum_client_cuda_check(const struct einsum_client *client,
                                                   const struct einsum_client_request *request,
                                                   const struct einsum_client_place *place,
                                                   struct einsum_client_error *error);

// ---- client_ring.c ------------------------------------------------------------------------------

// false: it cannot go by the ring, and nothing has been done. Otherwise as einsum_client_start.
bool einsum_client_ring_start(struct einsum_client *client,
                              const struct einsum_client_request *request,
                              einsum_client_on_response *on_response, void *context,
                              uint64_t *ticket, enum einsum_client_status *status,
                              struct einsum_client_error *error);
// Likewise, as einsum_client_einsum.
bool einsum_client_ring_einsum(struct einsum_client *client,
                               const struct einsum_client_request *request,
                               struct einsum_client_response *response,
                               enum einsum_client_status *status,
                               struct einsum_client_error *error);
void einsum_client_ring_cancel(struct einsum_client *client, uint64_t ticket); // UINT64_MAX: all

// ---- client_call.c ------------------------------------------------------------------------------

struct einsum_client_effort {
    uint32_t deadline_ms; // 0: none
    uint32_t attempts_max;
};

// Whether another attempt may start at `due_ns`, after `attempts` of at most `attempts_max`.
bool einsum_client_may_retry(const struct einsum_client_options *options, uint32_t attempts,
                             uint32_t attempts_max, uint64_t started_ns, uint64_t due_ns);
// The pause before attempt number `attempts` + 1, by advice or exponential, with jitter.
uint64_t einsum_client_pause_ns(const struct einsum_client_options *options, uint32_t attempts,
                                int64_t retry_after_ms, uint64_t random);

// A blocking call of any method with one message each way, with retries. The reply is `*reply`, to
// be destroyed by the caller. Takes `request`.
enum einsum_client_status einsum_client_unary(struct einsum_client *client, const char *method,
                                              grpc_slice request,
                                              struct einsum_client_effort effort,
                                              grpc_byte_buffer **reply,
                                              struct einsum_client_error *error);
