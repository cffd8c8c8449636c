// The kernels for AVX2 with FMA and F16C. See kernel.h for the contract; this file is about keeping
// two FMA units busy and reading weights at the speed of memory. Decoding is what costs, so there
// are two ways, of which the second takes half the instructions:
//
//     F16C         E4M3 in the upper byte of 16 bits    s eeee mmm0 0000 000
//                  >> 1, arithmetic                     s s eeee mmm 0000 000
//                  & 0xBF80: FP16 of x * 2^-8           s 0 eeee mmm 0000 000
//                  vcvtph2ps, subnormals included
//
//     subnormal    >> 4, arithmetic                     s ssss eeee mmm xxxx
//                  & 0x87F0: BF16 of x * 2^-120         s 0000 eeee mmm 0000
//                  << 16 or & 0xFFFF0000: FP32          even, odd outputs of a row
//
// The second gives codes below 2^-6 as subnormal FP32, exact as well. CPUs differ in what those
// cost as operands, nothing or a trap of a hundred cycles, so supported() tries it out.
//
// The powers of two that a way leaves out go into the scales: folded A carries 2^a_bias, and the
// weight's side 2^-a_bias, chosen so that nothing else is subnormal. NaN codes come out as +-480:
// panels that hold one never come here (struct cpu_weight's flags), activations are patched in
// fold().
#include "wide.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

enum {
    ROWS = 6,             // 6 x 16 sums: twelve registers, enough for 2 FMAs of 4 cycles each cycle
    PREFETCH_BYTES = 2048 // of weights ahead of where stream() reads
};

enum decoder { BY_F16C, BY_SUBNORMALS };

#define INLINE static inline __attribute__((always_inline))

static bool supported(void)
{
    // The builtin also asks whether the system saves the wide registers; clang's knows no F16C.
    unsigned eax, ebx, ecx = 0, edx;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}

// Cycles of a few hundred multiplications that read `operand`, at best of some tries.
static uint64_t multiply_cycles(float operand)
{
    uint64_t least = UINT64_MAX;
    for (int try = 0; try < 16; try++) {
        __m256 factor = _mm256_set1_ps(operand), sum = _mm256_setzero_ps();
        uint64_t begin = __rdtsc();
        for (int i = 0; i < 256; i++) {
            __asm__ volatile(""
                             : "+x"(factor),
                               "+x"(sum)); // or it is computed once, or at compile time
            sum = _mm256_fmadd_ps(factor, _mm256_set1_ps(0x1p100f), sum);
        }
        uint64_t cycles = __rdtsc() - begin;
        __asm__ volatile("" : : "x"(sum));
        least = cycles < least ? cycles : least;
    }
    return least;
}

static bool subnormals_supported(void)
{
    // A thread that was told to take subnormals for zero would get wrong numbers.
    const unsigned denormals_are_zero = 1u << 6;
    if (!supported() || (_mm_getcsr() & denormals_are_zero) != 0)
        return false;
    // A trap costs thirty times an FMA; twice leaves room for noise.
    return multiply_cycles(0x1p-128f) < 2 * multiply_cycles(0x1p-60f);
}

// What a decoded weight, and a folded activation, is to be multiplied with.
INLINE float weight_bias(const enum decoder decoder, const bool bf16)
{
    if (bf16)
        return decoder == BY_F16C ? 1 : 0x1p-64f;
    return decoder == BY_F16C ? 0x1p8f : 0x1p56f; // 2^120 of 2^-64
}

INLINE float activation_bias(const enum decoder decoder)
{
    return decoder == BY_F16C ? 1 : 0x1p64f;
}

// Sixteen codes, each in the upper byte of its lane, to FP16 of value * 2^-8.
INLINE __m256i half_from_e4m3(__m256i upper_bytes)
{
    return _mm256_and_si256(_mm256_srai_epi16(upper_bytes, 1), _mm256_set1_epi16((short)0xBF80));
}

// The same to BF16 of value * 2^-120.
INLINE __m256i bf16_from_e4m3(__m256i upper_bytes)
{
    return _mm256_and_si256(_mm256_srai_epi16(upper_bytes, 4), _mm256_set1_epi16((short)0x87F0));
}

