// client_shared.c and client_ring.c against the daemon's own side of the ring, without gRPC: blocking
// callers, callbacks, many threads, more than the ring holds, a daemon that refuses, goes and comes
// back, hangs or lies.
#include <check.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/client_shared.h"
#include "client/einsum_client.h"
#include "shared_site.h"

static struct einsum_client *client;

static struct einsum_client *connect_client(enum einsum_client_transport transport,
                                            uint32_t attempts_max)
{
    struct einsum_client_options options;
    struct einsum_client_error error;
    struct einsum_client *made;
    einsum_client_options_init(&options);
    options.shared_memory = site.address;
    options.shared_memory_bytes = 8 << 20;
    options.transport = transport;
    options.attempts_max = attempts_max;
    options.retry_pause_ms = 5;
    options.deadline_ms = 20000;
    options.stall_ms = 500;
    // Nobody is there: what does not go by the ring fails.
    ck_assert_msg(einsum_client_create("unix:/nowhere/e.sock", &options, &made, &error) ==
                      EINSUM_CLIENT_OK,
                  "%s", error.text);
    return made;
}

static void set_up(void)
{
    start();
    // A client asks for as many entries as it likes; this one is built with more than ENTRIES_MAX.
    rings_destroy(site.context.rings);
    const struct rings_options rings = {
        .context = &site.context, .entries_max = 1024, .spin_us = 50, .on_broken = on_broken};
    struct error err;
    ck_assert_int_eq(rings_create(&rings, &site.context.rings, &err), STATUS_OK);
    site_listen();
    client = connect_client(EINSUM_CLIENT_TRANSPORT_RING, 4);
}

static void tear_down(void)
{
    einsum_client_destroy(client);
    stop();
}

enum {
    ACTIVATION_BYTES = TOKENS_MAX * GROUPS * REDUCED_DIM,
    SCALE_BYTES = TOKENS_MAX * GROUPS * (REDUCED_DIM / 128) * 4,
    OUTPUT_BYTES = TOKENS_MAX * GROUPS * OUTPUT_DIM * 2,
};

struct tensors {
    _Alignas(64) uint8_t activations[ACTIVATION_BYTES];
    uint8_t scales[SCALE_BYTES], output[OUTPUT_BYTES];
};

// The engine answers with the first byte of the activations, over and over.
static struct einsum_client_request request_of(struct tensors *tensors, uint32_t tokens,
                                               uint8_t value)
{
    tensors->activations[0] = value;
    return (struct einsum_client_request){
        .request_id = value,
        .weight = name,
        .recipe = EINSUM_CLIENT_RECIPE_1_128_128,
        .activation_layout = EINSUM_CLIENT_ACTIVATIONS_TGR,
        .scale_layout = EINSUM_CLIENT_SCALES_TGK,
        .scale_type = EINSUM_CLIENT_SCALE_FP32,
        .output_type = EINSUM_CLIENT_OUTPUT_BF16,
        .tokens = tokens,
        .activations = tensors->activations,
        .activations_bytes = (uint64_t)tokens * GROUPS * REDUCED_DIM,
        .scales = tensors->scales,
        .scales_bytes = (uint64_t)tokens * GROUPS * (REDUCED_DIM / 128) * 4,
        .output = tensors->output,
        .output_bytes = OUTPUT_BYTES,
    };
}

static bool is_right(const struct tensors *tensors, uint32_t tokens, uint8_t value)
{
    for (uint32_t i = 0; i < tokens * GROUPS * OUTPUT_DIM * 2; i++)
        if (tensors->output[i] != value)
            return false;
    return true;
}

