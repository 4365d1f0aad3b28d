"""One token through everything between a KDA layer's projections, in one call.

mate::kda_decode_step  the native kernel, or the same step by step
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mate import backends
from mate.backends import native, native_layer, pool
from mate.backends.call import KdaCall
from mate.backends.native_layer import MAX_CONV_WIDTH
from mate.backends.prepared import Prepared
from mate.functional import gated_norm, short_conv
from mate.functional.contract import (
    HEAD_DIM,
    INDEX_DTYPES,
    check_form,
    check_indices_differ,
)
from mate.functional.direct import is_direct, is_eager, refuse_tangents
from mate.functional.repeated import Remembered

_TENSORS = (
    *("q", "k", "v", "g", "beta", "output_gate", "conv_state", "state"),
    *("q_weight", "k_weight", "v_weight", "A_log", "dt_bias", "norm_weight"),
)
_CONVS = _TENSORS[8:11]

_repeated = Remembered()


def kda_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    conv_state: Tensor,
    state: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    norm_eps: float = 1e-5,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    state_v_first: bool = True,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Short convolutions, SiLU, l2 norm, gate, recurrence and gated norm of one token a document.

    What :func:`mate.functional.short_conv.short_conv`, :func:`mate.recurrent_kda` and
    :func:`mate.functional.gated_norm.gated_rms_norm` compute one after another, without gradients.
    The native kernels, on CPUs and GPUs, round nothing in between to 16 bits. Both states are
    updated in place.

    Args:
        q: Projection of the hidden state before its convolution, [B, Hqk * 128] or
            [B, 1, Hqk * 128]. fp16, bf16 or fp32.
        k: q's shape and dtype.
        v: [B, Hv * 128] (or with the 1), q's dtype; Hv is a multiple of Hqk.
        g: The gate's input, v's shape; q's dtype or fp32, as for beta and output_gate.
        beta: Logits of the writing strength, [B, Hv].
        output_gate: Logits of the output gate, v's shape.
        conv_state: [B, (2 * Hqk + Hv) * 128, W], contiguous, q's dtype: the windows of q, k and v.
        state: [B, Hv, V, K] contiguous; q's dtype or fp32.
        q_weight: [Hqk * 128, W], or [Hqk * 128, 1, W] as nn.Conv1d has it, any float dtype;
            k_weight alike, v_weight [Hv * 128, W].
        k_weight: See q_weight.
        v_weight: See q_weight.
        A_log: [Hv], any float dtype.
        dt_bias: [Hv * 128].
        norm_weight: [128].
        norm_eps: Epsilon of the gated norm.
        lower_bound: The bounded gate's smallest log-decay, or None for the softplus gate.
        allow_neg_eigval: b = 2 * sigmoid(beta).
        state_v_first: False: state is [B, Hv, K, V].
        state_indices: [B] int32 or int64, contiguous. ``conv_state`` and ``state`` are then pools
            of any number of slots P instead of B: row b reads and writes the slot at its index;
            one outside [0, P), such as -1, starts from zeros and stores nothing. Two rows must not
            share a slot.

    Returns:
        v's shape and dtype, ready for the output projection.

    Raises:
        ValueError: a shape, device or memory layout does not fit. Nothing has been written.
        TypeError: a dtype does not. Nothing has been written.
    """
    tensors = (
        q, k, v, g, beta, output_gate, conv_state, state,
        q_weight, k_weight, v_weight, A_log, dt_bias, norm_weight, state_indices,
    )  # fmt: skip
    options = (norm_eps, lower_bound, allow_neg_eigval, state_v_first)
    output = repeat_decode_step(tensors, options)
    return first_decode_step(tensors, options) if output is None else output


