"""The Open Inference Protocol: the same numbers as by our own, in every datatype and layout."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from grpc import StatusCode

import oracle
from checkpoints import TENSOR_NAME
from client import INFERENCE
from conftest import Site, serving
from daemon import count, seconds
from inference import (
    ACTIVATION_DATATYPES,
    FORMATS,
    GROUPS,
    NAME,
    OUTPUT_DIM,
    SCALES,
    Case,
    check_reply,
    fails,
    good,
    infer,
    listed,
    make_infer,
    parameter,
    random_tokens,
    scales_shape,
    set_parameters,
)

# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout_and_type(models: Site, rng: np.random.Generator, name: str) -> None:
    weight = models.weights[name]
    for scale_type, output in itertools.product(oracle.SCALE_TYPES, oracle.OUTPUT_TYPES):
        for datatype, layout, scales in itertools.product(
            ACTIVATION_DATATYPES, oracle.ACTIVATION_LAYOUTS, SCALES[scale_type]
        ):
            tokens = random_tokens(rng, weight)
            activations = oracle.random_activations(rng, weight, tokens, scale_type, "bits")
            request = make_infer(
                models.client, name, activations, Case(datatype, layout, *scales, output)
            )
            reply = infer(models.client, request)
            check_reply(reply, *models.expected(activations, weight), output)


def test_real_shape(tmp_path: Path, rng: np.random.Generator) -> None:
    """One layer of V4-Flash: G 8, R 4096, D 1024."""
    weights = {TENSOR_NAME.format(0): oracle.random_weight(rng, 8, 1024, 4096)}
    with serving(tmp_path, weights, 1024) as site:
        (name, weight), *_ = weights.items()
        for tokens, case in ((1, Case()), (33, Case("FP8_E4M3", "GTR", "INT32", "GKT", "FP32"))):
            kind = "FP32" if case.scale_datatype == "FP32" else "UE8M0"
            activations = oracle.random_activations(rng, weight, tokens, kind)
            reply = infer(site.client, make_infer(site.client, name, activations, case))
            check_reply(reply, *site.expected(activations, weight), case.output or "BF16")


@pytest.mark.parametrize("begin, end", [(0, 1), (1, 3), (2, 4), (0, 4)])
def test_group_slice(models: Site, rng: np.random.Generator, begin: int, end: int) -> None:
    weight = models.weights[NAME].slice(begin, end)
    activations = oracle.random_activations(rng, weight, 7, "UE8M0")
    request = make_infer(
        models.client, NAME, activations, Case("FP8_E4M3", "GTR", "INT32", "GKT"),
        parameters={"group_begin": begin, "group_end": end},
    )  # fmt: skip
    check_reply(infer(models.client, request), *models.expected(activations, weight))


def test_many_at_once(models: Site, rng: np.random.Generator) -> None:
    """Of both services and several models, in one batch or another."""
    sent = []
    method = models.client.callable(INFERENCE, "ModelInfer")
    for i in range(count(60)):
        name = str(rng.choice(list(FORMATS)))
        weight = models.weights[name]
        activations = oracle.random_activations(rng, weight, random_tokens(rng, weight), "FP32")
        expected = models.expected(activations, weight)
        if i % 3:
            request = make_infer(models.client, name, activations, id=str(i))
            sent.append((method.future(request, timeout=seconds(60)), expected, str(i)))
        else:
            future = models.client.einsum_future(models.request(name, activations))
            sent.append((future, expected, None))
    for future, expected, sent_id in sent:
        reply = future.result()
        if sent_id is None:
            oracle.check(reply.output, "BF16", *expected)
        else:
            assert reply.id == sent_id
            check_reply(reply, *expected)


@pytest.mark.parametrize("kernel", ["", "first"])
def test_reply(models: Site, rng: np.random.Generator, kernel: str) -> None:
    """What is in it beside the output."""
    info = models.client.call("ServerInfo")
    named = {"kernel": info.kernels[0]} if kernel else {}
    asked = f"model.{NAME}.weight"
    request = good(models, rng, tokens=3, id="çet id", model_version="1", parameters=named)
    request.model_name = asked
    reply = infer(models.client, request)
    assert (reply.model_name, reply.model_version, reply.id) == (NAME, "1", "çet id")
    values = {key: parameter(value) for key, value in reply.parameters.items()}
    assert values.pop("kernel") == (named.get("kernel") or info.kernel.split(":")[0])
    assert values["batch_bucket"] in info.buckets
    assert 3 <= values["batch_tokens"] <= values["batch_bucket"]
    assert values["batch_requests"] >= 1
    assert values["queue_ns"] > 0 and values["run_ns"] > 0
    assert len(values) == 5


def test_no_tokens(models: Site, rng: np.random.Generator) -> None:
    reply = infer(models.client, good(models, rng, tokens=0, id="none"))
    (output,) = reply.outputs
    assert list(output.shape) == [0, GROUPS, OUTPUT_DIM]
    assert list(reply.raw_output_contents) == [b""]
    assert reply.id == "none"


# --- layouts are told by shapes, or named ---------------------------------------------------------

# T = G for activations, T = G = K for FP32 scales; T = G and K/4 = T for words needs other sizes.
AMBIGUOUS = [
    ("activation_layout", "TGR", "GTR", Case()),
    ("activation_layout", "GTR", "TGR", Case(activation_layout="GTR")),
    ("scale_layout", "TGK", "GKT", Case()),
    ("scale_layout", "GKT", "TGK", Case(scale_layout="GKT")),
]


@pytest.mark.parametrize("field, layout, other, case", AMBIGUOUS)
@pytest.mark.parametrize("own", [False, True], ids=["of the request", "of the input"])
def test_ambiguous_shapes(
    models: Site,
    rng: np.random.Generator,
    field: str,
    layout: str,
    other: str,
    case: Case,
    own: bool,
) -> None:
    """T = G = K = 4: an error that names the parameter, and right with it; wrong with another."""
    weight = models.weights[NAME]
    activations = oracle.random_activations(rng, weight, 4, "FP32")
    fixed = "scale_layout" if field == "activation_layout" else "activation_layout"
    known = {fixed: case.scale_layout if fixed == "scale_layout" else case.activation_layout}
    exact, error = models.expected(activations, weight)
    which = 0 if field == "activation_layout" else 1

    request = make_infer(models.client, NAME, activations, case, parameters=known)
    fails(models, request, StatusCode.INVALID_ARGUMENT, "[4, 4,", layout, other, field=field)
    for named in (layout, other):
        request = make_infer(models.client, NAME, activations, case, parameters=known)
        if own:
            set_parameters(request.inputs[which].parameters, {"layout": named})
        else:
            set_parameters(request.parameters, {field: named})
        reply = infer(models.client, request)
        right = oracle.matches(reply.raw_output_contents[0], "BF16", exact, error)
        assert right == (named == layout)


def test_ambiguous_words(tmp_path: Path, rng: np.random.Generator) -> None:
    """V4-Flash's own shape with 8 tokens: [8, 8, 8] words, row by row or token by token."""
    weights = {NAME: oracle.random_weight(rng, 8, 128, 4096)}
    with serving(tmp_path, weights, 128) as site:
        weight = weights[NAME]
        activations = oracle.random_activations(rng, weight, 8, "UE8M0")
        for layout in ("TGK", "GKT"):
            named = {"activation_layout": "TGR"}
            case = Case(scale_datatype="INT32", scale_layout=layout)
            assert scales_shape(activations, "INT32", layout) == [8, 8, 8]
            request = make_infer(site.client, NAME, activations, case, parameters=named)
            fails(site, request, StatusCode.INVALID_ARGUMENT, "[8, 8, 8]", field="scale_layout")
            set_parameters(request.parameters, {"scale_layout": layout})
            check_reply(infer(site.client, request), *site.expected(activations, weight))


