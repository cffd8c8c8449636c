"""Disks that fail, files that change under the reader, a log that nobody takes, a wall clock that
jumps: a load fails with a reason, and the daemon lives, serves, and measures as before."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import pytest
from grpc import StatusCode

import oracle
from checkpoints import TENSOR_NAME, write_checkpoint
from client import HEALTH, Client
from conftest import Site, rng_for, serving, small_weights
from daemon import Daemon, run, seconds, wait_until
from scrape import ask, scrape

PATIENCE_S = 20


class System:
    """The file that break_system.c reads."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        shim = directory / "break_system.so"
        source = Path(__file__).with_name("break_system.c")
        built = run("cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o", shim, source)
        assert built.returncode == 0, built.stderr
        self.file = directory / "broken"
        self.environment = {
            "LD_PRELOAD": str(shim),
            "BREAK_SYSTEM": str(self.file),
            "ASAN_OPTIONS": f"{os.environ.get('ASAN_OPTIONS', '')}:verify_asan_link_order=0",
        }
        self.heal()

    def breaks(self, how: str) -> None:
        written = self.file.with_suffix(".new")
        written.write_text(how)
        written.rename(self.file)

    def heal(self) -> None:
        self.breaks("")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return System(tmp_path_factory.mktemp("system"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, system: System) -> Iterator[Site]:
    with serving(
        tmp_path_factory.mktemp("site"), small_weights(), 256,
        extra_environment=system.environment, http_listen="127.0.0.1:0",
    ) as site:  # fmt: skip
        yield site


@pytest.fixture
def healed(system: System) -> Iterator[System]:
    yield system
    system.heal()


WEIGHTS = {
    TENSOR_NAME.format(i): oracle.random_weight(rng_for("weights of faults"), 4, 256, 512)
    for i in range(4)
}


@pytest.fixture
def model(site: Site) -> Iterator[Path]:
    """A checkpoint that nobody has loaded yet."""
    folder = site.root / "model-b"
    write_checkpoint(folder, WEIGHTS, shards=2)
    yield folder
    names = [weight.name for weight in site.client.call("ListWeights").weights]
    if any(name.startswith("b.") for name in names):
        site.client.call("UnloadWeights", names=["b.*"])
    shutil.rmtree(folder, ignore_errors=True)


def load(site: Site, model: Path) -> Any:
    return site.client.load(model, output_dim=256, name_prefix="b.")


def load_fails(site: Site, model: Path, rng: np.random.Generator, *codes: StatusCode) -> str:
    """With one of the codes and a reason, leaving nothing; serving goes on. The reason."""
    before = site.client.call("ListWeights")
    with pytest.raises(grpc.RpcError) as caught:
        load(site, model)
    assert caught.value.code() in codes, f"{caught.value.code()}: {caught.value.details()}"
    assert site.client.call("ListWeights") == before
    site.check_serves(rng)
    return caught.value.details()


def check_loaded(site: Site, rng: np.random.Generator) -> None:
    for name, weight in WEIGHTS.items():
        activations = oracle.random_activations(rng, weight, 3, "UE8M0")
        site.weights[f"b.{name}"] = weight
        reply = site.client.einsum(site.request(f"b.{name}", activations))
        del site.weights[f"b.{name}"]
        oracle.check(reply.output, "BF16", *site.expected(activations, weight))


# ---- files ---------------------------------------------------------------------------------------


def test_short_reads(site: Site, healed: System, model: Path, rng: np.random.Generator) -> None:
    healed.breaks("short")
    load(site, model)
    check_loaded(site, rng)


@pytest.mark.parametrize(
    "how, codes, text",
    [
        (f"read {errno.EIO}", [StatusCode.DATA_LOSS], "Input/output error"),
        (f"open {errno.EIO}", [StatusCode.FAILED_PRECONDITION], "Input/output error"),
        (f"open {errno.EACCES}", [StatusCode.PERMISSION_DENIED], "Permission denied"),
        (f"open {errno.EMFILE}", [StatusCode.RESOURCE_EXHAUSTED], "Too many open files"),
        (f"open {errno.ENFILE}", [StatusCode.RESOURCE_EXHAUSTED], "Too many open files"),
        ("fault", [StatusCode.DATA_LOSS], "model-"),
    ],
)
def test_a_disk_that_fails(
    site: Site,
    healed: System,
    model: Path,
    rng: np.random.Generator,
    how: str,
    codes: list[StatusCode],
    text: str,
) -> None:
    healed.breaks(how)
    assert text in load_fails(site, model, rng, *codes)
    healed.heal()
    load(site, model)
    check_loaded(site, rng)


def test_files_cut_short_anywhere(site: Site, model: Path, rng: np.random.Generator) -> None:
    """After the length, in the header, in the data; and the index likewise."""
    for file in (model / "model-00001-of-00002.safetensors", model / "model.safetensors.index.json"):
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little") if file.suffix == ".safetensors" else 40
        for size in {0, 1, 7, 8, header // 2, header, (header + len(whole)) // 2, len(whole) - 1}:
            file.write_bytes(whole[:size])
            said = load_fails(site, model, rng, StatusCode.FAILED_PRECONDITION)
            assert file.name in said, f"cut to {size}: {said}"
        file.write_bytes(whole)
    load(site, model)
    check_loaded(site, rng)


def test_replaced_by_renaming(
    site: Site, healed: System, model: Path, rng: np.random.Generator
) -> None:
    """What was open when another took its name is read to its end: all old, nothing mixed."""
    file = model / "model-00001-of-00002.safetensors"
    other = model.parent / "other"
    other.write_bytes(b"nothing that anybody could read")
    healed.breaks(f"hook mv -f {other} {file}")
    try:
        load(site, model)
    except grpc.RpcError as error:  # it had yet to be opened
        assert error.code() == StatusCode.FAILED_PRECONDITION, error.details()
        assert file.name in error.details()
    else:
        healed.heal()
        check_loaded(site, rng)
    site.check_serves(rng)


def test_its_folder_vanishes(
    site: Site, healed: System, model: Path, rng: np.random.Generator
) -> None:
    healed.breaks(f"hook rm -rf {model}")
    said = load_fails(site, model, rng, StatusCode.FAILED_PRECONDITION, StatusCode.NOT_FOUND)
    assert "model-" in said
    healed.heal()
    load_fails(site, model, rng, StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION)


def test_a_start_on_a_failing_disk(tmp_path: Path, healed: System) -> None:
    root = tmp_path / "root"
    write_checkpoint(root / "model", small_weights())
    for how in (f"read {errno.EIO}", "fault", f"open {errno.EACCES}"):
        healed.breaks(how)
        daemon = Daemon(
            tmp_path, extra_environment=healed.environment, wait=False,
            weights_roots=[str(root)], weights=[{"path": "model", "output_dim": 256}],
        )  # fmt: skip
        assert daemon.wait_exit() == 1, daemon.log
        assert "cannot start" in daemon.log and "stopped" in daemon.log


# ---- a log that nobody takes ---------------------------------------------------------------------


def start_logging_to(directory: Path, redirection: str, **config: Any) -> tuple[Daemon, str]:
    """A daemon whose standard error goes elsewhere, and its address."""
    directory.mkdir(parents=True, exist_ok=True)
    write_checkpoint(directory / "root/model", small_weights())
    daemon = Daemon(
        directory, wait=False, wrapper=["sh", "-c", f'exec "$@" {redirection}', "sh"],
        listen=[f"unix:{directory}/e.sock"], http_listen=f"unix:{directory}/h.sock",
        weights_roots=[str(directory / "root")], weights=[{"path": "model", "output_dim": 256}],
        request_log="all", **config,
    )  # fmt: skip
    daemon.http_address = f"unix:{directory}/h.sock"
    wait_until((directory / "e.sock").exists, PATIENCE_S)
    return daemon, f"unix:{directory}/e.sock"


def check_serves_without_a_log(daemon: Daemon, address: str, lines: int) -> None:
    """Many times as many requests as a pipe has room for lines, at full speed."""
    weights = small_weights()
    with Client(address) as client:
        site = Site(daemon, client, Path(), weights)
        rng = rng_for("no log")
        site.check_serves(rng)
        request = site.good_request(rng)
        started = time.monotonic()
        for _ in range(lines):
            client.einsum(request)
        assert time.monotonic() - started < seconds(lines / 50), "it waits for the log"
        dropped = scrape(daemon).value("einsumd_log_lines_dropped_total")
    assert dropped >= lines / 2
    daemon.terminate()
    assert daemon.wait_exit() == 0


def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    daemon, address = start_logging_to(tmp_path, "2>/dev/full")
    check_serves_without_a_log(daemon, address, 100)


def test_a_log_whose_reader_is_gone(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    daemon, address = start_logging_to(tmp_path, f"2>{fifo}")
    os.close(reader)
    check_serves_without_a_log(daemon, address, 100)


def test_a_log_whose_reader_does_not_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    daemon, address = start_logging_to(tmp_path, f"2>{fifo}", log_level="debug")
    check_serves_without_a_log(daemon, address, 600)
    text = b""
    while piece := os.read(reader, 1 << 16):
        text += piece
    os.close(reader)
    assert re.fullmatch(rb"(\{[^\n]*\}\n)+", text), "a line is torn"


# ---- the wall clock ------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [6 * 3600, -6 * 3600, 40 * 365 * 86400])
def test_a_clock_that_jumps(
    site: Site, healed: System, rng: np.random.Generator, jump: int
) -> None:
    """No deadline, timer or figure follows the wall clock; the log's own time does."""
    before = scrape(site.daemon)
    request = site.client.message("grpc.health.v1.HealthCheckRequest", service="")
    watch = site.client.callable(HEALTH, "Watch")(request, timeout=seconds(PATIENCE_S))
    assert next(watch).status == 1
    stream = site.client.stream(iter([site.good_request(rng)] * 3), seconds(PATIENCE_S))
    next(stream)

    healed.breaks(f"clock {jump}")
    site.check_serves(rng)
    assert len(list(stream)) == 2
    with Client(site.daemon.address, site.client.schema) as client:  # a new connection, too
        site.check_serves(rng, client)
        started = time.monotonic()
        late = client.einsum_future(site.good_request(rng, 200), seconds(PATIENCE_S))
        assert late.code() == StatusCode.OK
        assert time.monotonic() - started < seconds(5)
    assert site.client.call("SelfTest").passed

    def told() -> list[dict]:
        return [event for event in site.daemon.events if event["msg"] == "weights not loaded"]

    told_before = len(told())
    with pytest.raises(grpc.RpcError):
        site.client.load("not-there")
    wait_until(lambda: len(told()) > told_before)
    line = told()[-1]
    shown = datetime.fromisoformat(line["ts"].replace("Z", "+00:00")).timestamp()
    assert abs(shown - time.time() - jump) < 600, "the clock did not jump: this shows nothing"
    after = scrape(site.daemon)
    uptime = "einsumd_uptime_seconds"
    assert 0 <= after.value(uptime) - before.value(uptime) < seconds(30)
    duration = "einsumd_request_duration_seconds_sum"
    assert after.total(duration) - before.total(duration) < seconds(30)
    assert ask(site.daemon, "/readyz").status == 200

    healed.heal()  # and back
    site.check_serves(rng)
    assert not watch.done()
    watch.cancel()


def test_a_drain_while_the_clock_jumps(tmp_path: Path, healed: System) -> None:
    with serving(
        tmp_path, small_weights(), 256, extra_environment=healed.environment, lame_duck_ms=400
    ) as site:
        healed.breaks("clock 100000")
        started = time.monotonic()
        site.daemon.terminate()
        time.sleep(0.1)
        healed.breaks("clock -100000")
        assert site.daemon.wait_exit() == 0
        assert 0.35 < time.monotonic() - started < seconds(10)
