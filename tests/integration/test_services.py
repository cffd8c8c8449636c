"""What surrounds the projection: health, reflection, information, start and stop."""

from __future__ import annotations

import json
import re
import signal
import socket
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc import StatusCode
from grpc_reflection.v1alpha import reflection_pb2

import oracle
from checkpoints import TENSOR_NAME, write_checkpoint
from client import EINSUM, HEALTH, INFERENCE, TIMEOUT_S, Client, ReflectionStub
from conftest import Site, serving, small_weights
from daemon import EINSUMD, REPOSITORY, Daemon, environment, run, seconds

SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3
HEALTH_NAMES = ["", "liveness", "readiness", EINSUM, INFERENCE]
REFLECTION_VERSIONS = ["v1", "v1alpha"]


# --- health ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", HEALTH_NAMES)
def test_health_check(small: Site, service: str) -> None:
    assert small.client.health(service) == SERVING


def test_health_check_unknown(small: Site) -> None:
    for service in ("einsum.v1.NoSuch", " ", "x" * 1000):
        with pytest.raises(grpc.RpcError) as caught:
            small.client.health(service)
        assert caught.value.code() == StatusCode.NOT_FOUND


def watch(client: Client, service: str, **options: Any) -> Any:
    request = client.message("grpc.health.v1.HealthCheckRequest", service=service)
    return client.callable(HEALTH, "Watch")(request, timeout=seconds(60), **options)


def test_health_watch(small: Site) -> None:
    """The state comes at once, then silence as long as nothing changes."""
    for service in HEALTH_NAMES:
        replies = watch(small.client, service)
        assert next(replies).status == SERVING
        replies.cancel()
    replies = watch(small.client, "no such service")
    assert next(replies).status == SERVICE_UNKNOWN
    assert replies.is_active()
    replies.cancel()


def test_many_watches(small: Site, rng: np.random.Generator) -> None:
    watches = [watch(small.client, "") for _ in range(50)]
    assert all(next(replies).status == SERVING for replies in watches)
    small.check_serves(rng)
    for replies in watches:
        replies.cancel()


# --- reflection -----------------------------------------------------------------------------------


class Reflection:
    """Raw questions to the reflection service."""

    def __init__(self, client: Client, version: str):
        self.stub = ReflectionStub(client.channel, version)

    def ask(self, *requests: Any) -> list[Any]:
        return list(self.stub.ServerReflectionInfo(iter(requests), timeout=TIMEOUT_S))

    def ask_one(self, **fields: Any) -> Any:
        request = reflection_pb2.ServerReflectionRequest(**fields)
        (reply,) = self.ask(request)
        assert reply.original_request == request
        return reply

    def files(self, **fields: Any) -> list[descriptor_pb2.FileDescriptorProto]:
        reply = self.ask_one(**fields)
        assert reply.WhichOneof("message_response") == "file_descriptor_response", reply
        raw = reply.file_descriptor_response.file_descriptor_proto
        return [descriptor_pb2.FileDescriptorProto.FromString(each) for each in raw]

    def fails(self, code: StatusCode, **fields: Any) -> None:
        reply = self.ask_one(**fields)
        assert reply.WhichOneof("message_response") == "error_response", reply
        assert reply.error_response.error_code == code.value[0]
        assert reply.error_response.error_message


@pytest.fixture(params=REFLECTION_VERSIONS)
def reflection(small: Site, request: pytest.FixtureRequest) -> Reflection:
    return Reflection(small.client, request.param)


def test_reflection_lists_services(reflection: Reflection) -> None:
    reply = reflection.ask_one(list_services="*")
    services = [service.name for service in reply.list_services_response.service]
    assert sorted(services) == [
        EINSUM,
        HEALTH,
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        INFERENCE,
    ]
    assert reflection.ask_one(list_services="").list_services_response.service


