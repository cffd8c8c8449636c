// The known-answer check against engines that answer wrong for one kernel, layout or number of tokens
// only: each must be found out, at start and by a load, which is then refused while what was served
// goes on. On the CPU's engine, and by ENGINE_UNDER_TEST on CUDA's over its stand-in.
#include <check.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "client/checkpoint.h"
#include "folder.h"
#include "kernels/fp8.h"
#include "server/verify.h"
#ifdef VERIFY_CUDA
#include "fake_cuda.h"
#endif

enum { GROUPS = 2, OUTPUT_DIM = 128, REDUCED_DIM = 512, LANES = 2, LAYERS = 2 };
#ifdef VERIFY_CUDA
static const struct engine_ops *const honest = &engine_cuda;
static const uint32_t buckets[] = {1, 8, 32, 64, 128, 256};
#else
static const struct engine_ops *const honest = &engine_cpu;
static const uint32_t buckets[] = {1, 8, 32};
#endif

// ---- engines that lie

static bool is_wide(const struct einsum_operand *operand)
{
    float scale;
    if (operand->scale_type == EINSUM_SCALE_UE8M0)
        return *(const uint8_t *)operand->scales < 80;
    memcpy(&scale, operand->scales, sizeof scale);
    return scale < 0x1p-50f;
}

struct mutant {
    const char *what;
    // Of what it lies about; 0: any.
    uint32_t tokens, kernel;
    int wide; // -1: not wide
    enum einsum_scale_type scale_type;
    enum einsum_output_type output_type;
    enum einsum_activation_layout activation_layout;
    enum einsum_scale_layout scale_layout;
    uint32_t least_tokens;
    // What of it is wrong: all, the last token, or the places of tokens 0 and 8.
    enum { ALL, LAST_TOKEN, SWAPPED, LAST_GROUP, OFF_BY_A_BIT } how;
};

static const struct mutant mutants[] = {
#ifdef VERIFY_CUDA
    {"bucket 1", .tokens = 1},
    {"bucket 8", .tokens = 8},
    {"bucket 32", .tokens = 32},
    {"bucket 64", .tokens = 64},
    {"bucket 128", .tokens = 128},
    {"bucket 256", .tokens = 256},
    {"decode, named, in the largest bucket", .tokens = 256, .kernel = 1},
    {"prefill, named, in the smallest bucket", .tokens = 1, .kernel = 2},
    {"small scales of many tokens", .wide = 1, .least_tokens = 128},
    {"UE8M0 scales of many tokens", .scale_type = EINSUM_SCALE_UE8M0, .least_tokens = 256},
    {"FP32 scales of many tokens", .scale_type = EINSUM_SCALE_FP32, .least_tokens = 256},
#else
    {"1 token", .tokens = 1},
    {"2 tokens", .tokens = 2},
    {"3 tokens", .tokens = 3},
    {"4 tokens", .tokens = 4},
    {"8 tokens", .tokens = 8},
    {"rows of six and none over", .tokens = 12},
    {"rows of six and one over", .tokens = 13},
    {"rows of six and two over", .tokens = 14},
    {"rows of six and three over", .tokens = 9},
    {"rows of six and four over", .tokens = 10},
    {"rows of six and five over", .tokens = 11},
#endif
    {"small scales", .wide = 1},
    {"usual scales", .wide = -1},
    {"FP32 scales", .scale_type = EINSUM_SCALE_FP32},
    {"UE8M0 scales", .scale_type = EINSUM_SCALE_UE8M0},
    {"outputs in BF16", .output_type = EINSUM_OUTPUT_BF16},
    {"outputs in FP32", .output_type = EINSUM_OUTPUT_FP32},
    {"TGR", .activation_layout = EINSUM_ACTIVATIONS_TGR},
    {"GTR", .activation_layout = EINSUM_ACTIVATIONS_GTR},
    {"TGK", .scale_layout = EINSUM_SCALES_TGK},
    {"GKT", .scale_layout = EINSUM_SCALES_GKT},
    {"UE8M0 in GKT", .scale_type = EINSUM_SCALE_UE8M0, .scale_layout = EINSUM_SCALES_GKT},
    {"the last token", .least_tokens = 8, .how = LAST_TOKEN},
    {"two tokens a tile apart, swapped", .least_tokens = 9, .how = SWAPPED},
    {"the last group", .how = LAST_GROUP},
    {"the lowest bits but one of BF16", .output_type = EINSUM_OUTPUT_BF16, .how = OFF_BY_A_BIT},
};

static const struct mutant *mutant; // NULL: honest
static const struct engine_batch *running[LANES];

static bool meets(const struct engine_segment *segment)
{
    const struct einsum_operand *operand = &segment->operand;
    return (!mutant->tokens || operand->tokens == mutant->tokens) &&
           operand->tokens >= mutant->least_tokens &&
           (!mutant->kernel || segment->kernel == mutant->kernel) &&
           (!mutant->wide || is_wide(operand) == (mutant->wide > 0)) &&
           (!mutant->scale_type || operand->scale_type == mutant->scale_type) &&
           (!mutant->output_type || operand->output_type == mutant->output_type) &&
           (!mutant->activation_layout ||
            operand->activation_layout == mutant->activation_layout) &&
           (!mutant->scale_layout || operand->scale_layout == mutant->scale_layout);
}

