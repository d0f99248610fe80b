"""Every table and figure of the paper, one after the other: `python -m bench.all --quick --out DIR` on small sizes.

Each is a command of its own (`python -m bench.NAME`) and writes NAME.csv, NAME.json and NAME.png under --out. One that
fails does not keep the others from running; the exit code is 1 then.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from bench import report

NAMES = {
    "step_table": "time and memory of a step, five shapes",
    "sequence_length": "memory and time by length",
    "decompression": "share of decompression",
    "per_layer": "Figure 2: memory and time layer by layer",
    "convergence": "Figure 1: exact gradients against MeZO",
    "zo_variants": "Figure 3: the zeroth-order family",
    "projection": "the iPhone proxy",
    "versus": "against mlx-lm's trainer and checkpointing",
}


def main() -> int:
    parser = report.parser("all", __doc__)
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=list(NAMES), help="some of them")
    parser.add_argument("--without", nargs="+", choices=list(NAMES), default=[], help="all but these")
    options = parser.parse_args()
    more = ["--quick"] if options.quick else []
    if options.out is not None:
        more += ["--out", str(options.out)]
    rows = []
    for name in options.only:
        if name in options.without:
            continue
        print(f"\n--- bench.{name}: {NAMES[name]}", flush=True)
        began_s = time.perf_counter()
        code, last = _run([sys.executable, "-m", f"bench.{name}", *more])
        seconds = round(time.perf_counter() - began_s, 1)
        works = code == 0 and last.get("bench") == name
        if not works:
            print(f"bench.{name}: failed (exit code {code})", file=sys.stderr, flush=True)
        rows.append({"name": name, "what": NAMES[name], "seconds": seconds, "exit_code": code, "works": works})
    print()
    print(report.table(["bench", "what", "s", ""], [[r["name"], r["what"], r["seconds"], _word(r)] for r in rows]))
    print(f"{sum(row['seconds'] for row in rows) / 60:.1f} minutes")
    report.write("all", options, rows)
    return 0 if all(row["works"] for row in rows) else 1


def _word(row: dict[str, object]) -> str:
    return "ok" if row["works"] else f"failed ({row['exit_code']})"


def _run(command: list[str]) -> tuple[int, dict[str, object]]:
    """Exit code and the last line's object; what is printed before it is passed on."""
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if last:
                print(last, end="", flush=True)
            last = line
    try:
        found = json.loads(last)
    except ValueError:
        print(last, end="", flush=True)
        found = {}
    return process.returncode, found if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
