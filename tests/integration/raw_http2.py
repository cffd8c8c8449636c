"""HTTP/2 frames by hand, for clients that break off, lie or babble."""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def integer(value: int, first: int, most: int) -> bytes:
    """HPACK's integers: `first` has the byte's other bits, `most` fills those that are its own."""
    if value < most:
        return bytes([first | value])
    out = bytearray([first | most])
    value -= most
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def literal(name: bytes, value: bytes) -> bytes:
    """One header, never indexed, both strings as they are."""
    return (
        b"\x10" + integer(len(name), 0, 127) + name + integer(len(value), 0, 127) + value
    )


def header_block(path: str, **more: str) -> bytes:
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return b"".join(literal(name.encode(), value.encode()) for name, value in headers.items())


def call_headers(path: str, stream: int = 1, **more: str) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, header_block(path, **more))


def message(payload: bytes, claimed_bytes: int | None = None) -> bytes:
    """gRPC's length prefix and message."""
    length = len(payload) if claimed_bytes is None else claimed_bytes
    return struct.pack(">BI", 0, length) + payload


class RawConnection:
    """A TCP connection; `hello` does HTTP/2's side of the handshake."""

    def __init__(self, address: tuple[str, int], timeout: float = 20):
        self.socket = socket.create_connection(address, timeout)

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *pieces: bytes) -> None:
        self.socket.sendall(b"".join(pieces))

    def hello(self) -> None:
        """Acknowledges the daemon's settings before they have come, to have no need to read."""
        self.send(PREFACE, frame(SETTINGS, 0, 0), frame(SETTINGS, ACK, 0))

    def reset(self) -> None:
        """Closes with RST instead of FIN, as a crashed machine's kernel would."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def closed_by_peer(self) -> bool:
        """Reads until the daemon hangs up; False if it has not within the timeout."""
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True
