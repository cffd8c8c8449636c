// Few tokens: the weights stream once, at the memory's speed, and everything else stays out of their
// way.
//
//     units   ----------------------------------------------------------   16 KiB of weights each
//     workers |-- 0 --|-- 1 --|-- 2 --| ...                     equal pieces, one thread block each
//     tiles   |====================|====================| ...   rows of D that share their R
//
// A warp copies its fragments into a ring of its own, RING steps ahead and on into the next tile, and
// reads back only what its own lanes copied: no barrier guards the weights. Nothing waits for the kernel
// ahead in the stream until the first store, which hides its tail and this one's start. Warps meet only at the edges of a chunk, for the tokens' activations, which come
// CHUNKS - 1 chunks ahead in the same groups of copies as the weights.
//
// Where a tile falls to several workers each leaves its sum in the workspace and the last to arrive adds
// them up, in the workers' order, so that a result does not depend on timing.
#include "launch.h"

#include "copy.cuh"
#include "line.cuh"
#include "mma.cuh"
#include "scales.cuh"
#include "wide.cuh"

namespace
{

enum {
    WARPS = CUDA_DECODE_WARPS,
    THREADS = WARPS * 32,
    STEP_BYTES = 4 * CUDA_FRAGMENT_BYTES, // of a warp: K = 128 of E4M3, K = 64 of BF16
    RING = 4,
    RING_BYTES = WARPS * RING * STEP_BYTES,
    CHUNKS = 2, // of activations, in shared memory
    CHUNK_BYTES = 16 * 1024,
    CHUNK_PAIRS = CHUNK_BYTES / CUDA_K_BLOCK,
    TILE_STRIDE = 132, // floats of one token in shared memory; 2*132 % 32 = 8: no bank conflicts
    CONTRIBUTION = 1,  // what a worker adds to a tile's counter
    CONTRIBUTION_WIDE = 1 << 16,
};

// How a run of up to 8*NT tokens is cut; WARPS_K as warps_k() of table.c.
template <int NT> struct shape {
    static constexpr int TOKENS = 8 * NT;
    static constexpr int WARPS_K = NT <= 4 ? 2 : 1;
    static constexpr int ROWS = WARPS / WARPS_K * CUDA_PANEL_ROWS;
};

struct decode_smem {
    uint8_t ring[WARPS][RING][STEP_BYTES];
    union {
        struct {
            uint8_t activations[CHUNKS][CHUNK_BYTES]; // [block][token][128], 16-byte pieces
                                                      // swizzled by token
            uint32_t scales[2][2 * CHUNK_PAIRS];      // words or floats, [block][step][token]
        };
        float tile[CUDA_DECODE_TOKENS_MAX * TILE_STRIDE]; // [token][TILE_STRIDE]
    };
    uint32_t arrivals;
};
static_assert(sizeof(decode_smem) <= CUDA_SMEM_BYTES_MAX, "SM 12.0 has no more");

// What a worker does next: units [begin, end) of one tile.
struct piece {
    uint32_t run;
    uint32_t begin, end;
    uint32_t tile_begin; // its first unit, counted from the table's start
    uint32_t g, d_begin;
};

// Every warp of the block comes to the same answer. All blocks read the table at once, at the very
// start: it must cost few cache lines, and one run's fit into the first.
__device__ inline piece locate(const cuda_table *table, uint32_t unit, uint32_t end, cuda_run &r)
{
    uint32_t run = table->decode_runs == 1 ? 0 : find_run(table->runs, table->decode_runs, unit);
    r = table->runs[run];
    uint32_t tile = (unit - r.unit_begin) / r.tile_units;
    piece p;
    p.run = run;
    p.tile_begin = r.unit_begin + tile * r.tile_units;
    p.begin = unit - p.tile_begin;
    p.end = min(r.tile_units, end - p.tile_begin);
    p.g = tile / r.tiles_d;
    p.d_begin = tile % r.tiles_d * (WARPS / r.warps_k * CUDA_PANEL_ROWS);
    return p;
}

// A warp's weights on their way through its ring. Runs ahead of the sums by RING steps.
struct stream {
    const cuda_table *table;
    const uint8_t *from; // this lane's 16 bytes of the next step
    uint32_t valid;      // steps left that exist, of this piece
    uint32_t left;       // steps left of this piece: those beyond D or R copy zeros
    uint32_t stride;     // bytes from unit to unit
    uint32_t half;       // BF16: of the unit at hand
    bool bf16;
    uint32_t unit, end;  // after this piece, of the worker
    uint32_t slot, ring; // the next; address of the warp's

