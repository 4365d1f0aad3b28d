"""The executable specification: Kimi Delta Attention token by token, in plain PyTorch.

Every kernel of this library is measured against :func:`kda_reference` in float64. It is written
to be read, differentiates by autograd, and takes any float dtype, any device, any head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

L2NORM_EPS = 1e-6


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension; a zero row stays zero."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2NORM_EPS)


def bounded_log_decay(g: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float) -> Tensor:
    """lower_bound * sigmoid(exp(A_log) * (g + dt_bias)), in (lower_bound, 0)."""
    return lower_bound * torch.sigmoid(A_log.exp()[:, None] * (g + dt_bias))


def softplus_log_decay(g: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """-exp(A_log) * softplus(g + dt_bias), unbounded below."""
    return -A_log.exp()[:, None] * F.softplus(g + dt_bias)


def log_decay(
    g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> Tensor:
    """The natural-log decay per key channel for gate input g [..., Hv, K]."""
    if A_log is None or dt_bias is None:
        return g
    dt_bias = dt_bias.view(g.shape[-2:])
    if lower_bound is None:
        return softplus_log_decay(g, A_log, dt_bias)
    return bounded_log_decay(g, A_log, dt_bias, lower_bound)


def kda_recurrence(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float, S: Tensor
) -> tuple[Tensor, Tensor]:
    """One batch of sequences: q, k, a [B, T, H, K]; v [B, T, H, V]; b [B, T, H]; S [B, H, K, V].

    S_t = (I - b_t k_t k_t^T) Diag(exp(a_t)) S_{t-1} + b_t k_t v_t^T;  o_t = scale * S_t^T q_t.
    """
    out = []
    for t in range(q.shape[1]):
        S = a[:, t].exp()[..., None] * S
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", b[:, t, :, None] * k[:, t], error)
        out.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return (torch.stack(out, 1) if out else torch.zeros_like(v)), S


def kda_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = -5.0,
    use_qk_l2norm_in_kernel: bool = True,
    *,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The operator's contract (see :func:`mate.chunk_kda`), computed in ``dtype``.

    Returns the output in v's layout and the final state [N, Hv, V, K] (``state_v_first=False``:
    [N, Hv, K, V]), both in ``dtype``.
    """
    batched = v.dim() == 4
    q, k, v, g, beta = (x.to(dtype) if batched else x[None].to(dtype) for x in (q, k, v, g, beta))
    A_log, dt_bias = (None if x is None else x.to(dtype) for x in (A_log, dt_bias))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    group = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(group, dim=2), k.repeat_interleave(group, dim=2)
    a = log_decay(g, A_log, dt_bias, lower_bound)
    b = beta
    if use_beta_sigmoid_in_kernel:
        b = torch.sigmoid(beta) * (2 if allow_neg_eigval else 1)

    bounds = [] if cu_seqlens is None else cu_seqlens.tolist()
    num_seqs = v.shape[0] if cu_seqlens is None else len(bounds) - 1
    if initial_state is None:
        S = v.new_zeros(num_seqs, v.shape[2], q.shape[-1], v.shape[-1])
    else:
        S = initial_state.to(dtype)
        S = S.transpose(-1, -2) if state_v_first else S

    if cu_seqlens is None:
        output, S = kda_recurrence(q, k, v, a, b, scale, S)
    else:
        parts, states = [v[:, :0]], [S[:0]]
        for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            q_n, k_n, v_n, a_n, b_n = (x[:, start:end] for x in (q, k, v, a, b))
            o, s = kda_recurrence(q_n, k_n, v_n, a_n, b_n, scale, S[n : n + 1])
            parts.append(o)
            states.append(s)
        output, S = torch.cat(parts, 1), torch.cat(states)
    S = S.transpose(-1, -2) if state_v_first else S
    return (output if batched else output[0]), S
