"""csrc/gpu/musa.mu through the compilers that there are, since mcc is not among them.

clang, which mcc is made from, reads it against bare stubs (musa_stubs/): what clang takes for
right, and no name that the stubs lack. nvcc makes code for an NVIDIA GPU of it, against a shim
(musa_shim/): that is the build which runs the operator's tests on one (docs/musa.md).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CLANG = os.environ.get("MATE_CLANG") or shutil.which("clang++")
needs_clang = pytest.mark.skipif(not CLANG, reason="needs clang++ (or MATE_CLANG)")


def check(side: str, *options: str, source: Path = ROOT / "csrc/gpu/musa.mu") -> str:
    """What clang finds wrong."""
    command = [str(CLANG), "-x", "cuda", f"--cuda-{side}-only", "--cuda-gpu-arch=sm_70"]
    command += ["-nocudainc", "-nocudalib", "-Wno-unknown-cuda-version", "-fsyntax-only"]
    command += ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc/include'}"]
    command += [f"-I{ROOT / 'csrc/gpu'}", f"-I{HERE / 'musa_stubs'}", *options, str(source)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@needs_clang
@pytest.mark.parametrize("side", ["device", "host"])
def test_clang_takes_it(side: str) -> None:
    assert check(side) == ""


@needs_clang
def test_clang_refuses_what_only_cuda_has(tmp_path: Path) -> None:
    source = tmp_path / "x.mu"
    body = "__device__ float f(const float* p) { return __ldg(p); }"
    source.write_text(f'#include "musa.mu"\n{body}\n')
    assert "use of undeclared identifier '__ldg'" in check("device", source=source)


@needs_clang
def test_other_gpus_and_old_compilers_are_refused() -> None:
    new = ["-DSTUB_MAJOR=5", "-DSTUB_MINOR=1"]
    assert "mate's kernels are for MP31" in check("device", "-DSTUB_ARCH=220", *new)
    old = ["-DSTUB_ARCH=310", "-DSTUB_MAJOR=4", "-DSTUB_MINOR=3"]
    for side in ("device", "host"):
        assert "mate's kernels need MTCC 5.1" in check(side, *old)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_nvcc_makes_code_of_it(tmp_path: Path) -> None:
    command = ["nvcc", "-x", "cu", "-DMATE_MUSA", "-std=c++17", "-ptx", "-arch=sm_90"]
    command += [f"-I{ROOT / 'csrc/include'}", f"-I{HERE / 'musa_shim'}", "-Werror=all-warnings"]
    target = tmp_path / "musa.ptx"
    subprocess.run([*command, ROOT / "csrc/gpu/musa.mu", "-o", target], check=True)
    text = target.read_text()
    assert "mma.sync" in text
    for other in ("wgmma", "cp.async", "ldmatrix", "mbarrier"):  # MP31 has none by these names
        assert other not in text