    __device__ __forceinline__ void open()
    {
        cuda_run run;
        piece p = locate(table, unit, end, run);
        uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        uint32_t d = p.d_begin + warp / run.warps_k * CUDA_PANEL_ROWS;
        bf16 = run.mode == CUDA_MODE_BF16;
        half = 0;
        uint32_t block_bytes = bf16 ? 2 * STEP_BYTES : STEP_BYTES, steps = bf16 ? 2 : 1;
        uint64_t row = (uint64_t)(run.group_begin + p.g) * run.output_dim + d;
        uint32_t block = p.begin * run.warps_k + warp % run.warps_k;
        uint32_t blocks = run.reduced_dim / CUDA_K_BLOCK;
        stride = run.warps_k * block_bytes;
        from = (const uint8_t *)run.elements + row * (run.reduced_dim * steps) +
               (uint64_t)block * block_bytes + lane * 16;
        left = (p.end - p.begin) * steps;
        valid = 0;
        if (d < run.output_dim && block < blocks)
            valid = min(left, ((blocks - block - 1) / run.warps_k + 1) * steps);
        unit = p.tile_begin + p.end;
    }

    __device__ __forceinline__ void start(const cuda_table *t, uint32_t begin, uint32_t to,
                                          decode_smem &smem)
    {
        table = t;
        unit = begin;
        end = to;
        slot = 0;
        ring = shared_address(smem.ring[threadIdx.x / 32]) + threadIdx.x % 32 * 16;
        open();
    }

