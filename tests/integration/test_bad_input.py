"""Whatever a caller sends or breaks off, he gets the right code and a text that helps, and the
daemon answers the next good request."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc import StatusCode

import oracle
from checkpoints import TENSOR_NAME, tensors_of, with_header, write_checkpoint, write_file
from client import Client, details_of, field_violations, retry_delay_ms
from conftest import Site, serving, small_weights
from daemon import count, run, seconds, wait_until
from raw_http2 import (
    DATA,
    END_STREAM,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    RawConnection,
    call_headers,
    frame,
    message,
)  # fmt: skip

EINSUM_PATH = "/einsum.v1.Einsum/Einsum"
STREAM_PATH = "/einsum.v1.Einsum/EinsumStream"

NAME = TENSOR_NAME.format(0)
GROUPS, OUTPUT_DIM, REDUCED_DIM, BLOCKS = 4, 256, 512, 4  # of every weight here


@pytest.fixture(autouse=True)
def serves_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the daemon that it used answers an ordinary request, on a connection of old
    and on a new one."""
    yield
    rng = np.random.default_rng(0)
    for fixture in ("small", "slow"):
        if fixture in request.fixturenames:
            site: Site = request.getfixturevalue(fixture)
            assert site.daemon.process.poll() is None, f"the daemon died:\n{site.daemon.log}"
            site.check_serves(rng)
            with Client(site.daemon.address, site.client.schema) as client:
                site.check_serves(rng, client)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Each request waits 0.3 s for company, so that there is time for things to happen to it."""
    with serving(
        tmp_path_factory.mktemp("slow"), small_weights(1), 256, max_queue_delay_us=300_000
    ) as site:
        yield site


def fails(call: Any, code: StatusCode, *texts: str, field: str | None = None) -> grpc.RpcError:
    """`call` must fail with that code; its text holds `texts`, its details blame `field`."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    assert error.code() == code, f"{error.code()}: {error.details()}"
    for text in texts:
        assert text in error.details(), f"{text!r} is not in {error.details()!r}"
    if field:
        assert field_violations(error) == [field]
        assert field in error.details()
    return error


# --- fields that do not fit -----------------------------------------------------------------------


def altered(site: Site, rng: np.random.Generator, **fields: Any) -> Any:
    return site.good_request(rng, **fields)


@pytest.mark.parametrize("difference", [-1, 1, None])
@pytest.mark.parametrize("scale_layout", oracle.SCALE_LAYOUTS)
@pytest.mark.parametrize("field", ["activations", "activation_scales"])
def test_wrong_byte_count(
    small: Site, rng: np.random.Generator, field: str, scale_layout: str, difference: int | None
) -> None:
    request = small.good_request(rng, scale_layout=scale_layout)
    sent = getattr(request, field)
    expected = len(sent)
    got = 0 if difference is None else expected + difference
    setattr(request, field, (sent + b"\0")[:got])
    fails(
        lambda: small.client.einsum(request),
        StatusCode.INVALID_ARGUMENT, str(expected), str(got),
        field=field,
    )  # fmt: skip


def test_scales_of_another_layout_are_refused(small: Site, rng: np.random.Generator) -> None:
    """The mistake that this service is for: scales of one layout passed off as another's."""
    request = small.good_request(rng, scale_layout="GKT")
    request.scale_layout = 1  # TGK, without the padding to 4 tokens
    expected, got = 3 * GROUPS * BLOCKS, 4 * GROUPS * BLOCKS
    fails(
        lambda: small.client.einsum(request),
        StatusCode.INVALID_ARGUMENT, str(expected), str(got),
        field="activation_scales",
    )  # fmt: skip
    request = small.good_request(rng)
    request.scale_type = 1  # FP32
    fails(
        lambda: small.client.einsum(request),
        StatusCode.INVALID_ARGUMENT, str(4 * expected), str(expected),
        field="activation_scales",
    )  # fmt: skip


ENUMS = {
    "recipe": ["RECIPE_1_128_128", "RECIPE_1_1_128", "RECIPE_1_32_32", "RECIPE_1_1_32"],
    "activation_layout": ["ACTIVATION_LAYOUT_TGR", "ACTIVATION_LAYOUT_GTR"],
    "scale_layout": ["SCALE_LAYOUT_TGK", "SCALE_LAYOUT_GKT"],
    "scale_type": ["SCALE_TYPE_FP32", "SCALE_TYPE_UE8M0"],
    "output_type": ["OUTPUT_TYPE_BF16", "OUTPUT_TYPE_FP32"],
}


@pytest.mark.parametrize("field", ENUMS)
def test_enum_unset(small: Site, rng: np.random.Generator, field: str) -> None:
    request = altered(small, rng)
    request.ClearField(field)
    fails(
        lambda: small.client.einsum(request), StatusCode.INVALID_ARGUMENT, *ENUMS[field],
        field=field,
    )  # fmt: skip


@pytest.mark.parametrize("value", [5, 99, 2**31 - 1, -1])
@pytest.mark.parametrize("field", ENUMS)
def test_enum_unknown(small: Site, rng: np.random.Generator, field: str, value: int) -> None:
    """A number from a later version of the API, perhaps."""
    request = altered(small, rng)
    setattr(request, field, value)
    fails(
        lambda: small.client.einsum(request),
        StatusCode.UNIMPLEMENTED, str(value), *ENUMS[field],
        field=field,
    )  # fmt: skip


