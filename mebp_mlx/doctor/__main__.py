"""`python -m mebp_mlx.doctor`: describes this machine and checks everything that the trainer relies on.

Prints one row per finding: "ok", "note" (works, but could be better), "FAIL", or "-" (does not apply to this machine).
Exit code 0, or 1 if a row is FAIL. --json prints the rows as one JSON object. Instead of the general checks, --model
inspects a checkpoint, --probe measures (probes.py), and --kernels checks and times every kernel at every size
(kernels.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain

from ..kernels import selfcheck
from ..system import allocator
from ..system.command import DONE, FAILED, run_command
from ..system.machine import load_blas, machine
from ..system.version import __version__
from . import checks
from .checks import Finding


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chosen checks, prints their findings, and returns 0, or 1 if something does not work."""
    parser = argparse.ArgumentParser(
        prog="python -m mebp_mlx.doctor", description="Checks this machine: device, memory meter, BLAS, kernels."
    )
    parser.add_argument("--version", action="version", version=f"mebp_mlx {__version__}", help="print the version")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--model", metavar="M", help="list which tensors of a model are used in place or copied")
    parser.add_argument("--probe", action="store_true", help="take five measurements of footprint, waits and products")
    parser.add_argument("--kernels", action="store_true", help="check and time each Metal kernel at every size")
    options = parser.parse_args(argv)
    return run_command(lambda _: examine(_chosen(options), options.json), "interrupted")


def _chosen(options: argparse.Namespace) -> list[Iterator[Finding]]:
    if options.model or options.probe or options.kernels:
        chosen = [checks.check_model(options.model)] if options.model else []
        chosen += [checks.check_probes()] if options.probe else []
        return chosen + ([checks.check_kernels(every=True), checks.check_attention()] if options.kernels else [])
    general = (
        checks.check_device,
        checks.check_memory,
        checks.check_blas,
        checks.check_meter,
        checks.check_files,
        checks.check_saves,
        checks.check_kernels,
    )
    return [check() for check in general]


def examine(examinations: list[Iterator[Finding]], as_json: bool) -> int:
    """Prints each finding as soon as it is known, or all of them as JSON; returns the exit code."""
    selfcheck.mode()
    load_blas()
    allocator.settle()
    findings: list[Finding] = []
    for finding in chain.from_iterable(examinations):
        findings.append(finding)
        if not as_json:
            _print_row(finding, findings)
    failed = any(finding.state == checks.FAIL for finding in findings)
    if as_json:
        rows = [asdict(finding) for finding in findings]
        print(json.dumps({"ok": not failed, "machine": machine(), "findings": rows}))
    else:
        print("something does not work: see FAIL above" if failed else "everything that applies to this machine works")
    return FAILED if failed else DONE


def _print_row(finding: Finding, so_far: list[Finding]) -> None:
    group = finding.group if all(row.group != finding.group for row in so_far[:-1]) else ""
    print(f"{group:<10}{finding.what:<42}{finding.state:<6}{finding.detail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
