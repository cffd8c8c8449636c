// Batcher, scheduler and engine without gRPC: how long one small request takes, and how near a
// stream of large ones comes to what the bus can carry.
//
//     latency     one request in flight: [reserve, fill, commit ... result in host memory], going
//                 round all layers, so that no weight comes from a cache
//     bandwidth   --in-flight requests of T tokens, each a batch of its own: bytes copied in over
//                 wall time, beside plain copies of the same sizes from the same kind of memory
//     numbers     before and after each: outputs poisoned, then compared with FP64
//
// The caller waits by looking at a word, as a caller would who wants his answer at once; one that
// sleeps pays for being woken. In the bandwidth part inputs stay as they were filled once: the
// host's writing to memory is not what is measured.
//
// Threads: main drives; the scheduler's calls on_done.
#include <getopt.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef EINSUMD_CUDA
#include <cuda_runtime_api.h>
#endif

#include "kernels/fp8.h"
#include "server/batch.h"

enum {
    LAYERS_MAX = 128,
    IN_FLIGHT_MAX = 64,
    TOKENS_LISTED_MAX = 8,
    SAMPLES = 200, // outputs compared of a request
    LATENCY_WARMUP = 200,
    RESTED_REQUESTS = 300,
    REST_NS = 2000000,
    COPY_BUFFERS = 2,
    NS_PER_SECOND = 1000000000,
};

// Nothing that a sum of finite numbers rounds to.
static const uint16_t poison = 0x7FA5;

static const double latency_bar_us = 25, bandwidth_bar = 0.85;

struct settings {
    const char *engine, *kernel;
    uint32_t layers, in_flight, requests;
    uint32_t groups, output_dim, reduced_dim;
    uint32_t tokens[TOKENS_LISTED_MAX], tokens_n;
    double seconds;
};

struct row {
    uint32_t tokens;
    bool numbers_ok, bar_held;
    // Latency, in us.
    double p50, p90, p99, fill, rested_p50;
    // Bandwidth, in GB/s; 0: not measured.
    double copied_in, pinned, pinned_both_ways;
    struct batcher_stats stats;
};

static struct settings settings = {
    .engine = "auto",
    .layers = 43,
    .in_flight = 6,
    .requests = 10000,
    .groups = 8,
    .output_dim = 1024,
    .reduced_dim = 4096,
    .tokens = {1, 256, 4096},
    .tokens_n = 3,
    .seconds = 2,
};

static const struct engine_ops *ops;
static struct engine *engine;
static struct batcher_waker waker;
static struct weight weights[LAYERS_MAX];
static uint32_t buckets[32], buckets_n;

NORETURN static void die(const char *what, const struct error *err)
{
    fprintf(stderr, "pipeline: %s%s%s\n", what, err ? ": " : "", err ? err->text : "");
    printf("RESULT {\"bench\": \"pipeline\", \"rows\": [], \"ok\": false}\n");
    exit(EXIT_FAILURE);
}

// ---- random tensors, the same wherever they are asked for

