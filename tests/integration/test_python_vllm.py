"""Routing vLLM here: against stand-ins for its versions and forks, by its own signatures."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest

import python_package
from conftest import Site, serving, small_weights
from daemon import run

STAND_IN = Path(__file__).with_name("vllm_stand_in")
OPS = "vllm/models/deepseek_v4/nvidia/ops"
MODULES = {
    "operator": "vllm.model_executor.layers.deepseek_v4_attention",
    "function": f"{OPS.replace('/', '.')}.o_proj",
    "dispatcher": f"{OPS.replace('/', '.')}.o_proj",
}
FITS, DOES_NOT_FIT, USAGE, NOT_INSTALLED = 0, 1, 2, 3

without_torch = pytest.mark.skipif(
    python_package.torch() is None, reason="no torch: deploy/install-dependencies.sh --torch"
)


def stand_in(folder: Path, variant: str) -> Path:
    tree = folder / variant
    for part in ("common", variant):
        shutil.copytree(STAND_IN / part, tree, dirs_exist_ok=True)
    return tree


def python(tree: Path | None, *arguments: Any) -> Any:
    """A process that has the package, torch and, if a tree is given, its vLLM."""
    python_package.einsumd()
    paths = [tree, python_package.SITE, python_package.TORCH_SITE]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = ":".join(str(path) for path in paths if path)
    try:
        return run(sys.executable, *arguments, timeout=300)
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def check(tree: Path | None, status: int) -> str:
    checked = python(tree, "-m", "einsumd.vllm", "--check")
    assert checked.returncode == status, checked.stdout + checked.stderr
    return checked.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("vllm")
    with serving(folder, small_weights(), 256, listen=[f"unix:{folder}/einsumd.sock"]) as site:
        stored = {}
        for i, weight in enumerate(site.weights.values()):
            stored |= {f"values{i}": weight.values, f"scales{i}": weight.scales}
        np.savez(folder / "weights.npz", **stored)
        yield site


@without_torch
@pytest.mark.parametrize("variant", MODULES)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_projection_is_routed(
    site: Site, tmp_path: Path, variant: str, rank: int, size: int
) -> None:
    """Right numbers, nothing copied; what is not bound, and all after uninstall, as before."""
    driver = Path(__file__).with_name("vllm_driver.py")
    weights = site.daemon.config_path.parent / "weights.npz"
    tree = stand_in(tmp_path, variant)
    ran = python(tree, driver, site.daemon.address, weights, MODULES[variant], rank, size)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["right", "0"]


PLUGIN = f"""
import importlib, importlib.metadata, sys
(entry,) = importlib.metadata.entry_points(group="vllm.general_plugins")
entry.load()()
print(entry.name, importlib.import_module("{MODULES["function"]}").fp8_einsum.__module__)
"""


@without_torch
@pytest.mark.parametrize("endpoint", ["", "unix:/a", "unix:/a, unix:/b"])
def test_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """As vLLM finds it, and only if it is asked for."""
    monkeypatch.setenv("EINSUMD_VLLM_ENDPOINT", endpoint)
    ran = python(stand_in(tmp_path, "function"), "-c", PLUGIN)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["einsumd", "einsumd.vllm" if endpoint else "vllm.utils.deep_gemm"]


@pytest.mark.parametrize(
    ("variant", "seams"),
    [
        ("operator", ["operator deepseek_v4_fp8_einsum"]),
        ("function", ["function fp8_einsum"]),
        ("dispatcher", ["function deepseek_v4_fp8_einsum", "function fp8_einsum"]),
    ],
)
def test_check_fits(tmp_path: Path, variant: str, seams: list[str]) -> None:
    said = check(stand_in(tmp_path, variant), FITS)
    for seam in seams:
        assert f"  {seam} at {MODULES[variant]}:" in said
    assert "is watched" in said and said.endswith("\nfits\n")


def test_check_fits_an_operator_of_an_imported_function(tmp_path: Path) -> None:
    """Registered in one module, written in another."""
    tree = stand_in(tmp_path, "operator")
    source = tree / (MODULES["operator"].replace(".", "/") + ".py")
    text = source.read_text()
    begin, end = (
        text.index("def deepseek_v4_fp8_einsum("),
        text.index("def deepseek_v4_fp8_einsum_f"),
    )
    other = tree / OPS / "fp8_einsum.py"
    other.parent.mkdir(parents=True)
    other.write_text("import torch\n" + text[begin:end])
    source.write_text(text[:begin] + text[end:])
    assert "operator deepseek_v4_fp8_einsum" in check(tree, FITS)


@pytest.mark.parametrize(
    ("variant", "old", "new", "said"),
    [
        ("operator", "    b_scale: torch.Tensor,\n", "", "found (a, a_scale, b, out"),
        ("operator", "(\n    a: torch.Tensor,\n    a_scale", "(\n    x: torch.Tensor,\n    a_scale",
         "expected (a, a_scale, b, b_scale, out, equation, recipe), found (x, a_scale"),
        ("function", "        z,\n        recipe", "        z,\n        None,\n        recipe",
         "expected fp8_einsum(equation, (a, a_scale), (b, b_scale), out, recipe=...), found"),
        ("function", "(wo_a.weight, wo_a.weight_scale_inv)", "wo_a", "found fp8_einsum('bhr,hdr"),
        ("function", "    fp8_einsum(", "    bf16_einsum(", "neither an operator"),
        ("dispatcher", "            z,\n            \"bhr", "            \"bhr",
         "expected deepseek_v4_fp8_einsum(a, a_scale"),
    ],
)  # fmt: skip
def test_check_says_what_does_not_fit(
    tmp_path: Path, variant: str, old: str, new: str, said: str
) -> None:
    tree = stand_in(tmp_path, variant)
    source = tree / (MODULES[variant].replace(".", "/") + ".py")
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    output = check(tree, DOES_NOT_FIT)
    assert said in output and output.endswith("does not fit\n")
    script = f"import einsumd.vllm; einsumd.vllm.install('unix:{tmp_path}/none')"
    installed = python(tree, "-c", script)
    assert installed.returncode == 1 and "FailedPrecondition" in installed.stderr


def test_check_without_vllm_and_wrong_usage(tmp_path: Path) -> None:
    assert "not installed" in check(None, NOT_INSTALLED)
    assert python(None, "-m", "einsumd.vllm").returncode == USAGE


def test_check_where_the_loader_is_another(tmp_path: Path) -> None:
    tree = stand_in(tmp_path, "function")
    (tree / "vllm/model_executor/model_loader/base_loader.py").unlink()
    assert "use einsumd.vllm.bind" in check(tree, FITS)
