"""The norm behind the recurrence: RMS over one head, gated by a sigmoid."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    normed = F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return (normed * torch.sigmoid(gate.float())).to(x.dtype)
