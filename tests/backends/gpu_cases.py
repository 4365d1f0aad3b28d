"""Calls for the GPU kernels, real and emulated: a small one for every feature."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from kda_cases import BOUNDS, Case, draw
from torch import Tensor

bf16, fp16 = torch.bfloat16, torch.float16
BOUND = BOUNDS[bf16][:2]  # output, final state: the contract's
# and its exceptions for keys that are nearly alike
CORRELATED = {
    "cosine-0.75": (8e-3, 8e-3),
    "cosine-0.9": (1e-2, 1e-2),
    "cosine-0.99": (2.5e-2, 2.5e-2),
}
LOGITS = {"cosine-0.75": 2.94, "cosine-0.9": 3.89, "cosine-0.99": 6.2}  # b = 0.95, 0.98, 0.998


def _with(case: Case, **dtypes: torch.dtype) -> Case:
    case.tensors |= {name: case.tensors[name].to(dtype) for name, dtype in dtypes.items()}
    return case


def _raw_keys(T: int = 80) -> Case:
    """q, k and beta as they enter the recurrence."""
    options = {"use_qk_l2norm_in_kernel": False, "use_beta_sigmoid_in_kernel": False}
    case = draw(T=T, dtype=bf16, **options)
    for name in ("q", "k"):
        case.tensors[name] *= 0.08
    case.tensors["beta"] = torch.rand_like(case.tensors["beta"])
    return case


def _correlated(name: str) -> Case:
    cosine = float(name.removeprefix("cosine-"))
    case = draw(
        T=600, Hqk=1, Hv=1, gate="softplus", regime="remembering", cosine=cosine, dtype=bf16
    )
    case.tensors["beta"].fill_(LOGITS[name])
    return case


def _neutral_tokens(T: int = 80) -> Case:
    """g = -inf in a gated call and beta = -inf change nothing."""
    case = draw(T=T, dtype=bf16)
    case.tensors["g"][:, 20:30] = -torch.inf
    case.tensors["beta"][:, 20:30] = -torch.inf
    return case


def _nothing_written(T: int, rate: float, dtype: torch.dtype = torch.float32) -> Case:
    """A state that only decays, by 40 to 60 bits: rounding of its decays must not add up."""
    case = draw(T=T, Hqk=1, Hv=1, gate="log", dtype=bf16)
    rates = rate * torch.linspace(1, 1.02, 128)
    case.tensors["g"] = -rates.expand_as(case.tensors["g"]).to(dtype).contiguous()
    case.tensors["beta"].fill_(-torch.inf)
    return case


def _deep_bound(bound: float) -> Case:
    """Of gates that stay far above it, and a token that does not."""
    case = draw(T=80, lower_bound=bound, dtype=bf16)
    case.tensors["g"] -= math.log(-3 * bound)
    case.tensors["g"][:, 33] = 9.0
    return case


def _zero_rows(T: int = 70) -> Case:
    case = draw(T=T, dtype=bf16)
    for name in ("q", "k"):
        case.tensors[name][:, 3:5] = 0
    return case


def _int32(case: Case) -> Case:
    return _with(case, cu_seqlens=torch.int32)


CASES: dict[str, Callable[[], Case]] = {
    **{f"T{T}": functools.partial(draw, T=T, dtype=bf16) for T in (0, 1, 63, 64, 65, 150)},
    **{
        f"{gate}-{regime}": functools.partial(draw, T=130, gate=gate, regime=regime, dtype=bf16)
        for gate in ("bounded", "softplus", "log")
        for regime in ("forgetting", "remembering", "strong", "mixed")
    },
    "log-erasing": lambda: draw(T=130, gate="log", regime="erasing", dtype=bf16),
    **{name: functools.partial(_correlated, name) for name in CORRELATED},
    "long": lambda: draw(T=1000, Hqk=1, Hv=1, gate="softplus", regime="remembering", dtype=bf16),
    "fp16": lambda: draw(T=130, dtype=fp16),
    "fp16-log-erasing": lambda: draw(T=130, gate="log", regime="erasing", dtype=fp16),
    "fp32-gate-and-beta": lambda: _with(
        draw(T=80, dtype=bf16), g=torch.float32, beta=torch.float32
    ),
    "batch": lambda: draw(B=3, T=75, dtype=bf16),
    "one-head": lambda: draw(T=400, Hqk=1, Hv=1, dtype=bf16),
    "grouped": lambda: draw(T=80, Hqk=2, Hv=6, dtype=bf16),
    "no-initial-state": lambda: draw(T=80, state=False, dtype=bf16),
    "key-first": lambda: draw(T=80, state_v_first=False, dtype=bf16),
    "bf16-state": lambda: _with(draw(T=80, dtype=bf16), initial_state=bf16),
    "bf16-key-first": lambda: _with(
        draw(T=80, dtype=bf16, state_v_first=False), initial_state=bf16
    ),
    "fp16-state": lambda: _with(draw(T=80, dtype=fp16), initial_state=fp16),
    "scale": lambda: draw(T=40, scale=0.3, dtype=bf16),
    "lower-bound-40": lambda: draw(T=80, lower_bound=-40.0, dtype=bf16),
    "lower-bound-1000": lambda: _deep_bound(-1000.0),
    "negative-eigenvalues": lambda: draw(T=80, allow_neg_eigval=True, dtype=bf16),
    "no-l2norm-no-sigmoid": _raw_keys,
    "neutral-tokens": _neutral_tokens,
    "zero-rows": _zero_rows,
    "nothing-written": lambda: _nothing_written(2000, 0.02),
    "nothing-written-strong": lambda: _nothing_written(40, 1.0, bf16),
    # just above a power of two, where fp16 rounds most
    "nothing-written-rounded": lambda: _nothing_written(58, math.log(2) * (1 + 0.99 * 2**-11)),
    "varlen": lambda: draw(lens=[5, 0, 70, 1, 0, 129, 0], dtype=bf16),
    "varlen-int32-fp16": lambda: _int32(draw(lens=[0, 3, 66, 13], dtype=fp16, state_v_first=False)),
}


@functools.cache
def built(name: str) -> tuple[Case, tuple[Tensor, Tensor]]:
    """A case with its expected output and final state; not to be changed."""
    case = CASES[name]()
    return case, case.reference()


def _few(**options: Any) -> Case:
    return draw(**{"T": 5, "dtype": bf16} | options)


def _states(dtype: torch.dtype, **options: Any) -> Case:
    return _with(_few(dtype=fp16 if dtype == fp16 else bf16, **options), initial_state=dtype)


# Calls of the recurrence token by token.
RECURRENT: dict[str, Callable[[], Case]] = {
    **{f"T{T}": functools.partial(_few, T=T) for T in (0, 1, 3, 4, 8, 17, 40)},
    **{
        f"{gate}-{regime}": functools.partial(_few, gate=gate, regime=regime)
        for gate in ("bounded", "softplus", "log")
        for regime in ("forgetting", "remembering", "strong", "mixed")
    },
    "log-erasing": lambda: _few(gate="log", regime="erasing"),
    "fp16": lambda: _few(dtype=fp16),
    "fp32": lambda: _few(dtype=torch.float32),
    "fp32-softplus": lambda: _few(T=40, dtype=torch.float32, gate="softplus", regime="remembering"),
    "fp32-cosine": lambda: _few(T=40, dtype=torch.float32, gate="log", cosine=0.99),
    "fp32-grouped-key-first": lambda: _few(dtype=torch.float32, Hv=4, state_v_first=False),
    "fp32-gate-and-beta": lambda: _with(_few(), g=torch.float32, beta=torch.float32),
    "batch": lambda: _few(B=3),
    "one-head": lambda: _few(Hqk=1, Hv=1),
    "grouped": lambda: _few(Hqk=2, Hv=6),
    "no-initial-state": lambda: _few(state=False),
    **{
        f"{str(dtype).removeprefix('torch.')}-state-{name}": functools.partial(
            _states, dtype, Hqk=1, Hv=heads, state_v_first=name == "value-first"
        )
        for dtype, heads in ((torch.float32, 3), (bf16, 5), (fp16, 2))
        for name in ("value-first", "key-first")
    },
    "barriers": lambda: _few(T=14, Hqk=1, Hv=1, gate="log", regime="remembering"),
    "scale": lambda: _few(scale=0.3),
    "lower-bound-40": lambda: _few(lower_bound=-40.0),
    "negative-eigenvalues": lambda: _few(allow_neg_eigval=True),
    "no-l2norm-no-sigmoid": lambda: _raw_keys(9),
    "neutral-tokens": lambda: _neutral_tokens(40),
    "zero-rows": lambda: _zero_rows(9),
    "varlen": lambda: _few(lens=[5, 0, 7, 1, 0, 19, 0]),
    "varlen-int32-fp16": lambda: _int32(_few(lens=[0, 3, 6], dtype=fp16, state_v_first=False)),
}


@functools.cache
def built_recurrent(name: str) -> tuple[Case, tuple[Tensor, Tensor]]:
    case = RECURRENT[name]()
    return case, case.reference()


def _one_head(T: int, regime: str, **options: Any) -> Case:
    options = {"Hqk": 1, "Hv": 1, "gate": "softplus", "dtype": bf16} | options
    return draw(T=T, regime=regime, **options)


def _changing(T: int, first: str, second: str) -> Case:
    """Gates of one regime in a sequence's first half, of another in its second."""
    halves = [_one_head(T // 2, regime, gate="log") for regime in (first, second)]
    tensors = dict(halves[0].tensors)
    for name in ("q", "k", "v", "g", "beta"):
        tensors[name] = torch.cat([half.tensors[name] for half in halves], dim=1)
    return Case(tensors, halves[0].options)


def _growing(T: int) -> Case:
    """Raw keys with |k|^2 b up to 3: the map of a token doubles what lies along its key."""
    options = {"use_qk_l2norm_in_kernel": False, "use_beta_sigmoid_in_kernel": False}
    case = _one_head(T, "remembering", gate="log", **options)
    for name in ("q", "k"):
        x = case.tensors[name]
        case.tensors[name] = x / x.float().norm(dim=-1, keepdim=True).to(bf16)
    case.tensors["beta"] = 0.5 * torch.rand_like(case.tensors["beta"])
    case.tensors["beta"][:, ::61] = 3.0
    return case


def _varlen(T: int) -> Case:
    """Sequences of none, one and many segments."""
    lens = [0, T, 3, T // 9, 0, T, 1]
    return _one_head(0, "remembering", lens=lens)


# Sequences that segments are made of, by their length.
LONG: dict[str, Callable[[int], Case]] = {
    **{
        regime: functools.partial(_one_head, regime=regime)
        for regime in ("forgetting", "remembering", "mixed")
    },
    "log": lambda T: _one_head(T, "remembering", gate="log"),
    "heads": lambda T: _one_head(T, "forgetting", gate="log", Hqk=3, Hv=3),  # from -0.1 to -1.5
    "remembering-then-forgetting": lambda T: _changing(T, "remembering", "strong"),
    "forgetting-then-remembering": lambda T: _changing(T, "strong", "remembering"),
    "erasing": lambda T: _changing(T, "erasing", "remembering"),
    "negative-eigenvalues": lambda T: _one_head(T, "remembering", allow_neg_eigval=True),
    "growing": _growing,
    "key-first": lambda T: _one_head(T, "remembering", state_v_first=False),
    "bf16-state": lambda T: _with(_one_head(T, "remembering"), initial_state=bf16),
    "fp16-state-key-first": lambda T: _with(
        _one_head(T, "remembering", dtype=fp16, state_v_first=False), initial_state=fp16
    ),
    "varlen": _varlen,
    "batch": lambda T: _one_head(T, "remembering", B=2),
}
