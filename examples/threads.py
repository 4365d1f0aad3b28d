"""How many threads the examples use where --threads does not say."""

import os

import torch


def idle_cores() -> int:
    """Cores that no other program keeps busy, at least one.

    PyTorch's threads meet after every operation. One that shares its core with another program
    arrives late each time, so that on a busy machine fewer threads are the faster ones.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not on this system
        load = 0.0
    return max(1, round(torch.get_num_threads() - load))
