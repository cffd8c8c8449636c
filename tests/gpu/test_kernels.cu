// Every kernel, recipe, layout and type against FP64, at every token count up to 300 and around the
// larger buckets; mixes of segments; NaN and extreme scales; outputs poisoned, nothing written
// beyond them.
//
//     test_kernels [quick | full] [number of one recipe]
//     test_kernels sanitize       few and small cases of everything, for compute-sanitizer
//
// Last line: RESULT {json}.
#include "harness.cuh"

#include <algorithm>
#include <map>
#include <memory>
#include <string>

enum { GUARD = 256 };

struct recipe {
    const char *name;
    einsum_weight_type weight;
    einsum_scale_type scale_w, scale_a;
    uint32_t block_d, block_r;
};

static const recipe recipes[] = {
    {"ue8m0 128x128", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, EINSUM_SCALE_UE8M0, 128, 128},
    {"ue8m0 1x128", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, EINSUM_SCALE_UE8M0, 1, 128},
    {"ue8m0 32x32", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, EINSUM_SCALE_UE8M0, 32, 32},
    {"ue8m0 1x32", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, EINSUM_SCALE_UE8M0, 1, 32},
    {"fp32 128x128", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, EINSUM_SCALE_FP32, 128, 128},
    {"fp32 1x128", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, EINSUM_SCALE_FP32, 1, 128},
    {"fp32 32x32", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, EINSUM_SCALE_FP32, 32, 32},
    {"fp32 1x32", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, EINSUM_SCALE_FP32, 1, 32},
    {"ue8m0 W, fp32 A 128", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, EINSUM_SCALE_FP32, 128, 128},
    {"fp32 W, ue8m0 A 32", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, EINSUM_SCALE_UE8M0, 32, 32},
    {"bf16, fp32 A", EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, EINSUM_SCALE_FP32, 1, 128},
    {"bf16, ue8m0 A", EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, EINSUM_SCALE_UE8M0, 1, 128},
};
enum { RECIPES = sizeof recipes / sizeof recipes[0] };

static uint64_t seed_next = 1;
static unsigned long long outputs_checked, failures, cases;
static double error_worst[2][2]; // [by wgmma][FP32]
static cudaStream_t stream;
static bool quick;

static void fail(const std::string &what)
{
    if (failures++ < 40)
        printf("FAILED %s\n", what.c_str());
}

static einsum_weight_format format_of(const recipe &r, uint32_t groups, uint32_t d, uint32_t k)
{
    return {groups, d, k, r.weight, r.scale_w, r.block_d, r.block_r};
}

// One request's tensors.
struct request {
    einsum_operand operand;
    uint8_t *output;
    uint64_t output_bytes;
};

static request make_request(const recipe &r, const einsum_weight_format &format, uint32_t tokens,
                            uint32_t group_begin, uint32_t groups, int layouts, bool extreme)
{
    request q = {};
    einsum_operand &o = q.operand;
    o.tokens = tokens;
    o.group_begin = group_begin;
    o.groups = groups;
    o.activation_layout = layouts & 1 ? EINSUM_ACTIVATIONS_GTR : EINSUM_ACTIVATIONS_TGR;
    o.scale_layout = layouts & 2 ? EINSUM_SCALES_GKT : EINSUM_SCALES_TGK;
    o.output_type = layouts & 4 ? EINSUM_OUTPUT_FP32 : EINSUM_OUTPUT_BF16;
    o.scale_type = r.scale_a;
    uint64_t blocks = format.reduced_dim / format.block_r;
    if (o.scale_type == EINSUM_SCALE_UE8M0 && blocks % 4 != 0)
        o.scale_layout = EINSUM_SCALES_TGK; // GKT packs four
    uint64_t activations = einsum_activation_bytes(tokens, groups, format.reduced_dim);
    uint64_t scales = einsum_scale_bytes(o.scale_layout, o.scale_type, tokens, groups, blocks);
    q.output_bytes = einsum_output_bytes(o.output_type, tokens, groups, format.output_dim);
    uint8_t *a = device_alloc<uint8_t>(activations), *s = device_alloc<uint8_t>(scales);
    q.output = device_alloc<uint8_t>(q.output_bytes + GUARD);
    bool fp32 = o.scale_type == EINSUM_SCALE_FP32;
    fill(a, activations, FILL_E4M3, seed_next++);
    fill(s, fp32 ? scales / 4 : scales,
         extreme ? fp32 ? FILL_FP32_EXTREME : FILL_UE8M0_EXTREME
         : fp32  ? FILL_FP32
                 : FILL_UE8M0,
         seed_next++);
    o.activations = a;
    o.scales = s;
    o.output = q.output;
    return q;
}

