"""When an operator's implementation may be called without going through torch.library."""

import torch
from torch import Tensor, nn

_PLAIN = {Tensor, nn.Parameter, type(None)}


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether a call of ``torch.ops.mate`` would do nothing but call the implementation.

    That is so in eager mode for ordinary tensors with memory, of which none needs a gradient,
    outside of any mode, transform, trace or profile. The way through the dispatcher then only costs
    time: as much as a quarter of a decode step.
    """
    if torch.compiler.is_compiling():
        return False
    if (
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    first = tensors[0]
    if not _PLAIN.issuperset(map(type, tensors)) or first is None or first.is_meta:
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(x is not None and x.requires_grad for x in tensors)
