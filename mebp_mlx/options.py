"""Options as dataclass fields: one description defines the flag, the YAML key, the checks and the help line.

`option(...)` describes a field; `describe(cls)` lists the fields; `convert` checks a value from a flag or a YAML
file; `build_parser` makes the command-line parser; `read_yaml` keeps line numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from mebp_mlx.errors import UserError
from mebp_mlx.system.version import __version__

Options = TypeVar("Options")
_LARGEST = 2**63  # integers must be smaller, because counters have 64 bits
_YAML_BYTES, _YAML_DEPTH, _YAML_NODES = 1_000_000, 20, 10_000


@dataclasses.dataclass(frozen=True)
class Option:
    """The description of a field's flag: help text, limits, and whether a resumed run may change it."""

    group: str
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # mlx-lm's value: why it is not supported
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    or_minus_one: bool = False
    size: bool = False  # bytes: text with a unit (500MB, 1.5GB) or an integer
    path: bool = False  # a file or folder; ~ is expanded
    words: tuple[str, ...] = ()  # words accepted in addition to values of the type
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()
    yaml_only: bool = False
    may_change: bool = False
    shown_default: str | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """One field of an options class: its name, its type without None, its default and its description."""

    name: str
    kind: Any
    optional: bool
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """`--kebab-case`; the plain name for a key that exists only in YAML files."""
        return self.name if self.option.yaml_only else "--" + self.name.replace("_", "-")


def option(default: Any, group: str, help: str, **limits: Any) -> Any:
    """A dataclass field with an `Option`; `default` may be a dict (copied for each object)."""
    metadata = {"option": Option(group, help, **limits)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def size_option(group: str, help: str, *, default: int | None = None, **limits: Any) -> Any:
    """An option whose value is a number of bytes above 0, such as 500MB."""
    return option(default, group, help, metavar="SIZE", size=True, above=0, **limits)


def describe(cls: type) -> dict[str, Spec]:
    """The options of a dataclass, by field name, in the order of their definition."""
    hints = typing.get_type_hints(cls)
    specs = {}
    for field in dataclasses.fields(cls):
        kinds = [hints[field.name]]
        if isinstance(kinds[0], types.UnionType):
            kinds = [kind for kind in typing.get_args(kinds[0]) if kind is not types.NoneType]
        optional = kinds[0] is not hints[field.name]
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        specs[field.name] = Spec(field.name, kinds[0], optional, default, field.metadata["option"])
    return specs


# Values


def convert(spec: Spec, raw: Any) -> Any:
    """Checks and converts the value of an option. Raises ValueError with the reason, without the option's name."""
    if raw is None:
        if spec.optional:
            return None
        raise ValueError("needs a value")
    if isinstance(raw, str) and raw.lower() in spec.option.words:
        return raw.lower()
    value: Any = _size(raw, spec.option.words) if spec.option.size else _typed(spec.kind, raw)
    if spec.option.path:
        value = os.path.expanduser(value)
    if spec.option.choices is not None and isinstance(value, str) and value.lower() in spec.option.choices:
        value = value.lower()
    if spec.kind == tuple[str, ...]:
        value = tuple(spec.option.aliases.get(name, name) for name in value)
    _check_limits(spec.option, value)
    return value


def _typed(kind: Any, raw: Any) -> Any:
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        raise ValueError(f"expected true or false, got {raw!r}")
    if kind is int or kind is float:
        return _number(kind, raw)
    if kind is str:
        if isinstance(raw, str) and raw:
            return raw
        raise ValueError(f"expected text, got {raw!r}")
    if typing.get_origin(kind) is Mapping:
        if isinstance(raw, Mapping):
            return raw
        raise ValueError(f"expected a mapping, got {raw!r}")
    if kind == tuple[Mapping[str, Any], ...]:
        sets = [raw] if isinstance(raw, Mapping) else raw
        if isinstance(sets, (list, tuple)) and sets and all(isinstance(each, Mapping) for each in sets):
            return tuple(sets)
        raise ValueError(f"expected a mapping or a list of mappings, got {raw!r}")
    if kind == tuple[float, ...]:
        if isinstance(raw, (list, tuple)) and raw:
            return tuple(_number(float, number) for number in raw)
        raise ValueError(f"expected a list of numbers, got {raw!r}")
    assert kind == tuple[str, ...], kind
    parts = [raw] if isinstance(raw, str) else raw
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"expected a list of names, got {raw!r}")
    names = tuple(name for part in parts for name in re.split(r"[,\s]+", part) if name)
    if not names:
        raise ValueError(f"expected at least one name, got {raw!r}")
    return names


