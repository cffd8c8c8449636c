// The arm for SM 9.0: wgmma, from a dozen tokens of one weight upwards.
//
//     producer   4 warps   activations and their scales; one of them the weights, in bulk
//        |  ring of stages, K = 128 each:  W: panels of 2 KiB as they lie in memory
//        |                                 A: tokens x 128, swizzled      scales of A: floats
//     consumers  2 groups of 4 warps, each 64 outputs of all of the tile's tokens
//
// A consumer's sums of K = 128 (or 32, as the scales ask) leave the tensor core for FP32 registers, where
// they are scaled while the sums of the tile's next tokens are on their way. The producer runs ahead across tiles, so that a tile's end costs it nothing.
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
    static constexpr int GROUP = TOKENS >= 128 ? 64 : 32; // tokens that are summed together
    static constexpr int GROUPS = TOKENS / GROUP;
    static constexpr int SUMS = TOKENS / 2; // of a thread
    // Up to 64 tokens two blocks fit on an SM: the next kernel's starts while this one ends.
    static constexpr bool PAIRED = TOKENS <= 64;
    static constexpr int STAGES = TOKENS == 256 ? 4 : TOKENS == 128 ? 6 : TOKENS == 64 ? 4 : 5;
    static constexpr int TOKENS_LINES = 1 + TOKENS * (int)sizeof(cuda_row) / 128;
    static constexpr int CONSUMER_REGISTERS = PAIRED ? 104 : 232;
    static constexpr int PRODUCER_REGISTERS = PAIRED ? 32 : 40;
};

