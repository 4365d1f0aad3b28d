"""One layer's parameters under the names of others: what is what, in one place.

=====================  =================================  ==============================
published Kimi Linear  transformers                       flash-linear-attention
=====================  =================================  ==============================
f_a_proj, f_b_proj     forget_gate.f_a_proj, .f_b_proj    f_proj.0, f_proj.1
g_a_proj, g_b_proj     the same                           g_proj.0, g_proj.1 (with bias)
A_log [H]              forget_gate.A_log [1, 1, H, 1]     A_log [H]
dt_bias [H * K]        forget_gate.dt_bias                dt_bias
{q,k,v}_conv1d.weight  conv1d.weight, q k v concatenated  the same
=====================  =================================  ==============================

mate's own names are the published ones.
"""

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

FP32_PARAMETERS = ("A_log", "dt_bias")

_PREFIXES = {
    "forget_gate.": "",
    "f_proj.0.": "f_a_proj.",
    "f_proj.1.": "f_b_proj.",
    "g_proj.0.": "g_a_proj.",
    "g_proj.1.": "g_b_proj.",
}
_CONVS = ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")


def to_published(
    state_dict: MutableMapping[str, Tensor], prefix: str, conv_channels: Sequence[int]
) -> None:
    """Rename and reshape one layer's entries to mate's names, in place.

    Args:
        state_dict: Any of the three namings, also mixed with other layers' entries.
        prefix: What the layer's keys begin with, such as "model.layers.0.self_attn.".
        conv_channels: The channels of q, k and v, by which a merged convolution is split.

    Raises:
        ValueError: an entry appears under two names, a bias is not zero, or a merged convolution
            has another number of channels. The message names the key.
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        for theirs, ours in _PREFIXES.items():
            if name.startswith(theirs):
                name = ours + name[len(theirs) :]
        value = state_dict.pop(key)
        if name == "g_b_proj.bias":
            if torch.count_nonzero(value):
                raise ValueError(
                    f"{key} must be all zeros, because KimiDeltaAttention's output gate has no "
                    f"bias; got values up to {value.abs().max().item():.3g}"
                )
        elif name == "conv1d.weight":
            if value.shape[0] != sum(conv_channels):
                raise ValueError(
                    f"{key} must have {sum(conv_channels)} channels (q, k and v: "
                    f"{list(conv_channels)}), got shape {tuple(value.shape)}"
                )
            for part, weight in zip(_CONVS, value.split(list(conv_channels)), strict=True):
                _put(state_dict, prefix + part, weight, key)
        else:
            if name in FP32_PARAMETERS:
                value = value.flatten().float()
            _put(state_dict, prefix + name, value, key)


def _put(state_dict: MutableMapping[str, Tensor], key: str, value: Tensor, source: str) -> None:
    if key in state_dict:
        raise ValueError(f"{source} is given twice: {key} is there under another name as well")
    state_dict[key] = value
