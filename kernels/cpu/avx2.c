// The kernel for AVX2 with FMA and F16C. See kernel.h for the contract; this file is about keeping
// two FMA units busy and reading weights at the speed of memory.
//
// E4M3 becomes FP16 by moving bits, and F16C does the rest, subnormals included:
//
//     E4M3 in the upper byte    s eeee mmm0 0000 000
//     >> 1, arithmetic          s s eeee mmm 0000 000      FP16 has one exponent bit more: the copy
//     & 0xBF80                  s 0 eeee mmm 0000 000      of s, cleared. Bias 15 for 7: x * 2^-8
//
// The missing 2^8 goes into the scale. NaN codes come out as 480 * 2^-8: panels that hold one never
// come here (struct cpu_weight's flags), activations are patched in fold().
#include "wide.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

enum {
    ROWS = 6,             // 6 x 16 sums: twelve registers, enough for 2 FMAs of 4 cycles each cycle
    PREFETCH_BYTES = 2048 // of weights ahead of where stream() reads
};

#define INLINE static inline __attribute__((always_inline))

static bool supported(void)
{
    // The builtin also asks whether the system saves the wide registers; clang's knows no F16C.
    unsigned eax, ebx, ecx = 0, edx;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}

// Sixteen codes, each in the upper byte of its lane, to FP16 of value * 2^-8.
INLINE __m256i half_from_e4m3(__m256i upper_bytes)
{
    return _mm256_and_si256(_mm256_srai_epi16(upper_bytes, 1), _mm256_set1_epi16((short)0xBF80));
}

// Two rows of sixteen weights: out[0..1] the first, out[2..3] the second. Returns 2 * 16 elements'
// bytes further on. E4M3 values come times 2^-8.
INLINE const uint8_t *load_rows(const uint8_t *at, const bool bf16, __m256 out[4])
{
    if (bf16) {
        for (int i = 0; i < 4; i++) {
            __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)(at + 16 * i));
            out[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(codes), 16));
        }
        return at + 64;
    }
    __m256i codes = _mm256_loadu_si256((const __m256i *)(const void *)at);
    __m256i zero = _mm256_setzero_si256();
    __m256i left = half_from_e4m3(_mm256_unpacklo_epi8(zero, codes));
    __m256i right = half_from_e4m3(_mm256_unpackhi_epi8(zero, codes));
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(left));
    out[1] = _mm256_cvtph_ps(_mm256_castsi256_si128(right));
    out[2] = _mm256_cvtph_ps(_mm256_extracti128_si256(left, 1));
    out[3] = _mm256_cvtph_ps(_mm256_extracti128_si256(right, 1));
    return at + 32;
}

// The scales of block k, with the 2^8 that load_rows leaves out.
INLINE void load_scales(const struct cpu_panel *panel, uint64_t k, __m256 scales[2])
{
    const __m256 unbias = _mm256_set1_ps(0x1p8f);
    if (panel->type == EINSUM_WEIGHT_BF16) {
        scales[0] = scales[1] = _mm256_set1_ps(1);
    } else if (panel->scale_lanes == 1) {
        scales[0] = scales[1] = _mm256_mul_ps(_mm256_set1_ps(panel->scales[k]), unbias);
    } else {
        const float *at = panel->scales + k * CPU_PANEL;
        scales[0] = _mm256_mul_ps(_mm256_loadu_ps(at), unbias);
        scales[1] = _mm256_mul_ps(_mm256_loadu_ps(at + 8), unbias);
    }
}

