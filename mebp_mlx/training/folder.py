"""A run's folder: the names of its files, whether it is unused, and the contents of run.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..export.adapters import ADAPTER_CONFIG, ADAPTERS, RUN
from ..ops.plan import Plan
from ..system.files import write_json

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"


def check_unused(folder: Path) -> None:
    """Raises UserError if a new run in `folder` would overwrite another run's saved files.

    run.json and log.jsonl do not count: a run that ended before its first save leaves only these.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--adapter-path {folder}: is a file, not a folder")
    names = [name for name in (CHECKPOINT, ADAPTERS, ADAPTER_CONFIG) if (folder / name).exists()]
    if names:
        remedy = "--resume continues it, " if CHECKPOINT in names else "remove the folder, or "
        raise UserError(
            f"--adapter-path {folder}: already contains a run ({names[0]}); {remedy}"
            "another --adapter-path starts a new one; --test --iters 0 evaluates it"
        )


def make_folder(folder: Path) -> None:
    """Creates the folder of a run. Raises UserError if it cannot be created or is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "not writable"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"--adapter-path {folder}: {reason}")


def remove_partial_files(folder: Path) -> None:
    """Removes partial files of killed saves. The caller holds the log's lock, so no other process is saving."""
    for path in [*folder.glob(".*.partial"), *folder.glob("best/.*.partial")]:
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json: options, plan, data, machine."""
    write_json(folder / RUN, record, "--adapter-path")


def recorded_options(folder: Path) -> dict[str, Any]:
    """The options in run.json; {} if it cannot be read."""
    options = _record(folder).get("options")
    return options if isinstance(options, dict) else {}


def recorded_plan(folder: Path) -> Plan | None:
    """The plan of the run in a folder; None if run.json has none that this version can read."""
    try:
        return Plan.from_dict(_record(folder)["plan"])
    except (ValueError, KeyError, TypeError):
        return None


def recorded_machines(folder: Path) -> int:
    """The number of machines that last worked on the run in a folder; 1 if it is not recorded."""
    n_machines = _record(folder).get("n_machines")
    return n_machines if isinstance(n_machines, int) else 1


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
