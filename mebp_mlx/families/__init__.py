"""One file a family: its decoder block as equations, the backward beside them."""

from __future__ import annotations

from ..model.config import ModelSpec
from .base import Block
from .gemma3 import Gemma3Block
from .glm4 import Glm4Block
from .llama import LlamaBlock
from .olmo2 import Olmo2Block

_BLOCKS: dict[str, type[Block]] = {
    "llama": LlamaBlock,
    "gemma3": Gemma3Block,
    "glm4": Glm4Block,
    "olmo2": Olmo2Block,
}


def block_class(spec: ModelSpec) -> type[Block]:
    """The block of a model's family."""
    return _BLOCKS[spec.block]
