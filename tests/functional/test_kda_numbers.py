"""The operator's numbers: every backend against the float64 recurrence."""

import pytest
import torch
from kda_cases import BOUNDS, Case, D, draw, rel_rms

import mate

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def run(case: Case, operator=mate.chunk_kda) -> tuple[torch.Tensor, torch.Tensor]:
    return operator(**case.kwargs(), output_final_state=True)


def check(case: Case, results: tuple[torch.Tensor, torch.Tensor], bounds=None) -> None:
    bounds = bounds or BOUNDS[case.tensors["q"].dtype]
    for what, actual, expected, bound in zip(
        ("output", "final state"), results, case.reference(), bounds, strict=False
    ):
        assert actual.shape == expected.shape
        error = rel_rms(actual, expected)
        assert error <= bound, f"{what}: relative RMS error {error:.2e} > {bound:.0e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("gate", ["bounded", "softplus", "log"])
@pytest.mark.parametrize("regime", ["forgetting", "remembering", "strong", "mixed"])
def test_gates(backend, gate, regime, dtype):
    case = draw(T=150, Hv=3, Hqk=3, gate=gate, regime=regime, dtype=dtype)
    check(case, run(case))


@pytest.mark.parametrize("T", [1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129])
@pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
def test_lengths(backend, operator, T):
    case = draw(B=2, T=T, seed=T)
    check(case, run(case, operator))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_erased_state(backend, dtype):
    case = draw(T=70, gate="log", regime="erasing", dtype=dtype)
    check(case, run(case))


@pytest.mark.parametrize("cosine", [0.75, 0.9, 0.99])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_correlated_keys(backend, dtype, cosine):
    """The fp16 Neumann inverse of another implementation loses every digit here."""
    case = draw(T=150, gate="log", regime="remembering", cosine=cosine, dtype=dtype)
    check(case, run(case))


@pytest.mark.parametrize("Hqk, Hv", [(1, 1), (1, 4), (2, 6), (3, 3)])
@pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
def test_grouped_heads(backend, operator, Hqk, Hv):
    case = draw(B=2, T=20, Hqk=Hqk, Hv=Hv)
    check(case, run(case, operator))


@pytest.mark.parametrize("lens", [[5], [0, 17, 0, 1, 40, 0], [0, 0], [16, 16], [33, 100, 3]])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=name)
def test_varlen(backend, lens, rank, index):
    case = draw(lens=lens, Hv=4)
    case.tensors["cu_seqlens"] = case.tensors["cu_seqlens"].to(index)
    if rank == 3:
        for key in ("q", "k", "v", "g", "beta"):
            case.tensors[key] = case.tensors[key].squeeze(0)
    check(case, run(case))


def test_empty_sequences_keep_their_state(backend):
    case = draw(lens=[0, 20, 0])
    _, state = run(case)
    initial = case.tensors["initial_state"]
    assert torch.equal(state[0], initial[0]) and torch.equal(state[2], initial[2])
    del case.tensors["initial_state"]
    _, state = run(case)
    assert torch.count_nonzero(state[[0, 2]]) == 0


