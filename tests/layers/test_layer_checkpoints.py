"""The three namings of one layer's parameters."""

import copy

import pytest
import torch
from layer_truth import make_layer
from torch import nn


def as_transformers(state):
    """Names and shapes of transformers' KimiLinearDeltaAttention."""
    state = dict(state)
    convs = [state.pop(f"{s}_conv1d.weight") for s in "qkv"]
    state["conv1d.weight"] = torch.cat(convs)
    for name in ("f_a_proj.weight", "f_b_proj.weight", "dt_bias", "A_log"):
        state[f"forget_gate.{name}"] = state.pop(name)
    state["forget_gate.A_log"] = state["forget_gate.A_log"].view(1, 1, -1, 1)
    return state


def as_fla(state):
    """Names of flash-linear-attention's KimiDeltaAttention."""
    state = dict(state)
    for gate in "fg":
        state[f"{gate}_proj.0.weight"] = state.pop(f"{gate}_a_proj.weight")
        state[f"{gate}_proj.1.weight"] = state.pop(f"{gate}_b_proj.weight")
    state["g_proj.1.bias"] = torch.zeros_like(state["dt_bias"])
    return state


NAMINGS = {"published": dict, "transformers": as_transformers, "fla": as_fla}


@pytest.mark.parametrize("variant", [{}, {"num_v_heads": 4, "conv_size": 3}])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("naming", NAMINGS)
def test_loads(naming, nested, variant):
    source, target = make_layer(**variant), make_layer(seed=1, **variant)
    state = NAMINGS[naming](source.state_dict())
    if nested:
        state = {f"layers.1.{key}": value for key, value in state.items()}
        first = make_layer(seed=2, **variant)
        state |= {f"layers.0.{key}": value for key, value in first.state_dict().items()}
        model = nn.ModuleDict({"layers": nn.ModuleList([make_layer(seed=3, **variant), target])})
    else:
        model = target
    keys = list(state)
    model.load_state_dict(state)
    assert list(state) == keys, "the caller's dictionary is the caller's"
    for name, expected in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], expected), name


def test_copies_load_too():
    source, target = make_layer(), copy.deepcopy(make_layer(seed=1))
    target.load_state_dict(as_transformers(source.state_dict()))
    assert torch.equal(target.A_log, source.A_log)
    assert torch.equal(target.k_conv1d.weight, source.k_conv1d.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_16_bit_checkpoint_leaves_decays_fp32(assign):
    source, target = make_layer(), make_layer(seed=1)
    state = {key: value.bfloat16() for key, value in source.state_dict().items()}
    target.load_state_dict(state, assign=assign)
    assert target.A_log.dtype == target.dt_bias.dtype == torch.float32
    assert target.A_log._no_weight_decay
    assert torch.equal(target.A_log, source.A_log.bfloat16().float())
    assert target.q_proj.weight.dtype == (torch.bfloat16 if assign else torch.float32)


def test_refuses_what_it_cannot_represent():
    layer = make_layer()
    state = as_fla(layer.state_dict())
    state["g_proj.1.bias"][3] = 0.25
    with pytest.raises(ValueError, match=r"g_proj\.1\.bias must be all zeros.*0\.25"):
        layer.load_state_dict(state)
    state = as_transformers(layer.state_dict())
    state["conv1d.weight"] = state["conv1d.weight"][:-1]
    with pytest.raises(ValueError, match=r"conv1d\.weight must have 768 channels.*767"):
        layer.load_state_dict(state)
    state = dict(layer.state_dict())
    state["forget_gate.A_log"] = state["A_log"]
    with pytest.raises(ValueError, match=r"A_log is given twice"):
        layer.load_state_dict(state)
    state = dict(layer.state_dict())
    state["A_log"] = torch.zeros(7)
    with pytest.raises(RuntimeError, match="A_log"):
        layer.load_state_dict(state)
    state = dict(layer.state_dict())
    del state["b_proj.weight"]
    state["b_proj.bias"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"(?s)b_proj\.weight.*b_proj\.bias"):
        layer.load_state_dict(state)


def test_own_names_round_trip():
    layer = make_layer(num_v_heads=4)
    assert set(layer.state_dict()) == {
        *(f"{s}_proj.weight" for s in "qkvbo"),
        *(f"{s}_conv1d.weight" for s in "qkv"),
        *(f"{g}_{r}_proj.weight" for g in "fg" for r in "ab"),
        "A_log",
        "dt_bias",
        "o_norm.weight",
    }
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes["q_conv1d.weight"] == (256, 1, 4) and shapes["v_conv1d.weight"] == (512, 1, 4)
    assert shapes["A_log"] == (4,) and shapes["dt_bias"] == (512,)
    assert shapes["f_b_proj.weight"] == shapes["g_b_proj.weight"] == (512, 128)
    assert shapes["b_proj.weight"] == (4, 48) and shapes["o_norm.weight"] == (128,)
