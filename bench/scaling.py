"""`python -m bench.scaling`: the footprint of a step against the number of layers, and against the sequence's length.

Each case is bench.step_case's, in a process of its own: SGD, batch 1, seven projections, float32, random weights. Flat
in layers means: the peak grows by the LoRA parameters alone. `must` is what the project asks of the 0.5B shape.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from bench import report
from bench.stepper import add_memory_budget, plan_line
from mebp_mlx.testing.synth import SHAPES

MUST_MB = {1024: 160, 4096: 320, 8192: 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, nargs="*", default=[3, 6, 12, 24], help="at T = 256")
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024, 4096, 8192], help="at --depth layers")
    parser.add_argument("--depth", type=int, help="layers of the cases over --tokens (default: all)")
    parser.add_argument("--rank", type=report.positive, default=8)
    add_memory_budget(parser)
    options = parser.parse_args()
    how = ("--rank", options.rank, "--steps", 0, "--memory-budget", options.memory_budget)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'layers':>7}{'T':>7}{'peak MB':>9}{'less LoRA':>11}{'must':>6}{'step s':>9}  plan", flush=True)
        cases = [(n_layers, 256) for n_layers in options.layers]
        cases += [(options.depth, T) for T in options.tokens if (options.depth, T) not in cases]
        for n_layers, T in cases:
            folder = report.model_of(options.shape, Path(scratch), n_layers)
            config = json.loads((folder / "config.json").read_text())
            depth = config.get("text_config", config)["num_hidden_layers"]
            found = report.run_module("bench.step_case", folder, "--tokens", T, *how)
            less_lora = found["peak_mb"] - 4e-6 * found["n_lora_parameters"]
            must = MUST_MB.get(T, "") if options.shape == "qwen2.5-0.5b" else ""
            print(
                f"{depth:7}{T:7}{found['peak_mb']:9.1f}{less_lora:11.1f}{must:>6}{found['first_step_s']:9.1f}"
                f"  {plan_line(found['plan'])}",
                flush=True,
            )
            results.append({"layers": depth, "peak_less_lora_mb": round(less_lora, 1), **found})
    sizes = {"shape": options.shape, "rank": options.rank, "memory_budget": options.memory_budget}
    print(json.dumps({"bench": "scaling", **sizes, "results": results}))


if __name__ == "__main__":
    main()
