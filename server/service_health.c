// grpc.health.v1.Health: may work be sent here?
//
// One state for the whole daemon, under several names; "liveness" alone is always SERVING, since to
// answer at all is to be alive.
//
//     health_set (any thread) --lock--> state, call_wake of every watch
//     Watch (its rpc thread)  on_wake --lock--> reads state, sends it if it is news to the caller
//
// Check takes the name of a resident weight, too: one that is damaged is NOT_SERVING.
//
// A watch is on the list from its request to on_end, and both ends take the lock. That is what
// makes call_wake safe here: under the lock, every listed call is one whose on_end has yet to run.
// A slow reader is sent the state as it is when there is room again, not each one that it missed.
#include "service.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "grpc/health/v1/health.pb-c.h"
#include "message.h"
#include "weights.h"

// One Watch call; lives in the call itself.
struct watch {
    struct call *call;
    struct watch *prev, *next; // guarded by the lock of `health`
    struct health *health;
    const struct health_name *name; // NULL: not known, SERVICE_UNKNOWN for good
    // The rest is touched on the call's rpc thread alone.
    enum health_state sent; // last; meaningless until the first
    bool any_sent;
    bool sending;  // a message is on its way; on_sent follows
    bool draining; // end once the caller knows the state
};

struct health {
    pthread_mutex_t lock;
    enum health_state state; // guarded by lock
    struct watch *watches;   // guarded by lock
};

static const struct health_name {
    char *text; // not const, as protobuf-c has its strings
    bool always_serving;
} names[] = {
    {"", false},
    {"readiness", false},
    {"liveness", true},
    {"einsum.v1.Einsum", false},
    {"inference.GRPCInferenceService", false},
    {"grpc.health.v1.Health", false},
    {"grpc.reflection.v1.ServerReflection", false},
    {"grpc.reflection.v1alpha.ServerReflection", false},
};

enum status health_create(struct health **health, struct error *err)
{
    *health = calloc(1, sizeof **health);
    if (!*health)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    pthread_mutex_init(&(*health)->lock, NULL);
    (*health)->state = HEALTH_NOT_SERVING; // until somebody knows better
    return STATUS_OK;
}

void health_destroy(struct health *health)
{
    if (!health)
        return;
    ASSERT(!health->watches);
    pthread_mutex_destroy(&health->lock);
    free(health);
}

void health_set(struct health *health, enum health_state state)
{
    pthread_mutex_lock(&health->lock);
    bool news = state != health->state;
    health->state = state;
    for (struct watch *watch = health->watches; news && watch; watch = watch->next)
        call_wake(watch->call);
    pthread_mutex_unlock(&health->lock);
}

static const struct health_name *find_name(const char *text)
{
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        if (strcmp(names[i].text, text) == 0)
            return &names[i];
    }
    return NULL;
}

static enum health_state state_of(struct health *health, const struct health_name *name)
{
    if (!name)
        return HEALTH_SERVICE_UNKNOWN;
    if (name->always_serving)
        return HEALTH_SERVING;
    pthread_mutex_lock(&health->lock);
    enum health_state state = health->state;
    pthread_mutex_unlock(&health->lock);
    return state;
}

static Grpc__Health__V1__HealthCheckResponse response_of(enum health_state state)
{
    static_assert((int)HEALTH_SERVICE_UNKNOWN ==
                      (int)GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN,
                  "the numbers are the protocol's");
    Grpc__Health__V1__HealthCheckResponse response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    response.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)state;
    return response;
}

// The request of Check and Watch. Finishes the call if it is none. `weight` (may be NULL) gets a
// reference to the weight that is named, if no service is.
static bool read_service(struct call *call, grpc_byte_buffer *message,
                         const struct health_name **name, struct weight **weight)
{
    struct error err;
    ProtobufCMessage *unpacked = NULL;
    if (!message)
        error_set(&err, STATUS_INVALID_ARGUMENT, "the call ended without a request");
    else if (message_unpack(&grpc__health__v1__health_check_request__descriptor, message, &unpacked,
                            &err) == STATUS_OK) {
        const char *text = ((const Grpc__Health__V1__HealthCheckRequest *)unpacked)->service;
        *name = find_name(text);
        if (!*name && weight)
            *weight = weights_get(call_context(call)->weights, text, strlen(text));
        message_free(unpacked);
        return true;
    }
    call_finish(call, NULL, &err);
    return false;
}

// ---- Check and List

