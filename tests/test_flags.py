"""Every option of mlx_lm.lora is the same, has no effect, or is refused with a reason; README lists differences."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mebp_mlx.config import TrainConfig
from mebp_mlx.errors import UserError

pytest.importorskip("mlx_lm")
from bench import flags

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows() -> list[flags.Row]:
    return flags.rows()


def test_no_option_of_mlx_lm_is_unknown(rows: list[flags.Row]) -> None:
    assert len(rows) >= 35
    for row in rows:
        assert row.is_known, row
        for refusal in re.findall(r"refused: (.*)", row.verdict):
            assert len(refusal.split()) >= 4, row  # a reason, not a hint


def test_readme_names_every_default_that_differs(rows: list[flags.Row]) -> None:
    section = README.partition("## Coming from mlx-lm")[2].partition("\n## ")[0]
    named = {
        name for line in section.splitlines() for name in re.findall(r"`(?:--)?([a-z_-]+)`", line.partition("|")[2])
    }
    for row in rows:
        name = row.name.replace("_", "-") if row.flag else row.name
        if row.differs or not row.verdict.startswith("same"):
            assert name in named or row.name in named or row.name == "lora_layers", row
    for line in section.splitlines():
        if found := re.match(r"\| `--([a-z-]+)` \| (\S+) \| ", line):
            (row,) = [row for row in rows if row.name == found[1].replace("-", "_")]
            shown = json.dumps(row.theirs).strip('"')
            if isinstance(row.theirs, (int, float)) and not isinstance(row.theirs, bool):
                assert float(found[2]) == float(shown), line


@pytest.mark.parametrize(
    "given, hint",
    [("--lora-layers", "num_layers"), ("--versoin", ""), ("--overlnog", "--overlong"), ("--lora-rank", "")],
)
def test_hints_do_not_mislead(given: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        TrainConfig.from_args([given, "8"])
    assert hint in str(error.value)
    for wrong in ("--overlong", "lora_parameters"):
        assert wrong in hint or wrong not in str(error.value)


def test_version_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        TrainConfig.from_args(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("mebp_mlx ")
