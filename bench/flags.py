"""mlx_lm.lora's options compared with mebp_mlx's, each tried on both parsers: `python -m bench.flags`.

There is a row for every flag and YAML key that mlx_lm.lora reads, found in its parser, its defaults and its source:
same, different default, accepted without effect, or refused with a reason.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench import report
from mebp_mlx.config import TrainConfig
from mebp_mlx.errors import UserError
from mebp_mlx.options import describe

OLDER = {"lora_layers": 8, "use_dora": True, "wandb": "project"}  # options of mlx-lm before 0.2x, still in YAML files
# Values for options whose type does not imply a valid value.
_SAMPLES: dict[str, Any] = {
    "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]},
    "lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 100], "warmup": 10, "warmup_init": 1e-7},
    "optimizer_config": {"adam": {"betas": [0.9, 0.95]}},
    "hf_dataset": {"path": "org/name", "train_split": "train[:10%]", "config": {"name": "part"}},
    "report_to": "wandb,swanlab",
    "clear_cache_threshold": "1GB",
}


@dataclass(frozen=True)
class Row:
    """One option. flag: its flag, "" if it is only a YAML key; theirs, ours: defaults; verdict: its effect in mebp_mlx.

    If mlx-lm's default is None or empty, its source decides the value.
    """

    name: str
    flag: str
    theirs: Any
    ours: Any
    verdict: str

    @property
    def is_known(self) -> bool:
        """Whether mebp_mlx has the option, even if it refuses its value."""
        return "no such option" not in self.verdict and "unknown key" not in self.verdict

    @property
    def differs(self) -> bool:
        """Whether both have the option, with different defaults."""
        is_set = isinstance(self.theirs, (bool, int, float, str)) or bool(self.theirs and any(self.theirs.values()))
        return self.verdict.startswith("same") and is_set and self.theirs != self.ours


def rows() -> list[Row]:
    """All options, in the order of mlx-lm's parser, then its YAML keys."""
    from mlx_lm import lora

    flags = {a.dest: a for a in lora.build_parser()._actions if not isinstance(a, argparse._HelpAction)}
    names = dict.fromkeys([*flags, *lora.CONFIG_DEFAULTS, *_read_by_source(lora), *OLDER])
    return [_row(name, flags.get(name), lora.CONFIG_DEFAULTS.get(name)) for name in names]


def _read_by_source(lora: Any) -> list[str]:
    """The keys that mlx-lm's training and data sets read."""
    from mlx_lm.tuner import datasets

    source = "".join(inspect.getsource(f) for f in (lora.train_model, lora.evaluate_model, lora.run))
    source += inspect.getsource(datasets)
    names = re.findall(r"\bargs\.(\w+)|getattr\((?:args|config), \"(\w+)\"", source)
    return sorted({first or second for first, second in names})


def _row(name: str, action: argparse.Action | None, theirs: Any) -> Row:
    flag = action.option_strings[-1] if action is not None else ""
    verdicts = {}
    for value in _values(name, action, theirs):
        ways = [_tried(name, ["--config", "FILE"], {name: value})] if name != "config" else []
        if action is not None:
            argv = [flag] if action.nargs == 0 else [flag, str(value)]
            _taken_by_mlx_lm(argv)
            ways.append(_tried(name, argv, None))
        verdicts[str(value)] = " / ".join(dict.fromkeys(ways))
    same = set(verdicts.values())
    verdict = same.pop() if len(same) == 1 else "; ".join(f"{value}: {what}" for value, what in verdicts.items())
    return Row(name, flag, theirs, _our_default(name), verdict)


def _values(name: str, action: argparse.Action | None, theirs: Any) -> Sequence[Any]:
    """The values to try: every choice, or one value of the option's type."""
    if name in _SAMPLES or name in OLDER:
        return [_SAMPLES.get(name, OLDER.get(name))]
    if action is None:
        return [theirs if theirs is not None else "text"]
    if action.choices:
        return list(action.choices)
    if action.nargs == 0:
        return [True]
    return [{int: 3, float: 0.5}.get(action.type, "text")]  # type: ignore[call-overload]


def _taken_by_mlx_lm(argv: list[str]) -> None:
    """Raises SystemExit if mlx-lm's parser refuses the arguments."""
    from mlx_lm import lora

    lora.build_parser().parse_args(argv)


def _tried(name: str, argv: list[str], file: dict[str, Any] | None) -> str:
    """The response of mebp_mlx's command line: same, no effect, or refused."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
        if file is not None:
            path = Path(folder) / "file.yaml"
            path.write_text(yaml.safe_dump(file), encoding="utf-8")
            argv = [str(path) if part == "FILE" else part for part in argv]
        elif name == "config":
            (Path(folder) / "file.yaml").write_text("seed: 1\n", encoding="utf-8")
            argv = [argv[0], str(Path(folder) / "file.yaml")]
        try:
            TrainConfig.from_args(argv)
        except UserError as error:
            reason = str(error).partition(f"{name}: ")[2] or str(error).partition(": ")[2]
            return f"refused: {reason}"
    if "without effect" in said.getvalue():
        return f"no effect: {said.getvalue().partition('(')[2].rpartition(')')[0]}"
    return "same"


def _our_default(name: str) -> Any:
    defaults = TrainConfig()
    if name == "lora_parameters":
        return {"rank": defaults.rank, "dropout": defaults.dropout, "scale": defaults.scale}
    if name == "train":
        return True  # a run always trains
    if name == "optimizer":
        return defaults.optimizer_name
    return getattr(defaults, name) if name in describe(TrainConfig) else None


def main(argv: Sequence[str] | None = None) -> None:
    report.Parser("flags", __doc__).parse_args(argv)
    options = rows()
    print("| option | mlx-lm's default | mebp_mlx's default | effect in mebp_mlx |\n|---|---|---|---|")
    for row in options:
        name = f"`{row.flag}`" if row.flag else f"`{row.name}:`"
        theirs, ours = (f"`{json.dumps(value)}`" for value in (row.theirs, row.ours))
        shown = "" if not row.verdict.startswith("same") else ours if row.differs else "same"
        print(f"| {name} | {theirs} | {shown} | {row.verdict} |")
    counts = {kind: sum(row.verdict.startswith(kind) for row in options) for kind in ("same", "no effect", "refused")}
    print(json.dumps({"bench": "flags", "options": len(options), **counts}))


if __name__ == "__main__":
    report.run(main)
