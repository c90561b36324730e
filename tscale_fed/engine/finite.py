"""Where a step first overflowed: the largest magnitude at every stage of a micro-batch, kept on the device and read once per step.

Codes are always finite, so what can go wrong shows in few places: in the units of the weights, in the RMS of the state after each half of a
layer, in the loss, and in the row maxima of the gradients. They are listed in the order of the computation; the first that is not finite
names layer and operation. A maximum is infinite or NaN for good, so the peaks of several micro-batches are simply joined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_fed.engine.forward import Work
from tscale_fed.engine.kernel_order import PROJECTIONS

_PACKED = (*PROJECTIONS, "combiner", "ffn_up", "ffn_down")
"""Units of a layer, in the order of `packed.pack_matrices`."""


class FiniteCheck:
    """Peaks of all stages, fp32 on the device."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.names = stage_names(work.sizes.depth)
        self.peaks = torch.zeros(len(self.names), device=device)

    def note(self, work: Work) -> None:
        """Join the peaks of the micro-batch that has just been computed. Part of the captured graph."""
        torch.maximum(self.peaks, _peaks(work), out=self.peaks)

    def first(self, peaks: Tensor) -> str | None:
        """The first stage that is not finite, of peaks on the CPU."""
        bad = (~peaks.isfinite()).nonzero()
        return self.names[int(bad[0])] if bad.numel() else None


def stage_names(depth: int) -> list[str]:
    """What each peak stands for, in the order of the computation."""
    names = ["weights of the final layer"]
    names += [f"weights of layer {layer + 1}, {name}" for layer in range(depth) for name in _PACKED]
    names.append("embedding")
    for layer in range(depth):
        names += [f"layer {layer + 1}, combiner", f"layer {layer + 1}, ffn_down"]
    names.append("gradient of the final layer")
    for layer in reversed(range(depth)):
        parts = ("ffn_down and normalisation", "ffn_up", "attention", "projection")
        names += [f"gradient of layer {layer + 1}, {part}" for part in parts]
    return names


def _peaks(work: Work) -> Tensor:
    b, sizes = work.buffers, work.sizes
    inputs = torch.stack((b.attention_input_rms.amax((1, 2)), b.ffn_input_rms.amax((1, 2))), 1).flatten()
    rows = b.stats[:, : 4 * sizes.rows].view(sizes.depth + 1, 4, sizes.rows).amax(2)
    # From the top: dx from above (line l + 1), then the three gradients inside the layer, then dx below it, which is the next line's first.
    gradients = rows.flip(0).flatten()
    gradients = torch.cat((gradients[: 4 * sizes.depth], gradients[4 * sizes.depth : 4 * sizes.depth + 1]))
    return torch.cat((work.weights.units, inputs, b.final_input_rms.amax().view(1), gradients))
