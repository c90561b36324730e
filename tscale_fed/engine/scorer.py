"""The scorer: losses of any weights by the engine's forward pass, with packed weights and buffers of its own.

The weights in training are only read; their codes, saved states and graphs are not touched. It keeps 1 to 2 bytes per weight on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tscale_fed.engine.buffers import Buffers
from tscale_fed.engine.engine import on_device, padded_bias
from tscale_fed.engine.forward import Work, forward
from tscale_fed.engine.host_pack import host_threads, pack_from_host
from tscale_fed.engine.interface import StepBatch
from tscale_fed.engine.layout import Sizes
from tscale_fed.engine.packed import PackedWeights
from tscale_fed.engine.precision import Precision
from tscale_fed.model.loss import NO_TARGET
from tscale_fed.model.shape import ModelShape
from tscale_kernels.codes import ref_product, vector_scale
from tscale_kernels.dispatch import BackendName
from tscale_kernels.head import loss
from tscale_kernels.host_update import choose_host


class Scorer:
    """Loss sums of batches of at most `fragments` fragments of `tokens` tokens. Raises torch.OutOfMemoryError."""

    def __init__(
        self,
        shape: ModelShape,
        bias2: Tensor | None,
        precision: Precision,
        device: torch.device,
        *,
        fragments: int,
        tokens: int,
        doc_start_token: int | None,
        backend: BackendName | None = None,
    ) -> None:
        buffers = Buffers(Sizes(shape, fragments, tokens, precision, "evaluate"), device)
        self._weights = PackedWeights(shape, precision.code, device, transposed=False)
        self._table = torch.zeros(shape.embedding_rows, shape.width, device=device)
        self._doc_start_token = doc_start_token
        self._shape = shape
        self._work = Work(self._weights, self._table, padded_bias(shape, bias2, device), buffers, doc_start_token is not None, backend)

    def load(self, weights: Tensor) -> None:
        """Take `weights`, float [parameters] on any device, for the following losses. Raises ValueError if they are of another model."""
        if weights.shape != (self._shape.trained_parameters,):
            raise ValueError(f"weights of {weights.numel()} elements do not fit model {self._shape.dims}")
        with on_device(self._table.device):
            if weights.device != self._table.device and weights.device.type == "cpu":  # as a whole they might not fit a GPU
                flat, host = weights.detach().float().contiguous(), choose_host(host_threads())
                pack_from_host(flat, self._shape, self._weights, self._table, host, self._work.backend)
                return
            flat = weights.detach().to(self._table.device, torch.float32)
            self._weights.pack(flat, self._work.backend)
            self._table.copy_(flat[: self._table.numel()].view_as(self._table))

    def loss(self, text: Tensor, target: Tensor) -> Tensor:
        """Loss sum in nats of text and target int64 [B, T] on the CPU: fp64 [1] on the device, overwritten by the next call."""
        b, work, final = self._work.buffers, self._work, self._weights.final
        with on_device(self._table.device):
            b.load(StepBatch.make(self._shape, text, target), 0, self._doc_start_token)
            b.loss_sum.zero_()
            forward(work)
            loss(
                b.final_input, final.codes, final.units, work.bias, b.target, losses=b.losses, loss_sum=b.loss_sum, scratch=b.head,
                backend=work.backend,
            )  # fmt: skip
        return b.loss_sum

    def logits(self, text: Tensor) -> Tensor:
        """Natural logits fp32 [B, T, V] of text int64 [B, T] on the CPU: for checks, with all of them in memory at once."""
        self.loss(text, torch.full_like(text, NO_TARGET))
        final, state = self._weights.final, self._work.buffers.final_input[: text.numel()]
        factor = final.units / (vector_scale(state.dtype) * state.shape[1] ** 0.5)
        logits = ref_product(state, final.codes) * factor + self._work.bias
        return logits[:, : self._shape.vocab].unflatten(0, text.shape)
