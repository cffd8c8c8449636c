"""Requests in the Open Inference Protocol, by messages that reflection tells of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode

import oracle
from checkpoints import TENSOR_NAME
from client import INFERENCE, TIMEOUT_S, Client, field_violations

if TYPE_CHECKING:
    from conftest import Site

A, S = "activations", "activation_scales"

# name -> (G, R, block_d, block_r, type of the scales); D is 256.
FORMATS = {
    TENSOR_NAME.format(0): (8, 1024, 128, 128, "UE8M0"),
    TENSOR_NAME.format(1): (4, 512, 128, 128, "FP32"),
    TENSOR_NAME.format(2): (2, 512, 32, 32, "UE8M0"),
    TENSOR_NAME.format(3): (4, 512, 1, 32, "FP32"),
    TENSOR_NAME.format(4): (4, 1024, 1, 128, None),  # BF16
    TENSOR_NAME.format(5): (1, 512, 128, 128, "UE8M0"),
}

# The model that ordinary requests are for.
NAME = TENSOR_NAME.format(1)
GROUPS, OUTPUT_DIM = 4, 256

# (datatype, layout) of activation_scales, by the type of the scales.
SCALES = {
    "FP32": [("FP32", "TGK"), ("FP32", "GKT")],
    "UE8M0": [("UINT8", "TGK"), ("UE8M0", "TGK"), ("INT32", "TGK"), ("INT32", "GKT")],
}
ACTIVATION_DATATYPES = ["UINT8", "FP8_E4M3"]


def aligned(tokens: int) -> int:
    return -(-tokens // 4) * 4


def activations_shape(activations: oracle.Activations, layout: str) -> list[int]:
    tokens, groups, reduced_dim = activations.values.shape
    return [tokens, groups, reduced_dim] if layout == "TGR" else [groups, tokens, reduced_dim]


def scales_shape(activations: oracle.Activations, datatype: str, layout: str) -> list[int]:
    tokens, groups, blocks = activations.scales.shape
    columns = blocks // 4 if datatype == "INT32" else blocks
    return [tokens, groups, columns] if layout == "TGK" else [groups, columns, aligned(tokens)]


def set_parameters(parameters: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, bool):
            parameters[name].bool_param = value
        elif isinstance(value, int):
            parameters[name].int64_param = value
        elif isinstance(value, float):
            parameters[name].double_param = value
        else:
            parameters[name].string_param = value


@dataclass
class Case:
    """One request's choices; what is not given is what shapes tell."""

    activation_datatype: str = "UINT8"
    activation_layout: str = "TGR"
    scale_datatype: str = "FP32"
    scale_layout: str = "TGK"
    output: str | None = None  # dtype of a requested output


def make_infer(
    client: Client,
    name: str,
    activations: oracle.Activations,
    case: Case = Case(),
    /,
    parameters: dict[str, Any] | None = None,
    **fields: Any,
) -> Any:
    request = client.schema.message("inference.ModelInferRequest")(model_name=name, **fields)
    set_parameters(request.parameters, parameters or {})
    request.inputs.add(
        name=A,
        datatype=case.activation_datatype,
        shape=activations_shape(activations, case.activation_layout),
    )
    request.inputs.add(
        name=S,
        datatype=case.scale_datatype,
        shape=scales_shape(activations, case.scale_datatype, case.scale_layout),
    )
    request.raw_input_contents.append(oracle.pack_activations(activations, case.activation_layout))
    request.raw_input_contents.append(oracle.pack_scales(activations, case.scale_layout))
    if case.output:
        output = request.outputs.add(name="output")
        set_parameters(output.parameters, {"dtype": case.output})
    return request


def call(client: Client, method: str, /, timeout: float = TIMEOUT_S, **fields: Any) -> Any:
    request = client.schema.message(f"inference.{method}Request")(**fields)
    return client.callable(INFERENCE, method)(request, timeout=timeout)


def infer(client: Client, request: Any, timeout: float = TIMEOUT_S) -> Any:
    return client.callable(INFERENCE, "ModelInfer")(request, timeout=timeout)


def parameter(message: Any) -> Any:
    """What an InferParameter holds."""
    return getattr(message, message.WhichOneof("parameter_choice"))


def check_reply(reply: Any, exact: np.ndarray, error: np.ndarray, datatype: str = "BF16") -> None:
    """One output of that datatype and of the exact result's shape, and right."""
    (output,) = reply.outputs
    assert (output.name, output.datatype) == ("output", datatype)
    assert list(output.shape) == list(exact.shape)
    (raw,) = reply.raw_output_contents
    oracle.check(raw, datatype, exact, error)


def random_tokens(rng: np.random.Generator, weight: oracle.Weight) -> int:
    """Such that no shape fits two layouts."""
    return int(rng.choice([t for t in range(1, 12) if t not in (weight.groups, 4)]))


def good(site: Site, rng: np.random.Generator, /, tokens: int = 3, **options: Any) -> Any:
    activations = oracle.random_activations(rng, site.weights[NAME], tokens, "FP32")
    return make_infer(site.client, NAME, activations, **options)


def check_serves(site: Site, rng: np.random.Generator) -> None:
    weight = site.weights[NAME]
    activations = oracle.random_activations(rng, weight, 3, "FP32")
    reply = infer(site.client, make_infer(site.client, NAME, activations))
    check_reply(reply, *site.expected(activations, weight))


def fails(
    site: Site, request: Any, code: StatusCode, *texts: str, field: str | None = None
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        infer(site.client, request)
    error = caught.value
    assert error.code() == code, f"{error.code()}: {error.details()}"
    for text in texts:
        assert text in error.details(), f"{text!r} is not in {error.details()!r}"
    if field:
        assert field_violations(error) == [field], error.details()


def listed(request: Any) -> Any:
    """The same tensors as lists."""
    for tensor, raw in zip(request.inputs, request.raw_input_contents):
        if tensor.datatype == "UINT8":
            tensor.contents.uint_contents.extend(raw)
        elif tensor.datatype == "INT32":
            tensor.contents.int_contents.extend(np.frombuffer(raw, "<i4").tolist())
        else:
            tensor.contents.fp32_contents.extend(np.frombuffer(raw, "<f4").tolist())
    request.ClearField("raw_input_contents")
    return request
