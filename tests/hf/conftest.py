"""Tiny models on one thread: with more, they wait for each other and for the machine's others."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> Iterator[None]:
    torch.set_num_threads(1)
    yield
