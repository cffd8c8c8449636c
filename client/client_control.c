// The control calls: weights, self-test, server info, health. Blocking; the caller's thread packs
// and unpacks, except that the progress of a load is unpacked on the client's thread.
//
// Replies are unpacked by protobuf-c, under a cap: a hostile reply of empty submessages swells
// 76-fold. Strings are cleaned and cut on their way into the caller's structs.

#include "client_internal.h"

#include <einsum/v1/einsum.pb-c.h>
#include <grpc/health/v1/health.pb-c.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/slice.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    REPLY_BYTES_MAX = 64 << 20,    // of a control message; some 40000 weights
    UNPACKED_BYTES_MAX = 256 << 20 // that it may take in memory
};

// ---- protobuf-c under a cap ---------------------------------------------------------------------

static void *capped_alloc(void *data, size_t bytes)
{
    size_t *left = data;
    size_t cost = bytes + 32; // what malloc adds, so that many empty messages count
    if (cost > *left)
        return NULL;
    *left -= cost;
    return malloc(bytes ? bytes : 1);
}

static void capped_free(void *data, void *memory)
{
    (void)data;
    free(memory);
}

static ProtobufCAllocator plain_allocator(void)
{
    return (ProtobufCAllocator){.alloc = capped_alloc, .free = capped_free};
}

static void free_message(void *message)
{
    ProtobufCAllocator allocator = plain_allocator();
    if (message)
        protobuf_c_message_free_unpacked(message, &allocator);
}

// Destroys `buffer`. NULL if it is no such message or too large; the error then says so.
static void *unpack(grpc_byte_buffer *buffer, const ProtobufCMessageDescriptor *descriptor,
                    struct einsum_client_error *error)
{
    size_t left = UNPACKED_BYTES_MAX;
    ProtobufCAllocator allocator = plain_allocator();
    allocator.allocator_data = &left;
    void *message = NULL;
    grpc_byte_buffer_reader reader;
    if (grpc_byte_buffer_length(buffer) <= REPLY_BYTES_MAX &&
        grpc_byte_buffer_reader_init(&reader, buffer)) {
        grpc_slice flat = grpc_byte_buffer_reader_readall(&reader);
        message = protobuf_c_message_unpack(descriptor, &allocator, GRPC_SLICE_LENGTH(flat),
                                            GRPC_SLICE_START_PTR(flat));
        grpc_slice_unref(flat);
        grpc_byte_buffer_reader_destroy(&reader);
    }
    grpc_byte_buffer_destroy(buffer);
    if (!message)
        einsum_client_error_set(error, EINSUM_CLIENT_INTERNAL,
                                "the reply is no %s, or is too large to be one",
                                descriptor->short_name);
    return message;
}

static grpc_slice pack(const ProtobufCMessage *message)
{
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    return slice;
}

static struct einsum_client_effort usual_effort(const struct einsum_client *client)
{
    return (struct einsum_client_effort){client->options.deadline_ms, client->options.attempts_max};
}

static struct einsum_client_effort long_effort(const struct einsum_client *client)
{
    return (struct einsum_client_effort){client->options.load_deadline_ms,
                                         client->options.attempts_max};
}

// For what changes the server: tried again after a lost answer, it would find its work done.
static struct einsum_client_effort once_effort(const struct einsum_client *client)
{
    return (struct einsum_client_effort){client->options.deadline_ms, 1};
}

