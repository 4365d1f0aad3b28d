"""Serving: states in a pool of slots, and the state after each token."""

import pytest
import torch
from kda_cases import BOUNDS, Case, D, draw, rel_rms
from torch import Tensor

import mate
from mate.functional.reference import kda_reference

pytestmark = pytest.mark.usefixtures("poison")
OPERATORS = pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
INDICES = {"permuted": [4, 0, 2], "padded": [1, -1, 5], "outside": [-1, 99, -7], "far": [6, 3, 7]}


def name(x: object) -> str:
    return str(x).removeprefix("torch.")


def batch(lens: list[int] | None, dtype: torch.dtype, v_first: bool = True, T: int = 9) -> Case:
    case = draw(B=3, T=T, Hqk=1, Hv=3, dtype=dtype, lens=lens, state=False)
    if not v_first:
        case.options["state_v_first"] = False
    return case


def filled_pool(indices: list[int], dtype: torch.dtype, slots: int = 8) -> Tensor:
    """A pool in which everything that must not be read is NaN."""
    pool = torch.full((slots, 3, D, D), torch.nan)
    for i in indices:
        if 0 <= i < slots:
            pool[i] = torch.randn(3, D, D) * torch.linspace(0.1, 2.0, D)[:, None]
    return pool.to(dtype)


def check_pool(case: Case, operator, indices: Tensor, pool: Tensor, **options) -> None:
    """One call against the float64 recurrence from each sequence's own state."""
    before, used = pool.clone(), [i if 0 <= i < len(pool) else None for i in indices.tolist()]
    own = torch.stack([torch.zeros(3, D, D) if i is None else before[i].float() for i in used])
    expected, states = Case(case.tensors | {"initial_state": own}, case.options).reference()
    output = operator(
        **case.kwargs(), initial_state=pool, final_state=pool, state_indices=indices, **options
    )
    bounds = BOUNDS[case.tensors["q"].dtype]
    assert rel_rms(output, expected) < bounds[0]
    for n, i in enumerate(used):
        if i is not None:
            assert rel_rms(pool[i], states[n]) < max(bounds[1], BOUNDS[pool.dtype][1])
            before[i] = pool[i]
    bits = {torch.float32: torch.int32}.get(pool.dtype, torch.int16)
    assert torch.equal(pool.view(bits), before.view(bits)), "another slot was written"


