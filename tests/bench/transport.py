"""What the daemon adds around gRPC, and what others would: one generator, one machine, one run.

    bare      gRPC C core alone (bare_server.c): copies once, sends as many bytes back. The ceiling
    null      the daemon with the engine that computes nothing
    real      the daemon with the best engine of this machine
    python    the same API in Python with grpcio and numpy, torch where it is installed
    triton    Triton Inference Server, where nvidia-pytriton is installed (see --install-triton)

Servers take turns within each round, and their order turns from round to round; ratios are of
medians. Numbers of those that compute are compared with FP64 before they are timed. The last line
is RESULT {json}; plots go to build/bench/transport-*.png if gnuplot is there. h2load, if it is
there, is a second load generator that shares no code with the first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepare
from copies import Copies  # by way of prepare's path
from prepare import BENCH_DIR, BUILD_DIR, EINSUMCTL, REPOSITORY, Daemon, ctl
from result import Result

HERE = Path(__file__).resolve().parent
LAYERS = 8
VENV = REPOSITORY / "build/venv/bin/python"
TRITON_VENV = REPOSITORY / "build/venv-triton"
CONNECTIONS = 1000
FLOOD_TOKENS, FLOOD_CALLERS = 4096, 4
TOKEN_BYTES = 8 * 4096 + 8 * 32  # E4M3 and UE8M0 scales
MIB = 1 << 20


@dataclass
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float  # of each measurement
    warmup: float
    open_loop: float
    flood_calls: int
    python_seconds: float


FULL = Plan(rounds=5, seconds=1.0, warmup=0.3, open_loop=60, flood_calls=20, python_seconds=3)
QUICK = Plan(rounds=2, seconds=0.4, warmup=0.2, open_loop=5, flood_calls=4, python_seconds=1.5)


# ---- servers


def find_program(name: str) -> Path:
    """In a build, or in a bundle, where all lie side by side."""
    for path in (BUILD_DIR / "tests/bench" / name, BUILD_DIR / name):
        if path.exists():
            return path
    sys.exit(f"{name} is neither in {BUILD_DIR} nor in its tests/bench: build it")


@contextlib.contextmanager
def process(ready: str, *command: Any, timeout: float = 120, **options: Any) -> Iterator[str]:
    """A server of ours that prints a line with `ready` once it serves; yields that line."""
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, **options) as it:
        deadline = time.monotonic() + timeout
        try:
            for line in it.stdout:
                if line.startswith(ready):
                    yield line.strip()
                    break
                if time.monotonic() > deadline:
                    break
            else:
                raise RuntimeError(f"{command[0]} ended before it was ready")
        finally:
            it.terminate()
            try:
                it.wait(30)
            except subprocess.TimeoutExpired:
                it.kill()


class Site:
    """The servers that several cases share, started when one first asks for them."""

    def __init__(self, directory: Path, plan: Plan, result: Result, arguments: Any):
        self.directory, self.plan, self.result, self.arguments = directory, plan, result, arguments
        self.stack = contextlib.ExitStack()
        self.addresses: dict[str, dict[str, str]] = {}
        self.daemons: dict[str, Daemon] = {}
        self.plots: dict[str, list[tuple[str, list[float]]]] = {}

    def checkpoint(self) -> Path:
        return prepare.v4_flash(LAYERS)

    def address(self, server: str, transport: str) -> str:
        if server not in self.addresses:
            self.addresses[server] = getattr(self, f"_start_{server}")()
        return self.addresses[server][transport]

    def _start_bare(self) -> dict[str, str]:
        path = f"unix:{self.directory}/bare.sock"
        line = self.stack.enter_context(
            process(
                "ready", find_program("bare_server"), "--weights", LAYERS,
                "--listen", "127.0.0.1:0", "--listen", path,
            )
        )  # fmt: skip
        return {"tcp": line.split()[1], "unix": path}

    def daemon(self, name: str, **config: Any) -> Daemon:
        checkpoint = self.checkpoint()
        directory = self.directory / name
        listen = ["127.0.0.1:0", f"unix:{self.directory}/{name}.sock"]
        defaults = {
            "listen": listen,
            "weights_roots": [str(checkpoint.parent)],
            "weights": [{"path": str(checkpoint)}],
            "connections_max": 4 * CONNECTIONS,
            "compute_threads": 0,
            "rpc_threads": 0,
        }
        daemon = Daemon(directory, **(defaults | config))
        self.stack.enter_context(daemon)
        self.daemons[name] = daemon
        self.addresses[name] = {"tcp": daemon.listening[0], "unix": listen[1]}
        return daemon

    def _start_null(self) -> dict[str, str]:
        shared = f"unix:{self.directory}/null-shared.sock"
        self.daemon("null", engine="null", self_test_at_start=False, shared_memory_listen=shared)
        return self.addresses["null"]

    def _start_real(self) -> dict[str, str]:
        self.daemon("real", engine="auto")
        # Numbers before times.
        address = self.addresses["real"]["unix"]
        ctl(
            "--endpoint", address, "check", "--checkpoint", self.checkpoint(), "--weights", 2,
            "--tokens", "1,8,32", "--repeat", 1,
        )  # fmt: skip
        return self.addresses["real"]

    def bench(self, server: str, transport: str, *options: Any, **times: float) -> dict[str, Any]:
        seconds = times.get("seconds", self.plan.seconds)
        warmup = times.get("warmup", self.plan.warmup)
        return ctl(
            "--endpoint", self.address(server, transport), "bench", "--duration", seconds,
            "--warmup", warmup, *options,
        )  # fmt: skip

    def compare(
        self, what: dict[str, Callable[[], dict[str, Any]]], rounds: int | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        """Every measurement once a round, in turning order."""
        names = list(what)
        for name in names:
            what[name]()  # warms caches and connections up, and is thrown away
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for index in range(rounds or self.plan.rounds):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                taken[name].append(what[name]())
        return taken

    def plot(self, name: str, label: str, values: list[float]) -> None:
        self.plots.setdefault(name, []).append((label, values))


def median(taken: list[dict[str, Any]], *path: str) -> float:
    def value(entry: Any) -> float:
        for key in path:
            entry = entry[key]
        return entry

    return statistics.median(map(value, taken))


# ---- cases; the first line of each is its help

CASES: dict[str, Callable[[Site], None]] = {}


def case(function: Callable[[Site], None]) -> Callable[[Site], None]:
    CASES[function.__name__.strip("_").replace("_", "-")] = function
    return function


TRANSPORTS = ("tcp", "unix")


def against_bare(site: Site, tokens: int, concurrency: int, transport: str) -> dict[str, list]:
    options = ("--tokens", tokens, "--concurrency", concurrency)
    return site.compare(
        {
            server: lambda server=server: site.bench(server, transport, *options)
            for server in ("bare", "null")
        }
    )


@case
def calls(site: Site) -> None:
    """calls/s of 1 token, 8 and 32 in flight, TCP and unix: null over bare"""
    for transport in TRANSPORTS:
        for concurrency in (8, 32):
            taken = against_bare(site, 1, concurrency, transport)
            bare, null = (median(taken[server], "calls_per_s") for server in ("bare", "null"))
            label = f"1 token, {concurrency} in flight, {transport}"
            site.result.note(f"calls/s, {label}, bare", bare)
            site.result.note(f"calls/s, {label}, null", null)
            site.result.at_least(f"calls/s, {label}, null over bare", null / bare, 0.75)
            site.plot("calls", f"{transport} x{concurrency}", [bare, null])


@case
def bytes_(site: Site) -> None:
    """bytes/s of 32 and 256 tokens, 8 in flight, TCP and unix: null over bare"""
    for transport in TRANSPORTS:
        for tokens in (32, 256):
            taken = against_bare(site, tokens, 8, transport)
            rates = [
                median(taken[server], "sent_bytes_per_s")
                + median(taken[server], "received_bytes_per_s")
                for server in ("bare", "null")
            ]
            label = f"{tokens} tokens, 8 in flight, {transport}"
            site.result.note(f"MB/s both ways, {label}, bare", rates[0] / 1e6)
            site.result.note(f"MB/s both ways, {label}, null", rates[1] / 1e6)
            site.result.at_least(f"bytes/s, {label}, null over bare", rates[1] / rates[0], 0.9)
            site.plot("bytes", f"{transport} {tokens}", [rate / 1e6 for rate in rates])


@case
def latency(site: Site) -> None:
    """p50 of 1 token, 1 in flight, TCP and unix: null less bare"""
    for transport in TRANSPORTS:
        taken = against_bare(site, 1, 1, transport)
        bare, null = (median(taken[server], "latency_ns", "p50") / 1e3 for server in taken)
        site.result.note(f"p50 us, 1 token alone, {transport}, bare", bare)
        site.result.note(f"p50 us, 1 token alone, {transport}, null", null)
        site.result.at_most(f"p50 us added, 1 token alone, {transport}", null - bare, 25)
        site.plot("latency", transport, [bare, null])


@case
def stream(site: Site) -> None:
    """calls/s of 1 token, 8 in flight on one stream, over unary calls"""
    for transport in TRANSPORTS:
        kinds = {
            (server, kind): lambda server=server, extra=extra: site.bench(
                server, transport, "--tokens", 1, "--concurrency", 8, *extra
            )
            for server in ("null", "bare")
            for kind, extra in (("unary", ()), ("stream", ("--stream",)))
        }
        taken = site.compare(kinds)
        rate = {kind: median(values, "calls_per_s") for kind, values in taken.items()}
        for server in ("bare", "null"):
            site.result.note(f"calls/s, one stream, {transport}, {server}", rate[server, "stream"])
        site.result.note(
            f"stream over unary, {transport}, bare", rate["bare", "stream"] / rate["bare", "unary"]
        )
        site.result.at_least(
            f"stream over unary, {transport}, null",
            rate["null", "stream"] / rate["null", "unary"],
            1.8,
        )


@case
def shared(site: Site) -> None:
    """shared memory and its ring beside a unix socket, null engine: calls/s, p50 and p99"""
    for tokens, bar in ((32, 8), (256, 40)):
        taken = site.compare(
            {
                name: lambda name=name: site.bench(
                    "null", "unix", "--tokens", tokens, "--concurrency", 8, "--transport", name
                )
                for name in ("grpc", "shm", "ring")
            }
        )
        rate = {name: median(values, "calls_per_s") for name, values in taken.items()}
        for name in ("shm", "ring"):
            site.result.note(f"calls/s, {tokens} tokens, 8 in flight, {name}", rate[name])
            label = f"calls/s, {tokens} tokens, {name} over unix socket"
            if name == "shm":
                site.result.at_least(label, rate[name] / rate["grpc"], bar)
            else:
                site.result.note(label, rate[name] / rate["grpc"])
    alone = {
        name: lambda name=name: site.bench(
            "null", "unix", "--tokens", 1, "--concurrency", 1, "--transport", name
        )
        for name in ("grpc", "shm", "ring")
    }
    taken = site.compare(alone)
    for name in alone:
        for point, bar in (("p50", 25), ("p99", 60)):
            value = median(taken[name], "latency_ns", point) / 1e3
            label = f"{point} us, 1 token alone, unix, {name}"
            if name == "ring":
                site.result.at_most(label, value, bar)
            else:
                site.result.note(label, value)


@case
def busy(site: Site) -> None:
    """the real engine, 64 tokens, saturated: share of time that it is busy"""
    shares, rates = [], []
    for _ in range(min(site.plan.rounds, 3)):
        seconds = max(4 * site.plan.seconds, 3)
        address = site.address("real", "unix")
        load = subprocess.Popen(
            [EINSUMCTL, "--endpoint", address, "--json", "bench", "--tokens", "64",
             "--concurrency", "16", "--warmup", "1", "--duration", str(seconds)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(1.5)
        before = ctl("--endpoint", address, "info")
        time.sleep(seconds - 1.5)
        after = ctl("--endpoint", address, "info")
        rates.append(json.loads(load.communicate()[0])["tokens_per_s"])
        busy_ns = after["counters"]["busy_ns"] - before["counters"]["busy_ns"]
        shares.append(busy_ns / (after["uptime_ns"] - before["uptime_ns"]))
    site.result.note("tokens/s, 64 tokens, 16 in flight, real", statistics.median(rates))
    label = "engine busy, 64 tokens, 16 in flight"
    if after["engine"] == "cpu":
        site.result.at_least(label, statistics.median(shares), 0.95)
    else:  # a GPU is quicker than any socket
        site.result.note(f"{label}, {after['engine']}", statistics.median(shares))


def python_with(*modules: str) -> Path | None:
    """An interpreter that has them: the tests' own environment, or the one that runs this."""
    for python in (os.environ.get("EINSUMD_PYTHON"), VENV, sys.executable):
        if not python or not Path(python).exists():
            continue
        probe = [python, "-c", "; ".join(f"import {module}" for module in modules)]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            return Path(python)
    return None


