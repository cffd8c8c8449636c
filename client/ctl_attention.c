// A head of attention's output on its way to activations:
//
//     BF16 [448 | 64]  --the last 64 as 32 pairs, turned back by the position-->  FP32 [512]
//     FP32 [block_r]   --largest / 448, up to the next 2^e-->  E4M3 [block_r], e + 127
//
// Every operation is FP32 and rounded on its own; angles are as models are trained with them, FP32
// products, and only their cos and sin are taken in double.

#include "ctl_attention.h"

#include "../kernels/fp8.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { HEAD_DIM = 512, ROPE_DIM = 64, PAIRS = ROPE_DIM / 2, ROPE_BEGIN = HEAD_DIM - ROPE_DIM };

bool ctl_takes_attention(const struct einsum_client_weight *weight)
{
    return weight->has_rope && weight->reduced_dim % HEAD_DIM == 0;
}

// ---- positions ----------------------------------------------------------------------------------

// Counted in pairs, where one turns so many times over the original positions.
static double pair_turning(const struct ctl_rope *rope, double times)
{
    double positions_a_radian = rope->original_positions_max / (2 * M_PI * times);
    return PAIRS * log(positions_a_radian) / log(rope->theta);
}

static void set_frequencies(const struct ctl_rope *rope, float frequency[PAIRS])
{
    double first = floor(pair_turning(rope, rope->beta_fast));
    double last = ceil(pair_turning(rope, rope->beta_slow));
    first = first < 0 ? 0 : first;
    last = last > ROPE_DIM - 1 ? ROPE_DIM - 1 : last;
    double width = first == last ? 0.001 : last - first;
    for (int i = 0; i < PAIRS; i++) {
        float power = (float)pow((double)(float)rope->theta, (double)i / PAIRS);
        float plain = 1 / power;
        frequency[i] = plain;
        if (rope->factor > 1) {
            float slowed_share = ((float)i - (float)first) / (float)width;
            slowed_share = fminf(fmaxf(slowed_share, 0), 1);
            float kept = 1 - slowed_share;
            frequency[i] = plain / (float)rope->factor * (1 - kept) + plain * kept;
        }
    }
}

// cos of all pairs, then sin.
static void turn_of(const struct ctl_rope *rope, const float frequency[PAIRS], int64_t position,
                    float turn[ROPE_DIM])
{
    if (rope->table) {
        memcpy(turn, rope->table + position * ROPE_DIM, ROPE_DIM * sizeof *turn);
        return;
    }
    for (int i = 0; i < PAIRS; i++) {
        float angle = (float)position * frequency[i];
        turn[i] = (float)cos((double)angle);
        turn[PAIRS + i] = (float)sin((double)angle);
    }
}

static void turn_back(const float turn[ROPE_DIM], float head[HEAD_DIM])
{
    for (int i = 0; i < PAIRS; i++) {
        float *pair = head + ROPE_BEGIN + 2 * i;
        float x_cos = pair[0] * turn[i], y_sin = pair[1] * turn[PAIRS + i];
        float y_cos = pair[1] * turn[i], x_sin = pair[0] * turn[PAIRS + i];
        pair[0] = x_cos + y_sin;
        pair[1] = y_cos - x_sin;
    }
}

// ---- quantising ---------------------------------------------------------------------------------

static void quantise_block(const float *from, uint32_t n, uint8_t *to, uint8_t *scale)
{
    double largest = 1e-10;
    bool finite = true;
    for (uint32_t i = 0; i < n; i++) {
        finite = finite && isfinite(from[i]);
        largest = fmax(largest, fabs((double)from[i]));
    }
    int exponent; // largest / 448 is in [2^(exponent - 1), 2^exponent)
    if (frexp(largest / 448, &exponent) == 0.5)
        exponent--;
    *scale = finite ? (uint8_t)(exponent + 127) : 0xff;
    for (uint32_t i = 0; i < n; i++)
        to[i] = finite ? e4m3_from_double(ldexp((double)from[i], -exponent)) : 0;
}