static void check_on_message(struct call *call, grpc_byte_buffer *message)
{
    const struct health_name *name;
    struct weight *weight = NULL;
    if (!read_service(call, message, &name, &weight))
        return;
    if (!name && weight) {
        bool serves = state_of(call_context(call)->health, &names[0]) == HEALTH_SERVING &&
                      !weight_damaged(weight);
        Grpc__Health__V1__HealthCheckResponse response =
            response_of(serves ? HEALTH_SERVING : HEALTH_NOT_SERVING);
        weight_unref(weight);
        call_finish(call, message_pack(&response.base), NULL);
        return;
    }
    if (!name) {
        struct error err;
        error_field(&err, STATUS_NOT_FOUND, "service", "not a known name; List gives all");
        call_finish(call, NULL, &err);
        return;
    }
    Grpc__Health__V1__HealthCheckResponse response =
        response_of(state_of(call_context(call)->health, name));
    call_finish(call, message_pack(&response.base), NULL);
}

static void list_on_message(struct call *call, grpc_byte_buffer *message)
{
    (void)message; // nothing is in it
    Grpc__Health__V1__HealthCheckResponse states[ARRAY_LEN(names)];
    Grpc__Health__V1__HealthListResponse__StatusesEntry entries[ARRAY_LEN(names)];
    Grpc__Health__V1__HealthListResponse__StatusesEntry *entries_used[ARRAY_LEN(names)];
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        states[i] = response_of(state_of(call_context(call)->health, &names[i]));
        grpc__health__v1__health_list_response__statuses_entry__init(&entries[i]);
        entries[i].key = names[i].text;
        entries[i].value = &states[i];
        entries_used[i] = &entries[i];
    }
    Grpc__Health__V1__HealthListResponse response = GRPC__HEALTH__V1__HEALTH_LIST_RESPONSE__INIT;
    response.n_statuses = ARRAY_LEN(names);
    response.statuses = entries_used;
    call_finish(call, message_pack(&response.base), NULL);
}

// ---- Watch

static void watch_link(struct watch *watch)
{
    struct health *health = watch->health;
    pthread_mutex_lock(&health->lock);
    watch->next = health->watches;
    if (watch->next)
        watch->next->prev = watch;
    health->watches = watch;
    pthread_mutex_unlock(&health->lock);
}

static void watch_unlink(struct watch *watch)
{
    struct health *health = watch->health;
    pthread_mutex_lock(&health->lock);
    if (watch->prev)
        watch->prev->next = watch->next;
    else
        health->watches = watch->next;
    if (watch->next)
        watch->next->prev = watch->prev;
    pthread_mutex_unlock(&health->lock);
}

// Tells the caller what it does not know yet. Whatever changes while a message is on its way is
// seen when it has left.
static void watch_advance(struct watch *watch)
{
    if (watch->sending)
        return;
    enum health_state state = state_of(watch->health, watch->name);
    if (!watch->any_sent || state != watch->sent) {
        Grpc__Health__V1__HealthCheckResponse response = response_of(state);
        watch->sending = call_send(watch->call, message_pack(&response.base));
        watch->sent = state;
        watch->any_sent = true;
    } else if (watch->draining) {
        call_finish_draining(watch->call);
    }
}

static void watch_on_message(struct call *call, grpc_byte_buffer *message)
{
    const struct health_name *name;
    if (!read_service(call, message, &name, NULL))
        return;
    struct watch *watch = call_inline_state(call, sizeof *watch);
    watch->call = call;
    watch->health = call_context(call)->health;
    watch->name = name;
    watch_link(watch); // before the state is read: a change in between is a wake, not a loss
    watch_advance(watch);
}

static void watch_on_sent(struct call *call)
{
    struct watch *watch = call_state(call);
    watch->sending = false;
    watch_advance(watch);
}

static void watch_on_wake(struct call *call)
{
    watch_advance(call_state(call));
}

static void watch_on_drain(struct call *call)
{
    struct watch *watch = call_state(call);
    if (!watch) { // its request has not come yet
        call_finish_draining(call);
        return;
    }
    watch->draining = true;
    watch_advance(watch);
}

static void watch_on_end(struct call *call)
{
    struct watch *watch = call_state(call);
    if (watch)
        watch_unlink(watch);
}

const struct method service_health_methods[] = {
    {.path = "/grpc.health.v1.Health/Check", .needs = ACCESS_OPEN, .on_message = check_on_message},
    {.path = "/grpc.health.v1.Health/List", .needs = ACCESS_OPEN, .on_message = list_on_message},
    {
        .path = "/grpc.health.v1.Health/Watch",
        .needs = ACCESS_OPEN,
        .on_message = watch_on_message,
        .on_sent = watch_on_sent,
        .on_wake = watch_on_wake,
        .on_drain = watch_on_drain,
        .on_end = watch_on_end,
    },
    {.path = NULL},
};