def test_equation(small: Site, rng: np.random.Generator) -> None:
    supported = "bhr,hdr->bhd"
    for equation in ("bhr,hdr->bdh", "bhr, hdr -> bhd", "x" * 64, "é"):
        request = altered(small, rng, equation=equation)
        fails(
            lambda: small.client.einsum(request), StatusCode.UNIMPLEMENTED, supported,
            field="equation",
        )  # fmt: skip
    request = altered(small, rng, equation="")
    fails(
        lambda: small.client.einsum(request), StatusCode.INVALID_ARGUMENT, supported,
        field="equation",
    )  # fmt: skip
    request = altered(small, rng, equation="x" * 100_000)
    fails(lambda: small.client.einsum(request), StatusCode.INVALID_ARGUMENT, field="equation")


def test_weight_name(small: Site, rng: np.random.Generator) -> None:
    for weight in ("layers.99.attn.wo_a", "é" * 20, "layers.0.attn.wo_", " ", "*", "%s%n"):
        request = altered(small, rng, weight=weight)
        shown = weight if weight.isascii() else "weight"  # statuses are plain ASCII
        fails(lambda: small.client.einsum(request), StatusCode.NOT_FOUND, shown, field="weight")
        fails(lambda: small.client.call("GetWeight", name=weight), StatusCode.NOT_FOUND)
    for weight in ("", "x" * 300, "layers.0\0.attn.wo_a"):
        request = altered(small, rng, weight=weight)
        fails(lambda: small.client.einsum(request), StatusCode.INVALID_ARGUMENT, field="weight")


@pytest.mark.parametrize("recipe", ["RECIPE_1_32_32", "RECIPE_1_1_32"])
def test_recipe_does_not_fit(small: Site, rng: np.random.Generator, recipe: str) -> None:
    request = altered(small, rng, recipe=recipe)
    fails(
        lambda: small.client.einsum(request), StatusCode.INVALID_ARGUMENT, recipe, NAME, "128",
        field="recipe",
    )  # fmt: skip


@pytest.mark.parametrize(
    "begin, end", [(2, 2), (3, 1), (0, GROUPS + 1), (GROUPS, GROUPS + 1), (1, 0), (2**32 - 1, 1)]
)
def test_group_range(small: Site, rng: np.random.Generator, begin: int, end: int) -> None:
    request = altered(small, rng, group_begin=begin, group_end=end)
    error = fails(lambda: small.client.einsum(request), StatusCode.INVALID_ARGUMENT, str(GROUPS))
    (field,) = field_violations(error)
    assert field in ("group_begin", "group_end")


def test_group_range_without_its_tensors(small: Site, rng: np.random.Generator) -> None:
    """All groups' tensors with a slice's range."""
    request = altered(small, rng, group_begin=0, group_end=2)
    fails(lambda: small.client.einsum(request), StatusCode.INVALID_ARGUMENT, field="activations")


def test_packed_scales_need_whole_words(tmp_path: Path, rng: np.random.Generator) -> None:
    """R 640 makes K 5: no whole number of words. Row by row it is fine."""
    weights = {NAME: oracle.random_weight(rng, 2, 128, 640)}
    with serving(tmp_path, weights, 128) as site:
        activations = oracle.random_activations(rng, weights[NAME], 4, "UE8M0")
        request = site.request(NAME, activations)
        exact, error = site.expected(activations, weights[NAME])
        oracle.check(site.client.einsum(request).output, "BF16", exact, error)
        request.scale_layout = 2
        fails(
            lambda: site.client.einsum(request), StatusCode.INVALID_ARGUMENT, "5",
            field="scale_layout",
        )  # fmt: skip
        activations = oracle.random_activations(rng, weights[NAME], 4, "FP32")
        reply = site.client.einsum(site.request(NAME, activations, scale_layout="GKT"))
        exact, error = site.expected(activations, weights[NAME])
        oracle.check(reply.output, "BF16", exact, error)


def test_no_tokens(small: Site, rng: np.random.Generator) -> None:
    """Not an error: an empty batch has an empty result."""
    request = small.good_request(rng, tokens=0, request_id=77, output_type="FP32")
    reply = small.client.einsum(request)
    assert (reply.request_id, reply.output, reply.tokens) == (77, b"", 0)
    assert (reply.groups, reply.output_dim, reply.output_type) == (GROUPS, OUTPUT_DIM, 2)
    request.digest_only = True
    reply = small.client.einsum(request)
    assert (reply.digest.elements, reply.digest.crc32) == (0, 0)
    request.activations = b"x"
    fails(lambda: small.client.einsum(request), StatusCode.INVALID_ARGUMENT, field="activations")


def test_too_many_tokens(small: Site, rng: np.random.Generator) -> None:
    most = small.client.call("ServerInfo").limits.request_tokens_max
    request = small.good_request(rng, tokens=most)
    assert small.client.einsum(request).tokens == most
    request = small.good_request(rng, tokens=most + 1)
    fails(
        lambda: small.client.einsum(request),
        StatusCode.INVALID_ARGUMENT, str(most), str(most + 1),
        field="tokens",
    )  # fmt: skip
    for tokens in (2**31, 2**32 - 1):  # byte counts that wrap round in 32 bits
        request = small.good_request(rng)
        request.tokens = tokens
        fails(lambda: small.client.einsum(request), StatusCode.INVALID_ARGUMENT, field="tokens")