def find_descriptors() -> Path | None:
    found = [path for path in (BUILD_DIR / "proto/services.fds", BUILD_DIR / "services.fds")]
    return next((path for path in found if path.exists()), None)


@case
def python(site: Site) -> None:
    """requests/s of 1 and 32 tokens: the real engine over a Python server"""
    kinds = [("numpy", "fp32"), ("numpy", "fp8"), ("torch", "fp32")]
    for compute, weights in kinds:
        name = f"Python, {compute}, weights in {weights.upper()}"
        python = python_with("grpc", "google.protobuf", "numpy", compute)
        fds = find_descriptors()
        if not python or not fds:
            site.result.skip(name, f"no Python with grpcio, protobuf and {compute}")
            continue
        path = f"unix:{site.directory}/python-{compute}-{weights}.sock"
        with process(
            "ready", python, HERE / "python_server.py", "--checkpoint", site.checkpoint(),
            "--listen", path, "--fds", fds, "--compute", compute, "--weights", weights,
        ):  # fmt: skip
            ctl("--endpoint", path, "check", "--checkpoint", site.checkpoint(), "--weights", 1,
                "--tokens", "1,8", "--repeat", 1)  # fmt: skip
            site.addresses["python"] = {"unix": path}
            for tokens in (1, 32):
                python_against_real(site, name, tokens, weights)


