"""What every table and figure is written with: CSV, JSON and PNG under --out, a printed table, one JSON line.

A row is a flat dict of what was varied and what was measured; `spread` turns repeated measurements into a median with
its 20 and 80 percentiles. The JSON names machine, versions, commit and options, so that a file explains itself.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]

# The paper's device table (iPhone 15 Pro Max, A17 Pro; T = 256, batch 1, rank 8, means of 10 steps), printed beside
# ours: LoRA parameters, seconds a step and MB of MeZO and MeBP.
PAPER: dict[str, dict[str, float]] = {
    "qwen2.5-0.5b": {"lora": 4_399_104, "mezo_s": 2.68, "mebp_s": 3.85, "mezo_mb": 319, "mebp_mb": 320},
    "qwen2.5-1.5b": {"lora": 9_232_384, "mezo_s": 5.47, "mebp_s": 9.09, "mezo_mb": 452, "mebp_mb": 460},
    "qwen2.5-3b": {"lora": 14_966_784, "mezo_s": 10.28, "mebp_s": 17.96, "mezo_mb": 554, "mebp_mb": 662},
    "gemma3-1b": {"lora": 6_522_880, "mezo_s": 4.88, "mebp_s": 9.48, "mezo_mb": 564, "mebp_mb": 569},
    "gemma3-4b": {"lora": 14_901_248, "mezo_s": 16.86, "mebp_s": 28.58, "mezo_mb": 962, "mebp_mb": 1029},
}
# MeBP at 0.5B by sequence length, from an independent re-measurement.
PAPER_BY_LENGTH_MB = {128: 253, 256: 361, 512: 582, 1024: 1050}


class Parser(argparse.ArgumentParser):
    """The command line of bench NAME. A wrong option ends the process with one line on stderr and exit code 2."""

    def __init__(self, name: str, doc: str | None):
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python -m bench.{name}", description=doc, formatter_class=how)

    def error(self, message: str) -> NoReturn:
        refuse(message)


def parser(name: str, doc: str | None) -> Parser:
    """The command line of a bench that writes files: --out and --quick."""
    found = Parser(name, doc)
    found.add_argument("--out", type=Path, help="folder for CSV, JSON and PNG (default: nothing is written)")
    found.add_argument("--quick", action="store_true", help="small sizes: minutes on 2 cores")
    return found


def model_of(shape: str, models: Path, layers: int | None = None) -> Path:
    """The folder in `models` of a random model of a shape, cut to `layers` blocks (bench/synth.py); made if missing."""
    from mebp_mlx.testing.synth import write_model

    folder = models / (shape if layers is None else f"{shape}-{layers}")
    if not (folder / "config.json").exists():
        write_model(shape, folder, layers=layers)
    return folder


def positive(text: str) -> int:
    """argparse's type of a number of steps, tokens, rounds, seeds."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


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
    """Columns as wide as what is in them; numbers to the right."""
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


def context(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, commit and options."""
    from mebp_mlx.system.machine import machine

    shown = {name: _without_folder(value) for name, value in vars(options).items()}
    return {"machine": machine(), "commit": _commit(), "options": shown}


def _without_folder(value: Any) -> Any:
    """The last part of a path: where a user's folders are is nobody's business."""
    if isinstance(value, Path) or (isinstance(value, str) and os.path.isabs(value)):
        return Path(value).name
    return value


def _commit() -> str | None:
    """The checkout's commit, with a + where files have changed since; None outside a checkout."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def machine_label(about: dict[str, Any]) -> str:
    """One line for a picture's corner: chip, cores, system, MLX, BLAS."""
    machine = about["machine"]
    system = f"{machine['cores']} cores, {machine['os'].split()[0]}"
    return f"{machine['chip']}, {system}, MLX {machine['mlx']}, {machine['blas']}"


def write(name: str, options: argparse.Namespace, rows: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Writes NAME.csv and NAME.json under --out, prints the JSON line, and returns what it holds."""
    found = {"bench": name, **context(options), **more, "rows": list(rows)}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        flat = [_flat(row) for row in rows]
        columns = list(dict.fromkeys(key for row in flat for key in row))
        with open(options.out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(flat)
        (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return found


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def pyplot() -> Any:
    """matplotlib's pyplot for files alone; None, and one line, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: matplotlib is not installed (pip install "mebp_mlx[bench]")', file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 150, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    return plt


def save_picture(plt: Any, figure: Any, path: Path, about: dict[str, Any], note: str = "") -> None:
    """Writes a PNG with the machine's line under it."""
    label = machine_label(about) + (f"; {note}" if note else "")
    figure.text(0.01, 0.005, label, fontsize=6, color="0.4", ha="left", va="bottom")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"picture    {path}", file=sys.stderr)


def run_module(module: str, *arguments: object) -> dict[str, Any]:
    """Runs `python -m module` in a process of its own; the JSON object on its last line. Its stderr is passed on.

    Ends this process with the same exit code if it fails: it has said why.
    """
    command = [sys.executable, "-m", module, *(str(argument) for argument in arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        print(f"error: python -m {module} failed with exit code {run.returncode}", file=sys.stderr)
        raise SystemExit(abs(run.returncode))
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def refuse(error: object) -> NoReturn:
    """Ends the process for a user's mistake: one line on stderr, exit code 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(2)


def run(main: Callable[[], object]) -> NoReturn:
    """Runs a bench's `main` and ends the process: 0, or the exit code that it returns; 2 for a user's mistake."""
    from mebp_mlx.errors import UserError

    try:
        code = main()
    except UserError as error:
        refuse(error)
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)
