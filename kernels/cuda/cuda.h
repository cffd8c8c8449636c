// The CUDA kernels: resident weights, the table of a batch, and launches that a graph can capture.
// Called by the CUDA engine; plain C. Needs a device of compute capability 8.9 or newer.
//
// Once per weight:  cuda_weight_bytes, cuda_weight_init, cuda_relayout (chunk by chunk),
//                   cuda_relayout_scales
// Once per bucket:  cuda_bucket_init, then cuda_launch on a capturing stream
// Per batch:        cuda_table_build into pinned memory, copy it to the device, replay
//
// A captured launch serves any mix of weights, layouts and types, since all that differs lies in the
// table. Launches that can overlap (cuda_launch) need a workspace each, and outputs of their own.
#pragma once

#include <cuda_runtime_api.h>

#include "../einsum.h"
#include "table.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- which kernel, and why (dispatch.c); needs no device

// What computes a segment. Names are those of ServerInfo and of a request's `kernel`.
enum cuda_kernel {
    CUDA_KERNEL_AUTO,    // by the tokens that share a reading of the weight
    CUDA_KERNEL_DECODE,  // "decode"
    CUDA_KERNEL_PREFILL, // "prefill"
    CUDA_KERNEL_HOPPER,  // "hopper": capability 9.0 only
    // "hopper" as well, for many tokens of a weight that also lies in tiles. Asked for by no name.
    CUDA_KERNEL_HOPPER_MANY,
};

enum cuda_arm {
    CUDA_ARM_NONE,         // refused: see the reason
    CUDA_ARM_BLOCK_SCALED, // SM 12.0 and 12.1: mma with UE8M0 scales in hardware
    CUDA_ARM_PORTABLE,     // the same kernels, scales applied in FP32
    CUDA_ARM_HOPPER,       // SM 9.0: the portable kernels, and wgmma for many tokens
};

struct cuda_choice {
    enum cuda_arm arm;
    enum cuda_kernel kernel; // these two not for CUDA_ARM_NONE
    enum cuda_mode mode;
    const char *name;   // "sm120-decode", "portable-prefill", "hopper", ..., or "none"
    const char *reason; // a sentence without its full stop
};

// What one weight with `tokens` tokens takes on a device of capability `major`.`minor`. `forced` is
// "auto", NULL, "sm120", "portable" or "hopper".
struct cuda_choice cuda_dispatch(int major, int minor, const struct einsum_weight_format *format,
                                 enum einsum_scale_type activation_scale_type, uint64_t tokens,
                                 const char *forced);

// By the number of tokens that share a reading of a weight. `hopper_from`: UINT32_MAX without its arm.
enum cuda_kernel cuda_kernel_for(const struct einsum_weight_format *format, uint64_t tokens,
                                 uint32_t prefill_from, uint32_t hopper_from);

enum cuda_mode cuda_mode_of(const struct einsum_weight_format *format,
                            enum einsum_scale_type activation_scale_type);

// Tokens of one weight from which prefill's tiles are faster than decode's streaming.
enum { CUDA_PREFILL_TOKENS_MIN = 65 };
// The same for Hopper's arm, and all others.
enum { CUDA_HOPPER_TOKENS_MIN = 17 };
// Tokens from which it takes a weight's tiles, if these are enough for the device, and from which it does so
// anyhow. In buckets of up to 64 tokens those of a single request take them whenever they take the arm.
enum {
    CUDA_HOPPER_MANY_TOKENS_MIN = 33,
    CUDA_HOPPER_MANY_TOKENS_ANYHOW = 129,
};

// ---- weights (relayout.cu)

struct cuda_weight {
    struct einsum_weight_format format;
    void *memory;
    uint8_t *elements; // [G][D/16][R/32] fragments of 32 lanes x 16 bytes; BF16: [R/16]
    uint8_t *tiles;    // the same once more, [G][D/128][R/128] tiles of hopper_many.cu; or NULL
    void *scales;      // [G * D/block_d][K]; UE8M0 padded to words of four
    uint8_t *wide;     // [G * D/32]: 1 where an element or a scale is not narrow
};

