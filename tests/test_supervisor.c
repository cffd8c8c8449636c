// What a supervisor is told, byte by byte; that the daemon tells it in time is the integration
// tests' to find out.
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "server/base.h"
#include "server/supervisor.h"

static int supervisor = -1;

static void listen_to_all(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "@einsumd-test-%d", (int)getpid());
    setenv("NOTIFY_SOCKET", address.sun_path, 1);
    socklen_t bytes =
        (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(address.sun_path));
    address.sun_path[0] = '\0'; // no file
    supervisor = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    ck_assert_int_ge(supervisor, 0);
    ck_assert_int_eq(bind(supervisor, (struct sockaddr *)&address, bytes), 0);
}

static void stop_listening(void)
{
    close(supervisor);
}

static void check_heard(const char *expected)
{
    char text[1024];
    ssize_t got = recv(supervisor, text, sizeof text - 1, 0);
    ck_assert_int_ge(got, 0);
    text[got] = '\0';
    ck_assert_str_eq(text, expected);
}

START_TEST(each_message)
{
    supervisor_loading(3, 61);
    check_heard("STATUS=loading: 3 of 61 weights\nEXTEND_TIMEOUT_USEC=60000000");
    supervisor_ready("127.0.0.1:50061,unix:/run/x");
    check_heard("READY=1\nSTATUS=serving on 127.0.0.1:50061,unix:/run/x");
    supervisor_alive();
    check_heard("WATCHDOG=1");
    supervisor_reloaded("127.0.0.1:50061", NULL);
    check_heard("READY=1\nSTATUS=serving on 127.0.0.1:50061");
    supervisor_reloaded("127.0.0.1:50061", "lanes: needs a restart");
    check_heard("READY=1\nSTATUS=serving on 127.0.0.1:50061, by the old configuration: lanes: "
                "needs a restart");
    supervisor_stopping(86400000);
    check_heard("STOPPING=1\nSTATUS=draining\nEXTEND_TIMEOUT_USEC=86400000000");
}
END_TEST

START_TEST(nobody_there)
{
    unsetenv("NOTIFY_SOCKET");
    supervisor_ready("");
    setenv("NOTIFY_SOCKET", "/nowhere/at/all", 1);
    supervisor_ready("");
    char byte;
    ck_assert_int_eq(recv(supervisor, &byte, 1, 0), -1);
}
END_TEST

START_TEST(how_often_alive)
{
    static const struct {
        const char *watchdog_us;
        uint64_t alive_ms;
    } cases[] = {{"30000000", 15000}, {"2000", 1}, {"1", 1}, {"0", 0}, {"soon", 0}, {NULL, 0}};
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        if (cases[i].watchdog_us)
            setenv("WATCHDOG_USEC", cases[i].watchdog_us, 1);
        else
            unsetenv("WATCHDOG_USEC");
        ck_assert_uint_eq(supervisor_alive_ms(), cases[i].alive_ms);
    }
    setenv("WATCHDOG_USEC", "30000000", 1);
    setenv("WATCHDOG_PID", "1", 1); // another's
    ck_assert_uint_eq(supervisor_alive_ms(), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("supervisor");
    TCase *tests = tcase_create("told");
    tcase_add_checked_fixture(tests, listen_to_all, stop_listening);
    tcase_add_test(tests, each_message);
    tcase_add_test(tests, nobody_there);
    tcase_add_test(tests, how_often_alive);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
