// The arm for SM 9.0 where a weight's tiles are computed whole, both operands from shared memory: weights
// in blocks of 128 x 128. Of many tokens (hopper_many.cu) the tensor cores are what is short, of some
// (hopper_some.cu) the memory.
//
//     copies     1 warp     activations by the request's map, the weight's rows as they lie in memory
//     scales     3 warps    those of A times those of W, as floats
//        |  ring of stages, K = 128 each:  A: boxes of 64 tokens, swizzled   W: OUTPUTS rows, swizzled
//     consumers  groups of 4 warps, each every so manieth box, with all of the tile's outputs
//
// The thread blocks of a cluster compute neighbouring tiles of the same tokens: each brings its part of the
// activations for all, so that L2 is read for less. A stage is free when all are done with it. A group
// scales its sums of K = 128 of one box while the tensor cores work for the other group.
//
// A tile whose tokens come from several requests is copied row by row, by all producers. Producers run
// ahead across tiles, and note for the consumers what they need to store one.
//
// Scales that are not narrow become NaN here: an output that is NaN is looked at again, and computed in
// FP64 if it should not be.
//
// Included once for each size of tile, after an enum of TOKENS (of a tile, at most), OUTPUTS (64 or 128),
// STAGES, CLUSTER (thread blocks) and BLOCKS (that fit an SM).
#pragma once

#include "copy.cuh"
#include "line.cuh"
#include "mma.cuh"
#include "scales.cuh"
#include "wgmma.cuh"
#include "wide.cuh"

namespace
{

enum {
    PRODUCERS = 128, // threads
    GROUP = 128,     // of a group of consumers
    GROUPS = (int)TOKENS > (int)CUDA_MANY_BOX ? 2 : 1,
    CONSUMERS = GROUPS * GROUP,
    THREADS = PRODUCERS + CONSUMERS,
    PRODUCER_REGISTERS = 88,
    CONSUMER_REGISTERS = 208,
    NOTES = STAGES + 1, // tiles of one stage each, and the one that is being stored
    SUMS = OUTPUTS / 2, // of a thread, of one box
    W_BYTES = OUTPUTS * CUDA_K_BLOCK,
    BOX = CUDA_MANY_BOX,
    BOX_BYTES = BOX * CUDA_K_BLOCK,
    BOXES = TOKENS / BOX / GROUPS,            // of a group
    READERS = PRODUCERS - 32,                 // of scales
    SLOTS = (TOKENS + READERS - 1) / READERS, // tokens of one
    BARRIER_PRODUCERS = 1,
    BARRIER_GROUP = 2, // and the next
};

// What a cluster does next, as one of its blocks sees it.
struct tile {
    uint32_t run, g;
    uint32_t d_tile; // of OUTPUTS
    uint32_t token_begin, tokens;
    uint32_t units; // steps along R
    uint32_t map;   // of the only segment; 0: activations come row by row
    bool idle;      // only other blocks of the cluster have outputs
};

// What the consumers are told of a tile, so that they wait for no memory.
struct note {
    const cuda_row *rows;
    uint64_t output, output_step; // of tokens that have a map
    uint64_t output_at;           // of the tile's first output, in elements
    uint32_t run, g, d_tile;
    uint32_t tokens; // that have outputs here
    uint32_t boxes;  // of the tile
    uint32_t units;
    bool mapped, fp32, wide; // wide: some of the weight's rows are
};

struct many_smem {
    struct {
        uint8_t a[TOKENS * CUDA_K_BLOCK];
        uint8_t w[W_BYTES];
    } stages[STAGES];
    uint8_t staging[CONSUMERS / 32][16 * 128]; // of outputs
    float scales[STAGES][TOKENS];              // of A times W
    const uint8_t *activations[TOKENS];        // of the producers' tile, where copied row by row
    note notes[NOTES];
    uint64_t full[STAGES], empty[STAGES];
};

// A cluster's tiles, in order.
struct walk {
    const cuda_table *table;
    uint32_t first_run, next, step_by;

