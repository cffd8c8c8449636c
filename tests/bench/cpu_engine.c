// How close the CPU kernels come to the machine, without a server around them: a pool of threads
// takes items of cpu_task_run() as the engine's workers do.
//
//     numbers first      sampled outputs of every case against the FP64 reference
//     few tokens         weight bytes per second / what the same threads read from memory
//     many tokens        FLOP per second / OpenBLAS sgemm of the same shapes on as many threads
//
// Both sides of a ratio are timed next to each other, round after round, and the median of the
// rounds' ratios is reported, so that a busy neighbour hurts both alike. Weights go round eight
// layers, so that none is read from a cache.
#include <cblas.h>
#include <getopt.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kernels/cpu/cpu.h"

enum {
    LAYERS = 8,
    GROUPS = 8,
    OUTPUT_DIM = 1024,
    REDUCED_DIM = 4096,
    TOKENS_MAX = 256,
    THREADS_MAX = 256,
    ROUNDS_MAX = 101,
    ROWS_MAX = 64,
    SAMPLES = 400,
};

struct weight_kind {
    const char *name;
    enum einsum_weight_type type;
    enum einsum_scale_type scale_type;
    uint32_t block_d, block_r;
};

enum opponent { READ, SGEMM };

struct bench_case {
    uint32_t kind; // index into kinds
    uint32_t tokens;
    enum opponent opponent;
    double bar; // 0: for information
};

static const struct weight_kind kinds[] = {
    {"E4M3, UE8M0 128x128", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 128, 128},
    {"E4M3, FP32 128x128", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 128, 128},
    {"E4M3, UE8M0 32x32", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_UE8M0, 32, 32},
    {"E4M3, FP32 1x128", EINSUM_WEIGHT_E4M3, EINSUM_SCALE_FP32, 1, 128},
    {"BF16", EINSUM_WEIGHT_BF16, EINSUM_SCALE_NONE, 1, 128},
};
enum { KINDS = sizeof(kinds) / sizeof(kinds[0]) };

static const struct bench_case cases[] = {
    {0, 1, READ, 0.5},    {0, 2, READ, 0},      {0, 4, READ, 0},   {0, 8, READ, 0},
    {0, 8, SGEMM, 0},     {0, 16, SGEMM, 0},    {0, 32, SGEMM, 0}, {0, 64, SGEMM, 0.6},
    {0, 128, SGEMM, 0.6}, {0, 256, SGEMM, 0.6}, {1, 1, READ, 0},   {1, 64, SGEMM, 0},
    {2, 1, READ, 0},      {2, 64, SGEMM, 0},    {3, 1, READ, 0},   {3, 64, SGEMM, 0},
    {4, 1, READ, 0},      {4, 64, SGEMM, 0},
};
enum { CASES = sizeof(cases) / sizeof(cases[0]) };

// ---- Small things.

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static uint64_t random_state = 88172645463325252u;

