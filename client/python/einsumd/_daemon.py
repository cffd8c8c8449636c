"""One daemon: its connection, its control calls, and the memory that is shared with it.

A connection is used by calls of any thread and by tensors that lie in its memory. close() refuses
further calls; the connection itself goes with the last of them. Tensors are given back by the
garbage collector, which may run anywhere, so that path waits for no lock.
"""

from __future__ import annotations

import enum
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from einsumd._errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    from_native,
    text_of,
)
from einsumd._layout import RECIPES
from einsumd._native import ffi, lib

TRANSPORTS = {
    "auto": lib.EINSUM_CLIENT_TRANSPORT_AUTO,
    "tcp": lib.EINSUM_CLIENT_TRANSPORT_TCP,
    "unix": lib.EINSUM_CLIENT_TRANSPORT_UNIX,
    "shm": lib.EINSUM_CLIENT_TRANSPORT_SHARED,
    "ring": lib.EINSUM_CLIENT_TRANSPORT_RING,
}
RECIPE_OF = {number: recipe for recipe, number in RECIPES.items()}
SCALE_TYPES = {
    lib.EINSUM_CLIENT_SCALE_NONE: "NONE",
    lib.EINSUM_CLIENT_SCALE_FP32: "FP32",
    lib.EINSUM_CLIENT_SCALE_UE8M0: "UE8M0",
}


@dataclass(frozen=True)
class Weight:
    """A resident weight, as its daemon describes it."""

    name: str
    groups: int
    output_dim: int
    reduced_dim: int
    weight_type: str
    """E4M3 or BF16."""
    scale_type: str
    """FP32, UE8M0 or, of BF16 weights, NONE."""
    block_d: int
    block_r: int
    recipes: tuple[tuple[int, ...], ...]
    """Those that a request may name with it."""
    resident_bytes: int
    source: str
    tensor_parallel_rank: int
    tensor_parallel_size: int
    generation: int
    has_rope: bool
    """Whether it takes output_project."""


@dataclass(frozen=True)
class Info:
    """What ServerInfo tells; einsum.proto explains each."""

    version: str
    engine: str
    device: str
    kernel: str
    state: str
    uptime: float
    buckets: tuple[int, ...]
    kernels: tuple[str, ...]
    limits: dict[str, int]
    counters: dict[str, int]
    shared_memory: dict[str, Any]


@dataclass(frozen=True)
class SelfTest:
    """The daemon's own verdict on one weight."""

    weight: str
    passed: bool
    worst_error_ratio: float
    elements_checked: int
    duration: float
    message: str


class Health(enum.Enum):
    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


def milliseconds(seconds: float, field: str) -> int:
    # Rounded up: 0 would mean none was given.
    if not seconds > 0 or not math.isfinite(seconds) or seconds > 4_000_000:
        raise InvalidArgument(f"{field}: expected seconds above 0, got {seconds}", field=field)
    return math.ceil(seconds * 1000)


# ---- fork ----------------------------------------------------------------------------------------

# gRPC's threads and the client's own are not there in a forked child, but their locks are.
_clients_made = False
_forked = False
_forks = 0


def _after_fork() -> None:
    global _forked, _forks
    _forks += 1
    _forked = _clients_made


os.register_at_fork(after_in_child=_after_fork)


# ---- calls back from C ---------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a load is."""

    weights_done: int
    weights_total: int
    bytes_done: int
    bytes_total: int


class _Watch:
    """What a call back has to do, and what it raised: C would swallow that."""

    def __init__(self, act: Callable[[Any], Any]):
        self.act = act
        self.raised: BaseException | None = None
        self.handle = ffi.new_handle(self)

    def __call__(self, value: Any) -> bool:
        try:
            return self.raised is None and self.act(value) is not False
        except BaseException as raised:  # noqa: BLE001 - raised again by finish()
            self.raised = raised
            return False

    def finish(self) -> None:
        if self.raised is not None:
            raise self.raised


def _on_progress(context: Any, progress: Any) -> bool:
    watch: _Watch = ffi.from_handle(context)
    names = ("weights_done", "weights_total", "bytes_done", "bytes_total")
    return watch(Progress(**{name: getattr(progress, name) for name in names}))


def _on_name(context: Any, name: Any) -> None:
    ffi.from_handle(context)(text_of(name))


def _on_result(context: Any, result: Any) -> None:
    ffi.from_handle(context)(
        SelfTest(
            text_of(result.weight), result.passed, result.worst_error_ratio,
            result.elements_checked, result.duration_ns / 1e9, text_of(result.message),
        )
    )  # fmt: skip


ffi.def_extern(name="einsumd_on_progress", error=False)(_on_progress)
ffi.def_extern(name="einsumd_on_name")(_on_name)
ffi.def_extern(name="einsumd_on_result")(_on_result)


