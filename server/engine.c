// The list of engines, and the host memory that those which compute on the host share. Any thread.
#include "engine.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// Best first: "auto" is the first one that can be used, and the CPU always can.
static const struct engine_ops *const engines[] = {
#ifdef EINSUMD_CUDA
    &engine_cuda,
#endif
    &engine_cpu,
    &engine_null,
};

const struct engine_ops *engine_find(const char *name)
{
    bool any = strcmp(name, "auto") == 0;
    for (size_t i = 0; i < ARRAY_LEN(engines); i++)
        if (any ? !engines[i]->usable || engines[i]->usable() : strcmp(name, engines[i]->name) == 0)
            return engines[i];
    return NULL;
}

const char *engine_auto_note(void)
{
#ifdef EINSUMD_CUDA
    return engine_cuda.usable() ? NULL : "no CUDA device is at hand";
#else
    return "this build has no CUDA engine";
#endif
}

enum status engine_kernel_find(const struct engine_ops *ops, const struct engine *engine,
                               const char *name, uint32_t *kernel, struct error *err)
{
    *kernel = 0;
    if (name[0] == '\0')
        return STATUS_OK;
    struct engine_info info;
    ops->describe(engine, &info);
    char names[256] = "none";
    size_t used = 0;
    for (uint32_t i = 0; i < info.kernels_n; i++) {
        if (strcmp(name, info.kernels[i]) == 0) {
            *kernel = i + 1;
            return STATUS_OK;
        }
        if (used < sizeof names)
            used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "",
                                     info.kernels[i]);
    }
    return error_field(err, STATUS_UNIMPLEMENTED, "kernel",
                       "\"%s\" cannot be chosen here; what can: %s", name, names);
}

bool engine_may_sum_by_wgmma(const struct engine_ops *ops, const struct engine *engine,
                             uint32_t kernel)
{
    struct engine_info info;
    ops->describe(engine, &info);
    for (uint32_t i = 0; i < info.kernels_n; i++)
        if (strcmp(info.kernels[i], "hopper") == 0)
            return kernel == 0 || kernel == i + 1;
    return false;
}

// Kernels since 5.14 populate a range at once, and say so when they cannot: a fault would kill.
static bool populate(void *memory, uint64_t bytes)
{
    if (madvise(memory, bytes, MADV_POPULATE_WRITE) == 0)
        return true;
    if (errno != EINVAL && errno != ENOSYS)
        return false;
    uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    for (uint64_t at = 0; at < bytes; at += page_bytes)
        ((volatile uint8_t *)memory)[at] = 0;
    return true;
}

enum status engine_host_memory_alloc(uint64_t bytes, void **out, struct error *err)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        goto refuse;
    madvise(memory, bytes, MADV_HUGEPAGE); // advice: a kernel without them serves small pages
    if (!populate(memory, bytes))
        goto unmap_memory;
    *out = memory;
    return STATUS_OK;

unmap_memory:
    munmap(memory, bytes);
refuse:
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory: %" PRIu64 " bytes", bytes);
}

void engine_host_memory_free(void *memory, uint64_t bytes)
{
    int failed = munmap(memory, bytes);
    ASSERT(!failed);
}

enum status engine_host_memory_register(struct engine *engine, void *memory, uint64_t bytes,
                                        struct error *err)
{
    (void)engine;
    (void)memory;
    (void)bytes;
    (void)err;
    return STATUS_OK;
}

void engine_host_memory_unregister(struct engine *engine, void *memory, uint64_t bytes)
{
    (void)engine;
    (void)memory;
    (void)bytes;
}
