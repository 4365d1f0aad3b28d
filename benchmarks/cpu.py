"""KDA on a CPU: mate against the fallback that transformers runs without a GPU.

    python benchmarks/cpu.py            # everything; writes docs/benchmarks/cpu.md and cpu.png
    python benchmarks/cpu.py --quick    # short sequences, few samples; writes to out/benchmarks

Every path that is timed is first compared with the float64 recurrence, and nothing is timed where
one is wrong. Paths that are compared run in turns in one process (benchmarks/timing.py).
"""

import argparse
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from paths import FUSED, STRICT, THEIRS, decode_paths, draw, prefill_path, prefill_paths
from timing import Timing, interleaved, peak_bytes
from torch import Tensor
from tqdm import tqdm

import mate
from mate.backends import native
from mate.functional.reference import kda_reference

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GATES, REGIMES = ("bounded", "softplus"), ("forgetting", "remembering")
# relative RMS errors of output and state that the operator promises
BOUNDS = {"fp32": (1e-5, 1e-5), "bf16": (5e-3, 4e-3)}
FLAGS = {
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2"),
}
EXPLANATION = f"""\
- **{THEIRS}**: `chunk_kimi_delta_attention` and `recurrent_kimi_delta_attention` of
  `transformers.models.kimi_linear`. They take the log-decay and the sigmoid of beta ready made.
- **{STRICT}**: mate given exactly those tensors. The strict comparison.
- **{FUSED}**: mate given what a layer has, the gate's input and beta's logit; the
  gate and the sigmoid, which the other two leave out, are inside the figure.
- *remembering*: gates as a freshly initialised layer has them, memory over thousands of tokens;
  *forgetting*: gates drawn as kernel benchmarks do, each token forgets a factor of e^2.5 or more.
- Times are medians (fastest to slowest in brackets) of paths taking turns in one process; 128
  channels a head, l2 norm of q and k inside, fp32 state in and out."""


# ---------------------------------------------------------------- right before fast


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected).square().mean().sqrt()
    return (error / expected.square().mean().sqrt()).item()


def verify(tokens: int, progress: tqdm) -> tuple[str, bool]:
    """A table of the worst errors over gates and regimes, and whether all keep their bounds."""
    errors = defaultdict(list)
    for label, dtype in DTYPES.items():
        for gate in GATES:
            for regime in REGIMES:
                for kind, count, paths in (
                    ("prefill", tokens, prefill_paths),
                    ("decode", 1, decode_paths),
                ):
                    case = draw(count, 2, dtype, gate, regime)
                    strict, fused = (kda_reference(**x) for x in (case.strict(), case.fused()))
                    for name, path in paths(case).items():
                        truth = fused if name == FUSED else strict
                        pair = [relative_error(*x) for x in zip(path(), truth, strict=True)]
                        errors[kind, name, label].append(pair)
                    progress.update()
    rows, right = [], True
    for (kind, name, label), pairs in errors.items():
        worst = torch.tensor(pairs).amax(0)  # NaN stays NaN, and no NaN keeps a bound
        right &= bool((worst <= torch.tensor(BOUNDS[label])).all())
        rows.append((f"{kind}: {name}", label, *(f"{e:.1e}" for e in worst.tolist())))
    return table(("path", "dtype", "output", "state"), rows), right


# ---------------------------------------------------------------- the measurements


def measure_prefill(tokens: int, heads: int, rounds: int, progress: tqdm) -> str:
    rows = []
    for label, dtype in DTYPES.items():
        paths = prefill_paths(draw(tokens, heads, dtype))
        rows += compare(label, interleaved(paths, rounds, progress), 1e3)
    return table(("dtype", "path", "ms", "times faster"), rows)


def measure_decode(heads: int, rounds: int, progress: tqdm) -> str:
    rows = []
    for label, dtype in DTYPES.items():
        paths = decode_paths(draw(1, heads, dtype))
        rows += compare(label, interleaved(paths, rounds, progress), 1e6)
    return table(("dtype", "path", "us", "times faster"), rows)


def measure_gates(tokens: int, heads: int, rounds: int, progress: tqdm) -> str:
    paths = {}
    for gate in GATES:
        for regime in REGIMES:
            for label, dtype in DTYPES.items():
                case = draw(tokens, heads, dtype, gate, regime)
                paths[gate, regime, label] = prefill_path(FUSED, case)
                if gate == GATES[0]:
                    paths["pre-computed", regime, label] = prefill_path(STRICT, case)
    times = interleaved(paths, rounds, progress)
    rows = []
    for gate in (*GATES, "pre-computed"):
        for regime in REGIMES:
            rows.append((gate, regime, *(shown(times[gate, regime, x], 1e3) for x in DTYPES)))
    return table(("gate", "regime", *(f"{label}, ms" for label in DTYPES)), rows)


def measure_memory(tokens: Iterable[int], heads: int, progress: tqdm) -> str | None:
    rows = []
    first, *longer = tokens
    for name, count in ((THEIRS, first), (FUSED, first), *((FUSED, x) for x in longer)):
        peak = peak_bytes(prepare_call, name, count, heads, torch.get_num_threads())
        progress.update()
        if peak is None:
            return None
        rows.append((name, f"{count:,}", f"{peak / 2**20:,.1f}"))
    return table(("path", "T", "MiB"), rows)


def prepare_call(name: str, tokens: int, heads: int, threads: int) -> Callable[[], Any]:
    """For :func:`timing.peak_bytes`; the short call loads libraries and starts threads."""
    torch.set_num_threads(threads)
    prefill_path(name, draw(64, heads, torch.bfloat16))()
    return prefill_path(name, draw(tokens, heads, torch.bfloat16))


