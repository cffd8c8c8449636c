// The C library for callers of einsumd: projections over resident weights, blocking, asynchronous
// or streamed, and the daemon's control calls. Self-contained: needs no other header of the house.
//
// A blocking call, whole:
//
//     struct einsum_client_options options;
//     einsum_client_options_init(&options);
//     struct einsum_client_error error;
//     struct einsum_client *client;
//     if (einsum_client_create("127.0.0.1:50061", &options, &client, &error))
//         return fprintf(stderr, "%s\n", error.text), 1;
//     struct einsum_client_request request = {
//         .weight = "layers.3.attn.wo_a", .tokens = 8, .recipe = EINSUM_CLIENT_RECIPE_1_128_128,
//         .activation_layout = EINSUM_CLIENT_ACTIVATIONS_TGR,
//         .scale_layout = EINSUM_CLIENT_SCALES_TGK, .scale_type = EINSUM_CLIENT_SCALE_FP32,
//         .output_type = EINSUM_CLIENT_OUTPUT_BF16,
//         .activations = a, .activations_bytes = sizeof a, .scales = s, .scales_bytes = sizeof s,
//         .output = out, .output_bytes = sizeof out };
//     struct einsum_client_response response;
//     if (einsum_client_einsum(client, &request, &response, &error))
//         return fprintf(stderr, "%s\n", error.text), 1;
//     einsum_client_destroy(client);
//
// Threads. Every function may be called from any thread, several at once on one client, unless it
// says otherwise. A client has one thread of its own, which runs all callbacks: a callback must not
// block, and must not call what blocks (the functions that say so answer FAILED_PRECONDITION
// there).
//
// Memory. The tensors of a request are sent from where they lie and are never copied here: they are
// borrowed until the callback (or the blocking call's return), also when the call was cancelled or
// late. So either may come after the deadline if a peer froze while it was receiving: over TCP by
// up to stall_ms, over a unix socket until it reads on or dies. The rest of a request struct, its
// strings included, is needed during the function alone. The output is copied once, from the
// socket's buffers to where the request says.
//
// Retries. An answer of RESOURCE_EXHAUSTED or UNAVAILABLE is tried again, after the pause that the
// server advises (trailer grpc-retry-pushback-ms or google.rpc.RetryInfo) or else an exponential
// one, both with jitter, up to attempts_max, or for retry_ms, and never past the deadline. Advice of
// "never" (negative pushback) ends it. By default that is some 140 ms without advice: enough for one
// daemon of several, and too little for a lone one that restarts, which takes a second or as long
// as its weights need. Such callers set retry_ms and a deadline beyond it. gRPC's own retries are off: two layers that both retry multiply. The
// operation is pure, so that trying again is safe; loads and unloads are tried once.
//
// Shared memory. With options.shared_memory a client of a daemon on the same host puts tensors into
// memory that both have mapped, and sends requests by a ring that lies there as well: no byte
// crosses a socket. Tensors that the caller allocates with einsum_client_memory_alloc are used where
// they are; others are copied there and back, once each. What does not fit falls back to gRPC, as
// do digests, outputs taken as chunks, and streams. Callbacks of requests that go by the ring run on
// a second thread of the client's.
//
// Speed. Stock glibc malloc gives gRPC's freed read buffers back to the system and faults them in
// again: up to twice slower from 1 MB on. How memory is allocated is the application's choice, not
// a library's, so put this at the top of main, before any thread (einsumctl does):
//
//     mallopt(M_TRIM_THRESHOLD, 1 << 30);
//     mallopt(M_MMAP_THRESHOLD, 1 << 30);
//     mallopt(M_TOP_PAD, 64 << 20);
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EINSUM_CLIENT_API __attribute__((visibility("default")))
#define EINSUM_CLIENT_NODISCARD __attribute__((warn_unused_result))

// ---- errors -------------------------------------------------------------------------------------

