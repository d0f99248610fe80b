"""A run's output about its rows: --preview, and their lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mebp_mlx import train
from mebp_mlx.data import preview
from mebp_mlx.training.report import length_histogram
from tests.runs import arguments, tokenize_here, write_home
from tests.texts import write_rows

TURN, REPLY = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}


def test_rows_are_shown_with_their_labels_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = write_home(tmp_path)
    tokenize_here(home, monkeypatch)
    monkeypatch.setattr(preview, "run_child", lambda _module, request, **_: preview._texts(request, print))
    turns = [TURN, REPLY, TURN, {**REPLY, "content": "é"}]
    write_rows(home / "data", [{"messages": turns}, {"messages": turns[:2]}])
    for split in ("valid", "test"):
        (home / "data" / f"{split}.jsonl").unlink()
    asked = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    first, last = "hi<|im_end|>\n", "é<|im_end|>\n"
    expected = {
        "all": f"<|im_start|>[[{asked.removeprefix('<|im_start|>')}{first}{asked}{last}]]",
        "completion": f"{asked}{first}{asked}[[{last}]]",
        "assistant": f"{asked}[[{first}]]{asked}[[{last}]]",
    }
    for train_on, text in expected.items():
        for n_rows in (1, 9):
            argv = arguments(home, tmp_path / "out", "--preview", str(n_rows), "--train-on", train_on)
            assert train.main(argv) == 0
            said = capsys.readouterr().out
            assert text in said and said.count("--- train.jsonl:") == min(n_rows, 2), train_on
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lengths", "batch_size", "expected"),
    [
        ([2], 4, "2-2 ##########; median 2 tokens, longest 2; padding 0%"),
        ([3, 4, 5, 8], 2, "3-4 ##### 5-8 #####; median 4 tokens, longest 8; padding 17%"),
        ([9, 65, 9], 3, "9-16 ####### 17-32 . 33-64 . 65-128 ####; median 9 tokens, longest 65; padding 57%"),
    ],
)
def test_lengths_are_shown_in_classes(lengths: list[int], batch_size: int, expected: str) -> None:
    assert length_histogram(np.array(lengths, np.int32), batch_size) == expected
