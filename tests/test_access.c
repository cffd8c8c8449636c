// Who may do what: the file of tokens, what each way, certificate and token gives, and what comes of
// reading the file again.
#include "server/access.h"

#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "folder.h"
#include "server/log.h"

static char folder[64], path[96];
static struct metrics *metrics;

static void setup(void)
{
    folder_make(folder, sizeof folder, "test_access");
    snprintf(path, sizeof path, "%s/tokens.json", folder);
    ck_assert_int_eq(metrics_create(&metrics, NULL), STATUS_OK);
}

static void teardown(void)
{
    metrics_destroy(metrics);
    folder_remove(folder);
}

static void write_file(const char *text)
{
    FILE *file = fopen(path, "w");
    ck_assert_ptr_nonnull(file);
    ck_assert_int_ge(fputs(text, file), 0);
    ck_assert_int_eq(fclose(file), 0);
}

// An entry for the token, whose name is the token itself.
static const char *entry_of(const char *token, const char *rest)
{
    static char text[4][512];
    static unsigned next;
    uint8_t digest[ACCESS_SHA256_BYTES];
    char hex[2 * ACCESS_SHA256_BYTES + 1];
    access_sha256(token, strlen(token), digest);
    for (size_t i = 0; i < sizeof digest; i++)
        snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    char *to = text[next++ % 4];
    snprintf(to, sizeof text[0], "{\"name\": \"name of %s\", \"sha256\": \"%s\", %s}", token, hex,
             rest);
    return to;
}

static struct access_options options_of(uint32_t tcp_scopes)
{
    return (struct access_options){
        .tokens_file = path,
        .unix_scopes = ACCESS_ALL,
        .tcp_scopes = tcp_scopes,
        .metrics = metrics,
    };
}

static struct access *make(const char *text, uint32_t tcp_scopes)
{
    write_file(text);
    const struct access_options options = options_of(tcp_scopes);
    struct access *access = NULL;
    struct error err;
    enum status status = access_create(&options, &access, &err);
    ck_assert_msg(status == STATUS_OK, "%s", err.text);
    return access;
}

static void read_again(struct access *access)
{
    struct access_prepared *prepared;
    ck_assert_int_eq(access_prepare(access, &prepared, NULL), STATUS_OK);
    access_commit(prepared);
    access_prepared_destroy(prepared);
}

static enum status ask(struct access *access, struct access_peer *peer, enum access_scope needs,
                       const char *authorization, struct error *err)
{
    const struct access_call call = {
        .method = "/test/Method",
        .needs = needs,
        .peer = peer,
        .authorization = authorization,
        .authorization_bytes = authorization ? strlen(authorization) : 0,
        .authorizations_n = authorization ? 1 : 0,
    };
    return access_check(access, &call, err);
}

START_TEST(sha256_is_the_standards)
{
    uint8_t digest[ACCESS_SHA256_BYTES];
    access_sha256("abc", 3, digest);
    static const uint8_t abc[] = {0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea};
    ck_assert_mem_eq(digest, abc, sizeof abc);
}
END_TEST

static const struct {
    const char *text;
    int64_t seconds; // -1: refused
} times[] = {
    {"1970-01-01T00:00:00Z", 0},
    {"2027-01-01T00:00:00Z", 1798761600},
    {"2027-01-01T02:00:00+02:00", 1798761600},
    {"2026-12-31T23:00:00.25-01:00", 1798761600},
    {"2024-02-29T12:00:00Z", 1709208000},
    {"2023-02-29T12:00:00Z", -1},
    {"2027-13-01T00:00:00Z", -1},
    {"2027-01-01", -1},
    {"2027-01-01T00:00:00", -1},
    {"2027-01-01 00:00:00Z", -1},
    {"2027-01-01T00:00:00.Z", -1},
    {"2027-01-01T00:00:00+0200", -1},
    {"2027-01-01T00:00:00+24:00", -1},
    {"2027-01-01T25:00:00Z", -1},
    {"", -1},
};

START_TEST(a_time_is_parsed)
{
    int64_t seconds = -1;
    bool good = access_parse_time(times[_i].text, &seconds);
    ck_assert_msg(good == (times[_i].seconds >= 0), "%s", times[_i].text);
    if (good)
        ck_assert_int_eq(seconds, times[_i].seconds);
}
END_TEST

