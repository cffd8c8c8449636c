// weights: list, get, load and unload what is resident.

#include "ctl.h"
#include "ctl_attention.h"

#include <string.h>

enum { OPT_REPLACE, OPT_TENSORS, OPT_PREFIX, OPT_SUMS, OPT_RANK, OPT_SIZE, OPT_DIM, OPT_ROPE };

static const struct ctl_option options[] = {
    [OPT_REPLACE] = {"replace", NULL, "load: replace resident weights of the same names"},
    [OPT_TENSORS] = {"tensors", "PATTERN",
                     "load: shell pattern of tensor names, may be repeated; default "
                     "*.attn.wo_a.weight"},
    [OPT_PREFIX] = {"name-prefix", "P", "load: put before each name; default none"},
    [OPT_SUMS] = {"sha256sums", "FILE",
                  "load: on the server, as sha256sum writes it, of its files"},
    [OPT_RANK] = {"tp-rank", "N", "load: hold this rank's share of the groups; default 0"},
    [OPT_SIZE] = {"tp-size", "N", "load: of so many ranks; default 1"},
    [OPT_DIM] = {"output-dim", "D", "load: D of weights stored as [G*D, R]; default 1024"},
    CTL_OPTIONS_ROPE(OPT_ROPE, "load: ", "in place of theta, a .safetensors file on the server"),
    {0},
};

static void print_weight(const struct einsum_client_weight *weight)
{
    char bytes[CTL_TEXT_BYTES];
    bool bf16 = weight->weight_type == EINSUM_CLIENT_WEIGHT_BF16;
    printf("%-40s [%u, %u, %u] %s", weight->name, weight->groups, weight->output_dim,
           weight->reduced_dim, bf16 ? "bf16" : "e4m3");
    if (!bf16)
        printf(" %s scales of %ux%u",
               weight->scale_type == EINSUM_CLIENT_SCALE_UE8M0 ? "ue8m0" : "fp32", weight->block_d,
               weight->block_r);
    printf("  %s  %s", ctl_bytes(weight->resident_bytes, bytes), weight->source);
    if (weight->tensor_parallel_size > 1)
        printf("  rank %u of %u", weight->tensor_parallel_rank, weight->tensor_parallel_size);
    const struct einsum_client_rope *rope = &weight->rope;
    if (weight->has_rope && rope->cache[0])
        printf("  rope %s", rope->cache);
    else if (weight->has_rope)
        printf("  rope theta %g%s", rope->theta, rope->factor > 1 ? " yarn" : "");
    printf("\n");
}

static void print_weights(const struct ctl *ctl, const struct einsum_client_weights *weights)
{
    if (!ctl->json) {
        for (size_t i = 0; i < weights->items_n; i++)
            print_weight(&weights->items[i]);
        return;
    }
    json_t *list = json_array();
    for (size_t i = 0; i < weights->items_n; i++)
        json_array_append_new(list, ctl_weight_json(&weights->items[i]));
    ctl_print_json(json_pack("{s:o}", "weights", list));
}

static enum ctl_exit list(struct ctl *ctl)
{
    struct einsum_client_weights weights;
    struct einsum_client_error error;
    if (einsum_client_list_weights(ctl->client, &weights, &error) != EINSUM_CLIENT_OK)
        return ctl_fail(ctl, &error);
    print_weights(ctl, &weights);
    if (!ctl->json && weights.items_n == 0)
        printf("none\n");
    einsum_client_weights_deinit(&weights);
    return CTL_OK;
}

static enum ctl_exit get(struct ctl *ctl, const char *name)
{
    struct einsum_client_weight weight;
    struct einsum_client_error error;
    if (einsum_client_get_weight(ctl->client, name, &weight, &error) != EINSUM_CLIENT_OK)
        return ctl_fail(ctl, &error);
    if (ctl->json)
        ctl_print_json(ctl_weight_json(&weight));
    else
        print_weight(&weight);
    return CTL_OK;
}

// On the client's thread, the only one that draws meanwhile.
static bool on_progress(void *context, const struct einsum_client_progress *progress)
{
    char note[3 * CTL_TEXT_BYTES], done[CTL_TEXT_BYTES], total[CTL_TEXT_BYTES];
    snprintf(note, sizeof note, "%u of %u weights, %s of %s", progress->weights_done,
             progress->weights_total, ctl_bytes(progress->bytes_done, done),
             ctl_bytes(progress->bytes_total, total));
    ctl_progress_draw(context, progress->bytes_done, progress->bytes_total, note);
    return !ctl_interrupted();
}

