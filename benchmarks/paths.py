"""What the benchmarks time: calls of mate and of transformers on the same random inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import Case
from transformers import logging as transformers_logging
from transformers.models.kimi_linear.modeling_kimi_linear import (
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)

import mate
from mate.backends import native

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
