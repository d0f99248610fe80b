"""--resume-adapter-file: a new run starts from our adapters or mlx-lm's, or reports the options that match."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mebp_mlx import train
from tests.adapters import make_adapters, mlx_lm_loss
from tests.runs import arguments, contents, events, refused
from tests.texts import write_rows

pytestmark = pytest.mark.usefixtures("tokens_made_here")


def test_the_first_step_equals_that_of_a_continued_run(home: Path, tmp_path: Path) -> None:
    """With a stateless optimizer and one row, the two runs are bit-equal."""
    data = write_rows(tmp_path / "data", [{"text": "the cat sat on the mat"}], "train")
    first, new = tmp_path / "first", tmp_path / "new"
    same = ["--data", str(data), "--optimizer", "sgd", "--seed", "3"]
    assert train.main(arguments(home, first, *same, "--iters", "4")) == 0
    (tmp_path / "start").mkdir()
    for name in ("adapters.safetensors", "adapter_config.json"):
        (tmp_path / "start" / name).write_bytes((first / name).read_bytes())
    assert train.main(["--resume", "--adapter-path", str(first), "--iters", "5"]) == 0
    start = str(tmp_path / "start" / "adapters.safetensors")
    assert train.main(arguments(home, new, *same, "--iters", "1", "--resume-adapter-file", start)) == 0
    assert (new / "adapters.safetensors").read_bytes() == (first / "adapters.safetensors").read_bytes()
    assert events(new, "train")[0]["loss"] == events(first, "train")[-1]["loss"]


def test_other_data_rate_and_optimizer_and_an_exact_resume(home: Path, tmp_path: Path) -> None:
    start = make_adapters(tmp_path / "start", home / "model", rank=4, scale=20.0)
    more = ["--optimizer", "lion", "--learning-rate", "1e-4", "--resume-adapter-file", str(start), "--iters", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(home, whole, *more)) == 0
    assert train.main(arguments(home, parts, *more, "--iters", "2")) == 0
    for file in start.iterdir():
        file.unlink()  # a resumed run starts from its own checkpoint
    assert train.main(["--resume", "--adapter-path", str(parts), "--iters", "4"]) == 0
    assert (parts / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()


def test_mlx_lms_adapters_start_at_their_loss(home: Path, tmp_path: Path) -> None:
    """A file that mlx-lm's layers wrote, without our config."""
    pytest.importorskip("mlx_lm")
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    data = write_rows(tmp_path / "data", [{"text": "the cat sat on the mat"}], "train")
    model = load_model(home / "model")[0]
    model.freeze()
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    linear_to_lora_layers(model, 1, parameters)
    from mlx.utils import tree_flatten

    values = {name: mx.random.normal(value.shape) * 0.2 for name, value in tree_flatten(model.trainable_parameters())}
    start = tmp_path / "start"
    start.mkdir()
    mx.save_safetensors(str(start / "adapters.safetensors"), values)
    about = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (start / "adapter_config.json").write_text(json.dumps(about))
    options = ["--data", str(data), "--scale", "10", "--keys", "q_proj", "down_proj", "--num-layers", "1"]
    out = tmp_path / "out"
    argv = arguments(home, out, *options, "--iters", "1", "--resume-adapter-file", str(start / "adapters.safetensors"))
    assert train.main(argv) == 0
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(home / "model")
    row = [*tokenizer.encode("the cat sat on the mat"), tokenizer.eos_token_id]
    expected = mlx_lm_loss(home / "model", start, [row])
    assert abs(events(out, "train")[0]["loss"] / expected - 1) <= 1e-5
    assert abs(mlx_lm_loss(home / "model", None, [row]) / expected - 1) > 1e-3


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ["--rank", "8"],
            "--rank: is 8, but --resume-adapter-file {start}/adapters.safetensors has 3; use --rank 3 --scale",
        ),
        (["--scale", "1"], "--scale: is 1.0, but --resume-adapter-file {start}/adapters.safetensors has 2.0"),
        (["--keys", "q_proj"], "--keys: is self_attn.q_proj, but --resume-adapter-file"),
        (["--num-layers", "1"], "--num-layers: is 1, but --resume-adapter-file {start}/adapters.safetensors has 2"),
        (["--resume-adapter-file", "{start}/none"], "--resume-adapter-file {start}/none: no such file"),
        (
            ["--resume-adapter-file", "{home}/data"],
            "--resume-adapter-file {home}/data: the folder contains no adapters",
        ),
        (["--resume-adapter-file", "{home}/model/model.safetensors"], "--resume-adapter-file {home}/model/model"),
    ],
)
def test_mismatched_adapters_are_refused_with_the_matching_options(
    home: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start = make_adapters(tmp_path / "start", home / "model", rank=3, scale=2.0)
    before = contents(tmp_path)
    right = ["--rank", "3", "--scale", "2", "--resume-adapter-file", str(start)]
    if "--rank" in more:
        right = right[4:]
    places = {"start": start, "home": home}
    said = refused(capsys, arguments(home, tmp_path / "out", *right, *(part.format(**places) for part in more)))
    assert said.startswith(message.format(**places)), said
    assert contents(tmp_path) == before