static uint64_t random_word(uint64_t seed, uint64_t index)
{
    uint64_t z = seed * 0x9E3779B97F4A7C15u + index;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// One bit of the exponent is clear, so that none is NaN.
static void fill_e4m3(void *to, uint64_t seed, uint64_t offset, uint64_t bytes)
{
    uint64_t *words = to;
    for (uint64_t i = 0; i < bytes / sizeof *words; i++)
        words[i] = random_word(seed, offset / sizeof *words + i) & 0xF7F7F7F7F7F7F7F7u;
}

static void fill_ue8m0(uint8_t *to, uint64_t seed, uint64_t bytes)
{
    for (uint64_t i = 0; i < bytes; i++)
        to[i] = (uint8_t)(120 + random_word(seed, i) % 8);
}

static struct einsum_weight_format format_of_layers(void)
{
    return (struct einsum_weight_format){
        .groups = settings.groups,
        .output_dim = settings.output_dim,
        .reduced_dim = settings.reduced_dim,
        .weight_type = EINSUM_WEIGHT_E4M3,
        .scale_type = EINSUM_SCALE_UE8M0,
        .block_d = 128,
        .block_r = 128,
    };
}

struct layer_source {
    struct engine_weight_source base; // first, so that its functions find the rest
    uint64_t layer;
};

static uint64_t seed_of(uint64_t layer, bool scales)
{
    return 2 * layer + scales + 1;
}

static enum status read_weight(const struct engine_weight_source *base, uint64_t offset, void *to,
                               uint64_t bytes, struct error *err)
{
    const struct layer_source *source = (const struct layer_source *)base;
    (void)err;
    fill_e4m3(to, seed_of(source->layer, false), offset, bytes);
    return STATUS_OK;
}

static enum status read_scales(const struct engine_weight_source *base, void *to, struct error *err)
{
    const struct layer_source *source = (const struct layer_source *)base;
    (void)err;
    fill_ue8m0(to, seed_of(source->layer, true), einsum_weight_scale_bytes(&base->format));
    return STATUS_OK;
}

static void load_layers(void)
{
    for (uint32_t i = 0; i < settings.layers; i++) {
        struct layer_source source = {
            .base = {.format = format_of_layers(),
                     .read_weight = read_weight,
                     .read_scales = read_scales},
            .layer = i,
        };
        struct error err = {.text = ""};
        weights[i].format = source.base.format;
        if (ops->weight_load(engine, &source.base, &weights[i].engine_weight, &err))
            die("loading a layer", &err);
    }
}

// ---- jobs

struct caller {
    struct job job;
    _Atomic bool done;
};

static void on_done(struct job *job)
{
    struct caller *caller = CONTAINER_OF(job, struct caller, job);
    atomic_store_explicit(&caller->done, true, memory_order_release);
}

static void caller_reserve(struct caller *caller, struct batcher *batcher, uint32_t layer,
                           uint32_t tokens)
{
    struct job *job = &caller->job;
    *job = (struct job){
        .weight = &weights[layer % settings.layers],
        .operand = {.tokens = tokens,
                    .groups = settings.groups,
                    .activation_layout = EINSUM_ACTIVATIONS_TGR,
                    .scale_layout = EINSUM_SCALES_TGK,
                    .scale_type = EINSUM_SCALE_UE8M0,
                    .output_type = EINSUM_OUTPUT_BF16},
        .deadline_ns = UINT64_MAX,
        .on_done = on_done,
    };
    atomic_store_explicit(&caller->done, false, memory_order_relaxed);
    struct error err = {.text = ""};
    if (batcher_reserve(batcher, job, &err))
        die("reserving", &err);
}

static bool caller_done(const struct caller *caller)
{
    return atomic_load_explicit(&caller->done, memory_order_acquire);
}

static void caller_wait(const struct caller *caller)
{
    while (!caller_done(caller))
        ;
    if (caller->job.error.status)
        die("a request failed", &caller->job.error);
}

static uint64_t activation_bytes(uint32_t tokens)
{
    return einsum_activation_bytes(tokens, settings.groups, settings.reduced_dim);
}

static uint64_t scale_bytes(uint32_t tokens)
{
    return einsum_scale_bytes(EINSUM_SCALES_TGK, EINSUM_SCALE_UE8M0, tokens, settings.groups,
                              settings.reduced_dim / 128);
}

static uint64_t output_bytes(uint32_t tokens)
{
    return einsum_output_bytes(EINSUM_OUTPUT_BF16, tokens, settings.groups, settings.output_dim);
}

// As the batcher rounds them.
static uint64_t input_bytes(uint32_t tokens)
{
    return align_up(activation_bytes(tokens), CACHE_LINE_BYTES) +
           align_up(scale_bytes(tokens), CACHE_LINE_BYTES);
}

static void job_fill(const struct job *job, const uint8_t *activations, const uint8_t *scales)
{
    memcpy((void *)(uintptr_t)job->operand.activations, activations,
           activation_bytes(job->operand.tokens));
    memcpy((void *)(uintptr_t)job->operand.scales, scales, scale_bytes(job->operand.tokens));
}

// ---- numbers

// `wgmma`: see engine_may_sum_by_wgmma.
static bool output_right(const struct job *job, const uint8_t *weight, const uint8_t *scales,
                         uint64_t index, bool wgmma)
{
    const struct einsum_weight_format *format = &job->weight->format;
    uint32_t d = (uint32_t)(index % format->output_dim);
    uint32_t g = (uint32_t)(index / format->output_dim % settings.groups);
    uint32_t t = (uint32_t)(index / format->output_dim / settings.groups);
    double magnitude, loss;
    double exact =
        einsum_reference_one(format, weight, scales, &job->operand, t, g, d, &magnitude, &loss);
    double got = (double)bf16_to_float(((const uint16_t *)job->operand.output)[index]);
    return fabs(got - exact) <= einsum_tolerance(EINSUM_OUTPUT_BF16, exact, magnitude,
                                                 wgmma ? loss : 0, format->reduced_dim);
}

// Every output written, and SAMPLES of them right.
static bool outputs_right(const struct job *job, uint64_t layer)
{
    const struct einsum_weight_format *format = &job->weight->format;
    const uint16_t *outputs = job->operand.output;
    uint64_t n = output_bytes(job->operand.tokens) / sizeof *outputs;
    ASSERT(n > 0);
    uint64_t bytes = einsum_weight_bytes(format), weight_scales = einsum_weight_scale_bytes(format);
    uint8_t *weight = malloc(bytes), *scales = malloc(weight_scales);
    if (!weight || !scales)
        die("no memory for the reference", NULL);
    fill_e4m3(weight, seed_of(layer, false), 0, bytes);
    fill_ue8m0(scales, seed_of(layer, true), weight_scales);
    uint64_t wrong = 0;
    bool wgmma = engine_may_sum_by_wgmma(ops, engine, 0);
    for (uint64_t i = 0; i < n; i++)
        wrong += outputs[i] == poison;
    for (uint64_t i = 0; i < SAMPLES; i++)
        wrong += !output_right(job, weight, scales, random_word(layer, i) % n, wgmma);
    free(weight);
    free(scales);
    if (wrong)
        fprintf(stderr, "pipeline: %llu outputs of %u tokens, layer %llu, are wrong\n",
                (unsigned long long)wrong, job->operand.tokens, (unsigned long long)layer);
    return wrong == 0;
}

// One request, alone, of a layer: its numbers are looked at. The null engine has none.
static bool check(struct batcher *batcher, uint32_t layer, uint32_t tokens)
{
    if (ops == &engine_null)
        return true;
    struct caller caller;
    caller_reserve(&caller, batcher, layer, tokens);
    const struct einsum_operand *operand = &caller.job.operand;
    fill_e4m3((void *)(uintptr_t)operand->activations, 1000 + layer, 0, activation_bytes(tokens));
    fill_ue8m0((uint8_t *)(uintptr_t)operand->scales, 2000 + layer, scale_bytes(tokens));
    uint16_t *outputs = operand->output;
    for (uint64_t i = 0; i < output_bytes(tokens) / sizeof *outputs; i++)
        outputs[i] = poison;
    batcher_commit(batcher, &caller.job);
    caller_wait(&caller);
    bool right = outputs_right(&caller.job, layer % settings.layers);
    batcher_release(batcher, &caller.job);
    return right;
}

static bool check_some(struct batcher *batcher, uint32_t tokens)
{
    bool right = check(batcher, 0, tokens);
    return check(batcher, settings.layers - 1, tokens) && right;
}

// ---- latency

static int by_value(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

// The value below which `percent` of all lie.
static double share_us(const uint64_t *sorted_ns, uint64_t n, uint64_t percent)
{
    uint64_t index = n * percent / 100;
    return (double)sorted_ns[index] / 1e3;
}

struct payload {
    uint8_t *activations, *scales;
};

// One request, alone: how long it took, and its filling.
static uint64_t time_one(struct batcher *batcher, uint32_t layer, uint32_t tokens,
                         const struct payload *payload, uint64_t *fill_ns)
{
    struct caller caller;
    uint64_t begun_ns = now_ns();
    caller_reserve(&caller, batcher, layer, tokens);
    uint64_t reserved_ns = now_ns();
    job_fill(&caller.job, payload->activations, payload->scales);
    *fill_ns += now_ns() - reserved_ns;
    batcher_commit(batcher, &caller.job);
    caller_wait(&caller);
    uint64_t ended_ns = now_ns();
    batcher_release(batcher, &caller.job);
    return ended_ns - begun_ns;
}

static void run_latency(struct batcher *batcher, struct row *row)
{
    uint32_t tokens = row->tokens, n = settings.requests;
    uint32_t rested_n = n < RESTED_REQUESTS ? n : RESTED_REQUESTS;
    uint64_t *taken_ns = calloc(n, sizeof *taken_ns), fill_ns = 0;
    struct payload payload = {malloc(activation_bytes(tokens)), malloc(scale_bytes(tokens))};
    if (!taken_ns || !payload.activations || !payload.scales)
        die("no memory", NULL);
    fill_e4m3(payload.activations, 1, 0, activation_bytes(tokens));
    fill_ue8m0(payload.scales, 2, scale_bytes(tokens));
    for (uint32_t i = 0; i < LATENCY_WARMUP; i++)
        time_one(batcher, i, tokens, &payload, &fill_ns);
    fill_ns = 0;
    for (uint32_t i = 0; i < n; i++)
        taken_ns[i] = time_one(batcher, i, tokens, &payload, &fill_ns);
    qsort(taken_ns, n, sizeof *taken_ns, by_value);
    row->p50 = share_us(taken_ns, n, 50);
    row->p90 = share_us(taken_ns, n, 90);
    row->p99 = share_us(taken_ns, n, 99);
    row->fill = (double)fill_ns / n / 1e3;
    // Long enough for the scheduler to have gone to sleep.
    for (uint32_t i = 0; i < rested_n; i++) {
        nanosleep(&(struct timespec){.tv_nsec = REST_NS}, NULL);
        taken_ns[i] = time_one(batcher, i, tokens, &payload, &fill_ns);
    }
    qsort(taken_ns, rested_n, sizeof *taken_ns, by_value);
    row->rested_p50 = share_us(taken_ns, rested_n, 50);
    free(taken_ns);
    free(payload.activations);
    free(payload.scales);
}

// ---- bandwidth

// Fills each batch's memory the first time that it is seen.
static void fill_once(const struct job *job, const void **seen)
{
    const void *input = job->operand.activations;
    for (uint32_t i = 0; i < IN_FLIGHT_MAX; i++) {
        if (seen[i] == input)
            return;
        if (!seen[i]) {
            seen[i] = input;
            fill_e4m3((void *)(uintptr_t)input, 1, 0, activation_bytes(job->operand.tokens));
            fill_ue8m0((uint8_t *)(uintptr_t)job->operand.scales, 2,
                       scale_bytes(job->operand.tokens));
            return;
        }
    }
    die("more batches than buffers", NULL);
}

// Answers of callers that were done, each sent off again at once, in `seconds`.
static uint64_t run_saturated(struct batcher *batcher, struct caller *callers, uint32_t tokens,
                              const void **seen, double seconds, uint64_t *wall_ns)
{
    uint64_t begun_ns = now_ns(), now = begun_ns, answers = 0;
    uint64_t until_ns = begun_ns + (uint64_t)(seconds * NS_PER_SECOND);
    for (uint32_t layer = 0; now < until_ns; now = now_ns())
        for (uint32_t i = 0; i < settings.in_flight; i++) {
            struct caller *caller = &callers[i];
            if (!caller_done(caller))
                continue;
            caller_wait(caller);
            batcher_release(batcher, &caller->job);
            answers++;
            caller_reserve(caller, batcher, layer++, tokens);
            fill_once(&caller->job, seen);
            batcher_commit(batcher, &caller->job);
        }
    *wall_ns = now - begun_ns;
    return answers;
}

static void run_bandwidth(struct batcher *batcher, struct row *row)
{
    static struct caller callers[IN_FLIGHT_MAX];
    const void *seen[IN_FLIGHT_MAX] = {NULL};
    for (uint32_t i = 0; i < settings.in_flight; i++) {
        caller_reserve(&callers[i], batcher, i, row->tokens);
        fill_once(&callers[i].job, seen);
        batcher_commit(batcher, &callers[i].job);
    }
    uint64_t wall_ns;
    run_saturated(batcher, callers, row->tokens, seen, settings.seconds / 4, &wall_ns); // warm-up
    uint64_t answers =
        run_saturated(batcher, callers, row->tokens, seen, settings.seconds, &wall_ns);
    row->copied_in = (double)answers * (double)input_bytes(row->tokens) / (double)wall_ns;
    for (uint32_t i = 0; i < settings.in_flight; i++) {
        caller_wait(&callers[i]);
        batcher_release(batcher, &callers[i].job);
    }
}

// ---- the bus alone

#ifdef EINSUMD_CUDA

static void cuda_must(cudaError_t error)
{
    if (error != cudaSuccess)
        die(cudaGetErrorString(error), NULL);
}

struct copier {
    cudaStream_t stream;
    enum cudaMemcpyKind kind;
    uint64_t bytes;
    void *host[COPY_BUFFERS], *device[COPY_BUFFERS];
};

static void copier_init(struct copier *copier, enum cudaMemcpyKind kind, uint64_t bytes)
{
    *copier = (struct copier){.kind = kind, .bytes = bytes};
    cuda_must(cudaStreamCreateWithFlags(&copier->stream, cudaStreamNonBlocking));
    for (int i = 0; i < COPY_BUFFERS; i++) {
        struct error err = {.text = ""};
        if (ops->memory_alloc(engine, bytes, &copier->host[i], &err))
            die("memory for plain copies", &err);
        cuda_must(cudaMalloc(&copier->device[i], bytes));
    }
}

static void copier_deinit(struct copier *copier)
{
    for (int i = 0; i < COPY_BUFFERS; i++) {
        ops->memory_free(engine, copier->host[i], copier->bytes);
        cuda_must(cudaFree(copier->device[i]));
    }
    cuda_must(cudaStreamDestroy(copier->stream));
}

static void copier_start(struct copier *copier, uint32_t copies)
{
    for (uint32_t i = 0; i < copies; i++) {
        void *host = copier->host[i % COPY_BUFFERS], *device = copier->device[i % COPY_BUFFERS];
        bool in = copier->kind == cudaMemcpyHostToDevice;
        cuda_must(cudaMemcpyAsync(in ? device : host, in ? host : device, copier->bytes,
                                  copier->kind, copier->stream));
    }
}

// GB/s of copies of `tokens`' size to the device, with those of their outputs beside them if asked.
static double plain_copies(uint32_t tokens, bool both_ways)
{
    struct copier in, out;
    copier_init(&in, cudaMemcpyHostToDevice, input_bytes(tokens));
    copier_init(&out, cudaMemcpyDeviceToHost, output_bytes(tokens));
    uint32_t copies = (uint32_t)(8e9 * settings.seconds / (double)input_bytes(tokens)) + 2;
    double rate = 0;
    for (int round = 0; round < 2; round++) { // the first one warms up
        uint64_t begun_ns = now_ns();
        if (both_ways)
            copier_start(&out, copies);
        copier_start(&in, copies);
        cuda_must(cudaStreamSynchronize(in.stream));
        rate = (double)input_bytes(tokens) * copies / (double)(now_ns() - begun_ns);
        cuda_must(cudaStreamSynchronize(out.stream));
    }
    copier_deinit(&in);
    copier_deinit(&out);
    return rate;
}

static void measure_bus(struct row *row)
{
    if (ops != &engine_cuda)
        return;
    row->pinned = fmax(row->pinned, plain_copies(row->tokens, false));
    row->pinned_both_ways = fmax(row->pinned_both_ways, plain_copies(row->tokens, true));
}

#else

static void measure_bus(struct row *row)
{
    (void)row;
}

#endif

// ---- a run

static void fill_buckets(void)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < settings.tokens_n; i++)
        most = settings.tokens[i] > most ? settings.tokens[i] : most;
    for (uint32_t bucket = 1; bucket <= most; bucket *= 2)
        buckets[buckets_n++] = bucket;
}

