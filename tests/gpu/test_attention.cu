// The step before the einsum: the kernel's bytes against kernels/attention.c at every token count
// up to 70 and in mixes; then what the einsum makes of them in place; then the time of both.
//
//     test_attention [quick | full] [numbers]
//
// Last line: RESULT {json}.
#include "harness.cuh"

#include <algorithm>
#include <string>

#include "kernels/attention.h"

extern "C" cudaError_t cuda_attention_launch(const struct cuda_bucket *bucket,
                                             const struct cuda_table *table, cudaStream_t stream);

enum { GUARD = 256, POISON = 0xA5, LAYERS = 43, REPLAYS = 20 };

static uint64_t seed_next = 1;
static unsigned long long cases, rows_checked, failures;
static bool times_right = true;
static std::string rows_json;
static cudaStream_t stream;

static void fail(const std::string &what)
{
    if (failures++ < 40)
        printf("FAILED %s\n", what.c_str());
}

static uint32_t random_below(uint32_t n)
{
    return mix(seed_next++) % n;
}

// ---- one request of attention's output, on both sides

struct request {
    einsum_operand operand; // device addresses
    uint32_t reduced_dim, block_r;
    std::vector<uint8_t> rows; // as they were sent
    std::vector<attention_rotation> rotations;
    uint8_t *device_rows;
    attention_rotation *device_rotations;
    uint8_t *output;
};

// Contents by kind: like a model's, any code that is finite, any code at all. Blocks differ in size
// by up to `spread` binades.
static uint16_t random_bf16(int kind, uint32_t block)
{
    uint32_t random = mix(seed_next++), spread = mix(block * 7919) % 24;
    if (kind == 0)
        return (uint16_t)((random & 0x807F) | (118 + random / 65536 % 8) << 7);
    if (kind == 1)
        return (uint16_t)((random & 0x807F) | (90 + spread + random / 65536 % 16) << 7);
    bool finite = mix(block) % 4 != 0;
    uint16_t code = (uint16_t)(random >> 8);
    return finite && (code & 0x7F80) == 0x7F80 ? code & 0xBFFF : code;
}

static request make_request(const einsum_weight_format &f, uint32_t tokens, uint32_t group_begin,
                            uint32_t groups, int kind)
{
    request q = {};
    q.reduced_dim = f.reduced_dim;
    q.block_r = f.block_r;
    uint64_t bytes = attention_bytes(tokens, groups, f.reduced_dim);
    q.rows.resize(bytes);
    for (uint64_t i = 0; i < bytes / 2; i++) {
        uint16_t code = random_bf16(kind, (uint32_t)(i / f.block_r));
        memcpy(&q.rows[2 * i], &code, 2);
    }
    q.rotations.resize(tokens);
    for (auto &rotation : q.rotations) {
        double angle = random_below(100000) * 1e-2;
        for (int i = 0; i < ATTENTION_ROPE_PAIRS; i++) {
            rotation.cos[i] = (float)cos(angle * pow(0.7, i));
            rotation.sin[i] = (float)sin(angle * pow(0.7, i));
        }
    }
    uint64_t output_bytes = einsum_output_bytes(EINSUM_OUTPUT_BF16, tokens, groups, f.output_dim);
    q.device_rows = device_alloc<uint8_t>(bytes + GUARD);
    q.device_rotations = device_alloc<attention_rotation>(tokens);
    q.output = device_alloc<uint8_t>(output_bytes);
    CHECK(cudaMemset(q.output, 0xFF, output_bytes)); // NaN
    CHECK(cudaMemcpy(q.device_rotations, q.rotations.data(), tokens * sizeof q.rotations[0],
                     cudaMemcpyHostToDevice));
    q.operand = {};
    q.operand.tokens = tokens;
    q.operand.group_begin = group_begin;
    q.operand.groups = groups;
    q.operand.activation_layout = EINSUM_ACTIVATIONS_IN_PLACE;
    q.operand.scale_layout = EINSUM_SCALES_IN_PLACE;
    q.operand.scale_type = EINSUM_SCALE_UE8M0;
    q.operand.output_type = EINSUM_OUTPUT_BF16;
    q.operand.activations = q.device_rows;
    q.operand.scales = q.device_rows + f.reduced_dim;
    q.operand.output = q.output;
    q.operand.rotations = q.device_rotations;
    return q;
}

