"""The largest relative error of loss and LoRA gradients, compared with mlx-lm, by family: `python -m bench.parity`.

Models are small, random and float32. The reference is mlx-lm's model class under MLX's autograd.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mebp_mlx
from bench import report
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PROJECTIONS, Plan
from mebp_mlx.testing.reference import largest_error, mlx_lm_loss_and_grads
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, randomize_lora, write_model

PLANS = {
    "saved products": Plan(),
    "saved inputs": Plan(saved=SAVE_INPUTS),
    "32-row blocks": Plan(saved=SAVE_PROJECTIONS, weight_block_bytes=1, head_block_bytes=1, query_block=5),
}
QUANTIZATIONS = {"float32": None, "4-bit": {"group_size": 32, "bits": 4}, "8-bit": {"group_size": 32, "bits": 8}}


def errors(family: str, quantization: dict[str, Any] | None, seed: int) -> dict[str, float]:
    """The error of each plan for one random model."""
    config = CONFIGS[family] if quantization is None else packed_config(family)
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "model", config, seed=seed, quantization=quantization)
        model = mebp_mlx.open_model(path)
        lora = mebp_mlx.init_lora(model, rank=3, scale=2.0)
        randomize_lora(lora, seed)
        tokens, targets = random_batch(seed, 3, 17, model.spec.V)
        expected = mlx_lm_loss_and_grads(path, lora, tokens, targets)
        result = {}
        for name, plan in PLANS.items():
            loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
            result[name] = largest_error(loss.item(), grads, *expected)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.Parser("parity", __doc__)
    parser.add_argument("--seeds", type=report.positive, default=3, help="number of random models per row (default: 3)")
    shown = f"of {', '.join(CONFIGS)} (default: all)"
    parser.add_argument("--families", nargs="+", default=list(CONFIGS), choices=list(CONFIGS), metavar="F", help=shown)
    parser.add_argument("--weights", nargs="+", default=list(QUANTIZATIONS), choices=list(QUANTIZATIONS))
    options = parser.parse_args(argv)
    print(f"{'family':20}{'weights':>9}" + "".join(f"{name:>20}" for name in PLANS))
    worst: dict[str, dict[str, float]] = {}
    for family in options.families:
        for weights in options.weights:
            runs = [errors(family, QUANTIZATIONS[weights], seed) for seed in range(options.seeds)]
            row = {name: _largest([run[name] for run in runs]) for name in PLANS}
            worst[f"{family}, {weights}"] = row
            print(f"{family:20}{weights:>9}" + "".join(f"{error:20.1e}" for error in row.values()), flush=True)
    print(json.dumps({"bench": "parity", "seeds": options.seeds, "largest_relative_error": worst}))


def _largest(values: list[float]) -> float:
    """The maximum; NaN if any value is NaN."""
    return float("nan") if any(value != value for value in values) else max(values)


if __name__ == "__main__":
    report.run(main)