@pytest.mark.parametrize(
    "symbol, file",
    [
        (EINSUM, "einsum/v1/einsum.proto"),
        (f"{EINSUM}.EinsumStream", "einsum/v1/einsum.proto"),
        ("einsum.v1.EinsumRequest", "einsum/v1/einsum.proto"),
        ("einsum.v1.EinsumRequest.tokens", "einsum/v1/einsum.proto"),
        ("einsum.v1.Recipe", "einsum/v1/einsum.proto"),
        ("einsum.v1.RECIPE_1_1_32", "einsum/v1/einsum.proto"),
        (INFERENCE, "inference/grpc_service.proto"),
        ("inference.ModelInferRequest.InferInputTensor.shape", "inference/grpc_service.proto"),
        ("inference.DataType", "inference/model_config.proto"),
        (HEALTH, "grpc/health/v1/health.proto"),
        (f"{HEALTH}.Watch", "grpc/health/v1/health.proto"),
        # A nested enum, and its values, which live beside it.
        ("grpc.health.v1.HealthCheckResponse.ServingStatus", "grpc/health/v1/health.proto"),
        ("grpc.health.v1.HealthCheckResponse.NOT_SERVING", "grpc/health/v1/health.proto"),
        ("grpc.reflection.v1.ServerReflection", "grpc/reflection/v1/reflection.proto"),
        (
            "grpc.reflection.v1alpha.ServerReflectionRequest.list_services",
            "grpc/reflection/v1alpha/reflection.proto",
        ),
    ],
)
def test_reflection_finds_symbols(reflection: Reflection, symbol: str, file: str) -> None:
    first, *needed = reflection.files(file_containing_symbol=symbol)
    assert first.name == file
    assert reflection.files(file_by_filename=file) == [first, *needed]
    assert {each.name for each in needed} >= set(first.dependency)


@pytest.mark.parametrize(
    "symbol",
    ["", "einsum", "einsum.v1", "einsum.v1.", "einsum.v1.EinsumRequest.", "einsum.v1.NoSuch",
     ".einsum.v1.Einsum", "einsum.v1.Einsum.NoSuch", "EinsumRequest", "x" * 3000],
)  # fmt: skip
def test_reflection_unknown_symbol(reflection: Reflection, symbol: str) -> None:
    reflection.fails(StatusCode.NOT_FOUND, file_containing_symbol=symbol)


def test_reflection_unknown_file(reflection: Reflection) -> None:
    for file in ("", "einsum.proto", "../einsum/v1/einsum.proto", "/etc/passwd"):
        reflection.fails(StatusCode.NOT_FOUND, file_by_filename=file)


def test_reflection_extensions(reflection: Reflection) -> None:
    """There are none; a known type may answer so with an empty list, too."""
    extension = {"containing_type": "einsum.v1.EinsumRequest", "extension_number": 100}
    reflection.fails(StatusCode.NOT_FOUND, file_containing_extension=extension)
    reflection.fails(StatusCode.NOT_FOUND, all_extension_numbers_of_type="einsum.v1.NoSuch")
    reply = reflection.ask_one(all_extension_numbers_of_type="einsum.v1.EinsumRequest")
    if reply.WhichOneof("message_response") == "all_extension_numbers_response":
        assert not reply.all_extension_numbers_response.extension_number
    else:
        assert reply.error_response.error_code == StatusCode.NOT_FOUND.value[0]


def test_reflection_many_on_one_stream(reflection: Reflection) -> None:
    """In the order in which they were asked, mistakes and all."""
    ask = reflection_pb2.ServerReflectionRequest
    requests = [
        ask(host="h", file_containing_symbol=EINSUM),
        ask(host="h", file_by_filename="no such"),
        ask(host="h"),
        ask(host="h", list_services="*"),
    ] * 10
    replies = reflection.ask(*requests)
    assert [reply.original_request for reply in replies] == requests
    kinds = [reply.WhichOneof("message_response") for reply in replies]
    expected = ["file_descriptor_response", "error_response", "error_response",
                "list_services_response"]  # fmt: skip
    assert kinds == expected * 10
    assert {reply.valid_host for reply in replies} == {"h"}


@pytest.mark.parametrize("version", REFLECTION_VERSIONS)
def test_reflection_alone_suffices(small: Site, rng: np.random.Generator, version: str) -> None:
    """A client that has never seen the proto makes a call."""
    with Client(small.daemon.address, reflection=version) as client:
        fresh = Site(small.daemon, client, small.root, small.weights)
        fresh.check_serves(rng)
        assert sorted(client.schema.database.get_services())[0] == EINSUM


def test_reflected_proto_is_the_repository_s(small: Site) -> None:
    """Every field and method of the file in the tree is served, by the number that it has there."""
    text = (REPOSITORY / "proto/einsum/v1/einsum.proto").read_text()
    text = re.sub(r"//.*", "", text)
    (file, *_) = Reflection(small.client, "v1").files(file_containing_symbol=EINSUM)
    served = {
        (message.name, field.name, field.number)
        for message in file.message_type
        for field in message.field
    }
    written = {
        (message, field, int(number))
        for message, body in re.findall(r"message (\w+) \{([^}]*)\}", text)
        for field, number in re.findall(r"(\w+) = (\d+);", body)
    }
    assert served == written and len(written) > 50
    methods = {method.name for method in file.service[0].method}
    assert methods == set(re.findall(r"rpc (\w+)", text))


