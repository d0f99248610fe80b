"""Runs on several machines (processes over loopback): the same adapters on each, equal to those of one machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx import train
from mebp_mlx.data.dataset import Batch
from mebp_mlx.errors import PeerFailed, PeerLost, UserError
from mebp_mlx.system.group import Group, connect
from mebp_mlx.training.checkpoint import load_checkpoint
from mebp_mlx.training.distributed import Deal, check_alike, shares
from tests.runs import ROOT, arguments, events, losses

CASES: dict[str, list[str]] = {
    "adam": ["--test"],
    "sgd: accumulation, clipping, dropout, decay": [
        "--grad-accumulation-steps", "3", "--iters", "6", "--max-grad-norm", "0.5", "--dropout", "0.3",
        "--lr-decay", "cosine", "--optimizer", "sgd",
    ],
    "dropout, small budget": ["--dropout", "0.3", "--memory-budget", "min", "--optimizer", "adamw"],
    "lion, fewer rows than machines": ["--optimizer", "lion", "--batch-size", "1", "--learning-rate", "1e-3"],
    "muon, ragged": ["--optimizer", "muon", "--batch-size", "3"],
    "adafactor": ["--optimizer", "adafactor"],
    "sgd: whole graph": ["--optimizer", "sgd", "--engine", "whole-graph", "--dropout", "0.2"],
    "dora, few keys": ["--fine-tune-type", "dora", "--keys", "self_attn.q_proj", "--num-layers", "1"],
    "mezo": ["--engine", "mezo", "--learning-rate", "1e-4", "--dropout", "0.2"],
    "kzoo": ["--engine", "kzoo", "--learning-rate", "1e-4", "--kzoo-pro", "--kzoo-seeds", "8"],
    "hizoo": ["--engine", "hizoo", "--learning-rate", "1e-4"],
    "fzoo": ["--engine", "fzoo", "--learning-rate", "1e-4", "--fzoo-samples", "2", "--grad-accumulation-steps", "2"],
}  # fmt: skip
# Runs that end with an error: the exit code, the rank that reports it, and part of its message.
REFUSED = {
    "options": (2, 0, "--learning-rate: rank 1 has 0.11, rank 0 has 0.01"),
    "model": (2, 0, "--model: rank 1 has "),
    "data": (2, 0, "--data: rank 1 has "),
    "budget": (3, 1, "--memory-budget is 10.0 MB"),
    "missing": (2, None, "rank 1: --model"),
    "not finite": (2, 1, "rank 1: loss is nan at iteration 3 (rows train.jsonl:"),
}


def environment(tmp_path: Path, n: int) -> list[dict[str, str]]:
    """The environment that mlx.launch sets for each of n ranks."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    hosts = tmp_path / f"hosts{n}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]))
    for each in sockets:
        each.close()
    known = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_HOSTFILE": str(hosts)}
    return [{**known, "MLX_RANK": str(rank)} for rank in range(n)]


def start(tmp_path: Path, commands: list[list[str]]) -> list[subprocess.Popen[str]]:
    """One process of `python COMMAND` per rank."""
    pipe = subprocess.PIPE
    return [
        subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=pipe, text=True, env=each)
        for command, each in zip(commands, environment(tmp_path, len(commands)), strict=True)
    ]


def launch(tmp_path: Path, runs: list[tuple[str, list[str]]], n: int = 2) -> list[dict[str, Any]]:
    """Each rank's results of these runs (tests/ranks.py)."""
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(runs))
    processes = start(tmp_path, [["-m", "tests.ranks", str(path)]] * n)
    for process in processes:
        _, error = process.communicate(timeout=400)
        assert process.returncode == 0, error
    return [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in range(n)]


@pytest.fixture(scope="module")
def cache(home: Path) -> Any:
    """Tokenizes the rows once in this process; every rank finds them in the cache."""
    from tests.runs import tokenize_here

    with pytest.MonkeyPatch.context() as patch:
        tokenize_here(home, patch)
        yield home


def adapters(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in mx.load(str(folder / "adapters.safetensors")).items()}