static void send(const request &q)
{
    CHECK(cudaMemcpy(q.device_rows, q.rows.data(), q.rows.size(), cudaMemcpyHostToDevice));
    CHECK(cudaMemset(q.device_rows + q.rows.size(), POISON, GUARD));
}

static void free_request(request &q)
{
    CHECK(cudaFree(q.device_rows));
    CHECK(cudaFree(q.device_rotations));
    CHECK(cudaFree(q.output));
}

static void judge_bytes(const request &q, const std::string &what)
{
    std::vector<uint8_t> got(q.rows.size() + GUARD);
    void *wanted = nullptr;
    if (posix_memalign(&wanted, 64, q.rows.size()) != 0)
        exit(2);
    memcpy(wanted, q.rows.data(), q.rows.size());
    CHECK(cudaMemcpy(got.data(), q.device_rows, got.size(), cudaMemcpyDeviceToHost));
    uint64_t row_bytes = 2 * (uint64_t)q.reduced_dim;
    uint64_t defined = q.reduced_dim + q.reduced_dim / q.block_r;
    cases++;
    for (uint64_t row = 0; row < q.operand.tokens * q.operand.groups; row++) {
        uint8_t *at = (uint8_t *)wanted + row * row_bytes;
        attention_quantise(at, q.reduced_dim, q.block_r, &q.rotations[row / q.operand.groups]);
        rows_checked++;
        for (uint64_t i = 0; i < defined; i++)
            if (at[i] != got[row * row_bytes + i]) {
                fail(what + ": byte " + std::to_string(i) + " of row " + std::to_string(row) +
                     " is " + std::to_string(got[row * row_bytes + i]) + ", not " +
                     std::to_string(at[i]));
                free(wanted);
                return;
            }
    }
    free(wanted);
    for (uint64_t i = 0; i < GUARD; i++)
        if (got[q.rows.size() + i] != POISON) {
            fail(what + ": written beyond the rows");
            return;
        }
}

static cuda_weight plain_weight(const einsum_weight_format &f)
{
    cuda_weight weight = {};
    weight.format = f;
    return weight;
}

// The kernel alone, on a table of these requests.
static void quantise(launcher &l, const std::vector<cuda_segment> &segments)
{
    CHECK(cudaDeviceSynchronize());
    l.build(segments.data(), (uint32_t)segments.size(), l.table, stream);
    CHECK(cuda_attention_launch(&l.bucket, l.table, stream));
    CHECK(cudaStreamSynchronize(stream));
}

static einsum_weight_format format_of(uint32_t groups, uint32_t reduced_dim, uint32_t block_r)
{
    return {groups, 128, reduced_dim, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, block_r, block_r};
}

static void every_token_count()
{
    for (uint32_t block_r : {128u, 32u})
        for (uint32_t tokens = 1; tokens <= 70; tokens++) {
            launcher l(tokens, 1);
            einsum_weight_format f = format_of(1 + tokens % 9, 512 * (1 + tokens % 17), block_r);
            cuda_weight weight = plain_weight(f);
            request q = make_request(f, tokens, 0, f.groups, (int)(tokens % 3));
            send(q);
            quantise(l, {{&weight, q.operand}});
            judge_bytes(q, "T " + std::to_string(tokens) + ", R " + std::to_string(f.reduced_dim) +
                               ", blocks of " + std::to_string(block_r));
            free_request(q);
        }
    printf("  every token count      %llu cases, %llu failures\n", cases, failures);
}

