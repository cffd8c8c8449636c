"""Kernels by name: each that ServerInfo lists gives right numbers, alone and mixed with others; any
other name is refused, and the refusal names those that there are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Iterator

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

import oracle
from checkpoints import TENSOR_NAME
from client import details_of
from conftest import Site, rng_for, serving, small_weights
from daemon import ENGINE, seconds
from test_ctl import REFUSED, Ctl

UNKNOWN = ["tensor-cores", "PORTABLE", "portable ", "auto", "."]

# name -> (R, block_d, block_r, type of the scales); G 2, D 256.
FORMATS = {
    TENSOR_NAME.format(0): (512, 128, 128, "UE8M0"),
    TENSOR_NAME.format(1): (512, 32, 32, "FP32"),
    TENSOR_NAME.format(2): (512, 1, 128, None),  # BF16
    TENSOR_NAME.format(3): (4096, 128, 128, "FP32"),
}
LONG_SUMS = TENSOR_NAME.format(3)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    rng = rng_for("weights of test_kernels")
    weights = {
        name: oracle.random_weight(rng, 2, 256, reduced_dim, block_d, block_r, scales)
        for name, (reduced_dim, block_d, block_r, scales) in FORMATS.items()
    }
    with serving(tmp_path_factory.mktemp("kernels"), weights, 256) as site:
        yield site


def kernels_of(site: Site) -> list[str]:
    return site.client.kernels()


def check(
    site: Site, name: str, activations: oracle.Activations, output: bytes, kind: str, kernel: str
) -> None:
    exact, error = site.expected(activations, site.weights[name], kernel)
    oracle.check(output, kind, exact, error)


def test_list(site: Site) -> None:
    kernels = kernels_of(site)
    assert kernels and len(set(kernels)) == len(kernels)
    assert ("portable" if ENGINE == "cpu" else "decode") in kernels


@pytest.mark.parametrize("name", FORMATS)
def test_each_gives_right_numbers(site: Site, rng: np.random.Generator, name: str) -> None:
    """Few tokens and many, in every layout and type."""
    layouts = itertools.cycle(
        itertools.product(
            oracle.ACTIVATION_LAYOUTS, oracle.SCALE_LAYOUTS, oracle.SCALE_TYPES, oracle.OUTPUT_TYPES
        )
    )
    for kernel, tokens in itertools.product(kernels_of(site), [1, 3, 8, 9, 33, 64, 65, 130, 200]):
        activation_layout, scale_layout, scale_type, output_type = next(layouts)
        activations = oracle.random_activations(
            rng, site.weights[name], tokens, scale_type, "bits"
        )
        request = site.request(
            name,
            activations,
            activation_layout=activation_layout,
            scale_layout=scale_layout,
            output_type=output_type,
            kernel=kernel,
        )
        output = site.client.einsum(request).output
        check(site, name, activations, output, output_type, kernel)


def test_the_choice_arrives(site: Site, rng: np.random.Generator) -> None:
    """Kernels add in different orders, so that bits of many long sums in FP32 tell them apart; and
    each gives the same bits again."""
    activations = oracle.random_activations(rng, site.weights[LONG_SUMS], 40, "FP32")
    outputs = [
        {
            kernel: site.client.einsum(
                site.request(LONG_SUMS, activations, output_type="FP32", kernel=kernel)
            ).output
            for kernel in kernels_of(site)
        }
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].values())) > 1 or len(outputs[0]) == 1, list(outputs[0])


def test_mixed_on_a_stream(site: Site, rng: np.random.Generator) -> None:
    """Requests for one weight by every kernel, in one another's company, and some for none."""
    choices = ["", *kernels_of(site), "no such"]
    names = list(FORMATS)
    sent = []
    for i in range(60):
        name = names[i % 2]
        activations = oracle.random_activations(
            rng, site.weights[name], int(rng.integers(1, 12)), "UE8M0"
        )
        sent.append((name, activations, choices[i % len(choices)]))
    requests = (
        site.request(name, activations, kernel=kernel, request_id=i)
        for i, (name, activations, kernel) in enumerate(sent)
    )
    seen = set()
    for reply in site.client.stream(requests, seconds(60)):
        request_id = reply.response.request_id
        seen.add(request_id)
        name, activations, kernel = sent[request_id]
        assert reply.HasField("error") == (kernel == "no such")
        if reply.HasField("error"):
            assert reply.error.code == grpc.StatusCode.UNIMPLEMENTED.value[0]
            assert reply.error.field == "kernel"
            assert all(known in reply.error.message for known in choices[1:-1])
        else:
            check(site, name, activations, reply.response.output, "BF16", kernel)
    assert seen == set(range(len(sent)))


def expect_refusal(site: Site, call) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    for known in kernels_of(site):
        assert known in refused.value.details()
    (bad,) = details_of(refused.value, error_details_pb2.BadRequest)
    assert [violation.field for violation in bad.field_violations] == ["kernel"]


@pytest.mark.parametrize("kernel", UNKNOWN)
def test_unknown(site: Site, rng: np.random.Generator, kernel: str) -> None:
    expect_refusal(site, lambda: site.client.einsum(site.good_request(rng, kernel=kernel)))
    expect_refusal(site, lambda: site.client.call("SelfTest", kernel=kernel))


@pytest.mark.parametrize("kernel", ["k" * 65, "k" * 10000, "a\0b"])
def test_no_name(site: Site, rng: np.random.Generator, kernel: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        site.client.einsum(site.good_request(rng, kernel=kernel))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith("kernel: ")
    site.check_serves(rng)


def test_self_test(site: Site) -> None:
    for kernel in kernels_of(site):
        reply = site.client.call("SelfTest", kernel=kernel)
        assert reply.passed, reply
        assert len(reply.results) == len(FORMATS)


def test_an_engine_without_kernels(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(tmp_path, small_weights(1), 256, engine="null") as null:
        assert kernels_of(null) == []
        expect_refusal(null, lambda: null.client.einsum(null.good_request(rng, kernel="avx2")))
        null.client.einsum(null.good_request(rng))


def test_ctl(site: Site) -> None:
    ctl = Ctl(site)
    kernels = kernels_of(site)
    assert ctl.json("info")["kernels"] == kernels
    name = TENSOR_NAME.format(0)
    weight = site.daemon.config["weights"][0]["path"]
    for kernel in kernels:
        assert f" {kernel}" in ctl("info").stdout
        ctl("run", "--weight", name, "--random", 4, "--digest", "--kernel", kernel)
        ctl("selftest", name, "--kernel", kernel)
        ctl("bench", "--requests", 8, "--duration", 60, "--warmup", 0, "--kernel", kernel)
        checked = ctl.json(
            "check", "--checkpoint", weight, "--tokens", "1,9", "--repeat", 1, "--kernel", kernel
        )
        assert checked["passed"]
    for command in (
        ["run", "--weight", name, "--random", 4, "--digest"],
        ["selftest"],
        ["bench", "--requests", 8],
        ["check", "--checkpoint", weight, "--tokens", "1"],
    ):
        refused = ctl(*command, "--kernel", "no such", expect=REFUSED)
        assert "kernel" in refused.stderr and kernels[0] in refused.stderr
