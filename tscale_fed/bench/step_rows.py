"""The ways to make a training step that `bench step` compares: the compiled baseline and the engine in its precisions.

Enters: a row's name and the sizes. Leaves: something with `step(index, rate)`. A name is `baseline`, or PRECISION[/ATTENTION][@host]:
`int8`, `int8/fp8`, `fp8/fp8`, `bfloat16`, `int8/fp8@host` (optimizer and master weights in host memory).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tscale_fed.bench.compiled_layer import LocalWay
from tscale_fed.bench.options import formats_of
from tscale_fed.model.shape import ModelShape
from tscale_net.errors import Refused

BASELINE = "baseline"
HOST = "@host"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What all rows have in common."""

    shape: ModelShape
    fragments: int
    tokens: int
    device: torch.device

    @property
    def step_tokens(self) -> int:
        return self.fragments * self.tokens


@dataclass(frozen=True, slots=True)
class RowOptions:
    """What changes a row without changing its arithmetic. `micro_batches`: 0 = chosen from free memory."""

    micro_batches: int = 0
    plan: str = "auto"
    stream: torch.dtype = torch.float32
    local: LocalWay = "flex"
    graphs: bool = True


class Row(Protocol):
    """A model that can be stepped."""

    def step(self, index: int, rate: float) -> Tensor | float:
        """One step on batch `index`; the loss sum before it."""
        ...

    def facts(self) -> dict[str, Any]:
        """What there is to tell beside times: JSON values, "plan" in words, "host_bytes" of pinned memory."""
        ...

    def close(self) -> None:
        """After the last step."""
        ...


def zipf_batches(sizes: Sizes, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(text, target) int64 [B, T] in pinned host memory: tokens drawn with probability 1 / (rank + 2.7), as words of a language are."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / (torch.arange(sizes.shape.vocab) + 2.7)
    batches = []
    for _ in range(count):
        drawn = torch.multinomial(weights, sizes.fragments * (sizes.tokens + 1), replacement=True, generator=generator)
        ids = drawn.view(sizes.fragments, -1)
        text, target = ids[:, :-1].clone(), ids[:, 1:].clone()
        target[:, 0] = -1
        batches.append((text, target) if sizes.device.type != "cuda" else (text.pin_memory(), target.pin_memory()))
    return batches


def make_row(name: str, sizes: Sizes, batches: list[tuple[Tensor, Tensor]], options: RowOptions, say: Say) -> Row:
    """Build a row at step 0. Raises Refused for names and precisions that do not exist or that the device lacks."""
    from tscale_fed.bench.compiled_baseline import random_start

    start = random_start(sizes.shape, sizes.device, seed=1)
    if name.endswith(HOST) and sizes.device.type == "cuda":
        start = start.cpu()  # this row's point is what the GPU does not hold
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(sizes.device)
    if name == BASELINE:
        return BaselineRow(sizes, start, batches, options)
    return EngineRow(name, sizes, start, batches, options, say)


class BaselineRow:
    """See `compiled_baseline`."""

    def __init__(self, sizes: Sizes, start: Tensor, batches: list[tuple[Tensor, Tensor]], options: RowOptions) -> None:
        from tscale_fed.bench.compiled_baseline import CompiledBaseline, micro_batches_for

        on_gpu = sizes.device.type == "cuda"
        free = torch.cuda.mem_get_info(sizes.device)[0] if on_gpu else 8e9
        self._micro_batches = options.micro_batches or micro_batches_for(sizes.shape, sizes.fragments, sizes.tokens, free)
        self._batches, self._device = batches, sizes.device
        self._model = CompiledBaseline(
            sizes.shape, start, torch.zeros(sizes.shape.vocab), fragments=sizes.fragments, tokens=sizes.tokens, device=sizes.device,
            micro_batches=self._micro_batches, local=options.local,
        )  # fmt: skip

    def step(self, index: int, rate: float) -> Tensor:
        text, target = (x.to(self._device, non_blocking=True) for x in self._batches[index % len(self._batches)])
        return self._model.step(text, target, rate)

    def facts(self) -> dict[str, Any]:
        return {"micro_batches": self._micro_batches, "plan": f"bf16 torch.compile, {self._micro_batches} micro-batches"}

    def close(self) -> None:
        """Nothing to do."""


class EngineRow:
    """See `tscale_fed.engine`."""

    def __init__(
        self, name: str, sizes: Sizes, start: Tensor, batches: list[tuple[Tensor, Tensor]], options: RowOptions, say: Say
    ) -> None:
        from tscale_fed.engine.build import build_engine
        from tscale_fed.engine.interface import StepBatch

        formats, _, place = name.partition("@")
        precision, attention = formats_of(formats)
        if place not in ("", "host"):
            raise Refused("bad-bench", f"row '{name}': '@{place}' is unknown; write for example int8/fp8 or int8/fp8@host")
        more: dict[str, Any] = {"optimizer_place": "host"} if place else {}
        micro = sizes.fragments // options.micro_batches if options.micro_batches else 0
        self._batches = [StepBatch.make(sizes.shape, text, target) for text, target in batches]
        self._engine = build_engine(
            sizes.shape, start, device=sizes.device, precision=precision, attention=attention, fragments=sizes.fragments,
            tokens=sizes.tokens, micro_batch=micro, plan=options.plan, stream=options.stream, graphs=None if options.graphs else False,
            say=say, **more,
        )  # fmt: skip

    def step(self, index: int, rate: float) -> Tensor | float:
        return self._engine.step(self._batches[index % len(self._batches)]._replace(step=index, seed=index), rate)

    def facts(self) -> dict[str, Any]:
        from tscale_fed.bench.memory_forecast import forecast

        return {"plan": str(self._engine.plan), "micro_batches": self._engine.plan.micro_batches, **forecast(self._engine)}

    def close(self) -> None:
        from tscale_fed.engine.host_engine import HostEngine

        if isinstance(self._engine, HostEngine):
            self._engine.close()