// One call with generated messages; `*reply` is for free_message.
static enum einsum_client_status call_control(struct einsum_client *client, const char *method,
                                              const ProtobufCMessage *request,
                                              struct einsum_client_effort effort,
                                              const ProtobufCMessageDescriptor *reply_descriptor,
                                              void **reply, struct einsum_client_error *error)
{
    if (einsum_client_on_own_thread()) {
        einsum_client_refuse_to_block(error);
        return EINSUM_CLIENT_FAILED_PRECONDITION;
    }
    grpc_byte_buffer *buffer;
    enum einsum_client_status status =
        einsum_client_unary(client, method, pack(request), effort, &buffer, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    *reply = unpack(buffer, reply_descriptor, error);
    return *reply ? EINSUM_CLIENT_OK : EINSUM_CLIENT_INTERNAL;
}

#define COPY_TEXT(to, from) einsum_client_clean_text(to, sizeof(to), from, strlen(from))

// ---- weights ------------------------------------------------------------------------------------

static void copy_rope(struct einsum_client_rope *to, const Einsum__V1__Rope *from)
{
    *to = (struct einsum_client_rope){
        .theta = from->theta,
        .factor = from->factor,
        .original_positions_max = from->original_positions_max,
        .beta_fast = from->beta_fast,
        .beta_slow = from->beta_slow,
        .positions_max = from->positions_max,
    };
    COPY_TEXT(to->cache, from->cache);
    COPY_TEXT(to->cache_tensor, from->cache_tensor);
}

static void copy_weight(struct einsum_client_weight *to, const Einsum__V1__Weight *from)
{
    *to = (struct einsum_client_weight){
        .groups = from->groups,
        .output_dim = from->output_dim,
        .reduced_dim = from->reduced_dim,
        .weight_type = (enum einsum_client_weight_type)(int)from->weight_type,
        .scale_type = (enum einsum_client_scale_type)(int)from->scale_type,
        .block_d = from->block_d,
        .block_r = from->block_r,
        .resident_bytes = from->resident_bytes,
        .tensor_parallel_rank = from->tensor_parallel_rank,
        .tensor_parallel_size = from->tensor_parallel_size,
        .generation = from->generation,
    };
    COPY_TEXT(to->name, from->name);
    COPY_TEXT(to->source, from->source);
    for (size_t i = 0; i < from->n_recipes && i < EINSUM_CLIENT_RECIPES_MAX; i++)
        to->recipes[to->recipes_n++] = (enum einsum_client_recipe)(int)from->recipes[i];
    to->has_rope = from->rope != NULL;
    if (to->has_rope)
        copy_rope(&to->rope, from->rope);
}

static enum einsum_client_status copy_weights(struct einsum_client_weights *to,
                                              Einsum__V1__Weight *const *from, size_t n,
                                              struct einsum_client_error *error)
{
    *to = (struct einsum_client_weights){0};
    if (n == 0)
        return EINSUM_CLIENT_OK;
    to->items = calloc(n, sizeof *to->items);
    if (!to->items)
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
    to->items_n = n;
    for (size_t i = 0; i < n; i++)
        copy_weight(&to->items[i], from[i]);
    return EINSUM_CLIENT_OK;
}

void einsum_client_weights_deinit(struct einsum_client_weights *weights)
{
    free(weights->items);
    *weights = (struct einsum_client_weights){0};
}

enum einsum_client_status einsum_client_list_weights(struct einsum_client *client,
                                                     struct einsum_client_weights *weights,
                                                     struct einsum_client_error *error)
{
    *weights = (struct einsum_client_weights){0};
    Einsum__V1__ListWeightsRequest request = EINSUM__V1__LIST_WEIGHTS_REQUEST__INIT;
    void *message = NULL;
    enum einsum_client_status status =
        call_control(client, "/einsum.v1.Einsum/ListWeights", &request.base, usual_effort(client),
                     &einsum__v1__list_weights_response__descriptor, &message, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    Einsum__V1__ListWeightsResponse *reply = message;
    status = copy_weights(weights, reply->weights, reply->n_weights, error);
    free_message(reply);
    return status;
}

enum einsum_client_status einsum_client_get_weight(struct einsum_client *client, const char *name,
                                                   struct einsum_client_weight *weight,
                                                   struct einsum_client_error *error)
{
    Einsum__V1__GetWeightRequest request = EINSUM__V1__GET_WEIGHT_REQUEST__INIT;
    request.name = (char *)name;
    void *message = NULL;
    enum einsum_client_status status =
        call_control(client, "/einsum.v1.Einsum/GetWeight", &request.base, usual_effort(client),
                     &einsum__v1__get_weight_response__descriptor, &message, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    Einsum__V1__GetWeightResponse *reply = message;
    if (reply->weight)
        copy_weight(weight, reply->weight);
    else
        status = einsum_client_error_set(error, EINSUM_CLIENT_INTERNAL,
                                         "the server said OK and sent no weight");
    free_message(reply);
    return status;
}

enum einsum_client_status einsum_client_unload(struct einsum_client *client,
                                               const char *const *names, size_t names_n,
                                               void (*on_name)(void *context, const char *name),
                                               void *context, struct einsum_client_error *error)
{
    Einsum__V1__UnloadWeightsRequest request = EINSUM__V1__UNLOAD_WEIGHTS_REQUEST__INIT;
    request.names = (char **)names;
    request.n_names = names_n;
    void *message = NULL;
    enum einsum_client_status status =
        call_control(client, "/einsum.v1.Einsum/UnloadWeights", &request.base, once_effort(client),
                     &einsum__v1__unload_weights_response__descriptor, &message, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    Einsum__V1__UnloadWeightsResponse *reply = message;
    for (size_t i = 0; i < reply->n_names && on_name; i++) {
        char name[EINSUM_CLIENT_NAME_BYTES];
        COPY_TEXT(name, reply->names[i]);
        on_name(context, name);
    }
    free_message(reply);
    return EINSUM_CLIENT_OK;
}

// ---- loading: the one call whose replies are a stream ------------------------------------------

struct loading {
    struct einsum_client_tag receive_tag, end_tag;
    struct einsum_client *client;
    const struct einsum_client_load *load;
    grpc_call *call;
    grpc_metadata_array headers;
    struct einsum_client_ending ending;
    grpc_byte_buffer *received;
    Einsum__V1__LoadWeightsResponse *last; // message so far; the final one holds the weights
    struct einsum_client_error broken;     // what this side found wrong; status OK: nothing

    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t tags; // batches not yet completed
};

static void load_tag_out(struct loading *loading)
{
    pthread_mutex_lock(&loading->lock);
    if (--loading->tags == 0)
        pthread_cond_signal(&loading->changed);
    pthread_mutex_unlock(&loading->lock);
}

static void load_receive(struct loading *loading)
{
    loading->received = NULL;
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &loading->received};
    einsum_client_start_batch(loading->call, &op, 1, &loading->receive_tag);
}

static void load_report(struct loading *loading)
{
    const Einsum__V1__LoadWeightsResponse *message = loading->last;
    struct einsum_client_progress progress = {
        .weights_done = message->weights_done,
        .weights_total = message->weights_total,
        .bytes_done = message->bytes_done,
        .bytes_total = message->bytes_total,
    };
    if (loading->load->on_progress &&
        !loading->load->on_progress(loading->load->context, &progress)) {
        einsum_client_error_set(&loading->broken, EINSUM_CLIENT_CANCELLED, "given up");
        grpc_call_cancel(loading->call, NULL);
    }
}

static void on_load_message(struct einsum_client_tag *tag, bool ok)
{
    struct loading *loading = (struct loading *)(void *)tag;
    grpc_byte_buffer *buffer = loading->received;
    if (!ok || !buffer) {
        grpc_byte_buffer_destroy(buffer);
        load_tag_out(loading);
        return;
    }
    if (loading->broken.status == EINSUM_CLIENT_OK) {
        free_message(loading->last);
        loading->last =
            unpack(buffer, &einsum__v1__load_weights_response__descriptor, &loading->broken);
        if (loading->last)
            load_report(loading);
        else
            grpc_call_cancel(loading->call, NULL);
    } else {
        grpc_byte_buffer_destroy(buffer);
    }
    load_receive(loading);
}

static void on_load_end(struct einsum_client_tag *tag, bool ok)
{
    (void)ok;
    load_tag_out((struct loading *)(void *)((char *)tag - offsetof(struct loading, end_tag)));
}

static void load_start(struct loading *loading, grpc_slice request)
{
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&request, 1);
    grpc_slice_unref(request);
    loading->tags = 2; // the two below; the call's own end completes with the second
    loading->receive_tag.on_complete = on_load_message;
    loading->end_tag.on_complete = on_load_end;
    grpc_op ops[] = {
        einsum_client_opening_op(loading->client),
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = message},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA,
         .data.recv_initial_metadata.recv_initial_metadata = &loading->headers},
        einsum_client_ending_op(&loading->ending),
    };
    einsum_client_start_batch(loading->call, ops, sizeof ops / sizeof *ops, &loading->end_tag);
    grpc_byte_buffer_destroy(message);
    load_receive(loading);
}

