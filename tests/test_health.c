// grpc.health.v1 without gRPC: what each method answers, and that a Watch is told of every change
// that it has time to hear of, the last one always.
#include "fake_call.h"

#include <check.h>
#include <pthread.h>
#include <stdio.h>

#include "grpc/health/v1/health.pb-c.h"

static struct service_context context;

static void setup(void)
{
    ck_assert_int_eq(weights_create(&engine_null, NULL, NULL, 0, 4096, &context.weights, NULL),
                     STATUS_OK); // none is resident
    ck_assert_int_eq(health_create(&context.health, NULL), STATUS_OK);
}

static void teardown(void)
{
    health_destroy(context.health);
    weights_destroy(context.weights);
}

static struct call *start(const char *method)
{
    char path[64];
    snprintf(path, sizeof path, "/grpc.health.v1.Health/%s", method);
    return fake_call_start(service_health_methods, path, &context);
}

static struct call *ask(const char *method, const char *service)
{
    struct call *call = start(method);
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)(uintptr_t)service;
    uint8_t bytes[256];
    ASSERT(grpc__health__v1__health_check_request__get_packed_size(&request) <= sizeof bytes);
    size_t n = grpc__health__v1__health_check_request__pack(&request, bytes);
    fake_call_deliver(call, bytes, n);
    return call;
}

static int state_in(grpc_byte_buffer *message)
{
    size_t n;
    uint8_t *flat = fake_flatten(message, &n);
    Grpc__Health__V1__HealthCheckResponse *response =
        grpc__health__v1__health_check_response__unpack(NULL, n, flat);
    ASSERT(response);
    int state = (int)response->status;
    grpc__health__v1__health_check_response__free_unpacked(response, NULL);
    free(flat);
    return state;
}

static const struct name_case {
    const char *name;
    bool follows; // else always SERVING
} known[] = {
    {"", true},
    {"readiness", true},
    {"liveness", false},
    {"einsum.v1.Einsum", true},
    {"inference.GRPCInferenceService", true},
    {"grpc.health.v1.Health", true},
    {"grpc.reflection.v1.ServerReflection", true},
    {"grpc.reflection.v1alpha.ServerReflection", true},
};

static const char *const unknown[] = {"einsum.v1", "Liveness", "einsum.v1.Einsum ", "x"};

START_TEST(check_knows)
{
    static const enum health_state states[] = {HEALTH_NOT_SERVING, HEALTH_SERVING, HEALTH_UNKNOWN,
                                               HEALTH_NOT_SERVING};
    for (size_t i = 0; i < ARRAY_LEN(states); i++) {
        if (i > 0) // the first is what a fresh one says
            health_set(context.health, states[i]);
        struct call *call = ask("Check", known[_i].name);
        ck_assert(call->finished);
        ck_assert_int_eq(call->err.status, STATUS_OK);
        ck_assert_int_eq(state_in(call->last), known[_i].follows ? states[i] : HEALTH_SERVING);
        fake_call_end(call);
    }
}
END_TEST

START_TEST(check_does_not_know)
{
    struct call *call = ask("Check", unknown[_i]);
    ck_assert(call->finished);
    ck_assert_ptr_null(call->last);
    ck_assert_int_eq(call->err.status, STATUS_NOT_FOUND);
    ck_assert_str_eq(call->err.field, "service");
    fake_call_end(call);
}
END_TEST

START_TEST(list_gives_all)
{
    health_set(context.health, HEALTH_NOT_SERVING);
    struct call *call = start("List");
    fake_call_deliver(call, "", 0);
    ck_assert_int_eq(call->err.status, STATUS_OK);
    size_t n;
    uint8_t *flat = fake_flatten(call->last, &n);
    Grpc__Health__V1__HealthListResponse *list =
        grpc__health__v1__health_list_response__unpack(NULL, n, flat);
    ck_assert_ptr_nonnull(list);
    ck_assert_uint_eq(list->n_statuses, ARRAY_LEN(known));
    for (size_t i = 0; i < ARRAY_LEN(known); i++) {
        size_t found = 0;
        for (size_t j = 0; j < list->n_statuses; j++) {
            if (strcmp(list->statuses[j]->key, known[i].name) != 0)
                continue;
            found++;
            ck_assert_int_eq((int)list->statuses[j]->value->status,
                             known[i].follows ? HEALTH_NOT_SERVING : HEALTH_SERVING);
        }
        ck_assert_uint_eq(found, 1);
    }
    grpc__health__v1__health_list_response__free_unpacked(list, NULL);
    free(flat);
    fake_call_end(call);
}
END_TEST

