"""Bad input: every row of the contract's list raises, names the argument, and writes nothing."""

import pytest
import torch
from kda_cases import D, draw

import mate

OPERATORS = pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
NAN = float("nan")


def call(operator=mate.chunk_kda, lens=None, **changes):
    """A good call but for ``changes``; fails if an error comes after something was written."""
    case = draw(B=2, T=6, Hqk=2, Hv=4, lens=lens)
    given = case.kwargs() | changes
    given.setdefault("output", torch.full((*given["v"].shape[:-1], D), NAN))
    state = given.get("initial_state")
    given.setdefault("final_state", None if state is None else torch.full_like(state, NAN))
    before = {k: x.clone() for k, x in given.items() if isinstance(x, torch.Tensor)}
    try:
        operator(**given)
    except Exception:
        for key, x in before.items():
            assert torch.equal(given[key].nan_to_num(7.5), x.nan_to_num(7.5)), f"{key} was written"
        raise


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def transposed(*shape):
    return torch.zeros(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def test_the_good_call_passes():
    call()
    call(lens=[4, 2])


SHAPES = {
    "q rank": ({"q": zeros(6, 2, D)}, r"q .*\[B, T, Hqk, 128\].*\[6, 2, 128\].*pass cu_seqlens"),
    "q head dim": ({"q": zeros(2, 6, 2, 64)}, r"q .*head dimension 128.*64"),
    "k shape": ({"k": zeros(2, 5, 2, D)}, r"k .*q\.shape = \[2, 6, 2, 128\].*\[2, 5, 2, 128\]"),
    "v tokens": ({"v": zeros(2, 5, 4, D)}, r"v .*\[2, 6\].*\[2, 5, 4, 128\]"),
    "v rank": ({"v": zeros(6, 4, D)}, r"v .*\[6, 4, 128\]"),
    "head ratio": ({"v": zeros(2, 6, 3, D)}, r"Hv.*multiple of Hqk.*Hv=3, Hqk=2"),
    "g shape": ({"g": zeros(2, 6, 2, D)}, r"g .*v\.shape.*\[2, 6, 2, 128\]"),
    "beta shape": ({"beta": zeros(2, 6, 4, 1)}, r"beta .*v\.shape\[:-1\].*\[2, 6, 4, 1\]"),
    "A_log shape": ({"A_log": zeros(2)}, r"A_log .*\[Hv\] = \[4\].*\[2\]"),
    "dt_bias shape": (
        {"dt_bias": zeros(4, 64)},
        r"dt_bias .*\[Hv \* 128\] or \[Hv, 128\] = \[4, 128\], got \[4, 64\]",
    ),
    "dt_bias length": (
        {"dt_bias": zeros(500)},
        r"dt_bias .*\[Hv, 128\] or \[Hv \* 128\] = \[512\], got \[500\]",
    ),
    "A_log alone": ({"dt_bias": None}, r"A_log without dt_bias"),
    "dt_bias alone": ({"A_log": None}, r"dt_bias without A_log"),
    "lower_bound sign": ({"lower_bound": 0.0}, r"lower_bound .*negative.*0\.0"),
    "lower_bound infinite": ({"lower_bound": -float("inf")}, r"lower_bound .*finite.*-inf"),
    "initial_state count": ({"initial_state": zeros(1, 4, D, D)}, r"initial_state .*\[2, 4, 128"),
    "final_state heads": ({"final_state": zeros(2, 2, D, D)}, r"final_state .*\[2, 2, 128, 128\]"),
    "final_state too small": ({"final_state": zeros(1, 4, D, D)}, r"final_state .*\[1, 4, 128"),
    "output too small": ({"output": zeros(2, 5, 4, D)}, r"output .*v\.shape.*\[2, 5, 4, 128\]"),
    "output expanded": ({"output": zeros(1, 6, 4, D).expand(2, 6, 4, D)}, r"output .*expanded"),
    "neg eigval": (
        {"allow_neg_eigval": True, "use_beta_sigmoid_in_kernel": False},
        r"allow_neg_eigval.*use_beta_sigmoid_in_kernel",
    ),
    "cu_seqlens_cpu alone": ({"cu_seqlens_cpu": torch.tensor([0, 6])}, r"cu_seqlens_cpu"),
    **{
        f"{name} stride": ({name: transposed(2, 6, heads, D)}, rf"{name} .*contiguous.*stride 6")
        for name, heads in {"q": 2, "k": 2, "v": 4, "g": 4, "output": 4}.items()
        for transposed in [lambda b, t, h, d: torch.zeros(b, h, d, t).permute(0, 3, 1, 2)]
    },
    "beta stride": ({"beta": zeros(2, 4, 6).transpose(1, 2)}, r"beta .*contiguous.*stride 6"),
    "state stride": ({"initial_state": transposed(2, 4, D, D)}, r"initial_state .*contiguous"),
}
DTYPES = {
    "q float64": ({"q": zeros(2, 6, 2, D, dtype=torch.float64)}, r"q .*float16.*got torch.float64"),
    "q int": ({"q": zeros(2, 6, 2, D, dtype=torch.int32)}, r"q .*torch.int32"),
    "q list": ({"q": [1.0]}, r"q .*Tensor.*list"),
    "k dtype": ({"k": zeros(2, 6, 2, D, dtype=torch.bfloat16)}, r"k .*float32.*bfloat16"),
    "v dtype": ({"v": zeros(2, 6, 4, D, dtype=torch.bfloat16)}, r"v .*float32.*bfloat16"),
    "g dtype": ({"g": zeros(2, 6, 4, D, dtype=torch.bfloat16)}, r"g .*float32.*bfloat16"),
    "beta dtype": ({"beta": zeros(2, 6, 4, dtype=torch.float16)}, r"beta .*float32.*float16"),
    "A_log dtype": ({"A_log": zeros(4, dtype=torch.int64)}, r"A_log .*int64"),
    "lower_bound type": ({"lower_bound": "-5"}, r"lower_bound .*str"),
    "scale type": ({"scale": torch.tensor(1.0)}, r"scale .*Tensor"),
    "output dtype": ({"output": zeros(2, 6, 4, D, dtype=torch.bfloat16)}, r"output .*bfloat16"),
    "initial_state dtype": (
        {"initial_state": zeros(2, 4, D, D, dtype=torch.bfloat16)},
        r"initial_state .*bfloat16",
    ),
    "final_state differs": (
        {"final_state": zeros(2, 4, D, D, dtype=torch.float16)},
        r"final_state .*float32.*float16",
    ),
    "cu_seqlens dtype": ({"cu_seqlens": zeros(3)}, r"cu_seqlens .*int32.*float32"),
}


@OPERATORS
@pytest.mark.parametrize("changes, message", SHAPES.values(), ids=SHAPES)
def test_shapes_and_values(operator, changes, message):
    with pytest.raises(ValueError, match=message):
        call(operator, **changes)


@OPERATORS
@pytest.mark.parametrize("changes, message", DTYPES.values(), ids=DTYPES)
def test_dtypes(operator, changes, message):
    lens = [6] if "cu_seqlens" in changes else None
    with pytest.raises(TypeError, match=message):
        call(operator, lens=lens, **changes)


@OPERATORS
@pytest.mark.parametrize(
    "name", ["k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "final_state", "output"]
)
def test_devices(operator, name):
    case = draw(B=2, T=6, Hqk=2, Hv=4)
    like = {"output": "v", "final_state": "initial_state"}.get(name, name)
    elsewhere = {name: torch.zeros_like(case.tensors[like], device="meta")}
    with pytest.raises(ValueError, match=rf"{name} .*cpu.*meta"):
        operator(**case.kwargs() | elsewhere)


CU_SEQLENS = {
    "decreases": ([0, 5, 3, 6], r"cu_seqlens must not decrease, got 5 followed by 3 at index 2"),
    "start": ([1, 3, 6], r"cu_seqlens must start at 0, got 1"),
    "negative": ([-2, 3, 6], r"cu_seqlens must start at 0, got -2"),
    "end short": ([0, 3, 5], r"cu_seqlens must end at 6.*got 5"),
    "end long": ([0, 3, 7], r"cu_seqlens must end at 6.*got 7"),
    "empty": ([], r"cu_seqlens must have shape \[num_seqs \+ 1\], got \[0\]"),
    "rank": ([[0, 6]], r"cu_seqlens must have shape \[num_seqs \+ 1\], got \[1, 2\]"),
}


@OPERATORS
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("bounds, message", CU_SEQLENS.values(), ids=CU_SEQLENS)
def test_cu_seqlens(operator, index, bounds, message):
    case = draw(lens=[6], state=False)
    cu_seqlens = torch.tensor(bounds, dtype=index)
    output = torch.full_like(case.tensors["v"], NAN)
    with pytest.raises(ValueError, match=message):
        operator(**case.kwargs() | {"cu_seqlens": cu_seqlens}, output=output)
    assert output.isnan().all()


def test_cu_seqlens_device_batch_and_copy():
    case = draw(lens=[6])
    bad = {"cu_seqlens": torch.zeros(2, dtype=torch.int64, device="meta")}
    with pytest.raises(ValueError, match=r"cu_seqlens must be on cpu, got meta"):
        mate.chunk_kda(**case.kwargs() | bad)
    copy = torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"cu_seqlens_cpu must end at 6"):
        mate.chunk_kda(**case.kwargs(), cu_seqlens_cpu=copy)
    with pytest.raises(ValueError, match=r"cu_seqlens_cpu must have .*\[2\].*\[3\]"):
        mate.chunk_kda(**case.kwargs(), cu_seqlens_cpu=torch.tensor([0, 5, 6]))
    batch = draw(B=2, T=3, state=False)
    with pytest.raises(ValueError, match=r"\[1, S, Hqk, 128\].*\[2, 3, 2, 128\]"):
        mate.chunk_kda(**batch.kwargs(), cu_seqlens=torch.tensor([0, 6]))


@OPERATORS
@pytest.mark.parametrize("name", ["output", "final_state"])
def test_overwriting_where_gradients_are_needed(operator, name):
    case = draw(B=2, T=6, Hv=4)
    case.tensors["v"].requires_grad_()
    like = case.tensors["v" if name == "output" else "initial_state"]
    buffer = {name: torch.full_like(like, NAN).detach()}
    with pytest.raises(ValueError, match=r"autograd cannot follow"):
        operator(**case.kwargs(), **buffer)
    assert buffer[name].isnan().all()
    with torch.no_grad():
        operator(**case.kwargs(), **buffer)
    assert not buffer[name].isnan().any()


@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
def test_output_that_is_an_input(name):
    case = draw(B=1, T=6)
    with pytest.raises(ValueError, match=rf"output must not overlap {name}"):
        mate.chunk_kda(**case.kwargs(), output=case.tensors[name])


def test_written_memory_that_overlaps():
    case = draw(B=1, T=6, Hv=2, Hqk=2)
    kwargs = case.kwargs()
    values = torch.randn(1, 7, 2, 128)
    with pytest.raises(ValueError, match=r"output must not overlap v"):
        mate.chunk_kda(**kwargs | {"v": values[:, :6]}, output=values[:, 1:])
    states = torch.randn(2, 2, 128, 128)
    before = states.clone()
    with pytest.raises(ValueError, match=r"final_state must not overlap initial_state"):
        mate.chunk_kda(
            **kwargs | {"initial_state": states[:1]}, final_state=states.view(-1)[64:][: 2 * 128**2]
            .view(1, 2, 128, 128)
        )  # fmt: skip
    assert torch.equal(states, before)
    state = states.view(-1)[: 6 * 2 * 128].view(1, 6, 2, 128)
    with pytest.raises(ValueError, match=r"final_state must not overlap output"):
        mate.chunk_kda(**kwargs, output=state, final_state=states[:1])
    # beside one another in the same buffer, or in turns, is fine
    mate.chunk_kda(**kwargs | {"initial_state": states[:1]}, final_state=states[1:])
    both = torch.randn(1, 6, 2, 256)
    v, output = both[..., :128], both[..., 128:]
    expected = mate.chunk_kda(**kwargs | {"v": v.clone()})
    assert torch.equal(mate.chunk_kda(**kwargs | {"v": v}, output=output), expected)


def test_a_copy_of_cu_seqlens_that_differs():
    case = draw(lens=[4, 8])
    with pytest.raises(ValueError, match=r"cu_seqlens_cpu must hold .*\[0, 4, 12\].*\[0, 9, 12\]"):
        mate.chunk_kda(**case.kwargs(), cu_seqlens_cpu=torch.tensor([0, 9, 12]))
