// The table that travels with a batch: what the kernels read to learn which weights meet which
// tokens. Written on the host by table.c, read on the device by the kernels; plain data for both.
//
//     header | runs: one per weight, group range and token tile | maps | attention's spans | rows: one
//              decode's, prefill's, Hopper's, Hopper's many                                   per token
//
// Decode's work is a line of units, each 16 KiB of E4M3 weights: run after run, in a run tile after
// tile (group, rows of D), in a tile along R. Each worker, a thread block, takes an equal piece of
// the line, so that the device is filled whatever the shape; who shares a tile adds up in a fixed
// order (decode.cuh).
#pragma once

#include <stdint.h>

enum {
    CUDA_K_BLOCK = 128,        // of R: what all loops advance by
    CUDA_PANEL_ROWS = 16,      // of D: one fragment of mma
    CUDA_FRAGMENT_BYTES = 512, // 32 lanes of 16 bytes
    CUDA_DECODE_WARPS = 8,
    CUDA_DECODE_TOKENS_MAX = 64,
    CUDA_DECODE_PAIRS = 128,       // (K block, token): what comes at once of activations
    CUDA_DECODE_PAIRS_FEW = 64,    // the same of kernels for 8 tokens
    CUDA_PREFILL_ROWS = 128,       // of D in a tile
    CUDA_PREFILL_TOKENS = 64,      // in a tile
    CUDA_HOPPER_IDLE_FRACTION = 6, // of places that may be idle if tiles are dealt whole
    CUDA_MANY_ROWS = 128,          // of D in a tile of a weight for Hopper's many; of R as many
    CUDA_MANY_TILE_BYTES = CUDA_MANY_ROWS * CUDA_K_BLOCK, // of a weight
    CUDA_MANY_TOKENS = 256,                               // in a tile of a batch, or half as many
    CUDA_MANY_BOX = 64,                                   // of them in one copy
    CUDA_WIDE_ROWS = 32,          // rows of D that share a flag, see CUDA_NARROW_EXPONENT_MIN
    CUDA_SMEM_BYTES_MAX = 101376, // of a thread block on SM 12.0; kept everywhere
};

// Scales (and BF16 elements) whose magnitude is 0 or in [2^MIN, 2^(MAX+1)) are narrow: whatever
// narrow values meet, no product and no partial sum leaves the range of normal FP32. Tiles that
// meet any other value, NaN included, are computed again in FP64 (wide.cuh).
enum { CUDA_NARROW_EXPONENT_MIN = -50, CUDA_NARROW_EXPONENT_MAX = 45 };

// How a run's products are scaled.
enum cuda_mode {
    CUDA_MODE_UE8M0_128, // both scales UE8M0: the block-scaled mma
    CUDA_MODE_UE8M0_32,
    CUDA_MODE_FP32_128, // any FP32 scale: unit hardware scale, FP32 rescaling of each block's sum
    CUDA_MODE_FP32_32,
    CUDA_MODE_BF16, // BF16 weights
};

enum { CUDA_ROW_SCALES_FP32 = 1, CUDA_ROW_OUTPUT_FP32 = 2 };

// One token: where its tensors lie on the device, for the first group of its run.
struct cuda_row {
    uint64_t activations;                         // aligned to 16
    uint64_t scales;                              // aligned to their element
    uint64_t output;                              // aligned to 16
    uint32_t activation_group;                    // from group to group, in rows of R bytes
    uint32_t scale_group, scale_word, scale_byte; // see struct einsum_scale_strides
    uint32_t flags;                               // CUDA_ROW_*
    uint32_t map; // its segment's, in sizes of one from the table's start; 0: none
};

// A segment's activations as the device's copy engines know them: [groups][tokens][R] bytes.
struct cuda_map {
    uint64_t tensor[16]; // CUtensorMap
    uint32_t row_begin;  // of the segment
    uint32_t padding[31];
};

struct cuda_run {
    uint64_t elements, scales, wide; // of the weight, see struct cuda_weight
    uint32_t output_dim, reduced_dim;
    uint32_t group_begin, groups;
    uint32_t row_begin, rows; // its tokens
    uint32_t unit_begin;      // its first unit; prefill, Hopper's many: its first tile
    uint32_t tile_units;      // of one tile; prefill: 1; Hopper's many: tokens of one
    uint32_t tiles_d;         // tiles along D
    uint32_t warps_k_log2;    // decode: warps that share a panel of D, each with its part of R
    uint16_t mode;            // enum cuda_mode
    uint16_t block_d_log2;
    uint16_t scales_fp32; // of the weight
    // Hopper, the same in all its runs: whether thread blocks take tiles in turn; and how many take part.
    uint16_t whole_tiles;
    uint32_t workers;
    uint32_t tiles; // of the weight, in CUDA_MANY_TILE_BYTES behind elements
};

// Rows (token, group) of one segment, 2R bytes each, that attention.cu turns into activations.
struct cuda_attention {
    uint64_t rows;      // the first, aligned to 64
    uint64_t rotations; // one struct attention_rotation for each token
    uint32_t row_begin; // how many rows the spans before it have
    uint32_t groups;    // rows of a token
    uint32_t reduced_dim, block_r;
};

struct cuda_table {
    uint32_t decode_runs, decode_units, decode_workers;
    uint32_t prefill_runs, prefill_tiles;
    uint32_t hopper_runs, hopper_units;
    uint32_t many_runs, many_tiles;
    uint32_t rows_offset;                     // in bytes, from the table's start
    uint32_t attention_spans, attention_rows; // the spans end where the rows begin
    // Decode's runs, prefill's, Hopper's, its many's. The first ends with the first 128 bytes.
    struct cuda_run runs[];
};
