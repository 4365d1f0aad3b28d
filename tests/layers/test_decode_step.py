"""The fused decode step: its own errors, and the same as the layer's parts called one by one."""

import contextlib

import pytest
import torch
from kda_cases import rel_rms
from layer_truth import make_layer
from torch import Tensor, nn

from mate.backends import native_layer
from mate.backends.prepared import Prepared
from mate.functional import decode_step
from mate.functional.decode_step import kda_decode_step
from mate.functional.repeated import Remembered
from mate.layers import KDACache
from mate.layers.mixer import DeltaMixer

B, HQK, HV, D, W = 2, 1, 3, 128, 4
HIDDEN = 48
ORDER = (
    *("q", "k", "v", "g", "beta", "output_gate", "conv_state", "state"),
    *("q_weight", "k_weight", "v_weight", "A_log", "dt_bias", "norm_weight"),
)


def draw(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    keys, values = HQK * D, HV * D
    shapes = {
        **{"q": (B, keys), "k": (B, keys), "v": (B, values), "g": (B, values), "beta": (B, HV)},
        **{"output_gate": (B, values), "conv_state": (B, 2 * keys + values, W)},
        **{"q_weight": (keys, W), "k_weight": (keys, W), "v_weight": (values, W)},
    }
    t = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    t |= {"state": torch.randn(B, HV, D, D), "A_log": torch.rand(HV)}
    t |= {"dt_bias": torch.rand(values), "norm_weight": torch.rand(D).to(dtype)}
    return {name: t[name] for name in ORDER}


WRONG = {
    "q": (lambda x: x.double(), TypeError, r"q must be fp16, bf16 or fp32, got torch.float64"),
    "k": (lambda x: x.half(), TypeError, r"k must have q's dtype torch.float32, got torch.float16"),
    "v": (lambda x: x[:, :-1], ValueError, r"q and v must be .*\(2, 383\)"),
    "g": (lambda x: x.double(), TypeError, r"g must be torch.float32 .*got torch.float64"),
    "beta": (lambda x: x.int(), TypeError, r"beta must be torch.float32 .*got torch.int32"),
    "output_gate": (lambda x: x[:1], ValueError, r"output_gate must be \[2, 384\].*\(1, 384\)"),
    "conv_state": (lambda x: x.mT.contiguous().mT, ValueError, r"conv_state must be contiguous"),
    "state": (lambda x: x.double(), TypeError, r"state must be torch.float32 .*got torch.float64"),
    "q_weight": (lambda x: x[:, :3], ValueError, r"conv_state must be \[2, 640, 3\]"),
    "v_weight": (lambda x: x[1:], ValueError, r"v_weight must be \[384, 4\].*\(383, 4\)"),
    "A_log": (lambda x: x.to("meta"), ValueError, r"A_log must be on cpu like q, got meta"),
    "dt_bias": (lambda x: x[1:], ValueError, r"dt_bias must be \[384\].*\(383,\)"),
    "norm_weight": (lambda x: x[None], ValueError, r"norm_weight must be \[128\].*\(1, 128\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_leave_the_states_alone(name: str) -> None:
    t = draw()
    states = t["conv_state"].clone(), t["state"].clone()
    spoil, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        kda_decode_step(*(t | {name: spoil(t[name])}).values())
    assert torch.equal(t["conv_state"], states[0]) and torch.equal(t["state"], states[1])


@pytest.mark.parametrize("name", [n for n in ORDER if n not in ("q", "v", *ORDER[8:11])])
def test_only_convolution_weights_may_have_a_dimension_more(name: str) -> None:
    t = {n: x[:, None] if n in ORDER[:6] else x for n, x in draw().items()}
    t[name] = torch.zeros(t[name].shape[0], 1, W)
    with pytest.raises(ValueError, match=rf"{name} must be .*\(\d+, 1, {W}\)"):
        kda_decode_step(*t.values())


@pytest.mark.parametrize("v_first", [True, False])
@pytest.mark.parametrize("middle", [False, True], ids=["[B, C]", "[B, 1, C]"])
def test_fused_is_the_same_as_step_by_step(
    middle: bool, v_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for fused in (True, False):
        t = draw()
        # rows of one wider product: strided
        wide = torch.cat([t[name] for name in ORDER[:6]], dim=1)
        rows = wide.split([t[name].shape[1] for name in ORDER[:6]], dim=1)
        t |= {n: x[:, None] if middle else x for n, x in zip(ORDER[:6], rows, strict=True)}
        if not fused:
            monkeypatch.setattr(native_layer, "has_kernels", lambda _: False)
        options = {"lower_bound": -5.0, "allow_neg_eigval": True, "state_v_first": v_first}
        y = kda_decode_step(*t.values(), **options)
        assert y.shape == t["v"].shape and y.is_contiguous()
        results.append((y, t["conv_state"], t["state"]))
    for a, b in zip(*results, strict=True):
        assert rel_rms(a, b) < 2e-6
    assert torch.equal(results[0][1], results[1][1])


FORMS = {
    "as drawn": lambda t: {},
    "[B, 1, C]": lambda t: {n: t[n][:, None] for n in ORDER[:6]},
    "strided rows": lambda t: {n: torch.cat([t[n]] * 2, 1)[:, : t[n].shape[1]] for n in ORDER[:6]},
    "fp32 gates": lambda t: {n: t[n].float() for n in ORDER[3:6]},
    "fp32 weights": lambda t: {n: t[n].float() for n in (*ORDER[8:11], "norm_weight")},
    "nn.Conv1d's weights": lambda t: {n: t[n][:, None] for n in ORDER[8:11]},
    "state": lambda t: {"state": t["state"].to(t["q"].dtype)},
    "fp64 A_log": lambda t: {"A_log": t["A_log"].double()},
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_like_the_one_before(
    dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It skips the checks: with other values at other addresses, and not where it may not."""
    monkeypatch.setattr(decode_step, "_repeated", Remembered())
    run, short = Prepared.run, []
    monkeypatch.setattr(Prepared, "run", lambda *args: short.append(args) or run(*args))
    options = {"lower_bound": -5.0, "allow_neg_eigval": True}
    calls = [t | FORMS[form](t) for t in (draw(dtype), draw(dtype))]
    for x in calls[1].values():
        x.copy_(x.flip(-1))
    for t in calls:
        others = {name: x.clone() for name, x in t.items()}
        versions = t["conv_state"]._version, t["state"]._version
        y = kda_decode_step(*t.values(), **options)
        assert (t["conv_state"]._version, t["state"]._version) > versions
        taken = t is calls[1] and form != "fp64 A_log"
        assert len(short) == taken and y.shape == t["v"].shape
        with monkeypatch.context() as patch:
            patch.setenv("MATE_DISABLE", "native")
            expected = kda_decode_step(*others.values(), **options)
        for a, b in ((y, expected), *((t[n], others[n]) for n in ("conv_state", "state"))):
            assert rel_rms(a, b) < (2e-6 if dtype == torch.float32 else 1e-2)
    with torch.profiler.profile() as profile:
        kda_decode_step(*t.values(), **options)
    assert "mate::kda_decode_step" in {event.name for event in profile.events()}
    kda_decode_step(*t.values(), **options, state_indices=torch.tensor([1, 0]))
    states = t["conv_state"].clone(), t["state"].clone()
    with pytest.raises(ValueError, match="got 1 twice"):
        kda_decode_step(*t.values(), **options, state_indices=torch.tensor([1, 1]))
    assert torch.equal(t["conv_state"], states[0]) and torch.equal(t["state"], states[1])
    assert len(short) == taken


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for indices in (None, torch.tensor([1, 0])):
            args = (*draw(dtype).values(), 1e-5, None, False, True, indices)
            torch.library.opcheck(torch.ops.mate.kda_decode_step.default, args)


@pytest.mark.parametrize("native", [True, False], ids=["native", "pytorch"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_of_a_pool(
    dtype: torch.dtype, index: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row as from its own slot; outside the pool from zeros; other slots keep their bits."""
    if not native:
        monkeypatch.setattr(native_layer, "has_kernels", lambda _: False)
    t = draw(dtype)
    for indices in ([3, 1], [0, -1], [-1, 99], [-7, 4]):
        pools = {
            "conv_state": torch.randn(5, 5 * D, W).to(dtype),
            "state": torch.randn(5, HV, D, D),
        }
        if native:  # what must not be read
            for x in pools.values():
                x[[i for i in range(5) if i not in indices]] = torch.nan
        before = {name: x.clone() for name, x in pools.items()}
        used = [i if 0 <= i < 5 else None for i in indices]
        own = {
            name: torch.stack([torch.zeros_like(x[0]) if i is None else x[i] for i in used])
            for name, x in before.items()
        }
        expected = kda_decode_step(*(t | own).values())
        options = {"state_indices": torch.tensor(indices, dtype=index)}
        assert torch.equal(kda_decode_step(*(t | pools).values(), **options), expected)
        for name, x in pools.items():
            for row, i in enumerate(used):
                if i is not None:
                    before[name][i] = own[name][row]
            assert torch.equal(x.nan_to_num(7.5), before[name].nan_to_num(7.5)), name


def test_errors_of_indices() -> None:
    t = draw()
    for indices, error, message in (
        (torch.tensor([0]), ValueError, r"state_indices must have shape \[B\] = \[2\], got \[1\]"),
        (torch.tensor([0.0, 1.0]), TypeError, r"state_indices must be torch.int32.*float32"),
        (torch.tensor([0, 1], device="meta"), ValueError, r"state_indices must be on cpu.*meta"),
        (torch.tensor([1, 1]), ValueError, r"state_indices .*slot of its own, got 1 twice"),
        (torch.arange(4)[::2], ValueError, r"state_indices must be contiguous.*\(2,\)"),
    ):
        before = t["state"].clone()
        with pytest.raises(error, match=message):
            kda_decode_step(*t.values(), state_indices=indices)
        assert torch.equal(t["state"], before)
    with pytest.raises(ValueError, match=r"conv_state must be \[7, 640, 4\]"):
        pool = {"state": torch.zeros(7, HV, D, D)}
        kda_decode_step(*(t | pool).values(), state_indices=torch.tensor([0, 1]))


# ---- in the layer -------------------------------------------------------------------------------


def steps(layer: nn.Module, dtype: torch.dtype, context: contextlib.AbstractContextManager):
    """Output of two decoding steps after a prompt, and the states behind them."""
    torch.manual_seed(1)
    x, cache = torch.randn(2, 7, HIDDEN).to(dtype), KDACache()
    with torch.no_grad(), context:
        layer(x[:, :5], cache=cache)
        y = torch.cat([layer(x[:, i : i + 1], cache=cache) for i in (5, 6)], dim=1)
    return y, cache.get_conv_state(0), cache.get_recurrent_state(0)


def autocast() -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16)


CASES = {
    "fp32": (torch.float32, contextlib.nullcontext, 2e-6),
    "bf16": (torch.bfloat16, contextlib.nullcontext, 1e-2),
    "autocast": (torch.float32, autocast, 1e-2),
    "fp32-convolutions": (torch.bfloat16, contextlib.nullcontext, 1e-2),
}


@pytest.mark.parametrize("name", CASES)
def test_the_layer_decodes_alike_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, context, bound = CASES[name]
    layer = make_layer(num_v_heads=4, lower_bound=-5.0).to(dtype)
    if name == "fp32-convolutions":
        for conv in layer.short_convs():
            conv.float()
    decode, decoded = DeltaMixer._decode, []
    monkeypatch.setattr(
        DeltaMixer, "_decode", lambda *args: decoded.append(decode(*args)) or decoded[-1]
    )
    fused = steps(layer, dtype, context())
    assert len(decoded) == 2 and all(y is not None for y in decoded)
    monkeypatch.setattr(DeltaMixer, "_decode", lambda *_: None)
    for a, b in zip(fused, steps(layer, dtype, context()), strict=True):
        assert a.dtype == b.dtype and rel_rms(a, b) < bound


def test_hooks_are_called() -> None:
    layer, seen = make_layer(), []

    def hook(module: nn.Module, *_: object) -> None:
        seen.append(type(module).__name__)

    expected = steps(layer, torch.float32, contextlib.nullcontext())
    one = layer.o_norm.register_forward_hook(hook)
    found = steps(layer, torch.float32, contextlib.nullcontext())
    one.remove()
    assert seen == ["GatedRMSNorm"] * 3  # prompt and two steps
    every = nn.modules.module.register_module_forward_hook(hook)
    steps(layer, torch.float32, contextlib.nullcontext())
    every.remove()
    assert seen.count("ShortConvolution") == 9 and seen.count("GatedRMSNorm") == 6
    for a, b in zip(expected, found, strict=True):
        assert rel_rms(a, b) < 2e-6


def test_a_state_of_another_dtype_is_refused_on_every_path() -> None:
    layer, cache = make_layer(), KDACache()
    x = torch.randn(1, 4, HIDDEN)
    with torch.no_grad():
        layer(x, cache=cache)
        cache.update_recurrent_state(cache.get_recurrent_state(0).bfloat16(), 0)
        for tokens in (1, 2):
            with pytest.raises(TypeError, match="initial_state must be torch.float32"):
                layer(x[:, :tokens], cache=cache)


def test_autograd_sees_that_the_states_were_overwritten() -> None:
    layer, cache = make_layer(), KDACache()
    x = torch.randn(1, 4, HIDDEN)
    with torch.no_grad():
        layer(x, cache=cache)
    weight = torch.randn(128, requires_grad=True)
    loss = (cache.get_recurrent_state(0) * weight).sum()
    with torch.no_grad():
        layer(x[:, :1], cache=cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
