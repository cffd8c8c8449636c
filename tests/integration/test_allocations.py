"""Out of memory, descriptors or threads at every place in turn that asks for any: while the daemon
starts, serves and drains. It does not crash, answers nothing that is wrong, and answers what comes
next. A place is a chain of callers (fail_allocations.c), found by running the same without faults.

Failed in turn are all places of einsumd's own code, and those of the libraries that report failure:

    jansson, protobuf-c, libmicrohttpd, libcurl, libsystemd    report it, and so do we
    libuv         reports it, but for the table of what its loop watches: ABORTS
    OpenSSL       by libcurl, at start alone: 685 places, of which some are tried unless
                  EINSUM_ALLOCATIONS=all

Not failed is what is asked for by gRPC, its helpers (upb, abseil, re2, c-ares) and C++'s `new`:
gpr_malloc and `new` abort the process when the system has nothing left, and no caller is asked.
Nor are there limits that would help: the daemon's own (docs/operator.md, sizing) are what keeps it
from there. The supervisor starts it again. And nothing fails before main(): constructors (the CUDA
runtime's, which registers kernels) have nobody to tell.

EINSUM_ALLOCATIONS: "all" for every place; default: every place of ours, some of the libraries'.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator

import grpc
import numpy as np
import pytest
from grpc import StatusCode

import inference
import oracle
from checkpoints import write_checkpoint
from client import HEALTH, INFERENCE, Client, make_request
from conftest import rng_for, small_weights
from daemon import BUILD_DIR, Daemon, default_scale, seconds
from fail_allocations import Allocations, Site, build_shim
from oracle_attention import Rope, activations_of, random_attention
from scrape import ask
from shared_memory import Connection, Refused, share

ALL = os.environ.get("EINSUM_ALLOCATIONS") == "all"
WEIGHTS = small_weights()
NAME, WEIGHT = next(iter(WEIGHTS.items()))
CALL_S = 20
FAILURES = 2  # of a place, one after the other

# libuv's, at start: the table of what its loop watches, and its threads.
ABORTS = {("libuv.so.1", "realloc"), ("libuv.so.1", "pthread_create")}

# What callers may be told of it.
REFUSALS = {StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE}


def sanitizer() -> str:
    cache = (BUILD_DIR / "CMakeCache.txt").read_text()
    return next((s for s in ("thread", "address") if f"EINSUMD_SANITIZE:STRING={s}" in cache), "")


pytestmark = pytest.mark.skipif(
    sanitizer() == "thread", reason="ThreadSanitizer's own allocator must be the only one"
)


class Place:
    """What daemons of this file have in common, and one of them at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = folder / "root"
        self.model = write_checkpoint(self.root / "model", WEIGHTS, shards=2)
        self.shim = build_shim(folder)
        self.schema: Any = None
        self.starts = 0

    def start(self, prepare: Callable[[Allocations], None], **options: Any) -> Any:
        self.starts += 1
        folder = self.folder / f"daemon{self.starts}"
        folder.mkdir()
        allocations = Allocations(self.shim, folder / "control")
        prepare(allocations)
        daemon = Daemon(
            folder,
            extra_environment=allocations.environment,
            weights_roots=[str(self.root)],
            weights=[{"path": "model", "output_dim": 256}],
            ropes=[{"weights": "*", "theta": 10000}],
            listen=["127.0.0.1:0"],
            http_listen="127.0.0.1:0",
            shared_memory_listen=f"unix:{folder}/shared.sock",
            request_log="all",
            trace_endpoint="http://127.0.0.1:1/v1/traces",
            trace_sample=1,
            batch_tokens_max=64,
            drain_grace_ms=2000,
            **options,
        )
        return daemon, allocations

    def client(self, daemon: Daemon) -> Client:
        client = Client(daemon.address, self.schema)
        self.schema = client.schema
        return client


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("allocations"))


