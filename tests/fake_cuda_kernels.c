// The kernels of kernels/cuda, as their launch side sees them: launch.c, table.c and dispatch.c are
// the real ones. Each computes in FP64 what the table gives to it and to no other, so that a graph
// which lacks a kernel, or a table that names the wrong one, leaves garbage in the output.
//
// Weights lie as in the checkpoint: elements row-major, then the scales.
#include "fake_cuda.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/attention.h"
#include "kernels/cuda/launch.h"
#include "kernels/fp8.h"
#include "server/base.h"

// Of a bucket, as in earnest: what has no meaning between launches differs from bucket to bucket.
enum { PARTIAL_BYTES = 48 };

// ---- weights

// The second form has no contents here, but a place: runs point to it and nothing else may.
static uint64_t tiles_bytes(const struct einsum_weight_format *format, bool many)
{
    return many && einsum_hopper_takes(format) && format->block_d == 128
               ? einsum_weight_bytes(format)
               : 0;
}

uint64_t cuda_weight_bytes(const struct einsum_weight_format *format, bool many)
{
    return align_up(einsum_weight_bytes(format), 256) + tiles_bytes(format, many) +
           align_up(einsum_weight_scale_bytes(format) + 1, 256);
}

struct copy_arguments {
    void *to;
    const void *from;
    uint64_t bytes;
};

static void run_copy(const void *bytes)
{
    const struct copy_arguments *it = bytes;
    memcpy(fake_cuda_at((uintptr_t)it->to, it->bytes), fake_cuda_at((uintptr_t)it->from, it->bytes),
           it->bytes);
}

// The real ones are launched by a syntax that returns nothing, so that they ask for the last error.
static cudaError_t launch_copy(const char *name, const struct copy_arguments *arguments,
                               cudaStream_t stream)
{
    cudaError_t error = fake_cuda_launch(name, stream, run_copy, arguments, sizeof *arguments);
    cudaError_t last = cudaGetLastError();
    return error != cudaSuccess ? error : last;
}

cudaError_t cuda_weight_init(struct cuda_weight *weight, const struct einsum_weight_format *format,
                             bool many, void *memory, cudaStream_t stream)
{
    uint64_t tiles = tiles_bytes(format, many);
    *weight = (struct cuda_weight){.format = *format, .memory = memory};
    weight->elements = memory;
    uint8_t *behind = weight->elements + align_up(einsum_weight_bytes(format), 256);
    weight->tiles = tiles > 0 ? behind : NULL;
    weight->scales = behind + tiles;
    return cudaMemsetAsync(memory, 0xEE, cuda_weight_bytes(format, many), stream);
}

cudaError_t cuda_relayout(const struct cuda_weight *weight, const void *staging, uint64_t row_begin,
                          uint64_t rows, cudaStream_t stream)
{
    ASSERT(row_begin % 16 == 0 && rows % 16 == 0);
    uint64_t row_bytes = (uint64_t)weight->format.reduced_dim *
                         einsum_weight_element_bytes(weight->format.weight_type);
    const struct copy_arguments arguments = {
        .to = weight->elements + row_begin * row_bytes,
        .from = staging,
        .bytes = rows * row_bytes,
    };
    return launch_copy(__func__, &arguments, stream);
}

cudaError_t cuda_relayout_scales(const struct cuda_weight *weight, const void *staging,
                                 cudaStream_t stream)
{
    const struct copy_arguments arguments = {
        .to = weight->scales,
        .from = staging,
        .bytes = einsum_weight_scale_bytes(&weight->format),
    };
    return launch_copy(__func__, &arguments, stream);
}

// ---- a run: one weight, some tokens

struct reading {
    const struct cuda_run *run;
    uint32_t block_d, block_r, blocks;
    bool bf16;
    double *elements; // [groups][D][R]
    double *scales;   // [groups][D][K]
};

static double element_of(const unsigned char *elements, uint64_t index, bool bf16)
{
    if (!bf16)
        return (double)e4m3_to_float(elements[index]);
    uint16_t code;
    memcpy(&code, elements + 2 * index, sizeof code);
    return (double)bf16_to_float(code);
}

