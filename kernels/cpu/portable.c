// The kernel for every CPU: plain C with loops of sixteen, which compilers turn into whatever
// vector instructions the target's baseline has. Structure and contract are those of kernel.h;
// avx2.c is the same by hand.
#include "wide.h"

enum { ROWS = 3 }; // 3 x 16 sums fill twelve registers of four

static bool supported(void)
{
    return true;
}

static void fold(const uint8_t *codes, const float *scales, uint32_t n, uint32_t block_r,
                 float *out)
{
    for (uint32_t begin = 0; begin < n; begin += block_r) {
        float scale = scales[begin / block_r];
        uint32_t end = begin + block_r < n ? begin + block_r : n;
        for (uint32_t i = begin; i < end; i++)
            out[i] = e4m3_to_float(codes[i]) * scale;
    }
}

static void load_scales(const struct cpu_panel *panel, uint32_t r, float scales[CPU_PANEL])
{
    for (uint32_t j = 0; j < CPU_PANEL; j++)
        scales[j] = panel->scales == NULL     ? 1
                    : panel->scale_lanes == 1 ? panel->scales[r / panel->block_r]
                                              : panel->scales[r / panel->block_r * CPU_PANEL + j];
}

// Rows r and r + 1, r even.
static inline void load_rows(const struct cpu_panel *panel, uint32_t r, float rows[2][CPU_PANEL])
{
    uint16_t codes[2 * CPU_PANEL];
    if (panel->type == EINSUM_WEIGHT_E4M3) {
        const uint8_t *at = panel->elements + (uint64_t)r * CPU_PANEL;
        for (int j = 0; j < CPU_PANEL; j++) {
            rows[0][j] = e4m3_to_float(at[2 * j]);
            rows[1][j] = e4m3_to_float(at[2 * j + 1]);
        }
        return;
    }
    memcpy(codes, panel->elements + (uint64_t)r * CPU_PANEL * 2, sizeof(codes));
    for (int j = 0; j < CPU_PANEL; j++) {
        rows[0][j] = bf16_to_float(codes[j]);
        rows[1][j] = bf16_to_float(codes[CPU_PANEL + j]);
    }
}

static void stream(const struct cpu_panel *panel, const float *a, uint32_t tokens, float *sums)
{
    for (uint32_t i = 0; i < tokens * CPU_PANEL; i++)
        sums[i] = 0;
    for (uint32_t begin = 0; begin < panel->reduced_dim; begin += panel->block_r) {
        float scales[CPU_PANEL];
        float partial[CPU_STREAM_TOKENS][CPU_PANEL] = {{0}};
        load_scales(panel, begin, scales);
        for (uint32_t r = begin; r < begin + panel->block_r; r += 2) {
            float rows[2][CPU_PANEL];
            load_rows(panel, r, rows);
            for (uint32_t t = 0; t < tokens; t++) {
                const float *element = a + (uint64_t)t * panel->reduced_dim + r;
                for (int j = 0; j < CPU_PANEL; j++)
                    partial[t][j] += element[0] * rows[0][j] + element[1] * rows[1][j];
            }
        }
        for (uint32_t t = 0; t < tokens; t++)
            for (int j = 0; j < CPU_PANEL; j++)
                sums[t * CPU_PANEL + (uint32_t)j] += partial[t][j] * scales[j];
    }
}

static void expand(const struct cpu_panel *panel, uint32_t r_begin, uint32_t rows, float *out)
{
    for (uint32_t begin = r_begin; begin < r_begin + rows; begin += panel->block_r) {
        float scales[CPU_PANEL];
        load_scales(panel, begin, scales);
        for (uint32_t r = begin; r < begin + panel->block_r; r += 2, out += 2 * CPU_PANEL) {
            float rows_at[2][CPU_PANEL];
            load_rows(panel, r, rows_at);
            for (int j = 0; j < CPU_PANEL; j++) {
                out[j] = rows_at[0][j] * scales[j];
                out[CPU_PANEL + j] = rows_at[1][j] * scales[j];
            }
        }
    }
}

static inline __attribute__((always_inline)) void
multiply_rows(const float *a, const int rows, const float *b, uint32_t depth, float *sums)
{
    typedef float float4 __attribute__((vector_size(16), aligned(4)));
    const float4 *columns = (const float4 *)(const void *)b;
    float4 *totals = (float4 *)(void *)sums;
    float4 partial[ROWS][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++)
            partial[i][j] = totals[i * 4 + j];
    for (uint32_t k = 0; k < depth; k++, columns += 4)
        for (int i = 0; i < rows; i++) {
            float element = a[i * CPU_A_STRIDE + (int)k];
            for (int j = 0; j < 4; j++)
                partial[i][j] += columns[j] * element;
        }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++)
            totals[i * 4 + j] = partial[i][j];
}

static void multiply(const float *a, uint32_t tokens, const float *b, uint32_t depth, float *sums)
{
    while (tokens >= ROWS) {
        multiply_rows(a, ROWS, b, depth, sums);
        a += ROWS * CPU_A_STRIDE;
        sums += ROWS * CPU_PANEL;
        tokens -= ROWS;
    }
    if (tokens == 2)
        multiply_rows(a, 2, b, depth, sums);
    else if (tokens == 1)
        multiply_rows(a, 1, b, depth, sums);
}

static void round_bf16(const float *from, uint32_t n, uint16_t *to)
{
    for (uint32_t i = 0; i < n; i++)
        to[i] = bf16_from_float(from[i]);
}

const struct cpu_kernel cpu_kernel_portable = {
    .name = "portable",
    .supported = supported,
    .fold = fold,
    .stream = stream,
    .expand = expand,
    .multiply = multiply,
    .wide_multiply = wide_multiply,
    .round_bf16 = round_bf16,
};
