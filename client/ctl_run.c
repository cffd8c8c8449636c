// run: one projection of tensors from files, or of random ones, with the result to a file.

#include "../kernels/einsum.h"
#include "ctl.h"
#include "tensor_file.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

enum {
    OPT_WEIGHT,
    OPT_ACTIVATIONS,
    OPT_SCALES,
    OPT_ATTENTION,
    OPT_POSITIONS,
    OPT_RANDOM,
    OPT_SEED,
    OPT_RECIPE,
    OPT_ACTIVATION_LAYOUT,
    OPT_SCALE_LAYOUT,
    OPT_SCALE_TYPE,
    OPT_OUTPUT_TYPE,
    OPT_TOKENS,
    OPT_OUTPUT,
    OPT_DIGEST,
    OPT_KERNEL,
    OPT_CHECKSUMS,
};

static const struct ctl_option options[] = {
    [OPT_WEIGHT] = {"weight", "NAME", "a resident weight; required"},
    [OPT_ACTIVATIONS] = {"activations", "FILE", ".npy or .safetensors[:TENSOR (activations)]"},
    [OPT_SCALES] = {"scales", "FILE", ".npy or .safetensors[:TENSOR (scales)]"},
    [OPT_ATTENTION] = {"attention", "FILE",
                       "in place of both: BF16 [T, heads, 512], in .npy as uint16"},
    [OPT_POSITIONS] = {"positions", "FILE", "with --attention: int64 [T]"},
    [OPT_RANDOM] = {"random", "TOKENS", "random tensors in place of files"},
    [OPT_SEED] = {"seed", "N", "of the random tensors; default 1"},
    [OPT_RECIPE] = {"recipe", "R",
                    "1,128,128 1,1,128 1,32,32 or 1,1,32; default the weight's first"},
    [OPT_ACTIVATION_LAYOUT] = {"activation-layout", "L", "tgr or gtr; required with files"},
    [OPT_SCALE_LAYOUT] = {"scale-layout", "L", "tgk or gkt; required with files"},
    [OPT_SCALE_TYPE] = {"scale-type", "T", "fp32 or ue8m0; required with files"},
    [OPT_OUTPUT_TYPE] = {"output-type", "T", "bf16 (default) or fp32"},
    [OPT_TOKENS] = {"tokens", "N", "needed if the activations' file is not 3-D"},
    [OPT_OUTPUT] = {"output", "FILE", "write [T, G, D] as .npy (BF16 as uint16) or .safetensors"},
    [OPT_DIGEST] = {"digest", NULL, "ask for a digest in place of the output"},
    [OPT_KERNEL] = CTL_OPTION_KERNEL,
    [OPT_CHECKSUMS] = CTL_OPTION_CHECKSUMS,
    {0},
};

struct run {
    struct ctl *ctl;
    const struct ctl_args *args;
    struct einsum_client_weight weight;
    struct einsum_client_request request;
    struct tensor activations, scales; // or attention and positions
    struct ctl_inputs random;
    void *output;
};

// ---- the request --------------------------------------------------------------------------------

// Nothing but these may be said of attention: the weight says the rest.
static bool read_words_of_attention(struct run *run)
{
    static const int others[] = {
        OPT_ACTIVATIONS,       OPT_SCALES,       OPT_RANDOM,     OPT_RECIPE,
        OPT_ACTIVATION_LAYOUT, OPT_SCALE_LAYOUT, OPT_SCALE_TYPE, OPT_TOKENS};
    for (size_t i = 0; i < ARRAY_LEN(others); i++) {
        if (ctl_has(run->args, others[i])) {
            ctl_usage_error("run: --%s is not for --attention", options[others[i]].name);
            return false;
        }
    }
    int output = 1;
    if (!ctl_word(run->args, OPT_OUTPUT_TYPE, ctl_output_types, &output))
        return false;
    run->request.operation = EINSUM_CLIENT_OUTPUT_PROJECT;
    run->request.output_type = (enum einsum_client_output_type)output;
    run->request.digest_only = ctl_has(run->args, OPT_DIGEST);
    run->request.kernel = ctl_value(run->args, OPT_KERNEL);
    return true;
}

