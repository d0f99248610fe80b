"""The child process that turns JSONL rows into files of tokens, so that training imports no transformers.

`python -m mebp_mlx.data.tokenize` reads a request (see `tokenize`) as JSON from its argument or stdin.
Formats, chat templates and labels are mlx-lm's: rows are {"text"}, {"prompt", "completion"[, "tools"]} or
{"messages"[, "tools"]}, one kind per file; with `mask_prompt` only the last message is labelled.
One row at a time is in memory. The folder of results appears under its name only when it is complete.
"""

from __future__ import annotations

import array
import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mebp_mlx.errors import UserError
from mebp_mlx.system.child import answer, one_line
from mebp_mlx.weights.hub import SPLITS

FORMAT_VERSION = 1
# Of each split: the rows' tokens one after another, where each row starts (one entry more than rows), the
# index in its row of the first token that may be a target, its line in the JSONL file. Little-endian, bare.
FILES = {"tokens": "i4", "offsets": "i8", "label_starts": "i4", "lines": "i4"}
_TYPECODES = {"i4": "i", "i8": "q"}
_TEMPORARY = ".tmp-"
_STALE_S = 24 * 3600


def tokenize(request: dict[str, Any], progress: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """Write the token files of every split into the folder `request["out"]` and return its `meta.json`.

    The request: `files` {split: [path, SHA-256]}, `model_path`, `out`, and the options `mask_prompt`,
    `max_seq_length`, `overlong`. Raises UserError for bad rows (file and line), for a file of which no row is
    left, for a bad tokenizer, for files that cannot be read or written.
    """
    out = Path(request["out"])
    tokenizer = load_tokenizer(Path(request["model_path"]))
    _remove_stale(out.parent)
    try:
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=_TEMPORARY))
        try:
            splits = {}
            for split in SPLITS:
                if split in request["files"]:
                    path, sha256 = request["files"][split]
                    splits[split] = _tokenize_split(
                        Path(path), sha256, split, folder, tokenizer, request, progress
                    )
            meta = {"format": FORMAT_VERSION, "splits": splits}
            with open(folder / "meta.json", "w", encoding="utf-8") as file:
                json.dump(meta, file)
                _sync(file)
            _publish(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:  # unreadable data, a full disk
        raise UserError(f"{error.filename or out.parent}: {error.strerror or one_line(error)}") from error
    return meta


def read_meta(folder: Path) -> dict[str, Any] | None:
    """`meta.json` of a complete folder of token files; None if it is missing, of another format, damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT_VERSION or not meta["splits"]:
            return None
        for split, counts in meta["splits"].items():
            rows, tokens = counts["rows"], counts["tokens"]
            for name, n_bytes in (
                ("tokens", 4 * tokens),
                ("offsets", 8 * rows + 8),
                ("label_starts", 4 * rows),
                ("lines", 4 * rows),
            ):
                if (folder / f"{split}.{name}").stat().st_size != n_bytes:
                    return None
        return meta
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_tokenizer(model_path: Path) -> Any:
    """mlx-lm's tokenizer of a model folder, with its chat template. Raises UserError naming the folder."""
    try:
        from mlx_lm.utils import load_tokenizer as load
    except ImportError as error:
        raise UserError(f"tokenizing needs mlx-lm: pip install mlx-lm ({one_line(error)})") from error
    try:
        return load(model_path)
    except Exception as error:  # whatever a broken tokenizer file makes its library raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"--model {model_path}: its tokenizer cannot be loaded: {reason}") from error


# Rows


def _read_rows(path: Path, digest: Any) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number, bytes read so far, object) of every line that is not blank; `digest` sees all bytes."""
    n_bytes = 0
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            digest.update(raw)
            n_bytes += len(raw)
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{line}: not UTF-8 text (byte {error.start + 1} of the line)"
                ) from error
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{line}: not valid JSON: {error.msg} (column {error.colno})"
                ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{line}: not valid JSON: {one_line(error)}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{line}: expected an object ({{...}}), found {_kind(row)}")
            yield line, n_bytes, row


def row_format(row: dict[str, Any]) -> str | None:
    """What mlx-lm would take a row for: "prompt" (with completion), "messages", "text", or None."""
    if "prompt" in row and "completion" in row:
        return "prompt"
    return next((key for key in ("messages", "text") if key in row), None)


def encode_row(
    row: dict[str, Any], kind: str, tokenizer: Any, mask_prompt: bool, where: str
) -> tuple[list[int], list[int]]:
    """(tokens, tokens of the prompt that is not labelled) of a row; UserError if the row cannot be read so.

    As in mlx-lm: text ends with the end-of-text token; the rest goes through the chat template, and with
    `mask_prompt` as many tokens are left without a label as the template's prompt for the last message has.
    """
    if kind == "text":
        text = _string(row, "text", where)
        if not text:
            raise UserError(f"{where}: the text is empty")
        if mask_prompt:
            raise UserError(f'{where}: --mask-prompt needs rows with a prompt, and this one is {{"text"}}')
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{where}: the tokenizer has no eos_token to end the text with (tokenizer_config.json)"
            )
        tokens = _guarded(lambda: tokenizer.encode(text), where)
        return (tokens if tokens[-1:] == [tokenizer.eos_token_id] else [*tokens, tokenizer.eos_token_id]), []
    messages = (
        _messages(row, where)
        if kind == "messages"
        else [
            {"role": "user", "content": _string(row, "prompt", where)},
            {"role": "assistant", "content": _string(row, "completion", where)},
        ]
    )
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError(f'{where}: "tools" must be a list, found {_kind(tools)}')
    if not tokenizer.has_chat_template:
        raise UserError(
            f'{where}: this row needs a chat template, and the tokenizer has none; use {{"text"}} rows, '
            "or add chat_template.jinja to the model's folder"
        )

    def template(messages: list[dict[str, Any]], **options: Any) -> list[int]:
        return _guarded(lambda: tokenizer.apply_chat_template(messages, tools=tools, **options), where)

    tokens = list(template(messages))
    if not mask_prompt:
        return tokens, []
    if len(messages) < 2:
        raise UserError(f"{where}: --mask-prompt needs a message before the last one")
    answered = kind == "prompt" or messages[-1]["role"] == "assistant"
    return tokens, list(template(messages[:-1], add_generation_prompt=answered))


def _guarded(work: Callable[[], list[int]], where: str) -> list[int]:
    try:
        return work()
    except Exception as error:  # templates raise what they like, tokenizers refuse lone surrogates
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{where}: the tokenizer refuses this row: {reason}") from error


def _string(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise UserError(f'{where}: "{key}" must be a string, found {_kind(row[key])}')
    return row[key]


def _messages(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else _kind(messages)
        raise UserError(f'{where}: "messages" must be a list of messages, found {found}')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise UserError(f"{where}: message {number} must be an object, found {_kind(message)}")
        if not isinstance(message.get("role"), str):
            raise UserError(f'{where}: message {number} needs a "role" (a string)')
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise UserError(
                f'{where}: the "content" of message {number} must be a string, found {_kind(content)}'
            )
    return messages


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# Files


def _tokenize_split(
    path: Path,
    sha256: str,
    split: str,
    folder: Path,
    tokenizer: Any,
    options: dict[str, Any],
    progress: Callable[[Any], None] | None,
) -> dict[str, Any]:
    """Tokenize one file and return its counts (see mebp_mlx.data.DataSets)."""
    limit, overlong, mask_prompt = options["max_seq_length"], options["overlong"], options["mask_prompt"]
    vocabulary = _vocabulary(Path(options["model_path"]))
    counts = {
        "rows": 0,
        "tokens": 0,
        "labels": 0,
        "n_read": 0,
        "n_masked_rows": 0,
        "n_overlong": 0,
        "n_prompt_differs": 0,
    }
    digest, size_bytes, kind, kind_line = hashlib.sha256(), max(path.stat().st_size, 1), "", 0
    reported_s = time.monotonic() + 2
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{split}.{name}", "wb")) for name in FILES}
        _append(files, "offsets", [0])
        for line, n_bytes, row in _read_rows(path, digest):
            where = f"{path}:{line}"
            found = row_format(row)
            if found is None:
                expected = '"text", "messages", or "prompt" and "completion"'
                raise UserError(f"{where}: no known keys: expected {expected}, found {_keys(row)}")
            if not kind:
                kind, kind_line = found, line
            if kind != found and not (kind in row and (kind != "prompt" or "completion" in row)):
                raise UserError(
                    f'{where}: has no "{kind}", as line {kind_line} and so the whole file must have'
                )
            tokens, prompt = encode_row(row, kind, tokenizer, mask_prompt, where)
            counts["n_read"] += 1
            counts["n_prompt_differs"] += tokens[: len(prompt)] != prompt
            if len(tokens) > limit:
                counts["n_overlong"] += 1
                if overlong == "error":
                    raise UserError(
                        f"{where}: the row has {len(tokens)} tokens, more than --max-seq-length {limit}"
                    )
                if overlong == "drop":
                    continue
                tokens = tokens[:limit]
            n_labels = len(tokens) - max(len(prompt), 1)
            if n_labels < 1:
                counts["n_masked_rows"] += 1
                continue
            if vocabulary is not None and max(tokens) >= vocabulary:
                raise UserError(
                    f"{where}: token {max(tokens)} is not in the model's vocabulary of {vocabulary} "
                    "(config.json): the tokenizer belongs to another model"
                )
            counts["rows"] += 1
            counts["tokens"] += len(tokens)
            counts["labels"] += n_labels
            for name, values in (
                ("tokens", tokens),
                ("offsets", [counts["tokens"]]),
                ("label_starts", [len(prompt)]),
                ("lines", [line]),
            ):
                _append(files, name, values)
            if progress is not None and time.monotonic() >= reported_s:
                reported_s = time.monotonic() + 0.2
                progress({"file": path.name, "rows": counts["n_read"], "fraction": n_bytes / size_bytes})
        for file in files.values():
            _sync(file)
    if digest.hexdigest() != sha256:
        raise UserError(f"{path}: the file changed while it was read")
    if not counts["rows"]:
        raise UserError(f"{path}: {_why_empty(counts)}")
    return counts


def _append(files: dict[str, Any], name: str, values: list[int]) -> None:
    numbers = array.array(_TYPECODES[FILES[name]], values)
    if sys.byteorder == "big":
        numbers.byteswap()
    files[name].write(numbers)


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in list(row)[:8]) or "none"


def _why_empty(counts: dict[str, int]) -> str:
    if not counts["n_read"]:
        return "the file holds no rows"
    dropped = counts["n_read"] - counts["n_masked_rows"]
    reasons = [f"{counts['n_masked_rows']} have no labelled token (within --max-seq-length)"]
    reasons += [f"{dropped} are longer than --max-seq-length and dropped"] if dropped else []
    return f"no row is left of {counts['n_read']}: {', '.join(reasons)}"


def _vocabulary(model_path: Path) -> int | None:
    """Rows of the model's embedding as config.json names them, if it does."""
    try:
        config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _publish(folder: Path, out: Path) -> None:
    """Give the finished folder its name, unless another process was faster; a damaged one there goes away."""
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
        with contextlib.suppress(FileNotFoundError):  # another process moved it away
            os.rename(out, trash / "damaged")
        shutil.rmtree(trash, ignore_errors=True)


def _remove_stale(cache: Path) -> None:
    """Remove what killed processes left behind more than a day ago."""
    for folder in cache.glob(f"{_TEMPORARY}*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # another process was faster


if __name__ == "__main__":
    answer(tokenize)
