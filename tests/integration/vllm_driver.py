"""Runs the stand-in's projection through einsumd.vllm, and holds it against torch in FP64.

    vllm_driver.py ENDPOINT WEIGHTS.npz MODULE RANK SIZE

A process of its own: operators, once registered, stay. The packages come by PYTHONPATH. Prints
"right" and the number of copies that were made.
"""

import importlib
import os
import sys
from types import SimpleNamespace

import einsumd
import einsumd.vllm
import numpy as np
import torch
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

ENDPOINT, WEIGHTS, MODULE, RANK, SIZE = sys.argv[1:]
os.environ["STAND_IN_RANK"] = RANK
RANK, SIZE = int(RANK), int(SIZE)
LAYERS, GROUPS, OUTPUTS, REDUCED = 2, 4 // SIZE, 256, 512


def container(**children):
    module = torch.nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def make_model():
    """model.layers.N.attn.wo_a, with this rank's groups."""
    stored = np.load(WEIGHTS)
    layers = []
    for i in range(LAYERS + 1):  # the last one is of a name that nobody serves
        wo_a = torch.nn.Module()
        values = torch.from_numpy(stored[f"values{i % LAYERS}"]).chunk(SIZE)[RANK]
        scales = torch.from_numpy(stored[f"scales{i % LAYERS}"]).chunk(SIZE)[RANK]
        weight = values.reshape(-1, REDUCED).view(torch.float8_e4m3fn).clone()
        wo_a.weight = torch.nn.Parameter(weight, requires_grad=False)
        scales = scales.reshape(-1, scales.shape[2]).view(torch.float8_e8m0fnu).clone()
        wo_a.weight_scale_inv = torch.nn.Parameter(scales, requires_grad=False)
        layers.append(container(attn=container(wo_a=wo_a)))
    return container(model=container(layers=torch.nn.ModuleList(layers)))


class Loader(BaseModelLoader):
    def load_weights(self, model, model_config):
        pass


def exact(o, wo_a):
    """From what the quantisation makes of it."""
    from vllm.models.deepseek_v4.common.ops import fused_inv_rope_fp8_quant as quantisation

    a, s = quantisation.fused_inv_rope_fp8_quant(o, GROUPS)
    a = a.double() * s.double().repeat_interleave(128, 2)
    b = wo_a.weight.double().view(GROUPS, OUTPUTS, REDUCED)
    sb = wo_a.weight_scale_inv.double().view(GROUPS, OUTPUTS // 128, REDUCED // 128)
    b = b * sb.repeat_interleave(128, 1).repeat_interleave(128, 2)
    size = torch.einsum("bhr,hdr->bhd", a.abs(), b.abs())
    return torch.einsum("bhr,hdr->bhd", a, b), size * REDUCED * 2.0**-24


def check(out, o, wo_a):
    want, error = exact(o, wo_a)
    assert ((out.double() - want).abs() <= error + want.abs() * 2.0**-8).all(), "wrong"


def refused(function, *arguments):
    """As the stand-in's DeepGEMM refuses."""
    try:
        function(*arguments)
    except RuntimeError as error:
        return "layout.hpp:39" in str(error)
    return False


def main():
    project = importlib.import_module(MODULE).project
    recipes = (((1, 128, 128), False), ((1, 1, 128), True))
    o = torch.randn(5, GROUPS, REDUCED, dtype=torch.bfloat16)

    def arguments(wo_a, recipe):
        return o, wo_a, GROUPS, OUTPUTS, *recipe

    assert refused(project, *arguments(make_model().model.layers[0].attn.wo_a, recipes[0]))

    names = {f"model.layers.{i}.attn.wo_a": f"layers.{i}.attn.wo_a" for i in range(LAYERS)}
    einsumd.vllm.install(ENDPOINT, weight_names=names, allow_copies=False)
    config = SimpleNamespace(make_model=make_model)
    model = Loader(None).load_model(vllm_config=config, model_config=None)
    layers = [layer.attn.wo_a for layer in model.model.layers]
    for wo_a in layers[:LAYERS]:
        for recipe in recipes:
            check(project(*arguments(wo_a, recipe)), o, wo_a)
        torch._dynamo.reset()
        compiled = torch.compile(project, backend="aot_eager", fullgraph=True)
        check(compiled(*arguments(wo_a, recipes[0])), o, wo_a)
    # What has no resident weight stays with vLLM, eager and compiled.
    assert refused(project, *arguments(layers[LAYERS], recipes[0]))
    assert refused(compiled, *arguments(layers[LAYERS], recipes[0]))

    einsumd.vllm.uninstall()
    assert refused(project, *arguments(layers[0], recipes[0]))
    print("right", einsumd.copies())


if __name__ == "__main__":
    main()
