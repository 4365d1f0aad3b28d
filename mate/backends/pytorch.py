"""The pytorch backend: chunked KDA, forward and backward, in batched matrix products.

It serves any device, and every backward pass. Per chunk of C tokens and head, with D_ij the decay
from token j to token i (docs/algorithm.md derives the formulas):

    L_ij = b_i <k_i D_ij, k_j> (i > j)     P_ij = scale <q_i D_ij, k_j> (i >= j)
    X = (I + L)^-1    W = X (b Kd)    U = X (b V)    V' = U - W S
    O = Qd S + P V'    S <- Diag(e^G) S + Kr^T V'

D_ij is never formed from cumulative sums. A binary tree over the chunk multiplies decays up from
single tokens: a pair (i, j) meets at the block of 2s tokens where i lies right and j lies left of
the middle, and D_ij = (product from the middle to i) * (product from j to the middle). All factors
are at most 1: nothing overflows, however strong the gate, and a decay of exactly 0 is exact.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mate.backends import pool
from mate.backends.call import KdaCall
from mate.functional.reference import L2NORM_EPS

P = ParamSpec("P")
R = TypeVar("R")
MAX_CHUNK = 64
# Denormal numbers make a matrix product 10 times slower: products of decays below TINY, of which
# two may meet, and what is multiplied with values of order 1 below TINY_RESULT, count as 0.
TINY, TINY_RESULT = 1e-18, 1e-30
SLAB_BYTES = 2 << 20  # of one [B, H, tokens, D] array: bounds the memory of both passes


def refusal(device: torch.device, dtype: torch.dtype, recurrent: bool = False) -> str | None:
    """Why this backend cannot serve a call; None when it can."""
    return None


# ---------------------------------------------------------------- inputs and their gradients


@dataclass(slots=True)
class Inputs:
    """Operands of the recurrence as [B, H, T, D] (b: [B, H, T]) in the compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads_first(x: Tensor, group: int = 1) -> Tensor:
    """[B, T, H, ...] -> [B, H * group, T, ...] in the compute dtype."""
    x = x.transpose(1, 2).to(_compute_dtype(x.dtype))
    return x.repeat_interleave(group, dim=1) if group > 1 else x


def _rstd(x: Tensor) -> Tensor:
    return torch.rsqrt((x * x).sum(-1, keepdim=True) + L2NORM_EPS)


def _gate_input(call: KdaCall, g: Tensor) -> tuple[Tensor, Tensor]:
    """exp(A_log) [H, 1, 1] and g + dt_bias [B, H, T, K]; a g of -inf (no decay) stays finite."""
    assert call.A_log is not None and call.dt_bias is not None
    rate = call.A_log.to(g.dtype).exp()[:, None, None]
    bias = call.dt_bias.to(g.dtype).view(g.shape[1], 1, g.shape[3])
    return rate, (g + bias).clamp_min(torch.finfo(g.dtype).min)


def _prepare(call: KdaCall, tokens: slice) -> Inputs:
    """Norm, gate and beta of a window of the call."""
    group = call.v.shape[2] // call.q.shape[2]
    q, k = (_heads_first(x[:, tokens]) for x in (call.q, call.k))
    if call.l2norm:
        q, k = q * _rstd(q), k * _rstd(k)
    if group > 1:
        q, k = (x.repeat_interleave(group, dim=1) for x in (q, k))
    v, g, beta = (_heads_first(x[:, tokens]) for x in (call.v, call.g, call.beta))
    a = g
    if call.A_log is not None:
        rate, u = _gate_input(call, g)
        if call.lower_bound is None:
            a = -rate * F.softplus(u)
        else:
            a = call.lower_bound * torch.sigmoid(rate * u)
    b = beta
    if call.beta_sigmoid:
        b = torch.sigmoid(beta) * (2.0 if call.neg_eigval else 1.0)
    return Inputs(q, k, v, a, b)


