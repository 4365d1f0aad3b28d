"""The short causal convolution in front of q, k and v: depthwise, W taps, SiLU.

    mate::short_conv           the native kernel, or the same in PyTorch; differentiable
    mate::short_conv_backward  gradients, in PyTorch

A device without native kernels, other than a CPU, takes the PyTorch form below without an operator
of its own, so that the compiler can fuse it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mate.backends import native_layer
from mate.functional.contract import no_second_derivative
from mate.functional.direct import refuse_tangents


def short_conv(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution and SiLU, each document on its own.

    y[t, c] = silu(sum_j weight[c, j] * x[t - W + 1 + j, c]); what lies before a document is its
    initial state, or zeros. Computed in fp32, differentiable in x, weight and initial_state.

    Channels do not mix: where q, k and v are neighbours in one projection [B, T, Cq + Ck + Cv],
    their convolutions are one call, with their weights one below another.

    Args:
        x: [B, T, C], or [1, S, C] with ``cu_seqlens``; any float dtype, any strides.
        weight: [C, W], the last tap multiplies the newest token; any float dtype. The native
            kernel serves W <= 8, PyTorch the rest.
        initial_state: [N, C, >= W]; its last W columns are the newest inputs so far, oldest first
            (N = B, or the number of documents). None: zeros.
        cu_seqlens: [N + 1] integers on x's device: document n is x[0, cu[n]:cu[n + 1]]. Documents
            may be empty or shorter than the window.
        output_final_state: also return the window that the next call starts from.

    Returns:
        (y, final_state): y in x's shape and dtype; final_state [N, C, W] in x's dtype, or None.

    Raises:
        ValueError: a shape or a device does not fit.
    """
    _check(x, weight, initial_state, cu_seqlens)
    width = weight.shape[1]
    if initial_state is not None:
        if initial_state.shape[2] != width:
            initial_state = initial_state[..., -width:]
        initial_state = initial_state.to(x.dtype)
    if x.device.type != "cpu" and not native_layer.has_kernels(x.device):
        return in_pytorch(x, weight, initial_state, cu_seqlens, output_final_state)
    refuse_tangents(x, weight, initial_state)
    y, final = torch.ops.mate.short_conv(x, weight, initial_state, cu_seqlens, output_final_state)
    return y, final if output_final_state else None