# ---- the daemon ----------------------------------------------------------------------------------


class Daemon:
    """One daemon. Made by Client; every method may be called from any thread."""

    def __init__(self, endpoint: str, options: dict[str, Any]):
        global _clients_made
        if _forked:
            raise FailedPrecondition(
                "this process was forked from one that already had a client, whose threads did not "
                "come along: make clients after forking, or start processes by 'spawn'",
                endpoint=endpoint,
            )
        self.endpoint = endpoint
        self._forks = _forks
        self._lock = threading.Lock()
        self._users = 0  # calls under way, and blocks of memory; by lock
        self._closed = False
        self._freed: deque[Any] = deque()  # blocks that nobody refers to any more
        native = ffi.new("struct einsum_client **")
        error = ffi.new("struct einsum_client_error *")
        kept, struct = native_options(options)
        _clients_made = True
        status = lib.einsum_client_create(endpoint.encode(), struct, native, error)
        del kept
        if status:
            raise from_native(status, error, endpoint)
        self._native = native[0]

    # ---- use and end

    def enter(self) -> Any:
        """The connection, for one call; leave() follows, whatever happens."""
        if self._forks != _forks:
            raise FailedPrecondition(
                "this client was made before the process forked: make one of the child's own",
                endpoint=self.endpoint,
            )
        with self._lock:
            if self._closed:
                raise FailedPrecondition("the client is closed", endpoint=self.endpoint)
            self._users += 1
        return self._native

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
        self._settle()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._settle()

    def _settle(self) -> None:
        """Frees what is no longer used. Whoever holds the lock meanwhile looks again after it."""
        while (self._freed or (self._closed and self._native and not self._users)) and (
            self._lock.acquire(blocking=False)
        ):
            native = None
            try:
                while self._freed:
                    lib.einsum_client_memory_free(self._native, self._freed.popleft())
                    self._users -= 1
                if self._closed and not self._users:
                    native, self._native = self._native, None
            finally:
                self._lock.release()
            if native and self._forks == _forks:
                lib.einsum_client_destroy(native)

    def __del__(self) -> None:
        if getattr(self, "_native", None):
            self.close()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def transport(self) -> str:
        """How requests travel now: tcp, unix, shm or ring."""
        native = self.enter()
        try:
            return text_of(lib.einsum_client_transport_name(lib.einsum_client_transport(native)))
        finally:
            self.leave()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "forked" if self._forks != _forks else self.transport
        return f"<einsumd.Daemon {self.endpoint} {state}>"

    def allocate(self, size: int) -> Any:
        """A buffer of `size` bytes in memory that is shared with the daemon; None: none is."""
        native = self.enter()
        taken = False
        try:
            lib_transport = lib.einsum_client_transport(native)
            if lib_transport not in (TRANSPORTS["shm"], TRANSPORTS["ring"]):
                return None
            memory = lib.einsum_client_memory_alloc(native, max(1, size))
            if memory == ffi.NULL:
                raise ResourceExhausted(
                    f"no room for {size} bytes in the memory shared with the daemon: make the "
                    "client with a larger shared_memory_bytes",
                    endpoint=self.endpoint,
                    field="shared_memory_bytes",
                )
            taken = True
            return ffi.buffer(ffi.gc(memory, self._give_back, size), size)
        finally:
            if not taken:  # else its place among the users is the memory's
                self.leave()

    def _give_back(self, memory: Any) -> None:
        self._freed.append(ffi.cast("void *", memory))
        self._settle()

    # ---- control

    def call(self, function: Any, *arguments: Any) -> None:
        error = ffi.new("struct einsum_client_error *")
        native = self.enter()
        try:
            status = function(native, *arguments, error)
        finally:
            self.leave()
        if status:
            raise from_native(status, error, self.endpoint)

    def weights(self) -> list[Weight]:
        """All resident weights, in order of name."""
        items = ffi.new("struct einsum_client_weights *")
        try:
            self.call(lib.einsum_client_list_weights, items)
            return [to_weight(items.items[i]) for i in range(items.items_n)]
        finally:
            lib.einsum_client_weights_deinit(items)

    def weight(self, name: str) -> Weight:
        """One of them; NotFound if there is none of that name."""
        weight = ffi.new("struct einsum_client_weight *")
        self.call(lib.einsum_client_get_weight, name.encode(), weight)
        return to_weight(weight)

    def load(
        self,
        path: str,
        tensors: Sequence[str] = (),
        *,
        name_prefix: str = "",
        tensor_parallel_rank: int = 0,
        tensor_parallel_size: int = 1,
        output_dim: int = 0,
        replace: bool = False,
        on_progress: Callable[[Progress], bool | None] | None = None,
    ) -> list[Weight]:
        """Loads weights from a checkpoint on the daemon's side: all that match, or none.

        `tensors` are shell patterns ("*.attn.wo_a.weight" if there is none). `on_progress` is
        called on a thread of the client's; if it returns False or raises, the load is given up.
        """
        kept = [ffi.new("char[]", pattern.encode()) for pattern in tensors]
        patterns = ffi.new("const char *[]", kept)
        where, prefix = ffi.new("char[]", path.encode()), ffi.new("char[]", name_prefix.encode())
        watch = _Watch(on_progress or (lambda _: True))
        load = ffi.new("struct einsum_client_load *")
        load.path, load.name_prefix = where, prefix
        load.tensors, load.tensors_n = patterns, len(kept)
        load.tensor_parallel_rank = tensor_parallel_rank
        load.tensor_parallel_size = tensor_parallel_size
        load.output_dim, load.replace = output_dim, replace
        load.on_progress, load.context = lib.einsumd_on_progress, watch.handle
        items = ffi.new("struct einsum_client_weights *")
        try:
            self.call(lib.einsum_client_load, load, items)
            return [to_weight(items.items[i]) for i in range(items.items_n)]
        finally:
            lib.einsum_client_weights_deinit(items)
            watch.finish()

    def unload(self, *names: str) -> list[str]:
        """Forgets weights, by names or shell patterns; returns the names that went."""
        gone: list[str] = []
        watch = _Watch(gone.append)
        kept = [ffi.new("char[]", name.encode()) for name in names]
        array = ffi.new("const char *[]", kept)
        self.call(lib.einsum_client_unload, array, len(kept), lib.einsumd_on_name, watch.handle)
        return gone

    def self_test(self, weight: str | None = None, kernel: str | None = None) -> list[SelfTest]:
        """Has the daemon check one weight, or all."""
        results: list[SelfTest] = []
        watch = _Watch(results.append)
        passed = ffi.new("bool *")
        self.call(
            lib.einsum_client_self_test, c_string(weight), c_string(kernel), passed,
            lib.einsumd_on_result, watch.handle,
        )  # fmt: skip
        return results

    def health(self, service: str = "") -> Health:
        """grpc.health.v1 of the daemon as a whole, or of one of its services."""
        health = ffi.new("enum einsum_client_health *")
        self.call(lib.einsum_client_check_health, service.encode(), health)
        return Health(int(health[0]))

    def info(self) -> Info:
        info = ffi.new("struct einsum_client_info *")
        self.call(lib.einsum_client_server_info, info)
        return Info(
            version=text_of(info.version),
            engine=text_of(info.engine),
            device=text_of(info.device),
            kernel=text_of(info.kernel),
            state=text_of(info.state),
            uptime=info.uptime_ns / 1e9,
            buckets=tuple(info.buckets[i] for i in range(info.buckets_n)),
            kernels=tuple(text_of(info.kernels[i]) for i in range(info.kernels_n)),
            limits=plain(info.limits),
            counters=plain(info.counters),
            shared_memory={
                **plain(info.shared_memory),
                "socket": text_of(info.shared_memory.socket),
            },
        )