#define DIGEST "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
static const struct {
    const char *text, *says;
} bad_files[] = {
    {"", "tokens_file"},
    {"[]", "expected an object"},
    {"{\"token\": []}", "unknown key \"token\""},
    {"{\"tokens\": {}}", "tokens: expected a list"},
    {"{\"tokens\": [1]}", "tokens[0]: expected an object"},
    {"{\"tokens\": [{\"sha256\": \"" DIGEST "\", \"scopes\": []}]}", "tokens[0].name"},
    {"{\"tokens\": [{\"name\": \"\", \"sha256\": \"" DIGEST "\", \"scopes\": []}]}", ".name"},
    {"{\"tokens\": [{\"name\": \"a\", \"scopes\": []}]}", "tokens[0].sha256"},
    {"{\"tokens\": [{\"name\": \"a\", \"sha256\": \"ba78\", \"scopes\": []}]}", ".sha256"},
    {"{\"tokens\": [{\"name\": \"a\", \"sha256\": \"" DIGEST "\"}]}", ".scopes"},
    {"{\"tokens\": [{\"name\": \"a\", \"sha256\": \"" DIGEST "\", \"scopes\": [\"root\"]}]}",
     ".scopes: expected a list of \"infer\""},
    {"{\"tokens\": [{\"name\": \"a\", \"sha256\": \"" DIGEST
     "\", \"scopes\": [], \"expires\": \"tomorrow\"}]}",
     ".expires"},
    {"{\"tokens\": [{\"name\": \"a\", \"token\": \"secret\", \"scopes\": []}]}",
     "unknown key \"token\""},
    {"{\"tokens\": [{\"name\": \"a\", \"sha256\": \"" DIGEST "\", \"scopes\": []},"
     " {\"name\": \"b\", \"sha256\": \"" DIGEST "\", \"scopes\": []}]}",
     "tokens[1].sha256: is there already"},
    {"{\"certificates\": [{\"name\": \"a\", \"scopes\": [], \"sha256\": \"" DIGEST "\"}]}",
     "unknown key \"sha256\""},
    {"{\"certificates\": [{\"name\": \"a\", \"scopes\": []}, {\"name\": \"a\", \"scopes\": []}]}",
     "certificates[1].name: is there already"},
};

START_TEST(a_bad_file_is_refused_and_names_the_entry)
{
    write_file(bad_files[_i].text);
    const struct access_options options = options_of(0);
    struct access *access = NULL;
    struct error err = {0};
    enum status status = access_create(&options, &access, &err);
    ck_assert_msg(status != STATUS_OK, "%s", bad_files[_i].text);
    ck_assert_msg(strstr(err.text, bad_files[_i].says), "%s\n%s", bad_files[_i].text, err.text);
    ck_assert_msg(!strstr(err.text, "secret"), "%s", err.text);
}
END_TEST

START_TEST(no_file_is_an_error)
{
    const struct access_options options = options_of(0);
    struct access *access = NULL;
    struct error err = {0};
    ck_assert_int_eq(access_create(&options, &access, &err), STATUS_FAILED_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(err.text, "tokens_file"));
}
END_TEST

START_TEST(a_way_gives_its_scopes)
{
    struct access *access = make("{}", ACCESS_READ);
    ck_assert(access_given(access, &access_peer_unix, ACCESS_ADMIN));
    ck_assert(access_given(access, &access_peer_tcp, ACCESS_READ));
    ck_assert(!access_given(access, &access_peer_tcp, ACCESS_INFER));
    ck_assert(access_given(access, &access_peer_tcp, ACCESS_OPEN));
    ck_assert(access_given(access, &access_peer_health, ACCESS_OPEN));
    ck_assert(!access_given(access, &access_peer_health, ACCESS_READ));
    ck_assert(!access_given(access, NULL, ACCESS_READ)); // nobody knows whose it is
    ck_assert(access_given(access, NULL, ACCESS_OPEN));
    access_destroy(access);
}
END_TEST

