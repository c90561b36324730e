"""Cases of the ends of the model and of the update: packing, embedding, head, optimizer step (see case_protocol.py)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from case_protocol import CODES, ONE_CODE_OFF, Case, Setting, Sizes, Tensors

from tscale_kernels import codes, embedding, head
from tscale_kernels.optimizer_step import ALL_FINITE, UpdateMatrix, UpdatePlan, optimizer_step, step_scalars
from tscale_kernels.pack_weights import PackMatrix, PackPlan, pack_weights

# -- the matrices of a model -------------------------------------------------------------------------------------------


def layers(sizes: Sizes) -> int:
    """Of the two models of the issue; few where numbers are few."""
    return {1280: 42, 256: 36}[sizes.width] if sizes.rows > 4096 else 1 if sizes.rows == 128 else 2


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

    def made() -> Tensors:
        out = {name: setting.poisoned(shape, dtype) for name, (shape, dtype) in outputs.items()}
        return out | {"square_sums": sums.clone() if sums_known else setting.poisoned((plan.blocks,), torch.float64)}

    return Case(
        outputs=made,
        run=lambda out, backend: pack_weights(flat, plan, **out, sums_known=sums_known, backend=backend),
        limits={"codes": 0, "codes_t": 0, "units": 0, "square_sums": 0},
        bytes_moved=flat.numel() * (4 if sums_known else 8) + (plan.elements + plan.transposed_elements) * code.itemsize,
    )


# -- embedding ---------------------------------------------------------------------------------------------------------


def labels_and_signs(setting: Setting, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [M, count] and fp32 [count]: 3 noise rows, then tokens of which one makes up 15 %; rows behind the last token have none."""
    s = setting.sizes
    share = setting.uniform((s.rows, 1))
    tokens = 3 + (share * share * (s.vocab - 2)).long()
    labels = torch.cat((torch.where(setting.uniform((s.rows, 1)) < 0.15, 5, tokens), setting.integers((s.rows, count - 1), 0, 3)), 1)
    labels[s.fragments * s.tokens :] = -1
    return labels.contiguous(), torch.tensor([1.0, 1.0, -1.0], device=setting.device)[:count]


