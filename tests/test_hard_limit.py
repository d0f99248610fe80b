"""A step of real shapes under an operating-system limit on anonymous memory."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from bench.hard_limit import run_child
from mebp_mlx.testing.synth import write_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is Linux's")

# Reserved memory, which is more than the footprint: the BLAS's buffers and the threads' stacks are in it.
LIMITS_MB = {"qwen2.5-0.5b": 300, "gemma3-1b": 300}


@pytest.mark.parametrize("shape", LIMITS_MB)
def test_a_step_stays_under_the_limit(tmp_path: Path, shape: str) -> None:
    folder = write_model(shape, tmp_path / "model", layers=1, sparse=True)
    found = run_child(folder, LIMITS_MB[shape], timeout_s=120)
    assert "error" not in found, found
    # All weights are zero, so every token is as likely as any other.
    vocabulary = {"qwen2.5-0.5b": 151_936, "gemma3-1b": 262_144}[shape]
    assert abs(found["loss"] - math.log(vocabulary)) <= 1e-3
    assert found["peak_mb"] <= LIMITS_MB[shape]


def test_the_limit_bites(tmp_path: Path) -> None:
    folder = write_model("qwen2.5-0.5b", tmp_path / "model", layers=1, sparse=True)
    assert "error" in run_child(folder, 60, timeout_s=120)
