"""Mutants of every input file: each must be read, or refused with a UserError, in seconds and with little memory.

A forked process reads a batch of mutants and reports each through a pipe, which identifies a mutant that ends it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 10  # per mutant; a longer time is a hang
GROWTH_MB = 50  # private memory above that of reading the undamaged files
_GUARD_BYTES = 4 << 30
_BATCH = 100
_STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 10**400, 1e308, float("nan"), float("inf"), 0.5, "", "a", "\0"),
    *("\ud800", "é" * 300, "../../etc/passwd", [], [[]], {}, {"a": {}}, [0] * 50, "{{ x }}", "{% for %}"),
)


@dataclass(frozen=True)
class Kind:
    """A kind of file to mutate: written(folder) writes the valid files, read(folder) reads them or raises."""

    files: tuple[str, ...]
    written: Callable[[Path], None]
    read: Callable[[Path], object]


# Mutation


def mutant(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four changes, made in its JSON value (if it has one) or in its bytes."""
    for _ in range(rng.randint(1, 4)):
        content = (_changed_json(content, rng) if rng.random() < 0.5 else None) or _changed_bytes(content, rng)
    return content


def _changed_bytes(content: bytes, rng: random.Random) -> bytes:
    # Most of a weight file is numbers, for which any value is valid: mutate mainly the beginning.
    limit = len(content) if rng.random() < 0.2 else min(len(content), 4096)
    a = rng.randrange(limit + 1)
    b = min(len(content), a + rng.choice((1, 1, 2, 8, 100)))
    part = {
        "flip": bytes(byte ^ (1 << rng.randrange(8)) for byte in content[a:b]),
        "drop": b"",
        "double": content[a:b] * 2,
        "random": rng.randbytes(b - a),
        "digits": b"9" * rng.choice((1, 20, 5000)),
        "nested": rng.choice((b"[", b"{", b'{"a":', b"&a [*a,", b"- ")) * rng.choice((1, 50, 3000)),
        "strange": rng.choice((b"\0", b"\xff\xfe", b"\r\n", b"\xed\xa0\x80", b"!!python/object:os.system ", b"1e999")),
    }[rng.choice(("flip", "flip", "drop", "double", "random", "digits", "nested", "strange"))]
    if rng.random() < 0.1:
        return content[:a]  # cut short
    return content[:a] + part + content[b:]


def _changed_json(content: bytes, rng: random.Random) -> bytes | None:
    """Changes one value, key or line of JSON, JSONL or a safetensors header; None for other content."""
    head, rest = content, b""
    if len(content) > 8 and (n := int.from_bytes(content[:8], "little")) <= len(content) - 8:
        head, rest = content[8 : 8 + n], content[8 + n :]
    if is_lines := head[:1] == b"{" and b"}\n{" in head:
        lines = head.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        head = lines[at]
    try:
        value = json.loads(head)
        text = json.dumps(_changed(value, rng)).encode()
    except (ValueError, RecursionError):
        return None
    if is_lines:
        return b"".join([*lines[:at], text + b"\n", *lines[at + 1 :]])
    return len(text).to_bytes(8, "little") + text + rest if rest else text


