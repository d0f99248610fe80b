"""The BLAS that MLX uses, reported and overridden; bit-equal products; the allocator; the machine's description."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mebp_mlx.system.machine import Blas, load_blas, machine

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a BLAS is loaded on Linux alone")
with_mkl = pytest.mark.skipif(load_blas().name != "MKL", reason="needs PyPI's mkl")


def child(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MEBP_BLAS", "MKL_", "KMP_"))}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


def answer(code: str, *arguments: str, **environment: str) -> Any:
    done = child(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


WHICH = "import json, mebp_mlx.system.machine as p; b = p.load_blas(); print(json.dumps([b.name, b.path, b.note]))"

# A process that has not searched for a BLAS yet; the test sets what it finds.
UNDECIDED = """
import json, os, sys, warnings
import mebp_mlx.system.machine as platform
del os.environ["MEBP_BLAS"]
platform._blas = None
platform._mkl_files = lambda: sys.argv[1:]
platform._openblas_files = lambda: []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [platform.load_blas() for _ in range(3)]
assert found[0] is found[1] is found[2]
print(json.dumps([found[0].name, found[0].note, [str(w.message) for w in caught]]))
"""


def test_importing_the_package_stays_light() -> None:
    loaded = answer("import json, sys, mebp_mlx; print(json.dumps(list(sys.modules)))")
    assert not {"numpy", "mlx.core", "transformers", "importlib.metadata"} & set(loaded)


def test_it_is_loaded_once() -> None:
    assert load_blas() is load_blas()
    assert isinstance(load_blas(), Blas)


@linux
def test_off_silently_keeps_the_wheels_blas() -> None:
    done = child(WHICH, MEBP_BLAS="off")
    name, path, note = json.loads(done.stdout)
    assert (name, path) == ("reference", None)
    assert "MEBP_BLAS=off" in note
    assert done.stderr == ""


@linux
@pytest.mark.parametrize("library", ["/nowhere/libblas.so", "libc.so.6", __file__])
def test_an_invalid_named_library_is_a_user_error(library: str) -> None:
    done = child(WHICH, MEBP_BLAS=library)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mebp_mlx.errors.UserError: ")
    assert f"MEBP_BLAS={library}" in last


@linux
def test_a_missing_blas_warns_once_and_names_the_remedy() -> None:
    name, note, warned = answer(UNDECIDED, MEBP_BLAS="off")
    assert name == "reference"
    assert warned == [note]
    assert 'pip install "mebp_mlx[cpu]"' in note and "libopenblas0" in note


@linux
def test_a_broken_library_is_skipped_and_named(tmp_path: Path) -> None:
    broken = tmp_path / "libmkl_rt.so.9"
    broken.write_text("no library")
    name, _, warned = answer(UNDECIDED, str(broken), MEBP_BLAS="off")
    assert name == "reference"
    assert len(warned) == 1 and str(broken) in warned[0]


@linux
def test_importing_mlx_first_is_reported(tmp_path: Path) -> None:
    done = child("import mlx.core\n" + WHICH)
    name, _, note = json.loads(done.stdout)
    assert name == "reference"
    assert "import mebp_mlx first" in note
    assert done.stderr.count("import mebp_mlx first") == 1


@with_mkl
def test_mlx_multiplies_with_the_loaded_library() -> None:
    product = "import mebp_mlx, mlx.core as mx; mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))"
    assert "SGEMM" in child(product, MKL_VERBOSE="1").stdout
    assert "SGEMM" not in child(product, MKL_VERBOSE="1", MEBP_BLAS="off").stdout


@with_mkl
def test_the_users_mkl_settings_are_kept() -> None:
    show = "import json, os, mebp_mlx; print(json.dumps([os.environ['MKL_CBWR'], os.environ['KMP_BLOCKTIME']]))"
    assert answer(show, MKL_CBWR="COMPATIBLE", KMP_BLOCKTIME="7") == ["COMPATIBLE", "7"]


PRODUCTS = """
import hashlib, json
import mebp_mlx, mlx.core as mx, numpy as np
rng = np.random.default_rng(5)

