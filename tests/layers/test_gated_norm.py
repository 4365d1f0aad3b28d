"""The gated RMS norm against its formula in float64."""

import pytest
import torch
from kda_cases import rel_rms

from mate.functional.gated_norm import gated_rms_norm


def norm_truth(x, gate, weight, eps):
    x, gate, weight = x.double(), gate.double(), weight.double()
    return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * torch.sigmoid(gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # 1e-3: where eps matters
def test_values(dtype, scale):
    torch.manual_seed(0)
    x, gate = (torch.randn(2, 5, 3, 128) * scale).to(dtype), torch.randn(2, 5, 3, 128).to(dtype)
    weight = torch.rand(128).to(dtype)
    got = gated_rms_norm(x, gate, weight, 1e-5)
    expected = norm_truth(x, gate, weight, 1e-5)
    assert got.dtype == dtype
    assert rel_rms(got, expected) < (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_gradients():
    torch.manual_seed(0)
    inputs = [torch.randn(4, 2, 128), torch.randn(4, 2, 128), torch.rand(128)]
    inputs = [t.requires_grad_() for t in inputs]
    copies = [t.detach().double().requires_grad_() for t in inputs]
    up = torch.randn(4, 2, 128)
    got = torch.autograd.grad((gated_rms_norm(*inputs, 1e-5) * up).sum(), inputs)
    expected = torch.autograd.grad((norm_truth(*copies, 1e-5) * up).sum(), copies)
    for a, b in zip(got, expected, strict=True):
        assert rel_rms(a, b) < 1e-6


def test_errors_name_the_argument():
    x = torch.randn(4, 128)
    with pytest.raises(ValueError, match="gate must have"):
        gated_rms_norm(x, x[:2], torch.ones(128))
    with pytest.raises(ValueError, match="weight must be"):
        gated_rms_norm(x, x, torch.ones(64))


def test_second_derivatives_are_refused():
    x = torch.randn(4, 128, requires_grad=True)
    (grad,) = torch.autograd.grad(gated_rms_norm(x, x, torch.ones(128)).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()
