"""gRPC's advisories, each tried on the daemon: SECURITY.md says what comes of it."""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path
from typing import Callable, Iterator

import grpc
import pytest

from client import EINSUM, TIMEOUT_S
from daemon import REPOSITORY, Daemon, seconds, wait_until
from raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    RST_STREAM,
    RawConnection,
    frame,
    message,
)

CONTINUATION = 9
PLAIN, INDEXED = 0x10, 0x40  # never indexed; put into the table
FIRST_IN_TABLE = b"\xbe"  # the header that was put there last
PATH = f"/{EINSUM}/ServerInfo"


def integer(value: int) -> bytes:
    """A string's length, as HPACK writes it."""
    if value < 127:
        return bytes([value])
    value -= 127
    out = b"\x7f"
    while value >= 128:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def header(name: bytes, value: bytes, kind: int = PLAIN) -> bytes:
    return bytes([kind]) + integer(len(name)) + name + integer(len(value)) + value


def ordinary(**changed: str) -> bytes:
    headers = {
        ":method": "POST", ":scheme": "http", ":path": PATH, ":authority": "l", "te": "trailers",
        "content-type": "application/grpc", **changed,
    }  # fmt: skip
    return b"".join(header(name.encode(), value.encode()) for name, value in headers.items())


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    # The honest caller has the attacker's address.
    with Daemon(tmp_path_factory.mktemp("advisories"), engine="null", penalty_ms=0) as daemon:
        yield daemon


def serves(daemon: Daemon) -> bool:
    with grpc.insecure_channel(daemon.address) as channel:
        try:
            channel.unary_unary(PATH)(b"", timeout=TIMEOUT_S)
        except grpc.RpcError:
            return False
    return True


def answers(raw: RawConnection, for_s: float = 1) -> tuple[set[int], bool]:
    """Streams that got headers, and whether the daemon has hung up."""
    got, streams = b"", set()
    raw.socket.settimeout(seconds(for_s))
    closed = False
    with contextlib.suppress(TimeoutError, ConnectionError):
        while not closed:
            more = raw.socket.recv(65536)
            closed, got = more == b"", got + more
    while len(got) >= 9:
        (length,) = struct.unpack(">I", b"\0" + got[:3])
        if got[3] == HEADERS:
            streams.add(struct.unpack(">I", got[5:9])[0])
        got = got[9 + length :]
    return streams, closed


@contextlib.contextmanager
def connected(daemon: Daemon) -> Iterator[RawConnection]:
    with RawConnection(daemon.host_port, seconds(20)) as raw:
        raw.hello()
        yield raw
    assert daemon.process.poll() is None and serves(daemon)


