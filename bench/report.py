"""Shared by all benches: command lines, child processes, printed tables, and files (CSV, context, PNG) under --out.

A row is a dict of settings and measurements; `spread` turns repeated measurements into a median with the 20th and 80th
percentiles. NAME.csv holds the rows, NAME.json the context (machine, versions, command, date, settings), and NAME.png
the picture, which `python -m bench draw NAME --out DIR` redraws from the other two.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import inspect
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
Rows = Sequence[Mapping[str, Any]]

# The paper's device table (iPhone 15 Pro Max, A17 Pro; T = 256, batch 1, rank 8, means of 10 steps): LoRA parameters,
# seconds per step and peak MB of MeZO and MeBP.
PAPER: dict[str, dict[str, float]] = {
    "qwen2.5-0.5b": {"lora": 4_399_104, "mezo_s": 2.68, "mebp_s": 3.85, "mezo_mb": 319, "mebp_mb": 320},
    "qwen2.5-1.5b": {"lora": 9_232_384, "mezo_s": 5.47, "mebp_s": 9.09, "mezo_mb": 452, "mebp_mb": 460},
    "qwen2.5-3b": {"lora": 14_966_784, "mezo_s": 10.28, "mebp_s": 17.96, "mezo_mb": 554, "mebp_mb": 662},
    "gemma3-1b": {"lora": 6_522_880, "mezo_s": 4.88, "mebp_s": 9.48, "mezo_mb": 564, "mebp_mb": 569},
    "gemma3-4b": {"lora": 14_901_248, "mezo_s": 16.86, "mebp_s": 28.58, "mezo_mb": 962, "mebp_mb": 1029},
}
# MeBP at 0.5B by sequence length, from an independent re-measurement.
PAPER_BY_LENGTH_MB = {128: 253, 256: 361, 512: 582, 1024: 1050}


# ----------------------------------------------------------------------------------------------- command lines


class Parser(argparse.ArgumentParser):
    """The command line of bench `name`. A wrong option ends the process with one line on stderr and exit code 2.

    doc: a docstring, which --help shows.
    """

    def __init__(self, name: str, doc: str | None):
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python -m bench {name}", description=inspect.cleandoc(doc or ""), formatter_class=how)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options, and `command`: the command line, for the context file."""
        options = super().parse_args(args, namespace)
        options.command = shlex.join([*self.prog.split(), *map(_name_alone, sys.argv[1:] if args is None else args)])
        return options

    def error(self, message: str) -> NoReturn:
        refuse(message)


def parser(name: str, doc: str | None) -> Parser:
    """The command line of a bench that writes files: --out and --quick."""
    made = Parser(name, doc)
    made.add_argument("--out", type=Path, help="folder for CSV, JSON and PNG (default: none are written)")
    made.add_argument("--quick", action="store_true", help="small sizes: minutes on 2 cores")
    return made


def add_models(parser: argparse.ArgumentParser) -> None:
    """Adds --models, for benches on random weights."""
    parser.add_argument("--models", type=Path, help="keep the random models in this folder (default: a temporary one)")


def positive(text: str) -> int:
    """An argparse type: a number of steps, tokens, rounds or seeds, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


Bench = Callable[[Sequence[str]], object]


def pick(benches: Mapping[str, Bench], argv: Sequence[str] | None, default: str | None = None) -> object:
    """Runs the bench named by the first argument, or the default one, with the remaining arguments."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in benches:
        return benches[given[0]](given[1:])
    if default is None:
        refuse(f"name one of {', '.join(benches)}")
    return benches[default](given)


def run(main: Callable[[], object]) -> NoReturn:
    """Runs `main` and ends the process with its exit code (default 0), or with 2 after a UserError."""
    from mebp_mlx.errors import UserError

    try:
        code = main()
    except UserError as error:
        refuse(error)
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code if isinstance(code, int) else 0)


def refuse(error: object) -> NoReturn:
    """Ends the process with one line on stderr and exit code 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------- models, processes


def model_of(shape: str, models: Path, layers: int | None = None, *, sparse: bool = False) -> Path:
    """The folder in `models` of a shape's random model, cut to `layers` blocks; written if missing."""
    from mebp_mlx.testing.synth import model_config, write_model

    folder = models / (shape if layers is None else f"{shape}-{layers}")
    if not (folder / "config.json").exists():
        write_model(model_config(shape, layers), folder, sparse=sparse)
    return folder


