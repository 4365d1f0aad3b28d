"""Kimi Linear of transformers (model type ``kimi_linear``) on mate's kernels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearDeltaAttention,
    KimiLinearRMSNormGated,
)

from mate.functional.short_conv import short_conv
from mate.hf.patching import TransformersMixer
from mate.layers.mixer import DecodeWeights, is_plain


class MateKimiLinearDeltaAttention(TransformersMixer, KimiLinearDeltaAttention):
    """The class a patched ``KimiLinearDeltaAttention`` has; it is never constructed."""

    required = (
        "q_proj",
        "k_proj",
        "v_proj",
        "conv1d.weight",
        "forget_gate.f_a_proj",
        "forget_gate.f_b_proj",
        "forget_gate.A_log",
        "forget_gate.dt_bias",
        "b_proj",
        "g_a_proj",
        "g_b_proj",
        "o_norm",
        "o_proj",
        "hidden_size",
        "head_dim",
        "layer_idx",
        "activation",
    )

    # Their weights are read here and not through their own forward, which an offloading hook
    # would otherwise wait for.
    @force_accelerate_hooks(["conv1d", "forget_gate"])
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)

    def short_convs(self) -> Sequence[Callable[..., tuple[Tensor, Tensor | None]]]:
        weights = self.conv1d.weight.squeeze(1).chunk(3)
        return [partial(short_conv, weight=weight) for weight in weights]

    def decode_weights(self) -> DecodeWeights | None:
        weight, norm = self.conv1d.weight, self.o_norm
        if not is_plain(norm, KimiLinearRMSNormGated):
            return None
        return DecodeWeights(weight.squeeze(1).chunk(3), norm.weight, norm.variance_epsilon)

    def low_rank_gates(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        gate = self.forget_gate
        return (gate.f_a_proj, gate.f_b_proj), (self.g_a_proj, self.g_b_proj)

    def decay_parameters(self) -> tuple[Tensor, Tensor]:
        return self.forget_gate.A_log.float().flatten(), self.forget_gate.dt_bias.float()
