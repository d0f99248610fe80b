"""The rooms' order: a module imports from its own room and from rooms below it."""

from __future__ import annotations

import ast
from pathlib import Path

import mebp_mlx

# From the top. Modules on the top floor that are no room (train, convert, api ...) stand above all of these.
ORDER = [
    "training", "generation", "export", "data", "planner", "engine", "families", "ops", "model", "kernels", "weights",
    "system",
]  # fmt: skip
FREE = {"errors", "bundled"}  # import nothing above them, and serve everybody
COMMAND = {"config", "options"}  # a run's options, for training alone
ROOT = Path(mebp_mlx.__file__).parent


def _imported(file: Path, package: list[str]) -> set[str]:
    """The rooms that a file imports from, by name."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = [*base, *(node.module or "").split(".")] if node.module else base
            if path[:1] == ["mebp_mlx"]:
                rooms |= {path[1]} if len(path) > 1 else {alias.name for alias in node.names}
    return rooms


def test_no_import_points_up() -> None:
    files = [(file, file.relative_to(ROOT).parts[0]) for file in [ROOT / "errors.py", *ROOT.glob("*/**/*.py")]]
    files = [(file, room) for file, room in files if file.name != "__main__.py"]  # a command, as those on the top floor
    files += [(file, "kernels") for file in (ROOT.parent / "kernels").glob("*.py")]
    up = []
    for file, room in files:
        room = room.removesuffix(".py")
        if room in ORDER or room in FREE:
            below = set(ORDER[ORDER.index(room) :] if room in ORDER else ()) | FREE
            below |= COMMAND if room == "training" else set()
            package = ["mebp_mlx", room] if file.parent != ROOT else ["mebp_mlx"]
            up += [f"{room}/{file.name} -> {target}" for target in sorted(_imported(file, package) - below)]
    assert not up