def python_against_real(site: Site, name: str, tokens: int, weights: str) -> None:
    taken = site.compare(
        {
            server: lambda server=server: site.bench(
                server, "unix", "--tokens", tokens, "--concurrency", 8,
                seconds=site.plan.python_seconds,
            )
            for server in ("python", "real")
        },
        rounds=site.plan.rounds if weights == "fp32" else 1,
    )  # fmt: skip
    rate = {server: median(values, "calls_per_s") for server, values in taken.items()}
    label = f"{tokens} token{'s' if tokens > 1 else ''}"
    site.result.note(f"requests/s, {label}, {name}", rate["python"])
    site.result.note(f"requests/s, {label}, real engine beside it", rate["real"])
    site.result.at_least(f"real over {name}, {label}", rate["real"] / rate["python"], 5)
    site.plot("python", f"{weights} x{tokens}", [rate["python"], rate["real"]])


# ---- many connections


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if "VmRSS" in line).split()[1])


@contextlib.contextmanager
def idle_connections(address: str, n: int) -> Iterator[None]:
    """HTTP/2 connections that have said hello and nothing since."""
    host, port = address.rsplit(":", 1)
    settings = struct.pack(">I", 0)[1:] + b"\x04\x00" + bytes(4)
    with contextlib.ExitStack() as stack:
        for _ in range(n):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
            connection.recv(9)  # the server's own settings: it has taken the connection
        yield


