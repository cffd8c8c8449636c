"""The same operation in Triton Inference Server, through its Python package (nvidia-pytriton).

    triton_server.py --checkpoint DIR --port N     serves gRPC there, model "einsum"; prints "ready"
    triton_server.py --frame FILE --tokens N       writes a gRPC frame of one request, for h2load
    triton_server.py --ask --port N --checkpoint DIR --tokens N
                                                   sends it, and compares the output with FP64

The request is the same in all three: made-up activations, seeded, for layers.0.
"""

from __future__ import annotations

import argparse
import signal
import struct
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from python_server import (
    GROUPS,
    OUTPUT_DIM,
    TGK,
    TGR,
    UE8M0,
    Weight,
    decode_activations,
    numpy_product,
    read_checkpoint,
    to_bf16,
)

MODEL = "einsum"
REDUCED_DIM, BLOCK = 4096, 128
RELATIVE_ERROR_MAX = 2.0**-8  # BF16 rounds by half of that at most


def request_tensors(tokens: int) -> dict[str, np.ndarray]:
    """Finite E4M3 codes and scales near 1; transport.py sends the same to einsumd."""
    rng = np.random.default_rng(1)
    activations = rng.integers(0, 126, (tokens, GROUPS, REDUCED_DIM), dtype=np.uint8)
    activations |= rng.integers(0, 2, activations.shape, dtype=np.uint8) << 7
    scales = rng.integers(120, 128, (tokens, GROUPS, REDUCED_DIM // BLOCK), dtype=np.uint8)
    return {"activations": activations, "scales": scales}


def infer(weight: Weight, activations: np.ndarray, scales: np.ndarray) -> np.ndarray:
    request = SimpleNamespace(
        tokens=activations.shape[0], activations=activations, activation_scales=scales,
        activation_layout=TGR, scale_layout=TGK, scale_type=UE8M0,
    )  # fmt: skip
    return to_bf16(numpy_product(decode_activations(request, weight), weight.dense))


def serve(checkpoint: Path, port: int) -> None:
    from pytriton.model_config import ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    weight = next(iter(read_checkpoint(checkpoint, False).values()))

    def compute(requests: Any) -> list[dict[str, np.ndarray]]:
        return [{"output": infer(weight, r["activations"], r["scales"])} for r in requests]

    config = TritonConfig(http_port=port + 1, grpc_port=port, metrics_port=port + 2)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=MODEL,
            infer_func=compute,
            inputs=[
                Tensor(name="activations", dtype=np.uint8, shape=(-1, GROUPS, REDUCED_DIM)),
                Tensor(name="scales", dtype=np.uint8, shape=(-1, GROUPS, REDUCED_DIM // BLOCK)),
            ],
            outputs=[Tensor(name="output", dtype=np.uint16, shape=(-1, GROUPS, OUTPUT_DIM))],
            config=ModelConfig(batching=False),
        )
        triton.run()
        print("ready", flush=True)
        end = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: end.set())
        end.wait()


def client_inputs(tokens: int) -> list[Any]:
    import tritonclient.grpc as client

    inputs = []
    for name, tensor in request_tensors(tokens).items():
        entry = client.InferInput(name, tensor.shape, "UINT8")
        entry.set_data_from_numpy(tensor)
        inputs.append(entry)
    return inputs


def write_frame(path: Path, tokens: int) -> None:
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=MODEL)
    for entry in client_inputs(tokens):
        request.inputs.append(entry._get_tensor())
        request.raw_input_contents.append(entry._get_content())
    message = request.SerializeToString()
    path.write_bytes(struct.pack(">BI", 0, len(message)) + message)


def ask(port: int, checkpoint: Path, tokens: int) -> None:
    import tritonclient.grpc as client

    server = client.InferenceServerClient(f"127.0.0.1:{port}")
    output = server.infer(MODEL, client_inputs(tokens)).as_numpy("output")
    got = (output.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    weight = next(iter(read_checkpoint(checkpoint, False).values()))
    sent = request_tensors(tokens)
    request = SimpleNamespace(
        tokens=tokens, activations=sent["activations"], activation_scales=sent["scales"],
        activation_layout=TGR, scale_layout=TGK, scale_type=UE8M0,
    )  # fmt: skip
    wide = decode_activations(request, weight).astype(np.float64)
    exact = np.matmul(wide, weight.dense.astype(np.float64)).transpose(1, 0, 2)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    if not error < RELATIVE_ERROR_MAX:
        sys.exit(f"relative error {error}")
    print(f"relative error {error:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--frame", type=Path)
    parser.add_argument("--ask", action="store_true")
    parser.add_argument("--tokens", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.frame:
        write_frame(arguments.frame, arguments.tokens)
    elif arguments.ask:
        ask(arguments.port, arguments.checkpoint, arguments.tokens)
    else:
        serve(arguments.checkpoint, arguments.port)


if __name__ == "__main__":
    main()
