// See bench.h. Who touches what:
//
//     slot     one request in flight: the client's thread from its start to its end, then whoever
//              takes it off the free or the paused list, under the lock
//     result   under the lock
//     inputs   made before the start, only read afterwards; many requests borrow the same ones

#include "bench.h"

#include "../server/base.h"
#include "ctl.h"
#include "ctl_attention.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

enum { VARIANTS = 8, TICK_NS = 100 * 1000 * 1000, PAUSE_NS = 10 * 1000 * 1000 };

// ---- histogram ----------------------------------------------------------------------------------

static size_t bucket_of(uint64_t value)
{
    if (value < 1u << HISTOGRAM_SUB_BITS)
        return (size_t)value;
    unsigned exponent = 63u - (unsigned)__builtin_clzll(value); // at least SUB_BITS
    unsigned shift = exponent - HISTOGRAM_SUB_BITS;
    size_t sub = (size_t)(value >> shift) & ((1u << HISTOGRAM_SUB_BITS) - 1);
    return ((size_t)(shift + 1) << HISTOGRAM_SUB_BITS) + sub;
}

static uint64_t bucket_end(size_t bucket)
{
    if (bucket < 1u << HISTOGRAM_SUB_BITS)
        return bucket;
    unsigned shift = (unsigned)(bucket >> HISTOGRAM_SUB_BITS) - 1;
    uint64_t sub = bucket & ((1u << HISTOGRAM_SUB_BITS) - 1);
    uint64_t start = ((1ull << HISTOGRAM_SUB_BITS) + sub) << shift;
    return start + ((1ull << shift) - 1);
}

void bench_histogram_add(struct bench_histogram *histogram, uint64_t value)
{
    histogram->counts[bucket_of(value)]++;
    histogram->total++;
    histogram->sum += value;
    if (value > histogram->max)
        histogram->max = value;
}

uint64_t bench_histogram_at(const struct bench_histogram *histogram, double share)
{
    uint64_t wanted = (uint64_t)ceil(share * (double)histogram->total);
    wanted = wanted == 0 ? 1 : wanted;
    uint64_t seen = 0;
    for (size_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
        seen += histogram->counts[i];
        if (seen >= wanted)
            return bucket_end(i) < histogram->max ? bucket_end(i) : histogram->max;
    }
    return histogram->max;
}

// ---- what is sent -------------------------------------------------------------------------------

// All requests that may be sent: for each weight, token count and variant of layouts.
struct inputs {
    struct einsum_client_request request; // without output
    struct ctl_inputs tensors;            // owned; shared by weights of one shape
    bool shares;                          // an earlier one's tensors
};

struct slot {
    struct bench *bench;
    struct slot *next;
    struct einsum_client_stream *stream; // NULL: unary
    uint64_t due_ns;                     // when it was meant to start
    uint64_t pause_ns;                   // until when it is paused
    const struct inputs *sent;
    void *output, *shared; // the same if the output lies in shared memory, else NULL
};

struct bench {
    const struct bench_options *options;
    struct inputs *inputs;
    size_t inputs_n;
    struct slot *slots;
    struct einsum_client_stream **streams;

    pthread_mutex_t lock; // guards what follows
    pthread_cond_t changed;
    struct slot *free_slots, *paused;
    uint64_t turn; // which of `inputs` is next
    uint32_t in_flight;
    bool stopping;
    uint64_t measure_ns, measure_end_ns; // when measuring starts and ends
    struct bench_result *result;
};

static bool same_shape(const struct einsum_client_weight *a, const struct einsum_client_weight *b)
{
    return a->groups == b->groups && a->reduced_dim == b->reduced_dim && a->block_r == b->block_r &&
           a->rope.positions_max == b->rope.positions_max;
}

