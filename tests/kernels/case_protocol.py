"""Cases: one description of a kernel's call for the interpreter test, the GPU check, the ahead-of-time gate, the bench and the tuner.

A cases module (cases_matmul.py, cases_backward.py, cases_attention.py, cases_ends.py) holds

    CASES: dict[str, Callable[[Setting], Case]]         # "project int8" -> builder; first word = op name, as in launch_table.toml

A builder makes fresh inputs with the setting's helpers (its device, its seed) and returns a Case whose closures use them:

    def project(setting: Setting, code: torch.dtype) -> Case:
        s = setting.sizes
        n = setting.vector_codes(s.rows, s.width, code)
        w, units = setting.weights(4 * s.attention_width, s.width, code, segments=4)
        return Case(
            outputs=lambda: {"key": setting.poisoned((s.rows, s.attention_width), code), "rms": ..., ...},
            run=lambda out, backend: matmul_norm.project(n, w, units, ..., key=out["key"], rms=out["rms"], backend=backend),
            limits={"key": ONE_CODE_OFF, "rms": 1e-6},
            matmul=(s.rows, 4 * s.attention_width, s.width),
            bytes_moved=...,
        )
    CASES = {f"project {name}": partial(project, code=code) for name, code in CODES.items()}

Rules
- `outputs()` makes new buffers each time: poisoned where the op writes everything, zeros for scratch that the caller zeroes, a clone of
  the start value for what changes in place. `run` calls the public function once, allocates nothing, returns nothing. It is called with
  backend "ref" and "triton" on different buffers, and many times on the same ones when it is timed.
- What is compared: every name in `limits`, Triton's against ref's. 0 means bit for bit, a positive number is a relative Frobenius error,
  ONE_CODE_OFF allows neighbouring codes on 1e-4 of the elements. Names left out (scratch) are not compared.
- `exact` (optional) gives fp64 results of the formula, from the same inputs; ref and Triton must lie within `exact_limits` of them.
- A case for odd shapes ignores `setting.sizes`, and says timed=False. A case that cannot run in a setting raises Skip("why").
- No torch.randn outside the helpers; nothing at import but the dictionary. Real tensors always (no meta tensors), also ahead of time.
- The ahead-of-time gate runs the case on CPU tensors with backend "triton" and intercepts the launches, so authors do nothing for it, but:
  an op learns the card only through `tiles.capability(device)` (or `torch.cuda.get_device_capability`) and `tiles.uses_tma(device)`.
  What a compile may look like (spills allowed, instruction required) is listed in ahead_of_time.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tscale_kernels import codes, launch_table
from tscale_kernels.dispatch import BackendName
from tscale_kernels.testing import poisoned

Tensors = dict[str, Tensor]
CODES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}
"""Name in a case -> code dtype."""


class Skip(Exception):
    """A case that a setting cannot run, with the reason."""


@dataclass(frozen=True)
class CodeLimit:
    """At most `share` of the elements differ, and those by one code (the next number of their dtype)."""

    share: float


ONE_CODE_OFF = CodeLimit(1e-4)
Limit = float | CodeLimit


@dataclass(frozen=True)
class AttentionSize:
    """What a baseline of attention computes: heads of 128 channels over whole fragments."""

    fragments: int
    heads: int
    tokens: int
    width: int
    part: Literal["forward", "backward"]

    @property
    def operations(self) -> int:
        """Multiplications and additions over the pairs (token, earlier token in its window); backward has 5 products, forward 2."""
        pairs = sum(min(token, self.width) for token in range(self.tokens))
        return self.fragments * self.heads * pairs * 2 * 128 * (2 if self.part == "forward" else 5)


@dataclass(frozen=True)
class Case:
    """One call of an op, see the module's docstring."""

    outputs: Callable[[], Tensors]
    run: Callable[[Tensors, BackendName], None]
    limits: Mapping[str, Limit]
    exact: Callable[[], Tensors] | None = None
    exact_limits: Mapping[str, float] = field(default_factory=dict)
    matmul: tuple[int, int, int] | None = None
    """(rows, columns, contraction) of the product inside, of all its products if several have the same rows and columns (add their
    contractions); the bench puts bf16 cuBLAS of the same size beside it."""
    attention: AttentionSize | None = None
    """The bench puts torch's SDPA of the same size beside it."""
    bytes_moved: int = 0
    """Least traffic with memory: inputs and outputs once each."""
    timed: bool = True

    @property
    def operations(self) -> int:
        """Of the product or the attention; 0 for what only moves bytes."""
        product = 2 * self.matmul[0] * self.matmul[1] * self.matmul[2] if self.matmul else 0
        return product + (self.attention.operations if self.attention else 0)


