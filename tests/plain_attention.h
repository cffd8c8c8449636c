// What attention.h describes, once more, in FP64 and without any code of kernels/: each FP32
// operation is an FP64 one and a rounding; the scale is found by trying them all, a code by halving
// the line of them. For tests, which compare bytes.
#pragma once

#include <math.h>
#include <stdbool.h>

#include "kernels/attention.h"

static double plain_bf16(uint16_t code)
{
    int exponent = code >> 7 & 0xFF;
    double fraction = code & 0x7F;
    double value = exponent == 0     ? ldexp(fraction, -133)
                   : exponent == 255 ? (fraction != 0 ? NAN : INFINITY)
                                     : ldexp(128 + fraction, exponent - 134);
    return code & 0x8000 ? -value : value;
}

static double plain_e4m3(int code)
{
    int exponent = code >> 3 & 15, fraction = code & 7;
    return exponent == 0 ? ldexp(fraction, -9) : ldexp(8 + fraction, exponent - 10);
}

// One operation in FP64, then one rounding: for a product or a sum of two FP32 that is what FP32
// itself gives, since FP64 has more than twice its digits.
static double plain_fp32(double value)
{
    return (double)(float)value;
}

static uint8_t plain_code(double value)
{
    double magnitude = fabs(value);
    int below = 0, above = 0x7F; // codes on either side; 0x7F, a NaN, for what lies beyond 448
    while (above - below > 1) {
        int middle = (below + above) / 2;
        if (plain_e4m3(middle) <= magnitude)
            below = middle;
        else
            above = middle;
    }
    if (above < 0x7F) {
        double down = magnitude - plain_e4m3(below), up = plain_e4m3(above) - magnitude;
        if (up < down || (up <= down && above % 2 == 0))
            below = above;
    }
    return (uint8_t)(below | (signbit(value) ? 0x80 : 0));
}

static uint8_t plain_scale(double amax)
{
    double least = fmax(amax, (double)1e-10f) / 448;
    for (int exponent = -127; exponent < 128; exponent++)
        if (ldexp(1, exponent) >= least)
            return (uint8_t)(exponent + 127);
    return 0xFF;
}

static void plain_rotated(const uint16_t *row, uint32_t reduced_dim,
                          const struct attention_rotation *rotation, double *values)
{
    for (uint32_t r = 0; r < reduced_dim; r += 2) {
        double x0 = plain_bf16(row[r]), x1 = plain_bf16(row[r + 1]);
        uint32_t dim = r % 512;
        values[r] = x0;
        values[r + 1] = x1;
        if (dim < 448)
            continue;
        double cos = (double)rotation->cos[(dim - 448) / 2];
        double sin = (double)rotation->sin[(dim - 448) / 2];
        values[r] = plain_fp32(plain_fp32(x0 * cos) + plain_fp32(x1 * sin));
        values[r + 1] = plain_fp32(plain_fp32(x1 * cos) - plain_fp32(x0 * sin));
    }
}

static void plain_attention(const uint16_t *row, uint32_t reduced_dim, uint32_t block_r,
                            const struct attention_rotation *rotation, uint8_t *codes,
                            uint8_t *scales)
{
    static double values[EINSUM_DIM_MAX];
    plain_rotated(row, reduced_dim, rotation, values);
    for (uint32_t block = 0; block < reduced_dim / block_r; block++) {
        const double *x = values + (size_t)block * block_r;
        double amax = 0;
        bool finite = true;
        for (uint32_t i = 0; i < block_r; i++) {
            finite = finite && isfinite(x[i]);
            amax = fmax(amax, fabs(x[i]));
        }
        scales[block] = finite ? plain_scale(amax) : 0xFF;
        for (uint32_t i = 0; i < block_r; i++)
            codes[block * block_r + i] =
                finite ? plain_code(plain_fp32(x[i] / ldexp(1, scales[block] - 127))) : 0;
    }
}

// A rotation by `angle` of the first pair, twice that of the second, ...
static struct attention_rotation plain_rotation(double angle)
{
    struct attention_rotation rotation;
    for (int i = 0; i < ATTENTION_ROPE_PAIRS; i++) {
        rotation.cos[i] = (float)cos(angle * (i + 1));
        rotation.sin[i] = (float)sin(angle * (i + 1));
    }
    return rotation;
}
