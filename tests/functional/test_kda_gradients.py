"""Gradients of every input against autograd through the float64 recurrence."""

import pytest
import torch
from kda_cases import BOUNDS, draw, rel_rms

import mate
from mate.backends import pytorch
from mate.functional import kda_reference


def name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def gradients(case, function, d_output, d_state):
    """d(function) by name, for the cotangents given."""
    inputs = {
        key: x.detach().clone().requires_grad_() if x.is_floating_point() else x
        for key, x in case.tensors.items()
    }
    output, state = function(**inputs, **case.options)
    loss = (output.double() * d_output).sum() + (state.double() * d_state).sum()
    leaves = {key: x for key, x in inputs.items() if x.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def check(case, operator=mate.chunk_kda):
    def call(**kwargs):
        return operator(**kwargs, output_final_state=True)

    output, state = case.reference()
    d_output, d_state = torch.randn_like(output), torch.randn_like(state)
    found = gradients(case, call, d_output, d_state)
    expected = gradients(case, kda_reference, d_output, d_state)
    bound = BOUNDS[case.tensors["q"].dtype][2]
    for key, grad in found.items():
        assert grad.dtype == case.tensors[key].dtype and grad.shape == case.tensors[key].shape
        assert grad.isfinite().all(), key
        error = rel_rms(grad, expected[key])
        assert error <= bound, f"d{key}: relative RMS error {error:.2e} > {bound:.0e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("gate", ["bounded", "softplus", "log"])
@pytest.mark.parametrize("regime", ["forgetting", "remembering", "mixed"])
def test_gates(gate, regime, dtype):
    check(draw(B=2, T=70, Hqk=1, Hv=2, gate=gate, regime=regime, dtype=dtype))


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
def test_lengths(operator, T):
    check(draw(T=T, Hqk=1, Hv=1, seed=T), operator)


@pytest.mark.parametrize("gate, regime", [("log", "strong"), ("log", "erasing")])
def test_hard_gates(gate, regime):
    """A decay of exactly 0 has no gradient; the reference's is 0 * -inf where a is -inf."""
    case = draw(T=70, Hqk=1, Hv=1, gate=gate, regime=regime)
    case.tensors["g"] = case.tensors["g"].clamp_min(-200.0)
    check(case)


def test_minus_infinity_gives_finite_gradients():
    case = draw(T=40, Hqk=1, Hv=1, gate="log", regime="erasing")
    inputs = {k: x.requires_grad_() for k, x in case.tensors.items()}
    mate.chunk_kda(**inputs).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs.values())
    gated = draw(T=40, Hqk=1, Hv=1)
    gated.tensors["g"][:, 5:9] = -torch.inf
    gated.tensors["beta"][:, 5:9] = -torch.inf
    inputs = {k: x.requires_grad_() for k, x in gated.tensors.items()}
    mate.chunk_kda(**inputs).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs.values())


@pytest.mark.parametrize("cosine", [0.75, 0.9, 0.99])
def test_correlated_keys(cosine):
    check(draw(T=100, Hqk=1, Hv=1, gate="log", regime="remembering", cosine=cosine))


@pytest.mark.parametrize("Hqk, Hv", [(1, 3), (2, 4)])
def test_grouped_heads(Hqk, Hv):
    check(draw(B=2, T=20, Hqk=Hqk, Hv=Hv))


@pytest.mark.parametrize("rank", [3, 4])
def test_varlen(rank):
    case = draw(lens=[0, 17, 1, 70, 0], Hv=4)
    if rank == 3:
        for key in ("q", "k", "v", "g", "beta"):
            case.tensors[key] = case.tensors[key].squeeze(0)
    check(case)


@pytest.mark.parametrize(
    "options",
    [
        {"state_v_first": False},
        {"use_qk_l2norm_in_kernel": False, "scale": 0.01},
        {"use_beta_sigmoid_in_kernel": False},
        {"allow_neg_eigval": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options):
    case = draw(B=2, T=35, Hv=2, **options)
    if options.get("use_beta_sigmoid_in_kernel") is False:
        case.tensors["beta"] = case.tensors["beta"].sigmoid()
    if options.get("use_qk_l2norm_in_kernel") is False:
        case.tensors["k"] = torch.nn.functional.normalize(case.tensors["k"], dim=-1)
    check(case)


def test_many_slabs(monkeypatch):
    """A backward pass cut into slabs of 64 tokens equals the whole one."""
    monkeypatch.setattr(pytorch, "SLAB_BYTES", 1)
    check(draw(B=2, T=200, Hqk=1, Hv=2, regime="remembering"))
    check(draw(lens=[130, 70], Hqk=1, Hv=1))


def test_dt_bias_gradient_is_summed_in_fp32():
    """Rounding each token's term to bf16 first is a known bug elsewhere."""
    case = draw(B=4, T=200, Hqk=1, Hv=1, dtype=torch.bfloat16)
    output, state = case.reference()
    d_output, d_state = torch.ones_like(output), torch.zeros_like(state)

    def call(**kwargs):
        return mate.chunk_kda(**kwargs, output_final_state=True)

    found = gradients(case, call, d_output, d_state)["dt_bias"]
    expected = gradients(case, kda_reference, d_output, d_state)["dt_bias"]
    assert found.dtype == torch.float32 and rel_rms(found, expected) < 1e-4


def test_only_what_is_asked():
    """The final state alone, the output alone, and no gradient where none is needed."""
    case = draw(T=20)
    inputs = case.kwargs()
    inputs["v"].requires_grad_()
    output, state = mate.chunk_kda(**inputs, output_final_state=True)
    (only_state,) = torch.autograd.grad(state.sum(), inputs["v"], retain_graph=True)
    (only_output,) = torch.autograd.grad(output.sum(), inputs["v"])
    both = mate.chunk_kda(**inputs, output_final_state=True)
    (sum_of_both,) = torch.autograd.grad(both[0].sum() + both[1].sum(), inputs["v"])
    assert rel_rms(only_state + only_output, sum_of_both) < 1e-6
    assert only_state.abs().max() > 0 and inputs["q"].grad is None


@pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
def test_second_derivatives_are_refused(operator):
    """First-order gradients with create_graph are right; going through them is an error."""
    case = draw(T=20)
    v = case.tensors["v"].requires_grad_()
    (plain,) = torch.autograd.grad(operator(**case.kwargs()).square().sum(), v)
    (grad,) = torch.autograd.grad(operator(**case.kwargs()).square().sum(), v, create_graph=True)
    assert torch.equal(grad, plain)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_autocast_rounds_nothing(dtype, monkeypatch):
    """The operator's dtypes are its inputs', inside an autocast region too."""
    monkeypatch.setenv("MATE_DISABLE", "native")
    case = draw(T=70, gate="softplus", regime="remembering", dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = mate.chunk_kda(**case.kwargs(), output_final_state=True)
        expected = case.reference()
        assert rel_rms(output, expected[0]) <= BOUNDS[dtype][0]
        assert rel_rms(state, expected[1]) <= 1e-5
        check(case)


def test_autograd_sees_what_was_overwritten():
    case = draw(T=1)
    state, weight = case.tensors["initial_state"], torch.randn(128, requires_grad=True)
    loss = (state * weight).sum()
    with torch.no_grad():
        mate.recurrent_kda(**case.kwargs(), final_state=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