static struct einsum_client_request request_of(const struct bench_options *options,
                                               const struct einsum_client_weight *weight,
                                               uint32_t tokens, unsigned variant)
{
    bool packs = weight->block_r && weight->reduced_dim / weight->block_r % 4 == 0;
    struct einsum_client_request request = {
        .operation = options->attention ? EINSUM_CLIENT_OUTPUT_PROJECT : EINSUM_CLIENT_EINSUM,
        .weight = weight->name,
        .recipe = weight->recipes_n ? weight->recipes[0] : EINSUM_CLIENT_RECIPE_1_128_128,
        .activation_layout = options->activation_layout,
        .scale_layout = options->scale_layout,
        .scale_type = options->scale_type,
        .output_type = options->output_type,
        .tokens = tokens,
        .digest_only = options->digest_only,
        .kernel = options->kernel,
        .priority = options->priority,
    };
    if (!request.activation_layout)
        request.activation_layout = (enum einsum_client_activation_layout)(1 + (variant & 1));
    if (!request.scale_layout)
        request.scale_layout = (enum einsum_client_scale_layout)(1 + (variant >> 1 & 1));
    if (!request.scale_type)
        request.scale_type = (enum einsum_client_scale_type)(packs ? 1 + (variant >> 2 & 1) : 1);
    if (!request.output_type)
        request.output_type = (enum einsum_client_output_type)(1 + (variant * 5 >> 2 & 1));
    return request;
}

// Variants of so many tokens share their bytes, where layouts let them: eight times as many would take
// seconds to make, and are beyond any cache either way.
enum { VARIANTS_SHARE_TOKENS_MIN = 1024 };

static bool same_bytes(const struct einsum_client_request *a, const struct einsum_client_request *b)
{
    return a->tokens == b->tokens && a->tokens >= VARIANTS_SHARE_TOKENS_MIN &&
           a->scale_layout == b->scale_layout && a->scale_type == b->scale_type;
}

// The tensors of an earlier weight of the same shape at the same turn, or of an earlier variant; NULL
// if there are none.
static const struct inputs *shared_inputs(const struct bench *bench, size_t weight, size_t rest)
{
    const struct bench_options *options = bench->options;
    size_t stride = options->tokens_n * VARIANTS;
    for (size_t earlier = 0; earlier < weight; earlier++) {
        if (same_shape(&options->weights[earlier], &options->weights[weight]))
            return &bench->inputs[earlier * stride + rest];
    }
    const struct inputs *first = &bench->inputs[weight * stride + rest - rest % VARIANTS];
    for (size_t i = 0; i < rest % VARIANTS; i++)
        if (same_bytes(&first[i].request, &first[rest % VARIANTS].request))
            return &first[i];
    return NULL;
}

static bool random_tensors(const struct bench_options *options,
                           const struct einsum_client_weight *weight, struct inputs *inputs,
                           uint64_t seed)
{
    const struct einsum_client_request *request = &inputs->request;
    if (options->attention)
        return ctl_random_attention(weight, request->tokens, weight->rope.positions_max, seed,
                                    &inputs->tensors);
    return ctl_random_inputs(weight, request->tokens, request->scale_layout, request->scale_type,
                             seed, &inputs->tensors);
}

// Puts a tensor into memory that is shared with the server, if any is left.
static const void *share(const struct bench *bench, const void *tensor, uint64_t bytes)
{
    void *shared = bytes > 0 ? einsum_client_memory_alloc(bench->options->client, bytes) : NULL;
    if (shared)
        memcpy(shared, tensor, bytes);
    return shared ? shared : tensor;
}

static void share_inputs(const struct bench *bench, struct inputs *inputs,
                         const struct inputs *first)
{
    struct einsum_client_request *to = &inputs->request;
    if (first) {
        const struct einsum_client_request *from = &first->request;
        to->activations = from->activations;
        to->scales = from->scales;
        to->attention = from->attention;
        to->positions = from->positions;
        return;
    }
    to->activations = share(bench, to->activations, to->activations_bytes);
    to->scales = share(bench, to->scales, to->scales_bytes);
    to->attention = share(bench, to->attention, to->attention_bytes);
    to->positions = share(bench, to->positions, to->positions_bytes);
}