static uint32_t lanes(void)
{
    return ops->lanes_default;
}

static void open_engine(void)
{
    ops = engine_find(settings.engine);
    if (!ops)
        die("no such engine in this build", NULL);
    fill_buckets();
    const struct engine_options options = {
        .kernel = settings.kernel,
        .lanes = lanes(),
        .batch_segments_max = 64,
        .buckets = buckets,
        .buckets_n = buckets_n,
        .reduced_dim_max = settings.reduced_dim,
        .phase_sample = 8,
        .wake = batcher_wake,
        .wake_context = &waker,
    };
    struct error err = {.text = ""};
    if (ops->open(&options, &engine, &err))
        die("opening the engine", &err);
    struct engine_info info;
    ops->describe(engine, &info);
    printf("engine %s on %s, kernel %s\n", ops->name, info.device, info.kernel);
    printf("%u layers, G %u, D %u, R %u; %u lanes, %u in flight\n", settings.layers,
           settings.groups, settings.output_dim, settings.reduced_dim, lanes(), settings.in_flight);
}

static struct batcher *open_batcher(uint32_t tokens)
{
    uint32_t n = 0;
    while (buckets[n] < tokens)
        n++;
    const struct batcher_options options = {
        .ops = ops,
        .engine = engine,
        .lanes = lanes(),
        .batches = settings.in_flight,
        .batch_input_bytes = align_up(input_bytes(tokens), 4096),
        .batch_output_bytes = align_up(output_bytes(tokens), 4096),
        .batch_tokens_max = tokens,
        .batch_requests_max = 64,
        .queue_requests_max = IN_FLIGHT_MAX,
        .buckets = buckets,
        .buckets_n = n + 1,
    };
    struct batcher *batcher;
    struct error err = {.text = ""};
    if (batcher_create(&options, &waker, &batcher, &err))
        die("the batcher", &err);
    return batcher;
}

