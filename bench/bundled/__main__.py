"""Makes the bundled model and data offline, only from the interpreter's documentation strings.

    python -m bench.bundled [--out mebp_mlx/bundled] [--minutes 40] [--steps N]

The result is a sentencepiece tokenizer, a small llama model trained in float32, its 4-bit checkpoint in mlx-lm's
layout, the fine-tuning rows, and `pretrain.json`, the record of the run. The last printed line is a summary of the
record as JSON. Training ends after --minutes, or after --steps if given; the learning rate follows the elapsed share.
Only runs with --steps are repeatable.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from mebp_mlx.system import machine

BLAS = machine.load_blas()

import mlx.core as mx  # noqa: E402  (the BLAS must come first)
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402
from mlx_lm.models import llama  # noqa: E402

from bench import report  # noqa: E402
from bench.bundled import corpus  # noqa: E402

N_PIECES = 4_096
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
N_TOKENS = 256  # T, the length of a training row
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": N_PIECES,
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "intermediate_size": 640,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1_024,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
GROUP_SIZE, BITS = 64, 4
HELP_SHARE = 0.3  # share of the documents that are shown as an answer to help(name), to train the chat tokens
FAKE_QUANT_FROM = 0.8  # share of the run after which the forward pass uses 4-bit weights


# ------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(texts: list[str], folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Trains the BPE tokenizer and writes tokenizer.model, tokenizer.json and tokenizer_config.json."""
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=N_PIECES,
            byte_fallback=True,
            character_coverage=0.9995,
            required_chars=string.printable.strip(),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=100_000,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            user_defined_symbols=list(CHAT_TOKENS),
            num_threads=2,
            minloglevel=2,
        )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    write_json(folder / "tokenizer.json", fast_tokenizer(processor))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONFIG["max_position_embeddings"],
            "unk_token": UNK,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": UNK,
            "additional_special_tokens": list(CHAT_TOKENS),
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return processor


def fast_tokenizer(processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """The same tokenizer in the `tokenizers` library's layout; a merge has the rank of its result."""
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or piece in CHAT_TOKENS:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-processor.get_score(i), ids[left], ids[right], [left, right]))
    special = [UNK, BOS, EOS, *CHAT_TOKENS]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    template = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], "content": token, **flags} for token in special],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [ids[BOS]], "tokens": [BOS]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [pair for *_, pair in sorted(merges)],
        },
    }


# ------------------------------------------------------------------------------------------ training

Document = tuple[np.ndarray, np.ndarray]  # an entry's tokens: plain, and as an answer to help(name)


def encoded(entries: list[corpus.Entry], processor: sentencepiece.SentencePieceProcessor) -> list[Document]:
    """The tokens of each entry in both forms, between <s> and </s>."""
    plain = processor.encode([entry.text for entry in entries])
    helped = processor.encode([f"<|user|>help({e.name})<|end|><|assistant|>{e.text}" for e in entries])
    bos, eos = processor.bos_id(), processor.eos_id()
    return [
        (np.array([bos, *p, eos], np.int32), np.array([bos, *h, eos], np.int32))
        for p, h in zip(plain, helped, strict=True)
    ]


def packed(documents: list[Document], rng: np.random.Generator) -> np.ndarray:
    """One epoch as rows [n, T + 1]: documents in random order, concatenated and cut; the rest is dropped."""
    order = rng.permutation(len(documents))
    as_help = rng.random(len(documents)) < HELP_SHARE
    stream = np.concatenate([documents[i][int(as_help[i])] for i in order])
    stream = np.roll(stream, rng.integers(N_TOKENS))  # different cuts in every epoch
    n_rows = (len(stream) - 1) // N_TOKENS
    rows = np.stack([stream[i * N_TOKENS : i * N_TOKENS + N_TOKENS + 1] for i in range(n_rows)])
    return rng.permutation(rows)


