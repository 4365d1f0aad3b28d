"""Who serves a call, decided when it is made, and in words why another backend does not.

Backends are tried in order: ``native`` (the kernels compiled for the device), then ``pytorch``
(plain PyTorch, any device). ``MATE_DISABLE=native`` (a comma-separated list) switches backends off.
"""

import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mate.backends import gpu, native, pytorch
from mate.backends.call import KdaCall
from mate.backends.devices import DEVICES
from mate.backends.switches import NAMES, disabled


def _backend(name: str, device: torch.device) -> ModuleType:
    if name == "pytorch":
        return pytorch
    return gpu if device.type in DEVICES else native


class Choice(NamedTuple):
    """The backend that serves, and why each one before it in the order does not."""

    name: str
    refusals: dict[str, str]


class NoBackendError(RuntimeError):
    """No backend serves a call; ``refusals`` says why, by backend."""

    def __init__(self, device: torch.device, dtype: torch.dtype, refusals: dict[str, str]) -> None:
        listed = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        super().__init__(f"no backend serves {dtype} on {device} ({listed})")
        self.refusals = refusals


def backend_for(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    recurrent: bool = False,
) -> Choice:
    """Which backend serves the forward pass of a call on ``device`` with q of ``dtype``.

    ``recurrent``: of :func:`mate.recurrent_kda`, not of :func:`mate.chunk_kda`.

    Raises:
        ValueError: PyTorch knows no such device, or MATE_DISABLE no such backend.
        NoBackendError: none serves; a RuntimeError that says why.
    """
    device = _device(device)
    refusals: dict[str, str] = {}
    for name in NAMES:
        reason = "switched off by MATE_DISABLE" if disabled(name) else None
        reason = reason or _backend(name, device).refusal(device, dtype, recurrent)
        if reason is None:
            return Choice(name, refusals)
        refusals[name] = reason
    raise NoBackendError(device, dtype, refusals)


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        hint = "; install torch_musa and import it first" if "musa" in str(device) else ""
        raise ValueError(
            f"device must be one that torch {torch.__version__} knows, got {device!r}{hint}"
        ) from error


_warned: set[str] = set()


def _warn_once(choice: Choice, device: torch.device) -> None:
    """A slow path on a device that has a fast one is said, once a reason."""
    reason = choice.refusals.get("native")
    if reason is None or "MATE_DISABLE" in reason or reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"mate: the {choice.name} backend serves KDA on {device}, many times slower than the "
        f"native kernels: {reason}",
        stacklevel=_level_of_the_user(),
    )


def _level_of_the_user() -> int:
    """The ``stacklevel`` of the first line outside mate and PyTorch, for the function above."""
    own = tuple(f"{Path(str(x.__file__)).parent}{os.sep}" for x in (sys.modules["mate"], torch))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        frame, level = frame.f_back, level + 1
    return level


def forward(call: KdaCall, output: Tensor, final_state: Tensor | None) -> None:
    """Writes output [B, T, Hv, V] and, where given, the final state, by the first able backend."""
    device, dtype = call.q.device, call.q.dtype
    first = _backend(NAMES[0], device)
    if not disabled(NAMES[0]) and first.refusal(device, dtype, call.recurrent) is None:
        return first.forward(call, output, final_state)
    choice = backend_for(device, dtype, call.recurrent)
    _warn_once(choice, device)
    _backend(choice.name, device).forward(call, output, final_state)


def backward(
    call: KdaCall, d_output: Tensor, d_final_state: Tensor | None
) -> tuple[pytorch.Gradients, Tensor | None]:
    """Gradients; the pytorch backend has the only backward pass so far."""
    return pytorch.backward(call, d_output, d_final_state)
