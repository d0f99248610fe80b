"""Kernels are checked against their references: at first use, with MEBP_KERNELS, in the engine and the doctor."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.doctor import __main__ as doctor
from mebp_mlx.doctor import checks
from mebp_mlx.doctor import kernels as doctor_kernels
from mebp_mlx.errors import UserError
from mebp_mlx.kernels import linear_cross_entropy, metal, online_softmax, selfcheck
from mebp_mlx.kernels.online_softmax import SoftmaxState
from mebp_mlx.ops.plan import Plan
from mebp_mlx.testing.reference import largest_error
from mebp_mlx.testing.tiny import packed_config, random_batch, randomize_lora, write_model
from tests.emulated import SOURCES, running

pytestmark = pytest.mark.skipif(mx.metal.is_available(), reason="faults are planted into emulated kernels only")
KERNELS_WRONG = "Metal kernel linear_cross_entropy \\(bfloat16, groups of 32\\) is not used on .+: "


def _loss_arguments(seed: int) -> tuple:
    sample = selfcheck.KERNELS["linear_cross_entropy"].sample
    h, packed, scales, biases, targets, *_ = sample(mx.bfloat16, 32, T=3, V=300)
    return h, (packed, scales, biases), targets


def _call(seed: int) -> mx.array:
    return linear_cross_entropy(*_loss_arguments(seed), group_size=32)


def _reference(seed: int) -> mx.array:
    return linear_cross_entropy(*_loss_arguments(seed), group_size=32, impl="reference")


def _no_rescaling(text: str) -> str:
    return text.replace("sum *= metal::precise::exp(maximum - highest);", "")


def _does_not_compile(text: str) -> str:
    return text.replace("const uint row", "const uint_ row").replace("const int T", "const int_ T")


class _Calls:
    """Counts the runs of each kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.n: dict[str, int] = dict.fromkeys(SOURCES, 0)
        original = metal.Source.__call__

        def counted(source: metal.Source, *args: Any, **how: Any) -> list[mx.array]:
            self.n[source.name] += 1
            return original(source, *args, **how)

        monkeypatch.setattr(metal.Source, "__call__", counted)


