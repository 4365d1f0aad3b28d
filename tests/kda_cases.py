"""Inputs for the operator's tests: drawn afresh, with everything that may differ made to differ."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mate.functional.reference import kda_reference

D = 128
# relative RMS error of (output, final state, gradients): the contract's table
BOUNDS = {
    torch.float32: (1e-5, 1e-5, 1e-4),
    torch.bfloat16: (5e-3, 4e-3, 8e-3),
    torch.float16: (5e-3, 4e-3, 8e-3),
}


def rel_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected), in float64; NaN anywhere gives NaN."""
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    if not expected.numel():
        return 0.0
    expected = expected.double()
    error = (actual.double() - expected).square().mean().sqrt()
    return (error / expected.square().mean().sqrt().clamp_min(1e-300)).item()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For the reference: its products are so small that a second thread would only be waited for,
    and on a busy machine that takes a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Case:
    """Arguments of chunk_kda, and the tensors among them by name."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def kwargs(self) -> dict[str, Any]:
        return {**self.tensors, **self.options}

    def reference(self) -> tuple[Tensor, Tensor]:
        """Output and final state of the float64 recurrence on the same rounded inputs."""
        with one_thread():
            return kda_reference(**self.kwargs())

    def leaves(self) -> list[Tensor]:
        return [x for x in self.tensors.values() if x.is_floating_point()]


def _keys(shape: tuple[int, ...], cosine: float) -> Tensor:
    """Rows whose expected cosine with one another is ``cosine``."""
    shared = torch.randn(*shape[:-3], 1, *shape[-2:])
    return cosine**0.5 * shared + (1 - cosine) ** 0.5 * torch.randn(shape)


def draw(
    B: int = 1,
    T: int = 33,
    Hqk: int = 2,
    Hv: int = 2,
    dtype: torch.dtype = torch.float32,
    gate: str = "bounded",
    regime: str = "forgetting",
    cosine: float = 0.0,
    lens: list[int] | None = None,
    state: bool = True,
    seed: int = 0,
    **options: Any,
) -> Case:
    """One call. ``gate``: bounded, softplus, log (pre-computed). ``regime``: forgetting (random
    gates), remembering (as layers initialise them), strong (-40 a step), erasing (-inf here and
    there), mixed (forgetting and remembering channels in one head). ``lens``: varlen."""
    torch.manual_seed(seed)
    if lens is not None:
        B, T = 1, sum(lens)
    t = {
        "q": torch.randn(B, T, Hqk, D),
        "k": _keys((B, T, Hqk, D), cosine),
        "v": torch.randn(B, T, Hv, D),
    }
    beta = torch.randn(B, T, Hv) + (4.0 if cosine else 0.0)
    if gate == "log":
        a = -torch.rand(B, T, Hv, D) * torch.linspace(0.2, 3, Hv)[:, None]
        if regime == "remembering":
            a = a * 1e-3
        elif regime == "strong":
            a = a - 40.0
        elif regime == "erasing":
            a = a.masked_fill(torch.rand_like(a) < 0.1, -torch.inf)
        elif regime == "mixed":
            a = a * torch.where(torch.rand(D) < 0.5, 20.0, 1e-3)
        t["g"] = a
    else:
        g = torch.randn(B, T, Hv, D)
        A_log, dt_bias = torch.rand(Hv) + torch.linspace(-0.5, 0.5, Hv), torch.rand(Hv, D)
        if regime in ("remembering", "mixed"):
            dt = torch.exp(torch.rand(Hv, D) * 4.6 - 6.9)
            dt_bias = dt + torch.log(-torch.expm1(-dt))
            g, A_log = 0.5 * g, 0.1 * torch.arange(Hv)
            if regime == "mixed":
                dt_bias = torch.where(torch.rand(Hv, D) < 0.5, dt_bias, 6.0)
        elif regime == "strong":
            g, A_log = 4 * g + 8, A_log + (2.3 if gate == "softplus" else 0.0)
        t["g"] = g
    t["beta"] = beta
    t = {name: x.to(dtype) for name, x in t.items()}
    if gate != "log":
        t["A_log"], t["dt_bias"] = A_log, dt_bias
        if gate == "softplus":
            options["lower_bound"] = None
    if lens is not None:
        t["cu_seqlens"] = torch.tensor([0, *lens]).cumsum(0)
    if state:
        N = B if lens is None else len(lens)
        rows = torch.linspace(0.1, 2.0, D)[:, None]  # asymmetric: a transpose must show
        t["initial_state"] = torch.randn(N, Hv, D, D) * rows
    return Case(t, options)
