// A stand-in for the CUDA runtime and for the kernels of kernels/cuda, so that the CUDA engine
// runs, and fails, on a machine without a GPU. fake_cuda.c is the runtime, fake_cuda_kernels.c the
// kernels.
//
//     engine --calls--> streams, in order --device thread--> memory
//                       (copies, kernels, events: run later, streams in any order)
//
// Device addresses lie in a range that the host may not touch, so that the engine cannot mistake
// one for its own; the device reaches nothing but what is allocated, pinned or mapped. Memory
// starts as garbage. Misuse that a real device would answer with silence or chaos ends the test.
//
// Faults are the test's to order: the n-th call from now on, the n-th allocation, the n-th
// operation that the device thread runs. A sticky one makes every later call fail, as a lost device
// does.
#pragma once

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#include "kernels/cuda/cuda.h"

struct fake_cuda_device {
    int driver;  // 13000 is CUDA 13.0; 0: no driver
    int runtime; // 0: that of the headers
    int devices;
    int major, minor; // compute capability
    int sm_count;
    uint64_t memory_bytes;
};

// What a program has of CUDA and has not yet given back.
struct fake_cuda_live {
    uint32_t allocations, pinned, imported, streams, events, graphs, graph_execs;
    uint64_t device_bytes;
};

// Before the first call of a test, which otherwise finds a Hopper with 1 GiB; and after its last:
// stops the device thread.
void fake_cuda_start(const struct fake_cuda_device *device, uint64_t seed);
void fake_cuda_stop(void);

struct fake_cuda_live fake_cuda_live(void);

// Makes the n-th from now fail, counted from 1; 0: none. Calls that only give something back always
// do so, and are not counted, nor are queries answered by "not ready".
void fake_cuda_fail_call(uint32_t n, cudaError_t error, bool sticky);
void fake_cuda_fail_allocation(uint32_t n); // of either memory, or of a graph: out of memory
void fake_cuda_fail_operation(uint32_t n, cudaError_t error); // sticky
// Since the last fake_cuda_fail_*: how many there were, and the call that was made to fail or NULL.
uint32_t fake_cuda_calls(void), fake_cuda_allocations(void), fake_cuda_operations(void);
const char *fake_cuda_failed_call(void);

// Memory that another process has on a device: where this one reads and writes it, and its handle. It
// begins so far into an allocation, as what cudaMalloc gives may. Gone with fake_cuda_stop.
struct fake_cuda_export {
    unsigned char *memory;
    cudaIpcMemHandle_t handle;
};
struct fake_cuda_export fake_cuda_export(uint64_t bytes, uint64_t begin, int device);

// While held, the device runs nothing.
void fake_cuda_hold(bool held);

// So far: tokens that a kernel has computed, and bytes that graphs have fetched, or warmed.
uint64_t fake_cuda_rows(enum cuda_kernel kernel);
uint64_t fake_cuda_fetched_bytes(void);
uint64_t fake_cuda_warmed_bytes(void);

// ---- for fake_cuda_kernels.c

// Where a device address of so many bytes lies; ends the test if it is none.
void *fake_cuda_at(uint64_t address, uint64_t bytes);
uint64_t fake_cuda_now_ns(void); // the device's clock

enum { FAKE_CUDA_ARGUMENT_BYTES = 64 };
typedef void fake_cuda_kernel(const void *arguments);
// Appends to the stream, or to the graph that it captures.
cudaError_t fake_cuda_launch(const char *name, cudaStream_t stream, fake_cuda_kernel *run,
                             const void *arguments, uint64_t bytes);
// What the stream launched last; NULL: nothing.
fake_cuda_kernel *fake_cuda_newest(cudaStream_t stream);
