"""KDA on a GPU: mate against flash-linear-attention and cuDNN's Python front end; decoding.

    python benchmarks/gpu.py            # everything; writes docs/benchmarks/gpu.md and gpu.png
    python benchmarks/gpu.py --quick    # two shapes; writes to out/benchmarks

    pip install flash-linear-attention nvidia-cudnn-frontend[cutedsl]   # the peers; either may lack

Every path is first compared with the float64 recurrence on the very inputs that are timed, on two
of their heads: where mate is wrong nothing is timed, and a peer that is wrong is named.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_decode
import torch
from cases import BOUNDS, Case, D, draw, relative_error
from report import bars, table
from torch import Tensor
from tqdm import tqdm

import mate
from mate.functional.reference import kda_reference

ROOT = Path(__file__).parents[1]
REGIMES = ("forgetting", "remembering")
OURS, FLA, CUDNN = "mate", "fla", "cuDNN"
PROMISED = BOUNDS["bf16"]
# q, k, v, g and the output once in 16 bits, and beta
BYTES = 5 * 2 * D + 2
CALLED = {
    OURS: "`mate.chunk_kda`",
    FLA: "`fla.ops.kda.chunk_kda` with `safe_gate`",
    CUDNN: "`cudnn.linear_attention.ops.kimi_delta_attention`",
}
EXPLANATION = """\
- All get the same tensors, with gate, l2 norm and sigmoid inside the call: bf16, bounded gate, 128
  channels a head, fp32 state in and out.
- *forgetting* (F): gates drawn as kernel benchmarks do, each token forgets a factor of e^2.5 or
  more; *remembering* (R): gates as a freshly initialised layer has them.
- Times are milliseconds a call, medians of calls that take turns. Each is called from Python and
  timed with two events, behind a write to 1 GiB that empties the L2 cache and lets Python run
  ahead by 0.25 ms: of a call whose Python takes longer, that is what the time is. floor: q, k, v,
  g, beta and the output once, and the states, at the rate of a copy within the GPU."""


class Shape(NamedTuple):
    batch: int
    tokens: int
    heads: int
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.lengths:
            return f"B{self.batch} T{self.tokens} H{self.heads}"
        if len(set(self.lengths)) == 1:
            return f"varlen {self.lengths[0]} x {len(self.lengths)} H{self.heads}"
        return f"varlen mixed H{self.heads}"

    def bytes(self) -> int:
        states = 2 * 4 * D * D * (len(self.lengths) or self.batch)
        return self.heads * (BYTES * self.batch * self.tokens + states)

    def draw(self, regime: str, gate: str = "bounded") -> Case:
        options = {"batch": self.batch, "lengths": self.lengths, "device": "cuda"}
        return draw(self.tokens, self.heads, torch.bfloat16, gate, regime, **options)


MIXED = (1300, 547, 2048, 963, 271, 3063)
SHAPES = [
    *(Shape(1, 8192, heads) for heads in (96, 64, 32, 8)),
    Shape(1, 2048, 12),
    Shape(1, 8192, 96, MIXED),
    *(Shape(1, 8192, heads, (1024,) * 8) for heads in (96, 32)),
    *(Shape(1, 65536, heads) for heads in (8, 32)),
    Shape(16, 512, 32),
]


# ---------------------------------------------------------------- what is timed


def ours(case: Case) -> Callable[[], tuple[Tensor, Tensor]]:
    return partial(mate.chunk_kda, **case.fused(), output_final_state=True)


def fla(case: Case) -> Callable[[], tuple[Tensor, Tensor]]:
    from fla.ops.kda import chunk_kda

    inside = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
    options = dict.fromkeys(inside, True) | {"safe_gate": case.lower_bound is not None}
    return partial(chunk_kda, **case.fused(), **options, output_final_state=True)


def cudnn(case: Case) -> Callable[[], tuple[Tensor, Tensor]]:
    from cudnn.linear_attention.ops import kimi_delta_attention

    batch, tokens = case.q.shape[:2]
    bounds = case.cu_seqlens
    if bounds is None:
        bounds = torch.arange(0, (batch + 1) * tokens, tokens, device="cuda")
    call = partial(
        kimi_delta_attention,
        *(x.flatten(0, 1) for x in (case.q, case.k, case.v, case.g, case.beta)),
        bounds.int(),
        initial_state=case.state.transpose(-1, -2).contiguous(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        safe_gate=True,
        gate_lower_bound=case.lower_bound,
        a_log=case.A_log,
        dt_bias=case.dt_bias,
    )

    def run() -> tuple[Tensor, Tensor]:
        output, state, *_ = call()
        return output.view_as(case.v), state.transpose(-1, -2)

    return run


PATHS: dict[str, Callable[[Case], Callable[[], tuple[Tensor, Tensor]]]] = {
    OURS: ours,
    FLA: fla,
    CUDNN: cudnn,
}


def available(names: list[str], shape: Shape) -> tuple[list[str], list[str]]:
    """mate, the peers that run here, and a line for each that does not."""
    able, reasons = [OURS], []
    for name in names:
        try:
            PATHS[name](shape.draw(REGIMES[0]))()
            able.append(name)
        except Exception as error:  # whatever a peer that does not run here may raise
            reasons.append(f"{name} does not run here: {type(error).__name__}: {error}")
    return able, reasons


# ---------------------------------------------------------------- right before fast


def heads_of(case: Case, heads: list[int]) -> dict[str, Any]:
    """The arguments of a call of some heads only."""
    arguments = case.fused()
    for name in ("q", "k", "v", "g"):
        arguments[name] = arguments[name][:, :, heads]
    arguments["beta"] = arguments["beta"][:, :, heads]
    arguments["initial_state"] = arguments["initial_state"][:, heads]
    for name in ("A_log", "dt_bias"):
        arguments[name] = arguments[name][heads]
    return arguments


def errors(case: Case, paths: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Of output and state of each path, over the first and the last head."""
    heads = [0, case.q.shape[2] - 1]
    output, state = kda_reference(**heads_of(case, heads))
    found = {}
    for name, path in paths.items():
        o, s = path()
        found[name] = relative_error(o[:, :, heads], output), relative_error(s[:, heads], state)
    return found


