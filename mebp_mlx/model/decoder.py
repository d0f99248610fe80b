"""A decoder block as a short tuple of stages over named values.

    x -> h -> q,k,v -> a -> o -> x1 -> h2 -> (g,u -> m) -> d -> y

A stage is *glue* (a pure function, differentiated by mx.vjp), *attention*, a *projection*
(frozen matrix + LoRA pair), or the *mlp*: three projections and the activation, taken
together because they run over blocks of the inner width F. Which values are kept for the backward pass and
which are recomputed is the engine's business; a stage only says what its backward reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .spec import ModelSpec

Norms = dict[str, mx.array]
INPUT, OUTPUT = "x", "y"


@dataclass(frozen=True)
class Stage:
    """One step of a block.

    name: the projection's short name, or the glue's; inputs, output: value names;
    needs: the inputs whose values the backward reads (a projection reads its own only for
    the gradients of its LoRA pair); run(norms, *inputs) -> output for glue, and the mlp's
    activation (g, u) -> m; vjp(norms, values, cotangent) -> one cotangent per input, from the
    `needs` values alone; linears: short names of its projections; inner: values inside the
    stage, in blocks, that its backward reads and that can be saved.
    """

    name: str
    kind: str  # "glue" | "attention" | "projection"
    inputs: tuple[str, ...]
    output: str
    needs: tuple[str, ...]
    run: Callable[..., mx.array] | None = None
    vjp: Callable[[Norms, dict[str, mx.array], mx.array], tuple[mx.array, ...]] | None = None
    linears: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()


def block_stages(spec: ModelSpec) -> tuple[Stage, ...]:
    """The stages of every block of this architecture, in forward order."""
    activation = gelu_gate if spec.gemma else silu_gate
    return (
        _norm(spec, "attn_norm", "x", "input_layernorm", "h"),
        _projection("q", "h"),
        _projection("k", "h"),
        _projection("v", "h"),
        Stage("attention", "attention", ("q", "k", "v"), "a", ("q", "k", "v")),
        _projection("o", "a"),
        _residual(spec, "attn_residual", "x", "o", "post_attention_layernorm", "x1"),
        _norm(spec, "mlp_norm", "x1", "pre_feedforward_layernorm" if spec.gemma else "post_attention_layernorm", "h2"),
        Stage("mlp", "mlp", ("h2",), "d", ("h2",), activation, linears=("gate", "up", "down"), inner=("g", "u")),
        _residual(spec, "mlp_residual", "x1", "d", "post_feedforward_layernorm", OUTPUT),
    )


def segments(stages: tuple[Stage, ...]) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """The stages before and after attention: all but attention work on any range of positions by itself."""
    at = next(i for i, stage in enumerate(stages) if stage.kind == "attention")
    return stages[:at], stages[at + 1 :]


def value_width(spec: ModelSpec, name: str) -> int:
    """Entries per token of a named value."""
    attention = spec.H * spec.head_dim
    wide = {"q": attention, "a": attention, "g": spec.F, "u": spec.F}
    wide |= dict.fromkeys("kv", spec.K * spec.head_dim)
    return wide.get(name, spec.D)


def silu_gate(g: mx.array, u: mx.array) -> mx.array:
    return g * mx.sigmoid(g) * u


def gelu_gate(g: mx.array, u: mx.array) -> mx.array:
    """gelu's tanh approximation, as gemma uses it."""
    return 0.5 * g * (1 + mx.tanh(0.7978845608028654 * (g + 0.044715 * g**3))) * u


def _projection(name: str, source: str) -> Stage:
    return Stage(name, "projection", (source,), name, (source,), linears=(name,))


def _glue(name: str, inputs: tuple[str, ...], output: str, run: Callable[..., mx.array]) -> Stage:
    def vjp(norms: Norms, values: dict[str, mx.array], cotangent: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.vjp(lambda *xs: run(norms, *xs), [values[i] for i in inputs], [cotangent])[1])

    return Stage(name, "glue", inputs, output, inputs, run, vjp)


def _norm(spec: ModelSpec, name: str, source: str, weight: str, output: str) -> Stage:
    return _glue(name, (source,), output, lambda norms, x: mx.fast.rms_norm(x, norms[weight], spec.norm_eps))


def _residual(spec: ModelSpec, name: str, stream: str, branch: str, weight: str, output: str) -> Stage:
    """stream + branch; gemma norms the branch first."""
    if not spec.gemma:
        return Stage(
            name, "glue", (stream, branch), output, (), lambda norms, x, o: x + o, lambda norms, values, g: (g, g)
        )
    branch_norm = _norm(spec, name, branch, weight, output)
    assert branch_norm.run is not None and branch_norm.vjp is not None
    run, branch_vjp = branch_norm.run, branch_norm.vjp
    return Stage(
        name,
        "glue",
        (stream, branch),
        output,
        (branch,),
        lambda norms, x, o: x + run(norms, o),
        lambda norms, values, g: (g, *branch_vjp(norms, values, g)),
    )
