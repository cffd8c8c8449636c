// The methods of einsum.v1.Einsum that look at and change the registry. Loading and unloading may
// block, so they run as control tasks.
#include <einsum/v1/einsum.pb-c.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"
#include "message.h"
#include "request.h"
#include "rope.h"
#include "service.h"
#include "weights.h"

enum { PROGRESS_INTERVAL_MS = 100 };

// ---- weights as messages

// A list of Weight messages that owns all that it points to.
struct weight_list {
    Einsum__V1__Weight **weights;
    size_t weights_n, weights_max;
    bool incomplete; // no memory for the rest
};

struct weight_entry {
    Einsum__V1__Weight message;
    Einsum__V1__Recipe recipes[4];
    Einsum__V1__Rope rope;
    struct weight *weight; // a reference: the message borrows its strings
};

static void describe_rope(Einsum__V1__Rope *message, const struct rope_options *rope)
{
    *message = (Einsum__V1__Rope)EINSUM__V1__ROPE__INIT;
    message->theta = rope->theta;
    message->factor = rope->factor;
    message->original_positions_max = rope->original_positions_max;
    message->beta_fast = rope->beta_fast;
    message->beta_slow = rope->beta_slow;
    message->positions_max = rope->positions_max;
    message->cache = (char *)(uintptr_t)rope->cache;
    message->cache_tensor = (char *)(uintptr_t)rope->cache_tensor;
}

static void describe_weight(struct weight_entry *entry, struct weight *weight)
{
    const struct einsum_weight_format *format = &weight->format;
    *entry = (struct weight_entry){.message = EINSUM__V1__WEIGHT__INIT};
    entry->weight = weight_ref(weight);
    Einsum__V1__Weight *message = &entry->message;
    message->name = weight->name;
    message->groups = format->groups;
    message->output_dim = format->output_dim;
    message->reduced_dim = format->reduced_dim;
    message->weight_type = (Einsum__V1__WeightType)format->weight_type;
    message->scale_type = (Einsum__V1__ScaleType)format->scale_type;
    message->block_d = format->block_d;
    message->block_r = format->block_r;
    message->resident_bytes = weight->resident_bytes;
    message->source = weight->source;
    message->tensor_parallel_rank = weight->tensor_parallel_rank;
    message->tensor_parallel_size = weight->tensor_parallel_size;
    message->generation = weight->generation;
    message->damaged = weight_damaged(weight);
    if (weight->rope) {
        describe_rope(&entry->rope, rope_describe(weight->rope));
        message->rope = &entry->rope;
    }
    message->recipes = entry->recipes;
    for (int recipe = EINSUM_RECIPE_1_128_128; recipe <= EINSUM_RECIPE_1_1_32; recipe++)
        if (request_recipe_fits((enum einsum_recipe)recipe, format))
            entry->recipes[message->n_recipes++] = (Einsum__V1__Recipe)recipe;
}

// False: no memory.
static bool list_grow(struct weight_list *list)
{
    if (list->weights_n < list->weights_max)
        return true;
    size_t more = list->weights_max ? 2 * list->weights_max : 64;
    Einsum__V1__Weight **grown = realloc(list->weights, more * sizeof(Einsum__V1__Weight *));
    if (!grown)
        return false;
    list->weights = grown;
    list->weights_max = more;
    return true;
}

static void list_add(void *context, struct weight *weight)
{
    struct weight_list *list = context;
    struct weight_entry *entry =
        !list->incomplete && list_grow(list) ? malloc(sizeof *entry) : NULL;
    list->incomplete = !entry;
    if (!entry)
        return;
    describe_weight(entry, weight);
    list->weights[list->weights_n++] = &entry->message;
}

static void list_deinit(struct weight_list *list)
{
    for (size_t i = 0; i < list->weights_n; i++) {
        struct weight_entry *entry = CONTAINER_OF(list->weights[i], struct weight_entry, message);
        weight_unref(entry->weight);
        free(entry);
    }
    free(list->weights);
}

// ---- ListWeights, GetWeight

static void on_list_weights(struct call *call, grpc_byte_buffer *bytes)
{
    void *request = service_unpack(call, &einsum__v1__list_weights_request__descriptor, bytes);
    if (!request)
        return;
    struct weight_list list = {0};
    weights_visit(call_context(call)->weights, list_add, &list);
    Einsum__V1__ListWeightsResponse response = EINSUM__V1__LIST_WEIGHTS_RESPONSE__INIT;
    response.weights = list.weights;
    response.n_weights = list.weights_n;
    if (list.incomplete)
        service_no_memory(call, "a list of weights");
    else
        call_finish(call, message_pack(&response.base), NULL);
    list_deinit(&list);
    message_free(request);
}