template <class S> struct hopper_smem {
    struct {
        uint8_t w[S::W_BYTES];
        uint8_t a[S::A_BYTES];
    } stages[S::STAGES];
    float scales[S::STAGES][4][S::TOKENS]; // [step of 32][token]; the first alone for blocks of 128
    const uint8_t *activations[S::TOKENS]; // of the producer's piece; a warp's own
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

// NaN for what is not narrow.
template <int BLOCK>
__device__ __forceinline__ float scale_or_nan(const scales_in_flight<BLOCK> &scales, int i,
                                              bool fp32)
{
    bool wide = false;
    float value = scales.value(i, fp32, wide);
    return wide ? __uint_as_float(0x7FC00000) : value;
}

template <class S, int BLOCK>
__device__ __forceinline__ void produce_piece(hopper_smem<S> &smem, const cuda_table *table,
                                              const piece &p, uint32_t &count)
{
    constexpr int COPIES = S::TOKENS * 8 / PRODUCERS;
    constexpr int SCALED = (S::TOKENS + PRODUCERS - 1) / PRODUCERS; // tokens of a thread
    const cuda_run &run = table->runs[p.run];
    const cuda_row *rows = rows_of(table, run, p);
    uint32_t thread = threadIdx.x, lane = thread % 32;
    uint64_t tile_row = (uint64_t)(run.group_begin + p.g) * run.output_dim + p.d_begin;
    uint64_t panel_bytes = (uint64_t)run.reduced_dim * CUDA_PANEL_ROWS;
    uint32_t panels = min((run.output_dim - p.d_begin) / CUDA_PANEL_ROWS, (uint32_t)S::PANELS);
    const uint8_t *from_w = (const uint8_t *)run.elements +
                            tile_row / CUDA_PANEL_ROWS * panel_bytes + lane * panel_bytes;
    // Eight lanes copy a token. Tokens that are none are not copied: whatever lies there meets no
    // output but theirs.
    uint32_t first_token = thread / 8, copies = 0;
#pragma unroll 1
    for (int i = 0; i < COPIES; i++) {
        uint32_t token = first_token + i * (PRODUCERS / 8);
        if (token >= p.tokens)
            break;
        if (thread % 8 == 0)
            smem.activations[token] =
                (const uint8_t *)rows[token].activations +
                (uint64_t)p.g * rows[token].activation_group * run.reduced_dim;
        copies++;
    }
    __syncwarp();
    token_scales scales_a[SCALED];
    scales_in_flight<BLOCK> pending[SCALED];
#pragma unroll
    for (int i = 0; i < SCALED; i++)
        if (thread + i * PRODUCERS < p.tokens) {
            scales_a[i] = scales_of(rows[thread + i * PRODUCERS], p.g);
            pending[i].load(scales_a[i], p.begin);
        }

#pragma unroll 1
    for (uint32_t unit = p.begin; unit < p.end; unit++, count++) {
        uint32_t stage = count % S::STAGES;
        barrier_wait(shared_address(&smem.empty[stage]), count / S::STAGES % 2 ^ 1);
        uint32_t full = shared_address(&smem.full[stage]);
        if (thread < 32) {
            if (lane == 0)
                barrier_expect(full, panels * PANEL_BYTES);
            __syncwarp();
            if (lane < panels)
                copy_bulk(shared_address(smem.stages[stage].w) + lane * PANEL_BYTES,
                          from_w + (uint64_t)unit * PANEL_BYTES, PANEL_BYTES, full);
        }
        uint32_t to = shared_address(smem.stages[stage].a) + first_token * CUDA_K_BLOCK +
                      ((thread % 8) ^ (first_token % 8)) * 16;
        uint32_t offset = unit * CUDA_K_BLOCK + thread % 8 * 16;
#pragma unroll
        for (int i = 0; i < COPIES; i++)
            if (i < copies)
                copy_async(to + i * (PRODUCERS / 8 * CUDA_K_BLOCK),
                           smem.activations[first_token + i * (PRODUCERS / 8)] + offset, true);
        barrier_arrive_after_copies(full);
#pragma unroll
        for (int i = 0; i < SCALED; i++) {
            uint32_t token = thread + i * PRODUCERS;
            if (token >= p.tokens)
                break;
#pragma unroll
            for (int step = 0; step < 128 / BLOCK; step++)
                smem.scales[stage][step][token] =
                    scale_or_nan<BLOCK>(pending[i], step, scales_a[i].fp32);
            if (unit + 1 < p.end)
                pending[i].load(scales_a[i], unit + 1);
        }
        __syncwarp();
        if (lane == 0)
            barrier_arrive(full);
    }
}

template <class S>
__device__ __forceinline__ void produce(hopper_smem<S> &smem, const cuda_table *table)
{
    walk<S> walk;
    walk.start(table);
    uint32_t count = 0;
    piece p;
    while (walk.step(p)) {
        uint32_t mode = table->runs[p.run].mode;
        if (mode == CUDA_MODE_UE8M0_32 || mode == CUDA_MODE_FP32_32)
            produce_piece<S, 32>(smem, table, p, count);
        else
            produce_piece<S, 128>(smem, table, p, count);
    }
}

// ---- consumers

// acc += sum * the scales of its outputs' rows and tokens, for the tokens of one group.
template <int GROUP, int SUMS, int N>
__device__ __forceinline__ void promote(float (&acc)[SUMS], const float (&sum)[N],
                                        const float *scales_a, const float (&scale_w)[2])
{
    uint32_t t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        float2 a = *(const float2 *)(scales_a + GROUP * 2 * N + 8 * j + 2 * t);
        float *to = acc + GROUP * N + 4 * j;
        to[0] = fmaf(sum[4 * j + 0], a.x * scale_w[0], to[0]);
        to[1] = fmaf(sum[4 * j + 1], a.y * scale_w[0], to[1]);
        to[2] = fmaf(sum[4 * j + 2], a.x * scale_w[1], to[2]);
        to[3] = fmaf(sum[4 * j + 3], a.y * scale_w[1], to[3]);
    }
}

