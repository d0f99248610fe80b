"""`python -m mebp_mlx.convert`: a checkpoint of any supported kind -> 4 or 8 bits, streamed.

Only a few rows of one matrix are in memory at any time. One file holds one decoder block, page-aligned.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .hub import resolve_model
from .model.frozen import Model
from .model.pack import MODES, Packing
from .model.spec import read_config
from .options import Spec, build_parser, describe, option, suggest
from .options import convert as checked_value
from .repack import Repack, Report
from .runtime.footprint import PeakMeter
from .runtime.interrupt import Interrupt
from .runtime.log import megabytes
from .runtime.memory import settle
from .shards import DTYPES, NewFolder, flush
from .weights import INDEX_NAME

PROG = "python -m mebp_mlx.convert"
DONE, WRONG_INPUT, INTERRUPTED = 0, 2, 130
_TEXT_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_MADE_HERE = ("config.json", INDEX_NAME, "hf_quant_config.json")
_TEXT_BYTES = 256 << 20  # what is larger is no tokenizer
_GROUP = "conversion"


@dataclass(frozen=True)
class Options:
    """The command's options."""

    model: str | None = option(None, _GROUP, "source: a folder, a hub id, or bundled", metavar="SRC")
    out: str | None = option(None, _GROUP, "new or empty folder for the result", metavar="DIR")
    bits: int = option(4, _GROUP, "bits of a packed weight: 4 or 8")
    group_size: int | None = option(
        None, _GROUP, "weights that share a scale: 32, 64 or 128", metavar="N", shown_default="64, mxfp4: 32"
    )
    mode: str = option("affine", _GROUP, "affine, symmetric, or mxfp4", choices=MODES)
    dtype: str | None = option(
        None,
        _GROUP,
        "of all that is not packed: float32, float16 or bfloat16",
        choices=("float32", "float16", "bfloat16"),
        shown_default="the source's",
    )

    def packing(self) -> Packing:
        """The format to convert to. UserError for one that does not exist."""
        mxfp4 = self.mode == "mxfp4"
        group_size = (32 if mxfp4 else 64) if self.group_size is None else self.group_size
        if self.bits not in (4, 8):
            raise UserError(f"--bits {self.bits}: is not one of 4, 8")
        if group_size not in (32, 64, 128):
            raise UserError(f"--group-size {group_size}: is not one of 32, 64, 128")
        if mxfp4 and self.bits != 4:
            raise UserError(f"--bits {self.bits}: mxfp4 has 4")
        if mxfp4 and group_size != 32:
            raise UserError(f"--group-size {group_size}: mxfp4 has groups of 32")
        return Packing(self.bits, group_size, self.mode)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. What a user can get wrong is one line on stderr, no traceback."""
    try:
        options = _from_flags(argv)
        with Interrupt(), PeakMeter() as meter:
            report = convert(options, say=_say)
            for line in _summary(options, report, meter.peak_bytes):
                _say(line)
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted; nothing is left behind", file=sys.stderr)
        return INTERRUPTED
    return DONE


def convert(options: Options, say: Any = lambda text: None) -> Report:
    """Converts `options.model` into the new folder `options.out`.

    say: called with a line for each decoder block. Raises UserError before anything is written for all that can be
    known then; whatever is raised, the folder appears whole or not at all.
    """
    began_s = time.perf_counter()
    packing = options.packing()
    for flag, value in (("--model", options.model), ("--out", options.out)):
        if not value:
            raise UserError(f"{flag}: is required")
    assert options.model and options.out
    out = NewFolder(options.out, "--out")
    out.check()
    source = resolve_model(options.model)
    if out.path.is_relative_to(source.resolve()):
        raise UserError(f"{out.shown}: is inside the source {source}")
    settle()
    model = Model(source)
    try:
        plan = Repack(model, packing, DTYPES[_SAFETENSORS[options.dtype]] if options.dtype else None)
        texts = _text_files(source)
        with _errors_of_the_disk(out):
            out.remove_leftovers()
            for folder in out.removed:
                say(f"removed {folder}, which a killed conversion left behind")
            out.check_space(plan.report.bytes_after + sum(path.stat().st_size for path in texts))
            with out:
                plan.write(out.partial, say)
                _write_texts(source, out.partial, texts, plan, options)
                Model(out.partial).weights.close()  # what is published can be opened
                out.publish()
    finally:
        model.weights.close()
    plan.report.seconds = time.perf_counter() - began_s
    return plan.report


_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@contextlib.contextmanager
def _errors_of_the_disk(out: NewFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{out.shown}: {error.strerror or error}") from None


# Everything but tensors


def _text_files(source: Path) -> list[Path]:
    """Tokenizer, chat template and the like."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.suffix in _TEXT_FILES
        and path.name not in _MADE_HERE
        and not path.name.endswith(".index.json")
        and path.is_file()
        and path.stat().st_size <= _TEXT_BYTES
    ]


