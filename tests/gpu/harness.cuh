// What the GPU test and the benchmark share: random weights and operands on the device, FP64 answers
// computed there from the checkpoint's own order (and those checked against kernels/reference.c),
// and the comparison, in which NaN must meet NaN and everything else its tolerance.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/cuda/cuda.h"
#include "kernels/fp8.h"

#define CHECK(call)                                                                                \
    do {                                                                                           \
        cudaError_t check_error = (call);                                                          \
        if (check_error != cudaSuccess) {                                                          \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call,                          \
                    cudaGetErrorString(check_error));                                              \
            exit(2);                                                                               \
        }                                                                                          \
    } while (0)

template <class T> inline T *device_alloc(uint64_t n)
{
    void *p = nullptr;
    CHECK(cudaMalloc(&p, n * sizeof(T) + 256));
    return (T *)p;
}

// ---- random contents

enum fill_kind {
    FILL_E4M3,
    FILL_BF16,
    FILL_UE8M0,
    FILL_FP32,
    FILL_UE8M0_EXTREME,
    FILL_FP32_EXTREME
};

__device__ __host__ inline uint32_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    x ^= x >> 33;
    return (uint32_t)x;
}

static __global__ void fill_kernel(uint8_t *to, uint64_t elements, int kind, uint64_t seed)
{
    uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= elements)
        return;
    uint32_t random = mix(seed * 0x9e3779b97f4a7c15ull + i);
    uint32_t rare = mix(seed * 77 + i / 3) % 64; // decides where an extreme value stands
    float value = __uint_as_float((random >> 9 & 0x7FFFFF) | (uint32_t)(120 + random % 8) << 23);
    switch (kind) {
    case FILL_E4M3:
        to[i] = (uint8_t)(random % 127 | (random >> 8 & 0x80)); // all but NaN
        break;
    case FILL_BF16:
        ((uint16_t *)to)[i] = (uint16_t)(__float_as_uint(value) >> 16 | (random << 15 & 0x8000));
        break;
    case FILL_UE8M0:
        to[i] = (uint8_t)(119 + random % 12);
        break;
    case FILL_FP32:
        ((float *)to)[i] = random >> 31 ? -value : value;
        break;
    case FILL_UE8M0_EXTREME: {
        const uint8_t codes[8] = {0, 1, 20, 76, 77, 172, 173, 230};
        to[i] = rare < 8 ? codes[rare] : rare == 8 ? 254 : (uint8_t)(119 + random % 12);
        break;
    }
    default: {
        const float values[8] = {0,          1e-45f,  1.5e-38f, 0x1p-51f,
                                 0x1.fp-51f, 0x1p46f, 3e30f,    -3.3e38f};
        ((float *)to)[i] = rare < 8 ? values[rare] : value;
        break;
    }
    }
}

inline void fill(void *to, uint64_t elements, fill_kind kind, uint64_t seed)
{
    if (elements == 0)
        return;
    fill_kernel<<<(uint32_t)((elements + 255) / 256), 256>>>((uint8_t *)to, elements, kind, seed);
    CHECK(cudaGetLastError());
}

inline bool device_is_hopper()
{
    int major = 0, minor = 0;
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    return major == 9 && minor == 0;
}

inline bool by_wgmma(uint32_t launches)
{
    return launches & (CUDA_LAUNCH_HOPPER | CUDA_LAUNCH_HOPPER_MANY);
}

// ---- a weight, in the checkpoint's order and re-laid

struct test_weight {
    einsum_weight_format format;
    uint8_t *elements, *scales; // as in the checkpoint, on the device
    cuda_weight weight;
};

// Re-lays in chunks of unequal size, as a loader would.
inline void relay(test_weight &w)
{
    const einsum_weight_format &f = w.format;
    uint64_t rows = (uint64_t)f.groups * f.output_dim;
    uint64_t row_bytes = (uint64_t)f.reduced_dim * einsum_weight_element_bytes(f.weight_type);
    CHECK(cuda_weight_init(&w.weight, &f, device_is_hopper(), w.weight.memory, 0));
    for (uint64_t row = 0, chunk = 48; row < rows; row += chunk, chunk = 4096 + 16) {
        chunk = chunk < rows - row ? chunk : rows - row;
        CHECK(cuda_relayout(&w.weight, w.elements + row * row_bytes, row, chunk, 0));
    }
    CHECK(cuda_relayout_scales(&w.weight, w.scales, 0));
}

inline test_weight make_weight(const einsum_weight_format &format, uint64_t seed, bool extreme)
{
    test_weight w = {format, nullptr, nullptr, {}};
    uint64_t elements = (uint64_t)format.groups * format.output_dim * format.reduced_dim;
    uint64_t scale_bytes = einsum_weight_scale_bytes(&format);
    w.elements = device_alloc<uint8_t>(einsum_weight_bytes(&format));
    w.scales = device_alloc<uint8_t>(scale_bytes);
    bool fp32 = format.scale_type == EINSUM_SCALE_FP32;
    fill(w.elements, elements, format.weight_type == EINSUM_WEIGHT_BF16 ? FILL_BF16 : FILL_E4M3,
         seed);
    fill(w.scales, fp32 ? scale_bytes / 4 : scale_bytes,
         extreme ? fp32 ? FILL_FP32_EXTREME : FILL_UE8M0_EXTREME
         : fp32  ? FILL_FP32
                 : FILL_UE8M0,
         seed + 1);
    w.weight.memory = device_alloc<uint8_t>(cuda_weight_bytes(&format, device_is_hopper()));
    relay(w);
    return w;
}

