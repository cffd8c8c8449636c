// ModelInfer of inference.GRPCInferenceService: an einsum request in the Open Inference Protocol's
// words.
//
//     message -> wire_inference -> inference -> wire_request -> unary, projection, as Einsum's
//
// Raw tensors are copied once, from the message into the batch. Lists of numbers are converted
// first, into a message of their own which then takes the place of the caller's.
#include <string.h>

#include "inference.h"
#include "service.h"
#include "unary.h"

struct inference {
    struct projection projection; // first: what unary.h expects
    char id[WIRE_INFER_ID_BYTES_MAX + 1];
    char kernel[WIRE_KERNEL_BYTES_MAX + 1]; // that was asked for; "": none
};
_Static_assert(offsetof(struct inference, projection) == 0, "unary.h finds the projection there");
_Static_assert((int)WIRE_INFER_HEAD_BYTES_MAX <= (int)PROJECTION_HEAD_BYTES_MAX, "a head fits");
_Static_assert((int)ENGINE_KERNEL_TEXT <= (int)WIRE_INFER_KERNEL_BYTES_MAX, "a kernel's name fits");

static size_t write_head(const struct projection *projection, const struct wire_response *response,
                         uint8_t head[PROJECTION_HEAD_BYTES_MAX])
{
    const struct inference *inference = (const struct inference *)projection;
    const struct wire_infer_response infer = {
        .model_name = projection->job.weight->name,
        .model_version = inference_version,
        .id = inference->id,
        .kernel = inference->kernel[0] ? inference->kernel : call_context(projection->call)->kernel,
        .output_name = inference_output,
        .datatype = inference_datatype(response->output_type),
    };
    return wire_write_infer_head(&infer, response, head);
}

// The converted lists, to be destroyed.
NODISCARD static enum status convert(struct projection_bytes bytes, const struct wire_infer *infer,
                                     const struct wire_request *request,
                                     grpc_byte_buffer **converted, struct error *err)
{
    uint64_t converted_bytes;
    enum status status = inference_converted_bytes(wire_bytes(bytes.slices, bytes.slices_n),
                                                   request, &converted_bytes, err);
    if (status != STATUS_OK)
        return status;
    grpc_slice slice = grpc_slice_malloc((size_t)converted_bytes);
    status = inference_convert(bytes.slices, bytes.slices_n, infer, request,
                               GRPC_SLICE_START_PTR(slice), err);
    if (status == STATUS_OK)
        *converted = grpc_raw_byte_buffer_create(&slice, 1); // takes its own reference
    grpc_slice_unref(slice);
    return status;
}

static void start(struct inference *inference, struct projection_bytes bytes,
                  const struct wire_infer *infer, const struct wire_request *request,
                  grpc_byte_buffer *message, bool listed)
{
    grpc_byte_buffer *converted = NULL;
    struct error err;
    if (listed && convert(bytes, infer, request, &converted, &err) != STATUS_OK) {
        weight_unref(inference->projection.weight);
        unary_fail(&inference->projection, &err);
        return;
    }
    unary_start(&inference->projection, request, listed ? converted : message);
    if (converted)
        grpc_byte_buffer_destroy(converted);
}

static void on_model_infer(struct call *call, grpc_byte_buffer *message)
{
    struct inference *inference = unary_begin(call, sizeof *inference, METRICS_MODEL_INFER);
    inference->projection.write_head = write_head;
    struct projection_bytes bytes = projection_bytes(message);
    struct wire_infer infer;
    struct wire_request request;
    struct weight *weight = NULL;
    bool listed = false;
    struct error err;
    enum status status = wire_read_infer(bytes.slices, bytes.slices_n, &infer, &err);
    if (status == STATUS_OK)
        status = inference_find_model(call_context(call)->weights, "model_name", infer.model_name,
                                      infer.model_version, &weight, &err);
    if (status == STATUS_OK)
        status = inference_translate(&infer, weight, &request, &listed, &err);
    if (status != STATUS_OK) {
        weight_unref(weight);
        unary_fail(&inference->projection, &err);
        return;
    }
    strcpy(inference->id, infer.id);
    strcpy(inference->kernel, infer.kernel);
    inference->projection.weight = weight;
    start(inference, bytes, &infer, &request, message, listed);
}

const struct method service_inference_methods[] = {
    {
        .path = "/inference.GRPCInferenceService/ModelInfer",
        .needs = ACCESS_INFER,
        .message_with_call = true,
        .on_message = on_model_infer,
        .on_wake = unary_on_wake,
        .on_cancel = unary_on_cancel,
        .on_end = unary_on_end,
    },
    {0},
};