static double mean_us(uint64_t sum_ns, uint64_t n)
{
    return n ? (double)sum_ns / (double)n / 1e3 : 0;
}

static void print_row(const struct row *row)
{
    const struct batcher_stats *stats = &row->stats;
    if (row->p50 > 0)
        printf("T %-5u  latency p50 %.1f p90 %.1f p99 %.1f us, of which filling %.1f; "
               "after 2 ms of rest p50 %.1f\n",
               row->tokens, row->p50, row->p90, row->p99, row->fill, row->rested_p50);
    else
        printf("T %-5u  copied in %.2f GB/s\n", row->tokens, row->copied_in);
    if (row->p50 == 0 && row->pinned > 0)
        printf("         plain copies %.2f GB/s: %.3f of it; with outputs beside them %.2f: %.3f\n",
               row->pinned, row->copied_in / row->pinned, row->pinned_both_ways,
               row->copied_in / row->pinned_both_ways);
    printf("         %llu batches; queue %.1f us; of %llu timed: copy in %.1f, kernel %.1f, "
           "copy out %.1f us\n",
           (unsigned long long)stats->batches, mean_us(stats->queue_ns, stats->batches),
           (unsigned long long)stats->phase_batches,
           mean_us(stats->copy_in.sum_ns, stats->phase_batches),
           mean_us(stats->kernel.sum_ns, stats->phase_batches),
           mean_us(stats->copy_out.sum_ns, stats->phase_batches));
    printf("         numbers %s, bar %s\n", row->numbers_ok ? "right" : "WRONG",
           ops->polled ? (row->bar_held ? "held" : "MISSED") : "for a GPU only");
    fflush(stdout);
}

