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
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    if tensors[0] is not None and tensors[0].is_meta:
        return False
    # Under these other functions see the operator, or are to record it.
    return (
        _PLAIN.issuperset(map(type, tensors))
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
    )
