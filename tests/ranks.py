"""One process of a group in test_distributed.py: `python -m tests.ranks RUNS`, where RUNS is a JSON file.

RUNS: [[name, [argument of the command, ...]], ...]; {rank} and {budget} in an argument are replaced by this process's
values. One process does many runs, because its start takes seconds. Writes the exit code and the final parameters' hash
of every run into RUNS.RANK.json. In a run named "not finite", rank 1's third loss is not finite.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mebp_mlx import train
from mebp_mlx.engine.backprop import BackpropEngine
from mebp_mlx.errors import NonFiniteLoss
from mebp_mlx.system.group import Group


def main(path: Path) -> None:
    results: dict[str, Any] = {}
    own = {"rank": os.environ["MLX_RANK"], "budget": "10MB" if os.environ["MLX_RANK"] == "1" else "none"}
    rank, prepare, step = os.environ["MLX_RANK"], train.prepare_run, BackpropEngine.step

    def fail(self: BackpropEngine, batch: Any, **about: Any) -> float:
        if rank == "1" and about["step"] == 2 and len(batch.rows):
            raise NonFiniteLoss("loss is nan")
        return step(self, batch, **about)

    def prepare_and_look(config: Any, group: Group) -> Any:
        runs.append(prepare(config, group))
        return runs[-1]

    train.prepare_run = prepare_and_look  # type: ignore[attr-defined]
    for name, arguments in json.loads(path.read_text()):
        runs: list[Any] = []
        BackpropEngine.step = fail if name == "not finite" else step  # type: ignore[method-assign]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train.main([argument.format(**own) for argument in arguments])
        result: dict[str, Any] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        if runs and runs[0] is not None:
            digest = hashlib.sha256()
            for key, value in sorted(runs[0].lora.parameters().items()):
                digest.update(key.encode() + np.asarray(value).tobytes())
            deal = runs[0].deal
            result |= {"hash": digest.hexdigest(), "waited_s": deal.group.waited_s, "sent_bytes": deal.group.sent_bytes}
        results[name] = result
    path.with_suffix(f".{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