// `many`: whether there is a bucket with cuda_bucket_has_many. Weights that it takes lie twice then.
uint64_t cuda_weight_bytes(const struct einsum_weight_format *format, bool many);

// `memory`: cuda_weight_bytes() bytes on the device, aligned to 256, the caller's. Clears the flags on `stream`.
cudaError_t cuda_weight_init(struct cuda_weight *weight, const struct einsum_weight_format *format,
                             bool many, void *memory, cudaStream_t stream);

// Re-lays rows [row_begin, row_begin + rows) of the checkpoint's [G*D, R] matrix, multiples of 16,
// from `staging` (device memory, aligned to 16, which holds these rows alone).
cudaError_t cuda_relayout(const struct cuda_weight *weight, const void *staging, uint64_t row_begin,
                          uint64_t rows, cudaStream_t stream);

// Takes the checkpoint's scales whole from device memory aligned to 4. Nothing to do for BF16.
cudaError_t cuda_relayout_scales(const struct cuda_weight *weight, const void *staging,
                                 cudaStream_t stream);

// ---- a batch's table (table.c); needs no device

// One request: a weight and its operand, whose pointers are device addresses: activations and
// outputs aligned to 16, scales to 4; with rotations, activations to 64 and rotations to 16.
struct cuda_segment {
    const struct cuda_weight *weight;
    struct einsum_operand operand;
    enum cuda_kernel kernel; // forced; segments that differ in it never share a reading
};

// Fills in `tensor` for a segment, whose rows are given. False where the device cannot have it so.
typedef bool cuda_map_maker(struct cuda_map *map, const struct cuda_row *rows, uint32_t tokens,
                            uint32_t groups, uint32_t reduced_dim);

struct cuda_bucket {
    uint32_t tokens_max;
    uint32_t decode_tokens;  // of one run: 8, 16, 32 or 64
    uint32_t decode_workers; // thread blocks that the device holds at once
    uint32_t prefill_blocks;
    uint32_t prefill_from;               // tokens of one weight from which they go to prefill
    uint32_t hopper_rows, hopper_tokens; // of a tile
    uint32_t hopper_warps_k;             // if not 0, Hopper's tiles are cut as decode's
    uint32_t hopper_workers;             // 0: the device is no Hopper
    uint32_t hopper_from;                // the same for what Hopper's arm takes; UINT32_MAX: never
    uint32_t many_rows, many_tokens;     // of a tile of Hopper's many, at most
    uint32_t many_from;                  // tokens of one weight that take its tiles
    uint32_t many_blocks, many_cluster;  // how many, and of how many that share tokens; 0: never
    cuda_map_maker *many_map;            // NULL: activations go row by row
    uint32_t attention_blocks;           // of a launch with attention
};

// Bytes of a table in the worst case, and what of them a built one uses.
uint64_t cuda_table_bytes(const struct cuda_bucket *bucket, uint32_t segments_max);
uint64_t cuda_table_used(const struct cuda_table *table);

// Orders the segments by weight and cuts them into runs. `order` is scratch for segments_n
// numbers. Up to bucket->tokens_max tokens.
void cuda_table_build(const struct cuda_bucket *bucket, const struct cuda_segment *segments,
                      uint32_t segments_n, uint32_t *order, struct cuda_table *table);

// ---- launches (launch.c)

// Which kernels and how many blocks; asks the current device. `hopper`: whether its arm may be used.
cudaError_t cuda_bucket_init(struct cuda_bucket *bucket, uint32_t tokens_max, bool hopper);

// Whether the bucket's tables can name weights' tiles.
bool cuda_bucket_has_many(const struct cuda_bucket *bucket);
// Whether so many tokens of some groups of a weight that lies in tiles are computed from these.
bool cuda_bucket_takes_many(const struct cuda_bucket *bucket,
                            const struct einsum_weight_format *format, uint32_t groups,
                            uint64_t tokens);

// Scratch of a launch: zero before the first, left ready for the next.
uint64_t cuda_workspace_bytes(const struct cuda_bucket *bucket);

