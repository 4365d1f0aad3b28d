"""The recurrence token by token, the decode step, short convolution and gated norm: on an emulated
GPU, and the same tests on a real one where there is one."""

import functools
import itertools
import math
from typing import Any

import gpu_host
import pytest
import torch
from gpu_cases import RECURRENT, built_recurrent
from gpu_host import SENTINEL, call_of, guarded, run_guarded
from gpu_machines import Cuda, Emulated
from kda_cases import BOUNDS, Case, draw, one_thread, rel_rms
from test_native_layer import (
    ROUNDING,
    ROWS,
    WEIGHTS,
    Guarded,
    check_conv,
    check_step,
    decode_truth,
    draw_step,
    run_conv,
    run_step,
)
from torch import Tensor

import mate
from mate.backends import native, native_layer
from mate.functional import kda_reference
from mate.functional.decode_step import kda_decode_step
from mate.functional.gated_norm import gated_rms_norm
from mate.functional.short_conv import short_conv

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch finds no CUDA device on this machine"
)
Machine = Emulated | Cuda


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=needs_gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    torch.set_num_threads(1)
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    choice = mate.backend_for("cuda", fp32, recurrent=True)
    assert choice.name == "native", choice.refusals
    return Cuda()


def run(machine: Machine, case: Case, shift: int = 0, final_state: bool = True) -> tuple:
    def forward(t: dict[str, Tensor], output: Tensor, final: Tensor | None) -> None:
        machine.forward(call_of(t, case.options, recurrent=True), output, final)

    return run_guarded(forward, case, shift, final_state)


def check(actual: tuple, expected: tuple, case: Case) -> None:
    bound = BOUNDS[case.tensors["q"].dtype]
    assert rel_rms(actual[0], expected[0]) <= bound[0]
    assert rel_rms(actual[1], expected[1]) <= (bound[1] if actual[1].dtype == fp32 else 4e-3)


# ---- the recurrence -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT)
def test_matches_the_recurrence(name: str, machine: Machine) -> None:
    case, expected = built_recurrent(name)
    actual = run(machine, case)
    check(actual, expected, case)
    for shift in (1, 4):  # not at multiples of 16 bytes: element by element
        shifted = run(machine, case, shift)
        assert all(torch.equal(a, b) for a, b in zip(actual, shifted, strict=True))


@pytest.mark.parametrize("heads", [1, 3, 140])
def test_slices_of_value_channels(heads: int, machine: Machine) -> None:
    """Few heads are cut into more blocks; 140 are many on a real GPU, 3 with a batch of 2 here."""
    if heads == 140 and isinstance(machine, Emulated):
        pytest.skip("for a real GPU")
    for v_first, dtype in itertools.product((True, False), (fp32, bf16)):
        case = draw(B=2, T=6, Hqk=1, Hv=heads, dtype=bf16, state_v_first=v_first)
        case.tensors["initial_state"] = case.tensors["initial_state"].to(dtype)
        check(run(machine, case), case.reference(), case)


def test_without_states(machine: Machine) -> None:
    case = draw(lens=[7, 0, 5], state=False, dtype=bf16)
    expected = case.reference()
    check(run(machine, case), expected, case)
    output, untouched = run(machine, case, final_state=False)
    assert rel_rms(output, expected[0]) <= BOUNDS[bf16][0]
    assert untouched.isnan().all()


@pytest.mark.parametrize("state_v_first", [True, False], ids=["value-first", "key-first"])
def test_state_in_place(state_v_first: bool, machine: Machine) -> None:
    case = draw(lens=[7, 0, 2], dtype=bf16, state_v_first=state_v_first)
    expected = case.reference()
    state = case.tensors["initial_state"]
    output = torch.full_like(case.tensors["v"], math.nan)
    machine.forward(call_of(case.tensors, case.options, recurrent=True), output, state)
    check((output, state), expected, case)


