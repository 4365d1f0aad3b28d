"""The operator in torch.library: schemas, fake kernels, autograd.

    mate::kda           functional; differentiable
    mate::kda_out       writes into given tensors; ``resume``: starts from what final_state holds,
                        with ``state_indices`` a pool of states
    mate::kda_backward  gradients, opaque to the compiler so that no length is ever unrolled

One implementation serves all devices: it asks :mod:`mate.backends` who takes the call.
"""

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mate import backends
from mate.backends import native
from mate.backends.call import KdaCall
from mate.backends.prepared import Prepared
from mate.backends.switches import disabled
from mate.functional.contract import check_cu_seqlens, check_indices_differ, no_second_derivative
from mate.functional.repeated import Extents, extent

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor? cu_seqlens_cpu, Tensor? A_log, Tensor? dt_bias, "
    "float? lower_bound, bool l2norm, bool beta_sigmoid, bool neg_eigval, bool state_v_first, "
    "bool recurrent"
)
_DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")

_library = torch.library.Library("mate", "DEF")
_library.define(f"kda({_INPUTS}, bool output_final_state) -> (Tensor, Tensor)")
_library.define(
    f"kda_out({_INPUTS}, bool resume, Tensor(a!) output, Tensor(b!)? final_state, "
    "Tensor? state_indices, Tensor(c!)? token_states) -> ()"
)
_library.define(
    f"kda_backward(Tensor d_output, Tensor d_final_state, {_INPUTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _check_values(call: KdaCall) -> None:
    """On a GPU only the host's copy of cu_seqlens is read."""
    tokens, bounds, copy = call.v.shape[1], call.cu_seqlens, call.cu_seqlens_cpu
    if copy is not None:
        check_cu_seqlens(copy, tokens, "cu_seqlens_cpu")
    if bounds is not None and bounds.device.type == "cpu":
        check_cu_seqlens(bounds, tokens)
        if copy is not None and bounds.tolist() != copy.tolist():
            raise ValueError(
                f"cu_seqlens_cpu must hold cu_seqlens' values {bounds.tolist()}, "
                f"got {copy.tolist()}"
            )
    if call.state_indices is not None and call.state_indices.device.type == "cpu":
        assert call.initial_state is not None
        check_indices_differ(call.state_indices, call.initial_state.shape[0])


def _check_apart(call: KdaCall, output: Tensor, final_state: Tensor | None) -> None:
    """Nothing may be written where something else is read, but a state over the state it follows.

    Of views with gaps only the beginnings are compared.
    """
    others: list[tuple[str, Tensor | None]]
    others = [("q", call.q), ("k", call.k), ("v", call.v), ("g", call.g), ("beta", call.beta)]
    if call.initial_state is not final_state:
        others.append(("initial_state", call.initial_state))
    written = (
        ("output", output),
        ("final_state", final_state),
        ("token_states", call.token_states),
    )
    for name, x in written:
        if x is None:
            continue
        begin = x.data_ptr()
        end = begin + extent(x)
        for other, y in others:
            if y is None or (first := y.data_ptr()) >= end or first + extent(y) <= begin:
                continue
            if not (name == "final_state" and other == "initial_state" and _same_elements(x, y)):
                raise ValueError(f"{name} must not overlap {other}: both lie in the same memory")
        others.append((name, x))


def _same_elements(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.dtype == y.dtype


def new_state(q: Tensor, v: Tensor, num_seqs: int, initial_state: Tensor | None) -> Tensor:
    """A new final state: initial_state's dtype, else fp32."""
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    return v.new_empty((num_seqs, v.shape[-2], v.shape[-1], q.shape[-1]), dtype=dtype)


def _new_outputs(call: KdaCall, output_final_state: bool) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    if not output_final_state:
        return output, output.new_empty(0)
    return output, new_state(call.q, call.v, call.num_seqs, call.initial_state)


def kda(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, output_final_state = args
    call = KdaCall(*inputs)
    _check_values(call)
    output, final_state = _new_outputs(call, output_final_state)
    backends.forward(call, output, final_state if output_final_state else None)
    return output, final_state


def kda_out(*args: Any) -> None:
    *inputs, resume, output, final_state, state_indices, token_states = args
    call = KdaCall(*inputs)
    call.state_indices, call.token_states = state_indices, token_states
    if resume:
        call.initial_state = final_state
    _check_values(call)
    _check_apart(call, output, final_state)
    backends.forward(call, output, final_state)
    # so that autograd sees a graph whose saved tensors were overwritten
    increment_version([x for x in (output, final_state, token_states) if x is not None])


class RepeatedKda:
    """A token-by-token call that has been made, for others of its form.

    ``tensors``, everywhere: the caller's q, k, v, g, beta, output, initial_state, final_state,
    token_states, state_indices, A_log, dt_bias and cu_seqlens.
    """

    _PLACES = (*range(0, 45, 5), 45, 47, 48, 49)  # of their addresses in mate_kda_args
    _OUTPUT = 5
    _WRITTEN = (_OUTPUT, 7, 8)

    def __init__(
        self, fields: list[Any], tensors: tuple[Tensor | None, ...], device: torch.device
    ) -> None:
        given = [i for i, x in enumerate(tensors) if x is not None]
        self._pick = itemgetter(*given)
        written = [i for i in self._WRITTEN if i in given]
        self._written = [given.index(i) for i in written]
        self._extents = Extents(self._pick(tensors), self._written)
        self._new_output = tensors[self._OUTPUT] is None
        places = [self._PLACES[i] for i in given]
        if self._new_output:
            places.append(self._PLACES[self._OUTPUT])
        self._prepared = Prepared("kda_forward", native.KDA, fields, places, device)

    @classmethod
    def of(cls, call: KdaCall, output: Tensor, tensors: tuple[Any, ...]) -> "RepeatedKda | None":
        """None where a call needs a look at values, or tensors of its own."""
        rest = tensors[9:]
        if call.q.is_cpu and not (call.cu_seqlens is None and rest[0] is None):
            return None
        if not all(x is None or x.is_contiguous() for x in rest):
            return None
        if not all(x is None or x.dtype == torch.float32 for x in rest[1:3]):
            return None
        if backends.backend_for(call.q.device, call.q.dtype, recurrent=True).name != "native":
            return None
        fields, _ = native.kda_fields(call, output, tensors[7])
        return cls(fields, tensors, call.q.device)

    def run(self, tensors: tuple[Any, ...]) -> Tensor | None:
        """The output; None: nothing was done, and the call must be made in full."""
        given = self._pick(tensors)
        addresses = [x.data_ptr() for x in given]
        if disabled("native") or not self._extents.apart(addresses):
            return None
        output: Tensor = tensors[self._OUTPUT]
        if self._new_output:
            output = torch.empty_like(tensors[2], memory_format=torch.contiguous_format)
            addresses.append(output.data_ptr())
        self._prepared.run(addresses)
        increment_version([given[i] for i in self._written])
        return output


def _kda_backward(d_output: Tensor, d_final_state: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    call = KdaCall(*inputs)
    d_state = d_final_state if d_final_state.numel() else None
    grads, d_initial = backends.backward(call, d_output, d_state)
    results = _new_gradients(call)
    found = (grads.q, grads.k, grads.v, grads.g, grads.beta, d_initial, grads.A_log, grads.dt_bias)
    return tuple(
        empty if grad is None else grad.to(empty.dtype)
        for empty, grad in zip(results, found, strict=True)
    )


def _new_gradients(call: KdaCall) -> tuple[Tensor, ...]:
    sources = (getattr(call, name) for name in _DIFFERENTIABLE)
    return tuple(
        call.q.new_empty(0)
        if x is None
        else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in sources
    )


def _kda_fake(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, output_final_state = args
    return _new_outputs(KdaCall(*inputs), output_final_state)


def _kda_out_fake(*args: Any) -> None:
    return None


def _kda_backward_fake(d_output: Tensor, d_final: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _new_gradients(KdaCall(*inputs))


_FIELDS = tuple(KdaCall.__dataclass_fields__)[: _INPUTS.count(",") + 1]  # of the schemas
_TENSORS = tuple(
    name for name in _FIELDS if name in (*_DIFFERENTIABLE, "cu_seqlens", "cu_seqlens_cpu")
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values = dict(zip(_FIELDS, inputs[:-1], strict=True))
    ctx.save_for_backward(*(values.pop(name) for name in _TENSORS))
    ctx.options = values


def _autograd(ctx: Any, d_output: Tensor, d_final_state: Tensor) -> tuple[Any, ...]:
    values = ctx.options | dict(zip(_TENSORS, ctx.saved_tensors, strict=True))
    inputs = [values[name] for name in _FIELDS]
    grads = torch.ops.mate.kda_backward(d_output, d_final_state, *inputs)
    found = dict(zip(_DIFFERENTIABLE, grads, strict=True))
    return (*(None if values[n] is None else found.get(n) for n in _FIELDS), None)


for _name, _function, _fake in (
    ("kda", kda, _kda_fake),
    ("kda_out", kda_out, _kda_out_fake),
    ("kda_backward", _kda_backward, _kda_backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mate::{_name}", _fake, lib=_library)
torch.library.register_autograd("mate::kda", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("mate::kda_backward", no_second_derivative, lib=_library)
