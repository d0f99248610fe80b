"""A run on several machines (system/group.py): which one writes, what must match, and how rows are divided.

Every machine has all the data and its own copy of the weights, and takes a part of the rows of every micro-batch. Each
divides its loss by the labelled tokens of the whole micro-batch, so the gradients that training/update.py sums equal
those of a single machine. Only the first rank writes and prints; the others run the same code on a temporary folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import TrainConfig
from ..data.dataset import Batch
from ..errors import BudgetError, PeerFailed, PeerLost, UserError
from ..export.adapters import ADAPTER_CONFIG, ADAPTERS, RUN
from ..model.lora import Lora
from ..options import describe
from ..system.command import NO_BUDGET, WRONG_INPUT
from ..system.device import DTYPES
from ..system.group import Group, connect
from ..system.interrupt import Stopped
from ..system.version import __version__
from .folder import CHECKPOINT, LOG

# Options that may differ between machines.
_OWN = {
    "model", "data", "adapter_path", "arena_dir", "memory_budget", "arena_budget", "device", "over_budget", "config",
    "report_to", "project_name", "sample_prompt", "peer_timeout", "weights",
}  # fmt: skip
_WIDEST_SHARE = 2  # largest share of rows, relative to an even one, that a plan allows for with --rows-by-speed
_INERTIA = 0.8  # weight of the previous estimate in a machine's measured speed


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The group of this process. An error ends all ranks; the rank where it occurred prints it with its number."""
    group = connect()
    try:
        with contextlib.ExitStack() as stack:
            if not group.is_first:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(group.broken_connections_told())
            yield group
    except (PeerFailed, PeerLost, KeyboardInterrupt) as error:
        _name_rank(error, group)
        raise
    except BaseException as error:
        group.fail(NO_BUDGET if isinstance(error, BudgetError) else WRONG_INPUT, str(error))
        _name_rank(error, group)
        raise
    finally:
        group.close()


def _name_rank(error: BaseException, group: Group) -> None:
    if group.is_alone or isinstance(error, PeerFailed):
        return
    if isinstance(error, Stopped):
        error.message = error.message if group.is_first else ""
    elif isinstance(error, OSError):
        error.strerror = f"{error.strerror} (rank {group.rank})"
    else:
        error.args = (f"rank {group.rank}: {error}", *error.args[1:])


def own_config(config: TrainConfig, group: Group) -> TrainConfig:
    """A rank's own options, after checking that all ranks agree. Ranks after the first write to their own folder, which
    starts with a copy of the first rank's files if a run is resumed or evaluated. Raises UserError.
    """
    group.timeout_s = max(group.timeout_s, config.peer_timeout)
    group.reduce_dtype = DTYPES[config.reduce_dtype]
    if group.is_alone:
        return config
    fields = describe(TrainConfig)
    options = {fields[name].flag: value for name, value in config.to_dict().items() if name not in _OWN}
    versions = {"the version of mebp_mlx": __version__, "the version of MLX": importlib.metadata.version("mlx")}
    check_alike(group, {**versions, "the default device": mx.default_device().type.name, **options})
    source, target = Path(config.adapter_path), Path() if group.is_first else group.folder
    if config.resume or config.test:
        for name in (CHECKPOINT, LOG, RUN, ADAPTERS, ADAPTER_CONFIG):
            group.copy_file(source / name, target / name)
    return config if group.is_first else config.replace(adapter_path=str(target), report_to=None)


def check_alike(group: Group, values: Mapping[str, Any]) -> None:
    """Raises UserError on the first rank, naming a rank and a value that differs from the first rank's."""
    known = json.loads(json.dumps(values))
    for rank, other in enumerate(group.gather(known)):
        for name in dict.fromkeys([*known, *other]):
            if known.get(name) != other.get(name) and group.is_first:
                raise UserError(f"{name}: rank {rank} has {other.get(name)}, rank 0 has {known.get(name)}")
    group.gather(None)  # where the other ranks learn of the error


def check_same_parameters(group: Group, lora: Lora) -> None:
    """Raises UserError on the first rank if a machine's adapters are not bit-equal to the first rank's."""
    if group.is_alone:
        return
    digest = hashlib.sha256()
    for name, value in sorted(lora.parameters().items()):
        digest.update(name.encode() + np.asarray(value).tobytes())
    check_alike(group, {"the adapters' hash": digest.hexdigest()[:16]})


class Deal:
    """Decides which rows of a micro-batch this rank takes: an even share, or one by measured speed.

    most_rows: the largest share of a batch of `batch_size` rows; the plan is made for it.
    """

    def __init__(self, group: Group, batch_size: int, by_speed: bool = False) -> None:
        self.group, self.batch_size, self.by_speed = group, batch_size, by_speed and not group.is_alone
        self.speeds = [1.0] * group.size  # positions per second, once measured
        even = -(-batch_size // group.size)
        self.most_rows = min(batch_size, even * _WIDEST_SHARE if self.by_speed else even)
        self._measured = False

    def part(self, batch: Batch) -> Batch:
        """This rank's rows of a batch; the whole batch if it is the only rank."""
        if self.group.is_alone:
            return batch
        counts = shares(len(batch.rows), self.speeds, self.most_rows)
        start = sum(counts[: self.group.rank])
        return batch.part(start, start + counts[self.group.rank])

    def notices(self, n_before: int) -> list[str]:
        """Remarks that may surprise the user. n_before: the resumed run's number of machines; a new run's own."""
        remarks, n_now = [], self.group.size
        if n_now > self.batch_size:
            n_idle = n_now - self.batch_size
            remarks.append(f"{n_now} machines, batches of {self.batch_size} rows: {n_idle} get no rows")
        if n_before != n_now:
            remarks.append(
                f"saved on {n_before} machine{'s' * (n_before > 1)}, resumed on {n_now}: the same rows and updates, "
                "but sums are added in a different order"
            )
        return remarks

    def learn(self, positions: Sequence[int], seconds: Sequence[float]) -> None:
        """Updates the speeds from a step's positions and seconds of computing, by rank."""
        if not self.by_speed or not all(positions):
            return
        now = [n / max(s, 1e-9) for n, s in zip(positions, seconds, strict=True)]
        kept = _INERTIA if self._measured else 0.0
        self.speeds = [kept * old + (1 - kept) * new for old, new in zip(self.speeds, now, strict=True)]
        self._measured = True


def shares(n_rows: int, speeds: Sequence[float], most: int) -> list[int]:
    """The number of rows for each rank: in proportion to speeds, at most `most`, summing to n_rows.

    Each row in turn goes to the rank that would finish first with it; ties go to the lower rank.
    """
    counts = [0] * len(speeds)
    for _ in range(n_rows):
        free = [rank for rank in range(len(speeds)) if counts[rank] < most]
        counts[min(free, key=lambda rank: (counts[rank] + 1) / speeds[rank])] += 1
    return counts
