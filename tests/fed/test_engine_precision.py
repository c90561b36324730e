"""[device] precision and attention: what auto means where, and the sentence for what a card lacks."""

from __future__ import annotations

import pytest
import torch

from tscale_fed.config import parse_config
from tscale_fed.engine import precision as precision_module
from tscale_fed.engine.precision import Precision, choose_precision
from tscale_net.errors import Refused

CUDA = torch.device("cuda:0")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    capability, triton = request.param
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(precision_module, "has_triton", lambda: triton)


def on(capability: tuple[int, int], triton: bool = True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("card", [(capability, triton)], indirect=True)


def refusal(device: torch.device, precision: str, attention: str = "auto") -> str:
    with pytest.raises(Refused) as caught:
        choose_precision(device, precision, attention)
    assert caught.value.code == "no-device" and "\n" not in caught.value.detail
    return caught.value.detail


@on((9, 0))
def test_auto_on_a_new_card_is_int8_with_bfloat16_attention(card: None) -> None:
    chosen, remark = choose_precision(CUDA)
    assert chosen == Precision("int8", "bfloat16", kernels=True)
    assert (chosen.code, chosen.score_code, chosen.value_code) == (torch.int8, torch.bfloat16, torch.bfloat16)
    assert "int8 matrix products" in remark and "bfloat16 attention" in remark


@on((9, 0))
@pytest.mark.parametrize(("attention", "score", "value"), [("int8", torch.int8, torch.bfloat16), ("fp8", *[torch.float8_e4m3fn] * 2)])
def test_attention_formats(card: None, attention: str, score: torch.dtype, value: torch.dtype) -> None:
    chosen, _ = choose_precision(CUDA, "fp8", attention)
    assert (chosen.code, chosen.score_code, chosen.value_code) == (torch.float8_e4m3fn, score, value)


@on((8, 6))
@pytest.mark.parametrize(("precision", "attention", "key"), [("fp8", "auto", "precision"), ("int8", "fp8", "attention")])
def test_fp8_needs_an_ada_card(card: None, precision: str, attention: str, key: str) -> None:
    sentence = refusal(CUDA, precision, attention)
    for part in (f'[device] {key} = "fp8"', "Test GPU (compute capability 8.6)", "float8 matrix units", 'write "int8"'):
        assert part in sentence


@on((7, 5))
def test_an_old_card_has_no_engine(card: None) -> None:
    assert choose_precision(CUDA)[0] == Precision("float32")
    assert 'write "float32"' in refusal(CUDA, "int8")


@on((8, 0), triton=False)
def test_without_triton_a_card_takes_plain_torch(card: None) -> None:
    assert choose_precision(CUDA)[0] == Precision("bfloat16", kernels=False)
    assert choose_precision(CUDA)[0].compute == torch.bfloat16
    assert "triton is not installed" in refusal(CUDA, "int8")


def test_the_processor_is_the_reference_unless_asked() -> None:
    cpu = torch.device("cpu")
    assert choose_precision(cpu) == (Precision("float32"), "float32")
    assert choose_precision(cpu, "float32")[0] == Precision("float32")
    chosen, remark = choose_precision(cpu, "int8", "fp8")
    assert chosen == Precision("int8", "fp8", kernels=True) and "slow" in remark


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_attention_needs_the_engine(precision: str) -> None:
    assert '[device] attention = "int8"' in refusal(torch.device("cpu"), precision, "int8")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("precision = 'int4'", ["[device] precision", '"int8"', '"fp8"']),
        ("attention = 'float32'", ["[device] attention", '"bfloat16"']),
        ("optimizer_memory = 'disk'", ["[device] optimizer_memory", '"host"']),
        ("micro_batch = -1", ["[device] micro_batch", ">= 0"]),
    ],
)
def test_config_errors_name_the_choices(text: str, parts: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        parse_config(f"[device]\n{text}\n")
    for part in parts:
        assert part in caught.value.detail