@case
def connections(site: Site) -> None:
    """1,000 idle connections beside 32 busy ones; 1 connection, then 1,000; memory of one"""
    address = site.address("null", "tcp")
    pid = site.daemons["null"].process.pid

    def busy_ones(n: int, server: str = "null", warmup: float | None = None) -> dict[str, Any]:
        return site.bench(
            server, "tcp", "--concurrency", 32, "--connections", n,
            warmup=warmup or site.plan.warmup,
        )  # fmt: skip

    grown: list[float] = []

    def beside_idle() -> dict[str, Any]:
        before = resident_bytes(pid)
        with idle_connections(address, CONNECTIONS):
            grown.append((resident_bytes(pid) - before) / CONNECTIONS / 1024)
            return busy_ones(32)

    taken = site.compare({"alone": lambda: busy_ones(32), "idle": beside_idle})
    alone, idle = (median(taken[name], "calls_per_s") for name in ("alone", "idle"))
    site.result.note("calls/s, 32 busy connections", alone)
    site.result.at_least(f"the same beside {CONNECTIONS} idle ones, of that", idle / alone, 0.85)
    # The first time; afterwards the allocator has the memory already.
    site.result.note("KiB of memory an idle connection, the first time", grown[0])

    counts = (1, 32, CONNECTIONS)
    taken = site.compare(
        {
            (server, n): lambda server=server, n=n: busy_ones(n, server, 1.5 if n > 32 else None)
            for n in counts
            for server in ("bare", "null")
        }
    )
    rate = {key: median(values, "calls_per_s") for key, values in taken.items()}
    for server in ("bare", "null"):
        for n in counts:
            site.result.note(
                f"calls/s, 32 in flight over {n} connections, {server}", rate[server, n]
            )
    of = {server: rate[server, CONNECTIONS] / rate[server, 1] for server in ("bare", "null")}
    site.result.note(f"1 -> {CONNECTIONS} connections, calls/s of that, bare", of["bare"])
    site.result.at_least(f"1 -> {CONNECTIONS} connections, calls/s of that, null", of["null"], 0.85)


