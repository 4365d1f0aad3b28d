"""Tiny models whose every weight matters."""

import torch
import transformers
from transformers import KimiLinearConfig, KimiLinearForCausalLM

from mate.hf import MateLlamaConfig, MateLlamaForCausalLM

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

KDA, ATTENTION = "linear_attention", "full_attention"
VOCABULARY = 97
TOKENS = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.1,
}


def rel(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS error; NaN counts as infinitely wrong."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape
    error = (got - expected).norm() / expected.norm().clamp_min(1e-30)
    return error.nan_to_num(nan=torch.inf).item()


def kimi(head_dim: int = 128, seed: int = 0) -> KimiLinearForCausalLM:
    torch.manual_seed(seed)
    config = KimiLinearConfig(
        **TOKENS,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        qk_nope_head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        linear_num_heads=2,
        linear_head_dim=head_dim,
        layer_types=[KDA, ATTENTION, KDA],
        mlp_layer_types=["dense", "sparse", "sparse"],
    )
    return KimiLinearForCausalLM(config).eval()


def hybrid_config(layer_types: list[str], **options) -> MateLlamaConfig:
    options = TOKENS | {"linear_num_heads": 1} | options
    return MateLlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=len(layer_types),
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=layer_types,
        **options,
    )


def hybrid(layer_types: list[str], seed: int = 0, **options) -> MateLlamaForCausalLM:
    torch.manual_seed(seed)
    return MateLlamaForCausalLM(hybrid_config(layer_types, **options)).eval()


def prompt(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)
