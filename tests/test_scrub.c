// Scrubbing on the CUDA engine over its stand-in: a bit that turns over in the device's memory is found
// there, by reading it back; the weight is read again, or not served until it can be.
#include <check.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/checkpoint.h"
#include "fake_cuda.h"
#include "folder.h"
#include "server/engine_cuda_internal.h"
#include "server/scrub.h"

enum { LANES = 2, LAYERS = 3, OUTPUT_DIM = 128, PATIENCE_S = 30 };
static const uint32_t buckets[] = {8};

#define WAIT_FOR(condition)                                                                        \
    do {                                                                                           \
        uint64_t end_ns = now_ns() + PATIENCE_S * UINT64_C(1000000000);                            \
        while (!(condition) && now_ns() < end_ns)                                                  \
            usleep(1000);                                                                          \
        ck_assert_msg(condition, "did not come true: " #condition);                                \
    } while (0)

static struct {
    char directory[64];
    struct engine *engine;
    struct weights *weights;
    struct batcher *batcher;
    struct batcher_waker waker;
    struct scrub *scrub;
} site;

static void load_checkpoint(void)
{
    struct error err;
    struct checkpoint_options checkpoint;
    ck_assert(checkpoint_options_init(&checkpoint, "v4-flash", &err) == STATUS_OK);
    checkpoint.directory = site.directory;
    checkpoint.layers = LAYERS;
    checkpoint.shards = 1;
    checkpoint.format = (struct einsum_weight_format){
        4, OUTPUT_DIM, 4096, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128}; // 2 MB
    ck_assert(checkpoint_write(&checkpoint, &err) == STATUS_OK);
    const struct weights_load load = {.path = site.directory, .output_dim = OUTPUT_DIM};
    ck_assert_msg(weights_load(site.weights, &load, NULL, &err) == STATUS_OK, "%s", err.text);
}

static void setup(void)
{
    static const struct fake_cuda_device hopper = {.driver = CUDART_VERSION,
                                                   .devices = 1,
                                                   .major = 9,
                                                   .sm_count = 8,
                                                   .memory_bytes = (uint64_t)256 << 20};
    struct error err;
    memset(&site, 0, sizeof site);
    fake_cuda_start(&hopper, 1);
    folder_make(site.directory, sizeof site.directory, "test_scrub");
    const struct engine_options engine = {.lanes = LANES,
                                          .batch_segments_max = 4,
                                          .buckets = buckets,
                                          .buckets_n = ARRAY_LEN(buckets),
                                          .reduced_dim_max = 4096};
    ck_assert(engine_cuda.open(&engine, &site.engine, &err) == STATUS_OK);
    const char *root = site.directory;
    ck_assert(weights_create(&engine_cuda, site.engine, &root, 1, 4096, &site.weights, &err) ==
              STATUS_OK);
    load_checkpoint();
    const struct batcher_options batcher = {
        .ops = &engine_cuda,
        .engine = site.engine,
        .lanes = LANES,
        .batches = LANES + 1,
        .batch_input_bytes = 1 << 20,
        .batch_output_bytes = 1 << 20,
        .batch_tokens_max = buckets[0],
        .batch_requests_max = 4,
        .queue_requests_max = 100,
        .buckets = buckets,
        .buckets_n = ARRAY_LEN(buckets),
    };
    ck_assert(batcher_create(&batcher, &site.waker, &site.batcher, &err) == STATUS_OK);
    const struct scrub_options scrub = {.weights = site.weights,
                                        .ops = &engine_cuda,
                                        .engine = site.engine,
                                        .batcher = site.batcher,
                                        .seconds = 1};
    ck_assert(scrub_create(&scrub, &site.scrub, &err) == STATUS_OK);
}

static void teardown(void)
{
    scrub_destroy(site.scrub);
    batcher_destroy(site.batcher);
    weights_destroy(site.weights);
    engine_cuda.close(site.engine);
    folder_remove(site.directory);
    fake_cuda_stop();
}

static struct weight *layer(uint32_t index)
{
    char name[64];
    int n = snprintf(name, sizeof name, "layers.%u.attn.wo_a", index);
    struct weight *weight = weights_get(site.weights, name, (size_t)n);
    ck_assert_ptr_nonnull(weight);
    return weight;
}

static void turn_bit(const struct weight *weight, uint64_t offset)
{
    uint8_t *byte = fake_cuda_at((uintptr_t)weight->engine_weight->cuda.memory + offset, 1);
    fake_cuda_hold(true); // nobody reads it meanwhile
    *byte ^= 0x08;
    fake_cuda_hold(false);
}

START_TEST(what_is_sound_is_left_alone)
{
    struct weight *before = layer(1);
    WAIT_FOR(scrub_stats(site.scrub).passes >= 2);
    struct scrub_stats stats = scrub_stats(site.scrub);
    ck_assert_uint_eq(stats.damaged, 0);
    ck_assert_uint_ge(stats.bytes, 2 * LAYERS * before->resident_bytes);
    struct weight *after = layer(1);
    ck_assert_ptr_eq(before, after);
    weight_unref(after);
    weight_unref(before);
}
END_TEST

// First byte, last byte, and some between: elements, the second form, scales, flags.
START_TEST(a_turned_bit_is_found_and_the_weight_read_again)
{
    struct weight *before = layer(1);
    uint64_t last = before->resident_bytes - 1;
    turn_bit(before, _i < 9 ? last / 8 * (uint64_t)_i : last);
    WAIT_FOR(scrub_stats(site.scrub).reloaded == 1);
    ck_assert_uint_eq(scrub_stats(site.scrub).damaged, 1);
    ck_assert(weight_damaged(before));
    struct weight *after = layer(1);
    ck_assert_ptr_ne(before, after);
    ck_assert(!weight_damaged(after));
    ck_assert_uint_eq(after->crc32c, before->crc32c);
    ck_assert_uint_eq(after->generation, before->generation + 1);
    ck_assert_uint_eq(weights_totals(site.weights).damaged, 0);
    weight_unref(after);
    weight_unref(before);
}
END_TEST

START_TEST(without_its_checkpoint_it_stays_damaged)
{
    struct weight *weight = layer(2);
    folder_remove(site.directory);
    turn_bit(weight, 12345);
    WAIT_FOR(scrub_stats(site.scrub).damaged == 1);
    WAIT_FOR(weights_totals(site.weights).damaged == 1);
    ck_assert(weight_damaged(weight));
    ck_assert_uint_eq(scrub_stats(site.scrub).reloaded, 0);
    struct weight *other = layer(0);
    ck_assert(!weight_damaged(other));
    weight_unref(other);
    weight_unref(weight);
    folder_make(site.directory, sizeof site.directory, "test_scrub"); // for teardown
}
END_TEST

// Unloading must return memory at once, however long a pass takes.
START_TEST(nothing_is_held_between_pieces)
{
    struct error err;
    uint64_t before = fake_cuda_live().device_bytes;
    WAIT_FOR(scrub_stats(site.scrub).bytes > 0);
    struct weight *weight = layer(0);
    uint64_t bytes = weight->resident_bytes;
    weight_unref(weight);
    ck_assert(weights_unload(site.weights, "*", NULL, NULL, &err) == STATUS_OK);
    WAIT_FOR(fake_cuda_live().device_bytes <= before - LAYERS * bytes);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("scrub");
    TCase *tcase = tcase_create("scrub");
    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_set_timeout(tcase, 300);
    tcase_add_test(tcase, what_is_sound_is_left_alone);
    tcase_add_loop_test(tcase, a_turned_bit_is_found_and_the_weight_read_again, 0, 10);
    tcase_add_test(tcase, without_its_checkpoint_it_stays_damaged);
    tcase_add_test(tcase, nothing_is_held_between_pieces);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
