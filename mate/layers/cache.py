"""What a KDA layer remembers between calls: a convolution window and a recurrent state.

:class:`KDACache` holds those of one batch, :class:`StatePool` those of all that an engine serves.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class LinearCache(Protocol):
    """What a layer asks of a cache: the part of transformers' ``Cache`` for linear layers.

    An attribute ``state_v_first`` says whether recurrent states are [N, Hv, V, K]; without it
    they are [N, Hv, K, V], as in transformers. An attribute ``state_indices`` [N] says that both
    states are pools of slots, in which document n has the one at its index, and which are updated
    in place: see :class:`StatePool`.
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


class StatePool:
    """States of many sequences in slots: what a serving engine keeps from batch to batch.

    Each layer has two tensors, whose first dimension are the P slots: convolution windows
    [P, Cq + Ck + Cv, W] in the activations' dtype, oldest input first, and recurrent states
    [P, Hv, V, K] in fp32 or the activations' dtype. A sequence owns one slot in all of them.
    :meth:`batch` names the slots of a call's documents; the layers then read and write in place,
    and nothing is moved when sequences join or leave::

        pool = StatePool.for_model(model, slots=64)
        new, old = pool.allocate(), ...            # slots, as Python integers
        with torch.no_grad():                      # a prompt and a decoding step in one call
            y = layer(x, cache=pool.batch([new, old]), cu_seqlens=torch.tensor([0, 700, 701]))
        pool.free(new)

    For inference only. An engine with tensors of its own wraps them: ``StatePool({layer_idx:
    (conv_states, recurrent_states)})``, and may leave allocate and free alone.

    Args:
        states: For each ``layer_idx`` the windows and the recurrent states, with the same P.

    Raises:
        ValueError: there is no layer, or the slots differ in number.
    """

    def __init__(self, states: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self._states = dict(states)
        counts = {x.shape[0] for pair in self._states.values() for x in pair}
        if len(counts) != 1:
            raise ValueError(
                "states must hold tensors with the same number of slots for at least one layer, "
                f"got {sorted(counts)} slots in {len(self._states)} layers"
            )
        self.slots = counts.pop()
        self._devices = list(
            dict.fromkeys(x.device for pair in self._states.values() for x in pair)
        )
        self._free = list(range(self.slots - 1, -1, -1))

    @classmethod
    def for_model(
        cls, model: nn.Module, slots: int, state_dtype: torch.dtype = torch.float32
    ) -> "StatePool":
        """Zeros for every :class:`KimiDeltaAttention` in a model, on its parameters' device.

        They are normal tensors even under ``torch.inference_mode()``: a pool outlives the mode.

        Args:
            model: A model, or one layer; its layers have a ``layer_idx``, each its own.
            slots: P, how many sequences there may be at a time.
            state_dtype: Of the recurrent states: fp32, or the activations' dtype, which takes half
                the memory and rounds the state once a call. Windows have the dtype of q_proj.

        Raises:
            ValueError: the model has no KDA layer, or two have the same ``layer_idx`` or none.
        """
        states: dict[int, tuple[Tensor, Tensor]] = {}
        layers: list[Any] = list(model.modules())
        for layer in layers:
            shapes = getattr(layer, "state_shapes", None)
            if shapes is None:
                continue
            index = layer.layer_idx
            if index is None or index in states:
                raise ValueError(
                    f"every layer must have a layer_idx of its own, got {index} for the layer "
                    f"after {len(states)} others"
                )
            weight = layer.q_proj.weight
            conv, recurrent = shapes()
            with torch.inference_mode(False):
                windows = weight.new_zeros(slots, *conv)
                states[index] = windows, weight.new_zeros(slots, *recurrent, dtype=state_dtype)
        if not states:
            raise ValueError(
                "model must be or contain a mate.layers.KimiDeltaAttention, "
                f"got {type(model).__name__} with none among its {len(layers)} modules"
            )
        return cls(states)

    @property
    def available(self) -> int:
        """How many slots :meth:`allocate` can still give."""
        return len(self._free)

    def allocate(self) -> int:
        """A free slot, emptied: a sequence that starts there starts from zeros.

        Raises:
            RuntimeError: all slots are taken.
        """
        if not self._free:
            raise RuntimeError(f"all {self.slots} slots are taken: free one, or make a larger pool")
        slot = self._free[-1]
        for pair in self._states.values():
            for states in pair:
                states[slot].zero_()
        return self._free.pop()  # only now: zeros may have been refused

    def free(self, slot: int) -> None:
        """Give a slot back.

        Raises:
            ValueError: it is none of the pool's, or free already.
            TypeError: it is no integer.
        """
        slot = _integer("slot must be an integer", slot)
        if not 0 <= slot < self.slots:
            raise ValueError(
                f"slot must be one that is taken, got {slot} in a pool of {self.slots} slots"
            )
        if slot in self._free:
            raise ValueError(f"slot must be one that is taken, got {slot}, which is free")
        self._free.append(slot)

    def batch(self, slots: Tensor | Sequence[int]) -> "PooledCache":
        """What a call takes as ``cache``: document n has slot ``slots[n]``.

        Args:
            slots: [N], integers, or an int32 or int64 tensor on the states' device, which is read
                at every call: a captured CUDA graph follows what is written into it. No slot twice.
                A document whose slot is outside [0, P), such as -1, starts from zeros and leaves no
                state: it pads a batch of fixed size.

        Raises:
            TypeError: ``slots`` holds something else than integers.
            ValueError: it is a tensor of another rank than 1, or on another device.
        """
        if not isinstance(slots, Tensor):
            return PooledCache(self._states, _indices(slots, self._devices[0]))
        if slots.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"slots must be torch.int32 or torch.int64, got {slots.dtype}")
        if slots.dim() != 1:
            raise ValueError(f"slots must be [N], got shape {tuple(slots.shape)}")
        if slots.device not in self._devices:
            on = " or ".join(map(str, self._devices))
            raise ValueError(f"slots must be on {on} like the states, got {slots.device}")
        return PooledCache(self._states, slots)


