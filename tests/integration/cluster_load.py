"""Calls without pause until its standard input ends, then prints what came of it. Run by
test_cluster.py within a network namespace:

    python cluster_load.py TARGET CASES CHANNELS CALLERS STREAMS

A stock gRPC client with the service config of deploy/client. CASES is a pickle of a list of Case.
"""

from __future__ import annotations

import json
import pickle
import queue
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np

import oracle
from client import EINSUM, Schema

DEADLINE_S = 30
STREAM_WINDOW = 4
SERVICE_CONFIG = Path(__file__).resolve().parents[2] / "deploy/client/service-config.json"
OPTIONS = [
    ("grpc.service_config", SERVICE_CONFIG.read_text()),
    ("grpc.per_rpc_retry_buffer_size", 64 << 20),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass
class Case:
    request: bytes
    output: bytes  # of one daemon, once
    expected: tuple[np.ndarray, np.ndarray]  # see oracle.check

    def right(self, output: bytes) -> bool:
        """The order of sums, and so the last bit, may depend on who else is in the batch."""
        if output == self.output:
            return True
        try:
            oracle.check(output, "BF16", *self.expected)
        except AssertionError:
            return False
        return True


class Load:
    def __init__(self, target: str, cases: list[Case], channels: int):
        self.cases = cases
        self.channels = [grpc.insecure_channel(target, OPTIONS) for _ in range(channels)]
        grpc.channel_ready_future(self.channels[0]).result(DEADLINE_S)
        self.schema = Schema(self.channels[0])
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.done = Counter()
        self.slowest_s = 0.0
        self.failures: list[str] = []

    def note(self, kind: str, right: bool = True, took_s: float = 0.0) -> None:
        with self.lock:
            self.done[kind] += 1
            self.done["wrong"] += not right
            self.slowest_s = max(self.slowest_s, took_s)

    def fail(self, kind: str, error: grpc.RpcError) -> None:
        with self.lock:
            self.failures.append(f"{kind}: {error.code().name}: {error.details()}")

    def call_on_and_on(self, channel: grpc.Channel, first_case: int) -> None:
        einsum = channel.unary_unary(
            f"/{EINSUM}/Einsum",
            response_deserializer=self.schema.message("EinsumResponse").FromString,
        )
        case = first_case
        while not self.stop.is_set():
            wanted = self.cases[case % len(self.cases)]
            case += 1
            began = time.monotonic()
            try:
                reply = einsum(wanted.request, timeout=DEADLINE_S)
            except grpc.RpcError as error:
                self.fail("Einsum", error)
            else:
                took_s = time.monotonic() - began
                self.note("calls", wanted.right(reply.output), took_s)

    def stream_on_and_on(self, channel: grpc.Channel) -> None:
        """A stream that ends early is opened again, and what it left unanswered asked again: gRPC
        retries no stream that has had a reply."""
        self.message = self.schema.message("EinsumStreamRequest")
        stream = channel.stream_stream(
            f"/{EINSUM}/EinsumStream",
            request_serializer=self.message.SerializeToString,
            response_deserializer=self.schema.message("EinsumStreamResponse").FromString,
        )
        pending: dict[int, int] = {i + 1: i % len(self.cases) for i in range(STREAM_WINDOW)}
        while pending:
            outgoing: queue.Queue = queue.Queue()
            for request_id in pending:
                outgoing.put(request_id)
            try:
                self.follow(stream(self.requests(outgoing, pending), timeout=600),
                            outgoing, pending)  # fmt: skip
            except grpc.RpcError as error:
                self.note(f"stream ended {error.code().name}")
                time.sleep(0.02)
            finally:
                outgoing.put(None)

    def requests(self, outgoing: queue.Queue, pending: dict[int, int]) -> Iterator[Any]:
        while (request_id := outgoing.get()) is not None:
            request = self.message()
            request.request.ParseFromString(self.cases[pending[request_id]].request)
            request.request.request_id = request_id
            yield request

    def follow(self, replies: Any, outgoing: queue.Queue, pending: dict[int, int]) -> None:
        for reply in replies:
            request_id = reply.response.request_id
            if reply.error.code == grpc.StatusCode.UNAVAILABLE.value[0]:
                continue  # the stream is about to end
            case = pending.pop(request_id)
            self.note("stream_calls", self.cases[case].right(reply.response.output))
            if not self.stop.is_set():
                pending[request_id + STREAM_WINDOW] = (case + 1) % len(self.cases)
                outgoing.put(request_id + STREAM_WINDOW)
            elif not pending:
                outgoing.put(None)

    def run(self, callers: int, streams: int) -> dict[str, Any]:
        of = [self.channels[i % len(self.channels)] for i in range(max(callers, streams))]
        threads = [threading.Thread(target=self.call_on_and_on, args=(of[i], i))
                   for i in range(callers)]  # fmt: skip
        threads += [threading.Thread(target=self.stream_on_and_on, args=(of[i],))
                    for i in range(streams)]  # fmt: skip
        for thread in threads:
            thread.start()
        sys.stdin.read()
        self.stop.set()
        for thread in threads:
            thread.join()
        return {**self.done, "slowest_s": self.slowest_s, "failures": self.failures}


def main() -> None:
    target, cases, channels, callers, streams = sys.argv[1:]
    load = Load(target, pickle.loads(Path(cases).read_bytes()), int(channels))
    print(json.dumps(load.run(int(callers), int(streams))))


if __name__ == "__main__":
    main()
