"""nn.Modules that own parameters and state: KimiDeltaAttention and its KDACache."""

from mate.layers.cache import KDACache
from mate.layers.kimi_delta_attention import KimiDeltaAttention

__all__ = ["KDACache", "KimiDeltaAttention"]