static double scale_of(const unsigned char *scales, uint64_t index, bool fp32)
{
    return (double)(fp32 ? fp32_load(scales + 4 * index) : ue8m0_to_float(scales[index]));
}

static void *alloc(uint64_t n, uint64_t bytes)
{
    void *memory = calloc(n, bytes);
    ASSERT(memory);
    return memory;
}

static struct reading read_weight(const struct cuda_run *run)
{
    struct reading reading = {
        .run = run,
        .block_d = (uint32_t)1 << run->block_d_log2,
        .block_r = run->mode == CUDA_MODE_UE8M0_32 || run->mode == CUDA_MODE_FP32_32 ? 32 : 128,
        .bf16 = run->mode == CUDA_MODE_BF16,
    };
    ASSERT(run->mode <= CUDA_MODE_BF16);
    reading.blocks = run->reduced_dim / reading.block_r;
    uint64_t rows = (uint64_t)run->groups * run->output_dim, first = run->group_begin;
    first *= run->output_dim;
    uint32_t element_bytes = reading.bf16 ? 2 : 1, scale_bytes = run->scales_fp32 ? 4 : 1;
    const unsigned char *elements =
        fake_cuda_at(run->elements + first * run->reduced_dim * element_bytes,
                     rows * run->reduced_dim * element_bytes);
    reading.elements = alloc(rows * run->reduced_dim, sizeof(double));
    for (uint64_t i = 0; i < rows * run->reduced_dim; i++)
        reading.elements[i] = element_of(elements, i, reading.bf16);
    reading.scales = alloc(rows * reading.blocks, sizeof(double));
    if (reading.bf16) {
        for (uint64_t i = 0; i < rows * reading.blocks; i++)
            reading.scales[i] = 1;
        return reading;
    }
    uint64_t scales_n = rows / reading.block_d * reading.blocks;
    const unsigned char *scales =
        fake_cuda_at(run->scales + first / reading.block_d * reading.blocks * scale_bytes,
                     scales_n * scale_bytes);
    for (uint64_t row = 0; row < rows; row++)
        for (uint32_t k = 0; k < reading.blocks; k++)
            reading.scales[row * reading.blocks + k] =
                scale_of(scales, row / reading.block_d * reading.blocks + k, run->scales_fp32 != 0);
    return reading;
}

// What a token brings to one group: its elements and scales.
static void read_token(const struct reading *reading, const struct cuda_row *row, uint32_t g,
                       double *elements, double *scales)
{
    const struct cuda_run *run = reading->run;
    const unsigned char *codes =
        fake_cuda_at(row->activations + (uint64_t)g * row->activation_group * run->reduced_dim,
                     run->reduced_dim);
    for (uint32_t r = 0; r < run->reduced_dim; r++)
        elements[r] = (double)e4m3_to_float(codes[r]);
    bool fp32 = row->flags & CUDA_ROW_SCALES_FP32;
    // The block-scaled kernels would take FP32 scales for UE8M0.
    ASSERT(!fp32 || (run->mode != CUDA_MODE_UE8M0_128 && run->mode != CUDA_MODE_UE8M0_32));
    for (uint32_t k = 0; k < reading->blocks; k++) {
        uint64_t at = row->scales + (uint64_t)g * row->scale_group +
                      (uint64_t)(k / 4) * row->scale_word + (uint64_t)(k % 4) * row->scale_byte;
        scales[k] = scale_of(fake_cuda_at(at, fp32 ? 4 : 1), 0, fp32);
    }
}

static void write_output(const struct cuda_row *row, uint64_t index, double value)
{
    if (row->flags & CUDA_ROW_OUTPUT_FP32) {
        float rounded = (float)value;
        memcpy(fake_cuda_at(row->output + 4 * index, 4), &rounded, 4);
    } else {
        uint16_t rounded = bf16_from_float((float)value);
        memcpy(fake_cuda_at(row->output + 2 * index, 2), &rounded, 2);
    }
}

