"""The shape of the package: imports go one way, only the command line prints, and W is never formed by torch.kron."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import kronpress

ROOT = Path(kronpress.__file__).parent
# Each part of the package may import itself and what stands before it.
ORDER = (
    "errors",
    "version",
    "processes",
    "native",
    "matrices",
    "ways",
    "layers",
    "recipe",
    "weighting",
    "families",
    "surgery",
    "dispatch",
    "compiled",
    "folding",
    "rotation",
    "reduction",
    "allocation",
    "candidates",
    "plan",
    "planning",
    "spectrum",
    "rivals",
    "tokens",
    "evaluation",
    "calibration",
    "harness",
    "healing",
    "model_card",
    "checkpoint",
    "layout",
    "export",
    "benchmark",
    "compression",
    "weight_files",
    "streaming",
    "chat",
    "doctor",
    "report",
    "reporting",
    "hub",
    "pipeline",
    "cli",
    "__init__",
    "__main__",
)
# Imports from outside that only some parts may have.
ONLY_IN = {
    "transformers.quantizers": {"checkpoint"},
    "typer": {"cli"},
    "click": {"cli"},
    "lm_eval": {"harness"},
    **{name: {"export"} for name in ("onnx", "onnxruntime", "onnxscript")},
}
# Packages of optional extras, and what is slow to import and seldom needed: imported where they are used.
OPTIONAL = {"lm_eval", "matplotlib", "onnx", "onnxruntime", "onnxscript", "plotly", "torchao"}
NOT_IN = {"transformers": {"errors", "version", "matrices", "layers", "recipe", "families"}}
SOURCES = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}


def part_of(path: Path) -> str:
    """`matrices` for matrices/kronecker.py, `planning` for planning.py."""
    return path.parts[0].removesuffix(".py")


def imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement brings in; of `from a import b`, a.b."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            return [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def imports() -> Iterator[tuple[Path, str]]:
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            for name in imported(node):
                yield path, name


def part_imported(name: str) -> str:
    """The part of the package that `kronpress.<part>…` names; names of the package itself live in `__init__`."""
    second = [*name.split("."), ""][1]
    return second if second in ORDER else "__init__"


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield path, node


def test_every_part_has_its_place_in_the_order() -> None:
    assert {part_of(path) for path in SOURCES} == set(ORDER)


def test_imports_go_one_way() -> None:
    allowed = {part: ORDER[: ORDER.index(part) + 1] for part in ORDER}
    wrong = [
        f"{path} imports {name}"
        for path, name in imports()
        if name.split(".")[0] == "kronpress" and part_imported(name) not in allowed[part_of(path)]
    ]
    assert wrong == []


def test_imports_are_absolute_and_at_the_top() -> None:
    relative = [f"{path} imports {name}" for path, name in imports() if name.startswith(".")]
    assert relative == []
    inside = [
        f"{path}:{node.lineno}"
        for path, tree in SOURCES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and not {name.split(".")[0] for name in imported(node)} <= OPTIONAL
    ]
    assert inside == []


def test_outside_packages_stay_where_they_belong() -> None:
    def within(name: str, package: str) -> bool:
        return f"{name}.".startswith(f"{package}.")

    wrong = [
        f"{path} imports {name}"
        for path, name in imports()
        if any(within(name, package) and part_of(path) not in parts for package, parts in ONLY_IN.items())
        or any(within(name, package) and part_of(path) in parts for package, parts in NOT_IN.items())
    ]
    assert wrong == []


def test_only_the_command_line_prints() -> None:
    printing = {path for path, call in calls() if isinstance(call.func, ast.Name) and call.func.id == "print"}
    standard_output = {
        path
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in {"stdout", "stderr"} and ast.unparse(node.value) == "sys"
    }
    assert {part_of(path) for path in printing | standard_output} <= {"cli"}


def test_no_kronecker_product_is_formed_and_nothing_is_unpickled() -> None:
    used = {
        f"{path}: {node.attr}"
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "kron" and path != Path("benchmark/rivals.py")
    }
    brought_in = {
        f"{path}: {name}" for path, name in imports() if name.split(".")[-1] == "kron" or name.split(".")[0] == "pickle"
    }
    loads = {f"{path}: torch.load" for path, call in calls() if ast.unparse(call.func) == "torch.load"}
    assert used | brought_in | loads == set()
