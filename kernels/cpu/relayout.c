// The resident form of a weight: where its parts lie in memory, and how a checkpoint's rows get
// there. Runs on the loading threads, each on ranges of its own.
//
//     checkpoint  [G*D][R]                   one column of sixteen rows lies R elements apart
//     resident    [G*D/16][R/2][16][2] E4M3  ... and here beside each other. In units of 16 bits,
//                 [G*D/16][R][16] BF16       two E4M3 or one BF16, both are plain transposes
//
// Elements keep their bits. What FP32 cannot carry safely is found on the way and flagged.
#include "kernel.h"

#include <string.h>

#include "../fp8.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum {
    ALIGNMENT = 64,
    // Columns that are gathered before they are transposed: rows of a weight lie a power of two
    // apart, where sixteen cache lines of one column would evict each other.
    STAGE_BYTES = 512,
    STAGE_STRIDE = STAGE_BYTES + 16,
};

static uint64_t aligned(uint64_t bytes)
{
    return (bytes + ALIGNMENT - 1) & ~(uint64_t)(ALIGNMENT - 1);
}

static uint64_t panels_of(const struct einsum_weight_format *format)
{
    return (uint64_t)format->groups * (format->output_dim / CPU_PANEL);
}

static uint64_t scales_of(const struct einsum_weight_format *format)
{
    if (format->scale_type == EINSUM_SCALE_NONE)
        return 0;
    return (uint64_t)format->groups * (format->output_dim / format->block_d) *
           (format->reduced_dim / format->block_r);
}

uint64_t cpu_weight_bytes(const struct einsum_weight_format *format)
{
    return aligned(einsum_weight_bytes(format)) + aligned(scales_of(format) * sizeof(float)) +
           2 * aligned(panels_of(format));
}

void cpu_weight_init(struct cpu_weight *weight, const struct einsum_weight_format *format,
                     void *memory)
{
    uint8_t *at = memory;
    uint64_t panels = panels_of(format);
    uint64_t scales = scales_of(format);

    *weight = (struct cpu_weight){.format = *format, .memory = memory, .elements = at};
    at += aligned(einsum_weight_bytes(format));
    weight->scales = scales > 0 ? (float *)(void *)at : NULL;
    at += aligned(scales * sizeof(float));
    weight->elements_wide = at;
    weight->scales_wide = at + aligned(panels);
    memset(weight->elements_wide, 0, panels);
    memset(weight->scales_wide, 0, panels);
}

// Transposes `units` (a multiple of 8) 16-bit columns of the sixteen staged rows.

#if defined(__SSE2__)

// One of three equal rounds over eight rows: each moves one bit of the row's index into the lane's.
static inline void interleave_round(const __m128i in[8], __m128i out[8])
{
    for (int i = 0; i < 4; i++) {
        out[2 * i] = _mm_unpacklo_epi16(in[i], in[i + 4]);
        out[2 * i + 1] = _mm_unpackhi_epi16(in[i], in[i + 4]);
    }
}

static void transpose(const uint8_t *stage, uint32_t units, uint8_t *to)
{
    for (uint32_t c = 0; c < units; c += 8)
        for (uint32_t half = 0; half < 2; half++) {
            __m128i a[8], b[8];
            for (uint32_t i = 0; i < 8; i++)
                a[i] = _mm_load_si128(
                    (const __m128i *)(const void *)(stage + (half * 8 + i) * STAGE_STRIDE + 2 * c));
            interleave_round(a, b);
            interleave_round(b, a);
            interleave_round(a, b);
            for (uint32_t i = 0; i < 8; i++)
                _mm_storeu_si128((__m128i *)(void *)(to + (c + i) * 2 * CPU_PANEL + half * 16),
                                 b[i]);
        }
}

#else

static void transpose(const uint8_t *stage, uint32_t units, uint8_t *to)
{
    for (uint32_t c = 0; c < units; c++)
        for (uint32_t i = 0; i < CPU_PANEL; i++)
            memcpy(to + (c * CPU_PANEL + i) * 2, stage + i * STAGE_STRIDE + 2 * c, 2);
}

