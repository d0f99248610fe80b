"""Saved runs are restored bit for bit; a bad or foreign state is refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mebp_mlx.config import TrainConfig
from mebp_mlx.errors import NonFiniteLoss, UserError
from mebp_mlx.export.adapters import ADAPTER_CONFIG, ADAPTERS, save_adapters
from mebp_mlx.system.files import write_atomically, write_json
from mebp_mlx.training import checkpoint
from mebp_mlx.training.checkpoint import Checkpoint
from mebp_mlx.training.fingerprint import data_fingerprint, model_fingerprint
from mebp_mlx.training.folder import CHECKPOINT, LOG, RUN, check_unused, make_folder, write_record
from mebp_mlx.training.optimizers import make_optimizer

NAMES = [f"model.layers.{layer}.self_attn.q_proj.lora_{letter}" for layer in (0, 1) for letter in "ab"]


def parameters(seed: int) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    return {name: mx.array(rng.standard_normal((5, 3) if name.endswith("a") else (3, 7)), mx.float32) for name in NAMES}


def lora_of(values: dict[str, mx.array]) -> Any:
    about = {"rank": 3, "scale": 20.0, "dropout": 0.0, "keys": ("self_attn.q_proj",), "num_layers": -1}
    return SimpleNamespace(parameters=lambda: dict(values), fine_tune_type="lora", **about)


def state_after_updates(name: str, seed: int, n_updates: int = 2) -> tuple[dict[str, mx.array], optim.Optimizer]:
    values = parameters(seed)
    optimizer = make_optimizer(TrainConfig(optimizer=name, warmup=1, lr_decay="cosine"), 10)
    for step in range(n_updates):
        values = optimizer.apply_gradients(parameters(seed + 1 + step), values)
    return values, optimizer


def saved(folder: Path, seed: int = 0, name: str = "adam") -> Checkpoint:
    values, optimizer = state_after_updates(name, seed)
    state = Checkpoint(values, optimizer.state, 2, TrainConfig(optimizer=name).to_dict(), {"model": "m", "data": "d"})
    checkpoint.save_checkpoint(folder, state)
    return state


def same_bits(a: mx.array, b: mx.array) -> bool:
    ours, theirs = (np.array(x.reshape(-1).view(mx.uint8)).tobytes() for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and ours == theirs


def fresh_run(lora: dict[str, mx.array], optimizer: Any, **engine: mx.array) -> Checkpoint:
    return Checkpoint(lora, optimizer, 0, {}, {}, engine)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adafactor", "lion", "muon"])
def test_a_restored_state_continues_bit_for_bit(tmp_path: Path, seed: int, name: str) -> None:
    values, optimizer = state_after_updates(name, seed)
    options = TrainConfig(optimizer=name).to_dict()
    checkpoint.save_checkpoint(tmp_path, Checkpoint(values, optimizer.state, 2, options, {}))
    again = checkpoint.load_checkpoint(tmp_path)
    assert (again.step, again.options) == (2, options)

    fresh = make_optimizer(TrainConfig(optimizer=name, warmup=1, lr_decay="cosine"), 10)
    fresh.init(parameters(seed))
    checkpoint.check_arrays(again, fresh_run(parameters(seed), fresh.state))
    fresh.state = again.optimizer
    gradients = parameters(seed + 99)
    expected, actual = (o.apply_gradients(gradients, v) for o, v in ((optimizer, values), (fresh, again.lora)))
    for key in NAMES:
        assert same_bits(expected[key], actual[key]), key


def test_every_kind_of_array_is_restored(tmp_path: Path, seed: int) -> None:
    """Also from a file of MLX's writer, which earlier versions used."""
    rng = np.random.default_rng(seed)
    values = mx.array(rng.standard_normal((40, 103)), mx.float32)
    arrays = {
        **{f"as {dtype}": (values * 9).astype(dtype) for dtype in (mx.float16, mx.bfloat16, mx.int32, mx.bool_)},
        "turned": values.T,
        "every other": values[::2, 1::3],
        "repeated": mx.broadcast_to(values[:1], (7, 103)),
        "pages": mx.zeros((32, 128)),
        "not yet": values + 1,
        "none": mx.zeros((0, 3)),
        "count": mx.array(2**40 + 1, mx.uint64),
    }
    view = np.array(values[:9])
    view.flags.writeable = False
    state = Checkpoint(
        arrays, {"a": {"m": view, "v": view[:0]}, "step": mx.array(3, mx.uint64)}, 7, {"x": 1}, {"y": "z"}
    )
    checkpoint.save_checkpoint(tmp_path, state)
    path, wanted = tmp_path / CHECKPOINT, state.arrays()
    for _ in range(2):
        again = checkpoint.load_checkpoint(tmp_path)
        assert (again.step, again.options, again.origin) == (7, {"x": 1}, {"y": "z"})
        actual = again.arrays()
        assert actual.keys() == wanted.keys()
        for name, value in actual.items():
            assert same_bits(value, mx.array(wanted[name])), (name, seed)
        loaded, metadata = mx.load(str(path), return_metadata=True)
        mx.eval(loaded)
        mx.save_safetensors(str(path), loaded, metadata)


