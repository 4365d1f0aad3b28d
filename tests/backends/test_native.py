"""The CPU kernels through their C interface: every instruction set that this machine can run, both
algorithms, against the float64 recurrence. Every tensor lies between guard bands, inputs in NaN."""

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import pytest
import torch
from kda_cases import Case, draw, rel_rms
from torch import Tensor

from mate.backends import native
from mate.functional.reference import kda_reference

UNSUPPORTED = 2
GUARD = 512  # elements on either side of every tensor
SENTINEL = 42.0
ALGORITHMS = {"chunk": native.CHUNK, "recurrent": native.RECURRENT}

# relative RMS errors that the fp32 kernels reach; the contract allows 1e-5 and 5e-3 / 4e-3
OUTPUT = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
STATE = 2e-6
# and of the AMX kernel, whose operands are bf16: output and state; the contract allows 5e-3 and
# 4e-3, and up to 2.5e-2 with correlated keys
AMX = (4e-3, 2.7e-3)
AMX_CORRELATED = {0.75: (5e-3, 4e-3), 0.9: (5.5e-3, 4e-3), 0.99: (7e-3, 7e-3)}  # 4096 tokens


class CTensor(ctypes.Structure):
    """``mate_tensor`` and ``mate_kda_args`` by name, as ctypes lays them out."""

    _fields_ = [("data", c_void_p), ("stride", c_int64 * 3), ("dtype", c_int32)]


class KdaArgs(ctypes.Structure):
    _fields_ = [
        *((name, CTensor) for name in ("q", "k", "v", "g", "beta", "output")),
        *((name, CTensor) for name in ("initial_state", "final_state", "token_states")),
        ("state_indices", c_void_p),
        ("num_states", c_int64),
        *((name, c_void_p) for name in ("A_log", "dt_bias", "cu_seqlens")),
        *((name, c_int64) for name in ("num_seqs", "seq_len", "total_tokens")),
        *((name, c_int64) for name in ("heads_qk", "heads_v")),
        *((name, c_float) for name in ("scale", "lower_bound")),
        *((name, c_int32) for name in ("cu_seqlens_is_64bit", "state_indices_is_64bit")),
        *((name, c_int32) for name in ("gate", "flags", "algorithm", "threads")),
    ]


def library() -> ctypes.CDLL:
    lib = native.library()
    assert not isinstance(lib, str), lib
    return lib


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    assert before
    if not native.use_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.use_isa(before)


@pytest.fixture(params=list(ALGORITHMS))
def algorithm(request: pytest.FixtureRequest) -> int:
    return ALGORITHMS[request.param]


# ---- calling ------------------------------------------------------------------------------------


def guarded(x: Tensor, fill: float = math.nan) -> tuple[Tensor, Tensor]:
    """A contiguous copy of x inside a larger buffer filled with ``fill``, and that buffer."""
    buffer = x.new_full((x.numel() + 2 * GUARD,), fill)
    inner = buffer[GUARD : GUARD + x.numel()].view(x.shape)
    return inner.copy_(x), buffer


