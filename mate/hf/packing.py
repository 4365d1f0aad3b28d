"""How a transformers call says that several documents share one row."""

from typing import Any

import torch
from torch import Tensor

from mate.layers.documents import cu_seqlens_from_starts

PACKING_KWARGS = ("cu_seqlens", "cu_seq_lens_q", "seq_idx")


def cu_seqlens_from_kwargs(kwargs: dict[str, Any]) -> Tensor | None:
    """Document bounds from whichever packing argument arrived, or None.

    ``cu_seqlens`` and ``cu_seq_lens_q`` (the FlashAttention arguments) [N + 1] are taken as they
    are; ``seq_idx`` [B, T] (Mamba's) numbers every token's document.
    """
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    seq_idx = kwargs.get("seq_idx")
    if seq_idx is None:
        return None
    return cu_seqlens_from_starts(torch.diff(seq_idx, prepend=seq_idx[:, :1]) != 0)


def add_document_bounds(kwargs: dict[str, Any], input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Find packed documents in a model call's ``position_ids`` and name them for the KDA layers.

    transformers' attention takes a jump in ``position_ids`` as the start of another document,
    where there is no mask and no cache. This does the same: the result has ``cu_seqlens`` then,
    and ``use_cache=False``, because the layers could not agree on what such a cache holds.

    Args:
        kwargs: The keyword arguments of a decoder model's call.
        input_shape: [B, T] of the call.

    Returns:
        kwargs, or a copy with more in it.

    Raises:
        ValueError: the call packs documents and asks for a cache.
    """
    position_ids = kwargs.get("position_ids")
    if (
        position_ids is None
        or position_ids.dim() != 2
        or position_ids.shape[1] < 2
        or any(kwargs.get(name) is not None for name in PACKING_KWARGS)
        or any(kwargs.get(name) is not None for name in ("attention_mask", "past_key_values"))
        or torch.compiler.is_compiling()
    ):
        return kwargs
    starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    if not bool(starts.any()):
        return kwargs
    if kwargs.get("use_cache"):
        raise ValueError(
            "use_cache must be False where position_ids pack several documents into a row "
            "(here they jump), got use_cache=True"
        )
    cu_seqlens = cu_seqlens_from_starts(starts.expand(input_shape))
    return {**kwargs, "cu_seqlens": cu_seqlens, "use_cache": False}
