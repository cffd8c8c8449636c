// Few tokens: the weights stream once, at the memory's speed, and everything else stays out of
// their way. Products by mma (decode.cu), or by wgmma where tokens are a few more (few.cu).
//
//     units   ----------------------------------------------------------   16 KiB of weights each
//     workers |-- 0 --|-- 1 --|-- 2 --| ...                     equal pieces, one thread block each
//     tiles   |====================|====================| ...   rows of D that share their R
//
// A warp copies its fragments into a ring of its own, RING steps ahead and on into the next tile,
// and reads back only what its own lanes copied: no barrier guards the weights. Warps meet only at
// the edges of a chunk, for the tokens' activations, of which the first chunks come through
// registers and all others one chunk ahead, in the same groups of copies as the weights.
//
// Nothing waits for the kernel ahead in the stream, which hides its tail and this one's start. How short
// a launch can be is then a block's life over the blocks that fit an SM: for up to 16 tokens blocks are
// small, so that three or four do.
//
// Where a tile falls to several workers each leaves its sum in the workspace and the last to arrive
// adds them up, in the workers' order, so that a result does not depend on timing.
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
    WARPS = CUDA_DECODE_WARPS,
    WARPS_LOG2 = 3,
    THREADS = WARPS * 32,
    STEP_BYTES = 4 * CUDA_FRAGMENT_BYTES, // of a warp: K = 128 of E4M3, K = 64 of BF16
    CHUNKS = 2,                           // of activations, in shared memory
    TILE_COLUMNS = WARPS * CUDA_PANEL_ROWS,
    TILE_STRIDE = 132, // floats of one token in shared memory; 2*132 % 32 = 8: no bank conflicts
    CONTRIBUTION = 1,  // what a worker adds to a tile's counter
    CONTRIBUTION_WIDE = 1 << 16,
};

// What a kernel is built for. One of all modes needs more registers than there are, and loses a
// twelfth of its time to what they do not hold: so the modes of DeepSeek-V4's checkpoints, with
// either scale type of activations, have kernels of their own for tables that hold no other.
enum form { UE8M0_128, FP32_128, ANY_MODE, BY_WGMMA };

// Of a kernel for runs of up to 8*MOST tokens. The fewer, the more kernels fit an SM at once.
template <int MOST> struct decode_smem {
    static constexpr int RING = MOST <= 2 ? 2 : 4;
    static constexpr int CHUNK_PAIRS = MOST == 1 ? CUDA_DECODE_PAIRS_FEW : CUDA_DECODE_PAIRS;
    static constexpr int CHUNK_BYTES = CHUNK_PAIRS * CUDA_K_BLOCK;

    union {
        struct {
            uint8_t activations[CHUNKS][CHUNK_BYTES]; // [block][token][128], 16-byte pieces
                                                      // swizzled by token
            uint32_t scales[CHUNKS][2 * CHUNK_PAIRS]; // words or floats, [block][step][token]
        };
        float tile[8 * MOST * TILE_STRIDE]; // [token][TILE_STRIDE]
    };
    uint8_t ring[WARPS][RING][STEP_BYTES];

    // Of the tile that is gathered: behind `tile`, where scales are needed no more.
    __device__ __forceinline__ uint32_t &arrivals()
    {
        static_assert(sizeof tile < sizeof activations + sizeof scales, "");
        return scales[CHUNKS - 1][2 * CHUNK_PAIRS - 1];
    }
};
static_assert(WARPS == 1 << WARPS_LOG2, "");
static_assert(sizeof(decode_smem<8>) <= CUDA_SMEM_BYTES_MAX, "SM 12.0 has no more");
static_assert(2 * (sizeof(decode_smem<1>) + 1024) <= 100 * 1024, "two blocks on an SM of SM 12.0");

// What of a table is this kernel's.
struct work {
    const cuda_run *runs;
    uint32_t runs_n, units, workers;
};

