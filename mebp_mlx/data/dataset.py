"""Training data: rows of token ids with their labels, memory-mapped from files that a child process wrote.

This module does not import the tokenizer libraries: `prepare` runs `mebp_mlx.data.tokenize` in a child process, unless
the cache already has the result for the same data, tokenizer and options.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mebp_mlx.data.rows import RowOptions
from mebp_mlx.data.tokenize import FILES, FORMAT_VERSION, read_meta, sha256_of
from mebp_mlx.errors import UserError
from mebp_mlx.model import NO_LABEL
from mebp_mlx.system.child import run_child
from mebp_mlx.weights.hub import SPLITS, cache_folder, resolve_data, resolve_sets

_VOCABULARY_FILES = ("tokenizer.json", "vocab*", "*.tiktoken", "*.model", "tekken.json")
_TOKENIZER_FILES = (
    *_VOCABULARY_FILES,
    "tokenizer*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "config.json",
)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length: tokens and targets, int32 [B, T]; target -100: no label.

    A part of a batch has the n_labels of the whole batch, and the number of its first row in the batch.
    """

    tokens: np.ndarray
    targets: np.ndarray
    rows: tuple[str, ...]  # the name of each row, such as "train.jsonl:17"
    n_labels: int
    first_row: int = 0

    def part(self, start: int, stop: int) -> Batch:
        """Rows [start, stop), up to their last label: no rows at all if they have none."""
        targets = self.targets[start:stop]
        columns = np.flatnonzero((targets != NO_LABEL).any(axis=0))
        if not columns.size:
            return replace(self, tokens=self.tokens[:0], targets=self.targets[:0], rows=(), first_row=start)
        T = int(columns[-1]) + 1
        return replace(
            self,
            tokens=np.ascontiguousarray(self.tokens[start:stop, :T]),
            targets=np.ascontiguousarray(targets[:, :T]),
            rows=self.rows[start:stop],
            first_row=start,
        )


class TokenRows:
    """The rows of one split, memory-mapped.

    A row of n tokens has n - 1 positions. The target of position t is tokens[t + 1] if that token is trained on.
    name: the file that the rows come from.
    """

    def __init__(self, folder: Path, split: str, name: str | None = None) -> None:
        def mapped(name: str) -> np.ndarray:
            return np.asarray(np.memmap(folder / f"{split}.{name}", f"<{FILES[name]}", mode="r"))

        self.name = name or f"{split}.jsonl"
        self._tokens, self._offsets = mapped("tokens"), mapped("offsets")
        self._labels, self._lines = mapped("labels"), mapped("lines")
        self.lengths = np.diff(self._offsets).astype(np.int32)  # tokens of each row

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows with these indices, in this order, padded to the longest of them with token 0."""
        shape = (len(indices), int(self.lengths[np.asarray(indices)].max()) - 1)
        tokens, targets = np.zeros(shape, np.int32), np.full(shape, NO_LABEL, np.int32)
        n_labels = 0
        for b, index in enumerate(indices):
            row, labels = self.row(index)
            tokens[b, : len(row) - 1] = row[:-1]
            targets[b, : len(row) - 1] = np.where(labels[1:], row[1:], NO_LABEL)
            n_labels += int(labels.sum())
        return Batch(tokens, targets, tuple(self.row_name(index) for index in indices), n_labels)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's tokens, int32 [n], and labels, uint8 [n]: 1 if the token is a target; the first never is."""
        place = slice(self._offsets[index], self._offsets[index + 1])
        return self._tokens[place], self._labels[place]

    def row_name(self, index: int) -> str:
        """The file and line of a row, such as `train.jsonl:17`."""
        return f"{self.name}:{self._lines[index]}"


@dataclass(frozen=True)
class DataSets:
    """The splits of a data folder, and the folder of their token files.

    `counts[split]` has the numbers of `rows`, `tokens` and `labels` kept; `n_read`, the rows in the file;
    `n_masked_rows`, skipped because no label is within the length limit; `n_overlong`, truncated or dropped;
    `n_prompt_differs`, rows in which the text before an answer differs from the template's generation prompt;
    `n_unsure`, those among them whose answer was not located, so that labels may begin a few tokens early or late.
    """

    train: TokenRows
    valid: TokenRows | None
    test: TokenRows | None
    counts: dict[str, dict[str, int]]
    cache_dir: Path


