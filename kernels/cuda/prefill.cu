// Many tokens: tiles of 128 outputs by 64 tokens, one thread block each, two blocks to an SM so
// that one computes while the other waits.
//
//     stage (K = 128)   W: 8 panels of 2 KiB, as they lie in memory    A: 64 tokens x 128, swizzled
//     four warps        2 x 2, each 64 outputs x 32 tokens
//
// Blocks take tiles in turn, neighbours in the order share activations and weights in L2: outputs
// run fastest, then tokens, then groups.
#include "launch.h"

#include "copy.cuh"
#include "line.cuh"
#include "mma.cuh"
#include "scales.cuh"
#include "wide.cuh"

namespace
{

enum {
    THREADS = 128,
    TOKENS = CUDA_PREFILL_TOKENS,
    ROWS = CUDA_PREFILL_ROWS,
    PANELS = ROWS / CUDA_PANEL_ROWS,
    PANEL_BYTES = 4 * CUDA_FRAGMENT_BYTES, // of a stage
    W_BYTES = PANELS * PANEL_BYTES,
    A_BYTES = TOKENS * CUDA_K_BLOCK,
    STAGES = 2,
    TILE_STRIDE = 132, // floats; see decode.cu
    MT = 4,            // fragments of a warp
    NT = 4,
};

struct prefill_smem {
    union {
        struct {
            uint8_t w[W_BYTES];
            uint8_t a[A_BYTES];
        } stages[STAGES];
        float tile[TOKENS * TILE_STRIDE];
    };
    // Of two stages; of the one that is computed where a token has four floats.
    union {
        uint32_t words[2][TOKENS];
        float floats[2][TOKENS];
        float steps[4 * TOKENS]; // [step][token]
    } scales;
};

static_assert(sizeof(prefill_smem) <= 49 * 1024, "two blocks to an SM of 100 KiB");
static_assert(TOKENS * TILE_STRIDE * 4 <= STAGES * (W_BYTES + A_BYTES), "the tile fits");

struct tile {
    uint32_t run;
    uint32_t g, d_begin;
    uint32_t token_begin, tokens;
};

__device__ inline tile locate(const cuda_table *table, uint32_t index)
{
    uint32_t run =
        table->decode_runs + find_run(table->runs + table->decode_runs, table->prefill_runs, index);
    const cuda_run &r = table->runs[run];
    uint32_t tiles_t = (r.rows + TOKENS - 1) / TOKENS;
    index -= r.unit_begin;
    tile t;
    t.run = run;
    t.d_begin = index % r.tiles_d * ROWS;
    t.token_begin = index / r.tiles_d % tiles_t * TOKENS;
    t.tokens = min(r.rows - t.token_begin, (uint32_t)TOKENS);
    t.g = index / r.tiles_d / tiles_t;
    return t;
}

// Accumulates one tile. Stages are K = 128; for BF16 weights half of that, with all of A's.
template <int MODE>
__device__ __forceinline__ bool accumulate(float (&acc)[MT][NT][4], prefill_smem &smem,
                                           const cuda_run &run, const cuda_row *rows,
                                           const tile &at)
{
    constexpr bool BF16 = MODE == CUDA_MODE_BF16;
    constexpr bool WORDS = MODE == CUDA_MODE_UE8M0_128 || MODE == CUDA_MODE_UE8M0_32;
    constexpr int BLOCK = MODE == CUDA_MODE_UE8M0_32 || MODE == CUDA_MODE_FP32_32 ? 32 : 128;
    constexpr int STEPS = 128 / BLOCK;
    constexpr uint32_t STAGES_PER_BLOCK = BF16 ? 2 : 1;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t warp_m = threadIdx.x / 64, warp_n = threadIdx.x / 32 % 2;
    uint32_t stages_n = run.reduced_dim / CUDA_K_BLOCK * STAGES_PER_BLOCK;

    // ---- what this thread copies: a quarter of W's 1024 pieces of 16 bytes, of A's 512 four rows
    uint64_t tile_row = (uint64_t)(run.group_begin + at.g) * run.output_dim + at.d_begin;
    uint64_t panel_bytes = (uint64_t)stages_n * PANEL_BYTES;
    const uint8_t *from_w =
        (const uint8_t *)run.elements + tile_row / CUDA_PANEL_ROWS * panel_bytes + threadIdx.x * 16;
    uint32_t panels = min((run.output_dim - at.d_begin) / CUDA_PANEL_ROWS, (uint32_t)PANELS);
    const uint8_t *from_a[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t token = threadIdx.x / 8 + 16 * i;
        const cuda_row &row = rows[token < at.tokens ? token : 0]; // always good to read
        from_a[i] = (const uint8_t *)row.activations +
                    (uint64_t)at.g * row.activation_group * run.reduced_dim + threadIdx.x % 8 * 16;
    }
    uint32_t base = shared_address(smem.stages);
    constexpr uint32_t STAGE_BYTES = W_BYTES + A_BYTES;
    auto copy_stage = [&](uint32_t stage) {
        uint32_t to = base + stage % STAGES * STAGE_BYTES;
#pragma unroll
        for (uint32_t panel = 0; panel < PANELS; panel++)
            copy_async(to + panel * PANEL_BYTES + threadIdx.x * 16,
                       panel < panels ? from_w + panel * panel_bytes + stage * (uint64_t)PANEL_BYTES
                                      : (const uint8_t *)run.elements,
                       panel < panels);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t token = threadIdx.x / 8 + 16 * i;
            copy_async(to + W_BYTES + token * CUDA_K_BLOCK + ((threadIdx.x % 8) ^ (token % 8)) * 16,
                       from_a[i] + (uint64_t)(stage / STAGES_PER_BLOCK) * CUDA_K_BLOCK,
                       token < at.tokens);
        }
        copy_async_commit();
    };

