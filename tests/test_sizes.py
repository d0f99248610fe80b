"""The sizes of LoRA and optimizer state are known before they are allocated; too large ones are never allocated."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mebp_mlx
from mebp_mlx import train
from mebp_mlx.config import OPTIMIZERS, TrainConfig
from mebp_mlx.errors import BudgetError
from mebp_mlx.model.config import PROJECTIONS
from mebp_mlx.planner.sizes import lora_sizes
from mebp_mlx.system import limits
from mebp_mlx.system.footprint import footprint_bytes
from mebp_mlx.testing.tiny import CONFIGS, write_model
from mebp_mlx.training import setup
from mebp_mlx.training.optimizers import make_optimizer, state_bytes
from mebp_mlx.training.update import Updater
from tests.runs import arguments, child

KEYS = tuple(PROJECTIONS.values())
MB = 1_000_000
MOMENTUM: dict[str, Any] = {"optimizer": "sgd", "optimizer_config": {"sgd": {"momentum": 0.9}}}
OF_OPTIMIZERS = {**{name: {"optimizer": name} for name in OPTIMIZERS}, "sgd with momentum": MOMENTUM}


@pytest.mark.parametrize("options", OF_OPTIMIZERS.values(), ids=OF_OPTIMIZERS.keys())
@pytest.mark.parametrize(("keys", "num_layers"), [(KEYS, -1), (KEYS[1:5], 2)])
def test_predicted_sizes_equal_the_allocated_ones(
    tmp_path: Path, options: dict[str, Any], keys: tuple[str, ...], num_layers: int
) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path, CONFIGS["gemma3_text"]))
    config = TrainConfig(keys=keys, num_layers=num_layers, rank=5, **options)
    optimizer = make_optimizer(config, 9)
    actual = lora_sizes(model.spec, config.keys, num_layers, config.rank, optimizer)
    assert not optimizer._initialized
    lora = setup.make_lora(config, model)
    parameters = lora.parameters()
    assert actual.parameters == sum(value.nbytes for value in parameters.values())
    of_blocks = [
        sum(value.nbytes for name, value in parameters.items() if name.startswith(f"{layer.prefix}."))
        for layer in model.spec.layers
    ]
    assert actual.block_gradients == max(of_blocks)
    updater = Updater(optimizer, lora)
    of_the_run = sum(optimizer.state[name].nbytes for name in ("step", "learning_rate") if name in optimizer.state)
    assert actual.state == state_bytes(updater.optimizer) - of_the_run


def test_sizes_beyond_any_machine_are_computed_without_memory(tmp_path: Path) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path, CONFIGS["qwen3"]))
    mx.synchronize()
    before, rank = footprint_bytes(), 2**31 - 1
    arrays_before = mx.get_active_memory()  # from other tests in this process
    mx.reset_peak_memory()
    for name in OPTIMIZERS:
        actual = lora_sizes(model.spec, None, -1, rank, make_optimizer(TrainConfig(optimizer=name), 1))
        assert actual.parameters > 1e13 and actual.state >= 0, name
    assert mx.get_peak_memory() - arrays_before <= MB and footprint_bytes() - before <= 5 * MB


@pytest.mark.parametrize(
    ("rank", "more", "what"),
    [
        ("20000", ["--memory-budget", "200MB"], "--memory-budget is 200.0 MB"),
        ("20000", ["--dry-run"], "--memory-budget is"),
        ("1000000000", [], "--memory-budget is"),
        ("1000000000", ["--memory-budget", "none"], "the machine's memory is"),
        ("1000000000", ["--memory-budget", "min", "--engine", "mezo"], "the machine's memory is"),
        ("1000000000", ["--memory-budget", "none", "--engine", "whole-graph"], "the machine's memory is"),
    ],
)
def test_a_rank_without_space_ends_immediately_with_exit_3(
    tmp_path: Path, rank: str, more: list[str], what: str
) -> None:
    """On the bundled model, whose LoRA of rank 20,000 needs 1.8 GB. A child process reports its peak."""
    script = (
        "import sys; from mebp_mlx import train; from mebp_mlx.system.footprint import PeakMeter\n"
        "with PeakMeter() as meter: code = train.main(sys.argv[1:])\n"
        "print(code, meter.peak_bytes)"
    )
    process = child("-c", script, "--rank", rank, "--adapter-path", str(tmp_path / "out"), *more)
    out, err = process.communicate(timeout=120)
    (line,) = err.splitlines()
    assert line.startswith(f"error: --rank {rank}: LoRA takes ") and re.search(what, line), line
    assert "smallest workable budget is above" in line
    code, peak_bytes = map(int, out.splitlines()[-1].split())
    assert code == 3 and peak_bytes <= 60 * MB, out
    assert not (tmp_path / "out").exists()


def test_the_python_interface_refuses_sizes_beyond_the_machine(tmp_path: Path) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path, CONFIGS["qwen3"]))
    for rank in (10**9, 10**12):
        with pytest.raises(mebp_mlx.UserError, match=f"rank {rank}: LoRA takes .* the machine's memory is"):
            mebp_mlx.init_lora(model, rank=rank)


def test_the_named_budget_includes_values_kept_in_memory(tmp_path: Path) -> None:
    """Optimizer state if the engine does not offload it; all gradients if they are accumulated."""
    model = mebp_mlx.open_model(write_model(tmp_path, CONFIGS["qwen3"]))

    def named_mb(**options: Any) -> int:
        with pytest.raises(BudgetError) as refused:
            setup.make_lora(TrainConfig(rank=30_000, memory_budget=10 * MB, **options), model)
        actual = re.search(r"smallest workable budget is above (\d+)MB", str(refused.value))
        assert actual is not None, refused.value
        return int(actual[1])

    optimizer = make_optimizer(TrainConfig(), 1)
    sizes = lora_sizes(model.spec, None, -1, 30_000, optimizer)
    base = named_mb(optimizer="sgd")
    assert abs(named_mb(optimizer="adam") - base) <= 3  # offloaded to a file
    more_mb = (sizes.parameters - sizes.block_gradients) / MB
    assert abs(named_mb(max_grad_norm=1.0) - base - more_mb) <= 3
    assert abs(named_mb(grad_accumulation_steps=2) - base - more_mb) <= 3
    assert abs(named_mb(engine="mezo", optimizer="adam") - base - sizes.state / MB) <= 3
    assert abs(named_mb(engine="hizoo") - base - sizes.parameters / MB) <= 3


# Limits of the system


def test_no_limit_and_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    infinite = limits.resource.RLIM_INFINITY
    given = {limits.resource.RLIMIT_DATA: infinite, limits.resource.RLIMIT_AS: infinite}
    monkeypatch.setattr(limits.sys, "platform", "linux")
    monkeypatch.setattr(limits, "_reserved_bytes", {"VmData": 100 * MB, "VmSize": 900 * MB}.__getitem__)
    monkeypatch.setattr(limits, "footprint_bytes", lambda: 30 * MB)
    monkeypatch.setattr(limits, "usable_cores", lambda: 2)
    monkeypatch.setattr(
        limits.resource, "getrlimit", lambda kind: (given.get(kind, 10 * MB), infinite)
    )  # stacks of 10 MB
    assert limits.process_limit() is None
    given[limits.resource.RLIMIT_DATA] = 340 * MB
    actual = limits.process_limit()
    assert actual is not None and actual.footprint_bytes == 30 * MB + 340 * MB - 100 * MB - 4 * 10 * MB
    assert "ulimit -d" in str(actual) and "340.0 MB" in str(actual) and "230.0 MB" in str(actual)
    given[limits.resource.RLIMIT_AS] = 1000 * MB
    actual = limits.process_limit()
    assert actual is not None and actual.name == "ulimit -v" and actual.footprint_bytes == 30 * MB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is Linux's")
@pytest.mark.usefixtures("tokens_made_here")
def test_under_every_limit_a_run_completes_or_is_refused_in_one_line(home: Path, tmp_path: Path) -> None:
    assert train.main(arguments(home, tmp_path / "first", "--iters", "1")) == 0  # fills the token cache
    script = (
        "import resource, sys; from mebp_mlx import train; from mebp_mlx.system.limits import _reserved_bytes\n"
        "limit = _reserved_bytes('VmData') + int(float(sys.argv[1]) * 1e6)\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "sys.exit(train.main(sys.argv[2:]))"
    )
    codes = []
    for more_mb in (5, 20, 40, 70, 120, 400):
        out = tmp_path / str(more_mb)
        process = child("-c", script, str(more_mb), *arguments(home, out, "--iters", "1", "--memory-budget", "none"))
        printed, err = process.communicate(timeout=120)
        codes.append(process.returncode)
        assert process.returncode in (0, 3), (more_mb, printed, err)
        if process.returncode == 3:
            (line,) = err.splitlines()
            named = "ulimit -d" in line and "smallest workable budget" in line
            assert named or "out of memory: can't start new thread" in line, line
            assert not out.exists()
    assert codes[0] == 3 and codes[-1] == 0 and codes == sorted(codes, reverse=True), codes