static bool make_inputs(struct bench *bench)
{
    const struct bench_options *options = bench->options;
    size_t stride = options->tokens_n * VARIANTS;
    bench->inputs_n = options->weights_n * stride;
    bench->inputs = calloc(bench->inputs_n, sizeof *bench->inputs);
    if (!bench->inputs)
        return false;
    for (size_t i = 0; i < bench->inputs_n; i++) {
        const struct einsum_client_weight *weight = &options->weights[i / stride];
        size_t rest = i % stride;
        struct inputs *inputs = &bench->inputs[i];
        inputs->request = request_of(options, weight, options->tokens[rest / VARIANTS],
                                     (unsigned)(rest % VARIANTS));
        const struct inputs *shared = shared_inputs(bench, i / stride, rest);
        inputs->shares = shared != NULL;
        if (shared)
            inputs->tensors = shared->tensors;
        else if (!random_tensors(options, weight, inputs, options->seed + i))
            return false;
        ctl_inputs_lend(&inputs->tensors, &inputs->request);
        share_inputs(bench, inputs, shared);
        inputs->request.output_bytes = (uint64_t)inputs->request.tokens * weight->groups *
                                       weight->output_dim *
                                       (inputs->request.output_type == 2 ? 4 : 2);
    }
    return true;
}

// Weights, token counts and variants change with every request, each at its own pace, so that all
// combinations come.
static const struct inputs *next_inputs_locked(struct bench *bench)
{
    const struct bench_options *options = bench->options;
    uint64_t turn = bench->turn++;
    size_t weight = turn % options->weights_n;
    turn /= options->weights_n;
    size_t tokens = turn % options->tokens_n;
    turn = (turn / options->tokens_n + weight) % VARIANTS;
    return &bench->inputs[(weight * options->tokens_n + tokens) * VARIANTS + turn];
}

// ---- counting -----------------------------------------------------------------------------------

static void count_bucket(struct bench_result *result, uint32_t bucket)
{
    for (uint32_t i = 0; i < result->buckets_n; i++) {
        if (result->buckets[i].bucket == bucket) {
            result->buckets[i].calls++;
            return;
        }
    }
    if (result->buckets_n == BENCH_BUCKETS_MAX)
        return;
    result->buckets[result->buckets_n].bucket = bucket;
    result->buckets[result->buckets_n++].calls = 1;
}

static void count_good(struct bench_result *result, const struct slot *slot, uint64_t now,
                       const struct einsum_client_response *response)
{
    result->calls++;
    result->tokens += response->tokens;
    result->sent_bytes += slot->sent->tensors.activations_bytes + slot->sent->tensors.scales_bytes;
    result->received_bytes += response->output_bytes;
    result->attempts += response->attempts;
    result->batch_requests += response->batch_requests;
    result->batch_tokens += response->batch_tokens;
    result->queue_ns += response->queue_ns;
    result->run_ns += response->run_ns;
    bench_histogram_add(&result->latency, now - slot->due_ns);
    count_bucket(result, response->batch_bucket);
}

static void count_locked(struct bench *bench, const struct slot *slot, uint64_t now,
                         const struct einsum_client_response *response,
                         const struct einsum_client_error *error)
{
    if (now < bench->measure_ns || now >= bench->measure_end_ns)
        return;
    struct bench_result *result = bench->result;
    if (response) {
        count_good(result, slot, now, response);
    } else {
        size_t status = (size_t)error->status;
        result->failed[status < BENCH_STATUSES ? status : EINSUM_CLIENT_UNKNOWN]++;
        result->last_error = *error;
    }
    uint64_t max = bench->options->requests_max;
    if (max && result->calls >= max && !bench->stopping) {
        bench->stopping = true;
        bench->measure_end_ns = now;
    }
}

// ---- sending ------------------------------------------------------------------------------------

static void on_answer(void *context, const struct einsum_client_response *response,
                      const struct einsum_client_error *error);

// The slot is the caller's and counts as in flight.
static void send_slot(struct slot *slot)
{
    struct bench *bench = slot->bench;
    struct einsum_client_request request = slot->sent->request;
    struct einsum_client_error error;
    request.output = slot->output;
    enum einsum_client_status status =
        slot->stream
            ? einsum_client_stream_submit(slot->stream, &request, on_answer, slot, &error)
            : einsum_client_start(bench->options->client, &request, on_answer, slot, NULL, &error);
    if (status != EINSUM_CLIENT_OK)
        on_answer(slot, NULL, &error);
}

