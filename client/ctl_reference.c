// A thread takes one group at a time of a few rows of B after the other:
//
//     A of the group   [T, R] as doubles with sA multiplied in        shared, decoded first
//     one row of B     [R] as doubles with sB multiplied in           the thread's own
//     exact[t, g, d]   dot product, eight sums side by side
//
// E4M3 has 4 significant bits and a scale at most 24, so a decoded value times its scale is exact
// in a double; only products and sums round, as in the reference.

#include "ctl_reference.h"

#include "../kernels/fp8.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

enum { ROWS_AT_A_TIME = 32, THREADS_MAX = 64 };

struct work {
    const struct ctl_reference *reference;
    double *activations; // [groups, T, R], scaled
    _Atomic uint32_t next;
    uint32_t parts;
    _Atomic bool failed;
};

static double scale_at(enum einsum_scale_type type, const uint8_t *at)
{
    return type == EINSUM_SCALE_FP32 ? (double)fp32_load(at) : (double)ue8m0_to_float(*at);
}

static void decode_activations(const struct ctl_reference *reference, double *to)
{
    const struct einsum_operand *operand = reference->operand;
    uint32_t reduced_dim = reference->format->reduced_dim, block = reference->format->block_r;
    struct einsum_scale_strides strides = einsum_scale_strides(reference->format, operand);
    for (uint32_t g = 0; g < operand->groups; g++) {
        for (uint32_t t = 0; t < operand->tokens; t++) {
            const uint8_t *row =
                (const uint8_t *)operand->activations +
                einsum_activation_offset(operand->activation_layout, operand->tokens,
                                         operand->groups, reduced_dim, t, g);
            for (uint32_t r = 0; r < reduced_dim; r++) {
                uint32_t k = r / block;
                const uint8_t *scale = (const uint8_t *)operand->scales + t * strides.token +
                                       g * strides.group + k / 4 * strides.word +
                                       k % 4 * strides.byte;
                *to++ = (double)e4m3_to_float(row[r]) * scale_at(operand->scale_type, scale);
            }
        }
    }
}

// Row `d` of the weight's group `g`.
static void decode_row(const struct ctl_reference *reference, uint32_t g, uint32_t d, double *to)
{
    const struct einsum_weight_format *format = reference->format;
    uint64_t reduced_dim = format->reduced_dim;
    uint64_t row = ((uint64_t)g * format->output_dim + d) * reduced_dim;
    if (format->weight_type == EINSUM_WEIGHT_BF16) {
        const uint8_t *from = (const uint8_t *)reference->weight + 2 * row;
        for (uint64_t r = 0; r < reduced_dim; r++)
            to[r] = (double)bf16_to_float((uint16_t)(from[2 * r] | from[2 * r + 1] << 8));
        return;
    }
    const uint8_t *from = (const uint8_t *)reference->weight + row;
    uint64_t blocks = reduced_dim / format->block_r;
    uint64_t scale_row =
        ((uint64_t)g * (format->output_dim / format->block_d) + d / format->block_d) * blocks;
    uint32_t scale_bytes = einsum_scale_element_bytes(format->scale_type);
    const uint8_t *scales = (const uint8_t *)reference->weight_scales + scale_row * scale_bytes;
    for (uint64_t k = 0; k < blocks; k++) {
        double scale = scale_at(format->scale_type, scales + k * scale_bytes);
        for (uint64_t r = k * format->block_r; r < (k + 1) * format->block_r; r++)
            to[r] = (double)e4m3_to_float(from[r]) * scale;
    }
}

typedef double vector __attribute__((vector_size(32), aligned(8)));
typedef int64_t bits __attribute__((vector_size(32)));

// The compiler may not reorder a sum of doubles, so the sums side by side are written down.
static void dot(const double *a, const double *b, uint32_t n, double *exact, double *magnitude)
{
    const bits all_but_sign = {INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX};
    vector sum[2] = {{0}}, absolute[2] = {{0}};
    for (uint32_t r = 0; r < n; r += 8) {
        for (int i = 0; i < 2; i++) {
            vector product = *(const vector *)(a + r + 4 * i) * *(const vector *)(b + r + 4 * i);
            sum[i] += product;
            absolute[i] += (vector)((bits)product & all_but_sign);
        }
    }
    vector total = sum[0] + sum[1], all = absolute[0] + absolute[1];
    *exact = (total[0] + total[1]) + (total[2] + total[3]);
    *magnitude = (all[0] + all[1]) + (all[2] + all[3]);
}

