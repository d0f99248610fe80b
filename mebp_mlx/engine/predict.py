"""Predicts the footprint of a step, phase by phase, before anything runs.

A block's phases are walked in engine/walk.py, blocks of the same kind once; the head and the update are summed up here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from . import ledger as cost
from .job import Job
from .plan import Plan
from .walk import Walk, pair_bytes

# Footprint minus footprint before the model was opened, LoRA and the count of arrays (bench.plan_check, Linux, glibc,
# MKL, 2 cores), in MB: 8 at 7 MB of arrays, 9 at 10, 13 at 15, 16 at 18, 24 at 50 and 27 at 90: the BLAS library's
# packing buffers, threads, and what the C heap keeps in gaps that do not fit the next array. A root fits; the head's
# block of decompressed rows, one large array, counts half there (5 MB at 10, of which the block is 8).
GAPS_PER_ROOT_BYTE = 3_300
# Sequences in many tiles leave more of them: at T = 4,096 and 8,192 (8 and 16 tiles) 1.5 to 2 times the root was
# measured.
GAPS_PER_TILE, TILES_WITHOUT, GAPS_AT_MOST = 0.1, 4, 1.4


@dataclass(frozen=True)
class Prediction:
    """phases: peak footprint in bytes by phase; arena_bytes: the files' size, the optimizer's parked state in it;
    written_bytes: activations written in each micro-batch.
    """

    phases: dict[str, int] = field(default_factory=dict)
    arena_bytes: int = 0
    written_bytes: int = 0

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak_bytes(self) -> int:
        return self.phases[self.peak_phase]


def predict(job: Job, plan: Plan) -> Prediction:
    """The peak footprint of each phase of a training step, and what it puts into the arena."""
    spec = job.spec
    fixed = job.base_bytes + job.lora_bytes + job.state_bytes
    gathered = job.lora_bytes if job.gathers else 0
    forward, backward, update = 0.0, 0.0, 0.0
    exact = job.engine == "mebp"
    seen = set()
    for layer in spec.layers:
        trained = job.trained[layer.index]
        kind = (layer.window, trained, layer.index >= job.first_trained, layer.index > job.first_trained)
        if kind in seen:
            continue
        seen.add(kind)
        saves = exact and kind[2]
        walk = Walk(job, plan, layer)
        forward = max(forward, walk.forward(saves))
        if job.n_eval_tokens > job.T:
            forward = max(forward, Walk(job, plan, layer, job.n_eval_tokens).forward(False))
        layer_bytes = sum(pair_bytes(job, layer, short) for short in trained)
        if saves:
            backward = max(backward, walk.backward(kind[3]) + gathered)
        copies = cost.UPDATE_COPIES.get(job.optimizer, cost.UPDATE_COPIES_OTHERS)
        # dx of the whole sequence waits meanwhile; gathered gradients are all updated at once.
        waiting = walk.whole(spec.D) if saves else 0.0
        update = max(update, waiting + copies * layer_bytes, gathered * copies if job.gathers else 0.0)
    forward = max(forward, Walk(job, plan, spec.layers[0]).embedding())
    head = head_bytes(job, plan, job.T, exact)
    if job.n_eval_tokens > job.T:
        head = max(head, head_bytes(job, plan, job.n_eval_tokens, False))
    arena = 0
    if exact:
        n_layers = spec.L - job.first_trained
        arena = plan.arena_bytes(spec, job.B, job.T, n_layers, job.item_bytes) if n_layers else 0
    found = {"start": 0.0, "forward": forward, "head": head, "backward": backward, "update": update}
    if not exact:
        del found["backward"]
    block = min(plan.head_block_bytes, 0.5 * head)
    in_gaps = {**found, "head": head - 0.5 * block}
    more = GAPS_PER_TILE * max(0, len(plan.tiles(job.T)) - TILES_WITHOUT)
    root = GAPS_PER_ROOT_BYTE * min(GAPS_AT_MOST, 1 + more)
    phases = {name: int(fixed + n + root * math.sqrt(in_gaps[name])) for name, n in found.items()}
    return Prediction(phases, arena + job.parked_bytes, arena)


def head_bytes(job: Job, plan: Plan, T: int, want_dx: bool) -> float:
    """The most that engine/head.py holds, with every row labelled."""
    spec, N = job.spec, job.B * T
    rows = N * spec.D * job.item_bytes
    chunk = min(spec.V, plan.vocabulary_chunk(N, spec.D, job.item_bytes))
    tile = rows * min(1.0, max(stop - start for start, stop in plan.tiles(T)) / T)
    joined = rows if len(plan.tiles(T)) > 1 else 0.0
    held = 2 * rows + (N * spec.D * 4 if want_dx else 0)  # of the last block, normed; weighted sum
    work = (
        cost.rows_bytes(spec.head, chunk, job.item_bytes, job.packed)
        + cost.logits_copies(job.item_bytes) * N * chunk * 4
    )
    work += cost.HEAD_ROWS_CHUNK * N * spec.D * 4 if want_dx else 0
    # From the second chunk on the previous state is still held beside the new one.
    end = (cost.HEAD_ROWS_END if want_dx else 2.2) * rows
    spread = 2 * rows + cost.HEAD_VJP * tile if want_dx else 0.0
    return max(held + joined + rows, held + work, held + end, spread)