# ---- load that does not wait


@case
def open_loop(site: Site) -> None:
    """p50, p99, p99.9 at 70 % of the daemon's capacity, requests at random times: null, bare"""
    # What comes through when far more arrive, since a closed loop is cheaper for the client.
    capacity = statistics.median(
        site.bench("null", "tcp", "--rate", 1e6)["calls_per_s"] for _ in range(3)
    )
    rate = 0.7 * capacity
    site.result.note("open loop, requests/s", rate)
    # In pieces, by turns, so that a slow spell of the machine hits both.
    pieces = max(2, round(site.plan.open_loop / 10))
    taken = site.compare(
        {
            server: lambda server=server: site.bench(
                server, "tcp", "--rate", rate, seconds=site.plan.open_loop / pieces, warmup=0.5
            )
            for server in ("bare", "null")
        },
        rounds=pieces,
    )
    at = {}
    for point in ("p50", "p99", "p99_9"):
        for server in ("bare", "null"):
            at[server, point] = median(taken[server], "latency_ns", point) / 1e3
            name = point.replace("_", ".")
            site.result.note(f"open loop, {name} us, {server}", at[server, point])
    for point in ("p50", "p99", "p99_9"):
        site.plot("open-loop", point.replace("_", "."), [at["bare", point], at["null", point]])
    site.result.at_most(
        "open loop, p99, null over bare", at["null", "p99"] / at["bare", "p99"], 2.0
    )


