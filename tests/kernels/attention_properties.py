"""Properties of attention and the combiner's products that hold for any numbers, for both backends.

As a script, python tests/kernels/attention_properties.py [cpu|cuda [PROPERTY ...]], checks the Triton kernels: in the interpreter or on
the card.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    _DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    os.environ["TRITON_INTERPRET"] = "1" if _DEVICE == "cpu" else "0"  # read when a kernel is defined
    _ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(_ROOT / room) for room in ("kernels", "net", "peers", ".")]

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tscale_kernels import codes
from tscale_kernels.attention import attend, ref_products
from tscale_kernels.attention_backward import attend_backward
from tscale_kernels.attention_backward_width1 import attend_backward_width1
from tscale_kernels.attention_width1 import attend_width1
from tscale_kernels.dispatch import BackendName
from tscale_kernels.head_gradient import GATE, KEY, QUERY, VALUE
from tscale_kernels.kv_product import products_backward
from tscale_kernels.testing import assert_close, assert_same_bits, poisoned

HEADS = 1
CHANNELS = 128 * HEADS


@dataclass
class Batch:
    """Random inputs of one layer, with a call of every op."""

    device: str
    backend: BackendName
    tokens: int
    width: int
    slope: float = 0.0
    code: torch.dtype = torch.int8
    starts: Tensor | None = None
    rows: int = 128

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.tokens * 1000 + self.width)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def vectors(code: torch.dtype) -> Tensor:
            return codes.encode(random(self.rows, CHANNELS) * codes.vector_scale(code), code).to(self.device)

        self.query, self.key, self.gate, self.value = vectors(self.code), vectors(self.code), vectors(self.code), vectors(torch.bfloat16)
        self.rms = (random(4 * HEADS, self.rows).abs() + 0.5).to(self.device)
        angle = random(self.tokens, 64).to(self.device)
        self.cosine, self.sine = angle.cos(), angle.sin()
        self.units = torch.tensor([0.5, 2.0, 3.0, 0.25], device=self.device)
        self.token_weight = (random(self.rows).abs() + 0.5).to(self.device)
        self.d_out = random(self.rows, CHANNELS).to(self.device, torch.bfloat16)

    @property
    def layer(self) -> dict[str, object]:
        return {"tokens": self.tokens, "slope": self.slope, "document_start": self.starts, "backend": self.backend}

    def forward(self, width1: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(out, log_sum, products)"""
        out, products = self.buffer(self.rows, CHANNELS), self.buffer(self.rows, 4 * CHANNELS, dtype=self.code)
        log_sum = self.buffer(HEADS, self.rows, dtype=torch.float32)
        inputs = (self.query, self.key, self.value, self.rms, self.gate)
        if width1:
            attend_width1(*inputs, **self.layer, out=out, products=products)
        else:
            attend(*inputs, **self.layer, width=self.width, out=out, log_sum=log_sum, products=products)
        return out, log_sum, products

    def backward(self, width1: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(d_projected [M, 4, A], row_max, column_max [4, A])"""
        d_projected, row_max, column_max = self.stores()
        given = {"d_out": self.d_out, "cosine": self.cosine, "sine": self.sine, **self.layer}
        given |= {"units": self.units, "token_weight": self.token_weight}
        stores = {"d_projected": d_projected, "row_max": row_max, "column_max": column_max}
        if width1:
            attend_backward_width1(self.query, self.key, self.value, self.rms, **given, **stores)
        else:
            out, log_sum, _ = self.forward()
            delta = (out.float() * self.d_out.float()).unflatten(1, (HEADS, 128)).sum(2).T.contiguous()
            sums = {"log_sum": log_sum, "delta": delta, "width": self.width}
            attend_backward(self.query, self.key, self.value, self.rms, **given, **sums, **stores)
        return d_projected.unflatten(1, (4, -1)), row_max, column_max.unflatten(0, (4, -1))

    def products_backward(self) -> tuple[Tensor, Tensor, Tensor]:
        d_projected, row_max, column_max = self.stores()
        d_out, delta = self.buffer(self.rows, CHANNELS), self.buffer(HEADS, self.rows, dtype=torch.float32)
        products_backward(
            torch.cat([self.d_out] * 4, 1), self.gate, self.d_out, self.rms, units=self.units, token_weight=self.token_weight, d_out=d_out,
            delta=delta, d_projected=d_projected, row_max=row_max, column_max=column_max, backend=self.backend,
        )  # fmt: skip
        return d_projected.unflatten(1, (4, -1)), row_max, column_max.unflatten(0, (4, -1))

    def stores(self) -> tuple[Tensor, Tensor, Tensor]:
        zeros = [torch.zeros(shape, device=self.device) for shape in ((self.rows,), (4 * CHANNELS,))]
        return torch.zeros(self.rows, 4 * CHANNELS, dtype=torch.bfloat16, device=self.device), zeros[0], zeros[1]

    def buffer(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return poisoned(shape, dtype, self.device)


def nothing_leaks_from_later_tokens(device: str, backend: BackendName) -> None:
    """What comes after a token, and the token's own key and value, change no bit of its result."""
    for width in (40, 7, 1):
        batch = Batch(device, backend, tokens=40, width=width, slope=0.1)
        before = batch.forward(width1=width == 1)[0].clone()
        for x in (batch.key, batch.value):
            x[50:] = x[50:].flip(0)
        batch.query[51:] = batch.query[51:].flip(0)
        after = batch.forward(width1=width == 1)[0]
        assert_same_bits(f"out up to the change, width {width}", after[:51], before[:51])
        assert not torch.equal(after[51:80], before[51:80])


def gradients_reach_exactly_what_was_seen(device: str, backend: BackendName) -> None:
    """The gradient of one row's result reaches its query, and keys and values in its window, of its fragment and document."""
    for width, starts, seen in ((40, None, range(40, 65)), (7, None, range(58, 65)), (40, 20, range(60, 65)), (1, None, range(64, 65))):
        batch = Batch(device, backend, tokens=40, width=width)
        if starts is not None:
            position = torch.arange(batch.rows, device=device) % 40
            batch.starts = torch.where(position >= starts, starts, 0).to(torch.int32)
        kept = batch.d_out[65].clone()
        batch.d_out.zero_()
        batch.d_out[65] = kept
        touched = (batch.backward(width1=width == 1)[0] != 0).any(2)
        where = {segment: touched[:, segment].nonzero().flatten().tolist() for segment in (QUERY, KEY, VALUE)}
        assert where == {QUERY: [65], KEY: list(seen), VALUE: list(seen)}, f"width {width}, documents at {starts}: {where}"


def width_one_is_the_sigmoid_gate(device: str, backend: BackendName) -> None:
    """With fragments of two tokens every width is width 1, and with width 1 every fragment length is."""
    for tokens, width in ((2, 64), (40, 1)):
        batch = Batch(device, backend, tokens=tokens, width=width, slope=0.3, rows=32 if tokens == 2 else 128)
        assert_close(f"out, {tokens} tokens", batch.forward(width1=True)[0], batch.forward()[0], 5e-3)
        assert_close(f"gradients, {tokens} tokens", batch.backward(width1=True)[0], batch.backward()[0], 1e-2)


def a_slope_halves_weights(device: str, backend: BackendName) -> None:
    """Without a query, the key `d` tokens back weighs 2 ** (-slope d) against the sink's 1, wherever the token stands."""
    slope = 0.25
    batch = Batch(device, backend, tokens=100, width=64, slope=slope)
    batch.query.zero_()
    out, log_sum, _ = batch.forward()
    distance = torch.arange(100, device=device)[:, None] - torch.arange(100, device=device)[None, :]
    weights = torch.where((distance >= 1) & (distance <= 64), 2.0 ** (-slope * distance.clamp(0, 64).double()), 0.0)
    total = 1 + weights.sum(1, keepdim=True)
    assert_close("out", out[:100], (weights / total) @ batch.value[:100].double(), 5e-3)
    assert_close("log_sum", log_sum[:, :100], total.log2().T.expand(HEADS, -1), 1e-5)


def documents_are_fragments(device: str, backend: BackendName) -> None:
    """Documents of equal length inside fragments give the numbers of fragments of that length."""
    together, apart = (Batch(device, backend, tokens=tokens, width=64) for tokens in (64, 16))
    together.starts = (torch.arange(together.rows, device=device) % 64 // 16 * 16).to(torch.int32)
    for name in ("query", "key", "value", "gate", "rms", "d_out", "token_weight"):
        setattr(apart, name, getattr(together, name))
    together.cosine, together.sine = (x.repeat(4, 1) for x in (apart.cosine, apart.sine))
    for name, one, other in zip(("out", "log_sum"), together.forward(), apart.forward(), strict=False):
        assert_close(name, one, other, 5e-3)
    assert_close("gradients", together.backward()[0], apart.backward()[0], 1e-2)


def a_token_that_sees_nothing_gets_zero(device: str, backend: BackendName) -> None:
    """First tokens of fragments, starts of documents, fragments of one token."""
    for tokens, starts in ((40, 13), (1, None)):
        batch = Batch(device, backend, tokens=tokens, width=8, slope=0.5)
        position = torch.arange(batch.rows, device=device) % tokens
        alone = position == 0
        if starts is not None:
            batch.starts = torch.where(position >= starts, starts, 0).to(torch.int32)
            alone |= position == starts
        out, log_sum, products = batch.forward()
        for name, x in (("out", out), ("log_sum", log_sum.T), ("products", products), ("width 1", batch.forward(width1=True)[0])):
            assert float(x.float()[alone].abs().max()) == 0, f"{name}, {tokens} tokens, documents at {starts}"


def products_are_codes_of_gate_times_result(device: str, backend: BackendName) -> None:
    """To the bit, of the result as it is stored."""
    for code in codes.CODE_DTYPES if backend == "ref" or device == "cpu" or has_fp8(device) else (torch.int8, torch.bfloat16):
        batch = Batch(device, backend, tokens=40, width=40, code=code)
        for width1 in (False, True):
            out, _, products = batch.forward(width1)
            again = torch.empty_like(products)
            ref_products(batch.gate, out, again)
            assert_same_bits(f"products {code}", products, again)


def maxima_are_those_of_what_is_stored(device: str, backend: BackendName) -> None:
    """To the bit, for every op that raises them."""
    batch = Batch(device, backend, tokens=40, width=40)
    results = (batch.backward(), batch.backward(width1=True), batch.products_backward())
    for d_projected, row_max, column_max in results:
        size = d_projected.float().abs()
        assert_same_bits("row_max", row_max, (size.amax(2) * batch.units).amax(1))
        assert_same_bits("column_max", column_max, (size * batch.token_weight[:, None, None]).amax(0))


def a_broken_number_reaches_the_maxima(device: str, backend: BackendName) -> None:
    batch = Batch(device, backend, tokens=40, width=40)
    batch.d_out[41, 3] = float("nan")
    for d_projected, row_max, column_max in (batch.backward(), batch.backward(width1=True), batch.products_backward()):
        assert bool(d_projected[41].isnan().any()) and bool(row_max[41].isnan()) and bool(column_max.isnan().any())


def two_runs_give_the_same_bits(device: str, backend: BackendName) -> None:
    batch = Batch(device, backend, tokens=100, width=64, slope=0.5)
    for first, second in ((batch.forward(), batch.forward()), (batch.backward(), batch.backward())):
        for one, other in zip(first, second, strict=True):
            assert_same_bits("result", one, other)


def segments_of_others_stay(device: str, backend: BackendName) -> None:
    """An op writes its own segments of d_projected and column_max only."""
    batch = Batch(device, backend, tokens=40, width=40)
    for segments, results in (((QUERY, KEY, VALUE), batch.backward()), ((GATE,), batch.products_backward())):
        touched = {segment for segment in range(4) if bool((results[0][:, segment] != 0).any())}
        assert touched == set(segments) == {segment for segment in range(4) if bool((results[2][segment] != 0).any())}


def has_fp8(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)


PROPERTIES: dict[str, Callable[[str, BackendName], None]] = {
    function.__name__: function
    for function in (
        nothing_leaks_from_later_tokens, gradients_reach_exactly_what_was_seen, width_one_is_the_sigmoid_gate, a_slope_halves_weights,
        documents_are_fragments, a_token_that_sees_nothing_gets_zero, products_are_codes_of_gate_times_result,
        maxima_are_those_of_what_is_stored, a_broken_number_reaches_the_maxima, two_runs_give_the_same_bits, segments_of_others_stay,
    )
}  # fmt: skip


QUICK = ["nothing_leaks_from_later_tokens", "gradients_reach_exactly_what_was_seen", "a_slope_halves_weights"]
"""What the default test suite checks in the interpreter, where some take seconds."""


def main() -> None:
    torch.set_num_threads(1)
    if _DEVICE == "cpu":
        import interpreter_fix

        interpreter_fix.install()
    for name in sys.argv[2:] or PROPERTIES:
        PROPERTIES[name](_DEVICE, "triton")
        print(name, flush=True)


if __name__ == "__main__":
    main()