static enum einsum_client_status load_result(struct loading *loading,
                                             struct einsum_client_weights *weights,
                                             struct einsum_client_error *error)
{
    struct einsum_client_error own;
    struct einsum_client_error *to = einsum_client_error_or(error, &own);
    enum einsum_client_status status = loading->broken.status;
    if (status != EINSUM_CLIENT_OK)
        *to = loading->broken;
    else if (loading->ending.code != GRPC_STATUS_OK)
        status = einsum_client_ending_error(loading->client, &loading->ending, to);
    else if (!loading->last)
        status = einsum_client_error_set(to, EINSUM_CLIENT_INTERNAL,
                                         "the server said OK and sent no weights");
    else if (weights)
        status = copy_weights(weights, loading->last->weights, loading->last->n_weights, to);
    if (status != EINSUM_CLIENT_OK)
        to->attempts = 1;
    return status;
}

static grpc_slice pack_load(const struct einsum_client_load *load)
{
    Einsum__V1__LoadWeightsRequest request = EINSUM__V1__LOAD_WEIGHTS_REQUEST__INIT;
    request.path = (char *)load->path;
    request.tensors = (char **)load->tensors;
    request.n_tensors = load->tensors_n;
    request.name_prefix = (char *)(load->name_prefix ? load->name_prefix : "");
    request.checksums = (char *)(load->checksums ? load->checksums : "");
    request.tensor_parallel_rank = load->tensor_parallel_rank;
    request.tensor_parallel_size = load->tensor_parallel_size;
    request.output_dim = load->output_dim;
    request.replace = load->replace;
    Einsum__V1__Rope rope = EINSUM__V1__ROPE__INIT;
    if (load->rope) {
        rope.theta = load->rope->theta;
        rope.factor = load->rope->factor;
        rope.original_positions_max = load->rope->original_positions_max;
        rope.beta_fast = load->rope->beta_fast;
        rope.beta_slow = load->rope->beta_slow;
        rope.positions_max = load->rope->positions_max;
        rope.cache = (char *)load->rope->cache;
        rope.cache_tensor = (char *)load->rope->cache_tensor;
        request.rope = &rope;
    }
    return pack(&request.base);
}