def test_a_good_kernel_is_checked_once_and_used(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.delenv("MEBP_KERNELS", raising=False)
    calls = _Calls(monkeypatch)
    with running(pretend=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = [_call(seed) for _ in range(3)]
        mx.eval(actual)
    assert calls.n["linear_cross_entropy"] == 4  # the check and three calls
    np.testing.assert_allclose(np.asarray(actual[2]), np.asarray(_reference(seed)), rtol=2e-2)


@pytest.mark.parametrize(
    "change, reason",
    [(_no_rescaling, "output 0 is off by"), (_does_not_compile, ".*error:.*int_")],
    ids=["wrong", "compile"],
)
def test_a_bad_kernel_is_reported_once_and_replaced(
    change: Any, reason: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.delenv("MEBP_KERNELS", raising=False)
    with running(change=change, pretend=True), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        actual = [_call(seed) for _ in range(2)]
        mx.eval(actual)
    assert len(said) == 1
    with pytest.warns(UserWarning, match=KERNELS_WRONG + f"({reason}).*plain MLX operations are used instead"):
        warnings.warn_explicit(said[0].message, UserWarning, "x", 1)  # type: ignore[arg-type]
    assert all(np.array_equal(np.asarray(f), np.asarray(_reference(seed))) for f in actual)


def test_off_never_builds_a_kernel(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setenv("MEBP_KERNELS", "off")
    calls = _Calls(monkeypatch)
    with running(pretend=True):
        assert np.array_equal(np.asarray(_call(seed)), np.asarray(_reference(seed)))
    assert not any(calls.n.values())


def test_on_skips_the_check(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setenv("MEBP_KERNELS", "on")
    calls = _Calls(monkeypatch)
    with running(change=_no_rescaling, pretend=True):
        actual = _call(seed)
        mx.eval(actual)
    assert calls.n["linear_cross_entropy"] == 1
    assert not np.allclose(np.asarray(actual), np.asarray(_reference(seed)), rtol=2e-2)


def test_check_compares_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault needs more columns than the first-use sample has, so only this mode detects it."""
    monkeypatch.setenv("MEBP_KERNELS", "check")

    def only_long_rows(text: str) -> str:
        return text.replace("sum += weight;", "sum += c < 400 ? weight : 0.0f;")

    z = mx.random.normal((4, 700), key=mx.random.key(1))
    state, targets = SoftmaxState.start(4, 1, need_dh=False).softmax, mx.array([1, 2, 3, -100], mx.int32)
    expected = online_softmax(z, *state, targets, 0, impl="reference")
    with running(change=only_long_rows, pretend=True):
        with pytest.warns(UserWarning, match="online_softmax .float32. is not used"):
            actual = online_softmax(z, *state, targets, 0)
        assert np.array_equal(np.asarray(actual.total), np.asarray(expected.total))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = online_softmax(z, *state, targets, 0)
        assert np.array_equal(np.asarray(again.total), np.asarray(expected.total))


def test_an_unknown_mode_is_an_error_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEBP_KERNELS", "fast")
    with pytest.raises(UserError, match="MEBP_KERNELS=fast: must be off, on or check"):
        mebp_mlx.open_model(tmp_path)
    assert doctor.main([]) == 2
    assert capsys.readouterr().err.startswith("error: MEBP_KERNELS=fast")


@pytest.mark.parametrize("impl", ["fast", ""])
def test_an_unknown_impl_is_an_error(impl: str, seed: int) -> None:
    with pytest.raises(ValueError, match="impl="):
        linear_cross_entropy(*_loss_arguments(seed), group_size=32, impl=impl)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_uses_the_kernels(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Forward-only passes use the loss kernel on packed rows without logits; steps use the online softmax."""
    monkeypatch.delenv("MEBP_KERNELS", raising=False)
    folder = write_model(
        tmp_path / "m", packed_config("qwen2"), seed=seed, quantization={"group_size": 32, "bits": 4}, dtype=mx.bfloat16
    )
    model = mebp_mlx.open_model(folder, dtype, "packed")
    lora = mebp_mlx.init_lora(model, rank=2)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 2, 13, model.spec.V)
    plain_loss = mebp_mlx.loss(model, lora, tokens, targets).item()
    plain = mebp_mlx.loss_and_grads(model, lora, tokens, targets)
    calls = _Calls(monkeypatch)
    with running(pretend=True):
        loss = mebp_mlx.loss(model, lora, tokens, targets).item()
        assert calls.n["linear_cross_entropy"] == 2 and calls.n["online_softmax"] == 0  # the check, and one launch
        lazily = mebp_mlx.loss(model, lora, tokens, targets, plan=Plan("block")).item()
        assert calls.n["linear_cross_entropy"] == 2  # MLX's products are faster in grains that do not wait
        n_before = dict(calls.n)
        # numpy handles float32 logits on the CPU; the kernel handles the rest
        actual = mebp_mlx.loss_and_grads(model, lora, tokens, targets)
    used = calls.n["online_softmax"] - n_before["online_softmax"]
    assert (used > 0) == (dtype == "bfloat16")
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    assert abs(loss - plain_loss) <= tolerance * plain_loss, f"seed {seed}"
    assert abs(lazily - plain_loss) <= tolerance * plain_loss, f"seed {seed}"
    assert largest_error(actual[0].item(), actual[1], plain[0].item(), plain[1]) <= tolerance, f"seed {seed}"


def _doctor(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = doctor.main(list(argv))
    return code, capsys.readouterr().out


def test_doctor_works_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, table = _doctor(capsys)
    assert code == 0 and table.endswith("everything that applies to this machine works\n")
    code, text = _doctor(capsys, "--json")
    actual = json.loads(text)
    assert code == 0 and actual["ok"] is True and actual["machine"]["mlx"]
    groups = {row["group"] for row in actual["findings"]}
    assert groups == {"device", "memory", "BLAS", "meter", "files", "kernels"}
    states = {row["what"]: row["state"] for row in actual["findings"]}
    assert states["a deliberate spike"] == "ok" and states["online_softmax"] == "-"


@pytest.mark.parametrize("change, code", [(None, 0), (_no_rescaling, 1), (_does_not_compile, 1)])
def test_doctor_checks_every_kernel(
    change: Any, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "KERNEL_SIZES", {})
    monkeypatch.setattr(checks, "REPEATS", 1)
    with running(change=change, pretend=True):
        found_code, text = _doctor(capsys, "--json")
    rows = [row for row in json.loads(text)["findings"] if row["group"] == "kernels"]
    assert len(rows) == 3 + 9 + 9 and found_code == code
    bad = {row["what"].split()[0] for row in rows if row["state"] == "FAIL"}
    assert bad == (set() if code == 0 else set(SOURCES) if change is _does_not_compile else {"linear_cross_entropy"})
    assert all(row["figures"].get("metal_ms", 0) > 0 for row in rows if row["state"] == "ok")


@pytest.mark.parametrize("mode", ["", "off"])
def test_doctor_times_attention_both_ways(
    mode: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEBP_KERNELS", mode)
    monkeypatch.setattr(doctor_kernels, "SHAPES", ((2, 1, 64),))
    monkeypatch.setattr(doctor_kernels, "LENGTHS", (40,))
    monkeypatch.setattr(doctor_kernels, "TILE", 17)
    monkeypatch.setattr(doctor_kernels, "REPEATS", 1)
    monkeypatch.setattr(checks, "check_kernels", lambda every: iter(()))
    with running(pretend=True):
        code, text = _doctor(capsys, "--kernels", "--json")
    rows = json.loads(text)["findings"]
    assert code == 0 and len(rows) == (2 if not mode else 0)
    for row in rows:
        assert "kernels not used at this length" in row["detail"] and len(row["figures"]) == 6
        assert all(figure > 0 for name, figure in row["figures"].items() if name.endswith("_ms"))


def test_doctor_without_metal_names_the_bench_that_counts_attention(capsys: pytest.CaptureFixture[str]) -> None:
    code, table = _doctor(capsys, "--kernels")
    assert code == 0 and "python -m bench kernels counts" in table
