"""The GPU kernels on an emulated GPU: the library, and calls between guard bands."""

import ctypes
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kda_cases import Case
from torch import Tensor

from mate.backends import gpu, native
from mate.backends.call import KdaCall

ROOT = Path(__file__).parents[2]
GUARD = 512  # elements on either side of every tensor
SENTINEL = 42.0
FLAGS = ["-std=c++17", "-O2", "-ftree-vectorize", "-fcf-protection=none", "-fPIC", "-shared"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", f"-I{ROOT / 'csrc/include'}"]


def build(folder: Path, *flags: str) -> ctypes.CDLL:
    """Compiles csrc/gpu for the emulated GPU and loads it."""
    target = folder / "libmate_gpu_host.so"
    sources = [ROOT / "csrc/gpu/host.cpp", ROOT / "csrc/gpu/arch/host.cpp"]
    subprocess.run(["g++", *FLAGS, *flags, *sources, "-o", target], check=True)
    return load(target)


def load(target: Path) -> ctypes.CDLL:
    lib = gpu.load(target)
    assert not isinstance(lib, str), lib
    lib.mate_gpu_host_seed.argtypes = [ctypes.c_uint64]
    lib.mate_gpu_host_operations.restype = ctypes.c_int64
    return lib


def guarded(x: Tensor, fill: float = math.nan, shift: int = 0) -> tuple[Tensor, Tensor]:
    """A contiguous copy of x inside a larger buffer filled with ``fill``, and that buffer.

    ``shift`` elements off an allocation's alignment.
    """
    buffer = x.new_full((x.numel() + 2 * GUARD,), fill)
    inner = buffer[GUARD + shift : GUARD + shift + x.numel()].view(x.shape)
    return inner.copy_(x), buffer


def call_of(
    tensors: dict[str, Tensor], options: dict[str, Any], recurrent: bool = False, **more: Tensor
) -> KdaCall:
    """The checked call that mate.functional would make of a case."""
    t, o = tensors, options
    return KdaCall(
        *(t[name] for name in ("q", "k", "v", "g", "beta")),
        scale=o.get("scale", 128**-0.5),
        initial_state=t.get("initial_state"),
        cu_seqlens=t.get("cu_seqlens"),
        cu_seqlens_cpu=None,
        A_log=t.get("A_log"),
        dt_bias=t.get("dt_bias"),
        lower_bound=o.get("lower_bound", -5.0),
        l2norm=o.get("use_qk_l2norm_in_kernel", True),
        beta_sigmoid=o.get("use_beta_sigmoid_in_kernel", True),
        neg_eigval=o.get("allow_neg_eigval", False),
        state_v_first=o.get("state_v_first", True),
        recurrent=recurrent,
        **more,
    )


def launch(lib: ctypes.CDLL, call: KdaCall, output: Tensor, final: Tensor | None) -> int:
    """The status of a call in a workspace of NaN, whose surroundings must stay as they are."""
    packed, keep = native.pack(call, output, final)
    size = lib.mate_gpu_kda_workspace(packed)
    if size < 0:
        return int(lib.mate_gpu_kda_forward(packed, None, None))
    room = torch.full((size + 4096,), 255, dtype=torch.uint8)
    start = -room.data_ptr() % 256 + 1024
    room[:start] = room[start + size :] = 77
    status = lib.mate_gpu_kda_forward(packed, room.data_ptr() + start, None)
    assert (room[:start] == 77).all() and (room[start + size :] == 77).all()
    del keep
    return int(status)


def run(
    lib: ctypes.CDLL, case: Case, shift: int = 0, final_state: bool = True
) -> tuple[Tensor, Tensor]:
    def forward(t: dict[str, Tensor], output: Tensor, final: Tensor | None) -> None:
        status = launch(lib, call_of(t, case.options), output, final)
        assert status == 0, (status, lib.mate_gpu_last_error())

    return run_guarded(forward, case, shift, final_state)


def run_guarded(
    forward: Callable[[dict[str, Tensor], Tensor, Tensor | None], None],
    case: Case,
    shift: int = 0,
    final_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Output and final state; every tensor is guarded, outputs are poisoned before."""
    t = {name: guarded(x, 0 if x.dtype in (torch.int32, torch.int64) else math.nan, shift)[0]
         for name, x in case.tensors.items()}  # fmt: skip
    v, initial = t["v"], t.get("initial_state")
    N = v.shape[0] if "cu_seqlens" not in t else len(t["cu_seqlens"]) - 1
    new_state = torch.full((N, v.shape[2], 128, 128), math.nan)
    new_state = new_state if initial is None else new_state.to(initial.dtype)
    output, output_buffer = guarded(torch.full_like(v, math.nan), SENTINEL, shift)
    final, final_buffer = guarded(new_state, SENTINEL, shift)
    forward(t, output, final if final_state else None)
    for buffer in (output_buffer, final_buffer):
        bands = torch.cat([buffer[: GUARD + shift], buffer[shift - GUARD :]])
        assert (bands == SENTINEL).all(), "written outside the tensor"
    return output, final
