"""Peers of the kernels on the GPU at hand, timed as tests/gpu/bench times ours: 43 different layers of
V4-Flash in one CUDA graph, median of 20 replays, microseconds a layer. Needs PyTorch.

    python3 tests/gpu/peers.py     last line: RESULT {json}

cuBLAS, batched BF16: the same product without FP8, twice the bytes of weights.
cuBLASLt, FP8 in blocks (1x128 by 128x128, FP32 scales): the same product, eight launches a layer, so of meaning
for many tokens only. Its operands are as random as the bench's: every code but NaN.
"""

import json
import statistics

import torch

LAYERS, GROUPS, OUTPUTS, REDUCED, BLOCK = 43, 8, 1024, 4096, 128
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
TOKENS_FP8 = (512, 1024, 4096, 8192)


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


def random_codes(*shape):
    """E4M3, every code but NaN."""
    code = torch.randint(0, 127, shape, dtype=torch.uint8, device="cuda")
    sign = torch.randint(0, 2, shape, dtype=torch.uint8, device="cuda")
    return (code + 128 * sign).view(torch.float8_e4m3fn)


def bf16_rows():
    weights = [
        torch.randn(GROUPS, OUTPUTS, REDUCED, dtype=torch.bfloat16, device="cuda")
        for _ in range(LAYERS)
    ]
    for tokens in TOKENS:
        a = torch.randn(GROUPS, tokens, REDUCED, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(GROUPS, tokens, OUTPUTS, dtype=torch.bfloat16, device="cuda")
        yield tokens, graph_us(
            lambda layer: torch.bmm(a, weights[layer].transpose(1, 2), out=out)
        )


def fp8_rows():
    weights = [random_codes(GROUPS, OUTPUTS, REDUCED) for _ in range(LAYERS)]
    scales_w = torch.ones(GROUPS, OUTPUTS // BLOCK, REDUCED // BLOCK, device="cuda")
    for tokens in TOKENS_FP8:
        a = random_codes(GROUPS, tokens, REDUCED)
        # Token fastest, as the library wants them.
        scales_a = torch.ones(GROUPS, REDUCED // BLOCK, tokens, device="cuda").transpose(1, 2)
        out = torch.empty(GROUPS, tokens, OUTPUTS, dtype=torch.bfloat16, device="cuda")

        def step(layer):
            for g in range(GROUPS):
                torch._scaled_mm(
                    a[g], weights[layer][g].t(), scales_a[g], scales_w[g].t(),
                    out_dtype=torch.bfloat16, out=out[g],
                )  # fmt: skip

        yield tokens, graph_us(step)


def main():
    rows = []
    for name, measured in (("cuBLAS BF16 batched", bf16_rows()), ("cuBLASLt FP8 blocks", fp8_rows())):
        for tokens, us in measured:
            print(f"{name} {tokens:12} {us:9.2f} us", flush=True)
            rows.append({"case": name, "tokens": tokens, "us": round(us, 3)})
    print("RESULT", json.dumps({"bench": "gpu_peers", "device": torch.cuda.get_device_name(), "rows": rows}))


if __name__ == "__main__":
    main()
