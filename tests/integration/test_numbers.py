"""Right numbers: every answer is held against the FP64 oracle, in every layout, recipe and type,
alone and among many others."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator

import grpc
import numpy as np
import pytest

import oracle
from checkpoints import TENSOR_NAME, write_checkpoint
from client import RECIPES, Client, make_request
from conftest import Site, rng_for, serving, small_weights
from daemon import Daemon, count, seconds

CASES = count(int(os.environ.get("EINSUM_CASES", "40")))

LAYOUTS = list(
    itertools.product(
        oracle.ACTIVATION_LAYOUTS, oracle.SCALE_LAYOUTS, oracle.SCALE_TYPES, oracle.OUTPUT_TYPES
    )
)


# name -> (G, R, block_d, block_r, type of the scales, spread of the values); D is 256.
FORMATS = {
    TENSOR_NAME.format(0): (8, 1024, 128, 128, "UE8M0", "normal"),
    TENSOR_NAME.format(1): (16, 512, 128, 128, "FP32", "bits"),
    TENSOR_NAME.format(2): (4, 512, 32, 32, "UE8M0", "bits"),
    TENSOR_NAME.format(3): (2, 1024, 32, 32, "FP32", "normal"),
    TENSOR_NAME.format(4): (1, 1024, 1, 128, "UE8M0", "normal"),
    TENSOR_NAME.format(5): (4, 512, 1, 128, "FP32", "bits"),
    TENSOR_NAME.format(6): (8, 512, 1, 32, "UE8M0", "bits"),
    TENSOR_NAME.format(7): (2, 512, 1, 32, "FP32", "normal"),
    TENSOR_NAME.format(8): (4, 1024, 1, 128, None, "normal"),  # BF16
}


def make_weights() -> dict[str, oracle.Weight]:
    rng = rng_for("weights of test_numbers")
    return {
        name: oracle.random_weight(rng, groups, 256, reduced_dim, block_d, block_r, scales, spread)
        for name, (groups, reduced_dim, block_d, block_r, scales, spread) in FORMATS.items()
    }


def recipes_for(weight: oracle.Weight) -> list[str]:
    """The blocks of R must agree; (1, 1, *) also takes coarser blocks of D."""
    if weight.scales is None:
        return ["RECIPE_1_128_128", "RECIPE_1_1_128"]
    return sorted({RECIPES[weight.block_d, weight.block_r], RECIPES[1, weight.block_r]})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("numbers"), make_weights(), 256) as site:
        yield site


def check_answer(
    site: Site,
    name: str,
    activations: oracle.Activations,
    activation_layout: str = "TGR",
    scale_layout: str = "TGK",
    output_type: str = "BF16",
    **options,
) -> bytes:
    """Sends one request and holds the answer against the oracle."""
    weight = site.weights[name]
    reply = site.client.einsum(
        make_request(
            site.client, name, weight, activations, activation_layout, scale_layout, output_type,
            **options,
        )
    )  # fmt: skip
    begin, end = options.get("group_begin", 0), options.get("group_end", 0)
    if end:
        weight = weight.slice(begin, end)
    assert (reply.tokens, reply.groups, reply.output_dim) == (
        activations.tokens, weight.groups, weight.output_dim,
    )  # fmt: skip
    exact, error = site.expected(activations, weight, options.get("kernel", ""))
    oracle.check(reply.output, output_type, exact, error)
    return reply.output


# --- layouts, recipes and types -------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout_and_type(site: Site, rng: np.random.Generator, name: str) -> None:
    weight = site.weights[name]
    for recipe, layout in itertools.product(recipes_for(weight), LAYOUTS):
        activation_layout, scale_layout, scale_type, output_type = layout
        tokens = int(rng.integers(1, 10))  # mostly not a multiple of 4
        activations = oracle.random_activations(rng, weight, tokens, scale_type, "bits")
        check_answer(
            site, name, activations, activation_layout, scale_layout, output_type, recipe=recipe
        )


@pytest.mark.parametrize("case", range(CASES))
def test_random(site: Site, case: int) -> None:
    rng = rng_for(f"random case {case}")
    name = str(rng.choice(list(FORMATS)))
    weight = site.weights[name]
    tokens = int(rng.integers(1, 301) if rng.random() < 0.5 else rng.integers(1, 17))
    begin, end = 0, 0
    if rng.random() < 0.4:  # a tensor-parallel slice
        begin = int(rng.integers(0, weight.groups))
        end = int(rng.integers(begin + 1, weight.groups + 1))
    held = weight.slice(begin, end) if end else weight
    activation_layout, scale_layout, scale_type, output_type = LAYOUTS[rng.integers(len(LAYOUTS))]
    spread = str(rng.choice(["normal", "bits"]))
    activations = oracle.random_activations(rng, held, tokens, scale_type, spread)
    check_answer(
        site, name, activations, activation_layout, scale_layout, output_type,
        recipe=str(rng.choice(recipes_for(weight))), group_begin=begin, group_end=end,
    )  # fmt: skip


def test_real_shape(tmp_path, rng: np.random.Generator) -> None:
    """One layer of V4-Flash: G 8, D 1024 by default, R 4096."""
    name = TENSOR_NAME.format(0)
    weights = {name: oracle.random_weight(rng, 8, 1024, 4096)}
    model = write_checkpoint(tmp_path / "model", weights, prefix="model.")
    with (
        Daemon(tmp_path, weights_roots=[str(tmp_path)], weights=[{"path": str(model)}]) as daemon,
        Client(daemon.address) as client,
    ):
        site = Site(daemon, client, tmp_path, weights)
        for tokens, layout in ((1, ("TGR", "TGK")), (33, ("GTR", "GKT"))):
            for scale_type in oracle.SCALE_TYPES:
                activations = oracle.random_activations(rng, weights[name], tokens, scale_type)
                check_answer(site, name, activations, *layout)


# --- NaN, subnormals, extremes --------------------------------------------------------------------


@pytest.mark.parametrize("scale_type", oracle.SCALE_TYPES)
@pytest.mark.parametrize("scale_layout", oracle.SCALE_LAYOUTS)
@pytest.mark.parametrize("output_type", oracle.OUTPUT_TYPES)
def test_nan_touches_what_it_must(
    site: Site, rng: np.random.Generator, scale_type: str, scale_layout: str, output_type: str
) -> None:
    """NaN in one activation or one scale makes NaN of that token's group, and of nothing else."""
    name = TENSOR_NAME.format(0)
    weight = site.weights[name]
    activations = oracle.random_activations(rng, weight, 7, scale_type)
    activations.values[1, 2, 17] = oracle.E4M3_NAN[0]
    activations.values[3, 0, 1023] = oracle.E4M3_NAN[1]
    activations.scales[5, 7, 3] = oracle.UE8M0_NAN if scale_type == "UE8M0" else np.nan
    output = check_answer(site, name, activations, "GTR", scale_layout, output_type)
    got = oracle.decode_output(output, output_type, (7, 8, 256))
    nan = {(int(t), int(g)) for t, g, _ in np.argwhere(np.isnan(got))}
    assert nan == {(1, 2), (3, 0), (5, 7)}


