// The CUDA engine and memory of others, on the stand-in of fake_cuda.h: what lies in registered host
// memory is staged and answered right, beside what lies in the batch and in another process's memory
// on the device; nothing but outputs is written there; what cannot be registered or opened is refused
// by name and leaves nothing behind.
#include <sys/mman.h>

#include "fake_cuda_site.h"
#include "kernels/attention.h"

enum { REGION_BYTES = 8 << 20 };

static uint8_t *region_of(uint64_t bytes)
{
    uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert_ptr_ne(memory, MAP_FAILED);
    return memory;
}

static uint8_t *registered_region(uint64_t bytes)
{
    uint8_t *memory = region_of(bytes);
    ck_assert_msg(ops->memory_register(engine, memory, bytes, &err) == STATUS_OK, "%s", err.text);
    return memory;
}

static void drop_region(uint8_t *memory, uint64_t bytes)
{
    ops->memory_unregister(engine, memory, bytes);
    munmap(memory, bytes);
}

static uint8_t *import(const struct fake_cuda_export *export, uint64_t bytes)
{
    void *memory = NULL;
    ck_assert_msg(ops->memory_import(engine, (const uint8_t *)export->handle.reserved, bytes,
                                     &memory, &err) == STATUS_OK,
                  "%s", err.text);
    return memory;
}

// ---- batches whose segments lie anywhere

enum where { IN_BATCH, IN_REGION, ON_DEVICE };

struct part {
    const struct source *source;
    struct einsum_operand here; // as the test reaches it
};

static struct {
    uint32_t lane;
    struct engine_segment segments[SEGMENTS_MAX];
    struct part parts[SEGMENTS_MAX];
    struct engine_batch batch;
    uint8_t *region; // registered; its next free byte
    struct fake_cuda_export export;
    uint8_t *imported;
    uint64_t exported_used;
} site;

static void begin(uint32_t lane)
{
    site.lane = lane;
    site.batch = (struct engine_batch){
        .segments = site.segments, .input = input[lane], .output = output[lane]};
}

static void fill(const struct einsum_operand *operand, uint64_t a_bytes, uint64_t s_bytes,
                 uint64_t out_bytes)
{
    uint8_t *a = (uint8_t *)(uintptr_t)operand->activations;
    uint8_t *s = (uint8_t *)(uintptr_t)operand->scales;
    for (uint64_t i = 0; i < a_bytes; i++)
        a[i] = random_e4m3();
    for (uint64_t i = 0; i < s_bytes; i++)
        s[i] = (uint8_t)(120 + random_below(9));
    memset(operand->output, 0x5A, out_bytes);
}

static void add(enum where where, const struct source *source, const struct engine_weight *weight,
                uint32_t tokens)
{
    const struct einsum_weight_format *format = &source->base.format;
    uint64_t a_bytes = einsum_activation_bytes(tokens, format->groups, format->reduced_dim);
    uint64_t s_bytes = (uint64_t)tokens * format->groups * (format->reduced_dim / format->block_r);
    uint64_t out_bytes =
        einsum_output_bytes(EINSUM_OUTPUT_FP32, tokens, format->groups, format->output_dim);
    uint64_t a_room = align_up(a_bytes, CACHE_LINE_BYTES);
    uint64_t in_room = a_room + align_up(s_bytes, CACHE_LINE_BYTES);
    uint64_t out_room = align_up(out_bytes, CACHE_LINE_BYTES);
    struct engine_batch *batch = &site.batch;
    struct part *part = &site.parts[batch->segments_n];
    struct engine_segment *segment = &site.segments[batch->segments_n++];
    uint8_t *in = NULL, *out = NULL;
    *segment = (struct engine_segment){.weight = weight};
    if (where == IN_BATCH) {
        in = input[site.lane] + batch->input_bytes;
        out = output[site.lane] + batch->output_bytes;
        batch->input_bytes += in_room;
        batch->output_bytes += out_room;
    } else if (where == IN_REGION) {
        in = site.region;
        out = in + in_room;
        site.region = out + out_room;
        batch->input_staged += in_room;
        batch->output_staged += out_room;
        segment->staged_input = input[site.lane] + INPUT_BYTES - batch->input_staged;
        segment->staged_output = output[site.lane] + OUTPUT_BYTES - batch->output_staged;
    } else {
        in = site.export.memory + site.exported_used;
        out = in + in_room;
        site.exported_used += in_room + out_room;
    }
    part->source = source;
    part->here = (struct einsum_operand){.tokens = tokens,
                                         .groups = format->groups,
                                         .activation_layout = EINSUM_ACTIVATIONS_TGR,
                                         .scale_layout = EINSUM_SCALES_TGK,
                                         .scale_type = EINSUM_SCALE_UE8M0,
                                         .output_type = EINSUM_OUTPUT_FP32,
                                         .activations = in,
                                         .scales = in + a_room,
                                         .output = out};
    fill(&part->here, a_bytes, s_bytes, out_bytes);
    segment->operand = part->here;
    if (where == ON_DEVICE) {
        ptrdiff_t away = in - site.export.memory;
        segment->operand.activations = site.imported + away;
        segment->operand.scales = site.imported + away + a_room;
        segment->operand.output = site.imported + away + in_room;
    }
    batch->tokens += tokens;
}

