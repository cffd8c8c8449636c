// The table of regions, and the list of those that are used no more. Any thread.
//
//     slots    [ region ][ NULL ][ region ] ...      a name begins with the index of its slot
//     unused   region -> region                      in no slot, and nobody holds them
//
// One lock guards both; it covers no system call, unlike the one that collectors take in turn.
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "log.h"

struct regions {
    struct regions_options options;
    pthread_mutex_t lock;  // guards what follows
    struct region **slots; // options.regions_max of them
    struct region *unused;
    struct regions_stats stats;
    pthread_mutex_t
        collecting; // one at a time, so that who collects finds all gone that was unused
};

enum status regions_create(const struct regions_options *options, struct regions **out,
                           struct error *err)
{
    struct regions *regions = calloc(1, sizeof *regions);
    struct region **slots = calloc(options->regions_max, sizeof(struct region *));
    if (!regions || !slots) {
        free(slots);
        free(regions);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory for %" PRIu32 " regions",
                         options->regions_max);
    }
    regions->options = *options;
    regions->slots = slots;
    pthread_mutex_init(&regions->lock, NULL);
    pthread_mutex_init(&regions->collecting, NULL);
    *out = regions;
    return STATUS_OK;
}

void regions_destroy(struct regions *regions)
{
    regions_collect(regions);
    ASSERT(regions->stats.regions == 0);
    pthread_mutex_destroy(&regions->collecting);
    pthread_mutex_destroy(&regions->lock);
    free(regions->slots);
    free(regions);
}

// ---- what may be mapped

NODISCARD static enum status check_bytes(uint64_t bytes, uint64_t bytes_max, struct error *err)
{
    if (bytes <= bytes_max)
        return STATUS_OK;
    return error_field(err, STATUS_RESOURCE_EXHAUSTED, "bytes",
                       "%" PRIu64 ", at most %" PRIu64 " (shared_region_bytes_max)", bytes,
                       bytes_max);
}

// Without these seals the file could shrink under the map, and reading it would kill the daemon.
// Only files of memfd_create can have them. Of those, huge pages are refused: they are reserved
// by whoever touches them first, who is killed if there is none.
NODISCARD static enum status check_file(int fd, uint64_t bytes, uint64_t bytes_max,
                                        struct error *err)
{
    static const char field[] = "fd";
    const int needed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    struct stat file;
    struct statfs file_system;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || fstat(fd, &file) != 0 || fstatfs(fd, &file_system) != 0 ||
        !S_ISREG(file.st_mode) || file_system.f_type != TMPFS_MAGIC)
        return error_field(err, STATUS_FAILED_PRECONDITION, field,
                           "not a memory file of memfd_create, or one of huge pages");
    if ((seals & needed) != needed)
        return error_field(
            err, STATUS_FAILED_PRECONDITION, field,
            "expected the seals F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL, got 0x%x",
            (unsigned)seals);
    uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE), found = (uint64_t)file.st_size;
    if (found != bytes || bytes == 0 || bytes % page_bytes != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "bytes",
                           "%" PRIu64 " for a file of %" PRIu64
                           "; expected the same, in whole pages of %" PRIu64,
                           bytes, found, page_bytes);
    return check_bytes(bytes, bytes_max, err);
}

// Room for one more among the limits of all.
NODISCARD static enum status reserve(struct regions *regions, uint64_t bytes, struct error *err)
{
    const struct regions_options *options = &regions->options;
    pthread_mutex_lock(&regions->lock);
    struct regions_stats before = regions->stats;
    bool fits =
        before.regions < options->regions_max && bytes <= options->bytes_max - regions->stats.bytes;
    if (fits) {
        regions->stats.regions++;
        regions->stats.bytes += bytes;
    }
    pthread_mutex_unlock(&regions->lock);
    if (fits)
        return STATUS_OK;
    if (before.regions >= options->regions_max)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "%" PRIu32 " regions are registered, no more may be (shared_regions_max)",
                         before.regions);
    return error_field(err, STATUS_RESOURCE_EXHAUSTED, "bytes",
                       "%" PRIu64 " beside the %" PRIu64 " of other regions, at most %" PRIu64
                       " in all (shared_bytes_max)",
                       bytes, before.bytes, options->bytes_max);
}

