// The CUDA engine when things go wrong, on the stand-in of fake_cuda.h: every fault gives the right
// status and a sentence that names its cause; nothing leaks and nothing hangs; what is served goes
// on unless the device is lost, and then nothing is answered. (test_engine.c covers when they go
// right.)
// Method: make the n-th call, allocation or operation fail for n = 1, 2, ... until one run ends
// without meeting the fault, so that no place is left out.
#include <pthread.h>
#include <unistd.h>

#include "fake_cuda_site.h"
#include "server/batch.h"

static void ask_fill(struct ask *ask, uint32_t lane, const struct source *source,
                     const struct engine_weight *weight, uint32_t tokens, uint32_t kernel)
{
    const struct einsum_weight_format *format = &source->base.format;
    uint64_t a_bytes = einsum_activation_bytes(tokens, format->groups, format->reduced_dim);
    uint64_t s_bytes = (uint64_t)tokens * format->groups * (format->reduced_dim / format->block_r);
    uint64_t out_bytes =
        einsum_output_bytes(EINSUM_OUTPUT_FP32, tokens, format->groups, format->output_dim);
    uint8_t *scales = input[lane] + align_up(a_bytes, CACHE_LINE_BYTES);
    ck_assert_uint_le(align_up(a_bytes, CACHE_LINE_BYTES) + s_bytes, INPUT_BYTES);
    ck_assert_uint_le(out_bytes, OUTPUT_BYTES);
    for (uint64_t i = 0; i < a_bytes; i++)
        input[lane][i] = random_e4m3();
    for (uint64_t i = 0; i < s_bytes; i++)
        scales[i] = (uint8_t)(120 + random_below(9));
    memset(output[lane], 0x5A, out_bytes);
    uint32_t bucket = 0;
    while (buckets[bucket] < tokens)
        bucket++;
    ask->source = source;
    ask->segment = (struct engine_segment){
        .weight = weight,
        .kernel = kernel,
        .operand = {.tokens = tokens,
                    .groups = format->groups,
                    .activation_layout = EINSUM_ACTIVATIONS_TGR,
                    .scale_layout = EINSUM_SCALES_TGK,
                    .scale_type = EINSUM_SCALE_UE8M0,
                    .output_type = EINSUM_OUTPUT_FP32,
                    .activations = input[lane],
                    .scales = scales,
                    .output = output[lane]},
    };
    ask->batch = (struct engine_batch){
        .segments = &ask->segment,
        .segments_n = 1,
        .tokens = tokens,
        .bucket = bucket,
        .input = input[lane],
        .input_bytes = align_up(a_bytes, CACHE_LINE_BYTES) + s_bytes,
        .output = output[lane],
        .output_bytes = out_bytes,
    };
}

static struct engine_result run(const struct source *source, const struct engine_weight *weight,
                                uint32_t tokens)
{
    struct ask ask;
    ask_fill(&ask, 0, source, weight, tokens, 0);
    ops->submit(engine, 0, &ask.batch);
    struct engine_result result = finish(0);
    if (result.status == STATUS_OK)
        ask_check(&ask);
    return result;
}

static void expect_right(const struct source *source, const struct engine_weight *weight)
{
    ck_assert_int_eq(run(source, weight, FEW).status, STATUS_OK);
    ck_assert_int_eq(run(source, weight, MANY).status, STATUS_OK);
}

static void expect_lost(const struct engine_result *result, const char *cause)
{
    ck_assert_int_eq(result->status, STATUS_UNAVAILABLE);
    ck_assert_msg(strstr(result->error.text, "the device is lost: ") == result->error.text,
                  "\"%s\"", result->error.text);
    ck_assert_msg(strstr(result->error.text, cause), "\"%s\" lacks \"%s\"", result->error.text,
                  cause);
}

// ---- devices

