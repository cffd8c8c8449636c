// Who is kept out, who is a suspect, and for how long; and whose faults count together. On a clock of the
// test's own.
#include <arpa/inet.h>
#include <check.h>
#include <stdio.h>
#include <string.h>

#include "server/suspects.h"

enum {
    PENALTY_MS = 100,
    SUSPECT_TIMES = 8, // a penalty's length
    TIMES_MAX = 32,
    FAULTS_MAX = 80, // of a connection
    SEEDS = 1000,
};
static const uint64_t ms = 1000000, second = 1000000000, start = 1000000000000;

static struct suspects suspects;

static void setup(void)
{
    suspects_init(&suspects, PENALTY_MS, FAULTS_MAX, 12345);
}

static const struct sockaddr_storage *at_port(const char *text, uint16_t port)
{
    static struct sockaddr_storage peers[8]; // in turn
    static size_t next;
    struct sockaddr_storage *peer = &peers[next++ % ARRAY_LEN(peers)];
    struct sockaddr_in *v4 = (struct sockaddr_in *)peer;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)peer;
    memset(peer, 0, sizeof *peer);
    if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET;
        v4->sin_port = port;
    } else {
        ck_assert_int_eq(inet_pton(AF_INET6, text, &v6->sin6_addr), 1);
        v6->sin6_family = AF_INET6;
        v6->sin6_port = port;
    }
    return peer;
}

static const struct sockaddr_storage *at(const char *text)
{
    return at_port(text, 1);
}

static const struct sockaddr_storage *numbered(uint32_t number)
{
    char text[32];
    snprintf(text, sizeof text, "10.0.%u.%u", number / 256, number % 256);
    return at(text);
}

static void check_standing(const char *of, uint64_t now, enum suspects_standing standing)
{
    ck_assert_int_eq(suspects_standing(&suspects, at(of), now), standing);
}

// From `from` to `until` and no longer; then a suspect for `suspect_ns`, and forgotten.
static void check_times(const char *of, uint64_t from, uint64_t until, uint64_t suspect_ns)
{
    check_standing(of, from, STANDING_KEPT_OUT);
    check_standing(of, until - 1, STANDING_KEPT_OUT);
    check_standing(of, until, STANDING_SUSPECT);
    check_standing(of, until + suspect_ns - 1, STANDING_SUSPECT);
    check_standing(of, until + suspect_ns, STANDING_GOOD);
}

// ---- penalties

START_TEST(kept_out_then_a_suspect_then_forgotten)
{
    check_standing("10.0.0.1", start, STANDING_GOOD);
    suspects_punish(&suspects, at("10.0.0.1"), start);
    check_times("10.0.0.1", start, start + PENALTY_MS * ms, SUSPECT_TIMES * PENALTY_MS * ms);
}
END_TEST

START_TEST(doubles_each_time_again_up_to_32_times)
{
    uint64_t now = start, times = 1;
    for (int i = 0; i < 9; i++) {
        uint64_t penalty_ns = times * PENALTY_MS * ms;
        suspects_punish(&suspects, at("10.0.0.1"), now);
        check_times("10.0.0.1", now, now + penalty_ns, SUSPECT_TIMES * penalty_ns);
        // At once, or at the last moment.
        now += penalty_ns + (i % 2 ? 0 : SUSPECT_TIMES * penalty_ns - 1);
        times = times < TIMES_MAX ? 2 * times : TIMES_MAX;
    }
}
END_TEST

// Other connections of its are cut off, too: it is kept out from the last one.
START_TEST(does_not_double_while_it_lasts)
{
    uint64_t penalty_ns = PENALTY_MS * ms;
    suspects_punish(&suspects, at("10.0.0.1"), start);
    suspects_punish(&suspects, at("10.0.0.1"), start);
    uint64_t last = start + penalty_ns - 1;
    suspects_punish(&suspects, at("10.0.0.1"), last);
    check_times("10.0.0.1", last, last + penalty_ns, SUSPECT_TIMES * penalty_ns);
    uint64_t again = last + penalty_ns;
    suspects_punish(&suspects, at("10.0.0.1"), again);
    check_times("10.0.0.1", again, again + 2 * penalty_ns, SUSPECT_TIMES * 2 * penalty_ns);
}
END_TEST

START_TEST(begins_with_the_least_once_forgotten)
{
    uint64_t penalty_ns = PENALTY_MS * ms;
    suspects_punish(&suspects, at("10.0.0.1"), start);
    suspects_punish(&suspects, at("10.0.0.1"), start + penalty_ns);
    uint64_t forgotten = start + penalty_ns + 2 * penalty_ns * (1 + SUSPECT_TIMES);
    suspects_punish(&suspects, at("10.0.0.1"), forgotten);
    check_times("10.0.0.1", forgotten, forgotten + penalty_ns, SUSPECT_TIMES * penalty_ns);
}
END_TEST

