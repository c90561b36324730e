"""Final layer and loss: enters the normalised final state, leaves the summed cross-entropy in nats.

Rule (TScale): logit_c = W_c . n / sqrt(E) + ln 2 * bias_c, bias_c = log2(count_c + 0.5) of the training corpus, fixed for ever; the loss
is the sum over positions with a target of -log softmax(logits)[target]. No smoothing, no auxiliary term.

The logits of a batch are the largest array of a small model with a large vocabulary, so they are made in chunks of positions and both
gradients are taken at once, chunk by chunk, in the forward pass.
"""

import math
from typing import Any

import torch

from tscale_fed.model.constants import UNIGRAM_OFFSET

CHUNK_LOGITS = 2**24
"""Logits alive at a time (64 MiB in fp32): beyond this a chunk gains nothing, a GPU is busy with far less."""

NO_TARGET = -1


def unigram_bias(counts: torch.Tensor) -> torch.Tensor:
    """Fixed output bias [V] in base-2 units, fp32, from raw token counts [V]."""
    return torch.log2(counts.to(torch.float64) + UNIGRAM_OFFSET).float()


def logits(state: torch.Tensor, final: torch.Tensor, bias2: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """Natural logits [..., V] of normalised states [..., E]; bias2 [V] in base-2 units; products in `compute`, result in final's dtype."""
    scaled = (final * final.shape[1] ** -0.5).to(compute)
    return (state.to(compute) @ scaled.T).to(final.dtype) + bias2.to(final.dtype) * math.log(2.0)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state: torch.Tensor, final: torch.Tensor, bias2: torch.Tensor, target: torch.Tensor, compute: torch.dtype
    ) -> torch.Tensor:
        scale = final.shape[1] ** -0.5
        scaled = (final * scale).to(compute)
        bias = bias2.to(final.dtype) * math.log(2.0)
        needs_grad = any(ctx.needs_input_grad[:2])
        grad_state = torch.empty_like(state) if needs_grad else None
        grad_final = torch.zeros_like(final) if needs_grad else None
        total = torch.zeros((), device=state.device, dtype=final.dtype)
        rows = max(1, CHUNK_LOGITS // final.shape[0])
        for start in range(0, state.shape[0], rows):
            part = state[start : start + rows].to(compute)
            wanted = target[start : start + rows].unsqueeze(-1)
            has_target = wanted != NO_TARGET
            wanted = wanted.clamp_min(0)
            log_p = torch.log_softmax((part @ scaled.T).to(final.dtype).add_(bias), dim=-1)
            total -= torch.where(has_target, log_p.gather(-1, wanted), 0.0).sum()
            if grad_state is not None and grad_final is not None:
                error = log_p.exp_().scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=log_p.dtype))
                error = error.mul_(has_target).to(compute)
                grad_state[start : start + rows] = error @ scaled
                grad_final += error.T @ part
        if grad_final is not None:
            ctx.save_for_backward(grad_state, grad_final.mul_(scale))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        grad_state, grad_final = ctx.saved_tensors
        return grad_state * grads[0], grad_final * grads[0], None, None, None


def summed_loss(state: torch.Tensor, final: torch.Tensor, bias2: torch.Tensor, target: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """0-dim loss sum in nats. state [B, T, E] normalised, final [V, E], bias2 [V], target int64 [B, T] with -1 for "no target"."""
    return _SummedLoss.apply(state.flatten(0, -2), final, bias2, target.flatten(), compute)
