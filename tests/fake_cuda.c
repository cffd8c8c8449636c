// The CUDA runtime, as far as the CUDA engine calls it. See fake_cuda.h.
//
// Threads: calls on any; operations on the device thread, outside the lock, one at a time. Which
// stream goes next is random, and so are the pauses between.
#include "fake_cuda.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cuda.h>

#include "server/base.h"

enum { BLOCKS_MAX = 1024, STREAMS_MAX = 64, EXPORTS_MAX = 16, GRAPH_DEVICE_BYTES = 64 << 10 };
static const uint64_t address_space_bytes = (uint64_t)1 << 33;

// Memory that the device reaches: its own, or the host's, pinned.
struct block {
    uint64_t address; // the device's; 0: pinned, not mapped
    unsigned char *memory;
    uint64_t bytes;
    bool device, registered; // its own; the caller's, pinned
    uint32_t opened;         // how often, if it is another process's; it is `device` then
};

// Of another process.
struct export
{
    unsigned char *memory; // where its allocation begins
    uint64_t bytes, begin;
    int device;
};

enum kind { KIND_COPY, KIND_SET, KIND_EVENT, KIND_KERNEL };

struct operation {
    struct operation *next;
    enum kind kind;
    void *to;
    const void *from;
    uint64_t bytes;
    int value;
    struct CUevent_st *event;
    fake_cuda_kernel *run;
    _Alignas(16) unsigned char arguments[FAKE_CUDA_ARGUMENT_BYTES];
};

struct CUgraph_st {
    struct operation *first, **last;
};

struct CUgraphExec_st {
    struct CUgraph_st *graph;
};

struct CUstream_st {
    struct operation *first, **last;
    bool running; // one of its operations
    struct CUgraph_st *capturing;
    fake_cuda_kernel *newest; // of its operations
};

struct CUevent_st {
    bool timing, destroyed;
    uint32_t pending; // records that have not run
    uint64_t ran_ns;
};

// Of one kind of thing that can be made to fail.
struct fault {
    uint32_t seen, at; // at: 0 is never
    cudaError_t error;
    bool sticky;
};

static struct {
    pthread_mutex_t lock; // guards all that follows
    pthread_cond_t changed;
    pthread_t thread;
    bool started, stopping, held;
    struct fake_cuda_device device;
    uint64_t random;
    unsigned char *addresses; // nothing lies there
    uint64_t address_next;
    struct block blocks[BLOCKS_MAX];
    uint32_t blocks_n;
    struct export exports[EXPORTS_MAX];
    uint32_t exports_n;
    struct CUstream_st *streams[STREAMS_MAX];
    uint32_t streams_n, events_n, graphs_n, execs_n;
    struct fault calls, allocations, operations;
    const char *failed_call;
    cudaError_t sticky;
} fake = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

// Kept until it is asked for, and then taken for a kernel's that was launched in between.
static _Thread_local cudaError_t last_error;

static uint64_t random_next_locked(void)
{
    fake.random ^= fake.random << 13;
    fake.random ^= fake.random >> 7;
    fake.random ^= fake.random << 17;
    return fake.random;
}

// ---- start

static const struct fake_cuda_device usual_device = {
    .driver = CUDART_VERSION,
    .devices = 1,
    .major = 9,
    .sm_count = 16,
    .memory_bytes = (uint64_t)1 << 30,
};

static void *device_run(void *argument);

