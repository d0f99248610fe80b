"""`python -m bench.plan_check`: predicted against measured peak footprint over a grid of cases.

Each case trains a few steps in a process of its own, on a model of a real shape with three blocks and random
weights (the footprint grows with the number of blocks only by LoRA and optimizer state).
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

POLICIES = {"products": "SAVE_PRODUCTS", "inputs": "SAVE_INPUTS"}
BLOCKS = {
    "default": {},
    "small": {
        "weight_block_bytes": 1 << 20,
        "head_block_bytes": 2 << 20,
        "logits_block_bytes": 1 << 20,
        "token_block": 64,
        "query_block": 32,
    },
}


@dataclass(frozen=True)
class Case:
    """What is trained, and how it is cut; budget_mb: the plan that fits it instead of policy and blocks."""

    shape: str
    T: int
    B: int = 1
    optimizer: str = "sgd"
    policy: str = "products"
    blocks: str = "default"
    engine: str = "mebp"
    dropout: float = 0.0
    budget_mb: int = 0
    dtype: str = "float32"
    weights: str = "decompressed"


def measure(folder: str, case: Case, n_steps: int = 2) -> dict[str, Any]:
    """One case, in this process: bytes predicted and measured, by phase; MLX's own count of arrays beside them."""
    import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np

    from mebp_mlx.data import Batch
    from mebp_mlx.engine import backprop, make_engine, plan
    from mebp_mlx.engine.choose import choose_plan
    from mebp_mlx.engine.job import job_for
    from mebp_mlx.engine.predict import predict
    from mebp_mlx.engine.update import Updater
    from mebp_mlx.engine.zeroth_order import make_estimator
    from mebp_mlx.optimizers import PlainSGD, state_bytes
    from mebp_mlx.runtime.footprint import PeakMeter, footprint_bytes

    before = footprint_bytes()
    arrays: dict[str, int] = {}
    with PeakMeter() as meter:

        def phase(owner: Any, attribute: str, name: str) -> None:
            plain = getattr(owner, attribute)

            def timed(*args: Any, **kwargs: Any) -> Any:
                mx.reset_peak_memory()
                with meter.phase(name):
                    found = plain(*args, **kwargs)
                    mx.synchronize()
                arrays[name] = max(arrays.get(name, 0), mx.get_peak_memory())
                return found

            setattr(owner, attribute, timed)

        phase(backprop.BlockRunner, "forward", "forward")
        phase(backprop, "embed_tiles", "forward")
        phase(backprop.head, "run", "head")
        phase(backprop.BlockRunner, "backward", "backward")
        phase(Updater, "sink", "update")
        model = mebp_mlx.open_model(folder, case.dtype, case.weights)
        lora = mebp_mlx.init_lora(model, dropout=case.dropout)
        optimizers = {"sgd": PlainSGD, "adamw": optim.AdamW}
        updater = Updater(optimizers[case.optimizer](learning_rate=1e-4), lora, park=case.engine == "mebp")
        state = state_bytes(updater.optimizer)  # nothing where it is parked
        job = job_for(
            model,
            lora,
            case.B,
            case.T,
            base_bytes=before,
            state_bytes=state,
            optimizer=case.optimizer,
            engine=case.engine,
        )
        if case.budget_mb:
            chosen = choose_plan(job, case.budget_mb * 1_000_000)
        else:
            chosen = plan.Plan(saved=getattr(plan, POLICIES[case.policy]), **BLOCKS[case.blocks])
        predicted = predict(job, chosen)
        zeroth = case.engine != "mebp"
        estimator = make_estimator(case.engine, lora, seed=0, eps=1e-2) if zeroth else None
        engine = make_engine(case.engine, model, lora, plan=chosen, estimator=estimator)
        rng = np.random.default_rng(0)
        tokens, targets = rng.integers(0, model.spec.V, (2, case.B, case.T)).astype(np.int32)
        batch = Batch(tokens, targets, rows=("random",) * case.B, n_labels=tokens.size)
        engine.reserve(case.B, case.T)
        start = meter.mark()
        for step in range(n_steps):
            updater.begin_step()
            engine.step(batch, step=step, micro=0, n_labels=tokens.size, sink=updater.sink)
            updater.end_step()
        peak = meter.peak_bytes
        engine.close()
    lora_and_state = job.lora_bytes + job.state_bytes
    return {
        "before": before,
        "measured": {"start": start, **meter.phases},
        "arrays": {name: n - lora_and_state for name, n in arrays.items()},
        "left_after": footprint_bytes() - before,
        "peak": peak,
        "predicted": predicted.phases,
        "predicted_peak": predicted.peak_bytes,
        "arena_bytes": predicted.arena_bytes,
    }