static void submit(void)
{
    while (buckets[site.batch.bucket] < site.batch.tokens)
        site.batch.bucket++;
    ops->submit(engine, site.lane, &site.batch);
}

static void expect_answered(void)
{
    ck_assert_int_eq(finish(site.lane).status, STATUS_OK);
    for (uint32_t i = 0; i < site.batch.segments_n; i++) {
        const struct ask ask = {.source = site.parts[i].source,
                                .segment.operand = site.parts[i].here};
        ask_check(&ask);
    }
}

static const struct mixture {
    int format;
    struct {
        enum where where;
        uint32_t tokens; // 0: no more
    } parts[SEGMENTS_MAX];
} mixtures[] = {
    {0, {{IN_REGION, 1}}},
    {0, {{IN_REGION, FEW}}},
    {0, {{IN_REGION, MANY}}}, // copied by itself
    {3, {{IN_REGION, 60}}},   // its output, too
    {0, {{ON_DEVICE, 1}}},
    {0, {{ON_DEVICE, MANY}}},
    {3, {{ON_DEVICE, 60}}},
    {0, {{IN_REGION, 1}, {IN_BATCH, 2}, {ON_DEVICE, 3}, {IN_REGION, 1}}},
    {0, {{IN_BATCH, MANY}, {IN_REGION, 1}, {ON_DEVICE, 3}, {IN_REGION, 40}}},
    {3, {{IN_REGION, 60}, {IN_REGION, 2}, {IN_BATCH, 1}, {ON_DEVICE, 60}}},
    {1, {{IN_REGION, 3}, {IN_BATCH, 2}, {IN_REGION, 1}}},
};

static void open_site(void)
{
    memset(&site, 0, sizeof site);
    open_lanes();
    site.export = fake_cuda_export(REGION_BYTES + 4096, 4096, 0);
    site.imported = import(&site.export, REGION_BYTES);
}

static void close_site(void)
{
    ops->memory_forget(engine, site.imported);
    close_lanes();
}

START_TEST(what_lies_anywhere_is_answered_right)
{
    const struct mixture *mixture = &mixtures[_i];
    open_site();
    struct source source = source_of(&formats[mixture->format]);
    struct engine_weight *weight = load(&source);
    uint8_t *region = registered_region(REGION_BYTES);
    for (uint32_t lane = 0; lane < LANES; lane++) {
        site.region = region;
        site.exported_used = 0;
        begin(lane);
        for (int i = 0; i < SEGMENTS_MAX && mixture->parts[i].tokens > 0; i++)
            add(mixture->parts[i].where, &source, weight, mixture->parts[i].tokens);
        submit();
        expect_answered();
    }
    drop_region(region, REGION_BYTES);
    ops->weight_free(engine, weight);
    source_free(&source);
    close_site();
}
END_TEST

// One launch, whatever the batch brings along; a copy of its own for each tensor that is large.
START_TEST(only_large_tensors_have_copies)
{
    enum { EVENTS = 5 };
    static const struct {
        int mixture;
        uint32_t operations; // of the device
        bool fetched;
    } cases[] = {
        {0, 3, true}, // fetch, kernel, report
        {1, 3, true},
        {2, 3 + EVENTS + 1, false}, // activations in; the outputs are small
        {3, 3 + EVENTS + 1, true},  // the output alone
        {4, 3, false},              // nothing is moved
        {5, 3, false},
        {6, 3, false},
    };
    open_site();
    uint8_t *region = registered_region(REGION_BYTES);
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        const struct mixture *mixture = &mixtures[cases[i].mixture];
        struct source source = source_of(&formats[mixture->format]);
        struct engine_weight *weight = load(&source);
        site.region = region;
        site.exported_used = 0;
        begin(0);
        add(mixture->parts[0].where, &source, weight, mixture->parts[0].tokens);
        uint64_t before = fake_cuda_fetched_bytes();
        fake_cuda_fail_operation(0, cudaSuccess); // counts from here
        submit();
        expect_answered();
        ck_assert_uint_eq(fake_cuda_operations(), cases[i].operations);
        uint64_t fetched = fake_cuda_fetched_bytes() - before;
        ck_assert_int_eq(fetched >= site.batch.input_staged && site.batch.input_staged > 0,
                         cases[i].fetched);
        ops->weight_free(engine, weight);
        source_free(&source);
    }
    drop_region(region, REGION_BYTES);
    close_site();
}
END_TEST

