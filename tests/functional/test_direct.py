"""Calls that go around torch.library: only where nobody would notice but the clock."""

import pytest
import torch
from kda_cases import draw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mate
from mate.functional.direct import is_direct
from mate.functional.gated_norm import gated_rms_norm
from mate.functional.short_conv import short_conv


class Subclass(torch.Tensor):
    pass


class Passing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_plain_tensors_are():
    x = torch.zeros(2)
    assert is_direct(x, None, nn.Parameter(x, requires_grad=False))
    assert not is_direct(x, nn.Parameter(x))
    with torch.no_grad():
        assert is_direct(x, nn.Parameter(x))
    with torch.inference_mode():
        assert is_direct(x, nn.Parameter(x), torch.zeros(2))


def test_nothing_else_is():
    x = torch.zeros(2)
    assert not is_direct(x.to("meta"))
    assert not is_direct(x, x.as_subclass(Subclass))
    assert not is_direct(x, torch.zeros(2, dtype=torch.complex64).conj().imag)
    assert not torch.func.vmap(lambda row: torch.tensor(is_direct(row)))(x[None]).item()
    found = []
    torch.jit.trace(lambda row: found.append(is_direct(row)) or row + 1, x, check_trace=False)
    with torch.device("cpu"):
        found.append(is_direct(x))
    with Passing():
        found.append(is_direct(x))
    with Seen():
        found.append(is_direct(x))
    with FakeTensorMode() as mode:
        found += [is_direct(x), is_direct(mode.from_tensor(x))]
    with torch.profiler.profile():
        found.append(is_direct(x))
    assert not any(found) and is_direct(x)


@pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
def test_modes_and_profiles_see_the_operator(operator):
    case = draw(T=3)
    expected = operator(**case.kwargs())
    with Seen() as seen:
        assert torch.equal(operator(**case.kwargs()), expected)
    assert "mate::kda" in seen.names
    with torch.profiler.profile() as profile:
        operator(**case.kwargs())
    assert any(event.name == "mate::kda" for event in profile.events())


def test_meta_and_fake_tensors_have_shapes_only():
    case = draw(lens=[3, 4])
    there = {name: x.to("meta") for name, x in case.tensors.items()}
    output, state = mate.chunk_kda(**there, output_final_state=True)
    assert output.is_meta and output.shape == (1, 7, 2, 128) and state.shape == (2, 2, 128, 128)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in case.tensors.items()}
        assert mate.recurrent_kda(**fake).shape == (1, 7, 2, 128)


def test_both_ways_are_the_same():
    """Also in what they overwrite, and in telling autograd about it."""
    for options in ({}, {"output_final_state": True}):
        case = draw(B=2, T=4)
        found = mate.chunk_kda(**case.kwargs(), **options)
        with Seen():
            expected = mate.chunk_kda(**case.kwargs(), **options)
        pairs = zip(found, expected, strict=True) if options else [(found, expected)]
        assert all(torch.equal(a, b) for a, b in pairs)
    case = draw(B=2, T=1)
    state, weight = case.tensors["initial_state"], torch.randn(128, requires_grad=True)
    loss, version = (state * weight).sum(), state._version
    mate.recurrent_kda(**case.kwargs(), final_state=state)
    assert state._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_forward_mode_is_refused(grad):
    """It would lose the tangents: a derivative of zero."""
    tensors = draw(T=3).tensors
    tensors["q"].requires_grad_(grad)
    v = tensors["v"]
    for call in (
        lambda v: mate.chunk_kda(**tensors | {"v": v}),
        lambda v: mate.recurrent_kda(**tensors | {"v": v}),
        lambda v: short_conv(v.flatten(2), tensors["q"].flatten(2)[0].mT),
        lambda v: gated_rms_norm(v, tensors["q"], tensors["q"][0, 0, 0]),
    ):
        with forward_ad.dual_level():
            call(v)
            with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
                call(forward_ad.make_dual(v, v))
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            torch.func.jvp(call, (v,), (v,))
