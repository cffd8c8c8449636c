// Memory of others in which operands may lie: host memory that is registered, pinned where it is and
// mapped by the device; and memory on the device that another process has exported.
//
//     registered   [ host, bytes, mapped ][ ... ]     by host address; looked up once for each segment
//
// The lock is held for a search or a move of the table, never for a call of CUDA.
#include "engine_cuda_internal.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include <cuda.h>

_Static_assert((int)ENGINE_HANDLE_BYTES == (int)sizeof(cudaIpcMemHandle_t), "a handle's bytes");

// ---- registered

// Where in the table memory at this address stands or would stand: before the first that begins
// behind it.
static uint32_t place_of_locked(const struct engine *engine, const void *host)
{
    uint32_t low = 0, high = engine->registered_n;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if ((uintptr_t)engine->registered[middle].host <= (uintptr_t)host)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

void *engine_cuda_registered(struct engine *engine, const void *host)
{
    pthread_mutex_lock(&engine->registered_lock);
    uint32_t place = place_of_locked(engine, host);
    ASSERT(place > 0); // else it is memory that nobody has registered
    const struct registered *it = &engine->registered[place - 1];
    uint64_t offset = (uint64_t)((uintptr_t)host - (uintptr_t)it->host);
    ASSERT(offset < it->bytes);
    void *mapped = it->mapped + offset;
    pthread_mutex_unlock(&engine->registered_lock);
    return mapped;
}

NODISCARD static bool has_room_locked(struct engine *engine)
{
    if (engine->registered_n < engine->registered_room)
        return true;
    uint32_t room = engine->registered_room ? 2 * engine->registered_room : 16;
    struct registered *grown = realloc(engine->registered, room * sizeof *grown);
    if (!grown)
        return false;
    engine->registered = grown;
    engine->registered_room = room;
    return true;
}

NODISCARD static bool note(struct engine *engine, const struct registered *added)
{
    pthread_mutex_lock(&engine->registered_lock);
    bool fits = has_room_locked(engine);
    if (fits) {
        uint32_t place = place_of_locked(engine, added->host);
        struct registered *at = &engine->registered[place];
        memmove(at + 1, at, (engine->registered_n++ - place) * sizeof *at);
        *at = *added;
    }
    pthread_mutex_unlock(&engine->registered_lock);
    return fits;
}

enum status engine_cuda_memory_register(struct engine *engine, void *memory, uint64_t bytes,
                                        struct error *err)
{
    void *mapped = NULL;
    cudaError_t error = cudaSetDevice(engine->device);
    if (error == cudaSuccess)
        error = cudaHostRegister(memory, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (error != cudaSuccess)
        goto fail;
    error = cudaHostGetDevicePointer(&mapped, memory, 0);
    if (error != cudaSuccess)
        goto unregister;
    const struct registered added = {.host = memory, .mapped = mapped, .bytes = bytes};
    if (note(engine, &added))
        return STATUS_OK;
    cudaHostUnregister(memory);
    return engine_cuda_out_of_memory(err, "the table of registered memory");

unregister:
    cudaHostUnregister(memory);
fail:
    cudaGetLastError(); // that it cannot be pinned is not sticky
    return engine_cuda_failed(error, "registering memory", err);
}

void engine_cuda_memory_unregister(struct engine *engine, void *memory, uint64_t bytes)
{
    pthread_mutex_lock(&engine->registered_lock);
    uint32_t place = place_of_locked(engine, memory);
    ASSERT(place > 0);
    struct registered *at = &engine->registered[place - 1];
    ASSERT(at->host == memory && at->bytes == bytes);
    memmove(at, at + 1, (--engine->registered_n - (place - 1)) * sizeof *at);
    pthread_mutex_unlock(&engine->registered_lock);
    cudaSetDevice(engine->device);
    cudaHostUnregister(memory);
    cudaGetLastError();
}

// ---- imported

typedef CUresult address_range(CUdeviceptr *begin, size_t *bytes, CUdeviceptr address);

// How many bytes there are from an address on, by the driver: what a caller says of it is no measure.
static cudaError_t extent_of(const void *memory, uint64_t *bytes)
{
    void *found = NULL;
    enum cudaDriverEntryPointQueryResult how;
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &found, 12000,
                                                         cudaEnableDefault, &how);
    if (error != cudaSuccess)
        return error;
    if (!found)
        return cudaErrorNotSupported;
    CUdeviceptr begin = 0, address = (uintptr_t)memory;
    size_t all = 0;
    if (((address_range *)(uintptr_t)found)(&begin, &all, address) != CUDA_SUCCESS)
        return cudaErrorInvalidDevicePointer;
    *bytes = address - begin < all ? all - (address - begin) : 0;
    return cudaSuccess;
}

NODISCARD static enum status cannot(cudaError_t error, const char *what, struct error *err)
{
    cudaGetLastError(); // nothing of this is sticky
    return error_field(err,
                       error == cudaErrorMemoryAllocation ? STATUS_RESOURCE_EXHAUSTED
                                                          : STATUS_FAILED_PRECONDITION,
                       "handle", "%s: %s", what, cudaGetErrorString(error));
}

NODISCARD static enum status check_imported(const struct engine *engine, const void *memory,
                                            uint64_t bytes, struct error *err)
{
    struct cudaPointerAttributes attributes;
    uint64_t there = 0;
    cudaError_t error = cudaPointerGetAttributes(&attributes, memory);
    if (error == cudaSuccess)
        error = extent_of(memory, &there);
    if (error != cudaSuccess)
        return cannot(error, "what it is of cannot be told", err);
    if (attributes.type != cudaMemoryTypeDevice || attributes.device != engine->device)
        return error_field(err, STATUS_FAILED_PRECONDITION, "handle",
                           "of memory on device %d, but the engine computes on %d",
                           attributes.device, engine->device);
    if (bytes > there)
        return error_field(err, STATUS_INVALID_ARGUMENT, "bytes",
                           "%" PRIu64 ", but the handle is of %" PRIu64, bytes, there);
    return STATUS_OK;
}

enum status engine_cuda_memory_import(struct engine *engine,
                                      const uint8_t handle[ENGINE_HANDLE_BYTES], uint64_t bytes,
                                      void **memory, struct error *err)
{
    cudaIpcMemHandle_t own;
    memcpy(&own, handle, sizeof own);
    cudaError_t error = cudaSetDevice(engine->device);
    if (error == cudaSuccess)
        error = cudaIpcOpenMemHandle(memory, own, cudaIpcMemLazyEnablePeerAccess);
    if (error != cudaSuccess)
        return cannot(error, "cannot be opened", err);
    enum status status = check_imported(engine, *memory, bytes, err);
    if (status != STATUS_OK)
        engine_cuda_memory_forget(engine, *memory);
    return status;
}

void engine_cuda_memory_forget(struct engine *engine, void *memory)
{
    cudaSetDevice(engine->device);
    cudaIpcCloseMemHandle(memory);
    cudaGetLastError();
}
