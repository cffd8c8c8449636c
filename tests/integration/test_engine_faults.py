"""An engine that fails at each stage, is lost, is slow, or hangs (engine_faulty.c): callers are told
what DESIGN.md promises and nothing that is wrong, and the daemon goes on, or ends as documented."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from client import HEALTH, Client
from conftest import Site, small_weights, start_site
from daemon import EINSUMD_FAULTS, Daemon, seconds, wait_until
from scrape import ask, scrape
from shared_memory import Connection, share
from test_supervisor import Supervisor

EXIT_DEVICE_LOST, EXIT_HUNG = 3, 4
WATCHDOG_MS = round(seconds(0.5) * 1000)


class Faults:
    """The file that the engine reads."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self.file = directory / "faults"
        self.environment = {"ENGINE_FAULTS": str(self.file)}
        self.set()

    def set(self, *lines: str) -> None:
        written = self.file.with_suffix(".new")
        written.write_text("\n".join(lines))
        written.rename(self.file)  # whole, or not at all


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return Faults(tmp_path)


def start(directory: Path, faults: Faults, environment: dict[str, str] = {}, **config: Any) -> Site:
    defaults: dict[str, Any] = {"http_listen": "127.0.0.1:0", "watchdog_ms": WATCHDOG_MS}
    return start_site(
        directory, small_weights(), 256, engine="null", program=EINSUMD_FAULTS,
        extra_environment=faults.environment | environment, **defaults | config,
    )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, faults: Faults) -> Iterator[Site]:
    """Stopped and judged, unless the test has seen it end."""
    site = start(tmp_path, faults)
    with site.client:
        yield site
    faults.set()
    if site.daemon.process.poll() is None:
        site.daemon.stop()


def code_of(call: Any) -> StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def ended(daemon: Daemon, code: int) -> None:
    assert daemon.wait_exit() == code, daemon.log


def ready_is(site: Site, text: str) -> None:
    answer = ask(site.daemon, "/readyz")
    assert (answer.status, answer.text) == (200 if text == "ready" else 503, f"{text}\n")


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["open 13", "open 8", "weight_load 13", "memory_alloc 8"])
def test_a_start_that_fails(tmp_path: Path, faults: Faults, stage: str) -> None:
    faults.set(stage)
    with pytest.raises(AssertionError) as caught:
        start(tmp_path, faults)
    said = str(caught.value)
    assert "(exit code 1)" in said or "(exit code None)" in said
    assert "cannot start" in said and f"injected: {stage.split()[0]}" in said
    assert "stopped" in said, "it did not tidy up"


def test_a_load_that_fails(site: Site, faults: Faults, rng: np.random.Generator) -> None:
    before = site.client.call("ListWeights")
    faults.set("weight_load 13")
    call = lambda: site.client.load("model", name_prefix="b.", output_dim=256)  # noqa: E731
    assert code_of(call) == StatusCode.INTERNAL
    assert site.client.call("ListWeights") == before
    site.check_serves(rng)
    faults.set()
    assert len(site.client.load("model", name_prefix="b.", output_dim=256)[-1].weights) == 2
    site.check_serves(rng)


def test_batches_that_fail(site: Site, faults: Faults, rng: np.random.Generator) -> None:
    """INTERNAL is of that batch alone."""
    faults.set("batch 13")
    request, _ = site.good_case(rng)
    for _ in range(8):
        assert code_of(lambda: site.client.einsum(request)) == StatusCode.INTERNAL
    replies = list(site.client.stream([request, request]))
    assert [reply.error.code for reply in replies] == [StatusCode.INTERNAL.value[0]] * 2
    assert not any(reply.response.output for reply in replies)
    large, _ = site.good_case(rng, 1200)  # in parts
    assert code_of(lambda: site.client.einsum(large)) == StatusCode.INTERNAL
    ready_is(site, "ready")
    faults.set()
    site.check_serves(rng)
    assert scrape(site.daemon).total("einsumd_requests_total", code="INTERNAL") == 11


def test_a_batch_that_fails_of_a_ring(tmp_path: Path, faults: Faults, rng: Any) -> None:
    site = start(tmp_path, faults, shared_memory_listen=f"unix:{tmp_path}/shared")
    with site.daemon, site.client, Connection(f"{tmp_path}/shared") as connection:
        region = connection.register()
        ring = connection.ring(region)
        request, _ = site.good_case(rng)
        share(request, region, 3 * 4 * 256 * 2)
        faults.set("batch 13")
        assert ring.project(request).status == StatusCode.INTERNAL.value[0]
        faults.set()
        assert ring.project(request).status == 0
        ring.close()


def test_the_device_is_lost(site: Site, faults: Faults, rng: np.random.Generator) -> None:
    """Whoever is in flight or waits is told, health turns, and it ends with 3."""
    faults.set("batch slow 200")
    request, _ = site.good_case(rng, 100)
    calls = [site.client.einsum_future(request) for _ in range(24)]
    time.sleep(0.1)
    watch_request = site.client.message("grpc.health.v1.HealthCheckRequest", service="")
    watch = site.client.callable(HEALTH, "Watch")(watch_request, timeout=seconds(30))
    assert next(watch).status == 1
    faults.set("batch 14")
    codes = {call.code() for call in calls}
    assert codes <= {StatusCode.OK, StatusCode.UNAVAILABLE} and StatusCode.UNAVAILABLE in codes
    assert next(watch).status == 2
    ended(site.daemon, EXIT_DEVICE_LOST)
    assert '"reason":"device lost"' in site.daemon.log


