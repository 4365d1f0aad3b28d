"""The native kernels of what surrounds the recurrence in a layer: ``csrc/include/mate/layer.h``.

Each function takes tensors of one device, and goes to that device's library.
"""

import struct
from typing import Any

import torch
from torch import Tensor

from mate.backends import gpu, native
from mate.backends.devices import DEVICES
from mate.backends.native import DTYPE_CODES, TENSOR, tensor_fields
from mate.backends.switches import disabled

HEAD_DIM = 128
MAX_CONV_WIDTH = 8
MAX_LAYER_STEP_BATCH = 4

_ROWS = "Pqi0q"  # mate_rows
_SHORT_CONV = struct.Struct("@" + 4 * TENSOR + _ROWS + "P4q3i0q")
_GATED_NORM = struct.Struct("@" + 3 * TENSOR + _ROWS + "4qfi0q")
_DECODE_FIELDS = 12 * _ROWS + TENSOR + "3Pq3q3f5i0q"
DECODE = struct.Struct("@" + _DECODE_FIELDS)
LAYER_STEP = struct.Struct("@" + 2 * _ROWS + "10P2q" + _DECODE_FIELDS)


def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for a device, and they are not switched off."""
    if disabled("native"):
        return False
    if device.type == "cpu":
        return not isinstance(native.library(), str)
    return device.type in DEVICES and gpu.unusable(device) is None


# What torch.compiler.assume_constant_result sets; it would import the compiler, for a second.
has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serves(first: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the kernels are there, and every tensor lies on one device in a known dtype."""
    on_cpu = first.is_cpu
    for x in (first, *tensors):
        if x is None:
            continue
        if x.dtype not in DTYPE_CODES or x.is_cpu != on_cpu:
            return False
        if not on_cpu and x.device != first.device:
            return False
    return has_kernels(first.device)


def _run(name: str, arguments: bytes, device: torch.device) -> None:
    if device.type == "cpu":
        native.run(f"mate_{name}", arguments)
    else:
        gpu.queue(f"mate_gpu_{name}", device, arguments)


def short_conv(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    final_state: Tensor | None,
) -> None:
    """x, y [B, T, C] with contiguous channels, weight [C, W <= 8], states [N, C, W] of x's dtype.

    Writes y inside the documents (on a GPU zeros outside of them), and final_state where given.
    """
    weight = weight.contiguous()
    batch, tokens, channels = x.shape
    cu = None if cu_seqlens is None else cu_seqlens.contiguous()
    if cu is not None and cu.dtype not in (torch.int32, torch.int64):
        cu = cu.long()
    _run(
        "short_conv",
        _SHORT_CONV.pack(
            *tensor_fields(x), *tensor_fields(y),
            *tensor_fields(initial_state), *tensor_fields(final_state),
            weight.data_ptr(), 0, DTYPE_CODES[weight.dtype],
            0 if cu is None else cu.data_ptr(), batch if cu is None else cu.shape[0] - 1,
            tokens, tokens, channels,
            weight.shape[1], cu is not None and cu.dtype == torch.int64, torch.get_num_threads(),
        ),
        x.device,
    )  # fmt: skip


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, output: Tensor) -> None:
    """x, gate, output: alike, [A, B, C, V] with contiguous channels; weight [V]."""
    *size, dim = x.shape
    weight = weight.contiguous()
    _run(
        "gated_norm",
        _GATED_NORM.pack(
            x.data_ptr(), *x.stride()[:3], DTYPE_CODES[x.dtype],
            gate.data_ptr(), *gate.stride()[:3], DTYPE_CODES[gate.dtype],
            output.data_ptr(), *output.stride()[:3], DTYPE_CODES[output.dtype],
            weight.data_ptr(), 0, DTYPE_CODES[weight.dtype],
            *size, dim, eps, torch.get_num_threads(),
        ),
        x.device,
    )  # fmt: skip


def decode_fields(
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
    state_indices: Tensor | None = None,
) -> list[Any]:
    """The ``mate_decode_args`` of one token a sequence.

    ``rows``: q, k, v, g, beta, output gate, output and conv state, each row contiguous;
    ``weights``: contiguous, of the convolutions of q, k and v and of the norm; A_log and dt_bias:
    contiguous fp32; ``heads``: (q/k, value); ``state_indices``: contiguous int32 or int64.
    """
    fields: list[Any] = []
    for x in rows:
        fields += x.data_ptr(), x.stride()[0], DTYPE_CODES[x.dtype]
    for x in weights:
        fields += x.data_ptr(), 0, DTYPE_CODES[x.dtype]
    gate = native.GATE_SOFTPLUS if lower_bound is None else native.GATE_BOUNDED
    return [
        *fields, state.data_ptr(), *state.stride()[:3], DTYPE_CODES[state.dtype],
        A_log.data_ptr(), dt_bias.data_ptr(), *native.index_fields(state_indices, state),
        rows[0].shape[0], *heads,
        HEAD_DIM**-0.5, lower_bound or 0.0, norm_eps,
        state_indices is not None and state_indices.dtype == torch.int64,
        width, gate, native.L2NORM | native.BETA_SIGMOID | flags,
        torch.get_num_threads(),
    ]  # fmt: skip


def decode_step(rows: tuple[Tensor, ...], *others: Any) -> None:
    """One token a sequence: the call of :func:`decode_fields`."""
    _run("decode_step", DECODE.pack(*decode_fields(rows, *others)), rows[0].device)
