"""Stops runs in every way and resumes them: the result must equal the uninterrupted run's, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.report import ROOT
from mebp_mlx.weights.safetensors import MappedWeights

_COMMON = [
    *("--batch-size", "2", "--iters", "12", "--learning-rate", "0.01", "--rank", "4", "--max-seq-length", "64"),
    *("--steps-per-report", "2", "--steps-per-eval", "4", "--val-batches", "1", "--save-every", "4", "--test"),
    *("--grad-accumulation-steps", "2", "--dropout", "0.1", "--warmup", "2", "--lr-decay", "cosine"),
    *("--max-grad-norm", "1", "--test-batches", "1"),
]
# Two optimizers; kept values and optimizer state in memory, and in a file (`min`).
VARIANTS = {
    "adam, memory": ["--optimizer", "adam", "--memory-budget", "1GB"],
    "adam, file": ["--optimizer", "adam", "--memory-budget", "min"],
    "lion, memory": ["--optimizer", "lion", "--memory-budget", "1GB"],
    "lion, file": ["--optimizer", "lion", "--memory-budget", "min"],
}
_TIMEOUT_S = 120
# Signals after which a run saves and ends with this code; one line announces the end, another reports the save.
_STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@dataclass
class Ended:
    """The end of a process: its exit code, the lines on stderr, and the seconds it ran."""

    code: int
    errors: list[str]
    seconds: float

    @property
    def is_clear(self) -> bool:
        """Whether it printed at most one line and did not end with a traceback."""
        return len(self.errors) <= 1 and self.code != 1


@dataclass
class Arena:
    """A folder for tortured runs, with a model and data, and the results of an uninterrupted run of each variant."""

    folder: Path
    model: Path
    data: Path
    whole: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    points: dict[str, tuple[int, int]] = field(default_factory=dict)  # (flushes and renames, writes) of a whole run

    def prepare(self, variant: str) -> None:
        """Runs a variant without interruption."""
        out, count = self.folder / f"whole {variant}", self.folder / "count.json"
        self.end(self.start(variant, out))  # fills the token cache
        shutil.rmtree(out)
        ended = self.end(self.start(variant, out, {"count": str(count)}))
        if ended.code:
            raise RuntimeError(f"the uninterrupted run of {variant} failed: {ended.errors}")
        self.whole[variant], self.seconds[variant] = out, ended.seconds
        n_points, n_writes = json.loads(count.read_text())
        self.points[variant] = (n_points, n_writes)

    def start(self, variant: str, out: Path, plan: dict[str, Any] | None = None) -> subprocess.Popen[str]:
        """Starts a run in `out`; resumes it if `out` contains a save."""
        more = ["--resume"] if (out / "checkpoint.safetensors").exists() else []
        paths = ["--model", str(self.model), "--data", str(self.data), "--adapter-path", str(out)]
        command = ["bench.torture.faults", json.dumps(plan or {}), *paths, *_COMMON, *VARIANTS[variant], *more]
        environment = {**os.environ, "MEBP_CACHE_DIR": str(self.folder / "cache"), "PYTHONPATH": str(ROOT)}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def end(self, process: subprocess.Popen[str]) -> Ended:
        """Waits for a run. A run that hangs is killed and reported with exit code 1 and the line "hangs"."""
        began_s = time.perf_counter()
        try:
            _, err = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Ended(1, ["hangs"], _TIMEOUT_S)
        return Ended(process.returncode, [line for line in err.splitlines() if line], time.perf_counter() - began_s)

    def fresh(self) -> Path:
        """A path where no folder exists."""
        out = self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        return out

    def finish(self, variant: str, out: Path) -> str | None:
        """Resumes the run to its end; returns the fault of the result, or None."""
        ended = self.end(self.start(variant, out))
        if ended.code or ended.errors:
            return f"does not resume: exit code {ended.code}: {' | '.join(ended.errors[-1:])}"
        return difference(self.whole[variant], out)


def difference(whole: Path, out: Path) -> str | None:
    """The difference between the results of two runs, or None; times in logs and run.json may differ."""
    names = {path.name for path in whole.iterdir()}
    if names != (there := {path.name for path in out.iterdir()}):
        return f"different files: {', '.join(sorted(names ^ there))}"
    for name in sorted(names - {"log.jsonl", "run.json", "checkpoint.safetensors"}):
        if (whole / name).is_file() and (whole / name).read_bytes() != (out / name).read_bytes():
            return f"{name} differs"
    ours, theirs = (MappedWeights(folder / "checkpoint.safetensors") for folder in (out, whole))
    if ours.names != theirs.names or any(ours.view(n).tobytes() != theirs.view(n).tobytes() for n in ours.names):
        return "checkpoint.safetensors differs"
    return None if _events(whole) <= _events(out) else "log.jsonl lacks events"  # a stopped run saves more often


def _events(out: Path) -> set[tuple[str, int]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {(e["event"], e["iter"]) for e in entries if e["event"] in ("valid", "test", "save", "end")}


# Tortures: each yields the fault of a trial, or None


def random_kills(arena: Arena, n_trials: int, seed: int) -> Iterator[str | None]:
    """kill -9 at random moments: first the run, then its resumption."""
    rng = random.Random(seed)
    for trial in range(n_trials):
        variant, out = list(VARIANTS)[trial % len(VARIANTS)], arena.fresh()
        for _ in range(2):
            process = arena.start(variant, out)
            time.sleep(rng.uniform(0.1, arena.seconds[variant]))
            process.kill()
            arena.end(process)
        yield _told(arena.finish(variant, out), variant)


def save_points(arena: Arena, variant: str, every: int = 1) -> Iterator[str | None]:
    """kill -9 before each flush and rename, one per run."""
    for number in range(1, arena.points[variant][0] + 1, every):
        out = arena.fresh()
        ended = arena.end(arena.start(variant, out, {"kill": number}))
        wrong = None if ended.code == -signal.SIGKILL else f"was not killed: {ended}"
        yield _told(wrong or arena.finish(variant, out), f"{variant}, point {number}")


def full_disks(arena: Arena, variant: str, every: int = 1) -> Iterator[str | None]:
    """The disk is full from the n-th write on, for every n: one line, exit code 2, and the run can be resumed."""
    for number in range(1, arena.points[variant][1] + 1, every):
        out = arena.fresh()
        ended = arena.end(arena.start(variant, out, {"full": number}))
        is_told = ended.code == 2 and len(ended.errors) == 1 and "No space left on device" in ended.errors[0]
        wrong = None if is_told else f"exit code {ended.code}: {' | '.join(ended.errors[-2:])}"
        yield _told(wrong or arena.finish(variant, out), f"{variant}, write {number}")


def signals(arena: Arena, variant: str, seed: int) -> Iterator[str | None]:
    """Every signal that ends a process, at a random moment."""
    rng = random.Random(seed)
    kept = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT}  # they do not end a process
    for number in sorted(signal.valid_signals() - kept):
        if number >= getattr(signal, "SIGRTMIN", 32):
            continue
        out = arena.fresh()
        process = arena.start(variant, out)
        while process.poll() is None and not (out / "run.json").exists():
            time.sleep(0.01)  # during imports Python itself handles Ctrl-C
        time.sleep(rng.uniform(0, 0.5) * arena.seconds[variant])
        process.send_signal(number)
        ended = arena.end(process)
        codes, n_lines = {0, -number, _STOPS.get(signal.Signals(number), 0)}, 1 + (number in _STOPS)
        is_told = ended.code in codes and len(ended.errors) <= n_lines
        wrong = None if is_told else f"exit code {ended.code}: {ended.errors[-2:]}"
        yield _told(wrong or arena.finish(variant, out), signal.Signals(number).name)


def two_runs(arena: Arena, variant: str, n_trials: int) -> Iterator[str | None]:
    """Two runs in one folder at the same time: one trains, the other is refused in one line."""
    for trial in range(n_trials):
        out = arena.fresh()
        first = arena.start(variant, out)
        time.sleep(trial * 0.1)
        second = arena.start(variant, out)
        ends = [arena.end(process) for process in (first, second)]
        is_right = sorted(end.code for end in ends) in ([0, 2], [0, 0]) and all(end.is_clear for end in ends)
        wrong = None if is_right else f"{[(end.code, end.errors[-1:]) for end in ends]}"
        yield _told(wrong or arena.finish(variant, out), variant)


def small_disk(arena: Arena, variant: str, sizes_kb: tuple[int, ...]) -> Iterator[str | None]:
    """A real disk (tmpfs, needs root) that is too small, and is then enlarged."""
    for size_kb in sizes_kb:
        mount = arena.folder / "disk"
        mount.mkdir(exist_ok=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "none", mount], capture_output=True)
        if made.returncode:
            return
        try:
            ended = arena.end(arena.start(variant, mount / "run"))
            is_told = ended.code == 2 and len(ended.errors) == 1
            subprocess.run(["mount", "-o", "remount,size=64m", mount], check=True)
            wrong = None if is_told else f"exit code {ended.code}: {' | '.join(ended.errors[-2:])}"
            yield _told(wrong or arena.finish(variant, mount / "run"), f"{variant}, {size_kb} KB")
        finally:
            subprocess.run(["umount", mount], check=True)


def _told(wrong: str | None, where: str) -> str | None:
    return None if wrong is None else f"{where}: {wrong}"