def at(values, shift):
    padded = mx.array(np.concatenate([np.zeros(shift, np.float32), values.ravel()]))
    return padded[shift:].reshape(values.shape)

digests = {}
for n, k, m in [(256, 96, 480), (1, 896, 151), (7, 333, 101), (64, 200, 8), (64, 8, 200), (33, 1, 5), (129, 257, 65)]:
    a, b = rng.standard_normal((n, k)).astype("f4"), rng.standard_normal((k, m)).astype("f4")
    for transposed in (False, True):
        found = set()
        for shift_a in (0, 1, 3, 8, 13):
            for shift_b in (0, 2, 5):
                right = at(b.T.copy(), shift_b).T if transposed else at(b, shift_b)
                found.add(hashlib.sha256(np.array(at(a, shift_a) @ right).tobytes()).hexdigest())
        digests[f"{n} {k} {m} {transposed}"] = sorted(found)
print(json.dumps(digests))
"""


@with_mkl
def test_products_are_bit_equal_wherever_operands_lie_and_for_any_number_of_threads() -> None:
    """Recomputed blocks and resumed runs have the same values at other addresses."""
    one, two = (answer(PRODUCTS, MKL_NUM_THREADS=n, MKL_DYNAMIC="FALSE") for n in "12")
    assert [case for case, actual in one.items() if len(actual) != 1] == []
    assert one == two


def test_the_machine_is_described_in_json() -> None:
    described = json.loads(json.dumps(machine()))
    assert set(described) == {
        "machine",
        "chip",
        "cores",
        "memory_bytes",
        "os",
        "python",
        "mlx",
        "mlx_lm",
        "numpy",
        "blas",
    }
    assert described["mlx"] == importlib.metadata.version("mlx")
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert 1 <= described["cores"] <= (os.cpu_count() or 1)
    assert described["memory_bytes"] > 100_000_000
    assert described["blas"].startswith(load_blas().name)


@linux
@pytest.mark.parametrize("how", ["-m", "import"])
def test_mlx_without_a_backend_is_reported_in_one_line(tmp_path: Path, how: str) -> None:
    (tmp_path / "mlx").mkdir()  # replaces the real package, and is as empty as PyPI's on Linux
    (tmp_path / "mlx" / "__init__.py").touch()
    command = ["-m", "mebp_mlx.train"] if how == "-m" else ["-c", "import mebp_mlx"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert 'pip install "mebp_mlx[cpu]"' in lines[-1] and "mebp_mlx[cuda]" in lines[-1]
    assert (done.returncode, len(lines)) == (2, 1) if how == "-m" else done.returncode == 1


@linux
def test_no_blas_is_needed_if_mlx_computes_on_cuda(tmp_path: Path) -> None:
    (tmp_path / "mlx" / "lib").mkdir(parents=True)
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info").mkdir()
    script = UNDECIDED.replace(
        "platform._blas = None", "platform._blas = None\nplatform._mlx_folders = lambda: [FOLDER]"
    )
    name, note, warned = answer(
        f"from pathlib import Path\nFOLDER = Path({str(tmp_path / 'mlx')!r})\n{script}", MEBP_BLAS="off"
    )
    assert name == "reference" and "GPU" in note and warned == []


def test_every_extra_installs_one_backend() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any(line.startswith("mlx[") for line in project["dependencies"])
    backends = {
        extra: [line for line in lines if line.startswith("mlx[")]
        for extra, lines in project["optional-dependencies"].items()
    }
    backends = {extra: lines for extra, lines in backends.items() if lines}
    assert backends == {
        "cpu": ["mlx[cpu]>=0.32; sys_platform == 'linux'"],
        "cuda": ["mlx[cuda13]>=0.32; sys_platform == 'linux'"],
    }