static uint64_t random_next(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static void *allocate(uint64_t bytes)
{
    uint64_t huge = (uint64_t)2 << 20;
    void *memory = aligned_alloc(huge, (bytes + huge - 1) & ~(huge - 1));
    if (memory == NULL) {
        fprintf(stderr, "cpu_engine: no memory for %llu bytes\n", (unsigned long long)bytes);
        exit(1);
    }
    madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

static int compare_doubles(const void *a, const void *b)
{
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

static double median(double *values, uint32_t n)
{
    qsort(values, n, sizeof(*values), compare_doubles);
    return n % 2 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

// ---- The pool: every thread, the caller among them, runs `work` between two barriers.

static struct {
    uint32_t threads;
    pthread_t ids[THREADS_MAX];
    pthread_barrier_t start, end;
    void (*work)(uint32_t thread); // NULL: leave
} pool;

// One CPU each, of those that we may use: a woken thread otherwise starts on its waker's, and may
// share it for longer than what is measured takes.
static void pin(uint32_t thread)
{
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 ||
        (uint32_t)CPU_COUNT(&allowed) != pool.threads)
        return;
    for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && thread-- == 0) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            sched_setaffinity(0, sizeof(one), &one);
            return;
        }
}

static void *pool_thread(void *argument)
{
    uint32_t thread = (uint32_t)(uintptr_t)argument;
    pin(thread);
    for (;;) {
        pthread_barrier_wait(&pool.start);
        if (pool.work == NULL)
            return NULL;
        pool.work(thread);
        pthread_barrier_wait(&pool.end);
    }
}

static void pool_open(uint32_t threads)
{
    pool.threads = threads;
    pthread_barrier_init(&pool.start, NULL, threads);
    pthread_barrier_init(&pool.end, NULL, threads);
    for (uint32_t i = 1; i < threads; i++)
        if (pthread_create(&pool.ids[i], NULL, pool_thread, (void *)(uintptr_t)i) != 0)
            abort();
    pin(0); // last: new threads inherit it
}

static double pool_run(void (*work)(uint32_t thread))
{
    pool.work = work;
    double begin = now_s();
    pthread_barrier_wait(&pool.start);
    work(0);
    pthread_barrier_wait(&pool.end);
    return now_s() - begin;
}

static void pool_close(void)
{
    pool.work = NULL;
    pthread_barrier_wait(&pool.start);
    for (uint32_t i = 1; i < pool.threads; i++)
        pthread_join(pool.ids[i], NULL);
}

// ---- Weights and operands.

static struct {
    const struct cpu_kernel *kernel;
    struct einsum_weight_format format;
    struct cpu_weight layers[LAYERS];
    void *memory[LAYERS]; // of the layers, each sized for the largest kind
    uint8_t *checkpoint;  // of the last layer: what the reference reads
    uint8_t *checkpoint_scales;
    uint8_t *activations;
    uint8_t *activation_scales;
    uint8_t *output;
    struct einsum_operand operand;
    uint32_t layer; // at work
    void *scratch[THREADS_MAX];
    struct cpu_task task;
    uint32_t items;
    atomic_uint next_item;
} state;

// Any E4M3 but NaN, or BF16 as trained weights have them.
static void random_elements(uint8_t *to, uint64_t n, enum einsum_weight_type type)
{
    for (uint64_t i = 0; i < n; i++) {
        uint64_t random = random_next() >> 20;
        if (type == EINSUM_WEIGHT_BF16) {
            uint16_t code = (uint16_t)((random & 0x80FF) + 0x3C00);
            memcpy(to + 2 * i, &code, 2);
        } else {
            to[i] = (uint8_t)((random & 0x7F) == 0x7F ? random & 0x80 : random);
        }
    }
}

static void random_scales(uint8_t *to, uint64_t n, enum einsum_scale_type type)
{
    for (uint64_t i = 0; i < n; i++) {
        float value = ldexpf(1 + (float)(random_next() >> 40) * 0x1p-24f,
                             (int)(random_next() >> 33 & 7) - 16);
        if (type == EINSUM_SCALE_FP32)
            memcpy(to + 4 * i, &value, 4);
        else
            to[i] = (uint8_t)(107 + (random_next() >> 33 & 7));
    }
}

static void make_weights(const struct weight_kind *kind)
{
    state.format = (struct einsum_weight_format){.groups = GROUPS,
                                                 .output_dim = OUTPUT_DIM,
                                                 .reduced_dim = REDUCED_DIM,
                                                 .weight_type = kind->type,
                                                 .scale_type = kind->scale_type,
                                                 .block_d = kind->block_d,
                                                 .block_r = kind->block_r};
    uint64_t elements = (uint64_t)GROUPS * OUTPUT_DIM * REDUCED_DIM;
    for (int i = 0; i < LAYERS; i++) {
        random_elements(state.checkpoint, elements, kind->type);
        cpu_weight_init(&state.layers[i], &state.format, state.memory[i]);
        cpu_relayout(&state.layers[i], state.checkpoint, 0, GROUPS * OUTPUT_DIM);
        uint32_t scale_bytes = einsum_scale_element_bytes(kind->scale_type);
        if (scale_bytes == 0)
            continue;
        random_scales(state.checkpoint_scales,
                      einsum_weight_scale_bytes(&state.format) / scale_bytes, kind->scale_type);
        cpu_relayout_scales(&state.layers[i], state.checkpoint_scales);
    }
}

// As the serving front-ends send them: group-major activations, scales with the token fastest.
static void make_operand(uint32_t tokens, const struct weight_kind *kind)
{
    bool fp32 = kind->scale_type == EINSUM_SCALE_FP32;
    state.operand = (struct einsum_operand){
        .tokens = tokens,
        .groups = GROUPS,
        .activation_layout = EINSUM_ACTIVATIONS_GTR,
        .scale_layout = EINSUM_SCALES_GKT,
        .scale_type = fp32 ? EINSUM_SCALE_FP32 : EINSUM_SCALE_UE8M0,
        .output_type = EINSUM_OUTPUT_BF16,
        .activations = state.activations,
        .scales = state.activation_scales,
        .output = state.output,
    };
    random_elements(state.activations, (uint64_t)tokens * GROUPS * REDUCED_DIM, EINSUM_WEIGHT_E4M3);
    random_scales(state.activation_scales,
                  einsum_align4(tokens) * GROUPS * (REDUCED_DIM / kind->block_r),
                  state.operand.scale_type);
}

// ---- What is timed.

static void einsum_work(uint32_t thread)
{
    for (;;) {
        uint32_t item = atomic_fetch_add(&state.next_item, 1);
        if (item >= state.items)
            return;
        cpu_task_run(state.kernel, &state.task, item, state.items, state.scratch[thread]);
    }
}

static double time_einsum(uint32_t layer)
{
    state.task = (struct cpu_task){&state.layers[layer], &state.operand, 1};
    state.items = cpu_task_items(&state.task, pool.threads);
    atomic_store(&state.next_item, 0);
    return pool_run(einsum_work);
}

static _Atomic uint64_t read_sink; // keeps the compiler from dropping the reads

// Each thread reads its share of one layer.
static void read_work(uint32_t thread)
{
    typedef uint64_t vector __attribute__((vector_size(32)));
    enum { AHEAD = 8, PREFETCH = 2048 / sizeof(vector) };
    uint64_t vectors = einsum_weight_bytes(&state.format) / sizeof(vector);
    const vector *at = state.memory[state.layer];
    uint64_t begin = vectors * thread / pool.threads / AHEAD * AHEAD;
    uint64_t end = vectors * (thread + 1) / pool.threads / AHEAD * AHEAD;
    vector sums[AHEAD] = {{0}};
    for (uint64_t i = begin; i < end; i += AHEAD) {
        // The fastest read is the yardstick: with prefetches, if they help the machine at all.
        for (int j = 0; j < AHEAD; j += 2)
            __builtin_prefetch(&at[i + PREFETCH + (unsigned)j]);
        for (int j = 0; j < AHEAD; j++)
            sums[j] ^= at[i + (unsigned)j];
    }
    for (int j = 1; j < AHEAD; j++)
        sums[0] ^= sums[j];
    atomic_fetch_xor(&read_sink, sums[0][0] ^ sums[0][1] ^ sums[0][2] ^ sums[0][3]);
}

static struct {
    float *a, *b, *c;
} sgemm;

static double time_sgemm(uint32_t tokens)
{
    double begin = now_s();
    for (int g = 0; g < GROUPS; g++)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)tokens, OUTPUT_DIM, REDUCED_DIM,
                    1, sgemm.a + (uint64_t)g * TOKENS_MAX * REDUCED_DIM, REDUCED_DIM,
                    sgemm.b + (uint64_t)g * OUTPUT_DIM * REDUCED_DIM, REDUCED_DIM, 0,
                    sgemm.c + (uint64_t)g * TOKENS_MAX * OUTPUT_DIM, OUTPUT_DIM);
    return now_s() - begin;
}

