"""A checkpoint's files against their SHA-256, as sha256sum lists them: at start, by LoadWeights, and by
einsumctl. What is another file is refused, by name, and what was served goes on."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Iterator

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from checkpoints import write_checkpoint
from conftest import Site, serving, small_weights
from daemon import EINSUMCTL, Daemon, run


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serving(tmp_path, small_weights(), 256) as made:
        yield made


def sha256sum(folder: Path, *options: str) -> Path:
    """Written by the tool itself."""
    files = sorted(each.name for each in folder.glob("*.safetensors"))
    made = subprocess.run(["sha256sum", *options, *files], cwd=folder, capture_output=True, check=True)
    (folder / "SHA256SUMS").write_bytes(made.stdout)
    return folder / "SHA256SUMS"


def load(site: Site, sums: Path) -> list:
    return site.client.load(
        site.root / "model", replace=True, output_dim=256, checksums=str(sums)
    )


def refused(site: Site, sums: Path, code: StatusCode, *texts: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        load(site, sums)
    assert caught.value.code() == code, caught.value.details()
    for text in texts:
        assert text in caught.value.details(), caught.value.details()


def shards(site: Site) -> list[Path]:
    found = sorted((site.root / "model").glob("*.safetensors"))
    assert len(found) == 2
    return found


@pytest.mark.parametrize("options", [(), ("--binary",)])
def test_right_sums(site: Site, rng: np.random.Generator, options: tuple[str, ...]) -> None:
    replies = load(site, sha256sum(site.root / "model", *options))
    total = sum(each.stat().st_size for each in shards(site))
    assert replies[-1].bytes_done == replies[-1].bytes_total > total  # the files, then the tensors
    assert {each.generation for each in replies[-1].weights} == {2}
    site.check_serves(rng)


def test_a_bit_on_the_disk(site: Site, rng: np.random.Generator) -> None:
    sums = sha256sum(site.root / "model")
    for shard in shards(site):
        right = shard.read_bytes()
        turned = bytearray(right)
        turned[-100] ^= 0x01
        shard.write_bytes(turned)
        expected = [line for line in sums.read_text().splitlines() if shard.name in line][0][:64]
        refused(site, sums, StatusCode.DATA_LOSS, f"model/{shard.name}: expected SHA-256 {expected}")
        shard.write_bytes(right)
        site.check_serves(rng)
    assert {each.generation for each in site.client.call("ListWeights").weights} == {1}
    load(site, sums)


def test_lists_that_are_none(site: Site, tmp_path: Path) -> None:
    sums = sha256sum(site.root / "model")
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text(lines[0])
    refused(site, sums, StatusCode.FAILED_PRECONDITION, shards(site)[1].name, "has no SHA-256 there")
    for text, says in (
        ("hello\n", "line 1: expected 64 hexadecimal digits"),
        (lines[0] + "x" * 64 + "  a\n", "line 2: expected 64"),
        (lines[0] + lines[0], "line 2"),
        (lines[0][:64] + "  \n", "line 1"),
        ("\0" * 70, "not text"),
        (lines[0] * 20000, "not text"),
    ):
        sums.write_text(text)
        refused(site, sums, StatusCode.FAILED_PRECONDITION, "SHA256SUMS", says)
    refused(site, site.root / "nothing", StatusCode.NOT_FOUND)
    (tmp_path / "outside").write_text("".join(lines))
    refused(site, tmp_path / "outside", StatusCode.PERMISSION_DENIED)


def test_einsumctl(site: Site) -> None:
    sums = sha256sum(site.root / "model")
    arguments = (
        EINSUMCTL, "--endpoint", site.client.address, "weights", "load", site.root / "model",
        "--replace", "--output-dim", "256", "--sha256sums", sums,
    )  # fmt: skip
    assert run(*arguments).returncode == 0
    sums.write_text(sums.read_text().replace(sums.read_text()[:4], "0000", 1))
    made = run(*arguments)
    assert made.returncode != 0 and "expected SHA-256 0000" in made.stderr


def test_at_start(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "root/model", small_weights(), shards=2)
    sums = sha256sum(model)
    config = {
        "weights_roots": [str(tmp_path / "root")],
        "weights": [{"path": "model", "output_dim": 256, "checksums": "model/SHA256SUMS"}],
    }
    with Daemon(tmp_path / "good", **config):
        pass
    sums.write_text("f" * 64 + sums.read_text()[64:])
    daemon = Daemon(tmp_path / "bad", wait=False, **config)
    event = daemon.wait_event("cannot start")
    assert daemon.process.wait(30) == 1
    assert event["status"] == "DATA_LOSS" and "expected SHA-256 ffff" in event["reason"]