@dataclass(slots=True)
class Gradients:
    """Of the call's own tensors, in their layouts and dtypes; dA_log, ddt_bias summed in fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None

    @classmethod
    def empty(cls, call: KdaCall) -> "Gradients":
        inputs = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in
                  (call.q, call.k, call.v, call.g, call.beta))  # fmt: skip
        wide = _compute_dtype(call.q.dtype)
        return cls(*inputs, *(None if x is None else torch.zeros_like(x, dtype=wide)
                              for x in (call.A_log, call.dt_bias)))  # fmt: skip


def _prepare_backward(call: KdaCall, tokens: slice, d: Inputs, into: Gradients) -> None:
    """Carries the gradients of :func:`_prepare`'s results back to the call's tensors."""

    def store(target: Tensor, grad: Tensor) -> None:
        target[:, tokens] = grad.transpose(1, 2).to(target.dtype)

    heads_qk = call.q.shape[2]
    for x, dy, target in ((call.q, d.q, into.q), (call.k, d.k, into.k)):
        dy = dy.unflatten(1, (heads_qk, -1)).sum(2)
        if call.l2norm:
            x = _heads_first(x[:, tokens])
            r = _rstd(x)
            y = x * r
            dy = r * (dy - (dy * y).sum(-1, keepdim=True) * y)
        store(target, dy)
    store(into.v, d.v)

    da = d.a
    if call.A_log is not None:
        assert into.A_log is not None and into.dt_bias is not None
        rate, u = _gate_input(call, _heads_first(call.g[:, tokens]))
        if call.lower_bound is None:
            du = -rate * torch.sigmoid(u) * da
            dA = (-rate * F.softplus(u) * da).sum((0, 2, 3))
        else:
            s = torch.sigmoid(rate * u)
            du = call.lower_bound * rate * s * (1 - s) * da
            dA = (du * u).sum((0, 2, 3))
        into.A_log += dA
        into.dt_bias += du.sum((0, 2)).view(into.dt_bias.shape)
        da = du
    store(into.g, da)

    db = d.b
    if call.beta_sigmoid:
        s = torch.sigmoid(_heads_first(call.beta[:, tokens]))
        db = db * s * (1 - s) * (2.0 if call.neg_eigval else 1.0)
    store(into.beta, db)


# ---------------------------------------------------------------- one chunk and its gradient


@dataclass(slots=True)
class Chunks:
    """A slab cut into N chunks: everything that needs no state. Shapes [B, H, N, C, ...]."""

    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor  # [B, H, N, C, 1]
    decays: list[tuple[Tensor, Tensor]]  # per tree level, then over the chunk: to_right, to_left
    kk: Tensor  # <k_i D_ij, k_j>, strictly lower
    P: Tensor
    X: Tensor
    Kd: Tensor
    Qd: Tensor
    Kr: Tensor
    W: Tensor
    U: Tensor
    decay: Tensor  # of the state over a chunk: [B, H, N, K, 1]


def _halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Left and right halves [.., C/2s, s, D] of every block of 2s tokens of x [.., C, D]."""
    left, right = x.unflatten(-2, (-1, 2, s)).unbind(-3)
    return left, right


def _corners(x: Tensor, s: int) -> Tensor:
    """The (right half, left half) corner of every diagonal 2s block of x [.., C, C].

    A writable view [.., s, s, C/2s].
    """
    blocks = x.unflatten(-1, (-1, 2, s)).unflatten(-4, (-1, 2, s))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2)


def _levels(chunk: int) -> list[int]:
    return [1 << i for i in range(chunk.bit_length() - 1)]


