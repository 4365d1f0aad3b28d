"""The GPU kernels on an emulated GPU, through their C interface, against the float64 recurrence.

The same source runs on real ones (tests/backends/test_gpu.py, where there is one).
"""

import ctypes
import functools
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_host
import pytest
import test_gpu_decode
import torch
from gpu_cases import BOUND, CASES, CORRELATED, LONG, built, built_recurrent
from gpu_host import ROOT, call_of, launch, run
from gpu_machines import Emulated
from kda_cases import Case, draw, rel_rms

from mate.functional.reference import kda_reference

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
pytestmark = needs_compiler
bf16, fp16 = torch.bfloat16, torch.float16
UNSUPPORTED, LAUNCH_FAILED = 2, 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The reference's small steps gain nothing from a second one, and wait for it if it is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return gpu_host.build(tmp_path_factory.mktemp("gpu_host"))


@pytest.fixture(scope="module")
def few_chunks_a_slab(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Room for 7 chunks of one head, 2 of two: slabs cut sequences everywhere."""
    folder = tmp_path_factory.mktemp("gpu_host_slabs")
    return gpu_host.build(folder, "-DMATE_GPU_MOST_BYTES=(600<<10)")


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Segments of 3 chunks, however small the call."""
    folder = tmp_path_factory.mktemp("gpu_host_segments")
    return gpu_host.build(folder, "-DMATE_GPU_SEGMENT_CHUNKS=3")


@pytest.fixture(scope="module")
def segments_of_one(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("gpu_host_segments_of_one")
    return gpu_host.build(folder, "-DMATE_GPU_SEGMENT_CHUNKS=1")


@pytest.fixture(scope="module")
def segments_in_slabs(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Of 1 chunk, in slabs of at most 5 of one head; and with CUDA's layout."""
    folder = tmp_path_factory.mktemp("gpu_host_segments_in_slabs")
    flags = ["-DMATE_GPU_MOST_BYTES=(1000<<10)", "-DMATE_GPU_HOST_MMA_SYNC"]
    return gpu_host.build(folder, "-DMATE_GPU_SEGMENT_CHUNKS=1", *flags)


@pytest.fixture
def little_shared_memory(lib: ctypes.CDLL) -> Iterator[None]:
    """Blocks may use as much as on sm_86, too little for two stages of any slice."""
    lib.mate_gpu_host_shared_limit(99 << 10)
    yield
    lib.mate_gpu_host_shared_limit(227 << 10)


@pytest.fixture
def little_shared_memory_for_segments(segments: ctypes.CDLL) -> Iterator[None]:
    segments.mate_gpu_host_shared_limit(99 << 10)
    yield
    segments.mate_gpu_host_shared_limit(227 << 10)


@pytest.fixture(scope="module")
def cuda_layout(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return gpu_host.build(tmp_path_factory.mktemp("gpu_host_mma"), "-DMATE_GPU_HOST_MMA_SYNC")


def check(actual: tuple, expected: tuple, bound: tuple[float, float] = BOUND) -> None:
    assert rel_rms(actual[0], expected[0]) <= bound[0]
    assert rel_rms(actual[1], expected[1]) <= bound[1]


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_matches_the_recurrence(name: str, lib: ctypes.CDLL) -> None:
    case, expected = built(name)
    check(run(lib, case), expected, CORRELATED.get(name, BOUND))


@pytest.mark.parametrize("name", ["varlen", "batch", "T150", "key-first", "one-head", "T0"])
def test_slabs(name: str, few_chunks_a_slab: ctypes.CDLL, lib: ctypes.CDLL) -> None:
    """A sequence that slabs cut carries its state on as it is."""
    case, expected = built(name)
    actual = run(few_chunks_a_slab, case)
    check(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, run(lib, case), strict=True))


def test_operands_in_place_of_others(few_chunks_a_slab: ctypes.CDLL, lib: ctypes.CDLL) -> None:
    """Room for two chunks, taken sixteen times over."""
    case = draw(T=1001, Hqk=1, Hv=2, dtype=bf16)
    actual = run(few_chunks_a_slab, case)
    check(actual, case.reference())
    assert all(torch.equal(a, b) for a, b in zip(actual, run(lib, case), strict=True))


@pytest.mark.parametrize("most", [256 << 20, 1100 << 10], ids=["room", "ring of 6"])
def test_few_slabs(most: int, tmp_path: Path, lib: ctypes.CDLL) -> None:
    """Where a scan leaves half of the GPU free: 7 chunks as 3, 3 and 1."""
    few = gpu_host.build(tmp_path, "-DMATE_GPU_LEAST_SLAB=1", f"-DMATE_GPU_MOST_BYTES={most}")
    few.mate_gpu_host_multiprocessors(8)
    case = draw(T=420, Hqk=1, Hv=2, regime="remembering", dtype=bf16)
    actual = run(few, case)
    check(actual, case.reference())
    assert all(torch.equal(a, b) for a, b in zip(actual, run(lib, case), strict=True))


@pytest.mark.parametrize("name", ["T150", "varlen-int32-fp16", "cosine-0.9"])
def test_layout_of_mma_sync(name: str, cuda_layout: ctypes.CDLL) -> None:
    """arch/mma_sync.h over emulated instructions: what cuda.h runs, but for the assembler."""
    case, expected = built(name)
    check(run(cuda_layout, case), expected, CORRELATED.get(name, BOUND))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65])
def test_every_tail(n: int, lib: ctypes.CDLL) -> None:
    case = draw(lens=[64 + n, n], Hqk=1, Hv=1, dtype=bf16, seed=n)
    check(run(lib, case), case.reference())


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_slices_of_value_channels(heads: int, lib: ctypes.CDLL) -> None:
    """The emulated GPU's size makes these take slices of 32, 64 and 128 channels."""
    case = draw(T=70, Hqk=1, Hv=heads, dtype=bf16)
    check(run(lib, case), case.reference())


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.usefixtures("little_shared_memory")
def test_one_stage(heads: int, lib: ctypes.CDLL) -> None:
    case = draw(T=150, Hqk=1, Hv=heads, dtype=bf16)
    check(run(lib, case), case.reference())


def test_without_states(lib: ctypes.CDLL) -> None:
    case = draw(lens=[70, 0, 5], state=False, dtype=bf16)
    expected = case.reference()
    check(run(lib, case), expected)
    output, untouched = run(lib, case, final_state=False)
    assert rel_rms(output, expected[0]) <= BOUND[0]
    assert untouched.isnan().all()


# ---- segments side by side ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_segments(name: str, segments_of_one: ctypes.CDLL) -> None:
    case, expected = built(name)
    check(run(segments_of_one, case), expected, CORRELATED.get(name, BOUND))


def _huge_state(bits: float) -> Case:
    """1e4, of which a segment of 3 chunks leaves 2^-bits: 2^-30 and its map is about dead."""
    case = draw(T=500, Hqk=1, Hv=1, gate="log", dtype=bf16)
    case.tensors["g"].fill_(-bits / 192 * math.log(2))
    case.tensors["beta"].fill_(-3.0)  # deltas would forget too
    case.tensors["initial_state"] *= 1e4
    return case


def _erased_at(*tokens: int) -> Case:
    """Everything before these tokens is forgotten, else nothing is."""
    case = draw(T=500, Hqk=1, Hv=1, gate="log", regime="remembering", dtype=bf16)
    case.tensors["g"][:, list(tokens)] = -torch.inf
    return case


def _edges(*lens: int) -> Case:
    return draw(lens=list(lens), Hqk=1, Hv=1, gate="softplus", regime="remembering", dtype=bf16)


SEGMENTED: dict[str, Callable[[], Case]] = {
    **{name: functools.partial(make, 500) for name, make in LONG.items()},
    **{f"huge-state-{bits}": functools.partial(_huge_state, bits) for bits in (16, 28, 30, 32)},
    "erased-at-the-end": lambda: _erased_at(191, 383),
    "erased-at-the-start": lambda: _erased_at(0, 192, 385),
    "erased-midway": lambda: _erased_at(100, 300),
    "edges": lambda: _edges(448, 128, 576, 129, 449),
    "many-and-none": lambda: _edges(0, 65, 500, 0, 1, 400, 64, 449, 0),
}


@functools.cache
def long_case(name: str) -> tuple[Case, tuple]:
    case = SEGMENTED[name]()
    return case, case.reference()


@pytest.mark.parametrize("name", SEGMENTED)
def test_long_sequences_in_segments(
    name: str, segments: ctypes.CDLL, segments_in_slabs: ctypes.CDLL
) -> None:
    case, expected = long_case(name)
    check(run(segments, case), expected)
    check(run(segments_in_slabs, case), expected)


def test_the_host_chooses_segments(lib: ctypes.CDLL) -> None:
    """On a GPU of some size, for few heads."""
    case = LONG["remembering"](2000)
    expected = case.reference()
    packed, _ = gpu_host.native.pack(call_of(case.tensors, case.options), case.tensors["v"], None)
    least = lib.mate_gpu_kda_workspace(packed)
    lib.mate_gpu_host_multiprocessors(132)
    try:
        assert lib.mate_gpu_kda_workspace(packed) > least
        check(run(lib, case), expected)
    finally:
        lib.mate_gpu_host_multiprocessors(4)


@pytest.mark.parametrize(
    ("name", "whole", "least", "most"),
    [
        ("forgetting", "key-first", 0.4, 0.55),  # of 3 chunks M takes 1, B 2
        ("erased-at-the-end", "key-first", 0.4, 0.55),
        ("erased-at-the-start", "key-first", 0.6, 0.75),  # M takes 1, B all
        ("huge-state-28", "key-first", 1.0, 1.0),
        ("remembering", "key-first", 1.0, 1.0),
    ],
)
def test_dead_maps_are_not_walked(
    name: str, whole: str, least: float, most: float, segments: ctypes.CDLL, lib: ctypes.CDLL
) -> None:
    """What segments cost on top, against a call of the same size that remembers everything."""

    def operations(each: ctypes.CDLL, case: Case) -> int:
        before = each.mate_gpu_host_operations()
        run(each, case)
        return each.mate_gpu_host_operations() - before

    def on_top(name: str) -> int:
        case, _ = long_case(name)
        return operations(segments, case) - operations(lib, case)

    assert least <= on_top(name) / on_top(whole) <= most


def test_segments_over_a_state_in_place(segments: ctypes.CDLL) -> None:
    """The last segment stores the state in the memory that the first begins with, in any order."""
    case, expected = long_case("remembering")
    for seed in range(4):
        t = {name: x.clone() for name, x in case.tensors.items()}
        output = torch.full_like(t["v"], math.nan)
        segments.mate_gpu_host_seed(seed)
        assert launch(segments, call_of(t, case.options), output, t["initial_state"]) == 0
        check((output, t["initial_state"]), expected)


@pytest.mark.usefixtures("little_shared_memory_for_segments")
def test_segments_in_one_stage(segments: ctypes.CDLL) -> None:
    case, expected = long_case("remembering")
    check(run(segments, case), expected)


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, 4])
def test_any_alignment(shift: int, lib: ctypes.CDLL) -> None:
    """2 or 8 bytes off: the same numbers as with vector loads."""
    case, expected = built("grouped")
    actual = run(lib, case, shift=shift)
    check(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, run(lib, case), strict=True))