@pytest.fixture(scope="module")
def odd_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Weights that no sane checkpoint holds."""
    rng = rng_for("odd weights")
    weights = {}

    nan_weight = oracle.random_weight(rng, 2, 256, 512)
    nan_weight.values[0, 5, 100] = oracle.E4M3_NAN[0]
    nan_weight.values[1, 255, 511] = oracle.E4M3_NAN[1]
    nan_weight.scales[1, 0, 2] = oracle.UE8M0_NAN  # rows 0 to 127 of group 1
    weights["layers.0.attn.wo_a"] = nan_weight

    nan_weight = oracle.random_weight(rng, 2, 256, 512, 32, 32, "FP32")
    nan_weight.scales[0, 3, 15] = np.nan  # rows 96 to 127 of group 0
    weights["layers.1.attn.wo_a"] = nan_weight

    extreme = oracle.random_weight(rng, 2, 256, 512, 32, 32, "UE8M0", "bits")
    extreme.scales[:] = rng.choice(np.array([0, 1, 127, 253, 254], np.uint8), extreme.scales.shape)
    weights["layers.2.attn.wo_a"] = extreme

    extreme = oracle.random_weight(rng, 2, 256, 512, 128, 128, "FP32", "bits")
    choices = np.array([1e-45, -1e-40, 1.2e-38, 0, 0.3, -7.7, 3.4e38, -3.4e38], np.float32)
    extreme.scales[:] = rng.choice(choices, extreme.scales.shape)
    weights["layers.3.attn.wo_a"] = extreme

    # Blocks 0 and 1 of R are alike, blocks 2 and 3 weigh nothing: with activations that differ in
    # sign alone between 0 and 1, everything cancels.
    cancelling = oracle.random_weight(rng, 2, 256, 512)
    cancelling.values[:, :, 128:256] = cancelling.values[:, :, :128]
    cancelling.scales[:, :, :2] = 254
    cancelling.scales[:, :, 2:] = 0
    weights["layers.4.attn.wo_a"] = cancelling

    tiny = oracle.random_weight(rng, 2, 256, 512)
    tiny.values[:] = rng.integers(0, 8, tiny.values.shape, np.uint8)  # subnormal
    tiny.scales[:] = 90
    weights["layers.5.attn.wo_a"] = tiny

    bf16_nan = oracle.random_weight(rng, 2, 256, 512, scale_type=None)
    bf16_nan.values[0, 9, 300] = 0x7FC0
    bf16_nan.values[1, 10, 0] = 0xFF81
    bf16_nan.values[1, 11, :] = rng.integers(0, 128, 512, np.uint16)  # subnormal
    weights["layers.6.attn.wo_a"] = bf16_nan

    with serving(tmp_path_factory.mktemp("odd"), weights, 256) as site:
        yield site


def test_nan_in_weight(odd_site: Site, rng: np.random.Generator) -> None:
    expected = {
        "layers.0.attn.wo_a": {(0, 5), (1, 255)} | {(1, d) for d in range(128)},
        "layers.1.attn.wo_a": {(0, d) for d in range(96, 128)},
        "layers.6.attn.wo_a": {(0, 9), (1, 10)},
    }
    for name, nan in expected.items():
        for scale_type in oracle.SCALE_TYPES:
            weight = odd_site.weights[name]
            activations = oracle.random_activations(rng, weight, 5, scale_type)
            output = check_answer(odd_site, name, activations)
            got = np.isnan(oracle.decode_output(output, "BF16", (5, 2, 256)))
            assert {(int(g), int(d)) for _, g, d in np.argwhere(got)} == nan
            assert (got == got[0]).all()  # the same of every token


def test_nan_times_zero(odd_site: Site, rng: np.random.Generator) -> None:
    """A zero scale or activation does not hide a NaN weight."""
    name = "layers.0.attn.wo_a"
    activations = oracle.random_activations(rng, odd_site.weights[name], 2, "FP32")
    activations.scales[0] = 0
    activations.values[1] = 0
    check_answer(odd_site, name, activations)


@pytest.mark.parametrize("output_type", oracle.OUTPUT_TYPES)
@pytest.mark.parametrize("scale_type", oracle.SCALE_TYPES)
@pytest.mark.parametrize("layer", [2, 3])
def test_extreme_scales(
    odd_site: Site, rng: np.random.Generator, layer: int, scale_type: str, output_type: str
) -> None:
    """Scales at both ends of the range: results vanish, overflow, or come out right because a
    huge scale meets a tiny one."""
    name = TENSOR_NAME.format(layer)
    weight = odd_site.weights[name]
    activations = oracle.random_activations(rng, weight, 24, scale_type, "bits")
    if scale_type == "UE8M0":
        choices = np.array([0, 1, 127, 253, 254], np.uint8)
    else:
        choices = np.array([1e-45, -1e-39, 2e-38, 0.7, -3, 1.7e38, -3.4e38], np.float32)
    # One scale for all of a token's row, or sums would nearly always be infinite.
    per_token = rng.choice(choices, (24, weight.groups, 1))
    activations.scales[:] = per_token
    activations.scales[:4] = rng.choice(choices, activations.scales[:4].shape)
    check_answer(odd_site, name, activations, output_type=output_type)


@pytest.mark.parametrize("output_type", oracle.OUTPUT_TYPES)
@pytest.mark.parametrize("scale_type", oracle.SCALE_TYPES)
def test_huge_scale_meets_tiny_scale(
    odd_site: Site, rng: np.random.Generator, scale_type: str, output_type: str
) -> None:
    """2^127 on one side and 2^-127 on the other is one, block by block."""
    name = "layers.2.attn.wo_a"
    weight = odd_site.weights[name]
    # The scales of rows 0 to 31 of D, turned over.
    bits = weight.scales[:, 0, :].astype(np.int64)
    inverse = np.clip(254 - bits, 0, 254).astype(np.uint8)
    activations = oracle.random_activations(rng, weight, 4, scale_type)
    activations.scales[:] = inverse if scale_type == "UE8M0" else oracle.UE8M0[inverse]
    output = check_answer(odd_site, name, activations, output_type=output_type)
    got = oracle.decode_output(output, output_type, (4, 2, 256))
    assert np.isfinite(got[:, :, :32]).all()


@pytest.mark.parametrize("output_type", oracle.OUTPUT_TYPES)
@pytest.mark.parametrize("exponent", [127, 200, 254])
def test_huge_products_cancel(
    odd_site: Site, rng: np.random.Generator, exponent: int, output_type: str
) -> None:
    """The sum of block 0 and that of block 1 are each past FP32's range; together they are zero."""
    name = "layers.4.attn.wo_a"
    weight = odd_site.weights[name]
    activations = oracle.random_activations(rng, weight, 3, "UE8M0")
    activations.values[:, :, 128:256] = activations.values[:, :, :128] ^ 0x80
    activations.scales[:] = exponent
    activations.scales[:, :, 2:] = 0
    check_answer(odd_site, name, activations, output_type=output_type)