static void free_request(request &q)
{
    CHECK(cudaFree((void *)q.operand.activations));
    CHECK(cudaFree((void *)q.operand.scales));
    CHECK(cudaFree(q.output));
}

// 0xFF is NaN in both output types.
static void poison(request &q, int byte)
{
    CHECK(cudaMemset(q.output, byte, q.output_bytes + GUARD));
}

static void judge(const test_weight &w, request &q, int byte, bool hopper, const std::string &what,
                  bool extreme = false)
{
    verdict v = compare(w, q.operand, hopper);
    uint8_t guard[GUARD];
    CHECK(cudaMemcpy(guard, q.output + q.output_bytes, GUARD, cudaMemcpyDeviceToHost));
    for (uint8_t g : guard)
        if (g != byte) {
            fail(what + ": written beyond the output");
            break;
        }
    outputs_checked += v.checked;
    cases++;
    if (v.failed != 0) {
        char text[200];
        snprintf(text, sizeof text, ": %llu of %llu wrong, output %llu is %g for %g", v.failed,
                 v.checked, v.first, v.got, v.exact);
        fail(what + text);
    } else if (v.squared > 0 && v.nan_expected == 0) {
        bool fp32 = q.operand.output_type == EINSUM_OUTPUT_FP32;
        double error = std::sqrt(v.squared_error / v.squared);
        double &worst = error_worst[hopper][fp32];
        worst = std::max(worst, error);
        // Over a whole output, where single errors cancel: BF16's rounding alone is 1.7e-3.
        if (v.checked > 1000 && !extreme && error > (!fp32 ? 2.2e-3 : hopper ? 1e-3 : 1e-6))
            fail(what + ": relative error " + std::to_string(error));
    }
}

static launcher &launcher_for(uint32_t tokens)
{
    static std::map<uint32_t, std::unique_ptr<launcher>> launchers;
    uint32_t bucket = 8;
    while (bucket < tokens)
        bucket *= 2;
    auto &l = launchers[bucket];
    if (l == nullptr)
        l.reset(new launcher(bucket, 64));
    return *l;
}

// As on a device so small that few tiles fill it: Hopper's arm takes whole ones, several to a block.
static launcher &small_launcher_for(uint32_t tokens)
{
    static std::map<uint32_t, std::unique_ptr<launcher>> launchers;
    cuda_bucket bucket = launcher_for(tokens).bucket;
    auto &l = launchers[bucket.tokens_max];
    bucket.many_blocks = std::min(bucket.many_blocks, 4 * bucket.many_cluster);
    if (l == nullptr)
        l.reset(new launcher(bucket, 64));
    return *l;
}

// What the dispatcher takes, and each kernel by name: all of them, or one after the other.
static std::vector<cuda_kernel> kernels_for(const test_weight &w, uint32_t tokens)
{
    static bool hopper = device_is_hopper();
    static unsigned turn;
    std::vector<cuda_kernel> named = {CUDA_KERNEL_PREFILL};
    if (tokens <= 600)
        named.push_back(CUDA_KERNEL_DECODE);
    if (hopper && einsum_hopper_takes(&w.format))
        named.push_back(CUDA_KERNEL_HOPPER);
    if (quick)
        named = {named[turn++ % named.size()]};
    named.insert(named.begin(), CUDA_KERNEL_AUTO);
    return named;
}

static void one(const test_weight &w, const recipe &r, launcher &l, uint32_t tokens, int layouts,
                uint32_t group_begin, uint32_t groups, const char *where,
                const std::vector<cuda_kernel> &kernels)
{
    static const char *const names[] = {"auto", "decode", "prefill", "hopper"};
    request q = make_request(r, w.format, tokens, group_begin, groups, layouts, false);
    for (cuda_kernel kernel : kernels) {
        poison(q, 0xFF);
        cuda_segment segment = {&w.weight, q.operand, kernel};
        bool hopper = l.run(&segment, 1, stream);
        CHECK(cudaStreamSynchronize(stream));
        char what[200];
        snprintf(what, sizeof what, "%s, %s, %s, T %u, layouts %d, groups %u+%u, bucket %u", where,
                 names[kernel], r.name, tokens, layouts, group_begin, groups, l.bucket.tokens_max);
        judge(w, q, 0xFF, hopper, what);
    }
    free_request(q);
}