# --- information ----------------------------------------------------------------------------------


def test_server_info(small: Site, rng: np.random.Generator) -> None:
    before = small.client.call("ServerInfo")
    small.check_serves(rng)
    info = small.client.call("ServerInfo")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info.version)
    assert info.engine in ("cpu", "cuda")
    assert info.device and info.kernel
    assert info.state == "serving"
    assert list(info.buckets) == sorted(info.buckets)
    limits = info.limits
    assert info.buckets[-1] == limits.batch_tokens_max < limits.request_tokens_max
    for name in limits.DESCRIPTOR.fields_by_name:
        assert getattr(limits, name) > 0, name
    # A request and a reply of the most tokens fit, with room for the other fields.
    most = limits.request_tokens_max
    assert limits.request_bytes_max > most * 4 * 512
    assert limits.reply_bytes_max > most * 4 * 256 * 4
    assert info.lanes >= 1
    weight_bytes = sum(weight.resident_bytes for weight in small.client.call("ListWeights").weights)
    assert info.memory.weights_bytes == weight_bytes
    assert weight_bytes >= 2 * (4 * 256 * 512 + 4 * 2 * 4)
    assert info.memory.batches_bytes > 0
    assert info.uptime_ns > before.uptime_ns
    libraries = {library.name.lower(): library.version for library in info.libraries}
    assert any("grpc" in name for name in libraries) and all(libraries.values())
    assert info.counters.connections == 1


def test_counters(small: Site, rng: np.random.Generator) -> None:
    before = small.client.counters()
    for tokens in (1, 2, 5):
        small.client.einsum(small.good_request(rng, tokens=tokens))
    with pytest.raises(grpc.RpcError):
        small.client.einsum(small.good_request(rng, weight="none"))
    after = small.client.counters()

    def grown(name: str) -> int:
        return getattr(after, name) - getattr(before, name)

    assert grown("requests") == 4
    assert grown("answered") == 3
    assert grown("invalid") == 1
    assert grown("batches") == 3
    assert grown("batch_requests") == 3
    assert grown("batch_tokens") == 8
    assert grown("batch_padding_tokens") == 3  # 5 tokens travel in a bucket of 8
    assert grown("busy_ns") > 0
    assert grown("queue_ns") > 0
    info = small.client.call("ServerInfo")
    assert sum(after.bucket_batches) == after.batches
    by_bucket = {
        bucket: now - was
        for bucket, was, now in zip(
            info.buckets, before.bucket_batches, after.bucket_batches, strict=True
        )
    }
    assert {bucket: n for bucket, n in by_bucket.items() if n} == {1: 1, 2: 1, 8: 1}
    assert 0 < after.phase_batches <= after.batches and after.kernel_ns > 0
    for name in ("refused", "expired", "cancelled", "failed", "connections_refused"):
        assert grown(name) == 0, name


def test_list_and_get_weights(small: Site) -> None:
    weights = small.client.call("ListWeights").weights
    assert [weight.name for weight in weights] == sorted(small.weights)
    for weight in weights:
        assert (weight.groups, weight.output_dim, weight.reduced_dim) == (4, 256, 512)
        assert (weight.block_d, weight.block_r) == (128, 128)
        assert (weight.weight_type, weight.scale_type) == (1, 2)  # E4M3, UE8M0
        assert list(weight.recipes) == [1, 2]
        assert (weight.tensor_parallel_rank, weight.tensor_parallel_size) == (0, 1)
        assert weight.source.startswith("model/model-0000")
        assert weight.generation >= 1
        for name in (weight.name, f"model.{weight.name}.weight"):
            assert small.client.call("GetWeight", name=name).weight == weight


def test_self_test(small: Site) -> None:
    reply = small.client.call("SelfTest")
    assert reply.passed
    assert [result.weight for result in reply.results] == sorted(small.weights)
    for result in reply.results:
        assert result.passed and not result.message
        assert 0 <= result.worst_error_ratio <= 1
        assert result.elements_checked > 0
        assert result.duration_ns > 0
    name = TENSOR_NAME.format(1)
    reply = small.client.call("SelfTest", weight=f"model.{name}")
    assert [result.weight for result in reply.results] == [name]
    with pytest.raises(grpc.RpcError) as caught:
        small.client.call("SelfTest", weight="none")
    assert caught.value.code() == StatusCode.NOT_FOUND


