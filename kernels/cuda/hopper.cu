// The arm for SM 9.0: wgmma of E4M3 weights in blocks of 128 along R, from a few dozen tokens of one
// weight upwards.
//
//     producer   4 warps    weights in bulk, activations piece by piece, scales as floats
//        |  ring of stages, K = 128 each:  W: 8 panels of 2 KiB as they lie in memory
//        |                                 A: tokens x 128, swizzled       scales of A
//     consumers  2 groups of 4 warps, each 64 outputs of all of the tile's tokens
//
// A consumer's sums of K = 128 leave the tensor core for FP32 registers, where they are scaled while the
// sums of the tile's next tokens are on their way. The producer runs ahead across tiles, so that a tile's
// end costs it nothing.
//
// Work is dealt in one of two ways, see table.h: whole tiles in turn, neighbours at the same time, so that
// weights and activations are shared in L2; or, where tiles are fewer than places, equal pieces of the
// line of units. Who shares a tile leaves sums in the workspace as in decode.cu.
//
// Scales that are not narrow become NaN here: an output that is NaN is looked at again, and computed in
// FP64 if it should not be.
#include "launch.h"

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
    CONSUMERS = 256,
    THREADS = PRODUCERS + CONSUMERS,
    PANEL_BYTES = 4 * CUDA_FRAGMENT_BYTES, // of a stage
    BARRIER_CONSUMERS = 1,
};

// How a launch is cut: tiles of ROWS outputs by TOKENS.
template <int TOKENS_> struct shape {
    static constexpr int TOKENS = TOKENS_, ROWS = 128, PANELS = ROWS / CUDA_PANEL_ROWS;
    static constexpr int W_BYTES = PANELS * PANEL_BYTES, A_BYTES = TOKENS * CUDA_K_BLOCK;
    static constexpr int GROUP = TOKENS / 2; // tokens that are summed together
    static constexpr int GROUPS = TOKENS / GROUP;
    static constexpr int SUMS = TOKENS / 2; // of a thread
    // Of 64 tokens two blocks fit on an SM: the next kernel's starts while this one ends.
    static constexpr bool PAIRED = TOKENS == 64;
    static constexpr int STAGES = PAIRED ? 4 : 6;
    static constexpr int CONSUMER_REGISTERS = PAIRED ? 96 : 200;
    static constexpr int PRODUCER_REGISTERS = PAIRED ? 48 : 104;
};

template <class S> struct hopper_smem {
    struct {
        uint8_t w[S::W_BYTES];
        uint8_t a[S::A_BYTES];
    } stages[S::STAGES];
    float scales[S::STAGES][S::TOKENS];    // of A; if W's blocks are 128 x 128, times W's
    const uint8_t *activations[S::TOKENS]; // of the producer's piece, if not evenly spaced
    uint64_t outputs[S::TOKENS];           // of the consumers' piece; bit 0: FP32
    uint64_t full[S::STAGES], empty[S::STAGES];
    uint32_t arrivals;
};

// What a block does next: K blocks [begin, end) of one tile.
struct piece {
    uint32_t run;
    uint32_t begin, end;
    uint32_t tile_begin; // its first unit, counted from the table's start
    uint32_t g, d_begin;
    uint32_t token_begin, tokens;
};

