"""Routes vLLM's attention output projection of DeepSeek-V4 to a daemon.

    python -m einsumd.vllm --check          does it fit the installed vLLM? Reads its source alone
    einsumd.vllm.install("unix:/run/einsumd/einsumd.sock")          before the model is loaded
    EINSUMD_VLLM_ENDPOINT=unix:/run/einsumd/einsumd.sock vllm serve ...     the same, as a plugin

vLLM's versions and forks project in one of three ways; whichever is there is routed:

    torch.ops.vllm.deepseek_v4_fp8_einsum(a, a_scale, b, b_scale, out, equation, recipe)
    deepseek_v4_fp8_einsum(a, a_scale, b, b_scale, out, equation, recipe)      called by that name
    fp8_einsum(equation, (a, a_scale), (b, b_scale), out, recipe=...)           called by that name

A call says which weight it means by the tensor b. So the model's `wo_a` modules are bound to the
names of resident weights once it is loaded: by install(), which watches vLLM's loader, or by
bind(model). What is not bound stays with vLLM.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from einsumd._client import Client
from einsumd._errors import FailedPrecondition
from einsumd._vllm_source import (
    DOES_NOT_FIT,
    FITS,
    FUNCTION,
    LOADER,
    LOADER_CLASS,
    LOADER_METHOD,
    NOT_INSTALLED,
    USAGE,
    Report,
    Seam,
    check,
)

__all__ = ["Report", "Seam", "bind", "check", "install", "plugin", "uninstall"]


# ---- taking over ---------------------------------------------------------------------------------


class _Installed:
    """What was replaced, and what it takes to answer in its place."""

    def __init__(
        self,
        endpoint: str | Sequence[str],
        weight_names: Mapping[str, str] | Callable[[str], str | None] | None,
        options: dict[str, Any],
    ):
        self.endpoint, self.weight_names, self.options = endpoint, weight_names, options
        self.undo: list[Callable[[], object]] = []
        self.client: Client | None = None
        self.process = 0
        self.lock = threading.Lock()

    def get_client(self) -> Client:
        """This process's: workers are forked or spawned after install()."""
        if self.client is None or self.process != os.getpid():
            with self.lock:
                if self.client is None or self.process != os.getpid():
                    self.client = Client(self.endpoint, **self.options)
                    self.process = os.getpid()
        return self.client

    def name_of(self, prefix: str) -> str | None:
        names = self.weight_names
        if names is None:
            return prefix.removeprefix("model.")
        return names(prefix) if callable(names) else names.get(prefix)


_installed: _Installed | None = None


def install(
    endpoint: str | Sequence[str],
    *,
    weight_names: Mapping[str, str] | Callable[[str], str | None] | None = None,
    tensor_parallel_rank: int | Callable[[], int] | None = None,
    **options: Any,
) -> Report:
    """Routes this process's vLLM to a daemon; undone by uninstall().

    weight_names          from a module's path in the model ("model.layers.3.attn.wo_a") to the name
                          of its resident weight: a mapping or a function, which leaves out what is
                          to stay with vLLM. By default the path without "model."
    tensor_parallel_rank  which part of a weight is meant where the daemon has all of it; by default
                          what vLLM says
    options               of the client, which is made at the first call: see einsumd.Client
    """
    global _installed
    report = check()
    if report.status != FITS:
        raise FailedPrecondition(f"this does not fit:\n{report}")
    import einsumd.torch as ops

    uninstall()
    installed = _Installed(endpoint, weight_names, options)
    try:
        for seam in report.seams:
            take_over = _take_operator if seam.kind == "operator" else _take_function
            take_over(installed, seam)
        if report.watches_loader:
            _watch_loader(installed)
    except BaseException:
        _undo(installed)
        raise
    rank = _rank_of_vllm if tensor_parallel_rank is None else tensor_parallel_rank
    ops.set_tensor_parallel_rank(rank)
    installed.undo.append(lambda: ops.set_tensor_parallel_rank(None))
    _installed = installed
    return report


def _undo(installed: _Installed) -> None:
    while installed.undo:
        installed.undo.pop()()