static void turn(uint8_t *bytes, uint64_t n, uint64_t element, uint8_t bits, uint64_t which)
{
    for (uint64_t i = 0; i + element <= n; i += element)
        bytes[i + which] ^= bits;
}

static void lie(const struct einsum_operand *operand)
{
    uint64_t element = einsum_output_element_bytes(operand->output_type);
    uint64_t group_bytes = OUTPUT_DIM * element, token_bytes = GROUPS * group_bytes;
    uint8_t *output = operand->output, swapped[GROUPS * OUTPUT_DIM * 4];
    switch (mutant->how) {
    case ALL:
        turn(output, operand->tokens * token_bytes, element, 0x40, element - 1);
        break;
    case LAST_TOKEN:
        turn(output + (operand->tokens - 1) * token_bytes, token_bytes, element, 0x40, element - 1);
        break;
    case SWAPPED:
        memcpy(swapped, output, token_bytes);
        memcpy(output, output + 8 * token_bytes, token_bytes);
        memcpy(output + 8 * token_bytes, swapped, token_bytes);
        break;
    case LAST_GROUP:
        for (uint32_t t = 0; t < operand->tokens; t++)
            turn(output + t * token_bytes + (GROUPS - 1) * group_bytes, group_bytes, element, 0x40,
                 element - 1);
        break;
    case OFF_BY_A_BIT:
        turn(output, operand->tokens * token_bytes, element, 0x02, 0);
        break;
    }
}

static void lying_submit(struct engine *engine, uint32_t lane, const struct engine_batch *batch)
{
    running[lane] = batch;
    honest->submit(engine, lane, batch);
}

static bool lying_poll(struct engine *engine, uint32_t lane, struct engine_result *result)
{
    if (!honest->poll(engine, lane, result))
        return false;
    for (uint32_t i = 0; mutant && i < running[lane]->segments_n; i++)
        if (meets(&running[lane]->segments[i]))
            lie(&running[lane]->segments[i].operand);
    return true;
}

// ---- the daemon's side

static struct {
    char directory[64];
    struct engine_ops ops;
    struct engine *engine;
    struct weights *weights;
    struct batcher *batcher;
    struct batcher_waker waker;
} site;

static void write_checkpoint(void)
{
    struct error err;
    struct checkpoint_options checkpoint;
    ck_assert(checkpoint_options_init(&checkpoint, "v4-flash", &err) == STATUS_OK);
    checkpoint.directory = site.directory;
    checkpoint.layers = LAYERS;
    checkpoint.shards = 1;
    checkpoint.format = (struct einsum_weight_format){
        GROUPS, OUTPUT_DIM, REDUCED_DIM, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128};
    ck_assert(checkpoint_write(&checkpoint, &err) == STATUS_OK);
}

static enum status load(bool replace, struct error *err)
{
    const struct weights_load load = {
        .path = site.directory, .output_dim = OUTPUT_DIM, .replace = replace};
    return weights_load(site.weights, &load, NULL, err);
}

static void setup(void)
{
    struct error err;
    memset(&site, 0, sizeof site);
    mutant = NULL;
#ifdef VERIFY_CUDA
    static const struct fake_cuda_device hopper = {.driver = CUDART_VERSION,
                                                   .devices = 1,
                                                   .major = 9,
                                                   .sm_count = 8,
                                                   .memory_bytes = (uint64_t)256 << 20};
    fake_cuda_start(&hopper, 1);
#endif
    folder_make(site.directory, sizeof site.directory, "test_verify");
    site.ops = *honest;
    site.ops.submit = lying_submit;
    site.ops.poll = lying_poll;
    const struct engine_options engine = {.threads = 2,
                                          .lanes = LANES,
                                          .batch_segments_max = 4,
                                          .buckets = buckets,
                                          .buckets_n = ARRAY_LEN(buckets),
                                          .reduced_dim_max = 4096,
                                          .wake = batcher_wake,
                                          .wake_context = &site.waker};
    ck_assert_msg(site.ops.open(&engine, &site.engine, &err) == STATUS_OK, "%s", err.text);
    const char *root = site.directory;
    ck_assert(weights_create(&site.ops, site.engine, &root, 1, 4096, &site.weights, &err) ==
              STATUS_OK);
    write_checkpoint();
    ck_assert_msg(load(false, &err) == STATUS_OK, "%s", err.text);
    const struct batcher_options options = {
        .ops = &site.ops,
        .engine = site.engine,
        .lanes = LANES,
        .batches = LANES + 1,
        .batch_input_bytes = 2 << 20,
        .batch_output_bytes = 2 << 20,
        .batch_tokens_max = buckets[ARRAY_LEN(buckets) - 1],
        .batch_requests_max = 4,
        .queue_requests_max = 100,
        .buckets = buckets,
        .buckets_n = ARRAY_LEN(buckets),
    };
    ck_assert(batcher_create(&options, &site.waker, &site.batcher, &err) == STATUS_OK);
}

