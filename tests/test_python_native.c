// One call to several daemons at once: all answered, some refused, some never started; for each its
// own outcome, and nothing waits for what was not started.

#include "../client/python/native.h"
#include "fake_server.h"

enum { DAEMONS = 3, TOKENS = 4, BLOCK_BYTES = TOKENS * FAKE_GROUPS * FAKE_REDUCED_DIM };
enum { OUT_BYTES = TOKENS * FAKE_GROUPS * FAKE_OUTPUT_DIM * 2 };

static const struct fake_act answer = {.kind = FAKE_ANSWER};
static const struct fake_act refuse = {.kind = FAKE_STATUS, .status = 5, .text = "no such weight"};

struct site {
    struct fake fakes[DAEMONS];
    struct einsum_client *clients[DAEMONS];
    uint8_t activations[DAEMONS][BLOCK_BYTES], outputs[DAEMONS][OUT_BYTES];
    float scales[TOKENS * FAKE_GROUPS];
    struct einsum_client_request requests[DAEMONS];
    struct einsum_client_response responses[DAEMONS];
    struct einsum_client_error errors[DAEMONS];
    enum einsum_client_status statuses[DAEMONS];
};

static void site_init(struct site *site, const struct fake_act *const *acts)
{
    memset(site, 0, sizeof *site);
    for (size_t i = 0; i < DAEMONS; i++) {
        fake_start(&site->fakes[i], acts[i], 1);
        char endpoint[64];
        snprintf(endpoint, sizeof endpoint, "127.0.0.1:%d", site->fakes[i].port);
        struct einsum_client_error error;
        ck_assert_msg(einsum_client_create(endpoint, NULL, &site->clients[i], &error) == 0, "%s",
                      error.text);
        memset(site->activations[i], (int)(i + 1), BLOCK_BYTES);
        site->requests[i] = (struct einsum_client_request){
            .weight = "layers.3.attn.wo_a",
            .recipe = EINSUM_CLIENT_RECIPE_1_128_128,
            .activation_layout = EINSUM_CLIENT_ACTIVATIONS_TGR,
            .scale_layout = EINSUM_CLIENT_SCALES_TGK,
            .scale_type = EINSUM_CLIENT_SCALE_FP32,
            .output_type = EINSUM_CLIENT_OUTPUT_BF16,
            .tokens = TOKENS,
            .activations = site->activations[i],
            .activations_bytes = BLOCK_BYTES,
            .scales = site->scales,
            .scales_bytes = sizeof site->scales,
            .output = site->outputs[i],
            .output_bytes = OUT_BYTES,
        };
    }
}

static void site_deinit(struct site *site)
{
    for (size_t i = 0; i < DAEMONS; i++) {
        einsum_client_destroy(site->clients[i]);
        fake_stop(&site->fakes[i]);
    }
}

static void ask_all(struct site *site)
{
    ck_assert(einsumd_einsum_all(DAEMONS, site->clients, site->requests, site->responses,
                                 site->errors, site->statuses));
}

static void check_answer(const struct site *site, size_t i)
{
    ck_assert_int_eq((int)site->statuses[i], EINSUM_CLIENT_OK);
    ck_assert_uint_eq(site->responses[i].tokens, TOKENS);
    uint32_t sum =
        fake_sum(site->scales, sizeof site->scales, fake_sum(site->activations[i], BLOCK_BYTES, 1));
    for (size_t at = 0; at < OUT_BYTES; at++)
        ck_assert_uint_eq(site->outputs[i][at], fake_output_byte(sum, at));
}

START_TEST(test_all_answer)
{
    const struct fake_act *acts[DAEMONS] = {&answer, &answer, &answer};
    static struct site site;
    site_init(&site, acts);
    for (int round = 0; round < 50; round++) {
        memset(site.outputs, 0, sizeof site.outputs);
        ask_all(&site);
        for (size_t i = 0; i < DAEMONS; i++)
            check_answer(&site, i);
    }
    site_deinit(&site);
}
END_TEST

START_TEST(test_one_refuses_and_one_is_not_started)
{
    const struct fake_act *acts[DAEMONS] = {&answer, &refuse, &answer};
    static struct site site;
    site_init(&site, acts);
    site.requests[2].weight = NULL; // the library refuses it
    for (int round = 0; round < 10; round++) {
        ask_all(&site);
        check_answer(&site, 0);
        ck_assert_int_eq((int)site.statuses[1], EINSUM_CLIENT_NOT_FOUND);
        ck_assert_str_eq(site.errors[1].text, "no such weight");
        ck_assert_int_eq((int)site.statuses[2], EINSUM_CLIENT_INVALID_ARGUMENT);
        ck_assert(!site.errors[2].from_server);
    }
    ck_assert_uint_eq(site.fakes[2].calls, 0);
    for (size_t i = 0; i < DAEMONS; i++)
        site.requests[i].weight = NULL;
    ask_all(&site);
    ck_assert_int_eq((int)site.statuses[0], EINSUM_CLIENT_INVALID_ARGUMENT);
    site_deinit(&site);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("python_native");
    TCase *tcase = tcase_create("all");
    tcase_set_timeout(tcase, 120);
    tcase_add_test(tcase, test_all_answer);
    tcase_add_test(tcase, test_one_refuses_and_one_is_not_started);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