@pytest.mark.parametrize("width", [3 * 128, 3 * 128 + 8, 3 * 128 + 1], ids=str)
def test_views(width: int, machine: Machine) -> None:
    """q, k and v of one projection; states with gaps."""
    case = draw(T=9, dtype=bf16)
    expected = case.reference()
    t = dict(case.tensors)
    fused = torch.full((1, 9, 2, width), math.nan, dtype=bf16)
    for i, name in enumerate("qkv"):
        t[name] = fused[..., i * 128 : i * 128 + 128].copy_(t[name])
    rooms = [torch.full((1, 2, 130, width - 250), math.nan) for _ in range(2)]
    states = [room[:, :, 1:129, 2:130] for room in rooms]
    t["initial_state"] = states[0].copy_(t["initial_state"])
    output = torch.full((1, 9, 2, width), math.nan, dtype=bf16)[..., 128:256]
    machine.forward(call_of(t, case.options, recurrent=True), output, states[1])
    check((output, states[1]), expected, case)
    assert rooms[1].isfinite().sum() == states[1].numel()


def pool_of(case: Case, indices: list[int], count: int) -> tuple[Tensor, tuple, Tensor]:
    """A pool that holds the case's states at indices, what the call shall give, and the pool then.

    The case starts from zeros where the index is outside of the pool.
    """
    state = case.tensors["initial_state"]
    pool = torch.randn(count, *state.shape[1:]).to(state.dtype)
    inside = [n for n, i in enumerate(indices) if 0 <= i < count]
    for n, i in enumerate(indices):
        if n in inside:
            pool[i] = state[n]
        else:
            state[n] = 0
    output, final = case.reference()
    after = pool.double()
    for n in inside:
        after[indices[n]] = final[n]
    return pool, (output, final), after


