"""The paper's Figure 1: exact gradients against MeZO, on the same data, by steps, by forward passes and by seconds.

Offline: the bundled model on the bundled text. With a network, the paper's own data:

    python -m bench.convergence --model mlx-community/Qwen2.5-0.5B-4bit --data Salesforce/wikitext:wikitext-2-raw-v1

(needs `datasets`). Learning rates: bench/learning.py. The paper's finding, on WikiText-2: first order improves clearly
within 100 steps; zeroth order hardly moves in 1,000 and is still behind after 100,000.
"""

from __future__ import annotations

from bench import learning, report


def main() -> None:
    parser = report.parser("convergence", __doc__)
    learning.add_options(parser, grid_passes=2000)
    parser.add_argument("--steps", type=report.positive, default=200, help="of exact gradients")
    parser.add_argument("--zo-steps", type=report.positive, default=1000, help="of MeZO")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.zo_steps, options.seeds, options.grid_passes, options.eval_batches = 25, 50, 2, 12, 4
        options.rates = 3
    learning.command("convergence", options, {"mebp": options.steps, "mezo": options.zo_steps})


if __name__ == "__main__":
    main()
