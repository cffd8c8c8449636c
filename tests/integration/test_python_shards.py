"""Several daemons as one, from Python: groups sharded over them, answers joined, errors named."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest

import oracle
from checkpoints import TENSOR_NAME, write_checkpoint
from conftest import small_weights
from daemon import Daemon
from python_package import arrays
from test_python_client import BF16, EQUATION, NAME, good


@contextlib.contextmanager
def daemons(folder: Path, ranks: list[tuple[int, int]], **config: Any) -> Iterator[list[Daemon]]:
    """One daemon for each (rank, size), all from one checkpoint."""
    root = folder / "root"
    model = write_checkpoint(root / "model", small_weights())
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Daemon(
                    folder / str(i),
                    listen=[f"unix:{folder}/{i}.sock"],
                    weights_roots=[str(root)],
                    weights=[
                        {
                            "path": str(model),
                            "output_dim": 256,
                            "tensor_parallel_rank": rank,
                            "tensor_parallel_size": size,
                        }
                    ],
                    **config,
                )  # fmt: skip
            )
            for i, (rank, size) in enumerate(ranks)
        ]


def stop(daemon: Daemon) -> None:
    """Every thread of it: until the last one has stopped, an answer may still come."""
    daemon.process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{daemon.process.pid}/task")
    until = time.monotonic() + 10
    while any("State:\tT" not in (task / "status").read_text() for task in tasks.iterdir()):
        assert time.monotonic() < until, "the daemon does not stop"
        time.sleep(0.001)


@pytest.mark.parametrize(
    "ranks", [[(0, 2), (1, 2)], [(1, 2), (0, 2)], [(0, 1), (0, 1)], [(0, 1)] * 3],
    ids=["ranks", "ranks, the other way round", "whole", "three whole"],
)  # fmt: skip
def test_groups_over_daemons(
    einsumd: Any, tmp_path: Path, rng: np.random.Generator, ranks: list[tuple[int, int]]
) -> None:
    weight = small_weights()[NAME]
    with daemons(tmp_path, ranks) as found:
        endpoints = [daemon.address for daemon in found]
        with einsumd.Client(endpoints, shard="groups") as client:
            assert client.weight(NAME).groups == 4
            for tokens in (1, 5):
                for layouts in (("TGR", "TGK"), ("GTR", "packed GKT"), ("TGR 2-D", "TGK 2-D")):
                    activations = oracle.random_activations(rng, weight, tokens, "UE8M0")
                    copies = einsumd.copies()
                    out = np.empty((tokens, 4, 256), BF16)
                    a, s = arrays(activations, *layouts)
                    einsumd.fp8_einsum(EQUATION, (a, s), (client.weight(NAME), None), out)
                    oracle.check(out.tobytes(), "BF16", *oracle.project(activations, weight))
                    # Of group-major tensors only the outputs are joined, of one token nothing.
                    if tokens == 1:
                        assert einsumd.copies() == copies
                    elif layouts[0] == "GTR":
                        assert einsumd.copies() == copies + len(ranks)
            part = weight.slice(1, 3)
            activations = oracle.random_activations(rng, part, 3, "FP32")
            out = np.empty((3, 2, 256), np.float32)
            client.einsum(f"{NAME}[1:3]", *arrays(activations, "GTR", "GKT"), out)
            oracle.check(out.tobytes(), "FP32", *oracle.project(activations, part))


def test_shards_are_asked_at_once(einsumd: Any, tmp_path: Path) -> None:
    """Two daemons that never answer time out together, and both are named."""
    with daemons(tmp_path, [(0, 2), (1, 2)]) as found:
        with einsumd.Client([d.address for d in found], shard="groups", attempts=1) as client:
            tensors = good(np.random.default_rng(1))
            client.einsum(NAME, **tensors)
            for daemon in found:
                stop(daemon)
            begin = time.monotonic()
            with pytest.raises(einsumd.DeadlineExceeded) as caught:
                client.einsum(NAME, **tensors, timeout=1)
            elapsed = time.monotonic() - begin
            for daemon in found:
                daemon.process.send_signal(signal.SIGCONT)
            assert elapsed < 1.9
            assert all(daemon.address in str(caught.value) for daemon in found)


def test_an_error_of_one_names_its_endpoint(einsumd: Any, tmp_path: Path) -> None:
    with daemons(tmp_path, [(0, 2), (1, 2)]) as found:
        endpoints = [daemon.address for daemon in found]
        with einsumd.Client(endpoints, shard="groups", attempts=1) as client:
            tensors = good(np.random.default_rng(1))
            client.einsum(NAME, **tensors)
            client.daemons[1].unload(NAME)
            with pytest.raises(einsumd.NotFound) as caught:
                client.einsum(NAME, **tensors)
            assert caught.value.endpoint == endpoints[1] and endpoints[0] not in str(caught.value)
            found[0].terminate()
            found[0].wait_exit()
            with pytest.raises(einsumd.Unavailable) as caught:
                client.einsum(TENSOR_NAME.format(1), **tensors)
            assert caught.value.endpoint == endpoints[0]


def test_shards_that_do_not_add_up(einsumd: Any, tmp_path: Path) -> None:
    with daemons(tmp_path, [(0, 2), (0, 2)]) as found:
        endpoints = [daemon.address for daemon in found]
        with einsumd.Client(endpoints, shard="groups") as client:
            with pytest.raises(einsumd.FailedPrecondition, match="expected ranks 0 to 1 of 2"):
                client.weight(NAME)
        for wrong in ({"endpoint": endpoints}, {"endpoint": endpoints[0], "shard": "groups"}):
            with pytest.raises(einsumd.InvalidArgument, match="shard"):
                einsumd.Client(**wrong)


def test_load_over_daemons(einsumd: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    """Each gets its share of the groups."""
    weight = small_weights()[NAME]
    with daemons(tmp_path, [(0, 1), (0, 1)]) as found:
        with einsumd.Client([d.address for d in found], shard="groups") as client:
            client.unload("*")
            (handle,) = client.load(
                str(tmp_path / "root/model"), [f"{NAME}.weight"], output_dim=256
            )
            assert handle.groups == 4
            held = [daemon.weight(NAME) for daemon in client.daemons]
            assert [(w.groups, w.tensor_parallel_rank) for w in held] == [(2, 0), (2, 1)]
            activations = oracle.random_activations(rng, weight, 3, "UE8M0")
            out = np.empty((3, 4, 256), BF16)
            client.einsum(handle, *arrays(activations, "GTR", "TGK"), out)
            oracle.check(out.tobytes(), "BF16", *oracle.project(activations, weight))
