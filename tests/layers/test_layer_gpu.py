"""The layer and the FlashKDA API on a real GPU: no waiting for the device, CUDA graphs, serving."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from kda_cases import BOUNDS, draw, rel_rms
from layer_truth import make_layer, truth
from torch import Tensor

import flash_kda
import mate
from mate.backends import gpu
from mate.layers import KDACache, KimiDeltaAttention, StatePool

bf16 = torch.bfloat16
LENGTHS = (5, 300, 0, 1, 70)
BOUND = 2e-2  # of bf16 projections on both sides

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch finds no CUDA device on this machine"
)


@pytest.fixture(autouse=True)
def queued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions that are called."""
    choice = mate.backend_for("cuda", bf16)
    assert choice.name == "native", choice.refusals
    names, call = [], gpu.Queue.__call__
    monkeypatch.setattr(
        gpu.Queue, "__call__", lambda x, *rest: names.append(x.function.__name__) or call(x, *rest)
    )
    return names


@contextlib.contextmanager
def unwaiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw_layer(**options: int) -> tuple[KimiDeltaAttention, list[Tensor]]:
    """A layer in bf16 on the GPU, and documents of 400 tokens."""
    layer = make_layer(hidden=256, heads=2, **options).to("cuda", bf16)
    torch.manual_seed(1)
    return layer, [torch.randn(400, 256, device="cuda").to(bf16) for _ in LENGTHS]


def expected(layer: KimiDeltaAttention, x: Tensor) -> Tensor:
    exact = make_layer(hidden=256, heads=2, num_v_heads=layer.num_v_heads)
    exact.load_state_dict({name: p.float().cpu() for name, p in layer.state_dict().items()})
    return truth(exact, x.float().cpu())[0]


@pytest.mark.parametrize("num_v_heads", [2, 4])
@torch.no_grad()
def test_prompts_and_steps_without_waiting(num_v_heads: int) -> None:
    """Prompts, then steps of every document, then both in one call; fused and not."""
    layer, whole = draw_layer(num_v_heads=num_v_heads)
    calls = LENGTHS, (1,) * 5, (20, 1, 33, 0, 1)
    bounds = [torch.tensor([0, *lengths], device="cuda").cumsum(0) for lengths in calls]
    cache, at, outputs = KDACache(), [0] * 5, [[] for _ in LENGTHS]
    for lengths, bound in zip(calls, bounds, strict=True):
        parts = [w[a : a + n] for w, a, n in zip(whole, at, lengths, strict=True)]
        x = torch.cat(parts)[None]
        with unwaiting():
            y = layer(x, cache=cache, cu_seqlens=bound)
        for output, part in zip(outputs, y[0].split(lengths), strict=True):
            output.append(part)
        at = [a + n for a, n in zip(at, lengths, strict=True)]
        layer.fuse_projections()
    for w, output, n in zip(whole, outputs, at, strict=True):
        assert rel_rms(torch.cat(output).cpu(), expected(layer, w[:n])) < BOUND


@torch.no_grad()
def test_a_padded_batch_without_waiting() -> None:
    layer, whole = draw_layer()
    x = torch.stack(whole[:2])[:, :90]
    mask = torch.ones(2, 90, dtype=torch.long, device="cuda")
    mask[0, :30] = 0
    with unwaiting():
        y = layer(x, attention_mask=mask)
    assert rel_rms(y[0, 30:].cpu(), expected(layer, x[0, 30:])) < BOUND
    assert rel_rms(y[1].cpu(), expected(layer, x[1])) < BOUND
    assert not y[0, :30].any()


@torch.no_grad()
def test_a_graph_replays_prompt_and_step(queued: list[str]) -> None:
    """One graph for a prompt of 64 tokens, one for a step, over the same cache."""
    layer, whole = draw_layer()
    batch = torch.stack(whole[:3])
    cache = KDACache()
    layer(batch[:, :64], cache=cache)  # its memory
    prompt, token = batch[:, :64].clone(), batch[:, :1].clone()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    with torch.cuda.graph(graphs[0]):
        cache.get_conv_state(0).zero_()
        cache.get_recurrent_state(0).zero_()
        first = layer(prompt, cache=cache)
    with torch.cuda.graph(graphs[1]):
        step = layer(token, cache=cache)
    graphs[0].replay()
    outputs = [first.clone()]
    for i in range(64, 100):
        token.copy_(batch[:, i : i + 1])
        graphs[1].replay()
        outputs.append(step.clone())
    for n in range(3):
        found = torch.cat([y[n] for y in outputs])
        assert rel_rms(found.cpu(), expected(layer, batch[n, :100])) < BOUND
    assert queued.count("mate_gpu_layer_step") == 1


@torch.no_grad()
def test_slots_of_a_pool(queued: list[str]) -> None:
    layer, whole = draw_layer()
    pool = StatePool.for_model(layer, 4)
    slots = [pool.allocate() for _ in range(3)]
    order = [slots[2], slots[0]]
    x = torch.stack(whole[:2])
    outputs = [layer(x[:, :50], cache=pool.batch(order))]
    outputs += [layer(x[:, i : i + 1], cache=pool.batch(order)) for i in range(50, 60)]
    for n in range(2):
        found = torch.cat([y[n] for y in outputs])
        assert rel_rms(found.cpu(), expected(layer, x[n, :60])) < BOUND
    assert queued.count("mate_gpu_layer_step") == 10


@pytest.mark.parametrize("lens", [None, [0, 40, 23]])
def test_flash_kda(lens: list[int] | None) -> None:
    case = draw(B=2, T=63, lens=lens, dtype=bf16, scale=0.1)
    t = {name: x.cuda() for name, x in case.tensors.items()}
    out, final = torch.full_like(t["v"], torch.nan), torch.full_like(t["initial_state"], torch.nan)
    flash_kda.fwd(
        t["q"], t["k"], t["v"], t["g"], t["beta"], 0.1, out, t["A_log"], t["dt_bias"], -5.0,
        t["initial_state"], final, t.get("cu_seqlens"),
    )  # fmt: skip
    output, state = case.reference()
    assert rel_rms(out.cpu(), output) < BOUNDS[bf16][0]
    assert rel_rms(final.cpu(), state) < BOUNDS[bf16][1]
