"""When an operator's implementation may be called without going through torch.library."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = {Tensor, nn.Parameter, type(None)}


def is_eager() -> bool:
    """Whether nobody looks on: no compiler, mode, transform, trace, tangents or profile."""
    return not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors is recorded by autograd."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """The operators have gradients, but would lose what forward mode sends through them.

    Raises:
        NotImplementedError: A tensor has a tangent.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "forward-mode derivatives of mate's operators are not implemented: expected reverse "
            "mode (backward), got a tensor with a tangent (torch.func.jvp, forward_ad)"
        )


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether a call of ``torch.ops.mate`` would do nothing but call the implementation.

    That is so in eager mode for ordinary tensors with memory that holds their values as they are,
    of which none needs a gradient. The way through the dispatcher then only costs time: as much as
    a quarter of a decode step.
    """
    if not is_eager():
        return False
    first = tensors[0]
    if not _PLAIN.issuperset(map(type, tensors)) or first is None or first.is_meta:
        return False
    if any(x is not None and x.is_neg() for x in tensors):  # of complex numbers, conjugated
        return False
    return not needs_gradient(*tensors)
