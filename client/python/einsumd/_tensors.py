"""numpy arrays and torch tensors, seen alike: what they hold, where it lies, and by which strides.

Nothing here decides about layouts (that is _layout.py's) or copies unasked.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

from einsumd._errors import InvalidArgument

# What the elements of a tensor are, by the names of both libraries' types. Integers are bits, and
# what of is said by the argument that they are given for.
E4M3, UE8M0, BF16, FP32 = "E4M3", "UE8M0", "BF16", "FP32"
BYTES, HALVES, WORDS, LONGS = "BYTES", "HALVES", "WORDS", "LONGS"
KINDS = {
    "float8_e4m3fn": E4M3,
    "float8_e8m0fnu": UE8M0,
    "bfloat16": BF16,
    "float32": FP32,
    "uint8": BYTES,
    "uint16": HALVES,
    "int32": WORDS,
    "int64": LONGS,
}
ITEM_BYTES = {E4M3: 1, UE8M0: 1, BYTES: 1, BF16: 2, HALVES: 2, FP32: 4, WORDS: 4, LONGS: 8}

_copies = 0
_copies_lock = threading.Lock()


def copies() -> int:
    """How many tensors this process has copied because their layout was none of the wire's, or to
    join what several daemons answered. Between one device and another does not count."""
    return _copies


def count_copy() -> None:
    global _copies
    with _copies_lock:
        _copies += 1


class Tensor:
    """A tensor of either library. Strides count elements."""

    __slots__ = ("field", "kind", "raw", "shape", "strides")

    field: str
    raw: Any
    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.kind]

    def address(self) -> int:
        raise NotImplementedError

    def room(self) -> int:
        """Elements from the first one to the end of the memory that holds them."""
        raise NotImplementedError

    def copied(self) -> Tensor:
        """Row-major, elsewhere."""
        raise NotImplementedError

    def scratch(self) -> Tensor:
        """Room for the same, row-major, elsewhere."""
        raise NotImplementedError

    def assign(self, other: Tensor) -> None:
        """Copies another's values here."""
        raise NotImplementedError

    def grouped(self, groups: int, begin: int, end: int) -> Tensor:
        """A view of some groups of all that the second dimension holds."""
        raise NotImplementedError

    @property
    def writable(self) -> bool:
        return True

    def staged(self, elements: int, fill: bool) -> Tensor | None:
        """The first `elements` of its memory where the CPU reaches them, or None if they are."""
        return None

    def __repr__(self) -> str:
        return f"{self.field} {self.kind} {list(self.shape)} by strides {list(self.strides)}"


_numpy_kinds: dict[Any, str] = {}


