"""The benchmark refuses wrong paths, and its probes measure what they say."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cpu
import paths
import timing

SILENT = tqdm(disable=True)


def test_every_timed_path_keeps_its_bounds() -> None:
    shown, right = cpu.verify(40, SILENT)
    assert right, shown
    names = len(paths.ISAS) + 3 + 3  # prefill, decode
    assert shown.count("\n") == 1 + 2 * names


@pytest.mark.parametrize("path", ["prefill_path", "decode_paths"])
@pytest.mark.parametrize("wrong", [1.02, float("nan")])
def test_the_gate_sees_one_wrong_path(
    path: str, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = "chunk_kda" if path == "prefill_path" else "recurrent_kda"
    real = getattr(paths.mate, operator)

    def spoilt(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output, state = real(*args, **kwargs)
        # only the strict path, only in one dtype
        strict = kwargs.get("A_log") is None and output.dtype == torch.bfloat16
        return (output * wrong if strict else output), state

    monkeypatch.setattr(paths.mate, operator, spoilt)
    shown, right = cpu.verify(40, SILENT)
    assert not right, shown


def scratch(mebibytes: int) -> Callable[[], tuple[Tensor, ...]]:
    """A call that returns 4 MiB and uses ``mebibytes`` on the way."""

    def call() -> tuple[Tensor, ...]:
        used = torch.ones(mebibytes << 18)
        return (used[: 1 << 20] + 1,)

    torch.ones(1 << 20).add_(1)  # starts PyTorch's threads, whose memory is not the call's
    return call


def test_peak_memory_is_that_above_the_outputs() -> None:
    peak = timing.peak_bytes(scratch, 96)
    if sys.platform == "linux":
        assert peak is not None and abs(peak / 2**20 - 96) < 4


def test_medians_are_of_one_call_and_interleaved() -> None:
    order = []

    def sleep(name: str, seconds: float) -> Callable[[], None]:
        def path() -> None:
            order.append(name)
            time.sleep(seconds)

        return path

    paths = {"a": sleep("a", 0.004), "b": sleep("b", 0.02)}
    times = timing.interleaved(paths, 3, SILENT, sample_seconds=0.01)
    assert 0.004 <= times["a"].low <= times["a"].median <= times["a"].high
    assert times["a"].median < 0.02 <= times["b"].median
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert runs == ["a", "b"] * 4
