// RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload of inference.GRPCInferenceService.
// The repository is the registry of weights; loading and unloading are what LoadWeights and
// UnloadWeights do, for one weight, and may block: they run as control tasks.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <inference/grpc_service.pb-c.h>

#include "config.h"
#include "inference.h"
#include "log.h"
#include "reload.h"
#include "service.h"

// There is one repository, and it has no name.
NODISCARD static enum status check_repository(const char *name, struct error *err)
{
    if (name[0] == '\0')
        return STATUS_OK;
    return error_field(err, STATUS_NOT_FOUND, "repository_name",
                       "there is no \"%s\"; expected none: there is one repository", name);
}

static void finish_repository_index(struct call *call)
{
    struct inference_models list = {0};
    weights_visit(call_context(call)->weights, inference_models_add, &list);
    bool ready = !service_not_ready(call_context(call));
    Inference__RepositoryIndexResponse__ModelIndex *models = calloc(list.n + 1, sizeof *models);
    Inference__RepositoryIndexResponse__ModelIndex **pointers =
        calloc(list.n + 1, sizeof *pointers);
    if (!models || !pointers || list.incomplete) {
        service_no_memory(call, "a list of models");
        goto free_messages;
    }
    for (size_t i = 0; i < list.n; i++) {
        inference__repository_index_response__model_index__init(&models[i]);
        models[i].name = list.weights[i]->name;
        // protobuf-c only reads them.
        models[i].version = (char *)(uintptr_t)inference_version;
        bool damaged = weight_damaged(list.weights[i]);
        models[i].state = (char *)(uintptr_t)(ready && !damaged ? "READY" : "UNAVAILABLE");
        models[i].reason = (char *)(uintptr_t)(damaged  ? "its copy in memory is damaged"
                                               : !ready ? "the server is not ready"
                                                        : "");
        pointers[i] = &models[i];
    }
    Inference__RepositoryIndexResponse response = INFERENCE__REPOSITORY_INDEX_RESPONSE__INIT;
    response.models = pointers;
    response.n_models = list.n;
    call_finish(call, message_pack(&response.base), NULL);

free_messages:
    free(pointers);
    free(models);
    inference_models_deinit(&list);
}

static void on_repository_index(struct call *call, grpc_byte_buffer *bytes)
{
    Inference__RepositoryIndexRequest *request =
        service_unpack(call, &inference__repository_index_request__descriptor, bytes);
    if (!request)
        return;
    struct error err;
    if (check_repository(request->repository_name, &err) == STATUS_OK)
        finish_repository_index(call);
    else
        call_finish(call, NULL, &err);
    message_free(&request->base);
}

// ---- RepositoryModelLoad, RepositoryModelUnload

enum { PATTERN_BYTES = 2 * WEIGHT_NAME_BYTES + 32 };

// Either of them: one model comes or goes.
struct change {
    struct service_task task;
    char name[WEIGHT_NAME_BYTES];                   // canonical
    Inference__RepositoryModelLoadRequest *request; // of a load
    struct weights_load load;                       // points into it; path NULL: not given
};

// `name` as a shell pattern that matches it alone, between `before` and `behind`.
static void make_pattern(const char *before, const char *name, const char *behind,
                         char pattern[PATTERN_BYTES])
{
    size_t used = (size_t)snprintf(pattern, PATTERN_BYTES, "%s", before);
    for (; *name; name++) {
        if (strchr("*?[]\\", *name))
            pattern[used++] = '\\';
        pattern[used++] = *name;
    }
    snprintf(pattern + used, PATTERN_BYTES - used, "%s", behind);
}

// The model that a request means: KServe's clients have its name where Triton's have the
// repository's, and no other.
NODISCARD static enum status choose_name(const char *repository_name, const char *model_name,
                                         const char **name, struct error *err)
{
    *name = model_name[0] ? model_name : repository_name;
    return model_name[0] ? check_repository(repository_name, err) : STATUS_OK;
}

NODISCARD static enum status set_name(struct change *change, const char *name, struct error *err)
{
    size_t bytes;
    const char *canonical = weight_name_canonical(name, strlen(name), &bytes);
    if (bytes == 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "model_name", "not given");
    if (bytes >= sizeof change->name)
        return error_field(err, STATUS_INVALID_ARGUMENT, "model_name", "%zu bytes, at most %zu",
                           bytes, sizeof change->name - 1);
    memcpy(change->name, canonical, bytes);
    return STATUS_OK;
}

