"""The largest relative error of loss and LoRA gradients, compared with mlx-lm, by family: `python -m bench.parity`.

Models are small, random and float32. The reference is mlx-lm's model class under MLX's autograd. A model whose error
exceeds the tolerance is compared with the same class in float64: its error must not exceed that of mlx-lm's float32 by
more than the tolerance.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx

from bench import report
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PROJECTIONS, Plan
from mebp_mlx.testing.reference import largest_error, mlx_lm_loss_and_grads
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, randomize_lora, write_model

PLANS = {
    "saved products": Plan(),
    "saved inputs": Plan(saved=SAVE_INPUTS),
    "32-row blocks": Plan(saved=SAVE_PROJECTIONS, weight_block_bytes=1, head_block_bytes=1, query_block=5),
}
TOLERANCE = 1e-5  # of the largest entry
FLOAT64 = ("float64: ours", "mlx-lm's")
QUANTIZATIONS = {"float32": None, "4-bit": {"group_size": 32, "bits": 4}, "8-bit": {"group_size": 32, "bits": 8}}


def errors(family: str, quantization: dict[str, Any] | None, seed: int) -> dict[str, float]:
    """The error of each plan for one random model; above the tolerance also FLOAT64: the errors of the worst plan and
    of mlx-lm's float32, compared with float64.
    """
    config = CONFIGS[family] if quantization is None else packed_config(family)
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "model", config, seed=seed, quantization=quantization)
        model = mebp_mlx.open_model(path)
        lora = mebp_mlx.init_lora(model, rank=3, scale=2.0)
        randomize_lora(lora, seed)
        tokens, targets = random_batch(seed, 3, 17, model.spec.V)
        expected = mlx_lm_loss_and_grads(path, lora, tokens, targets)
        ours = {}
        for name, plan in PLANS.items():
            loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
            ours[name] = loss.item(), grads
        result = {name: largest_error(*actual, *expected) for name, actual in ours.items()}
        if not _largest(list(result.values())) <= TOLERANCE:
            truth = mlx_lm_loss_and_grads(path, lora, tokens, targets, mx.float64)
            result[FLOAT64[0]] = _largest([largest_error(*actual, *truth) for actual in ours.values()])
            result[FLOAT64[1]] = largest_error(*expected, *truth)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = report.Parser("parity", __doc__)
    parser.add_argument("--seeds", type=report.positive, default=3, help="number of random models per row (default: 3)")
    shown = f"of {', '.join(CONFIGS)} (default: all)"
    parser.add_argument("--families", nargs="+", default=list(CONFIGS), choices=list(CONFIGS), metavar="F", help=shown)
    parser.add_argument("--weights", nargs="+", default=list(QUANTIZATIONS), choices=list(QUANTIZATIONS))
    options = parser.parse_args(argv)
    columns = (*PLANS, *FLOAT64)
    print(f"{'family':20}{'weights':>9}" + "".join(f"{name:>16}" for name in columns))
    worst: dict[str, dict[str, float]] = {}
    wrong: list[str] = []
    for family in options.families:
        for weights in options.weights:
            runs = [errors(family, QUANTIZATIONS[weights], seed) for seed in range(options.seeds)]
            found = {name: [run[name] for run in runs if name in run] for name in columns}
            row = worst[f"{family}, {weights}"] = {name: _largest(of) for name, of in found.items() if of}
            if not all(run[FLOAT64[0]] <= run[FLOAT64[1]] + TOLERANCE for run in runs if FLOAT64[0] in run):
                wrong.append(f"{family}, {weights}")
            cells = (f"{row[name]:16.1e}" if name in row else f"{'-':>16}" for name in columns)
            print(f"{family:20}{weights:>9}" + "".join(cells), flush=True)
    print(f"further from float64 than mlx-lm by more than {TOLERANCE:g}: {'; '.join(wrong) or 'none'}")
    print(json.dumps({"bench": "parity", "seeds": options.seeds, "largest_relative_error": worst, "wrong": wrong}))
    return 1 if wrong else 0


def _largest(values: list[float]) -> float:
    """The maximum; NaN if any value is NaN."""
    return float("nan") if any(value != value for value in values) else max(values)


if __name__ == "__main__":
    report.run(main)