inline void free_weight(test_weight &w)
{
    CHECK(cudaFree(w.elements));
    CHECK(cudaFree(w.scales));
    CHECK(cudaFree(w.weight.memory));
}

// ---- FP64 answers and the comparison

struct reference_arguments {
    einsum_weight_format format;
    einsum_operand operand;
    struct einsum_scale_strides strides;
    const uint8_t *elements, *scales;
    bool hopper; // computed by wgmma
};

struct verdict {
    unsigned long long checked, failed, nan_expected;
    unsigned long long first; // output index of one failure
    double squared_error, squared;
    double exact, got;
};

__device__ inline double e4m3_double(uint32_t code)
{
    uint32_t e = code >> 3 & 15, m = code & 7;
    double v = e == 0 ? m * 0x1p-9 : (8 + m) * exp2((double)e - 10);
    if ((code & 0x7F) == 0x7F)
        v = __longlong_as_double(0x7ff8000000000000ll);
    return code & 0x80 ? -v : v;
}

__device__ inline double scale_double(const uint8_t *at, einsum_scale_type type)
{
    if (type == EINSUM_SCALE_FP32)
        return *(const float *)at;
    return *at == 0xFF ? __longlong_as_double(0x7ff8000000000000ll) : exp2((double)*at - 127);
}

// What wgmma of E4M3 may lose: of each step of 32, and the sum that it is added to within K = 128, all
// addends are cut 13 bits below the greatest.
struct wgmma_loss {
    double sum = 0, allowed = 0; // sum: of the K = 128 at hand

    // All lanes of a warp, each with its product of the step that begins at `r`.
    __device__ void step(uint32_t r, double product)
    {
        double greatest = fabs(product), step = product;
        for (int offset = 16; offset > 0; offset /= 2) {
            greatest = fmax(greatest, __shfl_xor_sync(0xFFFFFFFF, greatest, offset));
            step += __shfl_xor_sync(0xFFFFFFFF, step, offset);
        }
        sum = r % 128 == 0 ? 0 : sum;
        allowed += 33 * 0x1p-13 * fmax(greatest, fabs(sum));
        sum += step;
    }
};

// One warp an output.
static __global__ void compare_kernel(reference_arguments a, double *answers, verdict *v)
{
    const einsum_operand &o = a.operand;
    uint64_t index = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    uint32_t lane = threadIdx.x % 32;
    uint32_t D = a.format.output_dim, R = a.format.reduced_dim, G = o.groups;
    if (index >= (uint64_t)o.tokens * G * D)
        return;
    uint32_t d = index % D, g = index / D % G, t = (uint32_t)(index / D / G);
    uint64_t row = (uint64_t)(o.group_begin + g) * D + d;
    bool gtr = o.activation_layout == EINSUM_ACTIVATIONS_GTR;
    uint32_t row_bytes = o.activation_layout == EINSUM_ACTIVATIONS_IN_PLACE ? 2 * R : R;
    const uint8_t *activations =
        (const uint8_t *)o.activations +
        (gtr ? (uint64_t)g * o.tokens + t : (uint64_t)t * G + g) * row_bytes;
    uint32_t block = a.format.block_r,
             scale_bytes = a.format.scale_type == EINSUM_SCALE_FP32 ? 4 : 1;
    double sum = 0, magnitude = 0;
    wgmma_loss loss;
    for (uint32_t r = lane; r < R; r += 32) {
        uint32_t k = r / block;
        double sa =
            scale_double((const uint8_t *)o.scales + t * a.strides.token + g * a.strides.group +
                             k / 4 * a.strides.word + k % 4 * a.strides.byte,
                         o.scale_type);
        double sb =
            a.format.scale_type == EINSUM_SCALE_NONE
                ? 1
                : scale_double(a.scales + (row / a.format.block_d * (R / block) + k) * scale_bytes,
                               a.format.scale_type);
        double w =
            a.format.weight_type == EINSUM_WEIGHT_BF16
                ? __uint_as_float((uint32_t)((const uint16_t *)a.elements)[row * R + r] << 16)
                : e4m3_double(a.elements[row * R + r]);
        double product = e4m3_double(activations[r]) * sa * (w * sb);
        sum += product;
        magnitude += fabs(product);
        if (a.hopper)
            loss.step(r - lane, product);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, offset);
        magnitude += __shfl_xor_sync(0xFFFFFFFF, magnitude, offset);
    }
    if (lane != 0)
        return;
    if (answers != nullptr)
        answers[index] = sum;

    bool fp32 = o.output_type == EINSUM_OUTPUT_FP32;
    double got = fp32 ? ((const float *)o.output)[index]
                      : __uint_as_float((uint32_t)((const uint16_t *)o.output)[index] << 16);
    // einsum_tolerance() of kernels/reference.c
    int fraction = fp32 ? 23 : 7;
    double summation = magnitude * R * 0x1p-24 + loss.allowed, reach = fabs(sum) + summation;
    double tolerance = summation + scalbn(0.5, (reach < FLT_MIN ? -126 : ilogb(reach)) - fraction);
    double greatest = scalbn(2 - scalbn(1.0, -fraction), 127);
    bool good = isnan(sum) ? isnan(got)
                : reach > greatest
                    ? !isnan(got) && (fabs(got) > greatest / 2 || fabs(got - sum) <= summation)
                    : fabs(got - sum) <= tolerance;
    atomicAdd(&v->checked, 1ull);
    if (isnan(sum))
        atomicAdd(&v->nan_expected, 1ull);
    if (!good && atomicAdd(&v->failed, 1ull) == 0) {
        v->first = index;
        v->exact = sum;
        v->got = got;
    }
    if (isfinite(sum) && isfinite(got)) {
        atomicAdd(&v->squared_error, (got - sum) * (got - sum));
        atomicAdd(&v->squared, sum * sum);
    }
}

