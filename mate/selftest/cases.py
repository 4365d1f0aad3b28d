"""Small calls of every operator, each with its truth in float64 on the CPU."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mate.functional.gated_norm import gated_rms_norm
from mate.functional.kda import chunk_kda, recurrent_kda
from mate.functional.reference import kda_reference
from mate.functional.short_conv import short_conv
from mate.layers import KDACache, KimiDeltaAttention

fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
# relative RMS errors of output and state: the contract's table; of parts without products
OUTPUT = {fp16: 5e-3, bf16: 5e-3, fp32: 1e-5}
STATE = {fp16: 4e-3, bf16: 4e-3, fp32: 1e-5}
PLAIN = {fp16: 1e-3, bf16: 4e-3, fp32: 1e-5}
COPIED = 1e-12
LAYER = {bf16: 2e-2, fp32: 1e-5}  # products of whole rows in 16 bits come on top


class Outcome(NamedTuple):
    what: str
    error: float
    bound: float


@dataclass(frozen=True, slots=True)
class Case:
    operator: str
    name: str
    dtype: torch.dtype
    run: Callable[[torch.device], list[Outcome]]
    device: str | None = None  # only there
    dispatched: bool = True  # a backend takes it


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference by RMS of what is expected; NaN anywhere gives NaN."""
    if actual.shape != expected.shape:
        raise ValueError(f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    if not expected.numel():
        return 0.0
    expected = expected.double()
    error = (actual.cpu().double() - expected).square().mean().sqrt()
    return (error / expected.square().mean().sqrt().clamp_min(1e-300)).item()


# ---- the operator --------------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For the reference, whose steps are too small for a second thread to be worth waiting for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def drawn(
    dtype: torch.dtype,
    gate: str,
    lens: tuple[int, ...],
    heads: tuple[int, int] = (2, 2),
    state: torch.dtype | None = fp32,
    remembering: bool = False,
    v_first: bool = True,
) -> tuple[dict[str, Any], dict[str, Any], tuple[Tensor, Tensor]]:
    """A call's tensors, its options, and what it should give. More than one length: varlen."""
    draw = torch.Generator().manual_seed(sum(lens) + 31 * heads[1])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    T, (Hqk, Hv) = sum(lens), heads
    t: dict[str, Any] = {name: normal(1, T, Hqk, 128) for name in ("q", "k")}
    t |= {name: normal(1, T, Hv, 128) for name in ("v", "g")} | {"beta": normal(1, T, Hv)}
    options: dict[str, Any] = {"state_v_first": v_first}
    extra: dict[str, Tensor] = {}
    if gate == "log-decay":
        t["g"] = -t["g"].abs() * (1e-3 if remembering else 1.0)
        t["g"][:, ::7] -= 40.0 * (not remembering)
    else:
        extra["A_log"] = torch.linspace(-0.5, 0.5, Hv)  # every head its own
        extra["dt_bias"] = normal(Hv, 128) - (5.0 if remembering else 0.0)
        options["lower_bound"] = -5.0 if gate == "bounded" else None
    t = {name: x.to(dtype) for name, x in t.items()} | extra
    if len(lens) > 1:
        t["cu_seqlens"] = torch.tensor([0, *lens]).cumsum(0).int()
    if state is not None:
        rows = torch.linspace(0.1, 2.0, 128)[:, None]  # a transpose must show
        t["initial_state"] = (normal(len(lens), Hv, 128, 128) * rows).to(state)
    with one_thread():
        return t, options, kda_reference(**t, **options)


def _chunk(device: torch.device, arguments: dict[str, Any]) -> list[Outcome]:
    tensors, options, expected = drawn(**arguments)
    dtype = arguments["dtype"]
    t = {name: x.to(device) for name, x in tensors.items()}
    output, state = chunk_kda(**t, **options, output_final_state=True)
    state_bound = max(STATE[dtype], PLAIN[state.dtype])
    return [
        Outcome("output", relative_error(output, expected[0]), OUTPUT[dtype]),
        Outcome("final state", relative_error(state, expected[1]), state_bound),
    ]


def _recurrent(device: torch.device, arguments: dict[str, Any]) -> list[Outcome]:
    """With the state updated in place."""
    tensors, options, expected = drawn(**arguments)
    dtype = arguments["dtype"]
    t = {name: x.to(device) for name, x in tensors.items()}
    state = t["initial_state"].clone()
    t["initial_state"] = state
    output = recurrent_kda(**t, **options, final_state=state)
    assert isinstance(output, Tensor)
    return [
        Outcome("output", relative_error(output, expected[0]), OUTPUT[dtype]),
        Outcome("final state", relative_error(state, expected[1]), STATE[dtype]),
    ]