# --- bytes that are no message --------------------------------------------------------------------

HUGE = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"  # a length of 2^63 - 1
BROKEN = {
    "lone tag": b"\x12",
    "length past the end": b"\x12\x05ab",
    "huge length": b"\x6a" + HUGE,
    "huge length of scales": b"\x72" + HUGE + b"xyz",
    "length of 2^32 - 1": b"\x6a\xff\xff\xff\xff\x0fxyz",
    "varint without end": b"\x08" + b"\xff" * 20,
    "varint cut off": b"\x48\x80",
    "field number 0": b"\x02\x01x",
    "wire type 6": b"\x0e\x01",
    "wire type 7": b"\x0f\x01",
    "group": b"\x0b\x0c",
    "group of an unknown field": b"\xa3\x06\xa4\x06",
    "tokens as text": b"\x4a\x01\x05",
    "activations as varint": b"\x68\x05",
    "weight not UTF-8": b"\x12\x02\xc3\x28",
    "fixed64 cut off": b"\xa1\x06\x01\x02",
    "noise": bytes(range(128, 256)) * 64,
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("payload", BROKEN.values(), ids=BROKEN.keys())
def test_broken_message(small: Site, payload: bytes) -> None:
    fails(lambda: small.client.raw(EINSUM_PATH, payload), StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize("path", ["GetWeight", "SelfTest", "UnloadWeights", "LoadWeights"])
def test_broken_control_message(small: Site, path: str) -> None:
    for payload in (BROKEN["length past the end"], b"\x0a" + HUGE, BROKEN["group"]):
        fails(
            lambda: small.client.raw(f"/einsum.v1.Einsum/{path}", payload),
            StatusCode.INVALID_ARGUMENT,
        )


def test_swelling_control_message(small: Site) -> None:
    """A million empty strings take two bytes each on the wire, and many more once unpacked."""
    payload = b"\x0a\x00" * 500_000
    error = fails(
        lambda: small.client.raw("/einsum.v1.Einsum/UnloadWeights", payload),
        StatusCode.INVALID_ARGUMENT,
    )
    assert error.details()


def test_empty_message(small: Site) -> None:
    """All fields unset: the first that is missing is named."""
    error = fails(lambda: small.client.raw(EINSUM_PATH, b""), StatusCode.INVALID_ARGUMENT)
    assert field_violations(error)


def test_unknown_fields_are_skipped(small: Site, rng: np.random.Generator) -> None:
    """From a later version of the API, or out of order, or twice: the last counts."""
    request = small.good_request(rng, request_id=5)
    expected = small.client.einsum(request).output
    unknown = b"\xa0\x06\x01" + b"\xa2\x06\x03abc" + b"\xa5\x06abcd" + b"\xa1\x06abcdefgh"
    twice = b"\x08\x07" + b"\x6a\x03abc" + request.SerializeToString()
    # A later message's fields may come before: tensors first, scalars last.
    tensors = small.client.message(
        "EinsumRequest",
        activations=request.activations,
        activation_scales=request.activation_scales,
    ).SerializeToString()
    request.ClearField("activations")
    request.ClearField("activation_scales")
    shuffled = tensors + unknown + request.SerializeToString()
    response = small.client.schema.message("EinsumResponse")
    for payload in (unknown + twice, twice + unknown, shuffled):
        reply = response.FromString(small.client.raw(EINSUM_PATH, payload))
        assert (reply.request_id, reply.output) == (5, expected)


def test_unknown_method_is_answered_at_once(small: Site) -> None:
    for path in (
        "/einsum.v1.Einsum/NoSuchMethod",
        "/einsum.v1.NoSuchService/Einsum",
        "/einsum.v2.Einsum/Einsum",
        "/",
        "/einsum.v1.Einsum/",
        "/" + "x" * 4000,
    ):
        for payload in (b"", b"x" * 1000):
            begin = time.monotonic()
            fails(
                lambda: small.client.raw(path, payload, timeout=seconds(20)),
                StatusCode.UNIMPLEMENTED,
            )
            assert time.monotonic() - begin < seconds(5)
    streamed = small.client.channel.stream_stream("/einsum.v1.Einsum/NoSuchStream")
    fails(lambda: next(streamed(iter([b"x"]), timeout=seconds(20))), StatusCode.UNIMPLEMENTED)


def test_message_over_the_limit(small: Site) -> None:
    most = small.client.call("ServerInfo").limits.request_bytes_max
    assert most < 1 << 30
    with Client(
        small.daemon.address, small.client.schema, options=[("grpc.max_send_message_length", -1)]
    ) as client:
        fails(
            lambda: client.raw(EINSUM_PATH, bytes(most + 1), timeout=seconds(60)),
            StatusCode.RESOURCE_EXHAUSTED, str(most),
        )  # fmt: skip


def test_compressed_message_is_refused(small: Site, rng: np.random.Generator) -> None:
    """Inflating comes before any check of the size: refused, and without harm to the rest."""
    with Client(
        small.daemon.address, small.client.schema, compression=grpc.Compression.Gzip
    ) as client:
        request = small.good_request(rng, tokens=64)
        request.activations = bytes(len(request.activations))
        fails(lambda: client.einsum(request), StatusCode.UNIMPLEMENTED)


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"\x0a\x05ab", b"\x0a\x02\x08\x80", b"\xff" * 100])
def test_undecodable_stream_message(small: Site, rng: np.random.Generator, payload: bytes) -> None:
    """A reply could not be matched to it, so the stream ends and says why. An empty one can be
    read: it names no request, and is answered like any other mistake."""
    stream = small.client.channel.stream_stream(STREAM_PATH)
    good = small.client.message(
        "EinsumStreamRequest", request=small.good_request(rng, request_id=9)
    ).SerializeToString()
    response = small.client.schema.message("EinsumStreamResponse")
    replies = stream(iter([good, payload, good]), timeout=seconds(30))
    if payload:
        with pytest.raises(grpc.RpcError) as caught:
            list(replies)
        assert caught.value.code() == StatusCode.INVALID_ARGUMENT
        assert "byte" in caught.value.details()
    else:
        codes = sorted(response.FromString(raw).error.code for raw in replies)
        assert codes == [0, 0, StatusCode.INVALID_ARGUMENT.value[0]]