static bool read_words(struct run *run)
{
    const struct ctl_args *args = run->args;
    struct einsum_client_request *request = &run->request;
    bool files = !ctl_has(args, OPT_RANDOM);
    int recipe = run->weight.recipes_n ? (int)run->weight.recipes[0] : 1;
    int activations = files ? 0 : 1, scales = files ? 0 : 1, scale_type = files ? 0 : 2, output = 1;
    if (!ctl_word(args, OPT_RECIPE, ctl_recipes, &recipe) ||
        !ctl_word(args, OPT_ACTIVATION_LAYOUT, ctl_activation_layouts, &activations) ||
        !ctl_word(args, OPT_SCALE_LAYOUT, ctl_scale_layouts, &scales) ||
        !ctl_word(args, OPT_SCALE_TYPE, ctl_scale_types, &scale_type) ||
        !ctl_word(args, OPT_OUTPUT_TYPE, ctl_output_types, &output))
        return false;
    if (!activations || !scales || !scale_type) {
        ctl_usage_error("run: files do not tell their layout: --activation-layout, --scale-layout "
                        "and --scale-type are required");
        return false;
    }
    request->recipe = (enum einsum_client_recipe)recipe;
    request->activation_layout = (enum einsum_client_activation_layout)activations;
    request->scale_layout = (enum einsum_client_scale_layout)scales;
    request->scale_type = (enum einsum_client_scale_type)scale_type;
    request->output_type = (enum einsum_client_output_type)output;
    request->digest_only = ctl_has(args, OPT_DIGEST);
    request->kernel = ctl_value(args, OPT_KERNEL);
    return true;
}

static enum ctl_exit make_random(struct run *run)
{
    uint64_t tokens = 0, seed = 1;
    if (!ctl_number(run->args, OPT_RANDOM, 1, EINSUM_TOKENS_MAX, &tokens) ||
        !ctl_number(run->args, OPT_SEED, 0, UINT64_MAX, &seed))
        return CTL_USAGE;
    run->request.tokens = (uint32_t)tokens;
    if (!ctl_random_inputs(&run->weight, run->request.tokens, run->request.scale_layout,
                           run->request.scale_type, seed, &run->random)) {
        const struct error none = {.status = STATUS_RESOURCE_EXHAUSTED, .text = "no memory"};
        return ctl_fail_local(run->ctl, &none);
    }
    ctl_inputs_lend(&run->random, &run->request);
    return CTL_OK;
}

// What a file holds must be what the flags say; the server then checks the sizes.
static enum status check_types(const struct run *run, struct error *err)
{
    const struct tensor *scales = &run->scales;
    if (run->activations.kind != TENSOR_BYTES)
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "activations: E4M3 is one byte an element, the file holds %s",
                         run->activations.type);
    bool fp32 = run->request.scale_type == EINSUM_CLIENT_SCALE_FP32;
    bool words = run->request.scale_layout == EINSUM_CLIENT_SCALES_GKT &&
                 scales->element_bytes == 4 && scales->kind != TENSOR_FP32;
    if (fp32 ? scales->kind != TENSOR_FP32 : scales->kind != TENSOR_BYTES && !words)
        return error_set(err, STATUS_INVALID_ARGUMENT, "scales: not %s, the file holds %s",
                         fp32 ? "FP32" : "UE8M0 bytes or, in gkt, 32-bit words", scales->type);
    return STATUS_OK;
}

static enum status set_tokens(struct run *run, struct error *err)
{
    uint64_t tokens = 0;
    const struct tensor *activations = &run->activations;
    if (!ctl_number(run->args, OPT_TOKENS, 0, EINSUM_TOKENS_MAX, &tokens))
        return error_set(err, STATUS_INVALID_ARGUMENT, "--tokens is of no use");
    if (!ctl_has(run->args, OPT_TOKENS)) {
        if (activations->dims_n != 3)
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "activations: %u dimensions, so that --tokens is needed",
                             activations->dims_n);
        tokens =
            activations
                ->dims[run->request.activation_layout == EINSUM_CLIENT_ACTIVATIONS_GTR ? 1 : 0];
    }
    if (tokens > EINSUM_TOKENS_MAX)
        return error_set(err, STATUS_INVALID_ARGUMENT, "activations: %" PRIu64 " tokens", tokens);
    run->request.tokens = (uint32_t)tokens;
    return STATUS_OK;
}