def test_no_access_is_misaligned(tmp_path: Path) -> None:
    """A GPU faults where this processor does not: UndefinedBehaviorSanitizer ends the process."""
    checked = gpu_host.build(tmp_path, "-fsanitize=undefined", "-fno-sanitize-recover=undefined")
    for name in ("grouped", "bf16-key-first", "fp32-gate-and-beta", "varlen-int32-fp16"):
        case, expected = built(name)
        for shift in (0, 1, 2, 4):
            check(run(checked, case, shift=shift), expected)
    for name in ("grouped", "bfloat16-state-key-first", "fp32", "no-initial-state", "varlen"):
        case, expected = built_recurrent(name)
        for shift in (0, 1, 2, 4):
            check(test_gpu_decode.run(Emulated(checked), case, shift), expected)
    for dtype in (torch.float32, bf16):
        test_gpu_decode.check_layer(Emulated(checked), dtype)


@pytest.mark.parametrize("width", [3 * 128, 3 * 128 + 8, 3 * 128 + 1], ids=str)
def test_views_of_one_projection(width: int, lib: ctypes.CDLL) -> None:
    case, expected = built("T150")
    t = dict(case.tensors)
    fused = torch.full((1, 150, 2, width), math.nan, dtype=bf16)
    for i, name in enumerate("qkv"):
        view = fused[..., i * 128 : i * 128 + 128]
        t[name] = view.copy_(t[name])
    room = torch.full((1, 150, 2, width), math.nan, dtype=bf16)
    output, final = room[..., 128:256], torch.full((1, 2, 128, 128), math.nan)
    assert launch(lib, call_of(t, case.options), output, final) == 0
    check((output, final), expected)
    assert room[..., :128].isnan().all() and room[..., 256:].isnan().all()


