"""Processes that share a batch: `python -m bench distributed`. Seconds per step, scaling, bytes sent, waits, memory.

All processes run on one machine over loopback, one thread each; more processes than cores only measure crowding.
Speed-up is relative to one process with the whole batch; memory is compared with one process with a rank's own rows.
With --links (Linux, root) two processes run in network namespaces, connected by a link of a given rate. Figures for
more machines are computed from measured bytes and seconds, and marked as such.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import report

SHAPES = {"bundled": None, "qwen2.5-0.5b": 3}  # and its number of blocks; None: all
LINKS_GBIT = (1.0, 10.0)
MORE_MACHINES = (2, 4, 8, 64)
_WARM_STEPS = 2


def measure(folder: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """One rank's case in this process."""
    from bench.case import Stepper  # isort: skip  (before mlx: it loads the BLAS)
    from mebp_mlx.system.device import DTYPES
    from mebp_mlx.system.footprint import PeakMeter, footprint_bytes
    from mebp_mlx.system.group import connect

    group = connect()
    group.reduce_dtype = DTYPES[given["reduce_dtype"]]
    before_bytes = footprint_bytes()
    with PeakMeter() as meter:
        stepper = Stepper(
            folder,
            given["tokens"],
            group=group,
            batch_size=given["rows"],
            optimizer=given["optimizer"],
            memory_budget=given["memory_budget"],
        )
        seconds, waited_s, cpu_s = [], [], []
        for number in range(_WARM_STEPS + given["steps"]):
            group.gather(None)
            before_s, sent, began_s = group.waited_s, group.sent_bytes, time.process_time()
            seconds.append(stepper.timed_step(number))
            cpu_s.append(time.process_time() - began_s)
            waited_s.append(group.waited_s - before_s)
            sent_bytes = group.sent_bytes - sent
        stepper.close()
    group.close()
    return {
        "rank": group.rank,
        "before_mb": round(before_bytes / 1e6, 1),
        "peak_mb": round(meter.peak_bytes / 1e6, 1),
        "step_s": seconds[_WARM_STEPS:],
        "waited_s": waited_s[_WARM_STEPS:],
        "cpu_s": cpu_s[_WARM_STEPS:],
        "sent_bytes": sent_bytes,
        "gradient_bytes": 4 * stepper.n_parameters,
    }


def launch(n: int, *arguments: object, hosts: Sequence[str] = (), spaces: Sequence[str] = ()) -> Iterator[str]:
    """Starts one process of `python ARGUMENTS` per rank, one thread each; yields each one's standard output when it
    ends.

    hosts: their addresses (default: loopback); spaces: their network namespaces.
    """
    with tempfile.TemporaryDirectory() as scratch:
        processes = start(n, Path(scratch), *arguments, hosts=hosts, spaces=spaces)
        for process in processes:
            output, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"error: a rank failed with exit code {process.returncode}")
            yield output


def start(
    n: int, scratch: Path, *arguments: object, hosts: Sequence[str] = (), spaces: Sequence[str] = (), **options: Any
) -> list[subprocess.Popen[str]]:
    """The processes of `launch`, running. A single process gets no group."""
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(n)]
    places = [[f"{host}:{port}"] for host, port in zip(hosts or ["127.0.0.1"] * n, free, strict=True)]
    (scratch / "hosts.json").write_text(json.dumps(places))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")
    known = {**os.environ, **threads, "MLX_HOSTFILE": str(scratch / "hosts.json")}
    processes = []
    for rank in range(n):
        prefix = ["ip", "netns", "exec", spaces[rank]] if spaces else []
        command = [*prefix, sys.executable, *map(str, arguments)]
        about = {**known, "MLX_RANK": str(rank)} if n > 1 else {**os.environ, **threads}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=about, **options))
    return processes


def case(shape: str, n: int, folder: Path, given: Mapping[str, Any], **where: Any) -> dict[str, Any]:
    """n ranks on a batch: the slowest rank's median seconds per step, and the largest rank's peak."""
    lines = launch(n, "-m", "bench", "distributed", "--case", folder, json.dumps(given), **where)
    ranks = [json.loads(output.splitlines()[-1]) for output in lines]
    slowest = max(ranks, key=lambda rank: statistics.median(rank["step_s"]))
    seconds = report.spread(slowest["step_s"])
    return {
        "shape": shape,
        "processes": n,
        **given,
        "step_s": seconds,
        "cpu_s": round(max(statistics.median(rank["cpu_s"]) for rank in ranks), 4),
        "waiting": round(statistics.median(slowest["waited_s"]) / seconds["median"], 3),
        "sent_bytes": max(rank["sent_bytes"] for rank in ranks),
        "gradient_bytes": slowest["gradient_bytes"],
        "peak_mb": max(rank["peak_mb"] for rank in ranks),
        "before_mb": max(rank["before_mb"] for rank in ranks),
    }


