"""A daemon under valgrind's memcheck, from start to drain, by way of nearly everything that it does:
nothing is decided by memory that was never written, and nothing is lost. No suppressions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoints import write_checkpoint
from client import Client
from daemon import Daemon, default_scale
from test_allocations import PHASES, WEIGHTS, Serve

VALGRIND = ["valgrind", "--leak-check=full", "--errors-for-leak-kinds=definite",
            "--show-leak-kinds=definite", "--error-exitcode=99"]  # fmt: skip

# Many tokens of the CPU's kernels take minutes there.
LEFT_OUT = {"cut", "flood"}


@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
@pytest.mark.skipif(default_scale() < 1, reason="sanitizers and valgrind exclude each other")
def test_a_daemon_under_memcheck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_allocations.CALL_S", 120)
    write_checkpoint(tmp_path / "root/model", WEIGHTS, shards=2)
    report = tmp_path / "report"
    daemon = Daemon(
        tmp_path / "daemon",
        wait=False,
        wrapper=[*VALGRIND, f"--log-file={report}"],
        weights_roots=[str(tmp_path / "root")],
        weights=[{"path": "model", "output_dim": 256}],
        ropes=[{"weights": "*", "theta": 10000}],
        http_listen="127.0.0.1:0",
        shared_memory_listen=f"unix:{tmp_path}/shared.sock",
        batch_tokens_max=64,
        deadline_ms_max=200_000,
        request_log="all",
        trace_endpoint="http://127.0.0.1:1/v1/traces",
        trace_sample=1,
    )
    daemon.wait_event("ready", 180)
    daemon.wait_ready()
    with Client(daemon.address) as client:
        serve = Serve(client, daemon)
        for phase in PHASES:
            if phase not in LEFT_OUT:
                getattr(serve, phase)()
    daemon.terminate()
    code = daemon.wait_exit(180)
    assert code == 0, report.read_text()
    assert "ERROR SUMMARY: 0 errors" in report.read_text()
