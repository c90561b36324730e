"""The choice of a processor and its sentences, on machines with and without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tscale_fed.config import DeviceSection
from tscale_fed.device import choose_device, out_of_memory
from tscale_net.errors import Refused


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("P", (), {"total_memory": 24 * 2**30})())


def refusal(request: str, **settings: Any) -> str:
    with pytest.raises(Refused) as caught:
        choose_device(request, DeviceSection(**settings))
    assert caught.value.code == "no-device" and "\n" not in caught.value.detail
    return caught.value.detail


def test_the_processor_on_request() -> None:
    device = choose_device("cpu")
    assert (device.torch_device.type, device.precision.name) == ("cpu", "float32")
    assert device.reason == "cpu: asked for, float32"


def test_without_cuda_auto_says_why_it_took_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in choose_device("auto").reason
    assert "built without CUDA" in refusal("cuda") and "leave --device out" in refusal("cuda:0")


def test_without_a_gpu_the_driver_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in choose_device("auto").reason
    assert "nvidia-smi" in refusal("cuda")


def test_auto_takes_the_first_gpu(two_gpus: None) -> None:
    device = choose_device("auto")
    assert device.torch_device == torch.device("cuda:0")
    assert (device.precision.name, device.precision.attention, device.precision.kernels) == ("int8", "bfloat16", True)
    assert "Test GPU 24 GiB" in device.reason and "int8 matrix products" in device.reason


def test_a_gpu_can_be_named(two_gpus: None) -> None:
    assert choose_device("cuda").torch_device == torch.device("cuda:0")
    assert choose_device("cuda:1").torch_device == torch.device("cuda:1")
    assert choose_device("cuda:1", DeviceSection(precision="float32")).precision.name == "float32"
    assert "the last is cuda:1" in refusal("cuda:2")


def test_an_old_gpu_computes_in_float32(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_device("auto").precision.name == "float32"
    sentence = refusal("auto", precision="bfloat16")
    for part in ("Test GPU (compute capability 7.5)", "lacks", 'write "float32"'):
        assert part in sentence


@pytest.mark.parametrize("request_text", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "mps", ""])
def test_other_words_are_refused(request_text: str) -> None:
    assert "is not a device" in refusal(request_text)


def test_out_of_memory_names_the_keys_to_change() -> None:
    refused = out_of_memory(torch.device("cuda:1"), "a step of one fragment of 1024 tokens")
    assert refused.code == "out-of-memory"
    for part in ("cuda:1", "one fragment", "length in [batch]"):
        assert part in refused.detail
