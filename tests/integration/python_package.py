"""The Python package as a user gets it: a wheel built by pip, installed by pip.

Also makes tensors in all the layouts in which callers hold them.
"""

from __future__ import annotations

import functools
import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import oracle
from daemon import REPOSITORY, run

PACKAGE = REPOSITORY / "client/python"
SITE = REPOSITORY / "build/python-site"
TORCH_SITE = REPOSITORY / "build/torch"  # by deploy/install-dependencies.sh --torch


@functools.cache
def wheel() -> Path:
    folder = REPOSITORY / "build/python-wheel"
    shutil.rmtree(folder, ignore_errors=True)
    built = run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder,
        PACKAGE, timeout=600,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = folder.glob("einsumd-*.whl")
    return found


@functools.cache
def einsumd() -> Any:
    """The installed package."""
    shutil.rmtree(SITE, ignore_errors=True)
    installed = run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", SITE, wheel()
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    sys.path.insert(0, str(SITE))
    return importlib.import_module("einsumd")


def torch() -> Any:
    """torch, or None where it is not installed."""
    if TORCH_SITE.exists() and str(TORCH_SITE) not in sys.path:
        sys.path.append(str(TORCH_SITE))
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


# ---- layouts -------------------------------------------------------------------------------------

# Those that the wire has, in the forms in which callers hold them: nothing of them is copied.
ACTIVATIONS = ("TGR", "TGR 2-D", "GTR")
SCALES = {
    "FP32": ("TGK", "TGK 2-D", "GKT", "GKT 2-D"),
    "UE8M0": ("TGK", "TGK 2-D", "packed TGK", "packed GKT", "packed GKT 2-D"),
}
# Others, which are.
COPIED_ACTIVATIONS = ("slice of TGR", "slice of GTR's tokens", "padded rows", "every other")
COPIED_SCALES = {
    "FP32": ("GKT without padding", "slice of TGK", "GTK"),
    "UE8M0": ("GKT of bytes", "slice of TGK", "GTK"),
}


def in_layout(values: np.ndarray, layout: str) -> np.ndarray:
    """`values` [T, G, inner] as a view of memory that is laid out so; NaN bits around them."""
    tokens, groups, inner = values.shape
    if layout.startswith("packed"):
        values = np.ascontiguousarray(values).view(np.int32)
        inner //= 4
        layout = layout.removeprefix("packed ")
    layout, flat = layout.removesuffix(" 2-D"), layout.endswith(" 2-D")
    fill = np.full(1, 0xFF, np.uint8).repeat(values.itemsize).view(values.dtype)[0]

    def memory(*shape: int) -> np.ndarray:
        return np.full(shape, fill, values.dtype)

    if layout in ("TGR", "TGK"):
        view = memory(tokens, groups, inner)
    elif layout in ("GTR", "GTK"):
        view = memory(groups, tokens, inner).transpose(1, 0, 2)
    elif layout == "GKT":
        view = memory(groups, inner, -(-tokens // 4) * 4).transpose(2, 0, 1)[:tokens]
    elif layout in ("GKT without padding", "GKT of bytes"):
        view = memory(groups, inner, tokens).transpose(2, 0, 1)
    elif layout in ("slice of TGR", "slice of TGK"):
        view = memory(tokens, groups + 2, inner)[:, 1:-1]
    elif layout == "slice of GTR's tokens":
        view = memory(groups, tokens + 1, inner).transpose(1, 0, 2)[:tokens]
    elif layout == "padded rows":
        view = memory(tokens, groups, inner + 16)[:, :, :inner]
    elif layout == "every other":
        view = memory(2 * tokens, groups, inner)[::2]
    else:
        raise ValueError(layout)
    view[...] = values
    if flat:
        view = flattened(view)
    return view


def flattened(view: np.ndarray) -> np.ndarray:
    """[T, G * inner] over the same memory."""
    tokens, groups, inner = view.shape
    if view.strides[1] == inner * view.strides[2]:
        flat = view.base if view.base is not None else view
        if view.flags.c_contiguous:
            return view.reshape(tokens, groups * inner)
        assert flat.shape[:2] == (groups, inner)  # GKT
        return flat.reshape(groups * inner, -1).T[:tokens]
    raise ValueError(f"{view.strides} cannot be 2-D")


def arrays(
    activations: oracle.Activations, layout: str, scale_layout: str
) -> tuple[np.ndarray, np.ndarray]:
    """Activations and scales in the types of ml_dtypes."""
    a = in_layout(activations.values, layout).view(ml_dtypes.float8_e4m3fn)
    s = in_layout(activations.scales, scale_layout)
    return a, s.view(ml_dtypes.float8_e8m0fnu) if s.dtype == np.uint8 else s


def tensors(activations: oracle.Activations, layout: str, scale_layout: str) -> tuple[Any, Any]:
    """The same as torch holds them."""
    t = torch()
    a = of_torch(in_layout(activations.values, layout)).view(t.float8_e4m3fn)
    s = of_torch(in_layout(activations.scales, scale_layout))
    return a, s.view(t.float8_e8m0fnu) if s.dtype == t.uint8 else s


def of_torch(view: np.ndarray) -> Any:
    """A tensor over the same memory that, unlike from_numpy's, knows all of it."""
    root = view
    while isinstance(root.base, np.ndarray):
        root = root.base
    flat = torch().from_numpy(root.reshape(-1))
    offset = (view.ctypes.data - root.ctypes.data) // view.itemsize
    return flat.as_strided(view.shape, [s // view.itemsize for s in view.strides], offset)