// ---- One case.

struct row {
    char name[96];
    double value, bar;
    bool ok;
    char note[96];
};

static struct row rows[ROWS_MAX];
static uint32_t rows_n;

static void add_row(const char *name, double value, double bar, const char *note)
{
    struct row *row = &rows[rows_n++];
    snprintf(row->name, sizeof(row->name), "%s", name);
    snprintf(row->note, sizeof(row->note), "%s", note);
    row->value = value;
    row->bar = bar;
    row->ok = value >= bar;
}

// The share of sampled outputs within tolerance; the last layer's checkpoint is still at hand.
static double check_numbers(void)
{
    uint64_t elements = (uint64_t)state.operand.tokens * GROUPS * OUTPUT_DIM;
    memset(state.output, 0xA5, elements * 2);
    time_einsum(LAYERS - 1);
    int good = 0;
    for (int i = 0; i < SAMPLES; i++) {
        uint64_t index = random_next() % elements;
        uint32_t d = (uint32_t)(index % OUTPUT_DIM);
        uint32_t g = (uint32_t)(index / OUTPUT_DIM % GROUPS);
        uint32_t t = (uint32_t)(index / OUTPUT_DIM / GROUPS);
        double magnitude;
        double exact =
            einsum_reference_one(&state.format, state.checkpoint, state.checkpoint_scales,
                                 &state.operand, t, g, d, &magnitude, NULL);
        uint16_t code;
        memcpy(&code, state.output + 2 * index, 2);
        uint32_t bits = (uint32_t)code << 16;
        float got;
        memcpy(&got, &bits, 4);
        good += fabs((double)got - exact) <=
                einsum_tolerance(EINSUM_OUTPUT_BF16, exact, magnitude, 0, REDUCED_DIM);
    }
    return (double)good / SAMPLES;
}