// Attention is quantised in its room; its owner's memory stays as it is.
START_TEST(attention_is_staged)
{
    static const uint32_t tokens_of[] = {2, 40};
    open_site();
    struct source source = source_of(&formats[0]);
    struct engine_weight *weight = load(&source);
    const struct einsum_weight_format *format = &formats[0];
    uint8_t *region = registered_region(REGION_BYTES), *before = malloc(REGION_BYTES);
    for (size_t i = 0; i < ARRAY_LEN(tokens_of); i++) {
        uint32_t tokens = tokens_of[i], rows = tokens * format->groups;
        uint64_t bytes = attention_bytes(tokens, format->groups, format->reduced_dim);
        uint64_t out_bytes =
            einsum_output_bytes(EINSUM_OUTPUT_FP32, tokens, format->groups, format->output_dim);
        for (uint64_t b = 0; b < bytes; b += 2) {
            region[b] = (uint8_t)random_below(256);
            region[b + 1] = (uint8_t)(0x3E + random_below(2) + 0x80 * random_below(2));
        }
        memcpy(before, region, bytes);
        struct attention_rotation *rotations = (void *)input[0];
        for (uint32_t t = 0; t < tokens; t++)
            for (int p = 0; p < ATTENTION_ROPE_DIM / 2; p++) {
                rotations[t].cos[p] = 0.6f;
                rotations[t].sin[p] = t % 2 ? 0.8f : -0.8f;
            }
        begin(0);
        float *out = (float *)(region + align_up(bytes, CACHE_LINE_BYTES));
        site.segments[0] = (struct engine_segment){
            .weight = weight,
            .operand = {.tokens = tokens,
                        .groups = format->groups,
                        .activation_layout = EINSUM_ACTIVATIONS_IN_PLACE,
                        .scale_layout = EINSUM_SCALES_IN_PLACE,
                        .scale_type = EINSUM_SCALE_UE8M0,
                        .output_type = EINSUM_OUTPUT_FP32,
                        .activations = region,
                        .scales = region + format->reduced_dim,
                        .rotations = rotations,
                        .output = out},
            .staged_input = input[0] + INPUT_BYTES - align_up(bytes, CACHE_LINE_BYTES),
            .staged_output = output[0] + OUTPUT_BYTES - align_up(out_bytes, CACHE_LINE_BYTES),
        };
        site.batch.segments_n = 1;
        site.batch.tokens = tokens;
        site.batch.input_bytes = tokens * sizeof *rotations;
        site.batch.input_staged = align_up(bytes, CACHE_LINE_BYTES);
        site.batch.output_staged = align_up(out_bytes, CACHE_LINE_BYTES);
        submit();
        ck_assert_int_eq(finish(0).status, STATUS_OK);
        ck_assert_mem_eq(region, before, bytes);
        for (uint32_t row = 0; row < rows; row++)
            attention_quantise(before + (uint64_t)row * 2 * format->reduced_dim,
                               format->reduced_dim, format->block_r,
                               &rotations[row / format->groups]);
        struct ask ask = {.source = &source, .segment.operand = site.segments[0].operand};
        ask.segment.operand.activations = before;
        ask.segment.operand.scales = before + format->reduced_dim;
        ask_check(&ask);
    }
    free(before);
    drop_region(region, REGION_BYTES);
    ops->weight_free(engine, weight);
    source_free(&source);
    close_site();
}
END_TEST

// Regions come and go in any order, and each address is found in its own.
START_TEST(regions_come_and_go)
{
    enum { REGIONS = 40, ROUNDS = 200, BYTES = 128 << 10 };
    open_site();
    struct source source = source_of(&formats[0]);
    struct engine_weight *weight = load(&source);
    uint8_t *regions[REGIONS] = {0};
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t i = random_below(REGIONS);
        if (!regions[i]) {
            regions[i] = registered_region(BYTES);
            continue;
        }
        begin((uint32_t)round % LANES);
        site.region = regions[i];
        add(IN_REGION, &source, weight, 1 + random_below(2));
        submit();
        expect_answered();
        if (random_below(3) > 0)
            continue;
        drop_region(regions[i], BYTES);
        regions[i] = NULL;
    }
    for (int i = 0; i < REGIONS; i++)
        if (regions[i])
            drop_region(regions[i], BYTES);
    ops->weight_free(engine, weight);
    source_free(&source);
    close_site();
}
END_TEST

