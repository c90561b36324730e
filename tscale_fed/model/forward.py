"""The model: enters token ids and targets, leaves the summed loss or logits; weights come from `Parameters`.

    labels -> signed sum of embedding rows -> `layer` after `layer` -> group normalisation -> final layer and loss
The state stays in the parameters' dtype; with `compute_dtype` (bf16) the products and what enters them are of that dtype.
`forward` holds everything between labels and the final normalised state.
"""

from collections.abc import Callable
from typing import Any

import torch

from tscale_fed.model.attention import build_plan
from tscale_fed.model.combiner import blocked_channels, blocked_columns
from tscale_fed.model.labels import embed, input_labels
from tscale_fed.model.layer import LayerPlan, LayerWeights, layer
from tscale_fed.model.loss import NO_TARGET, logits, summed_loss
from tscale_fed.model.normalise import normalise
from tscale_fed.model.parameters import Parameters
from tscale_fed.model.rotary import rotary_table
from tscale_fed.model.rounding import WeightRounding
from tscale_fed.model.shape import ModelShape

BatchPlan = tuple[LayerPlan, ...]
"""Everything of a batch that does not depend on weights: one entry per distinct (width, slope) of the model."""


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
        self._layer: Callable[[torch.Tensor, LayerWeights, LayerPlan, torch.dtype], torch.Tensor] = layer
        self._plan: BatchPlan | None = None
        self._plan_size: torch.Size | None = None
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        device = parameters.device
        self.bias2 = torch.zeros(shape.vocab) if bias2 is None else bias2
        self.bias2 = self.bias2.to(device, parameters.flat.dtype)
        self._channels = blocked_channels(shape.heads).to(device)
        self._columns = blocked_columns(shape.heads).to(device)

    def _apply(self, fn: object, recurse: bool = True) -> "Model":
        raise TypeError("a Model cannot be moved or converted; build Parameters with the wanted device and dtype and a new Model")

    def compile(self, *args: Any, **options: Any) -> None:
        """torch.compile with `options`, layer by layer: layers of one kind share a graph, so that deep models compile like shallow ones.

        Sizes are static unless `dynamic` is given: a batch of another size compiles anew. Measured on an H100, e512h3d50w1024, 16 x 1024
        tokens, bf16 products: 66 000 tokens/s as it is, 130 000 compiled, one minute of compiling.
        """
        self._layer = torch.compile(layer, *args, **{"dynamic": False, **options})

    def plan(self, text: torch.Tensor, doc_start_token: int | None) -> BatchPlan:
        """The batch plan of text [B, T]; the last plan without documents depends on the sizes only and is kept."""
        if doc_start_token is None and self._plan is not None and self._plan_size == text.shape:
            return self._plan
        attention = build_plan(self._kinds, text, doc_start_token, self.compute_dtype)
        cosine, sine = self._rotary(text.shape[1])
        plan = tuple(
            LayerPlan(kind, bias, attention.same_document, cosine, sine, self._channels, self._columns)
            for kind, bias in zip(self._kinds, attention.biases, strict=True)
        )
        if doc_start_token is None:
            self._plan, self._plan_size = plan, text.shape
        return plan

    def _rotary(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last table is kept: a run has one fragment length."""
        if self._table is None or self._table[0].shape[0] != tokens:
            self._table = rotary_table(tokens, self.bias2.device, self.bias2.dtype)
        return self._table

    def _layer_weights(self, index: int, rounding: WeightRounding | None) -> LayerWeights:
        matrices = self.layers[index]
        weights = LayerWeights(*(getattr(matrices, name) for name in LayerWeights._fields))
        if rounding is None:
            return weights
        return LayerWeights(*(rounding(f"layers.{index}.{name}", w) for name, w in zip(LayerWeights._fields, weights, strict=True)))

    def forward(self, labels: torch.Tensor, signs: torch.Tensor, plan: BatchPlan, rounding: WeightRounding | None = None) -> torch.Tensor:
        """Normalised final state [B, T, E] of labels [B, T, K] with signs [K] or [B, T, K]."""
        embedding = self.embedding if rounding is None else rounding("embedding", self.embedding)
        x = embed(embedding, labels, signs)
        for index, kind in enumerate(self._kind_of_layer):
            x = self._layer(x, self._layer_weights(index, rounding), plan[kind], self.compute_dtype)
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