    __device__ __forceinline__ void start(const cuda_table *t)
    {
        table = t;
        first_run = t->decode_runs + t->prefill_runs + t->hopper_runs;
        next = blockIdx.x / CLUSTER;
        step_by = gridDim.x / CLUSTER;
    }

    __device__ __forceinline__ const cuda_row *rows_of(const tile &t) const
    {
        return (const cuda_row *)((const uint8_t *)table + table->rows_offset) +
               table->runs[t.run].row_begin + t.token_begin;
    }

    __device__ __forceinline__ bool step(tile &t)
    {
        if (next >= table->many_tiles)
            return false;
        uint32_t run = first_run + find_run(table->runs + first_run, table->many_runs, next);
        const cuda_run &r = table->runs[run];
        uint32_t at = next - r.unit_begin;
        uint32_t across = (r.tiles_d + CLUSTER - 1) / CLUSTER;
        uint32_t along = (r.rows + r.tile_units - 1) / r.tile_units;
        uint32_t d_tile = at % across * CLUSTER + cluster_rank();
        t.run = run;
        t.idle = d_tile >= r.tiles_d;
        t.d_tile = min(d_tile, r.tiles_d - 1);
        t.token_begin = at / across % along * r.tile_units;
        t.tokens = min(r.rows - t.token_begin, r.tile_units);
        t.units = r.reduced_dim / CUDA_K_BLOCK;
        t.g = at / across / along;
        const cuda_row *rows = rows_of(t);
        t.map = rows[t.tokens - 1].map == rows[0].map ? rows[0].map : 0;
        next += step_by;
        return true;
    }
};

// ---- producers

// Notes where the rows of a tile lie, before any is copied. All producers.
__device__ __forceinline__ void find_activations(many_smem &smem, const walk &walk, const tile &t)
{
    const cuda_row *rows = walk.rows_of(t);
    uint64_t group = (uint64_t)t.g * t.units * CUDA_K_BLOCK;
    sync_some(BARRIER_PRODUCERS, PRODUCERS); // the tile before is copied
    for (uint32_t i = threadIdx.x; i < t.tokens; i += PRODUCERS)
        smem.activations[i] =
            (const uint8_t *)rows[i].activations + group * rows[i].activation_group;
    sync_some(BARRIER_PRODUCERS, PRODUCERS);
}

// Tokens that are none are not copied: whatever lies there meets no output but theirs.
__device__ __forceinline__ void copy_rows(many_smem &smem, const tile &t, uint32_t unit,
                                          uint32_t stage)
{
    uint32_t to = shared_address(smem.stages[stage].a), chunk = threadIdx.x % 8;
#pragma unroll 4
    for (uint32_t i = threadIdx.x / 8; i < t.tokens; i += PRODUCERS / 8)
        copy_async(to + i * CUDA_K_BLOCK + (chunk ^ (i % 8)) * 16,
                   smem.activations[i] + unit * CUDA_K_BLOCK + chunk * 16, true);
    barrier_arrive_after_copies(shared_address(&smem.full[stage]));
}

// A producer's part of a stage; of rows that it has copied they tell themselves.
__device__ __forceinline__ void hand_over(many_smem &smem, const tile &t, uint32_t stage)
{
    barrier_arrive(shared_address(&smem.full[stage]), t.map != 0 ? 2 : 1);
}

template <int BYTES> struct flags_of;
template <> struct flags_of<2> {
    using type = uint16_t;
};
template <> struct flags_of<4> {
    using type = uint32_t;
};
using wide_flags = flags_of<OUTPUTS / CUDA_WIDE_ROWS>::type; // of a tile, a byte each

__device__ __forceinline__ note note_of(const walk &walk, const tile &t)
{
    const cuda_run &run = walk.table->runs[t.run];
    const cuda_row *rows = walk.rows_of(t);
    uint32_t row = (run.group_begin + t.g) * run.tiles_d + t.d_tile; // of OUTPUTS
    return {
        .rows = rows,
        .output = rows[0].output,
        .output_step = t.tokens > 1 ? rows[1].output - rows[0].output : 0,
        .output_at = (uint64_t)t.g * run.output_dim + t.d_tile * OUTPUTS,
        .run = t.run,
        .g = t.g,
        .d_tile = t.d_tile,
        .tokens = t.idle ? 0 : t.tokens,
        .boxes = (t.tokens + BOX - 1) / BOX,
        .units = t.units,
        .mapped = t.map != 0,
        .fp32 = (rows[0].flags & CUDA_ROW_OUTPUT_FP32) != 0,
        .wide = ((const wide_flags *)run.wide)[row] != 0,
    };
}

// By one thread: what comes without any other's help.
struct copier {
    const cuda_map *map;
    const uint8_t *from_w;
    uint32_t boxes, first_token;

