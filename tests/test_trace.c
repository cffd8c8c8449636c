// Goal: a traceparent is read as the W3C has it and no other way; and of requests that several threads
// submit, each is exported or counted as dropped, whatever the collector does.
#include <check.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/trace.h"

#define TRACE "4bf92f3577b34da6a3ce929d0e0e4736"
#define PARENT "00f067aa0ba902b7"

START_TEST(traceparent_is_read)
{
    static const char text[] = "00-" TRACE "-" PARENT "-01";
    struct trace_context context;
    ck_assert(trace_parse(text, strlen(text), &context));
    ck_assert(context.given && context.sampled);
    char hex[2 * TRACE_ID_BYTES + 1];
    trace_hex(context.trace_id, TRACE_ID_BYTES, hex);
    ck_assert_str_eq(hex, TRACE);
    trace_hex(context.parent_id, TRACE_SPAN_ID_BYTES, hex);
    ck_assert_str_eq(hex, PARENT);
}
END_TEST

// Any one character of it changed to what is no lower-case digit, or any length, makes it none.
START_TEST(no_other_is)
{
    static const char text[] = "00-" TRACE "-" PARENT "-01";
    const size_t bytes = strlen(text);
    struct trace_context context, before;
    memset(&context, 0x55, sizeof context);
    before = context;
    for (size_t i = 0; i < bytes; i++) {
        static const char wrong[] = "gA _\xff";
        for (const char *c = wrong; c < wrong + sizeof wrong; c++) { // the terminator as well
            char changed[sizeof text];
            memcpy(changed, text, sizeof text);
            changed[i] = *c;
            ck_assert(!trace_parse(changed, bytes, &context));
        }
    }
    for (size_t n = 0; n < bytes; n++) {
        char *exact = malloc(n + 1); // so that a reader past the end is found out
        memcpy(exact, text, n);
        ck_assert(!trace_parse(exact, n, &context));
        free(exact);
    }
    ck_assert_mem_eq(&context, &before, sizeof context);
}
END_TEST

enum { THREADS = 6, SUBMITS = 3000 };

static void *submit_all(void *tracer)
{
    for (int i = 0; i < SUBMITS; i++) {
        struct trace_request request = {.context.sampled = true,
                                        .method = "einsum.v1.Einsum/Einsum",
                                        .transport = "unary",
                                        .error = "\xff not UTF-8",
                                        .status = STATUS_INTERNAL,
                                        .start_ns = now_ns()};
        request.end_ns = request.start_ns + 1000;
        struct trace_context context = {0};
        ck_assert(tracer_takes(tracer, &context, request.span_id));
        request.context = context;
        tracer_submit(tracer, &request);
    }
    return NULL;
}

START_TEST(every_request_is_accounted_for)
{
    // Nobody listens there.
    const struct tracer_options options = {
        .endpoint = "http://127.0.0.1:9/v1/traces", .sample = 1, .engine = "null"};
    struct tracer *tracer;
    struct error err;
    ck_assert_uint_eq(tracer_create(&options, &tracer, &err), STATUS_OK);
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, submit_all, tracer), 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    struct tracer_stats stats = {0};
    for (int i = 0; i < 1000 && stats.dropped_queue + stats.dropped_export < THREADS * SUBMITS;
         i++) {
        usleep(20000);
        stats = tracer_stats(tracer);
    }
    ck_assert_uint_eq(stats.exported, 0);
    ck_assert_uint_eq(stats.dropped_queue + stats.dropped_export, THREADS * SUBMITS);
    ck_assert_uint_gt(stats.dropped_export, 0);
    tracer_destroy(tracer);
}
END_TEST

START_TEST(who_is_traced)
{
    const struct tracer_options options = {
        .endpoint = "http://127.0.0.1:9/v1/traces", .sample = 3, .engine = "null"};
    struct tracer *tracer;
    struct error err;
    uint8_t span_id[TRACE_SPAN_ID_BYTES], other_id[TRACE_SPAN_ID_BYTES];
    ck_assert_uint_eq(tracer_create(&options, &tracer, &err), STATUS_OK);
    int taken = 0;
    for (int i = 0; i < 9; i++) {
        struct trace_context none = {0};
        taken += tracer_takes(tracer, &none, span_id);
    }
    ck_assert_int_eq(taken, 3);
    struct trace_context unsampled = {.given = true}, sampled = {.given = true, .sampled = true};
    ck_assert(!tracer_takes(tracer, &unsampled, span_id));
    ck_assert(tracer_takes(tracer, &sampled, span_id));
    ck_assert(tracer_takes(tracer, &sampled, other_id));
    ck_assert_mem_ne(span_id, other_id, sizeof span_id);
    ck_assert(!tracer_takes(NULL, &sampled, span_id));
    ck_assert_uint_eq(tracer_stats(NULL).exported, 0);
    tracer_destroy(tracer);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("trace");
    TCase *tests = tcase_create("trace");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, traceparent_is_read);
    tcase_add_test(tests, no_other_is);
    tcase_add_test(tests, every_request_is_accounted_for);
    tcase_add_test(tests, who_is_traced);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