static void compute_row(const struct reading *reading, const struct cuda_row *row, uint32_t g,
                        const double *elements, const double *scales)
{
    const struct cuda_run *run = reading->run;
    for (uint32_t d = 0; d < run->output_dim; d++) {
        uint64_t at = (uint64_t)g * run->output_dim + d;
        const double *b = reading->elements + at * run->reduced_dim;
        double sum = 0;
        for (uint32_t k = 0; k < reading->blocks; k++) {
            double block_sum = 0;
            for (uint32_t r = k * reading->block_r; r < (k + 1) * reading->block_r; r++)
                block_sum += elements[r] * b[r];
            sum += block_sum * (scales[k] * reading->scales[at * reading->blocks + k]);
        }
        write_output(row, at, sum);
    }
}

static void compute_run(const struct cuda_table *table, const struct cuda_run *run)
{
    const struct cuda_row *rows =
        (const struct cuda_row *)((const unsigned char *)table + table->rows_offset) +
        run->row_begin;
    struct reading reading = read_weight(run);
    double *elements = alloc(run->reduced_dim, sizeof(double));
    double *scales = alloc(reading.blocks, sizeof(double));
    for (uint32_t t = 0; t < run->rows; t++)
        for (uint32_t g = 0; g < run->groups; g++) {
            read_token(&reading, &rows[t], g, elements, scales);
            compute_row(&reading, &rows[t], g, elements, scales);
        }
    free(scales);
    free(elements);
    free(reading.scales);
    free(reading.elements);
}

// ---- kernels

static _Atomic uint64_t rows_computed[CUDA_KERNEL_HOPPER_MANY + 1], bytes_fetched, bytes_warmed;

uint64_t fake_cuda_rows(enum cuda_kernel kernel)
{
    return atomic_load(&rows_computed[kernel]);
}

uint64_t fake_cuda_fetched_bytes(void)
{
    return atomic_load(&bytes_fetched);
}

uint64_t fake_cuda_warmed_bytes(void)
{
    return atomic_load(&bytes_warmed);
}

static void compute_runs(enum cuda_kernel kernel, const struct cuda_table *table, uint32_t begin,
                         uint32_t runs_n)
{
    for (uint32_t i = begin; i < begin + runs_n; i++) {
        compute_run(table, &table->runs[i]);
        atomic_fetch_add(&rows_computed[kernel], table->runs[i].rows);
    }
}

struct launch_arguments {
    const struct cuda_table *table;
    const void *counters;
    void *partials;
    uint64_t partial_bytes;
    uint32_t tokens_max, decode_tokens; // of the bucket
};

static const struct cuda_table *table_of(const struct launch_arguments *arguments)
{
    uintptr_t address = (uintptr_t)arguments->table;
    const struct cuda_table *table = fake_cuda_at(address, sizeof *table);
    table = fake_cuda_at(address, cuda_table_used(table));
    // A kernel of another bucket would take too few.
    uint32_t runs =
        table->decode_runs + table->prefill_runs + table->hopper_runs + table->many_runs;
    for (uint32_t i = 0; i < runs; i++) {
        const struct cuda_run *run = &table->runs[i];
        ASSERT(run->row_begin + run->rows <= arguments->tokens_max);
        ASSERT(i >= table->decode_runs || run->rows <= arguments->decode_tokens);
    }
    return table;
}

// Nobody else's leavings may lie where a kernel counts. Leaves some of its own where it may.
static void use_workspace(const struct launch_arguments *arguments)
{
    const uint32_t *counters =
        fake_cuda_at((uintptr_t)arguments->counters, CUDA_COUNTERS * sizeof(uint32_t));
    for (uint32_t i = 0; i < CUDA_COUNTERS; i++)
        ASSERT(counters[i] == 0);
    memset(fake_cuda_at((uintptr_t)arguments->partials, arguments->partial_bytes), 0xA5,
           arguments->partial_bytes);
}

static void run_decode(const void *bytes)
{
    use_workspace(bytes);
    const struct cuda_table *table = table_of(bytes);
    compute_runs(CUDA_KERNEL_DECODE, table, 0, table->decode_runs);
}

