"""The page that Prometheus reads: right by its own tools, documented, and counting what happened."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from client import EINSUM
from conftest import Site, serving, small_weights
from daemon import BUILD_DIR, REPOSITORY, Daemon, count, seconds, wait_until
from scrape import OPENMETRICS, Page, ask, check_with_promtool, read_page, scrape

PHASES = ["receive", "queue", "copy_in", "kernel", "copy_out", "send"]
DOCUMENT = REPOSITORY / "deploy/METRICS.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(
        tmp_path_factory.mktemp("metrics"), small_weights(2), 256,
        http_listen="127.0.0.1:0", phase_sample=1,
    ) as site:  # fmt: skip
        yield site


class Since:
    """What was counted since this was made. The last replies may be counted a moment later."""

    def __init__(self, site: Site):
        self.site = site
        self.before = scrape(site.daemon)

    def wait(self, n: int, name: str, **labels: str) -> None:
        def grown() -> bool:
            return self.of(name, **labels) == n

        wait_until(grown, what=f"{name} {labels} grew by {n}")

    def of(self, name: str, **labels: str) -> float:
        return scrape(self.site.daemon).total(name, **labels) - self.before.total(name, **labels)


def einsum_all(site: Site, rng: np.random.Generator, n: int) -> None:
    request = site.good_request(rng)
    for future in [site.client.einsum_future(request) for _ in range(n)]:
        future.result()


def test_promtool_accepts(site: Site, rng: np.random.Generator) -> None:
    einsum_all(site, rng, 3)
    answer = ask(site.daemon, "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    check_with_promtool(answer.text)


def test_openmetrics(site: Site) -> None:
    """Asked for, it comes; strictly parsed, it says the same."""
    answer = ask(site.daemon, "/metrics", Accept=f"{OPENMETRICS},text/plain;version=0.0.4;q=0.5")
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    strict, plain = read_page(answer.text, openmetrics=True), scrape(site.daemon)
    assert strict.samples.keys() == plain.samples.keys()


def test_histograms_are_cumulative(site: Site, rng: np.random.Generator) -> None:
    einsum_all(site, rng, 5)
    page = scrape(site.daemon)
    series: dict[tuple, list[tuple[float, float]]] = {}
    for (name, labels), value in page.samples.items():
        if name.endswith("_bucket"):
            bound = float(dict(labels)["le"])
            rest = frozenset(pair for pair in labels if pair[0] != "le")
            series.setdefault((name.removesuffix("_bucket"), rest), []).append((bound, value))
    assert len(series) >= 10
    for (name, labels), buckets in series.items():
        buckets.sort()
        values = [value for _, value in buckets]
        assert values == sorted(values), name
        assert buckets[-1] == (float("inf"), page.samples[name + "_count", labels]), name
        if name.endswith("_seconds"):
            assert buckets[0][0] == 10e-6 and buckets[-2][0] == 10.0, name
            ratios = [b / a for (a, _), (b, _) in zip(buckets, buckets[1:]) if b <= 1.0]
            assert max(ratios) < 1.7, name


def test_requests_by_method_and_code(site: Site, rng: np.random.Generator) -> None:
    since = Since(site)
    einsum_all(site, rng, 4)
    for weight, tokens, code in (("none", 3, "NOT_FOUND"), ("", 3, "INVALID_ARGUMENT")):
        request = site.good_request(rng)
        request.weight = weight or request.weight
        request.tokens = tokens if weight else 2
        with pytest.raises(grpc.RpcError) as caught:
            site.client.einsum(request)
        assert caught.value.code().name == code
    assert len(list(site.client.stream([site.good_request(rng)] * 5))) == 5

    def ended(**labels: str) -> float:
        return since.of("einsumd_requests_total", **labels)

    assert ended(method="Einsum", transport="unary", code="OK") == 4
    assert ended(code="NOT_FOUND") == ended(code="INVALID_ARGUMENT") == 1
    assert ended(method="Einsum", transport="stream", code="OK") == 5
    assert ended() == since.of("einsumd_requests_received_total") == 11
    assert ended(method="OutputProject") == 0
    since.wait(11, "einsumd_request_duration_seconds_count", method="Einsum")
    since.wait(4, "einsumd_grpc_calls_total", method=f"/{EINSUM}/Einsum", code="OK")
    since.wait(1, "einsumd_grpc_calls_total", method=f"/{EINSUM}/EinsumStream", code="OK")
    for phase in ("queue", "copy_in", "kernel", "copy_out"):
        since.wait(9, "einsumd_request_phase_seconds_count", phase=phase)


def test_unknown_method_is_counted(site: Site) -> None:
    since = Since(site)
    for path in ("/einsum.v1.Einsum/None", "/a.b/C"):
        with pytest.raises(grpc.RpcError):
            site.client.raw(path, b"")
    since.wait(2, "einsumd_grpc_calls_total", method="_OTHER", code="UNIMPLEMENTED")


def test_phases_add_up(site: Site, rng: np.random.Generator) -> None:
    """Of requests that went well, nothing is left out and nothing counted twice."""
    since = Since(site)
    n = count(50)
    einsum_all(site, rng, n)
    list(site.client.stream([site.good_request(rng)] * n))
    since.wait(2 * n, "einsumd_request_phase_seconds_count", phase="send")
    whole = since.of("einsumd_request_duration_seconds_sum")
    parts = {p: since.of("einsumd_request_phase_seconds_sum", phase=p) for p in PHASES}
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(whole, rel=0.01)


def test_same_figures_as_server_info(site: Site, rng: np.random.Generator) -> None:
    einsum_all(site, rng, 3)
    info, page = site.client.call("ServerInfo"), scrape(site.daemon)
    counters = info.counters
    same = {
        "einsumd_requests_received_total": counters.requests,
        "einsumd_batches_total": counters.batches,
        "einsumd_batch_tokens_total": counters.batch_tokens,
        "einsumd_batch_padding_tokens_total": counters.batch_padding_tokens,
        "einsumd_batch_requests_sum": counters.batch_requests,
        "einsumd_batch_requests_count": counters.batches,
        "einsumd_connections": counters.connections,
        "einsumd_copied_bytes_total": counters.copied_in_bytes + counters.copied_out_bytes,
        "einsumd_graph_replays_total": counters.graph_replays,
        "einsumd_queue_requests_limit": info.limits.queue_requests_max,
    }
    for name, value in same.items():
        assert page.total(name) == value, name
    assert page.total("einsumd_requests_total", code="OK") == counters.answered
    assert page.total("einsumd_batch_phase_seconds_sum", phase="kernel") == pytest.approx(
        counters.kernel_ns / 1e9
    )
    assert page.value("einsumd_memory_bytes", kind="weights") == info.memory.weights_bytes
    assert page.value("einsumd_memory_bytes", kind="batches") == info.memory.batches_bytes
    assert page.value("einsumd_weights") == len(site.weights)
    for bucket, batches in zip(info.buckets, counters.bucket_batches):
        assert page.value("einsumd_batches_total", bucket=str(bucket)) == batches
    labels = dict(next(k for n, k in page.samples if n == "einsumd_build_info"))
    assert labels == {
        "version": info.version, "engine": info.engine,
        "device": info.device, "kernel": info.kernel,
    }  # fmt: skip
    assert 0 < page.value("einsumd_uptime_seconds") < 600


def test_batch_mix(tmp_path: Path, rng: np.random.Generator) -> None:
    """Requests that wait for company leave together: of how many weights, the page says."""
    with serving(
        tmp_path, small_weights(2), 256,
        http_listen="127.0.0.1:0", max_queue_delay_us=1_000_000, batch_requests_max=6,
    ) as site:  # fmt: skip
        before = Since(site)
        first, second = site.weights
        names = [first, second, first, second, first, first]
        requests = [site.good_request(rng) for _ in names]
        for request, name in zip(requests, names):
            request.weight = name
        futures = [site.client.einsum_future(request) for request in requests]
        batch = [future.result().batch for future in futures][0]
        assert batch.requests == 6
        assert before.of("einsumd_batch_requests_count") == 1
        assert before.of("einsumd_batch_requests_sum") == 6
        assert before.of("einsumd_batch_weights_sum") == 2
        assert before.of("einsumd_batches_total", bucket=str(batch.bucket)) == 1
        assert before.of("einsumd_batch_padding_tokens_total") == batch.bucket - batch.tokens


def test_queue_depth_and_rejections(tmp_path: Path, rng: np.random.Generator) -> None:
    """A queue that stands still can be looked at; past its limit the page says why."""
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0",
        max_queue_delay_us=1_000_000, queue_requests_max=3, calls_max=64,
    ) as site:  # fmt: skip
        request = site.good_request(rng, tokens=5)
        futures = [site.client.einsum_future(request) for _ in range(3)]
        wait_until(lambda: scrape(site.daemon).value("einsumd_queue_requests") == 3)
        page = scrape(site.daemon)
        assert page.value("einsumd_queue_tokens") == 15
        sent = len(request.activations) + len(request.activation_scales)
        assert 3 * sent <= page.value("einsumd_queue_bytes") <= 3 * sent + 6 * 64
        assert page.value("einsumd_requests_in_flight") == 3
        free = page.value("einsumd_batch_buffers") - page.value("einsumd_batch_buffers_free")
        assert free == 1
        with pytest.raises(grpc.RpcError) as caught:
            site.client.einsum(request)
        assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
        page = scrape(site.daemon)
        assert page.value("einsumd_rejected_total", reason="queue_requests") == 1
        assert page.total("einsumd_rejected_total") == 1
        assert page.total("einsumd_requests_total", code="RESOURCE_EXHAUSTED") == 1
        for future in futures:
            future.result()
        wait_until(lambda: scrape(site.daemon).value("einsumd_requests_in_flight") == 0)
        page = scrape(site.daemon)
        assert page.value("einsumd_queue_requests") == page.value("einsumd_queue_tokens") == 0
        assert page.value("einsumd_queue_bytes") == 0


def test_too_many_calls_are_counted(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(
        tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0",
        calls_max=2, rpc_threads=1, max_queue_delay_us=500_000,
    ) as site:  # fmt: skip
        request = site.good_request(rng)
        futures = [site.client.einsum_future(request) for _ in range(8)]
        codes = [future.exception().code() if future.exception() else None for future in futures]
        refused = codes.count(StatusCode.RESOURCE_EXHAUSTED)
        assert refused >= 1
        page = scrape(site.daemon)
        counted = page.value("einsumd_rejected_total", reason="calls")
        counted += page.value("einsumd_rejected_total", reason="connection_calls")
        assert counted == refused


def test_streams_and_connections(site: Site, rng: np.random.Generator) -> None:
    page = scrape(site.daemon)
    streams, connections = page.value("einsumd_streams"), page.value("einsumd_connections")
    go_on = threading.Event()

    def requests() -> Iterator[Any]:
        yield site.good_request(rng)
        go_on.wait(seconds(30))

    replies = site.client.stream(requests())
    next(replies)
    page = scrape(site.daemon)
    assert page.value("einsumd_streams") == streams + 1
    assert page.value("einsumd_connections") == connections
    go_on.set()
    assert not list(replies)
    wait_until(lambda: scrape(site.daemon).value("einsumd_streams") == streams)


def test_bucket_counters_have_no_gaps(site: Site) -> None:
    """What may happen is there before it has: rate() needs a first value."""
    page = scrape(site.daemon)
    for method in ("Einsum", "OutputProject"):
        for transport in ("unary", "stream", "ring"):
            assert page.has(
                "einsumd_requests_total", method=method, transport=transport, code="OK"
            )
    for reason in (
        "queue_requests", "queue_tokens", "queue_bytes", "gave_way", "calls", "connection_calls",
        "in_flight", "connection_in_flight", "metadata", "handshake", "not_http2",
        "connection_bytes", "transport_bytes", "connection_faults", "connection_backlog",
        "connection_stuck", "penalty",
        "draining",
    ):  # fmt: skip
        assert page.has("einsumd_rejected_total", reason=reason)


# --- the GPU --------------------------------------------------------------------------------------


def with_gpus(directory: Path, **environment: str) -> Daemon:
    """A daemon that takes the tests' stand-in for the driver's library."""
    return Daemon(
        directory,
        extra_environment={"LD_LIBRARY_PATH": str(BUILD_DIR / "tests/fake_nvml"), **environment},
        http_listen="127.0.0.1:0",
    )


def test_gpu_figures(tmp_path: Path) -> None:
    with with_gpus(tmp_path) as daemon:
        page = scrape(daemon)
        check_with_promtool(page.text)
        expected = {
            ("power_watts", "usage"): 312.5, ("power_watts", "limit"): 600,
            ("energy_joules_total", ""): 123456.789,
            ("utilization_ratio", "compute"): 0.75, ("utilization_ratio", "memory"): 0.3,
            ("memory_bytes", "used"): 5 << 30, ("memory_bytes", "total"): 32 << 30,
            ("clock_hertz", "sm"): 2407e6, ("clock_hertz", "memory"): 14001e6,
        }  # fmt: skip
        for (name, of), value in expected.items():
            labels = {"uuid": "GPU-0"} | ({"of": of} if of else {})
            assert page.value(f"einsumd_gpu_{name}", **labels) == pytest.approx(value), name
        throttled = {
            dict(labels)["reason"]: value
            for (name, labels), value in page.samples.items()
            if name == "einsumd_gpu_throttled"
        }
        assert {reason for reason, value in throttled.items() if value} == {
            "power_cap", "sw_thermal",
        }  # fmt: skip
        assert len(throttled) == 9
        # What a card does not tell is not there, rather than 0.
        assert page.value("einsumd_gpu_power_watts", uuid="GPU-1", of="usage") == 45
        assert not page.has("einsumd_gpu_power_watts", uuid="GPU-1", of="limit")
        assert not page.has("einsumd_gpu_energy_joules_total", uuid="GPU-1")


def test_gpu_is_not_asked_too_often(tmp_path: Path) -> None:
    """The stand-in's temperature grows by one each time that it is asked."""

    def temperature() -> float:
        return scrape(daemon).value("einsumd_gpu_temperature_celsius", uuid="GPU-0")

    with with_gpus(tmp_path) as daemon:
        before, started = temperature(), time.monotonic()
        for _ in range(20):
            after = temperature()
        assert after - before <= (time.monotonic() - started) / 0.5 + 1
        time.sleep(0.6)
        assert temperature() > after