def measure_lengths(
    ours: list[int], theirs: list[int], heads: int, rounds: int, progress: tqdm, figure: Path
) -> str:
    case = draw(max(ours), heads, torch.bfloat16)
    paths = {}
    for name, lengths in ((FUSED, ours), (THEIRS, theirs)):
        for tokens in lengths:
            paths[name, tokens] = prefill_path(name, case.first(tokens))
    times = interleaved(paths, rounds, progress)
    plot(times, figure)
    rows = []
    for (name, tokens), timing in times.items():
        base = times[name, theirs[-1]].median / theirs[-1]
        each = timing.median / tokens
        row = (name, f"{tokens:,}", shown(timing, 1e3), f"{each * 1e9:,.0f}", f"{each / base:.2f}")
        rows.append(row)
    return table(("path", "T", "ms", "ns a token", f"of T = {theirs[-1]:,}'s"), rows)


# ---------------------------------------------------------------- what is shown


def shown(timing: Timing, unit: float) -> str:
    median, low, high = (
        f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        for x in (timing.median * unit, timing.low * unit, timing.high * unit)
    )
    return f"{median} ({low} to {high})"


def compare(label: str, times: dict[str, Timing], unit: float) -> list[tuple[str, ...]]:
    base = times[THEIRS].median
    return [(label, name, shown(t, unit), f"{base / t.median:,.1f}") for name, t in times.items()]


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown that also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def plot(times: dict[tuple[str, int], Timing], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, colour in ((THEIRS, "#b3541e"), (FUSED, "#1f5fa8")):
        points = sorted((T, t.median * 1e3) for (n, T), t in times.items() if n == name)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.yaxis.set_major_formatter(lambda ms, _: f"{ms:,g}")
    axes.set_xlabel("tokens T")
    axes.set_ylabel("milliseconds")
    axes.set_title("KDA forward on a CPU: B1 H16 D128, bf16", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def machine() -> str:
    """The processor in public terms, and who serves."""
    facts = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    present = facts.get("flags", facts.get("Features", "")).split()
    flags = [flag for flag in present if flag in FLAGS]
    served = ", ".join(
        f"{label}: {mate.backend_for('cpu', dtype).name}" for label, dtype in DTYPES.items()
    )
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used; "
        f"flags that matter: {' '.join(flags) or 'unknown'}.\n"
        f"mate {mate.__version__}, backend {served}; instruction set of the kernels: "
        f"{native.isa() or 'none'}.\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a look in well under a minute")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of cpu.md and cpu.png (default: docs/benchmarks; out/benchmarks with --quick)",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or ROOT / ("out/benchmarks" if args.quick else "docs/benchmarks")
    out.mkdir(parents=True, exist_ok=True)

    heads = 16
    tokens, rounds, rounds_long = (256, 3, 3) if args.quick else (2048, 5, 3)
    theirs = [tokens // 4, tokens // 2, tokens]
    ours = [*theirs, *(tokens * 2**i for i in range(1, 3 if args.quick else 6))]
    command = "python benchmarks/cpu.py" + " --quick" * args.quick
    if args.threads != parser.get_default("threads"):
        command += f" --threads {args.threads}"

    page = [
        "# KDA on a CPU",
        f"Written by `{command}`; every figure on this page is from that one run.",
        machine(),
        EXPLANATION,
    ]
    print("\n\n".join(page[1:]))

    def section(title: str, text: str) -> None:
        with tqdm.external_write_mode():
            print(f"\n## {title}\n\n{text}")
        page.extend((f"## {title}", text))

    checks, probes, timed, timed_long = 16, 3, 6 + 6 + 12, len(ours) + len(theirs)
    steps = checks + probes + timed * (rounds + 1) + timed_long * (rounds_long + 1)
    with torch.inference_mode(), tqdm(total=steps, leave=False, disable=None) as progress:
        errors, right = verify(300, progress)
        section(
            "Right before fast",
            "Worst relative RMS error against the float64 recurrence (T = 300 and one token, "
            "both gates,\nboth regimes). Bounds, output and state: "
            + "; ".join(f"{x} {o:.0e} and {s:.0e}" for x, (o, s) in BOUNDS.items())
            + f". Nothing is timed where one is broken.\n\n{errors}",
        )
        if not right:
            print("\nA bound is broken: nothing is timed.", file=sys.stderr)
            return 1
        prefill = measure_prefill(tokens, heads, rounds, progress)
        shape = f"B1 T{tokens:,} H{heads}"
        section(f"Prefill: {shape}", f"Bounded gate, remembering.\n\n{prefill}")
        section(
            "One decode step: B1 H32",
            "The state is updated in place by mate, returned anew by transformers.\n\n"
            + measure_decode(32, rounds, progress),
        )
        section(
            f"Gates and regimes: {shape}",
            f"{FUSED}; pre-computed: {STRICT}.\n\n"
            + measure_gates(tokens, heads, rounds, progress),
        )
        memory = measure_memory([tokens, ours[-1]], heads, progress)
        section(
            f"Peak memory above inputs and outputs: B1 H{heads}, bf16",
            "Each call in a fresh process: the kernel's mark of the highest resident memory is\n"
            "reset (`/proc/self/clear_refs`) with the inputs in place, and what the call returns is"
            f"\nsubtracted.\n\n{memory or 'Not measured: this needs Linux.'}",
        )
        lengths = measure_lengths(ours, theirs, heads, rounds_long, progress, out / "cpu.png")
        section(f"Time against T: B1 H{heads}, bf16", f"{lengths}\n\n![time against T](cpu.png)")
    (out / "cpu.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
