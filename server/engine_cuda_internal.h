// What the files of the CUDA engine share. engine_cuda.c opens it and gives out the memory of
// batches, engine_cuda_region.c takes that of others; engine_cuda_weight.c loads weights;
// engine_cuda_lane.c computes batches.
#pragma once

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>

#include "../kernels/cuda/cuda.h"
#include "engine.h"

enum { ENGINE_CUDA_BUFFERS_MAX = 256 };

// Host memory given out by memory_alloc, what the device calls it, and its twin on the device.
struct buffer {
    const unsigned char *host;
    unsigned char *mapped;
    unsigned char *device;
    uint64_t bytes;
};

// Host memory of somebody else, and what the device calls it.
struct registered {
    const unsigned char *host;
    unsigned char *mapped;
    uint64_t bytes;
};

// What host and device tell each other about a lane's batch. Pinned; a line for each writer.
struct mailbox {
    struct cuda_order orders[CUDA_ORDERS];
    struct cuda_report report;
};

// Events around the copies of a large batch whose phases are measured.
enum mark { MARK_BEGIN, MARK_COPIED_IN, MARK_COMPUTED, MARK_COPIED_OUT, MARKS_N };

struct lane {
    cudaStream_t stream;
    cudaEvent_t done;
    cudaEvent_t marks[MARKS_N];
    cudaGraphExec_t *graphs; // by bucket, then by the set of kernels; NULL where none can be needed
    struct mailbox *mailbox;
    struct cuda_table *table;  // pinned
    struct cuda_piece *pieces; // pinned; room for `pieces_max`
    uint32_t pieces_n, pieces_max;
    struct cuda_ends ends; // mailbox, table and pieces, as the device calls them, and its own table
    void *workspace;
    struct cuda_segment *segments; // batch_segments_max
    uint32_t *sorted;              // scratch of cuda_table_build
    bool submitted;
    bool small;         // nothing is copied around the graph: waits for the report, not for `done`
    bool measured;      // its phases are
    cudaError_t failed; // of a call in submit
    uint64_t started_ns, check_at_ns;
};

struct staging {
    void *host, *device;
    cudaEvent_t taken; // the device has read `device`, and so `host`
};

struct engine_weight {
    struct cuda_weight cuda;
    uint64_t bytes;
};

struct engine {
    struct engine_info info;
    int device;
    uint32_t buckets_n;
    struct cuda_bucket *buckets;
    enum cuda_kernel kernels[1 + ENGINE_KERNELS_MAX]; // as segments number them
    uint32_t lanes_n;
    struct lane *lanes;
    uint32_t segments_max;
    uint32_t reduced_dim_max;
    uint32_t phase_sample;
    _Atomic uint64_t graph_replays;  // of batches, in all
    _Atomic uint64_t eager_launches; // of kernels outside of graphs, as loading does

    pthread_mutex_t buffers_lock; // guards the next two against another memory_alloc
    struct buffer buffers[ENGINE_CUDA_BUFFERS_MAX];
    _Atomic uint32_t buffers_n; // grows before the first submit, shrinks after the last

    pthread_mutex_t registered_lock; // guards the next three
    struct registered *registered;   // by address
    uint32_t registered_n, registered_room;

    pthread_mutex_t load_lock; // guards all that follows
    cudaStream_t load_stream;
    struct staging staging[2];
    _Atomic uint32_t weights_n;
};

// Memory runs out for one caller; anything else on a device that has worked so far is its end.
enum status engine_cuda_failed(cudaError_t error, const char *what, struct error *err);
enum status engine_cuda_out_of_memory(struct error *err, const char *what);

// ---- memory of batches (engine_cuda.c)

// That begins at `host`.
const struct buffer *engine_cuda_buffer_of(const struct engine *engine, const void *host);

// ---- memory of others (engine_cuda_region.c)

NODISCARD enum status engine_cuda_memory_register(struct engine *engine, void *memory,
                                                  uint64_t bytes, struct error *err);
void engine_cuda_memory_unregister(struct engine *engine, void *memory, uint64_t bytes);
// What the device calls an address in registered memory.
void *engine_cuda_registered(struct engine *engine, const void *host);
NODISCARD enum status engine_cuda_memory_import(struct engine *engine,
                                                const uint8_t handle[ENGINE_HANDLE_BYTES],
                                                uint64_t bytes, void **memory, struct error *err);
void engine_cuda_memory_forget(struct engine *engine, void *memory);

// ---- weights (engine_cuda_weight.c)

NODISCARD enum status engine_cuda_staging_open(struct engine *engine, struct error *err);
void engine_cuda_staging_close(struct engine *engine);
NODISCARD enum status engine_cuda_weight_load(struct engine *engine,
                                              const struct engine_weight_source *source,
                                              struct engine_weight **out, struct error *err);
void engine_cuda_weight_free(struct engine *engine, struct engine_weight *weight);
uint64_t engine_cuda_weight_bytes(const struct engine_weight *weight);
NODISCARD enum status engine_cuda_weight_sum(struct engine *engine,
                                             const struct engine_weight *weight, uint64_t offset,
                                             uint64_t bytes, uint32_t *crc, struct error *err);
uint32_t engine_cuda_checks(const struct engine *engine, const struct einsum_weight_format *format,
                            struct engine_check checks[ENGINE_CHECKS_MAX]);

// ---- lanes (engine_cuda_lane.c)

NODISCARD enum status engine_cuda_lane_open(const struct engine *engine, struct lane *lane,
                                            struct error *err);
void engine_cuda_lane_close(const struct engine *engine, struct lane *lane);
// Captures a bucket's graphs, one for each set of kernels; `*graphs_n` grows by their number.
NODISCARD cudaError_t engine_cuda_lane_capture(const struct engine *engine, struct lane *lane,
                                               uint32_t bucket, uint32_t *graphs_n);
void engine_cuda_submit(struct engine *engine, uint32_t index, const struct engine_batch *batch);
bool engine_cuda_poll(struct engine *engine, uint32_t index, struct engine_result *result);