static enum einsum_client_status call(struct tensors *tensors, uint8_t value,
                                      struct einsum_client_error *error)
{
    uint32_t tokens = 1 + value % TOKENS_MAX;
    struct einsum_client_request request = request_of(tensors, tokens, value);
    struct einsum_client_response response;
    memset(tensors->output, ~value, sizeof tensors->output);
    enum einsum_client_status status = einsum_client_einsum(client, &request, &response, error);
    if (status == EINSUM_CLIENT_OK) {
        ASSERT(is_right(tensors, tokens, value));
        ASSERT(response.request_id == value && response.tokens == tokens);
        ASSERT(response.groups == GROUPS && response.output_dim == OUTPUT_DIM);
        ASSERT(response.output_bytes == tokens * GROUPS * OUTPUT_DIM * 2);
        ASSERT(response.attempts >= 1 && response.latency_ns > 0);
    }
    return status;
}

static void expect_call(struct tensors *tensors, uint8_t value)
{
    struct einsum_client_error error = {.text = ""};
    ck_assert_msg(call(tensors, value, &error) == EINSUM_CLIENT_OK, "%s", error.text);
}

// ---- blocking

START_TEST(blocking_calls_with_memory_of_either_kind)
{
    ck_assert_int_eq(einsum_client_transport(client), EINSUM_CLIENT_TRANSPORT_RING);
    ck_assert_str_eq(einsum_client_transport_name(einsum_client_transport(client)), "ring");
    static struct tensors elsewhere;
    struct tensors *shared = einsum_client_memory_alloc(client, sizeof *shared);
    ck_assert_ptr_nonnull(shared);
    for (int i = 0; i < 500; i++) {
        expect_call(&elsewhere, (uint8_t)i);
        expect_call(shared, (uint8_t)~i);
    }
    ck_assert_uint_eq(site.context.copies.in_bytes, 0);
    ck_assert_uint_eq(site.context.copies.out_bytes, 0);
    ck_assert_uint_eq(rings_stats(site.context.rings).requests, 1000);
    einsum_client_memory_free(client, shared);
}
END_TEST

START_TEST(errors_are_the_servers)
{
    static struct tensors tensors;
    struct einsum_client_request request = request_of(&tensors, 3, 1);
    struct einsum_client_response response;
    struct einsum_client_error error;
    request.recipe = EINSUM_CLIENT_RECIPE_1_32_32;
    ck_assert_int_eq(einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_INVALID_ARGUMENT);
    ck_assert(error.from_server);
    ck_assert_str_eq(error.field, "recipe");
    ck_assert_uint_eq(error.attempts, 1);
    // What is refused for now is tried again, and told in the end.
    rings_drain(site.context.rings);
    request = request_of(&tensors, 3, 1);
    ck_assert_int_eq(einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_UNAVAILABLE);
    ck_assert(error.from_server);
    ck_assert_str_eq(error.text, "draining");
    ck_assert_uint_eq(error.attempts, 4);
}
END_TEST

static void *call_often(void *argument)
{
    struct tensors *tensors = malloc(sizeof *tensors);
    ASSERT(tensors);
    for (int i = 0; i < 1500; i++)
        ASSERT(call(tensors, (uint8_t)(i * 7 + (int)(uintptr_t)argument), NULL) ==
               EINSUM_CLIENT_OK);
    free(tensors);
    return NULL;
}

START_TEST(threads_share_a_client)
{
    pthread_t threads[4];
    for (uintptr_t i = 0; i < ARRAY_LEN(threads); i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, call_often, (void *)i), 0);
    for (size_t i = 0; i < ARRAY_LEN(threads); i++)
        pthread_join(threads[i], NULL);
}
END_TEST

// ---- callbacks

struct flight {
    struct tensors *tensors;
    uint32_t tokens;
    uint8_t value;
    int rounds; // still to be sent by the callback
    _Atomic int ended, failed;
    enum einsum_client_status status;
    pthread_t on;
};

static void on_response(void *context, const struct einsum_client_response *response,
                        const struct einsum_client_error *error);

static void send_flight(struct flight *flight)
{
    struct einsum_client_request request =
        request_of(flight->tensors, flight->tokens, flight->value);
    struct einsum_client_error error;
    enum einsum_client_status status =
        einsum_client_start(client, &request, on_response, flight, NULL, &error);
    ASSERT(status == EINSUM_CLIENT_OK);
}

