"""Cases of the ends of the model and of the update: packing, embedding, head, optimizer step (see case_protocol.py)."""

from __future__ import annotations

from functools import partial

import torch
from case_protocol import CODES, Case, Setting, Sizes

from tscale_kernels import codes
from tscale_kernels.pack_weights import PackMatrix, PackPlan, pack_weights

# -- the matrices of a model -------------------------------------------------------------------------------------------


def layers(sizes: Sizes) -> int:
    """Of the two models of the issue; two where numbers are few."""
    return {1280: 42, 256: 36}[sizes.width] if sizes.rows > 4096 else 2


def matrices(sizes: Sizes) -> list[tuple[str, int, int]]:
    """(name, rows, columns) in canonical order, as in tscale_fed.model.shape."""
    e, a, f = sizes.width, sizes.attention_width, sizes.ffn_width
    layer = [("query", a, e), ("key", a, e), ("gate", a, e), ("value", a, e), ("combiner", e, 4 * a), ("ffn_up", f, e), ("ffn_down", e, f)]
    return [("embedding", sizes.vocab + 1, e), ("final", sizes.vocab, e), *layer * layers(sizes)]


def flat_length(sizes: Sizes) -> int:
    return sum(rows * columns for _, rows, columns in matrices(sizes))


# -- packing -----------------------------------------------------------------------------------------------------------


def pack_matrices(sizes: Sizes) -> list[PackMatrix]:
    """Final layer, then per layer the joined projections, combiner, ffn_up, ffn_down; the embedding is not packed."""
    e, a, f, heads = sizes.width, sizes.attention_width, sizes.ffn_width, sizes.heads
    channel = torch.arange(128)
    pairs, blocked = channel.view(2, 2, 32).transpose(1, 2).reshape(-1), channel.view(32, 4).T.reshape(-1)
    of_head = torch.stack((pairs, pairs, blocked, blocked))
    row_map = (torch.arange(4 * heads)[:, None] * 128 + of_head.repeat_interleave(heads, 0)).flatten()
    i, j = torch.arange(4)[:, None, None], torch.arange(4)[None, :, None]
    of_products = ((i ^ j) * 128 + torch.arange(32) * 4 + j).flatten()
    column_map = (torch.arange(heads)[:, None] * 512 + of_products).flatten()
    packed = [PackMatrix((sizes.vocab + 1) * e, sizes.vocab, e, transposed=False)]
    start = (2 * sizes.vocab + 1) * e
    for _ in range(layers(sizes)):
        packed.append(PackMatrix(start, 4 * a, e, row_map=row_map, segments=4))
        packed.append(PackMatrix(start + 4 * a * e, e, 4 * a, column_map=column_map))
        packed.append(PackMatrix(start + 8 * a * e, f, e))
        packed.append(PackMatrix(start + 8 * a * e + f * e, e, f))
        start += 8 * a * e + 2 * f * e
    return packed


def flat_weights(setting: Setting) -> torch.Tensor:
    """Weights of a model under training: every matrix of another size, one of zeros, some numbers at the limits of the codes."""
    flat = setting.normal((flat_length(setting.sizes),))
    start = 0
    for index, (_, rows, columns) in enumerate(matrices(setting.sizes)):
        flat[start : start + rows * columns] *= 0.0 if index == 6 else 0.1 + index % 7
        flat[start + 5 : start + 8] *= 30
        start += rows * columns
    return flat


def pack(setting: Setting, code: torch.dtype, sums_known: bool) -> Case:
    flat = flat_weights(setting)
    plan = PackPlan(pack_matrices(setting.sizes), setting.device)
    sums = flat.new_empty(plan.blocks, dtype=torch.float64)
    buffers = [torch.empty(count, dtype=code, device=setting.device) for count in (plan.elements, plan.transposed_elements)]
    if sums_known:
        pack_weights(flat, plan, codes=buffers[0], codes_t=buffers[1], units=flat.new_empty(plan.units), square_sums=sums, backend="ref")
    del buffers
    outputs = {
        "codes": ((plan.elements,), code), "codes_t": ((plan.transposed_elements,), code), "units": ((plan.units,), torch.float32)
    }  # fmt: skip

    def made() -> dict[str, torch.Tensor]:
        out = {name: setting.poisoned(shape, dtype) for name, (shape, dtype) in outputs.items()}
        return out | {"square_sums": sums.clone() if sums_known else setting.poisoned((plan.blocks,), torch.float64)}

    return Case(
        outputs=made,
        run=lambda out, backend: pack_weights(flat, plan, **out, sums_known=sums_known, backend=backend),
        limits={"codes": 0, "codes_t": 0, "units": 0, "square_sums": 0},
        bytes_moved=flat.numel() * (4 if sums_known else 8) + (plan.elements + plan.transposed_elements) * code.itemsize,
    )


CASES = {f"pack_weights {name}": partial(pack, code=code, sums_known=False) for name, code in CODES.items()}
CASES |= {"pack_weights int8 sums known": partial(pack, code=torch.int8, sums_known=True)}