def _size(raw: Any, words: tuple[str, ...] = ()) -> int:
    """Bytes of `500MB`, `1.5GB`; 1 MB = 10^6 bytes, 1 MiB = 2^20. An int is a number of bytes."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        return int(_number(int, raw))
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(?:([kmg])(i?)b?|b)?", str(raw).lower().strip())
    try:
        if match is None or isinstance(raw, bool):
            raise ValueError
        number = float(match[1])
        n_bytes = int(number * (1024 if match[3] else 1000) ** " kmg".index(match[2] or " "))
    except (ValueError, OverflowError):
        known = " or ".join(("a size such as 500MB", "1.5GB", *words))
        raise ValueError(f"expected {known}, got {raw!r}") from None
    if match[0] == match[1]:
        meant = f"{number:g}MB" if number < 1e6 else f"{number / 1e6:.10g}MB"
        raise ValueError(f"{match[0]} has no unit; did you mean {meant}?")
    return n_bytes


def _number(kind: type, raw: Any) -> int | float:
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise ValueError(f"expected {wanted}, got {raw!r}")
    try:
        value = float(raw)
        if kind is int and abs(value) < _LARGEST and not isinstance(raw, float):
            with contextlib.suppress(ValueError):  # "1e3"
                return int(raw)
    except (ValueError, OverflowError):
        raise ValueError(f"expected {wanted}, got {_shortened(raw)}") from None
    if kind is float:
        return value
    if math.isfinite(value) and abs(value) >= _LARGEST:
        raise ValueError(f"must be less than {_LARGEST:g}, got {value:g}")
    if not value.is_integer():
        raise ValueError(f"expected {wanted}, got {_shortened(raw)}")
    return int(value)


def _shortened(raw: Any) -> str:
    """A short repr for an error message; Python refuses to print very long integers."""
    try:
        text = repr(raw)
    except ValueError:
        return "an integer of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _check_limits(about: Option, value: Any) -> None:
    if about.choices is not None:
        for name in value if isinstance(value, tuple) else (value,):
            if name in about.refused:
                raise ValueError(about.refused[name])
            if name not in about.choices:
                hint = suggest(name, (*about.choices, *about.aliases))
                raise ValueError(f"{name!r} is not one of {', '.join(about.choices)}{hint}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    extra = ", or -1" if about.or_minus_one else ""
    if about.or_minus_one and value == -1:
        return
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")
    if about.at_least is not None and value < about.at_least:
        raise ValueError(f"must be at least {about.at_least:g}{extra}, got {value:g}")
    if about.above is not None and value <= about.above:
        raise ValueError(f"must be greater than {about.above:g}{extra}, got {value:g}")
    if about.below is not None and value >= about.below:
        raise ValueError(f"must be less than {about.below:g}{extra}, got {value:g}")


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` if a known name is close to `name` or one is a prefix of the other; otherwise ""."""
    bare = {each.lstrip("-"): each for each in known}
    name = name.lstrip("-")
    close = difflib.get_close_matches(name, list(bare), n=1, cutoff=0.7)
    close += [each for each in bare if len(name) >= 3 and (each.startswith(name) or name.startswith(each))]
    return f"; did you mean {bare[close[0]]}?" if close else ""


# Command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


