"""What differs between the types of GPU in Python: streams, and which devices the kernels fit.

torch_musa is never imported here: PyTorch loads it by itself where it is installed, and torch.musa
is there then.
"""

import functools
import importlib.metadata
import re
from collections.abc import Callable
from typing import Any

import torch

DEVICES = ("cuda", "musa")


def runtime(device_type: str) -> Any:
    """torch.cuda or torch.musa; None where PyTorch has no such module."""
    return getattr(torch, device_type, None)


def current_device_of(device_type: str) -> Callable[[], int]:
    """What tells the current device of a type, once PyTorch has tensors there."""
    current: Callable[[], int] = runtime(device_type).current_device
    if device_type == "cuda":  # the same without PyTorch's question whether it has begun
        current = getattr(torch._C, "_cuda_getDevice", current)
    return current


# What torch.cuda.current_stream asks, without an object around it: a tenth of a decode step's time.
_cuda_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def stream_of(device: torch.device) -> int:
    """The handle of PyTorch's current stream on a device."""
    if device.type != "cuda":
        return int(runtime("musa").current_stream(device).musa_stream)
    if _cuda_stream is None or device.index is None:
        return torch.cuda.current_stream(device).cuda_stream
    return int(_cuda_stream(device.index))


@functools.cache
def unfit(device_type: str, index: int | None) -> str | None:
    """Why the kernels do not run on a device; asked once."""
    if runtime(device_type) is None or not runtime(device_type).is_available():
        return f"PyTorch finds no {device_type.upper()} device here"
    return _UNFIT[device_type](index)


def _unfit_cuda(index: int | None) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the cuda kernels need compute capability 8.0, not {major}.{minor}"
    return None


def _unfit_musa(index: int | None) -> str | None:
    try:
        version = importlib.metadata.version("torch_musa")
    except importlib.metadata.PackageNotFoundError:
        return "torch_musa is not installed"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < (2, 7):
        return f"the musa kernels need torch_musa 2.7 or newer, not {version}"
    major, minor = runtime("musa").get_device_capability(index)
    if (major, minor) != (3, 1):
        return f"the musa kernels need compute capability 3.1 (MTT S5000), not {major}.{minor}"
    return None


_UNFIT = {"cuda": _unfit_cuda, "musa": _unfit_musa}
