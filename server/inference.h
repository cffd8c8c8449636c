// From the Open Inference Protocol to an einsum request: datatypes, shapes and parameters become
// types, layouts and tokens. What they mean is said in proto/inference/grpc_service.proto; all that
// einsum requests are checked for as well is left to request.h.
#pragma once

#include "weights.h"
#include "wire_inference.h"

extern const char inference_version[], inference_activations[], inference_scales[],
    inference_output[];

// A reference to the weight of that name. NOT_FOUND: there is none, or the version is not ours.
// `field` is the request's field that holds the name, for errors.
NODISCARD enum status inference_find_model(struct weights *weights, const char *field,
                                           const char *name, const char *version,
                                           struct weight **weight, struct error *err);

// References to models, for whoever lists them.
struct inference_models {
    struct weight **weights;
    size_t n, max;
    bool incomplete; // no memory for the rest
};
void inference_models_add(void *models, struct weight *weight); // as weights_visit calls it
void inference_models_deinit(struct inference_models *models);

// `listed`: the tensors are lists of numbers; the request's ranges then say how long they will be
// once converted, activations first, scales behind them. Else the ranges lie in the message.
NODISCARD enum status inference_translate(const struct wire_infer *infer,
                                          const struct weight *weight, struct wire_request *request,
                                          bool *listed, struct error *err);

// Converts the lists of a request that is `listed`, to what its ranges say.
NODISCARD enum status inference_convert(const grpc_slice *slices, size_t slices_n,
                                        const struct wire_infer *infer,
                                        const struct wire_request *request, uint8_t *to,
                                        struct error *err);
// The bytes that it writes. INVALID_ARGUMENT: more than lists of this message could hold.
NODISCARD enum status inference_converted_bytes(uint64_t message_bytes,
                                                const struct wire_request *request, uint64_t *bytes,
                                                struct error *err);

// The recipe that names the weight's own blocks.
enum einsum_recipe inference_recipe(const struct weight *weight);
const char *inference_datatype(int32_t output_type);
