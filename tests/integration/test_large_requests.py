"""Requests of more tokens than a batch takes: cut into parts, answered as one. Every layout, by call,
stream, shared memory and ring; beside others; cut off in the middle; and with buffers scarce."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import oracle
import pytest
from checkpoints import TENSOR_NAME
from client import Client, retry_delay_ms
from conftest import Site, rng_for, serving, small_weights
from daemon import ENGINE, count, seconds, wait_until
from grpc import StatusCode
from shared_memory import Connection, Region, share
from test_output_project import PROJECTED, Projection
from test_output_project import start as start_output_project

BATCH = 16
TOKENS = (BATCH + 1, BATCH + 3, 2 * BATCH, 3 * BATCH + 5)
DIRECT = ENGINE in ("cpu", "null")  # engines that read callers' memory where it is

# Blocks of 128 and of 32: 4 and 16 scales to a row, 1 and 4 words in GKT.
NAMES = [TENSOR_NAME.format(layer) for layer in range(2)]
LAYOUTS = list(
    itertools.product(oracle.ACTIVATION_LAYOUTS, oracle.SCALE_LAYOUTS, oracle.SCALE_TYPES)
)
LAYOUT_IDS = ["-".join(layout) for layout in LAYOUTS]


def make_weights() -> dict[str, oracle.Weight]:
    rng = rng_for("weights of test_large_requests")
    return {
        name: oracle.random_weight(rng, 3, 128, 512, block, block)
        for name, block in zip(NAMES, (128, 32), strict=True)
    }


def start(directory: Path, **config: Any) -> Any:
    listen = f"unix:{directory}/shared.sock"
    options = {"batch_tokens_max": BATCH, "shared_memory_listen": listen} | config
    return serving(directory, make_weights(), 128, **options)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with start(tmp_path_factory.mktemp("large")) as site:
        yield site


@pytest.fixture(scope="module")
def scarce(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One lane, and no buffer but its own: whoever held one while it waits would wait for ever."""
    with start(tmp_path_factory.mktemp("scarce"), lanes=1, batches=1) as site:
        yield site


