"""`python -m mebp_mlx.convert`: any supported checkpoint -> 2 to 8 bits, 16, or as it is but aligned; streamed.

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

import mlx.core as mx

from .errors import UserError, memory_errors_told
from .export.quantize import BITS, GROUP_SIZES, MIXED, MODES, Packing, Recipe
from .export.requantize import Repack, Report, Say
from .model.base import Model
from .model.config import FLOAT_MODES, Quantization, read_config
from .options import Spec, build_parser, describe, option, suggest
from .options import convert as checked_value
from .system.allocator import settle
from .system.footprint import PeakMeter
from .system.units import megabytes
from .training.interrupt import Interrupt
from .weights.hub import resolve_model
from .weights.safetensors import INDEX_NAME
from .weights.writer import NewFolder, flush

PROG = "python -m mebp_mlx.convert"
DONE, WRONG_INPUT, INTERRUPTED = 0, 2, 130
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_TEXT_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_MADE_HERE = ("config.json", INDEX_NAME, "hf_quant_config.json")
_TEXT_BYTES = 256 << 20  # what is larger is no tokenizer
_GROUP = "conversion"
KEEP = "keep"
_NOT_HERE = {
    "--upload-repo": "not available: `hf upload NAME DIR` does it",
    "--trust-remote-code": "no code of a model's folder is ever run; leave it out",
}


@dataclass(frozen=True)
class Options:
    """The command's options."""

    # fmt: off
    model: str | None = option(None, _GROUP, "source: a folder, a hub id, or bundled", metavar="SRC",
                               flags=("--hf-path",))
    out: str = option("mlx_model", _GROUP, "new or empty folder for the result", metavar="DIR", path=True,
                      flags=("--mlx-path",))
    quantize: bool = option(False, _GROUP, "pack, as is done without it", flags=("-q",))
    dequantize: bool = option(False, _GROUP, "pack nothing: matrices in 16 or 32 bits", flags=("-d",))
    bits: int | None = option(None, _GROUP, "of a packed weight: 2, 3, 4, 5, 6 or 8", metavar="N",
                              flags=("--q-bits",), shown_default="4, mxfp8: 8")
    group_size: int | None = option(None, _GROUP, "weights that share a scale: 32, 64 or 128", metavar="N",
                                    flags=("--q-group-size",), shown_default="64, mx: 32, nv: 16")
    mode: str | None = option(None, _GROUP, "affine, symmetric, mxfp4, mxfp8, nvfp4; keep: the same bits, aligned",
                              choices=(*MODES, KEEP), flags=("--q-mode",), shown_default="affine")
    quant_predicate: str | None = option(None, _GROUP, f"more bits where they matter: {', '.join(MIXED)}",
                                         choices=tuple(MIXED), shown_default="the same for all")
    dtype: str | None = option(None, _GROUP, f"of what is not packed: {', '.join(_DTYPES)}", choices=tuple(_DTYPES),
                               shown_default="as it is")
    # fmt: on

    @property
    def keeps(self) -> bool:
        """Whether every bit stays as it is."""
        return self.mode == KEEP

    def recipe(self) -> Recipe | None:
        """How matrices are to be packed, None to keep every bit. UserError for what does not exist."""
        how = {"--bits": self.bits, "--group-size": self.group_size, "--quant-predicate": self.quant_predicate}
        given = {flag: value for flag, value in how.items() if value is not None}
        if self.dequantize:
            given |= {"--quantize": ""} if self.quantize else {}
            given |= {"--mode": self.mode} if self.mode is not None else {}
            for flag, value in given.items():
                raise UserError(f"{flag} {value}".strip() + ": --dequantize packs nothing")
            return Recipe(None)
        if self.keeps:
            given |= {"--quantize": ""} if self.quantize else {}
            given |= {"--dtype": self.dtype} if self.dtype is not None else {}
            for flag, value in given.items():
                raise UserError(f"{flag} {value}".strip() + ": --mode keep changes no bit")
            return None
        return self._packed(self.mode or "affine")

    def _packed(self, mode: str) -> Recipe:
        bits, group_size = self.bits, self.group_size
        if self.quant_predicate is not None:
            if mode != "affine":
                raise UserError(f"--quant-predicate {self.quant_predicate}: has affine bits, not {mode}")
            if bits is not None:
                raise UserError(f"--bits {bits}: --quant-predicate {self.quant_predicate} chooses them")
            bits = MIXED[self.quant_predicate][0]
        default_bits, default_group_size = FLOAT_MODES.get(mode, (4, 64))
        bits = default_bits if bits is None else bits
        group_size = default_group_size if group_size is None else group_size
        for flag, value, known in (
            ("--bits", bits, BITS[mode]),
            ("--group-size", group_size, GROUP_SIZES[mode]),
        ):
            if value not in known:
                raise UserError(f"{flag} {value}: {mode} has {' or '.join(map(str, known))}")
        high = MIXED[self.quant_predicate][1] if self.quant_predicate is not None else None
        return Recipe(Packing(bits, group_size, mode), high)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. What a user can get wrong is one line on stderr, no traceback."""
    try:
        options = _from_flags(argv)
        with memory_errors_told(), Interrupt(), PeakMeter() as meter:
            report = convert(options, say=_say)
            for line in _summary(options, report, meter.peak_bytes):
                _say(line)
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted; nothing unfinished is left behind", file=sys.stderr)
        return INTERRUPTED
    return DONE


def convert(options: Options, say: Say = lambda text: None) -> Report:
    """Converts `options.model` into the new folder `options.out`.

    say: called with a line for each decoder block. Raises UserError, before anything is written for all that can be
    known then; whatever is raised, the folder appears whole or not at all.
    """
    began_s = time.perf_counter()
    recipe = options.recipe()
    if not options.model:
        raise UserError("--model: is required")
    out = NewFolder(options.out, "--out")
    with _errors_of_the_disk(out):
        out.check()
    source = resolve_model(options.model)
    if out.path.is_relative_to(source.resolve()):
        raise UserError(f"{out.shown}: is inside the source {source}")
    settle()
    model = Model(source)
    try:
        repack = Repack(model, recipe, _DTYPES[options.dtype] if options.dtype else None)
        texts = _text_files(source)
        config = _new_config(read_config(source), recipe, repack.report.others, options.dtype)
        with _errors_of_the_disk(out):
            out.remove_leftovers()
            for folder in out.removed:
                say(f"removed {folder}, which a killed conversion left behind")
            out.check_space(repack.report.bytes_after + sum(path.stat().st_size for path in texts))
            with out:
                weight_map = repack.write(out.partial, say)
                for path in texts:
                    with open(path, "rb") as old, open(out.partial / path.name, "xb") as new:
                        shutil.copyfileobj(old, new)
                        flush(new)
                _write_json(out.partial / "config.json", config)
                _write_json(out.partial / INDEX_NAME, _index(repack.report, weight_map))
                Model(out.partial).weights.close()  # what is published can be opened
                out.publish()
    finally:
        model.weights.close()
    repack.report.seconds = time.perf_counter() - began_s
    return repack.report


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


def _new_config(
    config: dict[str, Any], recipe: Recipe | None, others: dict[str, Quantization], dtype: str | None
) -> dict[str, Any]:
    """config.json as mlx-lm writes it: sorted, without the vision tower that is not there."""
    config = {key: value for key, value in sorted(config.items()) if key not in ("_name_or_path", "vision_config")}
    if recipe is None:
        return config
    text = config.get("text_config")
    for part in (config, text):
        if not isinstance(part, dict):
            continue
        for key in ("torch_dtype", "dtype"):
            if dtype and key in part:
                part[key] = dtype
        for key in ("quantization", "quantization_config"):  # of a source that was packed
            part.pop(key, None)
    if recipe.packing is not None:
        config["quantization"] = {
            **_described(recipe.packing.stored),
            **{n: _described(how) for n, how in others.items()},
        }
        config["quantization_config"] = config["quantization"]
    return dict(sorted(config.items()))


def _described(how: Quantization) -> dict[str, Any]:
    return {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}


def _index(report: Report, weight_map: dict[str, str]) -> dict[str, Any]:
    about = {"total_size": report.bytes_after, "total_parameters": report.n_parameters}
    return {"metadata": about, "weight_map": dict(sorted(weight_map.items()))}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=4) + "\n")
        flush(file)


# Command line


def _from_flags(argv: Sequence[str] | None) -> Options:
    parser = build_parser(
        Options,
        PROG,
        "Convert a checkpoint to 2 to 8 bits, to 16, or keep its bits, a few rows at a time, into one page-aligned\n"
        "file per decoder block.",
        "affine is mlx-lm's own quantization, bit by bit; symmetric has no offset (INT4) and is stored so that any\n"
        "reader of affine weights loads it; mxfp4, mxfp8 and nvfp4 have floats with a byte for a scale. A packed\n"
        "source is decompressed on the way. keep changes no bit, and places tensors where Metal can use the mapped\n"
        "file itself. mlx_lm.convert's names mean the same: after --hf-path or --mlx-path with nothing said of\n"
        "packing, keep is meant. DIR appears when it is complete. exit codes: 0 done, 2 wrong option or input,\n"
        "130 interrupted",
    )
    given = sys.argv[1:] if argv is None else list(argv)
    found, unknown = parser.parse_known_args(given)
    specs = describe(Options)
    if unknown:
        flag = unknown[0].partition("=")[0]
        why = _NOT_HERE.get(flag) or f"no such option{suggest(flag, [spec.flag for spec in specs.values()])}"
        raise UserError(f"{flag}: {why}")
    values = {name: _checked(specs[name], raw) for name, raw in vars(found).items()}
    is_mlx_lms = any(each.partition("=")[0] in ("--hf-path", "--mlx-path") for each in given)
    if is_mlx_lms and not values.keys() & {"quantize", "dequantize", "bits", "group_size", "mode", "quant_predicate"}:
        values["mode"] = KEEP
    return Options(**values)


def _checked(spec: Spec, raw: Any) -> Any:
    try:
        return checked_value(spec, raw)
    except ValueError as error:
        raise UserError(f"{spec.flag}: {error}") from None


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed pipe does not stop the conversion
        print(text, flush=True)


def _summary(options: Options, report: Report, peak_bytes: int) -> Iterator[str]:
    recipe, rest = options.recipe(), options.dtype or "the source's dtype"
    bits = 8 * report.bytes_after / report.n_parameters
    yield f"{options.model} -> {options.out}"
    packing = None if recipe is None else recipe.packing
    if recipe is None:
        yield "  format    as it was, every tensor aligned"
    elif packing is None:
        yield f"  format    nothing packed; all in {rest}"
    else:
        each = f"{packing.bits} bits" if recipe.high_bits is None else f"{packing.bits} and {recipe.high_bits} bits"
        yield f"  format    {packing.mode}, {each} in groups of {packing.group_size}; all else in {rest}"
        yield f"  packed    {len(report.packed):,} matrices"
        if report.copied:
            yield f"  copied    {_some(report.copied)}: already packed in this way"
        if report.unpacked:
            yield f"  unpacked  {_some(report.unpacked)}: rows that groups of {packing.group_size} do not divide"
    if report.left_out:
        yield f"  left out  {_some(report.left_out)}: the model does not use it"
    yield f"  bytes     {report.bytes_before:,} -> {report.bytes_after:,}, {bits:.2f} bits a parameter"
    if packing is not None:
        worst = max(report.errors, key=report.errors.__getitem__)
        yield f"  error     {report.error:.2%} of the weights' RMS; largest {report.errors[worst]:.2%}, {worst}"
    yield f"  took      {report.seconds:.1f} s, peak footprint {megabytes(peak_bytes)}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names):,}, such as {names[0]}"


if __name__ == "__main__":
    sys.exit(main())
