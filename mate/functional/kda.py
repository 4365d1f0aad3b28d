"""The public operator: :func:`chunk_kda` and :func:`recurrent_kda`."""

from typing import Any

import torch
from torch import Tensor

from mate.backends.call import KdaCall
from mate.functional import ops
from mate.functional.contract import check
from mate.functional.direct import is_direct, is_eager, refuse_tangents
from mate.functional.repeated import Remembered

_repeated = Remembered()  # token-by-token calls


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = -5.0,
    use_qk_l2norm_in_kernel: bool = True,
    output: Tensor | None = None,
    final_state: Tensor | None = None,
    *,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = True,
    cu_seqlens_cpu: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Kimi Delta Attention over whole sequences, in chunks.

    Per sequence and value head, with the state S of shape [K, V]::

        S_t = (I - b_t k_t k_t^T) Diag(exp(a_t)) S_{t-1} + b_t k_t v_t^T
        o_t = scale * S_t^T q_t

    where q and k are l2-normalised, b_t = sigmoid(beta_t), and the log-decay a_t (natural
    logarithm, one a key channel) comes from g by one of three gates:

    ===========================================  =================================================
    A_log and dt_bias given, lower_bound float   lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
    A_log and dt_bias given, lower_bound=None    -exp(A_log) * softplus(g + dt_bias)
    neither given                                g itself; a base-2 decay is converted by * ln 2
    ===========================================  =================================================

    With A_log, ``lower_bound`` chooses the gate: the default -5.0 is GLM's and K3's bounded gate;
    Kimi Linear checkpoints need ``lower_bound=None``, the default of
    :class:`mate.layers.KimiDeltaAttention`. Without A_log, g must be <= 0, which is not checked: a
    positive g makes the state grow without bound.

    Source: Kimi Linear (arXiv 2510.26692), equation of the delta rule with a per-channel decay.
    Gradients flow to q, k, v, g, beta, A_log, dt_bias and initial_state. Any tensor may be a
    strided view whose last dimension is contiguous.

    Args:
        q: Queries. Dense [B, T, Hqk, 128]; varlen [S, Hqk, 128] or [1, S, Hqk, 128]. fp16, bf16
            or fp32.
        k: Keys, with q's shape and dtype.
        v: Values [B, T, Hv, 128] or the varlen equivalent, q's dtype. Hv is a multiple of Hqk;
            value head h reads q/k head h // (Hv / Hqk).
        g: Gate input with v's shape, q's dtype or fp32. Without A_log the log-decay itself, which
            must be <= 0 and is not checked.
        beta: Logits of the writing strength [B, T, Hv] or [S, Hv] / [1, S, Hv]; q's dtype or fp32.
        scale: Factor on q k^T. Default 128 ** -0.5.
        initial_state: [N, Hv, V, K], v's dtype or fp32, N the number of sequences. None: zeros.
            Never modified unless it is passed as ``final_state`` too.
        output_final_state: Return the state after the last token as well.
        cu_seqlens: Varlen mode: [N + 1] int32 or int64 on q's device, from 0 to S, not decreasing.
            Empty sequences keep their initial state.
        A_log: Log rate of the gate [Hv], any float dtype, computed in fp32. Goes with dt_bias.
        dt_bias: Bias of the gate [Hv, 128] or [Hv * 128].
        lower_bound: Smallest log-decay of the bounded gate, finite and negative, or None for the
            softplus gate. Ignored without A_log.
        use_qk_l2norm_in_kernel: x / sqrt(sum(x^2) + 1e-6) on q and k.
        output: Preallocated output with v's shape and dtype; written and returned.
        final_state: Preallocated final state, of initial_state's dtype; written, and returned
            where ``output_final_state``. Passing the initial state here updates it in place.
        use_beta_sigmoid_in_kernel: False: beta is already b_t.
        allow_neg_eigval: b_t = 2 * sigmoid(beta_t).
        state_v_first: False: states are [N, Hv, K, V].
        cu_seqlens_cpu: Copy of cu_seqlens on the CPU, which is validated instead on a GPU.
        state_indices: [N] int32 or int64 on q's device. ``initial_state`` is then a pool
            [P, Hv, V, K] of any P, given as ``final_state`` too: sequence n starts from
            pool[state_indices[n]] and leaves its final state there. One whose index lies outside
            [0, P), such as -1, starts from zeros and stores nothing; no other slot is touched. Two
            sequences must not share a slot; on a GPU that is not checked. No gradients.

    Returns:
        The output with v's shape and dtype; with ``output_final_state`` the pair (output,
        final_state). A new final state has initial_state's dtype, else fp32.

    Raises:
        ValueError: A shape, value or device breaks the contract. Nothing has been written.
        TypeError: A dtype does. Nothing has been written.
        NotImplementedError: A second or a forward-mode derivative is asked for.
    """
    return _kda(
        False, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, A_log,
        dt_bias, lower_bound, use_qk_l2norm_in_kernel, output, final_state,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens_cpu, state_indices,
        None, None,
    )  # fmt: skip


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = -5.0,
    use_qk_l2norm_in_kernel: bool = True,
    output: Tensor | None = None,
    final_state: Tensor | None = None,
    *,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    state_v_first: bool = True,
    cu_seqlens_cpu: Tensor | None = None,
    state_indices: Tensor | None = None,
    token_states: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Kimi Delta Attention token by token: decoding and speculative verification.

    The contract of :func:`chunk_kda`, for short sequences (1 to some tens of tokens). With
    ``final_state=initial_state`` the state is updated in place.

    Args:
        token_states: Preallocated, [B, T, Hv, V, K] or [S, Hv, V, K] / [1, S, Hv, V, K] in v's
            layout, v's dtype or fp32, each state [V, K] ([K, V] with ``state_v_first=False``)
            contiguous: written with the state after each token. Of a speculative draft, the one
            after the last accepted token is the state to go on from. No gradients.
    """
    options = None
    if cu_seqlens_cpu is None and is_eager():
        options = (
            scale, type(scale), lower_bound, type(lower_bound), use_qk_l2norm_in_kernel,
            use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, output_final_state,
        )  # fmt: skip
        tensors = (
            q, k, v, g, beta, output, initial_state, final_state, token_states, state_indices,
            A_log, dt_bias, cu_seqlens,
        )  # fmt: skip
        again: ops.RepeatedKda | None = _repeated.find(tensors, *options)
        found = None if again is None else again.run(tensors)
        if found is not None and output_final_state:
            assert final_state is not None  # a call that makes one is not remembered
            return found, final_state
        if found is not None:
            return found
    return _kda(
        True, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, A_log,
        dt_bias, lower_bound, use_qk_l2norm_in_kernel, output, final_state,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens_cpu, state_indices,
        token_states, options,
    )  # fmt: skip


