"""All cases: Triton's interpreter gives what the reference gives; kernels compile for cards that are not here, with the right instructions.

Both run in processes of their own: triton reads the variable that chooses its interpreter when a kernel is defined.
"""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from run_cases import found_modules
from test_checking import run_script

from tscale_kernels import dispatch

if not dispatch.has_triton():
    pytest.skip("triton is not installed (pip install 'tscale-fed[interp]'): kernels are checked where it is", allow_module_level=True)

LONGEST_OUTPUT = 6000
CARDS = (80, 86, 89, 90, 100, 120)


def interpreter_is_broken() -> bool:
    installed = [tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy")]
    return installed[0] < (3, 7) and installed[1] >= (2, 4)


needs_interpreter = pytest.mark.skipif(
    interpreter_is_broken(), reason="the interpreter of triton before 3.7 fails with numpy 2.4 and later; update triton"
)


@needs_interpreter
@pytest.mark.timeout(400)
@pytest.mark.parametrize("words", [["--quick"], pytest.param([], marks=pytest.mark.slow)], ids=["quick", "all"])
def test_interpreter_agrees_with_the_reference(words: list[str]) -> None:
    done = run_script("interpreted.py", *words)
    print(done.stdout)
    assert done.returncode == 0, failures(done.stdout) + done.stderr[-2000:]


@pytest.mark.timeout(400)
def test_a_kernel_of_each_kind_compiles_for_cards_that_are_not_here() -> None:
    done = run_script("ahead_of_time.py", "--quick")
    print(done.stdout)
    assert done.returncode == 0, faults(done.stdout) + done.stderr[-2000:]


@needs_interpreter
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_interpreter_agrees_with_the_reference_without_descriptors() -> None:
    done = run_script("interpreted_pointers.py", *(module for module in found_modules() if module != "cases_matmul"))
    print(done.stdout)
    assert done.returncode == 0, failures(done.stdout) + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("card", CARDS)
def test_everything_compiles_for(card: int) -> None:
    done = run_script("ahead_of_time.py", "--cards", str(card))
    print(done.stdout)
    assert done.returncode == 0, faults(done.stdout) + done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_agrees_with_the_reference() -> None:
    done = run_script("gpu_check.py")
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-LONGEST_OUTPUT:] + done.stderr[-2000:]


def failures(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("PASS"))[-LONGEST_OUTPUT:]


def faults(text: str) -> str:
    """Each fault with the line before it, which names the kernel."""
    lines = text.splitlines()
    return "\n".join(f"{lines[at - 1]}\n{line}" for at, line in enumerate(lines) if line.startswith("  FAULT"))[-LONGEST_OUTPUT:]
