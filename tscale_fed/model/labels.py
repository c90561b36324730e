"""Labels: enters tokens, leaves the embedding rows that make a position's start state, with signs.

Rule (TScale): start state = sum over k of sign_k * embedding[label_k]. Rows stand in the order noise rows | dropped token | one per token.
Every position has its token's row, or with token drop (training only) the dropped row; the target of a dropped token is still learnt.
With noise rows (training only) every position also adds one row and subtracts another, both drawn evenly: noise that is itself trained.
"""

import torch

from tscale_fed.model.shape import ModelShape


def draw_token_keep(text: torch.Tensor, keep_probability: float, generator: torch.Generator) -> torch.Tensor:
    """Token-drop mask [B, T] bool, True = kept, drawn from `generator` (on its device, then moved to text's)."""
    return (torch.rand(text.shape, generator=generator, device=generator.device) < keep_probability).to(text.device)


def input_labels(
    shape: ModelShape, text: torch.Tensor, token_keep: torch.Tensor | None = None, noise: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels int64 [B, T, K], signs [K] of +-1 as fp32): K = 1, or 3 when `noise` is given and the shape has noise rows."""
    row = shape.noise_rows + 1 + text
    if token_keep is not None:
        row = torch.where(token_keep, row, shape.noise_rows)
    if noise is None or shape.noise_rows == 0:
        return row.unsqueeze(-1), torch.ones(1, device=text.device)
    drawn = torch.randint(shape.noise_rows, (*text.shape, 2), generator=noise, device=noise.device).to(text.device)
    signs = torch.ones(3, device=text.device)
    signs[2] = -1.0
    return torch.cat((row.unsqueeze(-1), drawn), dim=-1), signs


def embed(embedding: torch.Tensor, labels: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Start state [B, T, E] of labels [B, T, K] with signs [K] or [B, T, K]; a sign of 0 leaves a label out."""
    count = labels.shape[-1]
    weights = signs.to(embedding.dtype).expand(labels.shape).reshape(-1, count)
    state = torch.nn.functional.embedding_bag(labels.reshape(-1, count), embedding, per_sample_weights=weights, mode="sum")
    return state.unflatten(0, labels.shape[:-1])