static const struct unusable {
    struct fake_cuda_device device;
    const char *kernel;
    const char *text;
} unusables[] = {
    {{.driver = 0}, NULL, "no NVIDIA driver is installed"},
    {{.driver = 12080, .devices = 1, .major = 9},
     NULL,
     "the NVIDIA driver supports CUDA 12.8, this build needs 13."},
    {{.driver = CUDART_VERSION}, NULL, "no CUDA device: no CUDA-capable device is detected"},
    {{.driver = CUDART_VERSION, .devices = 1, .major = 7, .minor = 5},
     NULL,
     "Imaginary 9000 cannot be used: compute capability below 8.9"},
    {{.driver = CUDART_VERSION, .devices = 1, .major = 8, .minor = 6}, NULL, "below 8.9"},
    {{.driver = CUDART_VERSION, .devices = 1, .major = 10}, NULL, "above 9.0 and below 12.0"},
    {{.driver = CUDART_VERSION, .devices = 1, .major = 11}, NULL, "above 9.0 and below 12.0"},
    {{.driver = CUDART_VERSION, .devices = 1, .major = 12, .minor = 2}, NULL, "above 12.1"},
    {{.driver = CUDART_VERSION, .devices = 1, .major = 13}, NULL, "above 12.1"},
    {{.driver = CUDART_VERSION, .devices = 1, .major = 9}, "sm120", "needs compute capability 12"},
    {{.driver = CUDART_VERSION, .devices = 1, .major = 12}, "portable", "not built for this"},
    {{.driver = CUDART_VERSION, .devices = 1, .major = 9},
     "avx2",
     "kernel \"avx2\" on Imaginary 9000: no kernel has this name"},
};

START_TEST(a_device_that_cannot_be_used_is_refused_by_name)
{
    const struct unusable *unusable = &unusables[_i];
    fake_cuda_start(&unusable->device, random_state);
    ck_assert_int_eq(open_with(unusable->kernel, 0), STATUS_FAILED_PRECONDITION);
    ck_assert_msg(strstr(err.text, unusable->text), "\"%s\"", err.text);
    ck_assert_ptr_null(engine);
    ck_assert_int_eq(ops->usable(), unusable->device.devices > 0);
    expect_nothing_live();
    fake_cuda_stop();
}
END_TEST

static const struct usable {
    int driver, runtime, major, minor;
    const char *kernel, *text;
} usables[] = {
    {CUDART_VERSION, 0, 8, 9, NULL, "portable"},
    {CUDART_VERSION, 0, 9, 0, NULL, "compute capability 9"},
    {CUDART_VERSION, 0, 9, 0, "portable", "forced by name"},
    {CUDART_VERSION, 0, 12, 0, NULL, "sm120"},
    {14000, 13020, 12, 1, "sm120", "forced by name"}, // a driver of the next release
    {13000, 13020, 12, 0, "auto", "sm120"},           // an older one of the same
};

START_TEST(a_device_that_can_be_used_is_described)
{
    const struct usable *usable = &usables[_i];
    struct fake_cuda_device device = hopper;
    device.driver = usable->driver;
    device.runtime = usable->runtime;
    device.major = usable->major;
    device.minor = usable->minor;
    fake_cuda_start(&device, random_state);
    ck_assert_msg(open_with(usable->kernel, 0) == STATUS_OK, "%s", err.text);
    struct engine_info info;
    ops->describe(engine, &info);
    char name[64];
    snprintf(name, sizeof name, "Imaginary 9000, SM %d.%d, 8 SMs, 0.2 GiB", usable->major,
             usable->minor);
    ck_assert_str_eq(info.device, name);
    ck_assert_msg(strstr(info.kernel, usable->text), "\"%s\"", info.kernel);
    ck_assert_str_eq(info.kernels[0], "decode");
    ck_assert_str_eq(info.kernels[1], "prefill");
    struct fake_cuda_live live = fake_cuda_live();
    ck_assert_uint_eq(live.graphs, 0); // all instantiated
    uint32_t graphs_n = 0;
    for (size_t i = 0; i < ARRAY_LEN(buckets); i++)
        graphs_n += info.bucket_graphs_n[i];
    ck_assert_uint_eq(live.graph_execs, graphs_n);
    ck_assert_uint_eq(info.lanes_bytes + info.graphs_bytes + info.scratch_bytes, live.device_bytes);
    ck_assert_uint_eq(info.graph_replays, 0);
    close_device();
}
END_TEST

// ---- opening

START_TEST(no_memory_at_open)
{
    fake_cuda_start(&hopper, random_state);
    uint32_t n = 1;
    for (; n < FAULTS_MAX; n++) {
        fake_cuda_fail_allocation(n);
        enum status status = open_with(NULL, 0);
        if (!fake_cuda_failed_call()) {
            ck_assert_msg(status == STATUS_OK, "%s", err.text);
            break;
        }
        ck_assert_int_eq(status, STATUS_RESOURCE_EXHAUSTED);
        ck_assert_msg(strstr(err.text, ": out of memory"), "\"%s\"", err.text);
        ck_assert_ptr_null(engine);
        expect_nothing_live();
    }
    ck_assert_uint_gt(n, 4 + LANES * 4 + LANES * ARRAY_LEN(buckets)); // it met them all
    close_device();
}
END_TEST

