"""Short convolution, gated norm and decode step through the C interface: every instruction set that
this machine can run, against float64. Tensors lie between guard bands, outputs are NaN before."""

import ctypes
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kda_cases import one_thread, rel_rms
from torch import Tensor

from mate.backends import native, native_layer
from mate.functional.reference import kda_reference

GUARD = 304  # elements: tensors without gaps start at multiples of 16 bytes
SENTINEL = 42.0
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {fp32: 1.5e-6, bf16: 2.5e-3, fp16: 4e-4}


def library() -> ctypes.CDLL:
    lib = native.library()
    assert not isinstance(lib, str), lib
    return lib


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    assert before
    if not native.use_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.use_isa(before)


@pytest.fixture(params=[1, 2, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Guarded:
    """Copies of tensors in the middle of larger buffers, whose edges are checked afterwards."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor, float]] = []

    def __call__(self, x: Tensor, fill: float = math.nan, gap: int = 0) -> Tensor:
        """``gap``: elements between rows of the last dimension."""
        rows = x.reshape(-1, x.shape[-1]).shape[0] if x.numel() else 0
        width = x.shape[-1] + gap
        buffer = x.new_full((rows * width + 2 * GUARD,), fill)
        inner = buffer[GUARD : GUARD + rows * width].view(*x.shape[:-1], width)[..., : x.shape[-1]]
        inner.copy_(x)
        self.buffers.append((buffer, inner, fill))
        return inner

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, gap: int = 0) -> Tensor:
        return self(torch.full(shape, math.nan, dtype=dtype), SENTINEL, gap)

    def check(self) -> None:
        for buffer, inner, fill in self.buffers:
            held = inner.clone()
            inner.fill_(fill)
            same = buffer.isnan() if math.isnan(fill) else buffer == fill
            assert same.all(), "written outside"
            inner.copy_(held)


# ---- short convolution --------------------------------------------------------------------------


@one_thread()
def conv_truth(x: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [T, C] to (y [T, C], final state [C, W]) in float64."""
    (channels, width), x = weight.shape, x.double()
    past = x.new_zeros(width, channels) if state is None else state.double().T
    seen = torch.cat([past, x])
    if not len(x):
        return x, seen[-width:].T
    y = F.conv1d(seen[1:].T[None], weight.double()[:, None], groups=channels)[0].T
    return y * torch.sigmoid(y), seen[-width:].T


def run_conv(
    x: Tensor, weight: Tensor, state: Tensor | None, cu: Tensor | None = None, gap: int = 0
) -> tuple[Tensor, Tensor]:
    guard = Guarded()
    count = x.shape[0] if cu is None else len(cu) - 1
    y = guard.empty(tuple(x.shape), x.dtype, gap)
    final = guard.empty((count, *weight.shape), x.dtype, gap)
    native_layer.short_conv(
        guard(x, gap=gap), guard(weight), None if state is None else guard(state, gap=gap),
        cu, y, final,
    )  # fmt: skip
    guard.check()
    return y, final


def check_conv(x: Tensor, weight: Tensor, state: Tensor | None, lens: list[int] | None) -> None:
    cu = None if lens is None else torch.tensor([0, *lens]).cumsum(0)
    for gap in (0, 5):
        y, final = run_conv(x, weight, state, cu, gap)
        documents = list(x) if lens is None else list(x[0].split(lens))
        results = list(y) if lens is None else list(y[0].split(lens))
        for n, (document, result) in enumerate(zip(documents, results, strict=True)):
            past = None if state is None else state[n]
            expected, window = conv_truth(document, weight, past)
            assert torch.equal(final[n].double(), window)
            assert rel_rms(result, expected) < ROUNDING[x.dtype]


@pytest.mark.parametrize("channels", [1, 6, 131, 300, 1100])
def test_convolutions_of_every_width(channels: int, isa: str) -> None:
    torch.manual_seed(channels)
    for width, length, has_state in itertools.product(
        range(1, 9), (0, 1, 2, 5, 17, 40), (False, True)
    ):
        x, weight = torch.randn(2, length, channels), torch.randn(channels, width)
        check_conv(x, weight, torch.randn(2, channels, width) if has_state else None, None)


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
@pytest.mark.parametrize("lens", [[3, 0, 1, 170, 2, 64, 65], [0, 0], [0], [1] * 40], ids=len)
def test_packed_convolutions(lens: list[int], dtype: torch.dtype, isa: str, threads: int) -> None:
    torch.manual_seed(0)
    for width, has_state in itertools.product((1, 4, 7), (False, True)):
        x, weight = torch.randn(1, sum(lens), 200).to(dtype), torch.randn(200, width)
        state = torch.randn(len(lens), 200, width).to(dtype) if has_state else None
        check_conv(x, weight, state, lens)


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
def test_convolutions_by_many_threads(dtype: torch.dtype, threads: int) -> None:
    x, weight = torch.randn(2, 333, 2100).to(dtype), torch.randn(2100, 4).to(dtype)
    check_conv(x, weight, torch.randn(2, 2100, 4).to(dtype), None)


def test_a_convolution_keeps_nan_in_its_document(isa: str) -> None:
    x, weight, state = torch.randn(1, 30, 20), torch.randn(20, 4), torch.randn(3, 20, 4)
    x[0, 10:20], state[1] = math.nan, math.nan
    y, final = run_conv(x, weight, state, torch.tensor([0, 10, 20, 30]))
    assert y[0, 10:20].isnan().all() and final[1].isnan().all()
    assert y[0, :10].isfinite().all() and y[0, 20:].isfinite().all()
    assert final[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "bounds", [[0, 40, 10, 1000, -5, 33], [-7, 5, 2, 20], [-(2**31), 2**31 - 1]], ids=str
)
def test_bounds_of_documents_are_clamped(bounds: list[int]) -> None:
    x, weight = torch.randn(1, 33, 20), torch.randn(20, 4)
    for dtype in (torch.int32, torch.int64):
        run_conv(x, weight, None, torch.tensor(bounds, dtype=dtype))  # nothing outside is touched


def test_unknown_widths_and_dtypes_are_refused() -> None:
    x, y = torch.randn(1, 5, 20), torch.full((1, 5, 20), SENTINEL)
    with pytest.raises(RuntimeError, match="unsupported"):
        native_layer.short_conv(x, torch.randn(20, 9), None, None, y, None)
    state = torch.randn(1, 20, 4, dtype=bf16)
    with pytest.raises(RuntimeError, match="unsupported"):
        native_layer.short_conv(x, torch.randn(20, 4), state, None, y, None)
    assert (y == SENTINEL).all()


# ---- gated norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 5, 64, 128, 131])
@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
def test_gated_norm(dtype: torch.dtype, dim: int, isa: str, threads: int) -> None:
    torch.manual_seed(dim)
    for shape, gap, scale in (((2, 3, 5), 0, 1.0), ((1, 70, 4), 3, 1e-3), ((0, 3, 5), 0, 1.0)):
        guard = Guarded()
        x = guard((torch.randn(*shape, dim) * scale).to(dtype), gap=gap)
        gate = guard(torch.randn(*shape, dim) * 3, gap=gap)
        weight = guard(torch.randn(dim).to(dtype))
        output = guard.empty((*shape, dim), dtype, gap)
        native_layer.gated_norm(x, gate, weight, 1e-5, output)
        guard.check()
        normed = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = normed * weight.double() * torch.sigmoid(gate.double())
        assert rel_rms(output, expected) < ROUNDING[dtype] if x.numel() else True


def test_gated_norm_keeps_nan_in_its_row(isa: str) -> None:
    x, gate = torch.randn(2, 1, 4, 3, 128)
    output = torch.empty_like(x)
    x[0, 1, 2], gate[0, 2, 0, 5] = math.nan, math.nan
    native_layer.gated_norm(x, gate, torch.randn(128), 1e-5, output)
    expected = torch.zeros(1, 4, 3, 128, dtype=torch.bool)
    expected[0, 1, 2], expected[0, 2, 0, 5] = True, True
    assert torch.equal(output.isnan(), expected)


# ---- decode step --------------------------------------------------------------------------------

ROWS = ("q", "k", "v", "g", "beta", "output_gate", "conv_state")
WEIGHTS = ("q_weight", "k_weight", "v_weight", "norm_weight")


def draw_step(
    batch: int = 2,
    heads: tuple[int, int] = (2, 2),
    width: int = 4,
    dtype: torch.dtype = fp32,
    state_dtype: torch.dtype = fp32,
    seed: int = 0,
) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    keys, values = heads[0] * 128, heads[1] * 128
    sizes = {"q": keys, "k": keys, "v": values, "g": values, "beta": heads[1]}
    t = {name: torch.randn(batch, n).to(dtype) for name, n in sizes.items()}
    t["output_gate"] = torch.randn(batch, values).to(dtype)
    t["conv_state"] = torch.randn(batch, 2 * keys + values, width).to(dtype)
    t["state"] = torch.randn(batch, heads[1], 128, 128).to(state_dtype)
    t |= {f"{s}_weight": torch.randn(n, width) for s, n in (("q", keys), ("k", keys))}
    t["v_weight"] = torch.randn(values, width).to(dtype)
    t["norm_weight"] = (torch.rand(128) + 0.5).to(dtype)
    return t | {"A_log": torch.rand(heads[1]), "dt_bias": torch.randn(values) - 2}


@one_thread()
def decode_truth(
    t: dict[str, Tensor], lower_bound: float | None, neg: bool, v_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, window and state in float64."""
    t = {name: x.double() for name, x in t.items()}
    new = torch.cat([t["q"], t["k"], t["v"]], dim=1)
    window = torch.cat([t["conv_state"][..., 1:], new[..., None]], dim=-1)
    weight = torch.cat([t["q_weight"], t["k_weight"], t["v_weight"]])
    y = (window * weight).sum(-1)
    y = y * torch.sigmoid(y)
    keys = t["q"].shape[1]
    q, k, v = (x.unflatten(-1, (1, -1, 128)) for x in y.split([keys, keys, len(t["v_weight"])], 1))
    o, state = kda_reference(
        q, k, v, t["g"].view(v.shape), t["beta"][:, None], initial_state=t["state"],
        A_log=t["A_log"], dt_bias=t["dt_bias"], lower_bound=lower_bound,
        allow_neg_eigval=neg, state_v_first=v_first,
    )  # fmt: skip
    o = o[:, 0] / (o[:, 0].pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * t["norm_weight"]
    return (o.flatten(1) * torch.sigmoid(t["output_gate"])), window, state


def run_step(
    t: dict[str, Tensor], lower_bound: float | None = None, neg: bool = False, v_first: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    guard = Guarded()
    t = {name: guard(x) for name, x in t.items()}
    output = guard.empty(tuple(t["v"].shape), t["v"].dtype)
    width = t["q_weight"].shape[1]
    rows = (*(t[name] for name in ROWS[:6]), output, t["conv_state"])
    native_layer.decode_step(
        rows, tuple(t[name] for name in WEIGHTS), t["state"], t["A_log"], t["dt_bias"],
        (t["q"].shape[1] // 128, t["v"].shape[1] // 128), width, 1e-5, lower_bound,
        native.NEG_EIGVAL * neg | native.STATE_V_FIRST * v_first,
    )  # fmt: skip
    guard.check()
    return output, t["conv_state"], t["state"]


def check_step(t: dict[str, Tensor], *options: Any) -> None:
    output, window, state = run_step(t, *options)
    expected, expected_window, expected_state = decode_truth(t, *options)
    assert torch.equal(window.double(), expected_window)
    assert rel_rms(output, expected) < 2 * ROUNDING[output.dtype]
    assert rel_rms(state, expected_state) < 2 * ROUNDING[state.dtype]


@pytest.mark.parametrize("v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize("width", range(1, 9))
def test_decode_of_every_width(width: int, v_first: bool, isa: str) -> None:
    for lower_bound, neg in ((None, False), (-5.0, True)):
        check_step(draw_step(width=width), lower_bound, neg, v_first)


@pytest.mark.parametrize("v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
@pytest.mark.parametrize("state_dtype", [fp32, bf16, fp16], ids=str)
def test_decode_dtypes(
    state_dtype: torch.dtype, dtype: torch.dtype, v_first: bool, isa: str
) -> None:
    check_step(draw_step(dtype=dtype, state_dtype=state_dtype), None, False, v_first)


@pytest.mark.parametrize("heads", [(1, 1), (1, 5), (2, 8), (16, 16), (4, 32)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_decode_heads_and_threads(batch: int, heads: tuple[int, int], threads: int) -> None:
    t = draw_step(batch, heads)
    if batch:
        check_step(t, None, False, True)
    else:
        assert run_step(t)[0].shape == (0, heads[1] * 128)


@pytest.mark.parametrize("v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize(
    "where", ["q", "k", "v", "g", "beta", "output_gate", "conv_state", "state"]
)
def test_decode_keeps_nan_in_its_row_and_head(where: str, v_first: bool, isa: str) -> None:
    t = draw_step(batch=3, heads=(3, 3))
    clean = run_step(t, None, False, v_first)
    if where == "conv_state":
        t[where].view(3, 3, 3, 128, 4)[1, 1, 1, :, 2] = math.nan  # row 1, k's window, head 1
    else:
        t[where].view(3, 3, -1)[1, 1] = math.nan
    output, window, state = run_step(t, None, False, v_first)
    others = torch.ones(3, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(output.view(3, 3, 128)[others], clean[0].view(3, 3, 128)[others])
    assert torch.equal(state[others], clean[2][others])
    assert output.view(3, 3, 128)[1, 1].isnan().all()
    assert window.isnan().sum() == (128 if where in ("q", "k", "v", "conv_state") else 0)


@pytest.mark.parametrize("arrivals", [1, 3, 50])
def test_decode_by_any_number_of_threads(arrivals: int) -> None:
    """Grouped heads, one thread after another: nobody waits for anybody."""
    body_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, body_type, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def in_turn(body: Any, arg: int, threads: int, flags: int) -> None:
        for _ in range(arrivals):
            body(arg)

    before = torch.get_num_threads()
    library().mate_cpu_set_parallel(ctypes.cast(in_turn, ctypes.c_void_p))
    try:
        torch.set_num_threads(4)
        check_step(draw_step(heads=(4, 32)), None, False, True)
    finally:
        torch.set_num_threads(before)
        run = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        library().mate_cpu_set_parallel(None if run is None else ctypes.cast(run, ctypes.c_void_p))