@pytest.mark.parametrize("B, T", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
def test_nothing_to_do(backend, operator, B, T):
    case = draw(B=B, T=T)
    output, state = run(case, operator)
    assert output.shape == (B, T, 2, D)
    assert torch.equal(state, case.tensors["initial_state"])
    del case.tensors["initial_state"]
    _, state = run(case, operator)
    assert state.shape == (B, 2, D, D) and state.dtype == torch.float32
    assert torch.count_nonzero(state) == 0


def test_views_of_a_fused_projection(backend):
    """Strided views, as they are cut out of one matrix product, with NaN everywhere between."""
    case = draw(B=2, T=37, Hqk=2, Hv=4)
    for key in ("q", "k", "v", "g", "beta"):
        x = case.tensors[key]
        wide = torch.full((*x.shape[:2], 3, *x.shape[2:]), torch.nan)
        wide[:, :, 1] = x
        case.tensors[key] = wide[:, :, 1]
    state = case.tensors["initial_state"]
    wide = torch.full((2, 3, *state.shape[1:]), torch.nan)
    wide[:, 2] = state
    case.tensors["initial_state"] = wide[:, 2]
    assert not case.tensors["q"].is_contiguous()
    check(case, run(case))


@pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
@pytest.mark.parametrize(
    "options",
    [
        {"state_v_first": False},
        {"use_qk_l2norm_in_kernel": False, "scale": 0.01},
        {"use_beta_sigmoid_in_kernel": False},
        {"allow_neg_eigval": True},
        {"lower_bound": -0.7},
        {"lower_bound": -200.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(backend, operator, options):
    case = draw(B=2, T=35, Hv=4, **options)
    if options.get("use_beta_sigmoid_in_kernel") is False:
        case.tensors["beta"] = case.tensors["beta"].sigmoid()
    check(case, run(case, operator))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_fp32_gate_and_beta_with_16_bit_inputs(backend, dtype):
    case = draw(T=50, dtype=dtype)
    case.tensors["g"] = case.tensors["g"].float() * 1.0001
    case.tensors["beta"] = case.tensors["beta"].float() * 1.0001
    check(case, run(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_16_bit_state(backend, dtype):
    """A 16-bit state is rounded once, on the way out: not between tokens or chunks."""
    case = draw(T=100, dtype=dtype, regime="remembering")
    case.tensors["initial_state"] = case.tensors["initial_state"].to(dtype)
    output, state = run(case)
    assert state.dtype == dtype
    check(case, (output, state))


@pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
def test_preallocated(backend, operator):
    case = draw(B=2, T=21)
    output = torch.full_like(case.tensors["v"], torch.nan)
    state = torch.full_like(case.tensors["initial_state"], torch.nan)
    initial = case.tensors["initial_state"].clone()
    results = operator(**case.kwargs(), output=output, final_state=state, output_final_state=True)
    assert results[0] is output and results[1] is state
    assert torch.equal(case.tensors["initial_state"], initial)
    check(case, results)
    alone = operator(**case.kwargs(), final_state=state.fill_(torch.nan))
    assert isinstance(alone, torch.Tensor)
    check(case, (alone, state))


@pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
@pytest.mark.parametrize("state_v_first", [True, False])
def test_state_in_place(backend, operator, state_v_first):
    case = draw(lens=[3, 0, 40], state_v_first=state_v_first)
    expected = case.reference()
    state = case.tensors["initial_state"].clone()
    case.tensors["initial_state"] = state
    output = operator(**case.kwargs(), final_state=state)
    assert rel_rms(output, expected[0]) < 1e-5 and rel_rms(state, expected[1]) < 1e-5


def test_overlapping_state_views_are_in_place_too(backend):
    """Another view object of the same memory is as good as the same object."""
    case = draw(T=40)
    expected = case.reference()
    state = case.tensors["initial_state"]
    output = mate.chunk_kda(**case.kwargs(), final_state=state.view_as(state))
    assert rel_rms(output, expected[0]) < 1e-5 and rel_rms(state, expected[1]) < 1e-5


def test_prefill_then_decode_equals_one_call(backend):
    case = draw(B=2, T=60, Hv=4)
    whole, end = run(case)
    state = case.tensors["initial_state"].clone()
    pieces = []
    for start, stop in ((0, 37), (37, 53), *((t, t + 1) for t in range(53, 60))):
        window = {key: case.tensors[key][:, start:stop] for key in ("q", "k", "v", "g", "beta")}
        operator = mate.chunk_kda if stop - start > 1 else mate.recurrent_kda
        rest = {"A_log": case.tensors["A_log"], "dt_bias": case.tensors["dt_bias"]}
        pieces.append(operator(**window, **rest, initial_state=state, final_state=state))
    assert rel_rms(torch.cat(pieces, 1), whole) < 2e-6
    assert rel_rms(state, end) < 2e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_sequence_and_head(backend, bad):
    clean = draw(lens=[19, 30, 14], Hv=4)
    dirty = draw(lens=[19, 30, 14], Hv=4)
    for key in ("q", "k", "v", "g", "beta"):
        x = dirty.tensors[key]
        x[:, 19:49] = bad  # the whole middle sequence
        if key in ("v", "g", "beta"):
            x[:, :, 3] = bad  # and one value head of all of them
    expected, found = run(clean), run(dirty)
    rows = [*range(19), *range(49, 63)]
    assert torch.equal(found[0][:, rows, :3], expected[0][:, rows, :3])
    assert torch.equal(found[1][[0, 2], :3], expected[1][[0, 2], :3])
    assert found[0][:, 19:49].isnan().any()


def test_long_memory():
    """Constant gates near 1 over thousands of tokens: rounding must not compound."""
    torch.manual_seed(0)
    T = 4096
    case = draw(T=T, Hqk=1, Hv=1, gate="log")
    case.tensors["g"] = (-torch.logspace(-4, -1, D)).expand(1, T, 1, D)
    check(case, run(case))


def test_gates_of_minus_infinity_mean_no_decay(backend):
    """g = -inf with beta = -inf makes a token change nothing: how padding is expressed."""
    case = draw(T=40)
    case.tensors["g"][:, 10:30] = -torch.inf
    case.tensors["beta"][:, 10:30] = -torch.inf
    short = draw(T=40)
    rows = [*range(10), *range(30, 40)]
    for key in ("q", "k", "v", "g", "beta"):
        short.tensors[key] = short.tensors[key][:, rows]
    output, state = run(case)
    expected = short.reference()
    assert rel_rms(output[:, rows], expected[0]) < 1e-5
    assert rel_rms(state, expected[1]) < 1e-5
