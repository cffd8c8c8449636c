"""Run by tests/soak.sh: everything at once for minutes, watched from outside.

    callers (threads here)  ---- every answer is compared with the bits of the first, or the oracle
    einsumctl bench         ---- one window after another: p99 at a steady rate, C client; and beside
                                 it the same of a daemon that does nothing else: the machine's noise
    /proc/PID               ---- resident memory, descriptors, threads, each second

What grows shows as a slope (Theil-Sen, over medians of windows) in both halves after the warm-up: a leak
is steady, while the most that buffers ever held is a step at a time. What drifts
shows as the last third's median p99 over the first third's, each p99 as a multiple of the other
daemon's in the same window.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterator

import grpc
import numpy as np

import oracle
from checkpoints import TENSOR_NAME, write_checkpoint
from client import EINSUM, Client, make_request
from conftest import Site, rng_for
from daemon import EINSUMCTL, Daemon, environment, wait_until
from inference import infer, make_infer
from scrape import scrape
from shared_memory import Connection, share
from test_output_project import NAME, WEIGHTS, Projection, output_project, start

WARM_UP = 0.2  # of all windows: what is allocated on first use
GROWTH = 0.02  # of resident memory, over the time after the warm-up
PAUSE_S = 0.02  # of a caller, between calls: load is steady, and well below what saturates
RATE = 150  # of each probe, calls a second
PAGE = os.sysconf("SC_PAGE_SIZE")


class Failed(Exception):
    """A wrong answer, or a call that must not fail and did."""


class Known:
    """A request with its answer: the bits that came first, which the oracle has judged."""

    def __init__(self, send: Callable[[], bytes], expected: tuple[np.ndarray, np.ndarray]):
        self.send, self.expected = send, expected
        self.bits = send()
        oracle.check(self.bits, "BF16", *expected)

    def judge(self, output: bytes) -> None:
        """The last bit may depend on who else is in the batch."""
        if output != self.bits:
            oracle.check(output, "BF16", *self.expected)

    def call(self) -> None:
        self.judge(self.send())


def einsum_request(site: Site, rng: np.random.Generator, name: str, tokens: int) -> tuple[Any, Any]:
    activations = oracle.random_activations(rng, WEIGHTS[name], tokens, "FP32")
    request = make_request(site.client, name, WEIGHTS[name], activations)
    return request, site.expected(activations, WEIGHTS[name])


class Soak:
    def __init__(self, site: Site, control: Daemon, seconds: float):
        self.site, self.control, self.seconds = site, control, seconds
        self.stop = threading.Event()
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.lock = threading.Lock()

    # ---- callers: each a generator that yields after every piece of work

    def unary(self, rng: np.random.Generator) -> Iterator[None]:
        with Client(self.site.daemon.address, self.site.client.schema) as client:
            cases = []
            for name, tokens in [(NAME, 1), (NAME, 40), (TENSOR_NAME.format(5), 700)]:
                request, expected = einsum_request(self.site, rng, name, tokens)
                cases.append(Known(lambda r=request: client.einsum(r).output, expected))
            while True:
                for case in cases:
                    case.call()
                    yield

    def project(self, rng: np.random.Generator) -> Iterator[None]:
        with Client(self.site.daemon.address, self.site.client.schema) as client:
            projection = Projection(rng, NAME, 5)
            request = projection.request(client)
            case = Known(lambda: output_project(client, request).output, projection.expected())
            while True:
                case.call()
                yield

    def inference(self, rng: np.random.Generator) -> Iterator[None]:
        activations = oracle.random_activations(rng, WEIGHTS[NAME], 3, "FP32")
        with Client(self.site.daemon.address, self.site.client.schema) as client:
            request = make_infer(client, NAME, activations)
            expected = self.site.expected(activations, WEIGHTS[NAME])
            case = Known(lambda: infer(client, request).raw_output_contents[0], expected)
            while True:
                case.call()
                yield

    def stream(self, rng: np.random.Generator) -> Iterator[None]:
        """Some hundred requests on each, four under way."""
        with Client(self.site.daemon.address, self.site.client.schema) as client:
            request, expected = einsum_request(self.site, rng, NAME, 9)
            case = Known(lambda: client.einsum(request).output, expected)
            while True:
                window = threading.Semaphore(4)

                def requests() -> Iterator[Any]:
                    for request_id in range(200):
                        window.acquire()
                        one = client.message("EinsumRequest")
                        one.CopyFrom(request)
                        one.request_id = request_id
                        yield one

                seen = set()
                for reply in client.stream(requests()):
                    if reply.HasField("error"):
                        raise Failed(f"in a stream: {reply.error.message}")
                    case.judge(reply.response.output)
                    seen.add(reply.response.request_id)
                    window.release()
                    yield
                if seen != set(range(200)):
                    raise Failed(f"a stream answered {len(seen)} of 200")

    def ring(self, rng: np.random.Generator) -> Iterator[None]:
        """A connection, a region and a ring, used for a while and given back."""
        path = self.site.client.call("ServerInfo").shared_memory.socket
        while True:
            request, expected = einsum_request(self.site, rng, NAME, 6)
            with Connection(path) as connection:
                region = connection.register(4 << 20)
                ring = connection.ring(region)
                size = expected[0].size * 2
                offset = share(request, region, size)

                def send() -> bytes:
                    completion = ring.project(request)
                    if completion.status:
                        raise Failed(f"by ring: {completion.text}")
                    return region.get(offset, size)

                try:
                    case = Known(send, expected)
                    for _ in range(300):
                        case.call()
                        yield
                finally:
                    ring.close()
                    case = send = None  # what they hold of the region

    def cancels(self, rng: np.random.Generator) -> Iterator[None]:
        dice = random.Random(int(rng.integers(1 << 30)))
        with Client(self.site.daemon.address, self.site.client.schema) as client:
            request, _ = einsum_request(self.site, rng, NAME, 200)
            while True:
                future = client.einsum_future(request)
                time.sleep(dice.random() * 0.004)
                future.cancel()
                yield
                with contextlib.suppress(grpc.RpcError):
                    client.einsum(request, timeout=dice.random() * 0.004)
                yield

    def nonsense(self, rng: np.random.Generator) -> Iterator[None]:
        """Bytes and fields that are refused, and connections that come to nothing."""
        allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND,
                   grpc.StatusCode.UNIMPLEMENTED}  # fmt: skip
        with Client(self.site.daemon.address, self.site.client.schema) as client:
            request, _ = einsum_request(self.site, rng, NAME, 2)
            good = request.SerializeToString()
            while True:
                bad = bytearray(good)
                for at in rng.integers(0, 64, 3):
                    bad[at] = int(rng.integers(256))
                cases = [("Einsum", bytes(bad)), ("Einsum", good[:-1]), ("Einsum", rng.bytes(300)),
                         ("OutputProject", good), ("Nothing", b"")]  # fmt: skip
                for method, payload in cases:
                    try:
                        client.raw(f"/{EINSUM}/{method}", payload)
                    except grpc.RpcError as error:
                        if error.code() not in allowed:
                            raise Failed(f"nonsense: {error.code()}: {error.details()}") from None
                    yield
                with Client(self.site.daemon.address, client.schema) as short_lived:
                    short_lived.health()
                yield

    def loads(self, rng: np.random.Generator) -> Iterator[None]:
        with Client(self.site.daemon.address, self.site.client.schema) as client:
            while True:
                client.load("second", name_prefix="rpc.", output_dim=256)
                yield from self.rest(20)
                client.load("second", name_prefix="rpc.", output_dim=256, replace=True)
                yield from self.rest(20)
                client.call("UnloadWeights", names=["rpc.*"])
                yield from self.rest(20)

    def reloads(self, rng: np.random.Generator) -> Iterator[None]:
        """Weights come and go; every third configuration is one that is refused."""
        daemon = self.site.daemon
        first = daemon.config["weights"]
        second = {"path": "second", "name_prefix": "hup.", "output_dim": 256}
        for weights, lanes in zip(cycle([first, [*first, second]]), cycle([2, 2, 3])):
            config = daemon.config | {"weights": weights, "lanes": lanes}
            daemon.config_path.write_text(json.dumps(config))
            ended = self.reload_ends()
            daemon.process.send_signal(signal.SIGHUP)
            wait_until(lambda ended=ended: self.reload_ends() != ended, 30, "the end of a reload")
            yield from self.rest(30)

    def reload_ends(self) -> tuple[float, float]:
        page = scrape(self.site.daemon)
        return tuple(page.value("einsumd_config_reloads_total", outcome=outcome)
                     for outcome in ("applied", "refused"))  # fmt: skip

    def scrapes(self, rng: np.random.Generator) -> Iterator[None]:
        while True:
            scrape(self.site.daemon)
            self.site.client.call("ServerInfo")
            yield from self.rest(10)

    def rest(self, turns: int) -> Iterator[None]:
        for _ in range(turns):
            if self.stop.wait(0.05):
                break
        yield

    def run_caller(self, name: str) -> None:
        try:
            for _ in getattr(self, name)(rng_for(name)):
                with self.lock:
                    self.done[name] += 1
                if self.stop.wait(PAUSE_S):
                    return
        except Exception as error:  # whatever it is, it is a finding
            with self.lock:
                self.failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            self.stop.set()

    CALLERS = ("unary", "unary", "project", "inference", "stream", "ring", "cancels", "nonsense",
               "loads", "reloads", "scrapes")  # fmt: skip

    # ---- the watch

    def sample(self) -> tuple[int, int, int]:
        """Resident bytes, descriptors, threads."""
        proc = Path(f"/proc/{self.site.daemon.process.pid}")
        resident = int((proc / "statm").read_text().split()[1]) * PAGE
        return resident, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))

    def probe(self, daemon: Daemon, seconds: float) -> subprocess.Popen:
        command = [EINSUMCTL, "--endpoint", daemon.address, "--json", "bench", "--rate", RATE,
                   "--duration", seconds, "--warmup", "0.2", "--tokens", "1,8",
                   "--weight", NAME]  # fmt: skip
        return subprocess.Popen([str(argument) for argument in command], stdout=subprocess.PIPE,
                                text=True, env=environment())  # fmt: skip

    def window(self, seconds: float) -> dict[str, float]:
        """p99 as the probe sees it, and medians of what was sampled meanwhile."""
        probes = [self.probe(daemon, seconds) for daemon in (self.site.daemon, self.control)]
        samples = []
        while any(probe.poll() is None for probe in probes):
            samples.append(self.sample())
            time.sleep(0.5)
        result, control = (json.loads(probe.stdout.read()) for probe in probes)
        if any(probe.returncode != 0 for probe in probes):
            with self.lock:
                self.failures.append(f"probe: {result}"[:300])
            return {}
        resident, fds, threads = (statistics.median(s) for s in zip(*samples, strict=True))
        return {"p99_us": result["latency_ns"]["p99"] / 1000,
                "p50_us": result["latency_ns"]["p50"] / 1000,
                "control_p99_us": control["latency_ns"]["p99"] / 1000, "resident": resident,
                "fds": fds, "threads": threads, "load": os.getloadavg()[0]}  # fmt: skip

    def run(self) -> dict[str, Any]:
        time.sleep(1)
        before = self.sample()
        threads = [threading.Thread(target=self.run_caller, args=(name,)) for name in self.CALLERS]
        for thread in threads:
            thread.start()
        length = max(2.0, self.seconds / 40)
        end = time.monotonic() + self.seconds
        windows = []
        while time.monotonic() + length / 2 < end and not self.stop.is_set():
            if not (window := self.window(length)):
                break
            windows.append(window)
            print(json.dumps(windows[-1]), file=sys.stderr, flush=True)
        self.stop.set()
        for thread in threads:
            thread.join(60)
        # Connections of callers that are gone are closed by and by.
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.sample()[1] <= before[1], 20)
        return {"before": before, "after": self.sample(), "windows": windows,
                "calls": dict(self.done), "failures": self.failures}  # fmt: skip


def cycle(values: list) -> Iterator[Any]:
    while True:
        yield from values


def slope(values: list[float]) -> float:
    """Theil and Sen's, a window: half of the windows may be anything."""
    pairs = [(b - a) / (j - i) for i, a in enumerate(values) for j, b in enumerate(values) if j > i]
    return statistics.median(pairs) if pairs else 0.0


