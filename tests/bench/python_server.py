"""The server that one would write instead: the same API in Python, with grpcio and numpy or torch.

    python_server.py --checkpoint DIR --listen ADDRESS [--compute numpy|torch] [--weights fp32|fp8]

Weights lie as FP32 [G, R, D] for BLAS, or, to hold no more memory than einsumd, as they are stored
and are decoded for each request. One request is one matrix product; every layout of the API is
taken, so that `einsumctl check` can judge the numbers. Prints "ready ADDRESS" once it serves.

Needs grpcio, protobuf and numpy; the API comes from the build's descriptor set (services.fds).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import zlib
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

GROUPS, OUTPUT_DIM = 8, 1024
TGR, GTR = 1, 2
TGK, GKT = 1, 2
FP32, UE8M0 = 1, 2
BF16_OUT, FP32_OUT = 1, 2


def e4m3_table() -> np.ndarray:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    value = np.where(
        exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )
    value[(codes & 127) == 127] = np.nan
    return np.where(codes > 127, -value, value).astype(np.float32)


def ue8m0_table() -> np.ndarray:
    codes = np.arange(256, dtype=np.uint32)
    value = (codes << 23).view(np.float32)
    value[0], value[255] = 2.0**-127, np.nan
    return value


E4M3, E8M0 = e4m3_table(), ue8m0_table()


def to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


class Weight:
    def __init__(self, name: str, values: np.ndarray, scales: np.ndarray, keep_fp8: bool):
        self.name = name
        self.values = values.reshape(GROUPS, OUTPUT_DIM, -1)
        self.scales = scales.reshape(GROUPS, -1, scales.shape[1])
        self.reduced_dim = self.values.shape[2]
        self.block_d = OUTPUT_DIM // self.scales.shape[1]
        self.block_r = self.reduced_dim // self.scales.shape[2]
        self._dense = None if keep_fp8 else self._decode()

    def _decode(self) -> np.ndarray:
        blocks = self.scales.repeat(self.block_d, 1).repeat(self.block_r, 2)
        return np.ascontiguousarray((E4M3[self.values] * blocks).transpose(0, 2, 1))

    @property
    def dense(self) -> np.ndarray:
        return self._decode() if self._dense is None else self._dense


def read_checkpoint(directory: Path, keep_fp8: bool) -> dict[str, Weight]:
    weights = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        header_bytes = int(data[:8].view(np.uint64)[0])
        header = json.loads(bytes(data[8 : 8 + header_bytes]))

        def tensor(entry: dict) -> np.ndarray:
            begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            raw = np.array(data[begin:end])
            if entry["dtype"] == "F32":
                return raw.view(np.float32).reshape(entry["shape"])
            raw = raw.reshape(entry["shape"])
            return E8M0[raw] if entry["dtype"] == "F8_E8M0" else raw

        for key, entry in header.items():
            if key.endswith(".attn.wo_a.weight"):
                name = key.removesuffix(".weight")
                scales = tensor(header[f"{name}.scale"])
                weights[name] = Weight(name, tensor(entry), scales, keep_fp8)
    return weights


def decode_activations(request: Any, weight: Weight) -> np.ndarray:
    """FP32 [G, T, R]."""
    tokens, reduced = request.tokens, weight.reduced_dim
    a = E4M3[np.frombuffer(request.activations, np.uint8)]
    if request.activation_layout == TGR:
        a = a.reshape(tokens, GROUPS, reduced).transpose(1, 0, 2)
    else:
        a = a.reshape(GROUPS, tokens, reduced)
    blocks = reduced // weight.block_r
    padded = tokens if request.scale_layout == TGK else (tokens + 3) // 4 * 4
    if request.scale_type == FP32:
        s = np.frombuffer(request.activation_scales, np.float32)
    else:
        s = E8M0[np.frombuffer(request.activation_scales, np.uint8)]
    if request.scale_layout == TGK:
        s = s.reshape(tokens, GROUPS, blocks).transpose(1, 0, 2)
    elif request.scale_type == FP32:
        s = s.reshape(GROUPS, blocks, padded).transpose(0, 2, 1)[:, :tokens]
    else:
        s = s.reshape(GROUPS, blocks // 4, padded, 4).transpose(0, 2, 1, 3)
        s = s.reshape(GROUPS, padded, blocks)[:, :tokens]
    scaled = a.reshape(GROUPS, tokens, blocks, weight.block_r) * s[..., None]
    return scaled.reshape(GROUPS, tokens, reduced)


def numpy_product(activations: np.ndarray, dense: np.ndarray) -> np.ndarray:
    return np.matmul(activations, dense).transpose(1, 0, 2)


def torch_product(activations: np.ndarray, dense: np.ndarray) -> np.ndarray:
    import torch

    product = torch.bmm(torch.from_numpy(activations), torch.from_numpy(dense))
    return product.numpy().transpose(1, 0, 2)


class Service:
    def __init__(self, fds: Path, weights: dict[str, Weight], compute: str, keep_fp8: bool):
        self.pool = descriptor_pool.DescriptorPool()
        for file in descriptor_pb2.FileDescriptorSet.FromString(fds.read_bytes()).file:
            self.pool.Add(file)
        self.weights = weights
        self.product = torch_product if compute == "torch" else numpy_product
        self.kernel = f"{compute}, weights in {'FP8' if keep_fp8 else 'FP32'}"

    def message(self, name: str, /, **fields: Any) -> Any:
        descriptor = self.pool.FindMessageTypeByName(f"einsum.v1.{name}")
        return message_factory.GetMessageClass(descriptor)(**fields)

    def describe(self, weight: Weight) -> Any:
        return self.message(
            "Weight", name=weight.name, groups=GROUPS, output_dim=OUTPUT_DIM,
            reduced_dim=weight.reduced_dim, weight_type=1, scale_type=UE8M0,
            block_d=weight.block_d, block_r=weight.block_r, recipes=[1],
        )  # fmt: skip

    def einsum(self, request: Any, context: grpc.ServicerContext) -> Any:
        weight = self.weights.get(request.weight)
        if weight is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"weight: no {request.weight}")
        product = self.product(decode_activations(request, weight), weight.dense)
        if request.output_type == FP32_OUT:
            output = np.ascontiguousarray(product, np.float32).tobytes()
        else:
            output = to_bf16(product).tobytes()
        response = self.message(
            "EinsumResponse", request_id=request.request_id, tokens=request.tokens,
            groups=GROUPS, output_dim=OUTPUT_DIM, output_type=request.output_type,
        )  # fmt: skip
        if request.digest_only:
            response.digest.crc32 = zlib.crc32(output)
            response.digest.elements = product.size
        else:
            response.output = output
        return response

    def list_weights(self, _: Any, context: grpc.ServicerContext) -> Any:
        weights = [self.describe(weight) for weight in self.weights.values()]
        return self.message("ListWeightsResponse", weights=weights)

    def get_weight(self, request: Any, context: grpc.ServicerContext) -> Any:
        if request.name not in self.weights:
            context.abort(grpc.StatusCode.NOT_FOUND, f"name: no {request.name}")
        return self.message("GetWeightResponse", weight=self.describe(self.weights[request.name]))

    def server_info(self, _: Any, context: grpc.ServicerContext) -> Any:
        response = self.message("ServerInfoResponse", engine="python", kernel=self.kernel)
        response.limits.request_tokens_max = 512
        response.memory.SetInParent()
        response.counters.SetInParent()
        return response

    def handler(self) -> grpc.GenericRpcHandler:
        methods = {
            "Einsum": self.einsum,
            "ListWeights": self.list_weights,
            "GetWeight": self.get_weight,
            "ServerInfo": self.server_info,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                method,
                request_deserializer=type(self.message(f"{name}Request")).FromString,
                response_serializer=type(self.message(f"{name}Response")).SerializeToString,
            )
            for name, method in methods.items()
        }
        return grpc.method_handlers_generic_handler("einsum.v1.Einsum", handlers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--fds", type=Path, required=True, help="the build's services.fds")
    parser.add_argument("--compute", choices=["numpy", "torch"], default="numpy")
    parser.add_argument("--weights", choices=["fp32", "fp8"], default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    keep_fp8 = arguments.weights == "fp8"
    weights = read_checkpoint(arguments.checkpoint, keep_fp8)
    service = Service(arguments.fds, weights, arguments.compute, keep_fp8)
    server = grpc.server(
        futures.ThreadPoolExecutor(arguments.threads),
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    server.add_generic_rpc_handlers((service.handler(),))
    server.add_insecure_port(arguments.listen)
    server.start()
    print("ready", arguments.listen, flush=True)
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    end.wait()
    server.stop(None)


if __name__ == "__main__":
    main()
