"""A KDA layer in float64, one document at a time, straight down: what the layer is tested against.

It shares no line with the layer: the recurrence is :func:`mate.functional.kda_reference`, the
convolution torch's own, the norm spelled out.
"""

import torch
import torch.nn.functional as F
from kda_cases import one_thread
from torch import Tensor

from mate.functional import kda_reference
from mate.layers import KimiDeltaAttention


def make_layer(hidden: int = 48, heads: int = 2, seed: int = 0, **options) -> KimiDeltaAttention:
    """A layer whose every parameter matters: nothing small, nothing equal between heads."""
    torch.manual_seed(seed)
    layer = KimiDeltaAttention(hidden, heads, layer_idx=0, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ("A_log", "dt_bias", "o_norm.weight"):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(std=1.5 * fan_in**-0.5)
        layer.dt_bias -= 3
    return layer


def parameters64(layer: KimiDeltaAttention, requires_grad: bool = False) -> dict[str, Tensor]:
    return {
        name: p.detach().double().requires_grad_(requires_grad)
        for name, p in layer.named_parameters()
    }


def truth(
    layer: KimiDeltaAttention, x: Tensor, p: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One document x [T, hidden] to (output [T, hidden], conv window [C, W], state [Hv, V, K])."""
    with one_thread():
        return _truth(layer, x, p)


def _truth(
    layer: KimiDeltaAttention, x: Tensor, p: dict[str, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    p = parameters64(layer) if p is None else p
    x, width = x.double(), layer.conv_size
    streams, windows = [], []
    for s in "qkv":
        projected = x @ p[f"{s}_proj.weight"].T
        padded = torch.cat([projected.new_zeros(width, projected.shape[1]), projected])
        windows.append(padded[-width:].T)
        kernel = p[f"{s}_conv1d.weight"]
        y = F.conv1d(padded.T[None], kernel, groups=kernel.shape[0])[0].T
        streams.append(F.silu(y[1:]).unflatten(-1, (-1, 128)))
    q, k, v = streams
    g = (x @ p["f_a_proj.weight"].T @ p["f_b_proj.weight"].T).unflatten(-1, (-1, 128))
    beta = x @ p["b_proj.weight"].T
    o, state = kda_reference(
        *(t[None] for t in (q, k, v, g, beta)),
        A_log=p["A_log"],
        dt_bias=p["dt_bias"],
        lower_bound=layer.lower_bound,
        allow_neg_eigval=layer.allow_neg_eigval,
    )
    gate = (x @ p["g_a_proj.weight"].T @ p["g_b_proj.weight"].T).unflatten(-1, (-1, 128))
    normed = o[0] / torch.sqrt(o[0].pow(2).mean(-1, keepdim=True) + layer.o_norm.eps)
    y = (normed * p["o_norm.weight"] * torch.sigmoid(gate)).flatten(-2) @ p["o_proj.weight"].T
    return y, torch.cat(windows), state[0]
