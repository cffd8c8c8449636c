// ask.c in C++: what the library hands out is owned by smart pointers.
#include <einsum_client.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <vector>

namespace
{

constexpr unsigned char kE4m3One = 0x38, kUe8m0One = 0x7f;
constexpr std::size_t kShown = 8;

using Client = std::unique_ptr<einsum_client, decltype(&einsum_client_destroy)>;

void check(einsum_client_status status, const einsum_client_error &error)
{
    if (status != EINSUM_CLIENT_OK)
        throw std::runtime_error(error.text);
}

Client connect(const char *endpoint)
{
    einsum_client_error error;
    einsum_client *client = nullptr;
    check(einsum_client_create(endpoint, nullptr, &client, &error), error);
    return Client(client, einsum_client_destroy);
}

std::vector<float> ask(einsum_client *client, const einsum_client_weight &weight)
{
    std::vector<unsigned char> activations(std::size_t{weight.groups} * weight.reduced_dim,
                                           kE4m3One);
    std::vector<unsigned char> scales(activations.size() / weight.block_r, kUe8m0One);
    std::vector<float> output(std::size_t{weight.groups} * weight.output_dim);

    einsum_client_request request{};
    request.weight = weight.name;
    request.recipe = weight.recipes[0];
    request.activation_layout = EINSUM_CLIENT_ACTIVATIONS_TGR;
    request.scale_layout = EINSUM_CLIENT_SCALES_TGK;
    request.scale_type = EINSUM_CLIENT_SCALE_UE8M0;
    request.output_type = EINSUM_CLIENT_OUTPUT_FP32;
    request.tokens = 1;
    request.activations = activations.data();
    request.activations_bytes = activations.size();
    request.scales = scales.data();
    request.scales_bytes = scales.size();
    request.output = output.data();
    request.output_bytes = output.size() * sizeof output[0];

    einsum_client_response response;
    einsum_client_error error;
    check(einsum_client_einsum(client, &request, &response, &error), error);
    return output;
}

} // namespace

int main(int argc, char **argv)
try {
    Client client = connect(argc > 1 ? argv[1] : "127.0.0.1:50061");
    einsum_client_error error;
    einsum_client_weight weight;
    einsum_client_weights weights{};
    check(einsum_client_list_weights(client.get(), &weights, &error), error);
    if (weights.items_n == 0)
        return 0;
    weight = weights.items[0];
    einsum_client_weights_deinit(&weights);

    std::vector<float> output = ask(client.get(), weight);
    std::printf("%s %u %u:", weight.name, weight.groups, weight.output_dim);
    for (std::size_t i = 0; i < std::min(kShown, output.size()); i++)
        std::printf(" %.9g", static_cast<double>(output[i]));
    std::putchar('\n');
    return 0;
} catch (const std::exception &failure) {
    std::fprintf(stderr, "%s\n", failure.what());
    return 1;
}
