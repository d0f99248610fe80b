"""`python -m bench.parity`: the largest relative error of loss and LoRA gradients against mlx-lm, family by family.

Small random models in float32; the reference is mlx-lm's own model class under MLX's autograd.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import mebp_mlx
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PROJECTIONS, Plan

PLANS = {
    "saved products": Plan(),
    "saved inputs": Plan(saved=SAVE_INPUTS),
    "32-row blocks": Plan(saved=SAVE_PROJECTIONS, weight_block_bytes=1, head_block_bytes=1, query_block=5),
}
PACKINGS = {"float32": None, "4-bit": {"group_size": 32, "bits": 4}, "8-bit": {"group_size": 32, "bits": 8}}


def main() -> None:
    from mebp_mlx.testing.reference import largest_error, mlx_lm_loss_and_grads
    from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, randomize_lora, write_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="random models per row (default: 3)")
    options = parser.parse_args()
    print(f"{'family':20}{'weights':>9}" + "".join(f"{name:>20}" for name in PLANS))
    worst: dict[str, dict[str, float]] = {}
    for family in CONFIGS:
        for packing, quantization in PACKINGS.items():
            errors = dict.fromkeys(PLANS, 0.0)
            for seed in range(options.seeds):
                config = CONFIGS[family] if quantization is None else packed_config(family)
                with tempfile.TemporaryDirectory() as folder:
                    path = write_model(Path(folder) / "model", config, seed=seed, quantization=quantization)
                    model = mebp_mlx.open_model(path)
                    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0)
                    randomize_lora(lora, seed)
                    tokens, targets = random_batch(seed, 3, 17, model.spec.V)
                    expected = mlx_lm_loss_and_grads(path, lora, tokens, targets)
                    for name, plan in PLANS.items():
                        loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
                        error = largest_error(loss.item(), grads, *expected)
                        errors[name] = max(errors[name], error) if error == error else float("nan")
            worst[f"{family}, {packing}"] = errors
            print(f"{family:20}{packing:>9}" + "".join(f"{errors[name]:20.1e}" for name in PLANS), flush=True)
    print(json.dumps({"bench": "parity", "seeds": options.seeds, "largest_relative_error": worst}))


if __name__ == "__main__":
    main()