// Loads the model by the name that its tensor has: "model." may stand before ours.
NODISCARD static enum status load_one(struct change *change, const struct weights_load *from,
                                      struct error *err)
{
    static const char *const before[] = {"", "model."};
    struct service_context *context = call_context(change->task.call);
    size_t prefix = strlen(from->name_prefix);
    bool prefixed = strncmp(change->name, from->name_prefix, prefix) == 0 && change->name[prefix];
    for (size_t i = 0; i < ARRAY_LEN(before) && prefixed; i++) {
        char pattern[PATTERN_BYTES];
        make_pattern(before[i], change->name + prefix, ".weight", pattern);
        const char *const patterns[] = {pattern};
        struct weights_load load = *from;
        load.tensors = patterns;
        load.tensors_n = 1;
        enum status status = weights_load(context->weights, &load, NULL, err);
        if (status != STATUS_NOT_FOUND || strcmp(err->field, "tensors") != 0)
            return status;
    }
    return error_field(err, STATUS_NOT_FOUND, "model_name",
                       "\"%s\" is no weight of checkpoint \"%s\"", change->name, from->path);
}

static bool on_progress(void *context, uint32_t weights_done, uint32_t weights_total,
                        uint64_t bytes_done, uint64_t bytes_total)
{
    (void)weights_done, (void)weights_total, (void)bytes_done, (void)bytes_total;
    const struct change *change = context;
    return !call_cancelled(change->task.call) &&
           !control_stopping(call_context(change->task.call)->control);
}

// Looks through the configuration's checkpoints, in order.
NODISCARD static enum status load_from(struct change *change, const struct config *config,
                                       struct error *err)
{
    for (size_t i = 0; i < config->weights_n; i++) {
        const struct config_weights *entry = &config->weights[i];
        struct weights_load load = change->load;
        load.path = entry->path;
        load.name_prefix = entry->name_prefix;
        load.checksums = entry->checksums;
        load.tensor_parallel_rank = entry->tensor_parallel_rank;
        load.tensor_parallel_size = entry->tensor_parallel_size;
        load.output_dim = entry->output_dim;
        enum status status = load_one(change, &load, err);
        if (status != STATUS_NOT_FOUND)
            return status;
    }
    return error_field(err, STATUS_NOT_FOUND, "model_name",
                       "\"%s\" is in none of the %zu checkpoints of the configuration; name "
                       "another by the parameter path",
                       change->name, config->weights_n);
}

NODISCARD static enum status load_configured(struct change *change, struct error *err)
{
    const struct config *file = reload_file_ref(call_context(change->task.call)->reload);
    enum status status = load_from(change, file, err);
    reload_file_unref(file);
    return status;
}

static void run_load(struct service_task *task)
{
    struct change *change = CONTAINER_OF(task, struct change, task);
    uint64_t started_ns = now_ns();
    enum status status = change->load.path ? load_one(change, &change->load, &task->error)
                                           : load_configured(change, &task->error);
    task->error.status = status;
    if (status == STATUS_OK)
        LOG(INFO, "model loaded", LOG_STR("name", change->name),
            LOG_U64("ms", (now_ns() - started_ns) / 1000000u));
    else
        LOG(WARN, "model not loaded", LOG_STR("name", change->name),
            LOG_STR("reason", task->error.text));
}

static void run_unload(struct service_task *task)
{
    struct change *change = CONTAINER_OF(task, struct change, task);
    char pattern[PATTERN_BYTES];
    make_pattern("", change->name, "", pattern);
    task->error.status =
        weights_unload(call_context(task->call)->weights, pattern, NULL, NULL, &task->error);
    if (task->error.status == STATUS_OK)
        LOG(INFO, "model unloaded", LOG_STR("name", change->name));
}

typedef Inference__ModelRepositoryParameter parameter_message;

NODISCARD static enum status set_text(const parameter_message *value, const char *key,
                                      const char **to, struct error *err)
{
    if (!value || value->parameter_choice_case !=
                      INFERENCE__MODEL_REPOSITORY_PARAMETER__PARAMETER_CHOICE_STRING_PARAM)
        return error_field(err, STATUS_INVALID_ARGUMENT, key, "expected a string (string_param)");
    *to = value->string_param;
    return STATUS_OK;
}

NODISCARD static enum status set_number(const parameter_message *value, const char *key,
                                        uint32_t *to, struct error *err)
{
    if (!value || value->parameter_choice_case !=
                      INFERENCE__MODEL_REPOSITORY_PARAMETER__PARAMETER_CHOICE_INT64_PARAM)
        return error_field(err, STATUS_INVALID_ARGUMENT, key, "expected a number (int64_param)");
    if (value->int64_param < 0 || value->int64_param > UINT32_MAX)
        return error_field(err, STATUS_INVALID_ARGUMENT, key, "expected 0 to %u, got %" PRId64,
                           UINT32_MAX, value->int64_param);
    *to = (uint32_t)value->int64_param;
    return STATUS_OK;
}