static void run_row(struct row *row)
{
    bool latency = row->tokens == 1;
    if (!latency)
        measure_bus(row);
    struct batcher *batcher = open_batcher(row->tokens);
    row->numbers_ok = check_some(batcher, row->tokens);
    if (latency)
        run_latency(batcher, row);
    else
        run_bandwidth(batcher, row);
    row->numbers_ok = check_some(batcher, row->tokens) && row->numbers_ok;
    batcher_stats(batcher, &row->stats);
    batcher_destroy(batcher);
    if (!latency)
        measure_bus(row); // the better of before and after
    row->bar_held = latency ? row->p50 <= latency_bar_us
                            : row->pinned > 0 && row->copied_in >= bandwidth_bar * row->pinned;
    print_row(row);
}

static bool print_result(const struct row *rows, uint32_t n)
{
    bool ok = true;
    printf("RESULT {\"bench\": \"pipeline\", \"engine\": \"%s\", \"rows\": [", ops->name);
    for (uint32_t i = 0; i < n; i++) {
        const struct row *row = &rows[i];
        bool good = row->numbers_ok && (row->bar_held || !ops->polled);
        ok = ok && good;
        printf("%s{\"tokens\": %u, ", i ? ", " : "", row->tokens);
        if (row->p50 > 0)
            printf("\"p50_us\": %.2f, \"p90_us\": %.2f, \"p99_us\": %.2f, \"fill_us\": %.2f, "
                   "\"rested_p50_us\": %.2f, ",
                   row->p50, row->p90, row->p99, row->fill, row->rested_p50);
        else
            printf("\"copied_in_gb_s\": %.3f, \"pinned_gb_s\": %.3f, "
                   "\"pinned_both_ways_gb_s\": %.3f, ",
                   row->copied_in, row->pinned, row->pinned_both_ways);
        printf("\"numbers\": %s, \"ok\": %s}", row->numbers_ok ? "true" : "false",
               good ? "true" : "false");
    }
    printf("], \"ok\": %s}\n", ok ? "true" : "false");
    return ok;
}

