"""Streams a model's continuation of a prompt, with mlx-lm's model, tokenizer and key-value cache.

The whole model is in memory, on the CPU decompressed (dense.py); this never runs in the training process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import UserError
from ..export.adapters import ADAPTERS, FLAG, read_about
from ..system.allocator import settle
from ..system.child import one_line
from ..system.device import on_gpu
from .dense import make_dense, room_bytes


@dataclass(frozen=True)
class Prompt:
    """A request. text: sent as a user's message if the tokenizer has a chat template and plain is False.

    temperature: 0 always takes the likeliest token; top_p: samples from the likeliest tokens up to this probability.
    """

    text: str
    max_tokens: int = 100
    system: str | None = None
    plain: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Writer:
    """A loaded model that generates text.

    adapter_path: folder of adapters to apply; budget_bytes: limit of the footprint, None for no limit; say: called with
    progress lines. Raises UserError naming --model or --adapter-path, and BudgetError if the weights do not fit even as
    they are stored.
    """

    def __init__(
        self,
        model_path: Path,
        adapter_path: Path | None = None,
        budget_bytes: int | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        if adapter_path is not None:
            _check_adapters(adapter_path)
        try:
            import mlx_lm
        except ImportError as error:
            raise UserError(f"generating needs mlx-lm: pip install mlx-lm ({one_line(error)})") from error
        if budget_bytes is not None:
            settle()
        try:
            self._model, self._tokenizer = mlx_lm.load(str(model_path), lazy=True)[:2]
        except Exception as error:  # a broken model, tokenizer or template can raise anything
            raise UserError(f"--model {model_path}: {type(error).__name__}: {one_line(error)}") from error
        self._where = f"--model {model_path}"
        room = room_bytes(self._model, budget_bytes)
        if not on_gpu():
            make_dense(self._model, room, say)
        mx.eval(self._model.parameters())
        if adapter_path is not None:
            self.add_adapters(adapter_path)

    def add_adapters(self, folder: Path) -> None:
        """Applies adapters to the model, permanently. Raises UserError naming --adapter-path."""
        from mlx_lm.tuner.utils import load_adapters

        _check_adapters(folder)
        self._where = f"{FLAG} {folder}"
        try:
            self._model = load_adapters(self._model, str(folder))
            self._model.eval()  # no dropout
            mx.eval(self._model.parameters())
        except Exception as error:
            raise UserError(f"{self._where}: {type(error).__name__}: {one_line(error)}") from error

    def stream(self, prompt: Prompt) -> Iterator[str]:
        """Yields pieces of text as they are generated. Raises UserError."""
        import mlx_lm
        from mlx_lm.sample_utils import make_sampler

        tokens = self._tokens(prompt)
        if prompt.seed is not None:
            mx.random.seed(prompt.seed)
        sampler = make_sampler(prompt.temperature, top_p=prompt.top_p)
        try:
            for piece in mlx_lm.stream_generate(
                self._model, self._tokenizer, tokens, max_tokens=prompt.max_tokens, sampler=sampler
            ):
                yield piece.text
        except (ValueError, RuntimeError) as error:  # older mlx-lm reports a wrong shape only here
            raise UserError(f"{self._where}: {type(error).__name__}: {one_line(error)}") from error

    def _tokens(self, prompt: Prompt) -> list[int]:
        tokenizer = self._tokenizer
        try:
            if prompt.plain or not tokenizer.has_chat_template:
                return tokenizer.encode(prompt.text)
            messages = [{"role": "user", "content": prompt.text}]
            if prompt.system is not None:
                messages.insert(0, {"role": "system", "content": prompt.system})
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as error:  # a template can raise anything
            raise UserError(f"--prompt: the tokenizer rejects it: {type(error).__name__}: {one_line(error)}") from error


def _check_adapters(folder: Path) -> None:
    read_about(folder)
    if not (folder / ADAPTERS).is_file():
        raise UserError(f"{FLAG} {folder}: the folder contains no {ADAPTERS}")
