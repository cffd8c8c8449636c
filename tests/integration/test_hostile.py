"""Hostile clients beside honest ones: no honest call fails, the daemon lives, and what it took for them
it gives back. The kinds are in hostile.py; tests/bench/hostile.sh measures what they cost others."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc import StatusCode

import oracle
from client import Client, retry_delay_ms
from conftest import Site, serving, small_weights
from daemon import EINSUMCTL, SCALE, Daemon, environment, run, seconds, wait_until
from hostile import EINSUM, HELLO, KINDS, PIECE, STREAM
from raw_http2 import (
    DATA,
    END_STREAM,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    RawConnection,
    call_headers,
    frame,
    message,
)  # fmt: skip
from scrape import scrape

HONEST = 32
MIB = 1 << 20
LARGE_BYTES = 400 * MIB  # of which gRPC has some hundred milliseconds
# What a kind may leave behind: malloc keeps so much for the next messages.
KEPT_BYTES = 400 * MIB
PEAK_BYTES = 2500 * MIB
# gRPC 1.51 copies a header that does not end again and again (CVE-2023-33953), on the thread that serves
# all: until such a connection is cut off others wait, and on a slow machine for longer than they would.
STRANDING = ("endless-header",)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(
        tmp_path_factory.mktemp("attacked"), small_weights(1), 256, http_listen="127.0.0.1:0",
        rpc_threads=1, handshake_ms=2000,
    ) as site:  # fmt: skip
        yield site


def resident(daemon: Daemon) -> int:
    pages = Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def rejected(daemon: Daemon, reason: str) -> float:
    return scrape(daemon).value("einsumd_rejected_total", reason=reason)


def wrong_calls(daemon: Daemon) -> float:
    labels = {"method": EINSUM, "code": "INVALID_ARGUMENT"}
    return scrape(daemon).samples.get(("einsumd_grpc_calls_total", frozenset(labels.items())), 0)


def attack(address: str, kind: str, duration: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("hostile.py"), kind, address,
         "--seconds", str(duration)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def honest_calls(address: str, duration: float) -> dict | None:
    """32 callers, each on a connection of its own, one call at a time."""
    done = run(
        EINSUMCTL, "--endpoint", address, "--timeout", 60000, "--json", "bench", "--tokens", 1,
        "--concurrency", HONEST, "--connections", HONEST, "--duration", duration,
        "--warmup", 0.2, timeout=120,
    )  # fmt: skip
    return json.loads(done.stdout) if done.returncode == 0 else None


@pytest.mark.parametrize("kind", KINDS)
def test_honest_callers_beside(attacked: Site, rng: np.random.Generator, kind: str) -> None:
    check_beside(attacked, rng, kind)


@pytest.mark.parametrize("kind", ["rapid-reset", "endless-headers", "empty-frames"])
def test_beside_threads(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    """Each of the hostile connections keeps another thread busy. Of headers' small pieces malloc has
    most free again in the end, here and there on pages that are not."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", rpc_threads=4
    ) as site:
        check_beside(site, rng, kind, PEAK_BYTES)


def check_beside(
    attacked: Site, rng: np.random.Generator, kind: str, kept: int = KEPT_BYTES
) -> None:
    daemon = attacked.daemon
    memory, files = resident(daemon), descriptors(daemon)
    hostile = attack(daemon.address, kind, 4)
    time.sleep(0.5)
    honest = honest_calls(daemon.address, 2)
    peak = resident(daemon)
    said, _ = hostile.communicate(timeout=seconds(60))
    deeds = json.loads(said.removeprefix("RESULT "))
    assert deeds["sent"] > 0 or kind == "silence", "the hostile one did nothing"
    if kind not in STRANDING:
        assert honest and honest["errors"] == {} and honest["calls"] > 0
    assert daemon.process.poll() is None, daemon.log
    if SCALE == 1:  # sanitizers have their own ideas of memory
        assert peak < memory + PEAK_BYTES
        wait_until(lambda: resident(daemon) < memory + kept, 20, "memory is given back")
    wait_until(lambda: descriptors(daemon) <= files + 2, 20, "descriptors are given back")
    wait_until(lambda: serves(attacked, rng), 30, "it serves as before")
    attacked.check_serves(rng)
    with Client(daemon.address, attacked.client.schema) as client:
        attacked.check_serves(rng, client)


