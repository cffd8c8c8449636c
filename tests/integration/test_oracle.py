"""The oracle judges the daemon; here it is judged itself: by a plain loop, and by whether it
rejects what a wrong engine would answer."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import oracle


def to_output(values: np.ndarray, kind: str) -> bytes:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(ml_dtypes.bfloat16 if kind == "BF16" else np.float32).tobytes()


@pytest.fixture
def case(rng: np.random.Generator) -> tuple[oracle.Activations, oracle.Weight]:
    weight = oracle.random_weight(rng, 2, 64, 128, 32, 32, "FP32", "bits")
    return oracle.random_activations(rng, weight, 3, "UE8M0", "bits"), weight


def test_project_is_the_definition(case) -> None:
    activations, weight = case
    exact, error = oracle.project(activations, weight)
    for t, g, d in ((0, 0, 0), (2, 1, 63), (1, 0, 32)):
        products = [
            oracle.E4M3[activations.values[t, g, r]]
            * 2.0 ** (int(activations.scales[t, g, r // 32]) - 127)
            * oracle.E4M3[weight.values[g, d, r]]
            * float(weight.scales[g, d // 32, r // 32])
            for r in range(128)
        ]
        assert exact[t, g, d] == pytest.approx(sum(products), rel=1e-12)
        allowed = 128 * 2.0**-24 * sum(map(abs, products))
        assert error[t, g, d] == pytest.approx(allowed, rel=1e-12)


def test_tables() -> None:
    assert oracle.E4M3[[0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0xFE]].tolist() == [
        0, 2**-9, 7 * 2**-9, 2**-6, 1, 448, -448,
    ]  # fmt: skip
    assert np.isnan(oracle.E4M3[list(oracle.E4M3_NAN)]).all()
    assert oracle.UE8M0[[0, 127, 254]].tolist() == [2.0**-127, 1, 2.0**127]
    assert np.isnan(oracle.UE8M0[oracle.UE8M0_NAN])


def test_packing() -> None:
    """Spot checks of single bytes against the layouts' definitions."""
    values = np.arange(5 * 2 * 8, dtype=np.uint8).reshape(5, 2, 8)
    scales = np.arange(100, 100 + 5 * 2 * 8, dtype=np.uint8).reshape(5, 2, 8)
    activations = oracle.Activations(values, scales)
    assert oracle.pack_activations(activations, "TGR")[(3 * 2 + 1) * 8 + 5] == values[3, 1, 5]
    assert oracle.pack_activations(activations, "GTR")[(1 * 5 + 3) * 8 + 5] == values[3, 1, 5]
    assert oracle.pack_scales(activations, "TGK")[(3 * 2 + 1) * 8 + 6] == scales[3, 1, 6]
    words = np.frombuffer(oracle.pack_scales(activations, "GKT"), "<u4").reshape(2, 2, 8)
    assert words[1, 1, 3] >> 16 & 0xFF == scales[3, 1, 6]  # byte 2 of word 1
    assert (words[:, :, 5:] == 0xFFFFFFFF).all()
    activations.scales = scales.astype(np.float32)
    floats = np.frombuffer(oracle.pack_scales(activations, "GKT"), "<f4").reshape(2, 8, 8)
    assert floats[1, 6, 3] == scales[3, 1, 6]
    assert np.isnan(floats[:, :, 5:]).all()


@pytest.mark.parametrize("kind", oracle.OUTPUT_TYPES)
def test_right_answers_pass(case, kind: str) -> None:
    exact, error = oracle.project(*case)
    oracle.check(to_output(exact, kind), kind, exact, error)


