// The line of units (table.h): which run a unit belongs to, and which worker.
#pragma once

#include "table.h"

// The last of `n` runs that begins at or before `unit`; unit_begin ascends from 0. Every lane of a
// warp comes to the same answer.
__device__ __forceinline__ uint32_t find_run(const cuda_run *runs, uint32_t n, uint32_t unit)
{
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t first = 0;; first += 32) {
        bool before = first + lane < n && runs[first + lane].unit_begin <= unit;
        uint32_t found = __popc(__ballot_sync(0xFFFFFFFF, before));
        if (found < 32)
            return first + found - 1;
    }
}

// The first unit of a worker's piece, when `units` are dealt out evenly to `workers`; and the worker
// whose piece holds a unit.
__device__ __forceinline__ uint32_t unit_of(uint32_t worker, uint32_t units, uint32_t workers)
{
    return units / workers * worker + units % workers * worker / workers; // no 64-bit division
}

__device__ __forceinline__ uint32_t worker_of(uint32_t unit, uint32_t units, uint32_t workers)
{
    return (uint32_t)((((uint64_t)unit + 1) * workers + units - 1) / units) - 1;
}