static enum ctl_exit read_files(struct run *run)
{
    const char *activations = ctl_value(run->args, OPT_ACTIVATIONS);
    const char *scales = ctl_value(run->args, OPT_SCALES);
    if (!activations || !scales)
        return ctl_usage_error("run: --activations and --scales are required, or --random TOKENS");
    struct error err;
    enum status status = tensor_read(activations, "activations", &run->activations, &err);
    if (status == STATUS_OK)
        status = tensor_read(scales, "scales", &run->scales, &err);
    if (status == STATUS_OK)
        status = check_types(run, &err);
    if (status == STATUS_OK)
        status = set_tokens(run, &err);
    if (status != STATUS_OK)
        return ctl_fail_local(run->ctl, &err);
    run->request.activations = run->activations.data;
    run->request.activations_bytes = run->activations.bytes;
    run->request.scales = run->scales.data;
    run->request.scales_bytes = run->scales.bytes;
    return CTL_OK;
}

// BF16 has no name in .npy: any two bytes but those of FP16, which has one.
static enum status check_attention(const struct run *run, struct error *err)
{
    const struct tensor *attention = &run->activations, *positions = &run->scales;
    if (attention->element_bytes != 2 || strstr(attention->type, "f2") ||
        strcmp(attention->type, "F16") == 0)
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "attention: not BF16 or uint16, the file holds %s", attention->type);
    if (strcmp(positions->type, "<i8") != 0 && strcmp(positions->type, "I64") != 0)
        return error_set(err, STATUS_INVALID_ARGUMENT, "positions: not int64, the file holds %s",
                         positions->type);
    uint64_t tokens = positions->bytes / sizeof(int64_t);
    if (tokens > EINSUM_TOKENS_MAX)
        return error_set(err, STATUS_INVALID_ARGUMENT, "positions: %" PRIu64 " tokens", tokens);
    return STATUS_OK;
}

static enum ctl_exit read_attention(struct run *run)
{
    const char *positions = ctl_value(run->args, OPT_POSITIONS);
    if (!positions)
        return ctl_usage_error("run: --attention needs --positions");
    struct error err;
    enum status status =
        tensor_read(ctl_value(run->args, OPT_ATTENTION), "attention", &run->activations, &err);
    if (status == STATUS_OK)
        status = tensor_read(positions, "positions", &run->scales, &err);
    if (status == STATUS_OK)
        status = check_attention(run, &err);
    if (status != STATUS_OK)
        return ctl_fail_local(run->ctl, &err);
    struct einsum_client_request *request = &run->request;
    request->attention = run->activations.data;
    request->attention_bytes = run->activations.bytes;
    request->positions = (const int64_t *)(const void *)run->scales.data;
    request->positions_bytes = run->scales.bytes;
    request->tokens = (uint32_t)(run->scales.bytes / sizeof(int64_t));
    return CTL_OK;
}

// ---- the answer ---------------------------------------------------------------------------------

static json_t *digest_json(const struct einsum_client_digest *digest)
{
    json_t *head = json_array();
    for (uint32_t i = 0; i < digest->head_n; i++)
        json_array_append_new(head, ctl_real_json((double)digest->head[i]));
    return json_pack("{s:I, s:I, s:I, s:o, s:o, s:o}", "crc32", (json_int_t)digest->crc32,
                     "elements", (json_int_t)digest->elements, "nan_elements",
                     (json_int_t)digest->nan_elements, "sum", ctl_real_json(digest->sum), "abs_max",
                     ctl_real_json(digest->abs_max), "head", head);
}