    // One step into the slot that was read last. Commits nothing.
    __device__ __forceinline__ void copy_step()
    {
        uint32_t to = ring + slot * STEP_BYTES;
        slot = (slot + 1) % RING;
        if (left == 0) {
            if (unit >= end)
                return;
            open();
        }
        const uint8_t *at = valid > 0 ? from : (const uint8_t *)table;
#pragma unroll
        for (int i = 0; i < 4; i++)
            copy_async(to + i * CUDA_FRAGMENT_BYTES, valid > 0 ? at + i * CUDA_FRAGMENT_BYTES : at,
                       valid > 0);
        left--;
        valid -= valid > 0;
        if (bf16)
            from += half == 0 ? STEP_BYTES : stride - STEP_BYTES;
        else
            from += stride;
        half ^= 1;
    }
};

// Activations and their scales on the way to shared memory, chunk by chunk. A thread copies the same
// one or two tokens in every block, and looks after the scales of one pair (block, token).
template <int NT, int MODE> struct stager {
    using S = shape<NT>;
    static constexpr bool WORDS = MODE == CUDA_MODE_UE8M0_128 || MODE == CUDA_MODE_UE8M0_32;
    static constexpr int BLOCK = MODE == CUDA_MODE_UE8M0_32 || MODE == CUDA_MODE_FP32_32 ? 32 : 128;
    // (block, token); four floats each need the room of two.
    static constexpr int PAIRS = MODE == CUDA_MODE_FP32_32 ? CHUNK_PAIRS / 2 : CHUNK_PAIRS;
    static constexpr int CHUNK_BLOCKS = PAIRS / S::TOKENS; // of K = 128
    static constexpr int CHUNK_UNITS = CHUNK_BLOCKS / S::WARPS_K;
    static constexpr int COPIES = PAIRS * 8 / THREADS; // of 16 bytes, by a thread
    static constexpr int SCALES = WORDS || BLOCK == 128 ? 1 : 4;
    static constexpr int COPY_TOKENS = S::TOKENS > THREADS / 8 ? S::TOKENS / (THREADS / 8) : 1;
    static_assert(CHUNK_UNITS >= 1 && PAIRS <= THREADS && COPIES >= COPY_TOKENS, "");

    // Anything where there are fewer tokens: copies that do not count touch no memory.
    const uint8_t *from[COPY_TOKENS];
    token_scales pair;
    uint32_t tokens;
    scales_in_flight<BLOCK> pending;
    uint32_t blocks;
    bool wide;

    __device__ __forceinline__ void start(const cuda_table *table, const cuda_run &run,
                                          const piece &p)
    {
        const cuda_row *rows =
            (const cuda_row *)((const uint8_t *)table + table->rows_offset) + run.row_begin;
        blocks = run.reduced_dim / CUDA_K_BLOCK;
        tokens = run.rows;
        wide = false;
#pragma unroll
        for (int i = 0; i < COPY_TOKENS; i++) {
            uint32_t token = (threadIdx.x / 8 + i * (THREADS / 8)) % S::TOKENS;
            from[i] = (const uint8_t *)table;
            if (token < run.rows)
                from[i] = (const uint8_t *)rows[token].activations +
                          (uint64_t)p.g * rows[token].activation_group * run.reduced_dim +
                          threadIdx.x % 8 * 16;
        }
        uint32_t token = threadIdx.x % S::TOKENS;
        pair = {};
        if (token < run.rows)
            pair = scales_of(rows[token], p.g);
    }

    // Calls copy(i, offset in the chunk, source, whether it counts) for this thread's share.
    template <class C> __device__ __forceinline__ void for_pieces(uint32_t first_block, C copy)
    {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            uint32_t pair_index = threadIdx.x / 8 + i * (THREADS / 8);
            uint32_t token = pair_index % S::TOKENS, block = first_block + pair_index / S::TOKENS;
            uint32_t piece16 = (threadIdx.x % 8) ^ (token & 7);
            copy(i, pair_index * CUDA_K_BLOCK + piece16 * 16,
                 from[i % COPY_TOKENS] + block * CUDA_K_BLOCK, token < tokens && block < blocks);
        }
    }

    __device__ __forceinline__ void copy_chunk(uint8_t *to, uint32_t first_block)
    {
        uint32_t base = shared_address(to);
        for_pieces(first_block, [&](int, uint32_t offset, const uint8_t *source, bool valid) {
            copy_async(base + offset, source, valid);
        });
    }

    // The first chunks, through registers: waiting for asynchronous copies would wait for the ring.
    __device__ __forceinline__ void load_chunks(decode_smem &smem, uint32_t first_block)
    {
        uint4 held[CHUNKS - 1][COPIES];
#pragma unroll
        for (int c = 0; c < CHUNKS - 1; c++)
            for_pieces(first_block + c * CHUNK_BLOCKS,
                       [&](int i, uint32_t, const uint8_t *source, bool valid) {
                           held[c][i] = load_if(valid, source);
                       });
#pragma unroll
        for (int c = 0; c < CHUNKS - 1; c++)
            for_pieces(0, [&](int i, uint32_t offset, const uint8_t *, bool) {
                *(uint4 *)(smem.activations[c] + offset) = held[c][i];
            });
    }

    __device__ __forceinline__ void load_scales(uint32_t first_block)
    {
        uint32_t block = first_block + threadIdx.x / S::TOKENS;
        if (threadIdx.x % S::TOKENS < tokens && threadIdx.x < PAIRS && block < blocks)
            pending.load(pair, block);
        else
            pending.load_one(pair.fp32);
    }

    __device__ __forceinline__ void store_scales(uint32_t *to)
    {
        if (threadIdx.x >= PAIRS)
            return;
        if (WORDS) {
            to[threadIdx.x] = pending.word(wide);
            return;
        }
        uint32_t block = threadIdx.x / S::TOKENS, token = threadIdx.x % S::TOKENS;
#pragma unroll
        for (int i = 0; i < SCALES; i++)
            to[(block * SCALES + i) * S::TOKENS + token] =
                __float_as_uint(pending.value(i, pair.fp32, wide));
    }
};