inline verdict compare(const test_weight &w, const einsum_operand &operand, bool hopper = false,
                       double *answers = nullptr)
{
    static verdict *v = nullptr;
    if (v == nullptr)
        v = device_alloc<verdict>(1);
    CHECK(cudaMemset(v, 0, sizeof *v));
    reference_arguments a = {w.format,   operand,  einsum_scale_strides(&w.format, &operand),
                             w.elements, w.scales, hopper};
    uint64_t outputs = (uint64_t)operand.tokens * operand.groups * w.format.output_dim;
    compare_kernel<<<(uint32_t)((outputs + 7) / 8), 256>>>(a, answers, v);
    CHECK(cudaGetLastError());
    verdict result;
    CHECK(cudaMemcpy(&result, v, sizeof result, cudaMemcpyDeviceToHost));
    return result;
}

// ---- launching

// One for all buckets, as a lane of the engine has: what one leaves there must not disturb another. As
// many as launches overlap.
enum { OVERLAPS_MAX = 43 };
inline void *shared_workspace(uint32_t which, uint64_t bytes)
{
    static uint8_t *memories[OVERLAPS_MAX];
    uint8_t *&memory = memories[which];
    constexpr uint64_t ENOUGH = (uint64_t)32 << 20;
    if (bytes > ENOUGH) {
        fprintf(stderr, "a workspace of %llu bytes\n", (unsigned long long)bytes);
        exit(2);
    }
    if (memory == nullptr) {
        memory = device_alloc<uint8_t>(ENOUGH);
        CHECK(cudaMemset(memory, 0, ENOUGH));
    }
    return memory;
}

struct launcher {
    cuda_bucket bucket;
    std::vector<uint8_t> host;
    std::vector<uint32_t> order;
    cuda_table *table;
    void *workspace;

    launcher(uint32_t tokens_max, uint32_t segments_max)
    {
        CHECK(cuda_bucket_init(&bucket, tokens_max, device_is_hopper()));
        reserve(segments_max);
    }
    launcher(const cuda_bucket &b, uint32_t segments_max) : bucket(b)
    {
        reserve(segments_max);
    }
    void reserve(uint32_t segments_max)
    {
        host.resize(cuda_table_bytes(&bucket, segments_max));
        order.resize(segments_max);
        table = (cuda_table *)device_alloc<uint8_t>(host.size());
        workspace = workspace_of(0);
    }
    // For launches that overlap. The first time of each not while a graph is captured.
    void *workspace_of(uint32_t launch) const
    {
        return shared_workspace(launch, cuda_workspace_bytes(&bucket));
    }
    ~launcher()
    {
        CHECK(cudaFree(table));
    }
    launcher(const launcher &) = delete;

    // Returns what the table needs launched.
    uint32_t build(const cuda_segment *segments, uint32_t n, cuda_table *to, cudaStream_t stream)
    {
        cuda_table *t = (cuda_table *)host.data();
        cuda_table_build(&bucket, segments, n, order.data(), t);
        if (cuda_table_used(t) > host.size()) {
            fprintf(stderr, "table of %zu bytes exceeds its bound\n", (size_t)cuda_table_used(t));
            exit(2);
        }
        CHECK(cudaMemcpyAsync(to, t, cuda_table_used(t), cudaMemcpyHostToDevice, stream));
        return cuda_table_launches(t);
    }
    // Returns whether Hopper's arm took part.
    bool run(const cuda_segment *segments, uint32_t n, cudaStream_t stream)
    {
        CHECK(cudaDeviceSynchronize()); // inputs and poison come from the default stream
        uint32_t launches = build(segments, n, table, stream);
        CHECK(cuda_launch(&bucket, launches, table, workspace, stream));
        return by_wgmma(launches);
    }
};
