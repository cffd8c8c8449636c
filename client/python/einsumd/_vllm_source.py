"""Where in the installed vLLM the projection can be taken over. Its source is read, never imported:
importing it asks for a GPU."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

OPERATOR = "deepseek_v4_fp8_einsum"
OPERATOR_ARGUMENTS = ("a", "a_scale", "b", "b_scale", "out", "equation", "recipe")
FUNCTION = "fp8_einsum"
# Where vLLM has had them, below its package.
SEARCHED = ("model_executor/layers", "models/deepseek_v4", "v1/attention/ops")
LOADER, LOADER_CLASS, LOADER_METHOD = (
    "vllm.model_executor.model_loader.base_loader", "BaseModelLoader", "load_model",
)  # fmt: skip

FITS, DOES_NOT_FIT, USAGE, NOT_INSTALLED = 0, 1, 2, 3  # exit statuses


@dataclass(frozen=True)
class Seam:
    """A place in vLLM where the projection can be taken over."""

    kind: str
    """operator: registered with torch; function: called by a name of the module's."""
    name: str
    module: str
    line: int
    problem: str = ""
    """Why it cannot; empty if it can."""


@dataclass
class Report:
    version: str = ""
    """Of vLLM; empty: it is not installed."""
    seams: list[Seam] = field(default_factory=list)
    watches_loader: bool = False
    """Whether install() can bind models by itself."""

    @property
    def status(self) -> int:
        if not self.version:
            return NOT_INSTALLED
        fits = bool(self.seams) and not any(seam.problem for seam in self.seams)
        return FITS if fits else DOES_NOT_FIT

    def __str__(self) -> str:
        if not self.version:
            return "vLLM is not installed"
        lines = [f"vLLM {self.version}"]
        for seam in self.seams:
            where = f"{seam.module}:{seam.line}"
            lines.append(f"  {seam.kind} {seam.name} at {where}: {seam.problem or 'fits'}")
        if not self.seams:
            lines.append(
                f"  neither an operator {OPERATOR} nor a call of it or of {FUNCTION} below vllm/: "
                + ", ".join(SEARCHED)
            )
        loader = "is watched" if self.watches_loader else "is not there: use einsumd.vllm.bind"
        lines.append(f"  {LOADER}.{LOADER_CLASS}.{LOADER_METHOD} {loader}")
        lines.append("fits" if self.status == FITS else "does not fit")
        return "\n".join(lines)


def check() -> Report:
    """Looks through the installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return Report()
    root = Path(next(iter(spec.submodule_search_locations)))
    modules = {}
    for folder in SEARCHED:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if FUNCTION in text:
                parts = path.relative_to(root).with_suffix("").parts
                modules[".".join(("vllm", *parts))] = ast.parse(text)
    definitions = [found for tree in modules.values() for found in definitions_in(tree)]
    seams = [seam for name, tree in modules.items() for seam in seams_in(tree, name, definitions)]
    loader = root.parent.joinpath(*LOADER.split(".")).with_suffix(".py")
    return Report(version_of(root), seams, loader.exists() and has_loader(loader.read_text()))


def version_of(root: Path) -> str:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return f"of unknown version in {root}"


def definitions_in(tree: ast.Module) -> list[ast.FunctionDef]:
    """Of the function behind the operator."""
    return [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == OPERATOR]


def registration_in(tree: ast.Module) -> ast.Call | None:
    """The call that makes the operator."""
    for call in calls_in(tree):
        named = [keyword.value for keyword in call.keywords if keyword.arg == "op_name"]
        for value in (*named, *call.args[:1]):
            if isinstance(value, ast.Constant) and value.value == OPERATOR:
                return call
    return None


def calls_in(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def seams_in(tree: ast.Module, module: str, definitions: list[ast.FunctionDef]) -> list[Seam]:
    registration = registration_in(tree)
    if registration is not None:
        problem = problem_of_definitions(definitions_in(tree) or definitions)
        return [Seam("operator", OPERATOR, module, registration.lineno, problem)]
    if definitions_in(tree):
        return []  # what it calls in turn is not asked for once its own callers are routed
    seams = []
    for call in calls_in(tree):
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name in (OPERATOR, FUNCTION):
            problem = problem_of_function(call) if name == FUNCTION else problem_of_call(call)
            seams.append(Seam("function", name, module, call.lineno, problem))
    return seams


def problem_of_definitions(definitions: list[ast.FunctionDef]) -> str:
    if not definitions:
        return f"no function {OPERATOR} behind it"
    for definition in definitions:
        names = tuple(each.arg for each in definition.args.args)
        if names != OPERATOR_ARGUMENTS:
            return f"expected ({', '.join(OPERATOR_ARGUMENTS)}), found ({', '.join(names)})"
    return ""


def problem_of_call(call: ast.Call) -> str:
    if len(call.args) == len(OPERATOR_ARGUMENTS) and not call.keywords:
        return ""
    return f"expected {OPERATOR}({', '.join(OPERATOR_ARGUMENTS)}), found {ast.unparse(call)}"


def problem_of_function(call: ast.Call) -> str:
    pairs = [isinstance(each, ast.Tuple) and len(each.elts) == 2 for each in call.args[1:3]]
    keywords = {keyword.arg for keyword in call.keywords}
    if len(call.args) == 4 and pairs == [True, True] and keywords <= {"recipe"}:
        return ""
    wanted = f"{FUNCTION}(equation, (a, a_scale), (b, b_scale), out, recipe=...)"
    return f"expected {wanted}, found {ast.unparse(call)}"


def has_loader(text: str) -> bool:
    return any(
        isinstance(node, ast.ClassDef)
        and node.name == LOADER_CLASS
        and any(isinstance(f, ast.FunctionDef) and f.name == LOADER_METHOD for f in node.body)
        for node in ast.parse(text).body
    )
