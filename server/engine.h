// An engine computes batches on one device. engine_cpu.c, engine_cuda.c and engine_null.c each fill
// in one engine_ops.
//
//     open -> weight_load ... -> { submit lane -> poll lane until done } ... -> weight_free -> close
//
// A batch is submitted on a lane and runs asynchronously; lanes may overlap. The engine calls
// options.wake from any of its threads when a lane may be done, unless it is polled; the scheduler
// then polls. An engine
// never fails a submit: what goes wrong is in the result of the poll.
#pragma once

#include "../kernels/einsum.h"
#include "status.h"

struct engine;
struct engine_weight;

struct engine_options {
    const char *kernel; // forces a kernel by name; NULL: the best that the device supports
    uint32_t threads;   // CPU engine: compute threads; 0: one per core
    uint32_t lanes;     // batches that may be in flight
    uint32_t batch_segments_max;
    const uint32_t *buckets; // token counts, ascending; borrowed for the engine's life
    uint32_t buckets_n;
    uint32_t reduced_dim_max; // the largest R that a weight may have
    uint32_t phase_sample;    // one batch in so many is timed phase by phase; 0: none
    void (*wake)(void *context);
    void *wake_context;
};

// Where weight_load reads a weight from. Reading may fail (truncated file, disk error) and may be
// called from the calling thread only. Offsets are in bytes of the tensor as stored, of this rank's
// groups alone.
struct engine_weight_source {
    struct einsum_weight_format format;
    enum status (*read_weight)(const struct engine_weight_source *source, uint64_t offset, void *to,
                               uint64_t bytes, struct error *err);
    enum status (*read_scales)(const struct engine_weight_source *source, void *to,
                               struct error *err); // whole
    void (*progress)(const struct engine_weight_source *source,
                     uint64_t bytes); // since the last call; may be NULL
};

enum {
    ENGINE_KERNELS_MAX = 8,
    ENGINE_BUCKETS_MAX = 64,
    ENGINE_CHECKS_MAX = 6 * ENGINE_BUCKETS_MAX
};

// One request's share of a batch. All pointers of the operand lie in the batch's memory, or in memory
// of somebody else that the engine has been told of (memory_register, memory_import). The owner of
// that may write to it meanwhile: results are then worth nothing, and that is all that may come of it.
struct engine_segment {
    const struct engine_weight *weight;
    struct einsum_operand operand;
    uint32_t kernel; // 0: the engine's choice; else 1 + index into engine_info.kernels
    // Of an engine that stages: room in the batch's memory for what lies in registered memory, the
    // scales behind the activations, each at a cache line. NULL: nothing does.
    const void *staged_input;
    void *staged_output;
};

struct engine_batch {
    const struct engine_segment *segments;
    uint32_t segments_n;
    uint32_t tokens;      // of all segments
    uint32_t bucket;      // index into buckets: the smallest that holds `tokens`
    const void *input;    // from memory_alloc
    uint64_t input_bytes; // in use, from its begin
    void *output;
    uint64_t output_bytes;
    uint64_t input_staged, output_staged; // bytes of room, at its end, for what is staged
};

struct engine_result {
    enum status status; // OK; INTERNAL: this batch failed; UNAVAILABLE: the device is lost for good
    struct error error; // unless OK
    uint64_t started_ns, ended_ns; // on now_ns()'s clock
    // What the batch spent its time on; all 0 unless it was one of those that are timed. What a
    // device does in one go counts as kernel.
    uint64_t copy_in_ns, kernel_ns, copy_out_ns;
};

enum { ENGINE_KERNEL_TEXT = 128, ENGINE_HANDLE_BYTES = 64 };

struct engine_info {
    char device[128];                // "AMD EPYC 7763, 2 threads"
    char kernel[ENGINE_KERNEL_TEXT]; // "avx2: best that this CPU supports"
    uint32_t kernels_n;
    const char *kernels[ENGINE_KERNELS_MAX]; // that a segment may ask for; static
    uint32_t threads;
    char pci_bus_id[24]; // of a GPU, as NVML knows it: "00000000:3b:00.0"; "" on others
    // Held on the device besides weights and batches; nothing is counted twice.
    uint64_t lanes_bytes;                             // tables and workspaces of the lanes
    uint64_t graphs_bytes;                            // of all captured graphs
    uint64_t scratch_bytes;                           // the rest
    uint32_t bucket_graphs_n[ENGINE_BUCKETS_MAX];     // captured, by bucket
    uint64_t bucket_graphs_bytes[ENGINE_BUCKETS_MAX]; // by bucket, as far as memory grew for them
    uint64_t graph_replays, eager_launches; // so far: of captured graphs, of kernels outside them
};

// One request of the known-answer check.
struct engine_check {
    uint32_t tokens;
    uint32_t kernel; // see struct engine_segment
    bool wide;       // with scales that are not summed in FP32
    bool once;       // what it tells is of the kernel, not of the weight: one of a format is enough
};

