"""The child process that tokenizes JSONL rows into binary files, so that training does not import transformers.

`python -m mebp_mlx.data.tokenize` reads a request (see `tokenize`) as JSON from its argument or stdin.
Rows are {"text"}, {"prompt", "completion"[, "tools"]} or {"messages"[, "tools"]} (data/rows.py), one kind per file.
Only one row at a time is in memory. The result folder gets its name only when it is complete.
"""

from __future__ import annotations

import array
import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mebp_mlx.data.rows import Encoder, Row, RowOptions, kind_of
from mebp_mlx.errors import UserError
from mebp_mlx.system.child import answer, one_line
from mebp_mlx.system.files import flush
from mebp_mlx.weights.hub import SPLITS

FORMAT_VERSION = 3
# The files of a split: the tokens of all rows; 1 for each token that is a target, else 0; the start of each row (one
# entry more than rows); the line of each row in the JSONL file. Little-endian, without a header.
FILES = {"tokens": "i4", "labels": "u1", "offsets": "i8", "lines": "i4"}
_TYPECODES = {"i4": "i", "u1": "B", "i8": "q"}
_TEMPORARY = ".tmp-"
_STALE_S = 24 * 3600
_ROW_S = 20  # time limit for one row
_MEMORY_BYTES = 4 << 30  # the child's limit: a chat template must not exhaust the machine's memory