def embed_normalise(setting: Setting, code: torch.dtype, count: int, stream: torch.dtype) -> Case:
    s = setting.sizes
    labels, signs = labels_and_signs(setting, count)
    table = setting.normal((s.vocab + 1, s.width))
    table[:3] *= 0.01
    stored = {"x": ((s.rows, s.width), stream), "n": ((s.rows, s.width), code), "rms": ((s.width // 128, s.rows), torch.float32)}
    return Case(
        outputs=lambda: {name: setting.poisoned(shape, dtype) for name, (shape, dtype) in stored.items()},
        run=lambda out, backend: embedding.embed_normalise(labels, signs, table, **out, backend=backend),
        limits={"x": 0, "n": ONE_CODE_OFF, "rms": 1e-6},
        bytes_moved=s.rows * s.width * (4 * count + stream.itemsize + code.itemsize),
    )


def embedding_gradient(setting: Setting, count: int, stream: torch.dtype) -> Case:
    s = setting.sizes
    labels, signs = labels_and_signs(setting, count)
    signs = signs.expand(s.rows, count).contiguous() if count > 1 else signs
    dx = setting.normal((s.rows, s.width), stream)
    start = setting.normal((s.vocab + 1, s.width))

    def exact() -> Tensors:
        grad = start.double()
        embedding.ref_embedding_gradient(dx.double(), labels, signs.double(), grad=grad)
        return {"grad": grad}

    partial_shape = embedding.partial_shape(s.rows, count, s.width)
    return Case(
        outputs=lambda: {"grad": start.clone(), "partial": setting.poisoned(partial_shape, torch.float32)},
        run=lambda out, backend: embedding.embedding_gradient(dx, labels, signs, **out, backend=backend),
        limits={"grad": 1e-6},
        exact=exact,
        exact_limits={"grad": 1e-6},
        bytes_moved=s.rows * s.width * (stream.itemsize + 8),
    )


# -- head --------------------------------------------------------------------------------------------------------------


def head_inputs(setting: Setting, code: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(n, w, unit, bias, target): logits of size 2, counts as in text, an eighth of the positions and all padding without target."""
    s = setting.sizes
    n = setting.vector_codes(s.rows, s.width, code)
    w = setting.normal((s.padded_vocab, s.width)) * codes.weight_scale(code)
    w[s.vocab :] = 0
    bias = torch.full((s.padded_vocab,), head.PADDING_BIAS, device=setting.device)
    bias[: s.vocab] = -torch.log(setting.uniform((s.vocab,)) + 1e-3)
    target = (setting.uniform((s.rows,)) ** 2 * s.vocab).long()
    target[setting.uniform((s.rows,)) < 0.125] = head.NO_TARGET
    target[s.fragments * s.tokens :] = head.NO_TARGET
    return n, codes.encode(w, code), setting.uniform((1,), 1.0, 2.0) / codes.weight_scale(code), bias, target


def head_exact(n: torch.Tensor, w: torch.Tensor, unit: torch.Tensor, bias: torch.Tensor, target: torch.Tensor, vocab: int) -> Tensors:
    """The formula in fp64, for sizes whose logits fit."""
    if n.shape[0] * w.shape[0] > 2**24:
        return {}
    state = n.double() / codes.vector_scale(n.dtype)
    weights = w.double() * (unit.double() / n.shape[1] ** 0.5)
    logits = state @ weights.T + bias.double()
    has_target = (target >= 0)[:, None]
    log_p = torch.log_softmax(logits, 1)
    error = log_p.exp().scatter_add(1, target.clamp_min(0)[:, None], -torch.ones_like(log_p[:, :1])) * has_target
    losses = torch.where(has_target, -log_p.gather(1, target.clamp_min(0)[:, None]), 0.0)[:, 0]
    grad = 1e-3 + error[:, :vocab].T @ state / n.shape[1] ** 0.5
    return {"losses": losses, "loss_sum": losses.sum().view(1), "d_n": error @ weights, "grad": grad}


LOSS_LIMITS = {
    torch.int8: {"losses": 1e-5, "loss_sum": 1e-6},
    torch.bfloat16: {"losses": 1e-5, "loss_sum": 1e-6},
    torch.float8_e4m3fn: {"losses": 2e-4, "loss_sum": 1e-4},
}
"""Tensor cores of sm_89 and sm_90 keep 14 bits of sums of e4m3 products."""


def head_gradient(setting: Setting, code: torch.dtype, chunk: int = 0) -> Case:
    """With a chunk size: the gradient of the final layer is not summed in parts, as for large vocabularies."""
    s = setting.sizes
    inputs = head_inputs(setting, code)
    scratch = head.HeadScratch.allocate(s.rows, s.padded_vocab, s.width, setting.device, chunk=chunk)
    scratch = replace(scratch, partial=scratch.partial[:0]) if chunk else scratch
    limits = LOSS_LIMITS[code] | {"d_n": 3e-3, "grad": 1e-3}
    exact_limits = LOSS_LIMITS[code] | {"d_n": 5e-3, "grad": 3e-3}
    return Case(
        outputs=lambda: {
            "losses": setting.poisoned((s.rows,), torch.float32), "loss_sum": setting.zeros((1,), torch.float64),
            "d_n": setting.poisoned((s.rows, s.width), torch.bfloat16), "grad": setting.zeros((s.vocab, s.width)) + 1e-3,
        },
        run=lambda out, backend: head.loss_and_gradient(*inputs, **out, scratch=scratch, backend=backend),
        limits=limits,
        exact=lambda: head_exact(*inputs, s.vocab),
        exact_limits=exact_limits if s.rows * s.padded_vocab <= 2**24 else {},
        matmul=(s.rows, s.padded_vocab, 4 * s.width),
    )  # fmt: skip


def head_loss(setting: Setting, code: torch.dtype) -> Case:
    s = setting.sizes
    inputs = head_inputs(setting, code)
    scratch = head.HeadScratch.allocate(s.rows, s.padded_vocab, s.width, setting.device, gradient=False)
    return Case(
        outputs=lambda: {"losses": setting.poisoned((s.rows,), torch.float32), "loss_sum": setting.zeros((1,), torch.float64)},
        run=lambda out, backend: head.loss(*inputs, **out, scratch=scratch, backend=backend),
        limits=LOSS_LIMITS[code],
        matmul=(s.rows, s.padded_vocab, s.width),
    )


# -- optimizer ---------------------------------------------------------------------------------------------------------

SUMS_OF = 16384
"""Elements whose squares a gradient kernel sums up, here: a tile of 128 x 128."""


def update_matrices(sizes: Sizes, with_sums: bool) -> list[UpdateMatrix]:
    found, start, first = [], 0, 0
    for name, rows, columns in matrices(sizes):
        per_row = name in ("embedding", "final")
        count = rows * columns // SUMS_OF
        found.append(UpdateMatrix(start, rows, columns, per_row, (first, count) if with_sums and not per_row else None))
        first += 0 if per_row else count
        start += rows * columns
    return found


def optimizer(setting: Setting, momentum: torch.dtype, with_sums: bool, extras: bool, bad: bool = False) -> Case:
    """`extras`: gradient cleared, sums of squares of the new weights; `bad`: the third matrix holds an infinity, nothing may change."""
    count = flat_length(setting.sizes)
    plan = UpdatePlan(update_matrices(setting.sizes, with_sums), setting.device)
    gradient = setting.normal((count,), scale=1e-3)
    gradient[: 3 * setting.sizes.width] = 0  # rows without a gradient
    layer_start = plan.matrices[2].start
    sums = gradient[layer_start:].view(-1, SUMS_OF).square().sum(1)
    if bad:
        gradient[layer_start + 7] = torch.inf
    start = {"weights": setting.normal((count,)), "momentum": setting.normal((count,), momentum), "gradient": gradient}
    start["moment_sums"] = setting.uniform((plan.moments,)) * 1e-6
    start["moment_sums"][:2] = 0
    scalars = torch.tensor(step_scalars(0.01, 0.95, 12.5, l2=0.1), device=setting.device)
    seed = setting.step_seed()

    def made() -> Tensors:
        out = {name: tensor.clone() for name, tensor in start.items()}
        out["bad_matrix"] = torch.full((1,), ALL_FINITE, dtype=torch.int32, device=setting.device)
        return out | ({"weight_squares": setting.poisoned((plan.blocks,), torch.float64)} if extras else {})

    def run(out: Tensors, backend: str) -> None:
        optimizer_step(
            out["weights"], out["momentum"], out["gradient"], plan, scalars=scalars, moment_sums=out["moment_sums"],
            bad_matrix=out["bad_matrix"], square_sums=sums if with_sums else None, weight_squares=out.get("weight_squares"), seed=seed,
            clear=extras, backend=backend,
        )  # fmt: skip

    limits = {"weights": 1e-6, "momentum": 1e-4 if momentum == torch.bfloat16 else 1e-6, "moment_sums": 1e-6, "bad_matrix": 0}
    if bad:
        limits = dict.fromkeys((*start, "bad_matrix"), 0)
    elif extras:
        limits |= {"gradient": 0, "weight_squares": 1e-6}
    return Case(
        outputs=made,
        run=run,
        limits=limits,
        bytes_moved=count * (12 + 2 * momentum.itemsize + (0 if with_sums else 4)),
    )


CASES = {f"pack_weights {name}": partial(pack, code=code, sums_known=False) for name, code in CODES.items()}
CASES |= {"pack_weights int8 sums known": partial(pack, code=torch.int8, sums_known=True)}
CASES |= {f"embed_normalise {name}": partial(embed_normalise, code=code, count=1, stream=torch.float32) for name, code in CODES.items()}
CASES |= {"embed_normalise int8 noise rows, bf16 stream": partial(embed_normalise, code=torch.int8, count=3, stream=torch.bfloat16)}
CASES |= {"embedding_gradient fp32": partial(embedding_gradient, count=1, stream=torch.float32)}
CASES |= {"embedding_gradient noise rows, bf16 stream": partial(embedding_gradient, count=3, stream=torch.bfloat16)}
CASES |= {f"head_gradient {name}": partial(head_gradient, code=code) for name, code in CODES.items()}
CASES |= {"head_gradient int8 in chunks": partial(head_gradient, code=torch.int8, chunk=128)}
CASES |= {f"head_loss {name}": partial(head_loss, code=code) for name, code in CODES.items()}
CASES |= {
    "optimizer_step": partial(optimizer, momentum=torch.float32, with_sums=False, extras=False),
    "optimizer_step sums given": partial(optimizer, momentum=torch.float32, with_sums=True, extras=False),
    "optimizer_step bf16 momentum, clears": partial(optimizer, momentum=torch.bfloat16, with_sums=True, extras=True),
    "optimizer_step not finite": partial(optimizer, momentum=torch.float32, with_sums=False, extras=True, bad=True),
}
