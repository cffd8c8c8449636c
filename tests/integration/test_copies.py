"""The hot path copies each byte of a tensor once on its way in, and not at all on its way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import Site, serving, small_weights
from copies import Copies
from daemon import default_scale
from inference import infer, make_infer

REQUESTS = 20
TOKENS = 200  # several slices on the way in
# Of a request's bytes: what else is moved in pieces that could be a tensor's.
SLACK = 0.02

pytestmark = pytest.mark.skipif(
    default_scale() < 1, reason="a sanitizer has a memcpy of its own, which cannot be counted"
)


def infer_requests_of(site: Site, rng: np.random.Generator) -> list:
    """The same in the Open Inference Protocol."""
    (name, weight), *_ = site.weights.items()
    return [
        make_infer(site.client, name, oracle.random_activations(rng, weight, TOKENS, "FP32"))
        for _ in range(REQUESTS)
    ]


def requests_of(site: Site, rng: np.random.Generator) -> list:
    return [site.good_request(rng, tokens=TOKENS, request_id=i) for i in range(REQUESTS)]


def input_bytes(request: object) -> int:
    if hasattr(request, "raw_input_contents"):
        return sum(map(len, request.raw_input_contents))
    return len(request.activations) + len(request.activation_scales)


def ask(site: Site, requests: list, way: str) -> list[bytes]:
    """The outputs."""
    if way == "stream":
        return [reply.response.output for reply in site.client.stream(requests)]
    if way == "infer":
        return [infer(site.client, request).raw_output_contents[0] for request in requests]
    return [site.client.einsum(request).output for request in requests]


def copied_of_input(site: Site, copies: Copies, requests: list, way: str) -> float:
    """Bytes copied for each byte of activations and scales."""
    ask(site, requests[:1], way)  # what is set up once
    before = copies.bytes()
    assert all(len(output) > TOKENS for output in ask(site, requests, way))
    return (copies.bytes() - before) / sum(map(input_bytes, requests))


@pytest.mark.parametrize("way", ["unary", "stream", "infer"])
def test_one_copy_in_none_out(tmp_path: Path, rng: np.random.Generator, way: str) -> None:
    """With a buffer for each request; where they are scarce replies are copied out, see below."""
    copies = Copies(tmp_path)
    with serving(
        tmp_path, small_weights(1), 256, extra_environment=copies.environment, engine="null",
        batches=2 * REQUESTS,
    ) as site:  # fmt: skip
        requests = (infer_requests_of if way == "infer" else requests_of)(site, rng)
        copied = copied_of_input(site, copies, requests, way)
    assert 1 - SLACK < copied < 1 + SLACK


def test_the_counter_sees_a_second_copy(tmp_path: Path, rng: np.random.Generator) -> None:
    """With one buffer alone every reply is copied out of it: documented, and counted."""
    copies = Copies(tmp_path)
    with serving(
        tmp_path, small_weights(1), 256, extra_environment=copies.environment, engine="null",
        lanes=1, batches=1,
    ) as site:  # fmt: skip
        requests = requests_of(site, rng)
        out = len(site.client.einsum(requests[0]).output) / input_bytes(requests[0])
        copied = copied_of_input(site, copies, requests, "unary")
    assert 1 + out - SLACK < copied < 1 + out + SLACK


def test_numbers_hold_under_the_counter(tmp_path: Path, rng: np.random.Generator) -> None:
    """Else what it counts would not be what the daemon does."""
    copies = Copies(tmp_path)
    with serving(tmp_path, small_weights(1), 256, extra_environment=copies.environment) as site:
        request, expected = site.good_case(rng, tokens=5)
        oracle.check(site.client.einsum(request).output, "BF16", *expected)
