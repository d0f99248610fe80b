"""Encodes one row of a data file as tokens and labels with a model's tokenizer, in mlx-lm's formats and templates.

`RowOptions.train_on` selects the labels: all tokens of a row; the completion, that is, the last message, as with
mlx-lm's --mask-prompt; or every assistant turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mebp_mlx.errors import UserError
from mebp_mlx.system.child import one_line

ALL, COMPLETION, ASSISTANT = "all", "completion", "assistant"
TRAIN_ON = (ALL, COMPLETION, ASSISTANT)
OVERLONG = ("truncate", "drop", "error")
_STAND_INS = ("x", "0")  # contents without a common token: they show where a template puts the content
Message = dict[str, Any]
Template = Callable[..., list[int]]  # template(messages, add_generation_prompt=...) -> tokens


@dataclass(frozen=True)
class RowOptions:
    """How rows are read.

    *_feature: the keys of a row, by mlx-lm's names; one_kind: all rows of a file have the same keys as the first one.
    """

    train_on: str = ALL
    max_seq_length: int = 2048
    overlong: str = "truncate"
    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    text_feature: str = "text"
    chat_feature: str = "messages"
    one_kind: bool = True

    def __post_init__(self) -> None:
        if self.max_seq_length < 2:
            raise UserError(f"--max-seq-length: must be at least 2, got {self.max_seq_length}")
        for flag, value, known in (
            ("--overlong", self.overlong, OVERLONG),
            ("--train-on", self.train_on, TRAIN_ON),
        ):
            if value not in known:
                raise UserError(f"{flag}: {value!r} is not one of {', '.join(known)}")

    @property
    def columns(self) -> tuple[str, ...]:
        """All keys that are read from a row."""
        return self.prompt_feature, self.completion_feature, self.text_feature, self.chat_feature, "tools"

    def keys(self, kind: str) -> tuple[str, ...]:
        """The keys that a row of this kind must have. kind: "prompt", "chat" or "text"."""
        if kind == "prompt":
            return self.prompt_feature, self.completion_feature
        return (self.chat_feature if kind == "chat" else self.text_feature,)

    def kind(self, row: dict[str, Any]) -> str | None:
        """The kind of a row by mlx-lm's rules: "prompt" (with a completion), "chat", "text", or None."""
        return next((kind for kind in ("prompt", "chat", "text") if all(key in row for key in self.keys(kind))), None)


class Row(NamedTuple):
    """An encoded row.

    labels: ranges [start, stop) of tokens that are trained on; differs: the text before an answer differs from the
    template's generation prompt; unsure: the answer was not located, so labels may be a few tokens early or late.
    """

    tokens: list[int]
    labels: list[tuple[int, int]]
    differs: bool = False
    unsure: bool = False


class Encoder:
    """Encodes rows as tokens and labels."""

    def __init__(self, tokenizer: Any, options: RowOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self._takes_parts: bool | None = None

    def encode(self, row: dict[str, Any], kind: str, where: str) -> Row:
        """Encodes a row of the given kind. Raises UserError, with a message that begins with `where`, if it is invalid.

        Text gets the end-of-text token appended; the other kinds go through the chat template.
        """
        if kind == "text":
            return self._text(row, where)
        if kind == "chat":
            messages = self._messages(row[self.options.chat_feature], where)
        else:
            roles = zip(("user", "assistant"), self.options.keys(kind), strict=True)
            messages = [{"role": role, "content": self._content(row, key, where)} for role, key in roles]
        tools = row.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise UserError(f'{where}: "tools" must be a list, found {kind_of(tools)}')
        if not self.tokenizer.has_chat_template:
            raise UserError(
                f'{where}: this row needs a chat template, but the tokenizer has none; use {{"text"}} rows, '
                "or add chat_template.jinja to the model's folder"
            )

        def template(messages: list[Message], **options: Any) -> list[int]:
            return _guarded(lambda: self.tokenizer.apply_chat_template(messages, tools=tools, **options), where)

        tokens = list(template(messages))
        if self.options.train_on == ALL:
            return Row(tokens, [(0, len(tokens))])
        if self.options.train_on == COMPLETION:
            if len(messages) < 2:
                raise UserError(f"{where}: --train-on completion (--mask-prompt) needs a message before the last one")
            return _last_turn(tokens, messages, template)
        return _assistant_turns(tokens, messages, template)

    def _text(self, row: dict[str, Any], where: str) -> Row:
        text, tokenizer = _string(row, self.options.text_feature, where), self.tokenizer
        if not text:
            raise UserError(f"{where}: the text is empty")
        if self.options.train_on != ALL:
            flag = "--mask-prompt" if self.options.train_on == COMPLETION else "--train-on assistant"
            raise UserError(f'{where}: {flag} needs rows with a prompt, but this row is {{"text"}}')
        if tokenizer.eos_token_id is None:
            raise UserError(f"{where}: the tokenizer has no eos_token to append to the text (tokenizer_config.json)")
        tokens = _guarded(lambda: tokenizer.encode(text), where)
        if tokens[-1:] != [tokenizer.eos_token_id]:
            tokens = [*tokens, tokenizer.eos_token_id]
        return Row(tokens, [(0, len(tokens))])

    # Messages

    def _messages(self, messages: Any, where: str) -> list[Message]:
        if not isinstance(messages, list) or not messages:
            what = "an empty list" if messages == [] else kind_of(messages)
            raise UserError(f'{where}: "{self.options.chat_feature}" must be a list of messages, found {what}')
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict):
                raise UserError(f"{where}: message {number} must be an object, found {kind_of(message)}")
            if not isinstance(message.get("role"), str):
                raise UserError(f'{where}: message {number} needs a "role" (a string)')
            content = message.get("content")
            if content is None and message.get("tool_calls"):
                continue
            self._check_content(content, f'the "content" of message {number}', where)
        return messages

    def _content(self, row: dict[str, Any], key: str, where: str) -> Any:
        self._check_content(row[key], f'"{key}"', where)
        return row[key]

    def _check_content(self, content: Any, what: str, where: str) -> None:
        """Accepts a string, or a list of text parts if the template supports them (others print the raw list)."""
        if isinstance(content, str):
            return
        if not isinstance(content, list) or not content:
            raise UserError(f"{where}: {what} must be a string, found {kind_of(content)}")
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                text = '{"type": "text", "text": "..."}'
                raise UserError(f"{where}: {what} must be a string or a list of {text}, found {one_line(part, 60)}")
        if not self._template_takes_parts(where):
            raise UserError(f"{where}: {what} is a list of parts, which the model's chat template does not support")

    def _template_takes_parts(self, where: str) -> bool:
        if self._takes_parts is None:
            text = _STAND_INS[0]
            plain, parts = (
                _attempt(lambda content: self.tokenizer.apply_chat_template([{"role": "user", "content": content}]), c)
                for c in (text, [{"type": "text", "text": text}])
            )
            self._takes_parts = parts is not None and parts == plain
        return self._takes_parts