static enum ctl_exit load(struct ctl *ctl, const struct ctl_args *args, const char *path)
{
    uint64_t rank = 0, size = 0, output_dim = 0;
    struct einsum_client_rope rope;
    bool has_rope;
    if (!ctl_read_rope(args, OPT_ROPE, &rope, &has_rope) ||
        !ctl_number(args, OPT_RANK, 0, UINT32_MAX, &rank) ||
        !ctl_number(args, OPT_SIZE, 1, UINT32_MAX, &size) ||
        !ctl_number(args, OPT_DIM, 1, UINT32_MAX, &output_dim))
        return CTL_USAGE;
    const char *tensors[CTL_GIVEN_MAX];
    struct ctl_progress progress;
    ctl_progress_init(&progress, ctl, "loading");
    struct einsum_client_load request = {
        .path = path,
        .tensors = tensors,
        .tensors_n = ctl_values(args, OPT_TENSORS, tensors),
        .name_prefix = ctl_value(args, OPT_PREFIX),
        .checksums = ctl_value(args, OPT_SUMS),
        .tensor_parallel_rank = (uint32_t)rank,
        .tensor_parallel_size = (uint32_t)size,
        .output_dim = (uint32_t)output_dim,
        .replace = ctl_has(args, OPT_REPLACE),
        .rope = has_rope ? &rope : NULL,
        .on_progress = on_progress,
        .context = &progress,
    };
    ctl_catch_signals();
    struct einsum_client_weights weights;
    struct einsum_client_error error;
    enum einsum_client_status status = einsum_client_load(ctl->client, &request, &weights, &error);
    ctl_progress_end(&progress);
    if (status != EINSUM_CLIENT_OK)
        return ctl_fail(ctl, &error);
    print_weights(ctl, &weights);
    einsum_client_weights_deinit(&weights);
    return CTL_OK;
}

static void on_unloaded(void *context, const char *name)
{
    if (context)
        json_array_append_new(context, json_string(name));
    else
        printf("%s\n", name);
}

static enum ctl_exit unload(struct ctl *ctl, const char *const *names, size_t names_n)
{
    json_t *gone = ctl->json ? json_array() : NULL;
    struct einsum_client_error error;
    if (einsum_client_unload(ctl->client, names, names_n, on_unloaded, gone, &error) !=
        EINSUM_CLIENT_OK) {
        json_decref(gone);
        return ctl_fail(ctl, &error);
    }
    if (ctl->json)
        ctl_print_json(json_pack("{s:o}", "unloaded", gone));
    return CTL_OK;
}

static enum ctl_exit run_weights(struct ctl *ctl, const struct ctl_args *args)
{
    const char *what = args->operands[0];
    int more = args->operands_n - 1;
    bool is_load = strcmp(what, "load") == 0;
    if (args->given_n > 0 && !is_load)
        return ctl_usage_error("--%s is of \"weights load\"", options[args->given[0].option].name);
    bool fits = (strcmp(what, "list") == 0 && more == 0) ||
                ((strcmp(what, "get") == 0 || is_load) && more == 1) ||
                (strcmp(what, "unload") == 0 && more >= 1);
    if (!fits)
        return ctl_usage_error("weights: list, get NAME, load PATH or unload NAME...");
    if (!ctl_connect(ctl, NULL))
        return CTL_USAGE;
    if (is_load)
        return load(ctl, args, args->operands[1]);
    if (strcmp(what, "get") == 0)
        return get(ctl, args->operands[1]);
    if (strcmp(what, "unload") == 0)
        return unload(ctl, args->operands + 1, (size_t)more);
    return list(ctl);
}

const struct ctl_command ctl_command_weights = {
    .name = "weights",
    .operands = "list | get NAME | load PATH | unload NAME...",
    .summary = "list, show, load and unload resident weights",
    .help =
        "list prints all resident weights; get prints one. load has the server read a "
        "checkpoint's\n"
        "folder or one .safetensors file under its weights_roots (PATH is the server's, absolute\n"
        "or relative to its first root): all or none become visible; interrupted, none. unload\n"
        "forgets weights by name or shell pattern; requests in flight finish with them. A rope is\n"
        "needed for OutputProject alone; without one given, the server's configuration has it.\n\n"
        "  einsumctl weights list\n"
        "  einsumctl weights get layers.3.attn.wo_a\n"
        "  einsumctl weights load DeepSeek-V4-Flash --tp-rank 1 --tp-size 4 --replace\n"
        "  einsumctl weights unload 'layers.*'",
    .options = options,
    .operands_min = 1,
    .operands_max = CTL_GIVEN_MAX,
    .run = run_weights,
};