def c_string(text: str | None) -> Any:
    return ffi.NULL if text is None else text.encode()


def plain(struct: Any) -> dict[str, Any]:
    """The numbers of a struct."""
    fields = dir(struct)
    return {f: getattr(struct, f) for f in fields if isinstance(getattr(struct, f), (int, bool))}


def to_weight(weight: Any) -> Weight:
    return Weight(
        name=text_of(weight.name),
        groups=weight.groups,
        output_dim=weight.output_dim,
        reduced_dim=weight.reduced_dim,
        weight_type="E4M3" if weight.weight_type == lib.EINSUM_CLIENT_WEIGHT_E4M3 else "BF16",
        scale_type=SCALE_TYPES[weight.scale_type],
        block_d=weight.block_d,
        block_r=weight.block_r,
        recipes=tuple(
            RECIPE_OF[weight.recipes[i]]
            for i in range(weight.recipes_n)
            if weight.recipes[i] in RECIPE_OF
        ),
        resident_bytes=weight.resident_bytes,
        source=text_of(weight.source),
        tensor_parallel_rank=weight.tensor_parallel_rank,
        tensor_parallel_size=weight.tensor_parallel_size,
        generation=weight.generation,
        has_rope=weight.has_rope,
    )


def native_options(given: dict[str, Any]) -> tuple[list[Any], Any]:
    """The library's options, its defaults where none is given; and what keeps their strings."""
    options = ffi.new("struct einsum_client_options *")
    lib.einsum_client_options_init(options)
    kept = []
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, str):
            value = ffi.new("char[]", value.encode())
            kept.append(value)
        setattr(options, name, value)
    return kept, options
