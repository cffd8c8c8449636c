"""The operators of torch: eager, compiled, over every layout, against torch in FP64.

Needs torch: deploy/install-dependencies.sh --torch puts it into build/torch.
"""

from __future__ import annotations

import gc
from typing import Any, Iterator

import numpy as np
import pytest

import oracle
import python_package
from conftest import Site, serving
from python_package import ACTIVATIONS, COPIED_ACTIVATIONS, COPIED_SCALES, SCALES, tensors
from test_python_client import EQUATION, NAME, weights

torch = python_package.torch()
pytestmark = pytest.mark.skipif(
    torch is None, reason="no torch: deploy/install-dependencies.sh --torch"
)


@pytest.fixture(scope="module")
def einsumd() -> Any:
    package = python_package.einsumd()
    import einsumd.torch  # noqa: F401 - registers the operators

    return package


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("torch")
    with serving(
        folder, weights(), 256,
        listen=[f"unix:{folder}/einsumd.sock"],
        shared_memory_listen=f"unix:{folder}/shared.sock",
    ) as site:  # fmt: skip
        yield site


@pytest.fixture(scope="module", autouse=True)
def client(einsumd: Any, small: Site) -> Iterator[Any]:
    """The default client, by which the operators find weights."""
    with einsumd.connect(small.daemon.address) as client:
        yield client
    einsumd.set_default_client(None)


def exact(activations: oracle.Activations, weight: oracle.Weight) -> Any:
    """The operation in torch's FP64, from the tensors' own types."""
    a = torch.from_numpy(activations.values).view(torch.float8_e4m3fn).double()
    b = torch.from_numpy(weight.values).view(torch.float8_e4m3fn).double()
    sa = scales_of(activations.scales)
    sb = scales_of(weight.scales)
    a *= sa.repeat_interleave(weight.block_r, 2)
    b *= sb.repeat_interleave(weight.block_d, 1).repeat_interleave(weight.block_r, 2)
    return torch.einsum(EQUATION, a, b)


def scales_of(scales: np.ndarray) -> Any:
    scales = torch.from_numpy(scales)
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).double()


expectations: dict[tuple[int, int], Any] = {}


def check(out: Any, activations: oracle.Activations, weight: oracle.Weight) -> None:
    """Rounded once, but for the FP32 sum's own error."""
    key = (id(activations), id(weight))
    if key not in expectations:
        want = exact(activations, weight)
        error = torch.from_numpy(oracle.project(activations, weight)[1])
        expectations[key] = (want, error, activations, weight)
    want, error, _, _ = expectations[key]
    bits = 8 if out.dtype == torch.bfloat16 else 24
    assert ((out.double() - want).abs() <= error + want.abs() * 2.0**-bits + 2.0**-133).all()


def case(
    rng: np.random.Generator, weight: oracle.Weight, tokens: int, kind: str, *layouts: str
) -> tuple[oracle.Activations, Any, Any, Any]:
    activations = oracle.random_activations(rng, weight, tokens, kind)
    return laid_out(activations, weight, *layouts)


def laid_out(
    activations: oracle.Activations, weight: oracle.Weight, *layouts: str
) -> tuple[oracle.Activations, Any, Any, Any]:
    tokens = activations.tokens
    out = torch.full((tokens, weight.groups, weight.output_dim), float("nan"), dtype=torch.bfloat16)
    return activations, *tensors(activations, *layouts), out


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("kind", SCALES)
def test_every_layout_is_taken_as_it_is(
    einsumd: Any, small: Site, rng: np.random.Generator, kind: str, tokens: int
) -> None:
    copies = einsumd.copies()
    for name, weight in small.weights.items():
        recipe = [1, weight.block_d, weight.block_r]
        activations = oracle.random_activations(rng, weight, tokens, kind)
        for layout in ACTIVATIONS:
            for scale_layout in SCALES[kind]:
                _, a, s, out = laid_out(activations, weight, layout, scale_layout)
                torch.ops.einsumd.fp8_einsum(EQUATION, a, s, name, out, recipe)
                check(out, activations, weight)
                flat = out.new_empty((tokens, weight.groups * weight.output_dim)).float()
                torch.ops.einsumd.fp8_einsum(EQUATION, a, s, name, flat, recipe)
                check(flat.view(out.shape), activations, weight)
    assert einsumd.copies() == copies


