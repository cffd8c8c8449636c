"""One request, looked at: its line in the log, its trailer, its spans. All have the same phases."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import pytest

from client import EINSUM, TIMEOUT_S
from collector import Collector, Span
from conftest import Site, serving, small_weights
from daemon import count, seconds, wait_until
from scrape import scrape

PHASES = ["receive", "queue", "copy_in", "kernel", "copy_out", "send"]
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


def call(site: Site, request: Any, **metadata: str) -> tuple[Any, dict[str, str]]:
    """The reply and its trailers, or the error and its own."""
    pairs = [(key.replace("_", "-"), value) for key, value in metadata.items()]
    method = site.client.callable(EINSUM, "Einsum")
    try:
        reply, done = method.with_call(request, timeout=TIMEOUT_S, metadata=pairs)
    except grpc.RpcError as error:
        return error, dict(error.trailing_metadata())
    return reply, dict(done.trailing_metadata())


def bad_request(site: Site, rng: np.random.Generator) -> Any:
    request = site.good_request(rng)
    request.weight = "no.such.weight"
    return request


# --- the request log ------------------------------------------------------------------------------


def lines(site: Site) -> list[dict]:
    return [event for event in site.daemon.events if event["msg"] == "request"]


def test_request_log(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(tmp_path, small_weights(1), 256, request_log="all") as site:
        reply, _ = call(site, site.good_request(rng, tokens=5, request_id=77))
        error, _ = call(site, bad_request(site, rng), traceparent=TRACEPARENT)
        list(site.client.stream([site.good_request(rng, request_id=78)]))
        wait_until(lambda: len(lines(site)) == 3)
        good, bad, streamed = lines(site)
        assert good["code"] == "OK" and good["method"] == "Einsum"
        assert good["transport"] == "unary" and streamed["transport"] == "stream"
        assert (good["request_id"], streamed["request_id"]) == (77, 78)
        assert good["tokens"] == 5 and good["weight"] in next(iter(site.weights))
        assert good["batch_bucket"] == reply.batch.bucket
        assert good["batch_tokens"] == reply.batch.tokens
        assert good["batch_requests"] == reply.batch.requests
        assert good["kernel_ns"] == reply.batch.run_ns
        assert good["queue_ns"] >= reply.batch.queue_ns
        assert sum(good[f"{phase}_ns"] for phase in PHASES) == good["total_ns"]
        assert sum(streamed[f"{phase}_ns"] for phase in PHASES) == streamed["total_ns"]
        assert bad["code"] == "NOT_FOUND" and bad["error"] == error.details()
        assert "kernel_ns" not in bad and "weight" not in bad
        assert "trace_id" not in bad  # tracing is off, and its headers are not even read
        assert all(re.fullmatch(r"[\d-]{10}T[\d:.]{12}Z", line["ts"]) for line in lines(site))


def test_request_log_of_errors(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(tmp_path, small_weights(1), 256, request_log="errors") as site:
        for _ in range(5):
            call(site, site.good_request(rng))
        call(site, bad_request(site, rng))
        wait_until(lambda: lines(site))
        assert [line["code"] for line in lines(site)] == ["NOT_FOUND"]


def test_request_log_sampled(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(tmp_path, small_weights(1), 256, request_log="all", request_log_sample=10) as site:
        for _ in range(40):
            call(site, site.good_request(rng))
        for _ in range(3):
            call(site, bad_request(site, rng))
        wait_until(lambda: len(lines(site)) == 7)
        codes = [line["code"] for line in lines(site)]
        assert codes.count("OK") == 4 and codes.count("NOT_FOUND") == 3


def test_no_request_log_by_default(small: Site, rng: np.random.Generator) -> None:
    call(small, bad_request(small, rng))
    call(small, small.good_request(rng))
    assert not lines(small)


# --- the trailer ----------------------------------------------------------------------------------


def timing_of(trailers: dict[str, str]) -> dict[str, float]:
    """Milliseconds by phase, read as HTTP's Server-Timing."""
    pairs = re.findall(r"(\w+);dur=([\d.]+)(?:, |$)", trailers["einsumd-timing"])
    assert ", ".join(f"{k};dur={v}" for k, v in pairs) == trailers["einsumd-timing"]
    return {name: float(value) for name, value in pairs}


def test_timing_trailer(small: Site, rng: np.random.Generator) -> None:
    started = time.monotonic()
    reply, trailers = call(small, small.good_request(rng), einsumd_timing="1")
    took_ms = (time.monotonic() - started) * 1000
    timing = timing_of(trailers)
    assert list(timing) == PHASES[:-1]  # the reply that tells has not been sent yet
    assert timing["kernel"] == pytest.approx(reply.batch.run_ns / 1e6, abs=1e-6)
    assert timing["queue"] >= reply.batch.queue_ns / 1e6 - 1e-6
    assert 0 < sum(timing.values()) < took_ms


