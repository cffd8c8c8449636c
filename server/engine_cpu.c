// The engine that computes on the host's cores, with the kernels of kernels/cpu.
//
// A submitted batch is cut into items, and a pool of compute threads takes them in order: all of
// the batch submitted first, then those of the next lane, so that no thread is idle while another
// finishes the last item of a batch. Two lanes are therefore enough.
//
//     lane 0   task: weight a, operands 0..2    items 0 .. 63
//              task: weight b, operand  3       items 64 .. 127
//     lane 1   ...
//
// Where segments hold attention's output, the batch has items twice: first runs of rows to quantise
// in place; who finishes the last of them publishes the others.
//
// A task is all that one batch asks of one weight by one kernel; the weight is then read once however
// many requests share it.
//
// Threads: submit and poll on the scheduler's, compute_run on the pool's, the rest on any. A lane's
// tables are written by submit, published by the release store to `work` and read by whoever takes
// an item; the last item done publishes the result by the release store to `done`.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/attention.h"
#include "../kernels/cpu/cpu.h"
#include "../client/crc32c.h"
#include "engine.h"
#include "futex.h"

enum {
    STAGING_BYTES = 256 * 1024, // of a weight on its way in; stays within a core's L2
    STAGING_ROWS_MULTIPLE = 16, // what cpu_relayout takes
    LANES_DEFAULT = 2,
    ROW_ITEMS_PER_THREAD = 4, // so that the last to finish is not far behind
};

struct task {
    struct cpu_task cpu;
    const struct cpu_kernel *kernel;
};

// A segment that holds attention's output.
struct attention {
    const struct einsum_operand *operand;
    const struct einsum_weight_format *format;
    uint32_t row_begin; // rows (token, group) of those before it
};

struct lane {
    bool submitted; // scheduler thread only
    // What there is to quantise, and how many items follow then.
    struct attention *attentions; // batch_segments_max
    uint32_t attentions_n, rows, einsum_items;
    bool quantises; // the items are runs of rows; changed between the last of them and the others
    uint32_t tasks_n;
    struct task *tasks;   // batch_segments_max, as the next two
    uint32_t *item_begin; // of each task, and one more: where the last one ends
    struct einsum_operand *operands;
    uint64_t started_ns; // by the thread that takes item 0
    uint64_t ended_ns;   // by the thread that finishes last
    bool measured;       // its time is reported; scheduler thread only
    // Items in the upper half, the next one to take in the lower: one word, so that nobody takes an
    // item of one batch by the count of another.
    _Alignas(CACHE_LINE_BYTES) _Atomic uint64_t work;
    _Atomic uint64_t order;                                 // of submission, over all lanes
    _Alignas(CACHE_LINE_BYTES) _Atomic uint32_t items_left; // to be finished
    _Atomic bool done;
};

struct worker {
    struct engine *engine;
    pthread_t thread;
    void *scratch;
};

struct engine {
    struct engine_info info;
    // As segments number them: 0 is the engine's choice, then all that this CPU runs.
    const struct cpu_kernel *kernels[1 + ENGINE_KERNELS_MAX];
    uint32_t reduced_dim_max;
    uint32_t segments_max;
    uint32_t phase_sample;
    void (*wake)(void *context);
    void *wake_context;

    uint32_t lanes_n;
    struct lane *lanes;
    struct task *tasks; // the lanes' tables point into these
    uint32_t *item_begins;
    struct einsum_operand *operands;
    struct attention *attentions;
    uint64_t submitted_n; // scheduler thread only

    uint32_t workers_n; // that have been started
    struct worker *workers;
    // An idle thread reads `submissions`, looks for items once more, and sleeps while the word is
    // what it read.
    _Alignas(CACHE_LINE_BYTES) _Atomic uint32_t submissions;
    _Atomic uint32_t sleepers;
    _Atomic bool stopping;

    _Atomic uint32_t weights_n;
};

struct engine_weight {
    struct cpu_weight cpu;
    uint64_t bytes;
};

// --- the compute threads

static uint32_t work_items(uint64_t work)
{
    return (uint32_t)(work >> 32);
}

static uint32_t work_next(uint64_t work)
{
    return (uint32_t)work;
}