class _HelpFormat(argparse.RawDescriptionHelpFormatter):
    """One aligned line per option; choices are listed in the help text, not in the left column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=33)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            names = [name for name in action.option_strings if not name.startswith("--no-")]
            return f"{', '.join(names)}, --no-..."
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{', '.join(action.option_strings)} {action.metavar}"


def build_parser(cls: type, prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser whose result contains only the given options, as raw text."""
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        usage=f"{prog} [options]",
        formatter_class=_HelpFormat,
        allow_abbrev=False,
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for spec in describe(cls).values():
        about = spec.option
        if about.yaml_only:
            continue
        if about.group not in groups:
            groups[about.group] = parser.add_argument_group(about.group)
        names = (*about.flags, spec.flag)
        help_line = f"{about.help}{_shown_default(spec)}".replace("%", "%%")
        if spec.kind is bool:
            groups[about.group].add_argument(
                *names, dest=spec.name, default=argparse.SUPPRESS, action=argparse.BooleanOptionalAction, help=help_line
            )
        else:
            metavar = about.metavar or ("PATH" if about.path else {int: "N", float: "X"}.get(spec.kind, "NAME"))
            many = None if spec.kind in (int, float, str) else "+"
            groups[about.group].add_argument(
                *names, dest=spec.name, default=argparse.SUPPRESS, metavar=metavar, nargs=many, help=help_line
            )
    parser.add_argument("--version", action="version", version=f"mebp_mlx {__version__}", help="print the version")
    parser.add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def given_options(
    cls: type, parser: argparse.ArgumentParser, argv: Sequence[str] | None, refused: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The checked options of a command line, by name.

    refused: unsupported flags of mlx-lm's command, with the reason. Raises UserError naming the flag; --help exits.
    """
    raw_values, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    specs = describe(cls)
    if unknown:
        flag = unknown[0].partition("=")[0]
        why = (refused or {}).get(flag) or f"no such option{suggest(flag, [spec.flag for spec in specs.values()])}"
        raise UserError(f"{flag}: {why}")
    return {name: checked_value(specs[name], raw, specs[name].flag) for name, raw in vars(raw_values).items()}


def parse(
    cls: type[Options],
    prog: str,
    texts: tuple[str, str],
    argv: Sequence[str] | None,
    refused: Mapping[str, str] | None = None,
) -> Options:
    """The options of a command line as an object of `cls`. texts: --help's text before and after the options. The
    other arguments and the errors are those of given_options.
    """
    return cls(**given_options(cls, build_parser(cls, prog, *texts), argv, refused))


def checked_value(spec: Spec, raw: Any, where: str) -> Any:
    """The checked value of an option. Raises UserError whose message begins with `where`."""
    try:
        return convert(spec, raw)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _shown_default(spec: Spec) -> str:
    shown = spec.option.shown_default
    if spec.kind is bool:
        shown = "on" if spec.default else "off"
    elif shown is None and spec.default is not None:
        shown = f"{spec.default:g}" if isinstance(spec.default, float) else str(spec.default)
    return f" [{shown}]" if shown else ""


# YAML


@dataclasses.dataclass(frozen=True)
class YamlFile:
    """The values of a YAML mapping and their line numbers."""

    path: str
    values: dict[str, Any]
    lines: dict[tuple[str, ...], int]

    def where(self, *keys: str) -> str:
        """`file:line: outer.inner`, for error messages."""
        known = next((self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), 1)
        return f"{self.path}:{known}: {'.'.join(keys)}"


def read_yaml(path: str) -> YamlFile:
    """Reads a YAML mapping; `1e-5` is a number. Raises UserError naming file and line."""
    import yaml  # only runs with --config need it

    class Loader(yaml.SafeLoader):
        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, LookupError, AttributeError, OverflowError):  # "!!int abc", an integer of 5,000 digits
                kind = node.tag.rpartition(":")[2]
                raise yaml.constructor.ConstructorError(None, None, f"not a valid {kind}", node.start_mark) from None

    exponent = re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")  # YAML 1.1 requires a dot and a sign
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789."))
    try:
        with open(path, "rb") as file:
            content = file.read(_YAML_BYTES + 1)
        if len(content) > _YAML_BYTES:
            raise UserError(f"--config {path}: is larger than {_YAML_BYTES:,} bytes")
        loader = Loader(content.decode("utf-8"))
        node = loader.get_single_node()
        lines: dict[tuple[str, ...], int] = {}
        if node is not None:
            _collect_lines(node, (), lines, path)
        values = {} if node is None else loader.construct_document(node)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"--config {path}: {reason}") from None
    except RecursionError:
        raise UserError(f"{path}:1: is nested more than {_YAML_DEPTH} levels deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: expected `key: value` lines")
    bad = next((key for key in values if not isinstance(key, str)), None)
    if bad is not None:
        raise UserError(f"{path}: {bad!r}: not an option")
    return YamlFile(path, values, lines)


def _collect_lines(node: Any, keys: tuple[str, ...], lines: dict[tuple[str, ...], int], path: str) -> None:
    where = f"{path}:{node.start_mark.line + 1}"
    if len(keys) > _YAML_DEPTH:
        raise UserError(f"{where}: is nested more than {_YAML_DEPTH} levels deep")
    if len(lines) > _YAML_NODES:  # an alias counts each time it is used
        raise UserError(f"{where}: contains more than {_YAML_NODES:,} values")
    if node.id == "sequence":
        for number, item in enumerate(node.value):
            place = (*keys, str(number))
            lines[place] = item.start_mark.line + 1
            _collect_lines(item, place, lines, path)
    if node.id != "mapping":
        return
    for key_node, value_node in node.value:
        key = (*keys, str(key_node.value))
        line = key_node.start_mark.line + 1
        if key in lines:
            raise UserError(f"{path}:{line}: {'.'.join(key)}: duplicate key, first on line {lines[key]}")
        lines[key] = line
        _collect_lines(value_node, key, lines, path)