# ---- the watchdog --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["batch hang", "submit hang"])
def test_what_hangs_is_given_up(
    site: Site, faults: Faults, rng: np.random.Generator, fault: str
) -> None:
    """Not ready, with the reason; callers hear of it by their deadlines or by its end, with 4."""
    site.check_serves(rng)
    request, _ = site.good_case(rng)
    faults.set(fault)
    started = time.monotonic()
    patient = site.client.einsum_future(request, seconds(60))
    hasty = Client(site.daemon.address, site.client.schema)
    late = hasty.einsum_future(request, seconds(0.2))
    wait_until(lambda: site.daemon.process.poll() is not None or not is_ready(site), 20)
    assert site.daemon.process.poll() is None, site.daemon.log
    assert time.monotonic() - started >= 0.9 * WATCHDOG_MS / 1000
    assert "hang" in ask(site.daemon, "/readyz").text
    assert late.code() == StatusCode.DEADLINE_EXCEEDED
    if fault == "batch hang":
        assert hasty.health() == 2
        assert code_of(lambda: hasty.einsum(request)) == StatusCode.UNAVAILABLE
    ended(site.daemon, EXIT_HUNG)
    assert patient.code() == StatusCode.UNAVAILABLE
    hasty.close()
    log = site.daemon.log
    assert "given up" in log
    if fault == "batch hang":
        hung = next(e for e in site.daemon.events if e["msg"] == "a batch does not come back")
        assert (hung["tokens"], hung["requests"], hung["bucket"]) == (3, 1, 4)
        assert hung["weight"] == next(iter(site.weights)) and hung["kernel"] == "auto"
    else:
        hung = next(e for e in site.daemon.events if e["msg"] == "a thread does not go on")
        assert "hangs" in hung["what"]


def is_ready(site: Site) -> bool:
    return ask(site.daemon, "/readyz").status == 200


def test_what_goes_on_after_all(site: Site, faults: Faults, rng: np.random.Generator) -> None:
    request, expected = site.good_case(rng)
    faults.set("batch hang")
    call = site.client.einsum_future(request, seconds(30))
    wait_until(lambda: not is_ready(site))
    assert site.client.health() == 2
    faults.set()
    assert len(call.result().output) == 3 * 4 * 256 * 2
    wait_until(lambda: is_ready(site))
    assert site.client.health() == 1
    assert "what hung goes on" in site.daemon.log
    site.check_serves(rng)


def test_slow_is_not_hung(site: Site, faults: Faults, rng: np.random.Generator) -> None:
    """Batches of nearly watchdog_ms each, that wait for one another much longer."""
    faults.set(f"batch slow {WATCHDOG_MS * 6 // 10}")
    request, _ = site.good_case(rng, 300)
    calls = [site.client.einsum_future(request, seconds(60)) for _ in range(5)]
    while not all(call.done() for call in calls):
        ready_is(site, "ready")
        time.sleep(WATCHDOG_MS / 4000)
    assert all(call.code() == StatusCode.OK for call in calls)
    faults.set()
    site.check_serves(rng)
    assert "come back" not in site.daemon.log


def test_no_watch(tmp_path: Path, faults: Faults, rng: np.random.Generator) -> None:
    site = start(tmp_path, faults, watchdog_ms=0)
    with site.daemon, site.client:
        faults.set("batch hang")
        call = site.client.einsum_future(site.good_case(rng)[0], seconds(30))
        time.sleep(3 * WATCHDOG_MS / 1000)
        ready_is(site, "ready")
        faults.set()
        assert call.code() == StatusCode.OK


def test_hung_while_draining(site: Site, faults: Faults, rng: np.random.Generator) -> None:
    """A drain waits for what is in flight, but not for what never ends."""
    faults.set("batch hang")
    call = site.client.einsum_future(site.good_case(rng)[0], seconds(60))
    time.sleep(0.1)
    site.daemon.terminate()
    ended(site.daemon, EXIT_HUNG)
    assert call.code() == StatusCode.UNAVAILABLE


def test_the_supervisor_hears_nothing_of_what_hangs(
    tmp_path: Path, faults: Faults, rng: np.random.Generator
) -> None:
    supervisor = Supervisor(tmp_path / "supervisor")
    environment = supervisor.environment | {"WATCHDOG_USEC": str(800 * WATCHDOG_MS)}
    with supervisor.socket:
        site = start(tmp_path, faults, environment)
        with site.client:
            supervisor.wait_for("WATCHDOG")
            faults.set("batch hang")
            call = site.client.einsum_future(site.good_case(rng)[0], seconds(60))
            wait_until(lambda: not is_ready(site))
            supervisor.rest()
            heard = len(supervisor.heard)
            time.sleep(0.6 * WATCHDOG_MS / 1000)  # more than a message's time, less than the end's
            assert len(supervisor.rest()) == heard
            faults.set()
            assert call.code() == StatusCode.OK
            supervisor.wait_for("WATCHDOG")
        site.daemon.stop()