def test_offsets_beyond_32_bits(lib: ctypes.CDLL) -> None:
    """Two sequences 2^31 elements apart, of memory that is mostly never touched."""
    case, expected = built("batch")
    t, apart = dict(case.tensors), 2**31
    room = torch.empty(2 * apart + 2**20, dtype=bf16)

    def place(x: torch.Tensor, offset: int) -> torch.Tensor:
        stride = (apart, *x.stride()[1:])
        return room.as_strided(x.shape, stride, offset).copy_(x)

    for i, name in enumerate(("q", "k", "v", "g", "beta")):
        t[name] = place(t[name], i * 2**17)
    output = place(torch.full_like(t["v"], math.nan).contiguous(), 5 * 2**17)
    final = torch.full((3, 2, 128, 128), math.nan)
    assert launch(lib, call_of(t, case.options), output, final) == 0
    check((output, final), expected)


@pytest.mark.parametrize("state_v_first", [True, False], ids=["value-first", "key-first"])
def test_state_in_place(state_v_first: bool, lib: ctypes.CDLL) -> None:
    case = draw(lens=[70, 0, 20], dtype=bf16, state_v_first=state_v_first)
    expected = case.reference()
    state = case.tensors["initial_state"]
    output = torch.full_like(case.tensors["v"], math.nan)
    assert launch(lib, call_of(case.tensors, case.options), output, state) == 0
    check((output, state), expected)


