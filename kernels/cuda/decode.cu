// Few tokens: the weights stream once, at the memory's speed, and everything else stays out of their
// way.
//
//     units   ----------------------------------------------------------   16 KiB of weights each
//     workers |-- 0 --|-- 1 --|-- 2 --| ...                     equal pieces, one thread block each
//     tiles   |====================|====================| ...   rows of D that share their R
//
// A warp reads its fragments straight into registers, one unit ahead, and never waits for another warp
// except at the edges of a chunk (four units), for the tokens' activations in shared memory. Where
// a tile falls to several workers each leaves its sum in the workspace and the last to arrive adds them
// up, in the workers' order, so that a result does not depend on timing.
#include "cuda.h"

#include "copy.cuh"
#include "mma.cuh"
#include "scales.cuh"
#include "wide.cuh"

enum {
    THREADS = CUDA_DECODE_WARPS * 32,
    CHUNK_UNITS = 4,
    TILE_STRIDE = 132, // floats of one token in shared memory; 2*132 % 32 = 8: no bank conflicts
    CONTRIBUTION = 1,  // what a worker adds to a tile's counter
    CONTRIBUTION_WIDE = 1 << 16,
};

// How a run of up to 8*NT tokens is cut; WARPS_K as warps_k() of table.c.
template <int NT> struct shape {
    static constexpr int TOKENS = 8 * NT;
    static constexpr int WARPS_K = NT == 1 ? 4 : NT == 2 ? 2 : 1;
    static constexpr int ROWS = CUDA_DECODE_WARPS / WARPS_K * CUDA_PANEL_ROWS;
    static constexpr int CHUNK_BLOCKS = CHUNK_UNITS * WARPS_K; // of K = 128
    static constexpr int PAIRS = CHUNK_BLOCKS * TOKENS;        // (block, token)
    static constexpr int CHUNK_BYTES = PAIRS * CUDA_K_BLOCK;   // of activations
    static constexpr int TILE_BYTES = TOKENS * TILE_STRIDE * 4;
    static_assert(PAIRS <= THREADS, "a thread looks after one pair's scales");
};

template <int NT> struct decode_smem { // for runs of up to 8*NT tokens
    static constexpr int most(int a, int b)
    {
        return a > b ? a : b;
    }
    static constexpr int CHUNK = most(shape<NT>::CHUNK_BYTES, shape<1>::CHUNK_BYTES);
    static constexpr int PAIRS = most(shape<NT>::PAIRS, shape<1>::PAIRS);
    union {
        uint8_t activations[2][CHUNK]; // [block][token][128], 16-byte pieces swizzled by token
        float tile[most(shape<NT>::TILE_BYTES, shape<1>::TILE_BYTES) / 4]; // [token][TILE_STRIDE]
    };
    union {
        uint32_t words[2][PAIRS];   // [block][token]
        float floats[2][PAIRS * 4]; // [block][step][token]
    } scales;
    uint32_t arrivals;
};

// What a worker does next: units [begin, end) of one tile.
struct piece {
    uint32_t run;
    uint32_t begin, end;
    uint32_t tile_begin; // its first unit, counted from the table's start
    uint32_t g, d_begin;
};

// Every warp of the block comes to the same answer.
__device__ inline piece locate(const cuda_table *table, uint32_t unit, uint32_t end)
{
    uint32_t lane = threadIdx.x % 32, run = 0;
    for (uint32_t first = 0;; first += 32) {
        uint32_t i = first + lane;
        bool before = i < table->decode_runs && table->runs[i].unit_begin <= unit;
        uint32_t n = __popc(__ballot_sync(0xFFFFFFFF, before));
        run = first + n - 1; // unit_begin ascends; run 0 begins at 0
        if (n < 32)
            break;
    }
    const cuda_run &r = table->runs[run];
    uint32_t tile = (unit - r.unit_begin) / r.tile_units;
    piece p;
    p.run = run;
    p.tile_begin = r.unit_begin + tile * r.tile_units;
    p.begin = unit - p.tile_begin;
    p.end = min(r.tile_units, end - p.tile_begin);
    p.g = tile / r.tiles_d;
    p.d_begin = tile % r.tiles_d * (CUDA_DECODE_WARPS / r.warps_k * CUDA_PANEL_ROWS);
    return p;
}

