"""The documented operator module: ``mate.kda.chunk_kda``."""

from mate.functional.kda import chunk_kda, recurrent_kda

__all__ = ["chunk_kda", "recurrent_kda"]