// Sixteen BF16 to FP32, even and odd lanes apart.
INLINE void widen_bf16(__m256i codes, __m256 out[2])
{
    out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 16));
    out[1] = _mm256_castsi256_ps(_mm256_and_si256(codes, _mm256_set1_epi32((int)0xFFFF0000)));
}

// Two rows of weights: out[0..1] the first, out[2..3] the second; for BY_SUBNORMALS the even
// outputs and then the odd ones. Returns where the next two are.
INLINE const uint8_t *load_rows(const uint8_t *at, const enum decoder decoder, const bool bf16,
                                __m256 out[4])
{
    const __m256i *from = (const __m256i *)(const void *)at;
    __m256i codes = _mm256_loadu_si256(from);
    if (bf16 && decoder == BY_SUBNORMALS) {
        widen_bf16(codes, out);
        widen_bf16(_mm256_loadu_si256(from + 1), out + 2);
    } else if (bf16) {
        for (int i = 0; i < 4; i++) {
            __m128i eight = _mm_loadu_si128((const __m128i *)from + i);
            out[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
        }
    } else if (decoder == BY_SUBNORMALS) {
        widen_bf16(bf16_from_e4m3(_mm256_slli_epi16(codes, 8)), out);
        widen_bf16(bf16_from_e4m3(codes), out + 2);
    } else {
        __m256i first = half_from_e4m3(_mm256_slli_epi16(codes, 8));
        __m256i second = half_from_e4m3(codes);
        out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(first));
        out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(first, 1));
        out[2] = _mm256_cvtph_ps(_mm256_castsi256_si128(second));
        out[3] = _mm256_cvtph_ps(_mm256_extracti128_si256(second, 1));
    }
    return at + (bf16 ? 64 : 32);
}

// Between outputs 0..7, 8..15 and the order in which load_rows gives them.
INLINE void to_decoded_order(const enum decoder decoder, __m256 v[2])
{
    if (decoder == BY_F16C)
        return;
    __m256 even = _mm256_shuffle_ps(v[0], v[1], 0x88); // 0 2 8 10 | 4 6 12 14
    __m256 odd = _mm256_shuffle_ps(v[0], v[1], 0xDD);
    v[0] = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xD8));
    v[1] = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xD8));
}

INLINE void to_output_order(const enum decoder decoder, __m256 v[2])
{
    if (decoder == BY_F16C)
        return;
    __m256 low = _mm256_unpacklo_ps(v[0], v[1]); // 0 1 2 3 | 8 9 10 11
    __m256 high = _mm256_unpackhi_ps(v[0], v[1]);
    v[0] = _mm256_permute2f128_ps(low, high, 0x20);
    v[1] = _mm256_permute2f128_ps(low, high, 0x31);
}

// The scales of block k, in decoded order, times the bias.
INLINE void load_scales(const struct cpu_panel *panel, uint64_t k, const enum decoder decoder,
                        const bool bf16, __m256 scales[2])
{
    const __m256 bias = _mm256_set1_ps(weight_bias(decoder, bf16));
    if (bf16) {
        scales[0] = scales[1] = bias;
    } else if (panel->scale_lanes == 1) {
        scales[0] = scales[1] = _mm256_mul_ps(_mm256_set1_ps(panel->scales[k]), bias);
    } else {
        const float *at = panel->scales + k * CPU_PANEL;
        scales[0] = _mm256_mul_ps(_mm256_loadu_ps(at), bias);
        scales[1] = _mm256_mul_ps(_mm256_loadu_ps(at + 8), bias);
        to_decoded_order(decoder, scales);
    }
}