START_TEST(a_device_too_small_says_so)
{
    struct fake_cuda_device small = hopper;
    for (small.memory_bytes = 1 << 10; small.memory_bytes < 16 << 20; small.memory_bytes *= 4) {
        fake_cuda_start(&small, random_state);
        ck_assert_int_eq(open_with(NULL, 0), STATUS_RESOURCE_EXHAUSTED);
        ck_assert_msg(strstr(err.text, ": out of memory"), "\"%s\"", err.text);
        expect_nothing_live();
        fake_cuda_stop();
    }
}
END_TEST

// Any call of open finds the device lost, or fails once (odd).
START_TEST(a_call_of_open_fails)
{
    fake_cuda_start(&hopper, random_state);
    uint32_t n = 1, failed = 0;
    for (;; n++) {
        ck_assert_uint_lt(n, FAULTS_MAX);
        fake_cuda_fail_call(n, cudaErrorECCUncorrectable, _i % 2 == 0);
        enum status status = open_with(NULL, 0);
        const char *call = fake_cuda_failed_call();
        if (status == STATUS_OK)
            ops->close(engine);
        else
            ck_assert_ptr_null(engine);
        expect_nothing_live();
        if (!call)
            break;
        fake_cuda_stop();
        fake_cuda_start(&hopper, random_state);
        // What memory is left is for the log alone, and the runtime's version known to itself.
        bool asked_only =
            strcmp(call, "cudaMemGetInfo") == 0 || strcmp(call, "cudaRuntimeGetVersion") == 0;
        ck_assert_msg(status != STATUS_OK || asked_only, "%s", call);
        if (status == STATUS_OK || strcmp(call, "cudaDriverGetVersion") == 0)
            continue; // else it says that there is no driver
        failed++;
        bool before =
            strcmp(call, "cudaGetDeviceCount") == 0 || strcmp(call, "cudaRuntimeGetVersion") == 0;
        ck_assert_int_eq(status, before ? STATUS_FAILED_PRECONDITION : STATUS_UNAVAILABLE);
        ck_assert_msg(strstr(err.text, "uncorrectable ECC error"), "%s: \"%s\"", call, err.text);
    }
    ck_assert_uint_gt(failed, 50);
    fake_cuda_stop();
}
END_TEST

START_TEST(no_memory_for_a_batch)
{
    open_device(&hopper);
    struct fake_cuda_live before = fake_cuda_live();
    for (uint32_t n = 1;; n++) {
        void *memory = NULL;
        fake_cuda_fail_allocation(n);
        enum status status = ops->memory_alloc(engine, INPUT_BYTES, &memory, &err);
        if (!fake_cuda_failed_call()) {
            ck_assert_uint_gt(n, 2);
            ck_assert_int_eq(status, STATUS_OK);
            ops->memory_free(engine, memory, INPUT_BYTES);
            break;
        }
        ck_assert_int_eq(status, STATUS_RESOURCE_EXHAUSTED);
        ck_assert_ptr_nonnull(strstr(err.text, ": out of memory"));
        ck_assert_uint_eq(fake_cuda_live().pinned, before.pinned);
        ck_assert_uint_eq(fake_cuda_live().allocations, before.allocations);
    }
    for (uint32_t n = 1;; n++) {
        void *memory = NULL;
        fake_cuda_fail_call(n, cudaErrorIllegalAddress, false);
        enum status status = ops->memory_alloc(engine, INPUT_BYTES, &memory, &err);
        if (!fake_cuda_failed_call()) {
            ops->memory_free(engine, memory, INPUT_BYTES);
            break;
        }
        ck_assert_int_eq(status, STATUS_UNAVAILABLE);
        ck_assert_ptr_nonnull(strstr(err.text, "illegal memory access"));
        ck_assert_uint_eq(fake_cuda_live().pinned, before.pinned);
        ck_assert_uint_eq(fake_cuda_live().allocations, before.allocations);
    }
    close_device();
}
END_TEST

// ---- loading

// What a load must leave as it was when it fails.
static void expect_untouched(const struct fake_cuda_live *before)
{
    struct fake_cuda_live live = fake_cuda_live();
    ck_assert_uint_eq(live.allocations, before->allocations);
    ck_assert_uint_eq(live.device_bytes, before->device_bytes);
}

