"""The log: always valid JSON, one line per report, and rich only on terminals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mebp_mlx.errors import UserError
from mebp_mlx.system.units import megabytes
from mebp_mlx.training.folder import LOG
from mebp_mlx.training.log import RunLog, TrainReport, last_event
from mebp_mlx.training.log import events as events_of

REPORT: dict[str, Any] = {
    "learning_rate": 1e-4,
    "n_tokens": 1000,
    "tokens_per_s": 1234.5,
    "step_s": 0.125,
    "footprint_bytes": 54_000_000,
    "peak_bytes": 88_000_000,
}


def events(folder: Path) -> list[dict[str, Any]]:
    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / LOG).read_text().splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_events_are_on_disk_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, n_iters=20, stream=io.StringIO()) as log:
        log.train(10, TrainReport(loss=2.5, **REPORT))
        assert events(tmp_path)[-1]["loss"] == 2.5
        log.event("end", path=Path("x"), nested={"a": (1, float("nan"))})
    assert [event["event"] for event in events(tmp_path)] == ["train", "end"]
    assert events(tmp_path)[1]["nested"] == {"a": [1, None]}
    assert all(event["time"] > 1e9 for event in events(tmp_path))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_null(tmp_path: Path, loss: float) -> None:
    with RunLog(tmp_path, n_iters=20, stream=io.StringIO()) as log:
        log.train(10, TrainReport(loss=loss, **REPORT))
        log.evaluation("valid", 10, loss=loss, accuracy=0.25, n_tokens=5, seconds=0.5)
    assert [event["loss"] for event in events(tmp_path)] == [None, None]


def test_a_report_is_one_line_with_everything(tmp_path: Path) -> None:
    stream = io.StringIO()
    with RunLog(tmp_path, n_iters=200, stream=stream) as log:
        log.train(10, TrainReport(loss=2.5, **REPORT))
    (line,) = stream.getvalue().splitlines()
    for part in ("10/200", "2.500", "1.00e-04", "1,234 tokens/s", "0.125 s/step", "54 MB now", "88 MB peak"):
        assert part in line, (part, line)
    assert megabytes(1_234_567_890) == "1,235 MB"


def test_a_terminal_gets_the_lines_and_a_bar_and_the_file_no_escapes(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    stream = Terminal()
    with RunLog(tmp_path, n_iters=200, iteration=5, stream=stream) as log:
        log.advance(10)
        log.train(10, TrainReport(loss=2.5, **REPORT))
        log.notice("[bold] is not markup")
    assert "loss 2.500" in stream.getvalue() and "[bold] is not markup" in stream.getvalue()
    assert "\x1b" in stream.getvalue() and "\x1b" not in (tmp_path / LOG).read_text()
    assert [event["event"] for event in events(tmp_path)] == ["train", "notice"]


def test_a_closed_pipe_does_not_stop_the_run(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    os.close(reader)
    with RunLog(tmp_path, n_iters=20, stream=stream) as log:
        for iteration in (1, 2, 3):
            log.train(iteration, TrainReport(loss=2.5, **REPORT))
    stream.close()
    assert len(events(tmp_path)) == 3


def test_resuming_appends_and_removes_an_incomplete_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, n_iters=20, stream=io.StringIO()) as log:
        log.event("start")
    with open(tmp_path / LOG, "a") as file:
        file.write('{"event": "train", "lo')
    with RunLog(tmp_path, n_iters=20, continues=True, stream=io.StringIO()) as log:
        log.event("start", iter=10)
        log.event("valid", loss=3.0)
        log.event("valid", loss=2.0)
    assert [event["event"] for event in events(tmp_path)] == ["start", "start", "valid", "valid"]
    assert [event["loss"] for event in events_of(tmp_path, "valid")] == [3.0, 2.0]
    assert (last_event(tmp_path, "valid") or {})["loss"] == 2.0
    assert last_event(tmp_path, "test") is None
    with RunLog(tmp_path, n_iters=20, stream=io.StringIO()) as log:
        log.event("start")
    assert [event["event"] for event in events(tmp_path)] == ["start"]  # a new run starts with an empty log


def test_two_processes_cannot_write_one_log(tmp_path: Path) -> None:
    with RunLog(tmp_path, n_iters=20, stream=io.StringIO()) as log:
        log.event("start")
        with pytest.raises(UserError, match=r"--adapter-path.*another process"):
            RunLog(tmp_path, n_iters=20, stream=io.StringIO())
    RunLog(tmp_path, n_iters=20, stream=io.StringIO()).close()


def test_without_a_terminal_rich_is_not_imported(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from mebp_mlx.training.log import RunLog\n"
        "log = RunLog(pathlib.Path(sys.argv[1]), n_iters=3); log.notice('x'); log.close()\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'rich'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert result.stdout.splitlines() == ["note: x", "[]"], result.stderr