def repeat_decode_step(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor | None:
    """:func:`kda_decode_step` if it has served such a call before; None: nothing was done.

    ``tensors``: its fourteen and the indices; ``options``: the others, in its order.
    """
    if not is_eager():
        return None
    again: _RepeatedStep | None = _repeated.find(tensors, *options)
    if again is None or not native_layer.has_kernels(tensors[0].device):
        return None
    return again.run(tensors)


def first_decode_step(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """:func:`kda_decode_step` in full, to be repeated from then on where that is possible."""
    *others, state_indices = tensors
    check_decode_step(*others, state_indices=state_indices)
    if not is_direct(*tensors):
        refuse_tangents(*tensors)
        return torch.ops.mate.kda_decode_step(*others, *options, state_indices)
    output = _kda_decode_step(*others, *options, state_indices)
    again = _RepeatedStep.of(tensors, output, *options)
    if again is not None:
        _repeated.keep(again, tensors, *options)
    return output


def check_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    conv_state: Tensor,
    state: Tensor,
    *weights: Tensor,
    state_indices: Tensor | None,
) -> None:
    """``weights``: as named in ``_TENSORS``."""
    dtype, q_shape, v_shape, width = q.dtype, q.shape, v.shape, weights[0].shape[-1]
    batch, keys, values = q_shape[0], q_shape[-1], v_shape[-1]
    slots = batch if state_indices is None else state.shape[0] if state.dim() else 0
    middle, on_cpu = tuple(v_shape[1:-1]), q.is_cpu
    heads = values // HEAD_DIM
    if middle not in ((), (1,)) or keys % HEAD_DIM or not keys or values % keys:
        raise ValueError(
            "q and v must be [B, Hqk * 128] and [B, Hv * 128], Hv a multiple of Hqk, got shapes "
            f"{tuple(q.shape)} and {tuple(v.shape)}"
        )
    key_rows, value_rows = (batch, *middle, keys), (batch, *middle, values)
    shapes = (
        *(key_rows, key_rows, value_rows, value_rows, (batch, *middle, heads), value_rows),
        *((slots, 2 * keys + values, width), (slots, heads, HEAD_DIM, HEAD_DIM)),
        *((keys, width), (keys, width), (values, width), (heads,), (values,), (HEAD_DIM,)),
    )
    tensors = (q, k, v, g, beta, output_gate, conv_state, state, *weights)
    for name, x, shape in zip(_TENSORS, tensors, shapes, strict=True):
        if x.shape != shape and not (name in _CONVS and x.shape == (shape[0], 1, width)):
            raise ValueError(f"{name} must be {list(shape)}, got shape {tuple(x.shape)}")
        if x.is_cpu != on_cpu or (not on_cpu and x.device != q.device):
            raise ValueError(f"{name} must be on {q.device} like q, got {x.device}")
    if state_indices is not None:
        check_form("state_indices", state_indices, (batch,), "[B]", INDEX_DTYPES, q.device)
        if not state_indices.is_contiguous():
            raise ValueError(
                f"state_indices must be contiguous, got strides {state_indices.stride()}"
            )
    for name, x in (("conv_state", conv_state), ("state", state)):
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
    if dtype not in native.DTYPE_CODES:
        raise TypeError(f"q must be fp16, bf16 or fp32, got {dtype}")
    for name, x in (("k", k), ("v", v), ("conv_state", conv_state)):
        if x.dtype != dtype:
            raise TypeError(f"{name} must have q's dtype {dtype}, got {x.dtype}")
    for name, x in (("g", g), ("beta", beta), ("output_gate", output_gate), ("state", state)):
        if x.dtype != dtype and x.dtype != torch.float32:
            raise TypeError(f"{name} must be {dtype} or torch.float32, got {x.dtype}")


def _kda_decode_step(*args: Any) -> Tensor:
    *tensors, norm_eps, lower_bound, allow_neg_eigval, state_v_first, state_indices = args
    if state_indices is not None and state_indices.is_cpu:
        check_indices_differ(state_indices, tensors[7].shape[0])
    for i in (8, 9, 10):
        tensors[i] = tensors[i].view(-1, tensors[i].shape[-1])
    v, width = tensors[2], tensors[8].shape[-1]
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    increment_version(tensors[6:8])  # so that autograd sees what was overwritten
    if width > MAX_CONV_WIDTH or not native_layer.serves(*tensors[:11], tensors[13]):
        return output.copy_(_step_by_step(*tensors, *args[14:]))
    for i in (*range(6), 8, 9, 10, 13):
        if tensors[i].stride()[-1] != 1 or (i > 6 and not tensors[i].is_contiguous()):
            tensors[i] = tensors[i].contiguous()
    tensors[11:13] = native.fp32(tensors[11]), native.fp32(tensors[12])
    native_layer.decode_step(*kernel_arguments((*tensors, state_indices), output, *args[14:18]))
    return output


def kernel_arguments(
    tensors: tuple[Any, ...],
    output: Tensor,
    norm_eps: float,
    lower_bound: float | None,
    allow_neg_eigval: bool,
    state_v_first: bool,
) -> tuple[Any, ...]:
    """:func:`mate.backends.native_layer.decode_fields`'s, of :func:`kda_decode_step`'s tensors."""
    q, v, weight = tensors[0], tensors[2], tensors[8]
    return (
        (*tensors[:6], output, tensors[6]),
        (*tensors[8:11], tensors[13]),
        tensors[7],
        *tensors[11:13],
        (q.shape[-1] // HEAD_DIM, v.shape[-1] // HEAD_DIM),
        weight.shape[-1],
        norm_eps,
        lower_bound,
        native.NEG_EIGVAL * allow_neg_eigval | native.STATE_V_FIRST * state_v_first,
        tensors[14],
    )


def takes_as_they_are(tensors: tuple[Any, ...]) -> bool:
    """Whether the native kernel serves, and needs no tensor of its own nor a look at values.

    ``tensors``: :func:`kda_decode_step`'s and the indices.
    """
    indices = tensors[14]
    if indices is not None and indices.is_cpu:
        return False
    if tensors[8].shape[-1] > MAX_CONV_WIDTH or any(x.stride()[-1] != 1 for x in tensors[:6]):
        return False
    if not all(x.is_contiguous() for x in tensors[8:14]):
        return False
    fp32 = all(x.dtype == torch.float32 for x in tensors[11:13])
    return fp32 and native_layer.serves(*tensors[:11], tensors[13])


# Of addresses in mate_decode_args: of kda_decode_step's tensors and the indices, in its order, and
# of the output.
DECODE_PLACES = (*range(0, 18, 3), 21, 36, *range(24, 33, 3), 41, 42, 33, 43, 18)


class _RepeatedStep:
    """A call of the native kernel that has been made, for others of its form."""

    def __init__(self, fields: list[Any], output: Tensor) -> None:
        layout, places = native_layer.DECODE, DECODE_PLACES
        self._prepared = Prepared("decode_step", layout, fields, places, output.device)

    @classmethod
    def of(cls, tensors: tuple[Any, ...], output: Tensor, *options: Any) -> "_RepeatedStep | None":
        """None where the kernel does not serve, or needs tensors of its own."""
        if not takes_as_they_are(tensors):
            return None
        return cls(native_layer.decode_fields(*kernel_arguments(tensors, output, *options)), output)

    def run(self, tensors: tuple[Any, ...]) -> Tensor:
        output = torch.empty_like(tensors[2], memory_format=torch.contiguous_format)
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        addresses.append(output.data_ptr())
        increment_version(tensors[6:8])
        self._prepared.run(addresses)
        return output


def _step_by_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    conv_state: Tensor,
    state: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    lower_bound: float | None,
    allow_neg_eigval: bool,
    state_v_first: bool,
    state_indices: Tensor | None,
) -> Tensor:
    batch, shape = v.shape[0], v.shape
    pools = conv_state, state
    if state_indices is not None:
        conv_state, state = (pool.gather(x, state_indices) for x in pools)
    streams: list[Tensor] = []
    finals: list[Tensor] = []
    windows = conv_state.split([q.shape[-1], k.shape[-1], v.shape[-1]], dim=1)
    for x, weight, window in zip((q, k, v), (q_weight, k_weight, v_weight), windows, strict=True):
        y, final = short_conv.in_pytorch(
            x.reshape(batch, 1, x.shape[-1]), weight, window, None, True
        )
        assert final is not None
        finals.append(final)
        streams.append(y.unflatten(-1, (-1, HEAD_DIM)))
    q, k, v = streams
    call = KdaCall(
        q,
        k,
        v,
        g=g.reshape(v.shape),
        beta=beta.reshape(batch, 1, beta.shape[-1]),
        scale=HEAD_DIM**-0.5,
        initial_state=state,
        cu_seqlens=None,
        cu_seqlens_cpu=None,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        l2norm=True,
        beta_sigmoid=True,
        neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        recurrent=True,
    )
    o = torch.empty_like(v)
    backends.forward(call, o, state)
    for window, final in zip(windows, finals, strict=True):
        window.copy_(final)
    if state_indices is not None:
        for x, new in zip(pools, (conv_state, state), strict=True):
            pool.scatter_(x, state_indices, new)
    gate = output_gate.reshape(o.shape)
    return gated_norm.in_pytorch(o, gate, norm_weight, norm_eps).reshape(shape)


def _fake(*args: Any) -> Tensor:
    return torch.empty_like(args[2], memory_format=torch.contiguous_format)


_library = torch.library.Library("mate", "FRAGMENT")
_library.define(
    "kda_decode_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor output_gate, "
    "Tensor(a!) conv_state, Tensor(b!) state, Tensor q_weight, Tensor k_weight, Tensor v_weight, "
    "Tensor A_log, Tensor dt_bias, Tensor norm_weight, float norm_eps, float? lower_bound, "
    "bool allow_neg_eigval, bool state_v_first, Tensor? state_indices) -> Tensor"
)
_library.impl("kda_decode_step", _kda_decode_step, "CompositeExplicitAutograd")
torch.library.register_fake("mate::kda_decode_step", _fake, lib=_library)