static void start_locked(const struct fake_cuda_device *device, uint64_t seed)
{
    fake.device = *device;
    fake.random = seed | 1;
    fake.sticky = last_error = cudaSuccess;
    fake.stopping = fake.held = false;
    fake.address_next = 0;
    if (!fake.addresses)
        fake.addresses = mmap(NULL, address_space_bytes, PROT_NONE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ASSERT(fake.addresses != MAP_FAILED);
    fake.started = true;
    int failed = pthread_create(&fake.thread, NULL, device_run, NULL);
    ASSERT(failed == 0);
}

// ---- faults

static bool strikes(struct fault *fault)
{
    return ++fault->seen == fault->at;
}

static cudaError_t fail_locked(const char *name, const struct fault *fault)
{
    if (name)
        fake.failed_call = name;
    if (fault->sticky)
        fake.sticky = fault->error;
    pthread_cond_broadcast(&fake.changed);
    return fault->error;
}

// How every call that can fail begins: with the lock taken, whatever it returns.
static cudaError_t enter(const char *name)
{
    pthread_mutex_lock(&fake.lock);
    if (!fake.started)
        start_locked(&usual_device, now_ns());
    bool struck = strikes(&fake.calls);
    if (fake.sticky != cudaSuccess)
        return fake.sticky;
    return struck ? fail_locked(name, &fake.calls) : cudaSuccess;
}

static cudaError_t enter_allocation(const char *name)
{
    cudaError_t error = enter(name);
    if (error == cudaSuccess && strikes(&fake.allocations))
        error = fail_locked(name, &fake.allocations);
    return error;
}

static cudaError_t leave(cudaError_t error)
{
    if (error != cudaSuccess)
        last_error = error;
    pthread_mutex_unlock(&fake.lock);
    return error;
}

static void arm(struct fault *fault, uint32_t at, cudaError_t error, bool sticky)
{
    pthread_mutex_lock(&fake.lock);
    fake.calls = fake.allocations = fake.operations = (struct fault){0};
    *fault = (struct fault){.at = at, .error = error, .sticky = sticky};
    fake.failed_call = NULL;
    pthread_mutex_unlock(&fake.lock);
}

void fake_cuda_fail_call(uint32_t n, cudaError_t error, bool sticky)
{
    arm(&fake.calls, n, error, sticky);
}

void fake_cuda_fail_allocation(uint32_t n)
{
    arm(&fake.allocations, n, cudaErrorMemoryAllocation, false);
}

void fake_cuda_fail_operation(uint32_t n, cudaError_t error)
{
    arm(&fake.operations, n, error, true);
}

static uint32_t seen(const struct fault *fault)
{
    pthread_mutex_lock(&fake.lock);
    uint32_t n = fault->seen;
    pthread_mutex_unlock(&fake.lock);
    return n;
}

uint32_t fake_cuda_calls(void)
{
    return seen(&fake.calls);
}

uint32_t fake_cuda_allocations(void)
{
    return seen(&fake.allocations);
}

uint32_t fake_cuda_operations(void)
{
    return seen(&fake.operations);
}

const char *fake_cuda_failed_call(void)
{
    return fake.failed_call;
}

void fake_cuda_hold(bool held)
{
    pthread_mutex_lock(&fake.lock);
    fake.held = held;
    pthread_cond_broadcast(&fake.changed);
    pthread_mutex_unlock(&fake.lock);
}

// ---- memory

static struct block *block_at_locked(uint64_t address, uint64_t bytes)
{
    for (uint32_t i = 0; i < fake.blocks_n; i++) {
        struct block *block = &fake.blocks[i];
        if (block->address && address >= block->address &&
            address - block->address <= block->bytes &&
            bytes <= block->bytes - (address - block->address))
            return block;
    }
    return NULL;
}

static struct block *host_block_locked(const void *memory, uint64_t bytes)
{
    for (uint32_t i = 0; i < fake.blocks_n; i++) {
        struct block *block = &fake.blocks[i];
        uint64_t offset = (uint64_t)((uintptr_t)memory - (uintptr_t)block->memory);
        if (!block->device && offset <= block->bytes && bytes <= block->bytes - offset)
            return block;
    }
    return NULL;
}

static void *at_locked(uint64_t address, uint64_t bytes)
{
    struct block *block = block_at_locked(address, bytes);
    ASSERT(block); // else the device touches what is not there, or not all there
    return block->memory + (address - block->address);
}

void *fake_cuda_at(uint64_t address, uint64_t bytes)
{
    pthread_mutex_lock(&fake.lock);
    void *memory = at_locked(address, bytes);
    pthread_mutex_unlock(&fake.lock);
    return memory;
}

static struct block *add_block_locked(void *memory, uint64_t bytes, bool mapped)
{
    ASSERT(fake.blocks_n < BLOCKS_MAX);
    ASSERT(memory && bytes > 0);
    struct block *block = &fake.blocks[fake.blocks_n++];
    *block = (struct block){.memory = memory, .bytes = bytes};
    if (mapped) {
        block->address = (uintptr_t)fake.addresses + fake.address_next;
        fake.address_next += align_up(bytes, 4096) + 4096; // a gap, so that overruns hit nothing
        ASSERT(fake.address_next <= address_space_bytes);
    }
    return block;
}

static void remove_block_locked(struct block *block)
{
    if (!block->registered && !block->opened)
        munmap(block->memory, block->bytes);
    *block = fake.blocks[--fake.blocks_n];
}

// Of large ones the ends alone, to spare the tests the time.
static unsigned char *garbage(uint64_t bytes)
{
    enum { END_BYTES = 1 << 16 };
    unsigned char *memory =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT(memory != MAP_FAILED);
    uint64_t end_bytes = bytes < END_BYTES ? bytes : END_BYTES;
    memset(memory, 0xA5, end_bytes);
    memset(memory + bytes - end_bytes, 0xA5, end_bytes);
    return memory;
}

static uint64_t device_bytes_locked(void)
{
    uint64_t bytes = (uint64_t)fake.execs_n * GRAPH_DEVICE_BYTES;
    for (uint32_t i = 0; i < fake.blocks_n; i++)
        bytes += fake.blocks[i].device && !fake.blocks[i].opened ? fake.blocks[i].bytes : 0;
    return bytes;
}

static bool idle_locked(void)
{
    for (uint32_t i = 0; i < fake.streams_n; i++)
        if (fake.streams[i]->running || fake.streams[i]->first)
            return false;
    return true;
}

static void wait_idle_locked(void)
{
    while (!idle_locked())
        pthread_cond_wait(&fake.changed, &fake.lock);
}

cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    cudaError_t error = enter_allocation(__func__);
    if (error == cudaSuccess && bytes > fake.device.memory_bytes - device_bytes_locked())
        error = cudaErrorMemoryAllocation;
    if (error == cudaSuccess) {
        struct block *block = add_block_locked(garbage(bytes), bytes, true);
        block->device = true;
        *memory = (void *)(uintptr_t)block->address;
    }
    return leave(error);
}