// Those of one mode know no other.
static void run_decode_of(const void *bytes, enum cuda_mode mode)
{
    const struct cuda_table *table = table_of(bytes);
    for (uint32_t i = 0; i < table->decode_runs; i++)
        ASSERT(table->runs[i].mode == mode);
    run_decode(bytes);
}

static void run_decode_ue8m0(const void *bytes)
{
    run_decode_of(bytes, CUDA_MODE_UE8M0_128);
}

static void run_decode_fp32(const void *bytes)
{
    run_decode_of(bytes, CUDA_MODE_FP32_128);
}

static void run_prefill(const void *bytes)
{
    const struct cuda_table *table = table_of(bytes);
    compute_runs(CUDA_KERNEL_PREFILL, table, table->decode_runs, table->prefill_runs);
}

static void run_hopper(const void *bytes)
{
    use_workspace(bytes);
    const struct cuda_table *table = table_of(bytes);
    compute_runs(CUDA_KERNEL_HOPPER, table, table->decode_runs + table->prefill_runs,
                 table->hopper_runs);
}

// A map, as this stand-in makes them: where the rows begin and how far apart they are.
static bool make_map(struct cuda_map *map, const struct cuda_row *rows, uint32_t tokens,
                     uint32_t groups, uint32_t reduced_dim)
{
    map->tensor[0] = rows[0].activations;
    map->tensor[1] = tokens > 1 ? rows[1].activations - rows[0].activations : reduced_dim;
    map->tensor[2] = tokens;
    map->tensor[3] = groups;
    return true;
}

// Every map leads to its row and to all groups of it.
static void check_map(const struct cuda_table *table, const struct cuda_run *run, uint32_t row)
{
    const struct cuda_row *rows =
        (const struct cuda_row *)((const unsigned char *)table + table->rows_offset);
    uint32_t at = rows[row].map;
    if (at == 0)
        return;
    const struct cuda_map *map = (const struct cuda_map *)table + at;
    ASSERT((const void *)(map + 1) <= (const void *)rows);
    ASSERT(row >= map->row_begin && row - map->row_begin < map->tensor[2]);
    ASSERT(rows[row].activations == map->tensor[0] + (row - map->row_begin) * map->tensor[1]);
    ASSERT(map->tensor[3] == run->groups);
}

static void run_hopper_many(const void *bytes)
{
    const struct cuda_table *table = table_of(bytes);
    uint32_t first = table->decode_runs + table->prefill_runs + table->hopper_runs;
    for (uint32_t i = first; i < first + table->many_runs; i++) {
        const struct cuda_run *run = &table->runs[i];
        ASSERT(run->rows >= CUDA_HOPPER_TOKENS_MIN && run->tiles > 0);
        for (uint32_t row = run->row_begin; row < run->row_begin + run->rows; row++)
            check_map(table, run, row);
    }
    compute_runs(CUDA_KERNEL_HOPPER_MANY, table, first, table->many_runs);
}

static void run_attention(const void *bytes)
{
    const struct cuda_table *table = table_of(bytes);
    const struct cuda_attention *spans =
        (const struct cuda_attention *)((const unsigned char *)table + table->rows_offset) -
        table->attention_spans;
    for (uint32_t i = 0; i < table->attention_spans; i++) {
        const struct cuda_attention *span = &spans[i];
        uint32_t end =
            i + 1 < table->attention_spans ? spans[i + 1].row_begin : table->attention_rows;
        for (uint32_t row = 0; row < end - span->row_begin; row++) {
            uint64_t row_bytes = 2 * (uint64_t)span->reduced_dim;
            uint64_t rotation =
                span->rotations + row / span->groups * sizeof(struct attention_rotation);
            attention_quantise(fake_cuda_at(span->rows + row * row_bytes, row_bytes),
                               span->reduced_dim, span->block_r,
                               fake_cuda_at(rotation, sizeof(struct attention_rotation)));
        }
    }
}

// ---- the ends of a graph

static void fetch(uint64_t from, uint64_t to, uint64_t bytes, uint64_t multiple)
{
    ASSERT(from % 16 == 0 && to % 16 == 0 && bytes % multiple == 0 && bytes % 16 == 0);
    if (bytes > 0)
        memcpy(fake_cuda_at(to, bytes), fake_cuda_at(from, bytes), bytes);
    atomic_fetch_add(&bytes_fetched, bytes);
}

