"""Where the bundled model and data lie. `python -m bench.bundled` makes them; see README.md and NOTICE."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parent / "model"
DATA_DIR = Path(__file__).resolve().parent / "data"
SAMPLE_PROMPT = "What does subprocess.CalledProcessError.stdout() do?"  # a row of data/valid.jsonl