static const char *const asking[] = {"Check", "Watch"};

START_TEST(refuses_what_is_no_request)
{
    struct call *call = start(asking[_i]);
    fake_call_deliver(call, "\x0a\x01\xff", 3);
    ck_assert(call->finished);
    ck_assert_int_eq(call->err.status, STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(call->err.field, "service");
    fake_call_end(call);

    call = start(asking[_i]);
    fake_call_deliver(call, NULL, 0);
    ck_assert(call->finished);
    ck_assert_int_eq(call->err.status, STATUS_INVALID_ARGUMENT);
    fake_call_end(call);
}
END_TEST

START_TEST(watch_tells_now_and_on_change)
{
    struct call *call = ask("Watch", "einsum.v1.Einsum");
    ck_assert_int_eq(state_in(call->sent), HEALTH_NOT_SERVING);
    fake_call_left(call);
    ck_assert_ptr_null(call->sent);

    health_set(context.health, HEALTH_SERVING);
    ck_assert_ptr_null(call->sent); // only on its own thread
    fake_call_run_wakes(call);
    ck_assert_int_eq(state_in(call->sent), HEALTH_SERVING);
    fake_call_left(call);

    health_set(context.health, HEALTH_SERVING); // no change, no message
    fake_call_run_wakes(call);
    ck_assert_ptr_null(call->sent);
    ck_assert(!call->finished);
    fake_call_end(call);
}
END_TEST

START_TEST(watch_tells_a_slow_reader_the_latest)
{
    struct call *call = ask("Watch", "");
    health_set(context.health, HEALTH_SERVING);
    fake_call_run_wakes(call); // the first message has not left: must not send a second
    health_set(context.health, HEALTH_UNKNOWN);
    fake_call_run_wakes(call);
    ck_assert_int_eq(state_in(call->sent), HEALTH_NOT_SERVING);
    fake_call_left(call);
    ck_assert_int_eq(state_in(call->sent), HEALTH_UNKNOWN);
    health_set(context.health, HEALTH_SERVING); // there and back: nothing to tell
    health_set(context.health, HEALTH_UNKNOWN);
    fake_call_run_wakes(call);
    fake_call_left(call);
    ck_assert_ptr_null(call->sent);
    fake_call_end(call);
}
END_TEST

// Names whose state does not follow health_set: told once, and the stream stays open.
START_TEST(watch_of_a_fixed_state_stays_open)
{
    static const struct {
        const char *name;
        int state;
    } fixed[] = {{"nobody", HEALTH_SERVICE_UNKNOWN}, {"liveness", HEALTH_SERVING}};
    struct call *call = ask("Watch", fixed[_i].name);
    ck_assert_int_eq(state_in(call->sent), fixed[_i].state);
    fake_call_left(call);
    health_set(context.health, HEALTH_SERVING);
    fake_call_run_wakes(call);
    health_set(context.health, HEALTH_NOT_SERVING);
    fake_call_run_wakes(call);
    ck_assert_ptr_null(call->sent);
    ck_assert(!call->finished);
    fake_call_end(call);
}
END_TEST

START_TEST(watch_drains_after_its_last_message)
{
    health_set(context.health, HEALTH_SERVING);
    struct call *call = ask("Watch", "");
    health_set(context.health, HEALTH_NOT_SERVING);
    call->method->on_drain(call); // before the wake, and with the first message on its way
    ck_assert(!call->finished);
    fake_call_left(call);
    ck_assert_int_eq(state_in(call->sent), HEALTH_NOT_SERVING);
    ck_assert(!call->finished);
    fake_call_left(call);
    ck_assert(call->finished);
    ck_assert_int_eq(call->err.status, STATUS_UNAVAILABLE);
    fake_call_end(call);
}
END_TEST

START_TEST(watch_drains_before_its_request)
{
    struct call *call = start("Watch");
    call->method->on_drain(call);
    ck_assert(call->finished);
    ck_assert_int_eq(call->err.status, STATUS_UNAVAILABLE);
    fake_call_end(call);
}
END_TEST

// In every order of ending, those that are left are told, and those that are gone are not touched
// (their memory is freed).
START_TEST(watches_end_in_any_order)
{
    enum { WATCHES = 3 };
    static const int orders[][WATCHES] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2},
                                          {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    for (size_t order = 0; order < ARRAY_LEN(orders); order++) {
        struct call *calls[WATCHES];
        for (int i = 0; i < WATCHES; i++) {
            calls[i] = ask("Watch", "");
            fake_call_left(calls[i]);
        }
        enum health_state state = HEALTH_NOT_SERVING;
        health_set(context.health, state);
        for (int gone = 0; gone < WATCHES; gone++) {
            fake_call_end(calls[orders[order][gone]]);
            state = state == HEALTH_SERVING ? HEALTH_NOT_SERVING : HEALTH_SERVING;
            health_set(context.health, state);
            for (int i = gone + 1; i < WATCHES; i++) {
                struct call *call = calls[orders[order][i]];
                fake_call_run_wakes(call);
                ck_assert_int_eq(state_in(call->sent), state);
                fake_call_left(call);
            }
        }
        health_set(context.health, HEALTH_NOT_SERVING);
    }
}
END_TEST

// ---- threads

enum { RPC_THREADS = 2, WATCHES_EACH = 50, CHANGES = 2000 };

static _Atomic bool settled; // the state changes no more

// One rpc thread, with a watch at a time. Each lives for a few wakes; the last one must hear of the
// final state.
static void *run_watches(void *unused)
{
    (void)unused;
    int last_heard = -1;
    for (int i = 0; i < WATCHES_EACH; i++) {
        struct call *call = ask("Watch", "");
        bool last_watch = i == WATCHES_EACH - 1;
        for (int steps = 0; steps < 20 || last_watch; steps++) {
            bool was_settled = atomic_load(&settled);
            fake_call_run_wakes(call);
            while (call->sent) {
                last_heard = state_in(call->sent);
                fake_call_left(call);
            }
            if (last_watch && was_settled)
                break;
        }
        fake_call_end(call);
    }
    return (void *)(intptr_t)last_heard;
}

START_TEST(watches_come_and_go_while_the_state_changes)
{
    pthread_t threads[RPC_THREADS];
    for (size_t i = 0; i < RPC_THREADS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, run_watches, NULL), 0);
    for (int i = 0; i < CHANGES; i++)
        health_set(context.health, i % 2 ? HEALTH_SERVING : HEALTH_NOT_SERVING);
    health_set(context.health, HEALTH_UNKNOWN);
    atomic_store(&settled, true);
    for (size_t i = 0; i < RPC_THREADS; i++) {
        void *last_heard;
        ck_assert_int_eq(pthread_join(threads[i], &last_heard), 0);
        ck_assert_int_eq((int)(intptr_t)last_heard, HEALTH_UNKNOWN);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("health");
    TCase *unary = tcase_create("unary");
    tcase_add_checked_fixture(unary, setup, teardown);
    tcase_add_loop_test(unary, check_knows, 0, (int)ARRAY_LEN(known));
    tcase_add_loop_test(unary, check_does_not_know, 0, (int)ARRAY_LEN(unknown));
    tcase_add_test(unary, list_gives_all);
    tcase_add_loop_test(unary, refuses_what_is_no_request, 0, (int)ARRAY_LEN(asking));
    suite_add_tcase(suite, unary);
    TCase *watch = tcase_create("watch");
    tcase_set_timeout(watch, 120);
    tcase_add_checked_fixture(watch, setup, teardown);
    tcase_add_test(watch, watch_tells_now_and_on_change);
    tcase_add_test(watch, watch_tells_a_slow_reader_the_latest);
    tcase_add_loop_test(watch, watch_of_a_fixed_state_stays_open, 0, 2);
    tcase_add_test(watch, watch_drains_after_its_last_message);
    tcase_add_test(watch, watch_drains_before_its_request);
    tcase_add_test(watch, watches_end_in_any_order);
    tcase_add_test(watch, watches_come_and_go_while_the_state_changes);
    suite_add_tcase(suite, watch);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
