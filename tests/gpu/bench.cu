// Microseconds per layer: 43 different layers of V4-Flash in one graph, so that no weight comes from
// L2; median of 20 replays. The outputs of a timed replay are checked against FP64 first. "default" is
// what the dispatcher takes on this device, "sm120" the SM 12.0 kernels (elsewhere their portable form).
//
//     bench [tune | brief | profile]     last line: RESULT {json}
#include "harness.cuh"

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>

enum { LAYERS = OVERLAPS_MAX, REPLAYS = 20, WARM_UP = 10, INPUT_SETS = 4, CHECKED = 3 };

struct model {
    std::vector<test_weight> layers;
    double bytes; // of one layer
};

static model make_model(einsum_weight_type type, einsum_scale_type scale, uint32_t groups,
                        uint32_t block_d, uint32_t block_r)
{
    einsum_weight_format f = {groups, 1024, 4096, type, scale, block_d, block_r};
    model m;
    for (int i = 0; i < LAYERS; i++)
        m.layers.push_back(make_weight(f, (uint64_t)i * 7 + 1000, false));
    m.bytes = (double)(einsum_weight_bytes(&f) + einsum_weight_scale_bytes(&f));
    return m;
}

static void free_model(model &m)
{
    for (auto &w : m.layers)
        free_weight(w);
}

static bool all_right = true;
static std::string rows_json;

// Negative if the numbers are wrong.
static double measure(const model &m, const cuda_bucket &bucket, uint32_t tokens, bool one_launch)
{
    const einsum_weight_format &f = m.layers[0].format;
    einsum_scale_type scale =
        f.scale_type == EINSUM_SCALE_UE8M0 ? EINSUM_SCALE_UE8M0 : EINSUM_SCALE_FP32;
    uint64_t blocks = f.reduced_dim / f.block_r;
    uint32_t launches = one_launch ? 1 : LAYERS, layers = one_launch ? 32 : LAYERS;
    launcher l(bucket, LAYERS);
    uint64_t input = einsum_activation_bytes(tokens, f.groups, f.reduced_dim);
    uint64_t scales = einsum_scale_bytes(EINSUM_SCALES_TGK, scale, tokens, f.groups, blocks);
    uint64_t output = einsum_output_bytes(EINSUM_OUTPUT_BF16, tokens, f.groups, f.output_dim);
    std::vector<uint8_t *> a, s;
    for (int i = 0; i < INPUT_SETS; i++) {
        a.push_back(device_alloc<uint8_t>(input));
        s.push_back(device_alloc<uint8_t>(scales));
        fill(a.back(), input, FILL_E4M3, 50 + (uint64_t)i + tokens);
        fill(s.back(), scale == EINSUM_SCALE_FP32 ? scales / 4 : scales,
             scale == EINSUM_SCALE_FP32 ? FILL_FP32 : FILL_UE8M0, 60 + (uint64_t)i + tokens);
    }
    uint8_t *outputs = device_alloc<uint8_t>(output * layers);
    uint64_t table_bytes = (l.host.size() + 255) / 256 * 256;
    uint8_t *tables = device_alloc<uint8_t>(table_bytes * launches);
    std::vector<cuda_segment> segments;
    for (uint32_t i = 0; i < layers; i++)
        segments.push_back(
            {&m.layers[i].weight,
             {tokens, 0, f.groups, EINSUM_ACTIVATIONS_TGR, EINSUM_SCALES_TGK, scale,
              EINSUM_OUTPUT_BF16, a[i % INPUT_SETS], s[i % INPUT_SETS], outputs + output * i}});
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    uint32_t kernels = 0; // the same for all: layers differ in their weights alone
    for (uint32_t i = 0; i < launches; i++) {
        l.workspace_of(i);
        kernels = l.build(&segments[i], one_launch ? layers : 1,
                          (cuda_table *)(tables + table_bytes * i), stream);
        CHECK(cudaStreamSynchronize(stream));
    }
    CHECK(cudaMemset(outputs, 0xFF, output * layers));
    CHECK(cudaDeviceSynchronize());

    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t i = 0; i < launches; i++)
        CHECK(cuda_launch(&l.bucket, kernels, (cuda_table *)(tables + table_bytes * i),
                          l.workspace_of(i), stream));
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    // A card that has just been at its power limit is slower for a while, by a tenth and more.
    std::this_thread::sleep_for(std::chrono::milliseconds(150));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < REPLAYS + WARM_UP; i++) {
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaStreamSynchronize(stream));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= WARM_UP)
            times.push_back(ms);
    }
    std::sort(times.begin(), times.end());

    bool right = true;
    for (uint32_t i = 0; i < CHECKED; i++) {
        uint32_t layer = i * (layers - 1) / (CHECKED - 1);
        verdict v = compare(m.layers[layer], segments[layer].operand, by_wgmma(kernels));
        right = right && v.failed == 0 && v.checked == (uint64_t)tokens * f.groups * f.output_dim;
    }
    all_right = all_right && right;
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaStreamDestroy(stream));
    for (int i = 0; i < INPUT_SETS; i++) {
        CHECK(cudaFree(a[(size_t)i]));
        CHECK(cudaFree(s[(size_t)i]));
    }
    CHECK(cudaFree(outputs));
    CHECK(cudaFree(tables));
    return right ? times[REPLAYS / 2] * 1000 / (one_launch ? layers : LAYERS) : -1;
}

