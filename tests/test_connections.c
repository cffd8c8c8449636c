// What each connection has, and how it ends. Method: callers that come and go, looked at by number.
#include <check.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "server/connections.h"

enum {
    NUMBERS = 8,
    A = 3,
    B = 5,
    THREADS = 4,
    ROUNDS = 50000,
};

static struct connections *connections;

static void set_up(void)
{
    connections = connections_create(NUMBERS);
    ck_assert_ptr_nonnull(connections);
}

static void tear_down(void)
{
    connections_destroy(connections);
}

static void comes(uint32_t number)
{
    connections_expect(connections, number, NULL);
    ck_assert(connections_add(connections, number, NULL));
    ck_assert_uint_eq(connections_next(connections), number);
}

static enum connections_call begins(bool through_proxy)
{
    return connections_call_began(connections, A, through_proxy);
}

static bool ends(bool through_proxy)
{
    return connections_call_ended(connections, A, through_proxy);
}

static bool leaves_idle(void)
{
    return connections_leave_idle(connections, A);
}

static void has_had_a_call(bool through_proxy)
{
    ck_assert_int_eq(begins(through_proxy), CONNECTION_STAYS);
    ck_assert(!ends(through_proxy));
}

// ---- coming

START_TEST(queue_is_in_order)
{
    ck_assert(!connections_waiting(connections));
    ck_assert_uint_eq(connections_next(connections), 0);
    const uint32_t order[] = {A, B, 1, A, B};
    for (int first = 0; first < 3; first++) {
        for (int i = first; i < first + 3; i++)
            ck_assert(connections_add(connections, order[i], NULL));
        for (int i = first; i < first + 3; i++) {
            ck_assert(connections_waiting(connections));
            ck_assert_uint_eq(connections_next(connections), order[i]);
        }
        ck_assert(!connections_waiting(connections));
    }
}
END_TEST

START_TEST(queue_goes_on_between)
{
    ck_assert(connections_add(connections, A, NULL));
    ck_assert(connections_add(connections, B, NULL));
    ck_assert_uint_eq(connections_next(connections), A);
    ck_assert(connections_add(connections, 1, NULL));
    ck_assert_uint_eq(connections_next(connections), B);
    ck_assert_uint_eq(connections_next(connections), 1);
    ck_assert_uint_eq(connections_next(connections), 0);
}
END_TEST

START_TEST(numbers_are_of_sockets)
{
    ck_assert_uint_eq(connection_number(0), 1);
    ck_assert_int_eq(connection_fd(connection_number(7)), 7);
}
END_TEST

START_TEST(no_such_number)
{
    const uint32_t none[] = {NUMBERS, UINT32_MAX};
    for (int i = 0; i < 2; i++) {
        connections_expect(connections, none[i], NULL);
        ck_assert(!connections_add(connections, none[i], NULL));
        connections_close(connections);
        ck_assert_int_eq(connections_call_began(connections, none[i], true), CONNECTION_STAYS);
        ck_assert(!connections_call_ended(connections, none[i], false));
        ck_assert(!connections_leave_idle(connections, none[i]));
        ck_assert_uint_eq(connections_calls(connections, none[i]), 0);
        ck_assert_uint_eq(connections_admit(connections, none[i]), 0);
        ck_assert_uint_eq(connections_admitted(connections, none[i]), 0);
        connections_unadmit(connections, none[i]);
        ck_assert_uint_eq(connections_request_began(connections, none[i]), 0);
        connections_request_ended(connections, none[i]);
        connections_settle(connections, none[i], 1);
        ck_assert_uint_eq(connections_settled(connections, none[i]), UINT64_MAX);
        connections_fault(connections, none[i]);
        ck_assert_uint_eq(connections_faults(connections, none[i]), 0);
        connections_set_channelz(connections, none[i], 1);
        ck_assert_int_eq(connections_channelz(connections, none[i]), 0);
        ck_assert_ptr_null(connections_peer(connections, none[i]));
    }
    ck_assert(!connections_waiting(connections));
}
END_TEST

// ---- going

