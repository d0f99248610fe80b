"""--resume completes a save that was interrupted at any point, in the given folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx import train
from mebp_mlx.training import saving
from tests.runs import FILES, arguments, contents, events, tokenize_here

pytestmark = pytest.mark.usefixtures("tokens_made_here")
COPY = "0000004_adapters.safetensors"


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations with copies at 2 and 4."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tokenize_here(home, patch)
        assert train.main(arguments(home, out, "--iters", "4", "--save-every", "2", "--test")) == 0
    return out


@pytest.mark.parametrize(
    "missing", [["adapters.safetensors"], [COPY], ["adapter_config.json"], ["adapters.safetensors", COPY]]
)
def test_resume_completes_the_last_save(finished: Path, tmp_path: Path, missing: list[str]) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in missing:
        (out / name).unlink()
    assert train.main(["--resume", "--adapter-path", str(out)]) == 0
    for name in (*FILES - {"log.jsonl", "run.json"}, COPY):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    whole = contents(out)
    assert train.main(["--resume", "--adapter-path", str(out)]) == 0
    assert contents(out) == whole  # and now there is nothing to do


@pytest.mark.parametrize("at", ["save_adapters", "save_checkpoint"])
def test_a_run_stopped_within_a_save_continues_bit_for_bit(
    finished: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    out, save = tmp_path / "run", getattr(saving, at)

    def stop_at_the_last(*given: Any, **options: Any) -> None:
        if (out / "0000002_adapters.safetensors").exists():
            raise KeyboardInterrupt
        save(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(saving, at, stop_at_the_last)
        assert train.main(arguments(home, out, "--iters", "4", "--save-every", "2", "--test")) == 130
    assert not (out / COPY).exists()
    assert train.main(["--resume", "--adapter-path", str(out)]) == 0
    for name in ("adapters.safetensors", "adapter_config.json", COPY):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    ours, whole = (mx.load(str(folder / "checkpoint.safetensors")) for folder in (out, finished))
    assert ours.keys() == whole.keys()
    assert all(np.array_equal(np.array(ours[name]), np.array(whole[name])) for name in whole)
    assert [event["iter"] for event in events(out, "save")] == [2, 4]
    assert len(events(out, "test")) == 1


def test_a_missed_test_is_run_on_resume(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(line for line in lines if '"event": "test"' not in line))
    assert train.main(["--resume", "--adapter-path", str(out)]) == 0
    (again,), (before,) = events(out, "test"), events(finished, "test")
    assert (again["loss"], again["iter"]) == (before["loss"], before["iter"])


def test_a_copied_folder_continues_itself_and_not_the_original(finished: Path, tmp_path: Path) -> None:
    before, copy = contents(finished), tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert train.main(["--resume", "--adapter-path", str(copy), "--iters", "6"]) == 0
    assert contents(finished) == before
    assert events(copy, "save")[-1]["iter"] == 6


def test_resume_without_a_folder_means_the_default_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(finished)
    shutil.copytree(finished, tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume", "--iters", "5"]) == 0
    assert contents(finished) == before
    assert events(tmp_path / "adapters", "save")[-1]["iter"] == 5


def test_a_run_that_saved_nothing_does_not_block_the_corrected_command(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(home, out, "--learning-rate", "1e38", "--optimizer", "sgd")) == 2
    error = capsys.readouterr().err
    assert "nothing is saved yet" in error and not (out / "checkpoint.safetensors").exists()
    assert train.main(arguments(home, out)) == 0
    assert [event["iter"] for event in events(out, "start")] == [0]


def test_leftovers_of_a_killed_save_are_removed(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / ".checkpoint.safetensors.99.partial").write_bytes(b"half")
    assert train.main(["--resume", "--adapter-path", str(out), "--iters", "5"]) == 0
    assert not list(out.glob(".*"))