def serves(site: Site, rng: np.random.Generator) -> bool:
    try:
        site.check_serves(rng)
    except grpc.RpcError:
        return False
    return True


# --- each limit: what is said past it, and where it is counted --------------------------------------


def refused(call: grpc.Future) -> grpc.RpcError | None:
    return call.exception(seconds(60))


def test_requests_of_a_connection(tmp_path: Path, rng: np.random.Generator) -> None:
    """Unary calls, and requests on a stream: the one that is past the limit alone."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", rpc_threads=1,
        connection_in_flight_max=3, max_queue_delay_us=500_000,
    ) as site:  # fmt: skip
        request = site.good_request(rng)
        futures = [site.client.einsum_future(request) for _ in range(4)]
        with Client(site.daemon.address, site.client.schema) as other:
            assert other.einsum(request).tokens == 3  # its own connection has its own
        errors = [error for error in map(refused, futures) if error]
        assert len(errors) == 1
        assert errors[0].code() == StatusCode.RESOURCE_EXHAUSTED
        assert errors[0].details() == (
            "this connection has 3 requests in flight (connection_in_flight_max)"
        )
        assert retry_delay_ms(errors[0]) > 0
        replies = list(site.client.stream([request] * 4))
        said = [reply.error.message for reply in replies if reply.error.code]
        assert said == ["this connection has 3 requests in flight (connection_in_flight_max)"]
        assert [reply.error.retry_after_ms > 0 for reply in replies if reply.error.code] == [True]
        assert rejected(site.daemon, "connection_in_flight") == 2
        wait_until(lambda: scrape(site.daemon).value("einsumd_requests_in_flight") == 0)
        assert all(refused(site.client.einsum_future(request)) is None for _ in range(3))


def test_requests_in_all(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", rpc_threads=1,
        in_flight_max=2, max_queue_delay_us=500_000,
    ) as site:  # fmt: skip
        request = site.good_request(rng)
        with Client(site.daemon.address, site.client.schema) as other:
            futures = [client.einsum_future(request) for client in (site.client, other) * 2]
            errors = [error for error in map(refused, futures) if error]
        assert {error.code() for error in errors} == {StatusCode.RESOURCE_EXHAUSTED}
        assert len(errors) == 2
        assert errors[0].details() == "2 requests are in flight (in_flight_max)"
        assert rejected(site.daemon, "in_flight") == 2
        site.check_serves(rng)


@pytest.mark.parametrize(
    "limit, reason, says",
    [
        ({"queue_tokens_max": 10}, "queue_tokens", "at most 10 tokens wait (queue_tokens_max)"),
        (
            {"queue_bytes_max": 1, "batches": 1, "lanes": 1, "batch_requests_max": 1},
            "queue_bytes",
            "at most 1 bytes wait (queue_bytes_max)",
        ),
    ],
    ids=["tokens", "bytes"],
)
def test_queue_in_tokens_and_bytes(
    tmp_path: Path, rng: np.random.Generator, limit: dict, reason: str, says: str
) -> None:
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", rpc_threads=1,
        max_queue_delay_us=500_000 if reason == "queue_tokens" else 0, **limit,
    ) as site:  # fmt: skip
        request = site.good_request(rng, tokens=5 if reason == "queue_tokens" else 500)
        errors: list[grpc.RpcError] = []
        for _ in range(20):
            futures = [site.client.einsum_future(request) for _ in range(8)]
            errors += [error for error in map(refused, futures) if error]
            if errors:
                break
        assert errors and errors[0].code() == StatusCode.RESOURCE_EXHAUSTED
        assert says in errors[0].details()
        assert retry_delay_ms(errors[0]) > 0
        assert rejected(site.daemon, reason) == len(errors)
        site.check_serves(rng)


def test_message_size(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(tmp_path, small_weights(1), 256, message_bytes_max=20_000) as site:
        assert site.client.call("ServerInfo").limits.request_bytes_max == 20_000
        site.check_serves(rng)
        with pytest.raises(grpc.RpcError) as caught:
            site.client.einsum(site.good_request(rng, tokens=100))
        assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
        assert "20000" in caught.value.details()
        site.check_serves(rng)


def test_metadata_size(tmp_path: Path, rng: np.random.Generator) -> None:
    """Past the limit that call alone is refused, however large its metadata is."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", metadata_bytes_max=4096
    ) as site:
        request = site.good_request(rng)
        ours = 0  # gRPC looks at each frame, and what it counts depends on how they come
        for size in (2000, 5000, 15_000, 200_000):
            with Client(site.daemon.address, site.client.schema) as client:
                call = client.callable("einsum.v1.Einsum", "Einsum")
                metadata = [("x-large", "y" * size)]
                if size < 4096:
                    assert call(request, metadata=metadata).tokens == 3
                    continue
                with pytest.raises(grpc.RpcError) as caught:
                    call(request, metadata=metadata, timeout=seconds(20))
                assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED, caught.value
                said = caught.value.details()
                assert "(metadata_bytes_max)" in said or "metadata size exceeds limit" in said
                ours += "(metadata_bytes_max)" in said
        assert rejected(site.daemon, "metadata") == ours
        site.check_serves(rng)


