"""Hashes of a run's model and data: a resumed run must use the same weights and the same rows."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def model_fingerprint(path: Path) -> str:
    """Hash of a model folder: config.json, and the size and first megabyte of every safetensors file."""
    weights = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    return _fingerprint([path / "config.json", *weights], 1 << 20)


def data_fingerprint(tokens: Path, split: str = "train") -> str:
    """Hash of all tokens and labels of a split. tokens: DataSets.cache_dir."""
    return _fingerprint([tokens / f"{split}.{name}" for name in ("offsets", "labels", "tokens")])


def _fingerprint(files: Sequence[Path], n_bytes_of_each: int | None = None) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {os.fstat(file.fileno()).st_size}\n".encode())
            left = sys.maxsize if n_bytes_of_each is None else n_bytes_of_each
            while block := file.read(min(left, 1 << 18)):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()[:16]
