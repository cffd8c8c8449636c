"""Clients, handles of weights, and the call itself: checked, placed, sent to one or all daemons."""

from __future__ import annotations

import itertools
import re
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from einsumd import _layout
from einsumd._daemon import (
    TRANSPORTS,
    Daemon,
    Health,
    Info,
    Progress,
    SelfTest,
    Weight,
    milliseconds,
)
from einsumd._errors import (
    Error,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
    from_native,
)
from einsumd._layout import RECIPES
from einsumd._native import ffi, lib
from einsumd._placement import Placement, Share, place_weight
from einsumd._tensors import LONGS, Tensor, wait_for_device, wrap

EQUATION = "bhr,hdr->bhd"
PRIORITIES = {
    "low": lib.EINSUM_CLIENT_PRIORITY_LOW,
    "normal": lib.EINSUM_CLIENT_PRIORITY_NORMAL,
    "high": lib.EINSUM_CLIENT_PRIORITY_HIGH,
}
Priority = Literal["low", "normal", "high"]

_numbers = itertools.count(1)
_clients: weakref.WeakValueDictionary[int, Client] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Response:
    """How a call went. Of several daemons: as the slowest of them says."""

    tokens: int
    batch_tokens: int
    """Of all requests that travelled in the same batch."""
    batch_bucket: int
    """What the batch was padded to."""
    batch_requests: int
    queue_seconds: float
    run_seconds: float
    latency_seconds: float
    """Seen from here, attempts and pauses included."""
    attempts: int


class Handle:
    """A resident weight of a client's, or a slice of its groups: handle[2:4].

    `key` names it where only text can go, as through torch.compile: "NAME", "NAME[2:4]", and with
    "@N" behind it for the client of that number.
    """

    __slots__ = ("begin", "client", "end", "name")

    def __init__(self, client: Client, name: str, begin: int = 0, end: int | None = None):
        self.client, self.name, self.begin, self.end = client, name, begin, end

    def __getitem__(self, groups: slice) -> Handle:
        if not isinstance(groups, slice) or groups.step not in (None, 1):
            raise InvalidArgument(f"{self!r}: expected a slice of groups, got {groups!r}")
        begin, end = self.range()
        first, last, _ = groups.indices(end - begin)
        if first >= last:
            raise InvalidArgument(f"{self!r}: no group in [{groups.start}:{groups.stop}]")
        return Handle(self.client, self.name, begin + first, begin + last)

    def range(self) -> tuple[int, int]:
        """The groups, among all of the weight's."""
        groups = self.weight.groups
        end = groups if self.end is None else self.end
        if not 0 <= self.begin < end <= groups:
            raise InvalidArgument(
                f"{self.name}[{self.begin}:{end}]: the weight has {groups} groups", field="b"
            )
        return self.begin, end

    @property
    def weight(self) -> Weight:
        return self.client._placement(self.name).weight

    @property
    def groups(self) -> int:
        begin, end = self.range()
        return end - begin

    @property
    def key(self) -> str:
        cut = "" if self.begin == 0 and self.end is None else "[{}:{}]".format(*self.range())
        return f"{self.name}{cut}@{self.client.number}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[int, str, int, int | None]:
        return self.client.number, self.name, self.begin, self.end

    def __repr__(self) -> str:
        cut = "" if self.begin == 0 and self.end is None else f"[{self.begin}:{self.end}]"
        return f"<einsumd.Handle {self.name}{cut} of {', '.join(self.client.endpoints)}>"