// Many segments of unlike shapes, so that rows are searched for; some without attention.
static void mixes(uint32_t rounds)
{
    static const uint32_t dims[] = {512, 1024, 4096, 4608, 8192, 65536};
    for (uint32_t round = 0; round < rounds; round++) {
        uint32_t n = round % 4 == 0 ? 1200 : 1 + random_below(70);
        std::vector<cuda_weight> weights;
        for (uint32_t i = 0; i < 12; i++)
            weights.push_back(plain_weight(format_of(4, dims[i / 2], i % 2 ? 32 : 128)));
        std::vector<request> requests;
        std::vector<cuda_segment> segments;
        uint32_t tokens = 0;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t which = n > 100 ? i % 2 : random_below(12), begin = random_below(4);
            requests.push_back(make_request(weights[which].format, 1 + random_below(3), begin,
                                            1 + random_below(4 - begin), (int)random_below(3)));
            send(requests.back());
            segments.push_back({&weights[which], requests.back().operand});
            if (i % 5 == 4)
                segments.back().operand.rotations = nullptr;
            tokens += requests.back().operand.tokens;
        }
        launcher l(tokens, n);
        quantise(l, segments);
        for (uint32_t i = 0; i < n; i++) {
            if (segments[i].operand.rotations)
                judge_bytes(requests[i],
                            "mix " + std::to_string(round) + ", segment " + std::to_string(i));
            free_request(requests[i]);
        }
    }
    printf("  mixes                  %llu cases, %llu failures\n", cases, failures);
}

// The whole launch: rows become right and so do the outputs computed from where they lie.
static void projected(bool quick)
{
    struct {
        einsum_weight_type weight;
        einsum_scale_type scale;
        uint32_t block_d, block_r;
    } recipes[] = {{EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128},
                   {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 32, 32},
                   {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 128, 128},
                   {EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 32},
                   {EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, 1, 128}};
    for (auto &r : recipes) {
        einsum_weight_format f = {4, 256, 1536, r.weight, r.scale, r.block_d, r.block_r};
        test_weight w = make_weight(f, seed_next++, false);
        for (uint32_t tokens = 1; tokens <= 300; tokens += tokens < 20 && !quick ? 1 : 47) {
            request q = make_request(f, tokens, tokens % 2, 3, 0);
            request other = make_request(f, 2, 0, 4, 0);
            send(q);
            send(other);
            launcher l(tokens + 2, 2);
            cuda_segment segments[] = {{&w.weight, q.operand}, {&w.weight, other.operand}};
            bool hopper = l.run(segments, 2, stream);
            CHECK(cudaStreamSynchronize(stream));
            for (request *it : {&q, &other}) {
                judge_bytes(*it, "projected T " + std::to_string(tokens));
                verdict v = compare(w, it->operand, hopper);
                if (v.failed != 0 || v.nan_expected != 0)
                    fail("outputs of T " + std::to_string(tokens) + ": " +
                         std::to_string(v.failed) + " of " + std::to_string(v.checked) + " wrong");
                free_request(*it);
            }
        }
        free_weight(w);
    }
    printf("  with the einsum        %llu cases, %llu failures\n", cases, failures);
}

// ---- time

enum what { ATTENTION, EINSUM, BOTH };

struct chain {
    std::vector<test_weight> *weights;
    uint32_t tokens, layers;
    request first; // all layers begin with its rows
    std::vector<uint8_t *> rows;
    std::vector<launcher *> launchers;
    uint32_t launches; // of each, the same
    uint8_t *sent, *outputs;
};

// Every layer has rows, a table and outputs of its own, as if each had just come.
static chain make_chain(std::vector<test_weight> &weights, uint32_t tokens)
{
    chain c = {};
    c.weights = &weights;
    c.tokens = tokens;
    c.layers = tokens > 1024 ? 8 : LAYERS;
    const einsum_weight_format &f = weights[0].format;
    c.first = make_request(f, tokens, 0, f.groups, 0);
    send(c.first);
    c.sent = device_alloc<uint8_t>(c.first.rows.size());
    CHECK(cudaMemcpy(c.sent, c.first.device_rows, c.first.rows.size(), cudaMemcpyDeviceToDevice));
    uint64_t output = einsum_output_bytes(EINSUM_OUTPUT_BF16, tokens, f.groups, f.output_dim);
    c.outputs = device_alloc<uint8_t>(output * c.layers);
    for (uint32_t i = 0; i < c.layers; i++) {
        c.rows.push_back(device_alloc<uint8_t>(c.first.rows.size()));
        c.launchers.push_back(new launcher(tokens, 1));
    }
    return c;
}

static einsum_operand operand_of(const chain &c, uint32_t layer)
{
    einsum_operand operand = c.first.operand;
    const einsum_weight_format &f = (*c.weights)[0].format;
    operand.activations = c.rows[layer];
    operand.scales = c.rows[layer] + f.reduced_dim;
    operand.output = c.outputs + layer * einsum_output_bytes(EINSUM_OUTPUT_BF16, c.tokens, f.groups,
                                                             f.output_dim);
    return operand;
}