def endless(documents: list[Document], batch_size: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    while True:
        rows = packed(documents, rng)
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows[start : start + batch_size]


def new_model(seed: int) -> llama.Model:
    """A new float32 model; projections into the residual stream start with smaller values."""
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    shrink = 1 / math.sqrt(2 * CONFIG["num_hidden_layers"])
    for layer in model.layers:
        layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * shrink
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * shrink
    mx.eval(model.parameters())
    return model


def fake_quantized(weight: mx.array) -> mx.array:
    """The weight as quantized in the checkpoint, with a straight-through gradient. Vectors are not changed."""
    if weight.ndim < 2:
        return weight
    packed_weight, scales, biases = mx.quantize(weight.astype(mx.bfloat16), GROUP_SIZE, BITS)
    rounded = mx.dequantize(packed_weight, scales, biases, GROUP_SIZE, BITS)
    return weight + mx.stop_gradient(rounded.astype(weight.dtype) - weight)


@mx.custom_function
def cross_entropy(logits: mx.array, targets: mx.array) -> Any:
    """(mean loss in nats, gradient by the logits), in numpy, whose exp is several times faster than MLX's on x86."""
    z = np.array(logits)
    z -= z.max(-1, keepdims=True)
    labels = np.array(targets)[..., None]
    picked = np.take_along_axis(z, labels, -1)
    np.exp(z, out=z)
    total = z.sum(-1, keepdims=True)
    loss = (np.log(total) - picked).mean()
    z /= total
    np.put_along_axis(z, labels, np.take_along_axis(z, labels, -1) - 1, -1)
    z /= labels.size
    return mx.array(loss), mx.array(z)


@cross_entropy.vjp
def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    return outputs[1] * cotangents[0], mx.zeros_like(primals[1])


def mean_loss(model: llama.Model, rows: mx.array) -> mx.array:
    """Mean next-token loss in nats over rows [B, T + 1]."""
    logits = model(rows[:, :-1]).astype(mx.float32)  # [B, T, V]
    return cast(Any, cross_entropy(logits, rows[:, 1:]))[0]


def number(value: mx.array) -> float:
    return float(np.array(value))


def evaluate(model: Any, rows: np.ndarray) -> float:
    """Mean loss in nats over all rows [n, T + 1]."""
    total = 0.0
    for start in range(0, len(rows), 4):
        part = rows[start : start + 4]
        total += number(mean_loss(model, mx.array(part))) * len(part)
    return total / len(rows)


def train(
    model: llama.Model,
    batches: Iterator[np.ndarray],
    valid: np.ndarray,
    options: argparse.Namespace,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Trains for --minutes (or --steps); returns the record: steps, tokens, curve, losses."""
    peak = options.learning_rate
    n_ticks, n_warm_up = 1_000, 30  # the schedule's step is the progress in 1/1000
    rise = optim.linear_schedule(0.0, peak, n_warm_up)
    fall = optim.cosine_decay(peak, n_ticks - n_warm_up, peak * 0.02)
    schedule = optim.join_schedules([rise, fall], [n_warm_up])
    optimizer = optim.AdamW(learning_rate=peak, betas=[0.9, 0.95], weight_decay=options.weight_decay)
    params = model.trainable_parameters()

    def loss_of(params: Any, rows: mx.array, rounding: bool) -> mx.array:
        model.update(tree_map(fake_quantized, params) if rounding else params)
        return mean_loss(model, rows)

    grad_of = mx.value_and_grad(loss_of)
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    start_s = last_report_s = time.monotonic()
    step = 0
    while True:
        elapsed_s = time.monotonic() - start_s
        progress = step / options.steps if options.steps else elapsed_s / (60 * options.minutes)
        if progress >= 1:
            break
        optimizer.learning_rate = schedule(mx.array(max(progress * n_ticks, 1.0)))
        loss, grads = grad_of(params, mx.array(next(batches)), progress >= FAKE_QUANT_FROM)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        params = optimizer.apply_gradients(grads, params)
        mx.eval(loss, params, optimizer.state)
        step += 1
        recent = [*recent[-99:], number(loss)]
        if time.monotonic() - last_report_s > 20:
            last_report_s = time.monotonic()
            train_loss = sum(recent) / len(recent)
            n_seen = step * options.batch_size * N_TOKENS
            line = f"{progress:6.1%} step {step} tokens {n_seen:,} train {train_loss:.3f}"
            if progress >= 0.05 * (1 + len(curve)):
                model.update(params)
                valid_loss = evaluate(model, valid)
                curve.append({"n_tokens": n_seen, "train": round(train_loss, 4), "valid": round(valid_loss, 4)})
                line += f" valid {valid_loss:.3f}"
            say(f"{line} {n_seen / (last_report_s - start_s):,.0f} tokens/s")
    model.update(params)
    return {
        "steps": step,
        "n_tokens_seen": step * options.batch_size * N_TOKENS,
        "train_s": round(time.monotonic() - start_s, 1),
        "train_loss": round(sum(recent) / len(recent), 4),
        "valid_loss_float32": round(evaluate(model, valid), 4),
        "curve": curve,
    }


# ------------------------------------------------------------------------------------------ saving


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(rows: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Writes {split}.jsonl in mlx-lm's "messages" format."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, items in rows.items():
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def save_quantized(model: llama.Model, folder: Path) -> None:
    """Writes config.json and model.safetensors (4 bits, bfloat16 scales) in mlx-lm's format. Changes `model`."""
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, GROUP_SIZE, BITS)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    quantization = {"group_size": GROUP_SIZE, "bits": BITS, "mode": "affine"}
    write_json(
        folder / "config.json",
        dict(sorted({**CONFIG, "quantization": quantization, "quantization_config": quantization}.items())),
    )


def check_saved(folder: Path, valid: np.ndarray, questions: list[str]) -> dict[str, Any]:
    """Validation loss and greedy answers of the checkpoint, loaded by mlx-lm.

    Its weights are decompressed to float32 first, because packed products are slow on a CPU.
    """
    from mlx_lm import generate, load
    from mlx_lm.utils import dequantize_model

    model, tokenizer = load(str(folder))[:2]
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    samples = []
    for content in questions:
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        samples.append({"prompt": content, "answer": generate(model, tokenizer, prompt, max_tokens=60)})
    return {"valid_loss_4bit": round(evaluate(model, valid), 4), "samples": samples}


def install(staged: Path, out: Path) -> None:
    """Replaces each file or folder in `out` by the staged one; old and new contents of a folder never mix."""
    out.mkdir(parents=True, exist_ok=True)
    for item in sorted(staged.iterdir()):
        target = out / item.name
        if item.is_dir() and target.exists():
            old = Path(tempfile.mkdtemp(prefix=".old-", dir=out))
            os.replace(target, old / item.name)
            os.replace(item, target)
            shutil.rmtree(old)
        else:
            os.replace(item, target)


def main(argv: list[str] | None = None) -> int:
    parser = report.Parser("bundled", __doc__)
    bundled = Path(__file__).resolve().parents[2] / "mebp_mlx" / "bundled"
    parser.add_argument("--out", type=Path, default=bundled, help="folder for model/, data/ and pretrain.json")
    parser.add_argument("--minutes", type=float, default=40.0, help="minutes of the training loop (default: 40)")
    parser.add_argument("--steps", type=int, default=0, help="train for this many steps instead, repeatably")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.minutes <= 0 or options.steps < 0 or options.batch_size < 1 or not options.learning_rate > 0:
        parser.error("--minutes, --batch-size and --learning-rate must be positive, and --steps at least 0")

    def say(line: str) -> None:
        print(line, flush=True)

    say(f"BLAS {BLAS.name}, MLX {importlib.metadata.version('mlx')}, Python {sys.version.split()[0]}")
    entries = corpus.entries()
    splits = corpus.make_splits(entries)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staged-", dir=options.out) as staged_name:
        staged = Path(staged_name)
        folder = staged / "model"
        folder.mkdir()
        write_rows(splits.rows, staged / "data")
        processor = train_tokenizer([entry.text for entry in splits.pretrain], folder)
        documents = encoded(splits.pretrain, processor)
        valid = packed(encoded(splits.held_out, processor), np.random.default_rng(options.seed))
        n_tokens = sum(len(plain) for plain, _ in documents)
        model = new_model(options.seed)
        n_params = sum(value.size for value in dict(tree_flatten(model.parameters())).values())
        say(f"{len(documents):,} documents, {n_tokens:,} tokens, {n_params:,} parameters")
        record = train(model, endless(documents, options.batch_size, options.seed), valid, options, say)
        save_quantized(model, folder)
        asked = [row["messages"][0]["content"] for row in splits.rows["valid"][:4]]
        record.update(check_saved(folder, valid, asked))
        packages = ("mlx", "mlx-lm", "numpy", "sentencepiece")
        full = {
            "options": {key: value for key, value in vars(options).items() if key not in ("out", "command")},
            "versions": {
                "python": sys.version.split()[0],
                "blas": BLAS.name,
                **{name: importlib.metadata.version(name) for name in packages},
            },
            "n_documents": len(documents),
            "n_held_out_documents": len(splits.held_out),
            "n_chars": sum(len(entry.text) for entry in splits.pretrain),
            "n_tokens_per_epoch": n_tokens,
            "n_parameters": n_params,
            "rows": {split: len(rows) for split, rows in splits.rows.items()},
            **record,
        }
        write_json(staged / "pretrain.json", full)
        install(staged, options.out)
    long = ("curve", "samples", "versions")
    say(json.dumps({key: value for key, value in full.items() if key not in long}))
    return 0


if __name__ == "__main__":
    report.run(main)
