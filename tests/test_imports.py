"""The order of the layers: a module imports from its own layer and from lower ones; the length of functions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mebp_mlx

pytestmark = pytest.mark.quick

# From the top. Modules directly in the package (train, convert, api ...) are above all of these.
ORDER = [
    "testing", "training", "generation", "export", "data", "planner", "engine", "families", "ops", "model", "kernels",
    "weights", "system",
]  # fmt: skip
FREE = {"errors", "bundled", "version"}  # may be imported by every layer, and import nothing above them
COMMAND = {"config", "options"}  # a run's options, only for training
ROOT = Path(mebp_mlx.__file__).parent


def _imported(file: Path, package: list[str]) -> set[str]:
    """The names of the layers that a file imports from."""
    layers = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            layers |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "mebp_mlx"}
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = [*base, *(node.module or "").split(".")] if node.module else base
            if path[:1] == ["mebp_mlx"]:
                layers |= {path[1]} if len(path) > 1 else {alias.name for alias in node.names}
    return layers


def test_no_import_points_up() -> None:
    files = [(file, file.relative_to(ROOT).parts[0]) for file in [ROOT / "errors.py", *ROOT.glob("*/**/*.py")]]
    files = [
        (file, layer) for file, layer in files if file.name != "__main__.py"
    ]  # a command, like the modules directly in the package
    files += [(file, "kernels") for file in (ROOT.parent / "kernels").glob("*.py")]
    up = []
    for file, layer in files:
        layer = layer.removesuffix(".py")
        if layer in ORDER or layer in FREE:
            below = set(ORDER[ORDER.index(layer) :] if layer in ORDER else ()) | FREE
            below |= COMMAND if layer == "training" else set()
            package = ["mebp_mlx", layer] if file.parent != ROOT else ["mebp_mlx"]
            up += [f"{layer}/{file.name} -> {target}" for target in sorted(_imported(file, package) - below)]
    assert not up


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports that are only for types count too; a package's __init__ stands for the names that it exports."""
    files = {"mebp_mlx." + ".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in ROOT.glob("**/*.py")}
    files |= {f"mebp_mlx.kernels.{f.stem}": f for f in (ROOT.parent / "kernels").glob("*.py")}
    edges = {name: _modules(name, file, files) for name, file in files.items()}
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, [*way[way.index(name) :], name]
        if name not in done:
            for target in edges[name]:
                visit(target, [*way, name])
            done.add(name)

    for name in files:
        visit(name, [])


def _modules(name: str, file: Path, files: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports."""
    modules = set()
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("mebp_mlx")):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            for alias in node.names:
                candidates = (f"{path}.{alias.name}", f"{path}.{alias.name}.__init__", path, f"{path}.__init__")
                modules |= {next((known for known in candidates if known in files), name)} - {name}
    return modules


def test_only_tests_and_benches_import_testing() -> None:
    files = [(file, list(file.relative_to(ROOT.parent).parts[:-1])) for file in ROOT.rglob("*.py")]
    files += [(file, ["mebp_mlx", "kernels"]) for file in (ROOT.parent / "kernels").glob("*.py")]
    importing = [file for file, package in files if "testing" in _imported(file, package) and "testing" not in package]
    assert not importing


def test_bench_and_tests_do_not_import_each_other() -> None:
    """Except for the tests of bench itself."""

    def importing(folder: str, name: str) -> set[str]:
        files = (Path(__file__).parents[1] / folder).rglob("*.py")
        return {file.name for file in files if re.search(rf"^\s*(from|import) {name}\b", file.read_text("utf-8"), re.M)}

    assert not importing("bench", "tests")
    assert importing("tests", "bench") <= {
        "test_bench.py",
        "test_dispatch.py",
        "test_bundled.py",
        "test_flags.py",
        "test_torture.py",
    }


def test_no_function_is_longer_than_60_lines() -> None:
    """Ruff checks the other limits: complexity 15, seven parameters (pyproject.toml)."""
    long = []
    for folder in (ROOT, ROOT.parent / "kernels", ROOT.parent / "bench"):
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                    n_lines = node.end_lineno - node.lineno + 1
                    long += [f"{file.name}: {node.name} has {n_lines} lines"] if n_lines > 60 else []
    assert not long
