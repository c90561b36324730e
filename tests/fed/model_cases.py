"""Shared by the model tests: small models with random weights everywhere, and the model written out from its rules in the slowest way."""

import math

import torch

from tscale_fed.model.attention import attention_ref, document_numbers
from tscale_fed.model.combiner import combine_ref
from tscale_fed.model.forward import Model
from tscale_fed.model.labels import input_labels
from tscale_fed.model.normalise import normalise_ref
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.shape import ModelShape

DOC_START = 3


def random_model(dims: str, *, vocab: int = 19, noise_rows: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    """A model whose combiner, feed-forward down and noise rows are not zero, with a random output bias."""
    generator = torch.Generator().manual_seed(seed)
    shape = ModelShape.parse(dims, vocab, noise_rows)
    flat = 0.7 * torch.randn(shape.trained_parameters, generator=generator, dtype=torch.float64)
    bias2 = torch.randn(vocab, generator=generator, dtype=torch.float64)
    return Model(shape, Parameters(shape, dtype=dtype).load(flat), bias2)


def random_text(fragments: int, tokens: int, *, vocab: int = 19, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, target) with a document start now and then; position 0 has no target."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(vocab, (fragments, tokens), generator=generator)
    target = torch.randint(vocab, (fragments, tokens), generator=generator)
    target[:, 0] = -1
    return text, target


def rope_by_definition(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [B, T, H, 128], by a table of each channel's partner, sign and frequency."""
    channel = torch.arange(128)
    second = channel % 64 >= 32
    partner = torch.where(second, channel - 32, channel + 32)
    frequency = 500_000.0 ** (-2.0 * (channel // 64 * 32 + channel % 32).double() / 128)
    angle = torch.arange(x.shape[1]).double()[:, None, None] * frequency
    return x * angle.cos().to(x.dtype) + torch.where(second, 1.0, -1.0) * x[..., partner] * angle.sin().to(x.dtype)


def logits_by_definition(
    model: Model, labels: torch.Tensor, signs: torch.Tensor, text: torch.Tensor, doc_start_token: int | None
) -> torch.Tensor:
    """Natural logits [B, T, V] from the reference forms of every part."""
    shape, weights = model.shape, model.parameter_store.views

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return (x @ weights[name].T) / math.sqrt(weights[name].shape[1])

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (shape.heads, 128))

    document = None if doc_start_token is None else document_numbers(text, doc_start_token)
    x = (weights["embedding"][labels] * signs.to(weights["embedding"].dtype).unsqueeze(-1)).sum(-2)
    for index, (width, slope) in enumerate(shape.layers()):
        layer = f"layers.{index}."
        n = normalise_ref(x)
        query = rope_by_definition(heads(normalise_ref(linear(n, layer + "query"))))
        key = rope_by_definition(heads(linear(n, layer + "key")))
        gate = heads(normalise_ref(linear(n, layer + "gate")))
        value = heads(normalise_ref(linear(n, layer + "value")))
        x = x + linear(combine_ref(gate, attention_ref(query, key, value, width, slope, document)), layer + "combiner")
        hidden = normalise_ref(linear(normalise_ref(x), layer + "ffn_up"))
        x = x + linear(hidden.relu(), layer + "ffn_down")
    return linear(normalise_ref(x), "final") + math.log(2.0) * model.bias2


def loss_by_definition(model: Model, text: torch.Tensor, target: torch.Tensor, doc_start_token: int | None) -> torch.Tensor:
    labels, signs = input_labels(model.shape, text)
    logits = logits_by_definition(model, labels, signs, text, doc_start_token)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="sum")