// A warp's way through its panel of a piece: which 2 KiB come next.
struct stream {
    const uint8_t *panel; // this lane's 16 bytes of its first fragment; NULL: beyond D
    uint32_t block;       // of K = 128: the warp's first in unit 0
    uint32_t blocks;      // of the panel
    uint32_t blocks_step; // from unit to unit
};

__device__ __forceinline__ stream stream_of(const cuda_run &run, const piece &p)
{
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t d = p.d_begin + warp / run.warps_k * CUDA_PANEL_ROWS;
    uint32_t row_bytes = run.mode == CUDA_MODE_BF16 ? 2 * run.reduced_dim : run.reduced_dim;
    uint64_t row = (uint64_t)(run.group_begin + p.g) * run.output_dim + d;
    stream s;
    s.panel =
        d < run.output_dim ? (const uint8_t *)run.elements + row * row_bytes + lane * 16 : NULL;
    s.block = warp % run.warps_k;
    s.blocks = run.reduced_dim / CUDA_K_BLOCK;
    s.blocks_step = run.warps_k;
    return s;
}

// Half of K = 128 for BF16, all of it for E4M3.
template <bool BF16>
__device__ __forceinline__ void load_fragments(uint4 (&w)[4], const stream &s, uint32_t unit,
                                               uint32_t half)
{
    uint32_t block = unit * s.blocks_step + s.block;
    bool valid = s.panel != NULL && block < s.blocks;
    const uint8_t *from =
        s.panel + (uint64_t)(BF16 ? 2 * block + half : block) * 4 * CUDA_FRAGMENT_BYTES;
#pragma unroll
    for (int i = 0; i < 4; i++)
        w[i] = valid ? load_stream(from + i * CUDA_FRAGMENT_BYTES) : make_uint4(0, 0, 0, 0);
}

// Sets a piece going: its first fragments to registers, the rest towards L2.
__device__ __forceinline__ void begin(uint4 (&w)[4], const cuda_run &run, const piece &p,
                                      uint32_t prefetch_bytes)
{
    stream s = stream_of(run, p);
    load_fragments<false>(w, s, p.begin, 0);
    bool bf16 = run.mode == CUDA_MODE_BF16;
    if (bf16 && s.panel != NULL && p.begin * s.blocks_step + s.block < s.blocks)
        load_fragments<true>(w, s, p.begin, 0);
    if (threadIdx.x % 32 == 0 && s.block == 0 && s.panel != NULL && prefetch_bytes > 0) {
        uint32_t block_bytes = (bf16 ? 8 : 4) * CUDA_FRAGMENT_BYTES;
        uint32_t from = (p.begin + 1) * s.blocks_step * block_bytes;
        uint32_t to = min(p.end * s.blocks_step, s.blocks) * block_bytes;
        to = min(to, from + prefetch_bytes);
        if (from < to)
            prefetch_l2(s.panel + from, to - from);
    }
}

