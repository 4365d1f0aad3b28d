"""Who serves a call, decided when it is made, and in words why another backend does not.

Backends are tried in order: ``native`` (the kernels compiled for the device), then ``pytorch``
(plain PyTorch, any device). ``MATE_DISABLE=native`` (a comma-separated list) switches backends off.
"""

import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mate.backends import gpu, native, pytorch
from mate.backends.call import KdaCall

_BACKENDS = ("native", "pytorch")


def _backend(name: str, device: torch.device) -> ModuleType:
    if name == "pytorch":
        return pytorch
    return gpu if device.type in gpu.DEVICES else native


class Choice(NamedTuple):
    """The backend that serves, and why each one before it in the order does not."""

    name: str
    refusals: dict[str, str]


def backend_for(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Choice:
    """Which backend serves the forward pass of a call on ``device`` with q of ``dtype``."""
    device = torch.device(device)
    disabled = os.environ.get("MATE_DISABLE", "").split(",")
    refusals: dict[str, str] = {}
    for name in _BACKENDS:
        reason = "switched off by MATE_DISABLE" if name in disabled else None
        reason = reason or _backend(name, device).refusal(device, dtype)
        if reason is None:
            return Choice(name, refusals)
        refusals[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise RuntimeError(f"no backend serves {dtype} on {device} ({listed})")


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
        stacklevel=2,
    )


def forward(call: KdaCall, output: Tensor, final_state: Tensor | None) -> None:
    """Writes output [B, T, Hv, V] and, where given, the final state, by the first able backend."""
    choice = backend_for(call.q.device, call.q.dtype)
    _warn_once(choice, call.q.device)
    _backend(choice.name, call.q.device).forward(call, output, final_state)


def backward(
    call: KdaCall, d_output: Tensor, d_final_state: Tensor | None
) -> tuple[pytorch.Gradients, Tensor | None]:
    """Gradients; the pytorch backend has the only backward pass so far."""
    return pytorch.backward(call, d_output, d_final_state)
