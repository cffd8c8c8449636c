// NVML's functions are looked up by name, with prototypes of our own: its header belongs to CUDA, and
// a daemon without CUDA, or on a machine without a driver, has neither. Names with a version (_v2)
// never change their meaning.
#include "gpus.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"

enum { SAMPLE_KEPT_MS = 500 };

typedef struct nvml_device *nvml_device;
struct nvml_utilization {
    unsigned gpu, memory;
};
struct nvml_memory {
    unsigned long long total, free, used;
};
enum { NVML_SUCCESS, NVML_TEMPERATURE_GPU = 0, NVML_CLOCK_SM = 1, NVML_CLOCK_MEM = 2 };

struct nvml {
    int (*init)(void);
    int (*shutdown)(void);
    int (*count)(unsigned *n);
    int (*by_index)(unsigned index, nvml_device *device);
    int (*by_bus_id)(const char *bus_id, nvml_device *device);
    // From here on each may be missing, in a driver that is older or newer.
    int (*name)(nvml_device device, char *text, unsigned bytes);
    int (*uuid)(nvml_device device, char *text, unsigned bytes);
    int (*power)(nvml_device device, unsigned *milliwatts);
    int (*power_limit)(nvml_device device, unsigned *milliwatts);
    int (*energy)(nvml_device device, unsigned long long *millijoules);
    int (*temperature)(nvml_device device, int sensor, unsigned *celsius);
    int (*utilization)(nvml_device device, struct nvml_utilization *percent);
    int (*memory)(nvml_device device, struct nvml_memory *bytes);
    int (*clock)(nvml_device device, int type, unsigned *megahertz);
    int (*throttle)(nvml_device device, unsigned long long *reasons);
};

static const struct symbol {
    const char *name;
    size_t offset;
    bool needed;
} symbols[] = {
#define SYMBOL(of, member, is_needed)                                                              \
    {                                                                                              \
        of, offsetof(struct nvml, member), is_needed                                               \
    }
    SYMBOL("nvmlInit_v2", init, true),
    SYMBOL("nvmlShutdown", shutdown, true),
    SYMBOL("nvmlDeviceGetCount_v2", count, true),
    SYMBOL("nvmlDeviceGetHandleByIndex_v2", by_index, true),
    SYMBOL("nvmlDeviceGetHandleByPciBusId_v2", by_bus_id, true),
    SYMBOL("nvmlDeviceGetName", name, false),
    SYMBOL("nvmlDeviceGetUUID", uuid, false),
    SYMBOL("nvmlDeviceGetPowerUsage", power, false),
    SYMBOL("nvmlDeviceGetEnforcedPowerLimit", power_limit, false),
    SYMBOL("nvmlDeviceGetTotalEnergyConsumption", energy, false),
    SYMBOL("nvmlDeviceGetTemperature", temperature, false),
    SYMBOL("nvmlDeviceGetUtilizationRates", utilization, false),
    SYMBOL("nvmlDeviceGetMemoryInfo", memory, false),
    SYMBOL("nvmlDeviceGetClockInfo", clock, false),
    SYMBOL("nvmlDeviceGetCurrentClocksThrottleReasons", throttle, false),
};

const struct gpu_throttle_reason gpu_throttle_reasons[] = {
    {0x001, "idle"},        {0x002, "clocks_setting"}, {0x004, "power_cap"},
    {0x008, "hw_slowdown"}, {0x010, "sync_boost"},     {0x020, "sw_thermal"},
    {0x040, "hw_thermal"},  {0x080, "power_brake"},    {0x100, "display_clocks"},
};

struct gpus {
    void *library;
    struct nvml nvml;
    nvml_device devices[GPUS_MAX];
    uint32_t devices_n;
    uint64_t sampled_ns; // 0: never
    struct gpu_sample samples[GPUS_MAX];
};

static void set(struct gpu_sample *sample, enum gpu_figure figure, bool known, uint64_t value)
{
    sample->known[figure] = known;
    sample->figures[figure] = known ? value : 0;
}

static void sample_unsigned(struct gpu_sample *sample, enum gpu_figure figure, nvml_device device,
                            int (*get)(nvml_device device, unsigned *value))
{
    unsigned value = 0;
    bool known = get && get(device, &value) == NVML_SUCCESS;
    set(sample, figure, known, value);
}

static void sample_long(struct gpu_sample *sample, enum gpu_figure figure, nvml_device device,
                        int (*get)(nvml_device device, unsigned long long *value))
{
    unsigned long long value = 0;
    bool known = get && get(device, &value) == NVML_SUCCESS;
    set(sample, figure, known, value);
}