enum einsum_client_status einsum_client_load(struct einsum_client *client,
                                             const struct einsum_client_load *load,
                                             struct einsum_client_weights *weights,
                                             struct einsum_client_error *error)
{
    if (weights)
        *weights = (struct einsum_client_weights){0};
    if (einsum_client_on_own_thread())
        return einsum_client_refuse_to_block(error);
    struct loading loading = {.client = client, .load = load};
    uint64_t deadline_ns = einsum_client_deadline_after(client->options.load_deadline_ms);
    loading.call = einsum_client_open_call(client, "/einsum.v1.Einsum/LoadWeights",
                                           einsum_client_deadline(deadline_ns));
    einsum_client_ending_init(&loading.ending);
    grpc_metadata_array_init(&loading.headers);
    pthread_mutex_init(&loading.lock, NULL);
    pthread_cond_init(&loading.changed, NULL);
    load_start(&loading, pack_load(load));

    pthread_mutex_lock(&loading.lock);
    while (loading.tags > 0)
        pthread_cond_wait(&loading.changed, &loading.lock);
    pthread_mutex_unlock(&loading.lock);
    enum einsum_client_status status = load_result(&loading, weights, error);

    grpc_call_unref(loading.call); // after the trailers were read: they are the call's
    free_message(loading.last);
    pthread_cond_destroy(&loading.changed);
    pthread_mutex_destroy(&loading.lock);
    grpc_metadata_array_destroy(&loading.headers);
    einsum_client_ending_deinit(&loading.ending);
    return status;
}

// ---- self-test, info, health --------------------------------------------------------------------

static void report_result(const Einsum__V1__SelfTestResult *from,
                          void (*on_result)(void *context,
                                            const struct einsum_client_selftest_result *result),
                          void *context)
{
    struct einsum_client_selftest_result result = {
        .passed = from->passed,
        .worst_error_ratio = from->worst_error_ratio,
        .elements_checked = from->elements_checked,
        .duration_ns = from->duration_ns,
    };
    COPY_TEXT(result.weight, from->weight);
    COPY_TEXT(result.message, from->message);
    on_result(context, &result);
}

