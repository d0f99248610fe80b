"""Writes a model of a real shape with random weights, in mlx-lm's layout: `python -m bench.synth SHAPE DIR`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence

from bench import report
from mebp_mlx.errors import UserError
from mebp_mlx.testing.synth import DTYPES, SHAPES, layers_of, model_config, write_model


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.Parser("synth", __doc__)
    parser.add_argument("shape", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("folder", metavar="DIR", help="new or empty folder")
    parser.add_argument("--bits", type=int, default=4, help="2-8: affine quantization; 16: none (default 4)")
    parser.add_argument("--group-size", type=int, default=64, help="weights per scale (default 64)")
    parser.add_argument("--dtype", default="bfloat16", help=f"dtype of unquantized tensors: {', '.join(DTYPES)}")
    parser.add_argument("--layers", type=int, help="number of blocks (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true", help="headers and holes: zero weights that take no disk")
    options = parser.parse_args(argv)
    began_s = time.perf_counter()
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: at least 0")
    config = model_config(options.shape, options.layers)
    layout = {"bits": options.bits, "group_size": options.group_size, "dtype": options.dtype}
    folder = write_model(config, options.folder, **layout, seed=options.seed, sparse=options.sparse)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        print(f"{file}  {file.stat().st_size / 1e6:,.1f} MB")
    layers = layers_of(config)
    result = {
        "shape": options.shape,
        "bits": options.bits,
        "n_parameters": sum(math.prod(layer.shape) for layer in layers),
        "n_files": len(files),
        "n_bytes": sum(file.stat().st_size for file in files),
        "seconds": round(time.perf_counter() - began_s, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    report.run(main)
