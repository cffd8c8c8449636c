// The CPU kernels: AVX2 and portable, chosen at run time. Called by server/engine_cpu.c from its
// worker threads.
//
// A weight is re-laid once, at load, so that every kernel reads it in one forward pass: sixteen
// outputs beside each other, a panel, and E4M3 in pairs of rows, [G][D/16][R/2][16][2]. Work is cut
// into items (a group and a range of D), which threads take in any order; an item handles every
// token of every operand that uses its group, so that a weight is read once however many requests
// share it.
#pragma once

#include "../einsum.h"

struct cpu_kernel; // one implementation; static, never freed

// All compiled in, best first, NULL-terminated: "avx2-subnormal", "avx2", "portable". The first is
// for CPUs that multiply subnormal numbers at full speed (AMD since Zen), which it tries out.
const struct cpu_kernel *const *cpu_kernels(void);
bool cpu_kernel_supported(const struct cpu_kernel *kernel); // by the CPU that runs this
const char *cpu_kernel_name(const struct cpu_kernel *kernel);
// The kernel of that name, or the best supported one for NULL; NULL if there is none or the CPU
// lacks it.
const struct cpu_kernel *cpu_kernel_find(const char *name);

// A resident weight. `memory` has cpu_weight_bytes() bytes, aligned to 64, and belongs to the
// caller.
struct cpu_weight {
    struct einsum_weight_format format;
    void *memory;
    uint8_t *elements; // [G][D/16][R/2][16][2] E4M3, or [G][D/16][R][16] BF16
    // Exact as FP32 (2^-127 is a subnormal one): [G][D/block_d][K], or [G][D/16][K][16] where every
    // output has its own; NULL for BF16.
    float *scales;
    // [G][D/16] each: 1 where FP32 would not do for a panel's elements (a NaN; for BF16 a magnitude
    // outside CPU_NARROW) or for its scales. Such panels are computed in FP64. Two arrays, since
    // elements and scales may be taken by different threads.
    uint8_t *elements_wide;
    uint8_t *scales_wide;
};

// Scales (and BF16 elements) whose magnitude is 0 or in [2^MIN, 2^(MAX+1)) are narrow. Whatever
// narrow values meet, no product and no partial sum leaves the range of normal FP32:
//     below  2 * -50 - 18      = -118    two E4M3 of 2^-9
//     above  2 * 46 + 18 + 16  =  126    two E4M3 under 2^9, 2^16 of them
// NaN counts as narrow: it spreads by itself. Infinity does not, since 0 * infinity would have to
// be met element by element.
enum { CPU_NARROW_EXPONENT_MIN = -50, CPU_NARROW_EXPONENT_MAX = 45 };

uint64_t cpu_weight_bytes(const struct einsum_weight_format *format);

// Lays out `memory`, fills in every pointer and clears the flags. The contents come from
// cpu_relayout and cpu_relayout_scales.
void cpu_weight_init(struct cpu_weight *weight, const struct einsum_weight_format *format,
                     void *memory);

// Re-lays rows [row_begin, row_begin + rows) of the checkpoint's [G*D, R] matrix, read from
// `source` (which points at row row_begin; rows and row_begin multiples of 16). Different ranges
// may run on different threads.
void cpu_relayout(struct cpu_weight *weight, const void *source, uint64_t row_begin, uint64_t rows);

// Takes the checkpoint's scales whole. Once, on one thread, before the first use. NULL for BF16
// weights.
void cpu_relayout_scales(struct cpu_weight *weight, const void *source);

// Everything of one batch that uses one weight.
struct cpu_task {
    const struct cpu_weight *weight;
    const struct einsum_operand *operands;
    uint32_t operands_n;
};

// How many items a task is cut into, for `threads` threads to balance; 0 if there are no tokens.
uint32_t cpu_task_items(const struct cpu_task *task, uint32_t threads);

// Bytes of scratch that one thread needs, for weights up to this R, whatever the task; aligned
// to 64.
uint64_t cpu_scratch_bytes(uint32_t reduced_dim);

// Computes item `item` of `items` = cpu_task_items(...): writes those outputs of every operand.
void cpu_task_run(const struct cpu_kernel *kernel, const struct cpu_task *task, uint32_t item,
                  uint32_t items, void *scratch);
