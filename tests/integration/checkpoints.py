"""Writes safetensors checkpoints with the format's own Python package."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save, save_file

from oracle import Weight

TENSOR_NAME = "layers.{}.attn.wo_a"


def tensors_of(weight: Weight, name: str, scale_suffix: str = "scale") -> dict[str, np.ndarray]:
    """A weight's tensors as DeepSeek stores them: 2-D, the groups' rows below one another."""
    groups, output_dim, reduced_dim = weight.values.shape
    rows = weight.values.reshape(groups * output_dim, reduced_dim)
    if weight.scales is None:
        return {f"{name}.weight": rows.view(ml_dtypes.bfloat16)}
    scales = weight.scales.reshape(-1, weight.scales.shape[2])
    if scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return {
        f"{name}.weight": rows.view(ml_dtypes.float8_e4m3fn),
        f"{name}.{scale_suffix}": scales,
    }


def write_checkpoint(
    directory: Path,
    weights: dict[str, Weight],
    shards: int = 1,
    prefix: str = "",
    scale_suffix: str = "scale",
) -> Path:
    """Tensors are dealt out to the shards in turn, so that a weight and its scale are parted."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in weights.items():
        tensors |= tensors_of(weight, prefix + name, scale_suffix)
    # Bystanders: a checkpoint holds much that is not ours.
    tensors[f"{prefix}embed.weight"] = np.ones((4, 8), ml_dtypes.bfloat16)
    tensors[f"{prefix}layers.0.attn.wo_b.weight"] = np.ones((8, 8), np.float32)

    file_of = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        held = {name: t for i, (name, t) in enumerate(tensors.items()) if i % shards == shard}
        file_of |= dict.fromkeys(held, file)
        save_file(held, directory / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_file(path: Path, weight: Weight, name: str = TENSOR_NAME.format(0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(tensors_of(weight, name)))
    return path


def with_header(path: Path, header: dict | bytes, body: bytes, header_bytes: int | None = None):
    """A safetensors file by hand, however wrong; `header_bytes` lies about the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if header_bytes is None else header_bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(length.to_bytes(8, "little") + text + body)
    return path