def grid(quick: bool) -> list[Case]:
    """The cases."""
    small, wide, gemma = "qwen2.5-0.5b", "qwen2.5-1.5b", "gemma3-1b"
    if quick:
        return [Case(small, 64), Case(small, 256, optimizer="adamw"), Case(gemma, 256, policy="inputs")]
    cases = [Case(small, T, B) for T, B in ((64, 1), (256, 1), (256, 4), (1024, 1), (2048, 1))]
    cases += [Case(small, 256, 1, "adamw"), Case(small, 256, 1, engine="mezo"), Case(small, 256, dropout=0.1)]
    shapes = itertools.product((small, gemma), (256, 1024), ("default", "small"))
    cases += [Case(shape, T, policy="inputs", blocks=blocks) for shape, T, blocks in shapes]
    cases += [Case(shape, T) for shape, T in itertools.product((wide, gemma), (64, 256, 1024))]
    cases += [Case(shape, T, blocks="small") for shape, T in itertools.product((small, wide, gemma), (256, 2048))]
    cases += [Case(gemma, 256, 2, "adamw", blocks="small"), Case(wide, 128, 4, "adamw")]
    budgets = ((small, 256, 60), (small, 2048, 1000), (small, 2048, 100), (wide, 1024, 1000), (gemma, 1024, 100))
    cases += [Case(shape, T, budget_mb=budget) for shape, T, budget in budgets]
    # What Metal computes with; slow on a CPU, so short.
    cases += [Case(small, 48, dtype="bfloat16", weights=weights) for weights in ("packed", "decompressed")]
    cases += [Case(small, 48, weights="packed")]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases")
    parser.add_argument("--models", type=Path, help="keep the random models in this folder (default: a temporary one)")
    parser.add_argument("--phases", action="store_true", help="phase by phase")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case[0], Case(**json.loads(options.case[1])))))
        return

    from bench.synth import write_model

    results, worst = [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'case':58}{'predicted':>10}{'measured':>10}{'MB off by':>11}  peak phase", flush=True)
        for case in grid(options.quick):
            folder = (options.models or Path(scratch)) / case.shape
            if not (folder / "config.json").exists():
                write_model(case.shape, folder, layers=3)
            command = [sys.executable, "-m", "bench.plan_check", "--case", str(folder), json.dumps(asdict(case))]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(run.stdout.splitlines()[-1])
            off = found["predicted_peak"] / found["peak"] - 1
            worst = max(worst, abs(off), key=abs)
            plan = f"--memory-budget {case.budget_mb}MB" if case.budget_mb else f"{case.policy} {case.blocks}"
            text = f"{case.shape} T={case.T} B={case.B} {case.optimizer} {plan}"
            text += f" {case.dtype} {case.weights}" * (case.dtype != "float32" or case.weights == "packed")
            text += f" {case.engine}" * (case.engine != "mebp") + f" dropout {case.dropout}" * (case.dropout > 0)
            by_phase = max(found["predicted"], key=found["predicted"].get)
            print(
                f"{text:58}{found['predicted_peak'] / 1e6:10.1f}{found['peak'] / 1e6:10.1f}{off:+11.1%}  {by_phase}",
                flush=True,
            )
            if options.phases:
                for name, n_bytes in found["predicted"].items():
                    seen, arrays = found["measured"].get(name, 0), found["arrays"].get(name, 0)
                    print(f"    {name:10}{n_bytes / 1e6:8.1f}{seen / 1e6:8.1f}   arrays {arrays / 1e6:8.1f}")
            results.append({**asdict(case), **found, "relative_difference": round(off, 4)})
    print(json.dumps({"bench": "plan_check", "largest_relative_difference": round(worst, 4), "results": results}))


if __name__ == "__main__":
    main()
