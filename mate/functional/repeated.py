"""Calls like an earlier one: what a decoding loop makes for every token.

What an operator checks and packs follows from the types, shapes, strides, dtypes and devices of its
tensors. A call that equals a checked one in all of them, and in its other arguments, needs neither
again: only the addresses are new. What may differ nevertheless is asked anew in every call: modes,
gradients, MATE_DISABLE, the number of threads, memory that overlaps. Calls of which values are
checked are not remembered.
"""

import contextlib
from typing import Any

from torch import Tensor

MOST = 256  # calls of an operator that are remembered


def form_of(tensors: tuple[Any, ...], *others: Any) -> tuple[Any, ...] | None:
    """Everything about arguments but addresses and values; None if one is no tensor.

    Of a tensor that is the one before it, as of a state updated in place, only that.
    """
    facts: list[Any] = [*others]
    last = None
    try:
        for x in tensors:
            if x is None or x is last:
                facts.append(x is None)
            else:
                facts += type(x), x.shape, x.stride(), x.dtype, x.device, x.is_neg()
                last = x
    except (AttributeError, TypeError, RuntimeError):
        return None
    return tuple(facts)


class Remembered:
    """Calls by their form."""

    def __init__(self) -> None:
        self._calls: dict[tuple[Any, ...], Any] = {}

    def find(self, form: tuple[Any, ...] | None) -> Any:
        try:
            return None if form is None else self._calls.get(form)
        except TypeError:  # something that cannot be hashed: its error comes with the check
            return None

    def keep(self, form: tuple[Any, ...] | None, call: Any) -> None:
        """Not where a flag is a tensor, whose value may change."""
        if form is None or any(isinstance(x, Tensor) for x in form):
            return
        if len(self._calls) >= MOST:
            self._calls.clear()
        with contextlib.suppress(TypeError):  # an array, as such a flag: it has no hash
            self._calls[form] = call


class Extents:
    """How far tensors reach from their addresses, and which of them are written."""

    def __init__(self, tensors: tuple[Tensor | None, ...], written: list[int]) -> None:
        """``written``: places among the tensors. One that is there twice may coincide."""
        self._bytes = [0 if x is None else extent(x) for x in tensors]
        self._pairs = [
            (i, [j for j, y in enumerate(tensors) if y is not None and y is not tensors[i]])
            for i in written
        ]

    def apart(self, addresses: list[int]) -> bool:
        """Whether nothing that is written shares memory with anything else."""
        length = self._bytes
        for i, others in self._pairs:
            begin = addresses[i]
            end = begin + length[i]
            for j in others:
                if begin < addresses[j] + length[j] and addresses[j] < end:
                    return False
        return True


def extent(x: Tensor) -> int:
    """In bytes. Views with gaps may lie in turns in the same memory: their beginning counts."""
    return x.nbytes if x.is_contiguous() else min(1, x.numel())
