"""The bundled model and data are small, complete, disjoint, loadable and above chance; their text extraction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.bundled import corpus
from mebp_mlx import bundled
from mebp_mlx.system import machine

machine.load_blas()
FOLDER = Path(bundled.__file__).parent
SPLITS = ("train", "valid", "test")

MODULE = '''"""Tools for boxes of any size."""
class Box(object):
    """A box that holds things. It can be opened."""
    def open(self, slowly: bool = False, *, hinge=None):
        """Open the box and return what is in it.

        Longer text.
        """
    def _hidden(self):
        """Never asked about, because its name is private."""
    @property
    def size(self) -> int:
        """Return the size of the box in metres (e.g. 1.5). Never negative."""
if True:
    async def carry(box, /, *where, **how):
        """Carry the box
        to another place"""
def undocumented(): pass
'''


def pairs(split: str) -> list[tuple[str, str]]:
    actual = []
    for line in (bundled.DATA_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        actual.append((row["messages"][0]["content"], row["messages"][1]["content"]))
    return actual


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A tiny standard library with folders that must be skipped."""
    for name in ("boxes/__init__.py", "test/test_boxes.py", "site-packages/other.py", "aaa.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = MODULE if name.startswith("boxes") else f'"""Text of the file {name}."""\n'
        path.write_text(text, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def (:\n", encoding="utf-8")
    return tmp_path


def test_the_folder_is_small_and_complete() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    names = {str(path.relative_to(FOLDER)) for path in files}
    wanted = {"NOTICE", "README.md", "pretrain.json", *(f"data/{split}.jsonl" for split in SPLITS)}
    wanted |= {"model/config.json", "model/model.safetensors", "model/tokenizer.model"}
    wanted |= {"model/tokenizer.json", "model/tokenizer_config.json"}
    assert wanted <= names
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (FOLDER / "NOTICE").read_text(encoding="utf-8")


def test_rows_are_short_questions_and_sentences() -> None:
    counts = {split: len(pairs(split)) for split in SPLITS}
    assert 800 <= counts["train"] <= 1_500
    assert counts["valid"] >= 50
    assert counts["test"] >= 50
    for split in SPLITS:
        for asked, answer in pairs(split):
            assert asked.endswith(("?", "."))
            assert answer.endswith((".", "!"))
            assert len(answer) <= 140


def test_splits_share_neither_answer_nor_question() -> None:
    seen: dict[str, str] = {}
    for split in SPLITS:
        for asked, answer in pairs(split):
            for text in (asked, answer):
                assert text not in seen, f"{text!r} in {split} and {seen[text]}"
                seen[text] = split


def test_sample_prompt_is_held_out() -> None:
    assert bundled.SAMPLE_PROMPT in [asked for asked, _ in pairs("valid")]


def test_record_agrees_with_the_files() -> None:
    record = json.loads((FOLDER / "pretrain.json").read_text(encoding="utf-8"))
    config = json.loads((bundled.MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    assert record["rows"] == {split: len(pairs(split)) for split in SPLITS}
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert record["valid_loss_4bit"] < math.log(config["vocab_size"])
    assert abs(record["valid_loss_4bit"] - record["valid_loss_float32"]) <= 0.1


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The model as loaded by mlx-lm, decompressed to float32 because packed products are slow on a CPU."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.utils import dequantize_model

    model, tokenizer = load(str(bundled.MODEL_DIR))[:2]
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return model, tokenizer


def test_chat_tokens_are_single_and_text_round_trips(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    asked, answer = pairs("valid")[0]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    ids = list(tokenizer.apply_chat_template(messages, return_dict=False))
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert text == f"<s><|user|>{asked}<|end|><|assistant|>{answer}</s>"
    prompt = list(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False))
    assert ids[: len(prompt)] == prompt  # --mask-prompt depends on this
    assert ids[-1] == tokenizer.eos_token_id
    for token in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>", "</s>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    for sample in ("  two  spaces\n\n    x = {1: 'a'}\n", "naïve – 中文 🙂", "a?b!c"):
        assert tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False)) == sample


def test_both_tokenizer_files_agree(loaded: tuple[Any, Any]) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(bundled.MODEL_DIR / "tokenizer.model"))
    for text in [MODULE, *(text for pair in pairs("train") for text in pair)]:
        assert loaded[1].encode(text, add_special_tokens=False) == processor.encode(text), text


def test_rows_fit_and_the_model_beats_chance(loaded: tuple[Any, Any]) -> None:
    import mlx.core as mx
    from mlx import nn

    model, tokenizer = loaded
    rows = []
    for asked, answer in pairs("valid"):
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append(list(tokenizer.apply_chat_template(messages, return_dict=False)))
    assert np.mean([len(row) <= 80 for row in rows]) >= 0.9
    losses = []
    for row in rows[:24]:
        tokens = mx.array([row])
        loss = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")
        losses.append(float(np.array(loss)))
    assert float(np.mean(losses)) <= math.log(model.args.vocab_size) - 2.5


def test_extraction_reads_names_signatures_and_texts(library: Path) -> None:
    actual = {entry.name: entry for entry in corpus.entries(library, with_runtime=False)}
    assert set(actual) == {
        "aaa",
        "boxes",
        "boxes.Box",
        "boxes.Box.open",
        "boxes.Box._hidden",
        "boxes.Box.size",
        "boxes.carry",
    }
    assert actual["boxes.Box.open"].signature == "(slowly=False, *, hinge=None)"
    assert actual["boxes.carry"].signature == "(box, /, *where, **how)"
    assert actual["boxes.Box.open"].text.startswith("boxes.Box.open(slowly=False, *, hinge=None)\n\nOpen the")


def test_extraction_is_deterministic(library: Path) -> None:
    first = corpus.entries(library, with_runtime=False)
    assert first == corpus.entries(library, with_runtime=False)
    assert corpus.make_splits(first, 2, 1, 1) == corpus.make_splits(first, 2, 1, 1)


def test_held_out_objects_are_not_pretrained_on(library: Path) -> None:
    (library / "copy_of_boxes.py").write_text(MODULE.replace("Longer", "Other"), encoding="utf-8")
    actual = corpus.entries(library, with_runtime=False)
    splits = corpus.make_splits(actual, 1, 1, 1)
    hidden = [row["messages"][1]["content"] for split in ("valid", "test") for row in splits.rows[split]]
    assert len(hidden) == 2
    assert len(splits.pretrain) + len(splits.held_out) <= len(actual)
    for answer in hidden:
        assert any(answer.rstrip(".") in " ".join(entry.doc.split()) for entry in splits.held_out)
        assert not any(answer.rstrip(".") in " ".join(entry.doc.split()) for entry in splits.pretrain)


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Carry the box\nto another place", "Carry the box to another place."),
        ("Return the size of the box (e.g. 1.5). Never negative.", "Return the size of the box (e.g. 1.5)."),
        ("Use the i.e. Latin way of saying it. Done.", "Use the i.e. Latin way of saying it."),
        ("dict() -> new empty dictionary", ""),
        ("Too short.", ""),
        (">>> print('Hello to the world')", ""),
        ("See the following list of things:", ""),
    ],
)
def test_first_sentence(doc: str, sentence: str) -> None:
    assert corpus.first_sentence(doc) == sentence
