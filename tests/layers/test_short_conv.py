"""The short convolution against torch's own in float64, document by document."""

import pytest
import torch
import torch.nn.functional as F
from kda_cases import rel_rms

from mate.functional.short_conv import short_conv

CHANNELS = 6


def conv_truth(x, weight, state=None):
    """x [T, C], weight [C, W], state [C, W] to (y [T, C], final state [C, W]) in float64."""
    width = weight.shape[1]
    past = x.new_zeros(width, x.shape[1]) if state is None else state.T
    seen = torch.cat([past.double(), x.double()])
    if not x.shape[0]:
        return x.double(), seen[-width:].T
    y = F.conv1d(seen[1:].T[None], weight.double()[:, None], groups=x.shape[1])[0].T
    return F.silu(y), seen[-width:].T


def make(shape, width, dtype=torch.float32, state=True, documents=None):
    torch.manual_seed(sum(shape) + width)
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(CHANNELS, width)
    documents = shape[0] if documents is None else documents
    past = torch.randn(documents, CHANNELS, width).to(dtype) if state else None
    return x, weight, past


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 2, 40])
def test_dense(length, width, state):
    x, weight, past = make((3, length, CHANNELS), width, state=state)
    y, final = short_conv(x, weight, past, output_final_state=True)
    assert y.shape == x.shape and final.shape == (3, CHANNELS, width)
    for b in range(3):
        expected, window = conv_truth(x[b], weight, None if past is None else past[b])
        assert rel_rms(y[b], expected) < 1e-6
        assert torch.equal(final[b].double(), window.double())


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("lengths", [[5], [3, 0, 1, 17, 2], [0, 0, 4], [2, 0], [0], []])
def test_documents(lengths, width, state):
    total = sum(lengths)
    x, weight, past = make((1, total, CHANNELS), width, state=state, documents=len(lengths))
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    y, final = short_conv(x, weight, past, cu_seqlens, output_final_state=True)
    assert y.shape == x.shape and final.shape == (len(lengths), CHANNELS, width)
    for n, document in enumerate(x[0].split(lengths) if lengths else []):
        expected, window = conv_truth(document, weight, None if past is None else past[n])
        start = sum(lengths[:n])
        assert rel_rms(y[0, start : start + lengths[n]], expected) < 1e-6
        assert torch.equal(final[n].double(), window.double())


def test_bf16_rounds_only_its_result():
    x, weight, past = make((1, 33, CHANNELS), 4, torch.bfloat16)
    y, _ = short_conv(x, weight, past)
    expected, _ = conv_truth(x[0], weight, past[0])
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[0], expected.float().to(torch.bfloat16))


def test_strided_input():
    x, weight, _ = make((2, 9, 3 * CHANNELS), 4)
    view = x[..., CHANNELS : 2 * CHANNELS]
    assert torch.equal(short_conv(view, weight)[0], short_conv(view.contiguous(), weight)[0])


def test_wider_state_is_read_from_its_end():
    x, weight, past = make((2, 5, CHANNELS), 4)
    wide = torch.cat([torch.randn(2, CHANNELS, 3), past], dim=-1)
    assert torch.equal(short_conv(x, weight, wide)[0], short_conv(x, weight, past)[0])


def test_nan_stays_in_its_document():
    x, weight, past = make((1, 12, CHANNELS), 4, documents=3)
    x[0, 4:8], past[1] = torch.nan, torch.nan
    cu_seqlens = torch.tensor([0, 4, 8, 12])
    y, final = short_conv(x, weight, past, cu_seqlens, output_final_state=True)
    assert y[0, 4:8].isnan().all() and final[1].isnan().all()
    assert y[0, :4].isfinite().all() and y[0, 8:].isfinite().all()
    assert final[[0, 2]].isfinite().all()


@pytest.mark.parametrize("lengths", [None, [1], [1, 0, 9, 2]])
@pytest.mark.parametrize("state", [False, True])
def test_gradients(lengths, state):
    total = 6 if lengths is None else sum(lengths)
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    x, weight, past = make((1, total, CHANNELS), 4, state=state, documents=len(lengths or [0]))
    inputs = [t.requires_grad_() for t in (x, weight, past) if t is not None]
    y, final = short_conv(x, weight, past, cu_seqlens, output_final_state=True)
    up, up_final = torch.randn_like(y), torch.randn_like(final)
    grads = torch.autograd.grad((y * up).sum() + (final * up_final).sum(), inputs)

    copies = [t.detach().double().requires_grad_() for t in inputs]
    past64 = copies[2] if state else [None] * final.shape[0]
    loss, start = 0, 0
    for n, length in enumerate(lengths or [total]):
        yn, fn = conv_truth(copies[0][0, start : start + length], copies[1], past64[n])
        loss = loss + (yn * up[0, start : start + length]).sum() + (fn * up_final[n]).sum()
        start += length
    for got, expected in zip(grads, torch.autograd.grad(loss, copies), strict=True):
        assert rel_rms(got, expected) < 1e-6


def test_errors_name_the_argument():
    x, weight, past = make((2, 5, CHANNELS), 4)
    for match, arguments in (
        ("x must be", (x[0], weight)),
        ("weight must be", (x, weight[:-1])),
        ("initial_state must be", (x, weight, past[:1])),
        ("initial_state must be", (x, weight, past[..., :3])),
        ("cu_seqlens must be", (x, weight, None, torch.tensor([0, 5]))),
    ):
        with pytest.raises(ValueError, match=match):
            short_conv(*arguments)


def test_second_derivatives_are_refused():
    x, weight, _ = make((2, 5, CHANNELS), 4, state=False)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(short_conv(x, weight)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()
