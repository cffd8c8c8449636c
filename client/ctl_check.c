// check: random activations, or attention, through the daemon, and every number of the replies
// against FP64.
//
//     checkpoint --catalog--> B, sB --reference--> exact, magnitude, what wgmma may lose
//                                                      |  every output
//     random A, sA --daemon--> output -----------------+--> error / tolerance, at most 1
//
// With --attention the random inputs are attention's output and positions; the reference's A and sA
// are what ctl_attention.c makes of them.
//
// What the kernel "hopper" may lose is allowed where it may have answered: where the server has it
// and no other was asked for. See Numerics in kernels/einsum.h.
//
// The layouts and types of requests go round from one case to the next, so that all of them are
// met.

#include "../kernels/fp8.h"
#include "../server/catalog.h"
#include "ctl.h"
#include "ctl_attention.h"
#include "ctl_reference.h"
#include "tensor_file.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    OPT_CHECKPOINT,
    OPT_TOKENS,
    OPT_WEIGHTS,
    OPT_REPEAT,
    OPT_SEED,
    OPT_PREFIX,
    OPT_TENSORS,
    OPT_KERNEL,
    OPT_ATTENTION,
    OPT_TRANSPORT,
    OPT_CHECKSUMS,
    OPT_ROPE
};
enum { TOKENS_MAX = 32, REPEAT_MAX = 10000 };

static const struct ctl_option options[] = {
    [OPT_CHECKPOINT] = {"checkpoint", "DIR", "what the server has loaded; required"},
    [OPT_TOKENS] = {"tokens", "LIST", "token counts to try; default 1,8,64"},
    [OPT_WEIGHTS] = {"weights", "N", "only the first so many; default all that are resident"},
    [OPT_REPEAT] = {"repeat", "N", "calls for each case, for the latency; default 5"},
    [OPT_SEED] = {"seed", "N", "of the activations; default 1"},
    [OPT_PREFIX] = {"name-prefix", "P", "with which the weights were loaded; default none"},
    [OPT_TENSORS] = {"tensors", "PATTERN", "of tensor names; default *.attn.wo_a.weight"},
    [OPT_KERNEL] = CTL_OPTION_KERNEL,
    [OPT_ATTENTION] = {"attention", NULL, "check OutputProject: BF16 attention and positions in"},
    [OPT_TRANSPORT] = CTL_OPTION_TRANSPORT,
    [OPT_CHECKSUMS] = CTL_OPTION_CHECKSUMS,
    CTL_OPTIONS_ROPE(OPT_ROPE, "with --attention, of all weights: ",
                     "in place of theta, .safetensors or .npy here"),
    {0},
};

struct check {
    struct ctl *ctl;
    const char *directory, *name_prefix, *tensors, *kernel;
    uint32_t tokens[TOKENS_MAX];
    size_t tokens_n;
    uint64_t repeat, seed;
    uint32_t cases, missed, skipped;
    json_t *results;
    struct ctl_progress progress;
    uint64_t done, total;
    bool attention;
    bool wgmma;           // what the kernel "hopper" may lose is allowed
    struct ctl_rope rope; // of all weights, if has_rope; else each has what the server says
    bool has_rope;
    struct tensor cache;

    // The checkpoint as of one tensor-parallel rank and output_dim, and one weight of it.
    struct roots roots;
    bool has_roots;
    struct catalog catalog;
    bool has_catalog;
    uint32_t rank, size, output_dim;
    uint8_t *weight, *scales;
};

struct check_case {
    const struct einsum_client_weight *weight;
    uint32_t tokens;
    struct einsum_client_request request;
    struct ctl_inputs inputs;
    struct ctl_rope rope; // of attention
    uint64_t outputs;
    uint64_t latency_ns; // the median
    double relative_error, worst_ratio;
    uint64_t worst_at;
};

// ---- the checkpoint -----------------------------------------------------------------------------

static void close_checkpoint(struct check *check)
{
    free(check->weight);
    free(check->scales);
    if (check->has_catalog)
        catalog_deinit(&check->catalog);
    if (check->has_roots)
        roots_deinit(&check->roots);
    check->weight = check->scales = NULL;
    check->has_catalog = check->has_roots = false;
}