@pytest.mark.parametrize("kind", SCALES)
def test_other_layouts_are_copied_and_counted(
    einsumd: Any, small: Site, rng: np.random.Generator, kind: str
) -> None:
    weight = small.weights[NAME]
    activations = oracle.random_activations(rng, weight, 5, kind)
    for layout in COPIED_ACTIVATIONS:
        for scale_layout in COPIED_SCALES[kind]:
            _, a, s, out = laid_out(activations, weight, layout, scale_layout)
            copies = einsumd.copies()
            torch.ops.einsumd.fp8_einsum(EQUATION, a, s, NAME, out)
            check(out, activations, weight)
            assert einsumd.copies() == copies + 2
    strided = torch.zeros(5, 256, 4, dtype=torch.bfloat16).transpose(1, 2)
    torch.ops.einsumd.fp8_einsum(EQUATION, a, s, NAME, strided)
    check(strided, activations, weight)
    expanded = torch.ones(1, 1, 1).expand(5, 4, 4)
    torch.ops.einsumd.fp8_einsum(EQUATION, a, expanded, NAME, out)
    check(out, oracle.Activations(activations.values, np.ones((5, 4, 4), np.float32)), weight)


def test_as_vllm_leaves_them(einsumd: Any, small: Site, rng: np.random.Generator) -> None:
    """The very expressions of vLLM's quantisation: buffers of [G, T, R] and padded scales."""
    weight = small.weights[NAME]
    copies = einsumd.copies()
    for tokens in (1, 2, 5, 8):
        stored = -(-tokens // 4) * 4
        activations = oracle.random_activations(rng, weight, tokens, "UE8M0")
        fp8 = torch.empty((4, tokens, 512), dtype=torch.float8_e4m3fn)
        fp8.copy_(torch.from_numpy(activations.values).view(fp8.dtype).transpose(0, 1))
        packed = torch.empty(4 * stored, dtype=torch.int32)
        packed = packed.as_strided((4, tokens, 1), (stored, 1, stored))
        packed.copy_(torch.from_numpy(activations.scales).view(torch.int32).transpose(0, 1))
        fp32 = torch.empty(4 * 4 * stored).as_strided((4, tokens, 4), (4 * stored, 1, stored))
        fp32.copy_(scales_of(activations.scales).transpose(0, 1))
        for scale, recipe in ((packed, [1, 1, 128]), (fp32, [1, 128, 128])):
            out = torch.empty((tokens, 4, 256), dtype=torch.bfloat16)
            torch.ops.einsumd.fp8_einsum(
                EQUATION, fp8.transpose(0, 1), scale.transpose(0, 1), NAME, out, recipe
            )
            check(out, activations, weight)
    assert einsumd.copies() == copies


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("kind", "layouts"),
    [("FP32", ("GTR", "GKT")), ("UE8M0", ("GTR", "packed GKT")), ("UE8M0", ("TGR 2-D", "TGK"))],
)
def test_compiled(
    einsumd: Any, small: Site, rng: np.random.Generator, backend: str, kind: str,
    layouts: tuple[str, str],
) -> None:  # fmt: skip
    """In one graph, for several numbers of tokens; the same numbers; layouts reach the daemon."""
    weight = small.weights[NAME]
    torch._dynamo.reset()

    def project(a: Any, s: Any) -> Any:
        out = torch.empty((a.shape[0], 4, 256), dtype=torch.bfloat16)
        torch.ops.einsumd.fp8_einsum(EQUATION, a, s, NAME, out, [1, 128, 128])
        return out, out.float().sum(-1) * 2

    compiled = torch.compile(project, backend=backend, fullgraph=True)
    copies = einsumd.copies()
    for tokens in (3, 4, 9):
        activations, a, s, _ = case(rng, weight, tokens, kind, *layouts)
        s = s.view(torch.uint8) if s.dtype == torch.float8_e8m0fnu else s
        out, total = compiled(a, s)
        check(out, activations, weight)
        size = out.double().abs().sum(-1)
        assert ((total - out.double().sum(-1) * 2).abs() <= size * 1e-5).all()
    assert einsumd.copies() == copies


def test_compiled_with_ue8m0_tensors(einsumd: Any, small: Site, rng: np.random.Generator) -> None:
    """By the package's function, since inductor refuses that type of what writes to an argument."""
    import einsumd.torch as ops

    weight = small.weights[NAME]
    activations, a, s, out = case(rng, weight, 3, "UE8M0", "TGR", "TGK")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def project(a: Any, s: Any, out: Any) -> Any:
        ops.fp8_einsum(EQUATION, (a, s), (NAME, None), out, recipe=(1, 128, 128))
        return out * 2

    doubled = project(a, s, out)
    check(out, activations, weight)
    assert (doubled == out * 2).all()