// gRPC's numbers. Where a function says only "fails", it may return any of them: those of the
// server unchanged, and from here INVALID_ARGUMENT (of the caller), DEADLINE_EXCEEDED, CANCELLED,
// UNAVAILABLE (no connection), RESOURCE_EXHAUSTED (no memory, or a message over a limit of this
// side) and INTERNAL (the server's answer breaks the protocol).
enum einsum_client_status {
    EINSUM_CLIENT_OK = 0,
    EINSUM_CLIENT_CANCELLED = 1,
    EINSUM_CLIENT_UNKNOWN = 2,
    EINSUM_CLIENT_INVALID_ARGUMENT = 3,
    EINSUM_CLIENT_DEADLINE_EXCEEDED = 4,
    EINSUM_CLIENT_NOT_FOUND = 5,
    EINSUM_CLIENT_ALREADY_EXISTS = 6,
    EINSUM_CLIENT_PERMISSION_DENIED = 7,
    EINSUM_CLIENT_RESOURCE_EXHAUSTED = 8,
    EINSUM_CLIENT_FAILED_PRECONDITION = 9,
    EINSUM_CLIENT_ABORTED = 10,
    EINSUM_CLIENT_OUT_OF_RANGE = 11,
    EINSUM_CLIENT_UNIMPLEMENTED = 12,
    EINSUM_CLIENT_INTERNAL = 13,
    EINSUM_CLIENT_UNAVAILABLE = 14,
    EINSUM_CLIENT_DATA_LOSS = 15,
    EINSUM_CLIENT_UNAUTHENTICATED = 16,
};

enum {
    EINSUM_CLIENT_ERROR_TEXT_BYTES = 768,
    EINSUM_CLIENT_FIELD_BYTES = 64,
    EINSUM_CLIENT_NAME_BYTES = 257, // of a weight, terminated
    EINSUM_CLIENT_SOURCE_BYTES = 1024,
    EINSUM_CLIENT_KERNEL_BYTES = 65, // of a kernel's name, terminated
    EINSUM_CLIENT_TEXT_BYTES = 256,  // of a version, device and the like; longer ones are cut
    EINSUM_CLIENT_RECIPES_MAX = 8,
    EINSUM_CLIENT_BUCKETS_MAX = 64,
    EINSUM_CLIENT_LIBRARIES_MAX = 16,
    EINSUM_CLIENT_KERNELS_MAX = 16,
    EINSUM_CLIENT_DIGEST_HEAD_MAX = 8,
};

// Wherever a function takes one, it may be NULL; it is filled on failure only.
struct einsum_client_error {
    enum einsum_client_status status;
    bool from_server;                      // the server said so; false: this side, or the way there
    int64_t retry_after_ms;                // the server's advice; 0: none, -1: never
    uint32_t attempts;                     // made in all
    char field[EINSUM_CLIENT_FIELD_BYTES]; // the request field at fault, empty if none
    char text[EINSUM_CLIENT_ERROR_TEXT_BYTES];
};

// "NOT_FOUND" and so on; "UNKNOWN" for a number that is not gRPC's.
EINSUM_CLIENT_API const char *einsum_client_status_name(enum einsum_client_status status);

// ---- a client -----------------------------------------------------------------------------------

// How requests travel.
enum einsum_client_transport {
    EINSUM_CLIENT_TRANSPORT_AUTO = 0,   // in options: the best that the server offers
    EINSUM_CLIENT_TRANSPORT_TCP = 1,    // gRPC
    EINSUM_CLIENT_TRANSPORT_UNIX = 2,   // gRPC
    EINSUM_CLIENT_TRANSPORT_SHARED = 3, // gRPC, tensors in shared memory
    EINSUM_CLIENT_TRANSPORT_RING = 4,   // all in shared memory
};

