"""Tensors in memory that the caller shares: held against the oracle, not copied by the daemon, and
gone with their connection; and every way in which a request for them can be wrong."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import pytest
from grpc import StatusCode

import oracle
from client import field_violations
from conftest import Site, serving
from daemon import EINSUMCTL, ENGINE, Daemon, run, wait_until
from shared_memory import OP_CUDA, Connection, Refused, Region, Ring, memory_file, share
from test_numbers import FORMATS, LAYOUTS, make_weights, recipes_for
from test_output_project import PROJECTED, Projection
from test_output_project import start as start_output_project


def start(directory: Path, **config: Any) -> Any:
    listen = f"unix:{directory}/shared.sock"
    return serving(directory, make_weights(), 256, shared_memory_listen=listen, **config)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with start(tmp_path_factory.mktemp("shared")) as site:
        yield site


def path_of(site: Site) -> str:
    return site.client.call("ServerInfo").shared_memory.socket


def connect(site: Site) -> Connection:
    return Connection(path_of(site))


@pytest.fixture
def region(site: Site) -> Iterator[Region]:
    with connect(site) as connection:
        region = connection.register(32 << 20)
        region.connection = connection
        yield region


def output_bytes(reply: Any) -> int:
    element = 4 if reply.output_type == 2 else 2
    return reply.tokens * reply.groups * reply.output_dim * element


def refuse(site: Site, request: Any, code: StatusCode, field: str, text: str = "") -> None:
    with pytest.raises(grpc.RpcError) as caught:
        site.client.einsum(request)
    assert caught.value.code() == code, caught.value.details()
    assert field_violations(caught.value) == [field] or code != StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(field)
    assert text in caught.value.details()


def good_request(site: Site, rng: np.random.Generator, region: Region, **options: Any) -> Any:
    """One for 3 tokens, and what its answer must be."""
    request, expected = site.good_case(rng, **options)
    size = expected[0].size * 2
    region.used = 0
    share(request, region, 0 if request.digest_only else size)
    return request, expected


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout_and_type(
    site: Site, rng: np.random.Generator, region: Region, name: str
) -> None:
    weight = site.weights[name]
    for recipe, layout in itertools.product(recipes_for(weight)[:1], LAYOUTS):
        activation_layout, scale_layout, scale_type, output_type = layout
        tokens = int(rng.integers(1, 10))
        activations = oracle.random_activations(rng, weight, tokens, scale_type, "bits")
        request = site.request(
            name, activations, activation_layout=activation_layout, scale_layout=scale_layout,
            output_type=output_type, recipe=recipe,
        )  # fmt: skip
        element = 4 if output_type == "FP32" else 2
        size = tokens * weight.groups * weight.output_dim * element
        region.used = 0
        at = share(request, region, size + 128)
        region.memory[at : at + size + 128] = b"\xa5" * (size + 128)
        reply = site.client.einsum(request)
        assert reply.output == b""
        assert output_bytes(reply) == size
        oracle.check(region.get(at, size), output_type, *site.expected(activations, weight))
        assert region.get(at + size, 128) == b"\xa5" * 128


def test_output_project(tmp_path: Path, rng: np.random.Generator) -> None:
    listen = f"unix:{tmp_path}/shared.sock"
    with start_output_project(tmp_path, shared_memory_listen=listen) as site, connect(site) as c:
        region = c.register(8 << 20)
        for name, output_type in itertools.product(PROJECTED, ("BF16", "FP32")):
            projection = Projection(rng, name, int(rng.integers(1, 90)), output_type)
            request = projection.request(site.client)
            exact, error = projection.expected()
            size = exact.size * (4 if output_type == "FP32" else 2)
            region.used = 0
            at = share(request, region, size)
            sent = region.get(request.shared.activations_offset, request.shared.activations_bytes)
            site.client.callable("einsum.v1.Einsum", "OutputProject")(request)
            oracle.check(region.get(at, size), output_type, exact, error)
            # It is quantised in place, but not in the caller's place.
            assert sent == region.get(
                request.shared.activations_offset, request.shared.activations_bytes
            )
            # A position that the rope does not have.
            bad = np.full(projection.tokens, -1, np.int64).tobytes()
            offset = request.shared.scales_offset
            region.memory[offset : offset + len(bad)] = bad
            with pytest.raises(grpc.RpcError) as caught:
                site.client.callable("einsum.v1.Einsum", "OutputProject")(request)
            assert caught.value.code() == StatusCode.INVALID_ARGUMENT
            assert field_violations(caught.value) == ["positions"]


def test_streams_and_digests(site: Site, rng: np.random.Generator, region: Region) -> None:
    cases, used = [], 0
    for request_id in range(1, 20):
        request, expected = site.good_case(rng, tokens=int(rng.integers(1, 9)))
        request.request_id = request_id
        size = expected[0].size * 2
        cases.append((request, expected, share(request, region, size), size))
        used += 1
    for reply in site.client.stream(request for request, *_ in cases):
        assert not reply.error.code
        _, expected, at, size = cases[reply.response.request_id - 1]
        assert reply.response.output == b""
        oracle.check(region.get(at, size), "BF16", *expected)
    request, expected, at, size = cases[0]
    request.digest_only = True
    request.shared.output_bytes = 0
    digest = site.client.einsum(request).digest
    assert digest.elements == expected[0].size


def test_zero_tokens(site: Site, rng: np.random.Generator, region: Region) -> None:
    request = site.good_request(rng, tokens=0)
    share(request, region, 0)
    assert site.client.einsum(request).tokens == 0


# --- copies ---------------------------------------------------------------------------------------


def test_nothing_is_copied(site: Site, rng: np.random.Generator, region: Region) -> None:
    before = site.client.counters()
    for _ in range(5):
        request, _ = good_request(site, rng, region)
        site.client.einsum(request)
    after = site.client.counters()
    assert after.shared_requests - before.shared_requests == 5
    assert after.copied_in_bytes == before.copied_in_bytes
    assert after.copied_out_bytes == before.copied_out_bytes
    assert site.client.call("ServerInfo").shared_memory.direct


def test_over_sockets_each_byte_is_copied_once(site: Site, rng: np.random.Generator) -> None:
    before = site.client.counters()
    request = site.good_request(rng)
    site.client.einsum(request)
    after = site.client.counters()
    sent = len(request.activations) + len(request.activation_scales)
    assert after.copied_in_bytes - before.copied_in_bytes == sent
    assert after.copied_out_bytes == before.copied_out_bytes


# --- the ring --------------------------------------------------------------------------------------


@pytest.fixture
def ring(region: Region, site: Site) -> Iterator[Ring]:
    ring = region.connection.ring(region)
    yield ring
    ring.close()


@pytest.mark.parametrize("name", FORMATS)
def test_ring_every_layout_and_type(
    site: Site, rng: np.random.Generator, ring: Ring, name: str
) -> None:
    weight, region, begin = site.weights[name], ring.region, ring.region.used
    for recipe, layout in itertools.product(recipes_for(weight)[:1], LAYOUTS):
        activation_layout, scale_layout, scale_type, output_type = layout
        tokens = int(rng.integers(1, 10))
        activations = oracle.random_activations(rng, weight, tokens, scale_type, "bits")
        request = site.request(
            name, activations, activation_layout=activation_layout, scale_layout=scale_layout,
            output_type=output_type, recipe=recipe, request_id=int(rng.integers(1 << 62)),
        )  # fmt: skip
        size = tokens * weight.groups * weight.output_dim * (4 if output_type == "FP32" else 2)
        region.used = begin
        at = share(request, region, size)
        completion = ring.project(request)
        assert completion.status == 0, completion.text
        shape = (completion.tokens, completion.groups, completion.output_dim)
        assert shape == (tokens, weight.groups, weight.output_dim)
        oracle.check(region.get(at, size), output_type, *site.expected(activations, weight))


def test_ring_random(site: Site, rng: np.random.Generator, ring: Ring) -> None:
    """Many in flight, of all weights, in slices, for any kernel; completed in any order."""
    before, expected, region = site.client.counters(), {}, ring.region
    for request_id in range(ring.entries - 1):
        name = str(rng.choice(list(FORMATS)))
        weight, begin, end = site.weights[name], 0, 0
        if rng.random() < 0.4:
            begin = int(rng.integers(0, weight.groups))
            end = int(rng.integers(begin + 1, weight.groups + 1))
        held = weight.slice(begin, end) if end else weight
        activations = oracle.random_activations(rng, held, int(rng.integers(1, 30)), "FP32")
        kernel = str(rng.choice(["", *site.client.kernels()]))
        request = site.request(
            name, activations, recipe=str(rng.choice(recipes_for(weight))), kernel=kernel,
            request_id=request_id, group_begin=begin, group_end=end,
        )  # fmt: skip
        exact, error = site.expected(activations, held, kernel)
        at = share(request, region, exact.size * 2)
        ring.submit(request)
        expected[request_id] = at, exact, error
    while expected:
        completion = ring.next()
        assert completion.status == 0, completion.text
        at, exact, error = expected.pop(completion.id)
        oracle.check(region.get(at, exact.size * 2), "BF16", exact, error)
    info = site.client.call("ServerInfo")
    assert (info.shared_memory.rings, info.shared_memory.regions) == (1, 1)
    after = info.counters
    sent = ring.entries - 1
    assert after.ring_requests - before.ring_requests == sent
    assert after.answered - before.answered == after.requests - before.requests == sent
    assert after.copied_in_bytes == before.copied_in_bytes
    assert after.copied_out_bytes == before.copied_out_bytes


def test_ring_output_project(tmp_path: Path, rng: np.random.Generator) -> None:
    listen = f"unix:{tmp_path}/shared.sock"
    with start_output_project(tmp_path, shared_memory_listen=listen) as site, connect(site) as c:
        region = c.register(16 << 20)
        ring = c.ring(region)
        for name, output_type in itertools.product(PROJECTED, ("BF16", "FP32")):
            projection = Projection(rng, name, int(rng.integers(1, 90)), output_type)
            request = projection.request(site.client)
            exact, error = projection.expected()
            size = exact.size * (4 if output_type == "FP32" else 2)
            at = share(request, region, size)
            completion = ring.project(request)
            assert completion.status == 0, completion.text
            oracle.check(region.get(at, size), output_type, exact, error)
            bad = np.full(projection.tokens, 1 << 40, np.int64).tobytes()
            offset = request.shared.scales_offset
            region.memory[offset : offset + len(bad)] = bad
            completion = ring.project(request)
            assert (completion.status, completion.field) == (3, "positions")
        ring.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": 0},
        {"recipe": 3},
        {"scale_layout": 9},
        {"tokens": 1 << 20},
        {"tokens": 4},
        {"group_end": 99},
        {"shared.activations_offset": 1},
        {"shared.output_offset": 2**64 - 64},
        {"shared.output_bytes": 1},
        {"shared.scales_bytes": 0},
    ],
)
def test_ring_errors_are_those_of_an_rpc(
    site: Site, rng: np.random.Generator, ring: Ring, changes: dict[str, int]
) -> None:
    request, _ = site.good_case(rng)
    share(request, ring.region, 1 << 16)
    for name, value in changes.items():
        *path, last = name.split(".")
        setattr(request.shared if path else request, last, value)
    with pytest.raises(grpc.RpcError) as caught:
        site.client.einsum(request)
    completion = ring.project(request)
    assert completion.status == caught.value.code().value[0]
    assert completion.text == caught.value.details()
    assert [completion.field] == field_violations(caught.value) or not completion.field


def test_ring_follows_its_weights(tmp_path: Path, rng: np.random.Generator) -> None:
    """Unloaded it is not found; replaced, the new one is used."""
    with start(tmp_path) as site, connect(site) as connection:
        region = connection.register()
        ring = connection.ring(region)
        name = next(iter(site.weights))
        request, expected = site.good_case(rng)
        at = share(request, region, expected[0].size * 2)
        assert ring.project(request).status == 0
        site.client.call("UnloadWeights", names=[name])
        completion = ring.project(request)
        assert (completion.status, completion.field) == (5, "weight")
        with pytest.raises(Refused):
            ring.number(4, "layers.77.attn.wo_a")
        site.client.load(site.root / "model", output_dim=256, replace=True)
        region.memory[at : at + expected[0].size * 2] = bytes(expected[0].size * 2)
        assert ring.project(request).status == 0
        oracle.check(region.get(at, expected[0].size * 2), "BF16", *expected)
        ring.close()


def test_ring_breakers_lose_their_connection(
    site: Site, rng: np.random.Generator, ring: Ring
) -> None:
    with connect(site) as other:
        region = other.register(4 << 20)
        broken = other.ring(region)
        broken.words["submit_tail"].value = 1 << 20
        os.eventfd_write(broken.doorbell, 1)
        wait_until(lambda: broken.words["closed"].value == 1)
        with pytest.raises(OSError):
            other.ask(2)
        broken.close()
    request, expected = site.good_case(rng)
    at = share(request, ring.region, expected[0].size * 2)
    assert ring.project(request).status == 0
    oracle.check(ring.region.get(at, expected[0].size * 2), "BF16", *expected)


RING_CALLER = """
import sys
sys.path[:0] = [{here!r}]
from shared_memory import Connection, SUBMISSION
import os
connection = Connection({path!r})
region = connection.register(8 << 20)
ring = connection.ring(region)
weight = ring.number(4, {weight!r})
entry = SUBMISSION.pack(0, 0, weight, 0, *{layouts!r}, 1, {tokens}, 0, 0, region.number, 0,
                        *{places!r}, 0, 0, 0)
