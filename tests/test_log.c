// The log's promise: one whole line per event whatever the bytes, JSON that any parser takes, and
// never a failure for the caller. Standard error is swapped for a file while a test logs, and each
// line is read back: JSON through jansson, which insists on UTF-8.
#include "server/log.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { LINE_BYTES_MAX = 4096 };

static int saved_stderr = -1;
static int capture = -1;

static void capture_begin(void)
{
    saved_stderr = dup(STDERR_FILENO);
    ck_assert_int_ge(saved_stderr, 0);
    capture = memfd_create("log", MFD_CLOEXEC);
    ck_assert_int_ge(capture, 0);
    ck_assert_int_eq(fcntl(capture, F_SETFL, O_APPEND), 0);
    ck_assert_int_eq(dup2(capture, STDERR_FILENO), STDERR_FILENO);
}

// What was logged since capture_begin; the caller frees it.
static char *capture_end(void)
{
    ck_assert_int_eq(dup2(saved_stderr, STDERR_FILENO), STDERR_FILENO);
    close(saved_stderr);
    off_t bytes = lseek(capture, 0, SEEK_END);
    ck_assert_int_ge(bytes, 0);
    char *text = calloc(1, (size_t)bytes + 1);
    ck_assert_ptr_nonnull(text);
    ck_assert_int_eq(pread(capture, text, (size_t)bytes, 0), bytes);
    ck_assert_uint_eq(strlen(text), (size_t)bytes); // a NUL in a line would show here
    close(capture);
    return text;
}

// The one line logged, as JSON.
static json_t *capture_end_json(void)
{
    char *text = capture_end();
    size_t bytes = strlen(text);
    ck_assert_uint_gt(bytes, 0);
    ck_assert_uint_le(bytes, LINE_BYTES_MAX);
    ck_assert_ptr_eq(strchr(text, '\n'), text + bytes - 1);
    json_error_t error;
    json_t *json = json_loads(text, JSON_REJECT_DUPLICATES, &error);
    ck_assert_msg(json != NULL, "%s in %s", error.text, text);
    free(text);
    return json;
}

static const char *string_at(const json_t *json, const char *key)
{
    const char *value = json_string_value(json_object_get(json, key));
    ck_assert_msg(value != NULL, "no string %s", key);
    return value;
}

START_TEST(plain_line_reads_as_documented)
{
    capture_begin();
    LOG(INFO, "weight loaded", LOG_STR("name", "layers.0.attn.wo_a"), LOG_U64("bytes", 33554432),
        LOG_BOOL("fp8", true), LOG_F64("seconds", 0.1));
    char *text = capture_end();
    static const char shape[] = "0000-00-00T00:00:00.000Z";
    size_t end = strlen(shape);
    ck_assert_uint_gt(strlen(text), end);
    for (size_t i = 0; i < end; i++) {
        bool digit = text[i] >= '0' && text[i] <= '9';
        ck_assert_msg(shape[i] == '0' ? digit : text[i] == shape[i], "%s", text);
    }
    ck_assert_str_eq(text + end, " info weight loaded name=layers.0.attn.wo_a bytes=33554432 "
                                 "fp8=true seconds=0.1\n");
    free(text);
}
END_TEST

START_TEST(json_line_reads_as_documented)
{
    log_configure(LOG_LEVEL_DEBUG, LOG_FORMAT_JSON);
    capture_begin();
    LOG(WARN, "slow", LOG_STR("name", "a b"), LOG_U64("bytes", UINT64_MAX >> 1),
        LOG_BOOL("ok", false), LOG_F64("ratio", 1e-300), LOG_STR("none", NULL));
    json_t *json = capture_end_json();
    ck_assert_uint_eq(strlen(string_at(json, "ts")), 24);
    ck_assert_str_eq(string_at(json, "level"), "warn");
    ck_assert_str_eq(string_at(json, "msg"), "slow");
    ck_assert_str_eq(string_at(json, "name"), "a b");
    ck_assert_int_eq(json_integer_value(json_object_get(json, "bytes")), INT64_MAX);
    ck_assert(json_is_false(json_object_get(json, "ok")));
    ck_assert(json_real_value(json_object_get(json, "ratio")) == 1e-300);
    ck_assert(json_is_null(json_object_get(json, "none")));
    ck_assert_uint_eq(json_object_size(json), 8);
    json_decref(json);
}
END_TEST

