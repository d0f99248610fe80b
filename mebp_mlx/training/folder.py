"""A run's folder: the names of its files, whether it is free, and what run.json says."""

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
    """Raises UserError when a new run in `folder` would overwrite what another run has saved.

    A run that ended before its first save left run.json and log.jsonl, which do not count.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--adapter-path {folder}: is a file, not a folder")
    names = [name for name in (CHECKPOINT, ADAPTERS, ADAPTER_CONFIG) if (folder / name).exists()]
    if names:
        remedy = "--resume continues it, " if CHECKPOINT in names else "remove the folder, or "
        raise UserError(
            f"--adapter-path {folder}: already holds a run ({names[0]}); {remedy}"
            "another --adapter-path starts a new one; --test --iters 0 measures it"
        )


def make_folder(folder: Path) -> None:
    """Creates the folder of a run. Raises UserError when that is not possible or it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "not writable"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"--adapter-path {folder}: {reason}")


def remove_partial_files(folder: Path) -> None:
    """Removes what killed saves left behind. The caller holds the folder's log, so nobody else is saving there."""
    for path in [*folder.glob(".*.partial"), *folder.glob("best/.*.partial")]:
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """run.json: options, plan, data, machine."""
    write_json(folder / RUN, record, "--adapter-path")


def recorded_options(folder: Path) -> dict[str, Any]:
    """The options in run.json, {} where it cannot be read."""
    options = _record(folder).get("options")
    return options if isinstance(options, dict) else {}


def recorded_plan(folder: Path) -> Plan | None:
    """The plan of the run in a folder; None where none was recorded in a way that this version knows."""
    try:
        return Plan.from_dict(_record(folder)["plan"])
    except (ValueError, KeyError, TypeError):
        return None


def recorded_machines(folder: Path) -> int:
    """On how many machines the run in a folder was last; 1 where it does not say."""
    n_machines = _record(folder).get("n_machines")
    return n_machines if isinstance(n_machines, int) else 1


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