class NumpyTensor(Tensor):
    __slots__ = ()

    def __init__(self, array: Any, field: str):
        kind = _numpy_kinds.get(array.dtype)
        if kind is None:
            name = array.dtype.name
            if name not in KINDS or not array.dtype.isnative:
                raise wrong_type(field, array.dtype)
            kind = _numpy_kinds[array.dtype] = KINDS[name]
        self.raw, self.field, self.kind, self.shape = array, field, kind, array.shape
        size = array.itemsize
        # Bytes that are no multiple of an element match no layout, and neither does the strange -1.
        self.strides = tuple(s // size if s % size == 0 else -1 for s in array.strides)

    def address(self) -> int:
        address: int = self.raw.__array_interface__["data"][0]
        return address

    def room(self) -> int:
        root = self.raw
        while isinstance(root.base, np.ndarray):
            root = root.base
        low: int = root.__array_interface__["data"][0]
        extent = 0
        if root.size:
            extent = root.itemsize + sum(
                (n - 1) * max(s, 0) for n, s in zip(root.shape, root.strides)
            )
        room: int = max(0, low + extent - self.address()) // self.item_bytes
        return room

    @property
    def writable(self) -> bool:
        writable: bool = self.raw.flags.writeable
        return writable

    def copied(self) -> Tensor:
        return NumpyTensor(np.array(self.raw, order="C", copy=True), self.field)

    def scratch(self) -> Tensor:
        return NumpyTensor(np.empty(self.shape, self.raw.dtype), self.field)

    def assign(self, other: Tensor) -> None:
        self.raw[...] = other.raw

    def grouped(self, groups: int, begin: int, end: int) -> Tensor:
        each = self.shape[1] // groups
        return NumpyTensor(self.raw[:, begin * each : end * each], self.field)


_torch_kinds: dict[Any, str] = {}


class TorchTensor(Tensor):
    __slots__ = ()

    def __init__(self, tensor: Any, field: str):
        kind = _torch_kinds.get(tensor.dtype)
        if kind is None:
            name = str(tensor.dtype).removeprefix("torch.")
            if name not in KINDS:
                raise wrong_type(field, tensor.dtype)
            kind = _torch_kinds[tensor.dtype] = KINDS[name]
        if tensor.device.type not in ("cpu", "cuda"):
            raise InvalidArgument(
                f"{field}: expected a tensor on the CPU or a CUDA device, got one on "
                f"{tensor.device}",
                field=field,
            )
        self.raw, self.field, self.kind = tensor, field, kind
        self.shape, self.strides = tuple(tensor.shape), tensor.stride()

    def address(self) -> int:
        address: int = self.raw.data_ptr()
        return address

    def room(self) -> int:
        storage = self.raw.untyped_storage()
        elements: int = storage.nbytes() // self.item_bytes - self.raw.storage_offset()
        return elements

    def copied(self) -> Tensor:
        torch = sys.modules["torch"]
        copy = self.raw.detach().clone(memory_format=torch.contiguous_format)
        return TorchTensor(copy, self.field)

    def scratch(self) -> Tensor:
        torch = sys.modules["torch"]
        raw = torch.empty(self.shape, dtype=self.raw.dtype, device=self.raw.device)
        return TorchTensor(raw, self.field)

    def assign(self, other: Tensor) -> None:
        # Into pinned memory or out of it this does not wait for the device.
        self.raw.detach().copy_(other.raw.view(self.raw.shape), non_blocking=True)

    def grouped(self, groups: int, begin: int, end: int) -> Tensor:
        each = self.shape[1] // groups
        return TorchTensor(self.raw.detach()[:, begin * each : end * each], self.field)

    def staged(self, elements: int, fill: bool) -> Tensor | None:
        if self.raw.device.type == "cpu":
            return None
        torch = sys.modules["torch"]
        if torch.cuda.is_current_stream_capturing():
            raise InvalidArgument(
                f"{self.field}: a CUDA graph is being captured, and a call to the daemon cannot be "
                "part of one; split the graph here (vLLM: splitting_ops)",
                field=self.field,
            )
        pinned = torch.empty(elements, dtype=self.raw.dtype, pin_memory=True)
        if fill:
            pinned.copy_(self.raw.detach().as_strided((elements,), (1,)), non_blocking=True)
        return TorchTensor(pinned, self.field)


def wrap(raw: Any, field: str) -> Tensor:
    if isinstance(raw, np.ndarray):
        return NumpyTensor(raw, field)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(raw, torch.Tensor):
        return TorchTensor(raw, field)
    raise InvalidArgument(
        f"{field}: expected a numpy array or a torch tensor, got {type(raw).__name__}", field=field
    )


def wait_for_device(tensors: list[Tensor]) -> None:
    """Until what was staged from CUDA devices has arrived."""
    for device in {each.raw.device for each in tensors if isinstance(each, TorchTensor)}:
        if device.type == "cuda":
            sys.modules["torch"].cuda.current_stream(device).synchronize()


def wrong_type(field: str, dtype: Any) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: elements of type {dtype}; expected one of {', '.join(KINDS)}", field=field
    )
