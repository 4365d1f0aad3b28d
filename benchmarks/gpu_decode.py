"""Decoding and the whole layer on a GPU: the second half of benchmarks/gpu.py's page."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import BOUNDS, Case, D, draw, relative_error
from report import table
from torch import Tensor

import mate
from mate.functional.reference import kda_reference
from mate.layers import KDACache, KimiDeltaAttention

HEADS, HIDDEN, PROMPT = 32, 2304, 8192
BATCHES, LAYER_BATCHES = (1, 8, 64, 256), (1, 4, 64)
STEPS = 1000  # of the check
IN_A_GRAPH = 20  # steps, so that the launch of the graph does not count
EAGER, EAGER_SAMPLES = 50, 5  # steps one after another; as often a round, since hosts waver


def step_of(rows: dict[str, Tensor], state: Tensor, output: Tensor) -> Callable[[], Any]:
    """One token a sequence; the state [V, K] is updated in place."""
    return lambda: mate.recurrent_kda(
        **rows, lower_bound=None, initial_state=state, final_state=state, output=output
    )


def fla_step_of(case: Case) -> Callable[[], Any]:
    """flash-linear-attention's; the state [K, V], a new one each time."""
    from fla.ops.kda import fused_recurrent_kda

    inside = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
    arguments = case.fused() | dict.fromkeys(inside, True)
    return partial(fused_recurrent_kda, **arguments, output_final_state=True)


def drift() -> tuple[float, float]:
    """Errors of the outputs and of the state after so many steps, softplus, remembering."""
    case = draw(STEPS, 2, torch.bfloat16, "softplus", device="cuda")
    t = {"q": case.q, "k": case.k, "v": case.v, "g": case.g, "beta": case.beta}
    gate = {"A_log": case.A_log, "dt_bias": case.dt_bias}
    start = case.state.transpose(-1, -2).contiguous()
    output, expected = kda_reference(**t, **gate, lower_bound=None, initial_state=start)
    state, outputs = start.clone(), torch.empty_like(case.v)
    for i in range(STEPS):
        rows = {name: x[:, i : i + 1] for name, x in t.items()}
        step_of(rows | gate, state, outputs[:, i : i + 1])()
    return relative_error(outputs, output), relative_error(state, expected)


def replay_seconds(call: Callable[[], Any], rounds: int) -> float:
    """Seconds a call, so many in a CUDA graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_GRAPH):
            call()
    graph.replay()
    samples = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / IN_A_GRAPH)
    return statistics.median(samples)


def eager_seconds(call: Callable[[], Any], rounds: int) -> float:
    """Seconds a call from Python, one after another without waiting in between."""
    for _ in range(20):
        call()
    samples = []
    for _ in range(EAGER_SAMPLES * rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(EAGER):
            call()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / EAGER)
    return statistics.median(samples)


def operator_rows(rate: float, rounds: int, with_fla: bool) -> list[tuple[str, ...]]:
    rows = []
    for batch in BATCHES:
        case = draw(1, HEADS, torch.bfloat16, "softplus", batch=batch, device="cuda")
        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
        output = torch.empty_like(case.v)
        steps = [step_of({name: getattr(case, name) for name in names}, case.state, output)]
        if with_fla:
            steps.append(fla_step_of(case))
        graph = [replay_seconds(step, rounds) for step in steps]
        eager = [eager_seconds(step, rounds) for step in steps]
        floor = (2 * case.state.nbytes + 5 * output.nbytes) / rate
        cells = (f"{x * 1e6:.1f}" for x in (*graph, floor, *eager))
        rows.append((f"B{batch} H{HEADS}", *cells))
    return rows


def layer_rows(prefill_seconds: Callable[[Callable[[], Any]], float], rounds: int) -> list[Any]:
    """Of a layer with the softplus gate; ``prefill_seconds`` times one call."""
    torch.manual_seed(0)
    layer = KimiDeltaAttention(HIDDEN, HEADS, layer_idx=0, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, PROMPT, HIDDEN, device="cuda", dtype=torch.bfloat16)
    rows = []
    for fused in (False, True):
        if fused and not layer.fuse_projections():
            raise RuntimeError("the projections cannot be fused")
        cells = [f"{prefill_seconds(lambda: layer(x, cache=KDACache())) * 1e3:.2f}"]
        for batch in LAYER_BATCHES:
            cache = KDACache()
            tokens = x[0, : 8 * batch].view(batch, 8, HIDDEN)
            layer(tokens, cache=cache)

            def step(cache: KDACache = cache, token: Tensor = tokens[:, :1]) -> Tensor:
                return layer(token, cache=cache)

            eager, graph = eager_seconds(step, rounds), replay_seconds(step, rounds)
            cells.append(f"{eager * 1e6:.0f} / {graph * 1e6:.1f}")
        rows.append(("after `fuse_projections()`" if fused else "as it is", *cells))
    return rows


def section(
    rate: float,
    rounds: int,
    prefill_seconds: Callable[[Callable[[], Any]], float],
    with_fla: bool,
) -> list[str]:
    """The page's paragraphs; raises AssertionError where a bound is broken."""
    found = drift()
    bounds = BOUNDS["bf16"]
    if not all(e <= bound for e, bound in zip(found, bounds, strict=True)):
        raise AssertionError(f"a bound is broken over {STEPS} steps: {found}. Nothing is timed.")
    graph, eager, fla = ["us in a graph"], ["us eager"], ""
    if with_fla:
        graph.append("fla in a graph")
        eager.append("fla eager")
        fla = " fla: `fla.ops.kda.fused_recurrent_kda`, which makes a new state."
    operator = table(
        ("one token, fp32 state", *graph, "floor, us", *eager),
        operator_rows(rate, rounds, with_fla),
    )
    layer = table(
        (f"layer, hidden {HIDDEN}, H{HEADS}", f"B1 T{PROMPT} prefill, ms",
         *(f"B{batch} step, us" for batch in LAYER_BATCHES)),
        layer_rows(prefill_seconds, rounds),
    )  # fmt: skip
    return [
        "## Decode",
        f"`mate.recurrent_kda`, {D} channels a head, bf16, softplus gate, the state [V, K] in "
        f"place. Errors over {STEPS} consecutive steps: output {found[0]:.1e}, state "
        f"{found[1]:.1e}. floor: the state read and written, and the rows, at the rate of a copy."
        f"{fla}",
        operator,
        "## The whole layer",
        "`KimiDeltaAttention`, bf16, softplus gate, with a cache. Of a step: from Python one call "
        "after another / in a graph.",
        layer,
    ]