# key cosine, logit of beta: b is 0.95, 0.98, 0.998
ALIKE = ((0.75, 2.94), (0.9, 3.89), (0.99, 6.2))


def alike(cosine: float, logit: float) -> Case:
    """Keys that are nearly alike and written with b near 1: what loses digits."""
    case = draw(2048, 2, torch.bfloat16, device="cuda")
    shared = torch.randn(1, 1, *case.k.shape[2:], device="cuda")
    case.k = (cosine**0.5 * shared + (1 - cosine) ** 0.5 * case.k.float()).to(case.k.dtype)
    case.beta = torch.full_like(case.beta, logit)
    return case


def hard_errors(names: list[str]) -> str:
    rows = []
    for cosine, logit in ALIKE:
        case = alike(cosine, logit)
        found = errors(case, {name: PATHS[name](case) for name in names})
        cells = (" / ".join(f"{e:.1e}" for e in found[name]) for name in names)
        rows.append((f"key cosine {cosine}", *cells))
    return table(("inputs, T2048", *(f"{name}: output / state" for name in names)), rows)


# ---------------------------------------------------------------- times


def event_seconds(call: Callable[[], Any], flushed: Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flushed.zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def medians(paths: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds a call; the paths take turns."""
    for path in paths.values():
        for _ in range(3):
            path()
    samples: dict[str, list[float]] = {name: [] for name in paths}
    flushed = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    for _ in range(rounds):
        for name, path in paths.items():
            samples[name].append(event_seconds(path, flushed))
    return {name: statistics.median(x) for name, x in samples.items()}


def copy_rate(rounds: int) -> float:
    """Bytes read and written a second by a copy within the GPU."""
    source = torch.empty(2**30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)}, rounds)["copy"]


FIRST_CALL = """
import time, torch
x = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
q, k, v, g, beta = x(1, 2048, 12, 128), x(1, 2048, 12, 128), x(1, 2048, 12, 128), \
    x(1, 2048, 12, 128), x(1, 2048, 12)
A_log, dt_bias = torch.zeros(12, device="cuda"), torch.zeros(12, 128, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
import mate
mate.chunk_kda(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_call_seconds() -> float:
    """From `import mate` to a first result in a fresh process that has used the GPU already."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, check=True)
    return float(done.stdout)


# ---------------------------------------------------------------- the page


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two shapes")
    peers = [name for name in PATHS if name != OURS]
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument("--rounds", type=int, default=20, help="calls a median is taken of")
    parser.add_argument("--out", type=Path, help="folder of gpu.md and gpu.png")
    args = parser.parse_args()
    if not torch.cuda.is_available() or mate.backend_for("cuda", torch.bfloat16).name != "native":
        print("mate's GPU kernels do not serve here; see `python -m mate check`.", file=sys.stderr)
        return 1
    out = args.out or ROOT / ("out/benchmarks" if args.quick else "docs/benchmarks")
    out.mkdir(parents=True, exist_ok=True)
    shapes = [SHAPES[3], SHAPES[4]] if args.quick else SHAPES

    with torch.inference_mode():
        began = time.perf_counter()
        names, reasons = available(args.peers, SHAPES[4])
        rate = copy_rate(args.rounds)
        rows, wrong, worst = [], [], {name: (0.0, 0.0) for name in names}
        milliseconds: dict[str, dict[str, float]] = {name: {} for name in names}
        cases = [(shape, regime) for shape in shapes for regime in REGIMES]
        for shape, regime in tqdm(cases, leave=False, disable=None):
            case = shape.draw(regime)
            paths = {name: PATHS[name](case) for name in names}
            found = errors(case, paths)
            for name, pair in found.items():
                worst[name] = max(worst[name][0], pair[0]), max(worst[name][1], pair[1])
                if not all(e <= bound for e, bound in zip(pair, PROMISED, strict=True)):
                    wrong.append(f"{name}, {shape}, {regime}: {pair[0]:.1e}, {pair[1]:.1e}")
                    if name == OURS:
                        print(f"A bound is broken: {wrong[-1]}. Nothing is timed.", file=sys.stderr)
                        return 1
            times = medians(paths, args.rounds)
            floor = shape.bytes() / rate
            best = min((times[name] for name in names if name != OURS), default=None)
            rows.append(
                (
                    f"{shape}, {regime[0].upper()}",
                    *(f"{times[name] * 1e3:.3f}" for name in names),
                    f"{floor * 1e3:.3f}",
                    f"{times[OURS] / floor:.1f}",
                    f"{best / times[OURS]:.2f}" if best else "",
                )
            )
            tqdm.write("  ".join(rows[-1]), file=sys.stderr)
            for name in names:
                milliseconds[name][f"{shape}, {regime[0].upper()}"] = times[name] * 1e3
        softplus = {}
        for regime in REGIMES:
            path = {"softplus": ours(shapes[0].draw(regime, "softplus"))}
            path["bounded"] = ours(shapes[0].draw(regime))
            times = medians(path, args.rounds)
            softplus[regime] = times["softplus"] / times["bounded"]
        hard = hard_errors(names)
        decoding = gpu_decode.section(
            rate, args.rounds, lambda call: medians({OURS: call}, args.rounds)[OURS], FLA in names
        )
        minutes = (time.perf_counter() - began) / 60

    header = ("shape", *names, "floor", "over floor", "times faster than the best peer")
    command = "python benchmarks/gpu.py" + " --quick" * args.quick
    if args.peers != peers:
        command += " --peers " + " ".join(args.peers)
    errors_table = table(
        ("path", "output", "state"),
        [(name, *(f"{e:.1e}" for e in pair)) for name, pair in worst.items()],
    )
    page = [
        "# KDA on a GPU",
        f"Written by `{command}` in {minutes:.0f} minutes; every figure is from that one run.",
        f"{torch.cuda.get_device_name()}, a copy moves {rate / 1e9:,.0f} GB/s. mate "
        f"{mate.__version__}, torch {torch.__version__}. " + " ".join(reasons),
        "\n".join(f"- **{name}**: {CALLED[name]}" for name in names) + "\n" + EXPLANATION,
        "## Right before fast",
        "Worst relative RMS error over all rows below. Bounds: "
        + " and ".join(f"{bound:.0e}" for bound in PROMISED)
        + ". Broken by: "
        + ("; ".join(wrong) or "none")
        + f".\n\n{errors_table}",
        f"On keys that are nearly alike, with b near 1 and gates that remember:\n\n{hard}",
        "## Prefill",
        table(header, rows),
        "![milliseconds](gpu.png)",
        f"Softplus gate against the bounded one, {shapes[0]}: "
        + ", ".join(f"{x:.2f} times ({name})" for name, x in softplus.items())
        + ".",
        *decoding,
        f"First result after `import mate`: {first_call_seconds():.2f} s, in a process that has "
        "used the GPU before.",
    ]
    (out / "gpu.md").write_text("\n\n".join(page) + "\n")
    bars(
        milliseconds,
        "KDA forward, bf16, bounded gate (F forgetting, R remembering)",
        out / "gpu.png",
    )
    print("\n\n".join(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