static const char usage[] =
    "usage: pipeline [--engine auto|cuda|cpu|null] [--kernel NAME] [--tokens T,T...]\n"
    "                [--layers N] [--in-flight N] [--requests N] [--seconds S] [--shape G,D,R]\n\n"
    "Batcher, scheduler and engine without gRPC. T 1 measures the latency of --requests one by "
    "one,\n"
    "another T (a power of two) the bytes copied in per second with --in-flight requests, in\n"
    "--seconds. Random weights, checked numbers. The last line is RESULT and JSON; the exit status "
    "is\n"
    "0 if all numbers are right and, on a GPU, both bars are held: 25 us, and 0.85 of plain "
    "copies.\n";

static uint32_t number(const char *text, uint32_t most)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    if (end == text || *end || value < 1 || value > most) {
        fprintf(stderr, "pipeline: \"%s\" is not a number from 1 to %u\n%s", text, most, usage);
        exit(2);
    }
    return (uint32_t)value;
}

static double seconds(const char *text)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= 0.01 && value <= 3600)) {
        fprintf(stderr, "pipeline: \"%s\" is not a number from 0.01 to 3600\n%s", text, usage);
        exit(2);
    }
    return value;
}

static uint32_t number_list(char *text, uint32_t *to, uint32_t most_n, uint32_t most)
{
    uint32_t n = 0;
    char *rest;
    for (char *item = strtok_r(text, ",", &rest); item && n < most_n;
         item = strtok_r(NULL, ",", &rest))
        to[n++] = number(item, most);
    return n;
}