print("ready", flush=True)
while True:
    for i in range(ring.entries):
        at = ring.submissions + i * SUBMISSION.size
        region.memory[at : at + SUBMISSION.size] = entry
    ring.submitted += ring.entries
    ring.words["submit_tail"].value = ring.submitted & 0xFFFFFFFF
    os.eventfd_write(ring.doorbell, 1)
    for _ in range(ring.entries):
        ring.next()
"""


def test_ring_callers_killed_in_mid_call(site: Site, rng: np.random.Generator) -> None:
    request, _ = site.good_case(rng, tokens=64)
    stand_in = Region(8 << 20)
    stand_in.name, stand_in.used = bytes(16), 1 << 20
    share(request, stand_in, 64 * 8 * 256 * 2)
    shared = request.shared
    script = RING_CALLER.format(
        here=str(Path(__file__).parent), path=path_of(site), weight=request.weight, tokens=64,
        layouts=(request.recipe, request.activation_layout, request.scale_layout,
                 request.scale_type),
        places=(shared.activations_offset, shared.activations_bytes, shared.scales_offset,
                shared.scales_bytes, shared.output_offset, shared.output_bytes),
    )  # fmt: skip
    stand_in.close()
    for delay in (0.0, 0.01, 0.05, 0.2):
        caller = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
        )
        assert caller.stdout.readline() == "ready\n"
        time.sleep(delay)
        caller.kill()
        caller.wait()
        wait_until(lambda: site.client.call("ServerInfo").shared_memory.regions == 0)
        site.check_serves(rng)


# --- the C client ---------------------------------------------------------------------------------


def bench(site: Site, *arguments: Any) -> dict:
    done = run(EINSUMCTL, "--endpoint", site.daemon.address, "--json", "bench", "--duration", 0.5,
               "--warmup", 0, *arguments)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("transport", ["shm", "ring", "auto"])
def test_client_numbers(site: Site, transport: str) -> None:
    """einsumctl's own tensors lie elsewhere: they are copied there and back."""
    done = run(
        EINSUMCTL, "--endpoint", site.daemon.address, "--json", "check", "--transport", transport,
        "--checkpoint", site.root / "model", "--tokens", "1,7,40", "--repeat", 2, timeout=300,
    )  # fmt: skip
    verdict = json.loads(done.stdout)
    assert verdict["passed"] is True, done.stdout
    assert verdict["cases"] == 3 * len(site.weights)