@pytest.mark.parametrize("output_type", oracle.OUTPUT_TYPES)
@pytest.mark.parametrize("scale", [0, 60, 127])
def test_subnormals(odd_site: Site, rng: np.random.Generator, scale: int, output_type: str) -> None:
    """Subnormal inputs on both sides, and with scale 2^-127 or 2^-67 subnormal results."""
    for layer in (5, 6):
        weight = odd_site.weights[TENSOR_NAME.format(layer)]
        activations = oracle.random_activations(rng, weight, 3, "UE8M0")
        bits = rng.integers(0, 8, activations.values.shape, np.uint8)
        activations.values[:] = bits | (rng.integers(0, 2, bits.shape, np.uint8) << 7)
        activations.scales[:] = scale
        check_answer(odd_site, TENSOR_NAME.format(layer), activations, output_type=output_type)


# --- slices, names --------------------------------------------------------------------------------


def test_slices_agree_with_the_whole(site: Site, rng: np.random.Generator) -> None:
    """A request for some groups gets the same bits as one for all groups."""
    name = TENSOR_NAME.format(1)
    weight = site.weights[name]
    activations = oracle.random_activations(rng, weight, 6, "FP32")
    whole = np.frombuffer(check_answer(site, name, activations), np.uint16).reshape(6, 16, 256)
    for size in (2, 4, 8, 16):
        for rank in range(size):
            begin, end = rank * 16 // size, (rank + 1) * 16 // size
            held = oracle.Activations(
                activations.values[:, begin:end], activations.scales[:, begin:end]
            )
            output = check_answer(site, name, held, group_begin=begin, group_end=end)
            part = np.frombuffer(output, np.uint16).reshape(6, end - begin, 256)
            assert np.array_equal(part, whole[:, begin:end])