NODISCARD static enum status set_parameter(struct weights_load *load, const char *key,
                                           const parameter_message *value, struct error *err)
{
    if (strcmp(key, "path") == 0)
        return set_text(value, key, &load->path, err);
    if (strcmp(key, "name_prefix") == 0)
        return set_text(value, key, &load->name_prefix, err);
    if (strcmp(key, "output_dim") == 0)
        return set_number(value, key, &load->output_dim, err);
    if (strcmp(key, "tensor_parallel_rank") == 0)
        return set_number(value, key, &load->tensor_parallel_rank, err);
    if (strcmp(key, "tensor_parallel_size") == 0)
        return set_number(value, key, &load->tensor_parallel_size, err);
    if (strcmp(key, "config") == 0 || strncmp(key, "file:", strlen("file:")) == 0)
        return error_field(err, STATUS_UNIMPLEMENTED, key,
                           "models are loaded as their checkpoint has them");
    return error_field(err, STATUS_INVALID_ARGUMENT, "parameters",
                       "\"%s\" is none; expected path, name_prefix, output_dim, "
                       "tensor_parallel_rank, tensor_parallel_size",
                       key);
}

NODISCARD static enum status read_load(struct change *change, struct error *err)
{
    const Inference__RepositoryModelLoadRequest *request = change->request;
    change->load = (struct weights_load){
        .name_prefix = "",
        .replace = true,
        .threads = 1, // serving goes on beside it
        .progress = on_progress,
        .progress_context = change,
    };
    const char *name;
    enum status status = choose_name(request->repository_name, request->model_name, &name, err);
    if (status == STATUS_OK)
        status = set_name(change, name, err);
    for (size_t i = 0; i < request->n_parameters && status == STATUS_OK; i++)
        status = set_parameter(&change->load, request->parameters[i]->key,
                               request->parameters[i]->value, err);
    if (status == STATUS_OK && request->n_parameters > 0 && !change->load.path)
        status = error_field(err, STATUS_INVALID_ARGUMENT, "path",
                             "not given, and other parameters are");
    return status;
}

static void on_model_load(struct call *call, grpc_byte_buffer *bytes)
{
    struct change *change = calloc(1, sizeof *change);
    if (!change) {
        service_no_memory(call, "a load");
        return;
    }
    call_set_state(call, change);
    change->request =
        service_unpack(call, &inference__repository_model_load_request__descriptor, bytes);
    if (!change->request)
        return;
    struct error err;
    if (read_load(change, &err) == STATUS_OK)
        service_task_start(&change->task, call, run_load);
    else
        call_finish(call, NULL, &err);
}

static void on_model_unload(struct call *call, grpc_byte_buffer *bytes)
{
    Inference__RepositoryModelUnloadRequest *request =
        service_unpack(call, &inference__repository_model_unload_request__descriptor, bytes);
    if (!request)
        return;
    struct change *change = calloc(1, sizeof *change);
    if (!change) {
        service_no_memory(call, "an unload");
        message_free(&request->base);
        return;
    }
    call_set_state(call, change);
    struct weight *weight = NULL;
    struct error err;
    const char *name;
    enum status status = choose_name(request->repository_name, request->model_name, &name, &err);
    if (status == STATUS_OK)
        status = inference_find_model(call_context(call)->weights, "model_name", name, "", &weight,
                                      &err);
    if (status == STATUS_OK)
        status = set_name(change, weight->name, &err);
    if (status == STATUS_OK)
        service_task_start(&change->task, call, run_unload);
    else
        call_finish(call, NULL, &err);
    weight_unref(weight);
    message_free(&request->base);
}

// With the response, or the reason why not.
static void finish_change(struct call *call, const ProtobufCMessage *response)
{
    const struct change *change = call_state(call);
    if (change->task.error.status == STATUS_OK)
        call_finish(call, message_pack(response), NULL);
    else
        call_finish(call, NULL, &change->task.error);
}

static void on_model_load_wake(struct call *call)
{
    struct change *change = call_state(call);
    if (!service_task_done(&change->task))
        return;
    Inference__RepositoryModelLoadResponse response =
        INFERENCE__REPOSITORY_MODEL_LOAD_RESPONSE__INIT;
    response.model_name = change->name;
    response.isloaded = true;
    finish_change(call, &response.base);
}

static void on_model_unload_wake(struct call *call)
{
    struct change *change = call_state(call);
    if (!service_task_done(&change->task))
        return;
    Inference__RepositoryModelUnloadResponse response =
        INFERENCE__REPOSITORY_MODEL_UNLOAD_RESPONSE__INIT;
    response.model_name = change->name;
    response.isunloaded = true;
    finish_change(call, &response.base);
}

static void on_change_end(struct call *call)
{
    struct change *change = call_state(call);
    if (change && change->request)
        message_free(&change->request->base);
    free(change);
}

#define PATH(method) "/inference.GRPCInferenceService/" method

const struct method service_repository_methods[] = {
    {.path = PATH("RepositoryIndex"), .needs = ACCESS_READ, .on_message = on_repository_index},
    {
        .path = PATH("RepositoryModelLoad"),
        .needs = ACCESS_ADMIN,
        .on_message = on_model_load,
        .on_wake = on_model_load_wake,
        .on_end = on_change_end,
    },
    {
        .path = PATH("RepositoryModelUnload"),
        .needs = ACCESS_ADMIN,
        .on_message = on_model_unload,
        .on_wake = on_model_unload_wake,
        .on_end = on_change_end,
    },
    {0},
};
