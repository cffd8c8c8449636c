// A stand-in for libnvidia-ml.so.1: two GPUs, the second of which tells little, as cards do. The
// temperature of the first counts how often it was asked for, so that a test sees what was cached.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS, NOT_SUPPORTED = 3, NOT_FOUND = 6, GPUS = 2 };

typedef struct device *device_t;
struct utilization {
    unsigned gpu, memory;
};
struct memory {
    unsigned long long total, free, used;
};

int nvmlInit_v2(void);
int nvmlShutdown(void);
int nvmlDeviceGetCount_v2(unsigned *n);
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device);
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, device_t *device);
int nvmlDeviceGetName(device_t device, char *text, unsigned bytes);
int nvmlDeviceGetUUID(device_t device, char *text, unsigned bytes);
int nvmlDeviceGetPowerUsage(device_t device, unsigned *milliwatts);
int nvmlDeviceGetEnforcedPowerLimit(device_t device, unsigned *milliwatts);
int nvmlDeviceGetTotalEnergyConsumption(device_t device, unsigned long long *millijoules);
int nvmlDeviceGetTemperature(device_t device, int sensor, unsigned *celsius);
int nvmlDeviceGetUtilizationRates(device_t device, struct utilization *percent);
int nvmlDeviceGetMemoryInfo(device_t device, struct memory *bytes);
int nvmlDeviceGetClockInfo(device_t device, int type, unsigned *megahertz);
int nvmlDeviceGetCurrentClocksThrottleReasons(device_t device, unsigned long long *reasons);

static char gpus[GPUS];

static int index_of(device_t device)
{
    return (int)((char *)device - gpus);
}

int nvmlInit_v2(void)
{
    return getenv("FAKE_NVML_BROKEN") ? 999 : SUCCESS;
}

int nvmlShutdown(void)
{
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *n)
{
    *n = GPUS;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device)
{
    if (index >= GPUS)
        return NOT_FOUND;
    *device = (device_t)(void *)&gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, device_t *device)
{
    if (strcmp(bus_id, "00000000:01:00.0") != 0)
        return NOT_FOUND;
    return nvmlDeviceGetHandleByIndex_v2(1, device);
}

int nvmlDeviceGetName(device_t device, char *text, unsigned bytes)
{
    snprintf(text, bytes, "Fake GPU %d", index_of(device));
    return SUCCESS;
}

int nvmlDeviceGetUUID(device_t device, char *text, unsigned bytes)
{
    snprintf(text, bytes, "GPU-%d", index_of(device));
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(device_t device, unsigned *milliwatts)
{
    *milliwatts = index_of(device) == 0 ? 312500 : 45000;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(device_t device, unsigned *milliwatts)
{
    *milliwatts = 600000;
    return index_of(device) == 0 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetTotalEnergyConsumption(device_t device, unsigned long long *millijoules)
{
    *millijoules = 123456789;
    return index_of(device) == 0 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetTemperature(device_t device, int sensor, unsigned *celsius)
{
    static unsigned asked;
    *celsius = index_of(device) == 0 ? 40 + asked++ : 33;
    return sensor == 0 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetUtilizationRates(device_t device, struct utilization *percent)
{
    *percent = (struct utilization){.gpu = 75, .memory = 30};
    return index_of(device) == 0 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetMemoryInfo(device_t device, struct memory *bytes)
{
    *bytes = (struct memory){.total = 32ull << 30, .used = 5ull << 30, .free = 27ull << 30};
    return index_of(device) == 0 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetClockInfo(device_t device, int type, unsigned *megahertz)
{
    *megahertz = type == 1 ? 2407 : type == 2 ? 14001 : 0;
    return index_of(device) == 0 && *megahertz ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device_t device, unsigned long long *reasons)
{
    *reasons = 0x4 | 0x20; // power cap, thermal by software
    return index_of(device) == 0 ? SUCCESS : NOT_SUPPORTED;
}
