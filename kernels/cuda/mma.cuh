// The matrix product of one warp, D[M, N] += W[M, K] * A[N, K]^T: outputs of a group are M, tokens N.
//
// Conventions, all of mma m16n8k32 (PTX ISA, "Matrix Fragments for mma.m16n8k32"). Lane = 4g + t.
//     w   16 x 32 E4M3   x = W[g][4t..], y = W[g+8][4t..], z = W[g][16+4t..], w = W[g+8][16+4t..]
//     b    8 x 32 E4M3   two words: A[n=g][4t..], A[n=g][16+4t..]
//     acc 16 x 8  FP32   {[g][2t], [g][2t+1], [g+8][2t], [g+8][2t+1]}
// Block scales, UE8M0, one per row of W, per token, and 32 of K, four of K to a word:
//     row m    from lane 4*(m%8) + 2*tid + m/8, byte bid: a word holds two fragments (tid = 0, 1)
//     token n  from lane 4*n + tid, byte bid:             a word holds four fragments (tid = 0..3)
// bid is the step of 32 within K = 128. Where a scale serves 128 of K its byte stands four times.
//
// On family 12.0 that is one instruction. Elsewhere E4M3 is converted to F16 (exact) and multiplied by
// two m16n8k16, the sum of a block scaled in FP32, with scales that are fetched from those very
// lanes and bytes: a test of one form tests the layout of the other.
#pragma once

#include <stdint.h>

#if defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#if __CUDA_ARCH_FAMILY_SPECIFIC__ >= 1200 && __CUDA_ARCH_FAMILY_SPECIFIC__ < 1300
#define MMA_BLOCK_SCALED 1
#endif
#endif
#ifndef MMA_BLOCK_SCALED
#define MMA_BLOCK_SCALED 0
#endif

constexpr uint32_t UE8M0_ONES = 0x7F7F7F7F;

template <int N> struct constant {
    static constexpr int value = N;
    __host__ __device__ constexpr operator int() const
    {
        return N;
    }
};

// Calls f with 0 .. N-1 as compile-time constants: selectors of mma are immediates.
template <int N, class F> __device__ __forceinline__ void unrolled(F f)
{
    if constexpr (N > 0) {
        unrolled<N - 1>(f);
        f(constant<N - 1>{});
    }
}

#if MMA_BLOCK_SCALED
template <int BID_W, int TID_W, int BID_A, int TID_A>
__device__ __forceinline__ void mma_scaled(float (&d)[4], uint4 w, uint32_t b0, uint32_t b1,
                                           uint32_t scale_w, uint32_t scale_a)
{
    asm("mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col"
        ".f32.e4m3.e4m3.f32.ue8m0 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, "
        "{%10}, {%11, %12}, {%13}, {%14, %15};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(b0), "r"(b1), //
          "r"(scale_w), "n"(BID_W), "n"(TID_W), "r"(scale_a), "n"(BID_A), "n"(TID_A));
}
#endif

struct pairs { // four E4M3 as two times two of a 16-bit type
    uint32_t low, high;
};

__device__ __forceinline__ pairs e4m3_to_f16(uint32_t four)
{
    pairs p;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2;"
        "  cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
        : "=r"(p.low), "=r"(p.high)
        : "r"(four));
    return p;
}

__device__ __forceinline__ uint32_t f16_to_bf16(uint32_t two)
{
    uint32_t out;
    asm("{ .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, %1;"
        "  cvt.f32.f16 a, l; cvt.f32.f16 b, h; cvt.rn.bf16x2.f32 %0, b, a; }"
        : "=r"(out)
        : "r"(two));
    return out;
}

__device__ __forceinline__ pairs e4m3_to_bf16(uint32_t four)
{
    pairs p = e4m3_to_f16(four);
    return {f16_to_bf16(p.low), f16_to_bf16(p.high)};
}

__device__ __forceinline__ void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// An operand of K = 32 as the instruction takes it. Conversions are the portable form's largest cost
// beside the products, so they are done once for all products that share an operand.
#if MMA_BLOCK_SCALED
struct w_operand {
    uint4 raw;
};
struct a_operand {
    uint32_t x, y;
};
__device__ __forceinline__ w_operand w_operand_of(uint4 w)
{
    return {w};
}
__device__ __forceinline__ a_operand a_operand_of(uint32_t b0, uint32_t b1)
{
    return {b0, b1};
}
#else
struct w_operand {
    pairs x, y, z, w;
};
struct a_operand {
    pairs x, y;
};
__device__ __forceinline__ w_operand w_operand_of(uint4 w)
{
    return {e4m3_to_f16(w.x), e4m3_to_f16(w.y), e4m3_to_f16(w.z), e4m3_to_f16(w.w)};
}
__device__ __forceinline__ a_operand a_operand_of(uint32_t b0, uint32_t b1)
{
    return {e4m3_to_f16(b0), e4m3_to_f16(b1)};
}
#endif

