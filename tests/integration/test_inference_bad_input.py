"""Wrong requests in the Open Inference Protocol: the right code, a text that helps, and the next
good request is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import grpc
import numpy as np
import pytest
from grpc import StatusCode

import oracle
from client import INFERENCE
from conftest import Site, serving, small_weights
from inference import (
    A,
    S,
    check_reply,
    check_serves,
    fails,
    good,
    infer,
    listed,
    make_infer,
    set_parameters,
)


def set_shape(index: int, *shape: int) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        request.inputs[index].shape[:] = shape

    return change


def set_field(index: int, **fields: Any) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        for name, value in fields.items():
            setattr(request.inputs[index], name, value)

    return change


def set_own(index: int, **values: Any) -> Callable[[Any], None]:
    return lambda request: set_parameters(request.inputs[index].parameters, values)


def set_request(**values: Any) -> Callable[[Any], None]:
    return lambda request: set_parameters(request.parameters, values)


def set_output(name: str = "output", **values: Any) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        set_parameters(request.outputs.add(name=name).parameters, values)

    return change


def set_raw(index: int, change_bytes: Callable[[bytes], bytes]) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        request.raw_input_contents[index] = change_bytes(request.raw_input_contents[index])

    return change


def assign(**fields: Any) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        for name, value in fields.items():
            setattr(request, name, value)

    return change


def all_of(*changes: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        for each in changes:
            each(request)

    return change


def set_tokens(tokens: int) -> Callable[[Any], None]:
    def change(request: Any) -> None:
        for tensor in request.inputs:
            tensor.shape[0] = tokens

    return change


INVALID, NOT_FOUND = StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND
UNIMPLEMENTED = StatusCode.UNIMPLEMENTED

# Of a request for 3 tokens: how to spoil it, the code, the field blamed, and what the text holds.
WRONG: dict[str, tuple[Callable[[Any], Any], StatusCode, str | None, list[str]]] = {
    "no model": (assign(model_name=""), INVALID, "model_name", ["RepositoryIndex"]),
    "unknown model": (assign(model_name="layers.77.x"), NOT_FOUND, "model_name", ["layers.77.x"]),
    "long model": (assign(model_name="x" * 300), INVALID, "model_name", ["300", "256"]),
    "version": (assign(model_version="2"), NOT_FOUND, "model_version", ['"2"', '"1"']),
    "long version": (assign(model_version="1" * 40), INVALID, "model_version", ["40"]),
    "long id": (assign(id="x" * 257), INVALID, "id", ["257", "256"]),
    "no inputs": (lambda r: r.ClearField("inputs"), INVALID, A, [S]),
    "one input": (lambda r: r.inputs.pop(), INVALID, S, ["not given"]),
    "input twice": (set_field(1, name=A), INVALID, A, ["twice"]),
    "unknown input": (set_field(0, name="tokens"), INVALID, "inputs", ["tokens", A, S]),
    "three inputs": (lambda r: r.inputs.add(name="third"), INVALID, "inputs", ["2"]),
    "no datatype": (set_field(0, datatype=""), INVALID, A, ["UINT8", "FP8_E4M3"]),
    "datatype": (set_field(0, datatype="BF16"), UNIMPLEMENTED, A, ["BF16", "UINT8", "FP8_E4M3"]),
    "long datatype": (set_field(0, datatype="F" * 17), INVALID, "inputs.datatype", ["17"]),
    "scale datatype": (set_field(1, datatype="FP16"), UNIMPLEMENTED, S, ["FP16", "FP32", "INT32"]),
    "dtype": (set_own(0, dtype="FP8_E5M2"), UNIMPLEMENTED, A, ["FP8_E5M2", "FP8_E4M3"]),
    "scale dtype": (set_own(1, dtype="UE8M0"), UNIMPLEMENTED, S, ["UE8M0", "FP32"]),
    "dtype is a number": (set_own(0, dtype=8), INVALID, "inputs.dtype", ["string"]),
    "rank 2": (set_shape(0, 3, 2048), INVALID, A, ["[3, 2048]", "[T, 4, 512]", "[4, T, 512]"]),
    "rank 0": (set_shape(0), INVALID, A, ["[]"]),
    "rank 9": (set_shape(0, *[1] * 9), INVALID, "inputs.shape", ["8"]),
    "groups": (set_shape(0, 3, 5, 512), INVALID, A, ["[3, 5, 512]"]),
    "R": (set_shape(0, 3, 4, 511), INVALID, A, ["[3, 4, 511]", "512"]),
    "negative T": (set_shape(0, -1, 4, 512), INVALID, A, ["[T, 4, 512]"]),
    "most negative T": (set_shape(0, -(2**63), 4, 512), INVALID, A, []),
    "huge T": (set_shape(0, 2**63 - 1, 4, 512), INVALID, A, [str(2**63 - 1)]),
    "T of 2^32 + 3": (set_shape(0, 2**32 + 3, 4, 512), INVALID, A, [str(2**32 + 3)]),
    "more T": (set_shape(0, 5, 4, 512), INVALID, S, ["[3, 4, 4]", "[5, 4, 4]", "[4, 4, 8]"]),
    "scales' T": (set_shape(1, 2, 4, 4), INVALID, S, ["[2, 4, 4]", "[3, 4, 4]"]),
    "scales' K": (set_shape(1, 3, 4, 5), INVALID, S, ["[3, 4, 5]"]),
    "too many tokens": (set_tokens(9000), INVALID, "tokens", ["8192", "9000"]),
    "activations short": (set_raw(0, lambda b: b[:-1]), INVALID, A, ["6144", "6143"]),
    "activations long": (set_raw(0, lambda b: b + b"\0"), INVALID, A, ["6144", "6145"]),
    "scales short": (set_raw(1, lambda b: b[:-4]), INVALID, S, ["192", "188"]),
    "scales empty": (set_raw(1, lambda b: b""), INVALID, S, ["192", "got 0"]),
    "one raw": (lambda r: r.raw_input_contents.pop(), INVALID, "raw_input_contents", ["2", "1"]),
    "three raw": (lambda r: r.raw_input_contents.append(b"x"), INVALID, "raw_input_contents",
                  ["expected 2", "got 3"]),
    "no bytes": (lambda r: r.ClearField("raw_input_contents"), INVALID, A, ["raw_input_contents"]),
    "raw and contents": (lambda r: r.inputs[1].contents.fp32_contents.append(1), INVALID, S,
                         ["contents", "raw_input_contents"]),
    "layout": (set_request(activation_layout="RGT"), INVALID, "activation_layout",
               ["RGT", "TGR", "GTR"]),
    "own layout": (set_own(0, layout="tgr"), INVALID, "activation_layout", ["tgr"]),
    "layout that does not fit": (set_request(activation_layout="GTR"), INVALID, A,
                                 ["[3, 4, 512]", "[4, T, 512] (GTR)"]),
    "two layouts": (all_of(set_request(activation_layout="TGR"), set_own(0, layout="GTR")),
                    INVALID, "activation_layout", ["TGR", "GTR"]),
    "scale layout": (set_request(scale_layout="KGT"), INVALID, "scale_layout", ["KGT", "GKT"]),
    "scale layout that does not fit": (set_request(scale_layout="GKT"), INVALID, S,
                                       ["[3, 4, 4]", "[4, 4, 4] (GKT)"]),
    "layout is a number": (set_request(scale_layout=1), INVALID, "scale_layout", ["string"]),
    "layout is long": (set_request(scale_layout="G" * 99), INVALID, "scale_layout", ["99"]),
    "output": (set_output("logits"), INVALID, "outputs", ["logits", "output"]),
    "two outputs": (all_of(set_output(), set_output()), INVALID, "outputs", ["output"]),
    "output dtype": (set_output(dtype="FP16"), UNIMPLEMENTED, "output_dtype", ["FP16", "BF16"]),
    "two output dtypes": (all_of(set_output(dtype="FP32"), set_request(output_dtype="BF16")),
                          INVALID, "output_dtype", ["FP32", "BF16"]),
    "kernel": (set_request(kernel="fastest"), UNIMPLEMENTED, "kernel", ["fastest"]),
    "group range": (set_request(group_begin=3, group_end=9), INVALID, "group_end", ["4", "[3, 9)"]),
    "group range past 32 bits": (set_request(group_begin=2**32, group_end=2**32 + 1), INVALID,
                                 "group_end", []),
    "group negative": (set_request(group_end=-1), INVALID, "group_end", ["-1"]),
    "group as text": (set_request(group_end="4"), INVALID, "group_end", ["number"]),
    "group slice without its tensors": (set_request(group_end=2), INVALID, A, ["[T, 2, 512]"]),
    "priority": (set_request(priority=4), INVALID, "priority", ["1", "4"]),
    "sequence": (set_request(sequence_id=7), UNIMPLEMENTED, "sequence_id", []),
    "sequence by name": (set_request(sequence_id="s"), UNIMPLEMENTED, "sequence_id", []),
    "sequence start": (set_request(sequence_start=True), UNIMPLEMENTED, "sequence_start", []),
    "shared memory": (set_own(0, shared_memory_region="r"), UNIMPLEMENTED,
                      "inputs.shared_memory_region", []),
    "shared memory out": (set_output(shared_memory_region="r"), UNIMPLEMENTED,
                          "outputs.shared_memory_region", []),
    "classification": (set_output(classification=3), UNIMPLEMENTED, "outputs.classification", []),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(models: Site, rng: np.random.Generator, name: str) -> None:
    spoil, code, field, texts = WRONG[name]
    request = good(models, rng)
    spoil(request)
    fails(models, request, code, *texts, field=field)
    check_serves(models, rng)


def spoil_contents(index: int, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda request: change(request.inputs[index].contents)


WRONG_LISTS: dict[str, tuple[Callable[[Any], Any], str, list[str]]] = {
    "short": (spoil_contents(0, lambda c: c.uint_contents.pop()), A, ["6144", "6143"]),
    "long": (spoil_contents(0, lambda c: c.uint_contents.append(1)), A, ["6144", "6145"]),
    "none": (spoil_contents(1, lambda c: c.ClearField("fp32_contents")), S, ["48", "0"]),
    "unset": (lambda r: r.inputs[1].ClearField("contents"), S, ["not given"]),
    "past a byte": (
        spoil_contents(0, lambda c: c.uint_contents.__setitem__(7, 256)), A, ["256", "7"]),
    "another list": (spoil_contents(0, lambda c: c.int_contents.append(1)), A,
                     ["uint_contents", "int_contents"]),
    "FP8 has none": (lambda r: setattr(r.inputs[0], "datatype", "FP8_E4M3"), A,
                     ["raw_input_contents"]),
    "shape past the message": (
        set_tokens(65000), "inputs", ["contents"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_LISTS)
def test_wrong_lists(models: Site, rng: np.random.Generator, name: str) -> None:
    spoil, field, texts = WRONG_LISTS[name]
    request = listed(good(models, rng))
    spoil(request)
    fails(models, request, INVALID, *texts, field=field)
    check_serves(models, rng)


BROKEN = {
    "empty": b"",
    "lone tag": b"\x0a",
    "length past the end": b"\x0a\x05ab",
    "huge length": b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "input past its end": b"\x2a\x03\x0a\x05a",
    "group": b"\x0b\x0c",
    "name as a number": b"\x08\x05",
    "name not UTF-8": b"\x0a\x02\xc3\x28",
    "NUL in the name": b"\x0a\x03a\0b",
    "shape cut off": b"\x2a\x03\x1a\x01\xff",
    "parameter as a number": b"\x22\x02\x08\x05",
    "parameter's value is no message": b"\x22\x04\x12\x02\x08\xff",
    "parameter's alternative of another type": b"\x22\x05\x12\x03\x12\x01a",
    "noise": bytes(range(128, 256)) * 64,
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("payload", BROKEN.values(), ids=BROKEN.keys())
def test_broken_message(models: Site, rng: np.random.Generator, payload: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        models.client.raw(f"/{INFERENCE}/ModelInfer", payload)
    assert caught.value.code() == INVALID, caught.value.details()
    check_serves(models, rng)


@pytest.mark.parametrize(
    "method", ["ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex",
               "RepositoryModelLoad", "RepositoryModelUnload"]
)  # fmt: skip
def test_broken_control_message(models: Site, rng: np.random.Generator, method: str) -> None:
    for payload in (BROKEN["length past the end"], BROKEN["group"], BROKEN["name not UTF-8"]):
        with pytest.raises(grpc.RpcError) as caught:
            models.client.raw(f"/{INFERENCE}/{method}", payload)
        assert caught.value.code() == INVALID, caught.value.details()
    check_serves(models, rng)


def test_unknown_fields_and_parameters_are_ignored(models: Site, rng: np.random.Generator) -> None:
    ignored = {"tenant": "a", "x" * 400: "y" * 4000, "flag": True, "ratio": 0.5}
    request = good(models, rng, parameters=ignored | {"sequence_id": 0, "group_end": 0})
    expected = infer(models.client, request).raw_output_contents[0]
    unknown = b"\xa0\x06\x01" + b"\xa2\x06\x03abc" + b"\xa5\x06abcd" + b"\xa1\x06abcdefgh"
    payload = unknown + request.SerializeToString() + unknown
    raw = models.client.raw(f"/{INFERENCE}/ModelInfer", payload)
    reply = models.client.schema.message("inference.ModelInferResponse").FromString(raw)
    assert oracle.same_but_for_rounding(reply.raw_output_contents[0], expected)


def test_timeout(tmp_path: Path, rng: np.random.Generator) -> None:
    """In microseconds, as Triton has it; the call's own deadline is far."""
    with serving(tmp_path, small_weights(1), 256, max_queue_delay_us=500_000) as site:
        (name, weight), *_ = site.weights.items()
        activations = oracle.random_activations(rng, weight, 3, "FP32")
        request = make_infer(site.client, name, activations, parameters={"timeout": 1000})
        fails(site, request, StatusCode.DEADLINE_EXCEEDED)
        request = make_infer(site.client, name, activations, parameters={"timeout": 50_000_000})
        check_reply(infer(site.client, request), *site.expected(activations, weight))


def test_priorities(models: Site, rng: np.random.Generator) -> None:
    for priority in (0, 1, 2, 3):
        infer(models.client, good(models, rng, parameters={"priority": priority}))
