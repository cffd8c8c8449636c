"""SIGTERM, clause by clause, for every way in: told at once, served on, nothing new, and an answer for
all that was in flight, at the latest when drain_grace_ms is over."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import pytest
from grpc import StatusCode

import inference
import oracle
from checkpoints import TENSOR_NAME
from client import Client
from conftest import Site, serving, small_weights
from daemon import seconds
from shared_memory import Connection, share

UNAVAILABLE = StatusCode.UNAVAILABLE.value[0]
NAME = TENSOR_NAME.format(0)


def start(directory: Path, **config: Any) -> Any:
    return serving(directory, small_weights(1), 256,
                   shared_memory_listen=f"unix:{directory}/shared", **config)  # fmt: skip


class Ring:
    """One request in a ring, submitted as often as is asked."""

    def __init__(self, site: Site, rng: np.random.Generator):
        self.request, expected = site.good_case(rng)
        self.size = expected[0].size * 2
        self.connection = Connection(site.client.call("ServerInfo").shared_memory.socket)
        self.region = self.connection.register()
        self.ring = self.connection.ring(self.region)
        self.offset = share(self.request, self.region, self.size)
        self.expected = expected

    def check_serves(self) -> None:
        completion = self.ring.project(self.request)
        assert completion.status == 0, completion
        oracle.check(self.region.get(self.offset, self.size), "BF16", *self.expected)

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: Any) -> None:
        self.ring.close()
        self.connection.close()


def infer_request(site: Site, rng: np.random.Generator) -> Any:
    activations = oracle.random_activations(rng, site.weights[NAME], 3, "FP32")
    return inference.make_infer(site.client, NAME, activations)


def until(site: Site, message: str) -> None:
    site.daemon.wait_event(message)


def test_lame_duck_serves_every_way_in(tmp_path: Path, rng: np.random.Generator) -> None:
    with start(tmp_path, lame_duck_ms=1500) as site, Ring(site, rng) as ring:
        requests = [site.good_request(rng, request_id=i) for i in range(4)]
        request = infer_request(site, rng)
        go_on = threading.Event()

        def on_a_stream() -> Iterator[Any]:
            yield from requests[:2]
            go_on.wait(seconds(30))
            yield from requests[2:]

        replies = site.client.stream(on_a_stream())
        assert [next(replies).response.tokens for _ in range(2)] == [3, 3]
        assert inference.call(site.client, "ServerReady").ready
        site.daemon.terminate()
        until(site, "draining")
        assert not inference.call(site.client, "ServerReady").ready
        assert not inference.call(site.client, "ModelReady", name=NAME).ready
        go_on.set()
        assert [next(replies).response.tokens for _ in range(2)] == [3, 3]
        ring.check_serves()
        assert inference.infer(site.client, request).model_name
        site.check_serves(rng)
        with Connection(f"{tmp_path}/shared") as newcomer:  # who comes now is served as well
            newcomer.register()
        assert site.daemon.wait_exit() == 0


def test_nothing_new_after_the_lame_duck(tmp_path: Path, rng: np.random.Generator) -> None:
    """While a request of half a second is finished, nobody else gets in, by whatever way."""
    with start(tmp_path, max_queue_delay_us=900_000) as site, Ring(site, rng) as ring:
        request, expected = site.good_case(rng)
        request_oip = infer_request(site, rng)
        in_flight = site.client.einsum_future(request)
        time.sleep(0.15)
        site.daemon.terminate()
        until(site, "draining")
        time.sleep(0.1)
        for attempt in (lambda: site.client.einsum(site.good_request(rng)),
                        lambda: inference.infer(site.client, request_oip),
                        lambda: list(site.client.stream([site.good_request(rng)]))):  # fmt: skip
            with pytest.raises(grpc.RpcError) as caught:
                attempt()
            assert caught.value.code() in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
        completion = ring.ring.project(ring.request)
        assert completion.status == UNAVAILABLE and "draining" in completion.text
        with pytest.raises((ConnectionError, FileNotFoundError)):
            Connection(f"{tmp_path}/shared").register()
        oracle.check(in_flight.result(seconds(30)).output, "BF16", *expected)
        assert site.daemon.wait_exit() == 0


@pytest.mark.parametrize("twice", [False, True])
def test_answered_at_the_grace_limit(
    tmp_path: Path, rng: np.random.Generator, twice: bool
) -> None:
    """What would take longer is answered UNAVAILABLE, of every kind; also when told to stop again."""
    grace_ms = 30_000 if twice else 250
    with start(tmp_path, max_queue_delay_us=1_000_000, drain_grace_ms=grace_ms) as site:
        begin = time.monotonic()
        futures = [site.client.einsum_future(site.good_request(rng)) for _ in range(3)]
        infer = site.client.callable(inference.INFERENCE, "ModelInfer").future(
            infer_request(site, rng), timeout=seconds(30))  # fmt: skip
        release = threading.Event()

        def requests() -> Iterator[Any]:
            yield site.good_request(rng)
            release.wait(seconds(30))

        replies = site.client.stream(requests())
        time.sleep(0.15)
        site.daemon.terminate()
        if twice:
            until(site, "draining")
            time.sleep(0.1)
            site.daemon.terminate()
        for future in [*futures, infer]:
            error = future.exception(seconds(30))
            assert error and error.code() == StatusCode.UNAVAILABLE, error
            assert "draining" in error.details()
        with pytest.raises(grpc.RpcError) as caught:
            for reply in replies:
                assert reply.HasField("error")
        assert caught.value.code() == StatusCode.UNAVAILABLE
        assert time.monotonic() - begin < seconds(0.95), "not before its time"
        release.set()
        assert site.daemon.wait_exit() == 0


def test_who_does_not_read_is_cut_off(tmp_path: Path, rng: np.random.Generator) -> None:
    """A caller that takes not even its last answer does not hold up the end."""
    with start(tmp_path, drain_grace_ms=200, reply_timeout_ms=60_000) as site:
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
        client = Client(site.daemon.address, site.client.schema, options=options)
        big = site.good_request(rng, tokens=4000, output_type="FP32")
        replies = client.stream([big] * 8)  # of which none is read
        time.sleep(0.5)
        begin = time.monotonic()
        site.daemon.terminate()
        assert site.daemon.wait_exit() == 0
        assert time.monotonic() - begin < seconds(10)
        replies.cancel()
        client.close()