def test_client_takes_the_best(site: Site, small: Site) -> None:
    for transport, taken in (("auto", "ring"), ("ring", "ring"), ("shm", "shm"), ("grpc", "tcp")):
        before = site.client.counters()
        result = bench(site, "--transport", transport, "--mixed", "--tokens", "1,3")
        assert result["transport"] == taken
        assert result["errors"] == {}
        after = site.client.counters()
        shared = after.shared_requests - before.shared_requests
        by_ring = after.ring_requests - before.ring_requests
        assert (shared >= result["calls"]) == (transport != "grpc")
        assert (by_ring >= result["calls"]) == (taken == "ring")
        if transport != "grpc":
            assert after.copied_in_bytes == before.copied_in_bytes
            assert after.copied_out_bytes == before.copied_out_bytes
    # Where none is offered, whoever does not insist goes by gRPC.
    assert bench(small, "--transport", "auto")["transport"] == "tcp"
    for transport in ("shm", "ring"):
        done = run(EINSUMCTL, "--endpoint", small.daemon.address, "bench", "--transport", transport)
        assert done.returncode != 0
        assert "shares no memory" in done.stderr


def test_client_has_more_in_flight_than_entries(tmp_path: Path) -> None:
    with start(tmp_path, ring_entries_max=4) as site:
        result = bench(site, "--transport", "ring", "--concurrency", 64)
        assert (result["transport"], result["errors"]) == ("ring", {})
        assert result["calls"] > 64