static void run_fetch(const void *bytes)
{
    const struct cuda_ends *it = bytes;
    const struct cuda_order *orders =
        fake_cuda_at((uintptr_t)it->orders, CUDA_ORDERS * sizeof *orders);
    struct cuda_report *report = fake_cuda_at((uintptr_t)it->report, sizeof *report);
    for (uint32_t i = 1; i < CUDA_ORDERS; i++) // each is a block's own
        ASSERT(memcmp(&orders[i], &orders[0], sizeof *orders) == 0);
    if (orders->warm_pieces > 0) {
        uint64_t before = (uint64_t)(orders->warm_pieces - 1) * orders->warm_step_bytes;
        fake_cuda_at(orders->warm_from, before + CUDA_WARM_BYTES);
        ASSERT(orders->warm_from % 16 == 0 && orders->warm_step_bytes % 16 == 0);
        atomic_fetch_add(&bytes_warmed, (uint64_t)orders->warm_pieces * CUDA_WARM_BYTES);
    }
    report->begun_ns = fake_cuda_now_ns();
    fetch((uintptr_t)it->table_host, (uintptr_t)it->table, orders->table_bytes, CUDA_FETCH_BYTES);
    fetch(orders->input_from, orders->input_to, orders->input_bytes, 16);
    uint32_t pieces_n = orders->pieces > CUDA_PIECES_EARLY ? orders->pieces : CUDA_PIECES_EARLY;
    const struct cuda_piece *pieces =
        fake_cuda_at((uintptr_t)it->pieces, pieces_n * sizeof *pieces);
    for (uint32_t i = 0; i < orders->pieces; i++)
        fetch(pieces[i].from, pieces[i].to, align_up(pieces[i].bytes, 16), 16);
    report->fetched_ns = fake_cuda_now_ns();
}

static void run_report(const void *bytes)
{
    const struct cuda_ends *it = bytes;
    const struct cuda_order *order = fake_cuda_at((uintptr_t)it->orders, sizeof *order);
    struct cuda_report *report = fake_cuda_at((uintptr_t)it->report, sizeof *report);
    report->computed_ns = fake_cuda_now_ns();
    ASSERT(order->sequence != report->sequence);
    __atomic_store_n(&report->sequence, order->sequence, __ATOMIC_RELEASE);
}

// ---- launches

// A kernel that overlaps reads its input before the one ahead has ended; if that one writes it, and
// the device is in the mood, the output is wrong.
static cudaError_t launch(const char *name, const struct cuda_bucket *bucket, fake_cuda_kernel *run,
                          bool overlaps, const struct cuda_table *table, const void *counters,
                          void *partials, uint64_t partial_bytes, cudaStream_t stream)
{
    fake_cuda_kernel *ahead = fake_cuda_newest(stream);
    ASSERT(!overlaps || (ahead != run_fetch && ahead != run_attention));
    const struct launch_arguments arguments = {
        .table = table,
        .counters = counters,
        .partials = partials,
        .partial_bytes = partial_bytes,
        .tokens_max = bucket->tokens_max,
        .decode_tokens = bucket->decode_tokens,
    };
    return fake_cuda_launch(name, stream, run, &arguments, sizeof arguments);
}

void cuda_attention_init(struct cuda_bucket *bucket, int sm_count)
{
    bucket->attention_blocks = (uint32_t)sm_count;
}

cudaError_t cuda_decode_init(struct cuda_bucket *bucket, int sm_count)
{
    bucket->decode_tokens = bucket->tokens_max <= 8    ? 8
                            : bucket->tokens_max <= 16 ? 16
                            : bucket->tokens_max <= 32 ? 32
                                                       : 64;
    bucket->decode_workers = (uint32_t)sm_count;
    return cudaSuccess;
}

cudaError_t cuda_prefill_init(struct cuda_bucket *bucket, int sm_count)
{
    bucket->prefill_blocks = (uint32_t)sm_count;
    bucket->prefill_from = CUDA_PREFILL_TOKENS_MIN;
    return cudaSuccess;
}

