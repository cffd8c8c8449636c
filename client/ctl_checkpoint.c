// make-checkpoint: writes a checkpoint with made-up values, to try the daemon without a download.

#include "checkpoint.h"
#include "ctl.h"

enum { OPT_MODEL, OPT_LAYERS, OPT_SHARDS, OPT_SEED, OPT_PREFIX, OPT_SUFFIX, OPT_SCALE };

static const struct ctl_option options[] = {
    [OPT_MODEL] = {"model", "NAME", "v4-flash (default), v4-pro or v4.1-flash"},
    [OPT_LAYERS] = {"layers", "N", "write only so many; default the model's"},
    [OPT_SHARDS] = {"shards", "N", "files; default one for every 8 layers"},
    [OPT_SEED] = {"seed", "N", "of the values; default the model's preset"},
    [OPT_PREFIX] = {"name-prefix", "P", "before \"layers.\" in tensor names; default none"},
    [OPT_SUFFIX] = {"scale-suffix", "S",
                    "of the scale tensors: scale (default), weight_scale_inv or weight_scale"},
    [OPT_SCALE] = {"scale-type", "TYPE", "fp32 or ue8m0; default the model's"},
    {0},
};

static bool on_progress(void *context, uint64_t bytes_done, uint64_t bytes_total)
{
    char note[3 * CTL_TEXT_BYTES], done[CTL_TEXT_BYTES], total[CTL_TEXT_BYTES];
    snprintf(note, sizeof note, "%s of %s", ctl_bytes(bytes_done, done),
             ctl_bytes(bytes_total, total));
    ctl_progress_draw(context, bytes_done, bytes_total, note);
    return !ctl_interrupted();
}

// false: an option is wrong, and that was said.
static bool apply(const struct ctl_args *args, struct checkpoint_options *checkpoint)
{
    uint64_t layers = checkpoint->layers, shards = 0;
    int scale_type = (int)checkpoint->format.scale_type;
    if (!ctl_number(args, OPT_LAYERS, 1, CHECKPOINT_LAYERS_MAX, &layers) ||
        !ctl_number(args, OPT_SHARDS, 1, layers, &shards) ||
        !ctl_number(args, OPT_SEED, 0, UINT64_MAX, &checkpoint->seed) ||
        !ctl_word(args, OPT_SCALE, ctl_scale_types, &scale_type))
        return false;
    checkpoint->layers = (uint32_t)layers;
    checkpoint->shards = shards ? (uint32_t)shards : (uint32_t)((layers + 7) / 8);
    checkpoint->format.scale_type = (enum einsum_scale_type)scale_type;
    if (ctl_has(args, OPT_PREFIX))
        checkpoint->name_prefix = ctl_value(args, OPT_PREFIX);
    if (ctl_has(args, OPT_SUFFIX))
        checkpoint->scale_suffix = ctl_value(args, OPT_SUFFIX);
    return true;
}

static enum ctl_exit run_make_checkpoint(struct ctl *ctl, const struct ctl_args *args)
{
    struct checkpoint_options checkpoint;
    struct error err;
    const char *model = ctl_value(args, OPT_MODEL);
    if (checkpoint_options_init(&checkpoint, model ? model : "v4-flash", &err) != STATUS_OK)
        return ctl_fail_local(ctl, &err);
    if (!apply(args, &checkpoint))
        return CTL_USAGE;
    checkpoint.directory = args->operands[0];
    struct ctl_progress progress;
    ctl_progress_init(&progress, ctl, "writing");
    checkpoint.progress = on_progress;
    checkpoint.progress_context = &progress;
    ctl_catch_signals();
    uint64_t start_ns = now_ns();
    enum status status = checkpoint_write(&checkpoint, &err);
    ctl_progress_end(&progress);
    if (status != STATUS_OK)
        return ctl_fail_local(ctl, &err);
    uint64_t bytes = checkpoint_bytes(&checkpoint);
    if (ctl->json) {
        ctl_print_json(json_pack("{s:s, s:I, s:I, s:I}", "directory", checkpoint.directory,
                                 "layers", (json_int_t)checkpoint.layers, "shards",
                                 (json_int_t)checkpoint.shards, "bytes", (json_int_t)bytes));
    } else {
        char size[CTL_TEXT_BYTES], took[CTL_TEXT_BYTES];
        printf("%s: %u layers in %u files, %s, in %s\n", checkpoint.directory, checkpoint.layers,
               checkpoint.shards, ctl_bytes(bytes, size), ctl_duration(now_ns() - start_ns, took));
    }
    return CTL_OK;
}

const struct ctl_command ctl_command_make_checkpoint = {
    .name = "make-checkpoint",
    .operands = "DIR",
    .summary = "write a checkpoint with made-up values, to try without a download",
    .help =
        "Writes safetensors shards and an index of the shapes of a model's wo_a weights to DIR.\n"
        "Values follow from the seed and the layer alone. Needs no server.\n\n"
        "  einsumctl make-checkpoint --model v4-flash --layers 4 checkpoint\n"
        "  einsumctl make-checkpoint --model v4.1-flash --seed 7 --shards 8 /tmp/v41",
    .options = options,
    .operands_min = 1,
    .operands_max = 1,
    .run = run_make_checkpoint,
};
