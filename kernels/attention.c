// Quantises attention's output row by row, in place. Any thread; rows know nothing of each other.
//
//     block b of a row   read, rotate -> values[block_r] -> scale, codes -> bytes [b, b+1) * block_r
//
// What a block's codes overwrite lies in blocks up to b, all read by then. The scales' place lies
// in the row's middle, so they wait for the last block.
//
// Two ways with the same bits: plain C, and AVX2. Neither fuses a product with a sum: this file is
// compiled with contraction off, and the AVX2 functions are not allowed the instruction.
#include "attention.h"

#include <string.h>

#include "fp8.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#endif

enum {
    BLOCK_R_MIN = 32,
    BLOCK_R_MAX = 128,
    SCALES_MAX = EINSUM_DIM_MAX / BLOCK_R_MIN,
    ROTATED_FROM = ATTENTION_HEAD_DIM - ATTENTION_ROPE_DIM,
    FP32_INFINITY = 0x7F800000,
    FP32_MAGNITUDE = 0x7FFFFFFF,
};

// `most` is the greatest magnitude of a block's values as bits; what is not finite is greater than
// all that is. 448 is 1.75 * 2^8, so the quotient's exponent grows where the fraction passes .75.
static uint8_t scale_code(uint32_t most)
{
    if (most >= FP32_INFINITY)
        return UE8M0_NAN;
    uint32_t least = fp32_bits(1e-10f);
    return (uint8_t)((((most > least ? most : least) + 0x1FFFFF) >> 23) - 8);
}

// Multiplying by it divides by the scale, exactly: the scale's exponent lies between -42 and 120.
static float scale_inverse(uint8_t code)
{
    return fp32_from_bits((uint32_t)(254 - code) << 23);
}

// Where a block's values begin to rotate; block_r if none does.
static uint32_t rotates_from(uint32_t dim, uint32_t block_r)
{
    if (dim >= ROTATED_FROM)
        return 0;
    return dim + block_r > ROTATED_FROM ? ROTATED_FROM - dim : block_r;
}

// --- plain C

static uint32_t load_block(const uint8_t *from, uint32_t dim, uint32_t block_r,
                           const struct attention_rotation *rotation, float *values)
{
    uint16_t codes[BLOCK_R_MAX];
    memcpy(codes, from, 2 * block_r);
    for (uint32_t i = 0; i < block_r; i++)
        values[i] = bf16_to_float(codes[i]);
    for (uint32_t i = rotates_from(dim, block_r); i < block_r; i += 2) {
        uint32_t pair = (dim + i - ROTATED_FROM) / 2;
        float x0 = values[i], x1 = values[i + 1];
        values[i] = x0 * rotation->cos[pair] + x1 * rotation->sin[pair];
        values[i + 1] = x1 * rotation->cos[pair] - x0 * rotation->sin[pair];
    }
    uint32_t most = 0;
    for (uint32_t i = 0; i < block_r; i++) {
        uint32_t magnitude = fp32_bits(values[i]) & FP32_MAGNITUDE;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

void attention_quantise_portable(void *row, uint32_t reduced_dim, uint32_t block_r,
                                 const struct attention_rotation *rotation)
{
    uint8_t *bytes = row;
    uint8_t scales[SCALES_MAX];
    float values[BLOCK_R_MAX];
    uint32_t blocks = reduced_dim / block_r;
    for (uint32_t b = 0, r = 0; b < blocks; b++, r += block_r) {
        uint32_t most =
            load_block(bytes + 2 * (uint64_t)r, r % ATTENTION_HEAD_DIM, block_r, rotation, values);
        uint8_t scale = scale_code(most);
        scales[b] = scale;
        if (scale == UE8M0_NAN) {
            memset(bytes + r, 0, block_r);
            continue;
        }
        for (uint32_t i = 0; i < block_r; i++)
            bytes[r + i] = e4m3_from_float(values[i] * scale_inverse(scale));
    }
    // cppcheck-suppress uninitvar ; a row has blocks
    memcpy(bytes + reduced_dim, scales, blocks);
}

// --- AVX2: eight values at a time

#if defined(__x86_64__)

AVX2 static __m256 rotate(__m256 x, const struct attention_rotation *rotation, uint32_t pair)
{
    __m128 cos = _mm_loadu_ps(rotation->cos + pair), sin = _mm_loadu_ps(rotation->sin + pair);
    // Each for both of its pair; the sine's product is taken from the second.
    __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    __m256 cos2 = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(cos), twice);
    __m256 sin2 = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(sin), twice);
    __m256 other = _mm256_mul_ps(_mm256_permute_ps(x, 0xB1), sin2);
    __m256 sign = _mm256_setr_ps(0, -0.0f, 0, -0.0f, 0, -0.0f, 0, -0.0f);
    return _mm256_add_ps(_mm256_mul_ps(x, cos2), _mm256_xor_ps(other, sign));
}