START_TEST(no_memory_for_a_weight)
{
    open_lanes();
    struct source served = source_of(&formats[0]), wanted = source_of(&formats[2]);
    struct engine_weight *weight = load(&served);
    struct fake_cuda_live before = fake_cuda_live();
    uint32_t n = 1;
    for (;; n++) {
        struct engine_weight *other = NULL;
        fake_cuda_fail_call(n, cudaErrorMemoryAllocation, false);
        enum status status = ops->weight_load(engine, &wanted.base, &other, &err);
        if (!fake_cuda_failed_call()) {
            fake_cuda_fail_call(0, cudaSuccess, false);
            ck_assert_msg(status == STATUS_OK, "%s", err.text);
            ck_assert_int_eq(run(&wanted, other, 2).status, STATUS_OK);
            ops->weight_free(engine, other);
            break;
        }
        ck_assert_int_eq(status, STATUS_RESOURCE_EXHAUSTED);
        ck_assert_msg(strstr(err.text, ": out of memory"), "\"%s\"", err.text);
        ck_assert_ptr_null(other);
        expect_untouched(&before);
        expect_right(&served, weight);
    }
    ck_assert_uint_gt(n, 12);
    ops->weight_free(engine, weight);
    source_free(&served);
    source_free(&wanted);
    close_lanes();
}
END_TEST

// The device's own memory is full, and then there is room again.
START_TEST(a_weight_that_does_not_fit_is_loaded_later)
{
    open_lanes();
    struct source served = source_of(&formats[0]), wanted = source_of(&formats[2]);
    struct engine_weight *weight = load(&served), *loaded[32];
    uint32_t loaded_n = 0;
    enum status status;
    do {
        ck_assert_uint_lt(loaded_n, ARRAY_LEN(loaded));
        status = ops->weight_load(engine, &wanted.base, &loaded[loaded_n], &err);
        loaded_n += status == STATUS_OK;
    } while (status == STATUS_OK);
    ck_assert_int_eq(status, STATUS_RESOURCE_EXHAUSTED);
    ck_assert_uint_gt(loaded_n, 3); // each lies twice
    ck_assert_ptr_nonnull(strstr(err.text, "memory for a weight on the device: out of memory"));
    expect_right(&served, weight);
    ck_assert_int_eq(run(&wanted, loaded[loaded_n - 1], 2).status, STATUS_OK);
    ops->weight_free(engine, loaded[0]);
    loaded[0] = load(&wanted);
    ck_assert_int_eq(run(&wanted, loaded[0], 2).status, STATUS_OK);
    for (uint32_t i = 0; i < loaded_n; i++)
        ops->weight_free(engine, loaded[i]);
    ops->weight_free(engine, weight);
    source_free(&served);
    source_free(&wanted);
    close_lanes();
}
END_TEST

static void *load_on_a_thread(void *source)
{
    return load(source);
}

// What is on its way to a slow device must not be written over.
START_TEST(a_slow_device_gets_every_piece)
{
    open_lanes();
    struct source source = source_of(&formats[2]);
    fake_cuda_hold(true);
    pthread_t thread;
    ck_assert_int_eq(pthread_create(&thread, NULL, load_on_a_thread, &source), 0);
    usleep(50000);
    fake_cuda_hold(false);
    void *weight;
    pthread_join(thread, &weight);
    ck_assert_int_eq(run(&source, weight, 2).status, STATUS_OK);
    ops->weight_free(engine, weight);
    source_free(&source);
    close_lanes();
}
END_TEST

// The device is lost while a weight is loaded: by a call (0) or in the middle of its work (1).
START_TEST(lost_while_loading)
{
    struct source small = source_of(&formats[0]), source = source_of(&formats[2]);
    uint32_t n = 1;
    for (bool met = true; met; n++) {
        ck_assert_uint_lt(n, FAULTS_MAX);
        open_lanes();
        struct engine_weight *served = load(&small), *weight = NULL;
        struct fake_cuda_live before = fake_cuda_live();
        if (_i == 0)
            fake_cuda_fail_call(n, cudaErrorLaunchFailure, true);
        else
            fake_cuda_fail_operation(n, cudaErrorLaunchFailure);
        enum status status = ops->weight_load(engine, &source.base, &weight, &err);
        met = _i == 0 ? fake_cuda_failed_call() != NULL : fake_cuda_operations() >= n;
        ck_assert_int_eq(status, met ? STATUS_UNAVAILABLE : STATUS_OK);
        if (met) {
            ck_assert_msg(strstr(err.text, ": unspecified launch failure"), "\"%s\"", err.text);
            ck_assert_ptr_null(weight);
            expect_untouched(&before);
            struct engine_result result = run(&small, served, FEW);
            expect_lost(&result, "unspecified launch failure");
        } else {
            ops->weight_free(engine, weight);
        }
        ops->weight_free(engine, served);
        close_lanes();
    }
    ck_assert_uint_gt(n, _i == 0 ? 12 : 8);
    source_free(&small);
    source_free(&source);
}
END_TEST

