"""A caller of few tokens beside a flood of large requests, and the other way round."""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import oracle
import pytest
from client import Client
from conftest import Site, serving, small_weights
from daemon import ENGINE, count

TOKENS_MAX = 64
CALLERS = 16
SMALL_CALLS = count(30)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """So many buffers that the whole flood is in batches, one request in each."""
    with serving(
        tmp_path, small_weights(1), 256, batch_tokens_max=TOKENS_MAX,
        request_tokens_max=TOKENS_MAX, batches=2 * CALLERS, phase_sample=0,
    ) as site:  # fmt: skip
        yield site


@contextlib.contextmanager
def flood(site: Site, request: Any) -> Iterator[list[Any]]:
    """Callers that each send the same again and again; yields the replies so far."""
    replies: list[Any] = []
    errors: list[Exception] = []
    over = threading.Event()

    def call() -> None:
        try:
            with Client(site.daemon.address, site.client.schema) as client:
                while not over.is_set():
                    replies.append(client.einsum(request))
        except grpc.RpcError as error:
            errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    while len(replies) < 2 * CALLERS and not errors:
        over.wait(0.01)
    yield replies
    over.set()
    for caller in callers:
        caller.join()
    assert not errors


# 64 tokens take a GPU less time than a socket; the flood beside a GPU is in tests/bench/transport.sh.
slow_engine = pytest.mark.skipif(
    ENGINE != "cpu", reason=f"no flood over sockets fills the queue of engine {ENGINE}"
)


@slow_engine
def test_few_tokens_beside_a_flood(site: Site, rng: np.random.Generator) -> None:
    """One by one, callers of whole batches would have it wait for most of theirs."""
    small, expected = site.good_case(rng, tokens=1)
    with flood(site, site.good_request(rng, tokens=TOKENS_MAX)) as replies:
        mine = [site.client.einsum(small) for _ in range(SMALL_CALLS)]
    waited = statistics.median(reply.batch.queue_ns for reply in mine)
    ran = statistics.median(reply.batch.run_ns for reply in replies)
    queued = statistics.median(reply.batch.queue_ns for reply in replies)
    assert queued > 2 * ran, "the flood did not fill the queue: the test shows nothing"
    assert waited < queued / 2
    assert waited < 3 * ran
    for reply in mine:
        oracle.check(reply.output, "BF16", *expected)


@slow_engine
def test_priority_goes_first(site: Site, rng: np.random.Generator) -> None:
    """Whole batches all: what share they have would let them wait like the others."""
    waited = {}
    with flood(site, site.good_request(rng, tokens=TOKENS_MAX)) as replies:
        for priority in ("PRIORITY_HIGH", "PRIORITY_UNSPECIFIED"):
            request = site.good_request(rng, tokens=TOKENS_MAX, priority=priority)
            calls = [site.client.einsum(request) for _ in range(SMALL_CALLS)]
            waited[priority] = statistics.median(reply.batch.queue_ns for reply in calls)
    ran = statistics.median(reply.batch.run_ns for reply in replies)
    assert waited["PRIORITY_HIGH"] < 3 * ran
    assert waited["PRIORITY_HIGH"] < waited["PRIORITY_UNSPECIFIED"] / 2


def test_a_large_one_beside_a_flood_of_few_tokens(site: Site, rng: np.random.Generator) -> None:
    """It is not put off as long as they keep coming."""
    large, expected = site.good_case(rng, tokens=TOKENS_MAX)
    with flood(site, site.good_request(rng, tokens=1)) as replies:
        before = len(replies)
        for _ in range(count(10)):
            oracle.check(site.client.einsum(large).output, "BF16", *expected)
        assert len(replies) > before


def test_unknown_priority(site: Site, rng: np.random.Generator) -> None:
    with pytest.raises(grpc.RpcError) as error:
        site.client.einsum(site.good_request(rng, priority=4))
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "PRIORITY_HIGH" in error.value.details()