START_TEST(without_a_penalty_nobody_is)
{
    suspects_init(&suspects, 0, FAULTS_MAX, 12345);
    for (int i = 0; i < 3; i++)
        suspects_punish(&suspects, at("10.0.0.1"), start);
    check_standing("10.0.0.1", start, STANDING_GOOD);
    ck_assert(!suspects_any(&suspects, start));
}
END_TEST

START_TEST(any_while_one_is_left)
{
    uint64_t penalty_ns = PENALTY_MS * ms, twice = start + penalty_ns;
    ck_assert(!suspects_any(&suspects, start));
    suspects_punish(&suspects, at("10.0.0.1"), start);
    suspects_punish(&suspects, at("10.0.0.1"), twice);
    suspects_punish(&suspects, at("10.0.0.2"), twice); // is forgotten before that
    uint64_t forgotten = twice + 2 * penalty_ns * (1 + SUSPECT_TIMES);
    ck_assert(suspects_any(&suspects, forgotten - 1));
    check_standing("10.0.0.1", forgotten - 1, STANDING_SUSPECT);
    ck_assert(!suspects_any(&suspects, forgotten));
}
END_TEST

// ---- addresses

START_TEST(an_address_beside_is_neither)
{
    static const char *const beside[] = {"10.0.0.2", "10.0.1.1",    "11.0.0.1",
                                         "::a00:1",  "2001:db8::2", "2001:db9::1"};
    suspects_punish(&suspects, at("10.0.0.1"), start);
    suspects_punish(&suspects, at("2001:db8::1"), start);
    for (size_t i = 0; i < ARRAY_LEN(beside); i++)
        check_standing(beside[i], start, STANDING_GOOD);
    check_standing("10.0.0.1", start, STANDING_KEPT_OUT);
    check_standing("2001:db8::1", start, STANDING_KEPT_OUT);
}
END_TEST

START_TEST(all_ports_are_one)
{
    suspects_punish(&suspects, at_port("10.0.0.1", 1), start);
    ck_assert_int_eq(suspects_standing(&suspects, at_port("10.0.0.1", 2), start),
                     STANDING_KEPT_OUT);
    ck_assert_ptr_eq(suspects_faults(&suspects, at_port("10.0.0.1", 1), start),
                     suspects_faults(&suspects, at_port("10.0.0.1", 2), start));
}
END_TEST

START_TEST(ipv4_and_its_mapped_form_are_one)
{
    suspects_punish(&suspects, at("10.0.0.1"), start);
    check_standing("::ffff:10.0.0.1", start, STANDING_KEPT_OUT);
    suspects_punish(&suspects, at("::ffff:10.0.0.2"), start);
    check_standing("10.0.0.2", start, STANDING_KEPT_OUT);
    ck_assert_ptr_eq(suspects_faults(&suspects, at("10.0.0.1"), start),
                     suspects_faults(&suspects, at("::ffff:10.0.0.1"), start));
}
END_TEST

static const sa_family_t other_families[] = {AF_UNSPEC, AF_UNIX, AF_VSOCK};

START_TEST(other_families_have_none)
{
    struct sockaddr_storage other = *at("10.0.0.1");
    other.ss_family = other_families[_i];
    ck_assert_ptr_null(suspects_faults(&suspects, &other, start));
    suspects_punish(&suspects, &other, start);
    ck_assert(!suspects_any(&suspects, start));
    // Nor those of an address that looks like it, or of any other.
    suspects_punish(&suspects, at("10.0.0.1"), start);
    suspects_punish(&suspects, at("::"), start);
    for (uint32_t i = 0; i < 20000; i++) {
        _Atomic uint64_t *place = suspects_faults(&suspects, numbered(i), start);
        if (place)
            atomic_store(place, 1000 * FAULTS_MAX);
    }
    ck_assert_int_eq(suspects_standing(&suspects, &other, start), STANDING_GOOD);
    ck_assert(!suspects_has_too_many(&suspects, &other, true, start));
}
END_TEST

START_TEST(the_oldest_gives_way_past_64)
{
    for (uint32_t i = 0; i < 64; i++)
        suspects_punish(&suspects, numbered(i), start + i);
    suspects_punish(&suspects, numbered(63), start + 64); // has its place
    for (uint32_t i = 0; i < 64; i++)
        ck_assert_int_eq(suspects_standing(&suspects, numbered(i), start + 64), STANDING_KEPT_OUT);
    for (uint32_t i = 64; i < 200; i++) {
        suspects_punish(&suspects, numbered(i), start + 1 + i);
        ck_assert_int_eq(suspects_standing(&suspects, numbered(i - 64), start + 1 + i),
                         STANDING_GOOD);
        for (uint32_t still = i - 63; still <= i; still++)
            ck_assert_int_eq(suspects_standing(&suspects, numbered(still), start + 1 + i),
                             STANDING_KEPT_OUT);
    }
}
END_TEST

