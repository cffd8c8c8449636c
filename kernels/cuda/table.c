// Builds the table of a batch: segments ordered by weight and cut into runs, then units dealt out to
// workers. The scheduler's thread, once per batch: no allocation, no search over tokens.
#include "cuda.h"

#include <string.h>

// Tokens from which a segment has a map. Shorter ones are copied row by row: a tile is seldom theirs alone.
static uint32_t map_tokens_min(const struct cuda_bucket *bucket)
{
    return bucket->many_tokens > CUDA_MANY_BOX ? CUDA_MANY_BOX : CUDA_HOPPER_TOKENS_MIN;
}

static uint64_t maps_max(const struct cuda_bucket *bucket, uint32_t segments_max)
{
    uint64_t most = bucket->tokens_max / map_tokens_min(bucket);
    if (!bucket->many_map)
        return 0;
    return segments_max < most ? segments_max : most;
}

uint64_t cuda_table_bytes(const struct cuda_bucket *bucket, uint32_t segments_max)
{
    // A run ends where a segment does or a tile of at least 8 tokens is full.
    uint64_t runs = (uint64_t)segments_max + bucket->tokens_max / 8 + 1;
    if (runs > bucket->tokens_max)
        runs = bucket->tokens_max;
    uint64_t spans = segments_max < bucket->tokens_max ? segments_max : bucket->tokens_max;
    uint64_t maps = maps_max(bucket, segments_max);
    if (maps > 0)
        maps++; // they begin at a multiple of their size
    return sizeof(struct cuda_table) + runs * sizeof(struct cuda_run) +
           maps * sizeof(struct cuda_map) + spans * sizeof(struct cuda_attention) +
           (uint64_t)bucket->tokens_max * sizeof(struct cuda_row);
}

static uint32_t table_runs(const struct cuda_table *table)
{
    return table->decode_runs + table->prefill_runs + table->hopper_runs + table->many_runs;
}

static uint32_t table_rows(const struct cuda_table *table)
{
    uint32_t rows = 0;
    for (uint32_t i = 0; i < table_runs(table); i++)
        if (table->runs[i].row_begin + table->runs[i].rows > rows)
            rows = table->runs[i].row_begin + table->runs[i].rows;
    return rows;
}

uint64_t cuda_table_used(const struct cuda_table *table)
{
    return table->rows_offset + (uint64_t)table_rows(table) * sizeof(struct cuda_row);
}

// Segments that one reading of a weight can serve are equal under this order.
static int compare(const struct cuda_segment *a, const struct cuda_segment *b)
{
    uintptr_t weight_a = (uintptr_t)a->weight, weight_b = (uintptr_t)b->weight;
    if (weight_a != weight_b)
        return weight_a < weight_b ? -1 : 1;
    if (a->operand.group_begin != b->operand.group_begin)
        return a->operand.group_begin < b->operand.group_begin ? -1 : 1;
    if (a->operand.groups != b->operand.groups)
        return a->operand.groups < b->operand.groups ? -1 : 1;
    if (a->kernel != b->kernel)
        return a->kernel < b->kernel ? -1 : 1;
    return 0;
}

// Heap sort: no recursion and no bad case, for thousands of one-token requests.
static void sift_down(const struct cuda_segment *segments, uint32_t *order, uint32_t root,
                      uint32_t n)
{
    for (uint32_t child; (child = 2 * root + 1) < n; root = child) {
        if (child + 1 < n && compare(&segments[order[child]], &segments[order[child + 1]]) < 0)
            child++;
        if (compare(&segments[order[root]], &segments[order[child]]) >= 0)
            return;
        uint32_t swap = order[root];
        order[root] = order[child];
        order[child] = swap;
    }
}

static uint32_t sort_segments(const struct cuda_segment *segments, uint32_t segments_n,
                              uint32_t *order)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < segments_n; i++)
        if (segments[i].operand.tokens > 0 && segments[i].operand.groups > 0)
            order[n++] = i;
    for (uint32_t root = n / 2; root-- > 0;)
        sift_down(segments, order, root, n);
    for (uint32_t last = n; last-- > 1;) {
        uint32_t swap = order[0];
        order[0] = order[last];
        order[last] = swap;
        sift_down(segments, order, 0, last);
    }
    return n;
}

