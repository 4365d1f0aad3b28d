"""Fixtures shared by the whole suite."""

from collections.abc import Iterator

import pytest
import torch

from mate.backends import native


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Every test starts from the same thread count, whatever the one before it set."""
    torch.set_num_threads(2)
    yield


@pytest.fixture(params=["native", "pytorch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend in turn serves the forward pass of the test's calls."""
    if request.param == "pytorch":
        monkeypatch.setenv("MATE_DISABLE", "native")
    else:
        found = native.library()
        assert not isinstance(found, str), found
    return str(request.param)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised float memory made by PyTorch starts as NaN: whatever stays unwritten shows."""

    def filled(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _make=make, **kw: filled(_make(*a, **kw)))
