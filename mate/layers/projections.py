"""A layer's projections in two products at inference, without a second copy of them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_FORWARD, _LINEAR = nn.Linear.forward, F.linear


def is_plain(module: Any, cls: type) -> bool:
    """Whether calling the module is nothing but ``cls``'s forward: no hook, no wrapper."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is cls and not hooked and not _has_any_global_hook()


def weights_of(linears: Sequence[Any]) -> list[Tensor] | None:
    """Of layers whose call is nothing but PyTorch's own product with a weight; None where not so:
    a hook, a wrapper, a bias, a parameter elsewhere, another product in the place of PyTorch's."""
    if nn.Linear.forward is not _FORWARD or F.linear is not _LINEAR:
        return None
    weights = []
    for linear in linears:
        parameters = linear._parameters
        weight = parameters.get("weight")
        if weight is None or parameters.get("bias") is not None or not is_plain(linear, nn.Linear):
            return None
        weights.append(weight)
    return weights


class _Joined:
    """Linear layers whose weights are slices of one matrix, side by side in memory.

    The parameters stay what they are, by name, shape and identity, and are the only copy: whatever
    changes them in place changes the matrix.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weights = [linear.weight for linear in linears]
        self.rows = [weight.shape[0] for weight in weights]
        with torch.inference_mode(False), torch.no_grad():
            self.matrix = torch.cat([weight.detach() for weight in weights])
            for weight, part in zip(weights, self.matrix.split(self.rows), strict=True):
                weight.data = part
            self.transposed = self.matrix.t()
        start = self.matrix.data_ptr()
        self.weights = weights
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
        dtype = self.matrix.dtype
        for linear, mine, offset, shape in zip(
            linears, self.weights, self.offsets, self.shapes, strict=True
        ):
            parameters = linear._parameters
            weight = parameters.get("weight")
            if (
                weight is not mine
                or mine.data_ptr() != start + offset
                or mine.shape != shape
                or mine.dtype != dtype
                or not mine.is_contiguous()
                or parameters.get("bias") is not None
            ):
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


class FusedProjections:
    """A layer's projections as two products: of the hidden state, and of both gates' first halves.

    All of them, or none: a hook or a bias on one is enough for all to be called one by one.
    Whatever puts another tensor in the place of a parameter (a move to another device,
    quantisation, an adapter, sharding) ends the fusion, which :meth:`serves` sees before every
    use. Copies and pickles of a layer are not fused.

    ``linears``, everywhere: those of q, k and v, both gates' first halves, that of beta, and both
    gates' second halves.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.inputs, self.ups = _Joined(linears[:-2]), _Joined(linears[-2:])
        q, k, v, down, _, beta = self.inputs.rows
        self._pieces = [q, k, v, 2 * down, beta]
        self._up = self.ups.matrix.view(2, -1, down).transpose(1, 2)

    @staticmethod
    def possible(linears: Sequence[Any]) -> bool:
        """Whether they are plain layers without biases, with weights of one dtype and device."""
        if not (_Joined.possible(linears[:-2]) and _Joined.possible(linears[-2:])):
            return False
        f_down, g_down, _, f_up, g_up = (x.weight.shape for x in linears[3:])
        return f_up == g_up and f_down == g_down and f_up[1] == f_down[0]

    def holds(self, linears: Sequence[Any]) -> bool:
        """Whether the layers' weights are still the slices, and nothing was added to them."""
        return self.inputs.holds(linears[:-2]) and self.ups.holds(linears[-2:])

    def moved(self, linears: Sequence[Any]) -> bool:
        """Whether the weights went to another dtype or device, and to ordinary memory."""
        return self.inputs.moved(linears[:-2]) and self.ups.moved(linears[-2:])

    def serves(self, linears: Sequence[Any]) -> bool:
        """Whether the products stand for calling the layers."""
        return all(is_plain(x, nn.Linear) for x in linears) and self.holds(linears)

    def product(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, T, hidden] to what the layers make of it, as views of the two products.

        q, k, v, the gate's input, beta, the output gate: [B, T, C].
        """
        batch, tokens, hidden = x.shape
        y = torch.mm(x.reshape(-1).view(-1, hidden), self.inputs.transposed)
        whole = y.view(batch, tokens, y.shape[1])
        q, k, v, down, beta = torch.split_with_sizes(whole, self._pieces, 2)
        _, rank, values = self._up.shape
        halves = down.view(batch * tokens, 2, rank).transpose(0, 1)
        g, gate = torch.bmm(halves, self._up).view(2, batch, tokens, values).unbind()
        return q, k, v, g, beta, gate

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