START_TEST(levels_below_the_configured_one_are_silent)
{
    capture_begin();
    LOG(DEBUG, "unconfigured: info and up");
    log_configure(LOG_LEVEL_ERROR, LOG_FORMAT_PLAIN);
    LOG(DEBUG, "no");
    LOG(INFO, "no");
    LOG(WARN, "no");
    char *text = capture_end();
    ck_assert_str_eq(text, "");
    free(text);

    capture_begin();
    LOG(ERROR, "yes");
    text = capture_end();
    ck_assert_ptr_nonnull(strstr(text, " error yes\n"));
    free(text);
}
END_TEST

static const struct {
    const char *in, *plain, *json;
} escapes[] = {
    {"", "\"\"", "\"\""},
    {"plain", "plain", "\"plain\""},
    {"a b", "\"a b\"", "\"a b\""},
    {"a=b", "\"a=b\"", "\"a=b\""},
    {"say \"hi\"", "\"say \\\"hi\\\"\"", "\"say \\\"hi\\\"\""},
    {"back\\slash", "\"back\\\\slash\"", "\"back\\\\slash\""},
    {"forged\n2026 info line", "\"forged\\n2026 info line\"", "\"forged\\n2026 info line\""},
    {"\r\t\x01", "\"\\x0d\\x09\\x01\"", "\"\\u000d\\u0009\\u0001\""},
    {"\x1b[31m", "\"\\x1b[31m\"", "\"\\u001b[31m\""},
    {"\x7f", "\"\\x7f\"", "\"\\u007f\""},
    {"\xc2\x9b", "\"\\x9b\"", "\"\\u009b\""}, // C1: CSI in one character
    {"gr\xc3\xbc\xc3\x9f", "\"gr\xc3\xbc\xc3\x9f\"", "\"gr\xc3\xbc\xc3\x9f\""},
    {"\xf0\x9f\x98\x80", "\"\xf0\x9f\x98\x80\"", "\"\xf0\x9f\x98\x80\""},
    {"\xff", "\"\\xff\"", "\"\xef\xbf\xbd\""},
    {"\x80z", "\"\\x80z\"", "\"\xef\xbf\xbdz\""}, // no lead byte
    {"\xc3", "\"\\xc3\"", "\"\xef\xbf\xbd\""},    // cut short
    {"\xf0\x9f\x98", "\"\\xf0\\x9f\\x98\"", "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""},
    {"\xc0\xaf", "\"\\xc0\\xaf\"", "\"\xef\xbf\xbd\xef\xbf\xbd\""}, // overlong
    {"\xe0\x80\xaf", "\"\\xe0\\x80\\xaf\"", "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""},
    {"\xed\xa0\x80", "\"\\xed\\xa0\\x80\"",
     "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""}, // surrogate
    {"\xf4\x90\x80\x80", "\"\\xf4\\x90\\x80\\x80\"",
     "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""}, // past U+10FFFF
};

START_TEST(strings_are_escaped)
{
    for (int format = LOG_FORMAT_PLAIN; format <= LOG_FORMAT_JSON; format++) {
        log_configure(LOG_LEVEL_INFO, (enum log_format)format);
        capture_begin();
        LOG(INFO, "m", LOG_STR("k", escapes[_i].in));
        char *text = capture_end();
        bool json = format == LOG_FORMAT_JSON;
        const char *value = strstr(text, json ? ",\"k\":" : " k=");
        ck_assert_ptr_nonnull(value);
        char expected[128];
        snprintf(expected, sizeof expected, json ? ",\"k\":%s}\n" : " k=%s\n",
                 json ? escapes[_i].json : escapes[_i].plain);
        ck_assert_str_eq(value, expected);
        free(text);
    }
}
END_TEST

START_TEST(every_byte_pair_stays_valid_json)
{
    log_configure(LOG_LEVEL_INFO, LOG_FORMAT_JSON);
    // Lead bytes alone decide; of the second byte the borders of all UTF-8 classes suffice.
    static const unsigned char seconds[] = {0x00, 0x01, 0x22, 0x41, 0x5c, 0x7f, 0x80, 0x8f,
                                            0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xed, 0xf4, 0xff};
    for (int first = 1; first < 256; first++) {
        for (size_t i = 0; i < ARRAY_LEN(seconds); i++) {
            char text[4] = {(char)first, (char)seconds[i], '\0'};
            capture_begin();
            LOG(INFO, text, LOG_STR(text, text));
            json_t *json = capture_end_json();
            ck_assert_uint_eq(json_object_size(json), 4);
            json_decref(json);
        }
    }
}
END_TEST

START_TEST(long_lines_are_cut_and_stay_valid)
{
    log_configure(LOG_LEVEL_INFO, LOG_FORMAT_JSON);
    char filler[LINE_BYTES_MAX + 512];
    // Characters of every width as written, so that the cut falls on each of their bytes.
    static const char *const characters[] = {"x", "\"", "\x01", "\xc3\xbc", "\xf0\x9f\x98\x80"};
    const char *character = characters[_i];
    size_t width = strlen(character);
    bool cut_seen = false, whole_seen = false;
    for (size_t bytes = 400; bytes + width < sizeof filler;
         bytes += width + (bytes > 600 ? 7 : 0)) {
        for (size_t at = 0; at < bytes; at++)
            filler[at] = character[at % width];
        filler[bytes - bytes % width] = '\0';
        capture_begin();
        LOG(INFO, "long", LOG_U64("before", 1), LOG_STR("filler", filler), LOG_U64("after", 2),
            LOG_STR("last", "end"));
        json_t *json = capture_end_json();
        bool cut = json_is_true(json_object_get(json, "cut"));
        cut_seen |= cut;
        whole_seen |= !cut;
        ck_assert_int_eq(json_integer_value(json_object_get(json, "before")), 1);
        if (!cut)
            ck_assert_str_eq(string_at(json, "last"), "end");
        else // a prefix in whole characters
            ck_assert_int_eq(
                strncmp(filler, string_at(json, "filler"), strlen(string_at(json, "filler"))), 0);
        json_decref(json);
    }
    ck_assert(cut_seen);
    ck_assert(whole_seen);
}
END_TEST

START_TEST(many_fields_are_cut_between_fields)
{
    struct log_field fields[400];
    for (size_t i = 0; i < ARRAY_LEN(fields); i++)
        fields[i] = LOG_U64("a_key_of_some_length", 1000000 + i);
    log_configure(LOG_LEVEL_INFO, LOG_FORMAT_PLAIN);
    for (size_t n = 1; n <= ARRAY_LEN(fields); n++) {
        capture_begin();
        log_write(LOG_LEVEL_INFO, "many", fields, n);
        char *text = capture_end();
        size_t bytes = strlen(text);
        ck_assert_uint_le(bytes, LINE_BYTES_MAX);
        const char *last = strrchr(text, ' ');
        ck_assert_ptr_nonnull(last);
        size_t value_bytes = strlen(" a_key_of_some_length=1000000\n");
        if (strcmp(last, " cut=true\n") == 0)
            ck_assert_uint_gt(bytes, LINE_BYTES_MAX - 64);
        else
            ck_assert_uint_eq(strlen(last), value_bytes);
        free(text);
    }
}
END_TEST

START_TEST(not_finite_numbers_have_a_spelling)
{
    static const struct {
        double value;
        const char *name;
    } numbers[] = {{NAN, "nan"}, {INFINITY, "inf"}, {-INFINITY, "-inf"}};
    log_configure(LOG_LEVEL_INFO, LOG_FORMAT_JSON);
    for (size_t i = 0; i < ARRAY_LEN(numbers); i++) {
        capture_begin();
        LOG(INFO, "m", LOG_F64("value", numbers[i].value));
        json_t *json = capture_end_json();
        ck_assert_str_eq(string_at(json, "value"), numbers[i].name);
        json_decref(json);
    }
}
END_TEST

START_TEST(numbers_read_back_exactly)
{
    static const double values[] = {0.0, 0.1, 1.0 / 3, 1e22, 5e-324, 1.7976931348623157e308, -2.5};
    log_configure(LOG_LEVEL_INFO, LOG_FORMAT_JSON);
    for (size_t i = 0; i < ARRAY_LEN(values); i++) {
        capture_begin();
        LOG(INFO, "m", LOG_F64("value", values[i]));
        json_t *json = capture_end_json();
        ck_assert(json_number_value(json_object_get(json, "value")) == values[i]);
        json_decref(json);
    }
}
END_TEST

START_TEST(a_line_that_cannot_be_written_is_counted)
{
    int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
    ck_assert_int_ge(full, 0);
    int saved = dup(STDERR_FILENO);
    uint64_t before = log_lines_dropped();
    ck_assert_int_eq(dup2(full, STDERR_FILENO), STDERR_FILENO);
    errno = ENOTTY;
    LOG(INFO, "lost");
    int errno_after = errno;
    LOG(INFO, "lost too");
    close(STDERR_FILENO);
    LOG(INFO, "nowhere to go");
    ck_assert_int_eq(dup2(saved, STDERR_FILENO), STDERR_FILENO);
    close(saved);
    close(full);
    ck_assert_uint_eq(log_lines_dropped() - before, 3);
    ck_assert_int_eq(errno_after, ENOTTY);
}
END_TEST

// Logs until a line is dropped, to something that nobody reads.
static void ck_never_waits(int to)
{
    int saved = dup(STDERR_FILENO);
    ck_assert_int_eq(dup2(to, STDERR_FILENO), STDERR_FILENO);
    log_never_wait();
    uint64_t before = log_lines_dropped();
    alarm(30);
    for (int i = 0; i < 100000 && log_lines_dropped() == before; i++)
        LOG(INFO, "nobody reads this", LOG_U64("line", (uint64_t)i));
    alarm(0);
    uint64_t dropped = log_lines_dropped() - before;
    ck_assert_int_eq(dup2(saved, STDERR_FILENO), STDERR_FILENO);
    close(saved);
    ck_assert_uint_eq(dropped, 1);
}

START_TEST(a_pipe_that_nobody_reads_is_not_waited_for)
{
    int ends[2];
    ck_assert_int_eq(pipe(ends), 0);
    ck_never_waits(ends[1]);
    // What got in is whole lines.
    char bytes[1 << 17];
    ssize_t got = read(ends[0], bytes, sizeof bytes);
    ck_assert_int_gt(got, 0);
    ck_assert_int_eq(bytes[got - 1], '\n');
    close(ends[0]);
    close(ends[1]);
}
END_TEST

START_TEST(a_socket_that_nobody_reads_is_not_waited_for)
{
    int ends[2];
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    ck_never_waits(ends[1]);
    close(ends[0]);
    uint64_t before = log_lines_dropped();
    int saved = dup(STDERR_FILENO);
    ck_assert_int_eq(dup2(ends[1], STDERR_FILENO), STDERR_FILENO);
    LOG(INFO, "the reader is gone"); // and no SIGPIPE comes of it
    ck_assert_int_eq(dup2(saved, STDERR_FILENO), STDERR_FILENO);
    close(saved);
    ck_assert_uint_eq(log_lines_dropped() - before, 1);
    close(ends[1]);
}
END_TEST

START_TEST(a_line_that_was_torn_does_not_spoil_the_next)
{
    capture_begin();
    signal(SIGXFSZ, SIG_IGN);
    const struct rlimit full = {.rlim_cur = 100, .rlim_max = RLIM_INFINITY};
    const struct rlimit room = {.rlim_cur = RLIM_INFINITY, .rlim_max = RLIM_INFINITY};
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &full), 0);
    uint64_t before = log_lines_dropped();
    LOG(INFO, "a whole one");
    for (int i = 0; i < 4; i++)
        LOG(INFO, "for these the disk has no room", LOG_U64("line", (uint64_t)i));
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &room), 0);
    LOG(INFO, "room again");
    char *text = capture_end();
    ck_assert_uint_eq(log_lines_dropped() - before, 4);
    const char *last = strstr(text, "room again");
    ck_assert_ptr_nonnull(last);
    while (last > text && last[-1] != '\n')
        last--;
    ck_assert_msg(strncmp(last, "20", 2) == 0, "glued to what was torn: %s", last);
    free(text);
}
END_TEST

