#!/usr/bin/env python3
"""Makes the corpora of fuzz_http2 and fuzz_http from what real clients send.

    tests/fuzz/capture.py          after tests/fuzz/run.sh and the release build

The fuzzer's own daemon serves; clients that we did not write, and einsumctl, talk to it through a
proxy that keeps what they say. Each conversation is one input, behind the byte that says how to send it.
"""

import os
import pathlib
import socket
import subprocess
import threading

ROOT = pathlib.Path(__file__).resolve().parents[2]
FUZZER = ROOT / "build/fuzz/tests/fuzz/fuzz_http2"
CTL = ROOT / "build/release/einsumctl"
GRPCURL = ROOT / "build/venv/bin/grpcurl"
CORPUS = ROOT / "tests/fuzz/corpus"
BYTES_MAX = 16 << 10
WEIGHT = "layers.0.attn.wo_a"
RUN = ["run", "--weight", WEIGHT, "--random"]
INFER = (
    '{"model_name": "%s", "inputs": [{"name": "activations", "datatype": "UINT8", "shape": [1, 4,'
    ' 512]}, {"name": "activation_scales", "datatype": "UINT8", "shape": [1, 4, 4]}]}' % WEIGHT
)


def pump(source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
    while data := source.recv(65536):
        if kept is not None:
            kept += data
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


def proxy_one(listener: socket.socket, behind: str, kept: bytearray) -> None:
    client, _ = listener.accept()
    server = socket.socket(socket.AF_UNIX)
    server.connect(behind)
    threading.Thread(target=pump, args=(server, client, None), daemon=True).start()
    try:
        pump(client, server, kept)
    except OSError:
        pass


def capture(directory: str, name: str, command: list[str]) -> bytes:
    """What the command sends on its first connection; ADDRESS in it is where to."""
    address = f"{directory}/proxy.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    kept = bytearray()
    thread = threading.Thread(
        target=proxy_one, args=(listener, f"{directory}/{name}", kept), daemon=True
    )
    thread.start()
    command = [word.replace("ADDRESS", address) for word in command]
    subprocess.run(command, capture_output=True, timeout=30, check=False)
    thread.join(5)
    listener.close()
    os.unlink(address)
    return bytes(kept)


def grpcurl(method: str, data: str = "{}", *more: str) -> list[str]:
    return [str(GRPCURL), "-plaintext", "-unix", *more, "-d", data, "ADDRESS", method]


def ctl(*arguments: str) -> list[str]:
    return [str(CTL), "--endpoint", "unix:ADDRESS", *arguments]


CALLS = {
    "ctl-info": ctl("info"),
    "ctl-health": ctl("health"),
    "ctl-weights": ctl("weights", "list"),
    "ctl-selftest": ctl("selftest"),
    "ctl-run": ctl(*RUN, "1", "--output", "/dev/null"),
    "ctl-digest": ctl(*RUN, "2", "--digest"),
    "ctl-fp32": ctl(*RUN, "1", "--scale-type", "fp32", "--scale-layout", "gkt", "--digest"),
    "ctl-load": ctl("weights", "load", "/nowhere"),
    "ctl-unload": ctl("weights", "unload", "layers.9.attn.wo_a"),
    "grpcurl-list": [str(GRPCURL), "-plaintext", "-unix", "ADDRESS", "list"],
    "grpcurl-describe": [str(GRPCURL), "-plaintext", "-unix", "ADDRESS", "describe"],
    "grpcurl-check": grpcurl("grpc.health.v1.Health/Check"),
    "grpcurl-watch": grpcurl("grpc.health.v1.Health/Watch", "{}", "-max-time", "1"),
    "grpcurl-list-health": grpcurl("grpc.health.v1.Health/List"),
    "grpcurl-list-weights": grpcurl("einsum.v1.Einsum/ListWeights"),
    "grpcurl-server-info": grpcurl("einsum.v1.Einsum/ServerInfo", "{}", "-H", "einsumd-timing: 1"),
    "grpcurl-empty": grpcurl("einsum.v1.Einsum/Einsum", "{}", "-max-time", "2"),
    "grpcurl-stream": grpcurl("einsum.v1.Einsum/EinsumStream", '{"request": {"tokens": 1}}'),
    "grpcurl-project": grpcurl("einsum.v1.Einsum/OutputProject", '{"weight": "%s"}' % WEIGHT),
    "grpcurl-metadata": grpcurl("inference.GRPCInferenceService/ServerMetadata"),
    "grpcurl-model": grpcurl(
        "inference.GRPCInferenceService/ModelMetadata", '{"name": "%s"}' % WEIGHT
    ),
    "grpcurl-config": grpcurl(
        "inference.GRPCInferenceService/ModelConfig", '{"name": "%s"}' % WEIGHT
    ),
    "grpcurl-statistics": grpcurl("inference.GRPCInferenceService/ModelStatistics"),
    "grpcurl-infer": grpcurl("inference.GRPCInferenceService/ModelInfer", INFER),
    "grpcurl-index": grpcurl("inference.GRPCInferenceService/RepositoryIndex"),
    "grpcurl-unknown": grpcurl("grpc.health.v1.Health/Nothing"),
    "curl": ["curl", "-s", "--http2-prior-knowledge", "--unix-socket", "ADDRESS", "http://x/"],
    "curl-post": ["curl", "-s", "--http2-prior-knowledge", "--unix-socket", "ADDRESS", "-d", "x=y",
                  "-H", "content-type: application/grpc", "http://x/einsum.v1.Einsum/Einsum"],
}  # fmt: skip

CURL = ["curl", "-s", "-m", "2", "--unix-socket", "ADDRESS"]
PAGES = {
    "metrics": [*CURL, "http://x/metrics"],
    "openmetrics": [*CURL, "-H", "Accept: application/openmetrics-text", "http://x/metrics"],
    "livez": [*CURL, "http://x/livez"],
    "readyz": [*CURL, "-0", "http://x/readyz"],
    "buildinfo": [*CURL, "--compressed", "http://x/buildinfo"],
    "head": [*CURL, "-I", "http://x/metrics"],
    "post": [*CURL, "-d", "x=y", "http://x/metrics"],
    "chunked": [*CURL, "-H", "Transfer-Encoding: chunked", "-d", "x=y", "http://x/livez"],
    "upgrade": [*CURL, "--http2", "http://x/livez"],
    "credentials": [*CURL, "-u", "a:b", "-b", "c=d", "http://x/livez?e=f"],
    "missing": [*CURL, "http://x/%00/../secret"],
}


def main() -> None:
    process = subprocess.Popen(
        [FUZZER], env=os.environ | {"FUZZ_SERVE_ONLY": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    directory = process.stdout.readline().strip()
    try:
        for corpus, name, commands in (("http2", "grpc.sock", CALLS), ("http", "http.sock", PAGES)):
            folder = CORPUS / corpus
            folder.mkdir(parents=True, exist_ok=True)
            for what, command in commands.items():
                said = capture(directory, name, command)[:BYTES_MAX]
                print(f"{corpus}/{what}: {len(said)} bytes")
                if said:
                    (folder / what).write_bytes(b"\0" + said)
    finally:
        process.communicate("\n", timeout=30)


if __name__ == "__main__":
    main()