START_TEST(stays_while_nothing_closes)
{
    comes(A);
    for (int through_proxy = 0; through_proxy < 2; through_proxy++)
        has_had_a_call(through_proxy);
    ck_assert_uint_eq(connections_calls(connections, A), 2);
}
END_TEST

START_TEST(ends_with_its_last_call)
{
    comes(A);
    ck_assert_int_eq(begins(false), CONNECTION_STAYS);
    ck_assert_int_eq(begins(false), CONNECTION_STAYS);
    connections_close(connections);
    ck_assert(!ends(false));
    ck_assert(ends(false));
    ck_assert_int_eq(begins(false), CONNECTION_LEAVES);
    ck_assert(!ends(false)); // once
    ck_assert(!leaves_idle());
    ck_assert(!leaves_idle());
}
END_TEST

START_TEST(another_of_the_number_stays)
{
    comes(A);
    connections_close(connections);
    ck_assert_int_eq(begins(false), CONNECTION_STAYS);
    ck_assert(ends(false));
    comes(A);
    ck_assert_int_eq(begins(false), CONNECTION_STAYS);
    ck_assert(ends(false));
}
END_TEST

START_TEST(through_a_proxy_ends_instead_of_a_reply)
{
    comes(A);
    ck_assert_int_eq(begins(true), CONNECTION_STAYS);
    connections_close(connections);
    ck_assert(!ends(true)); // the end could meet the reply
    ck_assert_int_eq(begins(true), CONNECTION_ENDS);
    ck_assert_int_eq(begins(true), CONNECTION_LEAVES);
    ck_assert(!ends(true));
    ck_assert(!ends(true));
    ck_assert(!leaves_idle());
    ck_assert(!leaves_idle());
}
END_TEST

START_TEST(through_a_proxy_beside_others_goes_on)
{
    comes(A);
    ck_assert_int_eq(begins(true), CONNECTION_STAYS);
    connections_close(connections);
    ck_assert_int_eq(begins(true), CONNECTION_STAYS); // a reply to the first may be under way
    ck_assert(!ends(true));
    ck_assert(!ends(true));
    ck_assert_int_eq(begins(true), CONNECTION_ENDS);
}
END_TEST

START_TEST(idle_from_one_look_to_the_next)
{
    comes(A);
    has_had_a_call(true);
    connections_close(connections);
    ck_assert(!leaves_idle()); // the call may have ended this moment
    ck_assert(leaves_idle());
    ck_assert(!leaves_idle()); // once
    ck_assert_int_eq(begins(true), CONNECTION_LEAVES);
}
END_TEST

START_TEST(idle_with_a_call_between_looks)
{
    comes(A);
    ck_assert(!leaves_idle());
    has_had_a_call(true);
    ck_assert(!leaves_idle());
    ck_assert_int_eq(begins(true), CONNECTION_STAYS);
    ck_assert(!leaves_idle());
    ck_assert(!leaves_idle()); // still open
    ck_assert(!ends(true));
    ck_assert(leaves_idle());
}
END_TEST

START_TEST(idle_from_the_start)
{
    comes(A);
    ck_assert(!leaves_idle()); // its first call may be on the way
    ck_assert(leaves_idle());
    comes(A);
    ck_assert(!leaves_idle());
    ck_assert_int_eq(begins(false), CONNECTION_STAYS);
}
END_TEST

// Whoever ends it, only one does, and never while a call is open that was not refused.
static _Atomic int ended, served;

static void *calls_on_and_on(void *through_proxy)
{
    bool proxy = through_proxy != NULL;
    for (int i = 0; i < ROUNDS; i++) {
        if (i == ROUNDS / 2)
            connections_close(connections);
        enum connections_call began = begins(proxy);
        if (began == CONNECTION_STAYS) {
            ck_assert_int_eq(atomic_load(&ended), 0);
            atomic_fetch_add(&served, 1);
        } else if (began == CONNECTION_ENDS) {
            atomic_fetch_add(&ended, 1);
        }
        if (ends(proxy))
            atomic_fetch_add(&ended, 1);
    }
    return NULL;
}