    __device__ __forceinline__ void open(const walk &walk, const tile &t)
    {
        const cuda_run &run = walk.table->runs[t.run];
        uint64_t row = (uint64_t)(run.group_begin + t.g) * run.output_dim + t.d_tile * OUTPUTS;
        from_w = (const uint8_t *)run.elements +
                 (run.tiles + row / CUDA_MANY_ROWS * t.units) * CUDA_MANY_TILE_BYTES +
                 row % CUDA_MANY_ROWS * CUDA_K_BLOCK;
        map = (const cuda_map *)walk.table + t.map;
        boxes = t.map != 0 ? (t.tokens + BOX - 1) / BOX : 0;
        first_token = t.map != 0 ? run.row_begin + t.token_begin - map->row_begin : 0;
    }

    __device__ __forceinline__ void copy(many_smem &smem, uint32_t g, uint32_t unit, uint32_t stage,
                                         uint32_t rank) const
    {
        constexpr uint16_t ALL = (1 << CLUSTER) - 1;
        uint32_t full = shared_address(&smem.full[stage]);
        barrier_expect(full, W_BYTES + boxes * BOX_BYTES);
        uint32_t to = shared_address(smem.stages[stage].a);
        // By turns, since boxes may be fewer than blocks or not divide among them.
        for (uint32_t box = (rank + unit) % CLUSTER; box < boxes; box += CLUSTER)
            copy_box(to + box * BOX_BYTES, map, unit * CUDA_K_BLOCK, first_token + box * BOX, g,
                     full, ALL);
        copy_bulk(shared_address(smem.stages[stage].w),
                  from_w + (uint64_t)unit * CUDA_MANY_TILE_BYTES, W_BYTES, full);
    }
};

// One warp.
__device__ __forceinline__ void produce_copies(many_smem &smem, const cuda_table *table)
{
    walk walk;
    tile now, next;
    walk.start(table);
    bool more = walk.step(now), one = threadIdx.x == 0;
    uint32_t rank = cluster_rank(), map_fenced = 0;
    note noted;
    copier copier;
    if (more) {
        noted = note_of(walk, now);
        copier.open(walk, now);
    }
    for (uint32_t n = 0, count = 0; more; n++) {
        if (now.map == 0)
            find_activations(smem, walk, now);
        else if (one && now.map != map_fenced)
            fence_for_map(copier.map);
        map_fenced = now.map;
        note noted_next;
        struct copier copier_next;
#pragma unroll 1
        for (uint32_t unit = 0; unit < now.units; unit++, count++) {
            uint32_t stage = count % STAGES;
            barrier_wait(shared_address(&smem.empty[stage]), count / STAGES % 2 ^ 1);
            if (one) {
                if (unit == 0)
                    smem.notes[n % NOTES] = noted;
                copier.copy(smem, now.g, unit, stage, rank);
            }
            if (now.map == 0)
                copy_rows(smem, now, unit, stage);
            hand_over(smem, now, stage);
            if (unit > 0)
                continue;
            more = walk.step(next); // while there is time
            if (more) {
                noted_next = note_of(walk, next);
                copier_next.open(walk, next);
            }
        }
        now = next;
        noted = noted_next;
        copier = copier_next;
    }
}

// The scales of four steps of one token, or of W.
struct four_scales {
    uint32_t raw[4]; // as stored: four FP32 or UE8M0 or, of `words`, four UE8M0 in the first
    bool fp32, words;

