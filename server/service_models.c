// What inference.GRPCInferenceService tells of the server and of its models. A model is a resident
// weight.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <inference/grpc_service.pb-c.h>

#include "config.h"
#include "inference.h"
#include "request.h"
#include "service.h"

static char platform[] = "einsumd"; // not const, as protobuf-c has its strings

// Constants of ours, which protobuf-c only reads.
static char *text(const char *constant)
{
    return (char *)(uintptr_t)constant;
}

// ---- server

static void on_server_live(struct call *call, grpc_byte_buffer *bytes)
{
    (void)bytes; // the request has no fields
    Inference__ServerLiveResponse response = INFERENCE__SERVER_LIVE_RESPONSE__INIT;
    response.live = true;
    call_finish(call, message_pack(&response.base), NULL);
}

static void on_server_ready(struct call *call, grpc_byte_buffer *bytes)
{
    (void)bytes; // the request has no fields
    Inference__ServerReadyResponse response = INFERENCE__SERVER_READY_RESPONSE__INIT;
    response.ready = !service_not_ready(call_context(call));
    call_finish(call, message_pack(&response.base), NULL);
}

static void on_server_metadata(struct call *call, grpc_byte_buffer *bytes)
{
    (void)bytes; // the request has no fields
    static const char *const extensions[] = {
        "model_repository", "model_configuration", "statistics",
        "parameters",       "schedule_policy",     "binary_tensor_data",
    };
    char *pointers[ARRAY_LEN(extensions)];
    for (size_t i = 0; i < ARRAY_LEN(extensions); i++)
        pointers[i] = text(extensions[i]);
    Inference__ServerMetadataResponse response = INFERENCE__SERVER_METADATA_RESPONSE__INIT;
    response.name = platform;
    response.version = text(EINSUMD_VERSION);
    response.extensions = pointers;
    response.n_extensions = ARRAY_LEN(extensions);
    call_finish(call, message_pack(&response.base), NULL);
}

// ---- one model

static void on_model_ready(struct call *call, grpc_byte_buffer *bytes)
{
    Inference__ModelReadyRequest *request =
        service_unpack(call, &inference__model_ready_request__descriptor, bytes);
    if (!request)
        return;
    struct weight *weight = NULL;
    struct error err;
    enum status status = inference_find_model(call_context(call)->weights, "name", request->name,
                                              request->version, &weight, &err);
    Inference__ModelReadyResponse response = INFERENCE__MODEL_READY_RESPONSE__INIT;
    response.ready =
        status == STATUS_OK && !weight_damaged(weight) && !service_not_ready(call_context(call));
    if (status == STATUS_OK || status == STATUS_NOT_FOUND)
        call_finish(call, message_pack(&response.base), NULL);
    else
        call_finish(call, NULL, &err);
    weight_unref(weight);
    message_free(&request->base);
}

// A request that names a model: its weight, to be unreferenced. NULL: the call is finished.
static struct weight *find_model_or_fail(struct call *call, const char *name, const char *version)
{
    struct weight *weight = NULL;
    struct error err;
    if (inference_find_model(call_context(call)->weights, "name", name, version, &weight, &err) !=
        STATUS_OK)
        call_finish(call, NULL, &err);
    return weight;
}

// The tensors as a model declares them; others that it takes as well stand in the .proto.
struct tensor {
    const char *name, *datatype;
    Inference__DataType data_type;
    int64_t shape[3];
};

enum { TENSORS = 3, INPUTS = 2 }; // the last is the output

static void describe_tensors(const struct weight *weight, struct tensor tensors[TENSORS])
{
    const struct einsum_weight_format *format = &weight->format;
    const int64_t blocks = format->reduced_dim / format->block_r;
    const struct tensor described[TENSORS] = {
        {inference_activations,
         "UINT8",
         INFERENCE__DATA_TYPE__TYPE_UINT8,
         {-1, format->groups, format->reduced_dim}},
        {inference_scales, "FP32", INFERENCE__DATA_TYPE__TYPE_FP32, {-1, format->groups, blocks}},
        {inference_output,
         "BF16",
         INFERENCE__DATA_TYPE__TYPE_BF16,
         {-1, format->groups, format->output_dim}},
    };
    memcpy(tensors, described, sizeof described);
}