@dataclass(frozen=True)
class Sizes:
    """Model and micro-batch sizes as in the contract: E = width, A = 128 * heads, F = A * ffn_multiple, M = rows."""

    name: str
    fragments: int
    tokens: int
    width: int
    heads: int
    vocab: int
    window: int
    ffn_multiple: int = 1

    @property
    def rows(self) -> int:
        """M: tokens of all fragments, rounded up to 128."""
        return rounded_up(self.fragments * self.tokens)

    @property
    def attention_width(self) -> int:
        return 128 * self.heads

    @property
    def ffn_width(self) -> int:
        return self.attention_width * self.ffn_multiple

    @property
    def padded_vocab(self) -> int:
        return rounded_up(self.vocab)


def rounded_up(count: int, multiple: int = 128) -> int:
    return -(-count // multiple) * multiple


TINY = Sizes("tiny", fragments=3, tokens=40, width=256, heads=1, vocab=150, window=24)
"""For the interpreter: 120 tokens in 128 rows, a window that cuts fragments, two groups in the state."""
GATE = Sizes("gate", fragments=2, tokens=128, width=1280, heads=4, vocab=640, window=128)
"""For ahead-of-time compiles: real widths, divisible as in a real run, few rows."""
SMALL = Sizes("e256h2w256 64x256", fragments=64, tokens=256, width=256, heads=2, vocab=257, window=256)
FULL = Sizes("e1280h20w1024 24x1024", fragments=24, tokens=1024, width=1280, heads=20, vocab=50257, window=1024)


@dataclass
class Setting:
    """Where and how large a case is built. Every helper draws fresh numbers from the seed, on the device."""

    sizes: Sizes
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Gaussian numbers."""
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(dtype)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        """fp32 in [low, high)."""
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def integers(self, shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """low <= value < high."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def permutation(self, count: int) -> Tensor:
        """int32 [count]."""
        return torch.randperm(count, generator=self.generator, device=self.device, dtype=torch.int32)

    def vector_codes(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Codes of vectors of unit RMS (per row, roughly); the rows behind the last token are zero."""
        numbers = self.normal((rows, columns))
        if rows == self.sizes.rows:
            numbers[self.sizes.fragments * self.sizes.tokens :] = 0
        return codes.encode(numbers * codes.vector_scale(dtype), dtype)

    def weights(self, rows: int, columns: int, dtype: torch.dtype, segments: int = 1) -> tuple[Tensor, Tensor]:
        """(codes [rows, columns], units fp32 [segments]) of a matrix whose segments have different RMS."""
        units = self.uniform((segments,), 0.5, 2.0) / codes.weight_scale(dtype)
        return codes.encode(self.normal((rows, columns)) * codes.weight_scale(dtype), dtype), units

    def gradients(self, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Gradients as training has them: rows of very different size, some exactly zero."""
        size = torch.exp(self.normal((rows, 1))) * 1e-4
        size[:: max(2, rows // 8)] = 0
        return (self.normal((rows, columns)) * size).to(dtype)

    def rotary(self) -> tuple[Tensor, Tensor]:
        """(cosine, sine) fp32 [tokens, 64]: any angles will do for a kernel."""
        angle = torch.arange(self.sizes.tokens, device=self.device)[:, None] * 10000.0 ** (-torch.arange(64, device=self.device) / 64)
        return angle.cos().float().contiguous(), angle.sin().float().contiguous()

    def document_start(self) -> Tensor:
        """int32 [rows]: each fragment cut into two or three documents."""
        tokens = self.sizes.tokens
        cut = self.integers((self.sizes.rows // tokens + 1, 2), 1, tokens).sort(dim=1).values
        position = torch.arange(tokens, device=self.device)
        later = cut[:, 1:] * (position >= cut[:, 1:])
        start = torch.maximum(later, cut[:, :1] * (position >= cut[:, :1]))
        return start.reshape(-1)[: self.sizes.rows].to(torch.int32).contiguous()

    def step_seed(self) -> Tensor:
        """int32 [1] for dithered rounding."""
        return self.integers((1,), -(2**31), 2**31 - 1, torch.int32)

    def poisoned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An output whose bytes are all 0x55."""
        return poisoned(shape, dtype, self.device)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Scratch that the caller of an op zeroes."""
        return torch.zeros(shape, dtype=dtype, device=self.device)


@contextmanager
def replaced_row(op: str, config: Mapping[str, int]) -> Iterator[None]:
    """The launch table with other values in the rows of one operation; keys that the configuration leaves out stay."""
    original = launch_table._row

    def row(name: str, arch: int, code: torch.dtype | None) -> launch_table.Config:
        return {**original(name, arch, code), **(config if name == op else {})}

    launch_table._row = row  # type: ignore[assignment]
    try:
        yield
    finally:
        launch_table._row = original


def compare(name: str, got: Tensor, want: Tensor, limit: Limit) -> tuple[bool, str]:
    """(within the limit, the figures as text)."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False, f"{name} is {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    if isinstance(limit, CodeLimit):
        return _compare_codes(name, got, want, limit)
    if limit == 0:
        wrong = int((as_bits(got) != as_bits(want)).sum())
        return _verdict(wrong == 0, f"{name} same bits" if wrong == 0 else f"{name} {wrong}/{got.numel()} elements differ", got, want)
    error = relative_error(got, want)
    return _verdict(error <= limit, f"{name} {error:.1e} (limit {limit:.0e})", got, want)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error; absolute where `want` is zero. A NaN on one side only, or an infinity, is an infinite error."""
    a, b = got.double(), want.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.linalg.vector_norm(torch.where(same, 0.0, a - b)).item()
    size = torch.linalg.vector_norm(torch.where(b.isfinite(), b, 0.0)).item()
    error = difference / size if size > 0 else difference
    return error if math.isfinite(error) else math.inf


def as_bits(x: Tensor) -> Tensor:
    """The bits of every element as an integer tensor (so that NaN equals itself)."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _compare_codes(name: str, got: Tensor, want: Tensor, limit: CodeLimit) -> tuple[bool, str]:
    distance = (_code_number(got) - _code_number(want)).abs()
    share, farthest = float((distance > 0).double().mean()), int(distance.max())
    good = share <= limit.share and farthest <= 1
    return _verdict(good, f"{name} {share:.1e} off by {farthest} (limit {limit.share:.0e} off by 1)", got, want)


def _code_number(x: Tensor) -> Tensor:
    """int32 that grows by one from each number of the dtype to the next; both zeros are 0."""
    if not x.dtype.is_floating_point:
        return x.to(torch.int32)
    bits, sign = as_bits(x).to(torch.int32), 1 << (8 * x.element_size() - 1)
    magnitude = bits & (sign - 1)
    return torch.where((bits & sign) != 0, -magnitude, magnitude)


def _verdict(good: bool, figures: str, got: Tensor, want: Tensor) -> tuple[bool, str]:
    """The figures and, for a failure, the first element that differs."""
    if good:
        return True, figures
    at = int((as_bits(got) != as_bits(want)).reshape(-1).to(torch.uint8).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), got.shape)]
    return False, f"{figures}; first at {place}: {got.reshape(-1)[at].item():.6g}, expected {want.reshape(-1)[at].item():.6g}"
