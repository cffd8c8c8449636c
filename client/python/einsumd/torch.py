"""Custom operators of torch: importing this registers

    torch.ops.einsumd.fp8_einsum(equation, a, a_scale, b, out, recipe=[1, 128, 128])
    torch.ops.einsumd.fp8_einsum_bound(a, a_scale, b, b_scale, out, equation, recipe, otherwise="")

Both write `out` and return nothing. The first takes a weight by name or by Handle.key; the second,
in the order of vLLM's operator, by the tensor that a front-end holds, once bind() has said which
weight that is. Both go through torch.compile without a graph break, as opaque calls, outside of
CUDA graphs. fp8_einsum() here is DeepGEMM's function over them, for use in compiled code.

Inductor refuses float8_e8m0fnu tensors of any operator that writes to an argument (pytorch#189522):
in compiled code give UE8M0 scales to the operators as .view(torch.uint8), as fp8_einsum() does.

Tensors on a CUDA device are staged through pinned memory: their stream is waited for, the call is
made, and the output is copied back in stream order. No CUDA device was at hand when this was
written: that path has not run yet.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from einsumd._client import Client, Handle, default_client, parse_key
from einsumd._errors import FailedPrecondition, InvalidArgument, Unimplemented

__all__ = ["bind", "bound", "fp8_einsum", "set_tensor_parallel_rank", "unbind"]

# By hand and not by torch.library.custom_op, which takes five times as long for each call.
_library = torch.library.Library("einsumd", "FRAGMENT")
_tags = tuple(
    getattr(torch.Tag, name)
    # Layouts are strides: inductor must pass them on. A CUDA graph cannot hold a call.
    for name in ("needs_exact_strides", "needs_fixed_stride_order", "cudagraph_unsafe")
    if hasattr(torch.Tag, name)
)


def _fp8_einsum(
    equation: str,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: str,
    out: torch.Tensor,
    recipe: Sequence[int] = (1, 128, 128),
) -> None:
    handle = parse_key(b)
    handle.client.einsum(handle, a, a_scale, out, recipe=recipe, equation=equation)


def _fp8_einsum_bound(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out: torch.Tensor,
    equation: str,
    recipe: Sequence[int],
    otherwise: str = "",
) -> None:
    if otherwise and _find(b) is None:
        # As they were before _bits().
        scales = [s.view(torch.float8_e8m0fnu) if s.dtype == torch.uint8 else s
                  for s in (a_scale, b_scale)]  # fmt: skip
        fallbacks[otherwise](a, scales[0], b, scales[1], out, equation, list(recipe))
        return
    handle = bound(b, out)
    handle.client.einsum(handle, a, a_scale, out, recipe=recipe, equation=equation)


def _nothing(*_: Any, **__: Any) -> None:
    """What the operators do to tensors without data: they return nothing and keep all shapes."""


def _register(schema: str, function: Callable[..., None]) -> None:
    name = schema.split("(")[0]
    _library.define(schema, tags=_tags)
    for device in ("CPU", "CUDA"):
        _library.impl(name, function, device)
    torch.library.register_fake(f"einsumd::{name}", _nothing, lib=_library)


_register(
    "fp8_einsum(str equation, Tensor a, Tensor a_scale, str b, Tensor(a!) out, "
    "int[] recipe=[1, 128, 128]) -> ()",
    _fp8_einsum,
)
_register(
    "fp8_einsum_bound(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor(a!) out, "
    "str equation, int[] recipe, str otherwise='') -> ()",
    _fp8_einsum_bound,
)


fallbacks: dict[str, Callable[..., Any]] = {}
"""What fp8_einsum_bound's `otherwise` names: called, with all before it, if `b` is not bound."""


def operator(otherwise: str, traced: bool = False) -> Callable[..., None]:
    """fp8_einsum_bound with `otherwise` given: as a kernel, or to be called in traced code."""

    def kernel(*given: Any) -> None:
        if _find(given[2]) is None:
            fallbacks[otherwise](*given)
        else:
            _fp8_einsum_bound(*given)

    def call(a: Any, a_scale: Any, b: Any, b_scale: Any, *rest: Any) -> None:
        torch.ops.einsumd.fp8_einsum_bound(a, _bits(a_scale), b, _bits(b_scale), *rest, otherwise)

    return call if traced else kernel


def _bits(scales: torch.Tensor) -> torch.Tensor:
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales


def fp8_einsum(
    expr: str,
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[Any, Any],
    d: torch.Tensor,
    c: None = None,
    recipe: Sequence[int] = (1, 128, 128),
    *,
    otherwise: str = "",
) -> None:
    """DeepGEMM's function by way of the operators: b[0] is a bound tensor, a name or a handle."""
    if c is not None:
        raise Unimplemented("c: expected None, adding to it is not supported", field="c")
    weight, weight_scale = b
    if isinstance(weight, torch.Tensor):
        torch.ops.einsumd.fp8_einsum_bound(
            a[0], _bits(a[1]), weight, _bits(weight_scale), d, expr, list(recipe), otherwise
        )
        return
    key = weight if isinstance(weight, str) else weight.key
    torch.ops.einsumd.fp8_einsum(expr, a[0], _bits(a[1]), key, d, list(recipe))


# ---- tensors that stand for resident weights -----------------------------------------------------


