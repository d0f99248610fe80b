"""A layer's input besides the residual stream: its columns of a second embedding, and a projection of the first.

    p = (norm(x0 Wi^T / sqrt(D)) + Ei[t] sqrt(P)) / sqrt(2)        x0: the first block's input;  i: the layer

(mlx-lm's gemma4_text.) All of it is frozen and depends only on the tokens t: p is a constant, without a backward.
It is computed per layer and tile, which reads the tile's rows of both embeddings again.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from .lora_linear import LoraLinear, Shared


class LayerInput:
    """p of one layer. index: of the layer."""

    def __init__(self, shared: Shared, index: int):
        context, inputs = shared.context, shared.context.model.spec.layer_inputs
        assert inputs is not None and context.tokens is not None
        self.model, self.tokens, self.inputs = context.model, context.tokens, inputs
        self.columns = (index * inputs.width, (index + 1) * inputs.width)
        own = replace(inputs.projection, first_row=self.columns[0], out_dims=inputs.width)
        self.projection, self.norm = LoraLinear(shared, "", own), self.model.norm(inputs.norm)

    def __call__(self, position: int, n_tokens: int) -> mx.array:
        """p [B, n_tokens, P] of the tokens from a position on, in the compute dtype."""
        spec, inputs, tokens = self.model.spec, self.inputs, self.tokens[:, position : position + n_tokens]
        projected = self.projection(self.model.embed(tokens), position) * spec.D**-0.5
        projected = mx.fast.rms_norm(projected, self.norm, spec.norm_eps)
        rows = self.model.gather(inputs.embedding, tokens.reshape(-1), self.columns)
        return (projected + rows.reshape(projected.shape) * inputs.width**0.5) * 2**-0.5