static void row(const std::string &name, uint32_t tokens, double us, double bytes,
                double operations)
{
    if (us < 0)
        printf("%-28s %6u   WRONG NUMBERS\n", name.c_str(), tokens);
    else
        printf("%-28s %6u %9.2f us %8.2f TB/s %8.1f TFLOP/s\n", name.c_str(), tokens, us,
               bytes / us / 1e6, operations / us / 1e6);
    fflush(stdout);
    char text[160];
    snprintf(text, sizeof text, "%s{\"case\": \"%s\", \"tokens\": %u, \"us\": %.3f}",
             rows_json.empty() ? "" : ", ", name.c_str(), tokens, us);
    rows_json += text;
}

static double operations(const model &m, uint32_t tokens)
{
    return 2.0 * tokens * m.layers[0].format.groups * 1024 * 4096;
}

static cuda_bucket bucket_for(uint32_t tokens, bool hopper = false)
{
    uint32_t room = 8;
    while (room < tokens)
        room *= 2;
    cuda_bucket bucket;
    CHECK(cuda_bucket_init(&bucket, room, hopper));
    return bucket;
}

static void rows_of(const std::string &name, const model &m, bool hopper,
                    std::vector<uint32_t> counts)
{
    for (uint32_t t : counts)
        row(name, t, measure(m, bucket_for(t, hopper), t, false), m.bytes, operations(m, t));
}

static void table_of(const std::string &name, const model &m, std::vector<uint32_t> counts)
{
    rows_of(name + ", sm120", m, false, counts);
    if (device_is_hopper())
        rows_of(name + ", default", m, true, counts);
}

// Settings beside the defaults.
static void tune(const model &m)
{
    for (uint32_t t : {64u, 128u, 256u}) {
        cuda_bucket bucket = bucket_for(256);
        bucket.prefill_from = 1;
        row("prefill forced", t, measure(m, bucket, t, false), m.bytes, operations(m, t));
        bucket.prefill_from = UINT32_MAX;
        row("decode forced", t, measure(m, bucket, t, false), m.bytes, operations(m, t));
    }
    for (uint32_t t : {1u, 8u, 16u, 24u, 32u, 48u, 64u}) {
        cuda_bucket bucket = bucket_for(t < 32 ? 32 : t, true);
        if (!cuda_bucket_has_many(&bucket))
            break;
        bucket.hopper_from = bucket.many_from = 1;
        row("whole tiles forced", t, measure(m, bucket, t, false), m.bytes, operations(m, t));
        bucket.many_from = UINT32_MAX;
        row("cut tiles forced", t, measure(m, bucket, t, false), m.bytes, operations(m, t));
    }
}

// One plain launch each, for a profiler.
static void profile(const model &m)
{
    for (uint32_t t : {1u, 16u, 64u, 1024u}) {
        uint64_t bytes = (uint64_t)t * 8 * 4096;
        uint8_t *a = device_alloc<uint8_t>(bytes), *s = device_alloc<uint8_t>(bytes / 128);
        uint8_t *output = device_alloc<uint8_t>((uint64_t)t * 8 * 1024 * 2);
        fill(a, bytes, FILL_E4M3, t);
        fill(s, bytes / 128, FILL_UE8M0, t);
        launcher l(bucket_for(t), 1);
        cuda_segment segment = {&m.layers[t % LAYERS].weight,
                                {t, 0, 8, EINSUM_ACTIVATIONS_TGR, EINSUM_SCALES_TGK,
                                 EINSUM_SCALE_UE8M0, EINSUM_OUTPUT_BF16, a, s, output}};
        l.run(&segment, 1, 0);
        CHECK(cudaDeviceSynchronize());
        CHECK(cudaFree(a));
        CHECK(cudaFree(s));
        CHECK(cudaFree(output));
    }
}

int main(int argc, char **argv)
{
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    printf("%s, SM %d.%d, %d SMs\n", properties.name, properties.major, properties.minor,
           properties.multiProcessorCount);
    model flash = make_model(EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 8, 128, 128);
    if (argc > 1 && strcmp(argv[1], "profile") == 0) {
        profile(flash);
        return 0;
    }
    if (argc > 1 && strcmp(argv[1], "tune") == 0) {
        tune(flash);
        return all_right ? 0 : 1;
    }
    if (argc > 1 && strcmp(argv[1], "brief") == 0) {
        rows_of("ue8m0 128x128, sm120", flash, false, {1, 8, 16, 32, 64, 128});
        if (device_is_hopper())
            rows_of("ue8m0 128x128, default", flash, true,
                    {32, 64, 128, 256, 512, 1024, 4096, 8192});
        row("32 layers in one launch", 1, measure(flash, bucket_for(32), 1, true), flash.bytes,
            operations(flash, 1));
        return all_right ? 0 : 1;
    }
    table_of("ue8m0 128x128", flash, {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192});
    row("32 layers in one launch", 1, measure(flash, bucket_for(32), 1, true), flash.bytes,
        operations(flash, 1));
    free_model(flash);
    for (uint32_t groups : {4u, 2u, 1u}) {
        model slice = make_model(EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, groups, 128, 128);
        table_of(("ue8m0, G " + std::to_string(groups)).c_str(), slice, {1, 8, 16});
        free_model(slice);
    }
    struct {
        const char *name;
        einsum_weight_type type;
        einsum_scale_type scale;
        uint32_t block_d, block_r;
    } others[] = {{"fp32 128x128", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 128, 128},
                  {"ue8m0 32x32", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 32, 32},
                  {"fp32 32x32", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 32, 32},
                  {"bf16", EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, 1, 128}};
    for (auto &o : others) {
        model m = make_model(o.type, o.scale, 8, o.block_d, o.block_r);
        table_of(o.name, m, {1, 16, 128, 1024});
        free_model(m);
    }
    printf("RESULT {\"bench\": \"gpu_kernels\", \"device\": \"%s\", \"rows\": [%s], \"ok\": %s}\n",
           properties.name, rows_json.c_str(), all_right ? "true" : "false");
    return all_right ? 0 : 1;
}
