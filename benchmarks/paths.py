"""What the benchmarks time: calls of mate and of transformers on the same random inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import logging as transformers_logging
from transformers.models.kimi_linear.modeling_kimi_linear import (
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)

import mate
from mate.backends import native
from mate.functional.reference import log_decay

D = 128
BEST = native.isa()
ISAS = [isa for isa in ("portable", "avx2", "avx512", "amx") if native.use_isa(isa)]
native.use_isa(BEST)


def on(isa: str | None) -> str:
    """The name of mate's path on an instruction set, given exactly what transformers gets."""
    return f"mate, {isa or 'pytorch'}"


THEIRS, STRICT = "transformers", on(BEST)
FUSED = f"{STRICT}, gate inside"
TOKENWISE_ISA = "avx512" if "avx512" in ISAS else BEST
TOKENWISE = f"token by token, {TOKENWISE_ISA}"

transformers_logging.set_verbosity_error()  # it warns that what is timed here is its slow path


@dataclass
class Case:
    """Inputs of one call [1, T, H, D]: as a layer has them, and with gate and beta worked out."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor
    dt_bias: Tensor
    lower_bound: float | None
    state: Tensor  # [1, H, K, V]

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
        return {**names, "state_v_first": False}

    def first(self, tokens: int) -> "Case":
        cut = (x[:, :tokens] for x in (self.q, self.k, self.v, self.g, self.beta))
        return Case(*cut, self.A_log, self.dt_bias, self.lower_bound, self.state)


def draw(
    tokens: int, heads: int, dtype: torch.dtype, gate: str = "bounded", regime: str = "remembering"
) -> Case:
    """Random inputs. forgetting: gates drawn as kernel benchmarks do, each token forgets e^-2.5 or
    so; remembering: gates as a layer initialises them, memory over thousands of tokens."""
    torch.manual_seed(0)
    shape = (1, tokens, heads, D)
    q, k, v, g = (torch.randn(shape) for _ in range(4))
    if regime == "forgetting":
        A_log, dt_bias = torch.rand(heads), torch.rand(heads, D)
    else:
        dt = torch.exp(torch.empty(heads, D).uniform_(-6.9, -2.3))  # 1e-3 to 1e-1
        A_log, dt_bias, g = torch.zeros(heads), dt + torch.log(-torch.expm1(-dt)), 0.5 * g
    beta, state = torch.randn(shape[:-1]), torch.randn(1, heads, D, D)
    streams = (x.to(dtype) for x in (q, k, v, g, beta))
    return Case(*streams, A_log, dt_bias, None if gate == "softplus" else -5.0, state)


def forced(isa: str | None, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call on one instruction set."""

    def run(**options: Any) -> Any:
        native.use_isa(isa)
        try:
            return call(**options)
        finally:
            native.use_isa(BEST)

    return run


def on_threads(count: int, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return run


def prefill_path(name: str, case: Case) -> Callable[..., Any]:
    if name == THEIRS:
        return partial(chunk_kimi_delta_attention, **case.theirs())
    kda = mate.recurrent_kda if name == TOKENWISE else mate.chunk_kda
    isa = TOKENWISE_ISA if name == TOKENWISE else {on(x): x for x in ISAS}.get(name, BEST)
    arguments = case.fused() if name == FUSED else case.strict()
    return forced(isa, partial(kda, **arguments, output_final_state=True))


def prefill_paths(case: Case) -> dict[str, Callable[[], Any]]:
    names = (THEIRS, TOKENWISE, *map(on, ISAS or [None]), FUSED)
    return {name: prefill_path(name, case) for name in names}


def decode_paths(case: Case) -> dict[str, Callable[[], Any]]:
    """mate updates the state in place, as its layer does; each path has a state of its own."""

    def in_place(arguments: dict[str, Any]) -> Callable[[], Any]:
        state = case.state.clone()
        arguments = {**arguments, "initial_state": state, "final_state": state}
        return partial(mate.recurrent_kda, **arguments, output_final_state=True)

    return {
        THEIRS: partial(recurrent_kimi_delta_attention, **case.theirs()),
        STRICT: in_place(case.strict()),
        FUSED: in_place(case.fused()),
    }