AVX2 static uint32_t load_block_avx2(const uint8_t *from, uint32_t dim, uint32_t block_r,
                                     const struct attention_rotation *rotation, __m256 *values)
{
    uint32_t rotated = rotates_from(dim, block_r);
    __m256i most = _mm256_setzero_si256();
    for (uint32_t i = 0; i < block_r; i += 8) {
        __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)(from + 2 * i));
        __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(codes), 16));
        if (i >= rotated)
            x = rotate(x, rotation, (dim + i - ROTATED_FROM) / 2);
        values[i / 8] = x;
        __m256i magnitude =
            _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(FP32_MAGNITUDE));
        most = _mm256_max_epu32(most, magnitude);
    }
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
    return (uint32_t)_mm_cvtsi128_si32(m);
}

// One code in the low byte of each lane; |x| is 448 at most. Rounding is done by integers where the
// step follows the exponent, and below 2^-6, where it is 2^-9 throughout, by adding 2^14, whose
// unit in the last place that is.
AVX2 static __m256i to_e4m3(__m256 x)
{
    __m256i bits = _mm256_castps_si256(x);
    __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(FP32_MAGNITUDE));
    __m256i sign = _mm256_srli_epi32(_mm256_xor_si256(bits, magnitude), 24);

    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
    __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFFF));
    __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(magnitude, half), 20);
    normal = _mm256_sub_epi32(normal, _mm256_set1_epi32(120 << 3)); // the biases differ by 120

    __m256 anchor = _mm256_set1_ps(0x1p14f);
    __m256i subnormal =
        _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(magnitude), anchor)),
                         _mm256_castps_si256(anchor));

    __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(121 << 23), magnitude); // below 2^-6
    return _mm256_or_si256(sign, _mm256_blendv_epi8(normal, subnormal, small));
}

AVX2 static void store_codes(const __m256 *values, __m256 inverse, uint8_t *to)
{
    __m256i words[2];
    for (int i = 0; i < 2; i++) {
        __m256i low = to_e4m3(_mm256_mul_ps(values[2 * i], inverse));
        __m256i high = to_e4m3(_mm256_mul_ps(values[2 * i + 1], inverse));
        words[i] = _mm256_packus_epi32(low, high);
    }
    // Packing keeps to halves of 16 bytes: put the fours of codes back in order.
    __m256i bytes = _mm256_packus_epi16(words[0], words[1]);
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)(void *)to, _mm256_permutevar8x32_epi32(bytes, order));
}

AVX2 void attention_quantise_avx2(void *row, uint32_t reduced_dim, uint32_t block_r,
                                  const struct attention_rotation *rotation)
{
    uint8_t *bytes = row;
    uint8_t scales[SCALES_MAX];
    __m256 values[BLOCK_R_MAX / 8];
    uint32_t blocks = reduced_dim / block_r;
    for (uint32_t b = 0, r = 0; b < blocks; b++, r += block_r) {
        uint32_t most = load_block_avx2(bytes + 2 * (uint64_t)r, r % ATTENTION_HEAD_DIM, block_r,
                                        rotation, values);
        uint8_t scale = scale_code(most);
        scales[b] = scale;
        if (scale == UE8M0_NAN) {
            memset(bytes + r, 0, block_r);
            continue;
        }
        __m256 inverse = _mm256_set1_ps(scale_inverse(scale));
        for (uint32_t i = 0; i < block_r; i += 32)
            store_codes(values + i / 8, inverse, bytes + r + i);
    }
    // cppcheck-suppress uninitvar ; a row has blocks
    memcpy(bytes + reduced_dim, scales, blocks);
}

bool attention_avx2_supported(void)
{
    return __builtin_cpu_supports("avx2");
}

#else

bool attention_avx2_supported(void)
{
    return false;
}

void attention_quantise_avx2(void *row, uint32_t reduced_dim, uint32_t block_r,
                             const struct attention_rotation *rotation)
{
    attention_quantise_portable(row, reduced_dim, block_r, rotation);
}

#endif

void attention_quantise(void *row, uint32_t reduced_dim, uint32_t block_r,
                        const struct attention_rotation *rotation)
{
    if (attention_avx2_supported())
        attention_quantise_avx2(row, reduced_dim, block_r, rotation);
    else
        attention_quantise_portable(row, reduced_dim, block_r, rotation);
}
