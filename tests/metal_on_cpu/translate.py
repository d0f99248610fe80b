"""Translates Metal Shading Language to C++ that compiles against shim.h, where macros do not suffice."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# MLX headers that call the Metal compiler's builtins; shim.h has their definitions.
REPLACED_BY_THE_SHIM = ("bf16_math.h",)

INCLUDE = re.compile(r'\s*#include\s+([<"])([^">]+)[">]')
FLOAT_LITERAL = re.compile(r"(?<![\w.])((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])")

# C++ has no address spaces, so of functions that MSL overloads by them only the one for `thread` is kept.
SPACES = r"(?:device|constant|threadgroup)"
MEMBER_OF_A_SPACE = re.compile(r"\)\s*(?:const\s+)?" + SPACES + r"\s*(?=[:{])")
SPECIALISED_ON_A_SPACE = re.compile(r"\bstruct\s+\w+<" + SPACES + r"\s+\w+\s*\*>\s*(?=\{)")
OPERATOR_ON_A_SPACE = re.compile(
    r"\b(?:constexpr|inline)\s+(?:device|threadgroup)\s+[\w<>]+\s*&\s*operator[^(\s]+\s*(?=\()"
)

FUNCTION_CONSTANT = re.compile(
    r"(?:\bconst\s+)?\bconstant\s+(?P<type>\w+)\s+(?P<name>\w+)\s*"
    r"\[\[\s*function_constant\((?P<id>\d+)\)\s*\]\]"
)
TWICE_CONST = re.compile(r"\bconstant(\s+constexpr)?\s+const\b|\bconst\s+constant\b")

THREADGROUP_VARIABLE = re.compile(
    r"(?<=[;{}])(?P<indent>\s*)threadgroup\s+"
    r"(?P<type>(?:alignas\([^)]*\)\s*)?(?:typename\s+)?[\w:]+(?:<[^;*&()]*>)?)\s+"
    r"(?P<declarators>\w+\s*(?:\[(?:[^;=]|==)*\])?(?:\s*,\s*\w+\s*(?:\[(?:[^;=]|==)*\])?)*)\s*"
    r"(?P<zero>=\s*\{\s*0?\s*\}\s*)?;"
)
UNPLACED_THREADGROUP_VARIABLE = re.compile(r"(?<=[;{}])\s*threadgroup\s[^;*&()]*;")

KERNEL = r"(?:\[\[\s*kernel\b[^\]]*\]\]|\bkernel)(?:\s*\[\[[^\]]*\]\])?\s+void\s+"
INSTANTIATION = re.compile(r"template\s*\[\[\s*host_name\([^)]*\)\s*\]\][^;]*;")


class MSLError(RuntimeError):
    """The kernel cannot be translated or compiled, or a fault was detected while it ran."""


class Parameter(NamedTuple):
    """One parameter of a kernel: its text, the name of its attribute, and the attribute's argument."""

    declaration: str
    attribute: str
    argument: str | None


def expand(text: str, folders: Sequence[Path], name: str = "kernel", seen: set[Path] | None = None) -> str:
    """Inlines `#include "..."` from the folders and drops `#include <metal_*>`; #line keeps the line numbers."""
    seen = set() if seen is None else seen
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(text.split("\n"), 1):
        include = INCLUDE.match(line)
        if not include:
            lines.append("" if line.startswith(("#pragma once", "#pragma METAL")) else line)
            continue
        quote, file = include.groups()
        if quote == "<" or file.endswith(REPLACED_BY_THE_SHIM):
            lines.append("")
            continue
        path = next((folder / file for folder in folders if (folder / file).exists()), None)
        if path is None:
            raise MSLError(f"{name}:{number}: no {file} under {[str(folder) for folder in folders]}")
        if path in seen:
            lines.append("")
            continue
        seen.add(path)
        lines += [expand(path.read_text(), folders, file, seen), f'#line {number + 1} "{name}"']
    return "\n".join(lines)


def strip_comments(text: str) -> str:
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"/\*.*?\*/", lambda actual: "\n" * actual[0].count("\n"), text, flags=re.S)


def translate(
    source: str,
    function: str,
    folders: Sequence[Path] = (),
    constants: Mapping[int | str, object] | None = None,
    name: str = "kernel",
) -> tuple[str, list[Parameter]]:
    """The C++ text of a Metal source, and the parameters of its kernel `function`.

    `folders` are searched for quoted includes; `constants` are function constants by id or name (0 if not named);
    `name` identifies the source in error messages. Raises MSLError if the source is not
    supported.
    """
    text = rewrite(expand(source, folders, name), constants or {})
    parameters = parse_parameters(text, function)
    # otherwise the macro `threadgroup` would leave [[(0)]]
    return re.sub(r"\[\[\s*threadgroup\(\w+\)\s*\]\]", "", text), parameters


