"""Makes Triton's interpreter right for bf16 and fp8: casts round to nearest even as torch's (fp8 saturates), dots multiply values.

Without it (triton 3.6 to 3.9), silently: bf16 dots multiply bit patterns, casts to bf16 truncate, casts to fp8 lose a carry.
Arithmetic on bf16 or fp8 tiles without a cast to fp32, which the interpreter would do on bit patterns, is refused.
"""

import inspect
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_AS_BITS = {tl.bfloat16: torch.bfloat16, **_FP8}  # the interpreter holds these as unsigned integers
_FLOATS = {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64, **_AS_BITS}
_PATCHED = {"_convert_float": "input input_dtype output_dtype rounding_mode", "cast_impl": "self src dst_type",
            "binary_op": "self lhs rhs op", "create_dot": "self a b d input_precision max_num_imprecise_acc"}  # fmt: skip


def convert(data: np.ndarray, source: Any, target: Any, rounding: Any = None) -> np.ndarray:
    """Numbers of Triton type `source`, as the interpreter holds them -> the same of `target`."""
    values = torch.from_numpy(np.array(data, order="C"))
    values = values.view(_FLOATS[source]) if source in _AS_BITS else values
    values = values.float().clamp(-torch.finfo(_FP8[target]).max, torch.finfo(_FP8[target]).max) if target in _FP8 else values
    if target not in _FLOATS:
        return values.float().numpy().astype(interpreter._get_np_dtype(target))
    values = values.to(_FLOATS[target]).contiguous()
    return (values.view(torch.uint8 if target in _FP8 else torch.uint16) if target in _AS_BITS else values).numpy()


def install() -> None:
    """Patch the interpreter of this process. Raises RuntimeError if triton's interpreter is not the one this was written for."""
    builder = interpreter.InterpreterBuilder
    for name, parameters in _PATCHED.items():
        found = getattr(builder, name, None) or getattr(interpreter, name, None)
        if found is None or " ".join(inspect.signature(found).parameters) != parameters:
            raise RuntimeError(f"interpreter_fix: triton's interpreter changed: expected a function {name}({parameters})")
    original_cast, original_binary, handle = builder.cast_impl, builder.binary_op, interpreter.TensorHandle

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar in _AS_BITS or target.scalar in _AS_BITS:
            return handle(convert(source.data, source.dtype.scalar, target.scalar), target.scalar)
        return original_cast(self, source, target)

    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if left.dtype.scalar in _AS_BITS:
            raise TypeError(f"{operation.__name__} on {left.dtype.scalar}: cast to fp32 first")
        return original_binary(self, left, right, operation)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        as_float = np.float32 if a.data.shape[-1] <= 1024 else np.float64  # exact for int8: sums below 2**24 and 2**53
        left, right = (convert(x.data, x.dtype, tl.float32) if x.dtype.is_floating() else x.data.astype(as_float) for x in (a, b))
        return handle(np.matmul(left, right).astype(d.data.dtype) + d.data, d.dtype.scalar)

    interpreter._convert_float = convert
    builder.cast_impl, builder.binary_op, builder.create_dot = cast, binary, dot