struct einsum_client_options {
    uint32_t deadline_ms;        // of calls that set none; default 30000
    uint32_t load_deadline_ms;   // of einsum_client_load and self_test; default 0: no deadline
    uint32_t connections;        // calls and streams go round them; default 1
    uint64_t send_bytes_max;     // of one message; default and most 1 GiB
    uint64_t receive_bytes_max;  // grpc.max_receive_message_length; default and most 1 GiB
    uint32_t attempts_max;       // of one call, the first included; default 4; 1: never again
    uint32_t retry_pause_ms;     // before the second attempt without advice; default 20, doubles
    uint32_t retry_pause_ms_max; // and no longer than this; default 2000
    uint32_t stall_ms;      // a TCP peer that takes no byte for so long is cut off; default 10000
    const char *user_agent; // put before gRPC's own; default NULL
    // TLS, to a TCP endpoint: the PEM file of who signs the server's certificate, or "default" for
    // gRPC's own roots. Default NULL: plain text. The files are read as the client is created.
    const char *tls_ca;
    const char *tls_certificate, *tls_key; // PEM files, where the server asks for them
    const char *tls_server_name;           // in its certificate; default NULL: the endpoint's host
    // Sent with each call as "authorization: Bearer TOKEN", in plain text without TLS. Default NULL:
    // none. At most one of them; the file is read again when it changes.
    const char *token, *token_file;
    // "unix:/PATH" of the daemon's control socket for shared memory, or "auto": as the server tells.
    // Default NULL: none is shared. With it, creating a client connects.
    const char *shared_memory;
    enum einsum_client_transport transport; // to use with it; default AUTO
    uint64_t shared_memory_bytes;           // that the client shares; default 64 MiB
    uint32_t spin_us; // that who waits for the ring looks for an answer before it sleeps, while
                      // answers come that fast; default 50
    // A call is tried again for so long after its start, in place of attempts_max; default 0: by
    // attempts_max. What is tried once, by attempts_max 1 or as loads are, still is.
    uint32_t retry_ms;
    // Requests carry the CRC-32C of their tensors, which the server checks, and replies that of the
    // output, which is checked here: DATA_LOSS, not tried again. Not of tensors in CUDA memory. A
    // server that knows no checksums is UNIMPLEMENTED. Default false.
    bool checksums;
};
EINSUM_CLIENT_API void einsum_client_options_init(struct einsum_client_options *options);

struct einsum_client;

// `endpoint` is "HOST:PORT", "[V6]:PORT" or "unix:/PATH". `options` NULL: the defaults. Does not
// connect yet: the first call does. HTTP proxies in the environment are not used. INVALID_ARGUMENT:
// an endpoint of another form or an option out of range; RESOURCE_EXHAUSTED: no memory or thread.
// Where options.transport asks for shared memory, fails if there is none to be had.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_create(const char *endpoint, const struct einsum_client_options *options,
                     struct einsum_client **client, struct einsum_client_error *error);

// How ordinary requests travel now; never AUTO. Changes when the daemon goes or comes back.
EINSUM_CLIENT_API enum einsum_client_transport
einsum_client_transport(const struct einsum_client *client);
// "tcp", "unix", "shm" or "ring".
EINSUM_CLIENT_API const char *einsum_client_transport_name(enum einsum_client_transport transport);

// Memory for tensors that the daemon reads and writes where it lies; aligned to 64 bytes. NULL: no
// memory is shared, or none is left. Freed by the next, or with the client.
EINSUM_CLIENT_API void *einsum_client_memory_alloc(struct einsum_client *client, uint64_t bytes);
EINSUM_CLIENT_API void einsum_client_memory_free(struct einsum_client *client, void *memory);

// Memory of this process on the GPU that the daemon computes on (cudaMalloc), and its handle: the 64
// bytes of cudaIpcGetMemHandle. From then on requests may have their tensors there, all three at
// multiples of 64 bytes from `memory`, and nothing of them is copied. What the caller's kernels write
// must be complete before a request starts (cudaStreamSynchronize); its end means that the output is.
// A client that connects anew registers it anew. UNIMPLEMENTED: the daemon's engine is no GPU;
// FAILED_PRECONDITION: it does not allow this (shared_memory_cuda), cannot open the handle, or
// computes on another GPU; INVALID_ARGUMENT: more bytes than there are; ALREADY_EXISTS;
// RESOURCE_EXHAUSTED: over a limit. client_cuda.c calls nothing of CUDA.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_memory_import_cuda(struct einsum_client *client, const void *memory, uint64_t bytes,
                                 const void *handle, struct einsum_client_error *error);
// Before cudaFree, with no request for it under way: returns when the daemon has closed it. What is
// freed without, or while the client still uses it, may cost the daemon its device.
EINSUM_CLIENT_API void einsum_client_memory_forget_cuda(struct einsum_client *client,
                                                        const void *memory);

