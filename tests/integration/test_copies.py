"""The hot path copies each byte of a tensor once on its way in, and not at all on its way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import Site, serving, small_weights
from copies import Copies
from daemon import default_scale

REQUESTS = 20
TOKENS = 200  # several slices on the way in
# Of a request's bytes: what else is moved in pieces that could be a tensor's.
SLACK = 0.02

pytestmark = pytest.mark.skipif(
    default_scale() < 1, reason="a sanitizer has a memcpy of its own, which cannot be counted"
)


def requests_of(site: Site, rng: np.random.Generator) -> list:
    return [site.good_request(rng, tokens=TOKENS, request_id=i) for i in range(REQUESTS)]


def input_bytes(request: object) -> int:
    return len(request.activations) + len(request.activation_scales)


def copied_of_input(site: Site, copies: Copies, requests: list, streamed: bool) -> float:
    """Bytes copied for each byte of activations and scales."""
    site.client.einsum(requests[0])  # what is set up once
    before = copies.bytes()
    if streamed:
        replies = [reply.response for reply in site.client.stream(requests)]
    else:
        replies = [site.client.einsum(request) for request in requests]
    assert all(len(reply.output) > TOKENS for reply in replies)
    return (copies.bytes() - before) / sum(map(input_bytes, requests))


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
def test_one_copy_in_none_out(tmp_path: Path, rng: np.random.Generator, streamed: bool) -> None:
    """With a buffer for each request; where they are scarce replies are copied out, see below."""
    copies = Copies(tmp_path)
    with serving(
        tmp_path, small_weights(1), 256, extra_environment=copies.environment, engine="null",
        batches=2 * REQUESTS,
    ) as site:  # fmt: skip
        copied = copied_of_input(site, copies, requests_of(site, rng), streamed)
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
        copied = copied_of_input(site, copies, requests, False)
    assert 1 + out - SLACK < copied < 1 + out + SLACK


def test_numbers_hold_under_the_counter(tmp_path: Path, rng: np.random.Generator) -> None:
    """Else what it counts would not be what the daemon does."""
    copies = Copies(tmp_path)
    with serving(tmp_path, small_weights(1), 256, extra_environment=copies.environment) as site:
        request, expected = site.good_case(rng, tokens=5)
        oracle.check(site.client.einsum(request).output, "BF16", *expected)