def test_compressed_bomb(attacked: Site) -> None:
    """64 KB that would be 64 MB: refused without being inflated."""
    before = resident(attacked.daemon)
    bomb = gzip.compress(bytes(64 * MIB))
    payload = struct.pack(">BI", 1, len(bomb)) + bomb
    for _ in range(8):
        with RawConnection(attacked.daemon.host_port) as connection:
            connection.hello()
            connection.send(call_headers(EINSUM, grpc_encoding="gzip"))
            for i in range(0, len(payload), PIECE):
                end = END_STREAM if i + PIECE >= len(payload) else 0
                connection.send(frame(DATA, end, 1, payload[i : i + PIECE]))
            said = b""
            while b"grpc-status" not in said:
                said += connection.socket.recv(1 << 16)
    assert resident(attacked.daemon) < before + 16 * MIB


def test_a_few_calls_of_a_connection_are_sure(tmp_path: Path, rng: np.random.Generator) -> None:
    """However many calls others hold open."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", calls_max=100, rpc_threads=1
    ) as site:
        hogs = [RawConnection(site.daemon.host_port) for _ in range(4)]
        for hog in hogs:
            hog.hello()
            hog.send(*(call_headers(STREAM, 2 * i + 1) for i in range(200)))
        wait_until(lambda: rejected(site.daemon, "connection_calls") > 100)
        for _ in range(20):
            site.check_serves(rng)
            futures = [site.client.einsum_future(site.good_request(rng)) for _ in range(4)]
            assert not any(map(refused, futures))
        for hog in hogs:
            hog.socket.close()


def ended_by_daemon(connection: RawConnection, timeout: float = 10) -> bool:
    connection.socket.settimeout(seconds(timeout))
    return connection.closed_by_peer()


def test_resets_end_a_connection(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", connection_faults_max=50,
        penalty_ms=0,
    ) as site:  # fmt: skip
        cancel = struct.pack(">I", 8)
        with RawConnection(site.daemon.host_port) as connection:
            connection.hello()
            with contextlib.suppress(ConnectionError):  # it may be over before the last
                for i in range(60):
                    stream = 2 * i + 1
                    connection.send(
                        call_headers(EINSUM, stream), frame(DATA, END_STREAM, stream, message(b"")),
                        frame(RST_STREAM, 0, stream, cancel),
                    )  # fmt: skip
            assert ended_by_daemon(connection)
        wait_until(lambda: rejected(site.daemon, "connection_faults") == 1)
        event = site.daemon.wait_event("connection cut off")
        assert event["limit"] == "connection_faults_max"
        site.check_serves(rng)


def connect_from(source: str, site: Site) -> RawConnection:
    made = RawConnection.__new__(RawConnection)
    made.socket = socket.create_connection(site.daemon.host_port, 10, (source, 0))
    return made


def call_wrongly(connection: RawConnection, times: int) -> None:
    connection.hello()
    for i in range(times):
        stream = 2 * i + 1
        connection.send(call_headers(EINSUM, stream), frame(DATA, END_STREAM, stream, message(b"")))


def read_until(connection: RawConnection, text: bytes, times: int) -> None:
    connection.socket.settimeout(seconds(10))
    said = b""
    while said.count(text) < times:
        piece = connection.socket.recv(65536)
        assert piece, "ended by the daemon"
        said += piece


def test_wrong_calls_end_a_connection(tmp_path: Path, rng: np.random.Generator) -> None:
    """One past connection_faults_max, and not before."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", connection_faults_max=50,
        penalty_ms=0,
    ) as site:  # fmt: skip
        with RawConnection(site.daemon.host_port) as connection:
            call_wrongly(connection, 50)
            wait_until(lambda: wrong_calls(site.daemon) == 50)
        with RawConnection(site.daemon.host_port) as connection:
            with contextlib.suppress(ConnectionError):  # it may be over before the last
                call_wrongly(connection, 60)
            assert ended_by_daemon(connection)
        wait_until(lambda: rejected(site.daemon, "connection_faults") == 1)
        site.check_serves(rng)