static void teardown(void)
{
    batcher_destroy(site.batcher);
    weights_destroy(site.weights);
    site.ops.close(site.engine);
    folder_remove(site.directory);
#ifdef VERIFY_CUDA
    fake_cuda_stop();
#endif
}

static struct verify verify_all(void)
{
    return (struct verify){.batcher = site.batcher, .ops = &site.ops, .engine = site.engine};
}

static struct weight *layer(uint32_t index)
{
    char name[64];
    int n = snprintf(name, sizeof name, "layers.%u.attn.wo_a", index);
    struct weight *weight = weights_get(site.weights, name, (size_t)n);
    ck_assert_ptr_nonnull(weight);
    return weight;
}

// ---- tests

START_TEST(an_honest_engine_passes)
{
    struct verify verify = verify_all();
    struct error err;
    uint32_t requests_n[LAYERS];
    for (uint32_t i = 0; i < LAYERS; i++) {
        struct weight *weight = layer(i);
        struct verify_result result;
        ck_assert(verify_weight(&verify, weight, &result, &err) == STATUS_OK);
        ck_assert_msg(result.verdict.passed, "%s", result.verdict.message);
        ck_assert_double_gt(result.verdict.worst_error_ratio, 0);
        requests_n[i] = verify.requests_n;
        weight_unref(weight);
    }
    // What tells of kernels alone is asked once for a format.
    ck_assert_uint_lt(requests_n[1] - requests_n[0], requests_n[0]);
    ck_assert_uint_ge(requests_n[1] - requests_n[0], 6);
#ifdef VERIFY_CUDA
    for (enum cuda_kernel kernel = CUDA_KERNEL_DECODE; kernel <= CUDA_KERNEL_HOPPER_MANY; kernel++)
        ck_assert_uint_gt(fake_cuda_rows(kernel), 0);
#endif
}
END_TEST

START_TEST(a_mutant_is_found_out)
{
    struct verify verify = verify_all();
    struct weight *weight = layer(0);
    struct error err;
    mutant = &mutants[_i];
    enum status status = verify_or_refuse(&verify, weight, &err);
    ck_assert_msg(status == STATUS_DATA_LOSS, "%s", mutant->what);
    ck_assert_msg(strstr(err.text, "self-test of weight \"layers.0.attn.wo_a\" failed: "), "%s",
                  err.text);
    ck_assert_msg(strstr(err.text, " tokens by "), "%s", err.text);
    weight_unref(weight);
}
END_TEST

static enum status check_loaded(void *context, struct weight *const *loaded, uint32_t loaded_n,
                                struct error *err)
{
    struct verify verify = verify_all();
    *(uint32_t *)context += loaded_n;
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < loaded_n && status == STATUS_OK; i++)
        status = verify_or_refuse(&verify, loaded[i], err);
    return status;
}

// All or none, and none means that what was there is served on.
START_TEST(a_load_that_fails_is_refused)
{
    uint32_t checked_n = 0;
    weights_set_check(site.weights, check_loaded, &checked_n);
    struct error err;
    struct weight *before = layer(1);
    mutant = &mutants[0];
    ck_assert_int_eq(load(true, &err), STATUS_DATA_LOSS);
    ck_assert_uint_eq(checked_n, LAYERS);
    struct weight *after = layer(1);
    ck_assert_ptr_eq(before, after);
    weight_unref(after);

    mutant = NULL;
    ck_assert_msg(load(true, &err) == STATUS_OK, "%s", err.text);
    after = layer(1);
    ck_assert_ptr_ne(before, after);
    ck_assert_uint_eq(after->generation, before->generation + 1);
    weight_unref(after);
    weight_unref(before);
}
END_TEST

START_TEST(a_named_kernel_is_asked_by_name)
{
    struct verify verify = verify_all();
    struct engine_info info;
    site.ops.describe(site.engine, &info);
    struct weight *weight = layer(0);
    const struct mutant by_name = {"", .kernel = info.kernels_n};
    mutant = &by_name;
    verify.kernel = info.kernels_n;
    struct verify_result result;
    struct error err;
    ck_assert(verify_weight(&verify, weight, &result, &err) == STATUS_OK);
    ck_assert(!result.verdict.passed);
    ck_assert_ptr_nonnull(strstr(result.verdict.message, info.kernels[info.kernels_n - 1]));
    weight_unref(weight);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("verify");
    TCase *tcase = tcase_create("verify");
    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_set_timeout(tcase, 300);
    tcase_add_test(tcase, an_honest_engine_passes);
    tcase_add_loop_test(tcase, a_mutant_is_found_out, 0, ARRAY_LEN(mutants));
    tcase_add_test(tcase, a_load_that_fails_is_refused);
    tcase_add_test(tcase, a_named_kernel_is_asked_by_name);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