static void print_json(const struct run *run, const struct einsum_client_response *response,
                       uint32_t crc, const char *file)
{
    const struct einsum_client_request *request = &run->request;
    bool project = request->operation == EINSUM_CLIENT_OUTPUT_PROJECT;
    json_t *json = json_pack(
        "{s:s, s:s, s:s?, s:s?, s:s?, s:s?, s:s, s:[I,I,I], s:I, s:{s:I, s:I, s:I, s:I, s:I, s:I},"
        " s:s?}",
        "weight", request->weight, "operation", project ? "output_project" : "einsum", "recipe",
        project ? NULL : ctl_recipes[request->recipe], "activation_layout",
        project ? NULL : ctl_activation_layouts[request->activation_layout], "scale_layout",
        project ? NULL : ctl_scale_layouts[request->scale_layout], "scale_type",
        project ? NULL : ctl_scale_types[request->scale_type], "output_type",
        ctl_output_types[request->output_type], "shape", (json_int_t)response->tokens,
        (json_int_t)response->groups, (json_int_t)response->output_dim, "latency_ns",
        (json_int_t)response->latency_ns, "batch", "requests", (json_int_t)response->batch_requests,
        "tokens", (json_int_t)response->batch_tokens, "bucket", (json_int_t)response->batch_bucket,
        "queue_ns", (json_int_t)response->queue_ns, "run_ns", (json_int_t)response->run_ns, "parts",
        (json_int_t)response->parts, "output", file);
    if (response->has_digest)
        json_object_set_new(json, "digest", digest_json(&response->digest));
    else
        json_object_set_new(json, "crc32", json_integer((json_int_t)crc));
    ctl_print_json(json);
}

static void print_text(const struct run *run, const struct einsum_client_response *response,
                       uint32_t crc, const char *file)
{
    const struct einsum_client_request *request = &run->request;
    char took[CTL_TEXT_BYTES], ran[CTL_TEXT_BYTES];
    if (request->operation == EINSUM_CLIENT_OUTPUT_PROJECT)
        printf("%s, attention bf16 > %s\n", request->weight,
               ctl_output_types[request->output_type]);
    else
        printf("%s, recipe %s, %s %s %s > %s\n", request->weight, ctl_recipes[request->recipe],
               ctl_activation_layouts[request->activation_layout],
               ctl_scale_layouts[request->scale_layout], ctl_scale_types[request->scale_type],
               ctl_output_types[request->output_type]);
    printf("output [%u, %u, %u] in %s; ran %s in a batch of %u requests, %u tokens, bucket %u",
           response->tokens, response->groups, response->output_dim,
           ctl_duration(response->latency_ns, took), ctl_duration(response->run_ns, ran),
           response->batch_requests, response->batch_tokens, response->batch_bucket);
    if (response->parts > 0)
        printf(", the first of %u parts", response->parts);
    printf("\n");
    if (response->has_digest) {
        const struct einsum_client_digest *digest = &response->digest;
        printf("crc32 %08x, %" PRIu64 " elements, %" PRIu64 " NaN, sum %.9g, largest %.9g, first",
               digest->crc32, digest->elements, digest->nan_elements, digest->sum, digest->abs_max);
        for (uint32_t i = 0; i < digest->head_n; i++)
            printf(" %.6g", (double)digest->head[i]);
        printf("\n");
        return;
    }
    printf("crc32 %08x\n", crc);
    bool npy_bf16 =
        file && request->output_type == EINSUM_CLIENT_OUTPUT_BF16 && strstr(file, ".npy") != NULL;
    if (file)
        printf("written to %s%s\n", file,
               npy_bf16 ? " as uint16, the bits of BF16: "
                          "(a.astype(np.uint32) << 16).view(np.float32)"
                        : "");
}

