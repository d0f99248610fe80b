"""Shared fixtures."""

from __future__ import annotations

import fcntl
import os
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# One thread per process, also in children: the matrices are small, and threads that wait for each other take three
# times as long on a busy machine. The BLAS reads this when it is loaded.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import mebp_mlx  # noqa: E402, F401  (the BLAS must be loaded before mlx.core)

import mlx.core as mx  # noqa: E402  # isort: skip

# Every run uses the same examples, as with `seed` below.
_examples = "default" if os.environ.get("MEBP_TEST_SEED") == "fresh" else "same"
hypothesis.settings.register_profile("same", derandomize=True, database=None)
hypothesis.settings.load_profile(_examples)

# Bit-equality and float64 references need the CPU backend; MEBP_TEST_DEVICE=gpu runs the same tests on Metal.
mx.set_default_device(mx.gpu if os.environ.get("MEBP_TEST_DEVICE") == "gpu" else mx.cpu)


@pytest.fixture(autouse=True)
def _alone_or_with_others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Under pytest-xdist, tests marked `alone` run while the session's other processes are between two tests."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    folder = tmp_path_factory.getbasetemp().parent  # the session's
    with open(folder / "alone.lock", "w") as lock, open(folder / "queue.lock", "w") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)  # while a test waits to run alone, no other test starts
        fcntl.flock(lock, fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The test's seed, the same in every run; MEBP_TEST_SEED=N sets it, MEBP_TEST_SEED=fresh draws a new one."""
    chosen = os.environ.get("MEBP_TEST_SEED")
    if chosen == "fresh":
        value = secrets.randbelow(2**31)
    else:
        value = int(chosen) if chosen else zlib.crc32(request.node.nodeid.encode()) % 2**31
    print(f"MEBP_TEST_SEED={value}")  # shown if the test fails
    return value


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and data, for runs of the trainer."""
    from tests.runs import write_home

    return write_home(tmp_path_factory.mktemp("train"))


@pytest.fixture
def tokens_made_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizes in this process, because a child would import transformers again for every test."""
    from tests.runs import tokenize_here

    tokenize_here(home, monkeypatch)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table of Metal kernels and their checks, from the tests that passed."""
    counts: dict[tuple[str, str], int] = {}
    for report in terminalreporter.stats.get("passed", []):
        for key, value in getattr(report, "user_properties", []):
            if key == "kernel_check":
                counts[tuple(value)] = counts.get(tuple(value), 0) + 1
    if not counts:
        return
    where = "on Metal" if mx.metal.is_available() else "emulated, no Metal here"
    terminalreporter.write_sep("-", f"Metal kernels ({where})")
    for (kernel, kind), n_cases in sorted(counts.items()):
        terminalreporter.write_line(f"{kernel:<22} {kind:<28} {n_cases} passed")