def test_stream_cut_off(slow: Site, rng: np.random.Generator) -> None:
    """The client goes away while its requests are queued."""
    for _ in range(count(10)):
        with Client(slow.daemon.address, slow.client.schema) as client:
            replies = client.stream(slow.good_request(rng, request_id=i) for i in range(20))
            threading.Thread(target=lambda: list(swallow(replies)), daemon=True).start()
            time.sleep(0.05)
    wait_until(lambda: slow.client.counters().connections <= 1)


def swallow(replies: Any) -> Iterator[Any]:
    try:
        yield from replies
    except grpc.RpcError:
        pass


# --- connections that misbehave -------------------------------------------------------------------


def test_half_a_request(small: Site, rng: np.random.Generator) -> None:
    """Cut off at every kind of place, politely and rudely."""
    payload = message(small.good_request(rng, tokens=100).SerializeToString())
    whole = [
        PREFACE,
        frame(SETTINGS, 0, 0),
        call_headers(EINSUM_PATH),
        *(frame(DATA, 0, 1, payload[i : i + 16000]) for i in range(0, len(payload), 16000)),
    ]
    stream = b"".join(whole)
    ends = [3, len(PREFACE), len(PREFACE) + 5, len(PREFACE) + 40, len(stream) // 2, len(stream) - 1]
    for end in [*ends, len(stream)]:
        for rude in (False, True):
            with RawConnection(small.daemon.host_port) as connection:
                connection.send(stream[:end])
                if rude:
                    connection.reset()
    wait_until(lambda: small.client.counters().connections <= 1)


def test_garbage_bytes(small: Site, rng: np.random.Generator) -> None:
    for garbage in (
        rng.bytes(10_000),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(10_000),
        PREFACE + rng.bytes(10_000),
        PREFACE + frame(SETTINGS, 0, 0) + b"\xff\xff\xff" + bytes(6),
        PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 4, 1, b"\xff" * 50),
        PREFACE + frame(SETTINGS, 0, 0, b"x"),
        PREFACE + frame(SETTINGS, 0, 0) + frame(DATA, 0, 1, b"no headers before"),
    ):
        with RawConnection(small.daemon.host_port) as connection:
            try:
                connection.send(garbage)
            except ConnectionError:
                pass  # it had heard enough


def test_lies_about_lengths(small: Site) -> None:
    """A message that claims 4 GB is refused when its length is read, not when memory is gone."""
    for claimed in (2**32 - 1, 2**31, 1 << 30):
        with RawConnection(small.daemon.host_port) as connection:
            connection.hello()
            connection.send(
                call_headers(EINSUM_PATH),
                frame(DATA, END_STREAM, 1, message(b"abc", claimed)),
            )
            assert b"grpc-status" in read_until(connection, b"grpc-status")


def read_until(connection: RawConnection, wanted: bytes) -> bytes:
    got = b""
    connection.socket.settimeout(seconds(10))
    while wanted not in got:
        piece = connection.socket.recv(65536)
        if not piece:
            break
        got += piece
    return got


def test_reset_in_flight(slow: Site, rng: np.random.Generator) -> None:
    """RST_STREAM and a reset of the connection, after the request has come whole."""
    payload = message(slow.good_request(rng).SerializeToString())
    for _ in range(count(10)):
        with RawConnection(slow.daemon.host_port) as connection:
            connection.hello()
            for stream in (1, 3, 5):
                connection.send(
                    call_headers(EINSUM_PATH, stream), frame(DATA, END_STREAM, stream, payload)
                )
            connection.send(frame(RST_STREAM, 0, 1, (8).to_bytes(4, "big")))
            connection.reset()


