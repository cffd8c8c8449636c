"""What the daemon must answer, in FP64, and how far an answer may lie from it.

Written from the definition of the operation alone, so that it shares no mistake with the daemon's
own reference:

    out[t,g,d] = sum over r of  A[t,g,r] * sA(t,g,r/block) * B[g,d,r] * sB(g, d/block_d, r/block)

Tensors are held as raw bits (uint8 for E4M3 and UE8M0, uint16 for BF16) in their logical shape;
packing to a wire layout is a separate step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import ml_dtypes
import numpy as np

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
UE8M0 = np.where(np.arange(256) == 255, np.nan, np.ldexp(1.0, np.arange(256) - 127))

E4M3_NAN = (0x7F, 0xFF)
E4M3_MAX_BITS = 0x7E  # 448
UE8M0_NAN = 0xFF

# The wire's enum names, less their common prefixes.
ACTIVATION_LAYOUTS = ("TGR", "GTR")
SCALE_LAYOUTS = ("TGK", "GKT")
SCALE_TYPES = ("FP32", "UE8M0")
OUTPUT_TYPES = ("BF16", "FP32")

# Significant bits, the hidden one counted, and the exponent of the largest finite value: the same
# for both, as is the smallest normal exponent.
SIGNIFICANT_BITS = {"BF16": 8, "FP32": 24}
EXPONENT_MAX, EXPONENT_MIN = 127, -126

WGMMA_STEP, WGMMA_BLOCK = 32, 128  # products that SM 9.0's tensor core adds at a time, in all


def decode_scales(scales: np.ndarray) -> np.ndarray:
    return UE8M0[scales] if scales.dtype == np.uint8 else scales.astype(np.float64)


@dataclass(eq=False)
class Weight:
    """One weight as a checkpoint stores it."""

    values: np.ndarray  # [G, D, R]: uint8 E4M3 or uint16 BF16
    scales: np.ndarray | None  # [G, D / block_d, R / block_r]: float32 or uint8; None for BF16
    block_d: int = 1
    block_r: int = 128

    @property
    def groups(self) -> int:
        return self.values.shape[0]

    @property
    def output_dim(self) -> int:
        return self.values.shape[1]

    @property
    def reduced_dim(self) -> int:
        return self.values.shape[2]

    @property
    def blocks(self) -> int:
        """K, the number of scale blocks of an activation row."""
        return self.reduced_dim // self.block_r

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """[G, D, R] in FP64. E4M3 times an FP32 scale has 28 significant bits: no rounding."""
        if self.scales is None:
            with np.errstate(invalid="ignore"):  # converting a signalling NaN
                return self.values.view(ml_dtypes.bfloat16).astype(np.float64)
        scales = decode_scales(self.scales)
        scales = scales.repeat(self.block_d, axis=1).repeat(self.block_r, axis=2)
        return E4M3[self.values] * scales

    def slice(self, begin: int, end: int) -> Weight:
        """The groups that a tensor-parallel rank holds."""
        scales = None if self.scales is None else self.scales[begin:end]
        return Weight(self.values[begin:end], scales, self.block_d, self.block_r)


@dataclass(eq=False)
class Activations:
    values: np.ndarray  # [T, G, R] uint8 E4M3
    scales: np.ndarray  # [T, G, K] float32 or uint8

    @property
    def tokens(self) -> int:
        return self.values.shape[0]

    @property
    def exact(self) -> np.ndarray:
        block = self.values.shape[2] // self.scales.shape[2]
        return E4M3[self.values] * decode_scales(self.scales).repeat(block, axis=2)


def pack_activations(activations: Activations, layout: str) -> bytes:
    if layout == "TGR":
        return activations.values.tobytes()
    return activations.values.transpose(1, 0, 2).tobytes()


def pack_scales(activations: Activations, layout: str, padding: int = 0xFF) -> bytes:
    """Padding of GKT is filled with `padding`, NaN by default: it must never be looked at."""
    scales = activations.scales
    if layout == "TGK":
        return scales.tobytes()
    tokens, groups, blocks = scales.shape
    stored_tokens = -(-tokens // 4) * 4
    if scales.dtype == np.float32:
        packed = np.full((groups, blocks, stored_tokens, 4), padding, np.uint8)
        packed[:, :, :tokens] = scales.transpose(1, 2, 0)[..., None].copy().view(np.uint8)
    else:
        packed = np.full((groups, blocks // 4, stored_tokens, 4), padding, np.uint8)
        for k in range(blocks):
            packed[:, k // 4, :tokens, k % 4] = scales[:, :, k].T
    return packed.tobytes()


def project(
    activations: Activations, weight: Weight, wgmma: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The exact result [T, G, D], and by how much a sum in FP32 may miss it; or, if `wgmma`, a sum
    by SM 9.0's tensor cores, for weights that it takes."""
    a, b = activations.exact, weight.exact
    shape = (activations.tokens, weight.groups, weight.output_dim)
    exact, error = np.empty(shape), np.empty(shape)
    with np.errstate(invalid="ignore"):
        for g in range(weight.groups):
            exact[:, g] = a[:, g] @ b[g].T
            error[:, g] = np.abs(a[:, g]) @ np.abs(b[g]).T * (weight.reduced_dim * 2.0**-24)
            if wgmma and weight.scales is not None and weight.block_r == WGMMA_BLOCK:
                error[:, g] += wgmma_loss(a[:, g], b[g])
    return exact, error


