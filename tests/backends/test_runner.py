"""The kernels outside Python: on aarch64 under an emulator, and under ThreadSanitizer."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from kda_cases import BOUNDS, draw, rel_rms
from torch import Tensor

from mate.backends import native

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
needs_aarch64 = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user-static)",
)
needs_tsan = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("g++") and shutil.which("setarch")),
    reason="needs cmake, g++ and setarch",
)
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory) -> Path:
    """The kernels and tests/backends/kda_runner.cpp in one static program."""
    program = tmp_path_factory.mktemp("aarch64") / "kda_runner"
    sources = [p for p in (ROOT / "csrc/cpu").glob("*.cpp") if not re.search("avx|amx", p.name)]
    sources.append(ROOT / "tests/backends/kda_runner.cpp")
    command = [COMPILER, *FLAGS, f"-I{ROOT / 'csrc/include'}", *sources, "-static", "-pthread"]
    subprocess.run([*command, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def thread_sanitized(tmp_path_factory) -> Path:
    """The same for this processor, instrumented, with every instruction set."""
    folder = tmp_path_factory.mktemp("tsan")
    flags = ["-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DCMAKE_CXX_FLAGS=-fsanitize=thread"]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *flags], check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel"], check=True)
    program = folder / "kda_runner"
    source = ROOT / "tests/backends/kda_runner.cpp"
    command = ["g++", "-fsanitize=thread", "-g", f"-I{ROOT / 'csrc/include'}", source]
    command += [folder / "libmate_cpu.so", f"-Wl,-rpath,{folder}", "-o", program]
    subprocess.run(command, check=True)
    return program


def run(command: list, case, algorithm: int, threads: int) -> tuple[Tensor, Tensor, str]:
    """The output, the final state, and the instruction set that computed them."""
    t = case.tensors
    lens, state = t.get("cu_seqlens"), t.get("initial_state")
    num_seqs = t["v"].shape[0] if lens is None else len(lens) - 1
    gate = native.GATE_LOG_DECAY
    if "A_log" in t:
        softplus = case.options.get("lower_bound", -5.0) is None
        gate = native.GATE_SOFTPLUS if softplus else native.GATE_BOUNDED
    flags = native.L2NORM | native.BETA_SIGMOID | native.STATE_V_FIRST
    dtype = native.DTYPE_CODES[t["q"].dtype]
    header = struct.pack(
        "6q6i2f", num_seqs, t["v"].shape[1], t["q"].shape[2], t["v"].shape[2],
        lens is not None, state is not None, dtype, gate, flags, algorithm, threads, 0,
        128**-0.5, -5.0,
    )  # fmt: skip
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "cu_seqlens", "initial_state")
    blobs = [bytes(t[n].contiguous().view(torch.uint8).numpy()) for n in names if n in t]
    source, result = command[-1].parent / "in", command[-1].parent / "out"
    source.write_bytes(header + b"".join(blobs))
    done = subprocess.run([*command, source, result], capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    data = bytearray(result.read_bytes())
    count = t["v"].numel() * t["v"].element_size()
    output = torch.frombuffer(data[:count], dtype=t["v"].dtype).view(t["v"].shape)
    final = torch.frombuffer(data[count:], dtype=torch.float32)
    return output, final.view(num_seqs, t["v"].shape[2], 128, 128), done.stdout.strip()


def check(command: list, case, algorithm: int, threads: int) -> str:
    output, state, isa = run(command, case, algorithm, threads)
    expected, bounds = case.reference(), BOUNDS[case.tensors["q"].dtype]
    assert rel_rms(output, expected[0]) <= bounds[0]
    assert rel_rms(state, expected[1]) <= bounds[1]
    return isa


@needs_aarch64
@pytest.mark.parametrize("algorithm", [native.CHUNK, native.RECURRENT], ids=["chunk", "recurrent"])
@pytest.mark.parametrize(
    "options",
    [
        {"T": 37},
        {"T": 33, "gate": "softplus", "regime": "remembering", "dtype": torch.bfloat16},
        {"T": 20, "gate": "log", "regime": "erasing", "dtype": torch.float16, "Hv": 4},
        {"lens": [0, 17, 1, 40, 0], "gate": "log", "regime": "strong", "state": False},
    ],
    ids=["fp32", "bf16-softplus", "fp16-erasing-grouped", "varlen-strong"],
)
def test_aarch64_matches_the_recurrence(aarch64, options, algorithm):
    assert check([EMULATOR, aarch64], draw(**options), algorithm, threads=2) == "portable"


@needs_aarch64
def test_vectorised_for_neon(aarch64):
    """Fused multiply-adds on four floats, not one: the compiler saw the vectors."""
    objdump = COMPILER.replace("g++", "objdump")
    code = subprocess.run([objdump, "-d", aarch64], capture_output=True, text=True, check=True)
    assert len(re.findall(r"\tfmla\tv\d+\.4s", code.stdout)) > 100


@needs_tsan
@pytest.mark.parametrize("algorithm", [native.CHUNK, native.RECURRENT], ids=["chunk", "recurrent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_data_race(thread_sanitized, algorithm, dtype):
    """The one parallel region of a call, on more threads than cores. setarch: no random layout,
    which ThreadSanitizer cannot map on some kernels."""
    command = ["setarch", "-R", thread_sanitized]
    check(command, draw(T=70, Hqk=1, Hv=9, dtype=dtype), algorithm, threads=4)
    check(command, draw(lens=[3, 0, 40, 17, 1], Hqk=1, Hv=2, dtype=dtype), algorithm, threads=4)


@needs_tsan
def test_no_data_race_between_heads_that_share_a_window(thread_sanitized):
    command = ["setarch", "-R", thread_sanitized, "4"]
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