def test_client_killed_in_the_middle_of_a_message(small: Site) -> None:
    host, port = small.daemon.host_port
    program = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from raw_http2 import *
        connection = RawConnection(({host!r}, {port}))
        connection.hello()
        connection.send(call_headers({EINSUM_PATH!r}), frame(DATA, 0, 1, message(bytes(999), 9999)))
        print("sent", flush=True)
        time.sleep(600)
        """
    )
    victim = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert victim.stdout.readline() == "sent\n"
        wait_until(lambda: small.client.counters().connections >= 2)
    finally:
        victim.kill()
        victim.wait()
        victim.stdout.close()
    wait_until(lambda: small.client.counters().connections == 1)


def test_idle_connections_do_not_hinder(small: Site, rng: np.random.Generator) -> None:
    """Sockets that never say a word, and some that stop half way through the preface."""
    sockets = [socket.create_connection(small.daemon.host_port) for _ in range(50)]
    try:
        for idle in sockets[::2]:
            idle.sendall(PREFACE[:10])
        for _ in range(5):
            small.check_serves(rng)
    finally:
        for idle in sockets:
            idle.close()


def test_connections_over_the_limit(tmp_path: Path, rng: np.random.Generator) -> None:
    with serving(tmp_path, small_weights(1), 256, connections_max=4) as site:
        others = [socket.create_connection(site.daemon.host_port) for _ in range(3)]
        wait_until(lambda: site.client.counters().connections == 4)
        for _ in range(3):
            with RawConnection(site.daemon.host_port, seconds(10)) as refused:
                assert refused.closed_by_peer()
        counters = site.client.counters()
        assert counters.connections == 4
        assert counters.connections_refused >= 3
        site.check_serves(rng)
        others.pop().close()
        wait_until(lambda: site.client.counters().connections < 4)
        with Client(site.daemon.address, site.client.schema) as client:
            site.check_serves(rng, client)
        for other in others:
            other.close()


# --- deadlines, cancels, overload -----------------------------------------------------------------


def test_deadline_passes_in_the_queue(slow: Site, rng: np.random.Generator) -> None:
    before = slow.client.counters()
    request = slow.good_request(rng)
    futures = [slow.client.einsum_future(request, timeout=0.1) for _ in range(3)]
    for future in futures:
        assert future.exception(seconds(10)).code() == StatusCode.DEADLINE_EXCEEDED

    def dropped() -> bool:
        now = slow.client.counters()
        late = now.expired + now.cancelled - before.expired - before.cancelled
        return late == 3 and now.answered == before.answered

    wait_until(dropped, what="the late requests are counted, and none was computed")


def test_deadlines_about_a_millisecond(small: Site, rng: np.random.Generator) -> None:
    """Too late at once, or just in time: never a wrong answer, never silence."""
    request = small.good_request(rng, tokens=500)
    expected = small.client.einsum(request).output
    late = 0
    for index in range(count(100)):
        try:
            reply = small.client.einsum(request, timeout=0.0002 * (1 + index % 25))
            assert reply.output == expected
        except grpc.RpcError as error:
            # The batches of those who gave up still run, and may hold all buffers.
            if error.code() != StatusCode.RESOURCE_EXHAUSTED:
                assert error.code() == StatusCode.DEADLINE_EXCEEDED
                late += 1
    assert late
    wait_until(lambda: answers(small, rng))


def test_deadline_cap(tmp_path: Path, rng: np.random.Generator) -> None:
    """A request without a deadline gets deadline_ms_max, and is told when it has passed."""
    with serving(
        tmp_path, small_weights(1), 256, deadline_ms_max=200, max_queue_delay_us=1_000_000
    ) as site:
        error = fails(
            lambda: site.client.einsum(site.good_request(rng), timeout=None),
            StatusCode.DEADLINE_EXCEEDED,
        )
        assert error.details()
        assert site.client.counters().expired == 1


def test_cancel_in_flight(slow: Site, rng: np.random.Generator) -> None:
    before = slow.client.counters()
    futures = [slow.client.einsum_future(slow.good_request(rng)) for _ in range(8)]
    time.sleep(0.05)
    for future in futures[::2]:
        assert future.cancel()
    for future in futures[1::2]:
        assert future.result(seconds(30)).tokens == 3
    wait_until(lambda: slow.client.counters().cancelled - before.cancelled == 4)
    assert slow.client.counters().answered - before.answered == 4


def test_flood(tmp_path: Path, rng: np.random.Generator) -> None:
    """Far more at once than there is room for: some get their answer, the rest advice when to
    come again, and nobody waits for ever."""
    config = {
        "queue_requests_max": 8,
        "batch_requests_max": 16,
        "max_queue_delay_us": 2000,  # so that the queue fills, however fast the engine is
        "batches": 3,
        "compute_threads": 1,
        "connection_requests_max": 1000,
    }
    with serving(tmp_path, small_weights(1), 256, **config) as site:
        request, expected = site.good_case(rng, tokens=1)
        before = site.client.counters()
        options = [("grpc.enable_retries", 0)]
        total, answered, refused = count(10_000), 0, 0
        with Client(site.daemon.address, site.client.schema, options=options) as client:
            for begin in range(0, total, 1000):
                futures = [
                    client.einsum_future(request, seconds(60))
                    for _ in range(min(1000, total - begin))
                ]
                for future in futures:
                    error = future.exception(seconds(60))
                    if error is None:
                        assert oracle.matches(future.result().output, "BF16", *expected)
                        answered += 1
                        continue
                    assert error.code() == StatusCode.RESOURCE_EXHAUSTED, error.details()
                    refused += 1
                    delay_ms = retry_delay_ms(error)
                    assert delay_ms and delay_ms > 0
                    trailers = dict(error.trailing_metadata())
                    assert int(trailers["grpc-retry-pushback-ms"]) == delay_ms
        assert answered and refused
        assert answered + refused == total
        after = site.client.counters()
        assert after.refused - before.refused == refused
        assert after.answered - before.answered == answered
        assert after.requests - before.requests == total
        site.check_serves(rng)


def test_stream_flow_control(tmp_path: Path, rng: np.random.Generator) -> None:
    """One stream may hold stream_requests_max; past that the daemon reads on only as it answers."""
    with serving(tmp_path, small_weights(1), 256, stream_requests_max=4) as site:
        request, expected = site.good_case(rng)
        total = count(300)
        replies = list(site.client.stream([request] * total, seconds(60)))
        assert len(replies) == total
        for reply in replies:
            assert not reply.HasField("error"), reply.error
            assert oracle.matches(reply.response.output, "BF16", *expected)


def test_reader_that_does_not_read(tmp_path: Path, rng: np.random.Generator) -> None:
    """Replies that nobody reads hold batch memory, so their caller is cut off."""
    config = {"reply_timeout_ms": 300, "batches": 3}
    with serving(tmp_path, small_weights(1), 256, **config) as site:
        payload = message(
            site.good_request(rng, tokens=400, output_type="FP32").SerializeToString()
        )
        with RawConnection(site.daemon.host_port, seconds(20)) as connection:
            connection.hello()
            for stream in range(1, 17, 2):
                connection.send(call_headers(EINSUM_PATH, stream))
                for i in range(0, len(payload), 16384):
                    end = END_STREAM if i + 16384 >= len(payload) else 0
                    try:
                        connection.send(frame(DATA, end, stream, payload[i : i + 16384]))
                    except (ConnectionError, TimeoutError):
                        break
            # Its 8 replies of 1.6 MB would fill all buffers for good.
            for _ in range(5):
                wait_until(lambda: answers(site, rng), 20, "others are served again")


def answers(site: Site, rng: np.random.Generator) -> bool:
    try:
        site.check_serves(rng)
    except grpc.RpcError as error:
        assert error.code() == StatusCode.RESOURCE_EXHAUSTED
        return False
    return True


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture
def corner(small: Site, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of the test's own below the daemon's root."""
    folder = small.root / request.node.name.replace("/", "-")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def load_fails(
    site: Site, path: Any, code: StatusCode, *texts: str, field: str | None = None, **fields: Any
) -> None:
    """Nothing of it may be visible afterwards, nor anything of before be gone."""
    resident = site.client.call("ListWeights")
    memory = site.client.call("ServerInfo").memory.weights_bytes
    options = {"name_prefix": "bad.", "output_dim": 256} | fields
    fails(lambda: site.client.load(path, **options), code, *texts, field=field)
    assert site.client.call("ListWeights") == resident
    assert site.client.call("ServerInfo").memory.weights_bytes == memory


