// Which kernels a device takes, as a table. Any thread; needs no device.
//
//     capability   arm            reason
//     12.0, 12.1   block-scaled   mma takes UE8M0 scales in hardware, at twice the plain rate
//     8.9, 9.x ... portable       E4M3 conversions and F16 mma, scales in FP32
//     older        none           no E4M3 conversions
#include "cuda.h"

#include <string.h>

struct arm_rule {
    int from, before; // 10 * major + minor
    enum cuda_arm arm;
    const char *reason;
};

static const struct arm_rule arm_rules[] = {
    {0, 89, CUDA_ARM_NONE, "compute capability below 8.9: no E4M3 conversions in hardware"},
    {89, 90, CUDA_ARM_PORTABLE, "compute capability 8.9: mma has no block scales"},
    {90, 100, CUDA_ARM_PORTABLE, "compute capability 9.x: mma.sync has no block scales"},
    {100, 120, CUDA_ARM_NONE, "compute capability 10.x and 11.x: no kernel image in this build"},
    {120, 122, CUDA_ARM_BLOCK_SCALED, "compute capability 12.0 or 12.1: block-scaled mma"},
    {122, 1 << 20, CUDA_ARM_NONE, "compute capability above 12.1: no kernel image in this build"},
};

static const char *const names[3][2] = {
    [CUDA_ARM_NONE] = {"none", "none"},
    [CUDA_ARM_BLOCK_SCALED] = {"sm120-decode", "sm120-prefill"},
    [CUDA_ARM_PORTABLE] = {"portable-decode", "portable-prefill"},
};

enum cuda_mode cuda_mode_of(const struct einsum_weight_format *format,
                            enum einsum_scale_type activation_scale_type)
{
    if (format->weight_type == EINSUM_WEIGHT_BF16)
        return CUDA_MODE_BF16;
    bool powers =
        format->scale_type == EINSUM_SCALE_UE8M0 && activation_scale_type == EINSUM_SCALE_UE8M0;
    if (format->block_r == 128)
        return powers ? CUDA_MODE_UE8M0_128 : CUDA_MODE_FP32_128;
    return powers ? CUDA_MODE_UE8M0_32 : CUDA_MODE_FP32_32;
}

struct cuda_choice cuda_dispatch(int major, int minor, const struct einsum_weight_format *format,
                                 enum einsum_scale_type activation_scale_type, uint64_t tokens,
                                 const char *forced)
{
    struct cuda_choice choice = {.arm = CUDA_ARM_NONE, .reason = "no such compute capability"};
    int capability = 10 * major + minor;
    for (size_t i = 0; i < sizeof arm_rules / sizeof arm_rules[0]; i++)
        if (capability >= arm_rules[i].from && capability < arm_rules[i].before) {
            choice.arm = arm_rules[i].arm;
            choice.reason = arm_rules[i].reason;
        }
    // An image is compiled for one arm per capability: forcing the other cannot be granted.
    if (forced != NULL && strcmp(forced, "auto") != 0 && choice.arm != CUDA_ARM_NONE) {
        enum cuda_arm wanted = strcmp(forced, "sm120") == 0      ? CUDA_ARM_BLOCK_SCALED
                               : strcmp(forced, "portable") == 0 ? CUDA_ARM_PORTABLE
                                                                 : CUDA_ARM_NONE;
        if (wanted == CUDA_ARM_NONE)
            choice.reason = "no kernel has this name: auto, sm120 and portable are known";
        else if (wanted != choice.arm)
            choice.reason = wanted == CUDA_ARM_PORTABLE
                                ? "the portable kernels are not built for this capability"
                                : "block-scaled mma needs compute capability 12.0 or 12.1";
        else
            choice.reason = "forced by name";
        if (wanted != choice.arm)
            choice.arm = CUDA_ARM_NONE;
    }
    choice.prefill = tokens >= CUDA_PREFILL_TOKENS_MIN;
    choice.mode = cuda_mode_of(format, activation_scale_type);
    choice.name = names[choice.arm][choice.prefill];
    return choice;
}
