"""A stock gRPC client that knows the API by server reflection alone: no generated code."""

from __future__ import annotations

import functools
from typing import Any, Iterable

import grpc
import numpy as np
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status

import oracle

EINSUM = "einsum.v1.Einsum"
HEALTH = "grpc.health.v1.Health"
INFERENCE = "inference.GRPCInferenceService"
EQUATION = "bhr,hdr->bhd"

# For everything that should end soon; under a sanitizer on a busy machine soon is a while.
TIMEOUT_S = 60.0


class ReflectionStub:
    """v1 and v1alpha differ in the service's name alone."""

    def __init__(self, channel: grpc.Channel, version: str):
        self.ServerReflectionInfo = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )


class Schema:
    """The daemon's messages and methods, as its reflection service describes them."""

    def __init__(self, channel: grpc.Channel, version: str = "v1"):
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self.database._stub = ReflectionStub(channel, version)
        self.pool = descriptor_pool.DescriptorPool(self.database)
        # Whatever is needed later is looked up now, while the channel is open.
        for service in (EINSUM, HEALTH, INFERENCE):
            for method in self.pool.FindServiceByName(service).methods:
                self.message(method.input_type.full_name)
                self.message(method.output_type.full_name)

    @functools.cache
    def message(self, name: str) -> Any:
        """The class of a message; names without a package are einsum.v1's."""
        full_name = name if "." in name else f"einsum.v1.{name}"
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(full_name))

    @functools.cache
    def method(self, service: str, name: str) -> Any:
        return self.pool.FindServiceByName(service).methods_by_name[name]


class Client:
    """One connection. Raises grpc.RpcError as any gRPC client does.

    `stock` leaves gRPC's defaults alone; else the receive limit is raised, which large replies
    need.
    """

    def __init__(
        self,
        address: str,
        schema: Schema | None = None,
        reflection: str = "v1",
        stock: bool = False,
        options: Iterable[tuple[str, Any]] = (),
        compression: grpc.Compression | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ):
        options = [("grpc.use_local_subchannel_pool", 1), *options]
        if not stock:
            options.append(("grpc.max_receive_message_length", -1))
        self.address = address
        self.channel = (
            grpc.secure_channel(address, credentials, options, compression)
            if credentials
            else grpc.insecure_channel(address, options, compression)
        )
        grpc.channel_ready_future(self.channel).result(TIMEOUT_S)
        self.schema = schema or Schema(self.channel, reflection)

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def message(self, name: str, **fields: Any) -> Any:
        return self.schema.message(name)(**fields)

    @functools.cache
    def callable(self, service: str, name: str) -> Any:
        method = self.schema.method(service, name)
        kind = {
            (False, False): self.channel.unary_unary,
            (False, True): self.channel.unary_stream,
            (True, False): self.channel.stream_unary,
            (True, True): self.channel.stream_stream,
        }[method.client_streaming, method.server_streaming]
        request = self.schema.message(method.input_type.full_name)
        response = self.schema.message(method.output_type.full_name)
        return kind(
            f"/{service}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )

    def raw(self, path: str, payload: bytes, timeout: float = TIMEOUT_S, **options: Any) -> bytes:
        """Any bytes to any method."""
        return self.channel.unary_unary(path)(payload, timeout=timeout, **options)

    def call(self, method_name: str, /, timeout: float = TIMEOUT_S, **fields: Any) -> Any:
        """A unary method of the Einsum service, or all messages of a server-streaming one."""
        method = self.schema.method(EINSUM, method_name)
        request = self.schema.message(method.input_type.full_name)(**fields)
        reply = self.callable(EINSUM, method_name)(request, timeout=timeout)
        return list(reply) if method.server_streaming else reply

    def einsum(self, request: Any, timeout: float = TIMEOUT_S) -> Any:
        return self.callable(EINSUM, "Einsum")(request, timeout=timeout)

    def einsum_future(self, request: Any, timeout: float = TIMEOUT_S) -> grpc.Future:
        return self.callable(EINSUM, "Einsum").future(request, timeout=timeout)

    def stream(self, requests: Iterable[Any], timeout: float = TIMEOUT_S) -> Any:
        wrap = self.schema.message("EinsumStreamRequest")
        wrapped = (wrap(request=request) for request in requests)
        return self.callable(EINSUM, "EinsumStream")(wrapped, timeout=timeout)

    def load(self, path: Any, timeout: float = TIMEOUT_S, **fields: Any) -> list:
        return self.call("LoadWeights", timeout=timeout, path=str(path), **fields)

    def health(self, service: str = "") -> int:
        request = self.message("grpc.health.v1.HealthCheckRequest", service=service)
        return self.callable(HEALTH, "Check")(request, timeout=TIMEOUT_S).status

    @functools.cache
    def kernels(self) -> list[str]:
        return list(self.call("ServerInfo").kernels)

    def sums_by_wgmma(self, kernel: str = "") -> bool:
        """Whether the kernel "hopper" may answer a request that asks for `kernel`."""
        return kernel in ("", "hopper") and "hopper" in self.kernels()

    def counters(self) -> Any:
        return self.call("ServerInfo").counters


RECIPES = {(128, 128): "RECIPE_1_128_128", (1, 128): "RECIPE_1_1_128",
           (32, 32): "RECIPE_1_32_32", (1, 32): "RECIPE_1_1_32"}  # fmt: skip


def recipe_of(weight: oracle.Weight) -> str:
    """The recipe that names the weight's own blocks."""
    return RECIPES[weight.block_d, weight.block_r]


def make_request(
    client: Client,
    name: str,
    weight: oracle.Weight,
    activations: oracle.Activations,
    /,
    activation_layout: str = "TGR",
    scale_layout: str = "TGK",
    output_type: str = "BF16",
    recipe: str | None = None,
    **fields: Any,
) -> Any:
    scale_type = "UE8M0" if activations.scales.dtype == np.uint8 else "FP32"
    return client.message(
        "EinsumRequest",
        **{
            "weight": name,
            "equation": EQUATION,
            "recipe": recipe or recipe_of(weight),
            "activation_layout": f"ACTIVATION_LAYOUT_{activation_layout}",
            "scale_layout": f"SCALE_LAYOUT_{scale_layout}",
            "scale_type": f"SCALE_TYPE_{scale_type}",
            "output_type": f"OUTPUT_TYPE_{output_type}",
            "tokens": activations.tokens,
            "activations": oracle.pack_activations(activations, activation_layout),
            "activation_scales": oracle.pack_scales(activations, scale_layout),
            **fields,
        },
    )


def details_of(error: grpc.RpcError, kind: Any) -> list:
    """Messages of type `kind` within grpc-status-details-bin.

    from_call refuses details whose code or text disagree with the call's own.
    """
    status = rpc_status.from_call(error)
    found = []
    for detail in status.details if status else []:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            found.append(message)
    return found


def field_violations(error: grpc.RpcError) -> list[str]:
    """The request fields that the error blames."""
    return [
        violation.field
        for request in details_of(error, error_details_pb2.BadRequest)
        for violation in request.field_violations
    ]


def retry_delay_ms(error: grpc.RpcError) -> int | None:
    for retry in details_of(error, error_details_pb2.RetryInfo):
        return retry.retry_delay.seconds * 1000 + retry.retry_delay.nanos // 1_000_000
    return None
