"""Tiny models whose every weight matters."""

import pytest
import torch
import transformers
from kda_cases import rel_rms
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


PACKING = ("cu_seqlens", "cu_seq_lens_q", "seq_idx", "cu_seqlens and position_ids")


def packing(kind: str, lengths: list[int], rows: int) -> dict[str, torch.Tensor]:
    """Arguments that cut each of ``rows`` rows into documents of these lengths."""
    bounds = torch.tensor([0, *lengths * rows]).cumsum(0)
    if kind == "seq_idx":
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        return {"seq_idx": numbers.expand(rows, -1)}
    if kind == "cu_seq_lens_q":
        return {"cu_seq_lens_q": bounds.int(), "cu_seq_lens_k": bounds.int()}
    if kind == "cu_seqlens":
        return {"cu_seqlens": bounds}
    return {"cu_seqlens": bounds, "position_ids": torch.cat([*map(torch.arange, lengths)])[None]}


def check_packing_arguments(model: torch.nn.Module, alone: torch.nn.Module, kind: str) -> None:
    """Every layer keeps documents apart: the logits are those of each document alone."""
    lengths = [9, 1, 0, 14]
    for rows in (1, 2):
        ids = prompt(rows, sum(lengths))
        with torch.no_grad():
            got = model(ids, **packing(kind, lengths, rows))
            parts = [part for part in ids.split(lengths, 1) if part.numel()]
            expected = torch.cat([alone(part).logits for part in parts], 1)
        assert rel_rms(got.logits, expected) < 1e-5 and got.past_key_values is None


def check_packing_errors(model: torch.nn.Module) -> None:
    """What would make the layers disagree about documents."""
    ids, bounds = prompt(1, 24), torch.tensor([0, 9, 24])
    cache = model(ids, use_cache=True).past_key_values
    for match, call in (
        ("use_cache must be False", {"use_cache": True}),
        ("past_key_values must be None", {"past_key_values": cache}),
        ("attention_mask must be None", {"attention_mask": torch.ones_like(ids)}),
        ("position_ids must start over", {"position_ids": torch.arange(24)[None]}),
        ("cu_seqlens must begin a document with every row", {"input_ids": ids.view(2, 12)}),
    ):
        with pytest.raises(ValueError, match=match):
            model(**{"input_ids": ids, "cu_seqlens": bounds} | call)
    with pytest.raises(TypeError, match=r"cu_seqlens must be a torch\.Tensor, got list"):
        model(ids, cu_seqlens=[0, 9, 24])
