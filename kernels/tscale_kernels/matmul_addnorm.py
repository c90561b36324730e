"""Product, residual addition and normalisation at once: how a layer's two halves end (combiner and ffn_down).

    x += lin(a, W),  lin(a, W) = a W^T / sqrt(K)
    n = codes of normalise(x), per group of 128 channels; the RMS of each group is stored (normalise.py)
x is the state, fp32 or bf16; the normalised codes are made from the fp32 sum, before it is rounded to the dtype of x.

Exactness: int8 operands give the same bits on every backend and card (as in matmul_norm.py).
"""

from __future__ import annotations

from torch import Tensor

from tscale_kernels import launch_table, tiles
from tscale_kernels.codes import encode, ref_product, vector_scale
from tscale_kernels.dispatch import BackendName, choose, has_triton
from tscale_kernels.normalise import GROUP_CHANNELS, ref_normalise


def ref_add_normalise(a: Tensor, w: Tensor, unit: Tensor, *, a_scale: float, x: Tensor, n: Tensor, rms: Tensor) -> None:
    """See `add_normalise`."""
    new = x.float() + ref_product(a, w) * (unit * lin_factor(a, a_scale))
    x.copy_(new)
    scaled, root = ref_normalise(new, vector_scale(n.dtype))
    n.copy_(encode(scaled, n.dtype))
    rms.copy_(root.T)


def lin_factor(a: Tensor, a_scale: float) -> float:
    """What turns a product of codes a [M, K] (values times a_scale) with weight codes into lin / unit."""
    return 1.0 / (a_scale * a.shape[1] ** 0.5)


if has_triton():
    import triton
    import triton.language as tl

    from tscale_kernels.codes import encode_tile
    from tscale_kernels.normalise import normalise_tile, store_roots
    from tscale_kernels.tiles import load_tile, product_tile, store_tile, tile_position

    @triton.jit
    def add_normalise_kernel(  # type: ignore[no-untyped-def]
        a, w, x, n, rms, unit, row_tiles, column_tiles, depth, rows, factor, scale,
        STREAM: tl.constexpr, CODE: tl.constexpr, ACC: tl.constexpr, TMA: tl.constexpr,
        BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One [BR, BC] tile. a, w, x, n are operands (tiles.py), the rest pointers; STREAM, CODE are the dtypes of x and n."""
        row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, column_tiles, GROUP)
        row = row_tile * BR
        column = column_tile * BC
        width = column_tiles * BC
        sums = product_tile(a, w, row, column, 0, depth // BK, depth, depth, BR, BC, BK, ACC, TMA).to(tl.float32)
        new = load_tile(x, row, column, width, BR, BC, TMA).to(tl.float32) + sums * (tl.load(unit) * factor)
        store_tile(x, row, column, width, new.to(STREAM), BR, BC, TMA)
        scaled, root = normalise_tile(new, scale, BR, BC)
        store_roots(rms, root, row, column, rows, BR, BC)
        store_tile(n, row, column, width, encode_tile(scaled, CODE), BR, BC, TMA)


def _launch_add_normalise(a: Tensor, w: Tensor, unit: Tensor, *, a_scale: float, x: Tensor, n: Tensor, rms: Tensor) -> None:
    (rows, width), depth = x.shape, a.shape[1]
    config = launch_table.launch("add_normalise", tiles.capability(x.device), a.dtype)
    config = launch_table.fitted(config, BR=rows, BC=width, BK=depth)
    tma = tiles.uses_tma(x.device)
    row_tiles, column_tiles = rows // config["BR"], width // config["BC"]
    add_normalise_kernel[(row_tiles * column_tiles,)](
        tiles.operand(a, config["BR"], config["BK"], tma), tiles.operand(w, config["BC"], config["BK"], tma),
        *(tiles.operand(out, config["BR"], config["BC"], tma) for out in (x, n)),
        rms, unit, row_tiles, column_tiles, depth, rows, lin_factor(a, a_scale), vector_scale(n.dtype),
        STREAM=tiles.TRITON_DTYPES[x.dtype], CODE=tiles.TRITON_DTYPES[n.dtype],
        ACC=tiles.accumulator(a.dtype), TMA=tma, enable_fp_fusion=False, **config,
    )  # fmt: skip


def add_normalise(
    a: Tensor, w: Tensor, unit: Tensor, *, a_scale: float, x: Tensor, n: Tensor, rms: Tensor, backend: BackendName | None = None
) -> None:
    """Add lin(a, W) to x in place; write the codes and the RMS of its groups.

    a: codes [M, K] of values times a_scale. w: codes of the same dtype [E, K]. unit: fp32 [1]. x: fp32 or bf16 [M, E]. n: codes [M, E].
    rms: fp32 [E / 128, M]. M, K, E multiples of 128; all contiguous. Raises ValueError if shapes or dtypes do not belong together.
    """
    rows, columns = x.shape
    if a.dtype != w.dtype or w.shape != (columns, a.shape[1]) or a.shape[0] != rows or rms.shape != (columns // GROUP_CHANNELS, rows):
        raise ValueError(f"a {tuple(a.shape)} {a.dtype}, w {tuple(w.shape)} {w.dtype}, x {tuple(x.shape)}, rms {tuple(rms.shape)} differ")
    run = _launch_add_normalise if choose(x.device, backend).name == "triton" else ref_add_normalise
    run(a, w, unit, a_scale=a_scale, x=x, n=n, rms=rms)