struct engine_ops {
    const char *name;
    uint32_t lanes_default; // batches in flight that keep the device busy
    // Nobody calls wake: the scheduler polls busy lanes in a loop, which saves a wake-up.
    bool polled;
    // Lanes run one after the other: what is submitted behind a long batch only waits, and can no
    // longer be overtaken.
    bool serial;
    // What lies in registered memory is brought to the batch's memory on the device by the engine,
    // and outputs back: it takes room there, see struct engine_segment.
    bool stages;
    bool (*usable)(void); // whether this machine has such a device; NULL: always
    NODISCARD enum status (*open)(const struct engine_options *options, struct engine **engine,
                                  struct error *err);
    void (*close)(struct engine *engine); // nothing in flight, no weight left
    void (*describe)(const struct engine *engine, struct engine_info *info);

    // Any thread, several at once; may take seconds. RESOURCE_EXHAUSTED if the device's memory does
    // not suffice.
    NODISCARD enum status (*weight_load)(struct engine *engine,
                                         const struct engine_weight_source *source,
                                         struct engine_weight **weight, struct error *err);
    void (*weight_free)(struct engine *engine, struct engine_weight *weight);
    uint64_t (*weight_bytes)(const struct engine_weight *weight); // held on the device
    // Extends a CRC-32C by so many bytes of what the device holds of a weight, from `offset` on, as they
    // are there now. Any thread; on a GPU they are read back. UNAVAILABLE: the device is lost. NULL:
    // nothing is held.
    NODISCARD enum status (*weight_sum)(struct engine *engine, const struct engine_weight *weight,
                                        uint64_t offset, uint64_t bytes, uint32_t *crc,
                                        struct error *err);
    // The requests that between them, with scales of either type, run every kernel that requests for a
    // weight of this format may be given, by whatever number of tokens. Returns how many. NULL: answers
    // are no answers, and there is nothing to check.
    uint32_t (*checks)(const struct engine *engine, const struct einsum_weight_format *format,
                       struct engine_check checks[ENGINE_CHECKS_MAX]);

    // Memory that the device can reach, page-aligned and touched, so that its cost shows at start.
    NODISCARD enum status (*memory_alloc)(struct engine *engine, uint64_t bytes, void **memory,
                                          struct error *err);
    void (*memory_free)(struct engine *engine, void *memory, uint64_t bytes);

    // Makes memory of somebody else, whole pages of it, such that operands may lie there. May take
    // milliseconds; any thread. NULL, both: operands must lie in the batch's memory.
    NODISCARD enum status (*memory_register)(struct engine *engine, void *memory, uint64_t bytes,
                                             struct error *err);
    void (*memory_unregister)(struct engine *engine, void *memory, uint64_t bytes);

    // Memory on the device that another process has exported by a handle (cudaIpcMemHandle_t): its
    // first `bytes`, in which operands may lie as they are. `*memory` is the device's address, not
    // the host's. Any thread. NULL, both: there is no such thing. FAILED_PRECONDITION: it cannot be
    // opened; INVALID_ARGUMENT: it has fewer bytes; RESOURCE_EXHAUSTED.
    NODISCARD enum status (*memory_import)(struct engine *engine,
                                           const uint8_t handle[ENGINE_HANDLE_BYTES],
                                           uint64_t bytes, void **memory, struct error *err);
    void (*memory_forget)(struct engine *engine, void *memory);

    // In the scheduler's turn: one thread at a time, of a polled engine always the same. `batch` and
    // all that it points to stay put until poll says done.
    void (*submit)(struct engine *engine, uint32_t lane, const struct engine_batch *batch);
    bool (*poll)(struct engine *engine, uint32_t lane,
                 struct engine_result *result); // true once per submit
};

extern const struct engine_ops engine_cpu;
extern const struct engine_ops engine_cuda; // in builds with CUDA
// Answers zeros without computing: measures everything else.
extern const struct engine_ops engine_null;

// By config name: "cuda", "cpu", "null", or "auto" for the best that this machine can use. NULL if this
// build has no such engine.
const struct engine_ops *engine_find(const char *name);
// Why "auto" is not a GPU here; NULL if it is.
const char *engine_auto_note(void);

// What a segment's `kernel` is for this name; "" is the engine's choice. UNIMPLEMENTED, naming those
// that there are.
NODISCARD enum status engine_kernel_find(const struct engine_ops *ops, const struct engine *engine,
                                         const char *name, uint32_t *kernel, struct error *err);
// Whether what asks for this kernel may be summed by the kernel "hopper", for which einsum.h
// allows more than an FP32 sum's error.
bool engine_may_sum_by_wgmma(const struct engine_ops *ops, const struct engine *engine,
                             uint32_t kernel);

// Host memory for engines whose device is the host: page-aligned, zero, in huge pages where there
// are any, and touched. RESOURCE_EXHAUSTED.
NODISCARD enum status engine_host_memory_alloc(uint64_t bytes, void **memory, struct error *err);
void engine_host_memory_free(void *memory, uint64_t bytes);

// memory_register and memory_unregister of the same: the host reaches all that is mapped.
NODISCARD enum status engine_host_memory_register(struct engine *engine, void *memory,
                                                  uint64_t bytes, struct error *err);
void engine_host_memory_unregister(struct engine *engine, void *memory, uint64_t bytes);