def test_adapters_load_in_mlx_lm_and_give_the_product(tmp_path: Path, seed: int) -> None:
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    import mlx.nn as nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(5, 7, bias=False)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Block(), Block()]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Inner()

        @property
        def layers(self) -> list[Block]:
            return self.model.layers

    values = parameters(seed)
    save_adapters(tmp_path, lora_of(values), 100, {}, copy=True)
    model = Model()
    x = mx.random.normal((2, 5))
    base = model.layers[1].self_attn.q_proj(x)
    utils.load_adapters(model, str(tmp_path))
    actual = model.layers[1].self_attn.q_proj(x)
    expected = base + 20.0 * (x @ values[NAMES[2]]) @ values[NAMES[3]]
    assert mx.abs(actual - expected).max().item() <= 1e-4
    numbered = tmp_path / "0000100_adapters.safetensors"
    assert numbered.read_bytes() == (tmp_path / ADAPTERS).read_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_never_replaces_a_good_one(tmp_path: Path, bad: float) -> None:
    saved(tmp_path)
    save_adapters(tmp_path, lora_of(parameters(1)), 1, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    values, optimizer = state_after_updates("adam", 0)
    values[NAMES[0]] = values[NAMES[0]].at[1, 1].add(bad)
    with pytest.raises(NonFiniteLoss, match="no longer finite"):
        checkpoint.save_checkpoint(tmp_path, Checkpoint(values, optimizer.state, 3, {}, {}))
    with pytest.raises(NonFiniteLoss):
        save_adapters(tmp_path, lora_of(values), 2, {}, copy=True)
    optimizer.state[NAMES[1]]["v"] = optimizer.state[NAMES[1]]["v"] * bad
    parked = {NAMES[1]: {"v": np.array(optimizer.state[NAMES[1]]["v"])}}
    for state in (optimizer.state, parked):
        with pytest.raises(NonFiniteLoss):
            checkpoint.save_checkpoint(tmp_path, Checkpoint(parameters(0), state, 3, {}, {}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1}, "--flag")

    def full(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"--flag .*a\.json: cannot be written: No space left"):
        write_atomically(path, full, "--flag")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt), "--flag")
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    script = """
import sys, mlx.core as mx
from pathlib import Path
from mebp_mlx.training.checkpoint import Checkpoint, save_checkpoint
step = 0
while True:
    step += 1
    save_checkpoint(Path(sys.argv[1]), Checkpoint({"a": mx.full((300, 300), step)}, {"b": {"m": mx.full((300,), step)}},
                                                  step, {}, {}))
    print(step, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for n_saves in (1, 3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout is not None
        for _ in range(n_saves):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        state = checkpoint.load_checkpoint(tmp_path)
        assert state.step >= n_saves
        assert mx.all(state.lora["a"] == state.step).item()
        assert mx.all(state.optimizer["b"]["m"] == state.step).item()


# Folders


@pytest.mark.parametrize("name", [CHECKPOINT, ADAPTERS, ADAPTER_CONFIG])
def test_a_folder_with_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"--adapter-path.*already contains a run") as caught:
        check_unused(tmp_path)
    assert ("--resume" in str(caught.value)) == (name == CHECKPOINT)


def test_an_empty_or_missing_folder_is_free_and_a_file_is_not(tmp_path: Path) -> None:
    check_unused(tmp_path)
    check_unused(tmp_path / "new" / "folder")
    for name in (RUN, LOG):  # left by a run that ended before its first save
        (tmp_path / name).write_text("x")
    check_unused(tmp_path)
    (tmp_path / "file").write_text("x")
    for use in (check_unused, make_folder):
        with pytest.raises(UserError, match="--adapter-path"):
            use(tmp_path / "file")
    with pytest.raises(UserError, match="--adapter-path"):
        make_folder(tmp_path / "file" / "below")


# Resuming


def test_resume_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="--resume: nothing is saved"):
            checkpoint.saved_options(folder)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[: len(whole) // 2], whole[:50], b"", b"x" * 200):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"--resume: .*checkpoint\.safetensors"):
            checkpoint.load_checkpoint(tmp_path)
    mx.save_safetensors(str(path), {"a": mx.ones(3)})
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        checkpoint.load_checkpoint(tmp_path)


def test_checkpoints_of_other_shapes_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    state = checkpoint.load_checkpoint(tmp_path)
    optimizer = make_optimizer(TrainConfig(), 10)
    optimizer.init(parameters(0))
    checkpoint.check_arrays(state, fresh_run(parameters(0), optimizer.state))
    wider = {**parameters(0), NAMES[1]: mx.zeros((4, 7))}
    with pytest.raises(UserError, match=r"has shape \(3, 7\), not \(4, 7\)"):
        checkpoint.check_arrays(state, fresh_run(wider, optimizer.state))
    with pytest.raises(UserError, match="is not part of this run"):
        fewer = {name: value for name, value in parameters(0).items() if name != NAMES[0]}
        checkpoint.check_arrays(state, fresh_run(fewer, optimizer.state))
    with pytest.raises(UserError, match="missing"):
        checkpoint.check_arrays(state, fresh_run({**parameters(0), "extra": mx.zeros(2)}, optimizer.state))
    with pytest.raises(UserError, match="engine/sums is missing"):
        checkpoint.check_arrays(state, fresh_run(parameters(0), optimizer.state, sums=mx.zeros(3)))


FIXED = {
    "batch_size": 7, "dropout": 0.5, "engine": "mezo", "grad_accumulation_steps": 3, "keys": ("mlp.up_proj",),
    "learning_rate": 0.5, "lr_decay": "linear", "lr_schedule": {"name": "cosine_decay", "arguments": [1, 2]},
    "mask_prompt": True, "max_grad_norm": 2.0, "max_seq_length": 9,
    "zo_eps": 0.5, "kzoo_seeds": 9, "kzoo_pro": True, "hizoo_alpha": 0.5, "fzoo_samples": 3,
    "num_layers": 1,
    "train_on": "assistant",
    "optimizer": "lion", "optimizer_config": {"adam": {"eps": 1e-6}}, "overlong": "drop", "rank": 4, "scale": 2.0,
    "seed": 5, "warmup": 3, "dtype": "bfloat16", "weights": "packed",
    "fine_tune_type": "dora", "lora_plus_ratio": 4.0, "rslora_alpha": 8.0, "resume_adapter_file": "old/adapters",
}  # fmt: skip


def test_every_option_that_affects_results_is_fixed() -> None:
    assert set(TrainConfig().fixed_by_run()) == {*FIXED, "model", "data"}


@pytest.mark.parametrize("name", sorted(FIXED))
def test_a_resumed_run_keeps_its_options(tmp_path: Path, name: str) -> None:
    state = saved(tmp_path)
    origin = {"model": "m", "data": "d"}
    other = TrainConfig(optimizer="adam").replace(**{name: FIXED[name]})  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        checkpoint.check_same_run(other, state, origin)
    message = str(caught.value)
    assert name.replace("_", "-") in message.replace("_", "-")
    value = FIXED[name]
    assert str(value[0] if isinstance(value, tuple) else value) in message or isinstance(value, dict), message


def test_a_resumed_run_may_change_reporting_and_length_and_the_folders_names(tmp_path: Path) -> None:
    state = saved(tmp_path)
    now = TrainConfig(
        iters=5,
        epochs=2,
        save_every=3,
        steps_per_report=7,
        steps_per_eval=8,
        val_batches=1,
        test=True,
        adapter_path="elsewhere",
        arena_dir="a",
        sample_prompt="x",
        resume=True,
        model="moved",
        data="too",
    )
    checkpoint.check_same_run(now, state, {"model": "m", "data": "d"})


@pytest.mark.parametrize("name", ["model", "data"])
def test_a_resumed_run_needs_the_same_model_and_rows(tmp_path: Path, name: str) -> None:
    state = saved(tmp_path)
    origin = {"model": "m", "data": "d", name: "changed"}
    with pytest.raises(UserError, match=f"--{name}: .*bundled.*changed since"):
        checkpoint.check_same_run(TrainConfig(optimizer="adam"), state, origin)
    other = TrainConfig(optimizer="adam").replace(**{name: "other"})
    with pytest.raises(UserError, match=f"--{name}: .*uses bundled, not other"):
        checkpoint.check_same_run(other, state, origin)


def test_saved_options_follow_run_json_where_they_may_change(tmp_path: Path) -> None:
    saved(tmp_path)
    write_record(tmp_path, {"options": TrainConfig(iters=999, rank=3).to_dict()})
    options = checkpoint.saved_options(tmp_path)
    assert (options["iters"], options["rank"]) == (999, TrainConfig().rank)
    (tmp_path / RUN).write_text("{")
    assert checkpoint.saved_options(tmp_path)["iters"] == TrainConfig().iters


def test_fingerprints_change_with_their_contents(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a" * 100)
    first = model_fingerprint(tmp_path)
    assert model_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"a" * 99 + b"b")
    second = model_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert len({first, second, model_fingerprint(tmp_path)}) == 3
    for name in ("offsets", "labels", "tokens"):
        (tmp_path / f"train.{name}").write_bytes(b"x" * 600_000)
    rows = data_fingerprint(tmp_path)
    (tmp_path / "train.tokens").write_bytes(b"x" * 599_999 + b"y")
    assert data_fingerprint(tmp_path) != rows