bool ctl_quantise_attention(const struct ctl_rope *rope, const struct einsum_client_weight *weight,
                            uint32_t tokens, const struct ctl_inputs *attention,
                            struct ctl_inputs *quantised)
{
    uint32_t block = weight->block_r;
    uint64_t heads = (uint64_t)weight->groups * weight->reduced_dim / HEAD_DIM;
    *quantised = (struct ctl_inputs){
        .activations_bytes = tokens * heads * HEAD_DIM,
        .scales_bytes = tokens * heads * (HEAD_DIM / block),
    };
    quantised->activations = malloc(quantised->activations_bytes + 1);
    quantised->scales = malloc(quantised->scales_bytes + 1);
    if (!quantised->activations || !quantised->scales) {
        ctl_inputs_deinit(quantised);
        return false;
    }
    float frequency[PAIRS] = {0}, turn[ROPE_DIM], head[HEAD_DIM];
    if (!rope->table)
        set_frequencies(rope, frequency);
    const uint16_t *bits = (const uint16_t *)(const void *)attention->activations;
    const int64_t *positions = (const int64_t *)(const void *)attention->scales;
    uint8_t *values = quantised->activations, *scales = quantised->scales;
    for (uint32_t t = 0; t < tokens; t++) {
        turn_of(rope, frequency, positions[t], turn);
        for (uint64_t h = 0; h < heads; h++, bits += HEAD_DIM) {
            for (int i = 0; i < HEAD_DIM; i++)
                head[i] = bf16_to_float(bits[i]);
            turn_back(turn, head);
            for (uint32_t at = 0; at < HEAD_DIM; at += block, values += block)
                quantise_block(head + at, block, values, scales++);
        }
    }
    return true;
}

// ---- flags --------------------------------------------------------------------------------------

bool ctl_read_rope(const struct ctl_args *args, int base, struct einsum_client_rope *rope,
                   bool *given)
{
    *rope = (struct einsum_client_rope){0};
    *given = false;
    for (int flag = 0; flag < CTL_ROPE_FLAGS; flag++)
        *given = *given || ctl_has(args, base + flag);
    uint64_t original = 0, positions = 0;
    if (!ctl_real(args, base + CTL_ROPE_THETA, 1.0001, 1 << 30, &rope->theta) ||
        !ctl_real(args, base + CTL_ROPE_FACTOR, 1, 1 << 16, &rope->factor) ||
        !ctl_real(args, base + CTL_ROPE_FAST, 1e-3, 1e6, &rope->beta_fast) ||
        !ctl_real(args, base + CTL_ROPE_SLOW, 1e-3, 1e6, &rope->beta_slow) ||
        !ctl_number(args, base + CTL_ROPE_ORIGINAL, 1, 1 << 24, &original) ||
        !ctl_number(args, base + CTL_ROPE_POSITIONS, 1, 1 << 24, &positions))
        return false;
    rope->original_positions_max = (uint32_t)original;
    rope->positions_max = (uint32_t)positions;
    const char *cache = ctl_value(args, base + CTL_ROPE_CACHE);
    const char *tensor = ctl_value(args, base + CTL_ROPE_TENSOR);
    if (*given && !rope->theta == !cache) {
        ctl_usage_error("a rope is exactly one of --rope-theta and --rope-cache");
        return false;
    }
    if (rope->factor > 1 && !rope->original_positions_max) {
        ctl_usage_error("--rope-factor needs --rope-original");
        return false;
    }
    if ((cache && strlen(cache) >= sizeof rope->cache) ||
        (tensor && strlen(tensor) >= sizeof rope->cache_tensor)) {
        ctl_usage_error("--rope-cache and --rope-cache-tensor: names of at most %zu and %zu bytes",
                        sizeof rope->cache - 1, sizeof rope->cache_tensor - 1);
        return false;
    }
    strcpy(rope->cache, cache ? cache : "");
    strcpy(rope->cache_tensor, tensor ? tensor : "");
    return true;
}

// ---- random inputs ------------------------------------------------------------------------------

bool ctl_random_attention(const struct einsum_client_weight *weight, uint32_t tokens,
                          uint32_t positions_max, uint64_t seed, struct ctl_inputs *inputs)
{
    uint64_t values_n = (uint64_t)tokens * weight->groups * weight->reduced_dim;
    inputs->activations_bytes = values_n * sizeof(uint16_t);
    inputs->scales_bytes = tokens * sizeof(int64_t);
    inputs->activations = malloc(inputs->activations_bytes + 1);
    inputs->scales = malloc(inputs->scales_bytes + 1);
    if (!inputs->activations || !inputs->scales) {
        ctl_inputs_deinit(inputs);
        return false;
    }
    uint16_t *bits = (uint16_t *)(void *)inputs->activations;
    int64_t *positions = (int64_t *)(void *)inputs->scales;
    uint64_t state = seed;
    int head_exponent = 0;
    for (uint64_t i = 0; i < values_n; i++) {
        uint64_t random = ctl_random_next(&state);
        if (i % HEAD_DIM == 0)
            head_exponent = (int)(random >> 56) % 16 - 12;
        double uniform = (double)(int64_t)random * 0x1p-63; // -1 to 1
        bits[i] = bf16_from_double(ldexp(uniform * uniform * uniform, head_exponent));
    }
    for (uint32_t t = 0; t < tokens; t++)
        positions[t] =
            positions_max < 2 ? 0 : (int64_t)(1 + ctl_random_next(&state) % (positions_max - 1));
    return true;
}