static void pause_locked(struct slot *slot, uint64_t until_ns)
{
    slot->pause_ns = until_ns;
    slot->next = slot->bench->paused;
    slot->bench->paused = slot;
}

static void on_answer(void *context, const struct einsum_client_response *response,
                      const struct einsum_client_error *error)
{
    struct slot *slot = context;
    struct bench *bench = slot->bench;
    uint64_t now = now_ns();
    pthread_mutex_lock(&bench->lock);
    count_locked(bench, slot, now, response, error);
    bool again = !bench->stopping && bench->options->rate == 0;
    if (again && error) { // not at once, or a server that is down is asked without end
        uint64_t advised = error->retry_after_ms > 0 ? (uint64_t)error->retry_after_ms : 0;
        pause_locked(slot, now + (advised ? advised * 1000000u : PAUSE_NS));
        again = false;
        bench->in_flight--;
    } else if (again) {
        slot->due_ns = now;
        slot->sent = next_inputs_locked(bench);
    } else {
        slot->next = bench->free_slots;
        bench->free_slots = slot;
        bench->in_flight--;
    }
    if (bench->stopping || bench->options->rate > 0)
        pthread_cond_broadcast(&bench->changed);
    pthread_mutex_unlock(&bench->lock);
    if (again)
        send_slot(slot);
}

// Takes a slot for a request meant for `due_ns`; NULL if none is free.
static struct slot *take_slot_locked(struct bench *bench, uint64_t due_ns)
{
    struct slot *slot = bench->free_slots;
    if (!slot)
        return NULL;
    bench->free_slots = slot->next;
    slot->due_ns = due_ns;
    slot->sent = next_inputs_locked(bench);
    bench->in_flight++;
    return slot;
}

static void resume_paused(struct bench *bench)
{
    uint64_t now = now_ns();
    pthread_mutex_lock(&bench->lock);
    struct slot *all = bench->paused, *due = NULL;
    bench->paused = NULL;
    while (all) {
        struct slot *slot = all;
        all = all->next;
        if (slot->pause_ns > now) {
            pause_locked(slot, slot->pause_ns);
            continue;
        }
        slot->due_ns = now;
        slot->sent = next_inputs_locked(bench);
        bench->in_flight++;
        slot->next = due;
        due = slot;
    }
    pthread_mutex_unlock(&bench->lock);
    while (due) {
        struct slot *slot = due;
        due = due->next;
        send_slot(slot);
    }
}

// ---- the run ------------------------------------------------------------------------------------

static struct timespec timespec_of(uint64_t ns)
{
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000u),
                             .tv_nsec = (long)(ns % 1000000000u)};
}

static void sleep_until(uint64_t ns)
{
    struct timespec until = timespec_of(ns);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
        if (ctl_interrupted())
            return;
}

// Tells how far it is; false when the run is over.
static bool tick(struct bench *bench, uint64_t *next_tick_ns)
{
    const struct bench_options *options = bench->options;
    uint64_t now = now_ns();
    pthread_mutex_lock(&bench->lock);
    bool over = bench->stopping || now >= bench->measure_end_ns;
    uint64_t calls = bench->result->calls, start = bench->measure_ns;
    pthread_mutex_unlock(&bench->lock);
    if (over || now < *next_tick_ns)
        return !over;
    *next_tick_ns = now + TICK_NS;
    double share = now < start ? 0 : (double)(now - start) / (double)options->duration_ns;
    double by_count = options->requests_max ? (double)calls / (double)options->requests_max : 0;
    if (!options->on_tick ||
        options->on_tick(options->context, share > by_count ? share : by_count, calls))
        return true;
    bench->result->interrupted = true; // read after the run alone
    return false;
}

static void run_closed(struct bench *bench)
{
    uint64_t next_tick_ns = 0;
    for (uint32_t i = 0; i < bench->options->concurrency; i++) {
        pthread_mutex_lock(&bench->lock);
        struct slot *slot = bench->stopping ? NULL : take_slot_locked(bench, now_ns());
        pthread_mutex_unlock(&bench->lock);
        if (slot)
            send_slot(slot);
    }
    while (tick(bench, &next_tick_ns)) {
        sleep_until(now_ns() + 2000000);
        resume_paused(bench);
    }
}