static void on_get_weight(struct call *call, grpc_byte_buffer *bytes)
{
    Einsum__V1__GetWeightRequest *request =
        service_unpack(call, &einsum__v1__get_weight_request__descriptor, bytes);
    if (!request)
        return;
    struct weight *weight =
        weights_get(call_context(call)->weights, request->name, strlen(request->name));
    if (weight) {
        struct weight_entry entry;
        describe_weight(&entry, weight);
        Einsum__V1__GetWeightResponse response = EINSUM__V1__GET_WEIGHT_RESPONSE__INIT;
        response.weight = &entry.message;
        call_finish(call, message_pack(&response.base), NULL);
        weight_unref(entry.weight);
        weight_unref(weight);
    } else {
        struct error err;
        error_field(&err, STATUS_NOT_FOUND, "name", "\"%s\" is not resident", request->name);
        call_finish(call, NULL, &err);
    }
    message_free(&request->base);
}

// ---- UnloadWeights

struct unload {
    struct service_task task;
    Einsum__V1__UnloadWeightsRequest *request;
    // Written by the task.
    char **names;
    size_t names_n;
    bool incomplete; // no memory for the rest
};

static void add_name(void *context, const char *name)
{
    struct unload *unload = context;
    LOG(INFO, "weight unloaded", LOG_STR("name", name));
    char **grown = realloc(unload->names, (unload->names_n + 1) * sizeof *grown);
    if (grown)
        unload->names = grown;
    char *copy = grown ? strdup(name) : NULL;
    if (copy)
        unload->names[unload->names_n++] = copy;
    else
        unload->incomplete = true;
}

static void run_unload(struct service_task *task)
{
    struct unload *unload = CONTAINER_OF(task, struct unload, task);
    struct weights *weights = call_context(task->call)->weights;
    enum status status = STATUS_OK;
    for (size_t i = 0; i < unload->request->n_names && status == STATUS_OK; i++)
        status = weights_unload(weights, unload->request->names[i], add_name, unload, &task->error);
}

static void on_unload_weights(struct call *call, grpc_byte_buffer *bytes)
{
    struct unload *unload = calloc(1, sizeof *unload);
    if (!unload) {
        service_no_memory(call, "an unload");
        return;
    }
    call_set_state(call, unload);
    unload->request = service_unpack(call, &einsum__v1__unload_weights_request__descriptor, bytes);
    if (!unload->request)
        return;
    struct error err;
    if (unload->request->n_names == 0) {
        error_field(&err, STATUS_INVALID_ARGUMENT, "names",
                    "not given; expected at least one name or pattern");
        call_finish(call, NULL, &err);
        return;
    }
    service_task_start(&unload->task, call, run_unload);
}

static void on_unload_wake(struct call *call)
{
    struct unload *unload = call_state(call);
    if (!service_task_done(&unload->task))
        return;
    Einsum__V1__UnloadWeightsResponse response = EINSUM__V1__UNLOAD_WEIGHTS_RESPONSE__INIT;
    response.names = unload->names;
    response.n_names = unload->names_n;
    if (unload->task.error.status != STATUS_OK)
        call_finish(call, NULL, &unload->task.error);
    else if (unload->incomplete)
        service_no_memory(call, "the names of what is unloaded now");
    else
        call_finish(call, message_pack(&response.base), NULL);
}

static void on_unload_end(struct call *call)
{
    struct unload *unload = call_state(call);
    if (!unload)
        return;
    for (size_t i = 0; i < unload->names_n; i++)
        free(unload->names[i]);
    free(unload->names);
    if (unload->request)
        message_free(&unload->request->base);
    free(unload);
}

// ---- LoadWeights

struct load {
    struct service_task task;
    Einsum__V1__LoadWeightsRequest *request;
    _Atomic uint32_t weights_done, weights_total;
    _Atomic uint64_t bytes_done, bytes_total;
    _Atomic uint64_t told_ns;  // when progress was last announced
    bool sending;              // rpc thread
    struct weight_list loaded; // written by the task
};

static bool on_load_progress(void *context, uint32_t weights_done, uint32_t weights_total,
                             uint64_t bytes_done, uint64_t bytes_total)
{
    struct load *load = context;
    atomic_store_explicit(&load->weights_done, weights_done, memory_order_relaxed);
    atomic_store_explicit(&load->weights_total, weights_total, memory_order_relaxed);
    atomic_store_explicit(&load->bytes_done, bytes_done, memory_order_relaxed);
    atomic_store_explicit(&load->bytes_total, bytes_total, memory_order_relaxed);
    uint64_t now = now_ns();
    uint64_t told = atomic_load_explicit(&load->told_ns, memory_order_relaxed);
    if (now - told > (uint64_t)PROGRESS_INTERVAL_MS * 1000000u) {
        atomic_store_explicit(&load->told_ns, now, memory_order_relaxed);
        call_wake(load->task.call);
    }
    return !call_cancelled(load->task.call) &&
           !control_stopping(call_context(load->task.call)->control);
}

