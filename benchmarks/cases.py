"""Random inputs for the benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mate.functional.reference import log_decay

D = 128
# relative RMS errors of output and state that the operator promises
BOUNDS = {"fp32": (1e-5, 1e-5), "bf16": (5e-3, 4e-3)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected).square().mean().sqrt()
    return (error / expected.square().mean().sqrt()).item()


@dataclass
class Case:
    """Inputs of one call [B, T, H, D]: as a layer has them, and with gate and beta worked out."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor
    dt_bias: Tensor
    lower_bound: float | None
    state: Tensor  # [sequences, H, K, V]
    cu_seqlens: Tensor | None = None

    @cached_property
    def decay(self) -> Tensor:
        return log_decay(self.g.float(), self.A_log, self.dt_bias, self.lower_bound)

    @cached_property
    def strength(self) -> Tensor:
        return self.beta.sigmoid()

    def fused(self) -> dict[str, Any]:
        """For mate: the gate's input and beta's logit go into the kernel."""
        gate = {"A_log": self.A_log, "dt_bias": self.dt_bias, "lower_bound": self.lower_bound}
        return {**self._shared(), "g": self.g, "beta": self.beta, **gate}

    def strict(self) -> dict[str, Any]:
        """For mate: exactly what transformers gets."""
        options = {"use_beta_sigmoid_in_kernel": False}
        return {**self._shared(), "g": self.decay, "beta": self.strength, **options}

    def theirs(self) -> dict[str, Any]:
        """For transformers, which computes gate and sigmoid outside of the timed function."""
        return {
            **{"query": self.q, "key": self.k, "value": self.v},
            **{"g": self.decay, "beta": self.strength, "initial_state": self.state},
            **{"output_final_state": True, "use_qk_l2norm_in_kernel": True},
        }

    def _shared(self) -> dict[str, Any]:
        names = {"q": self.q, "k": self.k, "v": self.v, "initial_state": self.state}
        return {**names, "cu_seqlens": self.cu_seqlens, "state_v_first": False}

    def first(self, tokens: int) -> "Case":
        cut = (x[:, :tokens] for x in (self.q, self.k, self.v, self.g, self.beta))
        return Case(*cut, self.A_log, self.dt_bias, self.lower_bound, self.state)


def draw(
    tokens: int,
    heads: int,
    dtype: torch.dtype,
    gate: str = "bounded",
    regime: str = "remembering",
    batch: int = 1,
    lengths: Sequence[int] = (),
    device: str = "cpu",
) -> Case:
    """Random inputs. forgetting: gates drawn as kernel benchmarks do, each token forgets e^-2.5 or
    so; remembering: gates as a layer initialises them, memory over thousands of tokens.

    ``lengths``: of the sequences of a varlen call, ``tokens`` in all.
    """
    torch.manual_seed(0)
    random = partial(torch.randn, device=device)
    shape = (batch, tokens, heads, D)
    q, k, v, g = (random(shape) for _ in range(4))
    if regime == "forgetting":
        A_log, dt_bias = torch.rand(heads), torch.rand(heads, D)
    else:
        dt = torch.exp(torch.empty(heads, D).uniform_(-6.9, -2.3))  # 1e-3 to 1e-1
        A_log, dt_bias, g = torch.zeros(heads), dt + torch.log(-torch.expm1(-dt)), 0.5 * g
    beta, state = random(shape[:-1]), random(len(lengths) or batch, heads, D, D)
    streams = (x.to(dtype) for x in (q, k, v, g, beta))
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0) if lengths else None
    lower_bound = None if gate == "softplus" else -5.0
    return Case(*streams, A_log.to(device), dt_bias.to(device), lower_bound, state, bounds)