// Arrivals that find no slot free wait for one, and their latency with them.
static void run_open(struct bench *bench)
{
    const struct bench_options *options = bench->options;
    uint64_t random = options->seed ^ 0x5851f42d4c957f2du, next_tick_ns = 0;
    double due = (double)now_ns();
    while (tick(bench, &next_tick_ns)) {
        double uniform = ((double)(ctl_random_next(&random) >> 11) + 1) * 0x1p-53;
        due += -log(uniform) / options->rate * 1e9;
        uint64_t due_ns = (uint64_t)due;
        while (now_ns() + TICK_NS < due_ns && tick(bench, &next_tick_ns))
            sleep_until(now_ns() + TICK_NS);
        sleep_until(due_ns);
        pthread_mutex_lock(&bench->lock);
        struct slot *slot;
        while (!(slot = take_slot_locked(bench, due_ns)) && !ctl_interrupted() &&
               now_ns() < bench->measure_end_ns) {
            struct timespec wake = timespec_of(now_ns() + TICK_NS);
            pthread_cond_timedwait(&bench->changed, &bench->lock, &wake);
        }
        pthread_mutex_unlock(&bench->lock);
        if (slot)
            send_slot(slot);
    }
}

static void run_load(struct bench *bench)
{
    const struct bench_options *options = bench->options;
    bench->measure_ns = now_ns() + options->warmup_ns;
    bench->measure_end_ns = bench->measure_ns + options->duration_ns;
    if (options->rate > 0)
        run_open(bench);
    else
        run_closed(bench);
    uint64_t end_ns = now_ns();

    pthread_mutex_lock(&bench->lock);
    bench->stopping = true;
    if (bench->measure_end_ns > end_ns)
        bench->measure_end_ns = end_ns;
    while (bench->in_flight > 0)
        pthread_cond_wait(&bench->changed, &bench->lock);
    bench->result->elapsed_ns =
        bench->measure_end_ns > bench->measure_ns ? bench->measure_end_ns - bench->measure_ns : 0;
    pthread_mutex_unlock(&bench->lock);
}

// ---- numbers first ------------------------------------------------------------------------------

static bool all_numbers(const uint8_t *output, uint64_t bytes, unsigned element_bytes,
                        bool zeros_allowed)
{
    bool some = zeros_allowed;
    for (uint64_t i = 0; i + element_bytes <= bytes; i += element_bytes) {
        unsigned high = output[i + element_bytes - 1] & 0x7fu, low = output[i + element_bytes - 2];
        if (high == 0x7f && low >= 0x80) // infinity or NaN, in BF16 and in FP32
            return false;
        some = some || high || low;
    }
    return some;
}

