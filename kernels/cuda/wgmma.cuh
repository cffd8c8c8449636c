// The pieces of Hopper that the arm for SM 9.0 is made of: wgmma of E4M3 with weights in registers,
// barriers that count bytes, bulk copies. PTX ISA, "Asynchronous warpgroup level matrix instructions".
//
// D[64, N] = W[64, 32] * A[N, 32]^T by four warps. A warp's share of W and D is what mma.cuh calls w and
// acc: 16 rows, the same lanes. A lies in shared memory, 128 bytes of K to a token, the 16-byte pieces of
// token n swizzled by n % 8, from an address aligned to 1024.
//
// Products are summed with 13 fraction bits below the largest of a step of 32, in the tensor core of
// this capability: sums of more than K = 128 belong into FP32 registers.
#pragma once

#include <stdint.h>

__device__ __forceinline__ uint64_t activations_descriptor(uint32_t shared)
{
    constexpr uint64_t SWIZZLE_128 = (uint64_t)1 << 62;
    constexpr uint64_t EIGHT_TOKENS = (uint64_t)(1024 >> 4)
                                      << 32; // from one core matrix to the next
    return SWIZZLE_128 | EIGHT_TOKENS | (uint64_t)1 << 16 | (shared >> 4 & 0x3FFF);
}

__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int GROUPS_IN_FLIGHT> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS_IN_FLIGHT) : "memory");
}

// d = w * a, plus d if `add`.
__device__ __forceinline__ void wgmma(float (&d)[16], uint4 w, uint64_t a, bool add)
{
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %21, 0;"
                 "  wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
                 "  {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"
                 "  {%16, %17, %18, %19}, %20, p, 1, 1; }"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
                   "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
                   "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
                 : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(a), "r"((uint32_t)add));
}

__device__ __forceinline__ void wgmma(float (&d)[32], uint4 w, uint64_t a, bool add)
{
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %37, 0;"
        "  wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
        "  %0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "  %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
        "  {%32, %33, %34, %35}, %36, p, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(a), "r"((uint32_t)add));
}

// d = a * w^T, plus d if `add`: 64 rows of a by 64 of w, both in shared memory. Lanes as above.
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t w, bool add)
{
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %34, 0;"
        "  wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
        "  %0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "  %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
        "  %32, %33, p, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(w), "r"((uint32_t)add));
}

// The same with 128 rows of w.
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t w, bool add)
{
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %66, 0;"
        "  wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
        "  %0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "  %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "  %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "  %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"
        "  %64, %65, p, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63])
        : "l"(a), "l"(w), "r"((uint32_t)add));
}

// ---- barriers in shared memory

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

// Every lane of a warp for itself: one for them all costs the same, and racecheck does not follow it.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t arrivals = 1)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// Arrives when all that this thread has copied with copy_async so far is there.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Returns once the phase of this parity has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity)
{
    asm volatile("{ .reg .pred p;"
                 "  again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;"
                 "  @!p bra again; }" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// Global to shared memory; counted by the barrier, in bytes. A multiple of 16, all aligned to 16.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, uint32_t bytes,
                                          uint32_t barrier)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// What this thread has seen in shared memory is there for wgmma.
__device__ __forceinline__ void fence_for_wgmma()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int REGISTERS> __device__ __forceinline__ void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ __forceinline__ void give_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Of `threads` threads, those that name the same `id` (1..15).
__device__ __forceinline__ void sync_some(uint32_t id, uint32_t threads)
{
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ bool sync_some_or(uint32_t id, uint32_t threads, bool value)
{
    uint32_t any;
    asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %1, 0;"
                 "  barrier.cta.red.or.pred q, %2, %3, p; selp.u32 %0, 1, 0, q; }"
                 : "=r"(any)
                 : "r"((uint32_t)value), "r"(id), "r"(threads)
                 : "memory");
    return any != 0;
}

// ---- clusters: thread blocks that share each other's shared memory

__device__ __forceinline__ uint32_t cluster_rank()
{
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Orders nothing but barriers' phases: a release of the cluster's scope costs as much as a tile's step.
__device__ __forceinline__ void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;" ::
                     : "memory");
}

// What this thread has initialised is there for the cluster.
__device__ __forceinline__ void fence_barriers()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// At the same place in block `rank` of the cluster. Orders nothing either.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank)
{
    asm volatile(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
        "  mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// ---- maps: copies of boxes out of tensors that the driver has described

// What was written to the map before this kernel is seen by its copies.
__device__ __forceinline__ void fence_for_map(const void *map)
{
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

// To the same place in every block of the cluster that `blocks` names, a bit each, counted by the barrier
// at the same place there.
__device__ __forceinline__ void copy_box(uint32_t to, const void *map, uint32_t x, uint32_t y,
                                         uint32_t z, uint32_t barrier, uint16_t blocks)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(blocks)
                 : "memory");
}
