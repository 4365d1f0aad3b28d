"""Which tokens of a batch belong to which document: padding masks and packed positions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packed(NamedTuple):
    """The real tokens of a padded batch [B, T], one row's tokens after another's."""

    rows: Tensor  # [S] positions in the flattened batch, in packed order
    cu_seqlens: Tensor  # [B + 1], or [B + 2] where the last document collects the padding


def trailing_mask(attention_mask: Tensor, batch: int, length: int) -> Tensor:
    """The last ``length`` columns of a 2-D padding mask as booleans [batch, length].

    Raises:
        ValueError: the mask is not [batch, >= length], or an additive one.
        TypeError: it is no tensor.
    """
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask must be a torch.Tensor, got {type(attention_mask).__name__}"
        )
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(
            f"attention_mask must be a 2-D padding mask [B={batch}, T={length}] (1: a token, "
            f"0: padding; longer masks are read from the right), got shape {shape}"
        )
    # Integer masks are never additive, and reading one would wait for a GPU.
    additive = attention_mask.is_floating_point() and not torch.compiler.is_compiling()
    if additive and bool((attention_mask < 0).any()):
        raise ValueError(
            "attention_mask must hold 1 for a token and 0 for padding, got negative values "
            "(an additive mask?)"
        )
    return attention_mask[:, shape[1] - length :].to(torch.bool)


def pack(keep: Tensor, keep_shape: bool) -> Packed:
    """Pack the rows of a mask ``keep`` [B, T], whatever its padding looks like.

    Args:
        keep: True for a token, False for padding.
        keep_shape: Leave the padding in, as one more document behind the last: nothing is read
            back from the device then, and every shape is known beforehand.
    """
    flat = keep.flatten()
    cu_seqlens = F.pad(keep.sum(1).cumsum(0), (1, 0))
    if not keep_shape:
        return Packed(flat.nonzero().squeeze(1), cu_seqlens)
    rows = torch.argsort((~flat).to(torch.uint8), stable=True)
    total = cu_seqlens.new_full((1,), flat.shape[0])  # F.pad would make a constant of the length
    return Packed(rows, torch.cat([cu_seqlens, total]))


def cu_seqlens_from_starts(starts: Tensor) -> Tensor:
    """[N + 1] document bounds in a flattened batch, from a mask [B, T] of first tokens.

    Every row begins a document. Reads the number of documents back from the device.
    """
    starts = starts.clone()
    starts[:, :1] = True
    return F.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=starts.numel())