static void fill_rows(const struct cuda_segment *segment, struct cuda_row *rows)
{
    const struct einsum_operand *operand = &segment->operand;
    const struct einsum_weight_format *format = &segment->weight->format;
    struct einsum_scale_strides strides = einsum_scale_strides(format, operand);
    // From token to token and from group to group, in rows of R bytes.
    bool gtr = operand->activation_layout == EINSUM_ACTIVATIONS_GTR;
    uint32_t in_place = operand->activation_layout == EINSUM_ACTIVATIONS_IN_PLACE ? 2 : 1;
    uint32_t token_rows = gtr ? 1 : operand->groups * in_place;
    uint32_t group_rows = gtr ? operand->tokens : in_place;
    uint64_t activation_step = token_rows * (uint64_t)format->reduced_dim;
    uint64_t output_step = (uint64_t)operand->groups * format->output_dim *
                           einsum_output_element_bytes(operand->output_type);
    struct cuda_row row = {
        .activations = (uint64_t)(uintptr_t)operand->activations,
        .scales = (uint64_t)(uintptr_t)operand->scales,
        .output = (uint64_t)(uintptr_t)operand->output,
        .activation_group = group_rows,
        .scale_group = (uint32_t)strides.group,
        .scale_word = (uint32_t)strides.word,
        .scale_byte = (uint32_t)strides.byte,
        .flags = (operand->scale_type == EINSUM_SCALE_FP32 ? CUDA_ROW_SCALES_FP32 : 0) |
                 (operand->output_type == EINSUM_OUTPUT_FP32 ? CUDA_ROW_OUTPUT_FP32 : 0),
    };
    for (uint32_t t = 0; t < operand->tokens; t++) {
        rows[t] = row;
        row.activations += activation_step;
        row.scales += strides.token;
        row.output += output_step;
    }
}

static void add_attention(struct cuda_table *table, struct cuda_attention *spans,
                          const struct cuda_segment *segment)
{
    const struct einsum_operand *operand = &segment->operand;
    spans[table->attention_spans++] = (struct cuda_attention){
        .rows = (uint64_t)(uintptr_t)operand->activations,
        .rotations = (uint64_t)(uintptr_t)operand->rotations,
        .row_begin = table->attention_rows,
        .groups = operand->groups,
        .reduced_dim = segment->weight->format.reduced_dim,
        .block_r = segment->weight->format.block_r,
    };
    table->attention_rows += operand->tokens * operand->groups;
}

static uint32_t log2_of(uint32_t power_of_two)
{
    uint32_t log2 = 0;
    while ((uint32_t)1 << log2 < power_of_two)
        log2++;
    return log2;
}

static uint32_t tiles_offset(const struct cuda_weight *weight)
{
    return (uint32_t)((uint64_t)(weight->tiles - weight->elements) / CUDA_MANY_TILE_BYTES);
}

// All the segments of one reading, as far as the weight goes.
static struct cuda_run run_of(const struct cuda_segment *segment, bool all_ue8m0)
{
    const struct cuda_weight *weight = segment->weight;
    return (struct cuda_run){
        .elements = (uint64_t)(uintptr_t)weight->elements,
        .scales = (uint64_t)(uintptr_t)weight->scales,
        .wide = (uint64_t)(uintptr_t)weight->wide,
        .output_dim = weight->format.output_dim,
        .reduced_dim = weight->format.reduced_dim,
        .group_begin = segment->operand.group_begin,
        .groups = segment->operand.groups,
        .mode = (uint16_t)cuda_mode_of(&weight->format,
                                       all_ue8m0 ? EINSUM_SCALE_UE8M0 : EINSUM_SCALE_FP32),
        .block_d_log2 = (uint16_t)log2_of(weight->format.block_d),
        .scales_fp32 = weight->format.scale_type == EINSUM_SCALE_FP32,
        .tiles = weight->tiles ? tiles_offset(weight) : 0,
    };
}