cudaError_t cuda_hopper_init(struct cuda_bucket *bucket, int sm_count)
{
    bucket->hopper_rows = 128;
    bucket->hopper_tokens = 64;
    bucket->hopper_workers = (uint32_t)sm_count;
    bucket->hopper_from = CUDA_HOPPER_TOKENS_MIN;
    return cudaSuccess;
}

cudaError_t cuda_hopper_many_init(struct cuda_bucket *bucket, int sm_count)
{
    bool some = bucket->tokens_max <= CUDA_MANY_BOX;
    bucket->many_rows = some ? CUDA_MANY_ROWS / 2 : CUDA_MANY_ROWS;
    bucket->many_tokens = some ? CUDA_MANY_BOX : CUDA_MANY_TOKENS;
    bucket->many_from = some ? CUDA_HOPPER_TOKENS_MIN : CUDA_HOPPER_MANY_TOKENS_MIN;
    bucket->many_cluster = 2;
    bucket->many_blocks = (uint32_t)sm_count / 2 * 2;
    bucket->many_map = make_map;
    return cudaSuccess;
}

uint64_t cuda_decode_partial_bytes(const struct cuda_bucket *bucket)
{
    return (uint64_t)PARTIAL_BYTES * bucket->decode_tokens;
}

uint64_t cuda_hopper_partial_bytes(const struct cuda_bucket *bucket)
{
    return bucket->hopper_workers > 0 ? PARTIAL_BYTES * (1 + bucket->tokens_max / 3) : 0;
}

cudaError_t cuda_attention_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                                  cudaStream_t stream)
{
    ASSERT(bucket->attention_blocks > 0);
    return launch(__func__, bucket, run_attention, false, table, NULL, NULL, 0, stream);
}

cudaError_t cuda_decode_launch(const struct cuda_bucket *bucket, uint32_t form,
                               const struct cuda_table *table, uint32_t *counters, float *partials,
                               bool overlaps, cudaStream_t stream)
{
    ASSERT(bucket->decode_workers > 0);
    void (*run)(const void *) = form == CUDA_LAUNCH_DECODE_UE8M0  ? run_decode_ue8m0
                                : form == CUDA_LAUNCH_DECODE_FP32 ? run_decode_fp32
                                                                  : run_decode;
    return launch(__func__, bucket, run, overlaps, table, counters, partials,
                  cuda_decode_partial_bytes(bucket), stream);
}

cudaError_t cuda_prefill_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                                bool overlaps, cudaStream_t stream)
{
    ASSERT(bucket->prefill_blocks > 0);
    return launch(__func__, bucket, run_prefill, overlaps, table, NULL, NULL, 0, stream);
}

cudaError_t cuda_hopper_launch(const struct cuda_bucket *bucket, const struct cuda_table *table,
                               uint32_t *counters, float *partials, bool overlaps,
                               cudaStream_t stream)
{
    ASSERT(bucket->hopper_workers > 0);
    return launch(__func__, bucket, run_hopper, overlaps, table, counters, partials,
                  cuda_hopper_partial_bytes(bucket), stream);
}

cudaError_t cuda_hopper_many_launch(const struct cuda_bucket *bucket,
                                    const struct cuda_table *table, bool overlaps,
                                    cudaStream_t stream)
{
    ASSERT(bucket->many_blocks > 0);
    return launch(__func__, bucket, run_hopper_many, overlaps, table, NULL, NULL, 0, stream);
}

cudaError_t cuda_fetch_launch(const struct cuda_ends *ends, cudaStream_t stream)
{
    return fake_cuda_launch(__func__, stream, run_fetch, ends, sizeof *ends);
}

cudaError_t cuda_report_launch(const struct cuda_ends *ends, cudaStream_t stream)
{
    return fake_cuda_launch(__func__, stream, run_report, ends, sizeof *ends);
}

// launch.c's own launches are the real kernels' alone.
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel,
                                void **arguments)
{
    (void)config, (void)kernel, (void)arguments;
    ASSERT(!"a kernel of a real device");
}
