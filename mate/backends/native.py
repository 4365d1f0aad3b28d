"""The native backend: loads the CPU library with ctypes and calls its C interface.

The structures mirror ``csrc/include/mate/``; ``mate_abi_version`` guards the pairing.
"""

import ctypes
import functools
import os
import struct
from ctypes import c_char_p, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mate.backends.call import KdaCall

ABI_VERSION = 3
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
GATE_LOG_DECAY, GATE_BOUNDED, GATE_SOFTPLUS = 0, 1, 2
AUTO, CHUNK, RECURRENT = 0, 1, 2
L2NORM, BETA_SIGMOID, NEG_EIGVAL, STATE_V_FIRST = 1, 2, 4, 8
STATUS = {1: "out of memory", 2: "unsupported arguments"}


# Structures are packed in one go: ctypes would take longer to fill them field by field than a
# decode step of a small layer takes.
TENSOR = "P3qi0q"  # mate_tensor; 0q: padded to the alignment of int64_t, as C does
KDA = struct.Struct("@" + 9 * TENSOR + "Pq3P5q2f6i0q")  # mate_kda_args
_NO_TENSOR = (0, 0, 0, 0, 0)


def library_path() -> Path:
    """Where the CPU library lies; ``MATE_CPU_LIBRARY`` names another build of it."""
    named = os.environ.get("MATE_CPU_LIBRARY")
    return Path(named) if named else Path(__file__).parents[1] / "lib" / "libmate_cpu.so"


def _missing(path: Path) -> str:
    if os.environ.get("MATE_CPU_LIBRARY"):
        return f"MATE_CPU_LIBRARY={path} does not exist"
    package = Path(__file__).parents[1]
    if (package.parent / "pyproject.toml").exists() and not (package / "lib").exists():
        return (
            f"{package} is mate's source tree, in which the CPU kernels are not built; run "
            "`make develop` there, or start Python in another folder to import the installed mate"
        )
    return (
        "the CPU kernels were not built when mate was installed; install a C++ compiler (g++ or "
        "clang++) and run `pip install --force-reinstall --no-deps .` in mate's source folder"
    )


@functools.cache
def library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    path = library_path()
    if not path.exists():
        return _missing(path)
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        named = "MATE_CPU_LIBRARY=" if os.environ.get("MATE_CPU_LIBRARY") else ""
        return f"{named}{path} could not be loaded: {error}"
    try:
        version = lib.mate_abi_version()
        for name in ("mate_kda_forward", "mate_short_conv", "mate_gated_norm", "mate_decode_step"):
            getattr(lib, name).argtypes = [c_char_p]  # a packed structure
    except AttributeError:
        version = None
    if version != ABI_VERSION:
        return f"{path} belongs to another version of mate, or is none of its; reinstall mate"
    lib.mate_cpu_isa.restype = c_char_p
    lib.mate_cpu_use_isa.argtypes = [c_char_p]
    # torch's own OpenMP pool, so that two pools never compete for the cores
    run = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if run is not None:
        lib.mate_cpu_set_parallel(ctypes.cast(run, c_void_p))
    forced = os.environ.get("MATE_CPU_ISA")
    if forced and lib.mate_cpu_use_isa(forced.encode()) != 0:
        return f"MATE_CPU_ISA={forced} is not an instruction set that this processor can run"
    return lib


def isa() -> str | None:
    """The instruction set of the loaded kernels ("amx", "avx512", "avx2", "portable"), or None."""
    lib = library()
    return None if isinstance(lib, str) else lib.mate_cpu_isa().decode()


def use_isa(name: str | None) -> bool:
    """Switch the loaded kernels to an instruction set, None: the best; False if it cannot run.

    For tests and benchmarks; users set ``MATE_CPU_ISA``.
    """
    lib = library()
    if isinstance(lib, str):
        return False
    return bool(lib.mate_cpu_use_isa(None if name is None else name.encode()) == 0)


def refusal(device: torch.device, dtype: torch.dtype, recurrent: bool = False) -> str | None:
    """Why this backend cannot serve a call; None when it can."""
    if device.type != "cpu":
        return f"there are no native kernels for {device.type}"
    if dtype not in DTYPE_CODES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    lib = library()
    return lib if isinstance(lib, str) else None


def tensor_fields(x: Tensor | None) -> tuple[int, ...]:
    """A ``mate_tensor``: strides of the three outer dimensions; beta counts single elements."""
    if x is None:
        return _NO_TENSOR
    stride = x.stride()
    return x.data_ptr(), stride[0], stride[1], stride[2], DTYPE_CODES[x.dtype]


def index_fields(indices: Tensor | None, pool: Tensor | None) -> tuple[int, int]:
    """state_indices and num_states of a structure."""
    if indices is None:
        return 0, 0
    assert pool is not None
    return indices.data_ptr(), pool.shape[0]


def fp32(x: Tensor) -> Tensor:
    """x contiguous and in fp32; itself where it is already."""
    if x.dtype == torch.float32 and x.is_contiguous():
        return x
    return x.float().contiguous()


def kda_fields(call: KdaCall, output: Tensor, final_state: Tensor | None) -> tuple[list[Any], Any]:
    """The ``mate_kda_args`` of a call, and tensors made for it, to be kept until it returns."""
    A_log = None if call.A_log is None else fp32(call.A_log)
    dt_bias = None if call.dt_bias is None else fp32(call.dt_bias)
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    indices = None if call.state_indices is None else call.state_indices.contiguous()
    gate = GATE_LOG_DECAY
    if A_log is not None:
        gate = GATE_SOFTPLUS if call.lower_bound is None else GATE_BOUNDED
    batch, tokens, heads, _ = call.v.shape
    fields = [
        *tensor_fields(call.q), *tensor_fields(call.k), *tensor_fields(call.v),
        *tensor_fields(call.g), *tensor_fields(call.beta), *tensor_fields(output),
        *tensor_fields(call.initial_state), *tensor_fields(final_state),
        *tensor_fields(call.token_states), *index_fields(indices, call.initial_state),
        0 if A_log is None else A_log.data_ptr(),
        0 if dt_bias is None else dt_bias.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        batch if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        tokens, tokens, call.q.shape[2], heads,
        call.scale, call.lower_bound or 0.0,
        cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        indices is not None and indices.dtype == torch.int64,
        gate,
        L2NORM * call.l2norm
        | BETA_SIGMOID * call.beta_sigmoid
        | NEG_EIGVAL * call.neg_eigval
        | STATE_V_FIRST * call.state_v_first,
        RECURRENT if call.recurrent else AUTO,
        torch.get_num_threads(),
    ]  # fmt: skip
    return fields, (A_log, dt_bias, cu_seqlens, indices)


def pack(call: KdaCall, output: Tensor, final_state: Tensor | None) -> tuple[bytes, Any]:
    """As the C interface takes it, and what is to be kept until it returns."""
    fields, keep = kda_fields(call, output, final_state)
    return KDA.pack(*fields), keep


def run(function: str, *arguments: bytes) -> None:
    """Calls a function of the library."""
    lib = library()
    if isinstance(lib, str):
        raise RuntimeError(lib)
    status = getattr(lib, function)(*arguments)
    if status != 0:
        raise RuntimeError(f"{function} failed: {STATUS.get(status, status)}")


def forward(call: KdaCall, output: Tensor, final_state: Tensor | None) -> None:
    """Writes the output [B, T, Hv, V] and, where given, the final state.

    ``final_state`` may be the memory of ``call.initial_state``.
    """
    packed, keep = pack(call, output, final_state)
    run("mate_kda_forward", packed)
    del keep