// Unscaled products of K = 32. Which k an F16 product calls first does not matter, as long as both
// sides agree: the low pairs of 4t.. stand for 2t.., the high ones for 8+2t...
__device__ __forceinline__ void mma_unscaled(float (&d)[4], const w_operand &w, const a_operand &a)
{
#if MMA_BLOCK_SCALED
    mma_scaled<0, 0, 0, 0>(d, w.raw, a.x, a.y, UE8M0_ONES,
                           UE8M0_ONES); // twice the plain one's rate
#else
    mma_f16(d, w.x.low, w.y.low, w.x.high, w.y.high, a.x.low, a.x.high);
    mma_f16(d, w.z.low, w.w.low, w.z.high, w.w.high, a.y.low, a.y.high);
#endif
}

// Calls product(m, n, step, w, a) for all of an [MT, NT] tile and the four steps of K = 128.
//     w(m, step)            fragment of W
//     b(n, half)            two fragments of A, if MT is 1: of steps 2*half and 2*half+1
//     b(pair, step)         otherwise: of tokens' tiles 2*pair and 2*pair+1
template <int MT, int NT, class W, class B, class P>
__device__ __forceinline__ void for_k128(W w, B b, P product)
{
    unrolled<2>([&](auto half) {
        constexpr constant<2 * decltype(half)::value> even;
        constexpr constant<2 * decltype(half)::value + 1> odd;
        if constexpr (MT == 1) { // four token tiles side by side: enough to hide mma's latency
            constexpr int SIDE = NT < 4 ? NT : 4;
            w_operand w_even = w_operand_of(w(0, even)), w_odd = w_operand_of(w(0, odd));
            unrolled<NT / SIDE>([&](auto side) {
                constexpr int first = decltype(side)::value * SIDE;
                uint4 bs[SIDE];
                unrolled<SIDE>([&](auto i) { bs[i] = b(first + i, half); });
                unrolled<SIDE>([&](auto i) {
                    constexpr constant<first + decltype(i)::value> n;
                    product(constant<0>{}, n, even, w_even, a_operand_of(bs[i].x, bs[i].y));
                });
                unrolled<SIDE>([&](auto i) {
                    constexpr constant<first + decltype(i)::value> n;
                    product(constant<0>{}, n, odd, w_odd, a_operand_of(bs[i].z, bs[i].w));
                });
            });
        } else {
            auto products = [&](auto step) {
                a_operand as[NT];
                unrolled<NT / 2>([&](auto pair) {
                    uint4 bs = b(pair, step);
                    as[2 * pair] = a_operand_of(bs.x, bs.y);
                    as[2 * pair + 1] = a_operand_of(bs.z, bs.w);
                });
                unrolled<MT>([&](auto m) {
                    w_operand ws = w_operand_of(w(m, step));
                    unrolled<NT>([&](auto n) { product(m, n, step, ws, as[n]); });
                });
            };
            products(even);
            products(odd);
        }
    });
}

// K = 128 of an [16*MT, 8*NT] tile: acc += scale * (sum of 128 or, for BLOCK 32, of each 32), where scale is
//     rows(m, n, step)   of accumulator rows g and g+8, asked for once a product
//     tokens(n, step)    times that of tokens 2t and 2t+1
template <int MT, int NT, int BLOCK, class W, class B, class R, class T>
__device__ __forceinline__ void mma_k128_rescaled(float (&acc)[MT][NT][4], W w, B b, R rows,
                                                  T tokens)
{
    auto add = [](float(&to)[4], const float(&sum)[4], float2 row, float2 token) {
        to[0] = fmaf(sum[0], row.x * token.x, to[0]);
        to[1] = fmaf(sum[1], row.x * token.y, to[1]);
        to[2] = fmaf(sum[2], row.y * token.x, to[2]);
        to[3] = fmaf(sum[3], row.y * token.y, to[3]);
    };
    float sum[MT][NT][4] = {};
    for_k128<MT, NT>(w, b,
                     [&](auto m, auto n, auto step, const w_operand &ws, const a_operand &as) {
                         mma_unscaled(sum[m][n], ws, as);
                         if constexpr (BLOCK == 32) {
                             add(acc[m][n], sum[m][n], rows(m, n, step), tokens(n, step));
#pragma unroll
                             for (int i = 0; i < 4; i++)
                                 sum[m][n][i] = 0;
                         }
                     });
    if constexpr (BLOCK == 128)
        unrolled<NT>([&](auto n) {
            float2 token = tokens(n, 0);
            unrolled<MT>([&](auto m) { add(acc[m][n], sum[m][n], rows(m, n, 0), token); });
        });
}