// Takes the next item of the batch submitted first among those that have any left. NULL: none has.
static struct lane *take_item(struct engine *engine, uint32_t *item)
{
    for (;;) {
        struct lane *first = NULL;
        uint64_t first_work = 0, first_order = UINT64_MAX;
        for (uint32_t i = 0; i < engine->lanes_n; i++) {
            struct lane *lane = &engine->lanes[i];
            uint64_t work = atomic_load_explicit(&lane->work, memory_order_acquire);
            if (work_next(work) == work_items(work))
                continue;
            uint64_t order = atomic_load_explicit(&lane->order, memory_order_relaxed);
            if (order < first_order) {
                first = lane;
                first_work = work;
                first_order = order;
            }
        }
        if (!first)
            return NULL;
        if (atomic_compare_exchange_weak_explicit(&first->work, &first_work, first_work + 1,
                                                  memory_order_acq_rel, memory_order_relaxed)) {
            *item = work_next(first_work);
            return first;
        }
    }
}

static void finish_batch(struct engine *engine, struct lane *lane)
{
    lane->ended_ns = now_ns();
    atomic_store_explicit(&lane->done, true, memory_order_release);
    // From here on the lane may be submitted again.
    engine->wake(engine->wake_context);
}

static void wake_workers(struct engine *engine, uint32_t threads)
{
    atomic_fetch_add(&engine->submissions, 1);
    if (atomic_load(&engine->sleepers) > 0)
        futex_wake(&engine->submissions, threads);
}

static void publish_items(struct engine *engine, struct lane *lane, uint32_t items)
{
    atomic_store_explicit(&lane->items_left, items, memory_order_relaxed);
    atomic_store_explicit(&lane->work, (uint64_t)items << 32, memory_order_release);
    wake_workers(engine, items);
}

static uint32_t row_items(const struct engine *engine, const struct lane *lane)
{
    uint32_t most = engine->workers_n * ROW_ITEMS_PER_THREAD;
    return lane->rows < most ? lane->rows : most;
}

static void quantise_row(const struct attention *attention, uint32_t row)
{
    const struct einsum_operand *operand = attention->operand;
    uint32_t reduced_dim = attention->format->reduced_dim;
    uint64_t at =
        einsum_activation_offset(operand->activation_layout, operand->tokens, operand->groups,
                                 reduced_dim, row / operand->groups, row % operand->groups);
    // The batch's own memory, which requests fill and this step alone changes.
    attention_quantise((uint8_t *)(uintptr_t)operand->activations + at, reduced_dim,
                       attention->format->block_r, &operand->rotations[row / operand->groups]);
}

static void quantise_rows(const struct engine *engine, const struct lane *lane, uint32_t item)
{
    uint64_t items = row_items(engine, lane), rows = lane->rows;
    uint32_t row = (uint32_t)(rows * item / items), end = (uint32_t)(rows * (item + 1) / items);
    uint32_t i = lane->attentions_n - 1;
    while (lane->attentions[i].row_begin > row)
        i--;
    for (; row < end; row++) {
        if (i + 1 < lane->attentions_n && lane->attentions[i + 1].row_begin == row)
            i++;
        quantise_row(&lane->attentions[i], row - lane->attentions[i].row_begin);
    }
}

static void project(const struct lane *lane, uint32_t item, void *scratch)
{
    uint32_t low = 0, high = lane->tasks_n; // the task lies in [low, high)
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (lane->item_begin[middle] <= item)
            low = middle;
        else
            high = middle;
    }
    uint32_t begin = lane->item_begin[low], items = lane->item_begin[low + 1] - begin;
    const struct task *task = &lane->tasks[low];
    cpu_task_run(task->kernel, &task->cpu, item - begin, items, scratch);
}

static void run_item(struct engine *engine, struct lane *lane, uint32_t item, void *scratch)
{
    if (item == 0 && (lane->quantises || lane->rows == 0))
        lane->started_ns = now_ns();
    if (lane->quantises)
        quantise_rows(engine, lane, item);
    else
        project(lane, item, scratch);
    if (atomic_fetch_sub_explicit(&lane->items_left, 1, memory_order_acq_rel) > 1)
        return;
    if (lane->quantises) {
        lane->quantises = false;
        publish_items(engine, lane, lane->einsum_items);
    } else {
        finish_batch(engine, lane);
    }
}

