"""The Python interface: README's example, training with callbacks, saving and loading adapters, models by name."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mebp_mlx
from mebp_mlx import bundled
from mebp_mlx.testing.tiny import randomize_lora
from mebp_mlx.training import report
from tests.adapters import mlx_lm_loss
from tests.runs import events, tokenize_here

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def config_of(home: Path, out: Path, **more: Any) -> mebp_mlx.TrainConfig:
    given = {"model": str(home / "model"), "data": str(home / "data"), "adapter_path": str(out), "rank": 4, "iters": 6}
    return mebp_mlx.TrainConfig(**{**given, "steps_per_report": 2, "steps_per_eval": 4, **more})


def test_readmes_example_runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "mebp_mlx.train" in block]
    tokenize_here(tmp_path, monkeypatch)
    monkeypatch.setattr(report, "show_sample", lambda *_: None)
    monkeypatch.setattr("mebp_mlx.training.train.show_sample", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.replace("iters=20", f"iters=1, data={str(home / 'data')!r}"), names)  # nothing else is changed
    assert np.isfinite(names["loss"].item()) and names["grads"].keys() == names["lora"].parameters().keys()
    copied, trained = (Path(name, "adapters.safetensors").read_bytes() for name in ("copy", "mine"))
    assert copied == trained


def test_train_is_a_function_and_a_module_in_either_import_order() -> None:
    door = importlib.import_module("mebp_mlx.train")
    assert mebp_mlx.train is door and callable(mebp_mlx.train) and callable(mebp_mlx.train.main)
    script = (
        "import mebp_mlx; from mebp_mlx import train\nassert callable(train) and train.main and mebp_mlx.train is train"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


class Callback:
    def __init__(self) -> None:
        self.trained: list[dict[str, Any]] = []
        self.validated: list[dict[str, Any]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.trained.append(info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.validated.append(info)


class ValidationsOnly:
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.losses.append(info["val_loss"])


def test_callbacks_get_mlx_lms_keys(home: Path, tmp_path: Path, tokens_made_here: None) -> None:
    whole, part = Callback(), ValidationsOnly()
    folder = mebp_mlx.train(config_of(home, tmp_path / "out"), callbacks=[whole, part])
    assert folder == tmp_path / "out"
    expected = events(folder, "train")
    assert [(info["iteration"], info["train_loss"]) for info in whole.trained] == [
        (e["iter"], e["loss"]) for e in expected
    ]
    keys = {"iteration", "train_loss", "learning_rate", "iterations_per_second", "tokens_per_second", "trained_tokens"}
    assert all(keys <= info.keys() for info in whole.trained)
    assert whole.trained[-1]["trained_tokens"] == sum(e["n_tokens"] for e in expected)
    assert [(i["iteration"], i["val_loss"]) for i in whole.validated] == [
        (e["iter"], e["loss"]) for e in events(folder, "valid")
    ]
    assert part.losses == [info["val_loss"] for info in whole.validated]


def test_errors_are_raised(home: Path, tmp_path: Path, tokens_made_here: None) -> None:
    with pytest.raises(mebp_mlx.UserError, match="--data"):
        mebp_mlx.train(config_of(home, tmp_path / "out", data=str(tmp_path / "none")))
    mebp_mlx.train(config_of(home, tmp_path / "out", iters=1))
    with pytest.raises(mebp_mlx.UserError, match="already contains a run"):
        mebp_mlx.train(config_of(home, tmp_path / "out"))
    with pytest.raises(mebp_mlx.BudgetError, match="--memory-budget"):
        mebp_mlx.train(config_of(home, tmp_path / "small", memory_budget=1_000_000))


def test_a_run_resumes_with_its_own_options(home: Path, tmp_path: Path, tokens_made_here: None) -> None:
    whole = mebp_mlx.train(config_of(home, tmp_path / "whole", optimizer="sgd"))
    mebp_mlx.train(config_of(home, tmp_path / "out", optimizer="sgd", iters=4))
    out = mebp_mlx.train(mebp_mlx.TrainConfig(adapter_path=str(tmp_path / "out"), resume=True, iters=6))
    expected, actual = ((folder / "adapters.safetensors").read_bytes() for folder in (whole, out))
    assert actual == expected
    with pytest.raises(mebp_mlx.UserError, match=r"--rank: .* has 4, not 2"):
        mebp_mlx.train(mebp_mlx.TrainConfig(adapter_path=str(tmp_path / "out"), resume=True, rank=2, iters=8))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_are_saved_and_loaded_as_in_mlx_lm(home: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("mlx_lm")
    model = mebp_mlx.open_model(home / "model")
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, num_layers=1, fine_tune_type=kind)
    randomize_lora(lora, seed=1, spread=0.3)
    folder = mebp_mlx.save_adapters(tmp_path / "new", lora, model)
    again = mebp_mlx.load_adapters(folder, model)
    assert again.parameters().keys() == lora.parameters().keys() and again.fine_tune_type == kind
    assert all(np.array_equal(np.asarray(v), np.asarray(lora.parameters()[n])) for n, v in again.parameters().items())
    row = [5, 17, 3, 40, 8]
    ours = mebp_mlx.loss(model, again, [row[:-1]], [row[1:]]).item()
    assert abs(ours / mlx_lm_loss(home / "model", folder, [row]) - 1) <= 1e-5
    with pytest.raises(mebp_mlx.UserError, match=r"folder .*new: exists and is not empty"):
        mebp_mlx.save_adapters(tmp_path / "new", lora, model)
    with pytest.raises(mebp_mlx.UserError, match=r"folder .*none: no such folder"):
        mebp_mlx.load_adapters(tmp_path / "none", model)


def test_models_are_opened_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert mebp_mlx.open_model("bundled").spec.family == "llama"
    monkeypatch.setattr("mebp_mlx.weights.hub._from_hub", lambda name, **_: bundled.MODEL_DIR)
    assert mebp_mlx.open_model("org/name").spec.family == "llama"
    monkeypatch.undo()
    with pytest.raises(mebp_mlx.UserError, match="no such folder, and not the name of a model on the hub"):
        mebp_mlx.open_model(tmp_path / "none")
