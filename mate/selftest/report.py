"""The self-test's results as a table, and its progress on a terminal."""

import sys
from collections.abc import Sequence
from typing import Protocol

HEADER = ("device", "backend", "operator", "case", "error", "bound", "")
WIDTH = 24


class Line(Protocol):
    device: str
    backend: str
    operator: str
    case: str
    error: float | None
    bound: float
    note: str

    @property
    def ok(self) -> bool: ...


def table(results: Sequence[Line]) -> str:
    """A line a result; what is wrong again below, and how many are right."""
    rows = [HEADER] + [
        (
            x.device,
            x.backend,
            x.operator,
            x.case,
            "-" if x.error is None else f"{x.error:.1e}",
            "exact" if x.bound == 0 and x.error is not None else f"{x.bound:.0e}",
            "ok" if x.ok else "WRONG",
        )
        for x in results
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    wrong = [x for x in results if not x.ok]
    lines += [""] * bool(wrong)
    lines += [f"{x.device} {x.operator}, {x.case}: {x.note}" for x in wrong]
    lines += ["", f"{len(results) - len(wrong)} of {len(results)} right"]
    return "\n".join(lines)


def progress_bar(done: int, total: int, comes_next: str) -> None:
    """One line on stderr, gone in the end."""
    filled = WIDTH * done // max(total, 1)
    line = f"[{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total} {comes_next}"
    print("\r\x1b[K" + (line[:100] if done < total else ""), end="", file=sys.stderr, flush=True)