// ---- faults

static void add_faults(const char *of, uint64_t faults)
{
    atomic_fetch_add(suspects_faults(&suspects, at(of), start), faults);
}

static bool has_too_many(const char *who, bool suspect, uint64_t now)
{
    return suspects_has_too_many(&suspects, at(who), suspect, now);
}

START_TEST(of_an_address_4_times_as_many)
{
    ck_assert_uint_eq(suspects_faults_max(&suspects, false), FAULTS_MAX);
    add_faults("10.0.0.1", 4 * FAULTS_MAX);
    ck_assert(!has_too_many("10.0.0.1", false, start));
    add_faults("10.0.0.1", 1);
    ck_assert(has_too_many("10.0.0.1", false, start));
}
END_TEST

START_TEST(of_a_suspect_an_eighth)
{
    ck_assert_uint_eq(suspects_faults_max(&suspects, true), FAULTS_MAX / 8);
    add_faults("10.0.0.1", 4 * FAULTS_MAX / 8);
    ck_assert(!has_too_many("10.0.0.1", true, start));
    add_faults("10.0.0.1", 1);
    ck_assert(has_too_many("10.0.0.1", true, start));
    ck_assert(!has_too_many("10.0.0.1", false, start));
}
END_TEST

START_TEST(within_a_second)
{
    ck_assert(!has_too_many("10.0.0.1", false, start)); // begins one
    add_faults("10.0.0.1", 4 * FAULTS_MAX);
    ck_assert(!has_too_many("10.0.0.1", false, start + second / 2));
    add_faults("10.0.0.1", 1);
    ck_assert(has_too_many("10.0.0.1", false, start + second));
    // The next look begins the next, in which what came since the last one counts.
    add_faults("10.0.0.1", 4 * FAULTS_MAX);
    ck_assert(!has_too_many("10.0.0.1", false, start + second + 1));
    add_faults("10.0.0.1", 1);
    ck_assert(has_too_many("10.0.0.1", false, start + 2 * second + 1));
    ck_assert(!has_too_many("10.0.0.1", false, start + 2 * second + 2));
}
END_TEST

START_TEST(two_addresses_count_apart)
{
    add_faults("10.0.0.1", 1000 * FAULTS_MAX);
    ck_assert(has_too_many("10.0.0.1", true, start));
    ck_assert(!has_too_many("10.0.0.2", true, start));
    ck_assert(!has_too_many("2001:db8::1", true, start));
}
END_TEST

enum { ADDRESSES = 20000, PLACES = SUSPECTS_SET << SUSPECTS_SETS_LOG2 };

static size_t index_of(const void *place)
{
    return (size_t)((const char *)place - (const char *)suspects.faults) / sizeof **suspects.faults;
}

// How many of all addresses have a place, none the same.
static int places_of_all(const void *places[ADDRESSES], uint64_t now)
{
    static int holders[PLACES];
    memset(holders, 0, sizeof holders);
    int n = 0;
    for (uint32_t i = 0; i < ADDRESSES; i++) {
        const _Atomic uint64_t *place = suspects_faults(&suspects, numbered(i), now);
        places[i] = place;
        if (!place)
            continue;
        ck_assert_int_eq(holders[index_of(place)]++, 0);
        n++;
    }
    return n;
}

START_TEST(no_two_share_a_count)
{
    static const void *places[ADDRESSES];
    int n = places_of_all(places, start);
    ck_assert_int_gt(n, PLACES / 10 * 9); // of sets that are filled by chance
    ck_assert_int_le(n, PLACES);
    for (uint32_t i = 0; i < 100; i++) // and keep it, while the others ask again
        ck_assert_ptr_eq(suspects_faults(&suspects, numbered(i), start + second), places[i]);
}
END_TEST

START_TEST(who_is_heard_of_keeps_its_place)
{
    static const void *places[ADDRESSES];
    suspects_faults(&suspects, at("192.168.0.1"), start);
    add_faults("192.168.0.1", 4 * FAULTS_MAX + 1); // at which nobody looks
    places_of_all(places, start + 10 * second);
    ck_assert(has_too_many("192.168.0.1", false, start + 10 * second));
}
END_TEST

