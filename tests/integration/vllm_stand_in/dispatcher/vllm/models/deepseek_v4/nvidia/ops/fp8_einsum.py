import torch
from vllm.utils.deep_gemm import fp8_einsum


def deepseek_v4_fp8_einsum(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
    equation: str,
    recipe: list[int],
) -> None:
    """Where a fork picks its own kernel."""
    fp8_einsum(equation, (a, a_scale), (b, b_scale), out, recipe=tuple(recipe))