static void fold(const uint8_t *codes, const float *scales, uint32_t n, uint32_t block_r,
                 float *out)
{
    const __m128i nan = _mm_set1_epi8(E4M3_NAN);
    for (uint32_t i = 0; i < n; i += 16) {
        float scale = scales[i / block_r];
        __m256 factor = _mm256_set1_ps(scale * 0x1p8f);
        __m128i sixteen = _mm_loadu_si128((const __m128i *)(const void *)(codes + i));
        __m256i half = half_from_e4m3(_mm256_slli_epi16(_mm256_cvtepu8_epi16(sixteen), 8));
        __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
        __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(low, factor));
        _mm256_storeu_ps(out + i + 8, _mm256_mul_ps(high, factor));
        int nans = _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_and_si128(sixteen, nan), nan));
        for (; __builtin_expect(nans != 0, 0); nans &= nans - 1)
            out[i + (uint32_t)__builtin_ctz((unsigned)nans)] = fp32_nan();
    }
}

// One pass over a panel for a constant number of tokens. Each block of R has sums of its own, which
// its scale multiplies; `chains` of them per output hide the latency of FMA where tokens are few.
INLINE void stream_tokens(const struct cpu_panel *panel, const float *a, const int tokens,
                          const int chains, const bool bf16, float *sums)
{
    const uint64_t stride = panel->reduced_dim;
    const uint8_t *at = panel->elements;
    for (int i = 0; i < tokens * CPU_PANEL; i++)
        sums[i] = 0;

    for (uint64_t r = 0; r < stride;) {
        __m256 partial[CPU_STREAM_TOKENS][2][2]; // [token][chain][half of the panel]
        for (int t = 0; t < tokens; t++)
            for (int chain = 0; chain < chains; chain++)
                partial[t][chain][0] = partial[t][chain][1] = _mm256_setzero_ps();

        uint64_t end = r + panel->block_r;
        uint64_t k = r / panel->block_r;
        for (; r < end; r += 2) {
            __m256 b[4];
            _mm_prefetch((const char *)at + PREFETCH_BYTES, _MM_HINT_T0);
            at = load_rows(at, bf16, b);
            for (int row = 0; row < 2; row++)
                for (int t = 0; t < tokens; t++) {
                    __m256 *to = partial[t][row % chains];
                    __m256 element =
                        _mm256_broadcast_ss(a + (uint64_t)t * stride + r + (unsigned)row);
                    to[0] = _mm256_fmadd_ps(element, b[2 * row], to[0]);
                    to[1] = _mm256_fmadd_ps(element, b[2 * row + 1], to[1]);
                }
        }

        __m256 scales[2];
        load_scales(panel, k, scales);
        for (int t = 0; t < tokens; t++)
            for (int half = 0; half < 2; half++) {
                float *sum = sums + t * CPU_PANEL + half * 8;
                __m256 block = partial[t][0][half];
                if (chains == 2)
                    block = _mm256_add_ps(block, partial[t][1][half]);
                _mm256_storeu_ps(sum, _mm256_fmadd_ps(block, scales[half], _mm256_loadu_ps(sum)));
            }
    }
}

INLINE void stream_any(const struct cpu_panel *panel, const float *a, uint32_t tokens,
                       const bool bf16, float *sums)
{
    switch (tokens) {
    case 1:
        stream_tokens(panel, a, 1, 2, bf16, sums);
        break;
    case 2:
        stream_tokens(panel, a, 2, 2, bf16, sums);
        break;
    case 3:
        stream_tokens(panel, a, 3, 1, bf16, sums);
        break;
    case 4:
        stream_tokens(panel, a, 4, 1, bf16, sums);
        break;
    case 5:
        stream_tokens(panel, a, 5, 1, bf16, sums);
        break;
    default:
        stream_tokens(panel, a, 6, 1, bf16, sums);
        break;
    }
}

static void stream(const struct cpu_panel *panel, const float *a, uint32_t tokens, float *sums)
{
    if (panel->type == EINSUM_WEIGHT_BF16)
        stream_any(panel, a, tokens, true, sums);
    else
        stream_any(panel, a, tokens, false, sums);
}