def prepare(
    data: str | Sequence[Mapping[str, Any]], model_path: Path, rows: RowOptions, cache_dir: Path | None = None
) -> DataSets:
    """Tokenizes data with the tokenizer in `model_path`, or reads the result from the cache.

    data: a folder, a hub id, "bundled", or mlx-lm's `hf_dataset` (a list of sets).
    Raises UserError naming file and line if a row cannot be used, and naming the folder if its tokenizer is bad.
    """
    if isinstance(data, str):
        folder = resolve_data(data, rows.columns)
    else:
        folder = resolve_sets(data)
        names = RowOptions()
        rows = replace(
            rows,
            prompt_feature=names.prompt_feature,
            completion_feature=names.completion_feature,
            text_feature=names.text_feature,
            chat_feature=names.chat_feature,
            one_kind=len(data) == 1,
        )
    files = {split: folder / f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").exists()}
    counts, out = _tokenized(files, model_path, rows, cache_dir)
    read = {split: TokenRows(out, split) for split in counts}
    return DataSets(read["train"], read.get("valid"), read.get("test"), counts, out)


def prepare_rows(
    data: str | Sequence[Mapping[str, Any]],
    split: str,
    model_path: Path,
    rows: RowOptions,
    cache_dir: Path | None = None,
) -> TokenRows:
    """The rows of one split, or of the JSONL file that `data` names. Raises the same errors as `prepare`."""
    if isinstance(data, str):
        file = Path(data).expanduser()
        if not file.is_file():
            file = resolve_data(data, rows.columns, split) / f"{split}.jsonl"
    else:
        file = resolve_sets(data) / f"{split}.jsonl"
    if not file.is_file():
        raise UserError(f"--data {data}: contains no {file.name}")
    _, out = _tokenized({split: file}, model_path, rows, cache_dir)
    return TokenRows(out, split, file.name)


def _tokenized(
    files: dict[str, Path], model_path: Path, rows: RowOptions, cache_dir: Path | None
) -> tuple[dict[str, dict[str, int]], Path]:
    """The counts of each split (see DataSets) and the folder of the token files, created if not in the cache."""
    options = {"rows": asdict(rows)}
    try:
        hashes = {split: sha256_of(path) for split, path in files.items()}
        key = _cache_key(hashes, _tokenizer_hashes(model_path), options)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    out = _made(cache_dir or cache_folder()) / key
    meta = read_meta(out)
    if meta is None:
        request = {
            **options,
            "model_path": str(model_path),
            "out": str(out),
            "files": {split: [str(path), hashes[split]] for split, path in files.items()},
        }
        with _progress_line() as show:
            run_child(["mebp_mlx.data.tokenize"], request, offline=True, on_progress=show)
        meta = read_meta(out)
        if meta is None:
            raise UserError(f"{out}: the token cache was damaged while it was being written")
    return meta["splits"], out


# Batches


def n_batches_per_epoch(rows: TokenRows, batch_size: int) -> int:
    """The number of batches in one pass over the rows; one of them may be smaller than `batch_size`."""
    return -(-len(rows) // batch_size)


def batches(rows: TokenRows, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Yields batches of rows of similar length endlessly, starting with batch number `start`.

    Each epoch visits every row once, in an order that depends only on (seed, epoch). `seed` and `start` >= 0.
    """
    epoch, done = divmod(start, n_batches_per_epoch(rows, batch_size))
    while True:
        for indices in _epoch(rows.lengths, batch_size, seed, epoch)[done:]:
            yield rows.batch(indices)
        epoch, done = epoch + 1, 0


def _epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    starts = random.permutation(-(-len(order) // batch_size)) * batch_size
    return [order[start : start + batch_size] for start in starts]


def eval_batches(rows: TokenRows, batch_size: int, limit: int) -> Iterator[Batch]:
    """Yields the first `limit` batches in file order (-1: all), the same every time."""
    total = n_batches_per_epoch(rows, batch_size)
    for number in range(total if limit < 0 else min(limit, total)):
        yield rows.batch(np.arange(number * batch_size, min((number + 1) * batch_size, len(rows))))


# Cache


def _made(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{cache}: {error.strerror}; set $MEBP_CACHE_DIR to use another cache folder") from error
    return cache.absolute()


def _cache_key(files: dict[str, str], tokenizer: dict[str, str], options: dict[str, Any]) -> str:
    try:
        versions = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "mlx-lm")}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"tokenizing needs {error.name}: pip install mlx-lm") from error
    parts = {
        "format": FORMAT_VERSION,
        "files": files,
        "tokenizer": tokenizer,
        "versions": versions,
        **options,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def has_tokenizer(model_path: Path) -> bool:
    """Whether a model's folder has tokenizer files."""
    return any(any(model_path.glob(pattern)) for pattern in _VOCABULARY_FILES)


def _tokenizer_hashes(model_path: Path) -> dict[str, str]:
    if not has_tokenizer(model_path):
        raise UserError(f"--model {model_path}: the folder contains no tokenizer (tokenizer.json or tokenizer.model)")
    paths = {path for pattern in _TOKENIZER_FILES for path in model_path.glob(pattern) if path.is_file()}
    return {path.relative_to(model_path).as_posix(): sha256_of(path) for path in paths}


@contextlib.contextmanager
def _progress_line() -> Iterator[Callable[[dict[str, Any]], None]]:
    """If stderr is a terminal, shows the child's progress on one line, which is erased at the end."""
    shown = False

    def show(state: dict[str, Any]) -> None:
        nonlocal shown
        if sys.stderr.isatty():
            text = f"tokenizing {state['file']}: {state['rows']:,} rows, {state['fraction']:.0%}"
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            shown = True

    try:
        yield show
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