    // `padded`: that words may be read.
    __device__ __forceinline__ void load(const token_scales &from, bool padded, uint32_t unit,
                                         uint32_t units)
    {
        fp32 = from.fp32;
        words = padded && !from.fp32;
        const uint8_t *at = from.at + (uint64_t)(unit / 4) * from.word;
        if (words)
            raw[0] = __ldg((const uint32_t *)at);
        else
#pragma unroll
            for (uint32_t i = 0; i < 4; i++, at += from.byte)
                if (unit + i < units)
                    raw[i] = fp32 ? __ldg((const uint32_t *)at) : __ldg(at);
    }

    // NaN if it is not narrow.
    __device__ __forceinline__ float value(uint32_t i) const
    {
        uint32_t code = words ? raw[0] >> (8 * i) & 0xFF : raw[i];
        bool wide = fp32 ? fp32_is_wide(code) : ue8m0_is_wide(code);
        float value = fp32 ? __uint_as_float(code) : ue8m0_value(code);
        return wide ? __uint_as_float(0x7FC00000) : value;
    }
};

// Where the scales of a tile lie, as far as one thread reads them.
struct scale_sources {
    token_scales w, a[SLOTS];
    uint32_t slots;

    __device__ __forceinline__ void open(const walk &walk, const tile &t)
    {
        const cuda_run &run = walk.table->runs[t.run];
        const cuda_row *rows = walk.rows_of(t);
        uint32_t reader = threadIdx.x - 32, bytes = run.scales_fp32 ? 4 : 1;
        uint64_t row = ((uint64_t)(run.group_begin + t.g) * run.tiles_d + t.d_tile) * OUTPUTS;
        w = {weight_scales(run, CUDA_K_BLOCK, row), 4 * bytes, bytes, run.scales_fp32 != 0};
        slots = reader < t.tokens ? (t.tokens - reader - 1) / READERS + 1 : 0;
#pragma unroll
        for (uint32_t i = 0; i < SLOTS; i++)
            if (i < slots)
                a[i] = scales_of(rows[reader + i * READERS], t.g);
    }
};

// Three warps. The ring is long enough to hide that they wait for memory once in four steps.
__device__ __forceinline__ void produce_scales(many_smem &smem, const cuda_table *table)
{
    walk walk;
    tile now, next;
    walk.start(table);
    bool more = walk.step(now);
    uint32_t reader = threadIdx.x - 32;
    for (uint32_t count = 0; more; now = next) {
        scale_sources from;
        from.open(walk, now);
        if (now.map == 0)
            find_activations(smem, walk, now);
#pragma unroll 1
        for (uint32_t unit = 0; unit < now.units; unit += 4) {
            four_scales w, a[SLOTS];
            w.load(from.w, true, unit, now.units);
#pragma unroll
            for (uint32_t i = 0; i < SLOTS; i++)
                if (i < from.slots)
                    a[i].load(from.a[i], now.units % 4 == 0, unit, now.units);
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                if (unit + i >= now.units)
                    break;
                uint32_t stage = count % STAGES;
                barrier_wait(shared_address(&smem.empty[stage]), count / STAGES % 2 ^ 1);
                float scale_w = w.value(i);
#pragma unroll
                for (uint32_t slot = 0; slot < SLOTS; slot++)
                    if (slot < from.slots)
                        smem.scales[stage][reader + slot * READERS] = a[slot].value(i) * scale_w;
                if (now.map == 0)
                    copy_rows(smem, now, unit + i, stage);
                hand_over(smem, now, stage);
                count++;
            }
            if (unit > 0)
                continue;
            more = walk.step(next); // while there is time
            if (more)
                for (uint32_t i = reader; i < next.tokens; i += READERS)
                    prefetch(&walk.rows_of(next)[i]);
        }
    }
}