class PooledCache:
    """The states of one batch in a :class:`StatePool`; made by :meth:`StatePool.batch`."""

    state_v_first = True

    def __init__(self, states: Mapping[int, tuple[Tensor, Tensor]], slots: Tensor) -> None:
        self._states = states
        self.state_indices = slots

    def get_conv_state(self, layer_idx: int) -> Tensor:
        """The windows [P, C, W] of every slot."""
        return self._of(layer_idx)[0]

    def get_recurrent_state(self, layer_idx: int) -> Tensor:
        """The recurrent states [P, Hv, V, K] of every slot."""
        return self._of(layer_idx)[1]

    def _of(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        if layer_idx not in self._states:
            held = sorted(self._states)
            raise ValueError(f"cache has no states for layer_idx={layer_idx}, only for {held}")
        return self._states[layer_idx]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        raise NotImplementedError("the states of a pool are updated in place")

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int) -> Tensor:
        raise NotImplementedError("the states of a pool are updated in place")


def _integer(rule: str, value: Any) -> int:
    """A Python or numpy integer; a tensor would have to be read from its device."""
    try:
        if not isinstance(value, (bool, Tensor)):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{rule}, got {value!r}")


def _indices(slots: Any, device: torch.device) -> Tensor:
    rule = "slots must be a sequence of integers or a tensor [N] of them"
    if not hasattr(slots, "__iter__"):
        raise TypeError(f"{rule}, got {slots!r}")
    numbers = [_integer(rule, slot) for slot in slots]
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def check_pool_tensor(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Whether a layer can update its states of all slots in place."""
    if x.shape != shape:
        raise ValueError(
            f"{name} must be {list(shape)}, the slots and then the layer's state_shapes(), "
            f"got shape {tuple(x.shape)}"
        )
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like hidden_states, got {x.device}")
    if x.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise TypeError(f"{name} must be {allowed}, got {x.dtype}")
    strides = x.stride()
    if 0 in strides and any(n > 1 and not s for n, s in zip(shape, strides, strict=True)):
        raise ValueError(
            f"{name} must not be an expanded tensor, since it is updated in place, got shape "
            f"{tuple(x.shape)} with strides {strides}"
        )
