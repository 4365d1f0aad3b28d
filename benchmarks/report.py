"""How the benchmarks show what they measured: tables, curves, and on which machine."""

import os
import platform
from pathlib import Path

import matplotlib
import torch
from timing import Timing

import mate
from mate.backends import native

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

FLAGS = {
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2"),
}
COLOURS = ("#b3541e", "#1f5fa8", "#4c8c4a", "#7d5ba6")


def shown(timing: Timing, unit: float) -> str:
    """The median, slowest and fastest in brackets; ``unit``: how many a second."""
    median, low, high = (
        f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        for x in (timing.median * unit, timing.low * unit, timing.high * unit)
    )
    return f"{median} ({low} to {high})"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown that also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def plot(curves: dict[str, list[tuple[int, Timing]]], title: str, path: Path) -> None:
    """Milliseconds against tokens, both logarithmic; a curve a name."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
        line = sorted((tokens, timing.median * 1e3) for tokens, timing in points)
        axes.plot(*zip(*line, strict=True), "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.yaxis.set_major_formatter(lambda ms, _: f"{ms:,g}")
    axes.set_xlabel("tokens T")
    axes.set_ylabel("milliseconds")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def machine() -> str:
    """The processor in public terms, and who serves."""
    facts: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    present = facts.get("flags", facts.get("Features", "")).split()
    flags = [flag for flag in present if flag in FLAGS]
    import transformers  # only what a CPU is compared with needs it

    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used; "
        f"flags that matter: {' '.join(flags) or 'unknown'}.\n"
        f"mate {mate.__version__}, backend {mate.backend_for('cpu').name}; instruction set of the "
        f"kernels: {native.isa() or 'none'}.\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}."
    )


def bars(series: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Milliseconds of each name's rows side by side, on a logarithmic scale."""
    rows = list(next(iter(series.values())))
    width = 0.8 / len(series)
    figure, axes = plt.subplots(figsize=(7.2, 0.36 * len(rows) + 1.2), layout="constrained")
    for i, ((name, values), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        places = [j + (i - (len(series) - 1) / 2) * width for j in range(len(rows))]
        axes.barh(places, [values[row] for row in rows], width, color=colour, label=name)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda ms, _: f"{ms:,g}")
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
