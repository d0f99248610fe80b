"""Attention forward with its log-sum-exp, and backward from it: three kernels, no scores in memory.

    s = scale q k^T,  l = log sum exp(s),  p = exp(s - l),  o = p v              attention_forward: o, l
    delta = sum(do o),  ds = p (do v^T - delta),  dq = scale ds k                attention_dq: dq, delta
    dv = p^T do,  dk = scale ds^T q,  over the heads of a key head               attention_dkv: dk, dv

as in FlashAttention-2 (Dao 2023), but dq has its own kernel, so that no sum is atomic. Query i is at key `offset + i`
and sees the keys up to its own, or only the last `window` of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from . import selfcheck
from .metal import Source

NAMES = ("attention_forward", "attention_dq", "attention_dkv")
HEAD_DIMS = (64, 80, 96, 128, 256)
_PLACE = ("place", "scale")
FORWARD = Source(NAMES[0], ("q", "k", "v", *_PLACE), ("o", "lse"), "attention")
DQ = Source(NAMES[1], ("q", "k", "v", "o", "d_o", "lse", *_PLACE), ("dq", "delta"), "attention")
DKV = Source(NAMES[2], ("q", "k", "v", "d_o", "lse", "delta", *_PLACE), ("dk", "dv"), "attention")

# The shortest rows (keys that a query sees) for which the kernels are used; shorter rows use MLX's own attention in
# blocks of queries. Counted, not measured: no Mac has timed them. Each comment gives the share of the peak of four GPUs
# above which the backward beats MLX's path, by the count of `python -m bench kernels --tokens T`. Chosen is the lowest
# power of two where it is at most 22 %. That untuned kernels of this kind may reach roughly 18 to 25 % of a GPU's peak
# is an estimate inferred from published ratios, not a measurement.
LEAST_KEYS = {
    64: 8192,  # 19 to 22 % (14 heads, 2 key heads); at 4,096 22 to 26 %
    80: 4096,  # 18 to 21 % (32 heads, 8 key heads); at 1,024 26 % on an M2
    96: 4096,  # 11 to 13 % (32 heads, 32 key heads); MLX's forward is not fused
    128: 16384,  # 19 to 22 % (16 heads, 2 key heads); at 8,192 26 to 30 %
    256: 16384,  # 17 to 20 % (8 heads, 4 key heads); at 8,192 26 to 30 %; MLX's forward is not fused
}
_WIDE_ITEMS = 2  # float32: rows must be this much longer; tiles hold half the rows, and MLX's products are as fast
MLX_FUSED = (64, 80, 128)  # head dims whose forward MLX fuses on Metal, without a log-sum-exp
_is_assumed = False


@dataclass(frozen=True)
class Tiling:
    """rows: owned by a threadgroup; columns: of a tile; split: simdgroups that share eight rows and divide D; held:
    whether own rows stay in registers.
    """

    rows: int
    columns: int
    split: int
    held: bool

    @property
    def threads(self) -> int:
        return 4 * self.rows * self.split

    def threadgroup_bytes(self, name: str, head_dim: int, item_bytes: int) -> int:
        """Bytes of threadgroup memory: two tiles, log-sum-exp and delta, and scores that simdgroups exchange."""
        is_dkv = name == NAMES[2]
        tiles = 2 * self.columns * (head_dim * item_bytes + 16) + (8 * self.columns if is_dkv else 0)
        exchanged = 4 * self.rows * (self.columns + 4) if self.split > 1 else 4
        return tiles + (2 if is_dkv else 1) * exchanged


def tiling(name: str, head_dim: int, item_bytes: int) -> Tiling:
    """A kernel's tiles: at most 22 KB, and by bench/kernels.py's count at most 100 registers a thread in 16 bits."""
    is_wide, is_dkv = item_bytes > 2, name == NAMES[2]
    held = head_dim * item_bytes <= 256
    if head_dim > 128:
        return Tiling(16, 8 if is_wide else 16, 2, held)
    columns = 16 if is_wide or head_dim > 96 or (is_dkv and head_dim > 64) else 32
    return Tiling(32, columns, 2 if is_dkv and head_dim > 96 else 1, held)


def operations(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], item_bytes: int, place: tuple) -> float:
    """Multiplications and additions of a kernel's whole tiles. shapes: of q and k; place: (offset, window, ...)."""
    (B, H, Tq, D), (_, _, Tk, _) = shapes
    products = {NAMES[0]: 2, NAMES[1]: 3, NAMES[2]: 4}[name]
    return 2.0 * D * products * B * H * tile_pairs(name, tiling(name, D, item_bytes), (Tq, Tk), place)