def test_self_test_of_every_format(tmp_path: Path, rng: np.random.Generator) -> None:
    """Weights of all kinds pass, those with NaN too; and with a busy daemon."""
    nan = oracle.random_weight(rng, 2, 256, 512)
    nan.values[0, :, 7] = oracle.E4M3_NAN[0]
    weights = {
        TENSOR_NAME.format(0): oracle.random_weight(rng, 2, 256, 512),
        TENSOR_NAME.format(1): oracle.random_weight(rng, 2, 256, 512, 32, 32, "FP32", "bits"),
        TENSOR_NAME.format(2): oracle.random_weight(rng, 2, 256, 512, 1, 128, "UE8M0"),
        TENSOR_NAME.format(3): oracle.random_weight(rng, 2, 256, 512, scale_type=None),
        TENSOR_NAME.format(4): nan,
    }
    with serving(tmp_path, weights, 256) as site:
        request = site.good_request(rng, tokens=50)
        futures = [site.client.einsum_future(request) for _ in range(20)]
        reply = site.client.call("SelfTest")
        assert reply.passed, reply
        assert len(reply.results) == 5
        for future in futures:
            assert future.result(seconds(60)).tokens == 50


def test_load_reports_progress(small: Site, rng: np.random.Generator) -> None:
    weights = {TENSOR_NAME.format(i): oracle.random_weight(rng, 4, 256, 512) for i in range(5)}
    directory = write_checkpoint(small.root / "progress", weights, shards=3)
    *progress, last = small.client.load(directory, output_dim=256, name_prefix="progress.")
    assert [weight.name for weight in last.weights] == [f"progress.{name}" for name in weights]
    assert all(not message.weights for message in progress)
    messages = [*progress, last]
    done = [(message.weights_done, message.bytes_done) for message in messages]
    assert done == sorted(done)
    assert (last.weights_done, last.weights_total) == (5, 5)
    assert last.bytes_done == last.bytes_total >= 5 * 4 * 256 * 512
    assert small.client.call("UnloadWeights", names=["progress.*"]).names == [
        f"progress.{name}" for name in weights
    ]


def test_load_patterns(small: Site, rng: np.random.Generator) -> None:
    weights = {TENSOR_NAME.format(i): oracle.random_weight(rng, 4, 256, 512) for i in range(12)}
    directory = write_checkpoint(small.root / "patterns", weights)

    def loaded(*patterns: str) -> list[str]:
        messages = small.client.load(
            directory, output_dim=256, name_prefix="p.", tensors=list(patterns)
        )
        names = [weight.name for weight in messages[-1].weights]
        assert list(small.client.call("UnloadWeights", names=["p.*"]).names) == names
        return [int(name.split(".")[2]) for name in names]

    assert loaded("layers.3.attn.wo_a.weight") == [3]
    assert loaded("layers.[12].attn.*", "*.11.attn.wo_a.weight") == [1, 11, 2]
    assert loaded("layers.?.attn.wo_a.weight") == list(range(10))
    file = directory / "model-00001-of-00001.safetensors"
    assert len(small.client.load(file, output_dim=256, name_prefix="p.")[-1].weights) == 12
    small.client.call("UnloadWeights", names=["p.*"])