enum owner { OWNER_DEVICE, OWNER_PINNED, OWNER_REGISTERED };

// Waits for the device, as the real ones do.
static cudaError_t give_back(enum owner owner, const void *memory)
{
    pthread_mutex_lock(&fake.lock);
    wait_idle_locked();
    struct block *block = NULL;
    for (uint32_t i = 0; i < fake.blocks_n && !block; i++) {
        struct block *each = &fake.blocks[i];
        bool starts = each->device ? each->address == (uintptr_t)memory : each->memory == memory;
        if (starts && each->device == (owner == OWNER_DEVICE) && !each->opened &&
            each->registered == (owner == OWNER_REGISTERED))
            block = each;
    }
    ASSERT(block ||
           (!memory && owner != OWNER_REGISTERED)); // else it was freed twice, or never had
    if (block)
        remove_block_locked(block);
    return leave(fake.sticky);
}

cudaError_t cudaFree(void *memory)
{
    return give_back(OWNER_DEVICE, memory);
}

cudaError_t cudaFreeHost(void *memory)
{
    return give_back(OWNER_PINNED, memory);
}

cudaError_t cudaHostUnregister(void *memory)
{
    return give_back(OWNER_REGISTERED, memory);
}

cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags)
{
    cudaError_t error = enter_allocation(__func__);
    if (error == cudaSuccess)
        *memory = add_block_locked(garbage(bytes), bytes, flags & cudaHostAllocMapped)->memory;
    return leave(error);
}

cudaError_t cudaHostRegister(void *memory, size_t bytes, unsigned flags)
{
    cudaError_t error = enter_allocation(__func__);
    if (error == cudaSuccess) {
        ASSERT(!host_block_locked(memory, 1));
        add_block_locked(memory, bytes, flags & cudaHostRegisterMapped)->registered = true;
    }
    return leave(error);
}

cudaError_t cudaHostGetDevicePointer(void **mapped, void *memory, unsigned flags)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        ASSERT(flags == 0);
        struct block *block = host_block_locked(memory, 1);
        ASSERT(block && block->address);
        *mapped = (void *)(uintptr_t)(block->address +
                                      (uint64_t)((unsigned char *)memory - block->memory));
    }
    return leave(error);
}

// ---- memory of other processes

struct fake_cuda_export fake_cuda_export(uint64_t bytes, uint64_t begin, int device)
{
    pthread_mutex_lock(&fake.lock);
    ASSERT(fake.exports_n < EXPORTS_MAX && begin < bytes);
    struct export *export = &fake.exports[fake.exports_n++];
    *export = (struct export){garbage(bytes), bytes, begin, device};
    struct fake_cuda_export out = {.memory = export->memory + begin};
    memcpy(out.handle.reserved, &fake.exports_n, sizeof fake.exports_n);
    pthread_mutex_unlock(&fake.lock);
    return out;
}

