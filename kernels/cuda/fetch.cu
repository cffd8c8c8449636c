// The first and the last node of a batch's graph: what the batch needs comes to the device, and the
// host is told that it is done. Both read and write pinned host memory over the bus, so that a
// small batch needs neither the copy engine, which takes microseconds for any copy, nor an event.
//
//     host     order, table, input              output             report
//                       |                         ^                  ^
//     graph    [fetch]--'--> table, input -> [kernels] -> [report] --'
//
// Who reads over the bus waits two of its round trips, one for the order and one for all that the
// order names, as long as the bytes fit into the loads in flight.
#include "launch.h"

#include "copy.cuh"

namespace
{

enum {
    BLOCKS = 32,
    THREADS = 256,
    IN_FLIGHT = 4, // loads of 16 bytes by a thread: 512 KiB by all
};

// Nanoseconds; steps of up to a microsecond, by the device.
__device__ inline uint64_t device_time_ns()
{
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// Host memory changes from launch to launch: no cache on the way may answer.
__device__ inline uint4 load_host(const uint4 *from)
{
    return __ldcv(from);
}

__global__ void __launch_bounds__(THREADS)
    fetch_kernel(const cuda_order *order_host, cuda_report *report)
{
    __shared__ cuda_order order;
    static_assert(sizeof order % 16 == 0, "read in pieces of 16 bytes");
    uint64_t begun_ns = device_time_ns();
    if (threadIdx.x < sizeof order / 16)
        ((uint4 *)&order)[threadIdx.x] = load_host((const uint4 *)order_host + threadIdx.x);
    __syncthreads();

    // Table and input, one behind the other, in pieces of 16 bytes.
    uint32_t table_n = (uint32_t)((order.table_bytes + 15) / 16);
    uint32_t n = table_n + (uint32_t)((order.input_bytes + 15) / 16);
    for (uint32_t first = blockIdx.x * THREADS + threadIdx.x; first < n;
         first += BLOCKS * THREADS * IN_FLIGHT) {
        uint4 held[IN_FLIGHT];
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++) {
            uint32_t at = first + i * (BLOCKS * THREADS);
            if (at < n)
                held[i] =
                    load_host(at < table_n ? (const uint4 *)order.table_from + at
                                           : (const uint4 *)order.input_from + (at - table_n));
        }
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++) {
            uint32_t at = first + i * (BLOCKS * THREADS);
            if (at < n)
                *(at < table_n ? (uint4 *)order.table_to + at
                               : (uint4 *)order.input_to + (at - table_n)) = held[i];
        }
    }

    // All blocks have about the same to do: the first stands for them.
    if (blockIdx.x == 0) {
        __syncthreads();
        if (threadIdx.x == 0) {
            report->begun_ns = begun_ns;
            report->fetched_ns = device_time_ns();
        }
    }
}

__global__ void report_kernel(const cuda_order *order, cuda_report *report)
{
    uint64_t sequence = __ldcv((const unsigned long long *)&order->sequence);
    wait_for_kernel_ahead();
    report->computed_ns = device_time_ns();
    // What any kernel of the batch has written, outputs in host memory too, before the word for it.
    __threadfence_system();
    *(volatile uint64_t *)&report->sequence = sequence;
}

} // namespace

// ---- host

extern "C" cudaError_t cuda_fetch_launch(const struct cuda_order *order, struct cuda_report *report,
                                         cudaStream_t stream)
{
    void *arguments[] = {&order, &report};
    return cuda_launch_kernel((const void *)fetch_kernel, BLOCKS, THREADS, 0, arguments, false,
                              stream);
}

extern "C" cudaError_t cuda_report_launch(const struct cuda_order *order,
                                          struct cuda_report *report, cudaStream_t stream)
{
    void *arguments[] = {&order, &report};
    return cuda_launch_kernel((const void *)report_kernel, 1, 1, 0, arguments, true, stream);
}
