"""The Triton kernels of the one-bit delta: same bits as the reference in the interpreter; compiled ahead of time for the cards in use."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tscale_kernels import delta_onebit as op
from tscale_kernels import dispatch, limits

if not dispatch.has_triton():
    pytest.skip("triton is not installed (pip install 'tscale-fed[interp]'): kernels are checked where it is", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
CARDS = (80, 86, 89, 90, 120)


def interpreter_is_broken() -> bool:
    installed = [tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy")]
    return installed[0] < (3, 7) and installed[1] >= (2, 4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_same_bits_as_the_reference(device: str) -> None:
    """In its own process: Triton reads the variable that chooses its interpreter when a kernel is defined."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if device == "cpu" and interpreter_is_broken():
        pytest.skip("the interpreter of triton before 3.7 fails with numpy 2.4 and later; update triton")
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "."))
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0", "PYTHONPATH": paths}
    script = ROOT / "tests" / "kernels" / "interpreted_delta_onebit.py"
    done = subprocess.run([sys.executable, str(script), device], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "same bits"


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", ["encode", "add int32", "add fp32"])
def test_compiles_ahead_of_time_without_spilling(name: str, card: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if name == "encode":
        kernel = op.encode_kernel
        signature = {"displacement": "*fp32", "mean": "*fp32", "bits": "*u8", "cols": "i32", "inverse_cols": "fp32", "BYTES": "constexpr"}
    else:
        kernel = op.add_kernel
        kind = "*i32" if name == "add int32" else "*fp32"
        signature = {"target": kind, "bits": "*u8", "amounts": kind, "cols": "i32", "BYTES": "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(len(signature) - 1,): limits.triton_block_bytes})
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32))
    assert compiled.asm["cubin"]
    assert ".local" not in compiled.asm["ptx"], "the kernel spills"