// UNIFORM: the 16 rows of a panel share their scales.
template <class S, int BLOCK, bool UNIFORM>
__device__ __forceinline__ void consume_piece(float (&acc)[S::SUMS], hopper_smem<S> &smem,
                                              const cuda_run &run, const piece &p, uint32_t &count)
{
    constexpr int STEPS = 128 / BLOCK, PARTS = STEPS * S::GROUPS;
    uint32_t panel = (threadIdx.x - PRODUCERS) / 32, lane = threadIdx.x % 32;
    uint64_t tile_row = (uint64_t)(run.group_begin + p.g) * run.output_dim + p.d_begin;
    // Rows beyond D have no output; any scale that exists will do.
    uint64_t row_last = tile_row + min(run.output_dim - p.d_begin, (uint32_t)S::ROWS) - 1;
    uint64_t row = tile_row + panel * CUDA_PANEL_ROWS + lane / 4;
    const uint8_t *scales_w[2] = {weight_scales(run, BLOCK, row < row_last ? row : row_last),
                                  weight_scales(run, BLOCK, row + 8 < row_last ? row + 8 : row_last)};

#pragma unroll 1
    for (uint32_t unit = p.begin; unit < p.end; unit++, count++) {
        uint32_t stage = count % S::STAGES;
        barrier_wait(shared_address(&smem.full[stage]), count / S::STAGES % 2);
        fence_for_wgmma(); // here and not where it was copied: there the fence waits for later copies
        float scale[STEPS][2];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            scale[i][0] = weight_scale(run.scales_fp32, scales_w[0], unit * STEPS + i);
            scale[i][1] = UNIFORM ? scale[i][0]
                                  : weight_scale(run.scales_fp32, scales_w[1], unit * STEPS + i);
        }
        uint64_t a = activations_descriptor(shared_address(smem.stages[stage].a));
        uint32_t from = shared_address(smem.stages[stage].w) + panel * PANEL_BYTES + lane * 16;
        uint4 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            w[i] = load_shared(from + i * CUDA_FRAGMENT_BYTES);

        // Part i: the tokens of group i % GROUPS, a K block's steps from i / GROUPS.
        float sum[2][S::GROUP / 2];
        auto multiply = [&](auto part) {
            constexpr int i = decltype(part)::value, group = i % S::GROUPS;
            wgmma_fence();
#pragma unroll
            for (int step = i / S::GROUPS * 4 / STEPS; step < (i / S::GROUPS + 1) * 4 / STEPS; step++)
                wgmma(sum[i % 2], w[step], a + 2 * step + group * (S::GROUP * CUDA_K_BLOCK / 16),
                      BLOCK == 128 && step != 0);
            wgmma_commit();
        };
        multiply(constant<0>{});
        unrolled<PARTS>([&](auto part) {
            constexpr int i = decltype(part)::value;
            if constexpr (i + 1 < PARTS)
                multiply(constant<i + 1>{});
            wgmma_wait<(i + 1 < PARTS)>();
            promote<i % S::GROUPS>(acc, sum[i % 2], smem.scales[stage][i / S::GROUPS],
                                   scale[i / S::GROUPS]);
        });
        __syncwarp();
        if (lane == 0)
            barrier_arrive(shared_address(&smem.empty[stage]));
    }
}

template <class S>
__device__ __forceinline__ void consume_any(float (&acc)[S::SUMS], hopper_smem<S> &smem,
                                            const cuda_run &run, const piece &p, uint32_t &count)
{
    bool small = run.mode == CUDA_MODE_UE8M0_32 || run.mode == CUDA_MODE_FP32_32;
    bool uniform = run.block_d_log2 >= 4;
    if (small && uniform)
        consume_piece<S, 32, true>(acc, smem, run, p, count);
    else if (small)
        consume_piece<S, 32, false>(acc, smem, run, p, count);
    else if (uniform)
        consume_piece<S, 128, true>(acc, smem, run, p, count);
    else
        consume_piece<S, 128, false>(acc, smem, run, p, count);
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
        __threadfence(); // what the block has written, before the count
        uint32_t arrivals = atomicAdd(&counters[first], 1) + 1;
        __threadfence();
        if (arrivals == last - first + 1)
            counters[first] = 0; // for the next launch
        else
            arrivals = 0;
        smem.arrivals = arrivals;
    }
    sync_some(BARRIER_CONSUMERS, CONSUMERS);
    if (smem.arrivals == 0)
        return false;