// The checkpoint as the server took it for this weight.
static enum status open_catalog(struct check *check, const struct einsum_client_weight *weight,
                                struct error *err)
{
    if (check->has_catalog && check->rank == weight->tensor_parallel_rank &&
        check->size == weight->tensor_parallel_size && check->output_dim == weight->output_dim)
        return STATUS_OK;
    if (check->has_catalog)
        catalog_deinit(&check->catalog);
    check->has_catalog = false;
    if (!check->has_roots) {
        enum status status = roots_init(&check->roots, &check->directory, 1, err);
        if (status != STATUS_OK)
            return status;
        check->has_roots = true;
    }
    struct weights_load load = {
        .path = check->roots.paths[0],
        .tensors = &check->tensors,
        .tensors_n = check->tensors ? 1 : 0,
        .name_prefix = check->name_prefix,
        .tensor_parallel_rank = weight->tensor_parallel_rank,
        .tensor_parallel_size = weight->tensor_parallel_size,
        .output_dim = weight->output_dim,
    };
    enum status status = catalog_init(&check->catalog, &check->roots, EINSUM_DIM_MAX, &load, err);
    check->has_catalog = status == STATUS_OK;
    check->rank = weight->tensor_parallel_rank;
    check->size = weight->tensor_parallel_size;
    check->output_dim = weight->output_dim;
    return status;
}

static enum status read_slice(const struct tensor_slice *slice, uint8_t **to, struct error *err)
{
    free(*to);
    *to = malloc(slice->bytes + 1);
    if (!*to)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for a weight");
    return slice->bytes == 0 ? STATUS_OK
                             : safetensors_read(slice->file, slice->tensor, slice->offset, *to,
                                                slice->bytes, err);
}

// Reads what the checkpoint has of a resident weight. `*entry` is NULL if it has none.
static enum status read_weight(struct check *check, const struct einsum_client_weight *weight,
                               const struct catalog_entry **entry, struct error *err)
{
    *entry = NULL;
    enum status status = open_catalog(check, weight, err);
    for (uint32_t i = 0; status == STATUS_OK && i < check->catalog.entries_n; i++) {
        const struct catalog_entry *each = &check->catalog.entries[i];
        if (strcmp(each->name, weight->name) != 0)
            continue;
        *entry = each;
        status = read_slice(&each->weight, &check->weight, err);
        if (status == STATUS_OK)
            status = read_slice(&each->scales, &check->scales, err);
    }
    return status;
}

// ---- one case -----------------------------------------------------------------------------------

static double output_at(const struct check_case *each, uint64_t index)
{
    const uint8_t *output = each->request.output;
    if (each->request.output_type == EINSUM_CLIENT_OUTPUT_FP32)
        return (double)fp32_load(output + 4 * index);
    return (double)bf16_to_float((uint16_t)(output[2 * index] | output[2 * index + 1] << 8));
}

// Error over what is allowed: 0 where both are NaN or both the same infinity.
static double error_ratio(double got, double exact, double tolerance)
{
    if (isnan(exact) || isnan(got))
        return isnan(exact) && isnan(got) ? 0 : INFINITY;
    if (got == exact || isinf(tolerance))
        return 0;
    return tolerance > 0 ? fabs(got - exact) / tolerance : INFINITY;
}

static void compare(struct check_case *each, const struct ctl_reference *reference)
{
    const double *exact = reference->exact;
    double squares = 0, error_squares = 0;
    each->worst_ratio = 0;
    for (uint64_t i = 0; i < each->outputs; i++) {
        double got = output_at(each, i);
        double tolerance = einsum_tolerance(
            reference->operand->output_type, exact[i], reference->magnitude[i],
            reference->wgmma_loss ? reference->wgmma_loss[i] : 0, reference->format->reduced_dim);
        double ratio = error_ratio(got, exact[i], tolerance);
        if (ratio > each->worst_ratio) {
            each->worst_ratio = ratio;
            each->worst_at = i;
        }
        if (isfinite(got) && isfinite(exact[i])) {
            squares += exact[i] * exact[i];
            error_squares += (got - exact[i]) * (got - exact[i]);
        }
    }
    each->relative_error = squares > 0 ? sqrt(error_squares / squares) : sqrt(error_squares);
}

// By which rope attention is checked; false: it cannot be.
static bool rope_of(const struct check *check, const struct einsum_client_weight *weight,
                    struct ctl_rope *rope)
{
    *rope = check->rope;
    if (!check->has_rope)
        *rope = (struct ctl_rope){
            .theta = weight->rope.theta,
            .factor = weight->rope.factor,
            .original_positions_max = weight->rope.original_positions_max,
            .beta_fast = weight->rope.beta_fast,
            .beta_slow = weight->rope.beta_slow,
        };
    if (!rope->positions_max || rope->positions_max > weight->rope.positions_max)
        rope->positions_max = weight->rope.positions_max;
    return rope->table || rope->theta > 1;
}