def test_without_gpu(tmp_path: Path, site: Site) -> None:
    """No library, or one that does not work: the page has all but the GPU's figures."""
    with with_gpus(tmp_path, FAKE_NVML_BROKEN="1") as daemon:
        page = scrape(daemon)
        assert "einsumd_gpu_" not in page.text
        assert page.value("einsumd_ready") == 1


# --- the document ---------------------------------------------------------------------------------


def documented() -> dict[str, tuple[str, frozenset[str], str]]:
    """Name -> type, labels, meaning: the rows of the document's tables."""
    rows = {}
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"`[a-z_]+`", cells[0]):
            name, kind, labels, meaning = cells
            assert name not in rows, name
            rows[name.strip("`")] = (kind, frozenset(re.findall(r"`(\w+)`", labels)), meaning)
    return rows


def described(page: Page) -> dict[str, tuple[str, frozenset[str], str]]:
    """The same of a page."""
    rows = {}
    for name, family in page.families.items():
        labels = frozenset().union(*(sample.labels for sample in family.samples)) - {"le"}
        full = name + "_total" if family.type == "counter" else name
        rows[full] = (family.type, labels, family.documentation)
    return rows


def as_table(rows: dict[str, tuple[str, frozenset[str], str]]) -> str:
    return "\n".join(
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in sorted(labels))} | {text} |"
        for name, (kind, labels, text) in rows.items()
    )


def test_every_series_is_documented(tmp_path: Path) -> None:
    with with_gpus(tmp_path) as daemon:
        there, told = described(scrape(daemon)), documented()
    differing = {name: row for name, row in there.items() if told.get(name) != row}
    assert not differing, f"{DOCUMENT.name} should say:\n{as_table(differing)}"
    assert told.keys() == there.keys(), "documented, but not on the page"