// A block's pieces, in order. Producer and consumers walk alike.
template <class S> struct walk {
    const cuda_table *table;
    uint32_t first_run, workers;
    bool whole;    // tiles in turn
    uint32_t next; // unit or, if whole, tile
    uint32_t end;

    __device__ __forceinline__ void start(const cuda_table *t)
    {
        table = t;
        first_run = t->decode_runs + t->prefill_runs;
        uint32_t units = t->hopper_units;
        workers = t->runs[first_run].workers;
        uint32_t tile_units = t->runs[first_run].tile_units;
        whole = t->runs[first_run].whole_tiles;
        next = whole ? blockIdx.x : unit_of(blockIdx.x, units, workers);
        end = whole ? units / tile_units : unit_of(blockIdx.x + 1, units, workers);
        if (blockIdx.x >= workers)
            end = 0;
    }

    __device__ __forceinline__ bool step(piece &p)
    {
        if (next >= end)
            return false;
        const cuda_run *runs = table->runs + first_run;
        // Tiles of all runs are equally long if they are dealt whole.
        uint32_t unit = whole ? next * runs[0].tile_units : next;
        uint32_t run = find_run(runs, table->hopper_runs, unit);
        const cuda_run &r = runs[run];
        uint32_t tile = (unit - r.unit_begin) / r.tile_units;
        uint32_t tiles_t = (r.rows + S::TOKENS - 1) / S::TOKENS;
        p.run = first_run + run;
        p.tile_begin = r.unit_begin + tile * r.tile_units;
        p.begin = unit - p.tile_begin;
        p.end = whole ? r.tile_units : min(r.tile_units, end - p.tile_begin);
        p.d_begin = tile % r.tiles_d * S::ROWS;
        p.token_begin = tile / r.tiles_d % tiles_t * S::TOKENS;
        p.tokens = min(r.rows - p.token_begin, (uint32_t)S::TOKENS);
        p.g = tile / r.tiles_d / tiles_t;
        next = whole ? next + workers : p.tile_begin + p.end;
        return true;
    }
};

__device__ __forceinline__ const cuda_row *rows_of(const cuda_table *table, const cuda_run &run,
                                                   const piece &p)
{
    return (const cuda_row *)((const uint8_t *)table + table->rows_offset) + run.row_begin +
           p.token_begin;
}

// ---- producer

// Activations of a thread: 16 bytes of every 16th token. Tokens that are none are not copied: whatever
// lies there meets no output but theirs.
template <class S> struct activation_copier {
    static constexpr int COPIES = S::TOKENS * 8 / PRODUCERS, STEP = PRODUCERS / 8;
    const uint8_t *from; // of the first
    uint64_t step;       // to the next, if evenly spaced
    uint32_t tokens;     // this thread's
    bool even;

    __device__ __forceinline__ void open(hopper_smem<S> &smem, const cuda_run &run,
                                         const cuda_row *rows, const piece &p)
    {
        uint32_t first = threadIdx.x / 8;
        tokens = first < p.tokens ? (p.tokens - first - 1) / STEP + 1 : 0;
        uint64_t group = (uint64_t)p.g * run.reduced_dim;
        uint64_t spacing = p.tokens > 1 ? rows[1].activations - rows[0].activations : 0;
        uint64_t base = rows[0].activations + group * rows[0].activation_group;
        from = (const uint8_t *)base + first * spacing + threadIdx.x % 8 * 16;
        step = STEP * spacing;
        bool same = true;
        for (uint32_t i = threadIdx.x % 8; i < tokens; i += 8) {
            const cuda_row &row = rows[first + STEP * i];
            uint64_t at = row.activations + group * row.activation_group;
            same &= at == base + (first + STEP * i) * spacing;
            smem.activations[first + STEP * i] = (const uint8_t *)at;
        }
        even = __all_sync(0xFFFFFFFF, same); // a warp copies its own tokens alone
    }

    __device__ __forceinline__ void copy(hopper_smem<S> &smem, uint32_t unit, uint32_t stage)
    {
        uint32_t first = threadIdx.x / 8;
        uint32_t to = shared_address(smem.stages[stage].a) + first * CUDA_K_BLOCK +
                      ((threadIdx.x % 8) ^ (first % 8)) * 16;
        uint32_t offset = unit * CUDA_K_BLOCK;
        if (even) {
            const uint8_t *at = from + offset;
#pragma unroll
            for (uint32_t i = 0; i < COPIES; i++, at += step)
                if (i < tokens)
                    copy_async(to + i * (STEP * CUDA_K_BLOCK), at, true);
        } else {
#pragma unroll 1
            for (uint32_t i = 0; i < tokens; i++)
                copy_async(to + i * (STEP * CUDA_K_BLOCK),
                           smem.activations[first + STEP * i] + offset + threadIdx.x % 8 * 16,
                           true);
        }
    }
};