def test_one_group_has_one_layout(models: Site, rng: np.random.Generator) -> None:
    """[1, 1, R] is the same bytes in either."""
    name = TENSOR_NAME.format(5)
    weight = models.weights[name]
    activations = oracle.random_activations(rng, weight, 1, "FP32")
    for parameters in ({}, {"activation_layout": "TGR"}, {"activation_layout": "GTR"}):
        request = make_infer(models.client, name, activations, parameters=parameters)
        check_reply(infer(models.client, request), *models.expected(activations, weight))


def test_dtypes_may_be_named(models: Site, rng: np.random.Generator) -> None:
    weight = models.weights[NAME]
    for kind, datatype in (("FP32", "FP32"), ("UE8M0", "UINT8"), ("UE8M0", "INT32")):
        activations = oracle.random_activations(rng, weight, 3, kind)
        request = make_infer(models.client, NAME, activations, Case(scale_datatype=datatype))
        set_parameters(request.inputs[0].parameters, {"dtype": "FP8_E4M3"})
        set_parameters(request.inputs[1].parameters, {"dtype": kind})
        check_reply(infer(models.client, request), *models.expected(activations, weight))


def test_inputs_in_any_order(models: Site, rng: np.random.Generator) -> None:
    weight = models.weights[NAME]
    activations = oracle.random_activations(rng, weight, 3, "FP32")
    request = make_infer(models.client, NAME, activations)
    swapped = make_infer(models.client, NAME, activations)
    for fields in ("inputs", "raw_input_contents"):
        swapped.ClearField(fields)
        getattr(swapped, fields).extend(reversed(getattr(request, fields)))
    check_reply(infer(models.client, swapped), *models.expected(activations, weight))