    // ---- scales: a thread looks after one token's; a lane after its rows of W
    bool wide = false;
    bool has_token = threadIdx.x < at.tokens;
    token_scales scales_a = {};
    if (has_token)
        scales_a = scales_of(rows[threadIdx.x], at.g);
    scales_in_flight<BLOCK> pending;
    uint32_t warp_row = warp_m * (MT * CUDA_PANEL_ROWS);
    // The last tile's rows beyond D have zero products; any scale that exists will do.
    uint64_t row_last = tile_row + panels * CUDA_PANEL_ROWS - 1;
    const uint8_t *scales_w = weight_scales(run, BLOCK, tile_row);
    uint32_t scales_at[2 * MT]; // from there
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        uint64_t row = tile_row + warp_row;
        if (WORDS) // word i of mma: fragments 2*i and 2*i+1
            row += 32 * i + 16 * (lane / 2 % 2) + 8 * (lane % 2) + lane / 4;
        else
            row += 8 * i + g;
        scales_at[i] =
            (uint32_t)(weight_scales(run, BLOCK, row < row_last ? row : row_last) - scales_w);
    }

    auto store_scales = [&](uint32_t stage) {
        if (threadIdx.x >= TOKENS)
            return;
        if (WORDS) {
            smem.scales.words[stage % 2][threadIdx.x] = pending.word(wide);
        } else if (BLOCK == 128) {
            smem.scales.floats[stage % 2][threadIdx.x] = pending.value(0, scales_a.fp32, wide);
        } else {
#pragma unroll
            for (int i = 0; i < STEPS; i++)
                smem.scales.steps[i * TOKENS + threadIdx.x] = pending.value(i, scales_a.fp32, wide);
        }
    };

    copy_stage(0);
    pending.load_one(scales_a.fp32);
    if (has_token)
        pending.load(scales_a, 0);
    store_scales(0);

#pragma unroll 1
    for (uint32_t stage = 0; stage < stages_n; stage++) {
        uint32_t block = stage / STAGES_PER_BLOCK;
        bool more = stage + 1 < stages_n;
        // This stage is here, and everyone has computed the one before: its place is free.
        copy_async_wait<0>();
        __syncthreads();
        if (more) {
            copy_stage(stage + 1);
            if (has_token)
                pending.load(scales_a, (stage + 1) / STAGES_PER_BLOCK);
        }

        uint32_t w_at =
            base + stage % STAGES * STAGE_BYTES + warp_m * (MT * PANEL_BYTES) + lane * 16;
        uint32_t a_at = base + stage % STAGES * STAGE_BYTES + W_BYTES +
                        (warp_n * (NT * 8) + lane % 8) * CUDA_K_BLOCK;
        auto w = [&](int m, int step) {
            return load_shared(w_at + m * PANEL_BYTES + step * CUDA_FRAGMENT_BYTES);
        };
        auto b = [&](int pair, int step) {
            uint32_t piece16 = (step * 2 + lane / 8 % 2) ^ (lane % 8);
            uint32_t n = 2 * pair + lane / 16;
            return load_matrices(a_at + n * 8 * CUDA_K_BLOCK + piece16 * 16);
        };
        uint32_t token = warp_n * (NT * 8);
        if constexpr (WORDS) {
            uint32_t word_w[2] = {weight_scale_word<BLOCK>(scales_w + scales_at[0], block),
                                  weight_scale_word<BLOCK>(scales_w + scales_at[1], block)};
            uint32_t word_a[1] = {smem.scales.words[stage % 2][token + 8 * t + g]};
            mma_k128_ue8m0<MT, NT, BLOCK>(acc, w, b, word_w, word_a);
        } else {
            const float *floats =
                (BLOCK == 32 ? smem.scales.steps : smem.scales.floats[stage % 2]) + token + 2 * t;
            if constexpr (!BF16) {
                // Those of four steps would not fit into registers: a step's first product fetches
                // the step's.
                float scale_w[2 * MT];
                auto fetch = [&](int step) {
#pragma unroll
                    for (int i = 0; i < 2 * MT; i++)
                        scale_w[i] = weight_scale(run.scales_fp32, scales_w + scales_at[i],
                                                  block * STEPS + step);
                };
                if (BLOCK == 128)
                    fetch(0);
                mma_k128_rescaled<MT, NT, BLOCK>(
                    acc, w, b,
                    [&](int m, int n, int step) {
                        if (BLOCK == 32 && m == 0 && n == 0)
                            fetch(step);
                        return make_float2(scale_w[2 * m], scale_w[2 * m + 1]);
                    },
                    [&](int n, int step) {
                        return make_float2(floats[step * TOKENS + n * 8],
                                           floats[step * TOKENS + n * 8 + 1]);
                    });
            } else {
                auto scale = [&](int n, int i) { return floats[n * 8 + i % 2]; };
                uint32_t half = stage % 2;
                mma_k64_bf16<MT, NT>(acc, w, b, half, scale);
            }
        }
        if (BLOCK == 32 && !WORDS)
            __syncthreads(); // the one place of their four floats is read
        if (more)
            store_scales(stage + 1);
    }
    return wide;
}