def _cut(x: Inputs, scale: float, chunk: int) -> Chunks:
    """All chunk-local work. T is padded to whole chunks with tokens that change nothing."""
    pad = -x.q.shape[2] % chunk
    q, k, v, a, b = (
        F.pad(y, (0, 0, 0, pad)).unflatten(2, (-1, chunk))
        for y in (x.q, x.k, x.v, x.a, x.b.unsqueeze(-1))
    )
    kk = k.new_zeros(*k.shape[:-1], chunk)
    P = torch.diag_embed(scale * (q * k).sum(-1))
    X = torch.eye(chunk, dtype=k.dtype, device=k.device).expand_as(kk).clone()
    to_right = a.exp()  # product from the block's first token to i, both included
    to_left = torch.ones_like(a)  # product from the token after j to the block's last
    decays = []
    for s in _levels(chunk):
        decays.append((to_right, to_left))
        (k_left, k_right), (_, q_right) = _halves(k, s), _halves(q, s)
        right, left = _halves(to_right, s)[1], _halves(to_left, s)[0]
        column = (k_left * left).mT
        _corners(kk, s).copy_(((k_right * right) @ column).movedim(-3, -1))
        _corners(P, s).copy_((scale * (q_right * right) @ column).movedim(-3, -1))
        # (I + L)^-1 by block doubling: the corner of the inverse is -X_right L_corner X_left
        blocks = X.unflatten(-1, (-1, s)).unflatten(-3, (-1, s)).diagonal(dim1=-4, dim2=-2)
        X_left, X_right = blocks.movedim(-1, -3).unflatten(-3, (-1, 2)).unbind(-3)
        b_right = _halves(b, s)[1]
        corner = b_right * _corners(kk, s).movedim(-1, -3)
        _corners(X, s).copy_(-F.hardshrink(X_right @ corner @ X_left, TINY).movedim(-3, -1))
        total_left, total_right = (half[..., -1:, :] for half in _halves(to_right, s))
        to_right, to_left = to_right.clone(), to_left.clone()
        torch.threshold_(_halves(to_right, s)[1].mul_(total_left), TINY, 0.0)
        torch.threshold_(_halves(to_left, s)[0].mul_(total_right), TINY, 0.0)
    decays.append((to_right, to_left))
    Kd, Qd, Kr = k * to_right, scale * q * to_right, k * to_left
    # the decay of the state is rounded once a chunk, not once a token: gates near 1 compound
    decay = F.threshold(a.sum(-2).exp(), TINY_RESULT, 0.0).unsqueeze(-1)
    W, U = F.hardshrink(X @ (b * Kd), TINY_RESULT), X @ (b * v)
    P = F.hardshrink(P, TINY_RESULT)
    return Chunks(q, k, v, b, decays, kk, P, X, Kd, Qd, Kr, W, U, decay)


def _cut_backward(c: Chunks, scale: float, d: "ChunkGradients") -> Inputs:
    """Gradients of q, k, v, a, b [B, H, N, C, ...] from those that the scan leaves."""
    dX = d.W @ (c.b * c.Kd).mT + d.U @ (c.b * c.v).mT
    dL = -(c.X.mT @ dX @ c.X.mT).tril(-1)
    XtW, XtU = c.X.mT @ d.W, c.X.mT @ d.U
    dv = c.b * XtU
    db = ((XtU * c.v).sum(-1) + (XtW * c.Kd).sum(-1) + (dL * c.kk).sum(-1)).unsqueeze(-1)
    dKd = c.b * XtW
    dkk, dP = dL * c.b, scale * d.P
    chunk = c.k.shape[-2]
    to_right, to_left = c.decays[-1]
    dq = scale * d.Qd * to_right + dP.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * c.k
    dk = dKd * to_right + d.Kr * to_left + dP.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * c.q
    # gradients of the logarithms of the products, walked down the tree to single tokens
    log_right = dKd * c.Kd + d.Qd * c.Qd
    log_left = d.Kr * c.Kr
    da = (d.decay * c.decay).mT.expand_as(c.k).clone()
    for s, (right, left) in reversed(list(zip(_levels(chunk), c.decays, strict=False))):
        _halves(da, s)[0].add_(_halves(log_right, s)[1].sum(-2, keepdim=True))
        _halves(da, s)[1].add_(_halves(log_left, s)[0].sum(-2, keepdim=True))
        e_right, e_left = _halves(right, s)[1], _halves(left, s)[0]
        (k_left, k_right), (_, q_right) = _halves(c.k, s), _halves(c.q, s)
        dkk_s, dP_s = (_corners(x, s).movedim(-1, -3) for x in (dkk, dP))
        column = k_left * e_left
        d_row_k, d_row_q = dkk_s @ column, dP_s @ column
        d_column = dkk_s.mT @ (k_right * e_right) + dP_s.mT @ (q_right * e_right)
        _halves(dk, s)[1].add_(d_row_k * e_right)
        _halves(dq, s)[1].add_(d_row_q * e_right)
        _halves(dk, s)[0].add_(d_column * e_left)
        _halves(log_right, s)[1].add_((d_row_k * k_right + d_row_q * q_right) * e_right)
        _halves(log_left, s)[0].add_(d_column * column)
    return Inputs(dq, dk, dv, da + log_right, db)


