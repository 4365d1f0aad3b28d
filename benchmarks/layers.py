"""Whole layers for the benchmarks: mate's, transformers', and the products that both contain."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from mate.layers import KDACache, KimiDeltaAttention

THEIRS, OURS, PRODUCTS = "transformers' layer", "mate's layer", "its matrix products alone"
FUSED = "mate's layer, projections fused"
PROMPT = 8  # tokens in the caches before a step is timed


def layers(
    hidden: int, heads: int, dtype: torch.dtype
) -> tuple[KimiDeltaAttention, KimiLinearDeltaAttention, KimiLinearConfig]:
    """mate's layer and transformers' with the same parameters."""
    torch.manual_seed(0)
    config = KimiLinearConfig(
        **{"vocab_size": 32, "hidden_size": hidden, "num_hidden_layers": 2},
        **{"linear_num_heads": heads, "linear_head_dim": 128},
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "dense"],
    )
    theirs = KimiLinearDeltaAttention(config, 0).eval()
    ours = KimiDeltaAttention(hidden, heads, norm_eps=config.rms_norm_eps, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.02)
        theirs.forget_gate.A_log.copy_(ours.A_log.view_as(theirs.forget_gate.A_log))
        theirs.forget_gate.dt_bias.copy_(ours.dt_bias.view_as(theirs.forget_gate.dt_bias))
        theirs.o_norm.weight.fill_(1)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype), config


def products(layer: KimiDeltaAttention, x: Tensor) -> Callable[[], Tensor]:
    """Every projection of the layer, and nothing else."""
    mixed = torch.randn(*x.shape[:-1], layer.o_proj.in_features, dtype=x.dtype)

    def call() -> Tensor:
        for name in ("q_proj", "k_proj", "v_proj", "b_proj"):
            getattr(layer, name)(x)
        layer.f_b_proj(layer.f_a_proj(x))
        layer.g_b_proj(layer.g_a_proj(x))
        return layer.o_proj(mixed)

    return call


def prefill_paths(
    tokens: int, hidden: int, heads: int, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    ours, theirs, _ = layers(hidden, heads, dtype)
    x = torch.randn(1, tokens, hidden, dtype=dtype)
    return {THEIRS: lambda: theirs(x), OURS: lambda: ours(x), PRODUCTS: products(ours, x)}


def decode_paths(hidden: int, heads: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One step of each layer on a cache of its own, and of ours with fused projections."""
    ours, theirs, config = layers(hidden, heads, dtype)
    prompt = torch.randn(1, PROMPT, hidden, dtype=dtype)
    x = torch.randn(1, 1, hidden, dtype=dtype)
    fused = copy.deepcopy(ours)
    if not fused.fuse_projections():
        raise RuntimeError("the projections cannot be fused")
    our_cache, fused_cache, their_cache = KDACache(), KDACache(), DynamicCache(config=config)
    ours(prompt, cache=our_cache)
    fused(prompt, cache=fused_cache)
    theirs(prompt, cache_params=their_cache)
    return {
        THEIRS: lambda: theirs(x, cache_params=their_cache),
        OURS: lambda: ours(x, cache=our_cache),
        FUSED: lambda: fused(x, cache=fused_cache),
        PRODUCTS: products(ours, x),
    }
