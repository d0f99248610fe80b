"""What a plan is made for: the model's shape, the batches, what is trained, and how."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.frozen import Model
from ..model.lora import Lora
from ..model.spec import ModelSpec
from .block import trained_projections


@dataclass(frozen=True)
class Job:
    """What a plan is made for.

    B, T: rows of a batch and positions of its longest row; n_eval_tokens: of the longest row that is only
    evaluated; trained: for each layer, the short names of the projections with a pair; lora_bytes: trainable
    parameters; state_bytes, parked_bytes: the optimizer's state in memory, and in a file; gathers: whether a
    step gathers gradients (clipping, several micro-batches); packed: whether products are made with packed
    weights; base_bytes: the process's footprint before the model is opened.
    """

    spec: ModelSpec
    B: int
    T: int
    trained: tuple[frozenset[str], ...]
    lora_bytes: int
    state_bytes: int = 0
    parked_bytes: int = 0
    rank: int = 8
    gathers: bool = False
    dropout: bool = False
    optimizer: str = "adam"
    engine: str = "mebp"
    item_bytes: int = 4
    packed: bool = False
    base_bytes: int = 0
    n_eval_tokens: int = 0

    @property
    def first_trained(self) -> int:
        """The lowest layer with a pair; their number without any."""
        return next((i for i, names in enumerate(self.trained) if names), self.spec.L)


def job_for(model: Model, lora: Lora, B: int, T: int, **more: object) -> Job:
    """The Job of training `lora` on batches [B, T]; `more`: further fields of Job."""
    spec = model.spec
    trained = tuple(trained_projections(lora, layer) for layer in spec.layers)
    n_bytes = sum(value.nbytes for value in lora.parameters().values())
    known = {"rank": lora.rank, "dropout": lora.dropout > 0, "item_bytes": model.dtype.size}
    known["packed"] = model.packed
    return Job(spec, B, T, trained, n_bytes, **{**known, **more})  # type: ignore[arg-type]