def _kda(
    recurrent: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    l2norm: bool,
    output: Tensor | None,
    final_state: Tensor | None,
    beta_sigmoid: bool,
    neg_eigval: bool,
    state_v_first: bool,
    cu_seqlens_cpu: Tensor | None,
    state_indices: Tensor | None,
    token_states: Tensor | None,
    options: tuple[Any, ...] | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``options``: by which a call token by token is to be remembered; None: it is not."""
    tensors = (
        q, k, v, g, beta, output, initial_state, final_state, token_states, state_indices, A_log,
        dt_bias, cu_seqlens,
    )  # fmt: skip
    call = check(
        q, k, v, g, beta, scale, initial_state, cu_seqlens, A_log, dt_bias, lower_bound,
        beta_sigmoid, neg_eigval, output, final_state, cu_seqlens_cpu, state_indices, token_states,
    )  # fmt: skip
    resume = final_state is not None and final_state is initial_state
    inputs = (
        call.q, call.k, call.v, call.g, call.beta, call.scale, None if resume else initial_state,
        cu_seqlens, cu_seqlens_cpu, A_log, dt_bias,
        None if lower_bound is None else float(lower_bound),
        l2norm, beta_sigmoid, neg_eigval, state_v_first, recurrent,
    )  # fmt: skip
    direct = is_direct(*tensors, cu_seqlens_cpu)
    if not direct:
        refuse_tangents(*tensors)
    if output is None and final_state is None and token_states is None:
        run = ops.kda if direct else torch.ops.mate.kda
        written, state = run(*inputs, output_final_state)
    else:
        written, state = call.output, final_state
        if written is None:
            written = torch.empty_like(call.v, memory_format=torch.contiguous_format)
        if state is None and output_final_state:
            state = ops.new_state(q, v, call.num_seqs, initial_state)
        write = ops.kda_out if direct else torch.ops.mate.kda_out
        write(*inputs, resume, written, state, state_indices, call.token_states)
    new_state = output_final_state and final_state is None
    if options is not None and direct and not new_state:
        made = KdaCall(*inputs, state_indices, call.token_states)
        made.initial_state = initial_state
        again = ops.RepeatedKda.of(made, written, tensors)
        if again is not None:
            _repeated.keep(again, tensors, *options)
    result = output if output is not None else written if v.dim() == 4 else written.squeeze(0)
    return (result, state) if output_final_state else result
