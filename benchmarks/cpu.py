"""KDA on a CPU: mate against the fallback that transformers runs without a GPU.

    python benchmarks/cpu.py            # everything; writes docs/benchmarks/cpu.md and cpu.png
    python benchmarks/cpu.py --quick    # short sequences, few samples; writes to out/benchmarks

Every path that is timed is first compared with the float64 recurrence, and nothing is timed where
one is wrong. Paths that are compared run in turns in one process (benchmarks/timing.py).
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import layers
import torch
from cases import BOUNDS, D, draw, relative_error
from paths import (
    FUSED,
    ISAS,
    STRICT,
    THEIRS,
    TOKENWISE,
    decode_paths,
    on,
    on_threads,
    prefill_path,
    prefill_paths,
)
from report import machine, plot, shown, table
from timing import Timing, interleaved, peak_bytes
from tqdm import tqdm

from mate.functional.reference import kda_reference

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GATES, REGIMES = ("bounded", "softplus"), ("forgetting", "remembering")
# Floating-point operations a token and value head: three products with the state, and about a
# tenth of that inside a tile (docs/algorithm.md).
FLOP = 3 * 2 * D * D + 10_000
EXPLANATION = f"""\
- **{THEIRS}**: `chunk_kimi_delta_attention` and `recurrent_kimi_delta_attention` of
  `transformers.models.kimi_linear`. They take the log-decay and the sigmoid of beta ready made.
- **mate, ...** with an instruction set: given exactly those tensors. The strict comparison.
- **{FUSED}**: given what a layer has, the gate's input and beta's logit, so that the
  gate and the sigmoid are in the figure as well.
- **{TOKENWISE}**: mate's recurrence one token after another, which reads inputs once and
  keeps the state in cache: what the chunked form has to beat.
- *remembering*: gates as a freshly initialised layer has them, memory over thousands of tokens;
  *forgetting*: gates drawn as kernel benchmarks do, each token forgets a factor of e^2.5 or more.