#pragma unroll 1
    for (uint32_t other = first; other <= last; other++)
#pragma unroll
        for (uint32_t i = 0; i < FOURS; i++) {
            float4 v = __ldcg(place(other, other == first, i));
            bool add = other != first;
            acc[4 * i] = add ? acc[4 * i] + v.x : v.x;
            acc[4 * i + 1] = add ? acc[4 * i + 1] + v.y : v.y;
            acc[4 * i + 2] = add ? acc[4 * i + 2] + v.z : v.z;
            acc[4 * i + 3] = add ? acc[4 * i + 3] + v.w : v.w;
        }
    return true;
}

__device__ __forceinline__ uint32_t bf16_pair(float low, float high)
{
    uint32_t pair; // rounds to nearest even
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Stores a warp's 16 rows of 8 tokens, v as mma.cuh's acc. Lanes trade until each holds four
// neighbours of one token: token 2t + g%2, rows 8 * (g/2%2) + 4 * (g/4).
__device__ __forceinline__ void store_bf16(uint64_t output, uint64_t at, bool valid,
                                           const float *v)
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
        *((uint2 *)output + at / 4) =
            high ? make_uint2(in, high_pair) : make_uint2(low_pair, in);
}

template <class S>
__device__ __forceinline__ void store(const float (&acc)[S::SUMS], const hopper_smem<S> &smem,
                                      const cuda_run &run, const piece &p)
{
    uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint32_t d = p.d_begin + (threadIdx.x - PRODUCERS) / 32 * CUDA_PANEL_ROWS;
    if (d >= run.output_dim)
        return;
    uint64_t at = (uint64_t)p.g * run.output_dim + d;
#pragma unroll
    for (int j = 0; j < S::TOKENS / 8; j++) {
        if (8 * j >= p.tokens)
            break;
        uint32_t token = 8 * j + 2 * t + g % 2; // in BF16, after trading
        uint64_t output = smem.outputs[token];
        bool valid = token < p.tokens;
        const float *v = acc + 4 * j;
        store_bf16(output, at + 8 * (g / 2 % 2) + 4 * (g / 4), valid && !(output & 1), v);
        if (!__any_sync(0xFFFFFFFF, valid && (output & 1)))
            continue;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t own = 8 * j + 2 * t + i % 2;
            if (own < p.tokens && smem.outputs[own] & 1)
                ((float *)(smem.outputs[own] - 1))[at + g + i / 2 * 8] = v[i];
        }
    }
}

