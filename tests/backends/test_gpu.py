"""The native kernels on a real GPU, through the public operator."""

import functools
import math

import pytest
import torch
from gpu_cases import BOUND, CASES, CORRELATED, LONG, built
from kda_cases import Case, draw, rel_rms
from torch import Tensor

import mate
from mate.__main__ import main
from mate.backends import gpu

cuda = torch.device("cuda")
bf16 = torch.bfloat16
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch finds no CUDA device on this machine"
)


@pytest.fixture
def native() -> None:
    choice = mate.backend_for(cuda, bf16)
    assert choice.name == "native", choice.refusals


def on_gpu(case: Case) -> dict:
    return {name: x.to(cuda) for name, x in case.tensors.items()} | case.options


def check(actual: tuple[Tensor, Tensor], expected: tuple, bound: tuple = BOUND) -> None:
    assert rel_rms(actual[0].cpu(), expected[0]) <= bound[0]
    assert rel_rms(actual[1].cpu(), expected[1]) <= bound[1]


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_matches_the_recurrence(name: str, native: None) -> None:
    case, expected = built(name)
    actual = mate.chunk_kda(**on_gpu(case), output_final_state=True)
    check(actual, expected, CORRELATED.get(name, BOUND))


@needs_gpu
@pytest.mark.parametrize("heads", [1, 33, 40, 67, 96])
def test_slices_and_slabs(heads: int, native: None) -> None:
    """More heads than fit a slab with few chunks, and every width of value slices."""
    case = draw(T=700, Hqk=1, Hv=heads, gate="softplus", regime="remembering", dtype=bf16)
    check(mate.chunk_kda(**on_gpu(case), output_final_state=True), case.reference())


@needs_gpu
@pytest.mark.parametrize("name", LONG)
def test_segments_side_by_side(name: str, native: None) -> None:
    """Few heads and long sequences: these are cut."""
    case = LONG[name](5000)
    check(mate.chunk_kda(**on_gpu(case), output_final_state=True), case.reference())


@needs_gpu
def test_segments_in_slabs(native: None) -> None:
    """More chunks than a slab holds."""
    case = draw(T=58500, Hqk=1, Hv=4, gate="softplus", regime="remembering", dtype=bf16)
    check(mate.chunk_kda(**on_gpu(case), output_final_state=True), case.reference())


@needs_gpu
@pytest.mark.parametrize("lens", [[8300], [2500, 0, 3300, 200]], ids=["one", "four"])
@pytest.mark.parametrize("heads", [32, 48])
def test_a_slab_is_prepared_while_another_is_scanned(
    heads: int, lens: list[int], native: None
) -> None:
    """In the place of what has been read. Call after call, between calls of other lengths."""
    draw_one = functools.partial(draw, Hqk=1, Hv=heads, regime="remembering", dtype=bf16)
    case, other = draw_one(lens=lens), on_gpu(draw_one(lens=lens[::-1], seed=1))
    t = on_gpu(case)
    first = mate.chunk_kda(**t, output_final_state=True)
    for _ in range(10):
        mate.chunk_kda(**other)
        again = mate.chunk_kda(**t, output_final_state=True)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    check(first, case.reference())


@needs_gpu
def test_a_graph_replays_other_lengths(native: None) -> None:
    """Where sequences are cut is found on the device."""
    draw_one = functools.partial(draw, Hqk=1, Hv=2, gate="softplus", dtype=bf16)
    t = on_gpu(draw_one(lens=[100, 3000, 900], regime="forgetting"))
    mate.chunk_kda(**t)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = mate.chunk_kda(**t, output_final_state=True)
    again = draw_one(lens=[4000, 0, 0], regime="remembering", seed=1)
    for name, x in again.tensors.items():
        t[name].copy_(x)
    graph.replay()
    check(actual, again.reference())


@needs_gpu
def test_a_graph_replays_the_call(native: None) -> None:
    case = draw(lens=[70, 0, 200], dtype=bf16)
    t = on_gpu(case)
    mate.chunk_kda(**t)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = mate.chunk_kda(**t, output_final_state=True)
    again = draw(lens=[100, 170, 0], dtype=bf16, seed=1)
    for name, x in again.tensors.items():
        t[name].copy_(x)
    graph.replay()
    check(actual, again.reference())


@needs_gpu
def test_another_stream(native: None) -> None:
    case, expected = built("varlen")
    t = on_gpu(case)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        actual = mate.chunk_kda(**t, output_final_state=True)
        torch.cuda.current_stream().synchronize()
    check(actual, expected)


@needs_gpu
def test_bad_numbers_stay_in_their_sequence_and_head(native: None) -> None:
    case = draw(lens=[7, 68, 9], Hqk=3, Hv=3, dtype=bf16)
    clean = mate.chunk_kda(**on_gpu(case), output_final_state=True)
    case.tensors["k"][:, 7:75, 1] = math.nan
    output, final = mate.chunk_kda(**on_gpu(case), output_final_state=True)
    keep = torch.ones(84, 3, dtype=torch.bool)
    keep[7:75, 1] = False
    assert torch.equal(output[0, keep.to(cuda)], clean[0][0, keep.to(cuda)])
    assert torch.equal(final[[0, 2]], clean[1][[0, 2]])
    assert output[0, 7:75, 1].isnan().all()


@needs_gpu
def test_the_self_test_finds_nothing_wrong(native: None, capsys) -> None:
    """It begins with where products put their numbers."""
    wrong = main(["selftest", "--device", "cuda"])
    said = capsys.readouterr().out
    assert not wrong, said
    assert "A B^T, B by columns" in said


# ---- without one --------------------------------------------------------------------------------


def test_a_missing_library_names_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    gpu.library.cache_clear()
    monkeypatch.setenv("MATE_CUDA_LIBRARY", str(tmp_path / "none.so"))
    try:
        reason = gpu.refusal(cuda, bf16)
        assert reason is not None and "MATE_BUILD=cpu,cuda pip install" in reason
    finally:
        gpu.library.cache_clear()


def test_a_broken_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    path = tmp_path / "broken.so"
    path.write_text("no library")
    gpu.library.cache_clear()
    monkeypatch.setenv("MATE_CUDA_LIBRARY", str(path))
    try:
        assert "could not be loaded" in str(gpu.refusal(cuda, bf16))
    finally:
        gpu.library.cache_clear()


def test_fp32_goes_to_the_next_backend() -> None:
    choice = mate.backend_for("cuda", torch.float32)
    assert choice.name == "pytorch" and "float16 and bfloat16" in choice.refusals["native"]