enum { THREADS = 8, LINES_PER_THREAD = 200 };

static void *log_many(void *argument)
{
    const size_t *thread = argument;
    char filler[512];
    memset(filler, 'a' + (int)*thread, sizeof filler - 1);
    filler[sizeof filler - 1] = '\0';
    for (size_t i = 0; i < LINES_PER_THREAD; i++)
        LOG(INFO, "thread", LOG_U64("thread", *thread), LOG_STR("filler", filler));
    return NULL;
}

START_TEST(lines_of_threads_do_not_mix)
{
    log_configure(LOG_LEVEL_INFO, LOG_FORMAT_JSON);
    capture_begin();
    pthread_t threads[THREADS];
    size_t numbers[THREADS];
    for (size_t i = 0; i < THREADS; i++) {
        numbers[i] = i;
        ck_assert_int_eq(pthread_create(&threads[i], NULL, log_many, &numbers[i]), 0);
    }
    for (size_t i = 0; i < THREADS; i++)
        ck_assert_int_eq(pthread_join(threads[i], NULL), 0);

    char *text = capture_end();
    size_t lines[THREADS] = {0};
    char *rest = text;
    for (char *line; (line = strsep(&rest, "\n")) && *line;) {
        json_t *json = json_loads(line, JSON_REJECT_DUPLICATES, NULL);
        ck_assert_msg(json != NULL, "%s", line);
        size_t thread = (size_t)json_integer_value(json_object_get(json, "thread"));
        ck_assert_uint_lt(thread, THREADS);
        const char *filler = string_at(json, "filler");
        ck_assert_uint_eq(strspn(filler, (char[]){(char)('a' + (int)thread), '\0'}), 511);
        lines[thread]++;
        json_decref(json);
    }
    for (size_t i = 0; i < THREADS; i++)
        ck_assert_uint_eq(lines[i], LINES_PER_THREAD);
    free(text);
}
END_TEST

