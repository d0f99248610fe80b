"""Blocks with a mixture of experts instead of an MLP (ops/moe.py), for any token mixer.

d = sum_j expert_c[j](h2, s_j);   c, s = the experts of a token and their weights, of logits = Wr h2
"""

from __future__ import annotations

import mlx.core as mx

from ..ops.gated_mlp import CLIPPED
from ..ops.moe import Moe, Needs
from .base import value
from .lfm2 import Lfm2Block
from .llama import LlamaBlock, PreNormBlock


class MoeBlock(PreNormBlock):
    always = frozenset({"x", "c"})  # the backward pass visits the same experts as the forward pass

    logits = value(lambda b, h2: b.linear("router", h2))
    c = value(lambda b, logits: b.mixture.choose(logits))
    d = value(lambda b, h2, logits, c: b.mixture(h2, logits, c, b.position))

    @property
    def mixture(self) -> Moe:
        """The mixture, shared by the block's tiles."""
        assert self.run.moe is not None
        return self.run.moe

    def mlp_backward(self, source: str, dy: mx.array, need_dx: bool) -> mx.array | None:
        """dL/dh2, or None."""
        x, logits, c = self.h2, self.logits, self.c
        self.drop(*self.names)
        need_dr = need_dx or self.trains("router")
        dx, dr = self.mixture.backward(x, logits, c, dy, self.position, Needs(need_dx, need_dr))
        if dr is None:
            return None
        through_router = self.run.linear["router"].backward(x, dr, self.position, need_dx)
        if dx is None or through_router is None:
            return None
        return self.evaluated((dx + through_router).astype(x.dtype))


class LlamaMoeBlock(MoeBlock, LlamaBlock):
    """The block of qwen3_moe, olmoe, and LFM2-MoE's layers with attention."""


class GptOssBlock(LlamaMoeBlock):
    gate = CLIPPED


class Lfm2MoeBlock(MoeBlock, Lfm2Block):
    """LFM2-MoE's short convolution block."""

    always = MoeBlock.always | Lfm2Block.always