static void *compute_run(void *argument)
{
    struct worker *worker = argument;
    struct engine *engine = worker->engine;
    for (;;) {
        uint32_t seen = atomic_load(&engine->submissions); // before anything that it announces
        if (atomic_load(&engine->stopping))
            return NULL;
        struct lane *lane;
        uint32_t item;
        while ((lane = take_item(engine, &item)))
            run_item(engine, lane, item, worker->scratch);
        // Asleep at once: a wake costs about 5 us, next to 2600 us for a layer of V4-Flash at one
        // token on two cores, and a thread that spun would hold a core that the rpc threads need.
        // We count ourselves, then look at the word; the submitter changes the word, then looks at
        // the count. So either we see the change or it sees us.
        atomic_fetch_add(&engine->sleepers, 1);
        futex_wait(&engine->submissions, seen, UINT64_MAX);
        atomic_fetch_sub(&engine->sleepers, 1);
    }
}

// --- submit, poll

// Gathers segments of equal weight and kernel that stand side by side into one task; returns the
// items of all.
static uint32_t lane_fill(const struct engine *engine, struct lane *lane,
                          const struct engine_batch *batch)
{
    uint32_t items = 0;
    lane->tasks_n = 0;
    for (uint32_t i = 0; i < batch->segments_n;) {
        const struct engine_segment *first = &batch->segments[i];
        ASSERT(first->kernel <= engine->info.kernels_n);
        struct task *task = &lane->tasks[lane->tasks_n];
        *task = (struct task){
            .cpu = {.weight = &first->weight->cpu, .operands = &lane->operands[i]},
            .kernel = engine->kernels[first->kernel],
        };
        for (; i < batch->segments_n && batch->segments[i].weight == first->weight &&
               batch->segments[i].kernel == first->kernel;
             i++) {
            lane->operands[i] = batch->segments[i].operand;
            task->cpu.operands_n++;
        }
        uint32_t task_items = cpu_task_items(&task->cpu, engine->workers_n);
        if (task_items == 0)
            continue;
        lane->item_begin[lane->tasks_n++] = items;
        items += task_items;
    }
    lane->item_begin[lane->tasks_n] = items;
    return items;
}

// Those segments that hold attention's output, as lane_fill has copied them.
static void lane_fill_attention(struct lane *lane, const struct engine_batch *batch)
{
    lane->attentions_n = lane->rows = 0;
    for (uint32_t i = 0; i < batch->segments_n; i++) {
        const struct einsum_operand *operand = &lane->operands[i];
        if (!operand->rotations || operand->tokens == 0 || operand->groups == 0)
            continue;
        lane->attentions[lane->attentions_n++] = (struct attention){
            .operand = operand,
            .format = &batch->segments[i].weight->cpu.format,
            .row_begin = lane->rows,
        };
        lane->rows += operand->tokens * operand->groups;
    }
    lane->quantises = lane->rows > 0;
}

static void cpu_submit(struct engine *engine, uint32_t index, const struct engine_batch *batch)
{
    ASSERT(index < engine->lanes_n);
    ASSERT(batch->segments_n <= engine->segments_max);
    struct lane *lane = &engine->lanes[index];
    ASSERT(!lane->submitted);
    lane->submitted = true;
    uint64_t number = engine->submitted_n++;
    lane->measured = engine->phase_sample > 0 && number % engine->phase_sample == 0;
    lane->einsum_items = lane_fill(engine, lane, batch);
    lane_fill_attention(lane, batch);
    if (lane->einsum_items == 0) { // then there are no rows either
        lane->started_ns = now_ns();
        finish_batch(engine, lane);
        return;
    }
    atomic_store_explicit(&lane->order, number, memory_order_relaxed);
    publish_items(engine, lane, lane->quantises ? row_items(engine, lane) : lane->einsum_items);
}

static bool cpu_poll(struct engine *engine, uint32_t index, struct engine_result *result)
{
    ASSERT(index < engine->lanes_n);
    struct lane *lane = &engine->lanes[index];
    if (!atomic_load_explicit(&lane->done, memory_order_acquire))
        return false;
    atomic_store_explicit(&lane->done, false, memory_order_relaxed);
    lane->submitted = false;
    result->status = STATUS_OK;
    result->started_ns = lane->started_ns;
    result->ended_ns = lane->ended_ns;
    result->copy_in_ns = result->copy_out_ns = 0;
    result->kernel_ns = lane->measured ? lane->ended_ns - lane->started_ns : 0;
    return true;
}

// --- weights

