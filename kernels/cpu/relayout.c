// The resident form of a weight: where its parts lie in memory, and how a checkpoint's rows get
// there. Runs on the loading threads, each on ranges of its own.
//
//     checkpoint  [G*D][R]              16 rows d..d+15 of one r lie R elements apart
//     resident    [G*D/16][R][16]       ... and here beside each other: 16x16 transposes of bytes
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

// Transposes `columns` (a multiple of 16) of sixteen staged rows. Returns whether one is wide.

#if defined(__SSE2__)

// One of four equal rounds: afterwards the index bits of row and column have moved by one.
static inline void interleave_round(const __m128i in[16], __m128i out[16])
{
    for (int i = 0; i < 8; i++) {
        out[2 * i] = _mm_unpacklo_epi8(in[i], in[i + 8]);
        out[2 * i + 1] = _mm_unpackhi_epi8(in[i], in[i + 8]);
    }
}

static bool transpose_e4m3(const uint8_t *stage, uint32_t columns, uint8_t *to)
{
    const __m128i nan = _mm_set1_epi8(E4M3_NAN);
    __m128i found = _mm_setzero_si128();
    for (uint32_t c = 0; c < columns; c += 16) {
        __m128i a[16], b[16];
        for (int i = 0; i < 16; i++) {
            a[i] = _mm_loadu_si128((const __m128i *)(const void *)(stage + i * STAGE_STRIDE + c));
            found = _mm_or_si128(found, _mm_cmpeq_epi8(_mm_and_si128(a[i], nan), nan));
        }
        interleave_round(a, b);
        interleave_round(b, a);
        interleave_round(a, b);
        interleave_round(b, a);
        for (int i = 0; i < 16; i++)
            _mm_storeu_si128((__m128i *)(void *)(to + (c + (uint32_t)i) * CPU_PANEL), a[i]);
    }
    return _mm_movemask_epi8(found) != 0;
}

#else

static bool transpose_e4m3(const uint8_t *stage, uint32_t columns, uint8_t *to)
{
    bool found = false;
    for (uint32_t c = 0; c < columns; c++)
        for (uint32_t i = 0; i < CPU_PANEL; i++) {
            uint8_t code = stage[i * STAGE_STRIDE + c];
            found |= (code & 0x7F) == E4M3_NAN;
            to[c * CPU_PANEL + i] = code;
        }
    return found;
}

#endif

static bool transpose_bf16(const uint8_t *stage, uint32_t columns, uint8_t *to)
{
    const uint32_t least = (127 + CPU_NARROW_EXPONENT_MIN) << 7;
    const uint32_t beyond = (127 + CPU_NARROW_EXPONENT_MAX + 1) << 7;
    uint32_t found = 0;
    for (uint32_t c = 0; c < columns; c++) {
        uint16_t codes[CPU_PANEL];
        for (uint32_t i = 0; i < CPU_PANEL; i++) {
            memcpy(&codes[i], stage + i * STAGE_STRIDE + 2 * c, 2);
            uint32_t magnitude = codes[i] & 0x7FFF;
            found |= (magnitude != 0) & ((magnitude < least) | (magnitude >= beyond));
        }
        memcpy(to + c * sizeof(codes), codes, sizeof(codes));
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
            for (uint32_t i = 0; i < CPU_PANEL; i++)
                memcpy(stage + i * STAGE_STRIDE, from + i * row_bytes + at, bytes);
            uint8_t *tile = to + at * CPU_PANEL;
            wide |= type == EINSUM_WEIGHT_E4M3 ? transpose_e4m3(stage, bytes, tile)
                                               : transpose_bf16(stage, bytes / 2, tile);
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
