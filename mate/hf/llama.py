"""Llama with Kimi Delta Attention: model type ``mate_llama``."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)

from mate.hf.hybrid import (
    HybridConfigMixin,
    HybridForCausalLMMixin,
    HybridModelMixin,
    without_attention,
)


@strict
class MateLlamaConfig(HybridConfigMixin, LlamaConfig):
    """``LlamaConfig`` plus :class:`mate.hf.hybrid.HybridConfigMixin`'s fields.

    >>> config = MateLlamaConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8)
    >>> config.layer_types
    ['linear_attention', 'linear_attention', 'linear_attention', 'full_attention']
    """

    model_type = "mate_llama"
    base_model_tp_plan = without_attention(LlamaConfig.base_model_tp_plan)

    layer_types: list[str] | None = None
    linear_num_heads: int | None = None
    linear_num_v_heads: int | None = None
    linear_conv_kernel_dim: int = 4
    linear_lower_bound: float | None = None
    linear_allow_neg_eigval: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self._fill_hybrid_defaults()
        super().__post_init__(**kwargs)


class MateLlamaModel(HybridModelMixin, LlamaModel):
    """``LlamaModel`` whose ``config.layer_types`` say where KDA stands in for attention."""

    config_class = MateLlamaConfig
    config: MateLlamaConfig


class MateLlamaForCausalLM(HybridForCausalLMMixin, LlamaForCausalLM):
    """``LlamaForCausalLM`` over :class:`MateLlamaModel`: training, ``generate``, saving.

    ``AutoModelForCausalLM`` loads a saved one after ``import mate.hf``, which registers it.
    """

    config_class = MateLlamaConfig
    config: MateLlamaConfig

    def __init__(self, config: MateLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM's would build a LlamaModel
        self.model = MateLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("mate_llama", MateLlamaConfig, exist_ok=True)
AutoModel.register(MateLlamaConfig, MateLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(MateLlamaConfig, MateLlamaForCausalLM, exist_ok=True)
