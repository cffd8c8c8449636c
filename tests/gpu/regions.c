// Callers on the host of a daemon that computes on a GPU: whether what they share is right, and what
// each way costs. regions.sh starts the daemon for it.
//
//     regions check ENDPOINT              numbers, refusals and callers that die, by every way
//     regions bench ENDPOINT [SECONDS]    round trips and calls/s; one line of JSON last
//     regions victim ENDPOINT             of check: floods the daemon until it is killed
//     regions careless ENDPOINT           frees CUDA memory that the daemon still uses
//
// Ways: gRPC over a unix socket; the same with tensors in shared host memory, or in CUDA memory;
// the ring with either. What a unix socket brings is what `einsumctl check` compares with FP64; all
// others must bring the same bits, as long as a request has a batch to itself.
#include <cuda_runtime_api.h>

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/ctl.h"

enum way { WAY_UNIX, WAY_SHM, WAY_RING, WAY_SHM_CUDA, WAY_RING_CUDA, WAYS_N };
static const char *const way_names[] = {"unix", "shm", "ring", "shm + CUDA", "ring + CUDA"};

enum {
    TOKENS_MAX = 512,
    SLOTS = 16,
    GUARD_BYTES = 4096,
    ROUNDS_TOGETHER = 20,
    LATENCIES_MAX = 1 << 20,
};