static const struct {
    enum access_scope needs;
    const char *authorization;
    enum status status;
    const char *says;
} calls[] = {
    {ACCESS_INFER, NULL, STATUS_UNAUTHENTICATED, "a token with the scope \"infer\""},
    {ACCESS_INFER, "Bearer good", STATUS_OK, NULL},
    {ACCESS_INFER, "bearer good", STATUS_OK, NULL},
    {ACCESS_INFER, "BEARER good", STATUS_OK, NULL},
    {ACCESS_READ, "Bearer good", STATUS_OK, NULL},
    {ACCESS_ADMIN, "Bearer good", STATUS_PERMISSION_DENIED,
     "needs the scope \"admin\"; this caller has: infer,read"},
    {ACCESS_INFER, "Bearer none", STATUS_PERMISSION_DENIED, "this caller has: none"},
    {ACCESS_INFER, "Bearer late", STATUS_UNAUTHENTICATED, "has expired"},
    {ACCESS_INFER, "Bearer soon", STATUS_OK, NULL},
    {ACCESS_INFER, "Bearer goo", STATUS_UNAUTHENTICATED, "not known"},
    {ACCESS_INFER, "Bearer goodd", STATUS_UNAUTHENTICATED, "not known"},
    {ACCESS_INFER, "Bearer  good", STATUS_UNAUTHENTICATED, "not known"},
    {ACCESS_INFER, "Bearer ", STATUS_UNAUTHENTICATED, "Bearer TOKEN"},
    {ACCESS_INFER, "good", STATUS_UNAUTHENTICATED, "Bearer TOKEN"},
    {ACCESS_INFER, "Basic good", STATUS_UNAUTHENTICATED, "Bearer TOKEN"},
    {ACCESS_OPEN, "Bearer goo", STATUS_OK, NULL},
};

static struct access *make_calls(void)
{
    char text[4096];
    snprintf(text, sizeof text, "{\"tokens\": [%s, %s, %s, %s]}",
             entry_of("good", "\"scopes\": [\"infer\", \"read\"]"),
             entry_of("none", "\"scopes\": []"),
             entry_of("late", "\"scopes\": [\"infer\"], \"expires\": \"2020-01-01T00:00:00Z\""),
             entry_of("soon", "\"scopes\": [\"infer\"], \"expires\": \"2120-01-01T00:00:00Z\""));
    return make(text, 0);
}

START_TEST(a_token_gives_its_scopes)
{
    struct access *access = make_calls();
    struct error err = {0};
    enum status status =
        ask(access, &access_peer_tcp, calls[_i].needs, calls[_i].authorization, &err);
    ck_assert_msg(status == calls[_i].status, "%s: %s, %s", calls[_i].authorization,
                  status_name(status), err.text);
    if (calls[_i].says)
        ck_assert_msg(strstr(err.text, calls[_i].says), "%s", err.text);
    struct metrics_values values;
    metrics_read(metrics, &values);
    uint64_t refused = 0;
    for (size_t i = 0; i < METRICS_ACCESS_REFUSALS; i++)
        refused += values.access_refused[i];
    ck_assert_uint_eq(refused, status != STATUS_OK);
    access_destroy(access);
}
END_TEST

START_TEST(two_headers_are_none)
{
    struct access *access = make_calls();
    const struct access_call call = {.method = "/m",
                                     .needs = ACCESS_INFER,
                                     .peer = &access_peer_tcp,
                                     .authorization = "Bearer good",
                                     .authorization_bytes = 11,
                                     .authorizations_n = 2};
    ck_assert_int_eq(access_check(access, &call, NULL), STATUS_UNAUTHENTICATED);
    access_destroy(access);
}
END_TEST

START_TEST(the_health_port_takes_no_token)
{
    struct access *access = make_calls();
    struct error err;
    ck_assert_int_eq(ask(access, &access_peer_health, ACCESS_INFER, "Bearer good", &err),
                     STATUS_PERMISSION_DENIED);
    ck_assert_ptr_nonnull(strstr(err.text, "health_listen"));
    ck_assert_int_eq(ask(access, NULL, ACCESS_INFER, "Bearer good", &err),
                     STATUS_PERMISSION_DENIED);
    access_destroy(access);
}
END_TEST