class _Part:
    """What goes to one daemon, and where its answer is to go."""

    __slots__ = ("kept", "out", "result", "share", "staged")

    def __init__(self, share: Share):
        self.share = share
        self.kept: list[Any] = []
        self.staged: list[Tensor] = []
        self.out: Tensor | None = None
        self.result: Tensor | None = None

    def place(self, placed: _layout.Placed, fill: bool = True) -> tuple[Any, int]:
        """Address and bytes of what the library reads or writes."""
        tensor = placed.tensor
        staged = tensor.staged(placed.elements, fill)
        if staged is not None:
            self.staged.append(tensor)
            tensor = staged
        if not fill:
            self.result = tensor
        self.kept.append(tensor)
        return ffi.cast("void *", tensor.address()), placed.elements * tensor.item_bytes

    def deliver(self) -> None:
        """Hands on an output that did not go straight to where it is wanted."""
        if self.out is not None and self.result is not self.out and self.result is not None:
            self.out.assign(self.result)


class Client:
    """A client of one daemon, or of several that answer as one. A context manager; of any thread.

    `endpoint` is "HOST:PORT", "[V6]:PORT" or "unix:/PATH", or several with shard="groups". Times
    are in seconds.

    timeout             of calls that set none
    load_timeout        of load() and self_test(); None: none
    shared_memory       "auto" takes what the daemon offers (making the client then asks it),
                        "unix:/PATH" that control socket, None nothing. empty() makes tensors there
    shared_memory_bytes that the client shares with each daemon
    transport           with it: "auto", "shm", "ring", or "tcp" and "unix" to do without
    spin                how long to look for an answer on the ring before sleeping
    tls_ca              PEM file of who signs the daemon's certificate, or "default" for gRPC's own
                        roots; None: no TLS
    tls_certificate, tls_key  PEM files of this caller's own, where the daemon asks for them
    tls_server_name     in its certificate; None: the endpoint's host
    token, token_file   sent with each call, at most one of them; the file is read when it changes
    connections         that calls go round
    checksums           whether tensors go with their CRC-32C, which the server checks, and outputs
                        come with theirs: a difference is DataLoss. Not of tensors in CUDA memory
    attempts            of one call that is answered RESOURCE_EXHAUSTED or UNAVAILABLE
    retry_for           seconds for which it is tried again, in place of attempts: for a daemon that
                        restarts
    allow_copies        whether tensors in layouts that the wire has not may be copied, as
                        einsumd.copies counts; else they are refused
    """

    def __init__(
        self,
        endpoint: str | Sequence[str],
        *,
        shard: Literal["groups"] | None = None,
        timeout: float = 30,
        load_timeout: float | None = None,
        shared_memory: str | None = "auto",
        shared_memory_bytes: int = 64 << 20,
        transport: str = "auto",
        spin: float = 50e-6,
        tls_ca: str | None = None,
        tls_certificate: str | None = None,
        tls_key: str | None = None,
        tls_server_name: str | None = None,
        token: str | None = None,
        token_file: str | None = None,
        connections: int = 1,
        checksums: bool = False,
        attempts: int = 4,
        retry_pause: float = 0.02,
        retry_pause_max: float = 2,
        retry_for: float | None = None,
        allow_copies: bool = True,
        user_agent: str = "einsumd-python",
    ):
        endpoints = (endpoint,) if isinstance(endpoint, str) else tuple(endpoint)
        if not endpoints or (len(endpoints) > 1) != (shard == "groups"):
            raise InvalidArgument(
                'shard: expected "groups" with several endpoints and None with one, got '
                f"{shard!r} with {len(endpoints)}",
                field="shard",
            )
        if transport not in TRANSPORTS:
            raise one_of("transport", transport, TRANSPORTS)
        self.endpoints = endpoints
        self.allow_copies = allow_copies
        self.number = next(_numbers)
        self._placements: dict[str, Placement] = {}
        self._names: dict[str, Any] = {}
        options = {
            "deadline_ms": milliseconds(timeout, "timeout"),
            "load_deadline_ms": load_timeout and milliseconds(load_timeout, "load_timeout"),
            "shared_memory": shared_memory,
            "shared_memory_bytes": shared_memory_bytes,
            "transport": TRANSPORTS[transport],
            "spin_us": round(spin * 1e6),
            "tls_ca": tls_ca,
            "tls_certificate": tls_certificate,
            "tls_key": tls_key,
            "tls_server_name": tls_server_name,
            "token": token,
            "token_file": token_file,
            "connections": connections,
            "checksums": checksums,
            "attempts_max": attempts,
            "retry_pause_ms": milliseconds(retry_pause, "retry_pause"),
            "retry_pause_ms_max": milliseconds(retry_pause_max, "retry_pause_max"),
            "retry_ms": milliseconds(retry_for, "retry_for") if retry_for else 0,
            "user_agent": user_agent,
        }
        daemons: list[Daemon] = []
        try:
            for each in endpoints:
                daemons.append(Daemon(each, options))
        except BaseException:
            for made in daemons:
                made.close()
            raise
        self.daemons = tuple(daemons)
        """One for each endpoint, for control calls to it alone."""
        _clients[self.number] = self

    # ---- life

    def close(self) -> None:
        """Refuses further calls. Those under way end as ever; memory goes with its last tensor."""
        for daemon in self.daemons:
            daemon.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<einsumd.Client {self.number}: {', '.join(map(repr, self.daemons))}>"

    # ---- weights and control

    def weight(self, name: str) -> Handle:
        """A handle of a resident weight; NotFound if there is none of that name."""
        self._placement(name)
        return Handle(self, name)

    def weights(self) -> list[Handle]:
        """Of all weights that every daemon has, in order of name."""
        lists = [{w.name for w in daemon.weights()} for daemon in self.daemons]
        return [Handle(self, name) for name in sorted(set.intersection(*lists))]

    def load(
        self,
        path: str,
        tensors: Sequence[str] = (),
        *,
        name_prefix: str = "",
        output_dim: int = 0,
        replace: bool = False,
        on_progress: Callable[[Progress], bool | None] | None = None,
    ) -> list[Handle]:
        """Loads a checkpoint's weights, see Daemon.load; of several daemons each loads its share of
        the groups, one after another."""
        names: list[str] = []
        for rank, daemon in enumerate(self.daemons):
            weights = daemon.load(
                path, tensors, name_prefix=name_prefix, output_dim=output_dim, replace=replace,
                tensor_parallel_rank=rank, tensor_parallel_size=len(self.daemons),
                on_progress=on_progress,
            )  # fmt: skip
            names = [weight.name for weight in weights]
        for name in names:
            self._placements.pop(name, None)
        return [Handle(self, name) for name in names]

    def unload(self, *names: str) -> list[str]:
        """Forgets weights everywhere, by names or shell patterns; returns the names that went."""
        gone: set[str] = set()
        for daemon in self.daemons:
            gone.update(daemon.unload(*names))
        self._placements.clear()
        return sorted(gone)

    def info(self) -> Info:
        return self._only().info()

    def health(self, service: str = "") -> Health:
        return self._only().health(service)

    def self_test(self, weight: str | None = None, kernel: str | None = None) -> list[SelfTest]:
        return self._only().self_test(weight, kernel)

    @property
    def transport(self) -> str:
        return self._only().transport

    def _only(self) -> Daemon:
        if len(self.daemons) > 1:
            raise FailedPrecondition("of several daemons ask each: client.daemons")
        return self.daemons[0]

    def _placement(self, name: str) -> Placement:
        placement = self._placements.get(name)
        if placement is None:
            found = [(daemon, daemon.weight(name)) for daemon in self.daemons]
            placement = self._placements[name] = place_weight(found)
        return placement

    # ---- memory

    def empty(self, shape: int | Sequence[int], dtype: Any = np.uint8) -> Any:
        """A tensor that the daemon reads and writes where it lies, if memory is shared with it; an
        ordinary one else. A numpy array, or a torch tensor if `dtype` is torch's."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        torch: Any = sys.modules.get("torch")
        of_torch = torch is not None and isinstance(dtype, torch.dtype)
        item = dtype.itemsize if of_torch else np.dtype(dtype).itemsize
        size = int(np.prod(shape, dtype=np.int64)) * item
        buffer = self.daemons[0].allocate(size) if len(self.daemons) == 1 else None
        if buffer is None:
            return torch.empty(shape, dtype=dtype) if of_torch else np.empty(shape, dtype)
        if of_torch and size:
            return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape)
        if of_torch:
            return torch.empty(shape, dtype=dtype)
        return np.frombuffer(buffer, np.uint8).view(dtype).reshape(shape)

    # ---- calls

    def einsum(
        self,
        weight: Handle | str,
        activations: Any,
        scales: Any,
        out: Any,
        *,
        recipe: Sequence[int] = (1, 128, 128),
        equation: str = EQUATION,
        timeout: float | None = None,
        priority: Priority = "normal",
        kernel: str | None = None,
        allow_copies: bool | None = None,
    ) -> Response:
        """out[t,g,d] = sum over r of A[t,g,r] * sA(t,g,r) * B[g,d,r] * sB(g,d,r).

        `activations` E4M3 [T, G, R] or [T, G * R], `scales` [T, G, K] or [T, G * K] in FP32, UE8M0,
        or UE8M0 packed four to an int32 [T, G, K / 4]; `out` BF16 or FP32 [T, G, D] or [T, G * D].
        Integers of 8 and 16 bits are taken as the bits of what is expected. Layouts are read from
        the strides; see _layout.py. After an error, what `out` holds is not defined.
        """
        handle = self._own(weight)
        if tuple(recipe) not in RECIPES:
            raise Unimplemented(
                f"recipe: expected one of {', '.join(map(str, RECIPES))}, got {tuple(recipe)}",
                field="recipe",
            )
        if equation != EQUATION:
            raise Unimplemented(
                f'equation: expected "{EQUATION}", got "{equation}"', field="equation"
            )
        info, groups = handle.weight, handle.groups
        a, s, o = wrap(activations, "a"), wrap(scales, "a_scale"), wrap(out, "out")
        tokens = a.shape[0] if a.shape else 0
        blocks = info.reduced_dim // recipe[2]
        copies = self.allow_copies if allow_copies is None else allow_copies

        def fill(request: Any, part: _Part, a: Tensor, s: Tensor, groups: int) -> None:
            placed = _layout.activations(a, groups, info.reduced_dim, copies)
            request.activations, request.activations_bytes = part.place(placed)
            request.activation_layout = placed.layout
            placed = _layout.scales(s, tokens, groups, blocks, copies)
            request.scales, request.scales_bytes = part.place(placed)
            request.scale_layout, request.scale_type = placed.layout, placed.kind
            request.recipe = RECIPES[tuple(recipe)]

        # Of the whole, before it is cut.
        _layout.check_shape(a, tokens, groups, info.reduced_dim, "[T, G, R]")
        rows = blocks // 4 if s.kind == "WORDS" and blocks % 4 == 0 else blocks
        _layout.check_shape(s, tokens, groups, rows, "[T, G, K]")
        return self._project(handle, tokens, a, s, o, fill, timeout, priority, kernel, copies)

    def output_project(
        self,
        weight: Handle | str,
        attention: Any,
        positions: Any,
        out: Any,
        *,
        timeout: float | None = None,
        priority: Priority = "normal",
        kernel: str | None = None,
        allow_copies: bool | None = None,
    ) -> Response:
        """The same from attention's output on: `attention` BF16 [T, heads, 512] before the inverse
        rotation, `positions` int64 [T]. The weight has a rope (Weight.has_rope)."""
        handle = self._own(weight)
        info, groups = handle.weight, handle.groups
        a, p, o = wrap(attention, "attention"), wrap(positions, "positions"), wrap(out, "out")
        tokens = a.shape[0] if a.shape else 0
        copies = self.allow_copies if allow_copies is None else allow_copies
        _layout.check_kind(p, (LONGS,))
        if p.shape != (tokens,):
            raise InvalidArgument(
                f"positions: expected [{tokens}], got {list(p.shape)}", field="positions"
            )
        if not _layout.lies(p, (1,)):
            p = _layout.copy(p, copies, "[T]")

        def fill(request: Any, part: _Part, a: Tensor, _: Tensor, groups: int) -> None:
            request.operation = lib.EINSUM_CLIENT_OUTPUT_PROJECT
            values = groups * info.reduced_dim
            placed = _layout.attention(a, tokens, values, copies)
            request.attention, request.attention_bytes = part.place(placed)
            address, request.positions_bytes = part.place(_layout.Placed(p, 0, tokens))
            request.positions = ffi.cast("int64_t *", address)

        _layout.check_shape(a, tokens, groups * info.reduced_dim // 512, 512, "[T, heads, 512]")
        return self._project(handle, tokens, a, None, o, fill, timeout, priority, kernel, copies)

    def _own(self, weight: Handle | str) -> Handle:
        if isinstance(weight, str):
            return parse_key(weight, self)
        if isinstance(weight, Handle) and weight.client is self:
            return weight
        raise InvalidArgument(
            f"b: expected a handle of this client's or a weight's name, got {weight!r}", field="b"
        )

    def _project(
        self,
        handle: Handle,
        tokens: int,
        a: Tensor,
        s: Tensor | None,
        out: Tensor,
        fill: Callable[[Any, _Part, Tensor, Any, int], None],
        timeout: float | None,
        priority: Priority,
        kernel: str | None,
        copies: bool,
    ) -> Response:
        placement = self._placement(handle.name)
        begin, end = handle.range()
        outputs = placement.weight.output_dim
        _layout.check_shape(out, tokens, end - begin, outputs, "[T, G, D]")
        if priority not in PRIORITIES:
            raise one_of("priority", priority, PRIORITIES)
        shares = placement.of(begin, end)
        parts = [_Part(share) for share in shares]
        requests = ffi.new("struct einsum_client_request[]", len(parts))
        for request, part in zip(requests, parts):
            share = part.share
            cut = (end - begin, share.begin - begin, share.end - begin)
            alone = len(parts) == 1
            fill(request, part, a if alone else a.grouped(*cut),
                 s if alone or s is None else s.grouped(*cut), share.end - share.begin)  # fmt: skip
            part.out = out if alone else out.grouped(*cut)
            placed = _layout.output(part.out, tokens, share.end - share.begin, outputs, copies)
            request.output, request.output_bytes = part.place(placed, fill=False)
            request.output_type = placed.kind
            request.weight, request.tokens = self._c_name(handle.name), tokens
            request.group_begin, request.group_end = (
                share.begin - share.base, share.end - share.base)  # fmt: skip
            request.priority = PRIORITIES[priority]
            if kernel is not None:
                request.kernel = self._c_name(kernel)
            if timeout is not None:
                request.deadline_ms = milliseconds(timeout, "timeout")
        for part in parts:
            if part.staged:
                wait_for_device(part.staged)
        try:
            response = run(requests, parts)
        except (NotFound, InvalidArgument):
            # The weight may have gone, or come back in another shape.
            self._placements.pop(handle.name, None)
            raise
        for part in parts:
            part.deliver()
        return response

    def _c_name(self, name: str) -> Any:
        kept = self._names.get(name)
        if kept is None:
            kept = self._names[name] = ffi.new("char[]", name.encode())
        return kept


def run(requests: Any, parts: list[_Part]) -> Response:
    """Sends each part to its daemon, all at once, and waits for all."""
    n = len(parts)
    responses = ffi.new("struct einsum_client_response[]", n)
    errors = ffi.new("struct einsum_client_error[]", n)
    statuses = ffi.new("enum einsum_client_status[]", n)
    daemons = [part.share.daemon for part in parts]
    entered: list[Daemon] = []
    try:
        natives = []
        for daemon in daemons:
            natives.append(daemon.enter())
            entered.append(daemon)
        if n == 1:
            statuses[0] = lib.einsum_client_einsum(natives[0], requests, responses, errors)
        elif not lib.einsumd_einsum_all(
            n, ffi.new("struct einsum_client *[]", natives), requests, responses, errors, statuses
        ):
            raise ResourceExhausted("no memory")
    finally:
        for daemon in entered:
            daemon.leave()
    failed = [
        from_native(statuses[i], errors[i], daemons[i].endpoint) for i in range(n) if statuses[i]
    ]
    if failed:
        raise failed[0] if len(failed) == 1 else joined(failed)
    slowest = max(range(n), key=lambda i: int(responses[i].latency_ns))
    response = responses[slowest]
    return Response(
        response.tokens, response.batch_tokens, response.batch_bucket, response.batch_requests,
        response.queue_ns / 1e9, response.run_ns / 1e9, response.latency_ns / 1e9,
        response.attempts,
    )  # fmt: skip


def joined(errors: list[Error]) -> Error:
    """The first one, with the others as notes."""
    first = errors[0]
    first.args = ("; ".join(str(error) for error in errors),)
    return first


def one_of(field: str, got: object, choices: dict[str, Any]) -> InvalidArgument:
    return InvalidArgument(f"{field}: expected {', '.join(choices)}, got {got!r}", field=field)


# ---- the default client, and names ---------------------------------------------------------------

_default: Client | None = None
_default_lock = threading.Lock()
KEY = re.compile(r"(?P<name>[^\[\]@]+)(\[(?P<begin>\d+):(?P<end>\d+)\])?(@(?P<number>\d+))?")


def connect(endpoint: str | Sequence[str], **options: Any) -> Client:
    """Makes a client, and makes it the one that names without a client belong to."""
    client = Client(endpoint, **options)
    set_default_client(client)
    return client


def set_default_client(client: Client | None) -> None:
    global _default
    with _default_lock:
        _default = client


def default_client() -> Client:
    if _default is None:
        raise FailedPrecondition("there is no default client: call einsumd.connect first")
    return _default


def parse_key(key: str, client: Client | None = None) -> Handle:
    """The handle that a name or Handle.key means: of `client`, its "@N", or the default client."""
    match = KEY.fullmatch(key)
    if not match:
        raise InvalidArgument(f'b: expected "NAME", "NAME[BEGIN:END]" or a key, got {key!r}')
    if match["number"]:
        owner = _clients.get(int(match["number"]))
        if owner is None or (client is not None and owner is not client):
            raise InvalidArgument(f"b: {key!r} is of a client that is gone or another one")
        client = owner
    client = client or default_client()
    if match["begin"]:
        return Handle(client, match["name"], int(match["begin"]), int(match["end"]))
    return Handle(client, match["name"])


def fp8_einsum(
    expr: str,
    a: tuple[Any, Any],
    b: tuple[Handle | str, Any] | Handle | str,
    d: Any,
    c: None = None,
    recipe: Sequence[int] = (1, 128, 128),
    *,
    client: Client | None = None,
    timeout: float | None = None,
    priority: Priority = "normal",
    allow_copies: bool | None = None,
) -> None:
    """DeepGEMM's function over a resident weight: `b` is (handle, anything) or the handle.

    The weight's own scales are the daemon's: what stands in their place is not looked at. `c`,
    which DeepGEMM adds to, is not supported.
    """
    if c is not None:
        raise Unimplemented("c: expected None, adding to it is not supported", field="c")
    if not isinstance(a, (tuple, list)) or len(a) != 2:
        raise InvalidArgument("a: expected (activations, scales)", field="a")
    weight = b[0] if isinstance(b, (tuple, list)) and b else b
    if isinstance(weight, str):
        weight = parse_key(weight, client)
    if not isinstance(weight, Handle):
        raise InvalidArgument(
            f"b: expected a resident weight's handle or name, got {type(weight).__name__}",
            field="b",
        )
    weight.client.einsum(
        weight, a[0], a[1], d, recipe=recipe, equation=expr, timeout=timeout, priority=priority,
        allow_copies=allow_copies,
    )  # fmt: skip
