"""``MATE_DISABLE``: which backends the environment switches off."""

import functools
import os

NAMES = ("native", "pytorch")  # in the order in which they are tried

_KEY = b"MATE_DISABLE" if os.name == "posix" else "MATE_DISABLE"  # as os.environ keeps it


def disabled(name: str) -> bool:
    """Whether ``MATE_DISABLE``, a comma-separated list, holds the backend ``name``.

    Raises:
        ValueError: it holds a name that is no backend's.
    """
    # os.environ takes a twentieth of a decode step to say that a name is not there.
    stored = getattr(os.environ, "_data", None)
    if stored is not None and _KEY not in stored:
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
