"""Peers of the kernels on the GPU at hand, timed as tests/gpu/bench times ours: 43 different layers of
V4-Flash in one CUDA graph, median of 20 replays, microseconds a layer. Needs PyTorch.

    python3 tests/gpu/peers.py     last line: RESULT {json}

cuBLAS, batched BF16: the same product without FP8, twice the bytes of weights.
"""

import json
import statistics

import torch

LAYERS, GROUPS, OUTPUTS, REDUCED = 43, 8, 1024, 4096
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)


def graph_us(step):
    """Microseconds a layer of step(layer), captured for all layers and replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(0)  # libraries choose and allocate outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            step(layer)
    times = []
    for _ in range(23):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:]) * 1000 / LAYERS


def main():
    weights = [
        torch.randn(GROUPS, OUTPUTS, REDUCED, dtype=torch.bfloat16, device="cuda")
        for _ in range(LAYERS)
    ]
    rows = []
    for tokens in TOKENS:
        a = torch.randn(GROUPS, tokens, REDUCED, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(GROUPS, tokens, OUTPUTS, dtype=torch.bfloat16, device="cuda")
        us = graph_us(lambda layer: torch.bmm(a, weights[layer].transpose(1, 2), out=out))
        print(f"cuBLAS BF16 batched {tokens:12} {us:9.2f} us", flush=True)
        rows.append({"case": "cublas bf16", "tokens": tokens, "us": round(us, 3)})
    print("RESULT", json.dumps({"bench": "gpu_peers", "device": torch.cuda.get_device_name(), "rows": rows}))


if __name__ == "__main__":
    main()