static uint32_t divide_up(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

// The segments of one reading of a weight, or what they become.
struct reading {
    enum cuda_kernel kernel;
    struct cuda_run run; // row_begin, rows: all their tokens
};

static void add_decode_runs(const struct cuda_bucket *bucket, struct cuda_table *table,
                            struct cuda_run run)
{
    uint32_t rows = run.rows;
    for (uint32_t done = 0; done < rows; done += run.rows, run.row_begin += run.rows) {
        run.rows = rows - done < bucket->decode_tokens ? rows - done : bucket->decode_tokens;
        table->runs[table->decode_runs++] = run;
    }
}

// How many warps can share a panel: each reads another block of a chunk of activations (decode.cuh).
static uint32_t warps_k_max(const struct cuda_bucket *bucket, const struct cuda_run *run)
{
    // Kernels have code for 8 tokens and for all; nothing between.
    uint32_t tokens = run->rows <= 8 ? 8 : bucket->decode_tokens;
    if (tokens > 32)
        return 1; // long tiles: activations cost more to read again
    uint32_t pairs = bucket->decode_tokens <= 8 ? CUDA_DECODE_PAIRS_FEW : CUDA_DECODE_PAIRS;
    uint32_t blocks = pairs / tokens;
    if (run->mode == CUDA_MODE_FP32_32)
        blocks /= 2;
    return blocks < CUDA_DECODE_WARPS ? blocks : CUDA_DECODE_WARPS;
}

// Cuts runs into tiles of 128 rows over the warps that share a panel. Returns how many tiles.
static uint32_t cut_streamed_runs(const struct cuda_bucket *bucket, struct cuda_run *runs,
                                  uint32_t n, uint32_t warps_k, uint32_t *units)
{
    uint32_t tiles = 0;
    *units = 0;
    for (uint32_t i = 0; i < n; i++) {
        struct cuda_run *run = &runs[i];
        uint32_t most = warps_k_max(bucket, run);
        uint32_t share = 1; // of the panel
        while (2 * share <= warps_k && 2 * share <= most)
            share *= 2;
        run->warps_k_log2 = log2_of(share);
        run->tiles_d = divide_up(run->output_dim, CUDA_DECODE_WARPS * CUDA_PANEL_ROWS / share);
        run->tile_units = divide_up(run->reduced_dim / CUDA_K_BLOCK, share);
        run->unit_begin = *units;
        tiles += run->groups * run->tiles_d;
        *units += run->groups * run->tiles_d * run->tile_units;
    }
    return tiles;
}

static void add_prefill_run(struct cuda_table *table, struct cuda_run run)
{
    run.tiles_d = divide_up(run.output_dim, CUDA_PREFILL_ROWS);
    run.tile_units = 1;
    run.unit_begin = table->prefill_tiles;
    table->prefill_tiles += run.groups * run.tiles_d * divide_up(run.rows, CUDA_PREFILL_TOKENS);
    table->runs[table->decode_runs + table->prefill_runs++] = run;
}

static void add_hopper_run(const struct cuda_bucket *bucket, struct cuda_table *table,
                           struct cuda_run run)
{
    if (bucket->hopper_warps_k == 0) {
        run.tiles_d = divide_up(run.output_dim, bucket->hopper_rows);
        run.tile_units = run.reduced_dim / CUDA_K_BLOCK;
        run.unit_begin = table->hopper_units;
        table->hopper_units +=
            run.groups * run.tiles_d * divide_up(run.rows, bucket->hopper_tokens) * run.tile_units;
    }
    table->runs[table_runs(table)] = run;
    table->hopper_runs++;
}

// Long tiles read less for each product; short ones fill the device with fewer tokens. They take some
// 11/20 of a long one's time.
static uint32_t many_tile_tokens(const struct cuda_bucket *bucket, const struct cuda_run *run)
{
    enum { LONG_COST = 20, SHORT_COST = 11 };
    if (bucket->many_tokens < CUDA_MANY_TOKENS)
        return bucket->many_tokens;
    uint32_t clusters = bucket->many_blocks / bucket->many_cluster;
    uint32_t across = run->groups * divide_up(run->tiles_d, bucket->many_cluster);
    uint32_t long_tiles = across * divide_up(run->rows, CUDA_MANY_TOKENS);
    uint32_t short_tiles = across * divide_up(run->rows, CUDA_MANY_TOKENS / 2);
    bool short_ones =
        divide_up(short_tiles, clusters) * SHORT_COST < divide_up(long_tiles, clusters) * LONG_COST;
    return short_ones ? CUDA_MANY_TOKENS / 2 : CUDA_MANY_TOKENS;
}

// A tile here is what a cluster of thread blocks computes side by side.
static void add_many_run(const struct cuda_bucket *bucket, struct cuda_table *table,
                         struct cuda_run run)
{
    run.tiles_d = run.output_dim / bucket->many_rows;
    run.tile_units = many_tile_tokens(bucket, &run);
    run.unit_begin = table->many_tiles;
    table->many_tiles += run.groups * divide_up(run.tiles_d, bucket->many_cluster) *
                         divide_up(run.rows, run.tile_units);
    table->runs[table_runs(table)] = run;
    table->many_runs++;
}

// 0 if the runs' tiles are not all equally long.
static uint32_t tile_units_of(const struct cuda_run *runs, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++)
        if (runs[i].tile_units != runs[0].tile_units)
            return 0;
    return runs[0].tile_units;
}

