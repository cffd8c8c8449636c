// Goal: job_advance takes exactly the steps of job.h's table, and notices a job that is not where
// its owner thinks it is. Method: every pair of states; the wrong ones must abort.
#include <check.h>
#include <signal.h>

#include "server/job.h"

enum { STATES = JOB_REPLYING + 1, PAIRS = STATES * STATES };

static const char *const allowed[STATES] = {
    // to: IDLE, WAITING, DECODING, QUEUED, RUNNING, DONE, REPLYING
    [JOB_IDLE] = ".xx....",     [JOB_WAITING] = "..x..x.", [JOB_DECODING] = "x..x...",
    [JOB_QUEUED] = "....xx.",   [JOB_RUNNING] = ".....x.", [JOB_DONE] = "x.....x",
    [JOB_REPLYING] = "x......",
};

// Pairs of states, each (from * STATES + to), by whether the table has them.
static int right[PAIRS], wrong[PAIRS];
static int right_n, wrong_n;

static void sort_pairs(void)
{
    for (int pair = 0; pair < PAIRS; pair++) {
        if (allowed[pair / STATES][pair % STATES] == 'x')
            right[right_n++] = pair;
        else
            wrong[wrong_n++] = pair;
    }
}

static void advance(struct job *job, int pair)
{
    enum job_state from = (enum job_state)(pair / STATES), to = (enum job_state)(pair % STATES);
    atomic_store(&job->state, from);
    job_advance(job, from, to);
}

START_TEST(takes_every_step_of_the_table)
{
    struct job job = {.state = JOB_IDLE};
    advance(&job, right[_i]);
    ck_assert_int_eq((int)atomic_load(&job.state), right[_i] % STATES);
}
END_TEST

START_TEST(aborts_on_any_other_step)
{
    struct job job = {.state = JOB_IDLE};
    advance(&job, wrong[_i]);
}
END_TEST

START_TEST(aborts_when_the_job_is_elsewhere)
{
    struct job job = {.state = JOB_RUNNING};
    job_advance(&job, JOB_QUEUED, JOB_RUNNING);
}
END_TEST

START_TEST(aborts_on_a_state_that_is_none)
{
    struct job job = {.state = JOB_IDLE};
    job_advance(&job, JOB_IDLE, (enum job_state)(_i ? STATES : 77));
}
END_TEST

START_TEST(counts_where_a_request_spent_its_time)
{
    struct weight weight = {0};
    struct job job = {.weight = &weight,
                      .received_ns = 100,
                      .queued_ns = 130,
                      .launched_ns = 170,
                      .done_ns = 250};
    job_count(&job, STATUS_OK);
    job_count(&job, STATUS_OK);
    ck_assert_uint_eq(weight.counters.answered, 2);
    ck_assert_uint_eq(weight.counters.fill_ns, 2 * 30);
    ck_assert_uint_eq(weight.counters.queue_ns, 2 * 40);
    ck_assert_uint_eq(weight.counters.run_ns, 2 * 80);
    ck_assert_uint_gt(weight.counters.answered_ns, 2 * 150);
    ck_assert_uint_gt(weight.counters.last_ms, 0);
    ck_assert_uint_eq(weight.counters.failed, 0);
}
END_TEST

START_TEST(counts_what_came_to_nothing)
{
    struct weight weight = {0};
    struct job job = {.weight = &weight, .received_ns = 100};
    job_count(&job, STATUS_DEADLINE_EXCEEDED);
    ck_assert_uint_eq(weight.counters.failed, 1);
    ck_assert_uint_gt(weight.counters.failed_ns, 0);
    ck_assert_uint_eq(weight.counters.answered, 0);
    // Not what was never accepted.
    job.received_ns = 0;
    job_count(&job, STATUS_INVALID_ARGUMENT);
    job = (struct job){.received_ns = 100};
    job_count(&job, STATUS_NOT_FOUND);
    ck_assert_uint_eq(weight.counters.failed, 1);
}
END_TEST

int main(void)
{
    sort_pairs();
    Suite *suite = suite_create("job");
    SRunner *runner = srunner_create(suite);
    TCase *steps = tcase_create("steps");
    tcase_add_loop_test(steps, takes_every_step_of_the_table, 0, right_n);
    suite_add_tcase(suite, steps);
    TCase *counts = tcase_create("counts");
    tcase_add_test(counts, counts_where_a_request_spent_its_time);
    tcase_add_test(counts, counts_what_came_to_nothing);
    suite_add_tcase(suite, counts);
    if (srunner_fork_status(runner) == CK_FORK) { // an abort ends the process
        TCase *aborts = tcase_create("aborts");
        tcase_add_loop_test_raise_signal(aborts, aborts_on_any_other_step, SIGABRT, 0, wrong_n);
        tcase_add_test_raise_signal(aborts, aborts_when_the_job_is_elsewhere, SIGABRT);
        tcase_add_loop_test_raise_signal(aborts, aborts_on_a_state_that_is_none, SIGABRT, 0, 2);
        suite_add_tcase(suite, aborts);
    }
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