static void on_response(void *context, const struct einsum_client_response *response,
                        const struct einsum_client_error *error)
{
    struct flight *flight = context;
    flight->on = pthread_self();
    ASSERT(!response != !error);
    if (response)
        ASSERT(is_right(flight->tensors, flight->tokens, flight->value));
    flight->status = response ? EINSUM_CLIENT_OK : error->status;
    if (error)
        atomic_fetch_add(&flight->failed, 1);
    if (response && flight->rounds > 0) {
        flight->rounds--;
        flight->value = (uint8_t)(flight->value + 13);
        send_flight(flight);
        return;
    }
    atomic_fetch_add(&flight->ended, 1);
}

enum { FLIGHTS = 300 };
static struct flight flights[FLIGHTS];

static void fly(int n, int rounds)
{
    for (int i = 0; i < n; i++) {
        flights[i] = (struct flight){.tensors = flights[i].tensors,
                                     .tokens = 1 + (uint32_t)i % TOKENS_MAX,
                                     .value = (uint8_t)i,
                                     .rounds = rounds};
        if (!flights[i].tensors) // every other in shared memory
            flights[i].tensors = i % 2 ? einsum_client_memory_alloc(client, sizeof(struct tensors))
                                       : malloc(sizeof(struct tensors));
        ck_assert_ptr_nonnull(flights[i].tensors);
        send_flight(&flights[i]);
    }
}

static void land(int n, enum einsum_client_status status)
{
    for (int i = 0; i < n; i++) {
        WAIT_FOR(atomic_load(&flights[i].ended) == 1);
        ck_assert_int_eq(flights[i].status, status);
        ck_assert(pthread_equal(flights[i].on, flights[0].on)); // all on one thread
    }
}

START_TEST(callbacks_send_on)
{
    fly(50, 100);
    land(50, EINSUM_CLIENT_OK);
    ck_assert_uint_eq(rings_stats(site.context.rings).requests, 50 * 101);
}
END_TEST

START_TEST(callbacks_and_blocking_calls_mix)
{
    pthread_t thread;
    fly(20, 200);
    ck_assert_int_eq(pthread_create(&thread, NULL, call_often, NULL), 0);
    static struct tensors tensors;
    for (int i = 0; i < 300; i++)
        expect_call(&tensors, (uint8_t)i);
    pthread_join(thread, NULL);
    land(20, EINSUM_CLIENT_OK);
}
END_TEST

// The daemon has room for 12 in its batches: the others wait there, none is lost.
START_TEST(many_wait_and_none_is_lost)
{
    atomic_store(&held, true);
    fly(FLIGHTS, 0);
    usleep(20000);
    for (int i = 0; i < FLIGHTS; i++)
        ck_assert_int_eq(atomic_load(&flights[i].ended), 0);
    atomic_store(&held, false);
    batcher_wake(&site.waker);
    land(FLIGHTS, EINSUM_CLIENT_OK);
}
END_TEST

START_TEST(destroying_waits_for_what_is_in_flight)
{
    fly(FLIGHTS, 0);
    einsum_client_destroy(client);
    for (int i = 0; i < FLIGHTS; i++)
        ck_assert_int_eq(atomic_load(&flights[i].ended), 1);
    client = NULL;
}
END_TEST

// ---- memory

