"""The text of the bundled model: documentation strings of the running interpreter's standard library.

`entries` collects one `Entry` per documented module, class and function: from the .py files with `ast` (nothing is
imported), from a fixed list of C modules by import, and from the topics that `help()` shows. `make_splits` chooses the
objects of the fine-tuning questions and excludes the held-out ones from the pre-training text. Everything depends only
on the interpreter's version: order follows names, choices follow hashes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "_bundled",
        "__pycache__",
        "pydoc_data",
        "encodings",
        "__phello__",
    }
)
# C modules, and the modules under which their contents are public.
C_MODULES = {
    "builtins": "",
    "math": "math",
    "cmath": "cmath",
    "itertools": "itertools",
    "time": "time",
    "sys": "sys",
    "gc": "gc",
    "_functools": "functools",
    "_collections": "collections",
    "_operator": "operator",
    "_heapq": "heapq",
    "_io": "io",
    "_datetime": "datetime",
    "_thread": "threading",
    "_socket": "socket",
    "_random": "random",
    "_struct": "struct",
    "array": "array",
    "binascii": "binascii",
    "zlib": "zlib",
    "select": "select",
    "marshal": "marshal",
    "atexit": "atexit",
    "signal": "signal",
    "posix": "os",
    "unicodedata": "unicodedata",
    "_weakref": "weakref",
    "_csv": "csv",
    "_codecs": "codecs",
    "_string": "string",
    "faulthandler": "faulthandler",
    "mmap": "mmap",
    "_bisect": "bisect",
}
MAX_DOC_CHARS = 12_000
QUESTIONS = {
    "function": (
        "What does {name} do?",
        "What does {call} do?",
        "What is {name} for?",
        "Explain {name} in one sentence.",
        "Describe {name}.",
        "Tell me what {call} does.",
        "In short, what does {name} do?",
        "I found {call} in some code. What does it do?",
        "What happens when I call {call}?",
    ),
    "class": (
        "What is {name}?",
        "What is the class {name} for?",
        "Describe the class {name}.",
        "What is a {name}?",
        "Explain {name} in one sentence.",
        "When would I use {name}?",
    ),
    "module": (
        "What is the module {name} for?",
        "What does the module {name} provide?",
        "Describe the module {name}.",
    ),
}


@dataclass(frozen=True)
class Entry:
    """One documented object; kind "module", "class", "function" or "topic"; signature "(a, b=1)" or ""."""

    name: str
    kind: str
    signature: str
    doc: str

    @property
    def text(self) -> str:
        """The entry as a pre-training document: a heading line, an empty line, the documentation."""
        kind = "" if self.kind == "function" else self.kind + " "
        return f"{kind}{self.name}{self.signature}\n\n{self.doc}"


def stdlib_folder() -> Path:
    """The folder with the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def python_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted module name, file) of every .py file under `root` that is not skipped, ordered by name."""
    modules = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in parts[:-1]):
            continue
        module = parts[:-1] if parts[-1] == "__init__.py" else (*parts[:-1], parts[-1][:-3])
        if module and all(part.isidentifier() for part in module):
            modules.append((".".join(module), path))
    return iter(sorted(modules))


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> str:
    args = node.args
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
        if arg is not None:
            arg.annotation = None
    text = ast.unparse(args)
    if is_method:
        text = re.sub(r"^(self|cls)(, /)?(, |$)", "", text)
    return f"({text})" if len(text) <= 120 else "(...)"


def _clean(doc: str | None) -> str:
    if not doc:
        return ""
    lines = [line.rstrip() for line in inspect.cleandoc(doc).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()[:MAX_DOC_CHARS]


def _walk(node: ast.AST, prefix: str, in_class: bool) -> Iterator[Entry]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = _clean(ast.get_docstring(child, clean=False))
            if doc:
                yield Entry(f"{prefix}.{child.name}", "function", _signature(child, in_class), doc)
        elif isinstance(child, ast.ClassDef):
            name = f"{prefix}.{child.name}"
            doc = _clean(ast.get_docstring(child, clean=False))
            if doc:
                bases = ", ".join(ast.unparse(base) for base in child.bases)
                yield Entry(name, "class", f"({bases})" if bases else "", doc)
            yield from _walk(child, name, True)
        elif isinstance(child, (ast.If, ast.Try)):  # definitions inside a platform or import check
            yield from _walk(child, prefix, in_class)


def source_entries(root: Path) -> Iterator[Entry]:
    """Entries of the .py files under `root`; files that cannot be parsed are skipped."""
    for module, path in python_files(root):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        doc = _clean(ast.get_docstring(tree, clean=False))
        if doc:
            yield Entry(module, "module", "", doc)
        yield from _walk(tree, module, False)


def _c_entry(name: str, obj: Any, owner: Any) -> Entry | None:
    doc = obj.__doc__ if isinstance(getattr(obj, "__doc__", None), str) else ""
    if owner is not None and doc == owner.__doc__:
        return None
    signature = getattr(obj, "__text_signature__", None)
    text = re.sub(r"\$\w+(, /)?(, )?", "", signature) if isinstance(signature, str) else ""
    kind = "class" if isinstance(obj, type) else "function"
    cleaned = _clean(doc)
    return Entry(name, kind, text if kind == "function" else "", cleaned) if cleaned else None


def c_entries() -> Iterator[Entry]:
    """Entries of the interpreter's C modules; modules that this build lacks are skipped."""
    for module_name, public in sorted(C_MODULES.items()):
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        for name in sorted(vars(module)):
            obj = vars(module)[name]
            if name.startswith("_") or not (isinstance(obj, type) or inspect.isbuiltin(obj)):
                continue
            dotted = f"{public}.{name}" if public else name
            entry = _c_entry(dotted, obj, None)
            if entry:
                yield entry
            for member in sorted(vars(obj)) if isinstance(obj, type) else ():
                value = vars(obj)[member]
                if not member.startswith("_") and callable(value):
                    entry = _c_entry(f"{dotted}.{member}", value, obj)
                    if entry:
                        yield entry


