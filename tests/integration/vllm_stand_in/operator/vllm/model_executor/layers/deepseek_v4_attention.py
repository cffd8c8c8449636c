import torch
from vllm.models.deepseek_v4.common.ops.fused_inv_rope_fp8_quant import fused_inv_rope_fp8_quant
from vllm.utils.deep_gemm import fp8_einsum
from vllm.utils.torch_utils import direct_register_custom_op


def project(o, wo_a, n_groups, o_lora_rank, einsum_recipe, tma_aligned_scales):
    """What the attention module's forward ends with."""
    o_fp8, o_scale = fused_inv_rope_fp8_quant(
        o, n_groups, einsum_recipe[2], tma_aligned_scales=tma_aligned_scales
    )
    z = torch.empty((o.shape[0], n_groups, o_lora_rank), dtype=torch.bfloat16)
    torch.ops.vllm.deepseek_v4_fp8_einsum(
        o_fp8,
        o_scale,
        wo_a.weight,
        wo_a.weight_scale_inv,
        z,
        "bhr,hdr->bhd",
        list(einsum_recipe),
    )
    return z


def deepseek_v4_fp8_einsum(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
    equation: str,
    recipe: list[int],
) -> None:
    fp8_einsum(equation, (a, a_scale), (b, b_scale), out, recipe=tuple(recipe))


def deepseek_v4_fp8_einsum_fake(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
    equation: str,
    recipe: list[int],
) -> None:
    return None


direct_register_custom_op(
    op_name="deepseek_v4_fp8_einsum",
    op_func=deepseek_v4_fp8_einsum,
    mutates_args=["out"],
    fake_impl=deepseek_v4_fp8_einsum_fake,
)