START_TEST(a_certificate_gives_what_any_of_its_names_has)
{
    struct access *access =
        make("{\"certificates\": [{\"name\": \"a.example\", \"scopes\": [\"infer\"]},"
             " {\"name\": \"spiffe://x/y\", \"scopes\": [\"admin\"]}]}",
             0);
    static const char *const names[] = {"b", "a.example", "spiffe://x/y"};
    struct access_peer *both = access_peer_create(names, 3), *one = access_peer_create(names, 2),
                       *none = access_peer_create(names, 1);
    ck_assert(access_given(access, both, ACCESS_INFER) && access_given(access, both, ACCESS_ADMIN));
    ck_assert(!access_given(access, both, ACCESS_READ));
    ck_assert(access_given(access, one, ACCESS_INFER) && !access_given(access, one, ACCESS_ADMIN));
    ck_assert(!access_given(access, none, ACCESS_INFER));
    struct error err; // who has shown a certificate is known, and not allowed
    ck_assert_int_eq(ask(access, none, ACCESS_INFER, NULL, &err), STATUS_PERMISSION_DENIED);

    // The next look at the same connection sees the next table.
    write_file("{\"certificates\": [{\"name\": \"b\", \"scopes\": [\"read\"]}]}");
    read_again(access);
    ck_assert(!access_given(access, one, ACCESS_INFER) && access_given(access, one, ACCESS_READ));
    access_peer_free(both);
    access_peer_free(one);
    access_peer_free(none);
    access_peer_free(&access_peer_tcp); // lets it be
    access_destroy(access);
}
END_TEST

START_TEST(reloading_takes_all_or_nothing)
{
    struct access *access = make_calls();
    struct error err;
    write_file("{\"tokens\": [}");
    access_look(access);
    ck_assert_int_eq(ask(access, &access_peer_tcp, ACCESS_INFER, "Bearer good", &err), STATUS_OK);
    char text[1024];
    snprintf(text, sizeof text, "{\"tokens\": [%s]}", entry_of("new", "\"scopes\": [\"infer\"]"));
    write_file(text);
    access_look(access);
    ck_assert_int_eq(ask(access, &access_peer_tcp, ACCESS_INFER, "Bearer new", &err), STATUS_OK);
    ck_assert_int_eq(ask(access, &access_peer_tcp, ACCESS_INFER, "Bearer good", &err),
                     STATUS_UNAUTHENTICATED);
    ck_assert_int_eq(unlink(path), 0);
    access_look(access); // gone is no empty list
    ck_assert_int_eq(ask(access, &access_peer_tcp, ACCESS_INFER, "Bearer new", &err), STATUS_OK);
    access_destroy(access);
}
END_TEST

enum { RELOADS = 200 };

static void *ask_on(void *argument)
{
    struct access *access = argument;
    static const char *const names[] = {"certified"};
    struct access_peer *peer = access_peer_create(names, 1);
    for (int i = 0; i < 20 * RELOADS; i++) {
        struct error err;
        ASSERT(ask(access, &access_peer_tcp, ACCESS_INFER, "Bearer stays", &err) == STATUS_OK);
        ASSERT(access_given(access, peer, ACCESS_READ));
    }
    access_peer_free(peer);
    return NULL;
}

START_TEST(a_reload_disturbs_nobody)
{
    char text[2][2048];
    for (int i = 0; i < 2; i++)
        snprintf(text[i], sizeof text[i],
                 "{\"tokens\": [%s, %s],"
                 " \"certificates\": [{\"name\": \"certified\", \"scopes\": [\"read\"]}]}",
                 entry_of(i ? "odd" : "even", "\"scopes\": []"),
                 entry_of("stays", "\"scopes\": [\"infer\"]"));
    struct access *access = make(text[0], 0);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, ask_on, access), 0);
    for (int i = 0; i < RELOADS; i++) {
        write_file(text[i % 2]);
        read_again(access);
    }
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    access_destroy(access);
}
END_TEST

int main(void)
{
    log_configure(LOG_LEVEL_ERROR, LOG_FORMAT_PLAIN);
    Suite *suite = suite_create("access");
    TCase *tcase = tcase_create("access");
    tcase_set_timeout(tcase, 120);
    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_add_test(tcase, sha256_is_the_standards);
    tcase_add_loop_test(tcase, a_time_is_parsed, 0, (int)ARRAY_LEN(times));
    tcase_add_loop_test(tcase, a_bad_file_is_refused_and_names_the_entry, 0,
                        (int)ARRAY_LEN(bad_files));
    tcase_add_test(tcase, no_file_is_an_error);
    tcase_add_test(tcase, a_way_gives_its_scopes);
    tcase_add_loop_test(tcase, a_token_gives_its_scopes, 0, (int)ARRAY_LEN(calls));
    tcase_add_test(tcase, two_headers_are_none);
    tcase_add_test(tcase, the_health_port_takes_no_token);
    tcase_add_test(tcase, a_certificate_gives_what_any_of_its_names_has);
    tcase_add_test(tcase, reloading_takes_all_or_nothing);
    tcase_add_test(tcase, a_reload_disturbs_nobody);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