// Work per nanosecond of both sides in one round: GB/s or GFLOP/s.
static void run_round(const struct bench_case *bench, double *ours, double *theirs)
{
    double einsum_s = 0, other_s = 0, work = 0;
    if (bench->opponent == READ) {
        for (uint32_t n = 0; n < LAYERS; n++) {
            einsum_s += time_einsum(n);
            state.layer = (n + LAYERS / 2) % LAYERS; // long out of every cache
            other_s += pool_run(read_work);
            work += (double)einsum_weight_bytes(&state.format);
        }
    } else {
        // OpenBLAS's threads spin for some 25 ms after their work, on the cores that we measure.
        const struct timespec spin = {.tv_nsec = 40000000};
        nanosleep(&spin, NULL);
        for (uint32_t n = 0; n < 2; n++) {
            state.layer = (state.layer + 1) % LAYERS;
            einsum_s += time_einsum(state.layer);
            work += 2.0 * bench->tokens * GROUPS * OUTPUT_DIM * REDUCED_DIM;
        }
        for (uint32_t n = 0; n < 2; n++)
            other_s += time_sgemm(bench->tokens);
    }
    *ours = work / einsum_s * 1e-9;
    *theirs = work / other_s * 1e-9;
}

static void run_case(const struct bench_case *bench, uint32_t rounds)
{
    const struct weight_kind *kind = &kinds[bench->kind];
    char name[96], note[96];
    make_operand(bench->tokens, kind);
    snprintf(name, sizeof(name), "T=%u %s: numbers", bench->tokens, kind->name);
    add_row(name, check_numbers(), 1, "share of sampled outputs within tolerance");

    double ratios[ROUNDS_MAX], ours[ROUNDS_MAX], theirs[ROUNDS_MAX];
    for (uint32_t i = 0; i < rounds; i++) {
        run_round(bench, &ours[i], &theirs[i]);
        ratios[i] = ours[i] / theirs[i];
    }
    snprintf(name, sizeof(name), "T=%u %s / %s", bench->tokens, kind->name,
             bench->opponent == READ ? "read" : "sgemm");
    snprintf(note, sizeof(note), "%.1f of %.1f %s", median(ours, rounds), median(theirs, rounds),
             bench->opponent == READ ? "GB/s" : "GFLOP/s");
    add_row(name, median(ratios, rounds), bench->bar, note);
}

// ---- Start and report.

// Before any thread is pinned, as its threads inherit that.
static void start_openblas(uint32_t threads)
{
    enum { N = 512 };
    float *square = allocate(sizeof(float) * N * N), *product = allocate(sizeof(float) * N * N);
    memset(square, 0, sizeof(float) * N * N);
    openblas_set_num_threads((int)threads);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, N, N, N, 1, square, N, square, N, 0,
                product, N);
    free(square);
    free(product);
}