// ---- batches

static const uint32_t sizes[] = {FEW, MANY};

// Any call between submit and the end of the poll finds the device lost, or fails once (odd).
START_TEST(a_call_of_a_batch_fails)
{
    uint32_t tokens = sizes[_i / 2], met_n = 0;
    bool sticky = _i % 2 == 0;
    struct source source = source_of(&formats[0]);
    for (uint32_t n = 1;; n++) {
        ck_assert_uint_lt(n, FAULTS_MAX);
        open_lanes();
        struct engine_weight *weight = load(&source);
        fake_cuda_fail_call(n, cudaErrorIllegalAddress, sticky);
        struct engine_result result = run(&source, weight, tokens);
        const char *call = fake_cuda_failed_call();
        // When the report comes sooner, or measuring fails, the batch is none the worse.
        bool harmless = !call || strcmp(call, "cudaEventElapsedTime") == 0;
        if (harmless)
            ck_assert_msg(result.status == STATUS_OK, "%s", result.error.text);
        else
            expect_lost(&result, "an illegal memory access was encountered");
        met_n += !harmless;
        if (call && sticky) {
            result = run(&source, weight, tokens);
            expect_lost(&result, "an illegal memory access was encountered");
        }
        ops->weight_free(engine, weight);
        close_lanes();
        if (!call)
            break;
    }
    ck_assert_uint_ge(met_n, tokens == FEW ? 1 : 8);
    source_free(&source);
}
END_TEST

START_TEST(the_device_faults_in_a_batch)
{
    uint32_t tokens = sizes[_i], met_n = 0;
    struct source source = source_of(&formats[0]);
    for (uint32_t n = 1;; n++) {
        ck_assert_uint_lt(n, FAULTS_MAX);
        open_lanes();
        struct engine_weight *weight = load(&source);
        fake_cuda_fail_operation(n, cudaErrorECCUncorrectable);
        struct engine_result result = run(&source, weight, tokens);
        bool met = fake_cuda_operations() >= n;
        if (met) {
            expect_lost(&result, "uncorrectable ECC error");
            met_n++;
            result = run(&source, weight, tokens);
            expect_lost(&result, "uncorrectable ECC error");
        } else {
            ck_assert_int_eq(result.status, STATUS_OK);
        }
        ops->weight_free(engine, weight);
        close_lanes();
        if (!met)
            break;
    }
    ck_assert_uint_ge(met_n, tokens == FEW ? 3 : 8); // fetch, kernel, report; and copies, events
    source_free(&source);
}
END_TEST

// One batch on each lane, few tokens and many.
START_TEST(nothing_is_answered_before_its_time)
{
    open_lanes();
    struct source source = source_of(&formats[0]);
    struct engine_weight *weight = load(&source);
    struct ask asks[LANES];
    struct engine_result result;
    fake_cuda_hold(true);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        ck_assert(!ops->poll(engine, lane, &result)); // nothing was submitted
        ask_fill(&asks[lane], lane, &source, weight, sizes[lane], 0);
        ops->submit(engine, lane, &asks[lane].batch);
    }
    for (uint64_t until_ns = now_ns() + 2000000; now_ns() < until_ns;)
        for (uint32_t lane = 0; lane < LANES; lane++)
            ck_assert(!ops->poll(engine, lane, &result));
    for (uint32_t lane = 0; lane < LANES; lane++)
        ck_assert_uint_eq(output[lane][0], 0x5A);
    fake_cuda_hold(false);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        result = finish(lane);
        ck_assert_int_eq(result.status, STATUS_OK);
        ck_assert_uint_gt(result.kernel_ns, 0);
        ck_assert_uint_ge(result.ended_ns - result.started_ns, 2000000);
        ask_check(&asks[lane]);
    }
    struct engine_info info;
    ops->describe(engine, &info);
    ck_assert_uint_eq(info.graph_replays, LANES);
    ck_assert_uint_ge(info.eager_launches, 2); // of the load
    ops->weight_free(engine, weight);
    source_free(&source);
    close_lanes();
}
END_TEST