// ---- consumers

// Of a stage that a warp has read: to all blocks' producers, since each fills all. Others' are told what
// orders nothing: there, only the copy into what has been read must follow.
__device__ __forceinline__ void release_stage(many_smem &smem, uint32_t stage, uint32_t rank)
{
    uint32_t empty = shared_address(&smem.empty[stage]), lane = threadIdx.x % 32;
    __syncwarp(); // for the arrival elsewhere, which is one for all lanes
    barrier_arrive(empty);
    if (lane < CLUSTER && lane != rank)
        barrier_arrive_at(empty, lane);
}

// N boxes of a group: its own, and those GROUPS further.
template <int N>
__device__ __forceinline__ void consume_tile(float (&acc)[BOXES][SUMS], many_smem &smem,
                                             uint32_t units, bool mapped, uint32_t group,
                                             uint32_t rank, uint32_t &count)
{
    uint32_t row = threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll 1
    for (uint32_t unit = 0; unit < units; unit++, count++) {
        uint32_t stage = count % STAGES;
        barrier_wait(shared_address(&smem.full[stage]), count / STAGES % 2);
        if (!mapped)
            fence_for_wgmma(); // here and not where it was copied, as in hopper.cu
        uint64_t w = activations_descriptor(shared_address(smem.stages[stage].w));
        uint64_t a =
            activations_descriptor(shared_address(smem.stages[stage].a) + group * BOX_BYTES);
        const float *scales = smem.scales[stage] + group * BOX + row;
        float factors[N][2];
#pragma unroll
        for (int box = 0; box < N; box++) {
            factors[box][0] = scales[box * GROUPS * BOX];
            factors[box][1] = scales[box * GROUPS * BOX + 8];
        }
        float sum[SUMS];
#pragma unroll
        for (int box = 0; box < N; box++) {
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++)
                wgmma(sum, a + box * (GROUPS * BOX_BYTES / 16) + 2 * step, w + 2 * step, step != 0);
            wgmma_commit();
            wgmma_wait<0>();
            if (box == N - 1)
                release_stage(smem, stage, rank);
#pragma unroll
            for (int i = 0; i < SUMS; i += 4) {
                acc[box][i] = fmaf(sum[i], factors[box][0], acc[box][i]);
                acc[box][i + 1] = fmaf(sum[i + 1], factors[box][0], acc[box][i + 1]);
                acc[box][i + 2] = fmaf(sum[i + 2], factors[box][1], acc[box][i + 2]);
                acc[box][i + 3] = fmaf(sum[i + 3], factors[box][1], acc[box][i + 3]);
            }
        }
    }
}

// The first of a thread's two tokens in a box; the other is 8 further.
__device__ __forceinline__ uint32_t token_of(uint32_t box)
{
    return box * BOX + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4;
}

// Where a token's outputs of the tile begin, and of which type.
__device__ __forceinline__ uint64_t output_of(const note &n, uint32_t token, bool &fp32)
{
    fp32 = n.fp32;
    uint64_t output = n.output + token * n.output_step;
    if (!n.mapped) {
        output = n.rows[token].output;
        fp32 = n.rows[token].flags & CUDA_ROW_OUTPUT_FP32;
    }
    return output + n.output_at * (fp32 ? 4 : 2);
}

// A warp's 16 tokens of a box, by way of shared memory: 64 outputs of each at a time, 128 bytes to a
// token, 16-byte pieces swizzled by token. Returns whether there are tokens for store_box_fp32.
__device__ __forceinline__ bool store_box(const float (&acc)[SUMS], uint8_t *staging, const note &n,
                                          uint32_t box)
{
    uint32_t lane = threadIdx.x % 32, first = box * BOX + threadIdx.x % GROUP / 32 * 16;
    uint64_t outputs[4]; // of every fourth token; 0: not here
    bool any_fp32 = false;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t token = first + 4 * i + lane / 8;
        bool fp32 = false;
        outputs[i] = token < n.tokens ? output_of(n, token, fp32) : 0;
        outputs[i] = fp32 ? 0 : outputs[i];
        any_fp32 |= fp32;
    }
    uint32_t to = shared_address(staging) + (lane / 8 % 2 * 8 + lane % 8) * 128;
    uint32_t from = shared_address(staging) + lane / 8 * 128;
