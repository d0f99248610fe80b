"""The paper's Figure 3: MeZO, K-ZOO, HiZOO and FZOO against exact gradients, each with as many forward passes.

The same data, the same number of trials for a learning rate (bench/learning.py). HiZOO's alpha is its authors' 1e-8,
with which it is MeZO in all but price; K-ZOO's pool has 4,096 seeds, FZOO takes 8 directions a step.
"""

from __future__ import annotations

from bench import learning, report
from mebp_mlx.config import ZEROTH_ORDER


def main() -> None:
    parser = report.parser("zo_variants", __doc__)
    learning.add_options(parser, grid_passes=720)
    parser.add_argument("--passes", type=report.positive, default=720, help="forward passes of every run but MeBP's")
    parser.add_argument("--steps", type=report.positive, default=100, help="of exact gradients")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.passes, options.seeds, options.grid_passes, options.eval_batches = 25, 54, 2, 18, 4
        options.rates = 3
    n_steps = {"mebp": options.steps}
    n_steps |= {name: max(1, options.passes // learning.METHODS[name].passes) for name in ZEROTH_ORDER}
    learning.command("zo_variants", options, n_steps)


if __name__ == "__main__":
    main()
