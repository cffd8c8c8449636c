// Memory on the GPU that the daemon computes on, registered by the handle under which this process has
// exported it. Nothing here calls CUDA or reads what lies there: addresses are compared, handles
// passed on.

#include <string.h>
#include <unistd.h>

#include "client_shared.h"

// ---- places -------------------------------------------------------------------------------------

struct tensor {
    const void *memory;
    uint64_t bytes, *offset;
};
enum { TENSORS = 3 };

// Those that a request has; what it does not ask for has no bytes.
static void tensors_of(const struct einsum_client_request *request,
                       struct einsum_client_place *place, struct tensor out[TENSORS])
{
    const struct einsum_client_tensors tensors = einsum_client_tensors_of(request);
    place->activations_bytes = tensors.first.bytes;
    place->scales_bytes = tensors.second.bytes;
    place->output_bytes = request->digest_only || !request->output ? 0 : request->output_bytes;
    out[0] = (struct tensor){tensors.first.data, tensors.first.bytes, &place->activations_offset};
    out[1] = (struct tensor){tensors.second.data, tensors.second.bytes, &place->scales_offset};
    out[2] = (struct tensor){request->output, place->output_bytes, &place->output_offset};
}

static bool lies_in(const struct einsum_client_cuda *cuda, const struct tensor *tensor)
{
    return cuda->begin && einsum_client_offset_of(cuda->begin, cuda->bytes, tensor->memory,
                                                  tensor->bytes, tensor->offset);
}

bool einsum_client_cuda_place(struct einsum_client_shared *shared,
                              const struct einsum_client_request *request,
                              struct einsum_client_place *place)
{
    struct tensor tensors[TENSORS];
    struct einsum_client_place found = {0};
    tensors_of(request, &found, tensors);
    pthread_mutex_lock(&shared->link_lock);
    for (uint32_t i = 0; i < shared->cuda_n && !found.given; i++) {
        const struct einsum_client_cuda *cuda = &shared->cuda[i];
        bool all = cuda->region != EINSUM_CLIENT_NO_REGION;
        for (int t = 0; t < TENSORS && all; t++)
            all = tensors[t].bytes == 0 || lies_in(cuda, &tensors[t]);
        if (!all || tensors[0].bytes == 0)
            continue;
        memcpy(found.region, cuda->name, sizeof found.region);
        found.cuda = i + 1;
        found.given = true;
    }
    pthread_mutex_unlock(&shared->link_lock);
    if (found.given)
        *place = found;
    return found.given;
}

static bool begins_in(const struct einsum_client_cuda *cuda, const void *memory)
{
    return cuda->begin && (uintptr_t)memory - cuda->begin < cuda->bytes;
}

enum einsum_client_status einsum_client_cuda_check(const struct einsum_client *client,
                                                   const struct einsum_client_request *request,
                                                   const struct einsum_client_place *place,
                                                   struct einsum_client_error *error)
{
    struct einsum_client_shared *shared = client->shared;
    if (!shared || shared->cuda_n == 0 || (place && place->given))
        return EINSUM_CLIENT_OK;
    struct tensor tensors[TENSORS];
    struct einsum_client_place unused = {0};
    tensors_of(request, &unused, tensors);
    bool touches = false;
    pthread_mutex_lock(&shared->link_lock);
    for (uint32_t i = 0; i < shared->cuda_n; i++)
        for (int t = 0; t < TENSORS; t++)
            touches = touches || begins_in(&shared->cuda[i], tensors[t].memory);
    bool connected = shared->socket >= 0;
    pthread_mutex_unlock(&shared->link_lock);
    if (!touches)
        return EINSUM_CLIENT_OK;
    if (!connected)
        return einsum_client_error_set(error, EINSUM_CLIENT_UNAVAILABLE,
                                       "the connection for shared memory was lost, by which alone "
                                       "CUDA memory goes");
    return einsum_client_error_set(
        error, EINSUM_CLIENT_INVALID_ARGUMENT,
        "a tensor lies in CUDA memory: all of the request must lie there "
        "then, within one registered memory, at multiples of 64 bytes, "
        "and go by no stream");
}

// ---- registered ---------------------------------------------------------------------------------

