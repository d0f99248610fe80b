"""Prefetching requests the next block's pages in time, and nothing else."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.engine import make_engine
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, write_model
from mebp_mlx.weights.safetensors import MappedWeights


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_prefetches_every_block_and_the_head(
    tmp_path: Path, packed: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    threads: set[str] = set()
    plain = MappedWeights.advise

    def advise(weights: MappedWeights, name: str, start: int = 0, stop: int | None = None) -> None:
        asked.append(name)
        threads.add(threading.current_thread().name)
        plain(weights, name, start, stop)

    monkeypatch.setattr(MappedWeights, "advise", advise)
    config = packed_config("qwen2") if packed else CONFIGS["qwen2"]
    quantization = {"group_size": 32, "bits": 4} if packed else None
    model = mebp_mlx.open_model(write_model(tmp_path / "model", config, seed=seed, quantization=quantization))
    lora = mebp_mlx.init_lora(model)
    engine = make_engine("mebp", model, lora)
    tokens, targets = random_batch(seed, 1, 8, model.spec.V)

    class Batch:
        pass

    batch = Batch()
    batch.tokens, batch.targets = tokens, targets  # type: ignore[attr-defined]
    engine.step(batch, step=0, micro=0, n_labels=int((np.asarray(targets) != -100).sum()), sink=lambda g: None)
    engine.ahead.wait()
    engine.close()
    per_block = [
        {name for name in model.weights.names if name.startswith(f"{layer.prefix}.")} for layer in model.spec.layers
    ]
    wanted = [{n for n in names if "norm" not in n and not n.endswith("proj.bias")} for names in per_block]
    head = {n for n in model.weights.names if n.startswith(model.spec.head.name)}
    # Forward: the second to the last block, then the head; backward: the last but one to the first.
    turns = [*wanted[1:], head, *wanted[-2::-1]]
    sizes = [len(turn) for turn in turns]
    ends = np.cumsum([0, *sizes])
    assert [set(asked[a:b]) for a, b in pairwise(ends)] == turns and len(asked) == ends[-1]
    assert threading.main_thread().name not in threads
    assert engine.evaluate(batch)[1] > 0  # also after close()
    engine.close()