@contextlib.contextmanager
def link(gbit: float) -> Iterator[tuple[list[str], list[str]]]:
    """(namespaces, addresses) of the two ends of a link with this rate. No delay is added to the kernel's own."""

    def ip(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True)

    tag = f"mebp{os.getpid()}"
    spaces, hosts = [f"{tag}-{end}" for end in "ab"], ["10.77.0.1", "10.77.0.2"]
    ends = [f"{tag[-8:]}{end}" for end in "ab"]
    try:
        for space in spaces:
            ip("ip", "netns", "add", space)
        ip("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for space, end, host in zip(spaces, ends, hosts, strict=True):
            ip("ip", "link", "set", end, "netns", space)
            inside = ("ip", "netns", "exec", space)
            ip(*inside, "ip", "addr", "add", f"{host}/24", "dev", end)
            ip(*inside, "ip", "link", "set", end, "up")
            ip(*inside, "ip", "link", "set", "lo", "up")
            rate = ("rate", f"{gbit}gbit", "burst", "256kb", "latency", "50ms")
            ip(*inside, "tc", "qdisc", "add", "dev", end, "root", "tbf", *rate)
        yield spaces, hosts
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def kills(n_runs: int) -> dict[str, Any]:
    """Kills one of two ranks of a run of the bundled model, each time later; the other must end with exit code 1 and
    one line, and a resumed run of one process must continue.
    """
    whole, seconds = 0, []
    for number in range(n_runs):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            options = ["--adapter-path", out, "--save-every", "2", "--val-batches", "0", "--iters", "100000"]
            processes = start(2, Path(scratch), "-m", "mebp_mlx.train", *options, stderr=subprocess.PIPE)
            until = time.monotonic() + 120
            while not (out / "adapter_config.json").exists() and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.05 * number)
            gone = number % 2
            processes[gone].send_signal(signal.SIGKILL)
            began_s = time.monotonic()
            _, error = processes[1 - gone].communicate(timeout=120)
            seconds.append(time.monotonic() - began_s)
            processes[gone].communicate()
            lines = [line for line in error.splitlines() if line.startswith("error:")]
            more = [sys.executable, "-m", "mebp_mlx.train", "--resume", "--adapter-path", str(out), "--iters"]
            done = json.loads((out / "adapter_config.json").read_text())["iters"]
            resumed = subprocess.run([*more, str(done + 4)], capture_output=True, text=True)
            is_whole = processes[1 - gone].returncode == 1 and len(lines) == 1 and resumed.returncode == 0
            if not is_whole:
                codes = f"exit codes {processes[1 - gone].returncode} and, resumed, {resumed.returncode}"
                print(f"kill {number}: {codes}; {error.strip()}; {resumed.stderr.strip()}", flush=True)
            whole += is_whole
    return {"killed": n_runs, "ended_and_resumed": whole, "slowest_end_s": round(max(seconds), 2)}


def projected(row: Mapping[str, Any], machines: int, gbit: float, factor: float = 1.0) -> dict[str, Any]:
    """Computed, not measured: a batch of `rows` per machine, whose sums travel while blocks are computed.

    row: the figures of one process with that many rows. A ring sends 2 (n - 1) / n of the gradients; they travel during
    the backward pass, two thirds of a step, and the excess is waited for. factor: multiplies the bytes, 0.5 for
    bfloat16.
    """
    compute_s = row["step_s"]["median"]
    travel_s = 2 * (machines - 1) / machines * row["gradient_bytes"] * factor * 8 / (gbit * 1e9)
    step_s = compute_s + max(0.0, travel_s - compute_s * 2 / 3)
    return {"machines": machines, "gbit": gbit, "step_s": step_s, "speed_up": machines * compute_s / step_s}