static struct rope_options rope_options_of(const Einsum__V1__Rope *message)
{
    return (struct rope_options){
        .theta = message->theta,
        .factor = message->factor,
        .original_positions_max = message->original_positions_max,
        .beta_fast = message->beta_fast,
        .beta_slow = message->beta_slow,
        .positions_max = message->positions_max,
        .cache = message->cache,
        .cache_tensor = message->cache_tensor,
    };
}

static void run_load(struct service_task *task)
{
    struct load *load = CONTAINER_OF(task, struct load, task);
    const Einsum__V1__LoadWeightsRequest *request = load->request;
    struct rope_options rope = {0};
    if (request->rope)
        rope = rope_options_of(request->rope);
    const struct weights_load options = {
        .path = request->path,
        .tensors = (const char *const *)request->tensors,
        .tensors_n = request->n_tensors,
        .name_prefix = request->name_prefix,
        .checksums = request->checksums,
        .tensor_parallel_rank = request->tensor_parallel_rank,
        .tensor_parallel_size = request->tensor_parallel_size,
        .output_dim = request->output_dim,
        .replace = request->replace,
        .rope = request->rope ? &rope : NULL,
        .threads = 1, // serving goes on beside it
        .progress = on_load_progress,
        .progress_context = load,
        .loaded = list_add,
        .loaded_context = &load->loaded,
    };
    uint64_t started_ns = now_ns();
    uint32_t loaded = 0;
    if (weights_load(call_context(task->call)->weights, &options, &loaded, &task->error) ==
        STATUS_OK)
        LOG(INFO, "weights loaded", LOG_STR("path", request->path), LOG_U64("weights", loaded),
            LOG_U64("ms", (now_ns() - started_ns) / 1000000u));
    else
        LOG(WARN, "weights not loaded", LOG_STR("path", request->path),
            LOG_STR("reason", task->error.text));
}

static grpc_byte_buffer *pack_load(const struct load *load, const struct weight_list *weights)
{
    Einsum__V1__LoadWeightsResponse response = EINSUM__V1__LOAD_WEIGHTS_RESPONSE__INIT;
    response.weights_done = atomic_load_explicit(&load->weights_done, memory_order_relaxed);
    response.weights_total = atomic_load_explicit(&load->weights_total, memory_order_relaxed);
    response.bytes_done = atomic_load_explicit(&load->bytes_done, memory_order_relaxed);
    response.bytes_total = atomic_load_explicit(&load->bytes_total, memory_order_relaxed);
    if (weights) {
        response.weights = weights->weights;
        response.n_weights = weights->weights_n;
    }
    return message_pack(&response.base);
}

static void on_load_weights(struct call *call, grpc_byte_buffer *bytes)
{
    struct load *load = calloc(1, sizeof *load);
    if (!load) {
        service_no_memory(call, "a load");
        return;
    }
    load->request = service_unpack(call, &einsum__v1__load_weights_request__descriptor, bytes);
    call_set_state(call, load);
    if (!load->request)
        return;
    service_task_start(&load->task, call, run_load);
}

static void on_load_wake(struct call *call)
{
    struct load *load = call_state(call);
    if (load->sending)
        return; // on_load_sent looks again
    if (!service_task_done(&load->task))
        load->sending = call_send(call, pack_load(load, NULL));
    else if (load->task.error.status != STATUS_OK)
        call_finish(call, NULL, &load->task.error);
    else if (load->loaded.incomplete)
        service_no_memory(call, "the list of what is loaded now");
    else
        call_finish(call, pack_load(load, &load->loaded), NULL);
}

static void on_load_sent(struct call *call)
{
    struct load *load = call_state(call);
    load->sending = false;
    if (service_task_done(&load->task))
        on_load_wake(call);
}

static void on_load_end(struct call *call)
{
    struct load *load = call_state(call);
    if (!load)
        return;
    list_deinit(&load->loaded);
    if (load->request)
        message_free(&load->request->base);
    free(load);
}

const struct method service_weights_methods[] = {
    {.path = "/einsum.v1.Einsum/ListWeights", .needs = ACCESS_READ, .on_message = on_list_weights},
    {.path = "/einsum.v1.Einsum/GetWeight", .needs = ACCESS_READ, .on_message = on_get_weight},
    {
        .path = "/einsum.v1.Einsum/LoadWeights",
        .needs = ACCESS_ADMIN,
        .on_message = on_load_weights,
        .on_wake = on_load_wake,
        .on_sent = on_load_sent,
        .on_end = on_load_end,
    },
    {
        .path = "/einsum.v1.Einsum/UnloadWeights",
        .needs = ACCESS_ADMIN,
        .on_message = on_unload_weights,
        .on_wake = on_unload_wake,
        .on_end = on_unload_end,
    },
    {0},
};