INLINE void fold_any(const uint8_t *codes, const float *scales, uint32_t n, uint32_t block_r,
                     const enum decoder decoder, float *out)
{
    const __m128i nan = _mm_set1_epi8(E4M3_NAN);
    for (uint32_t i = 0; i < n; i += 16) {
        // 2^8 as fold() always decodes by F16C, which keeps the elements in order.
        __m256 factor = _mm256_set1_ps(scales[i / block_r] * (0x1p8f * activation_bias(decoder)));
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
                          const int chains, const enum decoder decoder, const bool bf16,
                          float *sums)
{
    enum { STEP = 4 }; // rows at a time
    const uint64_t stride = panel->reduced_dim;
    const uint8_t *at = panel->elements;
    for (int i = 0; i < tokens * CPU_PANEL; i++)
        sums[i] = 0;

    for (uint64_t r = 0; r < stride;) {
        __m256 partial[CPU_STREAM_TOKENS][STEP][2]; // [token][chain][half of the panel]
        for (int t = 0; t < tokens; t++)
            for (int chain = 0; chain < chains; chain++)
                partial[t][chain][0] = partial[t][chain][1] = _mm256_setzero_ps();

        uint64_t k = r / panel->block_r;
        for (uint64_t end = r + panel->block_r; r < end; r += STEP) {
            _mm_prefetch((const char *)at + PREFETCH_BYTES, _MM_HINT_T0);
            if (bf16)
                _mm_prefetch((const char *)at + PREFETCH_BYTES + 64, _MM_HINT_T0);
            for (int pair = 0; pair < STEP; pair += 2) {
                __m256 b[4];
                at = load_rows(at, decoder, bf16, b);
                for (int row = pair; row < pair + 2; row++)
                    for (int t = 0; t < tokens; t++) {
                        __m256 *to = partial[t][row % chains];
                        __m256 all =
                            _mm256_broadcast_ss(a + (uint64_t)t * stride + r + (unsigned)row);
                        to[0] = _mm256_fmadd_ps(all, b[2 * (row - pair)], to[0]);
                        to[1] = _mm256_fmadd_ps(all, b[2 * (row - pair) + 1], to[1]);
                    }
            }
        }

        __m256 scales[2];
        load_scales(panel, k, decoder, bf16, scales);
        for (int t = 0; t < tokens; t++)
            for (int half = 0; half < 2; half++) {
                float *sum = sums + t * CPU_PANEL + half * 8;
                __m256 block = partial[t][0][half];
                for (int chain = 1; chain < chains; chain++)
                    block = _mm256_add_ps(block, partial[t][chain][half]);
                _mm256_storeu_ps(sum, _mm256_fmadd_ps(block, scales[half], _mm256_loadu_ps(sum)));
            }
    }

    for (int t = 0; t < tokens; t++) {
        float *sum = sums + t * CPU_PANEL;
        __m256 both[2] = {_mm256_loadu_ps(sum), _mm256_loadu_ps(sum + 8)};
        to_output_order(decoder, both);
        _mm256_storeu_ps(sum, both[0]);
        _mm256_storeu_ps(sum + 8, both[1]);
    }
}

INLINE void stream_any(const struct cpu_panel *panel, const float *a, uint32_t tokens,
                       const enum decoder decoder, const bool bf16, float *sums)
{
    _Static_assert(CPU_STREAM_TOKENS == 4, "the cases below");
    switch (tokens) {
    case 1:
        stream_tokens(panel, a, 1, 4, decoder, bf16, sums);
        break;
    case 2:
        stream_tokens(panel, a, 2, 2, decoder, bf16, sums);
        break;
    case 3:
        stream_tokens(panel, a, 3, 1, decoder, bf16, sums);
        break;
    default:
        stream_tokens(panel, a, 4, 1, decoder, bf16, sums);
        break;
    }
}

INLINE void expand_any(const struct cpu_panel *panel, uint32_t r_begin, uint32_t rows,
                       const enum decoder decoder, const bool bf16, float *out)
{
    const uint8_t *at = panel->elements + (uint64_t)r_begin * CPU_PANEL * (bf16 ? 2 : 1);
    for (uint32_t done = 0; done < rows; done += panel->block_r) {
        __m256 scales[2];
        load_scales(panel, (r_begin + done) / panel->block_r, decoder, bf16, scales);
        for (uint32_t r = 0; r < panel->block_r; r += 2, out += 2 * CPU_PANEL) {
            __m256 b[4];
            at = load_rows(at, decoder, bf16, b);
            for (int i = 0; i < 4; i++)
                _mm256_store_ps(out + 8 * i, _mm256_mul_ps(b[i], scales[i % 2]));
        }
    }
}

INLINE void multiply_rows(const float *a, const int rows, const float *b, uint32_t depth,
                          const enum decoder decoder, float *sums)
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
    for (int i = 0; i < rows; i++, sums += CPU_PANEL) {
        to_output_order(decoder, partial[i]);
        _mm256_store_ps(sums, _mm256_add_ps(_mm256_load_ps(sums), partial[i][0]));
        _mm256_store_ps(sums + 8, _mm256_add_ps(_mm256_load_ps(sums + 8), partial[i][1]));
    }
}

