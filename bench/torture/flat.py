"""Thousands of steps of a tiny model, with evaluations, saves and a resume: anything that grows is a leak."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.report import ROOT
from mebp_mlx import bundled

MAX_GROWTH_BYTES = 100  # per step
# Until then the C heap finds room for rows of every length: half a megabyte in 2,000 steps, then 10 bytes per step
# (10,000 steps with evaluations and saves). Growth is judged after as many steps again.
_SETTLED_STEPS = 2000


def write_tiny(folder: Path) -> None:
    """Writes a model of two layers with the bundled tokenizer."""
    from mebp_mlx.testing.tiny import CONFIGS, write_model

    vocab_size = json.loads((bundled.MODEL_DIR / "config.json").read_text())["vocab_size"]
    write_model(folder, CONFIGS["llama"] | {"vocab_size": vocab_size, "num_hidden_layers": 2})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.MODEL_DIR / name, folder)


def trials(folder: Path, n_steps: int) -> Iterator[str | None]:
    """Steps on rows of all lengths; then as many with evaluations and saves; then as many more, resumed."""
    bare = ["--save-every", str(n_steps), "--val-batches", "0"]
    busy = ["--save-every", str(n_steps // 10), "--steps-per-eval", str(n_steps // 10), "--val-batches", "2"]
    yield _grown(_trained(folder, folder / "bare", n_steps, bare), "steps only")
    yield _grown(_trained(folder, folder / "busy", n_steps, busy), "with evaluations and saves")
    yield _grown(_trained(folder, folder / "busy", 2 * n_steps, [*busy, "--resume"])[1:], "resumed")


def _trained(folder: Path, out: Path, n_steps: int, more: list[str]) -> list[dict[str, Any]]:
    """A run's samples: iteration, footprint_bytes, and the numbers of open files and threads."""
    options = {"--model": folder / "model", "--data": bundled.DATA_DIR, "--adapter-path": out, "--iters": n_steps}
    options |= {"--batch-size": 1, "--rank": 2, "--max-seq-length": 96, "--steps-per-report": max(1, n_steps // 100)}
    command = [str(part) for pair in options.items() for part in pair]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEBP_CACHE_DIR": str(folder / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mebp_mlx.train", *command, *more], stdout=subprocess.DEVNULL, env=environment
    )
    samples: list[dict[str, Any]] = []
    while process.poll() is None:
        time.sleep(0.2)
        handles, log = Path(f"/proc/{process.pid}"), out / "log.jsonl"
        if log.exists() and (
            reports := [line for line in log.read_bytes().splitlines() if b'"event": "train"' in line]
        ):
            report = json.loads(reports[-1])
            if samples and samples[-1]["iter"] == report["iter"]:
                continue
            try:
                counts = {
                    name: len(list((handles / part).iterdir())) for name, part in (("files", "fd"), ("threads", "task"))
                }
            except OSError:  # the run has just ended, or the system has no /proc
                break
            if counts["files"]:  # no files: the run has ended and waits for poll()
                samples.append({"iter": report["iter"], "footprint_bytes": report["footprint_bytes"], **counts})
    if process.wait():
        raise RuntimeError(f"the run ended with exit code {process.returncode}")
    return samples


def _grown(samples: list[dict[str, Any]], what: str) -> str | None:
    """Describes the growth, or None if there is none. Prints the figures. A short run is judged by its descriptors and
    threads only.
    """
    if len(samples) < 10:
        return f"{what}: too few samples ({len(samples)}): more steps are needed"
    first, last = samples[0]["iter"], samples[-1]["iter"]
    begins = first + min(_SETTLED_STEPS, (last - first) // 2)
    settled = [sample for sample in samples if sample["iter"] >= begins]
    middle = len(settled) // 2
    early, late = (_mean(part) for part in (settled[:middle], settled[middle:]))
    growth = (late["footprint_bytes"] - early["footprint_bytes"]) / (late["iter"] - early["iter"])
    halves = (settled[:middle], settled[middle:])  # the minimum of each half, because a save briefly opens a file
    counts = {name: tuple(min(sample[name] for sample in half) for half in halves) for name in ("files", "threads")}
    text = f"{what}: {growth:+.0f} bytes per step; " + ", ".join(f"{n} {a} -> {b}" for n, (a, b) in counts.items())
    print(f"flat: {text}", file=sys.stderr, flush=True)
    grows = growth > MAX_GROWTH_BYTES and last - first >= 2 * _SETTLED_STEPS
    return text if grows or any(b > a for a, b in counts.values()) else None


def _mean(samples: list[dict[str, Any]]) -> dict[str, float]:
    return {name: sum(sample[name] for sample in samples) / len(samples) for name in ("iter", "footprint_bytes")}
