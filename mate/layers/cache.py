"""What a KDA layer remembers between calls: a convolution window and a recurrent state."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class LinearCache(Protocol):
    """What a layer asks of a cache: the part of transformers' ``Cache`` for linear layers.

    An attribute ``state_v_first`` says whether recurrent states are [N, Hv, V, K]; without it
    they are [N, Hv, K, V], as in transformers.
    """

    def get_conv_state(self, layer_idx: int) -> Tensor | None: ...
    def get_recurrent_state(self, layer_idx: int) -> Tensor | None: ...
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor: ...
    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int) -> Tensor: ...


class KDACache:
    """The states of all KDA layers of a model, for use without transformers.

    One object serves every layer of a model; a layer finds its own states by its ``layer_idx``.
    States are updated in place: a call that raises may have advanced some of them, and the cache
    is void then (``reset``).
    Per layer it holds, for N documents (batch rows, or packed documents):

    - a convolution window [N, Cq + Ck + Cv, W], oldest input first, in the activations' dtype;
    - a recurrent state [N, Hv, V, K] (value first: ``state_v_first``), fp32.

    Without gradients a layer updates the recurrent state in place; with gradients every update is
    a new tensor, so that autograd can go back through several calls (:meth:`detach` cuts).
    """

    state_v_first = True

    def __init__(self) -> None:
        self._conv: dict[int, Tensor] = {}
        self._recurrent: dict[int, Tensor] = {}

    def get_conv_state(self, layer_idx: int) -> Tensor | None:
        """The window [N, C, W] of layer ``layer_idx``, or None before its first update."""
        return self._conv.get(layer_idx)

    def get_recurrent_state(self, layer_idx: int) -> Tensor | None:
        """The state [N, Hv, V, K] of layer ``layer_idx``, or None before its first update."""
        return self._recurrent.get(layer_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, conv_kernel_size: int | None = None
    ) -> Tensor:
        """Append inputs [N, C, T] to the window of layer ``layer_idx``.

        Args:
            conv_states: The newest inputs, oldest first, any T.
            layer_idx: Whose window.
            conv_kernel_size: W; by default the present window's width, else T.

        Returns:
            The new window [N, C, W]: the last W inputs, zeros where there were fewer.
        """
        before = self._conv.get(layer_idx)
        width = conv_kernel_size
        if width is None:
            width = conv_states.shape[-1] if before is None else before.shape[-1]
        missing = width - conv_states.shape[-1]
        if missing > 0:
            past = before
            if past is None:
                past = conv_states.new_zeros(*conv_states.shape[:-1], width)
            conv_states = torch.cat([past, conv_states], dim=-1)
        self._conv[layer_idx] = conv_states[..., -width:]
        return self._conv[layer_idx]

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int) -> Tensor:
        """Replace the recurrent state of layer ``layer_idx`` and return it."""
        self._recurrent[layer_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None) -> bool:
        """Whether layer ``layer_idx`` (None: any layer) has been updated."""
        return bool(self._conv) if layer_idx is None else layer_idx in self._conv

    @property
    def batch_size(self) -> int:
        """N, or -1 before the first update."""
        return next((state.shape[0] for state in self._conv.values()), -1)

    def reset(self) -> None:
        """Forget everything."""
        self._conv.clear()
        self._recurrent.clear()

    def detach(self) -> None:
        """Cut the states off the autograd graph: truncated back-propagation through time."""
        self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> None:
        """Move the states to a device."""
        self._map(lambda state: state.to(device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the documents ``indices`` [M] (integers, repeats allowed), in that order."""
        self._map(lambda state: state.index_select(0, indices.to(state.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """:meth:`batch_select_indices` under the name that beam search calls."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every document ``repeats`` times: N becomes N * repeats."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for states in (self._conv, self._recurrent):
            for layer_idx, state in states.items():
                states[layer_idx] = function(state)

    def __repr__(self) -> str:
        return f"KDACache(layers={sorted(self._conv)}, batch_size={self.batch_size})"