// Batches that are small and large in turn, on one lane: what one leaves behind must not pass for
// the other's end.
START_TEST(small_and_large_batches_take_turns)
{
    open_lanes();
    struct source sources[] = {source_of(&formats[0]), source_of(&formats[1])};
    struct engine_weight *weights[] = {load(&sources[0]), load(&sources[1])};
    for (int round = 0; round < 60; round++) {
        uint32_t lane = random_below(LANES), which = random_below(2);
        uint32_t tokens = 1 + random_below(round % 2 ? 8 : 2 * MANY);
        struct ask ask;
        ask_fill(&ask, lane, &sources[which], weights[which], tokens, 0);
        ops->submit(engine, lane, &ask.batch);
        ck_assert_int_eq(finish(lane).status, STATUS_OK);
        ask_check(&ask);
    }
    for (int i = 0; i < 2; i++) {
        ops->weight_free(engine, weights[i]);
        source_free(&sources[i]);
    }
    close_lanes();
}
END_TEST

// A small batch's graph brings its input; a large one's copy does, whichever side of it is large.
START_TEST(inputs_are_brought_once)
{
    static const struct {
        int format;
        uint32_t tokens;
        bool by_graph;
    } cases[] = {{0, FEW, true}, {0, MANY, false}, {3, 3, true}, {3, 60, false}};
    open_lanes();
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct source source = source_of(&formats[cases[i].format]);
        struct engine_weight *weight = load(&source);
        uint64_t before = fake_cuda_fetched_bytes();
        struct ask ask;
        ask_fill(&ask, 0, &source, weight, cases[i].tokens, 0);
        fake_cuda_fail_operation(0, cudaSuccess); // counts from here
        ops->submit(engine, 0, &ask.batch);
        ck_assert_int_eq(finish(0).status, STATUS_OK);
        ask_check(&ask);
        // Fetch, kernel and report; or copies and events beside them.
        ck_assert_int_eq(fake_cuda_operations() == 3, cases[i].by_graph);
        bool fetched = fake_cuda_fetched_bytes() - before >= ask.batch.input_bytes;
        ck_assert_int_eq(fetched, cases[i].by_graph);
        ops->weight_free(engine, weight);
        source_free(&source);
    }
    close_lanes();
}
END_TEST

// A part of the weights is brought to the cache for a small batch that has the device to itself,
// and for no other.
START_TEST(a_small_batch_alone_warms_its_weight)
{
    open_lanes();
    struct source source = source_of(&formats[0]);
    struct engine_weight *weight = load(&source);
    uint64_t half = einsum_weight_bytes(&formats[0]) / 2;
    struct ask asks[LANES];
    uint64_t before = fake_cuda_warmed_bytes();
    fake_cuda_hold(true);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        ask_fill(&asks[lane], lane, &source, weight, FEW, 0);
        ops->submit(engine, lane, &asks[lane].batch);
    }
    fake_cuda_hold(false);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        ck_assert_int_eq(finish(lane).status, STATUS_OK);
        ask_check(&asks[lane]);
    }
    ck_assert_uint_eq(fake_cuda_warmed_bytes() - before, half); // of the first
    ck_assert_int_eq(run(&source, weight, MANY).status, STATUS_OK);
    ck_assert_uint_eq(fake_cuda_warmed_bytes() - before, half);
    ck_assert_int_eq(run(&source, weight, FEW).status, STATUS_OK);
    ck_assert_uint_eq(fake_cuda_warmed_bytes() - before, 2 * half);
    ops->weight_free(engine, weight);
    source_free(&source);
    close_lanes();
}
END_TEST

// ---- forced kernels

START_TEST(a_kernel_asked_for_computes)
{
    static const enum cuda_kernel kernels[] = {CUDA_KERNEL_DECODE, CUDA_KERNEL_PREFILL,
                                               CUDA_KERNEL_HOPPER};
    static const char *const names[] = {"decode", "prefill", "hopper"};
    open_lanes();
    struct source source = source_of(&formats[0]);
    struct engine_weight *weight = load(&source);
    for (size_t i = 0; i < ARRAY_LEN(kernels); i++)
        for (size_t s = 0; s < ARRAY_LEN(sizes); s++) {
            uint64_t rows[ARRAY_LEN(kernels)];
            for (size_t k = 0; k < ARRAY_LEN(kernels); k++)
                rows[k] = fake_cuda_rows(kernels[k]);
            uint32_t kernel;
            ck_assert_int_eq(engine_kernel_find(ops, engine, names[i], &kernel, &err), STATUS_OK);
            struct ask ask;
            ask_fill(&ask, 0, &source, weight, sizes[s], kernel);
            ops->submit(engine, 0, &ask.batch);
            ck_assert_int_eq(finish(0).status, STATUS_OK);
            ask_check(&ask);
            for (size_t k = 0; k < ARRAY_LEN(kernels); k++)
                ck_assert_uint_eq(fake_cuda_rows(kernels[k]) - rows[k], k == i ? sizes[s] : 0);
        }
    ops->weight_free(engine, weight);
    source_free(&source);
    close_lanes();
}
END_TEST

