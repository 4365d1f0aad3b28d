"""One checked call of the operator, as the backends receive it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class KdaCall:
    """Arguments that :mod:`mate.functional.contract` has checked, in the batched layouts.

    q, k [B, T, Hqk, K]; v, g [B, T, Hv, V]; beta [B, T, Hv]; states [N, Hv, V, K], or
    [N, Hv, K, V] when ``state_v_first`` is false. With ``cu_seqlens`` B is 1 and N sequences lie
    one after another; otherwise N = B. ``A_log`` None: g is the natural-log decay itself;
    ``lower_bound`` None: the softplus gate. With ``state_indices`` [N] the states are a pool
    [P, Hv, V, K], of which sequence n has the one at its index, outside the pool none.
    ``token_states`` [B, T, Hv, V, K], each state contiguous: written where ``recurrent``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    scale: float
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    cu_seqlens_cpu: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    lower_bound: float | None
    l2norm: bool
    beta_sigmoid: bool
    neg_eigval: bool
    state_v_first: bool
    recurrent: bool
    state_indices: Tensor | None = None
    token_states: Tensor | None = None

    @property
    def num_seqs(self) -> int:
        return self.v.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def windows(self) -> list[tuple[slice, int, int]]:
        """(states, first token, end) of each run of equally long sequences.

        Dense: one run holding the whole batch. Varlen: one run a sequence; reads cu_seqlens on
        the host (``cu_seqlens_cpu`` where given, which saves a device synchronisation).
        """
        if self.cu_seqlens is None:
            return [(slice(None), 0, self.v.shape[1])]
        source = self.cu_seqlens if self.cu_seqlens_cpu is None else self.cu_seqlens_cpu
        bounds = source.tolist()
        return [(slice(n, n + 1), bounds[n], bounds[n + 1]) for n in range(len(bounds) - 1)]