// The scales of one token, each loaded well before its use: UE8M0 by words of four.
struct scale_reader {
    token_scales scales;
    uint32_t now, next; // words of four UE8M0, or FP32
    bool words;

    __device__ __forceinline__ uint32_t fetch(uint32_t unit) const
    {
        return words ? *(const uint32_t *)(scales.at + (uint64_t)(unit / 4) * scales.word)
                     : scales.raw(unit);
    }

    __device__ __forceinline__ void open(const cuda_row &row, const piece &p, uint32_t units)
    {
        scales = scales_of(row, p.g);
        words = !scales.fp32 && units % 4 == 0;
        now = fetch(p.begin);
        uint32_t after = words ? (p.begin | 3) + 1 : p.begin + 1;
        if (after < p.end)
            next = fetch(after);
    }

    // Of `unit`; NaN if it is not narrow. Then makes ready for the one behind it.
    __device__ __forceinline__ float take(uint32_t unit, uint32_t end)
    {
        uint32_t raw = words ? now >> (8 * (unit % 4)) & 0xFF : now;
        uint32_t ahead = unit + (words ? 5 : 2);
        if (!words || unit % 4 == 3) {
            now = next;
            if (ahead < end)
                next = fetch(ahead);
        }
        bool wide = scales.fp32 ? fp32_is_wide(raw) : ue8m0_is_wide(raw);
        float value = scales.fp32 ? __uint_as_float(raw) : ue8m0_value(raw);
        return wide ? __uint_as_float(0x7FC00000) : value;
    }
};

// SQUARE: W's blocks are 128 x 128, so that a tile needs one scale of W for each K block.
template <class S, bool SQUARE>
__device__ __forceinline__ void produce_piece(hopper_smem<S> &smem, const cuda_table *table,
                                              const piece &p, uint32_t &count)
{
    constexpr int PANELS = S::PANELS / 4; // of a warp
    const cuda_run &run = table->runs[p.run];
    const cuda_row *rows = rows_of(table, run, p);
    uint32_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    uint64_t tile_row = (uint64_t)(run.group_begin + p.g) * run.output_dim + p.d_begin;
    uint64_t panel_bytes = (uint64_t)run.reduced_dim * CUDA_PANEL_ROWS;
    uint32_t panels_left = (run.output_dim - p.d_begin) / CUDA_PANEL_ROWS;
    uint32_t panels = min(panels_left - min(panels_left, warp * PANELS), (uint32_t)PANELS);
    const uint8_t *from_w = (const uint8_t *)run.elements +
                            (tile_row / CUDA_PANEL_ROWS + warp * PANELS + lane) * panel_bytes;
    activation_copier<S> activations;
    activations.open(smem, run, rows, p);
    bool has_token = thread < p.tokens;
    scale_reader scale_a;
    if (has_token)
        scale_a.open(rows[thread], p, run.reduced_dim / CUDA_K_BLOCK);
    const uint8_t *scales_w = weight_scales(run, CUDA_K_BLOCK, tile_row);
    float scale_w = SQUARE ? weight_scale(run.scales_fp32, scales_w, p.begin) : 1;

#pragma unroll 1
    for (uint32_t unit = p.begin; unit < p.end; unit++, count++) {
        uint32_t stage = count % S::STAGES;
        uint32_t full = shared_address(&smem.full[stage]);
        barrier_wait(shared_address(&smem.empty[stage]), count / S::STAGES % 2 ^ 1);
        if (lane == 0)
            barrier_expect(full, panels * PANEL_BYTES);
        __syncwarp();
        if (lane < panels)
            copy_bulk(shared_address(smem.stages[stage].w) + (warp * PANELS + lane) * PANEL_BYTES,
                      from_w + (uint64_t)unit * PANEL_BYTES, PANEL_BYTES, full);
        activations.copy(smem, unit, stage);
        barrier_arrive_after_copies(full);
        if (has_token)
            smem.scales[stage][thread] = scale_a.take(unit, p.end) * scale_w;
        barrier_arrive(full);
        if (SQUARE && unit + 1 < p.end)
            scale_w = weight_scale(run.scales_fp32, scales_w, unit + 1);
    }
}