// The scales of W for K = 128 of a panel, loaded a step before their use.
template <int MODE> struct panel_scales {
    static constexpr bool WORDS = MODE == CUDA_MODE_UE8M0_128 || MODE == CUDA_MODE_UE8M0_32;
    static constexpr int BLOCK = MODE == CUDA_MODE_UE8M0_32 || MODE == CUDA_MODE_FP32_32 ? 32 : 128;
    static constexpr int N = MODE == CUDA_MODE_BF16 || WORDS ? 1 : 128 / BLOCK;
    uint32_t word[1];
    float value[2][N]; // accumulator rows g and g+8

    __device__ __forceinline__ void load(const cuda_run &run, const uint8_t *const (&scales)[2],
                                         uint32_t block)
    {
        if (WORDS)
            word[0] = weight_scale_word<BLOCK>(scales[0], block);
        else if (MODE != CUDA_MODE_BF16)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < N; j++)
                    value[i][j] = weight_scale(run.scales_fp32, scales[i], block * N + j);
    }
};

// Sums of the piece's units for this warp's panel. Returns whether a scale was wide.
template <int NT, int MODE>
__device__ __forceinline__ bool accumulate(float (&acc)[1][NT][4], stream &weights,
                                           decode_smem &smem, const cuda_table *table,
                                           const cuda_run &run, const piece &p)
{
    using S = shape<NT>;
    using G = stager<NT, MODE>;
    constexpr bool BF16 = MODE == CUDA_MODE_BF16;
    constexpr bool WORDS = G::WORDS;
    constexpr int BLOCK = G::BLOCK;
    constexpr int STEPS = BF16 ? 2 : 1;
    constexpr int CHUNK_STEPS = G::CHUNK_UNITS * STEPS;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    // Where this lane's scales of W lie: the block-scaled mma's row, or both accumulator rows.
    uint64_t panel_row = (uint64_t)(run.group_begin + p.g) * run.output_dim +
                         min(p.d_begin + warp / S::WARPS_K * CUDA_PANEL_ROWS,
                             run.output_dim - CUDA_PANEL_ROWS); // beyond D products are zeros
    const uint8_t *scales_w[2] = {
        weight_scales(run, BLOCK, panel_row + (WORDS ? 8 * (lane & 1) + lane / 4 : g)),
        weight_scales(run, BLOCK, panel_row + g + 8),
    };
    panel_scales<MODE> panel;
    uint32_t block = p.begin * S::WARPS_K + warp % S::WARPS_K;
    uint32_t block_last = run.reduced_dim / CUDA_K_BLOCK - 1;
    panel.load(run, scales_w, min(block, block_last));

    G stage;
    stage.start(table, run, p);
    stage.load_scales(p.begin * S::WARPS_K);
    stage.load_chunks(smem, p.begin * S::WARPS_K);
    stage.store_scales(smem.scales[0]);
    __syncthreads();

    uint32_t index = 0;           // of the chunk
    uint32_t slot = weights.slot; // copied first of all that are in flight
    uint32_t ring = weights.ring;
#pragma unroll 1
    for (uint32_t chunk = p.begin; chunk < p.end; chunk += G::CHUNK_UNITS, index++) {
        if (index != 0) {
            // The chunk came with the first step of CHUNKS - 1 chunks before; nobody reads the one
            // before any more.
            constexpr int LATER = (CHUNKS - 1) * CHUNK_STEPS - 1;
            copy_async_wait<(LATER < RING - 1 ? LATER : RING - 1)>();
            __syncthreads();
        }
        uint32_t ahead = chunk + (CHUNKS - 1) * G::CHUNK_UNITS;
        if (ahead < p.end)
            stage.copy_chunk(smem.activations[(index + CHUNKS - 1) % CHUNKS], ahead * S::WARPS_K);
        bool more = chunk + G::CHUNK_UNITS < p.end;
        if (more)
            stage.load_scales((chunk + G::CHUNK_UNITS) * S::WARPS_K);
        uint32_t end = min(chunk + G::CHUNK_UNITS, p.end);
        uint32_t pairs = shared_address(smem.activations) + index % CHUNKS * CHUNK_BYTES +
                         warp % S::WARPS_K * (S::TOKENS * CUDA_K_BLOCK);
        const uint32_t *scales =
            smem.scales[index % 2] + warp % S::WARPS_K * (G::SCALES * S::TOKENS);
#pragma unroll 1
        for (uint32_t unit = chunk; unit < end; unit++) {
            auto b = [&](int n, int half) {
                uint32_t piece16 = (half * 4 + lane / 8) ^ (lane % 8);
                return load_matrices(pairs + (n * 8 + lane % 8) * CUDA_K_BLOCK + piece16 * 16);
            };
            const float *floats = (const float *)scales;
            panel_scales<MODE> now = panel;
            block += S::WARPS_K;
            panel.load(run, scales_w, min(block, block_last));
            unrolled<STEPS>([&](auto half) {
                copy_async_wait<RING - 1>();
                uint32_t at = ring + slot * STEP_BYTES;
                slot = (slot + 1) % RING;
                uint4 fragments[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    fragments[i] = load_shared(at + i * CUDA_FRAGMENT_BYTES);
                auto w = [&](int, int i) { return fragments[i]; };
                if constexpr (WORDS) {
                    uint32_t word_a[(NT + 3) / 4];
#pragma unroll
                    for (int i = 0; i < (NT + 3) / 4; i++)
                        word_a[i] = scales[(i * 32 + 8 * t + g) % S::TOKENS];
                    mma_k128_ue8m0<1, NT, BLOCK>(acc, w, b, now.word, word_a);
                } else if constexpr (!BF16) {
                    auto scale = [&](int, int n, int i, int step) {
                        return now.value[i / 2][step] *
                               floats[step * S::TOKENS + n * 8 + 2 * t + i % 2];
                    };
                    mma_k128_rescaled<1, NT, BLOCK>(acc, w, b, scale);
                } else {
                    auto scale = [&](int n, int i) { return floats[n * 8 + 2 * t + i % 2]; };
                    mma_k64_bf16<1, NT>(acc, w, b, half, scale);
                }
                weights.copy_step(); // into the slot that was just read
                copy_async_commit();
            });
            pairs += S::WARPS_K * S::TOKENS * CUDA_K_BLOCK;
            scales += S::WARPS_K * G::SCALES * S::TOKENS;
        }
        if (more)
            stage.store_scales(smem.scales[(index + 1) % 2]);
    }
    return stage.wide;
}

__device__ __forceinline__ float4 add(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ void wait_once(bool &waits)
{
    if (waits)
        wait_for_kernel_ahead();
    waits = false;
}

// Sums up the block's warps, then the workers that share the tile, and stores the result.
template <int NT>
__device__ __forceinline__ void finish(float (&acc)[1][NT][4], bool wide, decode_smem &smem,
                                       const cuda_table *table, const cuda_run &run, const piece &p,
                                       float *partials, uint32_t partial_floats, uint32_t *counters)
{
    using S = shape<NT>;
    constexpr uint32_t FOURS = S::ROWS / 4;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const cuda_row *rows =
        (const cuda_row *)((const uint8_t *)table + table->rows_offset) + run.row_begin;
    bool tile_wide = __syncthreads_or(wide); // and the activations are free to be written over

    // tile[token][part of R][row]
    {
        uint32_t column = warp % S::WARPS_K * S::ROWS + warp / S::WARPS_K * CUDA_PANEL_ROWS + g;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                smem.tile[(n * 8 + 2 * t + i % 2) * TILE_STRIDE + column + i / 2 * 8] =
                    acc[0][n][i];
    }
    __syncthreads();

    bool whole = p.begin == 0 && p.end == run.tile_units;
    uint32_t fours = run.rows * FOURS;
    if (S::WARPS_K > 1 || !whole) {
        float *own = partials + (uint64_t)(2 * blockIdx.x + (p.begin == 0)) * partial_floats;
        for (uint32_t i = threadIdx.x; i < fours; i += THREADS) {
            float4 *at = (float4 *)(smem.tile + i / FOURS * TILE_STRIDE) + i % FOURS;
            float4 sum = at[0];
#pragma unroll
            for (int part = 1; part < S::WARPS_K; part++)
                sum = add(sum, at[part * FOURS]);
            if (whole)
                at[0] = sum;
            else
                __stcg((float4 *)own + i, sum);
        }
    }

    if (!whole) {
        uint32_t units = table->decode_units, workers = table->decode_workers;
        uint32_t first = worker_of(p.tile_begin, units, workers);
        uint32_t last = worker_of(p.tile_begin + run.tile_units - 1, units, workers);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence(); // what the block has written, before the count
            uint32_t add = CONTRIBUTION + (tile_wide ? CONTRIBUTION_WIDE : 0);
            uint32_t arrivals = atomicAdd(&counters[first], add) + add;
            __threadfence();
            bool all = arrivals % CONTRIBUTION_WIDE == last - first + 1;
            if (all)
                counters[first] = 0; // for the next launch
            smem.arrivals = all ? arrivals : 0;
        }
        __syncthreads();
        uint32_t arrivals = smem.arrivals;
        if (arrivals == 0)
            return;
        tile_wide = arrivals >= CONTRIBUTION_WIDE;
#pragma unroll 4
        for (uint32_t i = threadIdx.x; i < fours; i += THREADS) {
            const float4 *from = (const float4 *)partials + i;
            float4 sum = __ldcg(from + (uint64_t)(2 * first + 1) * partial_floats / 4);
#pragma unroll 4
            for (uint32_t other = first + 1; other <= last; other++)
                sum = add(sum, __ldcg(from + (uint64_t)(2 * other) * partial_floats / 4));
            *((float4 *)(smem.tile + i / FOURS * TILE_STRIDE) + i % FOURS) = sum;
        }
    }
    __syncthreads();
    if (tile_wide) {
        wide_tile(run, rows, run.rows, p.g, p.d_begin, S::ROWS, smem.tile, TILE_STRIDE);
        __syncthreads();
    }
    store_tile(run, rows, run.rows, p.g, p.d_begin, S::ROWS, smem.tile, TILE_STRIDE);
}

template <int NT>
__device__ __forceinline__ bool accumulate_any(float (&acc)[1][NT][4], stream &weights,
                                               decode_smem &smem, const cuda_table *table,
                                               const cuda_run &run, const piece &p)
{
    switch (run.mode) {
    case CUDA_MODE_UE8M0_128:
        return accumulate<NT, CUDA_MODE_UE8M0_128>(acc, weights, smem, table, run, p);
    case CUDA_MODE_UE8M0_32:
        return accumulate<NT, CUDA_MODE_UE8M0_32>(acc, weights, smem, table, run, p);
    case CUDA_MODE_FP32_128:
        return accumulate<NT, CUDA_MODE_FP32_128>(acc, weights, smem, table, run, p);
    case CUDA_MODE_FP32_32:
        return accumulate<NT, CUDA_MODE_FP32_32>(acc, weights, smem, table, run, p);
    default:
        return accumulate<NT, CUDA_MODE_BF16>(acc, weights, smem, table, run, p);
    }
}

// The next kernel's blocks beside this one's, where shared memory has room for both.
#if MMA_BLOCK_SCALED
constexpr int BLOCKS_OF_SM = 1;
#else
constexpr int BLOCKS_OF_SM = 2;
#endif

// For runs of up to 8*NT tokens: code for those of up to 8, and for the rest.
template <int NT>
__global__ void __launch_bounds__(THREADS, BLOCKS_OF_SM)
    decode_kernel(const cuda_table *__restrict__ table, float *partials, uint32_t partial_floats,
                  uint32_t *counters)
{
    extern __shared__ __align__(128) uint8_t shared_memory[];
    decode_smem &smem = *(decode_smem *)shared_memory;
    let_next_kernel_start();

    // ---- this worker's units
    uint32_t units = table->decode_units, workers = table->decode_workers;
    if (blockIdx.x >= workers) {
        wait_for_kernel_ahead(); // who waits for this kernel counts on that one too
        return;
    }
    uint32_t unit = unit_of(blockIdx.x, units, workers);
    uint32_t end = unit_of(blockIdx.x + 1, units, workers);

    bool waits = true; // the kernel ahead has not been waited for: nothing may be stored
    stream weights;
    weights.start(table, unit, end, smem);
#pragma unroll 1
    for (int i = 0; i < RING; i++) {
        weights.copy_step();
        copy_async_commit();
    }

#pragma unroll 1
    while (unit < end) {
        cuda_run run;
        piece p = locate(table, unit, end, run);
        bool wide = threadIdx.x < WARPS * CUDA_PANEL_ROWS / run.warps_k &&
                    p.d_begin + threadIdx.x < run.output_dim &&
                    weight_is_wide(run, p.g, p.d_begin + threadIdx.x);
        if (NT == 1 || run.rows <= 8) {
            float acc[1][1][4] = {};
            wide |= accumulate_any<1>(acc, weights, smem, table, run, p);
            wait_once(waits);
            finish<1>(acc, wide, smem, table, run, p, partials, partial_floats, counters);
        } else {
            float acc[1][NT][4] = {};
            wide |= accumulate_any<NT>(acc, weights, smem, table, run, p);
            wait_once(waits);
            finish<NT>(acc, wide, smem, table, run, p, partials, partial_floats, counters);
        }
        unit = p.tile_begin + p.end;
        __syncthreads(); // the tile is stored; activations may come
    }
}

} // namespace

