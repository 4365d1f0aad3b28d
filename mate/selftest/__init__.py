"""What this machine computes, against float64: ``python -m mate selftest``.

    probe.py   GPU kernels: where products, shuffles and copies put their numbers
    cases.py   every operator in small calls with everything that may differ made to differ

For a machine on which nobody has run mate yet. Inputs come from fixed seeds; a result that is not
finite, or worse than the contract's bound (docs/operator.md), is wrong.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mate.backends import backend_for
from mate.backends.devices import DEVICES, runtime
from mate.selftest import cases, probe


@dataclass(slots=True)
class Result:
    """One line of the table; ``error`` is a relative RMS error, or of the worst element."""

    device: str
    backend: str
    operator: str
    case: str
    error: float | None
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN and no infinity: such an error is null."""
        number = self.error is not None and math.isfinite(self.error)
        return asdict(self) | {"error": self.error if number else None, "ok": self.ok}


def devices() -> list[str]:
    """The types of device of this machine that PyTorch can use."""
    present = (x for x in DEVICES if runtime(x) is not None and runtime(x).is_available())
    return ["cpu", *present]


def device_names(types: list[str]) -> dict[str, str]:
    """What the current GPU of each type calls itself; for the CPU see ``mate check``."""
    return {x: runtime(x).get_device_name() for x in types if x != "cpu"}


def _tasks(device: str) -> Iterator[tuple[str, str, Callable[[], list[Result]]]]:
    """(operator, case, what runs it) of a device."""
    reason = probe.missing(device)
    if reason is None:
        yield "kernels", "probe", lambda: _probe(device)
    for case in cases.CASES:
        if case.device in (None, device):
            yield case.operator, case.name, lambda case=case: [_run(device, case)]  # type: ignore


def _probe(device: str) -> list[Result]:
    found = probe.run(device)
    return [Result(device, "native", "kernels", x.name, x.error, x.bound, x.note) for x in found]


def _run(device: str, case: cases.Case) -> Result:
    backend = "-"
    try:
        recurrent = case.operator == "recurrent_kda"
        backend = backend_for(device, case.dtype, recurrent).name if case.dispatched else "-"
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table says who served
            outcomes = case.run(torch.device(device))
    except Exception as error:  # whatever it is, it belongs into the table
        text = " ".join(str(error).split())
        note = f"{type(error).__name__}: {text}"
        return Result(device, backend, case.operator, case.name, None, 0.0, note)
    # the worst, and anything that is no number before all else
    worst = max(outcomes, key=lambda x: x.error / x.bound if x.error == x.error else float("inf"))
    note = "" if worst.error <= worst.bound else f"{worst.what} is wrong"
    return Result(device, backend, case.operator, case.name, worst.error, worst.bound, note)


def run(
    chosen: list[str] | None = None, progress: Callable[[int, int, str], None] | None = None
) -> list[Result]:
    """Everything on the given types of device, by default on all that there are.

    ``progress(done, all, what comes next)`` is called before each case and at the end.
    """
    tasks = [(device, *task) for device in chosen or devices() for task in _tasks(device)]
    results: list[Result] = []
    for i, (device, operator, name, work) in enumerate(tasks):
        if progress is not None:
            progress(i, len(tasks), f"{device} {operator} {name}")
        results += work()
    if progress is not None:
        progress(len(tasks), len(tasks), "")
    return results