__device__ __forceinline__ bool is_square(const cuda_run &run)
{
    return run.block_d_log2 == 7;
}

template <class S>
__device__ __forceinline__ void produce(hopper_smem<S> &smem, const cuda_table *table)
{
    walk<S> walk;
    walk.start(table);
    uint32_t count = 0;
    piece p;
    while (walk.step(p))
        if (is_square(table->runs[p.run]))
            produce_piece<S, true>(smem, table, p, count);
        else
            produce_piece<S, false>(smem, table, p, count);
}

// ---- consumers

// What the sums of half a group's tokens are scaled by, two tokens of eight to a thread.
template <int N> struct token_factors {
    float2 of[N / 8];

    __device__ __forceinline__ void load(const float *scales)
    {
#pragma unroll
        for (int j = 0; j < N / 8; j++)
            of[j] = *(const float2 *)(scales + 8 * j + 2 * (threadIdx.x % 4));
    }
};

// acc += sum * factors * what the two rows of W are scaled by, of one half of one group of tokens.
template <int GROUP, int HALF, bool SQUARE, int SUMS, int N>
__device__ __forceinline__ void promote(float (&acc)[SUMS], const float (&sum)[N],
                                        const token_factors<N> &a, const float (&w)[2])
{
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        float *to = acc + GROUP * N + HALF * (N / 2) + 4 * j;
        const float *from = sum + HALF * (N / 2) + 4 * j;
        to[0] = fmaf(from[0], SQUARE ? a.of[j].x : a.of[j].x * w[0], to[0]);
        to[1] = fmaf(from[1], SQUARE ? a.of[j].y : a.of[j].y * w[0], to[1]);
        to[2] = fmaf(from[2], SQUARE ? a.of[j].x : a.of[j].x * w[1], to[2]);
        to[3] = fmaf(from[3], SQUARE ? a.of[j].y : a.of[j].y * w[1], to[3]);
    }
}

// SQUARE: the producer has seen to the scales of W.
template <class S, bool SQUARE>
__device__ __forceinline__ void consume_piece(float (&acc)[S::SUMS], hopper_smem<S> &smem,
                                              const cuda_run &run, const piece &p, uint32_t &count)
{
    uint32_t panel = (threadIdx.x - PRODUCERS) / 32, lane = threadIdx.x % 32;
    uint64_t tile_row = (uint64_t)(run.group_begin + p.g) * run.output_dim + p.d_begin;
    // Rows beyond D have no output; any scale that exists will do.
    uint64_t row_last = tile_row + min(run.output_dim - p.d_begin, (uint32_t)S::ROWS) - 1;
    uint64_t row = tile_row + panel * CUDA_PANEL_ROWS + lane / 4;
    const uint8_t *scales_w[2] = {weight_scales(run, CUDA_K_BLOCK, min(row, row_last)),
                                  weight_scales(run, CUDA_K_BLOCK, min(row + 8, row_last))};

#pragma unroll 1
    for (uint32_t unit = p.begin; unit < p.end; unit++, count++) {
        uint32_t stage = count % S::STAGES;
        barrier_wait(shared_address(&smem.full[stage]), count / S::STAGES % 2);
        fence_for_wgmma(); // here and not where it was copied: there the fence waits for later copies
        uint64_t a = activations_descriptor(shared_address(smem.stages[stage].a));
        float scale_w[2];
        if (!SQUARE)
#pragma unroll
            for (int i = 0; i < 2; i++)
                scale_w[i] = weight_scale(run.scales_fp32, scales_w[i], unit);
        uint32_t from = shared_address(smem.stages[stage].w) + panel * PANEL_BYTES + lane * 16;
        uint4 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[i] = load_shared(from + i * CUDA_FRAGMENT_BYTES);

        float sum[2][S::GROUP / 2];
        auto multiply = [&](auto group) {
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; step++)
                wgmma(sum[group % 2], w[step],
                      a + 2 * step + group * (S::GROUP * CUDA_K_BLOCK / 16), step != 0);
            wgmma_commit();
        };
        multiply(constant<0>{});
        unrolled<S::GROUPS>([&](auto at) {
            constexpr int group = decltype(at)::value;
            if constexpr (group + 1 < S::GROUPS)
                multiply(constant<group + 1>{});
            const float *scales_a = smem.scales[stage] + group * S::GROUP;
            token_factors<S::GROUP / 2> low, high;
            low.load(scales_a);
            wgmma_wait<(group + 1 < S::GROUPS)>();
            high.load(scales_a + S::GROUP / 2);
            promote<group, 0, SQUARE>(acc, sum[group % 2], low, scale_w);
            promote<group, 1, SQUARE>(acc, sum[group % 2], high, scale_w);
        });
        barrier_arrive(shared_address(&smem.empty[stage]));
    }
}