static Suite *log_suite(void)
{
    Suite *suite = suite_create("log");
    TCase *tcase = tcase_create("lines");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, plain_line_reads_as_documented);
    tcase_add_test(tcase, json_line_reads_as_documented);
    tcase_add_test(tcase, levels_below_the_configured_one_are_silent);
    tcase_add_loop_test(tcase, strings_are_escaped, 0, ARRAY_LEN(escapes));
    tcase_add_test(tcase, every_byte_pair_stays_valid_json);
    tcase_add_loop_test(tcase, long_lines_are_cut_and_stay_valid, 0, 5);
    tcase_add_test(tcase, many_fields_are_cut_between_fields);
    tcase_add_test(tcase, not_finite_numbers_have_a_spelling);
    tcase_add_test(tcase, numbers_read_back_exactly);
    tcase_add_test(tcase, a_line_that_cannot_be_written_is_counted);
    tcase_add_test(tcase, a_pipe_that_nobody_reads_is_not_waited_for);
    tcase_add_test(tcase, a_socket_that_nobody_reads_is_not_waited_for);
    tcase_add_test(tcase, a_line_that_was_torn_does_not_spoil_the_next);
    tcase_add_test(tcase, lines_of_threads_do_not_mix);
    suite_add_tcase(suite, tcase);
    return suite;
}

int main(void)
{
    SRunner *runner = srunner_create(log_suite());
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