INLINE void multiply_any(const float *a, uint32_t tokens, const float *b, uint32_t depth,
                         const enum decoder decoder, float *sums)
{
    // As even as possible: a last tile of one or two rows would leave the FMA units waiting.
    for (uint32_t tiles = (tokens + ROWS - 1) / ROWS; tiles > 0; tiles--) {
        uint32_t rows = (tokens + tiles - 1) / tiles;
        switch (rows) {
        case 1:
            multiply_rows(a, 1, b, depth, decoder, sums);
            break;
        case 2:
            multiply_rows(a, 2, b, depth, decoder, sums);
            break;
        case 3:
            multiply_rows(a, 3, b, depth, decoder, sums);
            break;
        case 4:
            multiply_rows(a, 4, b, depth, decoder, sums);
            break;
        case 5:
            multiply_rows(a, 5, b, depth, decoder, sums);
            break;
        default:
            multiply_rows(a, 6, b, depth, decoder, sums);
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

// The two kernels: the loops above, each with a decoder built in.
// NOLINTBEGIN(bugprone-macro-parentheses): initialisers
#define KERNEL(suffix, text, is_supported, decoder)                                                \
    static void fold_##suffix(const uint8_t *codes, const float *scales, uint32_t n,               \
                              uint32_t block_r, float *out)                                        \
    {                                                                                              \
        fold_any(codes, scales, n, block_r, decoder, out);                                         \
    }                                                                                              \
    static void stream_##suffix(const struct cpu_panel *panel, const float *a, uint32_t tokens,    \
                                float *sums)                                                       \
    {                                                                                              \
        if (panel->type == EINSUM_WEIGHT_BF16)                                                     \
            stream_any(panel, a, tokens, decoder, true, sums);                                     \
        else                                                                                       \
            stream_any(panel, a, tokens, decoder, false, sums);                                    \
    }                                                                                              \
    static void expand_##suffix(const struct cpu_panel *panel, uint32_t r_begin, uint32_t rows,    \
                                float *out)                                                        \
    {                                                                                              \
        if (panel->type == EINSUM_WEIGHT_BF16)                                                     \
            expand_any(panel, r_begin, rows, decoder, true, out);                                  \
        else                                                                                       \
            expand_any(panel, r_begin, rows, decoder, false, out);                                 \
    }                                                                                              \
    static void multiply_##suffix(const float *a, uint32_t tokens, const float *b, uint32_t depth, \
                                  float *sums)                                                     \
    {                                                                                              \
        multiply_any(a, tokens, b, depth, decoder, sums);                                          \
    }                                                                                              \
    const struct cpu_kernel cpu_kernel_##suffix = {                                                \
        .name = text,                                                                              \
        .supported = is_supported,                                                                 \
        .fold = fold_##suffix,                                                                     \
        .stream = stream_##suffix,                                                                 \
        .expand = expand_##suffix,                                                                 \
        .multiply = multiply_##suffix,                                                             \
        .wide_multiply = wide_multiply,                                                            \
        .round_bf16 = round_bf16,                                                                  \
    }

// NOLINTEND(bugprone-macro-parentheses)

KERNEL(avx2, "avx2", supported, BY_F16C);
KERNEL(avx2_subnormal, "avx2-subnormal", subnormals_supported, BY_SUBNORMALS);

#endif