// Adds up what the blocks that share a tile have summed. True for the one that arrives last, whose
// acc then holds the tile's.
template <class S>
__device__ __forceinline__ bool gather(float (&acc)[S::SUMS], hopper_smem<S> &smem,
                                       const cuda_table *table, const cuda_run &run, const piece &p,
                                       uint32_t workers, float *partials, uint32_t *counters)
{
    constexpr uint32_t FOURS = S::SUMS / 4;
    constexpr uint64_t PARTIAL = S::ROWS * S::TOKENS;
    uint32_t thread = threadIdx.x - PRODUCERS;
    auto place = [&](uint32_t worker, bool opens, uint32_t i) {
        return (float4 *)(partials + (2 * worker + opens) * PARTIAL) + i * CONSUMERS + thread;
    };
#pragma unroll
    for (uint32_t i = 0; i < FOURS; i++)
        __stcg(place(blockIdx.x, p.begin == 0, i),
               make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));

    uint32_t units = table->hopper_units;
    uint32_t first = worker_of(p.tile_begin, units, workers);
    uint32_t last = worker_of(p.tile_begin + run.tile_units - 1, units, workers);
    sync_some(BARRIER_CONSUMERS, CONSUMERS);
    if (thread == 0) {
        uint32_t arrivals = add_acquire_release(&counters[first], 1) + 1;
        if (arrivals == last - first + 1)
            counters[first] = 0; // for the next launch
        else
            arrivals = 0;
        smem.arrivals = arrivals;
    }
    sync_some(BARRIER_CONSUMERS, CONSUMERS);
    if (smem.arrivals == 0)
        return false;
    bool two = last == first + 1; // the order of two is all the same
#pragma unroll 1
    for (uint32_t other = first; other <= last; other++) {
        if (two && other == blockIdx.x)
            continue;
        bool add = two || other != first;
#pragma unroll
        for (uint32_t i = 0; i < FOURS; i++) {
            float4 v = __ldcg(place(other, other == first, i));
            acc[4 * i] = add ? acc[4 * i] + v.x : v.x;
            acc[4 * i + 1] = add ? acc[4 * i + 1] + v.y : v.y;
            acc[4 * i + 2] = add ? acc[4 * i + 2] + v.z : v.z;
            acc[4 * i + 3] = add ? acc[4 * i + 3] + v.w : v.w;
        }
    }
    return true;
}

// Stores a warp's 16 rows of 8 tokens, v as mma.cuh's acc. Lanes trade until each holds four
// neighbours of one token: token 2t + g%2, rows 8 * (g/2%2) + 4 * (g/4).
__device__ __forceinline__ void store_bf16(uint64_t output, uint64_t at, bool valid, const float *v)
{
    constexpr uint32_t ALL = 0xFFFFFFFF;
    uint32_t g = threadIdx.x % 32 / 4;
    bool odd = g & 1, high = g & 2;
    float low_in = __shfl_xor_sync(ALL, odd ? v[0] : v[1], 4);
    float high_in = __shfl_xor_sync(ALL, odd ? v[2] : v[3], 4);
    uint32_t low_pair = odd ? bf16_pair(low_in, v[1]) : bf16_pair(v[0], low_in);
    uint32_t high_pair = odd ? bf16_pair(high_in, v[3]) : bf16_pair(v[2], high_in);
    uint32_t in = __shfl_xor_sync(ALL, high ? low_pair : high_pair, 8);
    if (valid)
        *((uint2 *)output + at / 4) = high ? make_uint2(in, high_pair) : make_uint2(low_pair, in);
}

