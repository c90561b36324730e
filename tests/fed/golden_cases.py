"""A second implementation of training, straight from the rules, that prints golden files: the opposite side of the conformance tests.

It uses the model written out in `model_cases` and the optimizer written out below, one matrix at a time and with nothing shared.
"""

import json
import math
from typing import Any

import numpy as np
import torch
from model_cases import DOC_START, logits_by_definition, random_model

from tscale_fed.model.labels import draw_token_keep, input_labels
from tscale_fed.model.rounding import pack_gradient, round_weights

State = dict[str, dict[str, torch.Tensor | float]]


def step_by_definition(
    name: str, weight: torch.Tensor, loss_gradient: torch.Tensor, state: State, t: int, rate: float, l2: float
) -> torch.Tensor:
    """New weight of one matrix after step t (from 0); `state` keeps N, S and m per matrix."""
    g = -loss_gradient
    beta = 1 - 0.5 / math.sqrt(1 + t)
    s = g.square().mean(1, keepdim=True) if name in ("embedding", "final") else g.square().mean()
    kept: Any = state.setdefault(name, {"N": 0.0, "S": torch.zeros_like(s), "m": torch.zeros_like(weight)})
    kept["N"] = beta * kept["N"] + 1
    kept["S"] = beta * kept["S"] + s
    h = torch.where(s > 0, g / (kept["S"] / kept["N"]).sqrt(), 0.0)
    kept["m"] = beta * kept["m"] + (1 - beta) * h
    return weight * (1 - rate * l2) + rate * (0.8 * kept["m"] + 0.2 * h)


def print_golden(
    dims: str, *, steps: int, config: str, late: bool = False, tail: float = 0.0, max_iters: int = 10
) -> dict[str, np.ndarray]:
    """Arrays of a golden file with token drop 0.8, noise rows, rate 0.02, warm-up 2 and L2 1/50. `late`: embedding updated at the end."""
    vocab, noise_rows, fragments, tokens = 19, 4, 2, 24
    model = random_model(dims, vocab=vocab, noise_rows=noise_rows, seed=7)
    views = model.parameter_store.views
    generator = torch.Generator().manual_seed(11)
    text = torch.randint(vocab, (fragments, tokens), generator=generator)
    target = torch.randint(vocab, (fragments, tokens), generator=generator)
    target[:, 0] = -1
    master = {name: view.detach().clone() for name, view in views.items()}
    init = dict(master)
    seen_embedding = master["embedding"]
    rows, signs, state, predicted = [], [], State(), None
    for t in range(steps):
        with torch.no_grad():
            for name, view in views.items():
                view.copy_(round_weights(name, seen_embedding if name == "embedding" else master[name]))
        if predicted is None:
            predicted = logits_by_definition(model, *input_labels(model.shape, text), text, DOC_START).softmax(-1).detach()
        labels, label_signs = input_labels(model.shape, text, draw_token_keep(text, 0.8, generator), generator)
        logits = logits_by_definition(model, labels, label_signs, text, DOC_START)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="sum")
        gradients = torch.autograd.grad(loss, list(views.values()))
        rate = 0.02 * min(1.0, (t + 1) / 2) * (min(1.0, (1 - t / max_iters) * tail) if tail else 1.0)
        for name, gradient in zip(views, gradients, strict=True):
            master[name] = step_by_definition(name, master[name], pack_gradient(gradient), state, t, rate, 1 / 50)
        if not late:
            seen_embedding = master["embedding"]
        rows.append(labels.flatten(0, 1))
        signs.append(label_signs.expand(labels.shape).flatten(0, 1))
    meta = {"model_dims": dims, "vocab": vocab, "frag_len": tokens, "steps": steps, "drop_config": config}
    meta |= {"doc_start_token": DOC_START, "max_iters": max_iters, "noise_rows": noise_rows}
    assert predicted is not None
    return {
        **{f"init/{name}": matrix.numpy() for name, matrix in init.items()},
        **{f"after/{name}": matrix.numpy() for name, matrix in master.items()},
        "text": text.numpy(),
        "target": target.numpy(),
        "train_label": torch.stack(rows).numpy(),
        "train_sign": torch.stack(signs).to(torch.int8).numpy(),
        "pred": predicted.numpy(),
        "bias": model.bias2.numpy(),
        "meta": np.array(json.dumps(meta)),
    }