def test_client_copies_what_does_not_fit(tmp_path: Path) -> None:
    """With little memory shared, what does not fit there goes by gRPC."""
    with start(tmp_path, shared_region_bytes_max=1 << 20) as site:
        result = bench(site, "--transport", "auto", "--concurrency", 32, "--tokens", "1,60")
        assert result["errors"] == {}


# --- wrong requests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor, field, sizes",
    [
        ("activations", "activations", "expected"),
        ("scales", "activation_scales", "expected"),
        ("output", "shared.output_bytes", "expected room for at least"),
    ],
)
def test_places_are_checked(
    site: Site, rng: np.random.Generator, region: Region, tensor: str, field: str, sizes: str
) -> None:
    request, _ = good_request(site, rng, region)
    offset, size = f"{tensor}_offset", f"{tensor}_bytes"
    bad = StatusCode.INVALID_ARGUMENT

    def wrong(field: str, text: str, **values: int) -> None:
        changed = type(request)()
        changed.CopyFrom(request)
        for name, value in values.items():
            setattr(changed.shared, name, value)
        refuse(site, changed, bad, field, text)

    good = getattr(request.shared, size)
    wrong(f"shared.{offset}", "multiple of 64", **{offset: 1})
    wrong(f"shared.{offset}", "multiple of 64", **{offset: 2**64 - 1})
    wrong(f"shared.{offset}", "do not lie within", **{offset: region.size})
    wrong(f"shared.{offset}", "do not lie within", **{offset: region.size - 64})
    wrong(f"shared.{offset}", "do not lie within", **{offset: 2**64 - 64})
    wrong(field, sizes, **{size: good - 1})
    wrong(field, sizes, **{size: 0})
    if tensor == "output":
        wrong(f"shared.{offset}", "do not lie within", **{size: 2**64 - 1})
        wrong(f"shared.{offset}", "do not lie within", **{size: 2**64 - 64, offset: 64})
    else:
        wrong(field, sizes, **{size: 2**64 - 1})
    site.check_serves(rng)