// As many workers as the device holds, or fewer if then no tile, or a half of each, falls to one
// worker: sums across workers cost more than idle places, which the next launch fills.
static uint32_t choose_workers(uint32_t most, uint32_t units, uint32_t tile_units)
{
    if (units <= most)
        return units;
    if (tile_units == 0)
        return most;
    uint32_t tiles = units / tile_units;
    if (tiles <= most / 2 && tile_units % 2 == 0)
        return 2 * tiles;
    for (uint32_t workers = most; workers >= most - most / 16; workers--)
        if (tiles % workers == 0)
            return workers;
    return most;
}

// Whole tiles if they about fill the device or are short.
static uint32_t choose_stream_workers(uint32_t most, uint32_t tiles, uint32_t units,
                                      uint32_t tile_units)
{
    if (tile_units > 0 && tiles <= most && (tile_units <= 8 || tiles >= most / 4 * 3))
        return tiles;
    return choose_workers(most, units, tile_units);
}

// Tiles of as few rows as it takes to fill the device with whole ones: at the seam of two tiles a worker
// waits for activations.
static void deal_decode(const struct cuda_bucket *bucket, struct cuda_table *table)
{
    uint32_t most = bucket->decode_workers, n = table->decode_runs;
    uint32_t warps_k = 1;
    uint32_t tiles = cut_streamed_runs(bucket, table->runs, n, warps_k, &table->decode_units);
    while (tiles < most / 4 * 3 && warps_k < CUDA_DECODE_WARPS) {
        warps_k *= 2;
        tiles = cut_streamed_runs(bucket, table->runs, n, warps_k, &table->decode_units);
    }
    table->decode_workers =
        choose_stream_workers(most, tiles, table->decode_units, tile_units_of(table->runs, n));
}

// Tiles in turn, if that leaves few places idle in the last round.
static void deal_hopper(const struct cuda_bucket *bucket, struct cuda_table *table,
                        struct cuda_run *runs)
{
    uint32_t most = bucket->hopper_workers, units = table->hopper_units;
    if (bucket->hopper_warps_k > 0) {
        uint32_t n = table->hopper_runs;
        uint32_t tiles =
            cut_streamed_runs(bucket, runs, n, bucket->hopper_warps_k, &table->hopper_units);
        for (uint32_t i = 0; i < n; i++)
            runs[i].workers =
                choose_stream_workers(most, tiles, table->hopper_units, tile_units_of(runs, n));
        return;
    }
    uint32_t tile_units = tile_units_of(runs, table->hopper_runs);
    uint32_t tiles = tile_units > 0 ? units / tile_units : 0;
    uint32_t places = divide_up(tiles, most) * most;
    bool whole = tiles > 0 && tiles >= places - places / CUDA_HOPPER_IDLE_FRACTION;
    uint32_t workers = whole ? most : choose_workers(most, units, tile_units);
    for (uint32_t i = 0; i < table->hopper_runs; i++) {
        runs[i].workers = workers;
        runs[i].whole_tiles = whole;
    }
}

// Tiles are not cut along R, so that each takes as long however few there are: half as many as there are
// places are faster than hopper.cu's, which are cut to fill all. A quarter is not.
bool cuda_bucket_takes_many(const struct cuda_bucket *bucket,
                            const struct einsum_weight_format *format, uint32_t groups,
                            uint64_t tokens)
{
    if (!cuda_bucket_has_many(bucket) || tokens < bucket->many_from)
        return false;
    uint32_t tiles = groups * (format->output_dim / bucket->many_rows);
    return tokens >= CUDA_HOPPER_MANY_TOKENS_ANYHOW || 5 * tiles >= 2 * bucket->many_blocks;
}

