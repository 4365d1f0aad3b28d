"""The norm behind the recurrence: RMS over one head, gated by a sigmoid.

    mate::gated_rms_norm           the native kernel, or the same in PyTorch
    mate::gated_rms_norm_backward  gradients, in PyTorch

A device without native kernels, other than a CPU, takes the PyTorch form without an operator of its
own, so that the compiler can fuse it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mate.backends import native_layer
from mate.functional.contract import no_second_derivative
from mate.functional.direct import refuse_tangents


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """weight * x * rsqrt(mean(x^2) + eps) * sigmoid(gate), the mean over the last dimension.

    Args:
        x: [..., V], any float dtype.
        gate: x's shape, any float dtype: the gate's logit.
        weight: [V], any float dtype.
        eps: added to the mean square, inside the root.

    Returns:
        x's shape and dtype; everything inside is fp32.

    Raises:
        ValueError: gate or weight does not fit x.
    """
    if gate.shape != x.shape:
        raise ValueError(f"gate must have x's shape {tuple(x.shape)}, got {tuple(gate.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [V={x.shape[-1]}], got shape {tuple(weight.shape)}")
    if x.device.type != "cpu" and not native_layer.has_kernels(x.device):
        return in_pytorch(x, gate, weight, eps)
    refuse_tangents(x, gate, weight)
    return torch.ops.mate.gated_rms_norm(x, gate, weight, eps)


def in_pytorch(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return (normed * torch.sigmoid(gate.float())).to(x.dtype)


# ---- torch.library ------------------------------------------------------------------------------


def _new_output(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not native_layer.serves(x, gate, weight):
        return in_pytorch(x, gate, weight, eps).contiguous()
    output = _new_output(x)
    native_layer.gated_norm(_four(x), _four(gate), weight, eps, _four(output))
    return output


def _four(x: Tensor) -> Tensor:
    """x as [A, B, C, V] with contiguous V; a copy only where the strides leave no other way."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x[(None,) * (4 - x.dim())] if x.dim() <= 4 else x.flatten(0, -4)


def _gated_rms_norm_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x32, weight32, opened = x.float(), weight.float(), torch.sigmoid(gate.float())
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    normed = x32 * scale
    through_gate = grad.float() * opened
    grad_gate = through_gate * normed * weight32 * (1 - opened)
    grad_weight = (through_gate * normed).flatten(0, -2).sum(0) if x.dim() > 1 else None
    if grad_weight is None:
        grad_weight = through_gate * normed
    grad_normed = through_gate * weight32
    grad_x = scale * (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True))
    found = (grad_x, grad_gate, grad_weight)
    return tuple(
        empty.copy_(g)
        for empty, g in zip(_new_gradients(grad, x, gate, weight), found, strict=True)
    )  # type: ignore[return-value]


def _new_gradients(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_output(x), _new_output(gate), _new_output(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *torch.ops.mate.gated_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


_library = torch.library.Library("mate", "FRAGMENT")
_library.define("gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor")
_library.define(
    "gated_rms_norm_backward(Tensor grad, Tensor x, Tensor gate, Tensor weight, float eps) -> "
    "(Tensor, Tensor, Tensor)"
)
for _name, _function, _fake in (
    ("gated_rms_norm", _gated_rms_norm, _new_output),
    ("gated_rms_norm_backward", _gated_rms_norm_backward, _new_gradients),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mate::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "mate::gated_rms_norm", _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("mate::gated_rms_norm_backward", no_second_derivative, lib=_library)