def tile_pairs(name: str, tiles: Tiling, lengths: tuple[int, int], place: tuple) -> int:
    """Pairs of a query and a key in the tiles that a kernel visits for one head. lengths: queries and keys."""
    (Tq, Tk), offset, window = lengths, place[0], place[1]
    total = 0
    first, end = place[2:4] if name == NAMES[2] else (0, Tq)
    for start in range(first, end, tiles.rows):
        last = min(end, start + tiles.rows)
        if name == NAMES[2]:
            low, high = max(0, start - offset), min(Tq, last - 1 + window - offset) if window else Tq
        else:
            low, high = max(0, offset + start - window + 1) if window else 0, min(Tk, offset + last)
        low -= low % tiles.columns
        total += tiles.rows * max(0, -(-(high - low) // tiles.columns)) * tiles.columns
    return total


def is_served(dtype: mx.Dtype, head_dim: int, n_keys: int) -> bool:
    """Whether rows of n_keys reach the minimum length of LEAST_KEYS."""
    return n_keys >= least_keys(dtype, head_dim)


def least_keys(dtype: mx.Dtype, head_dim: int) -> float:
    """The shortest row that the kernels support; infinity for an unsupported head_dim or dtype."""
    if head_dim not in LEAST_KEYS or dtype not in selfcheck.DTYPES:
        return float("inf")
    return LEAST_KEYS[head_dim] * (_WIDE_ITEMS if dtype == mx.float32 else 1)


def serves(dtype: mx.Dtype, head_dim: int, n_keys: int) -> bool:
    """Whether to use the kernels for rows of n_keys: long enough, on Metal, and every kernel passed its check."""
    if not is_served(dtype, head_dim, n_keys):
        return False
    return _is_assumed or all(selfcheck.uses_metal(name, dtype, head_dim) for name in NAMES)


@contextlib.contextmanager
def assumed() -> Iterator[None]:
    """Builds graphs as if the kernels were available: for counting; without Metal, they cannot be evaluated."""
    global _is_assumed
    before, _is_assumed = _is_assumed, True
    try:
        yield
    finally:
        _is_assumed = before


def attention_forward(
    q: mx.array, k: mx.array, v: mx.array, scale: float, offset: int, window: int | None, impl: str | None = None
) -> tuple[mx.array, mx.array]:
    """(o [B, Tq, H, D] in q's dtype, log-sum-exp float32 [B, H, Tq]).

    q [B, H, Tq, D], k, v [B, K, Tk, D], float32, float16 or bfloat16; D in HEAD_DIMS. A query that sees nothing has o =
    0 and log-sum-exp -inf.
    """
    result: tuple[mx.array, mx.array] = _run(NAMES[0], (q, k, v, scale, offset, window), impl)
    return result


def attention_dq(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    saved: tuple[mx.array, mx.array],
    d_o: mx.array,
    place: tuple[float, int, int | None],
    impl: str | None = None,
) -> tuple[mx.array, mx.array]:
    """(dq in q's shape and dtype, delta float32 [B, H, Tq]) from d_o = dL/do [B, Tq, H, D].

    saved: the forward's (o, log-sum-exp); place: (scale, offset, window).
    """
    result: tuple[mx.array, mx.array] = _run(NAMES[1], (q, k, v, saved[0], d_o, saved[1], *place), impl)
    return result


def attention_dkv(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    d_o: mx.array,
    rows: tuple[mx.array, mx.array],
    place: tuple[float, int, int | None, int, int],
    impl: str | None = None,
) -> tuple[mx.array, mx.array]:
    """(dk, dv) float32 [B, K, high - low, D]: these queries' part of the gradients of the keys [low, high).

    rows: log-sum-exp and delta; place: (scale, offset, window, low, high).
    """
    result: tuple[mx.array, mx.array] = _run(NAMES[2], (q, k, v, d_o, *rows, *place), impl)
    return result


def _run(name: str, arguments: tuple, impl: str | None) -> Any:
    q = arguments[0]
    return selfcheck.run(name, arguments, impl or ("metal" if _is_assumed else None), q.dtype, q.shape[3])


def _call(
    source: Source, inputs: list[mx.array], place: tuple, heads: tuple[int, int], outputs: dict
) -> list[mx.array]:
    """A kernel's outputs. place: scale, then integers; heads: the grid's second and third sizes (rows, heads)."""
    scale, *integers = place
    dtype, head_dim = inputs[0].dtype, inputs[0].shape[3]
    tiles = tiling(source.name, head_dim, dtype.size)
    how = {"D": head_dim, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "SPLIT": tiles.split, "HELD": tiles.held}
    dtypes = [dtype if name in ("o", "dq") else mx.float32 for name in outputs]
    try:
        return source(
            [*inputs, mx.array([n or 0 for n in integers], mx.int32), mx.array(scale, mx.float32)],
            [("scalar", dtype), *how.items()],
            grid=(tiles.threads, -(-heads[0] // tiles.rows), heads[1]),
            threadgroup=(tiles.threads, 1, 1),
            output_shapes=list(outputs.values()),
            output_dtypes=dtypes,
        )
    except RuntimeError:  # without Metal, MLX builds such a node only in a graph that is exported
        if not _is_assumed:
            raise
        return [mx.zeros(shape, dtype) for shape, dtype in zip(outputs.values(), dtypes, strict=True)]


def _forward_metal(
    q: mx.array, k: mx.array, v: mx.array, scale: float, offset: int, window: int | None
) -> tuple[mx.array, mx.array]:
    B, H, T, D = q.shape
    shapes = {"o": (B, T, H, D), "lse": (B, H, T)}
    o, lse = _call(FORWARD, [q, k, v], (scale, offset, window), (T, B * H), shapes)
    return o, lse


def _dq_metal(q: mx.array, *rest: Any) -> tuple[mx.array, mx.array]:
    B, H, T, _ = q.shape
    shapes = {"dq": q.shape, "delta": (B, H, T)}
    dq, delta = _call(DQ, [q, *rest[:5]], rest[5:], (T, B * H), shapes)
    return dq, delta


def _dkv_metal(q: mx.array, *rest: Any) -> tuple[mx.array, mx.array]:
    B, K, _, D = rest[0].shape
    low, high = rest[-2:]
    shapes = dict.fromkeys(("dk", "dv"), (B, K, high - low, D))
    dk, dv = _call(DKV, [q, *rest[:5]], rest[5:], (high - low, B * K), shapes)
    return dk, dv


# ----------------------------------------------------------------------------------------------- references


def _scores(q: mx.array, k: mx.array, scale: float, offset: int, window: int | None) -> tuple[mx.array, mx.array]:
    """Scores float32 [B, K, H / K, Tq, Tk], and the mask of visible pairs [Tq, Tk]."""
    wide = _grouped(q, k.shape[1]).astype(mx.float32) @ k.astype(mx.float32).swapaxes(-1, -2)[:, :, None]
    return scale * wide, visible(q.shape[2], k.shape[2], offset, window)


def visible(n_queries: int, n_keys: int, offset: int, window: int | None) -> mx.array:
    """Which keys each query sees, bool [n_queries, n_keys]. offset: the first query's key; window: None shows all."""
    i, j = mx.arange(offset, offset + n_queries)[:, None], mx.arange(n_keys)[None]
    return (j <= i) & (j > i - window) if window else j <= i


def _grouped(x: mx.array, n_key_heads: int) -> mx.array:
    """[B, H, Tq, ...] as [B, K, H / K, Tq, ...]."""
    return x.reshape(x.shape[0], n_key_heads, -1, *x.shape[2:])


def _by_head(x: mx.array, n_key_heads: int) -> mx.array:
    """[B, Tq, H, D] as float32 [B, K, H / K, Tq, D]."""
    return _grouped(x.swapaxes(1, 2), n_key_heads).astype(mx.float32)


def forward_reference(
    q: mx.array, k: mx.array, v: mx.array, scale: float, offset: int, window: int | None
) -> tuple[mx.array, mx.array]:
    """The same in MLX's own operations, with all scores, in float32."""
    s, seen = _scores(q, k, scale, offset, window)
    s = mx.where(seen, s, -mx.inf)
    top = s.max(axis=-1, keepdims=True)
    weights = mx.exp(s - mx.where(top == -mx.inf, 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    o = (weights @ v.astype(mx.float32)[:, :, None]) / mx.where(total > 0, total, 1)
    lse = (top + mx.log(total))[..., 0]
    return o.reshape(q.shape).swapaxes(1, 2).astype(q.dtype), lse.reshape(q.shape[:3])


def _differences(
    q: mx.array, k: mx.array, v: mx.array, d_o: mx.array, lse: mx.array, delta: mx.array, place: tuple
) -> tuple[mx.array, mx.array]:
    """p and scale ds, float32 [B, K, H / K, Tq, Tk]."""
    K = k.shape[1]
    s, seen = _scores(q, k, *place)
    p = mx.where(seen, mx.exp(mx.where(seen, s - _grouped(lse, K)[..., None], 0)), 0)
    dp = _by_head(d_o, K) @ v.astype(mx.float32).swapaxes(-1, -2)[:, :, None]
    return p, place[0] * p * (dp - _grouped(delta, K)[..., None])


def _delta(o: mx.array, d_o: mx.array) -> mx.array:
    """float32 [B, H, Tq]."""
    return (d_o.astype(mx.float32) * o.astype(mx.float32)).sum(axis=-1).swapaxes(1, 2)


def dq_reference(
    q: mx.array, k: mx.array, v: mx.array, o: mx.array, d_o: mx.array, lse: mx.array, *place: Any
) -> tuple[mx.array, mx.array]:
    """The same in MLX's own operations."""
    delta = _delta(o, d_o)
    _, ds = _differences(q, k, v, d_o, lse, delta, place)
    return (ds @ k.astype(mx.float32)[:, :, None]).reshape(q.shape).astype(q.dtype), delta


def dkv_reference(
    q: mx.array, k: mx.array, v: mx.array, d_o: mx.array, lse: mx.array, delta: mx.array, *place: Any
) -> tuple[mx.array, mx.array]:
    """The same in MLX's own operations."""
    K, (low, high) = k.shape[1], place[3:]
    p, ds = _differences(q, k, v, d_o, lse, delta, place[:3])
    dk = (ds.swapaxes(-1, -2) @ _grouped(q, K).astype(mx.float32)).sum(axis=2)
    dv = (p.swapaxes(-1, -2) @ _by_head(d_o, K)).sum(axis=2)
    return dk[:, :, low:high], dv[:, :, low:high]


# ----------------------------------------------------------------------------------------------- samples


def _sample(dtype: mx.Dtype, head_dim: int, T: int) -> tuple[list[mx.array], tuple[float, int, int]]:
    """q, k, v, o, d_o, lse of a tile of queries behind keys before it, grouped heads, a window, ragged ends."""
    Tk, offset, window = T + T // 2, T // 2, max(1, T * 2 // 3)
    keys = mx.random.split(mx.random.key(13), 4)
    shapes = [(1, 4, T, head_dim), *[(1, 2, Tk, head_dim)] * 2, (1, T, 4, head_dim)]
    q, k, v, d_o = (mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys, strict=True))
    place = (head_dim**-0.5, offset, window)
    with mx.stream(mx.cpu):
        o, lse = forward_reference(q, k, v, *place)
    return [q, k, v, o, d_o, lse], place


def forward_sample(dtype: mx.Dtype, head_dim: int, T: int = 45, **_: int) -> tuple:
    """Arguments for the first-use check and for timing."""
    (q, k, v, *_rest), place = _sample(dtype, head_dim, T)
    return q, k, v, *place


def dq_sample(dtype: mx.Dtype, head_dim: int, T: int = 45, **_: int) -> tuple:
    """Arguments for the first-use check and for timing."""
    arrays, place = _sample(dtype, head_dim, T)
    return *arrays, *place


def dkv_sample(dtype: mx.Dtype, head_dim: int, T: int = 45, **_: int) -> tuple:
    """Arguments for the first-use check and for timing: keys from 4 on, 63 of them."""
    (q, k, v, o, d_o, lse), place = _sample(dtype, head_dim, T)
    return q, k, v, d_o, lse, _delta(o, d_o), *place, 4, k.shape[2]


selfcheck.register(NAMES[0], _forward_metal, forward_reference, forward_sample, HEAD_DIMS, "head dim")
selfcheck.register(NAMES[1], _dq_metal, dq_reference, dq_sample, HEAD_DIMS, "head dim")
selfcheck.register(NAMES[2], _dkv_metal, dkv_reference, dkv_sample, HEAD_DIMS, "head dim")
