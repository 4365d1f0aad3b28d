"""Calls like an earlier one: what a decoding loop makes for every token.

What an operator checks and packs follows from the types, shapes, strides, dtypes and devices of its
tensors. A call that equals a checked one in all of them, and in its other arguments, needs neither
again: only the addresses are new. What may differ nevertheless is asked anew in every call: modes,
gradients, MATE_DISABLE, the number of threads, memory that overlaps. Calls of which values are
checked are not remembered.
"""

import contextlib
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

MOST = 256  # shapes and options of an operator's calls that are remembered,
MOST_ALIKE = 8  # and forms of each

# What torch.compile asks before each call of what it has compiled, in one C++ call. With a PyTorch
# without it every call is checked and packed anew.
_TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:
    _TensorGuards = None


class Form:
    """Everything about tensors but addresses and values, and which of them are one and the same."""

    def __init__(self, tensors: tuple[Tensor | None, ...]) -> None:
        """At least two different tensors."""
        first: dict[int, int] = {}
        self._absent = [i for i, x in enumerate(tensors) if x is None]
        self._same: list[tuple[int, int]] = []
        for i, x in enumerate(tensors):
            if x is not None and first.setdefault(id(x), i) != i:
                self._same.append((first[id(x)], i))
        places = tuple(first.values())
        self._pick = itemgetter(*places)
        different = self._pick(tensors)
        self._check = _TensorGuards(
            *different, dynamic_dims_sizes=None, dynamic_dims_strides=None
        ).check
        self.requires_grad = any(x.requires_grad for x in different)

    def fits(self, tensors: tuple[Any, ...]) -> bool:
        """Types, shapes, strides, dtypes, devices, flags, and PyTorch's modes of dispatch."""
        for i in self._absent:
            if tensors[i] is not None:
                return False
        for i, j in self._same:
            if tensors[i] is not tensors[j]:
                return False
        different = self._pick(tensors)
        for x in different:
            if x.is_nested:  # which has no sizes: an error of C++ that nobody would catch
                return False
        return bool(self._check(*different))


class Remembered:
    """Calls by their form and their other arguments.

    Lists are replaced and never changed, since other threads may be reading them.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple[Any, ...], list[tuple[Form, Any]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._calls.values()))

    def find(self, tensors: tuple[Any, ...], *others: Any) -> Any:
        """What was kept for such a call; None where autograd would record it, too."""
        try:
            key = (tensors[0].shape, *others)
            alike = self._calls.get(key, [])
            for i, (form, call) in enumerate(alike):
                if form.fits(tensors):
                    if i > 0:  # the next will be like this one
                        self._calls[key] = [alike[i], *alike[:i], *alike[i + 1 :]]
                    return None if form.requires_grad and torch.is_grad_enabled() else call
        except (AttributeError, TypeError, RuntimeError):
            pass  # no tensor, or one without a shape, or no hash: their errors come in the check
        return None

    def keep(self, call: Any, tensors: tuple[Any, ...], *others: Any) -> None:
        """Not where a flag is a tensor, whose value may change."""
        if _TensorGuards is None or any(isinstance(x, Tensor) for x in others):
            return
        if self.find(tensors, *others) is not None:
            return
        if len(self._calls) >= MOST:
            self._calls.clear()
        with contextlib.suppress(TypeError):  # an array, as such a flag: it has no hash
            key = (tensors[0].shape, *others)
            alike = self._calls.get(key, [])
            self._calls[key] = [(Form(tensors), call), *alike][:MOST_ALIKE]


class Extents:
    """How far tensors reach from their addresses, and which of them are written."""

    def __init__(self, tensors: tuple[Tensor, ...], written: list[int]) -> None:
        """``written``: places among the tensors. One that is there twice may coincide."""
        length = [extent(x) for x in tensors]
        self._written = [
            (i, length[i], [(j, length[j]) for j, y in enumerate(tensors) if y is not tensors[i]])
            for i in written
        ]

    def apart(self, addresses: list[int]) -> bool:
        """Whether nothing that is written shares memory with anything else."""
        for i, length, others in self._written:
            begin = addresses[i]
            end = begin + length
            for j, other_length in others:
                other = addresses[j]
                if other < end and begin < other + other_length:
                    return False
        return True


def extent(x: Tensor) -> int:
    """In bytes. Views with gaps may lie in turns in the same memory: their beginning counts."""
    return x.nbytes if x.is_contiguous() else min(1, x.numel())
