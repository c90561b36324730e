"""The baseline: the same model and the same optimizer in bf16 with torch.compile, as good as plain torch makes it.

Enters: a shape, start weights, batches on the device. Leaves: loss sums and updated weights. fp32 master weights; a copy in the dtype of
the products, written by the optimizer's pass, so nothing is cast twice; layers compiled per kind; the loss in large compiled chunks, with
its gradient; gradients of micro-batches added in fp32. The vocabulary is padded to a multiple of 128, which the final layer's products
need to be fast. Documents are not told apart. Launches are not recorded as a CUDA graph (autograd hooks of torch 2.11 refuse): at 1.5e9
weights the GPU is never short of them, a small model is slower than it could be.

Its flat order is its own: embedding, final layer, then per layer [query key gate value], combiner, feed-forward up, down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tscale_fed.bench.compiled_layer import CompiledWeights, LocalWay, compiled_layer, make_attend, unit_rms
from tscale_fed.bench.flat_rule import FlatMatrix, FlatRule, RuleNumbers
from tscale_fed.model.combiner import blocked_channels, blocked_columns
from tscale_fed.model.labels import input_labels
from tscale_fed.model.rotary import rotary_table
from tscale_fed.model.shape import ModelShape

VOCAB_MULTIPLE = 128
MASKED_BIAS = -1e30
CHUNK_LOGITS = 2**29
"""Logits alive at a time: 1 GiB in bf16."""
RECOMPILE_LIMIT = 64
"""Kinds of layers, shapes of matrices and models of one process share one function; torch's own limit of 8 is soon reached."""
SAVED_BYTES_PER_CHANNEL = 40
"""What a layer keeps for its backward pass, per token and channel of all heads (measured: 2.5 GB for 24,576 tokens, 2560 channels)."""
_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""In the order of their speed on an H100: forward 0.30 and 0.49 ms, backward 1.1 and 1.9 ms at 24 x 1024 tokens, 20 heads."""

Function = TypeVar("Function", bound=Callable[..., Any])


def micro_batches_for(shape: ModelShape, fragments: int, tokens: int, free_bytes: float) -> int:
    """Smallest divisor of `fragments` whose parts fit beside weights, momentum, gradients (fp32) and the copy in bf16."""
    fixed = 14 * shape.trained_parameters
    per_fragment = tokens * shape.heads_width * len(shape.layers()) * SAVED_BYTES_PER_CHANNEL
    for count in range(1, fragments + 1):
        if fragments % count == 0 and fixed + per_fragment * (fragments // count) <= 0.85 * free_bytes:
            return count
    return fragments


class CompiledBaseline:
    """See the module. `weights` is flat fp32 in its own order; change it in place between steps and call `refresh`."""

    def __init__(
        self,
        shape: ModelShape,
        start: Tensor,
        bias2: Tensor,
        *,
        fragments: int,
        tokens: int,
        device: torch.device,
        compute: torch.dtype = torch.bfloat16,
        micro_batches: int = 1,
        labels: int = 1,
        local: LocalWay = "flex",
        compiled: bool = True,
        rule: RuleNumbers | None = None,
    ) -> None:
        """`start`: fp32 [parameters] in canonical order, on any device. `bias2` [V] in base-2 units. `labels`: K, 3 with noise rows.
        `compiled`: only on CUDA.

        Raises ValueError if the micro-batches do not divide the fragments.
        """
        if fragments % micro_batches:
            raise ValueError(f"{fragments} fragments cannot be split into {micro_batches} equal micro-batches")
        self.shape, self.device, self.compute = shape, device, compute
        self._micro = fragments // micro_batches
        self._compiled = compiled and device.type == "cuda"
        if self._compiled:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        self._padded_vocab = -(-shape.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self._bias = torch.full((self._padded_vocab,), MASKED_BIAS, device=device)
        self._bias[: shape.vocab] = bias2.to(device) * math.log(2.0)
        self._make_buffers(start)
        self.rule = FlatRule(self._matrices, rule or RuleNumbers(), compiled=self._compiled)
        self.rule.refresh_shadows()
        table = rotary_table(tokens, device, torch.float32)
        kinds = {kind: make_attend(kind, tokens, device, local) for kind in dict.fromkeys(shape.layers())}
        self._layer_extras = [(*table, kinds[kind]) for kind in shape.layers()]
        self._layer = self._compile(compiled_layer)
        self._finish = self._compile(unit_rms)
        self._chunk_loss = self._compile(chunk_loss)
        self._labels = torch.zeros(fragments, tokens, labels, dtype=torch.int64, device=device)
        self._signs = torch.tensor([1.0, 1.0, -1.0][:labels], device=device)
        self._target = torch.full((fragments, tokens), -1, dtype=torch.int64, device=device)
        self._loss_sum = torch.zeros((), device=device)

    # -- what benches call ---------------------------------------------------------------------------------------------

    def step(
        self, text: Tensor, target: Tensor, rate: float, *, token_keep: Tensor | None = None, noise: torch.Generator | None = None
    ) -> Tensor:
        """One step on text, target int64 [fragments, tokens]; the loss sum before it, 0-dim on the device. Waits for nothing."""
        labels, _ = input_labels(self.shape, text, token_keep, noise)
        self._labels.copy_(labels)
        self._target.copy_(target)
        self.rule.set_numbers(rate)
        self._whole_step()
        return self._loss_sum.clone()

    def losses(self, batches: Sequence[tuple[Tensor, Tensor]], weights: Tensor | None = None) -> Tensor:
        """Loss sums [batches] of (text, target), each of at most `fragments` fragments; `weights` (flat, own order) instead of the live."""
        matrices = [matrix.weight for matrix in self._matrices] if weights is None else self._matrices_of(weights)
        if weights is not None:
            self.rule.refresh_shadows(matrices)
        sums = [self._loss(text, target, matrices[0][0]) for text, target in batches]
        if weights is not None:
            self.refresh()
        return torch.stack(sums)

    def _loss(self, text: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
        labels, signs = input_labels(self.shape, text)
        total = torch.zeros((), device=self.device)
        for part in range(0, text.shape[0], self._micro):
            # Gradients stay on: without them every layer would be compiled a second time.
            state = self._state(self._embed(embedding, labels[part : part + self._micro], signs).requires_grad_())
            total += self._head(state.detach(), target[part : part + self._micro], None)[0]
        return total

    def refresh(self) -> None:
        """The masters were changed from outside."""
        self.rule.refresh_shadows()

    def gradient_of(self, name: str) -> Tensor:
        """Gradient of a matrix by its canonical name, in the rows and columns of this module's order (for tests)."""
        if name in ("embedding", "final"):
            return self._matrices[0 if name == "embedding" else 1].gradient[0]
        _, layer, part = name.split(".")
        projection, combiner, up, down = self._matrices[2 + 4 * int(layer) : 6 + 4 * int(layer)]
        if part in ("query", "key", "gate", "value"):
            return projection.gradient[("query", "key", "gate", "value").index(part)]
        return {"combiner": combiner, "ffn_up": up, "ffn_down": down}[part].gradient[0]

    # -- buffers -------------------------------------------------------------------------------------------------------

    def _shapes(self) -> list[tuple[int, int, int]]:
        shape = self.shape
        width, inner, hidden = shape.width, shape.heads_width, shape.ffn_width
        per_layer = [(4, inner, width), (1, width, 4 * inner), (1, hidden, width), (1, width, hidden)]
        return [(1, shape.embedding_rows, width), (1, self._padded_vocab, width), *per_layer * len(shape.layers())]

    def _matrices_of(self, flat: Tensor) -> list[Tensor]:
        shapes = self._shapes()
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _make_buffers(self, start: Tensor) -> None:
        size = sum(math.prod(shape) for shape in self._shapes())
        self.weights = torch.zeros(size, device=self.device)
        momentum, gradient = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        shadow = torch.zeros(size, device=self.device, dtype=self.compute)
        weights = self._matrices_of(self.weights)
        shadows = self._matrices_of(shadow)
        views = zip(weights, self._matrices_of(momentum), self._matrices_of(gradient), shadows, strict=True)
        self._matrices = [FlatMatrix(w, m, g, None if at == 0 else s, at < 2) for at, (w, m, g, s) in enumerate(views)]
        self._load(weights, start)
        self._first = True
        self._leaves = [self._leaf(shadows[at], self._matrices[at].gradient) for at in range(2, len(shadows))]
        per_layer = [self._leaves[at : at + 4] for at in range(0, len(self._leaves), 4)]
        self._layer_weights = [CompiledWeights(p, c[0], u[0], d[0]) for p, c, u, d in per_layer]

    def _leaf(self, shadow: Tensor, gradient: Tensor) -> Tensor:
        """A leaf over a shadow whose gradient moves into the fp32 buffer as soon as it is there."""
        leaf = shadow.detach().requires_grad_()

        def take(leaf: Tensor) -> None:
            assert leaf.grad is not None
            if self._first:
                gradient.copy_(leaf.grad)
            else:
                gradient.add_(leaf.grad)
            leaf.grad = None

        leaf.register_post_accumulate_grad_hook(take)
        return leaf

    def _load(self, weights: list[Tensor], start: Tensor) -> None:
        """Canonical order into this module's."""
        channels, columns = blocked_channels(self.shape.heads), blocked_columns(self.shape.heads)
        at = 0
        for name, rows, width in self.shape.tensors():
            matrix = start[at : at + rows * width].view(rows, width)
            at += rows * width
            if name in ("embedding", "final"):
                weights[0 if name == "embedding" else 1][0, :rows] = matrix
                continue
            _, layer, part = name.split(".")
            place = 2 + 4 * int(layer)
            if part in ("gate", "value"):
                matrix = matrix[channels.to(matrix.device)]
            if part in ("query", "key", "gate", "value"):
                weights[place][("query", "key", "gate", "value").index(part)] = matrix
            elif part == "combiner":
                weights[place + 1][0] = matrix[:, columns.to(matrix.device)]
            else:
                weights[place + (2 if part == "ffn_up" else 3)][0] = matrix

    # -- a step --------------------------------------------------------------------------------------------------------

    def _compile(self, function: Function) -> Function:
        return cast(Function, torch.compile(function, dynamic=False)) if self._compiled else function

    def _whole_step(self) -> None:
        self._loss_sum.zero_()
        for start in range(0, self._labels.shape[0], self._micro):
            self._first = start == 0
            self._micro_step(self._labels[start : start + self._micro], self._target[start : start + self._micro])
        self.rule.run()

    def _micro_step(self, labels: Tensor, target: Tensor) -> None:
        embedding, final = self._matrices[:2]
        begin = self._embed(embedding.weight[0], labels, self._signs).requires_grad_()
        state = self._state(begin)
        if self._first:
            embedding.gradient.zero_()
            final.gradient.zero_()
        loss, error = self._head(state.detach(), target, final.gradient[0])
        self._loss_sum.add_(loss)
        state.backward(error)
        assert begin.grad is not None
        self._embedding_gradient(begin.grad.flatten(0, 1), labels.flatten(0, 1), embedding.gradient[0])

    @staticmethod
    def _embed(table: Tensor, labels: Tensor, signs: Tensor) -> Tensor:
        rows = table[labels[..., 0]]
        for k in range(1, labels.shape[-1]):
            rows = torch.addcmul(rows, table[labels[..., k]], signs[k])
        return rows

    def _embedding_gradient(self, gradient: Tensor, labels: Tensor, out: Tensor) -> None:
        for k in range(labels.shape[-1]):
            out.index_add_(0, labels[:, k], gradient if k == 0 else gradient * self._signs[k])

    def _state(self, x: Tensor) -> Tensor:
        """Normalised final state of a start state."""
        with sdpa_kernel(_ATTENTION, set_priority=True):
            for weights, extras in zip(self._layer_weights, self._layer_extras, strict=True):
                x = self._layer(x, weights, *extras)
        return self._finish(x, self.compute)

    @torch.no_grad()
    def _head(self, state: Tensor, target: Tensor, grad_final: Tensor | None) -> tuple[Tensor, Tensor]:
        """(loss sum, its gradient at the state [B, T, E]); adds to grad_final [VP, E] if given."""
        final = self._matrices[1].shadow
        assert final is not None
        rows, wanted, error = state.flatten(0, 1), target.flatten(), torch.empty_like(state).flatten(0, 1)
        total = torch.zeros((), device=self.device)
        chunk = max(1, CHUNK_LOGITS // self._padded_vocab)
        for start in range(0, rows.shape[0], chunk):
            part = rows[start : start + chunk]
            loss, logit_error = self._chunk_loss(part @ final[0].T, self._bias, wanted[start : start + chunk])
            total += loss
            if grad_final is not None:
                error[start : start + chunk] = logit_error @ final[0]
                grad_final += logit_error.T @ part
        return total, error.view_as(state)


def chunk_loss(products: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(loss sum, gradient at the products) of products [N, VP] without bias; target [N], -1 = none."""
    has_target = target >= 0
    wanted = target.clamp_min(0).unsqueeze(-1)
    log_p = torch.log_softmax(products.float() + bias, dim=-1)
    loss = -torch.where(has_target.unsqueeze(-1), log_p.gather(-1, wanted), 0.0).sum()
    is_target = torch.arange(products.shape[1], device=products.device) == wanted
    error = torch.where(has_target.unsqueeze(-1), log_p.exp() - is_target.float(), 0.0)
    return loss, error.to(products.dtype)


def random_start(shape: ModelShape, device: torch.device, seed: int) -> Tensor:
    """Start weights by the rule of `model.init`, drawn on the device: seconds instead of half a minute at 1.5 billion weights."""
    from tscale_fed.model.constants import INIT_RMS

    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for name, rows, columns in shape.tensors():
        deviation = 1.0 if name == "embedding" else 0.0 if name.endswith(("combiner", "ffn_down")) else INIT_RMS
        matrix = torch.randn(rows, columns, device=device, generator=generator).mul_(deviation)
        if name == "embedding":
            matrix[: shape.noise_rows] = 0.0
        parts.append(matrix.flatten())
    return torch.cat(parts)