def _pooled(device: torch.device, arguments: dict[str, Any]) -> list[Outcome]:
    """From slots of a pool of NaN, with the state after each token."""
    tensors, options, expected = drawn(**arguments)
    dtype = arguments["dtype"]
    t = {name: x.to(device) for name, x in tensors.items()}
    documents = t["initial_state"].shape[0]
    slots = torch.arange(documents, 0, -1, device=device)
    pool = t["initial_state"].new_full((documents + 2, *expected[1].shape[1:]), torch.nan)
    pool[slots], t["initial_state"] = t["initial_state"], pool
    states = torch.full((*t["v"].shape, 128), torch.nan, device=device)
    output = recurrent_kda(
        **t, **options, final_state=pool, state_indices=slots, token_states=states
    )
    assert isinstance(output, Tensor)
    ends = [sum(arguments["lens"][: n + 1]) - 1 for n in range(documents)]
    written = not pool[[0, -1]].isnan().all()
    return [
        Outcome("output", relative_error(output, expected[0]), OUTPUT[dtype]),
        Outcome("final state", relative_error(pool[slots], expected[1]), STATE[dtype]),
        Outcome("token states", relative_error(states[0, ends], expected[1]), STATE[dtype]),
        Outcome("other slots", float(written), COPIED),
    ]


def _operator(run: Callable[..., list[Outcome]], name: str, **arguments: Any) -> Case:
    short = {fp16: "fp16", bf16: "bf16", fp32: "fp32"}
    lens = arguments["lens"]
    length = f"T{lens[0]}" if len(lens) == 1 else "varlen " + "-".join(map(str, lens))
    words = (short[arguments["dtype"]], arguments["gate"], length, name)
    operator = "chunk_kda" if run is _chunk else "recurrent_kda"
    return Case(
        operator,
        " ".join(filter(None, words)),
        arguments["dtype"],
        functools.partial(run, arguments=arguments),
    )


# ---- short convolution and gated norm ------------------------------------------------------------