static bool compare_with_reference(const struct check *check, const struct catalog_entry *entry,
                                   struct check_case *each)
{
    struct einsum_operand operand = {
        .tokens = each->tokens,
        .groups = entry->format.groups,
        .activation_layout = (enum einsum_activation_layout)(int)each->request.activation_layout,
        .scale_layout = (enum einsum_scale_layout)(int)each->request.scale_layout,
        .scale_type = (enum einsum_scale_type)(int)each->request.scale_type,
        .output_type = (enum einsum_output_type)(int)each->request.output_type,
        .activations = each->inputs.activations,
        .scales = each->inputs.scales,
    };
    struct ctl_inputs quantised = {0};
    if (check->attention) {
        if (!ctl_quantise_attention(&each->rope, each->weight, each->tokens, &each->inputs,
                                    &quantised))
            return false;
        operand.activation_layout = EINSUM_ACTIVATIONS_TGR;
        operand.scale_layout = EINSUM_SCALES_TGK;
        operand.scale_type = EINSUM_SCALE_UE8M0;
        operand.activations = quantised.activations;
        operand.scales = quantised.scales;
    }
    struct ctl_reference reference = {
        .format = &entry->format,
        .weight = check->weight,
        .weight_scales = check->scales,
        .operand = &operand,
        .exact = malloc(each->outputs * sizeof(double)),
        .magnitude = malloc(each->outputs * sizeof(double)),
        .wgmma_loss = check->wgmma ? malloc(each->outputs * sizeof(double)) : NULL,
    };
    bool good = reference.exact && reference.magnitude && !reference.wgmma_loss == !check->wgmma &&
                ctl_reference_compute(&reference, 0);
    if (good)
        compare(each, &reference);
    free(reference.exact);
    free(reference.magnitude);
    free(reference.wgmma_loss);
    ctl_inputs_deinit(&quantised);
    return good;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

// Calls the daemon `repeat` times; the last reply is the one that is compared.
static enum einsum_client_status call_daemon(const struct check *check, struct check_case *each,
                                             struct einsum_client_error *error)
{
    static uint64_t latencies[REPEAT_MAX];
    size_t n = 0;
    struct einsum_client_response response;
    for (; n < check->repeat && !ctl_interrupted(); n++) {
        // A number that is left over from the call before must not pass.
        memset(each->request.output, 0xff, each->request.output_bytes);
        enum einsum_client_status status =
            einsum_client_einsum(check->ctl->client, &each->request, &response, error);
        if (status != EINSUM_CLIENT_OK)
            return status;
        latencies[n] = response.latency_ns;
    }
    qsort(latencies, n, sizeof *latencies, by_value);
    each->latency_ns = n ? latencies[n / 2] : 0;
    return EINSUM_CLIENT_OK;
}

static void set_request(const struct check *check, struct check_case *each)
{
    const struct einsum_client_weight *weight = each->weight;
    unsigned turn = check->cases;
    bool packs = weight->block_r && weight->reduced_dim / weight->block_r % 4 == 0;
    struct einsum_client_request *request = &each->request;
    *request = (struct einsum_client_request){
        .operation = check->attention ? EINSUM_CLIENT_OUTPUT_PROJECT : EINSUM_CLIENT_EINSUM,
        .weight = weight->name,
        .recipe = weight->recipes_n ? weight->recipes[0] : EINSUM_CLIENT_RECIPE_1_128_128,
        .activation_layout =
            turn & 1 ? EINSUM_CLIENT_ACTIVATIONS_GTR : EINSUM_CLIENT_ACTIVATIONS_TGR,
        .scale_layout = turn >> 1 & 1 ? EINSUM_CLIENT_SCALES_GKT : EINSUM_CLIENT_SCALES_TGK,
        .scale_type =
            (turn ^ turn >> 2) & 1 && packs ? EINSUM_CLIENT_SCALE_UE8M0 : EINSUM_CLIENT_SCALE_FP32,
        .output_type = turn % 3 == 2 ? EINSUM_CLIENT_OUTPUT_FP32 : EINSUM_CLIENT_OUTPUT_BF16,
        .tokens = each->tokens,
        .kernel = check->kernel,
    };
    request->output_bytes =
        each->outputs * (request->output_type == EINSUM_CLIENT_OUTPUT_FP32 ? 4 : 2);
}

static void report_case(struct check *check, const struct check_case *each)
{
    const struct einsum_client_request *request = &each->request;
    bool passed = each->worst_ratio <= 1;
    double tokens_per_s =
        each->latency_ns ? (double)each->tokens * 1e9 / (double)each->latency_ns : 0;
    char layout[64];
    if (check->attention)
        snprintf(layout, sizeof layout, "attention > %s", ctl_output_types[request->output_type]);
    else
        snprintf(layout, sizeof layout, "%s %s %s > %s",
                 ctl_activation_layouts[request->activation_layout],
                 ctl_scale_layouts[request->scale_layout], ctl_scale_types[request->scale_type],
                 ctl_output_types[request->output_type]);
    check->cases++;
    check->missed += !passed;
    if (check->ctl->json) {
        json_array_append_new(
            check->results,
            json_pack("{s:s, s:I, s:s, s:b, s:I, s:I, s:o, s:o, s:o}", "weight", each->weight->name,
                      "tokens", (json_int_t)each->tokens, "layout", layout, "passed", passed,
                      "outputs_checked", (json_int_t)each->outputs, "latency_p50_ns",
                      (json_int_t)each->latency_ns, "tokens_per_s", ctl_real_json(tokens_per_s),
                      "relative_error", ctl_real_json(each->relative_error), "worst_error_ratio",
                      ctl_real_json(each->worst_ratio)));
        return;
    }
    ctl_progress_end(&check->progress);
    printf("%-6s %-28s %6u  %-24s %10.3f %12.0f  %10.3g %8.2g\n", passed ? "ok" : "WRONG",
           each->weight->name, each->tokens, layout, (double)each->latency_ns / 1e6, tokens_per_s,
           each->relative_error, each->worst_ratio);
    uint32_t dim = each->weight->output_dim, groups = each->weight->groups;
    if (!passed)
        printf("       the worst is output [%llu, %llu, %llu]\n",
               (unsigned long long)(each->worst_at / dim / groups),
               (unsigned long long)(each->worst_at / dim % groups),
               (unsigned long long)(each->worst_at % dim));
    fflush(stdout);
}

static enum ctl_exit run_case(struct check *check, const struct catalog_entry *entry,
                              struct check_case *each)
{
    static const struct error no_memory = {.status = STATUS_RESOURCE_EXHAUSTED,
                                           .text = "no memory for a case"};
    each->outputs = (uint64_t)each->tokens * each->weight->groups * each->weight->output_dim;
    set_request(check, each);
    uint64_t seed = check->seed + check->cases;
    if (!(check->attention
              ? ctl_random_attention(each->weight, each->tokens, each->rope.positions_max, seed,
                                     &each->inputs)
              : ctl_random_inputs(each->weight, each->tokens, each->request.scale_layout,
                                  each->request.scale_type, seed, &each->inputs)))
        return ctl_fail_local(check->ctl, &no_memory);
    ctl_inputs_lend(&each->inputs, &each->request);
    each->request.output = malloc(each->request.output_bytes + 1);