def test_weights_load_at_run_time_into_an_empty_daemon(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """No weight at start: serves, says so, and takes what comes."""
    root = tmp_path / "root"
    weight = oracle.random_weight(rng, 4, 256, 512)
    name = TENSOR_NAME.format(0)
    write_checkpoint(root / "model", {name: weight})
    with (
        Daemon(tmp_path, weights_roots=[str(root)]) as daemon,
        Client(daemon.address) as client,
    ):
        assert not client.call("ListWeights").weights
        site = Site(daemon, client, root, {name: weight})
        with pytest.raises(grpc.RpcError) as caught:
            client.einsum(site.good_request(rng))
        assert caught.value.code() == StatusCode.NOT_FOUND
        client.load("model", output_dim=256)
        site.check_serves(rng)


def test_replies_over_4_mib(tmp_path: Path, rng: np.random.Generator) -> None:
    """A stock client refuses them by itself; with a raised limit, or on request as digest, they
    arrive; and the stock client's connection lives on."""
    with serving(tmp_path, small_weights(1), 256, batch_tokens_max=2048,
                 request_tokens_max=2048) as site:  # fmt: skip
        tokens = 1200  # 4.9 MB in FP32
        request = site.good_request(rng, tokens=tokens, output_type="FP32")
        with Client(site.daemon.address, site.client.schema, stock=True) as stock:
            with pytest.raises(grpc.RpcError) as caught:
                stock.einsum(request)
            assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
            site.check_serves(rng, stock)
            request.digest_only = True
            assert stock.einsum(request).digest.elements == tokens * 4 * 256
        request.digest_only = False
        most = site.client.call("ServerInfo").limits.reply_bytes_max
        options = [("grpc.max_receive_message_length", most)]
        with Client(site.daemon.address, site.client.schema, stock=True, options=options) as raised:
            assert len(raised.einsum(request).output) == tokens * 4 * 256 * 4


# --- addresses ------------------------------------------------------------------------------------


def test_several_addresses(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "einsumd.sock"
    listen = ["127.0.0.1:0", f"unix:{path}"]
    if socket.has_ipv6 and Path("/proc/net/if_inet6").exists():
        listen.append("[::1]:0")
    with serving(tmp_path, small_weights(1), 256, listen=listen, unix_socket_mode="0600") as site:
        assert len(site.daemon.listening) == len(listen)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for address in site.daemon.listening:
            with Client(address, site.client.schema) as client:
                site.check_serves(rng, client)
    assert not path.exists()


@pytest.mark.parametrize("kind", ["port", "socket"])
def test_two_daemons_on_one_address(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    """The second says why and goes; the first does not notice."""
    listen = "127.0.0.1:0" if kind == "port" else f"unix:{tmp_path}/einsumd.sock"
    with serving(tmp_path / "first", small_weights(1), 256, listen=[listen]) as site:
        second = Daemon(tmp_path / "second", wait=False, listen=[site.daemon.address])
        assert second.wait_exit() not in (0, None)
        assert site.daemon.address in second.log
        assert "in use" in second.log
        assert "ready" not in {event["msg"] for event in second.events}
        site.check_serves(rng)
        with Client(site.daemon.address, site.client.schema) as client:
            site.check_serves(rng, client)


def test_socket_file_of_a_killed_daemon(tmp_path: Path) -> None:
    path = tmp_path / "einsumd.sock"
    first = Daemon(tmp_path / "first", listen=[f"unix:{path}"])
    first.kill()
    assert path.exists()
    with Daemon(tmp_path / "second", listen=[f"unix:{path}"]) as second:
        with Client(second.address) as client:
            assert client.health() == SERVING


def test_socket_path_that_is_something_else(tmp_path: Path) -> None:
    """A file that is no socket is never removed."""
    path = tmp_path / "precious"
    path.write_text("data")
    daemon = Daemon(tmp_path, wait=False, listen=[f"unix:{path}"])
    assert daemon.wait_exit() not in (0, None)
    assert str(path) in daemon.log
    assert path.read_text() == "data"


# --- stop -----------------------------------------------------------------------------------------


@pytest.fixture
def stopping(tmp_path: Path) -> Iterator[Site]:
    """A site for the test to stop, where a request takes 0.5 s."""
    with serving(tmp_path, small_weights(1), 256, max_queue_delay_us=500_000) as site:
        yield site


def test_sigterm_lets_requests_finish(stopping: Site, rng: np.random.Generator) -> None:
    name, weight = next(iter(stopping.weights.items()))
    cases = [oracle.random_activations(rng, weight, 1 + i, "FP32") for i in range(10)]
    expected = [stopping.expected(case, weight) for case in cases]
    futures = [stopping.client.einsum_future(stopping.request(name, case)) for case in cases]
    time.sleep(0.1)
    assert not any(future.done() for future in futures)
    stopping.daemon.terminate()
    for answer, future in zip(expected, futures, strict=True):
        oracle.check(future.result(seconds(30)).output, "BF16", *answer)
    assert stopping.daemon.wait_exit() == 0


def test_sigterm_lets_a_stream_finish(stopping: Site, rng: np.random.Generator) -> None:
    """What it has read is answered; then the stream ends with UNAVAILABLE, for its client to go
    elsewhere."""
    release = threading.Event()

    def requests() -> Iterator[Any]:
        for request_id in range(5):
            yield stopping.good_request(rng, request_id=request_id)
        release.wait(seconds(60))

    replies = stopping.client.stream(requests(), seconds(60))
    time.sleep(0.2)
    stopping.daemon.terminate()
    seen = []
    try:
        for reply in replies:
            assert not reply.HasField("error")
            seen.append(reply.response.request_id)
    except grpc.RpcError as error:
        assert error.code() == StatusCode.UNAVAILABLE, error
    release.set()
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert stopping.daemon.wait_exit() == 0


def test_sigterm_refuses_newcomers(stopping: Site, rng: np.random.Generator) -> None:
    """While the last requests finish, new ones are sent elsewhere."""
    request = stopping.good_request(rng)
    in_flight = stopping.client.einsum_future(request)
    time.sleep(0.1)
    stopping.daemon.terminate()
    time.sleep(0.1)
    with pytest.raises(grpc.RpcError) as caught:
        stopping.client.einsum(request, seconds(10))
    assert caught.value.code() == StatusCode.UNAVAILABLE
    assert in_flight.result(seconds(30)).tokens == 3
    assert stopping.daemon.wait_exit() == 0


def test_lame_duck(tmp_path: Path, rng: np.random.Generator) -> None:
    """After SIGTERM it is NOT_SERVING, and serves all the same, until lame_duck_ms have passed."""
    lame_duck_ms = 1500
    with serving(tmp_path, small_weights(1), 256, lame_duck_ms=lame_duck_ms) as site:
        watches = {name: watch(site.client, name) for name in HEALTH_NAMES}
        assert all(next(replies).status == SERVING for replies in watches.values())
        begin = time.monotonic()
        site.daemon.terminate()
        for name in ("", "readiness", EINSUM):
            assert next(watches[name]).status == NOT_SERVING
            assert site.client.health(name) == NOT_SERVING
        assert site.client.health("liveness") == SERVING
        assert site.client.call("ServerInfo").state == "draining"
        site.check_serves(rng)
        with Client(site.daemon.address, site.client.schema) as newcomer:
            site.check_serves(rng, newcomer)
        assert site.daemon.wait_exit() == 0
        took_ms = 1000 * (time.monotonic() - begin)
        assert lame_duck_ms <= took_ms < lame_duck_ms + 1000 * seconds(10)


def test_lame_duck_closes_idle_connections(tmp_path: Path, rng: np.random.Generator) -> None:
    """In the second half of lame_duck_ms nobody can connect, and who has no call is sent off; who
    has one is served on."""
    lame_duck_ms = 2000
    with serving(tmp_path, small_weights(1), 256, lame_duck_ms=lame_duck_ms) as site:
        watching = watch(site.client, "")
        assert next(watching).status == SERVING
        with socket.create_connection(site.daemon.host_port) as idle:
            begin = time.monotonic()
            site.daemon.terminate()
            idle.settimeout(seconds(10))
            while idle.recv(4096):
                pass
        assert time.monotonic() - begin >= lame_duck_ms / 2000 - 0.01  # timers round
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(site.daemon.host_port)
        site.check_serves(rng)
        assert site.daemon.wait_exit() == 0


def test_lame_duck_through_a_proxy(tmp_path: Path, rng: np.random.Generator) -> None:
    """Which says `via`. Its streams end in the middle, before their connection does; the next call
    gets the connection's end for an answer, and is safe to try again."""
    lame_duck_ms = int(1000 * seconds(2))
    via = {"metadata": (("via", "2.0 a-proxy"),)}
    with serving(tmp_path, small_weights(1), 256, lame_duck_ms=lame_duck_ms) as site:
        request = site.good_request(rng).SerializeToString()
        with (
            Client(site.daemon.address, site.client.schema) as proxy,
            Client(site.daemon.address, site.client.schema) as other,
        ):
            replies, watching = watch(proxy, "", **via), watch(other, "")
            assert next(replies).status == next(watching).status == SERVING
            begin = time.monotonic()
            site.daemon.terminate()
            assert next(replies).status == next(watching).status == NOT_SERVING
            with pytest.raises(grpc.RpcError) as caught:
                next(replies)
            assert caught.value.code() == StatusCode.UNAVAILABLE
            assert time.monotonic() - begin >= lame_duck_ms / 2000 - 0.01  # timers round
            with pytest.raises(grpc.RpcError) as caught:
                proxy.raw(f"/{EINSUM}/Einsum", request, **via)
            assert caught.value.code() == StatusCode.UNAVAILABLE
            site.check_serves(rng, other)
        assert site.daemon.wait_exit() == 0


def test_lame_duck_on_the_health_port(tmp_path: Path) -> None:
    """Whoever asks there on and on hears of it to the end."""
    lame_duck_s = seconds(2)
    with serving(tmp_path, small_weights(1), 256, lame_duck_ms=int(1000 * lame_duck_s),
                 health_listen=["127.0.0.1:0"]) as site:  # fmt: skip
        address = site.daemon.wait_event("ready")["health_listen"]
        begin = time.monotonic()
        with Client(address, site.client.schema) as prober:
            assert prober.health("") == SERVING
            site.daemon.terminate()
            site.daemon.wait_event("draining")
            while time.monotonic() - begin < 0.8 * lame_duck_s:
                assert prober.health("") == NOT_SERVING
                time.sleep(0.05)
        assert site.daemon.wait_exit() == 0


def test_lame_duck_closes_a_connection_after_its_last_call(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """As a proxy has them, one call at a time: no reply is lost, however large."""
    with serving(tmp_path, small_weights(1), 256, lame_duck_ms=3000) as site:
        request, expected = site.good_case(rng, tokens=400)
        stop = threading.Event()
        codes = []

        def call_on_and_on() -> None:
            with Client(site.daemon.address, site.client.schema) as client:
                while not stop.is_set():
                    try:
                        oracle.check(client.einsum(request).output, "BF16", *expected)
                    except grpc.RpcError as error:
                        codes.append(error.code())
                        return

        with ThreadPoolExecutor(3) as pool:
            callers = [pool.submit(call_on_and_on) for _ in range(3)]
            time.sleep(0.3)
            site.daemon.terminate()
            assert site.daemon.wait_exit() == 0
            stop.set()
            [caller.result() for caller in callers]
        assert codes == [StatusCode.UNAVAILABLE] * 3  # and not CANCELLED, by gRPC's own farewell


def test_second_sigterm_cuts_the_lame_duck_short_or_changes_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, small_weights(1), 256, lame_duck_ms=1000) as site:
        for _ in range(3):
            site.daemon.terminate()
            time.sleep(0.05)
        assert site.daemon.wait_exit() == 0


def test_drain_grace_is_the_limit(tmp_path: Path, rng: np.random.Generator) -> None:
    """An idle stream that its client holds open does not hold up the end."""
    with serving(tmp_path, small_weights(1), 256, drain_grace_ms=500) as site:
        release = threading.Event()

        def requests() -> Iterator[Any]:
            yield site.good_request(rng)
            release.wait(seconds(60))

        replies = site.client.stream(requests(), seconds(60))
        assert next(replies).response.tokens == 3
        watching = watch(site.client, "")
        assert next(watching).status == SERVING
        begin = time.monotonic()
        site.daemon.terminate()
        assert site.daemon.wait_exit() == 0
        assert time.monotonic() - begin < seconds(5)
        release.set()


def test_sigterm_under_load(tmp_path: Path, rng: np.random.Generator) -> None:
    """Every call ends with a right answer or is refused; none hangs, none is half.

    gRPC core resets calls that arrive after its shutdown and before their client has heard of it,
    with CANCELLED; lame_duck_ms is there so that clients have left by then.
    """
    with serving(tmp_path, small_weights(1), 256) as site:
        request = site.good_request(rng, tokens=20)
        expected = site.client.einsum(request).output
        stop = threading.Event()

        def call_on_and_on() -> int:
            answered = 0
            with Client(site.daemon.address, site.client.schema) as client:
                while not stop.is_set():
                    try:
                        assert client.einsum(request, seconds(30)).output == expected
                        answered += 1
                    except grpc.RpcError as error:
                        assert error.code() in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
                        assert site.daemon.told_to_stop
                        break
            return answered

        with ThreadPoolExecutor(6) as pool:
            callers = [pool.submit(call_on_and_on) for _ in range(6)]
            time.sleep(0.5)
            site.daemon.terminate()
            assert site.daemon.wait_exit() == 0
            stop.set()
            assert sum(caller.result() for caller in callers) > 0


@pytest.mark.parametrize("delay", [0, 0.005, 0.01, 0.02, 0.05])
def test_sigterm_while_starting(tmp_path: Path, delay: float) -> None:
    """However early it comes, there is an orderly end: 0, or by the signal before it was caught."""
    root = tmp_path / "root"
    write_checkpoint(root / "model", small_weights(2))
    daemon = Daemon(
        tmp_path,
        wait=False,
        weights_roots=[str(root)],
        weights=[{"path": "model", "output_dim": 256}],
    )
    time.sleep(delay)
    daemon.terminate()
    assert daemon.wait_exit() in (0, -15)


# --- configuration --------------------------------------------------------------------------------


def config_keys() -> set[str]:
    """The fields of struct config, less the counts of its arrays."""
    header = (REPOSITORY / "server/config.h").read_text()
    body = re.search(r"\nstruct config \{(.*?)\n\};", header, re.S).group(1)
    body = re.sub(r"//.*", "", body)
    fields = re.findall(r"(\w+)(?:\[\w+\])?;", body)
    return {field for field in fields if not field.endswith("_n")}


def test_help_config_lists_every_key() -> None:
    shown = run(EINSUMD, "--help-config")
    assert shown.returncode == 0
    keys = config_keys()
    assert len(keys) > 25
    missing = {key for key in keys if not re.search(rf"\b{key}\b", shown.stdout)}
    assert not missing


def check_config(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "checked.json"
    path.write_text(text)
    return run(EINSUMD, "--check-config", "--config", path)


def test_check_config_good(tmp_path: Path) -> None:
    for text in ("{}", json.dumps({"listen": ["unix:/run/e.sock"], "compute_threads": 3})):
        checked = check_config(tmp_path, text)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    "text, mentions",
    [
        ('{"compute_thread": 1}', ["compute_thread"]),
        ('{\n"lanes": 1,\n"lanes": 2\n}', ["lanes", "3"]),
        ('{\n"lanes": 1,,\n}', ["2"]),
        ('{"lanes": "two"}', ["lanes", "two"]),
        ('{"lanes": -1}', ["lanes", "-1"]),
        ('{"lanes": 1.5}', ["lanes", "1.5"]),
        ('{"lanes": 99999999999999999999}', []),
        ('{"listen": ["nowhere"]}', ["listen", "nowhere"]),
        ('{"listen": []}', ["listen"]),
        ('{"listen": "127.0.0.1:1"}', ["listen"]),
        ('{"engine": "abacus"}', ["engine", "abacus", "cpu"]),
        ('{"weights": [{"pathh": "x"}]}', ["pathh"]),
        ('{"weights": [{}]}', ["path"]),
        ('{"request_tokens_max": 65537}', ["request_tokens_max"]),
        ('{"buckets": [4, 2]}', ["buckets"]),
        ('{"unix_socket_mode": "0999"}', ["unix_socket_mode"]),
        ('{"self_test_at_start": 1}', ["self_test_at_start"]),
        ("[]", []),
        ("", []),
        ("\0", []),
        ("{" * 100_000, []),
    ],
)
def test_check_config_bad(tmp_path: Path, text: str, mentions: list[str]) -> None:
    checked = check_config(tmp_path, text)
    assert checked.returncode not in (0, -6, -11), checked
    assert checked.stderr
    for mention in mentions:
        assert mention in checked.stderr


def test_bad_start(tmp_path: Path, rng: np.random.Generator) -> None:
    """What is wrong at start is said in one line, and the exit code is not 0."""
    root = tmp_path / "root"
    write_checkpoint(root / "model", small_weights(1))
    good = {"weights_roots": [str(root)]}
    for config, mention in (
        ({"weights_roots": [str(tmp_path / "none")]}, "none"),
        (good | {"weights": [{"path": "no such model"}]}, "no such model"),
        (good | {"weights": [{"path": "model", "output_dim": 384}]}, TENSOR_NAME.format(0)),
        (good | {"weights": [{"path": "model", "output_dim": 256}] * 2}, TENSOR_NAME.format(0)),
        (good | {"kernel": "no such kernel"}, "no such kernel"),
    ):
        daemon = Daemon(tmp_path, wait=False, **config)
        assert daemon.wait_exit() not in (0, -6, -11), daemon.log
        assert mention in daemon.log
        assert any(event["level"] == "error" for event in daemon.events), daemon.log


def test_command_line(tmp_path: Path) -> None:
    assert re.search(r"\d+\.\d+\.\d+", run(EINSUMD, "--version").stdout)
    for arguments in (["--no-such-option"], ["--config", tmp_path / "none.json"], ["stray"]):
        result = run(EINSUMD, *arguments)
        assert result.returncode not in (0, -6, -11)
        assert result.stderr


def test_plain_log(tmp_path: Path) -> None:
    """The default format: one line an event, with time and level."""
    path = tmp_path / "plain.json"
    path.write_text(json.dumps({"listen": [f"unix:{tmp_path}/s.sock"], "engine": "cpu"}))
    process = subprocess.Popen(
        [EINSUMD, "--config", path], stderr=subprocess.PIPE, text=True, env=environment()
    )
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if " info ready" in line:
            break
    process.send_signal(signal.SIGTERM)
    lines += process.stderr.read().splitlines()
    assert process.wait(seconds(30)) == 0
    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (debug|info|warn|error) ", line)