def arguments(
    tensors: dict[str, Tensor], output: Tensor, final: Tensor | None, **options: Any
) -> tuple[KdaArgs, list[Any]]:
    """The C structure, and what must live as long as it does."""
    t = dict(tensors)
    cu = t.get("cu_seqlens")
    lower_bound = options.get("lower_bound", -5.0)
    gate = native.GATE_LOG_DECAY
    if "A_log" in t:
        gate = native.GATE_SOFTPLUS if lower_bound is None else native.GATE_BOUNDED
    flags = native.L2NORM * options.get("use_qk_l2norm_in_kernel", True)
    flags |= native.BETA_SIGMOID * options.get("use_beta_sigmoid_in_kernel", True)
    flags |= native.NEG_EIGVAL * options.get("allow_neg_eigval", False)
    flags |= native.STATE_V_FIRST * options.get("state_v_first", True)
    args = KdaArgs()
    states = {"initial_state": t.get("initial_state"), "final_state": final, "output": output}
    for name in ("q", "k", "v", "g", "beta", *states):
        x = states.get(name, t.get(name))
        if x is not None:
            strides = (c_int64 * 3)(*x.stride()[:3])
            setattr(args, name, CTensor(x.data_ptr(), strides, native.DTYPE_CODES[x.dtype]))
    for name in ("A_log", "dt_bias", "cu_seqlens"):
        setattr(args, name, t[name].data_ptr() if name in t else None)
    args.num_seqs = t["v"].shape[0] if cu is None else len(cu) - 1
    args.seq_len = args.total_tokens = t["v"].shape[1]
    args.heads_qk, args.heads_v = t["q"].shape[2], t["v"].shape[2]
    args.scale, args.lower_bound = options.get("scale", 128**-0.5), lower_bound or 0.0
    args.cu_seqlens_is_64bit = int(cu is not None and cu.dtype == torch.int64)
    args.gate, args.flags = gate, flags
    args.algorithm = options.get("algorithm", native.AUTO)
    args.threads = options.get("threads", 1)
    return args, [t, output, final]