#define CHECK(call)                                                                                \
    do {                                                                                           \
        cudaError_t error_ = (call);                                                               \
        if (error_ != cudaSuccess) {                                                               \
            fprintf(stderr, "regions: line %d: %s\n", __LINE__, cudaGetErrorString(error_));       \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static const char *endpoint, *self;
static struct einsum_client_weights weights;
static int failures;

static void expect(bool right, const char *what)
{
    if (!right) {
        printf("FAILED: %s\n", what);
        failures++;
    }
}

static uint64_t now_ns_(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t round_up(uint64_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

// ---- a caller: a client, and room for the tensors of SLOTS requests

struct caller {
    enum way way;
    struct einsum_client *client;
    uint8_t *memory; // on the device if the way is CUDA's
    uint64_t slot_bytes;
    uint32_t slots;
    cudaStream_t stream;
};

static bool on_device(enum way way)
{
    return way >= WAY_SHM_CUDA;
}

static struct einsum_client *connect_by(enum way way, uint64_t bytes)
{
    struct einsum_client_options options;
    struct einsum_client_error error = {0};
    struct einsum_client *client = NULL;
    einsum_client_options_init(&options);
    options.attempts_max = 1;
    if (way != WAY_UNIX) {
        options.shared_memory = "auto";
        options.shared_memory_bytes = on_device(way) ? 8 << 20 : bytes + (8 << 20);
        options.transport = way == WAY_SHM || way == WAY_SHM_CUDA ? EINSUM_CLIENT_TRANSPORT_SHARED
                                                                  : EINSUM_CLIENT_TRANSPORT_RING;
    }
    if (einsum_client_create(endpoint, &options, &client, &error) != EINSUM_CLIENT_OK) {
        printf("FAILED: %s: %s\n", way_names[way], error.text);
        exit(1);
    }
    return client;
}

static enum einsum_client_status import(struct einsum_client *client, void *memory, uint64_t bytes,
                                        struct einsum_client_error *error)
{
    cudaIpcMemHandle_t handle;
    CHECK(cudaIpcGetMemHandle(&handle, memory));
    return einsum_client_memory_import_cuda(client, memory, bytes, &handle, error);
}

static struct caller caller_open(enum way way, uint32_t tokens_max, uint32_t slots)
{
    const struct einsum_client_weight *weight = &weights.items[0];
    uint64_t token = (uint64_t)weight->groups * (weight->reduced_dim + weight->reduced_dim / 8 +
                                                 4 * (uint64_t)weight->output_dim);
    struct caller caller = {
        .way = way, .slots = slots, .slot_bytes = round_up((tokens_max + 4) * token) + GUARD_BYTES};
    uint64_t bytes = caller.slot_bytes * slots;
    caller.client = connect_by(way, bytes);
    if (on_device(way)) {
        struct einsum_client_error error = {0};
        CHECK(cudaMalloc((void **)&caller.memory, bytes));
        if (import(caller.client, caller.memory, bytes, &error) != EINSUM_CLIENT_OK) {
            printf("FAILED: importing %" PRIu64 " bytes: %s: %s\n", bytes, error.field, error.text);
            exit(1);
        }
        CHECK(cudaStreamCreateWithFlags(&caller.stream, cudaStreamNonBlocking));
    } else if (way == WAY_UNIX) {
        caller.memory = aligned_alloc(64, bytes);
    } else {
        caller.memory = einsum_client_memory_alloc(caller.client, bytes);
    }
    if (!caller.memory) {
        printf("FAILED: no memory for %s\n", way_names[way]);
        exit(1);
    }
    return caller;
}

static void caller_close(struct caller *caller)
{
    if (on_device(caller->way)) {
        einsum_client_memory_forget_cuda(caller->client, caller->memory);
        CHECK(cudaFree(caller->memory));
        CHECK(cudaStreamDestroy(caller->stream));
    } else if (caller->way == WAY_UNIX) {
        free(caller->memory);
    } else {
        einsum_client_memory_free(caller->client, caller->memory);
    }
    einsum_client_destroy(caller->client);
}

static void move(const struct caller *caller, void *to, const void *from, uint64_t bytes)
{
    if (!on_device(caller->way)) {
        if (!from)
            abort();
        memcpy(to, from, bytes);
        return;
    }
    CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, caller->stream));
    CHECK(cudaStreamSynchronize(caller->stream)); // what is submitted next finds it there
}

// Puts a request's tensors into a slot, and its output behind them, before a guard.
static void put(const struct caller *caller, uint32_t slot, struct einsum_client_request *request)
{
    uint8_t *at = caller->memory + slot * caller->slot_bytes;
    move(caller, at, request->activations, request->activations_bytes);
    request->activations = at;
    at += round_up(request->activations_bytes);
    move(caller, at, request->scales, request->scales_bytes);
    request->scales = at;
    at += round_up(request->scales_bytes);
    request->output = at;
    static uint8_t guard[GUARD_BYTES];
    memset(guard, 0xA5, sizeof guard);
    move(caller, at, guard, sizeof guard);
    move(caller, at + request->output_bytes, guard, sizeof guard);
}

static void expect_guard(const struct caller *caller, const struct einsum_client_request *request)
{
    static uint8_t guard[GUARD_BYTES];
    move(caller, guard, (const uint8_t *)request->output + request->output_bytes, sizeof guard);
    for (size_t i = 0; i < sizeof guard; i++)
        if (guard[i] != 0xA5) {
            expect(false, "bytes behind an output were written");
            return;
        }
}

// ---- requests

static const struct {
    enum einsum_client_activation_layout activation_layout;
    enum einsum_client_scale_layout scale_layout;
    enum einsum_client_scale_type scale_type;
    enum einsum_client_output_type output_type;
} kinds[] = {
    {EINSUM_CLIENT_ACTIVATIONS_TGR, EINSUM_CLIENT_SCALES_TGK, EINSUM_CLIENT_SCALE_UE8M0,
     EINSUM_CLIENT_OUTPUT_BF16},
    {EINSUM_CLIENT_ACTIVATIONS_GTR, EINSUM_CLIENT_SCALES_GKT, EINSUM_CLIENT_SCALE_FP32,
     EINSUM_CLIENT_OUTPUT_FP32},
    {EINSUM_CLIENT_ACTIVATIONS_GTR, EINSUM_CLIENT_SCALES_GKT, EINSUM_CLIENT_SCALE_UE8M0,
     EINSUM_CLIENT_OUTPUT_BF16},
    {EINSUM_CLIENT_ACTIVATIONS_TGR, EINSUM_CLIENT_SCALES_TGK, EINSUM_CLIENT_SCALE_FP32,
     EINSUM_CLIENT_OUTPUT_BF16},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

struct question {
    struct einsum_client_request request;
    struct ctl_inputs inputs;
    uint8_t *answer; // by a unix socket
};

static struct question ask(size_t weight, uint32_t kind, uint32_t tokens, uint64_t seed)
{
    const struct einsum_client_weight *of = &weights.items[weight % weights.items_n];
    struct question question = {0};
    if (!ctl_random_inputs(of, tokens, kinds[kind].scale_layout, kinds[kind].scale_type, seed,
                           &question.inputs))
        exit(1);
    uint64_t element = kinds[kind].output_type == EINSUM_CLIENT_OUTPUT_FP32 ? 4 : 2;
    question.request = (struct einsum_client_request){
        .weight = of->name,
        .recipe = of->recipes[0],
        .activation_layout = kinds[kind].activation_layout,
        .scale_layout = kinds[kind].scale_layout,
        .scale_type = kinds[kind].scale_type,
        .output_type = kinds[kind].output_type,
        .tokens = tokens,
        .output_bytes = element * tokens * of->groups * of->output_dim,
    };
    ctl_inputs_lend(&question.inputs, &question.request);
    question.answer = malloc(question.request.output_bytes);
    question.request.output = question.answer;
    return question;
}

static void question_free(struct question *question)
{
    ctl_inputs_deinit(&question->inputs);
    free(question->answer);
}

static void call(struct einsum_client *client, const struct einsum_client_request *request,
                 const char *what)
{
    struct einsum_client_response response;
    struct einsum_client_error error = {0};
    if (einsum_client_einsum(client, request, &response, &error) != EINSUM_CLIENT_OK) {
        printf("FAILED: %s, %u tokens: %s %s: %s\n", what, request->tokens,
               einsum_client_status_name(error.status), error.field, error.text);
        failures++;
    }
}

// What lies in a slot's output against the answer: the same bits, or, of batches that others share,
// the same but for the rounding of sums in another order.
static void compare(const struct caller *caller, const struct question *question,
                    const struct einsum_client_request *asked, bool same_bits)
{
    uint64_t bytes = asked->output_bytes;
    uint8_t *got = malloc(bytes);
    move(caller, got, asked->output, bytes);
    double off = 0, all = 0;
    for (uint64_t i = 0; i < bytes; i += 4) { // FP32, or two BF16
        uint32_t a, b;
        memcpy(&a, got + i, 4);
        memcpy(&b, question->answer + i, 4);
        for (uint32_t half = 0; half < 2; half++) {
            bool fp32 = asked->output_type == EINSUM_CLIENT_OUTPUT_FP32;
            uint32_t x = fp32 ? a : half ? a & 0xFFFF0000 : a << 16;
            uint32_t y = fp32 ? b : half ? b & 0xFFFF0000 : b << 16;
            float u, v;
            memcpy(&u, &x, 4);
            memcpy(&v, &y, 4);
            off += ((double)u - (double)v) * ((double)u - (double)v);
            all += (double)v * (double)v;
        }
    }
    bool same = memcmp(got, question->answer, bytes) == 0;
    double error = sqrt(off / all);
    if (same_bits ? !same : !(error < 5e-3)) {
        printf(
            "FAILED: %s, %u tokens, kind %u: differs from the unix socket's by %.3g of its norm\n",
            way_names[caller->way], asked->tokens, asked->scale_type, error);
        failures++;
    }
    free(got);
    expect_guard(caller, asked);
}

// ---- check

// `quiet`: nobody else is under way, so that each has a batch to itself.
static void check_alone(struct caller *callers, bool quiet)
{
    static const uint32_t tokens[] = {1, 3, 16, 17, 32, 64, 65, 129, 256, 300, 512};
    uint32_t cases = 0;
    for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
        for (uint32_t kind = 0; kind < KINDS; kind++, cases++) {
            struct question question = ask(cases, kind, tokens[t], 1 + cases);
            call(callers[WAY_UNIX].client, &question.request, "unix");
            for (enum way way = WAY_SHM; way < WAYS_N; way++) {
                struct einsum_client_request request = question.request;
                ctl_inputs_lend(&question.inputs, &request);
                put(&callers[way], cases % SLOTS, &request);
                call(callers[way].client, &request, way_names[way]);
                compare(&callers[way], &question, &request, quiet);
            }
            question_free(&question);
        }
    printf("alone: %u cases by %d ways\n", cases, WAYS_N - 1);
}

struct flight {
    pthread_mutex_t lock;
    pthread_cond_t ended;
    uint32_t left, failed;
};

static void on_response(void *context, const struct einsum_client_response *response,
                        const struct einsum_client_error *error)
{
    struct flight *flight = context;
    if (!response)
        printf("FAILED: %s %s: %s\n", einsum_client_status_name(error->status), error->field,
               error->text);
    pthread_mutex_lock(&flight->lock);
    flight->failed += response == NULL;
    if (--flight->left == 0)
        pthread_cond_signal(&flight->ended);
    pthread_mutex_unlock(&flight->lock);
}

// Requests of all ways and sizes at once, so that they share batches.
static void check_together(struct caller *callers)
{
    enum { EACH = 12, ALL = (WAYS_N - 1) * EACH };
    static const uint32_t tokens[] = {1, 1, 2, 5, 1, 40, 8, 130, 3, 64, 1, 20};
    uint64_t requests = 0;
    for (uint32_t round = 0; round < ROUNDS_TOGETHER; round++) {
        struct question questions[ALL];
        struct einsum_client_request asked[ALL];
        struct flight flight = {
            .lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER, .left = ALL};
        for (uint32_t i = 0; i < ALL; i++) {
            questions[i] = ask(round + i / 7, (i + round) % KINDS, tokens[i % EACH], 1000 + i);
            call(callers[WAY_UNIX].client, &questions[i].request, "unix");
            asked[i] = questions[i].request;
            ctl_inputs_lend(&questions[i].inputs, &asked[i]);
            put(&callers[WAY_SHM + i / EACH], i % EACH, &asked[i]);
        }
        for (uint32_t i = 0; i < ALL; i++) {
            uint32_t shuffled = i * 7 % ALL; // 7 and 48 share no divisor
            struct einsum_client_error error = {0};
            if (einsum_client_start(callers[WAY_SHM + shuffled / EACH].client, &asked[shuffled],
                                    on_response, &flight, NULL, &error) != EINSUM_CLIENT_OK) {
                printf("FAILED: %s\n", error.text);
                exit(1);
            }
        }
        pthread_mutex_lock(&flight.lock);
        while (flight.left > 0)
            pthread_cond_wait(&flight.ended, &flight.lock);
        pthread_mutex_unlock(&flight.lock);
        failures += (int)flight.failed;
        for (uint32_t i = 0; i < ALL; i++) {
            compare(&callers[WAY_SHM + i / EACH], &questions[i], &asked[i], false);
            question_free(&questions[i]);
        }
        requests += ALL;
    }
    printf("together: %" PRIu64 " requests, %d ways at once\n", requests, WAYS_N - 1);
}

static void expect_refused(enum einsum_client_status status, enum einsum_client_status wanted,
                           const struct einsum_client_error *error, const char *what)
{
    printf("  %s: %s %s: %s\n", what, einsum_client_status_name(status), error->field, error->text);
    expect(status == wanted, what);
}

static void check_refusals(struct caller *callers)
{
    struct einsum_client *client = callers[WAY_RING_CUDA].client;
    struct einsum_client_error error = {0};
    struct einsum_client_response response;
    uint8_t garbage[64];
    memset(garbage, 0x5A, sizeof garbage);
    uint8_t *small;
    CHECK(cudaMalloc((void **)&small, 8 << 20));
    printf("refused:\n");
    expect_refused(einsum_client_memory_import_cuda(client, small, 4096, garbage, &error),
                   EINSUM_CLIENT_FAILED_PRECONDITION, &error, "a handle of garbage");
    memset(garbage, 0, sizeof garbage);
    expect_refused(einsum_client_memory_import_cuda(client, small, 4096, garbage, &error),
                   EINSUM_CLIENT_FAILED_PRECONDITION, &error, "a handle of zeros");
    expect_refused(import(client, small, (8 << 20) + 1, &error), EINSUM_CLIENT_INVALID_ARGUMENT,
                   &error, "a byte more than there is");
    expect_refused(import(client, callers[WAY_RING_CUDA].memory, 4096, &error),
                   EINSUM_CLIENT_ALREADY_EXISTS, &error, "memory that is known");
    expect(import(client, small, 8 << 20, &error) == EINSUM_CLIENT_OK, "all of it is taken");

    struct question question = ask(0, 0, 4, 7);
    struct einsum_client_request request = question.request;
    put(&callers[WAY_RING_CUDA], 0, &request);
    request.output = question.answer;
    expect_refused(einsum_client_einsum(client, &request, &response, &error),
                   EINSUM_CLIENT_INVALID_ARGUMENT, &error, "an output elsewhere");
    request.output = small + (8 << 20) - 64;
    request.activations = small;
    request.scales = small + (1 << 20);
    expect_refused(einsum_client_einsum(client, &request, &response, &error),
                   EINSUM_CLIENT_INVALID_ARGUMENT, &error, "an output past the end");
    question_free(&question);
    // Gone with FORGET: it may be had again, and freed.
    einsum_client_memory_forget_cuda(client, small);
    expect(import(client, small, 1 << 20, &error) == EINSUM_CLIENT_OK, "known again");
    einsum_client_memory_forget_cuda(client, small);
    CHECK(cudaFree(small));
}

// A caller of every way dies with requests under way; whoever comes next is answered right.
static void check_victims(struct caller *callers)
{
    for (int i = 0; i < 3; i++) {
        pid_t child = fork();
        if (child == 0) {
            execl(self, self, "victim", endpoint, (char *)NULL);
            _exit(127);
        }
        usleep(2500000 + 300000 * (useconds_t)i);
        kill(child, SIGKILL);
        int status;
        waitpid(child, &status, 0);
        expect(WIFSIGNALED(status), "the victim was still at work when it was killed");
        check_alone(callers, false);
    }
    printf("victims: 3 killed\n");
}

static int check(void)
{
    struct caller callers[WAYS_N];
    for (enum way way = 0; way < WAYS_N; way++)
        callers[way] = caller_open(way, TOKENS_MAX, SLOTS);
    check_alone(callers, true);
    check_together(callers);
    check_refusals(callers);
    check_victims(callers);
    for (enum way way = 0; way < WAYS_N; way++)
        caller_close(&callers[way]);
    printf("regions check: %d failed\n", failures);
    return failures != 0;
}

// ---- callers that misbehave

static void flood_on(void *context, const struct einsum_client_response *response,
                     const struct einsum_client_error *error)
{
    (void)response, (void)error;
    atomic_fetch_sub((_Atomic uint32_t *)context, 1);
}

static int victim(void)
{
    static _Atomic uint32_t flying;
    struct caller shm = caller_open(WAY_RING, 64, SLOTS);
    struct caller cuda = caller_open(WAY_RING_CUDA, 64, SLOTS);
    struct question question = ask(0, 0, 64, 3);
    for (uint32_t i = 0;; i++) {
        struct caller *caller = i % 2 ? &shm : &cuda;
        struct einsum_client_request request = question.request;
        ctl_inputs_lend(&question.inputs, &request);
        put(caller, i / 2 % SLOTS, &request);
        while (atomic_load(&flying) >= SLOTS)
            usleep(10);
        atomic_fetch_add(&flying, 1);
        if (einsum_client_start(caller->client, &request, flood_on, &flying, NULL, NULL) !=
            EINSUM_CLIENT_OK)
            return 1;
    }
}

// CUDA says that this is undefined. Told here: what the daemon makes of it, and whether others are
// still answered right or told that the device is lost.
static int careless(void)
{
    struct caller other = caller_open(WAY_SHM, TOKENS_MAX, 2);
    struct caller caller = caller_open(WAY_RING_CUDA, TOKENS_MAX, 2);
    struct question question = ask(0, 0, 64, 3);
    struct einsum_client *plain = connect_by(WAY_UNIX, 0);
    call(plain, &question.request, "unix");
    struct einsum_client_request request = question.request;
    ctl_inputs_lend(&question.inputs, &request);
    put(&caller, 0, &request);
    CHECK(cudaFree(caller.memory));
    void *filler;
    CHECK(cudaMalloc(&filler, caller.slot_bytes * caller.slots)); // perhaps the same pages
    CHECK(cudaMemset(filler, 0, caller.slot_bytes * caller.slots));
    CHECK(cudaDeviceSynchronize());
    struct einsum_client_response response;
    struct einsum_client_error error = {0};
    enum einsum_client_status status =
        einsum_client_einsum(caller.client, &request, &response, &error);
    printf("careless: after cudaFree: %s %s\n", einsum_client_status_name(status), error.text);
    request = question.request;
    ctl_inputs_lend(&question.inputs, &request);
    put(&other, 0, &request);
    status = einsum_client_einsum(other.client, &request, &response, &error);
    printf("careless: another caller: %s %s\n", einsum_client_status_name(status), error.text);
    if (status == EINSUM_CLIENT_OK)
        compare(&other, &question, &request, true);
    else
        expect(status == EINSUM_CLIENT_UNAVAILABLE,
               "another caller is told that the device is lost");
    return failures != 0;
}

// ---- bench

// Where the caller's tensors are, and how a request gets them to the daemon and back.
enum origin {
    ORIGIN_HOST,   // in place already
    ORIGIN_DEVICE, // made there by the caller's stream, and needed there again
};

struct load {
    enum way way;
    enum origin origin;
    uint32_t tokens, in_flight;
    uint64_t ends_ns, calls;
    uint64_t *latencies; // of LATENCIES_MAX
    struct caller caller;
    uint8_t *source, *sink; // on the device, for ORIGIN_DEVICE; activations, then scales
    struct question question;
};

struct lane {
    struct load *load;
    uint32_t index;
    cudaStream_t stream;
    struct einsum_client_request request;
};

// Kernels of the caller's would do this; copies take their place. All of them end before the request.
static void produce(const struct lane *lane)
{
    const struct load *load = lane->load;
    if (load->origin == ORIGIN_HOST)
        return;
    const struct einsum_client_request *to = &lane->request;
    CHECK(cudaMemcpyAsync((void *)(uintptr_t)to->activations, load->source, to->activations_bytes,
                          cudaMemcpyDefault, lane->stream));
    CHECK(cudaMemcpyAsync((void *)(uintptr_t)to->scales, load->source + to->activations_bytes,
                          to->scales_bytes, cudaMemcpyDefault, lane->stream));
    CHECK(cudaStreamSynchronize(lane->stream));
}

static void consume(const struct lane *lane)
{
    const struct load *load = lane->load;
    if (load->origin == ORIGIN_HOST)
        return;
    CHECK(cudaMemcpyAsync(load->sink + lane->index * lane->request.output_bytes,
                          lane->request.output, lane->request.output_bytes, cudaMemcpyDefault,
                          lane->stream));
    CHECK(cudaStreamSynchronize(lane->stream));
}

static void *run_lane(void *argument)
{
    struct lane *lane = argument;
    struct load *load = lane->load;
    uint64_t at = lane->index;
    for (uint64_t begun = now_ns_(); begun < load->ends_ns; begun = now_ns_()) {
        lane->request.weight = weights.items[at++ % weights.items_n].name;
        produce(lane);
        call(load->caller.client, &lane->request, way_names[load->way]);
        consume(lane);
        uint64_t i = __atomic_fetch_add(&load->calls, 1, __ATOMIC_RELAXED);
        if (i < LATENCIES_MAX)
            load->latencies[i] = now_ns_() - begun;
        if (failures > 0)
            break;
    }
    return NULL;
}

static void run_lanes(struct load *load, double seconds)
{
    pthread_t threads[SLOTS];
    struct lane lanes[SLOTS];
    if (load->in_flight == 0 || load->in_flight > SLOTS)
        abort();
    load->calls = 0;
    load->ends_ns = now_ns_() + (uint64_t)(seconds * 1e9);
    for (uint32_t i = 0; i < load->in_flight; i++) {
        lanes[i] = (struct lane){.load = load, .index = i, .request = load->question.request};
        ctl_inputs_lend(&load->question.inputs, &lanes[i].request);
        put(&load->caller, i, &lanes[i].request);
        CHECK(cudaStreamCreateWithFlags(&lanes[i].stream, cudaStreamNonBlocking));
    }
    for (uint32_t i = 1; i < load->in_flight; i++)
        pthread_create(&threads[i], NULL, run_lane, &lanes[i]);
    run_lane(&lanes[0]);
    for (uint32_t i = 1; i < load->in_flight; i++)
        pthread_join(threads[i], NULL);
    for (uint32_t i = 0; i < load->in_flight; i++)
        CHECK(cudaStreamDestroy(lanes[i].stream));
}

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

// What is in host memory is pinned for the caller's own copies, as far as whole pages go.
static void *pin(const struct caller *caller, uint64_t bytes)
{
    uintptr_t begin = ((uintptr_t)caller->memory + 4095) / 4096 * 4096;
    uintptr_t end = ((uintptr_t)caller->memory + bytes) / 4096 * 4096;
    if (cudaHostRegister((void *)begin, end - begin, cudaHostRegisterDefault) == cudaSuccess)
        return (void *)begin;
    cudaGetLastError();
    return NULL;
}

struct measured {
    double p50_us, p99_us, calls_s;
};

static struct measured measure(enum way way, enum origin origin, uint32_t tokens,
                               uint32_t in_flight, double seconds)
{
    static uint64_t latencies[LATENCIES_MAX];
    struct load load = {.way = way,
                        .origin = origin,
                        .tokens = tokens,
                        .in_flight = in_flight,
                        .latencies = latencies,
                        .caller = caller_open(way, tokens, in_flight),
                        .question = ask(0, 0, tokens, 5)};
    void *pinned = NULL;
    if (origin == ORIGIN_DEVICE) {
        const struct einsum_client_request *request = &load.question.request;
        CHECK(
            cudaMalloc((void **)&load.source, request->activations_bytes + request->scales_bytes));
        CHECK(cudaMemcpy(load.source, request->activations, request->activations_bytes,
                         cudaMemcpyDefault));
        CHECK(cudaMemcpy(load.source + request->activations_bytes, request->scales,
                         request->scales_bytes, cudaMemcpyDefault));
        CHECK(cudaMalloc((void **)&load.sink, request->output_bytes * in_flight));
        if (!on_device(way))
            pinned = pin(&load.caller, load.caller.slot_bytes * in_flight);
    }
    run_lanes(&load, seconds / 5);
    run_lanes(&load, seconds);
    uint64_t n = load.calls < LATENCIES_MAX ? load.calls : LATENCIES_MAX;
    qsort(latencies, n, sizeof *latencies, ascending);
    uint64_t p50 = n / 2, p99 = n * 99 / 100;
    struct measured measured = {.p50_us = n ? (double)latencies[p50] / 1e3 : 0,
                                .p99_us = n ? (double)latencies[p99] / 1e3 : 0,
                                .calls_s = (double)load.calls / seconds};
    if (pinned)
        cudaHostUnregister(pinned);
    cudaFree(load.source);
    cudaFree(load.sink);
    caller_close(&load.caller);
    question_free(&load.question);
    return measured;
}

static const struct {
    enum way way;
    enum origin origin;
    const char *name;
} benched[] = {
    {WAY_UNIX, ORIGIN_HOST, "unix"},
    {WAY_SHM, ORIGIN_HOST, "shm"},
    {WAY_RING, ORIGIN_HOST, "ring"},
    {WAY_SHM_CUDA, ORIGIN_HOST, "shm + CUDA"},
    {WAY_RING_CUDA, ORIGIN_HOST, "ring + CUDA"},
    {WAY_UNIX, ORIGIN_DEVICE, "unix, tensors made on the GPU"},
    {WAY_RING, ORIGIN_DEVICE, "ring, tensors made on the GPU"},
    {WAY_RING_CUDA, ORIGIN_DEVICE, "ring + CUDA, tensors made on the GPU"},
};
enum { BENCHED = sizeof benched / sizeof *benched, ROUNDS = 3 };

static int by_p50(const void *a, const void *b)
{
    double x = ((const struct measured *)a)->p50_us, y = ((const struct measured *)b)->p50_us;
    return x < y ? -1 : x > y;
}

static int bench(double seconds)
{
    static const struct {
        uint32_t tokens, in_flight;
    } loads[] = {{1, 1}, {32, 1}, {256, 1}, {1, 8}, {32, 8}, {256, 8}};
    enum { LOADS = sizeof loads / sizeof *loads };
    static struct measured all[LOADS][BENCHED][ROUNDS];
    for (int round = 0; round < ROUNDS; round++)
        for (int l = 0; l < LOADS; l++)
            for (int b = 0; b < BENCHED; b++)
                all[l][b][round] = measure(benched[b].way, benched[b].origin, loads[l].tokens,
                                           loads[l].in_flight, seconds);
    printf("| way | tokens | in flight | p50 us | p99 us | calls/s |\n"
           "| --- | --- | --- | --- | --- | --- |\n");
    for (int l = 0; l < LOADS; l++)
        for (int b = 0; b < BENCHED; b++) {
            qsort(all[l][b], ROUNDS, sizeof all[l][b][0], by_p50);
            const struct measured *median = &all[l][b][ROUNDS / 2];
            printf("| %s | %u | %u | %.1f | %.1f | %.0f |\n", benched[b].name, loads[l].tokens,
                   loads[l].in_flight, median->p50_us, median->p99_us, median->calls_s);
        }
    printf("RESULT {\"bench\": \"regions\", \"failed\": %d, \"cases\": [", failures);
    for (int l = 0; l < LOADS; l++)
        for (int b = 0; b < BENCHED; b++) {
            const struct measured *median = &all[l][b][ROUNDS / 2];
            printf("%s{\"way\": \"%s\", \"tokens\": %u, \"in_flight\": %u, \"p50_us\": %.2f, "
                   "\"p99_us\": %.2f, \"calls_s\": %.1f}",
                   l + b ? ", " : "", benched[b].name, loads[l].tokens, loads[l].in_flight,
                   median->p50_us, median->p99_us, median->calls_s);
        }
    printf("]}\n");
    return failures != 0;
}

int main(int n, char **arguments)
{
    self = arguments[0];
    const char *mode = n > 1 ? arguments[1] : "";
    if (n < 3) {
        fprintf(stderr, "usage: %s check|bench|victim|careless ENDPOINT [SECONDS]\n", self);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    endpoint = arguments[2];
    struct einsum_client *client = connect_by(WAY_UNIX, 0);
    struct einsum_client_error error = {0};
    if (einsum_client_list_weights(client, &weights, &error) != EINSUM_CLIENT_OK ||
        weights.items_n == 0) {
        fprintf(stderr, "regions: %s\n", error.text);
        return 1;
    }
    if (strcmp(mode, "victim") == 0)
        return victim();
    if (strcmp(mode, "careless") == 0)
        return careless();
    if (strcmp(mode, "bench") == 0)
        return bench(n > 3 ? strtod(arguments[3], NULL) : 0.5);
    return check();
}