static enum status out_of_memory(struct error *err, const char *what)
{
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory for %s", what);
}

static enum status load_elements(struct cpu_weight *weight,
                                 const struct engine_weight_source *source, struct error *err)
{
    const struct einsum_weight_format *format = &source->format;
    uint64_t rows = (uint64_t)format->groups * format->output_dim;
    uint64_t row_bytes =
        (uint64_t)format->reduced_dim * einsum_weight_element_bytes(format->weight_type);
    uint64_t chunk_rows = STAGING_BYTES / row_bytes / STAGING_ROWS_MULTIPLE * STAGING_ROWS_MULTIPLE;
    if (chunk_rows < STAGING_ROWS_MULTIPLE)
        chunk_rows = STAGING_ROWS_MULTIPLE;
    void *staging = aligned_alloc(CACHE_LINE_BYTES, chunk_rows * row_bytes);
    if (!staging)
        return out_of_memory(err, "reading a weight");

    enum status status = STATUS_OK;
    for (uint64_t row = 0; row < rows && !status; row += chunk_rows) {
        uint64_t n = rows - row < chunk_rows ? rows - row : chunk_rows;
        status = source->read_weight(source, row * row_bytes, staging, n * row_bytes, err);
        if (status)
            break;
        cpu_relayout(weight, staging, row, n);
        if (source->progress)
            source->progress(source, n * row_bytes);
    }
    free(staging);
    return status;
}

static enum status load_scales(struct cpu_weight *weight, const struct engine_weight_source *source,
                               struct error *err)
{
    uint64_t bytes = einsum_weight_scale_bytes(&source->format);
    if (bytes == 0) { // BF16 weights have none
        cpu_relayout_scales(weight, NULL);
        return STATUS_OK;
    }
    void *staging = malloc(bytes);
    if (!staging)
        return out_of_memory(err, "reading the scales of a weight");
    enum status status = source->read_scales(source, staging, err);
    if (!status)
        cpu_relayout_scales(weight, staging);
    free(staging);
    return status;
}

static enum status cpu_weight_load(struct engine *engine, const struct engine_weight_source *source,
                                   struct engine_weight **out, struct error *err)
{
    const struct einsum_weight_format *format = &source->format;
    if (format->reduced_dim > engine->reduced_dim_max)
        return error_field(err, STATUS_INVALID_ARGUMENT, "reduced_dim",
                           "the engine was opened for at most %u, got %u", engine->reduced_dim_max,
                           format->reduced_dim);
    ASSERT(format->output_dim % STAGING_ROWS_MULTIPLE == 0);
    struct engine_weight *weight = malloc(sizeof *weight);
    if (!weight)
        return out_of_memory(err, "a weight");
    weight->bytes = cpu_weight_bytes(format);
    void *memory;
    enum status status = engine_host_memory_alloc(weight->bytes, &memory, err);
    if (status)
        goto free_weight;
    cpu_weight_init(&weight->cpu, format, memory);
    status = load_elements(&weight->cpu, source, err);
    if (!status)
        status = load_scales(&weight->cpu, source, err);
    if (status)
        goto free_memory;
    atomic_fetch_add(&engine->weights_n, 1);
    *out = weight;
    return STATUS_OK;

free_memory:
    engine_host_memory_free(memory, weight->bytes);
free_weight:
    free(weight);
    return status;
}

static void cpu_weight_free(struct engine *engine, struct engine_weight *weight)
{
    uint32_t held = atomic_fetch_sub(&engine->weights_n, 1);
    ASSERT(held > 0);
    engine_host_memory_free(weight->cpu.memory, weight->bytes);
    free(weight);
}

static uint64_t cpu_weight_bytes_held(const struct engine_weight *weight)
{
    return weight->bytes;
}

static enum status cpu_weight_sum(struct engine *engine, const struct engine_weight *weight,
                                  uint64_t offset, uint64_t bytes, uint32_t *crc, struct error *err)
{
    (void)engine;
    (void)err;
    ASSERT(offset <= weight->bytes && bytes <= weight->bytes - offset);
    *crc = crc32c_extend(*crc, (const uint8_t *)weight->cpu.memory + offset, bytes);
    return STATUS_OK;
}

