"""Mixtures of experts, named in the rows of families.py: which layers have one, and how tokens are routed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import UserError
from .settings import Settings

ROUTER_PACKING = (8, 64)  # bits and group size of most packed routers, regardless of the other weights


@dataclass(frozen=True)
class Routing:
    """How the router's output gives a token's experts and their weights s (equations: ops/moe.py).

    n_chosen: experts of a token; score: "softmax", "sigmoid" or "softmax of the chosen"; normalizes: s / (sum s + eps);
    scale: multiplies s; packed_router: the router's module in a layer if affine-packed models pack it by
    ROUTER_PACKING, else None.
    """

    n_experts: int
    n_chosen: int
    score: str = "softmax"
    normalizes: bool = False
    eps: float = 0.0
    scale: float = 1.0
    packed_router: str | None = None

    def packs_router(self, name: str) -> bool:
        """Whether that module is a router with its own packing."""
        return self.packed_router is not None and name.endswith(f".{self.packed_router}")


@dataclass(frozen=True)
class Mixture:
    """router, experts: modules in a layer; apart: the module of one expert, if a checkpoint stores them separately;
    width: config key of an expert's inner width; has_experts(settings, layer): whether a layer has a mixture instead of
    an MLP.

    selection_bias: (module, config key that enables it) of the bias added to scores to choose experts;
    packs_router: whether mlx-lm packs the router by ROUTER_PACKING; router_bias: whether the router has a bias;
    n_experts: config key of the number of experts.
    """

    router: str
    experts: str
    apart: str
    width: str
    has_experts: Callable[[Settings, int], bool]
    score: str = "softmax"
    eps: float = 0.0
    selection_bias: tuple[str, str] | None = None
    packs_router: bool = False
    router_bias: bool = False
    n_experts: str = "num_experts"
    parts: dict[str, str] = field(default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})

    @property
    def keys(self) -> tuple[str, ...]:
        """The matrices that support LoRA, by their names in a layer."""
        return (self.router, *(f"{self.experts}.{part}" for part in self.parts.values()))

    def routing(self, settings: Settings) -> Routing:
        """Raises UserError if a token would choose more experts than exist."""
        n_experts, n_chosen = settings.integer(self.n_experts), settings.integer("num_experts_per_tok")
        if n_chosen > n_experts:
            raise UserError(
                f"{settings.where}: num_experts_per_tok={n_chosen} is more than {self.n_experts}={n_experts}"
            )
        scale = settings.number("routed_scaling_factor", 1.0)
        normalizes, packed = settings.flag("norm_topk_prob"), self.router if self.packs_router else None
        return Routing(n_experts, n_chosen, self.score, normalizes, self.eps, scale, packed)


def every_layer(settings: Settings, index: int) -> bool:
    """OLMoE's and gpt-oss's."""
    return True


def by_sparse_step(settings: Settings, index: int) -> bool:
    """Qwen3-MoE's: the last of every decoder_sparse_step layers, except mlp_only_layers."""
    dense = settings.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise UserError(f"{settings.where}: mlp_only_layers must be a list, found {str(dense)[:100]!r}")
    return index not in dense and (index + 1) % settings.integer("decoder_sparse_step", 1) == 0


def above_dense_layers(settings: Settings, index: int) -> bool:
    """LFM2-MoE's: all but the first num_dense_layers."""
    n_dense = settings.get("num_dense_layers", 0)
    return index >= (settings.integer("num_dense_layers") if n_dense else 0)