def _write_texts(source: Path, folder: Path, texts: Sequence[Path], plan: Repack, options: Options) -> None:
    for path in texts:
        with open(path, "rb") as old, open(folder / path.name, "xb") as new:
            shutil.copyfileobj(old, new)
            flush(new)
    config = read_config(source)
    for key in ("_name_or_path", "vision_config"):  # as mlx-lm does: the vision tower is not there
        config.pop(key, None)
    how = plan.packing.stored
    config["quantization"] = {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}
    config["quantization_config"] = config["quantization"]
    for part in (config, config.get("text_config")):
        for key in ("torch_dtype", "dtype"):
            if options.dtype and isinstance(part, dict) and key in part:
                part[key] = options.dtype
    _write_json(folder / "config.json", dict(sorted(config.items())))
    about = {"total_size": plan.report.bytes_after, "total_parameters": plan.report.n_parameters}
    _write_json(folder / INDEX_NAME, {"metadata": about, "weight_map": dict(sorted(plan.weight_map.items()))})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=4) + "\n")
        flush(file)


# Command line


def _from_flags(argv: Sequence[str] | None) -> Options:
    parser = build_parser(
        Options,
        PROG,
        "Convert a checkpoint to 4 or 8 bits, a few rows at a time, into one page-aligned file per decoder block.",
        "affine is mlx-lm's own quantization, bit by bit; symmetric has no offset (INT4) and is stored so that any\n"
        "reader of affine weights loads it; mxfp4 has 4-bit floats in groups of 32. A packed source is decompressed\n"
        "on the way. DIR appears when it is complete. exit codes: 0 done, 2 wrong option or input, 130 interrupted",
    )
    found, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    specs = describe(Options)
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise UserError(f"{flag}: no such option{suggest(flag, [spec.flag for spec in specs.values()])}")
    return Options(**{name: _checked(specs[name], raw) for name, raw in vars(found).items()})


def _checked(spec: Spec, raw: Any) -> Any:
    try:
        return checked_value(spec, raw)
    except ValueError as error:
        raise UserError(f"{spec.flag}: {error}") from None


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed pipe does not stop the conversion
        print(text, flush=True)


def _summary(options: Options, report: Report, peak_bytes: int) -> Iterator[str]:
    packing, dtype = options.packing(), options.dtype or "the source's dtype"
    bits = 8 * report.bytes_after / report.n_parameters
    yield f"{options.model} -> {options.out}"
    yield f"  format      {packing.mode}, {packing.bits} bits, groups of {packing.group_size}; the rest in {dtype}"
    yield f"  packed      {report.n_packed} matrices{_some(report.unpacked, 'left unpacked')}"
    yield (
        f"  bytes       {report.bytes_before:,} -> {report.bytes_after:,} "
        f"({report.bytes_after / max(report.bytes_before, 1):.1%}), {bits:.2f} bits a parameter"
    )
    worst = max(report.errors, key=report.errors.__getitem__)
    yield f"  error       {report.error:.2%} of the weights' RMS, worst matrix {report.errors[worst]:.2%} ({worst})"
    if report.left_out:
        yield f"  left out    tensors that the model does not use{_some(report.left_out, '')}"
    yield f"  memory      peak footprint {megabytes(peak_bytes)}"
    yield f"  time        {report.seconds:.1f} s"


def _some(names: Sequence[str], what: str) -> str:
    return f"{'; ' if what else ': '}{len(names)} {what + ' ' if what else ''}such as {names[0]}" if names else ""


if __name__ == "__main__":
    sys.exit(main())
