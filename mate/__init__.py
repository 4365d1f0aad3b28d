"""Kimi Delta Attention as a layer anyone can use: on a CPU, on NVIDIA and on MUSA GPUs.

mate.chunk_kda, mate.recurrent_kda     the operator
mate.layers.KimiDeltaAttention         the layer
mate.hf                                Hugging Face transformers (imported on its own)
mate.backend_for                       which backend serves a call, and why
"""

from mate import kda, layers
from mate.backends import backend_for
from mate.functional.kda import chunk_kda, recurrent_kda

__version__ = "0.1.0"
__all__ = ["__version__", "backend_for", "chunk_kda", "kda", "layers", "recurrent_kda"]