static void unreserve(struct regions *regions, uint64_t bytes)
{
    pthread_mutex_lock(&regions->lock);
    regions->stats.regions--;
    regions->stats.bytes -= bytes;
    pthread_mutex_unlock(&regions->lock);
}

// ---- map and unmap

NODISCARD static enum status map(struct region *region, int fd, struct error *err)
{
    void *memory = mmap(NULL, region->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return error_field(err,
                           errno == ENOMEM ? STATUS_RESOURCE_EXHAUSTED : STATUS_FAILED_PRECONDITION,
                           "fd", "cannot be mapped to write: %s", strerror(errno));
    region->memory = memory;
    madvise(memory, region->bytes, MADV_DONTDUMP); // a caller's data is not ours to dump
    madvise(memory, region->bytes, MADV_HUGEPAGE); // advice
    // Here and not at the first request, where the pages would cost more than the request.
    if (madvise(memory, region->bytes, MADV_POPULATE_WRITE) == 0 || errno == EINVAL)
        return STATUS_OK; // kernels before 5.14 do not know it
    munmap(memory, region->bytes);
    return error_field(err, STATUS_RESOURCE_EXHAUSTED, "bytes", "no memory for %" PRIu64,
                       region->bytes);
}

// What the engine cannot reach is copied by us: slower, but right, so the caller is served.
static void tell_engine(struct region *region)
{
    const struct regions_options *options = &region->owner->options;
    if (!options->ops->memory_register)
        return;
    struct error err;
    enum status status =
        options->ops->memory_register(options->engine, region->memory, region->bytes, &err);
    region->direct = status == STATUS_OK;
    region->staged = region->direct && options->ops->stages;
    if (!region->direct)
        LOG(WARN, "a region is out of the engine's reach: its tensors are copied",
            LOG_U64("bytes", region->bytes), LOG_STR("error", err.text));
}

static void unmap(struct region *region)
{
    const struct regions_options *options = &region->owner->options;
    if (region->on_device) {
        options->ops->memory_forget(options->engine, region->memory);
        return;
    }
    if (region->direct)
        options->ops->memory_unregister(options->engine, region->memory, region->bytes);
    munmap(region->memory, region->bytes);
}

static void destroy(struct region *region)
{
    unmap(region);
    unreserve(region->owner, region->bytes);
    free(region);
}

// Gives it a slot and a name. There is a slot: it has been counted.
NODISCARD static enum status publish(struct regions *regions, struct region *region,
                                     struct error *err)
{
    if (getrandom(region->name, sizeof region->name, 0) != (ssize_t)sizeof region->name)
        return error_set(err, STATUS_INTERNAL, "no random numbers: %s", strerror(errno));
    pthread_mutex_lock(&regions->lock);
    uint32_t index = 0;
    while (regions->slots[index])
        index++;
    ASSERT(index < regions->options.regions_max);
    memcpy(region->name, &index, sizeof index);
    regions->slots[index] = region;
    pthread_mutex_unlock(&regions->lock);
    return STATUS_OK;
}

// Counted, but without memory yet.
NODISCARD static enum status region_alloc(struct regions *regions, uint64_t bytes,
                                          struct region **out, struct error *err)
{
    enum status status = reserve(regions, bytes, err);
    if (status != STATUS_OK)
        return status;
    struct region *region = calloc(1, sizeof *region);
    if (!region) {
        unreserve(regions, bytes);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory for a region");
    }
    region->owner = regions;
    region->bytes = bytes;
    atomic_init(&region->references, 1);
    *out = region;
    return STATUS_OK;
}

// Takes a region whose memory is there, if `status` says so.
NODISCARD static enum status finish(struct regions *regions, struct region *region,
                                    enum status status, struct region **out, struct error *err)
{
    if (status != STATUS_OK) {
        unreserve(regions, region->bytes);
        free(region);
        return status;
    }
    status = publish(regions, region, err);
    if (status == STATUS_OK)
        *out = region;
    else
        destroy(region);
    return status;
}

enum status regions_add(struct regions *regions, int fd, uint64_t bytes, struct region **out,
                        struct error *err)
{
    struct region *region = NULL;
    enum status status = check_file(fd, bytes, regions->options.region_bytes_max, err);
    if (status == STATUS_OK)
        status = region_alloc(regions, bytes, &region, err);
    if (status != STATUS_OK)
        return status;
    status = map(region, fd, err);
    if (status == STATUS_OK)
        tell_engine(region);
    return finish(regions, region, status, out, err);
}

NODISCARD static enum status check_import(const struct regions_options *options, uint64_t bytes,
                                          struct error *err)
{
    if (!options->ops->memory_import)
        return error_set(err, STATUS_UNIMPLEMENTED, "the engine \"%s\" takes no CUDA memory",
                         options->ops->name);
    if (!options->import)
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "this server takes no CUDA memory (shared_memory_cuda)");
    if (bytes == 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, "bytes", "0, expected at least 1");
    return check_bytes(bytes, options->region_bytes_max, err);
}