@dataclass
class _Binding:
    tensor: weakref.ref[Any]
    begin: int
    end: int  # of its memory
    weight: Handle | str
    client: Callable[[], Client]


_bindings: dict[int, _Binding] = {}  # by `begin`
_resolved: dict[tuple[Any, ...], Handle] = {}
_lock = threading.Lock()
_rank: Callable[[], int] | None = None


def bind(
    tensor: torch.Tensor,
    weight: Handle | str,
    client: Client | Callable[[], Client] | None = None,
) -> None:
    """From now on `tensor`, and every view of whole groups of it, means this resident weight.

    The tensor is [G, D, R] or [G * D, R], contiguous. It is not read, and not kept alive: what is
    bound ends with it. A name is looked up at the first call, with what `client` is or returns, or
    the default client.
    """
    if not tensor.is_contiguous() or tensor.dim() not in (2, 3) or not tensor.numel():
        raise InvalidArgument(
            f"expected a contiguous weight [G, D, R] or [G * D, R], got {list(tensor.shape)} by "
            f"strides {list(tensor.stride())}"
        )
    begin = tensor.data_ptr()

    def owner() -> Client:
        return client if isinstance(client, Client) else (client or default_client)()

    def end(reference: weakref.ref[Any]) -> None:
        found = _bindings.get(begin)
        if found is not None and found.tensor is reference:
            _bindings.pop(begin, None)
            _resolved.clear()

    size = tensor.numel() * tensor.element_size()
    binding = _Binding(weakref.ref(tensor, end), begin, begin + size, weight, owner)
    with _lock:
        _bindings[begin] = binding
        _resolved.clear()


def unbind(tensor: torch.Tensor | None = None) -> None:
    """Forgets what a tensor means, or what all mean."""
    with _lock:
        if tensor is None:
            _bindings.clear()
        else:
            _bindings.pop(tensor.data_ptr(), None)
        _resolved.clear()


def set_tensor_parallel_rank(rank: int | Callable[[], int] | None) -> None:
    """Whose groups are meant where a tensor holds more of them than a call, or a weight more than
    its tensor."""
    global _rank
    _rank = (lambda: rank) if isinstance(rank, int) else rank
    _resolved.clear()


def bound(tensor: torch.Tensor, out: torch.Tensor | None = None) -> Handle:
    """What a bound tensor, or a view of whole groups of it, means to a call with this output."""
    groups = out.shape[1] if out is not None and out.dim() == 3 else None
    key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), groups)
    handle = _resolved.get(key)
    if handle is None or handle.client.daemons[0].closed:
        handle = _resolve(tensor, groups)
        _resolved[key] = handle
    return handle


def _find(tensor: torch.Tensor) -> tuple[_Binding, Any] | None:
    """The binding that a tensor's memory lies in, and the tensor that was bound."""
    address = tensor.data_ptr()
    binding = _bindings.get(address)
    if binding is None:
        with _lock:
            found = (b for b in _bindings.values() if b.begin <= address < b.end)
            binding = next(found, None)
    whole = binding.tensor() if binding else None
    return None if binding is None or whole is None else (binding, whole)


def _resolve(tensor: torch.Tensor, groups: int | None) -> Handle:
    found = _find(tensor)
    if found is None:
        raise FailedPrecondition(
            f"b: this tensor {list(tensor.shape)} stands for no resident weight: "
            "einsumd.torch.bind it, or the model that it belongs to by einsumd.vllm.bind",
            field="b",
        )
    binding, whole = found
    handle = binding.weight
    if isinstance(handle, str):
        handle = parse_key(handle, binding.client())
    weight = handle.weight
    row = weight.reduced_dim * tensor.element_size()
    held = _groups_of(whole, weight.output_dim, weight.reduced_dim)
    here = _groups_of(tensor, weight.output_dim, weight.reduced_dim)
    first, rest = divmod(tensor.data_ptr() - binding.begin, weight.output_dim * row)
    if held is None or here is None or rest:
        raise InvalidArgument(
            f"b: {list(tensor.shape)} by strides {list(tensor.stride())}, a view of "
            f"{list(whole.shape)}, is not made of whole groups of {weight.name}, which are "
            f"[{weight.output_dim}, {weight.reduced_dim}]",
            field="b",
        )
    # The tensor may be a rank's part of the weight, and the call of a rank's part of the tensor.
    handle = _slice(handle, held)[first : first + here]
    return _slice(handle, here if groups is None else groups)


def _groups_of(tensor: Any, outputs: int, reduced: int) -> int | None:
    if not tensor.is_contiguous() or tensor.shape[-1] != reduced:
        return None
    rows = tensor.numel() // reduced
    return rows // outputs if rows % outputs == 0 else None


def _slice(handle: Handle, groups: int) -> Handle:
    """A rank's part of that many groups."""
    if groups == handle.groups:
        return handle
    if groups == 0 or handle.groups % groups:
        raise InvalidArgument(
            f"b: {groups} groups are no part of the {handle.groups} of {handle!r}", field="b"
        )
    if _rank is None:
        raise FailedPrecondition(
            f"b: which {groups} of the {handle.groups} groups of {handle!r} are meant depends on "
            "the tensor-parallel rank: einsumd.torch.set_tensor_parallel_rank"
        )
    begin = _rank() % (handle.groups // groups) * groups
    return handle[begin : begin + groups]
