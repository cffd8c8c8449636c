"""The caller's side of shared memory, written from client/einsum_shared.h alone."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

MAGIC = 0x316D6873
OP_REGION, OP_FORGET, OP_RING, OP_WEIGHT, OP_KERNEL, OP_CUDA = 1, 2, 3, 4, 5, 6
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

    def ask(self, op: int, fds: list[int] = (), region: int = 0, entries: int = 0, size: int = 0,
            offset: int = 0, text: bytes = b"") -> tuple[int, bytes]:  # fmt: skip
        """The reply's number and name; a descriptor that comes along is kept as received_fd."""
        request = REQUEST.pack(MAGIC, op, region, entries, size, offset, text)
        socket.send_fds(self.socket, [request], fds)
        reply = b""
        while len(reply) < REPLY.size:
            piece, received, _, _ = socket.recv_fds(self.socket, REPLY.size - len(reply), 1)
            if not piece:
                raise ConnectionError("the control socket was closed")
            reply += piece
            if received:
                (self.received_fd,) = received
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

    def ring(self, region: Region, entries: int = 64) -> Ring:
        offset = region.room(Ring.size_of(entries))
        self.ask(OP_RING, region=region.number, entries=entries, offset=offset)
        return Ring(self, region, offset, entries, self.received_fd)

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


SUBMISSION = struct.Struct("<Q12IQ6Q4x3I")
COMPLETION = struct.Struct("<Q2H7IQQ2I64s384s")
HEADER_BYTES = 512
WORDS = ("submit_tail", "submit_head", "complete_tail", "complete_head", "daemon_sleeps",
         "caller_sleeps", "closed")  # fmt: skip


@dataclass
class Completion:
    id: int
    status: int
    checksums: int
    retry_after_ms: int
    tokens: int
    groups: int
    output_dim: int
    batch_tokens: int
    batch_bucket: int
    batch_requests: int
    queue_ns: int
    run_ns: int
    parts: int
    output_crc32c: int
    field: bytes
    text: bytes

    def __post_init__(self) -> None:
        self.field, self.text = (
            each.split(b"\0")[0].decode() if self.status else "" for each in (self.field, self.text)
        )


class Ring:
    """A ring in a region. Its words are written whole: ctypes stores 32 bits at once."""

    def __init__(self, connection: Connection, region: Region, offset: int, entries: int, fd: int):
        self.connection, self.region, self.entries, self.doorbell = connection, region, entries, fd
        self.words = {
            name: ctypes.c_uint32.from_buffer(region.memory, offset + 64 * i)
            for i, name in enumerate(WORDS)
        }
        self.submissions = offset + HEADER_BYTES
        self.completions = self.submissions + entries * SUBMISSION.size
        self.submitted = self.read = 0
        self.numbers: dict[tuple[int, str], int] = {}

    @staticmethod
    def size_of(entries: int) -> int:
        return HEADER_BYTES + entries * (SUBMISSION.size + COMPLETION.size)

    def number(self, op: int, name: str) -> int:
        if (op, name) not in self.numbers:
            self.numbers[op, name], _ = self.connection.ask(op, text=name.encode())
        return self.numbers[op, name]

    def submit(
        self, request: Any, timeout_ns: int = 0, sums: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        """A message whose tensors share() has moved; its shared.region is not looked at. `sums`: bits
        of einsum_ring_sum, and the CRC-32C of both tensors."""
        shared = request.shared
        project = request.DESCRIPTOR.name == "OutputProjectRequest"
        layouts = (0, 0, 0, 0) if project else (
            request.recipe, request.activation_layout, request.scale_layout, request.scale_type,
        )  # fmt: skip
        entry = SUBMISSION.pack(
            request.request_id, int(project), self.number(OP_WEIGHT, request.weight),
            self.number(OP_KERNEL, request.kernel) if request.kernel else 0, *layouts,
            request.output_type, request.tokens, request.group_begin, request.group_end,
            self.region.number, timeout_ns, shared.activations_offset, shared.activations_bytes,
            shared.scales_offset, shared.scales_bytes, shared.output_offset, shared.output_bytes,
            *sums,
        )  # fmt: skip
        at = self.submissions + self.submitted % self.entries * SUBMISSION.size
        self.region.memory[at : at + SUBMISSION.size] = entry
        self.submitted += 1
        self.words["submit_tail"].value = self.submitted & 0xFFFFFFFF
        os.eventfd_write(self.doorbell, 1)  # always: Python has no fence to do without

    def next(self, timeout: float = 30) -> Completion:
        deadline = time.monotonic() + timeout
        while self.words["complete_tail"].value == self.read & 0xFFFFFFFF:
            assert time.monotonic() < deadline, "no completion"
            time.sleep(0)
        at = self.completions + self.read % self.entries * COMPLETION.size
        completion = Completion(*COMPLETION.unpack_from(self.region.memory, at))
        self.read += 1
        self.words["complete_head"].value = self.read & 0xFFFFFFFF
        return completion

    def project(
        self, request: Any, timeout_ns: int = 0, sums: tuple[int, int, int] = (0, 0, 0)
    ) -> Completion:
        self.submit(request, timeout_ns, sums)
        completion = self.next()
        assert completion.id == request.request_id
        return completion

    def close(self) -> None:
        """Lets go of the region's memory, so that it can be unmapped."""
        self.words.clear()
        os.close(self.doorbell)