def test_wrong_calls_of_an_address(tmp_path: Path, rng: np.random.Generator) -> None:
    """One connection after the other, none of which has too many."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", connection_faults_max=1000,
        penalty_ms=60000,
    ) as site:  # fmt: skip
        connections = 0
        while rejected(site.daemon, "penalty") == 0:
            connections += 1
            assert connections < 200
            with contextlib.suppress(ConnectionError), connect_from("127.0.0.78", site) as one:
                call_wrongly(one, 200)
        assert rejected(site.daemon, "connection_faults") >= 1
        assert connections > 20
        with Client(site.daemon.address, site.client.schema) as other:
            site.check_serves(rng, other)


def test_connections_for_nothing_of_an_address(tmp_path: Path, rng: np.random.Generator) -> None:
    """Each is greeted, and over before it has asked for anything."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", connection_faults_max=20,
        penalty_ms=60000,
    ) as site:  # fmt: skip
        connections = 0
        while rejected(site.daemon, "penalty") == 0:
            for _ in range(20):
                connections += 1
                with contextlib.suppress(ConnectionError), connect_from("127.0.0.79", site) as one:
                    one.hello()
            assert connections < 10000
        assert connections > 4 * 20
        with Client(site.daemon.address, site.client.schema) as other:
            site.check_serves(rng, other)


def test_bytes_without_messages_end_a_connection(tmp_path: Path, rng: np.random.Generator) -> None:
    """Whatever they are: here a call whose message never ends, within its flow control."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", connection_bytes_max=1 * MIB,
        penalty_ms=0,
    ) as site:  # fmt: skip
        with RawConnection(site.daemon.host_port) as connection:
            connection.hello()
            try:
                for _ in range(4 * MIB // (9 * 1000)):
                    connection.send(frame(SETTINGS, 0, 0) * 1000)
                    time.sleep(0.0005)
            except ConnectionError:
                pass
            assert ended_by_daemon(connection)
        wait_until(lambda: rejected(site.daemon, "connection_bytes") == 1)
        # Honest bytes are messages: any number of them.
        for _ in range(60):
            site.client.einsum(site.good_request(rng, tokens=100))


def be_cut_off(source: str, site: Site) -> None:
    with connect_from(source, site) as hostile, contextlib.suppress(ConnectionError):
        hostile.hello()
        while True:
            hostile.send(frame(SETTINGS, 0, 0) * 1000)


def let_in(source: str, site: Site) -> RawConnection:
    """Once its address is not kept out; it has had an answer."""
    deadline = time.monotonic() + seconds(20)
    while True:
        with contextlib.suppress(ConnectionError, AssertionError):
            again = connect_from(source, site)
            call_wrongly(again, 1)
            read_until(again, b"grpc-status", 1)
            return again
        assert time.monotonic() < deadline, "still kept out"
        time.sleep(0.05)


def test_penalty(tmp_path: Path, rng: np.random.Generator) -> None:
    """The address of who was cut off is kept out for a while, twice as long the next time; another is
    not."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", connection_bytes_max=65536,
        penalty_ms=1000,
    ) as site:  # fmt: skip

        def kept_out() -> float:
            """For how many seconds, from when it is cut off."""
            be_cut_off("127.0.0.77", site)
            begin, before = time.monotonic(), rejected(site.daemon, "penalty")
            let_in("127.0.0.77", site).socket.close()
            assert rejected(site.daemon, "penalty") > before
            return time.monotonic() - begin

        with Client(site.daemon.address, site.client.schema) as other:
            assert 0.9 < kept_out()
            site.check_serves(rng, other)
            assert 1.9 < kept_out()
            site.check_serves(rng, other)