START_TEST(memory_is_given_out_once_and_taken_back)
{
    enum { N = 64, BYTES = 100000 };
    uint8_t *blocks[N];
    for (int round = 0; round < 3; round++) {
        int n = 0;
        while (n < N && (blocks[n] = einsum_client_memory_alloc(client, BYTES + (uint64_t)n)))
            memset(blocks[n], n, BYTES), n++;
        ck_assert_int_gt(n, 60);
        for (int i = 0; i < n; i++) {
            ck_assert_uint_eq((uintptr_t)blocks[i] % 64, 0);
            ck_assert_int_eq(blocks[i][0], i);
            ck_assert_int_eq(blocks[i][BYTES - 1], i);
        }
        for (int parity = 1; parity >= 0; parity--) // the odd ones first
            for (int i = parity; i < n; i += 2)
                einsum_client_memory_free(client, blocks[i]);
        einsum_client_memory_free(client, NULL);
    }
    ck_assert_ptr_null(einsum_client_memory_alloc(client, UINT64_MAX));
    ck_assert_ptr_null(einsum_client_memory_alloc(client, 9 << 20));
    uint8_t *whole = einsum_client_memory_alloc(client, 7 << 20);
    ck_assert_ptr_nonnull(whole);
    einsum_client_memory_free(client, whole);
}
END_TEST

// ---- a daemon that goes

START_TEST(a_daemon_that_goes_is_missed_and_found_again)
{
    static struct tensors tensors;
    struct tensors *shared = einsum_client_memory_alloc(client, sizeof *shared);
    expect_call(&tensors, 1);
    for (int round = 0; round < 3; round++) {
        site_stop_listening();
        struct einsum_client_error error;
        // Not by the ring: and by gRPC nobody is there.
        ck_assert_int_eq(call(&tensors, 2, &error), EINSUM_CLIENT_UNAVAILABLE);
        ck_assert(!error.from_server);
        ck_assert_int_eq(einsum_client_transport(client), EINSUM_CLIENT_TRANSPORT_UNIX);
        site_listen();
        WAIT_FOR(einsum_client_transport(client) == EINSUM_CLIENT_TRANSPORT_RING);
        expect_call(&tensors, 3);
        expect_call(shared, 4); // the same memory, registered anew
    }
}
END_TEST

START_TEST(what_is_in_flight_when_it_goes_is_told)
{
    einsum_client_destroy(client);
    client = connect_client(EINSUM_CLIENT_TRANSPORT_RING, 1);
    atomic_store(&held, true);
    fly(10, 0);
    struct batcher_stats stats;
    WAIT_FOR((batcher_stats(site.context.batcher, &stats), stats.jobs == 10));
    uv_async_send(&site.stop); // the sockets go, while the engine is at work
    land(10, EINSUM_CLIENT_UNAVAILABLE);
    atomic_store(&held, false);
    batcher_wake(&site.waker);
}
END_TEST

// With attempts left, they are sent again to the one that comes next.
START_TEST(what_was_in_flight_is_sent_again)
{
    einsum_client_destroy(client);
    client = connect_client(EINSUM_CLIENT_TRANSPORT_RING, 1000);
    atomic_store(&held, true);
    fly(10, 0);
    struct batcher_stats stats;
    WAIT_FOR((batcher_stats(site.context.batcher, &stats), stats.jobs == 10));
    uv_async_send(&site.stop);
    WAIT_FOR(einsum_client_transport(client) != EINSUM_CLIENT_TRANSPORT_RING);
    atomic_store(&held, false);
    batcher_wake(&site.waker);
    site_stop_listening();
    site_listen();
    land(10, EINSUM_CLIENT_OK);
}
END_TEST

START_TEST(a_daemon_that_hangs_is_given_up)
{
    einsum_client_destroy(client);
    client = connect_client(EINSUM_CLIENT_TRANSPORT_RING, 1);
    atomic_store(&held, true);
    static struct tensors tensors;
    struct einsum_client_request request = request_of(&tensors, 1, 9);
    struct einsum_client_response response;
    struct einsum_client_error error;
    request.deadline_ms = 50;
    ck_assert_int_eq(einsum_client_einsum(client, &request, &response, &error),
                     EINSUM_CLIENT_UNAVAILABLE);
    ck_assert(!error.from_server);
    atomic_store(&held, false);
    batcher_wake(&site.waker);
}
END_TEST

