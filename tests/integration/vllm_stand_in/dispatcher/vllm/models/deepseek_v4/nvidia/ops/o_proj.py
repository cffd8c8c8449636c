import torch
from vllm.models.deepseek_v4.common.ops.fused_inv_rope_fp8_quant import fused_inv_rope_fp8_quant
from vllm.models.deepseek_v4.nvidia.ops.fp8_einsum import deepseek_v4_fp8_einsum
from vllm.utils.deep_gemm import fp8_einsum


def project(o, wo_a, n_groups, o_lora_rank, einsum_recipe, tma_aligned_scales):
    o_proj_input, o_scale = fused_inv_rope_fp8_quant(
        o, n_groups, einsum_recipe[2], tma_aligned_scales=tma_aligned_scales
    )
    z = torch.empty((o.shape[0], n_groups, o_lora_rank), dtype=torch.bfloat16)
    if not tma_aligned_scales:
        deepseek_v4_fp8_einsum(
            o_proj_input,
            o_scale,
            wo_a.weight,
            wo_a.weight_scale_inv,
            z,
            "bhr,hdr->bhd",
            list(einsum_recipe),
        )
    else:
        fp8_einsum(
            "bhr,hdr->bhd",
            (o_proj_input, o_scale),
            (wo_a.weight, wo_a.weight_scale_inv),
            z,
            recipe=einsum_recipe,
        )
    return z