// Up to 8 tokens of a weight are streamed, four at a time at most; more are multiplied in rows of six.
// kernels/cpu has code of its own for each number that may be over.
static uint32_t cpu_checks(const struct engine *engine, const struct einsum_weight_format *format,
                           struct engine_check checks[ENGINE_CHECKS_MAX])
{
    static const struct engine_check all[] = {
        {.tokens = 1},
        {.tokens = 9}, // six and three
        {.tokens = 1, .wide = true},
        {.tokens = 2, .once = true},
        {.tokens = 3, .once = true},
        {.tokens = 4, .once = true},
        {.tokens = 8, .once = true},
        {.tokens = 10, .once = true}, // six and four, and so on
        {.tokens = 11, .once = true},
        {.tokens = 12, .once = true},
        {.tokens = 13, .once = true},
        {.tokens = 14, .once = true},
        {.tokens = 3, .wide = true, .once = true},
    };
    (void)engine;
    (void)format;
    memcpy(checks, all, sizeof all);
    return ARRAY_LEN(all);
}

static enum status cpu_memory_alloc(struct engine *engine, uint64_t bytes, void **memory,
                                    struct error *err)
{
    (void)engine;
    return engine_host_memory_alloc(bytes, memory, err);
}

static void cpu_memory_free(struct engine *engine, void *memory, uint64_t bytes)
{
    (void)engine;
    engine_host_memory_free(memory, bytes);
}

// --- open, close

static uint32_t cores_available(void)
{
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof cores, &cores) != 0)
        return 1;
    return (uint32_t)CPU_COUNT(&cores);
}

static void describe_cpu(char *name, size_t bytes)
{
    snprintf(name, bytes, "unnamed CPU");
    FILE *file = fopen("/proc/cpuinfo", "re");
    if (!file)
        return;
    char line[256], model[96];
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "model name : %95[^\n]", model) == 1) {
            snprintf(name, bytes, "%s", model);
            break;
        }
    fclose(file);
}

static enum status refuse_kernel(const char *name, struct error *err)
{
    char names[128] = "";
    size_t used = 0;
    for (const struct cpu_kernel *const *kernel = cpu_kernels(); *kernel; kernel++) {
        if (!cpu_kernel_supported(*kernel) || used >= sizeof names)
            continue;
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? ", " : "",
                                 cpu_kernel_name(*kernel));
    }
    return error_field(err, STATUS_UNIMPLEMENTED, "kernel", "this CPU runs %s, got \"%s\"", names,
                       name ? name : "auto");
}

static void list_kernels(struct engine *engine)
{
    struct engine_info *info = &engine->info;
    for (const struct cpu_kernel *const *kernel = cpu_kernels(); *kernel; kernel++) {
        if (!cpu_kernel_supported(*kernel))
            continue;
        ASSERT(info->kernels_n < ENGINE_KERNELS_MAX);
        info->kernels[info->kernels_n++] = cpu_kernel_name(*kernel);
        engine->kernels[info->kernels_n] = *kernel;
    }
}

static void tables_free(struct engine *engine)
{
    free(engine->workers);
    free(engine->attentions);
    free(engine->operands);
    free(engine->item_begins);
    free(engine->tasks);
    free(engine->lanes);
}

static enum status tables_alloc(struct engine *engine, uint32_t threads, struct error *err)
{
    size_t segments = (size_t)engine->lanes_n * engine->segments_max;
    engine->lanes = aligned_alloc(_Alignof(struct lane), engine->lanes_n * sizeof *engine->lanes);
    engine->tasks = calloc(segments, sizeof *engine->tasks);
    engine->item_begins = calloc(segments + engine->lanes_n, sizeof *engine->item_begins);
    engine->operands = calloc(segments, sizeof *engine->operands);
    engine->attentions = calloc(segments, sizeof *engine->attentions);
    engine->workers = calloc(threads, sizeof *engine->workers);
    if (!engine->lanes || !engine->tasks || !engine->item_begins || !engine->operands ||
        !engine->attentions || !engine->workers) {
        tables_free(engine);
        return out_of_memory(err, "the tables of the lanes");
    }
    for (size_t i = 0; i < engine->lanes_n; i++)
        engine->lanes[i] = (struct lane){
            .tasks = engine->tasks + i * engine->segments_max,
            .item_begin = engine->item_begins + i * (engine->segments_max + 1),
            .operands = engine->operands + i * engine->segments_max,
            .attentions = engine->attentions + i * engine->segments_max,
        };
    return STATUS_OK;
}

