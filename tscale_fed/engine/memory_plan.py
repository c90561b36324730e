"""The memory plan: how many fragments go through the device at once, and what is kept for the backward pass.

Enters: the shape, the fragments of a step, the precision, free bytes. Leaves: a `MemoryPlan` whose text is one sentence. Rule: the whole
step at once with all states kept, if it fits; else the states are kept as long as a micro-batch has ROWS_ENOUGH tokens (smaller ones leave
a GPU idle, and each adds a pass over the gradient); else states are made again from layer inputs if that doubles the micro-batch at least.
Micro-batches are as equal as can be. The plan decides speed and memory alone, never the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tscale_fed.engine.gradients import gradient_scratch_bytes
from tscale_fed.engine.layout import MAX_ROWS, Kind, Sizes, buffer_specs
from tscale_fed.engine.packed import packed_bytes
from tscale_fed.engine.precision import Precision
from tscale_fed.model.shape import ModelShape
from tscale_net.errors import Refused

ROWS_ENOUGH = 8192
"""Tokens of a micro-batch that fill a large GPU's tiles several times over. A guess."""
MOST_ROWS = 1 << 16
"""Larger micro-batches gain nothing."""
RESERVED_BYTES = 1 << 30
"""Left free for CUDA graphs, the evaluator's activations and torch's own rounding up."""
RESERVED_FRACTION = 0.04
"""Of the free bytes, for fragmentation."""
_RECOMPUTE_GAIN = 2
"""Recomputing costs about 30 % of a step: worth it for micro-batches twice as large, where they are small."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A choice; str() is the sentence for people."""

    sizes: Sizes
    step_fragments: int
    free_bytes: int | None

    @property
    def micro_batches(self) -> int:
        """Per step."""
        return -(-self.step_fragments // self.sizes.fragments)

    @property
    def bytes(self) -> int:
        """Of packed weights, gradient scratch and buffers; fp32 weights, gradient and momentum are there already."""
        return engine_bytes(self.sizes)

    def __str__(self) -> str:
        count = f"{self.micro_batches} x " if self.micro_batches > 1 else ""
        kept = "all states kept" if self.sizes.kind == "keep" else "states recomputed"
        room = "" if self.free_bytes is None else f" of {_gigabytes(self.free_bytes)} free"
        sizes = self.sizes
        fragments = f"{sizes.fragments} fragment{'' if sizes.fragments == 1 else 's'} of {sizes.tokens} tokens"
        return f"memory: {count}{fragments} at once, {kept}, {_gigabytes(self.bytes)}{room}"


def engine_bytes(sizes: Sizes) -> int:
    """Everything that an engine of these sizes allocates."""
    train = sizes.kind != "evaluate"
    scratch = gradient_scratch_bytes(sizes.shape) if train else 0
    return packed_bytes(sizes.shape, sizes.precision.code, transposed=train) + scratch + buffer_bytes(sizes)


def buffer_bytes(sizes: Sizes) -> int:
    """Of `buffers.Buffers`."""
    return sum(spec.bytes for spec in buffer_specs(sizes).values())


def choose_plan(
    shape: ModelShape,
    *,
    fragments: int,
    tokens: int,
    precision: Precision,
    free_bytes: int | None,
    kind: str = "auto",
    micro_batch: int = 0,
    stream: torch.dtype = torch.float32,
) -> MemoryPlan:
    """The plan for steps of `fragments` fragments of `tokens` tokens. `free_bytes` None: memory is no concern (a processor).

    kind: auto, keep or recompute; micro_batch: 0 = chosen here, else at most so many fragments at once.
    Raises Refused: "out-of-memory" if one fragment does not fit, "bad-config" if it is too long for exact sums.
    """
    if tokens > MAX_ROWS:
        what = f"[batch] length = {tokens}: sums of 8-bit products are exact up to {MAX_ROWS} tokens"
        raise Refused("bad-config", f'{what}; take shorter fragments, or [device] precision = "float32"')
    room = None if free_bytes is None else int(free_bytes * (1 - RESERVED_FRACTION)) - RESERVED_BYTES
    most = max(1, min(fragments, micro_batch or fragments, MOST_ROWS // tokens))
    kinds: tuple[Kind, ...] = ("keep", "recompute") if kind == "auto" else (_kind(kind),)
    fitting = []
    for each in kinds:
        sizes = _largest(Sizes(shape, most, tokens, precision, each, stream), fragments, room)
        if sizes is not None:
            fitting.append(sizes)
    if not fitting:
        fitting.append(_smallest(Sizes(shape, 1, tokens, precision, kinds[-1], stream), free_bytes or 0))
    best = fitting[0]
    for other in fitting[1:]:
        if best.rows < ROWS_ENOUGH and best.fragments < most and other.fragments >= _RECOMPUTE_GAIN * best.fragments:
            best = other
    return MemoryPlan(best, fragments, free_bytes)


def smaller(plan: MemoryPlan) -> MemoryPlan | None:
    """The next plan to try when memory ran out all the same: half as many fragments, then recomputing; None if there is none."""
    sizes = plan.sizes
    if sizes.fragments > 1:
        return replace(plan, sizes=replace(sizes, fragments=(sizes.fragments + 1) // 2))
    if sizes.kind == "keep":
        return replace(plan, sizes=replace(sizes, kind="recompute"))
    return None


def _largest(sizes: Sizes, step_fragments: int, room: int | None) -> Sizes | None:
    """The largest equal share of the step that is at most `sizes.fragments` and fits."""
    count = -(-step_fragments // sizes.fragments)
    while True:
        share = replace(sizes, fragments=-(-step_fragments // count))
        if room is None or engine_bytes(share) <= room:
            return share
        if share.fragments == 1:
            return None
        count = max(count + 1, -(-step_fragments // (share.fragments - 1)))


def _smallest(sizes: Sizes, free_bytes: int) -> Sizes:
    """One fragment, if it fits at least without a reserve: then it is tried. Raises Refused("out-of-memory")."""
    needed = engine_bytes(sizes)
    if needed > free_bytes:
        what = f"one fragment of {sizes.tokens} tokens needs {_gigabytes(needed)} beside the weights, {_gigabytes(free_bytes)} are free"
        raise Refused("out-of-memory", f"{what}: free the GPU, or take shorter fragments (length in [batch]) or a smaller model")
    return sizes


def _kind(text: str) -> Kind:
    if text == "keep":
        return "keep"
    if text == "recompute":
        return "recompute"
    raise ValueError(f"memory plan {text!r}: write auto, keep or recompute")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
