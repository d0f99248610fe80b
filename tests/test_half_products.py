"""Packed bfloat16 products computed in float16: on which machines, and with which error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.model.base import QuantizedBlock
from mebp_mlx.model.config import Quantization
from mebp_mlx.system import device
from mebp_mlx.testing.reference import rms_error
from mebp_mlx.testing.tiny import packed_config, random_batch, randomize_lora, write_model

N, OUT, IN = 9, 96, 128


@pytest.mark.quick
@pytest.mark.parametrize(
    "architecture, expected",
    [(f"applegpu_g{name}", True) for name in ("13g", "13s", "14g", "14d")]
    + [(name, False) for name in ("applegpu_g15s", "applegpu_g16g", "applegpu_g17p", "", "sm_90")],
)
def test_only_the_m1_and_m2_generations_use_float16(
    architecture: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Metal emulated; never without Metal, for other dtypes, or for gemma."""
    monkeypatch.setattr(device.mx, "device_info", lambda: {"architecture": architecture})
    assert not device.emulates_bfloat16()
    monkeypatch.setattr(device, "on_metal", lambda: True)
    assert device.emulates_bfloat16() == expected
    assert device.takes_float16(mx.bfloat16, "qwen2") == expected
    assert not device.takes_float16(mx.float16, "qwen2") and not device.takes_float16(mx.float32, "qwen2")
    assert not device.takes_float16(mx.bfloat16, "gemma3_text")


def _as_metal_does(x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, **how: Any) -> mx.array:
    """Weights rounded to x's dtype, sums in float32, the result rounded once."""
    rows = mx.dequantize(w, scales, biases, group_size=how["group_size"], bits=how["bits"])
    wide = rows.astype(x.dtype).astype(mx.float32)
    return (x.astype(mx.float32) @ (wide.T if how["transpose"] else wide)).astype(x.dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 3e4, 1e30], ids=str)
def test_no_further_from_float64_than_bfloat16(
    bits: int, size: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both products, for rows of any magnitude, one of them zero, one with a channel a thousand times as large."""
    rng = np.random.default_rng(seed)
    packed, *of_groups = mx.quantize(mx.array(0.05 * rng.standard_normal((OUT, IN)), mx.float32), bits=bits)
    parts = (packed, *(part.astype(mx.bfloat16) for part in of_groups))
    wide = mx.dequantize(packed, *(p.astype(mx.float32) for p in parts[1:]), bits=bits)
    truth = np.asarray(wide, np.float64)
    monkeypatch.setattr(mx, "quantized_matmul", _as_metal_does)
    for width, matrix, name in ((IN, truth.T, "matmul"), (OUT, truth, "matmul_t")):
        rows = size * rng.standard_normal((N, width)) * 2.0 ** rng.integers(-8, 8, (N, 1))
        rows[0], rows[1, 5] = 0, 1000 * size
        x = mx.array(rows, mx.float32).astype(mx.bfloat16)
        expected = np.asarray(x.astype(mx.float32), np.float64) @ matrix
        errors = []
        for in_half in (False, True):
            block = QuantizedBlock(parts, Quantization(bits, 64, "affine"), in_half)
            actual = getattr(block, name)(x)
            assert actual.dtype == mx.bfloat16
            distance = np.abs(np.asarray(actual.astype(mx.float32), np.float64) - expected).max(axis=1)
            errors.append(distance / np.maximum(np.abs(expected).max(axis=1), 1e-60))
        assert (errors[1] <= 2.0**-7).all(), f"seed {seed}"
        assert errors[1].mean() <= 1.1 * errors[0].mean(), (errors, f"seed {seed}")
        wider = x.astype(mx.float32)  # not narrowed
        assert getattr(block, name)(wider).dtype == mx.float32


def test_values_that_are_not_finite_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "quantized_matmul", _as_metal_does)
    parts = mx.quantize(mx.ones((OUT, IN)), bits=4)
    block = QuantizedBlock(tuple(parts), Quantization(4, 64, "affine"), True)
    for wrong in (float("inf"), float("nan")):
        x = mx.ones((2, IN), mx.bfloat16)
        x[1, 3] = wrong
        finite = np.isfinite(np.asarray(block.matmul(x).astype(mx.float32)))
        assert finite[0].all() and not finite[1].any()


def test_gradients_are_no_further_from_float64(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All gradients of a model as one vector; float32 replaces float64, since 16-bit errors are far larger."""
    config, quantization = packed_config("qwen3"), {"group_size": 32, "bits": 4}
    folder = write_model(tmp_path / "model", config, seed=seed, quantization=quantization, dtype=mx.bfloat16)
    monkeypatch.setattr(mx, "quantized_matmul", _as_metal_does)

    def grads(dtype: str, in_half: bool) -> dict[str, mx.array]:
        model = mebp_mlx.open_model(folder, dtype, "packed")
        model.half_products = in_half
        lora = mebp_mlx.init_lora(model, rank=2)
        randomize_lora(lora, seed)
        return mebp_mlx.loss_and_grads(model, lora, *random_batch(seed, 2, 40, model.spec.V))[1]

    truth = grads("float32", False)
    plain, half = (rms_error(grads("bfloat16", in_half), truth) for in_half in (False, True))
    assert half <= 1.2 * plain and half > 0, f"{half} and {plain}, seed {seed}"
