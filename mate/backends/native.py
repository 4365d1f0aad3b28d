"""The native backend: loads the CPU library with ctypes and calls its C interface.

The structures mirror ``csrc/include/mate/kda.h``; ``mate_abi_version`` guards the pairing.
"""

import ctypes
import functools
import os
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from mate.backends.call import KdaCall

ABI_VERSION = 1
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
GATE_LOG_DECAY, GATE_BOUNDED, GATE_SOFTPLUS = 0, 1, 2
AUTO, CHUNK, RECURRENT = 0, 1, 2
L2NORM, BETA_SIGMOID, NEG_EIGVAL, STATE_V_FIRST = 1, 2, 4, 8
STATUS = {1: "out of memory", 2: "unsupported arguments"}


class CTensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 3), ("dtype", c_int32)]


class KdaArgs(ctypes.Structure):
    _fields_ = [
        *((name, CTensor) for name in ("q", "k", "v", "g", "beta", "output")),
        *((name, CTensor) for name in ("initial_state", "final_state")),
        *((name, c_void_p) for name in ("A_log", "dt_bias", "cu_seqlens")),
        *((name, c_int64) for name in ("num_seqs", "seq_len", "total_tokens")),
        *((name, c_int64) for name in ("heads_qk", "heads_v")),
        *((name, c_float) for name in ("scale", "lower_bound")),
        *((name, c_int32) for name in ("cu_seqlens_is_64bit", "gate", "flags", "algorithm")),
        ("threads", c_int32),
    ]


def library_path() -> Path:
    """Where the CPU library lies; ``MATE_CPU_LIBRARY`` names another build of it."""
    named = os.environ.get("MATE_CPU_LIBRARY")
    return Path(named) if named else Path(__file__).parents[1] / "lib" / "libmate_cpu.so"


@functools.cache
def library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    path = library_path()
    if not path.exists():
        return (
            "the CPU kernels were not built when mate was installed; install a C++ compiler "
            "(g++ or clang++) and run `pip install --force-reinstall --no-deps .` again"
        )
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} could not be loaded: {error}"
    lib.mate_kda_forward.argtypes = [ctypes.POINTER(KdaArgs)]
    lib.mate_cpu_isa.restype = c_char_p
    lib.mate_cpu_use_isa.argtypes = [c_char_p]
    if lib.mate_abi_version() != ABI_VERSION:
        return f"{path} belongs to another version of mate; reinstall mate"
    # torch's own OpenMP pool, so that two pools never compete for the cores
    run = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if run is not None:
        lib.mate_cpu_set_parallel(ctypes.cast(run, c_void_p))
    forced = os.environ.get("MATE_CPU_ISA")
    if forced and lib.mate_cpu_use_isa(forced.encode()) != 0:
        return f"MATE_CPU_ISA={forced} is not an instruction set that this processor can run"
    return lib


def isa() -> str | None:
    """The instruction set of the loaded kernels ("avx512", "avx2", "portable"), None without."""
    lib = library()
    return None if isinstance(lib, str) else lib.mate_cpu_isa().decode()


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve a call; None when it can."""
    if device.type != "cpu":
        return f"native kernels for {device.type} are not built"
    if dtype not in DTYPE_CODES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    lib = library()
    return lib if isinstance(lib, str) else None


def _tensor(x: Tensor | None) -> CTensor:
    """Strides of the three outer dimensions; a missing last one (beta) counts single elements."""
    if x is None:
        return CTensor()
    return CTensor(x.data_ptr(), (c_int64 * 3)(*x.stride()[:3]), DTYPE_CODES[x.dtype])


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def forward(call: KdaCall, output: Tensor, final_state: Tensor | None) -> None:
    """Writes the output [B, T, Hv, V] and, where given, the final state.

    ``final_state`` may be the memory of ``call.initial_state``.
    """
    lib = library()
    if isinstance(lib, str):
        raise RuntimeError(lib)
    # tensors made here must live until the call returns
    A_log, dt_bias = _fp32(call.A_log), _fp32(call.dt_bias)
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    gate = GATE_LOG_DECAY
    if A_log is not None:
        gate = GATE_SOFTPLUS if call.lower_bound is None else GATE_BOUNDED
    tokens = call.v.shape[1]
    args = KdaArgs(
        *(_tensor(x) for x in (call.q, call.k, call.v, call.g, call.beta, output)),
        *(_tensor(x) for x in (call.initial_state, final_state)),
        *(None if x is None else x.data_ptr() for x in (A_log, dt_bias, cu_seqlens)),
        call.num_seqs,
        tokens,
        tokens,
        call.q.shape[2],
        call.v.shape[2],
        call.scale,
        call.lower_bound or 0.0,
        int(cu_seqlens is not None and cu_seqlens.dtype == torch.int64),
        gate,
        L2NORM * call.l2norm
        | BETA_SIGMOID * call.beta_sigmoid
        | NEG_EIGVAL * call.neg_eigval
        | STATE_V_FIRST * call.state_v_first,
        RECURRENT if call.recurrent else AUTO,
        torch.get_num_threads(),
    )
    status = lib.mate_kda_forward(ctypes.byref(args))
    if status != 0:
        raise RuntimeError(f"the native KDA kernel failed: {STATUS.get(status, status)}")