@pytest.mark.parametrize("state_v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("lens", [None, [3, 0, 6, 2, 1]], ids=["dense", "varlen"])
@pytest.mark.parametrize("recurrent", [True, False], ids=["recurrent", "chunked"])
def test_a_pool_of_states(
    recurrent: bool,
    lens: list[int] | None,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    state_v_first: bool,
    machine: Machine,
) -> None:
    case = draw(B=5, T=3, lens=lens, Hqk=1, dtype=bf16, state_v_first=state_v_first)
    case.tensors["initial_state"] = case.tensors["initial_state"].to(dtype)
    indices = [6, -1, 2, 7, 0]  # 7 is outside too
    pool, expected, after = pool_of(case, indices, 7)
    before = pool.clone()
    t = case.tensors | {"initial_state": guarded(pool)[0]}
    output, buffer = guarded(torch.full_like(t["v"], math.nan), SENTINEL)
    more = {"state_indices": torch.tensor(indices, dtype=index_dtype)}
    call = call_of(t, case.options, recurrent, **more)
    machine.forward(call, output, t["initial_state"])
    assert (buffer == SENTINEL).sum() == 2 * gpu_host.GUARD
    check((output, t["initial_state"]), (expected[0], after), case)
    for i in (1, 3, 4, 5):
        assert torch.equal(t["initial_state"][i], before[i])

    new = torch.full_like(pool, math.nan)  # from one pool into another
    call.initial_state = guarded(before)[0]
    machine.forward(call, output, new)
    assert rel_rms(output, expected[0]) <= BOUNDS[bf16][0]
    for n, i in ((0, 6), (2, 2), (4, 0)):
        assert rel_rms(new[i], expected[1][n]) <= 4e-3
    assert new[[1, 3, 4, 5]].isnan().all()


@pytest.mark.parametrize("state_v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_states_after_each_token(dtype: torch.dtype, state_v_first: bool, machine: Machine) -> None:
    case = draw(B=2, T=6, Hv=4, dtype=bf16, state_v_first=state_v_first)
    case.tensors["initial_state"] = case.tensors["initial_state"].to(dtype)
    shape = (2, 6, 4, 128, 128)
    states, buffer = guarded(torch.full(shape, math.nan, dtype=dtype), SENTINEL)
    output = torch.full_like(case.tensors["v"], math.nan)
    call = call_of(case.tensors, case.options, recurrent=True, token_states=states)
    machine.forward(call, output, None)
    assert (buffer == SENTINEL).sum() == 2 * gpu_host.GUARD
    kwargs = case.kwargs()
    with one_thread():
        for n in range(1, 7):
            cut = {x: kwargs[x][:, :n] for x in ("q", "k", "v", "g", "beta")}
            expected = kda_reference(**kwargs | cut)
            assert rel_rms(states[:, n - 1], expected[1]) <= 4e-3
    assert rel_rms(output, expected[0]) <= BOUNDS[bf16][0]


@pytest.mark.parametrize("gate", ["softplus", "log"])
def test_hundreds_of_steps_in_place(gate: str, machine: Machine) -> None:
    """One token a call, and no drift: gates that remember, fp32."""
    steps = 300 if isinstance(machine, Emulated) else 1000
    case = draw(T=steps, Hqk=1, Hv=1, gate=gate, regime="remembering")
    expected = case.reference()
    t = dict(case.tensors)
    state, output = t["initial_state"], torch.full_like(t["v"], math.nan)
    for n in range(steps):
        cut = {x: t[x][:, n : n + 1] for x in ("q", "k", "v", "g", "beta")}
        call = call_of(t | cut, case.options, recurrent=True)
        machine.forward(call, output[:, n : n + 1], state)
    check((output, state), expected, case)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("values", "safe"),
    [
        ([0, 1000], [0, 9]),
        ([-7, 5, 9], [0, 5, 9]),
        ([5, 9], [5, 9]),
        ([7, 3], [7, 7]),
        ([-(2**31), 2**31 - 1], [0, 9]),
    ],
    ids=["beyond-the-end", "negative", "late-start", "decreasing", "extremes"],
)
def test_cu_seqlens_are_clamped(
    values: list[int], safe: list[int], dtype: torch.dtype, machine: Machine
) -> None:
    case = draw(T=9, state=False, dtype=bf16)
    case.tensors["cu_seqlens"] = torch.tensor(values, dtype=dtype)
    output, final = run(machine, case)
    expected, state = kda_reference(**{**case.kwargs(), "cu_seqlens": torch.tensor(safe)})
    check((output[:, safe[0] : safe[-1]], final), (expected, state), case)
    assert output[:, : safe[0]].isnan().all() and output[:, safe[-1] :].isnan().all()


@pytest.mark.parametrize("where", ["q", "k", "v", "g", "beta", "initial_state"])
def test_nan_stays_in_its_sequence_and_head(where: str, machine: Machine) -> None:
    case = draw(lens=[7, 8, 9], Hqk=3, Hv=3, dtype=bf16)
    clean = run(machine, case)
    x = case.tensors[where]
    if where == "initial_state":
        x[1, 1] = math.nan
    else:
        x[:, 7:15, 1] = math.nan
    output, final = run(machine, case)
    tokens, states = torch.ones(24, 3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)
    tokens[7:15, 1] = states[1, 1] = False
    assert torch.equal(output[0][tokens], clean[0][0][tokens])
    assert torch.equal(final[states], clean[1][states])
    assert output[0, 7:15, 1].isnan().all()


def test_states_of_two_dtypes_are_refused(machine: Machine) -> None:
    case = draw(T=2, dtype=bf16)
    output, final = torch.zeros_like(case.tensors["v"]), torch.zeros(1, 2, 128, 128, dtype=bf16)
    with pytest.raises(RuntimeError, match="unsupported"):
        machine.forward(call_of(case.tensors, {}, recurrent=True), output, final)
    assert not output.any()


# ---- the decode step ----------------------------------------------------------------------------


@pytest.mark.parametrize("v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize("width", range(1, 9))
def test_decode_of_every_width(width: int, v_first: bool, machine: Machine) -> None:
    with machine.layer():
        for lower_bound, neg in ((None, False), (-5.0, True)):
            check_step(draw_step(width=width, heads=(1, 1)), lower_bound, neg, v_first)


@pytest.mark.parametrize("v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
@pytest.mark.parametrize("state_dtype", [fp32, bf16, fp16], ids=str)
def test_decode_dtypes(
    state_dtype: torch.dtype, dtype: torch.dtype, v_first: bool, machine: Machine
) -> None:
    with machine.layer():
        t = draw_step(heads=(1, 1), dtype=dtype, state_dtype=state_dtype)
        check_step(t, None, False, v_first)


@pytest.mark.parametrize("heads", [(1, 2), (2, 6), (3, 3)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_decode_heads(batch: int, heads: tuple[int, int], machine: Machine) -> None:
    t = draw_step(batch, heads)
    with machine.layer():
        if batch:
            check_step(t, None, False, True)
        else:
            assert run_step(t)[0].shape == (0, heads[1] * 128)


@pytest.mark.parametrize("heads", [(2, 2), (1, 2)], ids=["ungrouped", "grouped"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_decode_from_pools(
    index_dtype: torch.dtype, heads: tuple[int, int], machine: Machine
) -> None:
    """Both states by index; padding rows are computed from zeros and store nothing."""
    t = draw_step(4, heads, dtype=bf16)
    indices, count = [5, -1, 0, 6], 6
    pools = {name: torch.randn(count, *t[name].shape[1:]).to(t[name].dtype)
             for name in ("conv_state", "state")}  # fmt: skip
    for name, pool in pools.items():
        for n, i in enumerate(indices):
            if 0 <= i < count:
                pool[i] = t[name][n]
            else:
                t[name][n] = 0
    expected = decode_truth(t, None, False, True)
    before = {name: pool.clone() for name, pool in pools.items()}
    guard = Guarded()
    t = {name: guard(x) for name, x in (t | pools).items()}
    output = guard.empty(tuple(t["v"].shape), bf16)
    with machine.layer():
        native_layer.decode_step(
            (*(t[name] for name in ROWS[:6]), output, t["conv_state"]),
            tuple(t[name] for name in WEIGHTS), t["state"], t["A_log"], t["dt_bias"],
            heads, 4, 1e-5, None, native.STATE_V_FIRST,
            torch.tensor(indices, dtype=index_dtype),
        )  # fmt: skip
    guard.check()
    assert rel_rms(output, expected[0]) < 2 * ROUNDING[bf16]
    for n, i in ((0, 5), (2, 0)):
        assert torch.equal(t["conv_state"][i].double(), expected[1][n])
        assert rel_rms(t["state"][i], expected[2][n]) < 1e-5
    for name, pool in before.items():
        assert torch.equal(t[name][1:5], pool[1:5])


@pytest.mark.parametrize(
    "where", ["q", "k", "v", "g", "beta", "output_gate", "conv_state", "state"]
)
def test_decode_keeps_nan_in_its_row_and_head(where: str, machine: Machine) -> None:
    t = draw_step(batch=2, heads=(3, 3))
    with machine.layer():
        clean = run_step(t, None, False, True)
        if where == "conv_state":
            t[where].view(2, 3, 3, 128, 4)[1, 1, 1, :, 2] = math.nan  # row 1, k's window, head 1
        else:
            t[where].view(2, 3, -1)[1, 1] = math.nan
        output, _, state = run_step(t, None, False, True)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(output.view(2, 3, 128)[others], clean[0].view(2, 3, 128)[others])
    assert torch.equal(state[others], clean[2][others])
    assert output.view(2, 3, 128)[1, 1].isnan().all()


def test_hundreds_of_decode_steps(machine: Machine) -> None:
    steps = 300 if isinstance(machine, Emulated) else 1000
    t = draw_step(1, (1, 1))
    t["dt_bias"] -= 4  # remembers
    names = (*ROWS[:6], "conv_state", "state")
    exact = {name: x.double() for name, x in t.items()}
    errors, sizes = 0.0, 0.0
    with machine.layer():
        for n in range(steps):
            fresh = draw_step(1, (1, 1), seed=n)
            for name in ROWS[:6]:
                t[name] = exact[name] = fresh[name]
            expected, exact["conv_state"], exact["state"] = decode_truth(exact, None, False, True)
            output, t["conv_state"], t["state"] = run_step({x: t[x] for x in (*names, *WEIGHTS,
                                                            "A_log", "dt_bias")})  # fmt: skip
            errors += (output - expected).square().sum().item()
            sizes += expected.square().sum().item()
    assert (errors / sizes) ** 0.5 < 1e-5
    assert rel_rms(t["state"], exact["state"]) < 1e-5


# ---- short convolution --------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 6, 136, 1100])
def test_convolutions_of_every_width(channels: int, machine: Machine) -> None:
    torch.manual_seed(channels)
    with machine.layer():
        for width, length, has_state in itertools.product(
            (1, 3, 4, 8), (0, 1, 2, 5, 40), (False, True)
        ):
            x, weight = torch.randn(2, length, channels), torch.randn(channels, width)
            check_conv(x, weight, torch.randn(2, channels, width) if has_state else None, None)


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
@pytest.mark.parametrize("lens", [[3, 0, 1, 70, 2, 64, 65], [0, 0], [0], [1] * 40], ids=len)
def test_packed_convolutions(lens: list[int], dtype: torch.dtype, machine: Machine) -> None:
    torch.manual_seed(0)
    with machine.layer():
        for width, has_state in itertools.product((1, 4, 7), (False, True)):
            x, weight = torch.randn(1, sum(lens), 200).to(dtype), torch.randn(200, width)
            state = torch.randn(len(lens), 200, width).to(dtype) if has_state else None
            check_conv(x, weight.to(dtype) if has_state else weight, state, lens)


@pytest.mark.parametrize(
    "bounds", [[0, 40, 10, 1000, -5, 33], [-7, 5, 2, 20], [-(2**31), 2**31 - 1]], ids=str
)
def test_bounds_of_documents_are_clamped(bounds: list[int], machine: Machine) -> None:
    x, weight = torch.randn(1, 33, 20), torch.randn(20, 4)
    with machine.layer():
        for dtype in (torch.int32, torch.int64):
            run_conv(x, weight, None, torch.tensor(bounds, dtype=dtype))


def test_tokens_of_no_document_are_zeros(machine: Machine) -> None:
    x, weight = torch.randn(1, 33, 24), torch.randn(24, 4)
    with machine.layer():
        y, _ = run_conv(x, weight, None, torch.tensor([5, 9, 20]))
    assert (y[:, :5] == 0).all() and (y[:, 20:] == 0).all() and y[:, 5:20].all()


def test_a_convolution_keeps_nan_in_its_document(machine: Machine) -> None:
    x, weight, state = torch.randn(1, 30, 24), torch.randn(24, 4), torch.randn(3, 24, 4)
    x[0, 10:20], state[1] = math.nan, math.nan
    with machine.layer():
        y, final = run_conv(x, weight, state, torch.tensor([0, 10, 20, 30]))
    assert y[0, 10:20].isnan().all() and final[1].isnan().all()
    assert y[0, :10].isfinite().all() and y[0, 20:].isfinite().all()
    assert final[[0, 2]].isfinite().all()


# ---- gated norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 5, 128, 131])
@pytest.mark.parametrize("gate_dtype", [None, fp32], ids=["one-dtype", "fp32-gate"])
@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=str)
def test_gated_norm(
    dtype: torch.dtype, gate_dtype: torch.dtype | None, dim: int, machine: Machine
) -> None:
    torch.manual_seed(dim)
    shapes = ((2, 3, 5), 0, 1.0), ((1, 70, 4), 3, 1e-3), ((2, 9, 8), 8, 1.0), ((0, 3, 5), 0, 1.0)
    for shape, gap, scale in shapes:
        guard = Guarded()
        x = guard((torch.randn(*shape, dim) * scale).to(dtype), gap=gap)
        gate = guard((torch.randn(*shape, dim) * 3).to(gate_dtype or dtype), gap=gap)
        weight = guard(torch.randn(dim).to(dtype))
        output = guard.empty((*shape, dim), dtype, gap)
        # the same in another order, where rows do not follow one another
        views = [y.transpose(0, 1) for y in (x, gate, output)] if gap == 3 else [x, gate, output]
        with machine.layer():
            native_layer.gated_norm(views[0], views[1], weight, 1e-5, views[2])
        guard.check()
        normed = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = normed * weight.double() * torch.sigmoid(gate.double())
        assert rel_rms(output, expected) < ROUNDING[dtype] if x.numel() else True


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_gated_norm_keeps_nan_in_its_row(dtype: torch.dtype, machine: Machine) -> None:
    x, gate = torch.randn(2, 1, 4, 3, 128).to(dtype)
    output = torch.empty_like(x)
    x[0, 1, 2], gate[0, 2, 0, 5] = math.nan, math.nan
    with machine.layer():
        native_layer.gated_norm(x, gate, torch.randn(128), 1e-5, output)
    expected = torch.zeros(1, 4, 3, 128, dtype=torch.bool)
    expected[0, 1, 2], expected[0, 2, 0, 5] = True, True
    assert torch.equal(output.isnan(), expected)


# ---- the emulation ------------------------------------------------------------------------------


def check_layer(emulated: Emulated, dtype: torch.dtype) -> None:
    """A call of everything around the recurrence; for test_gpu_host.py."""
    x, state = torch.randn(1, 30, 200).to(dtype), torch.randn(3, 200, 4).to(dtype)
    with emulated.layer():
        check_step(draw_step(2, (1, 2), dtype=dtype, state_dtype=dtype), None, False, True)
        check_conv(x, torch.randn(200, 4), state, [10, 0, 20])
        y = torch.empty_like(x[0, :, :128])
        for rows in (x[0, :, :128], x[0, :, 1:129]):
            tensors = [z.view(1, 1, *z.shape) for z in (rows, rows, y)]
            native_layer.gated_norm(*tensors[:2], torch.rand(128), 1e-5, tensors[2])


def right(emulated: Emulated) -> bool:
    """Of a call that passes every barrier of these kernels; for test_gpu_host.py as well."""
    case, expected = built_recurrent("barriers")
    try:
        check(run(emulated, case), expected, case)
        with emulated.layer():
            check_step(draw_step(1, (1, 1)), None, False, True)
    except (AssertionError, RuntimeError):
        return False
    return True


def test_every_order_of_threads_gives_the_same(emulated: Emulated) -> None:
    case, expected = built_recurrent("T17")
    results = []
    for seed in range(4):
        emulated.lib.mate_gpu_host_seed(seed)
        results.append(run(emulated, case))
        check(results[-1], expected, case)
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
    emulated.lib.mate_gpu_host_seed(1)


def test_the_compiler_sees_a_constant() -> None:
    """Whether there are kernels is asked while it traces, and its graph stays whole."""

    def double(x: Tensor) -> Tensor:
        return x * 3 if native_layer.has_kernels(torch.device("meta")) else x * 2

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == 2


# ---- on a real GPU, through the public functions ------------------------------------------------

cuda = functools.partial(torch.device, "cuda")


def on_gpu(case: Case) -> dict[str, Any]:
    return {name: x.cuda() for name, x in case.tensors.items()} | case.options


@needs_gpu
@pytest.mark.parametrize("name", RECURRENT)
def test_the_operator_on_a_gpu(name: str) -> None:
    case, expected = built_recurrent(name)
    output, final = mate.recurrent_kda(**on_gpu(case), output_final_state=True)
    check((output.cpu(), final.cpu()), expected, case)


@needs_gpu
@pytest.mark.parametrize("batch", [1, 8, 70])
def test_a_graph_replays_steps_of_the_operator(batch: int) -> None:
    """1,000 tokens, each a replay: no drift from float64."""
    steps = 1000
    case = draw(B=batch, T=steps, Hqk=1, Hv=2, gate="softplus", regime="remembering")
    expected = case.reference() if batch == 1 else None
    t = on_gpu(case)
    state, options = t["initial_state"], {"lower_bound": None}
    rows = {x: t[x][:, :1].clone() for x in ("q", "k", "v", "g", "beta")}
    rows |= {x: t[x] for x in ("A_log", "dt_bias")}
    output, outputs = torch.empty_like(rows["v"]), torch.empty_like(t["v"])

    def step() -> None:
        mate.recurrent_kda(**rows, **options, initial_state=state, final_state=state, output=output)

    held = state.clone()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    state.copy_(held)
    for n in range(steps):
        for x in ("q", "k", "v", "g", "beta"):
            rows[x].copy_(t[x][:, n : n + 1])
        graph.replay()
        outputs[:, n : n + 1] = output
    if expected is None:
        whole = mate.recurrent_kda(**t | {"initial_state": held}, output_final_state=True)
        expected = whole[0].cpu(), whole[1].cpu()
    check((outputs.cpu(), state.cpu()), expected, case)


def step_arguments(t: dict[str, Tensor]) -> list[Tensor]:
    return [t[x] for x in (*ROWS, "state", *WEIGHTS[:3], "A_log", "dt_bias", WEIGHTS[3])]


@needs_gpu
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (2, 4)], ids=str)
def test_a_graph_replays_the_decode_step(heads: tuple[int, int], dtype: torch.dtype) -> None:
    t = draw_step(3, heads, dtype=dtype)
    there = {name: x.cuda() for name, x in t.items()}
    kda_decode_step(*step_arguments({name: x.clone() for name, x in there.items()}))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kda_decode_step(*step_arguments(there))
    for name, x in t.items():
        there[name].copy_(x)
    exact = dict(t)
    for seed in range(3):
        fresh = draw_step(3, heads, dtype=dtype, seed=seed)
        for name in ROWS[:6]:
            exact[name] = fresh[name]
            there[name].copy_(fresh[name])
        graph.replay()
        expected, exact["conv_state"], exact["state"] = decode_truth(exact, None, False, True)
        assert rel_rms(output.cpu(), expected) < 2 * ROUNDING[dtype]
        assert torch.equal(there["conv_state"].cpu().double(), exact["conv_state"])
        assert rel_rms(there["state"].cpu(), exact["state"]) < 1e-5


@needs_gpu
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_the_layers_functions_on_a_gpu(dtype: torch.dtype) -> None:
    """Values and gradients as on a CPU, on another stream, with cu_seqlens on the device."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 70, 512).to(dtype), torch.randn(512, 4)
    state, cu = torch.randn(3, 512, 4).to(dtype), torch.tensor([0, 20, 20, 70])
    gate, norm = torch.randn(1, 70, 4, 128).to(dtype), torch.rand(128)

    def run(device: str) -> list[Tensor]:
        tensors = (x, weight, state, gate, norm)
        leaves = [y.to(device, copy=True).requires_grad_() for y in tensors]
        y, final = short_conv(*leaves[:3], cu.to(device), True)
        normed = gated_rms_norm(y.unflatten(-1, (4, 128)), *leaves[3:])
        (normed.float().pow(2).sum() + final.float().sum()).backward()
        return [y, final, normed, *(leaf.grad for leaf in leaves)]

    expected = run("cpu")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        actual = run("cuda")
        torch.cuda.current_stream().synchronize()
    errors = [rel_rms(a.detach().cpu(), b.detach()) for a, b in zip(actual, expected, strict=True)]
    assert max(errors) < 2 * ROUNDING[dtype] + 1e-5, errors


@needs_gpu
def test_convolutions_and_norms_of_large_inputs() -> None:
    """More blocks than run at once, and views of one projection."""
    torch.manual_seed(0)
    fused = torch.randn(2, 4100, 3 * 2048, device="cuda").to(bf16)
    weight = torch.randn(3 * 2048, 4, device="cuda").to(bf16)
    whole, _ = short_conv(fused, weight)
    for i in range(3):
        part = slice(i * 2048, i * 2048 + 2048)
        y, _ = short_conv(fused[..., part], weight[part])
        assert torch.equal(y, whole[..., part])
    x64 = torch.nn.functional.pad(fused[:, :, :512].double(), (0, 0, 3, 0))
    y64 = sum(x64[:, j : j + 4100] * weight[:512, j].double() for j in range(4))
    y64 = torch.nn.functional.silu(y64)
    assert rel_rms(whole[..., :512].cpu(), y64.cpu()) < ROUNDING[bf16]
    o = torch.randn(2, 4100, 16, 128, device="cuda").to(bf16)
    gate = fused[..., :2048].unflatten(-1, (16, 128))
    norm = torch.rand(128, device="cuda")
    o64 = torch.nn.functional.rms_norm(o.double(), (128,), norm.double(), 1e-5)
    expected = o64 * torch.sigmoid(gate.double())
    assert rel_rms(gated_rms_norm(o, gate, norm).cpu(), expected.cpu()) < ROUNDING[bf16]
