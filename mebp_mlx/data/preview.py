"""`--preview N`: prints rows as text with the labelled parts marked. The tokenizer runs in a child process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mebp_mlx.data.tokenize import load_tokenizer
from mebp_mlx.system.child import answer, run_child

if TYPE_CHECKING:
    from mebp_mlx.data.dataset import TokenRows

BEGIN, END = "[[", "]]"


def show_rows(rows: TokenRows, model_path: Path, n_rows: int) -> None:
    """Prints the first rows of a split with their file and line, and the labelled text between [[ and ]]."""
    shown = []
    for index in range(min(n_rows, len(rows))):
        tokens, labels = rows.row(index)
        shown.append({"name": rows.row_name(index), "tokens": tokens.tolist(), "labels": labels.tolist()})
    request = {"model_path": str(model_path), "rows": shown}
    texts = run_child(["mebp_mlx.data.preview"], request, offline=True)["texts"]
    encoding = sys.stdout.encoding or "utf-8"
    for row, text in zip(shown, texts, strict=True):
        print(f"--- {row['name']}: {len(row['tokens']):,} tokens, {sum(row['labels']):,} trained on")
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    print(
        f"--- {len(shown)} of {len(rows):,} rows; the text between {BEGIN} and {END} is trained on; nothing was trained"
    )


def marked(tokens: list[int], labels: list[int], decode: Callable[[list[int]], str]) -> str:
    """A row's text with BEGIN and END around each range of labelled tokens."""
    pieces = []
    for is_label, run in groupby(zip(tokens, labels, strict=True), key=lambda each: each[1]):
        text = decode([token for token, _ in run])
        pieces.append(f"{BEGIN}{text}{END}" if is_label else text)
    return "".join(pieces)


def _texts(request: dict[str, Any], _progress: Callable[[Any], None]) -> dict[str, Any]:
    tokenizer = load_tokenizer(Path(request["model_path"]))

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False)

    return {"texts": [marked(row["tokens"], row["labels"], decode) for row in request["rows"]]}


if __name__ == "__main__":
    answer(_texts)
