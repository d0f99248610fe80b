"""checkpoint.safetensors: LoRA parameters, optimizer state and step together, for an exact resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..config import TrainConfig
from ..engine.zeroth_order import Estimator
from ..errors import UserError
from ..model.lora import Lora
from ..options import describe
from ..system.child import one_line
from ..weights.safetensors import MappedWeights
from ..weights.writer import Array, write_arrays
from .folder import CHECKPOINT, recorded_options

FORMAT = "mebp_mlx checkpoint 1"
_Loaded = tuple[dict[str, mx.array], dict[str, str]]
_LORA, _OPTIMIZER, _ENGINE = "lora/", "optimizer/", "engine/"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A state between two optimizer updates. step: updates done; options: TrainConfig.to_dict().

    origin: fingerprints of the options `model` and `data`; engine: the state of a zeroth-order estimator; best: the
    dict of Best.state(). The optimizer's arrays, in nested dicts, may be numpy views of a file.
    """

    lora: dict[str, mx.array]
    optimizer: dict[str, Any]
    step: int
    options: dict[str, Any]
    origin: dict[str, str]
    engine: dict[str, mx.array] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] = dataclasses.field(default_factory=dict)

    def arrays(self) -> dict[str, Array]:
        """All arrays, under their names in the file."""
        parts: tuple[tuple[str, Mapping[str, Array]], ...] = (
            (_LORA, self.lora),
            (_OPTIMIZER, _flat(self.optimizer)),
            (_ENGINE, self.engine),
        )
        return {prefix + name: value for prefix, part in parts for name, value in part.items()}


# Saving


def save_checkpoint(folder: Path, state: Checkpoint) -> None:
    """Writes checkpoint.safetensors. Raises NonFiniteLoss, and keeps the last one, if a value is NaN or infinite."""
    about = {"step": state.step, "options": state.options, "origin": state.origin, "best": state.best}
    metadata = {"format": FORMAT, "about": json.dumps(about)}
    write_arrays(folder / CHECKPOINT, state.arrays(), f"update {state.step}", "--adapter-path", metadata)


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Array]:
    """{"a.b": {"m": x}} -> {"a.b/m": x}; the separator is not a dot because parameter names contain dots."""
    flat: dict[str, Array] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat


def _nested(flat: Mapping[str, mx.array]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split("/")
        inner = state
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return state


# Resuming


def load_checkpoint(folder: Path) -> Checkpoint:
    """The saved state of a run; its arrays are still on disk. Raises UserError if it is missing or damaged."""
    path = folder / CHECKPOINT
    if not path.exists():
        raise UserError(f"--resume: nothing is saved in {folder} yet; start without --resume")
    try:
        MappedWeights(path).close()  # checks the header, which MLX does not
        arrays, metadata = cast(_Loaded, mx.load(str(path), return_metadata=True))
        about = json.loads(metadata["about"]) if metadata.get("format") == FORMAT else None
        if about is not None:
            step, options, origin = _step(about["step"]), dict(about["options"]), dict(about["origin"])
            best = dict(about.get("best", {}))
        lora, optimizer, engine = (
            {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
            for prefix in (_LORA, _OPTIMIZER, _ENGINE)
        )
        state = _nested(optimizer)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"--resume: {path} is damaged: {one_line(error)}") from None
    if about is None:
        raise UserError(f"--resume: {path} is not a checkpoint of this version ({metadata.get('format')!r})")
    return Checkpoint(lora, state, step, options, origin, engine, best)


def _step(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("`step` is not a number of updates")
    return value


def saved_options(folder: Path) -> dict[str, Any]:
    """The options that a resumed run starts from. Raises UserError as `load_checkpoint` does."""
    options = load_checkpoint(folder).options
    newer = recorded_options(folder)  # iters may have increased since the save
    fields = describe(TrainConfig)
    return options | {name: newer[name] for name in fields if name in newer and fields[name].option.may_change}


def check_same_run(config: TrainConfig, checkpoint: Checkpoint, origin: Mapping[str, str]) -> None:
    """Raises UserError naming the first option that would make the resumed run a different run."""
    for name, now in config.fixed_by_run().items():
        flag, before = describe(TrainConfig)[name].flag, checkpoint.options.get(name)
        if name in origin:  # compare the content, not the name: a folder may have moved
            if checkpoint.origin.get(name) != origin[name]:
                what = f"{before}, not {now}" if before != now else f"{now} as it was then; it has changed since"
                raise UserError(f"{flag}: the run in {config.adapter_path} uses {what}")
        elif json.dumps(before) != json.dumps(now):
            raise UserError(
                f"{flag}: the run in {config.adapter_path} has {_shown(before)}, not {_shown(now)}; "
                "a resumed run keeps it"
            )


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def check_arrays(checkpoint: Checkpoint, fresh: Checkpoint) -> None:
    """Raises UserError if the checkpoint's names or shapes differ from this run's; reads no values.

    fresh: the state of a new run with the same options.
    """
    wanted, saved = fresh.arrays(), checkpoint.arrays()
    for name in sorted(wanted.keys() | saved.keys()):
        if name not in saved or name not in wanted:
            problem = "missing" if name in wanted else "not part of this run"
            raise UserError(f"--resume: {CHECKPOINT}: {name} is {problem}")
        if saved[name].shape != wanted[name].shape:
            shapes = f"shape {saved[name].shape}, not {wanted[name].shape}"
            raise UserError(f"--resume: {CHECKPOINT}: {name} has {shapes}")


def restore(saved: Checkpoint, lora: Lora, optimizer: Any, estimator: Estimator | None) -> None:
    """Puts a checkpoint's arrays into a new Lora, optimizer and estimator with the same options.

    Reads one parameter at a time, and the optimizer's state later: all of it at once would exceed the plan.
    """
    optimizer.init(lora.parameters())  # for names and shapes; nothing is computed
    state = {} if estimator is None else estimator.state()
    check_arrays(saved, Checkpoint(lora.parameters(), optimizer.state, 0, {}, {}, state))
    for name, value in saved.lora.items():
        mx.eval(value)
        lora.update({name: value})
    optimizer.state = saved.optimizer
    if estimator is not None:
        mx.eval(saved.engine)
        estimator.load(saved.engine)