static void on_model_metadata(struct call *call, grpc_byte_buffer *bytes)
{
    Inference__ModelMetadataRequest *request =
        service_unpack(call, &inference__model_metadata_request__descriptor, bytes);
    if (!request)
        return;
    struct weight *weight = find_model_or_fail(call, request->name, request->version);
    message_free(&request->base);
    if (!weight)
        return;
    struct tensor tensors[TENSORS];
    describe_tensors(weight, tensors);
    Inference__ModelMetadataResponse__TensorMetadata messages[TENSORS];
    Inference__ModelMetadataResponse__TensorMetadata *pointers[TENSORS];
    for (int i = 0; i < TENSORS; i++) {
        inference__model_metadata_response__tensor_metadata__init(&messages[i]);
        messages[i].name = text(tensors[i].name);
        messages[i].datatype = text(tensors[i].datatype);
        messages[i].shape = tensors[i].shape;
        messages[i].n_shape = ARRAY_LEN(tensors[i].shape);
        pointers[i] = &messages[i];
    }
    char *version = text(inference_version);
    Inference__ModelMetadataResponse response = INFERENCE__MODEL_METADATA_RESPONSE__INIT;
    response.name = weight->name;
    response.platform = platform;
    response.versions = &version;
    response.n_versions = 1;
    response.inputs = pointers;
    response.n_inputs = INPUTS;
    response.outputs = pointers + INPUTS;
    response.n_outputs = TENSORS - INPUTS;
    call_finish(call, message_pack(&response.base), NULL);
    weight_unref(weight);
}

// ---- ModelConfig

// `parameters` of a ModelConfig, and what they point to.
struct config_parameters {
    Inference__ModelConfig__ParametersEntry entries[4];
    Inference__ModelConfig__ParametersEntry *pointers[4];
    Inference__ModelParameter values[4];
    char tokens_max[16];
};

static size_t describe_parameters(const struct service_context *context,
                                  const struct weight *weight, struct config_parameters *parameters)
{
    snprintf(parameters->tokens_max, sizeof parameters->tokens_max, "%" PRIu32,
             context->config->request_tokens_max);
    const char *const keys[] = {"activations.dtype", "activation_scales.dtype", "recipe",
                                "request_tokens_max"};
    const char *const values[] = {"FP8_E4M3", "FP32", request_recipe_name(inference_recipe(weight)),
                                  parameters->tokens_max};
    for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
        inference__model_parameter__init(&parameters->values[i]);
        parameters->values[i].string_value = text(values[i]);
        inference__model_config__parameters_entry__init(&parameters->entries[i]);
        parameters->entries[i].key = text(keys[i]);
        parameters->entries[i].value = &parameters->values[i];
        parameters->pointers[i] = &parameters->entries[i];
    }
    return ARRAY_LEN(keys);
}

static void finish_model_config(struct call *call, struct weight *weight)
{
    struct tensor tensors[TENSORS];
    describe_tensors(weight, tensors);
    Inference__ModelInput inputs[INPUTS];
    Inference__ModelInput *input_pointers[INPUTS];
    for (int i = 0; i < INPUTS; i++) {
        inference__model_input__init(&inputs[i]);
        inputs[i].name = text(tensors[i].name);
        inputs[i].data_type = tensors[i].data_type;
        inputs[i].dims = tensors[i].shape;
        inputs[i].n_dims = ARRAY_LEN(tensors[i].shape);
        input_pointers[i] = &inputs[i];
    }
    Inference__ModelOutput output = INFERENCE__MODEL_OUTPUT__INIT, *output_pointer = &output;
    output.name = text(tensors[INPUTS].name);
    output.data_type = tensors[INPUTS].data_type;
    output.dims = tensors[INPUTS].shape;
    output.n_dims = ARRAY_LEN(tensors[INPUTS].shape);
    struct config_parameters parameters;
    Inference__ModelConfig config = INFERENCE__MODEL_CONFIG__INIT;
    config.name = weight->name;
    config.platform = config.backend = platform;
    config.input = input_pointers;
    config.n_input = INPUTS;
    config.output = &output_pointer;
    config.n_output = 1;
    config.n_parameters = describe_parameters(call_context(call), weight, &parameters);
    config.parameters = parameters.pointers;
    Inference__ModelConfigResponse response = INFERENCE__MODEL_CONFIG_RESPONSE__INIT;
    response.config = &config;
    call_finish(call, message_pack(&response.base), NULL);
}

static void on_model_config(struct call *call, grpc_byte_buffer *bytes)
{
    Inference__ModelConfigRequest *request =
        service_unpack(call, &inference__model_config_request__descriptor, bytes);
    if (!request)
        return;
    struct weight *weight = find_model_or_fail(call, request->name, request->version);
    if (weight)
        finish_model_config(call, weight);
    weight_unref(weight);
    message_free(&request->base);
}