// Cancels what is in flight, waits for its callbacks, and frees the client. All streams have been
// finished, and no other thread is in a call of this client's. Not from a callback. NULL is fine.
EINSUM_CLIENT_API void einsum_client_destroy(struct einsum_client *client);

// ---- one projection -----------------------------------------------------------------------------

// Values as in einsum.proto; 0 is "not given", which the server refuses: nothing is guessed.
enum einsum_client_recipe {
    EINSUM_CLIENT_RECIPE_1_128_128 = 1,
    EINSUM_CLIENT_RECIPE_1_1_128 = 2,
    EINSUM_CLIENT_RECIPE_1_32_32 = 3,
    EINSUM_CLIENT_RECIPE_1_1_32 = 4,
};
enum einsum_client_activation_layout {
    EINSUM_CLIENT_ACTIVATIONS_TGR = 1, // [T, G, R] row-major
    EINSUM_CLIENT_ACTIVATIONS_GTR = 2, // [G, T, R] row-major
};
enum einsum_client_scale_layout {
    EINSUM_CLIENT_SCALES_TGK = 1, // [T, G, K] row-major
    EINSUM_CLIENT_SCALES_GKT = 2, // token fastest, padded to a multiple of 4 tokens; UE8M0 packed
};                                // four blocks to a 32-bit word as [G][K/4][align4(T)]
enum einsum_client_scale_type {
    EINSUM_CLIENT_SCALE_NONE = 0, // of BF16 weights, in struct einsum_client_weight
    EINSUM_CLIENT_SCALE_FP32 = 1,
    EINSUM_CLIENT_SCALE_UE8M0 = 2,
};
enum einsum_client_output_type {
    EINSUM_CLIENT_OUTPUT_BF16 = 1,
    EINSUM_CLIENT_OUTPUT_FP32 = 2,
};

// Who goes first where requests wait; see Priority in einsum.proto.
enum einsum_client_priority {
    EINSUM_CLIENT_PRIORITY_LOW = 1,
    EINSUM_CLIENT_PRIORITY_NORMAL = 2,
    EINSUM_CLIENT_PRIORITY_HIGH = 3,
};

// What is asked of the weight: its einsum with quantised activations, or all from attention's
// output on: the inverse rotation by the weight's rope, quantisation, einsum.
enum einsum_client_operation {
    EINSUM_CLIENT_EINSUM = 0,
    EINSUM_CLIENT_OUTPUT_PROJECT = 1,
};

struct einsum_client_request {
    uint64_t request_id;  // echoed in the response; otherwise free
    const char *weight;   // "layers.3.attn.wo_a"
    const char *equation; // NULL: "bhr,hdr->bhd"
    enum einsum_client_recipe recipe;
    enum einsum_client_activation_layout activation_layout;
    enum einsum_client_scale_layout scale_layout;
    enum einsum_client_scale_type scale_type;
    enum einsum_client_output_type output_type;
    uint32_t tokens;                 // T
    uint32_t group_begin, group_end; // half-open; both 0: all groups of the weight
    bool digest_only;                // the answer is a digest and holds no output
    const void *activations;         // E4M3, borrowed as said above
    uint64_t activations_bytes;      // T * G * R
    const void *scales;              // sA, borrowed likewise
    uint64_t scales_bytes;
    // [T, G, D] goes here. NULL: the callback gets the output as chunks, which a blocking call has
    // no use for and refuses.
    void *output;
    uint64_t output_bytes;                // room there
    uint32_t deadline_ms;                 // from now; 0: the client's
    const char *kernel;                   // one of info.kernels; NULL: the server's choice
    enum einsum_client_priority priority; // 0: normal

    // OUTPUT_PROJECT takes the two tensors below and no equation, recipe, layout, scale type,
    // activations or scales: the weight says them.
    enum einsum_client_operation operation;
    const void *attention; // BF16 [T, heads, 512], heads = groups * R / 512; borrowed as above
    uint64_t attention_bytes;
    const int64_t *positions; // [T], borrowed likewise
    uint64_t positions_bytes;
};