PRECONDITION = StatusCode.FAILED_PRECONDITION


def test_load_truncated_file(small: Site, corner: Path, rng: np.random.Generator) -> None:
    weight = oracle.random_weight(rng, 4, 256, 512)
    whole = write_file(corner / "model.safetensors", weight).read_bytes()
    for keep in (0, 4, 8, 20, 400, len(whole) // 2, len(whole) - 1):
        (corner / "model.safetensors").write_bytes(whole[:keep])
        load_fails(small, corner / "model.safetensors", PRECONDITION, "model.safetensors")
        load_fails(small, corner, PRECONDITION, "model.safetensors")
    (corner / "model.safetensors").write_bytes(whole + b"x")
    load_fails(small, corner, PRECONDITION, "model.safetensors")


HOSTILE_HEADERS: dict[str, tuple[Any, int | None]] = {
    "overlap": ({"a.attn.wo_a.weight": {"dtype": "F8_E4M3", "shape": [256, 512],
                                        "data_offsets": [0, 131072]},
                 "a.attn.wo_a.scale": {"dtype": "F8_E8M0", "shape": [2, 4],
                                       "data_offsets": [131068, 131076]}}, None),
    "hole": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, None),
    "past the end": ({"a": {"dtype": "U8", "shape": [1 << 20], "data_offsets": [0, 1 << 20]}},
                     None),
    "backwards": ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}}, None),
    "negative": ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [-8, 0]}}, None),
    "shape wraps round": ({"a": {"dtype": "F32", "shape": [1 << 32, 1 << 32, 4],
                                 "data_offsets": [0, 131076]}}, None),
    "size is not the shape's": ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 131076]}},
                                None),
    "not JSON": (b"{\"a\": ", None),
    "not an object": (b"[1, 2, 3]", None),
    "deep": (b"{\"a\":" + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    "name twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
                   b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', None),
    "header of 2 GB": (b"{}", 2 << 30),
    "header of 2^64 - 1": (b"{}", 2**64 - 1),
    "header longer than the file": (b"{}", 200_000),
    "empty header": (b"", 0),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_load_hostile_header(small: Site, corner: Path, case: str) -> None:
    header, length = HOSTILE_HEADERS[case]
    with_header(corner / "model.safetensors", header, bytes(131076), length)
    load_fails(small, corner, PRECONDITION, "model.safetensors")


def test_load_wrong_dtype(small: Site, corner: Path, rng: np.random.Generator) -> None:
    values = rng.integers(0, 255, (1024, 512), np.uint8)
    scales = np.ones((8, 4), np.float32)
    for weight_type, scale_type in (("F8_E5M2", "F32"), ("U8", "F32"), ("F8_E4M3", "U8")):
        scale_bytes = scales.tobytes() if scale_type == "F32" else bytes(32)
        end = values.nbytes + len(scale_bytes)
        header = {
            f"{NAME}.weight": {"dtype": weight_type, "shape": [1024, 512],
                               "data_offsets": [0, values.nbytes]},
            f"{NAME}.scale": {"dtype": scale_type, "shape": [8, 4],
                              "data_offsets": [values.nbytes, end]},
        }  # fmt: skip
        with_header(corner / "model.safetensors", header, values.tobytes() + scale_bytes)
        wrong = weight_type if weight_type != "F8_E4M3" else scale_type
        load_fails(small, corner, StatusCode.UNIMPLEMENTED, wrong, NAME)


def test_load_wrong_shapes(small: Site, corner: Path, rng: np.random.Generator) -> None:
    weight = oracle.random_weight(rng, 4, 256, 512)
    tensors = tensors_of(weight, NAME)
    write_checkpoint(corner / "fine", {NAME: weight})
    # D that does not divide the rows; a rank past the size; a size that does not divide G.
    load_fails(small, corner / "fine", PRECONDITION, output_dim=384)
    for rank, size in ((2, 2), (5, 4), (1, 0), (0, 8), (0, 3)):
        load_fails(
            small, corner / "fine", StatusCode.INVALID_ARGUMENT,
            tensor_parallel_rank=rank, tensor_parallel_size=size,
        )  # fmt: skip

    from safetensors.numpy import save_file

    file = corner / "odd" / "model.safetensors"
    file.parent.mkdir()
    save_file({f"{NAME}.weight": tensors[f"{NAME}.weight"]}, file)  # no scale
    load_fails(small, file, PRECONDITION, NAME)
    save_file(tensors | {f"{NAME}.scale": tensors[f"{NAME}.scale"][:, :3].copy()}, file)
    load_fails(small, file, StatusCode.UNIMPLEMENTED, NAME, "128x128")
    save_file({f"{NAME}.weight": tensors[f"{NAME}.weight"].ravel()}, file)
    load_fails(small, file, PRECONDITION, NAME)


def test_load_matches_nothing(small: Site, corner: Path, rng: np.random.Generator) -> None:
    weight = oracle.random_weight(rng, 4, 256, 512)
    write_checkpoint(corner, {NAME: weight})
    with pytest.raises(grpc.RpcError) as caught:
        small.client.load(corner, tensors=["*.no_such.weight"], output_dim=256)
    assert caught.value.code() in (StatusCode.NOT_FOUND, PRECONDITION)
    assert "no_such" in caught.value.details()


def test_load_missing(small: Site, corner: Path, rng: np.random.Generator) -> None:
    load_fails(small, small.root / "nowhere", StatusCode.NOT_FOUND, "nowhere")
    load_fails(small, "nowhere/at/all", StatusCode.NOT_FOUND)
    load_fails(small, "", StatusCode.INVALID_ARGUMENT)
    with pytest.raises(grpc.RpcError) as caught:
        small.client.load(corner)  # an empty folder
    assert caught.value.code() in (StatusCode.NOT_FOUND, PRECONDITION)

    weights = {TENSOR_NAME.format(i): oracle.random_weight(rng, 4, 256, 512) for i in range(4)}
    write_checkpoint(corner, weights, shards=2)
    (corner / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(grpc.RpcError) as caught:
        small.client.load(corner, output_dim=256, name_prefix="bad.")
    assert caught.value.code() in (StatusCode.NOT_FOUND, PRECONDITION)
    assert "model-00002-of-00002" in caught.value.details()
    assert len(small.client.call("ListWeights").weights) == 2


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"{",
        b"[]",
        b'{"weight_map": 5}',
        b'{"metadata": {}}',
        b'{"weight_map": {"layers.0.attn.wo_a.weight": 7}}',
        b'{"weight_map": {"layers.0.attn.wo_a.weight": "../../../etc/passwd"}}',
        b'{"weight_map": {"layers.0.attn.wo_a.weight": "/etc/passwd"}}',
        b'{"weight_map": ' + b"[" * 50_000,
    ],
)
def test_load_bad_index(small: Site, corner: Path, index: bytes) -> None:
    (corner / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(grpc.RpcError) as caught:
        small.client.load(corner)
    assert caught.value.code() in (
        PRECONDITION, StatusCode.NOT_FOUND, StatusCode.PERMISSION_DENIED,
    )  # fmt: skip
    assert "root:" not in caught.value.details()  # of /etc/passwd


def test_load_index_names_the_wrong_shard(
    small: Site, corner: Path, rng: np.random.Generator
) -> None:
    weight = oracle.random_weight(rng, 4, 256, 512)
    write_checkpoint(corner, {NAME: weight}, shards=2)
    index = corner / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    turned = {name: files[1 - files.index(file)] for name, file in content["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": turned}))
    load_fails(small, corner, PRECONDITION, NAME)