template <form FORM> __device__ __forceinline__ work work_of(const cuda_table *table)
{
    if (FORM != BY_WGMMA)
        return {table->runs, table->decode_runs, table->decode_units, table->decode_workers};
    const cuda_run *runs = table->runs + table->decode_runs + table->prefill_runs;
    uint32_t n = table->hopper_runs;
    return {runs, n, table->hopper_units, n > 0 ? runs[0].workers : 0};
}

// What a worker does next: units [begin, end) of one tile.
struct piece {
    const cuda_run *run;
    uint32_t begin, end;
    uint32_t tile_begin; // its first unit, counted from the line's start
    uint32_t g, d_begin;
};

// Every warp of the block comes to the same answer. All blocks read the table at once, at the very
// start: it must cost few cache lines, and one run's fit into the first.
__device__ inline piece locate(const work &work, uint32_t unit, uint32_t end)
{
    uint32_t run = work.runs_n == 1 ? 0 : find_run(work.runs, work.runs_n, unit);
    const cuda_run &r = work.runs[run];
    uint32_t tile = (unit - r.unit_begin) / r.tile_units;
    piece p;
    p.run = &r;
    p.tile_begin = r.unit_begin + tile * r.tile_units;
    p.begin = unit - p.tile_begin;
    p.end = min(r.tile_units, end - p.tile_begin);
    p.g = tile / r.tiles_d;
    p.d_begin = tile % r.tiles_d * (TILE_COLUMNS >> r.warps_k_log2);
    return p;
}

// Which of a tile's panels is this warp's, and which part of R.
struct place_of_warp {
    uint32_t panel, part;

    __device__ __forceinline__ place_of_warp(const cuda_run &run)
    {
        uint32_t warp = threadIdx.x / 32, panels = WARPS >> run.warps_k_log2;
        panel = warp & (panels - 1);
        part = warp >> (WARPS_LOG2 - run.warps_k_log2);
    }
};

