// Moving bytes: PTX for the copies that the kernels are made of, and for following a kernel closely
// in a stream (programmatic dependent launch).
#pragma once

#include <stdint.h>

// 16 bytes, or zeros without touching memory.
__device__ inline uint4 load_if(bool valid, const void *from)
{
    uint4 v;
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0;"
        "  mov.u32 %3, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(from), "r"((uint32_t)valid)
        : "memory");
    return v;
}

__device__ inline void prefetch(const void *from)
{
    asm volatile("prefetch.global.L1 [%0];" ::"l"(from));
}

__device__ inline uint32_t shared_address(const void *at)
{
    return (uint32_t)__cvta_generic_to_shared(at);
}

// Global to shared memory, 16 bytes, zeros if not `valid`: then it touches nothing at `from`.
__device__ inline void copy_async(uint32_t to, const void *from, bool valid)
{
    uint32_t bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ inline void copy_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int GROUPS_IN_FLIGHT> __device__ inline void copy_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_IN_FLIGHT) : "memory");
}

__device__ inline uint4 load_shared(uint32_t from)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from));
    return v;
}

// Four 8 x 16-byte matrices, lane i's address that of row i%8 of matrix i/8. Lane 4g+t receives
// bytes [4t, 4t+4) of row g of each.
__device__ inline uint4 load_matrices(uint32_t from)
{
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from));
    return v;
}

// The opposite: of four matrices, lane i names the place of row i%8 of matrix i/8, lane 4g+t has bytes
// [4t, 4t+4) of row g of each.
__device__ inline void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
#endif
}

// Adds; returns what was there. What the block has written before, a barrier of the block ago, is
// seen by who adds after this.
__device__ inline uint32_t add_acquire_release(uint32_t *to, uint32_t add)
{
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(to), "r"(add)
                 : "memory");
    return before;
}

// The next kernel in the stream may start as soon as every block has come here.
__device__ inline void let_next_kernel_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Last of all, by every block's every thread: a kernel ends after the one ahead in the stream, since who
// waits for it counts on that one, too. One block is enough for it, and keeps none of the others' places.
__device__ inline void end_after_kernel_ahead()
{
#if __CUDA_ARCH__ >= 900
    if (blockIdx.x == 0)
        asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// All that the kernel ahead in the stream wrote is visible after this.
__device__ inline void wait_for_kernel_ahead()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
