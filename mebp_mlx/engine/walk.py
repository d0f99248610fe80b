"""One block's work as the engine goes about it (engine/block.py), on names and bytes alone.

Walks the operation lists that the engine carries out (engine/schedule.py) and adds up what is alive.
"""

from __future__ import annotations

from ..model.decoder import INPUT, OUTPUT, Stage, block_stages, segments, value_width
from ..model.spec import Layer
from . import ledger as cost
from .job import Job
from .ledger import Buffer, Ledger
from .plan import Plan
from .schedule import Op, backward_ops, forward_ops, needs_gradient

QKV = ("q", "k", "v")


def pair_bytes(job: Job, layer: Layer, short: str) -> int:
    """A projection's LoRA gradients, float32."""
    linear = layer.linears[short]
    return 4 * job.rank * (linear.in_dims + linear.out_dims)


class Walk:
    """One block's work on a batch, on names and bytes alone."""

    def __init__(self, job: Job, plan: Plan, layer: Layer, T: int | None = None):
        self.job, self.plan, self.layer = job, plan, layer
        self.spec, self.T, self.item = job.spec, T or job.T, job.item_bytes
        self.trained = job.trained[layer.index]
        self.stages = block_stages(self.spec)
        self.before, self.after = segments(self.stages)
        self.saved = plan.saved_for(self.spec)
        self.tiles = plan.tiles(self.T)
        self.book = Ledger(0)
        self.attention: list[Buffer] = []
        self.gradients: set[str] = set()

    def whole(self, width: int) -> float:
        """Bytes of a value of the whole batch."""
        return self.job.B * self.T * width * self.item

    def part(self, tile: int, name: str) -> float:
        """Bytes of a tile of a value."""
        start, stop = self.tiles[tile]
        return self.job.B * (stop - start) * value_width(self.spec, name) * self.item

    def embedding(self) -> float:
        """Embedding a batch: gathered packed rows, all tiles at once."""
        n_tokens = self.job.B * self.T
        scaled = self.whole(self.spec.D) if self.spec.embed_scale is not None else 0.0
        return cost.rows_bytes(self.spec.embedding, n_tokens, self.item) + scaled

    def forward(self, save: bool) -> float:
        """The most that BlockRunner.forward holds."""
        book = self.book = Ledger(0)
        saved = self.saved if save else frozenset()
        before, after = forward_ops(self.before, saved, keep=(INPUT, *QKV)), forward_ops(self.after, saved)
        x = [book.new(self.part(tile, "x")) for tile in range(len(self.tiles))]
        found: dict[str, list[Buffer]] = {name: [] for name in QKV}
        for tile in range(len(self.tiles)):
            values = {INPUT: book.hold(x[tile])}
            self.carry_out(before, values, tile)
            for name in QKV:
                found[name].append(values.pop(name))
            book.drop_all(values.values())
        self.begin_attention(found["k"], found["v"])
        for tile, own in enumerate(x):
            q = found["q"][tile]
            a = self.attend(tile)
            book.drop(q)
            values = {INPUT: own, "a": a}
            self.carry_out(after, values, tile)  # y stays
        return book.peak

    def backward(self, want_dx: bool) -> float:
        """The most that BlockRunner.backward holds."""
        book = self.book = Ledger(0)
        self.attention = []
        useful = needs_gradient(self.stages, self.trained, want_dx)
        needs_attention = useful["a"]
        ops = backward_ops(self.after, self.saved | {INPUT, "a"}, self.trained, useful)
        dy = [book.new(self.part(tile, "x")) for tile in range(len(self.tiles))]
        dx: list[Buffer | None] = []
        dq: list[Buffer] = []
        for tile in range(len(self.tiles)):
            cotangents = {OUTPUT: dy[tile]}
            self.carry_out(ops, {}, tile, cotangents)
            dx.append(cotangents.pop(INPUT, None))
            if needs_attention:
                q = self.fetch("q", tile)
                dq.append(self.attend_backward(tile))
                book.drop(q, cotangents.pop("a"))
            book.drop_all(cotangents.values())
        if needs_attention:
            k = self.whole(value_width(self.spec, "k"))
            book.spike((cost.KEYS_NORM_END if self.spec.qk_norm else cost.KEYS_END) * k)
            book.drop_all(self.attention)
            dk, dv = book.new(k), book.new(k)
            ops = backward_ops(self.before, self.saved | {INPUT}, self.trained, useful)
            for tile in range(len(self.tiles)):
                cotangents = {"q": dq[tile], "k": book.hold(dk), "v": book.hold(dv)}
                residual = dx[tile]
                if residual is not None:
                    cotangents[INPUT] = residual
                self.carry_out(ops, {}, tile, cotangents)
        return book.peak

    def carry_out(
        self, ops: list[Op], values: dict[str, Buffer], tile: int, cotangents: dict[str, Buffer] | None = None
    ) -> None:
        for op in ops:
            if op.kind == "drop":
                self.book.drop(values.pop(op.value, None))
            elif op.kind == "load":
                values[op.value] = self.fetch(op.value, tile)
            elif op.kind == "run":
                assert op.stage is not None
                values[op.stage.output] = self.run(op.stage, tile)
            elif op.kind == "backward":
                assert op.stage is not None and cotangents is not None
                self.run_backward(op.stage, tile, cotangents, op.wanted)

    def fetch(self, name: str, tile: int) -> Buffer:
        """As the engine's: from the arena, or computed again."""
        if name in self.saved or name == INPUT:
            return self.book.new(self.part(tile, name))
        if name == "a":
            self.need_attention()
            q = self.fetch("q", tile)
            a = self.attend(tile)
            self.book.drop(q)
            return a
        values = {INPUT: self.fetch(INPUT, tile)}
        needed = tuple(stage for stage in self.before if stage.output in (name, "h"))
        self.carry_out(forward_ops(needed, frozenset(), keep=(name,)), values, tile)
        found = values.pop(name)
        self.book.drop_all(values.values())
        return found

    def run(self, stage: Stage, tile: int) -> Buffer:
        out, n_rows = self.part(tile, stage.output), self.n_rows(tile)
        if stage.kind == "projection":
            linear, mask = self.layer.linears[stage.name], self.mask(stage, tile)
            is_trained = stage.name in self.trained
            self.book.spike(
                2 * mask + cost.forward_bytes(self.plan, linear, n_rows, self.item, is_trained, self.job.packed)
            )
            self.book.spike(cost.DROPOUT_COPIES * mask)
        elif stage.kind == "mlp":
            self.mlp(tile)
        else:
            self.book.spike(cost.glue_copies(self.spec, stage)[0] * out)
        return self.book.new(out)

    def run_backward(self, stage: Stage, tile: int, cotangents: dict[str, Buffer], wanted: tuple[str, ...]) -> None:
        book, g, n_rows = self.book, cotangents.pop(stage.output), self.n_rows(tile)
        sums = sum(self.part(tile, name) for name in wanted if name in cotangents)
        shared = stage.name.endswith("residual")
        if stage.kind == "projection":
            linear, mask = self.layer.linears[stage.name], self.mask(stage, tile)
            is_trained = stage.name in self.trained
            if is_trained:
                own = pair_bytes(self.job, self.layer, stage.name)
                book.spike(max(cost.DROPOUT_COPIES * mask, 2 * mask + 2 * own))
                if stage.name not in self.gradients:
                    self.gradients.add(stage.name)
                    book.new(own)
            if wanted:
                book.spike(
                    mask + cost.cotangent_bytes(self.plan, linear, n_rows, self.item, is_trained, self.job.packed)
                )
                dx = n_rows * linear.in_dims * self.item
                book.spike(mask + sums + (3 if is_trained else 1) * dx)
        elif stage.kind == "mlp":
            self.mlp_backward(tile, bool(wanted))
            book.spike(sums + self.part(tile, stage.inputs[0]))
        else:
            book.spike(cost.glue_copies(self.spec, stage)[1] * self.part(tile, stage.output) + sums)
        for name in wanted:
            stream = shared and (not self.spec.gemma or name == stage.inputs[0])
            found = book.hold(g) if stream else book.new(self.part(tile, name))
            known = cotangents.get(name)
            if known is not None:
                total = book.new(self.part(tile, name))
                book.drop(known, found)
                found = total
            cotangents[name] = found
        book.drop(g)

    def n_rows(self, tile: int) -> int:
        start, stop = self.tiles[tile]
        return self.job.B * (stop - start)

    def mask(self, stage: Stage, tile: int) -> float:
        """Dropout's factor for a projection's input; nothing without dropout."""
        return self.part(tile, stage.inputs[0]) if self.job.dropout and stage.name in self.trained else 0.0

    # The MLP, as engine/mlp.py goes about it

    def mlp_blocks(self, tile: int) -> tuple[list[int], float, float]:
        """The widths of its blocks of columns; bytes of the widest and of a whole row block of the matrices."""
        F = self.layer.linears["down"].in_dims
        step = min(F, self.plan.mlp_columns(self.spec.D, self.item))
        widths = [min(step, F - at) for at in range(0, F, step)]
        decompressed = max(
            cost.values_bytes(self.layer.linears[name], step * self.spec.D, self.item, self.job.packed)
            for name in ("gate", "up", "down")
        )
        return widths, self.n_rows(tile) * step * self.item, decompressed

    def mlp_begin(self, tile: int) -> tuple[list[Buffer], float]:
        """What is held from the first block to the last: low-rank columns, masks; a block's mask for down."""
        rows, names = self.part(tile, "x"), self.trained & {"gate", "up", "down"}
        low_rank = 4 * self.n_rows(tile) * self.job.rank
        held = [self.book.new(2 * low_rank) for _ in names]
        if not self.job.dropout:
            return held, 0.0
        for _ in names - {"down"}:
            self.book.spike(cost.DROPOUT_COPIES * rows)
            held.append(self.book.new(rows))
        return held, self.mlp_blocks(tile)[1] if "down" in names else 0.0

    def mlp(self, tile: int) -> None:
        """Forward: the output's sum, and for every block g, u, m and one decompressed block at a time."""
        book, rows = self.book, self.part(tile, "d")
        widths, block, decompressed = self.mlp_blocks(tile)
        held, mask = self.mlp_begin(tile)
        y = book.new(rows)
        g, u = book.new(block), book.new(block)
        product = 2 if self.trained & {"gate", "up"} else 1
        book.spike((product - 1) * block + decompressed)
        book.spike(cost.activation_copies(self.spec, self.item)[0] * block)
        book.drop(g, u)
        m = book.new(block)
        book.spike(max(cost.DROPOUT_COPIES, 2) * mask)
        # The sum so far, this block's part of it and their sum.
        book.spike(2 * mask + decompressed + rows * (2 if len(widths) > 2 else 1 if len(widths) == 2 else 0))
        book.drop(m)
        book.spike((2 if "down" in self.trained or self.layer.linears["down"].bias else 0) * rows)
        book.drop(y)
        book.drop_all(held)

    def mlp_backward(self, tile: int, want_dx: bool) -> None:
        """Backward: two sums for dx, and for every block g, u, dm, dg, du and one decompressed block at a time."""
        book, rows = self.book, self.part(tile, "h2")
        names = self.trained & {"gate", "up", "down"}
        _, block, decompressed = self.mlp_blocks(tile)
        held, mask = self.mlp_begin(tile)
        pieces = sum(pair_bytes(self.job, self.layer, name) for name in names)
        held.append(book.new(pieces))
        inner = want_dx or bool(names & {"gate", "up"})
        if want_dx:
            held += [book.new(rows), book.new(rows)]
        g, u = book.new(block), book.new(block)
        if not self.saved >= {"g", "u"}:
            book.spike(decompressed + (1 if names & {"gate", "up"} else 0) * block)
        book.spike(max(cost.DROPOUT_COPIES, 2) * mask)
        if not inner:
            book.spike(mask * 2 + cost.activation_copies(self.spec, self.item)[0] * block)
            book.drop(g, u)
        else:
            dm = book.new(block)
            book.spike(mask * 2 + decompressed + ("down" in names) * block)
            book.spike(mask + cost.activation_copies(self.spec, self.item)[1] * block)
            # As many arrays again, or the same ones.
            m, dg, du = dm, g, u
            book.spike(2 * mask)
            book.drop(m)
            if want_dx:
                book.spike(decompressed + 2 * rows)
            book.drop(dg, du)
            if want_dx:
                book.spike(2 * rows + self.job.dropout * rows)
        book.drop_all(held)
        # Joined, then added to those of the tiles before.
        book.spike(2 * pieces)
        for name in sorted(names - self.gradients):
            self.gradients.add(name)
            book.new(pair_bytes(self.job, self.layer, name))

    # Attention

    def need_attention(self) -> None:
        if self.attention:
            return
        k = [self.fetch("k", tile) for tile in range(len(self.tiles))]
        v = [self.fetch("v", tile) for tile in range(len(self.tiles))]
        self.begin_attention(k, v)

    def begin_attention(self, k: list[Buffer], v: list[Buffer]) -> None:
        """Keys and values of the whole sequence, from tiles."""
        size = self.whole(value_width(self.spec, "k"))
        joined = []
        for tiles in (k, v):
            joined.append(tiles[0] if len(tiles) == 1 else self.book.new(size))
            self.book.drop_all(tiles[1:] if len(tiles) == 1 else tiles)
        self.book.spike((cost.KEYS_NORM_BEGIN if self.spec.qk_norm else cost.KEYS_BEGIN) * size)
        self.attention = [*joined, self.book.new(size)]

    def block_bytes(self, tile: int) -> tuple[float, float]:
        """The scores of a tile's last block of queries, and its queries."""
        start, stop = self.tiles[tile]
        n_queries = min(self.plan.query_block, stop - start)
        first = max(start, stop - n_queries)
        low = 0 if self.layer.window is None else max(0, first - self.layer.window + 1)
        queries = self.job.B * n_queries * value_width(self.spec, "q") * self.item
        return self.job.B * self.spec.H * n_queries * (stop - low) * self.item, queries

    def attend(self, tile: int) -> Buffer:
        scores, queries = self.block_bytes(tile)
        copies = cost.scores_copies(self.spec, self.item, self.layer.window is not None)[0]
        n_queries = cost.QUERIES_FORWARD + cost.QUERIES_NORM_FORWARD * self.spec.qk_norm
        a = self.part(tile, "a")
        self.book.spike(a - queries + copies * scores + n_queries * queries)
        self.book.spike(2 * a)
        return self.book.new(a)

    def attend_backward(self, tile: int) -> Buffer:
        self.need_attention()
        size = self.whole(value_width(self.spec, "k"))
        if len(self.attention) == 3:
            self.attention += [self.book.new(size), self.book.new(size)]
        scores, queries = self.block_bytes(tile)
        copies = cost.scores_copies(self.spec, self.item, self.layer.window is not None)[1]
        n_queries = cost.QUERIES_BACKWARD + cost.QUERIES_NORM_BACKWARD * self.spec.qk_norm
        stop = self.tiles[tile][1]
        n_keys = stop if self.layer.window is None else min(stop, self.layer.window + self.plan.query_block)
        # dk and dv of the keys seen; MLX's own attention has them for every query head before groups are summed.
        width = value_width(self.spec, "k" if cost.in_place(self.item) else "q")
        expanded = 2 * self.job.B * n_keys * width * self.item
        dq = self.part(tile, "q")
        self.book.spike(dq - queries + copies * scores + n_queries * queries + expanded)
        self.book.spike(2 * dq)
        return self.book.new(dq)
