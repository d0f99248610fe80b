"""Kills and interrupts runs, fills their disks at every point, and damages files in every way.

Each torture gives a row: number of trials, number of failures, and the first failure. Takes minutes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.torture import flat, mutants, runs
from mebp_mlx import bundled

TORTURES = ("kill", "save-points", "full-disk", "small-disk", "signals", "two-runs", "flat", "mutants")


def main(argv: Sequence[str] | None = None) -> int:
    """Tortures runs and files: kill -9 at random moments and at every flush and rename of a save, every signal, a disk
    that is full at every write, two runs in one folder, and mutants of every input file.

    After --resume, every stopped run must be bit-equal to an uninterrupted one; every mutant must be read or refused in
    one line. The exit code is 1 if a trial failed.
    """
    parser = report.parser("torture", main.__doc__)
    parser.add_argument("--only", nargs="+", choices=TORTURES, default=TORTURES, help="run only these")
    parser.add_argument("--trials", type=report.positive, default=100, help="number of random kills (default: 100)")
    parser.add_argument(
        "--mutants", type=report.positive, default=1000, help="mutants per kind of file (default: 1000)"
    )
    shown = "steps of the runs whose memory must not grow (default: 5000)"
    parser.add_argument("--steps", type=report.positive, default=5000, help=shown)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.quick:
        options.trials, options.mutants = min(options.trials, 4), min(options.mutants, 50)
        options.steps = min(options.steps, 500)
    every = 9 if options.quick else 1
    with tempfile.TemporaryDirectory(prefix="mebp-torture-") as folder:
        rows = list(_tortured(Path(folder), options, every))
    print(report.table(["torture", "trials", "failed", "s", "first failure"], [list(row.values()) for row in rows]))
    report.publish("torture", options, rows)
    return 1 if any(row["n_failed"] for row in rows) else 0


def _tortured(folder: Path, options: Any, every: int) -> Iterable[dict[str, Any]]:
    arena = runs.Arena(folder, bundled.MODEL_DIR, bundled.DATA_DIR)
    first = next(iter(runs.VARIANTS))
    if set(options.only) - {"flat", "mutants"}:
        for variant in runs.VARIANTS if "kill" in options.only or "save-points" in options.only else (first,):
            arena.prepare(variant)
    trials: dict[str, Callable[[], Iterable[str | None]]] = {
        "kill": lambda: runs.random_kills(arena, options.trials, options.seed),
        "save-points": lambda: (
            wrong for variant in list(runs.VARIANTS)[:2] for wrong in runs.save_points(arena, variant, every)
        ),
        # About a hundred of the writes: most of the thousand are pieces of one array.
        "full-disk": lambda: runs.full_disks(arena, first, every * max(1, arena.points[first][1] // 100)),
        "small-disk": lambda: runs.small_disk(arena, first, (300, 800, 1500, 3000)),
        "signals": lambda: runs.signals(arena, first, options.seed),
        "two-runs": lambda: runs.two_runs(arena, first, 2 if options.quick else 10),
    }
    for name, torture in trials.items():
        if name in options.only:
            yield _row(name, torture())
    if "flat" in options.only:
        mutants.in_child(flat.write_tiny, folder / "flat" / "model")
        yield _row("flat", flat.trials(folder / "flat", options.steps))
    if "mutants" in options.only:
        for kind in mutants.KINDS:
            yield _row(f"mutants: {kind}", mutants.trials(kind, folder / "mutants", options.mutants, options.seed))


def _row(name: str, trials: Iterable[str | None]) -> dict[str, Any]:
    began_s, results = time.perf_counter(), []
    for number, wrong in enumerate(trials, 1):
        results.append(wrong)
        if wrong is not None:
            print(f"{name} {number}: {wrong}", file=sys.stderr, flush=True)
    failures = [wrong for wrong in results if wrong is not None]
    seconds = round(time.perf_counter() - began_s, 1)
    print(f"{name}: {len(results)} trials, {len(failures)} failed, {seconds} s", file=sys.stderr, flush=True)
    first = failures[0] if failures else ""
    return {"torture": name, "n_trials": len(results), "n_failed": len(failures), "seconds": seconds, "first": first}


if __name__ == "__main__":
    report.run(main)