enum status regions_import(struct regions *regions, const uint8_t handle[ENGINE_HANDLE_BYTES],
                           uint64_t bytes, struct region **out, struct error *err)
{
    const struct regions_options *options = &regions->options;
    struct region *region = NULL;
    enum status status = check_import(options, bytes, err);
    if (status == STATUS_OK)
        status = region_alloc(regions, bytes, &region, err);
    if (status != STATUS_OK)
        return status;
    region->direct = region->on_device = true;
    void *memory = NULL;
    status = options->ops->memory_import(options->engine, handle, bytes, &memory, err);
    region->memory = memory;
    return finish(regions, region, status, out, err);
}

void regions_remove(struct regions *regions, struct region *region)
{
    uint32_t index;
    memcpy(&index, region->name, sizeof index);
    pthread_mutex_lock(&regions->lock);
    ASSERT(regions->slots[index] == region);
    regions->slots[index] = NULL;
    pthread_mutex_unlock(&regions->lock);
    region_unref(region);
}

// ---- references

// In a time that does not tell where they differ.
static bool same_name(const uint8_t *a, const uint8_t *b)
{
    unsigned differs = 0;
    for (size_t i = 0; i < REGION_NAME_BYTES; i++)
        differs |= (unsigned)(a[i] ^ b[i]);
    return differs == 0;
}

struct region *region_find(struct regions *regions, const uint8_t name[REGION_NAME_BYTES])
{
    uint32_t index;
    memcpy(&index, name, sizeof index);
    if (index >= regions->options.regions_max)
        return NULL;
    pthread_mutex_lock(&regions->lock);
    struct region *region = regions->slots[index];
    if (region && same_name(region->name, name))
        region_ref(region);
    else
        region = NULL;
    pthread_mutex_unlock(&regions->lock);
    return region;
}

struct region *region_ref(struct region *region)
{
    atomic_fetch_add_explicit(&region->references, 1, memory_order_relaxed);
    return region;
}

void region_unref(struct region *region)
{
    if (atomic_fetch_sub_explicit(&region->references, 1, memory_order_acq_rel) != 1)
        return;
    struct regions *regions = region->owner;
    pthread_mutex_lock(&regions->lock);
    region->next_unused = regions->unused;
    regions->unused = region;
    pthread_mutex_unlock(&regions->lock);
    if (regions->options.on_unused)
        regions->options.on_unused(regions->options.context);
}

void regions_collect(struct regions *regions)
{
    pthread_mutex_lock(&regions->collecting);
    pthread_mutex_lock(&regions->lock);
    struct region *unused = regions->unused;
    regions->unused = NULL;
    pthread_mutex_unlock(&regions->lock);
    while (unused) {
        struct region *next = unused->next_unused;
        destroy(unused);
        unused = next;
    }
    pthread_mutex_unlock(&regions->collecting);
}

// ---- use

enum status region_check(const struct region *region, const char *field, uint64_t offset,
                         uint64_t bytes, uint64_t alignment, struct error *err)
{
    if (offset % alignment != 0)
        return error_field(err, STATUS_INVALID_ARGUMENT, field,
                           "offset %" PRIu64 " is no multiple of %" PRIu64, offset, alignment);
    if (offset > region->bytes || bytes > region->bytes - offset) // no sum that could overflow
        return error_field(err, STATUS_INVALID_ARGUMENT, field,
                           "%" PRIu64 " bytes at offset %" PRIu64
                           " do not lie within the region's %" PRIu64,
                           bytes, offset, region->bytes);
    return STATUS_OK;
}

struct regions_stats regions_stats(struct regions *regions)
{
    pthread_mutex_lock(&regions->lock);
    struct regions_stats stats = regions->stats;
    pthread_mutex_unlock(&regions->lock);
    return stats;
}
