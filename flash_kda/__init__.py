"""The FlashKDA Python API on mate's operator: frameworks written against it run unchanged.

q and k are l2-normalised and beta are logits, as there; the gate is the bounded one. Beyond
FlashKDA: any device that mate serves, fp16 and fp32, grouped value heads, empty sequences.
"""

import torch
from torch import Tensor

from mate.functional.kda import chunk_kda

__all__ = ["fwd", "get_workspace_size"]


@torch.no_grad()
def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    out: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float,
    initial_state: Tensor | None = None,
    final_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Writes ``out`` and, where given, ``final_state``; no gradients.

    Args:
        q, k: [B, T, H, 128].
        v, g: [B, T, H, 128]; g is the gate before activation.
        beta: Logits [B, T, H].
        scale: Factor on q k^T.
        out: v's shape and dtype.
        A_log, dt_bias: [H] and [H, 128].
        lower_bound: Of the gate, finite and negative.
        initial_state, final_state: [N, H, V, K], value dimension first, alike in dtype.
        cu_seqlens: [N + 1]; B is 1 then. Without it, N = B.

    Raises:
        ValueError, TypeError: As :func:`mate.chunk_kda`, before anything is written.
    """
    chunk_kda(
        q, k, v, g, beta, scale, initial_state, False, cu_seqlens, A_log, dt_bias, lower_bound,
        output=out, final_state=final_state,
    )  # fmt: skip


def get_workspace_size(T_total: int, H: int, N: int = 1) -> int:
    """Bytes of workspace that a caller must provide for T_total tokens: none."""
    return 0
