"""CRC-32C of tensors and outputs, by every road: made and judged here by google-crc32c; and what
happens when a bit turns over on the way, by a proxy that turns it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path
from typing import Any, Iterator

import google_crc32c
import grpc
import ml_dtypes
import numpy as np
import pytest
from grpc import StatusCode

import oracle
from client import Client
from conftest import Site, serving, small_weights
from daemon import EINSUMCTL, run
from inference import NAME, Case, infer, make_infer, parameter
from python_package import arrays
from shared_memory import Connection, share
from test_output_project import Projection
from test_output_project import start as start_output_project

BATCH = 16
FIRST, SECOND, OUTPUT = 1, 2, 4  # einsum_ring_sum


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("checksums")
    with serving(
        folder, small_weights(), 256, batch_tokens_max=BATCH,
        shared_memory_listen=f"unix:{folder}/shared.sock",
    ) as made:  # fmt: skip
        yield made


def crc(data: bytes) -> int:
    return google_crc32c.value(data)


def tensors_of(request: Any) -> tuple[str, str]:
    project = request.DESCRIPTOR.name == "OutputProjectRequest"
    return ("attention", "positions") if project else ("activations", "activation_scales")


def add_sums(request: Any, wrong: int = -1, bits: int = 1) -> Any:
    """The sums of both tensors; of one of them, not quite."""
    for which, name in enumerate(tensors_of(request)):
        turned = bits if which == wrong else 0
        getattr(request, f"{name}_crc32c").value = crc(getattr(request, name)) ^ turned
    request.output_crc32c = True
    return request


def expect_loss(call: Any, field: str, *texts: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == StatusCode.DATA_LOSS
    details = caught.value.details()
    assert details.startswith(f"{field}: expected CRC-32C 0x"), details
    for text in texts:
        assert text in details


# --- right and wrong sums -------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5, BATCH, BATCH + 3, 3 * BATCH + 5])
def test_right_sums(site: Site, rng: np.random.Generator, tokens: int) -> None:
    """One batch, and requests that are cut."""
    request, expected = site.good_case(rng, tokens)
    assert not site.client.einsum(request).HasField("output_crc32c")  # unless asked for
    reply = site.client.einsum(add_sums(request))
    oracle.check(reply.output, "BF16", *expected)
    assert reply.output_crc32c.value == crc(reply.output)


def test_each_sum_by_itself(site: Site, rng: np.random.Generator) -> None:
    request = site.good_request(rng)
    request.output_crc32c = True
    assert site.client.einsum(request).HasField("output_crc32c")
    request.activations_crc32c.value = crc(request.activations)
    site.client.einsum(request)
    # A sum that is given and 0 is a sum, too.
    request.activation_scales_crc32c.SetInParent()
    expect_loss(
        lambda: site.client.einsum(request), "activation_scales", "0x00000000",
        f"{crc(request.activation_scales):08x}", f"{len(request.activation_scales)} bytes",
    )  # fmt: skip


def test_no_tokens(site: Site, rng: np.random.Generator) -> None:
    request = site.good_request(rng, tokens=0)
    reply = site.client.einsum(add_sums(request))
    assert reply.HasField("output_crc32c") and reply.output_crc32c.value == crc(b"") == 0


@pytest.mark.parametrize("tokens", [3, BATCH + 3])
def test_a_digest_has_the_sum_of_what_stays(
    site: Site, rng: np.random.Generator, tokens: int
) -> None:
    request = add_sums(site.good_request(rng, tokens))
    whole = site.client.einsum(request)
    request.digest_only = True
    digest = site.client.einsum(request)
    assert not digest.output
    assert oracle.same_but_for_rounding(whole.output, whole.output)
    assert digest.output_crc32c.value == whole.output_crc32c.value


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("tokens", [1, BATCH + 3])
def test_a_wrong_sum(site: Site, rng: np.random.Generator, tokens: int, which: int) -> None:
    request = add_sums(site.good_request(rng, tokens), wrong=which, bits=1 << 31)
    name = tensors_of(request)[which]
    data = getattr(request, name)
    expect_loss(
        lambda: site.client.einsum(request), name, f"0x{crc(data) ^ 1 << 31:08x}, as the request",
        f"got 0x{crc(data):08x} of the {len(data)} bytes",
    )  # fmt: skip
    site.check_serves(rng)


def test_streams(site: Site, rng: np.random.Generator) -> None:
    requests = [add_sums(site.good_request(rng), wrong=i % 3 - 1) for i in range(12)]
    for i, request in enumerate(requests):
        request.request_id = i
    for reply in site.client.stream(requests):
        wrong = reply.response.request_id % 3 - 1
        assert reply.error.code == (StatusCode.DATA_LOSS.value[0] if wrong >= 0 else 0)
        if wrong >= 0:
            assert reply.error.field == ("activations", "activation_scales")[wrong]
        else:
            assert reply.response.output_crc32c.value == crc(reply.response.output)


def test_output_project(tmp_path: Path, rng: np.random.Generator) -> None:
    with start_output_project(tmp_path, batch_tokens_max=BATCH) as made:
        for tokens in (3, BATCH + 5):
            projection = Projection(rng, tokens=tokens)
            call = made.client.callable("einsum.v1.Einsum", "OutputProject")
            reply = call(add_sums(projection.request(made.client)))
            projection.check(reply)
            assert reply.output_crc32c.value == crc(reply.output)
            for which, name in enumerate(("attention", "positions")):
                request = add_sums(projection.request(made.client), wrong=which)
                expect_loss(lambda request=request: call(request), name)


def test_open_inference_protocol(models: Site, rng: np.random.Generator) -> None:
    activations = oracle.random_activations(rng, models.weights[NAME], 5, "FP32")
    request = make_infer(models.client, NAME, activations, Case())
    first, second = (crc(raw) for raw in request.raw_input_contents)

    def ask(**parameters: Any) -> Any:
        return infer(
            models.client, make_infer(models.client, NAME, activations, Case(), parameters)
        )

    reply = ask(activations_crc32c=first, activation_scales_crc32c=second, output_crc32c=True)
    assert parameter(reply.parameters["output_crc32c"]) == crc(reply.raw_output_contents[0])
    expect_loss(lambda: ask(activations_crc32c=first ^ 1), "activations")
    expect_loss(lambda: ask(activation_scales_crc32c=0), "activation_scales")
    with pytest.raises(grpc.RpcError, match="activations_crc32c: expected 32 bits"):
        ask(activations_crc32c=1 << 32)
    with pytest.raises(grpc.RpcError, match="output_crc32c: expected a bool"):
        ask(output_crc32c=1)


# --- shared memory --------------------------------------------------------------------------------


def shared_socket(site: Site) -> str:
    return site.client.call("ServerInfo").shared_memory.socket


@pytest.mark.parametrize("tokens", [3, BATCH + 3])
def test_shared_memory_that_changes_after_the_sum(
    site: Site, rng: np.random.Generator, tokens: int
) -> None:
    with Connection(shared_socket(site)) as connection:
        region = connection.register()
        for which, name in enumerate(("activations", "activation_scales")):
            request, expected = site.good_case(rng, tokens)
            add_sums(request)
            room = expected[0].size * 2
            offset = share(request, region, room)
            reply = site.client.einsum(request)
            output = region.get(offset, room)
            oracle.check(output, "BF16", *expected)
            assert reply.output_crc32c.value == crc(output)
            shared = request.shared
            at = (shared.activations_offset, shared.scales_offset)[which]
            region.memory[at] ^= 0x10
            expect_loss(lambda request=request: site.client.einsum(request), name)
            region.memory[at] ^= 0x10
            site.client.einsum(request)


@pytest.mark.parametrize("tokens", [3, BATCH + 3])
def test_a_ring(site: Site, rng: np.random.Generator, tokens: int) -> None:
    with Connection(shared_socket(site)) as connection:
        region = connection.register()
        ring = connection.ring(region)
        request, expected = site.good_case(rng, tokens)
        sums = [crc(request.activations), crc(request.activation_scales)]
        room = expected[0].size * 2
        offset = share(request, region, room)
        completion = ring.project(request)
        assert (completion.status, completion.checksums) == (0, 0)
        completion = ring.project(request, sums=(FIRST | SECOND | OUTPUT, *sums))
        assert (completion.status, completion.checksums) == (0, OUTPUT), completion
        assert completion.output_crc32c == crc(region.get(offset, room))
        oracle.check(region.get(offset, room), "BF16", *expected)
        for bit, name in ((FIRST, "activations"), (SECOND, "activation_scales")):
            wrong = [value ^ 1 for value in sums]
            completion = ring.project(request, sums=(bit, *wrong))
            assert completion.status == StatusCode.DATA_LOSS.value[0]
            assert completion.field == name
            assert "expected CRC-32C" in completion.text
        ring.close()


# --- our own clients, and a wire that lies --------------------------------------------------------


class Proxy:
    """Between a client and the daemon; turns one bit over where it finds `mark` going through."""

    def __init__(self, address: str, mark: bytes, answers: bool = False):
        host, port = address.rsplit(":", 1)
        self.target, self.mark, self.answers = (host, int(port)), mark, answers
        self.turned = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.target)
                self.sockets += [near, far]
                for pair in ((near, far, not self.answers), (far, near, self.answers)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, lies: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                at = data.find(self.mark) if lies else -1
                if at >= 0:
                    data = bytearray(data)
                    data[at] ^= 0x40  # of E4M3 the exponent's highest
                    self.turned += 1
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: Any) -> None:
        self.listener.close()
        for each in self.sockets:
            each.close()


def test_a_bit_turned_on_the_way(site: Site, rng: np.random.Generator) -> None:
    """Without sums it is another answer, which nobody notices; with them, DATA_LOSS."""
    # All of one scale, in FP32: where a bit turns it shows, whatever else is summed.
    request = site.good_request(rng, output_type="FP32")
    request.activation_scales = bytes([127]) * len(request.activation_scales)
    mark = request.activations[100:116]
    with Proxy(site.client.address, mark) as proxy, Client(proxy.address) as client:
        silent = client.einsum(request)
        assert proxy.turned == 1
        assert silent.output != site.client.einsum(request).output
        expect_loss(lambda: client.einsum(add_sums(request)), "activations")
        assert proxy.turned == 2


@pytest.mark.parametrize("transport", ["tcp", "shm", "ring"])
@pytest.mark.parametrize("tokens", [3, BATCH + 3])
def test_python(
    einsumd: Any, site: Site, rng: np.random.Generator, transport: str, tokens: int
) -> None:
    name, weight = next(iter(site.weights.items()))
    activations = oracle.random_activations(rng, weight, tokens, "UE8M0")
    a, scales = arrays(activations, "TGR", "GKT")
    out = np.empty((tokens, weight.groups, weight.output_dim), ml_dtypes.bfloat16)
    shared = None if transport == "tcp" else "auto"
    with einsumd.Client(
        site.client.address, checksums=True, shared_memory=shared, transport=transport
    ) as client:
        einsumd.fp8_einsum(
            "bhr,hdr->bhd", (a, scales), (client.weight(name), None), out, recipe=(1, 128, 128)
        )
    oracle.check(out.tobytes(), "BF16", *site.expected(activations, weight))


def ask_python(einsumd: Any, site: Site, rng: np.random.Generator, address: str,
               values: np.ndarray, **options: Any) -> np.ndarray:  # fmt: skip
    name, weight = next(iter(site.weights.items()))
    tokens = len(values)
    activations = oracle.Activations(values, np.full((tokens, weight.groups, 4), 127, np.uint8))
    a, scales = arrays(activations, "TGR", "GKT")
    out = np.empty((tokens, weight.groups, weight.output_dim), ml_dtypes.bfloat16)
    with einsumd.Client(address, shared_memory=None, **options) as client:
        einsumd.fp8_einsum(
            "bhr,hdr->bhd", (a, scales), (client.weight(name), None), out, recipe=(1, 128, 128)
        )
    return out


def test_python_over_a_wire_that_lies(
    einsumd: Any, site: Site, rng: np.random.Generator
) -> None:
    """Requests, which the daemon finds out; and answers, which the client's library does."""
    _, weight = next(iter(site.weights.items()))
    values = oracle.random_activations(rng, weight, 2, "UE8M0").values
    honest = ask_python(einsumd, site, rng, site.client.address, values, checksums=True)
    with Proxy(site.client.address, values.tobytes()[40:56]) as proxy:
        with pytest.raises(einsumd.DataLoss, match="activations: expected CRC-32C"):
            ask_python(einsumd, site, rng, proxy.address, values, checksums=True)
        assert proxy.turned > 0
    mark = honest.tobytes()[64:80]
    with Proxy(site.client.address, mark, answers=True) as proxy:
        assert not np.array_equal(
            ask_python(einsumd, site, rng, proxy.address, values).view(np.uint16),
            honest.view(np.uint16),
        )
        with pytest.raises(einsumd.DataLoss, match="output: expected CRC-32C"):
            ask_python(einsumd, site, rng, proxy.address, values, checksums=True)
        assert proxy.turned == 2