static struct export *export_locked(const cudaIpcMemHandle_t *handle)
{
    uint32_t number;
    memcpy(&number, handle->reserved, sizeof number);
    return number >= 1 && number <= fake.exports_n ? &fake.exports[number - 1] : NULL;
}

static struct block *opened_locked(const struct export *export)
{
    for (uint32_t i = 0; i < fake.blocks_n; i++)
        if (fake.blocks[i].opened > 0 && fake.blocks[i].memory == export->memory)
            return &fake.blocks[i];
    return NULL;
}

// Again: the same address.
cudaError_t cudaIpcOpenMemHandle(void **memory, cudaIpcMemHandle_t handle, unsigned flags)
{
    cudaError_t error = enter_allocation(__func__);
    struct export *export = export_locked(&handle);
    if (error == cudaSuccess && !export)
        error = cudaErrorInvalidResourceHandle;
    if (error == cudaSuccess) {
        ASSERT(flags == cudaIpcMemLazyEnablePeerAccess);
        struct block *block = opened_locked(export);
        if (!block)
            block = add_block_locked(export->memory, export->bytes, true);
        block->device = true;
        block->opened++;
        *memory = (void *)(uintptr_t)(block->address + export->begin);
    }
    return leave(error);
}

cudaError_t cudaIpcCloseMemHandle(void *memory)
{
    pthread_mutex_lock(&fake.lock);
    wait_idle_locked();
    struct block *block = block_at_locked((uintptr_t)memory, 1);
    ASSERT(block && block->opened > 0); // else it was closed twice, or never opened
    if (block->opened == 1)
        remove_block_locked(block);
    else
        block->opened--;
    return leave(fake.sticky);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *memory)
{
    cudaError_t error = enter(__func__);
    const struct block *block = block_at_locked((uintptr_t)memory, 1);
    if (error == cudaSuccess) {
        ASSERT(block && block->device);
        *attributes = (struct cudaPointerAttributes){.type = cudaMemoryTypeDevice};
        for (uint32_t i = 0; i < fake.exports_n; i++)
            if (fake.exports[i].memory == block->memory)
                attributes->device = fake.exports[i].device;
    }
    return leave(error);
}

static CUresult address_range(CUdeviceptr *begin, size_t *bytes, CUdeviceptr address)
{
    cudaError_t error = enter("cuMemGetAddressRange");
    const struct block *block = block_at_locked(address, 1);
    if (error == cudaSuccess) {
        ASSERT(block);
        *begin = block->address;
        *bytes = block->bytes;
    }
    return leave(error) == cudaSuccess ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **found, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *how)
{
    cudaError_t error = enter(__func__);
    ASSERT(version == 12000 && flags == cudaEnableDefault);
    bool known = error == cudaSuccess && strcmp(symbol, "cuMemGetAddressRange") == 0;
    *found = known ? (void *)(uintptr_t)address_range : NULL;
    *how = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return leave(error);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        *free_bytes = fake.device.memory_bytes - device_bytes_locked();
        *total_bytes = fake.device.memory_bytes;
    }
    return leave(error);
}

// ---- the device thread

static void run(const struct operation *operation)
{
    switch (operation->kind) {
    case KIND_COPY:
        memcpy(operation->to, operation->from, operation->bytes);
        break;
    case KIND_SET:
        memset(operation->to, operation->value, operation->bytes);
        break;
    case KIND_KERNEL:
        operation->run(operation->arguments);
        break;
    case KIND_EVENT:
        break;
    }
}

static void forget_event_locked(struct CUevent_st *event)
{
    if (event->destroyed && event->pending == 0)
        free(event);
}

static void finish_locked(struct operation *operation)
{
    if (operation->kind == KIND_EVENT) {
        operation->event->pending--;
        operation->event->ran_ns = now_ns();
        forget_event_locked(operation->event);
    }
    free(operation);
}

static struct operation *take_locked(struct CUstream_st *stream)
{
    struct operation *operation = stream->first;
    stream->first = operation->next;
    if (!stream->first)
        stream->last = &stream->first;
    return operation;
}

// A lost device runs nothing more.
static void discard_all_locked(void)
{
    for (uint32_t i = 0; i < fake.streams_n; i++)
        while (fake.streams[i]->first)
            finish_locked(take_locked(fake.streams[i]));
    pthread_cond_broadcast(&fake.changed);
}

