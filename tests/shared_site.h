// The daemon's side of shared memory without gRPC, for tests of rings and of their callers: one small
// weight, an engine that can be held, regions and rings; and, with site_listen, the control socket.
// Include it in one file of a program. What fails here aborts, since a fuzzer uses it as well.
#pragma once

#include <check.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "client/checkpoint.h"
#include "folder.h"
#include "server/batch.h"
#include "server/config.h"
#include "server/ring.h"
#include "server/service.h"
#include "server/sharing.h"

enum {
    GROUPS = 4,
    OUTPUT_DIM = 128,
    REDUCED_DIM = 512,
    TOKENS_MAX = 8,
    ENTRIES_MAX = 64,
    LANES = 2,
    BATCHES = 3,
    REGIONS_MAX = 4,
    PATIENCE_MS = 20000,
};
static const char name[] = "layers.0.attn.wo_a";

#define WAIT_FOR(condition)                                                                        \
    do {                                                                                           \
        for (int wait = 0; wait < PATIENCE_MS * 10 && !(condition); wait++)                        \
            wait < 1000 ? sched_yield() : usleep(100);                                             \
        ck_assert_msg(condition, "did not come true: " #condition);                                \
    } while (0)

// ---- an engine that can be held

static struct engine_ops ops;
static _Atomic bool held;
static const struct engine_batch *running[LANES];

// Writes each output where it belongs, at the end, as an engine does: its memory must still be
// there.
static bool held_poll(struct engine *engine, uint32_t lane, struct engine_result *result)
{
    if (atomic_load(&held) || !engine_null.poll(engine, lane, result))
        return false;
    for (uint32_t i = 0; i < running[lane]->segments_n; i++) {
        const struct einsum_operand *operand = &running[lane]->segments[i].operand;
        memset(operand->output, *(const uint8_t *)operand->activations,
               (size_t)operand->tokens * operand->groups * OUTPUT_DIM * 2);
    }
    return true;
}

static void held_submit(struct engine *engine, uint32_t lane, const struct engine_batch *batch)
{
    running[lane] = batch;
    engine_null.submit(engine, lane, batch);
}

// Memory on its device: a memory file of this process, mapped by whoever opens it. A handle is the
// file's descriptor and size.
enum { EXPORTED_BYTES = 1 << 20 };
static _Atomic int imported;

__attribute__((unused)) static enum status site_import(struct engine *engine,
                                                       const uint8_t handle[ENGINE_HANDLE_BYTES],
                                                       uint64_t bytes, void **memory,
                                                       struct error *err)
{
    (void)engine;
    int fd;
    memcpy(&fd, handle, sizeof fd);
    if (bytes > EXPORTED_BYTES)
        return error_field(err, STATUS_INVALID_ARGUMENT, "bytes", "but the handle is of fewer");
    *memory = mmap(NULL, EXPORTED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (*memory == MAP_FAILED)
        return error_field(err, STATUS_FAILED_PRECONDITION, "handle", "cannot be opened");
    atomic_fetch_add(&imported, 1);
    return STATUS_OK;
}

__attribute__((unused)) static void site_forget(struct engine *engine, void *memory)
{
    (void)engine;
    munmap(memory, EXPORTED_BYTES);
    atomic_fetch_sub(&imported, 1);
}

// ---- the daemon's side

static struct {
    char directory[64];
    struct config config;
    struct service_context context;
    struct batcher_waker waker;
    _Atomic int broken; // rings that were found so
    // Of site_listen.
    char address[128];
    uv_loop_t loop;
    uv_async_t stop;
    pthread_t thread;
    bool listening;
} site;
static const uint32_t buckets[] = {1, 2, 4, 8};

static void on_broken(void *context)
{
    (void)context;
    atomic_fetch_add(&site.broken, 1);
    if (site.context.sharing)
        sharing_on_broken(site.context.sharing);
}

static void on_unused(void *context)
{
    (void)context;
    if (site.context.sharing)
        sharing_on_unused(site.context.sharing);
}

static void make_weights(void)
{
    struct error err;
    struct checkpoint_options checkpoint;
    ASSERT(checkpoint_options_init(&checkpoint, "v4-flash", &err) == STATUS_OK);
    checkpoint.directory = site.directory;
    checkpoint.layers = checkpoint.shards = 1;
    checkpoint.format = (struct einsum_weight_format){
        .groups = GROUPS,
        .output_dim = OUTPUT_DIM,
        .reduced_dim = REDUCED_DIM,
        .weight_type = EINSUM_WEIGHT_E4M3,
        .scale_type = EINSUM_SCALE_UE8M0,
        .block_d = 128,
        .block_r = 128,
    };
    ASSERT(checkpoint_write(&checkpoint, &err) == STATUS_OK);
    const char *root = site.directory;
    ASSERT(weights_create(&ops, site.context.engine, &root, 1, 4096, &site.context.weights, &err) ==
           STATUS_OK);
    const struct weights_load load = {.path = site.directory, .output_dim = OUTPUT_DIM};
    ASSERT(weights_load(site.context.weights, &load, NULL, &err) == STATUS_OK);
}

static void make_batcher(void)
{
    const struct batcher_options options = {
        .ops = &ops,
        .engine = site.context.engine,
        .lanes = LANES,
        .batches = BATCHES,
        .batch_input_bytes = 1 << 20,
        .batch_output_bytes = 1 << 20,
        .batch_tokens_max = TOKENS_MAX,
        .batch_requests_max = 4,
        .queue_requests_max = 1000,
        .buckets = buckets,
        .buckets_n = ARRAY_LEN(buckets),
    };
    struct error err;
    ASSERT(batcher_create(&options, &site.waker, &site.context.batcher, &err) == STATUS_OK);
}

static void start_with(bool direct)
{
    memset(&site, 0, sizeof site);
    atomic_store(&held, false);
    snprintf(site.directory, sizeof site.directory, "/tmp/shared_site.XXXXXX");
    ASSERT(mkdtemp(site.directory));
    ops = engine_null;
    ops.submit = held_submit;
    ops.poll = held_poll;
    if (!direct)
        ops.memory_register = NULL;
    ops.memory_import = site_import;
    ops.memory_forget = site_forget;
    struct error err;
    const struct engine_options engine = {
        .lanes = LANES, .wake = batcher_wake, .wake_context = &site.waker};
    ASSERT(config_init(&site.config, &err) == STATUS_OK);
    ASSERT(ops.open(&engine, &site.context.engine, &err) == STATUS_OK);
    site.config.request_tokens_max = TOKENS_MAX;
    site.context.config = &site.config;
    site.context.engine_ops = &ops;
    ASSERT(metrics_create(&site.context.metrics, &err) == STATUS_OK);
    make_weights();
    make_batcher();
    const struct regions_options regions = {
        .ops = &ops,
        .engine = site.context.engine,
        .regions_max = REGIONS_MAX,
        .region_bytes_max = 64 << 20,
        .bytes_max = REGIONS_MAX * (64ull << 20),
        .import = true,
        .on_unused = on_unused,
    };
    ASSERT(regions_create(&regions, &site.context.regions, &err) == STATUS_OK);
    const struct rings_options rings = {.context = &site.context,
                                        .entries_max = ENTRIES_MAX,
                                        .spin_us = 50,
                                        .on_broken = on_broken};
    ASSERT(rings_create(&rings, &site.context.rings, &err) == STATUS_OK);
}

static void start(void)
{
    start_with(true);
}

static void on_stop(uv_async_t *handle)
{
    sharing_stop(site.context.sharing);
    sharing_drop_connections(site.context.sharing);
    uv_close((uv_handle_t *)handle, NULL);
    uv_stop(&site.loop);
}

static void *run_loop(void *unused)
{
    uv_run(&site.loop, UV_RUN_DEFAULT);
    return unused;
}

__attribute__((unused)) static void site_listen(void)
{
    struct error err;
    snprintf(site.address, sizeof site.address, "unix:%s/shared.sock", site.directory);
    ASSERT(uv_loop_init(&site.loop) == 0);
    uv_async_init(&site.loop, &site.stop, on_stop);
    const struct sharing_options options = {
        .loop = &site.loop,
        .address = site.address,
        .unix_socket_mode = 0600,
        .connections_max = 16,
        .connection_regions_max = 4,
    };
    ASSERT(sharing_create(&options, &site.context.sharing, &err) == STATUS_OK);
    ASSERT(sharing_start(site.context.sharing, site.context.regions, site.context.rings, &err) ==
           STATUS_OK);
    ASSERT(pthread_create(&site.thread, NULL, run_loop, NULL) == 0);
    site.listening = true;
}

static void close_handle(uv_handle_t *handle, void *unused)
{
    (void)unused;
    if (!uv_is_closing(handle))
        uv_close(handle, NULL);
}

// Also to be called by tests, which may listen again.
static void site_stop_listening(void)
{
    if (!site.listening)
        return;
    site.listening = false;
    uv_async_send(&site.stop);
    pthread_join(site.thread, NULL);
    rings_wait_idle(site.context.rings, PATIENCE_MS);
    uv_walk(&site.loop, close_handle, NULL);
    struct sharing *sharing = site.context.sharing;
    uv_run(&site.loop, UV_RUN_DEFAULT);
    ASSERT(uv_loop_close(&site.loop) == 0);
    site.context.sharing = NULL;
    sharing_destroy(sharing);
    regions_collect(site.context.regions);
}

__attribute__((unused)) static void stop(void)
{
    atomic_store(&held, false);
    batcher_wake(&site.waker);
    site_stop_listening();
    rings_destroy(site.context.rings);
    regions_destroy(site.context.regions);
    batcher_destroy(site.context.batcher);
    weights_destroy(site.context.weights);
    ops.close(site.context.engine);
    metrics_destroy(site.context.metrics);
    config_deinit(&site.config);
    folder_remove(site.directory);
}