def test_opcheck(einsumd: Any, small: Site, rng: np.random.Generator) -> None:
    """torch's own test of registrations; of its parts, test_schema cannot compare FP8."""
    import einsumd.torch as ops

    weight = small.weights[NAME]
    held = torch.zeros(4, 256, 512, dtype=torch.uint8)

    def named_instead(a: Any, s: Any, _: Any, __: Any, out: Any, *rest: Any) -> None:
        torch.ops.einsumd.fp8_einsum(rest[0], a, s, NAME, out, rest[1])

    ops.fallbacks["opcheck"] = named_instead  # it calls with copies, which stand for nothing
    for kind, layouts in (("UE8M0", ("TGR", "TGK")), ("FP32", ("GTR", "GKT"))):
        _, a, s, out = case(rng, weight, 3, kind, *layouts)
        bits = (a.view(torch.uint8), s.view(torch.uint8) if kind == "UE8M0" else s)
        some = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
        named, tensor = torch.ops.einsumd.fp8_einsum, torch.ops.einsumd.fp8_einsum_bound
        for utils, (a, s) in (({}, bits), ({"test_utils": some}, (a, s))):
            results = [
                torch.library.opcheck(named, (EQUATION, a, s, NAME, out, [1, 128, 128]), **utils),
                torch.library.opcheck(
                    tensor, (a, s, held, s, out, EQUATION, [1, 128, 128], "opcheck"), **utils
                ),
            ]
            for result in results:
                assert len(result) >= 3 and set(result.values()) == {"SUCCESS"}
    del ops.fallbacks["opcheck"]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_tensor_parallel_slices(
    einsumd: Any, small: Site, client: Any, rng: np.random.Generator, size: int
) -> None:
    weight = small.weights[NAME]
    groups = 4 // size
    copies = einsumd.copies()
    for rank in range(size):
        begin, end = rank * groups, (rank + 1) * groups
        part = weight.slice(begin, end)
        activations, a, s, out = case(rng, part, 5, "FP32", "GTR", "GKT")
        for key in (f"{NAME}[{begin}:{end}]", client.weight(NAME)[begin:end].key):
            torch.ops.einsumd.fp8_einsum(EQUATION, a, s, key, out)
            check(out, activations, part)
        # A view of some groups of what a caller holds of all.
        whole, a, s, _ = case(rng, weight, 5, "UE8M0", "GTR", "packed GKT")
        torch.ops.einsumd.fp8_einsum(
            EQUATION, a[:, begin:end], s[:, begin:end], f"{NAME}[{begin}:{end}]", out
        )
        sliced = oracle.Activations(whole.values[:, begin:end], whole.scales[:, begin:end])
        check(out, sliced, part)
    assert einsumd.copies() == copies


