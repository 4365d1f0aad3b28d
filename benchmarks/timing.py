"""How the benchmarks measure: interleaved medians, and peak memory in a process of its own."""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from tqdm import tqdm

Name = TypeVar("Name")


class Timing(NamedTuple):
    """Seconds a call."""

    median: float
    low: float
    high: float


def interleaved(
    paths: dict[Name, Callable[[], Any]],
    rounds: int,
    progress: tqdm,
    sample_seconds: float = 0.2,
) -> dict[Name, Timing]:
    """Medians of paths that take turns, A B C A B C, so that a busy spell hits all alike.

    Every path is called once before its first sample counts. A sample is one call, or as many in
    a row as fill ``sample_seconds``, in which case it is their mean.

    Args:
        paths: What to time, by name.
        rounds: Samples of each path.
        progress: Advanced by ``rounds`` + 1 for each path.
        sample_seconds: Shortest time that a sample is taken over.
    """
    calls = {}
    for name, path in paths.items():
        once = _seconds(path, 1)
        if once < sample_seconds:  # the first call may be slow; asking a long one again would cost
            once = _seconds(path, 1)
        calls[name] = max(1, round(sample_seconds / max(once, 1e-7)))
        progress.update()
    samples: dict[Name, list[float]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            samples[name].append(_seconds(path, calls[name]) / calls[name])
            progress.update()
    return {
        name: Timing(statistics.median(times), min(times), max(times))
        for name, times in samples.items()
    }


def _seconds(path: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        path()
    return time.perf_counter() - start


def peak_bytes(prepare: Callable[..., Callable[[], Any]], *args: Any) -> int | None:
    """Peak memory of a call above its inputs and outputs, in a fresh process; None off Linux.

    In the new process ``prepare(*args)`` makes and writes the inputs and returns the call. Free
    memory goes back to the system, the kernel's high-water mark of resident memory is reset, and
    the call runs once: the mark less the resident memory before, less what the call returns.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_bytes, prepare, args).result()


def _peak_bytes(prepare: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> int | None:
    call = prepare(*args)
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        outputs = call()
        peak = _resident("VmHWM")
    except OSError:
        return None
    returned = sum(x.nbytes for x in outputs if isinstance(x, Tensor))
    return max(0, peak - before - returned)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
