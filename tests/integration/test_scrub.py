"""Weights in memory: a bit turned over in a running daemon is found, the weight read again, and where that
cannot be, it is not served, and everybody who asks is told."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import Iterator

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from client import INFERENCE
from conftest import Site, serving, small_weights
from daemon import ENGINE, default_scale, wait_until
from inference import call
from scrape import scrape

pytestmark = pytest.mark.skipif(ENGINE != "cpu", reason="the weights must lie in host memory")

NAMES = list(small_weights())
SERVING, NOT_SERVING = 1, 2


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serving(
        tmp_path, small_weights(), 256, scrub_seconds=1, http_listen="127.0.0.1:0"
    ) as made:
        yield made


def panel_bytes(values: np.ndarray) -> bytes:
    """How kernels/cpu lays out the first group's first 16 rows: pairs of columns, row beside row."""
    return values[0, :16].reshape(16, -1, 2).swapaxes(0, 1).tobytes()


def turn_bit(pid: int, pattern: bytes) -> int:
    """Turns a bit in the middle of where the process has this; returns in how many places that is."""
    found = 0
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            begin, end, mode, inode = re.match(
                r"(\w+)-(\w+) (\S+) \w+ \S+ (\d+)", line
            ).groups()  # fmt: skip
            if not mode.startswith("rw") or inode != "0" or "[" in line:
                continue
            first = int(begin, 16)
            memory.seek(first)
            with contextlib.suppress(OSError):
                at = memory.read(int(end, 16) - first).find(pattern)
                if at >= 0:
                    memory.seek(first + at + len(pattern) // 2)
                    memory.write(bytes([pattern[len(pattern) // 2] ^ 0x20]))
                    found += 1
    return found


searches_memory = pytest.mark.skipif(
    default_scale() < 1, reason="a sanitizer's memory is too large to search, and keeps what was freed"
)


def damage(site: Site, name: str) -> None:
    assert turn_bit(site.daemon.process.pid, panel_bytes(site.weights[name].values)) == 1


@searches_memory
def test_a_turned_bit_is_mended(site: Site, rng: np.random.Generator) -> None:
    damage(site, NAMES[0])
    event = site.daemon.wait_event("weight damaged in memory")
    assert event["name"] == NAMES[0] and event["expected_crc32c"] != event["got_crc32c"]
    assert site.daemon.wait_event("damaged weight read again")["name"] == NAMES[0]
    site.check_serves(rng)
    assert site.client.health(NAMES[0]) == SERVING
    weights = {each.name: each for each in site.client.call("ListWeights").weights}
    assert [weights[name].generation for name in NAMES] == [2, 1]
    assert not any(each.damaged for each in weights.values())


def figures(site: Site) -> dict[str, float]:
    page = scrape(site.daemon)
    return {
        name: page.value(f"einsumd_{name}")
        for name in ("weights_damaged", "scrub_damaged_total", "scrub_reread_total",
                     "scrub_bytes_total", "scrub_passes_total")
    }  # fmt: skip


@searches_memory
def test_what_cannot_be_mended_is_not_served(
    site: Site, rng: np.random.Generator, tmp_path: Path
) -> None:
    name, other = NAMES
    request = site.good_request(rng)
    shutil.move(site.root / "model", tmp_path / "elsewhere")
    damage(site, name)
    site.daemon.wait_event("damaged weight not read again")
    with pytest.raises(grpc.RpcError) as caught:
        site.client.einsum(request)
    assert caught.value.code() == StatusCode.DATA_LOSS
    assert "is not served" in caught.value.details()
    assert site.client.health(name) == NOT_SERVING
    assert site.client.health(other) == site.client.health() == SERVING
    ready = {each: call(site.client, "ModelReady", name=each).ready for each in NAMES}
    assert ready == {name: False, other: True}
    index = site.client.callable(INFERENCE, "RepositoryIndex")(
        site.client.message("inference.RepositoryIndexRequest"), timeout=10
    )
    states = {each.name: (each.state, each.reason) for each in index.models}
    assert states == {name: ("UNAVAILABLE", "its copy in memory is damaged"), other: ("READY", "")}
    assert site.client.call("GetWeight", name=name).weight.damaged
    assert figures(site)["weights_damaged"] == 1

    # The checkpoint is back, and an operator does not wait for the next attempt.
    shutil.move(tmp_path / "elsewhere", site.root / "model")
    site.client.load(site.root / "model", replace=True, output_dim=256)
    site.check_serves(rng)
    assert site.client.health(name) == SERVING
    after = figures(site)
    assert (after["weights_damaged"], after["scrub_damaged_total"]) == (0, 1)
    assert after["scrub_reread_total"] == 0


def test_passes_are_counted_and_cost_nothing_else(site: Site, rng: np.random.Generator) -> None:
    wait_until(lambda: figures(site)["scrub_passes_total"] >= 2)
    found = figures(site)
    resident = sum(each.resident_bytes for each in site.client.call("ListWeights").weights)
    assert found["scrub_bytes_total"] >= 2 * resident
    assert found["scrub_damaged_total"] == 0
    site.check_serves(rng)


def test_off(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(tmp_path, small_weights(), 256, scrub_seconds=0, http_listen="127.0.0.1:0") as made:
        assert figures(made)["scrub_passes_total"] == 0
        made.check_serves(rng)


def test_health_of_weights(site: Site) -> None:
    """By any spelling, and NOT_FOUND as ever for what there is not."""
    assert site.client.health(f"model.{NAMES[0]}.weight") == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        site.client.health("layers.9.attn.wo_a")
    assert caught.value.code() == StatusCode.NOT_FOUND

