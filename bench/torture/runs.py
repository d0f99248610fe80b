"""Runs that are stopped in every way and then resumed: the end must be the uninterrupted run's, bit for bit."""

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
# They save and end with this code: a line says that the step is finished first, one what is saved.
_STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@dataclass
class Ended:
    """How a process ended: its exit code, the lines on stderr, and how long it ran."""

    code: int
    errors: list[str]
    seconds: float

    @property
    def is_clear(self) -> bool:
        """Whether it says at most one line, and is no crash of Python's."""
        return len(self.errors) <= 1 and self.code != 1


@dataclass
class Arena:
    """Where runs are tortured: a model with its data, and for each variant what an uninterrupted run leaves."""

    folder: Path
    model: Path
    data: Path
    whole: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    points: dict[str, tuple[int, int]] = field(default_factory=dict)  # flushes and renames, writes of a whole run

    def prepare(self, variant: str) -> None:
        """Trains without a stop."""
        out, count = self.folder / f"whole {variant}", self.folder / "count.json"
        self.end(self.start(variant, out))  # fills the cache of tokens
        shutil.rmtree(out)
        ended = self.end(self.start(variant, out, {"count": str(count)}))
        if ended.code:
            raise RuntimeError(f"the uninterrupted run of {variant} failed: {ended.errors}")
        self.whole[variant], self.seconds[variant] = out, ended.seconds
        n_points, n_writes = json.loads(count.read_text())
        self.points[variant] = (n_points, n_writes)

    def start(self, variant: str, out: Path, plan: dict[str, Any] | None = None) -> subprocess.Popen[str]:
        """A run in `out`: resumed, if something is saved there."""
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
        """Waits for a run; a hang is killed and has code None's stand-in, -9 and a line that says so."""
        began_s = time.perf_counter()
        try:
            _, err = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Ended(1, ["hangs"], _TIMEOUT_S)
        return Ended(process.returncode, [line for line in err.splitlines() if line], time.perf_counter() - began_s)

    def fresh(self) -> Path:
        """A folder that is not there."""
        out = self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        return out

    def finish(self, variant: str, out: Path) -> str | None:
        """Resumes to the end; what is wrong with the result, or None."""
        ended = self.end(self.start(variant, out))
        if ended.code or ended.errors:
            return f"does not resume: exit code {ended.code}: {' | '.join(ended.errors[-1:])}"
        return difference(self.whole[variant], out)


def difference(whole: Path, out: Path) -> str | None:
    """What differs between the results of two runs; None if nothing does. Logs and run.json have times in them."""
    names = {path.name for path in whole.iterdir()}
    if names != (there := {path.name for path in out.iterdir()}):
        return f"other files: {', '.join(sorted(names ^ there))}"
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


# Tortures: each yields what is wrong with a trial, or None


def random_kills(arena: Arena, n_trials: int, seed: int) -> Iterator[str | None]:
    """kill -9 at random moments, the first run and once more its resumption."""
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
    """kill -9 before each flush and rename of a run by turn."""
    for number in range(1, arena.points[variant][0] + 1, every):
        out = arena.fresh()
        ended = arena.end(arena.start(variant, out, {"kill": number}))
        wrong = None if ended.code == -signal.SIGKILL else f"was not killed: {ended}"
        yield _told(wrong or arena.finish(variant, out), f"{variant}, point {number}")


def full_disks(arena: Arena, variant: str, every: int = 1) -> Iterator[str | None]:
    """The disk is full from the n-th write on, for every n: one line, exit code 2, and the run goes on later."""
    for number in range(1, arena.points[variant][1] + 1, every):
        out = arena.fresh()
        ended = arena.end(arena.start(variant, out, {"full": number}))
        is_told = ended.code == 2 and len(ended.errors) == 1 and "No space left on device" in ended.errors[0]
        wrong = None if is_told else f"exit code {ended.code}: {' | '.join(ended.errors[-2:])}"
        yield _told(wrong or arena.finish(variant, out), f"{variant}, write {number}")


def signals(arena: Arena, variant: str, seed: int) -> Iterator[str | None]:
    """Every signal that ends a process, at a random moment."""
    rng = random.Random(seed)
    kept = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT}  # they stop, not end
    for number in sorted(signal.valid_signals() - kept):
        if number >= getattr(signal, "SIGRTMIN", 32):
            continue
        out = arena.fresh()
        process = arena.start(variant, out)
        while process.poll() is None and not (out / "run.json").exists():
            time.sleep(0.01)  # while Python still imports, it answers Ctrl-C by itself
        time.sleep(rng.uniform(0, 0.5) * arena.seconds[variant])
        process.send_signal(number)
        ended = arena.end(process)
        codes, n_lines = {0, -number, _STOPS.get(signal.Signals(number), 0)}, 1 + (number in _STOPS)
        is_told = ended.code in codes and len(ended.errors) <= n_lines
        wrong = None if is_told else f"exit code {ended.code}: {ended.errors[-2:]}"
        yield _told(wrong or arena.finish(variant, out), signal.Signals(number).name)


def two_runs(arena: Arena, variant: str, n_trials: int) -> Iterator[str | None]:
    """Two runs on one folder at once: one trains, the other is refused by one line."""
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
    """A real disk that is too small (a tmpfs, as root), then a larger one."""
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