// A warp's weights on their way through its ring. Runs ahead of the sums by RING steps.
template <int RING> struct stream {
    const work *todo;
    const void *anything; // where copies of nothing point
    const uint8_t *from;  // this lane's 16 bytes of the next step
    uint32_t valid;       // steps left that exist, of this piece
    uint32_t left;        // steps left of this piece: those beyond D or R copy zeros
    uint32_t stride;      // bytes from unit to unit
    uint32_t half;        // BF16: of the unit at hand
    bool bf16;
    uint32_t unit, end;  // after this piece, of the worker
    uint32_t slot, ring; // the next; address of the warp's

    __device__ __forceinline__ void open(const piece &p)
    {
        const cuda_run &run = *p.run;
        uint32_t lane = threadIdx.x % 32;
        place_of_warp at(run);
        uint32_t d = p.d_begin + at.panel * CUDA_PANEL_ROWS;
        bf16 = run.mode == CUDA_MODE_BF16;
        half = 0;
        uint32_t block_bytes = bf16 ? 2 * STEP_BYTES : STEP_BYTES, steps = bf16 ? 2 : 1;
        uint64_t row = (uint64_t)(run.group_begin + p.g) * run.output_dim + d;
        uint32_t block = (p.begin << run.warps_k_log2) + at.part;
        uint32_t blocks = run.reduced_dim / CUDA_K_BLOCK;
        stride = block_bytes << run.warps_k_log2;
        from = (const uint8_t *)run.elements + row * (run.reduced_dim * steps) +
               (uint64_t)block * block_bytes + lane * 16;
        left = (p.end - p.begin) * steps;
        valid = 0;
        if (d < run.output_dim && block < blocks)
            valid = min(left, (((blocks - block - 1) >> run.warps_k_log2) + 1) * steps);
        unit = p.tile_begin + p.end;
    }

    __device__ __forceinline__ void start(const cuda_table *table, const work &work,
                                          const piece &first, uint32_t to,
                                          const uint8_t *ring_of_warp)
    {
        todo = &work;
        anything = table;
        end = to;
        slot = 0;
        ring = shared_address(ring_of_warp) + threadIdx.x % 32 * 16;
        open(first);
    }

    // One step into the slot that was read last. Commits nothing.
    __device__ __forceinline__ void copy_step()
    {
        uint32_t to = ring + slot * STEP_BYTES;
        slot = (slot + 1) % RING;
        if (left == 0) {
            if (unit >= end)
                return;
            open(locate(*todo, unit, end));
        }
        const uint8_t *at = valid > 0 ? from : (const uint8_t *)anything;
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

// Activations and their scales on the way to shared memory, chunk by chunk. A thread copies the
// same one or two tokens in every block, and looks after the scales of one pair (block, token).
template <class SMEM, int NT, int MODE> struct stager {
    static constexpr int TOKENS = 8 * NT, CHUNK_PAIRS = SMEM::CHUNK_PAIRS;
    static constexpr bool WORDS = MODE == CUDA_MODE_UE8M0_128 || MODE == CUDA_MODE_UE8M0_32;
    static constexpr int BLOCK = MODE == CUDA_MODE_UE8M0_32 || MODE == CUDA_MODE_FP32_32 ? 32 : 128;
    // (block, token); four floats each need the room of two.
    static constexpr int PAIRS = MODE == CUDA_MODE_FP32_32 ? CHUNK_PAIRS / 2 : CHUNK_PAIRS;
    static constexpr int CHUNK_BLOCKS = PAIRS / TOKENS; // of K = 128
    static constexpr int COPIES = PAIRS * 8 / THREADS;  // of 16 bytes, by a thread
    static constexpr int SCALES = WORDS || BLOCK == 128 ? 1 : 4;
    static constexpr int COPY_TOKENS = TOKENS > THREADS / 8 ? TOKENS / (THREADS / 8) : 1;
    static_assert(CHUNK_BLOCKS >= 1 && PAIRS <= THREADS && COPIES >= COPY_TOKENS, "");

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
            uint32_t token = (threadIdx.x / 8 + i * (THREADS / 8)) % TOKENS;
            from[i] = (const uint8_t *)table;
            if (token < run.rows)
                from[i] = (const uint8_t *)rows[token].activations +
                          (uint64_t)p.g * rows[token].activation_group * run.reduced_dim +
                          threadIdx.x % 8 * 16;
        }
        uint32_t token = threadIdx.x % TOKENS;
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
            uint32_t token = pair_index % TOKENS, block = first_block + pair_index / TOKENS;
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
    __device__ __forceinline__ void load_chunks(SMEM &smem, uint32_t first_block)
    {
        uint4 held[CHUNKS][COPIES];
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            for_pieces(first_block + c * CHUNK_BLOCKS,
                       [&](int i, uint32_t, const uint8_t *source, bool valid) {
                           held[c][i] = load_if(valid, source);
                       });
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            for_pieces(0, [&](int i, uint32_t offset, const uint8_t *, bool) {
                *(uint4 *)(smem.activations[c] + offset) = held[c][i];
            });
    }

    __device__ __forceinline__ void load_scales(uint32_t first_block)
    {
        uint32_t block = first_block + threadIdx.x / TOKENS;
        if (threadIdx.x % TOKENS < tokens && threadIdx.x < PAIRS && block < blocks)
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
        uint32_t block = threadIdx.x / TOKENS, token = threadIdx.x % TOKENS;
#pragma unroll
        for (int i = 0; i < SCALES; i++)
            to[(block * SCALES + i) * TOKENS + token] =
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

// K = 128 of this warp's panel by wgmma: acc += sum * scale of the row * scale of the token.
// `meanwhile` is called once the fragments are read.
template <int NT, class F>
__device__ __forceinline__ void wgmma_k128(float (&acc)[NT][4], const uint4 (&w)[4], uint64_t a,
                                           const float (&scale_w)[2][1], const float *scales_a,
                                           F meanwhile)
{
    float sum[4 * NT];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++)
        wgmma(sum, w[step], a + 2 * step, step != 0);
    wgmma_commit();
    meanwhile();
    float2 of[NT];
#pragma unroll
    for (int n = 0; n < NT; n++)
        of[n] = *(const float2 *)(scales_a + 8 * n + 2 * (threadIdx.x % 4));
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < NT; n++) {
        acc[n][0] = fmaf(sum[4 * n], of[n].x * scale_w[0][0], acc[n][0]);
        acc[n][1] = fmaf(sum[4 * n + 1], of[n].y * scale_w[0][0], acc[n][1]);
        acc[n][2] = fmaf(sum[4 * n + 2], of[n].x * scale_w[1][0], acc[n][2]);
        acc[n][3] = fmaf(sum[4 * n + 3], of[n].y * scale_w[1][0], acc[n][3]);
    }
}

// Sums of the piece's units for this warp's panel. Returns whether a scale was wide.
template <bool WGMMA, int NT, int MODE, int MOST>
__device__ __forceinline__ bool
accumulate(float (&acc)[1][NT][4], stream<decode_smem<MOST>::RING> &weights,
           decode_smem<MOST> &smem, const cuda_table *table, const cuda_run &run, const piece &p)
{
    using SMEM = decode_smem<MOST>;
    using G = stager<SMEM, NT, MODE>;
    constexpr bool BF16 = MODE == CUDA_MODE_BF16;
    constexpr bool WORDS = G::WORDS;
    constexpr int BLOCK = G::BLOCK, RING = SMEM::RING, TOKENS = 8 * NT;
    constexpr int STEPS = BF16 ? 2 : 1;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t warps_k = 1 << run.warps_k_log2, chunk_units = G::CHUNK_BLOCKS >> run.warps_k_log2;
    place_of_warp at(run);

    // Where this lane's scales of W lie: the block-scaled mma's row, or both accumulator rows.
    uint64_t panel_row = (uint64_t)(run.group_begin + p.g) * run.output_dim +
                         min(p.d_begin + at.panel * CUDA_PANEL_ROWS,
                             run.output_dim - CUDA_PANEL_ROWS); // beyond D products are zeros
    const uint8_t *scales_w[2] = {
        weight_scales(run, BLOCK, panel_row + (WORDS ? 8 * (lane & 1) + lane / 4 : g)),
        weight_scales(run, BLOCK, panel_row + g + 8),
    };
    panel_scales<MODE> panel;
    uint32_t block = p.begin * warps_k + at.part;
    uint32_t block_last = run.reduced_dim / CUDA_K_BLOCK - 1;
    panel.load(run, scales_w, min(block, block_last));

    G stage;
    stage.start(table, run, p);
    stage.load_scales(p.begin * warps_k);
    stage.load_chunks(smem, p.begin * warps_k);
    stage.store_scales(smem.scales[0]);
    __syncthreads();

    uint32_t index = 0;           // of the chunk
    uint32_t slot = weights.slot; // copied first of all that are in flight
    uint32_t ring = weights.ring;
#pragma unroll 1
    for (uint32_t chunk = p.begin; chunk < p.end; chunk += chunk_units, index++) {
        if (index >= CHUNKS) {
            // It came with the first step of the chunk CHUNKS - 1 before.
            uint32_t later = (CHUNKS - 1) * chunk_units * STEPS - 1; // steps
            if (later >= RING - 1)
                copy_async_wait<RING - 1>();
            else if (later >= 1)
                copy_async_wait<1>();
            else
                copy_async_wait<0>();
        }
        if (index != 0) {
            __syncthreads(); // nobody reads the chunk before any more
            uint32_t ahead = chunk + (CHUNKS - 1) * chunk_units;
            if (ahead < p.end)
                stage.copy_chunk(smem.activations[(index + CHUNKS - 1) % CHUNKS], ahead * warps_k);
        }
        if (WGMMA)
            fence_for_wgmma(); // here and not where it was copied: there it waits for later copies
        bool more = chunk + chunk_units < p.end;
        if (more)
            stage.load_scales((chunk + chunk_units) * warps_k);
        uint32_t end = min(chunk + chunk_units, p.end);
        uint32_t pairs =
            shared_address(smem.activations[index % CHUNKS]) + at.part * (TOKENS * CUDA_K_BLOCK);
        const uint32_t *scales = smem.scales[index % CHUNKS] + at.part * (G::SCALES * TOKENS);
#pragma unroll 1
        for (uint32_t unit = chunk; unit < end; unit++) {
            auto b = [&](int n, int half) {
                uint32_t piece16 = (half * 4 + lane / 8) ^ (lane % 8);
                return load_matrices(pairs + (n * 8 + lane % 8) * CUDA_K_BLOCK + piece16 * 16);
            };
            const float *floats = (const float *)scales;
            panel_scales<MODE> now = panel;
            block += warps_k;
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
                if constexpr (WGMMA) {
                    wgmma_k128(acc[0], fragments, activations_descriptor(pairs), now.value, floats,
                               [&] { weights.copy_step(); });
                } else if constexpr (WORDS) {
                    uint32_t word_a[(NT + 3) / 4];
#pragma unroll
                    for (int i = 0; i < (NT + 3) / 4; i++)
                        word_a[i] = scales[(i * 32 + 8 * t + g) % TOKENS];
                    mma_k128_ue8m0<1, NT, BLOCK>(acc, w, b, now.word, word_a);
                } else if constexpr (!BF16) {
                    mma_k128_rescaled<1, NT, BLOCK>(
                        acc, w, b,
                        [&](int, int, int step) {
                            return make_float2(now.value[0][step], now.value[1][step]);
                        },
                        [&](int n, int step) {
                            return *(const float2 *)(floats + step * TOKENS + n * 8 + 2 * t);
                        });
                } else {
                    auto scale = [&](int n, int i) { return floats[n * 8 + 2 * t + i % 2]; };
                    mma_k64_bf16<1, NT>(acc, w, b, half, scale);
                }
                if (!WGMMA)
                    weights.copy_step(); // into the slot that was just read
                copy_async_commit();
            });
            pairs += warps_k * TOKENS * CUDA_K_BLOCK;
            scales += warps_k * G::SCALES * TOKENS;
        }
        if (more)
            stage.store_scales(smem.scales[(index + 1) % CHUNKS]);
    }
    return stage.wide;
}