static void free_chain(chain &c)
{
    for (uint32_t i = 0; i < c.layers; i++) {
        CHECK(cudaFree(c.rows[i]));
        delete c.launchers[i];
    }
    CHECK(cudaFree(c.sent));
    CHECK(cudaFree(c.outputs));
    free_request(c.first);
}

// Microseconds of a layer; rows are as they were sent before each replay, which is not timed.
// EINSUM alone runs on what BOTH has left in them.
static double measure(chain &c, what what)
{
    for (uint32_t i = 0; i < c.layers; i++) {
        einsum_operand operand = operand_of(c, i);
        if (what == EINSUM)
            operand.rotations = nullptr;
        cuda_segment segment = {&(*c.weights)[i].weight, operand};
        c.launches = c.launchers[i]->build(&segment, 1, c.launchers[i]->table, stream);
        CHECK(cudaStreamSynchronize(stream));
    }
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t i = 0; i < c.layers; i++) {
        launcher *l = c.launchers[i];
        if (what == ATTENTION)
            CHECK(cuda_attention_launch(&l->bucket, l->table, stream));
        else
            CHECK(cuda_launch(&l->bucket, c.launches, l->table, l->workspace_of(i), stream));
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < REPLAYS + 3; i++) {
        for (uint8_t *rows : c.rows)
            if (what != EINSUM)
                CHECK(cudaMemcpyAsync(rows, c.sent, c.first.rows.size(), cudaMemcpyDeviceToDevice,
                                      stream));
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaStreamSynchronize(stream));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 3)
            times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    for (uint32_t layer : {0u, c.layers - 1})
        if (what != ATTENTION)
            times_right =
                times_right &&
                compare((*c.weights)[layer], operand_of(c, layer), by_wgmma(c.launches)).failed ==
                    0;
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return times[REPLAYS / 2] * 1000 / c.layers;
}

static void time_all()
{
    einsum_weight_format f = {8, 1024, 4096, EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128};
    std::vector<test_weight> weights;
    for (int i = 0; i < LAYERS; i++)
        weights.push_back(make_weight(f, (uint64_t)i * 7 + 1000, false));
    printf("%8s %16s %12s %16s %16s %12s\n", "tokens", "attention, us", "GB/s", "with einsum, us",
           "einsum alone, us", "added, us");
    for (uint32_t tokens : {1u, 8u, 32u, 256u, 4096u}) {
        chain c = make_chain(weights, tokens);
        double bytes =
            (double)tokens * f.groups * (3.0 * f.reduced_dim + f.reduced_dim / f.block_r);
        double attention = measure(c, ATTENTION), both = measure(c, BOTH);
        double einsum = measure(c, EINSUM);
        printf("%8u %16.2f %12.0f %16.2f %16.2f %12.2f\n", tokens, attention,
               bytes / attention / 1e3, both, einsum, both - einsum);
        fflush(stdout);
        char text[160];
        snprintf(text, sizeof text,
                 "%s{\"tokens\": %u, \"attention_us\": %.3f, \"both_us\": %.3f, "
                 "\"einsum_us\": %.3f}",
                 rows_json.empty() ? "" : ", ", tokens, attention, both, einsum);
        rows_json += text;
        free_chain(c);
    }
    for (auto &w : weights)
        free_weight(w);
}

int main(int argc, char **argv)
{
    bool quick = argc > 1 && strcmp(argv[1], "quick") == 0;
    bool numbers = argc > 2 && strcmp(argv[2], "numbers") == 0;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    every_token_count();
    mixes(quick ? 4 : 24);
    projected(quick);
    if (!numbers)
        time_all();
    CHECK(cudaDeviceSynchronize());
    bool ok = failures == 0 && times_right;
    printf("RESULT {\"bench\": \"gpu_attention\", \"cases\": %llu, \"rows\": %llu, \"failures\": "
           "%llu, \"times\": [%s], \"times_right\": %s, \"ok\": %s}\n",
           cases, rows_checked, failures, rows_json.c_str(), times_right ? "true" : "false",
           ok ? "true" : "false");
    return ok ? 0 : 1;
}