static void open_state(const char *kernel)
{
    uint64_t elements = (uint64_t)GROUPS * OUTPUT_DIM * REDUCED_DIM;
    uint64_t layer_bytes = 0;
    for (int i = 0; i < KINDS; i++) {
        struct einsum_weight_format format = {
            GROUPS,           OUTPUT_DIM,      REDUCED_DIM, kinds[i].type, kinds[i].scale_type,
            kinds[i].block_d, kinds[i].block_r};
        uint64_t bytes = cpu_weight_bytes(&format);
        layer_bytes = bytes > layer_bytes ? bytes : layer_bytes;
    }
    state.kernel = cpu_kernel_find(kernel);
    if (state.kernel == NULL) {
        fprintf(stderr, "cpu_engine: no kernel %s on this CPU\n", kernel);
        exit(1);
    }
    for (int i = 0; i < LAYERS; i++)
        state.memory[i] = allocate(layer_bytes);
    state.checkpoint = allocate(2 * elements);
    state.checkpoint_scales = allocate(4 * elements / 128);
    state.activations = allocate(TOKENS_MAX * GROUPS * REDUCED_DIM);
    state.activation_scales = allocate(4 * TOKENS_MAX * GROUPS * REDUCED_DIM / 32);
    state.output = allocate(2 * TOKENS_MAX * GROUPS * OUTPUT_DIM);
    for (uint32_t i = 0; i < pool.threads; i++)
        state.scratch[i] = allocate(cpu_scratch_bytes(REDUCED_DIM));

    sgemm.a = allocate((uint64_t)GROUPS * TOKENS_MAX * REDUCED_DIM * sizeof(float));
    sgemm.b = allocate(elements * sizeof(float));
    sgemm.c = allocate((uint64_t)GROUPS * TOKENS_MAX * OUTPUT_DIM * sizeof(float));
    for (uint64_t i = 0; i < (uint64_t)GROUPS * TOKENS_MAX * REDUCED_DIM; i++)
        sgemm.a[i] = (float)(random_next() >> 40) * 0x1p-24f - 0.5f;
    for (uint64_t i = 0; i < elements; i++)
        sgemm.b[i] = (float)(random_next() >> 40) * 0x1p-24f - 0.5f;
}

static bool report(void)
{
    bool ok = true;
    printf("%-44s %8s %6s\n", "case", "value", "bar");
    for (uint32_t i = 0; i < rows_n; i++) {
        char bar[16] = "-";
        if (rows[i].bar > 0)
            snprintf(bar, sizeof(bar), "%.2f", rows[i].bar);
        printf("%-44s %8.3f %6s  %s%s\n", rows[i].name, rows[i].value, bar,
               rows[i].ok ? "" : "BELOW THE BAR  ", rows[i].note);
        ok = ok && rows[i].ok;
    }
    printf("RESULT {\"bench\": \"cpu_engine\", \"kernel\": \"%s\", \"threads\": %u, \"rows\": [",
           cpu_kernel_name(state.kernel), pool.threads);
    for (uint32_t i = 0; i < rows_n; i++) {
        char bar[16] = "null";
        if (rows[i].bar > 0)
            snprintf(bar, sizeof(bar), "%.2f", rows[i].bar);
        printf("%s{\"case\": \"%s\", \"value\": %.4f, \"bar\": %s, \"ok\": %s}", i > 0 ? ", " : "",
               rows[i].name, rows[i].value, bar, rows[i].ok ? "true" : "false");
    }
    printf("], \"ok\": %s}\n", ok ? "true" : "false");
    return ok;
}

int main(int argc, char **argv)
{
    long threads = sysconf(_SC_NPROCESSORS_ONLN), rounds = 15, kinds_n = KINDS;
    const char *kernel = NULL;
    int option;
    while ((option = getopt(argc, argv, "t:r:k:f")) != -1) {
        if (option == 't')
            threads = strtol(optarg, NULL, 10); // 0 for what is no number
        else if (option == 'r')
            rounds = strtol(optarg, NULL, 10);
        else if (option == 'k')
            kernel = optarg;
        else if (option == 'f')
            kinds_n = 1;
        else
            threads = 0;
    }
    if (threads < 1 || threads > THREADS_MAX || rounds < 1 || rounds > ROUNDS_MAX) {
        fprintf(stderr, "usage: cpu_engine [-t threads] [-r rounds] [-k kernel] [-f]\n"
                        "  -f  the first kind of weights alone\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    start_openblas((uint32_t)threads);
    pool_open((uint32_t)threads);
    open_state(kernel);
    for (uint32_t kind = 0; kind < kinds_n; kind++) {
        make_weights(&kinds[kind]);
        for (uint32_t i = 0; i < CASES; i++)
            if (cases[i].kind == kind)
                run_case(&cases[i], (uint32_t)rounds);
    }
    bool ok = report();
    pool_close();
    return ok ? 0 : 1;
}
