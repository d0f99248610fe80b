"""The paper's Figure 3: MeZO, K-ZOO, HiZOO and FZOO against exact gradients, each with as many forward passes.

The same data, the same number of trials for a learning rate (bench/learning.py). HiZOO's alpha is its authors' 1e-8,
with which it is MeZO in all but price; K-ZOO's pool has 4,096 seeds, FZOO takes 8 directions a step.
"""

from __future__ import annotations

import argparse
import sys

from bench import learning, report
from mebp_mlx.config import ZEROTH_ORDER
from mebp_mlx.errors import UserError


def main() -> int:
    parser = report.parser("zo_variants", __doc__)
    learning.add_options(parser, grid_passes=360)
    parser.add_argument("--passes", type=int, default=720, help="forward passes of every run but MeBP's")
    parser.add_argument("--steps", type=int, default=100, help="of exact gradients")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.passes, options.seeds, options.grid_passes, options.eval_batches = 25, 54, 2, 18, 4
        options.rates = 3
    try:
        run(options)
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Grids and curves of all; table, files and picture."""
    task = learning.Task(options)
    n_steps = {"mebp": options.steps}
    n_steps |= {name: max(1, options.passes // learning.METHODS[name].passes) for name in ZEROTH_ORDER}
    trials, rows = learning.run_all(task, n_steps, options)
    names = list(n_steps)
    print(learning.summary(rows, names))
    about = report.context(options)
    plt = report.pyplot() if options.out else None
    if plt is not None:
        title = f"{options.model} model, {options.data} data, {options.batch_size} rows a step, {options.seeds} seeds"
        learning.draw(plt, rows, names, title, options.out / "zo_variants.png", about)
    report.write("zo_variants", options, rows, grid=trials)


if __name__ == "__main__":
    sys.exit(main())