// Calls f(first token, output's place, v) for every eight tokens, with v the four sums of this thread.
template <class S, class F>
__device__ __forceinline__ void for_sums(const float (&acc)[S::SUMS], const cuda_run &run,
                                         const piece &p, F f)
{
    uint32_t d = p.d_begin + (threadIdx.x - PRODUCERS) / 32 * CUDA_PANEL_ROWS;
    if (d >= run.output_dim)
        return;
#pragma unroll
    for (int j = 0; j < S::TOKENS / 8; j++)
        if (8 * j < p.tokens)
            f(8 * j, (uint64_t)p.g * run.output_dim + d, acc + 4 * j);
}

template <class S>
__device__ __forceinline__ void store(const float (&acc)[S::SUMS], const hopper_smem<S> &smem,
                                      const cuda_run &run, const piece &p, bool any_fp32)
{
    uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for_sums<S>(acc, run, p, [&](uint32_t first, uint64_t at, const float *v) {
        uint32_t token = first + 2 * t + g % 2; // after trading
        uint64_t output = smem.outputs[token];
        store_bf16(output, at + 8 * (g / 2 % 2) + 4 * (g / 4), token < p.tokens && !(output & 1),
                   v);
    });
    if (!any_fp32)
        return;
    for_sums<S>(acc, run, p, [&](uint32_t first, uint64_t at, const float *v) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t token = first + 2 * t + i % 2;
            if (token < p.tokens && smem.outputs[token] & 1)
                ((float *)(smem.outputs[token] - 1))[at + g + i / 2 * 8] = v[i];
        }
    });
}

// Of a tile where something was NaN or a weight is wide: over what store has written.
template <class S>
__device__ void store_wide(const cuda_run &run, const cuda_row *rows, const piece &p)
{
#pragma unroll 1
    for (uint32_t i = threadIdx.x - PRODUCERS; i < p.tokens * S::ROWS; i += CONSUMERS) {
        const cuda_row &row = rows[i / S::ROWS];
        uint32_t d = p.d_begin + i % S::ROWS;
        if (d >= run.output_dim ||
            !(weight_is_wide(run, p.g, d) || token_is_wide(run, row, CUDA_K_BLOCK, p.g)))
            continue;
        float value = (float)wide_output(run, row, CUDA_K_BLOCK, p.g, d);
        uint64_t at = (uint64_t)p.g * run.output_dim + d;
        if (row.flags & CUDA_ROW_OUTPUT_FP32)
            ((float *)row.output)[at] = value;
        else
            ((uint16_t *)row.output)[at] = (uint16_t)bf16_pair(value, 0);
    }
}

template <class S>
__device__ __forceinline__ void consume(hopper_smem<S> &smem, const cuda_table *table,
                                        float *partials, uint32_t *counters)
{
    walk<S> walk;
    walk.start(table);
    uint32_t thread = threadIdx.x - PRODUCERS, count = 0;
    piece p;
    while (walk.step(p)) {
        const cuda_run &run = table->runs[p.run];
        const cuda_row *rows = rows_of(table, run, p);
        sync_some(BARRIER_CONSUMERS, CONSUMERS); // the piece before is stored
        bool fp32 = thread < p.tokens && rows[thread].flags & CUDA_ROW_OUTPUT_FP32;
        if (thread < p.tokens)
            smem.outputs[thread] = rows[thread].output | fp32;
        uint32_t d = p.d_begin + thread;
        bool suspect = thread < S::ROWS && d < run.output_dim && weight_is_wide(run, p.g, d);
        float acc[S::SUMS] = {};
        if (is_square(run))
            consume_piece<S, true>(acc, smem, run, p, count);
        else
            consume_piece<S, false>(acc, smem, run, p, count);
        if (p.end - p.begin != run.tile_units &&
            !gather<S>(acc, smem, table, run, p, walk.workers, partials, counters))
            continue;
        bool any_fp32 = sync_some_or(BARRIER_CONSUMERS, CONSUMERS, fp32); // the outputs are known
        store<S>(acc, smem, run, p, any_fp32);
        // Of tokens that exist: what lies where others would may well be NaN.
        for_sums<S>(acc, run, p, [&](uint32_t first, uint64_t, const float *v) {
            uint32_t token = first + 2 * (threadIdx.x % 4);
            suspect |= token < p.tokens && (v[0] != v[0] || v[2] != v[2]);
            suspect |= token + 1 < p.tokens && (v[1] != v[1] || v[3] != v[3]);
        });
        if (sync_some_or(BARRIER_CONSUMERS, CONSUMERS, suspect))
            store_wide<S>(run, rows, p);
    }
    end_after_kernel_ahead();
}

