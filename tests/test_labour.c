// When gRPC labours for nothing: what rpc threads have spent in it, against the bytes that all of them have
// moved. Method: threads that are looked at every millisecond, on a clock of the test's own.
#include <check.h>
#include <string.h>

#include "server/guard.h"
#include "server/labour.h"
#include "server/rpc.h"

enum {
    THREADS = 3,
    MS = 1000000,     // in nanoseconds
    A_MS = 512 << 10, // bytes that are enough for one thread's millisecond
    LITTLE = 1 << 20,
    NEVER = 3000,
};

static struct labour labours[THREADS];
static struct rpc_progress progress[THREADS];
static struct guard_traffic traffic;
static struct labour_look look;
static bool busy[THREADS];    // all the time
static uint64_t bytes_a_ms;   // of all
static bool by_a_unix_socket; // some of them

static const int others[] = {0, 2}; // threads looked at before the busy one, and after

static bool look_after(uint64_t ns)
{
    look.now_ns += ns;
    traffic.moved += bytes_a_ms * ns / MS;
    if (by_a_unix_socket)
        traffic.uncounted_ns = look.now_ns;
    for (int i = 0; i < THREADS; i++)
        progress[i].cpu_ns += busy[i] ? ns : 0;
    return labour_is_stuck(labours, THREADS, &look);
}

// After how many milliseconds; NEVER: not in these.
static int stuck_after(void)
{
    int ms = 1;
    while (ms < NEVER && !look_after(MS))
        ms++;
    return ms;
}

static void labours_for(int ms)
{
    while (ms-- > 0)
        ck_assert(!look_after(MS));
}

// One thread has something to do from now on, the others wait for events.
static void setup(void)
{
    memset(labours, 0, sizeof labours);
    memset(progress, 0, sizeof progress);
    memset(busy, 0, sizeof busy);
    traffic = (struct guard_traffic){.moved = 1ull << 40};
    look = (struct labour_look){
        .progress = progress,
        .traffic = &traffic,
        .owed_bytes = LITTLE + 1,
        .now_ns = 1000000ull * MS,
    };
    bytes_a_ms = 0;
    by_a_unix_socket = false;
    for (int i = 0; i < THREADS; i++) {
        progress[i].within_grpc = true;
        progress[i].events = 1000;
        progress[i].cpu_ns = 5000ull * MS;
    }
    ck_assert(!look_after(MS));
    busy[1] = true;
}

// ---- one thread

START_TEST(stuck_after_100_ms)
{
    ck_assert_int_eq(stuck_after(), 100);
}
END_TEST

START_TEST(an_event_begins_anew)
{
    labours_for(99);
    progress[1].events++;
    ck_assert(!look_after(MS));
    ck_assert_int_eq(stuck_after(), 100);
}
END_TEST

START_TEST(leaving_grpc_begins_anew)
{
    labours_for(99);
    progress[1].within_grpc = false;
    labours_for(500); // ours, however long
    progress[1].within_grpc = true;
    ck_assert_int_eq(stuck_after(), 100);
}
END_TEST

START_TEST(an_idle_thread_begins_anew)
{
    labours_for(90);
    busy[1] = false;
    progress[1].cpu_ns += 2 * MS - 1;
    ck_assert(!look_after(100 * MS)); // less than a fiftieth
    busy[1] = true;
    ck_assert_int_eq(stuck_after(), 100);
}
END_TEST

// It counts CPU, not time: others of the machine may have that.
START_TEST(a_thread_that_hardly_runs_labours_on)
{
    labours_for(90);
    busy[1] = false;
    progress[1].cpu_ns += 2 * MS;
    ck_assert(!look_after(100 * MS)); // a fiftieth
    busy[1] = true;
    ck_assert_int_eq(stuck_after(), 8);
}
END_TEST

START_TEST(who_owes_little_is_never_stuck)
{
    look.owed_bytes = LITTLE;
    ck_assert_int_eq(stuck_after(), NEVER);
    look.owed_bytes = 0;
    ck_assert_int_eq(stuck_after(), NEVER);
}
END_TEST

START_TEST(what_was_spent_while_little_was_owed_counts)
{
    look.owed_bytes = LITTLE;
    labours_for(300);
    look.owed_bytes++;
    ck_assert_int_eq(stuck_after(), 1);
    // From when it last was idle.
    look.owed_bytes = LITTLE;
    busy[1] = false;
    labours_for(100);
    busy[1] = true;
    labours_for(60);
    look.owed_bytes++;
    ck_assert_int_eq(stuck_after(), 40);
}
END_TEST

// ---- bytes

START_TEST(bytes_enough)
{
    bytes_a_ms = A_MS;
    ck_assert_int_eq(stuck_after(), NEVER);
}
END_TEST

START_TEST(bytes_too_few)
{
    bytes_a_ms = A_MS - 1;
    ck_assert_int_eq(stuck_after(), 100);
}
END_TEST

START_TEST(bytes_that_stop)
{
    bytes_a_ms = 2 * A_MS;
    labours_for(100);
    bytes_a_ms = 0;
    ck_assert_int_eq(stuck_after(), 101); // 201 ms on bytes for 200
}
END_TEST

START_TEST(bytes_from_before_do_not_count)
{
    bytes_a_ms = 1000 * A_MS;
    labours_for(50);
    progress[1].events++;
    ck_assert(!look_after(MS));
    bytes_a_ms = 0;
    ck_assert_int_eq(stuck_after(), 100);
}
END_TEST