def draw(plt: Any, rows: report.Rows, options: Any) -> tuple[Any, str]:
    """Speed-up by the number of processes; measured links as points."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    plain = [row for row in rows if "link_gbit" not in row and row["kind"] == "whole batch"]
    for shape in dict.fromkeys(row["shape"] for row in plain):
        own = [row for row in plain if row["shape"] == shape and row["reduce_dtype"] == "float32"]
        axes.plot([row["processes"] for row in own], [row["speed_up"] for row in own], "o-", label=shape)
        for row in rows:
            if row["shape"] == shape and "link_gbit" in row:
                label = f"{shape}, {row['link_gbit']:g} Gbit/s"
                axes.plot(row["processes"], row["speed_up"], "x", label=label)
    most = max(row["processes"] for row in plain)
    axes.plot([1, most], [1, most], color="0.7", linewidth=1, label="linear")
    axes.set(xlabel="processes, one thread each", ylabel="speed-up over one process")
    axes.legend(fontsize=7)
    return figure, "one machine: more processes than cores crowd each other"


def _measured(options: Any, models: Path) -> list[dict[str, Any]]:
    rows = []
    for shape in options.shapes:
        folder = report.model_of(shape, models, SHAPES[shape]) if shape != "bundled" else Path("bundled")
        given = {"tokens": options.tokens, "rows": options.rows, "steps": options.steps, "optimizer": "adam",
                 "memory_budget": "none", "reduce_dtype": "float32"}  # fmt: skip
        alone = case(shape, 1, folder, given)
        alone_s = alone["step_s"]["median"]
        rows.append({"kind": "whole batch", **alone, "speed_up": 1.0})
        for n in options.processes:
            if n == 1:
                continue
            own = case(shape, 1, folder, {**given, "rows": -(-options.rows // n)})
            rows.append({"kind": f"a rank's rows of {n}, alone", **own})
            for dtype in ("float32", "bfloat16"):
                row = case(shape, n, folder, {**given, "reduce_dtype": dtype})
                more = {"speed_up": round(alone_s / row["step_s"]["median"], 2)}
                more["more_mb"] = round(row["peak_mb"] - own["peak_mb"], 1)
                rows.append({"kind": "whole batch", **row, **more})
        for gbit in LINKS_GBIT if options.links else ():
            with link(gbit) as (spaces, hosts):
                row = case(shape, 2, folder, given, hosts=hosts, spaces=spaces)
            more = {"link_gbit": gbit, "speed_up": round(alone_s / row["step_s"]["median"], 2)}
            rows.append({"kind": "whole batch", **row, **more})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser("distributed", __doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--processes", nargs="+", type=report.positive, default=[1, 2, 4])
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--rows", type=report.positive, default=4, help="of a batch (default: 4)")
    parser.add_argument("--steps", type=report.positive, default=10)
    parser.add_argument("--links", action="store_true", help="also over links of 1 and 10 Gbit/s (Linux, root)")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill one of two ranks N times, and resume")
    report.add_models(parser)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.case:
        from mebp_mlx.weights.hub import resolve_model

        print(json.dumps(measure(str(resolve_model(options.case[0])), json.loads(options.case[1]))))
        return
    if options.quick:
        options.shapes, options.processes, options.steps = ["bundled"], [1, 2], 3
    if options.links and (not sys.platform.startswith("linux") or os.geteuid() != 0):
        report.refuse("--links: needs Linux's network namespaces, and root")
    with tempfile.TemporaryDirectory() as scratch:
        rows = _measured(options, options.models or Path(scratch))
    heads = [
        "shape",
        "processes",
        "sent as",
        "Gbit/s",
        "s/step",
        "CPU s",
        "speed-up",
        "MB sent",
        "waiting",
        "peak MB",
        "more MB",
    ]
    lines = []
    for row in rows:
        sent = [row["reduce_dtype"], row.get("link_gbit", "")] if row["processes"] > 1 else ["", ""]
        what = f"{row['shape']}" if row["kind"] == "whole batch" else f"{row['shape']} ({row['rows']} rows)"
        numbers = [
            row["step_s"]["median"],
            row["cpu_s"],
            row.get("speed_up"),
            round(row["sent_bytes"] / 1e6, 3),
            row["waiting"],
        ]
        lines.append([what, row["processes"], *sent, *numbers, row["peak_mb"], row.get("more_mb", "")])
    print(report.table(heads, lines))
    arithmetic = []
    for row in rows:
        if row["processes"] == 1 and row["kind"] == "whole batch":
            arithmetic += [{"shape": row["shape"], **projected(row, n, g)} for g in LINKS_GBIT for n in MORE_MACHINES]
    heads = ["arithmetic", "machines", "Gbit/s", "step s", "speed-up"]
    print(report.table(heads, [[round(v, 3) if isinstance(v, float) else v for v in a.values()] for a in arithmetic]))
    more: dict[str, Any] = {"arithmetic": arithmetic}
    if options.kills:
        more["kills"] = kills(options.kills)
        print(more["kills"])
    report.publish("distributed", options, rows, draw, **more)


PICTURES = {"distributed": draw}

if __name__ == "__main__":
    report.run(main)