// Adds up what the workers that share a tile have summed, in their order. True for the one that
// arrives last, whose acc then holds the tile's.
template <int NT, int MOST>
__device__ __forceinline__ bool gather(float (&acc)[1][NT][4], bool &wide, decode_smem<MOST> &smem,
                                       const work &work, const cuda_run &run, const piece &p,
                                       float *partials, uint32_t *counters)
{
    auto place = [&](uint32_t worker, bool opens, int n) {
        return (float4 *)partials + (((uint64_t)worker * 2 + opens) * MOST + n) * THREADS +
               threadIdx.x;
    };
    uint32_t eights = (run.rows + 7) / 8;
#pragma unroll
    for (int n = 0; n < NT; n++)
        if (n < eights)
            __stcg(place(blockIdx.x, p.begin == 0, n), *(float4 *)acc[0][n]);
    uint32_t first = worker_of(p.tile_begin, work.units, work.workers);
    uint32_t last = worker_of(p.tile_begin + run.tile_units - 1, work.units, work.workers);
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t add = CONTRIBUTION + (wide ? CONTRIBUTION_WIDE : 0);
        uint32_t arrivals = add_acquire_release(&counters[first], add) + add;
        bool all = arrivals % CONTRIBUTION_WIDE == last - first + 1;
        if (all)
            counters[first] = 0; // for the next launch
        smem.arrivals() = all ? arrivals : 0;
    }
    __syncthreads();
    uint32_t arrivals = smem.arrivals();
    if (arrivals == 0)
        return false;
    wide = arrivals >= CONTRIBUTION_WIDE;
    bool two = last == first + 1; // their order is all the same
