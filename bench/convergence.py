"""The paper's Figure 1: exact gradients against MeZO, on the same data, by steps, by forward passes and by seconds.

Offline: the bundled model on the bundled text. With a network, the paper's own data:

    python -m bench.convergence --model mlx-community/Qwen2.5-0.5B-4bit --data Salesforce/wikitext:wikitext-2-raw-v1

(needs `datasets`). Learning rates: bench/learning.py. The paper's finding, on WikiText-2: first order improves clearly
within 100 steps; zeroth order hardly moves in 1,000 and is still behind after 100,000.
"""

from __future__ import annotations

import argparse
import sys

from bench import learning, report
from mebp_mlx.errors import UserError


def main() -> int:
    parser = report.parser("convergence", __doc__)
    learning.add_options(parser, grid_passes=1000)
    parser.add_argument("--steps", type=int, default=200, help="of exact gradients")
    parser.add_argument("--zo-steps", type=int, default=1000, help="of MeZO")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.zo_steps, options.seeds, options.grid_passes, options.eval_batches = 25, 50, 2, 12, 4
        options.rates = 3
    try:
        run(options)
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Both methods' grids and curves; table, files and picture."""
    task = learning.Task(options)
    names = ["mebp", "mezo"]
    trials, rows = learning.run_all(task, {"mebp": options.steps, "mezo": options.zo_steps}, options)
    print(learning.summary(rows, names))
    exact, zeroth = (learning.at_step(rows, name, options.steps) for name in names)
    print(
        f"after {options.steps} steps each: MeBP {exact:.3f}, MeZO {zeroth:.3f}; after {options.zo_steps:,} of MeZO's: "
        f"{learning.at_step(rows, 'mezo', options.zo_steps):.3f}. The paper: first order improves clearly within 100 "
        "steps, zeroth order hardly in 1,000"
    )
    about = report.context(options)
    plt = report.pyplot() if options.out else None
    if plt is not None:
        title = f"{options.model} model, {options.data} data, {options.batch_size} rows a step, {options.seeds} seeds"
        learning.draw(plt, rows, names, title, options.out / "convergence.png", about)
    report.write("convergence", options, rows, grid=trials)


if __name__ == "__main__":
    sys.exit(main())
