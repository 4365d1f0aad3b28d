"""The native backend on GPUs: loads the device's library with ctypes and queues its kernels.

The C interface is ``csrc/include/mate/gpu.h``. Kernels run on PyTorch's current stream; their
workspace comes from PyTorch's allocator. Nothing waits for the device. PyTorch gives memory back to
work queued on the same stream only, so that what a call made for itself may be freed before its
kernels have run.
"""

import ctypes
import functools
import os
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from mate.backends.call import KdaCall
from mate.backends.devices import current_device_of, runtime, stream_of, unfit
from mate.backends.native import ABI_VERSION, DTYPE_CODES, STATUS, pack

LAUNCH_FAILED = 3
CHUNKED_DTYPES = (torch.float16, torch.bfloat16)  # token by token fp32 too
LAYER_FUNCTIONS = ("short_conv", "gated_norm", "decode_step", "layer_step")


def library_path(device_type: str) -> Path:
    """Where a device's library lies; ``MATE_CUDA_LIBRARY``, ``MATE_MUSA_LIBRARY`` name another."""
    named = os.environ.get(f"MATE_{device_type.upper()}_LIBRARY")
    return Path(named) if named else Path(__file__).parents[1] / "lib" / f"libmate_{device_type}.so"


def load(path: Path) -> ctypes.CDLL | str:
    """The library with its functions' types, or why it cannot be used."""
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} could not be loaded: {error}"
    try:
        version = lib.mate_abi_version()
        for name in ("kda", "layer_step"):
            workspace = getattr(lib, f"mate_gpu_{name}_workspace")
            workspace.argtypes, workspace.restype = [c_char_p], c_int64
        lib.mate_gpu_kda_forward.argtypes = [c_char_p, c_void_p, c_void_p]
        for name in LAYER_FUNCTIONS:
            getattr(lib, f"mate_gpu_{name}").argtypes = [c_char_p, c_void_p]
        lib.mate_gpu_last_error.restype = c_char_p
    except AttributeError:
        version = None
    if version != ABI_VERSION:
        return f"{path} belongs to another version of mate; reinstall mate"
    return lib


@functools.cache
def library(device_type: str) -> ctypes.CDLL | str:
    """The loaded library of a device type, or why there is none."""
    path = library_path(device_type)
    if not path.exists():
        return (
            f"the {device_type} kernels were not built when mate was installed; with its compiler "
            f"at hand run `MATE_BUILD=cpu,{device_type} pip install --force-reinstall --no-deps .` "
            "in mate's source folder"
        )
    return load(path)


def unusable(device: torch.device) -> str | None:
    """Why a device's kernels cannot run, whatever the call."""
    if torch.version.hip:
        return "there are no native kernels for ROCm"
    lib = library(device.type)
    return lib if isinstance(lib, str) else unfit(device.type, device.index)


def refusal(device: torch.device, dtype: torch.dtype, recurrent: bool = False) -> str | None:
    """Why this backend cannot serve a call; None when it can."""
    if torch.version.hip:
        return unusable(device)
    if dtype not in CHUNKED_DTYPES and not (recurrent and dtype in DTYPE_CODES):
        but = f", and {dtype} token by token only" if dtype in DTYPE_CODES else f", not {dtype}"
        return f"the {device.type} kernels serve float16 and bfloat16{but}"
    return unusable(device)


class Queue:
    """A function of a device's library, for PyTorch's current stream there.

    It launches on the current device, and asks that for its size.
    """

    def __init__(self, function: str, device: torch.device) -> None:
        lib = library(device.type)
        if isinstance(lib, str):
            raise RuntimeError(lib)
        self.function = getattr(lib, function)
        self.device, self.index = device, device.index
        self.runtime = runtime(device.type)
        self.current_device = current_device_of(device.type)

    def __call__(self, *arguments: bytes | int | None) -> None:
        if self.index == self.current_device():
            status = self.function(*arguments, stream_of(self.device))
        else:
            with self.runtime.device(self.device):
                status = self.function(*arguments, stream_of(self.device))
        if status != 0:
            self._fail(status)

    def _fail(self, status: int) -> NoReturn:
        name, lib = self.function.__name__, library(self.device.type)
        if status == LAUNCH_FAILED and not isinstance(lib, str):
            said = lib.mate_gpu_last_error().decode()
            raise RuntimeError(f"{name}: a kernel was not launched: {said}")
        raise RuntimeError(f"{name} on {self.device} failed: {STATUS.get(status, status)}")


def queue(function: str, device: torch.device, *arguments: bytes | int | None) -> None:
    """Calls a function of the device's library once."""
    Queue(function, device)(*arguments)


def forward(call: KdaCall, output: Tensor, final_state: Tensor | None) -> None:
    """Queues the output [B, T, Hv, V] and, where given, the final state.

    ``final_state`` may be the memory of ``call.initial_state``.
    """
    device = call.q.device
    packed, keep = pack(call, output, final_state)
    workspace = None
    if not call.recurrent:
        size = max(0, workspace_bytes("kda", device, packed))
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
    at = None if workspace is None else workspace.data_ptr()
    queue("mate_gpu_kda_forward", device, packed, at)
    del keep, workspace


def workspace_bytes(function: str, device: torch.device, packed: bytes) -> int:
    """Of device memory that a call needs; -1 where the kernels do not serve it."""
    lib = library(device.type)
    if isinstance(lib, str):
        raise RuntimeError(lib)
    with runtime(device.type).device(device):  # it asks for the size of the current one
        return int(getattr(lib, f"mate_gpu_{function}_workspace")(packed))