def plugin() -> None:
    """The entry point for vLLM, which calls it in all of its processes, workers too. Commas in
    EINSUMD_VLLM_ENDPOINT part several daemons that share the groups."""
    given = os.environ.get("EINSUMD_VLLM_ENDPOINT", "")
    endpoints = [each.strip() for each in given.split(",") if each.strip()]
    if len(endpoints) > 1:
        install(endpoints, shard="groups")
    elif endpoints:
        install(endpoints[0])


def uninstall() -> None:
    """Gives vLLM its own projection back."""
    global _installed
    installed, _installed = _installed, None
    if installed is None:
        return
    import einsumd.torch as ops

    _undo(installed)
    ops.unbind()
    if installed.client is not None and installed.process == os.getpid():
        installed.client.close()


def bind(model: Any) -> dict[str, str]:
    """Binds the `wo_a` modules of a loaded model; returns which path means which weight."""
    import einsumd.torch as ops

    if _installed is None:
        raise FailedPrecondition("einsumd.vllm.install comes first")
    bound: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if prefix.rsplit(".", 1)[-1] != "wo_a" or getattr(module, "weight", None) is None:
            continue
        name = _installed.name_of(prefix)
        if name is not None:
            ops.bind(module.weight, name, _installed.get_client)
            bound[prefix] = name
    return bound


def _rank_of_vllm() -> int:
    distributed = importlib.import_module("vllm.distributed")
    rank: int = distributed.get_tensor_model_parallel_rank()
    return rank


def _take_operator(installed: _Installed, seam: Seam) -> None:
    """Registers another kernel for the operator, wherever it has one."""
    import torch

    import einsumd.torch as ops

    original = getattr(importlib.import_module(seam.module), seam.name, None)
    if original is None:
        raise FailedPrecondition(f"{seam.module} does not have {seam.name} under that name")
    key = f"{seam.module}.{seam.name}"
    ops.fallbacks[key] = original
    library = torch.library.Library("vllm", "IMPL")
    for device in ("CUDA", "CPU", "CompositeExplicitAutograd"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm::{seam.name}", device):
            library.impl(seam.name, ops.operator(key), device, allow_override=True)
    installed.undo += [library._destroy, lambda: ops.fallbacks.pop(key)]


def _take_function(installed: _Installed, seam: Seam) -> None:
    """Puts another function under the name that is called."""
    import einsumd.torch as ops

    module = importlib.import_module(seam.module)
    key = f"{seam.module}.{seam.name}"
    if key in ops.fallbacks:
        return  # called in more than one place of the module
    original = getattr(module, seam.name)

    def in_order(a: Any, sa: Any, b: Any, sb: Any, out: Any, equation: str, recipe: Any) -> None:
        original(equation, (a, sa), (b, sb), out, recipe=tuple(recipe))

    def routed(expr: str, a: Any, b: Any, d: Any, recipe: Sequence[int] = (1, 128, 128)) -> None:
        ops.fp8_einsum(expr, a, b, d, recipe=recipe, otherwise=key)

    ops.fallbacks[key] = in_order if seam.name == FUNCTION else original
    setattr(module, seam.name, routed if seam.name == FUNCTION else ops.operator(key, traced=True))
    installed.undo += [lambda: setattr(module, seam.name, original),
                       lambda: ops.fallbacks.pop(key)]  # fmt: skip


def _watch_loader(installed: _Installed) -> None:
    loader = getattr(importlib.import_module(LOADER), LOADER_CLASS)
    original = getattr(loader, LOADER_METHOD)

    @functools.wraps(original)
    def load_model(self: Any, *arguments: Any, **keywords: Any) -> Any:
        model = original(self, *arguments, **keywords)
        bind(model)
        return model

    setattr(loader, LOADER_METHOD, load_model)
    installed.undo.append(lambda: setattr(loader, LOADER_METHOD, original))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m einsumd.vllm",
        description="Whether the installed vLLM's attention output projection can be routed here.",
        epilog=f"exit status: {FITS} it fits, {DOES_NOT_FIT} it does not, {NOT_INSTALLED} there is "
        f"no vLLM, {USAGE} wrong usage",
    )
    parser.add_argument("--check", action="store_true", required=True, help="look, and tell")
    parser.parse_args(arguments)
    report = check()
    print(report)
    return report.status


if __name__ == "__main__":
    sys.exit(main())