def test_timing_trailer_only_if_asked(small: Site, rng: np.random.Generator) -> None:
    for metadata in ({}, {"einsumd_timing": "0"}, {"einsumd_timing": "yes"}):
        _, trailers = call(small, small.good_request(rng), **metadata)
        assert "einsumd-timing" not in trailers


def test_timing_trailer_of_errors(small: Site, rng: np.random.Generator) -> None:
    """As far as it came, beside what errors bring along."""
    error, trailers = call(small, bad_request(small, rng), einsumd_timing="1")
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert trailers["einsumd-timing"] == "" or set(timing_of(trailers)) <= {"receive"}


# --- spans ----------------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def traced(tmp_path: Path, collector: Collector, **config: Any) -> Any:
    return serving(
        tmp_path, small_weights(1), 256,
        http_listen="127.0.0.1:0", trace_endpoint=collector.endpoint, **config,
    )  # fmt: skip


def one_server_span(collector: Collector) -> Span:
    wait_until(collector.servers)
    (span,) = collector.servers()
    return span


def test_spans_of_a_request(tmp_path: Path, rng: np.random.Generator, collector: Collector) -> None:
    with traced(tmp_path, collector) as site:
        request = site.good_request(rng, tokens=5, request_id=9)
        before_ns = time.time_ns()
        reply, _ = call(site, request, traceparent=TRACEPARENT)
        after_ns = time.time_ns()
        span = one_server_span(collector)
        assert (span.trace_id, span.parent_id) == (TRACE_ID, PARENT_ID)
        assert span.name == f"{EINSUM}/Einsum" and span.status == {}
        slack_ns = 50_000_000  # the clocks are compared when the span is sent
        assert before_ns - slack_ns <= span.start_ns <= span.end_ns <= after_ns + seconds(1) * 1e9
        attributes = span.attributes
        assert attributes["rpc.system.name"] == "grpc"
        assert attributes["rpc.method"] == f"{EINSUM}/Einsum"
        assert attributes["rpc.response.status_code"] == "OK"
        assert "error.type" not in attributes
        assert attributes["einsumd.transport"] == "unary"
        assert attributes["einsumd.tokens"] == 5 and attributes["einsumd.request_id"] == 9
        assert attributes["einsumd.batch.bucket"] == reply.batch.bucket
        assert attributes["einsumd.weight"] in next(iter(site.weights))
        children = collector.children(span)
        assert [c.name for c in children] == ["receive", "copy_in", "queue", "kernel", "copy_out",
                                              "send"]  # fmt: skip
        assert all(c.trace_id == TRACE_ID and c.kind == 1 for c in children)
        assert children[0].start_ns == span.start_ns and children[-1].end_ns == span.end_ns
        for left, right in zip(children, children[1:]):
            assert left.end_ns == right.start_ns
        kernel = next(c for c in children if c.name == "kernel")
        assert kernel.end_ns - kernel.start_ns == reply.batch.run_ns
        assert len({s.span_id for s in collector.spans}) == len(collector.spans)
        assert collector.resources[0]["service.name"] == "einsumd"
        version = site.client.call("ServerInfo").version
        assert collector.resources[0]["service.version"] == version
        wait_until(lambda: scrape(site.daemon).value("einsumd_traces_exported_total") == 1)


def test_span_of_an_error(tmp_path: Path, rng: np.random.Generator, collector: Collector) -> None:
    with traced(tmp_path, collector, request_log="all") as site:
        error, _ = call(site, bad_request(site, rng), traceparent=TRACEPARENT)
        span = one_server_span(collector)
        assert span.status["code"] == 2
        assert span.status["message"] == error.details()[:127]
        assert span.attributes["error.type"] == "NOT_FOUND"
        wait_until(lambda: lines(site))
        assert lines(site)[0]["trace_id"] == TRACE_ID
        assert lines(site)[0]["span_id"] == span.span_id


def test_spans_of_a_stream(tmp_path: Path, rng: np.random.Generator, collector: Collector) -> None:
    """Each request of a stream is a span of its own under the stream's parent."""
    with traced(tmp_path, collector) as site:
        wrap = site.client.schema.message("EinsumStreamRequest")
        requests = [wrap(request=site.good_request(rng, request_id=i)) for i in range(5)]
        stream = site.client.callable(EINSUM, "EinsumStream")
        assert len(list(stream(iter(requests), metadata=[("traceparent", TRACEPARENT)]))) == 5
        wait_until(lambda: len(collector.servers()) == 5)
        spans = collector.servers()
        assert {span.attributes["einsumd.request_id"] for span in spans} == set(range(5))
        assert {(span.trace_id, span.parent_id) for span in spans} == {(TRACE_ID, PARENT_ID)}