def test_bound_tensors(einsumd: Any, small: Site, rng: np.random.Generator) -> None:
    """2-D and 3-D weights and scales, views of their groups, and ranks of one that is whole."""
    import einsumd.torch as ops

    weight = small.weights[NAME]
    flat = torch.zeros(4 * 256, 512, dtype=torch.float8_e4m3fn)
    flat_scale, scale = torch.zeros(8, 4), torch.zeros(4, 2, 4)
    ops.bind(flat, NAME)
    einsum = torch.ops.einsumd.fp8_einsum_bound
    activations, a, s, out = case(rng, weight, 3, "FP32", "GTR", "GKT")
    recipe = [1, 128, 128]
    for b, b_scale in ((flat, flat_scale), (flat.view(4, 256, 512), scale)):
        out.fill_(float("nan"))
        einsum(a, s, b, b_scale, out, EQUATION, recipe)
        check(out, activations, weight)

    part = weight.slice(2, 4)
    activations, a, s, out = case(rng, part, 3, "FP32", "GTR", "GKT")
    for b in (flat[2 * 256 :], flat.view(4, 256, 512)[2:], flat.view(4, 256, 512).narrow(0, 2, 2)):
        out.fill_(float("nan"))
        einsum(a, s, b, scale[2:], out, EQUATION, recipe)
        check(out, activations, part)

    with pytest.raises(einsumd.FailedPrecondition, match="tensor-parallel rank"):
        einsum(a, s, flat, flat_scale, out, EQUATION, recipe)
    ops.set_tensor_parallel_rank(1)
    einsum(a, s, flat, flat_scale, out, EQUATION, recipe)
    check(out, activations, part)

    # What a rank holds of a weight that the daemon has whole.
    local = torch.zeros(2 * 256, 512, dtype=torch.float8_e4m3fn)
    ops.bind(local, NAME)
    einsum(a, s, local, scale[2:], out, EQUATION, recipe)
    check(out, activations, part)
    ops.set_tensor_parallel_rank(None)

    for wrong in (flat[1:], flat[: 256 + 128], flat.view(4, 256, 512)[:, :128], flat.T):
        with pytest.raises(einsumd.InvalidArgument, match="whole groups"):
            einsum(a, s, wrong, scale, out, EQUATION, recipe)
    with pytest.raises(einsumd.FailedPrecondition, match="stands for no resident weight"):
        einsum(a, s, torch.zeros(512, 512), scale, out, EQUATION, recipe)
    with pytest.raises(einsumd.InvalidArgument, match="contiguous"):
        ops.bind(flat.T, NAME)
    with pytest.raises(einsumd.NotFound):
        ops.bind(local, "layers.99.attn.wo_a")
        einsum(a, s, local, scale, out, EQUATION, recipe)


def test_a_binding_ends_with_its_tensor(einsumd: Any, small: Site) -> None:
    import einsumd.torch as ops

    held = torch.zeros(4, 256, 512, dtype=torch.float8_e4m3fn)
    ops.bind(held, NAME)
    assert ops.bound(held).name == NAME
    again = torch.empty(0, dtype=held.dtype).set_(held.untyped_storage(), 0, held.shape)
    assert ops.bound(again).name == NAME
    del held
    gc.collect()
    with pytest.raises(einsumd.FailedPrecondition):
        ops.bound(again)


def test_bad_tensors_are_named(einsumd: Any, small: Site, rng: np.random.Generator) -> None:
    weight = small.weights[NAME]
    _, a, s, out = case(rng, weight, 3, "FP32", "TGR", "TGK")
    for wrong, text in (
        ((a.float(), s, out), "a: expected E4M3"),
        ((a.view(torch.float8_e5m2), s, out), "a: elements of type torch.float8_e5m2"),
        ((a, s[:, :, :2], out), "a_scale: expected"),
        ((a, s.double(), out), "a_scale: elements of type torch.float64"),
        ((a, s, out.half()), "out: elements of type torch.float16"),
        ((a, s, out[:, :, :8]), "out: expected"),
    ):
        with pytest.raises(einsumd.InvalidArgument, match=text):
            torch.ops.einsumd.fp8_einsum(EQUATION, wrong[0], wrong[1], NAME, wrong[2])


def test_tensors_in_shared_memory(
    einsumd: Any, small: Site, client: Any, rng: np.random.Generator
) -> None:
    weight = small.weights[NAME]
    activations, a, s, out = case(rng, weight, 5, "UE8M0", "TGR", "TGK")
    shared = [client.empty(each.shape, each.dtype) for each in (a, s, out)]
    for to, tensor in zip(shared, (a, s, out)):
        to.copy_(tensor)
    before = client.info().counters["ring_requests"]
    torch.ops.einsumd.fp8_einsum(EQUATION, shared[0], shared[1], NAME, shared[2])
    check(shared[2], activations, weight)
    assert client.transport == "ring" and client.info().counters["ring_requests"] == before + 1
    del client


def test_functions_agree(einsumd: Any, small: Site, client: Any, rng: np.random.Generator) -> None:
    """DeepGEMM's signature, with torch's tensors, by handle and by name."""
    import einsumd.torch as ops

    weight = small.weights[NAME]
    activations, a, s, out = case(rng, weight, 3, "FP32", "TGR", "TGK")
    handle = client.weight(NAME)
    for function in (einsumd.fp8_einsum, ops.fp8_einsum):
        for b in ((handle, handle), (NAME, None), (handle, None)):
            out.fill_(float("nan"))
            function(EQUATION, (a, s), b, out, recipe=(1, 128, 128))
            check(out, activations, weight)
        with pytest.raises(einsumd.Unimplemented, match="c: expected None"):
            function(EQUATION, (a, s), (NAME, None), out, out)