@pytest.mark.parametrize("multiprocessors", [4, 40, 132, 304])
def test_workspace_is_bounded(multiprocessors: int, lib: ctypes.CDLL) -> None:
    """From shapes alone: nothing is launched."""
    lib.mate_gpu_host_multiprocessors(multiprocessors)
    try:
        for T, heads in ((1 << 20, 96), (1 << 27, 8), (8192, 128), (1 << 20, 32), (1 << 20, 1)):
            x = torch.empty(1, 1, heads, 128, dtype=bf16).expand(1, T, heads, 128)
            t = {name: x for name in "qkvg"} | {"beta": x[..., 0]}
            packed, _ = gpu_host.native.pack(call_of(t, {}), x, None)
            assert 0 < lib.mate_gpu_kda_workspace(packed) <= 256 << 20
    finally:
        lib.mate_gpu_host_multiprocessors(4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("values", "safe"),
    [
        ([0, 1000], [0, 33]),
        ([-7, 5, 2, 20], [0, 5, 5, 20]),
        ([5, 20], [5, 20]),
        ([-(2**31), 2**31 - 1], [0, 33]),
    ],
    ids=["beyond-the-end", "decreasing", "late-start", "extremes"],
)
def test_cu_seqlens_are_clamped(
    values: list[int], safe: list[int], dtype: torch.dtype, lib: ctypes.CDLL
) -> None:
    case = draw(T=33, state=False, dtype=bf16)
    case.tensors["cu_seqlens"] = torch.tensor(values, dtype=dtype)
    output, final = run(lib, case)
    expected, state = kda_reference(**{**case.kwargs(), "cu_seqlens": torch.tensor(safe)})
    written = slice(safe[0], safe[-1])
    check((output[:, written], final), (expected, state))
    assert output[:, : safe[0]].isnan().all() and output[:, safe[-1] :].isnan().all()


