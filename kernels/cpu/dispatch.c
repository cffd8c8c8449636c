// Which kernels are compiled in, and which of them this CPU runs. Any thread.
#include "kernel.h"

#include <string.h>

static const struct cpu_kernel *const kernels[] = {
#if defined(__x86_64__)
    &cpu_kernel_avx2_subnormal,
    &cpu_kernel_avx2,
#endif
    &cpu_kernel_portable,
    NULL,
};

const struct cpu_kernel *const *cpu_kernels(void)
{
    return kernels;
}

bool cpu_kernel_supported(const struct cpu_kernel *kernel)
{
    return kernel->supported();
}

const char *cpu_kernel_name(const struct cpu_kernel *kernel)
{
    return kernel->name;
}

const struct cpu_kernel *cpu_kernel_find(const char *name)
{
    for (const struct cpu_kernel *const *kernel = kernels; *kernel != NULL; kernel++)
        if ((name == NULL || strcmp(name, (*kernel)->name) == 0) && (*kernel)->supported())
            return *kernel;
    return NULL;
}
