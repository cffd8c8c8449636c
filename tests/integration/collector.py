"""A collector of traces, as small as it can be: takes OTLP's JSON and checks what it must hold."""

from __future__ import annotations

import http.server
import json
import re
import threading
from dataclasses import dataclass
from typing import Any


@dataclass
class Span:
    trace_id: str
    span_id: str
    parent_id: str  # "": the root
    name: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    status: dict[str, Any]


def attributes_of(pairs: list[dict]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for pair in pairs:
        ((kind, value),) = pair["value"].items()
        assert kind in ("stringValue", "intValue") and isinstance(value, str), pair
        assert pair["key"] not in read
        read[pair["key"]] = int(value) if kind == "intValue" else value
    return read


def read_span(raw: dict) -> Span:
    known = {"traceId", "spanId", "parentSpanId", "name", "kind", "startTimeUnixNano",
             "endTimeUnixNano", "attributes", "status"}  # fmt: skip
    assert raw.keys() <= known, raw.keys() - known
    assert re.fullmatch("[0-9a-f]{32}", raw["traceId"]) and int(raw["traceId"], 16)
    assert re.fullmatch("[0-9a-f]{16}", raw["spanId"]) and int(raw["spanId"], 16)
    parent = raw.get("parentSpanId", "")
    assert re.fullmatch("([0-9a-f]{16})?", parent)
    assert isinstance(raw["startTimeUnixNano"], str)  # 64 bits travel as text
    start, end = int(raw["startTimeUnixNano"]), int(raw["endTimeUnixNano"])
    assert start <= end
    return Span(
        raw["traceId"], raw["spanId"], parent, raw["name"], raw["kind"], start, end,
        attributes_of(raw.get("attributes", [])), raw.get("status", {}),
    )  # fmt: skip


class Collector:
    """Listens until the end of its context. `status` is what it answers, `hold` makes it wait."""

    def __init__(self, status: int = 200):
        self.status = status
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.posts = 0
        self.broken: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.posts += 1
                collector.go_on.wait(60)
                try:
                    collector.take(self.path, self.headers["Content-Type"], body)
                except Exception as error:
                    collector.broken.append(f"{error!r}: {body[:500]!r}")
                self.send_response(collector.status)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def take(self, path: str, content_type: str, body: bytes) -> None:
        assert path == "/v1/traces" and content_type == "application/json"
        message = json.loads(body)
        assert message.keys() == {"resourceSpans"}
        for resource in message["resourceSpans"]:
            self.resources.append(attributes_of(resource["resource"]["attributes"]))
            for scope in resource["scopeSpans"]:
                assert scope["scope"]["name"] == "einsumd"
                self.spans += [read_span(raw) for raw in scope["spans"]]

    def servers(self) -> list[Span]:
        return [span for span in self.spans if span.kind == 2]

    def children(self, of: Span) -> list[Span]:
        found = [span for span in self.spans if span.parent_id == of.span_id]
        return sorted(found, key=lambda span: span.start_ns)

    def __enter__(self) -> Collector:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
        assert not self.broken, self.broken