__global__ void __launch_bounds__(THREADS, 2) prefill_kernel(const cuda_table *__restrict__ table)
{
    extern __shared__ __align__(128) uint8_t shared_memory[];
    auto &smem = *(prefill_smem *)shared_memory;
    let_next_kernel_start();

#pragma unroll 1
    for (uint32_t index = blockIdx.x; index < table->prefill_tiles; index += gridDim.x) {
        tile at = locate(table, index);
        const cuda_run &run = table->runs[at.run];
        const cuda_row *rows = (const cuda_row *)((const uint8_t *)table + table->rows_offset) +
                               run.row_begin + at.token_begin;
        float acc[MT][NT][4] = {};
        bool wide;
        switch (run.mode) {
        case CUDA_MODE_UE8M0_128:
            wide = accumulate<CUDA_MODE_UE8M0_128>(acc, smem, run, rows, at);
            break;
        case CUDA_MODE_UE8M0_32:
            wide = accumulate<CUDA_MODE_UE8M0_32>(acc, smem, run, rows, at);
            break;
        case CUDA_MODE_FP32_128:
            wide = accumulate<CUDA_MODE_FP32_128>(acc, smem, run, rows, at);
            break;
        case CUDA_MODE_FP32_32:
            wide = accumulate<CUDA_MODE_FP32_32>(acc, smem, run, rows, at);
            break;
        default:
            wide = accumulate<CUDA_MODE_BF16>(acc, smem, run, rows, at);
            break;
        }

        // ---- through shared memory, so that a token's outputs leave side by side
        uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        uint32_t warp_m = threadIdx.x / 64, warp_n = threadIdx.x / 32 % 2;
        wide |= at.d_begin + threadIdx.x < run.output_dim &&
                weight_is_wide(run, at.g, at.d_begin + threadIdx.x);
        wide = __syncthreads_or(wide);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    uint32_t token = warp_n * (NT * 8) + n * 8 + 2 * t + i % 2;
                    uint32_t row = (warp_m * MT + m) * CUDA_PANEL_ROWS + g + i / 2 * 8;
                    smem.tile[token * TILE_STRIDE + row] = acc[m][n][i];
                }
        __syncthreads();
        if (wide) {
            wide_tile(run, rows, at.tokens, at.g, at.d_begin, ROWS, smem.tile, TILE_STRIDE);
            __syncthreads();
        }
        store_tile(run, rows, at.tokens, at.g, at.d_begin, ROWS, smem.tile, TILE_STRIDE);
        __syncthreads();
    }
    end_after_kernel_ahead();
}

} // namespace

// ---- host

extern "C" cudaError_t cuda_prefill_init(struct cuda_bucket *bucket, int sm_count)
{
    int blocks = 0;
    cudaError_t error = cudaFuncSetAttribute(
        prefill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(prefill_smem));
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, prefill_kernel, THREADS,
                                                              sizeof(prefill_smem));
    bucket->prefill_from = CUDA_PREFILL_TOKENS_MIN;
    bucket->prefill_blocks = (uint32_t)(blocks * sm_count);
    return error;
}

extern "C" cudaError_t cuda_prefill_launch(const struct cuda_bucket *bucket,
                                           const struct cuda_table *table, bool overlaps,
                                           cudaStream_t stream)
{
    void *arguments[] = {&table};
    return cuda_launch_kernel((const void *)prefill_kernel, bucket->prefill_blocks, THREADS,
                              sizeof(prefill_smem), arguments, overlaps, stream);
}
