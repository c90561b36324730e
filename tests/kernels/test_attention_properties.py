"""Properties of attention (attention_properties.py): of the reference here, of the kernels in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_properties import PROPERTIES, QUICK

from tscale_kernels.dispatch import has_triton

SCRIPT = Path(__file__).with_name("attention_properties.py")


@pytest.mark.parametrize("name", PROPERTIES)
def test_reference(name: str) -> None:
    PROPERTIES[name]("cpu", "ref")


@pytest.mark.parametrize(
    ("device", "names"), [("cpu", QUICK), pytest.param("cpu", list(PROPERTIES), marks=pytest.mark.slow), ("cuda", list(PROPERTIES))],
    ids=["quick", "all", "cuda"],
)  # fmt: skip
def test_kernels(device: str, names: list[str]) -> None:
    """In its own process: Triton reads the variable that chooses its interpreter when a kernel is defined."""
    if not has_triton():
        pytest.skip("triton is not installed (pip install 'tscale-fed[interp]')")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = subprocess.run([sys.executable, str(SCRIPT), device, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == names