static void parse(int argc, char **argv)
{
    enum { ENGINE, KERNEL, TOKENS, LAYERS, IN_FLIGHT, REQUESTS, SECONDS, SHAPE, HELP };
    static const struct option options[] = {
        {"engine", required_argument, NULL, ENGINE},
        {"kernel", required_argument, NULL, KERNEL},
        {"tokens", required_argument, NULL, TOKENS},
        {"layers", required_argument, NULL, LAYERS},
        {"in-flight", required_argument, NULL, IN_FLIGHT},
        {"requests", required_argument, NULL, REQUESTS},
        {"seconds", required_argument, NULL, SECONDS},
        {"shape", required_argument, NULL, SHAPE},
        {"help", no_argument, NULL, HELP},
        {0},
    };
    uint32_t shape[3];
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (option) {
        case ENGINE:
            settings.engine = optarg;
            break;
        case KERNEL:
            settings.kernel = optarg;
            break;
        case TOKENS:
            settings.tokens_n =
                number_list(optarg, settings.tokens, TOKENS_LISTED_MAX, EINSUM_TOKENS_MAX);
            break;
        case LAYERS:
            settings.layers = number(optarg, LAYERS_MAX);
            break;
        case IN_FLIGHT:
            settings.in_flight = number(optarg, IN_FLIGHT_MAX);
            break;
        case REQUESTS:
            settings.requests = number(optarg, 1 << 24);
            break;
        case SECONDS:
            settings.seconds = seconds(optarg);
            break;
        case SHAPE:
            if (number_list(optarg, shape, 3, EINSUM_DIM_MAX) != 3 || shape[1] % 128 ||
                shape[2] % 128)
                die("--shape takes three numbers, the last two multiples of 128", NULL);
            settings.groups = shape[0];
            settings.output_dim = shape[1];
            settings.reduced_dim = shape[2];
            break;
        default:
            fputs(usage, option == HELP ? stdout : stderr);
            exit(option == HELP ? 0 : 2);
        }
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    for (uint32_t i = 0; i < settings.tokens_n; i++)
        if (settings.tokens[i] & (settings.tokens[i] - 1))
            die("--tokens takes powers of two", NULL);
    open_engine();
    load_layers();
    struct row rows[TOKENS_LISTED_MAX] = {0};
    for (uint32_t i = 0; i < settings.tokens_n; i++) {
        rows[i].tokens = settings.tokens[i];
        run_row(&rows[i]);
    }
    bool ok = print_result(rows, settings.tokens_n);
    for (uint32_t i = 0; i < settings.layers; i++)
        ops->weight_free(engine, weights[i].engine_weight);
    ops->close(engine);
    return ok ? EXIT_SUCCESS : EXIT_FAILURE;
}