static void workers_stop(struct engine *engine)
{
    atomic_store(&engine->stopping, true);
    wake_workers(engine, UINT32_MAX >> 1);
    for (uint32_t i = 0; i < engine->workers_n; i++) {
        pthread_join(engine->workers[i].thread, NULL);
        free(engine->workers[i].scratch);
    }
}

static enum status worker_start(struct engine *engine, uint32_t index, uint64_t scratch_bytes,
                                struct error *err)
{
    struct worker *worker = &engine->workers[index];
    worker->engine = engine;
    worker->scratch = aligned_alloc(CACHE_LINE_BYTES, scratch_bytes);
    if (!worker->scratch)
        return out_of_memory(err, "the scratch of a compute thread");
    int failed = pthread_create(&worker->thread, NULL, compute_run, worker);
    if (failed) {
        free(worker->scratch);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "starting compute thread %u: %s", index,
                         strerror(failed));
    }
    pthread_setname_np(worker->thread, "compute");
    return STATUS_OK;
}

static enum status workers_start(struct engine *engine, uint32_t threads, struct error *err)
{
    uint64_t scratch_bytes =
        align_up(cpu_scratch_bytes(engine->reduced_dim_max) + 1, CACHE_LINE_BYTES);
    engine->info.scratch_bytes = threads * scratch_bytes;
    // Signals are main's.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < threads && !status; i++) {
        status = worker_start(engine, i, scratch_bytes, err);
        engine->workers_n += !status;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status)
        workers_stop(engine);
    return status;
}

static enum status cpu_open(const struct engine_options *options, struct engine **out,
                            struct error *err)
{
    ASSERT(options->lanes >= 1);
    ASSERT(options->batch_segments_max >= 1);
    const struct cpu_kernel *kernel = cpu_kernel_find(options->kernel);
    if (!kernel)
        return refuse_kernel(options->kernel, err);
    struct engine *engine = aligned_alloc(_Alignof(struct engine), sizeof *engine);
    if (!engine)
        return out_of_memory(err, "the engine");
    uint32_t threads = options->threads ? options->threads : cores_available();
    *engine = (struct engine){
        .info.threads = threads,
        .kernels = {kernel},
        .reduced_dim_max = options->reduced_dim_max,
        .segments_max = options->batch_segments_max,
        .phase_sample = options->phase_sample,
        .wake = options->wake,
        .wake_context = options->wake_context,
        .lanes_n = options->lanes,
    };
    char cpu[96];
    describe_cpu(cpu, sizeof cpu);
    snprintf(engine->info.device, sizeof engine->info.device, "%s, %u thread%s", cpu, threads,
             threads == 1 ? "" : "s");
    snprintf(engine->info.kernel, sizeof engine->info.kernel, "%s: %s", cpu_kernel_name(kernel),
             options->kernel ? "asked for by name" : "the best that this CPU supports");
    list_kernels(engine);

    enum status status = tables_alloc(engine, threads, err);
    if (status)
        goto free_engine;
    status = workers_start(engine, threads, err);
    if (status)
        goto free_tables;
    *out = engine;
    return STATUS_OK;

free_tables:
    tables_free(engine);
free_engine:
    free(engine);
    return status;
}

static void cpu_close(struct engine *engine)
{
    ASSERT(atomic_load(&engine->weights_n) == 0);
    for (uint32_t i = 0; i < engine->lanes_n; i++)
        ASSERT(!engine->lanes[i].submitted);
    workers_stop(engine);
    tables_free(engine);
    free(engine);
}

static void cpu_describe(const struct engine *engine, struct engine_info *info)
{
    *info = engine->info;
}

const struct engine_ops engine_cpu = {
    .name = "cpu",
    .lanes_default = LANES_DEFAULT,
    .serial = true,
    .open = cpu_open,
    .close = cpu_close,
    .describe = cpu_describe,
    .weight_load = cpu_weight_load,
    .weight_free = cpu_weight_free,
    .weight_bytes = cpu_weight_bytes_held,
    .weight_sum = cpu_weight_sum,
    .checks = cpu_checks,
    .memory_alloc = cpu_memory_alloc,
    .memory_free = cpu_memory_free,
    .memory_register = engine_host_memory_register,
    .memory_unregister = engine_host_memory_unregister,
    .submit = cpu_submit,
    .poll = cpu_poll,
};