def _difference(a: Path, b: Path) -> float:
    mine, theirs = adapters(a), adapters(b)
    assert mine.keys() == theirs.keys()
    norms = [(np.linalg.norm(mine[n] - theirs[n]), np.linalg.norm(theirs[n])) for n in mine]
    return max(float(difference / norm) if norm else float(difference) for difference, norm in norms)


@pytest.fixture(scope="module")
def outcome(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, both ranks' results) of all cases, on two ranks and, in this process, on one."""
    out = tmp_path_factory.mktemp("distributed")

    def run(kind: str, name: str, *more: str) -> tuple[str, list[str]]:
        small = ["--batch-size", "4", "--iters", "4", "--save-every", "2"]
        return f"{kind} {name}", arguments(cache, out / f"{kind} {name}", *small, *CASES[name], *more)

    def resume(folder: str) -> list[str]:
        return ["--resume", "--adapter-path", str(out / folder), "--iters", "6"]

    two = [run("two", name) for name in CASES]
    two += [
        run("again", "adam"),
        run("again", "kzoo"),
        run("rounded", "sgd: whole graph", "--reduce-dtype", "bfloat16"),
    ]
    two += [run("speed", "adam", "--rows-by-speed")]
    two += [("two resumed on two", resume("again adam")), ("kzoo resumed on two", resume("again kzoo"))]
    two += [("one resumed on two", resume("spare adam")), ("nothing to do", resume("again adam"))]
    two += [("tested", ["--test", "--iters", "0", *arguments(cache, out / "again adam")[:6]])]
    two += [("dry", arguments(cache, out / "dry", "--dry-run"))]
    shutil.copytree(cache / "model", cache / "model1")
    config = json.loads((cache / "model1" / "config.json").read_text())
    (cache / "model1" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    (cache / "model0").symlink_to(cache / "model")
    rows = (cache / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    for rank, kept in enumerate((rows, rows[:-1])):
        (cache / f"data{rank}").mkdir()
        (cache / f"data{rank}" / "train.jsonl").write_text("".join(kept))
    odd = {
        "options": ["--learning-rate", "0.{rank}1"],
        "model": ["--model", f"{cache}/model{{rank}}"],
        "data": ["--data", f"{cache}/data{{rank}}"],
        "budget": ["--memory-budget", "{budget}"],
        "missing": ["--adapter-path", "{rank}", "--model", f"{cache}/model{{rank}}{{rank}}"],
        "not finite": ["--save-every", "1"],
    }
    two += [(name, arguments(cache, out / name, *more)) for name, more in odd.items()]
    for name in CASES:
        assert train.main(run("one", name)[1]) == 0
    assert train.main(run("spare", "adam")[1]) == 0
    assert train.main(run("long", "adam", "--iters", "6")[1]) == 0
    assert train.main(run("long", "kzoo", "--iters", "6")[1]) == 0
    return out, launch(out, two)


@pytest.mark.parametrize("name", CASES)
def test_adapters_are_equal_on_all_machines_and_to_those_of_one(outcome: Any, name: str) -> None:
    out, ranks = outcome
    mine, other = (rank[f"two {name}"] for rank in ranks)
    assert mine["code"] == other["code"] == 0, (mine["err"], other["err"])
    assert mine["hash"] == other["hash"]
    # Other optimizers divide a gradient by its size, and estimates divide a loss difference by eps: last bits matter.
    assert not _difference(out / f"two {name}", out / f"one {name}") > (1e-5 if name.startswith("sgd") else 0.05)
    for (kind, iteration, loss), (*same, expected) in zip(
        losses(out / f"two {name}"), losses(out / f"one {name}"), strict=True
    ):
        assert [kind, iteration] == same and not abs(loss - expected) > 0.02 * expected


def test_a_first_step_is_within_float32_summation(outcome: Any) -> None:
    """Losses before the first update, and after one: the batch's mean over the labels of both machines."""
    out, _ = outcome
    for name in CASES:
        first = [[loss for kind, _, loss in losses(out / f"{n} {name}") if kind != "test"][:2] for n in ("one", "two")]
        assert not np.abs(np.subtract(*first)).max() > 2e-6 * max(first[0]), name
    for name in (name for name in CASES if name.startswith("sgd")):
        both = [[loss for *_, loss in losses(out / f"{n} {name}")] for n in ("one", "two")]
        assert not np.abs(np.subtract(*both)).max() > 2e-5 * max(both[0]), name


def test_two_runs_are_bit_equal(outcome: Any) -> None:
    _, ranks = outcome
    assert ranks[0]["again adam"]["hash"] == ranks[0]["two adam"]["hash"]
    assert ranks[0]["again kzoo"]["hash"] == ranks[0]["two kzoo"]["hash"]


@pytest.mark.parametrize(
    "name, expected",
    [("two resumed on two", "again adam"), ("one resumed on two", "spare adam"), ("kzoo resumed on two", "again kzoo")],
)
def test_a_resumed_run_continues_exactly_on_any_number_of_machines(outcome: Any, name: str, expected: str) -> None:
    out, ranks = outcome
    assert [rank[name]["code"] for rank in ranks] == [0, 0], [rank[name]["err"] for rank in ranks]
    assert ranks[0][name]["hash"] == ranks[1][name]["hash"]
    assert not _difference(out / expected, out / f"long {expected.split()[1]}") > 0.05
    actual, wanted = (losses(out / folder) for folder in (expected, f"long {expected.split()[1]}"))
    assert actual[-1][1] == wanted[-1][1] and not abs(actual[-1][2] - wanted[-1][2]) > 0.02 * wanted[-1][2]


def test_only_the_first_rank_prints_and_writes(outcome: Any) -> None:
    out, ranks = outcome
    for name, result in ranks[1].items():
        if name in REFUSED:
            continue
        assert result["code"] == 0 and not result["out"] and not result["err"], (name, result)
    assert "rank 0 of 2)" in ranks[0]["two adam"]["out"] or "rank 1 of 2)" in ranks[0]["two adam"]["out"]
    assert "nothing to do" in ranks[0]["nothing to do"]["out"] and "backward" in ranks[0]["dry"]["out"]
    assert len(events(out / "two adam", "end")) == 1 and not (out / "dry").exists()
    peaks = [event["peak_bytes_by_rank"] for event in events(out / "two adam", "train")]
    assert all(len(each) == 2 and min(each) > 0 for each in peaks)


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_of_one_machine_is_one_line_and_ends_all(outcome: Any, name: str) -> None:
    out, ranks = outcome
    code, who, text = REFUSED[name]
    assert [rank[name]["code"] for rank in ranks] == [code, code], [rank[name]["err"] for rank in ranks]
    said = [rank[name]["err"].splitlines() for rank in ranks]
    if who is not None:
        assert len(said[who]) == 1 and not said[1 - who], said
    assert text in "".join(said[0] + said[1])
    assert (out / name / "checkpoint.safetensors").exists() == (name == "not finite")


def test_rounded_sums_are_close(outcome: Any) -> None:
    out, ranks = outcome
    rounded, exact = "rounded sgd: whole graph", "two sgd: whole graph"
    assert ranks[0][rounded]["hash"] == ranks[1][rounded]["hash"]
    assert 1e-6 < _difference(out / rounded, out / exact) <= 0.01
    saved = ranks[0][exact]["sent_bytes"] - ranks[0][rounded]["sent_bytes"]
    n_bytes = sum(value.nbytes for value in adapters(out / exact).values())
    assert abs(saved - 4 * n_bytes // 2) <= 200  # numbers in text differ in length


def test_a_probe_sends_eight_bytes(outcome: Any) -> None:
    """No gradients are sent: besides every run's bookkeeping, traffic depends only on the number of losses."""
    _, ranks = outcome
    sent = {name: ranks[0][f"two {name}"]["sent_bytes"] for name in ("mezo", "hizoo", "adam")}
    assert abs(sent["hizoo"] - sent["mezo"]) <= 8  # option names do not matter: a short message always takes 256 bytes
    assert sent["adam"] > sent["mezo"] + 4 * 6616


def test_rows_by_speed_change_no_sum(outcome: Any) -> None:
    out, ranks = outcome
    assert ranks[0]["speed adam"]["hash"] == ranks[1]["speed adam"]["hash"]
    assert not _difference(out / "speed adam", out / "one adam") > 0.05


# Machines that fail


def begin(cache: Path, tmp_path: Path, *more: str, n: int = 2) -> tuple[list[subprocess.Popen[str]], Path]:
    """A long run that has saved once."""
    out = tmp_path / "out"
    command = ["-m", "mebp_mlx.train", *arguments(cache, out, "--iters", "100000", "--save-every", "5", *more)]
    processes = start(tmp_path, [command] * n)
    until = time.monotonic() + 120
    while not (out / "checkpoint.safetensors").exists():
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    return processes, out


def end(process: subprocess.Popen[str], timeout_s: float = 180.0) -> tuple[int, list[str]]:
    """Exit code and our own lines on stderr; MLX's ring also prints some."""
    _, error = process.communicate(timeout=timeout_s)
    return process.returncode, [line for line in error.splitlines() if not line.startswith("[ring]")]


def assert_goes_on_alone(out: Path) -> None:
    before = load_checkpoint(out).step
    assert train.main(["--resume", "--adapter-path", str(out), "--iters", str(before + 7)]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["iters"] == before + 7
    assert "sums are added in a different order" in (out / "log.jsonl").read_text()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_killed_machine_ends_the_others_with_one_line(cache: Path, tmp_path: Path, gone: int) -> None:
    processes, out = begin(cache, tmp_path)
    processes[gone].kill()
    code, (line,) = end(processes[1 - gone], 60.0)
    processes[gone].communicate()
    assert code == 1 and line.startswith(f"error: rank {1 - gone}: lost rank {gone} (") and "--resume" in line
    assert_goes_on_alone(out)


def test_a_machine_that_sleeps_ends_the_others_in_time_and_itself_when_it_wakes(cache: Path, tmp_path: Path) -> None:
    processes, out = begin(cache, tmp_path, "--peer-timeout", "4")
    processes[1].send_signal(signal.SIGSTOP)
    code, (line,) = end(processes[0], 60.0)
    assert code == 1 and line.startswith("error: rank 0: no answer from another machine")
    processes[1].send_signal(signal.SIGCONT)
    code, (line,) = end(processes[1], 60.0)
    assert code == 1 and line.startswith(("error: rank 1: lost rank 0", "error: rank 1: no answer"))
    assert_goes_on_alone(out)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_at_one_machine_saves_and_ends_all(cache: Path, tmp_path: Path, asked: int) -> None:
    processes, out = begin(cache, tmp_path, "--save-every", "1000000", "--save-best", "--steps-per-eval", "3")
    processes[asked].send_signal(signal.SIGTERM)
    ends = [end(process) for process in processes]
    assert [code for code, _ in ends] == [143, 143], ends
    assert "--resume continues" in ends[0][1][-1] and "saved" not in "".join(ends[1][1])
    (interrupted,) = events(out, "interrupted")
    assert interrupted["iter"] == json.loads((out / "adapter_config.json").read_text())["iters"]


def test_a_machine_that_never_connects_ends_the_start(tmp_path: Path) -> None:
    code = "from mebp_mlx.system import group; group.TIMEOUT_S = 0.5; group.connect()"
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path, 2)[0], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 1 and "rank 0: no answer from another machine" in process.stderr


# Without processes


def _batch(seed: int, B: int, T: int) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 99, (B, T)).astype(np.int32)
    targets = np.where(rng.random((B, T)) < 0.4, tokens, -100).astype(np.int32)
    return Batch(tokens, targets, tuple(f"r:{b}" for b in range(B)), int((targets != -100).sum()))


class _Rank(Group):
    """One of several ranks; its messages come from `told`."""

    def __init__(self, rank: int, size: int, told: list[Any] | None = None) -> None:
        super().__init__()
        self.rank, self.size, self.told = rank, size, told

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size if self.told is None else self.told


@pytest.mark.quick
def test_parts_of_a_batch_make_up_the_batch(seed: int) -> None:
    """Exactly one rank has each labelled token, with its row's index in the whole batch and the tokens before it."""
    for B, size in ((4, 2), (5, 3), (2, 4), (1, 2), (7, 1)):
        batch = _batch(seed, B, 9)
        found = set()
        for rank in range(size):
            part = Deal(_Rank(rank, size), B).part(batch)
            assert part.n_labels == batch.n_labels and len(part.rows) == len(part.tokens) == len(part.targets)
            for b, t in zip(*np.nonzero(part.targets != -100), strict=True):
                row = part.first_row + int(b)
                assert part.rows[b] == f"r:{row}" and (row, int(t)) not in found
                assert np.array_equal(part.tokens[b, : t + 1], batch.tokens[row, : t + 1])
                found.add((row, int(t)))
        assert found == {(int(b), int(t)) for b, t in zip(*np.nonzero(batch.targets != -100), strict=True)}, seed


@pytest.mark.quick
def test_shares_follow_speeds(seed: int) -> None:
    assert shares(8, [1, 1], 8) == [4, 4] and shares(3, [1, 1], 2) == [2, 1] and shares(1, [1, 1, 1], 1) == [1, 0, 0]
    assert shares(8, [3, 1], 8) == [6, 2] and shares(8, [1, 100], 6) == [2, 6]
    rng = np.random.default_rng(seed)
    for _ in range(50):
        size, n_rows = int(rng.integers(1, 9)), int(rng.integers(0, 40))
        speeds, most = list(rng.uniform(0.1, 9, size)), -(-n_rows // size) + int(rng.integers(0, 5))
        counts = shares(n_rows, speeds, most)
        assert sum(counts) == n_rows and max(counts) <= most, seed


@pytest.mark.quick
def test_shares_of_rows_follow_measured_speeds_within_the_plan() -> None:
    deal = Deal(_Rank(0, 2), 8, by_speed=True)
    assert deal.most_rows == 8 and deal.part(_batch(0, 8, 5)).tokens.shape[0] == 4
    for _ in range(20):
        deal.learn([300, 100], [1.0, 1.0])
    assert deal.part(_batch(0, 8, 5)).tokens.shape[0] == 6
    deal.learn([0, 400], [0.1, 1.0])  # a rank without rows has no speed
    assert deal.part(_batch(0, 8, 5)).tokens.shape[0] == 6
    even = Deal(_Rank(0, 2), 8)
    even.learn([300, 100], [1.0, 1.0])
    assert even.most_rows == 4 and even.part(_batch(0, 8, 5)).tokens.shape[0] == 4


@pytest.mark.quick
def test_the_first_rank_names_the_different_options() -> None:
    told = [{"--seed": 1, "--iters": 2}, {"--seed": 1, "--iters": 3}]
    with pytest.raises(UserError, match="--iters: rank 1 has 3, rank 0 has 2"):
        check_alike(_Rank(0, 2, told), told[0])
    check_alike(_Rank(1, 2, told), told[1])  # it is informed
    check_alike(_Rank(0, 2, [told[0], told[0]]), told[0])


@pytest.mark.quick
def test_a_broken_connection_is_reported_wherever_mlx_raises_it() -> None:
    broken, other = RuntimeError("[ring] connection to a peer was lost"), RuntimeError("[malloc] no memory")
    with pytest.raises(PeerLost, match=r"lost rank 0 or 2 \(\[ring\]"), _Rank(1, 3).broken_connections_told():
        raise broken
    for group, error in ((_Rank(1, 3), other), (Group(), broken), (_Rank(1, 3), PeerFailed(0, 2, "[ring]"))):
        with pytest.raises(RuntimeError) as caught, group.broken_connections_told():
            raise error
        assert caught.value is error


@pytest.mark.quick
def test_one_process_is_its_own_group(tmp_path: Path) -> None:
    empty = tmp_path / "hosts"
    for text in ("", "\n", "[]", '[["127.0.0.1:4000"]]'):  # mlx.launch -n 1
        empty.write_text(text)
        assert connect({"MLX_RANK": "0", "MLX_HOSTFILE": str(empty)}).is_alone
    group, gradients = connect({}), {"a": mx.ones(3)}
    assert group.is_alone and group.is_first and group.exchange(gradients) is gradients and group.rest() == {}
    assert group.gather([1.5]) == [[1.5]] and group.first("x") == "x" and group.sent_bytes == 0
    assert np.array_equal(group.total(np.array([0.1, 2])), [0.1, 2])