def test_wrong_answers_fail(case) -> None:
    activations, weight = case
    exact, error = oracle.project(activations, weight)
    truncated = (exact.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    swapped = exact[:, ::-1]
    other_token = exact[[1, 0, 2]]
    one_nan = exact.copy()
    one_nan[1, 1, 1] = np.nan
    one_infinite = exact.copy()
    one_infinite[0, 0, 5] = np.inf
    zero = np.zeros_like(exact)
    for wrong in (truncated, swapped, other_token, one_nan, one_infinite, zero, -exact):
        with pytest.raises(AssertionError):
            oracle.check(to_output(wrong, "BF16"), "BF16", exact, error)
    with pytest.raises(AssertionError):
        oracle.check(to_output(exact, "BF16")[:-2], "BF16", exact, error)


def test_rounded_scales_fail(rng: np.random.Generator) -> None:
    """An engine that rounds FP32 scales to powers of two is caught."""
    weight = oracle.random_weight(rng, 2, 64, 128, 32, 32, "FP32")
    activations = oracle.random_activations(rng, weight, 3, "FP32")
    exact, error = oracle.project(activations, weight)
    powers = np.exp2(np.round(np.log2(np.abs(activations.scales) + 1e-30))).astype(np.float32)
    rounded, _ = oracle.project(oracle.Activations(activations.values, powers), weight)
    assert not oracle.matches(to_output(rounded, "BF16"), "BF16", exact, error)


def test_wgmma_loss_by_hand() -> None:
    """33 addends are cut 13 bits below the greatest: in a block's first step a product, in the next
    the sum so far."""
    a, b = np.zeros((1, 256)), np.ones((1, 256))
    a[0, :32] = 1
    a[0, 40], a[0, 130] = -2, 5
    in_units = oracle.wgmma_loss(a, b) / (33 * 2.0**-13)
    assert in_units[0, 0] == 1 + 32 + 30 + 30 + 5 + 5 + 5 + 5


def test_wgmma_loss_bounds_the_tensor_core(rng: np.random.Generator) -> None:
    """Sums that are cut as SM 9.0 cuts them pass with its tolerance, and not with that of FP32."""
    weight = oracle.random_weight(rng, 1, 128, 512, spread="bits")
    activations = oracle.random_activations(rng, weight, 4, "UE8M0", "bits")
    a, b = activations.exact[:, 0], weight.exact[0]
    total = np.zeros((len(a), len(b)))
    for block in range(0, 512, 128):
        running = np.zeros_like(total)
        for step in range(block, block + 128, oracle.WGMMA_STEP):
            columns = slice(step, step + oracle.WGMMA_STEP)
            products = a[:, None, columns] * b[None, :, columns]
            addends = np.concatenate([products, running[..., None]], axis=2)
            unit = np.ldexp(1.0, np.frexp(np.abs(addends).max(axis=2, keepdims=True))[1] - 14)
            running = (np.trunc(addends / unit) * unit).sum(axis=2)
        total += running
    got = to_output(total[:, None], "FP32")
    assert oracle.matches(got, "FP32", *oracle.project(activations, weight, wgmma=True))
    assert not oracle.matches(got, "FP32", *oracle.project(activations, weight))
    other = to_output(total[::-1, None], "FP32")
    assert not oracle.matches(other, "FP32", *oracle.project(activations, weight, wgmma=True))


@pytest.mark.parametrize("block, scales", [(1, None), (32, "UE8M0")])
def test_other_weights_have_no_wgmma(
    rng: np.random.Generator, block: int, scales: str | None
) -> None:
    weight = oracle.random_weight(rng, 1, 32, 128, block, max(block, 32), scales)
    activations = oracle.random_activations(rng, weight, 2, "FP32")
    for plain, other in zip(
        oracle.project(activations, weight), oracle.project(activations, weight, wgmma=True)
    ):
        assert (plain == other).all()


@pytest.mark.parametrize("kind", oracle.OUTPUT_TYPES)
@pytest.mark.parametrize(
    "exact, got, right",
    [
        (np.nan, np.nan, True),
        (np.nan, 0.0, False),
        (np.nan, np.inf, False),
        (1e39, np.inf, True),
        (1e39, -np.inf, False),
        (1e39, 3e38, False),
        (-1e39, -np.inf, True),
        (3e38, np.inf, False),
        (3e38, np.nan, False),
        (0.0, np.inf, False),
        (0.0, -0.0, True),
        (2.0**-160, 0.0, True),
        (2.0**-130, 0.0, False),
        (2.0**-130, 2.0**-130, True),
    ],
)
def test_edges(kind: str, exact: float, got: float, right: bool) -> None:
    wrong = oracle.wrong_elements(
        np.array([got]), np.array([exact]), np.array([abs(exact) * 2.0**-17]), kind
    )
    assert wrong[0] == (not right)