def _changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value)[:200])
        what = rng.random()
        if what < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if what < 0.15:
            return {**value, str(rng.choice(_STRANGE)): value[key]}
        return {**value, key: _changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(min(len(value), 200))
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    return rng.choice(_STRANGE)


# Reading


def trials(name: str, folder: Path, n_mutants: int, seed: int) -> Iterator[str | None]:
    """Yields for each mutant of a kind the fault in reading it, or None."""
    kind = KINDS[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    in_child(kind.written, folder)
    whole = {file: (folder / file).read_bytes() for file in kind.files}
    done = 0
    while done < n_mutants:
        last = min(done + _BATCH, n_mutants)
        results = _batch(kind, folder, whole, range(done, last), seed)
        yield from results
        done += len(results)


def _batch(kind: Kind, folder: Path, whole: dict[str, bytes], numbers: range, seed: int) -> list[str | None]:
    """The results of these mutants, up to one that ends the process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            _read_all(kind, folder, whole, numbers, seed, write)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answers = [json.loads(line) for line in pipe.read().splitlines()]
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        how = "hangs" if number == signal.SIGALRM else f"ends by {signal.Signals(number).name}"
        answers.append(f"mutant {numbers[len(answers)]}: {how}")
    return answers


def _read_all(kind: Kind, folder: Path, whole: dict[str, bytes], numbers: range, seed: int, pipe: int) -> None:
    """Reads the mutants in the forked process, and writes each result to the pipe."""
    from mebp_mlx.errors import UserError
    from mebp_mlx.system.footprint import PeakMeter, footprint_bytes

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    for file, content in whole.items():
        (folder / file).write_bytes(content)
    kind.read(folder)  # so that imports and caches do not count as a mutant's memory
    soft = footprint_bytes() + _GUARD_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (soft, soft))
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        changed = rng.choice(kind.files)
        for file, content in whole.items():
            (folder / file).write_bytes(mutant(content, rng) if file == changed else content)
        wrong, before = None, footprint_bytes()
        signal.alarm(SECONDS)
        with PeakMeter() as meter:
            try:
                kind.read(folder)
            except UserError:
                pass
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                wrong = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:100]}"
        signal.alarm(0)
        if wrong is None and (grown_mb := (meter.peak_bytes - before) / 1e6) > GROWTH_MB:
            wrong = f"takes {grown_mb:.0f} MB"
        told = None if wrong is None else f"mutant {number} of {changed}: {wrong}"
        os.write(pipe, json.dumps(told).encode() + b"\n")


# Kinds


def _write_model(folder: Path) -> None:
    from mebp_mlx.testing.tiny import packed_config, write_model

    config = packed_config("llama") | {"num_hidden_layers": 2}
    write_model(folder, config, quantization={"group_size": 32, "bits": 4})


def in_child(write: Callable[[Path], None], folder: Path) -> None:
    """Writes in a child process, because a process that will be forked must not have used MLX."""
    child = os.fork()
    if not child:
        code = 1
        try:
            write(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the files in {folder} cannot be made")


def _index(folder: Path) -> None:
    _write_model(folder)
    names = [f"model-{i}.safetensors" for i in (1, 2)]
    (folder / "model.safetensors").rename(folder / names[0])
    shutil.copy(folder / names[0], folder / "spare")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[0], "b": names[0]}}))


def _adapters(folder: Path) -> None:
    from mebp_mlx.export.adapters import save_adapters
    from mebp_mlx.model.base import Model
    from mebp_mlx.model.lora import init_lora

    _write_model(folder / "model")
    save_adapters(folder, init_lora(Model(folder / "model").spec, rank=2, scale=1.0), 1, {})


def _checkpoint(folder: Path) -> None:
    import mlx.core as mx

    from mebp_mlx.config import TrainConfig
    from mebp_mlx.training.checkpoint import Checkpoint, save_checkpoint

    state = {"a.b": {"m": mx.ones((3, 4)), "v": mx.ones((3, 4))}, "step": mx.array(3)}
    save_checkpoint(folder, Checkpoint({"a.b": mx.ones((3, 4))}, state, 3, TrainConfig().to_dict(), {"model": "x"}))


def _tokenizer(folder: Path) -> None:
    from mebp_mlx.bundled import MODEL_DIR

    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(MODEL_DIR / name, folder)


def _read_adapters(folder: Path) -> object:
    from mebp_mlx.export.adapters import load_adapters
    from mebp_mlx.model.base import Model

    return load_adapters(folder, Model(folder / "model").spec)


def _read_model(folder: Path) -> None:
    from mebp_mlx.model.base import Model

    model = Model(folder)
    for name in model.weights.names:
        model.weights.view(name).tobytes()
    model.weights.close()


def _read_checkpoint(folder: Path) -> None:
    import mlx.core as mx

    from mebp_mlx.config import TrainConfig
    from mebp_mlx.training.checkpoint import load_checkpoint, saved_options

    saved = load_checkpoint(folder)
    mx.eval({name: mx.array(value) for name, value in saved.arrays().items()})
    TrainConfig.from_args(["--adapter-path", str(folder)], saved_options(folder))


def _read_rows(folder: Path) -> None:
    from mebp_mlx.bundled import MODEL_DIR
    from mebp_mlx.data.tokenize import sha256_of, tokenize

    _tokenize(folder, MODEL_DIR, sha256_of, tokenize)


def _read_tokenizer(folder: Path) -> None:
    from mebp_mlx.data.tokenize import sha256_of, tokenize

    (folder / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    _tokenize(folder, folder, sha256_of, tokenize)


def _tokenize(folder: Path, model: Path, sha256_of: Any, tokenize: Any) -> None:
    file, out = folder / "train.jsonl", folder / "tokens" / "out"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    rows = {"train_on": "all", "max_seq_length": 64, "overlong": "truncate"}
    files = {"train": [str(file), sha256_of(file)]}
    tokenize({"rows": rows, "model_path": str(model), "out": str(out), "files": files})


def _rows(folder: Path) -> None:
    from mebp_mlx.bundled import DATA_DIR

    lines = (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:20]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")


_YAML = """\
model: bundled
learning_rate: 1e-4
lora_parameters: {rank: 8, scale: 20.0, keys: [q_proj, v_proj]}
lr_schedule:
  name: cosine_decay
  arguments: [1e-4, 100, 1e-6]
  warmup: 10
optimizer: adam
optimizer_config: &o {adam: {betas: [0.9, 0.99]}}
memory_budget: 500MB
hf_dataset: {path: a/b, train_split: "train[:10]"}
"""
_LOG = "".join(
    json.dumps({"event": event, "time": 1.5, "iter": n, "loss": 2.5}) + "\n"
    for n in range(5)
    for event in ("start", "train", "valid", "save")
)


def _read_yaml(folder: Path) -> None:
    from mebp_mlx.config import TrainConfig
    from mebp_mlx.training.optimizers import make_optimizer

    make_optimizer(TrainConfig.from_args(["--config", str(folder / "run.yaml")]), 100)


def _read_log(folder: Path) -> None:
    from mebp_mlx.training.log import RunLog, last_event

    for event in ("train", "valid", "save", "test"):
        last_event(folder, event)
    with RunLog(folder, n_iters=3, continues=True) as log:
        log.event("start")


def _text(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


KINDS: dict[str, Kind] = {
    "safetensors": Kind(("model.safetensors",), _write_model, _read_model),
    "index": Kind(("model.safetensors.index.json",), _index, _read_model),
    "config": Kind(("config.json",), _write_model, _read_model),
    "tokenizer": Kind(("tokenizer.json", "tokenizer_config.json"), _tokenizer, _read_tokenizer),
    "rows": Kind(("train.jsonl",), _rows, _read_rows),
    "yaml": Kind(("run.yaml",), _text("run.yaml", _YAML), _read_yaml),
    "adapters": Kind(("adapters.safetensors", "adapter_config.json"), _adapters, _read_adapters),
    "checkpoint": Kind(("checkpoint.safetensors",), _checkpoint, _read_checkpoint),
    "log": Kind(("log.jsonl",), _text("log.jsonl", _LOG), _read_log),
}
