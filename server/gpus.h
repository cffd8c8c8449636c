// What the driver knows of the GPU beside us: power, temperature, clocks. By NVML, which is loaded if
// the machine has it; without it, or what a card does not tell, there is nothing.
//
// Main thread. A sample is kept for a while, so that however often somebody looks, the driver is not
// asked more often.
#pragma once

#include "base.h"

enum { GPUS_MAX = 16, GPU_TEXT_BYTES = 96 };

struct gpus;

enum gpu_figure {
    GPU_POWER_MW,
    GPU_POWER_LIMIT_MW,
    GPU_ENERGY_MJ, // millijoules, since the driver was loaded
    GPU_TEMPERATURE_C,
    GPU_UTILIZATION_PERCENT, // of time, with a kernel running
    GPU_MEMORY_UTILIZATION_PERCENT,
    GPU_MEMORY_TOTAL_BYTES,
    GPU_MEMORY_USED_BYTES, // by all processes
    GPU_CLOCK_SM_MHZ,
    GPU_CLOCK_MEMORY_MHZ,
    GPU_THROTTLE_REASONS, // bits, see gpu_throttle_reasons
    GPU_FIGURES
};

struct gpu_sample {
    char uuid[GPU_TEXT_BYTES], name[GPU_TEXT_BYTES];
    bool known[GPU_FIGURES];
    uint64_t figures[GPU_FIGURES];
};

struct gpu_throttle_reason {
    uint64_t bit;
    const char *name;
};
enum { GPU_THROTTLE_REASONS_N = 9 };
extern const struct gpu_throttle_reason gpu_throttle_reasons[GPU_THROTTLE_REASONS_N];

// `pci_bus_id`: of the one to look at, "00000000:3b:00.0"; "": all. NULL: there is none, or no NVML.
struct gpus *gpus_open(const char *pci_bus_id);
void gpus_close(struct gpus *gpus); // may be NULL
// Of `gpus`, which may be NULL: how many there are, and what was found, now or a moment ago.
uint32_t gpus_sample(struct gpus *gpus, const struct gpu_sample **samples);