struct einsum_client_digest {
    uint32_t crc32; // zlib's, of the output bytes
    uint64_t elements, nan_elements;
    double sum, abs_max; // over what is not NaN
    uint32_t head_n;
    float head[EINSUM_CLIENT_DIGEST_HEAD_MAX]; // the first elements
};

struct einsum_client_chunk {
    const void *data;
    size_t bytes;
};

struct einsum_client_response {
    uint64_t request_id;
    uint32_t tokens, groups, output_dim;
    enum einsum_client_output_type output_type;
    uint64_t output_bytes; // that came; checked to be what the dimensions say
    // Of requests without `output`: the output in order, valid during the callback.
    const struct einsum_client_chunk *chunks;
    size_t chunks_n;
    bool has_digest;
    struct einsum_client_digest digest;
    // The batch it travelled in: tokens of all requests, the bucket they were padded to, requests,
    // and nanoseconds from decoded to launched and from launched to done.
    uint32_t batch_tokens, batch_bucket, batch_requests;
    uint64_t queue_ns, run_ns;
    uint32_t parts;         // that it was cut into, since it was larger than a batch; 0: it was not
    bool has_output_crc32c; // as options.checksums asks for
    uint32_t output_crc32c;
    // Seen from here: from the start of the call to its end, attempts and pauses included.
    uint64_t latency_ns;
    uint32_t attempts;
};

// Either operation. Blocks until answered. Fails; INVALID_ARGUMENT also if the output does not fit
// its buffer, which is then untouched. Not from a callback.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_einsum(struct einsum_client *client, const struct einsum_client_request *request,
                     struct einsum_client_response *response, struct einsum_client_error *error);

// Called once for each request that was started, on the client's thread. Exactly one of `response`
// and `error` is not NULL; both are borrowed. The request's tensors and output are the caller's
// again. May start and submit further requests.
typedef void einsum_client_on_response(void *context, const struct einsum_client_response *response,
                                       const struct einsum_client_error *error);

// Starts a call and returns at once; any number may be in flight. On OK `on_response` is called
// later, never from within; otherwise it is not called at all. `ticket` (may be NULL) names the
// call to einsum_client_cancel. Fails with INVALID_ARGUMENT or RESOURCE_EXHAUSTED.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_start(struct einsum_client *client, const struct einsum_client_request *request,
                    einsum_client_on_response *on_response, void *context, uint64_t *ticket,
                    struct einsum_client_error *error);

// Asks for an early end; the callback still comes, with CANCELLED unless the answer was faster. A
// ticket of a call that has ended is nothing to do.
EINSUM_CLIENT_API void einsum_client_cancel(struct einsum_client *client, uint64_t ticket);

// ---- many on one stream -------------------------------------------------------------------------

struct einsum_client_stream;

// Opens a stream on which at most `window` requests (1 to 65536) are in flight. `deadline_ms` is of
// the whole stream; 0: none. A stream belongs to one connection and is not retried: a request that
// the server refuses comes back with its advice in error->retry_after_ms. Fails with
// INVALID_ARGUMENT or RESOURCE_EXHAUSTED; a server that cannot be reached shows in the callbacks.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_stream_open(struct einsum_client *client, uint32_t window, uint32_t deadline_ms,
                          struct einsum_client_stream **stream, struct einsum_client_error *error);

// Sends one request; `on_response` is called when its answer has come, in any order. When the
// window is full, blocks until there is room; in a callback it cannot, and answers
// RESOURCE_EXHAUSTED (but a callback's own place is free again when it is called). `deadline_ms` of
// the request is not used. Fails with INVALID_ARGUMENT, or as the stream did if it has ended;
// `on_response` is then not called.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status einsum_client_stream_submit(
    struct einsum_client_stream *stream, const struct einsum_client_request *request,
    einsum_client_on_response *on_response, void *context, struct einsum_client_error *error);

// Ends the stream at once: what is in flight is called back with CANCELLED. Still to be finished.
EINSUM_CLIENT_API void einsum_client_stream_cancel(struct einsum_client_stream *stream);

// Half-closes, waits for all answers and the server's own end, and frees the stream, whatever it
// returns: how the stream ended. Not from a callback, and no submit may run beside it.
EINSUM_CLIENT_API enum einsum_client_status
einsum_client_stream_finish(struct einsum_client_stream *stream, struct einsum_client_error *error);