// `alone`: one segment, which so has a map. Without one tiles take longer than streaming up to 32 tokens.
static enum cuda_kernel choose_kernel(const struct cuda_bucket *bucket,
                                      const struct cuda_segment *segment, uint32_t tokens,
                                      bool alone)
{
    const struct einsum_weight_format *format = &segment->weight->format;
    bool hopper = bucket->hopper_workers > 0 && einsum_hopper_takes(format);
    enum cuda_kernel kernel = segment->kernel;
    if (kernel == CUDA_KERNEL_AUTO || (kernel == CUDA_KERNEL_HOPPER && !hopper))
        kernel = cuda_kernel_for(format, tokens, bucket->prefill_from, bucket->hopper_from);
    bool many = segment->weight->tiles && (alone || tokens >= CUDA_HOPPER_MANY_TOKENS_MIN) &&
                cuda_bucket_takes_many(bucket, format, segment->operand.groups, tokens);
    return kernel == CUDA_KERNEL_HOPPER && many ? CUDA_KERNEL_HOPPER_MANY : kernel;
}

// The segments order[begin, end) of one weight and group range, whose tokens are rows from `row`.
static uint32_t read_together(const struct cuda_bucket *bucket, const struct cuda_segment *segments,
                              const uint32_t *order, uint32_t n, uint32_t begin, uint32_t row,
                              struct reading *reading)
{
    const struct cuda_segment *first = &segments[order[begin]];
    uint32_t end = begin, tokens = 0;
    bool all_ue8m0 = true;
    for (; end < n && compare(first, &segments[order[end]]) == 0; end++) {
        tokens += segments[order[end]].operand.tokens;
        all_ue8m0 &= segments[order[end]].operand.scale_type == EINSUM_SCALE_UE8M0;
    }
    reading->kernel = choose_kernel(bucket, first, tokens, end == begin + 1);
    reading->run = run_of(first, all_ue8m0);
    reading->run.row_begin = row;
    reading->run.rows = tokens;
    return end;
}

// All runs of one kernel; they stand side by side.
static void add_runs(const struct cuda_bucket *bucket, const struct cuda_segment *segments,
                     const uint32_t *order, uint32_t n, enum cuda_kernel kernel,
                     struct cuda_table *table)
{
    struct reading reading;
    for (uint32_t begin = 0, row = 0; begin < n; row += reading.run.rows) {
        begin = read_together(bucket, segments, order, n, begin, row, &reading);
        if (reading.kernel != kernel)
            continue;
        if (kernel == CUDA_KERNEL_DECODE)
            add_decode_runs(bucket, table, reading.run);
        else if (kernel == CUDA_KERNEL_PREFILL)
            add_prefill_run(table, reading.run);
        else if (kernel == CUDA_KERNEL_HOPPER)
            add_hopper_run(bucket, table, reading.run);
        else
            add_many_run(bucket, table, reading.run);
    }
}

// Where a walk over all rows meets Hopper's many.
struct many_walk {
    const struct cuda_run *run, *end;
};

static struct many_walk many_walk_of(const struct cuda_table *table)
{
    const struct cuda_run *end = table->runs + table_runs(table);
    return (struct many_walk){.run = end - table->many_runs, .end = end};
}

// Whether a segment gets a map. To be asked of all, in the rows' order.
static bool takes_map(const struct cuda_bucket *bucket, struct many_walk *walk, uint32_t row,
                      uint32_t tokens)
{
    while (walk->run < walk->end && row >= walk->run->row_begin + walk->run->rows)
        walk->run++;
    return walk->run < walk->end && row >= walk->run->row_begin && tokens >= map_tokens_min(bucket);
}

static uint32_t count_maps(const struct cuda_bucket *bucket, const struct cuda_segment *segments,
                           const uint32_t *order, uint32_t n, const struct cuda_table *table)
{
    struct many_walk walk = many_walk_of(table);
    uint32_t maps = 0, row = 0;
    for (uint32_t i = 0; bucket->many_map && i < n; i++) {
        uint32_t tokens = segments[order[i]].operand.tokens;
        maps += takes_map(bucket, &walk, row, tokens);
        row += tokens;
    }
    return maps;
}