@case
def flood(site: Site) -> None:
    """a caller of 1 token beside 4 callers of 4,096 tokens, each on a connection of its own"""
    site.daemon("flood", engine="auto", request_tokens_max=4096, **site.arguments.flood_config)
    address = site.addresses["flood"]["unix"]

    def start(tokens: int, concurrency: int, *options: Any) -> subprocess.Popen:
        return subprocess.Popen(
            [EINSUMCTL, "--endpoint", address, "--json", "--timeout", "600000", "bench",
             "--weight", "layers.0.attn.wo_a", "--tokens", str(tokens),
             "--concurrency", str(concurrency), "--connections", str(concurrency),
             "--warmup", "0", "--duration", "600", *map(str, options)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    alone = json.loads(start(1, 1, "--requests", 500).communicate()[0])
    flood = start(FLOOD_TOKENS, FLOOD_CALLERS)
    # It sends two requests to check numbers, and is a flood once its callers have one each.
    wanted = (3 + FLOOD_CALLERS) * FLOOD_TOKENS
    while ctl("--endpoint", address, "info")["counters"]["batch_tokens"] < wanted:
        time.sleep(0.5)
    small = json.loads(start(1, 1, "--requests", site.plan.flood_calls).communicate()[0])
    flood.send_signal(signal.SIGINT)
    large = json.loads(flood.communicate()[0])
    batch_ms = large["batch"]["run_ns_mean"] / 1e6
    site.result.note("1 token alone, p99 ms", alone["latency_ns"]["p99"] / 1e6)
    site.result.note(f"flood, requests/s of {FLOOD_TOKENS} tokens", large["calls_per_s"])
    site.result.note("flood, p50 ms", large["latency_ns"]["p50"] / 1e6)
    site.result.note("flood, ms from launch to end of a batch", batch_ms)
    site.result.note("1 token beside the flood, calls", small["calls"])
    site.result.note("1 token beside the flood, p50 ms", small["latency_ns"]["p50"] / 1e6)
    site.result.at_most(
        "1 token beside the flood, p99 ms", small["latency_ns"]["p99"] / 1e6, 2 * batch_ms
    )


@case
def copies(site: Site) -> None:
    """bytes copied in the daemon, gRPC included, for each byte of input: 1 in, 0 out"""
    if not shutil.which("cc"):
        site.result.skip("copies", "no C compiler for the counter")
        return
    counter = Copies(site.directory)
    site.daemon(
        "counted", engine="null", self_test_at_start=False,
        extra_environment=counter.environment,
        shared_memory_listen=f"unix:{site.directory}/counted-shared.sock",
    )  # fmt: skip
    ways = [(transport, "grpc", 1.02) for transport in TRANSPORTS]
    for transport, way, bar in [*ways, ("unix", "shm", 0.02), ("unix", "ring", 0.02)]:
        address = site.address("counted", transport)
        options = ("--concurrency", 4, "--transport", way)
        for tokens in (1, 256):
            before, was = counter.bytes(), ctl("--endpoint", address, "info")["counters"]
            site.bench("counted", transport, "--tokens", tokens, *options)
            after, now = counter.bytes(), ctl("--endpoint", address, "info")["counters"]
            sent = (now["answered"] - was["answered"]) * tokens * TOKEN_BYTES
            label = f"copied for each byte of input, {tokens} tokens, {transport}, {way}"
            site.result.at_most(label, (after - before) / sent, bar)


# ---- an independent load generator


def field(number: int, value: int | bytes) -> bytes:
    def varint(n: int) -> bytes:
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        return bytes([*out, n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def einsum_frame(tokens: int) -> bytes:
    """One request for layers.0 as gRPC frames it; see einsum.proto for the fields."""
    message = b"".join(
        [
            field(2, b"layers.0.attn.wo_a"),
            field(3, b"bhr,hdr->bhd"),
            *(field(number, value) for number, value in ((4, 1), (5, 1), (6, 1), (7, 2), (8, 1))),
            field(9, tokens),
            field(13, b"\x38" * (tokens * 8 * 4096)),
            field(14, b"\x7f" * (tokens * 8 * 32)),
        ]
    )
    return struct.pack(">BI", 0, len(message)) + message


def h2load(
    address: str,
    frame: Path,
    seconds: float,
    concurrency: int,
    path: str = "einsum.v1.Einsum/Einsum",
) -> dict[str, Any]:
    command = [
        "h2load", "-D", str(max(1, round(seconds))), "--warm-up-time", "1", "-c", "1", "-t", "1",
        "-m", str(concurrency), "-d", str(frame), "-H", "content-type: application/grpc",
        "-H", "te: trailers",
    ]  # fmt: skip
    if address.startswith("unix:"):
        command += [f"--base-uri={address}", f"http://localhost/{path}"]
    else:
        command += [f"http://{address}/{path}"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    done = [line for line in text.splitlines() if line.startswith("requests:")]
    measured = max(1, round(seconds))
    if not done:
        raise RuntimeError(f"h2load: {text}")
    counts = {part.split()[1]: int(part.split()[0]) for part in done[0][9:].split(", ")}
    if counts["failed"] or counts["errored"]:
        raise RuntimeError(f"h2load: {done[0]}")
    return {"calls_per_s": counts["succeeded"] / measured}


@case
def independent(site: Site) -> None:
    """calls/s of 1 token by h2load in place of einsumctl, 8 in flight, TCP: null over bare"""
    if not shutil.which("h2load"):
        site.result.skip("h2load", "not installed (Debian: nghttp2-client)")
        return
    frame = site.directory / "request.bin"
    frame.write_bytes(einsum_frame(1))
    taken = site.compare(
        {
            server: lambda server=server: h2load(
                site.address(server, "tcp"), frame, site.plan.seconds, 8
            )
            for server in ("bare", "null")
        }
    )
    bare, null = (median(taken[server], "calls_per_s") for server in ("bare", "null"))
    site.result.note("calls/s, 1 token, 8 in flight, tcp, h2load, bare", bare)
    site.result.note("calls/s, 1 token, 8 in flight, tcp, h2load, null", null)
    site.result.at_least("calls/s, 8 in flight, h2load, null over bare", null / bare, 0.75)


@case
def triton(site: Site) -> None:
    """requests/s of 1 and 32 tokens by h2load: the real engine over Triton"""
    python = Path(os.environ.get("EINSUMD_TRITON_PYTHON", TRITON_VENV / "bin/python"))
    if site.arguments.install_triton and not python.exists():
        subprocess.run(["/usr/bin/python3", "-m", "venv", TRITON_VENV], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "nvidia-pytriton"], check=True)
    if not python.exists():
        site.result.skip("Triton", "nvidia-pytriton is not installed; see --install-triton")
        return
    if not shutil.which("h2load"):
        site.result.skip("Triton", "not measured without h2load (Debian: nghttp2-client)")
        return
    server = HERE / "triton_server.py"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    checkpoint = site.checkpoint()
    frames = {}
    for tokens in (1, 32):
        frames["triton", tokens] = site.directory / f"triton-{tokens}.bin"
        frames["real", tokens] = site.directory / f"real-{tokens}.bin"
        frames["real", tokens].write_bytes(einsum_frame(tokens))
        subprocess.run(
            [python, server, "--frame", frames["triton", tokens], "--tokens", str(tokens)],
            check=True,
        )
    with process(
        "ready", python, server, "--checkpoint", checkpoint, "--port", port,
        stderr=subprocess.DEVNULL,
    ):  # fmt: skip
        subprocess.run(
            [python, server, "--ask", "--port", str(port), "--checkpoint", checkpoint],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for tokens in (1, 32):
            triton_against_real(site, tokens, frames, f"127.0.0.1:{port}")


def triton_against_real(
    site: Site, tokens: int, frames: dict[tuple[str, int], Path], address: str
) -> None:
    targets = {
        "triton": (address, "inference.GRPCInferenceService/ModelInfer"),
        "real": (site.address("real", "tcp"), "einsum.v1.Einsum/Einsum"),
    }
    taken = site.compare(
        {
            name: lambda name=name, at=at, path=path: h2load(
                at, frames[name, tokens], site.plan.python_seconds, 8, path
            )
            for name, (at, path) in targets.items()
        }
    )
    rate = {name: median(values, "calls_per_s") for name, values in taken.items()}
    label = f"{tokens} token{'s' if tokens > 1 else ''}"
    site.result.note(f"requests/s, {label}, one layer, h2load, Triton with numpy", rate["triton"])
    site.result.note(f"requests/s, {label}, one layer, h2load, real", rate["real"])
    site.result.note(f"real over Triton, {label}", rate["real"] / rate["triton"])
    site.plot("triton", f"x{tokens}", [rate["triton"], rate["real"]])


# ---- plots

PLOTS = {
    "calls": ("calls/s, 1 token", ("bare gRPC", "einsumd, null engine")),
    "bytes": ("MB/s both ways, 8 in flight", ("bare gRPC", "einsumd, null engine")),
    "latency": ("p50 us, 1 token alone", ("bare gRPC", "einsumd, null engine")),
    "open-loop": ("us, open loop at 70 % of capacity", ("bare gRPC", "einsumd, null engine")),
    "python": ("requests/s, by tokens", ("Python", "einsumd")),
    "triton": ("requests/s, by tokens", ("Triton", "einsumd")),
}


def draw(site: Site) -> None:
    if not shutil.which("gnuplot"):
        if site.plots:
            site.result.skip("plots", "gnuplot is not installed")
        return
    for name, bars in site.plots.items():
        title, columns = PLOTS[name]
        data = "\n".join(f'"{label}" {" ".join(map(str, values))}' for label, values in bars)
        picture = BENCH_DIR / f"transport-{name}.png"
        titles = ", ".join(
            f"$bars using {i + 2}:xtic(1) title '{column}'" for i, column in enumerate(columns)
        )
        script = f"""set terminal pngcairo size 900,500
set output '{picture}'
set title '{title}'
set style data histograms
set style fill solid 0.8
set yrange [0:*]
set grid ytics
$bars << EOD
{data}
EOD
plot {titles}
"""
        subprocess.run(["gnuplot"], input=script, text=True, check=True)
        print(f"plot: {picture}")


# ---- the command


def parse() -> argparse.Namespace:
    names = "\n".join(f"  {name:14} {function.__doc__}" for name, function in CASES.items())
    parser = argparse.ArgumentParser(
        prog="transport.sh",
        description=__doc__,
        epilog=f"cases:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="by default all")
    parser.add_argument("--quick", action="store_true", help="all in some 2 minutes: fewer rounds")
    parser.add_argument("--rounds", type=int, help="in place of 5")
    parser.add_argument(
        "--install-triton", action="store_true", help="nvidia-pytriton, into build/venv-triton"
    )
    parser.add_argument(
        "--flood-config", type=json.loads, default={"batch_tokens_max": 4096}, metavar="JSON",
        help="keys of the daemon's configuration in the case flood",
    )  # fmt: skip
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return arguments


def main() -> int:
    arguments = parse()
    plan = QUICK if arguments.quick else FULL
    if arguments.rounds:
        plan.rounds = arguments.rounds
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    result = Result("transport", "the unit that each case names")
    with tempfile.TemporaryDirectory() as directory:
        site = Site(Path(directory), plan, result, arguments)
        with site.stack:
            for name in arguments.cases or CASES:
                started = time.monotonic()
                before = len(result.rows)
                CASES[name](site)
                took = time.monotonic() - started
                print(f"case {name}: {took:.0f} s", file=sys.stderr)
                for row in result.rows[before:]:  # a run that is cut short has shown them
                    print(f"    {row.case}: {row.value:.3f}", file=sys.stderr, flush=True)
            draw(site)
    return result.print()


if __name__ == "__main__":
    sys.exit(main())