#pragma unroll 1
    for (uint32_t other = first; other <= last; other++) {
        if (two && other == blockIdx.x)
            continue;
        bool adds = two || other != first;
#pragma unroll
        for (int n = 0; n < NT; n++)
            if (n < eights) {
                float4 v = __ldcg(place(other, other == first, n));
                acc[0][n][0] = adds ? acc[0][n][0] + v.x : v.x;
                acc[0][n][1] = adds ? acc[0][n][1] + v.y : v.y;
                acc[0][n][2] = adds ? acc[0][n][2] + v.z : v.z;
                acc[0][n][3] = adds ? acc[0][n][3] + v.w : v.w;
            }
    }
    return true;
}

__device__ __forceinline__ float4 add(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Sums up the block's warps and stores the result.
template <int NT, int MOST>
__device__ __forceinline__ void store(const float (&acc)[1][NT][4], bool wide,
                                      decode_smem<MOST> &smem, const cuda_table *table,
                                      const cuda_run &run, const piece &p)
{
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t warps_k = 1 << run.warps_k_log2, tile_rows = TILE_COLUMNS >> run.warps_k_log2;
    uint32_t columns = tile_rows / 4, columns_log2 = WARPS_LOG2 + 2 - run.warps_k_log2;
    place_of_warp at_warp(run);
    const cuda_row *rows =
        (const cuda_row *)((const uint8_t *)table + table->rows_offset) + run.row_begin;

    // tile[token][part of R][row]
    uint32_t column = at_warp.part * tile_rows + at_warp.panel * CUDA_PANEL_ROWS + g;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            smem.tile[(n * 8 + 2 * t + i % 2) * TILE_STRIDE + column + i / 2 * 8] = acc[0][n][i];
    __syncthreads();
    if (warps_k > 1) {
        for (uint32_t i = threadIdx.x; i < run.rows * columns; i += THREADS) {
            float4 *at =
                (float4 *)(smem.tile + (i >> columns_log2) * TILE_STRIDE) + (i & (columns - 1));
            float4 sum = at[0];
            for (uint32_t part = 1; part < warps_k; part++)
                sum = add(sum, at[part * columns]);
            at[0] = sum;
        }
        __syncthreads();
    }
    if (wide) {
        wide_tile(run, rows, run.rows, p.g, p.d_begin, tile_rows, smem.tile, TILE_STRIDE);
        __syncthreads();
    }
    store_tile(run, rows, run.rows, p.g, p.d_begin, tile_rows, smem.tile, TILE_STRIDE);
}

template <form FORM, int NT, int MOST>
__device__ __forceinline__ bool
accumulate_by(float (&acc)[1][NT][4], stream<decode_smem<MOST>::RING> &weights,
              decode_smem<MOST> &smem, const cuda_table *table, const cuda_run &run, const piece &p)
{
    if constexpr (FORM == BY_WGMMA) // any scales in blocks of 128
        return accumulate<true, NT, CUDA_MODE_FP32_128>(acc, weights, smem, table, run, p);
    else if constexpr (FORM == UE8M0_128)
        return accumulate<false, NT, CUDA_MODE_UE8M0_128>(acc, weights, smem, table, run, p);
    else if constexpr (FORM == FP32_128)
        return accumulate<false, NT, CUDA_MODE_FP32_128>(acc, weights, smem, table, run, p);
    else
        switch (run.mode) {
        case CUDA_MODE_UE8M0_128:
            return accumulate<false, NT, CUDA_MODE_UE8M0_128>(acc, weights, smem, table, run, p);
        case CUDA_MODE_UE8M0_32:
            return accumulate<false, NT, CUDA_MODE_UE8M0_32>(acc, weights, smem, table, run, p);
        case CUDA_MODE_FP32_128:
            return accumulate<false, NT, CUDA_MODE_FP32_128>(acc, weights, smem, table, run, p);
        case CUDA_MODE_FP32_32:
            return accumulate<false, NT, CUDA_MODE_FP32_32>(acc, weights, smem, table, run, p);
        default:
            return accumulate<false, NT, CUDA_MODE_BF16>(acc, weights, smem, table, run, p);
        }
}

template <form FORM, int NT, int MOST>
__device__ __forceinline__ void
do_piece(stream<decode_smem<MOST>::RING> &weights, decode_smem<MOST> &smem, const cuda_table *table,
         const work &work, const cuda_run &run, const piece &p, float *partials, uint32_t *counters)
{
    float acc[1][NT][4] = {};
    uint32_t d = p.d_begin + threadIdx.x;
    bool wide = threadIdx.x < TILE_COLUMNS >> run.warps_k_log2 && d < run.output_dim &&
                weight_is_wide(run, p.g, d);
    wide |= accumulate_by<FORM>(acc, weights, smem, table, run, p);
    wide = __syncthreads_or(wide); // and the activations are free to be written over
    bool whole = p.begin == 0 && p.end == run.tile_units;
    if (whole || gather(acc, wide, smem, work, run, p, partials, counters))
        store(acc, wide, smem, table, run, p);
    __syncthreads(); // the tile is stored; activations may come
}

// The next kernels' blocks beside this one's, where shared memory has room for them.
template <int MOST> constexpr int blocks_of_sm()
{
#if MMA_BLOCK_SCALED || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
    return MOST == 1 ? 2 : 1; // 100 KiB to an SM
#else
    return MOST == 1 ? 4 : MOST == 2 ? 3 : 2;
#endif
}

// For runs of up to 8*MOST tokens: code for those of up to 8, and for the rest.
template <form FORM, int MOST>
__global__ void __launch_bounds__(THREADS, blocks_of_sm<MOST>())
    decode_kernel(const cuda_table *__restrict__ table, uint32_t table_lines, float *partials,
                  uint32_t *counters)
{
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    auto &smem = *(decode_smem<MOST> *)shared_memory;
    let_next_kernel_start();
    // Of a single run the rows follow the first line: on their way before it is read.
    if (threadIdx.x < table_lines)
        prefetch((const uint8_t *)table + threadIdx.x * 128);

    work work = work_of<FORM>(table);
    if (blockIdx.x >= work.workers) {
        end_after_kernel_ahead();
        return;
    }
    uint32_t unit = unit_of(blockIdx.x, work.units, work.workers);
    uint32_t end = unit_of(blockIdx.x + 1, work.units, work.workers);

    stream<decode_smem<MOST>::RING> weights;
    piece p = locate(work, unit, end);
    weights.start(table, work, p, end, smem.ring[threadIdx.x / 32][0]);
#pragma unroll 1
    for (int i = 0; i < decode_smem<MOST>::RING; i++) {
        weights.copy_step();
        copy_async_commit();
    }

#pragma unroll 1
    for (;;) {
        const cuda_run &run = *p.run;
        constexpr int FEWEST = FORM == BY_WGMMA ? MOST : 1;
        if (run.rows <= 8 * FEWEST)
            do_piece<FORM, FEWEST>(weights, smem, table, work, run, p, partials, counters);
        else if constexpr (FEWEST != MOST)
            do_piece<FORM, MOST>(weights, smem, table, work, run, p, partials, counters);
        unit = p.tile_begin + p.end;
        if (unit >= end)
            break;
        p = locate(work, unit, end);
    }
    end_after_kernel_ahead();
}

} // namespace