// ---- ModelStatistics

// One model's statistics, and what they point to.
struct statistics {
    Inference__ModelStatistics message;
    Inference__InferStatistics infer;
    Inference__StatisticDuration success, fail, queue, input, compute, output;
};

static uint64_t load(const _Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

static void set_duration(Inference__StatisticDuration *duration, uint64_t count, uint64_t ns)
{
    inference__statistic_duration__init(duration);
    duration->count = count;
    duration->ns = ns;
}

static void describe_statistics(struct statistics *statistics, struct weight *weight)
{
    const struct weight_counters *counters = &weight->counters;
    uint64_t answered = load(&counters->answered);
    set_duration(&statistics->success, answered, load(&counters->answered_ns));
    set_duration(&statistics->fail, load(&counters->failed), load(&counters->failed_ns));
    set_duration(&statistics->queue, answered, load(&counters->queue_ns));
    set_duration(&statistics->input, answered, load(&counters->fill_ns));
    set_duration(&statistics->compute, answered, load(&counters->run_ns));
    set_duration(&statistics->output, answered, 0);
    inference__infer_statistics__init(&statistics->infer);
    statistics->infer.success = &statistics->success;
    statistics->infer.fail = &statistics->fail;
    statistics->infer.queue = &statistics->queue;
    statistics->infer.compute_input = &statistics->input;
    statistics->infer.compute_infer = &statistics->compute;
    statistics->infer.compute_output = &statistics->output;
    inference__model_statistics__init(&statistics->message);
    statistics->message.name = weight->name;
    statistics->message.version = text(inference_version);
    statistics->message.last_inference = load(&counters->last_ms);
    statistics->message.inference_count = answered;
    statistics->message.execution_count = load(&counters->batches);
    statistics->message.inference_stats = &statistics->infer;
}

static void finish_model_statistics(struct call *call, const struct inference_models *list)
{
    struct statistics *statistics = calloc(list->n + 1, sizeof *statistics);
    Inference__ModelStatistics **pointers = calloc(list->n + 1, sizeof *pointers);
    if (!statistics || !pointers || list->incomplete) {
        service_no_memory(call, "a list of models");
        goto free_messages;
    }
    for (size_t i = 0; i < list->n; i++) {
        describe_statistics(&statistics[i], list->weights[i]);
        pointers[i] = &statistics[i].message;
    }
    Inference__ModelStatisticsResponse response = INFERENCE__MODEL_STATISTICS_RESPONSE__INIT;
    response.model_stats = pointers;
    response.n_model_stats = list->n;
    call_finish(call, message_pack(&response.base), NULL);

free_messages:
    free(pointers);
    free(statistics);
}

static void on_model_statistics(struct call *call, grpc_byte_buffer *bytes)
{
    Inference__ModelStatisticsRequest *request =
        service_unpack(call, &inference__model_statistics_request__descriptor, bytes);
    if (!request)
        return;
    struct inference_models list = {0};
    bool all = request->name[0] == '\0';
    if (all) {
        weights_visit(call_context(call)->weights, inference_models_add, &list);
    } else {
        struct weight *weight = find_model_or_fail(call, request->name, request->version);
        if (weight)
            inference_models_add(&list, weight);
        weight_unref(weight);
    }
    if (all || list.n > 0 || list.incomplete)
        finish_model_statistics(call, &list);
    inference_models_deinit(&list);
    message_free(&request->base);
}

#define PATH(method) "/inference.GRPCInferenceService/" method

const struct method service_models_methods[] = {
    {.path = PATH("ServerLive"), .needs = ACCESS_OPEN, .on_message = on_server_live},
    {.path = PATH("ServerReady"), .needs = ACCESS_OPEN, .on_message = on_server_ready},
    {.path = PATH("ServerMetadata"), .needs = ACCESS_READ, .on_message = on_server_metadata},
    {.path = PATH("ModelReady"), .needs = ACCESS_READ, .on_message = on_model_ready},
    {.path = PATH("ModelMetadata"), .needs = ACCESS_READ, .on_message = on_model_metadata},
    {.path = PATH("ModelConfig"), .needs = ACCESS_READ, .on_message = on_model_config},
    {.path = PATH("ModelStatistics"), .needs = ACCESS_READ, .on_message = on_model_statistics},
    {0},
};