def steady_growth(values: list[float]) -> float:
    """Over all windows, as the half that grows less would have it."""
    middle = len(values) // 2
    return min(slope(values[:middle]), slope(values[middle:])) * len(values)


def verdict(result: dict[str, Any], drift_max: float) -> tuple[dict[str, Any], list[str]]:
    windows = result["windows"]
    if not windows:
        return {}, result["failures"] or ["nothing was measured"]
    warm = windows[round(len(windows) * WARM_UP):]  # fmt: skip
    third = max(1, len(warm) // 3)
    growth = {key: steady_growth([w[key] for w in warm]) for key in ("resident", "fds", "threads")}
    thirds = warm[:third], warm[-third:]
    first, last = (statistics.median(w["p99_us"] / w["control_p99_us"] for w in part)
                   for part in thirds)  # fmt: skip
    summary = {
        "windows": len(windows), "calls": result["calls"],
        "resident_mib": round(statistics.median(w["resident"] for w in warm) / 2**20, 1),
        "resident_growth_mib": round(growth["resident"] / 2**20, 2),
        "fds_growth": round(growth["fds"], 2), "threads_growth": round(growth["threads"], 2),
        "fds_before_after": [result["before"][1], result["after"][1]],
        "threads_before_after": [result["before"][2], result["after"][2]],
        "p99_us_first_last": [round(statistics.median(w["p99_us"] for w in part))
                              for part in thirds],
        "control_p99_us_first_last": [round(statistics.median(w["control_p99_us"] for w in part))
                                      for part in thirds],
        "drift_percent": round(100 * (last / first - 1), 1),
        "load_average": round(statistics.median(w["load"] for w in warm), 1),
    }  # fmt: skip
    wrong = list(result["failures"])
    if growth["resident"] > GROWTH * warm[0]["resident"]:
        wrong.append("resident memory grows")
    if growth["fds"] > 2 or result["after"][1] > result["before"][1]:
        wrong.append("descriptors grow")
    if growth["threads"] > 1:
        wrong.append("threads grow")
    if last > first * (1 + drift_max / 100):
        wrong.append(f"p99 drifts by more than {drift_max} %")
    return summary, wrong


def main() -> int:
    arguments = argparse.ArgumentParser(prog="tests/soak.sh")
    arguments.add_argument("--seconds", type=float, default=600)
    arguments.add_argument("--drift", type=float, default=10, metavar="PERCENT")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="everything that was measured")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="einsumd-soak-") as directory:
        shared = f"unix:{directory}/shared.sock"
        with start(Path(directory), shared_memory_listen=shared, http_listen="127.0.0.1:0",
                   lanes=2, batches=5) as site:  # fmt: skip
            weights = {TENSOR_NAME.format(i): oracle.random_weight(rng_for(f"second {i}"), 4, 256, 512)
                       for i in range(4)}  # fmt: skip
            write_checkpoint(site.root / "second", weights)
            config = {key: site.daemon.config[key] for key in ("weights", "weights_roots", "ropes")}
            with Daemon(Path(directory) / "control", lanes=2, batches=5, **config) as control:
                result = Soak(site, control, given.seconds).run()
    summary, wrong = verdict(result, given.drift)
    if given.json:
        given.json.write_text(json.dumps(result | {"summary": summary, "wrong": wrong}, indent=1))
    print(json.dumps(summary, indent=1))
    print("soak: " + ("; ".join(wrong) if wrong else "passed"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