static void sample_device(const struct nvml *nvml, nvml_device device, struct gpu_sample *sample)
{
    sample_unsigned(sample, GPU_POWER_MW, device, nvml->power);
    sample_unsigned(sample, GPU_POWER_LIMIT_MW, device, nvml->power_limit);
    sample_long(sample, GPU_ENERGY_MJ, device, nvml->energy);
    sample_long(sample, GPU_THROTTLE_REASONS, device, nvml->throttle);
    unsigned value = 0;
    bool known = nvml->temperature &&
                 nvml->temperature(device, NVML_TEMPERATURE_GPU, &value) == NVML_SUCCESS;
    set(sample, GPU_TEMPERATURE_C, known, value);
    known = nvml->clock && nvml->clock(device, NVML_CLOCK_SM, &value) == NVML_SUCCESS;
    set(sample, GPU_CLOCK_SM_MHZ, known, value);
    known = nvml->clock && nvml->clock(device, NVML_CLOCK_MEM, &value) == NVML_SUCCESS;
    set(sample, GPU_CLOCK_MEMORY_MHZ, known, value);
    struct nvml_utilization utilization = {0};
    known = nvml->utilization && nvml->utilization(device, &utilization) == NVML_SUCCESS;
    set(sample, GPU_UTILIZATION_PERCENT, known, utilization.gpu);
    set(sample, GPU_MEMORY_UTILIZATION_PERCENT, known, utilization.memory);
    struct nvml_memory memory = {0};
    known = nvml->memory && nvml->memory(device, &memory) == NVML_SUCCESS;
    set(sample, GPU_MEMORY_TOTAL_BYTES, known, memory.total);
    set(sample, GPU_MEMORY_USED_BYTES, known, memory.used);
}

uint32_t gpus_sample(struct gpus *gpus, const struct gpu_sample **samples)
{
    if (!gpus)
        return 0;
    uint64_t now = now_ns();
    if (gpus->sampled_ns == 0 || now - gpus->sampled_ns > SAMPLE_KEPT_MS * UINT64_C(1000000)) {
        for (uint32_t i = 0; i < gpus->devices_n; i++)
            sample_device(&gpus->nvml, gpus->devices[i], &gpus->samples[i]);
        gpus->sampled_ns = now;
    }
    *samples = gpus->samples;
    return gpus->devices_n;
}

// ---- open, close

static bool load(struct gpus *gpus)
{
    gpus->library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    for (size_t i = 0; gpus->library && i < ARRAY_LEN(symbols); i++) {
        void *address = dlsym(gpus->library, symbols[i].name);
        if (!address && symbols[i].needed)
            return false;
        memcpy((char *)&gpus->nvml + symbols[i].offset, &address, sizeof address);
    }
    return gpus->library != NULL;
}

static void find_devices(struct gpus *gpus, const char *pci_bus_id)
{
    const struct nvml *nvml = &gpus->nvml;
    unsigned n = 1;
    if (pci_bus_id[0] == '\0' && nvml->count(&n) != NVML_SUCCESS)
        n = 0;
    for (unsigned i = 0; i < n && gpus->devices_n < GPUS_MAX; i++) {
        nvml_device device;
        int failed =
            pci_bus_id[0] ? nvml->by_bus_id(pci_bus_id, &device) : nvml->by_index(i, &device);
        if (failed)
            continue;
        struct gpu_sample *sample = &gpus->samples[gpus->devices_n];
        gpus->devices[gpus->devices_n++] = device;
        if (nvml->name && nvml->name(device, sample->name, sizeof sample->name))
            sample->name[0] = '\0';
        if (nvml->uuid && nvml->uuid(device, sample->uuid, sizeof sample->uuid))
            sample->uuid[0] = '\0';
    }
}

struct gpus *gpus_open(const char *pci_bus_id)
{
    struct gpus *gpus = calloc(1, sizeof *gpus);
    if (!gpus)
        return NULL;
    int failed = 0;
    if (!load(gpus) || (failed = gpus->nvml.init()) != NVML_SUCCESS) {
        LOG(DEBUG, "no figures of GPUs: no libnvidia-ml.so.1, or it does not work",
            LOG_U64("nvml_error", (uint64_t)failed));
        if (gpus->library)
            dlclose(gpus->library);
        free(gpus);
        return NULL;
    }
    find_devices(gpus, pci_bus_id);
    if (gpus->devices_n > 0)
        return gpus;
    gpus_close(gpus);
    return NULL;
}

void gpus_close(struct gpus *gpus)
{
    if (!gpus)
        return;
    gpus->nvml.shutdown();
    dlclose(gpus->library);
    free(gpus);
}
