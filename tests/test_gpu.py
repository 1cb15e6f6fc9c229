"""What needs a CUDA device: the backends of TrainableAttention, and the suite on one device."""

from __future__ import annotations

import pytest
import torch

from genmodel import TrainableAttention, check_model
from genmodel.conformance.verdict import Status
from genmodel.modeling.attention import Backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("backend", ["auto", "varlen", "sdpa"])
def test_backends_agree_with_float64(backend: Backend) -> None:
    """Outputs and gradients in bfloat16, packed and grouped, are those of float64 but for rounding."""
    torch.manual_seed(0)
    shapes = ((48, 8 * 64), (48, 2 * 64), (48, 2 * 64))
    exact = [torch.randn(shape, device="cuda", dtype=torch.float64, requires_grad=True) for shape in shapes]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    boundaries = torch.tensor([0, 20, 48], device="cuda", dtype=torch.int32)
    ours = TrainableAttention(8, 64, 2, backend=backend)(*rounded, cu_seqlens=boundaries)
    theirs = TrainableAttention(8, 64, 2, backend="sdpa")(*exact, cu_seqlens=boundaries)
    torch.testing.assert_close(ours.double(), theirs, atol=2e-2, rtol=2e-2)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for mine, other in zip(rounded, exact, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, atol=5e-2, rtol=5e-2)


def test_the_suite_on_one_device() -> None:
    """The dense reference model passes on vLLM's CUDA kernels."""
    verdicts = check_model("genmodel.reference_models.dense:factory", tp=(1,))
    assert not [v for v in verdicts if v.status not in (Status.PASSED, Status.NOT_APPLICABLE)]