# Labels


def _last_turn(tokens: list[int], messages: list[Message], template: Template) -> Row:
    """mlx-lm's --mask-prompt: labels begin after the template's prompt for the last message and run to the end.

    If the row does not begin with that prompt, labels begin at the message's content.
    """
    number = len(messages) - 1
    prompt = _attempt(template, messages[:-1], add_generation_prompt=messages[-1]["role"] == "assistant")
    if prompt is not None and tokens[: len(prompt)] == prompt:
        return Row(tokens, [(len(prompt), len(tokens))])
    content = _content_range(tokens, messages, number, template)
    if content is not None:
        return Row(tokens, [(content[0], len(tokens))], differs=True)
    start = len(prompt or ())
    return Row(tokens, [(start, len(tokens))] if start < len(tokens) else [], differs=True, unsure=True)


def _assistant_turns(tokens: list[int], messages: list[Message], template: Template) -> Row:
    """Labels each assistant message as `_last_turn` would if the conversation ended there: the content and the
    end-of-turn tokens. A turn that cannot be located in the row gets no labels.
    """
    labels, differs, unsure = [], False, False
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _attempt(template, messages[:number], add_generation_prompt=True) if number else None
        start = len(prompt) if prompt is not None and tokens[: len(prompt)] == prompt else None
        through = tokens if number == len(messages) - 1 else _attempt(template, messages[: number + 1])
        stop = len(through) if through is not None and tokens[: len(through)] == through else None
        if start is None or stop is None:
            differs |= number > 0 and start is None
            content = _content_range(tokens, messages, number, template)
            if content is None:
                unsure = True
                continue
            start = content[0] if start is None else start
            stop = content[1] if stop is None else stop
        labels.append((start, stop))
    return Row(tokens, labels, differs, unsure)


def _content_range(
    tokens: list[int], messages: list[Message], number: int, template: Template
) -> tuple[int, int] | None:
    """The range [start, stop) of a message's content and its end-of-turn tokens in a row; None if it is ambiguous.

    The content is replaced by two different texts: the tokens that both rows share surround the content.
    """

    def rendered(through: int) -> list[list[int] | None]:
        return [
            _attempt(
                template, [*messages[:number], {**messages[number], "content": text}, *messages[number + 1 : through]]
            )
            for text in _STAND_INS
        ]

    one, other = rendered(len(messages))
    if not isinstance(messages[number].get("content"), (str, list)) or one is None or other is None:
        return None
    before = _n_shared(one, other)
    behind = _n_shared(one[before:][::-1], other[before:][::-1])
    start = _n_shared(tokens[:before], one[:before])
    tail = _n_shared(tokens[start:][::-1], one[::-1][:behind])
    if start < before - 1 or tail < behind - 1:  # one token may have merged with the content's first or last
        return None
    stop = len(tokens) - tail
    ended, other_end = rendered(number + 1)
    if ended is not None and other_end is not None:
        ending = ended[len(ended) - _n_shared(ended[::-1], other_end[::-1]) :]
        if tokens[stop : stop + len(ending)] == ending:
            stop += len(ending)
    return (start, stop) if start < stop else None


def _n_shared(one: list[int], other: list[int]) -> int:
    """The length of the common prefix of two lists."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# Values


def _attempt(work: Callable[..., list[int]], *arguments: Any, **options: Any) -> list[int] | None:
    """The tokens of part of a conversation, or None if the template rejects it."""
    try:
        return list(work(*arguments, **options))
    except Exception:
        return None


def _guarded(work: Callable[[], list[int]], where: str) -> list[int]:
    try:
        return work()
    except Exception as error:  # a template can raise anything; tokenizers reject lone surrogates
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{where}: the tokenizer rejects this row: {reason}") from error


def _string(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise UserError(f'{where}: "{key}" must be a string, found {kind_of(row[key])}')
    return row[key]


def kind_of(value: Any) -> str:
    """The type of a JSON value, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
