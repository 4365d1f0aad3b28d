"""One token of a few sequences through a whole layer in one call, projections and all: GPUs only.

With few rows a projection is no work for tensor cores: it reads its weights once, and what it costs
from Python is the call. The kernels make four launches of the whole layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mate.backends import gpu, native_layer
from mate.backends.devices import DEVICES
from mate.backends.prepared import Prepared
from mate.functional.contract import HEAD_DIM
from mate.functional.decode_step import (
    DECODE_PLACES,
    check_decode_step,
    kernel_arguments,
    takes_as_they_are,
)
from mate.functional.direct import is_direct, is_eager
from mate.functional.repeated import Remembered

_repeated = Remembered()  # False: not served


class Projections(NamedTuple):
    """The weights of a layer's linear layers, [outputs, inputs]."""

    q: Tensor
    k: Tensor
    v: Tensor
    f_a: Tensor
    g_a: Tensor
    b: Tensor
    f_b: Tensor
    g_b: Tensor
    o: Tensor


def kda_layer_step(
    x: Tensor,
    projections: Projections,
    conv_state: Tensor,
    state: Tensor,
    convs: Sequence[Tensor],
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    options: tuple[float, float | None, bool, bool],
    state_indices: Tensor | None = None,
) -> Tensor | None:
    """A decode step of :class:`mate.layers.KimiDeltaAttention`, under ``torch.no_grad()``.

    Sums are fp32; what the layers hand to one another is rounded to x's dtype, as theirs would be.

    Args:
        x: [B, 1, hidden], B at most 4; fp16 or bf16.
        projections: Contiguous, x's dtype; hidden and the rows of f_a are multiples of 8.
        conv_state: As for :func:`mate.functional.decode_step.kda_decode_step`; updated in place.
        state: Likewise.
        convs: Weights of the convolutions of q, k and v.
        A_log: [Hv], fp32.
        dt_bias: [Hv * 128], fp32.
        norm_weight: [128].
        options: norm_eps, lower_bound, allow_neg_eigval, state_v_first.
        state_indices: Of pools, [B].

    Returns:
        [B, 1, hidden]; None where the kernels do not serve such a call: nothing was done.
    """
    if x.device.type not in DEVICES or not is_eager() or torch.is_grad_enabled():
        return None
    tensors = (
        x, *projections, conv_state, state, *convs, A_log, dt_bias, norm_weight, state_indices,
    )  # fmt: skip
    step: _LayerStep | bool | None = _repeated.find(tensors, *options)
    if step is False or not native_layer.has_kernels(x.device):
        return None
    if step is None:
        if not is_direct(*tensors):
            return None
        step = _LayerStep.of(x, projections, tensors[10:], options) or False
        _repeated.keep(step, tensors, *options)
    return step.run(tensors) if isinstance(step, _LayerStep) else None


class _LayerStep:
    """A call that has been checked, for others of its form."""

    # Of addresses in mate_layer_step_args: of x, the projections, all that follows them in a
    # call, y and the workspace. `decode`, whose rows are in the workspace, begins at 18.
    _PLACES = (0, *range(6, 15), *(18 + place for place in DECODE_PLACES[6:-1]), 3, 15)

    def __init__(self, fields: list[Any], workspace: int, device: torch.device) -> None:
        layout = native_layer.LAYER_STEP
        self._prepared = Prepared("layer_step", layout, fields, self._PLACES, device)
        self._workspace = workspace

    @classmethod
    def of(
        cls, x: Tensor, projections: Projections, rest: tuple[Any, ...], options: tuple[Any, ...]
    ) -> "_LayerStep | None":
        """None where the kernels do not serve. ``rest``: from conv_state to the indices."""
        if not _fit(x, projections):
            return None
        batch, hidden, w = x.shape[0], x.shape[2], projections
        rows = [x.new_empty(batch, y.shape[0]) for y in (w.q, w.k, w.v, w.f_b, w.b, w.g_b)]
        decode = (*rows, *rest)
        try:
            check_decode_step(*decode[:-1], state_indices=decode[-1])
        except (TypeError, ValueError):
            return None  # said, or served, where the modules are called one by one
        if not takes_as_they_are(decode):
            return None
        code = native_layer.DTYPE_CODES[x.dtype]
        fields = [
            0, x.stride()[0], code, 0, hidden, code, *9 * [0], 0, hidden, w.f_a.shape[0],
            *native_layer.decode_fields(*kernel_arguments(decode, rows[2], *options)),
        ]  # fmt: skip
        packed = native_layer.LAYER_STEP.pack(*fields)
        workspace = gpu.workspace_bytes("layer_step", x.device, packed)
        return None if workspace < 0 else cls(fields, workspace, x.device)

    def run(self, tensors: tuple[Any, ...]) -> Tensor:
        x = tensors[0]
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        workspace = torch.empty(self._workspace, dtype=torch.uint8, device=x.device)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        addresses += y.data_ptr(), workspace.data_ptr()
        increment_version(tensors[10:12])
        self._prepared.run(addresses)
        return y


def _fit(x: Tensor, projections: Projections) -> bool:
    """Whether a row goes through all of them, in one dtype on one device."""
    if x.dim() != 3 or x.shape[1] != 1 or x.stride()[2] != 1:
        return False
    for w in projections:
        if w.dtype != x.dtype or w.device != x.device or w.dim() != 2 or not w.is_contiguous():
            return False
    q, k, v, f_a, g_a, b, f_b, g_b, o = (tuple(w.shape) for w in projections)
    hidden, rank = x.shape[2], f_a[0]
    of_hidden = all(shape[1] == hidden for shape in (q, k, v, f_a, g_a, b))
    second = f_b == g_b == (v[0], rank) and g_a[0] == rank and o == (hidden, v[0])
    return of_hidden and second and b[0] * HEAD_DIM == v[0]