// ---- control calls, all blocking, none from a callback ------------------------------------------

enum einsum_client_weight_type {
    EINSUM_CLIENT_WEIGHT_E4M3 = 1,
    EINSUM_CLIENT_WEIGHT_BF16 = 2,
};

// How a position turns; the proto explains each. As the server tells it, with defaults filled in;
// as it is told, 0 and "" are "not given".
struct einsum_client_rope {
    double theta;  // 0: from the cache
    double factor; // YaRN's; 1: none
    uint32_t original_positions_max;
    double beta_fast, beta_slow;
    uint32_t positions_max;
    char cache[EINSUM_CLIENT_SOURCE_BYTES], cache_tensor[EINSUM_CLIENT_TEXT_BYTES];
};

struct einsum_client_weight {
    char name[EINSUM_CLIENT_NAME_BYTES];
    uint32_t groups, output_dim, reduced_dim; // G, D, R
    enum einsum_client_weight_type weight_type;
    enum einsum_client_scale_type scale_type;
    uint32_t block_d, block_r; // rows of D and columns of R that share a scale
    uint32_t recipes_n;
    enum einsum_client_recipe recipes[EINSUM_CLIENT_RECIPES_MAX]; // that a request may name with it
    uint64_t resident_bytes;
    char source[EINSUM_CLIENT_SOURCE_BYTES]; // file, below its root
    uint32_t tensor_parallel_rank, tensor_parallel_size;
    uint64_t generation;
    bool has_rope; // else it refuses EINSUM_CLIENT_OUTPUT_PROJECT
    struct einsum_client_rope rope;
};

struct einsum_client_weights {
    struct einsum_client_weight *items;
    size_t items_n;
};
// Frees the items and empties the list. A zeroed list is fine.
EINSUM_CLIENT_API void einsum_client_weights_deinit(struct einsum_client_weights *weights);

// All resident weights in order of name; `weights` is to be deinited. Fails.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_list_weights(struct einsum_client *client, struct einsum_client_weights *weights,
                           struct einsum_client_error *error);

// One of them. Fails; NOT_FOUND if there is none of that name.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_get_weight(struct einsum_client *client, const char *name,
                         struct einsum_client_weight *weight, struct einsum_client_error *error);

struct einsum_client_progress {
    uint32_t weights_done, weights_total;
    uint64_t bytes_done, bytes_total;
};

struct einsum_client_load {
    const char *path;           // on the server: a checkpoint's folder or one file
    const char *const *tensors; // shell patterns; none: "*.attn.wo_a.weight"
    size_t tensors_n;
    const char *name_prefix; // NULL: none
    uint32_t tensor_parallel_rank;
    uint32_t tensor_parallel_size; // 0 means 1
    uint32_t output_dim;           // 0 means 1024
    bool replace;
    const struct einsum_client_rope *rope; // of all; NULL: by the server's configuration
    const char *checksums; // there: SHA-256 of its files, as sha256sum writes them; NULL: none
    // Called as the server reports, on the client's thread; may be NULL. false gives up: nothing is
    // loaded, and the call ends with CANCELLED.
    bool (*on_progress)(void *context, const struct einsum_client_progress *progress);
    void *context;
};

// Loads weights; all or none. `weights` (may be NULL) gets them and is to be deinited. Fails; the
// deadline is load_deadline_ms.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_load(struct einsum_client *client, const struct einsum_client_load *load,
                   struct einsum_client_weights *weights, struct einsum_client_error *error);

// Forgets weights, by names or shell patterns. `on_name` (may be NULL) is called with each name
// that went, before the return. Fails.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_unload(struct einsum_client *client, const char *const *names, size_t names_n,
                     void (*on_name)(void *context, const char *name), void *context,
                     struct einsum_client_error *error);

struct einsum_client_selftest_result {
    char weight[EINSUM_CLIENT_NAME_BYTES];
    bool passed;
    double worst_error_ratio; // error over what is allowed
    uint32_t elements_checked;
    uint64_t duration_ns;
    char message[EINSUM_CLIENT_TEXT_BYTES]; // why it did not pass
};