// One that has something to do, at random; NULL if none has.
static struct CUstream_st *choose_stream_locked(void)
{
    struct CUstream_st *ready[STREAMS_MAX];
    uint32_t ready_n = 0;
    for (uint32_t i = 0; i < fake.streams_n; i++)
        if (fake.streams[i]->first)
            ready[ready_n++] = fake.streams[i];
    return ready_n > 0 && !fake.held ? ready[random_next_locked() % ready_n] : NULL;
}

static void *device_run(void *argument)
{
    (void)argument;
    pthread_mutex_lock(&fake.lock);
    while (!fake.stopping) {
        if (fake.sticky != cudaSuccess)
            discard_all_locked();
        struct CUstream_st *stream = choose_stream_locked();
        if (!stream) {
            pthread_cond_wait(&fake.changed, &fake.lock);
            continue;
        }
        struct operation *operation = take_locked(stream);
        if (strikes(&fake.operations)) {
            fail_locked(NULL, &fake.operations);
            finish_locked(operation);
            continue;
        }
        stream->running = true;
        bool pauses = random_next_locked() % 8 == 0;
        uint32_t pause_us = (uint32_t)(random_next_locked() % 100);
        pthread_mutex_unlock(&fake.lock);
        if (pauses)
            usleep(pause_us);
        run(operation);
        pthread_mutex_lock(&fake.lock);
        stream->running = false;
        finish_locked(operation);
        pthread_cond_broadcast(&fake.changed);
    }
    pthread_mutex_unlock(&fake.lock);
    return NULL;
}

void fake_cuda_start(const struct fake_cuda_device *device, uint64_t seed)
{
    arm(&fake.calls, 0, cudaSuccess, false);
    pthread_mutex_lock(&fake.lock);
    ASSERT(!fake.started);
    start_locked(device, seed);
    pthread_mutex_unlock(&fake.lock);
}

void fake_cuda_stop(void)
{
    pthread_mutex_lock(&fake.lock);
    ASSERT(fake.started);
    fake.stopping = true;
    pthread_cond_broadcast(&fake.changed);
    pthread_mutex_unlock(&fake.lock);
    pthread_join(fake.thread, NULL);
    while (fake.exports_n > 0) {
        struct export *export = &fake.exports[--fake.exports_n];
        munmap(export->memory, export->bytes);
    }
    fake.started = false;
}

struct fake_cuda_live fake_cuda_live(void)
{
    pthread_mutex_lock(&fake.lock);
    struct fake_cuda_live live = {
        .streams = fake.streams_n,
        .events = fake.events_n,
        .graphs = fake.graphs_n,
        .graph_execs = fake.execs_n,
        .device_bytes = device_bytes_locked(),
    };
    for (uint32_t i = 0; i < fake.blocks_n; i++) {
        live.allocations += fake.blocks[i].device && !fake.blocks[i].opened;
        live.imported += fake.blocks[i].opened;
        live.pinned += !fake.blocks[i].device;
    }
    pthread_mutex_unlock(&fake.lock);
    return live;
}

uint64_t fake_cuda_now_ns(void)
{
    return now_ns() + 123456789; // a device's clock is not the host's
}

// ---- streams

static void append_locked(struct CUstream_st *stream, const struct operation *operation)
{
    ASSERT(stream);
    struct operation *own = malloc(sizeof *own);
    ASSERT(own);
    *own = *operation;
    own->next = NULL;
    struct operation ***last = stream->capturing ? &stream->capturing->last : &stream->last;
    **last = own;
    *last = &own->next;
    pthread_cond_broadcast(&fake.changed);
}

cudaError_t fake_cuda_launch(const char *name, cudaStream_t stream, fake_cuda_kernel *kernel,
                             const void *arguments, uint64_t bytes)
{
    cudaError_t error = enter(name);
    if (error == cudaSuccess) {
        ASSERT(bytes <= FAKE_CUDA_ARGUMENT_BYTES);
        struct operation operation = {.kind = KIND_KERNEL, .run = kernel};
        memcpy(operation.arguments, arguments, bytes);
        append_locked(stream, &operation);
        stream->newest = kernel;
    }
    return leave(error);
}