enum einsum_client_status einsum_client_self_test(
    struct einsum_client *client, const char *weight, const char *kernel, bool *passed,
    void (*on_result)(void *context, const struct einsum_client_selftest_result *result),
    void *context, struct einsum_client_error *error)
{
    *passed = false;
    Einsum__V1__SelfTestRequest request = EINSUM__V1__SELF_TEST_REQUEST__INIT;
    request.weight = (char *)(weight ? weight : "");
    request.kernel = (char *)(kernel ? kernel : "");
    void *message = NULL;
    enum einsum_client_status status =
        call_control(client, "/einsum.v1.Einsum/SelfTest", &request.base, long_effort(client),
                     &einsum__v1__self_test_response__descriptor, &message, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    Einsum__V1__SelfTestResponse *reply = message;
    *passed = reply->passed;
    for (size_t i = 0; i < reply->n_results && on_result; i++)
        report_result(reply->results[i], on_result, context);
    free_message(reply);
    return EINSUM_CLIENT_OK;
}

static void copy_limits(struct einsum_client_info *info, const Einsum__V1__Limits *from)
{
    info->limits.request_tokens_max = from->request_tokens_max;
    info->limits.batch_tokens_max = from->batch_tokens_max;
    info->limits.request_bytes_max = from->request_bytes_max;
    info->limits.reply_bytes_max = from->reply_bytes_max;
    info->limits.queue_requests_max = from->queue_requests_max;
    info->limits.queue_bytes_max = from->queue_bytes_max;
    info->limits.connections_max = from->connections_max;
    info->limits.stream_requests_max = from->stream_requests_max;
    info->limits.deadline_ms_max = from->deadline_ms_max;
    info->limits.connection_requests_max = from->connection_requests_max;
    info->limits.cut_bytes_max = from->cut_bytes_max;
}

static void copy_counters(struct einsum_client_info *info, const Einsum__V1__Counters *from)
{
    info->counters.requests = from->requests;
    info->counters.answered = from->answered;
    info->counters.refused = from->refused;
    info->counters.invalid = from->invalid;
    info->counters.expired = from->expired;
    info->counters.cancelled = from->cancelled;
    info->counters.failed = from->failed;
    info->counters.batches = from->batches;
    info->counters.batch_tokens = from->batch_tokens;
    info->counters.batch_padding_tokens = from->batch_padding_tokens;
    info->counters.batch_requests = from->batch_requests;
    info->counters.busy_ns = from->busy_ns;
    info->counters.connections = from->connections;
    info->counters.connections_refused = from->connections_refused;
    info->counters.queue_ns = from->queue_ns;
    info->counters.phase_batches = from->phase_batches;
    info->counters.copy_in_ns = from->copy_in_ns;
    info->counters.kernel_ns = from->kernel_ns;
    info->counters.copy_out_ns = from->copy_out_ns;
    info->counters.graph_replays = from->graph_replays;
    info->counters.eager_launches = from->eager_launches;
    info->counters.copied_in_bytes = from->copied_in_bytes;
    info->counters.copied_out_bytes = from->copied_out_bytes;
    info->counters.shared_requests = from->shared_requests;
    info->counters.ring_requests = from->ring_requests;
    for (size_t i = 0; i < from->n_bucket_batches && i < EINSUM_CLIENT_BUCKETS_MAX; i++)
        info->counters.bucket_batches[i] = from->bucket_batches[i];
}

static void copy_memory(struct einsum_client_info *info, const Einsum__V1__Memory *from)
{
    info->memory.weights_bytes = from->weights_bytes;
    info->memory.batches_bytes = from->batches_bytes;
    info->memory.scratch_bytes = from->scratch_bytes;
    info->memory.lanes_bytes = from->lanes_bytes;
    info->memory.graphs_bytes = from->graphs_bytes;
    for (size_t i = 0; i < from->n_graphs && i < EINSUM_CLIENT_BUCKETS_MAX; i++) {
        const Einsum__V1__BucketGraphs *graphs = from->graphs[i];
        info->memory.graphs[i].bucket = graphs->bucket;
        info->memory.graphs[i].graphs = graphs->graphs;
        info->memory.graphs[i].device_bytes = graphs->device_bytes;
        info->memory.graphs_n++;
    }
}

static void copy_shared_memory(struct einsum_client_info *info,
                               const Einsum__V1__SharedMemory *from)
{
    COPY_TEXT(info->shared_memory.socket, from->socket);
    info->shared_memory.direct = from->direct;
    info->shared_memory.cuda = from->cuda;
    info->shared_memory.connections_max = from->connections_max;
    info->shared_memory.connection_regions_max = from->connection_regions_max;
    info->shared_memory.regions_max = from->regions_max;
    info->shared_memory.ring_entries_max = from->ring_entries_max;
    info->shared_memory.region_bytes_max = from->region_bytes_max;
    info->shared_memory.regions_bytes_max = from->regions_bytes_max;
    info->shared_memory.connections = from->connections;
    info->shared_memory.regions = from->regions;
    info->shared_memory.rings = from->rings;
    info->shared_memory.connections_refused = from->connections_refused;
    info->shared_memory.regions_bytes = from->regions_bytes;
}

static void copy_info(struct einsum_client_info *info, const Einsum__V1__ServerInfoResponse *from)
{
    memset(info, 0, sizeof *info);
    COPY_TEXT(info->version, from->version);
    COPY_TEXT(info->engine, from->engine);
    COPY_TEXT(info->device, from->device);
    COPY_TEXT(info->kernel, from->kernel);
    COPY_TEXT(info->state, from->state);
    info->engine_threads = from->engine_threads;
    info->lanes = from->lanes;
    info->uptime_ns = from->uptime_ns;
    for (size_t i = 0; i < from->n_buckets && i < EINSUM_CLIENT_BUCKETS_MAX; i++)
        info->buckets[info->buckets_n++] = from->buckets[i];
    if (from->limits)
        copy_limits(info, from->limits);
    if (from->memory)
        copy_memory(info, from->memory);
    if (from->counters)
        copy_counters(info, from->counters);
    if (from->shared_memory)
        copy_shared_memory(info, from->shared_memory);
    for (size_t i = 0; i < from->n_libraries && i < EINSUM_CLIENT_LIBRARIES_MAX; i++) {
        struct einsum_client_library *library = &info->libraries[info->libraries_n++];
        COPY_TEXT(library->name, from->libraries[i]->name);
        COPY_TEXT(library->version, from->libraries[i]->version);
    }
    size_t kernels_n = from->n_kernels;
    if (kernels_n > EINSUM_CLIENT_KERNELS_MAX)
        kernels_n = EINSUM_CLIENT_KERNELS_MAX;
    for (size_t i = 0; i < kernels_n; i++)
        COPY_TEXT(info->kernels[i], from->kernels[i]);
    info->kernels_n = (uint32_t)kernels_n;
}

enum einsum_client_status einsum_client_server_info(struct einsum_client *client,
                                                    struct einsum_client_info *info,
                                                    struct einsum_client_error *error)
{
    Einsum__V1__ServerInfoRequest request = EINSUM__V1__SERVER_INFO_REQUEST__INIT;
    void *message = NULL;
    enum einsum_client_status status =
        call_control(client, "/einsum.v1.Einsum/ServerInfo", &request.base, usual_effort(client),
                     &einsum__v1__server_info_response__descriptor, &message, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    Einsum__V1__ServerInfoResponse *reply = message;
    copy_info(info, reply);
    free_message(reply);
    return EINSUM_CLIENT_OK;
}

enum einsum_client_status einsum_client_check_health(struct einsum_client *client,
                                                     const char *service,
                                                     enum einsum_client_health *health,
                                                     struct einsum_client_error *error)
{
    *health = EINSUM_CLIENT_HEALTH_UNKNOWN;
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)(service ? service : "");
    void *message = NULL;
    enum einsum_client_status status =
        call_control(client, "/grpc.health.v1.Health/Check", &request.base, usual_effort(client),
                     &grpc__health__v1__health_check_response__descriptor, &message, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    Grpc__Health__V1__HealthCheckResponse *reply = message;
    *health = (enum einsum_client_health)(int)reply->status;
    free_message(reply);
    return EINSUM_CLIENT_OK;
}
