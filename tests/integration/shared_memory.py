"""The caller's side of shared memory, written from client/einsum_shared.h alone."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from typing import Any

MAGIC = 0x316D6873
OP_REGION, OP_FORGET = 1, 2
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
ALIGNMENT = 64

REQUEST = struct.Struct("<IIIIQQ256s")
REPLY = struct.Struct("<IIII16s64s256s")


def memory_file(size: int, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class Refused(Exception):
    def __init__(self, status: int, field: str, text: str):
        super().__init__(f"{status} {text}")
        self.status, self.field, self.text = status, field, text


class Region:
    """A registered memory file: bytes are put one behind the other, each at its alignment."""

    def __init__(self, size: int):
        self.fd = memory_file(size)
        self.size = size
        self.memory = mmap.mmap(self.fd, size)
        self.number = self.name = None
        self.used = 0

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)

    def room(self, size: int) -> int:
        offset = -(-self.used // ALIGNMENT) * ALIGNMENT
        self.used = offset + size
        assert self.used <= self.size
        return offset

    def put(self, data: bytes) -> int:
        offset = self.room(len(data))
        self.memory[offset : offset + len(data)] = data
        return offset

    def get(self, offset: int, size: int) -> bytes:
        return self.memory[offset : offset + size]


class Connection:
    """To the control socket. Whatever was registered is gone when it is closed."""

    def __init__(self, path: str):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30)
        self.socket.connect(path)
        self.regions: list[Region] = []

    def ask(self, op: int, fds: list[int] = (), region: int = 0, size: int = 0,
            text: bytes = b"") -> tuple[int, bytes]:  # fmt: skip
        """The reply's number and name."""
        request = REQUEST.pack(MAGIC, op, region, 0, size, 0, text)
        socket.send_fds(self.socket, [request], fds)
        reply = b""
        while len(reply) < REPLY.size:
            piece = self.socket.recv(REPLY.size - len(reply))
            if not piece:
                raise ConnectionError("the control socket was closed")
            reply += piece
        magic, replied_op, status, number, name, field, reason = REPLY.unpack(reply)
        assert (magic, replied_op) == (MAGIC, op)
        if status:
            raise Refused(status, field.rstrip(b"\0").decode(), reason.rstrip(b"\0").decode())
        return number, name

    def register(self, size: int = 1 << 20) -> Region:
        region = Region(size)
        try:
            region.number, region.name = self.ask(OP_REGION, [region.fd], size=size)
        except BaseException:
            region.close()
            raise
        self.regions.append(region)
        return region

    def close(self) -> None:
        self.socket.close()
        for region in self.regions:
            region.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


TENSORS = {"EinsumRequest": ("activations", "activation_scales"),
           "OutputProjectRequest": ("attention", "positions")}  # fmt: skip


def share(request: Any, region: Region, output_bytes: int) -> int:
    """Moves a request's tensors into the region; returns where its output will be."""
    first, second = TENSORS[request.DESCRIPTOR.name]
    shared = request.shared
    shared.region = region.name
    shared.activations_bytes = len(getattr(request, first))
    shared.activations_offset = region.put(getattr(request, first))
    shared.scales_bytes = len(getattr(request, second))
    shared.scales_offset = region.put(getattr(request, second))
    request.ClearField(first)
    request.ClearField(second)
    if output_bytes:
        shared.output_offset = region.room(output_bytes)
        shared.output_bytes = output_bytes
    return shared.output_offset