def chosen(sites: list[Site]) -> list[Site]:
    """Ours, and of each library what there is time for."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.owner, []).append(site)
    picked = []
    for owner, group in groups.items():
        most = len(group) if ALL else {"einsumd": 1000}.get(owner, 25)
        if default_scale() < 1 and not ALL:
            most = {"einsumd": 40}.get(owner, 4)
        rng = rng_for(f"sites of {owner}")
        indices = sorted(rng.permutation(len(group))[:most])
        picked += [group[i] for i in indices]
    return picked


def report(what: str, sites: list[Site], tried: list[Site], failures: list[str]) -> None:
    owners: dict[str, list[int]] = {}
    for site in sites:
        owners.setdefault(site.owner, [0, 0])[0] += 1
    for site in tried:
        owners[site.owner][1] += 1
    counts = ", ".join(f"{owner} {n} of {of}" for owner, (of, n) in sorted(owners.items()))
    print(f"{what}: {len(tried)} of {len(sites)} places: {counts}")
    assert not failures, f"{len(failures)} of {len(tried)}:\n" + "\n\n".join(failures)


# ---- start ---------------------------------------------------------------------------------------


def start_without(place: Place, site: Site) -> str:
    """What was wrong with a start at which the site failed; "": nothing."""
    daemon, allocations = place.start(lambda each: each.fail(site), wait=False)
    try:
        daemon.wait_event("ready", 20)
    except AssertionError:
        code = daemon.process.wait(1)
        said = daemon.log.strip().split("\n")[-1] if daemon.log else ""
        if code == 1 and '"cannot start"' in daemon.log and '"stopped"' in daemon.log:
            return "" if "reason" in daemon.log else "no reason"
        if code == 1 and '"cannot start"' in said:
            return ""
        if code == 2 and "einsumd: " in said:
            return ""
        if code == -signal.SIGABRT and (site.owner, site.what) in ABORTS:
            return ""
        return f"exit code {code}, having said\n{daemon.log[-3000:]}"
    # It can do without, or has tried again.
    try:
        daemon.wait_ready()
        with place.client(daemon) as client:
            Serve(client, daemon).unary()
        daemon.stop()
    except (AssertionError, grpc.RpcError) as error:
        daemon.process.kill()
        return f"{error}"
    return ""  # a helper thread's site may be another's this time


def test_start(place: Place) -> None:
    daemon, allocations = place.start(lambda each: each.record())
    allocations.off()
    sites = allocations.sites()
    with place.client(daemon) as client:
        Serve(client, daemon).unary()
    daemon.stop()
    tried = chosen(sites)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda site: start_without(place, site), tried))
    failures = [f"{site.named()}: {wrong}" for site, wrong in zip(tried, results) if wrong]
    report("start", sites, tried, failures)


# ---- serve ---------------------------------------------------------------------------------------


def einsum_of(client: Client, tokens: int) -> Any:
    rng = rng_for(f"allocations {tokens}")
    return make_request(
        client, NAME, WEIGHT, oracle.random_activations(rng, WEIGHT, tokens, "UE8M0")
    )


class Serve:
    """Phases of serving. Each raises what callers are told if they are refused, and AssertionError
    if something is wrong; answers are those of the first time, bit for bit."""

    answers: dict[str, bytes] = {}

    def __init__(self, client: Client, daemon: Daemon):
        self.client, self.daemon = client, daemon

    def same(self, what: str, output: bytes) -> None:
        assert output == self.answers.setdefault(what, output), f"a wrong answer: {what}"

    def unary(self) -> None:
        rng = rng_for("allocations 3")
        activations = oracle.random_activations(rng, WEIGHT, 3, "UE8M0")
        reply = self.client.einsum(einsum_of(self.client, 3), seconds(CALL_S))
        if "unary" not in self.answers:
            oracle.check(reply.output, "BF16", *oracle.project(activations, WEIGHT))
        self.same("unary", reply.output)

    def cut(self) -> None:
        reply = self.client.einsum(einsum_of(self.client, 200), seconds(CALL_S))
        self.same("cut", reply.output)

    def flood(self) -> None:
        """More than there are batches for, so that some wait and outputs are copied out of them."""
        request = einsum_of(self.client, 60)
        calls = [self.client.einsum_future(request, seconds(CALL_S)) for _ in range(8)]
        refused = None
        for call in calls:
            try:
                answer = call.result().output
                self.answers.setdefault("flood", answer)
                assert oracle.same_but_for_rounding(answer, self.answers["flood"])
            except grpc.RpcError as error:
                refused = error
        if refused:
            raise refused

    def stream(self) -> None:
        replies = self.client.stream(
            [einsum_of(self.client, tokens) for tokens in (3, 5, 90)], seconds(CALL_S)
        )
        for i, reply in enumerate(replies):
            if reply.HasField("error"):
                code = StatusCode.RESOURCE_EXHAUSTED.value[0]
                assert reply.error.code == code, reply.error
            else:
                self.same(f"{len(reply.response.output)} bytes", reply.response.output)

    def project(self) -> None:
        rng = rng_for("allocations of attention")
        attention = random_attention(rng, 4, WEIGHT.groups * WEIGHT.reduced_dim // 512)
        request = self.client.message(
            "OutputProjectRequest", weight=NAME, output_type="OUTPUT_TYPE_BF16", tokens=4,
            attention=attention.tobytes(), positions=np.arange(4, dtype=np.int64).tobytes(),
        )  # fmt: skip
        method = self.client.callable("einsum.v1.Einsum", "OutputProject")
        self.same("project", method(request, timeout=seconds(CALL_S)).output)

    def infer(self) -> None:
        activations = oracle.random_activations(rng_for("allocations 3"), WEIGHT, 3, "UE8M0")
        case = inference.Case(scale_datatype="UINT8", activation_layout="TGR")
        request = inference.make_infer(self.client, NAME, activations, case)
        self.same("infer", inference.infer(self.client, request, seconds(CALL_S)).raw_output_contents[0])
        listed = inference.infer(self.client, inference.listed(request), seconds(CALL_S))
        self.same("infer", listed.raw_output_contents[0])

    def models(self) -> None:
        for method, fields in (
            ("ServerLive", {}), ("ServerReady", {}), ("ServerMetadata", {}),
            ("ModelReady", {"name": NAME}), ("ModelMetadata", {"name": NAME}),
            ("ModelConfig", {"name": NAME}), ("ModelStatistics", {}), ("RepositoryIndex", {}),
        ):  # fmt: skip
            if method in self.client.schema.pool.FindServiceByName(INFERENCE).methods_by_name:
                inference.call(self.client, method, seconds(CALL_S), **fields)

    def ring(self) -> None:
        path = self.daemon.config["shared_memory_listen"].removeprefix("unix:")
        with Connection(path) as connection:
            region = connection.register(1 << 20)
            ring = connection.ring(region, 8)
            try:
                for tokens in (3, 90):
                    request = einsum_of(self.client, tokens)
                    size = tokens * WEIGHT.groups * WEIGHT.output_dim * 2
                    at = share(request, region, size)
                    completion = ring.project(request)
                    assert completion.status in (0, StatusCode.RESOURCE_EXHAUSTED.value[0])
                    if completion.status == 0:
                        self.same(f"{size} bytes", region.get(at, size))
            finally:
                ring.close()

    def shared(self) -> None:
        path = self.daemon.config["shared_memory_listen"].removeprefix("unix:")
        with Connection(path) as connection:
            region = connection.register(1 << 20)
            request = einsum_of(self.client, 3)
            size = 3 * WEIGHT.groups * WEIGHT.output_dim * 2
            at = share(request, region, size)
            self.client.einsum(request, seconds(CALL_S))
            self.same("unary", region.get(at, size))

    def weights(self) -> None:
        """Loaded under another name, listed, used, unloaded; what failed leaves nothing behind."""
        call = self.client.call
        before = {weight.name for weight in call("ListWeights", seconds(CALL_S)).weights}
        try:
            call("LoadWeights", seconds(CALL_S), path="model", output_dim=256, name_prefix="again.")
            request = einsum_of(self.client, 3)
            request.weight = f"again.{NAME}"
            self.same("unary", self.client.einsum(request, seconds(CALL_S)).output)
        finally:
            for _ in range(FAILURES + 1):
                with contextlib.suppress(grpc.RpcError):
                    call("UnloadWeights", seconds(CALL_S), names=["again.*"])
        after = {weight.name for weight in call("ListWeights", seconds(CALL_S)).weights}
        assert after == before

    def models_loaded(self) -> None:
        request = self.client.schema.message("inference.RepositoryModelLoadRequest")
        method = self.client.callable(INFERENCE, "RepositoryModelLoad")
        message = request(model_name=NAME)
        inference.set_parameters(message.parameters, {"path": "model", "output_dim": 256})
        method(message, timeout=seconds(CALL_S))

    def self_test(self) -> None:
        results = self.client.call("SelfTest", seconds(CALL_S)).results
        assert results and all(result.passed for result in results)

    def info(self) -> None:
        assert self.client.call("ServerInfo", seconds(CALL_S)).kernels

    def health(self) -> None:
        request = self.client.message("grpc.health.v1.HealthCheckRequest", service="")
        assert self.client.callable(HEALTH, "Check")(request, timeout=seconds(CALL_S)).status == 1
        watch = self.client.callable(HEALTH, "Watch")(request, timeout=seconds(CALL_S))
        assert next(watch).status == 1
        watch.cancel()
        if "List" in self.client.schema.pool.FindServiceByName(HEALTH).methods_by_name:
            message = self.client.message("grpc.health.v1.HealthListRequest")
            self.client.callable(HEALTH, "List")(message, timeout=seconds(CALL_S))

    def reflection(self) -> None:
        with Client(self.daemon.address) as client:
            assert "einsum.v1.Einsum" in client.schema.database.get_services()

    def http(self) -> None:
        for path in ("/metrics", "/readyz", "/livez", "/buildinfo"):
            try:
                answer = ask(self.daemon, path)
            except IndexError:
                raise ConnectionError("closed without an answer") from None
            assert answer.status in (200, 500), answer.body

    def connect(self) -> None:
        with contextlib.closing(grpc.insecure_channel(
            self.daemon.address,
            [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)],
        )) as channel:  # fmt: skip
            request = self.client.message("grpc.health.v1.HealthCheckRequest").SerializeToString()
            channel.unary_unary(f"/{HEALTH}/Check")(request, timeout=seconds(CALL_S))


PHASES = ["unary", "cut", "flood", "stream", "project", "infer", "models", "ring", "shared", "weights",
          "models_loaded", "self_test", "info", "health", "reflection", "http", "connect"]  # fmt: skip


def serve_without(serve: Serve, phase: str, allocations: Allocations, site: Site) -> str:
    """What was wrong while, and after, the site failed in the phase."""
    allocations.fail(site, FAILURES)
    wrong = ""
    try:
        getattr(serve, phase)()
    except grpc.RpcError as error:
        if error.code() not in REFUSALS:
            wrong = f"{error.code()}: {error.details()}"
    except Refused as error:
        if error.status != StatusCode.RESOURCE_EXHAUSTED.value[0]:
            wrong = str(error)
    except (ConnectionError, BrokenPipeError):
        pass
    except AssertionError as error:
        wrong = str(error)
    failed = allocations.failed
    allocations.off()
    if serve.daemon.process.poll() is not None:
        return f"died with {serve.daemon.process.poll()}:\n{serve.daemon.log[-3000:]}"
    try:
        getattr(serve, phase)()
    except Exception as error:  # whatever it is, it should not be
        wrong = f"{wrong}; afterwards {error!r}"
    return wrong if failed or wrong else ""


@pytest.mark.parametrize("phase", PHASES)
def test_serve(place: Place, phase: str) -> None:
    daemon, allocations = place.start(lambda each: each.off())
    with place.client(daemon) as client:
        serve = Serve(client, daemon)
        getattr(serve, phase)()
        # A second time finds what the first has left: that is what failing will find.
        sites: dict[int, Site] = {}
        for _ in range(2):
            allocations.record()
            getattr(serve, phase)()
            allocations.off()
            sites |= {site.hash: site for site in allocations.sites()}
        found = list(sites.values())
        tried = chosen(found)
        failures = []
        for site in tried:
            wrong = serve_without(serve, phase, allocations, site)
            if wrong:
                failures.append(f"{site.named()}: {wrong}")
            if daemon.process.poll() is not None:
                break
    if not failures:
        daemon.stop()
    elif daemon.process.poll() is None:
        daemon.kill()
    report(phase, found, tried, failures)


# ---- drain ---------------------------------------------------------------------------------------


def drained_under(place: Place, site: Site | None) -> tuple[str, list[Site]]:
    """With a watch, a stream that is open and a ring. What was wrong, and where it allocated."""
    daemon, allocations = place.start(lambda each: each.off())
    with place.client(daemon) as client:
        Serve(client, daemon).unary()
        health = client.message("grpc.health.v1.HealthCheckRequest", service="")
        watch = client.callable(HEALTH, "Watch")(health, timeout=seconds(CALL_S))
        assert next(watch).status == 1
        stream = client.stream(iter([einsum_of(client, 3)]), seconds(CALL_S))
        next(stream)
        path = daemon.config["shared_memory_listen"].removeprefix("unix:")
        connection = Connection(path)
        ring = connection.ring(connection.register(1 << 20), 8)
        allocations.fail(site, FAILURES) if site else allocations.record()
        daemon.terminate()
        try:
            code = daemon.wait_exit()
        except subprocess.TimeoutExpired:
            code = "none: it hangs"
        allocations.off()
        ring.close()
        connection.close()
        watch.cancel()
    wrong = "" if code == 0 else f"exit code {code}:\n{daemon.log[-3000:]}"
    if code != 0 and daemon.process.poll() is None:
        daemon.kill()
    return wrong, allocations.sites()


def test_drain(place: Place) -> None:
    wrong, sites = drained_under(place, None)
    assert not wrong, wrong
    tried = chosen(sites)
    failures = []
    for site in tried:
        wrong, _ = drained_under(place, site)
        if wrong:
            failures.append(f"{site.named()}: {wrong}")
    report("drain", sites, tried, failures)
