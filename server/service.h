// What the gRPC services share, and the tables of methods that they give to rpc.c.
#pragma once

#include <stdatomic.h>

#include "call.h"
#include "control.h"
#include "engine.h"
#include "message.h"
#include "metrics.h"
#include "placement.h"

struct batcher;
struct config;
struct gate;
struct gpus;
struct record;
struct guard;
struct health;
struct http;
struct listener;
struct reload;
struct rings;
struct scrub;
struct sharing;
struct tracer;
struct weights;

struct service_context {
    const struct config *config; // every "automatic" resolved
    const struct engine_ops *engine_ops;
    struct engine *engine;
    char kernel[ENGINE_KERNEL_TEXT]; // the engine's own choice, without its reasons
    struct weights *weights;
    struct batcher *batcher;
    struct reload *reload;   // reads the configuration again
    struct control *control; // runs what may block: loads, self-tests
    struct health *health;
    struct gate *gate;
    struct listener *listener;      // the gate's, of `listen`
    struct listener *http_listener; // NULL, as the next: no HTTP
    struct http *http;
    struct gpus *gpus;       // looked at by the main thread; may be NULL
    struct regions *regions; // NULL, as the next two: no memory is shared
    struct rings *rings;
    struct sharing *sharing;
    uint64_t message_bytes_max; // received
    uint64_t reply_bytes_max;
    uint64_t started_ns;
    struct metrics *metrics;
    struct tracer *tracer;              // NULL: off
    struct scrub *scrub;                // NULL: off
    _Atomic uint64_t requests_answered; // well, as far as the request log counts them
    struct copy_counters copies;
    _Atomic uint64_t copied_bytes; // of outputs copied out of batches and not yet sent
    _Atomic uint64_t cut_bytes;    // of requests larger than a batch: messages and outputs
    _Atomic uint64_t nan_turn;     // of nan.c: requests, of which one is looked at
    _Atomic bool draining;
    _Atomic(const char *) hung;  // what does not go on, static; NULL: nothing
    uint64_t scrapes, scrape_ns; // of scrape.c
};

// Reads what a call's metadata ask of its request: traceparent, einsumd-timing.
void service_read_metadata(struct call *call, struct record *record);
// The trailer, if it was asked for. Before call_finish.
void service_add_timing(struct call *call, const struct record *record);

// NULL while requests are served; else why not: "draining", "device lost",
// "the engine hangs".
const char *service_not_ready(const struct service_context *context);

// Slow work on behalf of a call, part of its state: done on a control thread, while the call is
// held. Then it is woken.
struct service_task {
    struct control_task task;
    struct call *call;
    void (*work)(struct service_task *task); // sets `error` if it fails
    struct error error;
    _Atomic bool done; // what `work` has written may be read
};
// Fails the call if too many wait already.
void service_task_start(struct service_task *task, struct call *call,
                        void (*work)(struct service_task *task));
bool service_task_done(const struct service_task *task);

// Finishes the call: there is no memory for `what`.
void service_no_memory(struct call *call, const char *what);

// Unpacks, or finishes the call with the reason why not and returns NULL. message_free.
void *service_unpack(struct call *call, const ProtobufCMessageDescriptor *descriptor,
                     grpc_byte_buffer *bytes);

// Each ends with a method whose path is NULL.
extern const struct method service_einsum_methods[];
extern const struct method service_inference_methods[];
extern const struct method service_models_methods[];
extern const struct method service_repository_methods[];
extern const struct method service_weights_methods[];
extern const struct method service_info_methods[];
extern const struct method service_health_methods[];
extern const struct method service_reflection_methods[];

// The health of each service, and the Watch calls that follow it (service_health.c).
enum health_state {
    HEALTH_UNKNOWN = 0,
    HEALTH_SERVING = 1,
    HEALTH_NOT_SERVING = 2,
    HEALTH_SERVICE_UNKNOWN = 3
};
NODISCARD enum status health_create(struct health **health, struct error *err);
void health_destroy(struct health *health);
// Any thread: of every service ("" and each by name, but for "liveness"), and tells every Watch.
// NOT_SERVING at first.
void health_set(struct health *health, enum health_state state);

// Indexes the embedded descriptor set; once, before the first call is served
// (service_reflection.c).
NODISCARD enum status reflection_init(struct error *err);
void reflection_deinit(void);
