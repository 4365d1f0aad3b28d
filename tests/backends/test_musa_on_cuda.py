"""csrc/gpu/musa.mu on an NVIDIA GPU, behind musa_shim/: fragments as MP31 has them, everything else
of arch/musa.h as it is, through all the tests of a GPU. Takes minutes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch finds no CUDA device on this machine"
)
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_every_test_of_a_gpu(tmp_path: Path) -> None:
    library = tmp_path / "libmate_musa_on_cuda.so"
    command = ["nvcc", "-x", "cu", "-DMATE_MUSA", "-std=c++17", "-O3", "-arch=native", "-shared"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-o", str(library)]
    command += [f"-I{ROOT / 'csrc/include'}", f"-I{HERE / 'musa_shim'}"]
    subprocess.run([*command, ROOT / "csrc/gpu/musa.mu"], check=True)
    files = ["backends/test_gpu.py", "backends/test_gpu_decode.py"]
    files += ["backends/test_gpu_layer_step.py", "layers/test_layer_gpu.py"]
    tests = [sys.executable, "-m", "pytest", *(str(HERE.parent / name) for name in files)]
    environment = os.environ | {"MATE_CUDA_LIBRARY": str(library)}
    done = subprocess.run(tests, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