def test_names_are_checked(site: Site, rng: np.random.Generator, region: Region) -> None:
    request, _ = good_request(site, rng, region)
    name = request.shared.region
    for wrong in (bytes(16), b"\xff" * 16, name[:15] + bytes([name[15] ^ 1]), name[::-1]):
        request.shared.region = wrong
        refuse(site, request, StatusCode.NOT_FOUND, "shared.region")
    request.shared.ClearField("region")
    refuse(site, request, StatusCode.NOT_FOUND, "shared.region")
    for wrong in (name[:15], name + b"x"):
        request.shared.region = wrong
        refuse(site, request, StatusCode.INVALID_ARGUMENT, "shared.region", "expected 16")
    request.shared.region = name
    request.activations = b"x"
    refuse(site, request, StatusCode.INVALID_ARGUMENT, "activations", "shared memory")
    request.ClearField("activations")
    request.digest_only = True
    refuse(site, request, StatusCode.INVALID_ARGUMENT, "shared.output_bytes", "digest_only")


def test_without_shared_memory(small: Site, rng: np.random.Generator) -> None:
    assert not small.client.call("ServerInfo").HasField("shared_memory")
    region = Region(1 << 20)
    region.name = bytes(16)
    request, _ = good_request(small, rng, region)
    refuse(small, request, StatusCode.FAILED_PRECONDITION, "shared")
    region.close()