    enum ctl_exit code = CTL_OK;
    struct einsum_client_error error;
    bool memory = each->request.output != NULL;
    if (memory && call_daemon(check, each, &error) != EINSUM_CLIENT_OK) {
        code = ctl_fail(check->ctl, &error);
    } else if (memory && !ctl_interrupted()) {
        memory = compare_with_reference(check, entry, each);
        if (memory)
            report_case(check, each);
    }
    if (!memory)
        code = ctl_fail_local(check->ctl, &no_memory);
    free(each->request.output);
    ctl_inputs_deinit(&each->inputs);
    return code;
}

// ---- all cases ----------------------------------------------------------------------------------

static bool same_format(const struct einsum_client_weight *weight,
                        const struct einsum_weight_format *format)
{
    return weight->groups == format->groups && weight->output_dim == format->output_dim &&
           weight->reduced_dim == format->reduced_dim && weight->block_r == format->block_r;
}

static enum ctl_exit check_weight(struct check *check, const struct einsum_client_weight *weight)
{
    const struct catalog_entry *entry;
    struct error err;
    if (read_weight(check, weight, &entry, &err) != STATUS_OK)
        return ctl_fail_local(check->ctl, &err);
    if (!entry || !same_format(weight, &entry->format)) {
        ctl_progress_end(&check->progress);
        fprintf(stderr, "einsumctl: %s: %s %s, skipped\n", weight->name,
                entry ? "has another shape in" : "is not in", check->directory);
        check->skipped++;
        return CTL_OK;
    }
    struct ctl_rope rope = {0};
    bool takes = !check->attention || ctl_takes_attention(weight);
    if (!takes || (check->attention && !rope_of(check, weight, &rope))) {
        ctl_progress_end(&check->progress);
        fprintf(stderr, "einsumctl: %s: %s, skipped\n", weight->name,
                takes ? "its rope is a cache: give it by --rope-cache"
                      : "has no rope, or no whole heads");
        check->skipped++;
        return CTL_OK;
    }
    for (size_t i = 0; i < check->tokens_n && !ctl_interrupted(); i++) {
        char note[300];
        snprintf(note, sizeof note, "%s, %u tokens", weight->name, check->tokens[i]);
        ctl_progress_draw(&check->progress, check->done++, check->total, note);
        struct check_case each = {.weight = weight, .tokens = check->tokens[i], .rope = rope};
        enum ctl_exit code = run_case(check, entry, &each);
        if (code != CTL_OK)
            return code;
    }
    return CTL_OK;
}

static const char *tolerance_name(const struct check *check)
{
    return check->wgmma ? "wgmma sums" : "FP32 sums";
}

static enum ctl_exit summarize(struct check *check)
{
    bool passed = check->missed == 0 && check->cases > 0 && !ctl_interrupted();
    if (check->ctl->json)
        ctl_print_json(json_pack("{s:b, s:s, s:I, s:I, s:I, s:O}", "passed", passed, "tolerance",
                                 tolerance_name(check), "cases", (json_int_t)check->cases, "missed",
                                 (json_int_t)check->missed, "weights_skipped",
                                 (json_int_t)check->skipped, "results", check->results));
    else if (check->cases == 0)
        printf("nothing was checked\n");
    else
        printf("%s: %u of %u cases within the tolerance%s\n", passed ? "passed" : "FAILED",
               check->cases - check->missed, check->cases,
               ctl_interrupted() ? ", interrupted" : "");
    return passed ? CTL_OK : CTL_FAILED;
}

// Whether the kernel "hopper" may answer.
static enum einsum_client_status choose_tolerance(struct check *check,
                                                  struct einsum_client_error *error)
{
    static struct einsum_client_info info; // large
    enum einsum_client_status status = einsum_client_server_info(check->ctl->client, &info, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    bool asked = !check->kernel || !check->kernel[0] || strcmp(check->kernel, "hopper") == 0;
    for (uint32_t i = 0; i < info.kernels_n; i++)
        if (strcmp(info.kernels[i], "hopper") == 0)
            check->wgmma = asked;
    return EINSUM_CLIENT_OK;
}

static enum ctl_exit check_all(struct check *check, size_t weights_max)
{
    struct einsum_client_weights weights;
    struct einsum_client_error error;
    if (choose_tolerance(check, &error) != EINSUM_CLIENT_OK ||
        einsum_client_list_weights(check->ctl->client, &weights, &error) != EINSUM_CLIENT_OK)
        return ctl_fail(check->ctl, &error);
    size_t n = weights.items_n < weights_max ? weights.items_n : weights_max;
    check->total = n * check->tokens_n;
    ctl_progress_init(&check->progress, check->ctl, "checking");
    check->results = json_array();
    if (!check->ctl->json)
        printf("tolerance: %s\n       %-28s %6s  %-24s %10s %12s  %10s %8s\n",
               tolerance_name(check), "weight", "tokens", "activations scales > out", "p50 ms",
               "tokens/s", "rel. error", "of tol.");
    enum ctl_exit code = CTL_OK;
    for (size_t i = 0; i < n && code == CTL_OK && !ctl_interrupted(); i++)
        code = check_weight(check, &weights.items[i]);
    ctl_progress_end(&check->progress);
    if (code == CTL_OK)
        code = summarize(check);
    json_decref(check->results);
    einsum_client_weights_deinit(&weights);
    return code;
}

// The flags of a rope, and the cache that they name.
static enum ctl_exit read_rope(struct check *check, const struct ctl_args *args)
{
    struct einsum_client_rope given;
    if (!ctl_read_rope(args, OPT_ROPE, &given, &check->has_rope))
        return CTL_USAGE;
    if (check->has_rope && !check->attention)
        return ctl_usage_error("check: a rope is of --attention alone");
    check->rope = (struct ctl_rope){
        .theta = given.theta,
        .factor = given.factor,
        .original_positions_max = given.original_positions_max,
        .beta_fast = given.beta_fast > 0 ? given.beta_fast : 32,
        .beta_slow = given.beta_slow > 0 ? given.beta_slow : 1,
        .positions_max = given.positions_max,
    };
    if (!given.cache[0])
        return CTL_OK;
    const char *tensor = given.cache_tensor[0] ? given.cache_tensor : "cos_sin_cache";
    struct tensor *cache = &check->cache;
    struct error err;
    enum status status = tensor_read(given.cache, tensor, cache, &err);
    if (status == STATUS_OK &&
        (cache->kind != TENSOR_FP32 || cache->dims_n != 2 || cache->dims[1] != 64))
        status =
            error_set(&err, STATUS_FAILED_PRECONDITION,
                      "rope-cache: not FP32 [positions, 64], the file holds %s of %u dimensions",
                      cache->type, cache->dims_n);
    if (status != STATUS_OK)
        return ctl_fail_local(check->ctl, &err);
    check->rope.table = (const float *)(const void *)cache->data;
    if (!check->rope.positions_max || check->rope.positions_max > cache->dims[0])
        check->rope.positions_max = (uint32_t)cache->dims[0];
    return CTL_OK;
}

static enum ctl_exit run_check(struct ctl *ctl, const struct ctl_args *args)
{
    struct check check = {.ctl = ctl,
                          .directory = ctl_value(args, OPT_CHECKPOINT),
                          .name_prefix = ctl_value(args, OPT_PREFIX),
                          .tensors = ctl_value(args, OPT_TENSORS),
                          .attention = ctl_has(args, OPT_ATTENTION),
                          .kernel = ctl_value(args, OPT_KERNEL),
                          .repeat = 5,
                          .seed = 1};
    const char *tokens = ctl_value(args, OPT_TOKENS);
    uint64_t weights_max = SIZE_MAX;
    if (!check.directory)
        return ctl_usage_error("check: --checkpoint DIR is required");
    check.name_prefix = check.name_prefix ? check.name_prefix : "";
    check.tokens_n = ctl_number_list("tokens", tokens ? tokens : "1,8,64", 1, EINSUM_TOKENS_MAX,
                                     check.tokens, TOKENS_MAX);
    struct einsum_client_options client;
    ctl_client_options(ctl, &client);
    client.checksums = ctl_has(args, OPT_CHECKSUMS);
    if (check.tokens_n == 0 || !ctl_number(args, OPT_WEIGHTS, 1, SIZE_MAX, &weights_max) ||
        !ctl_number(args, OPT_REPEAT, 1, REPEAT_MAX, &check.repeat) ||
        !ctl_number(args, OPT_SEED, 0, UINT64_MAX, &check.seed) ||
        !ctl_transport(args, OPT_TRANSPORT, &client) || !ctl_connect(ctl, &client))
        return CTL_USAGE;
    ctl_catch_signals();
    enum ctl_exit code = read_rope(&check, args);
    if (code == CTL_OK)
        code = check_all(&check, (size_t)weights_max);
    close_checkpoint(&check);
    tensor_deinit(&check.cache);
    return code;
}

const struct ctl_command ctl_command_check = {
    .name = "check",
    .operands = "",
    .summary = "compare every number of the replies with FP64 from the checkpoint",
    .help =
        "Sends random activations to every resident weight and compares every output with an FP64\n"
        "reference computed here from the checkpoint's own bytes. Layouts and types go round from\n"
        "case to case. Prints for each: the median latency, tokens a second, the error relative "
        "to\n"
        "the outputs' norm, and the worst error in units of what is allowed (at most 1 passes).\n"
        "Allowed is an FP32 sum's error, or a wgmma sum's where the server has the kernel\n"
        "\"hopper\" and --kernel names no other; the first line says which.\n"
        "Exits 1 on any miss. With --attention it sends attention's output and positions, rotates\n"
        "and quantises here as well, by the rope that the flags give or else the server names.\n\n"
        "  einsumctl check --checkpoint checkpoint --tokens 1,8,64\n"
        "  einsumctl check --checkpoint checkpoint --attention --rope-theta 10000",
    .options = options,
    .run = run_check,
};