def run(case: Case, algorithm: int = native.AUTO, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and final state of a call whose every tensor is guarded, outputs poisoned before."""
    t = {name: guarded(x, 0 if x.dtype in (torch.int32, torch.int64) else math.nan)[0]
         for name, x in case.tensors.items()}  # fmt: skip
    v, initial = t["v"], t.get("initial_state")
    N = v.shape[0] if "cu_seqlens" not in t else len(t["cu_seqlens"]) - 1
    new_state = torch.full((N, v.shape[2], 128, 128), math.nan)
    new_state = new_state if initial is None else new_state.to(initial.dtype)
    output, output_buffer = guarded(torch.full_like(v, math.nan), SENTINEL)
    final, final_buffer = guarded(new_state, SENTINEL)
    options = {**case.options, **options}
    args, keep = arguments(t, output, final, algorithm=algorithm, **options)
    assert library().mate_kda_forward(bytes(args)) == 0
    del keep
    for buffer in (output_buffer, final_buffer):
        bands = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        assert (bands == SENTINEL).all(), "written outside the tensor"
    return output, final


def check(
    actual: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    state: float = STATE,
    slack: float = 1.0,
    amx: tuple[float, float] | None = None,
) -> None:
    output, final = actual
    assert rel_rms(output, expected[0]) <= (amx[0] if amx else slack * OUTPUT[output.dtype])
    assert rel_rms(final, expected[1]) <= (max(amx[1], state) if amx else slack * state)


# ---- cases --------------------------------------------------------------------------------------


def with_state_dtype(state_dtype: torch.dtype, **kwargs: Any) -> Case:
    case = draw(**kwargs)
    case.tensors["initial_state"] = case.tensors["initial_state"].to(state_dtype)
    return case


def mixed_dtypes() -> Case:
    case = draw(T=40, dtype=torch.bfloat16)
    case.tensors |= {name: case.tensors[name].float() for name in ("g", "beta")}
    return case


def raw_keys(**kwargs: Any) -> Case:
    """q, k and beta as they enter the recurrence."""
    case = draw(**kwargs, use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False)
    for name in ("q", "k"):
        case.tensors[name] *= 0.08
    case.tensors["beta"] = torch.rand_like(case.tensors["beta"])
    return case


def long_memory() -> Case:
    """Constant decays near 1 and small b: an error that exp(a) repeats at every token adds up."""
    case = draw(T=6000, Hqk=1, Hv=1, gate="log")
    case.tensors["g"].copy_(-torch.logspace(-5, -2, 128))
    case.tensors["beta"] -= 4.0
    return case


def zero_rows() -> Case:
    """Zero q and k rows under decays so strong that the state all but vanishes."""
    case = draw(T=20, gate="log")
    case.tensors["q"][:, 3:5] = 0
    case.tensors["k"][:, 3:5] = 0
    case.tensors["g"][:, 3:5] = -12.0
    return case


bf16, fp16 = torch.bfloat16, torch.float16
CASES: dict[str, Callable[[], Case]] = {
    **{f"T{T}": functools.partial(draw, T=T, seed=T) for T in (1, 2, 15, 16, 17, 31, 33, 100)},
    **{
        f"{gate}-{regime}": functools.partial(draw, T=50, gate=gate, regime=regime)
        for gate in ("bounded", "softplus", "log")
        for regime in ("forgetting", "remembering", "strong", "mixed")
    },
    "log-erasing": lambda: draw(T=50, gate="log", regime="erasing"),
    "log-strong-bf16": lambda: draw(T=50, gate="log", regime="strong", dtype=bf16),
    **{
        f"cosine-{cosine}-{str(dtype)[6:]}": functools.partial(
            draw, T=100, cosine=cosine, regime="remembering", gate="softplus", dtype=dtype
        )
        for cosine in (0.75, 0.9, 0.99)
        for dtype in (torch.float32, bf16, fp16)
    },
    "bf16": lambda: draw(T=100, dtype=bf16),
    "fp16": lambda: draw(T=100, dtype=fp16),
    "bf16-with-fp32-gate-and-beta": mixed_dtypes,
    "batch": lambda: draw(B=3, T=21),
    "grouped": lambda: draw(T=40, Hqk=2, Hv=6),
    "eleven-heads": lambda: draw(T=20, Hqk=1, Hv=11),
    "no-initial-state": lambda: draw(T=40, state=False),
    "key-first-state": lambda: draw(T=40, state_v_first=False),
    "key-first-bf16-state": lambda: with_state_dtype(bf16, T=40, state_v_first=False),
    "bf16-state": lambda: with_state_dtype(bf16, T=40, dtype=bf16),
    "fp16-state": lambda: with_state_dtype(fp16, T=40, dtype=fp16),
    "bf16-state-over-many-bursts": lambda: with_state_dtype(bf16, T=150, dtype=bf16),
    "scale": lambda: draw(T=20, scale=0.3),
    "lower-bound-40": lambda: draw(T=40, lower_bound=-40.0),
    "negative-eigenvalues": lambda: draw(T=40, allow_neg_eigval=True),
    "no-l2norm-no-sigmoid": lambda: raw_keys(T=40),
    "zero-rows": zero_rows,
    "long-memory": long_memory,
    "varlen": lambda: draw(lens=[5, 0, 17, 1, 0, 64, 0]),
    "varlen-bf16-key-first": lambda: draw(lens=[0, 3, 33, 13], dtype=bf16, state_v_first=False),
}


@functools.cache
def built(name: str) -> tuple[Case, tuple[Tensor, Tensor]]:
    case = CASES[name]()
    return case, case.reference()


def rounds_operands(case: Case, isa: str, algorithm: int) -> bool:
    """Whether the AMX kernel serves the call: it leaves fp32 inputs to AVX-512."""
    sixteen_bits = case.tensors["q"].dtype != torch.float32
    return isa == "amx" and sixteen_bits and algorithm == native.CHUNK


@pytest.mark.parametrize("name", CASES)
def test_matches_the_recurrence(name: str, isa: str, algorithm: int) -> None:
    case, expected = built(name)
    state = case.tensors.get("initial_state")
    rounds = state is not None and state.dtype != torch.float32
    slack = 3.0 if name == "long-memory" else 1.0
    check(
        run(case, algorithm),
        expected,
        state=4e-3 if rounds else STATE,
        slack=slack,
        amx=AMX if rounds_operands(case, isa, algorithm) else None,
    )


@pytest.mark.parametrize("T", [1, 12, 13, 40])
def test_auto_matches_the_recurrence(T: int, isa: str) -> None:
    case = draw(T=T, lens=[T, 3, 70])
    check(run(case), case.reference())


GATES = [
    ("bounded", "forgetting"),
    ("bounded", "remembering"),
    ("softplus", "remembering"),
    ("softplus", "mixed"),
    ("log", "remembering"),
    ("log", "strong"),
    ("log", "erasing"),
]


# Only where operands are rounded do errors depend on the dtype, and may they grow with T.
@pytest.mark.parametrize("isa", ["amx"], indirect=True)
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("gate", "regime"), GATES, ids=str)
def test_long_sequences_of_16_bit_inputs(
    gate: str, regime: str, dtype: torch.dtype, isa: str
) -> None:
    case = draw(T=4096, Hqk=1, Hv=1, gate=gate, regime=regime, dtype=dtype)
    check(run(case), case.reference(), amx=AMX)


@pytest.mark.parametrize("isa", ["amx"], indirect=True)
@pytest.mark.parametrize("gate", ["softplus", "log"])
@pytest.mark.parametrize("cosine", list(AMX_CORRELATED))
def test_long_sequences_of_correlated_keys(cosine: float, gate: str, isa: str) -> None:
    case = draw(T=4096, gate=gate, regime="remembering", cosine=cosine, dtype=bf16)
    case.tensors["beta"].fill_({0.75: 2.94, 0.9: 3.89, 0.99: 6.2}[cosine])  # b = 0.95, 0.98, 0.998
    check(run(case), case.reference(), amx=AMX_CORRELATED[cosine])


@pytest.mark.parametrize("n", range(1, 33))
def test_every_tail_of_16_bit_inputs(n: int, isa: str) -> None:
    case = draw(lens=[32 + n, n], dtype=bf16, seed=n)
    amx = AMX if isa == "amx" else None
    check(run(case, native.CHUNK), case.reference(), amx=amx)


@pytest.mark.parametrize("mixed", ["fp32-values", "fp16-keys"])
def test_mixed_dtypes(mixed: str, isa: str, algorithm: int) -> None:
    """Not promised by the operator, but the C interface carries a dtype for each tensor."""
    case = draw(T=40, dtype=bf16)
    name, dtype = {"fp32-values": ("v", torch.float32), "fp16-keys": ("k", fp16)}[mixed]
    case.tensors[name] = case.tensors[name].to(dtype)
    check(run(case, algorithm), case.reference())


# ---- memory -------------------------------------------------------------------------------------


def point_into(args: KdaArgs, pool: Tensor, indices: Tensor) -> None:
    strides = (c_int64 * 3)(*pool.stride()[:3])
    args.initial_state = CTensor(pool.data_ptr(), strides, native.DTYPE_CODES[pool.dtype])
    args.final_state = args.initial_state
    args.state_indices, args.num_states = indices.data_ptr(), pool.shape[0]
    args.state_indices_is_64bit = int(indices.dtype == torch.int64)


@pytest.mark.parametrize("state_v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize("dtype", [torch.float32, bf16, fp16], ids=str)
@pytest.mark.parametrize("lens", [None, [1, 1, 1, 1], [40, 1, 0, 70]], ids=str)
def test_slots_of_a_pool(
    lens: list[int] | None, dtype: torch.dtype, state_v_first: bool, isa: str, algorithm: int
) -> None:
    """The same bits as from states side by side, in guarded memory; other slots are not touched."""
    case = draw(B=4, T=21, Hqk=1, Hv=3, lens=lens, dtype=dtype, state_v_first=state_v_first)
    own = case.tensors["initial_state"].to(dtype)
    kinds = itertools.product(([3, -1, 0, 4], [-1, 5, -(2**31), 2**31 - 1]), ("int32", "int64"))
    for slots, kind in kinds:
        inside = [n for n, i in enumerate(slots) if 0 <= i < 5]
        case.tensors["initial_state"] = torch.zeros_like(own)
        case.tensors["initial_state"][inside] = own[inside]
        expected = run(case, algorithm)
        pool, buffer = guarded(torch.full((5, *own.shape[1:]), math.nan, dtype=dtype), SENTINEL)
        for n in inside:
            pool[slots[n]] = own[n]
        indices = torch.tensor(slots, dtype=getattr(torch, kind))
        output = torch.full_like(case.tensors["v"], math.nan)
        for threads in (1, 8):
            held = buffer.clone()
            args, keep = arguments(
                case.tensors, output, None, algorithm=algorithm, threads=threads, **case.options
            )
            point_into(args, pool, indices)
            assert library().mate_kda_forward(bytes(args)) == 0
            del keep
            assert torch.equal(output, expected[0])
            for n in inside:
                assert torch.equal(pool[slots[n]], expected[1][n])
            found = buffer.clone()
            buffer.copy_(held)
            for n in inside:
                pool[slots[n]] = expected[1][n]
            assert torch.equal(found.nan_to_num(7.0), buffer.nan_to_num(7.0)), "written elsewhere"
            buffer.copy_(held)


@pytest.mark.parametrize("state_v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize("dtype", [torch.float32, bf16, fp16], ids=str)
@pytest.mark.parametrize("T", [1, 5, 70])
def test_states_after_each_token(T: int, dtype: torch.dtype, state_v_first: bool, isa: str) -> None:
    """Each is the final state of the tokens up to it, in guarded memory."""
    case = draw(B=2, T=T, Hqk=1, Hv=2, state_v_first=state_v_first)
    case.tensors["initial_state"] = case.tensors["initial_state"].to(dtype)
    shape = (*case.tensors["v"].shape, 128)
    states, buffer = guarded(torch.full(shape, math.nan, dtype=dtype), SENTINEL)
    output = torch.full_like(case.tensors["v"], math.nan)
    for threads in (1, 8):
        args, keep = arguments(case.tensors, output, None, threads=threads, **case.options)
        strides = (c_int64 * 3)(*states.stride()[:3])
        args.token_states = CTensor(states.data_ptr(), strides, native.DTYPE_CODES[dtype])
        assert library().mate_kda_forward(bytes(args)) == UNSUPPORTED  # by another algorithm
        args.algorithm = native.RECURRENT
        assert library().mate_kda_forward(bytes(args)) == 0
        del keep
        assert (torch.cat([buffer[:GUARD], buffer[-GUARD:]]) == SENTINEL).all()
        assert rel_rms(output, run(case, native.RECURRENT)[0].double()) < OUTPUT[torch.float32]
        for t in {0, T // 2, T - 1}:
            prefix = {k: x[:, : t + 1] if x.dim() > 2 and k != "initial_state" else x
                      for k, x in case.tensors.items()}  # fmt: skip
            prefix = Case({k: x.contiguous() for k, x in prefix.items()}, case.options)
            final = run(prefix, native.RECURRENT)[1]
            # a single token on a state [K, V] has a kernel of its own
            same = torch.equal(states[:, t], final)
            assert same or (t == 0 and rel_rms(states[:, t], final.double()) < 4e-3)


@pytest.mark.parametrize("state_v_first", [True, False], ids=["value-first", "key-first"])
def test_state_in_place(state_v_first: bool, isa: str, algorithm: int) -> None:
    case = draw(T=40, Hv=4, state_v_first=state_v_first)
    expected = case.reference()
    state = case.tensors["initial_state"]
    output = torch.full_like(case.tensors["v"], math.nan)
    for threads in (1, 8):
        case.tensors["initial_state"] = both = state.clone()
        args, keep = arguments(
            case.tensors, output, both, algorithm=algorithm, threads=threads, **case.options
        )
        assert library().mate_kda_forward(bytes(args)) == 0
        check((output, both), expected)
        del keep


def test_strided_views(isa: str, algorithm: int) -> None:
    """Everything is cut out of larger tensors, beta from a transposed one, states row by row."""
    case = draw(B=2, T=20)
    expected = case.reference()
    wide = torch.cat([case.tensors[x] for x in ("q", "k", "v", "g")], dim=-1)
    t = dict(zip(("q", "k", "v", "g"), wide.split(128, dim=-1), strict=True))
    t["beta"] = case.tensors["beta"].transpose(1, 2).contiguous().transpose(1, 2)
    states = torch.full((2, 2, 128, 300), SENTINEL)
    initial, final = states[..., :128], states[..., 150:278]
    initial.copy_(case.tensors["initial_state"])
    outputs = torch.full((2, 20, 2, 200), SENTINEL)
    output = outputs[..., 30:158]
    args, keep = arguments(
        {**case.tensors, **t, "initial_state": initial}, output, final, algorithm=algorithm
    )
    assert library().mate_kda_forward(bytes(args)) == 0
    check((output, final), expected)
    assert (outputs[..., :30] == SENTINEL).all() and (outputs[..., 158:] == SENTINEL).all()
    assert (states[..., 128:150] == SENTINEL).all() and (states[..., 278:] == SENTINEL).all()
    del keep


def test_final_state_is_optional(isa: str, algorithm: int) -> None:
    case = draw(T=40)
    output = torch.full_like(case.tensors["v"], math.nan)
    args, keep = arguments(case.tensors, output, None, algorithm=algorithm)
    assert library().mate_kda_forward(bytes(args)) == 0
    assert rel_rms(output, case.reference()[0]) <= OUTPUT[torch.float32]
    del keep


@pytest.mark.parametrize("dtype", [torch.float32, bf16, fp16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
def test_empty_sequences_only_carry_the_state(
    state: bool, dtype: torch.dtype, isa: str, algorithm: int
) -> None:
    case = draw(lens=[0, 0], state=state)
    if state:
        case.tensors["initial_state"] = case.tensors["initial_state"].to(dtype)
    _, final = run(case, algorithm)
    assert torch.equal(final, case.tensors.get("initial_state", torch.zeros_like(final)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    ("values", "safe"),
    [
        ([0, 40, 10, 1000, -5, 33], [0, 33, 33, 33, 33, 33]),
        ([-7, 5, 2, 20], [0, 5, 5, 20]),
        ([5, 20], [5, 20]),
        ([-(2**31), 2**31 - 1], [0, 33]),
    ],
    ids=["beyond-the-end", "decreasing", "late-start", "extremes"],
)
def test_cu_seqlens_are_clamped(
    values: list[int], safe: list[int], dtype: torch.dtype, isa: str, algorithm: int
) -> None:
    case = draw(T=33, state=False)
    case.tensors["cu_seqlens"] = torch.tensor(values, dtype=dtype)
    output, final = run(case, algorithm)
    expected, state = kda_reference(**{**case.kwargs(), "cu_seqlens": torch.tensor(safe)})
    written = slice(safe[0], safe[-1])
    assert rel_rms(output[:, written], expected) <= OUTPUT[torch.float32]
    assert rel_rms(final, state) <= STATE
    assert output[:, : safe[0]].isnan().all() and output[:, safe[-1] :].isnan().all()


# ---- what must not spread -----------------------------------------------------------------------


@pytest.fixture(params=[torch.float32, bf16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["q", "k", "v", "g", "beta", "initial_state"])
def test_bad_numbers_stay_in_their_sequence_and_head(
    where: str, value: float, dtype: torch.dtype, isa: str, algorithm: int
) -> None:
    case = draw(lens=[7, 18, 9], Hqk=3, Hv=3, dtype=dtype)
    clean = run(case, algorithm)
    x = case.tensors[where]
    if where == "initial_state":
        x[1, 1] = value
    else:
        x[:, 7:25, 1] = value
    output, final = run(case, algorithm)
    keep_tokens = torch.ones(34, 3, dtype=torch.bool)
    keep_tokens[7:25, 1] = False
    keep_states = torch.ones(3, 3, dtype=torch.bool)
    keep_states[1, 1] = False
    assert torch.equal(output[0][keep_tokens], clean[0][0][keep_tokens])
    assert torch.equal(final[keep_states], clean[1][keep_states])
    if math.isnan(value):
        assert output[0, 7:25, 1].isnan().all()


@pytest.mark.parametrize("token", [11, 40], ids=["first-span", "second-span"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["q", "k", "v", "g", "beta"])
def test_a_bad_token_leaves_earlier_tokens_alone(
    where: str, value: float, token: int, dtype: torch.dtype, isa: str, algorithm: int
) -> None:
    case = draw(T=50, dtype=dtype)
    clean, _ = run(case, algorithm)
    case.tensors[where][:, token] = value
    output, _ = run(case, algorithm)
    assert torch.equal(output[:, :token], clean[:, :token])
    if math.isnan(value):
        reached = slice(token, token + 1 if where == "q" else 50)  # q does not enter the state
        assert output[:, reached].isnan().all()


@pytest.mark.parametrize("size", [1e-12, 1e15])  # their product reaches 1e32
def test_normalised_rows_may_have_any_size(size: float, dtype: torch.dtype, isa: str) -> None:
    for algorithm in ALGORITHMS.values():
        case = draw(T=20, dtype=dtype)
        for name in ("q", "k"):
            case.tensors[name] *= size
        amx = AMX if rounds_operands(case, isa, algorithm) else None
        check(run(case, algorithm), case.reference(), amx=amx)


# ---- functions ----------------------------------------------------------------------------------


def decays(g: Tensor, algorithm: int, **tensors: Tensor) -> Tensor:
    """What one token with a zero key makes of a state of ones: exp(log-decay), per channel."""
    zeros = torch.zeros(1, 1, 1, 128)
    t = {"q": zeros, "k": zeros, "v": zeros, "g": g.view(1, 1, 1, 128), **tensors}
    t |= {"beta": torch.zeros(1, 1, 1), "initial_state": torch.ones(1, 1, 128, 128)}
    _, final = run(Case(t, {"lower_bound": None}), algorithm)
    return final[0, 0, 5]


def test_decay_is_accurate_over_its_range(isa: str, algorithm: int) -> None:
    g = torch.cat([-torch.logspace(-8, 1.93, 120), torch.tensor([0.0, -0.0, -1e-30, -90, -104])])
    g = torch.cat([g, torch.tensor([-1e5, -3e38, -math.inf])])
    actual, expected = decays(g, algorithm).double(), g.double().exp()
    normal = expected > 1.2e-38
    error = (actual - expected).abs() / expected
    assert error[normal].max() < 2.5e-7
    assert (actual[~normal] == 0).all()


def test_softplus_is_accurate_far_below_zero(isa: str, algorithm: int) -> None:
    g = torch.linspace(-20, 20, 128)
    A_log, dt_bias = torch.tensor([16.0]), torch.linspace(-1, 0, 128)
    for A in (16.0, 4.0, -3.0):
        A_log.fill_(A)
        actual = decays(g, algorithm, A_log=A_log, dt_bias=dt_bias).double()
        a = -A_log.double().exp() * torch.nn.functional.softplus((g + dt_bias).double())
        close = a > -10
        assert close.any()
        assert ((actual - a.exp()).abs() / a.exp())[close].max() < 4e-6


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
def test_conversions_are_exact(dtype: torch.dtype, isa: str) -> None:
    """Every 16-bit number survives a state's trip through fp32; stores round to nearest even."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    case = draw(lens=[0] * 4, Hqk=1, Hv=1)
    case.tensors["initial_state"] = every.view(4, 1, 128, 128)
    _, final = run(case)
    actual, expected = final.flatten(), every
    if dtype == bf16:  # fp32 denormals: flushing them is allowed
        tiny = expected.abs().float() < 2.0**-126
        actual, expected = actual[~tiny], expected[~tiny]
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))

    # k and v of one token make b v k^T: floats of every size to be rounded into the state
    x = (torch.randn(128) * 2.0 ** torch.randint(-26, 17, (128,))).view(1, 1, 1, 128)
    one = torch.zeros(1, 1, 1, 128)
    one[..., 3] = 1.0
    t = {"q": one, "k": one, "v": x, "g": torch.zeros_like(x), "beta": torch.ones(1, 1, 1)}
    t["initial_state"] = torch.zeros(1, 1, 128, 128, dtype=dtype)
    raw = {"use_qk_l2norm_in_kernel": False, "use_beta_sigmoid_in_kernel": False}
    for algorithm in ALGORITHMS.values():
        _, final = run(Case(t, raw), algorithm)
        assert torch.equal(final[0, 0, :, 3], x[0, 0, 0].to(dtype))