#pragma unroll
    for (int part = 0; part < OUTPUTS / 64; part++) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) { // 16 outputs of 16 tokens
            const float *v = acc + 32 * part + 8 * i;
            store_matrices(to + ((2 * i + lane / 16) ^ lane % 8) * 16, bf16_pair(v[0], v[1]),
                           bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint4 eight = load_shared(from + i * 512 + (lane % 8 ^ (4 * i + lane / 8) % 8) * 16);
            if (outputs[i] != 0)
                ((uint4 *)outputs[i])[8 * part + lane % 8] = eight;
        }
    }
    return __any_sync(0xFFFFFFFF, any_fp32);
}

__device__ __forceinline__ void store_box_fp32(const float (&acc)[SUMS], const note &n,
                                               uint32_t box)
{
    uint32_t token = token_of(box), t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++, token += 8) {
        bool fp32 = false;
        uint64_t output = token < n.tokens ? output_of(n, token, fp32) : 0;
        if (fp32)
#pragma unroll
            for (int j = 0; j < OUTPUTS / 8; j++)
                ((float2 *)output)[4 * j + t] =
                    make_float2(acc[4 * j + 2 * half], acc[4 * j + 1 + 2 * half]);
    }
}

// Whether a sum of a token that exists is NaN.
__device__ __forceinline__ bool box_is_suspect(const float (&acc)[SUMS], uint32_t tokens,
                                               uint32_t box)
{
    bool low = false, high = false;
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
        low |= acc[i] != acc[i] || acc[i + 1] != acc[i + 1];
        high |= acc[i + 2] != acc[i + 2] || acc[i + 3] != acc[i + 3];
    }
    uint32_t token = token_of(box);
    return (low && token < tokens) || (high && token + 8 < tokens);
}

// Of a box where something was NaN or a weight is wide: over what store_box has written.
__device__ __noinline__ void store_wide(const cuda_run &run, const note &n, uint32_t box)
{
#pragma unroll 1
    for (uint32_t i = threadIdx.x % GROUP; i < BOX * OUTPUTS; i += GROUP) {
        uint32_t token = box * BOX + i / OUTPUTS, d = n.d_tile * OUTPUTS + i % OUTPUTS;
        if (token >= n.tokens)
            return;
        const cuda_row &row = n.rows[token];
        if (!(weight_is_wide(run, n.g, d) || token_is_wide(run, row, CUDA_K_BLOCK, n.g)))
            continue;
        float value = (float)wide_output(run, row, CUDA_K_BLOCK, n.g, d);
        uint64_t at = n.output_at + i % OUTPUTS;
        if (row.flags & CUDA_ROW_OUTPUT_FP32)
            ((float *)row.output)[at] = value;
        else
            ((uint16_t *)row.output)[at] = (uint16_t)bf16_pair(value, 0);
    }
}