// Only a weight in square blocks lies twice, and only many of its tokens are computed from there,
// whether they come by a map, row by row or beside others.
START_TEST(many_tokens_take_the_tiles)
{
    static const struct einsum_weight_format square = {
        2, 256, 512, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128};
    static const uint32_t tokens[] = {CUDA_HOPPER_TOKENS_MIN - 1, CUDA_HOPPER_TOKENS_MIN,
                                      TOKENS_MAX};
    open_lanes();
    struct source sources[] = {source_of(&square), source_of(&formats[0])};
    for (size_t i = 0; i < ARRAY_LEN(sources); i++) {
        struct engine_weight *weight = load(&sources[i]);
        const struct einsum_weight_format *format = &sources[i].base.format;
        uint64_t twice = 2 * einsum_weight_bytes(format);
        ck_assert_int_eq(ops->weight_bytes(weight) > twice, i == 0);
        for (size_t s = 0; s < ARRAY_LEN(tokens); s++) {
            uint64_t few = fake_cuda_rows(CUDA_KERNEL_HOPPER);
            uint64_t many = fake_cuda_rows(CUDA_KERNEL_HOPPER_MANY);
            bool wgmma = tokens[s] >= CUDA_HOPPER_TOKENS_MIN, tiles = wgmma && i == 0;
            ck_assert_int_eq(run(&sources[i], weight, tokens[s]).status, STATUS_OK);
            ck_assert_uint_eq(fake_cuda_rows(CUDA_KERNEL_HOPPER) - few,
                              wgmma && !tiles ? tokens[s] : 0);
            ck_assert_uint_eq(fake_cuda_rows(CUDA_KERNEL_HOPPER_MANY) - many,
                              tiles ? tokens[s] : 0);
        }
        ops->weight_free(engine, weight);
        source_free(&sources[i]);
    }
    close_lanes();
}
END_TEST

// Where no bucket has room for many tokens, no weight lies twice.
START_TEST(small_buckets_need_no_tiles)
{
    static const uint32_t room[] = {8, CUDA_HOPPER_TOKENS_MIN - 1};
    fake_cuda_start(&hopper, random_state);
    const struct engine_options options = {.lanes = 1,
                                           .batch_segments_max = 1,
                                           .buckets = room,
                                           .buckets_n = ARRAY_LEN(room),
                                           .reduced_dim_max = 16384};
    ck_assert_msg(ops->open(&options, &engine, &err) == STATUS_OK, "%s", err.text);
    struct source source = source_of(&formats[3]);
    struct engine_weight *weight = load(&source);
    ck_assert_uint_lt(ops->weight_bytes(weight), 2 * einsum_weight_bytes(&formats[3]));
    ops->weight_free(engine, weight);
    source_free(&source);
    close_device();
}
END_TEST

START_TEST(kernels_that_the_device_lacks_are_refused)
{
    struct fake_cuda_device blackwell = hopper;
    blackwell.major = 12;
    open_device(&blackwell);
    uint32_t kernel = 9;
    ck_assert_int_eq(engine_kernel_find(ops, engine, "hopper", &kernel, &err),
                     STATUS_UNIMPLEMENTED);
    ck_assert_uint_eq(kernel, 0);
    ck_assert_str_eq(err.text,
                     "kernel: \"hopper\" cannot be chosen here; what can: decode, prefill");
    close_device();
}
END_TEST

// ---- behind the batcher

struct caller {
    struct job job;
    _Atomic bool done;
};

static void on_done(struct job *job)
{
    atomic_store(&CONTAINER_OF(job, struct caller, job)->done, true);
}