START_TEST(ends_once_whoever_ends_it)
{
    atomic_store(&ended, 0);
    atomic_store(&served, 0);
    comes(A);
    pthread_t threads[THREADS];
    for (uintptr_t i = 0; i < THREADS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, calls_on_and_on, (void *)(i % 2)), 0);
    while (atomic_load(&served) == 0)
        sched_yield();
    for (int i = 0; i < ROUNDS && atomic_load(&ended) == 0; i++)
        if (leaves_idle())
            atomic_fetch_add(&ended, 1);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++)
        if (leaves_idle())
            atomic_fetch_add(&ended, 1);
    ck_assert_int_eq(atomic_load(&ended), 1);
    ck_assert_uint_eq(connections_calls(connections, A), (uint64_t)THREADS * ROUNDS);
}
END_TEST

// ---- what is open, what came

START_TEST(open_ones_are_counted)
{
    comes(A);
    ck_assert_uint_eq(connections_admit(connections, A), 0);
    ck_assert_uint_eq(connections_admit(connections, A), 1);
    ck_assert_uint_eq(connections_admitted(connections, A), 2);
    connections_unadmit(connections, A);
    ck_assert_uint_eq(connections_admitted(connections, A), 1);
    ck_assert_uint_eq(connections_admitted(connections, B), 0);
    ck_assert_uint_eq(connections_request_began(connections, A), 0);
    ck_assert_uint_eq(connections_request_began(connections, A), 1);
    connections_request_ended(connections, A);
    ck_assert_uint_eq(connections_request_began(connections, A), 1);
    ck_assert_uint_eq(connections_request_began(connections, B), 0);
}
END_TEST

START_TEST(faults_begin_anew_but_beside)
{
    static _Atomic uint64_t beside;
    connections_expect(connections, A, &beside);
    ck_assert(connections_add(connections, A, NULL));
    begins(false);
    connections_fault(connections, A);
    connections_fault(connections, A);
    ck_assert_uint_eq(connections_faults(connections, A), 2);
    ck_assert_uint_eq(atomic_load(&beside), 2);
    connections_expect(connections, A, NULL);
    ck_assert_uint_eq(connections_faults(connections, A), 0);
    ck_assert_uint_eq(connections_calls(connections, A), 0);
    connections_fault(connections, A);
    ck_assert_uint_eq(connections_faults(connections, A), 1);
    ck_assert_uint_eq(atomic_load(&beside), 2);
}
END_TEST

START_TEST(settled_bytes_grow_on)
{
    comes(A);
    connections_settle(connections, A, 10);
    connections_settle(connections, A, 5);
    ck_assert_uint_eq(connections_settled(connections, A), 15);
    comes(A); // who looks at them takes the difference
    ck_assert_uint_eq(connections_settled(connections, A), 15);
    ck_assert_uint_eq(connections_settled(connections, B), 0);
}
END_TEST

START_TEST(channelz_number_is_the_last_ones)
{
    comes(A);
    ck_assert_int_eq(connections_channelz(connections, A), 0);
    connections_set_channelz(connections, A, 42);
    ck_assert_int_eq(connections_channelz(connections, A), 42);
    comes(A);
    ck_assert_int_eq(connections_channelz(connections, A), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("connections");
    TCase *tcase = tcase_create("connections");
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, queue_is_in_order);
    tcase_add_test(tcase, queue_goes_on_between);
    tcase_add_test(tcase, numbers_are_of_sockets);
    tcase_add_test(tcase, no_such_number);
    tcase_add_test(tcase, stays_while_nothing_closes);
    tcase_add_test(tcase, ends_with_its_last_call);
    tcase_add_test(tcase, another_of_the_number_stays);
    tcase_add_test(tcase, through_a_proxy_ends_instead_of_a_reply);
    tcase_add_test(tcase, through_a_proxy_beside_others_goes_on);
    tcase_add_test(tcase, idle_from_one_look_to_the_next);
    tcase_add_test(tcase, idle_with_a_call_between_looks);
    tcase_add_test(tcase, idle_from_the_start);
    tcase_add_test(tcase, ends_once_whoever_ends_it);
    tcase_add_test(tcase, open_ones_are_counted);
    tcase_add_test(tcase, faults_begin_anew_but_beside);
    tcase_add_test(tcase, settled_bytes_grow_on);
    tcase_add_test(tcase, channelz_number_is_the_last_ones);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
