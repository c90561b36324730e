"""The model: enters token ids and targets, leaves the summed loss or logits; weights come from `Parameters`.

A layer (TScale), `lin(x, W) = x W^T / sqrt(inputs)`, `norm` = group normalisation, `rope` = rotary embedding:
    n = norm(x);  q = rope(norm(lin(n, query)));  k = rope(lin(n, key));  g = norm(lin(n, gate));  v = norm(lin(n, value))
    x = x + lin(combine(g, attention(q, k, v)), combiner)
    x = x + lin(relu(norm(lin(norm(x), ffn_up))), ffn_down)
The state x stays in the parameters' dtype; with `compute_dtype` (bf16 on CUDA) the products and what enters them are of that dtype.
`forward` holds everything between labels and the final normalised state and has no branch on data, so `model.compile()` works.
"""

from typing import NamedTuple

import torch

from tscale_fed.model.attention import AttentionPlan, attend, build_plan
from tscale_fed.model.combiner import blocked_channels, blocked_columns, pair_products
from tscale_fed.model.constants import HEAD_CHANNELS
from tscale_fed.model.labels import embed, input_labels
from tscale_fed.model.loss import NO_TARGET, logits, summed_loss
from tscale_fed.model.normalise import normalise
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.rotary import rotary_table, rotate
from tscale_fed.model.rounding import WeightRounding
from tscale_fed.model.shape import ModelShape


class LayerWeights(NamedTuple):
    """The seven matrices of a layer, [outputs, inputs] each, in canonical order."""

    query: torch.Tensor
    key: torch.Tensor
    gate: torch.Tensor
    value: torch.Tensor
    combiner: torch.Tensor
    ffn_up: torch.Tensor
    ffn_down: torch.Tensor


class BatchPlan(NamedTuple):
    """Everything of a batch that does not depend on weights."""

    attention: AttentionPlan
    cosine: torch.Tensor
    sine: torch.Tensor


class _Matrices(torch.nn.Module):
    """Holds matrices under their own names, so that `model.named_parameters()` speaks the names of `ModelShape.tensors`."""

    def __init__(self, matrices: dict[str, torch.nn.Parameter]) -> None:
        super().__init__()
        for name, matrix in matrices.items():
            self.register_parameter(name, matrix)