__device__ __forceinline__ void consume(many_smem &smem, const cuda_table *table)
{
    uint32_t group = __shfl_sync(0xFFFFFFFF, threadIdx.x / GROUP - 1, 0), rank = cluster_rank();
    uint32_t tiles = table->many_tiles, count = 0;
    uint8_t *staging = smem.staging[threadIdx.x / 32 - PRODUCERS / 32];
    for (uint32_t tile = blockIdx.x / CLUSTER, n = 0; tile < tiles; tile += gridDim.x / CLUSTER) {
        barrier_wait(shared_address(&smem.full[count % STAGES]), count / STAGES % 2);
        const note &note = smem.notes[n];
        n = n + 1 == NOTES ? 0 : n + 1;
        // A group without a box multiplies whatever lies there, for no token.
        uint32_t boxes = note.boxes > GROUPS + group ? 2 : 1;
        float acc[BOXES][SUMS] = {};
        if (boxes == BOXES)
            consume_tile<BOXES>(acc, smem, note.units, note.mapped, group, rank, count);
        else
            consume_tile<1>(acc, smem, note.units, note.mapped, group, rank, count);
        bool suspect = note.wide;
#pragma unroll
        for (uint32_t i = 0; i < BOXES; i++)
            if (i < boxes) {
                uint32_t box = group + GROUPS * i;
                if (store_box(acc[i], staging, note, box))
                    store_box_fp32(acc[i], note, box);
                suspect |= box_is_suspect(acc[i], note.tokens, box);
            }
        if (sync_some_or(BARRIER_GROUP + group, GROUP, suspect))
            for (uint32_t i = 0; i < boxes; i++)
                store_wide(table->runs[note.run], note, group + GROUPS * i);
    }
}

__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, BLOCKS)
    many_kernel(const cuda_table *__restrict__ table, uint32_t table_lines)
{
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    auto &smem = *(many_smem *)shared_memory;
    let_next_kernel_start();
    if (threadIdx.x < table_lines)
        prefetch((const uint8_t *)table + threadIdx.x * 128);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&smem.full[i]), 2 * PRODUCERS);
            barrier_init(shared_address(&smem.empty[i]),
                         CONSUMERS + (CLUSTER - 1) * CONSUMERS / 32);
        }
        fence_barriers();
    }
    cluster_sync();
    if (threadIdx.x < PRODUCERS) {
        if (BLOCKS == 1)
            give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32)
            produce_copies(smem, table);
        else
            produce_scales(smem, table);
    } else {
        if (BLOCKS == 1)
            take_registers<CONSUMER_REGISTERS>();
        consume(smem, table);
    }
    __syncwarp();
    cluster_sync(); // other blocks may still write here
    end_after_kernel_ahead();
}

} // namespace

// ---- host

namespace
{

const void *const KERNEL = (const void *)many_kernel;

// How many clusters the device holds at once: some of its SMs may lack a partner.
cudaError_t clusters_at_once(int sm_count, int *clusters)
{
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = CLUSTER;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(sm_count / CLUSTER * CLUSTER);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = sizeof(many_smem);
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaOccupancyMaxActiveClusters(clusters, KERNEL, &config);
}

// One block to an SM: more would be in the next launch's way.
cudaError_t init_tiles(struct cuda_bucket *bucket, int sm_count)
{
    cudaError_t error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             sizeof(many_smem));
    int clusters = 0;
    if (error == cudaSuccess)
        error = clusters_at_once(sm_count, &clusters);
    if (clusters > sm_count / CLUSTER)
        clusters = sm_count / CLUSTER;
    bucket->many_rows = OUTPUTS;
    bucket->many_tokens = TOKENS;
    bucket->many_from =
        GROUPS == 1 ? (uint32_t)CUDA_HOPPER_TOKENS_MIN : (uint32_t)CUDA_HOPPER_MANY_TOKENS_MIN;
    bucket->many_cluster = CLUSTER;
    bucket->many_blocks = (uint32_t)clusters * CLUSTER;
    return error;
}

cudaError_t launch_tiles(const struct cuda_bucket *bucket, const struct cuda_table *table,
                         bool overlaps, cudaStream_t stream)
{
    // Of small tables all, on their way before the first is read.
    uint64_t there = cuda_table_bytes(bucket, 1) / 128;
    uint32_t table_lines = (uint32_t)(there < THREADS ? there : THREADS);
    void *arguments[] = {&table, &table_lines};
    return cuda_launch_kernel(KERNEL, bucket->many_blocks, THREADS, sizeof(many_smem), arguments,
                              overlaps, stream);
}

} // namespace
