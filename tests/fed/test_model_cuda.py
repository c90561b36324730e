"""The model on a GPU: the same numbers as on the CPU, the memory-lean attention kernel, low precision. Skipped where there is none."""

import pytest
import torch
from model_cases import DOC_START, random_model, random_text
from torch.nn.attention import SDPBackend, sdpa_kernel

from tscale_fed.model import attention
from tscale_fed.model.forward import Model
from tscale_fed.model.parameters import Parameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(model: Model, compute_dtype: torch.dtype | None = None) -> Model:
    parameters = Parameters(model.shape, "cuda", model.parameter_store.flat.dtype).load(model.parameter_store.flat)
    return Model(model.shape, parameters, model.bias2, compute_dtype=compute_dtype)


@pytest.mark.parametrize("doc_start", [None, DOC_START])
@pytest.mark.parametrize("dims", ["e128h1d4w16", "e256h2d4relu2w200", "e128h3d6w32"])
def test_loss_and_gradients_equal_those_of_the_cpu(dims: str, doc_start: int | None) -> None:
    model = random_model(dims, dtype=torch.float64)
    text, target = random_text(2, 131)
    gpu = on_cuda(model)
    totals = [m.loss(text.to(d), target.to(d), doc_start_token=doc_start)[0] for m, d in ((model, "cpu"), (gpu, "cuda"))]
    torch.testing.assert_close(totals[1].cpu(), totals[0], rtol=1e-10, atol=1e-9)
    for total in totals:
        total.backward()
    torch.testing.assert_close(gpu.parameter_store.flat_grad.cpu(), model.parameter_store.flat_grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(131, 200), (131, 16), (512, 64)])
def test_attention_runs_on_the_memory_lean_kernel(tokens: int, width: int, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, tokens, 3, 128, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    text = torch.randint(9, (2, tokens), device="cuda")
    plan = attention.build_plan(((width, 0.0),), text, 0, dtype)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = attention.attend(query, key, value, (width, 0.0), plan.biases[0], plan.same_document)
        out.sum().backward()
    wanted = attention.attention_ref(query, key, value, width, 0.0, attention.document_numbers(text, 0))
    tolerance = 1e-2 if dtype == torch.float32 else 5e-2  # products may be in TF32
    assert float((out - wanted).detach().abs().max()) < tolerance
    assert query.grad is not None and bool(query.grad.isfinite().all())


def test_low_precision_stays_close() -> None:
    model = random_model("e256h2d6w64")
    text, target = random_text(4, 128)
    fast = on_cuda(model, torch.bfloat16)
    total, wanted = fast.loss(text.cuda(), target.cuda())[0], model.loss(text, target)[0]
    assert float(total.detach().cpu()) == pytest.approx(float(wanted.detach()), rel=0.01)
    for loss in (total, wanted):
        loss.backward()
    gradient = model.parameter_store.flat_grad
    assert float((fast.parameter_store.flat_grad.cpu() - gradient).norm() / gradient.norm()) < 0.05