@dataclass(slots=True)
class ChunkGradients:
    W: Tensor
    U: Tensor
    P: Tensor
    Qd: Tensor
    Kr: Tensor
    decay: Tensor


# ---------------------------------------------------------------- the recurrence over chunks


def _scan(c: Chunks, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state [B, H, N, K, V] before each chunk, V' of each, and the state after the last."""
    states = S.new_empty(*c.decay.shape[:4], S.shape[-1])
    corrected = torch.empty_like(c.U)
    for n in range(c.U.shape[2]):
        states[:, :, n] = S
        torch.sub(c.U[:, :, n], c.W[:, :, n] @ S, out=corrected[:, :, n])
        S = c.decay[:, :, n] * S + c.Kr[:, :, n].mT @ corrected[:, :, n]
    return states, corrected, S


def _scan_backward(
    c: Chunks, states: Tensor, corrected: Tensor, dO: Tensor, dS: Tensor
) -> tuple[ChunkGradients, Tensor]:
    """From the gradients of the outputs and of the state after the slab to everything before."""
    after = torch.empty_like(states)
    d_corrected = c.P.mT @ dO
    into_state = c.Qd.mT @ dO
    for n in reversed(range(c.U.shape[2])):
        after[:, :, n] = dS
        d_corrected[:, :, n] += c.Kr[:, :, n] @ dS
        dS = c.decay[:, :, n] * dS + into_state[:, :, n]
        dS = dS - c.W[:, :, n].mT @ d_corrected[:, :, n]
    d = ChunkGradients(
        W=-d_corrected @ states.mT,
        U=d_corrected,
        P=(dO @ corrected.mT).tril(),
        Qd=dO @ states.mT,
        Kr=corrected @ after.mT,
        decay=(states * after).sum(-1, keepdim=True),
    )
    return d, dS


def _chunk_size(tokens: int) -> int:
    """64 tokens a chunk; shorter sequences take the next power of two."""
    return min(MAX_CHUNK, 1 << max(0, tokens - 1).bit_length())


def _slabs(call: KdaCall, start: int, end: int) -> list[slice]:
    """Cuts a run of tokens at whole chunks, so that memory does not grow with its length."""
    B, _, H, V = call.v.shape
    per_chunk = B * H * MAX_CHUNK * V * _compute_dtype(call.v.dtype).itemsize
    step = max(1, SLAB_BYTES // max(1, per_chunk)) * MAX_CHUNK
    return [slice(t, min(t + step, end)) for t in range(start, end, step)]


def _chunks(call: KdaCall, tokens: slice) -> Chunks:
    one_by_one = call.token_states is not None
    chunk = 1 if one_by_one else _chunk_size(tokens.stop - tokens.start)
    return _cut(_prepare(call, tokens), call.scale, chunk)


def _first_state(call: KdaCall, states: slice) -> Tensor:
    """[N, Hv, K, V] in the compute dtype."""
    v, dtype = call.v, _compute_dtype(call.v.dtype)
    if call.initial_state is None:
        count = len(range(*states.indices(call.num_seqs)))
        return v.new_zeros(count, v.shape[2], call.k.shape[-1], v.shape[-1], dtype=dtype)
    S = call.initial_state[states].to(dtype)
    return S.mT if call.state_v_first else S


def _without_autocast(
    run: Callable[Concatenate[KdaCall, P], R],
) -> Callable[Concatenate[KdaCall, P], R]:
    """Autocast would run the products in 16 bits."""

    @functools.wraps(run)
    def wrapped(call: KdaCall, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(call.q.device.type, enabled=False):
            return run(call, *args, **kwargs)

    return wrapped


@_without_autocast
def forward(call: KdaCall, output: Tensor, final_state: Tensor | None) -> None:
    """Writes the output [B, T, Hv, V] and, where given, the final state.

    ``final_state`` may be the memory of ``call.initial_state``.
    """
    if call.state_indices is not None:
        assert call.initial_state is not None and final_state is not None
        own = pool.gather(call.initial_state, call.state_indices)
        forward(replace(call, initial_state=own, state_indices=None), output, own)
        return pool.scatter_(final_state, call.state_indices, own)
    for states, start, end in call.windows():
        S = _first_state(call, states)
        for tokens in _slabs(call, start, end):
            c = _chunks(call, tokens)
            before, corrected, S = _scan(c, S)
            if call.token_states is not None:  # a chunk is a token
                after = torch.cat([before[:, :, 1:], S.unsqueeze(2)], dim=2).transpose(1, 2)
                call.token_states[:, tokens] = after.mT if call.state_v_first else after
            O = (c.Qd @ before + c.P @ corrected).flatten(2, 3)  # noqa: E741
            output[:, tokens] = O[:, :, : tokens.stop - tokens.start].transpose(1, 2)
        if final_state is not None:
            final_state[states] = S.mT if call.state_v_first else S


@_without_autocast
def backward(
    call: KdaCall, d_output: Tensor, d_final_state: Tensor | None
) -> tuple[Gradients, Tensor | None]:
    """Gradients of the call's tensors and of its initial state (None without one)."""
    into = Gradients.empty(call)
    d_initial = None
    if call.initial_state is not None:
        contiguous = torch.contiguous_format
        d_initial = torch.empty_like(call.initial_state, memory_format=contiguous)
    for states, start, end in call.windows():
        S = _first_state(call, states)
        slabs, firsts = _slabs(call, start, end), []
        for tokens in slabs:
            firsts.append(S)
            if tokens is not slabs[-1]:
                S = _scan(_chunks(call, tokens), S)[2]
        if d_final_state is None:
            dS = torch.zeros_like(S)
        else:
            dS = d_final_state[states].to(S.dtype)
            dS = dS.mT if call.state_v_first else dS
        for tokens, first in zip(reversed(slabs), reversed(firsts), strict=True):
            c = _chunks(call, tokens)
            before, corrected, _ = _scan(c, first)
            dO = _heads_first(d_output[:, tokens])
            chunk = c.q.shape[-2]
            dO = F.pad(dO, (0, 0, 0, -dO.shape[2] % chunk)).unflatten(2, (-1, chunk))
            d, dS = _scan_backward(c, before, corrected, dO, dS)
            grads = _cut_backward(c, call.scale, d)
            length = tokens.stop - tokens.start
            joined = (x.flatten(2, 3)[:, :, :length] for x in
                      (grads.q, grads.k, grads.v, grads.a, grads.b))  # fmt: skip
            dq, dk, dv, da, db = joined
            _prepare_backward(call, tokens, Inputs(dq, dk, dv, da, db.squeeze(-1)), into)
        if d_initial is not None:
            d_initial[states] = dS.mT if call.state_v_first else dS
    return into, d_initial