# --- memory on the GPU ----------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", (False, True))
def test_cuda_memory_is_refused_with_its_reason(
    tmp_path: Path, rng: np.random.Generator, allowed: bool
) -> None:
    """Here by every engine: the handle is of nothing. tests/gpu/regions.c has real ones."""
    with start(tmp_path, shared_memory_cuda=allowed) as site, connect(site) as connection:
        gpu = ENGINE == "cuda"
        assert site.client.call("ServerInfo").shared_memory.cuda == (gpu and allowed)
        with pytest.raises(Refused) as caught:
            connection.ask(OP_CUDA, size=4096, text=bytes(64))
        if not gpu:
            assert caught.value.status == StatusCode.UNIMPLEMENTED.value[0]
            assert f'the engine "{ENGINE}" takes no CUDA memory' in caught.value.text
        else:
            assert caught.value.status == StatusCode.FAILED_PRECONDITION.value[0]
            assert ("cannot be opened" if allowed else "shared_memory_cuda") in caught.value.text
        region = connection.register()  # the connection goes on
        request, expected = good_request(site, rng, region)
        reply = site.client.einsum(request)
        got = region.get(request.shared.output_offset, output_bytes(reply))
        oracle.check(got, "BF16", *expected)


# --- connections ----------------------------------------------------------------------------------


def test_a_region_goes_with_its_connection(site: Site, rng: np.random.Generator) -> None:
    info = lambda: site.client.call("ServerInfo").shared_memory  # noqa: E731
    wait_until(lambda: info().regions == 0)
    with connect(site) as connection:
        region = connection.register()
        request, _ = good_request(site, rng, region)
        assert (info().connections, info().regions, info().regions_bytes) == (1, 1, 1 << 20)
        site.client.einsum(request)
    wait_until(lambda: info().regions == 0 and info().connections == 0)
    refuse(site, request, StatusCode.NOT_FOUND, "shared.region")


def test_one_callers_region_is_not_anothers(site: Site) -> None:
    """By number, that is: who knows a name may use it."""
    with connect(site) as one, connect(site) as other:
        assert one.register().number == other.register().number == 0
        with pytest.raises(Refused) as caught:
            other.ask(2, region=1)
        assert caught.value.status == 5