// Of a tile where something was NaN or a weight is wide: over what store has written.
template <class S>
__device__ void store_wide(const cuda_run &run, const cuda_row *rows, const piece &p)
{
    uint32_t block = run.mode == CUDA_MODE_UE8M0_32 || run.mode == CUDA_MODE_FP32_32 ? 32 : 128;
#pragma unroll 1
    for (uint32_t i = threadIdx.x - PRODUCERS; i < p.tokens * S::ROWS; i += CONSUMERS) {
        const cuda_row &row = rows[i / S::ROWS];
        uint32_t d = p.d_begin + i % S::ROWS;
        if (d >= run.output_dim ||
            !(weight_is_wide(run, p.g, d) || token_is_wide(run, row, block, p.g)))
            continue;
        float value = (float)wide_output(run, row, block, p.g, d);
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
    bool waits = true;
    piece p;
    while (walk.step(p)) {
        const cuda_run &run = table->runs[p.run];
        const cuda_row *rows = rows_of(table, run, p);
        sync_some(BARRIER_CONSUMERS, CONSUMERS); // the piece before is stored
        for (uint32_t token = thread; token < p.tokens; token += CONSUMERS)
            smem.outputs[token] =
                rows[token].output | ((rows[token].flags & CUDA_ROW_OUTPUT_FP32) != 0);
        uint32_t d = p.d_begin + thread;
        bool suspect =
            thread < S::ROWS && d < run.output_dim && weight_is_wide(run, p.g, d);
        float acc[S::SUMS] = {};
        consume_any<S>(acc, smem, run, p, count);
        if (waits) { // nothing has been written yet
            waits = false;
            wait_for_kernel_ahead();
        }
        if (p.end - p.begin != run.tile_units &&
            !gather<S>(acc, smem, table, run, p, walk.workers, partials, counters))
            continue;
        sync_some(BARRIER_CONSUMERS, CONSUMERS); // the outputs are known
        store<S>(acc, smem, run, p);
#pragma unroll
        for (int i = 0; i < S::SUMS; i++)
            suspect |= acc[i] != acc[i];
        if (sync_some_or(BARRIER_CONSUMERS, CONSUMERS, suspect))
            store_wide<S>(run, rows, p);
    }
    if (waits) // who waits for this kernel counts on the one ahead too
        wait_for_kernel_ahead();
}

template <class S>
__global__ void __launch_bounds__(THREADS, S::PAIRED ? 2 : 1)
    hopper_kernel(const cuda_table *__restrict__ table, float *partials, uint32_t *counters)
{
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    auto &smem = *(hopper_smem<S> *)shared_memory;
    let_next_kernel_start();
    // Of a single run the rows follow the first line: on their way before it is read.
    if (threadIdx.x < S::TOKENS_LINES)
        prefetch((const uint8_t *)table + threadIdx.x * 128);
    if (table->hopper_units == 0) {
        wait_for_kernel_ahead();
        return;
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init(shared_address(&smem.full[i]), PRODUCERS + PRODUCERS / 32);
            barrier_init(shared_address(&smem.empty[i]), CONSUMERS / 32);
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
    return tokens_max <= 32    ? variant_of<32>()
           : tokens_max <= 64  ? variant_of<64>()
           : tokens_max <= 256 ? variant_of<128>()
                               : variant_of<256>();
}

uint64_t counters_bytes(const struct cuda_bucket *bucket)
{
    return ((uint64_t)bucket->hopper_workers * 4 + 255) / 256 * 256;
}

} // namespace

extern "C" cudaError_t cuda_hopper_init(struct cuda_bucket *bucket, int sm_count)
{
    variant v = variant_for(bucket->tokens_max);
    cudaError_t error = cudaFuncSetAttribute(
        v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.smem_bytes);
    bucket->hopper_rows = v.rows;
    bucket->hopper_tokens = v.tokens;
    bucket->hopper_workers = (uint32_t)sm_count;
    bucket->hopper_from = CUDA_HOPPER_TOKENS_MIN;
    return error;
}

extern "C" uint64_t cuda_hopper_workspace_bytes(const struct cuda_bucket *bucket)
{
    return counters_bytes(bucket) + (uint64_t)bucket->hopper_workers * 2 * bucket->hopper_rows *
                                        bucket->hopper_tokens * 4;
}

extern "C" cudaError_t cuda_hopper_launch(const struct cuda_bucket *bucket,
                                          const struct cuda_table *table, void *workspace,
                                          bool overlaps, cudaStream_t stream)
{
    variant v = variant_for(bucket->tokens_max);
    uint32_t *counters = (uint32_t *)workspace;
    float *partials = (float *)((uint8_t *)workspace + counters_bytes(bucket));
    void *arguments[] = {&table, &partials, &counters};
    return cuda_launch_kernel(v.kernel, bucket->hopper_workers, THREADS, v.smem_bytes, arguments,
                              overlaps, stream);
}