static enum ctl_exit call(struct run *run)
{
    const char *file = ctl_value(run->args, OPT_OUTPUT);
    struct einsum_client_request *request = &run->request;
    bool fp32 = request->output_type == EINSUM_CLIENT_OUTPUT_FP32;
    request->output_bytes =
        (uint64_t)request->tokens * run->weight.groups * run->weight.output_dim * (fp32 ? 4 : 2);
    request->output = run->output = malloc(request->output_bytes + 1);
    struct error err = {.status = STATUS_RESOURCE_EXHAUSTED, .text = "no memory for the output"};
    if (!run->output)
        return ctl_fail_local(run->ctl, &err);
    struct einsum_client_response response;
    struct einsum_client_error error;
    if (einsum_client_einsum(run->ctl->client, request, &response, &error) != EINSUM_CLIENT_OK)
        return ctl_fail(run->ctl, &error);
    const uint64_t dims[3] = {response.tokens, response.groups, response.output_dim};
    if (file && tensor_write(file, run->output, fp32, 3, dims, &err) != STATUS_OK)
        return ctl_fail_local(run->ctl, &err);
    uint32_t crc = (uint32_t)crc32_z(0, run->output, response.output_bytes);
    if (run->ctl->json)
        print_json(run, &response, crc, file);
    else
        print_text(run, &response, crc, file);
    return CTL_OK;
}

static enum ctl_exit run_all(struct run *run)
{
    const char *name = ctl_value(run->args, OPT_WEIGHT);
    bool random = ctl_has(run->args, OPT_RANDOM), attention = ctl_has(run->args, OPT_ATTENTION);
    if (!name)
        return ctl_usage_error("run: --weight NAME is required");
    if (random && (ctl_has(run->args, OPT_ACTIVATIONS) || ctl_has(run->args, OPT_SCALES)))
        return ctl_usage_error("run: --random and files exclude each other");
    if (ctl_has(run->args, OPT_DIGEST) && ctl_has(run->args, OPT_OUTPUT))
        return ctl_usage_error("run: --digest and --output exclude each other");
    if (ctl_has(run->args, OPT_POSITIONS) && !attention)
        return ctl_usage_error("run: --positions needs --attention");
    struct einsum_client_options client;
    ctl_client_options(run->ctl, &client);
    client.checksums = ctl_has(run->args, OPT_CHECKSUMS);
    if (!ctl_connect(run->ctl, &client))
        return CTL_USAGE;
    struct einsum_client_error error;
    if (einsum_client_get_weight(run->ctl->client, name, &run->weight, &error) != EINSUM_CLIENT_OK)
        return ctl_fail(run->ctl, &error);
    run->request.weight = name;
    if (!(attention ? read_words_of_attention(run) : read_words(run)))
        return CTL_USAGE;
    enum ctl_exit code = random      ? make_random(run)
                         : attention ? read_attention(run)
                                     : read_files(run);
    return code == CTL_OK ? call(run) : code;
}

static enum ctl_exit run_run(struct ctl *ctl, const struct ctl_args *args)
{
    struct run run = {.ctl = ctl, .args = args};
    enum ctl_exit code = run_all(&run);
    free(run.output);
    tensor_deinit(&run.activations);
    tensor_deinit(&run.scales);
    ctl_inputs_deinit(&run.random);
    return code;
}

const struct ctl_command ctl_command_run = {
    .name = "run",
    .operands = "",
    .summary = "one projection: tensors from files or random ones, result to a file",
    .help =
        "Sends activations (E4M3, one byte an element) and their scales, and writes the output.\n"
        "Layouts are never guessed: with files they are required. With --random they default to\n"
        "tgr, tgk and ue8m0. Prints what was used. With --attention it sends attention's output "
        "and\n"
        "positions instead, and the server rotates back and quantises.\n\n"
        "  einsumctl run --weight layers.0.attn.wo_a --random 4 --digest\n"
        "  einsumctl run --weight layers.0.attn.wo_a --activations step.safetensors:a \\\n"
        "    --scales step.safetensors:s --activation-layout gtr --scale-layout gkt \\\n"
        "    --scale-type fp32 --output out.npy\n"
        "  einsumctl run --weight layers.0.attn.wo_a --attention o.npy --positions p.npy \\\n"
        "    --output out.npy",
    .options = options,
    .run = run_run,
};