// Has the server check one weight, or all if `weight` is NULL, by its own choice of kernel or, if not
// NULL, by this one. `passed` is its verdict; `on_result`
// (may be NULL) is called with each weight's, before the return. A test that did not pass is OK
// here. Fails; the deadline is load_deadline_ms.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status einsum_client_self_test(
    struct einsum_client *client, const char *weight, const char *kernel, bool *passed,
    void (*on_result)(void *context, const struct einsum_client_selftest_result *result),
    void *context, struct einsum_client_error *error);

enum einsum_client_health {
    EINSUM_CLIENT_HEALTH_UNKNOWN = 0,
    EINSUM_CLIENT_HEALTH_SERVING = 1,
    EINSUM_CLIENT_HEALTH_NOT_SERVING = 2,
    EINSUM_CLIENT_HEALTH_SERVICE_UNKNOWN = 3,
};

// grpc.health.v1; `service` NULL or "": the server as a whole. Fails; NOT_FOUND for a service that
// the server does not know.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_check_health(struct einsum_client *client, const char *service,
                           enum einsum_client_health *health, struct einsum_client_error *error);

struct einsum_client_library {
    char name[64], version[64];
};

// What ServerInfo says; the proto explains each.
struct einsum_client_info {
    char version[EINSUM_CLIENT_TEXT_BYTES];
    char engine[EINSUM_CLIENT_TEXT_BYTES];
    char device[EINSUM_CLIENT_TEXT_BYTES];
    char kernel[EINSUM_CLIENT_TEXT_BYTES];
    char state[EINSUM_CLIENT_TEXT_BYTES];
    uint32_t engine_threads, lanes;
    uint64_t uptime_ns;
    uint32_t buckets_n;
    uint32_t buckets[EINSUM_CLIENT_BUCKETS_MAX];
    struct {
        uint32_t request_tokens_max, batch_tokens_max;
        uint64_t request_bytes_max, reply_bytes_max;
        uint32_t queue_requests_max;
        uint64_t queue_bytes_max;
        uint32_t connections_max, stream_requests_max, deadline_ms_max, connection_requests_max;
        uint64_t cut_bytes_max;
    } limits;
    struct {
        uint64_t weights_bytes, batches_bytes, scratch_bytes, lanes_bytes, graphs_bytes;
        uint32_t graphs_n;
        struct {
            uint32_t bucket, graphs;
            uint64_t device_bytes;
        } graphs[EINSUM_CLIENT_BUCKETS_MAX];
    } memory;
    struct {
        uint64_t requests, answered, refused, invalid, expired, cancelled, failed;
        uint64_t batches, batch_tokens, batch_padding_tokens, batch_requests, busy_ns;
        uint32_t connections;
        uint64_t connections_refused;
        uint64_t queue_ns, phase_batches, copy_in_ns, kernel_ns, copy_out_ns;
        uint64_t graph_replays, eager_launches;
        uint64_t bucket_batches[EINSUM_CLIENT_BUCKETS_MAX]; // as buckets; 0 where not told
        uint64_t copied_in_bytes, copied_out_bytes, shared_requests, ring_requests;
    } counters;
    struct {
        char socket[EINSUM_CLIENT_TEXT_BYTES]; // empty: not offered
        bool direct, cuda;
        uint32_t connections_max, connection_regions_max, regions_max, ring_entries_max;
        uint64_t region_bytes_max, regions_bytes_max;
        uint32_t connections, regions, rings;
        uint64_t connections_refused, regions_bytes;
    } shared_memory;
    uint32_t libraries_n;
    struct einsum_client_library libraries[EINSUM_CLIENT_LIBRARIES_MAX];
    uint32_t kernels_n;
    char kernels[EINSUM_CLIENT_KERNELS_MAX][EINSUM_CLIENT_KERNEL_BYTES];
};

// Fails.
EINSUM_CLIENT_API EINSUM_CLIENT_NODISCARD enum einsum_client_status
einsum_client_server_info(struct einsum_client *client, struct einsum_client_info *info,
                          struct einsum_client_error *error);

#ifdef __cplusplus
}
#endif