fake_cuda_kernel *fake_cuda_newest(cudaStream_t stream)
{
    pthread_mutex_lock(&fake.lock);
    fake_cuda_kernel *newest = stream->newest;
    pthread_mutex_unlock(&fake.lock);
    return newest;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        ASSERT(kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToHost);
        struct operation operation = {.kind = KIND_COPY, .bytes = bytes};
        bool in = kind == cudaMemcpyHostToDevice;
        operation.to = in ? at_locked((uintptr_t)to, bytes) : to;
        operation.from = in ? from : at_locked((uintptr_t)from, bytes);
        ASSERT(host_block_locked(in ? from : to, bytes)); // else the copy is not asynchronous
        append_locked(stream, &operation);
    }
    return leave(error);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        const struct operation operation = {.kind = KIND_SET,
                                            .to = at_locked((uintptr_t)to, bytes),
                                            .value = value,
                                            .bytes = bytes};
        append_locked(stream, &operation);
    }
    return leave(error);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        ASSERT(flags == cudaStreamNonBlocking);
        ASSERT(fake.streams_n < STREAMS_MAX);
        *stream = calloc(1, sizeof **stream);
        ASSERT(*stream);
        (*stream)->last = &(*stream)->first;
        fake.streams[fake.streams_n++] = *stream;
    }
    return leave(error);
}

static bool busy(const struct CUstream_st *stream)
{
    return stream->running || stream->first;
}

// Gives the lock back. How often a query is not ready depends on the time of day, so it is no call
// that could be made to fail.
static bool not_ready(bool waits)
{
    waits = waits && fake.sticky == cudaSuccess;
    if (waits)
        last_error = cudaErrorNotReady;
    pthread_mutex_unlock(&fake.lock);
    return waits;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    pthread_mutex_lock(&fake.lock);
    ASSERT(!stream->capturing);
    while (busy(stream))
        pthread_cond_wait(&fake.changed, &fake.lock);
    uint32_t i = 0;
    while (fake.streams[i] != stream) {
        i++;
        ASSERT(i < fake.streams_n); // else it was destroyed twice
    }
    fake.streams[i] = fake.streams[--fake.streams_n];
    free(stream);
    return leave(fake.sticky);
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    pthread_mutex_lock(&fake.lock);
    if (not_ready(busy(stream)))
        return cudaErrorNotReady;
    return leave(enter(__func__));
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    cudaError_t error = enter(__func__);
    while (error == cudaSuccess && busy(stream)) {
        pthread_cond_wait(&fake.changed, &fake.lock);
        error = fake.sticky;
    }
    return leave(error);
}

// ---- events

static cudaError_t event_create(const char *name, cudaEvent_t *event, bool timing)
{
    cudaError_t error = enter(name);
    if (error == cudaSuccess) {
        *event = calloc(1, sizeof **event);
        ASSERT(*event);
        (*event)->timing = timing;
        fake.events_n++;
    }
    return leave(error);
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return event_create(__func__, event, true);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    return event_create(__func__, event, !(flags & cudaEventDisableTiming));
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    pthread_mutex_lock(&fake.lock);
    event->destroyed = true;
    fake.events_n--;
    forget_event_locked(event);
    return leave(fake.sticky);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        ASSERT(!stream->capturing);
        event->pending++;
        const struct operation operation = {.kind = KIND_EVENT, .event = event};
        append_locked(stream, &operation);
    }
    return leave(error);
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    pthread_mutex_lock(&fake.lock);
    if (not_ready(event->pending > 0))
        return cudaErrorNotReady;
    return leave(enter(__func__));
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    cudaError_t error = enter(__func__);
    while (error == cudaSuccess && event->pending > 0) {
        pthread_cond_wait(&fake.changed, &fake.lock);
        error = fake.sticky;
    }
    return leave(error);
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        ASSERT(from->timing && to->timing);
        ASSERT(from->ran_ns > 0 && to->ran_ns > 0);
        if (from->pending || to->pending)
            error = cudaErrorNotReady;
        else
            *ms = (float)((double)(int64_t)(to->ran_ns - from->ran_ns) / 1e6);
    }
    return leave(error);
}

// ---- graphs

static void graph_free(struct CUgraph_st *graph)
{
    while (graph->first) {
        struct operation *operation = graph->first;
        graph->first = operation->next;
        free(operation);
    }
    free(graph);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        ASSERT(mode == cudaStreamCaptureModeThreadLocal);
        ASSERT(!stream->capturing);
        stream->capturing = calloc(1, sizeof *stream->capturing);
        ASSERT(stream->capturing);
        stream->capturing->last = &stream->capturing->first;
        fake.graphs_n++;
    }
    return leave(error);
}