@functools.cache
def _convolution(dtype: torch.dtype, lens: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """x [1, S, C], weight [C, 4], states; y and the last inputs, document by document."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, sum(lens), 96, generator=draw).to(dtype)
    weight = torch.randn(96, 4, generator=draw).to(dtype)
    state = torch.randn(len(lens), 96, 4, generator=draw).to(dtype)
    outputs, finals = [], []
    for document, past in zip(x[0].double().split(lens), state.double(), strict=True):
        seen = torch.cat([past, document.T], dim=1)
        y = F.conv1d(seen[None], weight.double()[:, None], groups=96)[0, :, 1:]
        outputs.append(F.silu(y).T)
        finals.append(seen[:, -4:])
    return [x, weight, state], [torch.cat(outputs)[None], torch.stack(finals)]


def _short_conv(device: torch.device, dtype: torch.dtype, lens: tuple[int, ...]) -> list[Outcome]:
    inputs, expected = _convolution(dtype, lens)
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0).to(device) if len(lens) > 1 else None
    x, weight, state = (x.to(device) for x in inputs)
    actual = short_conv(x, weight, state, cu_seqlens, output_final_state=True)
    assert actual[1] is not None
    return [
        Outcome("output", relative_error(actual[0], expected[0]), PLAIN[dtype]),
        Outcome("final state", relative_error(actual[1], expected[1]), COPIED),
    ]


def _gated_norm(device: torch.device, dtype: torch.dtype) -> list[Outcome]:
    draw = torch.Generator().manual_seed(2)
    x, gate = (torch.randn(3, 37, 128, generator=draw).to(dtype) for _ in range(2))
    weight = torch.rand(128, generator=draw).to(dtype)
    x64, gate64 = x.double(), gate.double()
    expected = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5)
    expected = expected * weight.double() * torch.sigmoid(gate64)
    actual = gated_rms_norm(x.to(device), gate.to(device), weight.to(device), 1e-5)
    return [Outcome("output", relative_error(actual, expected), PLAIN[dtype])]


# ---- the layer -----------------------------------------------------------------------------------


@functools.cache
def _layer(dtype: torch.dtype) -> tuple[KimiDeltaAttention, Tensor, Tensor]:
    """A layer, its input [T, hidden] and the output that it should give."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layer = KimiDeltaAttention(64, 2, num_v_heads=4, layer_idx=0, dtype=dtype)
        with torch.no_grad():
            for weight in layer.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
        x = torch.randn(20, 64).to(dtype)
    with one_thread():
        return layer, x, _layer_truth(layer, x.double())


def _layer_truth(layer: KimiDeltaAttention, x: Tensor) -> Tensor:
    """x [T, hidden] straight down, by no line of the layer's."""
    p = {name: weight.detach().double() for name, weight in layer.named_parameters()}
    streams = []
    for s in "qkv":
        taps = p[f"{s}_conv1d.weight"]
        padded = F.pad((x @ p[f"{s}_proj.weight"].T).T, (taps.shape[-1] - 1, 0))
        y = F.silu(F.conv1d(padded[None], taps, groups=taps.shape[0])[0].T)
        streams.append(y.unflatten(-1, (-1, 128))[None])
    g = (x @ p["f_a_proj.weight"].T @ p["f_b_proj.weight"].T).unflatten(-1, (-1, 128))
    q, k, v = streams
    o, _ = kda_reference(
        q,
        k,
        v,
        g[None],
        (x @ p["b_proj.weight"].T)[None],
        A_log=p["A_log"],
        dt_bias=p["dt_bias"],
        lower_bound=None,
    )
    gate = (x @ p["g_a_proj.weight"].T @ p["g_b_proj.weight"].T).unflatten(-1, (-1, 128))
    normed = o[0] * torch.rsqrt(o[0].square().mean(-1, keepdim=True) + layer.o_norm.eps)
    mixed = normed * p["o_norm.weight"] * torch.sigmoid(gate)
    return mixed.flatten(-2) @ p["o_proj.weight"].T


def _prefill_and_decode(device: torch.device, dtype: torch.dtype) -> list[Outcome]:
    layer, x, expected = _layer(dtype)
    copy = KimiDeltaAttention(64, 2, num_v_heads=4, layer_idx=0, dtype=dtype)
    copy.load_state_dict(layer.state_dict())
    copy, cache = copy.to(device), KDACache()
    parts = [copy(part.to(device)[None], cache=cache) for part in x.split([17, 1, 1, 1])]
    return [
        Outcome("prefill", relative_error(parts[0][0], expected[:17]), LAYER[dtype]),
        Outcome("decode", relative_error(torch.cat(parts[1:], 1)[0], expected[17:]), LAYER[dtype]),
    ]


CASES = [
    _operator(_chunk, "", dtype=bf16, gate="bounded", lens=(150,)),
    _operator(_chunk, "", dtype=fp16, gate="bounded", lens=(65,)),
    _operator(_chunk, "", dtype=fp32, gate="bounded", lens=(65,)),
    _operator(_chunk, "heads 2:6", dtype=bf16, gate="softplus", lens=(67,), heads=(2, 6)),
    _operator(_chunk, "", dtype=bf16, gate="log-decay", lens=(130,)),
    _operator(_chunk, "", dtype=fp16, gate="log-decay", lens=(33,)),
    _operator(_chunk, "", dtype=bf16, gate="softplus", lens=(5, 0, 70, 1)),
    _operator(_chunk, "key-first", dtype=fp16, gate="bounded", lens=(0, 64, 9), v_first=False),
    _operator(_chunk, "bf16 state", dtype=bf16, gate="bounded", lens=(1,), state=bf16),
    _operator(_chunk, "no state", dtype=bf16, gate="softplus", lens=(63,), state=None),
    _operator(
        _chunk, "1 head", dtype=bf16, gate="softplus", lens=(1000,), heads=(1, 1), remembering=True
    ),
    _operator(_recurrent, "", dtype=bf16, gate="bounded", lens=(1,)),
    _operator(_recurrent, "", dtype=fp16, gate="softplus", lens=(3,)),
    _operator(_recurrent, "", dtype=fp32, gate="log-decay", lens=(5,)),
    _operator(_recurrent, "heads 1:4", dtype=bf16, gate="softplus", lens=(1, 0, 4), heads=(1, 4)),
    _operator(_pooled, "pool", dtype=bf16, gate="softplus", lens=(2, 1, 3)),
    *(
        Case(
            "short_conv",
            name,
            dtype,
            functools.partial(_short_conv, dtype=dtype, lens=lens),
            dispatched=False,
        )
        for name, dtype, lens in (
            ("bf16 T37", bf16, (37,)),
            ("fp16 varlen 5-0-2-30", fp16, (5, 0, 2, 30)),
            ("fp32 varlen 5-0-2-30", fp32, (5, 0, 2, 30)),
        )
    ),
    *(
        Case(
            "gated_norm",
            name,
            dtype,
            functools.partial(_gated_norm, dtype=dtype),
            dispatched=False,
        )
        for name, dtype in (("bf16", bf16), ("fp16", fp16), ("fp32", fp32))
    ),
    Case(
        "layer",
        "bf16 prefill and decode",
        bf16,
        functools.partial(_prefill_and_decode, dtype=bf16),
    ),
    # GPUs may multiply fp32 matrices in fewer bits, by a setting that is not mate's.
    Case(
        "layer",
        "fp32 prefill and decode",
        fp32,
        functools.partial(_prefill_and_decode, dtype=fp32),
        device="cpu",
    ),
]