#endif

static bool has_nan(const uint8_t *codes, uint32_t n)
{
    uint8_t found = 0;
    for (uint32_t i = 0; i < n; i++)
        found |= (codes[i] & 0x7F) == E4M3_NAN;
    return found != 0;
}

static bool has_wide_bf16(const uint8_t *codes, uint32_t n)
{
    const uint16_t least = (127 + CPU_NARROW_EXPONENT_MIN) << 7;
    const uint16_t beyond = (127 + CPU_NARROW_EXPONENT_MAX + 1) << 7;
    uint16_t found = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint16_t code;
        memcpy(&code, codes + 2 * i, sizeof(code));
        uint16_t magnitude = code & 0x7FFF;
        found |= (magnitude != 0) & ((magnitude < least) | (magnitude >= beyond));
    }
    return found != 0;
}

void cpu_relayout(struct cpu_weight *weight, const void *source, uint64_t row_begin, uint64_t rows)
{
    enum einsum_weight_type type = weight->format.weight_type;
    uint32_t element = einsum_weight_element_bytes(type);
    uint64_t row_bytes = (uint64_t)weight->format.reduced_dim * element;
    const uint8_t *from = source;
    _Alignas(ALIGNMENT) uint8_t stage[CPU_PANEL * STAGE_STRIDE];

    for (uint64_t row = row_begin; row < row_begin + rows; row += CPU_PANEL) {
        uint8_t *to = weight->elements + row * row_bytes;
        bool wide = false;
        for (uint64_t at = 0; at < row_bytes; at += STAGE_BYTES) {
            uint64_t left = row_bytes - at;
            uint32_t bytes = left < STAGE_BYTES ? (uint32_t)left : STAGE_BYTES;
            for (uint32_t i = 0; i < CPU_PANEL; i++) {
                uint8_t *staged = stage + i * STAGE_STRIDE;
                memcpy(staged, from + i * row_bytes + at, bytes);
                wide |= type == EINSUM_WEIGHT_E4M3 ? has_nan(staged, bytes)
                                                   : has_wide_bf16(staged, bytes / 2);
            }
            transpose(stage, bytes / 2, to + at * CPU_PANEL);
        }
        weight->elements_wide[row / CPU_PANEL] = wide;
        from += CPU_PANEL * row_bytes;
    }
}

static float load_scale(const uint8_t *source, enum einsum_scale_type type, uint64_t index)
{
    return type == EINSUM_SCALE_UE8M0 ? ue8m0_to_float(source[index])
                                      : fp32_load(source + 4 * index);
}

void cpu_relayout_scales(struct cpu_weight *weight, const void *source)
{
    const struct einsum_weight_format *format = &weight->format;
    if (format->scale_type == EINSUM_SCALE_NONE)
        return;
    uint64_t blocks = format->reduced_dim / format->block_r;
    uint64_t rows = scales_of(format) / blocks; // of scales, block_d rows of the weight each
    uint64_t lanes = format->block_d == 1 ? CPU_PANEL : 1;

    memset(weight->scales_wide, 0, panels_of(format));
    for (uint64_t row = 0; row < rows; row++) {
        bool wide = false;
        for (uint64_t k = 0; k < blocks; k++) {
            float scale = load_scale(source, format->scale_type, row * blocks + k);
            uint64_t panel_row = row / lanes;
            weight->scales[(panel_row * blocks + k) * lanes + row % lanes] = scale;
            wide |= !cpu_is_narrow(scale);
        }
        uint64_t first = row * format->block_d / CPU_PANEL;
        uint64_t last = (row * format->block_d + format->block_d - 1) / CPU_PANEL;
        for (uint64_t panel = first; wide && panel <= last; panel++)
            weight->scales_wide[panel] = 1;
    }
}
