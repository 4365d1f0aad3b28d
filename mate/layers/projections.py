"""The projections of one input as one product at inference, without a second copy of them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: Any, cls: type) -> bool:
    """Whether calling the module is nothing but ``cls``'s forward: no hook, no wrapper."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is cls and not hooked and not _has_any_global_hook()


class FusedProjections:
    """Linear layers whose weights are slices of one matrix, side by side in memory.

    The parameters stay what they are, by name, shape and identity, and are the only copy: whatever
    changes them in place changes the matrix. Whatever puts another tensor in the place of one (a
    move to another device, quantisation, an adapter, sharding) ends the fusion, which
    :meth:`product` sees before every use. Copies and pickles of a layer are not fused.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weights = [linear.weight for linear in linears]
        self.rows = [weight.shape[0] for weight in weights]
        with torch.inference_mode(False), torch.no_grad():
            self.matrix = torch.cat([weight.detach() for weight in weights])
            for weight, part in zip(weights, self.matrix.split(self.rows), strict=True):
                weight.data = part
        start = self.matrix.data_ptr()
        self.offsets = [weight.data_ptr() - start for weight in weights]
        self.shapes = [weight.shape for weight in weights]

    @staticmethod
    def possible(linears: Sequence[Any]) -> bool:
        """Whether they are plain layers without biases, with weights of one dtype and device."""
        if not all(is_plain(x, nn.Linear) and type(x.weight) is nn.Parameter for x in linears):
            return False
        kinds = {(x.weight.dtype, x.weight.device, x.weight.shape[1]) for x in linears}
        distinct = {id(x.weight) for x in linears}
        biases = any(x.bias is not None for x in linears)
        return len(kinds) == 1 and len(distinct) == len(linears) and not biases

    def holds(self, linears: Sequence[Any]) -> bool:
        """Whether the layers' weights are still the slices, and nothing was added to them."""
        start = self.matrix.data_ptr()  # not forever the same: share_memory() moves all at once
        for linear, offset, shape in zip(linears, self.offsets, self.shapes, strict=True):
            weight = linear._parameters.get("weight")
            if type(weight) is not nn.Parameter or weight.data_ptr() != start + offset:
                return False
            if linear._parameters.get("bias") is not None:
                return False
            if weight.shape != shape or weight.dtype != self.matrix.dtype:
                return False
            if not weight.is_contiguous():
                return False
        return True

    def moved(self, linears: Sequence[Any]) -> bool:
        """Whether the weights went to another dtype or device, and to ordinary memory."""
        weights = [linear._parameters.get("weight") for linear in linears]
        kind = self.matrix.dtype, self.matrix.device
        return all(
            weight is not None
            and (weight.dtype, weight.device) != kind
            and not (weight.is_cpu and (weight.is_shared() or weight.is_pinned()))
            for weight in weights
        )

    def serves(self, linears: Sequence[Any]) -> bool:
        """Whether a product stands for calling the layers."""
        plain = all(
            type(x) is nn.Linear
            and not (x._forward_hooks or x._forward_pre_hooks or "forward" in x.__dict__)
            for x in linears
        )
        return plain and not _has_any_global_hook() and self.holds(linears)

    def product(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the layers make of x, as views of one result."""
        return F.linear(x, self.matrix).split(self.rows, dim=-1)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def fuse_projections(model: nn.Module) -> int:
    """Fuse the projections of every KDA layer in a model; see ``KimiDeltaAttention``'s method.

    Layers of transformers count as well, once :func:`mate.hf.patch` has been there.

    Returns:
        The number of layers whose projections are fused now.
    """
    layers: list[Any] = [x for x in model.modules() if hasattr(x, "fuse_projections")]
    return sum(layer.fuse_projections() for layer in layers)
