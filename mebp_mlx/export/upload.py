"""Uploads a model's folder to the Hugging Face hub, in a child process: only that imports huggingface_hub."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mebp_mlx.errors import UserError
from mebp_mlx.system.child import ChildFailure, answer, one_line, run_child

_REPO = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def check_repo(repo: str) -> None:
    """Raises UserError, before anything is computed, if `repo` cannot be a repository's name."""
    if not _REPO.fullmatch(repo):
        raise UserError(f"--upload-repo {repo}: not the name of a repository on the hub (org/name)")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"--upload-repo {repo}: needs huggingface_hub: pip install huggingface_hub")


def upload(folder: Path, repo: str) -> str:
    """Uploads a complete folder to a new or existing repository of the user; returns its address. Raises UserError."""
    try:
        request = {"folder": str(folder), "repo": repo}
        return run_child(["mebp_mlx.export.upload"], request, offline=False, pass_stderr=True)["address"]
    except (UserError, ChildFailure) as error:
        reason = str(error).removeprefix(f"--upload-repo {repo}: ")
        raise UserError(f"--upload-repo {repo}: {one_line(reason)}; the model is complete in {folder}") from error


def _upload(request: dict[str, Any], _progress: Callable[[Any], None]) -> dict[str, Any]:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo_id=request["repo"], exist_ok=True)
        api.upload_folder(folder_path=request["folder"], repo_id=address.repo_id)
    except Exception as error:  # no login, no network, a name that is taken: the hub's library may raise anything
        raise UserError(f"{type(error).__name__}: {one_line(error)}") from error
    return {"address": str(address)}


if __name__ == "__main__":
    answer(_upload)