static enum einsum_client_status register_one(struct einsum_client_shared *shared, int socket,
                                              struct einsum_client_cuda *cuda,
                                              struct einsum_client_error *error)
{
    struct einsum_shared_request request = {
        .magic = EINSUM_SHARED_MAGIC, .op = EINSUM_SHARED_CUDA, .bytes = cuda->bytes};
    struct einsum_shared_reply reply;
    int fd;
    memcpy(request.text, cuda->handle, sizeof cuda->handle);
    enum einsum_client_status status =
        einsum_client_shared_ask(shared, socket, &request, -1, &reply, &fd, error);
    if (fd >= 0)
        close(fd);
    cuda->region = status == EINSUM_CLIENT_OK ? reply.number : EINSUM_CLIENT_NO_REGION;
    memcpy(cuda->name, reply.name, sizeof cuda->name);
    return status;
}

// What is refused now stays known: requests for it fail, and nothing is read where it lies.
void einsum_client_cuda_connect(struct einsum_client_shared *shared, int socket,
                                struct einsum_client_cuda regions[EINSUM_CLIENT_CUDA_MAX])
{
    memcpy(regions, shared->cuda, sizeof shared->cuda);
    for (uint32_t i = 0; i < shared->cuda_n; i++)
        if (regions[i].begin)
            (void)register_one(shared, socket, &regions[i], NULL);
}

// The first that is free; NULL: none. The caller holds link_lock.
static struct einsum_client_cuda *free_place(struct einsum_client_shared *shared)
{
    for (uint32_t i = 0; i < EINSUM_CLIENT_CUDA_MAX; i++)
        if (!shared->cuda[i].begin)
            return &shared->cuda[i];
    return NULL;
}

static void set_place(struct einsum_client_shared *shared, struct einsum_client_cuda *place,
                      const struct einsum_client_cuda *cuda)
{
    uint32_t n = (uint32_t)(place - shared->cuda) + 1;
    pthread_mutex_lock(&shared->lock);
    *place = *cuda;
    if (shared->cuda_n < n)
        shared->cuda_n = n;
    pthread_mutex_unlock(&shared->lock);
}

enum einsum_client_status einsum_client_memory_import_cuda(struct einsum_client *client,
                                                           const void *memory, uint64_t bytes,
                                                           const void *handle,
                                                           struct einsum_client_error *error)
{
    struct einsum_client_shared *shared = client->shared;
    if (!memory || bytes == 0 || !handle || bytes > UINTPTR_MAX - (uintptr_t)memory)
        return einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT,
                                       "CUDA memory: an address, bytes and a handle are needed");
    if (!shared)
        return einsum_client_error_set(error, EINSUM_CLIENT_FAILED_PRECONDITION,
                                       "CUDA memory: this client shares no memory");
    struct einsum_client_cuda cuda = {.begin = (uintptr_t)memory, .bytes = bytes};
    memcpy(cuda.handle, handle, sizeof cuda.handle);
    enum einsum_client_status status;
    pthread_mutex_lock(&shared->link_lock);
    struct einsum_client_cuda *place = free_place(shared);
    if (!place)
        status = einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED,
                                         "CUDA memory: %d are registered, no more may be",
                                         EINSUM_CLIENT_CUDA_MAX);
    else if (shared->socket < 0)
        status = einsum_client_error_set(error, EINSUM_CLIENT_UNAVAILABLE,
                                         "CUDA memory: the connection for shared memory was lost");
    else
        status = register_one(shared, shared->socket, &cuda, error);
    if (place && status == EINSUM_CLIENT_OK)
        set_place(shared, place, &cuda);
    pthread_mutex_unlock(&shared->link_lock);
    return status;
}

void einsum_client_memory_forget_cuda(struct einsum_client *client, const void *memory)
{
    struct einsum_client_shared *shared = client->shared;
    if (!shared || !memory)
        return;
    static const struct einsum_client_cuda none = {.region = EINSUM_CLIENT_NO_REGION};
    pthread_mutex_lock(&shared->link_lock);
    for (uint32_t i = 0; i < shared->cuda_n; i++) {
        struct einsum_client_cuda *cuda = &shared->cuda[i];
        if (cuda->begin != (uintptr_t)memory)
            continue;
        struct einsum_shared_request request = {
            .magic = EINSUM_SHARED_MAGIC, .op = EINSUM_SHARED_FORGET, .region = cuda->region};
        struct einsum_shared_reply reply;
        int fd = -1;
        if (shared->socket >= 0 && cuda->region != EINSUM_CLIENT_NO_REGION)
            (void)einsum_client_shared_ask(shared, shared->socket, &request, -1, &reply, &fd, NULL);
        if (fd >= 0)
            close(fd);
        set_place(shared, cuda, &none);
    }
    pthread_mutex_unlock(&shared->link_lock);
}