// The same with UE8M0 words laid out over the lanes as above; two fragments of W to a word, four of A.
template <int MT, int NT, int BLOCK, class W, class B>
__device__ __forceinline__ void mma_k128_ue8m0(float (&acc)[MT][NT][4], W w, B b,
                                               const uint32_t (&scale_w)[(MT + 1) / 2],
                                               const uint32_t (&scale_a)[(NT + 3) / 4])
{
#if MMA_BLOCK_SCALED
    for_k128<MT, NT>(
        w, b, [&](auto m, auto n, auto step, const w_operand &ws, const a_operand &as) {
            constexpr int s = decltype(step)::value;
            constexpr int tid_w = decltype(m)::value % 2, tid_a = decltype(n)::value % 4;
            mma_scaled<s, tid_w, s, tid_a>(acc[m][n], ws.raw, as.x, as.y, scale_w[m / 2],
                                           scale_a[n / 4]);
        });
#else
    constexpr uint32_t ALL = 0xFFFFFFFF;
    uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    auto power = [](uint32_t word, int step) { // narrow codes: neither 0 nor NaN
        return __uint_as_float((word >> (8 * step) & 0xFF) << 23);
    };
    auto row_words = [&](auto m) {
        return make_uint2(__shfl_sync(ALL, scale_w[m / 2], 4 * g + 2 * (m % 2) + 0),  // row g
                          __shfl_sync(ALL, scale_w[m / 2], 4 * g + 2 * (m % 2) + 1)); // row g+8
    };
    auto token_words = [&](auto n) {
        return make_uint2(__shfl_sync(ALL, scale_a[n / 4], 4 * (2 * t + 0) + n % 4),
                          __shfl_sync(ALL, scale_a[n / 4], 4 * (2 * t + 1) + n % 4));
    };
    auto powers = [&](uint2 words, int step) {
        return make_float2(power(words.x, step), power(words.y, step));
    };
    uint2 row[MT];
    unrolled<MT>([&](auto m) { row[m] = row_words(m); });
    auto rows = [&](auto m, int, int step) { return powers(row[m], step); };
    if constexpr (BLOCK == 128) { // fetched when the products are done: registers are short
        mma_k128_rescaled<MT, NT, BLOCK>(
            acc, w, b, rows, [&](auto n, int step) { return powers(token_words(n), step); });
    } else {
        uint2 token[NT];
        unrolled<NT>([&](auto n) { token[n] = token_words(n); });
        mma_k128_rescaled<MT, NT, BLOCK>(acc, w, b, rows,
                                         [&](auto n, int step) { return powers(token[n], step); });
    }
#endif
}

// K = 64 of BF16 weights: acc += scale * sum.
//     w(m, j)         fragment j of 16 of K: x = W[g][4t, 4t+1], y = W[g+8][the same],
//                     z = W[g][4t+2, 4t+3], w = W[g+8][the same]
//     b               as in for_k128, for this half
//     scale(n, i)     of accumulator i
template <int MT, int NT, class W, class B, class S>
__device__ __forceinline__ void mma_k64_bf16(float (&acc)[MT][NT][4], W w, B b, int half, S scale)
{
    float sum[MT][NT][4] = {};
    if constexpr (MT == 1) {
        uint4 ws[4] = {w(0, 0), w(0, 1), w(0, 2), w(0, 3)};
        unrolled<NT>([&](auto n) {
            uint4 bs = b(n, half);
            const uint32_t fours[4] = {bs.x, bs.y, bs.z, bs.w};
            unrolled<4>([&](auto j) {
                pairs as = e4m3_to_bf16(fours[j]);
                mma_bf16(sum[0][n], ws[j], as.low, as.high);
            });
        });
    } else {
        unrolled<2>([&](auto step) {
            pairs as[NT][2];
            unrolled<NT / 2>([&](auto pair) {
                uint4 bs = b(pair, 2 * half + step);
                as[2 * pair][0] = e4m3_to_bf16(bs.x);
                as[2 * pair][1] = e4m3_to_bf16(bs.y);
                as[2 * pair + 1][0] = e4m3_to_bf16(bs.z);
                as[2 * pair + 1][1] = e4m3_to_bf16(bs.w);
            });
            unrolled<MT>([&](auto m) {
                unrolled<2>([&](auto j) {
                    uint4 ws = w(m, 2 * step + j);
                    unrolled<NT>(
                        [&](auto n) { mma_bf16(sum[m][n], ws, as[n][j].low, as[n][j].high); });
                });
            });
        });
    }
    unrolled<MT>([&](auto m) {
        unrolled<NT>([&](auto n) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                acc[m][n][i] = fmaf(sum[m][n][i], scale(n, i), acc[m][n][i]);
        });
    });
}
