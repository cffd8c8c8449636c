// What the gRPC services share, and the tables of methods that they give to rpc.c.
#pragma once

#include "call.h"

struct batcher;
struct config;
struct control;
struct health;
struct rpc;
struct weights;

struct service_context {
    const struct config *config;
    struct weights *weights;
    struct batcher *batcher;
    struct control *control; // runs what may block: loads, self-tests
    struct health *health;
    struct rpc *rpc;
};

// Each ends with a method whose path is NULL.
extern const struct method service_einsum_methods[];
extern const struct method service_admin_methods[]; // the rest of einsum.v1.Einsum
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
// Any thread: of every service ("" and each by name), and tells every Watch.
void health_set(struct health *health, enum health_state state);
