// Goal: what threads add is what is read, whether they have a shard of their own or share one, and
// a time lands in the bucket that holds it.
#include <check.h>
#include <pthread.h>
#include <stdlib.h>

#include "server/metrics.h"

enum { THREADS = 100, ADDS = 2000 }; // more threads than shards

static struct metrics *metrics;

static void make(void)
{
    struct error err;
    ck_assert_uint_eq(metrics_create(&metrics, &err), STATUS_OK);
}

static void destroy(void)
{
    metrics_destroy(metrics);
}

static void *add_all(void *argument)
{
    for (int i = 0; i < ADDS; i++) {
        METRICS_ADD(metrics, received, 1);
        METRICS_ADD(metrics, streams_ended, 3);
        metrics_count_request(metrics, METRICS_OUTPUT_PROJECT, METRICS_RING, STATUS_NOT_FOUND);
        metrics_count_call(metrics, METRICS_CALLS_MAX - 1, STATUS_UNAUTHENTICATED);
        metrics_observe_duration(metrics, METRICS_EINSUM, 10000);
        metrics_observe_phase(metrics, METRICS_SEND, UINT64_C(20000000000));
    }
    return argument;
}

START_TEST(threads_add_up)
{
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, add_all, NULL), 0);
    struct metrics_values values, before = {0};
    for (int i = 0; i < 50; i++) { // a reader meanwhile: nothing goes back
        metrics_read(metrics, &values);
        ck_assert_uint_ge(values.received, before.received);
        ck_assert_uint_ge(values.durations[METRICS_EINSUM].buckets[0],
                          before.durations[METRICS_EINSUM].buckets[0]);
        before = values;
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    const uint64_t n = (uint64_t)THREADS * ADDS;
    metrics_read(metrics, &values);
    struct metrics_values expected = {.received = n, .streams_ended = 3 * n};
    expected.requests[METRICS_OUTPUT_PROJECT][METRICS_RING][STATUS_NOT_FOUND] = n;
    expected.calls[METRICS_CALLS_MAX - 1][STATUS_UNAUTHENTICATED] = n;
    expected.durations[METRICS_EINSUM].buckets[0] = n;
    expected.durations[METRICS_EINSUM].sum_ns = n * 10000;
    expected.phases[METRICS_SEND].buckets[METRICS_TIME_BOUNDS] = n;
    expected.phases[METRICS_SEND].sum_ns = n * UINT64_C(20000000000);
    ck_assert_mem_eq(&values, &expected, sizeof values);
}
END_TEST

START_TEST(times_land_in_their_bucket)
{
    for (size_t i = 0; i < METRICS_TIME_BOUNDS; i++) {
        struct metrics_histogram histogram = {0};
        uint64_t bound = metrics_time_bounds_ns[i];
        metrics_observe_locked(&histogram, bound); // its upper end belongs to a bucket
        metrics_observe_locked(&histogram, bound - 1);
        metrics_observe_locked(&histogram, bound + 1);
        ck_assert_uint_eq(histogram.buckets[i], 2);
        ck_assert_uint_eq(histogram.buckets[i + 1], 1);
        ck_assert_uint_eq(histogram.sum_ns, 3 * bound);
        if (i > 0)
            ck_assert_uint_gt(bound, metrics_time_bounds_ns[i - 1]);
    }
    struct metrics_histogram histogram = {0};
    metrics_observe_locked(&histogram, 0);
    ck_assert_uint_eq(histogram.buckets[0], 1);
}
END_TEST

START_TEST(ends_by_what_they_mean)
{
    for (unsigned status = 0; status < METRICS_STATUSES; status++)
        metrics_count_request(metrics, METRICS_EINSUM, METRICS_UNARY, (enum status)status);
    metrics_count_request(metrics, METRICS_EINSUM, METRICS_RING, (enum status)99);
    for (int i = 0; i < 10; i++)
        metrics_count_request(metrics, METRICS_OUTPUT_PROJECT, METRICS_STREAM, STATUS_OK);
    struct metrics_values values;
    metrics_read(metrics, &values);
    struct metrics_ends ends = metrics_ends(&values);
    ck_assert_uint_eq(ends.answered, 11);
    ck_assert_uint_eq(ends.refused, 2);   // RESOURCE_EXHAUSTED, UNAVAILABLE
    ck_assert_uint_eq(ends.expired, 1);   // DEADLINE_EXCEEDED
    ck_assert_uint_eq(ends.cancelled, 2); // CANCELLED, ABORTED
    ck_assert_uint_eq(ends.failed, 4);    // UNKNOWN and what is no status, INTERNAL, DATA_LOSS
    ck_assert_uint_eq(ends.invalid, METRICS_STATUSES - 1 - 2 - 1 - 2 - 3);
}
END_TEST

START_TEST(calls_have_names)
{
    ck_assert_str_eq(metrics_call_name(metrics, 0), "_OTHER");
    for (uint32_t i = 1; i < METRICS_CALLS_MAX; i++)
        ck_assert_uint_eq(metrics_add_call(metrics, "/a/B"), i);
    ck_assert_uint_eq(metrics_add_call(metrics, "/one/TooMany"), 0);
    ck_assert_uint_eq(metrics_calls_n(metrics), METRICS_CALLS_MAX);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("metrics");
    TCase *tests = tcase_create("metrics");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, make, destroy);
    tcase_add_test(tests, threads_add_up);
    tcase_add_test(tests, times_land_in_their_bucket);
    tcase_add_test(tests, ends_by_what_they_mean);
    tcase_add_test(tests, calls_have_names);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
