"""``MATE_DISABLE``: which backends the environment switches off."""

import functools
import os

NAMES = ("native", "pytorch")  # in the order in which they are tried

# Its dictionary: os.environ takes a twentieth of a decode step to say that a name is not there.
_stored = getattr(os.environ, "_data", None)
_NAME = os.environ.encodekey("MATE_DISABLE")


def disabled(name: str) -> bool:
    """Whether ``MATE_DISABLE``, a comma-separated list, holds the backend ``name``.

    Raises:
        ValueError: it holds a name that is no backend's.
    """
    if _stored is not None and _NAME not in _stored:
        return False
    return name in _parse(os.environ.get("MATE_DISABLE", ""))


@functools.cache
def _parse(value: str) -> frozenset[str]:
    names = frozenset(name.strip() for name in value.split(",")) - {""}
    if names - set(NAMES):
        raise ValueError(
            f"MATE_DISABLE must be a comma-separated list of {', '.join(NAMES)}, got {value!r}"
        )
    return names