// ---- host

static const void *kernel_of(uint32_t tokens)
{
    return tokens <= 8    ? (const void *)decode_kernel<1>
           : tokens <= 16 ? (const void *)decode_kernel<2>
           : tokens <= 32 ? (const void *)decode_kernel<4>
                          : (const void *)decode_kernel<8>;
}

extern "C" cudaError_t cuda_decode_init(struct cuda_bucket *bucket, int sm_count)
{
    uint32_t tokens = bucket->tokens_max <= 8    ? 8
                      : bucket->tokens_max <= 16 ? 16
                      : bucket->tokens_max <= 32 ? 32
                                                 : 64;
    cudaError_t error = cudaFuncSetAttribute(
        kernel_of(tokens), cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(decode_smem));
    int blocks = 0;
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_of(tokens), THREADS,
                                                              sizeof(decode_smem));
    if (error != cudaSuccess)
        return error;
    // One keeps the memory busy; where there is room for two, the second place is the next
    // kernel's.
    bucket->decode_tokens = tokens;
    bucket->decode_workers = (uint32_t)sm_count;
    return cudaSuccess;
}

static uint32_t partial_floats_of(const struct cuda_bucket *bucket)
{
    uint32_t tokens = bucket->decode_tokens;
    return tokens * (tokens <= 32 ? shape<4>::ROWS : shape<8>::ROWS);
}

extern "C" uint64_t cuda_decode_partial_bytes(const struct cuda_bucket *bucket)
{
    return (uint64_t)bucket->decode_workers * 2 * partial_floats_of(bucket) * 4;
}

extern "C" cudaError_t cuda_decode_launch(const struct cuda_bucket *bucket,
                                          const struct cuda_table *table, uint32_t *counters,
                                          float *partials, bool overlaps, cudaStream_t stream)
{
    uint32_t partial_floats = partial_floats_of(bucket);
    void *arguments[] = {&table, &partials, &partial_floats, &counters};
    return cuda_launch_kernel(kernel_of(bucket->decode_tokens), bucket->decode_workers, THREADS,
                              sizeof(decode_smem), arguments, overlaps, stream);
}
