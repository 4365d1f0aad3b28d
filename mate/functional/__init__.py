"""Pure functions on tensors: the operator, its contract, and the executable specification."""

from mate.functional.kda import chunk_kda, recurrent_kda
from mate.functional.reference import kda_reference

__all__ = ["chunk_kda", "kda_reference", "recurrent_kda"]
