"""Hybrids: a transformers decoder with KDA in place of some or all of its attention layers.

Everything here knows no model family. A family adds three classes of a few lines each; see
:mod:`mate.hf.llama`:

- a config: :class:`HybridConfigMixin` over the family's config, with the fields of its docstring;
- a model: :class:`HybridModelMixin` over the family's decoder;
- a causal LM: :class:`HybridForCausalLMMixin` over the family's, which builds that model.

The Auto classes know a family once ``mate.hf`` is imported: without ``import mate.hf``,
``AutoModelForCausalLM.from_pretrained`` does not recognise a saved hybrid's model type.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_recurrent_attention_mask

from mate.functional.contract import HEAD_DIM
from mate.hf.cache import count_tokens, upgrade_cache
from mate.hf.packing import add_document_bounds, cu_seqlens_from_kwargs
from mate.layers.checkpoints import FP32_PARAMETERS
from mate.layers.kimi_delta_attention import KimiDeltaAttention, ShortConvolution

KDA, ATTENTION = "linear_attention", "full_attention"
KDA_PER_ATTENTION = 3  # Kimi Linear's ratio


class HybridConfigMixin:
    """Which layers are KDA, and their sizes. The config declares these fields:

    layer_types: "linear_attention" (KDA) or "full_attention" per layer. Default: three KDA
        layers, then one attention layer, and so on.
    linear_num_heads: Heads of q and k, of 128 channels. Default: as many as fit hidden_size.
    linear_num_v_heads: Value heads. Default: linear_num_heads.
    linear_conv_kernel_dim: Taps of the short convolutions.
    linear_lower_bound: None for the softplus gate, or the bounded gate's smallest log-decay.
    linear_allow_neg_eigval: Writing strength up to 2.
    """

    layer_types: Any
    linear_num_heads: Any
    linear_num_v_heads: Any

    def _fill_hybrid_defaults(self) -> None:
        config: Any = self
        if self.layer_types is None:
            period = KDA_PER_ATTENTION + 1
            self.layer_types = [
                ATTENTION if (i + 1) % period == 0 else KDA for i in range(config.num_hidden_layers)
            ]
        unknown = set(self.layer_types) - {KDA, ATTENTION}
        if unknown:
            raise ValueError(f"layer_types must hold {KDA!r} or {ATTENTION!r}, got {unknown}")
        if self.linear_num_heads is None:
            self.linear_num_heads = max(1, config.hidden_size // HEAD_DIM)
        if self.linear_num_v_heads is None:
            self.linear_num_v_heads = self.linear_num_heads


def without_attention(plan: dict[str, Any]) -> dict[str, Any]:
    """A tensor-parallel plan less its attention entries, which would cut KDA's projections up."""
    return {name: how for name, how in plan.items() if ".self_attn." not in name}


class KDASelfAttention(KimiDeltaAttention):
    """:class:`mate.layers.KimiDeltaAttention` called as transformers calls attention."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(
            config.hidden_size,
            config.linear_num_heads,
            num_v_heads=config.linear_num_v_heads,
            conv_size=config.linear_conv_kernel_dim,
            lower_bound=config.linear_lower_bound,
            allow_neg_eigval=config.linear_allow_neg_eigval,
            norm_eps=config.rms_norm_eps,
            layer_idx=layer_idx,
        )

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """attention_mask is the attention layers' 4-D one; padding arrives as padding_mask."""
        cu_seqlens = cu_seqlens_from_kwargs(kwargs)
        if cu_seqlens is None:
            return self.mix(hidden_states, padding_mask, past_key_values), None
        packed = hidden_states.reshape(1, -1, hidden_states.shape[-1])
        y = self.mix(packed, padding_mask, past_key_values, cu_seqlens)
        return y.view_as(hidden_states), None


class _HybridPreTrained:
    """What model and causal LM share: both are asked how to initialise and which dtypes to keep."""

    _is_stateful = True  # assisted generation would need to take tokens back
    _keep_in_fp32_modules_strict: Any = set(FP32_PARAMETERS)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Guarded functions: a parameter that came from a checkpoint keeps its value.
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, KimiDeltaAttention):
            init.copy_(module.A_log, module.initial_A_log())
            init.copy_(module.dt_bias, module.initial_dt_bias())
        elif isinstance(module, ShortConvolution):
            std = self.config.initializer_range  # type: ignore[attr-defined]
            init.normal_(module.weight, mean=0.0, std=std)


class HybridModelMixin(_HybridPreTrained):
    """Over a decoder whose ``layers[i].self_attn`` takes attention's arguments."""

    config: Any
    layers: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for index, kind in enumerate(config.layer_types):
            if kind == KDA:
                self.layers[index].self_attn = KDASelfAttention(config, index)
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The decoder's forward; KDA layers get the 2-D padding mask and the document bounds.

        Packed documents (``cu_seqlens``, ``cu_seq_lens_q``, ``seq_idx``, or ``position_ids`` that
        start over) are kept apart by every layer, without mask and cache:
        :func:`mate.hf.packing.add_document_bounds`.
        """
        tokens = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if tokens is None:
            raise ValueError("one of input_ids and inputs_embeds must be given, got neither")
        batch, length = tokens.shape[:2]
        kwargs = add_document_bounds(kwargs, (batch, length), attention_mask)
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = self.config.use_cache
        cache = kwargs.pop("past_key_values", None)
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            upgrade_cache(cache)
        if isinstance(attention_mask, dict):  # prepared by generate() for a static cache
            padding_mask = attention_mask.get(KDA)
            attention_mask = attention_mask.get(ATTENTION)
        else:
            padding_mask = create_recurrent_attention_mask(
                self.config, tokens, attention_mask, past_key_values=cache
            )
        outputs = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            padding_mask=padding_mask,
            **kwargs,
        )
        if cache is not None:
            count_tokens(cache, tokens.shape[1])
        return outputs


class HybridForCausalLMMixin(_HybridPreTrained):
    """Over a causal LM that generates."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # generate() asks the cache for its length before the model first sees it.
        result = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            upgrade_cache(cache)
        return result