@pytest.mark.parametrize(
    "name, value", [("te", "x"), (":scheme", "x"), ("grpclb_client_stats", "x")]
)
@pytest.mark.parametrize("frames", [1, 2])
def test_cve_2023_1428(daemon: Daemon, name: str, value: str, frames: int) -> None:
    """One of these, and headers past 8 KiB: an abort."""
    with connected(daemon) as raw:
        pads = [header(b"x-%d" % i, b"p" * (9000 // frames)) for i in range(frames)]
        if frames == 1:
            raw.send(frame(HEADERS, END_HEADERS, 1, ordinary(**{name: value}) + pads[0]))
        else:
            raw.send(
                frame(HEADERS, 0, 1, ordinary(**{name: value}) + pads[0]),
                frame(CONTINUATION, END_HEADERS, 1, pads[1]),
            )
        answers(raw)


def test_cve_2023_32731(daemon: Daemon) -> None:
    """Headers that are too many must not lose what they put into the table, or end the connection:
    gRPC takes their rest for another request's if they come to it in one piece."""
    with connected(daemon) as raw:
        too_many = ordinary() + header(b"x-pad", b"p" * 9000) + header(b"x-k", b"v", INDEXED)
        raw.send(
            frame(HEADERS, END_HEADERS, 1, too_many),
            frame(HEADERS, END_HEADERS, 3, ordinary() + FIRST_IN_TABLE),
            frame(DATA, END_STREAM, 3, message(b"")),
        )
        streams, closed = answers(raw)
        assert closed != (3 in streams)


def test_cve_2023_32732(daemon: Daemon) -> None:
    """Bad base64 ends its connection, which is one caller's if no proxy is between."""
    with connected(daemon) as other, connected(daemon) as raw:
        raw.send(frame(HEADERS, END_HEADERS, 1, ordinary() + header(b"x-bin", b"!!!")))
        assert answers(raw)[1]
        other.send(
            frame(HEADERS, END_HEADERS, 1, ordinary()),
            frame(DATA, END_STREAM, 1, message(b"")),
        )
        assert answers(other) == ({1}, False)


def test_cve_2024_7246(daemon: Daemon) -> None:
    """A header that is not well formed must not spoil those after it in the table."""
    with connected(daemon) as raw:
        bad = header(b"x-bin", b"!!!", INDEXED) + header(b"x-after", b"zzz", INDEXED)
        raw.send(
            frame(HEADERS, END_HEADERS, 1, ordinary() + bad),
            frame(HEADERS, END_HEADERS, 3, ordinary() + FIRST_IN_TABLE),
            frame(DATA, END_STREAM, 3, message(b"")),
        )
        assert answers(raw)[1]  # the table goes with the connection


def endless_string(raw: RawConnection) -> None:
    raw.send(frame(HEADERS, 0, 1, ordinary() + b"\x10\x05x-big\x7f\x80\x80\x80\x80\x02"))
    for _ in range(64):
        raw.send(frame(CONTINUATION, 0, 1, b"a" * 16384))


def endless_integer(raw: RawConnection) -> None:
    raw.send(frame(HEADERS, 0, 1, ordinary() + b"\x10\x05x-big\x7f"))
    for _ in range(64):
        raw.send(frame(CONTINUATION, 0, 1, b"\x80" * 16384))


def endless_headers(raw: RawConnection) -> None:
    raw.send(frame(HEADERS, 0, 1, ordinary()))
    block = b"".join(header(b"x-%06d" % i, b"v" * 100) for i in range(60))
    for _ in range(200):
        raw.send(frame(CONTINUATION, 0, 1, block))


@pytest.mark.parametrize("endless", [endless_string, endless_integer, endless_headers])
def test_cve_2023_33953(daemon: Daemon, endless: Callable[[RawConnection], None]) -> None:
    """gRPC 1.51 buffers what has no end. Who does it harms himself first: others are served while
    it lasts, and it is gone with his connection."""
    with connected(daemon) as raw:
        with contextlib.suppress(OSError):
            endless(raw)
        assert serves(daemon)
        answers(raw, 0.2)


def test_cve_2023_44487(daemon: Daemon) -> None:
    """Streams opened and reset at once, as fast as they go: others are served meanwhile."""
    stream, ends = 1, time.monotonic() + 2
    with connected(daemon) as raw:
        raw.socket.setblocking(True)
        while time.monotonic() < ends:
            pieces = []
            for _ in range(50):
                pieces.append(frame(HEADERS, END_HEADERS, stream, ordinary()))
                pieces.append(frame(RST_STREAM, 0, stream, struct.pack(">I", 8)))
                stream += 2
            try:
                raw.send(*pieces)
            except OSError:
                break
        assert serves(daemon)


def test_cve_2023_4785(tmp_path: Path) -> None:
    """More connections than descriptors: of gRPC's own accept, and this is ours."""
    with Daemon(
        tmp_path, engine="null", wrapper=["prlimit", "--nofile=80"], connections_max=60000
    ) as daemon:
        held = []
        for _ in range(200):
            with contextlib.suppress(OSError):
                held.append(RawConnection(daemon.host_port))
        wait_until(lambda: '"accept failed"' in daemon.log or '"connection refused"' in daemon.log)
        for each in held:
            each.socket.close()
        wait_until(lambda: serves(daemon))


def test_security_md_names_what_is_tried() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text()
    for name in [name for name in globals() if name.startswith("test_cve_")]:
        assert name.removeprefix("test_").upper().replace("_", "-") in text
