"""The step before the einsum, from its definition: attention's output, rotated back and quantised.

    frequency[i] = theta^(-2i/64), slowed by YaRN;  angle = position * frequency[i], both FP32
    x0, x1 = dims 448 + 2i, 449 + 2i of a head:  x0 cos + x1 sin, x1 cos - x0 sin, in FP32
    scale = 2^ceil(log2(max(|x|, 1e-10) / 448)) of each block of R;  E4M3 of x / scale

What comes out is what oracle.project takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from oracle import UE8M0_NAN, Activations

HEAD_DIM, ROPE_DIM = 512, 64
PAIRS = ROPE_DIM // 2
ONE = np.float32(1)


@dataclass(frozen=True)
class Rope:
    theta: float
    factor: float = 1
    original_positions_max: int = 0
    beta_fast: float = 32
    beta_slow: float = 1

    def pair_that_turns(self, turns: float) -> float:
        wavelengths = self.original_positions_max / (turns * 2 * math.pi)
        return ROPE_DIM * math.log(wavelengths) / (2 * math.log(self.theta))

    @property
    def frequencies(self) -> np.ndarray:
        exponents = np.arange(0, ROPE_DIM, 2) / ROPE_DIM
        frequencies = ONE / np.power(float(np.float32(self.theta)), exponents).astype(np.float32)
        if self.factor == 1:
            return frequencies
        low = max(math.floor(self.pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(self.pair_that_turns(self.beta_slow)), ROPE_DIM - 1)
        span = np.float32(high - low if high != low else 0.001)
        ramp = np.clip((np.arange(PAIRS, dtype=np.float32) - np.float32(low)) / span, 0, 1)
        kept = ONE - ramp
        return frequencies / np.float32(self.factor) * (ONE - kept) + frequencies * kept

    def rotations(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, each [T, 32]."""
        angles = positions.astype(np.float32)[:, None] * self.frequencies[None, :]
        exact = angles.astype(np.float64)
        return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Cache:
    table: np.ndarray  # [positions, 64] float32

    def rotations(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.table[positions, :PAIRS], self.table[positions, PAIRS:]


def rotate_back(heads: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """`heads` is [T, heads, 512] float32, which it leaves alone."""
    result = heads.copy()
    even, odd = heads[..., -ROPE_DIM::2], heads[..., -ROPE_DIM + 1 :: 2]
    cos, sin = cos[:, None], sin[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        result[..., -ROPE_DIM::2] = even * cos + odd * sin
        result[..., -ROPE_DIM + 1 :: 2] = odd * cos - even * sin
    return result


def quantise(rows: np.ndarray, block_r: int) -> Activations:
    """`rows` is [T, G, R] float32. A block that is not all finite: scale NaN and values 0."""
    blocks = rows.reshape(*rows.shape[:2], -1, block_r)
    finite = np.isfinite(blocks).all(axis=-1)
    blocks = np.where(finite[..., None], blocks, np.float32(0))
    largest = np.maximum(np.abs(blocks).max(axis=-1).astype(np.float64), 1e-10) / 448
    mantissa, exponent = np.frexp(largest)  # mantissa in [0.5, 1)
    exponent = exponent - (mantissa == 0.5)
    scaled = np.ldexp(blocks.astype(np.float64), -exponent[..., None]).astype(np.float32)
    values = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).reshape(rows.shape)
    return Activations(values, np.where(finite, exponent + 127, UE8M0_NAN).astype(np.uint8))


def activations_of(
    attention: np.ndarray, positions: np.ndarray, rope: Rope | Cache, groups: int, block_r: int
) -> Activations:
    """`attention` is [T, heads, 512] in the bits of BF16."""
    heads = attention.view(ml_dtypes.bfloat16).astype(np.float32)
    rows = rotate_back(heads, *rope.rotations(positions))
    return quantise(rows.reshape(len(attention), groups, -1), block_r)


def random_attention(rng: np.random.Generator, tokens: int, heads: int) -> np.ndarray:
    """Heads of different magnitude, and some small elements among large ones."""
    values = rng.standard_normal((tokens, heads, HEAD_DIM), np.float32)
    values *= np.exp2(rng.integers(-20, 20, (tokens, heads, 1))).astype(np.float32)
    values *= np.exp2(-rng.integers(0, 12, values.shape)).astype(np.float32)
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)