// ---- who owes most

// As a message's sender is told of the room for more.
START_TEST(who_is_sent_something_is_not_stuck)
{
    bytes_a_ms = A_MS - 1;
    for (int i = 0; i < 20; i++) {
        labours_for(99);
        look.sent_ns = look.now_ns + MS;
        ck_assert(!look_after(MS));
    }
}
END_TEST

START_TEST(what_was_sent_before_does_not_count)
{
    look.sent_ns = look.now_ns;
    ck_assert_int_eq(stuck_after(), 100);
    setup();
    labours_for(50);
    progress[1].events++;
    look.sent_ns = look.now_ns + MS;
    ck_assert(!look_after(MS));
    ck_assert_int_eq(stuck_after(), 100);
}
END_TEST

// Replies to earlier calls may go on for as long as their caller likes.
START_TEST(who_is_sent_something_for_ever)
{
    bytes_a_ms = A_MS / 8 - 1;
    look.sent_ns = UINT64_MAX;
    ck_assert_int_eq(stuck_after(), 1000);
    setup();
    bytes_a_ms = A_MS / 8;
    look.sent_ns = UINT64_MAX;
    ck_assert_int_eq(stuck_after(), NEVER);
}
END_TEST

// The one that began first has had nothing sent since; another that began later has.
START_TEST(since_the_longest_began)
{
    labours_for(60);
    busy[others[_i]] = true;
    look.sent_ns = look.now_ns - 60 * MS;
    ck_assert_int_eq(stuck_after(), 40);
    setup();
    labours_for(60);
    busy[others[_i]] = true;
    look.sent_ns = look.now_ns - 59 * MS;
    ck_assert_int_eq(stuck_after(), 1000 - 60);
}
END_TEST

// ---- several threads

START_TEST(times_of_all_against_bytes_of_all)
{
    bytes_a_ms = A_MS * 3 / 2;
    ck_assert_int_eq(stuck_after(), NEVER); // enough for one
    setup();
    bytes_a_ms = A_MS * 3 / 2;
    busy[2] = true;
    ck_assert_int_eq(stuck_after(), 100); // none has spent more than that
    setup();
    bytes_a_ms = A_MS * 2;
    busy[2] = true;
    ck_assert_int_eq(stuck_after(), NEVER);
}
END_TEST

// Another one begins later.
START_TEST(the_longest_is_what_counts)
{
    labours_for(60);
    busy[others[_i]] = true;
    ck_assert_int_eq(stuck_after(), 40);
}
END_TEST

// Another one begins when there have been bytes for 200 ms, and nobody knows whose they were.
START_TEST(bytes_since_the_first_began)
{
    bytes_a_ms = 4 * A_MS;
    labours_for(50);
    bytes_a_ms = 1000; // hardly any more
    busy[others[_i]] = true;
    ck_assert_int_eq(stuck_after(), 76); // 126 ms and 76
}
END_TEST

// ---- suspects, unix sockets

START_TEST(a_suspect_after_5_ms)
{
    look.suspect = true;
    ck_assert_int_eq(stuck_after(), 5);
    setup();
    look.suspect = true;
    bytes_a_ms = A_MS;
    ck_assert_int_eq(stuck_after(), NEVER);
}
END_TEST

// The kernel does not count these.
START_TEST(beside_unix_sockets_after_a_second)
{
    by_a_unix_socket = true;
    look.suspect = _i == 1;
    ck_assert_int_eq(stuck_after(), 1000);
}
END_TEST

START_TEST(unix_sockets_count_for_a_second)
{
    traffic.uncounted_ns = look.now_ns - 700 * MS;
    look.suspect = _i == 1;
    ck_assert_int_eq(stuck_after(), 300);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("labour");
    TCase *tests = tcase_create("labour");
    tcase_add_checked_fixture(tests, setup, NULL);
    tcase_add_test(tests, stuck_after_100_ms);
    tcase_add_test(tests, an_event_begins_anew);
    tcase_add_test(tests, leaving_grpc_begins_anew);
    tcase_add_test(tests, an_idle_thread_begins_anew);
    tcase_add_test(tests, a_thread_that_hardly_runs_labours_on);
    tcase_add_test(tests, who_owes_little_is_never_stuck);
    tcase_add_test(tests, what_was_spent_while_little_was_owed_counts);
    tcase_add_test(tests, bytes_enough);
    tcase_add_test(tests, bytes_too_few);
    tcase_add_test(tests, bytes_that_stop);
    tcase_add_test(tests, bytes_from_before_do_not_count);
    tcase_add_test(tests, who_is_sent_something_is_not_stuck);
    tcase_add_test(tests, what_was_sent_before_does_not_count);
    tcase_add_test(tests, who_is_sent_something_for_ever);
    tcase_add_loop_test(tests, since_the_longest_began, 0, ARRAY_LEN(others));
    tcase_add_test(tests, times_of_all_against_bytes_of_all);
    tcase_add_loop_test(tests, the_longest_is_what_counts, 0, ARRAY_LEN(others));
    tcase_add_loop_test(tests, bytes_since_the_first_began, 0, ARRAY_LEN(others));
    tcase_add_test(tests, a_suspect_after_5_ms);
    tcase_add_loop_test(tests, beside_unix_sockets_after_a_second, 0, 2);
    tcase_add_loop_test(tests, unix_sockets_count_for_a_second, 0, 2);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
