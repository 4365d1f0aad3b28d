"""The native kernels of what surrounds the recurrence in a layer: ``csrc/include/mate/layer.h``.

Structures are packed in one go instead of field by field: a decode step has 13 tensors, and
ctypes would take longer over them than the kernel does over a small layer.
"""

import ctypes
import functools
import os
import struct

import torch
from torch import Tensor

from mate.backends import native

ABI_VERSION = 1
HEAD_DIM = 128
MAX_CONV_WIDTH = 8

_TENSOR = "P3qi4x"  # mate_tensor
_ROWS = "Pqi4x"  # mate_rows
_SHORT_CONV = struct.Struct("@" + 4 * _TENSOR + _ROWS + "P4q3i")
_GATED_NORM = struct.Struct("@" + 3 * _TENSOR + _ROWS + "4qfi")
_DECODE = struct.Struct("@" + 12 * _ROWS + _TENSOR + "2P3q3f4i")
_NONE = (0, 0, 0, 0, 0)
_CODES = native.DTYPE_CODES


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The loaded library, unless there is none or it has other layer functions than these."""
    library = native.library()
    if isinstance(library, str):
        return None
    if getattr(library, "mate_layer_abi_version", lambda: 0)() != ABI_VERSION:
        return None
    for name in ("mate_short_conv", "mate_gated_norm", "mate_decode_step"):
        getattr(library, name).argtypes = [ctypes.c_char_p]
    return library


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernels are there, and every tensor lies on a CPU in a dtype that they know."""
    for x in tensors:
        if x is not None and (x.dtype not in _CODES or not x.is_cpu):
            return False
    if "native" in os.environ.get("MATE_DISABLE", "").split(","):
        return False
    return _library() is not None


def _run(name: str, arguments: bytes) -> None:
    status = getattr(_library(), name)(arguments)
    if status != 0:
        raise RuntimeError(f"{name} failed: {native.STATUS.get(status, status)}")


def _tensor(x: Tensor | None) -> tuple[int, ...]:
    """A tensor of up to three strides; missing ones in front of them are 0."""
    if x is None:
        return _NONE
    stride = x.stride()
    return x.data_ptr(), *stride, *(0,) * (3 - len(stride)), _CODES[x.dtype]


def short_conv(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    final_state: Tensor | None,
) -> None:
    """x, y [B, T, C] with contiguous channels, weight [C, W <= 8], states [N, C, W] of x's dtype.

    Writes y inside the documents, and final_state where given.
    """
    weight = weight.contiguous()
    batch, tokens, channels = x.shape
    cu = None if cu_seqlens is None else cu_seqlens.contiguous()
    if cu is not None and cu.dtype not in (torch.int32, torch.int64):
        cu = cu.long()
    _run(
        "mate_short_conv",
        _SHORT_CONV.pack(
            *_tensor(x), *_tensor(y), *_tensor(initial_state), *_tensor(final_state),
            weight.data_ptr(), 0, _CODES[weight.dtype],
            0 if cu is None else cu.data_ptr(), batch if cu is None else cu.shape[0] - 1,
            tokens, tokens, channels,
            weight.shape[1], cu is not None and cu.dtype == torch.int64, torch.get_num_threads(),
        ),
    )  # fmt: skip


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, output: Tensor) -> None:
    """x, gate, output: alike, [A, B, C, V] with contiguous channels; weight [V]."""
    *size, dim = x.shape
    weight = weight.contiguous()
    _run(
        "mate_gated_norm",
        _GATED_NORM.pack(
            x.data_ptr(), *x.stride()[:3], _CODES[x.dtype],
            gate.data_ptr(), *gate.stride()[:3], _CODES[gate.dtype],
            output.data_ptr(), *output.stride()[:3], _CODES[output.dtype],
            weight.data_ptr(), 0, _CODES[weight.dtype],
            *size, dim, eps, torch.get_num_threads(),
        ),
    )  # fmt: skip


def decode_step(
    rows: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    heads: tuple[int, int],
    width: int,
    norm_eps: float,
    lower_bound: float | None,
    flags: int,
) -> None:
    """One token a sequence; see ``mate_decode_args``.

    ``rows``: q, k, v, g, beta, output gate, output and conv state, each row contiguous;
    ``weights``: contiguous, of the convolutions of q, k and v and of the norm; A_log and dt_bias:
    contiguous fp32; ``heads``: (q/k, value).
    """
    fields: list[int] = []
    for x in rows:
        fields += x.data_ptr(), x.stride(0), _CODES[x.dtype]
    for x in weights:
        fields += x.data_ptr(), 0, _CODES[x.dtype]
    gate = native.GATE_SOFTPLUS if lower_bound is None else native.GATE_BOUNDED
    _run(
        "mate_decode_step",
        _DECODE.pack(
            *fields, state.data_ptr(), *state.stride()[:3], _CODES[state.dtype],
            A_log.data_ptr(), dt_bias.data_ptr(), rows[0].shape[0], *heads,
            HEAD_DIM**-0.5, lower_bound or 0.0, norm_eps,
            width, gate, native.L2NORM | native.BETA_SIGMOID | flags, torch.get_num_threads(),
        ),
    )  # fmt: skip