// Activations and their scales on the way to shared memory, chunk by chunk. A thread copies the same
// one or two tokens in every block, and looks after the scales of one pair (block, token).
template <int NT, int BLOCK> struct stager {
    using S = shape<NT>;
    static constexpr int COPY_TOKENS = S::TOKENS > THREADS / 8 ? S::TOKENS / (THREADS / 8) : 1;
    const uint8_t *from[COPY_TOKENS]; // NULL: no such token
    token_scales pair;                // at NULL: no such token
    scales_in_flight<BLOCK> pending;
    bool wide = false;

    __device__ __forceinline__ void start(const cuda_table *table, const cuda_run &run,
                                          const piece &p)
    {
        const cuda_row *rows =
            (const cuda_row *)((const uint8_t *)table + table->rows_offset) + run.row_begin;
#pragma unroll
        for (int i = 0; i < COPY_TOKENS; i++) {
            uint32_t token = (threadIdx.x / 8 + i * (THREADS / 8)) % S::TOKENS;
            from[i] = NULL;
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

    __device__ __forceinline__ void copy_chunk(uint32_t to, const cuda_run &run,
                                               uint32_t first_block)
    {
        constexpr int COPIES = S::CHUNK_BYTES / 16 / THREADS;
        uint32_t blocks = run.reduced_dim / CUDA_K_BLOCK;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            uint32_t pair = threadIdx.x / 8 + i * (THREADS / 8);
            uint32_t token = pair % S::TOKENS, block = first_block + pair / S::TOKENS;
            const uint8_t *row = from[i % COPY_TOKENS];
            bool valid = row != NULL && block < blocks;
            uint32_t piece16 = (threadIdx.x % 8) ^ (token & 7);
            copy_async(to + pair * CUDA_K_BLOCK + piece16 * 16,
                       valid ? row + (uint64_t)block * CUDA_K_BLOCK : (const uint8_t *)run.elements,
                       valid);
        }
    }

    __device__ __forceinline__ void load_scales(const cuda_run &run, uint32_t first_block)
    {
        uint32_t block = first_block + threadIdx.x / S::TOKENS;
        bool valid =
            pair.at != NULL && threadIdx.x < S::PAIRS && block < run.reduced_dim / CUDA_K_BLOCK;
        if (valid)
            pending.load(pair, block);
        else
            pending.load_one(pair.fp32);
    }

    template <bool WORDS>
    __device__ __forceinline__ void store_scales(uint32_t *words, float *floats)
    {
        if (threadIdx.x >= S::PAIRS)
            return;
        if (WORDS) {
            words[threadIdx.x] = pending.word(wide);
            return;
        }
        uint32_t block = threadIdx.x / S::TOKENS, token = threadIdx.x % S::TOKENS;
#pragma unroll
        for (int i = 0; i < pending.N; i++)
            floats[(block * 4 + i) * S::TOKENS + token] = pending.value(i, pair.fp32, wide);
    }
};

// Sums of the piece's units for this warp's panel. Returns whether a scale was wide.
template <int NT, int MODE, class SMEM>
__device__ __forceinline__ bool accumulate(float (&acc)[1][NT][4], uint4 (&w)[4], SMEM &smem,
                                           const cuda_table *table, const cuda_run &run,
                                           const piece &p)
{
    using S = shape<NT>;
    constexpr bool BF16 = MODE == CUDA_MODE_BF16;
    constexpr bool WORDS = MODE == CUDA_MODE_UE8M0_128 || MODE == CUDA_MODE_UE8M0_32;
    constexpr int BLOCK = MODE == CUDA_MODE_UE8M0_32 || MODE == CUDA_MODE_FP32_32 ? 32 : 128;
    constexpr int STEPS = 128 / BLOCK;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    stream s = stream_of(run, p);

    // Where this lane's scales of W lie: the block-scaled mma's row, or both accumulator rows.
    uint64_t panel_row = (uint64_t)(run.group_begin + p.g) * run.output_dim + p.d_begin +
                         threadIdx.x / 32 / S::WARPS_K * CUDA_PANEL_ROWS;
    if (s.panel == NULL)
        panel_row = 0; // any row that exists: its products are zeros
    const uint8_t *scales_w[2] = {
        weight_scales(run, BLOCK, panel_row + (WORDS ? 8 * (lane & 1) + lane / 4 : g)),
        weight_scales(run, BLOCK, panel_row + g + 8),
    };

    stager<NT, BLOCK> stage;
    stage.start(table, run, p);
    uint32_t activations = shared_address(smem.activations);
    stage.copy_chunk(activations, run, p.begin * S::WARPS_K);
    copy_async_commit();
    stage.load_scales(run, p.begin * S::WARPS_K);
    stage.template store_scales<WORDS>(smem.scales.words[0], smem.scales.floats[0]);

    uint32_t buffer = 0;
#pragma unroll 1
    for (uint32_t chunk = p.begin; chunk < p.end; chunk += CHUNK_UNITS, buffer ^= 1) {
        // This chunk has landed, and nobody reads the one before any more.
        copy_async_wait<0>();
        __syncthreads();
        bool more = chunk + CHUNK_UNITS < p.end;
        if (more) {
            stage.copy_chunk(activations + (buffer ^ 1) * SMEM::CHUNK, run,
                             (chunk + CHUNK_UNITS) * S::WARPS_K);
            copy_async_commit();
            stage.load_scales(run, (chunk + CHUNK_UNITS) * S::WARPS_K);
        }

        uint32_t end = min(chunk + CHUNK_UNITS, p.end);
#pragma unroll 1
        for (uint32_t unit = chunk; unit < end; unit++) {
            uint32_t block = unit * S::WARPS_K + s.block;
            uint32_t block_in_chunk = block - chunk * S::WARPS_K;
            uint32_t k_block = min(block, s.blocks - 1);
            uint32_t pairs =
                activations + buffer * SMEM::CHUNK + block_in_chunk * S::TOKENS * CUDA_K_BLOCK;
            auto b = [&](int n, int half) {
                uint32_t piece16 = (half * 4 + lane / 8) ^ (lane % 8);
                return load_matrices(pairs + (n * 8 + lane % 8) * CUDA_K_BLOCK + piece16 * 16);
            };
            const float *floats = smem.scales.floats[buffer] + block_in_chunk * 4 * S::TOKENS;
            const uint32_t *words = smem.scales.words[buffer] + block_in_chunk * S::TOKENS;

            uint4 next[4];
            if constexpr (!BF16) {
                if constexpr (WORDS) {
                    uint32_t word_w[1] = {weight_scale_word<BLOCK>(scales_w[0], k_block)};
                    load_fragments<false>(next, s, unit + 1 < p.end ? unit + 1 : unit, 0);
                    uint32_t word_a[(NT + 3) / 4];
#pragma unroll
                    for (int i = 0; i < (NT + 3) / 4; i++)
                        word_a[i] = words[(i * 32 + 8 * t + g) % S::TOKENS];
                    mma_k128_ue8m0<1, NT, BLOCK>(
                        acc, [&](int, int step) { return w[step]; }, b, word_w, word_a);
                } else {
                    float scale_w[2][STEPS];
#pragma unroll
                    for (int i = 0; i < STEPS; i++) {
                        scale_w[0][i] =
                            weight_scale(run.scales_fp32, scales_w[0], k_block * STEPS + i);
                        scale_w[1][i] =
                            weight_scale(run.scales_fp32, scales_w[1], k_block * STEPS + i);
                    }
                    load_fragments<false>(next, s, unit + 1 < p.end ? unit + 1 : unit, 0);
                    auto scale = [&](int, int n, int i, int step) {
                        step = BLOCK == 32 ? step : 0;
                        return scale_w[i / 2][step] *
                               floats[step * S::TOKENS + n * 8 + 2 * t + i % 2];
                    };
                    mma_k128_rescaled<1, NT, BLOCK>(
                        acc, [&](int, int step) { return w[step]; }, b, scale);
                }
            } else {
                auto scale = [&](int n, int i) { return floats[n * 8 + 2 * t + i % 2]; };
                load_fragments<true>(next, s, unit, 1);
                mma_k64_bf16<1, NT>(
                    acc, [&](int, int j) { return w[j]; }, [&](int n) { return b(n, 0); }, scale);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    w[i] = next[i];
                load_fragments<true>(next, s, unit + 1 < p.end ? unit + 1 : unit, 0);
                mma_k64_bf16<1, NT>(
                    acc, [&](int, int j) { return w[j]; }, [&](int n) { return b(n, 1); }, scale);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                w[i] = next[i];
        }
        if (more)
            stage.template store_scales<WORDS>(smem.scales.words[buffer ^ 1],
                                               smem.scales.floats[buffer ^ 1]);
    }
    return stage.wide;
}

// The worker whose piece holds a unit, when `units` are dealt out evenly to `workers`.
__device__ inline uint32_t worker_of(uint32_t unit, uint32_t units, uint32_t workers)
{
    return (uint32_t)((((uint64_t)unit + 1) * workers + units - 1) / units) - 1;
}

// Sums up the block's warps, then the workers that share the tile, and stores the result.
template <int NT, class SMEM>
__device__ __forceinline__ void finish(float (&acc)[1][NT][4], bool wide, SMEM &smem,
                                       const cuda_table *table, const cuda_run &run, const piece &p,
                                       float *partials, uint32_t partial_floats, uint32_t *counters)
{
    using S = shape<NT>;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const cuda_row *rows =
        (const cuda_row *)((const uint8_t *)table + table->rows_offset) + run.row_begin;
    wide |= threadIdx.x < S::ROWS && p.d_begin + threadIdx.x < run.output_dim &&
            weight_is_wide(run, p.g, p.d_begin + threadIdx.x);
    bool tile_wide = __syncthreads_or(wide); // and the activations are free to be written over

    // tile[token][part of R][row]
    uint32_t column = warp % S::WARPS_K * S::ROWS + warp / S::WARPS_K * CUDA_PANEL_ROWS + g;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            smem.tile[(n * 8 + 2 * t + i % 2) * TILE_STRIDE + column + i / 2 * 8] = acc[0][n][i];
    __syncthreads();

    bool whole = p.begin == 0 && p.end == run.tile_units;
    uint32_t worker = blockIdx.x;
    float *own = partials + (uint64_t)(2 * worker + (p.begin == 0)) * partial_floats;
    if (S::WARPS_K > 1 || !whole) {
        for (uint32_t i = threadIdx.x; i < run.rows * S::ROWS; i += THREADS) {
            float *at = smem.tile + i / S::ROWS * TILE_STRIDE + i % S::ROWS;
            float sum = at[0];
#pragma unroll
            for (int part = 1; part < S::WARPS_K; part++)
                sum += at[part * S::ROWS];
            if (whole)
                at[0] = sum;
            else
                __stcg(own + i, sum);
        }
    }

    if (!whole) {
        uint32_t units = table->decode_units, workers = table->decode_workers;
        uint32_t first = worker_of(p.tile_begin, units, workers);
        uint32_t last = worker_of(p.tile_begin + run.tile_units - 1, units, workers);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            uint32_t add = CONTRIBUTION + (tile_wide ? CONTRIBUTION_WIDE : 0);
            uint32_t arrivals = atomicAdd(&counters[first], add) + add;
            bool all = arrivals % CONTRIBUTION_WIDE == last - first + 1;
            if (all)
                counters[first] = 0; // for the next launch
            smem.arrivals = all ? arrivals : 0;
        }
        __syncthreads();
        uint32_t arrivals = smem.arrivals;
        if (arrivals == 0)
            return;
        __threadfence();
        tile_wide = arrivals >= CONTRIBUTION_WIDE;
        for (uint32_t i = threadIdx.x; i < run.rows * S::ROWS; i += THREADS) {
            const float *from = partials + i;
            float sum = __ldcg(from + (uint64_t)(2 * first + 1) * partial_floats);
            for (uint32_t other = first + 1; other <= last; other++)
                sum += __ldcg(from + (uint64_t)(2 * other) * partial_floats);
            smem.tile[i / S::ROWS * TILE_STRIDE + i % S::ROWS] = sum;
        }
    }
    __syncthreads();
    if (tile_wide) {
        wide_tile(run, rows, run.rows, p.g, p.d_begin, S::ROWS, smem.tile, TILE_STRIDE);
        __syncthreads();
    }
    store_tile(run, rows, run.rows, p.g, p.d_begin, S::ROWS, smem.tile, TILE_STRIDE);
}

template <int NT, class SMEM>
__device__ __forceinline__ bool accumulate_any(float (&acc)[1][NT][4], uint4 (&w)[4], SMEM &smem,
                                               const cuda_table *table, const cuda_run &run,
                                               const piece &p)
{
    switch (run.mode) {
    case CUDA_MODE_UE8M0_128:
        return accumulate<NT, CUDA_MODE_UE8M0_128>(acc, w, smem, table, run, p);
    case CUDA_MODE_UE8M0_32:
        return accumulate<NT, CUDA_MODE_UE8M0_32>(acc, w, smem, table, run, p);
    case CUDA_MODE_FP32_128:
        return accumulate<NT, CUDA_MODE_FP32_128>(acc, w, smem, table, run, p);
    case CUDA_MODE_FP32_32:
        return accumulate<NT, CUDA_MODE_FP32_32>(acc, w, smem, table, run, p);
    default:
        return accumulate<NT, CUDA_MODE_BF16>(acc, w, smem, table, run, p);
    }
}

// For runs of up to 8*NT tokens: code for those of up to 8, and for the rest.
template <int NT>
__global__ void __launch_bounds__(THREADS, NT <= 2   ? 3
                                           : NT == 4 ? 2
                                                     : 1)
    decode_kernel(const cuda_table *__restrict__ table, float *partials, uint32_t partial_floats,
                  uint32_t *counters, uint32_t prefetch_bytes)
{
    extern __shared__ __align__(128) uint8_t shared_memory[];
    auto &smem = *(decode_smem<NT> *)shared_memory;
    let_next_kernel_start();

    // ---- this worker's units
    uint32_t units = table->decode_units, workers = table->decode_workers;
    if (blockIdx.x >= workers) {
        wait_for_kernel_ahead(); // who waits for this kernel counts on that one too
        return;
    }
    uint32_t unit = (uint32_t)((uint64_t)units * blockIdx.x / workers);
    uint32_t end = (uint32_t)((uint64_t)units * (blockIdx.x + 1) / workers);

    // ---- weights before the wait: they do not depend on the kernel ahead
    uint4 w[4];
    piece p = locate(table, unit, end);
    begin(w, table->runs[p.run], p, prefetch_bytes);
    wait_for_kernel_ahead();

    while (true) {
        const cuda_run &run = table->runs[p.run];
        piece now = p;
        bool few = NT == 1 || run.warps_k == shape<1>::WARPS_K;
        float acc[1][NT][4] = {};
        float acc_few[1][1][4] = {};
        bool wide;
        if (few)
            wide = accumulate_any<1>(acc_few, w, smem, table, run, now);
        else
            wide = accumulate_any<NT>(acc, w, smem, table, run, now);

        // ---- the next tile's weights travel while this one is finished
        unit = now.tile_begin + now.end;
        bool more = unit < end;
        if (more) {
            p = locate(table, unit, end);
            begin(w, table->runs[p.run], p, prefetch_bytes);
        }
        if (few)
            finish<1>(acc_few, wide, smem, table, run, now, partials, partial_floats, counters);
        else
            finish<NT>(acc, wide, smem, table, run, now, partials, partial_floats, counters);
        if (!more)
            return;
        __syncthreads(); // the tile is stored; activations may come
    }
}

// ---- host

static const void *kernel_of(uint32_t tokens)
{
    return tokens <= 8    ? (const void *)decode_kernel<1>
           : tokens <= 16 ? (const void *)decode_kernel<2>
           : tokens <= 32 ? (const void *)decode_kernel<4>
                          : (const void *)decode_kernel<8>;
}

static uint32_t smem_of(uint32_t tokens)
{
    return tokens <= 8    ? sizeof(decode_smem<1>)
           : tokens <= 16 ? sizeof(decode_smem<2>)
           : tokens <= 32 ? sizeof(decode_smem<4>)
                          : sizeof(decode_smem<8>);
}

static_assert(sizeof(decode_smem<8>) <= CUDA_SMEM_BYTES_MAX, "SM 12.0 has no more");

extern "C" cudaError_t cuda_decode_init(struct cuda_bucket *bucket, int sm_count)
{
    uint32_t tokens = bucket->decode_tokens;
    cudaError_t error = cudaFuncSetAttribute(
        kernel_of(tokens), cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem_of(tokens));
    int blocks = 0;
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_of(tokens), THREADS,
                                                              smem_of(tokens));
    if (error != cudaSuccess)
        return error;
    // Two keep the memory busy; a third place is left to the kernel that follows.
    bucket->decode_workers = (uint32_t)(sm_count * (blocks > 2 ? 2 : blocks));
    bucket->prefetch_bytes = 1 << 20;
    return cudaSuccess;
}