@pytest.mark.parametrize("count", [256, 600])
def test_many_sequences(count: int, lib: ctypes.CDLL) -> None:
    """More than the planning kernel has threads; most are empty."""
    lens = [0] * count
    lens[3], lens[count // 2], lens[-1] = 5, 66, 2
    case = draw(lens=lens, Hqk=1, Hv=1, state=False, dtype=bf16)
    check(run(lib, case), case.reference())


# ---- what must not spread -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["q", "k", "v", "g", "beta", "initial_state"])
def test_bad_numbers_stay_in_their_sequence_and_head(
    where: str, value: float, lib: ctypes.CDLL
) -> None:
    case = draw(lens=[7, 68, 9], Hqk=3, Hv=3, dtype=bf16)
    clean = run(lib, case)
    x = case.tensors[where]
    if where == "initial_state":
        x[1, 1] = value
    else:
        x[:, 7:75, 1] = value
    output, final = run(lib, case)
    keep_tokens = torch.ones(84, 3, dtype=torch.bool)
    keep_tokens[7:75, 1] = False
    keep_states = torch.ones(3, 3, dtype=torch.bool)
    keep_states[1, 1] = False
    assert torch.equal(output[0][keep_tokens], clean[0][0][keep_tokens])
    assert torch.equal(final[keep_states], clean[1][keep_states])
    if math.isnan(value):
        assert output[0, 7:75, 1].isnan().all()


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_dtypes_that_are_not_served(name: str, lib: ctypes.CDLL) -> None:
    case = draw(T=20, dtype=bf16)
    other = torch.float32 if name == "q" else fp16
    case.tensors[name] = case.tensors[name].to(other)
    output = torch.full_like(case.tensors["v"], gpu_host.SENTINEL)
    assert launch(lib, call_of(case.tensors, {}), output, None) == UNSUPPORTED
    assert (output == gpu_host.SENTINEL).all()


# ---- the emulation ------------------------------------------------------------------------------


@functools.cache
def sensitive_cases() -> list[tuple[Case, tuple]]:
    """Small calls that pass every barrier: long memories over several chunks; many sequences."""
    gates = {"gate": "log", "regime": "remembering"}
    cases = [draw(T=150, Hqk=1, Hv=1, dtype=bf16, cosine=0.5, **gates)]
    cases.append(draw(lens=[1] * 300, Hqk=1, Hv=1, state=False, dtype=bf16))
    return [(case, case.reference()) for case in cases]


def right(lib: ctypes.CDLL, case: Case, expected: tuple) -> bool:
    """Also false if the launch fails, or hands back what it should not have written."""
    try:
        for limit in (99 << 10, 227 << 10):  # one stage, two stages
            lib.mate_gpu_host_shared_limit(limit)
            check(run(lib, case), expected)
    except AssertionError:
        return False
    finally:
        lib.mate_gpu_host_shared_limit(227 << 10)
    return True


def test_every_order_of_threads_gives_the_same(lib: ctypes.CDLL) -> None:
    case, expected = sensitive_cases()[0]
    results = []
    for seed in range(6):
        lib.mate_gpu_host_seed(seed)
        results.append(run(lib, case))
        check(results[-1], expected)
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))


def test_every_barrier_is_needed(lib: ctypes.CDLL, segments: ctypes.CDLL) -> None:
    """Without any one of the source's barriers some order of threads gives wrong numbers."""
    libs = (segments, lib)
    sites = lib.mate_gpu_host_barriers()
    assert sites > 10 and sites == segments.mate_gpu_host_barriers()

    def caught(site: int, seed: int) -> bool:
        for each in libs:
            each.mate_gpu_host_drop_barrier(site)
            each.mate_gpu_host_seed(seed)
        whole = test_gpu_decode.right(Emulated(lib))
        whole = whole and all(right(lib, *x) for x in sensitive_cases())
        return not (whole and right(segments, *long_case("log")))

    try:
        missed = [s for s in range(sites) if not any(caught(s, seed) for seed in range(12))]
    finally:
        for each in libs:
            each.mate_gpu_host_drop_barrier(-1)
            each.mate_gpu_host_seed(1)
    assert not missed


MISUSES = {
    "skipped-barrier": "the others wait for threads that do not come",
    "two-barriers": "threads of a block are at different barriers",
    "two-operations": "lanes of a warp are at different operations",
    "missing-lane": "the others wait for threads that do not come",
    "outside-shared": "wrote outside its shared memory",
    "misaligned-copy": "a copy's target is not aligned",
    "too-much-shared": "is too large",
    "none": "",
}


@pytest.fixture(scope="module")
def misuse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Runs one kernel of gpu_host_misuse.cpp and returns what the launch said."""
    program: Path = tmp_path_factory.mktemp("misuse") / "misuse"
    flags = [x for x in gpu_host.FLAGS if x not in ("-shared", "-fPIC")]
    sources = [ROOT / "tests/backends/gpu_host_misuse.cpp", ROOT / "csrc/gpu/arch/host.cpp"]
    subprocess.run(["g++", *flags, f"-I{ROOT}/csrc/gpu", *sources, "-o", program], check=True)

    def run_one(name: str) -> str:
        command = [str(program), name]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        return done.stdout

    return run_one


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_reported(name: str, misuse: Callable[[str], str]) -> None:
    said = misuse(name)
    assert MISUSES[name] in said and bool(said) == bool(MISUSES[name])