template <class S>
__global__ void __launch_bounds__(THREADS, S::PAIRED ? 2 : 1)
    hopper_kernel(const cuda_table *__restrict__ table, uint32_t table_lines, float *partials,
                  uint32_t *counters)
{
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    auto &smem = *(hopper_smem<S> *)shared_memory;
    let_next_kernel_start();
    // Of a single run the rows follow the first line: on their way before it is read.
    if (threadIdx.x < table_lines)
        prefetch((const uint8_t *)table + threadIdx.x * 128);
    if (table->hopper_units == 0) {
        end_after_kernel_ahead();
        return;
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init(shared_address(&smem.full[i]), 2 * PRODUCERS); // once with its copies
            barrier_init(shared_address(&smem.empty[i]), CONSUMERS);
        }
        fence_for_wgmma();
    }
    __syncthreads();
    if (threadIdx.x < PRODUCERS) {
        give_registers<S::PRODUCER_REGISTERS>();
        produce<S>(smem, table);
    } else {
        take_registers<S::CONSUMER_REGISTERS>();
        consume<S>(smem, table, partials, counters);
    }
}

} // namespace

// ---- host

namespace
{

struct variant {
    const void *kernel;
    uint32_t smem_bytes, rows, tokens;
};

template <int TOKENS> variant variant_of()
{
    using S = shape<TOKENS>;
    return {(const void *)hopper_kernel<S>, sizeof(hopper_smem<S>), S::ROWS, S::TOKENS};
}

// Long tiles pay only where they still fill the device.
variant variant_for(uint32_t tokens_max)
{
    return tokens_max <= 128 ? variant_of<64>() : variant_of<128>();
}

} // namespace

extern "C" cudaError_t cuda_hopper_init(struct cuda_bucket *bucket, int sm_count)
{
    if (bucket->tokens_max <= CUDA_FEW_TOKENS_MAX)
        return cuda_few_init(bucket, sm_count);
    variant v = variant_for(bucket->tokens_max);
    cudaError_t error =
        cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.smem_bytes);
    bucket->hopper_rows = v.rows;
    bucket->hopper_tokens = v.tokens;
    bucket->hopper_workers = (uint32_t)sm_count;
    bucket->hopper_from = CUDA_HOPPER_TOKENS_MIN;
    return error;
}

extern "C" uint64_t cuda_hopper_partial_bytes(const struct cuda_bucket *bucket)
{
    if (bucket->tokens_max <= CUDA_FEW_TOKENS_MAX)
        return cuda_few_partial_bytes(bucket);
    return (uint64_t)bucket->hopper_workers * 2 * bucket->hopper_rows * bucket->hopper_tokens * 4;
}

extern "C" cudaError_t cuda_hopper_launch(const struct cuda_bucket *bucket,
                                          const struct cuda_table *table, uint32_t *counters,
                                          float *partials, bool overlaps, cudaStream_t stream)
{
    if (bucket->tokens_max <= CUDA_FEW_TOKENS_MAX)
        return cuda_few_launch(bucket, table, counters, partials, overlaps, stream);
    variant v = variant_for(bucket->tokens_max);
    uint32_t table_lines = cuda_table_lines(bucket, v.tokens);
    void *arguments[] = {&table, &table_lines, &partials, &counters};
    return cuda_launch_kernel(v.kernel, bucket->hopper_workers, THREADS, v.smem_bytes, arguments,
                              overlaps, stream);
}