// The kernels of a launch, or'ed together: a graph is captured for each set that a table may need.
enum cuda_launch {
    CUDA_LAUNCH_ATTENTION = 1,
    CUDA_LAUNCH_DECODE_UE8M0 = 2, // all of its runs are of CUDA_MODE_UE8M0_128
    CUDA_LAUNCH_DECODE_FP32 = 4,  // of CUDA_MODE_FP32_128
    CUDA_LAUNCH_DECODE = 6,       // of any
    CUDA_LAUNCH_PREFILL = 8,
    CUDA_LAUNCH_HOPPER = 16,
    CUDA_LAUNCH_HOPPER_MANY = 32,
    CUDA_LAUNCH_SETS = 64, // how many there are
    // Beside them: the kernel ahead writes the table or the activations, so none overlaps it.
    CUDA_LAUNCH_WRITTEN = 64,
};

// What a table needs; and whether a bucket's tables can ever need `launches`.
uint32_t cuda_table_launches(const struct cuda_table *table);
bool cuda_bucket_can_launch(const struct cuda_bucket *bucket, uint32_t launches);

// Computes what is in `table` (device memory) for these kernels. They are launched with programmatic
// stream serialization and end after the kernel ahead in the stream, but wait for it in nothing else:
// table, weights, activations and scales must be in place when that kernel starts, and it must not
// read the outputs; nor, if it does not wait either, the one ahead of it, and so on. Where attention is
// among them, its kernel goes first and overlaps with none before or after it.
cudaError_t cuda_launch(const struct cuda_bucket *bucket, uint32_t launches,
                        const struct cuda_table *table, void *workspace, cudaStream_t stream);

// ---- the ends of a batch's graph (fetch.cu)

// One order for each thread block that fetches, all alike: a word of host memory that several
// blocks ask for goes to one after the other, a microsecond each.
enum {
    CUDA_ORDERS = 32,
    CUDA_FETCH_BYTES = 512, // by a warp at once
    CUDA_WARM_BYTES = 4096,
    CUDA_FETCH_WARPS = 256, // each takes every so manieth of the pieces
    CUDA_PIECES_EARLY = 64, // which are looked at before it is known whether there are any
};

// Bytes that lie in host memory by themselves, to be fetched by one warp. A sector for each, since
// sectors that several warps ask for go to one after the other, too.
struct cuda_piece {
    uint64_t from, to; // device addresses, the first of host memory; aligned to 16
    uint32_t bytes;    // rounded up to 16, from memory that goes as far
    uint32_t padding[3];
};

// What the host asks of one launch. Pinned; written before the launch, left alone until the report.
struct cuda_order {
    uint64_t input_from, input_to;     // device addresses, the first of host memory; aligned to 16
    uint64_t table_bytes, input_bytes; // multiples of CUDA_FETCH_BYTES; of 16
    uint64_t sequence;                 // to be reported, different from the last one
    // Weights that the kernels will read: `warm_pieces` of CUDA_WARM_BYTES, each so many bytes
    // behind the one before, brought to the cache meanwhile. Aligned to 16.
    uint64_t warm_from;
    uint32_t warm_pieces, warm_step_bytes;
    uint32_t pieces, padding; // how many are to be fetched, beside the input
};

// What the device says of it. Pinned, a cache line of its own. Times are the device's, in ns.
struct cuda_report {
    uint64_t begun_ns, fetched_ns, computed_ns;
    uint64_t sequence; // written last: with it, all that the launch wrote is visible to the host
    uint64_t padding[4];
};

// Both ends' arguments, device addresses. All but `table` are of host memory.
struct cuda_ends {
    const struct cuda_order *orders;     // CUDA_ORDERS of them
    const struct cuda_table *table_host; // aligned to 16, as `table` is
    const struct cuda_piece *pieces;     // at least CUDA_PIECES_EARLY of them
    struct cuda_table *table;
    struct cuda_report *report;
};

// First in a graph: copies the table, and what the order names. Before CUDA_LAUNCH_WRITTEN.
// Warming it only begins; nothing waits for it, and where the device cannot, nothing is warmed.
cudaError_t cuda_fetch_launch(const struct cuda_ends *ends, cudaStream_t stream);

// Last in a graph: waits for all ahead and reports.
cudaError_t cuda_report_launch(const struct cuda_ends *ends, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
