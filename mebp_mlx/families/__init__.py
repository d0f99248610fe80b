"""One file per family: its decoder block as equations, with their backward."""

from __future__ import annotations

from .base import Block
from .gated_delta import GatedDeltaBlock
from .gemma3 import Gemma3Block
from .gemma4 import Gemma4Block, PlainBlock, PlainSharedBlock, SharedBlock
from .glm4 import Glm4Block
from .lfm2 import Lfm2Block
from .llama import LlamaBlock
from .moe import GptOssBlock, Lfm2MoeBlock, LlamaMoeBlock
from .olmo2 import Olmo2Block
from .qwen3_5 import Qwen35Block

# By block name, as in model/families.py.
BLOCKS: dict[str, type[Block]] = {
    "llama": LlamaBlock,
    "llama_moe": LlamaMoeBlock,
    "gpt_oss_moe": GptOssBlock,
    "gemma3": Gemma3Block,
    "gemma4": Gemma4Block,
    "gemma4_shared": SharedBlock,
    "gemma4_plain": PlainBlock,
    "gemma4_plain_shared": PlainSharedBlock,
    "glm4": Glm4Block,
    "olmo2": Olmo2Block,
    "lfm2": Lfm2Block,
    "lfm2_moe": Lfm2MoeBlock,
    "qwen3_5": Qwen35Block,
    "gated_delta": GatedDeltaBlock,
}
