// The first and the last node of a batch's graph: what the batch needs comes to the device, and the
// host is told that it is done. Both read and write pinned host memory over the bus, so that a
// small batch needs neither the copy engine, which takes microseconds for any copy, nor an event.
//
//     host     orders, table, input, pieces      output             report
//                        |                         ^                  ^
//     graph    [fetch]---'--> table, input -> [kernels] -> [report] --'
//
// A block waits two round trips over the bus, one for its order and one for its share of all that
// the order names, as long as the bytes fit into the loads in flight. No two warps read from one
// sector (32 bytes): those that do are served in turn, a round trip each. Where pieces lie is known
// as soon as the order is: the first are asked for together with it, at the cost of one load of a few
// warps where there are none.
#include "launch.h"

#include "copy.cuh"

namespace
{

enum {
    BLOCKS = CUDA_ORDERS,
    THREADS = 256,
    IN_FLIGHT = 4, // loads of 16 bytes by a thread: 512 KiB by all
    WARPS = BLOCKS * THREADS / 32,
};
static_assert((int)WARPS == (int)CUDA_FETCH_WARPS && (int)CUDA_PIECES_EARLY <= (int)WARPS,
              "a warp's first is early");
static_assert(sizeof(cuda_piece) == 32, "read by two lanes");

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

// Both words of what a lane and its neighbour hold, for all of the warp.
__device__ inline uint64_t from_lane(uint32_t low, uint32_t high, uint32_t lane)
{
    return (uint64_t)__shfl_sync(0xFFFFFFFF, high, lane) << 32 | __shfl_sync(0xFFFFFFFF, low, lane);
}

__device__ inline uint4 load_piece(const cuda_piece *pieces, uint32_t i)
{
    uint32_t lane = threadIdx.x % 32;
    return lane < 2 ? load_host((const uint4 *)&pieces[i] + lane) : make_uint4(0, 0, 0, 0);
}

// By a warp; what it has loaded of the piece tells where.
__device__ inline void copy_piece(uint4 loaded)
{
    const uint4 *from = (const uint4 *)from_lane(loaded.x, loaded.y, 0);
    uint4 *to = (uint4 *)from_lane(loaded.z, loaded.w, 0);
    uint32_t n = (__shfl_sync(0xFFFFFFFF, loaded.x, 1) + 15) / 16;
    for (uint32_t first = threadIdx.x % 32; first < n; first += 32 * IN_FLIGHT) {
        uint4 held[IN_FLIGHT];
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++)
            if (first + i * 32 < n)
                held[i] = load_host(from + first + i * 32);
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++)
            if (first + i * 32 < n)
                to[first + i * 32] = held[i];
    }
}

// From the device's memory into its L2.
__device__ inline void bring_to_cache(const uint8_t *from, uint32_t bytes)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

__global__ void __launch_bounds__(THREADS) fetch_kernel(const cuda_ends ends)
{
    __shared__ cuda_order order;
    static_assert(sizeof order % 16 == 0, "read in pieces of 16 bytes");
    uint64_t begun_ns = device_time_ns();
    if (threadIdx.x < sizeof order / 16)
        ((uint4 *)&order)[threadIdx.x] =
            load_host((const uint4 *)&ends.orders[blockIdx.x] + threadIdx.x);
    uint32_t warp = threadIdx.x / 32 * BLOCKS + blockIdx.x; // of little, all blocks have a share
    uint32_t piece = WARPS - 1 - warp; // the last warps first: the table is the first ones'
    uint4 early = make_uint4(0, 0, 0, 0);
    if (piece < CUDA_PIECES_EARLY)
        early = load_piece(ends.pieces, piece);
    __syncthreads();

    // Table and input, one behind the other, in pieces of 16 bytes: a warp's lie side by side, and
    // no warp has some of both.
    const uint4 *table_from = (const uint4 *)ends.table_host;
    const uint4 *input_from = (const uint4 *)order.input_from;
    uint4 *table_to = (uint4 *)ends.table, *input_to = (uint4 *)order.input_to;
    uint32_t table_n = (uint32_t)(order.table_bytes / 16);
    uint32_t n = table_n + (uint32_t)(order.input_bytes / 16);
    for (uint32_t first = warp * 32 + threadIdx.x % 32; first < n;
         first += BLOCKS * THREADS * IN_FLIGHT) {
        uint4 held[IN_FLIGHT];
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++) {
            uint32_t at = first + i * (BLOCKS * THREADS);
            if (at < n)
                held[i] = load_host(at < table_n ? table_from + at : input_from + (at - table_n));
        }
#pragma unroll
        for (uint32_t i = 0; i < IN_FLIGHT; i++) {
            uint32_t at = first + i * (BLOCKS * THREADS);
            if (at < n)
                *(at < table_n ? table_to + at : input_to + (at - table_n)) = held[i];
        }
    }

    for (; piece < order.pieces; piece += WARPS)
        copy_piece(piece < CUDA_PIECES_EARLY ? early : load_piece(ends.pieces, piece));

    // The last threads first, since they have the least to fetch.
    for (uint32_t i = (THREADS - 1 - threadIdx.x) * BLOCKS + blockIdx.x; i < order.warm_pieces;
         i += BLOCKS * THREADS)
        bring_to_cache((const uint8_t *)order.warm_from + (uint64_t)i * order.warm_step_bytes,
                       CUDA_WARM_BYTES);

    // All blocks have about the same to do: the first stands for them.
    if (blockIdx.x == 0) {
        __syncthreads();
        if (threadIdx.x == 0) {
            ends.report->begun_ns = begun_ns;
            ends.report->fetched_ns = device_time_ns();
        }
    }
}

__global__ void report_kernel(const cuda_ends ends)
{
    uint64_t sequence = __ldcv((const unsigned long long *)&ends.orders->sequence);
    wait_for_kernel_ahead();
    ends.report->computed_ns = device_time_ns();
    // What any kernel of the batch has written, outputs in host memory too, before the word for it.
    __threadfence_system();
    *(volatile uint64_t *)&ends.report->sequence = sequence;
}

} // namespace

// ---- host

extern "C" cudaError_t cuda_fetch_launch(const struct cuda_ends *ends, cudaStream_t stream)
{
    void *arguments[] = {(void *)ends};
    return cuda_launch_kernel((const void *)fetch_kernel, BLOCKS, THREADS, 0, arguments, false,
                              stream);
}

extern "C" cudaError_t cuda_report_launch(const struct cuda_ends *ends, cudaStream_t stream)
{
    void *arguments[] = {(void *)ends};
    return cuda_launch_kernel((const void *)report_kernel, 1, 1, 0, arguments, true, stream);
}
