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

    Raises:
        TypeError: the argument is no tensor.
    """
    for name in PACKING_KWARGS:
        given = kwargs.get(name)
        if given is None:
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
        if name == "seq_idx":
            return cu_seqlens_from_starts(torch.diff(given, prepend=given[:, :1]) != 0)
        return given
    return None


def add_document_bounds(
    kwargs: dict[str, Any], input_shape: tuple[int, int], attention_mask: Any
) -> dict[str, Any]:
    """Tell the KDA layers and the attention layers of a model the same document bounds.

    KDA layers read ``cu_seqlens`` (or :func:`cu_seqlens_from_kwargs`'s other arguments), attention
    layers take a jump in ``position_ids`` as the start of another document, where there is no mask
    and no cache. Whichever of the two is given, the result has both, and ``use_cache=False``,
    because the layers could not agree on what such a cache holds.

    Args:
        kwargs: The keyword arguments of a decoder model's call.
        input_shape: [B, T] of the call.
        attention_mask: Of the call.

    Returns:
        kwargs, or a copy with more in it.

    Raises:
        ValueError: the call packs documents and asks for a cache; or it names bounds and has a
            2-D mask, documents that cross rows, or position_ids that tell other bounds.
    """
    cu_seqlens = cu_seqlens_from_kwargs(kwargs)
    position_ids = kwargs.get("position_ids")
    cache = kwargs.get("past_key_values")
    if cu_seqlens is None:
        starts = None
        if attention_mask is None and cache is None and not torch.compiler.is_compiling():
            starts = _starts(position_ids, input_shape)
        if starts is None or not bool(starts.any()):
            return kwargs
        cu_seqlens = cu_seqlens_from_starts(starts)
    else:
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            raise ValueError(
                "attention_mask must be None where documents are packed, which have no padding; "
                f"got shape {tuple(attention_mask.shape)}"
            )
        position_ids = _check_positions(cu_seqlens, position_ids, input_shape)
    if cache is not None:
        raise ValueError(
            "past_key_values must be None where several documents are packed into a row, got "
            f"{type(cache).__name__}"
        )
    if kwargs.get("use_cache"):
        raise ValueError(
            "use_cache must be False where several documents are packed into a row, got "
            "use_cache=True"
        )
    told = {"cu_seqlens": cu_seqlens, "position_ids": position_ids, "use_cache": False}
    return {**kwargs, **told}


def _starts(position_ids: Tensor | None, input_shape: tuple[int, int]) -> Tensor | None:
    """Where position_ids jump, [B, T] without the first column; None: no document can begin."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return None
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).expand(input_shape)


def _check_positions(
    cu_seqlens: Tensor, position_ids: Tensor | None, input_shape: tuple[int, int]
) -> Tensor:
    """The given position_ids if they jump where documents begin; None: new ones [B, T] that do.

    Under torch.compile the values go unchecked.
    """
    batch, length = input_shape
    bounds = cu_seqlens.long()
    token = torch.arange(batch * length, device=bounds.device)
    document = torch.searchsorted(bounds[1:], token, right=True)
    expected = (token - bounds[document]).view(batch, length)
    if torch.compiler.is_compiling():
        return expected if position_ids is None else position_ids
    if batch > 1 and bool(expected[:, 0].any()):
        raise ValueError(
            f"cu_seqlens must begin a document with every row of [B={batch}, T={length}], got "
            f"{cu_seqlens.tolist()}"
        )
    if position_ids is None:
        return expected
    jumps = _starts(position_ids, input_shape)
    if jumps is not None and not torch.equal(jumps[:, 1:], expected.to(jumps.device)[:, 1:] == 0):
        raise ValueError(
            "position_ids must start over where cu_seqlens begins a document and nowhere else, "
            "or be left out; got others"
        )
    return position_ids