- Times are medians (fastest to slowest in brackets) of paths taking turns in one process; 128
  channels a head, l2 norm of q and k inside, fp32 state in and out."""


# ---------------------------------------------------------------- right before fast


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


def compare(label: str, times: dict[str, Timing], unit: float, base: str) -> list[tuple[str, ...]]:
    first = times[base].median
    return [(label, name, shown(t, unit), f"{first / t.median:,.1f}") for name, t in times.items()]


def measure_prefill(tokens: int, heads: int, rounds: int, progress: tqdm) -> str:
    """With what the machine can do: a matrix product of a fitting size, and a copy."""
    rows = []
    flop = FLOP * tokens * heads
    for label, dtype in DTYPES.items():
        case = draw(tokens, heads, dtype)
        left, right = torch.randn(2, 1024, 1024, dtype=dtype)
        moved = [torch.randn(1, tokens, heads, D, dtype=dtype) for _ in range(2 * 5)]
        limits = {
            "matrix product": lambda a=left, b=right: a @ b,
            "copy": lambda x=moved: [a.copy_(b) for a, b in zip(x[::2], x[1::2], strict=True)],
        }
        times = interleaved(prefill_paths(case) | limits, rounds, progress)
        product, copy = (times.pop(name).median for name in limits)
        peak = 2 * 1024**3 / product
        for _, name, *cells in compare(label, times, 1e3, THEIRS):
            seconds = times[name].median
            shares = f"{flop / seconds / peak:.1%}", f"{copy / 2 / seconds:.1%}"
            rows.append((label, name, *cells, *shares))
    header = ("dtype", "path", "ms", "times faster", "of product limit", "of copy limit")
    return table(header, rows)


def measure_decode(heads: int, rounds: int, progress: tqdm) -> str:
    rows = []
    for label, dtype in DTYPES.items():
        paths = decode_paths(draw(1, heads, dtype))
        rows += compare(label, interleaved(paths, rounds, progress), 1e6, THEIRS)
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


def measure_threads(shapes: list[tuple[int, int]], rounds: int, progress: tqdm) -> str:
    paths = {}
    for tokens, heads in shapes:
        case = draw(tokens, heads, torch.bfloat16)
        for isa in ISAS:
            for threads in (1, 2):
                path = on_threads(threads, prefill_path(on(isa), case))
                paths[f"T{tokens:,} H{heads}", isa, threads] = path
    times = interleaved(paths, rounds, progress)
    rows = []
    for (shape, isa, threads), one in times.items():
        if threads == 1:
            two = times[shape, isa, 2]
            cells = shown(one, 1e3), shown(two, 1e3), f"{one.median / two.median:.2f}"
            rows.append((shape, isa, *cells))
    return table(("shape", "kernels", "1 thread, ms", "2 threads, ms", "ratio"), rows)


def measure_layer_decode(hidden: int, heads: int, rounds: int, progress: tqdm) -> str:
    rows = []
    for label, dtype in DTYPES.items():
        times = interleaved(layers.decode_paths(hidden, heads, dtype), rounds, progress)
        rows += with_products(label, times)
    return table(LAYER_HEADER, rows)


def measure_layer_prefill(tokens: int, hidden: int, heads: int, rounds: int, progress: tqdm) -> str:
    rows = []
    for label, dtype in DTYPES.items():
        paths = layers.prefill_paths(tokens, hidden, heads, dtype)
        rows += with_products(label, interleaved(paths, rounds, progress))
    return table(LAYER_HEADER, rows)


LAYER_HEADER = ("dtype", "path", "ms", "times faster", "of its products' time")


def with_products(label: str, times: dict[str, Timing]) -> list[tuple[str, ...]]:
    products = times[layers.PRODUCTS].median
    rows = compare(label, times, 1e3, layers.THEIRS)
    return [(*row, f"{times[row[1]].median / products:.2f}") for row in rows]


def measure_memory(tokens: Iterable[int], heads: int, progress: tqdm) -> str | None:
    rows = []
    first, *longer = tokens
    names = (THEIRS, *map(on, ISAS))
    for name, count in (*((x, first) for x in names), *((FUSED, x) for x in longer)):
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
    for name, lengths in ((THEIRS, theirs), (TOKENWISE, theirs), (FUSED, ours)):
        for tokens in lengths:
            path = prefill_path(name, case.first(tokens))
            if name == FUSED:
                path = partial(path, output=torch.empty_like(case.v[:, :tokens]))
            paths[name, tokens] = path
    times = interleaved(paths, rounds, progress)
    curves = defaultdict(list)
    rows = []
    for (name, tokens), timing in times.items():
        curves[name].append((tokens, timing))
        base = times[name, theirs[-1]].median / theirs[-1]
        each = timing.median / tokens
        row = (name, f"{tokens:,}", shown(timing, 1e3), f"{each * 1e9:,.0f}", f"{each / base:.2f}")
        rows.append(row)
    plot(curves, f"KDA forward on a CPU: B1 H{heads} D{D}, bf16", figure)
    return table(("path", "T", "ms", "ns a token", f"of T = {theirs[-1]:,}'s"), rows)


# ---------------------------------------------------------------- the page


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

    hidden, layer_heads = (256, 2) if args.quick else (2304, 32)
    kernels, lengths = max(1, len(ISAS)), len(ours) + 2 * len(theirs)
    timed = 2 * (kernels + 5) + 2 * 3 + 12 + 2 * 2 * len(ISAS) + 2 * 4 + 2 * 3
    steps = 16 + 2 + kernels + timed * (rounds + 1) + lengths * (rounds_long + 1)
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
        shape = f"B1 T{tokens:,} H{heads}"
        section(
            f"Prefill: {shape}",
            "Bounded gate, remembering; fp32 inputs run the avx512 kernels within amx. Product\n"
            "limit: what a matrix product of 1024 x 1024 in that dtype reaches here, against\n"
            f"{FLOP / 1e3:,.0f} kFLOP a token and head. Copy limit: the time to move q, k, v, g\n"
            "and the output once.\n\n" + measure_prefill(tokens, heads, rounds, progress),
        )
        section(
            "One decode step: B1 H32",
            "The state [K, V] is updated in place by mate, returned anew by transformers.\n\n"
            + measure_decode(32, rounds, progress),
        )
        section(
            f"Gates and regimes: {shape}",
            f"{FUSED}; pre-computed: {STRICT}.\n\n"
            + measure_gates(tokens, heads, rounds, progress),
        )
        section(
            "Threads: B1, bf16",
            measure_threads([(tokens, heads), (8 * tokens, 2)], rounds, progress),
        )
        section(
            f"One decode step of the whole layer: hidden {hidden:,}, H{layer_heads}",
            measure_layer_decode(hidden, layer_heads, rounds, progress),
        )
        section(
            f"Prefill of the whole layer: B1 T{tokens:,}, hidden 1,024, H8",
            measure_layer_prefill(tokens, 1024, 8, rounds, progress),
        )
        memory = measure_memory([tokens, ours[-1]], heads, progress)
        section(
            f"Peak memory above inputs and outputs: B1 H{heads}, bf16",
            "Each call in a fresh process: the kernel's mark of the highest resident memory is\n"
            "reset (`/proc/self/clear_refs`) with the inputs in place, and what the call returns is"
            f"\nsubtracted.\n\n{memory or 'Not measured: this needs Linux.'}",
        )
        against = measure_lengths(ours, theirs, heads, rounds_long, progress, out / "cpu.png")
        section(
            f"Time against T: B1 H{heads}, bf16",
            "Into an output given: above some 32 MiB the system maps the pages of a new one one by "
            f"one,\nwhich would show instead.\n\n{against}\n\n![time against T](cpu.png)",
        )
    (out / "cpu.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