def _check(x: Tensor, weight: Tensor, initial_state: Tensor | None, cu: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, C], got shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(f"weight must be [C={x.shape[2]}, W], got shape {tuple(weight.shape)}")
    if cu is not None and (cu.dim() != 1 or cu.shape[0] < 1 or x.shape[0] != 1):
        shapes = f"x {tuple(x.shape)}, cu_seqlens {tuple(cu.shape)}"
        raise ValueError(f"cu_seqlens must be [N + 1] with x of shape [1, S, C], got {shapes}")
    for name, other in (("weight", weight), ("initial_state", initial_state), ("cu_seqlens", cu)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {other.device}")
    if initial_state is not None:
        count = x.shape[0] if cu is None else cu.shape[0] - 1
        got = tuple(initial_state.shape)
        if got[:2] != (count, x.shape[2]) or len(got) != 3 or got[2] < weight.shape[1]:
            expected = f"[N={count}, C={x.shape[2]}, W={weight.shape[1]}]"
            raise ValueError(f"initial_state must be {expected}, got shape {got}")


def _as_state(rows: Tensor) -> Tensor:
    """[N, W, C] rows, oldest first, to a state [N, C, W]."""
    return rows.transpose(1, 2).contiguous()


def in_pytorch(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    width = weight.shape[1]
    if initial_state is not None and cu_seqlens is None and x.shape[1] == 1:
        return _one_token(x, weight, initial_state)
    if cu_seqlens is not None:
        return _documents(x, weight, initial_state, cu_seqlens, output_final_state)
    if initial_state is None:
        y, seen = _conv(x, weight), F.pad(x[:, -width:], (0, 0, max(width - x.shape[1], 0), 0))
    else:
        seen = torch.cat([initial_state.transpose(1, 2), x], dim=1)  # [B, W + T, C]
        y = _conv(seen, weight)[:, width:]
    return y, _as_state(seen[:, -width:]) if output_final_state else None


def _one_token(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    window = torch.cat([state[..., 1:], x.transpose(1, 2)], dim=-1)
    y = F.silu((window.float() * weight.float()).sum(-1))
    return y.to(x.dtype)[:, None], window


class _Documents(NamedTuple):
    """Each document behind its own W rows of past; all indices are rows of ``inputs``."""

    inputs: Tensor  # [1, S + N * W, C]
    tokens: Tensor  # [S]: where each token lies
    past: Tensor  # [N * W]: the rows before each document
    last: Tensor  # [N * W]: the last W rows of each


def _lay_out(x: Tensor, width: int, state: Tensor | None, cu: Tensor) -> _Documents:
    """Every index is computed on the device from cu_seqlens: the host reads nothing back."""
    (_, total, channels), count = x.shape, cu.shape[0] - 1
    cu = cu.long().clamp(0, total)
    token = torch.arange(total, device=x.device)
    document = torch.searchsorted(cu[1:], token, right=True).clamp(max=count - 1)
    tokens = token + (document + 1) * width
    past = torch.arange(count, device=x.device)[:, None] * width
    past = past + torch.arange(width, device=x.device)  # [N, W]
    behind, last = (cu[:-1, None] + past).flatten(), (cu[1:, None] + past).flatten()

    inputs = x.new_zeros(total + count * width, channels).index_copy(0, tokens, x[0])
    if state is not None:
        inputs = inputs.index_copy(0, behind, state.transpose(1, 2).flatten(0, 1))
    return _Documents(inputs[None], tokens, behind, last)


def _documents(
    x: Tensor, weight: Tensor, state: Tensor | None, cu: Tensor, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Lay the documents out, convolve once, take the tokens back."""
    (channels, width), count = weight.shape, cu.shape[0] - 1
    if count == 0:
        return x.new_zeros(x.shape), x.new_zeros(0, channels, width) if output_final_state else None
    laid_out = _lay_out(x, width, state, cu)
    y = _conv(laid_out.inputs, weight, laid_out.tokens)
    if not output_final_state:
        return y, None
    last = laid_out.inputs[0].index_select(0, laid_out.last)
    return y, _as_state(last.view(count, width, channels))


def _conv(x: Tensor, weight: Tensor, rows: Tensor | None = None) -> Tensor:
    return _CausalConvSiLU.apply(x, weight, rows)


def _fir(x: Tensor, taps: Tensor) -> Tensor:
    """sum_lag taps[-1 - lag] * x[t - lag]; x [B, T, C] and taps [W, C] in fp32.

    Shifted multiply-adds in x's own layout: three to ten times faster than a depthwise F.conv1d
    on CPUs, which wants channels first.
    """
    y = x * taps[-1]
    for lag in range(1, min(taps.shape[0], x.shape[1])):
        y[:, lag:].addcmul_(x[:, :-lag], taps[-1 - lag])
    return y


class _CausalConvSiLU(torch.autograd.Function):
    """silu(fir(x)), or only the given rows of it; the backward recomputes instead of saving."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, rows)
        y = F.silu(_fir(x.float(), weight.float().t()), inplace=True)
        if rows is not None:
            y = y.index_select(1, rows)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rows = ctx.saved_tensors
        grad = grad.float()
        if rows is not None:
            grad = grad.new_zeros(x.shape).index_copy(1, rows, grad)
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_x, grad_weight = _conv_backward(grad, x, weight, need_x, need_weight)
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """fp32 gradients of x [B, T, C] and weight from that of silu(fir(x)), in fp32."""
    x32, taps = x.float(), weight.float().t()
    grad = torch.ops.aten.silu_backward(grad, _fir(x32, taps))
    lags = range(min(taps.shape[0], x.shape[1]))
    grad_x = grad_weight = None
    if need_x:
        grad_x = grad * taps[-1]
        for lag in lags[1:]:
            grad_x[:, :-lag].addcmul_(grad[:, lag:], taps[-1 - lag])
    if need_weight:
        grad_taps = torch.zeros_like(taps)
        for lag in lags:
            product = grad[:, lag:] * x32[:, : x.shape[1] - lag]
            grad_taps[-1 - lag] = product.sum((0, 1))
        grad_weight = grad_taps.t()
    return grad_x, grad_weight


# ---- torch.library ------------------------------------------------------------------------------


def _new_outputs(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not output_final_state:
        return y, x.new_empty(0)
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return y, x.new_empty(count, *weight.shape)


def _short_conv(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    arguments = (x, weight, initial_state, cu_seqlens, output_final_state)
    if weight.shape[1] > native_layer.MAX_CONV_WIDTH or not native_layer.serves(x, weight):
        y, final = in_pytorch(*arguments)
        return y.contiguous(), final if output_final_state and final is not None else x.new_empty(0)
    y, final = _new_outputs(*arguments)
    if cu_seqlens is not None and x.is_cpu:  # tokens of no document
        y[:, : int(cu_seqlens[0])] = 0
        y[:, max(int(cu_seqlens[-1]), 0) :] = 0
    if x.stride(2) != 1:
        x = x.contiguous()
    native_layer.short_conv(
        x, weight, initial_state, cu_seqlens, y, final if output_final_state else None
    )
    return y, final


def _short_conv_backward(
    grad: Tensor,
    grad_final: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    results = _backward_fake(grad, grad_final, x, weight, initial_state, cu_seqlens, need_weight)
    width = weight.shape[1]
    grad, last = grad.float(), grad_final.float().transpose(1, 2) if grad_final.numel() else None
    documents = None
    if cu_seqlens is None:
        seen, behind = x, 0
        if initial_state is not None:
            seen, behind = torch.cat([initial_state.transpose(1, 2), x], dim=1), width
            grad = F.pad(grad, (0, 0, behind, 0))
    elif cu_seqlens.shape[0] == 1:
        return results[0].zero_(), results[1].zero_(), results[2]
    else:
        documents = _lay_out(x, width, initial_state, cu_seqlens)
        seen = documents.inputs
        grad = grad.new_zeros(seen.shape).index_copy(1, documents.tokens, grad)
    grad_seen, grad_weight = _conv_backward(grad, seen, weight, True, need_weight)
    assert grad_seen is not None
    if documents is not None:
        if last is not None:
            grad_seen.index_add_(1, documents.last, last.flatten(0, 1)[None])
        grad_x = grad_seen.index_select(1, documents.tokens)
        grad_past = grad_seen[0].index_select(0, documents.past).unflatten(0, (-1, width))
    else:
        if last is not None:
            rows = min(width, seen.shape[1])
            grad_seen[:, seen.shape[1] - rows :] += last[:, width - rows :]
        grad_x, grad_past = grad_seen[:, behind:], grad_seen[:, :behind]
    results[0].copy_(grad_x)
    if need_weight and grad_weight is not None:
        results[1].copy_(grad_weight)
    if initial_state is not None:
        results[2].copy_(grad_past.transpose(1, 2))
    return results


def _backward_fake(
    grad: Tensor,
    grad_final: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    form = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=form),
        torch.empty_like(weight, memory_format=form) if need_weight else x.new_empty(0),
        x.new_empty(0)
        if initial_state is None
        else torch.empty_like(initial_state, memory_format=form),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])


def _autograd(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Any, ...]:
    x, weight, state, cu_seqlens = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[1]
    grad_x, grad_weight, grad_state = torch.ops.mate.short_conv_backward(
        grad, grad_final, x, weight, state, cu_seqlens, need_weight
    )
    return (
        grad_x,
        grad_weight if need_weight else None,
        None if state is None else grad_state,
        None,
        None,
    )


_library = torch.library.Library("mate", "FRAGMENT")
_library.define(
    "short_conv(Tensor x, Tensor weight, Tensor? initial_state, Tensor? cu_seqlens, "
    "bool output_final_state) -> (Tensor, Tensor)"
)
_library.define(
    "short_conv_backward(Tensor grad, Tensor grad_final, Tensor x, Tensor weight, "
    "Tensor? initial_state, Tensor? cu_seqlens, bool need_weight) -> (Tensor, Tensor, Tensor)"
)
for _name, _function, _fake in (
    ("short_conv", _short_conv, _new_outputs),
    ("short_conv_backward", _short_conv_backward, _backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mate::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "mate::short_conv", _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("mate::short_conv_backward", no_second_derivative, lib=_library)
