// Writes checkpoints of the shape of DeepSeek-V4's `wo_a` weights, with made-up values: for tests,
// benchmarks and a first try without a download.
//
//     directory/model-00001-of-00002.safetensors
//     directory/model-00002-of-00002.safetensors
//     directory/model.safetensors.index.json      written last: with it the checkpoint is complete
//
// Values follow from the seed and the layer's number alone: not from the number of shards, the
// number of layers or the prefix. Weights are roughly normal and never NaN; with activations of
// magnitude one, outputs are of magnitude one too. Single-threaded; keeps no state.
#pragma once

#include "../kernels/einsum.h"
#include "../server/status.h"

enum { CHECKPOINT_LAYERS_MAX = 4096, CHECKPOINT_SHARDS_MAX = 4096, CHECKPOINT_NAME_BYTES = 64 };

struct checkpoint_options {
    const char *directory; // made if missing; its parent must exist; files there are overwritten
    uint32_t layers;       // how many; named 0 to layers - 1
    uint32_t shards;       // files; 1 to layers
    uint64_t seed;
    const char *name_prefix;  // before "layers.": "" or "model."
    const char *scale_suffix; // after "wo_a.": "scale", "weight_scale_inv" or "weight_scale"

    // Each weight is stored 2-D as [groups * output_dim, reduced_dim], its scales as
    // [groups * output_dim / block_d, reduced_dim / block_r]. BF16 weights get none, whatever
    // scale_type and blocks say.
    struct einsum_weight_format format;

    // Called as writing proceeds; may be NULL. Returns false to give up (CANCELLED).
    bool (*progress)(void *context, uint64_t bytes_done, uint64_t bytes_total);
    void *progress_context;
};

// Fills in all but `directory` after a published model: "v4-flash", "v4-pro" or "v4.1-flash". One
// shard for every 8 layers. INVALID_ARGUMENT names the presets that there are. Overwrite any field
// afterwards, for instance `layers` to write only the first few.
NODISCARD enum status checkpoint_options_init(struct checkpoint_options *options,
                                              const char *preset, struct error *err);

// "v4-flash", "v4-pro", "v4.1-flash", then NULL.
const char *checkpoint_preset(size_t index);

// Bytes of all weights and scales, without headers.
uint64_t checkpoint_bytes(const struct checkpoint_options *options);

// INVALID_ARGUMENT names the option at fault. RESOURCE_EXHAUSTED if the disk is full, else
// FAILED_PRECONDITION, with the path and the system's reason. A failed call leaves no temporary
// file; finished shards stay, without an index.
NODISCARD enum status checkpoint_write(const struct checkpoint_options *options, struct error *err);