def run_module(
    module: str, *arguments: object, may_fail: bool = False, timeout_s: float | None = None
) -> dict[str, Any]:
    """Runs `python -m module` in its own process and returns the JSON object on its last line; stderr is passed on.

    If it fails, this process ends with the same exit code or, with may_fail, returns {"error": its last line}. A
    process that runs longer than timeout_s is ended, and has failed.
    """
    command = [sys.executable, "-m", module, *(str(argument) for argument in arguments)]
    errors = subprocess.PIPE if may_fail else None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        if not may_fail:
            raise
        return {"error": f"not done after {timeout_s:.0f} s"}
    if done.returncode and may_fail:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    if done.returncode:
        if done.returncode not in (2, 130):  # the child has printed the reason
            print(f"error: python -m {module} failed with exit code {done.returncode}", file=sys.stderr)
        raise SystemExit(abs(done.returncode))
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ----------------------------------------------------------------------------------------------- numbers, tables


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """{"median", "p20", "p80"} of repeated measurements, by linear interpolation."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return round(ordered[low] + (place - low) * (ordered[high] - ordered[low]), digits)

    return {"median": at(0.5), "p20": at(0.2), "p80": at(0.8)}


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text columns; numbers are aligned on the right."""
    cells = [[str(head) for head in heads], *([_shown(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    numeric = [all(isinstance(row[column], (int, float, type(None))) for row in rows) for column in range(len(heads))]
    lines = []
    for row in cells:
        parts = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ----------------------------------------------------------------------------------------------- files


def publish(name: str, options: argparse.Namespace, rows: Rows, draw: Callable | None = None, **more: Any) -> None:
    """Writes NAME.csv, NAME.json and NAME.png under --out, and prints the rows with their context as one JSON line.

    draw(plt, rows, options) returns the figure and a note for its corner ("" for none). more: entries of the context.
    """
    about = {**context(name, options), **more}
    if options.out is not None:
        write(name, options.out, rows, about)
        if draw is not None:
            save_picture(draw, rows, options, options.out / f"{name}.png", about)
    print(json.dumps({**about, "rows": list(rows)}))


def write(name: str, folder: Path, rows: Rows, about: Mapping[str, Any]) -> None:
    """NAME.csv and NAME.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    (folder / f"{name}.json").write_text(_context_text(about), encoding="utf-8")


def context(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What NAME.json says of a measurement."""
    return {"bench": name, **_context(options)}


def _context(options: argparse.Namespace) -> dict[str, Any]:
    """Command, date, commit, machine and settings of a measurement."""
    from mebp_mlx.system.machine import machine

    settings = {name: value for name, value in vars(options).items() if name not in ("command", "out", "models")}
    return {
        "command": getattr(options, "command", None),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": machine(),
        "settings": {name: _name_alone(value) for name, value in settings.items()},
    }


def _context_text(about: Mapping[str, Any]) -> str:
    """JSON with one line per entry."""
    lines = []
    for name, value in about.items():
        text = json.dumps(value)
        if name == "machine":
            facts = [f"  {json.dumps(key)}: {json.dumps(fact)}" for key, fact in value.items()]
            text = "{\n" + ",\n".join(facts) + "\n }"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _name_alone(value: Any) -> Any:
    """The last part of an absolute path, so that the files do not reveal a user's folders."""
    if isinstance(value, Path) or (isinstance(value, str) and os.path.isabs(value)):
        return Path(value).name
    return value


def _commit() -> str | None:
    """The checkout's commit, with a + if files have changed since; None outside a checkout."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A CSV row: nested keys are joined by dots; values that are neither text nor numbers become JSON."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
            flat[prefix + key] = value if plain else json.dumps(value)
    return flat


def read(folder: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, context) of a result that `publish` wrote."""
    with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = [_nested(row) for row in csv.DictReader(file)]
    return rows, json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def _nested(flat: Mapping[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for path, text in flat.items():
        if text == "":
            continue
        *parents, key = path.split(".")
        inner = row
        for parent in parents:
            inner = inner.setdefault(parent, {})
        try:
            inner[key] = float(text) if text in ("inf", "nan") else json.loads(text)
        except ValueError:
            inner[key] = text
    return row


def draw_again(name: str, folder: Path, draw: Callable) -> None:
    """Redraws NAME.png in `folder` from its NAME.csv and NAME.json."""
    try:
        rows, about = read(folder, name)
    except FileNotFoundError as error:
        refuse(f"--out {folder}: {Path(error.filename).name} is missing")
    save_picture(draw, rows, argparse.Namespace(**about["settings"]), folder / f"{name}.png", about)


def save_picture(draw: Callable, rows: Rows, options: argparse.Namespace, path: Path, about: Mapping[str, Any]) -> None:
    """Writes a PNG with a line about the machine; without matplotlib it only prints a notice."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "mebp_mlx[bench]")', file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 150, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    figure, note = draw(plt, rows, options)
    label = machine_label(about) + (f"; {note}" if note else "")
    figure.text(0.01, 0.005, label, fontsize=6, color="0.4", ha="left", va="bottom")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path)
    plt.close(figure)
    print(f"picture    {path}", file=sys.stderr)


def machine_label(about: Mapping[str, Any]) -> str:
    """The line in a picture's corner: chip, cores, system, MLX, BLAS."""
    machine = about["machine"]
    system = f"{machine['cores']} cores, {machine['os'].split()[0]}"
    return f"{machine['chip']}, {system}, MLX {machine['mlx']}, {machine['blas']}"