def wgmma_loss(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For a [T, R] and b [D, R]: of each step all that is added, the sum of the scale block so far
    included, is cut 13 bits below the greatest of it. The largest factors stand for the greatest
    product."""
    steps = a.shape[1] // WGMMA_STEP
    a, b = (np.nan_to_num(each, nan=0.0).reshape(len(each), steps, -1) for each in (a, b))
    a_largest, b_largest = np.abs(a).max(axis=2), np.abs(b).max(axis=2)
    loss, running = np.zeros((2, len(a), len(b)))
    for step in range(steps):
        if step * WGMMA_STEP % WGMMA_BLOCK == 0:
            running = np.zeros_like(loss)
        greatest = np.outer(a_largest[:, step], b_largest[:, step])
        loss += (WGMMA_STEP + 1) * 2.0**-13 * np.maximum(greatest, np.abs(running))
        running += a[:, step] @ b[:, step].T
    return loss


def decode_output(output: bytes, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype = ml_dtypes.bfloat16 if kind == "BF16" else np.float32
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    assert len(output) == expected, f"output holds {len(output)} bytes, expected {expected}"
    with np.errstate(invalid="ignore"):  # converting a signalling NaN
        return np.frombuffer(output, dtype).reshape(shape).astype(np.float64)


def half_ulp(exact: np.ndarray, kind: str) -> np.ndarray:
    """Half a unit in the last place: how far rounding to nearest may move a value."""
    exponent = np.frexp(exact)[1] - 1
    exponent = np.maximum(exponent, EXPONENT_MIN)
    return np.ldexp(1.0, exponent - SIGNIFICANT_BITS[kind])


def wrong_elements(
    got: np.ndarray, exact: np.ndarray, error: np.ndarray, kind: str
) -> np.ndarray:
    """A mask of the elements that no correct engine could have answered.

    Allowed are one rounding to the output type and `error` of the sum; NaN exactly where
    the exact result is NaN; infinity only where the exact result, within the sum's error, rounds
    to it.
    """
    nan = np.isnan(exact)
    finite = np.where(nan, 0.0, exact)
    summing = np.where(nan, 0.0, error)
    # From here on a value rounds to infinity: half a unit past the largest finite one.
    overflow = np.ldexp(2.0 - 2.0 ** -SIGNIFICANT_BITS[kind], EXPONENT_MAX)

    must_overflow = np.abs(finite) - summing >= overflow
    # A sum that passes the range on the way to a small result is a mistake, however large the
    # summing error of such terms: hence the second condition.
    may_overflow = (np.abs(finite) + summing >= overflow) & (np.abs(finite) >= overflow / 2)

    infinite = np.isinf(got)
    with np.errstate(invalid="ignore"):
        near = np.abs(got - finite) <= half_ulp(finite, kind) + summing
        right = np.where(
            infinite,
            may_overflow & (np.sign(got) == np.sign(finite)),
            near & ~must_overflow,
        )
    return np.where(nan, ~np.isnan(got), ~right)


def check(output: bytes, kind: str, exact: np.ndarray, error: np.ndarray) -> None:
    """Asserts that `output` is right; the message names the first wrong element."""
    got = decode_output(output, kind, exact.shape)
    wrong = wrong_elements(got, exact, error, kind)
    if wrong.any():
        t, g, d = first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.size} elements are wrong, first at token {t} group {g} "
            f"row {d}: got {got[first]!r}, exact {exact[first]!r}, "
            f"allowed error of the sum {error[first]!r}"
        )


def matches(output: bytes, kind: str, exact: np.ndarray, error: np.ndarray) -> bool:
    got = decode_output(output, kind, exact.shape)
    return not wrong_elements(got, exact, error, kind).any()


def same_but_for_rounding(output: bytes, other: bytes) -> bool:
    """Whether two BF16 answers to one request agree. How many tokens share its batch decides the
    order of an FP32 sum, and so, now and then, to which of two neighbours it is rounded."""
    a, b = (decode_output(each, "BF16", (len(each) // 2,)) for each in (output, other))
    slack = 2 * half_ulp(b, "BF16") + 1e-5 * np.abs(b).max()
    return len(a) == len(b) and bool((np.abs(a - b) <= slack).all())


# --- made-up tensors ------------------------------------------------------------------------------


def random_e4m3(rng: np.random.Generator, shape: tuple[int, ...], spread: str) -> np.ndarray:
    """`spread` "normal": like real data; "bits": every pattern alike, subnormals too, no NaN."""
    if spread == "normal":
        values = np.clip(rng.standard_normal(shape, np.float32) * 64, -448, 448)
        return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert spread == "bits"
    bits = rng.integers(0, 256, shape, np.uint8)
    bits[(bits & 0x7F) == 0x7F] = E4M3_MAX_BITS
    return bits


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Near one; FP32 ones are no powers of two, and some are negative or zero."""
    if kind == "UE8M0":
        return rng.integers(120, 135, shape, np.uint8)
    scales = np.exp2(rng.uniform(-7, 7, shape)).astype(np.float32)
    scales[rng.random(shape) < 0.05] *= np.float32(-1)
    scales[rng.random(shape) < 0.02] = 0
    return scales


def random_activations(
    rng: np.random.Generator, weight: Weight, tokens: int, scale_type: str, spread: str = "normal"
) -> Activations:
    shape = (tokens, weight.groups)
    return Activations(
        random_e4m3(rng, (*shape, weight.reduced_dim), spread),
        random_scales(rng, (*shape, weight.blocks), scale_type),
    )


def random_weight(
    rng: np.random.Generator,
    groups: int,
    output_dim: int,
    reduced_dim: int,
    block_d: int = 128,
    block_r: int = 128,
    scale_type: str | None = "UE8M0",
    spread: str = "normal",
) -> Weight:
    """`scale_type` None: a BF16 weight, which has no scales."""
    shape = (groups, output_dim, reduced_dim)
    if scale_type is None:
        values = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        return Weight(values.view(np.uint16), None)
    scale_shape = (groups, output_dim // block_d, reduced_dim // block_r)
    return Weight(
        random_e4m3(rng, shape, spread),
        random_scales(rng, scale_shape, scale_type),
        block_d,
        block_r,
    )