// Ends the capture whatever it returns.
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    cudaError_t error = enter(__func__);
    ASSERT(stream->capturing);
    *graph = NULL;
    if (error == cudaSuccess) {
        *graph = stream->capturing;
    } else {
        graph_free(stream->capturing);
        fake.graphs_n--;
    }
    stream->capturing = NULL;
    return leave(error);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    pthread_mutex_lock(&fake.lock);
    graph_free(graph);
    fake.graphs_n--;
    return leave(fake.sticky);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
    cudaError_t error = enter_allocation(__func__);
    if (error == cudaSuccess &&
        fake.device.memory_bytes - device_bytes_locked() < GRAPH_DEVICE_BYTES)
        error = cudaErrorMemoryAllocation;
    if (error == cudaSuccess) {
        ASSERT(flags == 0);
        ASSERT(graph->first); // else it computes nothing
        *exec = calloc(1, sizeof **exec);
        struct CUgraph_st *own = calloc(1, sizeof *own);
        ASSERT(*exec && own);
        own->last = &own->first;
        for (const struct operation *each = graph->first; each; each = each->next) {
            struct operation *copy = malloc(sizeof *copy);
            ASSERT(copy);
            *copy = *each;
            copy->next = NULL;
            *own->last = copy;
            own->last = &copy->next;
        }
        (*exec)->graph = own;
        fake.execs_n++;
    }
    return leave(error);
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess)
        ASSERT(exec && !stream->capturing);
    return leave(error);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        ASSERT(exec); // else this graph was never captured
        for (const struct operation *each = exec->graph->first; each; each = each->next)
            append_locked(stream, each);
    }
    return leave(error);
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    pthread_mutex_lock(&fake.lock);
    graph_free(exec->graph);
    free(exec);
    fake.execs_n--;
    return leave(fake.sticky);
}

// ---- the device

cudaError_t cudaDriverGetVersion(int *version)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess)
        *version = fake.device.driver;
    return leave(error);
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess)
        *version = fake.device.runtime ? fake.device.runtime : CUDART_VERSION;
    return leave(error);
}

cudaError_t cudaGetDeviceCount(int *devices)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        *devices = fake.device.devices;
        if (fake.device.devices == 0)
            error = cudaErrorNoDevice;
    }
    return leave(error);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess) {
        ASSERT(device == 0);
        *properties = (struct cudaDeviceProp){
            .name = "Imaginary 9000",
            .major = fake.device.major,
            .minor = fake.device.minor,
            .multiProcessorCount = fake.device.sm_count,
            .totalGlobalMem = fake.device.memory_bytes,
        };
    }
    return leave(error);
}

cudaError_t cudaSetDevice(int device)
{
    cudaError_t error = enter(__func__);
    if (error == cudaSuccess && device >= fake.device.devices)
        error = cudaErrorInvalidDevice;
    return leave(error);
}

cudaError_t cudaGetDevice(int *device)
{
    cudaError_t error = enter(__func__);
    *device = 0;
    return leave(error);
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    cudaError_t error = enter(__func__);
    ASSERT(attribute == cudaDevAttrMultiProcessorCount && device == 0);
    *value = fake.device.sm_count;
    return leave(error);
}

// ---- errors

cudaError_t cudaGetLastError(void)
{
    pthread_mutex_lock(&fake.lock);
    cudaError_t error = fake.sticky != cudaSuccess ? fake.sticky : last_error;
    last_error = cudaSuccess;
    pthread_mutex_unlock(&fake.lock);
    return error;
}

const char *cudaGetErrorString(cudaError_t error)
{
    static const struct {
        cudaError_t error;
        const char *text;
    } texts[] = {
        {cudaSuccess, "no error"},
        {cudaErrorMemoryAllocation, "out of memory"},
        {cudaErrorNoDevice, "no CUDA-capable device is detected"},
        {cudaErrorIllegalAddress, "an illegal memory access was encountered"},
        {cudaErrorLaunchFailure, "unspecified launch failure"},
        {cudaErrorECCUncorrectable, "uncorrectable ECC error encountered"},
    };
    for (size_t i = 0; i < ARRAY_LEN(texts); i++)
        if (texts[i].error == error)
            return texts[i].text;
    return "unrecognized error code";
}