class Model(torch.nn.Module):
    """A TScale model over `parameters`. `bias2` [V] is the fixed output bias in base-2 units (`loss.unigram_bias`); None is zero.

    Raises ValueError when the bias does not fit the vocabulary.
    """

    def __init__(
        self,
        shape: ModelShape,
        parameters: Parameters,
        bias2: torch.Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bias2 is not None and bias2.shape != (shape.vocab,):
            raise ValueError(f"output bias of shape {tuple(bias2.shape)} does not fit a vocabulary of {shape.vocab}; give one per token")
        self.shape = shape
        self.parameter_store = parameters
        self.compute_dtype = compute_dtype or parameters.flat.dtype
        views = parameters.views
        self.embedding, self.final = views["embedding"], views["final"]
        self.layers = torch.nn.ModuleList(
            _Matrices({name: views[f"layers.{index}.{name}"] for name in LayerWeights._fields}) for index in range(len(shape.layers()))
        )
        self._kinds = tuple(dict.fromkeys(shape.layers()))
        self._kind_of_layer = tuple(self._kinds.index(kind) for kind in shape.layers())
        self._plans: dict[tuple[int, int], BatchPlan] = {}
        device = parameters.device
        self.bias2 = torch.zeros(shape.vocab) if bias2 is None else bias2
        self.bias2 = self.bias2.to(device, parameters.flat.dtype)
        self._channels = blocked_channels(shape.heads).to(device)
        self._columns = blocked_columns(shape.heads).to(device)

    def _apply(self, fn: object, recurse: bool = True) -> "Model":
        raise TypeError("a Model cannot be moved or converted; build Parameters with the wanted device and dtype and a new Model")

    def plan(self, text: torch.Tensor, doc_start_token: int | None) -> BatchPlan:
        """The batch plan of text [B, T]; plans without documents depend on the sizes only and are kept."""
        key = (text.shape[0], text.shape[1])
        if doc_start_token is None and key in self._plans:
            return self._plans[key]
        cosine, sine = self._rotary(text)
        plan = BatchPlan(build_plan(self._kinds, text, doc_start_token, self.compute_dtype), cosine, sine)
        if doc_start_token is None:
            self._plans = {key: plan}  # one is enough: a run has one batch size; more would only hold memory
        return plan

    def _rotary(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for plan in self._plans.values():
            if plan.cosine.shape[0] == text.shape[1]:
                return plan.cosine, plan.sine
        return rotary_table(text.shape[1], text.device, self.bias2.dtype)

    def _layer_weights(self, index: int, rounding: WeightRounding | None) -> LayerWeights:
        layer = self.layers[index]
        weights = LayerWeights(*(getattr(layer, name) for name in LayerWeights._fields))
        if rounding is None:
            return weights
        return LayerWeights(*(rounding(f"layers.{index}.{name}", w) for name, w in zip(LayerWeights._fields, weights, strict=True)))

    def _linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x W^T / sqrt(inputs) in the compute dtype; the factor goes to the weight, which is smaller than x."""
        return x @ (weight * weight.shape[1] ** -0.5).to(self.compute_dtype).T

    def _attention(self, x: torch.Tensor, weights: LayerWeights, kind: int, plan: BatchPlan) -> torch.Tensor:
        """What attention adds to state x [B, T, E]. Gate and value channels are in blocked order (`combiner`)."""
        joined = torch.cat(
            (weights.query, weights.gate.index_select(0, self._channels), weights.value.index_select(0, self._channels), weights.key)
        )
        projected = self._linear(normalise(x, self.compute_dtype), joined).unflatten(-1, (4, self.shape.heads, HEAD_CHANNELS))
        to_normalise, key = projected.split((3, 1), dim=2)
        query, gate, value = normalise(to_normalise).unbind(2)
        attended = attend(
            rotate(query, plan.cosine, plan.sine),
            rotate(key.squeeze(2), plan.cosine, plan.sine),
            value,
            self._kinds[kind],
            plan.attention.biases[kind],
            plan.attention.same_document,
        )
        return self._linear(pair_products(gate, attended), weights.combiner.index_select(1, self._columns))

    def _feed_forward(self, x: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
        """What the feed-forward step adds to state x [B, T, E]."""
        hidden = normalise(self._linear(normalise(x, self.compute_dtype), weights.ffn_up))
        return self._linear(torch.relu(hidden), weights.ffn_down)

    def forward(self, labels: torch.Tensor, signs: torch.Tensor, plan: BatchPlan, rounding: WeightRounding | None = None) -> torch.Tensor:
        """Normalised final state [B, T, E] of labels [B, T, K] with signs [K] or [B, T, K]."""
        embedding = self.embedding if rounding is None else rounding("embedding", self.embedding)
        x = embed(embedding, labels, signs)
        for index, kind in enumerate(self._kind_of_layer):
            weights = self._layer_weights(index, rounding)
            x = x + self._attention(x, weights, kind, plan)
            x = x + self._feed_forward(x, weights)
        return normalise(x, self.compute_dtype)

    def _final(self, rounding: WeightRounding | None) -> torch.Tensor:
        return self.final if rounding is None else rounding("final", self.final)

    def loss_of_labels(
        self,
        labels: torch.Tensor,
        signs: torch.Tensor,
        plan: BatchPlan,
        target: torch.Tensor,
        weight_rounding: WeightRounding | None = None,
    ) -> torch.Tensor:
        """Loss sum in nats (0-dim) of given labels; target int64 [B, T], -1 = no target."""
        state = self(labels, signs, plan, weight_rounding)
        return summed_loss(state, self._final(weight_rounding), self.bias2, target, self.compute_dtype)

    def loss(
        self,
        text: torch.Tensor,
        target: torch.Tensor,
        *,
        doc_start_token: int | None = None,
        token_keep: torch.Tensor | None = None,
        noise: torch.Generator | None = None,
        weight_rounding: WeightRounding | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss sum in nats, number of positions with a target), both 0-dim on the model's device.

        text, target  int64 [B, T]; target -1 = no target (position 0 of a fragment)
        doc_start_token  token that starts a document: attention does not cross it; None = documents are not told apart
        token_keep    bool [B, T], False = dropped (`labels.draw_token_keep`); None = all kept
        noise         generator for the noise rows; None = no noise (always so in evaluation)
        weight_rounding  how the forward pass sees weights (`rounding.round_weights`); None = as they are
        """
        labels, signs = input_labels(self.shape, text, token_keep, noise)
        total = self.loss_of_labels(labels, signs, self.plan(text, doc_start_token), target, weight_rounding)
        return total, (target != NO_TARGET).sum()

    @torch.no_grad()
    def logits(
        self, text: torch.Tensor, *, doc_start_token: int | None = None, weight_rounding: WeightRounding | None = None
    ) -> torch.Tensor:
        """Natural logits [B, T, V] of the next token at every position of text [B, T]; no token drop, no noise, no gradient."""
        labels, signs = input_labels(self.shape, text)
        state = self(labels, signs, self.plan(text, doc_start_token), weight_rounding)
        return logits(state, self._final(weight_rounding), self.bias2, self.compute_dtype)
