"""From a tensor's shape and strides to the wire's name for its layout.

A layout is taken only if every element lies exactly where the wire's definition of it says (a
dimension of one element has no say): there is nothing to guess. What lies otherwise is copied
row-major, and counted, or refused.

    activations  TGR   [T, G, R] row-major; 2-D: [T, G * R]
                 GTR   the same viewed over [G, T, R]: what vLLM's quantisation kernel leaves
    scales       TGK   [T, G, K] row-major; 2-D: [T, G * K]
                 GKT   token fastest, tokens padded to a multiple of 4: [G][K][align4(T)]
    words        UE8M0 four to an int32 [T, G, K / 4]: GKT by [G][K / 4][align4(T)], and row-major,
                 which is TGK's bytes
"""

from __future__ import annotations

from dataclasses import dataclass

from einsumd._errors import CopyRefused, InvalidArgument
from einsumd._native import lib
from einsumd._tensors import BF16, BYTES, E4M3, FP32, HALVES, UE8M0, WORDS, Tensor, count_copy

TGR, GTR = lib.EINSUM_CLIENT_ACTIVATIONS_TGR, lib.EINSUM_CLIENT_ACTIVATIONS_GTR
TGK, GKT = lib.EINSUM_CLIENT_SCALES_TGK, lib.EINSUM_CLIENT_SCALES_GKT
SCALE_FP32, SCALE_UE8M0 = lib.EINSUM_CLIENT_SCALE_FP32, lib.EINSUM_CLIENT_SCALE_UE8M0
OUTPUT_BF16, OUTPUT_FP32 = lib.EINSUM_CLIENT_OUTPUT_BF16, lib.EINSUM_CLIENT_OUTPUT_FP32

RECIPES: dict[tuple[int, ...], int] = {
    (1, 128, 128): lib.EINSUM_CLIENT_RECIPE_1_128_128,
    (1, 1, 128): lib.EINSUM_CLIENT_RECIPE_1_1_128,
    (1, 32, 32): lib.EINSUM_CLIENT_RECIPE_1_32_32,
    (1, 1, 32): lib.EINSUM_CLIENT_RECIPE_1_1_32,
}


@dataclass
class Placed:
    """A tensor in one of the wire's layouts."""

    tensor: Tensor
    layout: int
    elements: int
    kind: int = 0
    """Of scales and outputs: their type on the wire."""


def align4(tokens: int) -> int:
    return (tokens + 3) & ~3


def lies(tensor: Tensor, wanted: tuple[int, ...]) -> bool:
    if 0 in tensor.shape:
        return True
    for n, stride, want in zip(tensor.shape, tensor.strides, wanted):
        if stride != want and n != 1:
            return False
    return True


def check_shape(tensor: Tensor, tokens: int, groups: int, inner: int, names: str) -> None:
    """[T, G, inner] or [T, G * inner]."""
    if tensor.shape in ((tokens, groups, inner), (tokens, groups * inner)):
        return
    raise InvalidArgument(
        f"{tensor.field}: expected {names} = [{tokens}, {groups}, {inner}] or "
        f"[{tokens}, {groups * inner}], got {list(tensor.shape)}",
        field=tensor.field,
    )


def check_kind(tensor: Tensor, allowed: tuple[str, ...]) -> None:
    if tensor.kind not in allowed:
        raise InvalidArgument(
            f"{tensor.field}: expected {' or '.join(allowed)}, got {tensor.kind}",
            field=tensor.field,
        )


def copy(tensor: Tensor, allowed: bool, wanted: str) -> Tensor:
    if not allowed:
        raise CopyRefused(
            f"{tensor!r} is neither of {wanted}; it would have to be copied, which allow_copies "
            "forbids",
            field=tensor.field,
        )
    count_copy()
    return tensor.copied()


def activations(tensor: Tensor, groups: int, reduced: int, copies: bool) -> Placed:
    check_kind(tensor, (E4M3, BYTES))
    tokens = tensor.shape[0] if tensor.shape else 0
    check_shape(tensor, tokens, groups, reduced, "[T, G, R]")
    elements = tokens * groups * reduced
    if len(tensor.shape) == 2:
        if lies(tensor, (groups * reduced, 1)):
            return Placed(tensor, TGR, elements)
    elif lies(tensor, (groups * reduced, reduced, 1)):
        return Placed(tensor, TGR, elements)
    elif lies(tensor, (reduced, tokens * reduced, 1)):
        return Placed(tensor, GTR, elements)
    return Placed(copy(tensor, copies, "[T, G, R] and [G, T, R]"), TGR, elements)


def scales(tensor: Tensor, tokens: int, groups: int, blocks: int, copies: bool) -> Placed:
    check_kind(tensor, (FP32, UE8M0, BYTES, WORDS))
    inner, names = blocks, "[T, G, K]"
    if tensor.kind == WORDS:
        if blocks % 4 != 0:
            raise InvalidArgument(
                f"{tensor.field}: {blocks} blocks of R are no multiple of 4, and cannot be packed "
                "four to an int32",
                field=tensor.field,
            )
        inner, names = blocks // 4, "[T, G, K / 4]"
    check_shape(tensor, tokens, groups, inner, names)
    kind = SCALE_FP32 if tensor.kind == FP32 else SCALE_UE8M0
    stored = align4(tokens)
    flat = len(tensor.shape) == 2

    if lies(tensor, (groups * inner, 1) if flat else (groups * inner, inner, 1)):
        return Placed(tensor, TGK, tokens * groups * inner, kind)
    if tensor.item_bytes == 4 and lies(
        tensor, (1, stored) if flat else (1, inner * stored, stored)
    ):
        # The padding of the last row is read along: it must be there.
        if tensor.room() >= groups * inner * stored:
            return Placed(tensor, GKT, groups * inner * stored, kind)
    copied = copy(tensor, copies, "[T, G, K] and [G][K][T padded to 4]")
    return Placed(copied, TGK, tokens * groups * inner, kind)


def attention(tensor: Tensor, tokens: int, values: int, copies: bool) -> Placed:
    """[T, heads, 512] in BF16, or [T, heads * 512]."""
    check_kind(tensor, (BF16, HALVES))
    check_shape(tensor, tokens, values // 512, 512, "[T, heads, 512]")
    if not lies(tensor, (values, 1) if len(tensor.shape) == 2 else (values, 512, 1)):
        tensor = copy(tensor, copies, "[T, heads, 512]")
    return Placed(tensor, 0, tokens * values)


def output(tensor: Tensor, tokens: int, groups: int, outputs: int, copies: bool) -> Placed:
    """If the tensor that comes back is another one, the caller is to be given what it holds."""
    check_kind(tensor, (BF16, FP32, HALVES))
    check_shape(tensor, tokens, groups, outputs, "[T, G, D]")
    if not tensor.writable:
        raise InvalidArgument(f"{tensor.field}: this array is read-only", field=tensor.field)
    kind = OUTPUT_FP32 if tensor.kind == FP32 else OUTPUT_BF16
    elements = tokens * groups * outputs
    if lies(tensor, (groups * outputs, 1) if len(tensor.shape) == 2 else
            (groups * outputs, outputs, 1)):  # fmt: skip
        return Placed(tensor, 0, elements, kind)
    if not copies:
        copy(tensor, copies, "[T, G, D]")
    count_copy()
    return Placed(tensor.scratch(), 0, elements, kind)
