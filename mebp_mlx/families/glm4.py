"""GLM-4's decoder block: Gemma 3's order of norms, under other names, with silu (families/gemma3.py).

x1 = x + norm(Wo attention(Wq h, Wk h, Wv h)),  h = norm(x);   y = x1 + norm(mlp(norm(x1)))
"""

from __future__ import annotations

from ..ops.gated_mlp import SILU
from .gemma3 import Gemma3Block


class Glm4Block(Gemma3Block):
    gate = SILU
