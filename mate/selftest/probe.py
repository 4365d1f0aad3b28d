"""Where a GPU's products, shuffles and copies put their numbers: ``csrc/gpu/probe.h``.

Small integers, whose sums are exact whatever the order: an element that differs lies in the wrong
place, or was made of the wrong ones.
"""

from ctypes import c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from mate.backends import gpu
from mate.backends.devices import DEVICES, runtime, stream_of

SIDE = 16
MASKS = (1, 2, 4, 8, 16, 3, 21, 31)
FUNCTION_BOUND = 1e-6


class Outcome(NamedTuple):
    name: str
    error: float  # of the worst element; relative for functions
    bound: float
    note: str


def missing(device_type: str) -> str | None:
    """Why there is nothing to be probed; None where there is."""
    if device_type not in DEVICES:
        return f"{device_type} has no GPU kernels"
    return gpu.refusal(torch.device(device_type), torch.bfloat16)


def matrices() -> Tensor:
    """A and B [2, 16, 16], bf16: integers, all rows and columns different."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(-8, 9, (2, SIDE, SIDE), generator=generator).to(torch.bfloat16)


def measure(device_type: str) -> Tensor:
    """What the probe's kernel finds, [8, 256] on the CPU."""
    lib = gpu.library(device_type)
    if isinstance(lib, str):
        raise RuntimeError(lib)
    lib.mate_gpu_probe.argtypes = [c_void_p, c_void_p, c_void_p]
    device = torch.device(device_type, runtime(device_type).current_device())
    given = matrices().to(device)
    results = torch.full((8, SIDE * SIDE), torch.nan).to(device)
    if lib.mate_gpu_probe(given.data_ptr(), results.data_ptr(), stream_of(device)) != 0:
        raise RuntimeError(f"the probe was not launched: {lib.mate_gpu_last_error().decode()}")
    return results.cpu()


def expected() -> dict[str, Tensor]:
    """By name, in the kernel's order."""
    A, B = matrices().double()
    product = A @ B
    rounded = product.to(torch.bfloat16).double()
    lanes = torch.arange(32)
    x = (lanes.float() - 15.63).double()
    size = x.abs()
    bf16, fp16 = x.to(torch.bfloat16).double(), x.to(torch.float16).double()
    functions = (x.exp2(), size.log2(), 1 / x, size.rsqrt(), fp16, bf16, bf16, -bf16)
    return {
        "A B, B by rows": product,
        "A B^T, B by columns": A @ B.T,
        "A^T + A B": A.T + product,
        "bf16(A B) B, an accumulator as operand": rounded @ B,
        "bf16(A B) kept by rows": rounded,
        "bf16(A B) kept by columns": rounded.T,
        "shuffles": torch.stack([lanes ^ mask for mask in MASKS]).double(),
        "exp2, log2, 1/x, rsqrt, fp16, bf16": torch.stack(functions),
    }


def _mistaken(got: Tensor) -> str:
    """What the numbers of a wrong product are instead, where that can be told."""
    A, B = matrices().double()
    guesses = {
        "zeros": torch.zeros(SIDE, SIDE),
        "A B^T": A @ B.T,
        "A B": A @ B,
        "A^T B": A.T @ B,
        "A^T B^T": A.T @ B.T,
        "B A": B @ A,
    }
    for name, matrix in guesses.items():
        for suffix, candidate in (("", matrix), (", transposed", matrix.T)):
            if torch.equal(got, candidate.double()):
                return f"; these are {name}{suffix}"
    values = torch.equal(got.flatten().sort()[0], (A @ B).flatten().sort()[0])
    return "; the numbers of A B in other places" if values else ""


def compare(name: str, got: Tensor, right: Tensor) -> Outcome:
    """One part of the results, whose wrong elements are named."""
    exact = not name.startswith("exp2")
    got = got.view(right.shape).double()
    scale = 1.0 if exact else right.abs().clamp_min(1.0)
    difference = ((got - right).abs() / scale).nan_to_num(torch.inf, torch.inf)
    worst, bound = difference.max().item(), 0.0 if exact else FUNCTION_BOUND
    if worst <= bound:
        return Outcome(name, worst, bound, "")
    wrong = (difference > bound).nonzero()
    row, column = wrong[0].tolist()
    note = (
        f"{len(wrong)} of {right.numel()} wrong, first row {row}, column {column}: expected "
        f"{right[row, column].item():g}, got {got[row, column].item():g}"
    )
    if right.shape == (SIDE, SIDE):
        note += _mistaken(got)
    return Outcome(name, worst, bound, note)


def run(device_type: str) -> list[Outcome]:
    """The probe's parts, or one that says why there are none."""
    try:
        results = measure(device_type)
    except (RuntimeError, AttributeError) as error:
        return [Outcome("probe", float("inf"), 0.0, f"{type(error).__name__}: {error}")]
    parts = expected().items()
    return [compare(name, got, right) for (name, right), got in zip(parts, results, strict=True)]