static void one(const test_weight &w, const recipe &r, launcher &l, uint32_t tokens, int layouts,
                uint32_t group_begin, uint32_t groups, const char *where)
{
    one(w, r, l, tokens, layouts, group_begin, groups, where, kernels_for(w, tokens));
}

// The device's FP64 answers against kernels/reference.c.
static void reference_agrees()
{
    for (int i = 0; i < RECIPES; i++) {
        const recipe &r = recipes[i];
        test_weight w = make_weight(format_of(r, 2, 128, 512), seed_next++, i % 2);
        request q = make_request(r, w.format, 5, 1, 1, i, i % 3 == 0);
        uint64_t n = 5 * 128;
        double *answers = device_alloc<double>(n);
        compare(w, q.operand, false, answers);
        std::vector<double> device(n), host(n);
        CHECK(cudaMemcpy(device.data(), answers, n * 8, cudaMemcpyDeviceToHost));
        uint64_t blocks = 512 / r.block_r;
        std::vector<uint8_t> elements(einsum_weight_bytes(&w.format)),
            scales(einsum_weight_scale_bytes(&w.format) + 1), a(5 * 512),
            sa(einsum_scale_bytes(q.operand.scale_layout, r.scale_a, 5, 1, blocks));
        CHECK(cudaMemcpy(elements.data(), w.elements, elements.size(), cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(scales.data(), w.scales, scales.size() - 1, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(a.data(), q.operand.activations, a.size(), cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(sa.data(), q.operand.scales, sa.size(), cudaMemcpyDeviceToHost));
        einsum_operand o = q.operand;
        o.activations = a.data();
        o.scales = sa.data();
        einsum_reference(&w.format, elements.data(), scales.data(), &o, host.data());
        for (uint64_t j = 0; j < n; j++) {
            bool nan = std::isnan(host[j]) && std::isnan(device[j]);
            if (!nan && !(fabs(host[j] - device[j]) <= 1e-9 * fabs(host[j]) + 1e-300)) {
                double magnitude;
                einsum_reference_one(&w.format, elements.data(), scales.data(), &o,
                                     (uint32_t)(j / 128), 0, (uint32_t)(j % 128), &magnitude, NULL);
                if (!(fabs(host[j] - device[j]) <= 1e-12 * magnitude)) {
                    fail(std::string("FP64 on the device differs from the reference: ") + r.name);
                    break;
                }
            }
        }
        cases++;
        CHECK(cudaFree(answers));
        free_request(q);
        free_weight(w);
    }
}

static void every_token_count(int only)
{
    for (int i = 0; i < RECIPES; i++) {
        if (only >= 0 && i != only)
            continue;
        // D is no multiple of 128 where blocks allow it, R none of a unit; K = 12 packs.
        uint32_t d = recipes[i].block_d == 128 ? 384 : 352;
        test_weight w = make_weight(format_of(recipes[i], 3, d, 1536), seed_next++, false);
        test_weight odd = make_weight(format_of(recipes[i], 2, d, 640), seed_next++, false);
        for (uint32_t t = 1; t <= 300; t += quick && t > 20 ? 37 : 1) {
            int step = quick ? 3 : t > 72 ? 8 : 1; // all eight layouts below, one above
            for (int layouts = t % step; layouts < 8; layouts += step)
                one(w, recipes[i], launcher_for(t), t, layouts, 0, 3, "small");
            one(odd, recipes[i], launcher_for(t), t, (int)(t % 8), t % 2, 1, "odd");
            if (w.weight.tiles &&
                cuda_bucket_takes_many(&small_launcher_for(t).bucket, &w.format, 3, t))
                for (int layouts = t % step; layouts < 8; layouts += step)
                    one(w, recipes[i], small_launcher_for(t), t, layouts, 0, 3, "whole tiles",
                        {CUDA_KERNEL_AUTO});
            if (t % 7 == 0) // more room than needed: other code for few tokens
                one(w, recipes[i], launcher_for(t % 2 && t <= 64 ? 64 : 512), t, (int)(t % 8), 1, 2,
                    "roomy");
        }
        free_weight(w);
        free_weight(odd);
        printf("  %-22s %llu cases, %llu failures\n", recipes[i].name, cases, failures);
        fflush(stdout);
    }
}

static void full_size()
{
    const uint32_t counts[] = {1,  2,   3,   8,   9,   16,  17,  32,   33,   64,
                               65, 128, 129, 256, 511, 512, 513, 1024, 8191, 8192};
    for (int i : {0, 2, 4, 10}) {
        for (uint32_t groups : {8u, 1u, 16u}) {
            test_weight w =
                make_weight(format_of(recipes[i], groups, 1024, 4096), seed_next++, false);
            for (uint32_t t : counts)
                if (t <= (quick || groups != 8 ? 513 : i == 0 ? 8192 : 1024))
                    one(w, recipes[i], launcher_for(t), t, (int)(t % 8), 0, groups, "full");
            free_weight(w);
        }
    }
    printf("  full size              %llu cases, %llu failures\n", cases, failures);
}

// Many segments, shuffled over few weights, layouts and types in one launch.
static void mixes(int rounds)
{
    std::vector<test_weight> weights;
    std::vector<int> kinds;
    for (int i = 0; i < RECIPES; i++) {
        weights.push_back(make_weight(
            format_of(recipes[i], 4, recipes[i].block_d == 128 ? 256 : 288, i % 2 ? 1024 : 512),
            seed_next++, false));
        kinds.push_back(i);
    }
    for (int round = 0; round < rounds; round++) {
        uint32_t room = round % 4 == 0 ? 8 : round % 4 == 1 ? 32 : round % 4 == 2 ? 64 : 1024;
        uint32_t tokens = 0;
        std::vector<request> requests;
        std::vector<cuda_segment> segments;
        std::vector<int> used;
        while (segments.size() < 60) {
            uint32_t random = mix(seed_next++);
            int i = (int)(random % (round % 3 == 0 ? 2 : RECIPES));
            uint32_t t = room == 1024 ? 1 + random / 16 % 300 : 1 + random / 16 % 12;
            uint32_t begin = random / 4096 % 4, groups = 1 + random / 65536 % (4 - begin);
            if (round % 2)
                begin = 0, groups = 4;
            if (tokens + t > room)
                break;
            tokens += t;
            // Either scale type of activations may meet any weight.
            recipe r = recipes[i];
            r.scale_a = random >> 30 & 1 ? EINSUM_SCALE_FP32 : r.scale_a;
            requests.push_back(make_request(r, weights[(size_t)i].format, t, begin, groups,
                                            (int)(random >> 27 & 7), false));
            poison(requests.back(), 0xFF);
            // Here and there a segment that asks for its kernel.
            cuda_kernel kernel = random >> 24 & 7 ? CUDA_KERNEL_AUTO : CUDA_KERNEL_PREFILL;
            segments.push_back({&weights[(size_t)i].weight, requests.back().operand, kernel});
            used.push_back(i);
        }
        launcher &l = round / 4 % 2 ? small_launcher_for(room) : launcher_for(room);
        bool hopper = l.run(segments.data(), (uint32_t)segments.size(), stream);
        CHECK(cudaStreamSynchronize(stream));
        for (size_t j = 0; j < requests.size(); j++) {
            judge(weights[(size_t)used[j]], requests[j], 0xFF, hopper,
                  "mix " + std::to_string(round) + ", segment " + std::to_string(j) + ", " +
                      recipes[used[j]].name);
            free_request(requests[j]);
        }
    }
    for (auto &w : weights)
        free_weight(w);
    printf("  mixes                  %llu cases, %llu failures\n", cases, failures);
}

static void put(void *at, uint8_t byte)
{
    CHECK(cudaMemcpy(at, &byte, 1, cudaMemcpyHostToDevice));
}

// NaN in an element or a scale, of either side, and scales at the ends of their range: 2^127 may meet
// 2^-127. A NaN touches its own outputs alone.
static void extremes()
{
    for (int i = 0; i < RECIPES; i++)
        for (uint32_t tokens : {1u, 7u, 16u, 30u, 64u, 200u})
            for (int kind = 0; kind < 8; kind++) {
                const recipe &r = recipes[i];
                uint32_t d = r.block_d == 128 ? 256 : 160;
                test_weight w = make_weight(format_of(r, 2, d, 512), seed_next++, kind & 1);
                request q = make_request(r, w.format, tokens, 0, 2, kind + (int)tokens, kind & 2);
                if (kind & 4) {
                    put((uint8_t *)q.operand.activations + mix(seed_next++) % (tokens * 1024),
                        0xFF);
                    uint64_t at = mix(seed_next++) % (2 * d * 512);
                    if (r.weight == EINSUM_WEIGHT_E4M3) {
                        put(w.elements + at, 0x7F);
                    } else {
                        put(w.elements + 2 * at, 0xC1);
                        put(w.elements + 2 * at + 1, 0x7F); // NaN
                        at = mix(seed_next++) % (2 * d * 512);
                        put(w.elements + 2 * at + 1, 0x7E); // 2^126 or so
                        put(w.elements + 2 * at + 5, 0x00); // subnormal
                    }
                    if (r.scale_w == EINSUM_SCALE_UE8M0)
                        put(w.scales + mix(seed_next++) % einsum_weight_scale_bytes(&w.format),
                            0xFF);
                    if (r.scale_a == EINSUM_SCALE_UE8M0)
                        put((uint8_t *)q.operand.scales +
                                mix(seed_next++) % (tokens * 2 * (512 / r.block_r)),
                            0xFF);
                    relay(w);
                }
                int byte = 0;
                for (cuda_kernel kernel : kernels_for(w, tokens)) {
                    byte ^= 0xFF;
                    poison(q, byte);
                    cuda_segment segment = {&w.weight, q.operand, kernel};
                    bool hopper = launcher_for(tokens).run(&segment, 1, stream);
                    CHECK(cudaStreamSynchronize(stream));
                    judge(w, q, byte, hopper,
                          std::string("extreme ") + r.name + ", T " + std::to_string(tokens) +
                              ", kind " + std::to_string(kind),
                          true);
                }
                free_request(q);
                free_weight(w);
            }
    printf("  extremes               %llu cases, %llu failures\n", cases, failures);
}

// The same bytes twice, many times over: a race would show.
static void repeats_are_equal()
{
    for (uint32_t tokens : {1u, 12u, 64u, 300u}) {
        test_weight w = make_weight(format_of(recipes[4], 8, 1024, 4096), seed_next++, false);
        request q = make_request(recipes[4], w.format, tokens, 0, 8, 4, false);
        std::vector<uint8_t> first(q.output_bytes), again(q.output_bytes);
        cuda_segment segment = {&w.weight, q.operand};
        for (int i = 0; i < 50; i++) {
            poison(q, 0xFF);
            launcher_for(tokens).run(&segment, 1, stream);
            CHECK(cudaStreamSynchronize(stream));
            CHECK(cudaMemcpy((i ? again : first).data(), q.output, q.output_bytes,
                             cudaMemcpyDeviceToHost));
            if (i && first != again)
                fail("results of T " + std::to_string(tokens) + " differ from run to run");
        }
        cases++;
        free_request(q);
        free_weight(w);
    }
}

static void few_of_each()
{
    for (int i = 0; i < RECIPES; i++) {
        test_weight w =
            make_weight(format_of(recipes[i], 2, recipes[i].block_d == 128 ? 256 : 160, 640),
                        seed_next++, i % 2);
        for (uint32_t t : {1u, 9u, 33u, 70u, 130u})
            one(w, recipes[i], launcher_for(t), t, (int)(t % 8), 0, 2, "few");
        for (uint32_t t : {20u, 64u, 130u})
            if (w.weight.tiles)
                one(w, recipes[i], small_launcher_for(t), t, (int)(t % 8), 0, 2, "few whole tiles",
                    {CUDA_KERNEL_AUTO});
        free_weight(w);
    }
}

int main(int argc, char **argv)
{
    bool sanitize = argc > 1 && strcmp(argv[1], "sanitize") == 0;
    quick = argc > 1 && strcmp(argv[1], "quick") == 0;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    int only = argc > 2 ? atoi(argv[2]) : -1;
    if (sanitize) {
        few_of_each();
        mixes(4);
    } else {
        every_token_count(only);
    }
    if (!sanitize && only < 0) {
        reference_agrees();
        mixes(quick ? 8 : 60);
        extremes();
        full_size();
        repeats_are_equal();
    }
    CHECK(cudaDeviceSynchronize());
    printf(
        "RESULT {\"bench\": \"gpu_numbers\", \"cases\": %llu, \"outputs\": %llu, \"failures\": "
        "%llu, "
        "\"relative_error_bf16\": %.3g, \"relative_error_fp32\": %.3g, "
        "\"hopper_relative_error_bf16\": %.3g, \"hopper_relative_error_fp32\": %.3g, \"ok\": %s}\n",
        cases, outputs_checked, failures, error_worst[0][0], error_worst[0][1], error_worst[1][0],
        error_worst[1][1], failures == 0 ? "true" : "false");
    return failures == 0 ? 0 : 1;
}
