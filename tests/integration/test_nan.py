"""NaN in outputs: counted, one request in nan_sample, by whether it came with the request; told once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest

import oracle
from conftest import Site, rng_for, serving, small_weights
from daemon import ENGINE
from scrape import scrape
from shared_memory import Connection, share
from test_output_project import Projection, output_project
from test_output_project import start as start_output_project

BATCH = 8
SOUND, BROKEN = list(small_weights())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    weights = small_weights()
    weights[BROKEN].values[1, 5, 7] = 0x7F  # NaN, in the checkpoint
    with serving(
        tmp_path, weights, 256, nan_sample=1, http_listen="127.0.0.1:0", batch_tokens_max=BATCH,
        shared_memory_listen=f"unix:{tmp_path}/shared.sock",
    ) as made:  # fmt: skip
        yield made


def counts(site: Site) -> tuple[int, int, int]:
    """Looked at, NaN of the request's own, other NaN."""
    page = scrape(site.daemon)
    return (
        int(page.value("einsumd_nan_looked_total")),
        int(page.value("einsumd_nan_outputs_total", cause="input")),
        int(page.value("einsumd_nan_outputs_total", cause="other")),
    )


def make(
    site: Site, name: str = SOUND, tokens: int = 3, scales: str = "UE8M0", nan: str = "", **options: Any
) -> Any:
    activations = oracle.random_activations(rng_for("nan"), site.weights[name], tokens, scales)
    if nan == "activations":
        activations.values[tokens - 1, 2, 300] = 0xFF
    elif nan == "scales":
        activations.scales[tokens - 1, 2, 1] = 0xFF if scales == "UE8M0" else np.nan
    return site.request(name, activations, **options)


@pytest.mark.parametrize("nan", ["activations", "scales"])
@pytest.mark.parametrize("scales", ["UE8M0", "FP32"])
def test_that_came_with_the_request(site: Site, nan: str, scales: str) -> None:
    site.client.einsum(make(site, scales=scales))
    assert counts(site) == (1, 0, 0)
    expected = 0
    for output_type in oracle.OUTPUT_TYPES:
        for activation_layout in oracle.ACTIVATION_LAYOUTS:
            for scale_layout in oracle.SCALE_LAYOUTS:
                site.client.einsum(make(
                    site, scales=scales, nan=nan, output_type=output_type,
                    activation_layout=activation_layout, scale_layout=scale_layout,
                ))  # fmt: skip
                expected += 1
                assert counts(site) == (1 + expected, expected, 0)
    (event,) = [each for each in site.daemon.events if each["msg"] == "NaN in an output"]
    assert (event["weight"], event["cause"]) == (SOUND, "input")


def test_that_did_not(site: Site) -> None:
    """A weight that holds NaN stands for a kernel that makes one."""
    site.client.einsum(make(site, BROKEN))
    list(site.client.stream([make(site, BROKEN), make(site)]))
    assert counts(site) == (3, 0, 2)
    (event,) = [each for each in site.daemon.events if each["msg"] == "NaN in an output"]
    assert (event["weight"], event["cause"]) == (BROKEN, "other")
    assert event["elements"] == 3  # one output of each token


def test_of_requests_that_are_cut(site: Site) -> None:
    site.client.einsum(make(site, tokens=3 * BATCH, nan="activations"))
    assert counts(site) == (3, 1, 0)  # by its parts


@pytest.mark.skipif(ENGINE != "cpu", reason="the host's own view of a region")
def test_of_rings(site: Site) -> None:
    socket = site.client.call("ServerInfo").shared_memory.socket
    with Connection(socket) as connection:
        region = connection.register()
        ring = connection.ring(region)
        for name, nan in ((SOUND, ""), (SOUND, "scales"), (BROKEN, "")):
            request = make(site, name, nan=nan)
            share(request, region, 3 * 4 * 256 * 2)
            assert ring.project(request).status == 0
        ring.close()
    assert counts(site) == (3, 1, 1)


def test_of_attention(tmp_path: Path, rng: np.random.Generator) -> None:
    with start_output_project(tmp_path, nan_sample=1, http_listen="127.0.0.1:0") as made:
        for value in (None, 0x7FC0, 0xFF80):  # NaN, -infinity
            projection = Projection(rng)
            if value is not None:
                projection.attention[1, 3, 100] = value
            output_project(made.client, projection.request(made.client))
        assert counts(made) == (3, 2, 0)


def test_one_in_so_many_and_none(tmp_path: Path) -> None:
    for sample, looked in ((4, 3), (0, 0)):
        with serving(
            tmp_path / str(sample), small_weights(1), 256, nan_sample=sample,
            http_listen="127.0.0.1:0",
        ) as made:  # fmt: skip
            for _ in range(12):
                made.client.einsum(make(made, nan="scales"))
            assert counts(made) == (looked, looked, 0)