START_TEST(a_lying_daemon_is_not_believed)
{
    struct einsum_client_shared *shared = client->shared;
    static struct tensors tensors;
    expect_call(&tensors, 1);
    // Completions of what was never asked, and of nothing at all.
    static const uint64_t ids[] = {0, 1023, 1024, UINT64_MAX};
    for (size_t i = 0; i < ARRAY_LEN(ids); i++) {
        pthread_mutex_lock(&shared->lock); // the client reads under it
        shared->completions[shared->read & (shared->entries - 1)] =
            (struct einsum_ring_completion){.id = ids[i], .tokens = 1};
        einsum_ring_tell(&shared->header->complete_tail, shared->read + 1);
        pthread_mutex_unlock(&shared->lock);
        fly(1, 0); // it ends, well or not, and once
        WAIT_FOR(atomic_load(&flights[0].ended) == 1);
        usleep(10000);
        ck_assert_int_eq(atomic_load(&flights[0].ended), 1);
    }
}
END_TEST

START_TEST(who_insists_on_a_ring_hears_why_there_is_none)
{
    static const struct {
        const char *address;
        enum einsum_client_status status;
        const char *text;
    } cases[] = {
        {"unix:/nowhere/shared.sock", EINSUM_CLIENT_UNAVAILABLE, "cannot connect"},
        {"tcp:1", EINSUM_CLIENT_INVALID_ARGUMENT, "neither"},
        {"unix:relative", EINSUM_CLIENT_INVALID_ARGUMENT, "neither"},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct einsum_client_options options;
        struct einsum_client_error error;
        struct einsum_client *none;
        einsum_client_options_init(&options);
        options.shared_memory = cases[i].address;
        options.transport = EINSUM_CLIENT_TRANSPORT_RING;
        ck_assert_int_eq(einsum_client_create("unix:/nowhere/e.sock", &options, &none, &error),
                         cases[i].status);
        ck_assert_msg(strstr(error.text, cases[i].text) != NULL, "%s", error.text);
        ck_assert_ptr_null(none);
    }
    // Who does not insist goes by gRPC.
    struct einsum_client_options options;
    struct einsum_client *other;
    einsum_client_options_init(&options);
    options.shared_memory = "unix:/nowhere/shared.sock";
    ck_assert_int_eq(einsum_client_create("127.0.0.1:1", &options, &other, NULL), EINSUM_CLIENT_OK);
    ck_assert_int_eq(einsum_client_transport(other), EINSUM_CLIENT_TRANSPORT_TCP);
    ck_assert_ptr_null(einsum_client_memory_alloc(other, 64));
    einsum_client_destroy(other);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client_shared");
    TCase *calls = tcase_create("calls");
    tcase_set_timeout(calls, 120);
    tcase_add_checked_fixture(calls, set_up, tear_down);
    tcase_add_test(calls, blocking_calls_with_memory_of_either_kind);
    tcase_add_test(calls, errors_are_the_servers);
    tcase_add_test(calls, threads_share_a_client);
    tcase_add_test(calls, callbacks_send_on);
    tcase_add_test(calls, callbacks_and_blocking_calls_mix);
    tcase_add_test(calls, many_wait_and_none_is_lost);
    tcase_add_test(calls, destroying_waits_for_what_is_in_flight);
    tcase_add_test(calls, memory_is_given_out_once_and_taken_back);
    tcase_add_test(calls, a_daemon_that_goes_is_missed_and_found_again);
    tcase_add_test(calls, what_is_in_flight_when_it_goes_is_told);
    tcase_add_test(calls, what_was_in_flight_is_sent_again);
    tcase_add_test(calls, a_daemon_that_hangs_is_given_up);
    tcase_add_test(calls, a_lying_daemon_is_not_believed);
    tcase_add_test(calls, who_insists_on_a_ring_hears_why_there_is_none);
    suite_add_tcase(suite, calls);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed > 0;
}
