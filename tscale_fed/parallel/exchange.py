"""Which exchange a run asked for, and engines that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from tscale_fed.model.parameters import Parameters
from tscale_fed.optimizer.rule import Optimizer
from tscale_fed.parallel.buckets import build_buckets
from tscale_fed.parallel.engine import GroupEngine
from tscale_fed.parallel.exact import ExactExchange, GradientExchange
from tscale_fed.parallel.group import Group
from tscale_fed.parallel.onebit import OneBitExchange
from tscale_kernels.gradient_onebit import MAX_AUTHORS
from tscale_net.errors import Refused

Gradients = Literal["exact", "onebit"]


def build_exchange(how: Gradients, group: Group, parameters: Parameters, optimizer: Optimizer) -> GradientExchange:
    """Of the flat gradient of `parameters`, whose layout all ranks share."""
    buckets = build_buckets(parameters.shape)
    if how == "exact":
        return ExactExchange(group, parameters, buckets)
    if group.world.size > MAX_AUTHORS:
        detail = f'{group.world.size} processes, but [parallel] gradients = "onebit" goes up to {MAX_AUTHORS}: write "exact"'
        raise Refused("bad-world", detail)
    return OneBitExchange(group, parameters, optimizer, buckets)


class Exchanging:
    """Builds a group's exchange along with its engine, and then holds it for checkpoints and reports."""

    def __init__(self, how: Gradients, group: Group) -> None:
        self.how = how
        self.group = group
        self._exchange: GradientExchange | None = None

    @property
    def exchange(self) -> GradientExchange:
        """Raises ValueError before an engine was built."""
        if self._exchange is None:
            raise ValueError("the exchange exists once the engine does")
        return self._exchange

    def over(self, parameters: Parameters, optimizer: Optimizer) -> GradientExchange:
        """The exchange of this model."""
        self._exchange = build_exchange(self.how, self.group, parameters, optimizer)
        return self._exchange

    @property
    def engine_type(self) -> Callable[..., GroupEngine]:
        """What makes a `GroupEngine` out of the arguments of an `Engine`."""

        def make(parameters: Parameters, optimizer: Optimizer, bias2: Tensor | None, **arguments: Any) -> GroupEngine:
            return GroupEngine(parameters, optimizer, bias2, exchange=self.over(parameters, optimizer), **arguments)

        return make