def rewrite(text: str, constants: Mapping[int | str, object]) -> str:
    text = strip_comments(text)
    text = FLOAT_LITERAL.sub(r"\1f", text)  # MSL has no double: 1.0 is a float
    text = _keep_one_overload(text)
    text = _function_constants(text, constants)
    text = TWICE_CONST.sub(lambda actual: (actual[1] or "") + " const", text)  # `constant` becomes one const
    text = INSTANTIATION.sub(lambda actual: "\n" * actual[0].count("\n"), text)  # they only take time on a CPU
    return _place_threadgroup_variables(text)


def parse_parameters(text: str, function: str) -> list[Parameter]:
    """The parameters of the kernel with this name; buffers without an attribute are numbered in order, as in Metal."""
    head = re.search(KERNEL + re.escape(function) + r"\s*\(", text)
    if not head:
        raise MSLError(f"no kernel {function}")
    parameters, next_buffer = [], 0
    for declaration in _split(text[head.end() : _past_bracket(text, head.end() - 1, "()") - 1]):
        attribute = re.search(r"\[\[\s*(\w+)(?:\(\s*(\w+)\s*\))?", declaration)
        if attribute is None:
            parameter = Parameter(declaration, "buffer", str(next_buffer))
        else:
            parameter = Parameter(declaration, attribute[1], attribute[2])
        if parameter.attribute == "buffer":
            next_buffer = max(next_buffer, int(parameter.argument or 0) + 1)
        parameters.append(parameter)
    return parameters


def _split(text: str) -> list[str]:
    """The parts between commas that are outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([<{") - (character in ")]>}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _past_bracket(text: str, start: int, pair: str) -> int:
    """Index just past the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == pair[0]) - (text[index] == pair[1])
        if not depth:
            return index + 1
    raise MSLError(f"a {pair[0]} is not closed: {text[start : start + 60]!r}")


def _declaration_start(text: str, index: int) -> int:
    """Start of the declaration around `index`: past the last `;`, brace or preprocessor line before it."""
    depth = 0
    for i in range(index - 1, -1, -1):
        depth += (text[i] == ")") - (text[i] == "(")
        if depth > 0:
            continue
        line = text[text.rfind("\n", 0, i) + 1 : i].lstrip()
        if text[i] in ";{}" or (text[i] == "\n" and line.startswith("#")):
            return i + 1
    return 0


def _keep_one_overload(text: str) -> str:
    for pattern in (MEMBER_OF_A_SPACE, SPECIALISED_ON_A_SPACE, OPERATOR_ON_A_SPACE):
        position = 0
        while actual := pattern.search(text, position):
            inside = actual.start() + (pattern is not SPECIALISED_ON_A_SPACE)
            start = _declaration_start(text, inside)
            end = _past_bracket(text, text.index("{", actual.end()), "{}")
            end += len(re.match(r"\s*;?", text[end:])[0])  # type: ignore[index]
            text = text[:start] + "\n" * text.count("\n", start, end) + text[end:]
            position = start
    return text


def _function_constants(text: str, values: Mapping[int | str, object]) -> str:
    def define(actual: re.Match[str]) -> str:
        value = values.get(int(actual["id"]), values.get(actual["name"], 0))
        return f"static const {actual['type']} {actual['name']} = {str(value).lower()}"

    return FUNCTION_CONSTANT.sub(define, text)


def _place_threadgroup_variables(text: str) -> str:
    """`threadgroup T a[n], b[m];` -> one MSL_TG(id, T, name, [n]) each, a reference into the threadgroup's memory."""
    numbers = itertools.count()

    def place(actual: re.Match[str]) -> str:
        parts = []
        for declarator in re.split(r",(?![^\[]*\])", actual["declarators"]):
            name, extent = re.match(r"\s*(\w+)\s*(.*)", declarator, re.S).groups()  # type: ignore[union-attr]
            parts.append(f"MSL_TG({next(numbers)}, {actual['type']}, {name}, {extent});")
            if actual["zero"]:
                parts.append(f"MSL_TG_ZERO({name});")
        return actual["indent"] + " ".join(parts)

    text = THREADGROUP_VARIABLE.sub(place, text)
    if left := UNPLACED_THREADGROUP_VARIABLE.search(text):  # otherwise it would become one variable per thread
        raise MSLError(f"cannot place in threadgroup memory: {left[0].strip()}")
    return text
