"""Rows have the same tokens and labels as in mlx-lm; unreadable rows give one clear line."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mebp_mlx.data import tokenize
from mebp_mlx.data.dataset import TokenRows
from mebp_mlx.errors import UserError
from tests.texts import CHAT_TEMPLATE, random_row, request, tokenize_rows, write_rows, write_tokenizer, write_tokenizers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tokenizers(tmp_path_factory.mktemp("models"))


# Tokens and labels of a row


@pytest.mark.parametrize(
    ("model", "kind", "mask_prompt"),
    [("chat", "text", False), ("plain", "text", False), ("sentencepiece", "text", False)]
    + [("chat", kind, mask) for kind in ("prompt", "messages") for mask in (False, True)],
)
def test_tokens_and_labels_equal_mlx_lms(
    models: dict[str, Path], tmp_path: Path, seed: int, model: str, kind: str, mask_prompt: bool
) -> None:
    from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset
    from mlx_lm.utils import load_tokenizer

    random_ = random.Random(f"{seed} {kind}")
    source = [random_row(random_, kind) for _ in range(49)]
    source.append({"text": "a", "prompt": "a", "completion": "b", "messages": [TURN, REPLY]})  # fits every limit
    source[-1] = {key: source[-1][key] for key in source[0] if key != "tools"}
    random_.shuffle(source)
    lines = [random_.choice(["", "\n", " \r\n"]) + json.dumps(row, ensure_ascii=False) + "\n" for row in source]
    tmp_path.joinpath("train.jsonl").write_bytes("".join(lines).encode("utf-8-sig"))
    limit = random_.randint(40, 160)
    counts = tokenize_rows(
        tmp_path, models[model], train_on="completion" if mask_prompt else "all", max_seq_length=limit
    )["train"]
    rows = TokenRows(tmp_path / "out", "train")

    tokenizer = load_tokenizer(models[model])
    oracle: Any = {
        "text": TextDataset(source, tokenizer),
        "prompt": CompletionsDataset(source, tokenizer, "prompt", "completion", mask_prompt),
        "messages": ChatDataset(source, tokenizer, mask_prompt=mask_prompt),
    }[kind]
    expected: dict[str, tuple[list[int], list[int]]] = {}  # name of a row -> inputs, targets
    n_overlong, line = 0, 0
    for row, text in zip(source, lines, strict=True):
        line += text.count("\n")
        tokens, offset = oracle.process(row)
        n_overlong += len(tokens) > limit
        tokens = tokens[:limit]
        targets = [tokens[t + 1] if t + 1 >= offset else -100 for t in range(len(tokens) - 1)]
        if any(target != -100 for target in targets):
            expected[f"train.jsonl:{line}"] = (tokens[:-1], targets)

    assert counts["n_read"] == 50 and counts["rows"] == len(rows) == len(expected)
    assert counts["n_masked_rows"] == 50 - len(expected) and counts["n_overlong"] == n_overlong
    assert counts["n_prompt_differs"] == 0
    assert counts["tokens"] == sum(len(inputs) + 1 for inputs, _ in expected.values()) == rows.lengths.sum()
    assert counts["labels"] == sum(target != -100 for _, targets in expected.values() for target in targets)
    seen: Counter[str] = Counter()
    while len(seen) < len(expected):
        indices = [random_.randrange(len(expected)) for _ in range(random_.randint(1, 5))]
        batch = rows.batch(indices)
        assert batch.tokens.dtype == batch.targets.dtype == np.int32
        assert batch.tokens.shape == batch.targets.shape
        assert batch.tokens.shape[1] == max(len(expected[name][0]) for name in batch.rows)
        assert batch.n_labels == (batch.targets != -100).sum()
        for name, inputs, targets in zip(batch.rows, batch.tokens, batch.targets, strict=True):
            n = len(expected[name][0])
            assert (inputs[:n].tolist(), targets[:n].tolist()) == expected[name]
            assert not inputs[n:].any() and (targets[n:] == -100).all()
        seen.update(batch.rows)


def test_rows_that_are_too_long_or_hold_no_label_are_counted(models: dict[str, Path], tmp_path: Path) -> None:
    short = {"prompt": "a", "completion": "b"}
    long_prompt = {"prompt": "x " * 60, "completion": "b"}
    long_answer = {"prompt": "a", "completion": "x " * 60}
    write_rows(tmp_path, [short, long_prompt, long_answer, short])
    write_rows(tmp_path, [long_answer, short], "valid")

    def run(overlong: str) -> dict[str, dict[str, int]]:
        return tokenize_rows(tmp_path, models["chat"], train_on="completion", max_seq_length=50, overlong=overlong)

    cut = run("truncate")
    rows = TokenRows(tmp_path / "out", "train")
    assert cut["train"].items() >= {"rows": 3, "n_overlong": 2, "n_masked_rows": 1}.items()
    assert [rows.batch([n]).rows for n in range(3)] == [(f"train.jsonl:{n}",) for n in (1, 3, 4)]
    assert rows.lengths[1] == 50 and rows.batch([0, 1]).tokens.shape == (2, 49)
    assert cut["valid"].items() >= {"rows": 2, "n_overlong": 1, "n_masked_rows": 0}.items()
    shutil.rmtree(tmp_path / "out")
    dropped = run("drop")
    assert dropped["train"].items() >= {"rows": 2, "n_overlong": 2, "n_masked_rows": 0}.items()
    assert TokenRows(tmp_path / "out", "valid").batch([0]).rows == ("valid.jsonl:2",)
    with pytest.raises(UserError, match=r"train\.jsonl:2: the row has \d\d+ tokens, more than --max-seq-length 50"):
        run("error")


THINKER = CHAT_TEMPLATE.replace(
    "assistant\n{% endif", "assistant\n<think>{% endif"
)  # only before an answer that is requested
FORGETFUL = (  # thinks in every turn but shows only the last thought
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last %}<think>hm</think>\n{% endif %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def labelled(folder: Path, model: Path, index: int = 0) -> list[str]:
    """The text of each labelled range."""
    from mlx_lm.utils import load_tokenizer

    tokens, labels = TokenRows(folder / "out", "train").row(index)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], labels, [0]]))).reshape(-1, 2)
    return [load_tokenizer(model).decode(tokens[start:stop].tolist()) for start, stop in edges]


def with_template(folder: Path, template: str) -> Path:
    write_tokenizer(folder, chat=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


@pytest.mark.parametrize("answer", ["yes", "a long enough answer", "<", "<think>so</think>no", "\nodd\n", "0", "x"])
@pytest.mark.parametrize("train_on", ["completion", "assistant"])
def test_an_answer_is_fully_labelled_if_only_its_prompt_thinks(tmp_path: Path, answer: str, train_on: str) -> None:
    """mlx-lm counts the prompt's tokens, and leaves as many of the answer's without labels."""
    model = with_template(tmp_path / "thinker", THINKER)
    write_rows(tmp_path, [{"prompt": "a", "completion": answer}])
    counts = tokenize_rows(tmp_path, model, train_on=train_on)["train"]
    (text,) = labelled(tmp_path, model)
    begins_so = answer.startswith("<think>")  # then the row begins with the prompt, and the label equals mlx-lm's
    answer = answer.removeprefix("<think>")
    assert text in (f"{answer}<|im_end|>\n", f"\n{answer}<|im_end|>\n")  # the header's line end may merge with one
    assert (counts["n_prompt_differs"], counts["n_unsure"]) == (0 if begins_so else 1, 0)


def test_every_assistant_turn_is_labelled_as_mlx_lm_labels_a_last_one(
    models: dict[str, Path], tmp_path: Path, seed: int
) -> None:
    from mlx_lm.tuner.datasets import ChatDataset
    from mlx_lm.utils import load_tokenizer

    random_ = random.Random(seed)
    rows = [random_row(random_, "messages") for _ in range(40)]
    write_rows(tmp_path, rows)
    counts = tokenize_rows(tmp_path, models["chat"], train_on="assistant", max_seq_length=4096)["train"]
    assert counts["rows"] == len(rows) and counts["n_prompt_differs"] == counts["n_unsure"] == 0
    oracle, actual = (
        ChatDataset(rows, load_tokenizer(models["chat"]), mask_prompt=True),
        TokenRows(tmp_path / "out", "train"),
    )
    for index, row in enumerate(rows):
        tokens, labels = actual.row(index)
        expected = np.zeros(len(tokens), np.uint8)
        for n, message in enumerate(row["messages"], 1):
            if message["role"] == "assistant":
                cut, offset = oracle.process({**row, "messages": row["messages"][:n]})
                expected[offset : len(cut)] = 1
        assert np.array_equal(labels, expected), (seed, index)


def test_turns_of_templates_that_rewrite_the_past(tmp_path: Path) -> None:
    turns = [TURN, REPLY, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "bye now"}]
    for template, last in ((FORGETFUL, "<think>hm</think>\nbye now"), (THINKER, "bye now")):
        model = with_template(tmp_path / str(len(template)), template)
        write_rows(tmp_path, [{"messages": turns}, {"messages": [*turns, TURN]}, {"messages": turns[1:]}])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        counts = tokenize_rows(tmp_path, model, train_on="assistant")["train"]
        assert counts["rows"] == 3 and counts["n_unsure"] == 0
        assert labelled(tmp_path, model, 0) == ["hi<|im_end|>\n", f"{last}<|im_end|>\n"]
        assert labelled(tmp_path, model, 1) == ["hi<|im_end|>\n", "bye now<|im_end|>\n"]
        assert labelled(tmp_path, model, 2) == ["hi<|im_end|>\n", f"{last}<|im_end|>\n"]


def test_a_conversation_without_an_answer_has_no_label(models: dict[str, Path], tmp_path: Path) -> None:
    write_rows(tmp_path, [{"messages": [TURN]}, {"messages": [TURN, REPLY]}])
    counts = tokenize_rows(tmp_path, models["chat"], train_on="assistant")["train"]
    assert (counts["rows"], counts["n_masked_rows"]) == (1, 1)


PARTS = CHAT_TEMPLATE.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
)


def test_content_may_be_parts_if_the_template_accepts_them(models: dict[str, Path], tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    rows = [{"messages": [{**TURN, "content": parts}, {**REPLY, "content": [{"type": "text", "text": "hi"}]}]}]
    model = with_template(tmp_path / "parts", PARTS)
    for train_on in ("all", "completion", "assistant"):
        actual = []
        for given in (rows, [{"messages": [TURN, REPLY]}]):
            write_rows(tmp_path, given)
            tokenize_rows(tmp_path, model, train_on=train_on)
            actual.append([part.tolist() for part in TokenRows(tmp_path / "out", "train").row(0)])
            shutil.rmtree(tmp_path / "out")
        assert actual[0] == actual[1], train_on
    write_rows(tmp_path, rows)
    with pytest.raises(UserError, match=r'train\.jsonl:1: the "content" of message 1 is a list of parts.*not support'):
        tokenize_rows(tmp_path, models["chat"])
    write_rows(tmp_path, [{"messages": [{**TURN, "content": [{"type": "image", "url": "x"}]}]}])
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*message 1 must be a string or a list of .*found .*image"):
        tokenize_rows(tmp_path, model)


def test_keys_of_rows_may_have_other_names(models: dict[str, Path], tmp_path: Path) -> None:
    names = {"prompt_feature": "q", "completion_feature": "a", "chat_feature": "talk", "text_feature": "body"}
    plain = [{"prompt": "one", "completion": "two"}, {"messages": [TURN, REPLY]}, {"text": "three"}]
    named = [{"q": "one", "a": "two"}, {"talk": [TURN, REPLY]}, {"body": "three"}]
    for row, other in zip(plain, named, strict=True):
        actual = []
        for content, options in ((row, {}), (other, names)):
            write_rows(tmp_path, [content])
            tokenize_rows(tmp_path, models["chat"], **options)
            actual.append(TokenRows(tmp_path / "out", "train").row(0)[0].tolist())
            shutil.rmtree(tmp_path / "out")
        assert actual[0] == actual[1]
    write_rows(tmp_path, [{"text": "three"}])
    with pytest.raises(UserError, match=r'expected "body", "talk", or "q" and "a", found "text"'):
        tokenize_rows(tmp_path, models["chat"], **names)


def test_rows_of_several_kinds_where_sets_were_joined(models: dict[str, Path], tmp_path: Path) -> None:
    write_rows(tmp_path, [{"text": "a b"}, {"prompt": "a", "completion": "b"}])
    assert tokenize_rows(tmp_path, models["chat"], one_kind=False)["train"]["rows"] == 2


def test_memory_does_not_grow_with_the_number_of_rows(models: dict[str, Path], tmp_path: Path) -> None:
    peaks = []
    for n in (50, 100, 1100):  # the first one is a warm-up
        folder = write_rows(tmp_path / str(n), [{"text": "some words " * 40}] * n)
        job = request(folder, models["plain"], folder / "out")
        tracemalloc.start()
        tokenize.tokenize(job)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] <= 100_000, peaks  # 1,000 more rows are only 1 MB, even as int32


# Bad input

TURN = {"role": "user", "content": "hello"}
REPLY = {"role": "assistant", "content": "hi"}
MASK = {"train_on": "completion"}
BAD_ROWS: dict[str, tuple[str, dict[str, Any], bytes | list[Any], str]] = {
    "invalid JSON": ("chat", {}, b'{"text": "a"}\n{"text": "b"\n', "train.jsonl:2: not valid JSON: "),
    "deep JSON": ("chat", {}, b'{"text": ' + b"[" * 200_000, "train.jsonl:1: not valid JSON: "),
    "not UTF-8": ("chat", {}, b'{"text": "a"}\n\n{"text": "\xff"}\n', "train.jsonl:3: not UTF-8 text (byte 11"),
    "not an object": ("chat", {}, [{"text": "a"}, ["b"]], "train.jsonl:2: expected an object ({...}), found a list"),
    "no known keys": ("chat", {}, [{"txt": "a", "prompt": "b"}], 'found "txt", "prompt"'),
    "another kind": ("chat", {}, [{"text": "a"}, {"messages": [TURN]}], 'train.jsonl:2: has no "text", but line 1'),
    "empty text": ("chat", {}, [{"text": "a"}, {"text": ""}], "train.jsonl:2: the text is empty"),
    "text": ("chat", {}, [{"text": None}], 'train.jsonl:1: "text" must be a string, found null'),
    "prompt": ("chat", {}, [{"prompt": ["a"], "completion": "b"}], '"prompt" must be a string or a list of {"type": "'),
    "messages": ("chat", {}, [{"messages": {"role": "user"}}], '"messages" must be a list of messages, found an'),
    "no messages": ("chat", {}, [{"messages": []}], '"messages" must be a list of messages, found an empty list'),
    "message": ("chat", {}, [{"messages": [TURN, "hi"]}], "message 2 must be an object, found a string"),
    "role": ("chat", {}, [{"messages": [{"content": "a"}]}], 'message 1 needs a "role" (a string)'),
    "content": ("chat", {}, [{"messages": [TURN, {"role": "assistant", "content": [REPLY]}]}],
                'the "content" of message 2 must be a string or a list of {"type": "text"'),
    "no content": ("chat", {}, [{"messages": [{"role": "user"}]}], 'the "content" of message 1 must be a string'),
    "tools": ("chat", {}, [{"messages": [TURN, REPLY], "tools": "all"}], '"tools" must be a list, found a string'),
    "refused by the template": ("chat", {}, [{"messages": [TURN, {"role": "judge", "content": "no"}]}],
                                "train.jsonl:1: the tokenizer rejects this row: TemplateError: unknown role judge"),
    "lone surrogate": ("chat", {}, b'{"text": "\\ud800"}\n', "train.jsonl:1: the tokenizer rejects this row: "),
    "text with a mask": ("chat", MASK, [{"text": "a"}], "train.jsonl:1: --mask-prompt needs rows with a prompt"),
    "one message with a mask": ("chat", MASK, [{"messages": [REPLY]}],
                                "--train-on completion (--mask-prompt) needs a message before"),
    "no chat template": ("plain", {}, [{"prompt": "a", "completion": "b"}], "train.jsonl:1: this row needs a chat"),
    "no end of text": ("no-eos", {}, [{"text": "a"}], "train.jsonl:1: the tokenizer has no eos_token"),
    "all too long": ("chat", {"max_seq_length": 2, "overlong": "drop"}, [{"text": "a b c"}] * 3,
                     "train.jsonl: none of 3 rows is usable: 0 have no labelled token (within --max-seq-length), 3"),
    "all masked": ("chat", MASK | {"max_seq_length": 8}, [{"prompt": "a b c d " * 9, "completion": "b"}] * 2,
                   "train.jsonl: none of 2 rows is usable: 2 have no labelled token (within --max-seq-length)"),
    "empty file": ("chat", {}, b"\n", "train.jsonl: the file contains no rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    model, changes, rows, expected = BAD_ROWS[case]
    if isinstance(rows, bytes):
        (tmp_path / "train.jsonl").write_bytes(rows)
    else:
        write_rows(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        tokenize_rows(tmp_path, models[model], **changes)
    message = str(caught.value)
    assert expected in message and message.startswith(f"{tmp_path}/train.jsonl:") and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_bad_rows_of_the_validation_split_name_its_file(models: dict[str, Path], tmp_path: Path) -> None:
    write_rows(tmp_path, [{"text": "a"}])
    write_rows(tmp_path, [{"text": "a"}, {"text": 7}], "valid")
    with pytest.raises(UserError, match=r'valid\.jsonl:2: "text" must be a string, found a number'):
        tokenize_rows(tmp_path, models["chat"])


def test_a_token_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "small", chat=False)
    write_rows(tmp_path, [{"text": "a b"}])
    for config in ({"vocab_size": 60}, {"text_config": {"vocab_size": 60}}):
        (model / "config.json").write_text(json.dumps({"model_type": "unknown", **config}))
        with pytest.raises(UserError, match=r"train\.jsonl:1: token \d+ is not in the model's vocabulary of 60"):
            tokenize_rows(tmp_path, model)


def test_a_file_that_changes_while_it_is_read_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    job = request(write_rows(tmp_path, [{"text": "a"}]), models["plain"], tmp_path / "out")
    write_rows(tmp_path, [{"text": "b"}])
    with pytest.raises(UserError, match="changed while it was being read"):
        tokenize.tokenize(job)
    assert not (tmp_path / "out").exists()


def test_a_template_that_never_ends_is_refused_by_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "_ROW_S", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    write_rows(tmp_path, [row])
    with pytest.raises(UserError, match=r"train\.jsonl:1: the tokenizer or its chat template took more than"):
        tokenize_rows(tmp_path, with_template(tmp_path, loop), train_on="all", max_seq_length=50)