static enum einsum_client_status verify_weight(struct bench *bench, const struct inputs *inputs,
                                               struct einsum_client_error *error)
{
    struct einsum_client_request request = inputs->request;
    struct einsum_client_response response;
    request.output = bench->slots[0].output;
    request.digest_only = false;
    enum einsum_client_status status =
        einsum_client_einsum(bench->options->client, &request, &response, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    uint32_t crc = (uint32_t)crc32_z(0, request.output, response.output_bytes);
    bool numbers = all_numbers(request.output, response.output_bytes,
                               request.output_type == EINSUM_CLIENT_OUTPUT_FP32 ? 4 : 2,
                               bench->options->zeros_allowed);
    request.digest_only = true;
    status = einsum_client_einsum(bench->options->client, &request, &response, error);
    // The null engine answers what its memory holds, which is not the same wherever it lies.
    bool same =
        response.digest.crc32 == crc || (bench->options->zeros_allowed && bench->slots[0].shared);
    if (status != EINSUM_CLIENT_OK || (numbers && same))
        return status;
    memset(error, 0, sizeof *error);
    error->status = EINSUM_CLIENT_INTERNAL;
    snprintf(error->text, sizeof error->text, "%s: %s", request.weight,
             numbers ? "the same request gave two different outputs"
                     : "the output is all zero, or holds what is no number");
    return error->status;
}

static enum einsum_client_status verify(struct bench *bench, struct einsum_client_error *error)
{
    const struct bench_options *options = bench->options;
    enum einsum_client_status status = EINSUM_CLIENT_OK;
    for (size_t i = 0; i < options->weights_n && status == EINSUM_CLIENT_OK; i++)
        status = verify_weight(bench, &bench->inputs[i * options->tokens_n * VARIANTS], error);
    return status;
}

// ---- set up and tear down -----------------------------------------------------------------------

static bool make_slots(struct bench *bench)
{
    const struct bench_options *options = bench->options;
    uint64_t output_bytes = 1;
    for (size_t i = 0; i < bench->inputs_n; i++) {
        uint64_t bytes = bench->inputs[i].request.output_bytes;
        output_bytes = bytes > output_bytes ? bytes : output_bytes;
    }
    bench->slots = calloc(options->concurrency, sizeof *bench->slots);
    for (uint32_t i = 0; bench->slots && i < options->concurrency; i++) {
        struct slot *slot = &bench->slots[i];
        slot->bench = bench;
        slot->output = slot->shared = einsum_client_memory_alloc(options->client, output_bytes);
        if (!slot->output)
            slot->output = malloc(output_bytes);
        if (!slot->output)
            return false;
        slot->next = bench->free_slots;
        bench->free_slots = slot;
    }
    return bench->slots != NULL;
}

static enum einsum_client_status open_streams(struct bench *bench,
                                              struct einsum_client_error *error)
{
    const struct bench_options *options = bench->options;
    uint32_t n = options->streams;
    if (n == 0)
        return EINSUM_CLIENT_OK;
    bench->streams = calloc(n, sizeof *bench->streams);
    if (!bench->streams) {
        *error = (struct einsum_client_error){.status = EINSUM_CLIENT_RESOURCE_EXHAUSTED,
                                              .text = "no memory"};
        return error->status;
    }
    uint32_t window = (options->concurrency + n - 1) / n;
    for (uint32_t i = 0; i < n; i++) {
        enum einsum_client_status status =
            einsum_client_stream_open(options->client, window, 0, &bench->streams[i], error);
        if (status != EINSUM_CLIENT_OK)
            return status;
    }
    for (uint32_t i = 0; i < options->concurrency; i++)
        bench->slots[i].stream = bench->streams[i % n];
    return EINSUM_CLIENT_OK;
}

static void tear_down(struct bench *bench)
{
    for (uint32_t i = 0; bench->streams && i < bench->options->streams; i++) {
        if (bench->streams[i])
            einsum_client_stream_finish(bench->streams[i], NULL);
    }
    free(bench->streams);
    for (uint32_t i = 0; bench->slots && i < bench->options->concurrency; i++)
        if (!bench->slots[i].shared)
            free(bench->slots[i].output);
    free(bench->slots);
    for (size_t i = 0; bench->inputs && i < bench->inputs_n; i++) {
        if (!bench->inputs[i].shares)
            ctl_inputs_deinit(&bench->inputs[i].tensors);
    }
    free(bench->inputs);
    pthread_cond_destroy(&bench->changed);
    pthread_mutex_destroy(&bench->lock);
}

enum einsum_client_status bench_run(const struct bench_options *options,
                                    struct bench_result *result, struct einsum_client_error *error)
{
    memset(result, 0, sizeof *result);
    struct bench bench = {.options = options, .result = result};
    pthread_mutex_init(&bench.lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&bench.changed, &attributes);
    pthread_condattr_destroy(&attributes);

    enum einsum_client_status status = EINSUM_CLIENT_OK;
    if (!make_inputs(&bench) || !make_slots(&bench)) {
        *error = (struct einsum_client_error){.status = EINSUM_CLIENT_RESOURCE_EXHAUSTED,
                                              .text = "no memory for the requests"};
        status = error->status;
    }
    if (status == EINSUM_CLIENT_OK)
        status = verify(&bench, error);
    if (status == EINSUM_CLIENT_OK)
        status = open_streams(&bench, error);
    if (status == EINSUM_CLIENT_OK)
        run_load(&bench);
    tear_down(&bench);
    return status;
}