// Whichever call fails: an error, nothing left behind, and the next time it is registered.
START_TEST(a_call_of_registering_fails)
{
    open_site();
    uint8_t *memory = region_of(REGION_BYTES);
    uint32_t pinned = fake_cuda_live().pinned;
    bool met = true;
    for (uint32_t n = 1; met; n++) {
        fake_cuda_fail_call(n, _i ? cudaErrorNotSupported : cudaErrorMemoryAllocation, false);
        enum status status = ops->memory_register(engine, memory, REGION_BYTES, &err);
        met = fake_cuda_failed_call() != NULL;
        ck_assert_int_eq(status, !met ? STATUS_OK
                                 : _i ? STATUS_UNAVAILABLE
                                      : STATUS_RESOURCE_EXHAUSTED);
        ck_assert_uint_eq(fake_cuda_live().pinned, pinned + !met);
        ck_assert(!met || strstr(err.text, "registering memory: "));
        ck_assert_uint_le(n, 10);
    }
    drop_region(memory, REGION_BYTES);
    close_site();
}
END_TEST

static void refuse(const cudaIpcMemHandle_t *handle, uint64_t bytes, enum status status,
                   const char *field, const char *text)
{
    void *memory;
    uint32_t imported = fake_cuda_live().imported;
    ck_assert_int_eq(
        ops->memory_import(engine, (const uint8_t *)handle->reserved, bytes, &memory, &err),
        status);
    ck_assert_str_eq(err.field, field);
    ck_assert_msg(strstr(err.text, text), "\"%s\" lacks \"%s\"", err.text, text);
    ck_assert_uint_eq(fake_cuda_live().imported, imported);
}

START_TEST(what_cannot_be_opened_is_refused)
{
    open_site();
    struct fake_cuda_export there = fake_cuda_export(1 << 20, 4096, 1);
    struct fake_cuda_export small = fake_cuda_export(1 << 20, 4096, 0);
    cudaIpcMemHandle_t garbage;
    memset(&garbage, 0x5A, sizeof garbage);
    refuse(&garbage, 4096, STATUS_FAILED_PRECONDITION, "handle", "cannot be opened: ");
    refuse(&there.handle, 4096, STATUS_FAILED_PRECONDITION, "handle",
           "of memory on device 1, but the engine computes on 0");
    refuse(&small.handle, (1 << 20) - 4096 + 1, STATUS_INVALID_ARGUMENT, "bytes",
           "1044481, but the handle is of 1044480");
    refuse(&small.handle, UINT64_MAX, STATUS_INVALID_ARGUMENT, "bytes", "the handle is of 1044480");
    uint8_t *first = import(&small, (1 << 20) - 4096);
    uint8_t *again = import(&small, 1); // by another connection
    ck_assert_ptr_eq(first, again);
    ck_assert_uint_eq(fake_cuda_live().imported, 3);
    ops->memory_forget(engine, first);
    ops->memory_forget(engine, again);
    ck_assert_uint_eq(fake_cuda_live().imported, 1);
    close_site();
}
END_TEST

START_TEST(a_call_of_opening_fails)
{
    open_site();
    bool met = true;
    for (uint32_t n = 1; met; n++) {
        void *memory = NULL;
        fake_cuda_fail_call(n, _i ? cudaErrorInvalidValue : cudaErrorMemoryAllocation, false);
        enum status status = ops->memory_import(
            engine, (const uint8_t *)site.export.handle.reserved, 4096, &memory, &err);
        met = fake_cuda_failed_call() != NULL;
        ck_assert_int_eq(status == STATUS_OK, !met);
        ck_assert_uint_eq(fake_cuda_live().imported, 1 + !met);
        if (!met)
            ops->memory_forget(engine, memory);
        ck_assert_uint_le(n, 12);
    }
    close_site();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("engine_cuda_regions");
    TCase *tcase = tcase_create("regions");
    tcase_set_timeout(tcase, 240);
    tcase_add_checked_fixture(tcase, setup, NULL);
    suite_add_tcase(suite, tcase);
    tcase_add_loop_test(tcase, what_lies_anywhere_is_answered_right, 0, ARRAY_LEN(mixtures));
    tcase_add_test(tcase, only_large_tensors_have_copies);
    tcase_add_test(tcase, attention_is_staged);
    tcase_add_test(tcase, regions_come_and_go);
    tcase_add_loop_test(tcase, a_call_of_registering_fails, 0, 2);
    tcase_add_test(tcase, what_cannot_be_opened_is_refused);
    tcase_add_loop_test(tcase, a_call_of_opening_fails, 0, 2);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