// As einsum_reference_one's.
static double wgmma_loss(const double *a, const double *b, uint32_t n, uint32_t block)
{
    const bits all_but_sign = {INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX};
    double loss = 0, block_sum = 0;
    for (uint32_t step = 0; step < n; step += EINSUM_WGMMA_STEP) {
        vector sum = {0}, largest = {0};
        for (uint32_t r = step; r < step + EINSUM_WGMMA_STEP; r += 4) {
            vector product = *(const vector *)(a + r) * *(const vector *)(b + r);
            sum += product;
            bits absolute = (bits)product & all_but_sign, mask = (vector)absolute > largest;
            largest = (vector)((absolute & mask) | ((bits)largest & ~mask));
        }
        block_sum = step % block == 0 ? 0 : block_sum;
        double low = fmax(largest[0], largest[1]), high = fmax(largest[2], largest[3]);
        loss += einsum_wgmma_step_loss(fmax(fabs(block_sum), fmax(low, high)));
        block_sum += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    return loss;
}

static void compute_part(const struct work *work, uint32_t part, double *row)
{
    const struct ctl_reference *reference = work->reference;
    const struct einsum_operand *operand = reference->operand;
    uint32_t output_dim = reference->format->output_dim, n = reference->format->reduced_dim;
    uint32_t parts_of_group = (output_dim + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
    uint32_t g = part / parts_of_group, d = part % parts_of_group * ROWS_AT_A_TIME;
    uint32_t d_end = d + ROWS_AT_A_TIME < output_dim ? d + ROWS_AT_A_TIME : output_dim;
    const double *activations = work->activations + (uint64_t)g * operand->tokens * n;
    bool loses = reference->wgmma_loss && einsum_hopper_takes(reference->format);
    for (; d < d_end; d++) {
        decode_row(reference, operand->group_begin + g, d, row);
        for (uint32_t t = 0; t < operand->tokens; t++) {
            uint64_t at = ((uint64_t)t * operand->groups + g) * output_dim + d;
            const double *tokens_row = activations + (uint64_t)t * n;
            dot(tokens_row, row, n, &reference->exact[at], &reference->magnitude[at]);
            if (loses)
                reference->wgmma_loss[at] =
                    wgmma_loss(tokens_row, row, n, reference->format->block_r);
            else if (reference->wgmma_loss)
                reference->wgmma_loss[at] = 0;
        }
    }
}

static void *compute_parts(void *context)
{
    struct work *work = context;
    double *row = malloc(work->reference->format->reduced_dim * sizeof *row);
    if (!row) {
        atomic_store(&work->failed, true);
        return NULL;
    }
    for (;;) {
        uint32_t part = atomic_fetch_add(&work->next, 1);
        if (part >= work->parts)
            break;
        compute_part(work, part, row);
    }
    free(row);
    return NULL;
}

bool ctl_reference_compute(const struct ctl_reference *reference, unsigned threads)
{
    const struct einsum_operand *operand = reference->operand;
    const struct einsum_weight_format *format = reference->format;
    struct work work = {.reference = reference};
    work.parts = operand->groups * ((format->output_dim + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME);
    work.activations = malloc((uint64_t)operand->tokens * operand->groups * format->reduced_dim *
                              sizeof *work.activations);
    if (!work.activations)
        return false;
    decode_activations(reference, work.activations);
    if (threads == 0) {
        long cores = sysconf(_SC_NPROCESSORS_ONLN);
        threads = cores < 1 ? 1 : cores > THREADS_MAX ? THREADS_MAX : (unsigned)cores;
    }
    pthread_t others[THREADS_MAX];
    unsigned started = 0; // beside this one; fewer than asked for are fine
    while (started + 1 < threads && started < THREADS_MAX &&
           pthread_create(&others[started], NULL, compute_parts, &work) == 0)
        started++;
    compute_parts(&work);
    for (unsigned i = 0; i < started; i++)
        pthread_join(others[i], NULL);
    free(work.activations);
    return !atomic_load(&work.failed);
}
