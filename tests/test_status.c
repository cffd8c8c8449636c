// Errors as callers see them: the text is printable whatever a client sent, it fits, and the field
// is named.
#include "server/status.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

static void ck_printable(const char *text)
{
    for (; *text; text++)
        ck_assert_msg(*text >= 0x20 && *text < 0x7f, "byte 0x%02x", (unsigned char)*text);
}

START_TEST(set_fills_everything)
{
    struct error err;
    memset(&err, 0xa5, sizeof err);
    enum status status = error_set(&err, STATUS_NOT_FOUND, "no weight \"%s\"", "layers.9");
    ck_assert_int_eq(status, STATUS_NOT_FOUND);
    ck_assert_int_eq(err.status, STATUS_NOT_FOUND);
    ck_assert_str_eq(err.field, "");
    ck_assert_uint_eq(err.retry_after_ms, 0);
    ck_assert_str_eq(err.text, "no weight \"layers.9\"");
}
END_TEST

START_TEST(field_leads_the_text)
{
    struct error err;
    memset(&err, 0xa5, sizeof err);
    enum status status =
        error_field(&err, STATUS_INVALID_ARGUMENT, "tokens", "must be at most %d", 512);
    ck_assert_int_eq(status, STATUS_INVALID_ARGUMENT);
    ck_assert_int_eq(err.status, STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, "tokens");
    ck_assert_uint_eq(err.retry_after_ms, 0);
    ck_assert_str_eq(err.text, "tokens: must be at most 512");
}
END_TEST

START_TEST(no_error_wanted_is_fine)
{
    ck_assert_int_eq(error_set(NULL, STATUS_INTERNAL, "x"), STATUS_INTERNAL);
    ck_assert_int_eq(error_field(NULL, STATUS_ABORTED, "f", "x"), STATUS_ABORTED);
}
END_TEST

START_TEST(every_byte_comes_out_printable)
{
    char sent[2] = {(char)_i, '\0'};
    struct error err;
    (void)error_set(&err, STATUS_NOT_FOUND, "<%s>", sent);
    bool printable = _i >= 0x20 && _i < 0x7f;
    char expected[] = {'<', printable ? (char)_i : '?', '>', '\0'};
    ck_assert_str_eq(err.text, expected);

    (void)error_field(&err, STATUS_NOT_FOUND, sent, "<%s>", sent);
    ck_assert_int_eq(err.field[0], expected[1]);
    ck_printable(err.text);
    ck_assert_uint_eq(strlen(err.text), strlen("x: <x>"));
}
END_TEST

START_TEST(long_texts_are_cut)
{
    char sent[2 * ERROR_TEXT_BYTES];
    memset(sent, 'n', sizeof sent - 1);
    sent[sizeof sent - 1] = '\0';
    sent[100] = '\n';
    struct error err;
    (void)error_set(&err, STATUS_NOT_FOUND, "no weight %s", sent);
    ck_assert_uint_eq(strlen(err.text), ERROR_TEXT_BYTES - 1);
    ck_printable(err.text);
}
END_TEST

START_TEST(long_fields_leave_room_for_the_fault)
{
    char field[2 * ERROR_TEXT_BYTES];
    memset(field, 'f', sizeof field - 1);
    field[sizeof field - 1] = '\0';
    struct error err;
    (void)error_field(&err, STATUS_NOT_FOUND, field, "unknown key");
    ck_assert_uint_eq(strlen(err.field), ERROR_FIELD_BYTES - 1);
    ck_assert_uint_eq(strlen(err.text), ERROR_FIELD_BYTES - 1 + strlen(": unknown key"));
    ck_assert_ptr_nonnull(strstr(err.text, "f: unknown key"));
}
END_TEST

START_TEST(names_are_grpcs)
{
    static const char *const names[] = {"OK",
                                        "CANCELLED",
                                        "UNKNOWN",
                                        "INVALID_ARGUMENT",
                                        "DEADLINE_EXCEEDED",
                                        "NOT_FOUND",
                                        "ALREADY_EXISTS",
                                        "PERMISSION_DENIED",
                                        "RESOURCE_EXHAUSTED",
                                        "FAILED_PRECONDITION",
                                        "ABORTED",
                                        "OUT_OF_RANGE",
                                        "UNIMPLEMENTED",
                                        "INTERNAL",
                                        "UNAVAILABLE",
                                        "DATA_LOSS",
                                        "UNAUTHENTICATED"};
    for (size_t i = 0; i < ARRAY_LEN(names); i++)
        ck_assert_str_eq(status_name((enum status)i), names[i]);
    ck_assert_str_eq(status_name((enum status)17), "UNKNOWN");
    ck_assert_str_eq(status_name((enum status) - 1), "UNKNOWN");
}
END_TEST

static Suite *status_suite(void)
{
    Suite *suite = suite_create("status");
    TCase *tcase = tcase_create("errors");
    tcase_add_test(tcase, set_fills_everything);
    tcase_add_test(tcase, field_leads_the_text);
    tcase_add_test(tcase, no_error_wanted_is_fine);
    tcase_add_loop_test(tcase, every_byte_comes_out_printable, 1, 256);
    tcase_add_test(tcase, long_texts_are_cut);
    tcase_add_test(tcase, long_fields_leave_room_for_the_fault);
    tcase_add_test(tcase, names_are_grpcs);
    suite_add_tcase(suite, tcase);
    return suite;
}

int main(void)
{
    SRunner *runner = srunner_create(status_suite());
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
