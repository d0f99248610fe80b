"""A short `python -m bench.torture`: stopped runs end like uninterrupted ones, and damaged files are refused."""

from __future__ import annotations

import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.torture import mutants, runs
from bench.torture.faults import Faults
from mebp_mlx import convert, fuse, train
from mebp_mlx.errors import UserError
from mebp_mlx.export import __main__ as export
from tests.runs import arguments, child, events, tokenize_here

OPTIONS = ["--iters", "4", "--save-every", "2", "--test", "--memory-budget", "min", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Faults]:
    """An uninterrupted run and its points."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch, Faults().installed() as faults:
        tokenize_here(home, patch)
        assert train.main(arguments(home, out, *OPTIONS, "--dry-run")) == 0  # fills the token cache
        faults.n_points = faults.n_writes = 0
        assert train.main(arguments(home, out, *OPTIONS)) == 0
    assert faults.n_points > 20 and faults.n_writes > 30
    return out, faults


def ends_the_same(home: Path, out: Path, whole: Path) -> None:
    more = ["--resume"] if (out / "checkpoint.safetensors").exists() else []
    assert train.main([*arguments(home, out, *OPTIONS), *more]) == 0
    assert runs.difference(whole, out) is None


@pytest.mark.parametrize("part", range(4))
@pytest.mark.usefixtures("tokens_made_here")
def test_a_disk_that_is_full_at_any_write_is_one_line_and_the_run_can_resume(
    home: Path, tmp_path: Path, whole: tuple[Path, Faults], capsys: pytest.CaptureFixture[str], part: int
) -> None:
    out, number = tmp_path / "run", 1 + part * (whole[1].n_writes - 1) // 3
    with Faults(full=number).installed():
        assert train.main(arguments(home, out, *OPTIONS)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "No space left on device" in line
    assert not list(tmp_path.glob("run/.*.partial"))
    ends_the_same(home, out, whole[0])


@pytest.mark.usefixtures("tokens_made_here")
def test_too_little_disk_space_is_reported_before_the_first_step(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, free = tmp_path / "run", shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("mebp_mlx.training.saving.shutil.disk_usage", lambda _: free._replace(free=100_000))
        assert train.main(arguments(home, out, *OPTIONS, "--save-every", "1")) == 0
    kinds = [event["event"] for event in events(out)]
    (notice,) = events(out, "notice")
    assert kinds.index("notice") < kinds.index("train")
    assert "4 copies of the adapters" in notice["text"] and "is free" in notice["text"]
    written_bytes = sum(path.stat().st_size for path in out.iterdir())
    assert written_bytes > 100_000 and not out.joinpath("best").exists()
    assert train.main(arguments(home, tmp_path / "other", *OPTIONS)) == 0
    assert not events(tmp_path / "other", "notice")


@pytest.mark.parametrize("share", [0.5, 0.95])
@pytest.mark.usefixtures("tokens_made_here")
def test_a_run_killed_within_a_save_ends_bit_equal(
    home: Path, tmp_path: Path, whole: tuple[Path, Faults], share: float
) -> None:
    out, number = tmp_path / "run", int(share * whole[1].n_points)
    command = ["-m", "bench.torture.faults", f'{{"kill": {number}}}', *arguments(home, out, *OPTIONS)]
    process = child(*command)  # MEBP_CACHE_DIR belongs to the tests
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    ends_the_same(home, out, whole[0])


# Other commands


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The system refuses larger files (EFBIG), like a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)


@pytest.mark.parametrize("name", ["convert", "fuse", "export", "train"])
@pytest.mark.usefixtures("tokens_made_here")
def test_a_disk_that_fills_is_one_line_in_every_command(
    home: Path, tmp_path: Path, whole: tuple[Path, Faults], capsys: pytest.CaptureFixture[str], name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, out, adapters = str(home / "model"), str(tmp_path / "out"), str(whole[0])
    if name == "train":  # a new token cache, so that tokens are written
        monkeypatch.setenv("MEBP_CACHE_DIR", str(tmp_path / "cache"))
    command: dict[str, Any] = {
        "convert": lambda: convert.main(["--model", model, "--out", out, "--mode", "keep"]),
        "fuse": lambda: fuse.main(["--model", model, "--adapter-path", adapters, "--save-path", out]),
        "export": lambda: export.main(["--model", model, "--adapter-path", adapters, "--peft", "--save-path", out]),
        "train": lambda: train.main(arguments(home, Path(out))),
    }
    capsys.readouterr()
    with files_of_at_most(300):
        code = command[name]()
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and "File too large" in line, line
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


# Damaged files


@pytest.mark.parametrize("name", ["safetensors", "index", "config", "yaml", "adapters", "checkpoint", "log", "rows"])
def test_a_damaged_file_is_read_or_refused(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any other exception fails the test; bench.torture covers memory, hangs and signals."""
    kind, folder = mutants.KINDS[name], tmp_path_factory.mktemp("whole")
    kind.written(folder)
    whole = {file: (folder / file).read_bytes() for file in kind.files}
    kind.read(folder)

    @settings(max_examples=10 if name == "rows" else 50, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(seed=st.integers(0, 2**32), file=st.sampled_from(kind.files))
    def read(seed: int, file: str) -> None:
        for each, content in whole.items():
            changed = mutants.mutant(content, random.Random(seed)) if each == file else content
            (folder / each).write_bytes(changed)
        with suppress(UserError):
            kind.read(folder)

    read()
    shutil.rmtree(folder)
