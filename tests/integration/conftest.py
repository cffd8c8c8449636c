"""Fixtures that the test files share: seeded randomness, and a small daemon with its weights.

Environment:
    EINSUMD_BUILD_DIR   where einsumd and einsumctl were built; default build/release
    EINSUMD_TEST_SCALE  below 1 for slow builds: fewer cases, longer waits; default 1, or 0.2 if
                        the build has a sanitizer
    EINSUMD_TEST_ENGINE the daemon's "engine" key; default "cpu"
    EINSUM_SEED         of all random values; printed, so that a failure can be had again
    EINSUM_CASES        random cases of test_numbers.py, before scaling; default 40
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest

import oracle
import python_package
from checkpoints import TENSOR_NAME, write_checkpoint
from client import Client, make_request
from daemon import BUILD_DIR, EINSUMD, SCALE, Daemon
from inference import FORMATS

SEED = int(os.environ.get("EINSUM_SEED", time.time_ns() % 1_000_000))


def pytest_report_header() -> str:
    return f"EINSUM_SEED={SEED} EINSUMD_TEST_SCALE={SCALE} EINSUMD_BUILD_DIR={BUILD_DIR}"


def pytest_sessionstart() -> None:
    if not EINSUMD.exists():
        pytest.exit(f"{EINSUMD} does not exist: build it, or set EINSUMD_BUILD_DIR", 2)


def rng_for(what: str) -> np.random.Generator:
    """Independent of which other tests run."""
    return np.random.default_rng([SEED, zlib.crc32(what.encode())])


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return rng_for(request.node.nodeid.rsplit("/", 1)[-1])


@dataclass
class Site:
    """A daemon, what it serves, and one client of it."""

    daemon: Daemon
    client: Client
    root: Path
    weights: dict[str, oracle.Weight] = field(default_factory=dict)

    def request(self, name: str, activations: oracle.Activations, /, **options: Any) -> Any:
        return make_request(self.client, name, self.weights[name], activations, **options)

    def expected(
        self, activations: oracle.Activations, weight: oracle.Weight, kernel: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the oracle makes of a request to this daemon that asks for `kernel`."""
        return oracle.project(activations, weight, self.client.sums_by_wgmma(kernel))

    def good_request(self, rng: np.random.Generator, /, tokens: int = 3, **options: Any) -> Any:
        """An ordinary one, for the first weight."""
        name = next(iter(self.weights))
        activations = oracle.random_activations(rng, self.weights[name], tokens, "UE8M0")
        return self.request(name, activations, **options)

    def good_case(
        self, rng: np.random.Generator, /, tokens: int = 3, **options: Any
    ) -> tuple[Any, tuple[np.ndarray, np.ndarray]]:
        """An ordinary one, and what the oracle makes of it."""
        name, weight = next(iter(self.weights.items()))
        activations = oracle.random_activations(rng, weight, tokens, "UE8M0")
        request = self.request(name, activations, **options)
        return request, self.expected(activations, weight, options.get("kernel", ""))

    def check_serves(self, rng: np.random.Generator, client: Client | None = None) -> None:
        """The daemon answers an ordinary request, and rightly."""
        name, weight = next(iter(self.weights.items()))
        activations = oracle.random_activations(rng, weight, 3, "UE8M0")
        reply = (client or self.client).einsum(self.request(name, activations))
        oracle.check(reply.output, "BF16", *self.expected(activations, weight))


def start_site(
    directory: Path, weights: dict[str, oracle.Weight], output_dim: int, **config: Any
) -> Site:
    """Writes a checkpoint to directory/root/model and starts a daemon that serves it."""
    root = directory / "root"
    model = write_checkpoint(root / "model", weights, shards=2)
    daemon = Daemon(
        directory,
        weights_roots=[str(root)],
        weights=[{"path": str(model), "output_dim": output_dim}],
        **config,
    )
    try:
        client = Client(daemon.address)
    except BaseException:
        daemon.kill()
        raise
    return Site(daemon, client, root, weights)


@contextlib.contextmanager
def serving(
    directory: Path, weights: dict[str, oracle.Weight], output_dim: int, **config: Any
) -> Iterator[Site]:
    """A site for as long as it is needed; then its daemon is stopped and judged."""
    site = start_site(directory, weights, output_dim, **config)
    with site.daemon, site.client:
        yield site


def small_weights(layers: int = 2) -> dict[str, oracle.Weight]:
    rng = rng_for("small weights")
    return {
        TENSOR_NAME.format(layer): oracle.random_weight(rng, groups=4, output_dim=256,
                                                        reduced_dim=512)
        for layer in range(layers)
    }  # fmt: skip


@pytest.fixture(scope="session")
def einsumd() -> Any:
    """The Python package, as pip installs it."""
    return python_package.einsumd()


SITES = ("small", "slow", "site", "models")


@pytest.fixture(autouse=True)
def daemons_alive(request: pytest.FixtureRequest) -> None:
    """Once a module's daemon has died, its other tests say so, and no more."""
    for name in request.fixturenames:
        site = request.getfixturevalue(name) if name in SITES else None
        if site and site.daemon.process.poll() is not None:
            pytest.fail("the daemon of this module has died; see the first failure", pytrace=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two layers of G 4, D 256, R 512, shared by a module's tests."""
    with serving(tmp_path_factory.mktemp("small"), small_weights(), 256) as site:
        yield site


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Weights of several formats, for the tests of the Open Inference Protocol."""
    rng = rng_for("models")
    weights = {
        name: oracle.random_weight(rng, groups, 256, reduced_dim, block_d, block_r, scales)
        for name, (groups, reduced_dim, block_d, block_r, scales) in FORMATS.items()
    }
    with serving(tmp_path_factory.mktemp("models"), weights, 256) as site:
        yield site
