import torch
from vllm.models.deepseek_v4.common.ops.fused_inv_rope_fp8_quant import fused_inv_rope_fp8_quant
from vllm.utils.deep_gemm import fp8_einsum


def deep_gemm_fp8_o_proj(o, wo_a, *, n_groups, o_lora_rank, einsum_recipe, tma_aligned_scales):
    o_fp8, o_scale = fused_inv_rope_fp8_quant(
        o, n_groups, einsum_recipe[2], tma_aligned_scales=tma_aligned_scales
    )
    return deep_gemm_prequantized_o_proj(
        (o_fp8, o_scale), wo_a, n_groups=n_groups, o_lora_rank=o_lora_rank,
        einsum_recipe=einsum_recipe,
    )  # fmt: skip


def deep_gemm_prequantized_o_proj(attn_out, wo_a, *, n_groups, o_lora_rank, einsum_recipe):
    z = torch.empty((attn_out[0].shape[0], n_groups, o_lora_rank), dtype=torch.bfloat16)
    fp8_einsum(
        "bhr,hdr->bhd",
        (attn_out[0][:, :n_groups], attn_out[1][:, :n_groups]),
        (wo_a.weight, wo_a.weight_scale_inv),
        z,
        recipe=einsum_recipe,
    )
    return z


def project(o, wo_a, n_groups, o_lora_rank, einsum_recipe, tma_aligned_scales):
    return deep_gemm_fp8_o_proj(
        o, wo_a, n_groups=n_groups, o_lora_rank=o_lora_rank, einsum_recipe=einsum_recipe,
        tma_aligned_scales=tma_aligned_scales,
    )  # fmt: skip