class Case:
    """One request, and what its answer must be."""

    def __init__(self, site: Site, rng: np.random.Generator, tokens: int, name: str = NAMES[0],
                 layout: tuple[str, str, str] = ("TGR", "TGK", "UE8M0"), output_type: str = "BF16",
                 **options: Any):  # fmt: skip
        weight = site.weights[name]
        activation_layout, scale_layout, scale_type = layout
        activations = oracle.random_activations(rng, weight, tokens, scale_type)
        self.tokens, self.output_type = tokens, output_type
        self.request = site.request(
            name, activations, activation_layout=activation_layout, scale_layout=scale_layout,
            output_type=output_type, **options,
        )  # fmt: skip
        self.expected = site.expected(activations, weight)
        self.output_bytes = self.expected[0].size * (4 if output_type == "FP32" else 2)

    def check(self, reply: Any, output: bytes | None = None) -> None:
        assert reply.tokens == self.tokens
        assert reply.batch.parts == (-(-self.tokens // BATCH) if self.tokens > BATCH else 0)
        assert reply.batch.bucket == BATCH or self.tokens < BATCH
        oracle.check(reply.output if output is None else output, self.output_type, *self.expected)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_every_layout(
    site: Site, rng: np.random.Generator, layout: tuple[str, str, str], tokens: int
) -> None:
    for name, output_type in itertools.product(NAMES, oracle.OUTPUT_TYPES):
        case = Case(site, rng, tokens, name, layout, output_type)
        case.check(site.client.einsum(case.request))


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_a_slice_of_the_groups(
    site: Site, rng: np.random.Generator, layout: tuple[str, str, str]
) -> None:
    weight = site.weights[NAMES[0]]
    activation_layout, scale_layout, scale_type = layout
    activations = oracle.random_activations(rng, weight.slice(1, 3), TOKENS[-1], scale_type)
    request = site.request(
        NAMES[0], activations, activation_layout=activation_layout, scale_layout=scale_layout,
        group_begin=1, group_end=3,
    )  # fmt: skip
    reply = site.client.einsum(request)
    oracle.check(reply.output, "BF16", *site.expected(activations, weight.slice(1, 3)))


@pytest.mark.parametrize("tokens", TOKENS)
def test_digest(site: Site, rng: np.random.Generator, tokens: int) -> None:
    """Of all parts as of one output."""
    case = Case(site, rng, tokens, output_type="FP32")
    output = np.frombuffer(site.client.einsum(case.request).output, np.float32)
    case.request.digest_only = True
    reply = site.client.einsum(case.request)
    assert reply.output == b"" and reply.batch.parts > 1
    assert reply.digest.elements == output.size
    assert list(reply.digest.head) == list(output[:8])
    assert reply.digest.abs_max == np.abs(output).max()
    assert reply.digest.sum == pytest.approx(output.sum(dtype=np.float64))


def test_digest_is_that_of_the_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    """The null engine's answers are always the same, so that its checksum can be known."""
    import zlib

    with start(tmp_path, engine="null") as site:
        case = Case(site, rng, TOKENS[-1], digest_only=True)
        reply = site.client.einsum(case.request)
        assert reply.digest.crc32 == zlib.crc32(bytes(case.output_bytes))


def test_largest_request_of_the_defaults(tmp_path: Path, rng: np.random.Generator) -> None:
    """A prefill chunk of 8192 tokens goes in one call, in any configuration's default."""
    with serving(tmp_path, small_weights(1), 256) as site:
        limits = site.client.call("ServerInfo").limits
        assert limits.request_tokens_max == 8192 > limits.batch_tokens_max
        name, weight = next(iter(site.weights.items()))
        activations = oracle.random_activations(rng, weight, limits.request_tokens_max, "FP32")
        request = site.request(name, activations, output_type="FP32")
        assert request.ByteSize() <= limits.request_bytes_max
        options = [("grpc.max_receive_message_length", limits.reply_bytes_max)]
        with Client(site.daemon.address, site.client.schema, stock=True, options=options) as stock:
            reply = stock.einsum(request)
        assert reply.batch.parts == limits.request_tokens_max // limits.batch_tokens_max
        oracle.check(reply.output, "FP32", *site.expected(activations, weight))


# --- ways in --------------------------------------------------------------------------------------


def test_stream(site: Site, rng: np.random.Generator) -> None:
    """Large and small ones mixed."""
    cases = [
        Case(site, rng, int(rng.choice((1, BATCH, *TOKENS))), layout=LAYOUTS[i % 8], request_id=i)
        for i in range(count(60))
    ]
    seen = set()
    for reply in site.client.stream(case.request for case in cases):
        assert not reply.error.code, reply.error
        cases[reply.response.request_id].check(reply.response)
        seen.add(reply.response.request_id)
    assert len(seen) == len(cases)


@pytest.fixture
def region(site: Site) -> Iterator[Region]:
    path = site.client.call("ServerInfo").shared_memory.socket
    with Connection(path) as connection:
        region = connection.register(8 << 20)
        region.connection = connection
        yield region


@pytest.mark.parametrize("way", ["call", "ring"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_shared_memory(
    site: Site, rng: np.random.Generator, region: Region, layout: tuple[str, str, str], way: str
) -> None:
    ring = region.connection.ring(region) if way == "ring" else None
    for tokens, name in itertools.product(TOKENS, NAMES):
        region.used = 1 << 20
        case = Case(site, rng, tokens, name, layout, request_id=tokens)
        at = share(case.request, region, case.output_bytes)
        region.room(64)
        region.memory[at + case.output_bytes : at + case.output_bytes + 64] = b"\xa5" * 64
        before = site.client.counters()
        if ring:
            completion = ring.project(case.request)
            assert (completion.status, completion.text) == (0, "")
            assert (completion.tokens, completion.parts) == (tokens, -(-tokens // BATCH))
            oracle.check(region.get(at, case.output_bytes), "BF16", *case.expected)
        else:
            reply = site.client.einsum(case.request)
            assert reply.output == b""
            case.check(reply, region.get(at, case.output_bytes))
        assert region.get(at + case.output_bytes, 64) == b"\xa5" * 64
        after = site.client.counters()
        if DIRECT:  # rows that lie apart are brought together, else nothing is copied
            tensors = case.request.shared.activations_bytes + case.request.shared.scales_bytes
            copied = after.copied_in_bytes - before.copied_in_bytes
            assert copied == 0 if layout[:2] == ("TGR", "TGK") else 0 < copied <= tensors
            assert after.copied_out_bytes == before.copied_out_bytes
    if ring:
        ring.close()


def test_digest_of_shared_memory(site: Site, rng: np.random.Generator, region: Region) -> None:
    case = Case(site, rng, TOKENS[-1], digest_only=True)
    share(case.request, region, 0)
    digest = site.client.einsum(case.request).digest
    assert digest.elements == case.expected[0].size
    assert digest.abs_max == pytest.approx(np.abs(case.expected[0]).max(), rel=1e-2)


def test_output_project(tmp_path: Path, rng: np.random.Generator) -> None:
    listen = f"unix:{tmp_path}/shared.sock"
    with start_output_project(
        tmp_path, batch_tokens_max=BATCH, shared_memory_listen=listen
    ) as site, Connection(site.client.call("ServerInfo").shared_memory.socket) as connection:
        region = connection.register(16 << 20)
        ring = connection.ring(region)
        call = site.client.callable("einsum.v1.Einsum", "OutputProject")
        for tokens, name in itertools.product(TOKENS, PROJECTED):
            projection = Projection(rng, name, tokens)
            projection.check(call(projection.request(site.client)))
            request = projection.request(site.client)
            region.used = 1 << 20
            exact, error = projection.expected()
            at = share(request, region, exact.size * 2)
            call(request)
            oracle.check(region.get(at, exact.size * 2), "BF16", exact, error)
            region.memory[at : at + exact.size * 2] = bytes(exact.size * 2)
            assert ring.project(request).status == 0
            oracle.check(region.get(at, exact.size * 2), "BF16", exact, error)
            # One that the rope does not have, in the last part.
            bad = np.full(tokens, 1, np.int64)
            bad[-1] = -1
            offset = request.shared.scales_offset
            region.memory[offset : offset + bad.nbytes] = bad.tobytes()
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as caught:
                    call(request)
                assert caught.value.code() == StatusCode.INVALID_ARGUMENT
                assert f"[{tokens - 1}] is -1" in caught.value.details()
                completion = ring.project(request)
                assert completion.status == StatusCode.INVALID_ARGUMENT.value[0]
                assert completion.field == "positions"
            site.check_serves(rng)
        ring.close()


def test_attention_that_its_buffers_take_in_parts_alone(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Without a rope in the configuration a batch has not the bytes for as many tokens of it."""
    with start_output_project(tmp_path, batch_tokens_max=64, batch_input_bytes=1 << 19) as site:
        projection = Projection(rng, PROJECTED[0], 64)
        call = site.client.callable("einsum.v1.Einsum", "OutputProject")
        reply = call(projection.request(site.client))
        assert reply.batch.parts == 3  # 16 KiB a token
        projection.check(reply)


# --- copies ---------------------------------------------------------------------------------------


def test_copies(tmp_path: Path, rng: np.random.Generator) -> None:
    """Each byte once on the way in. On the way out none while all parts have room at once; of more
    parts, those that end before the last has room."""
    with start(tmp_path, lanes=3, batches=16) as site:
        for parts, layout in itertools.product((2, 3, 4, 12), LAYOUTS):
            case = Case(site, rng, parts * BATCH, layout=layout)
            before = site.client.counters()
            case.check(site.client.einsum(case.request))
            after = site.client.counters()
            sent = len(case.request.activations) + len(case.request.activation_scales)
            assert after.copied_in_bytes - before.copied_in_bytes == sent
            copied = after.copied_out_bytes - before.copied_out_bytes
            if parts <= 4:
                assert copied == 0
            else:
                assert copied <= case.output_bytes * (parts - 1) / parts


# --- beside others --------------------------------------------------------------------------------


def test_few_tokens_beside_a_large_request(tmp_path: Path, rng: np.random.Generator) -> None:
    """They have their turn between its parts."""
    with serving(
        tmp_path, small_weights(1), 256, batch_tokens_max=64, lanes=1, phase_sample=0
    ) as site:
        small, expected = site.good_case(rng, tokens=1)
        large, large_expected = site.good_case(rng, tokens=64 * count(100))
        with Client(site.daemon.address, site.client.schema) as other:
            future = other.einsum_future(large)
            mine = []
            while not future.done():
                mine.append(site.client.einsum(small))
            reply = future.result()
        oracle.check(reply.output, "BF16", *large_expected)
        assert reply.batch.parts == count(100)
        waited = [each.batch.queue_ns for each in mine]
        assert max(waited) > reply.batch.run_ns / 20, "none met the large one: nothing is shown"
        assert statistics.median(waited) < 2 * reply.batch.run_ns
        for each in mine:
            oracle.check(each.output, "BF16", *expected)


@pytest.mark.parametrize("name", ["site", "scarce"])
def test_many_large_ones_at_once(name: str, request: pytest.FixtureRequest) -> None:
    """More than there are lanes or buffers: none waits for another that waits."""
    site: Site = request.getfixturevalue(name)

    def call(caller: int) -> None:
        rng = rng_for(f"caller {caller}")
        with Client(site.daemon.address, site.client.schema) as client:
            for i in range(count(10)):
                case = Case(site, rng, int(rng.choice(TOKENS)) + 64 * (i % 3), layout=LAYOUTS[i % 8])
                case.check(client.einsum(case.request))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(8)))
    jobs_are_gone(site)


def jobs_are_gone(site: Site) -> None:
    """All buffers are free: requests that need every one of them still go through."""
    rng = rng_for("jobs are gone")
    for tokens in (1, BATCH, 8 * BATCH):
        case = Case(site, rng, tokens)
        case.check(site.client.einsum(case.request))


@pytest.mark.parametrize("name", ["site", "scarce"])
def test_slow_readers(name: str, request: pytest.FixtureRequest, rng: np.random.Generator) -> None:
    """Replies that lie there unread hold nobody up."""
    site: Site = request.getfixturevalue(name)
    sent = [Case(site, rng, 20 * BATCH, output_type="FP32", request_id=i) for i in range(10)]
    options = [("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0)]
    with Client(site.daemon.address, site.client.schema, options=options) as slow:
        replies = slow.stream(iter([case.request for case in sent]))
        first = next(replies)  # and no other for now
        jobs_are_gone(site)
        for reply in itertools.chain([first], replies):
            assert not reply.error.code
            sent[reply.response.request_id].check(reply.response)
    jobs_are_gone(site)


# --- cut off --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["site", "scarce"])
def test_cancelled_between_parts(
    name: str, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    site: Site = request.getfixturevalue(name)
    case = Case(site, rng, 60 * BATCH)
    start_ns = time.monotonic_ns()
    case.check(site.client.einsum(case.request))
    took = (time.monotonic_ns() - start_ns) / 1e9
    for i in range(count(40)):
        future = site.client.einsum_future(case.request)
        time.sleep(took * i / count(40))
        future.cancel()
        if i % 5 == 0:
            small = Case(site, rng, 1)
            small.check(site.client.einsum(small.request))
    jobs_are_gone(site)


@pytest.mark.parametrize("name", ["site", "scarce"])
def test_streams_cut_off(
    name: str, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    site: Site = request.getfixturevalue(name)
    cases = [Case(site, rng, 9 * BATCH, request_id=i) for i in range(16)]
    for i in range(count(20)):
        with Client(site.daemon.address, site.client.schema) as client:
            replies = client.stream(iter([case.request for case in cases]))
            for _ in range(i % 5):
                reply = next(replies)
                cases[reply.response.request_id].check(reply.response)
            if i % 2:
                replies.cancel()
    jobs_are_gone(site)


def test_deadlines_between_parts(scarce: Site, rng: np.random.Generator) -> None:
    """Answered once, with the right code, whenever it passes."""
    case = Case(scarce, rng, 60 * BATCH)
    start_ns = time.monotonic_ns()
    case.check(scarce.client.einsum(case.request))
    took = (time.monotonic_ns() - start_ns) / 1e9
    late = 0
    for i in range(count(40)):
        try:
            reply = scarce.client.einsum(case.request, timeout=0.001 + 1.2 * took * i / count(40))
            case.check(reply)
        except grpc.RpcError as error:
            assert error.code() == StatusCode.DEADLINE_EXCEEDED, error.details()
            late += 1
    assert late > 0
    jobs_are_gone(scarce)


def test_deadline_cap(tmp_path: Path, rng: np.random.Generator) -> None:
    """What the server itself says of a request that takes too long."""
    with start(tmp_path, deadline_ms_max=1, lanes=1) as site:
        case = Case(site, rng, 8192 - 5)
        with pytest.raises(grpc.RpcError) as caught:
            site.client.einsum(case.request)
        assert caught.value.code() == StatusCode.DEADLINE_EXCEEDED
        assert "before launch" in caught.value.details()
        wrapped = list(site.client.stream([case.request]))
        assert [reply.error.code for reply in wrapped] == [StatusCode.DEADLINE_EXCEEDED.value[0]]


def test_ring_closed_between_parts(site: Site, rng: np.random.Generator) -> None:
    path = site.client.call("ServerInfo").shared_memory.socket
    for i in range(count(20)):
        with Connection(path) as connection:
            region = connection.register(8 << 20)
            ring = connection.ring(region)
            for request_id in range(8):
                case = Case(site, rng, 9 * BATCH, layout=LAYOUTS[i % 8], request_id=request_id)
                share(case.request, region, case.output_bytes)
                ring.submit(case.request)
            for _ in range(i % 4):
                assert ring.next().status == 0
            ring.close()
    jobs_are_gone(site)


def test_drain(tmp_path: Path, rng: np.random.Generator) -> None:
    """What was accepted is answered."""
    with start(tmp_path, lanes=1, batches=1) as site:
        case = Case(site, rng, 100 * BATCH)
        future = site.client.einsum_future(case.request)
        wait_until(lambda: site.client.counters().batches > 10)
        site.daemon.terminate()
        case.check(future.result())


# --- limits ---------------------------------------------------------------------------------------


def test_too_many_tokens(tmp_path: Path, rng: np.random.Generator) -> None:
    with start(tmp_path, request_tokens_max=50) as site:
        case = Case(site, rng, 50)
        case.check(site.client.einsum(case.request))
        with pytest.raises(grpc.RpcError) as caught:
            site.client.einsum(Case(site, rng, 51).request)
        assert caught.value.code() == StatusCode.INVALID_ARGUMENT
        assert "request_tokens_max" in caught.value.details()


def test_bytes_of_large_requests(tmp_path: Path, rng: np.random.Generator) -> None:
    """One is let in however large; more wait outside, and small ones go on."""
    with start(tmp_path, cut_bytes_max=1, lanes=1) as site:
        assert site.client.call("ServerInfo").limits.cut_bytes_max == 1
        large, small = Case(site, rng, 2000), Case(site, rng, 3)
        refused = []
        answered = threading.Event()

        def call() -> None:
            with Client(site.daemon.address, site.client.schema) as client:
                for _ in range(count(10)):
                    try:
                        large.check(client.einsum(large.request))
                        answered.set()
                    except grpc.RpcError as error:
                        assert error.code() == StatusCode.RESOURCE_EXHAUSTED, error.details()
                        assert "cut_bytes_max" in error.details()
                        refused.append(retry_delay_ms(error))

        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(call) for _ in range(4)]
            small.check(site.client.einsum(small.request))
            for caller in callers:
                caller.result()
        assert answered.is_set() and refused and all(ms > 0 for ms in refused)
        large.check(site.client.einsum(large.request))  # nothing was left counted
