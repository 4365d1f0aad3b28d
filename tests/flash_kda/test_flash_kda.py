"""The FlashKDA API: what a framework written against it calls, and what it must find written."""

import inspect

import pytest
import torch
from kda_cases import BOUNDS, draw, rel_rms

import flash_kda

ORDER = ("q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound")
OPTIONAL = ("initial_state", "final_state", "cu_seqlens")


def test_signatures():
    parameters = inspect.signature(flash_kda.fwd).parameters
    assert tuple(parameters) == ORDER + OPTIONAL
    assert all(parameters[name].default is None for name in OPTIONAL)
    assert isinstance(flash_kda.get_workspace_size(8192, 32), int)
    torch.empty(flash_kda.get_workspace_size(T_total=8192, H=32, N=4), dtype=torch.uint8)


@pytest.mark.parametrize("lens", [None, [0, 40, 23]])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_fwd(lens, state_dtype):
    case = draw(B=2, T=63, lens=lens, dtype=torch.bfloat16, scale=0.1)
    case.tensors["initial_state"] = case.tensors["initial_state"].to(state_dtype)
    t = case.tensors
    for x in t.values():
        if x.is_floating_point():
            x.requires_grad_()  # a framework may call it on parameters: nothing is recorded
    out = torch.full_like(t["v"], torch.nan).detach()
    final_state = torch.full_like(t["initial_state"], torch.nan).detach()
    result = flash_kda.fwd(
        t["q"], t["k"], t["v"], t["g"], t["beta"], 0.1, out, t["A_log"], t["dt_bias"], -5.0,
        t["initial_state"], final_state, t.get("cu_seqlens"),
    )  # fmt: skip
    assert result is None
    expected = case.reference()
    assert rel_rms(out, expected[0].detach()) < BOUNDS[torch.bfloat16][0]
    assert rel_rms(final_state, expected[1].detach()) < BOUNDS[torch.bfloat16][1]


def test_stateless_and_bad_input():
    case = draw(T=20, state=False)
    t = case.tensors
    out = torch.full_like(t["v"], torch.nan)
    arguments = [t["q"], t["k"], t["v"], t["g"], t["beta"], 1.0, out, t["A_log"], t["dt_bias"]]
    with pytest.raises(ValueError, match="lower_bound"):
        flash_kda.fwd(*arguments, 0.0)
    assert out.isnan().all()
    flash_kda.fwd(*arguments, -5.0)
    case.options["scale"] = 1.0
    assert rel_rms(out, case.reference()[0]) < 1e-5