# ---- threads ------------------------------------------------------------------------------------

Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
Parallel = ctypes.CFUNCTYPE(None, Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


@pytest.fixture
def set_parallel() -> Iterator[Callable[[Any], None]]:
    def set_to(run: Any) -> None:
        library().mate_cpu_set_parallel(None if run is None else ctypes.cast(run, ctypes.c_void_p))

    yield set_to
    set_to(getattr(ctypes.CDLL(None), "GOMP_parallel", None))


@pytest.mark.parametrize("shape", [(1, 300, 1), (1, 100, 5), (40, 2, 3)], ids=str)
def test_thread_count_changes_nothing(
    shape: tuple[int, int, int], dtype: torch.dtype, isa: str
) -> None:
    B, T, H = shape
    case = draw(B=B, T=T, Hqk=1, Hv=H, dtype=dtype)
    one = run(case, threads=1)
    for threads in (2, 3, 8, 64):
        many = run(case, threads=threads)
        assert torch.equal(many[0], one[0]) and torch.equal(many[1], one[1])


@pytest.mark.parametrize("arrivals", [1, 2, 50])
def test_any_number_of_threads_may_arrive(
    arrivals: int, set_parallel: Callable[[Any], None]
) -> None:
    case = draw(T=300, Hqk=1, Hv=4)
    expected = run(case, threads=1)
    asked = []

    @Parallel
    def in_turn(body: Any, arg: int, threads: int, flags: int) -> None:
        asked.append(threads)
        for _ in range(arrivals):
            body(arg)

    set_parallel(in_turn)
    actual = run(case, threads=4)
    assert asked == [4]
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_own_threads(set_parallel: Callable[[Any], None]) -> None:
    case = draw(T=300, Hqk=1, Hv=4)
    expected = run(case, threads=1)
    set_parallel(None)
    actual = run(case, threads=4)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


# ---- refusals -----------------------------------------------------------------------------------


def test_unknown_instruction_sets_are_refused() -> None:
    before = native.isa()
    for name in (b"", b"avx1024", b"AVX2"):
        assert library().mate_cpu_use_isa(name) == UNSUPPORTED
        assert native.isa() == before
    assert library().mate_cpu_use_isa(None) == 0


@pytest.mark.parametrize(
    "change",
    [{"gate": 9}, {"algorithm": -1}, {"heads_qk": 3}, {"heads_qk": 0}, {"A_log": None}],
    ids=str,
)
def test_unknown_arguments_are_refused(change: dict[str, Any]) -> None:
    case = draw(T=20)
    output = torch.full_like(case.tensors["v"], SENTINEL)
    args, keep = arguments(case.tensors, output, None)
    for name, value in change.items():
        setattr(args, name, value)
    assert library().mate_kda_forward(bytes(args)) == UNSUPPORTED
    assert (output == SENTINEL).all()
    del keep