def test_files_that_could_shrink_are_refused(site: Site) -> None:
    with connect(site) as connection:
        fd = memory_file(1 << 20, 0)
        with pytest.raises(Refused) as caught:
            connection.ask(1, [fd], size=1 << 20)
        assert caught.value.status == 9
        assert "F_SEAL_SHRINK" in caught.value.text
        os.close(fd)
        connection.register()


def test_limits(tmp_path: Path) -> None:
    limits = {
        "shared_connections_max": 3,
        "shared_connection_regions_max": 2,
        "shared_regions_max": 3,
        "shared_region_bytes_max": 1 << 20,
        "shared_bytes_max": 5 << 19,
    }
    with start(tmp_path, **limits) as site:
        with connect(site) as one, connect(site) as other:
            for size, key in ((2 << 20, "shared_region_bytes_max"),):
                with pytest.raises(Refused, match=key):
                    one.register(size)
            one.register(1 << 20)
            one.register(1 << 20)
            with pytest.raises(Refused, match="shared_connection_regions_max"):
                one.register(4096)
            with pytest.raises(Refused, match="shared_bytes_max"):
                other.register(1 << 20)
            other.register(4096)
            with pytest.raises(Refused, match="shared_regions_max"):
                other.register(4096)
            with connect(site) as third, connect(site) as late:
                with pytest.raises(Refused, match="shared_regions_max"):
                    third.register(4096)
                with pytest.raises(OSError):
                    late.register(4096)
            info = site.client.call("ServerInfo").shared_memory
            assert info.connections_refused == 1
            assert (info.regions, info.regions_bytes) == (3, (2 << 20) + 4096)


CALLER = """
import sys
sys.path.insert(0, {here!r})
from shared_memory import Connection
connection = Connection({path!r})
region = connection.register()
print(region.name.hex(), flush=True)
sys.stdin.read()
"""


def test_a_killed_caller(site: Site, rng: np.random.Generator) -> None:
    """Its region is gone, while others use it up to the last moment."""
    script = CALLER.format(here=str(Path(__file__).parent), path=path_of(site))
    caller = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    region = Region(1 << 20)  # a stand-in, to lay the tensors out
    region.name = bytes.fromhex(caller.stdout.readline())
    request, _ = good_request(site, rng, region)
    site.client.einsum(request)
    codes: list[StatusCode] = []

    def flood() -> None:
        for _ in range(400):
            try:
                site.client.einsum(request)
                codes.append(StatusCode.OK)
            except grpc.RpcError as error:
                codes.append(error.code())

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(codes) > 20)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    for thread in threads:
        thread.join()
    assert set(codes) == {StatusCode.OK, StatusCode.NOT_FOUND}
    wait_until(lambda: site.client.call("ServerInfo").shared_memory.regions == 0)
    region.close()
    site.check_serves(rng)


def test_writing_meanwhile_hurts_nobody_else(
    site: Site, rng: np.random.Generator, region: Region
) -> None:
    request, _ = good_request(site, rng, region, tokens=64)
    over = threading.Event()

    def scribble() -> None:
        noise = rng.bytes(region.used)
        while not over.is_set():
            region.memory[: len(noise)] = noise

    thread = threading.Thread(target=scribble)
    thread.start()
    for _ in range(20):
        site.client.einsum(request)
        site.check_serves(rng)
    over.set()
    thread.join()


def test_the_socket_is_ours_alone(tmp_path: Path) -> None:
    with start(tmp_path, unix_socket_mode="0600"):
        path = tmp_path / "shared.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "shared.sock.lock").exists()
        second = Daemon(
            tmp_path / "second", wait=False, shared_memory_listen=f"unix:{tmp_path}/shared.sock"
        )
        assert second.wait_exit() != 0
        assert "shared_memory_listen" in second.log
        assert "in use by another process" in second.log
    assert not path.exists()