static enum status call(struct batcher *batcher, struct weight *weight, struct error *why)
{
    struct caller caller = {
        .job = {.weight = weight,
                .operand = {.tokens = FEW,
                            .groups = weight->format.groups,
                            .activation_layout = EINSUM_ACTIVATIONS_TGR,
                            .scale_layout = EINSUM_SCALES_TGK,
                            .scale_type = EINSUM_SCALE_UE8M0,
                            .output_type = EINSUM_OUTPUT_BF16},
                .deadline_ns = UINT64_MAX,
                .on_done = on_done},
    };
    enum status status = batcher_reserve(batcher, &caller.job, why);
    if (status != STATUS_OK)
        return status;
    batcher_commit(batcher, &caller.job);
    uint64_t give_up_ns = now_ns() + (uint64_t)60 * HANG_NS;
    while (!atomic_load(&caller.done)) {
        ck_assert_msg(now_ns() < give_up_ns, "a job hangs");
        sched_yield();
    }
    *why = caller.job.error;
    batcher_release(batcher, &caller.job);
    return why->status;
}

START_TEST(later_requests_are_told_that_the_device_is_lost)
{
    open_device(&hopper);
    struct source source = source_of(&formats[0]);
    struct weight weight = {.format = source.base.format, .engine_weight = load(&source)};
    struct batcher_waker waker = {0};
    struct batcher *batcher;
    const struct batcher_options options = {
        .ops = ops,
        .engine = engine,
        .lanes = LANES,
        .batches = LANES + 1,
        .batch_input_bytes = INPUT_BYTES,
        .batch_output_bytes = OUTPUT_BYTES,
        .batch_tokens_max = TOKENS_MAX,
        .batch_requests_max = SEGMENTS_MAX,
        .queue_requests_max = 16,
        .buckets = buckets,
        .buckets_n = ARRAY_LEN(buckets),
    };
    ck_assert_msg(batcher_create(&options, &waker, &batcher, &err) == STATUS_OK, "%s", err.text);
    for (int i = 0; i < 10; i++)
        ck_assert_int_eq(call(batcher, &weight, &err), STATUS_OK);
    ck_assert(!batcher_device_lost(batcher));
    fake_cuda_fail_operation(2, cudaErrorLaunchFailure);
    ck_assert_int_eq(call(batcher, &weight, &err), STATUS_UNAVAILABLE);
    ck_assert_str_eq(err.text, "the device is lost: unspecified launch failure");
    ck_assert(batcher_device_lost(batcher));
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(call(batcher, &weight, &err), STATUS_UNAVAILABLE);
        ck_assert_str_eq(err.text, "the device is lost");
    }
    batcher_destroy(batcher);
    ops->weight_free(engine, weight.engine_weight);
    source_free(&source);
    close_device();
}
END_TEST

static TCase *new_case(Suite *suite, const char *name)
{
    TCase *tcase = tcase_create(name);
    tcase_set_timeout(tcase, 240);
    tcase_add_checked_fixture(tcase, setup, NULL);
    suite_add_tcase(suite, tcase);
    return tcase;
}

int main(void)
{
    Suite *suite = suite_create("engine_cuda_faults");
    TCase *opening = new_case(suite, "opening");
    tcase_add_loop_test(opening, a_device_that_cannot_be_used_is_refused_by_name, 0,
                        ARRAY_LEN(unusables));
    tcase_add_loop_test(opening, a_device_that_can_be_used_is_described, 0, ARRAY_LEN(usables));
    tcase_add_test(opening, no_memory_at_open);
    tcase_add_test(opening, a_device_too_small_says_so);
    tcase_add_loop_test(opening, a_call_of_open_fails, 0, 2);
    tcase_add_test(opening, no_memory_for_a_batch);

    TCase *loading = new_case(suite, "loading");
    tcase_add_test(loading, no_memory_for_a_weight);
    tcase_add_test(loading, a_weight_that_does_not_fit_is_loaded_later);
    tcase_add_test(loading, a_slow_device_gets_every_piece);
    tcase_add_loop_test(loading, lost_while_loading, 0, 2);

    TCase *batches = new_case(suite, "batches");
    tcase_add_loop_test(batches, a_call_of_a_batch_fails, 0, 2 * ARRAY_LEN(sizes));
    tcase_add_loop_test(batches, the_device_faults_in_a_batch, 0, ARRAY_LEN(sizes));
    tcase_add_test(batches, nothing_is_answered_before_its_time);
    tcase_add_test(batches, small_and_large_batches_take_turns);
    tcase_add_test(batches, inputs_are_brought_once);
    tcase_add_test(batches, a_small_batch_alone_warms_its_weight);
    tcase_add_test(batches, a_kernel_asked_for_computes);
    tcase_add_test(batches, many_tokens_take_the_tiles);
    tcase_add_test(batches, small_buckets_need_no_tiles);
    tcase_add_test(batches, kernels_that_the_device_lacks_are_refused);
    tcase_add_test(batches, later_requests_are_told_that_the_device_is_lost);

    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
