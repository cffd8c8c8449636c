// Which kernels a device takes, as a table. Any thread; needs no device.
//
//     capability   arm            kernels, by tokens of one weight
//     12.0, 12.1   block-scaled   decode | prefill            mma takes UE8M0 scales in hardware
//     9.0          hopper         decode | hopper             wgmma; other weights as portable
//     8.9          portable       decode | prefill            F16 mma, scales in FP32
//     others       none
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
    {90, 91, CUDA_ARM_HOPPER, "compute capability 9.0: wgmma for many tokens"},
    {91, 120, CUDA_ARM_NONE,
     "compute capability above 9.0 and below 12.0: no kernel image in this build"},
    {120, 122, CUDA_ARM_BLOCK_SCALED, "compute capability 12.0 or 12.1: block-scaled mma"},
    {122, 1 << 20, CUDA_ARM_NONE, "compute capability above 12.1: no kernel image in this build"},
};

static const char *const names[][4] = {
    [CUDA_ARM_NONE] = {"none", "none", "none", "none"},
    [CUDA_ARM_BLOCK_SCALED] = {"none", "sm120-decode", "sm120-prefill", "none"},
    [CUDA_ARM_PORTABLE] = {"none", "portable-decode", "portable-prefill", "none"},
    [CUDA_ARM_HOPPER] = {"none", "portable-decode", "portable-prefill", "hopper"},
};

// What a name may force, and why it cannot. The portable kernels are part of Hopper's arm.
struct force_rule {
    const char *name;
    enum cuda_arm arm;
    bool on_hopper; // granted there as well
    const char *refusal;
};

static const struct force_rule force_rules[] = {
    {"sm120", CUDA_ARM_BLOCK_SCALED, false,
     "block-scaled mma needs compute capability 12.0 or 12.1"},
    {"portable", CUDA_ARM_PORTABLE, true, "the portable kernels are not built for this capability"},
    {"hopper", CUDA_ARM_HOPPER, true, "wgmma needs compute capability 9.0"},
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

enum cuda_kernel cuda_kernel_for(const struct einsum_weight_format *format, uint64_t tokens,
                                 uint32_t prefill_from, uint32_t hopper_from)
{
    if (tokens >= hopper_from && einsum_hopper_takes(format))
        return CUDA_KERNEL_HOPPER;
    return tokens >= prefill_from ? CUDA_KERNEL_PREFILL : CUDA_KERNEL_DECODE;
}

static void force(const char *name, struct cuda_choice *choice)
{
    enum cuda_arm found = choice->arm;
    choice->arm = CUDA_ARM_NONE;
    choice->reason = "no kernel has this name: auto, sm120, portable and hopper are known";
    for (size_t i = 0; i < sizeof force_rules / sizeof force_rules[0]; i++) {
        const struct force_rule *rule = &force_rules[i];
        if (strcmp(name, rule->name) != 0)
            continue;
        bool granted = found == rule->arm || (found == CUDA_ARM_HOPPER && rule->on_hopper);
        choice->arm = granted ? rule->arm : CUDA_ARM_NONE;
        choice->reason = granted ? "forced by name" : rule->refusal;
    }
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
    if (forced != NULL && strcmp(forced, "auto") != 0 && choice.arm != CUDA_ARM_NONE)
        force(forced, &choice);
    choice.kernel =
        cuda_kernel_for(format, tokens, CUDA_PREFILL_TOKENS_MIN,
                        choice.arm == CUDA_ARM_HOPPER ? CUDA_HOPPER_TOKENS_MIN : UINT32_MAX);
    choice.mode = cuda_mode_of(format, activation_scale_type);
    choice.name = names[choice.arm][choice.kernel];
    return choice;
}