def test_load_outside_the_roots(
    small: Site, corner: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """By absolute path, by .., through links of folders and of files; existing or not."""
    denied = StatusCode.PERMISSION_DENIED
    weight = oracle.random_weight(rng, 4, 256, 512)
    outside = write_checkpoint(tmp_path / "outside", {NAME: weight})
    load_fails(small, outside, denied, field="path")
    load_fails(small, tmp_path / "no such thing", denied)
    load_fails(small, "/", denied)
    load_fails(small, "/etc/shadow", denied)
    load_fails(small, os.path.relpath(outside, small.root), denied)
    load_fails(small, f"{small.root}/../../{tmp_path.name}", denied)
    beside = small.root.parent / (small.root.name + "-beside")  # shares the root's beginning
    beside.mkdir()
    load_fails(small, beside, denied)
    beside.rmdir()

    (corner / "link").symlink_to(outside)
    load_fails(small, corner / "link", denied)
    file = outside / "model-00001-of-00001.safetensors"
    (corner / "link.safetensors").symlink_to(file)
    load_fails(small, corner / "link.safetensors", denied)
    # A folder that is fine itself, of whose shards one leads outside.
    inside = corner / "inside"
    inside.mkdir()
    shutil.copy(outside / "model.safetensors.index.json", inside)
    (inside / file.name).symlink_to(file)
    load_fails(small, inside, denied)


def test_load_not_a_file(small: Site, corner: Path) -> None:
    """A pipe that nobody writes must not hold the loader for ever."""
    os.mkfifo(corner / "model.safetensors")
    begin = time.monotonic()
    load_fails(small, corner / "model.safetensors", PRECONDITION)
    load_fails(small, corner, PRECONDITION)
    assert time.monotonic() - begin < seconds(10)


def test_load_already_resident(small: Site, rng: np.random.Generator) -> None:
    fails(
        lambda: small.client.load(small.root / "model", output_dim=256),
        StatusCode.ALREADY_EXISTS, NAME,
    )  # fmt: skip
    assert len(small.client.call("ListWeights").weights) == 2


def test_load_names_with_control_characters(small: Site, corner: Path) -> None:
    """They come back in error texts, and go to the log, which must stay one line an event."""
    name = 'layers.0\n{"msg":"ready"}\u0007.attn.wo_a'
    header = {f"{name}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    with_header(corner / "model.safetensors", header, bytes(4))
    load_fails(small, corner, PRECONDITION)
    ready = [event for event in small.daemon.events if event["msg"] == "ready"]
    assert len(ready) == 1


def test_disk_fails_under_the_map(tmp_path: Path, rng: np.random.Generator) -> None:
    """The file shrinks once it is mapped: DATA_LOSS, not SIGBUS."""
    shim = tmp_path / "truncate_after_mmap.so"
    source = Path(__file__).with_name("truncate_after_mmap.c")
    built = run("cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", shim, source)
    assert built.returncode == 0, built.stderr
    armed = tmp_path / "armed"
    environment = {
        "LD_PRELOAD": str(shim),
        "TRUNCATE_WHILE_EXISTS": str(armed),
        # The shim comes before a sanitizer's runtime, which is fine.
        "ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0",
    }
    with serving(tmp_path, small_weights(1), 256, extra_environment=environment) as site:
        weights = {TENSOR_NAME.format(i): oracle.random_weight(rng, 4, 256, 512) for i in range(4)}
        failing = write_checkpoint(site.root / "failing", weights)
        file = failing / "model-00001-of-00001.safetensors"
        whole = file.stat().st_size
        armed.touch()
        load_fails(site, failing, StatusCode.DATA_LOSS, file.name)
        assert file.stat().st_size == whole // 2, "the shim did nothing: the test shows nothing"
        armed.unlink()
        site.check_serves(rng)
        write_checkpoint(failing, weights)
        assert len(site.client.load(failing, output_dim=256, name_prefix="good.")[-1].weights) == 4


def test_load_cancelled(small: Site, corner: Path, rng: np.random.Generator) -> None:
    """A caller who goes away in the middle of a load leaves nothing half done."""
    weights = {TENSOR_NAME.format(i): oracle.random_weight(rng, 4, 256, 512) for i in range(24)}
    write_checkpoint(corner, weights)
    request = small.client.message(
        "LoadWeightsRequest", path=str(corner), output_dim=256, name_prefix="gone."
    )
    for delay in (0, 0.001, 0.01):
        messages = small.client.callable("einsum.v1.Einsum", "LoadWeights")(request)
        time.sleep(delay)
        messages.cancel()
    # One load at a time: this one's turn comes when the cancelled ones are through.
    small.client.load(small.root / "model", output_dim=256, name_prefix="after.")
    names = [weight.name for weight in small.client.call("ListWeights").weights]
    assert sum(name.startswith("gone.") for name in names) in (0, 24)
    for pattern in ("gone.*", "after.*"):
        if any(name.startswith(pattern[:-1]) for name in names):
            small.client.call("UnloadWeights", names=[pattern])


def test_unload_what_is_not_there(small: Site) -> None:
    before = small.client.call("ListWeights")
    fails(
        lambda: small.client.call("UnloadWeights", names=["no.such.weight"]), StatusCode.NOT_FOUND
    )
    fails(lambda: small.client.call("UnloadWeights"), StatusCode.INVALID_ARGUMENT)
    assert small.client.call("ListWeights") == before


# --- the details behind the status ----------------------------------------------------------------


def test_details_agree_with_the_status(small: Site, rng: np.random.Generator) -> None:
    request = altered(small, rng, group_begin=3, group_end=1)
    error = fails(lambda: small.client.einsum(request), StatusCode.INVALID_ARGUMENT)
    (bad_request,) = details_of(error, error_details_pb2.BadRequest)
    (violation,) = bad_request.field_violations
    assert violation.description
    assert not details_of(error, error_details_pb2.RetryInfo)


def test_broken_pipe_is_no_reason_to_stop(small: Site) -> None:
    small.daemon.process.send_signal(signal.SIGPIPE)
    time.sleep(0.05)
    assert small.daemon.process.poll() is None