@pytest.mark.parametrize(
    "traceparent",
    [
        "", "00", TRACEPARENT[:-1], TRACEPARENT + "0", TRACEPARENT + "-extra",
        TRACEPARENT.upper(), f"ff-{TRACE_ID}-{PARENT_ID}-01", f"00-{'0' * 32}-{PARENT_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01", f"00-{TRACE_ID}-{PARENT_ID}-0g",
        f"00_{TRACE_ID}-{PARENT_ID}-01", f"00-{TRACE_ID}{PARENT_ID}--01",
        f"0x-{TRACE_ID}-{PARENT_ID}-01", f"cc-{TRACE_ID}-{PARENT_ID}-01x",
        f"00-{TRACE_ID}-{PARENT_ID}-00",  # well-formed, but its caller records nothing
    ],
)  # fmt: skip
def test_not_a_traceparent(
    tracing: tuple[Site, Collector], rng: np.random.Generator, traceparent: str
) -> None:
    site, collector = tracing
    call(site, site.good_request(rng), traceparent=traceparent)
    assert not untold(site, collector, rng)


@pytest.mark.parametrize(
    "traceparent",
    [TRACEPARENT, f"00-{TRACE_ID}-{PARENT_ID}-ff", f"cc-{TRACE_ID}-{PARENT_ID}-01-what-the-future-holds"],
)  # fmt: skip
def test_a_traceparent(
    tracing: tuple[Site, Collector], rng: np.random.Generator, traceparent: str
) -> None:
    site, collector = tracing
    call(site, site.good_request(rng), traceparent=traceparent)
    (span,) = untold(site, collector, rng)
    assert (span.trace_id, span.parent_id) == (TRACE_ID, PARENT_ID)


@pytest.fixture(scope="module")
def tracing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Collector]]:
    with Collector() as collector, traced(tmp_path_factory.mktemp("t"), collector) as site:
        yield site, collector


def untold(site: Site, collector: Collector, rng: np.random.Generator) -> list[Span]:
    """What came in before the spans of a request that is sent now, and traced for sure."""
    last = "1" * 32
    call(site, site.good_request(rng), traceparent=f"00-{last}-{PARENT_ID}-01")
    wait_until(lambda: any(span.trace_id == last for span in collector.servers()))
    found = [span for span in collector.servers() if span.trace_id != last]
    collector.spans.clear()
    return found


def test_sampled_roots(tmp_path: Path, rng: np.random.Generator, collector: Collector) -> None:
    """Without a traceparent, one in so many is the root of a trace of its own."""
    with traced(tmp_path, collector, trace_sample=10) as site:
        for _ in range(40):
            call(site, site.good_request(rng))
        wait_until(lambda: len(collector.servers()) == 4)
        spans = collector.servers()
        assert len({span.trace_id for span in spans}) == 4
        assert {span.parent_id for span in spans} == {""}


def test_last_spans_are_sent_at_the_end(
    tmp_path: Path, rng: np.random.Generator, collector: Collector
) -> None:
    with traced(tmp_path, collector) as site:
        for _ in range(300):
            call(site, site.good_request(rng), traceparent=TRACEPARENT)
    assert len(collector.servers()) == 300


@pytest.mark.parametrize("failure", ["refuses", "absent", "hangs"])
def test_collector_that_fails(tmp_path: Path, rng: np.random.Generator, failure: str) -> None:
    """Requests are answered as ever, what is lost is counted, and the log says so, but rarely."""
    with Collector(status=503 if failure == "refuses" else 200) as collector:
        if failure == "hangs":
            collector.go_on.clear()
        endpoint = collector.endpoint
        if failure == "absent":
            endpoint = "http://127.0.0.1:9/v1/traces"
        with serving(
            tmp_path, small_weights(1), 256, http_listen="127.0.0.1:0", trace_endpoint=endpoint
        ) as site:
            n = count(6000) if failure == "hangs" else 20
            request = site.good_request(rng, tokens=1, digest_only=True)
            wrap = site.client.schema.message("EinsumStreamRequest")
            stream = site.client.callable(EINSUM, "EinsumStream")
            requests = (wrap(request=request) for _ in range(n))
            replies = stream(requests, metadata=[("traceparent", TRACEPARENT)])
            assert sum(1 for _ in replies) == n

            def lost() -> float:
                return scrape(site.daemon).total("einsumd_traces_dropped_total")

            wait_until(lost, 30)
            if failure == "hangs" and n > 5000:
                page = scrape(site.daemon)
                assert page.value("einsumd_traces_dropped_total", reason="queue") > 0
            elif failure != "hangs":
                wait_until(lambda: lost() == n)
                page = scrape(site.daemon)
                assert page.value("einsumd_traces_dropped_total", reason="export") == n
                site.daemon.wait_event("traces were not taken")
            site.check_serves(rng)
            started = time.monotonic()
            site.daemon.terminate()
            assert site.daemon.wait_exit() == 0
            assert time.monotonic() - started < seconds(10)
