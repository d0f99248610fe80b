"""DoRA equals mlx-lm's: gradients, loading and saving adapters, fused weights; rsLoRA's scale and LoRA+'s rates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx import fuse, train
from mebp_mlx.config import TrainConfig
from mebp_mlx.engine import make_engine
from mebp_mlx.engine.backprop import BackpropEngine
from mebp_mlx.engine.base import WholeBatch
from mebp_mlx.export import __main__ as export_command
from mebp_mlx.export.adapters import adapters_of
from mebp_mlx.model.lora import Lora
from mebp_mlx.ops.plan import SAVE_INPUTS, Plan
from mebp_mlx.testing.reference import largest_error, mlx_lm_loss_and_grads
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, write_model
from mebp_mlx.training.optimizers import make_optimizer
from mebp_mlx.training.update import Updater
from tests.adapters import mlx_lm_loss
from tests.runs import arguments, events, refused

pytest.importorskip("mlx_lm")
TINY_BLOCKS = Plan(weight_block_bytes=1, token_block=64, query_block=5, logits_block_bytes=1)
TOLERANCE = 2e-5


def moved(lora: Lora, seed: int) -> Lora:
    """The LoRA with random pairs, and row norms changed by about a fifth."""
    rng = np.random.default_rng(seed)
    for name, value in sorted(lora.parameters().items()):
        noise = mx.array(rng.standard_normal(value.shape), mx.float32)
        lora.update({name: value * (1 + 0.2 * noise) if name.endswith(".m") else 0.1 * noise})
    return lora


@pytest.mark.parametrize("plan", [None, TINY_BLOCKS, Plan(saved=SAVE_INPUTS)], ids=["default", "tiny-blocks", "inputs"])
@pytest.mark.parametrize(
    "name, packed",
    [("qwen2", False), ("qwen2", True), ("qwen3", False), ("gemma3_text", True), ("phi3", True), ("gemma4_text", True)],
)
def test_gradients_equal_mlx_lms_dora(tmp_path: Path, name: str, packed: bool, plan: Plan | None, seed: int) -> None:
    config = packed_config(name) if packed else dict(CONFIGS[name])
    write_model(tmp_path, config, seed=seed, quantization={"group_size": 32, "bits": 4} if packed else None)
    model = mebp_mlx.open_model(tmp_path)
    lora = moved(mebp_mlx.init_lora(model, rank=3, scale=2.0, fine_tune_type="dora"), seed)
    tokens, targets = random_batch(seed, 3, 17, model.spec.V, "holes")
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
    theirs = mlx_lm_loss_and_grads(tmp_path, lora, tokens, targets)
    assert any(name.endswith(".m") for name in grads)
    error = largest_error(loss.item(), grads, *theirs)
    if not error <= TOLERANCE:
        truth = mlx_lm_loss_and_grads(tmp_path, lora, tokens, targets, mx.float64)
        allowed = 3 * largest_error(*theirs, *truth) + TOLERANCE
        assert largest_error(loss.item(), grads, *truth) <= allowed, f"seed {seed}"
    forward = mebp_mlx.loss(model, lora, tokens, targets, plan=plan).item()
    assert abs(forward - loss.item()) <= TOLERANCE * forward


@pytest.mark.parametrize("keys", [None, ["mlp.down_proj"], ["self_attn.v_proj", "mlp.up_proj"]])
def test_dropout_tiles_and_columns_give_the_whole_graphs_gradients(
    tmp_path: Path, keys: list[str] | None, seed: int
) -> None:
    write_model(tmp_path, CONFIGS["llama"] | {"intermediate_size": 1031}, seed=seed)
    model = mebp_mlx.open_model(tmp_path)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, dropout=0.3, keys=keys, fine_tune_type="dora")
    batch = WholeBatch(*random_batch(seed, 2, 150, model.spec.V))
    n_labels = int((batch.targets != -100).sum())
    moved(lora, seed)

    def step(engine: Any) -> tuple[float, dict[str, mx.array]]:
        grads: dict[str, mx.array] = {}
        loss = engine.step(batch, step=3, micro=0, n_labels=n_labels, sink=grads.update)
        engine.close()
        return loss, grads

    theirs = step(make_engine("whole-graph", model, lora, seed=5))
    plan = Plan(weight_block_bytes=1, token_block=64, query_block=50)  # 512 columns at a time
    ours = step(BackpropEngine(model, lora, plan=plan, seed=5))
    if not largest_error(*ours, *theirs) <= TOLERANCE:
        model.dtype = mx.float64
        truth = step(make_engine("whole-graph", model, lora, seed=5))
        assert largest_error(*ours, *truth) <= 3 * largest_error(*theirs, *truth) + TOLERANCE, f"seed {seed}"


@pytest.mark.parametrize("saved", [Plan().saved, SAVE_INPUTS], ids=["products", "inputs"])
def test_gradients_are_the_same_bits_for_every_grain(tmp_path: Path, saved: frozenset[str], seed: int) -> None:
    write_model(tmp_path, CONFIGS["qwen3"], seed=seed)
    model = mebp_mlx.open_model(tmp_path)
    lora = moved(mebp_mlx.init_lora(model, rank=2, fine_tune_type="dora"), seed)
    tokens, targets = random_batch(seed, 2, 70, model.spec.V)
    actual = []
    for grain in ("op", "stage", "tile", "block"):
        plan = Plan(grain=grain, saved=saved, token_block=64)
        actual.append(mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)[1])
    for other in actual[1:]:
        assert all(np.array_equal(np.asarray(actual[0][name]), np.asarray(other[name])) for name in actual[0])


def test_it_starts_at_the_frozen_models_loss(tmp_path: Path, seed: int) -> None:
    write_model(tmp_path, CONFIGS["llama"], seed=seed)
    model = mebp_mlx.open_model(tmp_path)
    batch = random_batch(seed, 2, 9, model.spec.V)
    plain, dora = (mebp_mlx.init_lora(model, rank=2, fine_tune_type=kind) for kind in ("lora", "dora"))
    first = mebp_mlx.loss(model, plain, *batch).item()
    assert abs(mebp_mlx.loss(model, dora, *batch).item() / first - 1) <= 1e-6


def test_adapters_go_both_ways_and_fused_weights_give_the_same_loss(
    home: Path, tmp_path: Path, tokens_made_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = arguments(home, out, "--fine-tune-type", "dora", "--val-batches", "-1", "--test")
    assert train.main([*argv, "--memory-budget", "min"]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    names = mx.load(str(out / "adapters.safetensors"))
    assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b", "m"}
    model = mebp_mlx.open_model(home / "model")
    rows = [np.random.default_rng(0).integers(0, model.spec.V, 9).tolist()]
    tokens, targets = np.array(rows)[:, :-1], np.array(rows)[:, 1:]
    lora = adapters_of(out, home / "model")
    assert lora.fine_tune_type == "dora"
    ours = mebp_mlx.loss(model, lora, tokens, targets).item()
    assert abs(ours / mlx_lm_loss(home / "model", out, rows) - 1) <= 1e-5
    fused = tmp_path / "fused"
    given = ["--model", home / "model", "--adapter-path", out, "--save-path", fused, "--tolerance", "none"]
    assert fuse.main([str(part) for part in given] + ["--dequantize"]) == 0
    merged = mebp_mlx.open_model(fused)
    assert abs(mebp_mlx.loss(merged, mebp_mlx.init_lora(merged), tokens, targets).item() / ours - 1) <= 1e-5
    for kind in ("--gguf", "--peft"):
        target = str(tmp_path / ("a.gguf" if kind == "--gguf" else "peft"))
        assert export_command.main([kind, "--adapter-path", str(out), "--save-path", target]) == 2
        assert "DoRA adapters cannot be exported" in capsys.readouterr().err
    more = tmp_path / "more"
    again = arguments(home, more, "--fine-tune-type", "dora", "--resume-adapter-file", str(out), "--iters", "1")
    assert train.main(again) == 0
    assert abs(events(more, "valid")[0]["loss"] - events(out, "valid")[-1]["loss"]) <= 1e-6
    said = refused(capsys, arguments(home, tmp_path / "none", "--resume-adapter-file", str(out)))
    assert said.startswith("--fine-tune-type: is lora") and "use --fine-tune-type dora" in said


def test_a_resumed_dora_run_is_the_same_run(home: Path, tmp_path: Path, tokens_made_here: None) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--fine-tune-type", "dora", "--lora-plus-ratio", "4", "--rslora-alpha", "8"]
    assert train.main(arguments(home, whole, *more)) == 0
    assert train.main(arguments(home, parts, *more, "--iters", "3")) == 0
    assert train.main(["--resume", "--adapter-path", str(parts), "--iters", "6"]) == 0
    assert (parts / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()
    saved = json.loads((whole / "adapter_config.json").read_text())["lora_parameters"]
    assert saved["scale"] == 8 / math.sqrt(4)


def test_dora_trains_with_only_forward_passes(home: Path, tmp_path: Path, tokens_made_here: None) -> None:
    assert train.main(arguments(home, tmp_path / "out", "--fine-tune-type", "dora", "--engine", "mezo")) == 0


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "lion", "muon"])
@pytest.mark.parametrize("is_lazy", [False, True])
def test_lora_plus_equals_a_separate_optimizer_for_every_b(
    tmp_path: Path, optimizer: str, is_lazy: bool, seed: int
) -> None:
    write_model(tmp_path, CONFIGS["llama"], seed=1)
    model = mebp_mlx.open_model(tmp_path)
    lora = mebp_mlx.init_lora(model, rank=2, num_layers=1)
    config = TrainConfig(optimizer=optimizer, learning_rate=0.01, lora_plus_ratio=16.0, warmup=2)
    updater = Updater(make_optimizer(config, 4), lora, is_lazy=is_lazy, b_ratio=16.0)
    expected, rng = dict(lora.parameters()), np.random.default_rng(seed)
    of_a, of_b = (make_optimizer(TrainConfig(optimizer=optimizer, learning_rate=r, warmup=2), 4) for r in (0.01, 0.16))
    for _ in range(3):
        grads = {name: mx.array(rng.standard_normal(p.shape), mx.float32) for name, p in expected.items()}
        updater.begin_step()
        mx.eval(updater.sink(grads))
        updater.end_step()
        for optimizer_, side in ((of_a, "lora_a"), (of_b, "lora_b")):
            own = {name: g for name, g in grads.items() if name.endswith(side)}
            expected |= optimizer_.apply_gradients(own, {name: expected[name] for name in own})
        for name, value in lora.parameters().items():
            error = np.abs(np.asarray(value - expected[name])).max()
            assert error <= 1e-6 * max(1.0, float(np.abs(np.asarray(expected[name])).max())), name
    assert isinstance(of_a, optim.Optimizer) and updater.optimizer.learning_rate.item() == pytest.approx(0.01)


def test_adafactors_own_step_sizes_have_no_ratio(capsys: pytest.CaptureFixture[str], home: Path, tmp_path: Path,
                                                 tokens_made_here: None) -> None:  # fmt: skip
    more = ["--optimizer", "adafactor", "--lora-plus-ratio", "2"]
    assert refused(capsys, arguments(home, tmp_path / "out", *more)).startswith("--lora-plus-ratio: adafactor sets")


def test_use_dora_and_alpha_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("use_dora: true\n")
    assert TrainConfig.from_args(["-c", str(path)]).fine_tune_type == "dora"
    assert TrainConfig.from_args(["--use-dora"]).fine_tune_type == "dora"
    with pytest.raises(mebp_mlx.UserError, match="--rslora-alpha: cannot be combined with --scale"):
        TrainConfig.from_args(["--rslora-alpha", "2", "--scale", "3"])
    with pytest.raises(mebp_mlx.UserError, match="full is not available"):
        TrainConfig.from_args(["--fine-tune-type", "full"])