def tokenize(request: dict[str, Any], progress: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """Writes the token files of every split to the folder `request["out"]` and returns its `meta.json`.

    The request has `files` {split: [path, SHA-256]}, `model_path`, `out`, and `rows` (the fields of RowOptions).
    Raises UserError for a bad row (naming file and line), a file with no usable row, a bad tokenizer, or a file that
    cannot be read or written.
    """
    out = Path(request["out"])
    model_path = Path(request["model_path"])
    encoder = Encoder(load_tokenizer(model_path), RowOptions(**request["rows"]))
    vocabulary = _vocabulary(model_path)
    _remove_stale(out.parent)
    try:
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=_TEMPORARY))
        try:
            splits = {}
            for split in SPLITS:
                if split in request["files"]:
                    path, sha256 = request["files"][split]
                    files = _Files(folder, split)
                    with files:
                        splits[split] = _tokenize_split(Path(path), sha256, files, encoder, vocabulary, progress)
            hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
            meta = {"format": FORMAT_VERSION, "splits": splits, "sha256": hashes}
            with open(folder / "meta.json", "w", encoding="utf-8") as file:
                json.dump(meta, file)
                flush(file)
            _publish(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:  # unreadable data, a full disk
        raise UserError(f"{error.filename or out.parent}: {error.strerror or one_line(error)}") from error
    return meta


def read_meta(folder: Path) -> dict[str, Any] | None:
    """`meta.json` of a complete folder of token files; None if the folder is missing, damaged, in another format
    version, or owned by another user, who could otherwise choose the training data.
    """
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return None
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT_VERSION or not meta["splits"]:
            return None
        for split, counts in meta["splits"].items():
            rows, tokens = counts["rows"], counts["tokens"]
            for name, n_bytes in (
                ("tokens", 4 * tokens),
                ("offsets", 8 * rows + 8),
                ("labels", tokens),
                ("lines", 4 * rows),
            ):
                path = folder / f"{split}.{name}"
                if path.stat().st_size != n_bytes or sha256_of(path) != meta["sha256"][path.name]:
                    return None
        return meta
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sha256_of(path: Path) -> str:
    """The SHA-256 hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 16):
            digest.update(block)
    return digest.hexdigest()


def load_tokenizer(model_path: Path) -> Any:
    """mlx-lm's tokenizer of a model folder, with its chat template. Raises UserError naming the folder."""
    try:
        from mlx_lm.utils import load_tokenizer as load
    except ImportError as error:
        raise UserError(f"tokenizing needs mlx-lm: pip install mlx-lm ({one_line(error)})") from error
    try:
        return load(model_path)
    except Exception as error:  # a broken tokenizer file can raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"--model {model_path}: its tokenizer cannot be loaded: {reason}") from error


# Rows


def _read_rows(path: Path, digest: Any) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields (line number, bytes read so far, object) for each non-blank line; updates `digest` with all bytes."""
    n_bytes = 0
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            digest.update(raw)
            n_bytes += len(raw)
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{line}: not UTF-8 text (byte {error.start + 1} of the line)") from error
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{line}: not valid JSON: {error.msg} (column {error.colno})") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{line}: not valid JSON: {one_line(error)}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{line}: expected an object ({{...}}), found {kind_of(row)}")
            yield line, n_bytes, row


# Files


class _Files:
    """Writes the token files of one split."""

    def __init__(self, folder: Path, split: str) -> None:
        self._paths = {name: folder / f"{split}.{name}" for name in FILES}
        self._open: dict[str, Any] = {}

    def __enter__(self) -> _Files:
        with contextlib.ExitStack() as stack:
            self._open = {name: stack.enter_context(open(path, "wb")) for name, path in self._paths.items()}
            self.append("offsets", [0])
            self._close = stack.pop_all().close
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def append(self, name: str, values: Sequence[int]) -> None:
        numbers = array.array(_TYPECODES[FILES[name]], values)
        if sys.byteorder == "big":
            numbers.byteswap()
        self._open[name].write(numbers)

    def sync(self) -> None:
        for file in self._open.values():
            flush(file)


def _tokenize_split(
    path: Path,
    sha256: str,
    files: _Files,
    encoder: Encoder,
    vocabulary: int | None,
    progress: Callable[[Any], None] | None,
) -> dict[str, Any]:
    """Tokenizes one file and returns its counts (see mebp_mlx.data.dataset.DataSets)."""
    names = ("rows", "tokens", "labels", "n_read", "n_masked_rows", "n_overlong", "n_prompt_differs", "n_unsure")
    counts = dict.fromkeys(names, 0)
    digest, size_bytes = hashlib.sha256(), max(path.stat().st_size, 1)
    kinds, reported_s = _Kinds(encoder.options), time.monotonic() + 2
    for line, n_bytes, content in _read_rows(path, digest):
        where = f"{path}:{line}"
        with _time_limit(where):
            row = encoder.encode(content, kinds.of(content, line, where), where)
        counts["n_read"] += 1
        counts["n_prompt_differs"] += row.differs
        counts["n_unsure"] += row.unsure
        kept = _fitted(row, encoder.options, counts, where)
        if kept is not None:
            tokens, labels = kept
            if vocabulary is not None and max(tokens) >= vocabulary:
                raise UserError(
                    f"{where}: token {max(tokens)} is not in the model's vocabulary of {vocabulary} "
                    "(config.json): the tokenizer belongs to another model"
                )
            counts["rows"] += 1
            counts["tokens"] += len(tokens)
            counts["labels"] += sum(labels)
            files.append("tokens", tokens)
            files.append("labels", labels)
            files.append("offsets", [counts["tokens"]])
            files.append("lines", [line])
        if progress is not None and time.monotonic() >= reported_s:
            reported_s = time.monotonic() + 0.2
            progress({"file": path.name, "rows": counts["n_read"], "fraction": n_bytes / size_bytes})
    files.sync()
    if digest.hexdigest() != sha256:
        raise UserError(f"{path}: the file changed while it was being read")
    if not counts["rows"]:
        raise UserError(f"{path}: {_why_empty(counts)}")
    return counts


@contextlib.contextmanager
def _time_limit(where: str) -> Iterator[None]:
    """Raises UserError if a row takes too long: a chat template is a program from the model's folder."""

    def expire(*_: object) -> None:
        raise UserError(f"{where}: the tokenizer or its chat template took more than {_ROW_S} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, _ROW_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_memory() -> None:
    """Limits this process to _MEMORY_BYTES, if the system enforces the limit (macOS does not)."""
    with contextlib.suppress(ValueError, OSError):
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = [limit for limit in (soft, hard, _MEMORY_BYTES) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


class _Kinds:
    """Determines each row's kind: the first row's for all, or each row's own (RowOptions.one_kind)."""

    def __init__(self, options: RowOptions) -> None:
        self._options, self._first, self._first_line = options, "", 0

    def of(self, row: dict[str, Any], line: int, where: str) -> str:
        options, kind = self._options, self._options.kind(row)
        if kind is None:
            prompt, completion = options.keys("prompt")
            expected = f'"{options.text_feature}", "{options.chat_feature}", or "{prompt}" and "{completion}"'
            raise UserError(f"{where}: no known keys: expected {expected}, found {_keys(row)}")
        if not self._first:
            self._first, self._first_line = kind, line
        if not options.one_kind:
            return kind
        if missing := [key for key in options.keys(self._first) if key not in row]:
            raise UserError(
                f'{where}: has no "{missing[0]}", but line {self._first_line} has: all rows of a file share their keys'
            )
        return self._first


def _fitted(row: Row, options: RowOptions, counts: dict[str, int], where: str) -> tuple[list[int], bytearray] | None:
    """The tokens within the length limit and their labels (1: a target); None if the row is skipped."""
    tokens, limit = row.tokens, options.max_seq_length
    if len(tokens) > limit:
        counts["n_overlong"] += 1
        if options.overlong == "error":
            raise UserError(f"{where}: the row has {len(tokens)} tokens, more than --max-seq-length {limit}")
        if options.overlong == "drop":
            return None
        tokens = tokens[:limit]
    labels = bytearray(len(tokens))
    for start, stop in row.labels:
        start, stop = max(start, 1), min(stop, len(tokens))  # nothing predicts the first token
        labels[start:stop] = b"\1" * max(stop - start, 0)
    if not any(labels):
        counts["n_masked_rows"] += 1
        return None
    return tokens, labels


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in list(row)[:8]) or "none"


def _why_empty(counts: dict[str, int]) -> str:
    if not counts["n_read"]:
        return "the file contains no rows"
    dropped = counts["n_read"] - counts["n_masked_rows"]
    reasons = [f"{counts['n_masked_rows']} have no labelled token (within --max-seq-length)"]
    reasons += [f"{dropped} are longer than --max-seq-length and dropped"] if dropped else []
    return f"none of {counts['n_read']} rows is usable: {', '.join(reasons)}"


def _vocabulary(model_path: Path) -> int | None:
    """The model's vocabulary size in config.json, or None."""
    try:
        config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def _publish(folder: Path, out: Path) -> None:
    """Renames the finished folder, unless another process was faster; replaces a damaged one."""
    while True:
        try:
            os.rename(folder, out)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if read_meta(out) is not None:
            return
        trash = Path(tempfile.mkdtemp(dir=out.parent, prefix=_TEMPORARY))
        with contextlib.suppress(FileNotFoundError):  # another process moved it first
            os.rename(out, trash / "damaged")
        shutil.rmtree(trash, ignore_errors=True)


def _remove_stale(cache: Path) -> None:
    """Removes folders that killed processes left behind more than a day ago."""
    for folder in cache.glob(f"{_TEMPORARY}*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # another process was faster


if __name__ == "__main__":
    limit_memory()
    answer(tokenize)
