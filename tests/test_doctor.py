"""The doctor's report on a checkpoint, and its measurements for a Mac."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mebp_mlx.doctor import __main__ as doctor
from mebp_mlx.doctor import checks, probes
from mebp_mlx.model.base import Tensor
from mebp_mlx.system import device
from mebp_mlx.testing.tiny import packed_config, write_model
from mebp_mlx.weights.safetensors import MappedWeights
from tests import adoption

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulation knows glibc and MLX's CPU wheel")
ITEM_BYTES = {"U32": 4, "BF16": 2}


@pytest.fixture
def as_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_metal", lambda: True)
    monkeypatch.setattr(mx, "from_dlpack", adoption.from_dlpack)


def _model(folder: Path, shift: int) -> Path:
    how = {"group_size": 32, "bits": 4}
    write_model(folder, packed_config("qwen2"), quantization=how, dtype=mx.bfloat16)
    file = folder / "model.safetensors"
    mx.save_safetensors(str(file), {**mx.load(str(file)), "vision_tower.patch.weight": mx.zeros((3, 3))})
    adoption.place(file, shift)
    return folder


def _rows(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    assert doctor.main([*argv, "--json"]) == code
    return {row["what"]: row for row in json.loads(capsys.readouterr().out)["findings"]}


def _bytes(folder: Path, shift: int) -> dict[str, int]:
    """The bytes of the tensors that the model uses, from the headers."""
    weights, actual = MappedWeights(folder), dict[str, int]()
    for info in map(weights.info, weights.names):
        if info.name != "vision_tower.patch.weight":
            n = ITEM_BYTES[info.dtype]
            what = f"copied in every pass: not {n}-byte aligned" if info.offset % n else "used in place"
            actual[what] = actual.get(what, 0) + info.n_bytes
    return actual


@pytest.mark.parametrize("shift", [0, 2, 1])
def test_tensors_that_metal_would_adopt_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shift: int
) -> None:
    folder = _model(tmp_path / "model", shift)
    rows = _rows(capsys, "--model", str(folder))
    assert "not available on this machine" in rows["Metal"]["detail"]
    actual = {what: row["figures"]["bytes"] for what, row in rows.items() if "bytes" in row["figures"]}
    assert actual == _bytes(folder, shift)
    assert ("used in place" in actual) == (shift != 1)
    assert all(row["state"] == "-" for what, row in rows.items() if what in actual)


@linux
@pytest.mark.parametrize("shift", [0, 2])
def test_adopted_tensors_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shift: int, as_on_metal: None
) -> None:
    folder = _model(tmp_path / "model", shift)
    rows = _rows(capsys, "--model", str(folder))
    actual = {what: (row["state"], row["figures"]["bytes"]) for what, row in rows.items() if "bytes" in row["figures"]}
    expected = _bytes(folder, shift)
    assert actual == {what: ("note" if "copied" in what else "ok", n) for what, n in expected.items()}
    assert "Metal" not in rows and all("--mode keep" in row["detail"] for what, row in rows.items() if "copied" in what)


def test_tensors_that_mlx_refuses_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_dlpack(pages: memoryview, *, copy: bool) -> mx.array:
        raise ValueError

    monkeypatch.setattr(device, "on_metal", lambda: True)
    monkeypatch.setattr(mx, "from_dlpack", from_dlpack)
    rows = _rows(capsys, "--model", str(_model(tmp_path / "model", 0)))
    refused = rows["copied in every pass: refused by MLX"]
    assert refused["state"] == "note" and "keep" not in refused["detail"] and "used in place" not in rows


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--model", "nowhere"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: --model nowhere: ") and said.err.count("\n") == 1 and not said.out


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ADOPTED_BYTES", 1 << 20)
    monkeypatch.setattr(probes, "DIRTY_BYTES", 1 << 20)
    monkeypatch.setattr(probes, "PRODUCT", (2, 64, 64))
    monkeypatch.setattr(probes, "LOOKS", 3)


def test_the_five_measurements_run_on_every_backend(capsys: pytest.CaptureFixture[str], small: None) -> None:
    rows = list(_rows(capsys, "--probe").values())
    assert len(rows) == 5 and {row["group"] for row in rows} == {"probe"}
    here = device.on_metal()
    assert all(row["state"] == ("ok" if here else "-") for row in rows)
    assert all(("not on Metal" in row["detail"]) != here for row in rows)
    figures: dict[str, Any] = {}
    for row in rows:
        figures |= row["figures"]
    assert figures["same"] and figures["look_us"] > 0 and figures["float16_4bit_ms"] > 0


@linux
def test_measurements_use_adopted_pages_if_available(
    capsys: pytest.CaptureFixture[str], small: None, as_on_metal: None
) -> None:
    rows = list(_rows(capsys, "--probe").values())
    assert rows[0]["figures"]["shared_adopted"] and "read in place" in rows[0]["detail"]
    assert rows[3]["figures"] == {"same": True, "adopted": True} and rows[3]["state"] == "ok"


def test_different_numbers_at_the_second_read_are_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    read = Tensor.__getitem__
    monkeypatch.setattr(Tensor, "__getitem__", lambda tensor, index: read(tensor, index) + 1)
    assert _rows(capsys, "--probe", code=1)["a float16 tensor read, cast, read again"]["state"] == "FAIL"


def test_a_full_disk_ends_the_measurements_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    def reserve(descriptor: int, n_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(probes, "reserve", reserve)
    assert doctor.main(["--probe"]) == 2
    assert capsys.readouterr().err == "error: --probe: No space left on device\n"


def test_operations_that_saves_need_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (works,) = checks.check_saves(tmp_path)
    assert works.state == "ok" and works.figures["save_s"] > 0 and works.figures["free_bytes"] > 0
    assert not list(tmp_path.iterdir())

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("mebp_mlx.system.files.os.fsync", refuse)
    (fails,) = checks.check_saves(tmp_path)
    assert fails.state == "note" and "cannot be written: Invalid argument" in fails.detail
