"""Where the kernels of decoding and of the layer are tested: an emulated GPU, and a real one.

Both take the same calls with tensors on the CPU. The real one gets copies of their whole storages,
so that strides, alignment and guard bands are those of the test.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import gpu_host
import torch
from torch import Tensor

from mate.backends import gpu, native, native_layer
from mate.backends.call import KdaCall

LAYER = ("short_conv", "gated_norm", "decode_step")


class Emulated:
    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib

    def forward(self, call: KdaCall, output: Tensor, final: Tensor | None) -> None:
        if call.recurrent:
            packed, _ = native.pack(call, output, final)
            assert self.lib.mate_gpu_kda_workspace(packed) in (-1, 0)
        self._check(gpu_host.launch(self.lib, call, output, final))

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(native.STATUS.get(status) or self.lib.mate_gpu_last_error().decode())

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """native_layer's functions run here."""

        def run(name: str, arguments: bytes, device: torch.device) -> None:
            self._check(getattr(self.lib, f"mate_gpu_{name}")(arguments, None))

        with mock.patch.object(native_layer, "_run", run):
            yield


class Mirror:
    """Copies on the GPU of everything that some tensors' storages hold."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(self(y) for y in x)
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.storages:
            held = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.storages[storage.data_ptr()] = held, held.cuda()
        there = self.storages[storage.data_ptr()][1].untyped_storage()
        empty = torch.empty(0, dtype=x.dtype, device="cuda")
        return empty.set_(there, x.storage_offset(), x.shape, x.stride())

    def bring_back(self) -> None:
        for here, there in self.storages.values():
            here.copy_(there)


class Cuda:
    def forward(self, call: KdaCall, output: Tensor, final: Tensor | None) -> None:
        mirror = Mirror()
        there = replace(call, **{f.name: mirror(getattr(call, f.name)) for f in fields(call)})
        gpu.forward(there, mirror(output), mirror(final))
        mirror.bring_back()

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        def mirrored(function: Callable[..., None], *args: Any) -> None:
            mirror = Mirror()
            function(*mirror(args))
            mirror.bring_back()

        with contextlib.ExitStack() as stack:
            for name in LAYER:
                function = functools.partial(mirrored, getattr(native_layer, name))
                stack.enter_context(mock.patch.object(native_layer, name, function))
            yield