// Of one segment, whose rows are filled. `at`: in maps from the table's start.
static void add_map(const struct cuda_bucket *bucket, const struct cuda_segment *segment,
                    struct cuda_table *table, uint32_t at, uint32_t row_begin)
{
    const struct einsum_operand *operand = &segment->operand;
    struct cuda_row *rows =
        (struct cuda_row *)((unsigned char *)table + table->rows_offset) + row_begin;
    struct cuda_map *map = (struct cuda_map *)table + at;
    *map = (struct cuda_map){.row_begin = row_begin};
    if (bucket->many_map(map, rows, operand->tokens, operand->groups,
                         segment->weight->format.reduced_dim))
        for (uint32_t t = 0; t < operand->tokens; t++)
            rows[t].map = at;
}

// And their maps, from `map` on, in maps from the table's start.
static void fill_all_rows(const struct cuda_bucket *bucket, const struct cuda_segment *segments,
                          const uint32_t *order, uint32_t n, struct cuda_table *table, uint32_t map)
{
    struct many_walk walk = many_walk_of(table);
    struct cuda_row *rows = (struct cuda_row *)((unsigned char *)table + table->rows_offset);
    uint32_t row = 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct cuda_segment *segment = &segments[order[i]];
        fill_rows(segment, rows + row);
        if (bucket->many_map && takes_map(bucket, &walk, row, segment->operand.tokens))
            add_map(bucket, segment, table, map++, row);
        row += segment->operand.tokens;
    }
}

void cuda_table_build(const struct cuda_bucket *bucket, const struct cuda_segment *segments,
                      uint32_t segments_n, uint32_t *order, struct cuda_table *table)
{
    memset(table, 0, sizeof *table);
    uint32_t n = sort_segments(segments, segments_n, order);
    add_runs(bucket, segments, order, n, CUDA_KERNEL_DECODE, table);
    if (table->decode_runs > 0)
        deal_decode(bucket, table);
    add_runs(bucket, segments, order, n, CUDA_KERNEL_PREFILL, table);
    add_runs(bucket, segments, order, n, CUDA_KERNEL_HOPPER, table);
    if (table->hopper_runs > 0)
        deal_hopper(bucket, table, &table->runs[table->decode_runs + table->prefill_runs]);
    add_runs(bucket, segments, order, n, CUDA_KERNEL_HOPPER_MANY, table);

    uint64_t runs_end = sizeof *table + table_runs(table) * sizeof(struct cuda_run);
    uint32_t maps = count_maps(bucket, segments, order, n, table);
    uint32_t maps_begin = divide_up((uint32_t)runs_end, sizeof(struct cuda_map));
    struct cuda_attention *spans =
        (struct cuda_attention *)((unsigned char *)table +
                                  (maps ? (maps_begin + maps) * sizeof(struct cuda_map)
                                        : runs_end));
    for (uint32_t i = 0; i < n; i++)
        if (segments[order[i]].operand.rotations)
            add_attention(table, spans, &segments[order[i]]);
    table->rows_offset =
        (uint32_t)((unsigned char *)&spans[table->attention_spans] - (unsigned char *)table);
    fill_all_rows(bucket, segments, order, n, table, maps_begin);
}

static uint32_t decode_launch(const struct cuda_table *table)
{
    uint32_t launch = 0;
    for (uint32_t i = 0; i < table->decode_runs; i++)
        launch |= table->runs[i].mode == CUDA_MODE_UE8M0_128  ? CUDA_LAUNCH_DECODE_UE8M0
                  : table->runs[i].mode == CUDA_MODE_FP32_128 ? CUDA_LAUNCH_DECODE_FP32
                                                              : CUDA_LAUNCH_DECODE;
    return launch;
}

uint32_t cuda_table_launches(const struct cuda_table *table)
{
    return (table->attention_spans > 0 ? CUDA_LAUNCH_ATTENTION : 0) | decode_launch(table) |
           (table->prefill_runs > 0 ? CUDA_LAUNCH_PREFILL : 0) |
           (table->hopper_runs > 0 ? CUDA_LAUNCH_HOPPER : 0) |
           (table->many_runs > 0 ? CUDA_LAUNCH_HOPPER_MANY : 0);
}