def receive_buffer(site: Site, connection: RawConnection) -> int:
    """Of the daemon's end, in bytes of the kernel's memory."""
    ends = (connection.socket.getpeername(), connection.socket.getsockname())
    source, to = (f"{host}:{port}" for host, port in ends)
    said = run("ss", "-tmnH", "src", source, "dst", to).stdout
    found = re.search(r"skmem:\(.*\brb(\d+)", said)
    assert found, f"no such connection: {said}"
    return int(found[1])


@pytest.mark.skipif(not shutil.which("ss"), reason="no ss (Debian: iproute2)")
def test_receive_buffer_of_a_suspect(tmp_path: Path) -> None:
    """64 KiB, which the kernel counts twice; another's is larger from when it was greeted, but
    no 32 MiB, as SO_RCVLOWAT may make it. gRPC parses all that it has read before it sees that a
    connection has been cut off."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", connection_bytes_max=65536,
        penalty_ms=1000,
    ) as site:  # fmt: skip
        be_cut_off("127.0.0.80", site)
        with let_in("127.0.0.80", site) as suspect, let_in("127.0.0.81", site) as other:
            assert receive_buffer(site, suspect) == 2 * 65536
            assert 2 * 65536 < receive_buffer(site, other) <= 1 << 20


def test_who_owes_little_beside_large_messages(tmp_path: Path) -> None:
    """The labour for `listen`'s messages is not blamed on who owes something on `health_listen`."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", health_listen=["127.0.0.1:0"],
        message_bytes_max=LARGE_BYTES + MIB, connection_bytes_max=LARGE_BYTES + MIB,
        transport_bytes_max=4 * LARGE_BYTES,
    ) as site:  # fmt: skip
        host, port = site.daemon.wait_event("ready")["health_listen"].rsplit(":", 1)
        with RawConnection((host, int(port))) as owing:
            owing.hello()
            owing.send(call_headers("/grpc.health.v1.Health/Check"),
                       frame(DATA, 0, 1, message(b"", claimed_bytes=4 * MIB)),
                       frame(DATA, 0, 1, bytes(PIECE)) * (2 * MIB // PIECE))  # fmt: skip
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as caught:
                    site.client.raw(EINSUM, bytes(LARGE_BYTES))
                assert caught.value.code() == StatusCode.INVALID_ARGUMENT, site.daemon.log
            assert rejected(site.daemon, "connection_stuck") == 0
            owing.send(frame(DATA, 0, 1, bytes(PIECE)) * (2 * MIB // PIECE),
                       frame(DATA, END_STREAM, 1))  # fmt: skip
            read_until(owing, b"grpc-status", 1)


@pytest.mark.parametrize("says", [PREFACE[:10], PREFACE], ids=["half a preface", "preface"])
def test_gone_before_it_was_greeted(attacked: Site, says: bytes) -> None:
    """Its socket does not wait for handshake_ms."""
    files = descriptors(attacked.daemon)
    for _ in range(20):
        with RawConnection(attacked.daemon.host_port) as connection:
            connection.send(says)
    wait_until(lambda: descriptors(attacked.daemon) <= files, 1.5, "sockets are closed")


@pytest.mark.parametrize(
    "says",
    [b"", PREFACE[:10], PREFACE, PREFACE + frame(SETTINGS, 0, 0)],
    ids=["nothing", "half a preface", "preface", "no acknowledgement"],
)
def test_handshake_timeout(tmp_path: Path, rng: np.random.Generator, says: bytes) -> None:
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", handshake_ms=300
    ) as site:
        with RawConnection(site.daemon.host_port) as connection:
            connection.send(says)
            begin = time.monotonic()
            assert ended_by_daemon(connection)
            assert time.monotonic() - begin > 0.2
        wait_until(lambda: rejected(site.daemon, "handshake") == 1)
        wait_until(lambda: site.client.counters().connections == 1)
        site.check_serves(rng)


def test_http1_is_told(attacked: Site) -> None:
    with RawConnection(attacked.daemon.host_port) as connection:
        connection.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        said = b""
        while piece := connection.socket.recv(65536):
            said += piece
    assert said.startswith(b"HTTP/1.1 400 ") and b"gRPC" in said
    assert rejected(attacked.daemon, "not_http2") >= 1


def test_dead_peers_are_found(tmp_path: Path, rng: np.random.Generator) -> None:
    """A connection that speaks HTTP/2 and then answers no ping is closed, one that answers stays."""
    with serving(
        tmp_path, small_weights(1), 256, keepalive_ms=300, keepalive_timeout_ms=300
    ) as site:
        with RawConnection(site.daemon.host_port) as connection:
            connection.hello()
            wait_until(lambda: site.client.counters().connections == 2)
            assert ended_by_daemon(connection)
        wait_until(lambda: site.client.counters().connections == 1)
        time.sleep(1)
        assert site.client.counters().connections == 1
        site.check_serves(rng)


def test_connection_age(tmp_path: Path, rng: np.random.Generator) -> None:
    """Old connections are replaced between calls: none fails."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", connection_age_ms=300
    ) as site:
        request, expected = site.good_case(rng)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            oracle.check(site.client.einsum(request).output, "BF16", *expected)
        accepted = scrape(site.daemon).value("einsumd_connections_accepted_total")
        assert accepted >= 4


def test_idle_connections(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", connection_idle_ms=300
    ) as site:
        site.check_serves(rng)
        wait_until(lambda: scrape(site.daemon).value("einsumd_connections") == 0)
        site.check_serves(rng)  # it connects again


# --- file descriptors -----------------------------------------------------------------------------


def test_no_descriptors_left(tmp_path: Path, rng: np.random.Generator) -> None:
    """New connections wait or are refused, those that are there are served, the log says it once, and
    nothing spins."""
    limit = 64
    with serving(
        tmp_path, small_weights(1), 256,
        shared_memory_listen=f"unix:{tmp_path}/shared.sock",
        wrapper=["prlimit", f"--nofile={limit}:{limit}"],
    ) as site:  # fmt: skip
        sockets = [socket.create_connection(site.daemon.host_port) for _ in range(limit)]
        for one in sockets:
            one.setblocking(False)
            one.send(HELLO)
        time.sleep(0.5)
        for _ in range(20):
            site.check_serves(rng)
        before = cpu_seconds(site.daemon)
        time.sleep(1)
        assert cpu_seconds(site.daemon) - before < 0.3, "it spins"
        lines = [
            event for event in site.daemon.events
            if event["msg"] in ("accept failed", "connection refused")
        ]  # fmt: skip
        assert 1 <= len(lines) <= 16, lines
        for one in sockets:
            one.close()
        wait_until(lambda: site.client.counters().connections == 1)
        with Client(site.daemon.address, site.client.schema) as client:
            site.check_serves(rng, client)


def cpu_seconds(daemon: Daemon) -> float:
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_no_descriptors_for_shared_memory(tmp_path: Path, rng: np.random.Generator) -> None:
    """A caller that would share memory is told, or goes the other way; nobody else notices."""
    limit = 40
    with serving(
        tmp_path, small_weights(1), 256,
        shared_memory_listen=f"unix:{tmp_path}/shared.sock",
        wrapper=["prlimit", f"--nofile={limit}:{limit}"],
    ) as site:  # fmt: skip
        idle = [socket.create_connection(site.daemon.host_port) for _ in range(limit)]
        time.sleep(0.5)
        done = subprocess.run(
            [EINSUMCTL, "--endpoint", f"unix:{tmp_path}/shared.sock", "--timeout", "3000",
             "bench", "--transport", "ring", "--requests", "1"],
            capture_output=True, text=True, timeout=seconds(60), env=environment(),
        )  # fmt: skip
        assert done.returncode != 0
        site.check_serves(rng)
        for one in idle:
            one.close()
        wait_until(lambda: site.client.counters().connections == 1)
        site.check_serves(rng)