def test_einsumctl(site: Site) -> None:
    name = next(iter(site.weights))
    common = (EINSUMCTL, "--endpoint", site.client.address)
    made = run(*common, "run", "--weight", name, "--random", "20", "--checksums")
    assert made.returncode == 0, made.stderr
    for arguments in (
        ("check", "--checkpoint", site.root / "model", "--tokens", "1,20"),
        ("bench", "--duration", "0.2", "--warmup", "0"),
    ):
        made = run(*common, *arguments, "--checksums")
        assert made.returncode == 0, made.stderr
    # The seed's activations begin with the same bytes each time: what is turned over is found out.
    with recorder(site) as begin:
        with Proxy(site.client.address, begin) as proxy:
            made = run(EINSUMCTL, "--endpoint", proxy.address, "run", "--weight", name, "--random",
                       "2", "--checksums")  # fmt: skip
            assert proxy.turned > 0
    assert made.returncode != 0
    assert "activations: expected CRC-32C" in made.stderr


@contextlib.contextmanager
def recorder(site: Site) -> Iterator[bytes]:
    """16 bytes from the middle of what einsumctl sends with its first seed."""
    seen: list[bytes] = []

    class Recorder(Proxy):
        def _pump(self, source: socket.socket, sink: socket.socket, lies: bool) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    if lies:
                        seen.append(data)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

    name = next(iter(site.weights))
    with Recorder(site.client.address, b"") as proxy:
        run(EINSUMCTL, "--endpoint", proxy.address, "run", "--weight", name, "--random", "2")
    longest = max(seen, key=len)
    yield longest[len(longest) // 2 :][:16]


def test_google_crc32c_is_what_is_promised() -> None:
    assert crc(b"123456789") == 0xE3069283
    assert struct.pack("<I", crc(b"\0" * 32)).hex() == "aa36918a"  # RFC 3720's
