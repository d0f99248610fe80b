"""One file a family: its decoder block as equations, the backward beside them."""

from __future__ import annotations

from ..model.config import ModelSpec
from .base import Block
from .gemma3 import Gemma3Block
from .llama import LlamaBlock


def block_class(spec: ModelSpec) -> type[Block]:
    """The block of a model's family."""
    return Gemma3Block if spec.gemma else LlamaBlock
