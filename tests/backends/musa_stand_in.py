"""A PrivateUse1 device called musa, in plain Python: its memory is the CPU's.

Run as a script's first import, before mate. What torch_musa would bring is faked as far as mate
asks for it: :class:`Runtime` notes every question. With the emulated GPU's library as
MATE_MUSA_LIBRARY, calls on this device run to their numbers.
"""

import ctypes
import functools
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

STREAM = 4711


class Runtime:
    """torch.musa."""

    capability = (3, 1)
    available = True
    devices = 2

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.current = 0

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.available

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return self.devices

    def current_device(self) -> int:
        return self.current

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return self.capability

    def get_device_name(self, device: Any = None) -> str:
        return "stand-in"

    def synchronize(self, device: Any = None) -> None:
        self.asked.append("synchronize")

    def device(self, device: Any) -> Any:
        return _Guard(self, torch.device(device).index)

    def current_stream(self, device: Any = None) -> Any:
        index = self.current if device is None else torch.device(device).index
        self.asked.append(f"stream of {index} on {self.current}")
        return _Stream(STREAM + index)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Stream:
    def __init__(self, handle: int) -> None:
        self.musa_stream = handle


class _Guard:
    def __init__(self, runtime: Runtime, index: int) -> None:
        self.runtime, self.index = runtime, index

    def __enter__(self) -> None:
        self.before, self.runtime.current = self.runtime.current, self.index

    def __exit__(self, *_: Any) -> None:
        self.runtime.current = self.before


# ---- the same memory on another device -----------------------------------------------------------

_CPU, _EXTERNAL = 1, 12  # of DLPack


class _Place(ctypes.Structure):  # the beginning of DLTensor
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("index", ctypes.c_int32)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _moved(x: torch.Tensor, device_type: int, index: int) -> torch.Tensor:
    capsule = torch._C._to_dlpack(x)
    place = _Place.from_address(_pointer(capsule, b"dltensor"))
    place.type, place.index = device_type, index
    return torch._C._from_dlpack(capsule)


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The operator on the CPU, on the same memory."""
    index = None

    def to_cpu(x: Any) -> Any:
        nonlocal index
        if isinstance(x, torch.Tensor) and x.device.type == "musa":
            index = x.device.index
            return _moved(x, _CPU, 0)
        if isinstance(x, torch.device) and x.type == "musa":
            index = x.index or 0
            return torch.device("cpu")
        return x

    def back(x: Any) -> Any:
        return _moved(x, _EXTERNAL, index or 0) if isinstance(x, torch.Tensor) else x

    if op in (torch.ops.aten._copy_from.default, torch.ops.aten._copy_from_and_resize.default):
        to_cpu(args[1]).copy_(to_cpu(args[0]))
        return args[1]
    results = op(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
    if op._schema.is_mutable and op._schema.returns:  # what was written is what comes back
        given = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
        written = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
        return given[written[0]] if len(written) == 1 else tuple(given[name] for name in written)
    return tree_map(back, results)


runtime = Runtime()
_setup_privateuseone_for_python_backend("musa", backend_module=runtime)
_library = torch.library.Library("_", "IMPL")
_library.fallback(_fallback, "PrivateUse1")

# PyTorch makes these empty and then lets them grow, which memory of the CPU's cannot.
_factories = torch.library.Library("aten", "IMPL")
for _name in ("eye", "eye.m", "arange", "arange.start", "arange.start_step"):
    _base, _, _overload = _name.partition(".")
    _op = getattr(getattr(torch.ops.aten, _base), _overload or "default")
    _factories.impl(_name, functools.partial(_fallback, _op), "PrivateUse1")