// What was counted for the one before is not the next one's.
START_TEST(the_next_one_begins_at_0)
{
    static const void *before[ADDRESSES], *after[ADDRESSES];
    int n = places_of_all(before, start);
    for (uint32_t i = 0; i < ADDRESSES; i++)
        if (before[i]) {
            atomic_fetch_add(suspects_faults(&suspects, numbered(i), start), 4 * FAULTS_MAX + 1);
            ck_assert(suspects_has_too_many(&suspects, numbered(i), false, start));
        }
    ck_assert_int_eq(places_of_all(after, start + second), n);
    ck_assert_mem_eq(before, after, sizeof before);
    for (uint32_t i = 0; i < ADDRESSES; i++)
        if (!before[i]) {
            ck_assert(!suspects_has_too_many(&suspects, numbered(i), false, start + second + 1));
            ck_assert_ptr_nonnull(suspects_faults(&suspects, numbered(i), start + second + 1));
            break;
        }
}
END_TEST

START_TEST(the_stalest_gives_way)
{
    enum { STALE = 2 }; // of each set
    static const void *places[ADDRESSES];
    places_of_all(places, start);
    for (uint32_t i = 0; i < ADDRESSES; i++)
        if (places[i] && index_of(places[i]) % SUSPECTS_SET != STALE)
            suspects_has_too_many(&suspects, numbered(i), false, start + 2 * second);
    for (uint32_t i = 0; i < ADDRESSES; i++)
        if (!places[i]) {
            const void *place = suspects_faults(&suspects, numbered(i), start + 4 * second);
            ck_assert_uint_eq(index_of(place) % SUSPECTS_SET, STALE);
            return;
        }
    ck_abort_msg("all have places");
}
END_TEST

static const char *const pairs[][2] = {
    {"10.0.0.1", "10.0.0.2"},       {"10.0.0.1", "10.0.1.1"},       {"10.0.0.1", "11.0.0.1"},
    {"10.0.0.1", "192.168.77.200"}, {"10.0.0.1", "2001:db8::1"},    {"2001:db8::1", "2001:db8::2"},
    {"2001:db8::", "2001:db9::"},   {"2001:db8::1", "2001:db9::1"}, {"::1", "1::"},
    {"10.1.2.3", "10.5.2.1"},
};

static size_t set_of(const char *address)
{
    return index_of(suspects_faults(&suspects, at(address), start)) / SUSPECTS_SET;
}

// Or somebody could be kept from being counted by who knows four that do.
START_TEST(with_most_seeds_they_are_of_different_sets)
{
    int together = 0;
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        suspects_init(&suspects, PENALTY_MS, FAULTS_MAX, seed * 0xD1B54A32D192ED03u);
        together += set_of(pairs[_i][0]) == set_of(pairs[_i][1]);
    }
    ck_assert_int_lt(together, SEEDS / 100);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("suspects");
    TCase *penalties = tcase_create("penalties");
    tcase_add_checked_fixture(penalties, setup, NULL);
    tcase_add_test(penalties, kept_out_then_a_suspect_then_forgotten);
    tcase_add_test(penalties, doubles_each_time_again_up_to_32_times);
    tcase_add_test(penalties, does_not_double_while_it_lasts);
    tcase_add_test(penalties, begins_with_the_least_once_forgotten);
    tcase_add_test(penalties, without_a_penalty_nobody_is);
    tcase_add_test(penalties, any_while_one_is_left);
    suite_add_tcase(suite, penalties);
    TCase *addresses = tcase_create("addresses");
    tcase_add_checked_fixture(addresses, setup, NULL);
    tcase_add_test(addresses, an_address_beside_is_neither);
    tcase_add_test(addresses, all_ports_are_one);
    tcase_add_test(addresses, ipv4_and_its_mapped_form_are_one);
    tcase_add_loop_test(addresses, other_families_have_none, 0, ARRAY_LEN(other_families));
    tcase_add_test(addresses, the_oldest_gives_way_past_64);
    suite_add_tcase(suite, addresses);
    TCase *faults = tcase_create("faults");
    tcase_add_checked_fixture(faults, setup, NULL);
    tcase_add_test(faults, of_an_address_4_times_as_many);
    tcase_add_test(faults, of_a_suspect_an_eighth);
    tcase_add_test(faults, within_a_second);
    tcase_add_test(faults, two_addresses_count_apart);
    tcase_add_test(faults, no_two_share_a_count);
    tcase_add_test(faults, who_is_heard_of_keeps_its_place);
    tcase_add_test(faults, the_next_one_begins_at_0);
    tcase_add_test(faults, the_stalest_gives_way);
    tcase_add_loop_test(faults, with_most_seeds_they_are_of_different_sets, 0, ARRAY_LEN(pairs));
    suite_add_tcase(suite, faults);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
