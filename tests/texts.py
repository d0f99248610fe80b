"""Small tokenizers, with and without chat templates, random rows for them, and tokenizing without a child process."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from mebp_mlx.data import dataset, tokenize
from mebp_mlx.system.machine import load_blas

SENTENCES = [
    "the cat sat on the mat and looked at the moon", "what is the capital of France? It is Paris.",
    "call the tool with {\"city\": \"Oslo\"} and wait", "naïve café, 東京 and 🙂🙃 make bytes",
    "user assistant system tool", "  leading spaces\nand\n\nlines\t tabs", "0123456789 + 42 = 9",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('unknown role ' + m.role) }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPTIONS: dict[str, Any] = {"train_on": "all", "max_seq_length": 512, "overlong": "truncate"}


def write_tokenizer(folder: Path, *, chat: bool, bos: bool = False, eos: bool = True) -> Path:
    """Writes a byte-level BPE tokenizer of about 320 pieces, with or without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if eos:
        config["eos_token"] = "<|im_end|>" if chat else "<|endoftext|>"
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_sentencepiece(folder: Path) -> Path:
    """Writes a sentencepiece tokenizer without tokenizer.json, as in older llama checkpoints."""
    import sentencepiece

    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3), model_prefix=str(folder / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_rows(folder: Path, rows: list[Any], split: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_tokenizers(root: Path) -> dict[str, Path]:
    """Model folders that contain only a tokenizer, by the tokenizer's special property."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    load_blas()  # tokenizing in this process imports mlx.core
    return {
        "chat": write_tokenizer(root / "chat", chat=True),
        "plain": write_tokenizer(root / "plain", chat=False, bos=True),
        "no-eos": write_tokenizer(root / "no-eos", chat=False, eos=False),
        "sentencepiece": write_sentencepiece(root / "sentencepiece"),
    }


def request(folder: Path, model: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The child's request for all splits in a folder."""
    files = {path.stem: [str(path), dataset.sha256_of(path)] for path in folder.glob("*.jsonl")}
    return {"rows": {**OPTIONS, **options}, "model_path": str(model), "out": str(out), "files": files}


def tokenize_rows(folder: Path, model: Path, **options: Any) -> dict[str, dict[str, int]]:
    """Writes token files to `folder / "out"` in this process; returns the counts of each split."""
    return tokenize.tokenize(request(folder, model, folder / "out", **options))["splits"]


def random_text(random: random.Random, empty: bool = False) -> str:
    words = " ".join(SENTENCES).split(" ")
    return " ".join(random.choices(words, k=random.randint(0 if empty else 1, 30))) or ("" if empty else "x")


def random_row(random: random.Random, kind: str) -> dict[str, Any]:
    tools = random.choice([{}, {}, {"tools": [{"name": "weather", "parameters": {"city": random_text(random)}}]}])
    if kind == "text":
        return {"text": random_text(random) + random.choice(["", "<|im_end|>", "<|endoftext|>", "</s>"])}
    if kind == "prompt":
        return {"prompt": random_text(random, True), "completion": random_text(random, True)} | tools
    messages = [{"role": "system", "content": random_text(random)}] if random.random() < 0.5 else []
    for _ in range(random.randint(1, 3)):
        messages.append({"role": "user", "content": random_text(random)})
        messages.append({"role": "assistant", "content": random_text(random)})
    if random.random() < 0.2:
        messages.append({"role": random.choice(["user", "tool"]), "content": random_text(random)})
    return {"messages": messages} | tools
