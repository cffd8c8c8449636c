// What the gRPC services share, and the tables of methods that they give to rpc.c.
#pragma once

#include <stdatomic.h>

#include "call.h"
#include "control.h"
#include "engine.h"
#include "message.h"
#include "placement.h"

struct batcher;
struct config;
struct health;
struct listener;
struct rings;
struct sharing;
struct weights;

// Requests by how they ended. Relaxed: each is a number to look at, none guards anything.
struct service_counters {
    _Atomic uint64_t received;
    _Atomic uint64_t shared;    // of those, with tensors in shared memory
    _Atomic uint64_t answered;  // with an output or a digest
    _Atomic uint64_t refused;   // RESOURCE_EXHAUSTED, UNAVAILABLE
    _Atomic uint64_t invalid;   // the caller's mistakes
    _Atomic uint64_t expired;   // DEADLINE_EXCEEDED
    _Atomic uint64_t cancelled; // by the caller
    _Atomic uint64_t failed;    // ours
};

struct service_context {
    const struct config *config; // every "automatic" resolved
    const struct engine_ops *engine_ops;
    struct engine *engine;
    char kernel[ENGINE_KERNEL_TEXT]; // the engine's own choice, without its reasons
    struct weights *weights;
    struct batcher *batcher;
    struct control *control; // runs what may block: loads, self-tests
    struct health *health;
    struct listener *listener;
    struct regions *regions; // NULL, as the next two: no memory is shared
    struct rings *rings;
    struct sharing *sharing;
    uint64_t message_bytes_max; // received
    uint64_t reply_bytes_max;
    uint64_t started_ns;
    struct service_counters counters;
    struct copy_counters copies;
    _Atomic uint64_t copied_bytes; // of outputs copied out of batches and not yet sent
    _Atomic uint64_t cut_bytes;    // of requests larger than a batch: messages and outputs
    _Atomic bool draining;
};

// Counts one request by the status that it ended with.
void service_count(struct service_context *context, enum status status);

// Serving: neither draining nor without its device.
bool service_ready(const struct service_context *context);

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