static uint32_t partial_floats_of(const struct cuda_bucket *bucket)
{
    uint32_t tile = bucket->decode_tokens * CUDA_DECODE_WARPS * CUDA_PANEL_ROWS;
    return bucket->decode_tokens <= 8 ? tile / 4 : bucket->decode_tokens <= 16 ? tile / 2 : tile;
}

extern "C" uint64_t cuda_workspace_bytes(const struct cuda_bucket *bucket)
{
    uint64_t counters = ((uint64_t)bucket->decode_workers * 4 + 255) / 256 * 256;
    return counters + (uint64_t)bucket->decode_workers * 2 * partial_floats_of(bucket) * 4;
}

extern "C" cudaError_t cuda_decode_launch(const struct cuda_bucket *bucket,
                                          const struct cuda_table *table, void *workspace,
                                          cudaStream_t stream)
{
    uint32_t *counters = (uint32_t *)workspace;
    uint64_t counters_bytes = ((uint64_t)bucket->decode_workers * 4 + 255) / 256 * 256;
    float *partials = (float *)((uint8_t *)workspace + counters_bytes);
    uint32_t partial_floats = partial_floats_of(bucket);
    uint32_t prefetch_bytes = bucket->prefetch_bytes;
    void *arguments[] = {&table, &partials, &partial_floats, &counters, &prefetch_bytes};

    cudaLaunchAttribute serialization = {};
    serialization.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    serialization.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(bucket->decode_workers);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = smem_of(bucket->decode_tokens);
    config.stream = stream;
    config.attrs = &serialization;
    config.numAttrs = 1;
    return cudaLaunchKernelExC(&config, kernel_of(bucket->decode_tokens), arguments);
}