def test_tensor_parallel_at_load(tmp_path, rng: np.random.Generator) -> None:
    """Ranks side by side, told apart by prefix."""
    name = TENSOR_NAME.format(0)
    whole = {
        name: oracle.random_weight(rng, 16, 128, 512),
        TENSOR_NAME.format(1): oracle.random_weight(rng, 16, 128, 512, scale_type=None),
    }
    model = write_checkpoint(tmp_path / "model", whole, shards=2)
    entries = [
        {"path": "model", "output_dim": 128, "name_prefix": f"rank{rank}of{size}.",
         "tensor_parallel_rank": rank, "tensor_parallel_size": size}
        for rank, size in ((0, 4), (1, 4), (2, 4), (3, 4), (15, 16))
    ]  # fmt: skip
    assert model.parent == tmp_path  # "model" is relative to the first root
    with (
        Daemon(tmp_path, weights_roots=[str(tmp_path)], weights=entries) as daemon,
        Client(daemon.address) as client,
    ):
        site = Site(daemon, client, tmp_path)
        for entry in entries:
            rank, size = entry["tensor_parallel_rank"], entry["tensor_parallel_size"]
            for name, weight in whole.items():
                held = weight.slice(rank * 16 // size, (rank + 1) * 16 // size)
                local = entry["name_prefix"] + name
                site.weights[local] = held
                described = client.call("GetWeight", name=local).weight
                assert described.groups == held.groups == 16 // size
                assert described.tensor_parallel_rank == rank
                assert described.tensor_parallel_size == size
                check_answer(site, local, oracle.random_activations(rng, held, 5, "FP32"))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("scale_suffix", ["scale", "weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("scale_type", oracle.SCALE_TYPES)
def test_names_in_checkpoints(
    small: Site, rng: np.random.Generator, prefix: str, scale_suffix: str, scale_type: str
) -> None:
    """However a checkpoint spells it, the weight is found under any spelling."""
    directory = small.root / f"names {prefix}{scale_suffix}{scale_type}"
    weight = oracle.random_weight(rng, 2, 256, 512, scale_type=scale_type)
    name = TENSOR_NAME.format(7)
    write_checkpoint(directory, {name: weight}, 2, prefix, scale_suffix)
    loaded = small.client.load(directory, output_dim=256)[-1].weights
    assert [described.name for described in loaded] == [name]
    site = Site(small.daemon, small.client, small.root, {})
    for spelling in (name, f"model.{name}", f"{name}.weight", f"model.{name}.weight"):
        site.weights[spelling] = weight
        check_answer(site, spelling, oracle.random_activations(rng, weight, 2, "FP32"))
    assert small.client.call("UnloadWeights", names=[name]).names == [name]


# --- digests and streams --------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", oracle.OUTPUT_TYPES)
def test_digest_is_that_of_the_output(
    site: Site, rng: np.random.Generator, output_type: str
) -> None:
    name = TENSOR_NAME.format(2)
    activations = oracle.random_activations(rng, site.weights[name], 11, "FP32")
    activations.values[4, 1, 0] = oracle.E4M3_NAN[0]
    output = check_answer(site, name, activations, output_type=output_type)
    request = site.request(name, activations, output_type=output_type, digest_only=True)
    reply = site.client.einsum(request)
    got = oracle.decode_output(output, output_type, (11, 4, 256)).ravel()
    numbers = got[~np.isnan(got)]
    digest = reply.digest
    assert reply.output == b""
    assert digest.crc32 == zlib.crc32(output)
    assert digest.elements == got.size
    assert digest.nan_elements == 256
    assert digest.sum == pytest.approx(numbers.sum(), rel=1e-9, abs=1e-6 * np.abs(numbers).sum())
    assert digest.abs_max == np.abs(numbers).max()
    np.testing.assert_array_equal(np.array(digest.head), got[:8])


def test_stream_matches_replies_by_id(site: Site, rng: np.random.Generator) -> None:
    """Large and small requests of many layers on one stream, with bad ones strewn in."""
    cases, errors, requests = {}, {}, []
    for request_id in range(1, count(120) + 1):
        name = str(rng.choice(list(FORMATS)))
        weight = site.weights[name]
        tokens = 100 if request_id % 10 == 1 else int(rng.integers(1, 9))
        activations = oracle.random_activations(rng, weight, tokens, "FP32")
        if request_id % 7 == 3:
            request = site.request(name, activations, request_id=request_id, weight="none such")
            errors[request_id] = (grpc.StatusCode.NOT_FOUND, "weight")
        elif request_id % 7 == 5:
            request = site.request(name, activations, request_id=request_id, activations=b"short")
            errors[request_id] = (grpc.StatusCode.INVALID_ARGUMENT, "activations")
        else:
            request = site.request(name, activations, request_id=request_id)
            cases[request_id] = (activations, weight)
        requests.append(request)
    seen = set()
    for reply in site.client.stream(requests, seconds(60)):
        request_id = reply.response.request_id
        assert request_id not in seen
        seen.add(request_id)
        if request_id in errors:
            code, field = errors[request_id]
            assert reply.error.code == code.value[0]
            assert reply.error.field == field
            assert reply.error.message
            assert reply.response.output == b""
        else:
            assert not reply.HasField("error")
            activations, weight = cases[request_id]
            oracle.check(reply.response.output, "BF16", *site.expected(activations, weight))
    assert seen == set(cases) | set(errors)


def test_stream_replies_before_it_is_closed(site: Site, rng: np.random.Generator) -> None:
    """Ping-pong: each reply comes while the stream stays open for more."""
    outgoing: queue.Queue = queue.Queue()
    replies = site.client.stream(iter(outgoing.get, None), seconds(60))
    name = TENSOR_NAME.format(4)
    for request_id in range(1, 6):
        activations = oracle.random_activations(rng, site.weights[name], 2, "UE8M0")
        outgoing.put(site.request(name, activations, request_id=request_id))
        reply = next(replies)
        assert reply.response.request_id == request_id
        exact, error = site.expected(activations, site.weights[name])
        oracle.check(reply.response.output, "BF16", exact, error)
    outgoing.put(None)
    assert list(replies) == []
    assert replies.code() == grpc.StatusCode.OK


def test_empty_stream(site: Site) -> None:
    replies = site.client.stream([])
    assert list(replies) == []
    assert replies.code() == grpc.StatusCode.OK


# --- many at once ---------------------------------------------------------------------------------


def test_batching_mixes_nothing_up(site: Site, rng: np.random.Generator) -> None:
    """Many callers, layers and layouts at once; whoever shares a batch gets his own answer."""
    cases = []
    for index in range(count(48)):
        name = str(rng.choice(list(FORMATS)))
        weight = site.weights[name]
        layout = LAYOUTS[index % len(LAYOUTS)]
        activation_layout, scale_layout, scale_type, output_type = layout
        tokens = int(rng.integers(1, 40))
        activations = oracle.random_activations(rng, weight, tokens, scale_type)
        request = site.request(
            name, activations, activation_layout=activation_layout, scale_layout=scale_layout,
            output_type=output_type, request_id=index,
        )  # fmt: skip
        cases.append((request, output_type, *site.expected(activations, weight)))

    before = site.client.counters()
    threads, rounds = 16, count(10)

    def call_all(seed: int) -> None:
        order = np.random.default_rng(seed)
        with Client(site.daemon.address, site.client.schema) as client:
            for _ in range(rounds):
                request, *expected = cases[order.integers(len(cases))]
                reply = client.einsum(request, seconds(60))
                assert reply.request_id == request.request_id
                oracle.check(reply.output, *expected)

    seeds = rng.integers(0, 2**32, threads)
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(call_all, int(seed)) for seed in seeds]:
            future.result()
    after = site.client.counters()
    requests = after.batch_requests - before.batch_requests
    assert requests == threads * rounds
    assert after.batches - before.batches < requests, "nothing was batched: the test shows nothing"


def test_futures_share_batches(site: Site, rng: np.random.Generator) -> None:
    """Many requests in flight on one connection."""
    name = TENSOR_NAME.format(6)
    weight = site.weights[name]
    cases = [oracle.random_activations(rng, weight, 1 + i % 5, "UE8M0") for i in range(count(100))]
    futures = [site.client.einsum_future(site.request(name, case)) for case in cases]
    shared = 0
    for case, future in zip(cases, futures):
        reply = future.result(seconds(60))
        shared += reply.batch.requests > 1
        assert reply.batch.bucket >= reply.batch.tokens >= case.tokens
        oracle.check(reply.output, "BF16", *site.expected(case, weight))
    assert shared


# --- weights that come and go ---------------------------------------------------------------------


def test_replace_while_serving(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each answer is of the old weight or of the new one, whole; never a mix."""
    rng = rng_for("replace")
    name = TENSOR_NAME.format(0)
    weights = small_weights(1)
    versions = [weights[name], oracle.random_weight(rng, 4, 256, 512, scale_type="FP32")]
    activations = oracle.random_activations(rng, versions[0], 9, "FP32")

    with serving(tmp_path_factory.mktemp("replace"), weights, 256) as site:
        expected = [site.expected(activations, version) for version in versions]
        for index, version in enumerate(versions):
            write_checkpoint(site.root / f"version{index}", {name: version})
        request = site.request(name, activations)
        stop, seen, failures = threading.Event(), set(), []

        def call_on_and_on() -> None:
            with Client(site.daemon.address, site.client.schema) as client:
                while not stop.is_set():
                    output = client.einsum(request, seconds(60)).output
                    fits = [i for i in (0, 1) if oracle.matches(output, "BF16", *expected[i])]
                    if len(fits) != 1:
                        failures.append(fits)
                    seen.update(fits)

        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(call_on_and_on) for _ in range(4)]
            try:
                generations = []
                for turn in range(count(12)):
                    messages = site.client.load(
                        site.root / f"version{(turn + 1) % 2}", output_dim=256, replace=True
                    )
                    generations.append(messages[-1].weights[0].generation)
                    # From here on nobody gets the weight that was replaced.
                    output = site.client.einsum(request).output
                    oracle.check(output, "BF16", *expected[(turn + 1) % 2])
            finally:
                stop.set()
            for caller in callers:
                caller.result()
        assert not failures
        assert seen == {0, 1}
        assert generations == list(range(generations[0], generations[0] + len(generations)))


def test_unload_while_serving(small: Site, rng: np.random.Generator) -> None:
    """Requests in flight get their answer or NOT_FOUND; memory comes back."""
    weight = oracle.random_weight(rng, 4, 256, 512)
    directory = write_checkpoint(small.root / "comes and goes", {TENSOR_NAME.format(0): weight})
    name = "passing." + TENSOR_NAME.format(0)
    activations = oracle.random_activations(rng, weight, 5, "FP32")
    request = make_request(small.client, name, weight, activations)
    expected = small.expected(activations, weight)
    bytes_before = small.client.call("ServerInfo").memory.weights_bytes
    answered = 0
    for _ in range(count(6)):
        small.client.load(directory, output_dim=256, name_prefix="passing.")
        assert small.client.call("ServerInfo").memory.weights_bytes > bytes_before
        futures = [small.client.einsum_future(request) for _ in range(16)]
        small.client.call("UnloadWeights", names=["passing.*"])
        for future in futures:
            if future.exception(seconds(60)) is None:
                oracle.check(future.result().output, "BF16", *expected)
                answered += 1
            else:
                assert future.exception().code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as error:
            small.client.einsum(request)
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        assert "passing." in error.value.details()
        assert small.client.call("ServerInfo").memory.weights_bytes == bytes_before
    assert answered
