"""A step of real shapes under an operating-system limit on anonymous memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mebp_mlx.testing.synth import model_config, write_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is Linux's")

# Reserved memory, which exceeds the footprint: it includes the BLAS's buffers and the threads' stacks.
LIMITS_MB = {"qwen2.5-0.5b": 300, "gemma3-1b": 300}


def run_case(folder: Path, limit_mb: int) -> dict[str, Any] | str:
    """Runs a step in its own process; returns its stderr if it fails."""
    command = [sys.executable, "-m", "bench.case", str(folder), "--steps", "0", "--limit-mb", str(limit_mb)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    return done.stderr if done.returncode else json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", LIMITS_MB)
def test_a_step_stays_under_the_limit(tmp_path: Path, shape: str) -> None:
    folder = write_model(model_config(shape, 1), tmp_path / "model", sparse=True)
    result = run_case(folder, LIMITS_MB[shape])
    assert isinstance(result, dict), result
    # All weights are zero, so all tokens are equally likely.
    vocabulary = {"qwen2.5-0.5b": 151_936, "gemma3-1b": 262_144}[shape]
    assert abs(result["first_loss"] - math.log(vocabulary)) <= 1e-3
    assert result["peak_mb"] <= LIMITS_MB[shape]


def test_the_limit_is_enforced(tmp_path: Path) -> None:
    folder = write_model(model_config("qwen2.5-0.5b", 1), tmp_path / "model", sparse=True)
    assert isinstance(run_case(folder, 60), str)
