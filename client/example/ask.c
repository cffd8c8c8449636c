// One projection, whole: the first resident weight, one token of ones at scale one, FP32 out.
//
//     ask 127.0.0.1:50061
//     layers.0.attn.wo_a 8 1024: 0.1875 -0.03125 ...
#include <einsum_client.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SHOWN = 8, E4M3_ONE = 0x38, UE8M0_ONE = 0x7f };

// Prints the first outputs of a weight.
static enum einsum_client_status ask(struct einsum_client *client,
                                     const struct einsum_client_weight *weight,
                                     struct einsum_client_error *error)
{
    size_t reduced = (size_t)weight->groups * weight->reduced_dim;
    size_t outputs = (size_t)weight->groups * weight->output_dim;
    size_t blocks = reduced / weight->block_r;
    unsigned char *activations = malloc(reduced), *scales = malloc(blocks);
    float *output = malloc(outputs * sizeof *output);
    if (!activations || !scales || !output)
        abort();
    memset(activations, E4M3_ONE, reduced);
    memset(scales, UE8M0_ONE, blocks);

    struct einsum_client_request request = {
        .weight = weight->name,
        .recipe = weight->recipes[0],
        .activation_layout = EINSUM_CLIENT_ACTIVATIONS_TGR,
        .scale_layout = EINSUM_CLIENT_SCALES_TGK,
        .scale_type = EINSUM_CLIENT_SCALE_UE8M0,
        .output_type = EINSUM_CLIENT_OUTPUT_FP32,
        .tokens = 1,
        .activations = activations,
        .activations_bytes = reduced,
        .scales = scales,
        .scales_bytes = blocks,
        .output = output,
        .output_bytes = outputs * sizeof *output,
    };
    struct einsum_client_response response;
    enum einsum_client_status status = einsum_client_einsum(client, &request, &response, error);
    if (status == EINSUM_CLIENT_OK) {
        printf("%s %u %u:", weight->name, weight->groups, weight->output_dim);
        for (size_t i = 0; i < SHOWN && i < outputs; i++)
            printf(" %.9g", (double)output[i]);
        putchar('\n');
    }
    free(activations);
    free(scales);
    free(output);
    return status;
}

int main(int argc, char **argv)
{
    struct einsum_client_error error;
    struct einsum_client *client;
    struct einsum_client_weights weights = {0};
    enum einsum_client_status status =
        einsum_client_create(argc > 1 ? argv[1] : "127.0.0.1:50061", NULL, &client, &error);
    if (status == EINSUM_CLIENT_OK) {
        status = einsum_client_list_weights(client, &weights, &error);
        if (status == EINSUM_CLIENT_OK && weights.items_n > 0)
            status = ask(client, &weights.items[0], &error);
        einsum_client_weights_deinit(&weights);
        einsum_client_destroy(client);
    }
    if (status != EINSUM_CLIENT_OK)
        fprintf(stderr, "%s: %s\n", einsum_client_status_name(status), error.text);
    return status != EINSUM_CLIENT_OK;
}