INLINE void expand_any(const struct cpu_panel *panel, uint32_t r_begin, uint32_t rows,
                       const bool bf16, float *out)
{
    const uint8_t *at = panel->elements + (uint64_t)r_begin * CPU_PANEL * (bf16 ? 2 : 1);
    for (uint32_t done = 0; done < rows; done += panel->block_r) {
        __m256 scales[2];
        load_scales(panel, (r_begin + done) / panel->block_r, scales);
        for (uint32_t r = 0; r < panel->block_r; r += 2, out += 2 * CPU_PANEL) {
            __m256 b[4];
            at = load_rows(at, bf16, b);
            for (int i = 0; i < 4; i++)
                _mm256_store_ps(out + 8 * i, bf16 ? b[i] : _mm256_mul_ps(b[i], scales[i % 2]));
        }
    }
}

static void expand(const struct cpu_panel *panel, uint32_t r_begin, uint32_t rows, float *out)
{
    if (panel->type == EINSUM_WEIGHT_BF16)
        expand_any(panel, r_begin, rows, true, out);
    else
        expand_any(panel, r_begin, rows, false, out);
}

INLINE void multiply_rows(const float *a, const int rows, const float *b, uint32_t depth,
                          float *sums)
{
    __m256 partial[ROWS][2];
    for (int i = 0; i < rows; i++)
        partial[i][0] = partial[i][1] = _mm256_setzero_ps();
    for (uint32_t k = 0; k < depth; k++, b += CPU_PANEL) {
        __m256 left = _mm256_load_ps(b);
        __m256 right = _mm256_load_ps(b + 8);
        for (int i = 0; i < rows; i++) {
            __m256 element = _mm256_broadcast_ss(a + i * CPU_A_STRIDE + (int)k);
            partial[i][0] = _mm256_fmadd_ps(element, left, partial[i][0]);
            partial[i][1] = _mm256_fmadd_ps(element, right, partial[i][1]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int half = 0; half < 2; half++) {
            float *sum = sums + i * CPU_PANEL + half * 8;
            _mm256_store_ps(sum, _mm256_add_ps(_mm256_load_ps(sum), partial[i][half]));
        }
}

static void multiply(const float *a, uint32_t tokens, const float *b, uint32_t depth, float *sums)
{
    // As even as possible: a last tile of one or two rows would leave the FMA units waiting.
    for (uint32_t tiles = (tokens + ROWS - 1) / ROWS; tiles > 0; tiles--) {
        uint32_t rows = (tokens + tiles - 1) / tiles;
        switch (rows) {
        case 1:
            multiply_rows(a, 1, b, depth, sums);
            break;
        case 2:
            multiply_rows(a, 2, b, depth, sums);
            break;
        case 3:
            multiply_rows(a, 3, b, depth, sums);
            break;
        case 4:
            multiply_rows(a, 4, b, depth, sums);
            break;
        case 5:
            multiply_rows(a, 5, b, depth, sums);
            break;
        default:
            multiply_rows(a, 6, b, depth, sums);
            break;
        }
        a += rows * CPU_A_STRIDE;
        sums += rows * CPU_PANEL;
        tokens -= rows;
    }
}

// Eight FP32 to BF16 in the low halves of 32-bit lanes.
INLINE __m256i round_eight(const float *from)
{
    __m256 values = _mm256_loadu_ps(from);
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(BF16_NAN), is_nan);
}

static void round_bf16(const float *from, uint32_t n, uint16_t *to)
{
    for (uint32_t i = 0; i < n; i += 16) {
        __m256i packed = _mm256_packus_epi32(round_eight(from + i), round_eight(from + i + 8));
        packed = _mm256_permute4x64_epi64(packed, 0xD8); // packus works within 128-bit halves
        _mm256_storeu_si256((__m256i *)(void *)(to + i), packed);
    }
}

const struct cpu_kernel cpu_kernel_avx2 = {
    .name = "avx2",
    .supported = supported,
    .fold = fold,
    .stream = stream,
    .expand = expand,
    .multiply = multiply,
    .wide_multiply = wide_multiply,
    .round_bf16 = round_bf16,
};

#endif
