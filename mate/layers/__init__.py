"""nn.Modules that own parameters and state: KimiDeltaAttention, KDACache, StatePool."""

from mate.layers.cache import KDACache, StatePool
from mate.layers.kimi_delta_attention import KimiDeltaAttention
from mate.layers.projections import fuse_projections

__all__ = ["KDACache", "KimiDeltaAttention", "StatePool", "fuse_projections"]