def topic_entries() -> Iterator[Entry]:
    """The chapters of the language reference that `help("topic")` shows, split at empty lines."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        piece: list[str] = []
        n_chars = 0
        for paragraph in [*_clean_topic(topics[topic]).split("\n\n"), ""]:
            if piece and (not paragraph or n_chars + len(paragraph) > 2_000):
                yield Entry(topic, "topic", "", "\n\n".join(piece))
                piece, n_chars = [], 0
            piece.append(paragraph)
            n_chars += len(paragraph)


def _clean_topic(text: str) -> str:
    text = re.sub(r"^\S.*\n[*=~^-]{4,}$", lambda match: match.group(0).split("\n")[0], text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()


def entries(root: Path | None = None, with_runtime: bool = True) -> list[Entry]:
    """Entries whose documentation has at least 20 characters, without duplicate texts, in a fixed order.

    `root` is the folder of .py files (the standard library); `with_runtime` adds C modules and topics.
    """
    entries = list(source_entries(root or stdlib_folder()))
    if with_runtime:
        entries += [*c_entries(), *topic_entries()]
    seen: set[str] = set()
    unique = []
    for entry in entries:
        key = _squeeze(entry.doc)
        if len(key) >= 20 and key not in seen:
            seen.add(key)
            unique.append(entry)
    return unique


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def first_sentence(doc: str) -> str:
    """The first sentence of a documentation string if it can serve as an answer, else ""."""
    paragraph = _squeeze(doc.split("\n\n")[0])
    if re.match(r"^[\w.]+\(.*\)( ->|:)", paragraph):  # a C docstring that begins with its own signature
        return ""
    end = r"(?<=[a-z0-9)\]'\"`][.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)\s+(?=[A-Z`'\"(])"
    cut = re.split(end, paragraph)[0]
    if re.search(r">>>|->|::|\.\.\.|https?:|--|[{}|<>=\\\[\]#$@^~]", cut) or not cut.isascii():
        return ""
    if not 20 <= len(cut) <= 130 or len(cut.split()) < 4 or not re.match(r"[A-Z][a-z]+[ ,]", cut):
        return ""
    if cut[-1] not in ".!":
        if not re.search(r"[a-z0-9)'\"]$", cut):
            return ""
        cut += "."
    return cut


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def question(entry: Entry) -> str:
    """A question about the entry; the name determines its phrasing."""
    phrasings = QUESTIONS[entry.kind]
    phrasing = phrasings[_hash("phrasing " + entry.name) % len(phrasings)]
    call = entry.name + (entry.signature if 2 < len(entry.signature) <= 50 else "()")
    return phrasing.format(name=entry.name, call=call)


@dataclass(frozen=True)
class Splits:
    """`pretrain`: entries to learn from; `held_out`: entries of the valid and test rows; `rows` by split."""

    pretrain: list[Entry]
    held_out: list[Entry]
    rows: dict[str, list[dict[str, Any]]]


def make_splits(entries: list[Entry], n_train: int = 1_200, n_valid: int = 60, n_test: int = 60) -> Splits:
    """Chooses the objects to ask about. Rows are mlx-lm "messages"; no answer and no object is in two splits.

    `pretrain` excludes every entry whose text contains a held-out answer.
    """
    by_answer: dict[str, Entry] = {}
    for entry in entries:
        is_public = not any(part.startswith("_") for part in entry.name.split("."))
        answer = first_sentence(entry.doc) if is_public and entry.kind in QUESTIONS else ""
        if answer and len(entry.name) <= 48:
            by_answer.setdefault(answer, entry)
    one_per_name = {entry.name: answer for answer, entry in reversed(by_answer.items())}
    usable = (answer for answer, entry in by_answer.items() if one_per_name[entry.name] == answer)
    answers = sorted(usable, key=_hash)
    bounds = {
        "valid": answers[:n_valid],
        "test": answers[n_valid : n_valid + n_test],
        "train": answers[n_valid + n_test : n_valid + n_test + n_train],
    }
    rows = {
        split: [
            {
                "messages": [
                    {"role": "user", "content": question(by_answer[answer])},
                    {"role": "assistant", "content": answer},
                ]
            }
            for answer in chosen
        ]
        for split, chosen in bounds.items()
    }
    hidden = bounds["valid"] + bounds["test"]
    hidden_names = {by_answer[answer].name for answer in hidden}
    stems = [answer.rstrip(".!") for answer in hidden]
    held_out = [entry for entry in entries if entry.name in hidden_names]
    pretrain = [
        entry
        for entry in entries
        if entry.name not in hidden_names and not any(stem in _squeeze(entry.doc) for stem in stems)
    ]
    return Splits(pretrain, held_out, rows)
