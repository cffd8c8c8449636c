// Conversions between the small float types and FP32 or FP64, exact or rounded once to nearest
// even. Header only; pure functions of bits, so that a compiler may vectorise them.
//
//     type   bits              value                                   special
//     E4M3   s eeee mmm        2^(e-7) * 1.m, e = 0: 2^-6 * 0.m        0x7F, 0xFF NaN; no infinity
//     UE8M0  eeeeeeee          2^(e-127)                               0xFF NaN; no zero, no sign
//     BF16   s eeeeeeee m{7}   the upper half of an FP32               as FP32
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    E4M3_NAN = 0x7F,
    E4M3_GREATEST = 0x7E, // 448
    UE8M0_NAN = 0xFF,
    BF16_NAN = 0x7FC0, // the one that this house writes
};

static inline float fp32_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// From any alignment.
static inline float fp32_load(const void *at)
{
    float value;
    memcpy(&value, at, sizeof(value));
    return value;
}

static inline uint32_t fp32_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline double fp64_from_bits(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline uint64_t fp64_bits(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

// The quiet NaN that conversions give, also where a compiler is told that there are none.
static inline float fp32_nan(void)
{
    return fp32_from_bits(0x7FC00000);
}

static inline int e4m3_is_nan(uint8_t code)
{
    return (code & 0x7F) == E4M3_NAN;
}

static inline float e4m3_to_float(uint8_t code)
{
    // Masks for choices: loops over this become vector code on any target.
    uint32_t magnitude = code & 0x7F;
    uint32_t is_subnormal = 0 - (uint32_t)(magnitude < 8);
    uint32_t is_nan = 0 - (uint32_t)(magnitude == E4M3_NAN);
    uint32_t normal =
        (magnitude << 20) + ((uint32_t)120 << 23); // 120: the exponents' biases differ
    uint32_t subnormal = fp32_bits((float)(int32_t)magnitude * 0x1p-9f);
    uint32_t bits = (subnormal & is_subnormal) | (normal & ~is_subnormal) | (0x7FC00000 & is_nan);
    return fp32_from_bits(bits | (uint32_t)(code & 0x80) << 24);
}

// Rounds to nearest even and saturates to +-448, as quantisers clamp. NaN stays NaN.
static inline uint8_t e4m3_from_double(double value)
{
    uint64_t bits = fp64_bits(value);
    uint8_t sign = (uint8_t)(bits >> 63 << 7);
    uint64_t fraction = bits & (((uint64_t)1 << 52) - 1);
    int exponent = (int)(bits >> 52 & 0x7FF) - 1023;
    if (exponent == 1024 && fraction != 0)
        return sign | E4M3_NAN;
    if (exponent > 8)
        return sign | E4M3_GREATEST;
    if (exponent < -10) // less than half of the least subnormal, 2^-9
        return sign;

    int scale = exponent < -6 ? -6 : exponent; // of the binade whose step, 2^(scale-3), applies
    int shift = 49 + scale - exponent;
    uint64_t significand = fraction | (uint64_t)1 << 52;
    uint64_t steps = significand >> shift;
    uint64_t rest = significand - (steps << shift);
    uint64_t half = (uint64_t)1 << (shift - 1);
    steps += rest > half || (rest == half && (steps & 1)) ? 1 : 0;
    // A step count of 16 carries into the next binade by itself.
    uint64_t code = ((uint64_t)(scale + 7) << 3) + steps - 8;
    return sign | (uint8_t)(code > E4M3_GREATEST ? E4M3_GREATEST : code);
}

static inline uint8_t e4m3_from_float(float value)
{
    return e4m3_from_double((double)value);
}

// Exact: 2^-127 is a subnormal FP32.
static inline float ue8m0_to_float(uint8_t code)
{
    uint32_t bits = code == 0 ? 0x00400000 : (uint32_t)code << 23;
    return fp32_from_bits(code == UE8M0_NAN ? 0x7FC00000 : bits);
}

static inline float bf16_to_float(uint16_t code)
{
    return fp32_from_bits((uint32_t)code << 16);
}

static inline uint16_t bf16_from_float(float value)
{
    uint32_t bits = fp32_bits(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000)
        return BF16_NAN;
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// One rounding, although FP32 lies between: it is passed rounded to odd, which keeps "above or
// below the midpoint" for the second step.
static inline uint16_t bf16_from_double(double value)
{
    float nearest = (float)value;
    uint32_t bits = fp32_bits(nearest);
    if ((double)nearest != value && value == value) {
        double magnitude = value < 0 ? -value : value;
        double nearest_magnitude = nearest < 0 ? -(double)nearest : (double)nearest;
        bits = (bits - (nearest_magnitude > magnitude ? 1 : 0)) | 1;
    }
    return bf16_from_float(fp32_from_bits(bits));
}

#ifdef __cplusplus
}
#endif