def test_raw_bytes_before_all_else(models: Site, rng: np.random.Generator) -> None:
    """Fields may travel in any order."""
    weight = models.weights[NAME]
    activations = oracle.random_activations(rng, weight, 3, "FP32")
    request = make_infer(models.client, NAME, activations, id="late")
    head = type(request)()
    head.CopyFrom(request)
    head.ClearField("raw_input_contents")
    request.ClearField("id")
    tail = type(request)(raw_input_contents=request.raw_input_contents)
    payload = tail.SerializeToString() + head.SerializeToString()
    raw = models.client.raw(f"/{INFERENCE}/ModelInfer", payload)
    reply = models.client.schema.message("inference.ModelInferResponse").FromString(raw)
    assert reply.id == "late"
    check_reply(reply, *models.expected(activations, weight))


# --- lists of numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [("FP32", "TGK"), ("FP32", "GKT"), ("UINT8", "TGK"),
                                    ("INT32", "TGK"), ("INT32", "GKT")])  # fmt: skip
@pytest.mark.parametrize("layout", oracle.ACTIVATION_LAYOUTS)
def test_lists_of_numbers(
    models: Site, rng: np.random.Generator, layout: str, scales: tuple[str, str]
) -> None:
    weight = models.weights[NAME]
    kind = "FP32" if scales[0] == "FP32" else "UE8M0"
    activations = oracle.random_activations(rng, weight, 7, kind, "bits")
    request = listed(
        make_infer(models.client, NAME, activations, Case("UINT8", layout, *scales, "FP32"))
    )
    check_reply(infer(models.client, request), *models.expected(activations, weight), "FP32")


def test_lists_unpacked(models: Site, rng: np.random.Generator) -> None:
    """One number a field, and a list in pieces, as protobuf lets writers do."""
    weight = models.weights[NAME]
    activations = oracle.random_activations(rng, weight, 2, "FP32")
    request = make_infer(models.client, NAME, activations)
    values, scales = request.raw_input_contents
    numbers = b"".join(b"\x20" + varint(value) for value in values)  # uint_contents
    floats = b"".join(b"\x35" + scales[i : i + 4] for i in range(0, len(scales) // 2, 4))
    floats += b"\x32" + varint(len(scales) // 2) + scales[len(scales) // 2 :]
    request.ClearField("raw_input_contents")
    inputs = [tensor.SerializeToString() for tensor in request.inputs]
    request.ClearField("inputs")
    payload = request.SerializeToString()
    for tensor, contents in zip(inputs, (numbers, floats)):
        whole = tensor + b"\x2a" + varint(len(contents)) + contents
        payload += b"\x2a" + varint(len(whole)) + whole
    raw = models.client.raw(f"/{INFERENCE}/ModelInfer", payload)
    reply = models.client.schema.message("inference.ModelInferResponse").FromString(raw)
    check_reply(reply, *models.expected(activations, weight))


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