@OPERATORS
@pytest.mark.parametrize("v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=name)
@pytest.mark.parametrize("lens", [None, [1, 40, 3], [0, 1, 1], [70, 0, 2]], ids=str)
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
def test_slots(backend, operator, indices, lens, index, v_first):
    case = batch(lens, torch.float32, v_first)
    check_pool(case, operator, torch.tensor(indices, dtype=index), filled_pool(indices, fp32))


fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


@OPERATORS
@pytest.mark.parametrize("v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize(
    "dtype, state", [(bf16, fp32), (bf16, bf16), (fp16, fp16), (fp16, fp32)], ids=name
)
@pytest.mark.parametrize("T", [1, 20, 70])
def test_slots_of_other_dtypes(backend, operator, T, dtype, state, v_first):
    for indices in INDICES.values():
        case = batch(None, dtype, v_first, T)
        check_pool(case, operator, torch.tensor(indices), filled_pool(indices, state))


@OPERATORS
def test_a_strided_pool_and_indices(backend, operator):
    """The layers' pools side by side, indices out of a table."""
    indices = torch.tensor([[5, -3], [1, -3], [7, -3]])[:, 0]
    pool = torch.full((8, 2, 3, D, D), torch.nan)
    pool[:, 1] = filled_pool(indices.tolist(), fp32)
    check_pool(batch(None, fp32), operator, indices, pool[:, 1])
    assert pool[:, 0].isnan().all()


@OPERATORS
def test_no_slots_and_no_sequences(backend, operator):
    case = batch(None, fp32)
    pool = torch.zeros(0, 3, D, D)
    check_pool(case, operator, torch.tensor([0, -1, 3]), pool)
    none = Case({k: x[:0] if x.dim() > 2 else x for k, x in case.tensors.items()})
    pool = filled_pool([1], fp32)
    before = pool.clone()
    indices = torch.zeros(0, dtype=torch.int64)
    operator(**none.kwargs(), initial_state=pool, final_state=pool, state_indices=indices)
    assert torch.equal(pool.nan_to_num(7.0), before.nan_to_num(7.0))


def test_returns_the_pool(backend):
    pool = torch.zeros(4, 3, D, D)
    _, state = mate.chunk_kda(
        **batch(None, fp32).kwargs(), initial_state=pool, final_state=pool,
        state_indices=torch.tensor([2, 0, 1]), output_final_state=True,
    )  # fmt: skip
    assert state is pool


# ---- the state after each token -----------------------------------------------------------------


def states_after_each(case: Case) -> Tensor:
    """[B, T, Hv, V, K] by the float64 recurrence of every prefix; varlen: [1, S, ...]."""
    t, bounds = case.tensors, case.tensors.get("cu_seqlens")
    rows = [(b, 0, t["v"].shape[1]) for b in range(t["v"].shape[0])]
    if bounds is not None:
        rows = [(0, *pair) for pair in zip(bounds.tolist(), bounds[1:].tolist(), strict=False)]
    found = []
    for n, (b, start, end) in enumerate(rows):
        for stop in range(start + 1, end + 1):
            part = {k: t[k][b : b + 1, start:stop] for k in ("q", "k", "v", "g", "beta")}
            part |= {k: t[k] for k in ("A_log", "dt_bias") if k in t}
            if "initial_state" in t:
                part["initial_state"] = t["initial_state"][n : n + 1]
            found.append(kda_reference(**part, **case.options)[1][0])
    return torch.stack(found).view(*t["v"].shape[:2], *found[0].shape)


@pytest.mark.parametrize("v_first", [True, False], ids=["value-first", "key-first"])
@pytest.mark.parametrize(
    "dtype, states", [(fp32, fp32), (bf16, fp32), (bf16, bf16), (fp16, fp16)], ids=name
)
@pytest.mark.parametrize("lens", [None, [5, 0, 1], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
def test_token_states(backend, state, lens, dtype, states, v_first):
    case = draw(B=2, T=4, Hqk=2, Hv=4, dtype=dtype, lens=lens, state=state)
    case.options["state_v_first"] = v_first
    token_states = torch.full((*case.tensors["v"].shape, D), torch.nan, dtype=states)
    output, final = mate.recurrent_kda(
        **case.kwargs(), output_final_state=True, token_states=token_states
    )
    expected, expected_final = case.reference()
    bounds = BOUNDS[dtype]
    assert rel_rms(output, expected) < bounds[0] and rel_rms(final, expected_final) < bounds[1]
    assert rel_rms(token_states, states_after_each(case)) < max(bounds[1], BOUNDS[states][1])
    if states == final.dtype:
        last = [-1] if lens is None else [i for i, n in enumerate(lens) if n]
        if lens is None:
            assert torch.equal(token_states[:, -1], final)
        else:
            ends = case.tensors["cu_seqlens"][1:][last] - 1
            assert torch.equal(token_states[0, ends], final[last])


def test_token_states_of_many_tokens(backend):
    """More than the kernel prepares at once, in strided memory."""
    case = draw(B=1, T=70, Hqk=1, Hv=1)
    wide = torch.full((1, 70, 3, D, D), torch.nan)
    mate.recurrent_kda(**case.kwargs(), token_states=wide[:, :, 1:2])
    assert wide[:, :, ::2].isnan().all()
    expected = states_after_each(case)
    for t in (0, 1, 62, 63, 64, 69):
        assert rel_rms(wide[:, t, 1:2], expected[:, t]) < 1e-5


def test_token_states_beside_a_pool(backend):
    """Speculative verification of packed sequences, without their batch dimension."""
    case = draw(lens=[3, 1, 4], Hqk=1, Hv=3, state=False)
    indices, pool = torch.tensor([2, -1, 0]), filled_pool([0, 2], fp32)
    own = torch.stack([pool[2], torch.zeros(3, D, D), pool[0]])
    expected = states_after_each(Case(case.tensors | {"initial_state": own}))
    packed = {k: x[0] if k in ("q", "k", "v", "g", "beta") else x for k, x in case.tensors.items()}
    token_states = torch.full((8, 3, D, D), torch.nan)
    mate.recurrent_kda(
        **packed, initial_state=pool, final_state=pool, state_indices=indices,
        token_states=token_states,
    )  # fmt: skip
    assert rel_rms(token_states[None], expected) < 1e-5
    assert torch.equal(pool[2], token_states[2]) and torch.equal(pool[0], token_states[7])


# ---- errors -------------------------------------------------------------------------------------


def refused(error: type, message: str, operator=mate.recurrent_kda, **changes) -> None:
    """The call raises, and nothing was written."""
    pool = filled_pool(list(range(8)), fp32)
    given = batch(None, fp32).kwargs() | {
        "initial_state": pool, "final_state": pool, "state_indices": torch.tensor([0, 1, 2]),
    } | changes  # fmt: skip
    tensors = {k: x for k, x in given.items() if isinstance(x, Tensor) and not x.is_meta}
    before = {k: x.clone() for k, x in tensors.items()}
    with pytest.raises(error, match=message):
        operator(**given)
    for key, x in before.items():
        assert torch.equal(given[key].nan_to_num(7.5), x.nan_to_num(7.5)), f"{key} was written"


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


@OPERATORS
def test_errors_of_indices(operator):
    for error, message, changes in (
        (ValueError, r"state_indices .*both initial_state and final_state, got initial_state=None",
         {"initial_state": None}),
        (ValueError, r"state_indices .*both .*got final_state=None", {"final_state": None}),
        (ValueError, r"state_indices .*both .*got another tensor",
         {"final_state": zeros(8, 3, D, D)}),
        (ValueError, r"state_indices .*\[num_seqs\] = \[3\], got \[2\]",
         {"state_indices": torch.tensor([0, 1])}),
        (ValueError, r"state_indices .*\[num_seqs\] = \[3\], got \[3, 1\]",
         {"state_indices": torch.zeros(3, 1, dtype=torch.int64)}),
        (TypeError, r"state_indices .*int32 or torch.int64, got torch.float32",
         {"state_indices": zeros(3)}),
        (TypeError, r"state_indices .*Tensor, got list", {"state_indices": [0, 1, 2]}),
        (ValueError, r"state_indices must be on cpu like q, got meta",
         {"state_indices": zeros(3, dtype=torch.int64, device="meta")}),
        (ValueError, r"state_indices .*slot of its own, got 5 twice",
         {"state_indices": torch.tensor([5, 1, 5])}),
    ):  # fmt: skip
        refused(error, message, operator, **changes)
    for bad in (zeros(8, 2, D, D), zeros(8, 3, D), torch.tensor(0.0)):
        refused(ValueError, r"initial_state .*\[slots, Hv, 128, 128\]", operator,
                initial_state=bad, final_state=bad)  # fmt: skip
    refused(
        TypeError, "initial_state must be a torch.Tensor", operator, initial_state=5, final_state=5
    )
    half = zeros(8, 3, D, D, dtype=bf16)
    refused(TypeError, r"initial_state .*bfloat16", operator, initial_state=half, final_state=half)


def test_equal_indices_outside_are_fine():
    pool = torch.zeros(2, 3, D, D)
    mate.recurrent_kda(
        **batch(None, fp32).kwargs(), initial_state=pool, final_state=pool,
        state_indices=torch.tensor([-1, -1, 1]),
    )  # fmt: skip
    assert torch.count_nonzero(pool[0]) == 0 and torch.count_nonzero(pool[1])


def test_errors_of_token_states():
    good = (3, 9, 3, D, D)
    for error, message, token_states in (
        (ValueError, r"token_states .*\[\*v.shape, 128\] = \[3, 9, 3, 128, 128\], got \[3, 8",
         zeros(3, 8, 3, D, D)),
        (ValueError, r"token_states .*got \[27, 3, 128, 128\]", zeros(27, 3, D, D)),
        (TypeError, r"token_states .*float32, got torch.bfloat16", zeros(*good, dtype=bf16)),
        (TypeError, r"token_states .*Tensor, got str", "all of them"),
        (ValueError, r"token_states must be on cpu like q, got meta", zeros(*good, device="meta")),
        (ValueError, r"token_states .*contiguous in its last dim", zeros(*good).mT),
        (ValueError, r"token_states .*last two dim", zeros(3, 9, 3, D, 2 * D)[..., :D]),
        (ValueError, r"token_states .*expanded", zeros(3, 1, 3, D, D).expand(good)),
    ):  # fmt: skip
        refused(error, message, token_states=token_states)
    pool = torch.zeros(27, 3, D, D)
    refused(ValueError, r"token_states must not overlap final_state|initial_state",
            initial_state=pool, final_state=pool, token_states=pool.view(good))  # fmt: skip
    with pytest.raises(TypeError, match="token_states"):
        mate.chunk_kda(**batch(None, fp32).kwargs(), token_states=zeros(*good))


@pytest.mark.parametrize("what", ["state_indices", "token_states"])
def test_no_gradients(what):
    case = batch(None, fp32)
    case.tensors["v"].requires_grad_()
    pool = torch.zeros(4, 3, D, D)
    options = {"token_states": torch.zeros(3, 9, 3, D, D)}
    if what == "state_indices":
        options = {"initial_state": pool, "final_state": pool, what: torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match="autograd cannot follow"):
        mate.recurrent_kda(**case.kwargs(), **options)
    assert not any(torch.count_nonzero(x) for x in options.values() if x.dim() > 1)
    with torch.no_grad():
        mate.recurrent_kda(**case.kwargs(), **options)
    assert all(torch.count_nonzero(x) for x in options.values())
